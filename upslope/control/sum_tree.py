"""Sampling in proportion to priorities that change: a tree of sums, wide and flat, float64 throughout."""

import ctypes
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Int64

from upslope.control import native

SOURCE = Path(__file__).with_name("sum_tree.cpp")
FLAGS = ("-O3", "-std=c++17", "-ffp-contract=off")  # no fused multiply-add: sums are NumPy's
FAN_OUT = 16  # children of a node
TOP = 512  # nodes that are scanned at once instead of being given parents


class SumTree:
    """Sums of n priorities: `set` touches O(log n) nodes of each, `find` descends O(log n) levels, in batches.

    A parent is always the sum of its children as they are, added from the first to the last, never corrected by
    differences: rounding does not build up, and a priority of 0 is never found. Both are done by compiled C++ where
    there is a compiler, else by NumPy, with the same results to the last bit.
    """

    def __init__(self, size: int, compiled: bool = True) -> None:
        self.levels = []  # leaves first; each [families, FAN_OUT]
        while True:
            self.levels.append(np.zeros((-(-size // FAN_OUT), FAN_OUT)))
            size = len(self.levels[-1])
            if size <= TOP:
                break
        self.top = np.zeros(size)
        self._stale: list[np.ndarray] = []  # of NumPy's sums, which are brought up to date when they are next needed
        self._native = _Native.of(self.levels, self.top) if compiled else None

    @property
    def leaves(self) -> Float[np.ndarray, " n"]:
        """All priorities, with zeros beyond n."""
        return self.levels[0].reshape(-1)

    def set(self, index: Int64[np.ndarray, " k"], priority: Float[np.ndarray, " k"] | float) -> None:
        """Change priorities; where an index comes twice the last one counts."""
        if self._native is not None:
            self._native.set(index, priority)
            return
        self.leaves[index] = priority
        self._stale.append(index)

    def total(self) -> float:
        self._refresh()
        return float(np.add.accumulate(self.top)[-1])

    def find(self, share: Float[np.ndarray, " k"]) -> Int64[np.ndarray, " k"]:
        """The leaves at these shares, in [0, 1), of the total: a uniform share finds leaf i with probability p_i / Σ p.

        Raises:
            ValueError: all priorities are 0.
        """
        node, total = self._find(share) if self._native is None else self._native.find(share)
        if total <= 0:
            raise ValueError("no priority is above 0: there is nothing to sample")
        return node

    def _find(self, share: Float[np.ndarray, " k"]) -> tuple[Int64[np.ndarray, " k"], float]:
        self._refresh()
        sums = torch.cumsum(torch.from_numpy(self.top), 0).numpy()
        if sums[-1] <= 0:
            return np.zeros(0, dtype=np.int64), float(sums[-1])
        rest = share * sums[-1]
        node = sums.searchsorted(_below(rest, sums[-1]), side="right")
        rest = rest - np.where(node > 0, sums.take(node - 1), 0.0)
        places = np.arange(0, len(node) * FAN_OUT, FAN_OUT)
        for level in reversed(self.levels):
            family = torch.cumsum(torch.from_numpy(level.take(node, 0)), 1)
            rest = _below(rest, family.numpy()[:, -1])
            child = torch.searchsorted(family, torch.from_numpy(rest).unsqueeze(1), right=True).numpy()[:, 0]
            before = family.numpy().take(places + child - 1)
            rest = rest - np.where(child > 0, before, 0.0)
            node = node * FAN_OUT + child
        return node, float(sums[-1])

    def _refresh(self) -> None:
        if not self._stale:
            return
        index = self._stale[0] if len(self._stale) == 1 else np.concatenate(self._stale)
        self._stale.clear()
        for level, above in zip(
            self.levels, [*(level.reshape(-1) for level in self.levels[1:]), self.top], strict=True
        ):
            index = index // FAN_OUT
            above[index] = np.add.accumulate(level.take(index, 0), 1)[:, -1]


class _Native:
    """The compiled twin, on the same arrays. What a call takes is copied to where C++ has an address of already."""

    def __init__(self, functions: ctypes.CDLL, levels: Sequence[np.ndarray], top: np.ndarray) -> None:
        self.arrays = [*levels, top]  # kept alive: C++ has their addresses only
        self.tree = _addresses(*self.arrays), len(levels)
        self.sums, self.leaves = np.zeros(len(top)), levels[0].size
        self.functions = functions
        self._make_room(256)

    @classmethod
    def of(cls, levels: Sequence[np.ndarray], top: np.ndarray) -> "_Native | None":
        functions = _functions()
        return None if functions is None else cls(functions, levels, top)

    def _make_room(self, count: int) -> None:
        self.index, self.value, self.rest = np.empty(count, dtype=np.int64), np.empty(count), np.empty(count)
        self.room = _addresses(self.index, self.value, self.rest, self.sums)

    def set(self, index: Int64[np.ndarray, " k"], priority: Float[np.ndarray, " k"] | float) -> None:
        count = len(index)
        if count > len(self.index):
            self._make_room(count)
        self.index[:count], self.value[:count] = index, priority
        if not self.functions.set(*self.tree, self.leaves, self.room, count):
            raise IndexError(f"index is {index}, allowed: 0 to {self.leaves - 1}")

    def find(self, share: Float[np.ndarray, " k"]) -> tuple[Int64[np.ndarray, " k"], float]:
        count = len(share)
        if count > len(self.index):
            self._make_room(count)
        self.value[:count] = share
        total = self.functions.find(*self.tree, len(self.sums), self.room, count)
        return self.index[:count].copy(), total


def _functions() -> ctypes.CDLL | None:
    """C++'s, the same sums as NumPy's; None without a compiler."""
    functions = native.library(SOURCE, FLAGS)
    if functions is not None:
        long, pointer = ctypes.c_int64, ctypes.c_void_p
        functions.set.argtypes = (pointer, long, long, pointer, long)
        functions.find.argtypes = (pointer, long, long, pointer, long)
        functions.set.restype, functions.find.restype = ctypes.c_bool, ctypes.c_double
    return functions


def _addresses(*arrays: np.ndarray) -> ctypes.Array[ctypes.c_void_p]:
    return (ctypes.c_void_p * len(arrays))(*(array.ctypes.data for array in arrays))


def _below(rest: Float[np.ndarray, " k"], total: Float[np.ndarray, " k"]) -> Float[np.ndarray, " k"]:
    """Sums of the same numbers in another order differ in their last bits: a share stays inside its family."""
    return np.minimum(rest, total * (1 - 2**-52))
