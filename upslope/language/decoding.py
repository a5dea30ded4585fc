"""One more token a row: keys and values that are kept, and the network that reads them.

`Decoder` computes what Transformers' forward of a Llama-like network (llama.py) does, in fewer operations. Any other
network is `Forward`ed as it is.
"""

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, Self

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn
from torch.nn import functional

from upslope.language import llama
from upslope.language.batching import Sequences
from upslope.language.models import plain

Function = Callable[[Tensor], Tensor]


class Layer(NamedTuple):
    """The parts of one layer of a Llama-like network, as functions of the rows that go through it."""

    before: Function
    inward: Function  # heads of queries, of keys, of values
    q_norm: Function | None
    k_norm: Function | None
    o: Function
    after: Function
    gate_up: Function
    down: Function

    @classmethod
    def of(cls, layer: Any, copied: bool) -> Self:
        before, after, q_norm, k_norm, q, k, v, o, gate, up, down = llama.parts(layer)
        q_norm, k_norm = (None if norm is None else _normaliser(norm) for norm in (q_norm, k_norm))
        return cls(
            _normaliser(before), _product(copied, q, k, v), q_norm, k_norm, _product(copied, o),
            _normaliser(after), _product(copied, gate, up), _product(copied, down),
        )  # fmt: skip


class Forward:
    """N rows through the network's own forward.

    Args:
        network: any causal language model whose forward takes a cache.
        rows: the prompts, padded on the left.
        group: rows of each prompt, which is read once.
        most: tokens that may come.
    """

    def __init__(self, network: Any, rows: Sequences, group: int, most: int) -> None:
        self.network, self.filled = network, rows.ids.shape[1]
        self.cache, padded = _cache(network, self.filled + most), not bool(rows.attention.all())
        logits = self._forward(rows.ids, rows.attention if padded else None, rows.positions)
        self.logits = logits.repeat_interleave(group, 0)  # of each row's first new token
        if group > 1:
            self.cache.batch_repeat_interleave(group)
        attention = rows.attention.repeat_interleave(group, 0)
        self.attention = torch.cat([attention, attention.new_ones(len(attention), most)], 1) if padded else None

    def select(self, keep: Int64[Tensor, " n"]) -> None:
        """Go on with these rows only."""
        self.cache.batch_select_indices(keep)
        self.attention = None if self.attention is None else self.attention[keep]

    def step(self, token: Int64[Tensor, " N"], position: Int64[Tensor, " N"]) -> Float[Tensor, "N V"]:
        """Logits of the token after this one."""
        self.filled += 1
        seen = None if self.attention is None else self.attention[:, : self.filled]
        return self._forward(token.unsqueeze(1), seen, position.unsqueeze(1))

    def _forward(self, ids: Tensor, attention: Tensor | None, positions: Tensor) -> Float[Tensor, "N V"]:
        takes = inspect.signature(plain(self.network).forward).parameters
        name = "cache" if "cache" in takes else "past_key_values"
        out = self.network(
            input_ids=ids, attention_mask=attention, position_ids=positions, use_cache=True, logits_to_keep=1,
            **{name: self.cache},
        )  # fmt: skip
        return out.logits[:, -1]


