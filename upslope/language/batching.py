"""Sequences of tokens as rectangles: padded, packed, or sorted by length so that little is padding."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Int64
from torch import Tensor

PASS = 64  # tokens whose way through a network takes as long as what every pass takes, however few there are


class Sequences(NamedTuple):
    """Prompts with their completions. What is padding the masks say, never a token id: pad may be eos."""

    ids: Int64[Tensor, "B L"]
    attention: Bool[Tensor, "B L"]  # a token, not padding
    response: Bool[Tensor, "B L"]  # a token of a completion, its end of sequence included
    positions: Int64[Tensor, "B L"]  # of each token in its own example
    segment: Int64[Tensor, "B L"] | None = None  # packed rows: the example's number, -1 for padding

    def to(self, device: torch.device) -> "Sequences":
        return Sequences(*(None if part is None else part.to(device) for part in self))  # type: ignore[arg-type]

    def without_last(self) -> "Sequences":
        """All but the last column."""
        return Sequences(*(None if part is None else part[:, :-1] for part in self))  # type: ignore[arg-type]


def pad(
    prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[int]], pad_id: int, left: bool = False
) -> Sequences:
    """One example a row, filled up on the right (or left) to the longest.

    >>> pad([[5, 6], [7]], [[8], [9, 1]], pad_id=0).ids
    tensor([[5, 6, 8],
            [7, 9, 1]])
    """
    length = max(len(p) + len(c) for p, c in zip(prompts, completions, strict=True))
    ids = torch.full((len(prompts), length), pad_id)
    attention, response = torch.zeros_like(ids, dtype=torch.bool), torch.zeros_like(ids, dtype=torch.bool)
    for i, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
        count = len(prompt) + len(completion)
        first = length - count if left else 0
        ids[i, first : first + count] = torch.tensor([*prompt, *completion])
        attention[i, first : first + count] = True
        response[i, first + len(prompt) : first + count] = True
    positions = (attention.long().cumsum(1) - 1).clamp(min=0)
    return Sequences(ids, attention, response, positions)


def pack(prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[int]], pad_id: int, length: int) -> Sequences:
    """Several examples a row of `length` tokens, first fit by decreasing length; none sees another.

    >>> pack([[5, 6], [7]], [[8], [9, 1]], pad_id=0, length=6).segment
    tensor([[0, 0, 0, 1, 1, 1]])

    Raises:
        ValueError: an example that is longer than a row.
    """
    sizes = [len(p) + len(c) for p, c in zip(prompts, completions, strict=True)]
    if max(sizes) > length:
        raise ValueError(f"length is {length}, but example {sizes.index(max(sizes))} has {max(sizes)} tokens")
    rows: list[list[int]] = []
    free: list[int] = []
    for i in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        row = next((r for r, space in enumerate(free) if space >= sizes[i]), len(rows))
        if row == len(rows):
            rows.append([])
            free.append(length)
        rows[row].append(i)
        free[row] -= sizes[i]
    parts = [pad([prompts[i] for i in row], [completions[i] for i in row], pad_id) for row in rows]
    ids = torch.full((len(rows), length), pad_id)
    response, positions = torch.zeros_like(ids, dtype=torch.bool), torch.zeros_like(ids)
    segment = torch.full_like(ids, -1)
    for r, part in enumerate(parts):
        inside = slice(0, int(part.attention.sum()))
        ids[r, inside] = part.ids[part.attention]
        response[r, inside] = part.response[part.attention]
        positions[r, inside] = part.positions[part.attention]
        segment[r, inside] = torch.tensor([k for k, i in enumerate(rows[r]) for _ in range(sizes[i])])
    return Sequences(ids, segment >= 0, response, positions, segment)


def buckets(lengths: Sequence[int], tokens: int) -> list[list[int]]:
    """Indices in groups of like length, each of at most `tokens` tokens once padded; every group has one at least.

    A group ends where its padding would cost more than another pass through the network.

    >>> buckets([3, 9, 4, 8], tokens=18)
    [[1, 3], [2, 0]]
    """
    groups: list[list[int]] = []
    padding = 0
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        padding += lengths[groups[-1][0]] - lengths[i] if groups else 0
        if not groups or padding > PASS or (len(groups[-1]) + 1) * lengths[groups[-1][0]] > tokens:
            groups.append([])
            padding = 0
        groups[-1].append(i)
    return groups
