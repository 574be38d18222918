"""A segment of somebody else's, run by a process of its own that has nothing but what it is given.

The process has no files, no network and no other processes (`partway.apart.limits`), and bounded memory; a call that
takes too long ends it. Weights stay here: each forward sends them along, each backward brings their gradients back, so
that to everybody else it is a module like others.
"""

from __future__ import annotations

import contextlib
import copy
import os
import select
import struct
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import msgspec
import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from partway.apart.limits import confine
from partway.errors import CutError, JobFailed
from partway.model import bundle as bundles
from partway.model.piece import Piece
from partway.model.program import DTYPES

MEMORY = 4 << 30
"""Bytes that the process may take for what it computes."""
SECONDS = 60.0
"""For one call."""
MOST_BYTES = 1 << 31
"""Of one message."""
MOST_KEPT = 1024
"""Forwards that wait for their backward."""


class Confined(nn.Module):
    """A piece that another process runs, with its parameters and buffers here, under their own names.

    One output comes back as a tensor, several as a tuple, those of a dictionary too.

    Args:
        piece: as `partway.model.bundle.read` gave it.
        memory: bytes that the process may take.
        seconds: for one call.

    Raises:
        JobFailed: the process cannot be started, or has ended.
    """

    def __init__(self, piece: Piece, memory: int = MEMORY, seconds: float = SECONDS) -> None:
        super().__init__()
        self.draws, self.mixes, self.packed, self.drawn = piece.draws, piece.mixes, piece.packed, piece.drawn
        self._parameters, self._buffers, self._modules = piece._parameters, piece._buffers, piece._modules
        self._non_persistent_buffers_set = piece._non_persistent_buffers_set
        self._process = _Process(bundles.packed(piece), memory, seconds)

    def forward(self, *values: Tensor) -> Any:
        names = [name for name, _ in self.named_parameters()]
        tensors = (*values, *(p for _, p in self.named_parameters()))
        made = _Call.apply(self, len(values), names, torch.is_grad_enabled(), *tensors)  # type: ignore[no-untyped-call]
        return made[0] if len(made) == 1 else made

    def counting(self) -> contextlib.AbstractContextManager[_Counter]:
        """Counts the FLOPs of what the other process does meanwhile."""
        return self._process.counting()

    def close(self) -> None:
        """Ends the process; the next call starts another."""
        self._process.close()

    def __deepcopy__(self, memo: dict[int, Any]) -> Confined:
        mine = Confined.__new__(Confined)
        nn.Module.__init__(mine)
        memo[id(self)] = mine
        for name, value in vars(self).items():
            vars(mine)[name] = value if name == "_process" else copy.deepcopy(value, memo)
        return mine


