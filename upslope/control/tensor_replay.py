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


def store(rows: Rows, ring: Ring, step: Stepped) -> Int64[Tensor, " N"]:
    """What `Replay.append` writes, in place, without priorities and stacks of frames; the rows of the transitions."""
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
    return here


def uniform(
    rows: Rows, ring: Ring, places: Int64[Tensor, " k"], size: int, newest: Int64[Tensor, " N"]
) -> Int64[Tensor, " B"]:
    """What `Replay.uniform` gives; where too few places and their second digits fall on transitions, some twice."""
    filled = ring.written.clamp(max=len(rows.ahead))
    row = torch.cat((places % filled, places // filled % filled, newest[:1]))  # the last is a transition for sure
    rank = (rows.ahead.index_select(0, row) > 0).long().cumsum(0)
    return row.index_select(0, torch.searchsorted(rank, 1 + torch.arange(size) % rank[-1]))
