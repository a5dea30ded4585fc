"""W8: a random sparse MDP, Upslope beside QuantEcon, in one run on one core.

    python bench/tabular.py [--states 100000] [--repeats 7] [--quantecon PYTHON] [--large]

100,000 states × 4 actions × 10 successors, γ = .99, tolerance 1e-6 in QuantEcon's sense: error of V at most ε/2 = 5e-7,
which is what is asked of Upslope here (`tol=5e-7`). The two rules are reported apart:

    span   stop when γ/(1−γ) · span(TV − V)/2 ≤ tol, then add the midrange (QuantEcon's modified policy iteration)
    sup    stop when γ/(1−γ) · ‖TV − V‖∞ ≤ tol (QuantEcon's value iteration)

QuantEcon runs in its own interpreter (`--quantecon /path/to/venv/bin/python`, where `pip install quantecon` was done),
which solves the very same problem when told to: repeats alternate, and a claim is a ratio of medians with the smallest
and largest ratio of a pair. Without it only Upslope is timed, and said to be. `--large` solves 1,000,000 states and
reports the memory.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

for _name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMBA_NUM_THREADS"):
    os.environ[_name] = "1"

import numpy as np  # noqa: E402
import scipy.sparse as sp  # noqa: E402

ACTIONS, SUCCESSORS, GAMMA, EPSILON = 4, 10, 0.99, 1e-6

QUANTECON = """
import json, sys, time
import numpy as np, scipy.sparse as sp
import quantecon
from quantecon.markov import DiscreteDP
data = np.load(sys.argv[1])
states, actions = data["reward"].shape
matrix = sp.csr_matrix((data["mass"], data["columns"], data["pointers"]), shape=(states * actions, states))
pairs = np.repeat(np.arange(states), actions), np.tile(np.arange(actions), states)
problem = DiscreteDP(data["reward"].ravel(), matrix, float(data["gamma"]), *pairs)
print(json.dumps({"version": quantecon.__version__}), flush=True)
for line in sys.stdin:
    method = line.strip()
    started = time.perf_counter()
    found = problem.solve(method=method, epsilon=float(data["epsilon"]), max_iter=100_000)
    seconds = time.perf_counter() - started
    np.save(sys.argv[2], found.v)
    print(json.dumps({"seconds": seconds, "iterations": int(found.num_iter)}), flush=True)
