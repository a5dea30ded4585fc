"""Total reward at γ = 1: when it is well defined, and how far a value is from optimal.

Without a discount the Bellman operator is no contraction, and its fixed point need not be unique: where an agent can
wander forever for free (the top row of FrozenLake), *any* large enough constant solves the optimality equation. The
cure is standard (de Alfaro 1997; Bertsekas & Tsitsiklis 1991; Haddad & Monmege 2018 for the bound):

1. Maximal **end components** of zero-reward actions are merged into one state that may also stop there, for 0.
2. In what remains, an end component in which some policy earns ≥ 0 a step for ever makes the total infinite or
   undefined: refused. Where every policy that stays loses, improper policies are worth −∞ and harmless.
3. A state from which no policy ends with probability one is worth −∞: refused.

Then the fixed point is unique, a proper policy is optimal, and ‖V − V*‖∞ ≤ ‖TV − V‖∞ · h, where h is the largest
expected number of steps to the end over the policies that are greedy up to a threshold (`error_bound`); 1/(1−γ) in its
place for γ < 1.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import scipy.sparse as sp
from jaxtyping import Bool, Float, Int
from scipy.sparse.csgraph import connected_components

from upslope.exact.mdp import MDP
from upslope.exact.pairs import (
    Pairs,
    backup,
    best,
    greedy_rows,
    keep_rows,
    pairs_of,
    rounding,
    row_states,
    solve_rows,
)


class TotalReward(NamedTuple):
    """An undiscounted problem with its free end components merged.

    `pairs` [rows, n] is the merged problem; `merged` [S] the merged state of each state (−1: terminal); `origin` [rows]
    the original row s·A + a of each row (−1: stop here); `inside` [S·A] the rows that stay in a free end component;
    `proper` [n] rows of one policy that ends with probability one.
    """

    pairs: Pairs
    merged: Int[np.ndarray, " S"]
    origin: Int[np.ndarray, " rows"]
    inside: Bool[np.ndarray, " SA"]
    proper: Int[np.ndarray, " n"]


def end_components(pairs: Pairs, allowed: Bool[np.ndarray, " rows"]) -> tuple[np.ndarray, np.ndarray]:
    """Maximal end components of the allowed rows: (label of each state or −1, rows that stay inside).

    An end component is a set of states and actions that can be kept to for ever and in which every state reaches every
    other. Rows that lose mass (end) are in none.
    """
    owner = row_states(pairs)
    counts = np.diff(pairs.matrix.indptr)
    entry_row = np.repeat(np.arange(len(counts)), counts)
    source, target = owner[entry_row], pairs.matrix.indices
    full = np.asarray(pairs.matrix.sum(axis=1)).reshape(-1) > 1.0 - 1e-9
    inside = allowed & full
    n = len(pairs.start) - 1
    while True:
        used = inside[entry_row]
        graph = sp.csr_array((np.ones(int(used.sum()), bool), (source[used], target[used])), shape=(n, n))
        _, label = connected_components(graph, directed=True, connection="strong")
        leaving = used & (label[source] != label[target])
        if not leaving.any():
            break
        inside[entry_row[leaving]] = False
    has_row = np.zeros(n, bool)
    has_row[owner[inside]] = True
    return np.where(has_row, label, -1), inside


def total_reward(mdp: MDP) -> TotalReward:
    """Merges free end components and checks that the undiscounted optimum is finite.

    Raises:
        ValueError: some policy earns for ever (V* = +∞ or undefined), or some state has no policy that ends (V* = −∞).
    """
    everything = pairs_of(mdp)
    owner, alive = row_states(everything), ~mdp.terminal
    free = (everything.reward == 0.0) & alive[owner]
    label, inside = end_components(everything, free)
    _, component = np.unique(label, return_inverse=True)
    group = np.where(label >= 0, component + mdp.num_states, np.arange(mdp.num_states))
    names, merged_alive = np.unique(group[alive], return_inverse=True)
    merged = np.full(mdp.num_states, -1)
    merged[alive] = merged_alive
    components = np.flatnonzero(names >= mdp.num_states)  # merged states that are end components: they may stop
    rows = np.flatnonzero(alive[owner] & ~inside)
    owners = np.concatenate([merged[owner[rows]], components])
    origin = np.concatenate([rows, np.full(len(components), -1)])
    order = np.argsort(owners, kind="stable")
    fold = sp.csr_array(
        (np.ones(int(alive.sum())), (np.flatnonzero(alive), merged[alive])), (mdp.num_states, len(names))
    )
    matrix = sp.vstack([everything.matrix[rows] @ fold, sp.csr_array((len(components), len(names)))], format="csr")
    reward = np.concatenate([everything.reward[rows], np.zeros(len(components))])
    start = np.searchsorted(owners[order], np.arange(len(names) + 1))
    pairs = Pairs(sp.csr_array(matrix)[order], reward[order], start, 1.0, 0)
    first = np.full(len(names), -1)
    first[merged_alive[::-1]] = np.flatnonzero(alive)[::-1]  # a state to name in messages
    _refuse_endless(mdp, pairs, first)
    return TotalReward(pairs, merged, origin[order], inside, _proper_policy(mdp, pairs, first))


def error_bound(pairs: Pairs, values: Float[np.ndarray, " n"], q: Float[np.ndarray, " rows"], tol: float) -> float:
    """A proven bound on ‖V − V*‖∞ from the Bellman residual d = TV − V, rounding included; ∞ when none is found.

    γ < 1: ‖d‖∞ / (1 − γ). γ = 1: let U be the actions with TV(s) − Q(s,a) < θ and h(s) the largest expected number of
    steps to the end under policies inside U. If c = ‖d‖∞ satisfies c (1 + max h) ≤ θ then W = V + c h has TW ≤ W, hence
    V* ≤ W; and the greedy policy is worth at least V − c h. So ‖V − V*‖∞ ≤ c · max h.
    """
    if len(values) == 0:
        return 0.0
    top = best(pairs, q)
    residual = float(np.abs(top - values).max()) + rounding(pairs, values)
    if pairs.gamma < 1.0:
        return residual / (1.0 - pairs.gamma)
    gap = np.repeat(top, np.diff(pairs.start)) - q
    smallest = 4.0 * residual
    threshold = max(tol, 1e4 * residual)
    while threshold >= smallest:
        tied = keep_rows(pairs, gap < threshold)
        if (end_components(tied, np.ones(len(tied.reward), bool))[0] < 0).all():
            steps = longest(tied)
            return residual * steps if residual * (1.0 + steps) <= threshold else np.inf
        threshold /= 10.0
    return np.inf


def longest(pairs: Pairs) -> float:
    """Largest expected number of steps to the end, over states and policies (every policy must end)."""
    rows = pairs.start[:-1]
    ones = pairs._replace(reward=np.ones(len(pairs.reward)), gamma=1.0)
    while True:
        steps = solve_rows(ones, rows)
        q = backup(ones, steps)
        better = best(ones, q) > q[rows] * (1.0 + 1e-9)
        if not better.any():
            return float(steps.max()) * (1.0 + 1e-6)  # the solve's own rounding, generously
        rows = np.where(better, greedy_rows(ones, q), rows)


def lift(
    problem: TotalReward, mdp: MDP, values: Float[np.ndarray, " n"], rows: Int[np.ndarray, " n"]
) -> tuple[Float[np.ndarray, " S"], Int[np.ndarray, " S"]]:
    """(V, π) of the original states from those of the merged ones: inside an end component, walk to its best exit."""
    alive = problem.merged >= 0
    full = np.zeros(mdp.num_states)
    full[alive] = values[problem.merged[alive]]
    policy = np.full(mdp.num_states, -1)
    policy[~alive] = 0
    chosen = problem.origin[rows]
    policy[chosen[chosen >= 0] // mdp.num_actions] = chosen[chosen >= 0] % mdp.num_actions
    stays = np.flatnonzero(problem.inside)
    stopping = np.zeros(mdp.num_states, bool)
    stopping[alive] = (chosen < 0)[problem.merged[alive]]
    for row in stays[::-1]:  # where stopping is best, any action that stays inside is as good
        if stopping[row // mdp.num_actions]:
            policy[row // mdp.num_actions] = row % mdp.num_actions
    inner, owner = mdp.matrix[stays], stays // mdp.num_actions
    while (policy < 0).any():
        reaches = (inner @ (policy >= 0).astype(np.float64) > 0.0) & (policy[owner] < 0)
        policy[owner[reaches]] = stays[reaches] % mdp.num_actions
    return full, policy


def _refuse_endless(mdp: MDP, pairs: Pairs, first: Int[np.ndarray, " n"]) -> None:
    label, inside = end_components(pairs, np.ones(len(pairs.reward), bool))
    owner = row_states(pairs)
    for component in np.unique(label[label >= 0]):
        rows = np.flatnonzero(inside & (label[owner] == component))
        rewards = pairs.reward[rows]
        if (rewards <= 0.0).all():
            continue  # free components are merged already, so every policy that stays here loses
        lower, upper = _gain_bounds(pairs, rows) if rewards.min() < 0.0 else (float(rewards.max()), np.inf)
        if upper < 0.0:
            continue
        name = mdp.state_name(int(first[owner[rows[0]]]))
        what = "infinite" if lower > 0.0 else "not defined (rewards of both signs cancel for ever)"
        raise ValueError(
            f"gamma: 1 is refused: from state {name} a policy can go on for ever without losing, so the total reward "
            f"is {what}; use gamma < 1 or a horizon"
        )


def _gain_bounds(pairs: Pairs, rows: Int[np.ndarray, " k"], tol: float = 1e-10) -> tuple[float, float]:
    """Bounds on the best average reward inside a communicating set: min and max of TV − V, V lazily iterated."""
    owners, local = np.unique(row_states(pairs)[rows], return_inverse=True)
    start = np.searchsorted(local, np.arange(len(owners) + 1))
    inner = Pairs(pairs.matrix[rows][:, owners], pairs.reward[rows], start, 1.0, 0)
    values = np.zeros(len(owners))
    while True:
        rise = best(inner, backup(inner, values)) - values
        lower, upper = float(rise.min()), float(rise.max())
        if upper < -tol or lower > tol or upper - lower < tol:
            return (lower, upper) if abs(lower + upper) > tol else (0.0, 0.0)
        values += 0.5 * rise
        values -= values[0]


def _proper_policy(mdp: MDP, pairs: Pairs, first: Int[np.ndarray, " n"]) -> Int[np.ndarray, " n"]:
    """Rows of a policy that ends with probability one from every state."""
    owner, n = row_states(pairs), len(pairs.start) - 1
    ends = np.asarray(pairs.matrix.sum(axis=1)).reshape(-1) < 1.0 - 1e-9
    safe = np.ones(n, bool)
    while True:
        rows = np.full(n, -1)
        allowed = pairs.matrix @ (~safe).astype(np.float64) == 0.0
        while True:
            reached = (rows >= 0).astype(np.float64)
            forward = allowed & (rows[owner] < 0) & (ends | (pairs.matrix @ reached > 0.0))
            if not forward.any():
                break
            rows[owner[forward][::-1]] = np.flatnonzero(forward)[::-1]  # the first such action of each state
        if (rows[safe] >= 0).all():
            break
        safe = rows >= 0
    if not safe.all():
        name = mdp.state_name(int(first[np.flatnonzero(~safe)[0]]))
        raise ValueError(
            f"gamma: 1 is refused: from state {name} no policy ends with probability one and going on costs for ever, "
            "so V* = −∞ there; use gamma < 1 or a horizon"
        )
    return rows
