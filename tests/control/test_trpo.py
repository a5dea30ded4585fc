"""TRPO on its own definitions: the step against the exact Fisher matrix, the region on every iteration, learning."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch

from tests.control import test_kill, worlds
from upslope.control import environments, learner, networks, normalization, presets, rollout, trpo
from upslope.control.learner import State
from upslope.control.parameters import Net
from upslope.control.trpo import TRPO
from upslope.core import advantages, returns
from upslope.runs import run as runs
from upslope.runs.run import Run

QUIET = runs.Config(quiet=True)
STATES, ACTIONS = 4, 3


class Ring(gym.Env):
    """A tabular MDP: step forward, stay, or jump to a random state; state 2 pays, and an episode takes 7 steps."""

    observation_space = gym.spaces.Discrete(STATES)
    action_space = gym.spaces.Discrete(ACTIONS)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[int, dict]:
        super().reset(seed=seed)
        self.place, self.steps = int(self.np_random.integers(STATES)), 0
        return self.place, {}

    def step(self, action: int) -> tuple[int, float, bool, bool, dict]:
        after = [(self.place + 1) % STATES, self.place, int(self.np_random.integers(STATES))]
        self.place, self.steps = after[action], self.steps + 1
        return self.place, float(self.place == 2), self.steps >= 7, False, {}


gym.register("Ring-v0", Ring, disable_env_checker=True, order_enforce=False)


@pytest.fixture
def double() -> Iterator[None]:
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(default)


def small(environment_id: str, **changes: object) -> TRPO:
    config = TRPO(
        environment=environments.Config(environment_id, 4),
        network=networks.Config(hidden=(16,), cnn_features=16),
        run=QUIET,
        total_steps=256,
        rollout_length=32,
        critic_epochs=1,
        critic_minibatch=32,
    )
    return replace(config, **changes)  # type: ignore[arg-type]


def begin(config: TRPO) -> tuple[State, Net]:
    return learner.start(config, Run("trpo", config, config.total_steps))


def next_batch(state: State, net: Net, config: TRPO) -> tuple[rollout.Batch, rollout.World]:
    """What an iteration's update starts from, as `train` makes it."""
    data, world = learner.collect(net, state, config, config.rollout_length)
    discounts, traces = returns.boundaries(data.terminated, data.truncated, config.gamma, config.gae_lambda)
    psi = advantages.gae(data.reward, data.value, data.next_value, discounts, traces)
    return rollout.flatten(data, psi, psi + data.value), world


def first_batch(config: TRPO) -> tuple[State, Net, rollout.Batch]:
    state, net = begin(config)
    return state, net, next_batch(state, net, config)[0]


def far(net: Net, old: torch.Tensor, new: torch.Tensor, batch: rollout.Batch) -> tuple[float, float]:
    """Mean KL[π_old ‖ π_new] and mean ρΨ over the rows that count, from two parameter vectors."""
    with torch.no_grad():
        before, after = (net.only("policy", theta, batch.observation) for theta in (old, new))
        kl = before.kl(after)
        ratio = (after.log_prob(batch.action) - before.log_prob(batch.action)).exp()
    keep = torch.ones_like(batch.psi, dtype=torch.bool) if batch.valid is None else batch.valid
    psi = batch.psi[keep]
    psi = (psi - psi.mean()) / (psi.std() + 1e-8)
    return kl[keep].mean().item(), (ratio[keep] * psi).mean().item()


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize("autoreset", ["same-step", "next-step"])
@pytest.mark.parametrize("damping", [1e-3, 0.1])
@pytest.mark.parametrize("after", [0, 3])
def test_the_step_is_the_exact_natural_step(autoreset: Any, damping: float, after: int) -> None:
    """(F + λI)⁻¹ g, scaled to δ, with F summed over the states and actions of a tabular softmax policy in NumPy."""
    delta = 1e-4
    config = small(
        "Ring-v0",
        environment=environments.Config("Ring-v0", 4, "sync", autoreset),
        network=networks.Config(hidden=()),
        target_kl=delta,
        cg_damping=damping,
        cg_iterations=60,
    )
    state, net = begin(config)
    for _ in range(after):  # a policy that is no longer uniform
        batch, world = next_batch(state, net, replace(config, target_kl=0.5))
        theta, memory, _ = trpo.update(state, net, batch, replace(config, target_kl=0.5))
        state = learner.advance(state, theta, memory, world)
    batch, _ = next_batch(state, net, config)
    before = state.theta.clone()
    _, _, numbers = trpo.update(state, net, batch, config)
    assert (numbers["accepted"], numbers["backtracks"]) == (1, 0)

    names = ("policy.head.linear.weight", "policy.head.linear.bias")
    weight, bias = (net.views(before)[name].numpy() for name in names)
    keep = np.ones(len(batch.psi), bool) if batch.valid is None else batch.valid.numpy()
    assert keep.all() == (autoreset == "same-step")
    seen, action, psi = (part.numpy()[keep] for part in (batch.observation, batch.action, batch.psi))
    psi = (psi - psi.mean()) / (psi.std(ddof=1) + 1e-8)
    logits = weight.T + bias  # [state, action]
    pi = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    assert after == 0 or pi.std() > 0.05
    fisher, gradient = 0.0, 0.0
    for s in range(STATES):
        share = (seen == s).mean()
        for a in range(ACTIONS):
            towards = np.eye(ACTIONS)[a] - pi[s]  # ∇ log π(a|s) towards the logits
            score = np.concatenate([np.outer(towards, np.eye(STATES)[s]).ravel(), towards])
            fisher = fisher + share * pi[s, a] * np.outer(score, score)
            gradient = gradient + psi[(seen == s) & (action == a)].sum() / len(psi) * score
    damped = fisher + damping * np.eye(len(gradient))
    x = np.linalg.solve(damped, gradient)
    expected = x * np.sqrt(2 * delta / (x @ damped @ x))
    found = net.views(state.theta - before)
    step = np.concatenate([found[name].numpy().ravel() for name in names])
    assert np.linalg.norm(step - expected) <= 1e-6 * np.linalg.norm(expected)


