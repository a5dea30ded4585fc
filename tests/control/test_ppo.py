"""PPO on its own definitions: the ratio of the first minibatch, the objective by hand, learning on several seeds."""

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.control import worlds
from upslope.control import environments, learner, networks, normalization, optimizers, ppo, presets, rollout
from upslope.control.learner import State
from upslope.control.parameters import Net
from upslope.control.ppo import PPO
from upslope.core import advantages, returns
from upslope.runs import run as runs
from upslope.runs.run import Run

QUIET = runs.Config(quiet=True)


def small(environment_id: str, **changes: object) -> PPO:
    config = PPO(
        environment=environments.Config(environment_id, 4),
        run=QUIET,
        total_steps=256,
        rollout_length=32,
        num_epochs=2,
        minibatch_size=32,
    )
    return replace(config, **changes)  # type: ignore[arg-type]


def first_batch(config: PPO, iterations: int = 1) -> tuple[State, Net, rollout.Batch]:
    """What the update of the given iteration starts from, as `train` makes it."""
    state, net = learner.start(config, Run("ppo", config, config.total_steps))
    for iteration in range(iterations):
        data, world = learner.collect(net, state, config, config.rollout_length)
        discounts, traces = returns.boundaries(data.terminated, data.truncated, config.gamma, config.gae_lambda)
        psi = advantages.gae(data.reward, data.value, data.next_value, discounts, traces)
        batch = rollout.flatten(data, psi, psi + data.value)
        if iteration < iterations - 1:
            theta, memory, _ = ppo.update(state, net, batch, config)
            state = learner.advance(state, theta, memory, world)
    return state, net, batch


SPACES = [f"box-{action}-v0" for action in worlds.ACTIONS] + [f"{seen}-box-v0" for seen in worlds.OBSERVATIONS]
CASES = [(name, False) for name in SPACES] + [(name, True) for name in SPACES if name.endswith("-box-v0")]


@pytest.mark.parametrize(("environment_id", "state_dependent"), CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_first_ratio_is_one(environment_id: str, state_dependent: bool, dtype: torch.dtype) -> None:
    """On the first minibatch of the first epoch |ratio - 1| ≤ 1e-5 (1e-12 in float64) and nothing is clipped.

    With observation statistics that moved before and are frozen from collection through update; for every action space,
    every observation space, and state-dependent noise where the actions are continuous.
    """
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        config = small(
            environment_id,
            normalize=normalization.Config(observation=True, reward=True),
            network=networks.Config(
                hidden=(16, 16), cnn_features=32, state_dependent_noise=state_dependent, noise_interval=4
            ),
            optimizer=optimizers.Adam(learning_rate=1e-2),
        )
        state, net, batch = first_batch(config, iterations=2)
        for minibatch in rollout.minibatches(batch, 1, 32, torch.Generator().manual_seed(0)):
            part = ppo.objective(state.theta, net, minibatch, config)[1]
            error = ((part.logp - minibatch.logp_old).exp() - 1).abs().max().item()
            assert error <= (1e-12 if dtype == torch.float64 else 1e-5)
        assert ppo.diagnose(ppo.objective(state.theta, net, batch, config)[1], batch, config)["clip_fraction"] == 0
        state.world.envs.close()
    finally:
        torch.set_default_dtype(default)


def test_the_objective_by_hand_in_numpy() -> None:
    """surrogate - c1 error + c2 entropy, recomputed in NumPy float64 from the network's outputs."""
    config = small("CartPole-v1", clip_low=0.1, clip_high=0.3, value_coef=0.7, entropy_coef=0.05)
    config = replace(config, environment=environments.Config("CartPole-v1", 4, "sync"))
    state, net, batch = first_batch(config)
    shaken = state.theta + 0.3 * torch.randn(state.theta.shape, generator=torch.Generator().manual_seed(0))
    total, _ = ppo.objective(shaken, net, batch, config)
    policy, value = net(shaken, batch.observation)
    logits, psi = policy.logits.detach().double().numpy(), batch.psi.double().numpy()
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    logp = np.log(p[np.arange(len(p)), batch.action.numpy()])
    psi = (psi - psi.mean()) / (psi.std(ddof=1) + 1e-8)
    rho = np.exp(logp - batch.logp_old.double().numpy())
    surrogate = np.minimum(rho * psi, np.clip(rho, 0.9, 1.3) * psi)
    error = (value.detach().double().numpy() - batch.value_target.double().numpy()) ** 2
    entropy = -(p * np.log(p)).sum(1)
    assert (rho < 0.9).any()
    assert (rho > 1.3).any()
    assert total.item() == pytest.approx(surrogate.mean() - 0.7 * error.mean() + 0.05 * entropy.mean(), rel=1e-5)


def test_value_clipping_caps_the_move() -> None:
    config = small("CartPole-v1", clip_value=0.2)
    state, net, batch = first_batch(config)
    moved = batch._replace(value_old=batch.value_old - 5.0, value_target=batch.value_old + 1.0)
    part = ppo.objective(state.theta, net, moved, config)[1]
    value = net(state.theta, batch.observation)[1]
    capped = (moved.value_old + 0.2 - moved.value_target).square()
    torch.testing.assert_close(part.value_error, torch.maximum(capped, (value - moved.value_target).square()))


def test_reset_rows_change_nothing() -> None:
    """A batch with reset rows gives the gradient of the batch without them."""
    config = small("Clock-v0", environment=environments.Config("Clock-v0", 4, "sync", "next-step"))
    state, net, batch = first_batch(config)
    assert batch.valid is not None
    kept = batch.valid
    bare = rollout.Batch(*(None if part is batch.valid else part[kept] for part in batch))  # type: ignore[index]
    one = net.gradient(ppo.objective, state.theta, net, batch, config)[0].clone()
    other = net.gradient(ppo.objective, state.theta, net, bare, config)[0]
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-7)
    assert not kept.all()


