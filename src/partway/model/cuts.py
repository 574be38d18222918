"""Where a network can be cut, and what each cut costs: what crosses, and how much stands before and behind.

>>> import torch
>>> from torch import nn
>>> network = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
>>> for place in cuts(network, torch.zeros(2, 4)):
...     print(place.after, place.bytes_up, place.before.parameters, place.behind.parameters, place.ratio)
0 32 40 18 2.0
1 32 40 18 2.0
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils.flop_counter import FlopCounterMode

from partway.model import operators
from partway.model.cache import captured
from partway.model.capture import call_of, copied
from partway.model.check import tensors_of
from partway.model.cut import Whole
from partway.model.program import DTYPES, Node, Program, references


@dataclass(frozen=True, kw_only=True)
class Crosses:
    """A value that crosses, for one record."""

    name: str
    """Of the module that makes it, or of the network's input."""
    dtype: str
    shape: tuple[int, ...]
    gradient: bool
    """Whether a gradient comes back for it."""

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize


@dataclass(frozen=True, kw_only=True)
class Side:
    """What stands on one side of a cut; FLOPs for one record, 2 for a multiply-add."""

    parameters: int
    forward: int
    backward: int


@dataclass(frozen=True, kw_only=True)
class Place:
    """A place where a network can be cut in two, or not."""

    after: str
    others: tuple[str, ...]
    """Modules that end at the same place."""
    crosses: tuple[Crosses, ...]
    used_by: tuple[int, ...]
    """Numbers of the places before which something uses what is made between the last place and this one; the network's
    end has one more."""
    before: Side
    behind: Side
    input_bytes: int
    """Of a record as the network gets it."""
    why_not: str
    """Empty if it is legal."""

    @property
    def bytes_up(self) -> int:
        """Of a record, before the cut to behind it."""
        return sum(value.nbytes for value in self.crosses)

    @property
    def bytes_down(self) -> int:
        """Of a record's gradients, back."""
        return sum(value.nbytes for value in self.crosses if value.gradient)

    @property
    def ratio(self) -> float:
        """What goes up, to the record's own bytes."""
        return self.bytes_up / self.input_bytes


def cuts(
    network: nn.Module, example: Any, kwargs: Mapping[str, Any] | None = None, may_cross: Collection[str] = ()
) -> list[Place]:
    """Every place behind a module, or behind one call of it, in order, with what a cut there would cost.

    Args:
        network: left as it is.
        example: a tensor of shape (records, ...), or a tuple of what the network is called with.
        kwargs: what else it is called with.
        may_cross: as in `cut`.

    Raises:
        CutError: the network cannot be captured.
    """
    call = call_of(example, kwargs)
    whole = Whole(network, captured(network, call)[0])
    program = whole.captured.training
    costs = _measured(network, whole, dict(zip(program.inputs, call.tensors, strict=True)))
    makers = {node.name: node.path for node in program.nodes}
    ends: dict[int, list[str]] = {}
    for path in whole.paths:
        ends.setdefault(whole.mark(program, path), []).append(path)
    places = []
    users = _users(program, sorted(ends), whole.known[True].numbers)
    for number, (mark, paths) in enumerate(sorted(ends.items())):
        after, *others = sorted(paths, key=lambda path: (path.count("."), path))
        found, why_not = whole.look([after], (), may_cross)
        crosses = tuple(
            Crosses(
                name=makers.get(crossing.value, crossing.value) or "network",
                dtype=program.values[crossing.value].dtype,
                shape=tuple(costs[crossing.value].shape[1:]),
                gradient=costs[crossing.value].gradient,
            )
            for crossing in found
            if program.values[crossing.value].tensor
        )
        places.append(
            Place(
                after=after,
                others=tuple(others),
                crosses=crosses,
                used_by=tuple(sorted(users[number])),
                before=_side(network, program, costs, call.rows, program.nodes[:mark]),
                behind=_side(network, program, costs, call.rows, program.nodes[mark:]),
                input_bytes=sum(t.nbytes for t in call.tensors) // call.rows,
                why_not=why_not,
            )
        )
    return places


def _users(program: Program, marks: Sequence[int], anywhere: Collection[str]) -> list[set[int]]:
    """For each part of a program between two marks: the later parts that use what it makes, and do not make again."""
    part_of = {n.name: bisect.bisect_right(marks, at) for at, n in enumerate(program.nodes) if n.name not in anywhere}
    users: list[set[int]] = [set() for _ in range(len(marks) + 1)]
    for node in (node for node in program.nodes if node.name in part_of):
        for name in references(node):
            if name in part_of and program.values[name].tensor and part_of[name] < part_of[node.name]:
                users[part_of[name]].add(part_of[node.name])
    return users


@dataclass(frozen=True)
class _Cost:
    shape: tuple[int, ...]
    gradient: bool
    forward: int = 0
    backward: int = 0


def _side(network: nn.Module, program: Program, costs: Mapping[str, _Cost], rows: int, nodes: Sequence[Node]) -> Side:
    known = dict(network.named_parameters())
    used = {program.state[v] for node in nodes for v in references(node) if v in program.state}
    return Side(
        parameters=sum(known[name].numel() for name in used if name in known),
        forward=sum(costs[node.name].forward for node in nodes) // rows,
        backward=sum(costs[node.name].backward for node in nodes) // rows,
    )


def _measured(network: nn.Module, whole: Whole, inputs: Mapping[str, Tensor]) -> dict[str, _Cost]:
    """Shape and FLOPs of every value in training, for all of the example's records; nothing is computed."""
    (piece,) = whole.pieces([], (), ())
    piece = copied(piece).to("meta").train()  # type: ignore[assignment]
    given = [inputs[name].to("meta") for name in piece.inputs]
    slots, costs = piece.slots(given), {n: _Cost(tuple(t.shape), False) for n, t in inputs.items()}
    for node, step in zip(piece.programs[True].nodes, piece.run.steps, strict=True):
        forward = backward = 0
        if not operators.lasting(node.operator, node.args):
            args, kwargs = pytree.tree_map_only(Tensor, _leaf, step.arguments(slots))
            with FlopCounterMode(display=False) as counter:
                made = step.call(*args, **kwargs)
            forward = counter.get_total_flops()
            wanted = [t for t in tensors_of(made) if t.requires_grad]
            if forward and node.gradient and wanted:
                with FlopCounterMode(display=False) as counter:
                    torch.autograd.backward(wanted, [torch.ones_like(t) for t in wanted])
                backward = counter.get_total_flops()
        step(slots)
        made = slots[step.out]
        tensor = isinstance(made, Tensor)
        costs[node.name] = _Cost(tuple(made.shape) if tensor else (), tensor and made.requires_grad, forward, backward)
    return costs


def _leaf(tensor: Tensor) -> Tensor:
    return tensor.detach().requires_grad_(tensor.requires_grad)
