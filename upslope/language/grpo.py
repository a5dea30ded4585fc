"""Group Relative Policy Optimization and its descendants (Shao et al. 2024, arXiv:2402.03300; S3 alg 12, S4 3.5).

Psi         (reward - mean of the group) / (std + 1e-4), for every token of a completion; S4 eq 3.12 core/advantages.py
            or of the steps that end at the token or later, each normalised so; S4 A.3.3
surrogate   min(ρ Ψ, clip(ρ) Ψ), ρ = π_θ/π_old of a token (S4 eq 3.14), or of a sequence (GSPO)      core/surrogates.py
constraint  the clip; and β KL[π_θ || π_ref], in the loss by k1, k2 or k3, or in the reward          core/divergences.py
data        G completions of each prompt by the current policy, used for a few gradient steps
maximised   the mean over tokens, over sequences' means, or over a fixed length                      core/reductions.py

A descendant (GPG, Dr. GRPO, DAPO, GSPO, CISPO) is a row of choices in presets.py, not a branch here. There is no
critic: a group's mean is a baseline for the prompt, not the value of a token (S4 A.3.1 says otherwise). S3 alg 12
prints the ratio π_old/π_ref and KL[π_old || π_ref]: the ratio is π_θ/π_old, the KL that of π_θ. On data of π_old the
KL in the loss carries the factor π_θ/π_old (S4 A.3.2 leaves it out).
"""

import functools
import time
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from upslope.core import advantages, divergences, reductions, surrogates
from upslope.language import learner, models, prompts, rollout
from upslope.language.generation import Sampling
from upslope.language.learner import AdamW, State
from upslope.language.models import Model
from upslope.language.refresh import Refresh, Refresher
from upslope.language.rollout import Batch, Rollout, Source
from upslope.runs import run as runs
from upslope.runs import settings
from upslope.runs.randomness import generator
from upslope.runs.run import Run

ESTIMATORS = {"k1": divergences.k1, "k2": divergences.k2, "k3": divergences.k3}


@dataclass(frozen=True)
class GRPO:
    """What is GRPO's own; model, data, sampling, optimizer and run are nested."""

    model: models.Config = field(default_factory=models.Config)
    data: prompts.Config = field(default_factory=prompts.Config)  # rows with `prompt`, and what the reward asks for
    sampling: Sampling = field(default_factory=Sampling)
    optimizer: AdamW = field(default_factory=lambda: AdamW(learning_rate=1e-4))
    run: runs.Options = field(default_factory=runs.Config)
    refresh: Refresh = field(default_factory=Refresh)  # the reward model follows too
    reward: str = "task"  # task, FILE.py:FUNCTION, or a reward model's run
    total_steps: int = 200  # iterations, each of one generation batch
    batch_size: int = 8  # prompts per generation batch
    group_size: int = 8  # G, completions of each
    num_epochs: int = 1  # passes over a generation batch
    minibatches: int = 1  # gradient steps per pass
    micro_batch_tokens: int = 4096  # per forward pass, padding counted: memory, not mathematics
    credit: Literal["response", "process"] = "response"  # of a token: its completion's, or its steps' (S4 A.3.3)
    scale: Literal["group", "batch", "none"] = "group"  # what the centred reward is divided by the std of
    surrogate: Literal["clip", "cispo", "log-prob"] = "clip"
    ratio: Literal["token", "sequence"] = "token"  # sequence: exp of the mean over its tokens, one ratio (GSPO)
    clip_low: float = 0.2
    clip_high: float = 0.2
    reduction: Literal["token", "sequence", "fixed-length"] = "token"
    kl_coef: float = 0.0  # β, reward per nat
    kl_estimator: Literal["k1", "k2", "k3"] = "k3"
    kl_in: Literal["loss", "reward"] = "loss"
    reference_interval: int = 0  # iterations after which π_ref becomes the policy (S3 alg 12's outer loop); 0: never
    truncated: rollout.Cut = "terminate"  # a completion cut at the limit: scored, or masked out of the loss
    overlong_buffer: int = 0  # tokens before the limit over which a penalty grows linearly to 1 (DAPO); 0: none
    dynamic_sampling: int = 0  # further generation batches, at most, in place of groups whose rewards are all equal
    sample_interval: int = 10  # iterations between two groups written to samples.jsonl

    def __post_init__(self) -> None:
        settings.within(self, 1, None, "total_steps", "batch_size", "num_epochs", "minibatches", "micro_batch_tokens")
        settings.within(self, 2, None, "group_size")
        settings.within(self, 1, None, "sample_interval")
        settings.within(self, 0, 1, "clip_low")
        settings.within(self, 0, None, "clip_high", "kl_coef", "overlong_buffer", "dynamic_sampling")
        settings.within(self, 0, None, "reference_interval")
        rollout.refuse_filters(self.sampling)
        if self.credit == "process" and self.refresh.interval:
            raise ValueError(f"refresh.interval is {self.refresh.interval}, allowed with credit 'process': 0")
        if self.credit == "process" and (self.scale, self.overlong_buffer, self.kl_in) != ("group", 0, "loss"):
            raise ValueError(
                f"credit is 'process' with scale {self.scale!r}, overlong_buffer {self.overlong_buffer} and kl_in "
                f"{self.kl_in!r}; allowed: 'group', 0 and 'loss', as there is no one reward of a completion"
            )
        if self.reference_interval and (not self.kl_coef or self.model.lora_rank):
            raise ValueError(
                f"reference_interval is {self.reference_interval}, allowed: 0 where kl_coef is 0 (no reference) "
                "or with LoRA (the reference is the network without adapters)"
            )
        if self.minibatches > self.batch_size:
            raise ValueError(f"minibatches is {self.minibatches}, allowed: at most batch_size {self.batch_size}")
        if self.overlong_buffer > self.sampling.max_new_tokens:
            raise ValueError(
                f"overlong_buffer is {self.overlong_buffer}, allowed: at most {self.sampling.max_new_tokens} new tokens"
            )


