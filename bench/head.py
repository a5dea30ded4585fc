"""The log-probability head alone beside plain logits, on one core: time, and the memory that it takes.

    taskset -c 0 python -m bench.head [--repeats 5]

L5: 2,304 positions of width 128, forward and backward, in float32; each in a process of its own. Memory is what the
head adds to the process' peak; peak RSS is all of it, what is imported included.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from statistics import median

os.environ["OMP_NUM_THREADS"] = "1"

import torch

from bench.language import line, most_resident, seconds
from upslope.language import models

POSITIONS, WIDTH = 2304, 128


def head(kind: str, vocabulary: int) -> None:
    """One log-probability head forward and backward in this process; its time, and the memory that it took."""
    torch.manual_seed(0)
    hidden = torch.randn(POSITIONS, WIDTH, requires_grad=True)
    weight = (torch.randn(vocabulary, WIDTH) * 0.02).requires_grad_()
    target = torch.randint(vocabulary, (POSITIONS,))
    Path("/proc/self/clear_refs").write_text("5")  # the peak so far is forgotten
    before = most_resident()

    def once() -> None:
        hidden.grad = weight.grad = None
        if kind == "plain":
            logp = (hidden @ weight.T).log_softmax(-1).gather(-1, target.unsqueeze(-1)).squeeze(-1)
        else:
            logp = models._HeadLogProb.apply(hidden, weight, None, target, 1.0, 128)
        logp.mean().backward()

    once()
    peak = most_resident() - before
    sys.stdout.write(json.dumps([seconds(once, 2), peak, before + peak]) + "\n")


def heads(repeats: int) -> None:
    """L5, each in a process of its own."""
    for vocabulary in (512, 32_000, 151_936):
        found: dict[str, list[list[float]]] = {"plain": [], "chunks": []}
        for _ in range(repeats if vocabulary < 100_000 else 1):
            for kind, rows in found.items():
                command = [sys.executable, "-m", "bench.head", "--head", kind, str(vocabulary)]
                rows.append(json.loads(subprocess.check_output(command, text=True)))
        times = {kind: [row[0] for row in rows] for kind, rows in found.items()}
        memory, whole = ({kind: median(row[i] for row in rows) for kind, rows in found.items()} for i in (1, 2))
        line(f"L5 at {vocabulary:,}", times["chunks"], times["plain"], "plain logits")
        sys.stdout.write(f"  memory {memory['chunks']:,.0f} MB, plain logits {memory['plain']:,.0f} MB; "
                         f"peak RSS {whole['chunks']:,.0f} and {whole['plain']:,.0f} MB\n")  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5, help="alternated")
    parser.add_argument("--head", nargs=2, default=None, metavar=("KIND", "VOCABULARY"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.head:
        head(options.head[0], int(options.head[1]))
    else:
        heads(options.repeats)


if __name__ == "__main__":
    main()
