"""One more token a row through a Llama-like network: what Transformers' forward computes, with less between the products.

Llama, Mistral, Qwen2 and Qwen3 without sliding windows are such networks. Any other goes through its own `forward`.
"""

from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn
from torch.nn import functional

KNOWN = ("llama", "mistral", "qwen2", "qwen3")
ROPES = ("default", "linear", "llama3", "yarn")  # rotary embeddings that depend on nothing but the position


def known(network: Any) -> bool:
    """Whether `Decoder` computes what this network does."""
    config = network.config
    if config.model_type not in KNOWN or not hasattr(network, "model") or config.hidden_act != "silu":
        return False
    if any(kind != "full_attention" for kind in getattr(config, "layer_types", None) or ()):
        return False
    if config.model_type == "mistral" and config.sliding_window is not None:
        return False
    linear = all(type(part) is nn.Linear for layer in network.model.layers for part in _Layer.of(layer).linears())
    return linear and network.model.rotary_emb.rope_type in ROPES


class _Layer(NamedTuple):
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
    def of(cls, layer: Any) -> "_Layer":
        attention, mlp = layer.self_attn, layer.mlp
        norms = (getattr(attention, name, None) for name in ("q_norm", "k_norm"))
        return cls(
            layer.input_layernorm, attention.q_proj, attention.k_proj, attention.v_proj, *norms, attention.o_proj,
            layer.post_attention_layernorm, mlp.gate_proj, mlp.up_proj, mlp.down_proj,
        )  # fmt: skip

    def linears(self) -> tuple[nn.Linear, ...]:
        return self.q, self.k, self.v, self.o, self.gate, self.up, self.down


class Decoder:
    """Keys and values of N rows, and the network that adds to them.

    Args:
        network: a `known` one.
        past: of each layer keys and values [N, heads, L, D] of what was read, rows repeated.
        most: tokens that may still come.
        attention: which of the L positions count.
    """

    def __init__(
        self, network: Any, past: list[tuple[Tensor, Tensor]], most: int, attention: Bool[Tensor, "N L"] | None
    ) -> None:
        self.model, self.head = network.model, network.get_output_embeddings()
        self.layers = [_Layer.of(layer) for layer in self.model.layers]
        self.filled = past[0][0].shape[2]
        self.blocks = [tuple(functional.pad(part, (0, 0, 0, most)) for part in layer) for layer in past]
        self.width = past[0][0].shape[3]
        self.mask = None if attention is None else functional.pad(attention, (0, most), value=True)[:, None, None]
        self.scale = self.width**-0.5

    def select(self, rows: Int64[Tensor, " n"]) -> None:
        """Go on with these rows only."""
        self.blocks = [tuple(part[rows] for part in layer) for layer in self.blocks]
        self.mask = None if self.mask is None else self.mask[rows]

    def step(self, token: Int64[Tensor, " N"], position: Int64[Tensor, " N"]) -> Float[Tensor, "N V"]:
        """Logits of the token after this one."""
        x, after = self.model.embed_tokens(token), self.filled + 1
        cos, sin = self.model.rotary_emb(x, position.unsqueeze(1))
        sin = torch.cat([-sin[..., : self.width // 2], sin[..., self.width // 2 :]], -1)  # its first half turns back
        mask = None if self.mask is None else self.mask[..., :after]
        for layer, (keys, values) in zip(self.layers, self.blocks, strict=True):
            x = x + self._attend(layer, _normalise(layer.before, x), keys, values, cos, sin, mask)
            y = _normalise(layer.after, x)
            x = x + layer.down(functional.silu(layer.gate(y)) * layer.up(y))
        self.filled = after
        return self.head(_normalise(self.model.norm, x))

    def _attend(self, layer: _Layer, x: Tensor, keys: Tensor, values: Tensor, cos: Tensor, sin: Tensor, mask: Any) -> Tensor:
        here = self.filled
        q, k, v = (linear(x).unflatten(-1, (-1, self.width)) for linear in (layer.q, layer.k, layer.v))
        if layer.q_norm is not None:
            q, k = _normalise(layer.q_norm, q), _normalise(layer.k_norm, k)
        half = self.width // 2
        keys[:, :, here] = torch.addcmul(k * cos, k.roll(half, -1), sin)
        values[:, :, here] = v
        q = torch.addcmul(q * cos, q.roll(half, -1), sin)
        past = (keys[:, :, : here + 1], values[:, :, : here + 1])
        seen = functional.scaled_dot_product_attention(
            q.unsqueeze(2), *past, attn_mask=mask, scale=self.scale, enable_gqa=q.shape[1] != keys.shape[1]
        )
        return layer.o(seen.flatten(1))


def _normalise(norm: Any, x: Tensor) -> Tensor:
    """By PyTorch's one operation where Transformers' several round alike."""
    if x.dtype is not torch.float32 or not hasattr(norm, "variance_epsilon"):
        return norm(x)
    return functional.rms_norm(x, x.shape[-1:], norm.weight, norm.variance_epsilon)
