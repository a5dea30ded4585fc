"""Several turns: credit by hand, exact gradients by enumeration, masks, splits, bad environments, resume, learning."""

import dataclasses
import functools
import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tests.language import nets
from tests.language.test_ppo import critic
from tests.program import fingerprint, succeed, upslope
from upslope.language import games, learner, models, prompts, turn_ppo, turns
from upslope.language.generation import Sampling
from upslope.language.learner import AdamW
from upslope.language.models import Model
from upslope.language.turn_ppo import TurnPPO, Whole
from upslope.language.turns import Conversations, Turn
from upslope.runs import run as runs
from upslope.runs.randomness import generator

OPENING = [2, 3]


def settings(**changes: Any) -> TurnPPO:
    config = TurnPPO(sampling=Sampling(2), whiten_advantages=False, run=runs.Config(seed=1))
    return dataclasses.replace(config, **changes)


def conversation(*several: tuple[list[int], list[int], float], cut: bool = False) -> list[Turn]:
    """Turns of (completion, observation, reward); the last terminates, or is cut."""
    last = len(several) - 1
    return [Turn(c, [0.0] * len(c), o, r, k == last and not cut, k == last and cut)
            for k, (c, o, r) in enumerate(several)]  # fmt: skip


THREE = conversation(([2, 1], [3], 0.5), ([3], [2, 2], -1.0), ([2, 3], [3, 3], 2.0))
TWO = conversation(([3, 1], [2], 1.0), ([2], [3], 0.25), cut=True)


def played(*several: list[Turn]) -> Conversations:
    return turns.stack([{}] * len(several), [OPENING] * len(several), list(several))


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 1.0), (0.9, 0.8), (0.7, 0.0)])
def test_credit_of_every_turn_by_hand(gamma: float, lam: float) -> None:
    """A terminated conversation of three turns and a truncated one of two, by a loop over numbers."""
    data = played(THREE, TWO)
    value = torch.tensor([[0.1, -0.4, 0.7], [0.3, 0.2, 9.0]], dtype=torch.float64)
    config = settings(gamma=gamma, gae_lambda=lam)
    psi, target = turn_ppo.credit(data.reward, value, torch.tensor([7.0, 0.6], dtype=torch.float64), data, config)
    for i, (rewards, v) in enumerate((([0.5, -1.0, 2.0], [0.1, -0.4, 0.7, 0.0]), ([1.0, 0.25], [0.3, 0.2, 0.6]))):
        running = 0.0
        for k in reversed(range(len(rewards))):
            running = rewards[k] + gamma * v[k + 1] - v[k] + gamma * lam * running
            assert float(psi[i, k]) == pytest.approx(running, abs=1e-12)
            assert float(target[i, k]) == pytest.approx(running + v[k], abs=1e-12)


def test_with_lambda_and_gamma_one_it_is_the_return_to_come_less_the_baseline() -> None:
    """And the first turn's is what the bandit gives to all: Σ r - V(opening); there the past is in it."""
    data = played(THREE, TWO)
    value, beyond = torch.randn(2, 3).double(), torch.tensor([5.0, 0.6], dtype=torch.float64)
    psi, _ = turn_ppo.credit(data.reward, value, beyond, data, settings(gae_lambda=1.0))
    to_come = torch.tensor([[1.5, 1.0, 2.0], [1.85, 0.85, 0.0]], dtype=torch.float64)
    torch.testing.assert_close(psi[data.valid], (to_come - value)[data.valid], rtol=0, atol=1e-12)
    bandit, target = turn_ppo.credit(data.reward, value, beyond, data, settings(credit="bandit"))
    torch.testing.assert_close(bandit, psi[:, :1].expand(2, 3))
    torch.testing.assert_close(target[:, 0], to_come[:, 0], rtol=0, atol=1e-12)


