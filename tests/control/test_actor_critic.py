"""A2C on its definitions: one step along the gradient, both critic fits with κ, targets by hand, learning."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.control import worlds
from upslope.control import actor_critic, critic, environments, learner, networks, normalization, optimizers, rollout
from upslope.control.actor_critic import A2C
from upslope.control.learner import State
from upslope.control.parameters import Net
from upslope.core import advantages, returns
from upslope.runs import run as runs
from upslope.runs.run import Run

QUIET = runs.Config(quiet=True)


def small(environment_id: str = "CartPole-v1", **changes: object) -> A2C:
    config = A2C(environment=environments.Config(environment_id, 4, "sync"), run=QUIET, total_steps=200)
    return replace(config, **changes)  # type: ignore[arg-type]


def first_batch(config: A2C) -> tuple[State, Net, rollout.Rollout, rollout.Batch]:
    state, net = learner.start(config, Run("a2c", config, config.total_steps))
    data, _ = learner.collect(net, state, config, 32)
    discounts, traces = returns.boundaries(data.terminated, data.truncated, config.gamma, config.gae_lambda)
    psi = advantages.gae(data.reward, data.value, data.next_value, discounts, traces)
    state.world.envs.close()
    return state, net, data, rollout.flatten(data, psi, critic.target(data, psi, config.gamma, config.value_target))


def test_the_objective_by_hand_in_numpy() -> None:
    """Ψ log π - c1 (V - target)² + c2 H, the mean over transitions, from the network's outputs."""
    config = small(value_coef=0.7, entropy_coef=0.05)
    state, net, _, batch = first_batch(config)
    shaken = state.theta + 0.3 * torch.randn(state.theta.shape, generator=torch.Generator().manual_seed(0))
    total, _ = actor_critic.objective(shaken, net, batch, config)
    policy, value = net(shaken, batch.observation)
    logits = policy.logits.detach().double().numpy()
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    logp = np.log(p[np.arange(len(p)), batch.action.numpy()])
    error = (value.detach().double().numpy() - batch.value_target.double().numpy()) ** 2
    entropy = -(p * np.log(p)).sum(1)
    expected = (batch.psi.double().numpy() * logp).mean() - 0.7 * error.mean() + 0.05 * entropy.mean()
    assert total.item() == pytest.approx(expected, rel=1e-5)


def test_the_update_is_one_step_of_torchs_rmsprop() -> None:
    config = small(max_grad_norm=None)
    state, net, _, batch = first_batch(config)
    theta = state.theta.clone().requires_grad_()
    torch_optimizer = torch.optim.RMSprop([theta], lr=7e-4, alpha=0.99, eps=1e-5)
    (-actor_critic.objective(theta, net, batch, config)[0]).backward()
    torch_optimizer.step()
    moved, memory, _ = actor_critic.update(state, net, batch, config)
    torch.testing.assert_close(moved, theta.detach(), rtol=1e-4, atol=1e-6)
    assert memory.step == 1


@pytest.mark.parametrize("kind", ["td", "monte-carlo", "lambda"])
def test_targets_by_hand(kind: critic.Target) -> None:
    """γ = ½; the second step terminates, the fourth is cut by a limit, the fifth by the end of the rollout."""
    row = lambda *numbers: torch.tensor([numbers])  # noqa: E731
    reward, value = row(1.0, 2.0, 3.0, 4.0, 5.0), row(1.0, 1.0, 2.0, 2.0, 3.0)
    next_value = row(10.0, 99.0, 20.0, 30.0, 40.0)
    terminated, truncated = row(False, True, False, False, False), row(False, False, False, True, False)
    zero = torch.zeros(1, 5)
    data = rollout.Rollout(zero, zero, zero, value, next_value, reward, terminated, truncated, None)
    expected = {
        "td": [1 + 5.0, 2.0, 3 + 10.0, 4 + 15.0, 5 + 20.0],
        "monte-carlo": [1 + 0.5 * 2, 2.0, 3 + 0.5 * 19, 19.0, 25.0],
        "lambda": [1.5, 2.5, 2.0, 2.0, 3.0],
    }
    found = critic.target(data, torch.tensor([[0.5, 1.5, 0.0, 0.0, 0.0]]), 0.5, kind)
    torch.testing.assert_close(found, torch.tensor([expected[kind]]))


def test_the_k_step_advantage_is_used() -> None:
    """With k = T and λ = 1 both Ψ agree; with k = 1 it is the TD residual, GAE's λ = 0: the runs are the same."""
    one = actor_critic.train(small(k_step=5, gae_lambda=0.3)).theta
    assert torch.equal(one, actor_critic.train(small(k_step=9, gae_lambda=0.3)).theta)  # k is cut at the rollout's end
    torch.testing.assert_close(one, actor_critic.train(small(gae_lambda=1.0)).theta, rtol=1e-3, atol=1e-5)
    single = actor_critic.train(small(k_step=1)).theta
    theirs = actor_critic.train(small(gae_lambda=0.0, value_target="td")).theta
    torch.testing.assert_close(single, theirs, rtol=1e-3, atol=1e-5)
    assert not torch.allclose(one, single, atol=1e-4)


# The critic's own fit, S3 algorithm 8


