"""PPO for language models, RLHF's third step (Ziegler et al. 2019; Ouyang et al. 2022, arXiv:2203.02155; S4 3.2-3.5).

Psi         GAE(γ, λ) over the tokens of a completion, whitened                              core/advantages.py
reward      of a token: - β log(π_old/π_ref), and at the last one besides the completion's reward, S4 3.5.1
surrogate   min(ρ Ψ, clip(ρ) Ψ), ρ = π_θ/π_old of a token, S4 eq 3.9                         core/surrogates.py
constraint  the clip; β KL[π_θ || π_ref] in the reward, β fixed or following a KL target     core/trust_region.py
data        completions by the current policy, used for a few epochs; PPO-ptx adds pretraining text, S4 3.3.2
maximised   surrogate - c1 (V - target)² + ptx log π(pretraining) + nll log π(successes), means over tokens

The log-probabilities in the reward are the sampler's, detached; S4 3.2 has the live policy inside the reward. Here the
Bellman equation is: V(s_t) = r_t + γ V(s_{t+1}), s_t the prompt and the tokens so far; GRPO does without it. VAPO
and Open-Reasoner-Zero are rows of choices in presets.py.
"""

import functools
import time
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from upslope.core import advantages, reductions, returns, surrogates, trust_region, values
from upslope.language import learner, models, prompts, rollout, sft
from upslope.language.batching import Sequences
from upslope.language.generation import Sampling
from upslope.language.learner import AdamW, State
from upslope.language.models import Model, Scorer
from upslope.language.rollout import Batch, Rollout, Source
from upslope.runs import run as runs
from upslope.runs import settings
from upslope.runs.randomness import generator
from upslope.runs.run import Run


@dataclass(frozen=True)
class PPO:
    """What is PPO's own; model, data, sampling, optimizer and run are nested."""

    model: models.Config = field(default_factory=models.Config)
    data: prompts.Config = field(default_factory=prompts.Config)  # rows with `prompt`, and what the reward asks for
    sampling: Sampling = field(default_factory=Sampling)
    optimizer: AdamW = field(default_factory=lambda: AdamW(learning_rate=1e-4))  # of policy and critic
    run: runs.Options = field(default_factory=runs.Config)
    reward: str = "task"  # task, FILE.py:FUNCTION, or a reward model's run
    critic: str | None = None  # a reward model's run that the critic starts from; None: the model, its head at 0
    total_steps: int = 200  # iterations, each of one generation batch
    batch_size: int = 64  # prompts per generation batch
    group_size: int = 1  # completions of each
    num_epochs: int = 2  # passes over a generation batch
    minibatches: int = 2  # gradient steps per pass
    micro_batch_tokens: int = 4096  # per forward pass, padding counted: memory, not mathematics
    gamma: float = 1.0  # discount per token
    gae_lambda: float = 0.95
    length_adaptive: float = 0.0  # α of λ = 1 - 1/(α |o|) (VAPO); 0: λ is gae_lambda
    critic_lambda: float | None = None  # λ of the critic's target (VAPO: 1); None: that of Ψ
    critic_warmup: int = 0  # iterations in which the critic alone learns (VAPO)
    clip_low: float = 0.2
    clip_high: float = 0.2
    clip_value: float | None = 0.2  # of the value's move from its old one, in reward units; None: not clipped
    value_coef: float = 0.5  # c1, of the squared error without ½
    whiten_advantages: bool = True  # over the tokens of a generation batch
    entropy_coef: float = 0.0  # c2, Ψ per nat of the entropy of a token's distribution (S4 eq 2.18)
    kl_coef: float = 0.05  # β, reward per nat; the first one where kl_target is set
    kl_target: float | None = None  # nats per completion that β follows (Ziegler); None: β is fixed
    kl_horizon: float = 1000.0  # completions over which it follows
    ptx_coef: float = 0.0  # of log π on pretraining text (PPO-ptx)
    ptx: prompts.Config = field(default_factory=prompts.Config)  # that text: rows with `prompt` and `completion`
    nll_coef: float = 0.0  # of log π on completions with a reward above 0 (VAPO: 0.1)
    truncated: Literal["terminate", "mask", "bootstrap"] = "terminate"  # what a cut at the length limit is
    sample_interval: int = 10  # iterations between two groups written to samples.jsonl

    def __post_init__(self) -> None:
        settings.within(self, 1, None, "total_steps", "batch_size", "group_size", "num_epochs", "minibatches")
        settings.within(self, 1, None, "micro_batch_tokens", "sample_interval")
        settings.within(self, 0, 1, "gamma", "gae_lambda", "critic_lambda", "clip_low")
        settings.within(self, 0, None, "clip_high", "value_coef", "kl_coef", "ptx_coef", "nll_coef", "critic_warmup")
        settings.within(self, 0, None, "length_adaptive", "entropy_coef")
        settings.positive(self, "clip_value", "kl_target", "kl_horizon")
        rollout.refuse_filters(self.sampling)
        if self.kl_target is not None and not self.kl_coef:
            raise ValueError(f"kl_coef is {self.kl_coef}, allowed with kl_target: above 0, it is multiplied")
        if self.minibatches > self.batch_size * self.group_size:
            raise ValueError(
                f"minibatches is {self.minibatches}, allowed: at most {self.batch_size * self.group_size} completions"
            )


