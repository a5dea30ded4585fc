"""REINFORCE on its definitions: whole episodes, every baseline by hand, the exact gradient, the short corridor."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.control import worlds
from upslope.control import environments, learner, monte_carlo, networks, normalization, optimizers, reinforce, rollout
from upslope.control.learner import State
from upslope.control.parameters import Net
from upslope.control.reinforce import REINFORCE
from upslope.runs import run as runs
from upslope.runs.run import Run

QUIET = runs.Config(quiet=True)
CORRIDOR = "upslope.exact.registration:upslope/ShortCorridor-v0"


def small(environment: environments.Config, **changes: object) -> REINFORCE:
    config = REINFORCE(environment=environment, run=QUIET, total_steps=200, network=networks.Config(hidden=(8,)))
    return replace(config, **changes)  # type: ignore[arg-type]


def begin(config: REINFORCE) -> tuple[State, Net]:
    return learner.start(config, Run("reinforce", config, config.total_steps))


# Whole episodes


MODES = ["disabled", "same-step", "next-step"]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("truncate", [False, True])
def test_rows_are_whole_episodes_from_their_first_step(mode: str, truncate: bool) -> None:
    """Clock's observation counts the steps: every row is 0, 1, 2, 3, 4, whatever the reset mode."""
    environment = environments.Config("Clock-v0", 3, "sync", mode, kwargs={"truncate": truncate})  # type: ignore
    config = small(environment)
    state, net = begin(config)
    data, world = learner.collect(net, state, config, 2, episodes=2)  # noise blocks shorter than the episodes
    assert data.reward.shape == (6, 5)
    assert data.valid is not None
    assert data.valid.all()
    assert isinstance(data.observation, torch.Tensor)
    assert (data.observation[..., 0] == torch.arange(5.0)).all()
    assert (data.terminated if not truncate else data.truncated)[:, -1].all()
    assert not data.terminated[:, :-1].any()
    assert world.steps == 30
    assert world.episodes == 6
    assert world.envs.episode.tolist() == [world.envs.episode[0]] * 3
    assert (world.episode_length == 0).all()
    state.world.envs.close()


def test_episodes_begin_alike_in_every_mode() -> None:
    """The k-th episode of an environment has one reset seed, and each collection begins new ones."""
    found = []
    for mode in MODES:
        config = small(environments.Config("Clock-v0", 2, "sync", mode))  # type: ignore[arg-type]
        state, net = begin(config)
        for _ in range(2):
            data, world = learner.collect(net, state, config, 16, episodes=3)
            found.append(data.observation[:, 0])  # type: ignore[index]
            state = learner.advance(state, state.theta, state.optimizer, world)
        state.world.envs.close()
    assert torch.equal(found[0], found[2])
    assert torch.equal(found[0], found[4])
    assert torch.equal(found[1], found[3])
    assert torch.equal(found[1], found[5])
    assert len(torch.cat(found[:2]).unique(dim=0)) == 12


def test_every_environment_plays_its_share_and_fillers_count_nowhere() -> None:
    """With as many rows as episodes, the lengths are those of a single environment's own episodes."""
    config = small(environments.Config("CartPole-v1", 4, "sync"))
    state, net = begin(config)
    data, _ = learner.collect(net, state, config, 32, episodes=2)
    assert data.valid is not None
    lengths = data.valid.sum(1)
    assert lengths.min() < lengths.max() == data.valid.shape[1]
    assert (data.reward.sum(1) == lengths).all()  # CartPole pays 1 a step; fillers pay nothing
    ends = (data.terminated | data.truncated).nonzero()
    assert ends[:, 0].tolist() == list(range(8))
    assert (ends[:, 1] + 1 == lengths).all()
    shaken = data._replace(observation=data.observation.masked_fill(~data.valid[..., None], 7.0))  # type: ignore
    gradients = []
    for rows in (data, shaken):
        batch = rollout.flatten(rows, torch.ones_like(data.reward), data.reward)
        gradients.append(net.gradient(reinforce.objective, state.theta, net, batch, config)[0].clone())
    torch.testing.assert_close(*gradients, rtol=0, atol=0)
    state.world.envs.close()


def test_members_of_a_group_share_their_episodes_seeds() -> None:
    config = small(environments.Config("CartPole-v1", 4, group_size=2))
    state, net = begin(config)
    first = []
    for _ in range(3):
        data, world = learner.collect(net, state, config, 32, episodes=1)
        start = data.observation[:, 0]
        assert torch.equal(start[0], start[1])
        assert torch.equal(start[2], start[3])
        assert not torch.equal(start[0], start[2])
        first.append(start[0])
        state = learner.advance(state, state.theta, state.optimizer, world)
    assert not torch.equal(first[0], first[1])
    assert not torch.equal(first[1], first[2])
    state.world.envs.close()


