"""SAC on its own definitions: objectives and targets against NumPy in float64, entropy, bounds, resuming, learning."""

import functools
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces

from tests.control import worlds
from upslope.control import (
    actors,
    environments,
    normalization,
    offpolicy,
    offpolicy_presets,
    optimizers,
    presets,
    replay,
    sac,
)
from upslope.control.agent import load
from upslope.control.offpolicy import State
from upslope.control.parameters import Net
from upslope.control.sac import SAC
from upslope.runs import run as runs
from upslope.runs.run import Run

QUIET = runs.Config(quiet=True)
NETWORK = actors.Stochastic(hidden=(8, 8), activation="tanh")
ASYMMETRIC = "Asymmetric-v0"


class Asymmetric(gym.Env):
    """Two actions with bounds of their own; ends (or is cut) after 5 steps."""

    def __init__(self, truncate: bool = False, render_mode: str | None = None) -> None:
        self.truncate, self.render_mode = truncate, render_mode
        self.observation_space = spaces.Box(-np.inf, np.inf, (3,), np.float32)
        self.action_space = spaces.Box(np.array([-1, 2], np.float32), np.array([3, 10], np.float32))

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict]:
        super().reset(seed=seed)
        self.steps = 0
        return self._observe(), {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict]:
        assert self.action_space.contains(action)
        self.steps += 1
        over = self.steps == 5
        return self._observe(), float(action.sum()), over and not self.truncate, over and self.truncate, {}

    def _observe(self) -> np.ndarray:
        return self.np_random.normal(size=3).astype(np.float32)


gym.register(ASYMMETRIC, entry_point=Asymmetric)
gym.register("Cut-v0", entry_point=Asymmetric, kwargs={"truncate": True})


def small(environment_id: str = ASYMMETRIC, num_envs: int = 2, **changes: object) -> SAC:
    config = SAC(
        environment=environments.Config(environment_id, num_envs, "sync"),
        network=NETWORK,
        run=QUIET,
        total_steps=60,
        replay_capacity=1000,
        learning_starts=20,
        batch_size=16,
    )
    return replace(config, **changes)  # type: ignore[arg-type]


def choosing(state: State, nets: sac.Nets, config: SAC) -> offpolicy.Choose:
    return offpolicy.choosing(
        functools.partial(sac.act, nets.actor), sac.behaviour(nets.actor, state.world.envs, config)
    )


def begun(config: SAC, steps: int = 30) -> tuple[State, sac.Nets]:
    """A run whose replay holds some steps and whose target is another than what it follows."""
    state, nets = sac.begin(config, Run("sac", config, config.total_steps))
    target = state.others["target"]
    target.add_(0.1 * torch.randn(len(target), generator=torch.Generator().manual_seed(5)))
    for _ in range(steps):
        state = offpolicy.collect(choosing(state, nets, config), state, config, config.train_interval)
        state = offpolicy.advance(state, 0)
    return state, nets


@pytest.fixture
def double() -> Iterator[None]:
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(default)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# --- SAC in NumPy -------------------------------------------------------------------------------------------------

LOW, HIGH = np.array([-1.0, 2.0]), np.array([3.0, 10.0])


def layers(x: np.ndarray, views: list[np.ndarray]) -> np.ndarray:
    """Tanh layers and a linear one, weights as `nn.Linear` keeps them."""
    for k in range(0, len(views), 2):
        x = x @ views[k].T + views[k + 1]
        x = np.tanh(x) if k < len(views) - 2 else x
    return x


def numpy_critics(net: Net, theta: torch.Tensor, observation: np.ndarray, action: np.ndarray) -> np.ndarray:
    views = net.views(theta.detach())
    inputs = np.concatenate([observation, 2 * (action - LOW) / (HIGH - LOW) - 1], -1)
    found = []
    for i in range(2):
        parts = []
        for k in range(3):
            parts += [views[f"weights.{k}"][i].numpy().T, views[f"biases.{k}"][i, 0].numpy()]
        found.append(layers(inputs, parts)[:, 0])
    return np.stack(found)


