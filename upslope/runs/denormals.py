"""Denormal numbers, those too small to have all their digits, count as zero while a run trains."""

import contextlib
from collections.abc import Iterator

import torch


@contextlib.contextmanager
def flushed() -> Iterator[None]:
    """Arithmetic of this thread takes and gives zero for denormal numbers; afterwards it is as it was before.

    Adam's mean of a gradient that stays zero, as that of a unit of ReLU that is never active, shrinks by β₁ at each
    step. After a thousand it is denormal, and stays so: nine tenths of the smallest number are rounded to itself. An
    Intel processor is slow with such numbers: they were a fifth of a gradient step of DQN.

    >>> with flushed():
    ...     float(torch.tensor(1e-40) * 1)
    0.0
    """
    before = are_flushed()
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(before)


def are_flushed() -> bool:
    """Are they zero in this thread?"""
    return float(torch.tensor(1e-40) * 1) == 0.0
