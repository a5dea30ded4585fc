"""ACKTR: the update by hand, every space, exact resume, learning on several seeds."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.control import worlds
from upslope.control import acktr, environments, kfac, learner, networks, normalization, presets, rollout
from upslope.control.acktr import ACKTR
from upslope.control.learner import State
from upslope.control.parameters import Net
from upslope.core import advantages, returns
from upslope.runs import checkpoint
from upslope.runs import run as runs
from upslope.runs.randomness import generator
from upslope.runs.run import CHECKPOINTS, SUMMARY, Run

QUIET = runs.Config(quiet=True)


def small(environment_id: str, **changes: Any) -> ACKTR:
    config = ACKTR(environment=environments.Config(environment_id, 4), run=QUIET, total_steps=160, rollout_length=10)
    return replace(config, **changes)


def first_batch(config: ACKTR) -> tuple[State, Net, rollout.Batch]:
    """What the first update starts from, as `train` makes it."""
    state, net = learner.start(config, Run("acktr", config, config.total_steps))
    data, _ = learner.collect(net, state, config, config.rollout_length)
    discounts, traces = returns.boundaries(data.terminated, data.truncated, config.gamma, config.gae_lambda)
    psi = advantages.gae(data.reward, data.value, data.next_value, discounts, traces)
    return state, net, rollout.flatten(data, psi, psi + data.value)


def test_the_objective_by_hand_in_numpy() -> None:
    """Ψ log π - c1 error + c2 entropy, recomputed in NumPy float64 from the network's outputs."""
    config = small("CartPole-v1", value_coef=0.7, entropy_coef=0.05)
    state, net, batch = first_batch(config)
    total, _ = acktr.objective(state.theta, net, batch, config)
    policy, value = net(state.theta, batch.observation)
    logits, psi = policy.logits.detach().double().numpy(), batch.psi.double().numpy()
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    logp = np.log(p[np.arange(len(p)), batch.action.numpy()])
    error = (value.detach().double().numpy() - batch.value_target.double().numpy()) ** 2
    entropy = -(p * np.log(p)).sum(1)
    assert total.item() == pytest.approx((psi * logp - 0.7 * error + 0.05 * entropy).mean(), rel=1e-5)


def test_the_update_is_the_natural_gradient_with_factors_of_this_batch() -> None:
    """The first step: θ + (1-μ) lr x, the factors' noise a function of (seed, iteration)."""
    config = small("CartPole-v1", anneal_learning_rate=False)
    state, net, batch = first_batch(config)
    before = state.theta.clone()
    gradient = net.gradient(acktr.objective, state.theta, net, batch, config)[0].clone()
    noise = generator(config.run.seed, "fisher", 0, 0)
    memory = kfac.observe(state.optimizer, net, state.theta, batch.observation, None, config.optimizer, noise)
    x, region = kfac.natural(gradient, memory, net, config.optimizer, 0.25)
    theta, memory, numbers = acktr.update(state, net, batch, config)
    torch.testing.assert_close(theta, before + 0.1 * 0.25 * x)
    assert memory.step == 1
    assert numbers["kl_model"] == region["kl_model"] <= 0.001 * (1 + 1e-6)
    policy, _ = net(before.clone(), batch.observation)
    moved, _ = net(before + 0.25 * x, batch.observation)
    assert policy.kl(moved).mean().item() == pytest.approx(region["kl_model"], rel=0.5)  # as the quadratic says, nearly


def test_reset_rows_change_nothing() -> None:
    """A batch whose reset rows hold other numbers gives the same θ."""
    config = small("Clock-v0", environment=environments.Config("Clock-v0", 4, "sync", "next-step"))
    ends = []
    for fill in (0.0, 7.0):
        state, net, batch = first_batch(config)
        assert batch.valid is not None
        assert not batch.valid.all()
        seen = torch.where(batch.valid.unsqueeze(1), batch.observation, fill)  # type: ignore[arg-type]
        ends.append(acktr.update(state, net, batch._replace(observation=seen), config)[0])
    torch.testing.assert_close(ends[0], ends[1], rtol=1e-4, atol=1e-6)