def numpy_draw(
    net: Net, theta: torch.Tensor, observation: np.ndarray, noise: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """An action in the environment's units, and log π of it as a fraction of its range."""
    output = layers(observation, [view.numpy() for view in net.views(theta.detach()).values()])
    mean, log_std = output[:, :2], np.clip(output[:, 2:], -20, 2)
    u = mean + np.exp(log_std) * noise
    logp = -0.5 * noise**2 - log_std - 0.5 * np.log(2 * np.pi) - np.log(1 - np.tanh(u) ** 2)
    return (LOW + HIGH) / 2 + np.tanh(u) * (HIGH - LOW) / 2, logp.sum(-1)


def slope(function: Any, theta: torch.Tensor) -> np.ndarray:
    """Central differences, coordinate by coordinate."""
    found, h = np.zeros(len(theta)), 1e-6
    for i in range(len(theta)):
        up, down = theta.clone(), theta.clone()
        up[i] += h
        down[i] -= h
        found[i] = (function(up) - function(down)) / (2 * h)
    return found


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize("value_network", [False, True])
def test_targets_objectives_and_gradients_by_numpy(value_network: bool) -> None:
    config = small(value_network=value_network, gamma=0.9, batch_size=16, network=replace(NETWORK, hidden=(4, 4)))
    alpha = 0.3
    state, nets = begun(config)
    batch = offpolicy.batch(state, config, offpolicy.draw(state, config, offpolicy.chances(config).at(0)[0]))
    assert (batch.discount == 0).any()
    assert (batch.discount > 0).any()
    o, a, following = batch.observation.numpy(), batch.action.numpy(), batch.next_observation.numpy()
    noise = normal(2, 16, 2)
    found = sac.estimate(state, nets, batch, noise, alpha, config)
    critic = state.others["critic"]
    if value_network:
        value = lambda theta, x: layers(x, [v.numpy() for v in nets.value.views(theta.detach()).values()])[:, 0]  # type: ignore[union-attr]  # noqa: E731
        ahead = value(state.others["target"], following)
        action, logp = numpy_draw(nets.actor, state.theta, o, noise[0].numpy())
        v_target = numpy_critics(nets.critic, critic, o, action).min(0) - alpha * logp
        np.testing.assert_allclose(found[1].numpy(), v_target, rtol=1e-10)  # type: ignore[union-attr]
    else:
        action, logp = numpy_draw(nets.actor, state.theta, following, noise[1].numpy())
        ahead = numpy_critics(nets.critic, state.others["target"], following, action).min(0) - alpha * logp
        assert found[1] is None
    target = batch.reward.numpy() + batch.discount.numpy() * ahead
    np.testing.assert_allclose(found[0].numpy(), target, rtol=1e-10)

    def critic_by_numpy(theta: torch.Tensor) -> float:
        return -(0.5 * (numpy_critics(nets.critic, theta, o, a) - target) ** 2).sum(0).mean()

    def actor_by_numpy(theta: torch.Tensor) -> float:
        action, logp = numpy_draw(nets.actor, theta, o, noise[0].numpy())
        return (numpy_critics(nets.critic, critic, o, action).min(0) - alpha * logp).mean()

    gradient, loss, _ = nets.critic.gradient(sac.critic_objective, critic, nets, batch, found[0])
    assert float(loss) == pytest.approx(critic_by_numpy(critic), rel=1e-10)
    np.testing.assert_allclose(gradient.numpy(), slope(critic_by_numpy, critic), rtol=1e-5, atol=1e-7)
    untouched = nets.critic._gradient.clone()  # type: ignore[union-attr]
    gradient, loss, _ = nets.actor.gradient(sac.objective, state.theta, nets, batch, noise[0], alpha)
    assert float(loss) == pytest.approx(actor_by_numpy(state.theta), rel=1e-10)
    np.testing.assert_allclose(gradient.numpy(), slope(actor_by_numpy, state.theta), rtol=1e-5, atol=1e-7)
    assert torch.equal(untouched, nets.critic._gradient)  # type: ignore[arg-type]  # nothing flows into the critic
    if value_network:
        mine = state.others["value"]
        gradient, loss, _ = nets.value.gradient(sac.value_objective, mine, nets, batch, found[1])  # type: ignore[union-attr]
        by_numpy = lambda theta: -(0.5 * (value(theta, o) - v_target) ** 2).mean()  # noqa: E731
        assert float(loss) == pytest.approx(by_numpy(mine), rel=1e-10)
        np.testing.assert_allclose(gradient.numpy(), slope(by_numpy, mine), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("value_network", [False, True])
def test_every_theta_moves_and_the_target_follows(value_network: bool) -> None:
    config = small(value_network=value_network, target_tau=0.25)
    state, nets = begun(config)
    before = {name: theta.clone() for name, theta in {"theta": state.theta, **state.others}.items()}
    batch = offpolicy.batch(state, config, offpolicy.draw(state, config, offpolicy.chances(config).at(0)[0]))
    noise, alpha = normal(2, 16, 2), sac.temperature(state, config)
    assert alpha == 1.0
    targets = sac.estimate(state, nets, batch, noise, alpha, config)
    state, part, _ = sac.update(state, nets, batch, targets, noise, alpha, config)
    followed = "value" if value_network else "critic"
    offpolicy.follow(state.others["target"], state.others[followed], config.target_tau)
    after = {"theta": state.theta, **state.others}
    assert set(after) == {"theta", "critic", "log_alpha", "target"} | ({"value"} if value_network else set())
    assert all(not torch.equal(before[name], after[name]) for name in after)
    torch.testing.assert_close(after["target"], 0.75 * before["target"] + 0.25 * after[followed])
    assert set(state.optimizer) == set(after) - {"target"}
    assert all(memory.step == 1 for memory in state.optimizer.values())
    rising = float(part.entropy.mean()) < -2.0  # too little entropy: α rises, else it falls
    assert (float(after["log_alpha"]) > 0) == rising
    assert abs(float(after["log_alpha"])) == pytest.approx(3e-4, rel=1e-3)  # Adam's first step


@pytest.mark.parametrize(("name", "expected"), [(ASYMMETRIC, 0.0), ("Cut-v0", 0.99)])
def test_termination_ends_a_target_and_truncation_does_not(name: str, expected: float) -> None:
    config = small(name)
    state, nets = begun(config)
    memory = state.replay
    rows = np.flatnonzero(memory.ahead)
    after = rows + memory.ahead[rows]  # where an episode ended nothing begins, nor does an environment stand there
    rows = rows[(memory.ahead[after] == 0) & ~np.isin(after, memory.open)]
    batch = memory.batch(rows, config.gamma)
    assert len(rows) > 3
    assert (batch.discount == torch.tensor(expected)).all()
    noise = normal(2, len(rows), 2)
    target, _ = sac.estimate(state, nets, batch, noise, 0.5, config)
    action, logp = sac.draw(state.theta, nets, batch.next_observation, noise[1])
    ahead = nets.critic(state.others["target"], batch.next_observation, action).amin(0) - 0.5 * logp
    torch.testing.assert_close(target, batch.reward + expected * ahead.detach())


def test_a_learned_temperature_reaches_the_target_entropy() -> None:
    """With Q = 0 the actor wants nothing but entropy times α: between them the entropy settles at its target."""
    config = small(
        "Pendulum-v1", 1, target_entropy=-1.5, alpha=0.2, optimizer=replace(SAC().optimizer, learning_rate=1e-2)
    )
    state, nets = begun(config)
    state.others["critic"].zero_()
    nets.critic.views(state.others["critic"])["biases.2"].zero_()
    random, entropies = torch.Generator().manual_seed(0), []
    slope_of_q = torch.full((64,), 1.0)
    observation = torch.zeros(64, 3)
    batch = replay.Batch(observation, torch.zeros(64, 1), slope_of_q, slope_of_q, observation, slope_of_q)

    def judged(
        theta: torch.Tensor, nets: sac.Nets, noise: torch.Tensor, alpha: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """SAC's objective with Q(s, a) = - a² put in for the critics'."""
        action, logp = sac.draw(theta, nets, batch.observation, noise)
        return (-action[:, 0].square() - alpha * logp).mean(), logp.detach()

    for _ in range(1500):
        alpha = sac.temperature(state, config)
        noise = torch.randn(64, 1, generator=random)
        state, logp, _ = offpolicy.ascend(state, "theta", nets.actor, config, judged, nets, noise, alpha)
        state, _ = offpolicy.climb(state, "log_alpha", (logp.mean() + nets.target_entropy).reshape(1), config)
        entropies.append(-float(logp.mean()))
    assert abs(np.mean(entropies[:20]) + 1.5) > 0.5
    assert np.mean(entropies[-500:]) == pytest.approx(-1.5, abs=0.1)


def test_entropy_does_not_depend_on_the_units_of_actions() -> None:
    state, nets = begun(small(), 1)
    assert nets.log_range == pytest.approx(math.log(2) + math.log(4))
    assert nets.target_entropy == -2
    observation, noise = normal(16, 3), normal(16, 2, seed=1)
    policy = nets.actor(state.theta, observation)
    unit = policy._replace(low=-torch.ones(2), high=torch.ones(2))
    torch.testing.assert_close(sac.draw(state.theta, nets, observation, noise)[1], unit.sample_log_prob(noise)[1])
    assert nets.target_entropy != begun(small(target_entropy=0.5), 1)[1].target_entropy


def test_actions_keep_their_own_bounds() -> None:
    """Stored as the environment takes them, at random first, then by π; critics see fractions of the range."""
    config = small(learning_starts=900, replay_capacity=5000)
    state, nets = begun(config, 700)
    action = torch.from_numpy(
        state.replay.action[: state.replay.written][state.replay.ahead[: state.replay.written] > 0]
    )
    low, high = torch.tensor([-1.0, 2.0]), torch.tensor([3.0, 10.0])
    assert ((action >= low) & (action <= high)).all()
    early = action[:900]
    torch.testing.assert_close(early.mean(0), (low + high) / 2, atol=0.5, rtol=0)
    torch.testing.assert_close(early.std(0), (high - low) / math.sqrt(12), atol=0.25, rtol=0)
    agent_like = nets.actor(state.theta, normal(500, 3)).sample(normal(500, 2, seed=1))
    assert ((agent_like > low) & (agent_like < high)).all()
    q = nets.critic(state.others["critic"], normal(1, 3).expand(2, -1), torch.stack([low, high]))
    moved = nets.critic.module
    ends = torch.stack([-torch.ones(2), torch.ones(2)])
    moved.low.copy_(-torch.ones(2))
    moved.high.copy_(torch.ones(2))
    torch.testing.assert_close(q, nets.critic(state.others["critic"], normal(1, 3).expand(2, -1), ends))


@pytest.mark.parametrize("space", [spaces.Discrete(3), spaces.Box(-np.inf, np.inf, (2,)), spaces.MultiBinary(2),
                                   spaces.Box(0, 5, (2,), np.int64), spaces.Box(1.0, 1.0, (1,))])  # fmt: skip
def test_other_action_spaces_are_refused(space: spaces.Space) -> None:
    with pytest.raises(ValueError, match=r"action space .* is not supported by this algorithm; allowed: a bounded Box"):
        NETWORK.build(spaces.Box(-1, 1, (2,)), space, 0)
    with pytest.raises(ValueError, match=r"Discrete\(2\) is not supported"):
        sac.train(small("CartPole-v1"))


@pytest.mark.parametrize(("changes", "words"), [
    ({"alpha": 0.0}, "alpha is 0.0, allowed: above 0"),
    ({"gamma": 1.5}, "gamma is 1.5, allowed: 0 to 1"),
    ({"replay_capacity": 0}, "replay_capacity is 0, allowed: 1 or more"),
    ({"target_tau": 2.0}, "target_tau is 2.0, allowed: 0 to 1"),
])  # fmt: skip
def test_settings_are_checked(changes: dict[str, object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        small(**changes)
    with pytest.raises(ValueError, match=r"network.log_std_low is 3, allowed: below 2"):
        actors.Stochastic(log_std_low=3)


def test_fixed_temperature_and_normalised_observations(tmp_path: Path) -> None:
    config = small(
        "Pendulum-v1", learn_alpha=False, alpha=0.1, normalize=normalization.Config(observation=True),
        run=runs.Config(quiet=True, run_dir=tmp_path / "run"),
    )  # fmt: skip
    agent = sac.train(config)
    assert not torch.equal(agent.normalizer.observation[""].mean, torch.zeros(3))
    back = load(config, tmp_path / "run")
    observation = np.random.default_rng(0).normal(size=(5, 3)).astype(np.float32)
    assert np.array_equal(agent.act(observation), back.act(observation))
    noise = normal(5, 1)
    assert not np.array_equal(agent.act(observation, noise), agent.act(observation))
    assert np.isfinite(back.evaluate(2, deterministic=False).returns).all()
    assert torch.equal(agent.theta, sac.train(replace(config, run=QUIET)).theta)


@pytest.mark.parametrize("name", list(worlds.OBSERVATIONS))
def test_every_observation_space(name: str) -> None:
    agent = sac.train(small(f"{name}-box-v0", network=replace(NETWORK, cnn_features=8)))
    assert np.isfinite(agent.evaluate(1).returns).all()


def test_state_dependent_noise_keeps_one_matrix_for_an_iteration() -> None:
    """From one state the action is the same at every step of an iteration and another one in the next."""
    network = actors.Stochastic(hidden=(16,), state_dependent_noise=True, log_std=0.0)
    config = replace(small("Pendulum-v1"), network=network, train_interval=4, learning_starts=0)
    state, nets = sac.begin(config, Run("sac", config, config.total_steps))
    seen = torch.tensor([[0.5, -0.5, 1.0]])
    with torch.no_grad():
        choose = choosing(state, nets, config)
        here = [choose(state, seen, t) for t in range(4)]
        later = choose(state._replace(iteration=1), seen, 0)
        other = choose(state, 2 * seen, 0)
    assert all(torch.equal(action, here[0]) for action in here)
    assert not torch.equal(later, here[0])
    assert not torch.equal(other, here[0])
    agent = sac.train(replace(config, total_steps=64, batch_size=8))
    assert agent.theta.isfinite().all()
    assert agent.evaluate(1, deterministic=False).returns.size == 1


def test_bfloat16_is_of_the_products_between_hidden_layers_alone() -> None:
    """Close to float32, not equal; what comes out stays float32; one hidden layer has no such product."""

    def values(precision: Any, hidden: tuple[int, ...]) -> tuple[torch.Tensor, ...]:
        config = small(network=actors.Stochastic(hidden=hidden, precision=precision))
        state, nets = begun(config)
        batch = offpolicy.batch(state, config, offpolicy.draw(state, config, offpolicy.chances(config).at(0)[0]))
        noise = torch.ones(2, *batch.action.shape)
        target, _ = sac.estimate(state, nets, batch, noise, 0.2, config)
        gradient, value, _ = nets.critic.gradient(
            sac.critic_objective, state.others["critic"], nets, batch, torch.zeros(16)
        )  # fmt: skip
        slope, reward, _ = nets.actor.gradient(sac.objective, state.theta, nets, batch, noise[0], 0.2)
        return target, value, reward, gradient.clone(), slope.clone()

    for half, full in zip(values("bfloat16", (64, 64)), values("float32", (64, 64)), strict=True):
        assert half.dtype == torch.float32
        assert not torch.equal(half, full)
        assert (half - full).norm() <= 0.02 * full.norm()
    for half, full in zip(values("bfloat16", (64,)), values("float32", (64,)), strict=True):
        assert torch.equal(half, full)


def test_presets_name_their_environments() -> None:
    for table in ("SAC", "TD3", "DDPG", "SOFT_Q", "DQN"):
        for name, config in getattr(offpolicy_presets, f"{table}_PRESETS").items():
            assert config.environment.id == name
            assert getattr(presets, table.lower())(name) == config
            assert getattr(presets, table.lower())("Nowhere-v0") is None


@pytest.mark.slow
@pytest.mark.parametrize("value_network", [False, True])
def test_learns_pendulum(value_network: bool) -> None:
    config = replace(
        offpolicy_presets.SAC_PRESETS["Pendulum-v1"], network=actors.Stochastic(hidden=(64, 64)), batch_size=128,
        optimizer=optimizers.Adam(2e-3, 1e-8), gamma=0.95, target_tau=0.01, total_steps=3500, run=QUIET,
        value_network=value_network,
    )  # fmt: skip
    assert sac.train(config).evaluate(20).returns.mean() > -500  # about -200; at random -1200
