"""The processes of a training run."""

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs


def create_accelerator() -> Accelerator:
    """Create the Accelerator, which gives this process its device and rank.

    Works under ``python``, ``torchrun`` and ``accelerate launch``: on GPUs if there are any, else
    on the CPU with gloo. Mixed precision is left to the trainer, whose configuration names it.
    """
    # Buffers are constant tables that every process computes itself: DDP need not broadcast them.
    ddp = DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True)
    return Accelerator(
        cpu=not torch.cuda.is_available(), mixed_precision="no", kwargs_handlers=[ddp]
    )
