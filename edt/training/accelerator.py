"""The processes of a training run."""

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs


def create_accelerator() -> Accelerator:
    """This process's device, and its place among the others.

    Works under ``python``, ``torchrun`` and ``accelerate launch``: on GPUs if there are any, else
    on the CPU with gloo. Mixed precision is left to the trainer, whose configuration names it.
    """
    # The buffers are constant tables that every process makes itself, so none need be sent.
    ddp = DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True)
    return Accelerator(
        cpu=not torch.cuda.is_available(), mixed_precision="no", kwargs_handlers=[ddp]
    )
