"""A piece of a network as a folder, for who has not the network's code: a program and its weights, signed, and no code.

The signature is checked before anything is parsed, and everything is checked before anything runs: names, lengths,
operators letter by letter, arguments against the operator's schema, weights against their digest and shapes. A program
can still do what its operators do: `describe` says it in plain words, and `partway.apart.confined` runs it apart.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any

import msgspec
import torch
from msgspec import Meta
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn

from partway.errors import CutError, TrustError
from partway.model import operators
from partway.model.partition import facts
from partway.model.piece import Packed, Piece
from partway.model.program import DTYPES, FORMATS, LAYOUTS, NUMBERS, Node, Program, Ref, Value, Word, references

PROGRAM, WEIGHTS, SIGNATURE = "segment.json", "weights.safetensors", "segment.sig"
MOST_JSON = 16 << 20
"""Bytes."""
MOST_NODES = 20_000
MOST_DEPTH = 8
"""Dimensions of a tensor."""
MOST_SIZE = 2**31
"""Of a number that says how large something is."""
TORCH = 2
"""Leading parts of PyTorch's version that must be the same."""

_VALUE = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.:#]{0,249}")
_TENSOR = re.compile(r"(?!.*__)[A-Za-z0-9_]+(\.[A-Za-z0-9_]+){0,30}")
_TEXT = re.compile(r"[A-Za-z0-9_ ,.>-]{0,64}")
_SYMBOL = re.compile(r"[A-Za-z0-9_ +*/()-]{1,100}")
_NUMBERS = ("int", "float", "bool", "tuple")


class Spec(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A parameter or buffer."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    parameter: bool
    trained: bool
    saved: bool
    """Whether it is part of the network's state; what is not is a constant, or made anew."""
    drawn: bool = False
    """Whether the network's own code draws it at random."""
    same_as: str = ""
    """An earlier one that is the same tensor under another name."""


class Bundle(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What `segment.json` holds."""

    format: Annotated[int, Meta(ge=1, le=1)]
    torch: Annotated[str, Meta(max_length=40)]
    """The version that it was made with."""
    weights: Annotated[str, Meta(pattern=r"^[0-9a-f]{64}$")]
    """SHA-256 of the file of weights."""
    training: Program
    evaluation: Program
    state: tuple[Spec, ...]
    takes: tuple[Value, ...] = ()
    """Where it is run by parties: each value that comes in, for a record; they stand side by side in one tensor."""
    gives: tuple[Value, ...] = ()
    portions: tuple[tuple[int, ...], ...] = ()
    """Which of these go together to which of several segments, by number; else all go to one."""
    flat: bool = False
    """Whether one alone is laid out flat."""


def write(piece: Piece, folder: Path, sign: Callable[[bytes], bytes]) -> None:
    """Writes a piece as a folder of three files.

    Args:
        folder: is made, and must be empty.
        sign: gives the signature of bytes.

    Raises:
        OSError: the folder cannot be written.
        CutError: the folder is not empty, or the piece is more than a folder can hold.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.iterdir()):
        raise CutError(f"{folder} is not empty; name a new folder")
    program, weights = packed(piece)
    parsed(program, MOST_SIZE)  # what could not be read is not written
    (folder / WEIGHTS).write_bytes(weights)
    (folder / PROGRAM).write_bytes(program)
    (folder / SIGNATURE).write_bytes(sign(program))


def packed(piece: Piece) -> tuple[bytes, bytes]:
    """A piece as the bytes of its program and of its weights."""
    first: dict[int, str] = {}
    specs, tensors = [], {}
    saved = piece.state_dict(keep_vars=True)
    everything = [*piece.named_parameters(remove_duplicate=False), *piece.named_buffers(remove_duplicate=False)]
    for name, tensor in everything:
        same = first.setdefault(id(tensor), name)
        dtype = str(tensor.dtype).removeprefix("torch.")
        parameter = isinstance(tensor, nn.Parameter)
        alias = "" if same == name else same
        drawn, trained = name in (piece.drawn or ()) and not alias, tensor.requires_grad
        specs.append(Spec(name, dtype, tuple(tensor.shape), parameter, trained, name in saved, drawn, alias))
        if not alias:
            tensors[name] = tensor.detach().cpu().contiguous().clone()
    weights = save(tensors)
    bundle = Bundle(
        format=1,
        torch=str(torch.__version__),
        weights=hashlib.sha256(weights).hexdigest(),
        training=_needed(piece.programs[True]),
        evaluation=_needed(piece.programs[False]),
        state=tuple(specs),
        takes=piece.packed.inputs if piece.packed else (),
        gives=piece.packed.outputs if piece.packed else (),
        portions=piece.packed.portions if piece.packed else (),
        flat=piece.packed is not None and piece.packed.flat,
    )
    return msgspec.json.encode(bundle), weights


def _needed(program: Program) -> Program:
    """Without what is known of values that are neither taken nor given; that cannot be checked, and is not needed."""
    kept = {*program.inputs, *references(program.outputs)}
    return msgspec.structs.replace(program, values={n: v for n, v in program.values.items() if n in kept})


def read(folder: Path, signed_by: Callable[[bytes, bytes], bool], most_parameters: int = 10_000_000) -> Piece:
    """The piece in a folder, with all that stands in it checked; nothing has run.

    Args:
        signed_by: (signature, data) -> whether somebody made it whose segments this party runs.
        most_parameters: numbers in all tensors together.

    Raises:
        TrustError: the signature is missing, or nobody's whom this party trusts; or the weights are other ones.
        CutError: something in it may not be, or is damaged.
    """
    data, signature = _bytes(folder / PROGRAM, MOST_JSON), _bytes(folder / SIGNATURE, 4096)
    if not signed_by(signature, data):
        raise TrustError(f"{folder / PROGRAM} is not signed by anybody whose segments may run here")
    try:
        bundle = parsed(data, most_parameters)
    except CutError as error:
        raise CutError(f"{folder / PROGRAM}: {error}") from None
    size = sum(math.prod(s.shape) * DTYPES[s.dtype].itemsize for s in bundle.state if not s.same_as)
    held = _bytes(folder / WEIGHTS, size + (1 << 20))
    if hashlib.sha256(held).hexdigest() != bundle.weights:
        raise TrustError(f"{folder / WEIGHTS} is not what was signed")
    try:
        tensors = {name: tensor.clone() for name, tensor in load(held).items()}  # in memory as PyTorch's own begins
    except (SafetensorError, ValueError) as error:
        raise CutError(f"{folder / WEIGHTS} is damaged: {error}") from None
    try:
        return assembled(bundle, tensors)
    except CutError as error:
        raise CutError(f"{folder / WEIGHTS}: {error}") from None


def parsed(data: bytes, most_parameters: int) -> Bundle:
    """What `segment.json` holds, with all of it examined.

    Raises:
        CutError: something in it may not be.
    """
    try:
        bundle = msgspec.json.decode(data, type=Bundle)
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError) as error:
        raise CutError(f"it is not a segment: {error}") from None
    _examine(bundle, most_parameters)
    return bundle


