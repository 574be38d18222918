"""From a network's name and arguments in a job to the network: allowed by name, bounded, counted, then built.

A job is written by somebody else. So its `module:key` is compared as an exact string before any import, the key is
looked up in a dictionary and never as an attribute, arguments are bounded, and size is counted before memory is taken.

>>> network = build("partway.model.zoo:mlp", {"inputs": 4, "hidden": [8], "classes": 2},
...                 allowed=["partway.model.zoo:mlp"], most_parameters=1000)
>>> [name for name, _ in network.named_parameters()]
['hidden.0.weight', 'hidden.0.bias', 'output.weight', 'output.bias']
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from partway.errors import ConfigError, Refused


@dataclass(frozen=True)
class Between:
    """Bounds, inclusive, of an argument: of a number's value, of a list's or a string's length."""

    least: float
    most: float


@dataclass(frozen=True)
class Recipe:
    """How to build one named network.

    `arguments` is a frozen dataclass whose fields are `bool`, or `Annotated[t, Between(...)]` with t `int`, `float`,
    `str` or `tuple[Annotated[int, Between(...)], ...]`; `build` takes one of these.
    """

    build: Callable[[Any], nn.Module]
    arguments: type


def resolve(name: str, allowed: Sequence[str]) -> Recipe:
    """The recipe called `name`, as "module:key", a key of that module's `NETWORKS`.

    Raises:
        Refused: `name` is not, letter by letter, one of `allowed`; nothing is imported then. Reason NETWORK.
        ConfigError: the module is not installed or has no such network.
    """
    if name not in tuple(allowed):  # a tuple: were it a string, `in` would look for a part of it
        raise Refused(f"the network `{name}` is not among those allowed: {', '.join(allowed) or 'none'}", ["NETWORK"])
    module, colon, key = name.partition(":")
    if not (module and colon and key):
        raise ConfigError(f"a network is named `module:name`, not `{name}`")
    try:
        networks = vars(importlib.import_module(module)).get("NETWORKS")
    except ImportError as error:
        raise ConfigError(f"the network `{name}` cannot be imported ({error}); install its package here") from error
    if not isinstance(networks, dict):
        raise ConfigError(f"`{module}` has no dictionary NETWORKS, so it offers no networks")
    if key not in networks:
        raise ConfigError(f"`{module}` has no network `{key}`{_nearest(key, networks)}")
    recipe = networks[key]
    if not isinstance(recipe, Recipe):
        raise ConfigError(f"`{name}` is a {type(recipe).__name__}, not a Recipe")
    return recipe


def build(name: str, arguments: Mapping[str, Any], allowed: Sequence[str], most_parameters: int) -> nn.Module:
    """The network called `name`, first without memory to count its parameters, then for real.

    Raises:
        Refused: not allowed (NETWORK), or more than `most_parameters` parameters (NETWORK_SIZE).
        ConfigError: as `resolve`, or an argument that is unknown, missing, of a wrong type or out of bounds.
    """
    recipe = resolve(name, allowed)
    settings = _convert(name, recipe.arguments, arguments)
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        parameters = sum(p.numel() for p in recipe.build(settings).parameters())
    if parameters > most_parameters:
        raise Refused(
            f"the network `{name}` would have {parameters:,} parameters; at most {most_parameters:,} are allowed",
            ["NETWORK_SIZE"],
        )
    return recipe.build(settings)


def _convert(name: str, to: type, arguments: Mapping[str, Any]) -> Any:
    fields = {f.name: f for f in dataclasses.fields(to)}
    hints = typing.get_type_hints(to, include_extras=True)
    for key in arguments:
        if key not in fields:
            raise ConfigError(f"the network `{name}` has no argument `{key}`{_nearest(key, fields)}")
    for key, field in fields.items():
        without = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if without and key not in arguments:
            raise ConfigError(f"the network `{name}` needs the argument `{key}`")
    return to(**{key: _value(f"the argument `{key}` of `{name}`", hints[key], arguments[key]) for key in arguments})


def _value(what: str, hint: Any, value: Any) -> Any:
    """`value` as `hint` wants it; a bool is no int, an int is a float."""
    if hint is bool:
        if not isinstance(value, bool):
            raise ConfigError(f"{what} is true or false, not {value!r}")
        return value
    bounds = next((extra for extra in getattr(hint, "__metadata__", ()) if isinstance(extra, Between)), None)
    if bounds is None:
        raise ConfigError(f"{what} has no bounds in its recipe; write Annotated[..., Between(least, most)] there")
    plain = typing.get_args(hint)[0]
    if typing.get_origin(plain) is tuple:
        if not isinstance(value, list | tuple):
            raise ConfigError(f"{what} is a list, not {value!r}")
        _within(f"the length of {what}", bounds, len(value))
        each = typing.get_args(plain)[0]
        return tuple(_value(f"number {i + 1} of {what}", each, v) for i, v in enumerate(value))
    if plain not in (int, float, str) or not (type(value) is plain or (plain is float and type(value) is int)):
        raise ConfigError(f"{what} is of type {getattr(plain, '__name__', plain)}, not {value!r}")
    if plain is str:
        _within(f"the length of {what}", bounds, len(value))
    else:
        _within(what, bounds, value)
    return plain(value)


def _within(what: str, bounds: Between, value: float) -> None:
    if value < bounds.least:
        raise ConfigError(f"{what} is {value}; it is at least {bounds.least}")
    if not value <= bounds.most:  # so written, NaN is refused too
        raise ConfigError(f"{what} is {value}; it is at most {bounds.most}")


def _nearest(key: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(key, list(known), n=1)
    return f"; did you mean `{near[0]}`?" if near else f"; it has {', '.join(known)}"
