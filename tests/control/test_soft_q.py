"""Soft Q-learning on its own definitions: target and loss by hand, its policy, a known problem's soft optimum."""

import functools
import math
from dataclasses import replace
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch

from tests.control import worlds
from upslope.control import environments, offpolicy, offpolicy_presets, optimizers, qnetworks, soft_q
from upslope.control.agent import load
from upslope.control.offpolicy import State
from upslope.control.parameters import Net
from upslope.control.soft_q import SoftQ
from upslope.core import distributions
from upslope.runs import run as runs
from upslope.runs.run import Run

QUIET = runs.Config(quiet=True)
NETWORK = qnetworks.Boltzmann(hidden=(16, 16), alpha=0.5)


def small(environment_id: str = "CartPole-v1", num_envs: int = 2, **changes: object) -> SoftQ:
    config = SoftQ(
        environment=environments.Config(environment_id, num_envs, "sync"),
        network=NETWORK,
        run=QUIET,
        total_steps=200,
        replay_capacity=1000,
        learning_starts=20,
        batch_size=16,
        target_interval=50,
    )
    return replace(config, **changes)  # type: ignore[arg-type]


def choosing(state: State, net: Net, config: SoftQ) -> offpolicy.Choose:
    return offpolicy.choosing(functools.partial(soft_q.act, net), soft_q.behaviour(state.world.envs, config))


def begun(config: SoftQ, steps: int = 30) -> tuple[State, Net]:
    session = Run("soft-q", config, config.total_steps)
    start = lambda theta: ({"target": theta.clone()}, {"theta": config.optimizer.start(theta)})  # noqa: E731
    state, net = offpolicy.start(config, session, start, None)
    net.freeze(state.others["target"])
    state.others["target"].add_(0.1 * torch.randn(len(state.theta), generator=torch.Generator().manual_seed(5)))
    for _ in range(steps):
        state = offpolicy.collect(choosing(state, net, config), state, config, config.train_interval)
        state = offpolicy.advance(state, 0)
    return state, net


def test_target_and_loss_by_hand() -> None:
    state, net = begun(config := small(gamma=0.9, batch_size=100))
    batch = offpolicy.batch(state, config, offpolicy.draw(state, config, offpolicy.chances(config).at(0)[0]))
    assert (batch.discount == 0).any()
    found = soft_q.estimate(state, net, batch, config)
    q = net(state.others["target"], batch.next_observation).double().numpy()
    soft = 0.5 * np.log(np.exp(q / 0.5).sum(-1))
    target = batch.reward.numpy() + np.where(batch.discount.numpy() == 0, 0.0, 0.9 * soft)
    np.testing.assert_allclose(found.numpy(), target, rtol=1e-5)
    every = net(state.theta, batch.observation).detach().double().numpy()
    error = np.abs(every[np.arange(100), batch.action.numpy()] - target)
    huber = np.where(error <= 1, error**2 / 2, error - 0.5)
    loss, part = soft_q.objective(state.theta, net, batch, found, config)
    assert float(loss.detach()) == pytest.approx(-huber.mean(), rel=1e-5)
    p = np.exp(every / 0.5) / np.exp(every / 0.5).sum(-1, keepdims=True)
    np.testing.assert_allclose(part.entropy.numpy(), -(p * np.log(p)).sum(-1), rtol=1e-4)


def test_actions_are_drawn_from_exp_q_over_alpha() -> None:
    state, net = begun(config := small(num_envs=1, train_interval=4000, learning_starts=0), 0)
    observation = torch.tensor([[0.3, -0.2, 0.1, 0.5]])
    choose = choosing(state, net, config)
    share = np.mean([int(choose(state, observation, t)) for t in range(4000)])
    q = net(state.theta, observation)[0].detach().numpy() / 0.5
    expected = 1 / (1 + math.exp(q[0] - q[1]))
    assert abs(expected - 0.5) > 0.01
    assert share == pytest.approx(expected, abs=4 * 0.5 / math.sqrt(4000))
    policy = net.only("policy", state.theta, observation)
    assert isinstance(policy, distributions.Categorical)
    assert float(policy.logits.softmax(-1)[0, 1].detach()) == pytest.approx(expected, rel=1e-5)
    first = choosing(state, net, replace(config, learning_starts=10**6))
    assert np.mean([int(first(state, observation, t)) for t in range(4000)]) == pytest.approx(0.5, abs=0.04)


def test_the_soft_optimum_is_found() -> None:
    """Clock pays 1 a step for 3 steps whatever is done: Q(k, a) = Σ_j<n γ^j + Σ_1≤j<n γ^j α log 2, n = 3 - k left."""
    if "Short-v0" not in gym.registry:
        gym.register("Short-v0", entry_point=worlds.Clock, kwargs={"end": 3})
    config = small(
        "Short-v0", total_steps=6000, gamma=0.9, target_interval=10, learning_starts=50, batch_size=64,
        optimizer=optimizers.Adam(5e-3, 1e-8), network=replace(NETWORK, alpha=1.0), anneal_learning_rate=True,
    )  # fmt: skip
    agent = soft_q.train(config)
    for k in range(3):
        n = 3 - k
        expected = sum(0.9**j for j in range(n)) + sum(0.9**j * math.log(2) for j in range(1, n))
        observation = torch.tensor([[k, k + 0.5, 3.0]], dtype=torch.float32)  # the mean of what is seen on the way
        q = agent.net(agent.theta, observation).detach().numpy()
        np.testing.assert_allclose(q, expected, atol=0.1)


def test_a_run_is_loaded_again(tmp_path: Path) -> None:
    config = small(run=runs.Config(quiet=True, run_dir=tmp_path / "run"))
    agent = soft_q.train(config)
    back = load(config, tmp_path / "run")
    observation = np.random.default_rng(0).normal(size=(200, 4)).astype(np.float32)
    assert np.array_equal(agent.act(observation), back.act(observation))
    noise = distributions.gumbel((200, 2), torch.Generator().manual_seed(0))
    assert not np.array_equal(agent.act(observation, noise), agent.act(observation))
    assert len(back.evaluate(2, deterministic=False).returns) == 2
    assert torch.equal(agent.theta, soft_q.train(replace(config, run=QUIET)).theta)


def test_what_it_cannot_do_is_refused() -> None:
    with pytest.raises(ValueError, match="not supported by Q-learning; allowed: Discrete"):
        soft_q.train(small("Pendulum-v1"))
    with pytest.raises(ValueError, match=r"network.noisy is 'factorised', allowed: 'none'"):
        small(network=replace(NETWORK, noisy="factorised"))
    with pytest.raises(ValueError, match=r"alpha is 0.0, allowed: above 0"):
        replace(NETWORK, alpha=0.0)


@pytest.mark.slow
def test_learns_cartpole() -> None:
    config = replace(offpolicy_presets.SOFT_Q_PRESETS["CartPole-v1"], total_steps=10_000, run=QUIET)
    assert soft_q.train(config).evaluate(20).returns.mean() > 120  # at random about 22
