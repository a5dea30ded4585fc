"""V^π, Q^π, A^π, visitation, stationary distributions: definitions, identities, and what has no value."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.exact.problems import random_dense, random_ending
from upslope.exact import (
    MDP,
    average_reward,
    evaluate_policy,
    policy_iteration,
    state_visitation,
    stationary_distribution,
    value_iteration,
    zoo,
)


def random_policy(generator: np.random.Generator, mdp: MDP) -> np.ndarray:
    return generator.dirichlet(np.ones(mdp.num_actions), mdp.num_states)


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 10**6), st.sampled_from([0.0, 0.7, 0.99]))
def test_values_are_the_discounted_sum(seed, gamma):
    """Σ_t γ^t P_π^t r_π, summed term by term until γ^t is nothing."""
    generator = np.random.default_rng(seed)
    mdp = random_dense(generator, 4, 3, gamma, low=-1.0)
    policy = random_policy(generator, mdp)
    move = np.einsum("sa,sax->sx", policy, mdp.dense_transition)
    term, total = (policy * (mdp.dense_transition * mdp.reward).sum(2)).sum(1), np.zeros(4)
    for _ in range(4000):
        total, term = total + term, gamma * move @ term
    found = evaluate_policy(mdp, policy)
    np.testing.assert_allclose(found.values, total, atol=1e-11)
    np.testing.assert_allclose((policy * found.q_values).sum(1), total, atol=1e-11)  # V = E_π Q
    np.testing.assert_allclose((policy * found.advantages).sum(1), 0.0, atol=1e-11)  # E_π A = 0


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 10**6), st.sampled_from([0.7, 0.99]))
def test_visitation_identities(seed, gamma):
    """J = Σ_s d(s) r_π(s); Σ d = 1/(1−γ); and J(π') − J(π) = Σ d^π' Σ π' A^π (S0 2.4.1, unnormalised d)."""
    generator = np.random.default_rng(seed)
    mdp = random_dense(generator, 4, 3, gamma, low=-1.0)
    old, new = random_policy(generator, mdp), random_policy(generator, mdp)
    visits = state_visitation(mdp, new)
    worth = [float(mdp.initial @ evaluate_policy(mdp, policy).values) for policy in (old, new)]
    assert visits @ (new * mdp.expected_reward).sum(1) == pytest.approx(worth[1], abs=1e-10)
    assert visits.sum() == pytest.approx(1.0 / (1.0 - gamma), rel=1e-10)
    gain = visits @ (new * evaluate_policy(mdp, old).advantages).sum(1)
    assert worth[1] - worth[0] == pytest.approx(gain, abs=1e-10)
    assert state_visitation(mdp, new, normalize=True).sum() == pytest.approx(1.0)


def test_visitation_with_a_horizon_counts_the_steps():
    mdp = random_dense(np.random.default_rng(1), 3, 2, 1.0).replace(horizon=7)
    policy = random_policy(np.random.default_rng(2), mdp)
    visits = state_visitation(mdp, policy)
    assert visits.sum() == pytest.approx(7.0)
    worth = evaluate_policy(mdp, policy).values[7] @ mdp.initial
    assert visits @ (policy * mdp.expected_reward).sum(1) == pytest.approx(worth, rel=1e-12)


def test_visitation_of_an_episode_is_its_length():
    """Random walk from the middle: the Green function 2 min(i, 3) (6 − max(i, 3)) / 6; expected length 3·3."""
    walk = zoo.random_walk()
    visits = state_visitation(walk, np.zeros(7, int))
    green = [2 * min(i, 3) * (6 - max(i, 3)) / 6 for i in range(1, 6)]
    np.testing.assert_allclose(visits, [0.0, *green, 0.0], atol=1e-12)
    assert visits.sum() == pytest.approx(9.0)


def test_visits_without_an_end_are_refused():
    loop = MDP(np.ones((1, 1, 1)), [[-1.0]], 1.0)
    with pytest.raises(ValueError, match="stays around state 0 for ever"):
        state_visitation(loop, np.zeros(1, int))


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 10**6))
def test_stationary_distribution_is_the_long_run(seed):
    """μ = μP, and the time average of Pr(s_t) over 2^20 steps by doubling."""
    generator = np.random.default_rng(seed)
    mdp = random_dense(generator, 4, 2, 0.9)
    policy = random_policy(generator, mdp)
    move = np.einsum("sa,sax->sx", policy, mdp.dense_transition)
    limit = stationary_distribution(mdp, policy)
    np.testing.assert_allclose(limit @ move, limit, atol=1e-12)
    average, power = np.eye(4), move
    for _ in range(40):  # (I + P^n) A_n / 2 with A_n the average of the first n powers
        average, power = 0.5 * (average + power @ average), power @ power
        power /= power.sum(axis=1, keepdims=True)  # doubling doubles the rounding too
    np.testing.assert_allclose(limit, mdp.initial @ average, atol=1e-9)
    assert average_reward(mdp, policy) == pytest.approx(limit @ (policy * mdp.expected_reward).sum(1), abs=1e-14)