# Ψ


def episodes() -> rollout.Rollout:
    """Three episodes of 3, 2 and 1 steps, the last cut by a limit."""
    valid = torch.tensor([[True, True, True], [True, True, False], [True, False, False]])
    value = torch.tensor([[0.5, 0.25, 1.0], [2.0, -1.0, 0.0], [4.0, 0.0, 0.0]])
    terminated = torch.tensor([[False, False, True], [False, True, False], [False, False, False]])
    truncated = torch.tensor([[False] * 3, [False] * 3, [True, False, False]])
    reward = torch.tensor([[1.0, 2.0, 4.0], [0.0, 8.0, 0.0], [6.0, 0.0, 0.0]])
    zero = torch.zeros(3, 3)
    return rollout.Rollout(
        torch.zeros(3, 3, 4), zero.long(), zero, value, torch.full((3, 3), 10.0), reward, terminated, truncated, valid
    )


def to_go(bootstrap: float) -> np.ndarray:
    """γ = ½ by hand."""
    return np.array([[3.0, 4.0, 4.0], [4.0, 8.0, 0.0], [6.0 + 0.5 * bootstrap, 0.0, 0.0]])


BY_HAND = {
    "none": np.zeros((3, 1)),
    "constant": np.full((3, 1), 13 / 3),
    "time-dependent": np.array([[13 / 3, 6.0, 4.0]] * 3),
    "leave-one-out": np.array([[5.0], [4.5], [3.5]]),
    "group": np.full((3, 1), 13 / 3),
    "moving-average": np.full((3, 1), 2.0),
}


@pytest.mark.parametrize("baseline", BY_HAND)
def test_baselines_by_hand(baseline: monte_carlo.Baseline) -> None:
    data = episodes()
    config = small(environments.Config("CartPole-v1", 3, group_size=3), gamma=0.5)
    state, net = begin(config)
    state = state._replace(remembered={"mean": 2.0, "weight": 0.5})
    returns = torch.tensor(to_go(0.0), dtype=torch.float32)
    assert (monte_carlo.beyond(data, baseline) == 0).all()
    found = monte_carlo.estimate(baseline, returns, data, state, net, 3, 0.9)
    expected = torch.tensor(BY_HAND[baseline], dtype=torch.float32)
    torch.testing.assert_close(torch.as_tensor(found.baseline).expand_as(expected), expected)
    if baseline == "moving-average":  # weight 0.9·0.5 + 0.1; the mean moves by 0.1/weight of the way
        weight = 0.9 * 0.5 + 0.1
        assert found.remembered == pytest.approx({"weight": weight, "mean": 2 + 0.1 / weight * (13 / 3 - 2)})
    state.world.envs.close()


def test_the_value_stands_for_what_a_limit_cut_off() -> None:
    data = episodes()
    assert (monte_carlo.beyond(data, "value") == 10.0).all()
    config = small(environments.Config("CartPole-v1", 3), gamma=0.5)
    state, net = begin(config)
    found = monte_carlo.estimate("value", torch.tensor(to_go(10.0)), data, state, net, 1, 0.9)
    assert found.baseline is data.value
    state.world.envs.close()


@pytest.mark.parametrize("per_parameter", [False, True])
def test_the_minimum_variance_baseline_from_single_gradients(per_parameter: bool) -> None:
    """b = Σ‖g_i‖²R_i / Σ‖g_i‖² with g_i from one backward pass per episode."""
    name = "minimum-variance-per-parameter" if per_parameter else "minimum-variance"
    config = small(environments.Config("CartPole-v1", 4), baseline=name)
    state, net = begin(config)
    data, _ = learner.collect(net, state, config, 16, episodes=1)
    assert data.valid is not None
    returns = data.reward.flip(1).cumsum(1).flip(1)
    whole, scores = returns[:, 0], []
    for row in range(4):
        kept = data.valid[row]
        theta = state.theta.clone().requires_grad_()
        policy, _ = net(theta, data.observation[row][kept])  # type: ignore[index]
        (score,) = torch.autograd.grad(policy.log_prob(data.action[row][kept]).sum(), theta)
        scores.append(score)
    g = torch.stack(scores).double()
    found = monte_carlo.estimate(name, returns, data, state, net, 1, 0.9)  # type: ignore[arg-type]
    if per_parameter:
        top, bottom = (g.square() * whole[:, None]).sum(0), g.square().sum(0)
        b = torch.where(bottom > 0, top / bottom, 0.0)
        torch.testing.assert_close(found.offset.double(), b * g.mean(0), rtol=1e-3, atol=1e-4)  # type: ignore
        assert found.baseline == 0
    else:
        weights = g.square().sum(1)
        assert found.baseline == pytest.approx(float((weights * whole).sum() / weights.sum()), rel=1e-4)
        assert found.offset is None
    state.world.envs.close()


