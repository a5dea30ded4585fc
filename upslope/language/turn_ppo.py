"""PPO over turns: a language model in an environment, its turns the actions (S4 3.5 and its closing box).

Psi         GAE(γ, λ) over turns, given to all tokens of a turn, whitened                    core/advantages.py
value       V(s_k), s_k all that was said before turn k: V(s_k) = r_k + γ V(s_{k+1})         core/returns.py
surrogate   min(ρ Ψ, clip(ρ) Ψ), ρ = π_θ/π_old of a token, S4 eq 3.9                         core/surrogates.py
constraint  the clip; β KL[π_θ || π_ref] in a turn's reward, summed over its tokens
data        conversations by the current policy, used for a few epochs; the environment's tokens are in no loss
maximised   surrogate - c1 (V - target)², means over tokens and over turns

A response to a prompt is a contextual bandit's action, and Bellman's equation says nothing but V = E[r]: GRPO needs no
more. With several turns it is back: Q(s_k, turn) = r + γ E[V(s_{k+1})]; S4's closing box prints V(s_k) on the right.
`credit bandit` is the comparison: the conversation is one action, its return less V(opening) weighs all its tokens.
"""

import functools
import time
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from upslope.core import advantages, reductions, returns, surrogates, values
from upslope.language import learner, models, prompts, rollout, turns
from upslope.language.generation import Sampling
from upslope.language.learner import AdamW, State
from upslope.language.models import Model, Scorer
from upslope.language.ppo import states
from upslope.language.rollout import Batch
from upslope.language.turns import Conversations
from upslope.runs import run as runs
from upslope.runs import settings
from upslope.runs.randomness import generator
from upslope.runs.run import Run


@dataclass(frozen=True)
class TurnPPO:
    """What is its own; model, data, sampling, optimizer and run are nested."""

    model: models.Config = field(default_factory=models.Config)
    data: prompts.Config = field(default_factory=lambda: prompts.Config(turns.SEEDS))  # what environments reset with
    sampling: Sampling = field(default_factory=lambda: Sampling(max_new_tokens=4))  # of one turn
    optimizer: AdamW = field(default_factory=lambda: AdamW(learning_rate=1e-4))  # of policy and critic
    run: runs.Options = field(default_factory=runs.Config)
    environment: str = "nim"  # nim, guess, or FILE.py:CLASS
    max_turns: int = 8  # a conversation that is not over then is truncated: V of what was said last goes on for it
    credit: Literal["turn", "bandit"] = "turn"  # bandit: the conversation is one action
    total_steps: int = 200  # iterations, each of one batch of conversations
    batch_size: int = 64  # conversations
    num_epochs: int = 2  # passes over them
    minibatches: int = 2  # gradient steps per pass
    micro_batch_tokens: int = 4096  # per forward pass, padding counted: memory, not mathematics
    gamma: float = 1.0  # discount per turn
    gae_lambda: float = 0.95  # per turn
    clip_low: float = 0.2
    clip_high: float = 0.2
    value_coef: float = 0.5  # c1, of the squared error without ½
    whiten_advantages: bool = True  # over the turns of a batch
    kl_coef: float = 0.0  # β, reward per nat
    sample_interval: int = 10  # iterations between two groups written to samples.jsonl

    def __post_init__(self) -> None:
        settings.within(self, 1, None, "max_turns", "total_steps", "batch_size", "num_epochs", "minibatches")
        settings.within(self, 1, None, "micro_batch_tokens", "sample_interval")
        settings.within(self, 0, 1, "gamma", "gae_lambda", "clip_low")
        settings.within(self, 0, None, "clip_high", "value_coef", "kl_coef")
        rollout.refuse_filters(self.sampling)
        if self.minibatches > self.batch_size:
            raise ValueError(f"minibatches is {self.minibatches}, allowed: at most batch_size {self.batch_size}")


class Estimates(NamedTuple):
    """What the objective needs of every token of the model's, [N, T]."""

    psi: Float[Tensor, "N T"]  # its turn's
    value_target: Float[Tensor, "N T"]
    begins: Bool[Tensor, "N T"]  # a turn, where the critic learns: before its first token
    logp_old: Float[Tensor, "N T"]
    kl: float  # KL[π_old || π_ref] of a conversation, nats, by k1


def credit(
    reward: Float[Tensor, "N K"], value: Float[Tensor, "N K"], beyond: Float[Tensor, " N"], data: Conversations,
    config: TurnPPO,
) -> tuple[Float[Tensor, "N K"], Float[Tensor, "N K"]]:  # fmt: skip
    """Ψ of every turn and the critic's target at its start; `beyond` is V of what a truncated one ended with.

    turn: Ψ_k = δ_k + γλ Ψ_{k+1}, δ_k = r_k + γ V(s_{k+1}) - V(s_k), target Ψ_k + V(s_k); Schulman et al. 2016 eq 16.
    bandit: Ψ_k = R - V(s_0) and target R, the return from s_0.
    """
    following = torch.cat([value[:, 1:], torch.zeros_like(value[:, :1])], 1)
    following = torch.where(data.truncated, beyond.unsqueeze(1), following)
    lam = config.gae_lambda if config.credit == "turn" else 1.0
    discounts, traces = returns.boundaries(data.terminated, data.truncated, config.gamma, lam, value.dtype)
    if config.credit == "bandit":
        total = returns.return_to_go(reward, following, discounts, traces)[:, :1]
        return (total - value[:, :1]).expand_as(value), total.expand_as(value)
    psi = advantages.gae(reward, value, following, discounts, traces)
    return psi, psi + value


