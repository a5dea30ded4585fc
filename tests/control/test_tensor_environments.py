"""Tensor environments are Gymnasium's, step for step; and a run on them is a run like any other."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch

from tests.control.own_tensors import Place, Walk, WalkEnv
from tests.control.test_kill import kill_when, same
from tests.program import SMALL, command, succeed
from upslope.control import (
    dqn,
    environments,
    fast_dqn,
    fast_ppo,
    networks,
    normalization,
    ppo,
    rollout,
    tensor_environments,
    tensor_rollout,
)
from upslope.control.parameters import Net
from upslope.runs import run as runs

CLASSIC = ("CartPole-v1", "Pendulum-v1", "Acrobot-v1", "MountainCar-v0", "MountainCarContinuous-v0")
TABULAR = "upslope.exact.registration:upslope/"


def draws(seed: int, size: int) -> torch.Tensor:
    """The uniform numbers that Gymnasium's own generator gives, [1, size]."""
    return torch.from_numpy(gym.utils.seeding.np_random(seed)[0].random((1, size)))


def as_state(state: tuple[torch.Tensor, ...], values: np.ndarray, time: int) -> tuple[torch.Tensor, ...]:
    parts = [torch.tensor([float(value)], dtype=torch.float64) for value in values]
    return type(state)(*parts, torch.tensor([time]))


@pytest.mark.parametrize("name", CLASSIC)
@pytest.mark.parametrize("seed", range(4))
def test_every_step_is_gymnasiums(name: str, seed: int) -> None:
    """From Gymnasium's own float64 state, its action and its draws: state, reward, end and observation are the same."""
    env = gym.make(name)
    inner, tensor = env.unwrapped, tensor_environments.tensors(env)
    env.action_space.seed(seed)
    seen, _ = env.reset(seed=seed)
    state = tensor.reset(draws(seed, tensor.reset_noise))
    np.testing.assert_allclose(np.array(state[:-1]).ravel(), inner.state, rtol=1e-15)
    np.testing.assert_allclose(tensor.observe(state)[0].numpy(), seen, rtol=1e-6)
    push = 0
    for time in range(250):
        action = env.action_space.sample()
        if name.startswith("Mountain") and time % 90 < 60:  # swing with the motion: the wall and the goal are reached
            push = 1 if inner.state[1] >= 0 else -1
            action = np.array([push], np.float64) if isinstance(env.action_space, gym.spaces.Box) else push + 1
        if isinstance(action, np.ndarray):
            action = action.astype(np.float64)  # Gymnasium then computes in float64 as well
        inner.state = np.asarray(inner.state, dtype=np.float64)
        state = as_state(state, inner.state, time)
        tried = torch.tensor([action]) if np.ndim(action) == 0 else torch.from_numpy(action)[None]
        state, reward, terminated, truncated = tensor.step(state, tried, torch.zeros(1, 0))
        seen, expected, *ends, _ = env.step(action)
        exact = {"rtol": 1e-7} if np.asarray(inner.state).dtype == np.float32 else {"rtol": 1e-12, "atol": 1e-12}
        np.testing.assert_allclose(np.array(state[:-1]).ravel(), inner.state, **exact)
        assert reward.item() == pytest.approx(float(expected), rel=1e-12, abs=1e-12)
        assert [terminated.item(), truncated.item()] == ends
        np.testing.assert_allclose(tensor.observe(state)[0].numpy(), seen, rtol=1e-6, atol=1e-6)
        if any(ends):
            break
    assert any(ends) or time == 249


