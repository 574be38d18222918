"""What each letter of a job carries, told from plan and network: a receiver checks it before it reads a payload."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from partway.plan.plan import ALL, Plan, Turn
from partway.privacy.seal import SEAL_BYTES
from partway.protocol.messages import LetterKind, Post
from partway.wire.tensors import NAMES, Spec, payload_size, spec_of


@dataclass(frozen=True, kw_only=True)
class Piece:
    """What must be known of a segment to tell its letters and its cost beforehand; shapes are for one record."""

    output: tuple[int, ...]
    size: int
    """Trainable numbers."""
    state: tuple[Spec, ...]
    """What a give of it carries."""
    forward: int
    """FLOPs for one record, 2 for a multiply-add."""
    backward: int
    """FLOPs for one record, the gradient for what stands before it among them."""
    backward_alone: int
    """The same where nothing before it wants a gradient."""
    dtype: torch.dtype
    """Of the output, and of the gradient that comes back for it."""

    portions: tuple[int, ...] = ()
    """Numbers of a record that go to each of several segments, one portion after the other; else all go to one."""

    @property
    def width(self) -> int:
        """Numbers that cross the cut behind it, for one record."""
        return math.prod(self.output)


def measure(module: nn.Module, example: Tensor, first: bool, half: torch.dtype | None = None) -> tuple[Piece, Tensor]:
    """What a piece of a network is and costs, and its output for the next piece.

    Args:
        module: on the CPU, in the job's dtype. It is run on `example`, and its buffers are not touched.
        example: one record, shape (1, ...).
        first: its input is data, so no gradient flows into it.
        half: the type to which `torch.autocast` is set, if it runs under it.
    """
    training = module.training
    module.eval()
    with torch.autocast("cpu", half, enabled=half is not None):
        with _counting(module) as forward:
            output = module(example.detach())
        alone = _backward(module, example.detach().clone())
        backward = alone if first else _backward(module, example.detach().clone().requires_grad_())
    module.train(training)
    piece = Piece(
        output=tuple(output.shape[1:]),
        size=sum(p.numel() for p in module.parameters() if p.requires_grad),
        state=tuple(spec_of(name, tensor) for name, tensor in module.state_dict().items()),
        forward=int(forward.get_total_flops()),
        backward=backward,
        backward_alone=alone,
        dtype=output.dtype,
        portions=packed.widths if (packed := getattr(module, "packed", None)) is not None else (),
    )
    return piece, output.detach()


def _counting(module: nn.Module) -> Any:
    """Counts FLOPs, which a module that another process runs counts there."""
    own: Callable[[], Any] = getattr(module, "counting", lambda: FlopCounterMode(display=False))
    return own()


def _backward(module: nn.Module, inputs: Tensor) -> int:
    """FLOPs of a backward through a piece."""
    output = module(inputs)
    if not output.requires_grad:
        return 0
    with _counting(module) as counter:
        output.sum().backward()
    module.zero_grad(set_to_none=True)
    return int(counter.get_total_flops())


class Carried(NamedTuple):
    """What one letter carries."""

    plain: tuple[Spec, ...]
    """Its tensors, before any sealing."""
    wire: tuple[Spec, ...]
    """The tensors as its frame's header names them."""
    nbytes: int
    """Of the tensors as they cross."""


