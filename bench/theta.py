"""One PPO gradient step with θ as one vector, beside the same step on `nn.Module` parameters with fused Adam.

Same objective, same network (separate 64×64 tanh actor and critic): forward, backward, clip, Adam; eager, one thread.
Run: `taskset -c 0 python -m bench.theta`
"""

import argparse
import statistics
import time
from collections.abc import Callable

import numpy as np
import torch
from gymnasium import spaces
from torch import nn

from upslope.control import networks, optimizers
from upslope.control.parameters import Net
from upslope.control.ppo import PPO, objective
from upslope.control.rollout import Batch

CONFIG = PPO()


def make_batch(size: int, generator: torch.Generator) -> Batch:
    normal = lambda *shape: torch.empty(shape).normal_(generator=generator)  # noqa: E731
    action = torch.randint(0, 2, (size,), generator=generator)
    return Batch(
        normal(size, 4), action, -torch.rand(size, generator=generator), normal(size), normal(size), normal(size), None
    )


def make_module() -> networks.ActorCritic:
    box = spaces.Box(-np.inf, np.inf, (4,), np.float32)
    return networks.actor_critic(box, spaces.Discrete(2), networks.Config(), seed=0)


def flat_step() -> Callable[[Batch], None]:
    net = Net(make_module())
    theta, adam = net.bind(net.initial()), optimizers.Adam(learning_rate=1e-4)
    state = [adam.start(theta)]

    def step(batch: Batch) -> None:
        gradient, _, _ = net.gradient(objective, theta, net, batch, CONFIG)
        optimizers.clip_norm(gradient, 0.5)
        state[0] = adam.ascend(theta, state[0], gradient, 1e-4)[1]

    return step


def module_step() -> Callable[[Batch], None]:
    module = make_module()
    adam = torch.optim.Adam(module.parameters(), lr=1e-4, eps=1e-5, fused=True)
    call = lambda theta, observation: module(observation)  # noqa: E731

    def step(batch: Batch) -> None:
        value, _ = objective(None, call, batch, CONFIG)  # type: ignore[arg-type]
        adam.zero_grad()
        (-value).backward()
        nn.utils.clip_grad_norm_(module.parameters(), 0.5)
        adam.step()

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=9, help="alternated repeats of 100 steps")
    repeats = parser.parse_args().repeats
    torch.set_num_threads(1)
    print("batch   module+fused Adam   flat θ     ratio (min–max)")
    for size in (64, 128, 256, 2048):
        batch = make_batch(size, torch.Generator().manual_seed(0))
        steps = {"module": module_step(), "flat": flat_step()}
        times: dict[str, list[float]] = {name: [] for name in steps}
        for repeat in range(repeats + 1):
            for name, step in steps.items():
                began = time.perf_counter()
                for _ in range(100):
                    step(batch)
                if repeat:  # the first warms up
                    times[name].append((time.perf_counter() - began) * 1e4)
        ratios = [m / f for m, f in zip(times["module"], times["flat"], strict=True)]
        medians = {name: statistics.median(value) for name, value in times.items()}
        print(
            f"{size:5d}   {medians['module']:10.0f} µs   {medians['flat']:10.0f} µs   "
            f"{statistics.median(ratios):.2f}× ({min(ratios):.2f}–{max(ratios):.2f})"
        )


if __name__ == "__main__":
    main()
