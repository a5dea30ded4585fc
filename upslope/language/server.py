"""A server that samples in the model's place: vLLM by OpenAI's /v1/completions, SGLang by its /generate.

Token-in, token-out: prompts go as ids, and a server that does not return ids is refused, as its text, tokenised again,
may be other tokens. Where training gives it a folder for the weights, they are written there and the server is told
to read them before every batch; what it sampled from is then the model as it is, up to the server's own arithmetic.
"""

import http.client
import json
import math
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from upslope.language import models
from upslope.language.models import Model
from upslope.runs import settings

CONNECTIONS = 64  # prompts that are asked for at once; the server makes batches of them
Sampled = tuple[list[int], list[float]]  # a completion's tokens and their log-probabilities


@dataclass(frozen=True)
class Engine:
    """Which server samples, if any."""

    url: str | None = None  # http://HOST:PORT; None: the model itself samples
    kind: Literal["vllm", "sglang"] = "vllm"  # whose protocol it speaks
    model: str | None = None  # the name it serves the model by (vllm); None: the only one
    weights: Path | None = None  # the folder it was started on: every batch's weights are written there and read again
    timeout: float = 600.0  # seconds that it may be silent

    def __post_init__(self) -> None:
        settings.positive(self, "timeout")
        if self.url is not None and not self.url.startswith(("http://", "https://")):
            raise ValueError(f"engine.url is {self.url!r}, allowed: http://HOST:PORT or https://HOST:PORT")
        if self.url is None and self.weights is not None:
            raise ValueError(f"engine.weights is '{self.weights}', but engine.url is None: no server could read them")


def sample(
    engine: Engine,
    model: Model,
    prompts: Sequence[Sequence[int]],
    group: int,
    how: Mapping[str, float],
    generator: torch.Generator,
) -> list[Sampled]:
    """`group` completions of every prompt, those of a prompt one after the other.

    Args:
        engine: which server.
        model: whose end of sequence ends a completion, and whose weights the server gets where it has a folder.
        prompts: tokens of each.
        group: completions a prompt.
        how: max_new_tokens, temperature, top_k (-1: all), top_p, min_p.
        generator: of a seed for each prompt, which vLLM takes.

    Raises:
        ValueError: no server, no such model, or an answer that is no completion of the prompt in tokens.
    """
    if engine.weights is not None:
        follow(engine, engine.weights, model)
    seeds = torch.randint(2**31, (len(prompts),), generator=generator).tolist()
    ask, alike = (_vllm if engine.kind == "vllm" else _sglang), how["temperature"] == 0
    asked = 1 if alike else group  # greedy completions are all the same, and vLLM refuses to give more than one

    def one(prompt: Sequence[int], seed: int) -> list[Sampled]:
        return ask(engine, list(prompt), asked, how, model.eos, seed)

    with ThreadPoolExecutor(CONNECTIONS) as pool:
        answers = list(pool.map(one, prompts, seeds))
    known, most = models.plain(model.network).get_input_embeddings().weight.shape[0], int(how["max_new_tokens"])
    for place, answer in enumerate(answers):
        if len(answer) != asked:
            raise ValueError(f"{engine.url} gave {len(answer)} completions of prompt {place}, asked for were {asked}")
        for completion in answer:
            _check(f"{engine.url}, prompt {place}", completion, known, most, model.eos)
    return [completion for answer in answers for completion in (answer * group if alike else answer)]


def follow(engine: Engine, folder: Path, model: Model) -> None:
    """Write the weights to the folder and have the server read them, its cache of prompts forgotten.

    Raises:
        ValueError: the folder holds something else than a copy of the model, or the server did not read it.
    """
    source = models.plain(model.network).config._name_or_path
    if source and folder.resolve() == Path(source).resolve():
        raise ValueError(f"engine.weights is '{folder}', the model that is trained itself; allowed: a copy of it")
    if folder.exists() and any(folder.iterdir()) and not (folder / "config.json").exists():
        raise ValueError(f"engine.weights is '{folder}', which holds no model; allowed: a folder that may be replaced")
    models.save(model.network, model.tokenizer, folder)
    if engine.kind == "vllm":
        _post(engine, "/collective_rpc", {"method": "reload_weights"})
        _post(engine, "/reset_prefix_cache", {})
        return
    answer = _post(engine, "/update_weights_from_disk", {"model_path": str(folder.resolve()), "flush_cache": True})
    if not (isinstance(answer, dict) and answer.get("success") is True):
        raise ValueError(f"{engine.url}/update_weights_from_disk did not succeed: {_short(answer)}")


