"""Extract features from a folder of images: decode, crop, mirror, encode, write.

Every stored value is a function of the image, its index and the settings. So the files do not
depend on the number of processes or the batch size, except for float rounding inside the VAE.
Processes do not communicate: every shard belongs to one process, and the process that finishes last
writes the manifest. A second run writes the missing shards. :mod:`edt.data.features` describes
layouts and draw modes.
"""

import contextlib
import dataclasses
from collections.abc import Generator, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Subset

from edt.data.batches import read_loader
from edt.data.features import (
    FEATURES_FOLDER,
    LABELS_FILE,
    LABELS_FOLDER,
    MANIFEST_FILE,
    SETTINGS_FILE,
    SIZES_FILE,
    DrawMode,
    Layout,
    map_array,
    sample_posterior,
)
from edt.data.images import CroppedImages
from edt.data.vae import VAE, latent_shape
from edt.utils.choices import check_fields
from edt.utils.errors import UserError
from edt.utils.files import (
    atomic_write,
    file_lock,
    file_sha256,
    read_json,
    write_json,
    write_or_check_settings,
)
from edt.utils.randomness import integers, normal


@dataclasses.dataclass(frozen=True)
class ExtractionConfig:
    """The settings of an extraction, apart from the images and the VAE.

    Raises:
        UserError: a field is not one of its choices or out of range, or two cannot be combined.
    """

    image_size: int = 256
    """Side of the images in pixels."""
    seed: int = 0
    """Of the flips and posterior samples that are drawn at extraction."""
    draw: DrawMode = "once"
    """"once": one flip and one posterior sample per image, as in the release. "fresh": mean and
    standard deviation of both orientations in float16; every epoch draws new ones."""
    flip: bool = True
    """False: images are never mirrored."""
    layout: Layout = "packed"
    """"packed": large files. "npy": two files per image, as in the release."""
    shard_size: int = 8192
    """Images per file of the packed layout."""

    def __post_init__(self) -> None:
        check_fields(self)
        for name in ("image_size", "shard_size"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}; give a number of at least 1")
        if self.draw == "fresh" and self.layout == "npy":
            raise UserError(
                "--draw fresh needs --layout packed; the release's layout holds one draw only"
            )


