"""Pieces as parties run them: one tensor comes from each other piece, and one goes to each."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from partway.errors import CutError
from partway.model.capture import copied
from partway.model.check import tensors_of
from partway.model.partition import written_state
from partway.model.piece import Packed, Piece
from partway.model.program import DTYPES, Value
from partway.model.sequence import Slice


def pack(
    pieces: Sequence[Piece | Slice],
    example: Tensor,
    fresh: Callable[[], nn.Module],
    names: Sequence[str] = (),
    skips: Sequence[tuple[str, str]] = (),
) -> None:
    """Makes captured pieces what parties run: one tensor comes from each other, and one goes out.

    Args:
        example: as in `cut`, shape (records, ...); sizes of what crosses are those that it leads to.
        fresh: builds the whole network anew.
        names: of the pieces.
        skips: from which piece to which, beside the next, values go.

    Raises:
        CutError: a piece uses what it does not get, or what cannot stand in one tensor.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    own = [piece for piece in pieces if isinstance(piece, Piece)]
    _refuse_written(own)
    _refuse_drawn(own, fresh)
    for name in own[0].inputs if own else ():
        if any(name in piece.inputs for piece in own[1:]):
            own[0].passes(name)
    maker = {name: number for number, piece in enumerate(own) for name in piece.outputs}
    given = [(names.index(source), names.index(target)) for source, target in skips]
    ways = [*itertools.pairwise(range(len(own))), *given]
    for number, piece in enumerate(own[1:], 1):
        sources = [source for source, target in ways if target == number]
        _refuse_unreached(own, number, maker, sources, names)
        piece.takes([name for source in sources for name in own[source].outputs if name in piece.inputs])
    used = {(s, t): [n for n, name in enumerate(own[s].outputs) if name in own[t].inputs] for s, t in ways if own}
    for (source, target), (one, other) in zip(skips, given, strict=True):
        if not used.get((one, other)):
            raise CutError(f"the {target} uses nothing that the {source} makes; leave the skip out")
    for number, piece in enumerate(own):
        kinds = [DTYPES[piece.spec(name).dtype] for name in piece.inputs]
        taken = [
            torch.zeros(2, *shapes[name], dtype=kind) if number else example[:2]
            for name, kind in zip(piece.inputs, kinds, strict=True)
        ]
        with torch.no_grad():
            made = tensors_of(copied(piece).eval()(*taken))
        shapes |= {name: tuple(tensor.shape[1:]) for name, tensor in zip(piece.outputs, made, strict=True)}
        record = [Value(piece.spec(n).dtype, tuple(g.shape[1:])) for n, g in zip(piece.inputs, taken, strict=True)]
        portions = [used[number, target] for source, target in ways if source == number]
        flat = any(sum(t == target for _, t in ways) > 1 for source, target in ways if source == number)
        made_here = [Value(piece.spec(n).dtype, shapes[n]) for n in piece.outputs]
        piece.packed = Packed(record, made_here, portions if len(portions) > 1 else (), flat)
        piece.fresh = fresh
        for name in piece.idle:  # no step moves it, and no weight decay
            piece.get_parameter(name).requires_grad_(False)


def _refuse_written(pieces: Sequence[Piece]) -> None:
    """Each piece keeps its own buffers, where the whole network has one of a name."""
    states = [{n for program in piece.programs.values() for n in program.state.values()} for piece in pieces]
    for piece in pieces:
        for name in sorted(set().union(*map(written_state, piece.programs.values()))):
            if sum(name in state for state in states) > 1:
                raise CutError(
                    f"`{name}` is written by one piece and used by another; cut where all its uses are in one"
                )


def _refuse_drawn(pieces: Sequence[Piece], fresh: Callable[[], nn.Module]) -> None:
    """Each party builds the network itself: a buffer that several pieces use must come out the same."""
    buffers = [dict(piece.named_buffers()) for piece in pieces]
    several = [name for name, number in Counter(itertools.chain(*buffers)).items() if number > 1]
    if not several:
        return
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(1)
        drawn = dict(fresh().named_buffers())
    for name, own in itertools.product(several, buffers):
        if name in own and name in drawn and not torch.equal(own[name], drawn[name].to(own[name].dtype)):
            raise CutError(
                f"`{name}` is drawn at random and used by several pieces, and each party would draw its own; draw it "
                "from a generator with a seed, or cut where one piece has all its uses"
            )


def _refuse_unreached(
    pieces: Sequence[Piece], number: int, maker: Mapping[str, int], sources: Sequence[int], names: Sequence[str]
) -> None:
    """A piece uses nothing but what comes from these."""
    far = {name: maker.get(name) for name in pieces[number].inputs if maker.get(name) not in sources}
    if not far:
        return
    skips = [f"'{names[s]} -> {names[number]}'" for s in dict.fromkeys(far.values()) if s is not None and names]
    let = f", or let them pass: [training] skips = [{', '.join(skips)}]" if skips and None not in far.values() else ""
    raise CutError(
        f"{', '.join(f'`{name}`' for name in far)} would pass by a party; cut where a piece uses only what the one "
        f"before it makes{let}"
    )
