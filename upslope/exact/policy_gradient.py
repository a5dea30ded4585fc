"""Exact policy gradients of a tabular MDP: the ground truth that every estimator is held to.

A policy is a function theta -> log pi(a|s), a tensor [S, A]: a softmax table (`softmax_table`), or any torch function.
The gradient of J(theta) = E[sum_t gamma^t r_t] comes in three ways that share little code: by enumerating all
trajectories (S2 eq 11, S4 2.2.2), by the policy-gradient theorem (S4 2.2.6), by differentiating J itself.

`steps` is the number of actions of a trajectory: the problem's own horizon, beyond which nothing counts, or, where the
problem has none, a cut after which `final_values` stand in (a truncation, bootstrapped). Everything is float64.
"""

from collections.abc import Callable
from typing import Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from upslope.exact.mdp import MDP

Vector = Float[Tensor, " d"]
Policy = Callable[[Vector], Float[Tensor, "S A"]]

MOST_TRAJECTORIES = 2_000_000


class Evaluation(NamedTuple):
    """What a policy is worth. Step-indexed (values [T+1, S], q [T, S, A], visits [T, S]), or stationary (T = 1 and no
    first axis) for an infinite horizon. `visits` are sum gamma^t P(s_t = s), the step's own term if step-indexed.
    """

    values: Float[Tensor, "*steps S"]
    q: Float[Tensor, "*steps S A"]
    visits: Float[Tensor, "*steps S"]

    @property
    def advantages(self) -> Float[Tensor, "*steps S A"]:
        values = self.values[:-1] if self.q.ndim == 3 else self.values
        return self.q - values.unsqueeze(-1)


class Trajectories(NamedTuple):
    """Every trajectory that the MDP allows, whatever the policy. Steps after a termination are padding: not `valid`."""

    states: Int64[Tensor, "N T+1"]
    actions: Int64[Tensor, "N T"]
    rewards: Float[Tensor, "N T"]
    terminated: Bool[Tensor, "N T"]
    truncated: Bool[Tensor, "N T"]
    valid: Bool[Tensor, "N T"]
    dynamics: Float[Tensor, " N"]  # p(s_0) prod P(s'|s, a): the policy's part is left out


def softmax_table(num_states: int, num_actions: int) -> Policy:
    """theta [S * A] -> log softmax of each state's row.

    >>> softmax_table(1, 2)(torch.zeros(2)).exp()
    tensor([[0.5000, 0.5000]])
    """
    return lambda theta: theta.view(num_states, num_actions).log_softmax(-1)


def partially_observed(mdp: MDP, observation: Float[np.ndarray, "S O"]) -> tuple[MDP, Int64[Tensor, " pairs"]]:
    """The MDP whose states are (state, observation) pairs, and the observation of each: a POMDP as an MDP (S4 2.2.3).

    `observation[s, o]` is the probability of seeing o in s. A memoryless policy is a table over observations, taken at
    the second result: `lambda theta: table(theta)[seen]`. Nothing in the policy gradient needs the state to be seen.

    Raises: ValueError if a row of `observation` does not sum to 1.

    >>> coin = MDP([[[0.5, 0.5]], [[0.0, 1.0]]], [[1.0], [0.0]], gamma=0.9)
    >>> partially_observed(coin, np.array([[1.0], [1.0]]))[1]
    tensor([0, 0])
    """
    seen = np.asarray(observation, dtype=np.float64)
    if seen.ndim != 2 or len(seen) != mdp.num_states or (seen < 0).any() or not np.allclose(seen.sum(-1), 1):
        raise ValueError(f"observation must be [{mdp.num_states}, O] with rows that sum to 1, got shape {seen.shape}")
    states, symbols = seen.shape[0], seen.shape[1]
    transition = np.einsum("xay,yo->xayo", mdp.dense_transition, seen)
    transition = np.repeat(transition[:, None], symbols, axis=1).reshape(states * symbols, mdp.num_actions, -1)
    # A terminal state stays as it is, its observation too, so that it stays terminal.
    for s in np.flatnonzero(mdp.terminal):
        block = slice(s * symbols, (s + 1) * symbols)
        transition[block] = np.eye(states * symbols)[block, None]
    reward = _rewards(mdp).numpy()
    reward = np.repeat(np.repeat(reward, symbols, axis=0), symbols, axis=2)
    initial = (np.asarray(mdp.initial)[:, None] * seen).reshape(-1)
    paired = MDP(transition, reward, mdp.gamma, initial, mdp.horizon)
    return paired, torch.arange(symbols).repeat(states)


