"""Drawing transitions from an MDP: many at once in NumPy, and as a tensor environment of parallel chains.

One table serves all: entry e of row (s, a) owns the interval (cdf[e−1], cdf[e]] inside (row, row + 1], so one binary
search over all rows together turns a row and a uniform number into a next state. The row number costs precision:
probabilities are exact to about 1e-16 · rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, Int64
from torch import Tensor

from upslope.exact.mdp import MDP


class Outcomes(NamedTuple):
    """Where every (s, a) can lead, ready to be drawn from."""

    cdf: Float[np.ndarray, " entries"]
    first: Int[np.ndarray, " rows"]
    next_state: Int[np.ndarray, " entries"]
    reward: Float[np.ndarray, " entries"]
    reward_std: Float[np.ndarray, " rows"] | None
    start_cdf: Float[np.ndarray, " S"]
    terminal: Bool[np.ndarray, " S"]
    num_actions: int


def outcomes(mdp: MDP) -> Outcomes:
    """The table of an MDP."""
    pointers, data = mdp.matrix.indptr, mdp.matrix.data
    rows = np.repeat(np.arange(len(pointers) - 1), np.diff(pointers))
    total = np.cumsum(data)
    before = np.concatenate([[0.0], total])[pointers[:-1]]
    cdf = rows + np.clip(total - before[rows], 0.0, 1.0)
    cdf[pointers[1:] - 1] = np.arange(1, len(pointers))  # a row ends where the next begins, whatever rounding says
    initial = np.asarray(mdp.initial)
    start = np.cumsum(initial)
    start[np.flatnonzero(initial)[-1] :] = 1.0
    std = None if mdp.reward_std is None else mdp.reward_std.reshape(-1)
    first, next_state = pointers[:-1].astype(np.int64), mdp.matrix.indices.astype(np.int64)
    return Outcomes(cdf, first, next_state, mdp.entry_reward, std, start, mdp.terminal, mdp.num_actions)


def draw_start(table: Outcomes, uniform: Float[np.ndarray, "*batch"]) -> Int[np.ndarray, "*batch"]:
    """s_0 ~ ρ₀ from uniform numbers in [0, 1)."""
    return np.searchsorted(table.start_cdf, 1.0 - uniform)


def draw(
    table: Outcomes,
    state: Int[np.ndarray, "*batch"],
    action: Int[np.ndarray, "*batch"],
    generator: np.random.Generator,
) -> tuple[Int[np.ndarray, "*batch"], Float[np.ndarray, "*batch"]]:
    """(s', r) drawn from P(·|s, a), one per element.

    >>> coin = outcomes(MDP([[[0.5, 0.5]], [[0.0, 1.0]]], [[1.0], [0.0]], gamma=0.9))
    >>> draw(coin, np.array([1, 1]), np.array([0, 0]), np.random.default_rng(0))[0].tolist()
    [1, 1]
    """
    row = state * table.num_actions + action
    entry = np.maximum(np.searchsorted(table.cdf, row + (1.0 - generator.random(row.shape))), table.first[row])
    reward = table.reward[entry]
    if table.reward_std is not None:
        reward = reward + table.reward_std[row] * generator.standard_normal(row.shape)
    return table.next_state[entry], reward


class Chains(NamedTuple):
    """State of parallel chains: the MDP's states [B], steps into the episode [B], and the counter of the noise."""

    observation: Int64[Tensor, " batch"]
    time: Int64[Tensor, " batch"]
    counter: Int64[Tensor, ""]


@dataclass(frozen=True, eq=False)
class BatchedMDP:
    """An MDP as a tensor environment: `reset(generator) -> state`, `step(state, action) -> state, reward, terminated,
    truncated`, for `batch` independent chains, without Python per chain and without hidden randomness.

    The noise of a step is a function of (seed, step, chain) (splitmix64, Steele et al. 2014): the same state gives the
    same transition, and a compiled program draws the same numbers. Or pass `noise`, uniform in [0, 1), which is faster
    when drawn as a block. Steps do not reset: the state after a termination is the final one; `restart` begins new
    episodes where asked to.

    The problem's own horizon *terminates* (beyond it nothing counts); `time_limit` *truncates*.

    >>> from upslope.exact import zoo
    >>> chains = BatchedMDP(zoo.random_walk(), batch=3)
    >>> state = chains.reset(torch.Generator().manual_seed(0))
    >>> state, reward, terminated, truncated = chains.step(state, torch.zeros(3, dtype=torch.int64))
    >>> sorted({2, 4} | set(state.observation.tolist())), terminated.tolist()
    ([2, 4], [False, False, False])
    """

    mdp: MDP
    batch: int
    time_limit: int | None = None

    def __post_init__(self) -> None:
        if self.batch < 1 or (self.time_limit is not None and self.time_limit < 1):
            raise ValueError(f"batch and time_limit: positive, got {self.batch} and {self.time_limit}")

    @cached_property
    def _table(self) -> dict[str, Tensor]:
        table = outcomes(self.mdp)
        tensors = {k: torch.from_numpy(np.ascontiguousarray(v)) for k, v in table._asdict().items() if np.ndim(v)}
        counts = np.diff(self.mdp.matrix.indptr)
        if counts.max() <= WIDEST_ROW:  # a search in one short row beats one over all of them
            rows = np.ones((len(counts), counts.max()))
            owner = np.repeat(np.arange(len(counts)), counts)
            rows[owner, np.arange(len(owner)) - table.first[owner]] = table.cdf - owner
            tensors["rows"] = torch.from_numpy(rows)
        lane = torch.arange(self.batch) * _signed(0xD1B54A32D192ED03)
        return tensors | {"lanes": torch.stack([lane + _signed(k * GOLDEN % 2**64) for k in range(STREAMS)])}

    def reset(self, generator: torch.Generator) -> Chains:
        """New episodes in all chains, from the generator's next number."""
        zero = torch.zeros(self.batch, dtype=torch.int64)
        state = Chains(zero, zero, torch.randint(-(2**63), 2**63 - 1, (), generator=generator))
        return self.restart(state, zero == 0)

    def restart(
        self, state: Chains, ended: Bool[Tensor, " batch"], noise: Float[Tensor, " batch"] | None = None
    ) -> Chains:
        """New episodes where `ended`."""
        noise = self._uniform(state, stream=1) if noise is None else noise
        fresh = torch.searchsorted(self._table["start_cdf"], 1.0 - noise)
        observation = torch.where(ended, fresh, state.observation)
        return state._replace(observation=observation, time=state.time.masked_fill(ended, 0))

    def step(
        self, state: Chains, action: Int64[Tensor, " batch"], noise: Float[Tensor, " batch"] | None = None
    ) -> tuple[Chains, Float[Tensor, " batch"], Bool[Tensor, " batch"], Bool[Tensor, " batch"]]:
        """One transition in every chain; rewards are float64."""
        table = self._table
        row = torch.add(action, state.observation, alpha=self.mdp.num_actions)
        level = 1.0 - (self._uniform(state, stream=0) if noise is None else noise)  # in (0, 1]
        if "rows" in table:
            own = table["rows"].index_select(0, row)  # a third of the time of table["rows"][row], as below
            entry = table["first"].index_select(0, row) + torch.searchsorted(own, level.unsqueeze(-1)).squeeze(-1)
        else:
            entry = torch.maximum(torch.searchsorted(table["cdf"], row + level), table["first"][row])
        observation, reward = table["next_state"].index_select(0, entry), table["reward"].index_select(0, entry)
        if "reward_std" in table:
            normal = torch.special.ndtri(self._uniform(state, stream=2).clamp(min=2.0**-54))
            reward = reward + table["reward_std"][row] * normal
        time = state.time + 1
        terminated = table["terminal"].index_select(0, observation)
        if self.mdp.horizon is not None:
            terminated = terminated | (time >= self.mdp.horizon)
        truncated = torch.zeros_like(terminated)
        if self.time_limit is not None:
            truncated = (time >= self.time_limit) & ~terminated
        return (
            Chains(observation, time, state.counter + _signed(STRIDE)),
            reward,
            terminated,
            truncated,
        )

    @cached_property
    def _ahead(self) -> dict[int, tuple[int, Float[Tensor, "steps batch"]]]:
        """Per stream: a counter, and the uniform numbers of the steps from it on."""
        return dict.fromkeys(range(STREAMS), (0, torch.empty(0, self.batch, dtype=torch.float64)))

    def _uniform(self, state: Chains, stream: int) -> Float[Tensor, " batch"]:
        """Uniform numbers in [0, 1) with 53 bits, one per chain.

        Small tensors cost their calls, not their arithmetic, so whoever walks on gets many steps' numbers at once.
        """
        if torch.compiler.is_compiling():
            return self._hash(state.counter, stream)
        counter, (first, block) = int(state.counter), self._ahead[stream]
        step = (counter - first) * PER_STRIDE % 2**64
        if step >= len(block):
            steps = max(1, min(AHEAD // self.batch, 2 * len(block))) if step == len(block) else 1
            counters = state.counter + torch.arange(steps).unsqueeze(-1) * _signed(STRIDE)
            first, block, step = counter, self._hash(counters, stream).view(steps, self.batch), 0
            self._ahead[stream] = first, block
        return block[step]

    def _hash(self, counter: Int64[Tensor, "*steps"], stream: int) -> Float[Tensor, "*steps_batch"]:
        bits = self._table["lanes"][stream] + counter  # its own memory, so what follows may write into it
        bits ^= (bits >> 30).bitwise_and_(2**34 - 1)
        bits *= _signed(0xBF58476D1CE4E5B9)
        bits ^= (bits >> 27).bitwise_and_(2**37 - 1)
        bits *= _signed(0x94D049BB133111EB)
        bits ^= (bits >> 31).bitwise_and_(2**33 - 1)
        return (bits >> 11).bitwise_and_(2**53 - 1).double().mul_(2.0**-53)


WIDEST_ROW = 64
STREAMS = 3  # transition, start, reward noise
GOLDEN = 0x9E3779B97F4A7C15
STRIDE = STREAMS * GOLDEN % 2**64  # of the counter, a step
PER_STRIDE = pow(STRIDE, -1, 2**64)  # its inverse: steps of a counter's difference
AHEAD = 2**16  # uniform numbers drawn at once


def _signed(word: int) -> int:
    """The int64 with the bits of a 64-bit word."""
    return word - 2**64 if word >= 2**63 else word
