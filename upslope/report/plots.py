"""Pictures of runs. Plain arrays to a matplotlib Figure; `compare` and `diagnose` do it from run directories to a file.

Colours are Okabe and Ito's (2008), told apart by colour-blind readers; beyond six lines the dashes change too.
"""

import json
from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator

from upslope.report.bootstrap import Curve, aggregate, steps_to
from upslope.report.diagnostics import meaning, ordered
from upslope.report.files import replacing
from upslope.report.records import Record, Series, finite, flatten, names, read_run, series

INK, ACCENT, GUIDE = "#24292f", "#0072b2", "#d55e00"
COLOURS = (ACCENT, GUIDE, "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
DASHES = ("-", "--", "-.", ":")
SUFFIXES = (".png", ".svg", ".pdf")


class Outcome(NamedTuple):
    """One curve of a comparison in numbers. Without a threshold, `steps_to_threshold` is None."""

    label: str
    environment: str
    seeds: int
    steps: float  # the last step that all seeds reached; where `final` is read
    final: float
    low: float | None  # interval of the final mean; None with one seed
    high: float | None
    steps_to_threshold: float | None  # median over seeds; infinite when at least half of them did not get there
    reached: int  # seeds that reached the threshold


def learning_curve(
    panels: Mapping[str, Mapping[str, Curve]],
    ylabel: str,
    thresholds: Mapping[str, float] | None = None,
    confidence: float = 0.95,
) -> Figure:
    """One panel per environment, one line per method, a band where there are several seeds.

    `panels`: title → label → curve. A label keeps its colour in all panels.
    `thresholds`: title → value, drawn as a dotted line with its number. `confidence` is only written below the bands.
    """
    if not panels:
        raise ValueError("panels: at least one is needed")
    columns = min(len(panels), 3)
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(max(6.4, 4.4 * columns), 4.0 * rows), dpi=150, layout="constrained")
    labels = list(dict.fromkeys(label for curves in panels.values() for label in curves))
    looks = {label: look(position) for position, label in enumerate(labels)}
    for position, (title, curves) in enumerate(panels.items()):
        axes = figure.add_subplot(rows, columns, position + 1)
        frame(axes, title)
        axes.set(xlabel="environment steps", ylabel=ylabel)
        for label, curve in curves.items():
            draw_curve(axes, curve, label, *looks[label])
        if thresholds and title in thresholds:
            draw_threshold(axes, thresholds[title])
        axes.legend(frameon=False, fontsize=9, labelcolor=INK, loc="best")
    if any(curve.low is not None for curves in panels.values() for curve in curves.values()):
        note = f"band: {confidence:.0%} bootstrap interval of the mean over seeds"
        figure.supxlabel(note, fontsize=8, color=INK, alpha=0.7)
    return figure


