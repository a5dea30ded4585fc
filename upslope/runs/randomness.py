"""Randomness without hidden state: every random number is a function of (run seed, stream, position).

A generator is derived where it is needed and thrown away: a checkpoint has none to save, a resumed run draws the same
numbers, and every rank of a distributed run has streams of its own.
"""

import hashlib

import torch


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
