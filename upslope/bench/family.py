"""The on-policy family on one environment: sample efficiency, variance and stability in one picture.

Every method is trained by the ordinary path into run directories; the variance is measured apart, in variance.py.
"""

import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.table import Table

from upslope.bench import variance
from upslope.bench.variance import Algorithms, Noise
from upslope.report import bootstrap, plots
from upslope.report.files import replacing
from upslope.report.records import Series, finite, read_run, series
from upslope.runs import settings
from upslope.runs.run import CONFIG, SUMMARY

log = logging.getLogger(__name__)


class Method(NamedTuple):
    """One curve: an algorithm of the command line and its flags."""

    name: str  # of its run directories
    label: str
    algorithm: str
    flags: tuple[str, ...] = ()


METHODS = (
    Method("reinforce", "REINFORCE", "reinforce", ("--baseline", "none")),
    Method("reinforce-value", "REINFORCE − V", "reinforce", ("--baseline", "value")),
    Method("a2c", "A2C", "a2c"),
    Method("trpo", "TRPO", "trpo"),
    Method("acktr", "ACKTR", "acktr"),
    Method(
        "ppo-penalty",
        "PPO, penalty",
        "ppo",
        ("--kl-penalty.coef", "1", "--kl-penalty.rule", "paper", "--kl-penalty.target", "0.01"),
    ),
    Method("ppo", "PPO, clip", "ppo"),
    Method("group-ppo", "Group PPO", "group-ppo"),
)
POLICY = Method("policy", "the fixed policy", "ppo")

Train = Callable[[str, list[str]], Any]  # algorithm and flags
Resume = Callable[[list[str]], Any]  # a run directory


@dataclass(frozen=True)
class Options:
    """What is compared, and how long."""

    environment: str = "CartPole-v1"
    seeds: int = 3
    total_steps: int = 100_000  # of each run
    batches: int = 32  # that the variance is estimated from
    batch_steps: int = 4096  # environment steps of each, at least

    def __post_init__(self) -> None:
        settings.within(self, 1, None, "seeds", "total_steps", "batch_steps")
        settings.within(self, 3, None, "batches")


class Result(NamedTuple):
    """One method in numbers."""

    label: str
    curve: bootstrap.Curve
    final: tuple[float, ...]  # the last recorded mean return, per seed
    steps_to_threshold: tuple[float, ...]  # per seed; inf: not reached
    worst_drop: tuple[
        float, ...
    ]  # of the mean return below its best so far, once at the threshold; seeds that got there
    kl: tuple[float, float, float] | None  # nats per iteration: 5%, 50%, 95% over iterations; None: not recorded
    noise: Noise


