"""Language models from the command line: trained, killed, resumed to the same bits, evaluated, used by the next."""

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.program import ENVIRONMENT, ROOT, command, fingerprint, metrics, succeed, upslope

SMALL = ("--model", "tiny", "--quiet", "--checkpoint-seconds", "0")
COMMANDS = {
    "sft": ("--data", "task:addition", "--data.rows", "64", "--batch-size", "8", "--micro-batch-tokens", "30"),
    "grpo": (
        "--data", "task:copying", "--data.rows", "64", "--batch-size", "4", "--group-size", "4", "--minibatches", "2",
        "--num-epochs", "2", "--sampling.max-new-tokens", "6", "--kl-coef", "0.1", "--sample-interval", "2",
        "--reference-interval", "3",
    ),
    "lm-ppo": (
        "--data", "task:copying", "--data.rows", "64", "--batch-size", "8", "--sampling.max-new-tokens", "6",
        "--kl-target", "1", "--ptx-coef", "0.1", "--ptx.source", "task:copying", "--ptx.rows", "16",
    ),
    "dpo": ("--data", "task:preferences", "--data.rows", "32", "--batch-size", "8", "--micro-batch-size", "3"),
    "reward-model": ("--data", "task:preferences", "--data.rows", "32", "--batch-size", "8", "--micro-batch-size", "3"),
}  # fmt: skip


