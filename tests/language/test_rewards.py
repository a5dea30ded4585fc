"""Reward functions: their signature, and everything that can be wrong with one, said in words."""

from pathlib import Path
from typing import Any

import pytest

from upslope.language import rewards

ROWS = [{"prompt": "1+1=", "answer": "2", "completion": "2"}, {"prompt": "2+2=", "answer": "4", "completion": "4"}]


def judge(function: Any) -> list[float]:
    return rewards.judge(function, ROWS, ["2", "5"], [[7, 1], [8, 1]])


def test_a_task_checks_answers() -> None:
    assert judge(rewards.resolve("task", "task:addition", 0)) == [1.0, 0.0]
    assert rewards.judge(rewards.resolve("task", "task:preferences", 0), ROWS, ["aeb", "b"], [[7], [8]]) == [
        1.25,
        -0.25,
    ]


def test_a_function_is_given_what_trl_gives() -> None:
    seen: dict[str, Any] = {}

    def function(prompts: list[str], completions: list[str], completion_ids: list[list[int]], **columns: Any) -> list:
        seen.update(prompts=prompts, completions=completions, completion_ids=completion_ids, columns=columns)
        return [1, None]

    assert judge(function) == [1.0, 0.0]
    assert seen == {
        "prompts": ["1+1=", "2+2="], "completions": ["2", "5"], "completion_ids": [[7, 1], [8, 1]],
        "columns": {"answer": ["2", "4"]},
    }  # fmt: skip


def test_a_function_may_be_asynchronous() -> None:
    async def function(completions: list[str], **_: Any) -> list[float]:
        return [float(c) for c in completions]

    assert judge(function) == [2.0, 5.0]


@pytest.mark.parametrize(
    ("result", "words"),
    [
        ([1.0], "returned 1 values, expected a list of 2 numbers"),
        (3.0, "returned float, expected a list of 2 numbers"),
        ([1.0, float("nan")], "returned nan for completion 1, '5'; allowed: finite"),
        ([float("inf"), 0.0], "returned inf for completion 0"),
    ],
)
def test_a_wrong_result_is_refused(result: Any, words: str) -> None:
    def mine(**_: Any) -> Any:
        return result

    with pytest.raises(ValueError, match=f"the reward function 'mine' {words}"):
        judge(mine)


def test_an_error_inside_is_named() -> None:
    def mine(**_: Any) -> list[float]:
        raise KeyError("gold")

    with pytest.raises(ValueError, match="'mine' raised KeyError: 'gold'; nothing was trained on this batch") as caught:
        judge(mine)
    assert isinstance(caught.value.__cause__, KeyError)


def test_code_comes_from_a_file_that_is_named(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text("def length(completions, **_):\n    return [float(len(c)) for c in completions]\n")
    assert judge(rewards.resolve(f"{file}:length", "task:addition", 0)) == [1.0, 1.0]
    with pytest.raises(ValueError, match="has no function 'width'"):
        rewards.resolve(f"{file}:width", "task:addition", 0)
    with pytest.raises(ValueError, match="there is no file"):
        rewards.resolve(f"{tmp_path / 'other.py'}:length", "task:addition", 0)


@pytest.mark.parametrize("spec", ["nothing", "mine.length", ""])
def test_an_unknown_reward_is_refused(spec: str) -> None:
    with pytest.raises(ValueError, match=r"allowed: 'task' with data task:NAME, FILE\.py:FUNCTION"):
        rewards.resolve(spec, "task:addition", 0)


def test_a_file_of_prompts_has_no_task() -> None:
    with pytest.raises(ValueError, match=r"reward is 'task', but data.source is 'a.jsonl'"):
        rewards.resolve("task", "a.jsonl", 0)
