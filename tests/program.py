"""The program as a user runs it: a process of its own."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore", "COLUMNS": "100"}
SMALL = ("--network.hidden", "8", "--num-epochs", "1", "--minibatch-size", "16", "--quiet")


def upslope(*arguments: object, timeout: float = 120) -> subprocess.CompletedProcess[str]:
    """Run `upslope ARGUMENTS` to its end."""
    return subprocess.run(
        command(*arguments), cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=timeout
    )


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "upslope", *map(str, arguments)]


def succeed(*arguments: object) -> str:
    """Run `upslope ARGUMENTS`, which must succeed; its output."""
    result = upslope(*arguments)
    assert result.returncode == 0, result.stderr
    return result.stdout


def fingerprint(directory: Path) -> str:
    return succeed("fingerprint", directory).strip()


def metrics(directory: Path) -> list[dict[str, Any]]:
    """A run's metrics without the times."""
    rows = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    for row in rows:
        del row["seconds"]
    return rows
