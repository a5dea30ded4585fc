"""Speed beside the peers: PPO, TRPO, DQN and SAC, the same settings, alternated repeats on one core.

Stable-Baselines3, sb3-contrib and sbx run in an interpreter of their own, which trains when told to. A claim is the
median of the pairs' ratios with the smallest and the largest. Rates are steady: imports, compilation and the first
tenth of the steps are left out, and compilation is given apart. Without a peer Upslope alone is timed, and said to be.
"""

import contextlib
import json
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
from matplotlib.figure import Figure
from rich.table import Table

from upslope.control import (
    actors,
    dqn,
    environments,
    fast_dqn,
    fast_ppo,
    learner,
    offpolicy,
    offpolicy_program,
    optimizers,
    ppo,
    program,
    rollout,
    sac,
    tensor_rollout,
    trpo,
)
from upslope.control.environments import Environments
from upslope.report.files import replacing
from upslope.runs import metrics
from upslope.runs import run as runs


class Workload(NamedTuple):
    """One row: what is trained, and what the peer is told."""

    name: str
    what: str
    config: ppo.PPO | trpo.TRPO | dqn.DQN | sac.SAC
    steps: int  # of a repeat
    peer: dict[str, Any]  # settings of the peer's class of the same name
    vectors: tuple[str, ...]  # environment.vectorization, fastest last
    library: str = "stable_baselines3"


W1 = ppo.PPO(
    environment=environments.Config("CartPole-v1", 8), rollout_length=32, minibatch_size=256, num_epochs=20,
    gamma=0.98, gae_lambda=0.8, optimizer=optimizers.Adam(1e-3), anneal_clip=True, entropy_coef=0.0,
)  # fmt: skip
W2 = ppo.PPO(environment=environments.Config("CartPole-v1", 4), rollout_length=128, minibatch_size=128)
W3 = replace(W2, environment=environments.Config("CartPole-v1", 1024), rollout_length=64, minibatch_size=8192)
W6 = trpo.TRPO(environment=environments.Config("CartPole-v1", 1, "sync"))
W4 = dqn.DQN(
    environment=environments.Config("CartPole-v1", 1, "sync"), optimizer=optimizers.Adam(1e-4, 1e-8),
    learning_starts=100, train_interval=1, batch_size=64,
)  # fmt: skip
W5 = sac.SAC(environment=environments.Config("Pendulum-v1", 1, "sync"), run=runs.Config(log_interval=50))
W5_HALF = replace(W5, network=actors.Stochastic(precision="bfloat16"))
_W2 = {"n_epochs": 4, "ent_coef": 0.01, "learning_rate": [2.5e-4], "clip_range": 0.2}
WORKLOADS = (
    Workload(
        "W1", "PPO, 8 × 32 steps, one minibatch, 20 epochs", W1, 40_960,
        {"n_envs": 8, "n_steps": 32, "batch_size": 256, "n_epochs": 20, "gamma": 0.98, "gae_lambda": 0.8,
         "learning_rate": [1e-3], "clip_range": [0.2], "ent_coef": 0.0}, ("auto", "tensor"),
    ),
    Workload(
        "W2", "PPO, 4 × 128 steps, 4 minibatches, 4 epochs", W2, 51_200,
        {"n_envs": 4, "n_steps": 128, "batch_size": 128, **_W2}, ("auto", "tensor"),
    ),
    Workload(
        "W3", "PPO, 1024 × 64 steps, 8 minibatches, 4 epochs", W3, 655_360,
        {"n_envs": 1024, "n_steps": 64, "batch_size": 8192, **_W2}, ("auto", "tensor"),
    ),
    Workload(
        "W4", "DQN, 256×256, batch 64, one update per step", W4, 4_000,
        {"n_envs": 1, "batch_size": 64, "train_freq": 1, "gradient_steps": 1, "learning_starts": 100,
         "buffer_size": 100_000, "target_update_interval": 500, "policy_kwargs": {"net_arch": [256, 256]}},
        ("sync", "tensor"),
    ),
    Workload("W5", "SAC on Pendulum-v1, 256×256, batch 256, one update per step", W5, 1_500, {"n_envs": 1}, ("sync",)),
    Workload("W5-sbx", "as W5, beside sbx", W5, 1_500, {"n_envs": 1}, ("sync",), "sbx"),
    Workload("W5-bf16", "as W5 in bfloat16, beside sbx", W5_HALF, 1_500, {"n_envs": 1}, ("sync",), "sbx"),
    Workload("W6", "TRPO, 1 × 2048 steps, sb3-contrib's defaults", W6, 10_240, {"n_envs": 1}, ("sync",), "sb3_contrib"),
)  # fmt: skip