@pytest.mark.parametrize("name", ["Cliff", "RandomWalk", "DeepSea"])
def test_a_tabular_problem_gives_the_same_episodes(name: str) -> None:
    """The draws that Gymnasium's environment makes, handed to its tensor form."""
    env = gym.make(f"{TABULAR}{name}-v0")
    tensor, numbers = tensor_environments.tensors(env), gym.utils.seeding.np_random(7)[0]
    actions = np.random.default_rng(1).integers(env.action_space.n, size=60)
    seen, _ = env.reset(seed=7)
    state = tensor.reset(torch.from_numpy(numbers.random((1, 1))))
    for action in actions:
        np.testing.assert_array_equal(tensor.observe(state)[0].numpy(), seen)
        noise = torch.from_numpy(numbers.random((1, 1)))
        state, reward, terminated, truncated = tensor.step(state, torch.tensor([action]), noise)
        seen, expected, *ends, _ = env.step(action)
        assert (reward.item(), [terminated.item(), truncated.item()]) == (expected, ends)
        if any(ends):
            break


def world(num_envs: int = 3, name: str = "CartPole-v1") -> tuple[rollout.World, Net]:
    config = environments.Config(name, num_envs, "tensor")
    begun = rollout.begin(config, normalization.Config(), seed=5)
    spaces = begun.envs.observation_space, begun.envs.action_space
    return begun, Net(networks.Config(hidden=(8,)).build(*spaces, seed=2))


def played(begun: rollout.World, net: Net, theta: torch.Tensor, length: int) -> tuple[rollout.Rollout, rollout.World]:
    noise = tensor_rollout.draw(net, begun, length, torch.Generator().manual_seed(begun.steps))
    return tensor_rollout.collect(net, theta, begun, noise, normalization.Config(), 0.99)


@pytest.mark.parametrize("name", ["CartPole-v1", "MountainCar-v0"])
def test_a_rollouts_rows_and_accounts(name: str) -> None:
    """Rows follow Gymnasium's dynamics, a new episode after an end; V is of the true successor; returns add up."""
    begun, net = world(name=name)
    theta = net.bind(net.initial())
    total, length, finished, steps = np.zeros(3), np.zeros(3, int), [], 0
    env = gym.make(name).unwrapped
    for _ in range(3):
        first = begun.observation.copy()
        data, begun = played(begun, net, theta, 100)
        seen = data.observation
        assert isinstance(seen, torch.Tensor)
        np.testing.assert_array_equal(seen[:, 0].numpy(), first)
        policy, value = net(theta, seen.flatten(0, 1))
        torch.testing.assert_close(data.value.flatten(), value.detach())
        torch.testing.assert_close(data.logp.flatten(), policy.log_prob(data.action.flatten()).detach())
        for t in range(100):
            ended = (data.terminated | data.truncated)[:, t]
            total += data.reward[:, t].numpy()
            length += 1
            steps += 3
            for i in range(3):
                env.reset(seed=0)
                env.state = seen[i, t].double().numpy()
                after, reward, terminated, _, _ = env.step(int(data.action[i, t]))
                assert (reward, terminated) == (data.reward[i, t], data.terminated[i, t])
                assert bool(data.truncated[i, t]) == (length[i] == {"CartPole-v1": 500, "MountainCar-v0": 200}[name])
                assert data.next_value[i, t].item() == pytest.approx(
                    net(theta, torch.from_numpy(after)[None])[1].item(), abs=1e-5
                )
                if ended[i]:
                    finished.append((total[i], length[i]))
                    total[i] = length[i] = 0
                elif t < 99:
                    np.testing.assert_allclose(seen[i, t + 1].numpy(), after, atol=1e-6)
    np.testing.assert_array_equal(begun.recent, np.array(finished, float).reshape(-1, 2)[-rollout.RECENT :])
    np.testing.assert_array_equal(begun.episode_return, total)
    np.testing.assert_array_equal(begun.episode_length, length)
    assert (begun.episodes, begun.steps) == (len(finished), steps)
    assert len(finished) > 2


