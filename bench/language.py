"""Language workloads beside TRL and Transformers, on one core: losses that are equal first, then time and memory.

    taskset -c 0 python -m bench.language [--peer PYTHON] [--repeats 5]

The model is a Llama of hidden 128, 4 layers, vocabulary 512, in float32. L3 is a training step of SFT, DPO and a reward
model on 32 sequences × 64 tokens, data and optimiser included, and the peak of a process that does nothing else; L4
samples 64 × 32 tokens beside `generate`. The head alone (L5) is bench.head, GRPO's iterations (L1, L2) are bench.grpo.
Times are the processes' own (CPU) times, which other programs on the core do not lengthen. TRL runs in its own
interpreter (`pip install trl`), which trains when told to; repeats alternate, a claim is the median of the pairs'
ratios with the smallest and the largest, and the first pair warms up. Loss and gradient of TRL's trainers on the same
weights and batch are compared with ours before anything is timed.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"

import torch
from safetensors.torch import load_file, save_file

from upslope.language import batching, dpo, generation, grpo, learner, models, reward_model, rollout, sft, tiny
from upslope.language.models import Model, Scorer
from upslope.runs import allocator

ROWS, LENGTH, PROMPT, STEPS = 32, 64, 16, 6

PEER = """
import json, os, sys, time
os.environ["HF_HUB_OFFLINE"] = "1"
real, sys.stdout = sys.stdout, sys.stderr
import torch
torch.set_num_threads(1)
import trl
from datasets import Dataset
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, TrainerCallback

where, rows, prompt, steps, texts = sys.argv[1], *map(int, sys.argv[2:5]), json.loads(sys.argv[5])
tokenizer = AutoTokenizer.from_pretrained(where)
ids = [tokenizer(text)["input_ids"] + [tokenizer.eos_token_id] for text in texts]
half = rows // 2
pairs = list(zip(ids[:half], ids[half:]))

class Marks(TrainerCallback):
    def __init__(self):
        self.times = []
    def on_step_end(self, *args, **kwargs):
        self.times.append(time.process_time())

def trainer(name, marks):
    size = rows if name == "sft" else half
    common = dict(
        output_dir=where + "/out", per_device_train_batch_size=size, max_steps=steps, report_to=[], use_cpu=True,
        save_strategy="no", logging_steps=10**9, gradient_checkpointing=False, bf16=False, disable_tqdm=True,
        dataloader_pin_memory=False, learning_rate=1e-4,
    )
    more = dict(processing_class=tokenizer, callbacks=[marks])
    if name == "sft":
        data = [{"input_ids": x, "labels": [-100] * prompt + x[prompt:]} for x in ids]
        model = AutoModelForCausalLM.from_pretrained(where)
        return trl.SFTTrainer(model, args=trl.SFTConfig(**common), train_dataset=Dataset.from_list(data * 8), **more)
    if name == "dpo":
        data = [{"prompt": a[:prompt], "chosen": a[prompt:], "rejected": b[prompt:]}
                for a, b in zip(texts[:half], texts[half:])]
        model = AutoModelForCausalLM.from_pretrained(where)
        return trl.DPOTrainer(model, args=trl.DPOConfig(**common), train_dataset=Dataset.from_list(data * 8), **more)
    data = [{"chosen_ids": a, "rejected_ids": b} for a, b in pairs]
    model = AutoModelForSequenceClassification.from_pretrained(where, num_labels=1)
    with torch.no_grad():
        model.score.weight.fill_(0.1)
    return trl.RewardTrainer(model, args=trl.RewardConfig(**common), train_dataset=Dataset.from_list(data * 8), **more)

