"""Captured programs kept in files, by all that a capture hangs on: the network's code, its settings, PyTorch's version.

>>> from torch import nn
>>> one, other = nn.Sequential(nn.Linear(2, 2)), nn.Sequential(nn.Linear(2, 2, bias=False))
>>> call = call_of(torch.zeros(3, 2))
>>> content(one, call) == content(nn.Sequential(nn.Linear(2, 2)), call), content(one, call) == content(other, call)
(True, False)
"""

from __future__ import annotations

import contextlib
import enum
import functools
import hashlib
import inspect
import os
import sys
import sysconfig
import types
from collections.abc import Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import msgspec
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from partway.model.capture import Call, Captured, call_of, capture
from partway.model.program import Program

__all__ = ["call_of", "captured", "content", "folder"]


def folder() -> Path:
    """Where programs are kept: `$PARTWAY_CACHE`, or `partway` in the user's cache."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("PARTWAY_CACHE") or Path(home) / "partway")


def captured(network: nn.Module, call: Call, anew: bool = False) -> tuple[Captured, str]:
    """A network's programs, from a file where its content is known there; and its content, or nothing if it is unknown.

    Args:
        anew: whatever the file says.

    Raises:
        CutError: as `capture`.
    """
    key = content(network, call)
    file = folder() / f"{key}.safetensors"
    if key and not anew and file.is_file():
        found = _read(file)
        if found is not None:
            return found, key
    made = capture(network, call.args, call.kwargs)
    if key:
        _write(file, made)
    return made, key


def seen(key: str, cut: Sequence[Any]) -> Path:
    """A file that stands for a cut of these programs that has been checked."""
    return folder() / f"{key}-{hashlib.sha256(repr(cut).encode()).hexdigest()[:16]}.checked"


def note(file: Path) -> None:
    """Notes that a cut has been checked. What cannot be kept is done again."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
    except OSError:
        return


def _read(file: Path) -> Captured | None:
    """What a file holds; None if it is damaged, and is then made again."""
    try:
        with safe_open(file, "pt") as held:
            told = held.metadata()
            constants = {name: held.get_tensor(name) for name in held.keys()}  # noqa: SIM118 - no dictionary
        programs = [msgspec.json.decode(told[mode], type=Program) for mode in ("training", "evaluation")]
    except (SafetensorError, OSError, msgspec.MsgspecError, KeyError, TypeError):
        return None
    return Captured(programs[0], programs[1], constants)


def _write(file: Path, made: Captured) -> None:
    own = file.with_name(f"{file.name}.{os.getpid()}")
    told = {
        "training": msgspec.json.encode(made.training).decode(),
        "evaluation": msgspec.json.encode(made.evaluation).decode(),
    }
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        save_file({name: tensor.contiguous() for name, tensor in made.constants.items()}, own, told)
        own.replace(file)
    except (OSError, SafetensorError):  # a full disk, or a home that may not be written: it is captured again
        with contextlib.suppress(OSError):
            own.unlink()


# -- content


class _Unknown(Exception):
    """Something of which we cannot tell whether it is the same."""


def content(network: nn.Module, call: Call) -> str:
    """A digest of all that a network's programs hang on, in hexadecimal; nothing if that cannot be told."""
    digest = hashlib.sha256(f"{torch.__version__} {sys.version_info[:2]} {_texts('partway')}".encode())
    try:
        for part in _told(network, call):
            digest.update(part.encode())
            digest.update(b"\0")
    except (_Unknown, RecursionError):
        return ""
    return digest.hexdigest()


def _told(network: nn.Module, call: Call) -> Iterator[str]:
    paths = {id(module): path for path, module in network.named_modules()}
    first: dict[int, str] = {}
    for name, tensor in [*network.named_parameters(remove_duplicate=False), *network.named_buffers()]:
        same = first.setdefault(id(tensor), name)
        yield f"{name} {same} {tensor.dtype} {tuple(tensor.shape)} {tensor.requires_grad}"
    walk = _Walk(paths)
    for path, module in network.named_modules(remove_duplicate=False):
        yield path
        yield from walk.module(module)
    yield from walk.value([[leaf.dtype, list(leaf.shape[1:])] for leaf in call.tensors])
    args = [None if isinstance(a, Tensor) else a for a in call.args]
    kwargs = {k: None if isinstance(a, Tensor) else a for k, a in call.kwargs.items()}
    yield from walk.value([args, kwargs])


