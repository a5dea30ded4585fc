"""Asynchronous advantage actor–critic, A3C (Mnih et al. 2016, arXiv:1602.01783, algorithm S3; S3 7.4.2 and eq 23).

Psi         the k-step advantage, from a learned V                             S3 eq 23        core/advantages.py
surrogate   Ψ log π_θ                                                          S3 7.4.2        core/surrogates.py
constraint  none: one small step, then new data
data        a short rollout of a worker's copy θ' of θ, used once, added to a θ that the others have moved since
maximised   surrogate - c1 (V - target)² + c2 entropy                          S4 eq 2.18 (S3 eq 26 has the wrong sign)

Differs from actor_critic.py in who does it: worker processes, each with environments of its own, run A2C's loop and
add their steps to one θ in shared memory without a lock (Hogwild), with one RMSProp average for all. An element that
two workers write at once keeps one of the two steps; counters are exact, each has one writer.
A resumed run goes on from θ, averages, counts and environments, but which worker comes first is the operating
system's choice: unlike every other algorithm's, an A3C run is not repeatable bit by bit, resumed or not.
"""

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field, fields

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from upslope.control import environments, learner, networks, normalization, optimizers, rollout
from upslope.control.actor_critic import A2C, objective
from upslope.control.agent import Agent
from upslope.control.learner import State
from upslope.control.parameters import Net
from upslope.control.shared import Report, Shared, begin, report, save, start, summary
from upslope.control.workers import Ended, Workers
from upslope.core import advantages, returns, statistics
from upslope.runs import distributed, settings
from upslope.runs import run as runs
from upslope.runs.randomness import generator
from upslope.runs.run import Run

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class A3C:
    """What is A3C's own; what every algorithm shares (environment, network, …, run) is nested."""

    environment: environments.Config = field(default_factory=lambda: environments.Config(num_envs=1))  # of each worker
    network: networks.Config = field(default_factory=networks.Config)
    normalize: normalization.Config = field(default_factory=normalization.Config)
    optimizer: optimizers.Optimizer = field(default_factory=optimizers.RMSProp)
    run: runs.Options = field(default_factory=lambda: runs.Config(log_interval=100))  # iterations of each worker
    workers: int = 2  # processes
    restart_workers: bool = False  # a lost worker is replaced, unless it was lost before its first step
    total_steps: int = 500_000  # environment steps, all environments of all workers together
    rollout_length: int = 5  # T, steps of each environment per iteration
    gamma: float = 0.99  # discount per step
    k_step: int | None = None  # of Ψ; None: as many as the rollout still has, the paper's
    value_coef: float = 0.5  # c1, of the squared error without ½
    entropy_coef: float = 0.0  # c2, per nat
    whiten_advantages: bool = False
    max_grad_norm: float | None = 0.5
    anneal_learning_rate: bool = False  # linearly to 0 over the run

    def __post_init__(self) -> None:
        settings.within(self, 1, None, "workers", "total_steps", "rollout_length", "k_step")
        settings.within(self, 0, 1, "gamma")
        settings.within(self, 0, None, "value_coef", "entropy_coef")
        settings.positive(self, "max_grad_norm")
        if self.normalize.observation:
            raise ValueError(
                "normalize.observation is True, but each worker would have statistics of its own for the one θ"
            )
        networks.refuse_memory(self.network, "A3C")

    def a2c(self) -> A2C:
        """What one worker does: A2C with the settings of the same names."""
        return A2C(**{f.name: getattr(self, f.name) for f in fields(A2C) if f.name in self.__dataclass_fields__})


def update(shared: Shared, state: State, net: Net, batch: rollout.Batch, config: A2C) -> dict[str, float]:
    """One step uphill along the gradient at θ', added in place to the θ of all.

    The step is computed on a copy of the averages, which so contain its own gradient whatever the others write.
    """
    rate = learner.learning_rate(state, config)
    gradient, _, part = net.gradient(objective, state.theta, net, batch, config)
    memory = state.optimizer._replace(memory=tuple(average.clone() for average in shared.averages))
    step, memory, norm = learner.ascend(torch.zeros_like(gradient), memory, gradient, config, rate)
    for average, new in zip(shared.averages, memory.memory, strict=True):
        average.copy_(new)
    shared.theta.add_(step)
    return learner.means(part, batch.valid) | {"grad_norm": norm, "learning_rate": rate}