CASES = [(f"box-{action}-v0", False) for action in worlds.ACTIONS] + [("box-box-v0", True)]
CASES += [("CartPole-v1", False), ("Pendulum-v1", True), ("Clock-v0", False)]


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize("steps", [1, 4])
@pytest.mark.parametrize(("environment_id", "state_dependent"), CASES)
def test_every_accepted_step_keeps_the_kl_and_improves(environment_id: str, state_dependent: bool, steps: int) -> None:
    """On each iteration of a run, for every kind of policy; what the update reports is what two θ say."""
    config = small(
        environment_id,
        environment=environments.Config(environment_id, 4, "sync", "next-step"),
        network=networks.Config(
            hidden=(16,), cnn_features=16, state_dependent_noise=state_dependent, noise_interval=4, log_std=-0.5
        ),
        normalize=normalization.Config(observation=True, reward=True),
        steps_per_batch=steps,
        cg_damping=1e-2,
        target_kl=0.02,
    )
    state, net = begin(config)
    counts = []
    for _ in range(6):
        batch, world = next_batch(state, net, config)
        before = state.theta.clone()
        theta, memory, numbers = trpo.update(state, net, batch, config)
        kl, surrogate = far(net, before, theta, batch)
        start = far(net, before, before, batch)[1]
        if numbers["accepted"]:
            assert 0 < kl <= 0.02
            assert surrogate > start
        assert numbers["kl"] == pytest.approx(kl, abs=1e-9)
        assert numbers["improvement"] == pytest.approx(surrogate - start, rel=1e-5, abs=1e-12)
        counts.append(numbers["accepted"])
        state = learner.advance(state, theta, memory, world)
    assert sum(counts) >= 5
    assert max(counts) <= steps
    assert steps == 1 or max(counts) > 1
    state.world.envs.close()


@pytest.mark.usefixtures("double")
def test_several_steps_go_further_than_one() -> None:
    ends = []
    for steps in (1, 6):
        config = small("CartPole-v1", steps_per_batch=steps, cg_damping=1.0)  # short steps
        state, net, batch = first_batch(config)
        before = state.theta.clone()
        _, _, numbers = trpo.update(state, net, batch, config)
        ends.append(far(net, before, state.theta, batch))
        assert numbers["accepted"] >= min(steps, 2)
    assert ends[0][1] < ends[1][1]
    assert max(kl for kl, _ in ends) <= 0.01


def test_a_rejected_step_moves_the_critic_alone() -> None:
    """Full steps towards a KL of 10 are far outside the quadratic's reach: nothing is left but to stay."""
    config = small("box-box-v0", target_kl=10.0, max_backtracks=0, cg_damping=1e-3)
    state, net, batch = first_batch(config)
    before = state.theta.clone()
    theta, _, numbers = trpo.update(state, net, batch, config)
    policy, critic = net.part("policy"), net.part("critic")
    assert (numbers["accepted"], numbers["kl"], numbers["improvement"]) == (0, 0.0, 0.0)
    assert torch.equal(theta[policy], before[policy])
    assert not torch.equal(theta[critic], before[critic])
    _, _, numbers = trpo.update(state, net, batch, replace(config, max_backtracks=40))
    assert numbers["accepted"] == 1  # shortened often enough it is accepted
    assert numbers["backtracks"] > 0
    assert 0 < far(net, before, theta, batch)[0] <= 10


