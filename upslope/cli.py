"""The command line: `upslope COMMAND …`. Nothing heavy is imported before a command is known."""

import argparse
import contextlib
import difflib
import json
import logging
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.logging import RichHandler
from rich.markup import escape

from upslope.language import commands

ALGORITHMS = {  # name -> where its train() and its configuration are
    "reinforce": ("upslope.control.reinforce", "REINFORCE"),
    "a2c": ("upslope.control.actor_critic", "A2C"),
    "a3c": ("upslope.control.a3c", "A3C"),
    "trpo": ("upslope.control.trpo", "TRPO"),
    "acktr": ("upslope.control.acktr", "ACKTR"),
    "ppo": ("upslope.control.fast_ppo", "PPO"),
    "group-ppo": ("upslope.control.group_ppo", "GroupPPO"),
    "dqn": ("upslope.control.fast_dqn", "DQN"),
    "soft-q": ("upslope.control.soft_q", "SoftQ"),
    "ddpg": ("upslope.control.ddpg", "DDPG"),
    "td3": ("upslope.control.td3", "TD3"),
    "sac": ("upslope.control.sac", "SAC"),
    "es": ("upslope.control.es", "ES"),
    "cem": ("upslope.control.cem", "CEM"),
    **commands.ALGORITHMS,
}
COMPILED = ("ppo", "dqn", "soft-q", "ddpg", "td3", "sac")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status. What a user did wrong is said in a line, with status 2."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    console = Console(stderr=True)
    if not arguments or arguments[0] in ("-h", "--help"):
        Console(width=120).print(_help(), highlight=False, soft_wrap=True)
        return 0
    name, rest = arguments[0], arguments[1:]
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        console.print(
            f"[red]error:[/] unknown command {escape(repr(name))}.{hint} Known: {', '.join(COMMANDS)}", highlight=False
        )
        return 2
    handler = RichHandler(console=console, show_path=False, show_level=False, log_time_format="[%X]", markup=False)
    logging.basicConfig(level=logging.INFO, format="%(message)s", handlers=[handler], force=True)
    try:
        return COMMANDS[name](rest)
    except (ValueError, OSError) as error:
        notes = "".join(f"\n  {note}" for note in getattr(error, "__notes__", ()))
        console.print(f"[red]error:[/] {escape(str(error) + notes)}", highlight=False, soft_wrap=True)
        return 2
    except KeyboardInterrupt:
        console.print("interrupted; the last checkpoint is kept")
        return 130


def methods(arguments: list[str]) -> int:
    """the table of methods: Ψ, surrogate, constraint, data"""
    from rich.table import Table

    from upslope.methods import METHODS

    parser = _parser("methods", methods)
    parser.add_argument("--json", action="store_true", help="print one JSON array")
    if parser.parse_args(arguments).json:
        sys.stdout.write(json.dumps([row._asdict() for row in METHODS], ensure_ascii=False) + "\n")
        return 0
    columns = ("name", "psi", "surrogate", "constraint", "data", "gradient", "equation")
    title = f"∇J = E[ Σ Ψ ∇log π ]: a method is a choice of these. Trained by this version: {', '.join(ALGORITHMS)}"
    table = Table(*columns, title=title, row_styles=("", "dim"))
    for row in METHODS:
        table.add_row(*(escape(getattr(row, column)) for column in columns))
    console = Console()
    (console if console.is_terminal else Console(width=200)).print(table)
    return 0


def train(arguments: list[str]) -> int:
    """train ALGO --env ID | --model ID --data SOURCE [flags]: train an agent or a language model"""
    if not arguments or arguments[0] in ("-h", "--help"):
        Console().print(
            f"usage: upslope train ALGO --env ID | --model ID --data SOURCE [flags]\nALGO: {', '.join(ALGORITHMS)}",
            highlight=False,
            soft_wrap=True,
        )
        Console().print("upslope train ALGO --help lists every flag with its default.", highlight=False, soft_wrap=True)
        return 0
    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    early.add_argument("--seeds")
    known, rest = early.parse_known_args(arguments[1:])
    if known.seeds is not None:
        return _train_seeds(arguments[0], known.seeds, rest)
    _say_where(_trained(arguments[0], arguments[1:]))
    return 0


