"""Cuts any network into pieces, shows where it can be cut, and proves with numbers that the pieces are the network.

>>> import torch
>>> from torch import nn
>>> class Residual(nn.Module):
...     def __init__(self) -> None:
...         super().__init__()
...         self.first, self.second, self.last = nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 2)
...     def forward(self, x):
...         x = self.first(x).relu()
...         return self.last(x + self.second(x))
>>> network = Residual()
>>> bottom, trunk = cut(network, torch.randn(6, 4), after=["first"])
>>> bottom.outputs == trunk.inputs, list(trunk.state_dict())
(True, ['second.weight', 'second.bias', 'last.weight', 'last.bias'])
>>> x = torch.randn(3, 4)
>>> torch.equal(trunk(bottom(x)), network(x))
True
"""

from __future__ import annotations

import contextlib
import difflib
import functools
import itertools
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
from torch import Tensor, nn

from partway.errors import CutError
from partway.model.cache import captured, note, seen
from partway.model.capture import Call, Captured, call_of
from partway.model.check import check
from partway.model.partition import Crossing, Facts, divide, end_of, facts, written_state
from partway.model.piece import Piece
from partway.model.program import Program, renamed
from partway.model.sequence import Slice, as_sequence, is_sequence, places, sliceable, slices

__all__ = ["Piece", "Slice", "cut", "places"]


def cut(
    network: nn.Module,
    example: Any,
    after: Sequence[str],
    together: Sequence[Collection[int]] = (),
    may_cross: Collection[str] = (),
    kwargs: Mapping[str, Any] | None = None,
) -> tuple[Piece | Slice, ...]:
    """Cuts `network` after the named modules into `len(after) + 1` pieces that share its weights and keep their names.

    A network that is nested `nn.Sequential`s is sliced between its modules; every other one is captured, and its pieces
    are programs. A piece says in `inputs` and `outputs` which values it takes and gives, in order.

    Ends with a numeric check on copies (`partway.model.check`), so that `network`, its buffers and its mode, and the
    global random numbers stay as they were. Captured programs, and which cuts of them have passed, are kept in files
    (`partway.model.cache`); what has passed is checked again with one forward in evaluation.

    Args:
        network: the whole network, as it is used without Partway.
        example: inputs that the network takes, one row a record: a tensor of shape (records, ...) or a tuple.
        after: module paths in the network's order, for example `["layer1", "layer4"]`. Where a module is called more
            than once, `block#0` is the first call.
        together: groups of pieces, by number, that one optimiser at one party owns, and that may share weights.
        may_cross: inputs that may reach another party than the first piece's as they are, or with no weight applied.
        kwargs: what else the network is called with.

    Raises:
        CutError: it cannot be cut there, or the pieces do not add up to the whole; the message says what to do.
    """
    if not any(p.requires_grad for p in network.parameters()):
        raise CutError("the network has no trainable parameter, so there is nothing to split")
    if isinstance(after, str) or not after:
        told = f"; it can be cut after {', '.join(places(network))}" if is_sequence(network) else ""
        raise CutError(f"name the modules to cut after in a list{told}")
    call, owners = call_of(example, kwargs), _groups(together, len(after) + 1)
    tied = bool(together) and any(len(names) > 1 for names in _aliases(network).values())
    if not tied and sliceable(network, after, call):
        return _sliced(network, network, call, after, may_cross)
    try:
        programs, key = captured(network, call)
    except CutError as error:
        chain = as_sequence(network, call)
        if chain is None or tied:
            raise
        if not sliceable(chain, after, call):
            raise CutError(f"{error}; without that it can be cut after {', '.join(places(chain))}") from error
        return _sliced(network, chain, call, after, may_cross)
    before = seen(key, [list(after), owners, sorted(may_cross)])
    if key and before.is_file():
        pieces = Whole(network, programs).pieces(after, together, may_cross)
        with contextlib.suppress(CutError):  # code may have changed where `content` does not look
            check(network, pieces, call, programs.training.inputs, owners, forward_only=True)
            return pieces
        programs, key = captured(network, call, anew=True)
    pieces = Whole(network, programs).pieces(after, together, may_cross)
    check(network, pieces, call, programs.training.inputs, owners)
    if key:
        note(before)
    return pieces


