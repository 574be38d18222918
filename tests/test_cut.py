"""Cutting networks that are no sequences: each kind of code that networks have, and what must be refused."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from partway.errors import CutError
from partway.model import cache
from partway.model.check import TOLERANCE, backward, tensors_of, walk
from partway.model.cut import Piece, cut
from partway.model.cuts import cuts

# -- networks, each with something that a cut can get wrong


class Residual(nn.Module):
    """Convolutions with BatchNorm, ReLU in place and a value that is read again after it was written."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm, self.act = nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(inplace=True)
        self.block, self.block_norm = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.last = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.norm(self.stem(x)))
        x = F.relu(self.block_norm(self.block(x)).add_(x), inplace=True)
        return self.last(x.mean((2, 3)))


class UNet(nn.Module):
    """What the first layer makes is used by the last; what the second makes is used twice, behind two cuts."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.down = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 8, 3, stride=2, padding=1)
        self.middle, self.up = nn.Conv2d(8, 8, 3, padding=1), nn.ConvTranspose2d(8, 4, 2, stride=2)
        self.drop, self.last = nn.Dropout2d(0.3), nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        one = self.first(x).relu()
        two = self.drop(self.down(one)).relu()
        three = self.middle(two).relu() + two
        return self.last(torch.cat([self.up(three + two), one], 1))


class Reader(nn.Module):
    """Tokens with a mask, a tied output, positions that depend on sizes alone; it gives a dictionary."""

    def __init__(self, tied: bool = True) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(11, 8), nn.Embedding(16, 8)
        self.attend = nn.MultiheadAttention(8, 2, dropout=0.1, batch_first=True)
        self.norm, self.feed = nn.LayerNorm(8), nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))
        self.out = nn.Linear(8, 11, bias=False)
        if tied:
            self.out.weight = self.tokens.weight

    def forward(self, ids: Tensor, *, mask: Tensor | None = None, scale: float = 1.0) -> dict[str, Tensor]:
        x = self.tokens(ids) * scale + self.places(torch.arange(ids.shape[1], device=ids.device))
        away = None if mask is None else mask == 0
        y, _ = self.attend(x, x, x, key_padding_mask=away, need_weights=False)
        x = self.norm(x + y)
        x = x + self.feed(x)
        return {"scores": self.out(x), "pooled": x.mean(1)}


class Table(nn.Module):
    """Categories and numbers; the numbers are used again at the end, and an auxiliary answer is given."""

    def __init__(self) -> None:
        super().__init__()
        self.categories = nn.ModuleList([nn.Embedding(n, 3) for n in (4, 6)])
        self.numbers, self.hidden = nn.Linear(5, 6), nn.Linear(12, 8)
        self.out, self.aside = nn.Linear(8 + 6, 2), nn.Linear(6, 1)

    def forward(self, categories: Tensor, numbers: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        n = self.numbers(numbers).tanh()
        each = [module(categories[:, i]) for i, module in enumerate(self.categories)]
        h = F.dropout(F.silu(self.hidden(torch.cat([*each, n], 1))), 0.2, self.training)
        return self.out(torch.cat([h, n], 1)) * weight[:, None], self.aside(n)


class Series(nn.Module):
    """A signal through a convolution and a recurrent layer."""

    def __init__(self, kind: Callable[..., nn.Module] = nn.LSTM) -> None:
        super().__init__()
        self.stem = nn.Conv1d(2, 6, 5, stride=2)
        self.memory = kind(6, 5, num_layers=2, batch_first=True, bidirectional=True, dropout=0.1)
        self.last = nn.Linear(10, 2)

    def forward(self, x: Tensor) -> Tensor:
        h, _ = self.memory(self.stem(x).relu().transpose(1, 2))
        return self.last(h[:, -1] + h.mean(1))


class Block(nn.Module):
    """Whole paths are dropped in training, by record; random numbers, constants and a part without gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.last = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 2)
        self.register_buffer("offset", torch.ones(6), persistent=False)
        self.register_buffer("unused", torch.zeros(3))

    def path(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        keep = x.new_empty(len(x), 1).bernoulli_(0.7)
        return x * keep / 0.7

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x) + self.offset
        with torch.no_grad():
            scale = x.abs().amax(1, keepdim=True)
        x = x / (scale + torch.tensor([1.0, 2.0]).sum())
        x = x + self.path(self.b(x).relu())
        if self.training:
            x = x + 0.01 * torch.randn_like(x)
        return self.last(x)