def test_epochs_stop_at_the_kl_target() -> None:
    config = small(
        "CartPole-v1",
        num_epochs=50,
        optimizer=optimizers.Adam(2e-3),
        anneal_learning_rate=False,
        run=replace(QUIET, seed=2),
    )
    state, net, batch = first_batch(config)
    start = state.theta.clone()
    _, _, free = ppo.update(state, net, batch, config)
    state.theta.copy_(start)
    state = state._replace(optimizer=config.optimizer.start(start))
    _, _, bound = ppo.update(state, net, batch, replace(config, target_kl=0.004))
    assert free["gradient_steps"] == 50 * 4
    assert bound["gradient_steps"] < free["gradient_steps"]
    assert bound["kl"] < 0.012 < free["kl"]  # one step of this size moves far less than the target


def test_learning_rate_and_clip_fall_linearly() -> None:
    assert [optimizers.linear(2.0, progress, True) for progress in (0.0, 0.5, 1.0, 1.1)] == [2.0, 1.0, 0.0, 0.0]
    config = small("CartPole-v1", anneal_clip=True, total_steps=1000)
    state, net, batch = first_batch(config)
    _, _, numbers = ppo.update(state._replace(step=750), net, batch, config)
    assert numbers["learning_rate"] == pytest.approx(0.25 * config.optimizer.learning_rate)
    # at the very end the clip is 0: at π_θ ≠ π_old only pessimistic terms are left, Ψ(1 - ρ)₊ has no slope upwards
    shaken = state.theta + 0.01
    psi = advantages.whiten(batch.psi, batch.valid)
    part = ppo.objective(shaken, net, batch, config, clip_scale=0.0)[1]
    assert (part.surrogate <= psi + 1e-6).all()