class _Call(torch.autograd.Function):
    """One forward there, and its backward."""

    @staticmethod
    def forward(
        ctx: Any, module: Confined, inputs: int, names: list[str], graph: bool, *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        asked = {f"x{n}": t for n, t in enumerate(tensors[:inputs])}
        asked |= {f"p.{name}": t for name, t in zip(names, tensors[inputs:], strict=True)}
        asked |= {f"b.{name}": t for name, t in module.named_buffers()}
        asked["random"] = torch.get_rng_state()
        wanted = [n for n, t in enumerate(tensors[:inputs]) if t.requires_grad]
        trained = [n for n, t in enumerate(tensors[inputs:]) if t.requires_grad]
        number, made = module._process.forward(asked, module.training, graph, wanted, trained)
        try:
            torch.set_rng_state(made.pop("random"))
            for name, buffer in module.named_buffers():
                buffer.copy_(made.pop(f"b.{name}"))
            outputs = tuple(made[f"y{n}"].to(tensors[0].device) for n in range(len(made)))
        except (KeyError, RuntimeError, TypeError):
            raise JobFailed("the confined segment answers something else than it was asked for") from None
        ctx.process, ctx.number, ctx.names, ctx.wanted, ctx.inputs = module._process, number, names, wanted, inputs
        ctx.trained = [t.requires_grad for t in tensors[inputs:]]
        ctx.shapes = [(t.shape, t.dtype) for t in tensors]
        ctx.mark_non_differentiable(*(t for t in outputs if not t.is_floating_point()))
        return outputs

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        given = {f"g{n}": g for n, g in enumerate(gradients) if g is not None and g.is_floating_point()}
        made = ctx.process.backward(ctx.number, given)
        made = {name: tensor.to(gradients[0].device) for name, tensor in made.items()}
        found: list[Tensor | None] = [made.get(f"x{n}") if n in ctx.wanted else None for n in range(ctx.inputs)]
        found += [made.get(f"p.{name}") if t else None for name, t in zip(ctx.names, ctx.trained, strict=True)]
        for gradient, (shape, dtype) in zip(found, ctx.shapes, strict=True):
            if gradient is not None and (gradient.shape != shape or gradient.dtype != dtype):
                raise JobFailed("the confined segment gave a gradient of another shape than what it is of")
        return (None, None, None, None, *found)


@dataclass
class _Counter:
    """FLOPs, in the words of `torch.utils.flop_counter`."""

    flops: int = 0

    def get_total_flops(self) -> int:
        return self.flops


class _Asked(msgspec.Struct):
    """What the other process is asked to do with the tensors that come along."""

    do: str
    number: int
    train: bool = False
    graph: bool = False
    wanted: list[int] = []
    trained: list[int] = []
    half: str = ""
    """The type to which `torch.autocast` is set, if a forward runs under it."""
    counted: bool = False
    """Whether FLOPs are."""


class _Process:
    """The other process, and what is said to it."""

    def __init__(self, packed: tuple[bytes, bytes], memory: int, seconds: float) -> None:
        self._packed, self._memory, self._seconds = packed, memory, seconds
        self._child: subprocess.Popen[bytes] | None = None
        self._number = 0
        self._counter: _Counter | None = None

    def forward(
        self, tensors: Mapping[str, Tensor], train: bool, graph: bool, wanted: list[int], trained: list[int]
    ) -> tuple[int, dict[str, Tensor]]:
        """Args: `graph` is kept for a backward; `wanted` and `trained` are the inputs and parameters that it is for."""
        self._number += 1
        half = str(torch.get_autocast_dtype("cpu")) if torch.is_autocast_enabled("cpu") else ""
        asked = _Asked("forward", self._number, train, graph, wanted, trained, half.removeprefix("torch."))
        return self._number, self._ask(tensors, asked)

    def backward(self, number: int, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return self._ask(tensors, _Asked("backward", number))

    @contextlib.contextmanager
    def counting(self) -> Iterator[_Counter]:
        self._counter = counter = _Counter()
        try:
            yield counter
        finally:
            self._counter = None

    def _ask(self, tensors: Mapping[str, Tensor], asked: _Asked) -> dict[str, Tensor]:
        child = self._started()
        asked.counted = self._counter is not None
        words = {"asked": msgspec.json.encode(asked).decode()}
        until = time.monotonic() + self._seconds
        try:
            _send(child.stdin, save({n: t.detach().cpu().contiguous() for n, t in tensors.items()}, words))
            answer = _heard(child.stdout, until)
            made = _unpacked(answer)
        except (BrokenPipeError, EOFError, SafetensorError, TimeoutError) as error:
            self.close()
            why = (
                f"took more than {self._seconds:g} seconds"
                if isinstance(error, TimeoutError)
                else "has ended by itself"
            )
            raise JobFailed(f"the confined segment {why}; it may take {self._memory >> 20:,} MiB of memory") from None
        if "error" in made:
            told = bytes(made["error"].numpy()[:500]).decode("utf-8", "replace")
            raise CutError("the segment fails: " + "".join(c if c.isprintable() else " " for c in told))
        if self._counter is not None:
            self._counter.flops += int(made.pop("flops"))
        return made

    def _started(self) -> subprocess.Popen[bytes]:
        if self._child is None or self._child.poll() is not None:
            clean = {
                "PATH": os.environ.get("PATH", ""),
                "OMP_NUM_THREADS": "1",
                "PYTHONPATH": os.pathsep.join(sys.path),
            }
            command = [sys.executable, "-m", __name__, str(self._memory)]
            self._child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=clean)
            until = time.monotonic() + max(self._seconds, 120)
            try:
                for part in self._packed:
                    _send(self._child.stdin, part)
                ready = _heard(self._child.stdout, until)
            except (BrokenPipeError, EOFError, TimeoutError):
                self.close()
                raise JobFailed(
                    "the process for a segment of others does not start; its own words stand above"
                ) from None
            if ready != b"ready":
                self.close()
                raise JobFailed(f"a segment of others does not run here: {ready[:300].decode('utf-8', 'replace')}")
        return self._child

    def close(self) -> None:
        """Ends the process."""
        if self._child is not None:
            self._child.kill()
            self._child.wait()
            for pipe in (self._child.stdin, self._child.stdout):
                if pipe is not None:
                    with contextlib.suppress(BrokenPipeError):
                        pipe.close()
            self._child = None

    def __del__(self) -> None:
        self.close()


def _send(pipe: Any, data: bytes) -> None:
    pipe.write(struct.pack("<Q", len(data)))
    pipe.write(data)
    pipe.flush()


def _heard(pipe: Any, until: float | None = None) -> bytes:
    """One message. Raises `EOFError`, `TimeoutError`."""

    def exactly(count: int) -> bytes:
        parts = []
        while count:
            if until is not None and not select.select([pipe], [], [], max(0.0, until - time.monotonic()))[0]:
                raise TimeoutError
            part = os.read(pipe.fileno(), min(count, 1 << 20))
            if not part:
                raise EOFError
            parts.append(part)
            count -= len(part)
        return b"".join(parts)

    (size,) = struct.unpack("<Q", exactly(8))
    if size > MOST_BYTES:
        raise EOFError
    return exactly(size)


def _unpacked(data: bytes) -> dict[str, Tensor]:
    """Tensors of a message, in memory of their own: float32 that begins anywhere rounds otherwise on some CPUs."""
    return {name: tensor.clone() for name, tensor in load(data).items()}


# -- the other process


def main() -> None:
    """Takes a program, confines itself, and answers until its input ends."""
    source, sink = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # nothing but answers goes there
    torch.set_num_threads(1)
    program, weights = _heard(source), _heard(source)
    _warm_up()
    try:
        confine(int(sys.argv[1]))
        piece = bundles.assembled(bundles.parsed(program, 2**31 - 1), _unpacked(weights))
    except Exception as error:
        _send(sink, str(error).encode())
        return
    _send(sink, b"ready")
    kept: _Kept = {}
    while True:
        try:
            asked = _heard(source)
        except EOFError:
            return
        try:
            answer = _answer(piece, asked, kept)
        except Exception as error:
            words = (str(error).splitlines() or [type(error).__name__])[0].encode()[:500] or b"an error"
            answer = save({"error": torch.tensor(list(words), dtype=torch.uint8)})
        _send(sink, answer)


def _warm_up() -> None:
    """Loads what PyTorch loads when it is first used, while there are files."""
    x = torch.randn(2, 3, 8, 8, requires_grad=True)
    layers = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.1), nn.Flatten(), nn.Linear(144, 8)
    )
    series, _ = nn.LSTM(4, 4, batch_first=True)(torch.randn(2, 3, 4))
    made = [layers(x), nn.functional.scaled_dot_product_attention(series, series, series)]
    with FlopCounterMode(display=False):
        torch.autograd.backward(made, [torch.ones_like(t) for t in made])
    load(save({"x": torch.zeros(1)}))


