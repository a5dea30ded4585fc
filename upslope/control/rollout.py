"""Collecting rollouts: steps or whole episodes of N environments under the current policy; the world in between."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from upslope.control import environments, memory, normalization
from upslope.control.memory import Remembered
from upslope.control.networks import Head, Observation, to_tensors
from upslope.control.parameters import Net
from upslope.core import advantages

Act = Callable[[Float[Tensor, " d"], Any, Tensor], Tensor]  # θ, observation, noise -> action
RECENT = 100  # finished episodes that the reported mean return covers


class World(NamedTuple):
    """The environments between two rollouts, and what is remembered about them."""

    envs: environments.Environments
    observation: Any  # what to act on next, as the environments gave it
    episode_return: np.ndarray  # [N] float64, undiscounted, of the running episodes
    episode_length: np.ndarray  # [N] int64, steps
    recent: np.ndarray  # [≤100, 2] returns and lengths of the last finished episodes
    episodes: int  # finished since the run began
    steps: int  # taken since the run began, of all environments here; reset rows are none
    normalizer: normalization.Normalizer
    memory: Float[Tensor, "N M"] | None = None  # what the policy remembers of the running episodes


class Rollout(NamedTuple):
    """N environments × T steps; time is the last axis of every number, the second of observations and actions."""

    observation: Observation | Remembered  # as the policy saw it; with a memory, the one of the first step
    action: Tensor
    logp: Float[Tensor, "N T"]  # of the policy that acted
    value: Float[Tensor, "N T"]
    next_value: Float[Tensor, "N T"]  # of the true successor, the final observation where an episode ended
    reward: Float[Tensor, "N T"]
    terminated: Bool[Tensor, "N T"]
    truncated: Bool[Tensor, "N T"]
    valid: Bool[Tensor, "N T"] | None  # False for reset rows; None where there are none


class Batch(NamedTuple):
    """Transitions for a gradient step, in any order; with a memory environment by environment, their steps in order."""

    observation: Observation | Remembered
    action: Tensor
    logp_old: Float[Tensor, " B"]
    value_old: Float[Tensor, " B"]
    psi: Float[Tensor, " B"]
    value_target: Float[Tensor, " B"]
    valid: Bool[Tensor, " B"] | None


def begin(config: environments.Config, normalize: normalization.Config, seed: int, first_index: int = 0) -> World:
    """A new world: every environment at the start of its first episode."""
    envs, observation = environments.make(config, seed, first_index)
    n = envs.num_envs
    return World(
        envs, observation, np.zeros(n), np.zeros(n, dtype=np.int64), np.zeros((0, 2)), 0, 0,
        normalization.start(envs.observation_space, n, normalize),
    )  # fmt: skip


@torch.no_grad()
def collect(
    net: Net,
    theta: Float[Tensor, " d"],
    world: World,
    length: int,
    generator: torch.Generator,
    normalize: normalization.Config,
    gamma: float,
    episodes: int = 0,
    act: Act | None = None,
) -> tuple[Rollout, World]:
    """T steps of every environment under π_θ, observation statistics frozen, rewards scaled afterwards.

    Or whole episodes: every environment then plays the same number, so that short ones are not over-represented, and
    begins a new one when the last is done. Each row of the rollout is then an episode from its first step, all filled
    up to the longest with rows that are not valid.

    Args:
        net: (θ, observation) -> (policy, value).
        theta: parameters.
        world: where to go on.
        length: T, steps per environment; with `episodes` the noise is drawn in blocks of this many steps.
        generator: for the action noise, drawn as one block.
        normalize: what is normalised.
        gamma: discount of the return whose spread scales the rewards.
        episodes: whole episodes to play in each environment; 0: T steps instead.
        act: (θ, observation, noise) -> action, a faster form of the network's policy.
    """
    envs, raw, statistics = world.envs, to_tensors(world.observation), world.normalizer
    noise_at = noise(net, envs.num_envs, length, generator)
    rows: list[tuple[Any, ...]] = []
    seen: Any
    raws: list[Observation] = []
    begins: list[np.ndarray] = [np.zeros(envs.num_envs, dtype=bool)]  # a memory that is carried here is of this episode
    finals: list[tuple[int, np.ndarray, Any, Tensor | None]] = []
    first = remembered = memory.start(net, envs.num_envs) if world.memory is None else world.memory
    returns, lengths = world.episode_return.copy(), world.episode_length.copy()
    finished: list[tuple[float, int]] = []
    played, t = np.zeros(envs.num_envs, dtype=np.int64), 0
    scored: tuple[Tensor, ...] = ()
    apart = first is None and not net.module.shared  # log-probabilities and values can wait: all at once cost less
    while (played < episodes).any() if episodes else t < length:
        seen = normalization.observation(statistics, raw, normalize)
        if apart:
            action = act(theta, seen, noise_at(t)) if act else net.only("policy", theta, seen).sample(noise_at(t))
        else:
            policy, value, remembered = memory.step(net, theta, seen, remembered)
            action = policy.sample(noise_at(t))
            scored = (policy.log_prob(action), value)
        raws.append(raw)
        step = envs.step(action.numpy())
        rows.append((seen, action, step, *scored))
        returns += step.reward
        lengths += 1 if step.valid is None else step.valid
        if step.ended.any():
            over = np.flatnonzero(step.ended)
            finished += [(float(returns[i]), int(lengths[i])) for i in over if not episodes or played[i] < episodes]
            returns[over], lengths[over] = 0.0, 0
            played += step.ended
            if step.valid is None and step.truncated.any():
                finals.append((t, step.truncated & ~step.terminated, step.next_observation, remembered))
        begins.append(step.ended if step.valid is None else ~step.valid)
        remembered = memory.forget(remembered, begins[-1])
        raw = to_tensors(step.observation)
        t += 1
    seen, action = (stack([row[i] for row in rows]) for i in range(2))
    logp, value = _scores(net, theta, seen, action) if apart else (stack([row[i] for row in rows]) for i in (3, 4))
    steps = [row[2] for row in rows]
    reward = torch.from_numpy(np.stack([step.reward for step in steps], 1).astype(np.float64))
    terminated, truncated, ended = (
        torch.from_numpy(np.stack([getattr(step, name) for step in steps], 1))
        for name in ("terminated", "truncated", "ended")
    )
    valid = None if steps[0].valid is None else torch.from_numpy(np.stack([step.valid for step in steps], 1))
    last = memory.step(net, theta, normalization.observation(statistics, raw, normalize), remembered)[1]
    next_value = torch.cat([value[:, 1:], last.unsqueeze(1)], 1)
    for t, cut, successor, kept in finals:  # the row after these belongs to another episode
        final = normalization.observation(statistics, to_tensors(successor), normalize)
        beyond = memory.step(net, theta, final, kept)[1]
        next_value[:, t] = torch.where(torch.from_numpy(cut), beyond, next_value[:, t])
    scaled, statistics = normalization.rewards(statistics, reward, ended, valid, gamma, normalize)
    if statistics.observation:
        statistics = normalization.observe(statistics, stack(raws), valid)
    recent = np.concatenate([world.recent, np.array(finished).reshape(-1, 2)])[-RECENT:]
    taken = world.steps + (reward.numel() if valid is None else int(valid.sum()))
    observation = step.observation
    if first is not None:
        seen = Remembered(seen, first, torch.from_numpy(np.stack(begins[:-1], 1)))
    data = Rollout(seen, action, logp, value, next_value, scaled.to(value.dtype), terminated, truncated, valid)
    if episodes:
        data, observation = _by_episode(data, ended, episodes), envs.restart()
        returns[:], lengths[:], statistics.running[:] = 0.0, 0, 0.0
        remembered = memory.start(net, envs.num_envs)
    return data, World(
        envs, observation, returns, lengths, recent, world.episodes + len(finished), taken, statistics, remembered
    )  # fmt: skip


def _scores(
    net: Net, theta: Float[Tensor, " d"], seen: Observation, action: Tensor
) -> tuple[Float[Tensor, "N T"], Float[Tensor, "N T"]]:
    """log π(a|s) and V(s) of all rows of a rollout, in blocks of time that keep the memory in bounds."""
    found: tuple[list[Tensor], list[Tensor]] = [], []
    for first in range(0, action.shape[1], 256):
        block = (slice(None), slice(first, first + 256))
        rows, acts = memory.merge(_picked(seen, block)), action[block]
        found[0].append(net.only("policy", theta, rows).log_prob(acts.flatten(0, 1)).view(acts.shape[:2]))
        found[1].append(net.only("critic", theta, rows).view(acts.shape[:2]))
    return torch.cat(found[0], 1), torch.cat(found[1], 1)


def _by_episode(data: Rollout, ended: Bool[Tensor, "N T"], episodes: int) -> Rollout:
    """One row per episode, the first `episodes` of every environment; what is beyond an episode's end is not valid."""
    before = ended.long().cumsum(1) - ended.long()  # episodes that this environment had finished before the step
    places = [
        torch.nonzero((before[i] == k) & (True if data.valid is None else data.valid[i])).squeeze(1)
        for i in range(len(before))
        for k in range(episodes)
    ]
    lengths = torch.tensor([len(place) for place in places])
    time = torch.nn.utils.rnn.pad_sequence(places, batch_first=True)
    rows = torch.arange(len(before)).repeat_interleave(episodes).unsqueeze(1).expand_as(time)
    valid = torch.arange(time.shape[1]) < lengths.unsqueeze(1)
    seen = data.observation
    observation = seen.observation if isinstance(seen, Remembered) else seen
    parts = (_picked(part, (rows, time)) for part in (observation, *data[1:-1]))
    picked = Rollout(*parts, valid)  # type: ignore[call-arg]
    if isinstance(seen, Remembered):  # every row begins an episode, without a memory
        nothing = seen.memory.new_zeros(len(rows), seen.memory.shape[1])
        picked = picked._replace(observation=Remembered(picked.observation, nothing, torch.zeros_like(valid)))
    return picked._replace(
        reward=picked.reward * valid, terminated=picked.terminated & valid, truncated=picked.truncated & valid
    )


