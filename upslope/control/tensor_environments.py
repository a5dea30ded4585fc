"""Environments as tensors: N of them in one state, no Python per environment, the randomness handed in as numbers.

A rollout of these can live in one compiled program with the policy that acts. Gymnasium's classic control is here,
step for step as Gymnasium computes it; any other environment offers itself by a method `tensors(time_limit)`, as the
zoo's tabular problems do.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, TypeVar

import gymnasium as gym
import torch
from gymnasium import spaces
from gymnasium.envs.classic_control import (
    AcrobotEnv,
    CartPoleEnv,
    Continuous_MountainCarEnv,
    MountainCarEnv,
    PendulumEnv,
)
from jaxtyping import Bool, Float, Int64
from torch import Tensor

State = TypeVar("State", bound=tuple[Tensor, ...])
Step = tuple[State, Float[Tensor, " N"], Bool[Tensor, " N"], Bool[Tensor, " N"]]  # state, reward, terminated, truncated


class TensorEnvironment(Protocol[State]):
    """Pure functions of a state, a NamedTuple of tensors [N]; noise is uniform in [0, 1). `step` does not reset."""

    @property
    def reset_noise(self) -> int:
        """Numbers that a reset takes, for each environment."""

    @property
    def step_noise(self) -> int:
        """Numbers that a step takes, for each environment."""

    def reset(self, noise: Float[Tensor, "N reset_noise"]) -> State:
        """New episodes."""

    def step(self, state: State, action: Tensor, noise: Float[Tensor, "N step_noise"]) -> Step[State]:
        """One step of every environment; boxes come clipped to their bounds."""

    def observe(self, state: State) -> Tensor:
        """What the policy sees."""


def restart(
    environment: TensorEnvironment[State], state: State, ended: Bool[Tensor, " N"], noise: Float[Tensor, "N reset"]
) -> State:
    """The state with new episodes where the old ones have ended."""
    fresh = environment.reset(noise)
    return type(state)(*(torch.where(ended, new, old) for new, old in zip(fresh, state, strict=True)))


def observe(environment: TensorEnvironment[State], state: State) -> Tensor:
    """What the policy sees, floats in the default type."""
    seen, real = environment.observe(state), torch.get_default_dtype()
    return seen.to(real) if seen.is_floating_point() else seen


def refuse_unsteady(
    environment: TensorEnvironment, state: Any, action: Tensor, noise: Float[Tensor, "N step"], space: spaces.Space
) -> None:
    """Try one step, whose result is thrown away: what follows from reset and step must stay of one kind.

    Args:
        environment: what is tried.
        state: of a reset.
        action: of each environment.
        noise: of a step.
        space: of observations.

    Raises:
        ValueError: the first thing that is not as `TensorEnvironment` says it.
    """
    name, n = type(environment).__name__, len(noise)

    def expect(what: str, found: Any, shape: list[int], *kinds: torch.dtype) -> None:
        told = f"{found.dtype} {list(found.shape)}" if isinstance(found, Tensor) else type(found).__name__
        fits = isinstance(found, Tensor) and list(found.shape) == shape
        if not fits or (kinds and found.dtype not in kinds):
            wanted = " or ".join(str(kind) for kind in kinds) or "any type"
            raise ValueError(f"{name}.{what} is {told}, allowed: a tensor {list(shape)} of {wanted}")

    if not hasattr(state, "_fields") or "time" not in state._fields:
        raise ValueError(f"{name}.reset gives {type(state).__name__}, allowed: a NamedTuple with `time` in it")
    for field, part in state._asdict().items():
        expect(f"reset: {field}", part, [n])
    given = environment.step(type(state)(*(part.clone() for part in state)), action, noise)
    if len(given) != 4:
        raise ValueError(f"{name}.step gives {len(given)} values, allowed: state, reward, terminated, truncated")
    after, reward, *ends = given
    if type(after) is not type(state):
        raise ValueError(f"{name}.step gives {type(after).__name__}, allowed: {type(state).__name__}, as reset does")
    for field, part, old in zip(state._fields, after, state, strict=True):
        expect(f"step: {field}", part, [n], old.dtype)
    expect("step: the reward", reward, [n])
    for what, end in zip(("terminated", "truncated"), ends, strict=True):
        expect(f"step: {what}", end, [n], torch.bool)
    for seen in (environment.observe(state), environment.observe(after)):
        expect("observe: the result", seen, [n, *(space.shape or ())])


class Cart(NamedTuple):
    """A pole on a cart."""

    x: Float[Tensor, " N"]  # m
    velocity: Float[Tensor, " N"]  # m/s
    angle: Float[Tensor, " N"]  # rad from upright
    spin: Float[Tensor, " N"]  # rad/s
    time: Int64[Tensor, " N"]  # steps since the reset


@dataclass(frozen=True)
class CartPole:
    """Gymnasium's CartPole (Barto, Sutton & Anderson 1983)."""

    time_limit: int
    sutton_barto_reward: bool = False  # -1 at the fall instead of 1 a step
    reset_noise: int = 4
    step_noise: int = 0

    def reset(self, noise: Float[Tensor, "N 4"]) -> Cart:
        return Cart(*_uniform(-0.05, 0.05, noise).unbind(-1), time=_no_time(noise))

    def step(self, state: Cart, action: Int64[Tensor, " N"], noise: Float[Tensor, "N 0"]) -> Step[Cart]:
        x, velocity, angle, spin, time = state
        force = (2 * action - 1).to(x.dtype) * 10.0
        cosine, sine = torch.cos(angle), torch.sin(angle)
        total, pole = 1.1, 0.1 * 0.5  # kg; kg · m
        push = (force + pole * spin.square() * sine) / total
        angular = (9.8 * sine - cosine * push) / (0.5 * (4.0 / 3.0 - 0.1 * cosine.square() / total))
        linear = push - pole * angular * cosine / total
        x, velocity, angle, spin = (
            x + 0.02 * velocity, velocity + 0.02 * linear, angle + 0.02 * spin, spin + 0.02 * angular,
        )  # fmt: skip
        fallen = (x.abs() > 2.4) | (angle.abs() > 12 * 2 * math.pi / 360)
        reward = -fallen.to(x.dtype) if self.sutton_barto_reward else torch.ones_like(x)
        return Cart(x, velocity, angle, spin, time + 1), reward, fallen, time + 1 >= self.time_limit

    def observe(self, state: Cart) -> Float[Tensor, "N 4"]:
        return torch.stack(state[:4], -1)


