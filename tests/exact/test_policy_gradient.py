"""Three ways to the exact gradient agree; Fisher, gamma-justness, performance difference, partial observation."""

import numpy as np
import pytest
import scipy.sparse as sp
import torch

from tests.core.problems import bandit, endless, stochastic_episode, undiscounted_episode
from upslope.exact import policy_gradient as exact
from upslope.exact.mdp import MDP

TIGHT = {"rtol": 0, "atol": 1e-10}
FINITE = {"stochastic": stochastic_episode, "undiscounted": undiscounted_episode, "bandit": lambda: bandit([1.0, 3.0])}


def table(mdp, seed=0):
    theta = torch.randn(mdp.num_states * mdp.num_actions, generator=torch.manual_seed(seed), dtype=torch.float64)
    return exact.softmax_table(mdp.num_states, mdp.num_actions), theta


def network(mdp):
    features = torch.randn(mdp.num_states, 3, generator=torch.manual_seed(7), dtype=torch.float64)

    def policy(theta):
        return (torch.tanh(features @ theta[:6].view(3, 2)) @ theta[6:].view(2, mdp.num_actions)).log_softmax(-1)

    return policy, torch.randn(6 + 2 * mdp.num_actions, generator=torch.manual_seed(8), dtype=torch.float64)


@pytest.mark.parametrize("make_policy", [table, network])
@pytest.mark.parametrize("name", FINITE)
def test_three_ways_agree(name, make_policy):
    mdp = FINITE[name]()
    policy, theta = make_policy(mdp)
    theorem, enumerated, differentiated = (
        exact.exact_policy_gradient(mdp, policy, theta, by=by) for by in ("theorem", "enumeration", "differentiation")
    )
    torch.testing.assert_close(theorem, enumerated, **TIGHT)
    torch.testing.assert_close(theorem, differentiated, **TIGHT)
    assert theorem.abs().max() > 1e-3
    # ... and a fourth: central differences of J as the mean over trajectories.
    data, step = exact.enumerate_trajectories(mdp), 1e-5
    rewards = exact.total_rewards(data, mdp.gamma)
    for i in range(len(theta)):
        shift = torch.zeros_like(theta)
        shift[i] = step
        up, down = (exact.probabilities(data, policy(theta + s)) @ rewards for s in (shift, -shift))
        assert ((up - down) / (2 * step)).item() == pytest.approx(theorem[i].item(), abs=1e-8)


@pytest.mark.parametrize("make_policy", [table, network])
def test_endless_problem_by_theorem_differentiation_and_a_long_horizon(make_policy):
    mdp = endless()
    policy, theta = make_policy(mdp)
    theorem = exact.exact_policy_gradient(mdp, policy, theta)
    torch.testing.assert_close(theorem, exact.exact_policy_gradient(mdp, policy, theta, by="differentiation"), **TIGHT)
    long = exact.exact_policy_gradient(mdp, policy, theta, steps=150)
    torch.testing.assert_close(long, theorem, rtol=0, atol=1e-10)


@pytest.mark.parametrize("by", ["theorem", "enumeration", "differentiation"])
def test_a_cut_with_final_values(by):
    """E[sum_{t<3} gamma^t r_t + gamma^3 v(s_3)], v frozen: all three ways, terminal states worth 0 whatever v says."""
    mdp = stochastic_episode().replace(horizon=None)
    policy, theta = table(mdp)
    v = torch.tensor([1.0, -2.0, 3.0, 50.0], dtype=torch.float64)
    found = exact.exact_policy_gradient(mdp, policy, theta, by=by, steps=3, final_values=v)
    data = exact.enumerate_trajectories(mdp, steps=3)
    end = torch.where(torch.from_numpy(mdp.terminal), 0.0, v)[data.states[:, -1]]
    weights = (data.rewards * mdp.gamma ** torch.arange(3.0, dtype=torch.float64)).sum(-1) + mdp.gamma**3 * end
    (wanted,) = torch.autograd.grad((exact.probabilities(data, policy(theta.requires_grad_())) * weights).sum(), theta)
    torch.testing.assert_close(found, wanted, **TIGHT)


def test_bandit_by_hand():
    """Two arms, p = sigma(theta_0 - theta_1): grad J = p (1 - p) (r_0 - r_1) (1, -1)."""
    mdp = bandit([1.0, 3.0])
    theta = torch.tensor([0.4, -0.2, 0.0, 0.0], dtype=torch.float64)
    p = 1 / (1 + np.exp(-0.6))
    wanted = p * (1 - p) * (1.0 - 3.0)
    for by in ("theorem", "enumeration", "differentiation"):
        found = exact.exact_policy_gradient(mdp, exact.softmax_table(2, 2), theta, by=by)
        assert found.tolist() == pytest.approx([wanted, -wanted, 0.0, 0.0])
    assert exact.performance(mdp, exact.softmax_table(2, 2), theta).item() == pytest.approx(3 - 2 * p)


