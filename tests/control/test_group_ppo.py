"""Group PPO on its own definitions: groups start alike, Ψ by hand, REINFORCE's gradient at the first step, learning."""

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.control import worlds
from upslope.control import environments, group_ppo, learner, networks, normalization, presets, reinforce, rollout
from upslope.control.group_ppo import GroupPPO
from upslope.control.learner import State
from upslope.control.parameters import Net
from upslope.control.reinforce import REINFORCE
from upslope.runs import distributed
from upslope.runs import run as runs
from upslope.runs.run import Run

QUIET = runs.Config(quiet=True)
GROUP, ENVS = 3, 6
assert worlds  # registers Clock-v0


def small(environment_id: str = "CartPole-v1", **changes: object) -> GroupPPO:
    config = GroupPPO(
        environment=environments.Config(environment_id, ENVS, group_size=GROUP),
        run=QUIET,
        total_steps=2000,
        num_epochs=2,
        minibatch_size=64,
    )
    return replace(config, **changes)  # type: ignore[arg-type]


def begun(config: GroupPPO) -> tuple[State, Net, rollout.Rollout, rollout.World]:
    state, net = learner.start(config, Run("group-ppo", config, config.total_steps))
    data, world = learner.collect(net, state, config, group_ppo.BLOCK, config.episodes_per_env)
    return state, net, data, world


def batched(data: rollout.Rollout, config: GroupPPO) -> rollout.Batch:
    return rollout.packed(rollout.flatten(data, group_ppo.estimate(data, config), data.value))


@pytest.fixture
def double() -> Iterator[None]:
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(default)


