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


# Process rewards


def test_a_process_reward_is_steps_for_training_and_their_sum_for_evaluation() -> None:
    def mine(**_: Any) -> list[Any]:
        return [[(0, 1.0), (1, -0.5)], []]

    assert rewards.judge_steps(mine, ROWS, ["2", "5"], [[7, 1], [8, 1]]) == [[(0, 1.0), (1, -0.5)], []]
    assert judge(mine) == [0.5, 0.0]


@pytest.mark.parametrize(
    ("found", "words"),
    [
        ([1.0, 2.0], "allowed for process rewards: a list of pairs"),
        ([[(0, 1.0)], [(2, 1.0)]], "ends a step of completion 1 at token 2; allowed: 0 to 1"),
        ([[(0, float("nan"))], []], "returned nan"),
        ([[(0, 1.0, 2.0)], []], "allowed for process rewards: a list of pairs"),
    ],
)
def test_what_is_no_process_reward_is_said(found: Any, words: str) -> None:
    def mine(**_: Any) -> Any:
        return found

    with pytest.raises(ValueError, match=words):
        rewards.judge_steps(mine, ROWS, ["2", "5"], [[7, 1], [8, 1]])


def test_a_task_without_steps_is_named() -> None:
    with pytest.raises(ValueError, match="'addition' has no rewards of its steps; allowed: shifting"):
        rewards.resolve("task", "task:addition", 0, process=True)


def test_shifting_judges_letters_and_the_end() -> None:
    row = {"prompt": "shift abj:", "answer": "bca"}
    judged = rewards.resolve("task", "task:shifting", 0, process=True)
    assert rewards.judge_steps(judged, [row], ["bca"], [[5, 6, 7, 1]]) == [[(0, 1.0), (1, 1.0), (2, 1.0), (3, 1.0)]]
    assert rewards.judge_steps(judged, [row], ["bb"], [[5, 6, 1]]) == [[(0, 1.0), (1, 0.0), (2, 0.0)]]  # ended too soon
    assert rewards.judge(rewards.resolve("task", "task:shifting", 0), [row], ["bca"], [[5, 6, 7, 1]]) == [1.0]
