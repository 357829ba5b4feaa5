"""Scores of generated images that reproduce the numbers of ADM's evaluator.

ADM is the model of Dhariwal & Nichol (2021). Its evaluator is evaluations/evaluator.py in OpenAI's
repository guided-diffusion.

Each score is a function of arrays: :func:`frechet_distance` (FID and sFID),
:func:`inception_score`, :func:`precision_recall` and :func:`kernel_distance` (KID).
:class:`StreamingMoments` computes the mean and covariance that the first needs.
:class:`FactoredMoments` replaces it for fewer images than dimensions.

From files to scores::

    extractor = create_extractor("inception")
    report = evaluate(open_source("reference.npz"), open_source("samples.npz"), extractor)

From images in memory, for example during training::

    reference = compute_statistics(open_source("reference.npz"), extractor)  # once
    samples = compute_statistics(open_source(images), extractor)  # images: uint8 (N, H, W, 3)
    scores = compare(reference, samples, extractor)
"""

from edt.metrics.computation import compute_statistics, make_reference
from edt.metrics.evaluate import SCORE_LINES, check_comparable, compare, evaluate
from edt.metrics.extractors import create_extractor
from edt.metrics.features import Backend, FeatureExtractor, FeatureName, PixelFeatures
from edt.metrics.frechet import (
    FactoredMoments,
    Moments,
    StreamingMoments,
    frechet_distance,
    moments_distance,
)
from edt.metrics.inception_score import inception_score, inception_score_splits
from edt.metrics.kid import kernel_distance
from edt.metrics.precision_recall import PrecisionRecallMode, precision_recall
from edt.metrics.sources import Source, open_source
from edt.metrics.statistics import Statistics

__all__ = [
    "SCORE_LINES",
    "Backend",
    "FactoredMoments",
    "FeatureExtractor",
    "FeatureName",
    "PrecisionRecallMode",
    "Moments",
    "PixelFeatures",
    "Source",
    "Statistics",
    "StreamingMoments",
    "check_comparable",
    "compare",
    "compute_statistics",
    "create_extractor",
    "evaluate",
    "frechet_distance",
    "inception_score",
    "inception_score_splits",
    "kernel_distance",
    "make_reference",
    "moments_distance",
    "open_source",
    "precision_recall",
]