class Estimates(NamedTuple):
    """What the objective weighs, for every token of every completion."""

    psi: Float[Tensor, "N T"]
    counted: Bool[Tensor, "N T"]  # tokens that are learned from
    logp_old: Float[Tensor, "N T"] | None  # None: the gradient step comes first, π_old is π_θ as it is
    logp_ref: Float[Tensor, "N T"] | None


class Whole(NamedTuple):
    """Of the whole gradient step, so that micro-batches add up: tokens and sequences that count."""

    tokens: int
    sequences: int


def objective(network: Any, batch: Batch, given: Estimates, whole: Whole, config: GRPO) -> tuple[Tensor, Tensor]:
    """This micro-batch's share of the scalar to maximise; and log π of its tokens, detached."""
    logp = models.log_probs(network, batch.sequences, rollout.temperature(config))
    psi, counted = batch.place(given.psi).to(logp.dtype), batch.place(given.counted)
    logp_old = logp.detach() if given.logp_old is None else batch.place(given.logp_old).to(logp.dtype)
    each = _surrogate(logp, logp_old, psi, counted, config)
    if given.logp_ref is not None and config.kl_in == "loss":
        kl = ESTIMATORS[config.kl_estimator](logp, batch.place(given.logp_ref).to(logp.dtype))
        weight = (logp.detach() - logp_old).exp()  # the samples are π_old's
        each = surrogates.kl_penalised(each, weight * kl, config.kl_coef)
    if config.reduction == "token":
        reduced = reductions.token_mean(each, counted, whole.tokens)
    elif config.reduction == "sequence":
        reduced = reductions.sequence_mean(each, counted, whole.sequences)
    else:
        reduced = reductions.fixed_length_mean(each, counted, config.sampling.max_new_tokens, whole.sequences)
    return reduced, logp.detach()


def _surrogate(logp: Tensor, logp_old: Tensor, psi: Tensor, counted: Tensor, config: GRPO) -> Float[Tensor, "B L"]:
    if config.surrogate == "log-prob":
        return surrogates.log_prob(logp, psi)
    if config.surrogate == "cispo":
        return surrogates.cispo(logp, logp_old, psi, config.clip_low, config.clip_high)
    if config.ratio == "token":
        return surrogates.clipped_ratio(logp, logp_old, psi, config.clip_low, config.clip_high)
    ratios = surrogates.sequence_ratio(logp, logp_old, counted, length_normalised=True).unsqueeze(-1)
    return surrogates.clipped(ratios.expand_as(psi), psi, config.clip_low, config.clip_high)


def overlong(lengths: Tensor, limit: int, buffer: int) -> Float[Tensor, " N"]:
    """DAPO's soft penalty (arXiv:2503.14476 eq 13): 0 up to limit - buffer, falling linearly to -1 at the limit.

    >>> overlong(torch.tensor([6, 8, 10]), limit=10, buffer=4)
    tensor([-0.0000, -0.5000, -1.0000])
    """
    return -((lengths - (limit - buffer)) / buffer).clamp(0, 1)


def estimate(data: Rollout, origin: Source, reference: Any, config: GRPO) -> Estimates:
    """Ψ of every token, log π_old where a pass has several gradient steps, log π_ref where there is a KL."""
    model, logp_ref, logp_old = origin.model, None, None
    if config.kl_coef:
        with models.frozen(reference, model.network) as network:
            logp_ref = rollout.log_probs(network, data, model, config)
    if config.minibatches > 1:  # with one, the first pass meets every token before the policy moves
        logp_old = rollout.log_probs(model.network, data, model, config)
    reward, lengths = data.reward, torch.tensor(data.lengths)
    if config.overlong_buffer:
        reward = reward + overlong(lengths, config.sampling.max_new_tokens, config.overlong_buffer)
    if logp_ref is not None and config.kl_in == "reward":
        kl = ESTIMATORS[config.kl_estimator](data.logp_behavior, logp_ref).masked_fill(~data.response, 0.0)
        reward = reward - config.kl_coef * kl.sum(1)
    if config.credit == "process":
        psi = rollout.process_relative(data, config.group_size)
    else:
        grouped = advantages.group_relative(reward.unflatten(0, (-1, config.group_size)), config.scale)
        psi = grouped.flatten().unsqueeze(1) * data.response
    counted = data.response
    if config.truncated == "mask":
        counted = counted & data.finished.unsqueeze(1)
    return Estimates(psi, counted, logp_old, logp_ref)


