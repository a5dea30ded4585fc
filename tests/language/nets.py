"""Small random models of several architectures, and a tabular language."""

import itertools
from typing import Any

import torch
import transformers

from upslope.language import tiny
from upslope.language.models import Model

COMMON: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": None,
}
TABLE = {"vocab_size": 4, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}


def network(name: str) -> Any:
    """A random model in evaluation mode, its weights large enough for its predictions to differ."""
    torch.manual_seed(0)
    if name == "gpt2":
        config = transformers.GPT2Config(
            vocab_size=128, n_embd=32, n_layer=2, n_head=4, n_positions=64, pad_token_id=0, eos_token_id=1,
            bos_token_id=None,
        )  # fmt: skip
        made = transformers.GPT2LMHeadModel(config)
    elif name == "llama-tied":
        made = transformers.LlamaForCausalLM(transformers.LlamaConfig(**COMMON, tie_word_embeddings=True))
    else:
        kinds = {
            "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM, {}),
            "qwen2": (transformers.Qwen2Config, transformers.Qwen2ForCausalLM, {}),
            "qwen3": (transformers.Qwen3Config, transformers.Qwen3ForCausalLM, {"head_dim": 8}),
            "gemma2": (
                transformers.Gemma2Config,
                transformers.Gemma2ForCausalLM,
                {"head_dim": 8, "sliding_window": 64},
            ),
        }
        config_class, model_class, more = kinds[name]
        made = model_class(config_class(**COMMON, **more))
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.mul_(3.0)
    return made.eval()


def model(name: str = "llama") -> Model:
    return Model(network(name), tiny.tokenizer(), eos=1, pad=0)


LENGTH = 3
COMPLETIONS = [  # of the language over {1 = eos, 2, 3} of at most three tokens
    [*words, *end]
    for count in range(LENGTH + 1)
    for words in itertools.product((2, 3), repeat=count)
    for end in ([[1]] if count < LENGTH else [[]])
]


def tabular(seed: int = 0) -> Model:
    """A language model in float64 whose completions can all be written down: no token but 1, 2 and 3 is possible.

    Transformers' own normalisation rounds to float32 inside; PyTorch's does not.
    """
    torch.manual_seed(seed)
    made = transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**COMMON, **TABLE})).double().eval()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.mul_(5.0)
        layer = made.model.layers[0]
        layer.input_layernorm, layer.post_attention_layernorm, made.model.norm = (
            torch.nn.RMSNorm(8, eps=1e-6, dtype=torch.float64) for _ in range(3)
        )
        head = made.get_output_embeddings()
        made.lm_head = torch.nn.Linear(8, 4, bias=True).double()
        made.lm_head.weight.copy_(head.weight)
        made.lm_head.bias.copy_(torch.tensor([-1e9, 0.0, 0.0, 0.0], dtype=torch.float64))
    made.lm_head.bias.requires_grad_(False)
    return Model(made, tiny.tokenizer(), eos=1, pad=0)
