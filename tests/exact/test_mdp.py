"""The MDP: what it accepts, what it refuses and with which words, and where it comes from."""

import gymnasium
import numpy as np
import pytest
import scipy.sparse as sp
from hypothesis import given
from hypothesis import strategies as st

from tests.exact.problems import random_dense
from upslope.exact import MDP, from_gymnasium, from_logged
from upslope.exact.tables import blackjack

ENDS = [[[0.5, 0.5]], [[0.0, 1.0]]]


def test_dense_and_sparse_are_the_same_problem():
    dense = random_dense(np.random.default_rng(0), 5, 3, 0.9)
    sparse = MDP(sp.csr_array(dense.transition.reshape(15, 5)), sp.csr_array(dense.reward.reshape(15, 5)), 0.9)
    assert (sparse.num_states, sparse.num_actions) == (dense.num_states, dense.num_actions) == (5, 3)
    np.testing.assert_array_equal(sparse.dense_transition, dense.transition)
    np.testing.assert_allclose(sparse.expected_reward, dense.expected_reward, rtol=1e-15)
    by_hand = [
        [sum(dense.transition[s, a, x] * dense.reward[s, a, x] for x in range(5)) for a in range(3)] for s in range(5)
    ]
    np.testing.assert_allclose(dense.expected_reward, by_hand, rtol=1e-14)
    np.testing.assert_array_equal(dense.entry_reward, dense.reward.ravel())
    np.testing.assert_array_equal(sparse.entry_reward, dense.reward.ravel())


@pytest.mark.parametrize(
    ("transition", "reward", "gamma", "message"),
    [
        ([[[0.5, 0.4]], [[0.0, 1.0]]], [[1.0], [0.0]], 0.9, r"\(state 0, action 0\) sum to 0.9, not 1"),
        ([[[0.5, 0.5]], [[0.0, 1.0 + 1e-8]]], [[1.0], [0.0]], 0.9, r"\(state 1, action 0\) sum to 1.00000001, not 1"),
        ([[[1.5, -0.5]], [[0.0, 1.0]]], [[1.0], [0.0]], 0.9, r"negative probability -0.5 at \(state 0, action 0\)"),
        ([[[np.nan, 0.5]], [[0.0, 1.0]]], [[1.0], [0.0]], 0.9, r"transition: must be finite, got nan at \(state 0"),
        (ENDS, [[1.0], [np.inf]], 0.9, r"reward: must be finite, got inf at \(state 1, action 0\)"),
        (ENDS, [[1.0, 2.0]], 0.9, r"reward: \[S, A\] = \(2, 1\)"),
        (ENDS, [[1.0], [0.0]], 1.1, r"gamma: must lie in \[0, 1\], got 1.1"),
        (ENDS, [[1.0], [0.0]], float("nan"), "gamma: must lie"),
        ([[1.0, 0.0], [0.0, 1.0]], [[1.0], [0.0]], 0.9, r"transition: dense \[S, A, S\] or scipy sparse"),
        ([[[1.0], [1.0]], [[1.0]]], [[1.0], [0.0]], 0.9, "transition: a rectangular array"),
    ],
)
def test_malformed_input_is_refused_with_its_place(transition, reward, gamma, message):
    with pytest.raises(ValueError, match=message):
        MDP(transition, reward, gamma)


def test_a_wrong_sparse_row_is_named_with_its_sum():
    matrix = sp.csr_array(np.array([[0.5, 0.5], [0.0, 1.0], [0.7, 0.2], [1.0, 0.0]]))
    with pytest.raises(ValueError, match=r"\(state 1, action 0\) sum to 0.9, not 1 \(and 0 more"):
        MDP(matrix, np.zeros((2, 2)), 0.9)
    with pytest.raises(ValueError, match=r"row s·A \+ a"):
        MDP(sp.csr_array(np.ones((3, 2)) / 2), np.zeros((2, 2)), 0.9)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"initial": [0.5, 0.4]}, "initial: probabilities sum to 0.9, not 1"),
        ({"initial": [1.0]}, "initial: one probability per state"),
        ({"initial": [1.5, -0.5]}, "initial: probabilities must be finite and not negative"),
        ({"horizon": 0}, "horizon: a positive number"),
        ({"horizon": 1.5}, "horizon: a positive number"),
        ({"reward_std": [[-1.0], [0.0]]}, "reward_std: finite and not negative"),
        ({"state_names": ("one",)}, "state_names: 2 names needed, got 1"),
    ],
)
def test_malformed_fields_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        MDP(ENDS, [[1.0], [0.0]], 0.9, **fields)


def test_the_callers_arrays_are_neither_changed_nor_shared():
    transition = np.array(ENDS)
    mdp = MDP(transition, [[1.0], [0.0]], 0.9)
    transition[0, 0] = [1.0, 0.0]
    assert mdp.transition[0, 0, 0] == 0.5


def test_terminal_means_absorbing_and_silent():
    mdp = MDP(np.tile(np.eye(3)[:, None], (1, 2, 1)), [[0.0, 0.0], [0.0, 1.0], [0.0, 0.0]], 1.0)
    assert mdp.terminal.tolist() == [True, False, True]
    np.testing.assert_allclose(mdp.initial, [0.0, 1.0, 0.0])