def evaluate(
    mdp: MDP,
    probs: Float[Tensor, "S A"],
    steps: int | None = None,
    final_values: Float[Tensor, " S"] | None = None,
) -> Evaluation:
    """V, Q and discounted visits of the policy `probs`, exactly; differentiable in it.

    Without `steps` and without a horizon of the problem's own: stationary, by a linear solve (S3 eq 10, S4 2.3.1).

    Raises: ValueError if probs is not [S, A], or the infinite sum does not exist.

    >>> coin = MDP([[[0.5, 0.5]], [[0.0, 1.0]]], [[1.0], [0.0]], gamma=0.9)
    >>> evaluate(coin, torch.ones(2, 1, dtype=torch.float64)).values  # 1 / (1 - 0.9 * 0.5)
    tensor([1.8182, 0.0000], dtype=torch.float64)
    """
    if tuple(probs.shape) != (mdp.num_states, mdp.num_actions):
        raise ValueError(f"probs must be [{mdp.num_states}, {mdp.num_actions}], got {list(probs.shape)}")
    transition, reward = torch.from_numpy(mdp.dense_transition), torch.from_numpy(mdp.expected_reward)
    initial, alive = torch.from_numpy(mdp.initial), torch.from_numpy(~mdp.terminal)
    move = torch.einsum("sa,sax->sx", probs, transition)
    steps = steps if steps is not None else mdp.horizon
    if steps is None:
        # Terminal states are worth 0 and leave the system, so that gamma = 1 is solvable where every path ends.
        system = torch.eye(mdp.num_states, dtype=torch.float64) - mdp.gamma * move * alive
        if torch.linalg.cond(system.detach()) > 1e12:
            raise ValueError("the infinite sum of rewards does not exist: some policy path never ends and gamma is 1")
        values = torch.linalg.solve(system, (probs * reward).sum(-1) * alive)
        q = reward + mdp.gamma * transition @ (values * alive)
        return Evaluation(values, q, torch.linalg.solve(system.T, initial) * alive)

    values_reversed = [torch.zeros_like(initial) if final_values is None else final_values * alive]
    qs = []
    for _ in range(steps):
        qs.append((reward + mdp.gamma * transition @ values_reversed[-1]) * alive.unsqueeze(-1))
        values_reversed.append((probs * qs[-1]).sum(-1))
    visits = [initial * alive]
    for _ in range(steps - 1):
        visits.append(mdp.gamma * visits[-1] @ move * alive)
    return Evaluation(torch.stack(values_reversed[::-1]), torch.stack(qs[::-1]), torch.stack(visits))


def performance(
    mdp: MDP,
    policy: Policy,
    theta: Vector,
    steps: int | None = None,
    final_values: Float[Tensor, " S"] | None = None,
) -> Float[Tensor, ""]:
    """J(theta) = E[sum_t gamma^t r_t] (S2 eq 3, S3 eq 14, S4 eq 2.4), differentiable in theta.

    >>> coin = MDP([[[0.5, 0.5]], [[0.0, 1.0]]], [[1.0], [0.0]], gamma=0.9, initial=[1.0, 0.0])
    >>> performance(coin, softmax_table(2, 1), torch.zeros(2, dtype=torch.float64))
    tensor(1.8182, dtype=torch.float64)
    """
    values = evaluate(mdp, policy(theta).exp(), steps, final_values).values
    first = values[0] if values.ndim == 2 else values
    return torch.from_numpy(mdp.initial) @ first