class Swing(NamedTuple):
    """A pendulum."""

    angle: Float[Tensor, " N"]  # rad from upright
    spin: Float[Tensor, " N"]  # rad/s
    time: Int64[Tensor, " N"]  # steps since the reset


@dataclass(frozen=True)
class Pendulum:
    """Gymnasium's Pendulum: swing up and hold, torque at most 2."""

    time_limit: int
    gravity: float = 10.0
    reset_noise: int = 2
    step_noise: int = 0

    def reset(self, noise: Float[Tensor, "N 2"]) -> Swing:
        return Swing(_uniform(-math.pi, math.pi, noise[..., 0]), _uniform(-1.0, 1.0, noise[..., 1]), _no_time(noise))

    def step(self, state: Swing, action: Float[Tensor, "N 1"], noise: Float[Tensor, "N 0"]) -> Step[Swing]:
        angle, spin, time = state
        torque = action[..., 0].clamp(-2.0, 2.0).to(angle.dtype)
        cost = _wrapped(angle).square() + 0.1 * spin.square() + 0.001 * torque.square()
        spin = (spin + (3 * self.gravity / 2 * torch.sin(angle) + 3.0 * torque) * 0.05).clamp(-8.0, 8.0)
        never = torch.zeros_like(time, dtype=torch.bool)
        return Swing(angle + spin * 0.05, spin, time + 1), -cost, never, time + 1 >= self.time_limit

    def observe(self, state: Swing) -> Float[Tensor, "N 3"]:
        return torch.stack((torch.cos(state.angle), torch.sin(state.angle), state.spin), -1)