class _Walk:
    """Tells values one by one, each object once."""

    def __init__(self, paths: dict[int, str]) -> None:
        self._paths, self._seen = paths, dict.fromkeys(paths, "")
        self._kept: list[Any] = []

    def module(self, module: nn.Module) -> Iterator[str]:
        yield from self.type(type(module))
        own = {k: v for k, v in vars(module).items() if k not in ("_parameters", "_buffers", "_modules", "training")}
        yield from self.value(own)

    def type(self, kind: type) -> Iterator[str]:
        for each in kind.__mro__:
            yield f"{each.__module__}.{each.__qualname__} {_source(each.__module__)}"
            if "<locals>" in each.__qualname__:  # its methods may know what stood around them
                methods = [f for f in vars(each).values() if isinstance(f, types.FunctionType)]
                yield from self.value(methods)

    def value(self, value: Any) -> Iterator[str]:
        if value is None or isinstance(value, bool | int | float | complex | str | bytes):
            yield f"{type(value).__name__} {value!r}"
        elif isinstance(
            value, torch.dtype | torch.device | torch.layout | torch.memory_format | enum.Enum | torch.Size
        ):
            yield repr(value)
        elif id(value) in self._seen:
            yield f"again {self._paths.get(id(value), self._seen[id(value)])}"
        else:
            self._seen[id(value)] = str(len(self._seen))
            self._kept.append(value)  # so that no other object gets its id
            yield from self._object(value)

    def _object(self, value: Any) -> Iterator[str]:
        if isinstance(value, Tensor):
            data = value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
            yield f"{value.dtype} {tuple(value.shape)} {hashlib.sha256(data).hexdigest()}"
        elif isinstance(value, list | tuple):
            yield f"{type(value).__name__} {len(value)}"
            for item in value:
                yield from self.value(item)
        elif isinstance(value, dict):
            yield f"{type(value).__name__} {len(value)}"
            for key, item in value.items():
                yield from self.value(key)
                yield from self.value(item)
        elif isinstance(value, set | frozenset):
            yield from self.value(sorted(value, key=repr))
        elif isinstance(value, functools.partial):
            yield from self.value([value.func, value.args, value.keywords])
        elif isinstance(value, types.MethodType):
            yield from self.value([value.__func__, value.__self__])
        elif isinstance(value, types.FunctionType):
            yield f"{value.__module__}.{value.__qualname__} {_source(value.__module__)}"
            yield from self._code(value.__code__)
            cells = [cell.cell_contents for cell in value.__closure__ or ()]
            yield from self.value([value.__defaults__, value.__kwdefaults__, cells])
        elif isinstance(value, types.BuiltinFunctionType | types.BuiltinMethodType):
            yield f"{value.__module__}.{value.__qualname__}"
        elif isinstance(value, type):
            yield from self.type(value)
        elif isinstance(value, nn.Module):
            yield from self.module(value)
            yield from self.value([dict(value._parameters), dict(value._buffers), dict(value._modules)])
        elif hasattr(value, "__dict__") and not isinstance(value, types.ModuleType):
            yield from self.type(type(value))
            yield from self.value(vars(value))
        else:
            raise _Unknown

    def _code(self, code: types.CodeType) -> Iterator[str]:
        yield code.co_code.hex()
        yield repr(code.co_names)
        for constant in code.co_consts:
            if isinstance(constant, types.CodeType):
                yield from self._code(constant)
            else:
                yield repr(constant)


@functools.cache
def _source(module: str) -> str:
    """What stands for a module's code: the version of an installed package, or the text of all loaded files of ours."""
    top = module.partition(".")[0]
    if top in ("torch", "builtins") or (top in sys.stdlib_module_names and top != "__main__"):
        return ""
    loaded = sys.modules.get(top)
    file = getattr(loaded, "__file__", None) or ""
    if file.startswith(sysconfig.get_paths()["purelib"]):
        try:
            return metadata.version(top)
        except metadata.PackageNotFoundError:
            return str(getattr(loaded, "__version__", "")) or _texts(top)
    return _texts(top)


@functools.cache
def _texts(top: str) -> str:
    """A digest of the text of what is loaded of a package; of Partway, of its room of networks and programs."""
    digest, room = hashlib.sha256(), f"{top}.model" if top == "partway" else top
    for name, module in sorted(sys.modules.items()):
        if name == room or name.startswith(f"{room}."):
            try:
                digest.update(inspect.getsource(module).encode())
            except (OSError, TypeError) as error:
                if getattr(module, "__file__", None) or top == "__main__":
                    raise _Unknown from error  # typed at a prompt, or compiled
    return digest.hexdigest()
