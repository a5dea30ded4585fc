"""MDPs from what people have: an environment's own table, Blackjack's rules, logged transitions.

Gymnasium's toy-text environments carry a table, `env.unwrapped.P[s][a] = [(probability, s', reward, terminated), …]`.
A terminated entry ends the episode whatever s' is, so it must lead to a terminal state here: s' itself when every way
into s' terminates (FrozenLake's holes and goal, the cliff's goal), one extra last state otherwise (Taxi).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import gymnasium
import numpy as np
import scipy.sparse as sp
from jaxtyping import Bool, Float, Int

from upslope.exact.mdp import MDP

DECK = np.array([1.0] * 9 + [4.0]) / 13.0  # ace … nine, and ten / jack / queen / king together: an infinite deck
ARROWS = {"FrozenLake": "←↓→↑", "CliffWalking": "↑→↓←", "Taxi": ("↓", "↑", "→", "←", "pick up", "drop off")}


class Edges(NamedTuple):
    """Possible transitions, one per row: P(next_state | state, action) = probability, paying reward."""

    state: Int[np.ndarray, " edges"]
    action: Int[np.ndarray, " edges"]
    probability: Float[np.ndarray, " edges"]
    next_state: Int[np.ndarray, " edges"]
    reward: Float[np.ndarray, " edges"]
    terminated: Bool[np.ndarray, " edges"]


def from_edges(
    edges: Edges,
    num_states: int,
    num_actions: int,
    gamma: float,
    entered: Bool[np.ndarray, " states"] | None = None,
    **fields: Any,
) -> MDP:
    """The MDP of a list of transitions, terminated ones leading to a terminal state.

    Args:
        edges: the transitions.
        entered: states known to be visited alive, e.g. starts, beside those that some transition enters alive.
        fields: further fields of `MDP`.

    Transitions that share (s, a, s') add up, with r(s,a,s') their probability-weighted mean. When a state is entered
    both with and without termination, one extra terminal state is appended (index `num_states`).

    Raises:
        ValueError: as `MDP`, e.g. when the probabilities of some (s, a) do not sum to 1.

    >>> edges = Edges(*map(np.array, ([0, 0], [0, 0], [0.5, 0.5], [0, 1], [1.0, 3.0], [False, True])))
    >>> mdp = from_edges(edges, num_states=2, num_actions=1, gamma=1.0)
    >>> mdp.terminal.tolist(), mdp.expected_reward[0].tolist()
    ([False, True], [2.0])
    """
    state, action, probability, next_state, reward, terminated = map(np.asarray, edges)
    ends = np.zeros(num_states, bool)
    ends[next_state[terminated]] = True
    alive = np.zeros(num_states, bool) if entered is None else entered.copy()
    alive[next_state[~terminated & (state != next_state)]] = True  # a self-loop is not a way in
    absorbing = ends & ~alive
    extra = int((terminated & ~absorbing[next_state]).any())
    size = num_states + extra
    next_state = np.where(terminated & ~absorbing[next_state], num_states, next_state)
    kept = ~absorbing[state]
    loops = np.flatnonzero(np.append(absorbing, np.ones(extra, bool)))
    rows = np.concatenate(
        [(state * num_actions + action)[kept], (loops[:, None] * num_actions + np.arange(num_actions)).ravel()]
    )
    columns = np.concatenate([next_state[kept], np.repeat(loops, num_actions)])
    mass = np.concatenate([probability[kept].astype(np.float64), np.ones(len(loops) * num_actions)])
    paid = np.concatenate([(probability * reward)[kept], np.zeros(len(loops) * num_actions)])
    shape = (size * num_actions, size)
    transition = sp.csr_array(sp.coo_array((mass, (rows, columns)), shape=shape))  # adds duplicates up
    total = sp.csr_array(sp.coo_array((paid, (rows, columns)), shape=shape))
    inverse = transition.copy()
    inverse.data = np.divide(1.0, inverse.data, out=np.zeros_like(inverse.data), where=inverse.data > 0.0)
    if extra:
        initial, names = fields.get("initial"), fields.get("state_names")
        fields |= {"initial": None if initial is None else np.append(initial, 0.0)}
        fields |= {"state_names": None if names is None else (*names, "end")}
    return MDP(transition, sp.csr_array(total.multiply(inverse)), gamma, **fields)


def from_gymnasium(env: str | gymnasium.Env, gamma: float = 1.0, horizon: int | None = None, **options: Any) -> MDP:
    """The MDP of a Gymnasium toy-text environment, by its own table (Blackjack, which has none: by its rules).

    Args:
        env: an id (`options` then go to `gymnasium.make`, e.g. `map_name="8x8"`) or an environment.
        gamma: discount. The environments themselves say 1.
        horizon: number of steps that count. Time limits of the registry are not taken over unless asked for:
            FrozenLake-v1 is cut at 100 steps, and whether the cut belongs to the problem is the caller's decision.

    Raises:
        ValueError: no such environment or option, or the environment carries no table.

    >>> lake = from_gymnasium("FrozenLake-v1", gamma=0.99)
    >>> lake.num_states, lake.num_actions, int(lake.terminal.sum())
    (16, 4, 5)
    """
    try:
        made = gymnasium.make(env, **options) if isinstance(env, str) else env
    except (gymnasium.error.Error, TypeError, KeyError) as wrong:
        raise ValueError(f"env: {wrong}") from None
    inner: Any = made.unwrapped
    name = made.spec.id if made.spec is not None else type(inner).__name__
    if not hasattr(inner, "P"):
        if name.startswith("Blackjack"):
            return blackjack(sab=inner.sab, natural=inner.natural, gamma=gamma, horizon=horizon)
        raise ValueError(
            f"env: {name} has no table of transitions (toy-text environments have), so it has no exact MDP"
        )
    num_states, num_actions = int(inner.observation_space.n), int(inner.action_space.n)
    rows = [(s, a, *entry) for s in range(num_states) for a in range(num_actions) for entry in inner.P[s][a]]
    state, action, probability, next_state, reward, terminated = map(np.array, zip(*rows, strict=True))
    edges = Edges(state, action, probability, next_state, reward.astype(np.float64), terminated.astype(bool))
    kind = name.split("-")[0]
    fields: dict[str, Any] = {"initial": np.asarray(inner.initial_state_distrib), "horizon": horizon}
    fields["action_names"] = tuple(ARROWS[kind]) if kind in ARROWS and len(ARROWS[kind]) == num_actions else None
    if kind == "FrozenLake":
        fields["shape"] = (int(inner.nrow), int(inner.ncol))
    elif kind == "CliffWalking":
        fields["shape"] = tuple(map(int, inner.shape))
    elif kind == "Taxi":
        fields["state_names"] = tuple(str(tuple(map(int, inner.decode(s)))) for s in range(num_states))
    made.close()
    return from_edges(edges, num_states, num_actions, gamma, entered=fields["initial"] > 0.0, **fields)


def from_logged(
    state: Sequence[int] | np.ndarray,
    action: Sequence[int] | np.ndarray,
    reward: Sequence[float] | np.ndarray,
    next_state: Sequence[int] | np.ndarray,
    terminated: Sequence[bool] | np.ndarray,
    gamma: float,
    num_states: int | None = None,
    num_actions: int | None = None,
    unseen: Literal["refuse", "terminate", "stay"] = "refuse",
    **fields: Any,
) -> MDP:
    """The maximum-likelihood MDP of logged transitions: P̂(s'|s,a) = n(s,a,s') / n(s,a), r̂ the mean reward.

    Args:
        state, action, reward, next_state, terminated: one entry per transition. A truncated transition is not a
            terminated one: log it with `terminated=False`.
        num_states, num_actions: sizes, if larger than the largest index seen.
        unseen: what a pair (s, a) without data does: refused; `terminate` ends the episode with reward 0; `stay`
            leaves the state as it is with reward 0.

    Raises:
        ValueError: lengths differ, indices out of range, rewards not finite, or an unseen pair and unseen="refuse".

    >>> ends = [False, False, False, True]
    >>> mdp = from_logged([0, 0, 0, 0], [0, 0, 0, 0], [1, 1, 1, 5], [0, 0, 0, 1], ends, gamma=0.5)
    >>> mdp.matrix.toarray()[0].tolist(), mdp.expected_reward[0].tolist(), mdp.terminal.tolist()
    ([0.75, 0.25], [2.0], [False, True])
    """
    s, a, s2 = (np.asarray(x, dtype=np.int64).reshape(-1) for x in (state, action, next_state))
    r, over = np.asarray(reward, dtype=np.float64).reshape(-1), np.asarray(terminated, dtype=bool).reshape(-1)
    if not len(s) == len(a) == len(r) == len(s2) == len(over) or len(s) == 0:
        raise ValueError(f"lengths must agree and not be 0, got {[len(x) for x in (s, a, r, s2, over)]}")
    num_states = int(max(s.max(), s2.max())) + 1 if num_states is None else num_states
    num_actions = int(a.max()) + 1 if num_actions is None else num_actions
    for name, index, size in (("state", s, num_states), ("action", a, num_actions), ("next_state", s2, num_states)):
        if index.min() < 0 or index.max() >= size:
            raise ValueError(f"{name}: indices lie in 0…{size - 1}, got {index.min()}…{index.max()}")
    if not np.isfinite(r).all():
        raise ValueError(
            f"reward: must be finite, got {r[~np.isfinite(r)][0]} at row {np.flatnonzero(~np.isfinite(r))[0]}"
        )
    counts = np.bincount(s * num_actions + a, minlength=num_states * num_actions)
    probability = 1.0 / counts[s * num_actions + a]
    missing = np.flatnonzero(counts == 0)
    seen = np.bincount(s, minlength=num_states) > 0
    ended = ~seen & (np.bincount(s2[over], minlength=num_states) > 0)
    unknown = missing[~ended[missing // num_actions]]
    if unseen == "refuse" and unknown.size:
        pair = divmod(int(unknown[0]), num_actions)
        raise ValueError(
            f"no data for (state {pair[0]}, action {pair[1]}) and {unknown.size - 1} more pairs; "
            'unseen="terminate" or unseen="stay" says what they do'
        )
    s, a = np.append(s, missing // num_actions), np.append(a, missing % num_actions)
    stop = ended[missing // num_actions] | (unseen == "terminate")
    edges = Edges(
        s,
        a,
        np.append(probability, np.ones(len(missing))),
        np.append(s2, missing // num_actions),
        np.append(r, np.zeros(len(missing))),
        np.append(over, stop),
    )
    return from_edges(edges, num_states, num_actions, gamma, entered=seen, **fields)


def blackjack(sab: bool = True, natural: bool = False, gamma: float = 1.0, horizon: int | None = None) -> MDP:
    """Gymnasium's Blackjack-v1 as an exact MDP (S&B example 5.1): infinite deck, dealer draws to 17.

    States: hard sums 4…21, then soft sums 12…21, each by the dealer's card ace…10, then ten naturals (an ace and a ten
    in two cards, which the rules pay differently), then the end. Actions: 0 stick, 1 hit.

    Args:
        sab: Sutton & Barto's rules (a natural beats every dealer's hand but a natural). Overrides `natural`.
        natural: a winning natural pays 1.5.

    >>> game = blackjack()
    >>> game.num_states, game.num_actions, round(float(game.initial.sum()), 12)
    (291, 2, 1.0)
    """
    hands = [(total, False) for total in range(4, 22)] + [(total, True) for total in range(12, 22)]
    index = {(total, soft, card): 10 * i + card - 1 for i, (total, soft) in enumerate(hands) for card in range(1, 11)}
    end = len(index) + 10
    edges: list[tuple[int, int, float, int, float, bool]] = []
    for card in range(1, 11):
        dealer = _dealer_outcomes(card)
        for total, soft in hands:
            here = index[total, soft, card]
            for outcome, probability in dealer.items():
                edges.append((here, 0, probability, end, float(np.sign(total - outcome[0])), True))
            edges.extend((here, 1, p, *_after(total, soft, drawn, card, index, end)) for drawn, p in enumerate(DECK, 1))
        here = len(index) + card - 1  # a natural
        for (score, dealt_natural), probability in dealer.items():
            reward = float(np.sign(21 - score))
            if sab and not dealt_natural:
                reward = 1.0
            elif not sab and natural and reward == 1.0:
                reward = 1.5
            edges.append((here, 0, probability, end, reward, True))
        edges.extend((here, 1, p, *_after(21, True, drawn, card, index, end)) for drawn, p in enumerate(DECK, 1))
    edges.extend((end, action, 1.0, end, 0.0, True) for action in (0, 1))
    initial = np.zeros(end + 1)
    for first, p in enumerate(DECK, 1):
        for second, q in enumerate(DECK, 1):
            soft = 1 in (first, second)
            total = first + second + 10 * soft
            for card, c in enumerate(DECK, 1):
                is_natural = {first, second} == {1, 10}
                initial[len(index) + card - 1 if is_natural else index[total, soft, card]] += p * q * c
    face = {1: "A"} | {card: str(card) for card in range(2, 11)}
    names = [f"{'soft' if soft else 'hard'} {total} vs {face[card]}" for total, soft in hands for card in range(1, 11)]
    names += [f"natural vs {face[card]}" for card in range(1, 11)] + ["end"]
    columns = map(np.array, zip(*edges, strict=True))
    fields: dict[str, Any] = {"initial": initial, "horizon": horizon, "state_names": tuple(names)}
    fields |= {"action_names": ("stick", "hit"), "shape": (28, 10)}
    return from_edges(Edges(*columns), end + 1, 2, gamma, **fields)


def _after(total: int, soft: bool, drawn: int, card: int, index: dict, end: int) -> tuple[int, float, bool]:
    """(next state, reward, terminated) of hitting and drawing a card."""
    if drawn == 1 and not soft and total + 11 <= 21:
        return index[total + 11, True, card], 0.0, False
    total += drawn
    if total > 21 and soft:
        return index[total - 10, False, card], 0.0, False
    return (end, -1.0, True) if total > 21 else (index[total, soft, card], 0.0, False)


def _dealer_outcomes(card: int) -> dict[tuple[int, bool], float]:
    """P(score, natural) of a dealer who shows `card` and draws to 17 or more; a bust scores 0."""
    outcomes: dict[tuple[int, bool], float] = {}

    def play(hard: int, ace: bool, cards: int, probability: float) -> None:
        total = hard + 10 if ace and hard + 10 <= 21 else hard
        if total >= 17:
            key = (total if total <= 21 else 0, cards == 2 and total == 21)
            outcomes[key] = outcomes.get(key, 0.0) + probability
            return
        for drawn, p in enumerate(DECK, 1):
            play(hard + drawn, ace or drawn == 1, cards + 1, probability * p)

    play(card, card == 1, 1, 1.0)
    return outcomes
