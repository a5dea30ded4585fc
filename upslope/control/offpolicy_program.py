"""A gradient step of an off-policy algorithm as one compiled program: targets, every objective, every update.

What is compiled is a function `learn`, which also runs as it stands. Whatever changes from one gradient step to the
next goes in as a tensor: all θs, the optimisers' memories, the batch, noise, and how far the run is.

Where an iteration is one step of the environments and one gradient step, the program also chooses the next actions:
what it changed is then still near, and a small network's answer takes a third of the time of a program of its own.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from upslope.control import ahead, compilation, offpolicy, optimizers, replay
from upslope.control.normalization import Normalizer
from upslope.control.offpolicy import Act, Behaviour, Choose, Config, State
from upslope.control.parameters import Net
from upslope.control.replay import Drawn, Rows
from upslope.runs.run import Run

Learn = Callable[..., tuple[State, Any, dict[str, float]]]
"""(state, nets, batch, noise, config, *fixed) -> (state, the objectives' parts, numbers): one gradient step."""
Step = Callable[..., tuple[State, Any, dict[str, float]]]
"""As `Learn`, of what was drawn instead of a batch."""

SAVES = 7e-4  # seconds a gradient step: measured, DQN on CartPole on one core


def of(
    learn: Learn, act: Act, behaviour: Behaviour, nets: Any, config: Config, session: Run
) -> tuple[Step, Choose]:  # fmt: skip
    """What takes one gradient step after the other and what chooses actions, compiled where that is asked for or pays.

    θs and memories are updated in place either way. A compiled `learn` sees a state without a world and a replay, and
    nets with nothing bound to them; each value of its last arguments has a program of its own.

    Args:
        learn: one gradient step.
        act: (the net that acts, θ, what the behaviour gives) -> actions.
        behaviour: how the run acts.
        nets: a `Net`, or a NamedTuple with some: an `actor`, and perhaps a `judge`, the θ of others["critic"].
        config: the algorithm's settings.
        session: the run.
    """
    interval = config.train_interval * config.environment.num_envs
    eager = torch.no_grad()(functools.partial(act, _actor(nets)))
    if not chosen(config, session):
        return plain(learn), offpolicy.choosing(eager, behaviour)
    if config.train_interval == 1 and (config.gradient_steps or interval) == 1:
        # where no gradient step was before, the network acts as it stands
        return compiled(learn, nets, config, act, behaviour), offpolicy.choosing(eager, behaviour)
    return compiled(learn, nets, config), offpolicy.choosing(acting(act, nets), behaviour)


def chosen(config: Config, session: Run) -> bool:
    """Whether this run is compiled; see `compilation.decide`."""
    step = session.restored.step if session.restored else 0
    interval = config.train_interval * config.environment.num_envs
    each = 1.0 if config.gradient_steps is None else config.gradient_steps / interval
    return compilation.decide(session, config, (config.total_steps - step) * each * SAVES, None)


def plain(learn: Learn) -> Step:
    """One gradient step as it stands."""

    def step(state: State, nets: Any, drawn: Drawn, noise: Any, config: Config, *fixed: Any) -> Any:
        return learn(state, nets, offpolicy.batch(state, config, drawn), noise, config, *fixed)

    return step


def compiled(
    learn: Learn, nets: Any, config: Config, act: Act | None = None, behaviour: Behaviour | None = None
) -> Step:
    """One gradient step as a program, which gathers its batch from the replay's memory.

    With `act` and `behaviour` it also gives the actions that the next iteration begins with, `state.action`.

    Raises, when called:
        ValueError: a gradient that is not finite; θs are then not to be used any more.
    """
    programs: dict[tuple[Any, ...], Callable[..., Any]] = {}
    bare, settings = _pure(nets), compilation.inside(config)
    places: list[Places] = []

    def program(fixed: tuple[Any, ...]) -> Callable[..., Any]:
        def gradient_step(
            theta: Tensor, others: dict[str, Tensor], rows: Rows, observed: dict[str, Any], numbers: Tensor,
            averages: dict[str, Any], drawn: Drawn, noise: Any, given: tuple[Any, ...] | None,
        ) -> tuple[Tensor, tuple[str, ...], Any]:  # fmt: skip
            nothing: Any = None
            progress: Any
            progress, *steps = numbers.unbind()
            memories: Any = dict(zip(averages, map(optimizers.State, steps, averages.values()), strict=True))  # type: ignore[arg-type]
            inside = State(theta, others, memories, nothing, nothing, 0, progress, 0)  # a run of one step
            batch = offpolicy.seen(replay.gather(rows, drawn), Normalizer(observed, nothing, nothing), settings)
            after, part, values = learn(inside, _judged(bare, others), batch, noise, settings, *fixed)
            told = [*(after.optimizer[name].step for name in averages), *values.values()]
            flat = torch.stack([torch.as_tensor(value, dtype=torch.float64) for value in told])
            if act is not None and given is not None:
                flat = torch.cat([flat, act(_actor(bare), after.theta, *given).flatten().double()])
            return flat, tuple(values), part

        return ahead.compiled(gradient_step, loops=False, kept=lambda: compilation.remember(config), steady=7)

    def run(
        state: State, nets: Any, drawn: Drawn, noise: Any, config: Config, *fixed: Any
    ) -> tuple[State, Any, dict[str, float]]:
        if fixed not in programs:
            programs[fixed] = program(fixed)
        if not places or any(kept.memory is not places[0].averages[name] for name, kept in state.optimizer.items()):
            places[:] = [Places.of(drawn, state.optimizer)]
        places[0].put(drawn, state.step / config.total_steps, *(kept.step for kept in state.optimizer.values()))
        given = None if behaviour is None else _given(behaviour, state, config)
        return _moved(programs[fixed], state, places[0], noise, given)

    return run


def acting(act: Act, nets: Any) -> Act:
    """(θ, …) -> actions, of act(net, θ, …), compiled."""
    pure = _actor(nets).pure()

    def choice(*inputs: Any) -> Tensor:
        return act(pure, *inputs)

    return ahead.compiled(choice, loops=False, steady=1, often=False)


def _given(behaviour: Behaviour, state: State, config: Config) -> tuple[Any, ...] | None:
    """What the next iteration's first choice of actions takes besides θ."""
    coming = offpolicy.advance(state, 1)
    given = behaviour(coming, offpolicy.sight(coming.world, coming.world.observation, config), 0)
    return None if isinstance(given, Tensor) else given


def _moved(
    program: Callable[..., Any], state: State, places: "Places", noise: Any, given: tuple[Any, ...] | None
) -> tuple[State, Any, dict[str, float]]:
    """Run a program; θs and memories are updated in place."""
    averages, observed = places.averages, state.world.normalizer.observation
    flat, names, part = program(
        state.theta, state.others, state.replay.rows, observed, places.numbers, averages, places.drawn, noise, given
    )  # fmt: skip
    after = flat.tolist()
    values = dict(zip(names, after[len(averages) :], strict=False))
    for name, value in values.items():
        if name.endswith("grad_norm") and not math.isfinite(value):
            raise ValueError(f"the gradient is not finite, {name} is {value} at step {state.step} of the run")
    moved = {
        name: optimizers.State(int(step), kept) for (name, kept), step in zip(averages.items(), after, strict=False)
    }
    action = None
    if given is not None:
        actions = state.replay.action
        action = np.array(after[len(averages) + len(names) :], actions.dtype).reshape(-1, *actions.shape[1:])
    return state._replace(optimizer=moved, action=action), part, values


class Places(NamedTuple):
    """Where what changes with each gradient step is put: the same tensors at call after call, NumPy's memory."""

    numbers: Tensor  # float64: how far the run is, the optimisers' steps
    averages: dict[str, tuple[Tensor, ...]]  # the optimisers' own
    drawn: Drawn
    arrays: tuple[np.ndarray, ...]

    @classmethod
    def of(cls, drawn: Drawn, optimizer: dict[str, optimizers.State]) -> "Places":
        averages = {name: kept.memory for name, kept in optimizer.items()}
        arrays = (
            np.zeros(1 + len(optimizer)),
            drawn.row.copy(),
            *(() if drawn.weight is None else (drawn.weight.copy(),)),
        )
        first, row, *weight = map(torch.from_numpy, arrays)
        return cls(first, averages, drawn._replace(row=row, weight=weight[0] if weight else None), arrays)

    def put(self, drawn: Drawn, *numbers: float) -> None:
        if len(drawn.row) != len(self.arrays[1]):
            raise ValueError(
                f"a program was made for batches of {len(self.arrays[1])} transitions, this one has {len(drawn.row)}: "
                "without a replay the rows of compiled runs must not vary, as reset rows make them do"
            )
        for array, value in zip(self.arrays, (numbers, drawn.row, drawn.weight), strict=False):
            array[:] = value


def _actor(nets: Any) -> Any:
    """The net that acts."""
    return nets.actor if hasattr(nets, "actor") else nets


def _pure(nets: Any) -> Any:
    """The nets as functions of the θs that a program is given."""
    if isinstance(nets, Net):
        return nets.pure()
    parts = {name: part.pure() if isinstance(part, Net) else part for name, part in nets._asdict().items()}
    return _judged(nets._replace(**parts), {"critic": None})


def _judged(nets: Any, others: dict[str, Any]) -> Any:
    """With the θ of the critic as the judge, if there is one."""
    return nets._replace(judge=others["critic"]) if hasattr(nets, "judge") else nets
