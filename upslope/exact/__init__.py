"""Wing 1: tabular MDPs, the ground truth."""

from upslope.exact import zoo
from upslope.exact.dynamic_programming import Solution, modified_policy_iteration, policy_iteration, value_iteration
from upslope.exact.evaluation import average_reward, evaluate_policy, state_visitation, stationary_distribution
from upslope.exact.mdp import MDP
from upslope.exact.policy_gradient import exact_policy_gradient
from upslope.exact.sampling import BatchedMDP
from upslope.exact.soft import soft_evaluation, soft_policy_iteration, soft_value_iteration
from upslope.exact.tables import from_gymnasium, from_logged

__all__ = [
    "MDP",
    "BatchedMDP",
    "Solution",
    "average_reward",
    "evaluate_policy",
    "exact_policy_gradient",
    "from_gymnasium",
    "from_logged",
    "modified_policy_iteration",
    "policy_iteration",
    "soft_evaluation",
    "soft_policy_iteration",
    "soft_value_iteration",
    "state_visitation",
    "stationary_distribution",
    "value_iteration",
    "zoo",
]
