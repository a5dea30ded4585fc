"""Maximum-entropy dynamic programming: the temperature α pays α·H(π(·|s)) for every action taken.

Sources: S4 A.2 (A.7 backup, A.8 soft value, A.9 improvement, lemmas 1 and 2, theorem 1), Haarnoja et al. 2018, with α
kept where the notes drop it: α multiplies log π in A.8, and A.9 is exp(Q/α)/Z. A terminal state takes no action, so it
earns no entropy: its soft value is 0.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from jaxtyping import Float
from scipy.special import entr, logsumexp, softmax

from upslope.exact.dynamic_programming import Solution, Watch
from upslope.exact.evaluation import Policy, chain, policy_table
from upslope.exact.mdp import MDP
from upslope.exact.pairs import backup, pairs_of, rounding, solve


class SoftEvaluation(NamedTuple):
    """Soft V^π [S] and Q^π [S, A] of a policy."""

    values: Float[np.ndarray, " S"]
    q_values: Float[np.ndarray, "S A"]


def soft_value(q_values: Float[np.ndarray, "*batch A"], alpha: float) -> Float[np.ndarray, "*batch"]:
    """V(s) = α log Σ_a exp(Q(s,a)/α): A.8 at the policy of A.9. Tends to max_a Q(s,a) as α → 0.

    >>> float(soft_value(np.array([1.0, 1.0]), alpha=0.5).round(6))  # 1 + log(2)/2
    1.346574
    """
    return np.asarray(alpha * logsumexp(q_values / alpha, axis=-1))


def soft_improvement(q_values: Float[np.ndarray, "*batch A"], alpha: float) -> Float[np.ndarray, "*batch A"]:
    """π_new(a|s) = exp(Q(s,a)/α) / Z(s), the minimiser of KL(π' ‖ exp(Q/α)/Z) (A.9 with Π all policies).

    >>> soft_improvement(np.array([0.0, np.log(3.0)]), alpha=1.0).round(12).tolist()
    [0.25, 0.75]
    """
    return softmax(q_values / alpha, axis=-1)


def soft_evaluation(mdp: MDP, policy: Policy, alpha: float) -> SoftEvaluation:
    """Q^π = r + γ P V^π (A.7) with V^π(s) = E_{a~π}[Q^π(s,a) − α log π(a|s)] (A.8), solved exactly.

    Raises:
        ValueError: a malformed policy, α ≤ 0, γ = 1 (the entropy bonus need not sum to anything finite).

    >>> mdp = MDP([[[1.0], [1.0]]], [[1.0, 1.0]], gamma=0.5)
    >>> soft_evaluation(mdp, np.array([[0.5, 0.5]]), alpha=1.0).values.round(6).tolist()  # 2 (1 + log 2)
    [3.386294]
    """
    _check(mdp, alpha)
    table = policy_table(mdp, policy)
    matrix, reward = chain(mdp, table)
    bonus = np.where(mdp.terminal, 0.0, alpha * entr(table).sum(axis=1))
    values = np.where(mdp.terminal, 0.0, solve(matrix, reward + bonus, mdp.gamma))
    return SoftEvaluation(values, _backup(mdp, values))


def soft_value_iteration(
    mdp: MDP, tol: float = 1e-8, alpha: float = 1.0, horizon: int | None = None, watch: Watch | None = None
) -> Solution:
    """V ← α log Σ_a exp((r + γPV)/α) until ‖V − V*_α‖∞ ≤ tol is proven: a γ-contraction, so ≤ ‖TV − V‖∞/(1−γ).

    With a horizon H: V_0 = 0 and H exact backups; `values[h]` [H+1, S], `policy[h]` [H+1, S, A] (row 0 is meaningless).

    Args:
        alpha: temperature, in units of reward per nat.

    Raises:
        ValueError: tol or α not positive, γ = 1 without a horizon.

    >>> mdp = MDP([[[1.0], [1.0]]], [[1.0, 1.0]], gamma=0.5)
    >>> solution = soft_value_iteration(mdp, alpha=1.0)
    >>> bool(abs(solution.values[0] - 2.0 * (1.0 + np.log(2.0))) <= 1e-8), solution.policy.tolist()
    (True, [[0.5, 0.5]])
    """
    horizon = mdp.horizon if horizon is None else horizon
    _check(mdp, alpha, horizon, tol)
    if horizon is not None:
        stages = np.zeros((horizon + 1, mdp.num_states))
        q_stages = np.zeros((horizon + 1, mdp.num_states, mdp.num_actions))
        for h in range(1, horizon + 1):
            q_stages[h] = _backup(mdp, stages[h - 1])
            stages[h] = np.where(mdp.terminal, 0.0, soft_value(q_stages[h], alpha))
        change = np.abs(np.diff(stages, axis=0)).max(axis=1)
        error = horizon * _rounding(mdp, stages, alpha)
        return Solution(stages, soft_improvement(q_stages, alpha), q_stages, horizon, 0.0, error, change)
    values, residuals = np.zeros(mdp.num_states), list[float]()
    while True:
        q_values = _backup(mdp, values)
        new = np.where(mdp.terminal, 0.0, soft_value(q_values, alpha))
        residuals.append(float(np.abs(new - values).max()))
        bound = (residuals[-1] + _rounding(mdp, values, alpha)) / (1.0 - mdp.gamma)
        if watch is not None:
            watch(len(residuals), bound)
        if bound <= tol:
            policy = soft_improvement(q_values, alpha)
            return Solution(values, policy, q_values, len(residuals), residuals[-1], bound, np.array(residuals))
        _give_up(residuals, mdp, values, alpha, tol)
        values = new


def soft_policy_iteration(
    mdp: MDP, tol: float = 1e-8, alpha: float = 1.0, policy: Policy | None = None, watch: Watch | None = None
) -> Solution:
    """Soft evaluation (A.7, A.8) and soft improvement (A.9) in turn; Q never falls (lemma 2), to the optimum (theorem
    1).

    Args:
        tol: proven bound on ‖V − V*_α‖∞.
        alpha: temperature.
        policy: where to start; uniform by default.

    Raises:
        ValueError: as `soft_value_iteration`; a horizon (its optimal policy depends on time).

    >>> mdp = MDP([[[1.0], [1.0]]], [[1.0, 0.0]], gamma=0.5)
    >>> soft_policy_iteration(mdp, alpha=1.0).policy.round(6).tolist()
    [[0.731059, 0.268941]]
    """
    _check(mdp, alpha, tol=tol)
    table = np.full((mdp.num_states, mdp.num_actions), 1.0 / mdp.num_actions)
    table = table if policy is None else policy_table(mdp, policy)
    residuals: list[float] = []
    while True:
        values, q_values = soft_evaluation(mdp, table, alpha)
        table = soft_improvement(q_values, alpha)
        new = np.where(mdp.terminal, 0.0, soft_value(q_values, alpha))
        residuals.append(float(np.abs(new - values).max()))
        bound = (residuals[-1] + _rounding(mdp, values, alpha)) / (1.0 - mdp.gamma)
        if watch is not None:
            watch(len(residuals), bound)
        if bound <= tol:
            return Solution(values, table, q_values, len(residuals), residuals[-1], bound, np.array(residuals))
        _give_up(residuals, mdp, values, alpha, tol)


def _backup(mdp: MDP, values: Float[np.ndarray, " S"]) -> Float[np.ndarray, "S A"]:
    return backup(pairs_of(mdp), values).reshape(mdp.num_states, mdp.num_actions)


def _rounding(mdp: MDP, values: np.ndarray, alpha: float) -> float:
    eps = float(np.finfo(np.float64).eps)
    return rounding(pairs_of(mdp), values) + 16.0 * eps * alpha * (
        1.0 + np.log(mdp.num_actions)
    )  # exp and log add theirs


def _give_up(residuals: list[float], mdp: MDP, values: np.ndarray, alpha: float, tol: float) -> None:
    if residuals[-1] <= _rounding(mdp, values, alpha) / 8.0 or len(residuals) >= 1_000_000:
        raise ValueError(f"tol: {tol:g} cannot be guaranteed in float64 here (residual {residuals[-1]:.3g})")


def _check(mdp: MDP, alpha: float, horizon: int | None = None, tol: float = 1.0) -> None:
    if not (alpha > 0.0 and np.isfinite(alpha)):
        raise ValueError(f"alpha: a positive temperature, got {alpha} (0 is the hard problem: value_iteration)")
    if not tol > 0.0:
        raise ValueError(f"tol: a positive bound on the error, got {tol}")
    if horizon is not None and (horizon != int(horizon) or horizon < 1):
        raise ValueError(f"horizon: a positive number of actions, got {horizon}")
    if horizon is None and mdp.horizon is not None:
        raise ValueError(
            f"horizon: with horizon={mdp.horizon} the best soft policy depends on the time left; use "
            "soft_value_iteration, or mdp.replace(horizon=None)"
        )
    if horizon is None and mdp.gamma == 1.0:
        raise ValueError(
            "gamma: 1 needs a horizon here: the entropy bonus is earned at every step and need not be finite"
        )
