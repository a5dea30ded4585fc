"""Data from files and tasks, and what is wrong with them, said in words."""

import json
from pathlib import Path

import pytest

from tests.language import nets
from upslope.language import prompts, tiny
from upslope.language.prompts import Config


def test_lines_and_parquet_are_the_same(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    rows = [{"prompt": "1+1=", "completion": "2"}, {"prompt": "2+2=", "completion": "4"}]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    for name in ("a.jsonl", "a.parquet"):
        assert prompts.read(Config(str(tmp_path / name)), "prompt", "completion") == rows


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"prompt": "a"}\n{"prmpt": "b"}\n', r"row 1 has no column 'prompt', it has 'prmpt'; did you mean 'prmpt'\?"),
        ('{"prompt": "a"}\nnonsense\n', "line 2: not JSON"),
        ("[1, 2]\n", "line 1: a row is a JSON object, this is list"),
        ("\n", "it has no rows"),
        ('{"prompt": null}\n', "row 0 has no column 'prompt'"),
    ],
)
def test_a_bad_file_is_refused(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "a.jsonl").write_text(text)
    with pytest.raises(ValueError, match=words):
        prompts.read(Config(str(tmp_path / "a.jsonl")), "prompt")


def test_no_file_and_no_task() -> None:
    with pytest.raises(ValueError, match="there is no such file"):
        prompts.read(Config("nowhere.jsonl"), "prompt")
    with pytest.raises(ValueError, match="task is 'adition', allowed: addition, sorting"):
        prompts.read(Config("task:adition"), "prompt")


def test_a_prompt_beyond_the_models_limit_is_refused() -> None:
    model = nets.model()
    rows = [{"prompt": "1" * 60, "completion": "23456"}]
    with pytest.raises(
        ValueError, match="row 0 has a prompt of 60 tokens and a completion of 6, together 66; the model's"
    ):
        prompts.encode_all(model, rows, "completion")
    with pytest.raises(ValueError, match="completion of up to 8, together 68; the model's limit is 64"):
        prompts.encode_all(model, rows, None, room=8)


def test_an_empty_prompt_is_refused() -> None:
    with pytest.raises(ValueError, match="prompt is '': it has no tokens"):
        prompts.encode(nets.model(), "")


def test_a_chat_goes_through_the_template() -> None:
    model = nets.model()
    ids = prompts.encode(model, [{"role": "user", "content": "hi"}])
    assert model.tokenizer.decode(ids) == "<|user|>hi<|assistant|>"
    model.tokenizer.chat_template = None
    with pytest.raises(ValueError, match="no chat template"):
        prompts.encode(model, [{"role": "user", "content": "hi"}])


def test_a_completion_ends() -> None:
    model = nets.model()
    ids = prompts.encode_completion(model, "19")
    assert ids[-1] == model.eos
    assert prompts.decode(model, ids) == "19"
    assert prompts.decode(model, ids[:-1]) == "19"


def test_an_id_that_only_the_model_knows_is_a_token_too() -> None:
    """Embeddings are often padded beyond the tokenizer's vocabulary, and sampling may choose such a row."""
    model = nets.model()
    beyond = len(model.tokenizer) + 3
    (nine,) = model.tokenizer("9")["input_ids"]
    assert prompts.tokens(model, [nine, beyond]) == [model.tokenizer.decode([nine]), f"<{beyond}>"]
    assert prompts.decode(model, [nine, beyond]) == "9"


@pytest.mark.parametrize("name", list(tiny.TASKS))
def test_a_tasks_answers_are_right_and_its_splits_apart(name: str) -> None:
    task, train, held = tiny.TASKS[name], tiny.draw(name, 300, 0), tiny.draw(name, 100, 0, held_out=True)
    for row in train + held:
        assert task.reward(row["prompt"], row["answer"], row["answer"]) == 1
        assert task.reward(row["prompt"], row["answer"] + "0", row["answer"]) == 0
        assert tiny.tokenizer().decode(tiny.tokenizer()(row["prompt"])["input_ids"]) == row["prompt"]
    assert not {row["prompt"] for row in train} & {row["prompt"] for row in held}
    assert tiny.draw(name, 300, 0) == train


@pytest.mark.parametrize("completion", ["9-5+3+0", "9-5", "2+5", "9--5+3", "", "٩-5+3", "__import__('os')"])
def test_countdown_reads_and_never_runs(completion: str) -> None:
    assert tiny.countdown("3 5 9:7=", completion, "") == 0


def test_preferences_follow_bradley_and_terry() -> None:
    """Pairs one reward apart are ordered as σ(1) says: 0.731, within five standard errors."""
    rows = tiny.draw("preferences", 20_000, 0)
    margins = [tiny.vowels(row["chosen"]) - tiny.vowels(row["rejected"]) for row in rows]
    close = [margin > 0 for margin in margins if abs(margin) == 1]
    p = 1 / (1 + 2.718281828459045**-1)
    assert abs(sum(close) / len(close) - p) < 5 * (p * (1 - p) / len(close)) ** 0.5
