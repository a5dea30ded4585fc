"""What a language model wrote while it learned: prompts, completions, rewards, and each token's part in the update."""

import json
from html import escape
from pathlib import Path
from typing import Any

SAMPLES = "samples.jsonl"
GROUPS = 6  # shown of a run: the first, the last, and some between them


def read(directory: Path) -> dict[int, list[dict[str, Any]]]:
    """Step -> the completions that were written then; a line still being written is left out."""
    path = directory / SAMPLES
    groups: dict[int, list[dict[str, Any]]] = {}
    for line in path.read_text(encoding="utf-8").split("\n")[:-1] if path.is_file() else []:
        row = json.loads(line)
        groups.setdefault(row["step"], []).append(row)
    return groups


def browser(directory: Path) -> str:
    """The samples of some steps, folded, the last one open; empty where a run has none."""
    groups = read(directory)
    steps = sorted(groups)
    if len(steps) > GROUPS:
        steps = [steps[round(k * (len(steps) - 1) / (GROUPS - 1))] for k in range(GROUPS)]
    parts = []
    for step in steps:
        body = "\n".join(_sample(row) for row in groups[step])
        mean = sum(row["reward"] for row in groups[step]) / len(groups[step])
        shown = " open" if step == steps[-1] else ""
        parts.append(
            f"<details{shown}><summary>iteration {step:,}, mean reward {mean:.2f}</summary>\n"
            f"<table><tr><th>prompt</th><th>completion</th><th>reward</th></tr>\n{body}\n</table></details>"
        )
    return "\n".join(parts)


def _sample(row: dict[str, Any]) -> str:
    tokens = "".join(
        _token(*each) for each in zip(row["tokens"], row["psi"], row["log_ratio"], row["logp"], strict=True)
    )
    prompt = row["prompt"] if isinstance(row["prompt"], str) else json.dumps(row["prompt"], ensure_ascii=False)
    return f"<tr><td>{escape(prompt)}</td><td>{tokens}</td><td>{row['reward']:.3g}</td></tr>"


def _token(text: str, psi: float, log_ratio: float, logp: float) -> str:
    """Green where the update moved the token's probability the way Ψ asks for, red where it moved the other way."""
    part = psi * log_ratio
    strength = min(1.0, abs(part) / 0.05) * 0.6
    colour = "46,160,67" if part > 0 else "218,54,51"
    said = f"Ψ {psi:+.3f}, log-ratio {log_ratio:+.4f}, log π {logp:.3f}"
    return f'<span style="background: rgba({colour},{strength:.2f})" title="{escape(said)}">{escape(text)}</span>'
