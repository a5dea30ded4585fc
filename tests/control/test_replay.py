"""Replay: every transition is the one that happened, whatever the autoreset mode; sampling is what it says it is."""

import math
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from gymnasium import spaces
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from upslope.control import environments, native, replay, sum_tree
from upslope.control.replay import Replay
from upslope.control.sum_tree import SumTree
from upslope.runs import checkpoint

FLAT = spaces.Box(-np.inf, np.inf, (3,), np.float32)
IMAGE = spaces.Box(0, 255, (4, 4, 3), np.uint8)
DICT = spaces.Dict({"image": IMAGE, "numbers": FLAT, "place": spaces.Discrete(7)})


class Step(NamedTuple):
    """One transition as it happened, in a plain list."""

    observation: Any
    action: Any
    reward: float
    terminated: bool
    ended: bool
    next_observation: Any


def stream(space: spaces.Space, n: int, steps: int, mode: str, seed: int) -> tuple[Any, list[Any], list[list[Step]]]:
    """Observations at the start, (action, Transition) of every step, and the transitions of each environment by hand.

    Episodes end at random, terminated or truncated; a life may be lost within. Every observation is another.
    """
    random = np.random.default_rng(seed)

    def fresh(count: int) -> Any:
        def one(part: spaces.Space) -> np.ndarray:
            if part.dtype == np.uint8:
                return random.integers(0, 256, (count, *part.shape), dtype=np.uint8)
            if isinstance(part, spaces.Discrete):
                return random.integers(0, 7, count)
            return random.normal(size=(count, *part.shape)).astype(np.float32)

        return {k: one(v) for k, v in space.spaces.items()} if isinstance(space, spaces.Dict) else one(space)

    def pick(observation: Any, i: int) -> Any:
        return {k: v[i] for k, v in observation.items()} if isinstance(observation, dict) else observation[i]

    def where(mask: np.ndarray, this: Any, that: Any) -> Any:
        if isinstance(this, dict):
            return {k: where(mask, this[k], that[k]) for k in this}
        return np.where(mask.reshape(-1, *[1] * (this.ndim - 1)), this, that)

    first = observation = fresh(n)
    owed = np.zeros(n, bool)
    happened, true = [], [[] for _ in range(n)]
    for _ in range(steps):
        action, reward = random.integers(0, 5, n), random.normal(size=n)
        ended = (random.random(n) < 0.2) & ~owed
        terminated = ended & (random.random(n) < 0.5)
        lost = (random.random(n) < 0.05) & ~ended & ~owed
        successor = fresh(n)
        following = successor if mode == "next-step" else where(ended, fresh(n), successor)
        valid = ~owed if mode == "next-step" else None
        for i in range(n):
            if not owed[i]:
                true[i].append(
                    Step(pick(observation, i), action[i], reward[i], terminated[i] | lost[i], ended[i],
                         pick(successor, i))
                )  # fmt: skip
        happened.append(
            (action, environments.Transition(
                successor, following, reward, terminated | lost, ended & ~terminated, ended, valid))
        )  # fmt: skip
        observation, owed = following, ended if mode == "next-step" else owed
    return first, happened, true


def filled(
    space: spaces.Space, n: int, steps: int, mode: str, capacity: int, prioritised: bool = False
) -> tuple[Replay, list[list[Step]]]:
    first, happened, true = stream(space, n, steps, mode, seed=steps)
    memory = Replay(space, spaces.Discrete(5), n, capacity, prioritised)
    memory.begin(first)
    for action, step in happened:
        memory.append(action, step)
    return memory, true


def rows(memory: Replay) -> np.ndarray:
    return np.flatnonzero(memory.ahead)


def equal(one: Any, other: Any) -> bool:
    if isinstance(one, dict):
        return all(equal(one[k], other[k]) for k in one)
    return np.array_equal(np.asarray(one), np.asarray(other))


def fields(batch: replay.Batch) -> list[tuple[torch.dtype, torch.Size, bytes]]:
    """Type, shape and bytes of all that a batch is made of."""
    parts = [part for field in batch for part in (field.values() if isinstance(field, dict) else [field])]
    return [(part.dtype, part.shape, part.numpy().tobytes()) for part in parts]