def diagnostics(found: Mapping[str, Series], columns: int = 3) -> Figure:
    """Every number of one run in a grid of small panels."""
    if not found:
        raise ValueError("found: no number to draw")
    columns = min(columns, len(found))
    rows = -(-len(found) // columns)
    figure = Figure(figsize=(3.9 * columns, 2.5 * rows), dpi=150, layout="constrained")
    for position, name in enumerate(ordered(tuple(found))):
        draw_number(figure.add_subplot(rows, columns, position + 1), name, found[name])
    return figure


def small(name: str, number: Series) -> Figure:
    """One number of one run, for a page that says in words what it means."""
    figure = Figure(figsize=(3.9, 2.3), layout="constrained")
    axes = figure.add_subplot()
    draw_number(axes, name, number)
    axes.set_title("", loc="left")  # the page has a heading of its own
    axes.set_ylabel("")
    return figure


def compare(
    run_dirs: Sequence[Path | str],
    out: Path | str,
    metric: str = "episode_return",
    labels: Sequence[str] | None = None,
    thresholds: Mapping[str, float] | None = None,
    confidence: float = 0.95,
) -> tuple[Outcome, ...]:
    """Draw the learning curves of several runs into `out` and return their outcomes (`table` prints them).

    Runs are one curve's seeds when their environment, algorithm and settings agree in everything but the seed; settings
    that differ become part of the label. `labels`, one for each directory, group them by your own names instead.
    `thresholds`: environment id → value.

    Raises ValueError for what is no run directory, for damaged files, for a metric that a run does not have, for one
    sample given twice, and for an unknown suffix.
    """
    out = checked_suffix(Path(out))
    if not run_dirs:
        raise ValueError("run_dirs: at least one run directory is needed")
    if labels is not None and len(labels) != len(run_dirs):
        raise ValueError(f"labels: {len(labels)} given for {len(run_dirs)} run directories")
    records = [read_run(path) for path in run_dirs]
    groups: dict[tuple[str, str], list[Record]] = {}
    for record, label in zip(records, labels or settings_labels(records), strict=True):
        groups.setdefault((record.environment, label), []).append(record)
    numbers = {key: seeds_of(group, metric) for key, group in groups.items()}
    panels: dict[str, dict[str, Curve]] = {}
    for (environment, label), runs in numbers.items():
        panels.setdefault(environment, {})[label] = aggregate(runs, confidence)
    known = meaning(metric)
    ylabel = f"{known.title} ({known.unit})" if known.unit else known.title
    save(learning_curve(panels, ylabel, thresholds, confidence), out)
    return tuple(
        outcome(label, environment, curve, numbers[environment, label], (thresholds or {}).get(environment))
        for environment, curves in panels.items()
        for label, curve in curves.items()
    )


def diagnose(run_dir: Path | str, out: Path | str) -> None:
    """Draw every number of a run into one picture."""
    out, record = checked_suffix(Path(out)), read_run(run_dir)
    found = {name: finite(series(record.metrics, name)) for name in names(record.metrics)}
    save(diagnostics({name: number for name, number in found.items() if len(number.steps)}), out)


def table(outcomes: Sequence[Outcome]) -> str:
    """The outcomes as text with aligned columns."""
    head = ("environment", "curve", "seeds", "steps", "final mean", "interval", "steps to threshold")
    lines = [head, *(cells(outcome) for outcome in outcomes)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(head))]
    return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)


# --- the pieces ---


