"""Classic problems as MDPs. Each has a known answer, and `tests/exact/test_zoo.py` asks for it.

S&B = Sutton & Barto, *Reinforcement Learning: An Introduction*, 2nd edition (2018). Toy-text environments come from
`from_gymnasium`. Where the number of legal actions differs between states, an illegal action does what the nearest
legal one does: that changes neither values nor the set of optimal plays.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable

import numpy as np
import scipy.sparse as sp
from scipy.stats import poisson

from upslope.exact.mdp import MDP
from upslope.exact.tables import blackjack, from_gymnasium


def gridworld(size: int = 4) -> MDP:
    """S&B example 4.1: a grid, two terminal corners, −1 a step, γ = 1. Under the random policy V = 0, −14, −20, −22, …

    >>> gridworld().num_states, gridworld().terminal.nonzero()[0].tolist()
    (16, [0, 15])
    """
    states = size * size
    transition, reward = np.zeros((states, 4, states)), np.full((states, 4), -1.0)
    for state in range(states):
        row, column = divmod(state, size)
        for action, (down, right) in enumerate([(-1, 0), (0, 1), (1, 0), (0, -1)]):
            r, c = min(max(row + down, 0), size - 1), min(max(column + right, 0), size - 1)
            transition[state, action, r * size + c] = 1.0
    for corner in (0, states - 1):
        transition[corner] = np.eye(states)[corner]
        reward[corner] = 0.0
    return MDP(transition, reward, gamma=1.0, action_names=tuple("↑→↓←"), shape=(size, size))


def gambler(heads: float = 0.4, goal: int = 100) -> MDP:
    """S&B example 4.3: stake 1…goal/2 on a coin; +1 for reaching the goal, γ = 1. p = .4: V(25) = .16, V(50) = .4.

    A stake above min(s, goal − s) counts as that.
    """
    actions = goal // 2
    transition = np.zeros((goal + 1, actions, goal + 1))
    reward = np.zeros((goal + 1, actions, goal + 1))
    for capital in range(1, goal):
        for action in range(actions):
            stake = min(action + 1, capital, goal - capital)
            transition[capital, action, capital + stake] += heads
            transition[capital, action, capital - stake] += 1.0 - heads
    reward[1:goal, :, goal] = 1.0
    for end in (0, goal):
        transition[end, :, end] = 1.0
    return MDP(transition, reward, gamma=1.0, action_names=tuple(f"stake {a + 1}" for a in range(actions)))


def jacks_cars(capacity: int = 20, max_move: int = 5) -> MDP:
    """S&B example 4.2, Jack's car rental: Poisson requests (3, 4) and returns (3, 2), $10 a rental, $2 a moved car.

    γ = .9. State first·(capacity + 1) + second, actions 0, +1, −1, +2, −2, … cars from the first place to the second; a
    move of more cars than there are moves those. Tails of the Poisson distributions are exact, not cut.
    V(0,0) = 421.4, V(20,20) = 637.0; 270 of 441 states move nothing.
    """
    side = capacity + 1
    moves = [0] + [sign * cars for cars in range(1, max_move + 1) for sign in (1, -1)]
    day = [_rental_day(requests, returns, capacity) for requests, returns in ((3.0, 3.0), (4.0, 2.0))]
    transition, reward = np.zeros((side, side, len(moves), side * side)), np.zeros((side, side, len(moves)))
    for first in range(side):
        for second in range(side):
            for action, wanted in enumerate(moves):
                move = max(min(wanted, first), -second)
                morning = min(first - move, capacity), min(second + move, capacity)
                joint = np.outer(day[0][0][morning[0]], day[1][0][morning[1]])
                transition[first, second, action] = joint.ravel()
                reward[first, second, action] = 10.0 * (day[0][1][morning[0]] + day[1][1][morning[1]]) - 2.0 * abs(move)
    names = tuple(f"{first},{second}" for first in range(side) for second in range(side))
    return MDP(
        transition.reshape(side * side, len(moves), side * side),
        reward.reshape(side * side, len(moves)),
        gamma=0.9,
        state_names=names,
        action_names=tuple(f"{move:+d}" if move else "0" for move in moves),
        shape=(side, side),
    )


def _rental_day(requests: float, returns: float, capacity: int) -> tuple[np.ndarray, np.ndarray]:
    """P(evening cars | morning cars) [n, n] and the expected number of rentals [n] at one place."""
    cars = np.arange(capacity + 1)
    overnight, rented = np.zeros((capacity + 1, capacity + 1)), np.zeros(capacity + 1)
    for morning in cars:
        rent = poisson.pmf(cars[: morning + 1], requests)
        rent[morning] = poisson.sf(morning - 1, requests)  # every request beyond the cars that are there is lost
        rented[morning] = rent @ cars[: morning + 1]
        for out, p in enumerate(rent):
            left = morning - out
            back = poisson.pmf(cars[: capacity - left + 1], returns)
            back[capacity - left] = poisson.sf(capacity - left - 1, returns)
            overnight[morning, left:] += p * back
    return overnight / overnight.sum(axis=1, keepdims=True), rented  # the division removes roundings of 1e-16 only


def random_walk(states: int = 5) -> MDP:
    """S&B example 6.2: from the middle left or right with equal chance, +1 at the right end, γ = 1. V = 1/6, …, 5/6.

    States 1…n in the middle, 0 and n + 1 terminal; one action.

    >>> random_walk().initial.tolist()
    [0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0]
    """
    transition = np.zeros((states + 2, 1, states + 2))
    reward = np.zeros((states + 2, 1, states + 2))
    for state in range(1, states + 1):
        transition[state, 0, [state - 1, state + 1]] = 0.5
    transition[0, 0, 0] = transition[-1, 0, -1] = 1.0
    reward[states, 0, states + 1] = 1.0
    initial = np.eye(states + 2)[(states + 1) // 2]
    return MDP(transition, reward, gamma=1.0, initial=initial, action_names=("step",), shape=(1, states + 2))


def short_corridor() -> MDP:
    """S&B example 13.1: three states that look alike, the middle one with left and right exchanged; −1 a step, γ = 1.

    With one probability p of right everywhere, v(p) = 2(p − 2) / (p (1 − p)); best p* = 2 − √2, v* = −(6 + 4√2).
    State 3 is terminal. Actions: left, right.

    >>> corridor = short_corridor()
    >>> corridor.num_states, corridor.action_names
    (4, ('←', '→'))
    """
    transition, reward = np.zeros((4, 2, 4)), np.full((4, 2), -1.0)
    for state, (left, right) in enumerate([(0, 1), (2, 0), (1, 3), (3, 3)]):
        transition[state, 0, left] = transition[state, 1, right] = 1.0
    reward[3] = 0.0
    return MDP(transition, reward, 1.0, initial=np.eye(4)[0], action_names=("←", "→"), shape=(1, 4))


def cliff() -> MDP:
    """S&B example 6.6, Gymnasium's CliffWalking-v1: −1 a step, −100 for the cliff, γ = 1. Optimum −13."""
    return from_gymnasium("CliffWalking-v1", gamma=1.0)


