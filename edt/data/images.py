"""Image folders, and the crop that training data and reference statistics share."""

from pathlib import Path

from PIL import Image
from torchvision.datasets import ImageFolder

from edt.utils.errors import UserError


def center_crop(image: Image.Image, size: int) -> Image.Image:
    """Scale the shorter side to ``size`` pixels and cut out the central square, as ADM does.

    Args:
        image: any PIL image; it is converted to RGB.
        size: side of the result in pixels.
    """
    image = image.convert("RGB")
    # Halve with a box filter while the shorter side is at least twice the target. The bicubic step
    # then shrinks by a factor below 2, so it does not alias. ADM crops in the same way.
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    image = image.resize(
        (round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC
    )
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


def open_image_folder(path: str | Path) -> ImageFolder:
    """An ``ImageFolder``: one sub-folder of images per class.

    Raises:
        UserError: the folder is missing, has no class sub-folders, or no images.
    """
    if not Path(path).is_dir():
        raise UserError(
            f"no image folder at {path}; give a folder with one sub-folder of images per class"
        )
    try:
        return ImageFolder(str(path))
    except FileNotFoundError as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"{path} is not an image folder ({reason}); put the images in one sub-folder per class"
        ) from None
