"""A piece of a network that runs its program: an interpreter over operators by name, and no other code.

>>> import torch
>>> from partway.model.capture import capture
>>> network = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.Tanh())
>>> captured = capture(network, torch.zeros(2, 3))
>>> piece = Piece(captured.training, captured.evaluation, dict(network.named_parameters()))
>>> torch.equal(piece(torch.ones(5, 3)), network(torch.ones(5, 3))), list(piece.state_dict())
(True, ['0.weight', '0.bias'])
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
import torch
from torch import Tensor, nn

from partway.errors import CutError
from partway.model import operators
from partway.model.program import DTYPES, Argument, Node, Program, Ref, Value, Word, meaning, references

_DEVICE = 0
"""The slot of the device on which a piece runs; values have the slots behind it."""


class Packed:
    """Several values of a record side by side in one tensor, as parties send and join them; one stays as it is.

    Whole numbers stand there as their bytes, each a number from 0 to 255: exact in every type that crosses.

    >>> values = [Value("float32", (2, 2)), Value("int64", (3,))]
    >>> packed = Packed(values, values)
    >>> crossing = packed.beside([torch.ones(1, 2, 2), torch.tensor([[7, -1, 2**40]])])
    >>> crossing.shape, packed.apart(crossing.half())[1]
    (torch.Size([1, 28]), tensor([[            7,            -1, 1099511627776]]))

    Args:
        inputs: of each value that comes in: its type, and the shape of a record's.
        outputs: the same of those that go out.
        portions: where these go to different segments: for each the numbers of its values. Else all go to one.
        flat: one value alone is laid out as several are, for others stand beside it where it goes.

    Raises:
        CutError: a value beside others is a size, or complex.
    """

    def __init__(
        self,
        inputs: Sequence[Value],
        outputs: Sequence[Value],
        portions: Sequence[Sequence[int]] = (),
        flat: bool = False,
    ) -> None:
        self.inputs, self.outputs = tuple(inputs), tuple(outputs)
        self.portions, self.flat = tuple(map(tuple, portions)), flat
        for values in (self.inputs, self.outputs):
            if len(values) > 1 and any(not value.tensor or DTYPES[value.dtype].is_complex for value in values):
                told = ", ".join(value.dtype for value in values)
                raise CutError(f"values of types {told} cross together, and do not fit into one tensor; cut elsewhere")

    @property
    def widths(self) -> tuple[int, ...]:
        """Numbers of a record in each portion."""
        sizes = [_numbers(value) for value in self.outputs]
        return tuple(sum(sizes[number] for number in portion) for portion in self.portions)

    def apart(self, tensor: Tensor) -> list[Tensor]:
        """The values that one tensor is made of."""
        if len(self.inputs) == 1 and tensor.dim() == 1 + len(self.inputs[0].shape):
            return [tensor]
        sizes = [_numbers(value) for value in self.inputs]
        made = []
        for part, value in zip(torch.split(tensor, sizes, 1), self.inputs, strict=True):
            if not value.floating:
                kind, octets = DTYPES[value.dtype], part.detach().to(torch.uint8, copy=True).reshape(-1)
                part = octets.bool() if kind is torch.bool else octets.view(kind)
            made.append(part.reshape(len(tensor), *map(int, value.shape)))
        return made

    def beside(self, values: Sequence[Tensor]) -> Tensor:
        """One tensor of the values, shape (records, numbers of a record)."""
        if self.portions:
            values = [values[number] for portion in self.portions for number in portion]
        if len(values) == 1 and not self.flat:
            return values[0]
        kind = functools.reduce(torch.promote_types, [v.dtype for v in values if v.is_floating_point()], torch.uint8)
        flat = [value if value.is_floating_point() else _octets(value) for value in values]
        return torch.cat([value.reshape(len(value), -1).to(kind) for value in flat], 1)


def _octets(value: Tensor) -> Tensor:
    """Whole numbers as their bytes, shape (records, ..., bytes); clone makes the strides that `view` asks for."""
    return value.unsqueeze(-1).clone(memory_format=torch.contiguous_format).view(torch.uint8)


def _numbers(value: Value) -> int:
    """In how many columns a record's part of a value stands."""
    return math.prod(map(int, value.shape)) * (1 if value.floating else DTYPES[value.dtype].itemsize)