def work(worker: int, send: Callable[[Report], None], config: A2C, shared: Shared, saved: bytes | None) -> None:
    """A worker's life: A2C's loop, until all workers together have taken the run's steps."""
    world, net = begin(worker, config, shared, saved)
    theta, reported, answered, numbers = net.bind(net.initial()), world.episodes, -1, {}
    while (taken := int(shared.steps.sum())) < config.total_steps:
        # θ' ← θ
        theta.copy_(shared.theta)
        memory = optimizers.State(int(shared.iterations.sum()), shared.averages)
        state = State(theta, memory, world, int(shared.iterations[worker]), taken, {})

        # 1. collect: T steps of every environment under the policy of θ'
        noise = generator(config.run.seed, "noise", state.iteration, worker)
        data, world = rollout.collect(net, theta, world, config.rollout_length, noise, config.normalize, config.gamma)

        # 2. estimate Ψ
        discounts, continues = returns.boundaries(data.terminated, data.truncated, config.gamma, 1.0)
        k = config.k_step or config.rollout_length
        psi = advantages.k_step(data.reward, data.value, data.next_value, discounts, continues, k)
        batch = rollout.flatten(data, psi, psi + data.value)

        # 3. objective and 4. update: one step
        numbers = update(shared, state, net, batch, config)

        shared.iterations[worker] += 1
        shared.steps[worker], shared.episodes[worker] = world.steps, world.episodes
        asked = int(shared.asked)
        if asked > answered or (state.iteration + 1) % config.run.log_interval == 0:
            fit = float(statistics.explained_variance(batch.value_old, batch.value_target, batch.valid))
            send(report(world, reported, numbers | {"explained_variance": fit}, asked > answered))
            reported, answered = world.episodes, asked
    send(report(world, reported, numbers, True))
    world.envs.close()


def train(config: A3C, session: Run | None = None, theta: Float[Tensor, " d"] | None = None) -> Agent:
    """Train and return the agent. A program that calls this needs `if __name__ == "__main__":`, as all that spawn.

    Args:
        config: all settings.
        session: the run to write to or to go on with; by default `config.run`'s.
        theta: parameters that a new run starts from; by default the network's own initialisation.

    Raises:
        ValueError: a worker's error: its environment's, or a gradient that is not finite.
        ChildProcessError: every worker was lost.
    """
    if distributed.world_size() > 1:
        raise ValueError("a3c starts worker processes itself (--workers): run it without torchrun")
    with session or Run("a3c", config, config.total_steps) as session:
        shared, worlds, recent, net = start(config, session, theta)
        crew, begun = Workers(work), shared.iterations.clone()
        session.closes(crew)
        for worker in range(config.workers):
            crew.start(worker, config.a2c(), shared, worlds.get(worker))
        awaited: set[int] | None = None  # workers whose worlds the next checkpoint waits for
        patience = time.monotonic() + environments.STEP_TIMEOUT
        while crew.running:
            for worker, message in crew.wait(0.5):
                if isinstance(message, Report):
                    recent = np.concatenate([recent, message.episodes])[-rollout.RECENT :]
                    numbers = message.numbers | {"worker": worker, "workers": len(crew.running)}
                    session.record(int(shared.steps.sum()), {**summary(shared, recent), **numbers})
                    if message.world is not None:
                        worlds[worker] = message.world
                        awaited = awaited and awaited - {worker}
                elif isinstance(message, Ended) and message.exit_code:
                    awaited = awaited and awaited - {worker}
                    again = config.restart_workers and bool(shared.iterations[worker] > begun[worker])
                    then = "another takes its place" if again else f"workers left: {len(crew.running)}"
                    log.warning("worker %d is lost, its exit code is %d; %s", worker, message.exit_code, then)
                    if again:
                        begun[worker], shared.place[worker] = shared.iterations[worker], shared.place.max() + 1
                        crew.start(worker, config.a2c(), shared, None)
            now, done = time.monotonic(), int(shared.steps.sum()) >= config.total_steps
            if awaited is None and not done:
                patience = now + environments.STEP_TIMEOUT
                if session.due():
                    awaited = set(crew.running)
                    shared.asked.add_(1)
            elif awaited == set() or now > patience:  # one whose environment hangs is not waited for
                if done and now > patience:
                    break
                save(session, config, shared, worlds, recent, net)
                awaited = None
        if (step := int(shared.steps.sum())) < config.total_steps:
            raise ChildProcessError(
                f"every worker is lost, at step {step} of {config.total_steps}; the checkpoints written so far are kept"
            )
        save(session, config, shared, worlds, recent, net)
        session.finish(step, summary(shared, recent))
        space, action_space, _ = environments.describe(config.environment)
        normalizer = normalization.start(space, config.environment.num_envs, config.normalize)
        return Agent(
            net, net.bind(shared.theta.clone()), config.environment, config.normalize, normalizer, action_space
        )
