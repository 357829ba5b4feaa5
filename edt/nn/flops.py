"""Floating-point operations, and how many of those a device could do are used."""

import torch
from torch.utils.flop_counter import FlopCounterMode

from edt.models import EDT, EDTConfig

# Dense peak in TFLOP/s by their data sheets: (TF32, bfloat16).
PEAKS = {
    "H100": (494, 989),
    "H200": (494, 989),
    "A100": (156, 312),
    "L40S": (183, 366),
    "L40": (90.5, 181),
}


def forward_flops(config: EDTConfig) -> int:
    """Floating-point operations of one forward pass of one image: twice the multiply-accumulates,
    which the paper's "GFLOPs" count."""
    with torch.device("meta"):
        model = EDT(config)
        x = torch.empty(1, config.in_channels, config.input_size, config.input_size)
        with FlopCounterMode(display=False) as counter:
            model(x, torch.zeros(1))
    return counter.get_total_flops()


def peak_flops(device: torch.device, precision: str) -> float | None:
    """Operations a second that the device could do, or None where it is not known."""
    if device.type != "cuda" or precision == "fp32":
        return None
    name = torch.cuda.get_device_name(device)
    peaks = next((peaks for known, peaks in PEAKS.items() if known in name), None)
    return None if peaks is None else 1e12 * peaks[precision == "bf16"]
