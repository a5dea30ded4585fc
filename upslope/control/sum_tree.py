"""Sampling in proportion to priorities that change: a tree of sums, wide and flat, float64 throughout."""

import numpy as np
import torch
from jaxtyping import Float, Int64

FAN_OUT = 16  # children of a node
TOP = 4096  # nodes that are scanned at once instead of being given parents


class SumTree:
    """Sums of n priorities: `set` touches O(log n) nodes of each, `find` descends O(log n) levels, in batches.

    A parent is always the sum of its children as they are, never corrected by differences: rounding does not build up,
    and a priority of 0 is never found. The parents are brought up to date when they are next needed.
    """

    def __init__(self, size: int) -> None:
        self.levels = []  # leaves first; each [families, FAN_OUT]
        while True:
            self.levels.append(np.zeros((-(-size // FAN_OUT), FAN_OUT)))
            size = len(self.levels[-1])
            if size <= TOP:
                break
        self.top = np.zeros(size)
        self._stale: list[np.ndarray] = []

    @property
    def leaves(self) -> Float[np.ndarray, " n"]:
        """All priorities, with zeros beyond n."""
        return self.levels[0].reshape(-1)

    def set(self, index: Int64[np.ndarray, " k"], priority: Float[np.ndarray, " k"] | float) -> None:
        """Change priorities; where an index comes twice the last one counts."""
        self.leaves[index] = priority
        self._stale.append(index)

    def total(self) -> float:
        self._refresh()
        return float(self.top.sum())

    def find(self, share: Float[np.ndarray, " k"]) -> Int64[np.ndarray, " k"]:
        """The leaves at these shares, in [0, 1), of the total: a uniform share finds leaf i with probability p_i / Σ p.

        Raises:
            ValueError: all priorities are 0.
        """
        self._refresh()
        sums = torch.cumsum(torch.from_numpy(self.top), 0).numpy()
        if sums[-1] <= 0:
            raise ValueError("no priority is above 0: there is nothing to sample")
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
        return node

    def _refresh(self) -> None:
        if not self._stale:
            return
        index = self._stale[0] if len(self._stale) == 1 else np.concatenate(self._stale)
        self._stale.clear()
        for level, above in zip(
            self.levels, [*(level.reshape(-1) for level in self.levels[1:]), self.top], strict=True
        ):
            index = index // FAN_OUT
            above[index] = level.take(index, 0).sum(1)


def _below(rest: Float[np.ndarray, " k"], total: Float[np.ndarray, " k"]) -> Float[np.ndarray, " k"]:
    """Sums of the same numbers in another order differ in their last bits: a share stays inside its family."""
    return np.minimum(rest, total * (1 - 2**-52))