def compare(name):
    made = trainer(name, Marks())
    if name == "dpo":  # a policy that is not its reference
        with torch.no_grad():
            for parameter in made.model.parameters():
                parameter.mul_(1.01)
    if name == "sft":
        rows_ = [{"input_ids": x, "labels": [-100] * prompt + x[prompt:]} for x in ids]
    elif name == "dpo":
        rows_ = [{"prompt_ids": a[:prompt], "chosen_ids": a[prompt:], "rejected_ids": b[prompt:]} for a, b in pairs]
    else:
        rows_ = [{"chosen_ids": a, "rejected_ids": b} for a, b in pairs]
    loss = made.compute_loss(made.model, made.data_collator(rows_))
    loss.backward()
    named = {n: p.grad.clone() for n, p in made.model.named_parameters() if p.grad is not None}
    save_file({**named, "loss": loss.detach().reshape(1)}, where + f"/{name}.safetensors")
    return 0.0

def group(kind):
    what = load_file(where + "/grpo.safetensors")
    loss_type, level, beta, high = {
        "sequence": ("grpo", "token", 0.0, 0.2), "token": ("dapo", "token", 0.0, 0.28),
        "kl": ("grpo", "token", 0.04, 0.2),
        "fixed-length": ("dr_grpo", "token", 0.0, 0.2), "gspo": ("grpo", "sequence", 0.0, 4e-4),
        "cispo": ("cispo", "token", 0.0, 1.28),
    }[kind]
    args = trl.GRPOConfig(
        output_dir=where + "/out", per_device_train_batch_size=rows, num_generations=8, report_to=[], use_cpu=True,
        bf16=False, beta=beta, loss_type=loss_type, importance_sampling_level=level, epsilon=4e-4 if level == "sequence"
        else 0.2, epsilon_high=high, max_completion_length=what["completion_ids"].shape[1], steps_per_generation=1,
        gradient_accumulation_steps=1, gradient_checkpointing=False,
        use_bias_correction_kl=False,
    )
    if kind == "kl":  # one gradient step: the ratio is 1
        del what["old_per_token_logps"]
    model = AutoModelForCausalLM.from_pretrained(where, dtype=torch.float64)
    data = Dataset.from_list([{"prompt": text[:prompt]} for text in texts])
    made = trl.GRPOTrainer(model, lambda completions, **_: [0.0] * len(completions), args=args, train_dataset=data,
                           processing_class=tokenizer)
    model = made.model.double().train()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.01)
    made.current_gradient_accumulation_steps = 1
    what["num_items_in_batch"] = what["completion_mask"].sum()
    loss = made._compute_loss(model, what)
    loss.backward()
    named = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    save_file({**named, "loss": loss.detach().reshape(1)}, where + f"/{kind}.safetensors")
    return 0.0

def timed(name):
    marks = Marks()
    trainer(name, marks).train()
    return (marks.times[-1] - marks.times[0]) / (len(marks.times) - 1)

def memory(name):
    timed(name)
    return int(next(row.split()[1] for row in open("/proc/self/status") if row.startswith("VmHWM"))) / 1024

print(json.dumps(trl.__version__), file=real, flush=True)
for line in sys.stdin:
    name, what = line.split()
    done = {"compare": compare, "group": group, "time": timed, "memory": memory}[what](name)
    print(json.dumps(done), file=real, flush=True)