def _train_seeds(algorithm: str, text: str, arguments: list[str]) -> int:
    """One run after the other, each in a directory of its own; finished ones are left, unfinished ones go on."""
    from upslope.runs import seeds

    if any(word.split("=")[0] == "--seed" for word in arguments):
        raise ValueError("--seed is given beside --seeds; allowed: one of them")
    wanted, (module, kind) = seeds.parse(text), _algorithm(algorithm)
    first = _parse_config(algorithm, kind, arguments)
    directory = first.run.run_dir
    if not any(word.split("=")[0] == "--run-dir" for word in arguments):
        directory = directory.with_name(directory.name.removesuffix(f"-{first.run.seed}"))
    for seed in wanted:
        config = seeds.beneath(first, directory, seed)
        session = seeds.session(algorithm, config)
        if session is not None:
            module.train(config, session)
    runs = [directory / f"seed-{seed}" for seed in wanted]
    if all(json.loads((run / "summary.json").read_text()).get("episode_return") is not None for run in runs):
        compare([*map(str, runs), "--out", str(directory / "curves.png")])
    Console(width=120).print(f"runs: {directory}/seed-*", highlight=False, soft_wrap=True)
    return 0


def resume(arguments: list[str]) -> int:
    """resume RUN: go on with a run that was killed, exactly where its last checkpoint left it"""
    options = _with_env(_parser("resume", resume, run=True)).parse_args(arguments)
    from upslope.runs.run import SUMMARY, Run

    directory = options.run
    algorithm, module, config = _read_run(options)
    if (directory / SUMMARY).exists():
        logging.getLogger(__name__).info("%s is complete", directory)
        return 0
    module.train(config, Run.resume(directory, algorithm, config, config.total_steps))
    _say_where(directory)
    return 0


def evaluate(arguments: list[str]) -> int:
    """eval RUN [--episodes N] [--json]: play whole episodes with the trained policy"""
    parser = _with_env(_parser("eval", evaluate, run=True))
    parser.add_argument("--episodes", type=int, default=100, help="how many (default 100)")
    parser.add_argument("--seed", type=int, default=0, help="of the episodes (default 0)")
    parser.add_argument("--stochastic", action="store_true", help="sample actions instead of taking the policy's mode")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args(arguments)
    algorithm, _, config = _read_run(options)
    if algorithm in commands.ALGORITHMS:
        result = commands.evaluate(algorithm, config, options.run, options.episodes, options.seed)
    else:
        result = _load_agent(options).evaluate(options.episodes, options.seed, not options.stochastic).summary()
    if options.json:
        sys.stdout.write(json.dumps(result) + "\n")
    else:
        Console().print(
            f"{result['episodes']} episodes: return {result['mean_return']:.2f} ± {result['std_return']:.2f}"
            + (f", length {result['mean_length']:.1f}" if "mean_length" in result else "")
        )
    return 0


def watch(arguments: list[str]) -> int:
    """watch RUN --out FILE.gif|FILE.mp4: film one episode"""
    parser = _with_env(_parser("watch", watch, run=True))
    parser.add_argument("--out", type=Path, required=True, help="FILE.gif or FILE.mp4")
    parser.add_argument("--seed", type=int, default=0, help="of the episode (default 0)")
    parser.add_argument("--max-steps", type=int, default=2000, help="of the episode (default 2000)")
    options = parser.parse_args(arguments)
    from upslope.report.video import write_video

    os.environ.setdefault("SDL_VIDEODRIVER", "dummy")  # pictures are drawn in memory; SDL need not look for a screen
    agent = _load_agent(options)
    frames = (frame for frame, _ in agent.frames(options.seed, options.max_steps))
    write_video(frames, options.out, agent.frames_per_second())
    Console().print(f"film: {options.out}", highlight=False, soft_wrap=True)
    return 0


