"""Psi: what weights an action in E[sum_t Psi_t grad log pi(a_t|s_t)] (S4 table 2.2, 2.3, 3.5, A.3; S3 eqs 23, 24).

Time is the last axis of the per-step estimators, the group is the last axis of the per-completion ones. The arguments
`rewards, next_values, discounts, traces, continues` are those of `returns.py`. Nothing here is detached: pass values
that carry no gradient. Least variance is no theorem: S4 2.3.1 claims it for the advantage, and
tests/core/test_variance.py shows an MDP on which each step of the documents' order reverses.
"""

import math
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from upslope.core import _checks as check
from upslope.core._checks import Scalar
from upslope.core._scan import scan
from upslope.core.returns import n_step_return, return_to_go


def advantage(q: Float[Tensor, "*shape"], values: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Advantage: A(s, a) = Q(s, a) - V(s), from a critic that has both.

    Source: S4 2.3.1; S3 7.4.2. Units: those of the rewards. Raises: ValueError on shapes that differ, NaN or infinity.

    >>> advantage(torch.tensor([3.0]), torch.tensor([2.0]))
    tensor([1.])
    """
    check.floats(0, q=q, values=values)
    difference = q - values
    check.finite(difference, q=q, values=values)
    return difference


def td_residual(
    rewards: Float[Tensor, "*batch time"],
    values: Float[Tensor, "*batch time"],
    next_values: Float[Tensor, "*batch time"],
    discounts: Float[Tensor, "*batch time"],
) -> Float[Tensor, "*batch time"]:
    """TD residual: r_t + d_t v'_t - v_t. Unbiased as Psi (gamma-just) only if v is the true value.

    Source: S4 eq 2.15; Schulman et al. 2016 (arXiv:1506.02438) eq 10. Units: those of the rewards.
    Raises: ValueError on shapes that differ, or a NaN or infinite reward, value or discount.

    >>> one = torch.ones(2)
    >>> td_residual(one, 3 * one, 8 * one, torch.tensor([0.5, 0.0]))
    tensor([ 2., -2.])
    """
    check.floats(rewards=rewards, values=values, next_values=next_values, discounts=discounts)
    ahead = discounts * next_values.masked_fill(discounts == 0, 0.0)
    residual = rewards + ahead - values
    check.finite(residual, rewards=rewards, values=values, discounts=discounts, next_values=ahead)
    return residual


def gae(
    rewards: Float[Tensor, "*batch time"],
    values: Float[Tensor, "*batch time"],
    next_values: Float[Tensor, "*batch time"],
    discounts: Float[Tensor, "*batch time"],
    traces: Float[Tensor, "*batch time"],
) -> Float[Tensor, "*batch time"]:
    """Generalised advantage: A_t = delta_t + d_t trace_t A_{t+1} = sum_l (gamma lam)^l delta_{t+l}, A_T = 0.

    lam = 0 is the TD residual (S4 eq 2.16), lam = 1 return-to-go minus value (S4 eq 2.17). A_t + v_t is the
    lambda-return, the usual value target. Linear time: see `_scan.py`.

    Source: Schulman et al. 2016 (arXiv:1506.02438) eq 16; S1; S3 eq 24 corrected; S4 eq 2.14 (the first line of its
    truncated form has gamma^{T-t+1} for gamma^{T-t-1}). Units: those of the rewards.
    Raises: ValueError on shapes that differ, or a NaN or infinite reward, value or discount.

    >>> one = torch.ones(2)
    >>> gae(one, 3 * one, 8 * one, 0.5 * one, 0.5 * one)  # deltas 2, 2; first: 2 + 0.5*0.5*2
    tensor([2.5000, 2.0000])
    """
    check.floats(rewards=rewards, values=values, next_values=next_values, discounts=discounts, traces=traces)
    ahead = discounts * next_values.masked_fill(discounts == 0, 0.0)
    result = scan(discounts * traces, rewards + ahead - values)
    check.finite(result, rewards=rewards, values=values, discounts=discounts, traces=traces, next_values=ahead)
    return result


def k_step(
    rewards: Float[Tensor, "*batch time"],
    values: Float[Tensor, "*batch time"],
    next_values: Float[Tensor, "*batch time"],
    discounts: Float[Tensor, "*batch time"],
    continues: Float[Tensor, "*batch time"],
    k: int,
) -> Float[Tensor, "*batch time"]:
    """k-step advantage: sum_{l<k} gamma^l r_{t+l} + gamma^k v(s_{t+k}) - v(s_t), shorter at the episode's end.

    A2C and A3C let k reach the end of the rollout: k >= time (then it is GAE with lam = 1).

    Source: S3 eq 23 (its powers of gamma corrected), S4 2.3.2; Mnih et al. 2016 (arXiv:1602.01783).
    Units: those of the rewards. Raises: ValueError if k < 1, and as `gae`.

    >>> one = torch.ones(3)
    >>> k_step(one, 3 * one, 8 * one, 0.5 * one, one, k=2)
    tensor([0.5000, 0.5000, 2.0000])
    """
    check.floats(rewards=rewards, values=values)
    check.count(k=k)
    result = n_step_return(rewards, next_values, discounts, continues, k) - values
    check.finite(result, values=values)
    return result


def baselined_return(
    rewards: Float[Tensor, "*batch time"],
    baseline: Float[Tensor, "*batch time"],
    next_values: Float[Tensor, "*batch time"],
    discounts: Float[Tensor, "*batch time"],
    continues: Float[Tensor, "*batch time"],
) -> Float[Tensor, "*batch time"]:
    """Return-to-go minus a baseline that does not depend on the action: G_t - b(s_t). Unbiased for every such b.

    Source: S0 2.2-2.3, S1, S3 alg 7, S4 table 2.2; Williams 1992. Units: those of the rewards. Raises: as `gae`.

    >>> one = torch.ones(2)
    >>> baselined_return(one, 3 * one, 8 * one, 0.5 * one, one)
    tensor([0.5000, 2.0000])
    """
    check.floats(rewards=rewards, baseline=baseline)
    result = return_to_go(rewards, next_values, discounts, continues) - baseline
    check.finite(result, baseline=baseline)
    return result


class VTrace(NamedTuple):
    """`targets` for the critic, `advantages` (already times the clipped importance weight) for the actor."""

    targets: Float[Tensor, "*batch time"]
    advantages: Float[Tensor, "*batch time"]


def vtrace(
    rewards: Float[Tensor, "*batch time"],
    values: Float[Tensor, "*batch time"],
    next_values: Float[Tensor, "*batch time"],
    discounts: Float[Tensor, "*batch time"],
    traces: Float[Tensor, "*batch time"],
    ratios: Float[Tensor, "*batch time"],
    rho_bar: Scalar = 1.0,
    c_bar: Scalar = 1.0,
) -> VTrace:
    """V-trace, off-policy targets and advantages; `ratios` = pi(a_t|s_t) / mu(a_t|s_t).

    rho_t = min(rho_bar, ratio_t), c_t = trace_t min(c_bar, ratio_t), e_t = rho_t delta_t + d_t c_t e_{t+1}, e_T = 0;
    targets v_t + e_t; advantages rho_t (r_t + d_t (v'_t + trace_t e_{t+1}) - v_t).
    On-policy with lam = 1 the targets are return-to-go; ratios below the caps and a true value leave both unbiased,
    a cap that binds makes the target the value of a policy between mu and pi.

    Source: Espeholt et al. 2018 (arXiv:1802.01561) eqs 1, 2; the lambda as in its remark 2. Units: the rewards'.
    Raises: ValueError on shapes that differ, negative caps, a NaN or infinite input.

    >>> one = torch.ones(2)
    >>> vtrace(one, 3 * one, 8 * one, 0.5 * one, one, 2 * one).targets
    tensor([6., 5.])
    """
    check.floats(
        rewards=rewards, values=values, next_values=next_values, discounts=discounts, traces=traces, ratios=ratios
    )
    check.within(0, math.inf, rho_bar=rho_bar, c_bar=c_bar)
    following = next_values.masked_fill(discounts == 0, 0.0)
    rho = ratios.clamp(max=rho_bar)
    residual = rho * (rewards + discounts * following - values)
    correction = scan(discounts * traces * ratios.clamp(max=c_bar), residual)
    later = torch.cat([correction[..., 1:], torch.zeros_like(correction[..., :1])], -1)
    result = rho * (rewards + discounts * (following + traces * later) - values)
    targets = values + correction
    given = {"rewards": rewards, "values": values, "next_values": following, "discounts": discounts}
    check.finite(targets + result + ratios, **given, traces=traces, ratios=ratios)
    return VTrace(targets, result)


def group_relative(
    rewards: Float[Tensor, "*prompts group"], scale: str = "group", ddof: int = 1, eps: Scalar = 1e-4
) -> Float[Tensor, "*prompts group"]:
    """Reward relative to the group of completions of one prompt: (r_i - mean) / (std + eps).

    scale: "group" divides by the group's own standard deviation (GRPO), "batch" by that of all rewards given
    (REINFORCE++ style), "none" does not divide (GPG, Dr. GRPO). The mean includes r_i itself, which scales the
    gradient by 1 - 1/G; dividing by a group's std besides re-weights prompts by 1/std: biased, both. Equal rewards
    give exactly 0. A group mean is a baseline for the prompt, not the value of a token (S4 A.3.1 says otherwise).

    Source: S4 eq 3.12, S3 alg 12, S0 2.6; Shao et al. 2024 (arXiv:2402.03300) 4.1.2; Liu et al. 2025
    (arXiv:2503.20783). Units: none ("group", "batch") or those of the rewards ("none").
    Raises: ValueError on a group of 1, an unknown scale, negative eps, ddof not 0 or 1, a NaN or infinite reward.

    >>> group_relative(torch.tensor([[0.0, 1.0, 2.0], [5.0, 5.0, 5.0]]), eps=0.0)
    tensor([[-1.,  0.,  1.],
            [ 0.,  0.,  0.]])
    """
    check.one_of(("group", "batch", "none"), scale=scale)
    check.floats(rewards=rewards)
    _group_of_two(rewards)
    check.within(0, 1, ddof=ddof)
    check.within(0, math.inf, eps=eps)
    equal = rewards.amax(-1, keepdim=True) == rewards.amin(-1, keepdim=True)
    centred = (rewards - rewards.mean(-1, keepdim=True)).masked_fill(equal, 0.0)
    check.finite(centred, rewards=rewards)
    if scale == "none":
        return centred
    spread = rewards.std(-1, correction=ddof, keepdim=True) if scale == "group" else rewards.std(correction=ddof)
    return (centred / (spread + eps)).masked_fill(equal, 0.0)


def leave_one_out(rewards: Float[Tensor, "*prompts group"]) -> Float[Tensor, "*prompts group"]:
    """RLOO: r_i - mean of the others = G/(G-1) (r_i - mean of all). Unbiased: the baseline leaves r_i out.

    Source: Kool et al. 2019; Ahmadian et al. 2024 (arXiv:2402.14740) eq 8. Units: those of the rewards.
    Raises: ValueError on a group of 1, a NaN or infinite reward.

    >>> leave_one_out(torch.tensor([0.0, 1.0, 5.0]))
    tensor([-3.0000, -1.5000,  4.5000])
    """
    centred = group_relative(rewards, scale="none")
    return centred * (rewards.shape[-1] / (rewards.shape[-1] - 1))


def process_relative(
    step_rewards: Float[Tensor, "group steps"],
    step_ends: Int64[Tensor, "group steps"],
    length: int,
    ddof: int = 1,
    eps: Scalar = 1e-4,
) -> Float[Tensor, "group {length}"]:
    """Process rewards: normalise the steps of the whole group together, credit a token with the steps still to end.

    A_{i,t} = sum over steps j of completion i with end_j >= t of (r_ij - mean) / (std + eps), the mean and std over all
    sum_i K_i steps of the group. `step_ends` are 0-based and inclusive; -1 marks padding; 0 after the last end.

    Source: S4 A.3.3; Shao et al. 2024 (arXiv:2402.03300) 4.1.3. Units: none.
    Raises: ValueError on shapes that differ, an end outside [-1, length), fewer than two steps in all, negative eps,
    NaN or infinite rewards of steps that count.

    >>> process_relative(torch.tensor([[0.0, 2.0], [1.0, 9.0]]), torch.tensor([[0, 2], [1, -1]]), length=4, eps=0.0)
    tensor([[0., 1., 1., 0.],
            [0., 0., 0., 0.]])
    """
    check.floats(axes=2, step_rewards=step_rewards)
    if step_ends.shape != step_rewards.shape or step_ends.dtype != torch.int64:
        shape = list(step_rewards.shape)
        raise ValueError(f"step_ends must be int64 of step_rewards' shape {shape}, got {check.describe(step_ends)}")
    check.count(length=length)
    check.within(0, 1, ddof=ddof)
    check.within(0, math.inf, eps=eps)
    counts = step_ends >= 0
    if check.readable(step_ends):
        if bool(((step_ends < -1) | (step_ends >= length)).any()):
            raise ValueError(f"step_ends must be in [-1, {length}), got {step_ends.min()} to {step_ends.max()}")
        if int(counts.sum()) < 2:
            raise ValueError(f"step_ends must mark at least 2 steps in the group, got {int(counts.sum())}")
    kept = step_rewards.masked_fill(~counts, 0.0)
    check.finite(kept, step_rewards=kept)
    normalised = _standardise(kept, counts, ddof, eps)
    at_ends = step_rewards.new_zeros(step_rewards.shape[0], length)
    at_ends = at_ends.scatter_add(-1, step_ends.clamp(min=0), normalised)
    return at_ends.flip(-1).cumsum(-1).flip(-1)


def whiten(
    values: Float[Tensor, "*shape"],
    mask: Bool[Tensor, "*shape"] | None = None,
    shift_mean: bool = True,
    eps: Scalar = 1e-8,
) -> Float[Tensor, "*shape"]:
    """Mean 0 and standard deviation 1 over all elements that count: (x - mean) / (std_{ddof=1} + eps).

    Elements outside the mask are ignored (they may be NaN) and come back 0. Equal elements give exactly 0. With
    shift_mean = False the mean is put back after the scaling. As Psi it is biased: the batch's own mean and std.

    Source: the normalisation of PPO's minibatch (37 details, no. 7) and of RLHF rewards (N details); not in S0-S4.
    Raises: ValueError on a mask of another shape, fewer than 2 elements, negative eps, NaN or infinite values.

    >>> whiten(torch.tensor([5.0, 6.0, 7.0, 99.0]), torch.tensor([True, True, True, False]))
    tensor([-1.,  0.,  1.,  0.])
    """
    check.floats(values=values)
    check.within(0, math.inf, eps=eps)
    if mask is None:
        count = values.numel()
    else:
        check.boolean(values.shape, mask=mask)
        count = int(mask.sum()) if check.readable(mask) else 2
    if count < 2:
        raise ValueError(f"values must have at least 2 elements that count, got {count}")
    if mask is not None:
        kept = values.masked_fill(~mask, 0.0)
        check.finite(kept, values=kept)
        return _standardise(kept, mask, 1, eps, shift_mean)
    spread, mean = torch.std_mean(values)  # Welford's: of equal elements the mean is exact and the spread 0
    scaled = (values - mean) / (spread + eps)
    check.finite(scaled, values=values)
    return scaled if shift_mean else scaled + mean


def length_adaptive_lambda(
    lengths: Float[Tensor, "*batch"] | Int64[Tensor, "*batch"], alpha: Scalar = 0.05
) -> Float[Tensor, "*batch"]:
    """VAPO's lambda of a response of l tokens: 1 - 1/(alpha l), at least 0; longer responses look further ahead.

    Source: Yue et al. 2025 (arXiv:2504.05118) 4.2. Units: lengths in tokens. Raises: ValueError if alpha <= 0.

    >>> length_adaptive_lambda(torch.tensor([10, 100, 1000]))
    tensor([0.0000, 0.8000, 0.9800])
    """
    check.positive(alpha=alpha)
    return (1 - 1 / (alpha * lengths)).clamp(min=0.0)


def _standardise(
    kept: Float[Tensor, "*shape"], mask: Bool[Tensor, "*shape"], ddof: int, eps: Scalar, shift_mean: bool = True
) -> Float[Tensor, "*shape"]:
    """Masked (x - mean) / (std + eps), where `kept` is 0 outside the mask; 0 outside, exactly 0 when all are equal."""
    count = mask.sum()
    mean = kept.sum() / count
    centred = (kept - mean).masked_fill(~mask, 0.0)
    spread = (centred.square().sum() / (count - ddof)).sqrt()
    equal = kept.masked_fill(~mask, -math.inf).amax() == kept.masked_fill(~mask, math.inf).amin()
    scaled = (centred / (spread + eps)).masked_fill(equal, 0.0)
    return scaled if shift_mean else (scaled + mean).masked_fill(~mask, 0.0)


def _group_of_two(rewards: Tensor) -> None:
    if rewards.shape[-1] < 2:
        raise ValueError(f"rewards must have groups of at least 2, got {check.describe(rewards)}")
