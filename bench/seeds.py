"""A measurement on several seeds, from the command line, printed seed by seed."""

import argparse
import logging
from collections.abc import Callable
from pathlib import Path


def main(measure: Callable[[int, int, Path], dict[str, float]], description: str, steps: int) -> None:
    """Call `measure(seed, steps, out)` for every seed that is asked for, and print what it found."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--seeds", type=int, nargs="*", default=[1, 2, 3])
    parser.add_argument("--steps", type=int, default=steps)
    parser.add_argument("--out", type=Path, required=True)
    asked = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    for seed in asked.seeds:
        found = measure(seed, asked.steps, asked.out)
        logging.info("seed %d: %s", seed, ", ".join(f"{name} {value:.3f}" for name, value in found.items()))