def test_initialisation() -> None:
    """Orthogonal with gain √2 in the torso, 0.01 and 1 in the heads, zero biases; a function of the seed alone."""
    box = worlds.BOX
    make = lambda seed: networks.actor_critic(box, worlds.ACTIONS["discrete"], networks.Config(), seed)  # noqa: E731
    module = make(3)
    weight = module.policy.torso.layers.layers[1].weight
    torch.testing.assert_close(weight @ weight.T, 2 * torch.eye(64), rtol=0, atol=1e-5)
    assert torch.linalg.matrix_norm(module.policy.head.linear.weight, 2).item() == pytest.approx(0.01, rel=1e-4)
    assert module.critic.value.weight.norm().item() == pytest.approx(1.0, rel=1e-4)
    assert all((p == 0).all() for name, p in module.named_parameters() if name.endswith("bias"))
    state = torch.get_rng_state()
    assert torch.equal(make(3).policy.head.linear.weight, module.policy.head.linear.weight)
    assert not torch.equal(make(4).policy.head.linear.weight, module.policy.head.linear.weight)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"minibatch_size": 129},
            r"minibatch_size is 129, but a rollout has only rollout_length 32 × num_envs 4 = 128",
        ),
        ({"gamma": 1.5}, r"gamma is 1.5, allowed: 0 to 1"),
        ({"gae_lambda": -0.1}, r"gae_lambda is -0.1, allowed: 0 to 1"),
        ({"num_epochs": 0}, r"num_epochs is 0, allowed: 1 or more"),
        ({"clip_low": -0.1}, r"clip_low is -0.1, allowed"),
        ({"value_coef": -1.0}, r"value_coef is -1.0, allowed"),
        ({"max_grad_norm": 0.0}, r"max_grad_norm is 0.0, allowed"),
        ({"target_kl": -0.01}, r"target_kl is -0.01, allowed"),
    ],
)
def test_settings_out_of_range_are_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        small("CartPole-v1", **changes)


@pytest.mark.parametrize("make", [optimizers.Adam, optimizers.RMSProp, optimizers.SGD])
def test_optimiser_settings_out_of_range_are_refused(make: Callable[..., optimizers.Optimizer]) -> None:
    with pytest.raises(ValueError, match=r"learning_rate is -1.0, allowed: above 0"):
        make(learning_rate=-1.0)


def test_a_non_finite_gradient_changes_nothing() -> None:
    config = small("CartPole-v1", whiten_advantages=False)
    state, net, batch = first_batch(config)
    before = state.theta.clone()
    huge = batch._replace(psi=torch.full_like(batch.psi, 3e38))
    with pytest.raises(ValueError, match="finite"):
        ppo.update(state, net, huge, config)
    assert torch.equal(state.theta, before)


def test_an_agent_is_usable_on_its_own() -> None:
    agent = ppo.train(small("CartPole-v1"))
    result = agent.evaluate(episodes=5)
    assert len(result.returns) == 5
    assert (result.returns == result.lengths).all()  # CartPole pays 1 a step
    again = agent.evaluate(episodes=5)
    assert (result.returns == again.returns).all()
    assert agent.act(np.zeros((2, 4), np.float32)).shape == (2,)


@pytest.mark.parametrize("environment_id", [f"dict-{action}-v0" for action in worlds.ACTIONS])
def test_trains_on_every_action_space(environment_id: str) -> None:
    network = networks.Config(hidden=(8,), cnn_features=8)
    agent = ppo.train(small(environment_id, network=network, rollout_length=16, total_steps=64, minibatch_size=64))
    assert agent.theta.isfinite().all()


def test_same_seed_same_run_and_another_seed_another(tmp_path: Path) -> None:
    thetas = [ppo.train(small("CartPole-v1", run=replace(QUIET, seed=seed))).theta for seed in (1, 1, 2)]
    assert torch.equal(thetas[0], thetas[1])
    assert not torch.equal(thetas[0], thetas[2])


def test_presets_are_complete_and_said_when_not_converged() -> None:
    wanted = [
        "CartPole-v1",
        "Acrobot-v1",
        "MountainCar-v0",
        "MountainCarContinuous-v0",
        "Pendulum-v1",
        "LunarLander-v3",
        "LunarLanderContinuous-v3",
        "BipedalWalker-v3",
        "HalfCheetah-v5",
        "Hopper-v5",
        "Walker2d-v5",
        "Ant-v5",
        "ALE/Pong-v5",
        "ALE/Breakout-v5",
    ]
    assert set(wanted) == set(presets.PPO_PRESETS)
    assert all(config.environment.id == name for name, config in presets.PPO_PRESETS.items())
    assert {"ALE/Pong-v5", "ALE/Breakout-v5"} == presets.NOT_TRAINED_TO_CONVERGENCE


@pytest.mark.parametrize("environment_id", ["ALE/Pong-v5", "ALE/Breakout-v5"])
def test_atari_runs_end_to_end(environment_id: str) -> None:
    pytest.importorskip("ale_py")
    preset = presets.PPO_PRESETS[environment_id]
    environment = replace(preset.environment, num_envs=2)
    config = replace(preset, environment=environment, rollout_length=64, minibatch_size=64, num_epochs=1)
    agent = ppo.train(replace(config, total_steps=256, run=QUIET))
    assert agent.theta.isfinite().all()
    assert agent.net.module.critic.torso is None  # one Nature-CNN for both


