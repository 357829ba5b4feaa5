"""From two image sets to their scores."""

import logging
import math
from pathlib import Path
from typing import Any

import numpy as np

from edt.metrics.computation import check_extractor, compute_statistics
from edt.metrics.features import FeatureExtractor, FeatureName
from edt.metrics.frechet import moments_distance
from edt.metrics.images import ImageSet
from edt.metrics.inception_graph import FEATURES, SPATIAL_FEATURES
from edt.metrics.inception_score import inception_score
from edt.metrics.kid import kernel_distance
from edt.metrics.precision_recall import NEIGHBOURS, PrecisionRecallMode, precision_recall
from edt.metrics.sources import Source
from edt.metrics.statistics import Statistics
from edt.utils.choices import check_choice
from edt.utils.errors import UserError

logger = logging.getLogger(__name__)

PUBLISHED_COUNT = 50_000  # number of samples behind published FID, sFID, IS, precision and recall
SPLIT_SIZE = 5000  # consecutive images of one Inception Score, as in ADM

# Printed name and key of each score, in ADM's order and spelling.
SCORE_LINES: dict[FeatureName, tuple[tuple[str, str], ...]] = {
    "inception": (
        ("Inception Score", "inception_score"),
        ("FID", "fid"),
        ("sFID", "sfid"),
        ("Precision", "precision"),
        ("Recall", "recall"),
    ),
    "pixels": (
        ("Pixel-space Frechet distance", "frechet_distance"),
        ("Pixel-space precision", "precision"),
        ("Pixel-space recall", "recall"),
    ),
}


def evaluate(
    reference: Source,
    samples: Source,
    extractor: FeatureExtractor,
    pr: PrecisionRecallMode | None = None,
    batch_size: int = 64,
    cache_dir: Path | None = None,
    progress: bool = False,
) -> dict[str, Any]:
    """Scores of ``samples`` against ``reference``, and a record of how they were computed.

    Args:
        reference: the images to resemble.
        samples: the images to score.
        extractor: computes the features.
        pr: arithmetic of precision and recall. Default: the extractor's.
        batch_size: images per call of the extractor.
        cache_dir: folder that keeps features for the next evaluation of the same images.
        progress: show a bar on stderr.

    Returns:
        The scores of :func:`compare`, then ``features``, ``precision_recall``, ``reference`` and
        ``samples``. Everything can be written as JSON.

    Raises:
        UserError: the two cannot be compared.
    """
    _check_pr(pr)  # before hours of computation
    check_comparable(reference, samples)
    for source in (reference, samples):
        check_extractor(source, extractor)
    if extractor.name == "inception" and samples.images:
        _warn_if_not_as_published(samples.images)
    options = batch_size, cache_dir, progress
    reference_statistics = compute_statistics(reference, extractor, *options)
    sample_statistics = compute_statistics(samples, extractor, *options)
    return {
        **compare(reference_statistics, sample_statistics, extractor, pr),
        "features": {
            "name": extractor.name,
            "backend": extractor.backend,
            "weights_sha256": extractor.weights_sha256,
        },
        "precision_recall": {"k": NEIGHBOURS, "mode": pr or extractor.default_pr},
        "reference": _describe(reference, reference_statistics),
        "samples": _describe(samples, sample_statistics),
    }


def compare(
    reference: Statistics,
    samples: Statistics,
    extractor: FeatureExtractor,
    pr: PrecisionRecallMode | None = None,
) -> dict[str, float | list[float]]:
    """Compute every score that the statistics allow.

    Fréchet distances need moments only. Precision, recall and KID need the features of both sides.
    The Inception Score needs the features of the samples.

    Args:
        reference: statistics of the images to resemble.
        samples: statistics of the images to score.
        extractor: the one that computed the features.
        pr: arithmetic of precision and recall. Default: the extractor's.

    Returns:
        Scores by their keys in :data:`SCORE_LINES`. Inception features add
        ``inception_score_splits``, ``kid`` and ``kid_std``.

    Raises:
        UserError: ``pr`` is unknown, or the statistics cannot be compared.
    """
    _check_pr(pr)
    scores: dict[str, float | list[float]] = {}
    inception = extractor.name == "inception"
    if samples.features is not None and inception:
        splits = _inception_score_splits(samples.features, extractor)
        scores["inception_score_splits"] = splits
        scores["inception_score"] = float(np.mean(splits))
    distance = moments_distance(reference.moments, samples.moments)
    scores["fid" if inception else "frechet_distance"] = distance
    if reference.spatial_moments and samples.spatial_moments:
        scores["sfid"] = moments_distance(reference.spatial_moments, samples.spatial_moments)
    if reference.features is not None and samples.features is not None:
        features = reference.features, samples.features
        mode, device = pr or extractor.default_pr, extractor.device
        scores["precision"], scores["recall"] = precision_recall(
            *features, NEIGHBOURS, mode, device
        )
        if inception:
            scores["kid"], scores["kid_std"] = kernel_distance(*features, device=device)
    return scores


