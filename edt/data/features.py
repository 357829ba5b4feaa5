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

from edt.data.npy_files import changes, load_npy, npy_names, read_numbers
from edt.utils.choices import check_json_fields
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
    vae_config_sha256: str | None = None
    """Hash of the configuration that the VAE computes with."""
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
        """Inverse of :meth:`to_dict`. Unknown keys are ignored, missing ones become None.

        Raises:
            UserError: a value has another type.
        """
        check_json_fields(cls, values)
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
        smallest, largest = self.labels.min(), self.labels.max()
        if num_classes and smallest < 0:
            image = self.locate(int(self.labels.argmin()))
            raise UserError(
                f"{self.path} has label {smallest} for {image}, and labels count from 0; "
                "correct it, or train without classes (--num-classes 0)"
            )
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
            vae_config_sha256=vae.get("config_sha256"),
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

    def locate(self, index: int) -> str:
        """Where an image is stored, for messages."""
        raise NotImplementedError

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

    def locate(self, index: int) -> str:
        shard = int(np.searchsorted(self.starts, index, side="right")) - 1
        return f"{self.manifest['shards'][shard]['file']}, row {index - self.starts[shard]}"

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
    """The release's layout: two files per image.

    Opening checks the value of every label, and the type, shape and length of every latent. It does
    not read the latents' values, which would take hours for a million files.
    """

    def __init__(self, path: Path, manifest: dict[str, Any]):
        feature_names = npy_names(path / FEATURES_FOLDER)
        label_names = npy_names(path / LABELS_FOLDER)
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
        latent_shape = load_npy(self._file(FEATURES_FOLDER, 0)).shape[-3:]
        super().__init__(path, manifest, self._read_labels(), latent_shape)
        for file, array in changes(self._file(FEATURES_FOLDER, i) for i in range(len(self))):
            self._check_latent(file, array)

    def _file(self, folder: str, index: int) -> str:
        return f"{self.path}/{folder}/{self.names[index]}.npy"

    def locate(self, index: int) -> str:
        return f"{FEATURES_FOLDER}/{self.names[index]}.npy"

    def _read_labels(self) -> np.ndarray:
        """All labels, (count,) int64."""
        files = [self._file(LABELS_FOLDER, i) for i in range(len(self.names))]
        labels = []
        for file, label in zip(files, read_numbers(files), strict=True):
            # NaN is not equal to itself, and infinity is beyond the largest label.
            if not isinstance(label, int | float) or not abs(label) < 2**31 or label != int(label):
                raise UserError(
                    f"{file} holds the label {label!r}, which is not a class number; correct it"
                )
            labels.append(int(label))
        return np.array(labels, dtype=np.int64)

    def _check_latent(self, file: str, array: np.ndarray) -> None:
        """Raise a UserError unless the array is a latent of the shape of the others."""
        shape, remedy = array.shape, "delete it and run extract_features.py again"
        if array.dtype.kind not in "fiu":
            raise UserError(f"{file} holds {array.dtype}, and latents are numbers; {remedy}")
        if array.ndim not in (3, 4) or not array.size or array.size != np.prod(shape[-3:]):
            raise UserError(
                f"{file} has shape {shape}, and a latent is (1, C, H, W) or (C, H, W); {remedy}"
            )
        if shape[-3:] != self.latent_shape:
            raise UserError(
                f"{file} has shape {shape}, and {self.locate(0)} holds a latent "
                f"{self.latent_shape}; delete the wrong one and run extract_features.py again"
            )

    def _read(self, indices: np.ndarray, flips: np.ndarray) -> np.ndarray:
        latents = np.empty((len(indices), *self.latent_shape), np.float32)
        for latent, index in zip(latents, indices.tolist(), strict=True):
            file = self._file(FEATURES_FOLDER, index)
            array = load_npy(file)
            self._check_latent(file, array)
            latent[:] = array.reshape(self.latent_shape)
        return latents


def open_features(path: str | Path) -> Features:
    """Open a folder of features of either layout.

    Raises:
        UserError: there are no features, files, labels and manifest disagree, or the latents are
            not square.
    """
    features = _open(Path(path))
    _, height, width = features.latent_shape
    if height != width:
        raise UserError(
            f"the latents in {path} are oblong, {features.latent_shape}, and the models take "
            "square ones; extract features of square images"
        )
    return features


def _open(path: Path) -> Features:
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