class Twice(nn.Module):
    """One module is called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.block, self.last = nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4), nn.Tanh()), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.block(self.block(self.first(x))))


class Cache:
    """What a language model gives beside its scores, to go on from."""


class Decoder(nn.Module):
    """Angles of positions, which have no row for each record, go to all layers; and a parameter is used by nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.spare, self.last = nn.Embedding(11, 8), nn.Parameter(torch.ones(3)), nn.Linear(8, 11)
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))
        self.register_buffer("speeds", torch.rand(8), persistent=False)

    def forward(self, ids: Tensor) -> Any:
        turned = (torch.arange(ids.shape[1])[:, None] * self.speeds).cos()
        x = self.tokens(ids)
        for layer in self.layers:
            x = x + layer(x * turned).tanh()
        return {"scores": self.last(x), "cache": Cache()}


def example(seed: int, *shape: int, below: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, below, shape, generator=generator) if below else torch.randn(*shape, generator=generator)


MASK = (torch.arange(7) < torch.tensor([[7], [5], [3], [6], [2]])).long()
CASES: dict[str, tuple[Callable[[], nn.Module], Any, dict[str, Any], list[str], dict[str, Any]]] = {
    "residual": (Residual, example(1, 5, 1, 6, 6), {}, ["norm", "block_norm"], {}),
    "before_a_write": (Residual, example(1, 5, 1, 6, 6), {}, ["stem", "block"], {}),
    "unet": (UNet, example(2, 5, 1, 8, 8), {}, ["down", "middle"], {}),
    "unet_around": (UNet, example(2, 5, 1, 8, 8), {}, ["first", "up"], {"together": [[0, 2]]}),
    "reader": (
        Reader,
        example(3, 5, 7, below=11),
        {"mask": MASK, "scale": 2.0},
        ["tokens", "feed"],
        {"together": [[0, 2]], "may_cross": ["mask"]},
    ),
    "table": (
        Table,
        (example(4, 5, 2, below=4), example(5, 5, 5), example(6, 5).abs()),
        {},
        ["numbers", "hidden"],
        {"together": [[0, 2]], "may_cross": ["categories"]},
    ),
    "lstm": (Series, example(7, 5, 2, 90), {}, ["stem", "memory"], {}),
    "gru": (lambda: Series(nn.GRU), example(7, 5, 2, 90), {}, ["stem", "memory"], {}),
    "block": (Block, example(8, 5, 6), {}, ["a", "b"], {}),
    "twice": (Twice, example(9, 5, 4), {}, ["first", "block#1"], {}),
    "decoder": (Decoder, example(10, 5, 7, below=11), {}, ["tokens", "layers.1"], {}),
}
cases = pytest.mark.parametrize("name", CASES)


def pieces_of(name: str) -> tuple[nn.Module, tuple[Any, ...], Any, dict[str, Any], dict[str, Any]]:
    make, inputs, kwargs, after, more = CASES[name]
    torch.manual_seed(0)
    network = make()
    return network, cut(network, inputs, after, kwargs=kwargs, **more), inputs, kwargs, more


def named(pieces: Sequence[Any], inputs: Any, kwargs: Mapping[str, Any], rows: int) -> dict[str, Tensor]:
    """The network's tensors by the names that the pieces have for them."""
    tensors = [
        t for t in (*(inputs if isinstance(inputs, tuple) else (inputs,)), *kwargs.values()) if torch.is_tensor(t)
    ]
    made = {name for piece in pieces for name in piece.outputs}
    raw = dict.fromkeys(name for piece in pieces for name in piece.inputs if name not in made)
    order = [n for n in ("ids", "categories", "numbers", "weight", "x", "mask") if n in raw]
    return {name: t[:rows].clone() for name, t in zip(order, tensors, strict=True)}