def _bytes(file: Path, most: int) -> bytes:
    try:
        if file.is_symlink() or not file.is_file():
            raise CutError(f"{file} is missing, or no plain file")
        if file.stat().st_size > most:
            raise CutError(f"{file} has {file.stat().st_size:,} bytes; at most {most:,} are read")
        return file.read_bytes()
    except OSError as error:
        raise CutError(f"{file} cannot be read: {error.strerror}") from None


def assembled(bundle: Bundle, tensors: Mapping[str, Tensor]) -> Piece:
    """The piece of an examined program and its tensors.

    Raises:
        CutError: they are not those that it names.
    """
    named: dict[str, Tensor] = {}
    passing: dict[str, Tensor] = {}
    if tensors.keys() != {s.name for s in bundle.state if not s.same_as}:
        raise CutError(f"it has other tensors than {PROGRAM} names")
    for spec in bundle.state:
        if spec.same_as:
            tensor = named[spec.same_as] if spec.same_as in named else passing[spec.same_as]
        else:
            tensor = tensors[spec.name]
            if tuple(tensor.shape) != spec.shape or tensor.dtype != DTYPES[spec.dtype]:
                raise CutError(f"`{spec.name}` is not of the type and shape that {PROGRAM} says")
            if tensor.is_floating_point() and not tensor.isfinite().all():
                raise CutError(f"`{spec.name}` holds what is no number")
            if spec.parameter:
                tensor = nn.Parameter(tensor, spec.trained)
        (named if spec.saved or spec.parameter else passing)[spec.name] = tensor
    piece = Piece(bundle.training, bundle.evaluation, named, passing)
    piece.drawn = frozenset(s.name for s in bundle.state if s.drawn)
    if bundle.takes or bundle.gives:
        piece.packed = Packed(bundle.takes, bundle.gives, bundle.portions, bundle.flat)
    return piece


# -- what may stand in it


