"""Small named MDPs whose every trajectory can be enumerated, and all that estimators may need along them.

`next_values` are NaN where the MDP ended: whoever reads them there fails every test.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from upslope.exact import policy_gradient as exact
from upslope.exact.mdp import MDP


class Problem(NamedTuple):
    """An enumerated problem under a softmax (or other) policy at theta: tensors [N, T] unless said otherwise."""

    mdp: MDP
    policy: exact.Policy
    theta: Tensor
    data: exact.Trajectories
    probabilities: Tensor  # [N], under the policy that sampled
    logp: Tensor
    logp_behavior: Tensor
    values: Tensor
    next_values: Tensor
    q: Tensor
    q_rows: Tensor  # [N, T, A]
    discounts: Tensor
    continues: Tensor
    elapsed: Tensor  # gamma^t
    gradient: Tensor  # [d], the exact one
    evaluation: exact.Evaluation


def problem(
    mdp: MDP,
    steps: int | None = None,
    policy: exact.Policy | None = None,
    theta: Tensor | None = None,
    behavior: Tensor | None = None,
) -> Problem:
    """Enumerate. `behavior` [S, A] are log-probabilities of whoever samples; without it, the policy itself."""
    policy = policy or exact.softmax_table(mdp.num_states, mdp.num_actions)
    if theta is None:
        theta = torch.randn(mdp.num_states * mdp.num_actions, generator=torch.manual_seed(0), dtype=torch.float64)
    log_policy = policy(theta).detach()
    stationary = mdp.horizon is None
    final = exact.evaluate(mdp, log_policy.exp()).values if stationary else None
    known = exact.evaluate(mdp, log_policy.exp(), steps, final)
    data = exact.enumerate_trajectories(mdp, steps)
    time = torch.arange(data.rewards.shape[1])
    here, there = data.states[:, :-1], data.states[:, 1:]
    next_values = known.values[time + 1, there].masked_fill(data.terminated, torch.nan)
    sampler = log_policy if behavior is None else behavior
    return Problem(
        mdp,
        policy,
        theta,
        data,
        exact.probabilities(data, sampler),
        exact.log_probs(data, log_policy),
        exact.log_probs(data, sampler),
        known.values[time, here],
        next_values,
        known.q[time, here, data.actions],
        known.q[time, here],
        mdp.gamma * (~data.terminated).double(),
        (~(data.terminated | data.truncated)).double(),
        mdp.gamma ** time.double().expand_as(data.rewards),
        exact.exact_policy_gradient(mdp, policy, theta, steps=steps, final_values=final),
        known,
    )


def expected_gradient(p: Problem, surrogate: Callable[[Tensor], Tensor], at: Tensor | None = None) -> Tensor:
    """grad_theta of E_sampler[sum_t surrogate_t(logp(theta))], by autograd through the surrogate itself."""
    theta = (p.theta if at is None else at).clone().requires_grad_()
    per_step = surrogate(exact.log_probs(p.data, p.policy(theta)))
    (gradient,) = torch.autograd.grad(p.probabilities @ per_step.masked_fill(~p.data.valid, 0.0).sum(-1), theta)
    return gradient


def stochastic_episode() -> MDP:
    """Three states and a terminal one, slippery moves, gamma 0.9, an own horizon of 4 actions."""
    move = np.zeros((4, 2, 4))
    move[0] = [[0.1, 0.6, 0.3, 0.0], [0.2, 0.0, 0.5, 0.3]]
    move[1] = [[0.0, 0.3, 0.3, 0.4], [0.7, 0.0, 0.3, 0.0]]
    move[2] = [[0.5, 0.0, 0.0, 0.5], [0.0, 0.8, 0.2, 0.0]]
    move[3, :, 3] = 1.0
    reward = np.array([[1.0, -0.5], [0.3, 2.0], [-1.0, 0.7], [0.0, 0.0]])
    return MDP(move, reward, gamma=0.9, initial=[0.6, 0.4, 0.0, 0.0], horizon=4)


def undiscounted_episode() -> MDP:
    """gamma 1, reward of the successor too, three actions, no terminal state: only the horizon of 3 ends it."""
    rng = np.random.default_rng(1)
    move = rng.dirichlet(np.full(2, 0.3), size=(2, 3))
    return MDP(move, rng.normal(size=(2, 3, 2)), gamma=1.0, initial=[0.5, 0.5], horizon=3)


def endless() -> MDP:
    """No end at all, gamma 0.8: its data is cut after a few steps and bootstrapped (a truncation)."""
    rng = np.random.default_rng(2)
    move = rng.dirichlet(np.full(3, 0.3), size=(3, 2))
    return MDP(move, rng.normal(size=(3, 2)), gamma=0.8, initial=[0.2, 0.3, 0.5])


def endings() -> MDP:
    """Terminations and truncations in one batch: a cut after 3 steps of a problem without horizon that may end."""
    return stochastic_episode().replace(horizon=None, gamma=0.95)


def bandit(rewards: list[float]) -> MDP:
    """One decision: arm a pays rewards[a] and ends."""
    arms = len(rewards)
    move = np.zeros((2, arms, 2))
    move[:, :, 1] = 1.0
    return MDP(move, np.array([rewards, [0.0] * arms]), gamma=1.0, initial=[1.0, 0.0], horizon=1)


PROBLEMS: dict[str, Callable[..., Problem]] = {
    "stochastic, terminating": lambda **options: problem(stochastic_episode(), **options),
    "undiscounted horizon": lambda **options: problem(undiscounted_episode(), **options),
    "truncated and bootstrapped": lambda **options: problem(endless(), steps=3, **options),
    "terminated and truncated": lambda **options: problem(endings(), steps=3, **options),
}
