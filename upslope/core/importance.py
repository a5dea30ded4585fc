"""Importance weights: the policy gradient of pi from data of another policy mu (S4 2.2.5, A.1; S2 2.1).

Each form returns a detached Psi: weigh grad log pi with it, on data of mu. w_t = pi(a_t|s_t) / mu(a_t|s_t); products
restart at episode ends. The rewards are summed as in `returns.py`: `trajectory` with the discounts from the episode's
start, the others from t on, so that the discounted objective asks for another factor `returns.elapsed_discount`.
No value is bootstrapped: what lies beyond the data counts 0.

    form                S4           unbiased?
    trajectory          2.9          yes
    causal              2.10         yes (as corrected: the inner product starts after t, as in A.3)
    simplified_causal   2.11, A.6    no: drops the later actions' weights (S4 writes "=")
    first_order         2.13         no: keeps only this action's weight, so the states stay mu's
"""

import torch
from jaxtyping import Float
from torch import Tensor

from upslope.core import _checks as check
from upslope.core._checks import Scalar
from upslope.core._scan import scan, scan_forward
from upslope.core.returns import return_to_go, total_return


def trajectory(
    logp: Float[Tensor, "*batch time"],
    logp_behavior: Float[Tensor, "*batch time"],
    rewards: Float[Tensor, "*batch time"],
    discounts: Float[Tensor, "*batch time"],
    continues: Float[Tensor, "*batch time"],
) -> Float[Tensor, "*batch time"]:
    """Whole-trajectory weight: Psi_t = (prod over the episode of w) R(tau). Unbiased; variance grows with the length.

    Every row starts with an episode's first step.

    Source: S2 eq 16, S3 eq 16, S4 eq 2.9. Units: those of the rewards.
    Raises: ValueError on shapes that differ, NaN or infinite input, weights that overflow.

    >>> zero, one = torch.zeros(2), torch.ones(2)
    >>> trajectory(torch.tensor([2.0, 3.0]).log(), zero, one, one, one)  # 2 * 3 * (1 + 1)
    tensor([12., 12.])
    """
    check.floats(logp=logp, logp_behavior=logp_behavior, rewards=rewards, discounts=discounts, continues=continues)
    log_weights = _log_weights(logp, logp_behavior)
    whole = _log_products(log_weights, continues) + scan(continues, log_weights) - log_weights
    psi = whole.exp() * total_return(rewards, torch.zeros_like(rewards), discounts, continues)
    check.finite(psi, rewards=rewards)
    return psi


def causal(
    logp: Float[Tensor, "*batch time"],
    logp_behavior: Float[Tensor, "*batch time"],
    rewards: Float[Tensor, "*batch time"],
    discounts: Float[Tensor, "*batch time"],
    continues: Float[Tensor, "*batch time"],
) -> Float[Tensor, "*batch time"]:
    """Causal: Psi_t = (prod_{j<=t} w_j) sum_{k>=t} gamma^{k-t} (prod_{t<j<=k} w_j) r_k. Unbiased.

    A reward carries the weights of the actions up to it, none of the later ones.

    Source: S4 eq 2.10 with its inner product from t+1 (printed from t, it counts w_t twice), A.3; Precup et al. 2000.
    Units: those of the rewards. Raises: as `trajectory`.

    >>> zero, one = torch.zeros(2), torch.ones(2)
    >>> causal(torch.tensor([2.0, 3.0]).log(), zero, one, one, one)  # 2 (1 + 3 * 1), 6 * 1
    tensor([8., 6.])
    """
    check.floats(logp=logp, logp_behavior=logp_behavior, rewards=rewards, discounts=discounts, continues=continues)
    log_weights = _log_weights(logp, logp_behavior)
    # r_k stands behind w_{t+1} ... w_k, and the recurrence multiplies step t+1 as a whole: fold w into the discount.
    following = torch.cat([log_weights[..., 1:], torch.zeros_like(log_weights[..., :1])], -1).exp()
    to_go = scan(discounts * continues * following, rewards)
    psi = _log_products(log_weights, continues).exp() * to_go
    check.finite(psi, rewards=rewards, discounts=discounts, continues=continues, weights=following)
    return psi


