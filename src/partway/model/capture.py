"""From a network's code to a program, in training and in evaluation, by `torch.export`.

>>> network = torch.nn.Sequential(torch.nn.Linear(4, 2), torch.nn.ReLU())
>>> captured = capture(network, torch.zeros(2, 4))
>>> [(node.operator, node.path) for node in captured.training.nodes]
[('aten.linear.default', '0'), ('aten.relu.default', '1')]
>>> captured.training.values["relu"].shape[1:]
(2,)
"""

from __future__ import annotations

import copy
import linecache
import math
import traceback
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from partway.errors import CutError
from partway.model import operators
from partway.model.program import DTYPES, Argument, Atom, Node, Program, Ref, Value, Word, references

ROWS = (5, 7)
"""Rows of what is captured, and captured again if need be: PyTorch takes 0 and 1 to be special."""
SHORT = 8
"""Steps of a series through a recurrent layer while it is captured; every step costs time there."""


class Captured(msgspec.Struct, frozen=True):
    """A network's programs in both modes."""

    training: Program
    evaluation: Program
    constants: dict[str, Tensor]
    """Tensors that the network's code makes from numbers, by a name in both programs' state."""

    def mode(self, train: bool) -> Program:
        return self.training if train else self.evaluation


class Call(msgspec.Struct, frozen=True):
    """What a network is called with."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]

    @property
    def tensors(self) -> list[Tensor]:
        return [leaf for leaf in pytree.tree_leaves((self.args, dict(self.kwargs))) if isinstance(leaf, Tensor)]

    @property
    def rows(self) -> int:
        """Records.

        Raises:
            CutError: there is no tensor with rows.
        """
        first = next((t for t in self.tensors if t.dim()), None)
        if first is None or not len(first):
            raise CutError("the example needs at least one row")
        return len(first)

    def with_rows(self, rows: int) -> Call:
        """So many records, cyclically. What has another first dimension than the first tensor stays as it is."""
        mine = self.rows

        def take(leaf: Any) -> Any:
            if not isinstance(leaf, Tensor):
                return leaf
            leaf = leaf.detach().clone()
            if not leaf.dim() or len(leaf) != mine:
                return leaf
            return leaf.repeat((-(-rows // mine), *(1 for _ in leaf.shape[1:])))[:rows].clone()

        args, kwargs = pytree.tree_map(take, (self.args, dict(self.kwargs)))
        return Call(args, kwargs)

    def shortened(self, steps: int) -> Call:
        """Of each tensor its longest dimension behind the first cut down to `steps`."""

        def cut(leaf: Any) -> Any:
            if not isinstance(leaf, Tensor) or leaf.dim() < 2:
                return leaf
            longest = max(range(1, leaf.dim()), key=lambda d: leaf.shape[d])
            return leaf.narrow(longest, 0, min(steps, leaf.shape[longest])).clone()

        args, kwargs = pytree.tree_map(cut, (self.args, dict(self.kwargs)))
        return Call(args, kwargs)


def call_of(example: Any, kwargs: Mapping[str, Any] | None = None) -> Call:
    """An example as a call: a tensor or a tuple of positional arguments, and named ones."""
    args = example if isinstance(example, tuple) else () if example is None else (example,)
    return Call(tuple(args), dict(kwargs or {}))


def capture(network: nn.Module, example: Any, kwargs: Mapping[str, Any] | None = None) -> Captured:
    """The programs of a network for any number of records; itself, its mode and the random numbers stay as they were.

    Where it has recurrent layers, a long series is shortened first, and its length may change too.

    Args:
        network: whose code PyTorch can follow: no branch may hang on a tensor's values.
        example: one tensor, shape (records, ...), or a tuple of what it is called with. Numbers among it are fixed.
        kwargs: what else it is called with.

    Raises:
        CutError: PyTorch cannot follow it, with the line; or it uses what a program cannot say.
    """
    call = call_of(example, kwargs)
    if any(isinstance(part, nn.RNNBase) for part in network.modules()):
        steps = SHORT
        while 2 * steps < max(max(t.shape[1:], default=0) for t in call.tensors):
            try:
                return _of_any_size(*(_capture(network, call.with_rows(r).shortened(n)) for r, n in _sizes(steps)))
            except CutError:  # too short for what stands before or behind, or that wants one length
                steps *= 4
    captured = _capture(network, call.with_rows(ROWS[0]))
    if all(isinstance(_rows(p), str) for p in (captured.training, captured.evaluation)):
        return captured
    return _of_any_size(captured, _capture(network, call.with_rows(ROWS[1])))


def _sizes(steps: int) -> list[tuple[int, int]]:
    return [(ROWS[0], steps), (ROWS[1], 2 * steps)]


def _rows(program: Program) -> int | str:
    return next((program.values[name].shape[0] for name in program.inputs if program.values[name].shape), 0)


def _of_any_size(one: Captured, other: Captured) -> Captured:
    """What captures of two sizes have in common; the sizes in which they differ are asked for when the program runs.

    PyTorch fixes a size without a word where the network's code takes it as a plain number, as by `len(x)`.

    Raises:
        CutError: they are not the same program.
    """
    both = [_merged(one.training, other.training), _merged(one.evaluation, other.evaluation)]
    return Captured(both[0], both[1], one.constants)


def _merged(one: Program, other: Program) -> Program:
    fault = CutError("the network is another one for another number of records, or another length")
    if one.values.keys() != other.values.keys() or len(one.nodes) != len(other.nodes):
        raise fault
    values: dict[str, Value] = {}
    where: dict[tuple[int, int], tuple[str, int]] = {}
    """A value that has a size, and in which dimension, by the sizes in both."""
    nodes: list[Node] = []
    sizes: dict[str, Value] = {}

    def note(name: str) -> None:
        a, b = one.values[name], other.values[name]
        if a.dtype != b.dtype or len(a.shape) != len(b.shape):
            raise fault
        pairs = list(zip(a.shape, b.shape, strict=True))
        values[name] = Value(a.dtype, tuple(x if x == y else f"t{x}" for x, y in pairs))
        for dimension, (x, y) in enumerate(pairs):
            if x != y and isinstance(x, int) and isinstance(y, int) and a.tensor:
                where.setdefault((x, y), (name, dimension))

    def merge(a: Any, b: Any) -> Any:
        if isinstance(a, tuple) and isinstance(b, tuple) and len(a) == len(b):
            return tuple(merge(x, y) for x, y in zip(a, b, strict=True))
        if a == b and type(a) is type(b):
            return a
        if type(a) is not int or type(b) is not int or (a, b) not in where:
            raise fault
        name, dimension = where[a, b]
        size = f"{name}_size_{dimension}"
        if size not in sizes:
            sizes[size] = Value("int", (values[name].shape[dimension],))
            nodes.append(Node(size, "aten.sym_size.int", (Ref(name), dimension)))
        return Ref(size)

    for name in (*one.inputs, *one.state):
        note(name)
    for a, b in zip(one.nodes, other.nodes, strict=True):
        if msgspec.structs.replace(a, args=b.args, kwargs=b.kwargs) != b or a.kwargs.keys() != b.kwargs.keys():
            raise fault
        args, kwargs = merge(a.args, b.args), {k: merge(v, b.kwargs[k]) for k, v in a.kwargs.items()}
        nodes.append(msgspec.structs.replace(a, args=args, kwargs=kwargs))
        if a.name in one.values:
            note(a.name)
    return msgspec.structs.replace(one, nodes=tuple(nodes), values=values | sizes)


def _capture(network: nn.Module, call: Call) -> Captured:
    constants: dict[str, Tensor] = {}
    programs = []
    for train in (True, False):
        mine = copied(network).train(train)
        mine.register_forward_hook(_values)
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings(), torch.enable_grad():
            warnings.simplefilter("ignore")
            try:
                exported = torch.export.export(
                    mine, call.args, dict(call.kwargs), dynamic_shapes=_dynamic(call), strict=False
                )
                module = exported.module(check_guards=False)
            except Exception as error:  # the network's own code runs here, and PyTorch's, with errors of all kinds
                raise CutError(_why(network, error)) from error
        programs.append(_program(mine, module, exported, constants))
    return Captured(programs[0], programs[1], constants)


def _values(module: nn.Module, args: Any, output: Any) -> Any:
    """What a network gives, without what holds no value for a record, such as a language model's cache."""
    kinds = Tensor | bool | int | float | str
    return pytree.tree_map(lambda leaf: leaf if isinstance(leaf, kinds) or leaf is None else None, output)


