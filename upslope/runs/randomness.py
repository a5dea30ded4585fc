"""Randomness without hidden state: every random number is a function of (run seed, stream, position).

A generator is derived where it is needed and thrown away: a checkpoint has none to save, a resumed run draws the same
numbers, and every rank of a distributed run has streams of its own.
"""

import hashlib
from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

import torch

BLOCK = 64  # positions drawn at once
NUMBERS = 2**20  # at most drawn at once, unless one position takes more
T = TypeVar("T")


def derive(seed: int, *path: int | str) -> int:
    """A 63-bit seed for the stream `path` of the run `seed`: the first bytes of SHA-256 over both.

    >>> derive(1, "shuffle", 3) == derive(1, "shuffle", 3), derive(1, "shuffle", 3) == derive(1, "shuffle", 4)
    (True, False)
    """
    digest = hashlib.sha256(repr((int(seed), *path)).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def generator(seed: int, *path: int | str, device: str = "cpu") -> torch.Generator:
    """A fresh `torch.Generator` at the start of the stream `path` of the run `seed`.

    >>> a, b = generator(1, "noise", 0), generator(1, "noise", 0)
    >>> torch.equal(torch.rand(3, generator=a), torch.rand(3, generator=b))
    True
    """
    return torch.Generator(device=device).manual_seed(derive(seed, *path))


class Blocks(Generic[T]):
    """What a stream gives at each position, drawn for up to 64 positions at once and kept until others are asked for.

    A generator costs as much as a small network's answer; what is drawn is a function of (seed, path, position) still.

    Args:
        draw: (generator, count) -> what is drawn for that many positions, in turn.
        each: numbers that a position takes; where these are many, fewer positions are drawn at once.
        seed: the run's.
        path: the stream's.

    >>> numbers = Blocks(lambda random, count: torch.rand(count, generator=random), 1, 1, "noise")
    >>> [bool(numbers.at(position) == numbers.at(70)) for position in (70, 6, 71)]
    [True, False, False]
    >>> bool(torch.cat(numbers.several(60, 11))[10] == numbers.at(70))
    True
    """

    def __init__(
        self, draw: Callable[[torch.Generator, int], Sequence[T]], each: int, seed: int, *path: int | str
    ) -> None:
        self._draw, self._seed, self._path = draw, seed, path
        self._length = max(1, min(BLOCK, NUMBERS // max(1, each)))
        self._block = -1
        self._drawn: Sequence[T] = ()

    def at(self, position: int) -> T:
        block, place = divmod(position, self._length)
        if block != self._block:
            self._block, self._drawn = -1, ()  # two blocks may be more than there is memory for
            self._drawn = self._draw(generator(self._seed, *self._path, block), self._length)
            self._block = block
        return self._drawn[place]

    def several(self, position: int, count: int) -> list[Sequence[T]]:
        """What so many positions give from this one on, in parts, a part of a block each."""
        parts, end = [], position + count
        while position < end:
            self.at(position)
            place = position % self._length
            parts.append(self._drawn[place : place + end - position])
            position += len(parts[-1])
        return parts
