"""DQN on its own definitions: targets and loss by hand, every variant alone and together, resuming, learning."""

import functools
import itertools
from dataclasses import replace
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces

from tests.control import worlds
from upslope.control import (
    dqn,
    environments,
    normalization,
    offpolicy,
    offpolicy_presets,
    optimizers,
    presets,
    qnetworks,
)
from upslope.control.agent import load
from upslope.control.dqn import DQN
from upslope.control.offpolicy import State
from upslope.control.parameters import Net
from upslope.runs import run as runs
from upslope.runs.run import Run

QUIET = runs.Config(quiet=True)
NETWORK = qnetworks.Config(hidden=(16, 16))


def small(environment_id: str = "CartPole-v1", num_envs: int = 1, **changes: object) -> DQN:
    config = DQN(
        environment=environments.Config(environment_id, num_envs),
        network=NETWORK,
        run=QUIET,
        total_steps=200,
        replay_capacity=1000,
        learning_starts=20,
        batch_size=16,
        target_interval=50,
    )
    return replace(config, **changes)  # type: ignore[arg-type]


def choosing(state: State, net: Net, config: DQN) -> offpolicy.Choose:
    return offpolicy.choosing(functools.partial(dqn.act, net), dqn.behaviour(net, state.world.envs, config))


def begun(config: DQN, steps: int = 30) -> tuple[State, Net]:
    """A run whose replay holds some steps and whose target network is another than the one that acts."""
    session = Run("dqn", config, config.total_steps)
    start = lambda theta: ({"target": theta.clone()}, {"theta": config.optimizer.start(theta)})  # noqa: E731
    state, net = offpolicy.start(config, session, start, None, config.priority_exponent > 0)
    net.freeze(state.others["target"])
    state.others["target"].add_(0.1 * torch.randn(len(state.theta), generator=torch.Generator().manual_seed(5)))
    for _ in range(steps):
        state = offpolicy.collect(choosing(state, net, config), state, config, config.train_interval)
        state = offpolicy.advance(state, 0)
    return state, net


def test_observations_are_learned_from_as_they_are_acted_on() -> None:
    """Normalised, with the statistics of all that was seen before; by NumPy."""
    config = small(normalize=normalization.Config(observation=True, observation_clip=1.5))
    state, _ = begun(config, 40)
    drawn = offpolicy.draw(state, config, offpolicy.chances(config).at(0)[0])
    row, memory = drawn.row, state.replay
    batch = offpolicy.batch(state, config, drawn)
    seen = state.world.normalizer.observation[""]
    for found, raw in (
        (batch.observation, memory.observation[""][row]),
        (batch.next_observation, memory.observation[""][row + memory.ahead[row]]),
    ):
        scaled = (raw - seen.mean.numpy()) / np.sqrt(seen.variance().numpy() + 1e-8)
        assert np.abs(scaled).max() > 1.5
        np.testing.assert_allclose(found.numpy(), np.clip(scaled, -1.5, 1.5), rtol=1e-4, atol=1e-5)


def forward(net: Net, theta: torch.Tensor, observation: np.ndarray) -> np.ndarray:
    """Q by NumPy, float64: two relu layers and a linear one."""
    views = [view.double().numpy() for view in net.views(theta.detach()).values()]
    x = observation.astype(np.float64)
    for k in range(0, len(views), 2):
        x = x @ views[k].T + views[k + 1]
        x = np.maximum(x, 0) if k < len(views) - 2 else x
    return x


@pytest.mark.parametrize("double", [False, True])
def test_target_loss_and_gradient_by_hand(double: bool) -> None:
    config = small("Acrobot-v1", double=double, huber=1.0, gamma=0.9)
    state, net = begun(config)
    batch = offpolicy.batch(state, config, offpolicy.draw(state, config, offpolicy.chances(config).at(0)[0]))
    target = dqn.estimate(state, net, batch, [None, None], config)
    judged = forward(net, state.others["target"], batch.next_observation.numpy())
    chosen = forward(net, state.theta, batch.next_observation.numpy()) if double else judged
    value = judged[np.arange(16), chosen.argmax(-1)]
    expected = batch.reward.numpy() + batch.discount.numpy() * value
    np.testing.assert_allclose(target.numpy(), expected, rtol=1e-5, atol=1e-5)

    weighted = batch._replace(weight=torch.linspace(0.1, 1, 16))
    q = forward(net, state.theta, batch.observation.numpy())[np.arange(16), batch.action.numpy()]
    error = np.abs(q - expected)
    huber = np.where(error <= 1, error**2 / 2, error - 0.5)
    assert (error > 1).any()
    assert (error < 1).any()
    loss, part = dqn.objective(state.theta, net, weighted, target, None, config)
    assert float(loss) == pytest.approx(-(weighted.weight.numpy() * huber).mean(), rel=1e-4)
    np.testing.assert_allclose(part.td_error.detach().numpy(), expected - q, atol=1e-5)


