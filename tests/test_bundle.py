"""Segments as folders: what is written is what runs, apart and confined; what may not be is refused before it runs."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from partway.apart.confined import Confined
from partway.errors import CutError, JobFailed, PartwayError
from partway.model import bundle
from partway.model.bundle import PROGRAM, SIGNATURE, WEIGHTS
from partway.model.cut import Piece, as_piece, cut
from partway.model.program import Node, Program, Ref, Value
from partway.model.segment import Segment, has_batchnorm
from test_cut import Series, example, pieces_of


def sign(data: bytes) -> bytes:
    return b"signed" + data[:1]


def signed_by(signature: bytes, data: bytes) -> bool:
    return signature == sign(data)


def bottom() -> Piece:
    piece = pieces_of("residual")[1][0]
    assert isinstance(piece, Piece)
    return piece


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    bundle.write(bottom(), tmp_path / "bottom", sign)
    return tmp_path / "bottom"


# -- the same


@pytest.mark.parametrize("name", ["residual", "unet", "reader", "table", "gru", "block", "twice"])
def test_what_is_read_is_what_was_written(name: str, tmp_path: Path) -> None:
    """Bit for bit, in both modes, with its gradients and buffers."""
    for number, piece in enumerate(pieces_of(name)[1]):
        bundle.write(piece, tmp_path / str(number), sign)
        read = bundle.read(tmp_path / str(number), signed_by)
        assert list(read.state_dict()) == list(piece.state_dict())
        given = []
        for value in (piece.spec(n) for n in piece.inputs):
            shape = [
                6,
                *(
                    90 if isinstance(s, str) and number == 0 else 43 if isinstance(s, str) else s
                    for s in value.shape[1:]
                ),
            ]
            given.append(example(1, *shape, below=0 if value.floating else 2).to(bundle.DTYPES[value.dtype]))
        mine = copy.deepcopy(piece)
        for train in (True, False):
            made = []
            for each in (mine, read):
                torch.manual_seed(1)
                each.train(train)
                outputs = each(*(g.clone() for g in given))
                outputs = list(outputs.values()) if isinstance(outputs, dict) else outputs
                made.append(outputs if isinstance(outputs, list | tuple) else [outputs])
            assert all(torch.equal(a, b) for a, b in zip(*made, strict=True))


@pytest.mark.parametrize("half", [None, torch.bfloat16])
def test_a_confined_segment_counts_and_is_half_as_the_segment(half: torch.dtype | None) -> None:
    """What is asked for around a call holds in the other process: autocast, what is trained, FLOPs that are counted."""
    network = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4), nn.LayerNorm(4))
    alone = as_piece(network, example(1, 2, 6))
    next(alone.parameters()).requires_grad_(False)
    confined, given = Confined(copy.deepcopy(alone)), [example(2, 4, 6)]
    made = []
    for module, counting in ((alone, FlopCounterMode(display=False)), (confined, confined.counting())):
        with torch.autocast("cpu", half, enabled=half is not None), counting as counter:
            outputs = module(*given)
        outputs = [outputs] if isinstance(outputs, torch.Tensor) else list(outputs)
        torch.autograd.backward(outputs, [torch.ones_like(t) for t in outputs])
        made.append((outputs, [p.grad for p in module.parameters()], counter.get_total_flops()))
    (expected, gradients, flops), (found, others, counted) = made
    assert flops == counted > 0
    assert gradients[0] is others[0] is None
    assert any(t.dtype is half for t in expected) == (half is not None)
    assert all(torch.equal(a, b) and a.dtype is b.dtype for a, b in zip(expected, found, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(gradients[1:], others[1:], strict=True))
    confined.close()


def test_a_confined_segment_is_the_segment(folder: Path) -> None:
    """Outputs, gradients, buffers and random numbers are those of the piece here; and it deep-copies and flattens."""
    piece = pieces_of("block")[1][1]
    confined = Confined(copy.deepcopy(piece))
    alone = copy.deepcopy(piece)
    names = alone.inputs
    for step in range(3):
        given = [example(step, 4, 6).requires_grad_() for _ in names]
        there = [g.detach().clone().requires_grad_() for g in given]
        torch.manual_seed(step)
        expected = alone(*given)
        after = torch.get_rng_state()
        torch.manual_seed(step)
        found = confined(*there)
        assert torch.equal(torch.get_rng_state(), after)
        expected, found = ([t] if isinstance(t, torch.Tensor) else list(t) for t in (expected, found))
        assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))
        for outputs in (expected, found):
            torch.autograd.backward(outputs, [torch.ones_like(t) for t in outputs])
        assert all(torch.equal(a.grad, b.grad) for a, b in zip(given, there, strict=True))
        assert all(torch.equal(a.grad, b.grad) for a, b in zip(alone.parameters(), confined.parameters(), strict=True))
        with torch.no_grad():
            for p in (*alone.parameters(), *confined.parameters()):
                p -= 0.1 * p.grad
    mine = Confined(bundle.read(folder, signed_by))
    assert has_batchnorm(mine) == "norm"
    segment, other = Segment(mine), Segment(copy.deepcopy(bottom()))
    x = example(1, 5, 1, 6, 6)
    for each in (segment, other):
        (each.forward(x, True) * example(2, 5, 4, 6, 6)).sum().backward()
    torch.testing.assert_close(segment.gradient(), other.gradient())  # flat weights begin anywhere in memory
    assert all(torch.equal(t, other.tensors()[n]) for n, t in segment.tensors().items())
    mine.close()
    confined.close()


# -- refused


def changed(change: Callable[[Any], Any]) -> Callable[[Path], None]:
    """Writes another program, signed: as somebody would who is trusted, and should not be."""

    def apply(folder: Path) -> None:
        words = json.loads((folder / PROGRAM).read_bytes())
        data = json.dumps(change(words) or words).encode()
        (folder / PROGRAM).write_bytes(data)
        (folder / SIGNATURE).write_bytes(sign(data))

    return apply


def node(**more: Any) -> Callable[[Path], None]:
    """Changes the first operator, a convolution, in training."""
    return changed(lambda words: words["training"]["nodes"][0].update(more))


def added(operator: str, *args: Any, **kwargs: Any) -> Callable[[Path], None]:
    """Adds an operator."""
    extra = {"name": "extra", "operator": operator, "args": list(args), "kwargs": kwargs}
    return changed(lambda words: words["training"]["nodes"].append(extra))


def state(place: int = 0, **more: Any) -> Callable[[Path], None]:
    return changed(lambda words: words["state"][place].update(more))


def mode(**more: Any) -> Callable[[Path], None]:
    return changed(lambda words: words["training"].update(more))


def weights(change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], None]:
    """Other weights, with the digest of these."""

    def apply(folder: Path) -> None:
        tensors = dict(bundle.load((folder / WEIGHTS).read_bytes()))
        made = change(tensors)
        data = made if isinstance(made, bytes) else save(tensors)
        (folder / WEIGHTS).write_bytes(data)
        changed(lambda words: words.update(weights=bundle.hashlib.sha256(data).hexdigest()))(folder)

    return apply


def text(data: bytes) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        (folder / PROGRAM).write_bytes(data)
        (folder / SIGNATURE).write_bytes(sign(data))

    return apply


def value(name: str) -> dict[str, str]:
    return {"type": "value", "name": name}


X = value("x")
HOSTILE: dict[str, tuple[Callable[[Path], Any], str]] = {
    # the files
    "no program": (lambda f: (f / PROGRAM).unlink(), "is missing"),
    "no weights": (lambda f: (f / WEIGHTS).unlink(), "is missing"),
    "no signature": (lambda f: (f / SIGNATURE).unlink(), "is missing"),
    "another's signature": (lambda f: (f / SIGNATURE).write_bytes(b"mine"), "is not signed by anybody"),
    "changed after signing": (
        lambda f: (f / PROGRAM).write_bytes(b" " + (f / PROGRAM).read_bytes()),
        "is not signed by",
    ),
    "another's weights": (lambda f: (f / WEIGHTS).write_bytes(save({"x": torch.zeros(2)})), "is not what was signed"),
    "half of the weights": (
        lambda f: (f / WEIGHTS).write_bytes((f / WEIGHTS).read_bytes()[:-9]),
        "is not what was signed",
    ),
    "weights that are a pickle": (weights(lambda t: b"\x80\x04cposix\nsystem\n(X\x04\x00\x00\x00exitR."), "is damaged"),
    "a link to a file": (lambda f: ((f / WEIGHTS).unlink(), (f / WEIGHTS).symlink_to("/etc/passwd")), "no plain file"),
    "a folder for a file": (lambda f: ((f / WEIGHTS).unlink(), (f / WEIGHTS).mkdir()), "no plain file"),
    "weights without end": (lambda f: (f / WEIGHTS).write_bytes(bytes(2 << 20)), "bytes; at most"),
    "a program without end": (lambda f: (f / PROGRAM).write_bytes(bytes(17 << 20)), "bytes; at most"),
    # the words
    "no JSON": (text(b"import os"), "is not a segment"),
    "JSON without end": (text(b"[" * 200_000), "is not a segment"),
    "bytes that are no text": (text(b"\xff\xfe{}"), "is not a segment"),
    "a list": (text(b"[]"), "is not a segment"),
    "another format": (changed(lambda w: w.update(format=2)), "is not a segment"),
    "a key more": (changed(lambda w: w.update(setup="import os")), "is not a segment"),
    "a key less": (changed(lambda w: {k: v for k, v in w.items() if k != "state"}), "is not a segment"),
    "another PyTorch": (changed(lambda w: w.update(torch="1.0.0")), "made with torch 1.0.0"),
    "a digest that is none": (changed(lambda w: w.update(weights="../x")), "is not a segment"),
    # names
    "a newline in a name": (node(name="a\nb"), "may not be called"),
    "a name twice": (node(name="x"), "is made twice"),
    "an attribute of Python's": (state(name="__class__.x"), "may not be called"),
    "a path": (state(name="../../etc/passwd"), "may not be called"),
    "a tensor in a tensor": (state(1, name="stem.weight.x"), "or inside another"),
    "a tensor twice": (state(1, name="stem.weight"), "twice"),
    "a module of another kind": (node(modules=["a b"]), "modules of names"),
    "a tensor that it has not": (mode(state={"stem_weight": "elsewhere"}), "which it has not"),
    "the same as none": (state(1, same_as="nothing"), "is said to be"),
    "another tensor, drawn": (state(1, drawn=True, same_as="stem.weight"), "is said to be drawn"),
    # operators
    "reads a file": (added("aten.from_file.default", "/etc/passwd"), "is not among the operators"),
    "loads": (added("torch.load", "x"), "is not among the operators"),
    "takes memory of others": (added("aten.set_.source_Tensor", X, X), "is not among the operators"),
    "looks beside a tensor": (added("aten.as_strided.default", X, [9999], [1]), "is not among the operators"),
    "memory as it is": (added("aten.empty.memory_format", [9]), "is not among the operators"),
    "an attribute of an operator": (added("aten.add.__class__", X, X), "is not among the operators"),
    "a function of Python's": (added("py.exec", "import os"), "is not among the operators"),
    "an operator by another name": (added("aten.relu", X), "is not among the operators"),
    "looks at the operator's inside": (added("aten.relu.default._op", X), "is not among the operators"),
    # arguments
    "a value before it is made": (added("aten.relu.default", value("later")), "is used before it is made"),
    "itself": (added("aten.relu.default", value("extra")), "is used before it is made"),
    "too many arguments": (added("aten.relu.default", X, 1), "has no such arguments"),
    "an argument that it has not": (added("aten.relu.default", X, out=X), "has no such arguments"),
    "an argument twice": (added("aten.relu.default", X, self=X), "an argument twice"),
    "a list in a list": (added("aten.cat.default", [[X]]), "is not a segment"),
    "an object": (added("aten.relu.default", {"type": "call", "name": "os"}), "is not a segment"),
    "a type that there is not": (
        added("aten.to.dtype", X, {"type": "word", "kind": "dtype", "name": "object"}),
        "no dtype",
    ),
    "a device by name": (added("aten.to.device", X, {"type": "word", "kind": "device", "name": "cuda"}), "no device"),
    "text as an argument": (added("aten.einsum.default", "__import__('os')", [X]), "is no word of an operator"),
    "a number without end": (added("aten.add.Tensor", X, 2**70), "is not a segment|does not fit"),
    "a number that is none": (text(b'{"format": NaN}'), "is not a segment"),
    # sizes
    "more numbers than allowed": (state(shape=[100_000, 100_000]), "a shape that may not be|at most"),
    "a negative size": (state(shape=[-1, 1, 3, 3]), "a shape that may not be"),
    "a shape of 70 dimensions": (state(shape=[1] * 70), "a shape that may not be"),
    "another shape": (state(shape=[4, 1, 9]), "is not of the type and shape"),
    "another type": (state(dtype="float64"), "is not of the type and shape|at most"),
    "no type": (state(dtype="object"), "which there is not"),
    "a trained buffer": (state(4, trained=True), "no parameter that can be trained"),
    "too many operators": (
        changed(
            lambda w: w["training"].update(
                nodes=[{"name": f"n{i}", "operator": "py.neg", "args": [1]} for i in range(20_001)]
            )
        ),
        "more than 20,000 operators",
    ),
    # what it takes and gives
    "gives nothing": (mode(outputs=[]), "it gives nothing"),
    "gives a number": (mode(outputs=[3]), "something else than values"),
    "gives what is not there": (mode(outputs=[value("nothing")]), "never made"),
    "takes what it does not tell": (mode(inputs=["x", "y"]), "does not say what `y` is"),
    "takes something else in evaluation": (
        changed(lambda w: w["evaluation"].update(inputs=[], nodes=[])),
        "in evaluation",
    ),
    "several without saying how": (changed(lambda w: w["training"]["outputs"].append(X)), "without saying how"),
    "tells of another value": (
        changed(lambda w: w["training"]["values"].update(z={"dtype": "float32"})),
        "neither takes nor",
    ),
    "a size by a strange name": (
        changed(lambda w: w["training"]["values"]["x"].update(shape=["__import__", "a;b"])),
        "has a size called",
    ),
    "weights that are no numbers": (weights(lambda t: t["stem.weight"].fill_(float("nan"))), "holds what is no number"),
    "a weight less": (weights(lambda t: t.pop("stem.bias")), "has other tensors"),
    "a weight more": (weights(lambda t: t.update(more=torch.zeros(1))), "has other tensors|bytes"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_what_may_not_be_is_refused(name: str, folder: Path) -> None:
    spoil, words = HOSTILE[name]
    spoil(folder)
    with pytest.raises(PartwayError, match=words) as refused:
        bundle.read(folder, signed_by)
    one_line(refused.value)


def one_line(error: BaseException) -> None:
    assert len(str(error)) < 1000
    assert "\n" not in str(error)


def test_there_are_enough_of_them() -> None:
    assert len(HOSTILE) >= 40


@settings(max_examples=150)
@given(st.data())
def test_no_damage_does_more_than_to_be_refused(data: st.DataObject) -> None:
    """Any value anywhere in a signed program is exchanged for another: refused in one line, or still a segment."""
    words = json.loads(FUZZED)
    place: Any = words
    while isinstance(place, dict | list) and place:
        keys: list[Any] = sorted(place) if isinstance(place, dict) else list(range(len(place)))
        key = data.draw(st.sampled_from(keys))
        if not isinstance(place[key], dict | list) or not place[key] or data.draw(st.booleans()):
            break
        place = place[key]
    atoms = st.one_of(st.none(), st.booleans(), st.integers(-(2**66), 2**66), st.floats(), st.text(max_size=20))
    place[key] = data.draw(st.recursive(atoms, lambda x: st.lists(x, max_size=3), max_leaves=4))
    try:
        found = bundle.parsed(json.dumps(words).encode(), 10_000)
        bundle.assembled(found, bundle.load(FUZZED_WEIGHTS))
    except CutError as error:
        one_line(error)


@settings(max_examples=100)
@given(st.binary(max_size=200), st.integers(0, 10_000), st.integers(0, 10_000))
def test_no_bytes_do(noise: bytes, start: int, length: int) -> None:
    for data in (noise, FUZZED[: start % len(FUZZED)] + noise + FUZZED[(start + length) % len(FUZZED) :]):
        try:
            bundle.parsed(data, 10_000)
        except CutError as error:
            one_line(error)


FUZZED, FUZZED_WEIGHTS = bundle.packed(bottom())


# -- confined


def test_a_confined_process_has_nothing() -> None:
    """Neither files nor network nor other processes; and arithmetic goes on."""
    code = """
        import os, socket, torch
        from partway.apart.limits import confine
        torch.set_num_threads(1)
        torch.ones(2, 2) @ torch.ones(2, 2)
        held = os.open("/dev/null", os.O_WRONLY)
        confine(1 << 30)
        def refused(what):
            try:
                what()
            except OSError as error:
                return error.errno in (1, 11, 13)
            except (RuntimeError, MemoryError):
                return True
            return False
        checks = {
            "read": lambda: open("/etc/passwd"),
            "write": lambda: open("/tmp/partway-written", "w"),
            "list": lambda: os.listdir("/"),
            "socket": lambda: socket.socket(),
            "fork": lambda: os.fork(),
            "run": lambda: os.execv("/bin/true", ["true"]),
            "kill": lambda: os.kill(os.getppid(), 0),
            "memory": lambda: torch.zeros(1 << 30),
        }
        bad = [name for name, what in checks.items() if not refused(what)]
        assert float((torch.ones(3, 3) @ torch.ones(3, 3)).sum()) == 27
        print("left:", bad)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=120)
    assert done.stdout == "left: []\n", done.stderr


