"""The laboratory's pictures: one figure per study, from its curves and rows."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from upslope.exact.laboratory import Study
from upslope.exact.measurement import Row
from upslope.exact.pictures import GUIDE, INK, PAPER
from upslope.exact.surrogate_studies import KL_ESTIMATORS, SLOPES

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#24292f")  # Okabe & Ito 2008


def draw(study: Study, out: Path) -> None:
    """Writes the study's figure as PNG (or SVG, PDF, by the suffix)."""
    from matplotlib.figure import Figure

    figure = Figure(
        figsize=(11.0, 7.4 if study.name == "kl" else 4.8), dpi=150, layout="constrained", facecolor="white"
    )
    figure.suptitle(study.lesson, fontsize=11, fontweight="bold", color=INK, x=0.02, ha="left")
    figure.supxlabel(study.method, fontsize=8, color=INK, x=0.99, ha="right")
    FIGURES[study.name](figure, study)
    for axis in figure.axes:
        if axis.get_label() == "<colorbar>":
            continue
        axis.tick_params(length=0, colors=INK, labelsize=8, which="both")
        axis.xaxis.label.set_color(INK)
        axis.yaxis.label.set_color(INK)
        axis.title.set_color(INK)
        axis.title.set_fontsize(10)
        for spine in axis.spines.values():
            spine.set_visible(False)
        if not axis.images:
            axis.set_facecolor(PAPER)
            axis.grid(color="white", linewidth=1.0)
            axis.set_axisbelow(True)
        legend = axis.get_legend()
        if legend is not None:
            legend.set_frame_on(False)
    figure.savefig(out)


def _variance(figure: Any, study: Study) -> None:
    left, right = figure.subplots(1, 2)
    rows = study.tables[0].rows
    _bars(left, rows, "std", log=True)
    left.set_xlabel("standard deviation of one trajectory's estimate / |∇J|")
    for i, (row, line) in enumerate(zip(rows, study.curves["by_step"], strict=True)):
        right.plot(np.arange(len(line)), np.sqrt(line), "o-", ms=4, lw=1.6, color=COLOURS[i], label=row["estimator"])
    right.set_yscale("log")
    right.set_xlabel("step t of the trajectory")
    right.set_ylabel("std of the term of step t / |∇J|")
    right.legend(fontsize=8)


def _bias(figure: Any, study: Study) -> None:
    left, right = figure.subplots(1, 2, sharey=True)
    rows = study.tables[0].rows
    _bars(left, rows, "bias", form="{:.1%}")
    left.xaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    left.set_xlabel("|bias| / |∇J|")
    _bars(right, rows, "std", log=True, colour=GUIDE)
    right.set_xlabel("std of one trajectory's estimate / |∇J|")


def _baselines(figure: Any, study: Study) -> None:
    left, right = figure.subplots(1, 2)
    rows = study.tables[0].rows
    _bars(left, rows, "std", log=True)
    left.set_xlabel("std of one trajectory's estimate / |∇J|")
    fitted = [row for row in study.tables[1].rows if "/ std" not in str(row["estimator"])]
    place = np.arange(len(fitted))[::-1]
    middle, half = ([float(row[key]) for row in fitted] for key in ("projection on ∇J", "± 95%"))
    right.errorbar(middle, place, xerr=half, fmt="o", color=COLOURS[0], capsize=3, lw=1.6)
    right.set_yticks(place, [str(row["estimator"]) for row in fitted])
    right.axvline(1.0, color=INK, lw=1.0)
    batch = study.curves["batch"].item()
    right.axvline(1.0 - 1.0 / batch, color=GUIDE, lw=1.0, ls="--")
    right.text(1.0 - 1.0 / batch, len(fitted) - 0.6, "1 − 1/N ", color=GUIDE, fontsize=8, ha="right")
    right.set_ylim(-0.6, len(fitted) - 0.3)
    right.set_xlabel(f"E[ĝ]·∇J / |∇J|², own batch of {batch}, 95%")