class Piece(nn.Module):
    """A program as a module, in training and in evaluation, with its parameters under the network's own names.

    It is called with its inputs one after the other. One output comes back as a tensor, several as a tuple; those of
    the network itself in a dictionary where the network gives them by name.

    Args:
        training: what it runs in training.
        evaluation: what it runs in evaluation; inputs and outputs have the same names.
        tensors: parameters and persistent buffers, by name, in the network's order; several names may share one.
        passing: buffers that the network does not save, and constants.
    """

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    fresh: Callable[[], nn.Module] | None = None
    """Builds the whole network anew, with weights that its own code draws."""
    drawn: frozenset[str] | None = None
    """Of a piece from a folder: the tensors that the network's own code draws at random. They hold one such draw."""
    packed: Packed | None = None
    """Where it is run by parties: how several values make one tensor. Else it takes and gives them one by one."""

    def __init__(
        self, training: Program, evaluation: Program, tensors: Mapping[str, Tensor], passing: Mapping[str, Tensor] = {}
    ) -> None:
        super().__init__()
        for name, tensor in tensors.items():
            self._keep(name, tensor, persistent=True)
        for name, tensor in passing.items():
            self._keep(name, tensor, persistent=False)
        self.programs = {True: training, False: evaluation}
        self.inputs = training.inputs
        self.outputs = tuple(name for output in training.outputs for name in references(output))
        self._runs = {mode: _compiled(program) for mode, program in self.programs.items()}

    def takes(self, inputs: Sequence[str]) -> None:
        """Sets in which order it is called with its inputs."""
        self.programs = {train: msgspec.structs.replace(p, inputs=tuple(inputs)) for train, p in self.programs.items()}
        self.inputs = tuple(inputs)

    def passes(self, name: str) -> None:
        """It puts out one of its inputs, too, for a later piece.

        Raises:
            CutError: it writes into it.
        """
        if any(name in run.written for run in self._runs.values()):
            raise CutError(f"`{name}` is written in place before another piece uses it; write out of place")
        self.outputs = (*self.outputs, name)
        for mode, program in self.programs.items():
            made = tuple(Ref(output) for output in self.outputs)
            self.programs[mode] = msgspec.structs.replace(program, outputs=made, keys=())
            self._runs[mode] = _compiled(self.programs[mode])

    def _keep(self, name: str, tensor: Tensor, persistent: bool) -> None:
        owner: nn.Module = self
        *above, leaf = name.split(".")
        for part in above:
            if part not in owner._modules:
                owner.add_module(part, nn.Module())
            owner = owner._modules[part]  # type: ignore[assignment]
        if isinstance(tensor, nn.Parameter):
            owner.register_parameter(leaf, tensor)
        else:
            owner.register_buffer(leaf, tensor, persistent=persistent)

    def spec(self, name: str) -> Value:
        """What an input or output is."""
        return self.programs[True].values[name]

    @property
    def draws(self) -> bool:
        """Whether a forward in training may use random numbers."""
        return any(operators.find(node.operator).random for node in self.programs[True].nodes)

    @property
    def mixes(self) -> str | None:
        """The path of the first normalisation over a batch's records in training; None if there is none."""
        for node in self.programs[True].nodes:
            if node.operator == "aten.batch_norm.default" and node.args[5] is True:
                return node.path or "batch_norm"
        return None

    @property
    def idle(self) -> list[str]:
        """Parameters that nothing in training uses, and that so get no gradient."""
        used = {id(self._find(name)) for name in self.programs[True].state.values()}
        return [name for name, parameter in self.named_parameters() if id(parameter) not in used]

    def forward(self, *values: Any) -> Any:
        """Runs the program of the mode that the piece is in.

        Raises:
            CutError: an input is missing or of another type or shape than the program is for.
        """
        run, program = self._runs[self.training], self.programs[self.training]
        slots = self.slots(self.packed.apart(values[0]) if self.packed is not None else values)
        for step in run.steps:
            step(slots)
        made = tuple(slots[run.slot[output.name]] for output in program.outputs if isinstance(output, Ref))
        if self.packed is not None:
            return self.packed.beside(made)
        if program.keys is None:
            return made[0]
        return dict(zip(program.keys, made, strict=True)) if program.keys else made

    @property
    def run(self) -> Run:
        """What runs in the mode that the piece is in."""
        return self._runs[self.training]

    def slots(self, values: Sequence[Any]) -> list[Any]:
        """Where all values of a run go, with the inputs and the state in their places.

        Raises:
            CutError: as `forward`.
        """
        run, program = self._runs[self.training], self.programs[self.training]
        if len(values) != len(program.inputs):
            raise CutError(f"this piece takes {', '.join(program.inputs)}, and not {len(values)} values")
        slots: list[Any] = [None] * run.slots
        sizes: dict[str, int] = {}
        device: torch.device | None = None
        for name, value in zip(program.inputs, values, strict=True):
            _check_input(name, program.values[name], value, sizes)
            if isinstance(value, Tensor):
                if name in run.written:
                    value = value.clone()
                elif value.requires_grad and value.is_leaf:
                    # Autocast keeps one cast of a leaf, as of a weight, and would add up its uses' gradients in half.
                    value = value.view_as(value)
                device = device or value.device
            slots[run.slot[name]] = value
        for value, name in program.state.items():
            slots[run.slot[value]] = self._find(name)
            device = device or slots[run.slot[value]].device
        slots[_DEVICE] = device or torch.device("cpu")
        return slots

    def _find(self, name: str) -> Tensor:
        owner: nn.Module = self
        *above, leaf = name.split(".")
        for part in above:
            owner = owner._modules[part]  # type: ignore[assignment]
        found: Tensor | None = owner._parameters.get(leaf)
        if found is None:
            found = owner._buffers[leaf]
        assert found is not None
        return found


