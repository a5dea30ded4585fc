"""What `upslope solve` and `upslope lab` do: typed options, a picture, a table, or JSON.

upslope solve value-iteration --env FrozenLake-v1 --gamma 0.99
upslope solve q-learning --env zoo:cliff --step-size 0.5 --episodes 500
upslope lab gae --out gae.png
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import tyro
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from upslope.exact import lab_pictures, laboratory, measurement, pictures, sampled, surrogate_studies, zoo
from upslope.exact.dynamic_programming import Solution, modified_policy_iteration, policy_iteration, value_iteration
from upslope.exact.evaluation import evaluate_policy
from upslope.exact.mdp import MDP
from upslope.exact.soft import soft_policy_iteration, soft_value_iteration
from upslope.exact.tables import from_gymnasium

Method = Literal[
    "value-iteration", "policy-iteration", "modified-policy-iteration", "soft-value-iteration", "soft-policy-iteration",
    "evaluate", "monte-carlo", "td", "sarsa", "expected-sarsa", "q-learning", "double-q-learning",
]  # fmt: skip
LEARNERS: dict[str, Callable[..., sampled.Learned]] = {
    "sarsa": sampled.sarsa,
    "expected-sarsa": sampled.expected_sarsa,
    "q-learning": sampled.q_learning,
    "double-q-learning": sampled.double_q_learning,
}
SAMPLING = ("episodes", "step_size", "seed", "runs")
OPTIONS = {  # which options a method has, beside those of the problem
    "value-iteration": ("tol", "stop"),
    "policy-iteration": ("tol", "evaluation"),
    "modified-policy-iteration": ("tol", "stop"),
    "soft-value-iteration": ("tol", "alpha"),
    "soft-policy-iteration": ("tol", "alpha"),
    "evaluate": ("policy",),
    "monte-carlo": ("policy", *SAMPLING),
    "td": ("policy", "lam", *SAMPLING),
} | dict.fromkeys(LEARNERS, ("epsilon", *SAMPLING))
OPTIONAL = tuple(dict.fromkeys(name for names in OPTIONS.values() for name in names))


@dataclass(frozen=True)
class Solve:
    """Solve a tabular problem exactly, or learn it from samples, and draw its values and policy."""

    method: tyro.conf.Positional[Method]
    """how"""
    env: str
    """a toy-text environment (FrozenLake-v1, Taxi-v4, CliffWalking-v1, Blackjack-v1) or zoo:NAME"""
    gamma: float | None = None
    """discount; the problem's own if not given (toy-text: 1)"""
    horizon: int | None = None
    """number of steps that count; unlimited if not given, unless the problem has its own"""
    env_option: tuple[str, ...] = ()
    """options of the environment, e.g. map_name=8x8 is_slippery=False"""
    tol: float | None = None
    """dynamic programming: bound on the error of the values, in units of reward (1e-8)"""
    stop: Literal["sup", "span"] | None = None
    """(modified) value iteration: stopping rule (sup for value iteration, span for modified policy iteration)"""
    evaluation: Literal["exact", "iterative"] | None = None
    """policy iteration: how a policy is evaluated (exact)"""
    alpha: float | None = None
    """soft methods: temperature (1)"""
    policy: Literal["uniform", "optimal"] | None = None
    """evaluate, monte-carlo, td: whose values (uniform)"""
    episodes: int | None = None
    """sampled methods: episodes of each run (2000)"""
    step_size: float | None = None
    """sampled methods: constant step size (0.1; monte-carlo: 1/n)"""
    epsilon: float | None = None
    """control: share of random actions (0.1)"""
    lam: float | None = None
    """td: λ (0)"""
    runs: int | None = None
    """sampled methods: independent runs that are averaged (10)"""
    seed: int | None = None
    """sampled methods: seed (0)"""
    out: Path | None = None
    """picture to write, .png, .svg or .pdf; solve-METHOD-ENV.png if not given, none with --json"""
    json: bool = False
    """print one JSON object instead of a picture"""


