"""W5: SAC on Pendulum-v1 beside Stable-Baselines3's, 256×256, batch 256, one update per step, on one core.

    taskset -c 0 python -m bench.sac [--peer PYTHON] [--repeats 5] [--steps 400]

Stable-Baselines3 runs in its own interpreter (`--peer /path/to/venv/bin/python`, where `pip install stable-baselines3`
was done), which trains when told to: repeats alternate, and a claim is the median of the pairs' ratios with the
smallest and largest. Everything counts: environment, replay, both updates, targets. The first repeat of each warms up
and is left out. Both times are given: on the wall, and of the processor alone, which other programs disturb less.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from statistics import median
from typing import NamedTuple

os.environ["OMP_NUM_THREADS"] = "1"

import torch

from upslope.control import environments, sac
from upslope.runs import run as runs

STARTS = 100  # steps at random before the updates

PEER = f"""
import json, sys, time
import torch
torch.set_num_threads(1)
import stable_baselines3
from stable_baselines3 import SAC
print(json.dumps({{"version": stable_baselines3.__version__}}), flush=True)
for line in sys.stdin:
    seed, steps = map(int, line.split())
    model = SAC("MlpPolicy", "Pendulum-v1", seed=seed, device="cpu")
    assert (model.batch_size, model.learning_starts) == (256, {STARTS})
    wall, cpu = time.perf_counter(), time.process_time()
    model.learn(steps)
    print(json.dumps({{"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}}), flush=True)
"""


class Seconds(NamedTuple):
    """What one training took."""

    wall: float
    cpu: float


def train(seed: int, steps: int) -> Seconds:
    config = sac.SAC(
        environment=environments.Config("Pendulum-v1", 1, "sync"),
        total_steps=steps,
        learning_starts=STARTS,
        run=runs.Config(seed=seed, quiet=True),
    )
    wall, cpu = time.perf_counter(), time.process_time()
    sac.train(config)
    return Seconds(time.perf_counter() - wall, time.process_time() - cpu)


def ask(peer: subprocess.Popen, *numbers: int) -> dict:
    """What the peer answers to a line of numbers, or at its start to none."""
    assert peer.stdin is not None
    assert peer.stdout is not None
    if numbers:
        peer.stdin.write(" ".join(map(str, numbers)) + "\n")
        peer.stdin.flush()
    line = peer.stdout.readline()
    if not line:
        raise SystemExit("the peer's interpreter ended early")
    return json.loads(line)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", default=None, help="python that has stable-baselines3")
    parser.add_argument("--repeats", type=int, default=5, help="alternated")
    parser.add_argument("--steps", type=int, default=400, help=f"of the environment, after {STARTS} without updates")
    options = parser.parse_args()
    torch.set_num_threads(1)
    ours, theirs, peer = [], [], None
    if options.peer:
        command = [options.peer, "-W", "ignore", "-c", PEER]
        peer = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        sys.stdout.write(f"Stable-Baselines3 {ask(peer)['version']}\n")
    for repeat in range(options.repeats + 1):
        ours.append(train(repeat, STARTS + options.steps))
        if peer:
            theirs.append(Seconds(**ask(peer, repeat, STARTS + options.steps)))
    for clock in Seconds._fields:
        mine, other = ([getattr(seconds, clock) for seconds in found[1:]] for found in (ours, theirs))
        sys.stdout.write(f"{clock}: Upslope {spread([options.steps / seconds for seconds in mine])} updates/s\n")
        if peer:
            ratios = [b / a for a, b in zip(mine, other, strict=True)]
            sys.stdout.write(f"{clock}: peer {spread([options.steps / seconds for seconds in other])} updates/s\n")
            sys.stdout.write(f"{clock}: ratio {median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})\n")
    if peer and peer.stdin:
        peer.stdin.close()
        peer.wait()


def spread(rates: list[float]) -> str:
    return f"{median(rates):,.0f} ({min(rates):,.0f} to {max(rates):,.0f})"


if __name__ == "__main__":
    main()
