"""Prioritised replay of 1M transitions beside Stable-Baselines3's uniform one.

Insert one transition, sample 256, change their priorities; the peer inserts and samples. Medians of rounds that take
turns, CPU time of one thread.
Run: `taskset -c 0 python -m bench.replay --peer PYTHON`, a Python that has Stable-Baselines3. With `--checkpoints DIR`
instead: bytes and seconds of checkpoints of the full replay, with 10,000 new transitions between two.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from upslope.runs import checkpoint

CAPACITY, BATCH, WIDTH = 1_000_000, 256, 17

PEER = f"""
import json, time
import numpy as np, torch
from gymnasium import spaces
torch.set_num_threads(1)
from stable_baselines3.common.buffers import ReplayBuffer
buffer = ReplayBuffer({CAPACITY}, spaces.Box(-1, 1, ({WIDTH},)), spaces.Discrete(2), device="cpu")
for part in (buffer.observations, buffer.next_observations, buffer.actions, buffer.rewards, buffer.dones):
    part[...] = 0
buffer.full = True
o, a, r, d = np.zeros((1, {WIDTH}), np.float32), np.array([1]), np.array([1.0]), np.array([False])
def once():
    buffer.add(o, o, a, r, d, [{{}}])
    buffer.sample({BATCH})
for _ in range(100): once()
began = time.process_time()
for _ in range(1000): once()
print(json.dumps((time.process_time() - began) / 1000))
"""


def cycle() -> tuple[Callable[[], None], Any]:
    """One insert, sample and update, and the replay that it works on."""
    import numpy as np
    import torch
    from gymnasium import spaces

    from upslope.control import environments
    from upslope.control.replay import Replay

    torch.set_num_threads(1)
    memory = Replay(spaces.Box(-1, 1, (WIDTH,)), spaces.Discrete(2), 1, CAPACITY, prioritised=True)
    o, a, no = np.zeros((1, WIDTH), np.float32), np.array([1]), np.array([False])
    step = environments.Transition(o, o, np.ones(1), no, no, no, None)
    memory.begin(o)
    memory.append(a, step)
    memory.written = CAPACITY + 2  # full, as the peer's is
    for part in memory._columns().values():
        part[...] = part[0]
    memory.open[:] = memory.written - 1
    memory.prioritise(np.arange(CAPACITY), np.random.default_rng(0).exponential(size=CAPACITY), 0.6, 1e-6)
    random = np.random.default_rng(1)
    error = random.exponential(size=BATCH)

    def once() -> None:
        memory.append(a, step)
        row, weight = memory.prioritised(random.random(BATCH), 0.4)
        memory.batch(row, 0.99, 1, weight)
        memory.prioritise(row, error, 0.6, 1e-6)

    return once, memory


def ours() -> float:
    """Seconds of one insert, sample and update."""
    once, _ = cycle()
    for _ in range(100):
        once()
    began = time.process_time()
    for _ in range(1000):
        once()
    return (time.process_time() - began) / 1000


def checkpoints(root: Path, count: int = 4) -> None:
    """Write checkpoints and say what each cost."""
    once, memory = cycle()
    written: dict[str, str] = {}
    before: set[Path] = set()
    for k in range(count):
        began = time.perf_counter()
        path = checkpoint.write(root, k, memory.pack(), {}, segments=memory.segments(), written=written)
        spent = time.perf_counter() - began
        written = json.loads((path / checkpoint.STATE).read_text())["segments"]
        files = {file for file in root.rglob("*") if file.is_file()}
        size = sum(file.stat().st_size for file in files - before) / 2**20
        sys.stdout.write(f"checkpoint {k}: {size:.0f} MiB written in {spent:.2f} s\n")
        before = files
        for _ in range(10_000):
            once()


def peer(python: str) -> float:
    return float(json.loads(subprocess.check_output([python, "-c", PEER], text=True).splitlines()[-1]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--peer", help="a Python that has Stable-Baselines3")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--checkpoints", type=Path, help="an empty directory")
    options = parser.parse_args()
    if options.checkpoints:
        checkpoints(options.checkpoints)
        return
    mine, theirs = [], []
    for _ in range(options.rounds):
        mine.append(ours())
        if options.peer:
            theirs.append(peer(options.peer))
    line = f"{statistics.median(mine) * 1e6:.0f} µs"
    if theirs:
        ratio = statistics.median(theirs) / statistics.median(mine)
        line += f", Stable-Baselines3 {statistics.median(theirs) * 1e6:.0f} µs, {ratio:.2f} times as fast"
    sys.stdout.write(line + "\n")


if __name__ == "__main__":
    main()
