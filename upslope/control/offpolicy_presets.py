"""Tuned settings for the off-policy algorithms, as `presets`: the RL Zoo's where nothing else is said."""

from dataclasses import fields, replace
from typing import Any

from upslope.control import action_noise, actors, environments, optimizers, qnetworks
from upslope.control.ddpg import DDPG
from upslope.control.dqn import DQN
from upslope.control.sac import SAC
from upslope.control.soft_q import SoftQ
from upslope.control.td3 import TD3

_MUJOCO = ("HalfCheetah-v5", "Hopper-v5", "Walker2d-v5", "Ant-v5")


def _dqn(environment_id: str, learning_rate: float, total_steps: int, **own: Any) -> DQN:
    return replace(
        DQN(environment=environments.Config(environment_id, 1)),
        optimizer=optimizers.Adam(learning_rate=learning_rate, epsilon=1e-8),
        total_steps=total_steps,
        **own,
    )


_LUNAR_DQN: dict[str, Any] = {
    "replay_capacity": 50_000, "learning_starts": 0, "train_interval": 4, "gradient_steps": None, "batch_size": 128,
    "target_interval": 250, "epsilon_end": 0.1, "epsilon_fraction": 0.12,
}  # fmt: skip

DQN_PRESETS: dict[str, DQN] = {
    # Ours: the Zoo's DQN plays well at its end by luck, its training return never comes near 475.
    "CartPole-v1": replace(
        _dqn("CartPole-v1", 5e-4, 100_000),
        network=qnetworks.Config(hidden=(128, 128)),
        train_interval=2,
        n_step=3,
        target_interval=2,
        target_tau=0.01,
        double=True,
        epsilon_end=0.04,
        epsilon_fraction=0.16,
        anneal_learning_rate=True,
    ),
    "Acrobot-v1": _dqn("Acrobot-v1", 6.3e-4, 100_000, **_LUNAR_DQN),
    # Ours: with the Zoo's rate of 4e-3, one step and no double, seeds end at -112 and -104.
    "MountainCar-v0": _dqn(
        "MountainCar-v0", 1e-3, 120_000, replay_capacity=10_000, learning_starts=1_000, train_interval=16,
        gradient_steps=8, batch_size=128, gamma=0.98, target_interval=600, epsilon_end=0.07, epsilon_fraction=0.2,
        double=True, n_step=3, anneal_learning_rate=True,
    ),
    # Ours: with the Zoo's settings seeds end at 246 and at 75.
    "LunarLander-v3": _dqn(
        "LunarLander-v3", 5e-4, 200_000,
        **_LUNAR_DQN | {"replay_capacity": 200_000, "double": True, "n_step": 3, "anneal_learning_rate": True},
    ),
}  # fmt: skip

SOFT_Q_PRESETS: dict[str, SoftQ] = {  # ours: the Zoo has none
    "CartPole-v1": replace(
        SoftQ(environment=environments.Config("CartPole-v1", 1)),
        network=qnetworks.Boltzmann(hidden=(128, 128), alpha=0.1),
        optimizer=optimizers.Adam(learning_rate=1e-3, epsilon=1e-8),
        total_steps=50_000,
        train_interval=2,
        target_interval=2,
        target_tau=0.01,
        anneal_learning_rate=True,
    ),
}


def _sac(environment_id: str, learning_rate: float, total_steps: int, **own: Any) -> SAC:
    return replace(
        SAC(environment=environments.Config(environment_id, 1)),
        optimizer=optimizers.Adam(learning_rate=learning_rate, epsilon=1e-8),
        total_steps=total_steps,
        **own,
    )


_LUNAR_SAC: dict[str, Any] = {
    "environment": environments.Config("LunarLanderContinuous-v3", 4), "network": actors.Stochastic(hidden=(400, 300)),
    "learning_starts": 10_000, "target_tau": 0.01, "anneal_learning_rate": True,
}  # fmt: skip

