"""What asynchronous workers share: θ and counts in shared memory; how they begin, are reported and are checkpointed."""

from typing import NamedTuple, Protocol

import numpy as np
import torch
from gymnasium import spaces
from jaxtyping import Float, Int64
from safetensors.torch import load
from safetensors.torch import save as to_bytes
from torch import Tensor

from upslope.control import environments, learner, normalization, optimizers, rollout
from upslope.control.parameters import Net
from upslope.runs import distributed
from upslope.runs.randomness import derive
from upslope.runs.run import Run

COUNTS = ("place", "iterations", "steps", "episodes")  # of Shared, in a checkpoint


class Config(learner.Config, Protocol):
    """What the settings of an algorithm with such workers have."""

    @property
    def workers(self) -> int: ...


class Shared(NamedTuple):
    """What all workers see, in shared memory. Of a vector [W] each worker writes its own element only."""

    theta: Float[Tensor, " d"]
    averages: tuple[Float[Tensor, " d"], ...]  # the optimiser's
    place: Int64[Tensor, " W"]  # of the worker's environments among all episode seeds; a restarted one's is new
    iterations: Int64[Tensor, " W"]  # as many gradient steps
    steps: Int64[Tensor, " W"]  # of its environments
    episodes: Int64[Tensor, " W"]  # finished
    asked: Int64[Tensor, ""]  # how often the parent has asked for the worlds


class Report(NamedTuple):
    """What a worker sends."""

    numbers: dict[str, float]  # of its last iteration
    episodes: np.ndarray  # [≤100, 2] returns and lengths of those finished since its last report
    world: bytes | None  # its environments as they stand, for a checkpoint


def start(
    config: Config, session: Run, theta: Float[Tensor, " d"] | None
) -> tuple[Shared, dict[int, bytes], np.ndarray, Net]:
    """What all workers see, each one's world where a checkpoint holds it, the last episodes, and the network."""
    observation_space, action_space, _ = environments.describe(config.environment)
    net = Net(network(config, observation_space, action_space))
    zeros = torch.zeros(config.workers, dtype=torch.int64)
    if session.restored is None:
        initial = net.initial()
        if theta is not None:
            net.views(theta)  # refuses another shape
            initial.copy_(theta)
        memory = config.optimizer.start(initial).memory
        place, asked = torch.arange(config.workers), torch.tensor(0)
        shared = Shared(initial, memory, place, zeros.clone(), zeros.clone(), zeros.clone(), asked)
        worlds, recent = {}, np.zeros((0, 2))
    else:
        saved = session.restored.tensors
        counts = {name: saved[f"workers.{name}"] for name in COUNTS}
        shared = Shared(saved["theta"], optimizers.unpack(saved).memory, asked=torch.tensor(0), **counts)
        own = {worker: distributed.own("world", saved, worker) for worker in range(config.workers)}
        worlds = {worker: _bytes(world) for worker, world in own.items() if "steps" in world}
        lost = [worker for worker in own if worker not in worlds]
        shared.place[lost] = shared.place.max() + 1 + torch.arange(len(lost))
        recent = saved["recent"].numpy()
    for tensor in (shared.theta, *shared.averages, *shared[2:]):
        tensor.share_memory_()
    return shared, worlds, recent, net


def begin(worker: int, config: learner.Config, shared: Shared, saved: bytes | None) -> tuple[rollout.World, Net]:
    """A worker's environments, as a checkpoint has them or at their first episodes, and its network."""
    seed, first = config.run.seed, int(shared.place[worker]) * config.environment.num_envs
    if saved is None:
        world = rollout.begin(config.environment, config.normalize, seed, first)
    else:
        world = rollout.unpack(load(saved), config.environment, config.normalize, seed, first)
    world = world._replace(steps=int(shared.steps[worker]), episodes=int(shared.episodes[worker]))
    return world, Net(network(config, world.envs.observation_space, world.envs.action_space))


def save(session: Run, config: Config, shared: Shared, worlds: dict[int, bytes], recent: np.ndarray, net: Net) -> None:
    """A checkpoint, while the workers go on: θ may be a few steps further than the counts, the worlds behind them."""
    counts = {f"workers.{name}": getattr(shared, name).clone() for name in COUNTS}
    step, iterations = int(counts["workers.steps"].sum()), int(counts["workers.iterations"].sum())
    space = environments.describe(config.environment)[0]
    unknown = normalization.pack(normalization.start(space, config.environment.num_envs, config.normalize))
    tensors = {
        "theta": shared.theta.clone(),
        **optimizers.pack(optimizers.State(iterations, tuple(average.clone() for average in shared.averages))),
        **counts,
        "recent": torch.from_numpy(recent),
        "step": torch.tensor(step),
    }
    for worker in range(config.workers):
        world = load(worlds[worker]) if worker in worlds else unknown  # one that never reported begins anew
        tensors |= {f"world.{worker}.{name}": tensor for name, tensor in world.items()}
    session.save(step, tensors, {"layout": net.layout.table()})


def summary(shared: Shared, recent: np.ndarray) -> dict[str, float | int | None]:
    """What is reported of the last finished episodes of all workers."""
    mean = recent.mean(0).tolist() if len(recent) else (None, None)
    return {"episodes": int(shared.episodes.sum()), "episode_return": mean[0], "episode_length": mean[1]}


def network(config: learner.Config, observation_space: spaces.Space, action_space: spaces.Space) -> torch.nn.Module:
    """The network, the same in every process."""
    seed = derive(config.run.seed, "network")
    return config.network.build(observation_space, action_space, seed)


def report(world: rollout.World, reported: int, numbers: dict[str, float], whole: bool) -> Report:
    new = world.recent[max(0, len(world.recent) - (world.episodes - reported)) :]
    return Report(numbers, new, _bytes(rollout.pack(world)) if whole else None)


def _bytes(tensors: dict[str, Tensor]) -> bytes:
    return to_bytes({name: tensor.contiguous() for name, tensor in tensors.items()})
