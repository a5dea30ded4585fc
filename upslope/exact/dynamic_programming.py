"""Value iteration, policy iteration and what lies between, each with a proven error.

Sources: S3 §4.1 (alg 1 value iteration, alg 2 policy iteration, eqs 4–10; its loop starts at h = 1, V_0 = 0), Puterman
1994 (§6.5 modified policy iteration, §6.6 span stopping), MacQueen 1967 (action elimination).

Every infinite-horizon solver returns V with ‖V − V*‖∞ ≤ tol, and `error_bound` is the bound that was proven for the
returned V from its Bellman residual ‖TV − V‖∞, the rounding of float64 included. At γ = 1 see
`upslope.exact.undiscounted`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Float, Int

from upslope.exact.mdp import MDP
from upslope.exact.pairs import Pairs, backup, best, greedy_rows, keep_rows, pairs_of, rounding, solve_rows
from upslope.exact.undiscounted import TotalReward, error_bound, lift, total_reward

Watch = Callable[[int, float], None]  # called with (iterations so far, current bound on the error)
Stop = Literal["sup", "span"]
MAX_SWEEPS = 10_000_000


class Solution(NamedTuple):
    """What a solver found.

    values V [S] (finite horizon: [H+1, S], V_h with h steps to go), policy π [S] (finite horizon: [H+1, S], row 0 is
    −1: no action is left; soft solvers: probabilities [S, A]), q_values [S, A] (finite horizon [H+1, S, A]),
    iterations, residual ‖TV − V‖∞ of the returned V, error_bound ≥ ‖V − V*‖∞, residuals of every iteration on the way.
    """

    values: Float[np.ndarray, "*horizon S"]
    policy: Int[np.ndarray, "*horizon S"] | Float[np.ndarray, "S A"]
    q_values: Float[np.ndarray, "*horizon S A"]
    iterations: int
    residual: float
    error_bound: float
    residuals: Float[np.ndarray, " iterations"]


def value_iteration(
    mdp: MDP,
    tol: float = 1e-8,
    stop: Stop = "sup",
    horizon: int | None = None,
    eliminate: bool = True,
    watch: Watch | None = None,
) -> Solution:
    """V_{k+1}(s) = max_a Σ_s' P(s'|s,a) (r(s,a,s') + γ V_k(s')) (S3 eqs 4, 5; alg 1).

    With a horizon H (given here or by the problem): V_0 = 0, then h = 1…H backwards, exactly; `values[h]` and
    `policy[h]` belong to h steps to go, so at time t of an episode of H steps act by `policy[H − t]`.

    Without one: iterates until the error is proven to be ≤ tol.

    Args:
        tol: bound on ‖V − V*‖∞, in units of reward.
        stop: "sup" stops by ‖V_{k+1} − V_k‖∞ γ/(1−γ) ≤ tol; "span" by (max d − min d) γ/(1−γ) ≤ 2 tol with
            d = V_{k+1} − V_k, then adds the midrange γ/(1−γ) (max d + min d)/2 to every state: never slower, and
            usually much faster. At γ = 1 both stop by the residual times the expected number of steps.
        eliminate: drop actions as soon as MacQueen's bounds prove them worse than another (γ < 1).

    Raises:
        ValueError: tol not positive or beyond what float64 can guarantee; γ = 1 and total reward not well defined.

    >>> mdp = MDP([[[1.0, 0.0], [0.0, 1.0]], [[0.0, 1.0], [0.0, 1.0]]], [[1.0, 0.0], [2.0, 2.0]], gamma=0.5)
    >>> solution = value_iteration(mdp, tol=1e-6)
    >>> solution.values.round(5).tolist(), solution.policy.tolist(), solution.error_bound <= 1e-6
    ([2.0, 4.0], [0, 0], True)
    >>> value_iteration(mdp, horizon=2).values.tolist()
    [[0.0, 0.0], [1.0, 2.0], [1.5, 3.0]]
    """
    _one_of("stop", stop, ("sup", "span"))
    horizon = mdp.horizon if horizon is None else horizon
    if horizon is not None:
        return _finite_horizon(mdp, horizon, watch)
    problem, merged = _prepare(mdp, tol)
    if mdp.gamma == 1.0:
        values, residuals = _total_reward_sweeps(problem, np.zeros(len(problem.start) - 1), tol, 0, watch)
    else:
        values, residuals = _value_sweeps(problem, tol, stop, eliminate, watch)
    return _finish(mdp, problem, merged, values, None, residuals, tol)


def modified_policy_iteration(
    mdp: MDP, tol: float = 1e-8, stop: Stop = "span", sweeps: int = 200, watch: Watch | None = None
) -> Solution:
    """Policy iteration whose evaluation is a few sweeps V ← r_π + γ P_π V instead of a linear solve (Puterman §6.5).

    Args:
        tol, stop: as `value_iteration`; the span rule is the default because it is never slower.
        sweeps: at most this many evaluation sweeps per improvement. Fewer are done when the policy is evaluated well
            enough (the span of the change has fallen a hundredfold).

    Raises:
        ValueError: as `value_iteration`, or the problem has a horizon (its optimal policy depends on time).

    >>> mdp = MDP([[[1.0, 0.0], [0.0, 1.0]], [[0.0, 1.0], [0.0, 1.0]]], [[1.0, 0.0], [2.0, 2.0]], gamma=0.5)
    >>> modified_policy_iteration(mdp, tol=1e-6).values.round(5).tolist()
    [2.0, 4.0]
    """
    _no_horizon(mdp, "modified_policy_iteration")
    _one_of("stop", stop, ("sup", "span"))
    if sweeps < 0:
        raise ValueError(f"sweeps: 0 or more, got {sweeps}")
    problem, merged = _prepare(mdp, tol)
    if isinstance(merged, TotalReward):
        start = solve_rows(problem, merged.proper)
        values, residuals = _total_reward_sweeps(problem, start, tol, sweeps, watch)
    else:
        values, residuals = _modified_sweeps(problem, tol, stop, sweeps, watch)
    return _finish(mdp, problem, merged, values, None, residuals, tol)


def policy_iteration(
    mdp: MDP, tol: float = 1e-8, evaluation: Literal["exact", "iterative"] = "exact", watch: Watch | None = None
) -> Solution:
    """Evaluate (S3 eq 10), improve greedily, until no action improves (S3 alg 2).

    Args:
        tol: bound on ‖V − V*‖∞. With exact evaluation the error is rounding alone, whatever tol.
        evaluation: "exact" solves (I − γP_π) V = r_π (dense, or sparse LU: cheap when P is sparse and structured,
            memory- hungry for large random ones); "iterative" sweeps until the evaluation is accurate to tol/4, and
            further if the proven bound asks for it.

    Raises:
        ValueError: as `modified_policy_iteration`.

    >>> mdp = MDP([[[1.0, 0.0], [0.0, 1.0]], [[0.0, 1.0], [0.0, 1.0]]], [[1.0, 0.0], [2.0, 2.0]], gamma=0.5)
    >>> solution = policy_iteration(mdp)
    >>> solution.values.tolist(), solution.iterations
    ([2.0, 4.0], 1)
    """
    _no_horizon(mdp, "policy_iteration")
    _one_of("evaluation", evaluation, ("exact", "iterative"))
    problem, merged = _prepare(mdp, tol)
    rows = merged.proper if isinstance(merged, TotalReward) else greedy_rows(problem, problem.reward)
    values, accuracy = np.zeros(len(problem.start) - 1), tol / 4.0
    residuals: list[float] = []
    while len(values):
        exact = evaluation == "exact"
        values = solve_rows(problem, rows) if exact else _sweep_policy(problem, rows, values, accuracy)
        q = backup(problem, values)
        top = best(problem, q)
        residuals.append(float(np.abs(top - values).max()))
        # what rounding and an inexact evaluation may pretend must not make equally good actions alternate for ever
        slack = 4.0 * rounding(problem, values) + (0.0 if exact else 2.0 * accuracy)
        better = top > q[rows] + slack
        if watch is not None:
            watch(len(residuals), residuals[-1])
        if better.any():
            rows = np.where(better, greedy_rows(problem, q), rows)
            continue
        bound = 0.0 if exact else error_bound(problem, values, q, tol)
        if bound <= tol or accuracy <= rounding(problem, values):
            break
        accuracy *= 0.1 if np.isinf(bound) else 0.5 * tol / bound
    return _finish(mdp, problem, merged, values, rows, residuals, tol)


# ---- loops -----------------------------------------------------------------------------------------------------------


def _finite_horizon(mdp: MDP, horizon: int, watch: Watch | None) -> Solution:
    if horizon != int(horizon) or horizon < 1:
        raise ValueError(f"horizon: a positive number of actions, got {horizon}")
    problem, size = pairs_of(mdp), (mdp.num_states, mdp.num_actions)
    values, q = np.zeros((horizon + 1, size[0])), np.zeros((horizon + 1, *size))
    policy = np.full((horizon + 1, size[0]), -1)
    for h in range(1, horizon + 1):
        q[h] = backup(problem, values[h - 1]).reshape(size)
        policy[h], values[h] = q[h].argmax(axis=1), q[h].max(axis=1)
        if watch is not None:
            watch(h, 0.0)
    change = np.abs(np.diff(values, axis=0)).max(axis=1)
    return Solution(values, policy, q, horizon, 0.0, horizon * rounding(problem, values), change)


def _value_sweeps(
    pairs: Pairs, tol: float, stop: Stop, eliminate: bool, watch: Watch | None
) -> tuple[np.ndarray, list[float]]:
    """Bellman sweeps for γ < 1; returns V and ‖V_{k+1} − V_k‖∞ of every sweep."""
    factor = pairs.gamma / (1.0 - pairs.gamma)
    values, residuals, span = best(pairs, pairs.reward).copy(), list[float](), np.inf
    while True:
        q = backup(pairs, values)
        new = best(pairs, q)
        lower, upper = _range(new, values)
        residuals.append(max(abs(lower), abs(upper)))
        bound = factor * _error(lower, upper, stop)
        if watch is not None:
            watch(len(residuals), bound)
        if _proven(pairs, new, bound, tol):
            return new if stop == "sup" else new + factor * (lower + upper) / 2.0, residuals
        if eliminate and upper - lower < span:
            pairs, span = _eliminate(pairs, q, new, factor * (upper - lower)), (upper - lower) / 4.0
        values = new
        _give_up(residuals, pairs, values, tol)


def _modified_sweeps(
    pairs: Pairs, tol: float, stop: Stop, sweeps: int, watch: Watch | None
) -> tuple[np.ndarray, list[float]]:
    factor = pairs.gamma / (1.0 - pairs.gamma)
    values, residuals = best(pairs, pairs.reward).copy(), list[float]()
    while True:
        q = backup(pairs, values)
        rows = greedy_rows(pairs, q)
        new = q[rows]
        lower, upper = _range(new, values)
        residuals.append(max(abs(lower), abs(upper)))
        bound = factor * _error(lower, upper, stop)
        if watch is not None:
            watch(len(residuals), bound)
        if _proven(pairs, new, bound, tol):
            return new if stop == "sup" else new + factor * (lower + upper) / 2.0, residuals
        matrix, reward = pairs.matrix[rows], pairs.reward[rows]
        pairs = _eliminate(pairs, q, new, factor * (upper - lower))
        enough = max(0.01 * bound, 0.5 * tol)  # while the policy still changes, evaluating it further is wasted
        values = new
        for _ in range(sweeps):
            new = matrix @ values
            new *= pairs.gamma
            new += reward
            lower, upper = _range(new, values)
            values = new
            if factor * _error(lower, upper, stop) <= enough:
                break
        _give_up(residuals, pairs, values, tol)


def _eliminate(pairs: Pairs, q: np.ndarray, new: np.ndarray, reach: float) -> Pairs:
    """Drops actions that cannot be optimal: V* lies in TV + γ/(1−γ)·[min d, max d], a range of width `reach`, so what
    is further than that below the best is never best (MacQueen 1967). Only when that shortens a sweep noticeably."""
    if pairs.width == 1 or reach > float(new.max() - q.min()):
        return pairs
    kept = q >= np.repeat(new - (reach * (1.0 + 1e-9) + 4.0 * rounding(pairs, new)), np.diff(pairs.start))
    count = int(np.count_nonzero(kept))
    return keep_rows(pairs, kept) if count < 0.95 * len(kept) or count == len(new) else pairs


def _total_reward_sweeps(
    pairs: Pairs, values: np.ndarray, tol: float, sweeps: int, watch: Watch | None
) -> tuple[np.ndarray, list[float]]:
    """(Modified) Bellman sweeps at γ = 1 until the error bound holds."""
    residuals: list[float] = []
    target = tol
    while len(values):
        q = backup(pairs, values)
        rows = greedy_rows(pairs, q)
        new = q[rows]
        residuals.append(float(np.abs(new - values).max()))
        bound = np.inf
        if residuals[-1] <= target:
            bound = error_bound(pairs, values, q, tol)
            if bound <= tol:
                break
            target = residuals[-1] * (0.5 * tol / bound if np.isfinite(bound) else 0.1)
        if watch is not None:
            watch(len(residuals), bound)
        _give_up(residuals, pairs, values, tol)
        values = new
        if sweeps:
            matrix, reward = pairs.matrix[rows], pairs.reward[rows]
            for _ in range(sweeps):
                values = matrix @ values + reward
    return values, residuals


def _sweep_policy(pairs: Pairs, rows: np.ndarray, values: np.ndarray, tol: float) -> np.ndarray:
    """V^π by sweeps, to an error of tol (γ < 1: by the residual; γ = 1: by the residual times the expected steps)."""
    matrix, reward = pairs.matrix[rows], pairs.reward[rows]
    if pairs.gamma < 1.0:
        steps = pairs.gamma / (1.0 - pairs.gamma)
    else:
        steps = float(np.abs(solve_rows(pairs._replace(reward=np.ones(len(pairs.reward))), rows)).max())
    for _ in range(MAX_SWEEPS):
        new = pairs.gamma * (matrix @ values) + reward
        change = float(np.abs(new - values).max())
        values = new
        if change * steps <= max(tol, 4.0 * rounding(pairs, values) * steps):
            break
    return values


# ---- before and after ------------------------------------------------------------------------------------------------


def _one_of(name: str, given: str, allowed: tuple[str, ...]) -> None:
    if given not in allowed:
        raise ValueError(f"{name}: one of {', '.join(allowed)}, got {given!r}")


def _prepare(mdp: MDP, tol: float) -> tuple[Pairs, TotalReward | None]:
    if not tol > 0.0:
        raise ValueError(f"tol: a positive bound on the error, got {tol}")
    if mdp.gamma < 1.0:
        return pairs_of(mdp), None
    problem = total_reward(mdp)
    return problem.pairs, problem


def _finish(
    mdp: MDP,
    pairs: Pairs,
    merged: TotalReward | None,
    values: np.ndarray,
    rows: np.ndarray | None,
    residuals: list[float],
    tol: float,
) -> Solution:
    """One more backup of the returned V: its Q, its greedy policy, its residual and the bound that follows."""
    q = backup(pairs, values)
    bound = error_bound(pairs, values, q, tol)
    if bound > tol:
        raise ValueError(
            f"tol: {tol:g} cannot be guaranteed in float64 for this problem; the proven bound is {bound:.3g}"
        )
    rows = greedy_rows(pairs, q) if rows is None else rows
    if merged is None:
        policy, q_values = rows - pairs.start[:-1], q.reshape(mdp.num_states, mdp.num_actions)
        residual = float(np.abs(best(pairs, q) - values).max())
    else:
        values, policy = lift(merged, mdp, values, rows)
        q_values = backup(pairs_of(mdp), values).reshape(mdp.num_states, mdp.num_actions)
        residual = float(np.abs(q_values.max(axis=1) - values).max())
    return Solution(values, policy, q_values, len(residuals), residual, bound, np.array(residuals))


def _range(new: Float[np.ndarray, " n"], values: Float[np.ndarray, " n"]) -> tuple[float, float]:
    """(min, max) of new − values; `values` is overwritten."""
    np.subtract(new, values, out=values)
    return float(values.min()), float(values.max())


def _error(lower: float, upper: float, stop: Stop) -> float:
    return max(abs(lower), abs(upper)) if stop == "sup" else (upper - lower) / 2.0


def _proven(pairs: Pairs, values: np.ndarray, bound: float, tol: float) -> bool:
    """Whether the bound is below tol by more than what rounding may add to it."""
    return bound <= tol and bound * (1.0 + 1e-9) + 2.0 * rounding(pairs, values) / (1.0 - pairs.gamma) <= tol


def _give_up(residuals: list[float], pairs: Pairs, values: np.ndarray, tol: float) -> None:
    if len(residuals) % 64 == 0 and (residuals[-1] <= rounding(pairs, values) / 8.0 or len(residuals) >= MAX_SWEEPS):
        raise ValueError(
            f"tol: {tol:g} was not reached after {len(residuals)} sweeps (residual {residuals[-1]:.3g}); "
            "float64 cannot guarantee it here"
        )


def _no_horizon(mdp: MDP, name: str) -> None:
    if mdp.horizon is not None:
        raise ValueError(
            f"horizon: {name} looks for one policy for all time, but with horizon={mdp.horizon} the best one depends "
            "on the time left; use value_iteration, or mdp.replace(horizon=None)"
        )