def frozen_lake(size: str = "4x4", gamma: float = 1.0, horizon: int | None = None) -> MDP:
    """Gymnasium's slippery FrozenLake-v1. 4x4 optimum: .8235 without a limit, .7442 knowing that 100 steps are left."""
    return from_gymnasium("FrozenLake-v1", gamma=gamma, horizon=horizon, map_name=size)


def taxi(gamma: float = 1.0) -> MDP:
    """Gymnasium's Taxi (v4, or v3 where that is the newest). Mean optimum over the 300 starts: 7.93."""
    return from_gymnasium("Taxi-v4", gamma=gamma)


def maximization_bias(actions: int = 10, mean: float = -0.1, std: float = 1.0) -> MDP:
    """S&B example 6.7: A goes right (end, 0) or left (B, 0); B has many actions that end with reward N(−.1, 1); γ = 1.

    States A, B, end. At A action 0 is right and every other one left: give learners `MAXIMIZATION_BIAS_ACTIONS`, so
    that A has two actions.
    """
    transition, reward = np.zeros((3, actions, 3)), np.zeros((3, actions))
    transition[0, 0, 2] = transition[1, :, 2] = transition[2, :, 2] = 1.0
    transition[0, 1:, 1] = 1.0
    reward[1] = mean
    noise = np.zeros((3, actions))
    noise[1] = std
    return MDP(transition, reward, 1.0, initial=np.eye(3)[0], reward_std=noise, state_names=("A", "B", "end"))


MAXIMIZATION_BIAS_ACTIONS = np.array([[True] * 2 + [False] * 8, [True] * 10, [True] * 10])


def blind_cliffwalk(states: int = 10) -> MDP:
    """Blind Cliffwalk (Schaul et al. 2016, appendix B): the right action, which alternates, goes on; the other one
    ends.

    +1 at the end of the walk, γ = 1 − 1/n. A random policy is rewarded with probability 2^−n; V*(start) = γ^{n−1}.
    """
    transition, reward = np.zeros((states + 1, 2, states + 1)), np.zeros((states + 1, 2))
    for state in range(states):
        right = state % 2
        transition[state, right, state + 1] = 1.0
        transition[state, 1 - right, states] = 1.0
    reward[states - 1, (states - 1) % 2] = 1.0
    transition[states, :, states] = 1.0
    return MDP(transition, reward, gamma=1.0 - 1.0 / states, initial=np.eye(states + 1)[0], shape=(1, states + 1))


