"""Upslope: policy gradients from a gridworld to a language model.

`from upslope import PPO` reaches the public names of the wings; a wing is imported when one of its names is asked for,
so that `upslope --help` need not wait for torch.
"""

import importlib
from typing import Any

_WINGS = dict.fromkeys(
    (
        "A2C", "A3C", "ACKTR", "Agent", "CEM", "DDPG", "DQN", "ES", "GroupPPO", "PPO", "REINFORCE", "SAC", "SoftQ",
        "TD3", "TRPO",
    ),
    "upslope.control",
)  # fmt: skip

__all__ = [
    "A2C", "A3C", "ACKTR", "CEM", "DDPG", "DQN", "ES", "PPO", "REINFORCE", "SAC", "TD3", "TRPO",
    "Agent", "GroupPPO", "SoftQ",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _WINGS:
        raise AttributeError(f"module 'upslope' has no attribute {name!r}")
    return getattr(importlib.import_module(_WINGS[name]), name)
