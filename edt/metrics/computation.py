"""Computes the statistics of an image set."""

import hashlib
import logging
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from edt.metrics.features import FeatureExtractor
from edt.metrics.frechet import FactoredMoments, Moments, StreamingMoments
from edt.metrics.images import ImageSet
from edt.metrics.precision_recall import NEIGHBOURS
from edt.metrics.sources import Source
from edt.metrics.statistics import Statistics, read_statistics, write_statistics
from edt.utils.errors import UserError
from edt.utils.files import output_file

logger = logging.getLogger(__name__)

MANY = 0.01  # share of images that are copies, or of one colour, from which on a warning appears


def compute_statistics(
    source: Source,
    extractor: FeatureExtractor,
    batch_size: int = 64,
    cache_dir: Path | None = None,
    progress: bool = False,
) -> Statistics:
    """Statistics of a source.

    Moments stored in the source take precedence over moments of its images, as in ADM. A reference
    file of ADM stores the moments of a complete training set, but only a few of its images.

    Args:
        source: what :func:`open_source` returned.
        extractor: computes the features.
        batch_size: images per call of the extractor.
        cache_dir: folder of features, each file named by a hash of the images and the extractor.
            Missing ones are added.
        progress: show a bar on stderr.

    Raises:
        UserError: the extractor cannot handle the images, or the stored statistics were computed
            with other features or weights.
    """
    check_extractor(source, extractor)
    stored = source.statistics
    if source.images is not None:
        computed = _cached_image_statistics(
            source.images, extractor, batch_size, cache_dir, progress
        )
        if stored is None:
            return computed
        return replace(stored, features=computed.features, resolution=computed.resolution)
    if stored is None:
        raise UserError(f"{source.name} has neither images nor statistics; use open_source")
    return stored


def check_extractor(source: Source, extractor: FeatureExtractor) -> None:
    """Check that the extractor can handle a source.

    Raises:
        UserError: it cannot handle the images, or the stored statistics were computed with other
            features or weights.
    """
    if source.images is not None:
        extractor.check(source.images.resolution)
    stored = source.statistics
    if stored is None:
        return
    if stored.feature_name != extractor.name:
        raise UserError(
            f"{source.name} was opened with statistics of {stored.feature_name} features; "
            f"open it with feature_name={extractor.name!r}"
        )
    # ADM's files record no hash. They were made with the published weights.
    if stored.weights_sha256 not in (None, extractor.weights_sha256):
        raise UserError(
            f"{source.name} was made with other Inception weights; make it again with make-ref"
        )


def _cached_image_statistics(
    images: ImageSet,
    extractor: FeatureExtractor,
    batch_size: int,
    cache_dir: Path | None,
    progress: bool,
) -> Statistics:
    """Statistics of images, features included; read from the cache if it has them."""
    cached = cache_dir / f"{_cache_key(images, extractor)}.npz" if cache_dir else None
    if cached:
        output_file(cached)  # refuses a folder of this name before hours of work
    statistics = _read_cached(cached, images) if cached and cached.exists() else None
    if statistics is None:
        collector = _StatisticsCollector(images, extractor, keep_features=True)
        for batch in _batches_with_bar(images, batch_size, progress):
            collector.add(batch)
        statistics = collector.statistics()
        if cached:
            write_statistics(cached, statistics)
    _warn_of_repeated_images(images.name, statistics)
    return statistics


def _read_cached(path: Path, images: ImageSet) -> Statistics | None:
    """Statistics of images from the cache; None, with a warning, if the file is damaged."""
    try:
        statistics = read_statistics(path)
        if statistics.features is None or len(statistics.features) != images.count:
            raise UserError(f"{path} lacks the features of {images.count} images")
        return statistics
    except UserError as error:
        logger.warning("warning: the cached features are damaged and computed again: %s", error)
        return None


def _warn_of_repeated_images(name: str, statistics: Statistics) -> None:
    """Warn of many copies, or of many images of one colour: something failed on the way."""
    count, distinct, plain = statistics.count, statistics.distinct_count, statistics.plain_count
    if count is None or distinct is None or plain is None:
        return  # recorded by an earlier version
    if count - distinct > MANY * count:
        logger.warning(
            "warning: %d of the %d images in %s are copies of others; "
            "check how they were made, since copies distort the scores",
            count - distinct,
            count,
            name,
        )
    if plain > MANY * count:
        logger.warning(
            "warning: %d of the %d images in %s have a single colour, as all-black images do; "
            "check how they were made",
            plain,
            count,
            name,
        )


