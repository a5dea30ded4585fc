"""Several seeds of one setting: which they are, and their runs beneath one directory."""

import dataclasses
import re
from pathlib import Path
from typing import Any

from upslope.runs import settings
from upslope.runs.run import CONFIG, SUMMARY, Run, read_config


def parse(text: str) -> list[int]:
    """Seeds as a user writes them: ranges with both ends, and single ones.

    >>> parse("0-3,7")
    [0, 1, 2, 3, 7]
    """
    found: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"(\d+)(?:-(\d+))?", part.strip())
        if match is None:
            raise ValueError(f"seeds is {text!r}, allowed: such as 0-9 or 1,3,5-7")
        first, last = int(match[1]), int(match[2] or match[1])
        found += range(first, last + 1)
    if len(set(found)) != len(found) or not found:
        raise ValueError(f"seeds is {text!r}, allowed: at least one, none twice, ranges that rise")
    return found


def beneath(config: Any, directory: Path, seed: int) -> Any:
    """The settings with this seed, its run in DIRECTORY/seed-N."""
    run = dataclasses.replace(config.run, seed=seed, run_dir=directory / f"seed-{seed}")
    return dataclasses.replace(config, run=run)


def session(algorithm: str, config: Any) -> Run | None:
    """The run of these settings, begun or taken up where it was left; None if it is complete.

    Raises:
        ValueError: its directory holds another run.
    """
    directory = config.run.run_dir
    if not (directory / CONFIG).exists():
        return Run(algorithm, config, config.total_steps)
    there = read_config(directory)
    if (there["algorithm"], there["config"]) != (algorithm, settings.to_json(config)):
        raise ValueError(f"{directory} holds a run of other settings; name another directory (--run-dir)")
    if (directory / SUMMARY).exists():
        return None
    return Run.resume(directory, algorithm, config, config.total_steps)
