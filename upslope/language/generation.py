"""Sampling completions: token-in, token-out, from the Hugging Face weights that are trained.

A prompt is read once for all completions of its group; keys and values lie in one preallocated block; finished rows
leave the batch. Each row has uniform numbers of its own, so what it samples does not depend on which others are alive.
`logp_behavior` is log π of the tempered distribution that was sampled from, before top-k, top-p or min-p cut it.
"""

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from upslope.language.batching import pad
from upslope.language.models import Model, log_probs
from upslope.runs import settings


@dataclass(frozen=True)
class Sampling:
    """How a token is drawn."""

    max_new_tokens: int = 32
    temperature: float = 1.0  # divides the logits; 0: the likeliest token
    top_k: int = 0  # only the k likeliest; 0: all
    top_p: float = 1.0  # only the likeliest that together have this probability
    min_p: float = 0.0  # only those with this share of the likeliest one's probability

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


@torch.no_grad()
def generate(
    model: Model, prompts: Sequence[Sequence[int]], group: int, sampling: Sampling, generator: torch.Generator
) -> Completions:
    """`group` completions of every prompt.

    Args:
        model: in evaluation mode.
        prompts: tokens of each.
        group: completions a prompt.
        sampling: how a token is drawn.
        generator: of the uniform numbers, one a row and step, all drawn at once.
    """
    network, device, count = model.network, model.device, len(prompts) * group
    rows = pad(prompts, [[]] * len(prompts), model.pad, left=True).to(device)
    length, most = rows.ids.shape[1], sampling.max_new_tokens
    uniform = torch.rand(count, most, generator=generator, dtype=torch.float64).to(device)
    cache = _cache(network, length + most)
    padded = not bool(rows.attention.all())
    ids = torch.full((count, most), model.pad, device=device)
    logp, taken = torch.zeros(count, most, device=device), torch.zeros(count, dtype=torch.int64, device=device)
    alive = torch.arange(count, device=device)
    every = rows.attention.repeat_interleave(group, 0)
    attention = torch.cat([every, every.new_ones(count, most)], 1) if padded else None
    position = rows.positions[:, -1].repeat_interleave(group)
    logits = _forward(network, cache, rows.ids, rows.attention if padded else None, rows.positions)
    logits = logits.repeat_interleave(group, 0)
    _repeat(cache, group)
    for t in range(most):
        token, chosen = draw(logits, uniform[alive, t], sampling)
        ids[alive, t], logp[alive, t] = token, chosen.to(logp.dtype)
        taken[alive] += 1
        keep = (token != model.eos).nonzero().squeeze(1)
        if len(keep) == 0 or t + 1 == most:
            break
        if len(keep) < len(alive):
            alive, token, position = alive[keep], token[keep], position[keep]
            cache.batch_select_indices(keep)
            attention = None if attention is None else attention[keep]
        position = position + 1
        seen = None if attention is None else attention[:, : length + t + 1]
        logits = _forward(network, cache, token.unsqueeze(1), seen, position.unsqueeze(1))
    response = torch.arange(most, device=device) < taken.unsqueeze(1)
    last = ids.gather(1, (taken - 1).unsqueeze(1)).squeeze(1)
    width = int(taken.max())
    return Completions(ids[:, :width], response[:, :width], last == model.eos, logp[:, :width])


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
    logp = (wide / sampling.temperature).log_softmax(-1)
    kept = filtered(logp, sampling) if sampling.filters else logp
    cumulative = kept.exp().double().cumsum(-1)
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


def _forward(
    network: Any, cache: Any, ids: Tensor, attention: Tensor | None, positions: Tensor
) -> Float[Tensor, "N V"]:
    """Logits of the token after the last one."""
    given = {_cache_name(network): cache}
    out = network(
        input_ids=ids, attention_mask=attention, position_ids=positions, use_cache=True, logits_to_keep=1, **given
    )  # fmt: skip
    return out.logits[:, -1]


def _cache_name(network: Any) -> str:
    plain = network.get_base_model() if hasattr(network, "get_base_model") else network
    return "cache" if "cache" in inspect.signature(plain.forward).parameters else "past_key_values"


def _cache(network: Any, length: int) -> Any:
    """Transformers' cache, its full-attention layers in blocks that are allocated once."""
    from transformers import DynamicCache
    from transformers.cache_utils import DynamicLayer

    class Block(DynamicLayer):
        """Keys and values in one preallocated block; what was written is a view of it."""

        def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
            if not self.is_initialized:
                self.lazy_initialization(key_states, value_states)
                self.filled, self.blocks = 0, (key_states, value_states)
            if not self.filled or self.blocks[0].shape[0] != key_states.shape[0]:  # new, or other rows
                shape = (*key_states.shape[:2], length, key_states.shape[3])
                self.blocks = key_states.new_empty(shape), value_states.new_empty(shape)
                if self.filled:
                    for block, old in zip(self.blocks, (self.keys, self.values), strict=True):
                        block[:, :, : self.filled] = old  # type: ignore[assignment]
            after = self.filled + key_states.shape[2]
            for block, new in zip(self.blocks, (key_states, value_states), strict=True):
                block[:, :, self.filled : after] = new
            self.filled = after
            self.keys, self.values = (block[:, :, :after] for block in self.blocks)
            return self.keys, self.values

    plain = network.get_base_model() if hasattr(network, "get_base_model") else network
    cache = DynamicCache(config=plain.config)
    cache.layers = [Block() if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache


def _repeat(cache: Any, group: int) -> None:
    if group > 1:
        cache.batch_repeat_interleave(group)
