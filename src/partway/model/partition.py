"""Where a program can be cut, what crosses there, and the programs of the pieces.

A program's nodes run one after the other; a cut lies between two of them. A value that is made before it and used
behind it crosses. Sizes, and what is made of them and of buffers that stay as they are, as angles of positions are, is
made again where it is needed.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

import msgspec

from partway.errors import CutError
from partway.model import operators
from partway.model.program import Node, Program, Ref, Value, references


@dataclass(frozen=True)
class Facts:
    """What a program's values hang on."""

    maker: Mapping[str, int]
    """The place of the node that makes a value."""
    weighted: frozenset[str]
    """Values that a parameter has had a part in."""
    inputs: Mapping[str, frozenset[str]]
    """Inputs that have had a part in a value."""
    numbers: frozenset[str]
    """Sizes, and what hangs on sizes, fixed numbers and fixed buffers alone."""
    rows: str | int
    """The symbol that stands for the number of records."""
    uses: Mapping[str, tuple[str, ...]]
    """The values that a node uses."""


def facts(program: Program, parameters: Collection[str], fixed: Collection[str] = ()) -> Facts:
    """What each value hangs on.

    Args:
        parameters: names of what in the program's state is a parameter.
        fixed: names of what in it neither is trained nor written.
    """
    weighted = {value for value, name in program.state.items() if name in parameters}
    inputs: dict[str, frozenset[str]] = {name: frozenset([name]) for name in program.inputs}
    maker: dict[str, int] = {}
    numbers: set[str] = set()
    known = {value for value, name in program.state.items() if name in fixed}
    uses = {node.name: tuple(references(node)) for node in program.nodes}
    for place, node in enumerate(program.nodes):
        used = uses[node.name]
        maker[node.name] = place
        if weighted.intersection(used):
            weighted.add(node.name)
        value = program.values.get(node.name)
        number = value is not None and value.dtype in ("int", "float", "bool") and not value.tensor
        plain = all(u in numbers or u in known for u in used) and not operators.find(node.operator).random
        if (number and node.operator != "py.getitem") or (plain and not operators.lasting(node.operator, node.args)):
            numbers.add(node.name)
        else:
            inputs[node.name] = frozenset().union(*(inputs.get(u, frozenset()) for u in used))
    first = next((program.values[name] for name in program.inputs if program.values[name].shape), Value("tuple"))
    rows = first.shape[0] if first.shape else 0
    return Facts(maker, frozenset(weighted), inputs, frozenset(numbers), rows, uses)


def written_state(program: Program) -> set[str]:
    """Names of the state that a program writes."""
    found: set[str] = set()
    for node in program.nodes:
        written = set(references(operators.written(node.operator, node.args, node.kwargs)))
        if operators.keeps_statistics(node.operator, node.args):
            written |= set(references(node.args[3:5]))
        found |= {program.state[value] for value in written if value in program.state}
    return found


def end_of(program: Program, path: str) -> int:
    """The place behind the last node of a module, or of one call of it, as in `block#0`.

    Raises:
        CutError: no such module runs, or it runs more than once and the call is not said.
    """
    module, _, number = path.partition("#")
    ends: dict[str, int] = {}
    for place, node in enumerate(program.nodes):
        for each in node.modules:
            if each.partition("#")[0] == module:
                ends[each.partition("#")[2] or "0"] = place + 1
    if not ends:
        raise CutError(f"no operator runs in `{module}`")
    if number in ends:
        return ends[number]
    if number or len(ends) > 1:
        raise CutError(f"`{module}` runs {len(ends)} times: say {', '.join(f'`{module}#{n}`' for n in ends)}")
    return ends["0"]


# -- cutting


@dataclass(frozen=True)
class Crossing:
    """A value that goes from one piece to others, or an input that goes elsewhere than to the first."""

    value: str
    """Its name in the program."""
    source: int
    """-1 of an input."""
    targets: tuple[int, ...]


def divide(program: Program, marks: Sequence[int], known: Facts) -> tuple[list[Program], list[Crossing]]:
    """The pieces of a program that is cut before the nodes at `marks`, and what crosses between them.

    Raises:
        CutError: a write in place would be lost between two pieces.
    """
    stage = _stages(program, marks, known)
    used: dict[str, set[int]] = {}
    for node in program.nodes:
        if node.name not in known.numbers:
            for value in known.uses[node.name]:
                used.setdefault(value, set()).add(stage[node.name])
    for value in references(program.outputs):
        used.setdefault(value, set()).add(len(marks))
    crossing: dict[str, set[int]] = {}
    for value, targets in used.items():
        source = stage.get(value, 0)
        if targets - {source} and value not in program.state and value not in known.numbers:
            crossing[value] = targets - {source}
    pieces = [_piece(program, known, stage, number, crossing, used) for number in range(len(marks) + 1)]
    untold: dict[str, set[int]] = {}
    for number, (_, sizes) in enumerate(pieces):
        for size in sizes:
            untold.setdefault(size, set()).add(number)
    if untold:  # sizes that nothing which comes in tells: they cross as the numbers that they are
        known = replace(known, numbers=known.numbers - untold.keys())
        crossing |= untold
        pieces = [_piece(program, known, stage, number, crossing, used) for number in range(len(marks) + 1)]
    _refuse_lost_writes(program, stage, crossing)
    found = [
        Crossing(value, stage.get(value, -1), tuple(sorted(targets)))
        for value, targets in sorted(crossing.items(), key=lambda item: known.maker.get(item[0], -1))
    ]
    return [piece for piece, _ in pieces], found


