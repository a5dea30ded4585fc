"""A finite Markov decision process as data: P(s'|s,a), r, γ, where it starts, when it is cut.

Sources: S3 §1–2 (states, actions, Pr(s'|s,a), R, γ, H), S4 table 2.1. Nothing is normalised silently: a row of
probabilities that does not sum to one is an error that names the row and its sum.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import scipy.sparse as sp
from jaxtyping import Bool, Float, Int

ROW_SUM_TOLERANCE = 1e-9  # several float64 roundings of probabilities such as 1/3; anything larger is a mistake


@dataclass(frozen=True, eq=False)
class MDP:
    """A tabular MDP (S, A, P, r, γ, ρ₀, H).

    Args:
        transition: P(s'|s,a), dense [S, A, S] or scipy sparse [S·A, S] whose row s·A + a belongs to (s, a).
        reward: r(s,a) as [S, A]; or r(s,a,s') as dense [S, A, S] or sparse [S·A, S].
        gamma: discount in [0, 1]. At 1 the solvers decide whether total reward is well defined, and say why not.
        initial: ρ₀(s) as [S]. None means uniform over the states that are not terminal.
        horizon: number of actions in an episode (a part of the problem: beyond it nothing counts), None for unlimited.
        reward_std: standard deviation [S, A] of Gaussian noise on the reward when it is sampled; values do not change.
        state_names, action_names: what to call them in messages and pictures.
        shape: (rows, columns) in which the first rows·columns states are drawn.

    A **terminal** state is one that every action leaves unchanged with reward 0: its value is 0 at any γ.

    Raises:
        ValueError: wrong shapes, not finite, negative probabilities, a row that does not sum to 1, γ outside [0, 1].

    >>> coin = MDP([[[0.5, 0.5]], [[0.0, 1.0]]], [[1.0], [0.0]], gamma=0.9)
    >>> coin.num_states, coin.num_actions, coin.terminal.tolist(), coin.initial.tolist()
    (2, 1, [False, True], [1.0, 0.0])
    >>> MDP([[[0.5, 0.4]], [[0.0, 1.0]]], [[1.0], [0.0]], gamma=0.9)
    Traceback (most recent call last):
        ...
    ValueError: transition: probabilities of (state 0, action 0) sum to 0.9, not 1 (and 0 more rows are wrong)
    """

    transition: Float[np.ndarray, "S A S"] | sp.csr_array
    reward: Float[np.ndarray, "S A"] | Float[np.ndarray, "S A S"] | sp.csr_array
    gamma: float
    initial: Float[np.ndarray, " S"] | None = None
    horizon: int | None = None
    reward_std: Float[np.ndarray, "S A"] | None = None
    state_names: tuple[str, ...] | None = None
    action_names: tuple[str, ...] | None = None
    shape: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        """Converts to float64 arrays (CSR if sparse) and checks everything once, so that nobody has to again."""
        transition = _csr(self.transition) if sp.issparse(self.transition) else _array(self.transition, "transition")
        self._set("transition", transition)
        if transition.ndim == 3 and transition.shape[0] != transition.shape[2]:
            raise ValueError(f"transition: a dense one is [S, A, S], got {transition.shape}")
        if transition.ndim not in (2, 3) or (transition.ndim == 2 and not sp.issparse(transition)):
            raise ValueError(f"transition: dense [S, A, S] or scipy sparse [S·A, S], got {transition.shape}")
        if 0 in transition.shape or (transition.ndim == 2 and transition.shape[0] % transition.shape[1]):
            raise ValueError(
                f"transition: a sparse one is [S·A, S] with row s·A + a for (s, a), got {transition.shape}"
            )
        states, actions = self.num_states, self.num_actions
        reward = _csr(self.reward) if sp.issparse(self.reward) else _array(self.reward, "reward")
        self._set("reward", reward)
        allowed = {(states, actions), (states, actions, states)}
        if reward.shape not in ({(states * actions, states)} if sp.issparse(reward) else allowed):
            raise ValueError(
                f"reward: [S, A] = {(states, actions)}, [S, A, S] or sparse [S·A, S] allowed, got {reward.shape}"
            )
        self._check_finite("transition", transition)
        self._check_finite("reward", reward)
        self._check_rows()
        if not 0.0 <= self.gamma <= 1.0:
            raise ValueError(f"gamma: must lie in [0, 1], got {self.gamma}")
        if self.horizon is not None and (self.horizon != int(self.horizon) or self.horizon < 1):
            raise ValueError(f"horizon: a positive number of actions or None, got {self.horizon}")
        self._set("initial", self._checked_initial())
        if self.reward_std is not None:
            noise = _array(self.reward_std, "reward_std")
            if noise.shape != (states, actions) or not np.isfinite(noise).all() or noise.min() < 0.0:
                raise ValueError(
                    f"reward_std: finite and not negative, [S, A] = {(states, actions)}, got {noise.shape}"
                )
            self._set("reward_std", noise)
        for name, size in (("state_names", states), ("action_names", actions)):
            given = getattr(self, name)
            if given is not None and len(given) != size:
                raise ValueError(f"{name}: {size} names needed, got {len(given)}")

    # ---- sizes and views -------------------------------------------------------------------------------------------

    @property
    def num_states(self) -> int:
        return int(self.transition.shape[-1])

    @property
    def num_actions(self) -> int:
        shape = self.transition.shape
        return int(shape[1] if len(shape) == 3 else shape[0] // shape[1])

    @cached_property
    def matrix(self) -> sp.csr_array:
        """P as CSR [S·A, S], row s·A + a, without stored zeros."""
        if isinstance(self.transition, np.ndarray):
            return _csr(sp.csr_array(self.transition.reshape(-1, self.num_states)))
        return self.transition

    @cached_property
    def dense_transition(self) -> Float[np.ndarray, "S A S"]:
        """P as a dense array [S, A, S] (for small problems)."""
        if isinstance(self.transition, np.ndarray):
            return self.transition
        return self.transition.toarray().reshape(self.num_states, self.num_actions, self.num_states)

    @cached_property
    def expected_reward(self) -> Float[np.ndarray, "S A"]:
        """r(s,a) = Σ_s' P(s'|s,a) r(s,a,s')."""
        if self.reward.ndim == 2 and not sp.issparse(self.reward):
            return self.reward
        if sp.issparse(self.reward):
            return np.asarray(self.matrix.multiply(self.reward).sum(axis=1)).reshape(self.num_states, -1)
        return np.einsum("sax,sax->sa", self.dense_transition, self.reward)

    @cached_property
    def entry_reward(self) -> Float[np.ndarray, " entries"]:
        """r(s,a,s') of every stored entry of `matrix`, in its order."""
        counts = np.diff(self.matrix.indptr)
        rows = np.repeat(np.arange(len(counts)), counts)
        if self.reward.ndim == 2 and not sp.issparse(self.reward):
            return self.reward.reshape(-1)[rows]
        if sp.issparse(self.reward):
            return np.asarray(self.reward[rows, self.matrix.indices]).reshape(-1)
        return self.reward.reshape(-1, self.num_states)[rows, self.matrix.indices]

    @cached_property
    def terminal(self) -> Bool[np.ndarray, " S"]:
        """States that every action leaves unchanged, with reward 0."""
        diagonal = self.matrix[np.arange(self.num_states * self.num_actions), self._own_state]
        stays = np.asarray(diagonal).reshape(self.num_states, -1) >= 1.0 - ROW_SUM_TOLERANCE
        silent = self.expected_reward == 0.0 if self.reward_std is None else (self.reward_std == 0.0)
        return (stays & silent & (self.expected_reward == 0.0)).all(axis=1)

    def replace(self, **changes: Any) -> MDP:
        """The same problem with some fields changed (γ, horizon, initial…), checked again."""
        return replace(self, **changes)

    def state_name(self, state: int) -> str:
        return self.state_names[state] if self.state_names else str(state)

    def action_name(self, action: int) -> str:
        return self.action_names[action] if self.action_names else str(action)

    # ---- checks ----------------------------------------------------------------------------------------------------

    @property
    def _own_state(self) -> Int[np.ndarray, " SA"]:
        return np.repeat(np.arange(self.num_states), self.num_actions)

    def _set(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)

    def _pair(self, row: int) -> str:
        state, action = divmod(int(row), self.num_actions)
        return f"(state {state}, action {action})"

    def _check_finite(self, name: str, given: Any) -> None:
        data = given.data if sp.issparse(given) else given.reshape(-1)
        if np.isfinite(data).all():
            return
        entry = int(np.flatnonzero(~np.isfinite(data))[0])
        if sp.issparse(given):
            row = int(np.searchsorted(given.indptr, entry, side="right")) - 1
        else:
            row = entry // (given.shape[2] if given.ndim == 3 else 1)
        raise ValueError(f"{name}: must be finite, got {data[entry]} at {self._pair(row)}")

    def _check_rows(self) -> None:
        given = self.transition
        flat: Any = given.reshape(-1, self.num_states) if isinstance(given, np.ndarray) else given
        entries = flat.data if sp.issparse(flat) else flat
        if entries.size and entries.min() < 0.0:
            least = flat.min(axis=1).toarray().reshape(-1) if sp.issparse(flat) else flat.min(axis=1)
            row = int(np.argmin(least))
            raise ValueError(f"transition: negative probability {least[row]:g} at {self._pair(row)}")
        sums = np.asarray(flat.sum(axis=1)).reshape(-1)
        wrong = np.flatnonzero(np.abs(sums - 1.0) > ROW_SUM_TOLERANCE)
        if wrong.size:
            raise ValueError(
                f"transition: probabilities of {self._pair(wrong[0])} sum to {sums[wrong[0]]:.12g}, not 1 "
                f"(and {wrong.size - 1} more rows are wrong)"
            )

    def _checked_initial(self) -> Float[np.ndarray, " S"]:
        if self.initial is None:
            alive = ~self.terminal if not self.terminal.all() else np.ones(self.num_states, bool)
            return alive / alive.sum()
        initial = _array(self.initial, "initial")
        if initial.shape != (self.num_states,):
            raise ValueError(f"initial: one probability per state, [{self.num_states}], got {initial.shape}")
        if not np.isfinite(initial).all() or initial.min() < 0.0:
            raise ValueError("initial: probabilities must be finite and not negative")
        if abs(initial.sum() - 1.0) > ROW_SUM_TOLERANCE:
            raise ValueError(f"initial: probabilities sum to {initial.sum():.12g}, not 1")
        return initial


def _array(given: Any, name: str) -> np.ndarray:
    try:
        return np.array(given, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name}: a rectangular array of numbers is needed ({error})") from None


def _csr(given: Any) -> sp.csr_array:
    matrix = sp.csr_array(given, dtype=np.float64)
    if not matrix.has_canonical_format or (matrix.data == 0.0).any():
        matrix = matrix.copy()
        matrix.sum_duplicates()
        matrix.eliminate_zeros()
    return matrix
