"""Preference losses: gradients, all pairs, and the reward that DPO finds."""

import itertools

import numpy as np
import pytest
import torch

from upslope.core import preferences


def doubles(*values):
    return torch.tensor(values, dtype=torch.float64)


def test_bradley_terry_by_hand_and_its_gradient():
    """-log sigma(d); its slope is -(1 - sigma(d)) = -p(the other is preferred)."""
    chosen, rejected = doubles(2.0, -1.0, 60.0).requires_grad_(), doubles(1.0, 3.0, -900.0).requires_grad_()
    loss = preferences.bradley_terry(chosen, rejected)
    d = np.array([1.0, -4.0, 960.0])
    np.testing.assert_allclose(loss.detach(), np.logaddexp(0, -d), rtol=1e-12)
    loss.sum().backward()
    np.testing.assert_allclose(chosen.grad, -np.exp(-np.logaddexp(0, d)), rtol=1e-12, atol=1e-300)
    torch.testing.assert_close(rejected.grad, -chosen.grad)
    found = preferences.preference_probability(chosen.detach(), rejected.detach())
    np.testing.assert_allclose(found, np.exp(-np.logaddexp(0, -d)), rtol=1e-12)


@pytest.mark.parametrize("size", [2, 3, 5, 9])
def test_ranking_is_the_mean_of_all_pairs(size):
    rewards = torch.randn(4, size, generator=torch.manual_seed(0), dtype=torch.float64)
    pairs = list(itertools.combinations(range(size), 2))
    wanted = sum(preferences.bradley_terry(rewards[:, i], rewards[:, j]) for i, j in pairs) / len(pairs)
    torch.testing.assert_close(preferences.ranking(rewards), wanted, rtol=1e-12, atol=1e-12)
    assert torch.autograd.gradcheck(preferences.ranking, rewards[:1].requires_grad_())


def test_ranking_prefers_the_given_order():
    best_first = preferences.ranking(doubles(3.0, 1.0, -2.0))
    for order in itertools.permutations((3.0, 1.0, -2.0)):
        assert preferences.ranking(doubles(*order)) >= best_first


LOGPS = [torch.randn(6, generator=torch.manual_seed(seed), dtype=torch.float64) for seed in range(4)]


def test_dpo_is_bradley_terry_on_implicit_rewards():
    chosen = preferences.implicit_reward(LOGPS[0], LOGPS[2], 0.3)
    rejected = preferences.implicit_reward(LOGPS[1], LOGPS[3], 0.3)
    np.testing.assert_allclose(chosen, 0.3 * (LOGPS[0] - LOGPS[2]))
    margin = (chosen - rejected).numpy()
    np.testing.assert_allclose(preferences.dpo(*LOGPS, beta=0.3), np.logaddexp(0, -margin))
    smooth = 0.9 * np.logaddexp(0, -margin) + 0.1 * np.logaddexp(0, margin)
    np.testing.assert_allclose(preferences.dpo(*LOGPS, beta=0.3, label_smoothing=0.1), smooth)
    # Smoothing by one half: both orders are equally likely, the loss is even in the margin.
    swapped = (LOGPS[1], LOGPS[0], LOGPS[3], LOGPS[2])
    even = preferences.dpo(*LOGPS, beta=0.3, label_smoothing=0.5)
    torch.testing.assert_close(even, preferences.dpo(*swapped, beta=0.3, label_smoothing=0.5))


def test_dpo_gradient():
    """-beta sigma(-margin) (grad logp_chosen - grad logp_rejected): DPO's gradient, below its eq 7."""
    leaves = [x.clone().requires_grad_() for x in LOGPS]
    preferences.dpo(*leaves, beta=0.3).sum().backward()
    margin = 0.3 * ((LOGPS[0] - LOGPS[2]) - (LOGPS[1] - LOGPS[3]))
    wanted = -0.3 * torch.sigmoid(-margin)
    torch.testing.assert_close(leaves[0].grad, wanted)
    torch.testing.assert_close(leaves[1].grad, -wanted)


