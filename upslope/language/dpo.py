"""Direct Preference Optimization (Rafailov et al. 2023, arXiv:2305.18290; S4 3.4): comparisons without a reward model.

Psi         the loss' own weight, σ(-margin)
surrogate   log σ(β log π/π_ref (chosen) - β log π/π_ref (rejected)), S4 eq 3.8; or IPO's       core/preferences.py
constraint  the KL to π_ref, whose price β is in the implicit reward β log π/π_ref, S4 eq 3.7
data        a fixed set of comparisons
maximised   the mean over pairs

log π_ref never changes: it is computed once per row, before training.
"""

from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from upslope.core import preferences
from upslope.language import batching, learner, models, prompts
from upslope.language.batching import Sequences
from upslope.language.learner import AdamW, State
from upslope.language.models import Model
from upslope.runs import run as runs
from upslope.runs import settings
from upslope.runs.run import Run


@dataclass(frozen=True)
class DPO:
    """What is DPO's own; model, data, optimizer and run are nested."""

    model: models.Config = field(default_factory=models.Config)
    data: prompts.Config = field(default_factory=lambda: prompts.Config("task:preferences"))
    optimizer: AdamW = field(default_factory=lambda: AdamW(learning_rate=1e-4))
    run: runs.Options = field(default_factory=runs.Config)
    total_steps: int = 300  # gradient steps
    batch_size: int = 32  # pairs per gradient step
    micro_batch_size: int = 32  # pairs per forward pass
    beta: float = 0.1  # reward per nat of KL
    loss: Literal["sigmoid", "ipo"] = "sigmoid"
    label_smoothing: float = 0.0  # share of the comparisons that are taken to be the wrong way round

    def __post_init__(self) -> None:
        settings.within(self, 1, None, "total_steps", "batch_size", "micro_batch_size")
        settings.within(self, 0, 0.5, "label_smoothing")
        settings.positive(self, "beta")
        if self.loss == "ipo" and self.label_smoothing:
            raise ValueError(f"label_smoothing is {self.label_smoothing}, allowed with loss 'ipo': 0")


class Pairs(NamedTuple):
    """Comparisons: the chosen completions' rows first, then as many rejected ones."""

    batch: Sequences
    logp_ref: Float[Tensor, " 2n"]  # of whole completions


def completion_log_probs(network: torch.nn.Module, batch: Sequences) -> Float[Tensor, " B"]:
    """log π of whole completions: the sum over their tokens."""
    return models.log_probs(network, batch).sum(-1)


def objective(network: torch.nn.Module, pairs: Pairs, config: DPO, total: int) -> tuple[Float[Tensor, ""], Tensor]:
    """Scalar to maximise: - Σ of the pairs' losses / `total`, the pairs of the whole batch; and implicit rewards."""
    logp = completion_log_probs(network, pairs.batch)
    (better, worse), (better_ref, worse_ref) = logp.chunk(2), pairs.logp_ref.to(logp.dtype).chunk(2)
    if config.loss == "ipo":
        losses = preferences.ipo(better, worse, better_ref, worse_ref, config.beta)
    else:
        losses = preferences.dpo(better, worse, better_ref, worse_ref, config.beta, config.label_smoothing)
    rewards = preferences.implicit_reward(logp.detach(), pairs.logp_ref.to(logp.dtype), config.beta)
    return -losses.sum() / total, rewards


def batch_of(model: Model, written: list[list[int]], better: list[list[int]], worse: list[list[int]]) -> Sequences:
    """Chosen completions, then rejected ones, of the same prompts."""
    return batching.pad(written * 2, better + worse, model.pad).to(model.device)


def update(
    state: State, model: Model, chosen: list[int], data: tuple[list, list, list], logp_ref: Tensor, config: DPO
) -> dict[str, float]:
    """One gradient step over all micro-batches; and what the implicit rewards say."""
    rewards: list[Tensor] = []

    def part(rows: list[int]) -> Tensor:
        batch = batch_of(model, *([column[i] for i in rows] for column in data))
        pairs = Pairs(batch, logp_ref[rows].T.flatten().to(model.device))
        value, each = objective(model.network, pairs, config, len(chosen))
        rewards.append(each.unflatten(0, (2, -1)).cpu())
        return value

    size = config.micro_batch_size
    groups = [chosen[i : i + size] for i in range(0, len(chosen), size)]
    numbers = learner.ascend(state, config, [lambda rows=rows: part(rows) for rows in groups])
    better, worse = torch.cat(rewards, 1)
    return numbers | {
        "loss": -numbers["objective"],
        "accuracy": float((better > worse).double().mean()),
        "margin": float((better - worse).mean()),
        "reward_chosen": float(better.mean()),
        "reward_rejected": float(worse.mean()),
    }


@torch.no_grad()
def reference_log_probs(model: Model, data: tuple[list, list, list], config: DPO) -> Float[Tensor, "N 2"]:
    """log π_ref of every row's chosen and rejected completion, of the model as it is before training."""
    with models.frozen(models.reference(model), model.network) as network:
        found = []
        for first in range(0, len(data[0]), config.micro_batch_size):
            inside = slice(first, first + config.micro_batch_size)
            logp = completion_log_probs(network, batch_of(model, *(column[inside] for column in data)))
            found.append(logp.unflatten(0, (2, -1)).T.cpu())
        return torch.cat(found)


def train(config: DPO, session: Run | None = None) -> Model:
    """Train and return the model.

    Args:
        config: all settings.
        session: the run to write to or to go on with; by default `config.run`'s.
    """
    with session or Run("dpo", config, config.total_steps) as session:
        rows = prompts.read(config.data, "prompt", "chosen", "rejected", seed=config.run.seed)
        model = models.load(config.model, config.run.seed)
        written, better = prompts.encode_all(model, rows, "chosen")
        data = (written, better, prompts.encode_all(model, rows, "rejected")[1])
        logp_ref = reference_log_probs(model, data, config)
        state, numbers = learner.begin(model.network, config, session), {}
        while state.iteration < config.total_steps:
            # 1. collect: some comparisons
            chosen = learner.rows_of(state.iteration, config.batch_size, len(rows), config.run.seed)

            # 2. estimate: nothing; the comparison is given. 3. objective and 4. update
            numbers = update(state, model, chosen, data, logp_ref, config)

            state = state._replace(iteration=state.iteration + 1)
            learner.report(session, state, config, numbers)
        learner.finish(session, state, model.network, model.tokenizer, numbers)
        return model