def copied(network: nn.Module) -> nn.Module:
    """A copy of a network.

    Raises:
        CutError: it cannot be copied.
    """
    try:
        return copy.deepcopy(network)
    except RuntimeError as error:
        raise CutError(f"the network cannot be copied: {str(error).splitlines()[0]}") from error


def _dynamic(call: Call) -> Any:
    shapes = torch.export.ShapesCollection()  # type: ignore[no-untyped-call]
    rows = call.rows
    for tensor in call.tensors:
        if tensor.dim() and len(tensor) == rows:
            shapes[tensor] = {0: torch.export.Dim.AUTO}
    return shapes


def _why(network: nn.Module, error: Exception) -> str:
    """What PyTorch could not follow, and the line of the network's code where."""
    torch_home = str(Path(torch.__file__).parent)
    frames = [f for f in traceback.extract_tb(error.__traceback__) if not f.filename.startswith((torch_home, "<"))]
    own = [f for f in frames if f.filename not in (__file__, copy.__file__) and "partway/model/" not in f.filename]
    where = ""
    if own:
        line = own[-1].line or linecache.getline(own[-1].filename, own[-1].lineno or 0).strip()
        where = f" at {Path(own[-1].filename).name}:{own[-1].lineno}, `{line}`"
    text = (str(error).splitlines() or [type(error).__name__])[0]
    if "data-dependent" in text or "data dependent" in str(error):
        text = f"what it does hangs on a tensor's values{where}"
    else:
        text = f"{type(error).__name__}{where}: {text}"
    return f"the code of {type(network).__name__} cannot be captured: {text}"