def killed_and_resumed(algorithm: str, directory: Path, steps: int, more: tuple[str, ...] = ()) -> None:
    """A run that is killed twice while it learns, and then goes on to its end."""
    flags = (*SMALL, *COMMANDS[algorithm], *more, "--total-steps", steps, "--run-dir", directory)
    for arguments, reached in ((("train", algorithm, *flags), 2), (("resume", directory), steps // 2)):
        process = subprocess.Popen(
            command(*arguments), cwd=ROOT, env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and process.poll() is None:
            done = [int(path.name) for path in (directory / "checkpoints").glob("[0-9]*")]
            if done and max(done) >= reached:
                break
            time.sleep(0.002)
        assert process.poll() is None, "the run ended before it could be killed"
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    succeed("resume", directory)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("algorithm", "steps", "more"),
    [("sft", 40, ()), ("dpo", 30, ("--model.lora-rank", "2")), ("grpo", 14, ()), ("lm-ppo", 10, ())],
    ids=["sft", "dpo-lora", "grpo", "lm-ppo"],
)
def test_a_killed_run_ends_with_the_same_bits(
    tmp_path: Path, algorithm: str, steps: int, more: tuple[str, ...]
) -> None:
    """Killed in the middle of whatever it was doing, accumulation and inner steps included."""
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    flags = (*SMALL, *COMMANDS[algorithm], *more, "--total-steps", steps)
    succeed("train", algorithm, *flags, "--run-dir", whole)
    killed_and_resumed(algorithm, broken, steps, more)
    assert fingerprint(whole) == fingerprint(broken)
    numbers = [
        [{k: v for k, v in row.items() if not k.startswith("share")} for row in metrics(each)]
        for each in (whole, broken)
    ]
    assert numbers[0] == numbers[1]
    for name in ("samples.jsonl",) if algorithm == "grpo" else ():
        assert (whole / name).read_text() == (broken / name).read_text()
    assert not list(whole.rglob("*.bin")) + list(whole.rglob("*.pt")) + list(whole.rglob("*.pkl"))


@pytest.mark.slow
def test_a_reward_model_in_refresh_is_part_of_the_resume(tmp_path: Path) -> None:
    """Its weights and moments, the comparisons since the last refresh and those of earlier ones."""
    succeed(
        "train", "reward-model", *SMALL, *COMMANDS["reward-model"], "--total-steps", 3, "--run-dir", tmp_path / "rm"
    )
    more = ("--data", "task:preferences", "--reward", str(tmp_path / "rm"), "--refresh.interval", "3",
            "--refresh.steps", "3", "--refresh.history", "0.3")  # fmt: skip
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    succeed("train", "grpo", *SMALL, *COMMANDS["grpo"], *more, "--total-steps", 14, "--run-dir", whole)
    killed_and_resumed("grpo", broken, 14, more)
    assert fingerprint(whole) == fingerprint(broken)
    for name in ("model.safetensors", "head.safetensors"):
        mine = (whole / "reward" / "model" / name).read_bytes()
        assert mine == (broken / "reward" / "model" / name).read_bytes()
        assert mine != (tmp_path / "rm" / "model" / name).read_bytes()
    assert "agreement" in metrics(whole)[11]
    more = (*more, "--reward", str(whole / "reward"), "--total-steps", "1", "--run-dir", str(tmp_path / "on"))
    succeed("train", "grpo", *SMALL, *COMMANDS["grpo"], *more)  # what the run ends with is a reward of the next


@pytest.mark.slow
def test_from_sft_to_a_reward_model_to_dpo_and_grpo(tmp_path: Path) -> None:
    """Each takes the model of the one before; each can be evaluated and reported."""
    data = ("--data", "task:preferences", "--total-steps", 3, "--quiet")
    succeed("train", "sft", *SMALL, *COMMANDS["sft"], "--total-steps", 3, "--run-dir", tmp_path / "sft")
    succeed("train", "reward-model", "--model", tmp_path / "sft", *data, "--run-dir", tmp_path / "rm")
    succeed("train", "dpo", "--model", tmp_path / "sft", *data, "--run-dir", tmp_path / "dpo")
    succeed(
        "train", "grpo", "--variant", "dapo", "--model", tmp_path / "dpo", *data, "--reward", tmp_path / "rm",
        "--sampling.max-new-tokens", 6, "--run-dir", tmp_path / "grpo",
    )  # fmt: skip
    for name in ("sft", "rm", "grpo"):
        result = json.loads(succeed("eval", tmp_path / name, "--episodes", 10, "--json"))
        assert result["episodes"] == 10
        assert result["std_return"] >= 0
    assert metrics(tmp_path / "grpo")[-1]["mismatch"] < 1e-4
    succeed("report", tmp_path / "grpo", "--out", tmp_path / "report.html")
    assert json.loads((tmp_path / "grpo" / "samples.jsonl").read_text().splitlines()[0])["tokens"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("sft", "--data", "task:adition"), "task is 'adition', allowed: addition"),
        (("sft", "--data", "nowhere.jsonl"), "there is no such file"),
        (("grpo", "--variant", "grop"), "variant is 'grop', allowed: grpo, gpg"),
        (("sft", "--variant", "grpo"), "only grpo, lm-reinforce, lm-ppo have"),
        (("grpo", "--data", "task:addition", "--sampling.top-k", "5"), "a filter"),
        (("grpo", "--group-size", "1"), "group_size is 1"),
        (("grpo", "--reward", "nothing"), "reward is 'nothing', allowed: 'task'"),
        (("grpo", "--minibatches", "99"), "minibatches is 99, allowed: at most batch_size"),
        (("grpo", "--credit", "process", "--scale", "none"), "credit is 'process' with scale 'none'"),
        (("grpo", "--refresh.interval", "3"), "allowed: 0, or --reward with the directory of a reward model's run"),
        (("grpo", "--refresh.history", "2"), "history is 2.0, allowed: 0 to 1"),
        (("grpo", "--reference-interval", "3"), "reference_interval is 3, allowed: 0 where kl_coef is 0"),
        (("dpo", "--loss", "ipo", "--label-smoothing", "0.1"), "allowed with loss 'ipo': 0"),
        (("sft", "--model", "./nowhere"), "no model was found there"),
    ],
)
def test_what_is_wrong_is_said(tmp_path: Path, arguments: tuple[str, ...], words: str) -> None:
    result = upslope("train", *arguments, "--quiet", "--run-dir", tmp_path / "run")
    assert result.returncode == 2
    assert words in " ".join(result.stderr.split())
    assert not (tmp_path / "run").exists()


def test_a_language_model_is_not_filmed(tmp_path: Path) -> None:
    succeed("train", "sft", *SMALL, *COMMANDS["sft"], "--total-steps", 1, "--run-dir", tmp_path / "run")
    result = upslope("watch", tmp_path / "run", "--out", tmp_path / "a.gif")
    assert "no environment to be filmed" in result.stderr
