"""Every algorithm, broken off after any iteration and resumed, ends as the uninterrupted run: bit for bit."""

import importlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from upslope import cli
from upslope.control import action_noise, actors, environments, networks, normalization, penalty, qnetworks
from upslope.control.acktr import ACKTR
from upslope.control.actor_critic import A2C
from upslope.control.cem import CEM
from upslope.control.ddpg import DDPG
from upslope.control.es import ES
from upslope.control.group_ppo import GroupPPO
from upslope.control.kfac import KFAC
from upslope.control.ppo import PPO
from upslope.control.reinforce import REINFORCE
from upslope.control.sac import SAC
from upslope.control.soft_q import SoftQ
from upslope.control.td3 import TD3
from upslope.control.trpo import TRPO
from upslope.runs import checkpoint
from upslope.runs import run as runs
from upslope.runs.run import Run

COMMON: dict[str, Any] = {
    "environment": environments.Config("CartPole-v1", 4, "sync"),
    "network": networks.Config(hidden=(8,)),
    "normalize": normalization.Config(observation=True, reward=True),
}
SEARCH: dict[str, Any] = {**COMMON, "normalize": normalization.Config(observation=True), "total_steps": 3000}
REPLAYED: dict[str, Any] = {
    "environment": environments.Config("Pendulum-v1", 2, "sync"),
    "normalize": normalization.Config(observation=True),
    "total_steps": 60,
    "replay_capacity": 40,  # it is overwritten on the way
    "learning_starts": 10,
    "batch_size": 8,
}
STOCHASTIC = actors.Stochastic(hidden=(8, 8))
DETERMINISTIC = actors.Config(hidden=(8, 8))
WANDERING = action_noise.Config("ornstein-uhlenbeck", std=0.3)
SMALL: dict[str, Any] = {
    "reinforce moving-average": REINFORCE(**COMMON, baseline="moving-average", total_steps=900),
    "reinforce value": REINFORCE(**COMMON, baseline="value", discount_gradient=True, total_steps=900),
    "reinforce per parameter": REINFORCE(**COMMON, baseline="minimum-variance-per-parameter", total_steps=900),
    "a2c": A2C(**COMMON, total_steps=160),
    "a2c own fit": A2C(**COMMON, critic_epochs=2, kappa=0.1, rollout_length=16, total_steps=512),
    "trpo": TRPO(**COMMON, rollout_length=32, steps_per_batch=2, critic_minibatch=32, total_steps=1024),
    "acktr": ACKTR(**COMMON, optimizer=KFAC(inverse_interval=3), total_steps=800),
    "group-ppo": GroupPPO(
        **{**COMMON, "environment": environments.Config("CartPole-v1", 4, group_size=2)},
        minibatch_size=32,
        total_steps=900,
    ),
    "sac": SAC(**REPLAYED, network=STOCHASTIC),
    "sac value": SAC(**REPLAYED, network=STOCHASTIC, value_network=True, train_interval=2, gradient_steps=None),
    "sac fixed alpha": SAC(**REPLAYED, network=STOCHASTIC, learn_alpha=False, anneal_learning_rate=True),
    "td3": TD3(**REPLAYED, network=DETERMINISTIC, policy_delay=3),
    "ddpg wandering": DDPG(**REPLAYED, network=DETERMINISTIC, noise=WANDERING),
    "soft-q": SoftQ(
        **{**REPLAYED, "environment": environments.Config("CartPole-v1", 2, "sync")},
        network=qnetworks.Boltzmann(hidden=(8, 8)),
        train_interval=2,
        target_interval=8,
    ),
    "ppo lstm": PPO(
        **{**COMMON, "network": networks.Config(hidden=(8,), memory="lstm", memory_size=4)},
        rollout_length=32,
        minibatch_size=64,
        total_steps=1024,
    ),
    "ppo penalty": PPO(
        **COMMON, kl_penalty=penalty.Config(1.0, "paper"), rollout_length=32, minibatch_size=32, total_steps=1024
    ),
    "es": ES(**SEARCH),
    "es stochastic": ES(
        **{**SEARCH, "environment": environments.Config("CartPole-v1", 4)}, stochastic=True, shaping="standardised"
    ),
    "cem": CEM(**SEARCH, elite_fraction=0.5),
}


class PulledOutError(Exception):
    """The plug."""


class Pulled(Run):
    """Breaks off at the given iteration, before its checkpoint is written."""

    at = 0

    def record(self, step: int, numbers: Any) -> None:
        self.at -= 1
        if self.at < 0:
            raise PulledOutError
        super().record(step, numbers)


def finished(directory: Path) -> str:
    newest = checkpoint.newest(directory / "checkpoints")
    assert newest is not None
    return checkpoint.fingerprint(newest.tensors, newest.state.get("segments"))


@pytest.mark.parametrize("name", SMALL)
def test_broken_off_and_resumed(name: str, tmp_path: Path) -> None:
    config = SMALL[name]
    kind = name.split()[0]
    module = importlib.import_module(cli.ALGORITHMS[kind][0])
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    module.train(replace(config, run=runs.Config(seed=3, run_dir=whole, quiet=True)))
    config = replace(config, run=runs.Config(seed=3, run_dir=broken, quiet=True, checkpoint_seconds=0.0))
    session: Run = Pulled(kind, config, config.total_steps)
    for iterations in (3, 1):
        session.at = iterations  # type: ignore[attr-defined]
        with pytest.raises(PulledOutError):
            module.train(config, session)
        session = Pulled.resume(broken, kind, config, config.total_steps)
    session.at = 10**9  # type: ignore[attr-defined]
    module.train(config, session)
    assert finished(broken) == finished(whole)