def exact_policy_gradient(
    mdp: MDP,
    policy: Policy,
    theta: Vector,
    by: Literal["theorem", "enumeration", "differentiation"] = "theorem",
    steps: int | None = None,
    final_values: Float[Tensor, " S"] | None = None,
) -> Vector:
    """grad J(theta), exactly: by the policy-gradient theorem, by enumeration of trajectories, or through J itself.

    theorem          sum_t gamma^t sum_s P(s_t = s) sum_a Q_t(s, a) grad pi(a|s)   (S4 2.2.6; Sutton et al. 2000)
    enumeration      sum_tau p(tau) R(tau) grad log p(tau)                         (S2 eq 11, S3 eq 15, S4 2.2.2)
    differentiation  autograd of `performance`

    Raises: ValueError for another `by`; by enumeration, if the trajectories are unbounded or too many.

    >>> bandit = MDP([[[0, 1], [0, 1]], [[0, 1], [0, 1]]], [[1, 0], [0, 0]], gamma=1, initial=[1, 0])
    >>> exact_policy_gradient(bandit, softmax_table(2, 2), torch.zeros(4, dtype=torch.float64))
    tensor([ 0.2500, -0.2500,  0.0000,  0.0000], dtype=torch.float64)
    """
    theta = theta.detach()
    if by == "theorem":
        known = evaluate(mdp, policy(theta).exp(), steps, final_values)
        return all_action_gradient(policy, theta, known.visits, known.q)
    if by == "differentiation":
        return torch.func.grad(lambda x: performance(mdp, policy, x, steps, final_values))(theta)
    if by == "enumeration":
        data = enumerate_trajectories(mdp, steps)
        return score_gradient(data, policy, theta, total_rewards(data, mdp.gamma, final_values))
    raise ValueError(f"by must be 'theorem', 'enumeration' or 'differentiation', got {by!r}")


def all_action_gradient(
    policy: Policy, theta: Vector, visits: Float[Tensor, "*steps S"], q: Float[Tensor, "*steps S A"]
) -> Vector:
    """sum_s mu(s) sum_a q(s, a) grad pi(a|s): every action, not only the sampled one (S4 2.2.6).

    >>> one = torch.ones(1, dtype=torch.float64)
    >>> all_action_gradient(softmax_table(1, 2), torch.zeros(2).double(), one, torch.tensor([[1.0, 0.0]]).double())
    tensor([ 0.2500, -0.2500], dtype=torch.float64)
    """
    weights = (visits.unsqueeze(-1) * q).detach()
    return torch.func.grad(lambda x: (weights * policy(x).exp()).sum())(theta)


def score_table(policy: Policy, theta: Vector) -> Float[Tensor, "S A d"]:
    """grad log pi(a|s) of every state and action.

    >>> score_table(softmax_table(1, 2), torch.zeros(2))
    tensor([[[ 0.5000, -0.5000],
             [-0.5000,  0.5000]]])
    """
    return torch.func.jacrev(policy)(theta)


def enumerate_trajectories(mdp: MDP, steps: int | None = None) -> Trajectories:
    """All (s_0, a_0, s_1, ...) of positive probability under some policy, up to `steps` actions or a terminal state.

    The last step of a cut trajectory is `terminated` if the cut is the problem's own horizon, else `truncated`.

    Raises: ValueError if neither `steps` nor a horizon bounds them, or there are more than two million.

    >>> coin = MDP([[[0.5, 0.5]], [[0.0, 1.0]]], [[1.0], [0.0]], gamma=0.9)
    >>> enumerate_trajectories(coin, steps=2).states
    tensor([[0, 0, 0],
            [0, 0, 1],
            [0, 1, 1]])
    """
    length = steps if steps is not None else mdp.horizon
    if length is None:
        raise ValueError("trajectories are unbounded: give `steps`, or the MDP a horizon")
    probability, reward, terminal = mdp.dense_transition, _rewards(mdp).numpy(), mdp.terminal
    initial = np.asarray(mdp.initial)
    first = np.flatnonzero(initial)
    states, actions = first[:, None], np.zeros((len(first), 0), dtype=np.int64)
    rewards, valid, dynamics = np.zeros((len(first), 0)), np.zeros((len(first), 0), dtype=bool), initial[first]
    for _ in range(length):
        here = states[:, -1]
        ended = terminal[here]
        choices = np.where(ended[:, None, None], 0.0, probability[here])
        choices[ended, 0, here[ended]] = 1.0  # padding: one way on
        row, action, after = np.nonzero(choices)
        if len(row) > MOST_TRAJECTORIES:
            raise ValueError(f"more than {MOST_TRAJECTORIES} trajectories: take a smaller MDP or fewer steps")
        dynamics = dynamics[row] * choices[row, action, after]
        rewards = np.column_stack([rewards[row], np.where(ended[row], 0.0, reward[here[row], action, after])])
        actions = np.column_stack([actions[row], action])
        valid = np.column_stack([valid[row], ~ended[row]])
        states = np.column_stack([states[row], after])
    terminated = terminal[states[:, 1:]]
    last = np.arange(length) == length - 1
    own_end = mdp.horizon is not None and length >= mdp.horizon
    truncated = last & ~terminated & (not own_end)
    terminated = terminated | (last & own_end)
    arrays = (states, actions, rewards, terminated, truncated, valid, dynamics)
    return Trajectories(*(torch.from_numpy(np.ascontiguousarray(x)) for x in arrays))