@pytest.mark.parametrize("episodes", [1, 2])
@pytest.mark.parametrize("mode", ["disabled", "same-step", "next-step"])
def test_a_group_starts_alike_and_no_other_does(mode: str, episodes: int) -> None:
    """The first observations of a group's episodes are bitwise equal; those of any two groups or iterations differ."""
    environment = environments.Config("CartPole-v1", ENVS, "sync", mode, group_size=GROUP)  # type: ignore[arg-type]
    config = small(environment=environment, episodes_per_env=episodes, normalize=normalization.Config(observation=True))
    state, net, data, world = begun(config)
    starts = []
    for iteration in range(3):
        assert isinstance(data.observation, torch.Tensor)
        first = data.observation[:, 0].view(ENVS // GROUP, GROUP, episodes, 4)
        assert torch.equal(first, first[:, :1].expand_as(first))
        assert len(np.unique(data.action[:, :5].numpy(), axis=0)) > 1  # alike at the start alone
        starts += [first[group, 0, episode] for group in range(ENVS // GROUP) for episode in range(episodes)]
        state = learner.advance(state, state.theta, state.optimizer, world)
        if iteration < 2:
            data, world = learner.collect(net, state, config, group_ppo.BLOCK, episodes)
    world.envs.close()
    assert len(torch.stack(starts).unique(dim=0)) == 3 * episodes * ENVS // GROUP


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
@pytest.mark.parametrize("gamma", [0.9, 1.0])
def test_psi_by_hand_in_numpy(scale: str, gamma: float) -> None:
    """From rewards alone, in NumPy float64: R = Σ γ^t r, minus its group's mean, divided by a standard deviation."""
    config = small(scale=scale, gamma=gamma, episodes_per_env=2)
    _, _, data, world = begun(config)
    world.envs.close()
    assert data.valid is not None
    rewards, valid = data.reward.numpy(), data.valid.numpy()
    whole = np.array([sum(gamma**t * r for t, r in enumerate(row[ok])) for row, ok in zip(rewards, valid, strict=True)])
    expected = np.zeros_like(whole)
    for group in range(ENVS // GROUP):
        for episode in range(2):
            members = [(group * GROUP + i) * 2 + episode for i in range(GROUP)]
            spread = {"group": whole[members].std(ddof=1) + 1e-4, "batch": whole.std(ddof=1) + 1e-4, "none": 1.0}
            expected[members] = (whole[members] - whole[members].mean()) / spread[scale]
    psi = group_ppo.estimate(data, config).numpy()
    np.testing.assert_allclose(psi, np.repeat(expected[:, None], psi.shape[1], 1), rtol=1e-4, atol=1e-5)  # float32
    assert np.unique(np.abs(expected)).size > 4


@pytest.mark.parametrize("truncate", [True, False])
def test_a_cut_episode_counts_what_it_collected(truncate: bool) -> None:
    """Clock pays 1 a step for 5 steps: 5, or 1 + γ + … + γ⁴, whether it ended or was cut; nothing is put beyond."""
    environment = environments.Config("Clock-v0", 4, "sync", kwargs={"truncate": truncate}, group_size=2)
    config = small(environment=environment, gamma=0.5, scale="none")
    state, net, data, world = begun(config)
    reward = data.reward.clone()
    reward[0, 4] = 9.0  # the last step of the first episode
    psi = group_ppo.estimate(data._replace(reward=reward), config)
    world.envs.close()
    torch.testing.assert_close(psi[:, 0], torch.tensor([0.25, -0.25, 0.0, 0.0]))  # (9 - 1) γ⁴ / 2
    assert net(state.theta, data.observation[:, -1])[1].abs().min() > 0  # a value that could have been put there


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_equal_returns_teach_nothing(scale: str) -> None:
    """Every Clock lasts as long: Ψ and the gradient are exactly 0."""
    config = small("Clock-v0", scale=scale, entropy_coef=0.0)
    state, net, data, world = begun(config)
    batch = batched(data, config)
    world.envs.close()
    assert not batch.psi.any()
    before = state.theta.clone()
    gradient, _, _ = net.gradient(group_ppo.objective, state.theta, net, batch, config)
    assert not gradient.any()
    theta, _, numbers = group_ppo.update(state, net, batch, config)
    assert torch.equal(theta, before)
    assert numbers["gradient_steps"] == 2


@pytest.mark.parametrize("shared", [False, True])
def test_the_first_gradient_is_reinforces_with_a_group_baseline(shared: bool, double: None) -> None:
    """At π_old the clipped ratio's gradient is Ψ ∇log π, so one full batch asks for what REINFORCE asks for.

    Without division by the spread, without entropy, and with REINFORCE's sum over an episode divided by that of
    episodes where here it is divided by that of transitions.
    """
    network = networks.Config(shared=shared)
    config = small(scale="none", gamma=0.97, entropy_coef=0.0, episodes_per_env=2, network=network)
    state, net, data, world = begun(config)
    batch = batched(data, config)
    mine = net.gradient(group_ppo.objective, state.theta, net, batch, config)[0].clone()
    other = REINFORCE(
        environment=config.environment, network=network, run=QUIET, gamma=0.97, episodes_per_env=2,
        baseline="group", reward_to_go=False,
    )  # fmt: skip
    whole, _, _ = reinforce.estimate(data, state, net, other)
    theirs = net.gradient(reinforce.objective, state.theta, net, whole, other)[0]
    world.envs.close()
    torch.testing.assert_close(mine * len(batch.psi) / len(data.reward), theirs, rtol=1e-10, atol=1e-12)
    assert mine.norm() > 1e-3


def test_the_objective_by_hand_in_numpy(double: None) -> None:
    """min(ρ Ψ, clip(ρ) Ψ) + c2 entropy, recomputed in NumPy from the network's logits; no value in it."""
    config = small(clip_low=0.1, clip_high=0.3, entropy_coef=0.05)
    state, net, data, world = begun(config)
    world.envs.close()
    batch = batched(data, config)
    shaken = state.theta + 0.3 * torch.randn(state.theta.shape, generator=torch.Generator().manual_seed(0))
    total, part = group_ppo.objective(shaken, net, batch, config)
    logits, psi = net(shaken, batch.observation)[0].logits.detach().numpy(), batch.psi.numpy()
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    rho = p[np.arange(len(p)), batch.action.numpy()] / np.exp(batch.logp_old.numpy())
    surrogate = np.minimum(rho * psi, np.clip(rho, 0.9, 1.3) * psi)
    assert (rho < 0.9).any()
    assert (rho > 1.3).any()
    assert total.item() == pytest.approx(surrogate.mean() - 0.05 * (p * np.log(p)).sum(1).mean(), rel=1e-6)
    outside = ((rho < 0.9) | (rho > 1.3)).mean()
    assert group_ppo.diagnose(shaken, net, batch, config)["clip_fraction"] == pytest.approx(outside)
    assert learner.kl(part.logp, batch) == pytest.approx((rho - 1 - np.log(rho)).mean(), rel=1e-6)


@pytest.mark.parametrize("shared", [False, True])
def test_the_critic_is_left_alone(shared: bool) -> None:
    config = small(network=networks.Config(shared=shared), total_steps=1000)
    initial = learner.start(config, Run("group-ppo", config, config.total_steps))[0].theta.clone()
    agent = group_ppo.train(config)
    critic, policy = agent.net.part("critic"), agent.net.part("policy")
    assert torch.equal(agent.theta[critic], initial[critic])
    assert not torch.equal(agent.theta[policy], initial[policy])


def test_minibatches_hold_no_padding() -> None:
    """Short episodes beside long ones are not thinned out: the batch is the steps that count, each once."""
    config = small()
    _, _, data, world = begun(config)
    world.envs.close()
    assert data.valid is not None
    batch = batched(data, config)
    assert batch.valid is None
    assert len(batch.psi) == int(data.valid.sum()) < data.valid.numel()
    assert torch.equal(batch.logp_old, data.logp[data.valid])
    psi = group_ppo.estimate(data, config)
    assert torch.equal(batch.psi, psi[data.valid])


def test_epochs_stop_at_the_kl_target() -> None:
    config = small(num_epochs=50, anneal_learning_rate=False)
    state, net, data, world = begun(config)
    world.envs.close()
    batch, start = batched(data, config), state.theta.clone()
    _, _, free = group_ppo.update(state, net, batch, config)
    state.theta.copy_(start)
    state = state._replace(optimizer=config.optimizer.start(start))
    _, _, bound = group_ppo.update(state, net, batch, replace(config, target_kl=0.002))
    assert bound["gradient_steps"] < free["gradient_steps"]
    assert bound["kl"] < 0.006 < free["kl"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"environment": environments.Config("CartPole-v1", 4)}, "environment.group_size is 1, allowed: 2 or more"),
        ({"episodes_per_env": 0}, "episodes_per_env is 0, allowed: 1 or more"),
        ({"gamma": 1.5}, "gamma is 1.5, allowed: 0 to 1"),
        ({"clip_low": 1.5}, "clip_low is 1.5, allowed: 0 to 1"),
        ({"clip_high": -0.1}, "clip_high is -0.1, allowed: 0 or more"),
        ({"target_kl": 0.0}, "target_kl is 0.0, allowed: above 0"),
    ],
)
def test_settings_out_of_range_are_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        small(**changes)


def test_a_group_cut_in_two_is_refused() -> None:
    with pytest.raises(ValueError, match="num_envs is 6, allowed: multiples of group_size 4"):
        small(environment=environments.Config("CartPole-v1", 6, group_size=4))


def test_several_processes_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    with pytest.raises(ValueError, match="group-ppo runs in one process"):
        group_ppo.train(small())


def test_presets_are_complete() -> None:
    assert all(config.environment.id == name for name, config in presets.GROUP_PPO_PRESETS.items())


@pytest.mark.parametrize("seed", [11, 12, 13])
def test_learns_cartpole(seed: int) -> None:
    """30k of the preset's 100k steps: a policy that does not learn stays near 20."""
    config = replace(presets.GROUP_PPO_PRESETS["CartPole-v1"], total_steps=30_000, run=replace(QUIET, seed=seed))
    assert group_ppo.train(config).evaluate(20).summary()["mean_return"] >= 100
