"""From a set of images to the statistics that are compared: opening, measuring, storing."""

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from tqdm import tqdm

from edt.metrics.features import FeatureExtractor
from edt.metrics.frechet import Moments, StreamingMoments
from edt.metrics.images import (
    ArrayImages,
    Crop,
    FolderImages,
    ImageSet,
    NpzImages,
    npz_names,
    read_npz,
)
from edt.utils.errors import UserError
from edt.utils.files import atomic_write

MOMENT_NAMES = (("mu", "sigma"), ("mu_s", "sigma_s"))  # ADM's names, for pool and spatial features
OPTIONAL_NAMES = ("features", "count", "resolution", "weights_sha256")


@dataclass(frozen=True)
class Statistics:
    """What is known of one image set in one feature space.

    Attributes:
        feature_name: the extractor's name.
        moments: of the features; with ``spatial_moments``, those of the spatial features, if any.
        features: (N, D) float32, None when only the moments are known.
        count: number of images behind the moments, None when unknown.
        resolution: (height, width) of the images in pixels, None when unknown.
        weights_sha256: the extractor's; None for pixels, and when unknown as in ADM's files.
    """

    feature_name: str
    moments: Moments
    spatial_moments: Moments | None = None
    features: np.ndarray | None = None
    count: int | None = None
    resolution: tuple[int, int] | None = None
    weights_sha256: str | None = None


@dataclass(frozen=True)
class Source:
    """One side of a comparison, opened and checked: images, statistics, or (ADM's reference files)
    both.

    Attributes:
        recipe: how a sampler drew the images, from the ``recipe.json`` beside them.
    """

    name: str
    images: ImageSet | None = None
    statistics: Statistics | None = None
    recipe: dict | None = None

    @property
    def resolution(self) -> tuple[int, int] | None:
        known = self.images or self.statistics
        return known.resolution


def open_source(
    source: str | Path | np.ndarray, feature_name: str = "inception", crop: Crop | None = None
) -> Source:
    """Open an image array, .npz file, image folder, run folder of the sampler, or statistics file.

    Args:
        feature_name: stored statistics of other features are ignored.
        crop: applied to the images of a folder.

    Raises:
        UserError: there is nothing there that can be compared.
    """
    if isinstance(source, np.ndarray):
        images = ArrayImages(source)
        return Source(images.name, images)
    path = Path(source)
    if path.is_dir():
        archives = sorted(path.glob("samples_*.npz"))
        if len(archives) > 1:
            raise UserError(
                f"{path} holds {len(archives)} samples_*.npz files; name one of them: {archives[0]}"
            )
        recipe = _read_recipe(path / "recipe.json")
        if archives:
            return replace(_open_npz(archives[0], feature_name), recipe=recipe)
        if recipe is not None:
            raise UserError(
                f"{path} holds a recipe but no samples_*.npz; finish the sampling by starting it again"
            )
        return Source(str(path), FolderImages(path, crop))
    if not path.exists():
        raise UserError(
            f"{path} does not exist; give an .npz file, an image folder or a run folder"
        )
    return _open_npz(path, feature_name)


def _open_npz(path: Path, feature_name: str) -> Source:
    names = npz_names(path)
    statistics = read_statistics(path) if "mu" in names else None
    if statistics and statistics.feature_name != feature_name:
        if "arr_0" not in names:
            raise UserError(
                f"{path} holds statistics of {statistics.feature_name} features, not {feature_name}"
            )
        statistics = None
    images = NpzImages(path) if statistics is None or "arr_0" in names else None
    return Source(str(path), images, statistics, _read_recipe(path.parent / "recipe.json"))


def _read_recipe(path: Path) -> dict | None:
    if not path.exists():
        return None
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise UserError(f"{path} is not JSON ({error}); mend or remove it") from None


def compute_statistics(
    source: Source,
    extractor: FeatureExtractor,
    batch_size: int = 64,
    cache_dir: Path | None = None,
    progress: bool = False,
) -> Statistics:
    """Statistics of a source; moments that came with the source win over those of its images, as in
    ADM.

    Args:
        batch_size: images per call of the extractor.
        cache_dir: where features are kept and looked for by the hash of the images' content.
        progress: show a bar on stderr.
    """
    if source.statistics and source.statistics.weights_sha256 not in (
        None,
        extractor.weights_sha256,
    ):
        raise UserError(
            f"{source.name} was made with other Inception weights; make it again with make-ref"
        )
    if source.images is None:
        return source.statistics
    extractor.check(source.images.resolution)
    cached = cache_dir and cache_dir / f"{_cache_key(source.images, extractor)}.npz"
    if cached and cached.exists():
        measured = read_statistics(cached)
    else:
        batches = source.images.batches(batch_size)
        measured = _compute_batches(batches, source.images, extractor, progress, keep_features=True)
        if cached:
            write_statistics(cached, measured)
    if source.statistics:
        return replace(
            source.statistics, features=measured.features, resolution=measured.resolution
        )
    return measured


