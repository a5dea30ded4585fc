"""Solvers against V* by definition (all policies), their proven errors, finite horizons, and what they refuse."""

from itertools import product

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tests.exact.problems import (
    best_ending_policies,
    best_of_all_policies,
    best_prizes,
    prizes,
    random_dense,
    random_ending,
)
from upslope.exact import MDP, modified_policy_iteration, policy_iteration, value_iteration, zoo
from upslope.exact.dynamic_programming import _eliminate, _one_of
from upslope.exact.pairs import backup, pairs_of
from upslope.exact.undiscounted import error_bound, total_reward

SOLVERS = {
    "vi sup": value_iteration,
    "vi span": lambda m, **k: value_iteration(m, stop="span", **k),
    "vi plain": lambda m, **k: value_iteration(m, eliminate=False, **k),
    "mpi span": modified_policy_iteration,
    "mpi sup": lambda m, **k: modified_policy_iteration(m, stop="sup", **k),
    "mpi 0": lambda m, **k: modified_policy_iteration(m, sweeps=0, **k),
    "pi": policy_iteration,
    "pi iterative": lambda m, **k: policy_iteration(m, evaluation="iterative", **k),
}


@pytest.mark.parametrize("solver", SOLVERS)
@settings(deadline=None, max_examples=15)
@given(seed=st.integers(0, 10**6), gamma=st.sampled_from([0.0, 0.5, 0.9, 0.99]), exponent=st.integers(1, 9))
def test_the_error_is_within_tol_and_within_the_bound(solver, seed, gamma, exponent):
    """‖V − V*‖∞ ≤ error_bound ≤ tol, V* by enumeration of every policy; the policy loses at most what that allows."""
    mdp = random_dense(np.random.default_rng(seed), 4, 3, gamma, low=-1.0)
    truth, tol = best_of_all_policies(mdp), 10.0**-exponent
    found = SOLVERS[solver](mdp, tol=tol)
    error = np.abs(found.values - truth).max()
    assert error <= found.error_bound + 1e-13
    assert found.error_bound <= tol
    assert found.residual == pytest.approx(np.abs(found.q_values.max(axis=1) - found.values).max(), abs=1e-15)
    np.testing.assert_allclose(
        found.q_values, mdp.expected_reward + gamma * mdp.dense_transition @ found.values, atol=1e-12
    )
    move = mdp.dense_transition[np.arange(4), found.policy]
    worth = np.linalg.solve(np.eye(4) - gamma * move, mdp.expected_reward[np.arange(4), found.policy])
    assert (truth - worth).max() <= 2.0 * gamma * tol / (1.0 - gamma) + tol + 1e-12


@pytest.mark.parametrize("solver", ["vi sup", "mpi span", "pi", "pi iterative"])
@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 10**6), low=st.sampled_from([-1.0, -3.0]))
def test_undiscounted_costs(solver, seed, low):
    """γ = 1, every step costs: V* over the policies that surely end; refused exactly where there is none."""
    mdp = random_ending(np.random.default_rng(seed), 5, 2, low, -0.05)
    truth = best_ending_policies(mdp)
    if np.isinf(truth).any():
        with pytest.raises(ValueError, match="no policy ends with probability one"):
            SOLVERS[solver](mdp, tol=1e-7)
        return
    found = SOLVERS[solver](mdp, tol=1e-7)
    assert np.abs(found.values - truth).max() <= found.error_bound + 1e-12 * np.abs(truth).max()
    assert found.error_bound <= 1e-7


@pytest.mark.parametrize("solver", ["vi sup", "mpi span", "pi", "pi iterative"])
@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 10**6))
@example(seed=888)  # arrives once in some 16,000 steps: 200,000 sweeps from below do not get there
def test_undiscounted_prizes_with_free_wandering(solver, seed):
    """γ = 1, reward only on arrival (r ≥ 0), free loops: the least fixed point, i.e. the limit of V_h from below."""
    generator = np.random.default_rng(seed)
    mdp = random_ending(generator, 6, 2, -1.0, 0.0)
    reward = np.zeros((6, 2, 6))
    reward[:5, :, 5] = generator.random((5, 2))
    prize = MDP(mdp.transition, reward, 1.0)
    truth = best_prizes(prize)
    found = SOLVERS[solver](prize, tol=1e-7)
    assert np.abs(found.values - truth).max() <= 1e-7 + 1e-9
    # and the policy is worth it: it really leaves the free loops
    np.testing.assert_allclose(prizes(prize, found.policy), truth, atol=1e-6)


def test_a_free_loop_is_not_worth_more_than_its_exit():
    """The trap of γ = 1: V = any constant ≥ ½ solves the optimality equation of the loop; V* is ½."""
    transition = np.zeros((4, 2, 4))
    transition[0, 0, 1] = transition[1, 0, 0] = 1.0  # wander between 0 and 1 for nothing
    transition[0, 1, 2] = transition[0, 1, 3] = 0.5  # or leave for an even chance
    transition[1, 1, 1] = transition[2, :, 2] = transition[3, :, 3] = 1.0
    reward = np.zeros((4, 2, 4))
    reward[0, 1, 2] = 1.0
    for solve in SOLVERS.values():
        found = solve(MDP(transition, reward, 1.0))
        np.testing.assert_allclose(found.values, [0.5, 0.5, 0.0, 0.0], atol=1e-8)
        assert found.policy[0] == 1
        assert found.policy[1] == 0


