"""The sample browser: what was written is shown, escaped; what moved with Ψ is green, what moved against it red."""

import json
from pathlib import Path

from upslope.report import samples


def row(step: int, **changes: object) -> dict:
    base = {
        "step": step, "prompt": "<b>1+1=", "completion": "2", "tokens": ["<i>", "2"], "reward": 0.5,
        "psi": [1.0, -1.0], "logp": [-0.1, -0.2], "log_ratio": [0.05, 0.05],
    }  # fmt: skip
    return base | changes


def test_samples_are_shown_escaped_and_coloured(tmp_path: Path) -> None:
    lines = [json.dumps(row(step)) for step in range(0, 200, 10)]
    (tmp_path / "samples.jsonl").write_text("\n".join(lines) + '\n{"step": 3')
    page = samples.browser(tmp_path)
    assert page.count("<details") == samples.GROUPS
    assert "iteration 0," in page
    assert "iteration 190," in page
    assert page.count("<details open>") == 1
    assert "&lt;b&gt;1+1=" in page
    assert "&lt;i&gt;" in page
    assert "<b>" not in page
    assert "<i>" not in page
    assert page.count("rgba(46,160,67,0.60)") == samples.GROUPS  # Ψ > 0 and more likely
    assert page.count("rgba(218,54,51,0.60)") == samples.GROUPS  # Ψ < 0 and more likely
    assert "mean reward 0.50" in page


def test_a_run_without_samples_has_no_browser(tmp_path: Path) -> None:
    assert samples.browser(tmp_path) == ""


def test_a_conversation_is_a_prompt(tmp_path: Path) -> None:
    (tmp_path / "samples.jsonl").write_text(json.dumps(row(0, prompt=[{"role": "user", "content": "hi"}])) + "\n")
    assert "&quot;role&quot;" in samples.browser(tmp_path)
