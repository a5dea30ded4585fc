"""An iteration as one compiled program: collect where the environments are tensors, estimate, and every gradient step.

What is compiled is a function `iterate`, which also runs as it stands. Everything that changes from one
iteration to the next goes in as a tensor: θ, the optimiser's memory, the schedules' numbers, random orders and noise.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from gymnasium import spaces
from jaxtyping import Float
from torch import Tensor
from torch.utils import _pytree as pytree

from upslope.control import compilation, learner, normalization, optimizers, rollout, tensor_rollout
from upslope.control.ahead import compiled
from upslope.control.learner import Iteration, State
from upslope.control.parameters import Net
from upslope.control.tensor_environments import TensorEnvironment
from upslope.runs import distributed
from upslope.runs.randomness import generator
from upslope.runs.run import Run


class Collected(NamedTuple):
    """The world inside a program whose rollout was collected before it."""

    data: rollout.Rollout

    def collect(self, net: Net, theta: Float[Tensor, " d"]) -> tuple[rollout.Rollout, None]:
        return self.data, None


class Tensors(NamedTuple):
    """The world inside a program that plays tensor environments itself."""

    begun: tensor_rollout.Playing
    noise: tensor_rollout.Noise
    normalizer: normalization.Normalizer
    environment: TensorEnvironment
    space: spaces.Space  # of actions
    normalize: normalization.Config

    def collect(self, net: Net, theta: Float[Tensor, " d"]) -> tuple[rollout.Rollout, Any]:
        data, after, log = tensor_rollout.play(
            net, theta, self.environment, self.begun, self.noise, self.space, self.normalizer, self.normalize
        )  # fmt: skip
        return data, (after, log)


def refuse(config: Any) -> None:
    """Raise a `ValueError` where compilation is asked for and cannot be."""
    reason = _obstacle(config)
    if config.run.compile and reason is not None:
        raise ValueError(f"compile is True, but this run cannot be compiled: {reason}")


def chosen(config: Any, session: Run) -> bool:
    """Whether this run is compiled; see `compilation.decide`."""
    step = session.restored.step if session.restored else 0
    batch = config.environment.num_envs * config.rollout_length
    gradient_steps = config.num_epochs * -(-batch // config.minibatch_size)
    # what an iteration saves: measured, CartPole on one core
    seconds = gradient_steps * 4.5e-4 + config.rollout_length * 5e-5
    return compilation.decide(session, config, (config.total_steps - step) / batch * seconds, _obstacle(config))


def of(
    iterate: Callable[[State, Net, Any, Any], Iteration],
    give: Callable[[State], Any],
    net: Net,
    config: Any,
    world: rollout.World,
) -> Callable[[State], Iteration]:
    """What makes one iteration of an algorithm after the other, compiled.

    Args:
        iterate: (state, net, given, config) -> θ, the optimiser's memory, the world, numbers.
        give: state -> what the iteration is given: numbers and random orders, a tuple.
        net: (θ, observation) -> (policy, value).
        config: the algorithm's settings.
        world: as the run begins.
    """
    if world.envs.kind == "tensor" and not config.normalize.reward:
        return _whole(iterate, give, net, config, world)
    return _learning(iterate, give, net, config)


def _obstacle(config: Any) -> str | None:
    """Why this run cannot be compiled, if it cannot."""
    if distributed.world_size() > 1:
        return "its gradients are averaged over processes"
    if config.target_kl is not None:
        return "target_kl may end its epochs early"
    if config.kl_penalty.rule != "fixed":
        return "kl_penalty.rule follows each update's KL"
    if config.network.memory != "none":
        return "its policy has a memory"
    total = config.environment.num_envs * config.rollout_length
    if total % min(config.minibatch_size, total):
        return f"minibatch_size {config.minibatch_size} does not divide its rollouts of {total} steps"
    return None


def _whole(iterate: Any, give: Any, net: Net, config: Any, world: rollout.World) -> Callable[[State], Iteration]:
    """All four steps in the program."""
    pure, environment, space = net.pure(), tensor_rollout.environment(world), world.envs.action_space
    settings, normalize = compilation.inside(config), config.normalize

    def iteration(theta: Tensor, memory: optimizers.State, play: Any, given: Any) -> Any:
        tensors: Any = Tensors(*play, environment=environment, space=space, normalize=normalize)
        return _packed(*iterate(State(theta, memory, tensors, 0, 0, {}), pure, given, settings))

    program = compiled(iteration, kept=lambda: compilation.remember(config))

    def run(state: State) -> Iteration:
        noise = generator(config.run.seed, "noise", state.iteration, distributed.rank())
        given = tensor_rollout.draw(net, state.world, config.rollout_length, noise)
        play = (tensor_rollout.begun(state.world), given, state.world.normalizer)
        theta, memory, (after, log), numbers = _ran(program, state, play, _tensors(give(state)))
        world = tensor_rollout.advance(state.world, after, log)  # first: a NaN that was seen is the cause of others
        return _moved(state, theta, memory, world, numbers)

    return run


def _learning(iterate: Any, give: Any, net: Net, config: Any) -> Callable[[State], Iteration]:
    """The policy's choice of actions in one program, and in another all that comes after the rollout."""
    pure, settings = net.pure(), compilation.inside(config)

    def choice(theta: Tensor, seen: Any, noise: Tensor) -> Tensor:
        return pure.only("policy", theta, seen).sample(noise)

    def iteration(theta: Tensor, memory: optimizers.State, data: rollout.Rollout, given: Any) -> Any:
        world: Any = Collected(data)
        return _packed(*iterate(State(theta, memory, world, 0, 0, {}), pure, given, settings))

    act = compiled(choice, loops=False, often=False)
    program = compiled(iteration, kept=lambda: compilation.remember(config))

    def run(state: State) -> Iteration:
        data, world = learner.collect(net, state, config, config.rollout_length, act=act)
        theta, memory, _, numbers = _ran(program, state, data, _tensors(give(state)))
        return _moved(state, theta, memory, world, numbers)

    return run


