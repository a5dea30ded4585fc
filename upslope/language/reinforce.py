"""REINFORCE for language models (Williams 1992; Ahmadian et al. 2024; S1): a completion is one action.

Psi         reward - b, b the moving average of past batches, the mean of the group's others (RLOO) or of the group;
            or the reward whitened over the batch (REINFORCE++)                   core/advantages.py, core/baselines.py
surrogate   Ψ log π(completion | prompt), the sum over its tokens                 core/surrogates.py
constraint  β KL[π_θ || π_ref] in the reward, by k1 of the sampler's log-probabilities: its gradient is the KL's own
data        completions by the current policy, each used for one gradient step
maximised   the mean over completions

Differs from grpo.py in the absence of a ratio: one step per generation batch leaves no older policy to compare with.
"""

import functools
import time
from dataclasses import dataclass, field
from typing import Any, Literal

from jaxtyping import Float
from torch import Tensor

from upslope.core import advantages, baselines, divergences, reductions, surrogates
from upslope.language import learner, models, prompts, rollout
from upslope.language.generation import Sampling
from upslope.language.learner import AdamW, State
from upslope.language.models import Model
from upslope.language.rollout import Batch, Rollout, Source
from upslope.runs import run as runs
from upslope.runs import settings
from upslope.runs.run import Run


@dataclass(frozen=True)
class REINFORCE:
    """What is REINFORCE's own; model, data, sampling, optimizer and run are nested."""

    model: models.Config = field(default_factory=models.Config)
    data: prompts.Config = field(default_factory=prompts.Config)  # rows with `prompt`, and what the reward asks for
    sampling: Sampling = field(default_factory=Sampling)
    optimizer: AdamW = field(default_factory=lambda: AdamW(learning_rate=1e-4))
    run: runs.Options = field(default_factory=runs.Config)
    reward: str = "task"  # task, FILE.py:FUNCTION, or a reward model's run
    total_steps: int = 200  # iterations, each one gradient step
    batch_size: int = 8  # prompts per iteration
    group_size: int = 8  # completions of each
    micro_batch_tokens: int = 4096  # per forward pass, padding counted: memory, not mathematics
    baseline: Literal["none", "moving-average", "leave-one-out", "group-mean", "whiten"] = "moving-average"
    decay: float = 0.9  # of the moving average, per iteration
    kl_coef: float = 0.0  # β, reward per nat
    sample_interval: int = 10  # iterations between two groups written to samples.jsonl

    def __post_init__(self) -> None:
        settings.within(self, 1, None, "total_steps", "batch_size", "group_size", "micro_batch_tokens")
        settings.within(self, 1, None, "sample_interval")
        settings.within(self, 0, None, "kl_coef")
        settings.below_one(self, "decay")
        rollout.refuse_filters(self.sampling)
        if self.baseline in ("leave-one-out", "group-mean") and self.group_size < 2:
            raise ValueError(f"group_size is {self.group_size}, allowed with baseline {self.baseline!r}: 2 or more")


def objective(
    network: Any, batch: Batch, psi: Float[Tensor, "N T"], total: int, config: REINFORCE
) -> tuple[Tensor, Tensor]:
    """This micro-batch's share of the scalar to maximise, the mean over `total` completions; and log π, detached."""
    logp = models.log_probs(network, batch.sequences, rollout.temperature(config))
    each = surrogates.log_prob(logp, batch.place(psi).to(logp.dtype))
    return reductions.fixed_length_mean(each, batch.sequences.response, 1, total), logp.detach()


def estimate(
    data: Rollout, state: State, model: Model, reference: Any, config: REINFORCE
) -> tuple[Float[Tensor, "N T"], dict[str, float]]:
    """Ψ of every token, its completion's; and the moving average after this batch."""
    reward, kl = data.reward, None
    if config.kl_coef:
        with models.frozen(reference, model.network) as network:
            logp_ref = rollout.log_probs(network, data, model, config)
        kl = divergences.k1(data.logp_behavior, logp_ref).masked_fill(~data.response, 0.0).sum(1).to(reward.dtype)
        reward = reward - config.kl_coef * kl
    average = baselines.MovingAverage(state.remembered.get("mean", 0.0), state.remembered.get("weight", 0.0))
    groups = reward.unflatten(0, (-1, config.group_size))
    psi = {
        "none": lambda: reward,
        "moving-average": lambda: reward - average.mean,
        "leave-one-out": lambda: advantages.leave_one_out(groups).flatten(),
        "group-mean": lambda: advantages.group_relative(groups, "none").flatten(),
        "whiten": lambda: advantages.whiten(reward),
    }[config.baseline]()
    after = baselines.moving_average(average, reward, config.decay)
    numbers = {} if kl is None else {"kl": float(kl.mean())}
    return psi.unsqueeze(1) * data.response, {"mean": float(after.mean), "weight": after.weight} | numbers


def update(
    state: State, origin: Source, data: Rollout, psi: Float[Tensor, "N T"], config: REINFORCE
) -> dict[str, float]:
    """One gradient step over all micro-batches."""
    distances: list[float] = []

    def share(batch: Batch) -> Tensor:
        value, logp = objective(origin.model.network, batch, psi, len(data.completions), config)
        behaved = batch.place(data.logp_behavior).to(logp.dtype)
        distances.append(float((logp - behaved)[batch.sequences.response].abs().max()))
        return value

    index = list(range(len(data.completions)))
    parts = rollout.batches(data, index, origin.model, config.micro_batch_tokens)
    numbers = learner.ascend(state, config, [functools.partial(share, batch) for batch in parts])
    return numbers | {"mismatch": max(distances)}


def train(config: REINFORCE, session: Run | None = None) -> Model:
    """Train and return the model.

    Args:
        config: all settings.
        session: the run to write to or to go on with; by default `config.run`'s.
    """
    with session or Run("lm-reinforce", config, config.total_steps) as session:
        model = models.load(config.model, config.run.seed)
        origin = rollout.source(config, model)
        reference = models.reference(model) if config.kl_coef else None
        state, numbers = learner.begin(model.network, config, session), {}
        while state.iteration < config.total_steps:
            # 1. collect: completions of some prompts, judged
            data = rollout.collect(origin, config, state.iteration, config.batch_size)

            # 2. estimate Ψ
            began = time.perf_counter()
            psi, remembered = estimate(data, state, model, reference, config)
            estimated = time.perf_counter()

            # 3. objective and 4. update: one gradient step
            numbers = update(state, origin, data, psi, config)

            spent = data.seconds | {"estimate": estimated - began, "update": time.perf_counter() - estimated}
            rollout.write_samples(session, origin, data, psi, state.iteration, config)
            state = state._replace(iteration=state.iteration + 1, remembered=remembered)
            numbers |= rollout.summary(data) | rollout.shares(spent)
            learner.report(session, state, config, numbers)
        learner.finish(session, state, model.network, model.tokenizer, numbers)
        return model
