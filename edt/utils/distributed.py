"""Rank, world size and device of this process, as torchrun or accelerate set them."""

import os
from typing import NamedTuple

import torch


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
