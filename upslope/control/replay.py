"""Replay: a ring of observations in preallocated arrays, and the transitions between them.

Every observation is one row, written once, in the order in which it was seen; `ahead` says how many rows further on its
successor lies. An episode's final observation is a row from which no transition begins, whether the episode terminated
or was truncated: a transition's `next_observation` is always the true one, and an n-step window ends where the episode
does. `terminated` alone decides whether a target bootstraps.

Of a stack of frames only the newest is stored: the others lie in the rows before, `behind` says how many rows back the
last one is, and before an episode's first frame stands that frame itself (Gymnasium's `FrameStackObservation`).
"""

import functools
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from gymnasium import spaces
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from upslope.control import environments
from upslope.control.networks import Observation
from upslope.control.sum_tree import SumTree
from upslope.runs import checkpoint

FIELDS: list[Any] = [
    ("reward", np.float64),
    ("terminated", np.bool_),  # by a lost life as well, after which the episode goes on
    ("ahead", np.int32),  # rows to the successor; 0: no transition begins here
]
_NONE = np.zeros(0, dtype=np.int64)
SEGMENT_BYTES = 2**24  # of a checkpoint's segment, whose rows are a power of two between 256 and 65,536


class Rows(NamedTuple):
    """The replay's memory, whole, as tensors."""

    observation: dict[str, Tensor]  # "" for an observation that is not a Dict
    action: Tensor
    reward: Tensor
    terminated: Tensor
    ahead: Tensor
    behind: Tensor  # empty where an observation is no stack
    stack: int


class Drawn(NamedTuple):
    """Which transitions a gradient step learns from, and how far each goes; inside a program its arrays are tensors."""

    row: Int64[Any, " B"]  # where it begins in the replay
    weight: Float[Any, " B"] | None  # importance weights of prioritised sampling, at most 1; None: all 1
    gamma: float  # discount per step
    n: int  # steps


class Batch(NamedTuple):
    """B transitions for a gradient step; of n steps: the reward is their discounted sum, the successor n away."""

    observation: Observation  # as it was seen, not normalised
    action: Tensor
    reward: Float[Tensor, " B"]
    discount: Float[Tensor, " B"]  # of the successor's value: γ^n, 0 where the transition terminated
    next_observation: Observation
    weight: Float[Tensor, " B"]  # importance weights


def gather(rows: Rows, drawn: Drawn) -> Batch:
    """What `Replay.batch` gives, to the last bit, as operations on tensors: a program has these inside it."""
    row, weight, gamma, n = drawn
    size, real = len(rows.ahead), torch.get_default_dtype()
    reward, terminated = rows.reward.index_select(0, row), rows.terminated.index_select(0, row)
    following = (row + rows.ahead.index_select(0, row)) % size
    discount = torch.full_like(reward, gamma)
    for _ in range(n - 1):
        ahead = rows.ahead.index_select(0, following)
        stop = terminated | (ahead == 0)
        reward = reward + torch.where(stop, 0.0, discount * rows.reward.index_select(0, following))
        discount = torch.where(stop, discount, gamma * discount)
        terminated = torch.where(stop, terminated, rows.terminated.index_select(0, following))
        following = torch.where(stop, following, (following + ahead) % size)
    discount = discount.masked_fill(terminated, 0.0)
    weight = torch.ones(len(row)) if weight is None else weight.to(real)
    action = rows.action.index_select(0, row)
    return Batch(_seen(rows, row), action, reward.to(real), discount.to(real), _seen(rows, following), weight)


def _seen(rows: Rows, row: Int64[Tensor, " B"]) -> Observation:
    if rows.stack > 1:
        places = [row]
        for _ in range(rows.stack - 1):
            places.append((places[-1] - rows.behind.index_select(0, places[-1])) % len(rows.ahead))
        frames = torch.stack(places[::-1], 1).flatten()
        return rows.observation[""].index_select(0, frames).unflatten(0, (len(row), rows.stack))
    parts = {name: part.index_select(0, row) for name, part in rows.observation.items()}
    return parts.get("", parts)


class Ring(NamedTuple):
    """Where a program stands in the replay's memory, which it writes itself."""

    open: Int64[Tensor, " N"]  # the row each environment stands at
    written: Int64[Tensor, ""]  # rows since the beginning


