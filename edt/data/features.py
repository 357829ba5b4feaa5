"""Extracted features - latents and labels - as training reads them: by batches of indices, straight
from the disk.

Two layouts. *Packed*, made by default: ``shard-00000.npy``, ... with the images in ImageFolder
order, ``labels.npy`` and ``manifest.json``, which says how they were made. *npy*, the release's:
``imagenet_features/{i}.npy`` of (1, C, H, W) and ``imagenet_labels/{i}.npy`` of (1,); the manifest
may be missing.

What is stored is one draw of the VAE's posterior (``draw`` "once"), or mean and deviation of each
orientation ("fresh")."""

from pathlib import Path

import numpy as np
import torch

from edt.utils.errors import UserError
from edt.utils.files import read_json

FEATURES, LABELS, MANIFEST = "imagenet_features", "imagenet_labels", "manifest.json"


class Features(torch.utils.data.Dataset):
    """Open features. Make one with :func:`open_features`.

    Attributes:
        manifest: how they were made; {} for a release's folder.
        labels: (count,) int64.
        latent_shape: (C, H, W).
        num_classes: from the manifest until :meth:`settle` has decided.
    """

    def __init__(
        self, path: Path, manifest: dict, labels: np.ndarray, latent_shape: tuple[int, ...]
    ):
        self.path, self.manifest, self.labels, self.latent_shape = (
            path,
            manifest,
            labels,
            tuple(latent_shape),
        )
        self.num_classes = len(manifest["classes"]) if "classes" in manifest else None

    @property
    def fresh(self) -> bool:
        """Whether each epoch draws flips and posterior samples anew."""
        return self.manifest.get("draw") == "fresh"

    def settle(
        self, image_size: int | None = None, vae: str | None = None, num_classes: int | None = None
    ) -> None:
        """Compare with what the user takes the features for (None: nothing), and settle the number
        of classes.

        Raises:
            UserError: they were made otherwise, or a label is beyond the classes.
        """
        made_with = {
            "image_size": self.manifest.get("image_size"),
            "vae": self.manifest.get("vae", {}).get("id"),
        }
        for name, wanted in {"image_size": image_size, "vae": vae}.items():
            if None not in (wanted, made_with[name]) and wanted != made_with[name]:
                raise UserError(
                    f"the features in {self.path} have {name} {made_with[name]}, not {wanted}; extract them anew"
                )
        if num_classes is None:
            num_classes = self.num_classes if self.num_classes is not None else 1000
        if num_classes and self.labels.max() >= num_classes:
            raise UserError(
                f"{self.path} has label {self.labels.max()}, beyond --num-classes {num_classes}"
            )
        if num_classes == 0:  # unconditional: every label is the null class
            self.labels = np.zeros_like(self.labels)
        self.num_classes = num_classes

    def notes(self) -> dict:
        """What a checkpoint records of its features."""
        names = ("image_size", "scaling_factor", "classes", "draw", "flips", "images_sha256")
        notes = {
            "count": len(self),
            **{name: self.manifest[name] for name in names if name in self.manifest},
        }
        if "seed" in self.manifest:
            notes["extraction_seed"] = self.manifest["seed"]
        if "vae" in self.manifest:
            notes |= {
                "vae": self.manifest["vae"]["id"],
                "vae_sha256": self.manifest["vae"]["sha256"],
            }
        return notes

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(
        self, batch: tuple[np.ndarray, np.ndarray]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What is stored for n images, and their labels.

        Args:
            batch: indices (n,) and flips (n,) bool, which choose the orientation of fresh features.

        Returns:
            latents (n, C, H, W) or, fresh, moments (n, 2C, H, W), float32; labels (n,) int64.
        """
        indices, flips = batch
        return torch.from_numpy(self._read(indices, flips)), torch.from_numpy(self.labels[indices])

    def _read(self, indices: np.ndarray, flips: np.ndarray) -> np.ndarray:
        raise NotImplementedError


def sample_posterior(moments: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """Latents from fresh features: moments (n, 2C, H, W) - mean, then deviation - and noise (n, C,
    H, W).
    """
    mean, deviation = moments.chunk(2, dim=1)
    return torch.addcmul(mean, deviation, noise)


class PackedFeatures(Features):
    """The packed layout, memory-mapped."""

    def __init__(self, path: Path, manifest: dict):
        shape, shards = manifest["shape"], manifest["shards"]
        # Fresh features are (count, orientations, 2C, H, W), with one orientation if made without
        # flips; else (count, C, H, W).
        self.orientations = shape[0] if manifest["draw"] == "fresh" else 1
        self.shards = [
            self._map(path / shard["file"], (shard["count"], *shape), manifest["dtype"]).reshape(
                -1, *shape[-3:]
            )
            for shard in shards
        ]
        self.starts = np.array([shard["start"] for shard in shards])
        counts = [shard["count"] for shard in shards]
        if (
            list(self.starts) != [sum(counts[:i]) for i in range(len(counts))]
            or sum(counts) != manifest["count"]
        ):
            raise UserError(
                f"the shards of {path} do not make up {manifest['count']} images; run extract_features.py again"
            )
        labels = self._map(path / "labels.npy", (manifest["count"],), "int64")
        channels = shape[-3] // (2 if manifest["draw"] == "fresh" else 1)
        super().__init__(path, manifest, np.array(labels), (channels, *shape[-2:]))

    @staticmethod
    def _map(file: Path, shape: tuple[int, ...], dtype: str) -> np.ndarray:
        try:
            array = np.asarray(
                np.load(file, mmap_mode="r", allow_pickle=False)
            )  # a memmap object is slower to index
        except (OSError, ValueError, EOFError):
            raise UserError(
                f"cannot read {file}; it is missing or cut short: run extract_features.py again"
            ) from None
        if array.shape != shape or array.dtype != dtype:
            raise UserError(
                f"{file} holds {array.dtype} {array.shape}, its manifest says {dtype} {shape}; extract it anew"
            )
        return array

    def _read(self, indices: np.ndarray, flips: np.ndarray) -> np.ndarray:
        owners = np.searchsorted(self.starts, indices, side="right") - 1
        places = (indices - self.starts[owners]) * self.orientations + flips % self.orientations
        rows = np.empty((len(indices), *self.shards[0].shape[1:]), np.float32)
        # One by one, each in one piece: indexing by arrays would copy everything twice.
        for row, owner, place in zip(rows, owners.tolist(), places.tolist(), strict=True):
            row[:] = self.shards[owner][place]
        return rows


class NpyFeatures(Features):
    """The release's layout."""

    def __init__(self, path: Path, manifest: dict):
        names = [{file.stem for file in (path / kind).glob("*.npy")} for kind in (FEATURES, LABELS)]
        if not names[0]:
            raise UserError(f"no features in {path}; make them with extract_features.py")
        if names[0] != names[1]:
            odd = sorted(names[0] ^ names[1])[0]
            raise UserError(
                f"{path} holds {len(names[0])} features but {len(names[1])} labels (see {odd}.npy); extract them anew"
            )
        if manifest.get("count", len(names[0])) != len(names[0]):
            raise UserError(
                f"{path} holds {len(names[0])} of {manifest['count']} features; run extract_features.py again"
            )
        self.path = path
        self.names = sorted(names[0], key=lambda name: (len(name), name))  # 2 before 10
        labels = np.array([self._load(LABELS, name, (1,)) for name in self.names], dtype=np.int64)[
            :, 0
        ]
        super().__init__(path, manifest, labels, self._load(FEATURES, self.names[0]).shape[-3:])

    def _load(self, kind: str, name: str, shape: tuple[int, ...] | None = None) -> np.ndarray:
        file = self.path / kind / f"{name}.npy"
        try:
            array = np.load(file, allow_pickle=False)
        except (OSError, ValueError, EOFError):
            raise UserError(
                f"cannot read the feature file {file}; it is damaged: delete it and extract it anew"
            ) from None
        if shape is not None and array.shape != shape:
            raise UserError(
                f"{file} has shape {array.shape}, not {shape} as the others; extract it anew"
            )
        return array

    def _read(self, indices: np.ndarray, flips: np.ndarray) -> np.ndarray:
        shape = (1, *self.latent_shape)
        return np.concatenate([self._load(FEATURES, self.names[i], shape) for i in indices]).astype(
            np.float32
        )


def open_features(path: str | Path) -> Features:
    """Open a folder of features of either layout.

    Raises:
        UserError: there are none, or files, labels and manifest disagree.
    """
    path = Path(path)
    manifest = read_json(path / MANIFEST) if (path / MANIFEST).exists() else {}
    if "shards" in manifest:
        try:
            return PackedFeatures(path, manifest)
        except (KeyError, TypeError):
            raise UserError(
                f"{path / MANIFEST} is not extract_features.py's; run it again into another folder"
            ) from None
    if (path / "extraction.json").exists() and not manifest:
        raise UserError(
            f"the extraction into {path} has not finished; run extract_features.py again"
        )
    return NpyFeatures(path, manifest)
