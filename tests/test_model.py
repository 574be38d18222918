"""Cutting, segments, first weights, and networks by name."""

from __future__ import annotations

import copy
import hashlib
import random
import sys
import types
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from partway.errors import ConfigError, CutError, Refused, UsageError
from partway.model import zoo
from partway.model.cut import cut, places
from partway.model.recipe import Between, Recipe, build, resolve
from partway.model.segment import Segment, has_batchnorm, initialise

SECRET = bytes(range(32))


def network() -> nn.Sequential:
    torch.manual_seed(1)
    return zoo.mlp(29, [64, 16, 128, 64], 7)


def rows(n: int = 5, width: int = 29) -> Tensor:
    return torch.randn(n, width, generator=torch.Generator().manual_seed(2))


class Named(nn.Module):
    """A module with code of its own."""

    def __init__(self, forward: Callable[..., Any], **parts: nn.Module) -> None:
        super().__init__()
        for name, part in parts.items():
            self.add_module(name, part)
        self._forward = forward

    def forward(self, x: Tensor) -> Any:
        return self._forward(self, x)


# -- cut


def test_pieces_share_modules_and_keep_names() -> None:
    whole = network()
    pieces = cut(whole, rows(), ["hidden.2", "hidden.7"])
    assert [key for piece in pieces for key in piece.state_dict()] == list(whole.state_dict())
    assert list(pieces[0].state_dict())[-1] == "hidden.2.bias"
    assert list(pieces[2].state_dict()) == ["output.weight", "output.bias"]
    assert pieces[0].get_submodule("hidden.2") is whole.get_submodule("hidden.2")
    x = rows()
    assert torch.equal(pieces[2](pieces[1](pieces[0](x))), whole(x))


def test_every_place_can_be_cut_and_a_sequence_stands_for_its_last_module() -> None:
    whole = network()
    legal = places(whole)
    assert legal == [*(f"hidden.{i}" for i in range(8)), "hidden"]
    for path in legal:
        assert len(cut(whole, rows(), [path])) == 2
    assert list(cut(whole, rows(), ["hidden"])[0].state_dict()) == list(
        cut(whole, rows(), ["hidden.7"])[0].state_dict()
    )


def test_nested_sequences_and_images() -> None:
    stem = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Sequential(nn.GroupNorm(2, 4), nn.ReLU(inplace=True), nn.Dropout(0.3)))
    whole = nn.Sequential(OrderedDict(stem=stem, flatten=nn.Flatten(), head=nn.Linear(4 * 6 * 6, 2)))
    assert places(whole) == ["stem.0", "stem.1.0", "stem.1.1", "stem.1.2", "stem.1", "stem", "flatten"]
    for path in places(whole):
        cut(whole, torch.randn(2, 3, 8, 8), [path])
    image = zoo.cnn(1, 9, 8, [4, 6], 3, groups=2)
    bottom, top = cut(image, torch.randn(3, 1, 9, 8), ["features.2"])
    assert [k for p in (bottom, top) for k in p.state_dict()] == list(image.state_dict())


def test_cut_leaves_everything_as_it_was() -> None:
    whole = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(), nn.Linear(4, 2)).eval()
    whole[1].train()
    before, mode = copy.deepcopy(whole.state_dict()), [m.training for m in whole.modules()]
    state = torch.get_rng_state()
    pieces = cut(whole, rows(6, 4), ["1"])
    assert torch.equal(torch.get_rng_state(), state)
    assert [m.training for m in whole.modules()] == mode
    assert not pieces[0].training
    assert all(torch.equal(a, b) for a, b in zip(before.values(), whole.state_dict().values(), strict=True))
    assert all(p.grad is None for p in whole.parameters())