def _check_input(name: str, spec: Value, value: Any, sizes: dict[str, int]) -> None:
    if not spec.tensor:
        if type(value).__name__ != spec.dtype:
            raise CutError(f"`{name}` is {spec.dtype}, not {type(value).__name__}")
        return
    if not isinstance(value, Tensor):
        raise CutError(f"`{name}` is a tensor, not {type(value).__name__}")
    kind = DTYPES[spec.dtype]
    if value.dtype != kind and not (value.is_floating_point() and kind.is_floating_point):
        raise CutError(f"`{name}` is {spec.dtype}, not {str(value.dtype).removeprefix('torch.')}")
    fits = value.dim() == len(spec.shape)
    for extent, size in zip(spec.shape, value.shape, strict=False):
        if isinstance(extent, int):
            fits = fits and extent == size
        elif extent.isalnum():
            fits = fits and sizes.setdefault(extent, size) == size
    if not fits:
        told = " x ".join(map(str, spec.shape))
        raise CutError(f"`{name}` has the shape {tuple(value.shape)}, where {told} is asked for")


# -- what a program becomes before it runs


@dataclass(frozen=True, slots=True)
class Run:
    steps: tuple[Step, ...]
    slots: int
    slot: Mapping[str, int]
    written: frozenset[str]
    """Inputs that the program writes into, or into what shares their memory."""


