"""How the laboratory measures an estimator: exactly where trajectories can be listed, with intervals where they cannot.

A `Setting` holds trajectories and their weights: all of them with their probabilities, or a sample from `BatchedMDP`
with weights 1/n. The truth that bias is measured against is exact either way: the policy-gradient theorem gives ∇J at
any size. "Variance" is total: the trace of the covariance, for one trajectory.
"""

from __future__ import annotations

from statistics import NormalDist
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from upslope.core import returns
from upslope.exact import zoo
from upslope.exact.mdp import MDP
from upslope.exact.policy_gradient import (
    Evaluation,
    Policy,
    Trajectories,
    enumerate_trajectories,
    evaluate,
    exact_policy_gradient,
    moments,
    probabilities,
    softmax_table,
    trajectory_gradients,
)
from upslope.exact.sampling import BatchedMDP

Row = dict[str, str | float]

SAMPLES = 10_000  # where trajectories cannot be listed
FEWEST = 100  # the intervals are asymptotic
RESAMPLES = 400


class Setting(NamedTuple):
    """A problem, a policy, its trajectories, and everything true about them that an estimator may need.

    `samples` is None where the trajectories are all there are; else their number, drawn from the policy.
    """

    mdp: MDP
    policy: Policy
    theta: Float[Tensor, " d"]
    data: Trajectories
    weights: Float[Tensor, " N"]
    known: Evaluation
    values: Float[Tensor, "N T"]
    next_values: Float[Tensor, "N T"]
    q: Float[Tensor, "N T"]
    discounts: Float[Tensor, "N T"]
    continues: Float[Tensor, "N T"]
    gradient: Float[Tensor, " d"]
    samples: int | None = None


def small_problem(seed: int = 0, gamma: float = 0.9, horizon: int = 6) -> MDP:
    """A random problem of 4 states, 2 actions, 2 successors each: at most 4^horizon trajectories from its one start."""
    mdp = zoo.random_mdp(np.random.default_rng(seed), states=4, actions=2, successors=2, gamma=gamma)
    return mdp.replace(initial=np.eye(4)[0], horizon=horizon)


def random_policy(mdp: MDP, seed: int, spread: float = 0.5) -> tuple[Policy, Float[Tensor, " d"]]:
    """A softmax table and its parameters, N(0, spread²)."""
    generator = torch.Generator().manual_seed(seed)
    theta = spread * torch.randn(mdp.num_states * mdp.num_actions, generator=generator, dtype=torch.float64)
    return softmax_table(mdp.num_states, mdp.num_actions), theta


def setting(mdp: MDP, seed: int = 0, spread: float = 0.5, samples: int | None = None) -> Setting:
    """A random softmax policy on a problem with a horizon, and all its trajectories, or a sample of them.

    Args:
        samples: number of trajectories to draw; if None, all are listed where they can be, else 10,000 are drawn.

    Raises:
        ValueError: the problem has no horizon, fewer than 100 samples, or a gradient of 0 to compare with.

    >>> case = setting(small_problem(horizon=3))
    >>> case.weights.sum(), len(case.weights) <= 4**3, case.samples
    (tensor(1.0000, dtype=torch.float64), True, None)
    >>> setting(small_problem(horizon=30)).samples
    10000
    """
    if mdp.horizon is None:
        raise ValueError("horizon: the laboratory compares whole trajectories, so the problem needs one (--horizon)")
    if samples is not None and samples < FEWEST:
        raise ValueError(f"samples: at least {FEWEST} for a 95% interval, got {samples}")
    policy, theta = random_policy(mdp, seed, spread)
    gradient = exact_policy_gradient(mdp, policy, theta)
    if not gradient.any():
        raise ValueError(f"horizon: in {mdp.horizon} steps ∇J is 0, and nothing can be measured relative to it")
    if samples is None and not can_enumerate(mdp, mdp.horizon):
        samples = SAMPLES
    data = enumerate_trajectories(mdp) if samples is None else sample(mdp, policy(theta), samples, seed + 4)
    return _setting(mdp, policy, theta, data, samples, mdp.gamma)._replace(gradient=gradient)


def can_enumerate(mdp: MDP, horizon: int, most: int = 1_000_000, cells: int = 200_000_000) -> bool:
    """Whether trajectories are a finite list, and a short one; counted before listing them, like the table it needs.

    >>> can_enumerate(small_problem(), 6), can_enumerate(small_problem(), 12)
    (True, False)
    """
    if mdp.reward_std is not None and np.any(mdp.reward_std > 0.0):
        return False
    ways = (mdp.dense_transition > 0.0).sum(axis=1).astype(float)
    ways[mdp.terminal] = np.eye(mdp.num_states)[mdp.terminal]
    count = (np.asarray(mdp.initial) > 0.0).astype(float)
    for _ in range(horizon):
        table = count.sum() * mdp.num_actions * mdp.num_states
        count = count @ ways
        if count.sum() > most or table > cells:
            return False
    return True


def sample(mdp: MDP, log_policy: Float[Tensor, "S A"], samples: int, seed: int) -> Trajectories:
    """Trajectories drawn from the policy, all in parallel; their `dynamics` are not known (NaN).

    >>> sample(small_problem(), torch.zeros(4, 2).log_softmax(-1), samples=5, seed=0).rewards.shape
    torch.Size([5, 6])
    """
    generator = torch.Generator().manual_seed(seed)
    chains = BatchedMDP(mdp, batch=samples)
    state = chains.reset(generator)
    probs, terminal = log_policy.exp(), torch.from_numpy(mdp.terminal)
    states, steps = [state.observation], []
    for _ in range(mdp.horizon or 0):
        action = torch.multinomial(probs[state.observation], 1, generator=generator).squeeze(-1)
        alive = ~terminal[state.observation]
        state, *outcome = chains.step(state, action)
        states.append(state.observation)
        steps.append((action, *outcome, alive))
    actions, rewards, terminated, truncated, valid = (torch.stack(each, dim=1) for each in zip(*steps, strict=True))
    unknown = torch.full((samples,), torch.nan).double()
    return Trajectories(torch.stack(states, dim=1), actions, rewards, terminated, truncated, valid, unknown)


