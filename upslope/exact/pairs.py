"""State-action pairs: the form in which every solver of this wing works.

One row per admissible (state, action), rows of a state next to each other. Removing a row removes an action, so a
problem whose states have different numbers of actions (after action elimination, or after merging states) is still one
CSR matrix. A row may sum to less than one: the missing mass has ended.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import scipy.sparse as sp
from jaxtyping import Bool, Float, Int

from upslope.exact.mdp import MDP


class Pairs(NamedTuple):
    """Admissible (state, action) rows: `matrix` P [rows, n], `reward` [rows], `start` [n + 1], discount γ.

    Rows start[s]…start[s+1]−1 belong to state s; every state has at least one. `width` is the common number of rows of
    a state, 0 when they differ.
    """

    matrix: sp.csr_array
    reward: Float[np.ndarray, " rows"]
    start: Int[np.ndarray, " n_plus_1"]
    gamma: float
    width: int


def pairs_of(mdp: MDP) -> Pairs:
    """All S·A pairs of an MDP, without copying its transitions."""
    rows, width = mdp.num_states * mdp.num_actions, mdp.num_actions
    return Pairs(mdp.matrix, mdp.expected_reward.reshape(-1), np.arange(0, rows + 1, width), mdp.gamma, width)


def keep_rows(pairs: Pairs, kept: Bool[np.ndarray, " rows"]) -> Pairs:
    """The problem that has only the kept rows (at least one per state)."""
    counts = np.add.reduceat(kept.astype(np.int64), pairs.start[:-1])
    start = np.concatenate([[0], np.cumsum(counts)])
    width = int(counts[0]) if (counts == counts[0]).all() else 0
    rows = np.flatnonzero(kept)
    return Pairs(pairs.matrix[rows], pairs.reward[rows], start, pairs.gamma, width)


def row_states(pairs: Pairs) -> Int[np.ndarray, " rows"]:
    """The state that each row belongs to."""
    return np.repeat(np.arange(len(pairs.start) - 1), np.diff(pairs.start))


def backup(pairs: Pairs, values: Float[np.ndarray, " n"]) -> Float[np.ndarray, " rows"]:
    """Q(s,a) = r(s,a) + γ Σ_s' P(s'|s,a) V(s'), one number per row (S3 eqs 8, 9)."""
    q = pairs.matrix @ values
    q *= pairs.gamma
    q += pairs.reward
    return q


def best(pairs: Pairs, q: Float[np.ndarray, " rows"]) -> Float[np.ndarray, " n"]:
    """max_a Q(s,a)."""
    if pairs.width == 1:
        return q
    if 1 < pairs.width <= 16:  # a strided pass per action beats a reduction over a short last axis 10×
        table = q.reshape(-1, pairs.width)
        out = np.maximum(table[:, 0], table[:, 1])
        for action in range(2, pairs.width):
            np.maximum(out, table[:, action], out=out)
        return out
    return np.maximum.reduceat(q, pairs.start[:-1])


def greedy_rows(pairs: Pairs, q: Float[np.ndarray, " rows"]) -> Int[np.ndarray, " n"]:
    """Row of the first maximising action of each state."""
    if 1 <= pairs.width <= 16:
        table, top = q.reshape(-1, pairs.width), best(pairs, q)
        rows = pairs.start[:-1].copy()
        missed = np.ones(len(rows), bool)
        for action in range(pairs.width - 1):
            missed &= table[:, action] != top
            rows += missed
        return rows
    top = q == np.repeat(best(pairs, q), np.diff(pairs.start))
    return np.minimum.reduceat(np.where(top, np.arange(len(q)), len(q)), pairs.start[:-1])


def solve_rows(pairs: Pairs, rows: Int[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
    """V^π = (I − γP_π)⁻¹ r_π of the policy that takes these rows (S3 eq 10, solved exactly)."""
    return solve(pairs.matrix[rows], pairs.reward[rows], pairs.gamma)


def solve(matrix: sp.csr_array, reward: Float[np.ndarray, " n"], gamma: float) -> Float[np.ndarray, " n"]:
    """x of (I − γP) x = r: dense LAPACK for small problems, sparse LU for large ones."""
    n = matrix.shape[0]
    if n <= 1500:
        return np.linalg.solve(np.eye(n) - gamma * matrix.toarray(), reward)
    return np.asarray(sp.linalg.spsolve(sp.csc_array(sp.eye_array(n, format="csc") - gamma * matrix.tocsc()), reward))


def rounding(pairs: Pairs, values: Float[np.ndarray, "*stages n"]) -> float:
    """How far a computed backup can be from the exact one in float64: (terms + 3) · ε · (max|r| + max|V|)."""
    terms = int(np.diff(pairs.matrix.indptr).max(initial=0)) + 3
    scale = float(np.abs(values).max(initial=0.0)) + float(np.abs(pairs.reward).max(initial=0.0))
    return terms * float(np.finfo(np.float64).eps) * scale