class Step:
    """One call: arguments, with holes into which values are put."""

    __slots__ = ("args", "autocast", "call", "check", "free", "gradient", "holes", "kwargs", "lists", "out", "words")

    def __init__(self, node: Node, slot: Mapping[str, int], free: Sequence[int]) -> None:
        operator = operators.find(node.operator)
        self.call, self.out, self.free = operator.call, slot[node.name], tuple(free)
        self.check = node.operator if node.operator.split(".")[1] in ("lstm", "gru", "rnn_tanh", "rnn_relu") else None
        self.gradient, self.autocast = node.gradient, node.autocast
        self.args: list[Any] = []
        self.holes: list[tuple[int, int]] = []
        self.lists: list[tuple[int, list[Any], list[tuple[int, int]]]] = []
        for place, argument in enumerate(node.args):
            plain, holes = _split(argument, slot)
            self.args.append(plain)
            if isinstance(plain, list):
                if holes:
                    self.lists.append((place, plain, holes))
            elif holes:
                self.holes.append((place, holes[0][1]))
        self.kwargs: dict[str, Any] = {}
        self.words: list[tuple[str, int]] = []
        for key, argument in node.kwargs.items():
            self.kwargs[key], holes = _split(argument, slot)
            if isinstance(argument, tuple) and holes:
                raise CutError(f"{node.operator}: a list of values as `{key}` is more than a segment can run")
            if holes:
                self.words.append((key, holes[0][1]))

    def arguments(self, slots: Sequence[Any]) -> tuple[list[Any], dict[str, Any]]:
        """The arguments of this call."""
        args, kwargs = self.args, self.kwargs
        if self.holes or self.lists:
            args = args.copy()
            for place, slot in self.holes:
                args[place] = slots[slot]
            for place, items, holes in self.lists:
                items = items.copy()
                for at, slot in holes:
                    items[at] = slots[slot]
                args[place] = items
        if self.words:
            kwargs = kwargs.copy()
            for key, slot in self.words:
                kwargs[key] = slots[slot]
        if self.check is not None:
            operators.check_recurrent(self.check, args)
        return args, kwargs

    def __call__(self, slots: list[Any]) -> None:
        args, kwargs = self.arguments(slots)
        if self.gradient and self.autocast:
            slots[self.out] = self.call(*args, **kwargs)
        else:
            kind = slots[_DEVICE].type  # autocast knows no `meta`
            plain = self.autocast or kind == "meta"
            off = contextlib.nullcontext() if plain else torch.autocast(kind, enabled=False)
            with torch.set_grad_enabled(self.gradient and torch.is_grad_enabled()), off:
                slots[self.out] = self.call(*args, **kwargs)
        for slot in self.free:
            slots[slot] = None


def _split(argument: Argument, slot: Mapping[str, int]) -> tuple[Any, list[tuple[int, int]]]:
    """An argument as the operator takes it, and which of its items come from which slot."""
    if isinstance(argument, tuple):
        parts = [_split(item, slot) for item in argument]
        return [plain for plain, _ in parts], [(n, holes[0][1]) for n, (_, holes) in enumerate(parts) if holes]
    if isinstance(argument, Ref):
        return None, [(0, slot[argument.name])]
    if isinstance(argument, Word):
        if argument.kind == "device":
            return None, [(0, _DEVICE)]
        return meaning(argument, torch.device("cpu")), []
    return argument, []


def _compiled(program: Program) -> Run:
    names = [*program.inputs, *program.state, *(node.name for node in program.nodes)]
    slot = {name: number for number, name in enumerate(dict.fromkeys(names), _DEVICE + 1)}
    kept = {*references(program.outputs), *program.state}
    last: dict[str, int] = {}
    for place, node in enumerate(program.nodes):
        for name in (node.name, *references(node)):
            last[name] = place
    free: dict[int, list[int]] = {}
    for name, place in last.items():
        if name not in kept:
            free.setdefault(place, []).append(slot[name])
    steps = tuple(Step(node, slot, free.get(place, ())) for place, node in enumerate(program.nodes))
    return Run(steps, len(slot) + 1, slot, frozenset(_written(program)))


def _written(program: Program) -> set[str]:
    """Inputs that are written in place, by their own name or through a view."""
    base = {name: {name} for name in program.inputs}
    found: set[str] = set()
    for node in program.nodes:
        operator = operators.find(node.operator)
        base[node.name] = set()
        for argument in (*operator.writes, *operator.views):
            own = {b for name in operators.values_at(node, argument) for b in base.get(name, ())}
            base[node.name] |= own
            if argument in operator.writes:
                found |= own
    return found
