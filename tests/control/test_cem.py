"""CEM on its definitions: the elite by hand, the closed maximum, a quadratic, CartPole."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.control import worlds  # noqa: F401  # registers the environments
from upslope.control import cem, environments, learner, networks, optimizers, population, presets
from upslope.control.cem import CEM
from upslope.control.parameters import Net
from upslope.runs import run as runs
from upslope.runs.run import Run

QUIET = runs.Config(quiet=True)


def small(env: str = "CartPole-v1", n: int = 5, **changes: Any) -> CEM:
    where = environments.Config(env, n, "sync")
    config = CEM(where, networks.Config(hidden=(8,)), run=QUIET, total_steps=200, elite_fraction=0.4)
    return replace(config, **changes)


def begin(config: CEM) -> tuple[learner.State, Net]:
    remember = lambda net, _: optimizers.State(  # noqa: E731
        0, (config.std * population.searched(net, config.stochastic),)
    )
    return learner.begin(config, Run("cem", config, config.total_steps), remember)


def test_the_elite_by_hand() -> None:
    """Two of five; of three that are equal the first two."""
    best = lambda *fitness: cem.estimate(torch.tensor(fitness), small()).nonzero().flatten().tolist()  # noqa: E731
    assert best(3.0, -1.0, 9.0, 4.0, 2.0) == [2, 3]
    assert best(1.0, 5.0, 5.0, 5.0, 0.0) == [1, 2]
    assert best(-3.0, -1.0, -9.0, -4.0, -2.0) == [1, 4]


def test_the_maximum_by_hand() -> None:
    """Of (1, 4), (3, 4): mean (2, 4), variance (1, 0), to which 0.25 are added."""
    candidates = torch.tensor([[1.0, 4.0], [100.0, 7.0], [3.0, 4.0]])
    mean, std = cem.maximum(candidates, torch.tensor([True, False, True]), 0.25)
    torch.testing.assert_close(mean, torch.tensor([2.0, 4.0]))
    torch.testing.assert_close(std, torch.tensor([1.25, 0.25]).sqrt())


def test_no_other_mean_and_deviation_make_the_elite_likelier() -> None:
    """The gradient of the likelihood is 0 there, and its curvature negative."""
    candidates = torch.randn(9, 1, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    psi = torch.arange(9) % 2 == 0
    at = torch.cat(cem.maximum(candidates, psi, 0.0))
    likelihood = lambda x: torch.distributions.Normal(x[0], x[1]).log_prob(candidates[psi]).sum()  # noqa: E731
    slope = torch.func.grad(likelihood)(at)
    torch.testing.assert_close(slope, torch.zeros(2, dtype=torch.float64), atol=1e-9, rtol=0)
    assert (torch.linalg.eigvalsh(torch.func.hessian(likelihood)(at)) < 0).all()


def test_the_added_noise_fades_linearly() -> None:
    config = small(extra_std=2.0, extra_fraction=0.5)
    assert [cem.extra_variance(p, config) for p in (0.0, 0.25, 0.5, 1.0)] == [4.0, 2.0, 0.0, 0.0]
    assert cem.extra_variance(0.0, replace(config, extra_fraction=0.0)) == 0.0


def test_candidates_have_the_mean_and_the_deviations() -> None:
    """20,000 of them: within 5 standard errors; the critic and the padding stand still."""
    config = small("box-discrete-v0", n=20, std=0.3)
    state, net = begin(config)
    where = population.searched(net, stochastic=False)
    many = replace(config, environment=replace(config.environment, num_envs=20_000))
    candidates = cem.perturb(state, many)
    assert (candidates[:, ~where] == state.theta[~where]).all()
    assert ((candidates.mean(0) - state.theta)[where].abs() < 5 * 0.3 / 20_000**0.5).all()
    assert ((candidates.std(0) - 0.3)[where].abs() < 5 * 0.3 / 40_000**0.5).all()
    state.world.envs.close()


@pytest.mark.parametrize("extra", [0.0, 0.1])
def test_a_quadratic_is_solved_and_the_deviation_shrinks(extra: float) -> None:
    """F = -‖θ - 1‖², in place of episodes: after 100 steps a tenth of the distance and of the deviation are left.

    What is not searched stays.
    """
    config = small(
        "box-box-v0", 200, network=networks.Config(hidden=()), elite_fraction=0.25, std=1.0, extra_std=extra,
        total_steps=100,
    )  # fmt: skip
    state, net = begin(config)
    where = population.searched(net, stochastic=False)
    before, goal = state.theta.clone(), torch.where(where, 1.0, 0.0)
    widths, distances = [], []
    for step in range(100):
        candidates = cem.perturb(state, config)
        psi = cem.estimate(-(candidates - goal)[:, where].square().sum(1), config)
        theta, memory, numbers = cem.update(state, net, candidates, psi, config)
        widths.append(numbers["std"])
        distances.append(float((theta - goal)[where].abs().mean()))
        state = state._replace(theta=theta, optimizer=memory, iteration=step + 1, step=step + 1)
    assert distances[-1] < 0.1 * distances[0]
    assert widths[-1] < 0.1 * 1.0
    assert torch.equal(state.theta[~where], before[~where])
    assert (state.optimizer.memory[0][~where] == 0).all()
    state.world.envs.close()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"std": 0.0}, "std is 0.0, allowed: above 0"),
        ({"extra_std": -1.0}, "extra_std is -1.0, allowed: 0 or more"),
        ({"extra_fraction": 1.5}, "extra_fraction is 1.5, allowed: 0 to 1"),
        ({"elite_fraction": 1.5}, "elite_fraction is 1.5, allowed: 0 to 1"),
        ({"elite_fraction": 0.2}, "elite_fraction is 0.2, of environment.num_envs 5, allowed: two candidates or more"),
        ({"network": networks.Config(memory="gru")}, "network.memory is 'gru', allowed with cem: 'none'"),
    ],
)
def test_what_cannot_work_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        small(**changes)


def test_ranks_of_torchrun_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("upslope.runs.distributed.world_size", lambda: 2)
    with pytest.raises(ValueError, match="cem runs in one process, got 2 ranks"):
        cem.train(small())


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2])
def test_cartpole(seed: int) -> None:
    config = presets.cem("CartPole-v1")
    assert config is not None
    agent = cem.train(replace(config, run=runs.Config(seed=seed, quiet=True)))
    assert agent.evaluate(20).returns.mean() > 400