def test_learns_cartpole() -> None:
    """30k of the preset's 100k steps: a policy that does not learn stays near 20."""
    returns = []
    for seed in (11, 12, 13):
        config = replace(presets.PPO_PRESETS["CartPole-v1"], total_steps=30_000, run=replace(QUIET, seed=seed))
        returns.append(ppo.train(config).evaluate(20).summary()["mean_return"])
    assert sorted(returns)[1] >= 300
    assert np.mean(returns) >= 300
    assert min(returns) >= 100


@pytest.mark.slow
def test_solves_cartpole(tmp_path: Path) -> None:
    """On two of three seeds at least: one in ten runs loses the policy again before the end (docs/results.md)."""
    solved = []
    for seed in (21, 22, 23):
        directory = tmp_path / str(seed)
        preset = presets.PPO_PRESETS["CartPole-v1"]
        ppo.train(replace(preset, run=runs.Config(seed=seed, run_dir=directory, quiet=True)))
        from upslope.runs.metrics import read

        solved.append(read(directory)[-1]["episode_return"] >= 475)
    assert sum(solved) >= 2


@pytest.mark.slow
def test_learns_pendulum_with_state_dependent_noise() -> None:
    """Random play is near -1200, the published result -172."""
    results = []
    for seed in (1, 2):
        config = replace(presets.PPO_PRESETS["Pendulum-v1"], run=replace(QUIET, seed=seed))
        results.append(ppo.train(config).evaluate(50).summary()["mean_return"])
    assert min(results) >= -300
    assert math.isfinite(sum(results))


def test_single_transitions_are_minibatches_too() -> None:
    agent = ppo.train(small("CartPole-v1", minibatch_size=1, total_steps=32, rollout_length=8, num_epochs=1))
    assert agent.theta.isfinite().all()


def test_clip_fraction_is_measured_at_the_annealed_clip() -> None:
    config = small("CartPole-v1", anneal_clip=True, clip_low=0.2, clip_high=0.2)
    state, net, batch = first_batch(config)
    shaken = state.theta + 0.1 * torch.randn(state.theta.shape, generator=torch.Generator().manual_seed(0))
    ratio = (ppo.objective(shaken, net, batch, config)[1].logp - batch.logp_old).exp().detach()
    rows = torch.ones_like(ratio, dtype=torch.bool) if batch.valid is None else batch.valid
    for scale in (1.0, 0.5):
        outside = ((ratio - 1).abs() > 0.2 * scale)[rows].double().mean().item()
        part = ppo.objective(shaken, net, batch, config, scale)[1]
        found = ppo.diagnose(part, batch, config, clip_scale=scale)["clip_fraction"]
        assert found == pytest.approx(outside, abs=1e-6)
        assert 0 < outside < 1


ODD = {
    "ram": worlds.spaces.Box(0, 255, (128,), np.uint8),
    "counts": worlds.spaces.Box(0, 9, (2, 3), np.int64),
    "number": worlds.spaces.Box(-1.0, 1.0, (), np.float32),
    "deep image": worlds.spaces.Box(0, 255, (48, 40, 6), np.uint8),
    "any keys": worlds.spaces.Dict({"a.b": worlds.BOX, "type": worlds.spaces.Discrete(2)}),
}


@pytest.mark.parametrize("name", ODD)
def test_odd_observations_are_encoded(name: str) -> None:
    module = networks.encoder(ODD[name], 16)
    ODD[name].seed(0)
    samples = [ODD[name].sample() for _ in range(3)]
    batch = (
        {k: np.stack([s[k] for s in samples]) for k in samples[0]}
        if isinstance(samples[0], dict)
        else np.stack(samples)
    )
    features = module(networks.to_tensors(batch))
    assert features.shape == (3, module.size)
    assert features.dtype == torch.float32


def test_actions_of_an_agent_are_the_environments() -> None:
    agent = ppo.train(small("box-discrete-from-2-v0", total_steps=128))
    actions = agent.act(np.zeros((5, 3), np.float32))
    assert all(worlds.ACTIONS["discrete-from-2"].contains(action) for action in actions)
