"""PPO's iteration as one compiled program: the fast form of ppo.py, whose settings, objective and diagnostics it runs.

What a step is stands in ppo.py and is not written again. Here it is put so that it can be compiled whole: whatever
changes from one iteration to the next (rates, random orders, noise) is drawn before the program, and gradient steps are
a loop whose body is compiled once. Where the environments are tensors the rollout is in the program too.

`train` is what `upslope train ppo` calls: it compiles where that is asked for or pays, and else is `ppo.train`.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from upslope.control import learner, optimizers, penalty, ppo, program, rollout
from upslope.control.agent import Agent
from upslope.control.learner import State
from upslope.control.loop import by_parts, fold, in_parts, loop
from upslope.control.parameters import Net
from upslope.control.ppo import PPO
from upslope.core import advantages, returns, statistics
from upslope.runs.randomness import generator
from upslope.runs.run import Run

Given = tuple[float, float, float, Sequence[Int64[Tensor, " rows"]]]


def give(state: State, config: PPO) -> Given:
    """This iteration's learning rate, scale of the clip and β, and the rows of its gradient steps in random order."""
    clip_scale = optimizers.linear(1.0, state.step / config.total_steps, config.anneal_clip)
    shuffle = generator(config.run.seed, "shuffle", state.iteration, 0)
    orders = rollout.orders(config, config.num_epochs, config.minibatch_size, shuffle)
    return learner.learning_rate(state, config), clip_scale, config.kl_penalty.coef, orders


def update(
    state: State, net: Net, batch: rollout.Batch, config: PPO, given: Given
) -> tuple[Float[Tensor, " d"], optimizers.State, dict[str, float]]:
    """Epochs of minibatch steps uphill, as ppo.update takes them."""
    rate, clip_scale, beta, orders = given

    def step(now: tuple[Tensor, optimizers.State], rows: Int64[Tensor, " rows"]) -> Any:
        gradient = slope(now[0], net, rollout.pick(batch, rows), config, clip_scale, beta)
        theta, memory, norm = learner.ascend(*now, gradient, config, rate)
        return (theta, memory), (norm,)

    (theta, memory), (norms,) = loop(step, (state.theta, state.optimizer), orders)
    numbers = {"grad_norm": learner.number(norms.mean()), "gradient_steps": len(norms), "learning_rate": rate}
    whole, settings = _whitened(batch, config)
    with torch.no_grad():
        terms = by_parts(lambda rows: ppo.objective(theta, net, rows, settings, clip_scale)[1], whole)
    numbers |= ppo.diagnose(ppo.Terms(*terms), batch, config, clip_scale)
    return theta, memory, numbers | penalty.adapted(config.kl_penalty, beta, numbers["kl"])


def slope(
    theta: Float[Tensor, " d"], net: Net, minibatch: rollout.Batch, config: PPO, clip_scale: float, beta: float
) -> Float[Tensor, " d"]:
    """The objective's gradient; of a large minibatch the mean of its parts'."""
    minibatch, config = _whitened(minibatch, config)
    parts, count = in_parts(minibatch), rollout.counted(minibatch)
    if parts is None:
        return net.gradient(ppo.objective, theta, net, minibatch, config, clip_scale, beta)[0]

    def add(total: Tensor, part: rollout.Batch) -> Tensor:
        gradient, _, _ = net.gradient(ppo.objective, theta, net, part, config, clip_scale, beta)
        mine = rollout.counted(part)
        share = len(part.psi) / len(minibatch.psi) if mine is None or count is None else mine / count
        return total + share * gradient

    return fold(add, torch.zeros_like(theta), parts)


def _whitened(batch: rollout.Batch, config: PPO) -> tuple[rollout.Batch, PPO]:
    """The batch with Ψ as the objective uses it, so that parts need no others; settings that leave Ψ as it is."""
    psi = rollout.whitened(batch) if config.whiten_advantages else batch.psi
    return batch._replace(psi=psi), replace(config, whiten_advantages=False)


def iterate(state: State, net: Net, given: Given, config: PPO) -> learner.Iteration:
    """Collect, estimate Ψ, objective and update: what is compiled."""
    data, world = learner.collect(net, state, config, config.rollout_length)
    discounts, traces = returns.boundaries(data.terminated, data.truncated, config.gamma, config.gae_lambda)
    psi = advantages.gae(data.reward, data.value, data.next_value, discounts, traces)
    batch = rollout.flatten(data, psi, value_target=psi + data.value)
    theta, optimizer, numbers = update(state, net, batch, config, given)
    fit = statistics.explained_variance(batch.value_old, batch.value_target, batch.valid)
    return theta, optimizer, world, numbers | {"explained_variance": fit}


def train(config: PPO, session: Run | None = None, theta: Float[Tensor, " d"] | None = None) -> Agent:
    """Train and return the agent, in a compiled program where that is asked for or pays.

    Args:
        config: all settings.
        session: the run to write to or to go on with; by default `config.run`'s.
        theta: parameters that a new run starts from; by default the network's own initialisation.

    Raises:
        ValueError: compilation is asked for and cannot be.
    """
    program.refuse(config)
    session = session or Run("ppo", config, config.total_steps)
    if not program.chosen(config, session):
        return ppo.train(config, session, theta)
    with session:
        state, net = learner.start(config, session, theta)
        run = program.of(iterate, lambda state: give(state, config), net, config, state.world)
        while state.step < config.total_steps:
            theta, optimizer, world, numbers = run(state)
            state = learner.advance(state, theta, optimizer, world)
            learner.report(session, state, net, config, numbers)
        return learner.finish(session, state, net, config)