def simplified_causal(
    logp: Float[Tensor, "*batch time"],
    logp_behavior: Float[Tensor, "*batch time"],
    rewards: Float[Tensor, "*batch time"],
    discounts: Float[Tensor, "*batch time"],
    continues: Float[Tensor, "*batch time"],
) -> Float[Tensor, "*batch time"]:
    """Simplified causal: Psi_t = (prod_{j<=t} w_j) G_t. Biased: rewards to come are those of mu's later actions.

    Its expectation is that of grad log pi times mu's action value, on pi's states.

    Source: S4 eqs 2.11, A.6. Units: those of the rewards. Raises: as `trajectory`.

    >>> zero, one = torch.zeros(2), torch.ones(2)
    >>> simplified_causal(torch.tensor([2.0, 3.0]).log(), zero, one, one, one)  # 2 (1 + 1), 6 * 1
    tensor([4., 6.])
    """
    check.floats(logp=logp, logp_behavior=logp_behavior, rewards=rewards)
    log_weights = _log_weights(logp, logp_behavior)
    to_go = return_to_go(rewards, torch.zeros_like(rewards), discounts, continues)
    psi = _log_products(log_weights, continues).exp() * to_go
    check.finite(psi, rewards=rewards)
    return psi


def first_order(
    logp: Float[Tensor, "*shape"], logp_behavior: Float[Tensor, "*shape"], q: Float[Tensor, "*shape"]
) -> Float[Tensor, "*shape"]:
    """First order: Psi_t = w_t Q_t. Biased: the states are mu's. Its surrogate is `surrogates.ratio`.

    Exact in the first order of pi - mu when Q is mu's.

    Source: S2 eqs 16-17, S4 eq 2.13 (neither says that the state distribution is replaced too). Units: those of q.
    Raises: as `trajectory`.

    >>> first_order(torch.tensor([2.0]).log(), torch.zeros(1), torch.tensor([5.0]))
    tensor([10.])
    """
    check.floats(0, logp=logp, logp_behavior=logp_behavior, q=q)
    psi = _log_weights(logp, logp_behavior).exp() * q
    check.finite(psi, q=q)
    return psi


def truncated(
    logp: Float[Tensor, "*shape"], logp_behavior: Float[Tensor, "*shape"], cap: Scalar
) -> Float[Tensor, "*shape"]:
    """Truncated weight: min(cap, pi / mu), detached. Variance bounded by cap^2; biased where the cap binds.

    Source: Ionides 2008; Munos et al. 2016 (Retrace, arXiv:1606.02647). Units: none.
    Raises: ValueError if cap <= 0, on shapes that differ, NaN or infinite log-probabilities.

    >>> truncated(torch.tensor([2.0, 0.5]).log(), torch.zeros(2), cap=1.5)
    tensor([1.5000, 0.5000])
    """
    check.floats(0, logp=logp, logp_behavior=logp_behavior)
    check.positive(cap=cap)
    return check.clip(_log_weights(logp, logp_behavior).exp(), 0.0, cap)


def effective_sample_size(log_weights: Float[Tensor, "*batch samples"]) -> Float[Tensor, "*batch"]:
    """Effective sample size: (sum w)^2 / sum w^2, between 1 and the number of samples. Weights may be unnormalised.

    Source: Kong 1992. Units: samples. Raises: ValueError without samples, on NaN or infinite log-weights.

    >>> effective_sample_size(torch.tensor([[0.0, 0.0], [0.0, -100.0]]))
    tensor([2., 1.])
    """
    check.floats(log_weights=log_weights)
    if log_weights.shape[-1] == 0:
        raise ValueError(f"log_weights must hold at least one sample, got {check.describe(log_weights)}")
    check.finite(log_weights, log_weights=log_weights)
    weights = (log_weights - log_weights.amax(-1, keepdim=True)).exp()
    return weights.sum(-1).square() / weights.square().sum(-1)


def _log_weights(logp: Tensor, logp_behavior: Tensor) -> Tensor:
    log_weights = (logp - logp_behavior).detach()
    check.finite(log_weights, logp=logp, logp_behavior=logp_behavior)
    return log_weights


def _log_products(log_weights: Tensor, continues: Tensor) -> Tensor:
    """log prod_{j<=t} w_j from the episode's first step to t."""
    carried = torch.cat([torch.zeros_like(continues[..., :1]), continues[..., :-1]], -1)
    return scan_forward(carried, log_weights)