def _gae(figure: Any, study: Study) -> None:
    left, right = figure.subplots(1, 2, width_ratios=(1.0, 1.15))
    gammas, lambdas, error = (study.curves[key] for key in ("gammas", "lambdas", "error"))
    i = len(gammas) - 1
    batch = study.curves["batch"].item()
    parts = {"bias": study.curves["bias"][i], "std": study.curves["variance"][i] / batch, "error": error[i]}
    for colour, (name, values) in zip(COLOURS, parts.items(), strict=False):
        left.plot(lambdas, np.sqrt(values), lw=2.4 if name == "error" else 1.6, color=colour, label=name)
    best = int(error[i].argmin())
    left.plot(lambdas[best], error[i, best] ** 0.5, "o", color=COLOURS[2])
    left.set_xlabel("λ")
    left.set_ylabel("relative to |∇J|")
    left.set_title(f"γ = {gammas[i]:g}, mean of {batch} trajectories")
    left.legend(fontsize=8)
    image = right.imshow(np.sqrt(error), cmap="viridis_r", aspect="auto", origin="lower")
    right.set_xticks(range(0, len(lambdas), 4), [f"{x:.1f}" for x in lambdas[::4]])
    right.set_yticks(range(len(gammas)), [f"{x:g}" for x in gammas])
    for row in range(len(gammas)):
        right.plot(int(error[row].argmin()), row, "o", mfc="none", mec="white", ms=8, mew=1.6)
    right.set_xlabel("λ")
    right.set_ylabel("γ of the estimator")
    right.set_title("root mean squared error / |∇J|; circles: best λ")
    figure.colorbar(image, ax=right, pad=0.02).outline.set_visible(False)


def _importance(figure: Any, study: Study) -> None:
    left, middle, right = figure.subplots(1, 3)
    distance = study.curves["distance"][:, 0]
    names = [str(row["estimator"]) for row in study.tables[0].rows[: study.curves["bias"].shape[1]]]
    for axis, key, label in ((left, "bias", "|bias| / |∇J|"), (middle, "std", "std of one trajectory / |∇J|")):
        for i, name in enumerate(names):
            axis.plot(distance, study.curves[key][:, i], "o-", ms=4, lw=1.6, color=COLOURS[i], label=name)
        axis.set_xlabel("|θ − θ_μ|")
        axis.set_ylabel(label)
    left.set_yscale("symlog", linthresh=0.01)
    middle.set_yscale("log")
    right.legend(*left.get_legend_handles_labels(), fontsize=7, loc="lower left")
    right.plot(distance, study.curves["ess"][:, 0], "o-", ms=4, lw=1.6, color=INK)
    right.set_ylim(0.0, 1.05)
    right.set_xlabel("|θ − θ_μ|")
    right.set_ylabel("effective sample size / N")


def _kl(figure: Any, study: Study) -> None:
    (densities, estimators), (bias, std) = figure.subplots(2, 2)
    rows = study.tables[0].rows
    x = np.linspace(-4.0, 5.0, 300)
    densities.fill_between(x, np.exp(-0.5 * x**2) / np.sqrt(2.0 * np.pi), color=INK, alpha=0.15, label="q = N(0, 1)")
    for i, row in enumerate(rows[:: len(KL_ESTIMATORS)]):
        curve = np.exp(-0.5 * (x - (2.0 * float(row["KL"])) ** 0.5) ** 2) / np.sqrt(2.0 * np.pi)
        densities.plot(x, curve, color=COLOURS[3 + i], label=f"p = {row['p']}: KL[q, p] = {row['KL']:g}")
    densities.set_title("what is compared")
    densities.legend(fontsize=8, loc="upper right")
    densities.set_ylim(0.0, 0.56)
    ratio = study.curves["ratio"]
    for colour, name in zip(COLOURS, KL_ESTIMATORS, strict=False):
        estimators.plot(ratio, study.curves[name], lw=1.8, color=colour, label=name)
    estimators.axhline(0.0, color=INK, lw=0.8)
    estimators.set_xlim(0.0, 4.0)
    estimators.set_ylim(-1.5, 3.0)
    estimators.set_xlabel("r = p(x) / q(x)")
    estimators.set_title("the estimators")
    estimators.legend(fontsize=8, loc="upper right")
    targets = list(dict.fromkeys(str(row["p"]) for row in rows))
    for axis, key, form in ((bias, "bias / KL", "{:.4f}"), (std, "std / KL", "{:.3f}")):
        for i, (colour, name) in enumerate(zip(COLOURS, KL_ESTIMATORS, strict=False)):
            heights = [abs(float(row[key])) for row in rows if row["estimator"] == name]
            bars = axis.bar(np.arange(len(targets)) + 0.26 * (i - 1), heights, width=0.24, color=colour)
            axis.bar_label(bars, [form.format(height) for height in heights], fontsize=8, color=INK, padding=2)
        axis.set_xticks(range(len(targets)), [f"p = {target}" for target in targets])
        axis.set_title(f"{key}, exact")
    bias.set_ylim(0.0, 0.29)
    std.set_yscale("log")
    std.set_ylim(1.0, 40.0)
    std.set_yticks([1, 2, 5, 10, 20], ["1", "2", "5", "10", "20"])
    std.minorticks_off()


