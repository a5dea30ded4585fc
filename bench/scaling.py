"""How PPO's rate grows: steps a second against environments, minibatch size and network width, beside the bound.

CartPole as a tensor environment, everything in one compiled program, one core. The bound is arithmetic alone: the
matrix products of a step's rollout, epochs and diagnostics at the core's measured peak.
Run: `taskset -c 0 python -m bench.scaling --out DIR`.
"""

import argparse
import itertools
import json
import logging
import math
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from matplotlib.figure import Figure

from upslope.bench import control
from upslope.control import environments, networks, ppo

ITERATIONS, LENGTH = 12, 64


class Point(NamedTuple):
    """One setting."""

    axis: str
    value: int
    rate: float  # steps a second, steady
    bound: float  # steps a second if nothing but products took time


def settings() -> Iterator[tuple[str, int, ppo.PPO]]:
    """One of three numbers varied, the others held."""
    for count in (1, 4, 16, 64, 256, 1024, 4096):
        yield "environments", count, _config(count, max(16, count * LENGTH // 4), 64)
    for rows in (64, 256, 1024, 4096):
        yield "minibatch", rows, _config(64, rows, 64)
    for width in (16, 64, 256, 512):
        yield "width", width, _config(64, 1024, width)


def _config(count: int, rows: int, width: int) -> ppo.PPO:
    return ppo.PPO(
        environment=environments.Config("CartPole-v1", count), rollout_length=LENGTH, minibatch_size=rows,
        network=networks.Config(hidden=(width, width)),
    )  # fmt: skip


def flops(config: ppo.PPO) -> float:
    """Of one environment step: 2 a weight forwards, 4 backwards.

    Acting, log-probabilities and values, values of successors, the epochs, diagnostics.
    """
    widths = (4, *config.network.hidden)
    trunk = sum(a * b for a, b in itertools.pairwise(widths))
    policy, critic = trunk + 2 * widths[-1], trunk + widths[-1]
    both = policy + critic
    unneeded = 2 * widths[0] * widths[1]  # the gradient of the observation, of both networks
    return 2.0 * (policy + both + critic + both) + (6.0 * both - 2.0 * unneeded) * config.num_epochs


def peak() -> float:
    """FLOP/s of the best large float32 product."""
    a, b = torch.randn(1024, 1024), torch.randn(1024, 1024)
    ways = [lambda: a @ b]
    if torch.backends.mkldnn.is_available():
        ways.append(lambda: torch.ops.mkldnn._linear_pointwise(a, b, None, "none", [], ""))
    best = math.inf
    for way in ways:
        for _ in range(20):
            began = time.perf_counter()
            way()
            best = min(best, time.perf_counter() - began)
    return 2 * 1024**3 / best


def draw(points: list[Point]) -> Figure:
    axes_of = list(dict.fromkeys(point.axis for point in points))
    figure = Figure(figsize=(10, 3.2), layout="constrained")
    for place, (axis, panel) in enumerate(zip(axes_of, figure.subplots(1, len(axes_of), sharey=True), strict=True)):
        chosen = [point for point in points if point.axis == axis]
        panel.loglog([p.value for p in chosen], [p.bound for p in chosen], "--", color="0.5", label="bound")
        panel.loglog([p.value for p in chosen], [p.rate for p in chosen], "o-", color="C2", label="measured")
        panel.set_xticks([p.value for p in chosen], [str(p.value) for p in chosen])
        panel.minorticks_off()
        panel.set_xlabel(axis)
        if place == 0:
            panel.set_ylabel("environment steps a second")
            panel.legend()
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    out: Path = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    logging.getLogger("upslope").setLevel(logging.WARNING)
    torch.set_num_threads(1)
    core, points = peak(), []
    logging.info("peak %.0f GFLOP/s", core / 1e9)
    for axis, value, config in settings():
        steps = ITERATIONS * config.environment.num_envs * LENGTH * (8 if config.environment.num_envs < 256 else 1)
        workload = control.Workload("", "", replace(config, total_steps=steps), steps, {}, ("tensor",))
        points.append(Point(axis, value, control.train(workload, "tensor", 0).rate, core / flops(config)))
        logging.info("%s %d: %.0f steps/s, bound %.0f, %.0f%%", *points[-1], 100 * points[-1].rate / points[-1].bound)
    (out / "scaling.json").write_text(json.dumps([point._asdict() for point in points], indent=1))
    draw(points).savefig(out / "scaling.png", dpi=150)


if __name__ == "__main__":
    main()
