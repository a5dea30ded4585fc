"""Recurrent policies: cells against PyTorch's own, memories rebuilt as they were, nothing carried across episodes."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tests.control import recall, worlds
from upslope.control import (
    actor_critic,
    agent,
    environments,
    learner,
    memory,
    networks,
    normalization,
    optimizers,
    ppo,
    reinforce,
    rollout,
)  # fmt: skip
from upslope.control.memory import GRU, LSTM, Remembered
from upslope.control.parameters import Net
from upslope.control.ppo import PPO
from upslope.core import advantages, returns
from upslope.runs import run as runs
from upslope.runs.run import Run

QUIET = runs.Config(quiet=True)
MODES = ("disabled", "same-step", "next-step")
CELLS = {"lstm": LSTM, "gru": GRU}


def small(environment_id: str = "Recall-v0", kind: Any = "lstm", autoreset: Any = "disabled", **changes: Any) -> PPO:
    kwargs = {"delay": 4} if environment_id == "Recall-v0" else {}
    config = PPO(
        environment=environments.Config(environment_id, 4, "sync", autoreset, kwargs=kwargs),
        network=networks.Config(hidden=(8,), cnn_features=8, memory=kind, memory_size=6),
        optimizer=optimizers.Adam(learning_rate=1e-2),
        run=QUIET,
        total_steps=256,
        rollout_length=32,
        num_epochs=2,
        minibatch_size=64,
    )
    return replace(config, **changes)


def first_batch(config: PPO, iterations: int = 1) -> tuple[learner.State, Net, rollout.Rollout, rollout.Batch]:
    """What the update of the given iteration starts from, as `train` makes it."""
    state, net = learner.start(config, Run("ppo", config, config.total_steps))
    for iteration in range(iterations):
        data, world = learner.collect(net, state, config, config.rollout_length)
        discounts, traces = returns.boundaries(data.terminated, data.truncated, config.gamma, config.gae_lambda)
        psi = advantages.gae(data.reward, data.value, data.next_value, discounts, traces)
        batch = rollout.flatten(data, psi, psi + data.value)
        if iteration < iterations - 1:
            theta, optimizer, _ = ppo.update(state, net, batch, config)
            state = learner.advance(state, theta, optimizer, world)
    return state, net, data, batch


# Cells


def twin(kind: str, dtype: torch.dtype, inputs: int = 3, size: int = 5) -> tuple[LSTM | GRU, nn.RNNCellBase]:
    """Ours and PyTorch's with the same weights; its LSTM's gates are in the order i, f, g, o, ours i, f, o, g."""
    torch.manual_seed(1)
    theirs = (nn.LSTMCell if kind == "lstm" else nn.GRUCell)(inputs, size).to(dtype)
    ours = CELLS[kind](inputs, size).to(dtype)
    order = torch.arange(3 * size)
    with torch.no_grad():
        if kind == "lstm":
            i, f, g, o = torch.arange(4 * size).split(size)
            order = torch.cat([i, f, o, g])
            theirs.bias_hh.zero_()
        else:
            ours.recurrent.bias.copy_(theirs.bias_hh)
        ours.input.weight.copy_(theirs.weight_ih[order])
        ours.input.bias.copy_(theirs.bias_ih[order])
        ours.recurrent.weight.copy_(theirs.weight_hh[order])
    return ours, theirs


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-12)])
@pytest.mark.parametrize("kind", CELLS)
def test_cells_are_pytorchs(kind: str, dtype: torch.dtype, tolerance: float) -> None:
    """Outputs, states and gradients over 7 steps."""
    ours, theirs = twin(kind, dtype)
    x = torch.randn(7, 4, 3, dtype=dtype)
    start = 0.5 * torch.randn(4, ours.states * 5, dtype=dtype)
    mine, other = start.clone().requires_grad_(), start.clone().requires_grad_()
    outputs, after = memory.run(ours, x.transpose(0, 1).flatten(0, 1), mine, torch.zeros(4, 7, dtype=torch.bool))
    state: Any = tuple(other.chunk(2, -1)) if kind == "lstm" else other
    expected = []
    for now in x:
        state = theirs(now, state)
        expected.append(state[0] if kind == "lstm" else state)
    last = torch.cat(state, -1) if kind == "lstm" else state
    torch.testing.assert_close(outputs, torch.stack(expected, 1).flatten(0, 1), rtol=0, atol=tolerance)
    torch.testing.assert_close(after, last, rtol=0, atol=tolerance)
    weights = torch.randn_like(outputs)
    (outputs * weights).mean().backward()
    (torch.stack(expected, 1).flatten(0, 1) * weights).mean().backward()
    torch.testing.assert_close(mine.grad, other.grad, rtol=0, atol=tolerance)
    block = torch.cat([part.reshape(-1, 5) for part in theirs.weight_hh.grad.split(5)]).unflatten(0, (-1, 5))
    block = block[[0, 1, 3, 2]] if kind == "lstm" else block
    torch.testing.assert_close(ours.recurrent.weight.grad, block.flatten(0, 1), rtol=0, atol=tolerance)


@pytest.mark.parametrize("kind", CELLS)
def test_forward_mode_derivatives(kind: str) -> None:
    """`torch.func.jvp` of π and V along a direction in θ: as the backward mode has it, and as differences say."""
    config = networks.Config(hidden=(4,), memory=kind, memory_size=3)  # type: ignore[arg-type]
    net = Net(networks.actor_critic(worlds.BOX, worlds.ACTIONS["discrete"], config, 0).double())
    theta = net.initial()
    direction = torch.randn(theta.shape, dtype=theta.dtype, generator=torch.Generator().manual_seed(0))
    begins = torch.tensor([[False, False, True, False, False], [False] * 5])
    seen = Remembered(
        torch.randn(2, 5, 3, dtype=theta.dtype), torch.randn(2, net.module.memory_size, dtype=theta.dtype), begins
    )

    def outputs(at: Tensor) -> Tensor:
        policy, value = net(at, seen)
        return torch.cat([policy.log_probs().flatten(), value])

    _, forward = torch.func.jvp(outputs, (theta,), (direction,))
    _, pullback = torch.func.vjp(outputs, theta)
    for i, weight in enumerate(torch.eye(len(forward), dtype=theta.dtype)):
        assert (pullback(weight)[0] * direction).sum().item() == pytest.approx(forward[i].item(), rel=1e-10, abs=1e-12)
    difference = (outputs(theta + 1e-6 * direction) - outputs(theta - 1e-6 * direction)) / 2e-6
    torch.testing.assert_close(forward, difference, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("kind", CELLS)
def test_sequences_are_single_steps_and_nothing_crosses_an_episode(kind: str) -> None:
    unit = CELLS[kind](3, 5).double()
    x = torch.randn(2, 6, 3, dtype=torch.float64, requires_grad=True)
    start = torch.randn(2, 5 * unit.states, dtype=torch.float64, requires_grad=True)
    begins = torch.zeros(2, 6, dtype=torch.bool)
    begins[0, 4] = begins[1, 0] = True
    outputs, after = memory.run(unit, x.flatten(0, 1), start, begins)
    state, expected = start, []
    for t in range(6):
        state = memory.forget(state, begins[:, t].numpy())
        output, state = memory.run(unit, x[:, t], state, None)
        expected.append(output)
    torch.testing.assert_close(outputs, torch.stack(expected, 1).flatten(0, 1), rtol=0, atol=1e-14)
    torch.testing.assert_close(after, state, rtol=0, atol=1e-14)
    late = outputs.unflatten(0, (2, 6))
    slopes = torch.autograd.grad(late[0, 4:].sum() + late[1].sum(), (x, start))
    assert (slopes[0][0, :4] == 0).all()  # before the episode that begins at 4
    assert (slopes[0][0, 4:] != 0).any()
    assert (slopes[1] == 0).all()


def test_initialisation() -> None:
    """Orthogonal of standard deviation 1, biases 0; the gate that keeps is the second."""
    for kind, gates in (("lstm", 4), ("gru", 3)):
        config = networks.Config(hidden=(8,), memory=kind, memory_size=6)  # type: ignore[arg-type]
        make = lambda c: networks.actor_critic(worlds.BOX, worlds.ACTIONS["discrete"], c, 0).policy.torso.cell  # noqa: E731
        unit = make(config)
        for layer in (unit.input, unit.recurrent):
            weight = layer.weight
            assert weight.shape[0] == 6 * gates
            torch.testing.assert_close(weight.T @ weight, torch.eye(weight.shape[1]), rtol=0, atol=1e-5)
            assert layer.bias is None or (layer.bias == 0).all()
        kept = make(replace(config, memory_bias=2.0)).input.bias
        assert kept.tolist() == [0.0] * 6 + [2.0] * 6 + [0.0] * 6 * (gates - 2)
        x, h = torch.zeros(1, 8), torch.ones(1, 6 * unit.states)
        with torch.no_grad():
            unit.input.weight.zero_(), unit.recurrent.weight.zero_()
            unit.input.bias[6:12] = 50.0  # shut: nothing is forgotten
        after = memory.run(unit, x, h, None)[1]
        torch.testing.assert_close(after[:, -6:], h[:, -6:])


# Rollouts


CASES = [("Recall-v0", "lstm", mode, False) for mode in MODES] + [
    ("Recall-v0", "gru", "next-step", True),
    ("dict-multidiscrete-v0", "gru", "disabled", True),
    ("dict-box-v0", "lstm", "same-step", False),
    ("box-multibinary-v0", "gru", "disabled", False),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("environment_id", "kind", "mode", "shared"), CASES)
def test_the_first_ratio_is_one(environment_id: str, kind: Any, mode: str, shared: bool, dtype: torch.dtype) -> None:
    """Rebuilt from the memory at the rollout's start, episodes ending inside it, π and V are those that acted."""
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        config = small(environment_id, kind, mode, normalize=normalization.Config(observation=True, reward=True))
        config = replace(config, network=replace(config.network, shared=shared))
        state, net, data, batch = first_batch(config, iterations=2)
        tolerance = 1e-12 if dtype == torch.float64 else 1e-5
        assert data.observation.memory.abs().max() > 0.01  # type: ignore[union-attr]
        assert data.observation.begins.any()  # type: ignore[union-attr]
        for minibatch in rollout.minibatches(batch, 1, 64, torch.Generator().manual_seed(0)):
            part = ppo.objective(state.theta, net, minibatch, config)[1]
            assert ((part.logp - minibatch.logp_old).exp() - 1).abs().max().item() <= tolerance
            value = net(state.theta, minibatch.observation)[1]
            torch.testing.assert_close(value, minibatch.value_old, rtol=tolerance, atol=tolerance)
        state.world.envs.close()
    finally:
        torch.set_default_dtype(default)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("truncate", [False, True])
