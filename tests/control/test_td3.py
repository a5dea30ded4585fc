"""TD3 and DDPG on their own definitions: targets, losses and gradients by hand, delay, smoothing, noise, learning."""

import functools
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.control.test_sac import ASYMMETRIC, normal
from upslope.control import (
    action_noise,
    actors,
    ddpg,
    environments,
    normalization,
    offpolicy,
    offpolicy_presets,
    optimizers,
    td3,
)
from upslope.control.agent import load
from upslope.control.ddpg import DDPG
from upslope.control.offpolicy import State
from upslope.control.td3 import TD3
from upslope.runs import run as runs
from upslope.runs.randomness import generator
from upslope.runs.run import Run

QUIET = runs.Config(quiet=True)
NETWORK = actors.Config(hidden=(8, 8), activation="tanh")
LOW, HIGH = torch.tensor([-1.0, 2.0]), torch.tensor([3.0, 10.0])
BOTH = pytest.mark.parametrize(("module", "kind"), [(td3, TD3), (ddpg, DDPG)])


def small(kind: Any = TD3, environment_id: str = ASYMMETRIC, num_envs: int = 2, **changes: object) -> Any:
    config = kind(
        environment=environments.Config(environment_id, num_envs, "sync"),
        network=NETWORK,
        run=QUIET,
        total_steps=60,
        replay_capacity=1000,
        learning_starts=20,
        batch_size=16,
    )
    return replace(config, **changes)


def choosing(state: State, nets: Any, config: Any) -> offpolicy.Choose:
    act = functools.partial(action_noise.act, nets.actor)
    return offpolicy.choosing(act, action_noise.behaviour(nets.actor, state.world.envs, config))


def begun(module: Any, config: Any, steps: int = 30) -> tuple[State, Any]:
    """A run whose replay holds some steps and whose targets are others than what they follow."""
    state, nets = module.begin(config, Run("td3", config, config.total_steps))
    for name in ("actor_target", "critic_target"):
        state.others[name].add_(0.1 * normal(len(state.others[name]), seed=5))
    for _ in range(steps):
        state = offpolicy.collect(choosing(state, nets, config), state, config, config.train_interval)
        state = offpolicy.advance(state, 0)
    return state, nets


def q_of(nets: Any, theta: torch.Tensor, observation: torch.Tensor, action: torch.Tensor) -> torch.Tensor:
    """Each critic on its own, layer by layer."""
    views = nets.critic.views(theta)
    inputs = torch.cat([observation, 2 * (action - LOW) / (HIGH - LOW) - 1], -1)
    found = []
    for i in range(len(views["weights.0"])):
        x = inputs
        for k in range(3):
            x = (torch.tanh(x) if k else x) @ views[f"weights.{k}"][i] + views[f"biases.{k}"][i]
        found.append(x[:, 0])
    return torch.stack(found)


def unit_of(nets: Any, theta: torch.Tensor, observation: torch.Tensor) -> torch.Tensor:
    x = observation
    weights = list(nets.actor.views(theta).values())
    for k in range(0, 6, 2):
        x = torch.tanh(x @ weights[k].T + weights[k + 1])
    return x


def stretch(unit: torch.Tensor) -> torch.Tensor:
    return (LOW + HIGH) / 2 + unit * (HIGH - LOW) / 2


