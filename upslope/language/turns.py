"""Several turns: an environment answers each completion, and the conversation goes on until it ends.

Token in, token out: the model's tokens are never turned into text and back, the environment's text is tokenised once
and appended. Per token, [N, T], are the model's own tokens, those of all turns one after the other; the environment's
lie between them in the sequence, are read, and are in no loss. All conversations that go on are sampled together; each
turn reads its whole context anew.
"""

import json
import math
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from upslope.language import batching, files, games, generation, models, prompts
from upslope.language.batching import Sequences
from upslope.language.generation import Sampling
from upslope.language.models import Model
from upslope.language.prompts import Row
from upslope.language.rollout import SAMPLES, Batch
from upslope.runs.randomness import derive
from upslope.runs.run import Run

SEEDS = "seeds"  # the data of environments that need no other


class Environment(Protocol):
    """One conversation. For a resume to the bit everything must follow from the row and the completions."""

    def reset(self, row: Row) -> str | list[dict[str, str]]:
        """The opening: text, or messages for the chat template. A row is the data's; of `seeds` it is {"seed": n}."""
        ...

    def step(self, completion: str) -> tuple[str, float, bool, bool]:
        """The text that is appended, the turn's reward, terminated, truncated."""
        ...


class Turn(NamedTuple):
    """One completion and what the environment said to it."""

    completion: list[int]
    logp_behavior: list[float]
    observation: list[int]  # the answer's tokens
    reward: float
    terminated: bool
    truncated: bool  # by the environment, or by the limit of turns


class Conversations(NamedTuple):
    """N conversations of at most K turns; T model tokens at most, those of all turns."""

    rows: list[Row]
    openings: list[list[int]]
    turns: list[list[Turn]]
    turn: Int64[Tensor, "N T"]  # which one a token belongs to, -1 beyond the end
    logp_behavior: Float[Tensor, "N T"]
    reward: Float[Tensor, "N K"]
    terminated: Bool[Tensor, "N K"]  # True beyond the end too: nothing follows
    truncated: Bool[Tensor, "N K"]

    @property
    def response(self) -> Bool[Tensor, "N T"]:
        return self.turn >= 0

    @property
    def valid(self) -> Bool[Tensor, "N K"]:
        """Turns that took place."""
        lengths = torch.tensor([len(each) for each in self.turns])
        return torch.arange(self.reward.shape[1]) < lengths.unsqueeze(1)

    @property
    def first(self) -> Int64[Tensor, "N K"]:
        """The place among the N's tokens where a turn begins; 0 for one that did not take place."""
        before = self.turn.unsqueeze(1) < torch.arange(self.reward.shape[1]).view(1, -1, 1)
        return ((before & self.response.unsqueeze(1)).sum(2)) * self.valid


def resolve(spec: str) -> Callable[[], Environment]:
    """The environment that a specification names: a game's name or FILE.py:CLASS.

    Raises:
        ValueError: nothing of the kind is there.
    """
    if spec in games.GAMES:
        return games.GAMES[spec]
    file, _, name = spec.rpartition(":")
    path = Path(file)
    if path.suffix != ".py":
        raise ValueError(f"environment is {spec!r}, allowed: {', '.join(games.GAMES)}, or FILE.py:CLASS")
    kind: Any = files.attribute("environment", path, name)
    if not all(callable(getattr(kind, method, None)) for method in ("reset", "step")):
        raise ValueError(f"environment is {spec!r}: {path} has no class {name!r} with reset and step")
    return kind


def openings(config: prompts.Config, seed: int, held_out: bool = False) -> list[Row]:
    """The rows that environments are reset with. Of `seeds` one in ten, a multiple of 10, is held out."""
    if config.source != SEEDS:
        return prompts.read(config, seed=seed)
    source = random.Random(derive(seed, "openings"))
    return [{"seed": 10 * source.randrange(10**8) + (0 if held_out else source.randint(1, 9))}
            for _ in range(config.rows)]  # fmt: skip