def _examine(bundle: Bundle, most_parameters: int) -> None:
    """Raises `CutError` at the first thing that may not be."""
    ours, theirs = (version.partition("+")[0].split(".")[:TORCH] for version in (str(torch.__version__), bundle.torch))
    if ours != theirs:
        raise CutError(f"it was made with torch {bundle.torch}; here is {torch.__version__}")
    known: dict[str, Spec] = {}
    for spec in bundle.state:
        if not _TENSOR.fullmatch(spec.name) or len(spec.name) > 250:
            raise CutError(f"a tensor may not be called {spec.name[:60]!r}")
        if spec.name in known or any(n.startswith(f"{spec.name}.") or spec.name.startswith(f"{n}.") for n in known):
            raise CutError(f"the tensor `{spec.name}` stands in it twice, or inside another")
        _shape(spec.name, spec.dtype, spec.shape)
        if (spec.parameter and not DTYPES[spec.dtype].is_floating_point) or (spec.trained and not spec.parameter):
            raise CutError(f"`{spec.name}` is {spec.dtype} and no parameter that can be trained")
        if spec.drawn and (spec.same_as or not spec.saved):
            raise CutError(f"`{spec.name}` is said to be drawn, and is another tensor or none that is kept")
        same = known.get(spec.same_as) if spec.same_as else spec
        if same is None or same.same_as or (same.shape, same.dtype) != (spec.shape, spec.dtype):
            raise CutError(
                f"`{spec.name}` is said to be `{spec.same_as[:60]}`, which comes before it as another tensor"
            )
        known[spec.name] = spec
    total = sum(math.prod(s.shape) for s in bundle.state if not s.same_as)
    if total > most_parameters:
        raise CutError(f"its tensors have {total:,} numbers; at most {most_parameters:,} are allowed")
    for values in (bundle.takes, bundle.gives):
        for value in values:
            _value("a value", value)
            if not value.tensor or not all(isinstance(size, int) for size in value.shape):
                raise CutError("what parties send has one known size")
    for mode, program in (("training", bundle.training), ("evaluation", bundle.evaluation)):
        try:
            _examine_program(program, known)
        except CutError as error:
            raise CutError(f"in {mode}: {error}") from None
    if bundle.training.inputs != bundle.evaluation.inputs or bundle.training.keys != bundle.evaluation.keys:
        raise CutError("it takes or gives something else in training than in evaluation")
    for given, named in ((bundle.takes, bundle.training.inputs), (bundle.gives, bundle.training.outputs)):
        if given and len(given) != len(named):
            raise CutError("it does not say of all values what parties send")
    if len(bundle.portions) > 64 or any(
        len(portion) > 64 or not all(0 <= n < len(bundle.gives) for n in portion) for portion in bundle.portions
    ):
        raise CutError("it sends on values that it does not give")


def _shape(name: str, dtype: str, shape: tuple[int, ...]) -> None:
    if dtype not in DTYPES:
        raise CutError(f"`{name}` is of the type {dtype[:40]!r}, which there is not")
    if len(shape) > MOST_DEPTH or not all(0 <= size < MOST_SIZE for size in shape) or math.prod(shape) >= MOST_SIZE:
        raise CutError(f"`{name}` has a shape that may not be")


def _value(name: str, value: Value) -> None:
    if value.dtype not in DTYPES and value.dtype not in _NUMBERS:
        raise CutError(f"{name} is of the type {value.dtype[:40]!r}, which there is not")
    for size in value.shape:
        if isinstance(size, str):
            if not _SYMBOL.fullmatch(size):
                raise CutError(f"{name} has a size called {size[:60]!r}")
        elif not 0 <= size < MOST_SIZE:
            raise CutError(f"{name} has a shape that may not be")
    if len(value.shape) > MOST_DEPTH:
        raise CutError(f"{name} has too many dimensions")


def _examine_program(program: Program, known: Mapping[str, Spec]) -> None:
    if len(program.nodes) > MOST_NODES or len(program.state) > MOST_NODES or len(program.inputs) > 64:
        raise CutError(f"it has more than {MOST_NODES:,} operators or tensors, or more than 64 inputs")
    there: set[str] = set()
    for name in (*program.inputs, *program.state):
        _new(name, there)
    for name in program.state.values():
        if name not in known:
            raise CutError(f"it uses the tensor {name[:60]!r}, which it has not")
    for name in program.inputs:
        if name not in program.values:
            raise CutError(f"it does not say what `{name}` is")
    for node in program.nodes:
        _examine_node(node, there)
        _new(node.name, there)
    if not program.outputs or len(program.outputs) > 64 or not all(isinstance(o, Ref) for o in program.outputs):
        raise CutError("it gives nothing, or something else than values")
    _exist(program.outputs, there)
    if any(name not in program.values for name in references(program.outputs)):
        raise CutError("it does not say what it gives")
    for name, value in program.values.items():
        if name not in program.inputs and name not in set(references(program.outputs)):
            raise CutError(f"it tells of {name[:60]!r}, which it neither takes nor gives")
        _value(f"`{name}`", value)
    if program.keys is None and len(program.outputs) != 1:
        raise CutError("it gives several values without saying how")
    if program.keys and (
        len(program.keys) != len(program.outputs) or not all(_VALUE.fullmatch(k) for k in program.keys)
    ):
        raise CutError("it gives values by names that may not be")


