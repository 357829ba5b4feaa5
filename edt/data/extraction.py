"""Images to features: decode, crop, flip, encode, write. What is written depends on the images'
indices only: any number of processes and any batch size make the same files, and a second run makes
what is missing (see edt.data.features)."""

import dataclasses
import fcntl
import hashlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torchvision.transforms.functional import to_tensor

from edt.data.features import FEATURES, LABELS, MANIFEST, sample_posterior
from edt.data.images import center_crop, open_image_folder
from edt.data.vae import LatentVAE, PixelVAE, latent_shape
from edt.utils.errors import UserError
from edt.utils.files import (
    atomic_write,
    file_sha256,
    read_json,
    write_json,
    write_or_check_settings,
)
from edt.utils.randomness import integers, normal

CLAIM = "extraction.json"


@dataclasses.dataclass(frozen=True)
class ExtractionConfig:
    """What the features depend on, besides the images and the VAE."""

    image_size: int = 256
    seed: int = 0
    draw: str = "once"
    """"once": one flip and one posterior sample an image, frozen (the release); "fresh": mean and
    deviation of both orientations in float16, flips and samples drawn anew every epoch."""
    flip: bool = True
    """False: images are never mirrored."""
    layout: str = "packed"
    """"packed" or "npy" (the release's, two files an image)."""
    shard_size: int = 8192
    """Images of a packed file."""


class CroppedImages(torch.utils.data.Dataset):
    """(index, image (3, S, S) in [-1, 1]) of every image of a folder of class folders."""

    def __init__(self, path: str | Path, image_size: int):
        self.folder, self.image_size = open_image_folder(path), image_size
        self.labels = np.array(self.folder.targets, dtype=np.int64)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[int, torch.Tensor]:
        file = self.folder.samples[index][0]
        try:
            image, _ = self.folder[index]
        except (
            OSError,
            SyntaxError,
            ValueError,
        ):  # PIL's words for files that are no image, or half of one
            raise UserError(
                f"cannot read the image {file}; put a whole one in its place and run again (without it the features are others: "
                "they need a new --features-path)"
            ) from None
        return index, to_tensor(center_crop(image, self.image_size)) * 2 - 1


