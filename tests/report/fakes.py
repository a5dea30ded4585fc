"""Run directories made by hand, as training writes them."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any


def write_run(
    path: Path,
    rows: Iterable[Mapping[str, Any]] = (),
    *,
    algorithm: str = "ppo",
    environment: str = "CartPole-v1",
    seed: int = 0,
    summary: Mapping[str, Any] | None = None,
    **settings: Any,
) -> Path:
    path.mkdir(parents=True)
    config = {
        "type": "PPO",
        "environment": {"type": "Config", "id": environment},
        "run": {"type": "Config", "seed": seed, "run_dir": str(path)},
        "total_steps": 1000,
        **settings,
    }
    document = {"algorithm": algorithm, "config": config, "versions": {"python": "3.11.9"}}
    (path / "config.json").write_text(json.dumps(document))
    (path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if summary is not None:
        (path / "summary.json").write_text(json.dumps(summary))
    return path


def straight(slope: float, steps: Iterable[int] = (0, 500, 1000)) -> list[dict[str, float]]:
    """A return that grows in a straight line."""
    return [{"step": step, "seconds": step / 100, "episode_return": slope * step} for step in steps]