def compare(arguments: list[str]) -> int:
    """compare RUN... --out FILE.png: learning curves with confidence intervals over seeds"""
    parser = _parser("compare", compare)
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN")
    parser.add_argument("--out", type=Path, required=True, help="FILE.png, .svg or .pdf")
    parser.add_argument("--metric", default="episode_return", help="which number (default episode_return)")
    options = parser.parse_args(arguments)
    from upslope.report import plots

    thresholds = _thresholds(options.runs) if options.metric == "episode_return" else {}
    outcomes = plots.compare(options.runs, options.out, options.metric, thresholds=thresholds)
    Console(width=120).print(plots.table(outcomes), highlight=False)
    Console().print(f"picture: {options.out}", highlight=False, soft_wrap=True)
    return 0


def report(arguments: list[str]) -> int:
    """report RUN [--out FILE.html]: one self-contained page about a run"""
    parser = _parser("report", report, run=True)
    parser.add_argument("--out", type=Path, default=None, help="FILE.html (default RUN/report.html)")
    options = parser.parse_args(arguments)
    from upslope.report.page import write_page

    out = options.out or options.run / "report.html"
    write_page(options.run, out)
    Console().print(f"report: {out}", highlight=False, soft_wrap=True)
    return 0


def solve(arguments: list[str]) -> int:
    """solve METHOD --env ID: solve a tabular problem exactly, or learn it from samples, and draw it"""
    from upslope.exact import commands

    return commands.solve(arguments)


def lab(arguments: list[str]) -> int:
    """lab NAME: bias and variance of estimators, exactly, as a table and a picture"""
    from upslope.exact import commands

    return commands.lab(arguments)


def bench(arguments: list[str]) -> int:
    """bench NAME --out DIR: a family of methods, or speed beside the peers: a picture, a table, a file of numbers"""
    parser = _parser("bench", bench)
    names = ("family", "control")
    parser.add_argument("name", metavar="NAME", choices=names, help="family: the on-policy methods; control: speed")
    parser.add_argument("--out", type=Path, default=None, help="for the runs and the results (default runs/NAME-ENV)")
    family = parser.add_argument_group("family")
    family.add_argument("--env", default="CartPole-v1", help="environment (default CartPole-v1)")
    family.add_argument("--seeds", type=int, default=3, help="of each method (default 3)")
    family.add_argument("--total-steps", type=int, default=100_000, help="of each run (default 100000)")
    family.add_argument("--batches", type=int, default=32, help="that the variance is measured on (default 32)")
    family.add_argument("--batch-steps", type=int, default=4096, help="environment steps of each (default 4096)")
    control = parser.add_argument_group("control")
    control.add_argument("--peer", default=None, help="python that has stable-baselines3 and sb3-contrib")
    control.add_argument("--repeats", type=int, default=5, help="alternated (default 5)")
    control.add_argument("--workloads", nargs="+", default=["W1", "W2", "W3", "W6"], help="default: W1 W2 W3 W6")
    options = parser.parse_args(arguments)
    return (_bench_family if options.name == "family" else _bench_control)(options)


def _bench_family(options: argparse.Namespace) -> int:
    from upslope.bench import family

    out = options.out or Path("runs") / f"family-{options.env.replace('/', '-')}"
    asked = family.Options(options.env, options.seeds, options.total_steps, options.batches, options.batch_steps)
    results = family.compare(out, asked, ALGORITHMS, _trained, resume)
    Console(width=140).print(family.table(results), highlight=False)
    Console().print(f"picture: {out / 'family.png'}; numbers: {out / 'family.json'}", highlight=False, soft_wrap=True)
    return 0