def test_sparse_and_successor_rewards_are_the_same_problem():
    mdp = undiscounted_episode()
    states, actions = mdp.num_states, mdp.num_actions
    flat = [sp.csr_array(np.asarray(x).reshape(states * actions, states)) for x in (mdp.transition, mdp.reward)]
    sparse = MDP(flat[0], flat[1], mdp.gamma, mdp.initial, mdp.horizon)
    policy, theta = table(mdp)
    for by in ("theorem", "enumeration"):
        one, other = (exact.exact_policy_gradient(m, policy, theta, by=by) for m in (mdp, sparse))
        torch.testing.assert_close(one, other, **TIGHT)


def test_trajectories_are_all_and_sum_to_one():
    mdp = stochastic_episode()
    policy, theta = table(mdp)
    data = exact.enumerate_trajectories(mdp)
    assert exact.probabilities(data, policy(theta)).sum().item() == pytest.approx(1, abs=1e-14)
    whole = torch.cat([data.states, data.actions], -1)
    assert len(whole.unique(dim=0)) == len(whole)
    over = torch.from_numpy(mdp.terminal)[data.states[:, :-1]]
    assert torch.equal(data.valid, ~over)
    assert (data.rewards[over] == 0).all()
    assert data.terminated[:, -1].all()
    assert not data.truncated.any()
    cut = exact.enumerate_trajectories(mdp.replace(horizon=None), steps=2)
    arrived = torch.from_numpy(mdp.terminal)[cut.states[:, 1:]]
    assert torch.equal(cut.terminated, arrived)
    assert torch.equal(cut.truncated[:, -1], ~arrived[:, -1])
    assert not cut.truncated[:, 0].any()


def test_evaluation_against_the_enumerated_mean():
    """V, Q and visits of the stochastic episode from trajectories alone."""
    mdp = stochastic_episode()
    policy, theta = table(mdp)
    known = exact.evaluate(mdp, policy(theta).exp())
    data = exact.enumerate_trajectories(mdp)
    p = exact.probabilities(data, policy(theta))
    for t in range(4):
        powers = mdp.gamma ** torch.arange(4 - t, dtype=torch.float64)
        to_go = data.rewards[:, t:] @ powers
        for s in range(3):
            here = (data.states[:, t] == s) & data.valid[:, t]
            assert known.visits[t, s].item() == pytest.approx((mdp.gamma**t * p[here].sum()).item())
            if not p[here].sum():
                continue
            assert known.values[t, s].item() == pytest.approx(((p * to_go)[here].sum() / p[here].sum()).item())
            for a in range(2):
                chosen = here & (data.actions[:, t] == a)
                mean = (p * to_go)[chosen].sum() / p[chosen].sum()
                assert known.q[t, s, a].item() == pytest.approx(mean.item())
                assert known.advantages[t, s, a].item() == pytest.approx((mean - known.values[t, s]).item())


def test_stationary_evaluation_by_hand():
    """Stay with chance 1/2, gamma 0.9, reward 1: V = 1/(1 - 0.45), and the visits are the same number."""
    mdp = MDP([[[0.5, 0.5]], [[0.0, 1.0]]], [[1.0], [0.0]], gamma=0.9, initial=[1.0, 0.0])
    known = exact.evaluate(mdp, torch.ones(2, 1, dtype=torch.float64))
    assert known.values.tolist() == pytest.approx([1 / 0.55, 0])
    assert known.visits.tolist() == pytest.approx([1 / 0.55, 0])
    undiscounted = exact.evaluate(mdp.replace(gamma=1.0), torch.ones(2, 1, dtype=torch.float64))
    assert undiscounted.values.tolist() == pytest.approx([2.0, 0.0])


@pytest.mark.parametrize("name", [*FINITE, "endless"])
def test_fisher_is_the_hessian_of_the_kl_and_the_mean_outer_score(name):
    mdp = endless() if name == "endless" else FINITE[name]()
    policy, theta = network(mdp)
    weights = torch.rand(mdp.num_states, generator=torch.manual_seed(1), dtype=torch.float64)

    def kl(t):
        old, new = policy(theta), policy(t)
        return weights @ (old.exp() * (old - new)).sum(-1)

    fisher = exact.exact_fisher(mdp, policy, theta, weights)
    torch.testing.assert_close(fisher, torch.func.hessian(kl)(theta), rtol=0, atol=1e-9)
    # By default: the discounted visits, made a distribution.
    visits = exact.evaluate(mdp, policy(theta).exp()).visits
    visits = visits.sum(0) if visits.ndim == 2 else visits
    by_visits = exact.exact_fisher(mdp, policy, theta, visits / visits.sum())
    torch.testing.assert_close(exact.exact_fisher(mdp, policy, theta), by_visits, **TIGHT)