def log_probs(data: Trajectories, log_policy: Float[Tensor, "S A"]) -> Float[Tensor, "N T"]:
    """log pi(a_t|s_t) along the trajectories; 0 on padding."""
    return log_policy[data.states[:, :-1], data.actions].masked_fill(~data.valid, 0.0)


def probabilities(data: Trajectories, log_policy: Float[Tensor, "S A"]) -> Float[Tensor, " N"]:
    """p(tau) of each trajectory under the policy (S2 eq 6). They sum to 1."""
    return data.dynamics * log_probs(data, log_policy).sum(-1).exp()


def total_rewards(
    data: Trajectories, gamma: float, final_values: Float[Tensor, " S"] | None = None
) -> Float[Tensor, " N"]:
    """R(tau) = sum_t gamma^t r_t, plus gamma^T v(s_T) where the trajectory was cut and a final value is given."""
    steps = data.rewards.shape[1]
    powers = gamma ** torch.arange(steps + 1, dtype=torch.float64)
    total = data.rewards @ powers[:-1]
    if final_values is not None:
        total = total + powers[-1] * torch.where(data.truncated[:, -1], final_values[data.states[:, -1]], 0.0)
    return total


def trajectory_gradients(
    data: Trajectories, policy: Policy, theta: Vector, psi: Float[Tensor, "N T"]
) -> Float[Tensor, "N d"]:
    """sum_t Psi_t grad log pi(a_t|s_t) of every trajectory: one draw of the estimator each."""
    weights = psi.masked_fill(~data.valid, 0.0)
    states, actions = policy(theta).shape
    where = data.states[:, :-1] * actions + data.actions
    totals = weights.new_zeros(len(weights), states * actions).scatter_add_(1, where, weights)
    return score_products(policy, theta, totals.view(-1, states, actions))


def score_products(policy: Policy, theta: Vector, weights: Float[Tensor, "N S A"]) -> Float[Tensor, "N d"]:
    """sum_{s, a} w(s, a) grad log pi(a|s) for many w at once, without the table of all scores [S, A, d].

    >>> score_products(softmax_table(1, 2), torch.zeros(2), torch.tensor([[[1.0, 0.0]]]))
    tensor([[ 0.5000, -0.5000]])
    """
    _, pullback = torch.func.vjp(policy, theta)
    products: Float[Tensor, "N d"] = torch.func.vmap(pullback)(weights)[0]
    return products


def score_gradient(
    data: Trajectories, policy: Policy, theta: Vector, psi: Float[Tensor, " N"] | Float[Tensor, "N T"]
) -> Vector:
    """E_tau[sum_t Psi_t grad log pi(a_t|s_t)] under the policy itself: the exact mean of a score-function estimator."""
    if psi.ndim == 1:
        psi = psi.unsqueeze(-1).expand_as(data.rewards)
    return probabilities(data, policy(theta)) @ trajectory_gradients(data, policy, theta, psi)


class Moments(NamedTuple):
    """Exact mean of a vector estimator, and its total variance: the trace of the covariance, for one trajectory."""

    mean: Vector
    variance: Float[Tensor, ""]


def moments(weights: Float[Tensor, " N"], draws: Float[Tensor, "N d"]) -> Moments:
    """Mean and total variance of draws with the given probabilities.

    >>> moments(torch.tensor([0.5, 0.5]), torch.tensor([[0.0], [2.0]]))
    Moments(mean=tensor([1.]), variance=tensor(1.))
    """
    mean = weights @ draws
    return Moments(mean, weights @ (draws - mean).square().sum(-1))


