"""Wall time and memory until CartPole is solved, beside Stable-Baselines3 with the same settings, process by process.

A run is a fresh process: imports, environments, compilation and every step until the mean return of the last 100
training episodes reaches 475 count. Seed by seed, in turns: the peer, and Upslope eager, compiled with a filled cache,
the same with a tensor environment, and compiled with an empty cache.
Run: `taskset -c 0 python -m bench.threshold --peer PYTHON --seeds 0 1 2 3 4 5 6 7 8 9`.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import NamedTuple

from upslope.bench import control
from upslope.runs import metrics

THRESHOLD, STEPS = 475.0, 100_000
WAYS = {
    "eager": ("--no-compile",),
    "warm": ("--compile",),
    "tensor": ("--compile", "--environment.vectorization", "tensor"),
    "cold": ("--compile",),
}

W1 = next(workload for workload in control.WORKLOADS if workload.name == "W1")  # the CartPole preset

PEER = f"""
import json, sys, torch
torch.set_num_threads(1)
from stable_baselines3 import PPO
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env

class Solved(BaseCallback):
    def _on_step(self):
        return True
    def _on_rollout_end(self):
        last = [episode["r"] for episode in self.model.ep_info_buffer]
        if len(last) == 100 and sum(last) / 100 >= {THRESHOLD}:
            print(self.num_timesteps, flush=True)
            sys.exit()

seed, given = int(sys.argv[1]), json.loads(sys.argv[2])
settings = {{k: (lambda left, x=v[0]: left * x) if isinstance(v, list) else v for k, v in given.items()}}
envs = make_vec_env("CartPole-v1", settings.pop("n_envs"), seed=seed)
PPO("MlpPolicy", envs, seed=seed, device="cpu", **settings).learn({STEPS}, callback=Solved())
"""


class Solved(NamedTuple):
    """One process."""

    seconds: float  # from its start until the threshold is seen, or until its end
    steps: int | None  # of the environment by then; None: it ended below the threshold
    megabytes: float  # the largest resident set of it or of a compiler that it waited for


def peer(python: str, seed: int) -> Solved:
    """Stable-Baselines3; it ends itself."""
    began = time.perf_counter()
    process = subprocess.Popen(
        [python, "-W", "ignore", "-c", PEER, str(seed), json.dumps(W1.peer)],
        env=_environment(),
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    printed = process.stdout.readline()
    seconds = time.perf_counter() - began
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise RuntimeError(f"Stable-Baselines3 ended with {process.returncode}")
    return Solved(seconds, int(printed) if printed else None, usage.ru_maxrss / 1024)


def upslope(seed: int, cache: str, *flags: str) -> Solved:
    """The CartPole preset, from the command line; its metrics are watched, and it is ended when they say so."""
    with tempfile.TemporaryDirectory() as directory:
        run = Path(directory) / "run"
        command = [str(Path(sys.executable).parent / "upslope"), "train", "ppo", "--env", "CartPole-v1", "--quiet"]
        command += ["--seed", str(seed), "--run-dir", str(run), *flags]
        began = time.perf_counter()
        process = subprocess.Popen(
            command,
            env=_environment() | {"TORCHINDUCTOR_CACHE_DIR": cache},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        steps, seen, ended = None, 0, False
        while steps is None and not ended:
            time.sleep(0.05)
            pid, status, usage = os.wait4(process.pid, os.WNOHANG)
            ended = pid != 0
            if ended and status:
                raise RuntimeError(f"{' '.join(command)} ended with {os.waitstatus_to_exitcode(status)}")
            if (run / metrics.METRICS).exists():
                with (run / metrics.METRICS).open("rb") as file:
                    file.seek(seen)
                    lines = file.read()
                lines = lines[: lines.rfind(b"\n") + 1]
                seen += len(lines)
                rows = [json.loads(line) for line in lines.splitlines()]
                steps = next((row["step"] for row in rows if (row.get("episode_return") or 0.0) >= THRESHOLD), None)
        seconds = time.perf_counter() - began
        if not ended:
            process.kill()
            usage = os.wait4(process.pid, 0)[2]
        process.returncode = 0  # it was waited for
        return Solved(seconds, steps, usage.ru_maxrss / 1024)


def _environment() -> dict[str, str]:
    """Of both: Python may keep what it compiles of modules, as it does for who installs them."""
    return {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--peer", required=True, help="a Python that has stable-baselines3")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=WAYS)
    asked = parser.parse_args()
    found: dict[str, list[Solved]] = {"peer": [], **{way: [] for way in asked.ways}}
    with tempfile.TemporaryDirectory() as filled:
        for way in asked.ways:
            upslope(0, filled, *WAYS[way])  # fills the cache
        for seed in asked.seeds:
            found["peer"].append(peer(asked.peer, seed))
            for way in asked.ways:
                with tempfile.TemporaryDirectory() as empty:
                    found[way].append(upslope(seed, empty if way == "cold" else filled, *WAYS[way]))
            print(json.dumps({"seed": seed} | {name: runs[-1] for name, runs in found.items()}), flush=True)
    theirs = sum(run.seconds for run in found["peer"])
    for name, runs in found.items():
        share = sum(run.seconds for run in runs) / theirs
        middle, steps = median(run.seconds for run in runs), median(run.steps or STEPS for run in runs)
        size, missed = median(run.megabytes for run in runs), sum(run.steps is None for run in runs)
        print(
            f"{name:7} {middle:6.1f} s, {share:.0%} of the peer's, {steps:,.0f} steps, {size:.0f} MB, {missed} missed"
        )


if __name__ == "__main__":
    main()