@dataclass(frozen=True, kw_only=True)
class Shapes:
    """Of every letter of one job."""

    plan: Plan
    pieces: Mapping[str, Piece]
    """By segment."""
    tallies: Mapping[str, int]
    """How many numbers each tally counts."""
    figures: Mapping[str, int]
    """Numbers in a report of each tally that is told."""
    dtype: torch.dtype
    words: int
    """int64 words for a number of a gradient in a blind sum; 0 where sums are added in the clear."""
    tally_words: int
    """The same for counts, which are float64."""
    labels: Mapping[tuple[str, str], tuple[str, tuple[int, ...]]] = field(default_factory=dict)
    """Type and shape of one record's label, by the edge that brings it, where it is not a class."""
    optimizer_state: tuple[str, ...] = ()
    """What the main optimiser keeps for each number of a segment, by PyTorch's names; `step` is one for all."""
    _backwards: dict[tuple[str, str], int] = field(default_factory=dict, repr=False)
    _known: dict[tuple[LetterKind, str, str, int, bool, bool], Carried] = field(default_factory=dict, repr=False)

    @cached_property
    def _portions(self) -> dict[tuple[str, str], int]:
        """Of edges that carry not all that their source puts out: which portion."""
        edges = [edge for flow, _ in self.plan.flows for edge in self.plan.edges(flow)]
        return {(edge.source, edge.target): edge.portion for edge in edges if edge.portion != ALL}

    def columns(self, source: str, target: str) -> slice | None:
        """Which numbers of what a segment puts out go to another; None for all of it, in its own shape."""
        portion = self._portions.get((source, target))
        if portion is None:
            return None
        widths = self.pieces[source].portions
        return slice(sum(widths[:portion]), sum(widths[: portion + 1]))

    def record(self, source: str, target: str) -> tuple[int, ...]:
        """The shape of what crosses from a segment to another for one record."""
        columns = self.columns(source, target)
        return self.pieces[source].output if columns is None else (columns.stop - columns.start,)

    def of(self, turn: Turn, post: Post, sender: str, receiver: str) -> Carried:
        """What a letter carries in a turn from one party to another."""
        rows = 0
        if post.kind in (LetterKind.ACTIVATIONS, LetterKind.GRADIENT, LetterKind.LABELS):
            counts = turn.rows[post.micro_batch]
            rows = min(self.plan.rows(post.source, counts), self.plan.rows(post.target, counts))
        with_state = post.kind is LetterKind.STATE and turn.state
        key = (post.kind, post.source.segment, post.target.segment, rows, self.sealed(sender, receiver), with_state)
        if key not in self._known:
            self._known[key] = self._carried(*key)
        return self._known[key]

    def backward(self, turn: Turn, segment: str) -> int:
        """FLOPs of a segment's backward for one record of a turn."""
        key = (turn.flow, segment)
        if key not in self._backwards:
            wanted = any(edge.gradient and edge.target == segment for edge in self.plan.edges(turn.flow))
            piece = self.pieces[segment]
            self._backwards[key] = piece.backward if wanted else piece.backward_alone
        return self._backwards[key]

    def sealed(self, sender: str, receiver: str) -> bool:
        """Letters between two parties that are not the hub pass through it, and are sealed from it."""
        return self.plan.hub not in (sender, receiver)

    def reader(self, post: Post, sender: str, receiver: str) -> str:
        """For whom the sender seals a letter that the hub forwards or keeps; "" for one that is the hub's own."""
        if post.kind is LetterKind.STATE and self.plan[post.target.segment].kind == "locker":
            return self.plan.reader(post.target)
        return receiver if self.sealed(sender, receiver) else ""

    def _carried(self, kind: LetterKind, source: str, target: str, rows: int, sealed: bool, state: bool) -> Carried:
        plain: tuple[Spec, ...] = ()
        if kind is LetterKind.ACTIVATIONS:
            plain = (Spec("x", NAMES[self.pieces[source].dtype], (rows, *self.record(source, target))),)
            if self.plan[target].kind == "store":
                plain += (Spec("made_by", "uint8", (32,)),)
            plain += self._proof
        elif kind is LetterKind.GRADIENT:
            plain = (Spec("x", NAMES[self.pieces[target].dtype], (rows, *self.record(target, source))),)
        elif kind is LetterKind.LABELS:
            dtype, shape = self.labels.get((source, target), ("int64", ()))
            plain = (Spec("x", dtype, (rows, *shape)), *self._proof)
        elif kind is LetterKind.SCORES:
            plain = (Spec("x", "float64", (1, self.figures[source])),)
        elif kind in (LetterKind.SHARE, LetterKind.SUM):
            plain = (self._summed(source),)
        elif kind is LetterKind.STATE:
            taken = self.plan[source].kind == "locker"  # what was put in under seal comes out under seal
            sealed = sealed or taken or self.plan[target].kind == "locker"
            piece = self.pieces[target if taken else source]
            plain = piece.state
            if state:
                plain += self._optimizer_state(piece.size)
            if taken:
                plain = (_sealed(plain),)
                return Carried(plain, plain, payload_size(plain))
        elif kind in (LetterKind.EQUAL, LetterKind.ACCOUNT):
            plain = (Spec("x", "uint8", (32,)),)
        elif kind is LetterKind.VERDICT:
            plain = (Spec("x", "uint8", (1,)),)
        elif kind in (LetterKind.SQUARE, LetterKind.NORM):
            plain = (Spec("x", "float64", (1,)),)
        wire = (_sealed(plain),) if plain and sealed else plain
        return Carried(plain, wire, payload_size(wire))

    def _optimizer_state(self, size: int) -> tuple[Spec, ...]:
        """What an optimiser keeps for a segment of so many numbers; how many steps it has made is one number."""
        kept = {n: ("float32", ()) if n == "step" else (NAMES[self.dtype], (size,)) for n in self.optimizer_state}
        return tuple(Spec(f"optimizer.{name}", dtype, shape) for name, (dtype, shape) in kept.items())

    @property
    def _proof(self) -> tuple[Spec, ...]:
        """Where parties hold columns of the same records: a hash of which records these rows are of."""
        return () if self.plan.sites else (Spec("rows", "uint8", (32,)),)

    def _summed(self, segment: str) -> Spec:
        if segment in self.tallies:
            count, words, name = self.tallies[segment], self.tally_words, "float64"
        else:
            count, words, name = self.pieces[segment].size, self.words, NAMES[self.dtype]
        return Spec("x", "int64", (count * words,)) if words else Spec("x", name, (count,))


def _sealed(plain: tuple[Spec, ...]) -> Spec:
    return Spec("sealed", "uint8", (payload_size(plain) + SEAL_BYTES,))
