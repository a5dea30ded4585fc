"""Wing 2: deep agents on Gymnasium environments."""

from upslope.control.agent import Agent
from upslope.control.ppo import PPO

__all__ = ["PPO", "Agent"]