def program(*nodes: Node, state: dict[str, str] | None = None) -> Piece:
    """A piece that takes x and gives the last operator's value."""
    values = {"x": Value("float32", ("s0", 4)), nodes[-1].name: Value("float32", ("s0", 4))}
    made = Program(inputs=("x",), state=state or {}, nodes=nodes, outputs=(Ref(nodes[-1].name),), values=values)
    return Piece(made, made, {name: nn.Parameter(torch.ones(2, 4)) for name in (state or {}).values()})


def test_what_goes_wrong_there_ends_there() -> None:
    """An operator that fails, one that takes all memory, and one that takes all time: one line here, and no crash."""
    x = torch.ones(3, 4)
    fails = Confined(program(Node("y", "aten.mm.default", (Ref("x"), Ref("x")))))
    with pytest.raises(CutError, match="the segment fails: mat1 and mat2 shapes cannot be multiplied"):
        fails(x)
    grows = Confined(program(Node("y", "aten.zeros.default", ((1 << 20, 1 << 12),))), memory=1 << 30)
    with pytest.raises((CutError, JobFailed), match=r"the segment fails: .*memory|has ended by itself"):
        grows(x)
    slow = [Node("n0", "aten.repeat.default", (Ref("x"), (500, 500)))]
    slow += [Node("t", "aten.t.default", (Ref("n0"),))]
    slow += [Node(f"m{n}", "aten.mm.default", (Ref("n0"), Ref("t"))) for n in range(2000)]
    slow += [Node("y", "aten.relu.default", (Ref("x"),))]
    late = Confined(program(*slow), seconds=1.0)
    with pytest.raises(JobFailed, match="took more than 1 seconds"):
        late(x)
    for each in (fails, grows, late):
        each.close()


