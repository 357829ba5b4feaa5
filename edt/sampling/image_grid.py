"""Images side by side."""

import functools
import importlib.util
import unicodedata
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont

FONT_PIXELS, CAPTION_PIXELS = 14, 20  # height of the letters, and of the strip that holds them
# Fonts with more letters than Pillow's own, which has ASCII only. They are used where installed.
FONT_FILES = ("DejaVuSans.ttf", "NotoSans-Regular.ttf", "NotoSansCJK-Regular.ttc", "arialuni.ttf")

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


def make_grid(images: torch.Tensor, gap: int = 2) -> torch.Tensor:
    """One picture of many images, on white.

    Args:
        images: (rows, columns, H, W, 3) uint8.
        gap: pixels around each image.

    Returns:
        (rows * (H + gap) + gap, columns * (W + gap) + gap, 3) uint8.
    """
    rows, columns, height, width, channels = images.shape
    tile_height, tile_width = height + gap, width + gap
    canvas = torch.full((rows, columns, tile_height, tile_width, channels), 255, dtype=torch.uint8)
    canvas[:, :, gap:, gap:] = images
    canvas = canvas.permute(0, 2, 1, 3, 4)
    canvas = canvas.reshape(rows * tile_height, columns * tile_width, channels)
    return torch.nn.functional.pad(canvas, (0, 0, 0, gap, 0, gap), value=255)


def make_captioned_grid(
    images: torch.Tensor,
    row_captions: Sequence[str],
    column_captions: Sequence[str] = (),
    min_side: int = 128,
    gap: int = 2,
) -> Image.Image:
    """A grid with a caption above each row, and above each column if captions are given.

    Args:
        images: (rows, columns, H, W, 3) uint8.
        row_captions: one per row.
        column_captions: one per column, or none.
        min_side: images are scaled up by a whole number until a side has so many pixels.
        gap: pixels around each image.
    """
    factor = max(1, -(-min_side // images.shape[2]))
    images = images.repeat_interleave(factor, dim=2).repeat_interleave(factor, dim=3)
    strips = []
    for row in images:
        strip = make_grid(row[None], gap)
        strips.append(torch.nn.functional.pad(strip, (0, 0, 0, 0, CAPTION_PIXELS, 0), value=255))
    header_pixels = CAPTION_PIXELS if column_captions else 0
    header = torch.full((header_pixels, *strips[0].shape[1:]), 255, dtype=torch.uint8)
    picture = Image.fromarray(torch.cat([header, *strips]).numpy())
    draw = ImageDraw.Draw(picture)
    for i, caption in enumerate(column_captions):
        _draw_caption(draw, (gap + i * (images.shape[3] + gap), gap), caption)
    for i, caption in enumerate(row_captions):
        _draw_caption(draw, (gap, header_pixels + i * len(strips[0]) + gap), caption)
    return picture


def _draw_caption(draw: ImageDraw.ImageDraw, position: tuple[int, int], text: str) -> None:
    """Draw a text in the font that has most of its letters; the others as Python escapes them."""
    text = unicodedata.normalize("NFC", text)
    fonts = _fonts()
    missing = [[letter for letter in text if not _has_letter(font, letter)] for font in fonts]
    font, absent = min(zip(fonts, missing, strict=True), key=lambda pair: len(pair[1]))
    for letter in absent:
        text = text.replace(letter, letter.encode("ascii", "backslashreplace").decode())
    draw.text(position, text, "black", font)


@functools.cache
def _fonts() -> list[Font]:
    """Pillow's own font, then those of FONT_FILES that are installed or come with matplotlib."""
    fonts: list[Font] = [ImageFont.load_default(FONT_PIXELS)]
    matplotlib = importlib.util.find_spec("matplotlib")
    files = [*FONT_FILES]
    if matplotlib is not None and matplotlib.origin is not None:
        files.append(str(Path(matplotlib.origin).parent / "mpl-data/fonts/ttf/DejaVuSans.ttf"))
    for file in files:
        try:
            fonts.append(ImageFont.truetype(file, FONT_PIXELS))
        except OSError:
            continue  # it is not installed
    return fonts


@functools.cache
def _has_letter(font: Font, letter: str) -> bool:
    """Whether a font draws a letter, and not the box that stands for all letters it lacks."""
    if letter.isascii():
        return True
    # A surrogate stands for a byte of a file name that is not UTF-8. A Pillow without FreeType has
    # a bitmap font.
    if unicodedata.category(letter) == "Cs" or isinstance(font, ImageFont.ImageFont):
        return False
    mask, box = font.getmask(letter), font.getmask("\uffff")
    return (mask.size, bytes(mask)) != (box.size, bytes(box))


def difference(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a - b of uint8 images, halved around mid-grey 128: grey where they agree."""
    return (128 + (a.int() - b.int()) // 2).to(torch.uint8)
