"""The replay inside a program: what `Replay.append` and `Replay.uniform` do, as operations on the same memory."""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from upslope.control.replay import Ring, Rows


class Stepped(NamedTuple):
    """What a step of every environment gave, in a program."""

    action: Tensor
    reward: Float[Tensor, " N"]
    terminated: Bool[Tensor, " N"]
    ended: Bool[Tensor, " N"]
    successor: Tensor  # the true one, of an episode that ended its final observation
    observation: Tensor  # what to act on next


def store(rows: Rows, ring: Ring, step: Stepped) -> None:
    """What `Replay.append` writes, as operations on tensors, in place; without priorities and stacks of frames."""
    size, over = len(rows.ahead), step.ended.long()
    finals = ring.written + over.cumsum(0) - 1
    fresh = ring.written + over.sum() + torch.arange(len(over))
    following = torch.where(step.ended, finals, fresh)
    here, there, next_one = ring.open % size, following % size, fresh % size
    observation = rows.observation[""]
    observation.index_copy_(0, there, step.successor.to(observation.dtype))
    observation.index_copy_(0, next_one, step.observation.to(observation.dtype))
    rows.ahead.index_fill_(0, there, 0)
    rows.ahead.index_fill_(0, next_one, 0)
    columns = (rows.action, rows.reward, rows.terminated, rows.ahead)
    for column, value in zip(columns, (step.action, step.reward, step.terminated, following - ring.open), strict=True):
        column.index_copy_(0, here, value.to(column.dtype))
    ring.open.copy_(fresh)
    ring.written.add_(over.sum() + len(over))


def uniform(rows: Rows, ring: Ring, places: Int64[Tensor, " k"], size: int) -> Int64[Tensor, " B"]:
    """What `Replay.uniform` gives, as operations on tensors; where too few places fall on transitions, some twice."""
    row = places % ring.written.clamp(max=len(rows.ahead))
    rank = (rows.ahead.index_select(0, row) > 0).long().cumsum(0)
    wanted = 1 + torch.arange(size) % rank[-1].clamp(min=1)
    return row.index_select(0, torch.searchsorted(rank, wanted).clamp(max=len(row) - 1))