def test_recurrent_operators_are_held_to_their_shapes(tmp_path: Path) -> None:
    """PyTorch itself writes beyond its memory for these; here they are refused before they run."""
    piece = cut(Series(), example(7, 5, 2, 90), ["stem"])[1]
    assert isinstance(piece, Piece)
    bundle.write(piece, tmp_path / "series", sign)

    def lie(words: Any) -> None:
        for found in words["training"]["nodes"]:
            if found["operator"] == "aten.zeros.default":
                found["args"][0][1] = 2  # a first state of two rows, whatever comes in

    changed(lie)(tmp_path / "series")
    read = bundle.read(tmp_path / "series", signed_by)
    with pytest.raises(CutError, match="takes a first state of 4 x 5 rows"):
        read.train()(example(1, 5, 6, 43))


def test_it_is_told_in_plain_words() -> None:
    told = bundle.describe(bottom())
    assert "It takes x (float32, 1 x 6 x 6 a record)." in told
    assert "1 x convolution, 1 x normalisation over the batch" in told
    assert "`norm` mixes the records of a batch" in told
    assert "WARNING" not in told
    shows = program(Node("y", "aten.mul.Tensor", (Ref("x"), 2)))
    assert "WARNING: no weight has been applied to y: it shows what came in as it was" in bundle.describe(shows)
    assert "random numbers in training" in bundle.describe(pieces_of("block")[1][2])