class Links(NamedTuple):
    """Two links, the joint between them driven."""

    angle1: Float[Tensor, " N"]  # rad from hanging
    angle2: Float[Tensor, " N"]  # rad, of the second against the first
    spin1: Float[Tensor, " N"]  # rad/s
    spin2: Float[Tensor, " N"]
    time: Int64[Tensor, " N"]  # steps since the reset


@dataclass(frozen=True)
class Acrobot:
    """Gymnasium's Acrobot, the book's dynamics (Sutton 1996), one Runge-Kutta step of 0.2 s."""

    time_limit: int
    reset_noise: int = 4
    step_noise: int = 0

    def reset(self, noise: Float[Tensor, "N 4"]) -> Links:
        angles = _uniform(-0.1, 0.1, noise).float().to(noise.dtype)  # Gymnasium rounds them
        return Links(*angles.unbind(-1), time=_no_time(noise))

    def step(self, state: Links, action: Int64[Tensor, " N"], noise: Float[Tensor, "N 0"]) -> Step[Links]:
        old, torque = state[:4], (action - 1).to(state.angle1.dtype)
        k1 = _acrobot(old, torque)
        k2 = _acrobot(_along(old, k1, 0.1), torque)
        k3 = _acrobot(_along(old, k2, 0.1), torque)
        k4 = _acrobot(_along(old, k3, 0.2), torque)
        slope = tuple(a + 2 * b + 2 * c + d for a, b, c, d in zip(k1, k2, k3, k4, strict=True))
        angle1, angle2, spin1, spin2 = _along(old, slope, 0.2 / 6.0)
        new = Links(
            _wrapped(angle1), _wrapped(angle2),
            spin1.clamp(-4 * math.pi, 4 * math.pi), spin2.clamp(-9 * math.pi, 9 * math.pi), state.time + 1,
        )  # fmt: skip
        up = -torch.cos(new.angle1) - torch.cos(new.angle2 + new.angle1) > 1.0
        return new, up.to(spin1.dtype) - 1.0, up, new.time >= self.time_limit

    def observe(self, state: Links) -> Float[Tensor, "N 6"]:
        one, two = state.angle1, state.angle2
        return torch.stack((one.cos(), one.sin(), two.cos(), two.sin(), state.spin1, state.spin2), -1)


def _along(state: tuple[Tensor, ...], slope: tuple[Tensor, ...], length: float) -> tuple[Tensor, ...]:
    return tuple(value + length * rate for value, rate in zip(state, slope, strict=True))


def _acrobot(state: tuple[Tensor, ...], torque: Float[Tensor, " N"]) -> tuple[Tensor, ...]:
    """The time derivative of angles and spins; masses, lengths and moments of inertia are 1, centres of mass at ½."""
    angle1, angle2, spin1, spin2 = state
    gravity = 9.8
    d1 = 0.25 + (1.0 + 0.25 + torch.cos(angle2)) + 2.0
    d2 = (0.25 + 0.5 * torch.cos(angle2)) + 1.0
    phi2 = 0.5 * gravity * torch.cos(angle1 + angle2 - math.pi / 2.0)
    sine = torch.sin(angle2)
    phi1 = -0.5 * spin2.square() * sine - spin2 * spin1 * sine + 1.5 * gravity * torch.cos(angle1 - math.pi / 2) + phi2
    turn2 = (torque + d2 / d1 * phi1 - 0.5 * spin1.square() * sine - phi2) / (0.25 + 1.0 - d2.square() / d1)
    return spin1, spin2, -(d2 * turn2 + phi1) / d1, turn2


class Car(NamedTuple):
    """A car in a valley."""

    position: Float[Tensor, " N"]
    velocity: Float[Tensor, " N"]
    time: Int64[Tensor, " N"]  # steps since the reset