@pytest.mark.parametrize(
    ("baseline", "discount_gradient"), [("none", True), ("none", False), ("leave-one-out", True), ("value", True)]
)
def test_the_mean_gradient_is_the_exact_one(baseline: monte_carlo.Baseline, discount_gradient: bool) -> None:
    """On the short corridor, γ = 0.7: with γ^t the estimate's mean is ∇J of the discounted objective; without it, not.

    1,280 episodes; the distance of the mean is compared with its standard error, 4.5 of them being too many.
    """
    gamma, p = 0.7, 0.4  # the probability of going right
    config = REINFORCE(
        environment=environments.Config(CORRIDOR, 8), network=networks.Config(hidden=()), run=QUIET, gamma=gamma,
        baseline=baseline, discount_gradient=discount_gradient, value_coef=0.0, optimizer=optimizers.SGD(1e-9),
        episodes_per_env=2,
    )  # fmt: skip
    state, net = begin(config)
    logits = torch.tensor([np.log(1 - p), np.log(p)], dtype=torch.float32)
    views = net.views(state.theta)
    views["policy.head.linear.weight"].zero_()
    views["policy.head.linear.bias"].copy_(logits)
    bias = next(s for s in net.layout.segments if s.name == "policy.head.linear.bias").start
    found = []
    for _ in range(80):
        data, world = learner.collect(net, state, config, 16, episodes=2)
        batch, offset, remembered = reinforce.estimate(data, state, net, config)
        gradient = net.gradient(reinforce.objective, state.theta, net, batch, config)[0]
        assert offset is None
        found.append(gradient[bias : bias + 2].double().numpy().copy())
        state = learner.advance(state, state.theta, state.optimizer, world, remembered)
    state.world.envs.close()
    mean, error = np.mean(found, 0), np.std(found, 0) / np.sqrt(len(found))
    exact = corridor_gradient(gamma, p)
    distance = np.abs(mean - exact) / error
    if discount_gradient:
        assert (distance < 4.5).all()
    else:
        assert (distance > 4.5).any()


def corridor_gradient(gamma: float, p: float, epsilon: float = 1e-5) -> np.ndarray:
    """∂J/∂logits by central differences of the discounted value, from the linear equations written out."""

    def value(left: float, right: float) -> float:
        q = np.exp(right) / (np.exp(left) + np.exp(right))
        move = np.array([[1 - q, q, 0.0], [q, 0.0, 1 - q], [0.0, 1 - q, 0.0]])  # the middle state is reversed
        return float(np.linalg.solve(np.eye(3) - gamma * move, -np.ones(3))[0])

    left, right = np.log(1 - p), np.log(p)
    return np.array(
        [
            (value(left + epsilon, right) - value(left - epsilon, right)) / (2 * epsilon),
            (value(left, right + epsilon) - value(left, right - epsilon)) / (2 * epsilon),
        ]
    )


# Learning


@pytest.mark.slow
@pytest.mark.parametrize(
    ("alpha", "alpha_w", "early", "late"), [(2**-12, 0.0, -15.0, -11.7), (2**-9, 2**-6, -11.8, -12.0)]
)
def test_figures_13_1_and_13_2_of_the_book(alpha: float, alpha_w: float, early: float, late: float) -> None:
    """Mean return near episode 200 and over the last 100 of 1,000, REFERENCE_RESULTS section 3, from θ = (1.47, -1.47).

    The observation is the constant 1, so weight and bias move alike and the step size is half the book's.
    """
    curves = np.array([corridor(alpha, alpha_w, seed) for seed in range(12)])
    for figure, place in ((early, slice(180, 220)), (late, slice(-100, None))):
        means = curves[:, place].mean(1)
        assert abs(means.mean() - figure) < 4 * means.std(ddof=1) / np.sqrt(len(means)) + 0.3


