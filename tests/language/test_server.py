"""A server that samples: real sockets and JSON, answered by our own sampling in the words of vLLM and of SGLang."""

import json
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.language import nets
from tests.program import upslope
from upslope.language import generation, grpo, models, prompts, tiny
from upslope.language.generation import Sampling
from upslope.language.models import Model
from upslope.language.server import Engine
from upslope.runs import run as runs

PROMPTS = [[5, 6, 7, 8], [9, 10], [11, 12, 13, 14, 15, 16], [9]]


class Server:
    """Serves a model; `spoil` may change an answer before it is sent."""

    def __init__(self, model: Model) -> None:
        self.model, self.asked, self.spoil = model, [], lambda path, answer: answer
        self.status, self.raw, self.lock = 200, None, threading.Lock()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with outer.lock:
                    outer.asked.append((self.path, body))
                    answer = outer.spoil(self.path, ANSWERS[self.path](outer, body))
                sent = json.dumps(answer).encode() if outer.raw is None else outer.raw
                self.send_response(outer.status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(sent)))
                self.end_headers()
                self.wfile.write(sent)

            def log_message(self, *_: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.handle_error = lambda *_: None  # a client that did not wait
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        self.thread = threading.Thread(target=self.server.serve_forever, daemon=True)
        self.thread.start()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()

    def complete(self, prompt: list[int], count: int, sampling: Sampling, seed: int, eos: int) -> list[tuple]:
        made = generation.generate(
            self.model._replace(eos=eos), [prompt], count, sampling, torch.Generator().manual_seed(seed)
        )
        lengths = made.response.sum(1).tolist()
        return [(ids[:n].tolist(), logps[:n].tolist()) for ids, logps, n in zip(made.ids, made.logp_behavior, lengths)]


def _sampling(body: dict, limit: str) -> Sampling:
    return Sampling(body[limit], body["temperature"], max(0, body["top_k"]), body["top_p"], body["min_p"])


def vllm(server: Server, body: dict) -> dict:
    """/v1/completions as vLLM has it: the end of sequence among the tokens."""
    (eos,) = body["stop_token_ids"]
    found = server.complete(body["prompt"], body["n"], _sampling(body, "max_tokens"), body["seed"], eos)
    assert body["return_token_ids"]
    assert body["ignore_eos"]
    assert body["logprobs"] == 0  # of what was sampled, of nothing else
    assert body["n"] == 1 or body["temperature"] > 0, "n must be 1 when using greedy sampling"
    return {
        "object": "text_completion",
        "choices": [
            {
                "index": i, "text": "".join(map(str, tokens)), "token_ids": tokens,
                "finish_reason": "stop" if tokens[-1] == eos else "length",
                "logprobs": {"token_logprobs": logps, "tokens": [f"token_id:{token}" for token in tokens]},
            }
            for i, (tokens, logps) in enumerate(found)
        ],
    }  # fmt: skip


def sglang(server: Server, body: dict) -> list | dict:
    """/generate as SGLang has it: a list of answers, or the answer where one is asked for."""
    how = body["sampling_params"]
    (eos,) = how["stop_token_ids"]
    assert body["return_logprob"]
    found = server.complete(body["input_ids"], how["n"], _sampling(how, "max_new_tokens"), 0, eos)
    answers = [
        {
            "text": "", "output_ids": tokens,
            "meta_info": {"output_token_logprobs": [[p, t, None] for t, p in zip(tokens, logps)]},
        }
        for tokens, logps in found
    ]  # fmt: skip
    return answers if len(answers) > 1 else answers[0]


def read_again(server: Server, body: dict) -> dict:
    """SGLang reads the weights of a folder."""
    server.model = models.load(models.Config(body["model_path"], device="cpu"), 0)
    return {"success": True, "message": "Succeeded to update model weights."}


ANSWERS: dict[str, Callable[[Server, dict], Any]] = {
    "/v1/completions": vllm,
    "/generate": sglang,
    "/update_weights_from_disk": read_again,
    "/collective_rpc": lambda server, body: {"results": [None]},
    "/reset_prefix_cache": lambda server, body: None,
}


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    server = Server(nets.model())
    yield server
    server.close()


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("kind", ["vllm", "sglang"])
def test_greedy_tokens_and_log_probabilities_are_the_models_own(served: Server, kind: str) -> None:
    """Through JSON: prompts of four lengths, ends at different times, the same ids and log-probabilities."""
    early = generation.generate(served.model, PROMPTS, 1, Sampling(12, temperature=0.0), seeded()).tokens()[0][3]
    for eos in (1, early):
        model = served.model._replace(eos=eos)
        how = Sampling(12, temperature=0.0, engine=Engine(served.url, kind))
        own = generation.generate(model, PROMPTS, 2, replace(how, engine=Engine()), seeded())
        found = generation.generate(model, PROMPTS, 2, how, seeded())
        assert found.tokens() == own.tokens()
        assert torch.equal(found.finished, own.finished)
        assert torch.equal(found.response, own.response)
        torch.testing.assert_close(found.logp_behavior, own.logp_behavior, rtol=0, atol=1e-5)
    assert early in [row[-1] for row in found.tokens()]


@pytest.mark.parametrize("kind", ["vllm", "sglang"])
def test_what_is_sampled_is_the_policys(served: Server, kind: str) -> None:
    """The meter reads what it reads of our own samples; prompts and settings arrive as they were given."""
    engine = Engine(served.url, kind)
    done = generation.generate(served.model, PROMPTS, 4, Sampling(12, temperature=1.3, engine=engine), seeded())
    assert generation.mismatch(served.model, PROMPTS, done, 1.3) < 1e-4
    assert generation.mismatch(served.model, PROMPTS, done, 1.0) > 1e-2
    assert len({tuple(row) for row in done.tokens()[:4]}) > 1
    sent = [body["prompt" if kind == "vllm" else "input_ids"] for _, body in served.asked]
    assert sorted(sent) == sorted(PROMPTS)
    generation.generate(served.model, PROMPTS[:1], 3, Sampling(5, 0.7, 6, 0.8, 0.1, engine), seeded())
    _, body = served.asked[-1]
    how = body if kind == "vllm" else body["sampling_params"]
    limit = "max_tokens" if kind == "vllm" else "max_new_tokens"
    wanted = {limit: 5, "temperature": 0.7, "top_k": 6, "top_p": 0.8, "min_p": 0.1, "n": 3}
    assert {name: how[name] for name in wanted} == wanted


def test_seeds_come_from_the_generator(served: Server) -> None:
    """vLLM takes a seed with each prompt: the same generator gives the same completions, another gives others."""
    how = Sampling(12, engine=Engine(served.url, model="policy"))
    first, again, other = (generation.generate(served.model, PROMPTS, 3, how, seeded(s)).tokens() for s in (1, 1, 2))
    assert first == again
    assert first != other
    assert len({body["seed"] for _, body in served.asked[:4]}) == 4
    assert {body["model"] for _, body in served.asked} == {"policy"}


def test_older_servers_name_tokens_by_their_ids(served: Server) -> None:
    how = Sampling(12, temperature=0.0, engine=Engine(served.url))
    own = generation.generate(served.model, PROMPTS, 1, replace(how, engine=Engine()), seeded()).tokens()

    def without(path: str, answer: dict) -> dict:
        for choice in answer["choices"]:
            del choice["token_ids"]
        return answer

    served.spoil = without
    assert generation.generate(served.model, PROMPTS, 1, how, seeded()).tokens() == own


def change(**parts: Any) -> Callable[[str, dict], dict]:
    """A spoiled first choice of vLLM's answer."""

    def spoil(path: str, answer: dict) -> dict:
        choice = answer["choices"][0]
        for name, value in parts.items():
            (choice["logprobs"] if name in choice["logprobs"] else choice)[name] = value
        return answer

    return spoil


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda path, answer: {"choices": answer["choices"][:1]}, r"gave 1 completions of prompt 0, asked for were 2"),
        (lambda path, answer: {"choices": [{"text": "ab"}] * 2}, r"no choices with log-probabilities: .*\"ab\""),
        (lambda path, answer: {"error": "busy"}, r"no choices with log-probabilities: .*busy"),
        (lambda path, answer: [1], r"no choices with log-probabilities: \[1\]"),
        (change(token_ids=None, tokens=["a", "b"]), r"gave text but no token ids: .* allowed: a server that knows"),
        (change(token_ids=[5, 1], token_logprobs=[-0.5, float("nan")]), r"prompt 0: the log-.* of token 1 is nan"),
        (change(token_ids=[5, 1], token_logprobs=[None, -0.5]), r"prompt 0: the log-.* of token 5 is None"),
        (change(token_ids=[5, 128], token_logprobs=[-1, -1]), r"token 128, allowed: 0 to 127; is it another model"),
        (change(token_ids=[5, 1], token_logprobs=[-1]), r"2 tokens with 1 log-probabilities; allowed: 1 to 6"),
        (change(token_ids=[], token_logprobs=[]), r"0 tokens with 0 log-probabilities; allowed: 1 to 6"),
        (change(token_ids=[5] * 7, token_logprobs=[-1.0] * 7), r"7 tokens with 7 .* allowed: 1 to 6"),
        (
            change(token_ids=[5, 6], token_logprobs=[-1, -1]),
            r"2 of at most 6 tokens that end in 6; allowed: .* first 1",
        ),
        (
            change(token_ids=[1, 1], token_logprobs=[-1, -1]),
            r"2 of at most 6 tokens that end in 1; allowed: .* first 1",
        ),
    ],
)
def test_an_answer_that_is_no_completion_is_refused(served: Server, spoil: Callable, words: str) -> None:
    served.spoil = spoil
    with pytest.raises(ValueError, match=words):
        generation.generate(served.model, PROMPTS[:1], 2, Sampling(6, engine=Engine(served.url)), seeded())