def _bench_control(options: argparse.Namespace) -> int:
    from upslope.bench import control

    out = options.out or Path("runs") / "bench-control"
    results = control.compare(out, control.Options(tuple(options.workloads), options.repeats, options.peer))
    Console(width=140).print(control.table(results), highlight=False)
    Console().print(f"picture: {out / 'control.png'}; numbers: {out / 'control.json'}", highlight=False, soft_wrap=True)
    return 0


def fingerprint(arguments: list[str]) -> int:
    """fingerprint RUN: one hash of all resumable state; equal hashes, equal runs"""
    directory = _parser("fingerprint", fingerprint, run=True).parse_args(arguments).run
    from upslope.runs import checkpoint
    from upslope.runs.run import CHECKPOINTS, read_config

    read_config(directory)
    newest = checkpoint.newest(directory / CHECKPOINTS)
    if newest is None:
        raise ValueError(f"{directory} has no checkpoint yet")
    sys.stdout.write(checkpoint.fingerprint(newest.tensors, newest.state.get("segments")) + "\n")
    return 0


COMMANDS: dict[str, Callable[[list[str]], int]] = {
    "methods": methods,
    "train": train,
    "resume": resume,
    "eval": evaluate,
    "watch": watch,
    "compare": compare,
    "report": report,
    "solve": solve,
    "lab": lab,
    "bench": bench,
    "fingerprint": fingerprint,
}


def _thresholds(runs: Sequence[Path]) -> dict[str, float]:
    """The return at which Gymnasium calls each environment solved, where it knows the environment and says so."""
    import gymnasium

    from upslope.report.records import read_run

    found = {}
    for environment_id in {read_run(run).environment for run in runs}:
        spec = gymnasium.registry.get(environment_id)  # looked up, never imported
        if spec is not None and spec.reward_threshold is not None:
            found[environment_id] = float(spec.reward_threshold)
    return found


class _Parser(argparse.ArgumentParser):
    """argparse that suggests the nearest flag."""

    def error(self, message: str) -> Any:
        flags = [flag for action in self._actions for flag in action.option_strings]
        unknown = [word for word in message.split() if word.startswith("--")] if "unrecognized" in message else []
        near = [match for word in unknown for match in difflib.get_close_matches(word, flags, n=1)]
        raise ValueError(f"{self.prog}: {message}" + (f". Did you mean {near[0]}?" if near else ""))


def _parser(name: str, command: Callable[..., int], run: bool = False) -> argparse.ArgumentParser:
    parser = _Parser(prog=f"upslope {name}", description=command.__doc__, allow_abbrev=False)
    if run:
        parser.add_argument("run", type=Path, metavar="RUN", help="a run directory")
    return parser


