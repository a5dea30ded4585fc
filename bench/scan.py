"""GAE as the library runs it, beside the plain loop, on the shapes of control and of language. One thread.

python bench/scan.py
"""

import time

import torch

from upslope.core import _scan, advantages, returns


def seconds(f, repeats: int) -> float:
    """Best of five rounds."""
    f()
    rounds = []
    for _ in range(5):
        start = time.perf_counter()
        for _ in range(repeats):
            f()
        rounds.append((time.perf_counter() - start) / repeats)
    return min(rounds)


def main() -> None:
    torch.set_num_threads(1)
    print(f"{'shape':>12} {'gae':>12} {'plain loop':>12} {'ratio':>7} {'worst difference':>18}")
    for rows, steps in ((8, 32), (4, 128), (64, 64), (1024, 32), (16, 1024), (4, 32_768), (64, 32_768)):
        rewards, values, next_values = torch.randn(3, rows, steps)
        flags = torch.rand(2, rows, steps) < 0.01
        discounts, traces = returns.boundaries(flags[0], flags[1], 0.99, 0.95)
        repeats = max(1, min(500, 2_000_000 // (rows * steps)))

        def run(r=rewards, v=values, n=next_values, d=discounts, t=traces) -> torch.Tensor:
            return advantages.gae(r, v, n, d, t)

        def loop(r=rewards, v=values, n=next_values, d=discounts, t=traces) -> torch.Tensor:
            return _scan.scan_loop(d * t, r + d * n - v)

        fast, slow = seconds(run, repeats), seconds(loop, 1)
        gap = (run() - loop()).abs().max().item()
        shape = f"{rows}x{steps}"
        print(f"{shape:>12} {fast * 1e6:>9.0f} us {slow * 1e6:>9.0f} us {slow / fast:>6.1f}x {gap:>18.1e}")


if __name__ == "__main__":
    main()
