"""Wing 2: deep agents on Gymnasium environments."""

from upslope.control.a3c import A3C
from upslope.control.acktr import ACKTR
from upslope.control.actor_critic import A2C
from upslope.control.agent import Agent
from upslope.control.cem import CEM
from upslope.control.ddpg import DDPG
from upslope.control.dqn import DQN
from upslope.control.es import ES
from upslope.control.group_ppo import GroupPPO
from upslope.control.ppo import PPO
from upslope.control.reinforce import REINFORCE
from upslope.control.sac import SAC
from upslope.control.soft_q import SoftQ
from upslope.control.td3 import TD3
from upslope.control.trpo import TRPO

__all__ = [
    "A2C", "A3C", "ACKTR", "CEM", "DDPG", "DQN", "ES", "PPO", "REINFORCE", "SAC", "TD3", "TRPO",
    "Agent", "GroupPPO", "SoftQ",
]  # fmt: skip