def test_stopping_can_be_best():
    """Every exit costs, staying is free: V* = 0 and the policy stays."""
    transition = np.zeros((3, 2, 3))
    transition[0, 0, 1] = transition[1, 0, 0] = 1.0
    transition[0, 1, 2] = transition[1, 1, 2] = transition[2, :, 2] = 1.0
    found = policy_iteration(MDP(transition, [[0.0, -1.0], [0.0, -2.0], [0.0, 0.0]], 1.0))
    assert found.values.tolist() == [0.0, 0.0, 0.0]
    assert found.policy[:2].tolist() == [0, 0]


def test_rewards_of_both_signs_where_every_endless_policy_loses():
    """A loop that pays 1 and costs 2 in turn: endless is −∞; the best is to take the 1 and leave."""
    transition = np.zeros((3, 2, 3))
    transition[0, :, 1] = 1.0
    transition[1, 0, 0] = transition[1, 1, 2] = transition[2, :, 2] = 1.0
    mdp = MDP(transition, [[1.0, 1.0], [-2.0, -0.5], [0.0, 0.0]], 1.0)
    for solve in SOLVERS.values():
        np.testing.assert_allclose(solve(mdp).values, [0.5, -0.5, 0.0], atol=1e-8)


@pytest.mark.parametrize(
    ("pay", "message"),
    [
        ([[1.0, 0.0], [0.0, 0.0]], "total reward is infinite"),
        ([[2.0, 0.0], [-1.0, 0.0]], "total reward is infinite"),
        ([[1.0, 0.0], [-1.0, 0.0]], "not defined"),
    ],
)
def test_undiscounted_endless_gain_is_refused_with_the_state(pay, message):
    transition = np.zeros((3, 2, 3))
    transition[0, 0, 1] = transition[1, 0, 0] = 1.0
    transition[0, 1, 2] = transition[1, 1, 2] = transition[2, :, 2] = 1.0
    mdp = MDP(transition, [*pay, [0.0, 0.0]], 1.0, state_names=("here", "there", "end"))
    for solve in SOLVERS.values():
        with pytest.raises(ValueError, match=f"from state (here|there) .*{message}"):
            solve(mdp)
    assert value_iteration(mdp, horizon=3).values.shape == (4, 3)  # with a horizon it is well defined


@settings(deadline=None, max_examples=40)
@given(seed=st.integers(0, 10**6), scale=st.sampled_from([0.0, 1e-9, 1e-5, 1e-2]), undiscounted=st.booleans())
def test_the_error_bound_holds_for_any_values(seed, scale, undiscounted):
    """Not only where a solver stops: V* plus noise is never further from V* than `error_bound` says."""
    generator = np.random.default_rng(seed)
    if undiscounted:
        mdp = random_ending(generator, 5, 2, -1.0, -0.05)
        truth = best_ending_policies(mdp)
        if np.isinf(truth).any():
            return
        problem = total_reward(mdp)
        pairs, truth = problem.pairs, truth[:-1]
    else:
        mdp = random_dense(generator, 4, 2, 0.9)
        pairs, truth = pairs_of(mdp), best_of_all_policies(mdp)
    values = truth + scale * generator.standard_normal(len(truth))
    bound = error_bound(pairs, values, backup(pairs, values), 1e-6)
    assert np.abs(values - truth).max() <= bound * (1.0 + 1e-9) + 1e-12


def test_elimination_changes_nothing_but_the_work():
    """The same iterates up to rounding, while rows are dropped on the way (MacQueen's test)."""
    mdp = zoo.random_mdp(np.random.default_rng(3), 200, 5, 6, gamma=0.97)
    plain, quick = (value_iteration(mdp, tol=1e-7, eliminate=flag) for flag in (False, True))
    assert plain.iterations == quick.iterations
    np.testing.assert_allclose(plain.values, quick.values, atol=1e-10)
    np.testing.assert_array_equal(plain.policy, quick.policy)


@pytest.mark.parametrize("gamma", [0.3, 0.9])
def test_elimination_never_drops_an_optimal_action(gamma):
    """Rewards are shifted so that every action is optimal: whatever V the test sees, it must not drop one of them."""
    generator = np.random.default_rng(11)
    for scale in (1e-6, 1e-2, 1.0, 100.0):
        mdp = random_dense(generator, 5, 4, gamma)
        best = policy_iteration(mdp)
        tied = MDP(mdp.transition, mdp.expected_reward + best.values[:, None] - best.q_values, gamma)
        pairs = pairs_of(tied)
        for _ in range(50):
            values = best.values + scale * generator.standard_normal(5)
            q = backup(pairs, values)
            new = q.reshape(5, 4).max(axis=1)
            reach = gamma / (1.0 - gamma) * float(np.ptp(new - values))
            assert len(_eliminate(pairs, q, new, reach).reward) == 20
            assert len(_eliminate(pairs, q, new, 1e-3 * reach).reward) < 20  # a smaller range would


