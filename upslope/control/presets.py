"""Tuned settings for known environments: the RL Zoo's (DLR-RM/rl-baselines3-zoo@22e3ff2, `hyperparams/*.yml`), but one.

Where the Zoo leaves a field out, Stable-Baselines3's default stands here in full. Its `vf_coef` multiplies the squared
error without ½, as ours does. The off-policy algorithms' settings are in `offpolicy_presets` and reached from here.
"""

from dataclasses import replace

from upslope.control import environments, kfac, networks, normalization, optimizers
from upslope.control.a3c import A3C
from upslope.control.acktr import ACKTR
from upslope.control.actor_critic import A2C
from upslope.control.environments import Atari
from upslope.control.evolution_presets import cem as cem
from upslope.control.evolution_presets import es as es
from upslope.control.group_ppo import GroupPPO
from upslope.control.offpolicy_presets import ddpg, dqn, sac, soft_q, td3
from upslope.control.ppo import PPO
from upslope.control.reinforce import REINFORCE
from upslope.control.trpo import TRPO

__all__ = [
    "a2c", "a3c", "acktr", "cem", "ddpg", "dqn", "es", "group_ppo", "ppo", "reinforce", "sac", "soft_q", "td3", "trpo",
]  # fmt: skip

NORMALIZED = normalization.Config(observation=True, reward=True)

_SB3 = PPO(
    environment=environments.Config("CartPole-v1", 1),
    optimizer=optimizers.Adam(learning_rate=3e-4),
    total_steps=1_000_000,
    rollout_length=2048,
    num_epochs=10,
    minibatch_size=64,
    entropy_coef=0.0,
    anneal_learning_rate=False,
)

_FAR = networks.Config(orthogonal=False, log_std=-1.0, state_dependent_noise=True, noise_interval=32)
_WIDE_RELU = networks.Config(hidden=(256, 256), activation="relu", orthogonal=False, log_std=-2.0)


def _atari(environment_id: str) -> PPO:
    unsticky = {"repeat_action_probability": 0.0}  # as the NoFrameskip-v4 games that the Zoo trains
    return replace(
        _SB3,
        environment=environments.Config(environment_id, 8, atari=Atari(), kwargs=unsticky),
        normalize=normalization.Config(reward_sign=True),
        network=networks.Config(hidden=(), shared=True),
        optimizer=optimizers.Adam(learning_rate=2.5e-4),
        total_steps=10_000_000,
        rollout_length=128,
        num_epochs=4,
        minibatch_size=256,
        clip_low=0.1,
        clip_high=0.1,
        entropy_coef=0.01,
        anneal_learning_rate=True,
        anneal_clip=True,
    )


def _lunar(environment_id: str) -> PPO:
    return replace(
        _SB3,
        environment=environments.Config(environment_id, 16),
        rollout_length=1024,
        num_epochs=4,
        gamma=0.999,
        gae_lambda=0.98,
        entropy_coef=0.01,
    )


PPO_PRESETS: dict[str, PPO] = {
    "CartPole-v1": replace(
        _SB3,
        environment=environments.Config("CartPole-v1", 8),
        optimizer=optimizers.Adam(learning_rate=1e-3),
        total_steps=100_000,
        rollout_length=32,
        num_epochs=20,
        minibatch_size=256,
        gamma=0.98,
        gae_lambda=0.8,
        anneal_learning_rate=True,
        anneal_clip=True,
    ),
    "Acrobot-v1": replace(
        _SB3,
        environment=environments.Config("Acrobot-v1", 16),
        normalize=NORMALIZED,
        rollout_length=256,
        num_epochs=4,
        gae_lambda=0.94,
    ),
    "MountainCar-v0": replace(
        _SB3,
        environment=environments.Config("MountainCar-v0", 16),
        normalize=NORMALIZED,
        rollout_length=16,
        num_epochs=4,
        gae_lambda=0.98,
    ),
    # Ours: with the Zoo's (one environment, 8 steps a rollout) some seeds fail, here and in Stable-Baselines3.
    "MountainCarContinuous-v0": replace(
        _SB3,
        environment=environments.Config("MountainCarContinuous-v0", 4),
        normalize=NORMALIZED,
        network=_FAR,
        total_steps=60_000,
        rollout_length=128,
        anneal_learning_rate=True,
    ),
    "Pendulum-v1": replace(
        _SB3,
        environment=environments.Config("Pendulum-v1", 4),
        network=networks.Config(state_dependent_noise=True, noise_interval=4),
        optimizer=optimizers.Adam(learning_rate=1e-3),
        total_steps=100_000,
        rollout_length=1024,
        gamma=0.9,
    ),
    "LunarLander-v3": _lunar("LunarLander-v3"),
    "LunarLanderContinuous-v3": _lunar("LunarLanderContinuous-v3"),
    "BipedalWalker-v3": replace(
        _SB3,
        environment=environments.Config("BipedalWalker-v3", 32),
        normalize=NORMALIZED,
        total_steps=5_000_000,
        gamma=0.999,
        clip_low=0.18,
        clip_high=0.18,
    ),
    "HalfCheetah-v5": replace(
        _SB3,
        environment=environments.Config("HalfCheetah-v5", 1),
        normalize=NORMALIZED,
        network=_WIDE_RELU,
        optimizer=optimizers.Adam(learning_rate=2.0633e-5),
        rollout_length=512,
        num_epochs=20,
        gamma=0.98,
        gae_lambda=0.92,
        clip_low=0.1,
        clip_high=0.1,
        value_coef=0.58096,
        entropy_coef=0.000401762,
        max_grad_norm=0.8,
    ),
    "Hopper-v5": replace(
        _SB3,
        environment=environments.Config("Hopper-v5", 1),
        normalize=NORMALIZED,
        network=_WIDE_RELU,
        optimizer=optimizers.Adam(learning_rate=9.80828e-5),
        rollout_length=512,
        num_epochs=5,
        minibatch_size=32,
        gamma=0.999,
        gae_lambda=0.99,
        value_coef=0.835671,
        entropy_coef=0.00229519,
        max_grad_norm=0.7,
    ),
    "Walker2d-v5": replace(
        _SB3,
        environment=environments.Config("Walker2d-v5", 1),
        normalize=NORMALIZED,
        optimizer=optimizers.Adam(learning_rate=5.05041e-5),
        rollout_length=512,
        num_epochs=20,
        minibatch_size=32,
        clip_low=0.1,
        clip_high=0.1,
        value_coef=0.871923,
        entropy_coef=0.000585045,
        max_grad_norm=1.0,
    ),
    "Ant-v5": replace(_SB3, environment=environments.Config("Ant-v5", 1), normalize=NORMALIZED),
    "ALE/Pong-v5": _atari("ALE/Pong-v5"),
    "ALE/Breakout-v5": _atari("ALE/Breakout-v5"),
}