def flatten(rollout: Rollout, psi: Float[Tensor, "N T"], value_target: Float[Tensor, "N T"]) -> Batch:
    """The rollout's transitions as one batch of N·T rows."""
    valid = None if rollout.valid is None else rollout.valid.flatten()
    seen = rollout.observation
    seen = seen if isinstance(seen, Remembered) else memory.merge(seen)
    return Batch(
        seen, rollout.action.flatten(0, 1), rollout.logp.flatten(), rollout.value.flatten(),
        psi.flatten(), value_target.flatten(), valid,
    )  # fmt: skip


def refuse_minibatches(size: int, length: int, num_envs: int) -> None:
    """Raise a `ValueError` for minibatches that a rollout cannot fill."""
    if size > length * num_envs:
        raise ValueError(
            f"minibatch_size is {size}, but a rollout has only rollout_length {length} × num_envs {num_envs} = "
            f"{length * num_envs} transitions"
        )


def packed(batch: Batch) -> Batch:
    """The rows that count, alone: padding would thin out minibatches, and masks slow their gradient steps."""
    if batch.valid is None or bool(batch.valid.all()):
        return batch._replace(valid=None)
    return _rows(batch, batch.valid.nonzero().squeeze(-1))._replace(valid=None)


def refuse_cut_sequences(config: Any, name: str) -> None:
    """Raise a `ValueError` where a policy has a memory and minibatches of this setting's size would cut sequences."""
    size, length, remembers = getattr(config, name), config.rollout_length, config.network.memory
    if remembers != "none" and size % length:
        raise ValueError(
            f"{name} is {size}, but with network.memory {remembers!r} minibatches are whole sequences: "
            f"allowed are multiples of rollout_length {length}"
        )