def look(position: int) -> tuple[str, str]:
    return COLOURS[position % len(COLOURS)], DASHES[position // len(COLOURS) % len(DASHES)]


def frame(axes: Axes, title: str) -> None:
    """Two spines, a light grid, large steps written as 100k and 1M."""
    axes.set_title(title, loc="left", fontsize=11, fontweight="bold", color=INK)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(INK)
    axes.grid(alpha=0.15, color=INK, linewidth=0.8)
    axes.tick_params(colors=INK, labelsize=9, length=3)
    axes.xaxis.label.set_color(INK)
    axes.yaxis.label.set_color(INK)
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.xaxis.set_major_locator(MaxNLocator(5))


def draw_curve(axes: Axes, curve: Curve, label: str, colour: str, dash: str) -> None:
    several = f"{label} ({curve.seeds} seeds)" if curve.seeds > 1 else label
    marker = "o" if len(curve.steps) == 1 else ""
    axes.plot(curve.steps, curve.mean, color=colour, linestyle=dash, marker=marker, linewidth=1.8, label=several)
    if curve.low is not None and curve.high is not None:
        axes.fill_between(curve.steps, curve.low, curve.high, color=colour, alpha=0.18, linewidth=0)


def draw_threshold(axes: Axes, value: float) -> None:
    axes.axhline(value, color=INK, linestyle=":", linewidth=1.2)
    axes.annotate(
        f"{value:g}", (1, value), xycoords=("axes fraction", "data"), xytext=(3, 0), textcoords="offset points",
        ha="left", va="center", fontsize=8, color=INK,
    )  # fmt: skip


def draw_number(axes: Axes, name: str, number: Series) -> None:
    known, shown = meaning(name), thinned(number)
    frame(axes, known.title)
    axes.set_ylabel(known.unit, fontsize=9)
    marker = "o" if len(shown.steps) == 1 else ""
    axes.plot(shown.steps, shown.values, color=ACCENT, linewidth=1.2, marker=marker)
    low, high = axes.get_ylim()
    for guide in known.guides:
        # Only where the data come near it: a guide far away would squeeze them into a line.
        if low - (high - low) <= guide <= high + (high - low):
            axes.axhline(guide, color=GUIDE, linestyle=":", linewidth=1.2)


def thinned(number: Series, bins: int = 400) -> Series:
    """At most two points in each of `bins` stretches, its least and its greatest, so that no spike is lost."""
    if len(number.steps) <= 2 * bins:
        return number
    stretches = np.array_split(np.arange(len(number.steps)), bins)
    extremes = [part[pick(number.values[part])] for part in stretches for pick in (np.argmin, np.argmax)]
    keep = np.unique([0, *extremes, len(number.steps) - 1])
    return Series(number.steps[keep], number.values[keep])


def metric_of(record: Record, metric: str) -> Series:
    number = finite(series(record.metrics, metric))
    if len(number.steps) == 0:
        found = ", ".join(names(record.metrics)) or "nothing yet"
        raise ValueError(f'{record.path / "metrics.jsonl"} has no finite "{metric}"; it has: {found}')
    return number


def seeds_of(group: Sequence[Record], metric: str) -> list[Series]:
    """One number of the runs of one curve. A sample that counted twice would make the interval too narrow."""
    told = [metric_of(record, metric) for record in group]
    for (one, a), (two, b) in combinations(zip(group, told, strict=True), 2):
        same_numbers = len(a.steps) > 1 and np.array_equal(a.steps, b.steps) and np.array_equal(a.values, b.values)
        if one.path.resolve() == two.path.resolve() or (
            same_numbers and one.seed == two.seed and settings(one) == settings(two)
        ):
            raise ValueError(f"{one.path} and {two.path} are the same sample; give each seed once")
    return told


def settings(record: Record) -> dict[str, str]:
    """What was chosen, as comparable text: without the seed and without how the run was kept (directory, display)."""
    return {
        name: value if isinstance(value, str) else json.dumps(value)
        for name, value in flatten(record.config).items()
        if name not in {"seed", "run_dir"} and name.split(".")[0] != "run"
    }


def settings_labels(records: Sequence[Record]) -> list[str]:
    """The algorithm, and whatever else differs between runs of the same algorithm and environment."""
    chosen = [settings(record) for record in records]
    labels = []
    for record, own in zip(records, chosen, strict=True):
        peers = [
            other
            for peer, other in zip(records, chosen, strict=True)
            if (peer.algorithm, peer.environment) == (record.algorithm, record.environment)
        ]
        differing = [name for name in own if any(other.get(name) != own[name] for other in peers)]
        labels.append(", ".join([record.algorithm, *(f"{name.rsplit('.', 1)[-1]}={own[name]}" for name in differing)]))
    return labels


def outcome(label: str, environment: str, curve: Curve, runs: Sequence[Series], threshold: float | None) -> Outcome:
    reaching = None if threshold is None else [steps_to(run, threshold) for run in runs]
    return Outcome(
        label=label,
        environment=environment,
        seeds=curve.seeds,
        steps=float(curve.steps[-1]),
        final=float(curve.mean[-1]),
        low=None if curve.low is None else float(curve.low[-1]),
        high=None if curve.high is None else float(curve.high[-1]),
        steps_to_threshold=None if reaching is None else float(np.median(reaching)),
        reached=0 if reaching is None else int(np.isfinite(reaching).sum()),
    )


def cells(outcome: Outcome) -> tuple[str, ...]:
    low, high, reaching = outcome.low, outcome.high, outcome.steps_to_threshold
    if reaching is None:
        threshold = "–"
    else:
        median = f"{reaching:,.0f}" if np.isfinite(reaching) else "not reached"
        threshold = f"{median} ({outcome.reached}/{outcome.seeds})"
    return (
        outcome.environment,
        outcome.label,
        str(outcome.seeds),
        f"{outcome.steps:,.0f}",
        f"{outcome.final:.1f}",
        "one seed" if low is None or high is None else f"{low:.1f} … {high:.1f}",
        threshold,
    )


def checked_suffix(out: Path) -> Path:
    if out.suffix.lower() not in SUFFIXES:
        raise ValueError(f"out: {out.name} must end in one of {', '.join(SUFFIXES)}")
    return out


def save(figure: Figure, out: Path) -> None:
    with replacing(out) as temporary:
        figure.savefig(temporary)