def gathered(memory: Replay, row: np.ndarray, n: int) -> list[tuple[torch.dtype, torch.Size, bytes]]:
    """What a program makes of the same rows."""
    return fields(replay.gather(memory.rows, replay.Drawn(torch.from_numpy(row), None, 0.9, n)))


def name(observation: Any) -> bytes:
    """No two observations have the same bytes."""
    parts = observation.values() if isinstance(observation, dict) else [observation]
    return b"".join(np.asarray(part).tobytes() for part in parts)


def window(steps: list[Step], start: int, n: int, gamma: float) -> tuple[float, float, Any]:
    """Reward, discount and successor of n steps, by the definition."""
    total, discount = 0.0, 1.0
    for step in steps[start : start + n]:
        total += discount * step.reward
        discount *= gamma
        if step.terminated:
            return total, 0.0, step.next_observation
        if step.ended:
            break
    return total, discount, step.next_observation


@pytest.mark.parametrize("space", [FLAT, IMAGE, DICT], ids=["flat", "image", "dict"])
@pytest.mark.parametrize("mode", ["same-step", "next-step"])
@pytest.mark.parametrize(("n", "capacity"), [(1, 1000), (3, 1000), (1, 20), (3, 50)])
@pytest.mark.parametrize("length", [1, 3])
def test_every_transition_is_the_one_that_happened(
    space: spaces.Space, mode: str, n: int, capacity: int, length: int
) -> None:
    memory, true = filled(space, n, 60, mode, capacity)
    here = rows(memory)
    assert memory.transitions == sum(map(len, true))
    if capacity == 1000:  # nothing was forgotten
        assert len(here) == memory.transitions
    else:  # rows without a transition are finals and those the environments stand at
        assert len(here) > capacity // 2
    batch = memory.batch(here, 0.9, length)
    assert gathered(memory, here, length) == fields(batch)
    found = set()
    places: dict[bytes, list[tuple[int, int]]] = {}
    for i, steps in enumerate(true):
        for t, step in enumerate(steps):
            places.setdefault(name(step.observation), []).append((i, t))
    for k in range(len(here)):
        observation = {a: b[k] for a, b in batch.observation.items()} if isinstance(space, spaces.Dict) else (
            batch.observation[k]
        )  # fmt: skip
        after = {a: b[k] for a, b in batch.next_observation.items()} if isinstance(space, spaces.Dict) else (
            batch.next_observation[k]
        )  # fmt: skip
        ((i, t),) = places[name(observation)]
        found.add((i, t))
        reward, discount, successor = window(true[i], t, length, 0.9)
        assert int(batch.action[k]) == true[i][t].action
        np.testing.assert_allclose(float(batch.reward[k]), reward, rtol=1e-6, atol=1e-6)
        np.testing.assert_allclose(float(batch.discount[k]), discount, rtol=1e-6)
        assert equal(successor, after)
    for i in range(n):  # what is kept is the newest
        kept = sorted(t for j, t in found if j == i)
        assert kept == list(range(len(true[i]) - len(kept), len(true[i])))


def test_a_limit_does_not_end_the_value() -> None:
    """Truncated: bootstrap from the final observation; terminated: nothing beyond; a lost life: the same, no reset."""
    memory = Replay(FLAT, spaces.Discrete(2), 1, 100)
    o = [np.full((1, 3), k, np.float32) for k in range(8)]
    yes, no = np.array([True]), np.array([False])
    one = np.ones(1)
    memory.begin(o[0])
    memory.append(np.array([0]), environments.Transition(o[1], o[1], one, no, no, no, None))
    memory.append(np.array([1]), environments.Transition(o[2], o[3], one, no, yes, yes, None))  # cut at 2, begins at 3
    memory.append(np.array([0]), environments.Transition(o[4], o[4], one, yes, no, no, None))  # a life
    memory.append(np.array([1]), environments.Transition(o[5], o[6], one, yes, no, yes, None))  # over at 5, begins at 6
    here = rows(memory)
    single, double = memory.batch(here, 0.5), memory.batch(here, 0.5, 2)
    assert single.observation[:, 0].tolist() == [0, 1, 3, 4]
    assert single.next_observation[:, 0].tolist() == [1, 2, 4, 5]
    assert single.discount.tolist() == [0.5, 0.5, 0, 0]
    assert double.next_observation[:, 0].tolist() == [2, 2, 4, 5]
    assert double.reward.tolist() == [1.5, 1, 1, 1]
    assert double.discount.tolist() == [0.25, 0.5, 0, 0]
    assert memory.action[here].tolist() == [0, 1, 0, 1]