def chain(states: int = 10, horizon: int | None = None) -> MDP:
    """N-chain (Osband et al. 2016): start at the second state; .001 for being left of it, 1 at the far right; γ = 1.

    Rewards are paid on arrival. Horizon N + 7, with which the optimum is 10 (the paper's "N + 9 steps, optimum 10"
    cannot both be: from the second state N + 9 steps arrive 12 times).
    """
    transition, reward = np.zeros((states, 2, states)), np.zeros((states, 2))
    for state in range(states):
        left, right = max(state - 1, 0), min(state + 1, states - 1)
        transition[state, 0, left] = transition[state, 1, right] = 1.0
        reward[state, 0] += 0.001 * (left == 0)
        reward[state, 1] += 1.0 * (right == states - 1)
    start = np.eye(states)[1]
    horizon = states + 7 if horizon is None else horizon
    return MDP(transition, reward, 1.0, start, horizon, action_names=("←", "→"), shape=(1, states))


def deep_sea(size: int = 10, mapping_seed: int | None = None) -> MDP:
    """bsuite's DeepSea: each step goes down a row, left or right; right costs .01/N; +1 in the far corner; γ = 1.

    Only going right N times is rewarded: optimum .99; a random policy gets there with probability 2^−N. With a
    `mapping_seed` each state draws which of its two actions goes right, as in bsuite: otherwise a network that happens
    to prefer one action everywhere has solved the problem before it has seen it.

    >>> deep_sea(4, mapping_seed=0).num_states
    17
    """
    cells = size * size
    right = np.ones(cells, int)
    if mapping_seed is not None:
        right = np.random.default_rng(mapping_seed).integers(0, 2, cells)
    columns, reward = np.zeros((cells + 1, 2), int), np.zeros((cells + 1, 2))
    for row in range(size):
        for column in range(size):
            state = row * size + column
            for action in range(2):
                goes_right = action == right[state]
                next_column = min(column + 1, size - 1) if goes_right else max(column - 1, 0)
                columns[state, action] = (row + 1) * size + next_column if row + 1 < size else cells
                if goes_right:
                    reward[state, action] = -0.01 / size + (row == column == size - 1)
    columns[cells] = cells
    transition = sp.csr_array(
        (np.ones(2 * cells + 2), columns.ravel(), np.arange(2 * cells + 3)), (2 * cells + 2, cells + 1)
    )
    start, names = np.eye(cells + 1)[0], ("↙", "↘") if mapping_seed is None else ("0", "1")
    return MDP(transition, reward, 1.0, start, action_names=names, shape=(size, size))


def random_mdp(
    generator: np.random.Generator,
    states: int,
    actions: int,
    successors: int,
    gamma: float,
    terminal: int = 0,
) -> MDP:
    """A Garnet problem (Bhatnagar et al. 2009): random successors, random probabilities, rewards uniform in [0, 1).

    Args:
        successors: draws per (s, a); a state drawn twice gets both shares.
        terminal: how many of the last states are terminal.

    >>> mdp = random_mdp(np.random.default_rng(0), states=6, actions=2, successors=3, gamma=0.9, terminal=1)
    >>> mdp.num_states, int(mdp.terminal.sum())
    (6, 1)
    """
    rows = states * actions
    columns = generator.integers(0, states, (rows, successors), dtype=np.int32)
    mass = generator.random((rows, successors))
    mass /= mass.sum(axis=1, keepdims=True)
    reward = generator.random((states, actions))
    last = (states - terminal) * actions
    columns[last:] = np.repeat(np.arange(states - terminal, states, dtype=np.int32), actions)[:, None]
    reward[states - terminal :] = 0.0
    pointers = np.arange(
        0, rows * successors + 1, successors, dtype=np.int32 if rows * successors < 2**31 else np.int64
    )
    return MDP(sp.csr_array((mass.ravel(), columns.ravel(), pointers), (rows, states)), reward, gamma)


PROBLEMS: dict[str, Callable[[], MDP]] = {
    "gridworld": gridworld,
    "gambler": gambler,
    "jacks-cars": jacks_cars,
    "random-walk": random_walk,
    "short-corridor": short_corridor,
    "cliff": cliff,
    "frozen-lake": frozen_lake,
    "frozen-lake-8x8": lambda: frozen_lake("8x8"),
    "taxi": taxi,
    "blackjack": blackjack,
    "maximization-bias": maximization_bias,
    "blind-cliffwalk": blind_cliffwalk,
    "chain": chain,
    "deep-sea": deep_sea,
}


def problem(name: str) -> MDP:
    """The problem of that name, as in `upslope solve … --env zoo:NAME`.

    >>> problem("random-walk").num_states
    7
    >>> problem("randomwalk")
    Traceback (most recent call last):
        ...
    ValueError: zoo: no problem 'randomwalk'; did you mean 'random-walk'? There are blackjack, blind-cliffwalk, ...
    """
    if name not in PROBLEMS:
        close = difflib.get_close_matches(name, PROBLEMS, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else "."
        raise ValueError(f"zoo: no problem {name!r}{hint} There are {', '.join(sorted(PROBLEMS))}")
    return PROBLEMS[name]()
