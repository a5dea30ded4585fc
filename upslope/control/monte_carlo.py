"""Baselines of whole episodes for REINFORCE: those of core/baselines.py and the learned value (S3 7.4.2, S4 2.2.4).

Fitted on the batch that they correct, `constant` and `time-dependent` scale the gradient by 1 - 1/N and the
minimum-variance ones bias it a little; `moving-average`, `leave-one-out` and `value` leave it unbiased.
"""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from upslope.control import environments, rollout
from upslope.control.learner import State
from upslope.control.parameters import Net
from upslope.core import advantages, baselines

Baseline = Literal[
    "none", "constant", "moving-average", "time-dependent", "minimum-variance", "minimum-variance-per-parameter",
    "leave-one-out", "group", "value",
]  # fmt: skip
OWN_BATCH = ("constant", "time-dependent", "leave-one-out", "minimum-variance", "minimum-variance-per-parameter")


class Estimate(NamedTuple):
    """b for every step, and what comes with it."""

    baseline: Float[Tensor, "K #T"] | float
    offset: Float[Tensor, " d"] | None  # what a baseline per parameter takes off the gradient
    remembered: dict[str, float]


def refuse_too_few(baseline: Baseline, episodes_per_env: int, environment: environments.Config) -> None:
    """Raise a `ValueError` where a baseline needs more episodes an iteration than there are."""
    if baseline in OWN_BATCH and episodes_per_env * environment.num_envs == 1:
        raise ValueError(
            f"baseline {baseline!r} needs two episodes an iteration: num_envs is {environment.num_envs}, "
            f"episodes_per_env {episodes_per_env}"
        )
    if baseline == "group" and environment.group_size < 2:
        raise ValueError(
            f"baseline 'group' needs episodes from one reset seed: environment.group_size is {environment.group_size}, "
            "allowed: 2 or more"
        )


def beyond(data: rollout.Rollout, baseline: Baseline) -> Float[Tensor, "K T"]:
    """What stands for the rest of an episode that a limit cut: V, or 0 where no V is learned."""
    return data.next_value if baseline == "value" else torch.zeros_like(data.next_value)


def estimate(
    baseline: Baseline,
    to_go: Float[Tensor, "K T"],
    data: rollout.Rollout,
    state: State,
    net: Net,
    group_size: int,
    decay: float,
) -> Estimate:
    """b of K episodes with their returns-to-go; R, the whole return, is that of the first step."""
    whole, remembered = to_go[:, :1], state.remembered
    if baseline == "none":
        return Estimate(0.0, None, remembered)
    if baseline == "constant":
        return Estimate(baselines.constant(whole.squeeze(1)).expand_as(whole), None, remembered)
    if baseline == "moving-average":  # of past batches: used first, then moved
        average = baselines.MovingAverage(remembered.get("mean", 0.0), remembered.get("weight", 0.0))
        mean, weight = baselines.moving_average(average, whole.double(), decay)
        return Estimate(float(average.mean), None, {"mean": float(mean), "weight": float(weight)})
    if baseline == "time-dependent":
        return Estimate(baselines.time_dependent(to_go, data.valid).expand_as(to_go), None, remembered)
    if baseline == "leave-one-out":
        return Estimate(whole - advantages.leave_one_out(whole.squeeze(1)).unsqueeze(1), None, remembered)
    if baseline == "group":  # rows are environments × episodes, and the k-th episodes of a group's environments belong
        grouped = whole.view(-1, group_size, len(whole) // state.world.envs.num_envs)
        return Estimate(grouped.mean(1, keepdim=True).expand_as(grouped).reshape(-1, 1), None, remembered)
    if baseline == "value":
        return Estimate(data.value, None, remembered)
    trajectories: Any = (data.observation, data.action, data.valid)
    scores = baselines.scores(_log_prob(net), state.theta, *trajectories)
    per_parameter = baseline == "minimum-variance-per-parameter"
    b = baselines.minimum_variance(scores, whole.squeeze(1), per_parameter)
    return Estimate(0.0, b * scores.mean(0), remembered) if per_parameter else Estimate(float(b), None, remembered)


def _log_prob(net: Net) -> Callable[..., Tensor]:
    """log π(τ) of one episode, for per-sample scores: Σ_t log π(a_t|s_t)."""
    return lambda theta, observation, action, valid: (
        net.only("policy", theta, observation).log_prob(action).masked_fill(~valid, 0.0).sum()
    )