# -- from PyTorch's graph to ours


class _Reader:
    """Reads a graph, and the graphs inside it as parts of the same one."""

    def __init__(self) -> None:
        self.inputs: list[str] = []
        self.nodes: list[Node] = []
        self.values: dict[str, Value] = {}
        self.state: dict[str, str] = {}
        self.names: dict[torch.fx.Node, str] = {}
        """What a value is called by now: what an operator has written in place goes by that operator's name."""
        self.several: dict[torch.fx.Node, list[Argument]] = {}
        """What a graph inside gives, by the node that runs it."""

    def argument(self, of: Any) -> Argument:
        return tuple(map(self._atom, of)) if isinstance(of, list | tuple) else self._atom(of)

    def _atom(self, of: Any) -> Atom:
        if isinstance(of, torch.fx.Node):
            return Ref(self.names[of])
        if isinstance(of, float) and not math.isfinite(of):
            return Word("number", str(of))
        if of is None or isinstance(of, bool | int | float | str):
            return of
        if isinstance(of, torch.dtype) and of in DTYPES.values():
            return Word("dtype", str(of).removeprefix("torch."))
        if isinstance(of, torch.device):
            return Word("device")
        if of is torch.strided:
            return Word("layout", "strided")
        if isinstance(of, torch.memory_format):
            return Word("format", str(of).removeprefix("torch."))
        raise CutError(f"a program has no word for the argument {of!r}")

    def graph(
        self,
        graph: torch.fx.Graph,
        owner: nn.Module,
        given: Sequence[Argument] | None = None,
        prefix: str = "",
        gradient: bool = True,
        autocast: bool = True,
    ) -> Any:
        """Reads a graph to its end, and says what it gives."""
        arguments = iter(given or ())
        for node in graph.nodes:
            if node.op == "output":
                return node.args[0]
            if node.op == "placeholder" and given is not None:
                argument = next(arguments)
                assert isinstance(argument, Ref)
                self.names[node] = argument.name
                continue
            self.names[node] = prefix + node.name
            if node.op == "placeholder":
                self.inputs.append(node.name)
                self._note(node)
            elif node.op == "get_attr":
                if not isinstance(_attribute(owner, node.target), nn.Module):
                    self.state[self.names[node]] = node.target
                    self._note(node)
            elif node.op == "call_function" and not self._inner(node, owner, gradient, autocast):
                self._call(node, gradient, autocast)
        raise AssertionError("a graph without an output")

    def _inner(self, node: torch.fx.Node, owner: nn.Module, gradient: bool, autocast: bool) -> bool:
        """Reads a graph that runs without gradients, or without autocast, as part of this one."""
        name = getattr(node.target, "__name__", "")
        if name == "wrap_with_set_grad_enabled":
            enabled, body, *given = node.args
            gradient = gradient and bool(enabled)
        elif name == "wrap_with_autocast":
            _, _, enabled, _, body, *given = node.args
            if enabled:
                raise CutError("the network turns autocast on by itself; leave that to the job's `precision`")
            autocast = False
        else:
            return False
        assert isinstance(body, torch.fx.Node)
        module = _attribute(owner, str(body.target))
        prefix = f"{self.names[node]}_"
        made = self.graph(module.graph, module, [self.argument(g) for g in given], prefix, gradient, autocast)
        self.several[node] = [self.argument(m) for m in made]
        return True

    def _call(self, node: torch.fx.Node, gradient: bool, autocast: bool) -> None:
        operator = _name(node)
        if operator is None:
            return
        if operator == "py.getitem" and node.args[0] in self.several:
            made = self.several[node.args[0]][node.args[1]]  # type: ignore[index]
            assert isinstance(made, Ref)
            self.names[node] = made.name
            return
        self._note(node)
        args, kwargs = tuple(map(self.argument, node.args)), {k: self.argument(a) for k, a in node.kwargs.items()}
        operator, args, kwargs = _filled(operator, args, kwargs)
        name = self.names[node]
        if operator.endswith("out") and "out" in kwargs:  # into memory that is given: made, and then copied there
            made, out = f"{name}_made", kwargs.pop("out")
            self.nodes.append(Node(made, _without_out(operator), args, kwargs, _modules(node), gradient, autocast))
            self.values[made] = self.values[name]
            operator, args, kwargs = "aten.copy_.default", (out, Ref(made)), {}
        self.nodes.append(Node(name, operator, args, kwargs, _modules(node), gradient, autocast))
        try:
            written = operators.written(operator, args, kwargs)
        except CutError as error:
            line = (node.meta.get("stack_trace") or "").strip().splitlines()
            raise CutError(f"{error}" + (f", at `{line[-1].strip()}`" if line else "")) from None
        if isinstance(written, Ref) and written.name not in self.state:
            for other, now in self.names.items():
                if now == written.name:
                    self.names[other] = name

    def _note(self, node: torch.fx.Node) -> None:
        found, name = node.meta.get("val"), self.names[node]
        if isinstance(found, Tensor):
            dtype = str(found.dtype).removeprefix("torch.")
            self.values[name] = Value(dtype, tuple(_size(s) for s in found.shape))
        elif isinstance(found, bool | torch.SymBool):
            self.values[name] = Value("bool")
        elif isinstance(found, int | torch.SymInt):
            self.values[name] = Value("int", (_size(found),))
        elif isinstance(found, float | torch.SymFloat):
            self.values[name] = Value("float")
        elif isinstance(found, tuple | list):
            self.values[name] = Value("tuple")


