"""Extracted features, latents and labels, read from the disk batch by batch.

There are two layouts. *Packed* is made by default: ``shard-00000.npy``, ... hold the images in the
order of the ``ImageFolder``, ``labels.npy`` their labels, and ``manifest.json`` the settings of the
extraction. *npy* is the release's: ``imagenet_features/{i}.npy`` of (1, C, H, W) and
``imagenet_labels/{i}.npy`` of (1,); the manifest may be missing.

There are two draw modes. *once* stores one latent per image: flip and posterior sample are drawn at
extraction. *fresh* stores mean and standard deviation of the VAE's posterior for each orientation,
and training draws a new flip and a new sample in every epoch.
"""

import dataclasses
import hashlib
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch

from edt.utils.errors import UserError
from edt.utils.files import read_json

DrawMode = Literal["once", "fresh"]
Layout = Literal["packed", "npy"]

FEATURES_FOLDER, LABELS_FOLDER = "imagenet_features", "imagenet_labels"
LABELS_FILE = "labels.npy"
MANIFEST_FILE = "manifest.json"  # written when the last feature is
SETTINGS_FILE = "extraction.json"  # written before the first feature is
SIZES_FILE = "image_sizes.npy"  # bytes of every image file when it was extracted


class Batch(NamedTuple):
    """The features and labels of b images."""

    stored: torch.Tensor  # (b, C, H, W) latents; (b, 2C, H, W) moments if drawn fresh; float32
    labels: torch.Tensor  # (b,) int64


@dataclasses.dataclass(frozen=True)
class FeatureInfo:
    """A checkpoint's record of the features that it was trained on. None means unknown."""

    count: int | None = None
    """Number of images."""
    image_size: int | None = None
    """Side of the images in pixels."""
    scaling_factor: float | None = None
    """Stored latents are the VAE's latents multiplied by this factor."""
    classes: list[str] | None = None
    """Names of the class folders, in the order of the labels."""
    draw: str | None = None
    """"once" or "fresh", see the module's docstring."""
    flips: str | None = None
    """"none"; "once": drawn at extraction; "both": both orientations are stored."""
    images_sha256: str | None = None
    """Hash of the images' paths below their folder, in order."""
    extraction_seed: int | None = None
    """Seed of the flips and posterior samples that were drawn at extraction."""
    vae: str | None = None
    """Name of the VAE, as the user gave it."""
    vae_sha256: str | None = None
    """Hash of the VAE's weights; None for pixels, which have none."""
    shift_factor: float | None = None
    """This was subtracted from the VAE's own latents before they were scaled; None: nothing."""
    content_sha256: str | None = None
    """Hash of the stored values and of the labels; None in the npy layout, which has no hashes."""

    def to_dict(self) -> dict[str, Any]:
        """The known fields, as values for JSON."""
        # With a VAE known, a hash of None is known too: the VAE has no weights.
        return {
            name: value
            for name, value in dataclasses.asdict(self).items()
            if value is not None or (name == "vae_sha256" and self.vae is not None)
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "FeatureInfo":
        """Inverse of :meth:`to_dict`. Unknown keys are ignored, missing ones become None."""
        names = {field.name for field in dataclasses.fields(cls)}
        return cls(**{name: value for name, value in values.items() if name in names})


class Features(torch.utils.data.Dataset[Batch]):
    """Open features. Make one with :func:`open_features`.

    Attributes:
        manifest: the settings of the extraction; {} for a folder of the release.
        labels: (count,) int64.
        latent_shape: (C, H, W).
        num_classes: from the manifest, None if unknown; :meth:`validate_against` sets it.
    """

    def __init__(
        self,
        path: Path,
        manifest: dict[str, Any],
        labels: np.ndarray,
        latent_shape: tuple[int, ...],
    ):
        self.path, self.manifest, self.labels = path, manifest, labels
        self.latent_shape = tuple(latent_shape)
        self.num_classes = len(manifest["classes"]) if "classes" in manifest else None

    @property
    def fresh(self) -> bool:
        """Whether every epoch draws its own flips and posterior samples."""
        return self.manifest.get("draw") == "fresh"

    def validate_against(
        self, image_size: int | None = None, num_classes: int | None = None
    ) -> None:
        """Compare the features with the user's expectations, and fix the number of classes.

        Args:
            image_size: side of the images in pixels; None expects nothing.
            num_classes: number of classes of the model. None takes the manifest's, or ImageNet's
                1000 without a manifest. With 0, an unconditional model, every label becomes 0.

        Raises:
            UserError: an expectation is not met, or a label is outside the classes.
        """
        actual = self.manifest.get("image_size")
        if None not in (actual, image_size) and actual != image_size:
            raise UserError(
                f"the features in {self.path} have image_size {actual}, not {image_size}; "
                "leave --image-size out, or extract such features into a new --features-path"
            )
        if num_classes is None:
            num_classes = self.num_classes if self.num_classes is not None else 1000
        largest = self.labels.max()
        if num_classes and largest >= num_classes:
            raise UserError(
                f"{self.path} has label {largest}, beyond --num-classes {num_classes}; "
                f"give at least {largest + 1}"
            )
        if num_classes == 0:
            # 0 is then the null class, the only row of the label embedding.
            self.labels = np.zeros_like(self.labels)
        self.num_classes = num_classes

    def info(self) -> FeatureInfo:
        """The record of these features, for checkpoints."""
        manifest = self.manifest
        vae = manifest.get("vae", {})
        return FeatureInfo(
            count=len(self),
            image_size=manifest.get("image_size"),
            scaling_factor=manifest.get("scaling_factor"),
            classes=manifest.get("classes"),
            draw=manifest.get("draw"),
            flips=manifest.get("flips"),
            images_sha256=manifest.get("images_sha256"),
            extraction_seed=manifest.get("seed"),
            vae=vae.get("id"),
            vae_sha256=vae.get("sha256"),
            shift_factor=vae.get("shift_factor"),
            content_sha256=self._content_sha256(),
        )

    def _content_sha256(self) -> str | None:
        """See :class:`FeatureInfo`."""
        return None

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, selection: tuple[np.ndarray, np.ndarray]) -> Batch:
        """Read b images at once.

        Args:
            selection: indices (b,) and flips (b,), both integers. ``flips[i]`` selects the stored
                orientation: 0 original, 1 mirrored. It is ignored if only one is stored.

        Raises:
            UserError: a feature file is missing or damaged.
        """
        indices, flips = selection
        stored = self._read(indices, flips)
        return Batch(torch.from_numpy(stored), torch.from_numpy(self.labels[indices]))

    def _read(self, indices: np.ndarray, flips: np.ndarray) -> np.ndarray:
        """The stored latents (b, C, H, W) or moments (b, 2C, H, W) of the images, float32."""
        raise NotImplementedError


