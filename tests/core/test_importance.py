"""Importance forms on data of another policy: which are unbiased, which are not and by what, and their variances."""

import numpy as np
import pytest
import torch

from tests.core.problems import PROBLEMS, bandit, expected_gradient, problem, stochastic_episode, undiscounted_episode
from upslope.core import advantages, importance, returns, surrogates
from upslope.exact import policy_gradient as exact

# Problems with ends of their own: the forms bootstrap nothing.
CASES = {name: PROBLEMS[name] for name in ("stochastic, terminating", "undiscounted horizon")}
TOLERANCE = {"rtol": 0, "atol": 1e-8}


def off_policy(name, scale=0.6):
    p = CASES[name]()
    shift = scale * torch.randn(p.theta.shape, generator=torch.manual_seed(11), dtype=torch.float64)
    return CASES[name](behavior=p.policy(p.theta + shift).detach())


def forms(p):
    given = (p.logp, p.logp_behavior, p.data.rewards, p.discounts, p.continues)
    return {
        "trajectory": importance.trajectory(*given),
        "causal": p.elapsed * importance.causal(*given),
        "simplified": p.elapsed * importance.simplified_causal(*given),
    }


def mean_and_variance(p, psi):
    return exact.moments(p.probabilities, exact.trajectory_gradients(p.data, p.policy, p.theta, psi))


def behavior_table(p):
    """The sampler's table, read back from the trajectories."""
    table = torch.zeros(p.mdp.num_states, p.mdp.num_actions, dtype=torch.float64)
    table[p.data.states[:, :-1][p.data.valid], p.data.actions[p.data.valid]] = p.logp_behavior[p.data.valid].exp()
    table[table.sum(-1) == 0] = 1 / p.mdp.num_actions
    return table


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("form", ["trajectory", "causal"])
def test_unbiased_forms(form, name):
    p = off_policy(name)
    psi = forms(p)[form]
    torch.testing.assert_close(
        expected_gradient(p, lambda logp: surrogates.log_prob(logp, psi)), p.gradient, **TOLERANCE
    )
    assert not torch.equal(p.logp, p.logp_behavior)


@pytest.mark.parametrize("name", CASES)
def test_the_printed_inner_product_counts_a_weight_twice(name):
    """S4 2.10 as printed, its inner product from t: E[w_t^2 ...], biased; A.3 is right."""
    p = off_policy(name)
    printed = forms(p)["causal"] * (p.logp - p.logp_behavior).exp()
    gradient = mean_and_variance(p, printed).mean
    assert (gradient - p.gradient).abs().max() > 1e-2


@pytest.mark.parametrize("name", CASES)
def test_simplified_causal_judges_by_the_behaviour_policys_future(name):
    """S4 2.11: its mean is sum_t gamma^t P_pi(s_t) sum_a Q^mu grad pi, not grad J. S4 writes "="."""
    p = off_policy(name)
    q_behavior = exact.evaluate(p.mdp, behavior_table(p)).q
    wanted = exact.all_action_gradient(p.policy, p.theta, p.evaluation.visits, q_behavior)
    found = mean_and_variance(p, forms(p)["simplified"]).mean
    torch.testing.assert_close(found, wanted, **TOLERANCE)
    assert (found - p.gradient).abs().max() > 1e-3


@pytest.mark.parametrize("name", CASES)
def test_first_order_keeps_the_behaviour_policys_states(name):
    """S4 2.13 with Q^pi: right actions, mu's states; with Q^mu it is the surrogate of TRPO. Neither is grad J."""
    p = off_policy(name)
    behind = exact.evaluate(p.mdp, behavior_table(p))
    psi = p.elapsed * importance.first_order(p.logp, p.logp_behavior, p.q)
    wanted = exact.all_action_gradient(p.policy, p.theta, behind.visits, p.evaluation.q)
    found = mean_and_variance(p, psi).mean
    torch.testing.assert_close(found, wanted, **TOLERANCE)
    assert (found - p.gradient).abs().max() > 1e-3
    time = torch.arange(p.data.rewards.shape[1])
    q_behavior = behind.q[time, p.data.states[:, :-1], p.data.actions]
    psi = p.elapsed * importance.first_order(p.logp, p.logp_behavior, q_behavior)
    by_ratio = expected_gradient(p, lambda logp: surrogates.ratio(logp, p.logp_behavior, p.elapsed * q_behavior))
    torch.testing.assert_close(mean_and_variance(p, psi).mean, by_ratio, **TOLERANCE)


def test_first_order_is_exact_to_first_order():
    """With Q^mu the error falls with the square of pi - mu; halving the distance divides it by about 4."""
    errors = []
    for scale in (0.02, 0.01):
        p = off_policy("stochastic, terminating", scale)
        behind = exact.evaluate(p.mdp, behavior_table(p))
        j = exact.evaluate(p.mdp, p.policy(p.theta).exp()).values[0] @ torch.from_numpy(p.mdp.initial)
        j_behavior = behind.values[0] @ torch.from_numpy(p.mdp.initial)
        advantage = behind.q - behind.values[:-1].unsqueeze(-1)
        surrogate = (behind.visits.unsqueeze(-1) * p.policy(p.theta).exp() * advantage).sum()
        errors.append((j - j_behavior - surrogate).abs().item())
    assert errors[0] / errors[1] == pytest.approx(4, abs=0.3)


def test_figures_on_named_problems():
    """How much: relative bias and variance of each form, one line per problem (documented in the module)."""
    table = {}
    for name in CASES:
        p = off_policy(name)
        scale = p.gradient.norm()
        for form, psi in forms(p).items():
            mean, variance = mean_and_variance(p, psi)
            table[name, form] = ((mean - p.gradient).norm() / scale).item(), variance.item()
    for name in CASES:
        assert table[name, "trajectory"][0] < 1e-10
        assert table[name, "causal"][0] < 1e-10
        assert table[name, "simplified"][0] > 0.02
        assert table[name, "causal"][1] < table[name, "trajectory"][1]
        assert table[name, "simplified"][1] < table[name, "causal"][1]


