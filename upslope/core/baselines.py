"""Baselines b in Psi = R - b (S3 7.4.2, S4 2.2.4). What does not depend on the action leaves the gradient unbiased.

A baseline fitted on the very batch that it corrects does depend on its actions. For N trajectories the batch's own mean
(`constant`, `time_dependent`) scales the expected gradient by exactly 1 - 1/N, and the batch's own minimum-variance
baseline biases it in a way that has no such factor. A past batch (`moving_average`) or the others of the batch
(`advantages.leave_one_out`) are unbiased. Also baselines: none, the learned value function (`values.py`), and the
group mean (`advantages.group_relative` with scale "none").
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from upslope.core import _checks as check


def constant(episode_returns: Float[Tensor, " trajectories"]) -> Float[Tensor, ""]:
    """Constant mean: b = (1/N) sum_i R(tau_i). On its own batch the gradient is scaled by 1 - 1/N.

    Source: S2 1 (b = E[R]), S3 7.4.2, S4 2.2.4 (the "suboptimal" baseline). Units: those of the rewards.
    Raises: ValueError without trajectories, on NaN or infinite returns.

    >>> constant(torch.tensor([1.0, 2.0, 6.0]))
    tensor(3.)
    """
    check.floats(episode_returns=episode_returns)
    _not_empty(episode_returns)
    mean = episode_returns.mean()
    check.finite(mean, episode_returns=episode_returns)
    return mean


class MovingAverage(NamedTuple):
    """What a moving average remembers: its mean so far and the weight behind it (0 at the start, then towards 1)."""

    mean: float | Float[Tensor, ""] = 0.0
    weight: float = 0.0


def moving_average(state: MovingAverage, episode_returns: Float[Tensor, "*batch"], decay: float) -> MovingAverage:
    """Moving average of returns, without the pull to the initial zero: use `state.mean` before updating with a batch.

    weight' = decay weight + 1 - decay;  mean' = mean + (1 - decay)/weight' (batch mean - mean).
    Used before its batch it is fitted on past batches only: unbiased.

    Source: S1 ("b is often the moving average over trajectories"); the correction is Adam's. Units: the rewards'.
    Raises: ValueError if decay is not in [0, 1), without returns, on NaN or infinite returns.

    >>> moving_average(MovingAverage(), torch.tensor([2.0, 4.0]), decay=0.9).mean
    tensor(3.)
    """
    check.floats(0, episode_returns=episode_returns)
    _not_empty(episode_returns)
    check.within(0, 1, decay=decay)
    if decay == 1:
        raise ValueError("decay must be below 1, got 1: nothing would ever be learned")
    new = episode_returns.mean()
    check.finite(new, episode_returns=episode_returns)
    weight = decay * state.weight + 1 - decay
    return MovingAverage(state.mean + (1 - decay) / weight * (new - state.mean), weight)


def time_dependent(
    returns_to_go: Float[Tensor, "trajectories time"], mask: Bool[Tensor, "trajectories time"] | None = None
) -> Float[Tensor, " time"]:
    """Time-dependent mean: b(t) = mean over trajectories of the return-to-go at step t; 0 where no trajectory is left.

    On its own batch the gradient of step t is scaled by 1 - 1/N_t. Steps are counted from the episode's start.

    Source: S3 7.4.2. Units: those of the rewards.
    Raises: ValueError on a mask of another shape, no trajectory or an empty mask, NaN or infinite returns that count.

    >>> time_dependent(torch.tensor([[3.0, 1.0], [5.0, 7.0]]), torch.tensor([[True, True], [True, False]]))
    tensor([4., 1.])
    """
    check.floats(2, returns_to_go=returns_to_go)
    _not_empty(returns_to_go)
    if mask is None:
        mask = torch.ones_like(returns_to_go, dtype=torch.bool)
    check.boolean(returns_to_go.shape, mask=mask)
    check.some(mask)
    mean = returns_to_go.masked_fill(~mask, 0.0).sum(0) / mask.sum(0).clamp(min=1)
    check.finite(mean, returns_to_go=returns_to_go)
    return mean


def minimum_variance(
    scores: Float[Tensor, "trajectories d"],
    episode_returns: Float[Tensor, " trajectories"],
    per_parameter: bool = False,
) -> Float[Tensor, ""] | Float[Tensor, " d"]:
    """Minimum-variance baseline: b = E[||g||^2 R] / E[||g||^2], g = grad log p(tau), R the whole return; 0/0 is 0.

    Of all constants b it makes the total variance of g (R - b) least; with `per_parameter`, each component's variance
    by its own b_j = E[g_j^2 R] / E[g_j^2]. Least within its own form only: a state's value may do better, or worse.

    Source: S3 7.4.2, S4 2.2.4; Weaver & Tao 2001; Peters & Schaal 2008. Units: those of the rewards.
    Raises: ValueError on shapes that do not fit, no trajectory, NaN or infinite input.

    >>> minimum_variance(torch.tensor([[1.0, 0.0], [3.0, 0.0]]), torch.tensor([10.0, 20.0]))  # (1*10 + 9*20)/10
    tensor(19.)
    >>> minimum_variance(torch.tensor([[1.0, 0.0], [3.0, 0.0]]), torch.tensor([10.0, 20.0]), per_parameter=True)
    tensor([19.,  0.])
    """
    check.floats(2, scores=scores)
    check.floats(episode_returns=episode_returns, score_of_one_parameter=scores.sum(-1))
    _not_empty(episode_returns)
    weights = scores.square()
    if not per_parameter:
        weights = weights.sum(-1, keepdim=True)
    top, bottom = (weights * episode_returns.unsqueeze(-1)).sum(0), weights.sum(0)
    baseline = torch.where(bottom == 0, 0.0, top / torch.where(bottom == 0, 1.0, bottom))
    check.finite(baseline, scores=scores, episode_returns=episode_returns)
    return baseline if per_parameter else baseline.squeeze(0)


def scores(
    log_prob: Callable[..., Float[Tensor, ""]], theta: Float[Tensor, " d"], *trajectories: Tensor
) -> Float[Tensor, "trajectories d"]:
    """Per-sample scores g_i = grad_theta log p_theta(tau_i), all at once (`torch.func`: a vectorised gradient).

    `log_prob(theta, *trajectory)` is one trajectory's sum_t log pi(a_t|s_t); the first axis of each further argument
    is the trajectory.

    Source: S2 eq 11, S3 7.3, S4 2.2.2. Raises: ValueError if theta is not floating point.

    >>> scores(lambda theta, x: (theta * x).sum(), torch.zeros(2), torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
    tensor([[1., 2.],
            [3., 4.]])
    """
    check.floats(theta=theta)
    in_dims = (None, *(0 for _ in trajectories))
    return torch.func.vmap(torch.func.grad(log_prob), in_dims=in_dims)(theta, *trajectories)


def _not_empty(episode_returns: Tensor) -> None:
    if episode_returns.numel() == 0:
        raise ValueError(f"at least one return is needed, got shape {list(episode_returns.shape)}")
