"""Statistics of an image set, and their files."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from edt.metrics.frechet import Moments
from edt.metrics.images import read_npz
from edt.utils.errors import UserError
from edt.utils.files import atomic_write

MOMENT_NAMES = (("mu", "sigma"), ("mu_s", "sigma_s"))  # ADM's names: pool and spatial features
OPTIONAL_NAMES = ("features", "count", "resolution", "weights_sha256")


@dataclass(frozen=True)
class Statistics:
    """Moments and features of one image set, for one feature extractor."""

    feature_name: str  # the extractor's name
    moments: Moments  # of the features
    spatial_moments: Moments | None = None  # None if the extractor has no spatial features
    features: np.ndarray | None = None  # (N, D) float32, None if only the moments are known
    count: int | None = None  # number of images behind the moments
    resolution: tuple[int, int] | None = None  # (height, width) of the images in pixels
    weights_sha256: str | None = None  # the extractor's; ADM's files do not record it


def read_statistics(path: Path) -> Statistics:
    """Read a file of :func:`write_statistics` or one of ADM's reference files.

    Raises:
        UserError: the file is damaged or holds no moments.
    """
    names = [name for pair in MOMENT_NAMES for name in pair] + ["feature_name", *OPTIONAL_NAMES]
    arrays = read_npz(path, tuple(names))
    moments, spatial_moments = (_read_moments(path, arrays, *pair) for pair in MOMENT_NAMES)
    if moments is None:
        raise UserError(f"{path} holds no array {MOMENT_NAMES[0][0]}; give a statistics file")
    return Statistics(
        # ADM's files do not record a name. Their features are always Inception's.
        str(arrays.get("feature_name", "inception")),
        moments,
        spatial_moments,
        arrays.get("features"),
        int(arrays["count"]) if "count" in arrays else None,
        tuple(arrays["resolution"].tolist()) if "resolution" in arrays else None,
        str(arrays["weights_sha256"]) if "weights_sha256" in arrays else None,
    )


def _read_moments(
    path: Path, arrays: dict[str, np.ndarray], mean_name: str, covariance_name: str
) -> Moments | None:
    """Moments with these names, checked; None if the file has none."""
    if mean_name not in arrays:
        return None
    mean, covariance = arrays[mean_name], arrays.get(covariance_name, np.empty(0))
    if covariance.shape != mean.shape * 2:
        raise UserError(
            f"{path}: {covariance_name} has shape {covariance.shape}, but {mean_name} has "
            f"{mean.shape}; make the file again"
        )
    if not (np.isfinite(mean).all() and np.isfinite(covariance).all()):
        raise UserError(
            f"{path}: {mean_name} or {covariance_name} holds NaN or infinity; make the file again"
        )
    return Moments(mean, covariance)


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
            arrays[mean_name], arrays[covariance_name] = moments
    for name in OPTIONAL_NAMES:
        value = getattr(statistics, name)
        if value is not None:
            arrays[name] = np.asarray(value)
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as temporary, open(temporary, "wb") as file:
        np.savez(file, **arrays)  # type: ignore[arg-type]  # for mypy any name may be allow_pickle