class Extraction:
    """One extraction: what is to be written where, and one process's share of it.

    Args:
        vae_name: as given by the user; goes into the manifest.
        rank, world_size: this process among those that share the work.
    """

    def __init__(
        self,
        images: CroppedImages,
        vae: PixelVAE | LatentVAE,
        vae_name: str,
        path: str | Path,
        config: ExtractionConfig,
        rank: int = 0,
        world_size: int = 1,
    ):
        self.images, self.vae, self.path, self.config = images, vae, Path(path), config
        self.latent_shape = channels, height, width = latent_shape(vae, config.image_size)
        fresh = config.draw == "fresh"
        self.shape = (1 + config.flip, 2 * channels, height, width) if fresh else self.latent_shape
        self.dtype = "float16" if fresh else "float32"
        if fresh and config.layout == "npy":
            raise UserError(
                "--draw fresh needs --layout packed; the release's layout has room for one draw only"
            )
        self.made_from = {
            "version": 1,
            "count": len(images),
            "shape": self.shape,
            "dtype": self.dtype,
            "flips": ("both" if fresh else "once") if config.flip else "none",
            "scaling_factor": vae.scaling_factor,
            "crop": "center",
            "vae": {"id": vae_name, "sha256": vae.sha256},
            "classes": images.folder.classes,
            "images_sha256": hashlib.sha256(
                "\n".join(file for file, _ in self._names()).encode()
            ).hexdigest(),
            **dataclasses.asdict(config),
        }
        size = config.shard_size if config.layout == "packed" else 1
        self.units = [
            range(start, min(start + size, len(images))) for start in range(0, len(images), size)
        ]
        self.share = range(rank, len(self.units), world_size)

    def _names(self) -> list[tuple[str, int]]:
        root = Path(self.images.folder.root)
        return [
            (str(Path(file).relative_to(root)), label) for file, label in self.images.folder.samples
        ]

    def _files(self, unit: int) -> list[Path]:
        if self.config.layout == "packed":
            return [self.path / f"shard-{unit:05d}.npy"]
        return [self.path / kind / f"{unit}.npy" for kind in (FEATURES, LABELS)]

    def run(
        self, batch_size: int, num_workers: int, device: torch.device | str = "cpu"
    ) -> Iterator[int]:
        """Write what is missing of this process's share; yields the number of images as they are
        done.

        Raises:
            UserError: the folder holds other features, or an image cannot be read.
        """
        write_or_check_settings(self.path / CLAIM, self.made_from, "give another --features-path")
        for kind in (FEATURES, LABELS) if self.config.layout == "npy" else ():
            (self.path / kind).mkdir(exist_ok=True)
        todo = [unit for unit in self.share if not all(file.exists() for file in self._files(unit))]
        yield sum(len(self.units[unit]) for unit in self.share) - sum(
            len(self.units[unit]) for unit in todo
        )
        wanted = torch.utils.data.Subset(
            self.images, [i for unit in todo for i in self.units[unit]]
        )
        loader = iter(torch.utils.data.DataLoader(wanted, batch_size, num_workers=num_workers))
        encoded = np.empty((0, *self.shape), self.dtype)
        for unit in todo:
            rows, done = np.empty((len(self.units[unit]), *self.shape), self.dtype), 0
            while done < len(rows):
                if not len(encoded):
                    encoded = self._encode(*next(loader), device)
                some = encoded[: len(rows) - done]
                rows[done : done + len(some)] = some
                done, encoded = done + len(some), encoded[len(some) :]
                yield len(some)
            self._write(unit, rows)
        self._finish()

    def drop_damaged(self) -> list[Path]:
        """Remove the packed files of this process's share that differ from a finished extraction's
        manifest, and the manifest then, so that :meth:`run` makes them anew; returns them."""
        manifest = read_json(self.path / MANIFEST) if (self.path / MANIFEST).exists() else {}
        shards = manifest.get("shards", [])
        try:
            files = [
                (self.path / shard["file"], shard["sha256"])
                for shard in shards[self.share.start :: self.share.step]
            ]
        except (KeyError, TypeError):
            raise UserError(
                f"{self.path / MANIFEST} is not of an extraction; give another --features-path"
            ) from None
        damaged = [
            file for file, sha256 in files if not file.exists() or file_sha256(file) != sha256
        ]
        for file in damaged:
            file.unlink(missing_ok=True)
        if damaged or (shards and not (self.path / "labels.npy").exists()):
            (self.path / MANIFEST).unlink(missing_ok=True)
        return damaged

    def _encode(
        self, indices: torch.Tensor, pixels: torch.Tensor, device: torch.device | str
    ) -> np.ndarray:
        """What is stored of some images, (n, *shape)."""
        seed, config = self.config.seed, self.config
        if config.draw == "fresh":
            turned = [pixels, pixels.flip(-1)][: 1 + config.flip]
            moments = [torch.cat(self.vae.encode(one.to(device)), dim=1) for one in turned]
            return torch.stack(moments, dim=1).half().cpu().numpy()
        if config.flip:
            mirrored = integers(seed, "flip", 0, indices, 2).bool()
            pixels = torch.where(mirrored[:, None, None, None], pixels.flip(-1), pixels)
        moments = torch.cat(self.vae.encode(pixels.to(device)), dim=1)
        noise = normal(seed, "posterior", 0, indices, self.latent_shape, device)
        return sample_posterior(moments, noise).cpu().numpy()

    def _write(self, unit: int, rows: np.ndarray) -> None:
        images = self.units[unit]
        contents = (
            [rows]
            if self.config.layout == "packed"
            else [rows, self.images.labels[images.start : images.stop]]
        )
        for file, content in zip(self._files(unit), contents, strict=True):
            if self.config.layout == "packed":
                for left_over in file.parent.glob(f".{file.name}.*.tmp"):  # of a killed run
                    left_over.unlink()
            with (
                atomic_write(file, durable=len(images) > 1) as temporary,
                open(temporary, "wb") as stream,
            ):
                np.save(stream, content)

    def _finish(self) -> None:
        """Write labels and manifest if this process is the last to finish."""
        with open(self.path / ".lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            missing = any(
                not file.exists() for unit in range(len(self.units)) for file in self._files(unit)
            )
            if missing or (self.path / MANIFEST).exists():
                return
            manifest = dict(self.made_from)
            if self.config.layout == "packed":
                with (
                    atomic_write(self.path / "labels.npy") as temporary,
                    open(temporary, "wb") as stream,
                ):
                    np.save(stream, self.images.labels)
                manifest["shards"] = [
                    {
                        "file": file.name,
                        "start": unit.start,
                        "count": len(unit),
                        "sha256": file_sha256(file),
                    }
                    for unit, file in (
                        (unit, self._files(i)[0]) for i, unit in enumerate(self.units)
                    )
                ]
            write_json(self.path / MANIFEST, manifest)