def sample_posterior(moments: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """Sample latents from the VAE's posterior.

    Args:
        moments: mean, then standard deviation, (B, 2C, H, W).
        noise: standard normal, (B, C, H, W).

    Returns:
        latents (B, C, H, W).
    """
    mean, deviation = moments.chunk(2, dim=1)
    return torch.addcmul(mean, deviation, noise)


def map_array(file: Path, shape: tuple[int, ...], dtype: str) -> np.ndarray:
    """Map an .npy file into memory.

    Raises:
        UserError: it cannot be read, or holds an array of another shape or type.
    """
    try:
        # A plain array over the mapped memory: np.memmap objects are slower to index.
        array = np.asarray(np.load(file, mmap_mode="r", allow_pickle=False))
    except (OSError, ValueError, EOFError):
        raise UserError(
            f"cannot read {file}; it is missing or cut short: "
            "delete it, if it exists, and run extract_features.py again"
        ) from None
    if array.shape != shape or array.dtype != dtype:
        raise UserError(
            f"{file} holds {array.dtype} {array.shape}, its manifest says {dtype} {shape}; "
            "delete it and run extract_features.py again"
        )
    return array


class PackedFeatures(Features):
    """The packed layout, memory-mapped: only the rows that are read come into memory."""

    def __init__(self, path: Path, manifest: dict[str, Any]):
        shape, shards = manifest["shape"], manifest["shards"]
        fresh = manifest["draw"] == "fresh"
        # A row of a shard is an image's (C, H, W) or, if drawn fresh, its (orientations, 2C, H, W).
        # There is one orientation if the extraction had no flips.
        self.num_orientations = shape[0] if fresh else 1
        self.shards = []
        for shard in shards:
            file, shard_shape = path / shard["file"], (shard["count"], *shape)
            images = map_array(file, shard_shape, manifest["dtype"])
            self.shards.append(images.reshape(-1, *shape[-3:]))
        self.starts = np.array([shard["start"] for shard in shards])
        ends = np.cumsum([shard["count"] for shard in shards]).tolist()
        if self.starts.tolist() != [0, *ends[:-1]] or ends[-1] != manifest["count"]:
            raise UserError(
                f"the shards in {path / MANIFEST_FILE} do not add up to {manifest['count']} images;"
                " run extract_features.py again into another folder"
            )
        labels = map_array(path / LABELS_FILE, (manifest["count"],), "int64")
        channels = shape[-3] // 2 if fresh else shape[-3]
        super().__init__(path, manifest, np.array(labels), (channels, *shape[-2:]))

    def _content_sha256(self) -> str | None:
        hashes = [shard.get("sha256") for shard in self.manifest["shards"]]
        if None in hashes:
            return None
        return hashlib.sha256("".join(hashes).encode() + self.labels.tobytes()).hexdigest()

    def _read(self, indices: np.ndarray, flips: np.ndarray) -> np.ndarray:
        owners = np.searchsorted(self.starts, indices, side="right") - 1
        rows = (indices - self.starts[owners]) * self.num_orientations
        rows += flips % self.num_orientations
        stored = np.empty((len(indices), *self.shards[0].shape[1:]), np.float32)
        # Row by row, each of which is contiguous: indexing by arrays would copy everything twice.
        for image, owner, row in zip(stored, owners.tolist(), rows.tolist(), strict=True):
            image[:] = self.shards[owner][row]
        return stored


class NpyFeatures(Features):
    """The release's layout: two files per image."""

    def __init__(self, path: Path, manifest: dict[str, Any]):
        feature_names = {file.stem for file in (path / FEATURES_FOLDER).glob("*.npy")}
        label_names = {file.stem for file in (path / LABELS_FOLDER).glob("*.npy")}
        if not feature_names:
            raise UserError(f"no features in {path}; make them with extract_features.py")
        if feature_names != label_names:
            unpaired = min(feature_names ^ label_names)
            raise UserError(
                f"{path} holds {len(feature_names)} features but {len(label_names)} labels "
                f"(see {unpaired}.npy); run extract_features.py again"
            )
        if manifest.get("count", len(feature_names)) != len(feature_names):
            raise UserError(
                f"{path} holds {len(feature_names)} of {manifest['count']} features; "
                "run extract_features.py again"
            )
        self.path = path
        self.names = sorted(feature_names, key=lambda name: (len(name), name))  # 2 before 10
        labels = [self._load(LABELS_FOLDER, name, (1,)) for name in self.names]
        latent_shape = self._load(FEATURES_FOLDER, self.names[0]).shape[-3:]
        super().__init__(path, manifest, np.array(labels, dtype=np.int64)[:, 0], latent_shape)

    def _load(self, folder: str, name: str, shape: tuple[int, ...] | None = None) -> np.ndarray:
        """Read the file of one image. None accepts any shape."""
        file = self.path / folder / f"{name}.npy"
        try:
            array = np.load(file, allow_pickle=False)
        except (OSError, ValueError, EOFError):
            raise UserError(
                f"cannot read the feature file {file}; it is damaged: "
                "delete it and run extract_features.py again"
            ) from None
        if shape is not None and array.shape != shape:
            raise UserError(
                f"{file} has shape {array.shape}, not {shape} like the others; "
                "delete it and run extract_features.py again"
            )
        return array

    def _read(self, indices: np.ndarray, flips: np.ndarray) -> np.ndarray:
        shape = (1, *self.latent_shape)
        images = [self._load(FEATURES_FOLDER, self.names[i], shape) for i in indices]
        return np.concatenate(images).astype(np.float32)


def open_features(path: str | Path) -> Features:
    """Open a folder of features of either layout.

    Raises:
        UserError: there are no features, or files, labels and manifest disagree.
    """
    path = Path(path)
    manifest_file = path / MANIFEST_FILE
    manifest = read_json(manifest_file) if manifest_file.exists() else {}
    if "shards" in manifest:
        try:
            return PackedFeatures(path, manifest)
        except (KeyError, TypeError):
            raise UserError(
                f"{manifest_file} was not written by extract_features.py; "
                "run extract_features.py into another folder"
            ) from None
    if (path / SETTINGS_FILE).exists() and not manifest:
        raise UserError(
            f"the extraction into {path} has not finished; run extract_features.py again"
        )
    return NpyFeatures(path, manifest)