def estimate(data: Conversations, model: Model, critic: Scorer, reference: Any, config: TurnPPO) -> Estimates:
    """Ψ and the critic's target, turn by turn, at the turns' tokens."""
    tokens, temperature = config.micro_batch_tokens, config.sampling.temperature
    logp_old = turns.log_probs(model.network, data, model, temperature, tokens)
    value = turns.per_token(lambda batch: states(critic, batch), data, model, tokens).gather(1, data.first)
    after = lambda batch: critic.last(batch).unsqueeze(1).expand(batch.ids.shape)  # noqa: E731
    beyond = turns.per_token(after, data, model, tokens)[:, 0] if bool(data.truncated.any()) else value[:, 0] * 0
    kl = torch.zeros_like(logp_old)
    if config.kl_coef:
        with models.frozen(reference, model.network) as network:
            kl = logp_old - turns.log_probs(network, data, model, temperature, tokens)
    turn = data.turn.clamp(min=0)
    reward = data.reward.to(value) - config.kl_coef * torch.zeros_like(value).scatter_add(1, turn, kl.to(value))
    psi, target = credit(reward, value, beyond, data, config)
    if config.whiten_advantages and int(data.valid.sum()) > 1:
        psi = advantages.whiten(psi, data.valid)
    begins = torch.zeros_like(data.response).scatter(1, data.first, True)
    if config.credit == "bandit":
        begins = begins & (data.turn == 0)
    psi, target = (each.gather(1, turn) * data.response for each in (psi, target))
    return Estimates(psi, target, begins, logp_old, float(kl.sum(1).mean()))


class Whole(NamedTuple):
    """Of the whole gradient step, so that micro-batches add up: tokens, and turns that the critic learns from."""

    tokens: int
    turns: int


def objective(
    trained: nn.ModuleDict, batch: Batch, given: Estimates, whole: Whole, config: TurnPPO
) -> tuple[Tensor, Tensor]:
    """This micro-batch's share of the scalar to maximise; and log π of its tokens, detached."""
    logp = models.log_probs(trained["policy"], batch.sequences, config.sampling.temperature)
    value = states(trained["critic"], batch.sequences)  # type: ignore[arg-type]
    old, psi = batch.place(given.logp_old).to(logp.dtype), batch.place(given.psi).to(logp.dtype)
    each = surrogates.clipped_ratio(logp, old, psi, config.clip_low, config.clip_high)
    error = values.squared_error(value, batch.place(given.value_target).to(value.dtype))
    total = reductions.token_mean(each, batch.sequences.response, whole.tokens)
    critic = reductions.token_mean(error, batch.place(given.begins), whole.turns)
    return total - config.value_coef * critic, logp.detach()


def update(state: State, model: Model, data: Conversations, given: Estimates, config: TurnPPO) -> dict[str, float]:
    """Epochs of gradient steps over the conversations, in a new order each; the numbers of the last."""
    trained: Any = state.trained
    count, numbers, mismatch = len(data.turns), {}, None
    for epoch in range(config.num_epochs):
        order = torch.randperm(count, generator=generator(config.run.seed, "shuffle", state.iteration, epoch))
        for part in order.tensor_split(config.minibatches):
            index, distances = part.tolist(), [0.0]
            whole = Whole(int(data.response[index].sum()), int(given.begins[index].sum()))

            def share(batch: Batch, whole: Whole = whole, far: list = distances) -> Tensor:
                value, logp = objective(trained, batch, given, whole, config)
                behaved = batch.place(data.logp_behavior).to(logp.dtype)
                far.append(float((logp - behaved)[batch.sequences.response].abs().max()))
                return value

            parts = turns.batches(data, index, model, config.micro_batch_tokens)
            numbers = learner.ascend(state, config, [functools.partial(share, batch) for batch in parts])
            mismatch = max(distances) if mismatch is None else mismatch
    return numbers | {"mismatch": mismatch or 0.0}


def train(config: TurnPPO, session: Run | None = None) -> Model:
    """Train and return the model.

    Args:
        config: all settings.
        session: the run to write to or to go on with; by default `config.run`'s.
    """
    make = turns.resolve(config.environment)
    with session or Run("turn-ppo", config, config.total_steps) as session:
        model, seed = models.load(config.model, config.run.seed), config.run.seed
        rows, reference = turns.openings(config.data, seed), models.reference(model) if config.kl_coef else None
        critic, _ = models.scorer(config.model, seed, 0.0)
        trained = nn.ModuleDict({"policy": model.network, "critic": critic})
        state, numbers = learner.begin(trained, config, session), {}
        while state.iteration < config.total_steps:
            # 1. collect: conversations, to their ends
            began = time.perf_counter()
            chosen = [rows[i] for i in learner.rows_of(state.iteration, config.batch_size, len(rows), seed)]
            random = functools.partial(generator, seed, "sample", state.iteration)
            data = turns.play(model, make, chosen, config.sampling, config.max_turns, random)
            played = time.perf_counter()

            # 2. estimate Ψ and the critic's target, turn by turn
            given = estimate(data, model, critic, reference, config)
            estimated = time.perf_counter()

            # 3. objective and 4. update: a few epochs
            numbers = update(state, model, data, given, config)

            ended = time.perf_counter()
            if state.iteration % config.sample_interval == 0:
                few = turns.stack(data.rows[:4], data.openings[:4], data.turns[:4])
                after = turns.log_probs(
                    model.network, few, model, config.sampling.temperature, config.micro_batch_tokens
                )
                turns.write_samples(session, model, few, given.psi, after, state.iteration, len(few.turns))
            spent = {"play": played - began, "estimate": estimated - played, "update": ended - estimated}
            numbers |= turns.summary(data) | rollout.shares(spent) | {"kl": given.kl}
            state = state._replace(iteration=state.iteration + 1)
            learner.report(session, state, config, numbers)
        learner.finish(session, state, model.network, model.tokenizer, numbers)
        return model
