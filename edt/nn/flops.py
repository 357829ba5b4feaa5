"""Floating-point operations of a network, and the peak rate of a device."""

from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from edt.nn.precision import Precision
from edt.nn.transformer import DiffusionTransformer
from edt.utils.choices import check_choice

# Dense peaks in TFLOP/s from NVIDIA's data sheets, SXM where there are several: (TF32, bfloat16).
# The first key found in the device name is used, so L40S comes before L40.
PEAK_TFLOPS_PER_SEC = {
    "H100": (494.0, 989.0),
    "H200": (494.0, 989.0),
    "A100": (156.0, 312.0),
    "L40S": (183.0, 366.0),
    "L40": (90.5, 181.0),
}


def forward_flops(model: DiffusionTransformer, masks: Any = None) -> int:
    """Floating-point operations of one forward pass of one image.

    They are twice the multiply-accumulates that the paper calls "GFLOPs". A copy of the network on
    the meta device is counted, so nothing is computed.

    Args:
        model: the network.
        masks: of a masked pass of one image, on the meta device; None counts the full pass.
    """
    config = model.config
    with torch.device("meta"):
        copy_on_meta = type(model)(config)
        x = torch.empty(1, config.in_channels, config.input_size, config.input_size)
        with FlopCounterMode(display=False) as counter:
            copy_on_meta(x, torch.zeros(1), masks=masks)
    return counter.get_total_flops()


def peak_flops_per_sec(device: torch.device, precision: Precision) -> float | None:
    """Peak rate of a device in operations per second; None where it is not known."""
    check_choice("precision", precision, Precision)
    if device.type != "cuda" or precision == "fp32":
        return None
    device_name = torch.cuda.get_device_name(device)
    for name, (tf32, bf16) in PEAK_TFLOPS_PER_SEC.items():
        if name in device_name:
            return 1e12 * (bf16 if precision == "bf16" else tf32)
    return None
