"""Settings: frozen dataclasses, their ranges, and their way to JSON and back."""

import dataclasses
import math
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def within(config: Any, low: float, high: float | None, *names: str) -> None:
    """low ≤ value (≤ high) for each named field; a field that is None is switched off and passes.

    Raises:
        ValueError: naming the field, its value and what is allowed.
    """
    for name in names:
        value = getattr(config, name)
        if value is not None and not (low <= value and (high is None or value <= high)):
            allowed = f"{low} or more" if high is None else f"{low} to {high}"
            raise ValueError(f"{name} is {value}, allowed: {allowed}")


def positive(config: Any, *names: str) -> None:
    """0 < value < inf for each named field; None passes, NaN does not."""
    for name in names:
        value = getattr(config, name)
        if value is not None and not 0 < value < math.inf:
            raise ValueError(f"{name} is {value}, allowed: above 0 and finite")


def below_one(config: Any, *names: str) -> None:
    """0 ≤ value < 1 for each named field: the share that a running average keeps."""
    for name in names:
        value = getattr(config, name)
        if not 0 <= value < 1:
            raise ValueError(f"{name} is {value}, allowed: 0 to below 1")


def to_json(config: Any) -> Any:
    """A dataclass as JSON values; dataclasses say their type, so that a union can be read back.

    >>> to_json({"path": Path("runs"), "widths": (64, 64)})
    {'path': 'runs', 'widths': [64, 64]}
    """
    if dataclasses.is_dataclass(config) and not isinstance(config, type):
        fields = {f.name: to_json(getattr(config, f.name)) for f in dataclasses.fields(config)}
        return {"type": type(config).__name__, **fields}
    if isinstance(config, Path):
        return str(config)
    if isinstance(config, Mapping):
        return {str(key): to_json(value) for key, value in config.items()}
    if isinstance(config, list | tuple):
        return [to_json(value) for value in config]
    return config


def from_json(kind: Any, value: Any) -> Any:
    """The inverse of `to_json` for a type annotation.

    >>> from_json(tuple[int, ...], [64, 64])
    (64, 64)
    """
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is typing.Annotated:
        return from_json(arguments[0], value)
    if origin in (typing.Union, types.UnionType):
        if value is None:
            return None
        named = [a for a in arguments if dataclasses.is_dataclass(a) and getattr(a, "__name__", None) == _type(value)]
        plain = [a for a in arguments if a is not type(None)]
        return from_json((named or plain)[0], value)
    if dataclasses.is_dataclass(kind) and isinstance(kind, type):
        hints = typing.get_type_hints(kind, include_extras=True)
        names = {f.name for f in dataclasses.fields(kind)}
        unknown = set(value) - names - {"type"}
        if unknown:
            raise ValueError(
                f"{kind.__name__} has no field {', '.join(sorted(unknown))}; allowed: {', '.join(sorted(names))}"
            )
        return kind(**{name: from_json(hints[name], value[name]) for name in names if name in value})
    if origin is tuple:
        return tuple(from_json(arguments[0], item) for item in value)
    return Path(value) if kind is Path else value


def _type(value: Any) -> str | None:
    return value.get("type") if isinstance(value, dict) else None