@pytest.mark.parametrize(
    ("after", "words"),
    [
        (["hiden.2"], "did you mean `hidden.2`"),
        (["zzzzzzzzzzz"], "after hidden.0, hidden.1"),
        (["output"], "nothing comes after `output`"),
        (["hidden.4", "hidden.2"], "not in the network's order"),
        (["hidden.2", "hidden.2"], "not in the network's order"),
        (["hidden.7", "hidden"], "not in the network's order"),
        ([], "name the modules"),
        ("hidden.2", "in a list"),
    ],
)
def test_places_that_are_none(after: Any, words: str) -> None:
    with pytest.raises(CutError, match=words):
        cut(network(), rows(), after)


def test_a_piece_draws_only_if_something_in_it_does() -> None:
    """To seed before each forward costs more than a small forward."""
    bottom, trunk = cut(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.Dropout(0.1)), rows(5, 4), ["1"])
    assert not Segment(bottom).draws
    assert Segment(trunk).draws


def test_networks_that_cannot_be_cut() -> None:
    def refused(whole: nn.Module, words: str, after: str = "0", example: Tensor | None = None) -> None:
        with pytest.raises(CutError, match=words):
            cut(whole, rows(5, 4) if example is None else example, [after])

    branch = Named(lambda m, x: m.a(x) + x, a=nn.Linear(4, 4))
    refused(branch, "no operator runs in `0`; nearest are `a`")
    refused(
        nn.Sequential(branch, nn.Linear(4, 2)),
        "an input, would reach another party.*the nearest legal cut is after `0`",
        "0.a",
    )
    refused(nn.Sequential(nn.ReLU(), nn.Flatten()), "no trainable parameter")
    refused(nn.Sequential(nn.Linear(4, 4)), "nothing comes after")
    refused(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)), "at least one row", example=torch.zeros(0, 4))
    refused(nn.Sequential(nn.Linear(4, 4), nn.Linear(9, 2)), "fails on the example")
    cut(nn.Sequential(nn.Linear(4, 4), nn.LSTM(4, 4)), rows(5, 4), ["0"])  # several outputs are fine at the end
    pair = Named(lambda m, x: (x, x))
    join = Named(lambda m, x: m.a(x[0] if isinstance(x, tuple) else x), a=nn.Linear(4, 2))
    refused(nn.Sequential(nn.Linear(4, 4), pair, join), "what comes after `1` is a tuple, not one tensor", "1")
    mixed = nn.Sequential(nn.Linear(4, 4), nn.Flatten(0), nn.Unflatten(0, (-1, 4)), nn.Linear(4, 2))
    refused(mixed, "one row for each record", "1")
    refused(
        nn.Sequential(nn.Linear(4, 4), Named(lambda m, x: x.detach()), nn.Linear(4, 2)), "`0.weight` gets no gradient"
    )
    unused = Named(lambda m, x: x, spare=nn.Linear(1, 1))
    refused(nn.Sequential(nn.Linear(4, 4), unused), "`1.spare.weight` gets no gradient")


def test_tied_tensors_stay_in_one_piece() -> None:
    layer, other = nn.Linear(4, 4), nn.Linear(4, 4)
    whole = nn.Sequential(layer, nn.ReLU(), layer, nn.Linear(4, 2))
    with pytest.raises(CutError, match=r"`0.weight` and `2.weight` are one tensor"):
        cut(whole, rows(5, 4), ["1"])
    cut(whole, rows(5, 4), ["2"])
    other.weight = layer.weight
    with pytest.raises(CutError, match="are one tensor"):
        cut(nn.Sequential(layer, other), rows(5, 4), ["0"])
    other.weight = nn.Parameter(torch.empty(0))
    other.weight.data = layer.weight.data
    with pytest.raises(CutError, match="are one tensor"):
        cut(nn.Sequential(layer, other), rows(5, 4), ["0"])
    relu = nn.ReLU()  # holds nothing, so it may stand on both sides
    cut(nn.Sequential(layer, relu, nn.Linear(4, 2), relu), rows(5, 4), ["1"])


