"""ES on its definitions: the gradient of linear and quadratic functions, ranks, candidates at once, CartPole."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats

from tests.control import worlds  # noqa: F401  # registers the environments
from upslope.control import environments, es, learner, networks, normalization, optimizers, population, presets, rollout
from upslope.control.es import ES
from upslope.control.networks import to_tensors
from upslope.control.parameters import Net
from upslope.runs import run as runs
from upslope.runs.randomness import generator
from upslope.runs.run import Run

QUIET = runs.Config(quiet=True)


def small(env: str = "CartPole-v1", n: int = 4, **changes: Any) -> ES:
    where = environments.Config(env, n, "sync")
    return replace(ES(where, networks.Config(hidden=(8,)), run=QUIET, total_steps=200), **changes)


def begin(config: ES) -> tuple[learner.State, Net]:
    return learner.start(config, Run("es", config, config.total_steps))


# The gradient


def test_a_linear_function_has_its_gradient_exactly() -> None:
    """F = c·θ over d orthogonal directions of length √d and their opposites: g = c."""
    d, config = 6, small(sigma=0.3)
    random = generator(1, "test")
    basis = torch.linalg.qr(torch.randn(d, d, generator=random, dtype=torch.float64)).Q * np.sqrt(d)
    c, theta = torch.randn(2, d, generator=random, dtype=torch.float64)
    noise = population.mirrored(basis)
    found = es.gradient(theta, noise, (theta + 0.3 * noise) @ c, config)
    torch.testing.assert_close(found, c)


@pytest.mark.parametrize("mirror", [True, False])
def test_the_mean_gradient_of_a_quadratic_is_the_smoothed_ones(mirror: bool) -> None:
    """F = -½ θᵀAθ + b·θ: ∇E F(θ + σε) = b - Aθ. 40,000 pairs; 4.5 standard errors are too many."""
    d, sigma, n = 4, 0.5, 80_000
    random = generator(2, "test")
    root = torch.randn(d, d, generator=random, dtype=torch.float64)
    a, (b, theta) = root @ root.T, torch.randn(2, d, generator=random, dtype=torch.float64)
    half = torch.randn(n // 2 if mirror else n, d, generator=random, dtype=torch.float64)
    noise = population.mirrored(half) if mirror else half
    x = theta + sigma * noise
    fitness = -0.5 * ((x @ a) * x).sum(1) + x @ b
    each = fitness[:, None] * noise / sigma
    if mirror:
        each = each.view(-1, 2, d).mean(1)
    error = each.std(0) / np.sqrt(len(each))
    found = es.gradient(theta, noise, fitness, small(sigma=sigma))
    assert ((found - (b - a @ theta)).abs() < 4.5 * error).all()
    assert error.max() < 0.05 * (b - a @ theta).norm()  # so that a wrong factor would be seen


def test_it_is_the_score_of_the_candidates_weighed_by_psi_less_the_decay() -> None:
    config = small(sigma=0.2, weight_decay=0.5)
    theta = torch.randn(3, generator=generator(3, "test"), dtype=torch.float64)
    noise = torch.randn(5, 3, generator=generator(4, "test"), dtype=torch.float64)
    psi, leaf = torch.tensor([0.5, -0.5, 1.0, 0.0, 2.0], dtype=torch.float64), theta.clone().requires_grad_()
    log_prob = torch.distributions.Normal(leaf, 0.2).log_prob(theta + 0.2 * noise).sum(1)
    ((psi * log_prob).mean() - 0.5 / 2 * leaf.square().sum()).backward()
    torch.testing.assert_close(es.gradient(theta, noise, psi, config), leaf.grad)


# Ψ


def test_ranks_are_those_of_scipy_and_sum_to_0() -> None:
    fitness = np.random.default_rng(0).integers(0, 9, 30).astype(float)  # with ties
    expected = (stats.rankdata(fitness) - 1) / 29 - 0.5
    found = population.centred_ranks(torch.from_numpy(fitness))
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-15)
    assert abs(float(found.sum())) < 1e-12


@pytest.mark.parametrize("change", [lambda f: 3 * f + 7, torch.exp, lambda f: f**3, lambda f: torch.atan(f / 9)])
def test_a_monotone_transform_of_the_fitness_changes_nothing(change: Any) -> None:
    fitness = torch.from_numpy(np.random.default_rng(1).normal(0, 3, 16).round(1))
    config = small(n=16)
    assert torch.equal(es.estimate(change(fitness), config), es.estimate(fitness, config))
    plain = replace(config, shaping="none")
    assert not torch.equal(es.estimate(change(fitness), plain), es.estimate(fitness, plain))


def test_standardised_fitness_has_mean_0_and_deviation_1() -> None:
    psi = es.estimate(torch.tensor([1.0, 2.0, 6.0, 11.0], dtype=torch.float64), small(shaping="standardised"))
    assert float(psi.mean()) == pytest.approx(0.0, abs=1e-12)
    assert float(psi.std()) == pytest.approx(1.0)
    assert (es.estimate(torch.full((4,), 3.0), small(shaping="standardised")) == 0).all()


# Candidates


@pytest.mark.parametrize(
    "env", ["box-discrete-v0", "box-box-v0", "dict-multidiscrete-v0", "image-multibinary-v0", "multidiscrete-box-v0"]
)
@pytest.mark.parametrize("stochastic", [False, True])
def test_candidates_act_at_once_as_one_by_one(env: str, stochastic: bool) -> None:
    config = small(env, stochastic=stochastic, sigma=0.5, network=networks.Config(hidden=(8,), cnn_features=8))
    state, net = begin(config)
    candidates, _ = es.perturb(state, net, config)
    seen = to_tensors(state.world.observation)
    noise = rollout.noise(net, 4, 8, generator(1, "noise"))(0) if stochastic else None
    found = population.act(net, candidates, seen, noise)
    for i, theta in enumerate(candidates):
        row = {k: v[i : i + 1] for k, v in seen.items()} if isinstance(seen, dict) else seen[i : i + 1]
        policy = net(theta, row)[0]
        alone = policy.mode() if noise is None else policy.sample(noise[i : i + 1])
        torch.testing.assert_close(found[i : i + 1], alone)
    state.world.envs.close()


@pytest.mark.parametrize("stochastic", [False, True])
def test_only_what_acts_is_perturbed_and_moved(stochastic: bool) -> None:
    """In opposite pairs; not the critic, not the padding, and not the noise of a policy that acts by its mode."""
    config = small("box-box-v0", stochastic=stochastic, weight_decay=0.1)
    state, net = begin(config)
    candidates, noise = es.perturb(state, net, config)
    assert torch.equal(noise[0::2], -noise[1::2])
    torch.testing.assert_close(candidates, state.theta + 0.1 * noise)
    names = {"policy.torso.layers.layers.0.weight", "policy.torso.layers.layers.0.bias"}
    names |= {"policy.head.linear.weight", "policy.head.linear.bias"} | (
        {"policy.head.log_std"} if stochastic else set()
    )
    before, psi = state.theta.clone(), torch.tensor([0.5, -0.5, 0.2, -0.2])
    theta, _, _ = es.update(state, net, noise, psi, config)
    for moved in (noise[0], theta - before):
        views = net.views(moved)
        assert {name for name, view in views.items() if bool((view != 0).all())} == names
        assert int((moved != 0).sum()) == sum(views[name].numel() for name in names)
    state.world.envs.close()


@pytest.mark.parametrize("mode", ["disabled", "same-step", "next-step"])
def test_fitness_is_the_mean_return_of_each_candidates_own_episodes(mode: Any) -> None:
    """Beside a loop that plays each candidate alone, with the same seeds; the world counts what was stepped."""
    where = environments.Config("CartPole-v1", 8, "sync", mode)
    config = small(environment=where, episodes_per_candidate=2, sigma=1.0)
    state, net = begin(config)
    candidates, _ = es.perturb(state, net, config)
    fitness, world = population.play(net, candidates, state, config)
    lengths = []
    for i, theta in enumerate(candidates):
        alone, raw = environments.make(replace(where, num_envs=1), config.run.seed, first_index=i)
        returns, total = [], 0.0
        while len(returns) < 2:
            action = net(theta, to_tensors(raw))[0].mode()
            step = alone.step(action.numpy())
            total, raw = total + float(step.reward[0]), step.observation
            if step.ended[0]:
                returns.append(total)
                total = 0.0
        alone.close()
        assert float(fitness[i]) == pytest.approx(sum(returns) / 2)
        lengths.append(int(sum(returns)))
    longest = max(lengths)
    assert longest > 2 * min(lengths)  # so that some candidates began and ended episodes that do not count
    assert world.episodes == 16
    if mode == "next-step":  # reset rows are none
        assert longest < world.steps <= 8 * (longest + 1)
    else:
        assert world.steps == 8 * longest
    np.testing.assert_allclose(world.recent[:, 0].sum() / 2, float(fitness.sum()))
    state.world.envs.close()


def test_common_random_numbers_make_equal_candidates_equally_fit() -> None:
    found = {}
    for group in (1, 4):
        config = small(environment=environments.Config("CartPole-v1", 4, "sync", group_size=group))
        state, net = begin(config)
        same = state.theta.repeat(4, 1)
        first, world = population.play(net, same, state, config)
        second, _ = population.play(net, same, state._replace(world=world), config)
        found[group] = [set(first.tolist()), set(second.tolist())]
        state.world.envs.close()
    assert [len(values) for values in found[4]] == [1, 1]
    assert max(len(values) for values in found[1]) > 1


def test_observation_statistics_are_of_all_steps_and_frozen_while_playing() -> None:
    config = small("Clock-v0", normalize=normalization.Config(observation=True), episodes_per_candidate=2)
    state, net = begin(config)
    candidates, _ = es.perturb(state, net, config)
    _, world = population.play(net, candidates, state, config)
    moments = world.normalizer.observation[""]
    assert float(moments.number) == world.steps == 40
    assert float(moments.mean[0]) == pytest.approx(2.0)  # 0, 1, 2, 3, 4
    state.world.envs.close()


# Settings


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sigma": 0.0}, "sigma is 0.0, allowed: above 0"),
        ({"weight_decay": -1.0}, "weight_decay is -1.0, allowed: 0 or more"),
        ({"episodes_per_candidate": 0}, "episodes_per_candidate is 0, allowed: 1 or more"),
        ({"environment": environments.Config(num_envs=5)}, "num_envs is 5, allowed: even"),
        ({"environment": environments.Config(num_envs=1)}, "num_envs is 1, allowed: 2 or more"),
        ({"normalize": normalization.Config(reward=True)}, "normalize.reward is True, allowed with es: False"),
        ({"normalize": normalization.Config(reward_sign=True)}, "normalize.reward_sign is True"),
        ({"network": networks.Config(memory="gru")}, "network.memory is 'gru', allowed with es: 'none'"),
    ],
)
def test_what_cannot_work_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        small(**changes)


def test_ranks_of_torchrun_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("upslope.runs.distributed.world_size", lambda: 2)
    with pytest.raises(ValueError, match="es runs in one process, got 2 ranks"):
        es.train(small())


# Learning


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2])
def test_cartpole(seed: int) -> None:
    config = presets.es("CartPole-v1")
    assert config is not None
    agent = es.train(replace(config, run=runs.Config(seed=seed, quiet=True)))
    assert agent.evaluate(20).returns.mean() > 300


def test_it_climbs_a_known_function() -> None:
    """With F = -‖θ - c‖² of the policy's part in place of episodes, 200 steps come within 0.3 of c per element."""
    config = small("box-box-v0", n=64, sigma=0.1, optimizer=optimizers.Adam(learning_rate=0.05))
    state, net = begin(config)
    where = population.searched(net, stochastic=False)
    goal = torch.where(where, 1.0, 0.0)
    for _ in range(200):
        candidates, noise = es.perturb(state, net, config)
        psi = es.estimate(-(candidates - goal)[:, where].square().sum(1), config)
        theta, optimizer, _ = es.update(state, net, noise, psi, config)
        state = learner.advance(state, theta, optimizer, state.world)
    assert float((state.theta - goal)[where].abs().mean()) < 0.3
    state.world.envs.close()
