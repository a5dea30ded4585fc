"""Sampling: Transformers' own tokens where it is greedy, the policy's distribution where it is not."""

import itertools

import pytest
import torch
import transformers

from tests.language import nets
from upslope.language import batching, decoding, generation, llama, models, rollout, tiny
from upslope.language.generation import Sampling
from upslope.language.models import Model

PROMPTS = [[5, 6, 7, 8], [9, 10], [11, 12, 13, 14, 15, 16], [9]]


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3", "gpt2", "gemma2", "llama-tied"])
def test_greedy_tokens_are_generates(name: str) -> None:
    """Prompts of four lengths, padded on the left, completions that end at different times."""
    model = nets.model(name)
    batch = batching.pad(PROMPTS, [[]] * 4, 0, left=True)

    def by_transformers(eos: int) -> list[list[int]]:
        return model.network.generate(
            input_ids=batch.ids, attention_mask=batch.attention.long(), do_sample=False, max_new_tokens=12,
            pad_token_id=0, eos_token_id=eos,
        )[:, batch.ids.shape[1] :].tolist()  # fmt: skip

    early = by_transformers(1)[0][3]  # a token that some rows meet before others serves as the end
    for eos in (1, early):
        found = generation.generate(
            Model(model.network, model.tokenizer, eos, 0), PROMPTS, 1, Sampling(12, temperature=0.0), seeded()
        ).tokens()
        for own, whole in zip(found, by_transformers(eos), strict=True):
            assert own == whole[: whole.index(eos) + 1 if eos in whole else 12]


