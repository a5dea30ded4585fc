"""log π against Transformers' own forward, its gradient against autograd's, and models on disk."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.language import nets
from upslope.language import batching, models
from upslope.language.batching import Sequences

PROMPTS = [[5, 6, 7, 8], [9, 10], [11, 12, 13, 14, 15, 16]]
COMPLETIONS = [[20, 21, 1], [22, 23, 24, 25, 1], [1]]
NAMES = ["llama", "qwen2", "qwen3", "gpt2", "gemma2", "llama-tied"]


def by_transformers(network: torch.nn.Module, temperature: float = 1.0) -> list[Tensor]:
    """log π of each completion's tokens, one example at a time, no padding."""
    found = []
    for prompt, completion in zip(PROMPTS, COMPLETIONS, strict=True):
        ids = torch.tensor([prompt + completion])
        with torch.no_grad():
            logp = (network(ids).logits[0].float() / temperature).log_softmax(-1)
        places = range(len(prompt) - 1, len(prompt) + len(completion) - 1)
        found.append(torch.stack([logp[t, ids[0, t + 1]] for t in places]))
    return found


def layouts() -> dict[str, tuple[Sequences, list[int]]]:
    """Name -> sequences, and the order in which their completions are met."""
    packed = batching.pack(PROMPTS, COMPLETIONS, 0, 16)
    return {
        "right": (batching.pad(PROMPTS, COMPLETIONS, 0), [0, 1, 2]),
        "left": (batching.pad(PROMPTS, COMPLETIONS, 0, left=True), [0, 1, 2]),
        "eos as padding": (batching.pad(PROMPTS, COMPLETIONS, 1), [0, 1, 2]),
        "packed": (packed, [0, 1, 2]),
    }


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("layout", list(layouts()))
def test_log_probs_are_transformers_own(name: str, layout: str) -> None:
    """Within float32's rounding of a log-softmax over 128 tokens: 1e-5."""
    network = nets.network(name)
    batch, _ = layouts()[layout]
    with torch.no_grad():
        logp = models.log_probs(network, batch, chunk=4)
    assert bool((logp[~batch.response] == 0).all())
    expected = by_transformers(network)
    if batch.segment is None:
        for row, mask, own in zip(logp, batch.response, expected, strict=True):
            torch.testing.assert_close(row[mask], own, rtol=0, atol=1e-5)
    else:
        found = sorted(logp[batch.response].tolist())
        torch.testing.assert_close(torch.tensor(found), torch.cat(expected).sort().values, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_a_temperature_divides_the_logits(name: str) -> None:
    network = nets.network(name)
    batch = batching.pad(PROMPTS, COMPLETIONS, 0)
    with torch.no_grad():
        logp = models.log_probs(network, batch, temperature=0.7)
    torch.testing.assert_close(logp[batch.response], torch.cat(by_transformers(network, 0.7)), rtol=0, atol=1e-5)


@pytest.mark.parametrize("chunk", [1, 3, 256])
def test_the_chunked_head_has_autograds_gradient(chunk: int) -> None:
    """∂ Σ w log π / ∂ hidden, weight and bias in float64 against log_softmax of all logits at once."""
    torch.manual_seed(0)
    hidden, weight, bias = (torch.randn(*shape, dtype=torch.float64) for shape in ((7, 5), (11, 5), (11,)))
    target, w = torch.randint(0, 11, (7,)), torch.randn(7, dtype=torch.float64)
    gradients = []
    for own in (True, False):
        leaves = [each.clone().requires_grad_() for each in (hidden, weight, bias)]
        if own:
            logp = models._HeadLogProb.apply(*leaves, target, 0.5, chunk)
        else:
            logits = 0.5 * torch.nn.functional.linear(*leaves)
            logp = logits.log_softmax(-1).gather(1, target.unsqueeze(1)).squeeze(1)
        gradients.append(torch.autograd.grad((w * logp).sum(), leaves))
    for ours, exact in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, exact, rtol=1e-12, atol=1e-12)


def test_nothing_predicts_the_first_token() -> None:
    batch = batching.pad([[]], [[5, 1]], 0)
    with pytest.raises(ValueError, match="response marks the first token"):
        models.log_probs(nets.network("llama"), batch)