def _sliced(
    network: nn.Module, chain: nn.Module, call: Call, after: Sequence[str], may_cross: Collection[str]
) -> tuple[Slice, ...]:
    """The pieces of a network that is a chain of modules."""
    pieces = slices(chain, after)
    if not any(True for _ in pieces[0].parameters()) and "input" not in may_cross:
        raise CutError(
            f"no weight stands before the end of `{after[0]}`, so that records would reach another party as they are, "
            "or as good as that; cut elsewhere, or allow it: may_cross = ['input']"
        )
    check(network, pieces, call, ["input"], range(len(pieces)))
    return pieces


def as_piece(module: nn.Module, example: Tensor) -> Piece:
    """A module that takes one tensor and gives one, such as a slice of a sequence, captured as a whole.

    Raises:
        CutError: it cannot be captured, or its program does not do what it does.
    """
    call = call_of(example)
    programs, _ = captured(module, call)
    pieces = Whole(module, programs).pieces([], (), ())
    check(module, pieces, call, programs.training.inputs, [0])
    return pieces[0]


@dataclass(frozen=True)
class Whole:
    """A captured network, and where it can be cut."""

    network: nn.Module
    captured: Captured

    def pieces(
        self, after: Sequence[str], together: Sequence[Collection[int]], may_cross: Collection[str]
    ) -> tuple[Piece, ...]:
        """The pieces, not yet checked.

        Raises:
            CutError: it cannot be cut there.
        """
        groups, inputs = _groups(together, len(after) + 1), self.captured.training.inputs
        for name in may_cross:
            if name not in inputs:
                raise CutError(f"may_cross names `{name}`, and the inputs are {', '.join(inputs)}")
        try:
            divided = {train: self._divided(train, after, groups, may_cross) for train in (True, False)}
            self._refuse_shared([parts for parts, _ in divided.values()], groups)
        except CutError as error:
            raise CutError(f"{error}{self._instead(after, may_cross)}") from None
        names = _names(self.captured, divided[True][1], divided[False][1])
        pieces: list[dict[bool, Program]] = []
        for number in range(len(after) + 1):
            both = {train: _renamed(divided[train][0][number], names[train]) for train in (True, False)}
            taken = tuple(dict.fromkeys([*both[True].inputs, *both[False].inputs]))
            both = {train: msgspec.structs.replace(program, inputs=taken) for train, program in both.items()}
            pieces.append(both)
        homes = self._unused(pieces)
        return tuple(self._piece(number, both, homes) for number, both in enumerate(pieces))

    def _divided(
        self, train: bool, after: Sequence[str], groups: Sequence[int], may_cross: Collection[str]
    ) -> tuple[list[Program], list[Crossing]]:
        """The programs of one mode, and what crosses."""
        program = self.captured.mode(train)
        marks = [self.mark(program, path) for path in after]
        for one, other in itertools.pairwise(range(len(after))):
            if marks[other] <= marks[one]:
                raise CutError(f"`{after[one]}` and `{after[other]}` are not in the network's order, or meet")
        known = self.known[train]
        parts, crossings = divide(program, marks, known)
        _refuse_raw(program, known, crossings, groups, may_cross)
        _refuse_without_rows(program, known, crossings)
        return parts, crossings

    def look(
        self, after: Sequence[str], together: Sequence[Collection[int]] = (), may_cross: Collection[str] = ()
    ) -> tuple[list[Crossing], str]:
        """What crosses in training where the network is cut there; and why that may not be, or nothing."""
        crossings: list[Crossing] = []
        groups = _groups(together, len(after) + 1)
        try:
            training, crossings = self._divided(True, after, groups, may_cross)
            evaluation, others = self._divided(False, after, groups, may_cross)
            self._refuse_shared([training, evaluation], groups)
            _names(self.captured, crossings, others)
        except CutError as error:
            if not crossings:
                with contextlib.suppress(CutError):
                    program = self.captured.training
                    _, crossings = divide(program, [self.mark(program, path) for path in after], self.known[True])
            return crossings, str(error)
        return crossings, ""

    def _instead(self, after: Sequence[str], may_cross: Collection[str]) -> str:
        """The legal cut that is nearest to the first that is none."""
        paths = self.paths
        for path in after:
            if path in paths and self.look([path], (), may_cross)[1]:
                place = paths.index(path)
                for other in sorted(paths, key=lambda p: abs(paths.index(p) - place)):
                    if not self.look([other], (), may_cross)[1]:
                        return f"; the nearest legal cut is after `{other}`"
                return "; there is no legal cut"
        return ""

    def mark(self, program: Program, path: str) -> int:
        """The place behind a module, by its path or call."""
        try:
            mark = end_of(program, path)
        except CutError as error:
            raise CutError(f"{error}{self._nearest(path)}") from None
        if mark >= len(program.nodes):
            raise CutError(f"nothing comes after `{path}`, so the network cannot be cut there{self._nearest(path)}")
        return mark

    def _nearest(self, path: str) -> str:
        near = difflib.get_close_matches(path, self.paths, n=3, cutoff=0.4) or self.paths[:3]
        return f"; nearest are {', '.join(f'`{p}`' for p in near)}" if near else ""

    @functools.cached_property
    def paths(self) -> list[str]:
        """Modules and calls behind which something comes, in both modes, in order; not whether that is legal."""
        found: dict[bool, dict[str, int]] = {}
        for train in (True, False):
            ends: dict[str, dict[str, int]] = {}
            nodes = self.captured.mode(train).nodes
            for place, node in enumerate(nodes):
                for each in node.modules:
                    module, _, number = each.partition("#")
                    ends.setdefault(module, {})[number or "0"] = place + 1
            found[train] = {
                f"{module}#{number}" if len(calls) > 1 else module: end
                for module, calls in ends.items()
                for number, end in calls.items()
                if end < len(nodes)
            }
        both = [path for path in found[True] if path in found[False]]
        return sorted(both, key=lambda path: found[True][path])

    @functools.cached_property
    def known(self) -> dict[bool, Facts]:
        parameters = {name for name, _ in self.network.named_parameters(remove_duplicate=False)}
        both = [self.captured.mode(train) for train in (True, False)]
        written = set().union(*map(written_state, both))
        fixed = {name for program in both for name in program.state.values()} - parameters - written
        return {train: facts(program, parameters, fixed) for train, program in zip((True, False), both, strict=True)}

    def _refuse_shared(self, modes: Sequence[Sequence[Program]], groups: Sequence[int]) -> None:
        """One tensor that two pieces would train or write belongs to one optimiser."""
        trained = {name for name, p in self.network.named_parameters() if p.requires_grad}
        written = {n for parts in modes for part in parts for n in written_state(part)}
        users: dict[str, set[int]] = {}
        for parts in modes:
            for number, part in enumerate(parts):
                for name in part.state.values():
                    users.setdefault(name, set()).add(number)
        names = _aliases(self.network)
        for name, pieces in users.items():
            if len({groups[piece] for piece in pieces}) > 1 and (name in trained or name in written):
                told = " and ".join(f"`{alias}`" for alias in names.get(name, [name])[:2])
                kind = "are one tensor" if len(names.get(name, ())) > 1 else "is one tensor that is used more than once"
                raise CutError(
                    f"{told} {kind}, and the cut parts its uses: each party would train its own; cut where all stay in "
                    "one piece, give the pieces to one party (`together`), or untie them"
                )

    def _piece(self, number: int, both: Mapping[bool, Program], used_by: Mapping[str, int]) -> Piece:
        """One piece with its weights: what its programs use, and what nothing uses but stands beside that."""
        own = {name for program in both.values() for name in program.state.values()}
        own |= {name for name, piece in used_by.items() if piece == number}
        saved = set(self.network.state_dict(keep_vars=True))
        aliases = _aliases(self.network)
        first = {alias: name for name, several in aliases.items() for alias in several}
        tensors: dict[str, Tensor] = {}
        passing: dict[str, Tensor] = {}
        for name, tensor in _tensors(self.network):
            if first[name] in own:
                (tensors if name in saved else passing)[name] = tensor
        passing |= {name: tensor for name, tensor in self.captured.constants.items() if name in own}
        piece = Piece(both[True], both[False], tensors, passing)
        piece.train(self.network.training)
        return piece

    def _unused(self, pieces: Sequence[Mapping[bool, Program]]) -> dict[str, int]:
        """Of each tensor that no piece uses: the piece in which the module runs that has it, or else the last."""
        used = {name for both in pieces for program in both.values() for name in program.state.values()}
        homes: dict[str, int] = {}
        for name in _aliases(self.network):
            if name in used:
                continue
            owner = name.rpartition(".")[0]
            homes[name] = len(pieces) - 1
            while owner:
                found = [n for n, both in enumerate(pieces) if any(_runs(p, owner) for p in both.values())]
                if found:
                    homes[name] = found[0]
                    break
                owner = owner.rpartition(".")[0]
        return homes