def test_the_numbers_find_what_the_structure_hides() -> None:
    # The second module reads the first one's weight behind the sequence's back, so its gradient goes around the cut.
    def sneaky(honest: bool) -> nn.Sequential:
        first = nn.Linear(4, 4)
        reads = Named(lambda m, x: x if honest else x + m.secret[0].weight.sum())
        reads.__dict__["secret"] = [first]
        return nn.Sequential(first, reads, nn.Linear(4, 2)).double()

    cut(sneaky(honest=True), rows(5, 4), ["0"])
    with pytest.raises(CutError, match=r"the gradient of `0.weight` differs"):
        cut(sneaky(honest=False), rows(5, 4), ["0"])

    whole = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    whole.register_forward_hook(lambda m, i, o: o * 2)
    with pytest.raises(CutError, match="the output differs"):
        cut(whole, rows(5, 4), ["0"])


def test_a_sequence_with_its_own_forward_is_no_sequence() -> None:
    class Skip(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return x + super().forward(x)

    assert places(nn.Sequential(Skip(nn.Linear(4, 4), nn.ReLU()), nn.Linear(4, 2))) == ["0"]
    with pytest.raises(CutError, match="a Skip, not a sequence"):
        places(Skip(nn.Linear(4, 4), nn.Linear(4, 4)))


@settings(max_examples=25, deadline=None)
@given(st.recursive(st.integers(0, 3), lambda x: st.lists(x, min_size=1, max_size=3), max_leaves=6), st.data())
def test_any_nesting_is_cut_right(shape: Any, data: st.DataObject) -> None:
    def grow(shape: Any) -> nn.Module:
        if isinstance(shape, list):
            return nn.Sequential(*map(grow, shape))
        return [nn.Linear(3, 3), nn.Tanh(), nn.Dropout(0.5), nn.BatchNorm1d(3)][shape]

    whole = nn.Sequential(nn.Linear(3, 3), grow(shape), nn.Linear(3, 2))
    legal = places(whole)
    after = sorted(data.draw(st.sets(st.sampled_from(legal), min_size=1, max_size=2)), key=legal.index)
    try:
        pieces = cut(whole, rows(4, 3), after)
    except CutError as error:
        assert "or meet" in str(error)  # noqa: PT017
        return
    assert [key for piece in pieces for key in piece.state_dict()] == list(whole.state_dict())


# -- segments


OPTIMIZERS: dict[str, Callable[[list[nn.Parameter]], torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9),
    "adam": lambda p: torch.optim.Adam(p, lr=3e-3),
    "adam fused": lambda p: torch.optim.Adam(p, lr=3e-3, fused=True),
    "adamw": lambda p: torch.optim.AdamW(p, lr=3e-3, weight_decay=0.1),
}


def train(module: nn.Module, forward: Callable[[Tensor], Tensor], step: Callable[[], None], steps: int = 20) -> None:
    draw = torch.Generator().manual_seed(3)
    for _ in range(steps):
        for _ in range(2):  # two micro-batches a step add up
            x = torch.randn(6, 29, generator=draw, dtype=torch.float64)
            y = torch.randint(7, (6,), generator=draw)
            nn.functional.cross_entropy(forward(x), y, reduction="sum").backward()
        step()


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_one_flat_parameter_trains_as_many(name: str) -> None:
    torch.manual_seed(5)
    plain = zoo.mlp(29, [13, 5, 11], 7).double()  # odd widths, so that the views are not aligned
    segment = Segment(plain, torch.float64)
    assert segment.flat is not None
    many, one = OPTIMIZERS[name](list(plain.parameters())), OPTIMIZERS[name]([segment.flat])

    def step_many() -> None:
        many.step()
        many.zero_grad()

    def step_one() -> None:
        one.step()
        segment.clear()

    train(plain, plain, step_many)
    train(plain, lambda x: segment.forward(x, True), step_one)
    # A fused optimiser rounds the last few numbers of each tensor otherwise, and a flat one ends elsewhere.
    assert apart(plain, segment) <= (1e-14 if "fused" in name else 0)
    # the negation: gradients that are not cleared pile up
    train(plain, lambda x: segment.forward(x, True), one.step, steps=2)
    train(plain, plain, step_many, steps=2)
    assert apart(plain, segment) > 1e-4


def apart(module: nn.Module, segment: Segment) -> float:
    named = segment.tensors()
    return max(float((named[key] - value).abs().max()) for key, value in module.state_dict().items())


def test_no_gradient_is_none_and_adam_leaves_it_alone() -> None:
    segment = Segment(network())
    assert segment.flat is not None
    adam = torch.optim.Adam([segment.flat])
    segment.forward(rows(), True).sum().backward()
    adam.step()
    segment.clear()
    before = segment.weights()
    segment.forward(rows(), True)  # a forward alone brings no gradient
    segment.forward(rows(), False)
    assert segment.gradient() is None
    adam.step()
    assert torch.equal(segment.weights(), before)
    segment.set_gradient(torch.zeros(segment.size))  # zero is not none: momentum goes on
    adam.step()
    assert not torch.equal(segment.weights(), before)


def test_gradients_start_anew_after_clear_or_zero_grad() -> None:
    segment = Segment(network())
    assert segment.flat is not None

    def once() -> Tensor:
        segment.forward(rows(), True).sum().backward()
        gradient = segment.gradient()
        assert gradient is not None
        return gradient.clone()

    first = once()
    assert first.any()
    assert torch.equal(once(), 2 * first)
    segment.clear()
    assert torch.equal(once(), first)
    torch.optim.SGD([segment.flat]).zero_grad()
    assert torch.equal(once(), first)
    segment.clear()
    both = [segment.forward(rows(), True) for _ in range(2)]
    torch.cat(both).sum().backward()
    assert torch.equal(segment.gradient(), 2 * first)


def test_an_agreed_total_is_the_gradient_and_not_copied() -> None:
    segment = Segment(network())
    total = torch.arange(segment.size, dtype=torch.float32)
    segment.forward(rows(), True).sum().backward()
    segment.set_gradient(total)
    assert segment.gradient().data_ptr() == total.data_ptr()  # type: ignore[union-attr]
    with pytest.raises(RuntimeError, match="clear"):
        segment.forward(rows(), True).sum().backward()
    segment.clear()
    assert segment.gradient() is None
    for wrong in (total[1:], total.double(), total[None]):
        with pytest.raises(UsageError, match="a gradient is float32"):
            segment.set_gradient(wrong)


def test_forward_keeps_its_graph_only_in_training() -> None:
    segment = Segment(nn.Sequential(nn.Linear(3, 3), nn.Dropout(0.5)))
    assert segment.forward(rows(4, 3), True).grad_fn is not None
    assert segment.forward(rows(4, 3), False).grad_fn is None
    assert torch.equal(segment.forward(rows(4, 3), False), segment.forward(rows(4, 3), False))
    assert not torch.equal(segment.forward(rows(4, 3), True), segment.forward(rows(4, 3), True))


def test_what_was_received_is_never_written_into() -> None:
    segment = Segment(nn.Sequential(nn.ReLU(inplace=True), nn.Linear(3, 2)))
    x = rows(4, 3).requires_grad_()
    before = x.detach().clone()
    segment.forward(x, True).sum().backward()
    assert torch.equal(x, before)
    assert x.grad is not None
    module = nn.Sequential(nn.ReLU(inplace=True), nn.Linear(3, 2))
    with pytest.raises(RuntimeError, match="in-place"):
        module(x)


def test_a_piece_without_trainable_parameters() -> None:
    frozen = nn.Linear(3, 2).requires_grad_(False)
    segment = Segment(nn.Sequential(frozen, nn.ReLU()))
    assert (segment.flat, segment.size, segment.gradient()) == (None, 0, None)
    assert list(segment.tensors()) == ["0.weight", "0.bias"]
    x = rows(4, 3).requires_grad_()
    segment.forward(x, True).sum().backward()
    assert x.grad is not None
    segment.load(segment.weights())
    segment.set_gradient(segment.weights())
    segment.clear()
    with pytest.raises(UsageError, match="without trainable"):
        segment.set_gradient(torch.ones(2))


def test_state_goes_from_copy_to_copy() -> None:
    piece = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    a, b = Segment(piece), Segment(piece)
    a.load(torch.randn(a.size))
    a.forward(rows(4, 3), True)
    state = a.tensors()
    assert set(state) == set(piece.state_dict())
    b.load_tensors(state)
    assert torch.equal(a.weights(), b.weights())
    assert all(torch.equal(state[key], value) for key, value in b.tensors().items())
    assert b.flat is not None
    assert torch.equal(b.flat[:9].view(3, 3), state["0.weight"])  # still a view of the flat one
    state["0.weight"].zero_()
    assert a.weights()[:9].any()  # copies
    assert not torch.equal(a.weights(), Segment(piece).weights())  # the user's own is left as it was
    twin = copy.deepcopy(a)
    twin.load(torch.zeros(a.size))
    assert not twin.tensors()["0.weight"].any()
    assert a.weights().any()


def test_state_that_does_not_fit_changes_nothing() -> None:
    segment = Segment(nn.Linear(3, 2))
    good, before = segment.tensors(), segment.weights()
    bad: list[tuple[dict[str, Tensor], str]] = [
        ({"weight": good["weight"] + 1}, "`bias` is missing"),
        ({**good, "weight": good["weight"] + 1, "more": torch.ones(1)}, "`more` is not a tensor of this piece"),
        ({"weight": good["weight"] + 1, "bias": torch.ones(3)}, r"`bias` is float32\[2\]"),
        ({"weight": good["weight"] + 1, "bias": torch.ones(2).double()}, r"not float64\[2\]"),
    ]
    for named, words in bad:
        with pytest.raises(UsageError, match=words):
            segment.load_tensors(named)
    for flat in (torch.ones(1), torch.ones(8).double()):
        with pytest.raises(UsageError, match="the weights are"):
            segment.load(flat)
    assert torch.equal(segment.weights(), before)


def test_tied_weights_come_once() -> None:
    layer = nn.Linear(3, 3)
    segment = Segment(nn.Sequential(layer, layer))
    assert segment.size == 12
    segment.load(torch.ones(12))
    assert segment.tensors()["1.weight"].all()


@pytest.mark.parametrize(
    ("module", "words"),
    [
        (nn.Sequential(nn.Embedding(3, 2, sparse=True)), "`0` .Embedding. makes sparse gradients"),
        (nn.Sequential(nn.LazyLinear(3)), "no shape yet"),
        (nn.Linear(3, 2, dtype=torch.complex64), "complex"),
    ],
)
def test_pieces_that_cannot_run(module: nn.Module, words: str) -> None:
    with pytest.raises(CutError, match=words):
        Segment(module)


@pytest.mark.parametrize(
    ("module", "draws"),
    [
        (nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.1)), True),
        (nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.0)), False),
        (nn.Sequential(nn.Linear(2, 2), nn.RReLU()), True),
        (nn.TransformerEncoderLayer(2, 1, dropout=0.1), True),
        (nn.MultiheadAttention(2, 1), False),
        (nn.GRU(2, 2, 2, dropout=0.5), True),
        (Named(lambda m, x: x), True),
        (network(), False),
    ],
)
def test_which_pieces_draw(module: nn.Module, draws: bool) -> None:
    assert Segment(module).draws is draws


