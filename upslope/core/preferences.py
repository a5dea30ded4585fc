"""Preferences: losses over comparisons, and the reward that a policy implies (S4 3.2.1, 3.3.1, 3.4). Minimised."""

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import logsigmoid

from upslope.core import _checks as check
from upslope.core._checks import Scalar


def bradley_terry(chosen: Float[Tensor, "*pairs"], rejected: Float[Tensor, "*pairs"]) -> Float[Tensor, "*pairs"]:
    """Pairwise loss: -log sigma(r_chosen - r_rejected), per pair.

    Source: S4 eq 3.1; Stiennon et al. 2020 (arXiv:2009.01325); Bradley & Terry 1952. Units: nats; rewards in nats of
    odds. Raises: ValueError on shapes that differ, NaN or infinite rewards.

    >>> bradley_terry(torch.tensor([1.0]), torch.tensor([1.0]))  # ln 2
    tensor([0.6931])
    """
    check.floats(0, chosen=chosen, rejected=rejected)
    loss = -logsigmoid(chosen - rejected)
    check.finite(loss, chosen=chosen, rejected=rejected)
    return loss


def ranking(rewards: Float[Tensor, "*prompts completions"]) -> Float[Tensor, "*prompts"]:
    """K-way ranking loss: mean over the C(K,2) pairs i < j of -log sigma(r_i - r_j), best completion first.

    All pairs of a prompt are in one loss, so that a completion is not fitted K - 1 times over (S4 3.3.1).

    Source: Ouyang et al. 2022 (arXiv:2203.02155) eq 1; S4 3.3.1. Units: nats. For ties use `bradley_terry` on the pairs
    that differ. Raises: ValueError for fewer than 2 completions, NaN or infinite rewards.

    >>> ranking(torch.tensor([1.0, 1.0, 1.0]))
    tensor(0.6931)
    """
    check.floats(rewards=rewards)
    size = rewards.shape[-1]
    if size < 2:
        raise ValueError(f"rewards must rank at least 2 completions, got {check.describe(rewards)}")
    better, worse = torch.triu_indices(size, size, offset=1, device=rewards.device)
    return bradley_terry(rewards[..., better], rewards[..., worse]).mean(-1)


def implicit_reward(
    logp: Float[Tensor, "*batch"], logp_ref: Float[Tensor, "*batch"], beta: Scalar
) -> Float[Tensor, "*batch"]:
    """The reward that a policy implies: beta log(pi / pi_ref), up to a constant of the prompt, beta log Z(x).

    Log-probabilities of whole completions. Its mean under pi is beta KL[pi, pi_ref]: maximising it raises the KL
    (S4 3.4.2 says it ends at 0).

    Source: S4 eq 3.7; Rafailov et al. 2023 (arXiv:2305.18290) eq 5. Units: the reward's; beta in reward per nat.
    Raises: ValueError on shapes that differ, beta <= 0, NaN or infinite log-probabilities.

    >>> implicit_reward(torch.tensor([-1.0]), torch.tensor([-3.0]), beta=0.1)
    tensor([0.2000])
    """
    check.floats(0, logp=logp, logp_ref=logp_ref)
    check.positive(beta=beta)
    reward = beta * (logp - logp_ref)
    check.finite(reward, logp=logp, logp_ref=logp_ref)
    return reward


def dpo(
    logp_chosen: Float[Tensor, "*pairs"],
    logp_rejected: Float[Tensor, "*pairs"],
    logp_ref_chosen: Float[Tensor, "*pairs"],
    logp_ref_rejected: Float[Tensor, "*pairs"],
    beta: Scalar,
    label_smoothing: Scalar = 0.0,
) -> Float[Tensor, "*pairs"]:
    """DPO: -log sigma(m), m the margin of implicit rewards; smoothed by e: -(1-e) log sigma(m) - e log sigma(-m).

    Source: S4 eq 3.8; Rafailov et al. 2023 (arXiv:2305.18290) eq 7; smoothing: Mitchell 2023 (conservative DPO).
    Units: nats. Raises: ValueError on shapes that differ, beta <= 0, smoothing not in [0, 1/2], NaN or infinity.

    >>> same = torch.tensor([-1.0])
    >>> dpo(same, same, same, same, beta=0.1)
    tensor([0.6931])
    """
    check.within(0, 0.5, label_smoothing=label_smoothing)
    chosen = implicit_reward(logp_chosen, logp_ref_chosen, beta)
    rejected = implicit_reward(logp_rejected, logp_ref_rejected, beta)
    kept, flipped = bradley_terry(chosen, rejected), bradley_terry(rejected, chosen)
    return (1 - label_smoothing) * kept + label_smoothing * flipped


