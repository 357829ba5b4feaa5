"""The processes of a training run."""

import os

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.utils import GradientAccumulationPlugin

from edt.utils.errors import UserError

# What `accelerate launch` may ask for and a checkpoint of whole tensors does not allow.
UNSUPPORTED = {
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_FSDP": "FSDP",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "tensor or context parallelism",
}


def create_accelerator() -> Accelerator:
    """Create the Accelerator, which gives this process its device and rank.

    Works under ``python``, ``torchrun`` and ``accelerate launch``: on GPUs if there are any, else
    on the CPU with gloo. The launcher decides processes and devices. Its other settings, and the
    variables of the environment that carry them, change no arithmetic: the flags decide.

    Raises:
        UserError: the launcher asks for a way of training that is not supported.
    """
    _check_launcher()
    # Buffers are constant tables that every process computes itself: DDP need not broadcast them.
    ddp = DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True)
    return Accelerator(
        cpu=not torch.cuda.is_available(),
        # What is not given here would be read from the environment.
        mixed_precision="no",
        dynamo_backend="no",
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
        kwargs_handlers=[ddp],
    )


def _check_launcher() -> None:
    for variable, name in UNSUPPORTED.items():
        if os.environ.get(variable, "false").lower() in ("true", "1", "yes"):
            raise UserError(
                f"the launcher asks for {name} ({variable}), and training is data-parallel only: "
                "use torchrun, or an accelerate configuration without it"
            )
    fp8_backend = os.environ.get("ACCELERATE_FP8_BACKEND", "no").lower()
    if os.environ.get("ACCELERATE_MIXED_PRECISION", "no").lower() == "fp8" or fp8_backend != "no":
        raise UserError(
            "the launcher asks for fp8, and training computes in --precision fp32, tf32 or bf16: "
            "launch without fp8 (ACCELERATE_MIXED_PRECISION, ACCELERATE_FP8_BACKEND)"
        )
