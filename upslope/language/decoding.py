"""One more token a row: keys and values that are kept, and the network that reads them.

`Decoder` computes what Transformers' forward of a Llama-like network does, in fewer operations: Llama, Mistral, Qwen2
and Qwen3 without sliding windows, their linear layers plain. Any other network is `Forward`ed as it is.
"""

import inspect
from typing import Any, NamedTuple, Self

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn
from torch.nn import functional

from upslope.language.batching import Sequences
from upslope.language.models import plain

LIKE_LLAMA = ("llama", "mistral", "qwen2", "qwen3")
ROPES = ("default", "linear", "llama3", "yarn")  # rotary embeddings that depend on nothing but the position


class Layer(NamedTuple):
    """The parts of one layer of a Llama-like network."""

    before: nn.Module
    q: nn.Linear
    k: nn.Linear
    v: nn.Linear
    q_norm: nn.Module | None
    k_norm: nn.Module | None
    o: nn.Linear
    after: nn.Module
    gate: nn.Linear
    up: nn.Linear
    down: nn.Linear

    @classmethod
    def of(cls, layer: Any) -> Self:
        attention, mlp = layer.self_attn, layer.mlp
        q_norm, k_norm = (getattr(attention, name, None) for name in ("q_norm", "k_norm"))
        return cls(
            layer.input_layernorm, attention.q_proj, attention.k_proj, attention.v_proj, q_norm, k_norm,
            attention.o_proj, layer.post_attention_layernorm, mlp.gate_proj, mlp.up_proj, mlp.down_proj,
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

    Keys and values lie in [N · heads, length, D] blocks; queries that share a head go together.
    """

    def __init__(self, network: Any, rows: Sequences, group: int, most: int) -> None:
        read = Forward(network, rows, group, most)
        self.logits, self.attention, self.filled = read.logits, read.attention, read.filled
        self.model, self.head = network.model, network.get_output_embeddings()
        self.layers = [Layer.of(layer) for layer in self.model.layers]
        self.heads, self.width = read.cache.layers[0].keys.shape[1], read.cache.layers[0].keys.shape[3]
        position = torch.arange(self.filled + most, device=self.logits.device)
        cos, sin = self.model.rotary_emb(read.cache.layers[0].keys, position.unsqueeze(0))
        sin[..., : self.width // 2] *= -1
        self.turns = torch.stack([cos[0], sin[0]]).unsqueeze(2)  # [2, position, 1, D]
        self.scaled = self.turns * self.width**-0.5  # of queries
        self.blocks = [
            tuple(functional.pad(part, (0, 0, 0, most)).flatten(0, 1) for part in (layer.keys, layer.values))
            for layer in read.cache.layers
        ]

    def select(self, keep: Int64[Tensor, " n"]) -> None:
        """Go on with these rows only."""
        places = (keep.unsqueeze(1) * self.heads + torch.arange(self.heads, device=keep.device)).flatten()
        self.blocks = [(keys[places], values[places]) for keys, values in self.blocks]
        self.attention = None if self.attention is None else self.attention[keep]

    def step(self, token: Int64[Tensor, " N"], position: Int64[Tensor, " N"]) -> Float[Tensor, "N V"]:
        """Logits of the token after this one."""
        x = self.model.embed_tokens(token)
        turn, scaled = self.turns[:, position], self.scaled[:, position]
        self.filled += 1
        hidden = None if self.attention is None else ~self.attention[:, None, None, : self.filled]
        for layer, (keys, values) in zip(self.layers, self.blocks, strict=True):
            y = _normalise(layer.before, x)
            q, k, v = (_linear(part, y).view(len(x), -1, self.width) for part in (layer.q, layer.k, layer.v))
            if layer.q_norm is not None:
                q, k = _normalise(layer.q_norm, q), _normalise(layer.k_norm, k)
            keys[:, self.filled - 1] = self._rotate(k, turn).flatten(0, 1)
            values[:, self.filled - 1] = v.flatten(0, 1)
            x = x + _linear(layer.o, self._attend(self._rotate(q, scaled), keys, values, hidden))
            y = _normalise(layer.after, x)
            x = x + _linear(layer.down, functional.silu(_linear(layer.gate, y)).mul_(_linear(layer.up, y)))
        return self.head(_normalise(self.model.norm, x))

    def _rotate(self, x: Float[Tensor, "N h D"], turn: Float[Tensor, "2 N 1 D"]) -> Float[Tensor, "N h D"]:
        """x cos + (-x₂, x₁) sin; the minus is in the first half of the sine."""
        return torch.addcmul(x * turn[0], x.roll(self.width // 2, -1), turn[1])

    def _attend(
        self, q: Float[Tensor, "N H D"], keys: Tensor, values: Tensor, hidden: Bool[Tensor, "N 1 1 L"] | None
    ) -> Float[Tensor, "N HD"]:
        score = torch.bmm(q.view(len(keys), -1, self.width), keys[:, : self.filled].transpose(1, 2))
        if hidden is not None:
            score.view(len(q), self.heads, -1, self.filled).masked_fill_(hidden, float("-inf"))
        return torch.bmm(score.softmax(-1), values[:, : self.filled]).view(len(q), -1)


def start(network: Any, rows: Sequences, group: int, most: int) -> Forward | Decoder:
    """Read the prompts; what goes on from there, fastest where it can be."""
    return (Decoder if like_llama(network) else Forward)(network, rows, group, most)


def stateful(network: Any) -> bool:
    """Whether it keeps another kind of memory than keys and values, as Mamba does: rows cannot be taken out of it."""
    return bool(getattr(plain(network), "_is_stateful", False))


def like_llama(network: Any) -> bool:
    """Whether `Decoder` computes what this network does."""
    config: Any = getattr(network, "config", None)
    if plain(network) is not network or getattr(config, "model_type", None) not in LIKE_LLAMA:
        return False
    windows = any(kind != "full_attention" for kind in getattr(config, "layer_types", None) or ())
    if windows or (config.model_type == "mistral" and config.sliding_window) or config.hidden_act != "silu":
        return False
    if network.model.rotary_emb.rope_type not in ROPES:
        return False
    parts = [part for layer in network.model.layers for part in Layer.of(layer)]
    return all(type(part) is nn.Linear or "Norm" in type(part).__name__ for part in parts if part is not None)


def _linear(layer: nn.Linear, x: Tensor) -> Tensor:
    return functional.linear(x, layer.weight, layer.bias)


def _normalise(norm: Any, x: Tensor) -> Tensor:
    """x/√(mean x² + ε) w; in other types than float32 Transformers' rounds on its way."""
    if x.dtype is not torch.float32 or not hasattr(norm, "variance_epsilon"):
        return norm(x)
    length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    small = x.new_tensor(norm.variance_epsilon)
    return (x * torch.addcmul(small, length, length, value=1 / x.shape[-1]).rsqrt_()).mul_(norm.weight)


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