def corridor(alpha: float, alpha_w: float, seed: int, episodes: int = 1000) -> np.ndarray:
    """Returns of the episodes of one run."""
    rate = alpha / 2
    config = REINFORCE(
        environment=environments.Config(CORRIDOR, 1), network=networks.Config(hidden=(), min_probability=0.05),
        optimizer=optimizers.SGD(learning_rate=rate), run=runs.Config(seed=seed, quiet=True), gamma=1.0,
        baseline="value" if alpha_w else "none", value_coef=alpha_w / (4 * rate),
    )  # fmt: skip
    state, net = begin(config)
    views = net.views(theta := torch.zeros_like(state.theta))
    views["policy.head.linear.bias"].copy_(torch.tensor([1.47, -1.47]))
    state.world.envs.close()
    steps = Steps("reinforce", replace(config, total_steps=10**7), 10**7)
    with pytest.raises(EnoughError):
        reinforce.train(replace(config, total_steps=10**7), steps, theta)
    return -np.diff([0, *steps.seen])


class EnoughError(Exception):
    """The thousandth episode is over."""


class Steps(Run):
    """A run that notes the step count after every episode and stops after the thousandth."""

    def __init__(self, *arguments: object) -> None:
        super().__init__(*arguments)  # type: ignore[arg-type]
        self.seen: list[int] = []

    def record(self, step: int, numbers: object) -> None:
        self.seen.append(step)
        if len(self.seen) == 1000:
            raise EnoughError


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_learns_cartpole(seed: int) -> None:
    """A policy that does not learn stays near 20."""
    config = REINFORCE(environment=environments.Config("CartPole-v1", 8), total_steps=40_000)
    agent = reinforce.train(replace(config, run=replace(QUIET, seed=seed)))
    assert agent.evaluate(20).summary()["mean_return"] >= 100


@pytest.mark.parametrize("environment_id", [f"dict-{action}-v0" for action in worlds.ACTIONS])
def test_trains_on_every_action_space(environment_id: str) -> None:
    network = networks.Config(hidden=(8,), cnn_features=8)
    for baseline in ("minimum-variance-per-parameter", "value"):
        config = small(environments.Config(environment_id, 2), network=network, baseline=baseline)
        agent = reinforce.train(replace(config, normalize=normalization.Config(observation=True, reward=True)))
        assert agent.theta.isfinite().all()


def test_a_floor_under_probabilities_keeps_the_softmax_gradient() -> None:
    """p = (0.01, 0.99) becomes (0.05, 0.95); the score of action a is e_a - p at the new p, not 0."""
    logits = torch.tensor([np.log(0.01), np.log(0.99)], dtype=torch.float64, requires_grad=True)
    policy = networks.distributions.Categorical(networks.floored(logits, 0.05))
    policy.log_prob(torch.tensor(0)).backward()
    torch.testing.assert_close(policy.log_probs().exp(), torch.tensor([0.05, 0.95], dtype=torch.float64))
    torch.testing.assert_close(logits.grad, torch.tensor([0.95, -0.95], dtype=torch.float64))
    three = networks.floored(torch.tensor([0.7, 0.2, 0.1]).log(), 0.15).softmax(-1)  # 0.85 shared as 7:2
    torch.testing.assert_close(three, torch.tensor([0.85 * 7 / 9, 0.85 * 2 / 9, 0.15]))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"episodes_per_env": 0}, r"episodes_per_env is 0, allowed: 1 or more"),
        ({"gamma": 1.5}, r"gamma is 1.5, allowed: 0 to 1"),
        ({"baseline_decay": 1.0}, r"baseline_decay is 1.0, allowed: 0 to below 1"),
        ({"value_coef": -1.0}, r"value_coef is -1.0, allowed"),
        ({"baseline": "constant"}, r"'constant' needs two episodes an iteration: num_envs is 1, episodes_per_env 1"),
        ({"baseline": "group"}, r"environment.group_size is 1, allowed: 2 or more"),
    ],
)
def test_settings_out_of_range_are_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        small(environments.Config("CartPole-v1", 1), **changes)


def test_groups_are_refused_where_they_cannot_be() -> None:
    with pytest.raises(ValueError, match=r"num_envs is 5, allowed: multiples of group_size 2"):
        environments.Config("CartPole-v1", 5, group_size=2)
    with pytest.raises(ValueError, match=r"group_size 2 needs vectorization"):
        environments.Config("CartPole-v1", 4, "native", group_size=2)
    config = small(environments.Config("CartPole-v1", 1), network=networks.Config(min_probability=0.6))
    with pytest.raises(ValueError, match=r"network.min_probability is 0.6, allowed: at most 1/2"):
        reinforce.train(config)