_Kept = dict[int, tuple[list[Tensor], list[Tensor], dict[str, nn.Parameter]]]
"""Inputs, outputs and parameters of forwards by number, for their backward."""


def _answer(piece: Piece, asked: bytes, kept: _Kept) -> bytes:
    tensors = _unpacked(asked)
    length = int.from_bytes(asked[:8], "little")
    words = msgspec.json.decode(asked[8 : 8 + length])["__metadata__"]
    task = msgspec.json.decode(words["asked"], type=_Asked)
    if not task.counted:
        return save(_done(piece, task, tensors, kept))
    with FlopCounterMode(display=False) as counter:
        made = _done(piece, task, tensors, kept)
    return save(made | {"flops": torch.tensor(int(counter.get_total_flops()))})


def _done(piece: Piece, task: _Asked, tensors: dict[str, Tensor], kept: _Kept) -> dict[str, Tensor]:
    """One forward or backward."""
    if task.do == "backward":
        inputs, outputs, parameters = kept.pop(task.number)
        pairs = [(y, tensors[f"g{n}"]) for n, y in enumerate(outputs) if f"g{n}" in tensors and y.requires_grad]
        torch.autograd.backward([y for y, _ in pairs], [g for _, g in pairs])
        made = {f"x{n}": x.grad for n, x in enumerate(inputs) if x.grad is not None}
        made |= {f"p.{name}": p.grad for name, p in parameters.items() if p.grad is not None}
        return {name: t.contiguous() for name, t in made.items()}
    piece.train(task.train)
    parameters = _put(piece, tensors, task.trained)
    count = sum(name[0] == "x" and name[1:].isdecimal() for name in tensors)
    inputs = [tensors[f"x{n}"].requires_grad_(n in task.wanted) for n in range(count)]
    torch.set_rng_state(tensors["random"])
    half = DTYPES[task.half] if task.half else None
    with torch.set_grad_enabled(task.graph), torch.autocast("cpu", half, enabled=half is not None):
        found = piece(*inputs)
    if isinstance(found, dict):
        found = tuple(found.values())
    outputs = list(found) if isinstance(found, tuple) else [found]
    if task.graph:
        kept[task.number] = inputs, outputs, parameters
        while len(kept) > MOST_KEPT:  # forwards that were never followed by a backward
            kept.pop(next(iter(kept)))
    answer = {f"y{n}": y.detach().contiguous().clone() for n, y in enumerate(outputs)}
    answer |= {f"b.{name}": b.clone() for name, b in piece.named_buffers()} | {"random": torch.get_rng_state()}
    return answer


def _put(piece: Piece, tensors: Mapping[str, Tensor], trained: list[int]) -> dict[str, nn.Parameter]:
    """Gives a piece other parameters and buffers; those that it has may be needed for a backward, and stay."""
    parameters = dict(piece.named_parameters())
    buffers: dict[int, Tensor] = {id(b): tensors[f"b.{name}"] for name, b in piece.named_buffers()}
    made = {name: nn.Parameter(tensors[f"p.{name}"], n in trained) for n, name in enumerate(parameters)}
    new = {id(p): made[name] for name, p in parameters.items()}
    for module in piece.modules():
        module._parameters = {name: p if p is None else new[id(p)] for name, p in module._parameters.items()}
        module._buffers = {name: b if b is None else buffers[id(b)] for name, b in module._buffers.items()}
    return made


if __name__ == "__main__":
    main()
