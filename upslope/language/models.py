"""Hugging Face models: what is loaded, what of it is trained, and log π of the tokens that count.

A model comes from a local path, a hub id, a run of ours, or `tiny`. Weights are read from safetensors alone, and code
that a repository brings along runs only where `trust_remote_code` says so.
"""

import contextlib
import copy
import math
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn

from upslope.language import llama, tiny
from upslope.language.batching import Sequences
from upslope.runs import settings
from upslope.runs.randomness import derive

MODEL = "model"  # the folder of a finished run that holds its model
HEAD = "head.safetensors"  # of a reward model, beside its backbone


@dataclass(frozen=True)
class Config:
    """Which model, and how it is held."""

    id: str = "tiny"  # a path, a hub id, a run directory, or tiny
    dtype: Literal["float32", "bfloat16", "float64"] = "float32"
    device: str = "auto"  # auto: a GPU where there is one
    lora_rank: int = 0  # 0: all weights are trained
    lora_alpha: int = 16
    gradient_checkpointing: bool = False
    trust_remote_code: bool = False  # run code that comes with the model

    def __post_init__(self) -> None:
        settings.within(self, 0, None, "lora_rank")
        settings.positive(self, "lora_alpha")


class Model(NamedTuple):
    """A causal language model and its tokenizer."""

    network: Any  # transformers.PreTrainedModel, or peft.PeftModel around one
    tokenizer: Any
    eos: int
    pad: int  # may be eos: masks say what is padding, never the id

    @property
    def device(self) -> torch.device:
        return next(self.network.parameters()).device


class Scorer(nn.Module):
    """A backbone with one number on top: a reward at the last token, or a value at each."""

    def __init__(self, backbone: nn.Module, width: int, std: float) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = nn.Linear(width, 1)
        nn.init.normal_(self.head.weight, std=std) if std else nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, batch: Sequences) -> Float[Tensor, "B L"]:
        """Of every position; those of padding mean nothing."""
        return self.head(_hidden(self.backbone, batch).to(self.head.weight.dtype)).squeeze(-1)

    def last(self, batch: Sequences) -> Float[Tensor, " B"]:
        """Of the last token of every sequence."""
        place = (batch.attention * torch.arange(1, batch.ids.shape[1] + 1, device=batch.ids.device)).argmax(-1)
        return self(batch).gather(1, place.unsqueeze(1)).squeeze(1)


def load(config: Config, seed: int) -> Model:
    """The model, in evaluation mode: dropout would make the sampler and the trainer two policies.

    Raises:
        ValueError: nothing is there under this id, or it is no causal language model.
    """
    device = config.device if config.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    dtype = getattr(torch, config.dtype)
    if config.id == "tiny":
        network, tokens = tiny.model(derive(seed, "model")), tiny.tokenizer()
    else:
        network, tokens = _pretrained(config)
    network = network.to(device=device, dtype=dtype).eval()
    if tokens.eos_token_id is None:
        raise ValueError(
            f"model.id is {config.id!r}: its tokenizer has no end-of-sequence token, which completions need"
        )
    if config.lora_rank:
        from peft import LoraConfig, get_peft_model

        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive(seed, "lora"))
            network = get_peft_model(
                network,
                LoraConfig(
                    r=config.lora_rank, lora_alpha=config.lora_alpha, target_modules="all-linear", task_type="CAUSAL_LM"
                ),
            ).eval()
    if config.gradient_checkpointing:
        network.gradient_checkpointing_enable()
        network.enable_input_require_grads()
        network.train()  # Transformers checkpoints in training mode only
        for module in network.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
    pad = tokens.eos_token_id if tokens.pad_token_id is None else tokens.pad_token_id
    return Model(network, tokens, tokens.eos_token_id, pad)


def _pretrained(config: Config) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()  # of a hundred milliseconds
    path = Path(config.id)
    ours = (path / "config.json").exists() and (path / "checkpoints").exists()
    if ours and not (path / MODEL).exists():
        raise ValueError(f"model.id is {config.id!r}, a run that is not finished: upslope resume {config.id}")
    if (path / MODEL / "config.json").exists():  # a run of ours, or the reward model that one ends with
        path = path / MODEL
    source = str(path) if path.exists() else config.id
    options = {"trust_remote_code": config.trust_remote_code}
    try:
        network = AutoModelForCausalLM.from_pretrained(source, use_safetensors=True, **options)
        return network, AutoTokenizer.from_pretrained(source, **options)
    except OSError as error:
        raise ValueError(
            f"model.id is {config.id!r}: no model was found there; allowed: a path, a hub id, a run directory, 'tiny' "
            f"({error})"
        ) from error