def test_a_non_finite_gradient_changes_nothing() -> None:
    config = small("CartPole-v1")
    state, net, batch = first_batch(config)
    before = state.theta.clone()
    huge = batch._replace(psi=torch.full_like(batch.psi, 3e38))
    with pytest.raises(ValueError, match="finite"):
        acktr.update(state, net, huge, config)
    assert torch.equal(state.theta, before)
    assert not state.optimizer.memory[0].any()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"gamma": 1.5}, r"gamma is 1.5, allowed: 0 to 1"),
        ({"rollout_length": 0}, r"rollout_length is 0, allowed: 1 or more"),
        ({"entropy_coef": -0.1}, r"entropy_coef is -0.1, allowed"),
        ({"max_grad_norm": 0.0}, r"max_grad_norm is 0.0, allowed"),
        ({"network": networks.Config(state_dependent_noise=True)}, r"state_dependent_noise is True, allowed: False"),
    ],
)
def test_settings_out_of_range_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        small("CartPole-v1", **changes)


SPACES = [f"dict-{action}-v0" for action in worlds.ACTIONS] + ["image-box-v0", "multidiscrete-discrete-v0"]


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("environment_id", SPACES)
def test_trains_on_every_action_space(environment_id: str, shared: bool) -> None:
    network = networks.Config(hidden=(8,), cnn_features=8, shared=shared)
    normalize = normalization.Config(reward=True)
    agent = acktr.train(small(environment_id, network=network, normalize=normalize, total_steps=80))
    assert agent.theta.isfinite().all()


def test_same_seed_same_run_and_another_seed_another() -> None:
    thetas = [acktr.train(small("CartPole-v1", run=replace(QUIET, seed=seed))).theta for seed in (1, 1, 2)]
    assert torch.equal(thetas[0], thetas[1])
    assert not torch.equal(thetas[0], thetas[2])


def test_resumed_between_two_inversions_it_ends_the_same(tmp_path: Path) -> None:
    """Bitwise: factors, velocity and the inverses of an earlier step come from the checkpoint."""
    whole, copy = tmp_path / "whole", tmp_path / "copy"
    run = runs.Config(run_dir=whole, checkpoint_seconds=0, quiet=True)
    config = small("CartPole-v1", optimizer=kfac.KFAC(inverse_interval=5), total_steps=320, run=run)
    theta = acktr.train(config).theta
    shutil.copytree(whole, copy)
    (copy / SUMMARY).unlink()
    shutil.rmtree(next((copy / CHECKPOINTS).glob(f"*{checkpoint.steps(copy / CHECKPOINTS)[-1]}")))
    last = checkpoint.newest(copy / CHECKPOINTS)
    assert last is not None
    assert int(last.tensors["optimizer.step"]) % 5 in (1, 2, 3, 4)
    again = replace(config, run=replace(run, run_dir=copy))
    assert torch.equal(acktr.train(again, Run.resume(copy, "acktr", again, again.total_steps)).theta, theta)
    assert fingerprint_of(copy) == fingerprint_of(whole)


def fingerprint_of(directory: Path) -> str:
    newest = checkpoint.newest(directory / CHECKPOINTS)
    assert newest is not None
    return checkpoint.fingerprint(newest.tensors)


def test_presets_name_their_environments() -> None:
    assert all(config.environment.id == name for name, config in presets.ACKTR_PRESETS.items())


@pytest.mark.slow
def test_learns_cartpole() -> None:
    """50,000 of the preset's 150,000 steps: a policy that does not learn stays near 20."""
    for seed in (11, 12):
        config = replace(presets.ACKTR_PRESETS["CartPole-v1"], total_steps=50_000, run=replace(QUIET, seed=seed))
        assert acktr.train(config).evaluate(20).summary()["mean_return"] >= 100