_GSDE = networks.Config(orthogonal=False, log_std=-2.0, state_dependent_noise=True)


def _a2c(environment_id: str, num_envs: int, total_steps: int = 1_000_000, normalized: bool = True) -> A2C:
    return A2C(
        environment=environments.Config(environment_id, num_envs),
        normalize=NORMALIZED if normalized else normalization.Config(),
        total_steps=total_steps,
    )


A2C_PRESETS: dict[str, A2C] = {
    "CartPole-v1": _a2c("CartPole-v1", 8, 500_000, normalized=False),
    "Acrobot-v1": _a2c("Acrobot-v1", 16, 500_000),
    "MountainCar-v0": _a2c("MountainCar-v0", 16),
    "MountainCarContinuous-v0": replace(
        _a2c("MountainCarContinuous-v0", 4, 100_000),
        network=networks.Config(orthogonal=False, state_dependent_noise=True, noise_interval=16),
        rollout_length=100,
    ),
    # Ours: with the Zoo's narrow exploration (log_std -2) and RMSProp every other seed ends near -826
    "Pendulum-v1": replace(
        _a2c("Pendulum-v1", 8),
        network=replace(_GSDE, log_std=-1.0),
        optimizer=optimizers.Adam(learning_rate=7e-4),
        rollout_length=8,
        gamma=0.9,
        gae_lambda=0.9,
        value_coef=0.4,
        anneal_learning_rate=True,
    ),
    "LunarLander-v3": replace(
        _a2c("LunarLander-v3", 8, 200_000, normalized=False),
        optimizer=optimizers.RMSProp(learning_rate=8.3e-4),
        gamma=0.995,
        entropy_coef=1e-5,
        anneal_learning_rate=True,
    ),
    "BipedalWalker-v3": replace(
        _a2c("BipedalWalker-v3", 16, 5_000_000),
        network=_GSDE,
        optimizer=optimizers.RMSProp(learning_rate=9.6e-4),
        rollout_length=8,
        gae_lambda=0.9,
        value_coef=0.4,
        anneal_learning_rate=True,
    ),
    **{name: _a2c(name, 1) for name in ("HalfCheetah-v5", "Hopper-v5", "Walker2d-v5", "Ant-v5")},
}

A3C_PRESETS: dict[str, A3C] = {  # ours: the Zoo has none
    "CartPole-v1": A3C(
        environment=environments.Config("CartPole-v1", 8), total_steps=300_000, anneal_learning_rate=True
    ),
}


def _trpo(environment_id: str, num_envs: int, length: int, total_steps: int, normalized: bool = True) -> TRPO:
    return TRPO(
        environment=environments.Config(environment_id, num_envs),
        normalize=NORMALIZED if normalized else normalization.Config(),
        total_steps=total_steps,
        rollout_length=length,
    )


_LOCOMOTION = {"cg_iterations": 25, "critic_epochs": 20}
_SMOOTH = networks.Config(state_dependent_noise=True, noise_interval=4)