def reference(model: Model) -> Any:
    """The frozen policy π_ref, for `frozen`: with LoRA the same network, else a copy of the model as it is now."""
    if _is_lora(model.network):
        return model.network
    return copy.deepcopy(model.network).requires_grad_(False).eval()


@contextlib.contextmanager
def frozen(network: Any, policy: Any) -> Iterator[Any]:
    """π_ref without gradients: `network` as `reference` gave it, adapters off where it is the trained `policy`."""
    off = network.disable_adapter() if network is policy else contextlib.nullcontext()
    with torch.no_grad(), off:
        yield network


def scorer(config: Config, seed: int, std: float | None = None) -> tuple[Scorer, Model]:
    """A reward or value model on the backbone of a language model; a reward model's run brings its own head.

    Args:
        config: the language model.
        seed: of a new head.
        std: of the head's initial weights; None: 1/√(d+1) (Stiennon et al. 2020). A value head begins at 0.
    """
    model = load(config, seed)
    inner = plain(model.network)
    width = inner.config.hidden_size
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive(seed, "head"))
        made = Scorer(model.network, width, 1 / math.sqrt(width + 1) if std is None else std)
    made.head.to(device=model.device, dtype=next(inner.parameters()).dtype)
    path = Path(config.id) / MODEL / HEAD
    if path.exists():
        from safetensors.torch import load_file

        made.head.load_state_dict(load_file(path))
    if inner.get_output_embeddings().weight is not inner.get_input_embeddings().weight:
        inner.get_output_embeddings().requires_grad_(False)  # it has no part in a score
    return made, model


def trainable(network: nn.Module) -> dict[str, nn.Parameter]:
    """Name -> parameter of all that is trained."""
    return {name: parameter for name, parameter in network.named_parameters() if parameter.requires_grad}


def save(network: Any, tokenizer: Any, directory: Path, head: nn.Module | None = None) -> None:
    """Write a model that `--model RUN` and `from_pretrained` read, whole or not at all; adapters are merged."""
    partial = directory.with_name(f".partial-{directory.name}")
    shutil.rmtree(partial, ignore_errors=True)
    from transformers.utils import logging

    logging.disable_progress_bar()
    merged = copy.deepcopy(network).merge_and_unload() if _is_lora(network) else network
    merged.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    if head is not None:
        from safetensors.torch import save_file

        save_file({name: tensor.contiguous() for name, tensor in head.state_dict().items()}, partial / HEAD)
    shutil.rmtree(directory, ignore_errors=True)
    os.replace(partial, directory)


def is_scorer(directory: Path) -> bool:
    """Whether a run trained a reward model."""
    return (directory / MODEL / HEAD).exists()


def limit(model: Model) -> int:
    """The longest sequence that the model has positions for; very large where there is none."""
    found = getattr(plain(model.network).config, "max_position_embeddings", None)
    return int(found) if found else 2**31


def log_probs(network: Any, batch: Sequences, temperature: float = 1.0, chunk: int = 128) -> Float[Tensor, "B L"]:
    """log π(token | what stands before it) of the tokens with `response`, 0 elsewhere; float32 or wider.

    The logits of masked positions are never computed, those of the others in chunks, in the backward pass too: memory
    is chunk × vocabulary, whatever the batch. `temperature` divides the logits.

    Raises:
        ValueError: a response token without one before it.
    """
    if bool(batch.response[:, 0].any()):
        raise ValueError("response marks the first token of a sequence: nothing stands before it that could predict it")
    inner = plain(network)
    where = batch.response[:, 1:]
    before = batch.without_last()  # the last token predicts none
    chosen = where.flatten().nonzero().squeeze(1)
    rows = _hidden(network, before).flatten(0, 1).index_select(0, chosen)
    targets = batch.ids[:, 1:].flatten()[chosen]
    head = inner.get_output_embeddings()
    softcap = getattr(inner.config, "final_logit_softcapping", None)
    if softcap is None and not hasattr(inner.config, "logits_scaling") and not hasattr(inner.config, "logit_scale"):
        logp = _HeadLogProb.apply(rows, head.weight, head.bias, targets, 1 / temperature, chunk)
    else:  # a head that is more than a matrix
        scale = getattr(inner.config, "logit_scale", 1.0) / getattr(inner.config, "logits_scaling", 1.0)
        logits = head(rows).to(_at_least_float(rows)) * scale
        logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
        logp = (logits / temperature).log_softmax(-1).gather(-1, targets.unsqueeze(-1)).squeeze(-1)
    return logp.new_zeros(where.shape[0], where.shape[1] + 1).masked_scatter(
        torch.cat([torch.zeros_like(where[:, :1]), where], 1), logp
    )