def called(network: nn.Module, inputs: Any, kwargs: Mapping[str, Any], rows: int) -> list[Tensor]:
    args = [t[:rows] for t in (inputs if isinstance(inputs, tuple) else (inputs,))]
    return tensors_of(network(*args, **{k: v[:rows] if torch.is_tensor(v) else v for k, v in kwargs.items()}))


# -- equal


@cases
@pytest.mark.parametrize("optimizer", ["momentum", "adamw"])
def test_pieces_train_as_the_network_does(name: str, optimizer: str) -> None:
    """Bit for bit, an optimiser a party: outputs, weights and buffers, with two numbers of records."""
    network, pieces, inputs, kwargs, more = pieces_of(name)
    whole = copy.deepcopy(network)  # the pieces have the network's own weights
    make = {
        "momentum": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9),
        "adamw": lambda p: torch.optim.AdamW(p, lr=0.01),
    }[optimizer]
    mine = make(list(whole.parameters()))
    groups = more.get("together", []) + [[n] for n in range(3) if n not in itertools.chain(*more.get("together", []))]
    owned = [{id(p): p for n in group for p in pieces[n].parameters()} for group in groups]
    parties = [make(list(own.values())) for own in owned if own]
    for step in range(6):
        rows = 5 if step % 2 else 3
        for each in (mine, *parties):
            each.zero_grad()
        torch.manual_seed(step)
        expected = called(whole.train(), inputs, kwargs, rows)
        weights = [torch.full_like(t, 1 / t.numel()) for t in expected]
        backward([t.square() for t in expected], weights)
        torch.manual_seed(step)
        for piece in pieces:
            piece.train()
        gradients = [2 * w * t.detach() for w, t in zip(weights, expected, strict=True)]
        found = walk(pieces, named(pieces, inputs, kwargs, rows), rows, True, weights=gradients)
        assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))
        for each in (mine, *parties):
            each.step()
    state = whole.state_dict()
    assert {key for piece in pieces for key in piece.state_dict()} == state.keys()
    for piece in pieces:
        for key, tensor in piece.state_dict().items():
            assert torch.equal(state[key], tensor), key
    whole.eval()
    for piece in pieces:
        piece.eval()
    found = walk(pieces, named(pieces, inputs, kwargs, 4), 4, False)
    assert all(torch.equal(a, b) for a, b in zip(called(whole, inputs, kwargs, 4), found, strict=True))


@settings(max_examples=20, deadline=None)
@given(st.data())
def test_any_graph_of_layers_is_cut_right(data: st.DataObject) -> None:
    """Layers that read any of the values before them: `cut` checks the numbers itself."""
    count = data.draw(st.integers(3, 6))
    reads = [data.draw(st.sets(st.integers(0, n), min_size=1, max_size=3), label=f"read by {n}") for n in range(count)]
    reads[0] = {0}

    class Graph(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([nn.Linear(3, 3) for _ in range(count)])

        def forward(self, x: Tensor) -> Tensor:
            values = [x]
            for layer, read in zip(self.layers, reads, strict=True):
                values.append(layer(torch.stack([values[n] for n in sorted(read)]).sum(0)).tanh())
            return torch.stack(values[1:]).sum(0)

    after = sorted(data.draw(st.sets(st.integers(0, count - 2), min_size=1, max_size=2)))
    pieces = cut(Graph(), example(1, 5, 3), [f"layers.{n}" for n in after], may_cross=["x"])
    assert len(pieces) == len(after) + 1


def test_half_precision_is_that_of_the_network() -> None:
    """What comes in is no leaf for autocast, which would keep one cast of it and add up its uses' gradients in half."""
    network, pieces, inputs, kwargs, _ = pieces_of("reader")
    whole = copy.deepcopy(network)
    with torch.autocast("cpu", torch.bfloat16):
        torch.manual_seed(0)
        expected = called(whole.train(), inputs, kwargs, 5)
        backward(expected, [torch.ones_like(t) for t in expected])
        torch.manual_seed(0)
        for piece in pieces:
            piece.train()
        weights = [torch.ones_like(t) for t in expected]
        found = walk(pieces, named(pieces, inputs, kwargs, 5), 5, True, weights=weights)
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))
    gradients = {name: p.grad for piece in pieces for name, p in piece.named_parameters()}
    assert all(torch.equal(p.grad, gradients[name]) for name, p in whole.named_parameters())