def test_memories_begin_at_zero_and_successors_are_valued_with_theirs(mode: str, truncate: bool) -> None:
    """Episodes replayed by hand, a step at a time, through two rollouts: V of every state and of every successor."""
    config = small(autoreset=mode)
    kwargs = {"delay": 4, "truncate": truncate}
    environment = replace(config.environment, kwargs=kwargs)
    config = replace(config, environment=environment, rollout_length=13, minibatch_size=26)
    state, net = learner.start(config, Run("ppo", config, config.total_steps))
    one, world = learner.collect(net, state, config, 13)
    two, _ = learner.collect(net, state._replace(world=world, iteration=1), config, 13)
    seen = torch.cat([one.observation.observation, two.observation.observation], 1)  # type: ignore[union-attr]
    value, beyond = torch.cat([one.value, two.value], 1), torch.cat([one.next_value, two.next_value], 1)
    valid = torch.ones(4, 26, dtype=torch.bool) if one.valid is None else torch.cat([one.valid, two.valid], 1)  # type: ignore[list-item]
    cut = torch.cat([one.truncated, two.truncated], 1)
    step = lambda observation, kept: memory.step(net, state.theta, observation, kept)[1:]  # noqa: E731
    checked = 0
    with torch.no_grad():
        for i in range(4):
            times = valid[i].nonzero().flatten().tolist()
            for place, t in enumerate(times):
                if place % 5 == 0:  # delay 4: episodes of 5 steps
                    kept = memory.start(net, 1)
                v, kept = step(seen[i, t].unsqueeze(0), kept)
                torch.testing.assert_close(value[i, t], v[0], rtol=1e-5, atol=1e-6)
                assert bool(cut[i, t]) == (truncate and place % 5 == 4)
                if cut[i, t]:
                    v, _ = step(torch.zeros(1, 2), kept)  # what Recall shows after the end
                    torch.testing.assert_close(beyond[i, t], v[0], rtol=1e-5, atol=1e-6)
                    checked += 1
                elif place % 5 != 4 and place + 1 < len(times):
                    v, _ = step(seen[i, times[place + 1]].unsqueeze(0), kept)
                    torch.testing.assert_close(beyond[i, t], v[0], rtol=1e-5, atol=1e-6)
    assert checked == (0 if not truncate else sum(len(valid[i].nonzero()) // 5 for i in range(4)))


def test_every_autoreset_mode_remembers_the_same() -> None:
    """The valid rows of all three modes under one policy that ignores the noise."""
    found = []
    for mode in MODES:
        config = small(autoreset=mode, rollout_length=40, minibatch_size=40)
        state, net = learner.start(config, Run("ppo", config, config.total_steps))
        data, _ = learner.collect(net, state, config, 40)
        for i in range(4):
            keep = slice(None) if data.valid is None else data.valid[i]
            rows = data.observation.observation[i][keep], data.value[i][keep]  # type: ignore[union-attr]
            found.append((i, *(part[:30] for part in rows)))
    for i, seen, value in found[4:]:
        torch.testing.assert_close(seen, found[i][1])
        torch.testing.assert_close(value, found[i][2], rtol=1e-5, atol=1e-6)


def test_minibatches_are_whole_sequences() -> None:
    config = small()
    _, _, data, batch = first_batch(config)
    batch = batch._replace(psi=torch.arange(4 * 32.0))
    seen = []
    for minibatch in rollout.minibatches(batch, 1, 64, torch.Generator().manual_seed(3)):
        assert minibatch.psi.shape == (64,)
        rows = minibatch.psi.view(2, 32)
        assert (rows.diff(dim=1) == 1).all()
        for row, observation, kept, begins in zip(rows, *minibatch.observation, strict=True):  # type: ignore[misc]
            i = int(row[0]) // 32
            assert row[0] == 32 * i
            assert torch.equal(observation, data.observation.observation[i])  # type: ignore[union-attr]
            assert torch.equal(kept, data.observation.memory[i])  # type: ignore[union-attr]
            assert torch.equal(begins, data.observation.begins[i])  # type: ignore[union-attr]
            assert torch.equal(minibatch.logp_old.view(2, 32)[len(seen) % 2], data.logp[i])
            seen.append(i)
    assert sorted(seen) == [0, 1, 2, 3]
    with pytest.raises(ValueError, match="minibatch size is 48, but a memory needs whole sequences: multiples of 32"):
        next(rollout.minibatches(batch, 1, 48, torch.Generator()))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: small(minibatch_size=48), r"minibatch_size is 48, .* multiples of rollout_length 32"),
        (lambda: networks.Config(memory_size=0), r"memory_size is 0, allowed: 1 or more"),
        (
            lambda: actor_critic.A2C(network=networks.Config(memory="gru"), critic_epochs=1),
            r"critic_minibatch is 64, .* multiples of rollout_length 5",
        ),
        (
            lambda: reinforce.REINFORCE(network=networks.Config(memory="gru"), baseline="minimum-variance"),
            r"baseline 'minimum-variance' is not offered with network.memory 'gru'",
        ),
    ],
)
def test_settings_that_do_not_fit_a_memory_are_refused(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


# Agents


def test_evaluation_carries_the_memory() -> None:
    """Returns of `evaluate` against two episodes played by hand in each environment, with a new memory in each."""
    config = small()
    played = ppo.train(replace(config, total_steps=128 * 6))
    config = played.environment
    envs, observation = environments.make(replace(config, num_envs=16), agent.derive(5, "evaluate"))
    found: list[float] = []
    for _ in range(2):
        kept, total = played.begin(16), np.zeros(16)
        for _ in range(5):
            actions, kept = played.step(observation, kept)
            step = envs.step(actions)
            total, observation = total + step.reward, step.observation
        assert step.ended.all()
        found += total.tolist()
    envs.close()
    assert played.evaluate(32, seed=5).returns.tolist() == found
    with pytest.raises(ValueError, match="this policy has a memory"):
        played.act(np.zeros((1, 2), np.float32))
    with pytest.raises(ValueError, match="a policy with a memory sees"):
        played.net(played.theta, torch.zeros(1, 2))


def test_a_policy_without_a_memory_steps_too() -> None:
    played = ppo.train(small(kind="none"))
    assert played.begin(3) is None
    actions, kept = played.step(np.zeros((3, 2), np.float32), None)
    assert kept is None
    assert actions.tolist() == played.act(np.zeros((3, 2), np.float32)).tolist()


def test_films_carry_the_memory() -> None:
    """Every frame's action is the one that the episode so far gives."""
    played = ppo.train(small("Clock-v0"))
    seen: list[Tensor | None] = []
    step = agent.Agent.step

    def watched(self: agent.Agent, observation: Any, kept: Tensor | None, noise: Any = None) -> Any:
        result = step(self, observation, kept, noise)
        seen.extend([kept, result[1]])
        return result

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(agent.Agent, "step", watched)
        frames = list(played.frames())
    assert len(frames) == 6
    assert (seen[0] == 0).all()  # type: ignore[union-attr]
    assert all(torch.equal(one, other) for one, other in zip(seen[1:-1:2], seen[2::2], strict=True))  # type: ignore[arg-type]


# The other algorithms, and everything at once


def test_a2c_and_reinforce_take_a_memory() -> None:
    common: dict[str, Any] = {
        "environment": small().environment,
        "network": small().network,
        "run": QUIET,
        "total_steps": 200,
    }
    for more in ({}, {"critic_epochs": 2, "critic_minibatch": 20}):
        a2c = actor_critic.A2C(**common, rollout_length=10, **more)
        assert actor_critic.train(a2c).theta.isfinite().all()
    assert reinforce.train(reinforce.REINFORCE(**common, episodes_per_env=2)).theta.isfinite().all()


@pytest.mark.parametrize("mode", MODES)
def test_whole_episodes_are_rebuilt(mode: Any) -> None:
    """Each row is an episode from its first step, without a memory of the one before."""
    config = reinforce.REINFORCE(
        environment=small(autoreset=mode).environment, network=small().network, run=QUIET, episodes_per_env=3
    )
    state, net = learner.start(config, Run("reinforce", config, config.total_steps))
    data, world = learner.collect(net, state, config, 64, 3)
    assert data.logp.shape == (12, 5)
    assert (world.memory == 0).all()  # type: ignore[union-attr]
    policy, value = net(state.theta, rollout.flatten(data, data.value, data.value).observation)
    torch.testing.assert_close(value, data.value.flatten(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(policy.log_prob(data.action.flatten()), data.logp.flatten(), rtol=1e-5, atol=1e-6)


def everything(**changes: Any) -> PPO:
    environment = environments.Config(
        "Gates-v0", 3, "sync", "next-step", kwargs={"camera": True, "where": "info"}, action_mask="info"
    )
    config = small(environment=environment, normalize=normalization.Config(observation=True, reward=True))
    return replace(config, minibatch_size=32, total_steps=288, **changes)


def test_images_vectors_masks_memory_and_normalisation_at_once(tmp_path: Path) -> None:
    """Dict of image and vector, masks, an LSTM, normalised: the ratio is 1, and half a run resumed is the whole."""
    state, net, _, batch = first_batch(everything(), iterations=2)
    mask = batch.observation.rows()["action_mask"]  # type: ignore[union-attr]
    valid = batch.valid
    assert valid is not None
    assert not valid.all()
    assert (mask.gather(1, batch.action.unsqueeze(1)).squeeze(1) == 1).all()
    part = ppo.objective(state.theta, net, batch, everything())[1]
    assert ((part.logp - batch.logp_old).exp() - 1).abs().max() <= 1e-5
    whole = ppo.train(everything())
    path = tmp_path / "half"
    config = everything(run=runs.Config(quiet=True, run_dir=path, checkpoint_seconds=0))
    report = learner.report

    def stop(session: Any, state: learner.State, *rest: Any) -> None:
        report(session, state, *rest)
        if state.iteration == 2:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(learner, "report", stop)
        with pytest.raises(KeyboardInterrupt):
            ppo.train(config)
    resumed = ppo.train(config, Run.resume(path, "ppo", config, config.total_steps))
    assert torch.equal(resumed.theta, whole.theta)
    assert agent.load(config, path).evaluate(3).returns.tolist() == whole.evaluate(3).returns.tolist()


# What a memory is for


def remembering(kind: Any, seed: int) -> PPO:
    """A cue at the first of 21 steps, asked for at the last."""
    return PPO(
        environment=environments.Config("Recall-v0", 64, "sync"),
        network=networks.Config(hidden=(), shared=True, memory=kind, memory_size=16, memory_bias=1.0),
        optimizer=optimizers.Adam(learning_rate=1e-2),
        run=replace(QUIET, seed=seed),
        total_steps=64 * 21 * 15,
        rollout_length=21,
        minibatch_size=32 * 21,
        gae_lambda=0.0,
        entropy_coef=0.0,
        anneal_learning_rate=False,
    )


@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("kind", CELLS)
def test_a_cue_is_recalled_after_twenty_steps(kind: str, seed: int) -> None:
    assert recall.Recall().delay == 20
    assert ppo.train(remembering(kind, seed)).evaluate(64).returns.mean() >= 0.9


@pytest.mark.parametrize("seed", [1, 2])
def test_without_a_memory_it_is_not(seed: int) -> None:
    """Guessing gives 0 on average; the standard error of 64 episodes is 0.125."""
    assert abs(ppo.train(remembering("none", seed)).evaluate(64).returns.mean()) <= 0.5
