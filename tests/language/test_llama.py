"""The pass that Llama-like networks are trained with: Transformers' numbers and gradients, and when it is not taken."""

import pytest
import torch
import transformers
from torch import Tensor

from tests.language import nets
from upslope.language import batching, llama, models

PROMPTS, COMPLETIONS = [[5, 6, 7, 8, 9], [10], [11, 12]], [[13, 14, 1], [15, 16, 17, 1], [18]]
LIKE = ["llama", "llama-tied", "qwen2", "qwen3"]


@pytest.mark.parametrize("name", LIKE)
def test_gradients_are_transformers_own(name: str) -> None:
    """Of a weighted sum of log π, each row alone through the network's own forward: equal to float32's rounding."""
    network = nets.network(name)
    weights = torch.randn(3, 9, generator=torch.Generator().manual_seed(0))
    assert llama.trains(network)
    batch = batching.pad(PROMPTS, COMPLETIONS, 0)
    (models.log_probs(network, batch) * weights[:, : batch.ids.shape[1]]).sum().backward()
    own = {key: parameter.grad.clone() for key, parameter in network.named_parameters()}
    network.zero_grad()
    for i, (prompt, completion) in enumerate(zip(PROMPTS, COMPLETIONS, strict=True)):
        ids = torch.tensor([[*prompt, *completion]])
        logp = network(input_ids=ids).logits[0, :-1].log_softmax(-1).gather(-1, ids[0, 1:, None])[:, 0]
        first = len(prompt)
        (logp[first - 1 :] * weights[i, first : ids.shape[1]]).sum().backward()
    for key, parameter in network.named_parameters():
        apart = (own[key] - parameter.grad).abs().max() / parameter.grad.abs().max()
        assert apart < 2e-5, key


def test_normalisation_and_rotation_have_their_gradients() -> None:
    """Against finite differences in float64; a rotation keeps lengths, and the products of its pairs' differences."""
    torch.manual_seed(0)
    x, weight = (torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in ((2, 3, 6), (6,)))
    assert torch.autograd.gradcheck(lambda a, b: llama._Norm.apply(a, b, 0.1), (x, weight))
    expected = x / (x.square().mean(-1, keepdim=True) + 0.1).sqrt() * weight
    torch.testing.assert_close(llama._Norm.apply(x, weight, 0.1), expected)
    turn, heads = rotation(), torch.randn(2, 3, 5, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda a: llama._Turn.apply(a, turn), (heads,))
    pairs = torch.complex(heads[..., :2], heads[..., 2:])
    angles = torch.tensor([0.3, 1.1]) * torch.arange(3).unsqueeze(1)
    expected = pairs * torch.polar(torch.ones_like(angles), angles).to(torch.complex128).unsqueeze(1)
    found = llama._Turn.apply(heads, turn)
    torch.testing.assert_close(torch.complex(found[..., :2], found[..., 2:]), expected, rtol=1e-6, atol=1e-6)


def rotation() -> Tensor:
    """Angles of 0.3 and 1.1 a position, as `turns` has them."""
    angles = (torch.tensor([0.3, 1.1]) * torch.arange(3).unsqueeze(1)).double().repeat(1, 2)
    sign = torch.tensor([-1.0, -1.0, 1.0, 1.0], dtype=torch.float64)
    return torch.stack([angles.cos(), angles.sin() * sign]).unsqueeze(2)


def test_where_it_is_not_taken() -> None:
    """Another architecture, attention or norm, bfloat16, training mode, a module that something watches."""
    assert not llama.trains(nets.network("gpt2"))
    assert not llama.trains(nets.network("gemma2"))
    assert not llama.trains(
        transformers.MistralForCausalLM(transformers.MistralConfig(**nets.COMMON, sliding_window=8))
    )
    assert not llama.trains(nets.network("llama").bfloat16())
    assert not llama.trains(nets.network("llama").train())
    network = nets.network("llama")
    network.config._attn_implementation = "eager"
    assert not llama.trains(network)
    network = nets.network("llama")
    handle = network.model.layers[1].mlp.register_forward_hook(lambda *_: None)
    assert not llama.trains(network)
    handle.remove()
    assert llama.trains(network)
    assert not llama.trains(network.model)  # a backbone alone
    network.model.norm = torch.nn.RMSNorm(32)
    assert not llama.trains(network)