def test_ipo():
    h = (LOGPS[0] - LOGPS[2]) - (LOGPS[1] - LOGPS[3])
    torch.testing.assert_close(preferences.ipo(*LOGPS, beta=0.3), (h - 1 / 0.6) ** 2)
    leaves = [x.clone().requires_grad_() for x in LOGPS]
    preferences.ipo(*leaves, beta=0.3).sum().backward()
    torch.testing.assert_close(leaves[0].grad, 2 * (h - 1 / 0.6))


def test_tilted_is_the_optimum_of_the_regularised_reward():
    logp_ref = doubles(0.2, -0.5, 1.0, 0.3).log_softmax(-1)
    rewards, beta = doubles(1.0, -1.0, 0.5, 2.0), 0.7
    best = preferences.tilted(logp_ref, rewards, beta)
    assert best.exp().sum().item() == pytest.approx(1)

    def objective(logits):
        logp = logits.log_softmax(-1)
        return (logp.exp() * (rewards - beta * (logp - logp_ref))).sum()

    assert torch.func.grad(objective)(best).abs().max() < 1e-12
    # Its value is beta log Z (S4 3.6).
    assert objective(best).item() == pytest.approx((beta * (logp_ref + rewards / beta).logsumexp(-1)).item())


def test_dpo_recovers_the_reward_that_generated_the_preferences():
    """Three prompts, four completions each, every pair with its exact Bradley-Terry probability: the implicit reward
    of the fitted policy is the true reward up to one constant per prompt, and the policy is the tilted optimum."""
    torch.manual_seed(0)
    beta = 0.5
    reward = torch.randn(3, 4, dtype=torch.float64)
    logp_ref = torch.randn(3, 4, dtype=torch.float64).log_softmax(-1)
    i, j = map(list, zip(*itertools.permutations(range(4), 2), strict=True))
    weight = preferences.preference_probability(reward[:, i], reward[:, j])
    theta = logp_ref.clone().requires_grad_()
    optimiser = torch.optim.LBFGS(
        [theta], max_iter=500, tolerance_grad=1e-13, tolerance_change=0, line_search_fn="strong_wolfe"
    )

    def loss():
        optimiser.zero_grad()
        logp = theta.log_softmax(-1)
        each = preferences.dpo(logp[:, i], logp[:, j], logp_ref[:, i], logp_ref[:, j], beta)
        total = (weight * each).sum()
        total.backward()
        return total

    optimiser.step(loss)
    logp = theta.detach().log_softmax(-1)
    offset = preferences.implicit_reward(logp, logp_ref, beta) - reward
    assert (offset - offset.mean(-1, keepdim=True)).abs().max() < 1e-5
    constant = -beta * (logp_ref + reward / beta).logsumexp(-1)  # -beta log Z(x), S4 eq 3.7
    torch.testing.assert_close(offset.mean(-1), constant, rtol=0, atol=1e-5)
    torch.testing.assert_close(logp, preferences.tilted(logp_ref, reward, beta), rtol=0, atol=1e-5)


def test_maximising_the_implicit_reward_raises_the_kl():
    """S4 3.4.2 says that it ends at KL = 0. Its mean is beta KL[pi, ref], which ascent raises."""
    logp_ref = doubles(0.5, 0.1, -0.3).log_softmax(-1)
    theta = logp_ref + doubles(0.1, 0.0, -0.1)

    def mean_reward(t):
        logp = t.log_softmax(-1)
        return (logp.exp() * preferences.implicit_reward(logp, logp_ref, 0.5)).sum()

    before = mean_reward(theta)
    after = mean_reward(theta + 0.5 * torch.func.grad(mean_reward)(theta))
    assert after > before > 0


def test_centred():
    found = preferences.centred(doubles(3.0, 5.0), doubles(1.0, 2.0, 6.0))
    assert found.tolist() == [0.0, 2.0]