def _modules(node: torch.fx.Node) -> tuple[str, ...]:
    """The modules in which a node stands; PyTorch's key of one ends in `@1` in its second call."""
    found = []
    for key, (path, *_) in (node.meta.get("nn_module_stack") or {}).items():
        _, at, call = key.rpartition("@")
        if path and not path.startswith("_empty_nn_module_stack"):
            found.append(f"{path}#{call}" if at and call.isdecimal() else path)
    return tuple(found)


def _attribute(owner: Any, target: str) -> Any:
    for part in target.split("."):
        owner = getattr(owner, part)
    return owner


def _size(of: Any) -> int | str:
    if isinstance(of, torch.SymInt):
        expression = of.node.expr
        return int(expression) if expression.is_number else str(expression)
    return int(of)


def _name(node: torch.fx.Node) -> str | None:
    """An operator's name; None of what only checks sizes."""
    target: Any = node.target
    if isinstance(target, torch._ops.OpOverload):
        name = str(target)
        if name.startswith(("aten._assert", "aten.sym_constrain", "aten._check")):
            return None
        return name
    short = target.__name__
    name = f"sym.{short.removeprefix('sym_')}" if target.__module__ == "torch" else f"py.{short}"
    if name not in operators.allowed():
        line = (node.meta.get("stack_trace") or "").strip().splitlines()
        raise CutError(f"a segment cannot run `{short}`" + (f", at `{line[-1].strip()}`" if line else ""))
    return name


