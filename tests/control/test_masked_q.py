"""Action masks in Q-networks: illegal actions are neither taken nor counted in a target's maximum."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium import spaces
from scipy import stats

import tests.control.recall  # noqa: F401  # it registers Gates-v0, which fails on an illegal action
from upslope.control import dqn, environments, masks, qnetworks, replay, soft_q
from upslope.control.dqn import DQN
from upslope.control.offpolicy import State
from upslope.control.parameters import Net
from upslope.control.soft_q import SoftQ
from upslope.runs import run as runs

SPACE = spaces.Dict({"x": spaces.Box(-1, 1, (2,)), masks.KEY: spaces.MultiBinary(4)})


def test_illegal_actions_are_never_taken_and_legal_ones_evenly() -> None:
    net = Net(qnetworks.Config(hidden=(8,)).build(SPACE, spaces.Discrete(4), 0))
    theta, count = net.bind(net.initial()), 30_000
    mask = torch.tensor([0, 1, 0, 1]).expand(count, 4)
    observation = {"x": torch.randn(count, 2), masks.KEY: mask}
    every = {"x": observation["x"], masks.KEY: torch.ones_like(mask)}
    q, free = net(theta, observation), net(theta, every)
    assert torch.equal(q[:, [1, 3]], free[:, [1, 3]])
    assert torch.equal(q.max(-1).values, free[:, [1, 3]].max(-1).values)
    uniform, any_action = torch.rand(count, generator=torch.Generator().manual_seed(0)), torch.zeros(count).long()
    act = lambda epsilon: dqn.act(net, theta, observation, None, torch.tensor(epsilon), uniform, any_action)  # noqa: E731
    assert torch.equal(act(0.0), q.argmax(-1))
    taken = torch.bincount(act(1.0), minlength=4)
    assert taken[0] == taken[2] == 0
    assert stats.chisquare(taken[[1, 3]].numpy()).pvalue > 0.001


def _nets() -> tuple[Net, State, replay.Batch]:
    net = Net(qnetworks.Config(hidden=(8,)).build(SPACE, spaces.Discrete(4), 0))
    theta = net.bind(net.initial())
    other = theta + torch.randn(theta.shape, generator=torch.Generator().manual_seed(1))
    nothing: Any = None
    state = State(theta, {"target": other}, {}, nothing, nothing, 0, 0, 0)
    mask = (torch.rand(64, 4, generator=torch.Generator().manual_seed(2)) < 0.5).long()
    mask[:, 2] = 1
    seen = {"x": torch.randn(64, 2), masks.KEY: mask}
    ended = torch.arange(64) % 5 == 0
    batch = replay.Batch(
        seen, torch.full((64,), 2), torch.randn(64), torch.where(ended, 0.0, 0.9), seen, torch.ones(64)
    )
    return net, state, batch


@pytest.mark.parametrize("double", [False, True])
def test_a_target_looks_at_legal_actions_only(double: bool) -> None:
    """r + γ max, or γ Q̄ of the argmax, over the next state's legal actions, by loops over NumPy numbers."""
    net, state, batch = _nets()
    found = dqn.estimate(state, net, batch, [None, None], DQN(double=double))
    free: Any = {**batch.next_observation, masks.KEY: torch.ones(64, 4)}  # type: ignore[dict-item]
    with torch.no_grad():
        online, judged = (net(theta, free).numpy() for theta in (state.theta, state.others["target"]))
    for i, mask in enumerate(batch.next_observation[masks.KEY].numpy()):  # type: ignore[call-overload,index]
        legal = np.flatnonzero(mask)
        best = max(legal, key=lambda a, i=i: (online if double else judged)[i, a])
        expected = float(batch.reward[i]) + float(batch.discount[i]) * judged[i, best]
        assert float(found[i]) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"double": True, "n_step": 3, "priority_exponent": 0.6},
        {"network": qnetworks.Config(hidden=(8,), dueling=True, noisy="factorised")},
        {"replay_capacity": 0},
    ],
    ids=["plain", "double, three steps, priorities", "dueling and noisy", "no replay"],
)
@pytest.mark.parametrize("where", ["observation", "info"])
def test_training_and_evaluation_take_legal_actions_only(changes: dict[str, Any], where: str) -> None:
    source: Any = "none" if where == "observation" else where
    kwargs = {"where": where, "actions": spaces.Discrete(4, start=2)}
    config = DQN(
        environment=environments.Config("Gates-v0", 3, "sync", kwargs=kwargs, action_mask=source),
        network=qnetworks.Config(hidden=(8,)), run=runs.Config(quiet=True), total_steps=240, learning_starts=30,
        batch_size=8, replay_capacity=200, epsilon_end=0.5,
    )  # fmt: skip
    agent = dqn.train(replace(config, **changes))
    assert agent.theta.isfinite().all()
    agent.evaluate(4)


def test_soft_q_learning_takes_legal_actions_only() -> None:
    config = SoftQ(
        environment=environments.Config(
            "Gates-v0", 3, "sync", kwargs={"where": "observation", "actions": spaces.Discrete(4, start=2)}
        ),
        network=qnetworks.Boltzmann(hidden=(8,)), run=runs.Config(quiet=True), total_steps=240, learning_starts=30,
        batch_size=8, replay_capacity=200,
    )  # fmt: skip
    agent = soft_q.train(config)
    assert agent.theta.isfinite().all()
    agent.evaluate(4, deterministic=False)