def _new(name: str, there: set[str]) -> None:
    if not _VALUE.fullmatch(name):
        raise CutError(f"a value may not be called {name[:60]!r}")
    if name in there:
        raise CutError(f"the value `{name}` is made twice")
    there.add(name)


def _exist(of: Any, there: set[str]) -> None:
    for name in references(of):
        if name not in there:
            raise CutError(f"{name[:60]!r} is used before it is made, or never made")


def _examine_node(node: Node, there: set[str]) -> None:
    operator = operators.find(node.operator)
    if operator.arguments:
        if len(node.args) > len(operator.arguments) or any(k not in operator.arguments for k in node.kwargs):
            raise CutError(f"`{node.name}`: {node.operator} has no such arguments")
        if any(k in operator.arguments[: len(node.args)] for k in node.kwargs):
            raise CutError(f"`{node.name}`: {node.operator} gets an argument twice")
    elif node.kwargs or not 1 <= len(node.args) <= 2:
        raise CutError(f"`{node.name}`: {node.operator} has no such arguments")
    for argument in (*node.args, *node.kwargs.values()):
        for atom in argument if isinstance(argument, tuple) else (argument,):
            _atom(node, atom)
    for key, argument in node.kwargs.items():
        if isinstance(argument, tuple) and any(True for _ in references(argument)):
            raise CutError(f"`{node.name}`: a list of values as `{key}` is more than a segment can run")
    _exist(node, there)
    if (
        any(len(path) > 250 or not re.fullmatch(r"[A-Za-z0-9_.#]+", path) for path in node.modules)
        or len(node.modules) > 64
    ):
        raise CutError(f"`{node.name}` stands in modules of names that may not be")


def _atom(node: Node, atom: Any) -> None:
    words: Mapping[str, Mapping[str, Any]] = {
        "dtype": DTYPES,
        "layout": LAYOUTS,
        "format": FORMATS,
        "number": NUMBERS,
        "device": {"": None},
    }
    if isinstance(atom, Word) and atom.name not in words[atom.kind]:
        raise CutError(f"`{node.name}`: there is no {atom.kind} {atom.name[:40]!r}")
    if isinstance(atom, str) and not _TEXT.fullmatch(atom):
        raise CutError(f"`{node.name}`: the text {atom[:60]!r} is no word of an operator")
    if isinstance(atom, int) and not -(2**63) <= atom < 2**63:
        raise CutError(f"`{node.name}`: the number {atom} does not fit into an operator")


# -- in plain words

_PLAIN = {
    "conv": "convolution",
    "linear": "dense layer",
    "addmm": "dense layer",
    "batch_norm": "normalisation over the batch",
    "layer_norm": "normalisation",
    "group_norm": "normalisation",
    "instance_norm": "normalisation",
    "embedding": "table of vectors",
    "scaled_dot_product": "attention",
    "lstm": "recurrent layer",
    "gru": "recurrent layer",
    "rnn": "recurrent layer",
    "dropout": "dropout",
    "pool": "pooling",
}


def describe(piece: Piece) -> str:
    """What a segment takes, does and gives, for a person who decides whether it may see records."""
    program = piece.programs[True]
    counts: Counter[str] = Counter()
    for node in program.nodes:
        name = node.operator.split(".")[1] if node.operator.startswith("aten.") else "sizes"
        counts[next((plain for key, plain in _PLAIN.items() if key in name), "")] += 1
    rest = counts.pop("", 0)
    trained = sum(p.numel() for p in piece.parameters() if p.requires_grad)
    kept = sum(p.numel() for p in piece.parameters()) - trained
    layers = ", ".join(f"{n} x {plain}" for plain, n in counts.most_common() if plain != "dropout")
    lines = [f"It takes {_told(piece, program.inputs)}."]
    lines.append(
        f"It does {layers or 'no layer'}, and {rest} smaller steps; {trained:,} numbers are trained, {kept:,} fixed."
    )
    lines.append(f"It gives {_told(piece, piece.outputs)}.")
    weighted = facts(program, {name for name, _ in piece.named_parameters(remove_duplicate=False)}).weighted
    for name in piece.outputs:
        if name not in weighted:
            lines.append(
                f"WARNING: no weight has been applied to {name}: it shows what came in as it was, or as good as that."
            )
    if piece.draws:
        lines.append("It uses random numbers in training, as dropout does.")
    if piece.mixes:
        lines.append(f"In training, `{piece.mixes}` mixes the records of a batch.")
    return "\n".join(lines)


def _told(piece: Piece, names: tuple[str, ...]) -> str:
    told = []
    for name in names:
        value = piece.spec(name)
        told.append(f"{name} ({value.dtype}, {' x '.join(str(s) for s in value.shape[1:]) or 'one number'} a record)")
    return " and ".join(told)