def test_causal_can_have_more_variance_than_the_whole_trajectory():
    """The refund: totals are 0 whatever the weights, what is still to come is not."""
    move = np.zeros((2, 2, 2))
    move[:, :, 1] = 1.0
    mdp = undiscounted_episode()
    mdp = type(mdp)(move, np.array([[2.0, 2.0], [-2.0, -2.0]]), gamma=1.0, initial=[1.0, 0.0], horizon=2)
    behavior = torch.tensor([[0.7, 0.3], [0.4, 0.6]], dtype=torch.float64).log()
    p = problem(mdp, behavior=behavior)
    found = {form: mean_and_variance(p, psi).variance.item() for form, psi in forms(p).items()}
    assert found["trajectory"] == pytest.approx(0, abs=1e-12)
    assert found["causal"] > 0.3


def test_products_restart_at_episode_ends():
    """Two episodes in one row, one of them ended by truncation, are each their own."""
    rng = np.random.default_rng(0)
    logp, behavior, rewards = (torch.from_numpy(rng.normal(size=(2, 7))) for _ in range(3))
    discounts = 0.9 * torch.ones(2, 7, dtype=torch.float64)
    continues = torch.ones(2, 7, dtype=torch.float64)
    continues[:, 2] = 0
    for form in (importance.trajectory, importance.causal, importance.simplified_causal):
        whole = form(logp, behavior, rewards, discounts, continues)
        parts = [
            form(*(x[:, piece] for x in (logp, behavior, rewards, discounts, continues)))
            for piece in (slice(0, 3), slice(3, 7))
        ]
        torch.testing.assert_close(whole, torch.cat(parts, -1), rtol=1e-10, atol=1e-10)


def test_forms_against_their_sums():
    """Written out term by term in NumPy for one episode."""
    rng = np.random.default_rng(1)
    time, gamma = 5, 0.8
    log_w, r = rng.normal(size=time), rng.normal(size=time)
    w = np.exp(log_w)
    ones = torch.ones(time, dtype=torch.float64)
    given = (torch.from_numpy(log_w), 0 * ones, torch.from_numpy(r), gamma * ones, ones)
    powers = gamma ** np.arange(time)
    np.testing.assert_allclose(importance.trajectory(*given), np.full(time, w.prod() * powers @ r))
    causal = [
        w[: t + 1].prod() * sum(gamma ** (k - t) * w[t + 1 : k + 1].prod() * r[k] for k in range(t, time))
        for t in range(time)
    ]
    np.testing.assert_allclose(importance.causal(*given), causal)
    simplified = [w[: t + 1].prod() * sum(gamma ** (k - t) * r[k] for k in range(t, time)) for t in range(time)]
    np.testing.assert_allclose(importance.simplified_causal(*given), simplified)


def test_forms_are_detached_and_reduce_to_the_returns_on_policy():
    p = problem(stochastic_episode())
    logp = p.logp.clone().requires_grad_()
    given = (logp, p.logp, p.data.rewards, p.discounts, p.continues)
    zero = torch.zeros_like(p.logp)
    to_go = returns.return_to_go(p.data.rewards, zero, p.discounts, p.continues)
    total = returns.total_return(p.data.rewards, zero, p.discounts, p.continues)
    for form, wanted in (
        (importance.trajectory, total),
        (importance.causal, to_go),
        (importance.simplified_causal, to_go),
    ):
        psi = form(*given)
        assert not psi.requires_grad
        torch.testing.assert_close(psi, wanted)
    assert not importance.first_order(logp, p.logp, p.q).requires_grad
    assert not importance.truncated(logp, p.logp, 1.0).requires_grad


def test_vtrace_off_policy_with_a_true_value_and_no_cap_is_unbiased_up_to_the_states():
    """rho uncapped, V = V^pi: E[Psi | s, a] = w A^pi(s, a): right actions on mu's states."""
    p = off_policy("stochastic, terminating")
    ratios = (p.logp - p.logp_behavior).exp()
    given = (p.data.rewards, p.values, p.next_values, p.discounts, p.continues, ratios)
    psi = p.elapsed * advantages.vtrace(*given, rho_bar=1e9, c_bar=1e9).advantages
    behind = exact.evaluate(p.mdp, behavior_table(p))
    wanted = exact.all_action_gradient(p.policy, p.theta, behind.visits, p.evaluation.q)
    torch.testing.assert_close(mean_and_variance(p, psi).mean, wanted, **TOLERANCE)


def test_truncated_weights_and_their_bias():
    p = problem(bandit([1.0, 2.0, 3.0]), behavior=torch.full((2, 3), 1 / 3, dtype=torch.float64).log())
    cap = 1.2
    weights = importance.truncated(p.logp, p.logp_behavior, cap)
    torch.testing.assert_close(weights, (p.logp.exp() * 3).clamp(max=cap))
    assert weights.max() == cap
    lost = (p.probabilities * ((p.logp.exp() * 3)[:, 0] - weights[:, 0])).sum()
    assert lost > 0.01  # E[w] < 1: the bias of truncation


def test_effective_sample_size():
    found = importance.effective_sample_size(torch.tensor([[0.0, 0.0, 0.0], [500.0, 500.0, -500.0]]))
    torch.testing.assert_close(found, torch.tensor([3.0, 2.0]))
    w = torch.tensor([1.0, 2.0, 5.0])
    assert importance.effective_sample_size(w.log()).item() == pytest.approx(64 / 30)