def test_a_world_is_packed_and_goes_on_to_the_bit() -> None:
    begun, net = world()
    theta = net.bind(net.initial())
    _, begun = played(begun, net, theta, 50)
    config = environments.Config("CartPole-v1", 3, "tensor")
    again = rollout.unpack(rollout.pack(begun), config, normalization.Config(), seed=5)
    one, two = (played(each, net, theta, 50) for each in (begun, again))
    for part, other in zip(one[0], two[0], strict=True):
        assert part is other is None or torch.equal(part, other)  # type: ignore[arg-type]
    np.testing.assert_array_equal(one[1].recent, two[1].recent)


def test_any_algorithm_steps_them_from_outside() -> None:
    """As a vector environment: the same interface, episodes anew where they ended."""
    envs, _ = environments.make(environments.Config("CartPole-v1", 4, "tensor"), seed=1)
    for _ in range(60):
        step = envs.step(np.ones(4, dtype=np.int64))
        assert (np.abs(step.observation[step.ended]) <= 0.05).all()
        assert (np.abs(step.next_observation[step.ended]).max(1, initial=0) > 0.05).all()
    assert envs.episode.min() >= 4  # one action alone: the pole falls within 15 steps


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"id": "Taxi-v4"}, "Taxi-v4 has no tensor form; allowed: Acrobot, CartPole"),
        ({"group_size": 2}, "group_size 2 needs vectorization"),
        ({"action_mask": "info"}, "action_mask 'info' needs vectorization"),
    ],
)
def test_what_has_no_tensor_form_is_refused(flags: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        environments.make(environments.Config(**{"num_envs": 4, "vectorization": "tensor", **flags}), 1)


OWN = "tests.control.own_tensors:Walk-v0"


def test_a_rollout_acts_in_the_space_and_sees_the_default_type() -> None:
    """Of a user's environment in float64 with actions from 2: what is stepped from outside with the same actions."""
    begun, net = world(name=OWN)
    theta = net.bind(net.initial())
    data, after = played(begun, net, theta, 60)
    envs, seen = environments.make(environments.Config(OWN, 3, "tensor"), seed=5)
    rows: Any = data.observation
    for t in range(60):
        assert seen.dtype == np.float32
        np.testing.assert_array_equal(rows[:, t].numpy(), seen)
        step = envs.step(data.action[:, t].numpy())
        np.testing.assert_array_equal(data.reward[:, t].numpy(), step.reward.astype(np.float32))
        np.testing.assert_array_equal(data.terminated[:, t].numpy(), step.terminated)
        seen = step.observation
    np.testing.assert_array_equal(after.observation, seen)
    assert {*data.action.flatten().tolist()} == {0, 1, 2}
    assert envs.episode.min() > 1


@pytest.mark.parametrize("wrong", ["reward", "observation", "final observation", "state"])
def test_a_rollout_refuses_what_is_not_finite(wrong: str) -> None:
    config = environments.Config(OWN, 3, "tensor", kwargs={"wrong": wrong, "value": np.nan})
    begun = rollout.begin(config, normalization.Config(), seed=5)
    net = Net(networks.Config(hidden=(8,)).build(begun.envs.observation_space, begun.envs.action_space, seed=2))
    step = "\\d+" if wrong.startswith("final") else "4"
    what = "reward" if wrong == "reward" else "observation"
    told = f"a NaN or infinite {what} in environment [012] at step {step} of its episode 0"
    with pytest.raises(ValueError, match=told):
        played(begun, net, net.bind(net.initial()), 20)


def test_chance_is_of_the_step_and_of_no_other() -> None:
    """However many steps are asked for at once; new episodes after a step have other numbers than that step."""
    one, two = (environments.make(environments.Config(OWN, 3, "tensor"), seed=5)[0].envs for _ in range(2))
    whole = one.noise(150)  # type: ignore[attr-defined]
    parts = [two.noise(count) for count in (1, 99, 50)]  # type: ignore[attr-defined]
    for i in range(2):
        assert torch.equal(whole[i], torch.cat([part[i] for part in parts]))
    numbers = torch.cat([part.flatten() for part in whole])
    assert len(numbers.unique()) == len(numbers) == 150 * 3 * 2


class Drifting(Walk):
    def step(self, state: Place, action: torch.Tensor, noise: torch.Tensor) -> Any:
        after, *rest = super().step(state, action, noise)
        return after._replace(at=after.at.float()), *rest


class Timeless(Walk):
    def reset(self, noise: torch.Tensor) -> Any:
        return noise[..., 0]


class Scalar(Walk):
    def step(self, state: Place, action: torch.Tensor, noise: torch.Tensor) -> Any:
        after, reward, *ends = super().step(state, action, noise)
        return after, reward.sum(), *ends


class Informed(Walk):
    def step(self, state: Place, action: torch.Tensor, noise: torch.Tensor) -> Any:
        return *super().step(state, action, noise), {}


class Counting(Walk):
    def step(self, state: Place, action: torch.Tensor, noise: torch.Tensor) -> Any:
        *rest, truncated = super().step(state, action, noise)
        return *rest, truncated.long()


class Narrow(Walk):
    def observe(self, state: Place) -> torch.Tensor:
        return super().observe(state)[..., :1]


@pytest.mark.parametrize(
    ("form", "message"),
    [
        (Drifting, "Drifting.step: at is torch.float32 [3], allowed: a tensor [3] of torch.float64"),
        (Timeless, "Timeless.reset gives Tensor, allowed: a NamedTuple with `time` in it"),
        (Scalar, "Scalar.step: the reward is torch.float64 [], allowed: a tensor [3] of any type"),
        (Informed, "Informed.step gives 5 values, allowed: state, reward, terminated, truncated"),
        (Counting, "Counting.step: truncated is torch.int64 [3], allowed: a tensor [3] of torch.bool"),
        (Narrow, "Narrow.observe: the result is torch.float64 [3, 1], allowed: a tensor [3, 2] of any type"),
    ],
)
def test_a_tensor_environment_that_is_none_is_refused(form: type, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        environments.make(environments.Config(OWN, 3, "tensor", kwargs={"form": form}), seed=5)


class Looking(Walk):
    def step(self, state: Place, action: torch.Tensor, noise: torch.Tensor) -> Any:
        assert float(state.at.max()) < 99
        return super().step(state, action, noise)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("train", "config"),
    [
        (fast_ppo.train, ppo.PPO(rollout_length=8, minibatch_size=16, total_steps=16)),
        (fast_dqn.train, dqn.DQN(train_interval=1, learning_starts=0, batch_size=4, total_steps=16)),
    ],
)
def test_an_environment_that_cannot_be_traced_says_what_to_do(
    train: Any, config: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(WalkEnv, "tensors", lambda env, limit: Looking(limit))
    own = environments.Config(OWN, 2, "tensor")
    options = runs.Config(compile=True, run_dir=tmp_path / "run", quiet=True)
    with pytest.raises(torch._dynamo.exc.TorchDynamoException) as caught:
        train(replace(config, environment=own, run=options))
    assert any("With --no-compile the run is as it stands" in note for note in caught.value.__notes__)
    train(replace(config, environment=own, run=replace(options, compile=False, run_dir=tmp_path / "plain")))


@pytest.mark.slow
def test_a_run_is_killed_and_resumed_to_the_bit(tmp_path: Path) -> None:
    """PPO, with the accounts of episodes and both normalisers."""
    flags = (
        "ppo", "--env", "Pendulum-v1", "--environment.vectorization", "tensor", "--environment.num-envs", 4,
        "--rollout-length", 32, "--total-steps", 128 * 60, *SMALL, "--no-preset", "--no-compile",
        "--normalize.observation", "--normalize.reward",
    )  # fmt: skip
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    succeed("train", *flags, "--run-dir", whole)
    kill_when(command("train", *flags, "--run-dir", broken, "--checkpoint-seconds", 0), broken, 20, 0.01)
    succeed("resume", broken)
    same(whole, broken)
    assert '"mean_return"' in succeed("eval", whole, "--episodes", 2, "--json")  # on Gymnasium's
