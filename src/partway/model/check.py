"""The numbers that a cut ends with: the pieces, run as parties run them, against the whole network."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from partway.errors import CutError
from partway.model.capture import Call, copied
from partway.model.piece import Piece
from partway.model.segment import standing_alone
from partway.model.sequence import Slice

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 5e-2, torch.float16: 1e-2}
"""Largest difference, relative to a tensor's largest number where that is above 1. The same sums in another order, as
where a value is used in two later pieces, stay well below."""
ROWS = 4
"""Most records of the example that the check takes."""


def check(
    network: nn.Module,
    pieces: Sequence[Piece | Slice],
    call: Call,
    names: Sequence[str],
    owners: Sequence[int],
    forward_only: bool = False,
) -> None:
    """Runs copies of all in training and in evaluation, on the example's records and on another number of them.

    Only values and gradients pass between pieces. Output, every gradient and every buffer must be those of the network.
    Slices of a sequence are compared in float64, captured pieces in the network's own type.

    Args:
        names: what the pieces call the tensors of the example, in order.
        owners: a number for the owner of each piece; what two owners have, they have in copies of their own.
        forward_only: compares outputs in evaluation alone, where the same pieces have been checked before.

    Raises:
        CutError: something differs; the message names the first that does.
    """
    rows = min(max(call.rows, 1), ROWS)
    if all(isinstance(piece, Piece) for piece in pieces):
        rows = max(rows, 2)  # one record alone is special to what normalises over a batch
    copies: dict[int, nn.Module] = {}
    for owner in dict.fromkeys(owners):
        own = [number for number, each in enumerate(owners) if each == owner]
        copies |= zip(own, standing_alone([pieces[number] for number in own]), strict=True)
    alone = nn.ModuleList(copies[number] for number in range(len(pieces)))
    whole = copied(network)
    if all(isinstance(piece, Slice) for piece in pieces):
        alone, whole = alone.double(), whole.double()
    whole.cpu()
    alone.cpu()
    with torch.random.fork_rng(devices=[]):
        for count in (rows,) if forward_only else (rows, 3 if rows == 2 else 2):
            for train in (False,) if forward_only else (True, False):
                _compare(whole, alone, _on_cpu(call.with_rows(count), whole), names, train, not forward_only)


def _on_cpu(call: Call, network: nn.Module) -> Call:
    """A call on the CPU, its floating-point numbers in the network's type where that is float64."""
    double = any(p.dtype is torch.float64 for p in network.parameters())

    def move(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        leaf = leaf.detach().cpu()
        return leaf.double() if double and leaf.is_floating_point() else leaf

    args, kwargs = pytree.tree_map(move, (call.args, dict(call.kwargs)))
    return Call(args, kwargs)


def _compare(
    whole: nn.Module, pieces: nn.ModuleList, call: Call, names: Sequence[str], train: bool, buffers: bool
) -> None:
    mode = f"in {'training' if train else 'evaluation'} with {call.rows} rows"
    whole.train(train).zero_grad()
    pieces.train(train).zero_grad()
    inputs = call.with_rows(call.rows)  # the network may write into what it gets
    torch.default_generator.manual_seed(0)
    try:
        with torch.set_grad_enabled(train):
            expected = tensors_of(whole(*inputs.args, **inputs.kwargs))
        weights = [torch.linspace(0.5, 1.5, t.numel(), dtype=torch.float64).view(t.shape).to(t.dtype) for t in expected]
        if train:
            backward(expected, weights)
    except Exception as error:  # any code may run here; whatever it raises, the network does not take the example
        raise CutError(f"the network fails on the example {mode}: {_line(error)}") from error
    if not expected or not all(t.isfinite().all() for t in expected):
        raise CutError(f"the network's output on the example is not one of finite numbers {mode}")
    idle = {name for piece in pieces for name in getattr(piece, "idle", ())}
    for name, p in whole.named_parameters() if train else ():
        if p.requires_grad and p.grad is None and name not in idle:
            raise CutError(f"`{name}` gets no gradient; freeze it (requires_grad_(False)) or take it out")
    torch.default_generator.manual_seed(0)
    named = dict(zip(names, call.tensors, strict=True))
    made = walk(list(pieces), named, call.rows, train, mode, weights)
    if len(made) != len(expected):
        raise CutError(f"the pieces are not the network: {len(made)} outputs, not {len(expected)}, {mode}")
    for number, (own, other) in enumerate(zip(expected, made, strict=True)):
        _same("the output" if len(made) == 1 else f"output {number}", own, other, mode)
    for piece in pieces:
        for name, p in piece.named_parameters():
            if train and p.requires_grad and name not in idle:
                _same(f"the gradient of `{name}`", whole.get_parameter(name).grad, p.grad, mode)
        known = dict(whole.named_buffers())
        for name, buffer in piece.named_buffers() if buffers else ():
            if name in known:  # a constant of the network's code has no name there
                _same(f"the buffer `{name}`", known[name], buffer, mode)


def walk(
    pieces: Sequence[Any],
    inputs: Mapping[str, Tensor],
    rows: int,
    train: bool,
    mode: str = "",
    weights: Sequence[Tensor] = (),
) -> list[Tensor]:
    """Forward, and with weights of the outputs backward, through pieces as parties run them; gives the last's tensors.

    Raises:
        CutError: a piece fails on its own, or gives a tensor without a row for each record.
    """
    sent: dict[str, Any] = {}
    arrived: dict[str, Tensor] = {}
    tape: list[list[tuple[str, Any]]] = []
    made: list[Tensor] = []
    for number, piece in enumerate(pieces):
        given = [(n, _received(sent[n], n, arrived) if n in sent else inputs[n].clone()) for n in piece.inputs]
        try:
            with torch.set_grad_enabled(train):
                values = piece(*(value for _, value in given))
        except Exception as error:  # as above
            told = f"ends after `{piece.outputs[0]}`" if number < len(pieces) - 1 else "ends the network"
            raise CutError(f"the piece that {told} fails on its own {mode}: {_line(error)}") from error
        if number == len(pieces) - 1:
            made = tensors_of(values)
            tape.append([("", t) for t in made])
            break
        if isinstance(piece, Slice) and not isinstance(values, Tensor):
            raise CutError(f"what comes after `{piece.outputs[0]}` is a {type(values).__name__}, not one tensor")
        named_values = list(zip(piece.outputs, values if isinstance(values, tuple) else (values,), strict=True))
        for name, value in named_values:
            if isinstance(value, Tensor) and (value.dim() == 0 or len(value) != rows):
                raise CutError(f"what comes after `{name}` does not have one row for each record; cut elsewhere")
            sent[name] = value
        tape.append(named_values)
    if weights and train:
        gradients: dict[str, Tensor] = {}
        for number, values in reversed(list(enumerate(tape))):
            own = [v for _, v in values]
            asked = list(weights) if number == len(tape) - 1 else [gradients.get(name) for name, _ in values]
            arrived.clear()
            backward(own, asked)
            for name, gradient in arrived.items():
                gradients[name] = gradients[name] + gradient if name in gradients else gradient
    return [t.detach() for t in made]


def backward(values: Sequence[Any], gradients: Sequence[Tensor | None]) -> None:
    """Backward from those values that want a gradient and get one."""
    pairs = [
        (v, g)
        for v, g in zip(values, gradients, strict=True)
        if isinstance(v, Tensor) and v.requires_grad and g is not None
    ]
    if pairs:
        torch.autograd.backward([v for v, _ in pairs], [g for _, g in pairs])


def tensors_of(output: Any) -> list[Tensor]:
    """All tensors in what a network gives, in order."""
    return [leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor)]


