"""What the language trainers that sample share: completions with their rewards, and micro-batches of them."""

import json
import time
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, Protocol

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from upslope.core import advantages
from upslope.language import batching, generation, learner, models, prompts, rewards
from upslope.language.batching import Sequences
from upslope.language.generation import Sampling
from upslope.language.models import Model
from upslope.language.prompts import Row
from upslope.runs.randomness import generator
from upslope.runs.run import Run

SAMPLES = "samples.jsonl"

Cut = Literal["terminate", "mask"]  # a completion at the length limit: scored as it is, or not learned from


class Config(learner.Config, Protocol):
    """What the settings of every trainer that samples have."""

    @property
    def sampling(self) -> Sampling: ...
    @property
    def reward(self) -> str: ...
    @property
    def batch_size(self) -> int: ...
    @property
    def group_size(self) -> int: ...
    @property
    def micro_batch_tokens(self) -> int: ...
    @property
    def sample_interval(self) -> int: ...


class Source(NamedTuple):
    """Where completions come from and how they are judged."""

    model: Model
    rows: list[Row]
    written: list[list[int]]  # every row's prompt, tokenised once
    reward: rewards.Reward
    process: bool = False  # it judges steps


class Rollout(NamedTuple):
    """N = P·G completions, the G of a prompt one after the other. Per token [N, T], T the longest completion."""

    rows: list[Row]  # N of them
    prompts: list[list[int]]  # N, the same for the G of a group
    completions: list[list[int]]
    response: Bool[Tensor, "N T"]
    finished: Bool[Tensor, " N"]  # ended by themselves
    logp_behavior: Float[Tensor, "N T"]
    reward: Float[Tensor, " N"]
    seconds: dict[str, float]  # of the phases so far
    steps: Sequence[rewards.Steps] = ()  # N, with their rewards, where steps are judged and not whole completions

    @property
    def lengths(self) -> list[int]:
        return [len(completion) for completion in self.completions]


class Batch(NamedTuple):
    """A micro-batch. What belongs to a token lies where the token lies."""

    sequences: Sequences
    rows: list[int]  # of the rollout that it holds

    def place(self, values: Float[Tensor, "N T"]) -> Float[Tensor, "B L"]:
        """Values of completions' tokens, at those tokens; 0 elsewhere."""
        response = self.sequences.response
        chosen = values[self.rows]
        inside = torch.arange(chosen.shape[1]) < response.sum(1, keepdim=True).cpu()
        return torch.zeros(response.shape, dtype=values.dtype, device=response.device).masked_scatter(
            response, chosen[inside].to(response.device)
        )

    def put(self, values: Float[Tensor, "B L"], into: Float[Tensor, "N T"]) -> None:
        """The way back: values at the completions' tokens into their rows of the rollout."""
        for k, i in enumerate(self.rows):
            own = values[k][self.sequences.response[k]]
            into[i, : len(own)] = own.to(into)


def source(config: Config, model: Model, process: bool = False) -> Source:
    """The prompts of a run and their judge, of completions or of their steps."""
    rows = prompts.read(config.data, "prompt", seed=config.run.seed)
    written, _ = prompts.encode_all(model, rows, None, room=config.sampling.max_new_tokens)
    judge = rewards.resolve(config.reward, config.data.source, config.run.seed, process)
    return Source(model, rows, written, judge, process)


def collect(origin: Source, config: Config, iteration: int, size: int, again: int = 0) -> Rollout:
    """`group_size` completions of each of `size` prompts, judged; `again` counts further calls in one iteration."""
    began = time.perf_counter()
    seed, group = config.run.seed, config.group_size
    chosen = learner.rows_of(iteration, size, len(origin.rows), seed, f"data-{again}" if again else "data")
    random = generator(seed, "sample", iteration, again)
    done = generation.generate(origin.model, [origin.written[i] for i in chosen], group, config.sampling, random)
    spent = {"generate": time.perf_counter() - began}
    index = [i for i in chosen for _ in range(group)]
    rows, completions = [origin.rows[i] for i in index], done.tokens()
    texts = [prompts.decode(origin.model, completion) for completion in completions]
    steps: list[rewards.Steps] = []
    if origin.process:
        steps = rewards.judge_steps(origin.reward, rows, texts, completions)
        judged = [sum(each for _, each in own) for own in steps]
    else:
        judged = rewards.judge(origin.reward, rows, texts, completions)
    reward = torch.tensor(judged, dtype=torch.float64)
    spent["reward"] = time.perf_counter() - began - spent["generate"]
    return Rollout(
        rows, [origin.written[i] for i in index], completions, done.response.cpu(), done.finished.cpu(),
        done.logp_behavior.cpu(), reward, spent, steps,
    )  # fmt: skip


def process_relative(data: Rollout, size: int) -> Float[Tensor, "N T"]:
    """Ψ by the rewards of steps (S4 A.3.3), group by group; 0 in a group with fewer than 2 steps."""
    width, most = data.response.shape[1], max(1, *(len(steps) for steps in data.steps))
    padded = torch.tensor([[*steps, *[(-1, 0.0)] * (most - len(steps))] for steps in data.steps], dtype=torch.float64)
    groups = padded.unflatten(0, (-1, size)).unbind()
    psi = [
        advantages.process_relative(group[..., 1], group[..., 0].long(), width)
        if (group[..., 0] >= 0).sum() > 1
        else torch.zeros(size, width, dtype=torch.float64)
        for group in groups
    ]
    return torch.cat(psi)


