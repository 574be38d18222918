"""A network as data: the operators that it runs one after the other, by name, on values by name. Nothing here runs.

>>> node = Node("relu", "aten.relu.default", (Ref("x"),))
>>> program = Program(inputs=("x",), nodes=(node,), outputs=(Ref("relu"),))
>>> list(references(node)), msgspec.json.decode(msgspec.json.encode(program), type=Program) == program
(['x'], True)
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Literal, TypeAlias

import msgspec
import torch

DTYPES = {
    str(d).removeprefix("torch."): d
    for d in (
        torch.float32,
        torch.float64,
        torch.float16,
        torch.bfloat16,
        torch.int64,
        torch.int32,
        torch.int16,
        torch.int8,
        torch.uint8,
        torch.bool,
        torch.complex64,
        torch.complex128,
    )
}
LAYOUTS = {"strided": torch.strided}
FORMATS = {
    str(f).removeprefix("torch."): f
    for f in (torch.contiguous_format, torch.channels_last, torch.preserve_format, torch.channels_last_3d)
}
NUMBERS = {"inf": float("inf"), "-inf": float("-inf"), "nan": float("nan")}


class Ref(msgspec.Struct, frozen=True, tag="value", forbid_unknown_fields=True):
    """A value that an input, the state or an earlier node has made."""

    name: str


class Word(msgspec.Struct, frozen=True, tag="word", forbid_unknown_fields=True):
    """What JSON has no word for. A `device` is wherever the segment runs, and has no name."""

    kind: Literal["dtype", "layout", "format", "number", "device"]
    name: str = ""


Atom: TypeAlias = bool | int | float | str | Ref | Word | None
Argument: TypeAlias = Atom | tuple[Atom, ...]


class Node(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """One call of one operator, and where in the network's modules it stands."""

    name: str
    """Of what it makes."""
    operator: str
    args: tuple[Argument, ...] = ()
    kwargs: dict[str, Argument] = {}
    modules: tuple[str, ...] = ()
    """The paths of the modules in which it stands, from the outermost; `block#1` is the second call of `block`."""
    gradient: bool = True
    """False within `torch.no_grad()`."""
    autocast: bool = True
    """False where the network turns autocast off."""

    @property
    def path(self) -> str:
        """Of the innermost module."""
        return self.modules[-1] if self.modules else ""


class Value(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A value's type and shape."""

    dtype: str
    """Of a tensor; `int`, `float` or `bool` of a number, `tuple` of several tensors."""
    shape: tuple[int | str, ...] = ()
    """A symbol, as in `s0`, stands for a size that may change, such as the number of records."""

    @property
    def tensor(self) -> bool:
        return self.dtype in DTYPES

    @property
    def floating(self) -> bool:
        return self.tensor and (DTYPES[self.dtype].is_floating_point or DTYPES[self.dtype].is_complex)


class Program(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A whole network, or a piece, in one mode."""

    inputs: tuple[str, ...] = ()
    state: dict[str, str] = {}
    """Parameters and buffers: the network's own name of each, by value."""
    nodes: tuple[Node, ...] = ()
    outputs: tuple[Argument, ...] = ()
    values: dict[str, Value] = {}
    keys: tuple[str, ...] | None = None
    """Names of the outputs where they come as a dictionary; empty where they come as a tuple; None of a single one."""


def references(of: Any) -> Iterator[str]:
    """Names of the values that a node or an argument uses, with repetitions."""
    if isinstance(of, Ref):
        yield of.name
    elif isinstance(of, tuple | list):
        for item in of:
            yield from references(item)
    elif isinstance(of, Node):
        yield from references(of.args)
        yield from references(tuple(of.kwargs.values()))


def renamed(argument: Any, names: Mapping[str, str]) -> Any:
    """An argument in which some values have other names."""
    if isinstance(argument, Ref):
        return Ref(names[argument.name]) if argument.name in names else argument
    if isinstance(argument, tuple):
        return tuple(renamed(item, names) for item in argument)
    return argument


def meaning(word: Word, device: torch.device) -> Any:
    """What a word stands for where a segment runs.

    Raises:
        KeyError: there is no such word.
    """
    if word.kind == "device":
        return device
    words: Mapping[str, Mapping[str, Any]] = {"dtype": DTYPES, "layout": LAYOUTS, "format": FORMATS, "number": NUMBERS}
    return words[word.kind][word.name]