def play(
    model: Model,
    make: Callable[[], Environment],
    rows: Sequence[Row],
    sampling: Sampling,
    max_turns: int,
    generator: Callable[[int], torch.Generator],
) -> Conversations:
    """One conversation a row, to its end or to the limit of turns, which truncates it.

    Args:
        model: in evaluation mode.
        make: a new environment.
        rows: what each is reset with.
        sampling: how a token is drawn.
        max_turns: completions a conversation.
        generator: of each turn's random numbers.

    Raises:
        ValueError: an environment that raised or returned what is not allowed, or a context beyond the model's limit.
    """
    played = [_attempt(make, i, "be made") for i in range(len(rows))]
    opened = [_opening(model, played[i], row, i) for i, row in enumerate(rows)]
    contexts, turns = [list(each) for each in opened], [[] for _ in rows]  # type: list[list[int]], list[list[Turn]]
    running = list(range(len(rows)))
    for number in range(max_turns):
        for i in running:
            _fits(model, contexts[i], sampling.max_new_tokens, i, number)
        done = generation.generate(model, [contexts[i] for i in running], 1, sampling, generator(number))
        for i, completion, logp in zip(running, done.tokens(), done.logp_behavior.tolist(), strict=True):
            text, reward, terminated, truncated = _step(played[i], prompts.decode(model, completion), i, number)
            observation = list(model.tokenizer(text, add_special_tokens=False)["input_ids"])
            truncated = not terminated and (truncated or number + 1 == max_turns)
            turns[i].append(Turn(completion, logp[: len(completion)], observation, reward, terminated, truncated))
            contexts[i] = contexts[i] + completion + observation
            if truncated:
                _fits(model, contexts[i], 0, i, number + 1)
        running = [i for i in running if not (turns[i][-1].terminated or turns[i][-1].truncated)]
        if not running:
            break
    return stack(rows, opened, turns)


def stack(rows: Sequence[Row], opened: list[list[int]], turns: list[list[Turn]]) -> Conversations:
    """Conversations with their numbers as rectangles."""
    wide = lambda values, fill, dtype: pad_sequence(  # noqa: E731
        [torch.tensor(each, dtype=dtype) for each in values], batch_first=True, padding_value=fill
    )
    turn = [[k for k, each in enumerate(several) for _ in each.completion] for several in turns]
    logp = [[x for each in several for x in each.logp_behavior] for several in turns]
    return Conversations(
        list(rows), opened, turns, wide(turn, -1, torch.int64), wide(logp, 0.0, torch.float32),
        wide([[each.reward for each in several] for several in turns], 0.0, torch.float64),
        wide([[each.terminated for each in several] for several in turns], True, torch.bool),
        wide([[each.truncated for each in several] for several in turns], False, torch.bool),
    )  # fmt: skip


def tail(turns: Sequence[Turn]) -> tuple[list[int], list[bool]]:
    """All tokens after the opening, and which of them are the model's; the last answer only where V of it is asked."""
    ids: list[int] = []
    own: list[bool] = []
    for each in turns:
        answer = [] if each.terminated else each.observation
        ids += each.completion + answer
        own += [True] * len(each.completion) + [False] * len(answer)
    return ids, own


def batches(data: Conversations, index: Sequence[int], model: Model, tokens: int) -> list[Batch]:
    """Micro-batches of these conversations, of like length, at most `tokens` tokens each once padded."""
    tails = {i: tail(data.turns[i]) for i in index}
    found = []
    for group in batching.buckets([len(data.openings[i]) + len(tails[i][0]) for i in index], tokens):
        chosen = [index[k] for k in group]
        sequences = batching.pad([data.openings[i] for i in chosen], [tails[i][0] for i in chosen], model.pad)
        own = torch.tensor([x for i in chosen for x in tails[i][1]], dtype=torch.bool)
        response = torch.zeros_like(sequences.response).masked_scatter(sequences.response, own)
        found.append(Batch(sequences._replace(response=response).to(model.device), chosen))
    return found


@torch.no_grad()
def per_token(
    of: Callable[[Sequences], Float[Tensor, "B L"]], data: Conversations, model: Model, tokens: int
) -> Float[Tensor, "N T"]:
    """A function of sequences at all tokens of the model's, 0 beyond their ends; in micro-batches."""
    found: Tensor = torch.zeros_like(data.logp_behavior)
    for batch in batches(data, range(len(data.turns)), model, tokens):
        values = of(batch.sequences)
        found = found.to(torch.promote_types(found.dtype, values.dtype))
        batch.put(values, found)
    return found