@BOTH
def test_target_objectives_and_gradients_by_hand(module: Any, kind: Any) -> None:
    state, nets = begun(module, config := small(kind, gamma=0.9))
    assert len(nets.critic.views(state.others["critic"])["weights.0"]) == (2 if kind is TD3 else 1)
    batch = offpolicy.batch(state, config, offpolicy.draw(state, config, offpolicy.chances(config).at(0)[0]))
    assert (batch.discount == 0).any()
    unit = unit_of(nets, state.others["actor_target"], batch.next_observation)
    if kind is TD3:
        noise = 4 * normal(16, 2, seed=3)  # many beyond the clip
        found = td3.estimate(state, nets, batch, noise, config)
        shift = torch.where((0.2 * noise).abs() > 0.5, 0.5 * noise.sign(), 0.2 * noise)
        assert (shift.abs() == 0.5).any()
        assert (shift.abs() < 0.5).any()
        unit = torch.minimum(torch.maximum(unit + shift, -torch.ones(2)), torch.ones(2))
    else:
        found = ddpg.estimate(state, nets, batch)
    ahead = q_of(nets, state.others["critic_target"], batch.next_observation, stretch(unit)).min(0).values
    target = torch.where(batch.discount == 0, batch.reward, batch.reward + 0.9 * ahead)
    torch.testing.assert_close(found, target)

    leaf = state.others["critic"].clone().requires_grad_()
    loss = -(0.5 * (q_of(nets, leaf, batch.observation, batch.action) - target).square()).sum(0).mean()
    (slope,) = torch.autograd.grad(loss, leaf)
    gradient, value, _ = nets.critic.gradient(module.critic_objective, state.others["critic"], nets, batch, target)
    torch.testing.assert_close(value, loss.detach())
    torch.testing.assert_close(gradient, slope, atol=1e-5, rtol=1e-4)

    leaf = state.theta.clone().requires_grad_()
    q = q_of(nets, state.others["critic"], batch.observation, stretch(unit_of(nets, leaf, batch.observation)))
    (slope,) = torch.autograd.grad(q[0].mean(), leaf)
    gradient, value, _ = nets.actor.gradient(module.objective, state.theta, nets, batch)
    torch.testing.assert_close(value, q[0].mean().detach())
    torch.testing.assert_close(gradient, slope, atol=1e-6, rtol=1e-4)


