"""Images side by side."""

from collections.abc import Sequence

import torch
from PIL import Image, ImageDraw, ImageFont

FONT_SIZE, CAPTION = 14, 20  # pixels: the letters, and the strip they stand in


def grid(images: torch.Tensor, gap: int = 2) -> torch.Tensor:
    """(rows, columns, H, W, 3) uint8 -> one image (rows * (H + gap) + gap, columns * (W + gap) +
    gap, 3), on white.
    """
    rows, columns, height, width, channels = images.shape
    canvas = torch.full(
        (rows, columns, height + gap, width + gap, channels), 255, dtype=torch.uint8
    )
    canvas[:, :, gap:, gap:] = images
    canvas = canvas.permute(0, 2, 1, 3, 4).reshape(
        rows * (height + gap), columns * (width + gap), channels
    )
    return torch.nn.functional.pad(canvas, (0, 0, 0, gap, 0, gap), value=255)


def captioned_grid(
    images: torch.Tensor,
    rows: Sequence[str],
    columns: Sequence[str] = (),
    min_side: int = 128,
    gap: int = 2,
) -> Image.Image:
    """A grid with a caption above each row, and above each column if wanted.

    Args:
        images: (rows, columns, H, W, 3) uint8; scaled up by a whole number until a side has
            ``min_side`` pixels.
        rows, columns: the captions.
    """
    factor = max(1, -(-min_side // images.shape[2]))
    images = images.repeat_interleave(factor, dim=2).repeat_interleave(factor, dim=3)
    strips = [
        torch.nn.functional.pad(grid(row[None], gap), (0, 0, 0, 0, CAPTION, 0), value=255)
        for row in images
    ]
    header = torch.full((CAPTION if columns else 0, *strips[0].shape[1:]), 255, dtype=torch.uint8)
    picture = Image.fromarray(torch.cat([header, *strips]).numpy())
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(FONT_SIZE)
    for i, text in enumerate(columns):
        draw.text((gap + i * (images.shape[3] + gap), gap), text, "black", font)
    for i, text in enumerate(rows):
        draw.text((gap, len(header) + i * len(strips[0]) + gap), text, "black", font)
    return picture


def difference(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a - b of uint8 images, halved around mid-grey 128: grey where they agree."""
    return (128 + (a.int() - b.int()) // 2).to(torch.uint8)
