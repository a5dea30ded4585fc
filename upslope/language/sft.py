"""Supervised fine-tuning: the completion of every prompt is made likely (S0 3, S4 3.3; Ouyang et al. 2022).

Psi         1 for every token of the completion, 0 for the prompt's
surrogate   log π(token | what stands before it)                              core/surrogates.py
constraint  none
data        a fixed set of prompts and completions
maximised   the mean over all completion tokens of a batch                    core/reductions.py

The end of sequence is a token of the completion, also where the tokenizer pads with the same token. Packed examples do
not see one another.
"""

from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

from upslope.core import reductions, surrogates
from upslope.language import batching, learner, models, prompts
from upslope.language.batching import Sequences
from upslope.language.learner import AdamW, State
from upslope.language.models import Model
from upslope.runs import run as runs
from upslope.runs import settings
from upslope.runs.run import Run


@dataclass(frozen=True)
class SFT:
    """What is SFT's own; model, data, optimizer and run are nested."""

    model: models.Config = field(default_factory=models.Config)
    data: prompts.Config = field(default_factory=prompts.Config)  # rows with `prompt` and `completion`
    optimizer: AdamW = field(default_factory=AdamW)
    run: runs.Options = field(default_factory=runs.Config)
    total_steps: int = 500  # gradient steps
    batch_size: int = 64  # examples per gradient step
    micro_batch_tokens: int = 4096  # per forward pass, padding counted: memory, not mathematics
    packing_length: int | None = None  # tokens a packed row; None: one example a row

    def __post_init__(self) -> None:
        settings.within(self, 1, None, "total_steps", "batch_size", "micro_batch_tokens", "packing_length")


def objective(network: torch.nn.Module, batch: Sequences, total: int) -> Float[Tensor, ""]:
    """Scalar to maximise: Σ log π over the completions' tokens / `total`, the tokens of the whole batch."""
    logp = models.log_probs(network, batch)
    return reductions.token_mean(surrogates.log_prob(logp, torch.ones_like(logp)), batch.response, total)


def batches(
    model: Model, written: list[list[int]], completions: list[list[int]], config: SFT
) -> tuple[list[Sequences], int]:
    """Micro-batches, and how many completion tokens they have together."""
    if config.packing_length is None:
        lengths = [len(p) + len(c) for p, c in zip(written, completions, strict=True)]
        groups = batching.buckets(lengths, config.micro_batch_tokens)
        parts = [batching.pad([written[i] for i in g], [completions[i] for i in g], model.pad) for g in groups]
    else:
        packed = batching.pack(written, completions, model.pad, config.packing_length)
        size = max(1, config.micro_batch_tokens // config.packing_length)
        parts = [
            Sequences(*(part[first : first + size] for part in packed))  # type: ignore[index]
            for first in range(0, len(packed.ids), size)
        ]
    return [part.to(model.device) for part in parts], sum(map(len, completions))


def update(state: State, model: Model, parts: list[Sequences], total: int, config: SFT) -> dict[str, float]:
    """One gradient step over all micro-batches."""
    numbers = learner.ascend(
        state, config, [lambda part=part: objective(model.network, part, total) for part in parts]
    )  # fmt: skip
    return numbers | {"loss": -numbers["objective"], "tokens": total}


def train(config: SFT, session: Run | None = None) -> Model:
    """Train and return the model.

    Args:
        config: all settings.
        session: the run to write to or to go on with; by default `config.run`'s.
    """
    with session or Run("sft", config, config.total_steps) as session:
        rows = prompts.read(config.data, "prompt", "completion", seed=config.run.seed)
        model = models.load(config.model, config.run.seed)
        written, completions = prompts.encode_all(model, rows, "completion")
        state, numbers = learner.begin(model.network, config, session), {}
        while state.iteration < config.total_steps:
            # 1. collect: some rows
            chosen = learner.rows_of(state.iteration, config.batch_size, len(rows), config.run.seed)

            # 2. estimate: Psi is 1 on every token of a completion
            parts, total = batches(model, [written[i] for i in chosen], [completions[i] for i in chosen], config)

            # 3. objective and 4. update
            numbers = update(state, model, parts, total, config)

            state = state._replace(iteration=state.iteration + 1)
            learner.report(session, state, config, numbers)
        learner.finish(session, state, model.network, model.tokenizer, numbers)
        return model