@dataclass(frozen=True)
class MountainCar:
    """Gymnasium's MountainCar (Moore 1990): the motor is weaker than the slope."""

    time_limit: int
    goal_velocity: float = 0.0
    reset_noise: int = 1
    step_noise: int = 0

    def reset(self, noise: Float[Tensor, "N 1"]) -> Car:
        return Car(_uniform(-0.6, -0.4, noise[..., 0]), torch.zeros_like(noise[..., 0]), _no_time(noise))

    def step(self, state: Car, action: Int64[Tensor, " N"], noise: Float[Tensor, "N 0"]) -> Step[Car]:
        position, velocity = _drive(state, (action - 1).to(state.position.dtype) * 0.001)
        there = (position >= 0.5) & (velocity >= self.goal_velocity)
        new = Car(position, velocity, state.time + 1)
        return new, -torch.ones_like(position), there, new.time >= self.time_limit

    def observe(self, state: Car) -> Float[Tensor, "N 2"]:
        return torch.stack((state.position, state.velocity), -1)


@dataclass(frozen=True)
class MountainCarContinuous:
    """Gymnasium's MountainCarContinuous: the force is chosen and paid for."""

    time_limit: int
    goal_velocity: float = 0.0
    reset_noise: int = 1
    step_noise: int = 0

    def reset(self, noise: Float[Tensor, "N 1"]) -> Car:
        return Car(_uniform(-0.6, -0.4, noise[..., 0]), torch.zeros_like(noise[..., 0]), _no_time(noise))

    def step(self, state: Car, action: Float[Tensor, "N 1"], noise: Float[Tensor, "N 0"]) -> Step[Car]:
        force = action[..., 0].to(state.position.dtype)
        position, velocity = _drive(state, force.clamp(-1.0, 1.0) * 0.0015)
        there = (position >= 0.45) & (velocity >= self.goal_velocity)
        new = Car(position, velocity, state.time + 1)
        return new, 100.0 * there.to(force.dtype) - 0.1 * force.square(), there, new.time >= self.time_limit

    def observe(self, state: Car) -> Float[Tensor, "N 2"]:
        return torch.stack((state.position, state.velocity), -1)


def _drive(state: Car, push: Float[Tensor, " N"]) -> tuple[Float[Tensor, " N"], Float[Tensor, " N"]]:
    velocity = (state.velocity + push - 0.0025 * torch.cos(3 * state.position)).clamp(-0.07, 0.07)
    position = (state.position + velocity).clamp(-1.2, 0.6)
    return position, torch.where((position == -1.2) & (velocity < 0), 0.0, velocity)  # the left wall stops


def _uniform(low: float, high: float, noise: Tensor) -> Tensor:
    return low + (high - low) * noise


def _no_time(noise: Tensor) -> Int64[Tensor, " N"]:
    return torch.zeros(noise.shape[:-1], dtype=torch.int64)


def _wrapped(angle: Tensor) -> Tensor:
    """The angle in [-π, π)."""
    return torch.remainder(angle + math.pi, 2 * math.pi) - math.pi


CLASSIC: dict[type, Callable[[Any, int], TensorEnvironment]] = {
    CartPoleEnv: lambda env, limit: CartPole(limit, env._sutton_barto_reward),
    PendulumEnv: lambda env, limit: Pendulum(limit, env.g),
    AcrobotEnv: lambda env, limit: Acrobot(limit),
    MountainCarEnv: lambda env, limit: MountainCar(limit, env.goal_velocity),
    Continuous_MountainCarEnv: lambda env, limit: MountainCarContinuous(limit, env.goal_velocity),
}
ENDLESS = 2**62  # steps: no time limit


def tensors(env: gym.Env) -> TensorEnvironment:
    """The tensor form of a Gymnasium environment, with its time limit.

    Raises:
        ValueError: it has none.
    """
    inner, limit = env.unwrapped, ENDLESS
    name = env.spec.id if env.spec is not None else str(inner)
    if env.spec is not None and env.spec.max_episode_steps is not None:
        limit = env.spec.max_episode_steps
    if type(inner) in CLASSIC:
        return CLASSIC[type(inner)](inner, limit)
    if hasattr(inner, "tensors"):
        return inner.tensors(limit)
    known = ", ".join(sorted(kind.__name__.removesuffix("Env") for kind in CLASSIC))
    raise ValueError(
        f"environment.vectorization 'tensor': {name} has no tensor form; allowed: {known} and environments with a "
        "method tensors(time_limit)"
    )
