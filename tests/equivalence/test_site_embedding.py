"""`private` with `personal = "embedding"`: a vector of each site in the trunk, over bottoms that stay shared."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from federations import SITES, job_of, records_of, same_bits_in_any_order, small
from partway.config import Job
from partway.data.records import Records
from partway.errors import CutError
from partway.plan.plan import Copy, Turn
from partway.protocol.messages import LetterKind
from partway.simulation import Federation, federation, together
from partway.train import metrics
from partway.train.stopping import value
from plain import OPTIMIZERS, Everything, far, made

configurations = pytest.mark.parametrize("configuration", ["vanilla", "u_shaped"])
HIDDEN = {"inputs": 6, "hidden": [8, 16, 12], "classes": 3}
NETWORKS: dict[str, dict[str, Any]] = {
    "vanilla": {"arguments": HIDDEN, "cut": ["hidden.1"]},
    "u_shaped": {"arguments": HIDDEN, "cut": ["hidden.1", "hidden.4"]},
    "dropout": {"build": "dropout_network:dropout", "arguments": {}, "cut": ["one"]},
}


def embedding(terms: dict[str, Any], sections: Any = None, network: str = "vanilla", **training: Any) -> Job:
    private = {"shared_epochs": 2, "gate": False, "personal": "embedding", **terms}
    words = {"network": NETWORKS[network], **(sections or {})}
    return job_of(words, schedule="private", private=private, **training)


def of_their_own(site: str) -> Records:
    """At `b` the rarest class is the most frequent one; at `e` there is one class in training, all in validation."""
    records = records_of(site, {"a": 90, "b": 60, "c": 1, "d": 9, "e": 40}[site])
    labels = records.labels.clone()
    if site == "b":
        labels[records.features[:, 2] > -0.5] = 0
    if site == "e":
        labels[records.division["train"]] = 2
    return Records(records.features, labels, classes=3, numeric=(), division=records.division)


def ran(job: Job) -> Federation:
    whole = federation(job, {site: of_their_own(site) for site in SITES})
    whole.run()
    return whole


class Vectors(nn.Module):
    """One site's vector."""

    def __init__(self, like: Tensor) -> None:
        super().__init__()
        self.vector = nn.Parameter(torch.zeros(like.shape[1]))


Pieces = dict[str, nn.Module]


def loop(whole: Federation, without: int) -> tuple[Pieces, Pieces, dict[str, Any]]:
    """One network on union batches; after so many epochs each site's rows get its vector behind the stem.

    Returns the pieces, the vectors, and the pieces' weights after the epochs without vectors.
    """
    everything = Everything(whole)
    names = [n for n in ("bottom", "stem", "trunk", "head") if n in whole.parties["a"].network.modules]
    pieces = {n: everything.first(n, "server" if n in ("stem", "trunk") else "a") for n in names}
    x, _ = everything.rows("a", "train", 0)
    vectors: Pieces = {site: Vectors(pieces["stem"](pieces["bottom"](x))) for site in SITES}
    for vector in vectors.values():
        vector.double()
    main, own = made(whole, *pieces.values()), {site: made(whole, vector) for site, vector in vectors.items()}
    before: dict[str, Any] = {}
    for at, turn in everything.steps():
        if turn.epoch == without and not before:
            before = {n: {k: t.clone() for k, t in piece.state_dict().items()} for n, piece in pieces.items()}
        live = [site for site in SITES if turn.rows[0][site]]
        for optimizer in (main, *own.values()):
            optimizer.zero_grad()
        loss_of(everything, pieces, vectors, at, turn, live).backward()
        main.step()
        for site in live if turn.epoch >= without else ():
            own[site].step()
    return pieces, vectors, before


def loss_of(everything: Everything, pieces: Pieces, vectors: Pieces, at: int, turn: Turn, live: list[str]) -> Tensor:
    """The mean loss of a union batch."""
    batch, bottoms = {site: everything.part(site, turn) for site in live}, []
    for site in live:
        everything.seed(site, at, Copy("bottom", site))
        bottoms.append(pieces["bottom"](batch[site][0]))
    h = pieces["stem"](torch.cat(bottoms))
    added = torch.cat([vectors[site].vector.expand(len(batch[site][1]), -1) for site in live])
    everything.seed("server", at, Copy("trunk"))
    output = pieces["trunk"](h + added.view(*added.shape, *(1,) * (h.dim() - 2)))
    output = pieces["head"](output) if "head" in pieces else output
    return nn.functional.cross_entropy(output, torch.cat([batch[site][1] for site in live]))


def copies(pieces: Pieces, vectors: Pieces) -> dict[Copy, nn.Module]:
    found = {Copy(n, site): pieces[n] for site in SITES for n in pieces if n in ("bottom", "head")}
    found |= {Copy(n): pieces[n] for n in pieces if n in ("stem", "trunk")}
    return found | {Copy("embedding", site): vectors[site] for site in SITES}


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_equals_one_network_with_a_vector_for_each_site(network: str, optimizer: str) -> None:
    whole = ran(embedding({}, network=network, optimizer=OPTIMIZERS[optimizer], epochs=5))
    pieces, vectors, _ = loop(whole, 2)
    assert far(whole, copies(pieces, vectors)) < 1e-10
    assert min(float(vectors[site].vector.detach().abs().max()) for site in "abe") > 1e-4
    none, zeros, _ = loop(whole, 99)
    assert far(whole, copies(none, zeros)) > 1e-3
    sooner, theirs, _ = loop(whole, 0)
    assert far(whole, copies(sooner, theirs)) > 1e-3