def test_where_the_models_tokens_lie() -> None:
    """Opening, two own, one answered, one own, two answered, two own; the last answer is not read."""
    data = played(THREE, TWO)
    assert data.turn.tolist() == [[0, 0, 1, 2, 2], [0, 0, 1, -1, -1]]
    assert data.first.tolist() == [[0, 2, 3], [0, 2, 0]]
    (batch,) = turns.batches(data, [0, 1], nets.tabular(), 4096)
    rows = dict(zip(batch.rows, zip(batch.sequences.ids.tolist(), batch.sequences.response.tolist(), strict=True)))
    assert rows[0][0] == [2, 3, 2, 1, 3, 3, 2, 2, 2, 3]
    assert rows[0][1] == [bool(x) for x in (0, 0, 1, 1, 0, 1, 0, 0, 1, 1)]
    assert rows[1][0][:7] == [2, 3, 3, 1, 2, 2, 3]  # a truncated one keeps what V goes on from
    assert rows[1][1] == [bool(x) for x in (0, 0, 1, 1, 0, 1, 0, 0, 0, 0)]


def test_values_are_those_before_a_turns_first_token() -> None:
    """Each from a forward pass of its own, the one beyond a truncation too; KL in the turn's reward."""
    model, other, judge = nets.tabular(0), nets.tabular(1), critic()
    data = played(THREE, TWO)
    config = settings(gamma=0.9, gae_lambda=0.8, kl_coef=0.3)
    given = turn_ppo.estimate(data, model, judge, other.network, config)
    for i, several in enumerate((THREE, TWO)):
        context, values, rewards = list(OPENING), [], []
        for turn in several:
            values.append(value_of(judge, context))
            kl = 0.0
            for token in turn.completion:
                kl += logp_of(model, context, token) - logp_of(other, context, token)
                context.append(token)
            rewards.append(turn.reward - 0.3 * kl)
            context += turn.observation
        values.append(value_of(judge, context) if several[-1].truncated else 0.0)
        running, place = 0.0, len(data.turn[i][data.turn[i] >= 0])
        for k in reversed(range(len(several))):
            running = rewards[k] + 0.9 * values[k + 1] - values[k] + 0.9 * 0.8 * running
            for _ in several[k].completion:
                place -= 1
                assert float(given.psi[i, place]) == pytest.approx(running, abs=1e-9)
            assert bool(given.begins[i, place])
            assert float(given.value_target[i, place]) == pytest.approx(running + values[k], abs=1e-9)
    assert int(given.begins.sum()) == 5
    assert int(turn_ppo.estimate(data, model, judge, None, settings(credit="bandit")).begins.sum()) == 2


def value_of(judge: models.Scorer, context: list[int]) -> float:
    ids = torch.tensor([context])
    everything = torch.ones_like(ids, dtype=torch.bool)
    with torch.no_grad():
        return float(judge(turns.Sequences(ids, everything, everything, torch.arange(ids.shape[1])[None]))[0, -1])


def logp_of(model: Model, context: list[int], token: int) -> float:
    with torch.no_grad():
        return float(model.network(torch.tensor([context])).logits[0, -1].log_softmax(-1)[token])


def every_game() -> list[list[Turn]]:
    """All games of two turns of one token in {1, 2, 3}; what is answered depends on the first, what is won on both."""
    found = []
    for a, b in itertools.product((1, 2, 3), repeat=2):
        found.append(conversation(([a], [4 - a, 2], 0.3 * a), ([b], [], float((a * b) % 5))))
    return found


def probabilities(model: Model) -> Tensor:
    """Of every game, from Transformers' logits, differentiable."""
    found = []
    for first, second in every_game():
        a, b = first.completion[0], second.completion[0]
        one = model.network(torch.tensor([OPENING])).logits[0, -1].log_softmax(-1)[a]
        context = torch.tensor([[*OPENING, a, *first.observation]])
        found.append((one + model.network(context).logits[0, -1].log_softmax(-1)[b]).exp())
    return torch.stack(found)