def exact_fisher(
    mdp: MDP, policy: Policy, theta: Vector, state_weights: Float[Tensor, " S"] | None = None
) -> Float[Tensor, "d d"]:
    """F = sum_s d(s) sum_a pi(a|s) grad log pi grad log pi^T; d is the discounted visitation, normalised, if not given.

    Source: Kakade 2001; TRPO appendix C. Units: nats per squared parameter.

    >>> bandit = MDP([[[0, 1], [0, 1]], [[0, 1], [0, 1]]], [[1, 0], [0, 0]], gamma=1, initial=[1, 0])
    >>> exact_fisher(bandit, softmax_table(2, 2), torch.zeros(4, dtype=torch.float64))[:2, :2]
    tensor([[ 0.2500, -0.2500],
            [-0.2500,  0.2500]], dtype=torch.float64)
    """
    probs = policy(theta).exp().detach()
    if state_weights is None:
        visits = evaluate(mdp, probs).visits
        visits = visits.sum(0) if visits.ndim == 2 else visits
        state_weights = visits / visits.sum()
    table = score_table(policy, theta)
    return torch.einsum("s,sa,sai,saj->ij", state_weights, probs, table, table)


def exact_natural_gradient(
    mdp: MDP, policy: Policy, theta: Vector, state_weights: Float[Tensor, " S"] | None = None
) -> Vector:
    """F^+ grad J: the pseudo-inverse, as a softmax table has directions that change nothing (Kakade 2001).

    >>> bandit = MDP([[[0, 1], [0, 1]], [[0, 1], [0, 1]]], [[1, 0], [0, 0]], gamma=1, initial=[1, 0])
    >>> exact_natural_gradient(bandit, softmax_table(2, 2), torch.zeros(4, dtype=torch.float64))[:2]
    tensor([ 0.5000, -0.5000], dtype=torch.float64)
    """
    fisher = exact_fisher(mdp, policy, theta, state_weights)
    return torch.linalg.pinv(fisher, hermitian=True) @ exact_policy_gradient(mdp, policy, theta)


def just_gap(
    data: Trajectories, policy: Policy, theta: Vector, psi: Float[Tensor, "N T"], advantages: Float[Tensor, "N T"]
) -> Float[Tensor, "T d"]:
    """gamma-justness: E[Psi_t grad log pi(a_t|s_t)] - E[A_t grad log pi(a_t|s_t)] for every t; 0 if Psi is gamma-just.

    `advantages` are the true A^{pi,gamma}(s_t, a_t) along the trajectories.

    Source: Schulman et al. 2016 (arXiv:1506.02438) definition 1; S4 2.3.1.
    """
    scores = score_table(policy, theta)[data.states[:, :-1], data.actions]
    difference = (psi - advantages).masked_fill(~data.valid, 0.0)
    return torch.einsum("n,nt,ntd->td", probabilities(data, policy(theta)), difference, scores)


class Difference(NamedTuple):
    """Both sides of the performance-difference identity."""

    gap: Float[Tensor, ""]
    advantage: Float[Tensor, ""]


def performance_difference(mdp: MDP, new: Float[Tensor, "S A"], old: Float[Tensor, "S A"]) -> Difference:
    """J(new) - J(old) = sum_t gamma^t E_{s_t, a_t ~ new}[A^old(s_t, a_t)].

    With the visits normalised to a distribution (S0 2.4.1) the right side is multiplied by their sum: T steps at
    gamma = 1, 1 / (1 - gamma) without an end.

    Source: Kakade & Langford 2002 lemma 6.1; S0 2.4.1 corrected.

    >>> bandit = MDP([[[0, 1], [0, 1]], [[0, 1], [0, 1]]], [[1, 0], [0, 0]], gamma=1, initial=[1, 0])
    >>> half = torch.full((2, 2), 0.5, dtype=torch.float64)
    >>> performance_difference(bandit, torch.tensor([[0.75, 0.25]] * 2, dtype=torch.float64), half).advantage
    tensor(0.2500, dtype=torch.float64)
    """
    one, other = evaluate(mdp, new), evaluate(mdp, old)
    initial = torch.from_numpy(mdp.initial)
    first = [x.values[0] if x.values.ndim == 2 else x.values for x in (one, other)]
    return Difference(initial @ (first[0] - first[1]), (one.visits.unsqueeze(-1) * new * other.advantages).sum())


def _rewards(mdp: MDP) -> Float[Tensor, "S A S"]:
    """r(s, a, s') as a dense table."""
    shape = (mdp.num_states, mdp.num_actions, mdp.num_states)
    reward = mdp.reward if isinstance(mdp.reward, np.ndarray) else mdp.reward.toarray().reshape(shape)
    return torch.from_numpy(np.broadcast_to(reward if reward.ndim == 3 else reward[:, :, None], shape).copy())
