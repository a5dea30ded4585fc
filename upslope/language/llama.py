"""Networks like Llama: which they are, their parts, and their forward and backward pass in fewer operations.

Llama, Mistral, Qwen2 and Qwen3 without sliding windows, their linear layers plain. `hidden_states` is what they are
trained with in float32: normalisation and rotation have their gradients written out, in a third of the memory traffic
that Transformers' forward and its automatic differentiation need for them.
"""

from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.nn import functional

KINDS = ("llama", "mistral", "qwen2", "qwen3")
ROPES = ("default", "linear", "llama3", "yarn")  # rotary embeddings that depend on nothing but the position
COPIED = 2**25  # parameters up to which matrices are copied: a larger network has no memory to spare


def alike(network: Any) -> bool:
    """Whether this is such a network, without adapters."""
    config: Any = getattr(network, "config", None)
    if getattr(config, "model_type", None) not in KINDS or not type(network).__name__.endswith("ForCausalLM"):
        return False
    windows = any(kind != "full_attention" for kind in getattr(config, "layer_types", None) or ())
    if windows or (config.model_type == "mistral" and config.sliding_window) or config.hidden_act != "silu":
        return False
    if network.model.rotary_emb.rope_type not in ROPES:
        return False
    each = [part for layer in network.model.layers for part in parts(layer)]
    return all(type(part) is nn.Linear or "Norm" in type(part).__name__ for part in each if part is not None)


def small(network: nn.Module) -> bool:
    """Whether its matrices may be copied."""
    return sum(parameter.numel() for parameter in network.parameters()) <= COPIED


def parts(layer: Any) -> list[Any]:
    """Norms before attention and MLP, of queries and keys (Qwen3); linear layers q, k, v, o, gate, up, down."""
    attention, mlp = layer.self_attn, layer.mlp
    return [
        layer.input_layernorm, layer.post_attention_layernorm,
        *(getattr(attention, name, None) for name in ("q_norm", "k_norm")),
        *(getattr(attention, f"{name}_proj") for name in "qkvo"), mlp.gate_proj, mlp.up_proj, mlp.down_proj,
    ]  # fmt: skip


def turns(model: Any, length: int, like: Tensor) -> Float[Tensor, "2 L 1 D"]:
    """Cosine and sine of every position; x turns to x cos + (x₂, x₁) sin, the minus of -x₂ is in the sine."""
    cos, sin = model.rotary_emb(like, torch.arange(length, device=like.device).unsqueeze(0))
    sin[..., : sin.shape[-1] // 2] *= -1
    return torch.stack([cos[0], sin[0]]).unsqueeze(2)


def trains(network: Any) -> bool:
    """Whether `hidden_states` computes what this network does, and may: no module is watched or sharded."""
    if not alike(network) or network.config._attn_implementation != "sdpa" or network.training:
        return False
    if any(parameter.dtype is not torch.float32 for parameter in network.parameters()):
        return False
    norms = [network.model.norm, *(part for layer in network.model.layers for part in parts(layer)[:4])]
    if not all(hasattr(norm, "variance_epsilon") for norm in norms if norm is not None):
        return False
    return not any(module._forward_hooks or module._forward_pre_hooks for module in network.modules())


def hidden_states(network: Any, ids: Int64[Tensor, "B L"]) -> Float[Tensor, "B L H"]:
    """The last hidden states of rows that begin at position 0; what comes later is not seen."""
    model = network.model
    x = model.embed_tokens(ids)
    turn = turns(model, ids.shape[1], x)
    for layer in model.layers:
        before, after, q_norm, k_norm, *linear, o, gate, up, down = parts(layer)
        y = _normalised(before, x)
        q, k, v = (part(y).unflatten(-1, (-1, layer.self_attn.head_dim)) for part in linear)
        if q_norm is not None:
            q, k = _normalised(q_norm, q), _normalised(k_norm, k)
        seen = functional.scaled_dot_product_attention(
            _Turn.apply(q, turn).transpose(1, 2), _Turn.apply(k, turn).transpose(1, 2), v.transpose(1, 2),
            is_causal=True, enable_gqa=q.shape[2] != k.shape[2],
        )  # fmt: skip
        x = x + o(seen.transpose(1, 2).flatten(2))
        y = _normalised(after, x)
        x = x + down(functional.silu(gate(y)) * up(y))
    return _normalised(model.norm, x)


def _normalised(norm: Any, x: Tensor) -> Tensor:
    return _Norm.apply(x, norm.weight, norm.variance_epsilon)


class _Norm(torch.autograd.Function):
    """x r w with r = 1/√(mean x² + ε); ∂/∂x = r (g w - x̂ mean(g w x̂)) with x̂ = x r."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        r = length.square_().div_(x.shape[-1]).add_(epsilon).rsqrt_()
        ctx.save_for_backward(x, weight, r)
        return (x * r).mul_(weight)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        x, weight, r = ctx.saved_tensors
        unit = x * r
        product = gradient * unit
        mean = (product @ weight).unsqueeze(-1).div_(-x.shape[-1])
        to_x = (gradient * weight).addcmul_(unit, mean).mul_(r)
        return to_x, product.flatten(0, -2).sum(0), None


class _Turn(torch.autograd.Function):
    """Heads [B, L, h, D], each pair of coordinates turned by an angle of its position; the gradient turns back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, turn: Tensor) -> Tensor:
        ctx.save_for_backward(turn)
        return (x * turn[0]).addcmul_(x.roll(x.shape[-1] // 2, -1), turn[1])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        (turn,) = ctx.saved_tensors
        back = (gradient * turn[1]).roll(gradient.shape[-1] // 2, -1)
        return back.addcmul_(gradient, turn[0]), None