def test_terminated_transitions_have_no_value_beyond_and_cut_ones_have_one() -> None:
    for truncate, expected in ((False, 0.0), (True, 0.99)):
        name = f"Clock-{truncate}-v0"
        if name not in gym.registry:
            gym.register(name, entry_point=worlds.Clock, kwargs={"end": 5, "truncate": truncate})
        state, _ = begun(small(name, 2), 20)
        batch = state.replay.batch(np.flatnonzero(state.replay.ahead), 0.99)
        assert torch.equal(batch.next_observation[:, 0], batch.observation[:, 0] + 1)
        last = batch.observation[:, 0] == 4
        assert last.any()
        assert (batch.discount[last] == torch.tensor(expected)).all()
        assert (batch.discount[~last] == torch.tensor(0.99)).all()


@pytest.mark.parametrize("autoreset", ["disabled", "same-step", "next-step"])
def test_autoreset_modes_store_the_same_transitions(autoreset: str) -> None:
    """Acting at random: every mode sees each episode's transitions, observation for observation."""
    where = environments.Config("CartPole-v1", 2, "sync", autoreset)  # type: ignore[arg-type]
    config = small(total_steps=10_000, epsilon_end=1.0)
    state, _ = begun(replace(config, environment=where), 30)
    batch = state.replay.batch(np.flatnonzero(state.replay.ahead), 1.0)
    env = gym.make("CartPole-v1").unwrapped
    env.reset(seed=0)
    for k in range(len(batch.action)):  # CartPole's own dynamics say what the successor is
        env.state, env.steps_beyond_terminated = batch.observation[k].double().numpy(), None  # type: ignore[attr-defined]
        after, _, terminated, _, _ = env.step(int(batch.action[k]))
        np.testing.assert_allclose(batch.next_observation[k].numpy(), after, atol=1e-5)
        assert (batch.discount[k] == 0) == terminated
    assert state.replay.transitions == state.step


def test_the_target_network_moves_when_it_is_due() -> None:
    targets = {}
    for tau in (1.0, 0.25):
        config = small(
            "Acrobot-v1", total_steps=40, learning_starts=0, target_interval=20, target_tau=tau, gradient_steps=2
        )
        seen: list[tuple[int, torch.Tensor, torch.Tensor]] = []
        note = offpolicy.advance

        def noted(state: State, *given: object, seen: list = seen, note: object = note, **named: object) -> State:
            after = note(state, *given, **named)  # type: ignore[operator]
            seen.append((after.step, after.theta.clone(), after.others["target"].clone()))
            return after

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(offpolicy, "advance", noted)
            dqn.train(config)
        targets[tau] = seen
        steps = [step for step, _, _ in seen]
        assert steps == list(range(4, 41, 4))
        for (_, _, before), (step, theta, after) in itertools.pairwise(seen):
            if step % 20:
                assert torch.equal(before, after)
            else:
                torch.testing.assert_close(after, (1 - tau) * before + tau * theta)
                assert not torch.equal(before, after)


VARIANTS = list(
    itertools.product([False, True], ["none", "independent", "factorised"], [False, True], [0.0, 0.6], [1, 3])
)


@pytest.mark.parametrize(("dueling", "noisy", "double", "alpha", "n_step"), VARIANTS)
def test_any_subset_together(dueling: bool, noisy: str, double: bool, alpha: float, n_step: int) -> None:
    """Every combination runs, moves every parameter and is a function of its seed."""
    network = replace(NETWORK, dueling=dueling, noisy=noisy)  # type: ignore[arg-type]
    config = small(network=network, double=double, priority_exponent=alpha, n_step=n_step, total_steps=60)
    agents = [dqn.train(config) for _ in range(2)]
    assert torch.equal(agents[0].theta, agents[1].theta)
    first = Net(network.build(spaces.Box(-1, 1, (4,), np.float32), agents[0].action_space, 0))
    assert agents[0].net.layout == first.layout
    short = dqn.train(replace(config, learning_starts=100))  # the parameters as they began
    moved = agents[0].net.views(agents[0].theta - short.theta)
    assert all(bool((part != 0).any()) for part in moved.values())


@pytest.mark.parametrize("name", [f"{seen}-discrete-v0" for seen in worlds.OBSERVATIONS])
def test_every_observation_space(name: str) -> None:
    config = small(name, 2, network=replace(NETWORK, cnn_features=8), total_steps=80)
    agent = dqn.train(replace(config, normalize=normalization.Config(observation=True)))
    assert agent.evaluate(3).returns == pytest.approx([2.0] * 3)


def test_approximate_q_learning_learns_from_each_transition_once() -> None:
    """Without replay and target network: semi-gradient steps on what was just seen, as S3 6.1 writes them."""
    config = small(
        "CartPole-v1", replay_capacity=0, target_interval=0, train_interval=1, learning_starts=0, total_steps=30,
        optimizer=optimizers.SGD(learning_rate=0.05), max_grad_norm=None, huber=1e9, epsilon_end=1.0,
    )  # fmt: skip
    agent = dqn.train(config)
    state, net = begun(config, 0)
    theta = state.theta
    for _ in range(40):
        if state.step >= 30:
            break
        taken = state.replay.transitions
        state = offpolicy.collect(choosing(state, net, config), state, config, 1)
        if state.replay.transitions == taken:  # a reset row
            state = offpolicy.advance(state, 0)
            continue
        (row,) = state.replay.recent(1)
        one = state.replay.batch(np.array([row]), config.gamma)
        leaf = theta.clone().requires_grad_()
        q = net(leaf, one.observation)[0, int(one.action)]
        following = net(theta, one.next_observation)[0].max().detach()
        loss = (one.reward + one.discount * following - q)[0] ** 2 / 2
        (slope,) = torch.autograd.grad(loss, leaf)
        theta.sub_(0.05 * slope)
        state = offpolicy.advance(state, 1)
    torch.testing.assert_close(agent.theta, theta, rtol=1e-4, atol=1e-6)