TRPO_PRESETS: dict[str, TRPO] = {
    "CartPole-v1": replace(
        _trpo("CartPole-v1", 2, 512, 100_000, normalized=False),
        gae_lambda=0.98,
        cg_damping=1e-3,
        critic_epochs=20,
        critic_minibatch=512,
    ),
    "Acrobot-v1": _trpo("Acrobot-v1", 2, 1024, 100_000),
    "MountainCar-v0": replace(_trpo("MountainCar-v0", 2, 1024, 100_000), critic_epochs=20),
    # Ours: the Zoo's exploration (log_std 0, a new matrix every 4 steps) misses the flag on some seeds
    "MountainCarContinuous-v0": replace(_trpo("MountainCarContinuous-v0", 4, 512, 50_000), network=_FAR),
    "Pendulum-v1": replace(
        _trpo("Pendulum-v1", 2, 1024, 100_000, normalized=False), network=_SMOOTH, gamma=0.9, critic_epochs=15
    ),
    "LunarLander-v3": replace(
        _trpo("LunarLander-v3", 2, 512, 200_000, normalized=False), gae_lambda=0.98, cg_damping=0.01, critic_epochs=15
    ),
    # Ours: γ and λ are PPO's, four times the batch, twice the KL, 1.7 million steps. With less, some seeds still hover
    # where they should land; the figures are in docs/results.md
    "LunarLanderContinuous-v3": replace(
        _trpo("LunarLanderContinuous-v3", 8, 1024, 1_700_000),
        gamma=0.999,
        gae_lambda=0.98,
        critic_epochs=20,
        target_kl=0.02,
    ),
    **{
        name: replace(_trpo(name, 2, 1024, 1_000_000), **_LOCOMOTION)  # type: ignore[arg-type]
        for name in ("BipedalWalker-v3", "HalfCheetah-v5", "Hopper-v5", "Walker2d-v5", "Ant-v5")
    },
}
TRPO_PRESETS["HalfCheetah-v5"] = replace(TRPO_PRESETS["HalfCheetah-v5"], target_kl=0.04)

ACKTR_PRESETS: dict[str, ACKTR] = {  # ours: the Zoo has none
    "CartPole-v1": ACKTR(
        environment=environments.Config("CartPole-v1", 8),
        optimizer=kfac.KFAC(kl_clip=0.02),
        total_steps=150_000,
        rollout_length=64,
        whiten_advantages=True,
    ),
}

REINFORCE_PRESETS: dict[str, REINFORCE] = {
    "CartPole-v1": REINFORCE(environment=environments.Config("CartPole-v1", 8)),
}

GROUP_PPO_PRESETS: dict[str, GroupPPO] = {
    "CartPole-v1": GroupPPO(
        environment=environments.Config("CartPole-v1", 16, group_size=8),
        optimizer=optimizers.Adam(learning_rate=1e-3),
        total_steps=200_000,
        num_epochs=10,
        entropy_coef=0.0,
    ),
}


NOT_TRAINED_TO_CONVERGENCE = frozenset({"ALE/Pong-v5", "ALE/Breakout-v5"})  # 10M frames need days on a CPU; others
# of Atari's games take the same settings, untried


def ppo(environment_id: str) -> PPO | None:
    """PPO's settings for an environment, or None.

    >>> ppo("CartPole-v1").gae_lambda
    0.8
    """
    is_atari = environment_id.startswith("ALE/") or "NoFrameskip" in environment_id
    return PPO_PRESETS.get(environment_id) or (_atari(environment_id) if is_atari else None)


def a2c(environment_id: str) -> A2C | None:
    """A2C's settings for an environment, or None.

    >>> a2c("Acrobot-v1").environment.num_envs
    16
    """
    return A2C_PRESETS.get(environment_id)


def a3c(environment_id: str) -> A3C | None:
    """A3C's settings for an environment, or None.

    >>> a3c("CartPole-v1").workers
    2
    """
    return A3C_PRESETS.get(environment_id)


def acktr(environment_id: str) -> ACKTR | None:
    """ACKTR's settings for an environment, or None.

    >>> acktr("CartPole-v1").optimizer.kl_clip
    0.02
    """
    return ACKTR_PRESETS.get(environment_id)


def reinforce(environment_id: str) -> REINFORCE | None:
    """REINFORCE's settings for an environment, or None.

    >>> reinforce("CartPole-v1").baseline
    'value'
    """
    return REINFORCE_PRESETS.get(environment_id)


def trpo(environment_id: str) -> TRPO | None:
    """TRPO's settings for an environment, or None.

    >>> trpo("CartPole-v1").cg_damping
    0.001
    """
    return TRPO_PRESETS.get(environment_id)


def group_ppo(environment_id: str) -> GroupPPO | None:
    """Group PPO's settings for an environment, or None.

    >>> group_ppo("CartPole-v1").environment.group_size
    8
    """
    return GROUP_PPO_PRESETS.get(environment_id)