@pytest.mark.parametrize(
    ("changes", "exact"),
    [({"gae_lambda": 1.0}, True), ({"credit": "bandit"}, True), ({"gae_lambda": 0.0}, False)],
    ids=["λ=1", "bandit", "λ=0"],
)
def test_the_expected_gradient_is_exact(changes: dict[str, Any], exact: bool) -> None:
    """All nine games weighed by their probabilities against ∇ Σ p R: both credits are unbiased for any critic with
    λ = 1; with λ = 0 a wrong critic is a bias, and it shows."""
    model, judge, config = nets.tabular(), critic(), settings(**changes)
    data = played(*every_game())
    p = probabilities(model)
    assert float(p.detach().sum()) == pytest.approx(1.0)
    wanted = flat(torch.autograd.grad((p * data.reward.sum(1)).sum(), learned(model), allow_unused=True))
    given = turn_ppo.estimate(data, model, judge, None, config)
    given = given._replace(psi=given.psi * p.detach().unsqueeze(1))
    trained = nn.ModuleDict({"policy": model.network, "critic": judge})
    total = torch.zeros(()).double()
    for batch in turns.batches(data, range(9), model, 4096):
        total = total + turn_ppo.objective(trained, batch, given, Whole(1, 10**12), config)[0]
    ours = flat(torch.autograd.grad(total, learned(model), allow_unused=True))
    if exact:
        torch.testing.assert_close(ours, wanted, rtol=1e-8, atol=1e-10)
    else:
        assert float((ours - wanted).norm() / wanted.norm()) > 0.05


def learned(model: Model) -> list[Tensor]:
    return [p for p in model.network.parameters() if p.requires_grad]


def flat(gradients: Any) -> Tensor:
    return torch.cat([g.flatten() for g in gradients if g is not None])


def test_the_environments_tokens_have_no_gradient() -> None:
    """∂ objective / ∂ logits is 0 at every place but the one before a token of the model's."""
    model, judge, config = nets.tabular(), critic(), settings()
    data = played(THREE)
    given = turn_ppo.estimate(data, model, judge, None, config)
    seen: list[Tensor] = []

    def keep(_module: Any, _inputs: Any, out: Tensor) -> None:
        out.retain_grad()
        seen.append(out)

    model.network.model.norm.register_forward_hook(keep)
    trained = nn.ModuleDict({"policy": model.network, "critic": judge})
    (batch,) = turns.batches(data, [0], model, 4096)
    turn_ppo.objective(trained, batch, given, Whole(5, 3), config)[0].backward()
    predicts = batch.sequences.response[0, 1:]  # the last token predicts none and is not fed
    gradient = seen[0].grad
    assert gradient is not None
    assert predicts.tolist() == (gradient[0].abs().sum(-1) > 0).tolist()


def test_the_gradient_does_not_depend_on_the_split() -> None:
    gradients = []
    for tokens in (4096, 20, 1):
        model, judge = nets.tabular(), critic()
        config = settings(num_epochs=1, minibatches=1, micro_batch_tokens=tokens, whiten_advantages=True,
                          optimizer=AdamW(learning_rate=1e-300, max_grad_norm=None))  # fmt: skip
        data = played(THREE, TWO, *every_game())
        given = turn_ppo.estimate(data, model, judge, None, config)
        given = given._replace(logp_old=given.logp_old + 0.1 * data.response)  # ratios are not 1
        trained = nn.ModuleDict({"policy": model.network, "critic": judge})
        state = learner.State(trained, config.optimizer.build(models.trainable(trained).values()), 0, {})
        turn_ppo.update(state, model, data, given, config)
        gradients.append(torch.cat([q.grad.flatten() for q in trained.parameters() if q.grad is not None]))
    assert float(gradients[0].abs().max()) > 1e-3
    for each in gradients[1:]:
        torch.testing.assert_close(each, gradients[0], rtol=1e-9, atol=1e-10)


class Echo:
    """Answers with what it was told and an exclamation mark; over after three."""

    def reset(self, row: Any) -> str:
        self.count = 0
        return "12:"

    def step(self, completion: str) -> tuple[str, float, bool, bool]:
        self.count += 1
        return "!" * self.count, float(self.count), self.count == 3, False


def playing(make: Any, max_turns: int = 8, count: int = 3, new: int = 2, model: Model | None = None) -> Conversations:
    draw = lambda turn: torch.Generator().manual_seed(turn)  # noqa: E731
    return turns.play(model or nets.model(), make, [{"seed": 1}] * count, Sampling(new), max_turns, draw)


def test_a_played_conversation_keeps_its_tokens_and_the_samplers_numbers() -> None:
    """Answers are tokenised once; every log π is the trainer's to 1e-4, over all turns."""
    data, model = playing(Echo), nets.model()
    for several, reward in zip(data.turns, data.reward.tolist(), strict=True):
        assert [len(each.observation) for each in several] == [1, 2, 3]
        assert reward == [1.0, 2.0, 3.0]
        assert [each.terminated for each in several] == [False, False, True]
    ours = turns.log_probs(model.network, data, model, 1.0, 64)
    assert float((ours - data.logp_behavior).abs().max()) < 1e-4
    assert float(data.logp_behavior[data.response].max()) < 0