class Extraction:
    """One extraction, and the part of it that this process does.

    Args:
        images: the images.
        vae: their encoder.
        vae_name: the VAE's name as the user gave it; recorded in the manifest.
        path: folder of the features.
        config: the settings.
        rank: number of this process among those that share the work, from 0.
        world_size: number of these processes.

    Attributes:
        shards: the image indices of each shard. In the npy layout every image is a shard.
        my_shards: indices into ``shards`` of those that this process writes.
        num_images: number of images in them.

    Raises:
        UserError: the VAE does not take images of this size.
    """

    def __init__(
        self,
        images: CroppedImages,
        vae: VAE,
        vae_name: str,
        path: str | Path,
        config: ExtractionConfig,
        rank: int = 0,
        world_size: int = 1,
    ):
        self.images, self.vae, self.path, self.config = images, vae, Path(path), config
        self.latent_shape = latent_shape(vae, config.image_size)
        self.shape: tuple[int, ...] = self.latent_shape  # of one image's stored values
        self.dtype, flips = "float32", "once"
        if config.draw == "fresh":
            # Two moments of two orientations are four times the values; float16 halves the bytes.
            channels, height, width = self.latent_shape
            self.shape = (1 + config.flip, 2 * channels, height, width)
            self.dtype, flips = "float16", "both"
        self.settings: dict[str, Any] = {
            "version": 1,
            "count": len(images),
            "shape": self.shape,
            "dtype": self.dtype,
            "flips": flips if config.flip else "none",
            "scaling_factor": vae.scaling_factor,
            "crop": "center",
            "vae": _vae_settings(vae_name, vae),
            "classes": images.folder.classes,
            "images_sha256": images.paths_sha256(),
            **dataclasses.asdict(config),
        }
        size = config.shard_size if config.layout == "packed" else 1
        starts = range(0, len(images), size)
        self.shards = [range(start, min(start + size, len(images))) for start in starts]
        self.my_shards = range(rank, len(self.shards), world_size)
        self.num_images = self._count_images(self.my_shards)

    def run(
        self, batch_size: int, num_workers: int, device: torch.device | str = "cpu"
    ) -> Iterator[int]:
        """Write the shards of this process that are missing.

        Args:
            batch_size: images per call of the VAE.
            num_workers: processes that decode images; 0 decodes in this process.
            device: where the VAE is.

        Yields:
            the number of images that are new since the last yield, already stored ones first. It is
            the increment of a progress bar.

        Raises:
            UserError: the folder holds other features or those of an image that was replaced; an
                image cannot be read; the VAE makes values of it that are not finite.
        """
        remedy = "give another --features-path"
        write_or_check_settings(self.path / SETTINGS_FILE, self.settings, remedy)
        self._write_or_check_sizes(self.path / SIZES_FILE)
        if self.config.layout == "npy":
            for folder in (FEATURES_FOLDER, LABELS_FOLDER):
                (self.path / folder).mkdir(exist_ok=True)
        missing = [shard for shard in self.my_shards if not self._is_written(shard)]
        yield self.num_images - self._count_images(missing)
        # VAE batches run on across shards, so that small shards do not make small batches.
        rest = np.empty((0, *self.shape), self.dtype)
        with contextlib.closing(
            self._encode_images(missing, batch_size, num_workers, device)
        ) as encoded_batches:
            for shard in missing:
                stored = np.empty((len(self.shards[shard]), *self.shape), self.dtype)
                filled = 0
                while filled < len(stored):
                    if not len(rest):
                        rest = next(encoded_batches)
                    count = min(len(rest), len(stored) - filled)
                    stored[filled : filled + count] = rest[:count]
                    filled, rest = filled + count, rest[count:]
                    yield count
                self._write(shard, stored)
        self._finish()

    def drop_damaged(self) -> list[Path]:
        """Remove this process's damaged files of a finished extraction.

        A shard is damaged if it differs from the manifest, or holds NaN or infinite values, which
        version 0.1 wrote with a broken VAE. Labels are damaged if they are not those of the images;
        the first process looks after them.

        If any file differs, the manifest is removed too. :meth:`run` then writes the files and the
        manifest again. Files of the npy layout are not compared: their manifest has no hashes.

        Returns:
            the files that were removed or missing.

        Raises:
            UserError: the manifest is not one of an extraction.
        """
        manifest_file = self.path / MANIFEST_FILE
        manifest = read_json(manifest_file) if manifest_file.exists() else {}
        records = manifest.get("shards", [])
        try:
            my_records = records[self.my_shards.start :: self.my_shards.step]
            files = [(self.path / record["file"], record["sha256"]) for record in my_records]
        except (KeyError, TypeError):
            raise UserError(
                f"{manifest_file} was not written by an extraction; give another --features-path"
            ) from None
        damaged = [
            file
            for file, sha256 in files
            if not file.exists() or file_sha256(file) != sha256 or not _is_finite(file)
        ]
        # Features of other images are refused later, and must stay as they are.
        is_ours = bool(records) and manifest.get("images_sha256") == self.settings["images_sha256"]
        if is_ours and self.my_shards.start == 0 and not self._has_labels():
            damaged.append(self.path / LABELS_FILE)
        for file in damaged:
            file.unlink(missing_ok=True)
        if damaged:
            manifest_file.unlink(missing_ok=True)
        return damaged

    def _has_labels(self) -> bool:
        """Whether the file of labels holds those of the images."""
        try:
            labels = map_array(self.path / LABELS_FILE, self.images.labels.shape, "int64")
        except UserError:
            return False
        return np.array_equal(labels, self.images.labels)

    def _write_or_check_sizes(self, file: Path) -> None:
        """Record the sizes of the images' files; refuse an image that changed after extraction.

        An image whose shard is not written may change: a damaged one has to be replaced.
        """
        sizes = self.images.file_sizes
        if not file.exists():  # a new extraction, or one that version 0.1 began
            _save(file, sizes)
        changed = np.flatnonzero(map_array(file, sizes.shape, "int64") != sizes).tolist()
        extracted = [index for index in changed if self._is_written(self._shard_of(index))]
        # Another process of this command may have recorded the sizes and extracted since.
        if extracted and (map_array(file, sizes.shape, "int64") != sizes).any():
            shard_file = self._files(self._shard_of(extracted[0]))[0]
            raise UserError(
                f"{self.images.file(extracted[0])} has changed since its features were extracted "
                f"({len(extracted)} such images); put the old one back, delete {shard_file} and "
                "rerun, or give another --features-path"
            )
        if changed:
            _save(file, sizes)

    def _check_finite(self, stored: np.ndarray, indices: Sequence[int], remedy: str) -> None:
        """Refuse stored values (n, *shape) of these n images if one is NaN or infinite."""
        is_finite = np.isfinite(stored).all(axis=tuple(range(1, stored.ndim)))
        if not is_finite.all():
            image = self.images.file(indices[int(is_finite.argmin())])
            vae = self.settings["vae"]["id"]
            raise UserError(f"the VAE {vae} makes NaN or infinite values of {image}; {remedy}")

    def _shard_of(self, index: int) -> int:
        """The shard that holds an image."""
        return index // len(self.shards[0])

    def _count_images(self, shards: Iterable[int]) -> int:
        return sum(len(self.shards[shard]) for shard in shards)

    def _files(self, shard: int) -> list[Path]:
        """The files of a shard: its features and, in the npy layout, its labels."""
        if self.config.layout == "packed":
            return [self.path / f"shard-{shard:05d}.npy"]
        return [self.path / folder / f"{shard}.npy" for folder in (FEATURES_FOLDER, LABELS_FOLDER)]

    def _is_written(self, shard: int) -> bool:
        return all(file.exists() for file in self._files(shard))

    def _encode_images(
        self,
        shards: Sequence[int],
        batch_size: int,
        num_workers: int,
        device: torch.device | str,
    ) -> Generator[np.ndarray, None, None]:
        """The stored values of the images of these shards, (b, *shape), batch by batch."""
        indices = [index for shard in shards for index in self.shards[shard]]
        loader = DataLoader(Subset(self.images, indices), batch_size, num_workers=num_workers)
        what = f"images in {self.images.folder.root}"
        with contextlib.closing(read_loader(loader, what)) as batches:
            for batch_indices, pixels in batches:
                stored = self._stored_values(batch_indices, pixels, device)
                self._check_finite(stored, batch_indices.tolist(), "give another --vae")
                yield stored

    def _stored_values(
        self, indices: torch.Tensor, pixels: torch.Tensor, device: torch.device | str
    ) -> np.ndarray:
        """Encode images (b, 3, S, S) to their stored values (b, *shape)."""
        seed, config = self.config.seed, self.config
        if config.draw == "fresh":
            orientations = [pixels, pixels.flip(-1)] if config.flip else [pixels]
            moments = [self._moments(images, device) for images in orientations]
            return torch.stack(moments, dim=1).half().cpu().numpy()
        if config.flip:
            mirrored = integers(seed, "flip", 0, indices, 2).bool()
            pixels = torch.where(mirrored[:, None, None, None], pixels.flip(-1), pixels)
        noise = normal(seed, "posterior", 0, indices, self.latent_shape, device)
        return sample_posterior(self._moments(pixels, device), noise).cpu().numpy()

    def _moments(self, pixels: torch.Tensor, device: torch.device | str) -> torch.Tensor:
        """Mean and standard deviation of the posterior, (b, 2C, h, w)."""
        return torch.cat(self.vae.encode(pixels.to(device)), dim=1)

    def _write(self, shard: int, stored: np.ndarray) -> None:
        """Write a shard's files, each of which appears when it is complete."""
        packed, images = self.config.layout == "packed", self.shards[shard]
        contents = [stored]
        if packed:
            # Remove the temporary file of a killed run, which is as large as a shard. The npy
            # layout skips this: its files are small, and each glob would list millions of them.
            file = self._files(shard)[0]
            for temporary in file.parent.glob(f".{file.name}.*.tmp"):
                temporary.unlink()
        else:
            contents.append(self.images.labels[images.start : images.stop])
        for file, content in zip(self._files(shard), contents, strict=True):
            _save(file, content, durable=packed)

    def _finish(self) -> None:
        """Write labels and manifest, if this process is the last to finish."""
        # Two processes may finish together. Under the lock one of them writes, and the other finds
        # the manifest. The lock ends with its process, so a killed one blocks nobody.
        with file_lock(self.path / ".lock"):
            all_written = all(self._is_written(shard) for shard in range(len(self.shards)))
            if not all_written or (self.path / MANIFEST_FILE).exists():
                return
            manifest = dict(self.settings)
            if self.config.layout == "packed":
                _save(self.path / LABELS_FILE, self.images.labels)
                manifest["shards"] = [self._record(shard) for shard in range(len(self.shards))]
            write_json(self.path / MANIFEST_FILE, manifest)

    def _record(self, shard: int) -> dict[str, Any]:
        """The manifest's entry for a shard of the packed layout."""
        images, (file,) = self.shards[shard], self._files(shard)
        # Version 0.1 wrote shards without this check.
        stored = map_array(file, (len(images), *self.shape), self.dtype)
        self._check_finite(stored, images, f"delete {file} and give another --vae")
        return {
            "file": file.name,
            "start": images.start,
            "count": len(images),
            "sha256": file_sha256(file),
        }


def _is_finite(file: Path) -> bool:
    return bool(np.isfinite(np.load(file, mmap_mode="r", allow_pickle=False)).all())


def _vae_settings(name: str, vae: VAE) -> dict[str, Any]:
    """The manifest's entry for the VAE. Its name is only a name; hashes and shift are compared."""
    settings = {"id": name, "sha256": vae.sha256}
    if vae.config_sha256 is not None:
        settings["config_sha256"] = vae.config_sha256
    return {**settings, "shift_factor": vae.shift_factor} if vae.shift_factor else settings


def _save(file: Path, array: np.ndarray, durable: bool = True) -> None:
    """Write an .npy file atomically."""
    with atomic_write(file, durable) as temporary, open(temporary, "wb") as stream:
        np.save(stream, array)