def _vllm(
    engine: Engine, prompt: list[int], group: int, how: Mapping[str, float], eos: int, seed: int
) -> list[Sampled]:
    body = dict(how) | {
        "prompt": prompt, "n": group, "max_tokens": how["max_new_tokens"], "seed": seed, "logprobs": 0,
        "return_token_ids": True, "return_tokens_as_token_ids": True, "skip_special_tokens": False,
        "ignore_eos": True, "stop_token_ids": [eos],  # no other end of sequence than the one that is learned
    }  # fmt: skip
    del body["max_new_tokens"]
    answer = _post(engine, "/v1/completions", body if engine.model is None else body | {"model": engine.model})
    try:
        return [(_ids(engine, choice), choice["logprobs"]["token_logprobs"]) for choice in answer["choices"]]
    except (KeyError, TypeError) as error:
        raise ValueError(
            f"{engine.url}/v1/completions gave no choices with log-probabilities: {_short(answer)}"
        ) from error


def _ids(engine: Engine, choice: Mapping[str, Any]) -> list[int]:
    """What was sampled: `token_ids`, or tokens that are called "token_id:5" (vLLM before 0.10.2)."""
    if choice.get("token_ids") is not None:
        return choice["token_ids"]
    names = choice["logprobs"]["tokens"]
    if not all(isinstance(name, str) and name.startswith("token_id:") for name in names):
        raise ValueError(
            f"{engine.url}/v1/completions gave text but no token ids: tokenised again it may be other tokens than were "
            "sampled; allowed: a server that knows return_token_ids or return_tokens_as_token_ids, as vLLM does"
        )
    return [int(name.removeprefix("token_id:")) for name in names]


def _sglang(
    engine: Engine, prompt: list[int], group: int, how: Mapping[str, float], eos: int, seed: int
) -> list[Sampled]:
    parameters = dict(how) | {"n": group, "stop_token_ids": [eos], "skip_special_tokens": False}
    answer = _post(
        engine, "/generate", {"input_ids": prompt, "sampling_params": parameters, "return_logprob": True}
    )  # fmt: skip
    try:
        found = [
            each["meta_info"]["output_token_logprobs"] for each in (answer if isinstance(answer, list) else [answer])
        ]
        return [([token for _, token, *_ in each], [logp for logp, *_ in each]) for each in found]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{engine.url}/generate gave no log-probabilities of token ids: {_short(answer)}") from error


def _check(where: str, completion: Sampled, known: int, most: int, eos: int) -> None:
    """That it is a completion such as the model itself would have sampled."""
    tokens, logps = completion
    if not 1 <= len(tokens) <= most or len(tokens) != len(logps):
        raise ValueError(
            f"{where}: {len(tokens)} tokens with {len(logps)} log-probabilities; allowed: 1 to {most}, as many of both"
        )
    for token, logp in zip(tokens, logps, strict=True):
        if not (isinstance(token, int) and 0 <= token < known):
            raise ValueError(
                f"{where}: token {token!r}, allowed: 0 to {known - 1}; is it another model that is served?"
            )
        if not (isinstance(logp, int | float) and math.isfinite(logp)):
            raise ValueError(f"{where}: the log-probability of token {token} is {logp!r}, allowed: a finite number")
    if eos in tokens[:-1] or (tokens[-1] != eos and len(tokens) < most):
        raise ValueError(
            f"{where}: {len(tokens)} of at most {most} tokens that end in {tokens[-1]}; "
            f"allowed: to end at the first {eos}, the end of sequence, or at the limit"
        )


def _post(engine: Engine, path: str, body: Mapping[str, Any]) -> Any:
    """The server's answer, read from JSON; None where it is empty."""
    assert engine.url is not None
    where = engine.url.rstrip("/") + path
    request = urllib.request.Request(where, json.dumps(body).encode(), {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=engine.timeout) as answer:
            text = answer.read()
    except urllib.error.HTTPError as error:
        raise ValueError(f"{where} answered {error.code}: {_short(error.read().decode(errors='replace'))}") from error
    except (OSError, http.client.HTTPException) as error:  # refused, unknown host, silent for too long, cut off
        reason = getattr(error, "reason", error)
        raise ValueError(f"{where} did not answer ({reason}): is the server running?") from error
    try:
        return json.loads(text) if text.strip() else None
    except ValueError as error:
        raise ValueError(
            f"{where} answered with something else than JSON: {_short(text.decode(errors='replace'))}"
        ) from error


def _short(answer: Any) -> str:
    """The beginning of an answer, on one line."""
    text = answer if isinstance(answer, str) else json.dumps(answer)
    line = " ".join(text.split())
    return line if len(line) <= 200 else line[:200] + "…"