def test_the_limit_of_turns_truncates_and_the_others_leave() -> None:
    class Some(Echo):
        made = 0

        def __init__(self) -> None:
            Some.made += 1
            self.ends = Some.made

        def step(self, completion: str) -> tuple[str, float, bool, bool]:
            self.count += 1
            return "", 0.0, self.count == self.ends, False

    data = playing(Some, max_turns=2)
    assert [len(each) for each in data.turns] == [1, 2, 2]
    assert [each[-1].truncated for each in data.turns] == [False, False, True]
    assert data.terminated.tolist() == [[True, True], [False, True], [False, False]]


def broken(step: Any = ("", 0.0, True, False), reset: Any = "12:", error: Exception | None = None) -> Any:
    class Broken:
        def reset(self, row: Any) -> Any:
            return reset

        def step(self, completion: str) -> Any:
            if error is not None:
                raise error
            return step

    return Broken


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (broken(error=KeyError("x")), "conversation 0 could not step in turn 0: KeyError: 'x'; nothing was trained"),
        (broken(step=None), "turn 0: step returned None, allowed: \\(text, reward, terminated, truncated\\)"),
        (broken(step=(3, 0.0, True, False)), "the text 3, allowed: a str"),
        (broken(step=("", float("nan"), True, False)), "the reward nan, allowed: a finite number"),
        (broken(step=("", "1", True, False)), "the reward '1', allowed: a finite number"),
        (broken(step=("", 1.0, 1, False)), "terminated and truncated \\[1, False\\], allowed: bools"),
        (broken(reset=None), "reset returned NoneType, allowed: text or messages"),
        (broken(reset=""), "prompt is '': it has no tokens"),
        (broken(step=("x" * 70, 0.0, False, False)), r"before turn 1 and .* up to 2; the model's limit is 64"),
        (broken(step=("x" * 70, 0.0, False, True)), r"before turn 1 and .* up to 0; the model's limit is 64"),
        (lambda: 1 / 0, "conversation 0 could not be made: ZeroDivisionError"),
    ],
)  # fmt: skip
def test_what_an_environment_does_wrong_is_said(make: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        playing(make)


def test_environments_are_named(tmp_path: Path) -> None:
    assert turns.resolve("nim") is games.Nim
    file = tmp_path / "mine.py"
    file.write_text(
        "class Mine:\n    def reset(self, row):\n        return '1'\n"
        "    def step(self, completion):\n        return '', 1.0, True, False\n"
    )
    assert playing(turns.resolve(f"{file}:Mine")).reward.sum() == 3
    for spec, words in (
        ("nimm", r"environment is 'nimm', allowed: nim, guess, locks, or FILE\.py:CLASS"),
        (f"{file}:Other", "has no class 'Other' with reset and step"),
        (f"{tmp_path}/no.py:A", "there is no file"),
    ):
        with pytest.raises(ValueError, match=words):
            turns.resolve(spec)
    with pytest.raises(ValueError, match="minibatches is 9, allowed: at most batch_size 8"):
        TurnPPO(batch_size=8, minibatches=9)


def test_openings_are_held_out_and_files_are_read(tmp_path: Path) -> None:
    config = prompts.Config(turns.SEEDS, rows=50)
    ours, others = turns.openings(config, 0), turns.openings(config, 0, held_out=True)
    assert all(row["seed"] % 10 for row in ours)
    assert not any(row["seed"] % 10 for row in others)
    (tmp_path / "a.jsonl").write_text('{"secret": 3}\n')
    assert turns.openings(prompts.Config(str(tmp_path / "a.jsonl")), 0) == [{"secret": 3}]


def test_nim_is_won_by_leaving_multiples_of_four() -> None:
    for seed in range(30):
        game, ended, text, reward = games.Nim(), False, "", 0.0
        text = game.reset({"seed": seed})
        while not ended:
            text, reward, ended, _ = game.step(str(int(text.rstrip(":")) % 4))
        assert reward == 1.0


def test_bisection_finds_every_number() -> None:
    for seed in range(60):
        game, low, high, ended, reward = games.Guess(), 1, games.NUMBERS, False, 0.0
        game.reset({"seed": seed})
        while not ended:
            middle = (low + high) // 2
            text, reward, ended, _ = game.step(str(middle))
            low, high = (middle + 1, high) if text == ">" else (low, middle - 1)
        assert reward == 1.0


@pytest.mark.parametrize("name", list(games.GAMES))
def test_moves_are_legal_games_that_the_tokenizer_reads(name: str) -> None:
    model = nets.model()
    for row in games.moves(name, 40, 0):
        ids = prompts.encode(model, row["prompt"])
        assert ids.count(model.eos) == row["prompt"].count("<eos>")
        assert row["completion"].isalnum()
    with pytest.raises(ValueError, match="game is 'chess', allowed: nim, guess, locks"):
        games.moves("chess", 1, 0)


SMALL = ("--model", "tiny", "--quiet", "--checkpoint-seconds", "0", "--batch-size", "4", "--max-turns", "2",
         "--environment", "guess", "--sample-interval", "2", "--kl-coef", "0.1")  # fmt: skip


@pytest.mark.slow
def test_a_killed_run_ends_with_the_same_bits(tmp_path: Path) -> None:
    from tests.language import test_runs

    whole, broken_off = tmp_path / "whole", tmp_path / "broken"
    succeed("train", "turn-ppo", *SMALL, "--total-steps", 10, "--run-dir", whole)
    test_runs.COMMANDS["turn-ppo"] = SMALL
    try:
        test_runs.killed_and_resumed("turn-ppo", broken_off, 10)
    finally:
        del test_runs.COMMANDS["turn-ppo"]
    assert fingerprint(whole) == fingerprint(broken_off)
    assert (whole / "samples.jsonl").read_text() == (broken_off / "samples.jsonl").read_text()
    result = json.loads(succeed("eval", whole, "--episodes", 10, "--json"))
    assert result["episodes"] == 10
    assert 1 <= result["mean_length"] <= 2
    succeed("report", whole, "--out", tmp_path / "report.html")
    row = json.loads((whole / "samples.jsonl").read_text().splitlines()[0])
    assert len(row["tokens"]) == len(row["psi"])
    assert row["turns"][0]["observation"] in ("<", ">", "?", "won")


def test_an_unknown_environment_is_said_before_anything_is_written(tmp_path: Path) -> None:
    result = upslope("train", "turn-ppo", "--environment", "chess", "--quiet", "--run-dir", tmp_path / "run")
    assert result.returncode == 2
    assert "environment is 'chess', allowed: nim, guess" in " ".join(result.stderr.split())
    assert not (tmp_path / "run").exists()


class Twice:
    """Won by a in the first turn and b in the second; told only at the end."""

    def reset(self, row: Any) -> str:
        self.said = ""
        return "1"

    def step(self, completion: str) -> tuple[str, float, bool, bool]:
        self.said += completion
        return "2", float(self.said == "ab"), len(self.said) == 2, False


@pytest.mark.slow
def test_what_pays_only_in_the_end_is_learned() -> None:
    """One token of a, b and c a turn: from about 1/9 to above 4/5 on both of two seeds."""
    for seed in (1, 2):
        model = nets.model()
        head = nn.Linear(32, 128)
        with torch.no_grad():
            head.weight.mul_(0.1)
            head.bias.fill_(-1e9)[model.tokenizer("abc")["input_ids"]] = 0.0
        head.bias.requires_grad_(False)
        model.network.lm_head = head
        config = settings(sampling=Sampling(1), optimizer=AdamW(3e-3), whiten_advantages=True)
        judge = models.Scorer(nets.network("llama"), 32, 0.0)
        trained = nn.ModuleDict({"policy": model.network, "critic": judge})
        state = learner.State(trained, config.optimizer.build(models.trainable(trained).values()), 0, {})
        won = []
        for iteration in range(30):
            draw = functools.partial(generator, seed, "sample", iteration)
            data = turns.play(model, Twice, [{}] * 64, config.sampling, 2, draw)
            turn_ppo.update(state, model, data, turn_ppo.estimate(data, model, judge, None, config), config)
            state = state._replace(iteration=iteration + 1)
            won.append(float(data.reward.sum(1).mean()))
        assert won[0] < 0.4
        assert np.mean(won[-5:]) > 0.8