def _runs(program: Program, module: str) -> bool:
    return any(each.partition("#")[0] == module for node in program.nodes for each in node.modules)


def _groups(together: Sequence[Collection[int]], pieces: int) -> list[int]:
    """The number of each piece's owner."""
    owners = list(range(pieces))
    for group in together:
        for piece in group:
            if not 0 <= piece < pieces:
                raise CutError(f"together names piece {piece}, and there are pieces 0 to {pieces - 1}")
            owners[piece] = min(group)
    return owners


def _tensors(network: nn.Module) -> list[tuple[str, Tensor]]:
    """All parameters and buffers by every name that they have, in the network's order."""
    return [*network.named_parameters(remove_duplicate=False), *network.named_buffers(remove_duplicate=False)]


def _aliases(network: nn.Module) -> dict[str, list[str]]:
    """All names of each tensor, by the first."""
    first: dict[int, str] = {}
    names: dict[str, list[str]] = {}
    for name, tensor in _tensors(network):
        names.setdefault(first.setdefault(id(tensor), name), []).append(name)
    return names


def _refuse_raw(
    program: Program, known: Facts, crossings: Sequence[Crossing], groups: Sequence[int], may_cross: Collection[str]
) -> None:
    """What no weight has been applied to is the record itself, or as good as that."""
    for crossing in crossings:
        made_of = known.inputs.get(crossing.value, frozenset())
        away = any(groups[target] != groups[0] for target in crossing.targets)
        if not away or crossing.value in known.weighted or not made_of or made_of <= set(may_cross):
            continue
        what = (
            f"`{crossing.value}`, an input,"
            if crossing.value in program.inputs
            else "a value made of "
            + " and ".join(f"`{name}`" for name in sorted(made_of))
            + f" without any weight (in `{program.nodes[known.maker[crossing.value]].path}`)"
        )
        asked = ", ".join(repr(name) for name in sorted(made_of))
        raise CutError(f"{what} would reach another party; cut elsewhere, or allow it: may_cross = [{asked}]")