PEER = """
import importlib, json, sys, time
import torch
torch.set_num_threads(1)
import stable_baselines3
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env

class Marks(BaseCallback):
    def __init__(self):
        super().__init__()
        self.marks = []
    def _on_step(self):
        return True
    def _on_rollout_start(self):
        self.marks.append((time.perf_counter(), self.num_timesteps))

print(json.dumps({"version": stable_baselines3.__version__}), flush=True)
for line in sys.stdin:
    job = json.loads(line)
    settings = {k: (lambda left, x=v[0]: left * x) if isinstance(v, list) else v for k, v in job["settings"].items()}
    library = importlib.import_module(job["library"])
    kind = getattr(library, job["algorithm"])
    envs = make_vec_env(job["environment"], settings.pop("n_envs"), seed=job["seed"])
    model, marks = kind("MlpPolicy", envs, seed=job["seed"], device="cpu", **settings), Marks()
    model.learn(job["steps"], callback=marks)
    print(json.dumps({"marks": marks.marks + [(time.perf_counter(), model.num_timesteps)]}), flush=True)
"""


class Peer:
    """Stable-Baselines3 in its own interpreter, training when asked."""

    def __init__(self, python: str) -> None:
        command = [python, "-W", "ignore", "-c", PEER]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.version = self._read()["version"]

    def rate(self, workload: Workload, seed: int) -> float:
        assert self.process.stdin is not None
        named = {"algorithm": type(workload.config).__name__, "environment": workload.config.environment.id}
        job = {**named, "library": workload.library, "seed": seed, "steps": workload.steps, "settings": workload.peer}
        self.process.stdin.write(json.dumps(job) + "\n")
        self.process.stdin.flush()
        return steady(self._read()["marks"])

    def _read(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise ValueError(
                "the peer's interpreter ended early: does it have stable-baselines3, sb3-contrib and sbx-rl?"
            )
        return json.loads(line)

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def steady(marks: Sequence[tuple[float, int]]) -> float:
    """Steps a second between the first mark past a tenth of the steps and the last.

    >>> steady([(0.0, 0), (9.0, 10), (10.0, 20), (14.0, 100)])
    20.0
    """
    first = next(mark for mark in marks if mark[1] > 0.1 * marks[-1][1])
    return (marks[-1][1] - first[1]) / (marks[-1][0] - first[0])


TRAIN: dict[type, Callable[..., Any]] = {
    ppo.PPO: fast_ppo.train, trpo.TRPO: trpo.train, dqn.DQN: fast_dqn.train, sac.SAC: sac.train,
}  # fmt: skip


class Timed(NamedTuple):
    """One training of Upslope's."""

    rate: float  # steps a second, steady
    start: float  # seconds until the first iteration is done: compilation is in it
    shares: dict[str, float]  # of the steady time


def train(workload: Workload, vectorization: Any, seed: int, profile: bool = True) -> Timed:
    """One run, written to a directory as every run is; without a profile there are no shares, and no clocks to read."""
    config: Any = workload.config
    environment = replace(config.environment, vectorization=vectorization)
    clocks: contextlib.AbstractContextManager[dict[str, list[float]]]
    clocks = profiled() if profile else contextlib.nullcontext({})
    with tempfile.TemporaryDirectory() as directory, clocks as spent:
        compiles = not isinstance(config, trpo.TRPO)
        options = replace(
            config.run, seed=seed, run_dir=Path(directory) / "run", quiet=True, compile=True if compiles else None
        )  # fmt: skip
        config = replace(config, environment=environment, total_steps=workload.steps, run=options)
        TRAIN[type(config)](config)
        marks = [(row["seconds"], row["step"]) for row in metrics.read(Path(directory) / "run")]
    after = next(i for i, mark in enumerate(marks) if mark[1] >= 0.1 * workload.steps)
    whole = marks[-1][0] - marks[after][0]
    shares = {name: sum(times[len(times) * (after + 1) // len(marks) :]) / whole for name, times in spent.items()}
    if profile:
        shares["environment"] = min(shares["environment"], 1.0)
        shares["inference"] = max(0.0, shares.pop("collect") - shares["environment"])
        shares["other"] = max(0.0, 1 - sum(shares.values()))
    return Timed(steady(marks), marks[0][0], shares)


TIMED: tuple[tuple[Any, str, str], ...] = (  # where a name is looked up when it is called
    (Environments, "step", "environment"),
    (rollout, "collect", "collect"),
    (offpolicy, "collect", "collect"),
    (offpolicy, "draw", "replay"),
    (offpolicy_program, "_moved", "program"),
    (fast_dqn, "take", "program"),
    (fast_dqn, "foresee", "noise"),
    (tensor_rollout, "draw", "noise"),
    (program, "_ran", "program"),
    (trpo, "update", "update"),
    (learner, "report", "logging"),
    (offpolicy, "report", "logging"),
)


@contextlib.contextmanager
def profiled() -> Iterator[dict[str, list[float]]]:
    """Seconds of each call of the functions that a run's time goes to."""
    spent: dict[str, list[float]] = {label: [] for _, _, label in TIMED}

    def clocked(function: Callable[..., Any], times: list[float]) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            began = time.perf_counter()
            try:
                return function(*arguments, **named)
            finally:
                times.append(time.perf_counter() - began)

        return call

    originals = [(owner, name, getattr(owner, name)) for owner, name, _ in TIMED]
    try:
        for (owner, name, function), (_, _, label) in zip(originals, TIMED, strict=True):
            setattr(owner, name, clocked(function, spent[label]))
        yield spent
    finally:
        for owner, name, function in originals:
            setattr(owner, name, function)


@dataclass(frozen=True)
class Options:
    """What is measured."""

    workloads: tuple[str, ...] = tuple(workload.name for workload in WORKLOADS)
    repeats: int = 5
    peer: str | None = None  # an interpreter that has stable-baselines3, sb3-contrib and sbx-rl

    def __post_init__(self) -> None:
        known = [workload.name for workload in WORKLOADS]
        for name in self.workloads:
            if name not in known:
                raise ValueError(f"workload {name!r} is unknown, allowed: {', '.join(known)}")
        if self.repeats < 1:
            raise ValueError(f"repeats is {self.repeats}, allowed: 1 or more")


class Result(NamedTuple):
    """One row of the table."""

    workload: str
    what: str
    environment: str  # "Gymnasium" or "tensor"
    rates: list[float]
    peer: list[float]  # none without a peer
    start: float  # seconds to the first iteration's end, the median
    shares: dict[str, float]  # of the first run, whose rate is left out

    def ratios(self) -> list[float]:
        return [ours / theirs for ours, theirs in zip(self.rates, self.peer, strict=False)]


def measure(options: Options) -> list[Result]:
    """Every workload, each repeat of Upslope beside one of the peer's; the first of each warms up and is profiled."""
    peer = Peer(options.peer) if options.peer else None
    torch.set_num_threads(1)
    results = []
    try:
        for workload in (w for w in WORKLOADS if w.name in options.workloads):
            timed: dict[str, list[Timed]] = {vector: [] for vector in workload.vectors}
            theirs = []
            for repeat in range(options.repeats + 1):
                if peer:
                    theirs.append(peer.rate(workload, repeat))
                for vector in workload.vectors:
                    timed[vector].append(train(workload, vector, repeat, profile=repeat == 0))
            for vector, runs_ in timed.items():
                first, *kept = runs_
                name = "tensor" if vector == "tensor" else "Gymnasium"
                rates, start = [run.rate for run in kept], median(run.start for run in kept)
                results.append(
                    Result(workload.name, workload.what, name, rates, theirs[1:], start, first.shares)
                )  # fmt: skip
    finally:
        if peer:
            peer.close()
    return results


def compare(out: Path, options: Options) -> list[Result]:
    """Measure, and write `control.json`, `control.md` and `control.png` to a directory."""
    results = measure(options)
    out.mkdir(parents=True, exist_ok=True)
    with replacing(out / "control.json") as path:
        path.write_text(json.dumps([row._asdict() for row in results], indent=1))
    with replacing(out / "control.md") as path:
        path.write_text(markdown(results))
    with replacing(out / "control.png") as path:
        draw(results).savefig(path, dpi=150)
    return results


def cells(row: Result) -> list[str]:
    spread = lambda numbers, form: f"{median(numbers):{form}} ({min(numbers):{form}}–{max(numbers):{form}})"  # noqa: E731
    main = [f"{name} {share:.0%}" for name, share in sorted(row.shares.items(), key=lambda x: -x[1]) if share >= 0.01]
    return [
        row.workload, row.environment, spread(row.rates, ",.0f"), spread(row.peer, ",.0f") if row.peer else "–",
        spread(row.ratios(), ".2f") + " ×" if row.peer else "–", f"{row.start:.1f} s", ", ".join(main),
    ]  # fmt: skip


HEAD = ("workload", "environment", "Upslope, steps/s", "peer, steps/s", "ratio", "start", "where the time goes")


def table(results: Sequence[Result]) -> Table:
    """For the terminal."""
    shown = Table(*HEAD, title="steady rates, median (min–max)")
    for row in results:
        shown.add_row(*cells(row))
    return shown


def markdown(results: Sequence[Result]) -> str:
    """For a page."""
    lines = ["| " + " | ".join(HEAD) + " |", "|" + "---|" * len(HEAD)]
    lines += ["| " + " | ".join(cells(row)) + " |" for row in results]
    described = {row.workload: row.what for row in results}
    return "\n".join([*lines, "", *(f"- {name}: {what}" for name, what in described.items())]) + "\n"


def draw(results: Sequence[Result]) -> Figure:
    """Ratios to the peer, or rates without one."""
    figure = Figure(figsize=(7, 0.6 + 0.5 * len(results)), layout="constrained")
    axes = figure.add_subplot()
    for place, row in enumerate(results):
        numbers = row.ratios() or row.rates
        middle = median(numbers)
        error = [[middle - min(numbers)], [max(numbers) - middle]]
        axes.barh(place, middle, xerr=error, color="C0" if row.environment == "Gymnasium" else "C2", capsize=3)
    axes.set_yticks(range(len(results)), [f"{row.workload}, {row.environment}" for row in results])
    axes.invert_yaxis()
    axes.axvline(1.0, color="0.5", linewidth=1)
    axes.set_xlabel("steps a second, in units of the peer's" if results[0].peer else "steps a second")
    return figure