def test_a_frozen_bottom_gets_no_gradient() -> None:
    network = Residual()
    for name, p in network.named_parameters():
        p.requires_grad_(name.startswith(("block", "last")))
    bottom, trunk = cut(network, example(1, 5, 1, 6, 6), ["act"])
    made = bottom(example(1, 5, 1, 6, 6))
    assert not made.requires_grad
    assert trunk(made).requires_grad


def test_what_the_user_has_is_left_alone() -> None:
    for name in ("residual", "block", "reader"):
        make, inputs, kwargs, after, more = CASES[name]
        network = make()
        network.register_module("spare", nn.Dropout())
        network.eval()
        before = {k: t.clone() for k, t in network.state_dict().items()}
        keys, random = set(vars(network)), torch.get_rng_state()
        kept = [t.clone() for t in (inputs if isinstance(inputs, tuple) else (inputs,))]
        pieces = cut(network, inputs, after, kwargs=kwargs, **more)
        assert not network.training
        assert not any(m.training for m in network.modules())
        assert all(torch.equal(before[k], t) for k, t in network.state_dict().items())
        assert set(vars(network)) == keys
        assert torch.equal(torch.get_rng_state(), random)
        assert all(
            torch.equal(a, b) for a, b in zip(kept, inputs if isinstance(inputs, tuple) else (inputs,), strict=True)
        )
        assert all(p.grad is None for p in network.parameters())
        own = {id(p) for piece in pieces for p in piece.parameters()}
        assert own == {id(p) for p in network.parameters()}  # the pieces share them


def test_parameters_keep_their_names_and_order() -> None:
    network, pieces, *_ = pieces_of("reader")
    names = [name for name, _ in network.named_parameters()]
    for piece in pieces:
        own = [name for name, _ in piece.named_parameters()]
        assert own == [name for name in names if name in own]
    assert "tokens.weight" in pieces[0].state_dict()
    assert "out.weight" in pieces[2].state_dict()
    assert pieces[0].get_parameter("tokens.weight") is pieces[2].get_parameter("out.weight")


# -- refused


def refused(words: str, network: nn.Module, inputs: Any, after: list[str], **more: Any) -> None:
    with pytest.raises(CutError, match=words):
        cut(network, inputs, after, **more)


def test_places_that_are_none() -> None:
    x = example(1, 5, 1, 6, 6)
    refused("no operator runs in `blok`; nearest are `block`", Residual(), x, ["blok"])
    refused("nothing comes after `last`", Residual(), x, ["last"])
    refused("`block` and `norm` are not in the network's order", Residual(), x, ["block", "norm"])
    refused("runs 2 times: say `block#0`, `block#1`", Twice(), example(9, 5, 4), ["block"])
    refused("together names piece 2", Residual(), x, ["norm"], together=[[0, 2]])
    refused("may_cross names `y`, and the inputs are x$", Residual(), x, ["norm"], may_cross=["y"])


def test_a_tensor_that_two_parties_would_train() -> None:
    ids = example(3, 5, 7, below=11)
    refused(
        "`tokens.weight` and `out.weight` are one tensor.*together.*nearest legal cut is after `out`",
        Reader(),
        ids,
        ["feed"],
    )
    cut(Reader(tied=False), ids, ["feed"])
    words = "`block.0.weight` is one tensor that is used more than once.*; the nearest legal cut is after `first`"
    refused(words, Twice(), example(9, 5, 4), ["block#0"])
    cut(Twice(), example(9, 5, 4), ["block#0"], together=[[0, 1]])
    network = Twice()
    for p in network.block.parameters():  # nobody trains it, so each may have a copy
        p.requires_grad_(False)
    cut(network, example(9, 5, 4), ["block#0"])


