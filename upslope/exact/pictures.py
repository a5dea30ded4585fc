"""Values and policies as pictures: coloured cells with arrows, on the terminal (rich) and as PNG (matplotlib).

A problem that lies on a grid becomes one panel, Blackjack two (hard and soft hands), Taxi one for each place of the
passenger and destination; anything else is drawn as a curve of V over the states with the policy below it.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float
from rich.console import Group
from rich.text import Text

from upslope.exact.mdp import MDP

DIRECTIONS = {"←": (-1, 0), "→": (1, 0), "↑": (0, -1), "↓": (0, 1), "↙": (-0.7, 0.7), "↘": (0.7, 0.7)}
SHORT = {"stick": "S", "hit": "H", "pick up": "P", "drop off": "D"}
VIRIDIS = np.array([[68, 1, 84], [59, 82, 139], [33, 145, 140], [94, 201, 98], [253, 231, 37]], float)
INK, GUIDE, PAPER = "#24292f", "#d55e00", "#f6f8fa"


class Panel(NamedTuple):
    """A grid of states to draw: indices [rows, columns] (−1: nothing there) and what to write at its sides."""

    title: str
    states: np.ndarray
    row_names: tuple[str, ...] = ()
    column_names: tuple[str, ...] = ()


class Picture(NamedTuple):
    """What is to be drawn: V [S], how much each action is the policy's [S, A] in [0, 1], and two lines of text."""

    mdp: MDP
    values: Float[np.ndarray, " S"]
    weights: Float[np.ndarray, "S A"]
    title: str
    subtitle: str


def action_weights(
    mdp: MDP, policy: np.ndarray, q_values: Float[np.ndarray, "S A"], tolerance: float
) -> Float[np.ndarray, "S A"]:
    """Which actions to draw: all that tie with the best within `tolerance`, or a soft policy's shares.

    Of actions that do exactly the same (two walls, an illegal stake) only the first is drawn.
    """
    if policy.ndim == 2:
        return policy / policy.max(axis=1, keepdims=True)
    tied = q_values >= q_values.max(axis=1, keepdims=True) - tolerance
    for row in np.flatnonzero(tied.reshape(-1)) if mdp.num_states <= 10_000 else ():
        state, action = divmod(int(row), mdp.num_actions)
        tied[state, action] = not any(
            _same(mdp, int(row), int(row) - action + int(b)) for b in np.flatnonzero(tied[state, :action])
        )
    tied[np.arange(len(policy)), policy] = True
    return tied.astype(np.float64)


def _same(mdp: MDP, one: int, other: int) -> bool:
    spans = [slice(mdp.matrix.indptr[row], mdp.matrix.indptr[row + 1]) for row in (one, other)]
    rewards = mdp.expected_reward.reshape(-1)
    parts = (mdp.matrix.indices, mdp.matrix.data)
    return bool(rewards[one] == rewards[other]) and all(
        np.array_equal(part[spans[0]], part[spans[1]]) for part in parts
    )


def panels(mdp: MDP) -> list[Panel]:
    """How the states of a problem lie on paper; none when they lie on no grid."""
    names = mdp.action_names or ()
    if "hit" in names and mdp.shape == (28, 10):
        cards = ("A", *map(str, range(2, 11)))
        grid = np.arange(280).reshape(28, 10)
        hard = Panel("hard hand: sum, dealer shows", grid[17::-1], tuple(map(str, range(21, 3, -1))), cards)
        return [hard, Panel("soft hand (usable ace)", grid[:17:-1], tuple(map(str, range(21, 11, -1))), cards)]
    if "pick up" in names:
        places = ("R", "G", "Y", "B", "taxi")
        rides = np.arange(500).reshape(5, 5, 5, 4)
        return [
            Panel(f"passenger {places[p]} → {places[d]}" if p < 4 else f"in the taxi → {places[d]}", rides[:, :, p, d])
            for d in range(4)
            for p in (*range(4), 4)
            if p != d
        ]
    if mdp.shape is None:
        return []
    grid = np.arange(mdp.shape[0] * mdp.shape[1]).reshape(mdp.shape)
    if mdp.state_names and mdp.shape == (21, 21):  # Jack's cars: as in the book, the first place upwards
        side = tuple(map(str, range(21)))
        return [Panel("cars at the first place (up), at the second (right)", grid[::-1], side[::-1], side)]
    return [Panel("", grid)]


# ---- terminal --------------------------------------------------------------------------------------------------------


