"""What a given stochastic policy is worth: V^π, Q^π, A^π, where it goes, what it earns per step in the long run.

Sources: S3 eqs 3, 6, 10; S4 2.2.1 (stationary distribution, infinite horizon) and 2.3.1 (V, Q, A); S0 2.4.1 (d^π).
Everything is a linear system solved exactly, so the error is rounding alone.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import scipy.sparse as sp
from jaxtyping import Float, Int
from scipy.sparse.csgraph import connected_components

from upslope.exact.mdp import MDP, ROW_SUM_TOLERANCE
from upslope.exact.pairs import backup, pairs_of, solve

Policy = Int[np.ndarray, " S"] | Float[np.ndarray, "S A"]


class Evaluation(NamedTuple):
    """V^π [S], Q^π [S, A], A^π = Q^π − V^π [S, A]. With a horizon H they gain a first axis h = 0…H, the steps to go."""

    values: Float[np.ndarray, "*horizon S"]
    q_values: Float[np.ndarray, "*horizon S A"]
    advantages: Float[np.ndarray, "*horizon S A"]


def policy_table(mdp: MDP, policy: Policy) -> Float[np.ndarray, "S A"]:
    """π(a|s) as [S, A], from itself or from one action per state [S].

    Raises:
        ValueError: wrong shape, an action that does not exist, a negative probability, a row that does not sum to 1.

    >>> mdp = MDP([[[1.0], [1.0]]], [[0.0, 1.0]], gamma=0.5)
    >>> policy_table(mdp, np.array([1])).tolist()
    [[0.0, 1.0]]
    """
    given, size = np.asarray(policy), (mdp.num_states, mdp.num_actions)
    if given.shape == size[:1]:
        if (given != given.astype(np.int64)).any() or given.min() < 0 or given.max() >= size[1]:
            raise ValueError(f"policy: actions are whole numbers 0…{size[1] - 1}, got {given.min()}…{given.max()}")
        return np.eye(size[1])[given.astype(np.int64)]
    if given.shape != size:
        raise ValueError(f"policy: one action per state {size[:1]} or probabilities {size}, got {given.shape}")
    table = given.astype(np.float64)
    if not np.isfinite(table).all() or table.min() < 0.0:
        state = int(np.flatnonzero(~np.isfinite(table).all(axis=1) | (table < 0.0).any(axis=1))[0])
        raise ValueError(
            f"policy: probabilities of state {state} are {table[state].tolist()}: finite and ≥ 0 is needed"
        )
    sums = table.sum(axis=1)
    wrong = np.flatnonzero(np.abs(sums - 1.0) > ROW_SUM_TOLERANCE)
    if wrong.size:
        raise ValueError(f"policy: probabilities of state {wrong[0]} sum to {sums[wrong[0]]:.12g}, not 1")
    return table


def chain(mdp: MDP, policy: Policy) -> tuple[sp.csr_array, Float[np.ndarray, " S"]]:
    """The Markov chain of a policy: P_π(s'|s) = Σ_a π(a|s) P(s'|s,a) as CSR [S, S], and r_π(s) = Σ_a π(a|s) r(s,a)."""
    table = policy_table(mdp, policy)
    states, actions = table.shape
    pick = sp.csr_array((table.reshape(-1), np.arange(states * actions), np.arange(0, states * actions + 1, actions)))
    matrix = sp.csr_array(pick @ mdp.matrix)
    matrix.eliminate_zeros()
    return matrix, (table * mdp.expected_reward).sum(axis=1)


def evaluate_policy(mdp: MDP, policy: Policy | Int[np.ndarray, "stages S"], horizon: int | None = None) -> Evaluation:
    """V^π = (I − γP_π)⁻¹ r_π, Q^π = r + γ P V^π, A^π = Q^π − V^π (S3 eq 10, S4 2.3.1).

    With a horizon by backward steps.

    Args:
        policy: [S] actions or [S, A] probabilities. With a horizon H also the [H+1, S] table that `value_iteration`
            returns (row h used with h steps to go, row 0 ignored).
        horizon: number of steps that count; None means the problem's own.

    Raises:
        ValueError: a malformed policy; γ = 1 and the policy earns for ever (its total reward is infinite or undefined).

    >>> mdp = MDP([[[0.5, 0.5]], [[0.0, 1.0]]], [[1.0], [0.0]], gamma=1.0)
    >>> evaluate_policy(mdp, np.array([0, 0])).values.tolist()
    [2.0, 0.0]
    >>> evaluate_policy(mdp, np.array([0, 0]), horizon=2).values.tolist()
    [[0.0, 0.0], [1.0, 0.0], [1.5, 0.0]]
    """
    horizon = mdp.horizon if horizon is None else horizon
    problem, size = pairs_of(mdp), (mdp.num_states, mdp.num_actions)
    if horizon is not None:
        timed = np.asarray(policy).shape == (horizon + 1, mdp.num_states)
        table = None if timed else policy_table(mdp, policy)
        stages, q = np.zeros((horizon + 1, size[0])), np.zeros((horizon + 1, *size))
        for h in range(1, horizon + 1):
            q[h] = backup(problem, stages[h - 1]).reshape(size)
            weights = policy_table(mdp, policy[h]) if table is None else table
            stages[h] = (weights * q[h]).sum(axis=1)
        return Evaluation(stages, q, q - stages[..., None])
    matrix, reward = chain(mdp, policy)
    values = np.zeros(size[0])
    alive = np.ones(size[0], bool) if mdp.gamma < 1.0 else ~_settled(mdp, matrix, reward)
    inner = matrix if alive.all() else matrix[alive][:, alive]
    if alive.any():
        values[alive] = solve(inner, reward[alive], mdp.gamma)
    q_values = backup(problem, values).reshape(size)
    return Evaluation(values, q_values, q_values - values[:, None])


def state_visitation(mdp: MDP, policy: Policy, normalize: bool = False) -> Float[np.ndarray, " S"]:
    """d^π(s) = Σ_t γ^t Pr(s_t = s | π, ρ₀), t < H when there is a horizon; terminal states count 0, the episode is
    over.

    With it ∇J = Σ_s d^π(s) Σ_a Q^π(s,a) ∇π(a|s) and J(π') − J(π) = Σ_s d^π'(s) Σ_a π'(a|s) A^π(s,a): **un**normalised,
    it is the one for which both hold with equality (S0 2.4.1).

    Args:
        normalize: divide by the sum, as in the μ(s) of S&B §13.2.

    Raises:
        ValueError: γ = 1 without a horizon and the policy never ends from some start.

    >>> mdp = MDP([[[0.5, 0.5]], [[0.0, 1.0]]], [[1.0], [0.0]], gamma=1.0)
    >>> state_visitation(mdp, np.array([0, 0])).tolist()
    [2.0, 0.0]
    """
    matrix, _ = chain(mdp, policy)
    alive = ~mdp.terminal
    inner, initial = sp.csr_array(matrix[alive][:, alive]), np.asarray(mdp.initial)[alive]
    visits = np.zeros(mdp.num_states)
    if mdp.horizon is not None:
        state = initial
        for t in range(mdp.horizon):
            visits[alive] += mdp.gamma**t * state
            state = inner.T @ state
    elif alive.any():
        if mdp.gamma == 1.0:
            label, closed = _recurrent(inner)
            endless = closed[label]
            if endless.any() and _reachable(inner, initial)[endless].any():
                name = mdp.state_name(int(np.flatnonzero(alive)[np.flatnonzero(endless)[0]]))
                raise ValueError(f"gamma: at 1 the policy stays around state {name} for ever: visits are infinite")
            inside = ~endless
            part = np.zeros(len(initial))
            part[inside] = solve(sp.csr_array(inner[inside][:, inside].T), initial[inside], 1.0)
            visits[alive] = part
        else:
            visits[alive] = solve(sp.csr_array(inner.T), initial, mdp.gamma)
    return visits / visits.sum() if normalize else visits


def stationary_distribution(mdp: MDP, policy: Policy) -> Float[np.ndarray, " S"]:
    """μ(s) = lim_T 1/T Σ_{t<T} Pr(s_t = s | π, ρ₀), the state distribution of S4 2.2.1 for an infinite horizon.

    It solves μ = μ P_π. With several recurrent classes each is weighted by the probability of ending up in it from ρ₀.

    >>> flip = MDP([[[0.9, 0.1]], [[0.3, 0.7]]], [[0.0], [1.0]], gamma=1.0, initial=[1.0, 0.0])
    >>> stationary_distribution(flip, np.array([0, 0])).round(12).tolist()
    [0.75, 0.25]
    """
    matrix, _ = chain(mdp, policy)
    initial = np.asarray(mdp.initial)
    label, closed = _recurrent(matrix)
    transient = ~closed[label]
    entering = initial.copy()
    if transient.any():
        visits = solve(sp.csr_array(matrix[transient][:, transient].T), initial[transient], 1.0)
        entering[transient] = 0.0
        entering += np.where(transient, 0.0, np.asarray(matrix[transient].T @ visits))
    limit = np.zeros(mdp.num_states)
    for component in np.flatnonzero(closed):
        states = np.flatnonzero(label == component)
        balance = np.eye(len(states)) - matrix[states][:, states].toarray().T
        balance[-1] = 1.0  # one balance equation is redundant: the probabilities sum to one instead
        limit[states] = entering[states].sum() * np.linalg.solve(balance, np.eye(len(states))[-1])
    return limit


def average_reward(mdp: MDP, policy: Policy) -> float:
    """ρ(π) = Σ_s μ(s) Σ_a π(a|s) r(s,a), reward per step in the long run (S4 2.2.1), from the initial distribution.

    >>> flip = MDP([[[0.9, 0.1]], [[0.3, 0.7]]], [[0.0], [1.0]], gamma=1.0, initial=[1.0, 0.0])
    >>> round(average_reward(flip, np.array([0, 0])), 12)
    0.25
    """
    return float(stationary_distribution(mdp, policy) @ chain(mdp, policy)[1])


def _recurrent(matrix: sp.csr_array) -> tuple[np.ndarray, np.ndarray]:
    """(class of each state, whether each class is never left); rows that lose mass leave."""
    count, label = connected_components(matrix, directed=True, connection="strong")
    closed = np.ones(count, bool)
    entries = matrix.tocoo()
    closed[label[entries.row[label[entries.row] != label[entries.col]]]] = False
    closed[label[np.asarray(matrix.sum(axis=1)).reshape(-1) < 1.0 - 1e-9]] = False
    return label, closed


def _reachable(matrix: sp.csr_array, initial: Float[np.ndarray, " S"]) -> np.ndarray:
    reached = initial > 0.0
    while True:
        more = reached | (matrix.T @ reached.astype(np.float64) > 0.0)
        if (more == reached).all():
            return reached
        reached = more


def _settled(mdp: MDP, matrix: sp.csr_array, reward: Float[np.ndarray, " S"]) -> np.ndarray:
    """Recurrent states: worth 0 when they pay nothing, and otherwise no total reward exists."""
    label, closed = _recurrent(matrix)
    recurrent = closed[label]
    paying = np.flatnonzero(recurrent & (reward != 0.0))
    if paying.size:
        raise ValueError(
            f"gamma: at 1 the policy returns to state {mdp.state_name(int(paying[0]))} for ever and is paid "
            f"{reward[paying[0]]:g} there: its total reward is infinite or undefined; use gamma < 1 or a horizon"
        )
    return recurrent
