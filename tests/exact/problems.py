"""Small problems and slow, obvious solutions that the tests hold the solvers to."""

from collections.abc import Sequence
from itertools import product

import numpy as np

from upslope.exact import MDP


def random_dense(
    generator: np.random.Generator, states: int, actions: int, gamma: float, low: float = 0.0, high: float = 1.0
) -> MDP:
    """Every successor possible, rewards r(s, a, s') uniform in [low, high)."""
    transition = generator.random((states, actions, states)) ** 3
    transition /= transition.sum(axis=2, keepdims=True)
    return MDP(transition, generator.uniform(low, high, (states, actions, states)), gamma)


def random_ending(generator: np.random.Generator, states: int, actions: int, low: float, high: float) -> MDP:
    """γ = 1, sparse successors, the last state terminal; some actions loop, and some never end."""
    transition = np.zeros((states, actions, states))
    for s in range(states - 1):
        for a in range(actions):
            after = generator.choice(states, size=2, replace=False)
            transition[s, a, after] = generator.dirichlet([1.0, 1.0])
            if generator.random() < 0.2:
                transition[s, a] = np.eye(states)[s if generator.random() < 0.5 else generator.integers(states - 1)]
    transition[-1, :, -1] = 1.0
    reward = generator.uniform(low, high, (states, actions))
    reward[-1] = 0.0
    return MDP(transition, reward, 1.0)


def best_of_all_policies(mdp: MDP) -> np.ndarray:
    """V* by definition: the elementwise best over every deterministic policy, each solved densely."""
    best = np.full(mdp.num_states, -np.inf)
    index = np.arange(mdp.num_states)
    reward = (mdp.dense_transition * mdp.reward).sum(2) if mdp.reward.ndim == 3 else mdp.reward
    for actions in product(range(mdp.num_actions), repeat=mdp.num_states):
        move = mdp.dense_transition[index, actions]
        best = np.maximum(best, np.linalg.solve(np.eye(len(move)) - mdp.gamma * move, reward[index, actions]))
    return best


def best_ending_policies(mdp: MDP) -> np.ndarray:
    """V* of an undiscounted problem with costs: the best over the deterministic policies that surely end."""
    alive, index = ~mdp.terminal, np.arange(mdp.num_states)
    best = np.full(mdp.num_states, -np.inf)
    for actions in product(range(mdp.num_actions), repeat=int(alive.sum())):
        move = mdp.dense_transition[index[alive], actions][:, alive]
        if np.abs(np.linalg.eigvals(move)).max() < 1.0 - 1e-9:
            value = np.linalg.solve(np.eye(len(move)) - move, mdp.expected_reward[index[alive], actions])
            best[alive] = np.maximum(best[alive], value)
    best[~alive] = 0.0
    return best


def prizes(mdp: MDP, actions: Sequence[int]) -> np.ndarray:
    """V^π of γ = 1 and rewards only on arrival, the limit of V_h from below: 0 where π never arrives, else solved."""
    alive, index = ~mdp.terminal, np.arange(mdp.num_states)
    move = mdp.dense_transition[index, actions]
    arriving = ~alive
    for _ in index:
        arriving = arriving | (move[:, arriving].sum(axis=1) > 0.0)
    on = alive & arriving
    value = np.zeros(mdp.num_states)
    value[on] = np.linalg.solve(np.eye(on.sum()) - move[np.ix_(on, on)], mdp.expected_reward[index, actions][on])
    return value


def best_prizes(mdp: MDP) -> np.ndarray:
    """V* of such a problem: the elementwise best over every deterministic policy."""
    every = product(range(mdp.num_actions), repeat=mdp.num_states)
    return np.max([prizes(mdp, actions) for actions in every], axis=0)
