"""Data-parallel training under `torchrun`: every rank has environments of its own, θ is the same everywhere.

Alone, everything here is the identity. What travels between ranks are tensors: gradients, statistics, checkpoints.
"""

import os
from datetime import timedelta

import torch
from safetensors.torch import load, save
from torch import Tensor

TIMEOUT = timedelta(minutes=5)  # a rank that is silent for longer is taken for dead, and the others stop


def rank() -> int:
    """This process' rank; 0 when it runs alone."""
    return int(os.environ.get("RANK", "0")) if world_size() > 1 else 0


def world_size() -> int:
    """How many processes train together (`torchrun` says so); 1 when alone."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def start() -> None:
    """Join the other ranks, if there are any."""
    if world_size() > 1 and not torch.distributed.is_initialized():
        torch.distributed.init_process_group("gloo", timeout=TIMEOUT)


def leave() -> None:
    """Wait for the other ranks and part from them: the last thing a program does, else gloo's threads abort."""
    if world_size() > 1 and torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


def total_(tensor: Tensor) -> Tensor:
    """The sum over ranks, in place."""
    if world_size() > 1:
        start()
        torch.distributed.all_reduce(tensor)
    return tensor


def average_(tensor: Tensor) -> Tensor:
    """The mean over ranks, in place: one all-reduce for a whole gradient, because θ is one vector."""
    return total_(tensor).div_(world_size()) if world_size() > 1 else tensor


def everyones(tensor: Tensor) -> list[Tensor]:
    """This tensor of every rank, in the order of ranks; all have one shape."""
    if world_size() == 1:
        return [tensor]
    start()
    parts = [torch.empty_like(tensor) for _ in range(world_size())]
    torch.distributed.all_gather(parts, tensor.contiguous())
    return parts


def agreed(flag: bool) -> bool:
    """Rank 0's answer, for questions of time that every rank would answer for itself."""
    return flag if world_size() == 1 else bool(everyones(torch.tensor(flag, dtype=torch.uint8))[0])


def collected(name: str, own: dict[str, Tensor]) -> dict[str, Tensor]:
    """Every rank's tensors, under `<name>.<rank>.`, as one checkpoint holds them. Complete on rank 0."""
    mine = {f"{name}.{rank()}.{key}": value for key, value in own.items()}
    if world_size() == 1:
        return mine
    payload = torch.frombuffer(bytearray(save({k: v.contiguous() for k, v in mine.items()})), dtype=torch.uint8)
    sizes = everyones(torch.tensor(payload.numel()))
    padded = torch.zeros(int(max(sizes)), dtype=torch.uint8)
    padded[: payload.numel()] = payload
    parts = zip(everyones(padded), sizes, strict=True)
    return {key: value for part, size in parts for key, value in load(part[: int(size)].numpy().tobytes()).items()}


def own(name: str, tensors: dict[str, Tensor], of_rank: int | None = None) -> dict[str, Tensor]:
    """This rank's part of what `collected` brought together.

    Raises:
        ValueError: the checkpoint was written by fewer ranks.
    """
    prefix = f"{name}.{rank() if of_rank is None else of_rank}."
    part = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
    if not part:
        raise ValueError(f"the checkpoint holds nothing for rank {rank()}: resume with as many ranks as wrote it")
    return part