def test_has_batchnorm() -> None:
    assert has_batchnorm(nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.BatchNorm2d(2)))) == "1.0"
    assert has_batchnorm(nn.BatchNorm1d(2)) == "BatchNorm1d"
    assert has_batchnorm(zoo.cnn(1, 8, 8, [2, 2], 2)) is None


# -- first weights


def flat(module: nn.Module) -> Tensor:
    return torch.cat([p.detach().reshape(-1) for p in module.parameters()])


def drawn(secret: bytes, seed: int = 0) -> Tensor:
    module = zoo.mlp(3, [4], 2)
    torch.manual_seed(seed)
    initialise(module, secret)
    return flat(module)


def test_first_weights_come_from_the_secret_alone() -> None:
    assert torch.equal(drawn(SECRET, 0), drawn(SECRET, 1))
    state = torch.get_rng_state()
    module = network()
    before = flat(module)
    torch.set_rng_state(state)
    initialise(module, SECRET)
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(flat(module), before)


@settings(max_examples=30, deadline=None)
@given(st.binary(min_size=32, max_size=32), st.integers(0, 255))
def test_every_bit_of_the_secret_counts(secret: bytes, bit: int) -> None:
    other = (int.from_bytes(secret, "big") ^ 1 << bit).to_bytes(32, "big")
    assert torch.equal(drawn(secret), drawn(secret))
    assert not torch.equal(drawn(secret), drawn(other))


