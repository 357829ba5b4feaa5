"""Statistics of an image set, and their files."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from edt.metrics.frechet import FactoredMoments, Moments, checked_moments
from edt.metrics.images import read_npz
from edt.utils.errors import UserError
from edt.utils.files import atomic_write

MOMENT_NAMES = (("mu", "sigma"), ("mu_s", "sigma_s"))  # ADM's names: pool and spatial features
OPTIONAL_NAMES = (
    "features",
    "count",
    "resolution",
    "weights_sha256",
    "distinct_count",
    "plain_count",
)


@dataclass(frozen=True)
class Statistics:
    """Moments and features of one image set, for one feature extractor."""

    feature_name: str  # the extractor's name
    moments: Moments | FactoredMoments  # of the features
    spatial_moments: Moments | None = None  # None if the extractor has no spatial features
    features: np.ndarray | None = None  # (N, D) float32, None if only the moments are known
    count: int | None = None  # number of images behind the moments
    resolution: tuple[int, int] | None = None  # (height, width) of the images in pixels
    weights_sha256: str | None = None  # the extractor's; ADM's files do not record it
    distinct_count: int | None = None  # different images among them
    plain_count: int | None = None  # images of a single colour


def read_statistics(path: Path) -> Statistics:
    """Read a file of :func:`write_statistics` or one of ADM's reference files.

    Raises:
        UserError: the file is damaged or holds no moments.
    """
    names = [name for pair in MOMENT_NAMES for name in pair] + ["feature_name", *OPTIONAL_NAMES]
    arrays = read_npz(path, tuple(names))
    # Other programs write files without a feature name. Their arrays of the optional names are
    # something else.
    optional = {name: arrays.get(name) for name in OPTIONAL_NAMES if "feature_name" in arrays}
    features = _read_features(path, optional.get("features"))
    count = _read_count(path, "count", optional.get("count"))
    moments: Moments | FactoredMoments | None
    if features is not None and len(features) == count and count < features.shape[-1]:
        moments = FactoredMoments.of_rows(features)
    else:
        moments = _read_moments(path, arrays, *MOMENT_NAMES[0])
    if moments is None:
        raise UserError(f"{path} holds no array {MOMENT_NAMES[0][0]}; give a statistics file")
    if features is not None and features.shape[1:] != (moments.mean.size,):
        raise UserError(
            f"{path}: features have shape {features.shape}, but there are {moments.mean.size} "
            "means; make the file again"
        )
    weights_sha256 = optional.get("weights_sha256")
    return Statistics(
        # ADM's files do not record a name. Their features are always Inception's.
        str(arrays.get("feature_name", "inception")),
        moments,
        _read_moments(path, arrays, *MOMENT_NAMES[1]),
        features,
        count,
        _read_resolution(path, optional.get("resolution")),
        str(weights_sha256) if weights_sha256 is not None else None,
        _read_count(path, "distinct_count", optional.get("distinct_count")),
        _read_count(path, "plain_count", optional.get("plain_count")),
    )


def _read_features(path: Path, value: np.ndarray | None) -> np.ndarray | None:
    """The array "features" of a file, checked."""
    if value is None:
        return None
    if value.ndim != 2 or len(value) < 2 or value.dtype.kind not in "fiu":
        raise UserError(
            f"{path}: features are {value.dtype} of shape {value.shape}, not a row of numbers for "
            "each of at least 2 images; make the file again"
        )
    if not np.isfinite(value).all():
        raise UserError(f"{path}: features contain NaN or infinity; make the file again")
    return value


def _read_count(path: Path, name: str, value: np.ndarray | None) -> int | None:
    """A number of images, checked."""
    if value is None:
        return None
    if value.size == 1 and value.dtype.kind in "fiu":
        count = float(value.item())
        if count >= 0 and count.is_integer():
            return int(count)
    raise UserError(f"{path}: {name} is no number of images; make the file again")


def _read_resolution(path: Path, value: np.ndarray | None) -> tuple[int, int] | None:
    """The array "resolution" of a file, checked."""
    if value is None:
        return None
    if value.shape != (2,) or value.dtype.kind not in "iu" or value.min() < 1:
        raise UserError(f"{path}: resolution is no height and width; make the file again")
    height, width = value.tolist()
    return height, width


def _read_moments(
    path: Path, arrays: dict[str, np.ndarray], mean_name: str, covariance_name: str
) -> Moments | None:
    """Moments with these names, checked; None if the file has none."""
    if mean_name not in arrays:
        return None
    if covariance_name not in arrays:
        raise UserError(f"{path} holds {mean_name} but no {covariance_name}; make the file again")
    moments = Moments(arrays[mean_name], arrays[covariance_name])
    try:
        checked_moments(moments)
    except UserError as error:
        raise UserError(f"{path}, {mean_name} and {covariance_name}: {error}") from None
    return moments


def write_statistics(path: Path, statistics: Statistics, **more: np.ndarray) -> None:
    """Write a statistics file.

    Args:
        path: the .npz file.
        statistics: its content.
        more: arrays to add. With ``arr_0``, images, it is a reference file that ADM's evaluator can
            read.
    """
    arrays = dict(more, feature_name=np.array(statistics.feature_name))
    for (mean_name, covariance_name), moments in zip(
        MOMENT_NAMES, (statistics.moments, statistics.spatial_moments), strict=True
    ):
        if moments:
            arrays[mean_name] = moments.mean
            # With features, factored moments are computed again in less time than their covariance
            # takes to read.
            if isinstance(moments, Moments) or statistics.features is None:
                arrays[covariance_name] = moments.covariance
    for name in OPTIONAL_NAMES:
        value = getattr(statistics, name)
        if value is not None:
            arrays[name] = np.asarray(value)
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as temporary, open(temporary, "wb") as file:
        np.savez(file, **arrays)  # type: ignore[arg-type]  # for mypy any name may be allow_pickle