def fitted(
    kappa: float, epochs: int = 300, rate: float = 3e-3
) -> tuple[State, torch.Tensor, Net, rollout.Batch, float]:
    config = small(
        critic_epochs=epochs, critic_minibatch=1000, kappa=kappa, optimizer=optimizers.Adam(learning_rate=rate),
        max_grad_norm=None, network=networks.Config(hidden=()), value_target="monte-carlo",
    )  # fmt: skip
    state, net, _, batch = first_batch(config)
    before = state.theta.clone()
    shuffle = torch.Generator().manual_seed(0)
    memory, _ = critic.fit(state.theta, state.optimizer, net, batch, config, rate, shuffle)
    assert memory.step == epochs
    return state, before, net, batch


@pytest.mark.parametrize("kappa", [0.3, 3.0])
def test_the_fit_reaches_the_ridge_regression(kappa: float) -> None:
    """A linear critic's argmin mean (V_φ - target)² + κ‖φ - φ_i‖² in closed form, by NumPy's solver in float64."""
    state, before, net, batch = fitted(kappa, epochs=3000, rate=2e-2)
    phi = net.part("critic")
    weights = lambda theta: torch.cat([net.views(theta)[f"critic.value.{n}"].flatten() for n in ("weight", "bias")])  # noqa: E731
    x = np.concatenate([batch.observation.double().numpy(), np.ones((len(batch.psi), 1))], 1)  # type: ignore[union-attr]
    start, y = weights(before).double().numpy(), batch.value_target.double().numpy()
    count = len(y)
    best = np.linalg.solve(x.T @ x / count + kappa * np.eye(5), x.T @ y / count + kappa * start)
    np.testing.assert_allclose(weights(state.theta).numpy(), best, rtol=1e-3, atol=1e-3)
    policy = slice(0, phi.start)
    assert torch.equal(state.theta[policy], before[policy])  # the policy was left alone


def test_kappa_keeps_the_critic_near_the_last_one() -> None:
    distances = []
    for kappa in (0.0, 1.0, 100.0):
        state, before, *_ = fitted(kappa)
        distances.append(float((state.theta - before).norm()))
    assert distances[0] > distances[1] > distances[2] > 0


def test_with_its_own_fit_the_joint_step_moves_the_policy_alone() -> None:
    config = small(critic_epochs=1, max_grad_norm=None)
    state, net, _, batch = first_batch(config)
    gradient = net.gradient(actor_critic.objective, state.theta, net, batch, config)[0].clone()
    assert (gradient[net.part("critic")] == 0).all()
    before = state.theta.clone()
    theta, memory, numbers = actor_critic.update(state, net, batch, config)
    critic_steps = -(-128 // config.critic_minibatch)
    assert numbers["critic_steps"] == critic_steps
    assert memory.step == 1
    assert (theta != before)[net.part("critic")].any()


def test_a_shared_network_has_no_critic_of_its_own_to_fit() -> None:
    with pytest.raises(ValueError, match=r"critic_epochs is 2, but with network.shared the critic has no φ alone"):
        small(critic_epochs=2, network=networks.Config(shared=True))


def test_parts_of_theta_lie_together() -> None:
    for shared in (False, True):
        net = Net(networks.actor_critic(worlds.BOX, worlds.ACTIONS["box"], networks.Config(shared=shared), 0))
        policy, critic_part = net.part("policy"), net.part("critic")
        assert policy.start == 0
        assert policy.stop == critic_part.start
        assert critic_part.stop == net.layout.dimension
    theta = net.bind(net.initial())
    other = theta.clone()
    seen = torch.randn(3, 3)
    torch.testing.assert_close(net.only("policy", theta, seen).mean, net.only("policy", other, seen).mean)
    torch.testing.assert_close(net.only("policy", theta, seen).mean, net(theta, seen)[0].mean)


# Training


@pytest.mark.parametrize("environment_id", [f"dict-{action}-v0" for action in worlds.ACTIONS])
def test_trains_on_every_action_space(environment_id: str) -> None:
    network = networks.Config(hidden=(8,), cnn_features=8)
    normalize = normalization.Config(observation=True, reward=True)
    agent = actor_critic.train(small(environment_id, network=network, normalize=normalize))
    assert agent.theta.isfinite().all()


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_learns_cartpole(seed: int) -> None:
    """A policy that does not learn stays near 20."""
    config = A2C(environment=environments.Config("CartPole-v1", 8), total_steps=25_000)
    agent = actor_critic.train(replace(config, run=replace(QUIET, seed=seed)))
    assert agent.evaluate(20).summary()["mean_return"] >= 60


def test_the_critics_own_fit_learns_too() -> None:
    config = A2C(
        environment=environments.Config("CartPole-v1", 8), total_steps=25_000, rollout_length=32, critic_epochs=5,
        kappa=1e-3, optimizer=optimizers.Adam(learning_rate=3e-3), value_target="monte-carlo", whiten_advantages=True,
    )  # fmt: skip
    agent = actor_critic.train(replace(config, run=QUIET))
    assert agent.evaluate(20).summary()["mean_return"] >= 60


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rollout_length": 0}, r"rollout_length is 0, allowed: 1 or more"),
        ({"k_step": 0}, r"k_step is 0, allowed: 1 or more"),
        ({"kappa": -1.0}, r"kappa is -1.0, allowed: 0 or more"),
        ({"gae_lambda": 1.1}, r"gae_lambda is 1.1, allowed: 0 to 1"),
        ({"critic_epochs": -1}, r"critic_epochs is -1, allowed: 0 or more"),
        ({"max_grad_norm": 0.0}, r"max_grad_norm is 0.0, allowed"),
    ],
)
def test_settings_out_of_range_are_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        small(**changes)  # type: ignore[arg-type]