def test_what_no_weight_was_applied_to_stays() -> None:
    class Passes(nn.Module):
        def __init__(self, how: Callable[[Tensor], Tensor]) -> None:
            super().__init__()
            self.first, self.last, self.how = nn.Linear(4, 4), nn.Linear(4, 2), how

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.first(x) + self.how(x))

    x = example(1, 5, 4)
    words = r"(`x`, an input,|a value made of `x` without any weight).*would reach another party.*may_cross = \['x'\]"
    for how in (
        lambda x: x,
        lambda x: x.view(-1, 4),
        lambda x: (x - 3).sign(),
        lambda x: x.flip(1).double().float(),
    ):
        refused(words, Passes(how), x, ["first"])
        cut(Passes(how), x, ["first"], may_cross=["x"])
    ids = example(3, 5, 7, below=11)
    refused("`mask`, an input, would reach", Reader(tied=False), ids, ["tokens"], kwargs={"mask": MASK})
    cut(Reader(tied=False), ids, ["tokens"], kwargs={"mask": MASK}, may_cross=["mask"])


def test_a_write_that_would_be_lost() -> None:
    class Writes(nn.Module):
        def __init__(self, live: bool) -> None:
            super().__init__()
            self.first, self.second, self.last, self.live = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2), live

        def forward(self, x: Tensor) -> Tensor:
            h = self.first(x) * 1
            view = h.view(-1, 4) if self.live else h.clone()
            y = self.second(h.clone())
            h.add_(y)
            return self.last(view + h)

    x = example(1, 5, 4)
    refused("writes in place .* what shares its memory is read elsewhere too", Writes(True), x, ["second"])
    cut(Writes(False), x, ["second"])


def test_what_is_made_of_fixed_buffers_is_made_where_it_is_needed() -> None:
    network, pieces, *_ = pieces_of("decoder")
    assert [len(piece.inputs) for piece in pieces] == [1, 1, 2]  # the residual and the layer, and no angles
    network.speeds = nn.Parameter(network.speeds)
    refused("what .* makes .* does not have one row for each record", network, CASES["decoder"][1], ["layers.1"])


def test_what_has_no_row_for_each_record() -> None:
    class Time(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(4, 4), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.first(x.transpose(0, 1)).mean(0))

    words = "what `first` makes .* does not have one row for each record; .*the nearest legal|no legal cut"
    refused(words, Time(), example(1, 5, 6, 4), ["first"])


