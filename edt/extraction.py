"""Images to features: decode, crop, flip, encode, save (method of the release: one draw an image, frozen)."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torchvision.transforms.functional import to_tensor

from edt.errors import UserError
from edt.features import FEATURES, LABELS, MANIFEST
from edt.files import whole_file, write_json
from edt.images import center_crop, open_image_folder
from edt.randomness import integers, normal
from edt.vae import LatentVAE, PixelVAE, latent_shape


@dataclasses.dataclass(frozen=True)
class ExtractionConfig:
    """What the features depend on, besides the images and the VAE."""

    image_size: int = 256
    seed: int = 0
    flip: bool = True
    """Mirror half of the images, one coin an image, frozen."""


class CroppedImages(torch.utils.data.Dataset):
    """(index, image (3, S, S) in [-1, 1], label) of every image of a folder of class folders."""

    def __init__(self, path: str | Path, image_size: int):
        self.folder, self.image_size = open_image_folder(path), image_size

    def __len__(self) -> int:
        return len(self.folder)

    def __getitem__(self, index: int) -> tuple[int, torch.Tensor, int]:
        file = self.folder.samples[index][0]
        try:
            image, label = self.folder[index]
        except (OSError, SyntaxError, ValueError):  # PIL's words for files that are no image, or half of one
            raise UserError(f"cannot read the image {file}; replace or remove it") from None
        return index, to_tensor(center_crop(image, self.image_size)) * 2 - 1, label


def extract_features(
    images: CroppedImages,
    vae: PixelVAE | LatentVAE,
    vae_name: str,
    path: str | Path,
    config: ExtractionConfig,
    *,
    rank: int = 0,
    world_size: int = 1,
    batch_size: int = 32,
    num_workers: int = 4,
    device: torch.device | str = "cpu",
) -> Iterator[int]:
    """Encode this process's share of the images; yields the number of images done after each batch.

    Files are named by the image's index, and flip and posterior sample follow from it too, so any number of
    processes writes the same set.
    """
    path, shape = Path(path), latent_shape(vae, config.image_size)
    for kind in (FEATURES, LABELS):
        (path / kind).mkdir(parents=True, exist_ok=True)
    if rank == 0:
        manifest = {"version": 1, "layout": "npy", "count": len(images), "shape": shape, "dtype": "float32",
                    "vae": vae_name, "scaling_factor": vae.scaling_factor, "crop": "center",
                    "classes": images.folder.classes, **dataclasses.asdict(config)}  # fmt: skip
        write_json(path / MANIFEST, manifest)
    share = torch.utils.data.Subset(images, range(rank, len(images), world_size))
    for indices, pixels, labels in torch.utils.data.DataLoader(share, batch_size, num_workers=num_workers):
        if config.flip:
            mirrored = integers(config.seed, "flip", 0, indices, 2).bool()
            pixels = torch.where(mirrored[:, None, None, None], pixels.flip(-1), pixels)
        latents = vae.encode(pixels.to(device), normal(config.seed, "posterior", 0, indices, shape, device))
        for index, latent, label in zip(indices.tolist(), latents.cpu().numpy(), labels.numpy(), strict=True):
            for kind, value in ((FEATURES, latent[None]), (LABELS, np.atleast_1d(label))):
                with whole_file(path / kind / f"{index}.npy", durable=False) as temporary, open(temporary, "wb") as file:
                    np.save(file, value)
        yield len(indices)