def join(parts: Sequence[Rollout]) -> Rollout:
    """Several rollouts as one."""
    if len(parts) == 1:
        return parts[0]
    width = max(part.response.shape[1] for part in parts)
    wide = lambda x: torch.nn.functional.pad(x, (0, width - x.shape[1]))  # noqa: E731
    return Rollout(
        [row for part in parts for row in part.rows], [p for part in parts for p in part.prompts],
        [c for part in parts for c in part.completions], torch.cat([wide(part.response) for part in parts]),
        torch.cat([part.finished for part in parts]), torch.cat([wide(part.logp_behavior) for part in parts]),
        torch.cat([part.reward for part in parts]),
        {name: sum(part.seconds[name] for part in parts) for name in parts[0].seconds},
        [steps for part in parts for steps in part.steps],
    )  # fmt: skip


def pick(data: Rollout, index: list[int]) -> Rollout:
    """Some of the completions."""
    take = lambda part: part[index] if isinstance(part, Tensor) else [part[i] for i in index]  # noqa: E731
    parts: dict[str, Any] = {name: part for name, part in data._asdict().items() if name != "seconds" and len(part)}
    return data._replace(**{name: take(part) for name, part in parts.items()})  # type: ignore[arg-type]


def batches(data: Rollout, index: list[int], model: Model, tokens: int) -> list[Batch]:
    """Micro-batches of these completions, of like length, at most `tokens` tokens each once padded."""
    lengths = [len(data.prompts[i]) + len(data.completions[i]) for i in index]
    groups = [[index[k] for k in group] for group in batching.buckets(lengths, tokens)]
    return [
        Batch(
            batching.pad([data.prompts[i] for i in g], [data.completions[i] for i in g], model.pad).to(model.device), g
        )
        for g in groups
    ]


@torch.no_grad()
def per_token(
    of: Callable[[Sequences], Float[Tensor, "B L"]], data: Rollout, model: Model, config: Config
) -> Float[Tensor, "N T"]:
    """A function of sequences at all completions' tokens, 0 beyond their ends; in micro-batches."""
    found = torch.zeros_like(data.logp_behavior)
    for batch in batches(data, list(range(len(data.completions))), model, config.micro_batch_tokens):
        batch.put(of(batch.sequences), found)
    return found


def log_probs(network: Any, data: Rollout, model: Model, config: Config) -> Float[Tensor, "N T"]:
    """log π of all completions' tokens under a network, 0 beyond their ends."""
    return per_token(lambda batch: models.log_probs(network, batch, temperature(config)), data, model, config)


def temperature(config: Config) -> float:
    """The policy is the tempered one that samples."""
    return config.sampling.temperature


def refuse_filters(sampling: Sampling) -> None:
    """Raise a `ValueError` for sampling from another distribution than the one whose log π is learned."""
    if sampling.filters or sampling.temperature == 0:
        raise ValueError(
            f"sampling is {sampling}; for training allowed: temperature above 0, top_k 0, top_p 1, min_p 0: "
            "what a filter cuts off has another distribution than the policy that is learned"
        )
    if sampling.engine.url is not None and sampling.engine.weights is None:
        raise ValueError(
            "sampling.engine.weights is None; for training allowed: the folder that the server reads its weights from: "
            "without it every batch would be the first policy's"
        )


def summary(data: Rollout) -> dict[str, float]:
    """What a rollout says of the policy; entropy by the mean of - log π, nats per token."""
    lengths = torch.tensor(data.lengths, dtype=torch.float64)
    return {
        "reward": float(data.reward.mean()),
        "reward_std": float(data.reward.std()),
        "completion_length": float(lengths.mean()),
        "finished": float(data.finished.double().mean()),
        "entropy": float(-data.logp_behavior.double().sum() / lengths.sum()),
    }


def shares(seconds: dict[str, float]) -> dict[str, float]:
    """Of each phase in an iteration's time.

    >>> shares({"generate": 3.0, "update": 1.0})
    {'share_generate': 0.75, 'share_update': 0.25}
    """
    return {f"share_{name}": each / sum(seconds.values()) for name, each in seconds.items()}


def write_samples(
    session: Run, origin: Source, data: Rollout, psi: Float[Tensor, "N T"], iteration: int, config: Config
) -> None:
    """A group to `samples.jsonl`: text, reward, and of each token Ψ and what the update did to its log-probability."""
    if session.directory is None or iteration % config.sample_interval:
        return
    shown = pick(data, list(range(min(config.group_size, len(data.completions)))))
    change = log_probs(origin.model.network, shown, origin.model, config) - shown.logp_behavior
    with open(session.directory / SAMPLES, "a", encoding="utf-8") as file:
        for i, completion in enumerate(shown.completions):
            numbers = {"psi": psi[i], "logp": shown.logp_behavior[i], "log_ratio": change[i]}
            row = {
                "step": iteration,
                "prompt": shown.rows[i]["prompt"],
                "completion": prompts.decode(origin.model, completion),
                "reward": float(shown.reward[i]),
                "tokens": prompts.tokens(origin.model, completion),
                **{name: [round(x, 4) for x in each[: len(completion)].tolist()] for name, each in numbers.items()},
            }
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
