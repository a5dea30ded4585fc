"""GRPO's iterations beside TRL's GRPOTrainer, on one core: sampling, rewards and gradient steps of two real runs.

    taskset -c 0 python -m bench.grpo --peer PYTHON [--repeats 5]

A Llama of hidden 128, 4 layers, vocabulary 512, in float32; 8 prompts of 6 tokens × 8 completions of at most 32. L1:
all completions are of full length. L2: the model stops often, after 7.7 tokens on average. "steps": as L1 with four
gradient steps on every batch, of which one is timed. Both trainers run as a user runs them; the time of an iteration
is the process' own (CPU) time, which other programs on the core do not lengthen, between two calls of the reward
function, the first ones left out. Runs alternate; a claim is the median of the pairs' ratios with the smallest and the
largest.
"""

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"

import torch

from bench.language import Peer, line
from upslope.language import grpo, models, prompts, tiny
from upslope.language.generation import Sampling
from upslope.language.learner import AdamW
from upslope.runs import run as runs

ROWS = {"L1": ("full", 1), "L2": ("early", 1), "steps": ("full", 4)}  # which model, gradient steps a batch
MOST, MEAN, BATCHES, RATE = 32, 7.7, 8, 1e-6
MARKS: list[tuple[float, float]] = []  # of every call of the reward function: when, and the mean length

REWARD = """
import time
from bench.grpo import MARKS

def reward(completion_ids, **_):
    MARKS.append((time.process_time(), sum(map(len, completion_ids)) / len(completion_ids)))
    return [float(sum(ids) % 7) for ids in completion_ids]
"""

PEER = """
import json, os, sys, time
os.environ["HF_HUB_OFFLINE"] = "1"
real, sys.stdout = sys.stdout, sys.stderr
import torch
torch.set_num_threads(1)
import trl
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

where, most, batches, rate, texts = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4]), sys.argv[5:]
marks = []

def reward(completion_ids, **_):
    marks.append((time.process_time(), sum(map(len, completion_ids)) / len(completion_ids)))
    return [float(sum(ids) % 7) for ids in completion_ids]

def run(path, iterations):
    marks.clear()
    args = trl.GRPOConfig(
        output_dir=where + "/out", per_device_train_batch_size=64, num_generations=8, max_completion_length=most,
        num_iterations=iterations, steps_per_generation=1, gradient_accumulation_steps=1,
        max_steps=batches * iterations, learning_rate=rate, lr_scheduler_type="constant", beta=0.0,
        loss_type="dapo", report_to=[], use_cpu=True, bf16=False, gradient_checkpointing=False, save_strategy="no",
        logging_steps=10**9, disable_tqdm=True,
        dataloader_pin_memory=False, temperature=1.0,
    )
    trl.GRPOTrainer(
        AutoModelForCausalLM.from_pretrained(path), reward, args=args,
        train_dataset=Dataset.from_list([{"prompt": text} for text in texts]),
        processing_class=AutoTokenizer.from_pretrained(path),
    ).train()
    return marks

print(json.dumps(trl.__version__), file=real, flush=True)
for text in sys.stdin:
    path, iterations = text.split()
    print(json.dumps(run(path, int(iterations))), file=real, flush=True)
"""


def network(mean: float) -> Any:
    """A model that ends a completion with nearly the same probability at every token, whatever stands before it.

    The first coordinate of the embeddings is the same for all tokens and goes through all layers; the end of sequence
    reads nothing else, so strongly that its mean probability over random sequences is that of this mean length.
    """
    made, stop = tiny.model(0, 512), stopping(mean)
    with torch.no_grad():
        made.model.embed_tokens.weight[:, 0] = 0.1
        made.lm_head.weight[1] = 0.0
        ids = torch.randint(6, 100, (64, 6 + MOST), generator=torch.Generator().manual_seed(0))
        hidden = made.model(input_ids=ids).last_hidden_state[:, 5:].flatten(0, 1)
        low, high = -20.0, 20.0
        for _ in range(40):
            made.lm_head.weight[1, 0] = (low + high) / 2
            probability = float(made.lm_head(hidden).softmax(-1)[:, 1].mean())
            low, high = (low, (low + high) / 2) if probability > stop else ((low + high) / 2, high)
    return made


def stopping(mean: float) -> float:
    """The probability p of an end at every token for which completions of at most 32 tokens have this mean length.

    The mean is (1 - (1 - p)³²) / p; 0 where they never end.

    >>> round(stopping(7.7), 3)
    0.128
    """
    low, high = 1e-9, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if (1 - (1 - middle) ** MOST) / middle > mean else (low, middle)
    return low


def ours(path: Path, iterations: int, directory: Path) -> list[tuple[float, float]]:
    MARKS.clear()
    config = grpo.GRPO(
        models.Config(str(path)), prompts.Config(str(directory / "prompts.jsonl")), Sampling(MOST), AdamW(RATE),
        runs.Config(quiet=True), f"{directory / 'reward.py'}:reward", BATCHES, num_epochs=iterations,
    )  # fmt: skip
    grpo.train(config)
    return list(MARKS)


def of(marks: list[tuple[float, float]]) -> tuple[float, float]:
    """Seconds of an iteration, the first two left out, and the mean length."""
    return (marks[-1][0] - marks[2][0]) / (len(marks) - 3), sum(length for _, length in marks) / len(marks)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", required=True, help="python that has trl")
    parser.add_argument("--repeats", type=int, default=5, help="alternated")
    parser.add_argument("--rows", nargs="+", default=list(ROWS), choices=list(ROWS))
    options = parser.parse_args()
    torch.set_num_threads(1)
    sys.modules["bench.grpo"] = sys.modules["__main__"]  # whose MARKS the reward function writes
    texts = [f"{i}+{i + 3}=" for i in range(10, 74)]
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        (directory / "reward.py").write_text(REWARD)
        (directory / "prompts.jsonl").write_text("\n".join(json.dumps({"prompt": text}) for text in texts))
        for kind, mean in (("full", float(MOST)), ("early", MEAN)):
            network(mean).save_pretrained(directory / kind)
            tiny.tokenizer().save_pretrained(directory / kind)
        peer = Peer(options.peer, PEER, directory, MOST, BATCHES, RATE, *texts)
        sys.stdout.write(f"TRL {peer.version}\n")
        for row in options.rows:
            kind, steps = ROWS[row]
            mine, theirs = [], []
            for _ in range(options.repeats):
                mine.append(of(ours(directory / kind, steps, directory)))
                theirs.append(of(peer.ask(directory / kind, steps)))
            lengths = [sum(length for _, length in each) / len(each) for each in (mine, theirs)]
            line(row, [each[0] / steps for each in mine], [each[0] / steps for each in theirs], "TRL")
            sys.stdout.write(f"  mean lengths {lengths[0]:.2f}, TRL {lengths[1]:.2f}\n")
            sys.stdout.flush()


if __name__ == "__main__":
    main()