@pytest.mark.parametrize(
    ("name", "fast"),
    [("llama", True), ("qwen2", True), ("qwen3", True), ("llama-tied", True), ("gpt2", False), ("gemma2", False)],
)
@pytest.mark.parametrize("copied", [True, False])
def test_the_decoder_takes_what_it_knows(name: str, fast: bool, copied: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """And gives the logits of the network's own forward at every step: rows of unlike lengths, some of them gone."""
    model = nets.model(name)
    if not copied:  # as of a large network
        monkeypatch.setattr(llama, "COPIED", 0)
    rows = batching.pad(PROMPTS, [[]] * 4, 0, left=True)
    assert decoding.like_llama(model.network) == fast
    with torch.no_grad():
        own, through = decoding.start(model.network, rows, 3, 5), decoding.Forward(model.network, rows, 3, 5)
        assert isinstance(own, decoding.Decoder) == fast
        position, keep = rows.positions[:, -1].repeat_interleave(3), torch.tensor([0, 2, 5, 7, 11])
        token = torch.arange(12) + 20
        for t in range(5):
            if t == 2:
                own.select(keep)
                through.select(keep)
                position, token = position[keep], token[keep]
            position = position + 1
            torch.testing.assert_close(own.step(token, position), through.step(token, position), rtol=1e-5, atol=1e-5)


def test_the_decoder_leaves_what_it_does_not_know_alone() -> None:
    from peft import LoraConfig, get_peft_model

    def mistral(window: int | None) -> transformers.MistralForCausalLM:
        return transformers.MistralForCausalLM(transformers.MistralConfig(**nets.COMMON, sliding_window=window))

    assert decoding.like_llama(mistral(None))
    assert not decoding.like_llama(mistral(8))
    adapted = get_peft_model(nets.network("llama"), LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM"))
    assert not decoding.like_llama(adapted)
    other = nets.network("llama")
    other.config.hidden_act = "gelu"
    assert not decoding.like_llama(other)


@pytest.mark.filterwarnings("ignore:mamba keeps a state")
def test_a_network_with_a_state_is_sampled_by_generate() -> None:
    """Prompts of unlike lengths, none of them padded; it says so; the same generator gives the same tokens."""
    torch.manual_seed(0)
    network = transformers.MambaForCausalLM(
        transformers.MambaConfig(
            vocab_size=128, hidden_size=32, num_hidden_layers=2, pad_token_id=0, eos_token_id=1, bos_token_id=None
        )
    ).eval()
    model = Model(network, tiny.tokenizer(), 1, 0)
    with pytest.warns(UserWarning, match=r"mamba keeps a state .* sampled by model.generate"):
        done = generation.generate(model, PROMPTS, 3, Sampling(12, temperature=1.3), seeded())
    assert generation.mismatch(model, PROMPTS, done, 1.3) < 1e-4
    assert generation.mismatch(model, PROMPTS, done, 1.0) > 1e-3
    assert done.tokens() == generation.generate(model, PROMPTS, 3, Sampling(12, temperature=1.3), seeded()).tokens()
    greedy = generation.generate(model, PROMPTS, 1, Sampling(12, temperature=0.0), seeded()).tokens()
    for prompt, found in zip(PROMPTS, greedy, strict=True):
        ids = list(prompt)
        for token in found:
            with torch.no_grad():
                assert int(network(torch.tensor([ids])).logits[0, -1].argmax()) == token
            ids.append(token)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2"])
def test_the_trainer_sees_the_samplers_log_probabilities(name: str) -> None:
    model = nets.model(name)
    done = generation.generate(model, PROMPTS, 4, Sampling(12, temperature=1.3), seeded())
    assert generation.mismatch(model, PROMPTS, done, 1.3) < 1e-4
    assert generation.mismatch(model, PROMPTS, done, 1.0) > 1e-2  # it is a meter: another policy shows


def test_what_is_no_token_is_padding() -> None:
    """Also in rows that have ended but not yet left: one of 48 does not pay for copying the others."""
    model = nets.model()
    how = Sampling(12, temperature=3.0)
    long = generation.generate(model._replace(eos=-1), PROMPTS, 12, how, seeded())
    eos = int(long.ids.flatten().mode().values)
    done = generation.generate(model._replace(eos=eos, pad=127), PROMPTS, 12, how, seeded())
    lengths = done.response.sum(1).tolist()
    assert len(set(lengths)) > 3
    assert [row.index(eos) + 1 if eos in row else 12 for row in long.ids.tolist()] == lengths
    assert bool((done.ids[~done.response] == 127).all())
    assert bool((done.logp_behavior[~done.response] == 0).all())
    assert bool((done.ids == long.ids)[done.response].all())


def test_every_completion_comes_as_often_as_it_should() -> None:
    """20,000 samples of a language of 15 completions: chi-square, 14 degrees of freedom, below its 0.999 quantile."""
    from scipy import stats

    model = nets.tabular()
    done = generation.generate(model, [[2, 3]], 20_000, Sampling(nets.LENGTH), seeded(1))
    counts = dict.fromkeys(map(tuple, nets.COMPLETIONS), 0)
    for tokens in done.tokens():
        counts[tuple(tokens)] += 1
    batch = batching.pad([[2, 3]] * 15, nets.COMPLETIONS, 0)
    with torch.no_grad():
        p = models.log_probs(model.network, batch).sum(1).exp()
    assert float(p.sum()) == pytest.approx(1, abs=1e-9)
    expected = 20_000 * p.numpy()
    observed = [counts[tuple(completion)] for completion in nets.COMPLETIONS]
    assert stats.chisquare(observed, expected * sum(observed) / expected.sum()).pvalue > 1e-3
    assert bool((done.finished == torch.tensor([t[-1] == 1 for t in done.tokens()])).all())


def test_a_row_does_not_depend_on_the_others() -> None:
    """With the same uniform numbers a prompt alone gets the completion that it gets among others."""
    model = nets.model()
    together = generation.generate(model, PROMPTS, 1, Sampling(12), seeded(3)).tokens()
    uniform = torch.rand(4, 12, generator=seeded(3), dtype=torch.float64)
    for i, prompt in enumerate(PROMPTS):
        ids, expected = [*prompt], []
        for t in range(12):
            with torch.no_grad():
                logits = model.network(torch.tensor([ids])).logits[:, -1]
            token = int(generation.draw(logits, uniform[i, t : t + 1], Sampling())[0])
            ids.append(token)
            expected.append(token)
            if token == model.eos:
                break
        assert together[i] == expected


def test_filters_leave_what_they_should() -> None:
    logp = torch.tensor([[0.1, 0.4, 0.2, 0.3]]).log()
    kept = lambda **how: (generation.filtered(logp, Sampling(**how))[0] > -1e9).nonzero().flatten().tolist()  # noqa: E731
    assert kept(top_k=2) == [1, 3]
    assert kept(top_p=0.5) == [1, 3]
    assert kept(top_p=0.4) == [1]
    assert kept(min_p=0.49) == [1, 2, 3]
    assert kept(top_k=3, min_p=0.6) == [1, 3]
    assert kept(top_p=0.0) == [1]


def test_a_draw_inverts_the_distribution_function() -> None:
    """p = (¼, 0, ¾): u below ¼ is the first token, the impossible one never comes, u → 1 is the last."""
    logits = torch.tensor([[0.25, 0.0, 0.75]]).log().expand(5, 3)
    uniform = torch.tensor([0.0, 0.2499, 0.25, 0.5, 1 - 1e-16], dtype=torch.float64)
    token, logp = generation.draw(logits, uniform, Sampling())
    assert token.tolist() == [0, 0, 2, 2, 2]
    torch.testing.assert_close(logp.exp(), torch.tensor([0.25, 0.25, 0.75, 0.75, 0.75]))


@pytest.mark.parametrize(
    ("changes", "words"),
    [({"temperature": -1.0}, "temperature is -1.0"), ({"top_p": 1.5}, "top_p is 1.5"), ({"max_new_tokens": 0}, "is 0")],
)
def test_settings_are_checked(changes: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Sampling(**changes)


def test_completions_of_a_group_stand_together() -> None:
    model = nets.model()
    done = generation.generate(model, PROMPTS, 3, Sampling(6), seeded())
    assert done.ids.shape[0] == 12
    greedy = generation.generate(model, PROMPTS, 3, Sampling(6, temperature=0.0), seeded()).tokens()
    for prompt in range(4):
        assert len({tuple(row) for row in greedy[3 * prompt : 3 * prompt + 3]}) == 1
    assert any(a != b for a, b in itertools.pairwise(greedy[::3]))


def test_what_was_sampled_is_learned_from_where_text_would_be_read_otherwise() -> None:
    """A tokenizer that reads "ab" as one token: sampled a, b are text that comes back as something else."""
    from tokenizers import Tokenizer, decoders
    from tokenizers import models as tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {"<pad>": 0, "<eos>": 1, "a": 2, "b": 3, "ab": 4}
    fast = Tokenizer(tokenizers.BPE(words, [("a", "b")]))
    fast.decoder = decoders.Fuse()
    reader = PreTrainedTokenizerFast(tokenizer_object=fast, pad_token="<pad>", eos_token="<eos>")
    torch.manual_seed(0)
    network = transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**nets.COMMON, "vocab_size": 5})).eval()
    model = Model(network, reader, 1, 0)
    done = generation.generate(model, [[2, 3]], 256, Sampling(8), seeded())
    again = [reader(reader.decode(row))["input_ids"] for row in done.tokens()]
    assert sum(a != b for a, b in zip(done.tokens(), again, strict=True)) > 10
    rows = [{"prompt": "ab", "answer": ""}] * 256
    completions = done.tokens()
    data = rollout.Rollout(
        rows, [[2, 3]] * 256, completions, done.response, done.finished, done.logp_behavior,
        torch.zeros(256, dtype=torch.float64), {},
    )  # fmt: skip
    for batch in rollout.batches(data, list(range(256)), model, 4096):
        for k, i in enumerate(batch.rows):
            assert batch.sequences.ids[k][batch.sequences.response[k]].tolist() == completions[i]
    assert generation.mismatch(model, [[2, 3]], done, 1.0) < 1e-4