def test_observations_are_stored_once_and_in_place() -> None:
    memory, _ = filled(IMAGE, 1, 500, "same-step", 64)
    assert memory.observation[""].nbytes == 64 * 48
    assert memory.written > 500  # and the ring has gone round


def test_recent_are_the_last_in_order() -> None:
    for mode in ("same-step", "next-step"):
        memory, true = filled(FLAT, 3, 60, mode, 400)
        rewards = sorted(step.reward for steps in true for step in steps[-2:])
        here = memory.recent(6)
        assert len(here) == 6
        if mode == "same-step":
            assert sorted(memory.reward[here]) == rewards
        count = memory.transitions
        assert len(memory.recent(count)) == count


# Stacks of frames

FRAME = spaces.Box(0, 255, (2, 3), np.uint8)
STACK = spaces.Box(0, 255, (4, 2, 3), np.uint8)


def stacked(first: Any, happened: list[Any], mode: str) -> tuple[Any, list[Any]]:
    """The same stream as `FrameStackObservation(env, 4)` gives it: a reset repeats its frame."""
    seen, owed, made = np.repeat(first[:, None], 4, 1), np.zeros(len(first), bool), []
    begun = seen
    for action, step in happened:
        after = np.concatenate([seen[:, 1:], step.next_observation[:, None]], 1)
        after = np.where(owed[:, None, None, None], np.repeat(step.next_observation[:, None], 4, 1), after)
        seen = after
        if mode == "same-step":
            again = np.repeat(step.observation[:, None], 4, 1)
            seen = np.where(step.ended[:, None, None, None], again, after)
        owed = step.ended if mode == "next-step" else owed
        made.append((action, step._replace(next_observation=after, observation=seen)))
    return begun, made


@pytest.mark.parametrize("mode", ["same-step", "next-step"])
@pytest.mark.parametrize(("n", "capacity"), [(1, 1000), (3, 1000), (1, 30), (3, 60)])
@pytest.mark.parametrize("prioritised", [False, True])
@pytest.mark.parametrize("length", [1, 3])
def test_frames_are_stored_once_and_stacks_are_those_of_the_environment(
    mode: str, n: int, capacity: int, prioritised: bool, length: int
) -> None:
    """Beside a replay of whole stacks: the same transitions to the byte, but those whose oldest frames are gone."""
    first, happened = stacked(*stream(FRAME, n, 90, mode, seed=3)[:2], mode)
    whole = Replay(STACK, spaces.Discrete(5), n, capacity)
    once = Replay(STACK, spaces.Discrete(5), n, capacity, prioritised, stack=4)
    assert once.observation[""].nbytes * 4 == whole.observation[""].nbytes
    for memory in (whole, once):
        memory.begin(first)
    lost = 0
    for action, step in happened:
        for memory in (whole, once):
            memory.append(action, step)
        here = rows(whole)
        usable = here[once.usable(here)]
        lost += len(here) - len(usable)
        ours, theirs = (memory.batch(usable, 0.9, length) for memory in (once, whole))
        for name_, mine in ours._asdict().items():
            assert np.array_equal(np.asarray(mine), np.asarray(getattr(theirs, name_))), name_
        assert gathered(once, usable, length) == fields(ours)
    oldest = whole.written - min(whole.written, capacity)
    youngest = whole.written - 1 - (whole.written - 1 - here) % capacity
    assert set(here) - set(usable) <= set(here[youngest < oldest + 3 * 2 * n])  # few, and the oldest
    assert (lost > 0) == (whole.written > capacity)
    if prioritised:
        assert once.tree is not None
        assert set(np.flatnonzero(once.tree.leaves)) == set(usable)
    drawn = once.uniform(5_000, places(6_000, 0))
    assert set(drawn) == set(usable)


