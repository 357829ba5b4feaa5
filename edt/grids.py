"""Images side by side."""

import torch


def grid(images: torch.Tensor, gap: int = 2) -> torch.Tensor:
    """(rows, columns, H, W, 3) uint8 -> one image (rows * (H + gap) + gap, columns * (W + gap) + gap, 3), on white."""
    rows, columns, height, width, channels = images.shape
    canvas = torch.full((rows, columns, height + gap, width + gap, channels), 255, dtype=torch.uint8)
    canvas[:, :, gap:, gap:] = images
    canvas = canvas.permute(0, 2, 1, 3, 4).reshape(rows * (height + gap), columns * (width + gap), channels)
    return torch.nn.functional.pad(canvas, (0, 0, 0, gap, 0, gap), value=255)
