"""Returns: what follows an action, summed (S0 2.1, S2 eq 13, S3 eqs 13, 19, 22-24, S4 2.2.4 and 2.3.3).

Time is the last axis; `reward[t]` follows `action[t]`. `next_values[t]` is the value of the observation that followed
it, before any reset. Where `discounts[t]` is 0 (the MDP ended) the next value is ignored and may be NaN.

Two biases to know (both tested in tests/core/test_gradients.py): gamma < 1 judges an undiscounted objective by a
discounted one (S0 2.1), and Psi_t = return_to_go, without gamma^t, is not the gradient of the discounted objective
either; `elapsed_discount` gives the factor that makes it so.
"""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from upslope.core import _checks as check
from upslope.core._checks import Scalar
from upslope.core._scan import scan, scan_forward


class Boundaries(NamedTuple):
    """How far the future reaches: `discounts` = gamma (1 - terminated), `traces` = lambda * continues."""

    discounts: Float[Tensor, "*batch time"]
    traces: Float[Tensor, "*batch time"]


def boundaries(
    terminated: Bool[Tensor, "*batch time"],
    truncated: Bool[Tensor, "*batch time"],
    gamma: Scalar,
    lam: Scalar | Float[Tensor, "*#batch #time"],
    dtype: torch.dtype | None = None,
) -> Boundaries:
    """Where value and credit stop: discounts = gamma (1 - terminated), traces = lam (1 - terminated)(1 - truncated).

    A termination ends the MDP: nothing lies beyond. A truncation ends the data: the value beyond is bootstrapped, and
    no later reward is credited. With lam = 1 the traces are `continues`. `lam` may vary per row (VAPO). `dtype` is
    that of both, torch's default where it is None.

    Source: SPEC of the estimators in S4 2.14-2.17; Pardo et al. 2018 (arXiv:1712.00378) for time limits.
    Raises: ValueError if the flags are not boolean or differ in shape, gamma or lam not in [0, 1].

    >>> boundaries(torch.tensor([False, True]), torch.tensor([False, False]), gamma=0.9, lam=0.5)
    Boundaries(discounts=tensor([0.9000, 0.0000]), traces=tensor([0.5000, 0.0000]))
    """
    check.boolean(terminated.shape, terminated=terminated, truncated=truncated)
    check.within(0, 1, gamma=gamma, lam=lam)
    continues, dtype = ~(terminated | truncated), dtype or torch.get_default_dtype()
    return Boundaries(gamma * (~terminated).to(dtype), lam * continues.to(dtype))


def lambda_return(
    rewards: Float[Tensor, "*batch time"],
    next_values: Float[Tensor, "*batch time"],
    discounts: Float[Tensor, "*batch time"],
    traces: Float[Tensor, "*batch time"],
) -> Float[Tensor, "*batch time"]:
    """lambda-return: G_t = r_t + d_t [(1 - trace_t) v'_t + trace_t G_{t+1}], with G_T = v'_{T-1}.

    Equal to sum_n (1-lam) lam^{n-1} G_t^(n) over n < N = T - t plus the remainder lam^{N-1} G_t^(N) (S3 eq 24 leaves
    the remainder out, and with it the weights do not sum to 1).

    Source: Sutton & Barto 12.3; S4 2.3.3; S3 eq 24 corrected. Units: those of the rewards.
    Raises: ValueError on shapes that differ, or on a NaN or infinite reward, value or discount.

    >>> one = torch.ones(2)
    >>> lambda_return(one, 10 * one, 0.5 * one, 0.5 * one)  # last: 1 + 0.5*10; first: 1 + 0.5(0.5*10 + 0.5*6)
    tensor([5., 6.])
    """
    check.floats(rewards=rewards, next_values=next_values, discounts=discounts, traces=traces)
    ahead = discounts * next_values.masked_fill(discounts == 0, 0.0)
    bootstrap = torch.cat([1 - traces[..., :-1], torch.ones_like(traces[..., -1:])], -1)
    target = scan(discounts * traces, torch.addcmul(rewards, bootstrap, ahead))
    check.finite(target, rewards=rewards, discounts=discounts, traces=traces, next_values=ahead)
    return target


def return_to_go(
    rewards: Float[Tensor, "*batch time"],
    next_values: Float[Tensor, "*batch time"],
    discounts: Float[Tensor, "*batch time"],
    continues: Float[Tensor, "*batch time"],
) -> Float[Tensor, "*batch time"]:
    """Return-to-go: G_t = sum_{k>=t} gamma^{k-t} r_k to the end of the episode.

    The lambda-return with lambda = 1: it bootstraps from v' where a truncation or the end of the data cuts the episode.
    Pass zeros for `next_values` to leave what lies beyond out.

    Source: S0 2.1, S2 eq 13 (its exponent t - t' corrected), S3 eq 19, S4 2.2.4. Units: those of the rewards.
    Raises: as `lambda_return`.

    >>> zero, one = torch.zeros(3), torch.ones(3)
    >>> return_to_go(one, zero, 0.5 * one, one)
    tensor([1.7500, 1.5000, 1.0000])
    """
    check.floats(rewards=rewards, next_values=next_values, discounts=discounts, continues=continues)
    return lambda_return(rewards, next_values, discounts, continues)


