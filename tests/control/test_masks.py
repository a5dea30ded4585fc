"""Illegal actions have probability exactly 0; entropy, divergence and gradient are those of the legal ones alone."""

from dataclasses import replace
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces

from tests.control import recall, worlds
from upslope.control import environments, learner, masks, networks, ppo, rollout
from upslope.control.factory import Single
from upslope.control.ppo import PPO
from upslope.runs import run as runs
from upslope.runs.run import Run

QUIET = runs.Config(quiet=True)
SPACES: dict[str, spaces.Space] = {
    "discrete": spaces.Discrete(4, start=2),
    "multidiscrete": spaces.MultiDiscrete([2, 3]),
    "multibinary": spaces.MultiBinary(3),
}


def small(**kwargs: Any) -> PPO:
    """PPO on `Gates`, which fails on an illegal action."""
    return PPO(
        environment=environments.Config("Gates-v0", 3, "sync", kwargs=kwargs),
        network=networks.Config(hidden=(8,)),
        run=QUIET,
        total_steps=120,
        rollout_length=20,
        num_epochs=2,
        minibatch_size=20,
    )


def head(space: spaces.Space, features: int = 5) -> networks.Head:
    torch.manual_seed(0)
    return networks.Head(space, features, networks.Config(orthogonal=False)).double()