@dataclass(frozen=True)
class Lab:
    """Compare estimators: exact bias and variance where trajectories can be listed, intervals where not."""

    study: tyro.conf.Positional[Literal["variance", "bias", "kl", "clip", "gae", "baselines", "importance"]]
    """what to compare"""
    env: str = "random"
    """a random problem of 4 states, a toy-text environment (FrozenLake-v1, …), or zoo:NAME (not for kl)"""
    horizon: int = 6
    """length of the trajectories"""
    gamma: float = 0.9
    """discount of the objective"""
    seed: int = 0
    """of the problem, the policy and the samples"""
    samples: int | None = None
    """trajectories to draw, instead of listing all; if not given, 10,000 where they are too many to list"""
    out: Path | None = None
    """picture to write; lab-STUDY.png if not given, none with --json"""
    json: bool = False
    """print one JSON object instead of tables and a picture"""


def solve(arguments: list[str]) -> int:
    """solve METHOD --env ID: exact values and policies of a tabular problem, as a picture"""
    return run_solve(tyro.cli(Solve, args=arguments, prog="upslope solve"))


def lab(arguments: list[str]) -> int:
    """lab STUDY: bias and variance of estimators, exact or with intervals, as a table and a picture"""
    return run_lab(tyro.cli(Lab, args=arguments, prog="upslope lab"))


def run_solve(config: Solve) -> int:
    """Solves, prints, draws; 0 on success.

    Raises:
        ValueError: an unknown problem, an option that the method does not have, or whatever the solver refuses.
    """
    for name in OPTIONAL:
        if getattr(config, name) is not None and name not in OPTIONS[config.method]:
            flags = ", ".join("--" + option.replace("_", "-") for option in OPTIONS[config.method])
            raise ValueError(f"--{name.replace('_', '-')}: {config.method} has no such option; it has {flags}")
    mdp = problem(config.env, config.gamma, config.horizon, config.env_option)
    started = time.perf_counter()
    with _Progress(config.method, quiet=config.json) as progress:
        solution, facts = _solution(config, mdp, progress)
    facts |= {"seconds": time.perf_counter() - started}
    values, policy, q_values = solution.values, solution.policy, solution.q_values
    if values.ndim == 2:  # a horizon: the first step's, with all steps to go
        values, policy, q_values = values[-1], policy[-1], q_values[-1]
    start = float(np.asarray(mdp.initial) @ values)
    if config.json:
        known = {"method": config.method, "env": config.env, "gamma": mdp.gamma, "horizon": mdp.horizon} | facts
        known |= {"value_of_start": start, "values": values.tolist(), "policy": policy.tolist()}
        sys.stdout.write(json.dumps(known) + "\n")
    else:
        horizon = f" · {mdp.horizon} steps to go" if mdp.horizon else ""
        described = " · ".join(f"{k.replace('_', ' ')} {_fact(v)}" for k, v in facts.items() if k != "seconds")
        subtitle = f"γ = {mdp.gamma:g}{horizon} · V(start) = {start:.6g} · {described}"
        tolerance = 1e-9 + 4.0 * float(facts.get("error_bound", 0.0))
        weights = pictures.action_weights(mdp, policy, q_values, tolerance)
        title = f"{config.env} · {config.method.replace('-', ' ')}"
        picture = pictures.Picture(mdp, values, weights, title, subtitle)
        console = _console()
        console.print(pictures.terminal(picture, console.width))
    if config.out is not None or not config.json:
        out = config.out or Path(f"solve-{config.method}-{config.env.replace(':', '-').replace('/', '-')}.png")
        if config.json:
            weights = pictures.action_weights(mdp, policy, q_values, 1e-9)
            picture = pictures.Picture(mdp, values, weights, f"{config.env} · {config.method}", f"γ = {mdp.gamma:g}")
        _write(lambda: pictures.draw(picture, out), out, config.json)
    return 0