"""


class Peer:
    """TRL in its own interpreter."""

    def __init__(self, python: str, script: str, *arguments: object) -> None:
        command = [python, "-W", "ignore", "-c", script, *arguments]
        self.process = subprocess.Popen(
            list(map(str, command)), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        self.version = self.read()

    def read(self) -> Any:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit("the peer's interpreter ended early")
        return json.loads(line)

    def ask(self, *words: object) -> Any:
        assert self.process.stdin is not None
        self.process.stdin.write(" ".join(map(str, words)) + "\n")
        self.process.stdin.flush()
        return self.read()


class Ours:
    """The same model, rows and settings."""

    def __init__(self, where: Path, texts: list[str]) -> None:
        self.where, tokens = where, tiny.tokenizer()
        self.ids = [tokens(text)["input_ids"] + [tokens.eos_token_id] for text in texts]
        self.half = ROWS // 2
        self.better, self.worse = (
            [x[PROMPT:] for x in part] for part in (self.ids[: self.half], self.ids[self.half :])
        )
        self.prompts = [x[:PROMPT] for x in self.ids[: self.half]]

    def model(self) -> Model:
        return models.load(models.Config(str(self.where)), 0)

    def scorer(self) -> tuple[Scorer, Model]:
        scorer, model = models.scorer(models.Config(str(self.where)), 0)
        with torch.no_grad():
            scorer.head.weight.fill_(0.1)
        return scorer, model

    def loss(self, name: str) -> tuple[torch.Tensor, Any]:
        """To be minimised, and the network whose gradient it has."""
        if name == "sft":
            model = self.model()
            parts, total = sft.batches(
                model, [x[:PROMPT] for x in self.ids], [x[PROMPT:] for x in self.ids], sft.SFT(micro_batch_tokens=10**6)
            )
            return -sft.objective(model.network, parts[0], total), model.network
        if name == "dpo":
            model = self.model()
            batch = dpo.batch_of(model, self.prompts, self.better, self.worse)
            with torch.no_grad():
                reference = dpo.completion_log_probs(model.network, batch)
                for parameter in model.network.parameters():
                    parameter.mul_(1.01)
            return -dpo.objective(model.network, dpo.Pairs(batch, reference), dpo.DPO(), self.half)[0], model.network
        scorer, model = self.scorer()
        whole = zip(self.ids[: self.half], self.ids[self.half :], strict=True)
        answers = [[a[PROMPT:], b[PROMPT:]] for a, b in whole]
        firsts = [[a[:PROMPT], b[:PROMPT]] for a, b in zip(self.ids[: self.half], self.ids[self.half :], strict=True)]
        flat = [(p, c) for ps, cs in zip(firsts, answers, strict=True) for p, c in zip(ps, cs, strict=True)]
        batch = batching.pad([p for p, _ in flat], [c for _, c in flat], model.pad)
        return -reward_model.objective(scorer, batch, [2] * self.half, self.half)[0], scorer

    def step(self, name: str) -> Callable[[], None]:
        """A training step."""
        optimizer = learner.AdamW(learning_rate=1e-4)
        if name == "sft":
            model, config = self.model(), sft.SFT(optimizer=optimizer)
            state = learner.State(model.network, optimizer.build(model.network.parameters()), 0, {})
            firsts, rest = [x[:PROMPT] for x in self.ids], [x[PROMPT:] for x in self.ids]
            return lambda: void(sft.update(state, model, *sft.batches(model, firsts, rest, config), config))
        if name == "dpo":
            model, settings = self.model(), dpo.DPO(optimizer=optimizer)
            state = learner.State(model.network, optimizer.build(model.network.parameters()), 0, {})
            data = (self.prompts, self.better, self.worse)
            reference = dpo.reference_log_probs(model, data, settings)
            rows = list(range(self.half))
            return lambda: void(dpo.update(state, model, rows, data, reference, settings))
        scorer, model = self.scorer()
        options = reward_model.RewardModel(optimizer=optimizer)
        state = learner.State(scorer, optimizer.build(models.trainable(scorer).values()), 0, {})
        answers = [[a, b] for a, b in zip(self.better, self.worse, strict=True)]
        return lambda: void(reward_model.update(state, scorer, model, self.prompts, answers, options))


def void(_: Any) -> None:
    """A lambda's value is dropped."""


def seconds(function: Callable[[], Any], times: int = STEPS) -> float:
    began = time.process_time()
    for _ in range(times):
        function()
    return (time.process_time() - began) / times