def test_gymnasium_tables_keep_every_transition():
    """From every state that an episode can be in, the MDP moves as `env.P` says (terminations into terminal states)."""
    for name in ("FrozenLake-v1", "CliffWalking-v1", "Taxi-v4"):
        env = gymnasium.make(name).unwrapped
        mdp = from_gymnasium(name)
        ended = {entry[1] for s in env.P for a in env.P[s] for entry in env.P[s][a] if entry[3]}
        for s in env.P:
            if s in ended:
                continue
            for a in env.P[s]:
                row = mdp.matrix[[s * mdp.num_actions + a]].toarray()[0]
                reward = 0.0
                for probability, after, paid, terminated in env.P[s][a]:
                    reward += probability * paid
                    if not terminated:
                        assert row[after] >= probability - 1e-12
                over = sum(entry[0] for entry in env.P[s][a] if entry[3])
                assert row[mdp.terminal].sum() == pytest.approx(over, abs=1e-12)
                assert mdp.expected_reward[s, a] == pytest.approx(reward, abs=1e-12)
        np.testing.assert_allclose(np.asarray(mdp.initial)[: len(env.P)], env.initial_state_distrib, atol=1e-15)


def test_an_environment_without_a_table_is_refused():
    with pytest.raises(ValueError, match="CartPole-v1 has no table"):
        from_gymnasium("CartPole-v1")
    with pytest.raises(ValueError, match="FrozenLake"):
        from_gymnasium("FrozenLak-v1")


def test_blackjack_is_the_environments_game():
    """Monte Carlo on Gymnasium's own Blackjack, hitting below 17: rewards and first hands within 4 standard errors."""
    for options in ({"sab": True}, {"sab": False, "natural": True}):
        game = blackjack(sab=options["sab"], natural=options.get("natural", False))
        policy = np.array(
            [int(n != "end" and not n.startswith("natural") and int(n.split()[1]) < 17) for n in game.state_names]
        )
        from upslope.exact import evaluate_policy

        expected = evaluate_policy(game, policy).values @ game.initial
        env = gymnasium.make("Blackjack-v1", **options)
        rewards = []
        env.reset(seed=0)
        for _ in range(20_000):
            (total, _, _), _ = env.reset()
            over, reward = False, 0.0
            while not over:
                (total, _, _), reward, over, _, _ = env.step(int(total < 17))
            rewards.append(reward)
        assert abs(np.mean(rewards) - expected) < 4.0 * np.std(rewards) / len(rewards) ** 0.5


def test_logged_transitions_are_counted():
    """n(s,a,s')/n(s,a), mean reward, terminations into a terminal state: by hand."""
    log = {
        "state": [0, 0, 0, 0, 1],
        "action": [0, 0, 0, 1, 0],
        "reward": [1, 3, 0, 2, 5],
        "next_state": [1, 1, 0, 0, 2],
    }
    mdp = from_logged(**log, terminated=[False, False, False, False, True], gamma=0.9, unseen="stay")
    row = mdp.matrix.toarray()
    np.testing.assert_allclose(row[0], [1 / 3, 2 / 3, 0.0])
    np.testing.assert_allclose(mdp.expected_reward[0], [4 / 3, 2.0])
    np.testing.assert_allclose(row[1 * 2 + 1], [0.0, 1.0, 0.0])  # never tried: stays
    assert mdp.terminal.tolist() == [False, False, True]


def test_logged_truncation_is_not_termination():
    mdp = from_logged([0, 1], [0, 0], [1.0, 1.0], [1, 0], [False, False], gamma=0.5)
    assert not mdp.terminal.any()


def test_a_state_that_is_entered_alive_and_dead_gets_an_extra_end():
    mdp = from_logged([0, 0, 1], [0, 0, 0], [1.0, 1.0, 0.0], [1, 1, 0], [False, True, False], gamma=0.5)
    assert mdp.num_states == 3
    assert mdp.terminal.tolist() == [False, False, True]
    np.testing.assert_allclose(mdp.matrix.toarray()[0], [0.0, 0.5, 0.5])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"unseen": "refuse"}, r"no data for \(state 0, action 1\) and 1 more pairs"),
        ({"reward": [1.0, np.nan]}, "reward: must be finite, got nan at row 1"),
        ({"action": [0, 9], "num_actions": 2}, r"action: indices lie in 0…1, got 0…9"),
        ({"terminated": [False]}, "lengths must agree"),
    ],
)
def test_bad_logs_are_refused(change, message):
    log = {"state": [0, 1], "action": [0, 0], "reward": [1.0, 1.0], "next_state": [1, 0], "terminated": [False, False]}
    with pytest.raises(ValueError, match=message):
        from_logged(**(log | {"num_actions": 2, "num_states": 2, "gamma": 0.9} | ({"unseen": "stay"} | change)))


@given(st.integers(0, 10_000))
def test_logging_a_sampled_problem_recovers_it(seed):
    """With every pair seen, the estimated rows are the empirical frequencies: they sum to 1 and forbid the unseen."""
    generator = np.random.default_rng(seed)
    true = random_dense(generator, 3, 2, 0.9)
    s, a = np.repeat(np.arange(3), 2).repeat(20), np.tile(np.arange(2), 3).repeat(20)
    after = np.array([generator.choice(3, p=true.transition[i, j]) for i, j in zip(s, a, strict=True)])
    mdp = from_logged(s, a, true.reward[s, a, after], after, np.zeros(120, bool), 0.9, num_states=3)
    for i in range(3):
        for j in range(2):
            seen = after[(s == i) & (a == j)]
            np.testing.assert_allclose(mdp.dense_transition[i, j], np.bincount(seen, minlength=3) / 20, atol=1e-12)
