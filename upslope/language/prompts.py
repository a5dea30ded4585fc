"""Data: rows from a file, a hub or a task, and their tokens. A prompt is tokenised once, a completion never again."""

import difflib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from upslope.language import games, tiny
from upslope.language.models import Model, limit
from upslope.runs import settings

Row = dict[str, Any]


@dataclass(frozen=True)
class Config:
    """Where the rows come from."""

    source: str = "task:addition"  # task:NAME, moves:GAME, a .jsonl or .parquet file, or a hub id of `datasets`
    rows: int = 4096  # that a task draws; of a file all are used
    split: str = "train"  # of a hub's data

    def __post_init__(self) -> None:
        settings.within(self, 1, None, "rows")


def read(config: Config, *columns: str, seed: int = 0, held_out: bool = False) -> list[Row]:
    """The rows, with at least these columns.

    Args:
        config: where they come from.
        columns: that every row must have.
        seed: of a task's problems.
        held_out: a task's held-out problems; a file has none of its own, all its rows are given.

    Raises:
        ValueError: no such file or task, a line that is no JSON object, no rows, or a column that is missing.
    """
    source = config.source
    if source.startswith("task:"):
        rows = tiny.draw(source.removeprefix("task:"), config.rows, seed, held_out)
    elif source.startswith("moves:"):
        rows = games.moves(source.removeprefix("moves:"), config.rows, seed)
    elif source.endswith(".jsonl"):
        rows = _lines(Path(source))
    elif source.endswith(".parquet"):
        import pyarrow.parquet

        rows = pyarrow.parquet.read_table(_present(Path(source))).to_pylist()
    else:
        import datasets

        rows = datasets.load_dataset(source, split=config.split).to_list()
    if not rows:
        raise ValueError(f"data.source is {source!r}: it has no rows")
    for name in columns:
        for i, row in enumerate(rows):
            if row.get(name) is None:
                near = difflib.get_close_matches(name, row, n=1)
                hint = f"; did you mean {near[0]!r}?" if near else ""
                has = ", ".join(map(repr, row))
                raise ValueError(f"data.source is {source!r}: row {i} has no column {name!r}, it has {has}{hint}")
    return rows


def _present(path: Path) -> Path:
    if not path.exists():
        raise ValueError(f"data.source is {str(path)!r}: there is no such file")
    return path


def _lines(path: Path) -> list[Row]:
    rows = []
    for number, line in enumerate(_present(path).read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: not JSON ({error})") from error
        if not isinstance(row, dict):
            raise ValueError(f"{path}, line {number}: a row is a JSON object, this is {type(row).__name__}")
        rows.append(row)
    return rows


def encode(model: Model, prompt: str | list[dict[str, str]]) -> list[int]:
    """A prompt's tokens: text as it is, a list of messages through the tokenizer's chat template.

    Raises:
        ValueError: an empty prompt, or messages without a template.
    """
    tokenizer = model.tokenizer
    if isinstance(prompt, str):
        ids = list(tokenizer(prompt)["input_ids"])
        ids = ids[:-1] if ids and ids[-1] == model.eos else ids  # some tokenizers end every text
    elif not tokenizer.chat_template:
        raise ValueError(f"prompt is a list of messages, but the tokenizer has no chat template: {prompt!r}")
    else:
        ids = list(tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=False))
    if not ids:
        raise ValueError(f"prompt is {prompt!r}: it has no tokens")
    return ids


def encode_completion(model: Model, completion: str) -> list[int]:
    """A completion's tokens and the end of sequence, which is learned like any other token."""
    return [*model.tokenizer(completion, add_special_tokens=False)["input_ids"], model.eos]


def encode_all(
    model: Model, rows: Sequence[Row], column: str | None, room: int = 0
) -> tuple[list[list[int]], list[list[int]]]:
    """Tokens of every row's prompt, and of its completion in `column` (None: of none).

    Args:
        model: whose tokenizer is used.
        rows: with `prompt` and `column`.
        column: of the completion.
        room: tokens that must be left for a completion that is not written yet.

    Raises:
        ValueError: an example that is longer than the model's limit.
    """
    prompts = [encode(model, row["prompt"]) for row in rows]
    completions = [[] if column is None else encode_completion(model, row[column]) for row in rows]
    longest = limit(model)
    for i, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
        total = len(prompt) + len(completion) + room
        if total > longest:
            parts = f"a prompt of {len(prompt)} tokens and a completion of {len(completion) or f'up to {room}'}"
            raise ValueError(f"row {i} has {parts}, together {total}; the model's limit is {longest}")
    return prompts, completions


def decode(model: Model, completion: Sequence[int]) -> str:
    """A completion's text, without its end of sequence."""
    ids = completion[:-1] if completion and completion[-1] == model.eos else completion
    return model.tokenizer.decode(list(ids), skip_special_tokens=False)


def tokens(model: Model, completion: Sequence[int]) -> list[str]:
    """A completion's tokens as text; an id that only the model knows, as padded embeddings have, as <id>."""
    texts = model.tokenizer.convert_ids_to_tokens(list(completion))
    return [f"<{i}>" if text is None else text for i, text in zip(completion, texts, strict=True)]