def differences(ours: Ours, peer: Peer) -> None:
    """The largest difference of loss and gradient, the gradient's in units of its largest element."""
    for name in ("sft", "dpo", "rm", "sequence", "token", "fixed-length", "gspo", "cispo", "kl"):
        loss, network = ours.loss(name) if name in ("sft", "dpo", "rm") else group_objective(ours, name)
        peer.ask(name, "compare" if name in ("sft", "dpo", "rm") else "group")
        theirs = load_file(ours.where / f"{name}.safetensors")
        loss.backward()
        found = {n.removeprefix("backbone."): p.grad for n, p in network.named_parameters() if p.grad is not None}
        found = {"score.weight" if n == "head.weight" else n: gradient for n, gradient in found.items()}
        shared = [n for n in theirs if n in found]
        assert len(shared) == len(theirs) - 1, sorted(set(theirs) - set(found))
        most = max(float(theirs[n].abs().max()) for n in shared)
        apart = max(float((theirs[n] - found[n]).abs().max()) for n in shared) / most
        sys.stdout.write(f"{name}: loss {float(loss):.6f}, apart {abs(float(loss - theirs['loss'])):.1e}; "
                         f"gradient apart {apart:.1e} of its largest element\n")  # fmt: skip


def group_objective(ours: Ours, kind: str) -> tuple[torch.Tensor, Any]:
    """A group loss in float64 whose policy has moved, to be minimised, with its network; its inputs for the peer."""
    model = models.load(models.Config(str(ours.where), dtype="float64"), 0)
    random = torch.Generator().manual_seed(1)
    lengths = torch.randint(5, LENGTH - PROMPT, (ROWS,), generator=random).tolist()
    completions = [ids[PROMPT : PROMPT + n] for ids, n in zip(ours.ids, lengths, strict=True)]
    prompts = [ours.ids[i - i % 8][:PROMPT] for i in range(ROWS)]
    batch = batching.pad(prompts, completions, model.pad)
    response = torch.arange(max(lengths)) < torch.tensor(lengths).unsqueeze(1)
    psi = torch.randn(ROWS, generator=random, dtype=torch.float64)
    with torch.no_grad():
        logp = models.log_probs(model.network, batch)[:, PROMPT:] * response
        reference = (logp + 0.2 * torch.randn(logp.shape, generator=random, dtype=torch.float64)) * response
        for parameter in model.network.parameters():
            parameter.mul_(1.01)
    save_file(
        {
            "prompt_ids": batch.ids[:, :PROMPT].contiguous(), "completion_ids": batch.ids[:, PROMPT:].contiguous(),
            "prompt_mask": torch.ones(ROWS, PROMPT, dtype=torch.int64), "completion_mask": response.long(),
            "advantages": psi, "old_per_token_logps": logp, "ref_per_token_logps": reference,
        },
        ours.where / "grpo.safetensors",
    )  # fmt: skip
    choices: dict[str, dict[str, Any]] = {
        "sequence": {"reduction": "sequence"},
        "token": {"reduction": "token", "clip_high": 0.28},
        "kl": {"reduction": "sequence", "kl_coef": 0.04},
        "fixed-length": {"reduction": "fixed-length"},
        "gspo": {"reduction": "sequence", "ratio": "sequence", "clip_low": 4e-4, "clip_high": 4e-4},
        "cispo": {"surrogate": "cispo", "clip_low": 1.0, "clip_high": 0.28},
    }
    config = grpo.GRPO(sampling=generation.Sampling(max(lengths)), **choices[kind])
    old, other = (None, reference) if kind == "kl" else (logp, None)
    given = grpo.Estimates(psi.unsqueeze(1) * response, response, old, other)
    whole = grpo.Whole(int(response.sum()), ROWS)
    part = rollout.Batch(batch, list(range(ROWS)))
    return -grpo.objective(model.network, part, given, whole, config)[0], model.network


def spread(numbers: list[float], form: str) -> str:
    return f"{median(numbers):{form}} ({min(numbers):{form}} to {max(numbers):{form}})"


def line(name: str, mine: list[float], theirs: list[float], whom: str) -> None:
    ratios = [b / a for a, b in zip(mine, theirs, strict=False)]
    text = f"{name}: Upslope {spread(mine, '.4f')} s"
    sys.stdout.write(
        text + (f", {whom} {spread(theirs, '.4f')} s, ratio {spread(ratios, '.2f')}\n" if theirs else "\n")
    )


