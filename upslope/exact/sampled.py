"""Learning values from sampled transitions: Monte Carlo, TD(0), TD(λ), SARSA, Q-learning, double Q-learning.

Sources: S3 §5 (alg 4 Q-learning, alg 5 ε-greedy, eq 11 TD with V_{t−1} on the right), S&B chapters 5, 6, 12.
Every function learns in `runs` independent runs at once, in lockstep by episode, so that a figure with its confidence
interval takes a second. Step sizes and ε may be schedules (`upslope.core.exploration`): a step size is asked for the
number of visits so far (from 0), an ε for the episode (from 0).

    monte_carlo         V(s) ← V(s) + α (G − V(s))
    td, λ = 0           V(s) ← V(s) + α (r + γV(s') − V(s))
    td                  V ← V + α δ z,  z ← γλz + 1(s)
    sarsa               Q(s,a) ← Q(s,a) + α (r + γQ(s',a') − Q(s,a))
    expected_sarsa      … r + γ Σ_a' π(a'|s')Q(s',a')
    q_learning          … r + γ max_a' Q(s',a')
    double_q_learning   … r + γQ₂(s', argmax_a' Q₁(s',a')), the roles drawn by a coin

States of a `runs` axis are independent. A terminal s' counts 0.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from upslope.exact.evaluation import Policy, policy_table
from upslope.exact.mdp import MDP
from upslope.exact.sampling import Outcomes, draw, draw_start, outcomes

StepSize = float | Callable[[Tensor], Tensor | float]
Epsilon = float | Callable[[int], float]
Watch = Callable[[int], None]  # called with the number of episodes that are done
MAX_STEPS = 100_000


class Predicted(NamedTuple):
    """V after each episode, index 0 before the first."""

    values: Float[np.ndarray, "runs episodes_plus_1 S"]


class Learned(NamedTuple):
    """Q at the end (double: the mean of both), and for each episode its undiscounted sum of rewards and its length."""

    q_values: Float[np.ndarray, "runs S A"]
    episode_returns: Float[np.ndarray, "runs episodes"]
    lengths: Int[np.ndarray, "runs episodes"]


def monte_carlo(
    mdp: MDP,
    policy: Policy,
    episodes: int,
    generator: np.random.Generator,
    step_size: StepSize | None = None,
    runs: int = 1,
    initial: float = 0.0,
    first_visit: bool = False,
    max_steps: int = MAX_STEPS,
    watch: Watch | None = None,
) -> Predicted:
    """V(s) ← V(s) + α (G_t − V(s)) at every (or the first) visit of s in an episode (S&B 6.1; S3 eq 20 is its target).

    Args:
        step_size: None averages: α = 1/n(s).
        initial: V before the first episode, except 0 at terminal states.
        max_steps: an episode that does not end is an error, as its return is not known.

    Raises:
        ValueError: a malformed policy or step size; an episode longer than max_steps.

    >>> from upslope.exact import zoo
    >>> walk, policy = zoo.random_walk(), np.zeros(7, int)
    >>> values = monte_carlo(walk, policy, 1000, np.random.default_rng(0), runs=10).values
    >>> bool(np.abs(values[:, -1].mean(axis=0)[1:-1] - np.arange(1, 6) / 6).max() < 0.02)
    True
    """
    table, cumulative = outcomes(mdp), _cumulative(mdp, policy)
    values = _initial_values(mdp, runs, episodes, initial)
    counts = np.zeros((runs, mdp.num_states))
    for episode in range(1, episodes + 1):
        value = values[:, episode - 1].copy()
        states, rewards, active = _episode(mdp, table, cumulative, runs, generator, max_steps)
        seen = np.full((runs, mdp.num_states), len(states))
        if first_visit:
            for t in range(len(states) - 1, -1, -1):
                seen[active[t], states[t]] = t
        gain = np.zeros(runs)
        for t in range(len(states) - 1, -1, -1):
            rows, state = active[t], states[t]
            gain[rows] = rewards[t] + mdp.gamma * gain[rows]
            used = seen[rows, state] == t if first_visit else slice(None)
            rows, state = rows[used], state[used]
            rate = _rate(step_size, counts[rows, state])
            counts[rows, state] += 1
            value[rows, state] += rate * (gain[rows] - value[rows, state])
        values[:, episode] = value
        if watch is not None:
            watch(episode)
    return Predicted(values)


def td(
    mdp: MDP,
    policy: Policy,
    episodes: int,
    generator: np.random.Generator,
    step_size: StepSize = 0.1,
    lam: float = 0.0,
    runs: int = 1,
    initial: float = 0.0,
    traces: Literal["accumulating", "replacing"] = "accumulating",
    max_steps: int = MAX_STEPS,
    watch: Watch | None = None,
) -> Predicted:
    """TD(λ), online: δ = r + γV(s') − V(s); z ← γλz, z(s) += 1 (or = 1); V ← V + α δ z (S3 eq 11 at λ = 0; S&B 12.2).

    An episode is cut (bootstrapped, not ended) after `max_steps`.

    Raises:
        ValueError: a malformed policy or step size, λ outside [0, 1].

    >>> from upslope.exact import zoo
    >>> values = td(zoo.random_walk(), np.zeros(7, int), 100, np.random.default_rng(0), runs=100, initial=0.5).values
    >>> values.shape, values[0, 0].tolist()
    ((100, 101, 7), [0.0, 0.5, 0.5, 0.5, 0.5, 0.5, 0.0])
    """
    if not 0.0 <= lam <= 1.0:
        raise ValueError(f"lam: must lie in [0, 1], got {lam}")
    table, cumulative = outcomes(mdp), _cumulative(mdp, policy)
    values = _initial_values(mdp, runs, episodes, initial)
    counts = np.zeros((runs, mdp.num_states))
    for episode in range(1, episodes + 1):
        value = values[:, episode - 1].copy()
        trace = np.zeros((runs, mdp.num_states)) if lam > 0.0 else None
        state, rows = draw_start(table, generator.random(runs)), np.arange(runs)
        for step in range(max_steps):
            following, reward, over = _advance(mdp, table, cumulative, state, generator, step)
            error = reward + mdp.gamma * np.where(over, 0.0, value[rows, following]) - value[rows, state]
            rate = _rate(step_size, counts[rows, state])
            counts[rows, state] += 1
            if trace is None:
                value[rows, state] += rate * error
            else:
                trace[rows] *= mdp.gamma * lam
                trace[rows, state] = 1.0 + (trace[rows, state] if traces == "accumulating" else 0.0)
                value[rows] += (rate * error)[:, None] * trace[rows]
            rows, state = rows[~over], following[~over]
            if rows.size == 0:
                break
        values[:, episode] = value
        if watch is not None:
            watch(episode)
    return Predicted(values)


def q_learning(
    mdp: MDP,
    episodes: int,
    generator: np.random.Generator,
    step_size: StepSize = 0.1,
    epsilon: Epsilon = 0.1,
    runs: int = 1,
    available: Bool[np.ndarray, "S A"] | None = None,
    max_steps: int = MAX_STEPS,
    watch: Watch | None = None,
) -> Learned:
    """Q-learning (S3 alg 4) with ε-greedy actions (alg 5), ties broken at random, from Q = 0.

    Args:
        available: which actions a state has; all by default.
        max_steps: an episode is cut (bootstrapped, not ended) after this many.

    Raises:
        ValueError: step size or ε out of range, a state without an action.

    >>> from upslope.exact import zoo
    >>> learned = q_learning(zoo.cliff(), 200, np.random.default_rng(0), step_size=0.5, runs=5)
    >>> learned.q_values[:, 36].max(axis=1).round().tolist()  # the start: the optimum is −13
    [-13.0, -13.0, -13.0, -13.0, -13.0]
    """
    return _control(_greatest, mdp, episodes, generator, step_size, epsilon, runs, available, max_steps, watch)


def sarsa(
    mdp: MDP,
    episodes: int,
    generator: np.random.Generator,
    step_size: StepSize = 0.1,
    epsilon: Epsilon = 0.1,
    runs: int = 1,
    available: Bool[np.ndarray, "S A"] | None = None,
    max_steps: int = MAX_STEPS,
    watch: Watch | None = None,
) -> Learned:
    """SARSA, on-policy (S&B 6.4): the next action's own value is the target. Arguments as `q_learning`."""
    return _control(_chosen, mdp, episodes, generator, step_size, epsilon, runs, available, max_steps, watch)


def expected_sarsa(
    mdp: MDP,
    episodes: int,
    generator: np.random.Generator,
    step_size: StepSize = 0.1,
    epsilon: Epsilon = 0.1,
    runs: int = 1,
    available: Bool[np.ndarray, "S A"] | None = None,
    max_steps: int = MAX_STEPS,
    watch: Watch | None = None,
) -> Learned:
    """Expected SARSA (S&B 6.6): the mean over the ε-greedy policy's next action. Arguments as `q_learning`."""
    return _control(_expected, mdp, episodes, generator, step_size, epsilon, runs, available, max_steps, watch)


def double_q_learning(
    mdp: MDP,
    episodes: int,
    generator: np.random.Generator,
    step_size: StepSize = 0.1,
    epsilon: Epsilon = 0.1,
    runs: int = 1,
    available: Bool[np.ndarray, "S A"] | None = None,
    max_steps: int = MAX_STEPS,
    watch: Watch | None = None,
) -> Learned:
    """Double Q-learning (van Hasselt 2010; S&B 6.7): one table chooses, the other values. Arguments as `q_learning`."""
    return _control(_cross_valued, mdp, episodes, generator, step_size, epsilon, runs, available, max_steps, watch, 2)


class _Next(NamedTuple):
    """The states that a step led to, one row a run."""

    options: Float[np.ndarray, "batch A"]  # their values in the table that is updated; −∞ where not available
    other: Float[np.ndarray, "batch A"]  # in the other table, where there are two
    action: Int[np.ndarray, " batch"]  # what will be done there
    legal: Bool[np.ndarray, "batch A"]
    epsilon: float
    generator: np.random.Generator


def _greatest(following: _Next) -> np.ndarray:
    return following.options.max(axis=1)


def _chosen(following: _Next) -> np.ndarray:
    return following.options[np.arange(len(following.action)), following.action]


def _expected(following: _Next) -> np.ndarray:
    options, legal, epsilon = following.options, following.legal, following.epsilon
    top = options == options.max(axis=1, keepdims=True)
    share = legal / legal.sum(axis=1, keepdims=True)
    weights = epsilon * share + (1.0 - epsilon) * top / top.sum(axis=1, keepdims=True)
    return np.where(legal, weights * np.where(legal, options, 0.0), 0.0).sum(axis=1)


def _cross_valued(following: _Next) -> np.ndarray:
    best = _argmax(following.options, following.generator)
    return following.other[np.arange(len(best)), best]


def _control(
    ahead: Callable[[_Next], np.ndarray],
    mdp: MDP,
    episodes: int,
    generator: np.random.Generator,
    step_size: StepSize,
    epsilon: Epsilon,
    runs: int,
    available: Bool[np.ndarray, "S A"] | None,
    max_steps: int,
    watch: Watch | None,
    tables: int = 1,
) -> Learned:
    """ε-greedy learning in `tables` tables, one drawn to be updated; `ahead` says what the next state is worth."""
    legal = np.ones((mdp.num_states, mdp.num_actions), bool) if available is None else np.asarray(available)
    if legal.shape != (mdp.num_states, mdp.num_actions) or not legal.any(axis=1).all():
        raise ValueError(f"available: [S, A] with an action in every state is needed, got {legal.shape}")
    table = outcomes(mdp)
    q = np.where(legal, 0.0, -np.inf) + np.zeros((tables, runs, mdp.num_states, mdp.num_actions))
    counts = np.zeros(q.shape)
    returns, lengths = np.zeros((runs, episodes)), np.zeros((runs, episodes), int)

    def act(rows: np.ndarray, state: np.ndarray) -> np.ndarray:
        greedy = _argmax(q[:, rows, state].sum(axis=0), generator)
        random = _argmax(np.where(legal[state], 0.0, -np.inf), generator)
        return np.where(generator.random(len(rows)) < eps, random, greedy)

    for episode in range(episodes):
        eps = float(epsilon(episode)) if callable(epsilon) else epsilon
        if not 0.0 <= eps <= 1.0:
            raise ValueError(f"epsilon: must lie in [0, 1], got {eps} in episode {episode}")
        state, rows = draw_start(table, generator.random(runs)), np.arange(runs)
        action = act(rows, state)
        for step in range(max_steps):
            following, reward = draw(table, state, action, generator)
            over = table.terminal[following]
            over = over | (step + 1 == mdp.horizon)
            returns[rows, episode] += reward
            lengths[rows, episode] += 1
            chosen = act(rows, following)
            which = generator.integers(0, 2, len(rows)) if tables == 2 else np.zeros(len(rows), int)
            options, other = q[which, rows, following], q[tables - 1 - which, rows, following]
            worth = ahead(_Next(options, other, chosen, legal[following], eps, generator))
            target = reward + mdp.gamma * np.where(over, 0.0, worth)
            rate = _rate(step_size, counts[which, rows, state, action])
            counts[which, rows, state, action] += 1
            q[which, rows, state, action] += rate * (target - q[which, rows, state, action])
            going = ~over
            rows, state, action = rows[going], following[going], chosen[going]
            if rows.size == 0:
                break
        if watch is not None:
            watch(episode + 1)
    return Learned(q.mean(axis=0), returns, lengths)


def _argmax(q: Float[np.ndarray, "batch A"], generator: np.random.Generator) -> Int[np.ndarray, " batch"]:
    """argmax over the last axis, ties broken uniformly at random."""
    top = q == q.max(axis=1, keepdims=True)
    return np.where(top, generator.random(q.shape), -1.0).argmax(axis=1)


def _rate(step_size: StepSize | None, visits: Float[np.ndarray, " batch"]) -> np.ndarray | float:
    if step_size is None:
        return 1.0 / (visits + 1.0)
    rate = np.asarray(step_size(torch.from_numpy(visits))) if callable(step_size) else step_size
    if not (np.all(np.asarray(rate) >= 0.0) and np.all(np.asarray(rate) <= 1.0)):
        raise ValueError(f"step_size: must lie in [0, 1], got {rate}")
    return rate


def _cumulative(mdp: MDP, policy: Policy) -> Float[np.ndarray, "S A"]:
    table = np.cumsum(policy_table(mdp, policy), axis=1)
    return np.where(table >= table[:, -1:], 2.0, table)  # from the last possible action on nothing is beyond


def _initial_values(mdp: MDP, runs: int, episodes: int, initial: float) -> Float[np.ndarray, "runs episodes_plus_1 S"]:
    values = np.zeros((runs, episodes + 1, mdp.num_states))
    values[:, 0] = np.where(mdp.terminal, 0.0, initial)
    return values


def _advance(
    mdp: MDP, table: Outcomes, cumulative: np.ndarray, state: np.ndarray, generator: np.random.Generator, step: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(s', r, ended) of one step of the policy."""
    action = (generator.random(len(state))[:, None] >= cumulative[state]).sum(axis=1)
    following, reward = draw(table, state, action, generator)
    return following, reward, table.terminal[following] | (step + 1 == mdp.horizon)


def _episode(
    mdp: MDP, table: Outcomes, cumulative: np.ndarray, runs: int, generator: np.random.Generator, max_steps: int
) -> tuple[list[np.ndarray], list[np.ndarray], list[np.ndarray]]:
    """(states, rewards, runs still going) of one episode in every run, step by step."""
    states, rewards, active = [], [], []
    state, rows = draw_start(table, generator.random(runs)), np.arange(runs)
    for step in range(max_steps):
        following, reward, over = _advance(mdp, table, cumulative, state, generator, step)
        states.append(state)
        rewards.append(reward)
        active.append(rows)
        rows, state = rows[~over], following[~over]
        if rows.size == 0:
            return states, rewards, active
    raise ValueError(f"max_steps: an episode did not end within {max_steps} steps, so its return is not known")