def collect(origin: Source, config: GRPO, iteration: int) -> Rollout:
    """A generation batch; with dynamic sampling groups of equal rewards are replaced as long as batches are left."""
    kept, first = [], None
    for again in range(config.dynamic_sampling + 1):
        data = rollout.collect(origin, config, iteration, config.batch_size, again)
        first = first or data
        groups = data.reward.unflatten(0, (-1, config.group_size))
        useful = (groups.amax(1) > groups.amin(1)).nonzero().flatten().tolist() if config.dynamic_sampling else None
        if useful is None:
            return data
        kept += [rollout.pick(data, [g * config.group_size + i for i in range(config.group_size)]) for g in useful]
        if len(kept) >= config.batch_size:
            break
    assert first is not None
    return rollout.join(kept[: config.batch_size]) if kept else first


def update(state: State, origin: Source, data: Rollout, given: Estimates, config: GRPO) -> dict[str, float]:
    """Gradient steps over the groups, in a new order each pass; the numbers of the last."""
    model, size = origin.model, config.group_size
    groups, numbers, mismatch = len(data.completions) // size, {}, None
    met = torch.zeros_like(data.logp_behavior)  # log π of the first pass
    for epoch in range(config.num_epochs):
        order = torch.randperm(groups, generator=generator(config.run.seed, "shuffle", state.iteration, epoch))
        for part in order.tensor_split(min(config.minibatches, groups)):
            index = [int(group) * size + i for group in part for i in range(size)]
            whole = Whole(max(1, int(given.counted[index].sum())), len(index))
            distances: list[float] = []

            def share(
                batch: Batch, given: Estimates = given, whole: Whole = whole, distances: list[float] = distances
            ) -> Tensor:
                value, logp = objective(model.network, batch, given, whole, config)
                if given.logp_old is None and config.num_epochs > 1:
                    batch.put(logp, met)
                behaved = batch.place(data.logp_behavior).to(logp.dtype)
                distances.append(float((logp - behaved)[batch.sequences.response].abs().max()))
                return value

            parts = rollout.batches(data, index, model, config.micro_batch_tokens)
            numbers = learner.ascend(state, config, [functools.partial(share, batch) for batch in parts])
            # before the first step the trainer's policy is the sampler's: whatever differs is an error
            mismatch = max(distances) if mismatch is None else mismatch
        if given.logp_old is None:
            given = given._replace(logp_old=met)
    return numbers | {"mismatch": mismatch or 0.0}


def train(config: GRPO, session: Run | None = None) -> Model:
    """Train and return the model.

    Args:
        config: all settings.
        session: the run to write to or to go on with; by default `config.run`'s.
    """
    with session or Run("grpo", config, config.total_steps) as session:
        model = models.load(config.model, config.run.seed)
        origin = rollout.source(config, model, config.credit == "process")
        reference = models.reference(model) if config.kl_coef else None
        follower = reference if config.reference_interval else None
        refresher = (
            Refresher(config.refresh, origin, config.data.source, config.run.seed) if config.refresh.interval else None
        )
        state, numbers = learner.begin(model.network, config, session, follower, refresher), {}
        while state.iteration < config.total_steps:
            # 1. collect: G completions of some prompts, judged
            data = collect(origin, config, state.iteration)

            # 2. estimate Ψ, and the policies that it is compared with
            began = time.perf_counter()
            given = estimate(data, origin, reference, config)
            estimated = time.perf_counter()

            # 3. objective and 4. update: a few gradient steps
            numbers = update(state, origin, data, given, config)

            spent = data.seconds | {"estimate": estimated - began, "update": time.perf_counter() - estimated}
            rollout.write_samples(session, origin, data, given.psi, state.iteration, config)
            state = state._replace(iteration=state.iteration + 1)

            # the outer loops: what the policy is held to and what judges it become those of now
            if config.reference_interval and state.iteration % config.reference_interval == 0:
                learner.follow(state)
            if refresher:
                refresher.compare(data, [prompts.decode(model, each) for each in data.completions], config.group_size)
                numbers |= refresher.refresh() if state.iteration % config.refresh.interval == 0 else {}

            numbers |= rollout.summary(data) | rollout.shares(spent)
            learner.report(session, state, config, numbers)
        if refresher and session.directory is not None:
            refresher.save(session.directory / "reward")
        learner.finish(session, state, model.network, model.tokenizer, numbers)
        return model