def training(ours: Ours, peer: Peer | None, fresh: Callable[[], Peer], repeats: int) -> None:
    """L3; the memory is that of a process of its own, what it imports included."""
    for name in ("sft", "dpo", "rm"):
        mine, theirs, step = [], [], ours.step(name)
        for _ in range(repeats + 1):
            mine.append(seconds(step))
            if peer:
                theirs.append(peer.ask(name, "time"))
        line(f"L3 {name}", mine[1:], theirs[1:], "TRL")
        command = [sys.executable, "-m", "bench.language", "--step", name, str(ours.where)]
        sys.stdout.write(f"  peak RSS {float(subprocess.check_output(command, text=True)):,.0f} MB")
        sys.stdout.write(f", TRL {fresh().ask(name, 'memory'):,.0f} MB\n" if peer else "\n")
        sys.stdout.flush()


def most_resident() -> float:
    """The peak of this process, MB (Linux). `getrusage` has that of the process that started it, where it is more."""
    status = Path("/proc/self/status").read_text()
    return int(next(row.split()[1] for row in status.splitlines() if row.startswith("VmHWM"))) / 1024


def sampling(ours: Ours, repeats: int) -> None:
    """L4: greedy tokens are the same; then 64 × 32 sampled tokens."""
    model = ours.model()._replace(eos=-1)
    prompts = [ids[:4] for ids in ours.ids[:8]]
    tokens = torch.tensor(prompts).repeat_interleave(8, 0)
    given = {"attention_mask": torch.ones_like(tokens), "max_new_tokens": 32, "min_new_tokens": 32, "pad_token_id": 0}

    def theirs(sample: bool) -> torch.Tensor:
        return model.network.generate(input_ids=tokens, do_sample=sample, eos_token_id=None, **given)[:, 4:]

    def mine(temperature: float) -> generation.Completions:
        how = generation.Sampling(32, temperature=temperature)
        return generation.generate(model, prompts, 8, how, torch.Generator().manual_seed(0))

    assert torch.equal(theirs(False), mine(0.0).ids), "greedy tokens differ"
    pairs = [(seconds(lambda: mine(1.0), 3), seconds(lambda: theirs(True), 3)) for _ in range(repeats + 1)][1:]
    line("L4", [a for a, _ in pairs], [b for _, b in pairs], "generate")


def examples() -> list[str]:
    """Random letters, as many as a sequence has tokens without its end."""
    generator = torch.Generator().manual_seed(0)
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    draws = torch.randint(len(letters), (ROWS, LENGTH - 1), generator=generator).tolist()
    return ["".join(letters[i] for i in row) for row in draws]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", default=None, help="python that has trl")
    parser.add_argument("--repeats", type=int, default=5, help="alternated")
    parser.add_argument("--losses", action="store_true", help="compare losses, time nothing")
    parser.add_argument("--sampling", action="store_true", help="time sampling alone")
    parser.add_argument("--step", nargs=2, default=None, metavar=("NAME", "MODEL"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    allocator.keep_freed_memory()  # as every run does
    if options.step:
        step = Ours(Path(options.step[1]), examples()).step(options.step[0])
        seconds(step)
        sys.stdout.write(f"{most_resident()}\n")
        return
    texts = examples()
    with tempfile.TemporaryDirectory() as directory:
        where = Path(directory) / "model"
        tiny.model(0, 512).save_pretrained(where)
        tiny.tokenizer().save_pretrained(where)
        ours, peer = Ours(where, texts), None

        def fresh() -> Peer:
            return Peer(options.peer, PEER, where, ROWS, PROMPT, STEPS, json.dumps(texts))

        if options.peer:
            peer = fresh()
            sys.stdout.write(f"TRL {peer.version}\n")
            differences(ours, peer)
        if options.losses:
            return
        if not options.sampling:
            training(ours, peer, fresh, options.repeats)
        sampling(ours, options.repeats)


if __name__ == "__main__":
    main()
