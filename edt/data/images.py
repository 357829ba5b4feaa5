"""Image folders and the crop that training data and reference statistics share."""

from pathlib import Path

from PIL import Image
from torchvision.datasets import ImageFolder

from edt.utils.errors import UserError


def center_crop(image: Image.Image, size: int) -> Image.Image:
    """Scale the shorter side to ``size`` pixels and cut the central square, as ADM does.

    Halving with a box filter until less than twice the size is left keeps large photographs free of
    aliasing; the last step is bicubic.

    Args:
        image: any PIL image; it is converted to RGB.
        size: side of the result in pixels.
    """
    image = image.convert("RGB")
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    image = image.resize(
        (round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC
    )
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


def open_image_folder(path: str | Path, **options) -> ImageFolder:
    """An ``ImageFolder`` (one sub-folder a class); ``options`` are passed on.

    Raises:
        UserError: the folder is missing, has no class sub-folders, or no images.
    """
    if not Path(path).is_dir():
        raise UserError(
            f"no image folder at {path}; give a folder with one sub-folder of images per class"
        )
    try:
        return ImageFolder(str(path), **options)
    except FileNotFoundError as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"{path} is not an image folder ({reason}); put the images in one sub-folder per class"
        ) from None