def test_the_generator_holds_the_words_of_shake() -> None:
    stream = hashlib.shake_256(SECRET).digest(2496)
    words = tuple(int.from_bytes(stream[i : i + 4], "little") for i in range(0, 2496, 4))
    twister = random.Random()
    twister.setstate((3, (*words, 624), None))  # Python's own Mersenne Twister

    class Probe(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(1300))

        def reset_parameters(self) -> None:
            with torch.no_grad():
                self.weight.copy_(torch.randint(0, 1 << 24, (1300,)))

    probe = Probe()
    initialise(probe, SECRET)
    assert probe.weight.tolist() == [twister.getrandbits(32) % (1 << 24) for _ in range(1300)]


def test_first_weights_that_cannot_be_drawn() -> None:
    with pytest.raises(UsageError, match="32 bytes, not 4"):
        initialise(nn.Linear(2, 2), b"four")
    own = Named(lambda m, x: x)
    own.scale = nn.Parameter(torch.ones(1))
    with pytest.raises(CutError, match=r"`1` \(Named\) has no reset_parameters"):
        initialise(nn.Sequential(nn.Linear(2, 2), own), SECRET)
    with pytest.raises(UsageError, match="not on the CPU"):
        initialise(nn.Sequential(nn.Linear(2, 2, device="meta")), SECRET)