class Decoder:
    """N rows through a Llama-like network; as `Forward`, which reads the prompts.

    Keys and values lie in one [layers, 2, N, heads, length, D] block; queries that share a head go together. Matrices
    that read the same rows are one, in the layout that is fastest for few rows, where a copy of them is small.
    """

    def __init__(self, network: Any, rows: Sequences, group: int, most: int) -> None:
        read = Forward(network, rows, 1, 0)
        self.logits, self.filled, self.model = read.logits.repeat_interleave(group, 0), read.filled, network.model
        copied = llama.small(network)
        self.layers = [Layer.of(layer, copied) for layer in self.model.layers]
        self.norm, self.head = _normaliser(self.model.norm), _product(copied, network.get_output_embeddings())
        count, self.heads, _, self.width = read.cache.layers[0].keys.shape
        attention = rows.attention.repeat_interleave(group, 0)
        further = attention.new_ones(len(attention), most)
        self.attention = None if read.attention is None else torch.cat([attention, further], 1)
        self.turns = llama.turns(self.model, self.filled + most, read.cache.layers[0].keys)
        self.none = self.turns.new_zeros(1, 1, 1)
        block = self.turns.new_empty(len(self.layers), 2, count, group, self.heads, self.filled + most, self.width)
        for own, layer in zip(block, read.cache.layers, strict=True):
            own[0, ..., : self.filled, :], own[1, ..., : self.filled, :] = layer.keys[:, None], layer.values[:, None]
        self.block = block.flatten(2, 3)

    def select(self, keep: Int64[Tensor, " n"]) -> None:
        """Go on with these rows only."""
        self.block = self.block.index_select(2, keep)
        self.attention = None if self.attention is None else self.attention[keep]

    def step(self, token: Int64[Tensor, " N"], position: Int64[Tensor, " N"]) -> Float[Tensor, "N V"]:
        """Logits of the token after this one."""
        x = self.model.embed_tokens(token)
        turn, h = self.turns.index_select(1, position), self.heads
        self.filled += 1
        hidden = None if self.attention is None else ~self.attention[:, None, None, : self.filled]
        for layer, block in zip(self.layers, self.block, strict=True):
            y = layer.inward(layer.before(x)).view(len(x), -1, self.width)
            q, k, turned = y[:, : -2 * h], y[:, -2 * h : -h], y[:, :-h]
            if layer.q_norm is not None and layer.k_norm is not None:
                q.copy_(layer.q_norm(q))
                k.copy_(layer.k_norm(k))
            rolled = turned.roll(self.width // 2, -1)
            turned.mul_(turn[0]).addcmul_(rolled, turn[1])
            block[:, :, :, self.filled - 1] = y[:, -2 * h :].view(len(x), 2, h, self.width).transpose(0, 1)
            x = x + layer.o(self._attend(q, block.flatten(1, 2)[:, :, : self.filled], hidden))
            gate, up = layer.gate_up(layer.after(x)).chunk(2, -1)
            x = x + layer.down(functional.silu(gate).mul_(up))
        return self.head(self.norm(x))

    def _attend(
        self, q: Float[Tensor, "N H D"], block: Float[Tensor, "2 Nh L D"], hidden: Bool[Tensor, "N 1 1 L"] | None
    ) -> Float[Tensor, "N HD"]:
        queries, scale = q.reshape(block.shape[1], -1, self.width), self.width**-0.5
        score = torch.baddbmm(self.none, queries, block[0].transpose(1, 2), beta=0, alpha=scale)
        if hidden is not None:
            score.view(len(q), self.heads, -1, self.filled).masked_fill_(hidden, float("-inf"))
        return torch.bmm(score.softmax(-1), block[1]).view(len(q), -1)


def start(network: Any, rows: Sequences, group: int, most: int) -> Forward | Decoder:
    """Read the prompts; what goes on from there, fastest where it can be."""
    return (Decoder if like_llama(network) else Forward)(network, rows, group, most)


def stateful(network: Any) -> bool:
    """Whether it keeps another kind of memory than keys and values, as Mamba does: rows cannot be taken out of it."""
    return bool(getattr(plain(network), "_is_stateful", False))


def like_llama(network: Any) -> bool:
    """Whether `Decoder` computes what this network does."""
    return plain(network) is network and llama.alike(network)


def _product(copied: bool, *layers: nn.Linear) -> Function:
    """x ↦ x Wᵀ + b of all these layers, side by side."""
    if not copied:
        each = [partial(functional.linear, weight=layer.weight, bias=layer.bias) for layer in layers]
        return each[0] if len(each) == 1 else lambda x: torch.cat([linear(x) for linear in each], -1)
    weight = torch.cat([layer.weight for layer in layers]).T.contiguous()
    if layers[0].bias is None:
        return partial(torch.mm, mat2=weight)
    bias = torch.cat([layer.bias for layer in layers])
    return lambda x: torch.addmm(bias, x, weight)


def _normaliser(norm: Any) -> Function:
    """x ↦ x/√(mean x² + ε) w; in other types than float32 Transformers' rounds on its way."""
    if norm.weight.dtype is not torch.float32 or not hasattr(norm, "variance_epsilon"):
        return norm
    small, share = norm.weight.new_tensor(norm.variance_epsilon), 1 / len(norm.weight)

    def normalise(x: Tensor) -> Tensor:
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        return (x * torch.addcmul(small, length, length, value=share).rsqrt_()).mul_(norm.weight)

    return normalise


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

    cache = DynamicCache(config=plain(network).config)
    cache.layers = [Block() if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache
