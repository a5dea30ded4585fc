"""Surrogates: what is differentiated. Each is per element and maximised; the algorithm reduces once, negates once.

`logp` carries the gradient, `logp_old` is the policy at the start of the update, `logp_behavior` whoever sampled, and
`psi` weights the action and carries none (pass it detached). Arguments have one shape: expand a per-sequence psi to
[batch, time] in the open. Fill the log-probabilities of padding with 0: the reductions take the mask.
"""

import math

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from upslope.core import _checks as check
from upslope.core._checks import Scalar


def log_prob(logp: Float[Tensor, "*shape"], psi: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """L = Psi log pi(a|s): its gradient Psi grad log pi is REINFORCE's; its value means nothing.

    Source: S0 2.1, S2 eq 13, S3 7.5.2, S4 2.4.1 (L^PG); Williams 1992. Unbiased on-policy. Units: those of psi.
    Raises: ValueError on shapes that differ, NaN or infinite input.

    >>> log_prob(torch.tensor([-1.0, -2.0]), torch.tensor([3.0, -1.0]))
    tensor([-3.,  2.])
    """
    check.floats(0, logp=logp, psi=psi)
    surrogate = psi * logp
    check.finite(surrogate, logp=logp, psi=psi)
    return surrogate


def ratio(
    logp: Float[Tensor, "*shape"], logp_old: Float[Tensor, "*shape"], psi: Float[Tensor, "*shape"]
) -> Float[Tensor, "*shape"]:
    """L = (pi / pi_old) Psi. At pi = pi_old its gradient is that of `log_prob`.

    Away from pi_old it also stands on pi_old's state distribution: the first-order form of S2 eqs 16-17 and S4 eq 2.13.
    S1 takes its expectation under pi_theta; it is under pi_old.

    Source: S0 2.4, S2 eq 17, S3 7.5.2, S4 2.4.2; Kakade & Langford 2002; TRPO (arXiv:1502.05477) eq 14.
    Units: those of psi. Raises: ValueError on shapes that differ, NaN or infinite input.

    >>> ratio(torch.tensor([0.0]), torch.tensor([-0.6931472]), torch.tensor([3.0]))
    tensor([6.])
    """
    check.floats(0, logp=logp, logp_old=logp_old, psi=psi)
    change = logp - logp_old
    surrogate = change.exp() * psi
    check.finite(surrogate + change, logp=logp, logp_old=logp_old, psi=psi)
    return surrogate


def clipped(
    ratios: Float[Tensor, "*shape"],
    psi: Float[Tensor, "*shape"],
    clip_low: Scalar = 0.2,
    clip_high: Scalar = 0.2,
) -> Float[Tensor, "*shape"]:
    """min(rho Psi, clip(rho, 1 - clip_low, 1 + clip_high) Psi) of a ratio already formed, per token or per sequence.

    Source: as `clipped_ratio`; with `sequence_ratio` it is S4 eq 3.11 and GSPO. Units: those of psi.
    Raises: ValueError on shapes that differ, a negative clip, NaN or infinite input.

    >>> clipped(torch.tensor([1.5, 1.5]), torch.tensor([1.0, -1.0]))
    tensor([ 1.2000, -1.5000])
    """
    check.floats(0, ratios=ratios, psi=psi)
    check.within(0, math.inf, clip_low=clip_low, clip_high=clip_high)
    surrogate = _pessimistic(ratios, psi, clip_low, clip_high)
    check.finite(surrogate + ratios, ratios=ratios, psi=psi)
    return surrogate


def clipped_ratio(
    logp: Float[Tensor, "*shape"],
    logp_old: Float[Tensor, "*shape"],
    psi: Float[Tensor, "*shape"],
    clip_low: Scalar = 0.2,
    clip_high: Scalar = 0.2,
) -> Float[Tensor, "*shape"]:
    """PPO: L = min(rho Psi, clip(rho, 1 - clip_low, 1 + clip_high) Psi), rho = pi / pi_old.

    No gradient where Psi > 0 and rho > 1 + clip_high, or Psi < 0 and rho < 1 - clip_low: there is no further gain
    (S4 2.4.3 says the ratio "cannot exceed" the bound: it can). Equals `ratio` at pi = pi_old in value and gradient;
    biased beyond, by the clip. Unequal clips are DAPO's clip-higher.

    Source: Schulman et al. 2017 (arXiv:1707.06347) eq 7; S0 2.5, S2 eq 19, S3 eq 25, S4 2.4.3. Units: those of psi.
    Raises: ValueError on shapes that differ, a negative clip, NaN or infinite input.

    >>> logp_old = torch.zeros(4)
    >>> clipped_ratio(torch.tensor([1.5, 1.5, 0.5, 0.5]).log(), logp_old, torch.tensor([1.0, -1.0, 1.0, -1.0]))
    tensor([ 1.2000, -1.5000,  0.5000, -0.8000])
    """
    check.floats(0, logp=logp, logp_old=logp_old, psi=psi)
    check.within(0, math.inf, clip_low=clip_low, clip_high=clip_high)
    change = logp - logp_old
    surrogate = _pessimistic(change.exp(), psi, clip_low, clip_high)
    check.finite(surrogate + change, logp=logp, logp_old=logp_old, psi=psi)  # infinity can hide behind the clip
    return surrogate


def dual_clip(
    logp: Float[Tensor, "*shape"],
    logp_old: Float[Tensor, "*shape"],
    psi: Float[Tensor, "*shape"],
    clip_low: Scalar = 0.2,
    clip_high: Scalar = 0.2,
    clip_dual: Scalar = 3.0,
) -> Float[Tensor, "*shape"]:
    """Dual clip: max(clipped_ratio, clip_dual Psi) where Psi < 0: a huge ratio of a bad action stops pulling.

    Source: Ye et al. 2020 (arXiv:1912.09729) eq 5. Units: those of psi. Biased by both clips.
    Raises: ValueError if clip_dual <= 1, and as `clipped_ratio`.

    >>> dual_clip(torch.tensor([8.0, 8.0]).log(), torch.zeros(2), torch.tensor([-1.0, 1.0]))
    tensor([-3.0000,  1.2000])
    """
    if isinstance(clip_dual, (int, float)) and not 1 < clip_dual < math.inf:
        raise ValueError(f"clip_dual must be above 1 and finite, got {clip_dual}")
    surrogate = clipped_ratio(logp, logp_old, psi, clip_low, clip_high)
    return torch.where(psi < 0, torch.maximum(surrogate, clip_dual * psi), surrogate)


def cispo(
    logp: Float[Tensor, "*shape"],
    logp_old: Float[Tensor, "*shape"],
    psi: Float[Tensor, "*shape"],
    clip_low: Scalar = 1.0,
    clip_high: Scalar = 0.2,
) -> Float[Tensor, "*shape"]:
    """CISPO: L = sg(clip(rho, 1 - clip_low, 1 + clip_high)) Psi log pi: the weight is clipped, no gradient is dropped.

    Source: MiniMax 2025 (arXiv:2506.13585) eq 4 (no lower bound there: clip_low = 1). Units: those of psi.
    Biased by the clip alone. Raises: as `clipped_ratio`.

    >>> cispo(torch.tensor([-1.0]), torch.tensor([-2.0]), torch.tensor([1.0]))
    tensor([-1.2000])
    """
    check.floats(0, logp=logp, logp_old=logp_old, psi=psi)
    check.within(0, math.inf, clip_low=clip_low, clip_high=clip_high)
    change = logp.detach() - logp_old
    surrogate = check.clip(change.exp(), 1 - clip_low, 1 + clip_high) * psi * logp
    check.finite(surrogate + change, logp=logp, logp_old=logp_old, psi=psi)
    return surrogate


def decoupled(
    logp: Float[Tensor, "*shape"],
    logp_old: Float[Tensor, "*shape"],
    logp_behavior: Float[Tensor, "*shape"],
    psi: Float[Tensor, "*shape"],
    clip_low: Scalar = 0.2,
    clip_high: Scalar = 0.2,
    cap: Scalar = 2.0,
) -> Float[Tensor, "*shape"]:
    """Three policies: min(cap, pi_old / pi_behavior) clipped_ratio(pi, pi_old), the sampler's weight truncated.

    Corrects for a sampler that is not pi_old (another engine's rounding, an older policy) while the trust region stays
    around pi_old. Biased by the cap and the clip; with neither binding, as `ratio` on pi_behavior's data.

    Source: Hilton et al. 2021 (arXiv:2110.00641) eq 2; the cap: Ionides 2008, truncated importance sampling.
    Units: those of psi. Raises: ValueError if cap <= 0, and as `clipped_ratio`.

    >>> decoupled(torch.zeros(2), torch.zeros(2), torch.tensor([0.5, 0.1]).log(), torch.ones(2))
    tensor([2., 2.])
    """
    check.positive(cap=cap)
    check.floats(0, logp_old=logp_old, logp_behavior=logp_behavior)
    change = (logp_old - logp_behavior).detach()
    check.finite(change, logp_old=logp_old, logp_behavior=logp_behavior)
    return check.clip(change.exp(), 0.0, cap) * clipped_ratio(logp, logp_old, psi, clip_low, clip_high)


def sequence_ratio(
    logp: Float[Tensor, "*batch time"],
    logp_old: Float[Tensor, "*batch time"],
    mask: Bool[Tensor, "*batch time"] | None = None,
    length_normalised: bool = False,
    log_clamp: Scalar = 20.0,
) -> Float[Tensor, "*batch"]:
    """Ratio of whole sequences: exp(sum_t (logp_t - logp_old_t)), or exp of the mean over tokens (GSPO).

    The exponent is clamped to +-log_clamp against overflow; a sequence beyond it carries no gradient. Weigh it with
    `clipped`, one psi per sequence.

    Source: S0 2.6 (last equation), S4 eq 3.10; length-normalised: Zheng et al. 2025 (arXiv:2507.18071) eq 7.
    Raises: ValueError on shapes that differ, log_clamp <= 0, NaN or infinite log-probabilities that count.

    >>> sequence_ratio(torch.tensor([0.5, 0.5]).log(), torch.tensor([0.25, 0.5]).log())
    tensor(2.)
    """
    check.floats(logp=logp, logp_old=logp_old)
    check.positive(log_clamp=log_clamp)
    change = logp - logp_old
    count: Tensor | int = logp.shape[-1]
    if mask is not None:
        check.boolean(logp.shape, mask=mask)
        change = change.masked_fill(~mask, 0.0)
        count = mask.sum(-1).clamp(min=1)
    total = change.sum(-1)
    check.finite(total, logp=logp, logp_old=logp_old)
    return check.clip(total / count if length_normalised else total, -log_clamp, log_clamp).exp()


def kl_penalised(
    surrogate: Float[Tensor, "*shape"], kl: Float[Tensor, "*shape"], beta: Scalar
) -> Float[Tensor, "*shape"]:
    """L - beta KL, per element.

    The direction is the caller's: KL[pi_old, pi] in TRPO and PPO (S2 eq 18 leaves it open), KL[pi, pi_ref] in S4
    eq 3.14.

    Source: S2 eq 18, S3 algorithm 10, S4 2.4.2, 3.14. Units: those of the surrogate; kl in nats.
    Raises: ValueError on shapes that differ, negative beta, NaN or infinity.

    >>> kl_penalised(torch.tensor([1.0]), torch.tensor([0.5]), beta=0.1)
    tensor([0.9500])
    """
    check.floats(0, surrogate=surrogate, kl=kl)
    check.within(0, math.inf, beta=beta)
    penalised = surrogate - beta * kl
    check.finite(penalised, surrogate=surrogate, kl=kl)
    return penalised


def entropy_bonus(
    surrogate: Float[Tensor, "*shape"], entropy: Float[Tensor, "*shape"], coef: Scalar
) -> Float[Tensor, "*shape"]:
    """L + coef H, per element: exploration.

    Source: S3 eq 26, S4 eq 2.18; for completions S4 3.3 ("My Thoughts"). Units: those of the surrogate; entropy in
    nats. Raises: as `kl_penalised`.

    >>> entropy_bonus(torch.tensor([1.0]), torch.tensor([0.5]), coef=0.1)
    tensor([1.0500])
    """
    check.floats(0, surrogate=surrogate, entropy=entropy)
    check.within(0, math.inf, coef=coef)
    total = surrogate + coef * entropy
    check.finite(total, surrogate=surrogate, entropy=entropy)
    return total


def clip_fraction(
    logp: Float[Tensor, "*shape"],
    logp_old: Float[Tensor, "*shape"],
    clip_low: Scalar,
    clip_high: Scalar,
    mask: Bool[Tensor, "*shape"] | None = None,
) -> Float[Tensor, ""]:
    """Share of the elements whose ratio lies outside [1 - clip_low, 1 + clip_high]: a diagnostic, without gradient.

    Source: OpenAI baselines ppo2; 37 PPO details ("debug variables"). Units: none.
    Raises: ValueError on shapes that differ, a negative clip, an empty mask.

    >>> clip_fraction(torch.tensor([1.5, 1.1, 0.7, 1.0]).log(), torch.zeros(4), 0.2, 0.2)
    tensor(0.5000)
    """
    check.floats(0, logp=logp, logp_old=logp_old)
    check.within(0, math.inf, clip_low=clip_low, clip_high=clip_high)
    rho = (logp.detach() - logp_old.detach()).exp()
    outside = ((rho < 1 - clip_low) | (rho > 1 + clip_high)).to(rho.dtype)
    if mask is None:
        return outside.mean()
    check.boolean(logp.shape, mask=mask)
    check.some(mask)
    return outside.masked_fill(~mask, 0.0).sum() / mask.sum()


def _pessimistic(
    ratios: Float[Tensor, "*shape"], psi: Float[Tensor, "*shape"], clip_low: Scalar, clip_high: Scalar
) -> Float[Tensor, "*shape"]:
    """min(rho Psi, clip(rho) Psi) as min(rho Psi, max((1 + clip_high) Psi, (1 - clip_low) Psi)).

    Inside the clip both are rho Psi, and of its two ends only the one on the side of Psi can be smaller: the same
    value and gradient in two thirds of the time (Achiam 2018, "Simplified PPO-Clip objective").
    """
    bound = torch.maximum(psi * (1 + clip_high), psi * (1 - clip_low))
    return (ratios * psi).clamp(max=bound)
