"""The images of a training set, and the crop that reference statistics share with it."""

import functools
import hashlib
import os
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset
from torchvision.transforms.functional import to_tensor

from edt.utils.errors import UserError
from edt.utils.image_files import open_image, to_rgb
from edt.utils.image_folder import list_images


def center_crop(image: Image.Image, size: int) -> Image.Image:
    """Scale the shorter side to ``size`` pixels and cut out the central square, as ADM does.

    Args:
        image: any PIL image; it is converted by :func:`to_rgb`.
        size: side of the result in pixels.

    Raises:
        UserError: the pixels have no known range, or one side is thousands of times the other.
    """
    image = to_rgb(image)
    # Halve with a box filter while the shorter side is at least twice the target. The bicubic step
    # then shrinks by a factor below 2, so it does not alias. ADM crops in the same way.
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    width, height = round(image.width * scale), round(image.height * scale)
    # Pillow opens no larger images. A thin line of pixels would be enlarged to tens of gigabytes.
    if Image.MAX_IMAGE_PIXELS is not None and width * height > 2 * Image.MAX_IMAGE_PIXELS:
        raise UserError(
            f"its sides differ too much: it would be scaled to {width} x {height} pixels before "
            f"the crop, and the limit is {2 * Image.MAX_IMAGE_PIXELS} pixels"
        )
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


class CroppedImages(Dataset[tuple[int, torch.Tensor]]):
    """Every image of a folder of class folders, as (index, image (3, S, S) in [-1, 1]).

    Args:
        path: the folder.
        image_size: S, in pixels.

    Attributes:
        folder: the listing of the folder.
        paths: of the images, below the folder.
        labels: (count,) int64.

    Raises:
        UserError: the folder does not consist of class folders; later, an image cannot be read.
    """

    def __init__(self, path: str | Path, image_size: int):
        self.folder, self.image_size = list_images(path), image_size
        self.paths, self.labels = self.folder.labelled_paths()

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[int, torch.Tensor]:
        remedy = (
            "replace it with a valid image and rerun, "
            "or remove it and extract into a new --features-path"
        )
        with open_image(self.file(index), remedy) as image:
            cropped = center_crop(image, self.image_size)
        return index, to_tensor(cropped) * 2 - 1

    def file(self, index: int) -> Path:
        """The file of an image."""
        return self.folder.root / self.paths[index]

    def paths_sha256(self) -> str:
        """Hash of the images' paths below the folder, in order; it tells one folder from another.

        The pixels are not hashed, as this would read every image once more.
        """
        # The file system's own bytes: not every name is UTF-8.
        return hashlib.sha256(os.fsencode("\n".join(self.paths))).hexdigest()

    @functools.cached_property
    def file_sizes(self) -> np.ndarray:
        """Bytes of each image's file, (count,) int64."""
        sizes = (os.stat(os.path.join(self.folder.root, path)).st_size for path in self.paths)
        return np.fromiter(sizes, np.int64, len(self))