def test_epsilon_falls_and_random_actions_are_uniform() -> None:
    config = small("Acrobot-v1", 4, total_steps=4000, epsilon_fraction=0.5, train_interval=100, learning_starts=10**6)
    state, net = begun(config, 0)
    shares = []
    for _ in range(10):
        greedy, chosen = [], []
        behaviour = choosing(state, net, config)

        def choose(
            state: State, observation: torch.Tensor, t: int, behaviour: offpolicy.Choose = behaviour
        ) -> torch.Tensor:
            chosen.append(behaviour(state, observation, t))
            greedy.append(net(state.theta, observation).argmax(-1))
            return chosen[-1]

        state = offpolicy.collect(choose, state, config, 100)
        other = (torch.stack(chosen) != torch.stack(greedy)).double().mean()
        shares.append(float(other) * 3 / 2)  # a random action is the greedy one in a third of the cases
        state = offpolicy.advance(state, 0)
    expected = [1 + (0.05 - 1) * min(1.0, (400 * k + 198) / 2000) for k in range(10)]
    np.testing.assert_allclose(shares, expected, atol=0.13)  # 400 draws: five standard errors


def test_noisy_networks_explore_by_their_weights() -> None:
    config = small(network=replace(NETWORK, noisy="factorised"))
    state, net = begun(config, 1)
    observation = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))
    noise = dqn.noises(net, torch.Generator().manual_seed(1), 2)
    one, two = (net(state.theta, observation, part) for part in noise)
    assert not torch.equal(one, two)
    mean = net(state.theta, observation)
    assert torch.equal(mean, net(state.theta, observation, torch.zeros(net.module.noise_size)))  # type: ignore[arg-type]
    batch = offpolicy.batch(state, config, offpolicy.draw(state, config, offpolicy.chances(config).at(0)[0]))
    _, _, part = net.gradient(dqn.objective, state.theta, net, batch, torch.zeros(16), noise[0], config)
    assert part.q.shape == (16,)
    gradients = {name: g for (name, _), g in zip(
        net.views(state.theta).items(), [p.grad for p in net.module.parameters()], strict=True)}  # fmt: skip
    scales = [g for name, g in gradients.items() if "scale" in name]
    assert scales
    assert all(g is not None and g.abs().max() > 0 for g in scales)


@pytest.mark.parametrize(("changes", "words"), [
    ({"priority_exponent": 0.6, "replay_capacity": 0}, "priority_exponent is 0.6, but replay_capacity 0"),
    ({"gamma": 1.5}, "gamma is 1.5, allowed: 0 to 1"),
    ({"n_step": 0}, "n_step is 0, allowed: 1 or more"),
    ({"huber": 0.0}, "huber is 0.0, allowed: above 0"),
    ({"gradient_steps": 0}, "gradient_steps is 0, allowed: 1 or more"),
])  # fmt: skip
def test_settings_are_checked(changes: dict[str, object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        small(**changes)


def test_what_it_cannot_do_is_refused() -> None:
    with pytest.raises(ValueError, match="not supported by Q-learning; allowed: Discrete"):
        dqn.train(small("Pendulum-v1"))
    with pytest.raises(ValueError, match=r"normalize\.reward is for on-policy"):
        dqn.train(small(normalize=normalization.Config(reward=True)))
    with pytest.raises(ValueError, match="replay_capacity is 3, allowed: 5 or more with 1 envs"):
        dqn.train(small(replay_capacity=3))
    with pytest.raises(ValueError, match="theta has shape"):
        dqn.train(small(), theta=torch.zeros(3))


def test_a_run_is_loaded_again(tmp_path: Path) -> None:
    config = small(run=runs.Config(quiet=True, run_dir=tmp_path / "run"), network=replace(NETWORK, dueling=True))
    agent = dqn.train(config)
    back = load(config, tmp_path / "run")
    assert torch.equal(agent.theta, back.theta)
    observation = np.random.default_rng(0).normal(size=(50, 4)).astype(np.float32)
    assert np.array_equal(agent.act(observation), back.act(observation))
    assert np.array_equal(agent.evaluate(4).returns, back.evaluate(4, deterministic=False).returns)  # greedy is greedy


def test_presets_name_their_environments() -> None:
    for name, config in offpolicy_presets.DQN_PRESETS.items():
        assert config.environment.id == name
        assert presets.dqn(name) == config
    assert presets.dqn("Pendulum-v1") is None