class Estimates(NamedTuple):
    """What the objective needs of every token, [N, T]."""

    psi: Float[Tensor, "N T"]
    value_target: Float[Tensor, "N T"]
    value_old: Float[Tensor, "N T"]
    logp_old: Float[Tensor, "N T"]
    counted: Tensor  # tokens that are learned from
    success: Tensor  # tokens of completions with a reward above 0
    kl: float  # KL[π_old || π_ref] of a completion, nats, by k1


def states(critic: Scorer, sequences: Sequences) -> Float[Tensor, "B L"]:
    """V of what stood before each token; the first position has nothing before it and gets 0."""
    value = critic(sequences)
    return torch.cat([torch.zeros_like(value[:, :1]), value[:, :-1]], 1)


def estimate(data: Rollout, origin: Source, critic: Scorer, reference: Any, beta: float, config: PPO) -> Estimates:
    """Ψ and the critic's target of every token: GAE over rewards that hold the KL at every token."""
    model, lengths = origin.model, torch.tensor(data.lengths)
    logp_old = rollout.log_probs(model.network, data, model, config)
    value = rollout.per_token(lambda batch: states(critic, batch), data, model, config)
    after = value[:, :1]  # of the state beyond the last token: asked for where a cut is bootstrapped
    if config.truncated == "bootstrap":
        beyond = lambda batch: critic.last(batch).unsqueeze(1).expand(batch.ids.shape)  # noqa: E731
        after = rollout.per_token(beyond, data, model, config)[:, :1]
    kl = torch.zeros_like(logp_old)
    if beta:
        with models.frozen(reference, model.network) as network:
            kl = logp_old - rollout.log_probs(network, data, model, config)
    last = torch.arange(value.shape[1]) == (lengths - 1).unsqueeze(1)
    cut = last & ~data.finished.unsqueeze(1) & (config.truncated == "bootstrap")
    reward = -beta * kl + data.reward.to(value).unsqueeze(1) * last
    following = torch.where(last, after, torch.cat([value[:, 1:], torch.zeros_like(value[:, :1])], 1))
    ended = (last & ~cut) | ~data.response  # beyond the end nothing counts

    def gae(lam: float | Tensor) -> Tensor:
        discounts, traces = returns.boundaries(ended, cut, config.gamma, lam, value.dtype)
        return advantages.gae(reward, value, following, discounts, traces)

    adaptive = (1 - 1 / (config.length_adaptive * lengths.to(value)).clamp(min=1)).unsqueeze(1)
    psi = gae(adaptive.expand_as(value) if config.length_adaptive else config.gae_lambda)
    target = value + (psi if config.critic_lambda is None else gae(config.critic_lambda))
    counted = data.response
    if config.truncated == "mask":
        counted = counted & data.finished.unsqueeze(1)
    if config.whiten_advantages and int(counted.sum()) > 1:
        psi = advantages.whiten(psi, counted)
    # ∇ of an entropy is E[- log π ∇ log π]: the sampled token's - log π estimates it without a pass over the vocabulary
    psi = psi - config.entropy_coef * logp_old * data.response
    success = data.response & (data.reward > 0).unsqueeze(1)
    return Estimates(psi, target, value, logp_old, counted, success, float(kl.sum(1).mean()))


def objective(
    trained: nn.ModuleDict,
    batch: Batch,
    given: Estimates,
    tokens: int,
    successes: int,
    config: PPO,
    policy: bool = True,
) -> tuple[Tensor, Tensor]:
    """This micro-batch's share of the scalar to maximise, the counts being the whole step's; and log π, detached."""
    value = states(trained["critic"], batch.sequences)  # type: ignore[arg-type]
    place = lambda x: batch.place(x).to(value.dtype)  # noqa: E731
    counted, target = batch.place(given.counted), place(given.value_target)
    if config.clip_value is None:
        error = values.squared_error(value, target)
    else:
        error = values.clipped_squared_error(value, place(given.value_old), target, config.clip_value)
    total = -config.value_coef * reductions.token_mean(error, counted, tokens)
    if not policy:
        return total, batch.place(given.logp_old)
    logp = models.log_probs(trained["policy"], batch.sequences, rollout.temperature(config))
    old, psi = batch.place(given.logp_old).to(logp.dtype), batch.place(given.psi).to(logp.dtype)
    each = surrogates.clipped_ratio(logp, old, psi, config.clip_low, config.clip_high)
    total = total + reductions.token_mean(each, counted, tokens)
    if config.nll_coef:
        likely = surrogates.log_prob(logp, torch.ones_like(logp))
        total = total + config.nll_coef * reductions.token_mean(likely, batch.place(given.success), max(1, successes))
    return total, logp.detach()


