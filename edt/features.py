"""Extracted features - latents and labels - as training reads them.

Layout, as the release's: ``imagenet_features/{i}.npy`` of (1, C, H, W) and ``imagenet_labels/{i}.npy`` of (1,), with i
the image's index in the ImageFolder. Beside them ``manifest.json`` says how they were made; the release's own folders
have none, and are read all the same.
"""

from pathlib import Path

import numpy as np
import torch

from edt.errors import UserError
from edt.files import read_json

FEATURES, LABELS, MANIFEST = "imagenet_features", "imagenet_labels", "manifest.json"


class Features(torch.utils.data.Dataset):
    """Latents and labels by index, a batch at a time.

    Attributes:
        latent_shape: (C, H, W).
        manifest: how the features were made; empty for a release's folder.
        num_classes: from the manifest, or None.
    """

    def __init__(self, path: str | Path):
        """Open a folder of features.

        Raises:
            UserError: there are none, features and labels do not match, or a file cannot be read.
        """
        self.path = Path(path)
        names = [{file.stem for file in (self.path / kind).glob("*.npy")} for kind in (FEATURES, LABELS)]
        if not names[0]:
            raise UserError(f"no features in {self.path / FEATURES}; make them with extract_features.py")
        if names[0] != names[1]:
            odd = sorted(names[0] ^ names[1])[0]
            raise UserError(
                f"{self.path} holds {len(names[0])} features but {len(names[1])} labels (see {odd}.npy); extract them anew"
            )
        self.names = sorted(names[0], key=lambda name: (len(name), name))  # 2 before 10
        self.manifest = read_json(self.path / MANIFEST) if (self.path / MANIFEST).exists() else {}
        if self.manifest.get("count", len(self.names)) != len(self.names):
            raise UserError(
                f"{self.path} holds {len(self.names)} of {self.manifest['count']} features; run extract_features.py again"
            )
        self.num_classes = len(self.manifest["classes"]) if "classes" in self.manifest else None
        self.latent_shape = tuple(self._read(FEATURES, self.names[0]).shape[-3:])
        self.labels = np.concatenate([self._read(LABELS, name).reshape(1) for name in self.names]).astype(np.int64)

    def check(self, image_size: int | None = None, vae: str | None = None, num_classes: int | None = None) -> None:
        """Compare with what the user takes the features for (None: nothing), and settle the number of classes.

        Raises:
            UserError: they were made otherwise, or a label is beyond the classes.
        """
        for name, wanted in {"image_size": image_size, "vae": vae}.items():
            if wanted is not None and self.manifest.get(name, wanted) != wanted:
                raise UserError(
                    f"the features in {self.path} have {name} {self.manifest[name]}, not {wanted}; extract them anew"
                )
        if num_classes is None:
            num_classes = self.num_classes if self.num_classes is not None else 1000
        if self.labels.max() >= max(num_classes, 1) and num_classes:
            raise UserError(f"{self.path} has label {self.labels.max()}, beyond --num-classes {num_classes}")
        self.num_classes = num_classes

    def notes(self) -> dict:
        """What a checkpoint records of its features."""
        return {
            name: self.manifest[name] for name in ("vae", "image_size", "scaling_factor", "classes") if name in self.manifest
        }

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, indices: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Latents (n, C, H, W) float32 and labels (n,) int64 of n images."""
        latents = np.empty((len(indices), *self.latent_shape), dtype=np.float32)
        for row, index in enumerate(indices):
            latent = self._read(FEATURES, self.names[index])
            if latent.shape[-3:] != self.latent_shape or latent.size != latents[row].size:
                file = self.path / FEATURES / f"{self.names[index]}.npy"
                raise UserError(f"{file} has shape {latent.shape}, the others {self.latent_shape}; extract it anew")
            latents[row] = latent.reshape(self.latent_shape)
        labels = self.labels[indices] if self.num_classes != 0 else np.zeros(len(indices), np.int64)  # 0: unconditional
        return torch.from_numpy(latents), torch.from_numpy(labels)

    def _read(self, kind: str, name: str) -> np.ndarray:
        file = self.path / kind / f"{name}.npy"
        try:
            return np.load(file, allow_pickle=False)
        except (OSError, ValueError, EOFError):
            raise UserError(f"cannot read the feature file {file}; it is damaged: delete it and extract it anew") from None