@BOTH
def test_targets_of_several_steps(module: Any, kind: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The replay's reward and discount of n steps reach the target."""
    batches, learn, draws, draw = [], module.learn, [], offpolicy.draw

    def drawing(*given: Any) -> Any:
        draws.append(draw(*given))
        return draws[-1]

    def watched(state: State, nets: Any, batch: Any, *given: Any) -> Any:
        batches.append((batch, state.replay.batch(draws[-1].row, 0.9, 3)))
        return learn(state, nets, batch, *given)

    monkeypatch.setattr(offpolicy, "draw", drawing)
    monkeypatch.setattr(module, "learn", watched)
    module.train(small(kind, gamma=0.9, n_step=3))
    assert batches
    for batch, expected in batches:
        assert torch.equal(batch.reward, expected.reward)
        assert torch.equal(batch.discount, expected.discount)
        assert torch.equal(batch.next_observation, expected.next_observation)
    assert any(torch.isclose(batch.discount, torch.tensor(0.9**3)).any() for batch, _ in batches)


@pytest.mark.parametrize("delay", [1, 3])
def test_policy_and_targets_move_when_they_are_due(delay: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Counted through the whole run, not from each iteration's first step."""
    config = small(policy_delay=delay, gradient_steps=2, target_tau=0.25)
    moved, update = [], td3.update

    def watched(state: State, *given: Any) -> Any:
        names = ("critic", "critic_target", "actor_target")
        before = {"theta": state.theta.clone(), **{name: state.others[name].clone() for name in names}}
        after = update(state, *given)
        new = {"theta": state.theta, **{name: state.others[name] for name in names}}
        moved.append(tuple(not torch.equal(before[name], new[name]) for name in new))
        if moved[-1][0]:
            for target, online in (("actor_target", "theta"), ("critic_target", "critic")):
                torch.testing.assert_close(new[target], 0.75 * before[target] + 0.25 * new[online])
        return after

    monkeypatch.setattr(td3, "update", watched)
    td3.train(config)
    assert len(moved) >= 12
    assert moved == [(due, True, due, due) for due in ((k + 1) % delay == 0 for k in range(len(moved)))]


@BOTH
def test_noise_stays_within_the_bounds_of_actions(module: Any, kind: Any) -> None:
    config = small(kind, noise=action_noise.Config(std=0.5), learning_starts=0)
    state, nets = begun(module, config, 0)
    noise = torch.randn(64, 2, 2, generator=generator(config.run.seed, "behaviour", 0))[0]
    observation = normal(2, 3)
    action = choosing(state, nets, config)(state, observation, 0)
    torch.testing.assert_close(action, stretch((unit_of(nets, state.theta, observation) + 0.5 * noise).clamp(-1, 1)))
    wild = replace(config, noise=action_noise.Config(std=100.0))
    action = choosing(state, nets, wild)(state, observation, 0)
    assert (((action - LOW).abs() < 1e-5) | ((action - HIGH).abs() < 1e-5)).all()


def test_wandering_noise_goes_on_and_begins_anew_with_an_episode() -> None:
    noise = action_noise.Config("ornstein-uhlenbeck", std=0.5, pull=2.0, dt=0.1)
    config = small(DDPG, noise=noise, learning_starts=0, total_steps=10_000)
    state, nets = begun(ddpg, config, 0)
    by_hand, restarts = torch.zeros(2, 2), 0
    for _ in range(80):
        fresh = torch.from_numpy(state.world.episode_length == 0)
        restarts += int(fresh.sum())
        block = generator(config.run.seed, "behaviour", state.iteration // 64)
        drawn = torch.randn(64, 2, 2, generator=block)[state.iteration % 64]
        by_hand = torch.where(fresh[:, None], 0.0, by_hand)
        by_hand = by_hand * (1 - 2.0 * 0.1) + 0.5 * 0.1**0.5 * drawn
        state = offpolicy.advance(offpolicy.collect(choosing(state, nets, config), state, config, 1), 0)
        torch.testing.assert_close(state.others["noise"], by_hand)
        assert "others.noise" in offpolicy.pack(state)
    assert 4 < restarts < 80
    assert "noise" not in begun(ddpg, small(DDPG), 0)[0].others


@BOTH
def test_a_run_is_loaded_again(module: Any, kind: Any, tmp_path: Path) -> None:
    config = small(
        kind, "Pendulum-v1", normalize=normalization.Config(observation=True),
        run=runs.Config(quiet=True, run_dir=tmp_path / "run"),
    )  # fmt: skip
    agent = module.train(config)
    back = load(config, tmp_path / "run")
    observation = np.random.default_rng(0).normal(size=(5, 3)).astype(np.float32)
    assert np.array_equal(agent.act(observation), back.act(observation))
    assert np.array_equal(agent.evaluate(2).returns, back.evaluate(2, deterministic=False).returns)
    assert torch.equal(agent.theta, module.train(replace(config, run=QUIET)).theta)
    never = module.train(replace(config, run=QUIET, learning_starts=1000))
    assert all(bool((part != 0).any()) for part in agent.net.views(agent.theta - never.theta).values())


@BOTH
def test_what_it_cannot_do_is_refused(module: Any, kind: Any) -> None:
    with pytest.raises(ValueError, match="allowed: a bounded Box of floats"):
        module.train(small(kind, "CartPole-v1"))
    with pytest.raises(ValueError, match="learning_starts is -1, allowed: 0 or more"):
        small(kind, learning_starts=-1)
    with pytest.raises(ValueError, match="n_step is 0, allowed: 1 or more"):
        small(kind, n_step=0)
    with pytest.raises(ValueError, match=r"dt is 0.0, allowed: above 0"):
        small(kind, noise=action_noise.Config(dt=0.0))
    if kind is TD3:
        with pytest.raises(ValueError, match="policy_delay is 0, allowed: 1 or more"):
            small(policy_delay=0)
        with pytest.raises(ValueError, match="smoothing_clip is -1, allowed: 0 or more"):
            small(smoothing_clip=-1)


@pytest.mark.slow
@BOTH
def test_learns_pendulum(module: Any, kind: Any) -> None:
    """The median of three seeds: one alone is at the mercy of the processor's rounding."""
    preset = (offpolicy_presets.TD3_PRESETS if kind is TD3 else offpolicy_presets.DDPG_PRESETS)["Pendulum-v1"]
    config = replace(
        preset, network=actors.Config(hidden=(64, 64)), optimizer=optimizers.Adam(1e-3, 1e-8), batch_size=128,
        gamma=0.95, target_tau=0.01, total_steps=5000, learning_starts=500,
    )  # fmt: skip
    seeded = [replace(config, run=replace(QUIET, seed=seed)) for seed in (1, 2, 3)]
    returns = [module.train(each).evaluate(20).returns.mean() for each in seeded]
    assert sorted(returns)[1] > -500  # about -200; at random -1200