class Replay:
    """The last transitions of N environments.

    Args:
        space: of one observation; a Dict is stored key by key.
        action_space: of one action.
        num_envs: N.
        capacity: rows, one for each observation: as many as transitions, and one more for each episode's end.
        prioritised: keep priorities; else sample uniformly.
        stack: frames along an observation's first axis, each stored once; 1: an observation is no stack.
    """

    def __init__(
        self,
        space: spaces.Space,
        action_space: spaces.Space,
        num_envs: int,
        capacity: int,
        prioritised: bool = False,
        stack: int = 1,
    ) -> None:
        if capacity < 4 * num_envs + 1:
            raise ValueError(f"replay_capacity is {capacity}, allowed: {4 * num_envs + 1} or more with {num_envs} envs")
        self.capacity, self.num_envs, self.stack = capacity, num_envs, stack
        parts = space.spaces if isinstance(space, spaces.Dict) else {"": space}
        first = 1 if stack > 1 else 0  # of the shape of what is stored
        self.observation = {
            name: np.zeros((capacity, *(part.shape or ())[first:]), _stored(part)) for name, part in parts.items()
        }
        shape = (math.prod(action_space.shape),) if isinstance(action_space, spaces.Box) else action_space.shape
        fields = [("action", _stored(action_space), shape), *FIELDS]
        self.table = np.zeros(capacity, np.dtype(fields, align=True))  # what is read together lies together
        self.action, self.reward, self.terminated, self.ahead = (self.table[name] for name, *_ in fields)
        self.behind = np.zeros(capacity if stack > 1 else 0, dtype=np.int32)  # rows to the episode's last one, or 0
        observed = {name: torch.from_numpy(part) for name, part in self.observation.items()}
        columns = {name: torch.from_numpy(getattr(self, name)) for name in Rows._fields[1:-1]}
        self.rows = Rows(observed, **columns, stack=stack)  # the same memory
        self.written = 0  # rows since the beginning; row r lies at r modulo the capacity
        self.transitions = 0  # since the beginning
        self.open = np.zeros(num_envs, dtype=np.int64)  # the row each environment stands at
        self._first = np.arange(num_envs)
        row = sum(part[:1].nbytes for part in self._columns().values())
        self.segment = 2 ** min(max(int(math.log2(SEGMENT_BYTES / row)), 8), 16)  # rows of a segment of a checkpoint
        self.tree = SumTree(capacity) if prioritised else None
        self.highest = 1.0  # priority so far, which new transitions get

    def begin(self, observation: environments.Observation) -> None:
        """The observations that the first actions answer."""
        self.open = self._write(observation)

    def append(self, action: np.ndarray, step: environments.Transition) -> None:
        """One step of every environment; reset rows of NEXT_STEP environments are no transitions."""
        if self.num_envs == 1 and self.stack == 1 and self.tree is None and step.valid is None and not step.ended[0]:
            self._append_one(action, step)
            return
        begun, first = self.open, int(self.open[0])
        over = _NONE if step.valid is not None else step.ended.nonzero()[0]
        finals = self._write(_take(step.next_observation, over), begun[over]) if len(over) else over
        last = None
        if self.stack > 1:
            last = np.where(step.ended if step.valid is None else ~step.valid, -1, begun)
        self.open = self._write(step.observation, last)
        ahead = self.open - begun
        if len(over):
            ahead[over] = finals - begun[over]
        action = action.reshape(self.num_envs, *self.action.shape[1:])
        columns = (self.action, self.reward, self.terminated, self.ahead)
        values = (action, step.reward, step.terminated, ahead)
        took: Any = slice(None) if step.valid is None else step.valid
        slots = self._slots(first, self.num_envs) if step.valid is None else begun[took] % self.capacity
        for column, value in zip(columns, values, strict=True):
            column[slots] = value[took]
        self.transitions += self.num_envs if step.valid is None else int(step.valid.sum())
        if self.tree is not None:  # the rows since `first` lie in a row
            priority = np.zeros(self.written - first)
            priority[: self.num_envs][took] = self.highest
            self.tree.set(np.arange(first, self.written) % self.capacity, priority)

    def ring(self) -> Ring:
        """For a program that writes into this memory; what it has written is told to `advance`."""
        return Ring(torch.from_numpy(self.open.copy()), torch.tensor(self.written))

    def advance(self, ring: Ring, transitions: int) -> None:
        """Take note of transitions that were written inside a program."""
        self.open, self.written = ring.open.numpy().copy(), int(ring.written)
        self.transitions += transitions

    def _append_one(self, action: np.ndarray, step: environments.Transition) -> None:
        """The same for one environment whose episode goes on: three assignments instead of a dozen operations."""
        here, there = (self.written - 1) % self.capacity, self.written % self.capacity
        parts = step.observation if isinstance(step.observation, dict) else {"": step.observation}
        for name, part in parts.items():
            self.observation[name][there] = part[0]
        self.table[here] = action.reshape(self.action.shape[1:]), step.reward[0], step.terminated[0], 1
        self.ahead[there] = 0
        self.open = self._first + self.written
        self.written += 1
        self.transitions += 1

    def _write(
        self, observation: environments.Observation, last: Int64[np.ndarray, " k"] | None = None
    ) -> Int64[np.ndarray, " k"]:
        """New rows from which no transition begins yet, over the oldest ones.

        `last` are the rows before them, -1 where an episode begins; None: everywhere.
        """
        parts = observation if isinstance(observation, dict) else {"": observation}
        rows = self._first[: len(next(iter(parts.values())))] + self.written
        slots = self._slots(self.written, len(rows))
        if self.stack > 1:
            parts = {name: part[:, -1] for name, part in parts.items()}
            if self.tree is not None and self.written >= self.capacity:
                self._forget(rows % self.capacity)
            self.behind[slots] = 0 if last is None else np.where(last < 0, 0, rows - last)
        for name, part in parts.items():
            self.observation[name][slots] = part
        self.ahead[slots] = 0
        self.written += len(rows)
        return rows

    def _slots(self, first: int, count: int) -> slice | Int64[np.ndarray, " count"]:
        """Where so many rows from the first on lie: a slice, unless they go over the end."""
        first %= self.capacity
        after = first + count
        return slice(first, after) if after <= self.capacity else np.arange(first, after) % self.capacity

    def _forget(self, slots: Int64[np.ndarray, " k"]) -> None:
        """No priority for rows whose stacks lose the frames of these rows."""
        assert self.tree is not None
        for _ in range(self.stack - 1):
            slots = ((slots + self.ahead[slots]) % self.capacity)[self.ahead[slots] > 0]
            self.tree.set(slots, 0.0)

    def usable(self, row: Int64[np.ndarray, " k"]) -> Bool[np.ndarray, " k"]:
        """Whether a transition begins at these rows and all frames of its stack are still here."""
        found = self.ahead[row] > 0
        if self.stack > 1:
            age = (self.written - 1 - row) % self.capacity  # rows since
            for _ in range(self.stack - 1):
                back = self.behind[row]
                age, row = age + back, (row - back) % self.capacity
                found &= age < min(self.written, self.capacity)
        return found

    def uniform(self, size: int, places: Int64[np.ndarray, " k"]) -> Int64[np.ndarray, " B"]:
        """Rows of transitions, each as likely as any other, with replacement: the first that the places fall on.

        Args:
            size: B.
            places: random, from 0 to 2^62, modulo the rows there are; rows without a transition are passed over.
        """
        filled = min(self.written, self.capacity)
        row = places % filled
        row = row[self.usable(row)]
        if len(row) < size:  # where episodes are short: the places have more than one digit
            second = places // filled % filled
            row = np.concatenate((row, second[self.usable(second)]))
        if len(row) < size:  # seldom, unless episodes are short: more places, which follow from these
            more = torch.Generator().manual_seed(int(places[0]))
            while len(row) < size:
                places = torch.randint(filled, (size,), generator=more).numpy()
                row = np.concatenate((row, places[self.usable(places)]))
        return row[:size]

    def prioritised(
        self, places: Float[np.ndarray, " B"], beta: float
    ) -> tuple[Int64[np.ndarray, " B"], Float[np.ndarray, " B"]]:
        """Rows with probability P(i) = p_i^α / Σ p^α, one from each of B equal parts of the sum; importance weights.

        The places, uniform in [0, 1), say where within its part each lies.

        w_i = (1 / (N P(i)))^β, divided by the largest of the batch so that they only scale steps down (Schaul et al.
        2016, 3.4).
        """
        assert self.tree is not None
        share = (np.arange(len(places)) + places) / len(places)
        row = self.tree.find(share)
        rare = self.tree.leaves.take(row)
        return row, (rare.min() / rare) ** beta  # N and Σ p^α cancel

    def prioritise(
        self, row: Int64[np.ndarray, " B"], error: Float[np.ndarray, " B"], alpha: float, epsilon: float
    ) -> None:
        """p^α = (|δ| + ε)^α of transitions that were just learned from."""
        assert self.tree is not None
        priority = (np.abs(error).astype(np.float64) + epsilon) ** alpha
        self.highest = max(self.highest, float(priority.max()))
        self.tree.set(row, priority)

    def recent(self, count: int) -> Int64[np.ndarray, " count"]:
        """Rows of the last transitions, oldest first."""
        span = min(self.written, self.capacity, 3 * count + 2 * self.num_envs)
        slots = np.arange(self.written - span, self.written) % self.capacity
        return slots[self.usable(slots)][-count:]

    def batch(
        self, row: Int64[np.ndarray, " B"], gamma: float, n: int = 1, weight: Float[np.ndarray, " B"] | None = None
    ) -> Batch:
        """The transitions that begin at these rows, n steps long or to the episode's end or the newest observation."""
        first = last = self.table.take(row)
        discount: Any
        reward, discount, following = first["reward"], gamma, (row + first["ahead"]) % self.capacity
        for _ in range(n - 1):
            further = self.table.take(following)
            stop = last["terminated"] | (further["ahead"] == 0)
            reward = reward + np.where(stop, 0.0, discount * further["reward"])
            discount = np.where(stop, discount, gamma * discount)
            following = np.where(stop, following, (following + further["ahead"]) % self.capacity)
            last = np.where(stop, last, further)
        discount = np.where(last["terminated"], 0.0, discount)
        real = _float()
        return Batch(
            self._observed(row),
            torch.from_numpy(first["action"].copy()),
            torch.from_numpy(reward.astype(real)),
            torch.from_numpy(discount.astype(real)),
            self._observed(following),
            torch.ones(len(row)) if weight is None else torch.from_numpy(weight.astype(real)),
        )

    def _observed(self, row: Int64[np.ndarray, " B"]) -> Observation:
        if self.stack > 1:
            rows = [row]
            for _ in range(self.stack - 1):
                rows.append((rows[-1] - self.behind[rows[-1]]) % self.capacity)
            return torch.from_numpy(self.observation[""].take(np.stack(rows[::-1], 1), 0))
        parts = {name: torch.from_numpy(part.take(row, 0)) for name, part in self.observation.items()}
        return parts.get("", parts)

    def segments(self) -> checkpoint.Segments:
        """Blocks of rows that will not change any more and are still here whole: name -> the block as tensors."""
        size, (first, after) = self.segment, self._blocks()
        return {
            f"replay-{start // size:08d}": functools.partial(self._rows, np.arange(start, start + size))
            for start in range(first, after, size)
        }

    def pack(self) -> dict[str, Tensor]:
        """What is in no segment: the oldest and the newest rows, where the environments stand, priorities."""
        loose = {f"replay.{name}": part for name, part in self._rows(self._loose()).items()}
        counts = torch.tensor([self.written, self.transitions, self.segment, *self.open])
        tensors = {**loose, "replay.counts": counts, "replay.highest": torch.tensor(self.highest, dtype=torch.float64)}
        if self.tree is not None:  # they change all the time
            tensors["replay.priority"] = torch.from_numpy(self.tree.leaves[: min(self.written, self.capacity)])
        return tensors

    def unpack(self, tensors: dict[str, Tensor], segments: Mapping[str, Path]) -> None:
        """Be as the replay that `pack` and `segments` put away."""
        counts = tensors["replay.counts"].numpy()
        self.written, self.transitions, self.segment = (int(count) for count in counts[:3])
        self.open = counts[3:].copy()
        self.highest = float(tensors["replay.highest"])
        ours = {name.removeprefix("replay."): part for name, part in tensors.items() if name.startswith("replay.")}
        self._place(self._loose(), ours)
        for start, path in zip(range(*self._blocks(), self.segment), sorted(segments.values()), strict=True):
            self._place(np.arange(start, start + self.segment), checkpoint.read_segment(path))
        if self.tree is not None:
            priority = tensors["replay.priority"].numpy()
            self.tree.set(np.arange(len(priority)), priority)

    def _blocks(self) -> tuple[int, int]:
        """The first row of the first segment and the first row after the last one; equal where there is none."""
        oldest, size = max(0, self.written - self.capacity), self.segment
        first = -(-oldest // size) * size
        return first, max(first, int(self.open.min()) // size * size)

    def _loose(self) -> Int64[np.ndarray, " k"]:
        first, after = self._blocks()
        rows = np.arange(max(0, self.written - self.capacity), self.written)
        return rows[(rows < first) | (rows >= after)]

    def _rows(self, row: Int64[np.ndarray, " k"]) -> dict[str, Tensor]:
        return {name: torch.from_numpy(part[row % self.capacity]) for name, part in self._columns().items()}

    def _place(self, row: Int64[np.ndarray, " k"], tensors: dict[str, Tensor]) -> None:
        for name, part in self._columns().items():
            part[row % self.capacity] = tensors[name].numpy()

    def _columns(self) -> dict[str, np.ndarray]:
        names = ("action", "reward", "terminated", "ahead", *(("behind",) if self.stack > 1 else ()))
        observed = {f"observation.{name}": part for name, part in self.observation.items()}
        return observed | {name: getattr(self, name) for name in names}


def _stored(space: spaces.Space) -> Any:
    """Floats in the default type, the rest as it is."""
    return _float() if np.issubdtype(space.dtype, np.floating) else space.dtype


def _float() -> Any:
    """PyTorch's default type, as NumPy's."""
    return np.dtype(str(torch.get_default_dtype()).removeprefix("torch."))


def _take(observation: environments.Observation, index: np.ndarray) -> environments.Observation:
    return {k: v[index] for k, v in observation.items()} if isinstance(observation, dict) else observation[index]