def test_natural_gradient_of_a_table_is_the_advantage():
    """Kakade 2001: compatible features; F^+ grad J = A (centred), times the mass of the visits, 1/(1 - gamma)."""
    mdp = endless()
    policy, theta = table(mdp)
    natural = exact.exact_natural_gradient(mdp, policy, theta).view(3, 2)
    advantage = exact.evaluate(mdp, policy(theta).exp()).advantages
    centred = advantage - advantage.mean(-1, keepdim=True)
    torch.testing.assert_close(natural, centred / (1 - mdp.gamma), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("name", [*FINITE, "endless"])
def test_performance_difference(name):
    """... and S0 2.4.1 normalises d by 1/T: then the gap is T times the mean advantage (gamma = 1)."""
    mdp = endless() if name == "endless" else FINITE[name]()
    policy, theta = table(mdp)
    new, old = policy(theta).exp(), policy(table(mdp, seed=5)[1]).exp()
    gap, advantage = exact.performance_difference(mdp, new, old)
    assert gap.item() == pytest.approx(advantage.item(), abs=1e-10)
    assert abs(gap.item()) > 1e-3
    if name == "undiscounted":
        visits = exact.evaluate(mdp, new).visits
        d = visits / visits.sum()
        mean = (d.unsqueeze(-1) * new * exact.evaluate(mdp, old).advantages).sum()
        assert visits.sum().item() == pytest.approx(3)
        assert gap.item() == pytest.approx(3 * mean.item())


def along(mdp, policy, theta):
    data = exact.enumerate_trajectories(mdp)
    known = exact.evaluate(mdp, policy(theta).exp())
    time = torch.arange(data.rewards.shape[1])
    here, there = data.states[:, :-1], data.states[:, 1:]
    return (
        data,
        known,
        known.advantages[time, here, data.actions],
        known.values[time, here],
        known.values[time + 1, there],
    )


def test_gamma_just():
    """S4 2.3.1: returns, Q, A and the TD residual of the true value are just, that of a wrong value is not."""
    mdp = stochastic_episode()
    policy, theta = table(mdp)
    data, known, advantages, values, following = along(mdp, policy, theta)
    to_go = torch.stack(
        [data.rewards[:, t:] @ mdp.gamma ** torch.arange(4 - t, dtype=torch.float64) for t in range(4)], -1
    )
    alive = (~data.terminated).double()
    for psi in (to_go, advantages + values, advantages, data.rewards + mdp.gamma * alive * following - values):
        assert exact.just_gap(data, policy, theta, psi, advantages).abs().max() < 1e-12
    error = torch.tensor([1.0, -2.0, 0.5, 0.0], dtype=torch.float64)
    wrong = advantages + mdp.gamma * alive * error[data.states[:, 1:]]
    gaps = exact.just_gap(data, policy, theta, wrong, advantages)
    assert gaps.shape == (4, 8)
    assert gaps[:3].abs().amax(-1).min() > 1e-3
    assert gaps[3].abs().max() < 1e-12  # at the last step nothing follows
    assert known.q.shape == (4, 4, 2)


def test_partially_observed_problem_is_the_same_problem():
    """J by pairs (state, observation) equals J with the policy averaged over what is seen."""
    mdp = stochastic_episode()
    observation = np.array([[0.8, 0.2], [0.7, 0.3], [0.1, 0.9], [0.5, 0.5]])
    paired, seen = exact.partially_observed(mdp, observation)
    assert paired.terminal.tolist() == [False] * 6 + [True] * 2
    rows = exact.softmax_table(2, 2)
    theta = torch.tensor([0.3, -0.2, 0.5, 1.0], dtype=torch.float64)
    policy = lambda t: rows(t)[seen]  # noqa: E731
    averaged = lambda t: (torch.from_numpy(observation) @ rows(t).exp()).log()  # noqa: E731
    for value in (exact.performance, exact.exact_policy_gradient):
        torch.testing.assert_close(value(paired, policy, theta), value(mdp, averaged, theta), **TIGHT)


def test_moments():
    """Weights 1/4 and 3/4 on (0, 0) and (4, 2): mean (3, 1.5), variance 1/4 (9 + 2.25) + 3/4 (1 + 0.25)."""
    found = exact.moments(torch.tensor([0.25, 0.75]), torch.tensor([[0.0, 0.0], [4.0, 2.0]]))
    assert found.mean.tolist() == [3.0, 1.5]
    assert found.variance.item() == 3.75


def test_refusals():
    mdp = endless()
    policy, theta = table(mdp)
    with pytest.raises(ValueError, match="by must be"):
        exact.exact_policy_gradient(mdp, policy, theta, by="guessing")
    with pytest.raises(ValueError, match="trajectories are unbounded"):
        exact.exact_policy_gradient(mdp, policy, theta, by="enumeration")
    with pytest.raises(ValueError, match="more than 2000000 trajectories"):
        exact.enumerate_trajectories(mdp, steps=9)
    with pytest.raises(ValueError, match=r"probs must be \[3, 2\]"):
        exact.evaluate(mdp, torch.ones(2, 3))
    with pytest.raises(ValueError, match="infinite sum of rewards does not exist"):
        exact.evaluate(mdp.replace(gamma=1.0), policy(theta).exp())
    with pytest.raises(ValueError, match="observation must be"):
        exact.partially_observed(mdp, np.ones((3, 2)))