def n_step_return(
    rewards: Float[Tensor, "*batch time"],
    next_values: Float[Tensor, "*batch time"],
    discounts: Float[Tensor, "*batch time"],
    continues: Float[Tensor, "*batch time"],
    n: int,
) -> Float[Tensor, "*batch time"]:
    """n-step return: G_t^(n) = sum_{l<m} gamma^l r_{t+l} + gamma^m v(s_{t+m}), m = min(n, steps left in the episode).

    Source: S3 eq 23 (its powers of gamma corrected); Sutton & Barto 7.1. Units: those of the rewards. Cost: n T.
    Raises: ValueError if n < 1, and as `lambda_return`.

    >>> one = torch.ones(3)
    >>> n_step_return(one, 8 * one, 0.5 * one, one, n=2)  # 1 + 0.5 + 0.25*8, the same, and 1 + 0.5*8 at the cut
    tensor([3.5000, 3.5000, 5.0000])
    """
    check.floats(rewards=rewards, next_values=next_values, discounts=discounts, continues=continues)
    check.count(n=n)
    if n >= rewards.shape[-1]:
        return return_to_go(rewards, next_values, discounts, continues)
    beyond = next_values.masked_fill(discounts == 0, 0.0)
    target = rewards + discounts * beyond
    for _ in range(n - 1):
        later = torch.cat([target[..., 1:], beyond[..., -1:]], -1)
        target = rewards + discounts * torch.lerp(beyond, later, continues)
    check.finite(target, rewards=rewards, discounts=discounts, continues=continues, next_values=beyond)
    return target


def total_return(
    rewards: Float[Tensor, "*batch time"],
    next_values: Float[Tensor, "*batch time"],
    discounts: Float[Tensor, "*batch time"],
    continues: Float[Tensor, "*batch time"],
) -> Float[Tensor, "*batch time"]:
    """R(tau) = sum_t gamma^t r_t of the whole episode, written at each of its steps: the first Psi of S4 table 2.2.

    Every row starts with an episode's first step; later episodes of the row start after each end.

    Source: S0 1, S2 eqs 1 and 12, S3 eq 13, S4 eq 2.5. Units: those of the rewards.
    Raises: as `lambda_return`.

    >>> total_return(torch.tensor([1.0, 2.0, 4.0]), torch.zeros(3), torch.ones(3), torch.tensor([1.0, 0.0, 1.0]))
    tensor([3., 3., 4.])
    """
    return return_to_go(rewards, next_values, discounts, continues).gather(-1, episode_start(continues))


def elapsed_discount(
    discounts: Float[Tensor, "*batch time"], continues: Float[Tensor, "*batch time"]
) -> Float[Tensor, "*batch time"]:
    """gamma^t: the product of the discounts from the episode's first step up to, not including, t.

    Psi_t = gamma^t G_t is unbiased for the discounted objective; nearly everyone drops the factor (S0 2.1), which
    weighs late states more and is then the gradient of no objective (Nota & Thomas 2020, arXiv:1906.07073).
    Every row starts with an episode's first step.

    Source: S0 2.1; Sutton & Barto 13.3 (its gamma^t). Units: none.
    Raises: ValueError on shapes that differ, or NaN or infinite input.

    >>> elapsed_discount(torch.tensor([0.5, 0.5, 0.0, 0.5]), torch.tensor([1.0, 1.0, 0.0, 1.0]))
    tensor([1.0000, 0.5000, 0.2500, 1.0000])
    """
    check.floats(discounts=discounts, continues=continues)
    carried = torch.cat([torch.zeros_like(continues[..., :1]), continues[..., :-1]], -1)
    before = torch.cat([torch.ones_like(discounts[..., :1]), discounts[..., :-1]], -1)
    factor = scan_forward(carried * before, 1 - carried)
    check.finite(factor, discounts=discounts, continues=continues)
    return factor


def episode_start(continues: Float[Tensor, "*batch time"]) -> Int64[Tensor, "*batch time"]:
    """Index of the first step of the episode that each step belongs to.

    Raises: ValueError if continues is not floating point or has no axis.

    >>> episode_start(torch.tensor([1.0, 0.0, 1.0, 1.0]))
    tensor([0, 0, 2, 2])
    """
    check.floats(continues=continues)
    steps = torch.arange(continues.shape[-1], device=continues.device).expand(continues.shape)
    begins = torch.cat([torch.ones_like(continues[..., :1]), 1 - continues[..., :-1]], -1) != 0
    return torch.where(begins, steps, 0).cummax(-1).values
