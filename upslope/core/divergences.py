"""Kullback-Leibler divergences, exact and by samples (S4 2.1; Schulman 2020, joschu.net/blog/kl-approx.html).

KL[q, p] = E_q[log q - log p], in nats. The estimators take the two log-probabilities of a sample x ~ q; r = p(x)/q(x).
To estimate KL[pi_old, pi] from data of pi_old call `k3(logp_old, logp)`; for KL[pi, pi_ref] on data of pi,
`k3(logp, logp_ref)`.

What each does to a gradient when q = pi_theta is the sampler itself (proved in tests/core/test_divergences.py):

    placed in     k1                 k2                 k3
    the reward    grad KL[q, p]      (biased)           grad KL[q, p] - grad KL[p, q]
    the loss      0                  grad KL[q, p]      grad KL[p, q]

"In the reward" is detached and weights grad log q; "in the loss" is differentiated. On data of an older policy every
entry needs the factor pi_theta / pi_old; without it the entries change (S4 A.3.2 omits it).
"""

import torch
from jaxtyping import Float
from torch import Tensor

from upslope.core import _checks as check


def k1(logp_q: Float[Tensor, "*shape"], logp_p: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """k1 = log q - log p = -log r. Unbiased for KL[q, p], the largest variance, may be negative.

    Gradient, x ~ q = pi_theta: in the reward it is exactly that of KL[q, p]; in the loss its expectation is 0
    (the expected score), so it regularises nothing.

    Source: S4 2.1.2; S0 2.6. Units: nats. Raises: ValueError on shapes that differ, NaN or infinite input.

    >>> k1(torch.tensor([-1.0]), torch.tensor([-3.0]))
    tensor([2.])
    """
    check.floats(0, logp_q=logp_q, logp_p=logp_p)
    estimate = logp_q - logp_p
    check.finite(estimate, logp_q=logp_q, logp_p=logp_p)
    return estimate


def k2(logp_q: Float[Tensor, "*shape"], logp_p: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """k2 = (log r)^2 / 2. Never negative, biased in value (0.0025 of KL at N(0,1) against N(0.1,1); 0.25 at N(1,1)).

    Gradient, x ~ q = pi_theta: in the loss it is exactly that of KL[q, p], unbiased although the value is not;
    in the reward it is that of no divergence (in general neither KL).

    Source: S4 2.1.2. Units: nats. Raises: as `k1`.

    >>> k2(torch.tensor([-1.0]), torch.tensor([-3.0]))
    tensor([2.])
    """
    return k1(logp_q, logp_p).square() / 2


def k3(logp_q: Float[Tensor, "*shape"], logp_p: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """k3 = (r - 1) - log r. Unbiased for KL[q, p], never negative, often the least variance; heavy where p >> q.

    Gradient, x ~ q = pi_theta: in the loss (GRPO's place) it is that of KL[p, q], the other direction; in the reward
    grad KL[q, p] - grad KL[p, q].

    Source: S4 eqs 2.2, 3.13 (with q = pi_theta, p = pi_ref). Units: nats. Raises: as `k1`, and if r overflows.

    >>> k3(torch.tensor([-1.0]), torch.tensor([-1.6931472]))  # r = 1/2
    tensor([0.1931])
    """
    log_r = -k1(logp_q, logp_p)
    # expm1 keeps the digits that exp(log_r) - 1 loses where the policies nearly agree.
    estimate = torch.expm1(log_r) - log_r
    check.finite(estimate, logp_q=logp_q, logp_p=logp_p)
    return estimate


def reverse_k3(logp_q: Float[Tensor, "*shape"], logp_p: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """r log r - (r - 1): estimates KL[p, q], the reverse direction, from the same x ~ q. Unbiased, never negative.

    Gradient, x ~ q = pi_theta, in the loss: that of minus E_q[log r grad r - ...]; see the tests for its exact form.

    Source: S4 eq 2.3. Units: nats. Raises: as `k3`.

    >>> reverse_k3(torch.tensor([-1.0]), torch.tensor([-1.6931472]))  # r = 1/2
    tensor([0.1534])
    """
    log_r = -k1(logp_q, logp_p)
    estimate = log_r.exp() * log_r - torch.expm1(log_r)
    check.finite(estimate, logp_q=logp_q, logp_p=logp_p)
    return estimate


def categorical_kl(
    logits_q: Float[Tensor, "*batch categories"], logits_p: Float[Tensor, "*batch categories"]
) -> Float[Tensor, "*batch"]:
    """KL[q, p] = sum_x q(x) (log q(x) - log p(x)) of two categoricals given by unnormalised logits.

    A category that q gives no probability (logit -inf, an action masked out) adds nothing; one that only p excludes
    makes the divergence infinite, which is refused.

    Source: S4 eq 2.1. Units: nats. Raises: ValueError on shapes that differ, NaN, or p = 0 where q > 0.

    >>> categorical_kl(torch.tensor([0.5, 0.5]).log(), torch.tensor([0.25, 0.75]).log())  # ln 2 / 2 - ln 1.5 / 2
    tensor(0.1438)
    """
    check.floats(logits_q=logits_q, logits_p=logits_p)
    log_q, log_p = logits_q.log_softmax(-1), logits_p.log_softmax(-1)
    impossible = log_q == float("-inf")
    # Filled on both sides before the subtraction: -inf - -inf would poison the gradient even where masked afterwards.
    difference = log_q.masked_fill(impossible, 0.0) - log_p.masked_fill(impossible, 0.0)
    divergence = (log_q.exp() * difference).sum(-1)
    check.finite(divergence, logits_q=logits_q.masked_fill(impossible, 0.0), logits_p=logits_p)
    return divergence


def gaussian_kl(
    mean_q: Float[Tensor, "*batch dim"],
    log_std_q: Float[Tensor, "*batch dim"],
    mean_p: Float[Tensor, "*batch dim"],
    log_std_p: Float[Tensor, "*batch dim"],
) -> Float[Tensor, "*batch"]:
    """KL[q, p] of diagonal Gaussians: sum_i log(s_p/s_q) + (s_q^2 + (m_q - m_p)^2) / (2 s_p^2) - 1/2.

    Also the divergence of the two after one invertible squashing (tanh): KL does not change under it.

    Source: S4 eq 2.1 for normals. Units: nats. Raises: ValueError on shapes that differ, NaN or infinite input.

    >>> zero, one = torch.zeros(1), torch.ones(1)
    >>> gaussian_kl(zero, zero, one, zero)
    tensor(0.5000)
    """
    check.floats(mean_q=mean_q, log_std_q=log_std_q, mean_p=mean_p, log_std_p=log_std_p)
    log_ratio = log_std_q - log_std_p
    shift = (mean_q - mean_p) * torch.exp(-log_std_p)
    # (s_q/s_p)^2 - 1 by expm1: the term that cancels when the two nearly agree.
    divergence = ((torch.expm1(2 * log_ratio) + shift.square()) / 2 - log_ratio).sum(-1)
    check.finite(divergence, mean_q=mean_q, log_std_q=log_std_q, mean_p=mean_p, log_std_p=log_std_p)
    return divergence
