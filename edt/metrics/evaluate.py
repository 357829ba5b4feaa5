"""The whole evaluation: two sets of images in, scores out."""

import logging
from pathlib import Path

import numpy as np

from edt.metrics.features import FeatureExtractor
from edt.metrics.frechet import frechet_distance
from edt.metrics.images import ImageSet
from edt.metrics.inception_score import inception_score, kernel_distance
from edt.metrics.precision_recall import Mode, precision_recall
from edt.metrics.statistics import Source, Statistics, compute_statistics
from edt.utils.errors import UserError

logger = logging.getLogger(__name__)

PUBLISHED_COUNT = 50_000  # number of samples behind published FID, sFID, IS, precision and recall
SPLIT_SIZE = 5000  # consecutive images of one Inception Score, as in ADM
NEIGHBOURS = 3  # k of precision and recall

# Printed name and key of each score, in ADM's order and spelling.
SCORE_LINES = {
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
    pr: Mode | None = None,
    batch_size: int = 64,
    cache_dir: Path | None = None,
    progress: bool = False,
) -> dict:
    """Scores of ``samples`` against ``reference`` (see :func:`compare`), and all that is needed to
    judge them.

    Args:
        pr: arithmetic of precision and recall, by default the extractor's.
        batch_size, cache_dir, progress: see :func:`compute_statistics`.

    Returns:
        The scores, then ``features``, ``precision_recall``, ``reference`` and ``samples``; in types
        that JSON knows.
    """
    check_comparable(reference, samples)
    if extractor.name == "inception" and samples.images:
        _warn_about(samples.images)
    sides = {"reference": reference, "samples": samples}
    measured = {
        key: compute_statistics(side, extractor, batch_size, cache_dir, progress)
        for key, side in sides.items()
    }
    described = {key: _describe(side, measured[key]) for key, side in sides.items()}
    features = {
        "name": extractor.name,
        "backend": extractor.backend,
        "weights_sha256": extractor.weights_sha256,
    }
    return {
        **compare(measured["reference"], measured["samples"], extractor, pr),
        "features": features,
        "precision_recall": {"k": NEIGHBOURS, "mode": pr or extractor.default_pr},
        **described,
    }


def compare(
    reference: Statistics, samples: Statistics, extractor: FeatureExtractor, pr: Mode | None = None
) -> dict[str, float | list[float]]:
    """Every score that the statistics allow, by its key in :data:`SCORE_LINES`.

    Inception features add ``inception_score_splits``, ``kid`` and ``kid_std``.
    """
    scores = {}
    inception = extractor.name == "inception"
    if samples.features is not None and inception:
        scores["inception_score_splits"] = _inception_score_splits(samples.features, extractor)
        scores["inception_score"] = float(np.mean(scores["inception_score_splits"]))
    scores["fid" if inception else "frechet_distance"] = frechet_distance(
        *reference.moments, *samples.moments
    )
    if reference.spatial_moments and samples.spatial_moments:
        scores["sfid"] = frechet_distance(*reference.spatial_moments, *samples.spatial_moments)
    if reference.features is not None and samples.features is not None:
        features = reference.features, samples.features
        mode = pr or extractor.default_pr
        scores["precision"], scores["recall"] = precision_recall(
            *features, NEIGHBOURS, mode, extractor.device
        )
        if inception:
            scores["kid"], scores["kid_std"] = kernel_distance(*features, device=extractor.device)
    return scores


def _inception_score_splits(features: np.ndarray, extractor: FeatureExtractor) -> list[float]:
    starts = range(0, len(features), SPLIT_SIZE)  # one split of probabilities at a time
    splits = (extractor.probabilities(features[start : start + SPLIT_SIZE]) for start in starts)
    return [inception_score(split, SPLIT_SIZE) for split in splits]


def check_comparable(reference: Source, samples: Source) -> None:
    """Raise a :class:`UserError` when the two sides show images of different sizes."""
    if (
        None not in (reference.resolution, samples.resolution)
        and reference.resolution != samples.resolution
    ):
        sizes = " and the samples ".join(
            f"{w}x{h}" for h, w in (reference.resolution, samples.resolution)
        )
        raise UserError(f"the reference has {sizes} pixels; compare images of one size")


def _warn_about(samples: ImageSet) -> None:
    """Log what makes the scores differ from published ones."""
    if samples.count != PUBLISHED_COUNT:
        message = "warning: %d samples; published scores mean %d, and FID, sFID and IS depend on the number"
        logger.warning(message, samples.count, PUBLISHED_COUNT)
    if samples.sorted_by_class and samples.count > SPLIT_SIZE:
        message = "warning: %s is sorted by class: its Inception Score, over splits of %d, misses classes; shuffle it"
        logger.warning(message, samples.name, SPLIT_SIZE)


def _describe(source: Source, statistics: Statistics) -> dict:
    return {
        "name": source.name,
        "count": None if statistics.features is None else len(statistics.features),
        "resolution": statistics.resolution,
        "moments": {"from": "file" if source.statistics else "images", "count": statistics.count},
        "recipe": source.recipe,
    }