def _with_env(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    parser.add_argument(
        "--env", help="the run's environment again, where its id names a module whose code is to be run"
    )
    return parser


def _algorithm(name: str) -> tuple[Any, type]:
    if name not in ALGORITHMS:
        near = difflib.get_close_matches(name, ALGORITHMS, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"unknown algorithm {name!r}.{hint} Known: {', '.join(ALGORITHMS)}")
    import importlib

    path, kind = ALGORITHMS[name]
    module = importlib.import_module(path)
    return module, getattr(module, kind)


def _trained(algorithm: str, arguments: list[str]) -> Path:
    """The directory of a run that these flags ask for."""
    module, kind = _algorithm(algorithm)
    config = _parse_config(algorithm, kind, arguments)
    module.train(config)
    return config.run.run_dir


def _parse_config(algorithm: str, kind: type, arguments: list[str]) -> Any:
    """Flags over the preset of the environment over the defaults."""
    if algorithm in commands.ALGORITHMS:
        return commands.parse(algorithm, kind, arguments)
    import tyro

    from upslope.control import factory, presets

    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    early.add_argument("--env", "--environment.id", dest="env", default=kind().environment.id)
    early.add_argument("--preset", action=argparse.BooleanOptionalAction, default=True)
    early.add_argument("--compile", action=argparse.BooleanOptionalAction)
    known, rest = early.parse_known_args(arguments)
    rest = rest if known.compile is None else ["--compile", str(known.compile), *rest]
    if known.compile and algorithm not in COMPILED:
        raise ValueError(f"--compile is for {', '.join(COMPILED)}; {algorithm} is not compiled")
    if known.env.startswith("upslope/"):  # a problem of the zoo
        known.env = f"upslope.exact.registration:{known.env}"
    if not any("envpool" in word for word in rest):
        factory.register(known.env)  # an unknown id is said before anything else
    preset = getattr(presets, algorithm.replace("-", "_"))(known.env) if known.preset else None
    if preset is not None:
        note = " (not trained to convergence here)" if known.env in presets.NOT_TRAINED_TO_CONVERGENCE else ""
        logging.getLogger(__name__).info("settings: the preset for %s%s; --no-preset for the defaults", known.env, note)
    default, rest = preset or kind(), ["--env", known.env, *rest]
    config = tyro.cli(
        kind, args=rest, default=default, prog=f"upslope train {algorithm}", config=(tyro.conf.AvoidSubcommands,),
        description=sys.modules[kind.__module__].__doc__,
    )  # fmt: skip
    if config.run.run_dir is None:
        import dataclasses

        name = f"{algorithm}-{config.environment.id.replace('/', '-')}-{config.run.seed}"
        config = dataclasses.replace(config, run=dataclasses.replace(config.run, run_dir=Path("runs") / name))
    return config


def _read_run(options: argparse.Namespace) -> tuple[str, Any, Any]:
    """Algorithm, its module and the settings of a run. What a run directory says is data: it imports nothing."""
    from upslope.runs.run import read_config
    from upslope.runs.settings import from_json

    directory = options.run
    described = read_config(directory)
    algorithm = described["algorithm"]
    import dataclasses

    module, kind = _algorithm(algorithm)
    config = from_json(kind, described["config"])
    config = dataclasses.replace(config, run=dataclasses.replace(config.run, run_dir=directory))
    if algorithm in commands.ALGORITHMS:
        return algorithm, module, config
    module_of_id = config.environment.id.rpartition(":")[0]
    if module_of_id and not module_of_id.startswith("upslope.") and options.env != config.environment.id:
        raise ValueError(
            f"{directory} names the environment {config.environment.id!r}, which would run code of the module "
            f"{module_of_id!r}: say so yourself with --env {config.environment.id}"
        )
    return algorithm, module, config


def _load_agent(options: argparse.Namespace) -> Any:
    from upslope.control.agent import load

    algorithm, _, config = _read_run(options)
    if algorithm in commands.ALGORITHMS:
        raise ValueError(f"{options.run} is a run of {algorithm}: a language model has no environment to be filmed")
    return load(config, options.run)


def _say_where(directory: Path) -> None:
    from upslope.runs import distributed

    distributed.leave()
    if distributed.rank() > 0:
        return
    summary = json.loads((directory / "summary.json").read_text())
    console = Console(width=120)
    if summary.get("episode_return") is not None:
        seconds, value = summary["seconds"], summary["episode_return"]
        console.print(
            f"done in {seconds:.0f} s; mean return of the last 100 training episodes: {value:.1f}", highlight=False
        )
    console.print(f"run: {directory}", highlight=False, soft_wrap=True)
    film = "" if "reward" in summary or "loss" in summary else f" · upslope watch {directory} --out episode.gif"
    hint = f"next: upslope report {directory} · upslope eval {directory}{film}"
    console.print(hint, highlight=False, soft_wrap=True)


def _help() -> str:
    lines = [
        "[bold]upslope[/]: policy gradients from a gridworld to a language model",
        "",
        escape("usage: upslope COMMAND [flags]"),
        "",
    ]
    lines += [f"  {name:<12} {escape(command.__doc__ or '')}" for name, command in COMMANDS.items()]
    return "\n".join([*lines, "", "upslope COMMAND --help says more."])


def run() -> None:
    """The console script."""
    with contextlib.suppress(BrokenPipeError):
        sys.exit(main())


if __name__ == "__main__":
    run()