"""


def random_problem(states: int, seed: int = 0) -> dict[str, np.ndarray]:
    """Arrays of the problem, built in pieces so that a large one needs little more memory than it takes."""
    generator = np.random.default_rng(seed)
    rows = states * ACTIONS
    columns = generator.integers(0, states, rows * SUCCESSORS, dtype=np.int32)
    mass = generator.random(rows * SUCCESSORS)
    shaped = mass.reshape(rows, SUCCESSORS)
    shaped /= shaped.sum(axis=1, keepdims=True)
    reward = generator.random((states, ACTIONS))
    pointers = np.arange(0, rows * SUCCESSORS + 1, SUCCESSORS, dtype=np.int32)
    matrix = sp.csr_array((mass, columns, pointers), shape=(rows, states))
    matrix.sum_duplicates()
    return {"mass": matrix.data, "columns": matrix.indices, "pointers": matrix.indptr, "reward": reward}


class Peer:
    """QuantEcon in its own interpreter, solving when asked."""

    def __init__(self, python: str, arrays: dict[str, np.ndarray], directory: Path) -> None:
        problem, script = directory / "problem.npz", directory / "peer.py"
        np.savez(problem, **arrays, gamma=GAMMA, epsilon=EPSILON)
        script.write_text(QUANTECON)
        self.answer = directory / "values.npy"
        command = [python, str(script), str(problem), str(self.answer)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.version = self._read()["version"]

    def solve(self, method: str) -> tuple[float, int, np.ndarray]:
        assert self.process.stdin is not None
        self.process.stdin.write(method + "\n")
        self.process.stdin.flush()
        reply = self._read()
        return reply["seconds"], reply["iterations"], np.load(self.answer)

    def _read(self) -> dict:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit("QuantEcon's interpreter ended early")
        return json.loads(line)

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--states", type=int, default=100_000)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--slow-repeats", type=int, default=5, help="of the sup-norm comparison")
    parser.add_argument("--quantecon", default=None, help="python that has quantecon")
    parser.add_argument("--large", action="store_true", help="only: 1,000,000 states within 4 GB")
    options = parser.parse_args()
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})  # one core, inherited by the peer
    if options.large:
        large(1_000_000)
        return
    from upslope.exact import MDP, modified_policy_iteration, value_iteration

    arrays = random_problem(options.states)
    matrix = sp.csr_array(
        (arrays["mass"], arrays["columns"], arrays["pointers"]), shape=(options.states * ACTIONS, options.states)
    )
    started = time.perf_counter()
    mdp = MDP(matrix, arrays["reward"], GAMMA)
    tol = EPSILON / 2.0
    print(f"{options.states:,} states × {ACTIONS} × {SUCCESSORS}, γ = {GAMMA}, error ≤ {tol:g}; one core")
    print(f"MDP built and checked in {time.perf_counter() - started:.3f} s")
    runs = [
        ("span", "mpi", lambda: modified_policy_iteration(mdp, tol=tol, stop="span"), "modified policy iteration"),
        ("sup", "vi", lambda: value_iteration(mdp, tol=tol, stop="sup"), "value iteration"),
        ("sup, no elimination", "vi", lambda: value_iteration(mdp, tol=tol, eliminate=False), "value iteration"),
    ]
    with tempfile.TemporaryDirectory() as directory:
        peer = Peer(options.quantecon, arrays, Path(directory)) if options.quantecon else None
        print(f"QuantEcon {peer.version}" if peer else "QuantEcon: absent (--quantecon PYTHON); Upslope alone")
        for rule, method, solve, name in runs:
            repeats = options.repeats if method == "mpi" else options.slow_repeats
            compare(f"{name}, {rule}", solve, method, peer, repeats)
        for name, solve in (
            ("value iteration, span", lambda: value_iteration(mdp, tol=tol, stop="span")),
            ("modified policy iteration, sup", lambda: modified_policy_iteration(mdp, tol=tol, stop="sup")),
        ):
            compare(name, solve, "", None, options.slow_repeats)
        if peer:
            peer.close()


def compare(title, solve, method, peer, repeats) -> None:  # type: ignore[no-untyped-def]
    """Alternated repeats after one warm-up of each."""
    found, theirs = solve(), peer.solve(method) if peer else None
    mine, other = [], []
    for _ in range(repeats):
        started = time.perf_counter()
        found = solve()
        mine.append(time.perf_counter() - started)
        if peer:
            theirs = peer.solve(method)
            other.append(theirs[0])
    print(f"\n{title}: {repeats} repeats")
    proven = f"{found.iterations} iterations, proven error ≤ {found.error_bound:.1e}"
    print(f"  Upslope    {spread(mine)} s, {proven}")
    if theirs is not None:
        ratios = np.array(other) / np.array(mine)
        difference = np.abs(theirs[2] - found.values).max()
        print(f"  QuantEcon  {spread(other)} s, {theirs[1]} iterations, |difference| {difference:.1e}")
        median = np.median(other) / np.median(mine)
        print(f"  ratio of medians {median:.2f}× (pairs {ratios.min():.2f}–{ratios.max():.2f})")


def spread(times: list[float]) -> str:
    return f"{np.median(times):.3f} ({min(times):.3f}–{max(times):.3f})"


def large(states: int) -> None:
    """Solves 1,000,000 × 4 × 10 and reports the peak resident memory of the whole process."""
    from upslope.exact import MDP, modified_policy_iteration

    before = peak()
    arrays = random_problem(states)
    matrix = sp.csr_array((arrays["mass"], arrays["columns"], arrays["pointers"]), shape=(states * ACTIONS, states))
    mdp = MDP(matrix, arrays["reward"], GAMMA)
    built = peak()
    started = time.perf_counter()
    found = modified_policy_iteration(mdp, tol=EPSILON / 2.0)
    seconds = time.perf_counter() - started
    print(f"{states:,} states: {seconds:.2f} s, {found.iterations} iterations, proven error ≤ {found.error_bound:.2e}")
    print(f"peak memory {peak():.2f} GB ({before:.2f} after imports, {built:.2f} with the problem)")


def peak() -> float:
    """Peak resident memory of this process, GB."""
    size = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return size * (1 if sys.platform == "darwin" else 1024) / 1e9


if __name__ == "__main__":
    main()