# -- networks by name

MLP = "partway.model.zoo:mlp"
CNN = "partway.model.zoo:cnn"
ARGUMENTS = {"inputs": 29, "hidden": [64, 16, 128, 64], "classes": 7}


def test_the_thyroid_network_by_name() -> None:
    whole = build(MLP, ARGUMENTS, [MLP], 20_000)
    assert isinstance(whole.get_submodule("hidden.2"), nn.Linear)
    assert whole.get_parameter("hidden.2.weight").shape == (16, 64)
    assert whole(rows()).shape == (5, 7)
    image = build(CNN, {"channels": 1, "height": 9, "width": 8, "filters": [4, 6], "classes": 3}, [CNN], 1000)
    assert image(torch.randn(2, 1, 9, 8)).shape == (2, 3)


def test_names_are_compared_before_any_import(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(name: str) -> None:
        raise AssertionError(name)

    monkeypatch.setattr("importlib.import_module", never)
    for name in ("antigravity:mlp", MLP + " ", MLP.upper(), "partway.model.zoo", "os:system", ""):
        with pytest.raises(Refused) as caught:
            resolve(name, [MLP])
        assert caught.value.reasons == ("NETWORK",)
        assert caught.value.exit_code == 3
    with pytest.raises(Refused):
        resolve("mlp", MLP)  # a string is no list of names
    with pytest.raises(AssertionError, match=r"partway\.model\.zoo"):
        resolve(MLP, [MLP])


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("partway.model.zoo:mpl", "did you mean `mlp`"),
        ("partway.model.zoo:torch.os.system", "has no network"),
        ("partway.model.zoo:nn", "has no network"),
        ("partway.model.zoo:__name__", "has no network"),
        ("partway.model.zoo", "named `module:name`"),
        ("partway.no_such:mlp", "cannot be imported"),
        ("partway.errors:mlp", "has no dictionary NETWORKS"),
    ],
)
def test_allowed_names_that_are_no_networks(name: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        resolve(name, [name])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"input": 3}, "no argument `input`; did you mean `inputs`"),
        ({"inputs": 0}, "it is at least 1"),
        ({"inputs": 100_001}, "it is at most 100000"),
        ({"inputs": True}, "of type int, not True"),
        ({"inputs": 3.0}, "of type int, not 3.0"),
        ({"hidden": 3}, "is a list, not 3"),
        ({"hidden": []}, "length of .* at least 1"),
        ({"hidden": [1] * 17}, "length of .* at most 16"),
        ({"hidden": [1, 65_537]}, "number 2 of .* at most 65536"),
        ({"hidden": [[1]]}, "of type int"),
        ({"classes": 0}, "it is at least 1"),
    ],
)
def test_arguments_out_of_bounds(change: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        build(MLP, {**ARGUMENTS, **change}, [MLP], 10**6)


def test_arguments_that_are_missing_or_do_not_go_together() -> None:
    with pytest.raises(ConfigError, match="needs the argument `hidden`"):
        build(MLP, {"inputs": 3, "classes": 2}, [MLP], 10**6)
    image = {"channels": 1, "height": 8, "width": 8, "filters": [4, 6], "classes": 2, "groups": 4}
    with pytest.raises(ConfigError, match="6 filters cannot be divided into 4 groups"):
        build(CNN, image, [CNN], 10**6)


def test_too_large_a_network_is_refused_before_it_takes_memory() -> None:
    huge = {"inputs": 100_000, "hidden": [65_536] * 16, "classes": 10_000}  # 290 GB
    with pytest.raises(Refused, match="at most 1,000,000 are allowed") as caught:
        build(MLP, huge, [MLP], 10**6)
    assert caught.value.reasons == ("NETWORK_SIZE",)
    size = sum(p.numel() for p in network().parameters())
    build(MLP, ARGUMENTS, [MLP], size)
    with pytest.raises(Refused):
        build(MLP, ARGUMENTS, [MLP], size - 1)


def test_counting_draws_nothing() -> None:
    torch.manual_seed(4)
    counted = build(MLP, ARGUMENTS, [MLP], 10**6)
    torch.manual_seed(4)
    assert torch.equal(flat(counted), flat(zoo.mlp(29, [64, 16, 128, 64], 7)))


@dataclass(frozen=True)
class Own:
    rate: Annotated[float, Between(0, 1)]
    kind: Annotated[str, Between(1, 4)] = "a"
    bias: bool = True
    loose: int = 3


def test_a_hospital_s_own_networks(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Own] = []

    def make(arguments: Own) -> nn.Module:
        made.append(arguments)
        return nn.Linear(1, 1, bias=arguments.bias)

    own: Any = types.ModuleType("own_networks")
    own.NETWORKS = {"line": Recipe(make, Own), "not": make}
    monkeypatch.setitem(sys.modules, "own_networks", own)
    line, allowed = "own_networks:line", ["own_networks:line", "own_networks:not"]
    build(line, {"rate": 1, "bias": False}, allowed, 10)
    assert made[-1] == Own(1.0, "a", False)
    assert isinstance(made[-1].rate, float)
    for wrong in ({"rate": float("nan")}, {"rate": 10**400}, {"rate": 0, "bias": 1}, {"rate": 0, "kind": ""}):
        with pytest.raises(ConfigError):
            build(line, wrong, allowed, 10)
    with pytest.raises(ConfigError, match="has no bounds in its recipe"):
        build(line, {"rate": 0, "loose": 3}, allowed, 10)
    with pytest.raises(ConfigError, match="not a Recipe"):
        resolve("own_networks:not", allowed)
