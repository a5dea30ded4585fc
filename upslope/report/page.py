"""One run as one self-contained HTML page: no script, no network, light and dark."""

import base64
import io
import json
import re
import shlex
from collections.abc import Iterable, Mapping
from html import escape
from importlib import resources
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from upslope.report import plots, samples
from upslope.report.bootstrap import aggregate
from upslope.report.diagnostics import meaning, ordered, warnings
from upslope.report.files import replacing
from upslope.report.records import Record, Series, finite, flatten, names, read_run, series

FILM_LIMIT = 16 * 2**20  # bytes; a larger GIF is named instead of inlined


def write_page(run_dir: Path | str, out: Path | str | None = None) -> Path:
    """Write the report of a run, finished or going on, to `out` (default: `report.html` in the run directory).

    An `episode.gif` in the run directory becomes part of the page. Raises as `records.read_run`.
    """
    record = read_run(run_dir)
    out = record.path / "report.html" if out is None else Path(out)
    page = render(record)
    with replacing(out) as temporary:
        temporary.write_text(page, encoding="utf-8")
    return out


def render(record: Record) -> str:
    """The page as text."""
    found = {name: finite(series(record.metrics, name)) for name in names(record.metrics)}
    found = {name: number for name, number in found.items() if len(number.steps)}
    title = f"{record.algorithm} on {record.environment}" if record.environment else record.algorithm
    css = resources.files("upslope.report").joinpath("page.css").read_text(encoding="utf-8")
    parts = [
        header(record, title),
        headline(record, found),
        worries(warnings(record.metrics)),
        progress(record, found),
        grid(found),
        section("Samples", samples.browser(record.path)) if (record.path / samples.SAMPLES).exists() else "",
        reproduce(record),
        checkpoints(record),
        section("Result", rows(flatten(record.summary))) if record.summary else "",
        folded("Settings", rows(flatten(record.config))),
        folded("Versions", rows(flatten(record.versions) | flatten(record.header))),
    ]
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>\n{css}</style>\n</head>\n<body>\n"
        + "\n".join(part for part in parts if part)
        + "\n</body>\n</html>\n"
    )


def header(record: Record, title: str) -> str:
    state = (
        "finished"
        if record.summary is not None
        else "not finished: still running, or stopped; <code>upslope resume</code> continues it"
    )
    start = f"seed {escape(str(record.seed))} · " if record.seed is not None else ""
    return (
        f'<header><h1>{escape(title)}</h1>\n<p class="faint">{start}{state} · {escape(str(record.path))}</p></header>'
    )


def headline(record: Record, found: Mapping[str, Series]) -> str:
    """The numbers to see first, and how far the run has come."""
    if not record.metrics:
        return "<p>No metrics yet.</p>"
    step, total = record.metrics[-1]["step"], record.config.get("total_steps")
    seconds = finite(series(record.metrics, "seconds")).values
    cards = [("steps", f"{step:,.0f}")]
    if "episode_return" in found:
        number = found["episode_return"]
        best = number.values.argmax()
        cards = [
            ("return, last 100 episodes", f"{number.values[-1]:,.1f}"),
            (f"best, at step {number.steps[best]:,.0f}", f"{number.values[best]:,.1f}"),
            *cards,
        ]
    if "episodes" in found:
        cards.append(("episodes", f"{found['episodes'].values[-1]:,.0f}"))
    if len(seconds):
        cards.append(("time", clock(seconds[-1])))
        if seconds[-1] > 0:
            cards.append(("steps per second", f"{step / seconds[-1]:,.0f}"))
    body = "\n".join(f"<div><b>{escape(value)}</b><span>{escape(name)}</span></div>" for name, value in cards)
    bar = ""
    if isinstance(total, int | float) and total > 0:
        share = min(1.0, step / total)
        bar = (
            f'<div class="bar"><i style="width: {100 * share:.1f}%"></i></div>\n'
            f'<p class="faint">{step:,.0f} of {total:,.0f} steps ({100 * share:.0f}%)</p>'
        )
    return f'<section><div class="headline">\n{body}\n</div>\n{bar}</section>'


def worries(found: Iterable[str]) -> str:
    items = "\n".join(f"<li>{escape(text)}</li>" for text in found)
    return f'<section class="worries"><h3>Worth a look</h3>\n<ul>\n{items}\n</ul></section>' if items else ""


