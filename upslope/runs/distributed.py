"""Data-parallel training: which rank this is, how gradients are averaged. Alone, everything here is the identity."""

import os

import torch
from torch import Tensor


def rank() -> int:
    """This process' rank; 0 when it runs alone."""
    return int(os.environ.get("RANK", "0"))


def world_size() -> int:
    """How many processes train together (`torchrun` says so); 1 when alone."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def start() -> None:
    """Join the other ranks, if there are any."""
    if world_size() > 1 and not torch.distributed.is_initialized():
        torch.distributed.init_process_group("gloo")


def average_(tensor: Tensor) -> Tensor:
    """The mean over ranks, in place: one all-reduce, because a gradient is one vector."""
    if world_size() > 1:
        start()
        torch.distributed.all_reduce(tensor)
        tensor.div_(world_size())
    return tensor