def another(case: Setting, seed: int) -> Setting:
    """An independent sample of the same policy; the same setting where it is not a sample."""
    return case if case.samples is None else following(case, case.theta, seed)


def following(case: Setting, theta: Float[Tensor, " d"], seed: int) -> Setting:
    """The trajectories of another policy, and what is true of that policy."""
    data = case.data
    if case.samples is not None:
        data = sample(case.mdp, case.policy(theta), case.samples, seed)
    return _setting(case.mdp, case.policy, theta, data, case.samples, case.mdp.gamma)


def discounted(case: Setting, gamma: float) -> Setting:
    """The same trajectories as an estimator sees them that uses γ for values and returns; the objective stays."""
    return _setting(case.mdp, case.policy, case.theta, case.data, case.samples, gamma)


def _setting(mdp: MDP, policy: Policy, theta: Tensor, data: Trajectories, samples: int | None, gamma: float) -> Setting:
    known = evaluate(mdp.replace(gamma=gamma), policy(theta).exp())
    steps = torch.arange(data.actions.shape[1])
    here, after = data.states[:, :-1], data.states[:, 1:]
    discounts, continues = returns.boundaries(data.terminated, data.truncated, gamma, 1.0, dtype=torch.float64)
    weights = probabilities(data, policy(theta)) if samples is None else torch.ones(samples).double() / samples
    return Setting(
        mdp,
        policy,
        theta,
        data,
        weights,
        known,
        known.values[steps, here],
        known.values[steps + 1, after],
        known.q[steps, here, data.actions],
        discounts,
        continues,
        exact_policy_gradient(mdp, policy, theta),
        samples,
    )


class Estimate(NamedTuple):
    """|bias| and total variance of an estimator, each with its interval; both ends are the number where it is exact."""

    mean: Float[Tensor, " d"]
    bias: float
    bias_low: float
    bias_high: float
    variance: float
    variance_low: float
    variance_high: float


def estimate(case: Setting, draws: Float[Tensor, "N d"], confidence: float = 0.95, intervals: bool = True) -> Estimate:
    """Bias against the exact ∇J and total variance of an estimator, from its value on every trajectory.

    On a sample:

    mean      by the central limit theorem ĝ's average lies in a ball around its mean, whose radius q is the quantile of
              |N(0, Σ/n)|, by Gaussian multipliers on the centred draws. |bias| lies between the least and the greatest
              |x − ∇J| in that ball: the interval begins at 0 where ∇J is in it, and holds |bias| at least as often as
              stated, exactly so where it is 0. The number itself is √max(0, |ḡ − ∇J|² − V/n): unbiased before the root.
    variance  delta method on the logarithm: V·exp(±z·se/V), with se = std(|g_i − ḡ|²)/√n. It needs a fourth moment;
              with heavy tails (products of many importance weights) it is too short, as is any such interval.
    """
    found = moments(case.weights, draws)
    distance, variance = float((found.mean - case.gradient).norm()), float(found.variance)
    if case.samples is None:
        return Estimate(found.mean, distance, distance, distance, variance, variance, variance)
    number = case.samples
    variance *= number / (number - 1)
    bias = max(0.0, distance**2 - variance / number) ** 0.5
    if not intervals or variance == 0.0:
        return Estimate(found.mean, bias, bias, bias, variance, variance, variance)
    centred = draws - found.mean
    multipliers = torch.randn(RESAMPLES, number, generator=torch.Generator().manual_seed(0)).to(draws)
    radius = float((multipliers @ centred).norm(dim=-1).quantile(confidence)) / number
    error = float(centred.square().sum(dim=-1).std()) / number**0.5
    factor = float(np.exp(NormalDist().inv_cdf(0.5 + 0.5 * confidence) * error / variance))
    low, high = max(0.0, distance - radius), distance + radius
    return Estimate(found.mean, bias, low, high, variance, variance / factor, variance * factor)


def measure(case: Setting, name: str, psi: Float[Tensor, "N T"]) -> Row:
    """Bias and variance of Σ_t Ψ_t ∇log π(a_t|s_t), relative to the true gradient."""
    return describe(case, name, trajectory_gradients(case.data, case.policy, case.theta, psi))


def describe(case: Setting, name: str, draws: Float[Tensor, "N d"]) -> Row:
    """The row of an estimator with these values; on a sample, with the ends of the 95% intervals."""
    found, size = estimate(case, draws), float(case.gradient.norm())
    row: Row = {"estimator": name, "bias / |∇J|": found.bias / size}
    if case.samples is not None:
        row |= {"bias from": found.bias_low / size, "bias to": found.bias_high / size}
    row |= {"cosine": float(torch.cosine_similarity(found.mean, case.gradient, dim=0))}
    row |= {"std / |∇J|": found.variance**0.5 / size}
    if case.samples is not None:
        row |= {"std from": found.variance_low**0.5 / size, "std to": found.variance_high**0.5 / size}
    return row | {"trajectories for std = |∇J|": found.variance / size**2}