def _filled(operator: str, args: Any, kwargs: Any) -> tuple[str, Any, Any]:
    """Zeros instead of memory as it happens to be, which could hold anything; what fills it afterwards still does."""
    kwargs = {k: a for k, a in kwargs.items() if k != "memory_format" or not operator.startswith("aten.empty")}
    if operator == "aten.empty.memory_format":
        return "aten.zeros.default", args, kwargs
    for empty, zeros in (("aten.empty_like.", "aten.zeros_like."), ("aten.new_empty.", "aten.new_zeros.")):
        if operator.startswith(empty):
            return operator.replace(empty, zeros), args, kwargs
    return operator, args, kwargs


def _without_out(operator: str) -> str:
    """The operator that gives back what another one writes into memory that it is given."""
    _, base, overload = operator.split(".")
    packet = getattr(torch.ops.aten, base)
    asked = [a.name for a in getattr(packet, overload)._schema.arguments if a.name != "out"]
    for other in packet.overloads():
        own = getattr(packet, other)._schema
        if [a.name for a in own.arguments] == asked and f"aten.{base}.{other}" in operators.allowed():
            return f"aten.{base}.{other}"
    return operator


def _program(network: nn.Module, module: Any, exported: Any, constants: dict[str, Tensor]) -> Program:
    reader = _Reader()
    made = reader.graph(module.graph, module)
    first = {id(t): name for name, t in [*network.named_parameters(), *network.named_buffers()]}
    known = dict([*network.named_parameters(remove_duplicate=False), *network.named_buffers(remove_duplicate=False)])
    for value, name in reader.state.items():
        if name in known:
            reader.state[value] = first[id(known[name])]
        else:
            constants[name] = _attribute(module, name).detach().clone()
    outputs, keys = _outputs(exported, reader, made)
    live, kept = set(references(outputs)), []
    for node in reversed(reader.nodes):
        if node.name in live or operators.find(node.operator).random or operators.lasting(node.operator, node.args):
            kept.append(node)
            live.update(references(node))
    return Program(
        inputs=tuple(name for name in reader.inputs if reader.values.get(name, Value("")).tensor),
        state={value: name for value, name in reader.state.items() if value in live},
        nodes=tuple(reversed(kept)),
        outputs=outputs,
        values=reader.values,
        keys=keys,
    )


def _outputs(exported: Any, reader: _Reader, made: Any) -> tuple[tuple[Argument, ...], tuple[str, ...] | None]:
    """What the network gives: one tensor, a tuple of them, or several by name, where `a.b` stands inside `a`."""
    leaves = [reader.argument(leaf) for leaf in pytree.tree_leaves(made)]
    spec = exported.call_spec.out_spec
    paths, _ = pytree.tree_flatten_with_path(pytree.tree_unflatten(list(range(len(leaves))), spec))
    named = {".".join(_key(part) for part in path): leaves[leaf] for path, leaf in paths}
    tensors = {key: leaf for key, leaf in named.items() if isinstance(leaf, Ref) and reader.values[leaf.name].tensor}
    if not tensors:
        raise CutError("the network gives no tensor")
    if list(tensors) == [""]:
        return tuple(tensors.values()), None
    plain = [str(n) for n in range(len(named))] == list(named) == list(tensors)
    return tuple(tensors.values()), () if plain else tuple(tensors)


def _key(part: Any) -> str:
    for attribute in ("key", "idx", "name"):
        if hasattr(part, attribute):
            return str(getattr(part, attribute))
    return str(part)