def _clip(figure: Any, study: Study) -> None:
    left, right = figure.subplots(1, 2)
    ratio, clip = study.curves["ratio"], study.curves["clip"].item()
    for colour, slope in zip(COLOURS, SLOPES, strict=False):
        left.plot(ratio, study.curves[f"plain {slope:+g}"], ":", lw=1.2, color=colour)
        left.plot(ratio, study.curves[f"clipped {slope:+g}"], lw=2.0, color=colour, label=f"Ψ = {slope:+g}")
    for edge in (1.0 - clip, 1.0 + clip):
        left.axvline(edge, color=INK, lw=0.8, ls="--")
    left.plot([1.0] * len(SLOPES), SLOPES, "o", color=INK, ms=4)
    left.set_xlabel("ratio π / π_old")
    left.set_ylabel("surrogate (dotted: ratio·Ψ)")
    left.set_title(f"clipped surrogate, ε = {clip:g}")
    left.legend(fontsize=8)
    path = {name.removeprefix("path "): study.curves[name] for name in study.curves if name.startswith("path ")}
    for colour, name in zip((INK, COLOURS[0], COLOURS[1]), ("J", "ratio surrogate", "clipped surrogate"), strict=True):
        right.plot(path["step"], path[name], lw=2.4 if name == "J" else 1.6, color=colour, label=name)
    right.set_xlabel("step along ∇J")
    right.set_ylabel("exact value")
    right.set_title("what the surrogates promise, and what J does")
    other = right.twinx()
    other.plot(path["step"], path["KL(old‖new)"], ":", color=COLOURS[3], lw=1.6)
    other.set_ylabel("mean KL(old‖new), nats (dotted)")
    other.grid(visible=False)
    right.legend(fontsize=8, loc="upper left")


def _bars(
    axis: Any, rows: list[Row], what: str, log: bool = False, form: str = "{:.3g}", colour: str = COLOURS[0]
) -> None:
    """One bar for each estimator, with its interval where it has one."""
    place, values = np.arange(len(rows))[::-1], np.array([row[f"{what} / |∇J|"] for row in rows], float)
    low, high = (
        np.array([row.get(f"{what} {end}", x) for row, x in zip(rows, values, strict=True)], float)
        for end in ("from", "to")
    )
    error = np.abs([values - low, high - values]) if "std to" in rows[0] else None
    bars = axis.barh(place, values, xerr=error, color=colour, height=0.62, ecolor=INK, capsize=2)
    axis.bar_label(bars, [form.format(value) for value in values], padding=3, fontsize=8, color=INK)
    axis.set_yticks(place, [str(row["estimator"]) for row in rows])
    if log:
        axis.set_xscale("log")
        axis.set_xlim(values.min() / 3.0, values.max() * 4.0)
    else:
        axis.set_xlim(0.0, 1.15 * high.max())


FIGURES: dict[str, Callable[[Any, Study], None]] = {
    "variance": _variance,
    "bias": _bias,
    "baselines": _baselines,
    "gae": _gae,
    "importance": _importance,
    "kl": _kl,
    "clip": _clip,
}