def ipo(
    logp_chosen: Float[Tensor, "*pairs"],
    logp_rejected: Float[Tensor, "*pairs"],
    logp_ref_chosen: Float[Tensor, "*pairs"],
    logp_ref_rejected: Float[Tensor, "*pairs"],
    beta: Scalar,
) -> Float[Tensor, "*pairs"]:
    """IPO: (h - 1/(2 beta))^2, h = log-ratio margin (without beta): the margin has a goal and stops there.

    Source: Azar et al. 2023 (arXiv:2310.12036) eq 17. Units: nats squared; beta is that paper's tau, per nat.
    Raises: as `dpo`.

    >>> ipo(torch.tensor([-1.0]), torch.tensor([-6.0]), torch.zeros(1), torch.zeros(1), beta=0.1)
    tensor([0.])
    """
    h = implicit_reward(logp_chosen, logp_ref_chosen, 1.0) - implicit_reward(logp_rejected, logp_ref_rejected, 1.0)
    check.positive(beta=beta)
    check.floats(0, logp_chosen=logp_chosen, logp_rejected=logp_rejected)
    return (h - 1 / (2 * beta)).square()


def preference_probability(
    chosen: Float[Tensor, "*pairs"], rejected: Float[Tensor, "*pairs"]
) -> Float[Tensor, "*pairs"]:
    """Bradley-Terry: p(chosen over rejected) = exp(r_c) / (exp(r_c) + exp(r_r)) = sigma(r_c - r_r).

    Source: S4 eq 3.4. Raises: ValueError on shapes that differ, NaN or infinite rewards.

    >>> preference_probability(torch.tensor([1.0986123]), torch.tensor([0.0]))  # ln 3
    tensor([0.7500])
    """
    check.floats(0, chosen=chosen, rejected=rejected)
    probability = (chosen - rejected).sigmoid()
    check.finite(probability, chosen=chosen, rejected=rejected)
    return probability


def tilted(
    logp_ref: Float[Tensor, "*batch outcomes"], rewards: Float[Tensor, "*batch outcomes"], beta: Scalar
) -> Float[Tensor, "*batch outcomes"]:
    """Log-probabilities of the policy that maximises E[r] - beta KL[pi, pi_ref]: log pi_ref + r/beta - log Z.

    Over an enumerated set of outcomes: the ground truth that DPO must find.

    Source: S4 eqs 3.5, 3.6; Rafailov et al. 2023 (arXiv:2305.18290) eq 4. Units: nats. Raises: ValueError on shapes
    that differ, beta <= 0, NaN or infinite input.

    >>> tilted(torch.zeros(2), torch.tensor([1.0986123, 0.0]), beta=1.0).exp()
    tensor([0.7500, 0.2500])
    """
    check.floats(logp_ref=logp_ref, rewards=rewards)
    check.positive(beta=beta)
    logp = (logp_ref + rewards / beta).log_softmax(-1)
    check.finite(logp, logp_ref=logp_ref, rewards=rewards)
    return logp


def centred(
    rewards: Float[Tensor, "*batch"], reference_rewards: Float[Tensor, " references"]
) -> Float[Tensor, "*batch"]:
    """Reward normalised so that the reference completions score 0 on average: r - mean(r_ref).

    A shift is all that comparisons leave open, so nothing else is changed.

    Source: S4 3.2.2, 3.3.1; Stiennon et al. 2020; Ouyang et al. 2022. Units: the reward's.
    Raises: ValueError without references, NaN or infinite rewards.

    >>> centred(torch.tensor([3.0, 5.0]), torch.tensor([1.0, 2.0]))
    tensor([1.5000, 3.5000])
    """
    check.floats(0, rewards=rewards)
    check.floats(reference_rewards=reference_rewards)
    if reference_rewards.numel() == 0:
        raise ValueError("reference_rewards must hold at least one reward, got none")
    normalised = rewards - reference_rewards.mean()
    check.finite(normalised, rewards=rewards, reference_rewards=reference_rewards)
    return normalised