def _check_pr(pr: PrecisionRecallMode | None) -> None:
    if pr is not None:
        check_choice("mode of precision and recall", pr, PrecisionRecallMode)


def _inception_score_splits(features: np.ndarray, extractor: FeatureExtractor) -> list[float]:
    scores = []
    # One split at a time: probabilities of all images would take half the memory of the features.
    for start in range(0, len(features), SPLIT_SIZE):
        probabilities = extractor.probabilities(features[start : start + SPLIT_SIZE])
        assert probabilities is not None  # the Inception network has a classifier
        scores.append(inception_score(probabilities, SPLIT_SIZE))
    return scores


def check_comparable(reference: Source, samples: Source) -> None:
    """Check that two sources can be compared, as far as it is known before features are computed.

    Raises:
        UserError: their images differ in size, their features differ in dimension, or one has too
            few images for precision and recall.
    """
    _check_resolutions(reference, samples)
    _check_dimensions(reference, samples)
    _check_counts(reference, samples)


def _check_resolutions(reference: Source, samples: Source) -> None:
    if reference.resolution is None or samples.resolution is None:
        return
    if reference.resolution != samples.resolution:
        height, width = reference.resolution
        sample_height, sample_width = samples.resolution
        raise UserError(
            f"the reference has {width}x{height} pixels and the samples "
            f"{sample_width}x{sample_height}; compare images of one size"
        )


def _check_dimensions(reference: Source, samples: Source) -> None:
    """Check the dimensions of stored statistics against those of the other side."""
    stored = reference.statistics or samples.statistics
    if stored is None:
        return  # both are computed by the same extractor
    dimensions = [_find_dimensions(source, stored.feature_name) for source in (reference, samples)]
    for of_reference, of_samples in zip(*dimensions, strict=True):
        if None not in (of_reference, of_samples) and of_reference != of_samples:
            raise UserError(
                f"{reference.name} has {stored.feature_name} features of {of_reference} "
                f"dimensions, and {samples.name} of {of_samples}; "
                "give statistics of the same features, or images"
            )


def _find_dimensions(source: Source, feature_name: str) -> tuple[int | None, int | None]:
    """Dimensions of the features and the spatial features; None if unknown or absent."""
    if source.statistics is not None:
        spatial = source.statistics.spatial_moments
        return source.statistics.moments.mean.size, spatial.mean.size if spatial else None
    if feature_name == "inception":
        return FEATURES, SPATIAL_FEATURES
    return math.prod(source.resolution) * 3 if source.resolution else None, None


def _check_counts(reference: Source, samples: Source) -> None:
    """Check that both sides have enough images for precision and recall, if these are computed."""
    sources = reference, samples
    counts = [count for source in sources if (count := _count_features(source)) is not None]
    if len(counts) < 2:
        return
    for source, count in zip(sources, counts, strict=True):
        if count <= NEIGHBOURS:
            raise UserError(
                f"{source.name} holds {count} images, but precision and recall need at least "
                f"{NEIGHBOURS + 1} on both sides; give more images"
            )


def _count_features(source: Source) -> int | None:
    """The number of images whose features are or will be known, None without any."""
    if source.images is not None:
        return source.images.count
    if source.statistics is not None and source.statistics.features is not None:
        return len(source.statistics.features)
    return None


def _warn_if_not_as_published(samples: ImageSet) -> None:
    """Warn if the number or order of the samples makes scores incomparable to published ones."""
    if samples.count != PUBLISHED_COUNT:
        logger.warning(
            "warning: %d samples; published scores use %d, and FID, sFID and Inception Score "
            "depend on the number",
            samples.count,
            PUBLISHED_COUNT,
        )
    if samples.sorted_by_class and samples.count > SPLIT_SIZE:
        logger.warning(
            "warning: %s is sorted by class; every split of %d images lacks classes, "
            "which lowers the Inception Score; shuffle the images",
            samples.name,
            SPLIT_SIZE,
        )


def _describe(source: Source, statistics: Statistics) -> dict[str, Any]:
    """What the report says of one side of the comparison."""
    return {
        "name": source.name,
        "count": None if statistics.features is None else len(statistics.features),
        "resolution": statistics.resolution,
        "moments": {"from": "file" if source.statistics else "images", "count": statistics.count},
        "recipe": source.recipe,
    }
