"""Live progress: a bar with the few numbers that matter on a terminal, a line now and then elsewhere."""

import logging
import time
from collections.abc import Mapping
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

log = logging.getLogger(__name__)

SHOWN = {  # metric -> label and format
    "steps_per_second": ("steps/s", "{:,.0f}"),
    "episode_return": ("return", "{:.1f}"),
    "kl": ("KL", "{:.4f}"),
    "explained_variance": ("EV", "{:.2f}"),
}
LINE_SECONDS = 10.0


class Display:
    """Shows how far a run is. `update` is cheap: the terminal is redrawn a few times a second at most."""

    def __init__(self, title: str, total: int, start: int = 0, quiet: bool = False) -> None:
        self.total, self.title, self.quiet = total, title, quiet
        console = Console(stderr=True)
        self._bar: Progress | None = None
        if not quiet and console.is_terminal:
            self._bar = Progress(
                TextColumn("[bold]{task.description}"), BarColumn(bar_width=24), TaskProgressColumn(),
                TextColumn("ETA"), TimeRemainingColumn(), TextColumn("{task.fields[numbers]}"),
                console=console, refresh_per_second=4,
            )  # fmt: skip
            self._task = self._bar.add_task(title, total=total, completed=start, numbers="")
        self._last_line = self._last_bar = 0.0

    def __enter__(self) -> Self:
        if self._bar is not None:
            self._bar.start()
        return self

    def update(self, step: int, numbers: Mapping[str, float | None]) -> None:
        now = time.monotonic()
        if self._bar is not None:
            if now - self._last_bar >= 0.2 or step >= self.total:
                self._bar.update(self._task, completed=step, numbers=describe(numbers))
                self._last_bar = now
        elif not self.quiet and (now - self._last_line >= LINE_SECONDS or step >= self.total):
            self._last_line = now
            log.info("%s  %s / %s steps  %s", self.title, f"{step:,}", f"{self.total:,}", describe(numbers))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()


def describe(numbers: Mapping[str, float | None]) -> str:
    """The numbers that matter, in a line.

    >>> describe({"kl": 0.01, "episode_return": 20.0, "other": 1.0})
    'return 20.0  KL 0.0100'
    """
    shown = ((label, form, numbers.get(name)) for name, (label, form) in SHOWN.items())
    return "  ".join(f"{label} {form.format(value)}" for label, form, value in shown if value is not None)