def pretraining(
    trained: nn.ModuleDict, origin: Source, text: tuple[list, list], chosen: list[int], config: PPO
) -> list[Any]:
    """PPO-ptx: micro-batches' shares of ptx_coef times the mean log π of the completion tokens of these rows."""
    lengths = sum(len(text[1][i]) for i in chosen)
    flat = sft.SFT(micro_batch_tokens=config.micro_batch_tokens)
    parts, _ = sft.batches(origin.model, [text[0][i] for i in chosen], [text[1][i] for i in chosen], flat)
    return [lambda part=part: config.ptx_coef * sft.objective(trained["policy"], part, lengths) for part in parts]


def update(
    state: State, origin: Source, data: Rollout, given: Estimates, config: PPO, text: tuple[list, list] | None = None
) -> dict[str, float]:
    """Epochs of gradient steps over the completions, in a new order each; the numbers of the last."""
    trained: Any = state.trained
    count, numbers, mismatch = len(data.completions), {}, None
    policy = state.iteration >= config.critic_warmup
    for epoch in range(config.num_epochs):
        order = torch.randperm(count, generator=generator(config.run.seed, "shuffle", state.iteration, epoch))
        for step, part in enumerate(order.tensor_split(config.minibatches)):
            index, distances = part.tolist(), [0.0]
            tokens = max(1, int(given.counted[index].sum()))
            successes = int(given.success[index].sum())

            def share(batch: Batch, tokens: int = tokens, successes: int = successes, far: list = distances) -> Tensor:
                value, logp = objective(trained, batch, given, tokens, successes, config, policy)
                behaved = batch.place(data.logp_behavior).to(logp.dtype)
                far.append(float((logp - behaved)[batch.sequences.response].abs().max()))
                return value

            parts = rollout.batches(data, index, origin.model, config.micro_batch_tokens)
            shares = [functools.partial(share, batch) for batch in parts]
            if text is not None and policy:
                place = (state.iteration * config.num_epochs + epoch) * config.minibatches + step
                rows = learner.rows_of(place, len(index), len(text[0]), config.run.seed, "pretraining")
                shares += pretraining(trained, origin, text, rows, config)
            numbers = learner.ascend(state, config, shares)
            mismatch = max(distances) if mismatch is None else mismatch
    return numbers | {"mismatch": mismatch or 0.0}


def train(config: PPO, session: Run | None = None) -> Model:
    """Train and return the model.

    Args:
        config: all settings.
        session: the run to write to or to go on with; by default `config.run`'s.
    """
    with session or Run("lm-ppo", config, config.total_steps) as session:
        model = models.load(config.model, config.run.seed)
        origin, reference = rollout.source(config, model), models.reference(model) if config.kl_coef else None
        start = config.model if config.critic is None else models.Config(config.critic, config.model.dtype)
        critic, _ = models.scorer(start, config.run.seed, 0.0)
        text = None
        if config.ptx_coef:
            rows = prompts.read(config.ptx, "prompt", "completion", seed=config.run.seed)
            text = prompts.encode_all(model, rows, "completion")
        trained = nn.ModuleDict({"policy": model.network, "critic": critic})
        state, numbers = learner.begin(trained, config, session), {}
        while state.iteration < config.total_steps:
            # 1. collect: completions of some prompts, judged
            data = rollout.collect(origin, config, state.iteration, config.batch_size)

            # 2. estimate Ψ and the critic's target, token by token
            began, beta = time.perf_counter(), state.remembered.get("kl_coef", config.kl_coef)
            given = estimate(data, origin, critic, reference, beta, config)
            estimated = time.perf_counter()

            # 3. objective and 4. update: a few epochs
            numbers = update(state, origin, data, given, config, text)

            spent = data.seconds | {"estimate": estimated - began, "update": time.perf_counter() - estimated}
            rollout.write_samples(session, origin, data, given.psi, state.iteration, config)
            numbers |= rollout.summary(data) | rollout.shares(spent) | {"kl": given.kl, "kl_coef": beta}
            if config.kl_target is not None:
                control = trust_region.ProportionalKL(beta, config.kl_target, config.kl_horizon)
                beta = trust_region.adapt_proportionally(control, given.kl, len(data.completions)).coef
            state = state._replace(iteration=state.iteration + 1, remembered={"kl_coef": beta})
            learner.report(session, state, config, numbers)
        learner.finish(session, state, model.network, model.tokenizer, numbers)
        return model