def _received(value: Any, name: str, arrived: dict[str, Tensor]) -> Any:
    """A copy, and where its gradient is put: as it is, for a leaf's own is laid out anew, and then rounds otherwise."""
    if not isinstance(value, Tensor):
        return value
    copy = value.detach().clone().requires_grad_(value.requires_grad)
    if value.requires_grad:
        copy.register_hook(lambda gradient: arrived.__setitem__(name, gradient))  # type: ignore[no-untyped-call]
    return copy


def _same(what: str, expected: Tensor | None, found: Tensor | None, mode: str) -> None:
    if expected is None or found is None or expected.shape != found.shape or expected.dtype != found.dtype:
        raise CutError(f"the pieces are not the network: {what} differs {mode}; cut elsewhere")
    if expected.numel() == 0:
        return
    tolerance = TOLERANCE.get(expected.dtype, 0.0)
    if expected.is_complex():
        expected, found = torch.view_as_real(expected.detach()), torch.view_as_real(found.detach())
    expected, found = expected.detach().double(), found.detach().double()
    far = (expected - found).abs().max().item()
    if not far <= tolerance * max(1.0, expected.abs().max().item()):
        raise CutError(f"the pieces are not the network: {what} differs by {far:.3g} {mode}; cut elsewhere")


def _line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