def terminal(picture: Picture, width: int = 120) -> Group:
    """The picture as coloured text for a terminal of `width` columns; large problems are cut to what fits."""
    shown = panels(picture.mdp)
    lines: list[Text] = [Text(picture.title, style="bold"), Text(picture.subtitle, style="dim"), Text()]
    if not shown:
        return Group(*lines, *_listing(picture))
    for panel in shown[:2]:
        if panel.title:
            lines.append(Text(panel.title, style="italic"))
        lines += _cells(picture, panel, width)
        lines.append(Text())
    if len(shown) > 2:
        lines.append(Text(f"({len(shown) - 2} more panels in the PNG)", style="dim"))
    return Group(*lines)


def _cells(picture: Picture, panel: Panel, room: int) -> list[Text]:
    width = min(8, (room - 4) // panel.states.shape[1])
    small = width < 6
    width = 4 if small else width
    low, high = _limits(picture, [panel])
    side = max((len(name) for name in panel.row_names), default=0)
    lines: list[Text] = []
    for r, row in enumerate(panel.states):
        name = panel.row_names[r] if panel.row_names else ""
        top, bottom = Text(name.rjust(side) + " "), Text(" " * (side + 1))
        for state in row:
            if state < 0 or picture.mdp.terminal[state]:
                top.append(" " * (width - 1) + " ", style="on grey23")
                bottom.append("■".center(width - 1) + " ", style="grey50 on grey23")
                continue
            share = (picture.values[state] - low) / (high - low)
            colour = _colour(share)
            ink = "black" if share > 0.55 else "white"
            style = f"{ink} on rgb({colour[0]},{colour[1]},{colour[2]})"
            top.append(_glyphs(picture, state)[: width - 1].center(width - 1) + " ", style=f"bold {style}")
            bottom.append(_number(picture.values[state], width - 2).center(width - 1) + " ", style=style)
        lines += [top] if small else [top, bottom]
    if panel.column_names:
        lines.append(Text(" " * (side + 1) + "".join(name.center(width - 1) + " " for name in panel.column_names)))
    return lines


def _listing(picture: Picture, most: int = 24) -> list[Text]:
    states = np.unique(np.linspace(0, picture.mdp.num_states - 1, most).astype(int))
    low, high = _limits(picture, [])
    lines = []
    for state in states:
        bar = "█" * round(30 * (picture.values[state] - low) / (high - low))
        name, value = picture.mdp.state_name(state), _number(picture.values[state])
        lines.append(Text(f"{name:>12} {value:>9} {bar:<30} {_glyphs(picture, state)}"))
    return lines


def _glyphs(picture: Picture, state: int) -> str:
    names = [picture.mdp.action_name(int(a)) for a in np.flatnonzero(picture.weights[state] >= 0.5)]
    short = [SHORT.get(name, name) for name in names]
    return "".join(short) if all(len(name) == 1 for name in short) else short[0]


def _number(value: float, room: int = 6) -> str:
    """With as many decimals, at most three, as fit."""
    for decimals in (3, 2, 1, 0):
        text = f"{value + 0.0:.{decimals}f}"
        text = text.removeprefix("-") if float(text) == 0.0 else text
        if len(text) <= room:
            break
    return text


def _colour(share: float) -> tuple[int, int, int]:
    place = min(max(share, 0.0), 1.0) * (len(VIRIDIS) - 1)
    i = min(int(place), len(VIRIDIS) - 2)
    red, green, blue = VIRIDIS[i] + (place - i) * (VIRIDIS[i + 1] - VIRIDIS[i])
    return int(red), int(green), int(blue)


def _limits(picture: Picture, shown: list[Panel]) -> tuple[float, float]:
    alive: Bool[np.ndarray, " S"] = ~picture.mdp.terminal
    if shown:
        states = np.concatenate([panel.states[panel.states >= 0] for panel in shown])
        alive = alive & np.isin(np.arange(len(alive)), states)
    values = picture.values[alive] if alive.any() else picture.values
    low, high = float(values.min()), float(values.max())
    return (low, high) if high > low else (low - 0.5, low + 0.5)


# ---- PNG -------------------------------------------------------------------------------------------------------------


def draw(picture: Picture, out: Path) -> None:
    """Writes the picture as PNG (or SVG, PDF, by the suffix)."""
    from matplotlib.figure import Figure

    shown = panels(picture.mdp)
    if not shown:
        figure = _curve(picture)
    else:
        columns = min(len(shown), 4 if len(shown) > 2 else 2)
        rows = -(-len(shown) // columns)
        tall, wide = max(p.states.shape[0] for p in shown), max(p.states.shape[1] for p in shown)
        cell = min(1.0, 9.0 / wide, 9.0 / tall) if len(shown) < 3 else 0.62
        size = (max(6.4, columns * (wide * cell + 0.9) + 1.2), max(2.4, rows * (tall * cell + 0.6) + 1.3))
        figure = Figure(figsize=size, dpi=150, layout="constrained", facecolor="white")
        axes = np.atleast_1d(figure.subplots(rows, columns, squeeze=False)).ravel()
        limits = _limits(picture, shown)
        images = [_panel(axis, picture, panel, limits, cell) for axis, panel in zip(axes, shown, strict=False)]
        for axis in axes[len(shown) :]:
            axis.axis("off")
        bar = figure.colorbar(images[0], ax=list(axes), shrink=0.75, pad=0.02, aspect=30)
        bar.outline.set_visible(False)
        bar.set_label("V(s)", color=INK)
    figure.suptitle(f"{picture.title}\n", fontsize=13, fontweight="bold", color=INK, x=0.02, ha="left")
    figure.text(0.02, 1.0, f"\n\n{picture.subtitle}", fontsize=9, color="#57606a", va="top", ha="left")
    figure.savefig(out)


def _panel(axis, picture: Picture, panel: Panel, limits: tuple[float, float], cell: float):  # type: ignore[no-untyped-def]
    mdp, states = picture.mdp, panel.states
    values = np.where(states >= 0, picture.values[states], np.nan)
    values = np.where((states >= 0) & ~mdp.terminal[states], values, np.nan)
    axis.set_facecolor("#d0d7de")
    image = axis.imshow(values, cmap="viridis", vmin=limits[0], vmax=limits[1])
    axis.set_xticks(np.arange(states.shape[1] + 1) - 0.5, minor=True)
    axis.set_yticks(np.arange(states.shape[0] + 1) - 0.5, minor=True)
    axis.grid(which="minor", color="white", linewidth=1.0)
    axis.tick_params(which="both", length=0, labelsize=8, colors=INK)
    axis.set_xticks(range(states.shape[1]) if panel.column_names else [], panel.column_names or None)
    axis.set_yticks(range(states.shape[0]) if panel.row_names else [], panel.row_names or None)
    for spine in axis.spines.values():
        spine.set_visible(False)
    if panel.title:
        axis.set_title(panel.title, fontsize=9, color=INK)
    numbers = cell >= 0.7
    for (r, c), state in np.ndenumerate(states):
        if state < 0 or mdp.terminal[state]:
            continue
        share = (picture.values[state] - limits[0]) / (limits[1] - limits[0])
        ink = INK if share > 0.6 else "white"
        middle = r - 0.14 if numbers else r
        arrows = False
        for action in np.flatnonzero(picture.weights[state] > 0.02):
            direction = DIRECTIONS.get(mdp.action_name(int(action)))
            if direction is None:
                continue
            arrows = True
            length = 0.32 * float(picture.weights[state, action])
            axis.annotate(
                "",
                xy=(c + direction[0] * length, middle + direction[1] * length),
                xytext=(c, middle),
                arrowprops={"arrowstyle": "-|>", "color": ink, "lw": 1.2, "shrinkA": 0, "shrinkB": 0},
            )
        if not arrows:
            axis.text(
                c, middle, _glyphs(picture, state), ha="center", va="center", color=ink, fontsize=8, weight="bold"
            )
        if numbers:
            axis.text(c, r + 0.36, _number(picture.values[state]), ha="center", va="center", color=ink, fontsize=7)
    return image


def _curve(picture: Picture):  # type: ignore[no-untyped-def]
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.4, 5.6), dpi=150, layout="constrained", facecolor="white")
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(2, 1))
    states = np.arange(picture.mdp.num_states)
    above.plot(states, np.where(picture.mdp.terminal, np.nan, picture.values), color="#0072b2", linewidth=1.6)
    above.set_ylabel("V(s)", color=INK)
    state, action = np.nonzero((picture.weights >= 0.999) & ~picture.mdp.terminal[:, None])
    below.scatter(state, action, s=7, color=GUIDE, linewidths=0)
    names = picture.mdp.action_names
    if names and len(names) <= 12:
        below.set_yticks(range(len(names)), names)
    below.set_ylabel("best actions", color=INK)
    below.set_xlabel("state", color=INK)
    for axis in (above, below):
        axis.set_facecolor(PAPER)
        axis.grid(color="white", linewidth=1.0)
        axis.tick_params(length=0, colors=INK, labelsize=8)
        for spine in axis.spines.values():
            spine.set_visible(False)
    return figure