def _stages(program: Program, marks: Sequence[int], known: Facts) -> dict[str, int]:
    """Which piece makes a value. What picks one of several tensors stays with what made them."""
    stage: dict[str, int] = {}
    for place, node in enumerate(program.nodes):
        stage[node.name] = sum(place >= mark for mark in marks)
        if node.operator == "py.getitem":
            stage[node.name] = stage.get(known.uses[node.name][0], stage[node.name])
    return stage


def _piece(
    program: Program,
    known: Facts,
    stage: Mapping[str, int],
    number: int,
    crossing: Mapping[str, Collection[int]],
    used: Mapping[str, Collection[int]],
) -> tuple[Program, list[str]]:
    """One piece, and the sizes that it needs and that nothing which comes in tells."""
    last = number == max(max(targets, default=0) for targets in used.values())
    inputs = [name for name in program.inputs if number in used.get(name, ())]
    inputs += [value for value, targets in crossing.items() if number in targets and value not in program.inputs]
    outputs = [Ref(value) for value in crossing if stage.get(value, -1) == number]
    nodes = {n.name: n for n in program.nodes if stage[n.name] == number and n.name not in known.numbers}
    here = {*inputs, *nodes}
    untold: list[str] = []

    def make(value: str) -> None:
        """Makes a size, or what hangs on sizes alone, where it is needed."""
        if value in nodes or value in inputs or value not in known.numbers:
            return
        node = program.nodes[known.maker[value]]
        if node.operator == "aten.sym_size.int" and not here.issuperset(known.uses[value]):
            told = _telling(program, inputs, program.values[value].shape)
            if told is None:
                untold.append(value)
                return
            node = msgspec.structs.replace(node, args=told)
        nodes[value] = node
        for other in references(node):  # a size may be another tensor's here
            make(other)

    wanted = [name for node in list(nodes) for name in known.uses[node]]
    for value in [*wanted, *(ref.name for ref in outputs), *(references(program.outputs) if last else ())]:
        make(value)
    kept = sorted(nodes.values(), key=lambda node: known.maker[node.name])
    needed = {name for node in kept for name in known.uses[node.name]}
    piece = Program(
        inputs=tuple(inputs),
        state={value: name for value, name in program.state.items() if value in needed},
        nodes=tuple(kept),
        outputs=program.outputs if last else tuple(outputs),
        values=program.values,
        keys=program.keys if last else None if len(outputs) == 1 else (),
    )
    return piece, untold


def _telling(program: Program, inputs: Sequence[str], size: tuple[int | str, ...]) -> tuple[Ref, int] | None:
    """A tensor that comes in, and which of its dimensions is of this size."""
    for name in inputs:
        for dimension, extent in enumerate(program.values[name].shape):
            if (extent,) == size and program.values[name].tensor:
                return Ref(name), dimension
    return None


def _refuse_lost_writes(program: Program, stage: Mapping[str, int], crossing: Mapping[str, Collection[int]]) -> None:
    """A piece that writes into what it was sent writes into a copy: nothing else may see the original then."""
    memory: dict[str, str] = {}

    def owner(value: str) -> str:
        while memory.setdefault(value, value) != value:
            value = memory[value]
        return value

    writes: list[tuple[Node, str]] = []
    for node in program.nodes:
        operator = operators.find(node.operator)
        for argument in (*operator.writes, *operator.views):
            for shared in operators.values_at(node, argument):
                memory[owner(node.name)] = owner(shared)
                if argument in operator.writes:
                    writes.append((node, shared))
    sent: dict[str, list[str]] = {}
    for value in crossing:
        sent.setdefault(owner(value), []).append(value)
    for node, target in writes:
        piece = stage[node.name]
        before = [v for v in sent.get(owner(target), ()) if stage.get(v, -1) < piece]
        readers = {v: {t for t in crossing[v] if t >= piece} for v in before}
        seen = [v for v, own in readers.items() if own]
        if len(seen) > 1 or any(readers[v] != {piece} for v in seen):
            raise CutError(
                f"`{node.path or 'the network'}` writes in place ({node.operator}) into what another piece has made, "
                "and what shares its memory is read elsewhere too; write out of place, or cut elsewhere"
            )