def compare(out: Path, options: Options, algorithms: Algorithms, train: Train, resume: Resume) -> tuple[Result, ...]:
    """Train what is not there yet, measure, and write `family.png` and `family.json` into `out`."""
    methods = [method for method in METHODS if method.algorithm in algorithms]
    found: dict[str, list[Series]] = {}
    kls: dict[str, list[Series]] = {}
    for method in methods:
        directories = [
            run(method, out / f"{method.name}-{seed}", seed, options.total_steps, options.environment, train, resume)
            for seed in range(1, options.seeds + 1)
        ]
        records = [read_run(directory) for directory in directories]
        found[method.name] = [plots.metric_of(record, "episode_return") for record in records]
        kls[method.name] = [finite(series(record.metrics, "kl")) for record in records]
    fixed = run(POLICY, out / POLICY.name, 0, max(options.total_steps // 5, 1), options.environment, train, resume)
    values = np.concatenate([number.values for numbers in found.values() for number in numbers])
    threshold = float(values.min() + values.max()) / 2
    results = []
    for method in methods:
        log.info("variance: %s", method.label)
        results.append(
            Result(
                method.label,
                bootstrap.aggregate(found[method.name]),
                tuple(float(number.values[-1]) for number in found[method.name]),
                tuple(bootstrap.steps_to(number, threshold) for number in found[method.name]),
                tuple(d for d in (worst_drop(number, threshold) for number in found[method.name]) if d is not None),
                spread(np.concatenate([number.values for number in kls[method.name]])),
                variance.noise(
                    *variance.gradients(
                        out / f"{method.name}-1", fixed, algorithms, options.batches, options.batch_steps
                    )
                ),
            )
        )
    plots.save(draw(results, options, threshold), out / "family.png")
    described = {"environment": options.environment, "total_steps": options.total_steps, "threshold": threshold}
    listed = [
        result._asdict() | {"curve": result.curve._asdict(), "noise": result.noise._asdict()} for result in results
    ]
    with replacing(out / "family.json") as temporary:
        temporary.write_text(json.dumps(described | {"methods": _plain(listed)}, indent=1), encoding="utf-8")
    return tuple(results)


def run(
    method: Method, directory: Path, seed: int, total_steps: int, environment: str, train: Train, resume: Resume
) -> Path:
    """The finished run of a method in its directory: found there, gone on with, or trained."""
    if not (directory / CONFIG).exists():
        log.info("%s, seed %d", method.label, seed)
        common = ["--env", environment, "--seed", str(seed), "--total-steps", str(total_steps), "--quiet"]
        train(method.algorithm, [*common, *method.flags, "--run-dir", str(directory)])
        return directory
    record = read_run(directory)
    there = (record.algorithm, record.environment, record.config.get("total_steps"), record.seed)
    if there != (method.algorithm, environment, total_steps, seed):
        raise ValueError(f"{directory} holds another run {there}; name another --out, or remove it")
    if not (directory / SUMMARY).exists():
        resume([str(directory)])
    return directory


# --- stability ---


def worst_drop(number: Series, threshold: float) -> float | None:
    """How far the value falls below its best so far, at worst, once it has reached the threshold; None: it did not.

    >>> worst_drop(Series(np.arange(5.0), np.array([9.0, 1.0, 5.0, 8.0, 6.0])), 9.5) is None
    True
    >>> worst_drop(Series(np.arange(5.0), np.array([1.0, 5.0, 8.0, 6.0, 9.0])), 4.0)
    2.0
    """
    reached = np.flatnonzero(number.values >= threshold)
    if not len(reached):
        return None
    since = number.values[reached[0] :]
    return float((np.maximum.accumulate(since) - since).max())


def spread(values: Float[np.ndarray, " points"]) -> tuple[float, float, float] | None:
    if not len(values):
        return None
    low, middle, high = np.quantile(np.maximum(values, 0.0), [0.05, 0.5, 0.95])
    return float(low), float(middle), float(high)


# --- what is shown ---


def draw(results: Sequence[Result], options: Options, threshold: float) -> Figure:
    """Four panels; a method keeps its colour and its row."""
    figure = Figure(figsize=(13, 9), dpi=130, layout="constrained")
    curves, gradient, drop, kl = figure.subplots(2, 2).flat
    plots.frame(curves, "Sample efficiency")
    curves.set(xlabel="environment steps", ylabel="return, last 100 training episodes")
    for position, result in enumerate(results):
        plots.draw_curve(curves, result.curve, result.label, *plots.look(position))
    plots.draw_threshold(curves, round(threshold))
    curves.legend(frameon=False, fontsize=8.5, labelcolor=plots.INK, loc="upper left")
    _rows(
        gradient, results, "Variance of the gradient at one policy", "noise scale (environment steps), less is better"
    )
    _rows(drop, results, "Stability: worst loss once learnt", f"return lost after reaching {threshold:.0f}, each seed")
    _rows(kl, results, "Size of an update", "KL[old‖new] per iteration (nats): median, 5% to 95%")
    for position, result in enumerate(results):
        colour, row = plots.look(position)[0], len(results) - 1 - position
        noise = result.noise
        if np.isfinite(noise.scale):
            gradient.plot([noise.low, noise.high], [row, row], color=colour, linewidth=3, alpha=0.4)
            gradient.plot(noise.scale, row, "o", color=colour)
        else:
            gradient.annotate(
                "no signal seen", (0.98, row), xycoords=("axes fraction", "data"), ha="right", va="center"
            )
        drop.plot(result.worst_drop, np.full(len(result.worst_drop), row), "o", color=colour, alpha=0.7)
        if len(result.worst_drop) < len(result.final):
            note = f"{len(result.worst_drop)} of {len(result.final)} got there"
            drop.annotate(note, (0.98, row), xycoords=("axes fraction", "data"), ha="right", va="center", fontsize=8)
        if result.kl is None:
            kl.annotate("not recorded", (0.02, row), xycoords=("axes fraction", "data"), va="center", fontsize=8)
        else:
            kl.plot([max(result.kl[0], 1e-7), result.kl[2]], [row, row], color=colour, linewidth=3, alpha=0.4)
            kl.plot(max(result.kl[1], 1e-7), row, "o", color=colour)
    gradient.set_xscale("log")
    if any(result.kl for result in results):
        kl.set_xscale("log")
    seeds = f"{options.seeds} seeds; band: 95% bootstrap interval of the mean" if options.seeds > 1 else "one seed"
    figure.suptitle(f"{options.environment}: the on-policy family", fontsize=14, fontweight="bold", color=plots.INK)
    figure.supxlabel(seeds, fontsize=8, color=plots.INK, alpha=0.7)
    return figure


def _rows(axes: Axes, results: Sequence[Result], title: str, xlabel: str) -> None:
    plots.frame(axes, title)
    axes.set(xlabel=xlabel, ylim=(-0.6, len(results) - 0.4))
    axes.set_yticks(range(len(results)), [result.label for result in reversed(results)])


def table(results: Sequence[Result]) -> Table:
    """The same numbers in rows."""
    columns = (
        "method",
        "last return",
        "reached",
        "median steps to it",
        "noise scale (steps)",
        "cosine",
        "worst drop",
        "KL",
    )
    found = Table(*columns)
    for result in results:
        steps = float(np.median(result.steps_to_threshold))
        found.add_row(
            result.label,
            f"{np.mean(result.final):.0f} ({min(result.final):.0f}–{max(result.final):.0f})",
            f"{len(result.worst_drop)}/{len(result.final)}",
            f"{steps:,.0f}" if np.isfinite(steps) else "–",
            f"{result.noise.scale:,.0f} ({result.noise.low:,.0f}–{result.noise.high:,.0f})",
            f"{result.noise.cosine:.2f}",
            f"{max(result.worst_drop):.0f}" if result.worst_drop else "–",
            f"{result.kl[1]:.4f}" if result.kl else "–",
        )
    return found


def _plain(value: Any) -> Any:
    """JSON has no arrays and no infinity: lists, and null."""
    if isinstance(value, dict):
        return {name: _plain(part) for name, part in value.items()}
    if isinstance(value, list | tuple | np.ndarray):
        return [_plain(part) for part in value]
    if isinstance(value, float | np.floating):
        return float(value) if np.isfinite(value) else None
    return value