def test_several_recurrent_classes_are_weighted_by_where_one_ends_up():
    """From 0: to 1 with probability ¼, to the pair {2, 3} with ¾; the pair alternates."""
    transition = np.zeros((4, 1, 4))
    transition[0, 0, [1, 2]] = 0.25, 0.75
    transition[1, 0, 1] = transition[2, 0, 3] = transition[3, 0, 2] = 1.0
    mdp = MDP(transition, np.array([[0.0], [8.0], [0.0], [4.0]]), 1.0, initial=[1.0, 0.0, 0.0, 0.0])
    np.testing.assert_allclose(stationary_distribution(mdp, np.zeros(4, int)), [0.0, 0.25, 0.375, 0.375], atol=1e-12)
    assert average_reward(mdp, np.zeros(4, int)) == pytest.approx(0.25 * 8 + 0.375 * 4)


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 10**6))
def test_undiscounted_evaluation_ends_or_is_refused(seed):
    mdp = random_ending(np.random.default_rng(seed), 5, 2, -1.0, -0.1)
    policy = np.full((5, 2), 0.5)
    move = np.einsum("sa,sax->sx", policy, mdp.dense_transition)[:4, :4]
    if np.abs(np.linalg.eigvals(move)).max() > 1.0 - 1e-9:
        with pytest.raises(ValueError, match="for ever"):
            evaluate_policy(mdp, policy)
        return
    values = evaluate_policy(mdp, policy).values
    np.testing.assert_allclose(
        values[:4], np.linalg.solve(np.eye(4) - move, mdp.expected_reward[:4].mean(1)), rtol=1e-9
    )


def test_a_horizon_with_a_policy_that_knows_the_time():
    """Evaluating the time-dependent optimum gives back its values; a stationary policy is never better."""
    lake = zoo.frozen_lake(horizon=20)
    best = value_iteration(lake)
    np.testing.assert_allclose(evaluate_policy(lake, best.policy).values, best.values, atol=1e-14)
    stationary = evaluate_policy(lake, policy_iteration(lake.replace(horizon=None)).policy)
    assert (stationary.values <= best.values + 1e-14).all()


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        (np.array([[0.5, 0.4], [0.5, 0.5]]), "probabilities of state 0 sum to 0.9, not 1"),
        (np.array([[0.5, 0.5], [1.5, -0.5]]), "probabilities of state 1 are"),
        (np.array([[0.5, 0.5], [np.nan, 0.5]]), "probabilities of state 1 are"),
        (np.array([0, 2]), "actions are whole numbers 0…1, got 0…2"),
        (np.array([0, 0, 0]), r"one action per state \(2,\) or probabilities \(2, 2\)"),
    ],
)
def test_malformed_policies_are_refused(policy, message):
    mdp = MDP(np.full((2, 2, 2), 0.5), np.zeros((2, 2)), 0.9)
    with pytest.raises(ValueError, match=message):
        evaluate_policy(mdp, policy)