def make_reference(
    images: ImageSet,
    extractor: FeatureExtractor,
    path: Path,
    image_count: int = 10_000,
    batch_size: int = 64,
    progress: bool = False,
) -> None:
    """Write a reference file like ADM's.

    It holds the moments of all images, and some of the images for precision and recall.

    Args:
        images: the images.
        extractor: computes the features.
        path: the .npz file to write.
        image_count: how many images to keep, drawn with a fixed seed. All are kept if there are
            fewer.
        batch_size: images per call of the extractor.
        progress: show a bar on stderr.

    Raises:
        UserError: the extractor cannot handle the images, or they are too few for precision and
            recall.
    """
    extractor.check(images.resolution)
    count = min(image_count, images.count)
    if count <= NEIGHBOURS:
        raise UserError(
            f"a reference of {count} images is too small for precision and recall; "
            f"keep at least {NEIGHBOURS + 1}"
        )
    is_kept = np.zeros(images.count, bool)
    is_kept[np.random.default_rng(0).choice(images.count, count, replace=False)] = True
    collector = _StatisticsCollector(images, extractor, keep_features=False)
    kept_images = []
    start = 0
    for batch in _batches_with_bar(images, batch_size, progress):
        kept_images.append(batch[is_kept[start : start + len(batch)]])
        start += len(batch)
        collector.add(batch)
    statistics = collector.statistics()
    _warn_of_repeated_images(images.name, statistics)
    write_statistics(path, statistics, arr_0=np.concatenate(kept_images))


def _batches_with_bar(images: ImageSet, batch_size: int, progress: bool) -> Iterator[np.ndarray]:
    with tqdm(total=images.count, unit="image", desc=images.name, disable=not progress) as bar:
        for batch in images.batches(batch_size):
            yield batch
            bar.update(len(batch))


class _StatisticsCollector:
    """Collects the statistics of an image set from its batches.

    Args:
        images: the set, for its name, size and resolution.
        extractor: computes the features.
        keep_features: whether the statistics include the features.
    """

    def __init__(self, images: ImageSet, extractor: FeatureExtractor, keep_features: bool):
        self._images, self._extractor, self._keep_features = images, extractor, keep_features
        # The dimensions are known from the first batch on.
        self._moments: StreamingMoments | None = None
        # Hashes: 50,000 images of 256 pixels take 10 GB.
        self._distinct: set[int] = set()
        self._plain_count = 0
        self._spatial_moments: StreamingMoments | None = None
        self._features: list[np.ndarray] = []

    def add(self, batch: np.ndarray) -> None:
        """Add images, uint8 (n, H, W, 3).

        Raises:
            UserError: their features are not finite.
        """
        features, spatial_features = self._extractor.extract(batch)
        if not features.isfinite().all():
            raise UserError(
                f"features of {self._images.name} are not finite; check the network's weights"
            )
        # The features of fewer images than dimensions give factored moments at the end.
        if not (self._keep_features and self._images.count < features.shape[1]):
            self._moments = self._updated(self._moments, features)
        if spatial_features is not None:
            self._spatial_moments = self._updated(self._spatial_moments, spatial_features)
        if self._keep_features:
            self._features.append(features.cpu().numpy())
        self._distinct.update(hash(image.tobytes()) for image in batch)
        pixels = batch.reshape(len(batch), -1, batch.shape[-1])
        self._plain_count += int((pixels == pixels[:, :1]).all((1, 2)).sum())

    def _updated(self, moments: StreamingMoments | None, rows: torch.Tensor) -> StreamingMoments:
        moments = moments or StreamingMoments(rows.shape[1], self._extractor.device)
        moments.update(rows)
        return moments

    def statistics(self) -> Statistics:
        """Statistics of all images.

        Raises:
            UserError: there are fewer than two.
        """
        features = np.concatenate(self._features) if self._features else None
        moments: Moments | FactoredMoments
        if self._moments is not None:
            moments = self._moments.moments()
        elif features is not None:
            moments = FactoredMoments.of_rows(features)
        else:
            raise UserError(f"{self._images.name} holds no images; give at least 2")
        return Statistics(
            self._extractor.name,
            moments,
            self._spatial_moments.moments() if self._spatial_moments else None,
            features,
            self._images.count,
            self._images.resolution,
            self._extractor.weights_sha256,
            len(self._distinct),
            self._plain_count,
        )


def _cache_key(images: ImageSet, extractor: FeatureExtractor) -> str:
    parts = (images.sha256(), extractor.name, extractor.backend, str(extractor.weights_sha256))
    return hashlib.sha256(" ".join(parts).encode()).hexdigest()