@pytest.mark.usefixtures("double")
def test_reset_rows_change_nothing() -> None:
    """The policy's step on a batch with reset rows is that on the batch without them, whatever stands in them."""
    config = small("Clock-v0", environment=environments.Config("Clock-v0", 4, "sync", "next-step"))
    state, net, batch = first_batch(config)
    assert batch.valid is not None
    assert not batch.valid.all()
    keep, before, ends = batch.valid, state.theta.clone(), []
    bare = rollout.Batch(*(None if part is keep else part[keep] for part in batch))  # type: ignore[index]
    spoiled = batch._replace(psi=torch.where(keep, batch.psi, 1e3))
    for given in (batch, bare, spoiled):
        state.theta.copy_(before)
        trpo.update(state._replace(optimizer=config.optimizer.start(before)), net, given, config)
        ends.append(state.theta[net.part("policy")].clone())
    assert not torch.equal(ends[0], before[net.part("policy")])
    torch.testing.assert_close(ends[0], ends[1], rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(ends[0], ends[2], rtol=1e-8, atol=1e-10)


def test_the_critic_is_fitted_after_the_step() -> None:
    """Its error falls; the numbers that a run records are all there."""
    config = small("CartPole-v1", critic_epochs=30, rollout_length=64)
    state, net, batch = first_batch(config)
    theta, memory, numbers = trpo.update(state, net, batch, config)
    value = net.only("critic", theta, batch.observation).detach()
    before = (batch.value_old - batch.value_target).square().mean()
    assert (value - batch.value_target).square().mean() < 0.8 * before
    assert memory.step == 30 * 64 * 4 // 32

    assert {"kl", "improvement", "backtracks", "accepted", "entropy", "value_error"} <= set(numbers)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"network": networks.Config(shared=True)}, "network.shared is True, allowed: False"),
        ({"target_kl": 0.0}, "target_kl is 0.0, allowed: above 0"),
        ({"cg_damping": 0.0}, "cg_damping is 0.0, allowed: above 0"),
        ({"cg_iterations": 0}, "cg_iterations is 0, allowed: 1 or more"),
        ({"shrink": 1.0}, "shrink is 1.0, allowed: above 0 and below 1"),
        ({"max_backtracks": -1}, "max_backtracks is -1, allowed: 0 or more"),
        ({"steps_per_batch": 0}, "steps_per_batch is 0, allowed: 1 or more"),
        ({"critic_epochs": 0}, "critic_epochs is 0, allowed: 1 or more"),
    ],
)
def test_settings_out_of_range_are_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        small("CartPole-v1", **changes)


def test_what_is_not_finite_changes_nothing() -> None:
    config = small("CartPole-v1", whiten_advantages=False)
    state, net, batch = first_batch(config)
    before = state.theta.clone()
    for value in (3e38, float("nan")):
        with pytest.raises(ValueError, match="finite"):
            trpo.update(state, net, batch._replace(psi=torch.full_like(batch.psi, value)), config)
        assert torch.equal(state.theta, before)


def test_same_seed_same_run_and_another_seed_another() -> None:
    thetas = [trpo.train(small("CartPole-v1", run=replace(QUIET, seed=seed))).theta for seed in (1, 1, 2)]
    assert torch.equal(thetas[0], thetas[1])
    assert not torch.equal(thetas[0], thetas[2])


@pytest.mark.slow
def test_killed_at_random_moments(tmp_path: Path) -> None:
    size = ("--environment.num-envs", 2, "--rollout-length", 32, "--total-steps", test_kill.ITERATIONS * 64)
    fit = ("--network.hidden", 8, "--critic-epochs", 2, "--critic-minibatch", 16, "--quiet")
    arguments = ("trpo", "--env", "CartPole-v1", *size, *fit, "--steps-per-batch", 2, *test_kill.NORMALIZED)
    test_kill.check(tmp_path, arguments, seed=4)


def test_presets() -> None:
    wanted = set(presets.PPO_PRESETS) - presets.NOT_TRAINED_TO_CONVERGENCE
    assert set(presets.TRPO_PRESETS) == wanted
    assert all(config.environment.id == name for name, config in presets.TRPO_PRESETS.items())


@pytest.mark.parametrize("seed", [1, 2])
def test_learns_cartpole(seed: int) -> None:
    """15k of the preset's 100k steps: a policy that does not learn stays near 20."""
    config = replace(presets.TRPO_PRESETS["CartPole-v1"], total_steps=15_000, run=replace(QUIET, seed=seed))
    assert trpo.train(config).evaluate(20).summary()["mean_return"] >= 120