def _packed(theta: Tensor, memory: optimizers.State, world: Any, numbers: dict[str, Any]) -> Any:
    """A program's results, all numbers in one tensor: each costs a handle and a call outside."""
    flat = torch.stack([torch.as_tensor(value, dtype=torch.float64) for value in (memory.step, *numbers.values())])
    return theta, memory.memory, world, tuple(numbers), flat


def _ran(program: Any, state: State, played: Any, given: Any) -> Any:
    """Run a program: another θ, the optimiser's memory, which is updated in place, the world, numbers."""
    step: Any = torch.tensor(state.optimizer.step, dtype=torch.float64)
    with torch.no_grad():
        theta, averages, world, names, flat = program(
            state.theta.detach(), optimizers.State(step, state.optimizer.memory), played, given
        )
    steps, *values = flat.tolist()
    return theta, optimizers.State(int(steps), averages), world, dict(zip(names, values, strict=True))


def _moved(
    state: State, theta: Float[Tensor, " d"], memory: optimizers.State, world: rollout.World, numbers: dict[str, float]
) -> Iteration:  # fmt: skip
    """θ is updated in place.

    Raises:
        ValueError: a gradient that is not finite; θ is as it was.
    """
    if not math.isfinite(numbers["grad_norm"]):
        raise ValueError(
            f"the gradient is not finite, its norm is {numbers['grad_norm']}, within the gradient steps after the "
            f"first {state.optimizer.step}; θ was not changed"
        )
    state.theta.copy_(theta)
    return state.theta, memory, world, numbers


def _tensors(given: Any) -> Any:
    """Numbers as tensors: a program does not depend on their values."""
    return pytree.tree_map(lambda x: torch.tensor(x, dtype=torch.float64) if isinstance(x, float | int) else x, given)
