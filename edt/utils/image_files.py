"""Reading image files: every kind of pixel to 8-bit RGB, every unreadable file to one line."""

import contextlib
import os
from collections.abc import Iterator

import numpy as np
from PIL import Image

from edt.utils.errors import UserError

# Tags of TIFF.
BITS_PER_SAMPLE, PHOTOMETRIC, WHITE_IS_ZERO = 258, 262, 0


@contextlib.contextmanager
def open_image(
    file: str | os.PathLike[str], remedy: str = "replace or remove it"
) -> Iterator[Image.Image]:
    """Open an image file. Its pixels are read when they are first needed.

    Args:
        file: its path.
        remedy: what the user should do about an unreadable image; ends the message.

    Raises:
        UserError: the file cannot be read as an image, also if reading the pixels shows it.
    """
    try:
        with Image.open(file) as image:
            yield image
    # Pillow's many readers raise more types for damaged files than anyone lists: OSError,
    # SyntaxError, ValueError, struct.error, ... Too large an image is a DecompressionBombError.
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"cannot read the image {os.fspath(file)} ({reason}); {remedy}") from None


def read_image(file: str | os.PathLike[str], remedy: str = "replace or remove it") -> Image.Image:
    """The image in a file, converted by :func:`to_rgb`. See :func:`open_image`."""
    with open_image(file, remedy) as image:
        return to_rgb(image)


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert an image of any mode to 8-bit RGB.

    Grey values of 16 bits keep their high byte, as Pillow does for colours of 16 bits. (Its own
    conversion of grey values would clip everything above 255 to white.)

    Raises:
        UserError: the pixels are signed or 32-bit numbers, whose range no file tells.
    """
    # Mode I holds 32-bit integers, and signed ones of 16 bits. Pillow also uses it for .pgm files
    # of more than 8 bits, scaled to 16; its older versions use it for .png files of 16 bits.
    known_range = image.mode == "I" and image.format in ("PNG", "PPM")
    if image.mode.startswith("I;16") or known_range:
        image = _grey_of_8_bits(image)
    elif image.mode in ("I", "F"):
        raise UserError(
            f"mode {image.mode}: the range of its pixels is unknown, save unsigned 8 or 16 bits"
        )
    return image.convert("RGB")


def _grey_of_8_bits(image: Image.Image) -> Image.Image:
    """The high byte of grey values of 16 bits, or of 12 bits in a TIFF."""
    tags = getattr(image, "tag_v2", {})
    values = np.asarray(image) >> (tags.get(BITS_PER_SAMPLE, (16,))[0] - 8)
    if tags.get(PHOTOMETRIC) == WHITE_IS_ZERO:
        values = 255 - values
    return Image.fromarray(values.astype(np.uint8))