def progress(record: Record, found: Mapping[str, Series]) -> str:
    """The learning curve, and the film of an episode beside it."""
    film = inline_film(record.path / "episode.gif")
    if "episode_return" not in found:
        return section("An episode", film) if film else ""
    known = meaning("episode_return")
    curve = aggregate([plots.thinned(found["episode_return"])])
    figure = plots.learning_curve({"": {record.algorithm: curve}}, known.title)
    figure.set_size_inches(6.4 if film else 9.6, 3.6)
    legend = figure.axes[0].get_legend()
    if legend is not None:
        legend.remove()
    picture = f"<figure>{inline_svg(figure, 'return')}<figcaption>{escape(known.text)}</figcaption></figure>"
    return section("Learning curve", f'<div class="pair">{picture}\n{film}</div>')


def grid(found: Mapping[str, Series]) -> str:
    """Every other number, with a sentence that says how to read it."""
    figures = []
    for name in ordered(tuple(found)):
        if name == "episode_return":
            continue
        known = meaning(name)
        unit = f' <span class="unit">{escape(known.unit)}</span>' if known.unit else ""
        figures.append(
            f"<figure><h3>{escape(known.title)}{unit}</h3>\n{inline_svg(plots.small(name, found[name]), name)}\n"
            f"<figcaption>{escape(known.text)}</figcaption></figure>"
        )
    return section("Diagnostics", '<div class="grid">\n' + "\n".join(figures) + "\n</div>") if figures else ""


def reproduce(record: Record) -> str:
    run, film = shlex.quote(str(record.path)), shlex.quote(str(record.path / "episode.gif"))
    lines = [
        (f"upslope resume {run}", "go on from the newest checkpoint"),
        (f"upslope eval {run} --episodes 100", "evaluate the trained policy"),
        *([(f"upslope watch {run} --out {film}", "film an episode")] if record.environment else []),
        (f"upslope fingerprint {run}", "equal for equal runs: one hash over the whole state"),
        (f"upslope report {run}", "write this page again"),
    ]
    text = "\n".join(f"{command}  # {purpose}" for command, purpose in lines)
    return section("Go on from here", f"<pre>{escape(text)}</pre>")


def checkpoints(record: Record) -> str:
    if not record.checkpoints:
        return ""
    return section(
        "Checkpoints", rows({f"step {point.step:,}": f"{point.size / 2**20:.2f} MiB" for point in record.checkpoints})
    )


# --- the pieces ---


def section(title: str, body: str) -> str:
    return f"<section><h2>{escape(title)}</h2>\n{body}\n</section>"


def folded(title: str, body: str) -> str:
    return f"<details><summary><h2>{escape(title)}</h2></summary>\n{body}\n</details>" if body else ""


def rows(flat: Mapping[str, Any]) -> str:
    """Names and values as a table; everything is escaped."""
    texts = {name: value if isinstance(value, str) else json.dumps(value) for name, value in flat.items()}
    body = "\n".join(f"<tr><th>{escape(name)}</th><td>{escape(text)}</td></tr>" for name, text in texts.items())
    return f"<table>\n{body}\n</table>" if body else ""


def clock(seconds: float) -> str:
    """Hours, minutes and seconds.

    >>> clock(3725.4)
    '1:02:05'
    """
    whole = round(seconds)
    return f"{whole // 3600}:{whole // 60 % 60:02d}:{whole % 60:02d}"


def inline_film(path: Path) -> str:
    if not path.is_file():
        return ""
    size = path.stat().st_size
    if size > FILM_LIMIT:
        caption = f"{path.name} ({size / 2**20:.0f} MiB) is too large to be part of this page."
        return f"<figure><figcaption>{escape(caption)}</figcaption></figure>"
    data = base64.b64encode(path.read_bytes()).decode("ascii")
    return (
        f'<figure><img src="data:image/gif;base64,{data}" alt="An episode">'
        "<figcaption>An episode of the trained policy.</figcaption></figure>"
    )


def inline_svg(figure: Figure, key: str) -> str:
    """The figure as an SVG element of the page: in the page's font and colours, with names of its own."""
    buffer = io.StringIO()
    # Text stays text; without metadata there is no address in the file; the salt makes names repeatable.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": key}):
        figure.savefig(
            buffer,
            format="svg",
            transparent=True,
            metadata={"Creator": None, "Date": None, "Format": None, "Type": None},
        )
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r'\sxmlns(:\w+)?="[^"]*"', "", svg)
    svg = svg.replace("xlink:href", "href")
    svg = re.sub(r'(\sid="|url\(#|href="#)', rf"\g<1>{re.sub(r'[^A-Za-z0-9]', '-', key)}-", svg)
    for colour, name in ((plots.INK, "--ink"), (plots.ACCENT, "--accent"), (plots.GUIDE, "--guide")):
        svg = svg.replace(colour, f"var({name})")
    return re.sub(r"font: [^;]*?(\d+(?:\.\d+)?px)[^;\"]*", r"font-size: \1; font-family: inherit", svg)