def test_with_lora_the_reference_is_the_base() -> None:
    config = models.Config(lora_rank=2)
    model, base = models.load(config, seed=1), models.load(models.Config(), seed=1)
    names = list(models.trainable(model.network))
    assert names
    assert all("lora" in name for name in names)
    with torch.no_grad():
        for parameter in models.trainable(model.network).values():
            parameter.add_(0.1)
    batch = batching.pad(PROMPTS, COMPLETIONS, 0)
    with torch.no_grad():
        moved, original = models.log_probs(model.network, batch), models.log_probs(base.network, batch)
    with models.frozen(models.reference(model), model.network) as network:
        reference = models.log_probs(network, batch)
    torch.testing.assert_close(reference, original, rtol=0, atol=1e-6)
    assert float((moved - original).abs().max()) > 1e-2


def test_a_reference_stays_where_it_was() -> None:
    model = models.load(models.Config(), seed=1)
    batch = batching.pad(PROMPTS, COMPLETIONS, 0)
    reference = models.reference(model)
    with torch.no_grad():
        before = models.log_probs(model.network, batch)
        for parameter in model.network.parameters():
            parameter.add_(0.01)
    with models.frozen(reference, model.network) as network:
        assert torch.equal(models.log_probs(network, batch), before)


@pytest.mark.parametrize("lora_rank", [0, 2])
def test_a_saved_model_is_the_same(tmp_path: Path, lora_rank: int) -> None:
    """Adapters are merged into what is saved; Transformers alone reads it."""
    import transformers

    model = models.load(models.Config(lora_rank=lora_rank), seed=3)
    with torch.no_grad():
        for parameter in models.trainable(model.network).values():
            parameter.add_(0.01)
    models.save(model.network, model.tokenizer, tmp_path / "model")
    assert not list(tmp_path.rglob("*.bin"))
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    batch = batching.pad(PROMPTS, COMPLETIONS, 0)
    with torch.no_grad():
        torch.testing.assert_close(
            models.log_probs(again, batch), models.log_probs(model.network, batch), rtol=0, atol=1e-5
        )
    loaded = models.load(models.Config(str(tmp_path / "model")), seed=0)
    assert loaded.tokenizer("12+7=")["input_ids"] == model.tokenizer("12+7=")["input_ids"]


def test_gradient_checkpointing_changes_nothing() -> None:
    """No dropout, and the same gradient; in float64, for products round by where their memory lies."""
    gradients = []
    for checkpointing in (False, True):
        model = models.load(models.Config(gradient_checkpointing=checkpointing), seed=1)
        model.network.double()
        models.log_probs(model.network, batching.pad(PROMPTS, COMPLETIONS, 0)).sum().backward()
        gradients.append(model.network.get_output_embeddings().weight.grad)
    assert gradients[0].dtype == torch.float64
    torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-12)


def test_a_model_that_is_not_there() -> None:
    with pytest.raises(ValueError, match=r"model.id is './nowhere'.*allowed: a path, a hub id"):
        models.load(models.Config("./nowhere"), seed=0)


def test_a_run_that_is_not_finished(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="not finished: upslope resume"):
        models.load(models.Config(str(tmp_path)), seed=0)


def test_a_reward_heads_first_weights() -> None:
    """N(0, 1/(d+1)), d = 128: the standard deviation of 128 draws lies within five standard errors of 0.088."""
    scorer, _ = models.scorer(models.Config(), seed=0)
    std, expected = float(scorer.head.weight.std()), 129**-0.5
    assert abs(std - expected) < 5 * expected / (2 * 128) ** 0.5
    assert float(scorer.head.bias) == 0
    value, _ = models.scorer(models.Config(), seed=0, std=0.0)
    assert float(value.head.weight.abs().max()) == 0


def test_a_score_is_that_of_the_last_token_whatever_the_padding() -> None:
    scorer, _ = models.scorer(models.Config(), seed=0)
    with torch.no_grad():
        right = scorer.last(batching.pad(PROMPTS, COMPLETIONS, 0))
        left = scorer.last(batching.pad(PROMPTS, COMPLETIONS, 1, left=True))
        alone = [scorer(batching.pad([p], [c], 0))[0, -1] for p, c in zip(PROMPTS, COMPLETIONS, strict=True)]
    torch.testing.assert_close(right, torch.stack(alone), rtol=0, atol=1e-5)
    torch.testing.assert_close(left, torch.stack(alone), rtol=0, atol=1e-5)
