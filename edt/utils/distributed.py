"""Rank, world size and device of this process, as torchrun or accelerate set them."""

import os
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch

# What `accelerate launch` hands over beyond processes and devices, from its options or from its
# configuration file: the variable, the values that ask for nothing, and the flag that decides here.
LAUNCHER_SETTINGS = {
    "ACCELERATE_MIXED_PRECISION": (("no",), "precision"),
    "ACCELERATE_DYNAMO_BACKEND": (("no",), "compile"),
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": (("1", "auto"), "micro_batch_size"),
    "ACCELERATE_GRADIENT_CLIPPING": (("none", "auto"), "max_grad_norm"),
}


class DistributedEnv(NamedTuple):
    """Values of the launcher's environment variables."""

    rank: int  # of this process, from 0
    world_size: int  # number of processes
    device: torch.device  # where this process computes


def get_distributed_env() -> DistributedEnv:
    """Read the launcher's variables; without a launcher there is one process.

    For work without communication between processes. No process group is opened, so no process
    can wait for another one or time out.
    """
    rank = int(os.environ.get("RANK", 0))
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda", local_rank) if on_gpu else torch.device("cpu")
    return DistributedEnv(rank, world_size, device)


def ignored_launcher_settings(flags: Mapping[str, Any]) -> list[str]:
    """What the launcher asks for and the flags decide differently, a sentence for each.

    Args:
        flags: the flags of the script by name. A setting whose flag the script lacks is left out.
    """
    sentences = []
    for variable, (neutral, flag) in LAUNCHER_SETTINGS.items():
        value = os.environ.get(variable, neutral[0]).lower()
        if flag not in flags or value in neutral:
            continue
        if flag == "precision" and value == flags[flag]:
            continue
        option = "--" + flag.replace("_", "-")
        decision = "is not given" if flags[flag] is None else f"is {flags[flag]}"
        sentences.append(
            f"{variable}={value}, from accelerate launch or the environment, has no effect: "
            f"{option} decides, and it {decision}"
        )
    return sentences
