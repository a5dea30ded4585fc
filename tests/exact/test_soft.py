"""Soft policy iteration: lemma 2 on 1,000 problems, α → 0, closed forms, and an independent solution."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.exact.problems import best_of_all_policies, random_dense
from upslope.exact import MDP, policy_iteration, soft_evaluation, soft_policy_iteration, soft_value_iteration, zoo
from upslope.exact.soft import soft_improvement, soft_value


def test_soft_improvement_never_lowers_q_on_1000_random_problems():
    """S4 lemma 2: Q_{π_new} ≥ Q_{π_old} in every (s, a), for random sizes, discounts, temperatures and old policies."""
    generator = np.random.default_rng(0)
    for _ in range(1000):
        states, actions = generator.integers(2, 7), generator.integers(2, 5)
        mdp = random_dense(generator, states, actions, generator.uniform(0.0, 0.99), low=-1.0)
        alpha = 10.0 ** generator.uniform(-2.0, 1.0)
        policy = generator.dirichlet(np.full(actions, 0.5), states)
        old = soft_evaluation(mdp, policy, alpha)
        new = soft_evaluation(mdp, soft_improvement(old.q_values, alpha), alpha)
        scale = 1e-12 * np.abs(old.q_values).max()
        assert (new.q_values >= old.q_values - scale).all()
        assert (new.values >= old.values - scale).all()
        assert (new.values > old.values + scale).any() or np.allclose(policy, soft_improvement(old.q_values, alpha))


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 10**6), st.sampled_from([0.1, 1.0, 10.0]), st.sampled_from([0.5, 0.95]))
def test_soft_evaluation_is_the_sum_of_rewards_and_entropies(seed, alpha, gamma):
    """A.7, A.8 unrolled: Σ_t γ^t P^t (r_π + α H), with the entropy written out."""
    generator = np.random.default_rng(seed)
    mdp = random_dense(generator, 4, 3, gamma)
    policy = generator.dirichlet(np.ones(3), 4)
    move = np.einsum("sa,sax->sx", policy, mdp.dense_transition)
    term = (policy * (mdp.expected_reward - alpha * np.log(policy))).sum(1)
    total = np.zeros(4)
    for _ in range(1000):
        total, term = total + term, gamma * move @ term
    found = soft_evaluation(mdp, policy, alpha)
    np.testing.assert_allclose(found.values, total, rtol=1e-10)
    # A.8: V = E_π[Q − α log π]
    np.testing.assert_allclose((policy * (found.q_values - alpha * np.log(policy))).sum(1), total, rtol=1e-10)


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 10**6), st.sampled_from([0.05, 1.0]), st.sampled_from([1e-3, 1e-8]))
def test_both_solvers_find_the_same_optimum_within_tol(seed, alpha, tol):
    """Against a fixed point iterated in another form (on Q, to rounding), and their bounds hold."""
    mdp = random_dense(np.random.default_rng(seed), 4, 3, 0.9, low=-1.0)
    q = np.zeros((4, 3))
    for _ in range(600):
        top = q.max(axis=1)
        v = top + alpha * np.log(np.exp((q - top[:, None]) / alpha).sum(axis=1))
        q = mdp.expected_reward + 0.9 * mdp.dense_transition @ v
    for solve in (soft_value_iteration, soft_policy_iteration):
        found = solve(mdp, tol=tol, alpha=alpha)
        assert np.abs(found.values - v).max() <= found.error_bound + 1e-13
        assert found.error_bound <= tol
        assert found.policy.shape == (4, 3)
        np.testing.assert_allclose(found.policy.sum(axis=1), 1.0)
        np.testing.assert_allclose(found.policy, soft_improvement(found.q_values, alpha), atol=1e-12)


def test_improvement_is_the_minimiser_of_the_divergence():
    """A.9 by definition: no nearby policy has a smaller KL to exp(Q/α)/Z; and A.8 at it is α log Σ exp(Q/α)."""
    generator = np.random.default_rng(1)
    q, alpha = generator.standard_normal((1, 4)), 0.7
    best = soft_improvement(q, alpha)[0]
    objective = lambda p: (p * (q[0] - alpha * np.log(p))).sum()  # noqa: E731
    for _ in range(200):
        other = best * np.exp(0.1 * generator.standard_normal(4))
        assert objective(best) >= objective(other / other.sum())
    assert objective(best) == pytest.approx(float(soft_value(q, alpha)[0]), rel=1e-14)


def test_a_small_temperature_recovers_the_hard_solution():
    """0 ≤ V*_α − V* ≤ α log A / (1 − γ), so it vanishes with α; no overflow on the way."""
    mdp = random_dense(np.random.default_rng(2), 4, 3, 0.9, low=-1.0)
    truth = best_of_all_policies(mdp)
    for alpha in (1.0, 0.1, 1e-2, 1e-4, 1e-6):
        for solve in (soft_value_iteration, soft_policy_iteration):
            gap = solve(mdp, tol=1e-10, alpha=alpha).values - truth
            assert (gap >= -1e-9).all()
            assert (gap <= alpha * np.log(3) / 0.1 + 1e-9).all()
    hard = policy_iteration(mdp)
    cold = soft_policy_iteration(mdp, alpha=1e-5)
    np.testing.assert_allclose(cold.values, hard.values, atol=2e-4)
    assert cold.policy.argmax(axis=1).tolist() == hard.policy.tolist()
    assert cold.policy.max(axis=1).min() > 0.999


def test_a_high_temperature_is_uniform():
    mdp = random_dense(np.random.default_rng(3), 3, 4, 0.5)
    np.testing.assert_allclose(soft_value_iteration(mdp, tol=1e-3, alpha=1e6).policy, 0.25, atol=1e-5)


def test_a_terminal_state_earns_no_entropy():
    """One decision, then the end: V = α log Σ exp(r/α), not plus α log A for ever after."""
    transition = np.zeros((2, 2, 2))
    transition[:, :, 1] = 1.0
    mdp = MDP(transition, [[1.0, 0.0], [0.0, 0.0]], 0.9)
    for solve in (soft_value_iteration, soft_policy_iteration):
        found = solve(mdp, tol=1e-12, alpha=0.5)
        np.testing.assert_allclose(found.values, [0.5 * np.log(np.exp(2.0) + 1.0), 0.0], atol=1e-11)


def test_finite_horizon():
    """By hand, one state, reward 1, two actions, γ = ½: each step is worth 1 + 2 log 2."""
    mdp = MDP(np.ones((1, 2, 1)), [[1.0, 1.0]], 0.5)
    found = soft_value_iteration(mdp, alpha=2.0, horizon=2)
    step = 1.0 + 2.0 * np.log(2.0)
    np.testing.assert_allclose(found.values[:, 0], [0.0, step, 1.5 * step])
    assert soft_value_iteration(zoo.frozen_lake(horizon=5), alpha=0.1).values.shape == (6, 16)


def test_what_is_refused():
    mdp = random_dense(np.random.default_rng(4), 3, 2, 0.9)
    for solve in (soft_value_iteration, soft_policy_iteration):
        with pytest.raises(ValueError, match="alpha: a positive temperature, got 0"):
            solve(mdp, alpha=0.0)
        with pytest.raises(ValueError, match="tol: "):
            solve(mdp, tol=-1.0)
        with pytest.raises(ValueError, match="tol: 1e-20 cannot be guaranteed"):
            solve(mdp, tol=1e-20)
        with pytest.raises(ValueError, match="gamma: 1 needs a horizon"):
            solve(mdp.replace(gamma=1.0))
    with pytest.raises(ValueError, match=r"sum to 0\.9"):
        soft_evaluation(mdp, np.full((3, 2), 0.45), 1.0)
    with pytest.raises(ValueError, match="horizon: with horizon=4"):
        soft_policy_iteration(mdp.replace(horizon=4))