def run_lab(config: Lab) -> int:
    """Runs a study, prints its tables, draws its figure; 0 on success."""
    given: dict[str, Any] = {} if config.samples is None else {"samples": config.samples}
    if given and config.study == "clip":
        raise ValueError("--samples: clip lists no trajectories; it is exact for every problem")
    if config.study == "kl":
        study = surrogate_studies.kl_study(config.seed, **given)
    else:
        if config.env == "random":
            mdp = measurement.small_problem(config.seed, config.gamma, config.horizon)
        else:
            mdp = problem(config.env, config.gamma, config.horizon)
        studies: dict[str, Callable[..., laboratory.Study]] = {
            "variance": laboratory.variance_study,
            "bias": laboratory.bias_study,
            "gae": laboratory.gae_study,
            "baselines": laboratory.baseline_study,
            "importance": laboratory.importance_study,
            "clip": surrogate_studies.clip_study,
        }
        study = studies[config.study](mdp, config.seed, **given)
    if config.json:
        how = {"method": "exact" if study.samples is None else "Monte Carlo", "samples": study.samples}
        tables = [table._asdict() for table in study.tables]
        found = {"study": study.name, "lesson": study.lesson, **how, "tables": tables}
        sys.stdout.write(json.dumps(found) + "\n")
    else:
        console = _console()
        for table in study.tables:
            console.print(_table(table))
        console.print(f"{study.lesson}\n{study.method}")
    if config.out is not None or not config.json:
        out = config.out or Path(f"lab-{config.study}.png")
        _write(lambda: lab_pictures.draw(study, out), out, config.json)
    return 0


def problem(env: str, gamma: float | None, horizon: int | None, options: tuple[str, ...] = ()) -> MDP:
    """The MDP behind `--env`.

    >>> problem("zoo:random-walk", gamma=None, horizon=None).num_states
    7
    """
    if env.startswith("zoo:"):
        if options:
            raise ValueError(f"--env-option: zoo problems have none, got {', '.join(options)}")
        mdp = zoo.problem(env.removeprefix("zoo:"))
    else:
        mdp = from_gymnasium(env, **dict(_option(option) for option in options))
    changes: dict[str, Any] = {} if gamma is None else {"gamma": gamma}
    return mdp.replace(**(changes if horizon is None else changes | {"horizon": horizon}))


def _option(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not equals:
        raise ValueError(f"--env-option: name=value is needed, got {text!r}")
    words = {"true": True, "false": False}
    try:
        return name, words[value.lower()] if value.lower() in words else json.loads(value)
    except json.JSONDecodeError:
        return name, value


def _solution(config: Solve, mdp: MDP, progress: _Progress) -> tuple[Solution, dict[str, Any]]:
    given = {name: getattr(config, name) for name in OPTIONAL if getattr(config, name) is not None}
    exact: dict[str, Callable[..., Solution]] = {
        "value-iteration": value_iteration,
        "policy-iteration": policy_iteration,
        "modified-policy-iteration": modified_policy_iteration,
        "soft-value-iteration": soft_value_iteration,
        "soft-policy-iteration": soft_policy_iteration,
    }
    if config.method in exact:
        progress.target = given.get("tol", 1e-8)
        solution = exact[config.method](mdp, watch=progress.watch, **given)
        facts = {"iterations": solution.iterations, "residual": solution.residual}
        return solution, facts | {"error_bound": solution.error_bound}
    if config.method in LEARNERS:
        return _learned(config.method, mdp, given, progress)
    return _predicted(config.method, mdp, given, progress)


def _learned(method: str, mdp: MDP, given: dict[str, Any], progress: _Progress) -> tuple[Solution, dict[str, Any]]:
    options = {"episodes": 2000, "runs": 10} | given
    generator = np.random.default_rng(options.pop("seed", 0))
    watch = progress.episodes(options["episodes"])
    learned = LEARNERS[method](mdp, generator=generator, max_steps=10_000, watch=watch, **options)
    q_values = learned.q_values.mean(axis=0)
    last = learned.episode_returns[:, -min(100, options["episodes"]) :].mean(axis=1)
    facts: dict[str, Any] = {"episodes": options["episodes"], "runs": options["runs"]}
    facts |= {"return_last_100": float(last.mean()), "ci95": _half_width(last)}
    solution = Solution(q_values.max(axis=1), q_values.argmax(axis=1), q_values, 0, np.nan, np.inf, np.array([]))
    return solution, facts


def _predicted(method: str, mdp: MDP, given: dict[str, Any], progress: _Progress) -> tuple[Solution, dict[str, Any]]:
    uniform = np.full((mdp.num_states, mdp.num_actions), 1.0 / mdp.num_actions)
    whose = given.pop("policy", "uniform")
    best = value_iteration(mdp).policy if mdp.horizon else policy_iteration(mdp).policy
    policy = uniform if whose == "uniform" else best
    if method != "evaluate" and policy.shape[0] != mdp.num_states:
        raise ValueError(f"--policy optimal: {method} evaluates one policy for all time; leave --horizon away")
    exact = evaluate_policy(mdp, policy)
    values, q_values, facts = exact.values, exact.q_values, {"policy": whose}
    if method != "evaluate":
        options = {"episodes": 2000, "runs": 10} | given
        generator = np.random.default_rng(options.pop("seed", 0))
        learn: Callable[..., sampled.Predicted] = sampled.td if method == "td" else sampled.monte_carlo
        watch = progress.episodes(options["episodes"])
        found = learn(mdp, policy, generator=generator, watch=watch, **options).values[:, -1]
        truth = exact.values[-1] if exact.values.ndim == 2 else exact.values
        error = np.sqrt(((found - truth)[:, ~mdp.terminal] ** 2).mean(axis=1))
        values, q_values = found.mean(axis=0), q_values[-1] if q_values.ndim == 3 else q_values
        facts |= {"episodes": options["episodes"], "rms_error": float(error.mean()), "ci95": _half_width(error)}
    shown = policy if policy.ndim == 2 and policy.shape == uniform.shape else np.asarray(policy)
    return Solution(values, shown, q_values, 0, np.nan, np.inf, np.array([])), facts


def _half_width(samples: np.ndarray) -> float | None:
    return 1.96 * float(samples.std(ddof=1)) / len(samples) ** 0.5 if len(samples) > 1 else None


def _console() -> Console:
    """The terminal; where there is none, wide enough for the tables."""
    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=140)