class _HeadLogProb(torch.autograd.Function):
    """log softmax(h Wᵀ + b)[target] row by row: forward and backward hold one chunk of logits at a time."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Float[Tensor, "N H"],
        weight: Float[Tensor, "V H"],
        bias: Float[Tensor, " V"] | None,
        target: Int64[Tensor, " N"],
        scale: float,
        chunk: int,
    ) -> Float[Tensor, " N"]:
        wide = _at_least_float(hidden)
        logp = hidden.new_empty(len(hidden), dtype=wide)
        normaliser = torch.empty_like(logp)
        for rows in _chunks(len(hidden), chunk):
            logits = _logits(hidden[rows], weight, bias, wide, scale)
            normaliser[rows] = logits.logsumexp(-1)
            logp[rows] = logits.gather(-1, target[rows].unsqueeze(-1)).squeeze(-1) - normaliser[rows]
        ctx.save_for_backward(hidden, weight, bias, target, normaliser)
        ctx.scale, ctx.chunk = scale, chunk
        return logp

    @staticmethod
    def backward(ctx: Any, gradient: Float[Tensor, " N"]) -> Any:
        hidden, weight, bias, target, normaliser = ctx.saved_tensors
        need_hidden, need_weight, need_bias = ctx.needs_input_grad[:3]
        to_hidden = torch.empty_like(hidden) if need_hidden else None
        to_weight = torch.zeros_like(weight) if need_weight else None
        to_bias = torch.zeros_like(bias) if bias is not None and need_bias else None
        for rows in _chunks(len(hidden), ctx.chunk):
            logits = _logits(hidden[rows], weight, bias, normaliser.dtype, ctx.scale)
            slope = logits.sub_(normaliser[rows].unsqueeze(-1)).exp_().neg_()  # ∂ logp / ∂ logits = e_target - p
            slope.scatter_add_(-1, target[rows].unsqueeze(-1), torch.ones_like(normaliser[rows]).unsqueeze(-1))
            slope = slope.mul_(gradient[rows].unsqueeze(-1) * ctx.scale).to(hidden.dtype)
            if to_hidden is not None:
                torch.mm(slope, weight, out=to_hidden[rows])
            if to_weight is not None:
                to_weight.addmm_(slope.T, hidden[rows])
            if to_bias is not None:
                to_bias.add_(slope.sum(0))
        return to_hidden, to_weight, to_bias, None, None, None


def _logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype, scale: float) -> Tensor:
    logits = torch.nn.functional.linear(hidden, weight, bias).to(dtype)
    return logits if scale == 1 else logits.mul_(scale)


def _chunks(total: int, size: int) -> Iterator[slice]:
    return (slice(first, min(first + size, total)) for first in range(0, total, size))


def _at_least_float(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


def _hidden(network: Any, batch: Sequences) -> Float[Tensor, "B L H"]:
    """The last hidden states, which the output embedding would turn into logits."""
    inner = plain(network)
    if batch.segment is None and _filled_on_the_right(batch.attention):  # what comes later is not seen: no mask, faster
        if llama.trains(inner):
            return llama.hidden_states(inner, batch.ids)
        return inner.base_model(input_ids=batch.ids, use_cache=False).last_hidden_state
    attention = batch.attention
    if batch.segment is not None:  # packed: a token sees those of its own example that came before it
        attention = _among_its_own(inner.config, batch.segment, next(inner.parameters()).dtype)
    return inner.base_model(
        input_ids=batch.ids, attention_mask=attention, position_ids=batch.positions, use_cache=False
    ).last_hidden_state  # fmt: skip


def _filled_on_the_right(attention: Bool[Tensor, "B L"]) -> bool:
    """Whether every row is its tokens, then padding."""
    return not bool((attention[:, 1:] & ~attention[:, :-1]).any())


def _among_its_own(config: Any, segment: Int64[Tensor, "B L"], dtype: torch.dtype) -> Tensor:
    length, window = segment.shape[1], getattr(config, "sliding_window", None)
    if window and length > window:
        raise ValueError(f"packed rows have {length} tokens, allowed: at most the model's attention window, {window}")
    same = segment.unsqueeze(2) == segment.unsqueeze(1)
    seen = (same & same.new_ones(length, length).tril()).unsqueeze(1)
    if config._attn_implementation == "sdpa":
        return seen
    return torch.zeros_like(seen, dtype=dtype).masked_fill(~seen, torch.finfo(dtype).min)  # what others add


def plain(network: Any) -> Any:
    """The network without adapters around it."""
    return network.get_base_model() if _is_lora(network) else network


def _is_lora(network: Any) -> bool:
    return hasattr(network, "disable_adapter") and hasattr(network, "get_base_model")