def test_a_replay_of_frames_is_put_away_and_taken_up(tmp_path: Path) -> None:
    first, happened = stacked(*stream(FRAME, 2, 700, "same-step", seed=5)[:2], "same-step")
    one, other = (Replay(STACK, spaces.Discrete(5), 2, 1000, stack=4) for _ in range(2))
    one.segment = 256
    one.begin(first)
    for action, step in happened:
        one.append(action, step)
    assert one.segments()
    path = checkpoint.write(tmp_path, 1, one.pack(), {}, segments=one.segments())
    found = checkpoint.newest(tmp_path)
    assert found is not None
    other.unpack(found.tensors, found.segments)
    here = rows(one)[one.usable(rows(one))]
    assert here.tolist() == rows(other)[other.usable(rows(other))].tolist()
    for mine, theirs in zip(one.batch(here, 0.9, 2), other.batch(here, 0.9, 2), strict=True):
        assert np.array_equal(np.asarray(mine), np.asarray(theirs))
    assert path.exists()


def places(count: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 2**62, count)


@pytest.mark.parametrize("count", [300_000, 8])  # places: enough, and so few that nearly all are drawn again
def test_uniform_is_uniform(count: int) -> None:
    memory, _ = filled(FLAT, 3, 200, "same-step", 90)
    here = rows(memory)
    assert len(here) < 90
    drawn = memory.uniform(100_000, places(count, 1))
    assert len(drawn) == 100_000
    assert np.array_equal(drawn, memory.uniform(100_000, places(count, 1)))
    counts = np.bincount(drawn, minlength=90)
    assert counts.sum() == counts[here].sum()
    assert stats.chisquare(counts[here]).pvalue > 0.001