def log_probs(network: Any, data: Conversations, model: Model, temperature: float, tokens: int) -> Float[Tensor, "N T"]:
    """log π of all the model's tokens under a network, 0 beyond their ends."""
    return per_token(lambda batch: models.log_probs(network, batch, temperature), data, model, tokens)


def summary(data: Conversations) -> dict[str, float]:
    """What conversations say of the policy; entropy by the mean of - log π, nats per token."""
    total, count = data.reward.sum(1), data.response.sum()
    return {
        "reward": float(total.mean()),
        "reward_std": float(total.std(correction=0)),
        "turns": float(data.valid.sum(1).double().mean()),
        "completion_length": float(count / data.valid.sum()),
        "terminated": float((data.terminated & data.valid).any(1).double().mean()),
        "entropy": float(-data.logp_behavior.double().sum() / count),
    }


def write_samples(
    session: Run, model: Model, data: Conversations, psi: Tensor, logp: Tensor, iteration: int, count: int
) -> None:
    """Some conversations to `samples.jsonl`; `logp` is after the update, and the environment's tokens have 0."""
    if session.directory is None:
        return
    with open(session.directory / SAMPLES, "a", encoding="utf-8") as file:
        for i in range(min(count, len(data.turns))):
            ids, own = tail(data.turns[i])
            mask, width = torch.tensor(own), sum(own)
            numbers = {"psi": psi[i], "logp": data.logp_behavior[i], "log_ratio": logp[i] - data.logp_behavior[i]}
            places = {k: torch.zeros(len(ids), dtype=v.dtype).masked_scatter(mask, v[:width].cpu())
                      for k, v in numbers.items()}  # fmt: skip
            row = {
                "step": iteration,
                "prompt": model.tokenizer.decode(data.openings[i]),
                "completion": model.tokenizer.decode(ids),
                "reward": float(data.reward[i].sum()),
                "turns": [
                    {
                        "completion": prompts.decode(model, each.completion),
                        "observation": model.tokenizer.decode(each.observation),
                        "reward": each.reward,
                    }
                    for each in data.turns[i]
                ],
                "tokens": prompts.tokens(model, ids),
                **{name: [round(x, 4) for x in each.tolist()] for name, each in places.items()},
            }
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def _attempt(of: Callable[[], Any], i: int, what: str) -> Any:
    try:
        return of()
    except Exception as error:
        raise ValueError(
            f"the environment of conversation {i} could not {what}: {type(error).__name__}: {error}; "
            "nothing was trained on this batch"
        ) from error


def _opening(model: Model, game: Environment, row: Row, i: int) -> list[int]:
    text = _attempt(lambda: game.reset(row), i, "reset")
    if not isinstance(text, str | list):
        raise ValueError(
            f"the environment of conversation {i}: reset returned {type(text).__name__}, allowed: text or messages"
        )
    return prompts.encode(model, text)


def _step(game: Environment, completion: str, i: int, turn: int) -> tuple[str, float, bool, bool]:
    found = _attempt(lambda: game.step(completion), i, f"step in turn {turn}")
    where = f"the environment of conversation {i}, turn {turn}: step returned"
    if not isinstance(found, tuple) or len(found) != 4:
        raise ValueError(f"{where} {found!r}, allowed: (text, reward, terminated, truncated)")
    text, reward, *ends = found
    if not isinstance(text, str):
        raise ValueError(f"{where} the text {text!r}, allowed: a str")
    if not isinstance(reward, int | float) or not math.isfinite(reward):
        raise ValueError(f"{where} the reward {reward!r}, allowed: a finite number")
    if not all(isinstance(end, bool) for end in ends):
        raise ValueError(f"{where} terminated and truncated {ends!r}, allowed: bools")
    return text, float(reward), *ends


def _fits(model: Model, context: list[int], room: int, i: int, turn: int) -> None:
    if len(context) + room > models.limit(model):
        raise ValueError(
            f"conversation {i} has {len(context)} tokens before turn {turn} and a completion of up to {room}; the "
            f"model's limit is {models.limit(model)}: allowed: fewer max_turns or max_new_tokens, shorter answers"
        )