def make_reference(
    images: ImageSet,
    extractor: FeatureExtractor,
    path: Path,
    image_count: int = 10_000,
    batch_size: int = 64,
    progress: bool = False,
) -> None:
    """Write a reference file like ADM's: moments of all images, and ``image_count`` of them for
    precision and recall.

    Args:
        image_count: how many images to keep, drawn with a fixed seed; all of them if there are
            fewer.
    """
    extractor.check(images.resolution)
    count = min(image_count, images.count)
    chosen = np.zeros(images.count, bool)
    chosen[np.random.default_rng(0).choice(images.count, count, replace=False)] = True
    kept = []

    def batches() -> Iterator[np.ndarray]:
        start = 0
        for batch in images.batches(batch_size):
            kept.append(batch[chosen[start : start + len(batch)]])
            start += len(batch)
            yield batch

    statistics = _compute_batches(batches(), images, extractor, progress, keep_features=False)
    write_statistics(path, statistics, arr_0=np.concatenate(kept))


def _compute_batches(
    batches: Iterable[np.ndarray],
    images: ImageSet,
    extractor: FeatureExtractor,
    progress: bool,
    keep_features: bool,
) -> Statistics:
    """Moments, and features if they are to be kept, of all ``batches`` of ``images``."""
    kept, moments, spatial_moments = [], None, None
    with tqdm(total=images.count, unit="image", desc=images.name, disable=not progress) as bar:
        for batch in batches:
            features, spatial = extractor.extract(batch)
            if not features.isfinite().all():
                raise UserError(
                    f"{images.name} gives features that are not finite; check the network's weights"
                )
            moments = moments or StreamingMoments(features.shape[1], extractor.device)
            moments.update(features)
            if spatial is not None:
                spatial_moments = spatial_moments or StreamingMoments(
                    spatial.shape[1], extractor.device
                )
                spatial_moments.update(spatial)
            if keep_features:
                kept.append(features.cpu().numpy())
            bar.update(len(batch))
    return Statistics(
        extractor.name,
        moments.moments(),
        spatial_moments and spatial_moments.moments(),
        np.concatenate(kept) if keep_features else None,
        images.count,
        images.resolution,
        extractor.weights_sha256,
    )


def _cache_key(images: ImageSet, extractor: FeatureExtractor) -> str:
    parts = (images.sha256(), extractor.name, extractor.backend, str(extractor.weights_sha256))
    return hashlib.sha256(" ".join(parts).encode()).hexdigest()


def read_statistics(path: Path) -> Statistics:
    """Statistics from a file of :func:`write_statistics` or one of ADM's reference files."""
    names = [name for pair in MOMENT_NAMES for name in pair] + ["feature_name", *OPTIONAL_NAMES]
    arrays = read_npz(path, tuple(names))
    moments = [_moments(path, arrays, *pair) for pair in MOMENT_NAMES]
    return Statistics(
        str(arrays.get("feature_name", "inception")),
        moments[0],
        moments[1],
        arrays.get("features"),
        int(arrays["count"]) if "count" in arrays else None,
        tuple(arrays["resolution"].tolist()) if "resolution" in arrays else None,
        str(arrays["weights_sha256"]) if "weights_sha256" in arrays else None,
    )


def _moments(
    path: Path, arrays: dict[str, np.ndarray], mean_name: str, covariance_name: str
) -> Moments | None:
    if mean_name not in arrays:
        return None
    mean, covariance = arrays[mean_name], arrays.get(covariance_name, np.empty(0))
    if covariance.shape != mean.shape * 2:
        raise UserError(
            f"{path}: {covariance_name} has shape {covariance.shape}, but {mean_name} {mean.shape}"
        )
    if not (np.isfinite(mean).all() and np.isfinite(covariance).all()):
        raise UserError(
            f"{path}: {mean_name} or {covariance_name} holds NaN or infinity; make the file again"
        )
    return Moments(mean, covariance)


def write_statistics(path: Path, statistics: Statistics, **more: np.ndarray) -> None:
    """Write a statistics file; with ``arr_0`` in ``more`` it is a reference file that ADM's
    evaluator reads too.
    """
    arrays = dict(more, feature_name=np.array(statistics.feature_name))
    for (mean, covariance), moments in zip(
        MOMENT_NAMES, (statistics.moments, statistics.spatial_moments), strict=True
    ):
        if moments:
            arrays[mean], arrays[covariance] = moments
    for name in OPTIONAL_NAMES:
        if getattr(statistics, name) is not None:
            arrays[name] = np.asarray(getattr(statistics, name))
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as temporary, open(temporary, "wb") as file:
        np.savez(file, **arrays)
