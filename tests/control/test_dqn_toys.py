"""What each addition to Q-learning is for, on problems small enough to know the answer (REFERENCE_RESULTS 2)."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from gymnasium import spaces

from upslope.control import dqn, environments, optimizers, qnetworks
from upslope.control.dqn import DQN
from upslope.control.parameters import Net
from upslope.control.replay import Replay
from upslope.control.sum_tree import SumTree
from upslope.core import values
from upslope.runs import run as runs

# Double: the maximum of noisy estimates is too high


def test_double_q_learning_is_not_fooled_by_noise() -> None:
    """Sutton & Barto 6.7: from A, left leads to B, whose ten actions pay N(-0.1, 1). Left is worse than right.

    Sampled with the very targets that DQN uses. The share of left after 20 and 100 episodes, exact by 10,000 runs: Q
    0.94 and 0.46, double 0.28 and 0.095 (van Hasselt's two tables).
    """
    random, runs_, rows = np.random.default_rng(0), 400, torch.arange(400)
    left = {}
    for double in (False, True):
        a = torch.zeros(2, runs_, 2, dtype=torch.float64)  # two tables; Q-learning uses the first
        b = torch.zeros(2, runs_, 10, dtype=torch.float64)
        gone_left = np.zeros((runs_, 100))
        for episode in range(100):
            acting = a.sum(0) if double else a[0]
            ties = torch.from_numpy(random.random((runs_, 2))) * 1e-9
            greedy = (acting + ties).argmax(-1)
            explore = torch.from_numpy(random.random(runs_) < 0.1)
            action = torch.where(explore, torch.from_numpy(random.integers(0, 2, runs_)), greedy)
            gone_left[:, episode] = (action == 0).numpy()
            acting_b = b.sum(0) if double else b[0]
            ties = torch.from_numpy(random.random((runs_, 10))) * 1e-9
            explore = torch.from_numpy(random.random(runs_) < 0.1)
            second = torch.where(explore, torch.from_numpy(random.integers(0, 10, runs_)), (acting_b + ties).argmax(-1))
            reward = torch.from_numpy(random.normal(-0.1, 1, runs_))
            k = torch.from_numpy(random.integers(0, 2, runs_)) if double else torch.zeros(runs_, dtype=torch.int64)
            mine, other = b[k, rows], b[1 - k, rows]
            discount = (action == 0).double()  # right ends with 0
            zero = torch.zeros(runs_, dtype=torch.float64)
            target = (
                values.double_q_target(zero, mine, other, discount) if double else values.q_target(zero, mine, discount)
            )
            a[k, rows, action] += 0.1 * (target - a[k, rows, action])
            went = action == 0
            b[k[went], rows[went], second[went]] += 0.1 * (reward[went] - b[k[went], rows[went], second[went]])
        left[double] = gone_left.mean(0)
    error = 3 * 0.5 / np.sqrt(runs_) + 0.02
    assert left[False][19] == pytest.approx(0.94, abs=error)
    assert left[False][99] == pytest.approx(0.46, abs=error)
    assert left[True][19] == pytest.approx(0.28, abs=error)
    assert left[True][99] == pytest.approx(0.095, abs=error)


# Prioritised: rare rewards are found again


def cliffwalk(n: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """All 2^(n+1)-2 transitions of every action sequence; the right action alternates, at the end it pays 1."""
    transitions = []
    for sequence in range(2**n):
        for state in range(n):
            action = (sequence >> state) & 1
            right = action == state % 2
            last = right and state == n - 1
            transitions.append((state, action, float(last), state + 1, not right or last))
            if not right:
                break
    columns = [np.array(column) for column in zip(*transitions, strict=True)]
    return columns[0], columns[1], columns[2], columns[3], columns[4]


def updates_until_learned(n: int, how: str, seed: int, limit: int = 200_000) -> int:
    """Tabular Q-learning, one transition a step, until the mean squared error is below 1e-3."""
    state, action, reward, after, ended = cliffwalk(n)
    random, gamma, rate = np.random.default_rng(seed), 1 - 1 / n, 0.25
    q = random.normal(0, 0.1, (n + 1, 2))
    q[n] = 0.0
    true = np.zeros((n, 2))
    for k in range(n):
        true[k, k % 2] = gamma ** (n - 1 - k)
    q_of = lambda: reward + gamma * ~ended * q[after].max(-1) - q[state, action]  # noqa: E731
    tree = SumTree(len(state))
    tree.set(np.arange(len(state)), 1.0)  # every transition is seen before its error is known
    for step in range(limit):
        if np.mean((q[:n] - true) ** 2) < 1e-3:
            return step
        if how == "uniform":
            i = int(random.integers(len(state)))
        elif how == "oracle":  # the transition after which the error is least
            delta = q_of()
            now = q[state, action] - true[state, action]
            i = int((now**2 - (now + rate * delta) ** 2).argmax())
        else:
            i = int(tree.find(random.random(1))[0])
        delta = reward[i] + gamma * (not ended[i]) * q[after[i]].max() - q[state[i], action[i]]
        q[state[i], action[i]] += rate * delta
        if how == "prioritised":
            tree.set(np.array([i]), (abs(delta) + 1e-6) ** 1.0)
    return limit


def test_cliffwalk_has_as_many_transitions_as_the_paper_says() -> None:
    for n in range(2, 9):
        everything = 2**n  # the sequences that differ only after a mistake are the same transitions
        assert everything <= len(cliffwalk(n)[0]) == 2 ** (n + 1) - 2


def test_priorities_find_the_rare_reward_again() -> None:
    """Blind cliffwalk (Schaul et al. 2016, appendix B.1): oracle < prioritised < uniform, and the gap grows with n."""
    ratio = {}
    for n in (6, 9):
        median = {
            how: np.median([updates_until_learned(n, how, seed) for seed in range(3)])
            for how in ("oracle", "prioritised", "uniform")
        }
        assert median["oracle"] < median["prioritised"] < median["uniform"]
        ratio[n] = median["uniform"] / median["prioritised"]
    assert ratio[9] > ratio[6]


def test_importance_weights_restore_the_mean() -> None:
    """One state, rewards 0 and 10 with probability .9 and .1: with β = 1 the only fixed point is their mean, 1.0.

    With priorities |r - Q|^α and weights (1 / N P)^β the expected step is Σ |r - Q|^α (1-β) (r - Q) (r's share).
    """
    space = spaces.Box(-1, 1, (1,), np.float32)
    memory = Replay(space, spaces.Discrete(2), 1, 100, prioritised=True)
    zero, yes = np.zeros((1, 1), np.float32), np.array([True])
    memory.begin(zero)
    for k in range(10):
        reward = np.array([10.0 if k == 0 else 0.0])
        memory.append(np.array([0]), environments.Transition(zero, zero, reward, yes, ~yes, yes, None))
    here = np.flatnonzero(memory.ahead)
    rewards = memory.reward[here]
    assert memory.tree is not None

    def expected_step(q: float, alpha: float, beta: float) -> float:
        memory.prioritise(here, rewards - q, alpha, 0.0)
        p = memory.tree.leaves[here] / memory.tree.total()  # type: ignore[union-attr]
        row, weight = memory.prioritised(np.random.default_rng(0).random(4000), beta)
        of = dict(zip(row.tolist(), weight.tolist(), strict=True))
        return sum(p[k] * of[row] * (rewards[k] - q) for k, row in enumerate(here.tolist()))

    assert expected_step(1.0, alpha=0.7, beta=1.0) == pytest.approx(0.0, abs=1e-12)
    assert expected_step(0.9, alpha=0.7, beta=1.0) > 1e-3
    assert expected_step(1.1, alpha=0.7, beta=1.0) < -1e-3
    # without weights it lies where Σ |r - Q|^α (r - Q) = 0: 9 Q^1.7 = (10 - Q)^1.7
    biased = 10 / (1 + 9 ** (1 / 1.7))
    assert expected_step(biased, alpha=0.7, beta=0.0) == pytest.approx(0.0, abs=1e-9)
    assert biased > 2


# Dueling: V and A are identified


def test_dueling_advantages_have_mean_zero_and_v_is_the_mean_of_q() -> None:
    """V + c and A - c would be the same Q; with the mean, V is the mean of Q and A's level does nothing."""
    space = spaces.Box(-1, 1, (3,), np.float32)
    config = qnetworks.Config(hidden=(8, 8), dueling=True)
    net = Net(config.build(space, spaces.Discrete(4), seed=1))
    theta = net.bind(net.initial())
    observation = torch.randn(20, 3, generator=torch.Generator().manual_seed(0))
    q = net(theta, observation)
    head = net.module.policy.head  # type: ignore[union-attr]
    features = net.module.policy.torso(observation)  # type: ignore[union-attr, operator]
    torch.testing.assert_close(q.mean(-1), head.value(features, None).squeeze(-1), rtol=1e-5, atol=1e-6)  # type: ignore
    views = net.views(theta)
    bias = "policy.head.advantage.layers.1.bias"
    views[bias].add_(3.0)
    torch.testing.assert_close(net(theta, observation), q, rtol=1e-5, atol=1e-5)
    views["policy.head.value.layers.1.bias"].add_(3.0)
    torch.testing.assert_close(net(theta, observation), q + 3, rtol=1e-5, atol=1e-5)


def test_dueling_generalises_over_actions_that_do_the_same() -> None:
    """A step on one action moves Q of all actions of a state by V; a single stream moves only its own."""
    space, actions = spaces.Box(-1, 1, (3,), np.float32), spaces.Discrete(10)
    moved = {}
    for dueling in (False, True):
        net = Net(qnetworks.Config(hidden=(8,), dueling=dueling).build(space, actions, seed=1))
        theta = net.bind(net.initial())
        observation = torch.ones(1, 3)
        before = net(theta, observation).detach().clone()
        step = lambda theta, x, net=net: (net(theta, x)[0, 4], None)  # noqa: E731
        gradient, _, _ = net.gradient(step, theta, observation)
        for name, view in net.views(theta).items():
            if name.endswith(".layers.1.bias") and ("advantage" in name or "value" in name):
                view += 0.1 * net.views(gradient)[name]
        moved[dueling] = (net(theta, observation) - before)[0]
    assert moved[False].nonzero().flatten().tolist() == [4]
    # V's bias moves by 0.1 · 1; A's by 0.1 (1 - 1/10) for the action and - 0.1 / 10 for the others, less their mean 0
    np.testing.assert_allclose(moved[True].detach().numpy(), [0.09] * 4 + [0.19] + [0.09] * 5, atol=1e-6)


# Noisy: exploration that holds on


@pytest.mark.slow
def test_noisy_networks_explore_a_deep_sea() -> None:
    """DeepSea of size 8: only 8 moves right in a row pay 0.99, one path in 256; without noise or ε none is found.

    Which action goes right is drawn for each state: a network that prefers one action everywhere finds nothing.
    """
    found = {}
    for noisy in ("none", "factorised"):
        config = DQN(
            environment=environments.Config(
                "upslope.exact.registration:upslope/DeepSea-v0", 1, kwargs={"size": 8, "mapping_seed": 0}
            ),
            network=qnetworks.Config(hidden=(32,), noisy=noisy),  # type: ignore[arg-type]
            optimizer=optimizers.Adam(learning_rate=3e-3, epsilon=1e-8),
            run=runs.Config(quiet=True),
            total_steps=4_000,
            learning_starts=64,
            train_interval=2,
            batch_size=32,
            target_interval=64,
            gamma=0.99,
            epsilon_start=0.0,
            epsilon_end=0.0,
        )
        found[noisy] = [float(dqn.train(_seeded(config, seed)).evaluate(1).returns[0]) for seed in range(4)]
    assert sum(value > 0.9 for value in found["factorised"]) >= 2
    assert not any(value > 0.9 for value in found["none"])


def _seeded(config: DQN, seed: int) -> DQN:
    return replace(config, run=replace(config.run, seed=seed))
