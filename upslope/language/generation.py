"""Sampling completions: token-in, token-out, from the Hugging Face weights that are trained.

A prompt is read once for all completions of its group; keys and values lie in one preallocated block; finished rows
leave the batch. Each row has uniform numbers of its own, so what it samples does not depend on which others are alive.
`logp_behavior` is log π of the tempered distribution that was sampled from, before top-k, top-p or min-p cut it.
A server may sample instead (server.py): it gives the same tokens, and the log-probabilities that it says.
"""

import itertools
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from upslope.language import decoding, server
from upslope.language.batching import pad
from upslope.language.models import Model, log_probs
from upslope.runs import settings

LEAVE = 0.9  # finished rows leave when no more than this share of the batch goes on: to copy the others has its price


@dataclass(frozen=True)
class Sampling:
    """How a token is drawn."""

    max_new_tokens: int = 32
    temperature: float = 1.0  # divides the logits; 0: the likeliest token
    top_k: int = 0  # only the k likeliest; 0: all
    top_p: float = 1.0  # only the likeliest that together have this probability
    min_p: float = 0.0  # only those with this share of the likeliest one's probability
    engine: server.Engine = field(default_factory=server.Engine)  # a server that samples instead of the model

    def __post_init__(self) -> None:
        settings.within(self, 1, None, "max_new_tokens")
        settings.within(self, 0, None, "temperature", "top_k")
        settings.within(self, 0, 1, "top_p", "min_p")

    @property
    def filters(self) -> bool:
        """Whether some tokens cannot be drawn."""
        return bool(self.top_k or self.top_p < 1 or self.min_p)


class Completions(NamedTuple):
    """What was sampled, a row a completion, the G of a prompt one after the other."""

    ids: Int64[Tensor, "N T"]  # padded on the right
    response: Bool[Tensor, "N T"]  # a token, the end of sequence included
    finished: Bool[Tensor, " N"]  # ended by itself; False: cut at the limit
    logp_behavior: Float[Tensor, "N T"]  # 0 where there is no token

    def tokens(self) -> list[list[int]]:
        """Each completion's tokens."""
        return [row[: int(count)].tolist() for row, count in zip(self.ids, self.response.sum(1), strict=True)]


def generate(
    model: Model, prompts: Sequence[Sequence[int]], group: int, sampling: Sampling, generator: torch.Generator
) -> Completions:
    """`group` completions of every prompt.

    Args:
        model: in evaluation mode.
        prompts: tokens of each.
        group: completions a prompt.
        sampling: how a token is drawn, and whether by a server.
        generator: of the uniform numbers, one a row and step, all drawn at once.
    """
    if sampling.engine.url is not None:
        return _by_engine(model, prompts, group, sampling, generator)
    with torch.inference_mode():  # a tenth faster than without gradients
        by = _by_transformers if decoding.stateful(model.network) else _by_token
        done = by(model, prompts, group, sampling, generator)
    return Completions(*(part.clone() for part in done))  # of tensors that may be learned from


def _by_token(
    model: Model, prompts: Sequence[Sequence[int]], group: int, sampling: Sampling, generator: torch.Generator
) -> Completions:
    device, count, most = model.device, len(prompts) * group, sampling.max_new_tokens
    rows = pad(prompts, [[]] * len(prompts), model.pad, left=True).to(device)
    uniform = torch.rand(count, most, generator=generator, dtype=torch.float64).to(device).T.contiguous()
    ids, logp = torch.zeros(most, count, dtype=torch.int64, device=device), torch.zeros(most, count, device=device)
    response = torch.zeros(most, count, dtype=torch.bool, device=device)
    place, open_ = torch.arange(count, device=device), torch.ones(count, dtype=torch.bool, device=device)
    position = rows.positions[:, -1].repeat_interleave(group)
    reader = decoding.start(model.network, rows, group, most)
    logits, still = reader.logits, uniform  # uniform numbers of the rows that are still there
    for t in range(most):
        token, chosen = draw(logits, still[t], sampling)
        for whole, part in ((ids, token), (logp, chosen.to(logp.dtype)), (response, open_)):
            whole[t].index_copy_(0, place, part)
        open_ = open_ & (token != model.eos)
        going = int(open_.sum())
        if going == 0 or t + 1 == most:
            break
        if going <= LEAVE * len(place):
            keep = open_.nonzero().squeeze(1)
            place, token, position, open_ = place[keep], token[keep], position[keep], open_[keep]
            still = uniform[:, place]
            reader.select(keep)
        position = position + 1
        logits = reader.step(token, position)
    response = response[: t + 1].T.contiguous()
    ids = ids[: t + 1].T.masked_fill(~response, model.pad)
    last = ids.gather(1, response.sum(1, keepdim=True) - 1).squeeze(1)
    return Completions(ids, response, last == model.eos, logp[: t + 1].T.masked_fill(~response, 0.0))