def test_sglang_without_log_probabilities_is_refused(served: Server) -> None:
    served.spoil = lambda path, answer: {"text": "ab", "meta_info": {}}
    with pytest.raises(ValueError, match=r"/generate gave no log-probabilities of token ids: .*\"ab\""):
        generation.generate(served.model, PROMPTS, 1, Sampling(6, engine=Engine(served.url, "sglang")), seeded())


def test_what_http_says_is_said(served: Server) -> None:
    how = Sampling(6, engine=Engine(served.url, model="other"))
    served.status, served.raw = 404, b'{"message": "The model `other` does not exist."}'
    with pytest.raises(ValueError, match=r"/v1/completions answered 404: .*The model `other` does not exist"):
        generation.generate(served.model, PROMPTS, 1, how, seeded())
    served.status, served.raw = 500, b"Internal Server Error"
    with pytest.raises(ValueError, match="answered 500: Internal Server Error"):
        generation.generate(served.model, PROMPTS, 1, how, seeded())
    served.status, served.raw = 200, b"<html>a gateway" + b"." * 300
    with pytest.raises(ValueError, match=r"something else than JSON: <html>a gateway\.{185}…$"):
        generation.generate(served.model, PROMPTS, 1, how, seeded())


def test_a_server_that_is_not_there_or_silent(served: Server) -> None:
    served.spoil = lambda path, answer: threading.Event().wait(0.5)
    with pytest.raises(ValueError, match=r"did not answer \(timed out\): is the server running"):
        generation.generate(served.model, PROMPTS, 1, Sampling(6, engine=Engine(served.url, timeout=0.05)), seeded())
    silent = Server(served.model)
    silent.close()
    with pytest.raises(ValueError, match=r"did not answer \(.*refused\): is the server running"):
        generation.generate(served.model, PROMPTS, 1, Sampling(6, engine=Engine(silent.url)), seeded())


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"url": "localhost:8000"}, "engine.url is 'localhost:8000', allowed: http://HOST:PORT"),
        ({"weights": Path("w")}, "engine.weights is 'w', but engine.url is None"),
        ({"timeout": 0.0}, "timeout is 0.0"),
    ],
)
def test_settings_are_checked(arguments: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Engine(**arguments)


def test_training_needs_a_server_that_follows(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"sampling.engine.weights is None; for training allowed: the folder"):
        grpo.GRPO(sampling=Sampling(engine=Engine("http://127.0.0.1:1")))
    result = upslope(
        "train", "grpo", "--sampling.engine.url", "http://127.0.0.1:1", "--sampling.engine.weights", tmp_path / "w",
        "--sampling.engine.kind", "sglang", "--quiet", "--run-dir", tmp_path / "run",
    )  # fmt: skip
    assert result.returncode == 2
    assert "update_weights_from_disk did not answer" in " ".join(result.stderr.split())


def test_the_server_samples_from_the_weights_as_they_are(served: Server, tmp_path: Path) -> None:
    """Trained by GRPO through a server: after every update it serves the new weights, and the meter stays at 0."""
    engine = Engine(served.url, "sglang", weights=tmp_path / "served")
    config = grpo.GRPO(
        data=prompts.Config("task:copying", 32), sampling=Sampling(4, engine=engine), batch_size=2, group_size=4,
        total_steps=3, optimizer=grpo.AdamW(learning_rate=1e-2),
        run=runs.Config(quiet=True, run_dir=tmp_path / "run"),
    )  # fmt: skip
    reward = tmp_path / "reward.py"
    reward.write_text("def f(completion_ids, **_):\n    return [float(ids[0]) for ids in completion_ids]\n")
    trained = grpo.train(replace(config, reward=f"{reward}:f"))
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    told = [body for path, body in served.asked if path == "/update_weights_from_disk"]
    assert told == [{"model_path": str(tmp_path / "served"), "flush_cache": True}] * 3
    assert max(row["mismatch"] for row in rows) < 1e-4
    last = models.load(models.Config(str(engine.weights)), 0)  # of the last batch: before the last update
    served.model = tiny_model(0)
    stale = Sampling(4, engine=replace(engine, weights=None))
    done = generation.generate(trained, PROMPTS, 4, stale, seeded())
    assert generation.mismatch(trained, PROMPTS, done, 1.0) > 1e-3  # it is a meter: weights of before show
    assert not torch.equal(*(m.network.lm_head.weight for m in (last, trained)))


def tiny_model(seed: int) -> Model:
    return Model(tiny.model(seed), tiny.tokenizer(), 1, 0)


def test_vllm_is_told_to_read_again_and_forget(served: Server, tmp_path: Path) -> None:
    """The weights are in the folder before it is told; its cache of prompts belongs to the old ones."""
    there = []
    served.spoil = lambda path, answer: there.append((path, (tmp_path / "w" / "model.safetensors").exists())) or answer
    how = Sampling(4, temperature=0.0, engine=Engine(served.url, weights=tmp_path / "w"))
    generation.generate(served.model, PROMPTS[:1], 1, how, seeded())
    assert there == [("/collective_rpc", True), ("/reset_prefix_cache", True), ("/v1/completions", True)]
    assert served.asked[0][1] == {"method": "reload_weights"}


def test_weights_go_nowhere_that_matters(served: Server, tmp_path: Path) -> None:
    """A folder with something else in it, the model itself; a server that could not read them."""

    def ask(model: Model, folder: Path) -> None:
        how = Sampling(4, engine=Engine(served.url, "sglang", weights=folder))
        generation.generate(model, PROMPTS, 1, how, seeded())

    (tmp_path / "thesis.tex").write_text("ten years")
    with pytest.raises(ValueError, match="which holds no model; allowed: a folder that may be replaced"):
        ask(served.model, tmp_path)
    assert (tmp_path / "thesis.tex").exists()
    models.save(served.model.network, served.model.tokenizer, tmp_path / "model")
    loaded = models.load(models.Config(str(tmp_path / "model"), device="cpu"), 0)
    with pytest.raises(ValueError, match="the model that is trained itself; allowed: a copy of it"):
        ask(loaded, tmp_path / "model")
    served.spoil = lambda path, answer: {"success": False, "message": "no room"}
    with pytest.raises(ValueError, match=r"update_weights_from_disk did not succeed: .*no room"):
        ask(loaded, tmp_path / "copy")