def minibatches(batch: Batch, num_epochs: int, size: int, generator: torch.Generator) -> Iterator[Batch]:
    """Every transition once an epoch, in a new random order each; the last minibatch of an epoch may be smaller.

    Reset rows take part in the order and are then left out, and so is a minibatch of nothing else. With a memory the
    order is that of environments, their sequences stay whole.

    Raises:
        ValueError: a size that would cut sequences.
    """
    total, remembers = batch.psi.shape[0], isinstance(batch.observation, Remembered)
    length = batch.observation.begins.shape[1] if remembers else 1  # type: ignore[union-attr]
    if size < total and size % length:
        raise ValueError(f"minibatch size is {size}, but a memory needs whole sequences: multiples of {length} steps")
    if size >= total:  # the whole batch is a sum over all rows, whatever their order
        yield from [batch if remembers else packed(batch)] * num_epochs
        return
    for _ in range(num_epochs):
        order = torch.randperm(total // length, generator=generator)
        shuffled = _rows(batch, order)
        for first in range(0, total, size):
            minibatch = _rows(shuffled, slice(first // length, (first + size) // length))
            if minibatch.valid is None or bool(minibatch.valid.any()):
                yield minibatch if remembers else packed(minibatch)


class Recollected(Protocol):
    """The settings of an algorithm that goes over rollouts of a fixed size."""

    @property
    def environment(self) -> environments.Config: ...
    @property
    def network(self) -> Any: ...
    @property
    def rollout_length(self) -> int: ...


def orders(
    config: Recollected, num_epochs: int, size: int, generator: torch.Generator
) -> Sequence[Int64[Tensor, " rows"]]:
    """The rows of every gradient step: each row once an epoch, in a new random order each; with a memory, sequences.

    The last of an epoch may have fewer; where one minibatch is the whole batch, its order is nobody's business: no
    rows stand for all. Steps of equal size come as one tensor.
    """
    total, length = config.environment.num_envs * config.rollout_length, 1
    if size >= total:
        return torch.zeros(num_epochs, 0, dtype=torch.int64)  # type: ignore[return-value]
    if getattr(config.network, "memory", "none") != "none":
        length = config.rollout_length
    total, size = total // length, size // length
    shuffled = [torch.randperm(total, generator=generator) for _ in range(num_epochs)]
    if total % size == 0:
        return torch.stack(shuffled).view(-1, size)  # type: ignore[return-value]
    return [rows for order in shuffled for rows in order.split(size)]


def pick(batch: Batch, rows: Int64[Tensor, " rows"]) -> Batch:
    """These rows of the batch, all where none are named; with a memory these sequences."""
    return _rows(batch, rows) if len(rows) else batch


def counted(batch: Batch) -> Int64[Tensor, ""] | None:
    """How many rows of a minibatch count, at least 1: one of reset rows alone has the gradient 0."""
    return None if batch.valid is None else batch.valid.sum().clamp(min=1)


def whitened(batch: Batch) -> Float[Tensor, " B"]:
    """Ψ with mean 0 and standard deviation 1; a single transition is its own mean, and gets 0."""
    if batch.psi.shape[0] < 2:
        return torch.zeros_like(batch.psi)
    if batch.valid is None or torch.compiler.is_compiling():
        return advantages.whiten(batch.psi, batch.valid)
    return advantages.whiten(batch.psi, batch.valid) if batch.valid.sum() > 1 else torch.zeros_like(batch.psi)


def summary(world: World) -> dict[str, float | int | None]:
    """What is reported of the last finished episodes; None before the first has finished."""
    mean = world.recent.mean(0) if len(world.recent) else (None, None)
    return {
        "episodes": world.episodes,
        "episode_return": None if mean[0] is None else float(mean[0]),
        "episode_length": None if mean[1] is None else float(mean[1]),
    }


def pack(world: World) -> dict[str, Tensor]:
    """The world as tensors, for a checkpoint."""
    tensors = {f"environments.{name}": torch.from_numpy(np.array(v)) for name, v in world.envs.snapshot().items()}
    tensors["episode_return"] = torch.from_numpy(world.episode_return.copy())
    tensors["episode_length"] = torch.from_numpy(world.episode_length.copy())
    tensors["recent"] = torch.from_numpy(world.recent.copy())
    tensors["episodes"], tensors["steps"] = torch.tensor(world.episodes), torch.tensor(world.steps)
    if world.memory is not None:
        tensors["memory"] = world.memory
    return tensors | normalization.pack(world.normalizer)


def unpack(
    tensors: dict[str, Tensor],
    config: environments.Config,
    normalize: normalization.Config,
    seed: int,
    first_index: int = 0,
) -> World:
    """The world that `pack` put away: environments rebuilt, their episodes replayed."""
    start = {k.removeprefix("environments."): v.numpy() for k, v in tensors.items() if k.startswith("environments.")}
    envs, observation = environments.make(config, seed, first_index, start)
    normalizer = normalization.unpack(tensors, envs.observation_space, normalize)
    if envs.kind == "pool":  # its running episodes are lost
        tensors = {**tensors, "episode_return": torch.zeros(envs.num_envs, dtype=torch.float64)}
        tensors["episode_length"] = torch.zeros(envs.num_envs, dtype=torch.int64)
        tensors.pop("memory", None)
    return World(
        envs, observation, tensors["episode_return"].numpy(), tensors["episode_length"].numpy(),
        tensors["recent"].numpy(), int(tensors["episodes"]), int(tensors["steps"]), normalizer,
        tensors.get("memory"),
    )  # fmt: skip


def noise(net: Net, n: int, length: int, generator: torch.Generator) -> Callable[[int], Tensor]:
    """Step -> noise of all environments: blocks of `length` steps, or a matrix for each interval of gSDE."""
    head: Head = net.module.policy.head  # type: ignore[assignment, union-attr]
    blocks: list[Tensor] = []

    def at(t: int) -> Tensor:
        interval = (head.noise_interval or length) if head.state_dependent else length
        while t // interval >= len(blocks):
            steps = () if head.state_dependent else (length,)
            blocks.append(head.noise((*steps, n, *head.noise_shape), generator))
        return blocks[t // interval] if head.state_dependent else blocks[t // interval][t % interval]

    return at


def stack(parts: list[Any]) -> Any:
    if isinstance(parts[0], dict):
        return {key: torch.stack([part[key] for part in parts], 1) for key in parts[0]}
    return torch.stack(parts, 1)


def _rows(batch: Batch, index: Tensor | slice) -> Batch:
    """Some of the transitions; with a memory, some of the sequences."""
    seen = batch.observation
    if not isinstance(seen, Remembered):
        return Batch(*(None if part is None else _picked(part, index) for part in batch))  # type: ignore[arg-type]
    begins: Any = seen.begins
    picked = Remembered(_picked(seen.observation, index), seen.memory[index], begins[index])
    rows: Any = batch[1:]
    parts = (None if part is None else part.unflatten(0, begins.shape)[index].flatten(0, 1) for part in rows)
    return Batch(picked, *parts)  # type: ignore[arg-type]


def _picked(part: Any, index: Any) -> Any:
    return {key: value[index] for key, value in part.items()} if isinstance(part, dict) else part[index]