def _by_transformers(
    model: Model, prompts: Sequence[Sequence[int]], group: int, sampling: Sampling, generator: torch.Generator
) -> Completions:
    """By `model.generate`, prompts of the same length together: a state that went over padding would be another one."""
    kind = model.network.config.model_type
    warnings.warn(f"{kind} keeps a state instead of keys and values: sampled by model.generate", stacklevel=3)
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    found: dict[int, tuple[list[int], list[float]]] = {}
    how: dict[str, Any] = {"do_sample": sampling.temperature > 0, "max_new_tokens": sampling.max_new_tokens}
    if sampling.temperature > 0:
        how |= {"temperature": sampling.temperature, "top_k": sampling.top_k, "top_p": sampling.top_p}
        how |= {"min_p": sampling.min_p or None}
    for _, alike in itertools.groupby(order, lambda i: len(prompts[i])):
        places = [i * group + k for i in alike for k in range(group)]
        ids = torch.tensor([list(prompts[place // group]) for place in places], device=model.device)
        with torch.random.fork_rng(devices=[] if model.device.type == "cpu" else [model.device]):
            torch.manual_seed(int(torch.randint(2**62, (), generator=generator)))
            out = model.network.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), pad_token_id=model.pad, eos_token_id=model.eos,
                return_dict_in_generate=True, output_logits=True, **how,
            )  # fmt: skip
        chosen = out.sequences[:, ids.shape[1] :]
        logits = torch.stack(out.logits, 1) / (sampling.temperature or 1.0)
        logp = logits.log_softmax(-1).gather(-1, chosen.unsqueeze(-1)).squeeze(-1)
        for place, row, each in zip(places, chosen.tolist(), logp.tolist(), strict=True):
            end = row.index(model.eos) + 1 if model.eos in row else len(row)
            found[place] = row[:end], each[:end]
    return _padded(model, [found[place] for place in range(len(found))])


def _by_engine(
    model: Model, prompts: Sequence[Sequence[int]], group: int, sampling: Sampling, generator: torch.Generator
) -> Completions:
    how = {name: getattr(sampling, name) for name in ("max_new_tokens", "temperature", "top_p", "min_p")}
    how["top_k"] = sampling.top_k or -1
    return _padded(model, server.sample(sampling.engine, model, prompts, group, how, generator))


def _padded(model: Model, found: Sequence[server.Sampled]) -> Completions:
    """Rows of tokens and their log-probabilities as rectangles."""
    tokens, logps = zip(*found, strict=True)
    made = pad([[]] * len(tokens), tokens, model.pad)
    flat = torch.tensor(list(itertools.chain(*logps)))
    logp_behavior = torch.zeros(made.ids.shape).masked_scatter(made.response, flat)
    finished = torch.tensor([row[-1] == model.eos for row in tokens])
    parts = (made.ids, made.response, finished, logp_behavior)
    return Completions(*(part.to(model.device) for part in parts))


def draw(
    logits: Float[Tensor, "N V"], uniform: Float[Tensor, " N"], sampling: Sampling
) -> tuple[Int64[Tensor, " N"], Float[Tensor, " N"]]:
    """A token a row by the inverse of its distribution function, and its log-probability before any filter.

    >>> draw(torch.tensor([[0.0, 0.0]]), torch.tensor([0.6]), Sampling())[0]
    tensor([1])
    """
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if sampling.temperature == 0:
        token = wide.argmax(-1)
        return token, wide.log_softmax(-1).gather(-1, token.unsqueeze(-1)).squeeze(-1)
    logp = (wide if sampling.temperature == 1 else wide / sampling.temperature).log_softmax(-1)
    kept = filtered(logp, sampling) if sampling.filters else logp
    cumulative = kept.exp().cumsum(-1, dtype=torch.float64)
    share = uniform.unsqueeze(-1) * cumulative[:, -1:]
    token = torch.searchsorted(cumulative, share, right=True).squeeze(-1).clamp(max=logits.shape[-1] - 1)
    return token, logp.gather(-1, token.unsqueeze(-1)).squeeze(-1)


def filtered(logp: Float[Tensor, "N V"], sampling: Sampling) -> Float[Tensor, "N V"]:
    """-inf for what top-k, top-p or min-p leave out; the likeliest token always stays.

    >>> filtered(torch.tensor([[0.5, 0.3, 0.2]]).log(), Sampling(top_p=0.6)).exp()
    tensor([[0.5000, 0.3000, 0.0000]])
    """
    order = logp.argsort(stable=True, dim=-1, descending=True)
    best = logp.gather(-1, order)
    out = torch.zeros_like(best, dtype=torch.bool)
    if sampling.top_k:
        out[:, sampling.top_k :] = True
    if sampling.top_p < 1:
        before = best.exp().cumsum(-1) - best.exp()
        out |= before >= sampling.top_p
    if sampling.min_p:
        out |= best.exp() < sampling.min_p * best[:, :1].exp()
    out[:, 0] = False
    return logp.masked_fill(torch.zeros_like(out).scatter(-1, order, out), float("-inf"))


def mismatch(model: Model, prompts: Sequence[Sequence[int]], done: Completions, temperature: float) -> float:
    """max |log π of the trainer - log π of the sampler| over all tokens; above 1e-4 in float32 something is wrong."""
    completions = done.tokens()
    group = len(completions) // len(prompts)
    batch = pad([p for p in prompts for _ in range(group)], completions, model.pad).to(model.device)
    with torch.no_grad():
        ours = log_probs(model.network, batch, temperature)[batch.response]
    return float((ours - done.logp_behavior[done.response]).abs().max())