def images(site: str) -> Records:
    records = of_their_own(site)
    generator = torch.Generator().manual_seed(ord(site))
    x = torch.randn(len(records.labels), 2, 6, 6, generator=generator, dtype=torch.float64)
    x[:, 0] += records.features[:, :1, None]
    return Records(x, records.labels, classes=3, numeric=(), division=records.division)


CNN = {
    "build": "partway.model.zoo:cnn",
    "arguments": {"channels": 2, "height": 6, "width": 6, "filters": [4, 3], "classes": 3},
    "cut": ["features.2"],
}


def test_of_a_convolution_one_number_a_channel() -> None:
    job = embedding({}, {"network": CNN}, optimizer=OPTIMIZERS["adam"], epochs=2)
    whole = federation(job, {site: images(site) for site in SITES})
    whole.run()
    pieces, vectors, _ = loop(whole, 2)
    assert vectors["a"].vector.shape == (3,)
    assert far(whole, copies(pieces, vectors)) < 1e-10
    assert far(whole, copies(*loop(whole, 99)[:2])) > 1e-3


def score(whole: Federation, network: nn.Module, site: str, part: str) -> metrics.Scores:
    x, y = Everything(whole).rows(site, part, 0)
    with torch.no_grad():
        return metrics.scores(network.eval()(x), y)


@configurations
def test_each_site_keeps_its_vector_only_where_it_gains_and_has_an_ordinary_network(configuration: str) -> None:
    sections = {"evaluation": {"site_scores": True}, "result": {"trunk": "everyone"}}
    terms = {"shared_epochs": 6, "gate": True}
    training = {"network": configuration, "optimizer": {"name": "adam", "lr": 0.05}, "epochs": 10, "batch": 32}
    whole = ran(embedding(terms, sections, configuration=configuration, **training))
    pieces, vectors, before = loop(whole, 6)
    result, whole_network = together(whole, 0), whole.parties["a"].network.whole
    state = {k: t for weights in before.values() for k, t in weights.items()}
    last = {k: t.detach().clone() for piece in pieces.values() for k, t in piece.state_dict().items()}
    *_, bias = pieces["stem"].state_dict()
    for site in SITES:
        own = {**last, bias: last[bias] + vectors[site].vector.detach()}
        values = []
        for weights in (own, state):
            whole_network.load_state_dict(weights)
            values.append(value(score(whole, whole_network, site, "validation")))
        assert result.chosen[site] == ("own" if values[0] > values[1] else "shared")
        chosen = own if values[0] > values[1] else state
        left = {
            n.removeprefix(f"sites.{site}."): t for n, t in result.weights.items() if n.startswith(f"sites.{site}.")
        }
        assert left.keys() == chosen.keys()
        assert max(float((left[n] - chosen[n]).abs().max()) for n in chosen) < 1e-10
        whole_network.load_state_dict(left)
        assert result.sites[site]["accuracy"] == pytest.approx(score(whole, whole_network, site, "test").accuracy)
    assert result.chosen["e"] == "shared"
    assert "own" in result.chosen.values()
    assert {f"embedding.{site}.vector" for site in SITES} <= result.weights.keys()
    assert {f"shared.{bias}"} <= result.weights.keys()


def test_no_vector_crosses_but_to_its_own_site_and_bottoms_stay_equal() -> None:
    whole = ran(embedding({"gate": True, "shared_epochs": 1}, {"result": {"trunk": "everyone"}}))
    crossed = {
        (post.source.lane, route.receiver)
        for net in whole.parties["a"].party.session.nets
        for post, route in net.letters.items()
        if post.source.segment.startswith("embedding")
    }
    assert crossed == {(site, site) for site in SITES}
    summed = {
        post.source.segment
        for net in whole.parties["a"].party.session.nets
        for post, route in net.letters.items()
        if post.kind is LetterKind.SHARE
    }
    assert "bottom" in summed
    assert "embedding" not in summed


def test_a_site_without_rows_in_a_step_does_not_step() -> None:
    """Adam would go on by its averages."""
    whole = ran(embedding({}, optimizer=OPTIMIZERS["adam"], epochs=5))
    worker = whole.parties["server"].party.worker
    steps = {
        unit.lane: int(next(iter(made.state.values()))["step"])
        for (_, unit, names), made in worker._optimizers.items()
        if names == ("embedding",)
    }
    assert steps["c"] == 5
    assert steps["a"] > steps["d"] > 5


def test_a_trunk_that_ends_with_its_first_dense_layer_has_no_place_for_vectors() -> None:
    with pytest.raises(CutError, match="no dense layer with a bias has another module behind it"):
        ran(embedding({}, {"network": {"arguments": HIDDEN, "cut": ["hidden.5"]}}))


@configurations
def test_the_bits_do_not_depend_on_delivery(configuration: str) -> None:
    sections = {"evaluation": {"every": 1, "site_scores": True}, "result": {"trunk": "everyone"}}
    jobs = [
        embedding({"gate": True, "shared_epochs": n}, sections, configuration, configuration=configuration)
        for n in (1, 2)
    ]
    same_bits_in_any_order(lambda: small(jobs[0]), 4, small(jobs[1]))