def test_the_span_rule_needs_fewer_sweeps():
    mdp = zoo.random_mdp(np.random.default_rng(4), 300, 3, 8, gamma=0.99)
    sup, span = value_iteration(mdp, tol=1e-6), value_iteration(mdp, tol=1e-6, stop="span")
    assert span.iterations < sup.iterations / 10
    assert np.abs(sup.values - span.values).max() <= 2e-6


def test_sup_norm_iterations_are_those_of_the_contraction():
    """One state, r = 1: V_k = Σ_{i≤k} γ^i, so the step that first has γ/(1−γ) γ^k ≤ tol is known."""
    mdp, tol = MDP([[[1.0]]], [[1.0]], 0.9), 1e-3
    found = value_iteration(mdp, tol=tol)
    steps = next(k for k in range(1, 1000) if 0.9 / 0.1 * 0.9**k <= tol)
    assert found.iterations == steps
    np.testing.assert_allclose(found.residuals, 0.9 ** np.arange(1, steps + 1), rtol=1e-10)
    assert found.values[0] == pytest.approx((1.0 - 0.9 ** (steps + 1)) / 0.1, rel=1e-12)


def test_policy_iteration_never_gets_worse_and_stops_at_a_fixed_point():
    mdp = random_dense(np.random.default_rng(5), 6, 4, 0.95)
    found = policy_iteration(mdp)
    assert found.policy.tolist() == found.q_values.argmax(axis=1).tolist()
    assert found.iterations < 4**6


def test_finite_horizon_is_exact():
    """V_h by brute force over all time-dependent policies of 3 steps; V_0 = 0; row h is for h steps to go."""
    mdp = random_dense(np.random.default_rng(6), 2, 2, 0.9)
    found = value_iteration(mdp, horizon=3)
    assert found.values.shape == found.policy.shape == (4, 2)
    assert found.values[0].tolist() == [0.0, 0.0]
    assert found.policy[0].tolist() == [-1, -1]
    best = np.full(2, -np.inf)
    for plan in product(product(range(2), repeat=2), repeat=3):  # plan[t][s]
        value = np.zeros(2)
        for actions in reversed(plan):
            index = np.arange(2)
            value = mdp.expected_reward[index, actions] + 0.9 * mdp.dense_transition[index, actions] @ value
        best = np.maximum(best, value)
    np.testing.assert_allclose(found.values[3], best, atol=1e-13)
    np.testing.assert_array_equal(value_iteration(mdp.replace(horizon=3)).values, found.values)


def test_a_long_horizon_approaches_the_infinite_one():
    mdp = random_dense(np.random.default_rng(7), 4, 2, 0.8)
    np.testing.assert_allclose(value_iteration(mdp, horizon=200).values[-1], best_of_all_policies(mdp), atol=1e-12)


def test_what_is_refused():
    mdp = random_dense(np.random.default_rng(8), 3, 2, 0.9)
    for solve in SOLVERS.values():
        with pytest.raises(ValueError, match="tol: a positive bound"):
            solve(mdp, tol=0.0)
        with pytest.raises(ValueError, match="tol: 1e-18"):
            solve(mdp, tol=1e-18)
    for solve in (policy_iteration, modified_policy_iteration):
        with pytest.raises(ValueError, match=r"horizon: .*best one depends on the time left"):
            solve(mdp.replace(horizon=5))
    with pytest.raises(ValueError, match="horizon: a positive number"):
        value_iteration(mdp, horizon=0)
    with pytest.raises(ValueError, match="stop: one of sup, span, got 'spam'"):
        _one_of("stop", "spam", ("sup", "span"))
    for call in (lambda: policy_iteration(mdp, evaluation="approximate"), lambda: value_iteration(mdp, stop="spam")):
        with pytest.raises((ValueError, TypeError)):  # the shape checker of the tests speaks first
            call()
    with pytest.raises(ValueError, match="sweeps: 0 or more"):
        modified_policy_iteration(mdp, sweeps=-1)


def test_progress_is_reported():
    seen = []
    found = value_iteration(random_dense(np.random.default_rng(9), 3, 2, 0.9), watch=lambda *x: seen.append(x))
    assert len(seen) == found.iterations
    assert seen[-1][1] <= 1e-8 < seen[0][1]


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("actions", [1, 2])
def test_solving_leaves_the_problem_as_it_is(solver, actions):
    mdp = random_dense(np.random.default_rng(10), 4, actions, 0.9)
    matrix, reward = mdp.matrix.copy(), mdp.expected_reward.copy()
    first, second = SOLVERS[solver](mdp), SOLVERS[solver](mdp)
    np.testing.assert_array_equal(mdp.expected_reward, reward)
    np.testing.assert_array_equal(mdp.matrix.data, matrix.data)
    np.testing.assert_array_equal(first.values, second.values)