def _write(draw: Callable[[], None], out: Path, quiet: bool) -> None:
    if out.suffix not in (".png", ".svg", ".pdf"):
        raise ValueError(f"--out: .png, .svg or .pdf is needed, got {out}")
    draw()
    if not quiet:
        _console().print(f"picture: {out}")


def _table(table: laboratory.Table) -> Table:
    shown = Table(title=table.title, title_justify="left", header_style="bold")
    for name, value in table.rows[0].items():
        shown.add_column(name, justify="left" if isinstance(value, str) else "right")
    for row in table.rows:
        shown.add_row(*(_cell(value) for value in row.values()))
    return shown


def _fact(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _cell(value: Any) -> str:
    if not isinstance(value, float):
        return str(value)
    return "0" if abs(value) < 1e-12 else f"{value:.4g}"


class _Progress:
    """A bar for work that takes long: how far the error has fallen towards the target, in decades, or the episodes."""

    def __init__(self, title: str, quiet: bool) -> None:
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.fields[state]}"),
            TimeElapsedColumn(),
        )
        self._bar = Progress(
            *columns, console=Console(stderr=True), transient=True, disable=quiet, refresh_per_second=4
        )
        self._task = self._bar.add_task(title, total=1.0, state="")
        self._first: float | None = None
        self._last = 0.0
        self.target = 1e-8

    def __enter__(self) -> _Progress:
        self._bar.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._bar.stop()

    def watch(self, iterations: int, bound: float) -> None:
        now = time.monotonic()
        if now - self._last < 0.1 or not 0.0 < bound < np.inf:
            return
        self._first, self._last = self._first or bound, now
        decades = np.log(self._first / min(self.target, self._first * 0.999))
        done = float(np.log(self._first / bound) / decades)
        self._bar.update(self._task, completed=done, state=f"{iterations:,} iterations, error ≤ {bound:.2g}")

    def episodes(self, total: int) -> Callable[[int], None]:
        """A watch for learners: the share of the episodes that are done."""

        def watch(done: int) -> None:
            now = time.monotonic()
            if now - self._last >= 0.1:
                self._last = now
                self._bar.update(self._task, completed=done / total, state=f"{done:,} of {total:,} episodes")

        return watch
