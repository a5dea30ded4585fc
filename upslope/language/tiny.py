"""A small model, its tokenizer and verifiable tasks, made on the spot: every command runs offline and really learns.

Nothing is downloaded. The model is a Llama of under a million parameters, random until it is trained; the tokenizer
has one token a character. A task draws (prompt, answer) pairs; a tenth of its prompts, by hash, is held out.
"""

import hashlib
import random
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

CHARACTERS = "\n" + "".join(chr(code) for code in range(32, 127))
PAD, EOS, UNKNOWN = "<pad>", "<eos>", "<unk>"
ROLES = ("<|system|>", "<|user|>", "<|assistant|>")
TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
HELD_OUT = 10  # one prompt in this many


def tokenizer() -> Any:
    """One token a character, with a chat template.

    >>> tokenizer()("12+7=")["input_ids"]
    [24, 25, 18, 30, 36]
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: i for i, word in enumerate((PAD, EOS, UNKNOWN, *ROLES, *CHARACTERS))}
    fast = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    fast.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    fast.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=fast, pad_token=PAD, eos_token=EOS, unk_token=UNKNOWN,
        additional_special_tokens=list(ROLES), chat_template=TEMPLATE, clean_up_tokenization_spaces=False,
    )  # fmt: skip


def model(seed: int, vocab_size: int = 128) -> Any:
    """A random Llama: 4 layers of width 128, 4 heads, MLP 384, input and output embeddings of their own."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=vocab_size, hidden_size=128, intermediate_size=384, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=512, tie_word_embeddings=False, pad_token_id=0,
        bos_token_id=None, eos_token_id=1,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config).eval()


class Task(NamedTuple):
    """A source of problems whose answers can be checked."""

    draw: Callable[[random.Random], tuple[str, str]]  # -> prompt, answer
    reward: Callable[[str, str, str], float]  # (prompt, completion, answer) -> reward
    steps: Callable[[str, str, int], list[tuple[int, float]]] | None = None  # (completion, answer, tokens) -> steps


def exact(prompt: str, completion: str, answer: str) -> float:
    """1 for the answer and nothing else."""
    return float(completion == answer)


def countdown(prompt: str, completion: str, answer: str) -> float:
    """1 for an expression of + and - that uses the given numbers once each and makes the target; read, never run.

    >>> countdown("3 5 9:7=", "9-5+3", ""), countdown("3 5 9:7=", "7", "")
    (1.0, 0.0)
    """
    numbers, target = prompt.rstrip("=").split(":")
    terms = completion.replace("-", "+-").split("+")
    if not all(term.lstrip("-").isdigit() and term.count("-") <= 1 and term.isascii() for term in terms):
        return 0.0
    used = sorted(abs(int(term)) for term in terms)
    return float(used == sorted(map(int, numbers.split())) and sum(map(int, terms)) == int(target))


def letters(completion: str, answer: str, tokens: int) -> list[tuple[int, float]]:
    """Every letter is a step, and so is the end: 1 where it is the answer's.

    >>> letters("bxd", "bcd", 4)
    [(0, 1.0), (1, 0.0), (2, 1.0), (3, 1.0)]
    """
    plain = tokens - len(completion) in (0, 1)  # else there were special tokens in between
    return [(t, float(plain and completion[t : t + 1] == answer[t : t + 1])) for t in range(tokens)]


def _letters(source: random.Random, low: int, high: int) -> str:
    return "".join(source.choice("abcdefghij") for _ in range(source.randint(low, high)))


def _addition(source: random.Random) -> tuple[str, str]:
    a, b = source.randint(0, 99), source.randint(0, 99)
    return f"{a}+{b}=", str(a + b)


def _sorting(source: random.Random) -> tuple[str, str]:
    word = _letters(source, 3, 6)
    return f"sort {word}:", "".join(sorted(word))


def _reversing(source: random.Random) -> tuple[str, str]:
    word = _letters(source, 3, 6)
    return f"reverse {word}:", word[::-1]


def _copying(source: random.Random) -> tuple[str, str]:
    letter, count = source.choice("abcdefghij"), source.randint(1, 9)
    return f"{count}{letter}:", letter * count


def _shifting(source: random.Random) -> tuple[str, str]:
    word = _letters(source, 10, 12)
    return f"shift {word}:", "".join("abcdefghij"["abcdefghij".index(letter) - 9] for letter in word)


def _countdown(source: random.Random) -> tuple[str, str]:
    numbers = [source.randint(1, 9) for _ in range(3)]
    signs = [1, *(source.choice((1, -1)) for _ in range(2))]
    order = source.sample(numbers, 3)
    text = str(order[0]) + "".join(("+" if s > 0 else "-") + str(n) for s, n in zip(signs[1:], order[1:], strict=True))
    target = sum(s * n for s, n in zip(signs, order, strict=True))
    return f"{' '.join(map(str, numbers))}:{target}=", text


TASKS: dict[str, Task] = {
    "addition": Task(_addition, exact),
    "sorting": Task(_sorting, exact),
    "reversing": Task(_reversing, exact),
    "copying": Task(_copying, exact),
    "shifting": Task(_shifting, exact, letters),
    "countdown": Task(_countdown, countdown),
}

VOWEL, LENGTH = 1.0, -0.25  # of the known reward: per vowel, per character


def vowels(completion: str) -> float:
    """The known reward of the task `preferences`: 1 per vowel, -1/4 per character.

    >>> vowels("abe")
    1.25
    """
    return VOWEL * sum(letter in "aeiou" for letter in completion) + LENGTH * len(completion)


def draw(task: str, count: int, seed: int, held_out: bool = False) -> list[dict[str, Any]]:
    """Rows of a task: prompt, completion, answer; of `preferences`: prompt, chosen, rejected and their rewards.

    Raises:
        ValueError: an unknown task.
    """
    if task == "preferences":
        return _preferences(count, seed, held_out)
    if task not in TASKS:
        raise ValueError(f"task is {task!r}, allowed: {', '.join([*TASKS, 'preferences'])}")
    source = random.Random(f"{task}/{seed}/{held_out}")
    rows: list[dict[str, Any]] = []
    while len(rows) < count:
        prompt, answer = TASKS[task].draw(source)
        if _is_held_out(prompt) == held_out:
            rows.append({"prompt": prompt, "completion": answer, "answer": answer})
    return rows


def _preferences(count: int, seed: int, held_out: bool) -> list[dict[str, Any]]:
    """Pairs of random words, the better one drawn by Bradley and Terry's model of `vowels`."""
    source = random.Random(f"preferences/{seed}/{held_out}")
    rows: list[dict[str, Any]] = []
    while len(rows) < count:
        prompt = f"{_letters(source, 3, 3)}:"
        if _is_held_out(prompt) != held_out:
            continue
        a, b = _letters(source, 1, 8), _letters(source, 1, 8)
        margin = vowels(a) - vowels(b)
        first = source.random() < float(torch.sigmoid(torch.tensor(margin, dtype=torch.float64)))
        chosen, rejected = (a, b) if first else (b, a)
        rows.append({"prompt": prompt, "chosen": chosen, "rejected": rejected})
    return rows


def _is_held_out(prompt: str) -> bool:
    return hashlib.sha256(prompt.encode()).digest()[0] % HELD_OUT == 0
