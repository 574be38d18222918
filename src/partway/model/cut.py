"""Cuts a network that is a sequence of modules into pieces, and checks with numbers that together they are the network.

>>> from collections import OrderedDict
>>> import torch
>>> from torch import nn
>>> hidden = nn.Sequential(nn.Linear(4, 8), nn.ReLU())
>>> network = nn.Sequential(OrderedDict(hidden=hidden, output=nn.Linear(8, 2)))
>>> places(network)
['hidden.0', 'hidden.1', 'hidden']
>>> bottom, top = cut(network, torch.randn(6, 4), after=["hidden.0"])
>>> list(bottom.state_dict()), list(top.state_dict())
(['hidden.0.weight', 'hidden.0.bias'], ['output.weight', 'output.bias'])
"""

from __future__ import annotations

import copy
import difflib
import itertools
from collections import OrderedDict
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from partway.errors import CutError
from partway.model.segment import Segment

_TOLERANCE = 1e-10
"""Largest difference of a float64 value, relative to its tensor's largest one. Rounding stays near 1e-15."""


def places(network: nn.Module) -> list[str]:
    """All module paths after which `network` can be cut, in order. A sequence's path means after its last module.

    Raises:
        CutError: the network is not a sequence of modules.
    """
    ends = _ends(network)
    last = max(ends.values(), default=0)
    return [path for path, end in ends.items() if end < last]


def cut(network: nn.Module, example: Tensor, after: Sequence[str]) -> tuple[nn.Sequential, ...]:
    """Cuts `network` after the named modules into `len(after) + 1` pieces that share its modules and keep its names.

    Ends with a numeric check in float64 on copies, so that `network`, its buffers and its mode, and the global random
    numbers stay as they were: the pieces run one after the other as `Segment`s, only values and gradients passing
    between them, against the whole network, in training and in evaluation, with the example and with another
    number of its rows.

    Args:
        network: nested `nn.Sequential`s.
        example: inputs that the network takes, one row a record, shape (records, ...).
        after: module paths in the network's order, for example `["hidden.2"]`.

    Raises:
        CutError: it cannot be cut there, or the pieces do not add up to the whole; the message says what to do.
    """
    if not any(p.requires_grad for p in network.parameters()):
        raise CutError("the network has no trainable parameter, so there is nothing to split")
    ends = _ends(network)
    if isinstance(after, str) or not after:
        raise CutError(f"name the modules to cut after in a list; {_legal(network)}")
    marks = [0]
    for path in after:
        mark = _place(network, path, ends)
        if mark <= marks[-1]:
            raise CutError(f"the cuts {', '.join(after)} are not in the network's order, or meet; {_legal(network)}")
        marks.append(mark)
    marks.append(max(ends.values()))
    pieces = tuple(_take(network, "", ends, start, stop) for start, stop in itertools.pairwise(marks))
    _refuse_shared(pieces)
    _check(network, pieces, after, example)
    return pieces


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


def _is_sequence(module: nn.Module) -> bool:
    return isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward and len(module) > 0


def _ends(network: nn.Module) -> dict[str, int]:
    """Each path's end: how many single modules have run by then."""
    if not _is_sequence(network):
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
            if _is_sequence(child):
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
    return sum(map(_count, module._modules.values())) if module is not None and _is_sequence(module) else 1


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


# -- whether the pieces are the whole


def _check(network: nn.Module, pieces: Sequence[nn.Module], after: Sequence[str], example: Tensor) -> None:
    if example.dim() == 0 or len(example) == 0:
        raise CutError("the example needs at least one row")
    example = example.detach().cpu()
    if example.is_floating_point():
        example = example.double()
    rows = 3 if len(example) == 2 else 2
    other = torch.cat([example] * rows)[:rows]
    with torch.random.fork_rng(devices=[]):
        segments = [Segment(piece, torch.float64) for piece in pieces]
        whole = copy.deepcopy(network).to(device="cpu", dtype=torch.float64)
        for inputs in (example, other):
            for train in (True, False):
                _compare(whole, segments, after, inputs, train)


def _compare(whole: nn.Module, segments: Sequence[Segment], after: Sequence[str], inputs: Tensor, train: bool) -> None:
    mode = f"in {'training' if train else 'evaluation'} with {len(inputs)} rows"
    whole.train(train)
    whole.zero_grad()
    try:
        torch.default_generator.manual_seed(0)
        with torch.set_grad_enabled(train):
            expected = whole(inputs.clone())
    except Exception as error:  # any code may run here; whatever it raises, the network does not take the example
        raise CutError(f"the network fails on the example in float64 {mode}: {_line(error)}") from error
    if not isinstance(expected, Tensor) or not expected.isfinite().all():
        raise CutError(f"the network's output on the example is not one tensor of finite numbers {mode}")
    weights = torch.linspace(0.5, 1.5, expected.numel(), dtype=torch.float64).view(expected.shape)
    if train:
        if expected.requires_grad:
            (expected * weights).sum().backward()  # type: ignore[no-untyped-call]
        for name, p in whole.named_parameters():
            if p.requires_grad and p.grad is None:
                raise CutError(f"`{name}` gets no gradient; freeze it (requires_grad_(False)) or take it out")
    torch.default_generator.manual_seed(0)
    output = _chain(segments, after, inputs, weights, train, mode)
    _same("the output", expected, output, mode)
    for segment in segments:
        for name, p in segment.module.named_parameters():
            if train and p.requires_grad:
                _same(f"the gradient of `{name}`", whole.get_parameter(name).grad, p.grad, mode)
        for name, buffer in segment.module.named_buffers():
            _same(f"the buffer `{name}`", whole.get_buffer(name), buffer, mode)
        segment.clear()


def _chain(
    segments: Sequence[Segment], after: Sequence[str], inputs: Tensor, weights: Tensor, train: bool, mode: str
) -> Tensor:
    """Forward and backward through the pieces as parties do it: only values and gradients pass."""
    received, made = [inputs.clone()], []
    for number, segment in enumerate(segments):
        where = f"after `{after[number]}`" if number < len(after) else "at the end"
        try:
            value = segment.forward(received[-1], train)
        except Exception as error:  # as above
            raise CutError(f"the piece that ends {where} fails on its own {mode}: {_line(error)}") from error
        if value.dim() == 0 or len(value) != len(inputs):
            raise CutError(f"what comes {where} does not have one row for each record; cut elsewhere")
        made.append(value)
        received.append(value.detach().clone().requires_grad_(value.requires_grad))
    gradient: Tensor | None = weights
    for value, source in zip(reversed(made), reversed(received[:-1]), strict=True):
        if value.requires_grad and gradient is not None:
            value.backward(gradient)  # type: ignore[no-untyped-call]
        gradient = source.grad
    return made[-1].detach()


def _same(what: str, expected: Tensor | None, found: Tensor | None, mode: str) -> None:
    if expected is None or found is None or expected.shape != found.shape:
        raise CutError(f"the pieces are not the network: {what} differs {mode}; cut elsewhere")
    if expected.numel() == 0:
        return
    expected, found = expected.detach().double(), found.detach().double()
    far = (expected - found).abs().max().item()
    if not far <= _TOLERANCE * max(1.0, expected.abs().max().item()):
        raise CutError(f"the pieces are not the network: {what} differs by {far:.3g} {mode}; cut elsewhere")


def _line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
