"""Wing 1: tabular MDPs, the ground truth."""

from upslope.exact.mdp import MDP

__all__ = ["MDP"]