SAC_PRESETS: dict[str, SAC] = {
    "Pendulum-v1": _sac("Pendulum-v1", 1e-3, 20_000),
    "MountainCarContinuous-v0": _sac(
        "MountainCarContinuous-v0", 3e-4, 100_000,  # the Zoo's 50,000 were too few on one seed of three
        network=actors.Stochastic(hidden=(64, 64), state_dependent_noise=True),
        replay_capacity=50_000, learning_starts=0, train_interval=32, gradient_steps=32, batch_size=512, gamma=0.9999,
        target_tau=0.01, alpha=0.1, learn_alpha=False,
    ),
    # The Zoo's with four environments: a gradient step for every fourth step is enough.
    "LunarLanderContinuous-v3": _sac("LunarLanderContinuous-v3", 7.3e-4, 500_000, **_LUNAR_SAC),
    **{name: _sac(name, 3e-4, 1_000_000, learning_starts=10_000) for name in _MUJOCO},
}  # fmt: skip


def _td3(environment_id: str, total_steps: int, **own: Any) -> TD3:
    where = TD3(environment=environments.Config(environment_id, 1))
    return replace(where, total_steps=total_steps, learning_starts=10_000, **own)


_ZOO_TD3: dict[str, Any] = {"gamma": 0.98, "replay_capacity": 200_000}

TD3_PRESETS: dict[str, TD3] = {
    "Pendulum-v1": _td3("Pendulum-v1", 20_000, **_ZOO_TD3),
    "MountainCarContinuous-v0": replace(
        _td3("MountainCarContinuous-v0", 100_000),
        network=actors.Config(hidden=(64, 64)),
        learning_starts=100,
        noise=action_noise.Config("ornstein-uhlenbeck", std=0.5),
    ),
    # Ours: with the Zoo's gamma of .98 seeds hover, for to land is then worth too little. Noise that wanders.
    "LunarLanderContinuous-v3": _td3(
        "LunarLanderContinuous-v3",
        600_000,
        environment=environments.Config("LunarLanderContinuous-v3", 8),
        gradient_steps=4,
        batch_size=128,
        noise=action_noise.Config("ornstein-uhlenbeck", std=0.15),
        anneal_learning_rate=True,
    ),
    "BipedalWalker-v3": _td3("BipedalWalker-v3", 1_000_000, **_ZOO_TD3),
    **{name: _td3(name, 1_000_000) for name in _MUJOCO},
}

DDPG_PRESETS: dict[str, DDPG] = {
    name: DDPG(**{field.name: getattr(config, field.name) for field in fields(DDPG)})
    for name, config in TD3_PRESETS.items()
}
# One Q errs upwards, where the actor climbs: three rewards that were seen hold it down.
DDPG_PRESETS["LunarLanderContinuous-v3"] = replace(DDPG_PRESETS["LunarLanderContinuous-v3"], n_step=3)


def dqn(environment_id: str) -> DQN | None:
    """DQN's settings for an environment, or None.

    >>> dqn("MountainCar-v0").gamma
    0.98
    """
    return DQN_PRESETS.get(environment_id)


def soft_q(environment_id: str) -> SoftQ | None:
    """Soft Q-learning's settings for an environment, or None.

    >>> soft_q("CartPole-v1").network.alpha
    0.1
    """
    return SOFT_Q_PRESETS.get(environment_id)


def ddpg(environment_id: str) -> DDPG | None:
    """DDPG's settings for an environment, or None.

    >>> ddpg("Pendulum-v1").gamma
    0.98
    """
    return DDPG_PRESETS.get(environment_id)


def td3(environment_id: str) -> TD3 | None:
    """TD3's settings for an environment, or None.

    >>> td3("Pendulum-v1").learning_starts
    10000
    """
    return TD3_PRESETS.get(environment_id)


def sac(environment_id: str) -> SAC | None:
    """SAC's settings for an environment, or None.

    >>> sac("Pendulum-v1").optimizer.learning_rate
    0.001
    """
    return SAC_PRESETS.get(environment_id)
