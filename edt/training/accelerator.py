"""The processes of a training run."""

import os
from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from accelerate import Accelerator, DistributedDataParallelKwargs, PartialState
from accelerate.utils import GradientAccumulationPlugin, broadcast_object_list

from edt.utils.errors import UserError

T = TypeVar("T")

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
    _join_after_restart()
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


def _join_after_restart() -> None:
    """Open the process group of a run that ``torchrun --max-restarts`` has started again.

    The processes find each other through a store in torchrun, which outlives them. Under the same
    keys they would read the addresses of the processes before the restart (torch 2.14), so the keys
    get the number of the restart as a prefix. The nodes of a larger run may count differently.
    """
    env = os.environ
    restarts, nodes = env.get("TORCHELASTIC_RESTART_COUNT", "0"), env.get("GROUP_WORLD_SIZE")
    if restarts == "0" or nodes != "1" or env.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return
    rank, world_size = int(env["RANK"]), int(env["WORLD_SIZE"])
    address, port = env["MASTER_ADDR"], int(env["MASTER_PORT"])
    store = dist.TCPStore(address, port, world_size, is_master=False)
    dist.init_process_group(
        backend="nccl" if torch.cuda.is_available() else "gloo",
        store=dist.PrefixStore(f"restart {restarts}", store),
        rank=rank,
        world_size=world_size,
    )


def first_process_decides(decide: Callable[[], T]) -> T:
    """Call a function on the first process, and return its result on every process.

    Raises:
        UserError: the function raised it. Every process raises it, so that none waits for another.
    """
    outcome: list[Any] = [None, None]
    if PartialState().is_main_process:
        try:
            outcome[0] = decide()
        except UserError as error:
            outcome[1] = str(error)
    result, message = broadcast_object_list(outcome)
    if message is not None:
        raise UserError(message)
    return result
