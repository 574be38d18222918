"""A network that is a sequence of modules, in slices: without capture, and whatever code the modules have.

>>> from collections import OrderedDict
>>> import torch
>>> from torch import nn
>>> hidden = nn.Sequential(nn.Linear(4, 8), nn.ReLU())
>>> network = nn.Sequential(OrderedDict(hidden=hidden, output=nn.Linear(8, 2)))
>>> places(network)
['hidden.0', 'hidden.1', 'hidden']
>>> bottom, top = slices(network, ["hidden.0"])
>>> list(bottom.state_dict()), list(top.state_dict())
(['hidden.0.weight', 'hidden.0.bias'], ['output.weight', 'output.bias'])
"""

from __future__ import annotations

import difflib
import itertools
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from partway.errors import CutError
from partway.model.capture import Call, copied


def places(network: nn.Module) -> list[str]:
    """All module paths after which `network` can be cut, in order. A sequence's path means after its last module.

    Raises:
        CutError: the network is not a sequence of modules.
    """
    ends = _ends(network)
    last = max(ends.values(), default=0)
    return [path for path, end in ends.items() if end < last]


class Slice(nn.Sequential):
    """Some of a sequence's modules, one after the other, under their own names."""

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


def slices(network: nn.Module, after: Sequence[str]) -> tuple[Slice, ...]:
    """The pieces of a sequence, cut after the named modules; they share its modules.

    Raises:
        CutError: it cannot be cut there; the message says where it can.
    """
    ends = _ends(network)
    marks = [0]
    for path in after:
        mark = _place(network, path, ends)
        if mark <= marks[-1]:
            raise CutError(f"the cuts {', '.join(after)} are not in the network's order, or meet; {_legal(network)}")
        marks.append(mark)
    marks.append(max(ends.values()))
    pieces = tuple(_take(network, "", ends, start, stop) for start, stop in itertools.pairwise(marks))
    _refuse_shared(pieces)
    between = ["input", *after, "output"]
    made = []
    for piece, (source, target) in zip(pieces, itertools.pairwise(between), strict=True):
        made.append(Slice(OrderedDict(piece._modules)))
        made[-1].training, made[-1].inputs, made[-1].outputs = piece.training, (source,), (target,)
    return tuple(made)


def is_sequence(module: nn.Module) -> bool:
    """Whether a module is a plain `nn.Sequential`, which needs no capture."""
    return isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward and len(module) > 0


def sliceable(network: nn.Module, after: Sequence[str], call: Call) -> bool:
    """Whether a network is a sequence of modules, called with one tensor, and none of the places is inside a module."""
    if not is_sequence(network) or len(call.tensors) != 1 or call.kwargs:
        return False
    ends, inside = _ends(network), dict(network.named_modules(remove_duplicate=False))
    return all(path in ends or path not in inside for path in after)


def as_sequence(network: nn.Module, call: Call) -> nn.Sequential | None:
    """A network's own modules one after the other, if that is all that it does with the example; else None."""
    seen: list[tuple[str, Any, Any]] = []
    mine = copied(network)

    def note(name: str) -> Any:
        return lambda module, args, output: seen.append((name, args, output))

    for name, child in mine.named_children():
        child.register_forward_hook(note(name))
    if len(call.tensors) != 1 or call.kwargs:
        return None
    for train in (True, False):
        seen.clear()
        value: Any = call.tensors[0].clone()
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            output = mine.train(train)(value)
        for _, args, made in seen:
            if len(args) != 1 or args[0] is not value:
                return None
            value = made
        if output is not value or [name for name, _, _ in seen] != [name for name, _ in network.named_children()]:
            return None
    chain = nn.Sequential(OrderedDict(network.named_children()))
    chain.training = network.training
    return chain


def first_dense(network: nn.Module, after: str, before: str | None = None) -> str:
    """The path of the first linear layer or convolution with a bias after one place, and not the last before another.

    Raises:
        CutError: there is none.
    """
    ends = _ends(network)
    start, stop = _place(network, after, ends), _place(network, before, ends) if before else max(ends.values())
    for path, end in ends.items():
        module = network.get_submodule(path)
        if start < end < stop and isinstance(module, nn.Linear | nn.modules.conv._ConvNd) and module.bias is not None:
            return path
    raise CutError(
        f"between `{after}` and {f'`{before}`' if before else 'the end'} no dense layer with a bias has another module "
        "behind it, so there is no place for a vector of each site; cut elsewhere"
    )


# -- where


def _ends(network: nn.Module) -> dict[str, int]:
    """Each path's end: how many single modules have run by then."""
    if not is_sequence(network):
        raise CutError(
            f"the network is a {type(network).__name__}, not a sequence of modules: "
            "only nn.Sequential, nested or not, can be cut today"
        )
    ends: dict[str, int] = {}
    count = 0

    def walk(module: nn.Module, prefix: str) -> None:
        nonlocal count
        for name, child in module._modules.items():  # named_children() would leave out a module's second place
            assert child is not None
            if is_sequence(child):
                walk(child, f"{prefix}{name}.")
            else:
                count += 1
            ends[prefix + name] = count

    walk(network, "")
    return ends


def _legal(network: nn.Module) -> str:
    legal = places(network)
    return f"it can be cut after {', '.join(legal)}" if legal else "it has one module and cannot be cut"


def _place(network: nn.Module, path: str, ends: dict[str, int]) -> int:
    if path in ends:
        if ends[path] == max(ends.values()):
            raise CutError(f"nothing comes after `{path}`, so the network cannot be cut there; {_legal(network)}")
        return ends[path]
    above = path
    while "." in above:
        above = above.rpartition(".")[0]
        if above in ends and path in dict(network.named_modules(remove_duplicate=False)):
            kind = type(network.get_submodule(above)).__name__
            raise CutError(
                f"`{path}` is inside `{above}`, a {kind}, and only nn.Sequential can be cut today; {_legal(network)}"
            )
    near = difflib.get_close_matches(path, places(network), n=1, cutoff=0.4)
    hint = f"; did you mean `{near[0]}`?" if near else ";"
    raise CutError(f"the network has no module `{path}`{hint} {_legal(network)}")


def _take(module: nn.Module, prefix: str, ends: dict[str, int], start: int, stop: int) -> nn.Sequential:
    """The single modules after number `start` up to `stop`, in sequences named as they were."""
    kept: OrderedDict[str, nn.Module] = OrderedDict()
    for name, child in module._modules.items():
        assert child is not None
        path = prefix + name
        begin, end = ends[path] - _count(child), ends[path]
        if start <= begin and end <= stop:
            kept[name] = child
        elif begin < stop and end > start:
            kept[name] = _take(child, f"{path}.", ends, start, stop)
    piece = nn.Sequential(kept)
    piece.training = module.training
    return piece


def _count(module: nn.Module | None) -> int:
    return sum(map(_count, module._modules.values())) if module is not None and is_sequence(module) else 1


def _refuse_shared(pieces: Sequence[nn.Module]) -> None:
    seen: dict[int, tuple[int, str]] = {}
    for number, piece in enumerate(pieces):
        tensors = [*piece.named_parameters(remove_duplicate=False), *piece.named_buffers(remove_duplicate=False)]
        for name, tensor in tensors:
            where, first = seen.setdefault(tensor.data_ptr() or id(tensor), (number, name))
            if where != number:
                raise CutError(
                    f"`{first}` and `{name}` are one tensor, and the cut parts them: each party would train its own; "
                    "cut where both stay in one piece, or untie them"
                )
