"""W6: TRPO on CartPole-v1 beside sb3-contrib's, one environment × 2048 steps, its defaults, on one core.

    taskset -c 0 python -m bench.trpo [--peer PYTHON] [--repeats 5] [--iterations 4]

sb3-contrib runs in its own interpreter (`--peer /path/to/venv/bin/python`, where `pip install sb3-contrib` was done),
which trains when told to: repeats alternate, every one a new run of a few iterations, and a claim is the median of the
pairs' ratios with the smallest and largest. The first repeat of each warms up and is left out. Without the peer only
Upslope is timed, and said to be. Both times are given: on the wall, and of the processor alone, which other programs
on the machine disturb less.
"""

import argparse
import json
import os
import subprocess
import time
from statistics import median
from typing import NamedTuple

os.environ["OMP_NUM_THREADS"] = "1"

import torch

from upslope.control import environments, trpo
from upslope.runs import run as runs

LENGTH = 2048

PEER = """
import json, sys, time
import torch
torch.set_num_threads(1)
import sb3_contrib
from sb3_contrib import TRPO
print(json.dumps({"version": sb3_contrib.__version__}), flush=True)
for line in sys.stdin:
    seed, steps = map(int, line.split())
    model = TRPO("MlpPolicy", "CartPole-v1", seed=seed, device="cpu")
    assert model.n_steps == 2048
    wall, cpu = time.perf_counter(), time.process_time()
    model.learn(steps)
    print(json.dumps({"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}), flush=True)
"""


class Seconds(NamedTuple):
    """What one training took."""

    wall: float
    cpu: float


class Peer:
    """sb3-contrib in its own interpreter, training when asked."""

    def __init__(self, python: str) -> None:
        command = [python, "-W", "ignore", "-c", PEER]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.version = self._read()["version"]

    def train(self, seed: int, iterations: int) -> Seconds:
        assert self.process.stdin is not None
        self.process.stdin.write(f"{seed} {iterations * LENGTH}\n")
        self.process.stdin.flush()
        return Seconds(**self._read())

    def _read(self) -> dict:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit("sb3-contrib's interpreter ended early")
        return json.loads(line)

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def train(seed: int, iterations: int) -> Seconds:
    config = trpo.TRPO(
        environment=environments.Config("CartPole-v1", 1, "sync"),  # as sb3-contrib steps it
        total_steps=iterations * LENGTH,
        run=runs.Config(seed=seed, quiet=True),
    )
    wall, cpu = time.perf_counter(), time.process_time()
    trpo.train(config)
    return Seconds(time.perf_counter() - wall, time.process_time() - cpu)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", default=None, help="python that has sb3-contrib")
    parser.add_argument("--repeats", type=int, default=5, help="alternated")
    parser.add_argument("--iterations", type=int, default=4, help=f"of {LENGTH} steps, in a repeat")
    options = parser.parse_args()
    torch.set_num_threads(1)
    peer = Peer(options.peer) if options.peer else None
    print(f"sb3-contrib {peer.version}" if peer else "sb3-contrib: absent (--peer PYTHON); Upslope alone")
    ours, theirs = [], []
    for repeat in range(options.repeats + 1):
        ours.append(train(repeat, options.iterations))
        if peer:
            theirs.append(peer.train(repeat, options.iterations))
    steps = options.iterations * LENGTH
    for clock in Seconds._fields:
        mine, other = ([getattr(seconds, clock) for seconds in found[1:]] for found in (ours, theirs))
        print(f"{clock}: Upslope {spread([steps / seconds for seconds in mine])} steps/s")
        if peer:
            ratios = [theirs / ours for theirs, ours in zip(other, mine, strict=True)]
            print(f"{clock}: sb3-contrib {spread([steps / seconds for seconds in other])} steps/s")
            print(f"{clock}: ratio {median(ratios):.2f}× ({min(ratios):.2f}–{max(ratios):.2f})")
    if peer:
        peer.close()


def spread(rates: list[float]) -> str:
    return f"{median(rates):,.0f} ({min(rates):,.0f}–{max(rates):,.0f})"


if __name__ == "__main__":
    main()
