"""Opens the two sides of a comparison."""

import json
import logging
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from edt.metrics.features import FeatureName
from edt.metrics.images import ArrayImages, Crop, FolderImages, ImageSet, NpzImages, npz_names
from edt.metrics.statistics import Statistics, read_statistics
from edt.utils.choices import check_choice
from edt.utils.errors import UserError

logger = logging.getLogger(__name__)

RECIPE_KEY = "cfg_scale"  # tells the sampler's recipe.json from those of other programs


@dataclass(frozen=True)
class Source:
    """One side of a comparison, opened and checked.

    It has images or statistics. ADM's reference files have both.
    """

    name: str  # what messages call it
    images: ImageSet | None = None
    statistics: Statistics | None = None
    recipe: dict | None = None  # content of the sampler's recipe.json beside the images

    @property
    def resolution(self) -> tuple[int, int] | None:
        """(height, width) in pixels, None if unknown."""
        if self.images is not None:
            return self.images.resolution
        return self.statistics.resolution if self.statistics else None


def open_source(
    source: str | Path | np.ndarray,
    feature_name: FeatureName = "inception",
    crop: Crop | None = None,
) -> Source:
    """Open one side of a comparison.

    Args:
        source: an .npz file of images, an image folder, a folder of samples that the sampler
            wrote, a statistics file, or an array of images, uint8 (N, H, W, 3).
        feature_name: the features to compare. Statistics of other features are ignored if the file
            has images too.
        crop: applied to the images of a folder.

    Raises:
        UserError: the source has nothing that can be compared, or an argument is unknown.
    """
    check_choice("features", feature_name, FeatureName)
    if isinstance(source, np.ndarray):
        images = ArrayImages(source)
        return Source(images.name, images)
    path = Path(source)
    if path.is_dir():
        return _open_folder(path, feature_name, crop)
    if not path.exists():
        raise UserError(
            f"{path} does not exist; give an .npz file, an image folder or a folder of samples"
        )
    return _open_npz(path, feature_name)


def _open_folder(path: Path, feature_name: FeatureName, crop: Crop | None) -> Source:
    """Open a folder of samples (with the sampler's files) or a folder of images."""
    archives = sorted(path.glob("samples_*.npz"))
    if len(archives) > 1:
        raise UserError(
            f"{path} holds {len(archives)} samples_*.npz files; name one, like {archives[0]}"
        )
    recipe = _read_recipe(path / "recipe.json")
    if archives:
        return replace(_open_npz(archives[0], feature_name), recipe=recipe)
    if recipe is not None:
        # The sampler names its file samples_*.npz when all images are done.
        raise UserError(
            f"{path} holds a recipe.json but no samples_*.npz; "
            "run the same sampling command again to finish it"
        )
    return Source(str(path), FolderImages(path, crop))


def _open_npz(path: Path, feature_name: FeatureName) -> Source:
    names = npz_names(path)
    statistics = read_statistics(path) if "mu" in names else None
    if statistics and statistics.feature_name != feature_name:
        if "arr_0" not in names:
            raise UserError(
                f"{path} holds statistics of {statistics.feature_name} features, "
                f"not {feature_name}; give images, or the other --features"
            )
        statistics = None
    images = NpzImages(path) if statistics is None or "arr_0" in names else None
    return Source(str(path), images, statistics, _read_recipe(path.parent / "recipe.json"))


def _read_recipe(path: Path) -> dict | None:
    """The sampler's recipe.json; None if the file is another program's, or damaged."""
    try:
        recipe = json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        logger.warning("warning: %s is not readable and left out of the report (%s)", path, error)
        return None
    return recipe if isinstance(recipe, dict) and RECIPE_KEY in recipe else None
