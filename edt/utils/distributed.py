"""The place of this process among those that torchrun or accelerate started."""

import os
from typing import NamedTuple

import torch


class DistributedEnv(NamedTuple):
    """What the launcher says in the environment variables."""

    rank: int  # of this process among all, from 0
    world_size: int  # number of processes
    device: torch.device  # where this process computes


def get_distributed_env() -> DistributedEnv:
    """Read the launcher's variables; without a launcher there is one process.

    For work that needs no exchange between processes. It opens no process group, so nothing can
    wait for another process or time out.
    """
    rank = int(os.environ.get("RANK", 0))
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda", local_rank) if on_gpu else torch.device("cpu")
    return DistributedEnv(rank, world_size, device)