def _refuse_without_rows(program: Program, known: Facts, crossings: Sequence[Crossing]) -> None:
    for crossing in crossings:
        value = program.values[crossing.value]
        if crossing.source >= 0 and value.tensor and value.shape[:1] != (known.rows,):
            path = program.nodes[known.maker[crossing.value]].path
            raise CutError(
                f"what `{path}` makes (of shape {' x '.join(map(str, value.shape)) or 'one number'}) would cross, and "
                "does not have one row for each record; cut elsewhere"
            )


def _names(
    captured: Captured, training: Sequence[Crossing], evaluation: Sequence[Crossing]
) -> dict[bool, dict[str, str]]:
    """What crosses by one name in both modes: that of the module that makes it, and a number."""

    def kind(program: Program, crossing: Crossing) -> tuple[Any, ...]:
        value = program.values[crossing.value]
        return crossing.source, value.dtype, tuple(e if isinstance(e, int) else None for e in value.shape)

    names: dict[bool, dict[str, str]] = {True: {}, False: {}}
    own = {mode: [c for c in found if c.source >= 0] for mode, found in ((True, training), (False, evaluation))}
    kinds = {mode: [kind(captured.mode(mode), c) for c in found] for mode, found in own.items()}
    if kinds[True] != kinds[False]:
        raise CutError("what crosses there is not the same in training and in evaluation; cut elsewhere")
    made = {node.name: node.path for node in captured.training.nodes}
    counts: dict[str, int] = {}
    for one, other in zip(own[True], own[False], strict=True):
        path = made[one.value] or "network"
        number = counts[path] = counts.get(path, -1) + 1
        names[True][one.value] = names[False][other.value] = f"{path}:{number}"
    return names


def _renamed(program: Program, names: Mapping[str, str]) -> Program:
    nodes = tuple(
        msgspec.structs.replace(
            node,
            name=names.get(node.name, node.name),
            args=renamed(node.args, names),
            kwargs={key: renamed(argument, names) for key, argument in node.kwargs.items()},
        )
        for node in program.nodes
    )
    return msgspec.structs.replace(
        program,
        inputs=tuple(names.get(name, name) for name in program.inputs),
        nodes=nodes,
        outputs=renamed(program.outputs, names),
        values={names.get(name, name): value for name, value in program.values.items()},
    )