def legal(mask: np.ndarray, logits: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities of the legal actions by NumPy, and their places."""
    places = np.flatnonzero(mask)
    p = np.exp(logits[places] - logits[places].max())
    return p / p.sum(), places


def test_a_discrete_policy_over_the_legal_actions() -> None:
    part, other = head(spaces.Discrete(4)), head(spaces.Discrete(4))
    with torch.no_grad():
        other.linear.weight.mul_(-2)
    x = torch.randn(6, 5, dtype=torch.float64)
    mask = torch.tensor([[1, 0, 1, 0], [0, 0, 0, 1], [1, 1, 1, 1], [0, 1, 1, 1], [1, 0, 0, 0], [0, 1, 0, 1]])
    policy, reference = part(x, mask), other(x, mask)
    entropy, kl = policy.entropy().detach().numpy(), policy.kl(reference).detach().numpy()
    chances = policy.log_probs().exp().detach().numpy()
    for i in range(6):
        p, places = legal(mask[i].numpy(), part.linear(x[i]).detach().numpy())
        q, _ = legal(mask[i].numpy(), other.linear(x[i]).detach().numpy())
        assert (chances[i][mask[i].numpy() == 0] == 0).all()
        np.testing.assert_allclose(chances[i][places], p, rtol=1e-12)
        np.testing.assert_allclose(entropy[i], -(p * np.log(p)).sum(), rtol=1e-12, atol=1e-15)
        np.testing.assert_allclose(kl[i], (p * np.log(p / q)).sum(), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", SPACES)
def test_gradients_of_illegal_logits_are_exactly_zero(name: str, dtype: torch.dtype) -> None:
    space = SPACES[name]
    part = head(space).to(dtype)
    count = masks.entries(space)
    mask = torch.tensor([[1, 0, 0, 1], [1, 0, 0, 1, 1], [0, 1, 0]][list(SPACES).index(name)])
    part.linear = torch.nn.Identity()  # type: ignore[assignment]
    output = torch.randn(1, count, dtype=dtype, requires_grad=True)
    policy = part(output, mask.unsqueeze(0))
    action = policy.mode()
    logp, entropy = policy.log_prob_entropy(action)
    for number in (logp, entropy, policy.kl(part(torch.zeros(1, count, dtype=dtype), mask.unsqueeze(0)))):
        (gradient,) = torch.autograd.grad(number.sum(), output, retain_graph=True)
        assert gradient.isfinite().all()
        assert (gradient[0, mask == 0] == 0).all()
    (gradient,) = torch.autograd.grad(entropy.sum(), output)
    assert (gradient[0, mask == 1] != 0).any()


def test_a_floor_of_probabilities_holds_for_legal_actions_alone() -> None:
    part = networks.Head(spaces.Discrete(4), 4, networks.Config(min_probability=0.1))
    part.linear = torch.nn.Identity()  # type: ignore[assignment]
    logits = torch.tensor([[5.0, 0.0, 9.0, -5.0], [0.0, 1.0, 2.0, 3.0]], requires_grad=True)
    policy = part(logits, torch.tensor([[1, 1, 0, 1], [0, 1, 0, 0]]))
    torch.testing.assert_close(policy.log_probs().exp(), torch.tensor([[0.8, 0.1, 0.0, 0.1], [0.0, 1.0, 0.0, 0.0]]))
    assert (policy.log_probs().exp()[[0, 1, 1, 1], [2, 0, 2, 3]] == 0).all()
    (gradient,) = torch.autograd.grad(policy.log_prob(policy.mode()).sum() + policy.entropy().sum(), logits)
    assert gradient.isfinite().all()
    assert (gradient[[0, 1, 1, 1], [2, 0, 2, 3]] == 0).all()


def test_bits_that_may_not_be_set_stay_zero() -> None:
    policy = head(SPACES["multibinary"])(torch.randn(1, 5).double(), torch.tensor([[0, 0, 0]]))
    noise = torch.full((1, 3), 60.0, dtype=torch.float64)
    assert policy.sample(noise).tolist() == policy.mode().tolist() == [[0, 0, 0]]
    assert policy.entropy().item() == policy.log_prob(torch.zeros(1, 3)).item() == 0


@pytest.mark.parametrize("name", SPACES)
@pytest.mark.parametrize("where", ["observation", "info", "method"])
@pytest.mark.parametrize("autoreset", ["disabled", "same-step", "next-step"])
def test_only_legal_actions_are_taken(name: str, where: str, autoreset: str) -> None:
    """`Gates` fails on an illegal action, at the self-check, in training and in evaluation."""
    config = small(where=where, actions=SPACES[name])
    source: Any = "none" if where == "observation" else where
    changed = replace(config.environment, action_mask=source, autoreset=autoreset)
    agent = ppo.train(replace(config, environment=changed))
    assert agent.theta.isfinite().all()
    agent.evaluate(6, deterministic=False)


def test_the_three_sources_are_one() -> None:
    """The same masks from the observation, from `info` and from a method train the same θ, to the bit."""
    thetas = []
    for where in ("observation", "info", "method"):
        config = small(where=where)
        source: Any = "none" if where == "observation" else where
        config = replace(config, environment=replace(config.environment, action_mask=source))
        thetas.append(ppo.train(config).theta)
    assert torch.equal(thetas[0], thetas[1])
    assert torch.equal(thetas[0], thetas[2])


def test_the_first_ratio_is_one_and_the_mask_is_no_feature() -> None:
    config = small()
    state, net = learner.start(config, Run("ppo", config, config.total_steps))
    assert net.module.policy.torso.encoder.size == 3  # type: ignore[union-attr]
    data, _ = learner.collect(net, state, config, 20)
    batch = rollout.flatten(data, data.reward, data.value)
    mask = batch.observation["action_mask"]  # type: ignore[index, call-overload]
    assert (mask.gather(1, batch.action.unsqueeze(1)) == 1).all()
    part = ppo.objective(state.theta, net, batch, config)[1]
    assert ((part.logp - batch.logp_old).exp() - 1).abs().max() <= 1e-5
    assert (part.entropy <= mask.sum(1).log() + 1e-6).all()  # at most log of the number of legal actions
    ones = {**batch.observation, "action_mask": torch.ones_like(mask)}  # type: ignore[dict-item]
    assert not torch.allclose(net(state.theta, ones)[0].entropy(), part.entropy)
    assert torch.equal(net(state.theta, ones)[1], net(state.theta, batch.observation)[1])


def test_taxi_gives_its_mask_in_info() -> None:
    config = PPO(
        environment=environments.Config("Taxi-v4", 2, action_mask="info"),
        run=QUIET,
        total_steps=64,
        rollout_length=32,
        minibatch_size=64,
    )
    agent = ppo.train(config)
    env = Single(config.environment)()
    observation, info = env.reset(seed=3)
    assert (observation["action_mask"] == info["action_mask"]).all()
    seen = {key: np.stack([value]) for key, value in observation.items()}
    assert info["action_mask"][agent.act(seen)[0]] == 1


def test_masks_of_an_agent_hold_whatever_the_noise() -> None:
    agent = ppo.train(small())
    seen = {"joints": np.zeros((4, 3), np.float32), "action_mask": np.eye(4, dtype=np.int8)}
    for seed in range(20):
        noise = networks.Head.noise.fget(agent.net.module.policy.head)((4, 4), torch.Generator().manual_seed(seed))  # type: ignore
        assert agent.act(seen, noise).tolist() == [2, 3, 4, 5]  # start=2


BOX = spaces.Box(-1.0, 1.0, (2,), np.float32)
GOOD = spaces.MultiBinary(4)


@pytest.mark.parametrize(
    ("mask", "actions", "message"),
    [
        (spaces.MultiBinary(3), spaces.Discrete(4), r"it is MultiBinary\(4\)"),
        (spaces.MultiBinary(4), spaces.MultiDiscrete([2, 3]), r"it is MultiBinary\(5\)"),
        (spaces.Box(0.0, 1.0, (4,), np.float32), spaces.Discrete(4), r"Box of integers 0 to 1 of shape \(4,\)"),
        (spaces.Box(0, 3, (4,), np.int8), spaces.Discrete(4), r"Box of integers 0 to 1"),
        (spaces.Discrete(4), spaces.Discrete(4), r"it is MultiBinary\(4\)"),
        (spaces.MultiBinary(2), BOX, r"needs actions of type Discrete, MultiDiscrete or MultiBinary, got Box"),
    ],
)
def test_masks_that_do_not_fit_are_refused(mask: spaces.Space, actions: spaces.Space, message: str) -> None:
    seen = spaces.Dict({"joints": worlds.BOX, "action_mask": mask})
    with pytest.raises(ValueError, match=message):
        networks.actor_critic(seen, actions, networks.Config(), 0)
    gym.register("Unfit-v0", worlds.Spaces, kwargs={"observation_space": seen, "action_space": actions})
    try:
        with pytest.raises(ValueError, match=message):
            environments.make(environments.Config("Unfit-v0", 2, "sync"), 0)
    finally:
        del gym.registry["Unfit-v0"]


@pytest.mark.parametrize("space", [spaces.Box(0, 1, (4,), np.int8), spaces.Box(0, 1, (4,), bool), GOOD])
def test_masks_of_these_types_are_taken(space: spaces.Space) -> None:
    assert masks.masked(spaces.Dict({"joints": worlds.BOX, "action_mask": space}), spaces.Discrete(4))
    assert not masks.masked(worlds.BOX, BOX)


def test_a_mask_alone_is_no_observation() -> None:
    with pytest.raises(ValueError, match="nothing to see besides 'action_mask'"):
        networks.actor_critic(spaces.Dict({"action_mask": GOOD}), spaces.Discrete(4), networks.Config(), 0)


@pytest.mark.parametrize("name", ["discrete", "multidiscrete"])
@pytest.mark.parametrize("step", [0, 3])
def test_a_mask_without_a_legal_action_is_refused(name: str, step: int) -> None:
    """Of MultiDiscrete actions every component needs one."""
    with pytest.raises(
        ValueError, match=rf"without a legal action in environment 0, after {step} steps of its episode 0"
    ):
        ppo.train(small(actions=SPACES[name], empty_at=step))
    envs_mask = np.array([[1, 1, 0, 0, 0], [1, 0, 0, 1, 0]])
    assert masks.without_action(envs_mask, SPACES["multidiscrete"]).tolist() == [True, False]


@pytest.mark.parametrize("autoreset", ["disabled", "same-step", "next-step"])
def test_nothing_need_be_legal_after_the_end(autoreset: str) -> None:
    """A finished game has no legal action: that final observation is acted on by nobody."""
    config = small(last=True)
    changed = replace(config.environment, autoreset=autoreset)  # type: ignore[arg-type]
    assert ppo.train(replace(config, environment=changed)).theta.isfinite().all()


@pytest.mark.parametrize(
    ("source", "message"),
    [("info", r"gave no info\['action_mask'\], only \[\]"), ("method", r"has no method action_masks")],
)
def test_a_source_that_is_not_there_is_said(source: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        environments.make(environments.Config("box-discrete-v0", 2, "sync", action_mask=source), 0)


def test_a_mask_of_the_wrong_length_is_said() -> None:
    env = masks.Masked(recall.Gates("method"), "method")
    env.unwrapped.action_masks = lambda: np.ones(3)  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match=r"mask of shape \(3,\), expected \(4,\)"):
        env.reset(seed=0)


def test_masks_given_as_tuples_are_one_row() -> None:
    """As Gymnasium's own MultiDiscrete masks are."""
    env = masks.Masked(recall.Gates("method", SPACES["multidiscrete"]), "method")
    env.unwrapped.action_masks = lambda: (np.array([0, 1]), np.array([1, 0, 0]))  # type: ignore[attr-defined]
    assert env.reset(seed=0)[0]["action_mask"].tolist() == [0, 1, 1, 0, 0]


@pytest.mark.parametrize("vectorization", ["native", "envpool"])
def test_vectors_of_their_own_take_no_mask_from_elsewhere(vectorization: Any) -> None:
    with pytest.raises(ValueError, match="action_mask 'info' needs vectorization"):
        environments.Config("CartPole-v1", vectorization=vectorization, action_mask="info")
