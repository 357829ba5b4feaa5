"""Images side by side."""

from collections.abc import Sequence

import torch
from PIL import Image, ImageDraw, ImageFont

FONT_PIXELS, CAPTION_PIXELS = 14, 20  # height of the letters, and of the strip that holds them


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
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(FONT_PIXELS)
    for i, caption in enumerate(column_captions):
        draw.text((gap + i * (images.shape[3] + gap), gap), caption, "black", font)
    for i, caption in enumerate(row_captions):
        draw.text((gap, header_pixels + i * len(strips[0]) + gap), caption, "black", font)
    return picture


def difference(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a - b of uint8 images, halved around mid-grey 128: grey where they agree."""
    return (128 + (a.int() - b.int()) // 2).to(torch.uint8)
