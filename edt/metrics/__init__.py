"""Scores of generated images, with the numbers of ADM's evaluator: FID, sFID, Inception Score,
precision, recall; KID.

The pure functions take arrays: :func:`frechet_distance`, :func:`inception_score`, :func:`kernel_distance`,
:func:`precision_recall`, :class:`StreamingMoments`. The rest goes from files to scores::

    extractor = create_extractor("inception")
    report = evaluate(open_source("reference.npz"), open_source("samples.npz"), extractor)

and, while training goes on, from images in memory::

    reference = compute_statistics(open_source("reference.npz"), extractor)                     # once
    scores = compare(reference, compute_statistics(open_source(images), extractor), extractor)  # every k steps
"""

from edt.metrics.evaluate import SCORE_LINES, check_comparable, compare, evaluate
from edt.metrics.extractors import create_extractor
from edt.metrics.features import FeatureExtractor, PixelFeatures
from edt.metrics.frechet import Moments, StreamingMoments, frechet_distance
from edt.metrics.inception_score import inception_score, inception_score_splits, kernel_distance
from edt.metrics.precision_recall import precision_recall
from edt.metrics.statistics import (
    Source,
    Statistics,
    compute_statistics,
    make_reference,
    open_source,
)

__all__ = [
    "SCORE_LINES",
    "FeatureExtractor",
    "Moments",
    "PixelFeatures",
    "Source",
    "Statistics",
    "StreamingMoments",
    "check_comparable",
    "compare",
    "create_extractor",
    "evaluate",
    "frechet_distance",
    "inception_score",
    "inception_score_splits",
    "kernel_distance",
    "make_reference",
    "compute_statistics",
    "open_source",
    "precision_recall",
]