# Priorities


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("size", [1, 15, 16, 17, 100, 4097, 70_001])
def test_tree_finds_by_cumulative_sums(size: int, compiled: bool) -> None:
    random = np.random.default_rng(size)
    tree, priority = SumTree(size, compiled), np.zeros(size)
    for _ in range(3):
        index = random.integers(0, size, 1 + size // 2)
        value = random.exponential(size=len(index)) * (random.random(len(index)) < 0.7)
        tree.set(index, value)
        priority[index] = value  # NumPy too lets the last of equal indices win
    if not priority.any():
        tree.set(np.array([size - 1]), 1.0)
        priority[-1] = 1.0
    np.testing.assert_allclose(tree.total(), priority.sum(), rtol=1e-12)
    share = np.sort(random.random(2000))
    ends = np.cumsum(priority) / priority.sum()
    found = tree.find(share)
    expected = np.searchsorted(ends, share, side="right")
    near = np.abs(ends[np.minimum(expected, size - 1)] - share) < 1e-12  # on an edge rounding decides
    assert ((found == expected) | near).all()
    assert (priority[found] > 0).all()


COMPILER = pytest.mark.skipif(not any(map(shutil.which, ("c++", "g++", "clang++"))), reason="no C++ compiler")


@COMPILER
def test_the_tree_is_compiled_where_there_is_a_compiler() -> None:
    assert native.library(sum_tree.SOURCE, sum_tree.FLAGS) is not None


@COMPILER
@given(
    size=st.sampled_from([1, 15, 16, 17, 255, 256, 257, 8191, 8192, 8193, 140_000]),
    seed=st.integers(0, 2**32 - 1),
    rounds=st.integers(1, 4),
)
@settings(max_examples=60, deadline=None)
def test_compiled_tree_is_numpys_to_the_last_bit(size: int, seed: int, rounds: int) -> None:
    random, trees = np.random.default_rng(seed), (SumTree(size), SumTree(size, compiled=False))
    for _ in range(rounds):
        index = random.integers(0, size, int(random.integers(1, 400)))
        value = 10 ** random.uniform(-9, 9, len(index)) * (random.random(len(index)) < 0.8)
        value[0] = 1.0
        share = np.concatenate([random.random(200), [0.0, np.nextafter(1.0, 0.0), 1.0]])
        for tree in trees:
            tree.set(index, value)
            tree.set(index[-1:], 0.5)  # one number for all
        ours, theirs = (tree.find(share) for tree in trees)
        assert ours.tolist() == theirs.tolist()
        assert trees[0].total() == trees[1].total()
        for mine, other in zip((*trees[0].levels, trees[0].top), (*trees[1].levels, trees[1].top), strict=True):
            assert mine.tobytes() == other.tobytes()


@pytest.mark.parametrize("compiled", [True, False])
def test_tree_refuses_what_is_no_leaf(compiled: bool) -> None:
    tree = SumTree(40, compiled)
    with pytest.raises(IndexError):
        tree.set(np.array([3, 4_000]), 1.0)


def test_without_a_compiler_numpy_does_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CXX", str(tmp_path / "missing"))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    native.library.cache_clear()
    try:
        tree = SumTree(100)
        tree.set(np.array([7]), 2.0)
        assert native.library(sum_tree.SOURCE, sum_tree.FLAGS) is None
        assert tree.find(np.array([0.3])).tolist() == [7]
    finally:
        native.library.cache_clear()


def test_tree_never_finds_zero_even_at_the_ends() -> None:
    tree = SumTree(1000)
    tree.set(np.array([3, 400, 998]), np.array([1e-300, 0.1, 0.3]))
    found = tree.find(np.array([0.0, 0.2, np.nextafter(1.0, 0.0), 1.0]))
    assert found.tolist() == [3, 400, 998, 998]
    tree.set(np.array([3, 400, 998]), 0.0)
    with pytest.raises(ValueError, match="nothing to sample"):
        tree.find(np.array([0.5]))


def test_tree_does_not_drift() -> None:
    """A million changes of very different sizes: the sums are those of the leaves, to the last bits."""
    tree, random = SumTree(300), np.random.default_rng(0)
    for _ in range(1000):
        tree.set(random.integers(0, 300, 1000), 10 ** random.uniform(-9, 9, 1000))
        tree.total()
    tree.set(np.arange(300), 1e-6)
    assert tree.total() == pytest.approx(300e-6, rel=1e-13)


@pytest.mark.parametrize("alpha", [0.6, 1.0])
def test_frequencies_are_proportional_to_priorities(alpha: float) -> None:
    memory, _ = filled(FLAT, 1, 100, "same-step", 140, prioritised=True)
    here = rows(memory)
    error = np.random.default_rng(2).normal(size=len(here)) * 3
    memory.prioritise(here, error, alpha, 1e-6)
    random = np.random.default_rng(3)
    # single draws are independent; batches are stratified, which only makes the counts more even
    drawn = np.concatenate([memory.prioritised(random.random(1), 0.4)[0] for _ in range(5_000)])
    counts = np.bincount(drawn, minlength=140)
    p = (np.abs(error) + 1e-6) ** alpha
    assert counts[here].sum() == 5_000
    assert stats.chisquare(counts[here], 5_000 * p / p.sum()).pvalue > 0.001
    batch = np.bincount(memory.prioritised(random.random(20_000), 0.4)[0], minlength=140)
    np.testing.assert_allclose(batch[here], 20_000 * p / p.sum(), atol=2)  # at most one stratum at each end is shared


def test_importance_weights_are_those_of_the_paper() -> None:
    memory, _ = filled(FLAT, 1, 60, "same-step", 100, prioritised=True)
    here = rows(memory)
    error = np.linspace(0.1, 5, len(here))
    memory.prioritise(here, error, 0.6, 1e-6)
    p = np.zeros(100)
    p[here] = (error + 1e-6) ** 0.6
    row, weight = memory.prioritised(np.random.default_rng(0).random(32), 0.7)
    w = (1 / (len(here) * p[row] / p.sum())) ** 0.7
    np.testing.assert_allclose(weight, w / w.max(), rtol=1e-12)
    assert (memory.prioritised(np.random.default_rng(0).random(32), 0.0)[1] == 1).all()


def test_new_transitions_get_the_highest_priority_and_forgotten_ones_none() -> None:
    memory, _ = filled(FLAT, 1, 30, "same-step", 20, prioritised=True)
    assert memory.tree is not None
    here = rows(memory)
    assert set(np.flatnonzero(memory.tree.leaves)) == set(here)
    memory.prioritise(here[:1], np.array([7.0]), 0.5, 0.0)
    before = memory.written
    no = np.array([False])
    o = np.zeros((1, 3), np.float32)
    memory.append(np.array([0]), environments.Transition(o, o, np.ones(1), no, no, no, None))
    assert memory.tree.leaves[(before - 1) % 20] == math.sqrt(7)
    assert set(np.flatnonzero(memory.tree.leaves)) == set(rows(memory))


# Resuming


@pytest.mark.parametrize("mode", ["same-step", "next-step"])
@pytest.mark.parametrize("space", [FLAT, DICT], ids=["flat", "dict"])
@pytest.mark.parametrize(("steps", "capacity"), [(10, 5000), (600, 5000), (900, 1000), (1000, 700), (900, 300)])
def test_put_away_and_brought_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, space: spaces.Space, steps: int, capacity: int, mode: str
) -> None:
    """Through checkpoints on the way, and without: the same state, the same samples, the same fingerprint."""
    monkeypatch.setattr(replay, "SEGMENT_BYTES", 2**13)
    first, happened, _ = stream(space, 2, steps, mode, seed=5)
    make = lambda: Replay(space, spaces.Discrete(5), 2, capacity, True)  # noqa: E731
    memory = make()
    assert memory.segment == 256
    memory.begin(first)
    known: dict[str, str] = {}
    for t, (action, step) in enumerate(happened):
        memory.append(action, step)
        if t % 200 == 0:
            memory.prioritise(memory.uniform(8, places(8, t)), np.arange(8.0), 0.6, 1e-6)
        if t % 250 == 249:
            checkpoint.write(tmp_path / "a", t, memory.pack(), {}, segments=memory.segments(), written=known)
            saved = checkpoint.read(tmp_path / "a", t)
            known = saved.state.get("segments", {})
            memory = make()
            memory.unpack(saved.tensors, saved.segments)
    whole = make()
    whole.begin(first)
    for t, (action, step) in enumerate(happened):
        whole.append(action, step)
        if t % 200 == 0:
            whole.prioritise(whole.uniform(8, places(8, t)), np.arange(8.0), 0.6, 1e-6)
    for name, one in (("a", memory), ("b", whole)):
        checkpoint.write(tmp_path / name, steps, one.pack(), {}, segments=one.segments())
    saved = [checkpoint.read(tmp_path / name, steps) for name in "ab"]
    prints = [checkpoint.fingerprint(s.tensors, s.state.get("segments")) for s in saved]
    assert prints[0] == prints[1]
    samples = [m.prioritised(np.random.default_rng(9).random(64), 0.5) for m in (memory, whole)]
    assert np.array_equal(samples[0][0], samples[1][0])
    assert np.array_equal(samples[0][1], samples[1][1])
    row, weight = samples[0]
    drawn = replay.Drawn(torch.from_numpy(row), torch.from_numpy(weight), 0.9, 3)
    assert fields(replay.gather(memory.rows, drawn)) == fields(memory.batch(row, 0.9, 3, weight))
    batches = [m.batch(row, 0.9, 3) for m, (row, _) in zip((memory, whole), samples, strict=True)]
    assert all(equal(x, y) for x, y in zip(*batches, strict=True))
    if steps >= 600 and capacity >= 700:
        assert saved[0].segments, "nothing was written in segments"
    files = {path.stem for path in (tmp_path / "a" / checkpoint.SEGMENTS).glob("*")}
    named = [checkpoint.read(tmp_path / "a", step).segments.keys() for step in checkpoint.steps(tmp_path / "a")]
    assert files == set().union(*named)


def test_a_change_anywhere_changes_the_fingerprint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replay, "SEGMENT_BYTES", 2**13)
    prints = set()
    for k in (None, 5, 300, 899):
        memory, _ = filled(FLAT, 1, 800, "same-step", 5000)
        assert memory.written > 900
        if k is not None:
            memory.reward[k] += 1
        checkpoint.write(tmp_path / str(k), 1, memory.pack(), {}, segments=memory.segments())
        saved = checkpoint.read(tmp_path / str(k), 1)
        prints.add(checkpoint.fingerprint(saved.tensors, saved.state["segments"]))
    assert len(prints) == 4


def test_segments_are_of_16_mib_and_at_most_65536_rows() -> None:
    small = Replay(FLAT, spaces.Discrete(2), 1, 100)
    large = Replay(spaces.Box(0, 255, (84, 84, 4), np.uint8), spaces.Discrete(2), 1, 100)
    assert small.segment == 65_536
    assert large.segment == 512
    assert replay.SEGMENT_BYTES == 16 * 2**20


def test_too_small_a_replay_is_refused() -> None:
    with pytest.raises(ValueError, match="replay_capacity is 12, allowed: 13 or more with 3 envs"):
        Replay(FLAT, spaces.Discrete(2), 3, 12)