def test_code_that_hangs_on_values_is_named_and_what_works_is_offered() -> None:
    class Hangs(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            if x.sum() > 0:
                return x * 2
            return x

    class Chain(nn.Module):
        def __init__(self, skip: bool) -> None:
            super().__init__()
            self.first, self.hangs, self.last, self.skip = nn.Linear(4, 4), Hangs(), nn.Linear(4, 2), skip

        def forward(self, x: Tensor) -> Tensor:
            y = self.hangs(self.first(x))
            return self.last(y + x if self.skip else y)

    x = example(1, 5, 4)
    words = (
        r"the code of Chain cannot be captured: .*hangs on a tensor's values at test_cut.py:\d+, `if x.sum\(\) > 0:`"
    )
    refused(words, Chain(skip=True), x, ["first"])
    _, trunk = cut(Chain(skip=False), x, ["first"])
    assert list(trunk.state_dict()) == ["last.weight", "last.bias"]


def test_a_network_that_fails_the_numbers_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(TOLERANCE, torch.float32, -1.0)
    refused(
        "the pieces are not the network: the output differs by 0 in training",
        Residual(),
        example(1, 5, 1, 6, 6),
        ["norm"],
    )


def test_a_piece_says_what_it_takes() -> None:
    _, (bottom, _trunk, _), *_ = pieces_of("residual")
    assert isinstance(bottom, Piece)
    assert bottom.mixes == "norm"
    assert not bottom.draws
    for wrong, words in (
        ((), "takes x, and not 0 values"),
        ((torch.zeros(2, 2, 6, 6),), r"`x` has the shape \(2, 2, 6, 6\), where .* x 1 x 6 x 6 is asked for"),
        ((torch.zeros(2, 1, 6, 6, dtype=torch.int64),), "`x` is float32, not int64"),
        ((3,), "`x` is a tensor, not int"),
    ):
        with pytest.raises(CutError, match=words):
            bottom(*wrong)
    assert pieces_of("unet")[1][1].draws


# -- where, and what it costs


def test_every_place_and_its_cost() -> None:
    places = {place.after: place for place in cuts(UNet(), example(2, 5, 1, 8, 8))}
    assert list(places) == ["first", "down", "drop", "middle", "up"]
    assert [p.used_by for p in places.values()] == [(1,), (2, 5), (3,), (4,), (5,)]  # relu stands before the next place
    down = places["down"]
    assert [(c.name, c.shape, c.gradient) for c in down.crosses] == [
        ("network", (4, 8, 8), True),
        ("down", (8, 4, 4), True),
    ]
    assert down.bytes_up == down.bytes_down == 4 * (256 + 128)
    assert down.ratio == 384 / 64
    first, second = 2 * 64 * 4 * 9, 2 * 16 * 8 * 4 * 9
    assert down.before.forward == first + second
    assert down.before.backward == first + 2 * second  # nothing before the first layer wants a gradient
    network = UNet()
    assert down.before.parameters + down.behind.parameters == sum(p.numel() for p in network.parameters())
    assert not any(place.why_not for place in places.values())


def test_illegal_places_say_why() -> None:
    places = {p.after: p.why_not for p in cuts(Reader(), example(3, 5, 7, below=11), {"mask": MASK})}
    assert "are one tensor" in places["feed"]
    assert "an input, would reach" in places["tokens"]
    assert [place for place, why in places.items() if not why] == ["out"]
    places = {p.after: p.why_not for p in cuts(Twice(), example(9, 5, 4))}
    assert [place for place, why in places.items() if not why] == ["first", "block.0#1", "block#1"]
    assert "used more than once" in places["block#0"]


# -- programs kept in files


def test_a_program_is_kept_and_made_again_when_anything_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Scaled(nn.Module):
        def __init__(self, by: float, kind: str = "relu") -> None:
            super().__init__()
            self.first, self.last, self.by, self.kind = nn.Linear(4, 4), nn.Linear(4, 2), by, {"name": kind}

        def forward(self, x: Tensor) -> Tensor:
            return self.last(getattr(F, self.kind["name"])(self.first(x)) * self.by * GLOBAL[0])

    monkeypatch.setenv("PARTWAY_CACHE", str(tmp_path))
    made: list[int] = []
    real = cache.capture
    monkeypatch.setattr(cache, "capture", lambda *args: made.append(1) or real(*args))
    x = example(1, 5, 4)

    def times(network: nn.Module) -> int:
        made.clear()
        bottom, trunk = cut(network, x, ["first"])
        assert torch.equal(trunk(bottom(x)), network(x))
        return len(made)

    assert [times(Scaled(2)), times(Scaled(2)), times(Scaled(3)), times(Scaled(2, "silu"))] == [1, 0, 1, 1]
    monkeypatch.setitem(GLOBAL, 0, 5.0)  # nothing told the content of it, and the numbers find it
    assert [times(Scaled(2)), times(Scaled(2))] == [1, 0]
    for file in tmp_path.glob("*.safetensors"):
        file.write_bytes(file.read_bytes()[:50])
    assert times(Scaled(2)) == 1
    monkeypatch.setenv("PARTWAY_CACHE", str(tmp_path / "no" / "folder"))
    (tmp_path / "no").touch()
    assert times(Scaled(2)) == 1


GLOBAL = {0: 1.0}
