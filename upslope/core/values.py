"""Values: what a critic is fitted to, and how its error is measured (S3 eqs 11, 12, 21, 22; S4 2.4.4, 2.20-2.22).

Targets are detached: the parameters inside them are frozen (S3 eq 21 leaves phi live). Errors are per element and
minimised. Where `discounts` is 0 the next value is ignored and may be NaN. The last axis of `q` arguments is actions.
"""

import math

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from upslope.core import _checks as check
from upslope.core._checks import Scalar


def squared_error(values: Float[Tensor, "*shape"], targets: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """(v - target)^2, without a factor 1/2.

    So a coefficient of 0.5 here is Stable-Baselines3's 0.5 and CleanRL's 1.0. With `return_to_go` as target it is the
    Monte-Carlo fit (S3 eq 22), with `td_target` the TD fit (S3 eq 21).

    Source: S3 eqs 21, 22, 26; S4 eq 2.18. Units: the squared units of the rewards.
    Raises: ValueError on shapes that differ, NaN or infinite input.

    >>> squared_error(torch.tensor([1.0, 2.0]), torch.tensor([3.0, 2.0]))
    tensor([4., 0.])
    """
    check.floats(0, values=values, targets=targets)
    error = (values - targets).square()
    check.finite(error, values=values, targets=targets)
    return error


def huber(
    values: Float[Tensor, "*shape"], targets: Float[Tensor, "*shape"], threshold: Scalar = 1.0
) -> Float[Tensor, "*shape"]:
    """Huber: e^2 / 2 where |e| <= threshold, threshold (|e| - threshold / 2) beyond: a slope that never exceeds it.

    Source: S3 eq 12. Units: those of the rewards, squared (inside). Raises: ValueError if threshold <= 0, and as
    `squared_error`.

    >>> huber(torch.tensor([0.5, 3.0]), torch.zeros(2))
    tensor([0.1250, 2.5000])
    """
    check.floats(0, values=values, targets=targets)
    check.positive(threshold=threshold)
    error = (values - targets).abs()
    inside = error.clamp(max=threshold)
    loss = inside * (error - inside / 2)
    check.finite(loss, values=values, targets=targets)
    return loss


def clipped_squared_error(
    values: Float[Tensor, "*shape"],
    old_values: Float[Tensor, "*shape"],
    targets: Float[Tensor, "*shape"],
    clip: Scalar,
) -> Float[Tensor, "*shape"]:
    """PPO's value clipping: max((v - target)^2, (v_old + clip(v - v_old, +-clip) - target)^2), without a factor 1/2.

    No gradient once v has moved more than `clip` from v_old towards the target. The clip has the units of the rewards.

    Source: the 37 PPO details, no. 9 (baselines ppo2); S4 2.4.4 has the unclipped form. Units: as `squared_error`.
    Raises: ValueError on a negative clip, and as `squared_error`.

    >>> clipped_squared_error(torch.tensor([2.0, 2.0]), torch.zeros(2), torch.tensor([5.0, -5.0]), clip=0.5)
    tensor([20.2500, 49.0000])
    """
    check.floats(0, values=values, old_values=old_values, targets=targets)
    check.within(0, math.inf, clip=clip)
    near = old_values + check.clip(values - old_values, -clip, clip)
    error = torch.maximum((values - targets).square(), (near - targets).square())
    check.finite(error, values=values, old_values=old_values, targets=targets)
    return error


def proximal(parameters: Float[Tensor, " d"], anchor: Float[Tensor, " d"], kappa: Scalar) -> Float[Tensor, ""]:
    """kappa ||phi - phi_i||^2: keeps a refitted critic near the last one.

    Source: S3 eq 21 and algorithm 8. Raises: ValueError on shapes that differ, negative kappa, NaN or infinite input.

    >>> proximal(torch.tensor([1.0, 2.0]), torch.tensor([0.0, 0.0]), kappa=0.1)
    tensor(0.5000)
    """
    check.floats(parameters=parameters, anchor=anchor)
    check.within(0, math.inf, kappa=kappa)
    penalty = kappa * (parameters - anchor.detach()).square().sum()
    check.finite(penalty, parameters=parameters, anchor=anchor)
    return penalty


def td_target(
    rewards: Float[Tensor, "*shape"], next_values: Float[Tensor, "*shape"], discounts: Float[Tensor, "*shape"]
) -> Float[Tensor, "*shape"]:
    """One-step target: r + d v(s'), frozen.

    Source: S3 eqs 11 (its indices corrected), 21; S4 eq 2.22 with its missing (1 - terminated). Units: the rewards'.
    Raises: ValueError on shapes that differ, a NaN or infinite reward, value or discount.

    >>> td_target(torch.ones(2), 8 * torch.ones(2), torch.tensor([0.5, 0.0]))
    tensor([5., 1.])
    """
    check.floats(0, rewards=rewards, next_values=next_values, discounts=discounts)
    ahead = next_values.detach().masked_fill(discounts == 0, 0.0)
    target = torch.addcmul(rewards, discounts, ahead)
    check.finite(target, rewards=rewards, next_values=ahead, discounts=discounts)
    return target


def q_target(
    rewards: Float[Tensor, "*batch"], next_q: Float[Tensor, "*batch actions"], discounts: Float[Tensor, "*batch"]
) -> Float[Tensor, "*batch"]:
    """Q-learning: r + d max_a Q(s', a). Too high on average where Q errs: the maximum of errors.

    Source: S3 algorithms 4 and 6; Watkins 1989. Units: the rewards'. Raises: as `td_target`.

    >>> q_target(torch.ones(1), torch.tensor([[2.0, 4.0]]), torch.tensor([0.5]))
    tensor([3.])
    """
    return td_target(rewards, next_q.amax(-1), discounts)


def double_q_target(
    rewards: Float[Tensor, "*batch"],
    next_q_online: Float[Tensor, "*batch actions"],
    next_q_target: Float[Tensor, "*batch actions"],
    discounts: Float[Tensor, "*batch"],
) -> Float[Tensor, "*batch"]:
    """Double Q: r + d Q_target(s', argmax_a Q_online(s', a)): one table chooses, the other judges.

    Source: S3 6.2.4.1; van Hasselt et al. 2016 (arXiv:1509.06461) eq 4. Units: the rewards'. Raises: as `td_target`.

    >>> double_q_target(torch.ones(1), torch.tensor([[2.0, 4.0]]), torch.tensor([[9.0, 6.0]]), torch.tensor([0.5]))
    tensor([4.])
    """
    check.floats(next_q_online=next_q_online, next_q_target=next_q_target)
    check.beneath(next_q_online=next_q_online, discounts=discounts)
    ended = (discounts == 0).unsqueeze(-1)
    online, judge = next_q_online.masked_fill(ended, 0.0), next_q_target.masked_fill(ended, 0.0)
    check.finite(online + judge, next_q_online=online, next_q_target=judge)
    return td_target(rewards, action_value(next_q_target, next_q_online.argmax(-1)), discounts)


def expected_target(
    rewards: Float[Tensor, "*batch"],
    next_q: Float[Tensor, "*batch actions"],
    next_probs: Float[Tensor, "*batch actions"],
    discounts: Float[Tensor, "*batch"],
) -> Float[Tensor, "*batch"]:
    """Expected Sarsa: r + d sum_a pi(a|s') Q(s', a).

    Source: Sutton & Barto 6.6; the Bellman equation of S3 eq 3 and of S4's closing box (V at s_{t+1}, not s_t).
    Units: the rewards'. Raises: as `td_target`.

    >>> expected_target(torch.ones(1), torch.tensor([[2.0, 4.0]]), torch.tensor([[0.5, 0.5]]), torch.tensor([0.5]))
    tensor([2.5000])
    """
    check.floats(next_q=next_q, next_probs=next_probs)
    return td_target(rewards, (next_probs * next_q).sum(-1), discounts)


def soft_value(
    q1: Float[Tensor, "*shape"], q2: Float[Tensor, "*shape"], logp: Float[Tensor, "*shape"], alpha: Scalar
) -> Float[Tensor, "*shape"]:
    """Soft state value by one action: min(Q1, Q2) - alpha log pi. Not detached: negated, it is SAC's actor loss.

    Source: S4 eqs 2.20, 2.24, A.8, with the alpha and the second Q that they drop; Haarnoja et al. 2018
    (arXiv:1801.01290) eq 3. Units: the rewards'; alpha in reward per nat. Raises: ValueError on shapes that differ,
    negative alpha, NaN or infinite input.

    >>> soft_value(torch.tensor([3.0]), torch.tensor([2.0]), torch.tensor([-1.0]), alpha=0.5)
    tensor([2.5000])
    """
    check.floats(0, q1=q1, q2=q2, logp=logp)
    check.within(0, math.inf, alpha=alpha)
    value = torch.minimum(q1, q2) - alpha * logp
    check.finite(value + torch.maximum(q1, q2), q1=q1, q2=q2, logp=logp)
    return value


def soft_target(
    rewards: Float[Tensor, "*shape"],
    next_q1: Float[Tensor, "*shape"],
    next_q2: Float[Tensor, "*shape"],
    next_logp: Float[Tensor, "*shape"],
    alpha: Scalar,
    discounts: Float[Tensor, "*shape"],
) -> Float[Tensor, "*shape"]:
    """SAC without V: r + d [min(Q1', Q2') - alpha log pi(a'|s')], a' ~ pi, frozen.

    Source: S4 eqs 2.22, A.7, A.8 and 2.5.3 (Stable-Baselines3's form); Haarnoja et al. 2018 (arXiv:1812.05905) eq 5.
    Units: the rewards'. Raises: as `soft_value`.

    >>> one = torch.ones(1)
    >>> soft_target(one, 3 * one, 2 * one, -one, 0.5, 0.5 * one)
    tensor([2.2500])
    """
    check.floats(0, next_q1=next_q1, next_q2=next_q2, next_logp=next_logp, discounts=discounts)
    ended = discounts == 0
    q1, q2, logp = (x.masked_fill(ended, 0.0) for x in (next_q1, next_q2, next_logp))
    following = soft_value(q1, q2, logp, alpha)
    return td_target(rewards, following, discounts)


def softmax_value(q: Float[Tensor, "*batch actions"], alpha: Scalar) -> Float[Tensor, "*batch"]:
    """Soft maximum: alpha log sum_a exp(Q(s, a) / alpha), the value of the policy proportional to exp(Q / alpha).

    Tends to max_a Q as alpha tends to 0, which is taken as its value there.

    Source: the normaliser of S4 eq A.9, with its alpha; Haarnoja et al. 2017 (arXiv:1702.08165) eq 4. Units: the
    rewards'. Raises: ValueError on negative alpha, NaN or infinite input.

    >>> softmax_value(torch.zeros(2), alpha=2.0)  # 2 ln 2
    tensor(1.3863)
    """
    check.floats(q=q)
    check.within(0, math.inf, alpha=alpha)
    exact = isinstance(alpha, (int, float)) and alpha == 0
    value = q.amax(-1) if exact else alpha * torch.logsumexp(q / alpha, -1)
    check.finite(value, q=q)
    return value


def soft_q_target(
    rewards: Float[Tensor, "*batch"],
    next_q: Float[Tensor, "*batch actions"],
    alpha: Scalar,
    discounts: Float[Tensor, "*batch"],
) -> Float[Tensor, "*batch"]:
    """Soft Q-learning: r + d alpha log sum_a exp(Q(s', a) / alpha), frozen.

    Source: Haarnoja et al. 2017 (arXiv:1702.08165) eq 3; S4 A.7-A.9. Units: the rewards'. Raises: as `softmax_value`.

    >>> soft_q_target(torch.ones(1), torch.zeros(1, 2), 2.0, torch.tensor([0.5]))
    tensor([1.6931])
    """
    check.beneath(next_q=next_q, discounts=discounts)
    following = softmax_value(next_q.masked_fill((discounts == 0).unsqueeze(-1), 0.0), alpha)
    return td_target(rewards, following, discounts)


def action_value(q: Float[Tensor, "*batch actions"], actions: Int64[Tensor, "*batch"]) -> Float[Tensor, "*batch"]:
    """Q(s, a) of the action taken.

    Source: S4 table 2.2 (Psi = Q). Units: those of q.
    Raises: ValueError if `actions` has not the shape of q without its last axis, or is not int64.

    >>> action_value(torch.tensor([[2.0, 4.0]]), torch.tensor([1]))
    tensor([4.])
    """
    if actions.shape != q.shape[:-1] or actions.dtype != torch.int64:
        raise ValueError(f"actions must be int64 of shape {list(q.shape[:-1])}, got {check.describe(actions)}")
    return q.gather(-1, actions.unsqueeze(-1)).squeeze(-1)


def dueling(
    values: Float[Tensor, "*batch"], advantages: Float[Tensor, "*batch actions"]
) -> Float[Tensor, "*batch actions"]:
    """Dueling heads: Q(s, a) = V(s) + A(s, a) - mean_a A(s, a).

    Source: S3 6.2.4.3; Wang et al. 2016 (arXiv:1511.06581) eq 9. Units: the rewards'.
    Raises: ValueError on shapes that do not fit, NaN or infinite input.

    >>> dueling(torch.tensor([1.0]), torch.tensor([[0.0, 2.0]]))
    tensor([[0., 2.]])
    """
    check.beneath(advantages=advantages, values=values)
    q = values.unsqueeze(-1) + advantages - advantages.mean(-1, keepdim=True)
    check.finite(q, values=values, advantages=advantages)
    return q


def polyak(target: Float[Tensor, "*shape"], online: Float[Tensor, "*shape"], tau: Scalar) -> Float[Tensor, "*shape"]:
    """Polyak averaging: (1 - tau) target + tau online. tau = 1 copies, tau = 0 keeps.

    Source: S4 algorithm 3; Lillicrap et al. 2016 (arXiv:1509.02971). Raises: ValueError if tau is not in [0, 1], on
    shapes that differ, NaN or infinite input.

    >>> polyak(torch.tensor([0.0]), torch.tensor([2.0]), tau=0.25)
    tensor([0.5000])
    """
    check.floats(0, target=target, online=online)
    check.within(0, 1, tau=tau)
    average = torch.lerp(target, online.detach(), tau)
    check.finite(average, target=target, online=online)
    return average
