"""Sampled chains follow P, r and ρ₀; horizons end, limits cut; the noise is a function; and it is fast."""

import time

import gymnasium
import numpy as np
import pytest
import torch
from scipy.stats import chisquare, kstest

from tests.exact.problems import random_dense
from upslope.exact import MDP, BatchedMDP, evaluate_policy, zoo
from upslope.exact.registration import IDS, TabularEnv, make
from upslope.exact.sampling import draw, draw_start, outcomes


def wide(states: int) -> MDP:
    """Rows longer than what is compared whole, so that the binary search is taken."""
    return random_dense(np.random.default_rng(0), states, 2, 0.9)


def fits(counts: np.ndarray, expected: np.ndarray) -> bool:
    """χ² with p > 1e-6; outcomes expected fewer than 10 times are pooled, where χ² would not be χ² distributed."""
    rare = expected < 10.0
    pooled = [np.append(x[~rare], x[rare].sum()) for x in (counts, expected)]
    keep = pooled[1] > 0.0
    return keep.sum() == 1 or bool(chisquare(pooled[0][keep], pooled[1][keep]).pvalue > 1e-6)


@pytest.mark.parametrize("mdp", [zoo.frozen_lake(), wide(5), wide(80)], ids=["lake", "short rows", "long rows"])
@pytest.mark.parametrize("blocks", [False, True], ids=["counter", "noise passed in"])
def test_next_states_have_their_probabilities(mdp, blocks):
    """χ² on 200,000 draws from three rows; a p-value below 1e-6 is a mistake, not bad luck."""
    size, generator = 200_000, torch.Generator().manual_seed(0)
    chains = BatchedMDP(mdp, size)
    for state in (0, mdp.num_states // 3, mdp.num_states - 2):
        if mdp.terminal[state]:
            continue
        start = chains.reset(generator)._replace(observation=torch.full((size,), state))
        noise = torch.rand(size, generator=generator, dtype=torch.float64) if blocks else None
        after, reward, _, _ = chains.step(start, torch.ones(size, dtype=torch.int64), noise)
        counts = np.bincount(after.observation.numpy(), minlength=mdp.num_states)
        expected = mdp.dense_transition[state, 1]
        assert counts[expected == 0.0].sum() == 0
        assert fits(counts, size * expected)
        paid = (
            mdp.reward
            if isinstance(mdp.reward, np.ndarray)
            else mdp.reward.toarray().reshape(mdp.dense_transition.shape)
        )
        np.testing.assert_array_equal(reward.numpy(), paid[state, 1][after.observation.numpy()])


def test_starts_have_their_probabilities():
    mdp = wide(5).replace(initial=[0.1, 0.0, 0.2, 0.3, 0.4])
    observed = BatchedMDP(mdp, 200_000).reset(torch.Generator().manual_seed(1)).observation.numpy()
    counts = np.bincount(observed, minlength=5)
    assert counts[1] == 0
    assert fits(counts, 200_000 * np.asarray(mdp.initial))
    table = outcomes(mdp)
    assert draw_start(table, np.array([0.0, 1.0 - 2.0**-53])).tolist() == [4, 0]  # the extremes of [0, 1)


def test_the_edges_of_the_noise_stay_inside_the_row():
    """Uniform numbers 0 and 1 − 2^−53 give possible successors in every row, also far from row 0."""
    mdp = zoo.random_mdp(np.random.default_rng(2), 50_000, 2, 3, gamma=0.9)
    halves = np.zeros((160, 2, 160))  # even states lead into one half, odd ones into the other: neighbours never agree
    halves[::2, :, :80] = halves[1::2, :, 80:] = 1.0 / 80.0
    for reference in (mdp, MDP(halves, np.zeros((160, 2)), 0.9)):
        chains = BatchedMDP(reference, reference.num_states)
        start = chains.reset(torch.Generator().manual_seed(0))._replace(observation=torch.arange(reference.num_states))
        for level in (0.0, 1.0 - 2.0**-53):
            noise = torch.full((reference.num_states,), level, dtype=torch.float64)
            after = chains.step(start, torch.zeros(reference.num_states, dtype=torch.int64), noise)[0].observation
            rows = 2 * np.arange(reference.num_states)
            assert (np.asarray(reference.matrix[rows, np.array(after)]) > 0.0).all()


def test_noise_is_uniform_independent_and_a_function_of_the_state():
    chains = BatchedMDP(wide(5), 4096)
    state = chains.reset(torch.Generator().manual_seed(3))
    rows = []
    for _ in range(16):
        rows.append(chains._uniform(state, 0))
        state = chains.step(state, torch.zeros(4096, dtype=torch.int64))[0]
    noise = torch.stack(rows)
    assert kstest(noise.flatten().numpy(), "uniform").pvalue > 1e-6
    assert float(noise.min()) >= 0.0
    assert float(noise.max()) < 1.0
    correlation = np.corrcoef(noise.numpy())  # between steps
    assert np.abs(correlation - np.eye(16)).max() < 5.0 / 64.0
    assert np.abs(np.corrcoef(noise[:, :-1].flatten(), noise[:, 1:].flatten())[0, 1]) < 5.0 / 256.0  # between chains
    again = chains.step(state, torch.ones(4096, dtype=torch.int64))
    assert torch.equal(again[0].observation, chains.step(state, torch.ones(4096, dtype=torch.int64))[0].observation)
    other = chains.reset(torch.Generator().manual_seed(4))
    assert not torch.equal(other.counter, state.counter)


def test_noise_drawn_ahead_is_that_of_the_step():
    """Many steps' numbers are drawn at once: walking on, going back, and two walks in turns meet the same ones."""
    chains, action = BatchedMDP(wide(5), 1024), torch.zeros(1024, dtype=torch.int64)
    one, other = (chains.reset(torch.Generator().manual_seed(seed)) for seed in (0, 1))
    first = one
    for step in range(200):
        for state in (one, other, first) if step % 3 == 0 else (one,):
            for stream in range(3):
                assert torch.equal(chains._uniform(state, stream), chains._hash(state.counter, stream))
        one = chains.step(one, action)[0]
        other = chains.step(other, action)[0] if step % 3 == 0 else other


def test_long_run_average_of_chains_is_the_stationary_reward():
    """Average reward of 4096 chains over 200 steps against the exact one, within 5 standard errors over chains."""
    from upslope.exact import average_reward

    mdp = zoo.random_mdp(np.random.default_rng(5), 20, 2, 4, gamma=0.9)
    policy = np.random.default_rng(6).dirichlet(np.ones(2), 20)
    chains, generator = BatchedMDP(mdp, 4096), torch.Generator().manual_seed(7)
    state, cumulative = chains.reset(generator), torch.from_numpy(policy[:, 0])
    total = torch.zeros(4096, dtype=torch.float64)
    for step in range(250):
        action = (torch.rand(4096, generator=generator, dtype=torch.float64) >= cumulative[state.observation]).long()
        state, reward, _, _ = chains.step(state, action)
        total += reward if step >= 50 else 0.0
    mean = total / 200
    assert abs(float(mean.mean()) - average_reward(mdp, policy)) < 5.0 * float(mean.std()) / 64.0


def test_horizon_terminates_and_limit_truncates():
    """Beyond the problem's own horizon nothing counts; a time limit only cuts."""
    loop = random_dense(np.random.default_rng(8), 3, 1, 1.0)
    zero = torch.zeros(2, dtype=torch.int64)
    for options, flags in (
        ({"mdp": loop.replace(horizon=3)}, (True, False)),
        ({"mdp": loop, "time_limit": 3}, (False, True)),
    ):
        chains = BatchedMDP(**options, batch=2)
        state = chains.reset(torch.Generator().manual_seed(0))
        for step in range(1, 4):
            state, _, terminated, truncated = chains.step(state, zero)
            expected = flags if step == 3 else (False, False)
            assert (bool(terminated.all()), bool(truncated.all())) == expected
        state = chains.restart(state, torch.tensor([True, False]))
        assert state.time.tolist() == [0, 3]


def test_reward_noise():
    mdp = zoo.maximization_bias()
    chains = BatchedMDP(mdp, 50_000)
    state = chains.reset(torch.Generator().manual_seed(0))._replace(observation=torch.ones(50_000, dtype=torch.int64))
    reward = chains.step(state, torch.zeros(50_000, dtype=torch.int64))[1].numpy()
    assert kstest(reward, "norm", args=(-0.1, 1.0)).pvalue > 1e-6
    table = outcomes(mdp)
    sampled = draw(table, np.ones(50_000, int), np.zeros(50_000, int), np.random.default_rng(0))[1]
    assert kstest(sampled, "norm", args=(-0.1, 1.0)).pvalue > 1e-6


def test_it_compiles_in_principle():
    """No data-dependent Python: the step traces to one graph without breaks, and gives the same transitions."""
    chains = BatchedMDP(zoo.frozen_lake(), 64)
    state, action = chains.reset(torch.Generator().manual_seed(0)), torch.zeros(64, dtype=torch.int64)
    traced = torch.compile(chains.step, backend="eager", fullgraph=True)
    for one, other in zip(traced(state, action)[0], chains.step(state, action)[0], strict=True):
        assert torch.equal(one, other)


@pytest.mark.alone
def test_five_million_transitions_a_second():
    """1,024 chains on one core: the best of short runs, for up to a minute, as others slow the core by turns."""
    mdp = zoo.random_mdp(np.random.default_rng(9), 1000, 4, 10, gamma=0.9)
    chains, threads = BatchedMDP(mdp, 1024), torch.get_num_threads()
    actions = torch.randint(0, 4, (64, 1024), generator=torch.Generator().manual_seed(0))
    torch.set_num_threads(1)
    try:
        state, best = chains.reset(torch.Generator().manual_seed(0)), 0.0
        give_up = time.perf_counter() + 60
        while best < 5e6 and time.perf_counter() < give_up:
            started = time.perf_counter()
            for action in actions:
                state = chains.step(state, action)[0]
            best = max(best, 64 * 1024 / (time.perf_counter() - started))
    finally:
        torch.set_num_threads(threads)
    assert best >= 5e6


def test_what_is_refused():
    with pytest.raises(ValueError, match="batch and time_limit: positive, got 0"):
        BatchedMDP(zoo.cliff(), 0)


# ---- Gymnasium ids
# -----------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore")
def test_the_zoo_is_registered():
    from gymnasium.utils.env_checker import check_env

    for name in IDS:
        env = gymnasium.make(f"upslope.exact.registration:upslope/{name}-v0")
        check_env(env.unwrapped, skip_render_check=True)
        assert env.reset(seed=3)[0].tolist() == env.reset(seed=3)[0].tolist()


def test_the_registered_corridor_is_the_books():
    """All states look alike, and random play returns −12 on average: v(½), within 4 standard errors."""
    env = gymnasium.make("upslope.exact.registration:upslope/ShortCorridor-v0")
    generator, returns = np.random.default_rng(0), []
    env.reset(seed=0)
    for _ in range(1500):
        observation, _ = env.reset()
        total, over = 0.0, False
        while not over:
            assert observation.tolist() == [1.0]
            observation, reward, terminated, truncated, _ = env.step(generator.integers(2))
            total, over = total + reward, terminated or truncated
        returns.append(total)
    assert abs(np.mean(returns) + 12.0) < 4.0 * np.std(returns) / 1500**0.5


def test_a_tabular_environment_shows_what_it_is_told_to():
    env = make("random-walk", observation="index")
    assert env.reset(seed=0)[0] == 3
    assert make("chain", states=5).reset(seed=0)[0].tolist() == [1.0, 1.0, 0.0, 0.0, 0.0]
    with pytest.raises(ValueError, match="observation: "):
        make("chain", observation="pixels")
    with pytest.raises(ValueError, match="features: one row per state"):
        TabularEnv(zoo.random_walk(), np.ones((3, 1)))
    with pytest.raises(ValueError, match="action: 0…0, got 1"):
        env.step(1)


def test_a_horizon_ends_an_episode_of_the_environment():
    env = make("chain", states=4)
    env.reset(seed=0)
    steps = 1
    while not env.step(1)[2]:
        steps += 1
    assert steps == 11
    assert evaluate_policy(env.mdp, np.ones(4, int)).values[-1][1] == 10.0
