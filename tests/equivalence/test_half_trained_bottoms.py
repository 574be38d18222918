"""`half_trained` without averaging: the largest site's bottom for everybody, or every site's side by side."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from torch import nn

from federations import SITES, SIZES, job_of, records_of, same_bits_in_any_order, small
from partway.assembly import forecast_of
from partway.config import Job, read_job
from partway.data import thyroid
from partway.data.records import Records
from partway.errors import ConfigError, PeerError, Refused
from partway.finished import load
from partway.outcome import result_of
from partway.plan.batches import equal_parts
from partway.plan.plan import Copy
from partway.protocol.messages import LetterKind
from partway.simulation import Federation, federation, permissive, together
from partway.train import metrics
from plain import OPTIMIZERS, Everything, far, made

SIZES_B = {"a": 25, "b": 40, "c": 1, "d": 9, "e": 14}
"""The largest is not the first."""
HALF: dict[str, Any] = {"rounds": 2, "local_epochs": 3, "batch": 8}


def half(half_trained: dict[str, Any], sections: Any = None, **training: Any) -> Job:
    return job_of(sections, schedule="half_trained", half_trained={**HALF, **half_trained}, **training)


def ran(job: Job, sizes: dict[str, int] = SIZES_B) -> Federation:
    whole = small(job, sizes)
    whole.run()
    return whole


def train(everything: Everything, network: nn.Module, optimizer: torch.optim.Optimizer, x: Any, y: Any) -> None:
    """One step on the mean loss of a batch."""
    optimizer.zero_grad()
    nn.functional.cross_entropy(network(x), y).backward()
    optimizer.step()


def at_the_server(everything: Everything, trunk: nn.Module, x: torch.Tensor, y: torch.Tensor, start: int) -> None:
    """The trunk on what was released, in the server's order."""
    training = everything.whole.job.training
    optimizer = made(everything.whole, trunk)
    for epoch in range(start, start + training.epochs):
        order = everything.order("server", len(y), epoch)
        for begin, end in equal_parts(len(y), training.batch):
            train(everything, trunk, optimizer, x[order[begin:end]], y[order[begin:end]])


def of_one_site(whole: Federation, site: str) -> dict[Copy, nn.Module]:
    """That site's bottom and local head, then the trunk on what this bottom makes of everybody's records."""
    everything, terms = Everything(whole), whole.job.training.half_trained
    bottom, head = everything.first("bottom", site), everything.first("local_head", site)
    optimizer, epochs = made(whole, bottom, head, local=True), terms.rounds * terms.local_epochs
    for epoch in range(epochs):
        x, y = everything.rows(site, "train", epoch)
        for begin, end in equal_parts(len(y), terms.batch):
            train(everything, nn.Sequential(bottom, head), optimizer, x[begin:end], y[begin:end])
    trunk = everything.first("trunk", "server")
    with torch.no_grad():
        released = [everything.rows(s, "train", epochs) for s in SITES]
        x, y = torch.cat([bottom(x) for x, _ in released]), torch.cat([y for _, y in released])
    at_the_server(everything, trunk, x, y, epochs)
    return {**{Copy("bottom", s): bottom for s in SITES}, Copy("local_head", site): head, Copy("trunk"): trunk}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("local_head", ["linear", "hidden"])
def test_the_largest_site_s_bottom_for_everybody(optimizer: str, local_head: str) -> None:
    terms = {"bottoms": "largest", "local_head": local_head, "optimizer": OPTIMIZERS[optimizer]}
    whole = ran(half(terms, epochs=4, optimizer=OPTIMIZERS[optimizer]))
    assert far(whole, of_one_site(whole, "b")) < 1e-10
    assert far(whole, {c: m for c, m in of_one_site(whole, "a").items() if c.segment == "trunk"}) > 1e-4
    averaged = ran(half({**terms, "bottoms": "averaged"}, epochs=4, optimizer=OPTIMIZERS[optimizer]))
    assert far(averaged, {Copy("bottom", "a"): of_one_site(whole, "b")[Copy("bottom", "a")]}) > 1e-3


def test_nothing_is_computed_at_the_others_and_one_sealed_hand_over_a_site_crosses() -> None:
    whole = ran(half({"bottoms": "largest"}))
    session = whole.parties["b"].party.session
    assert {lane for turn in session.turns if turn.flow == "local" for rows in turn.rows for lane in rows} == {"b"}
    assert not any(what != "tally" for turn in session.turns for what, _ in turn.sums)
    given = [
        (route.sender, route.receiver)
        for net in session.nets
        for post, route in net.letters.items()
        if post.kind is LetterKind.STATE and post.target.segment == "bottom"
    ]
    assert given == [("b", site) for site in "acde"]
    assert all(whole.parties["b"].party.worker.shapes.sealed(*pair) for pair in given)
    flops = {site: cost.party.cost.flops for site, cost in whole.parties.items()}
    assert flops["b"] > 5 * flops["a"]


def test_a_policy_asks_for_enough_records_behind_a_hand_over() -> None:
    def run(least: int, sizes: dict[str, int], **half_trained: Any) -> None:
        policy = msgspec.structs.replace(permissive("partway.model.zoo:mlp"), least_records_in_hand_over=least)
        small(half(half_trained), sizes, policies={"b": policy}).run()

    run(40, SIZES_B, bottoms="largest")
    with pytest.raises(Refused, match=r"b would hand a weights that only 40 of its records.*in_hand_over is 41"):
        run(41, SIZES_B, bottoms="largest")
    run(41, SIZES_B, bottoms="averaged")


def test_the_bits_do_not_depend_on_delivery() -> None:
    sections = {"evaluation": {"every": 1, "site_scores": True}, "result": {"bottom": "everyone", "trunk": "everyone"}}
    more: dict[str, Any] = {"bottoms": "largest", "synchronous_epochs": 1}
    job, other = half(more, sections), half({**more, "batch": 9}, sections)
    same_bits_in_any_order(lambda: small(job), 4, small(other))


# -- all bottoms side by side


def side_by_side(whole: Federation, epochs: int | None = None) -> tuple[dict[str, nn.Module], nn.Module]:
    """A bottom a site, each trained there alone; then a wide trunk on what all of them make of everybody's records."""
    everything, terms, bottoms = Everything(whole), whole.job.training.half_trained, {}
    epochs = terms.rounds * terms.local_epochs if epochs is None else epochs
    for site in SITES:
        bottoms[site], head = everything.first("bottom", site), everything.first("local_head", site)
        optimizer = made(whole, bottoms[site], head, local=True)
        for epoch in range(epochs):
            x, y = everything.rows(site, "train", epoch)
            for begin, end in equal_parts(len(y), terms.batch):
                train(everything, nn.Sequential(bottoms[site], head), optimizer, x[begin:end], y[begin:end])
    trunk, start = everything.first("trunk", "server"), terms.rounds * terms.local_epochs
    with torch.no_grad():
        released = [everything.rows(s, "train", start) for s in SITES]
        x = torch.cat([torch.cat([bottom(x) for bottom in bottoms.values()], 1) for x, _ in released])
    at_the_server(everything, trunk, x, torch.cat([y for _, y in released]), start)
    return bottoms, trunk


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("local_head", ["linear", "hidden"])
def test_every_record_through_every_site_s_bottom(optimizer: str, local_head: str) -> None:
    terms = {"bottoms": "concatenated", "local_head": local_head, "optimizer": OPTIMIZERS[optimizer]}
    whole = ran(half(terms, epochs=4, optimizer=OPTIMIZERS[optimizer]), SIZES)
    bottoms, trunk = side_by_side(whole)
    held = {Copy(f"bottom:{of}", site): bottoms[of] for of in SITES for site in SITES}
    assert far(whole, {**held, Copy("trunk"): trunk}) < 1e-10
    assert next(p.shape for p in trunk.parameters()) == (5, 5 * 8)
    _, otherwise = side_by_side(whole, 1)
    assert far(whole, {Copy("trunk"): otherwise}) > 1e-4


CNN = {
    "build": "partway.model.zoo:cnn",
    "arguments": {"channels": 2, "height": 6, "width": 6, "filters": [4, 3], "classes": 3},
    "cut": ["features.0"],
}


def images(site: str) -> Records:
    records, generator = records_of(site, SIZES[site]), torch.Generator().manual_seed(ord(site))
    x = torch.randn(len(records.labels), 2, 6, 6, generator=generator, dtype=torch.float64)
    return Records(x, records.labels, classes=3, numeric=(), division=records.division)


@pytest.mark.parametrize("cut", ["features.1", "features.2", "features.5"])
def test_images_stand_side_by_side_by_their_channels(cut: str) -> None:
    terms = {"bottoms": "concatenated", "rounds": 1, "local_epochs": 1}
    whole = federation(half(terms, {"network": {**CNN, "cut": [cut]}}), {site: images(site) for site in SITES})
    whole.run()
    _, trunk = side_by_side(whole)
    assert far(whole, {Copy("trunk"): trunk}) < 1e-10


def test_a_trunk_that_begins_with_other_weights_is_refused() -> None:
    with pytest.raises(ConfigError, match="whose first layer with weights is linear or a convolution"):
        federation(half({"bottoms": "concatenated"}, {"network": CNN}), {site: images(site) for site in SITES})


def test_it_is_scored_and_comes_out_as_one_network(tmp_path: Path) -> None:
    sections = {
        "evaluation": {"every": 1, "site_scores": True},
        "result": {"bottom": "everyone", "trunk": "everyone"},
    }
    whole = ran(half({"bottoms": "concatenated"}, sections, epochs=3), SIZES)
    everything, network = Everything(whole), whole.parties["d"].network.whole
    for party in ("server", "d"):
        result = result_of(whole.parties[party], 0)
        assert result.whole
        assert {f"bottoms.{site}.hidden.0.weight" for site in SITES} | {"trunk.output.bias"} <= result.weights.keys()
        network.load_state_dict(result.weights)
        network.eval()
        with torch.no_grad():
            scored = metrics.scores(network(everything.rows("d", "test", 0)[0]), everything.rows("d", "test", 0)[1])
        assert together(whole, 0).sites["d"]["accuracy"] == pytest.approx(scored.accuracy)
        assert together(whole, 0).sites["d"]["macro_auc"] == pytest.approx(scored.macro_auc)
    assert together(whole, 0).whole


THYROID = """
[job]
name = "thyroid"
[network]
build = "partway.model.zoo:mlp"
arguments = { inputs = 29, hidden = [16, 8], classes = 7 }
cut = ["hidden.1"]
[training]
schedule = "half_trained"
epochs = 1
half_trained = { bottoms = "concatenated", rounds = 1, local_epochs = 1 }
[result]
trunk = "everyone"
"""


def test_what_it_leaves_predicts(tmp_path: Path) -> None:
    records = thyroid.bundled(seed=0)
    whole = federation(read_job(THYROID), records)
    whole.run()
    result_of(whole.parties["svi"], 0).write(tmp_path)
    finished = load(tmp_path)
    held = records["svi"].features[records["svi"].division["test"]].float()
    with torch.no_grad():
        found = finished(held)
    assert metrics.scores(found, records["svi"].labels[records["svi"].division["test"]]).accuracy == pytest.approx(
        result_of(whole.parties["svi"], 0).sites["svi"]["accuracy"], abs=0.005
    )


def test_a_policy_judges_the_width_of_all_that_crosses_together() -> None:
    policy = msgspec.structs.replace(permissive("partway.model.zoo:mlp"), widest_cut=39)
    with pytest.raises(Refused, match=r"40 numbers a record would leave \(bottom:a -> shelf, .*widest_cut is 39"):
        small(half({"bottoms": "concatenated"}), policies={"b": policy}).run()
    small(half({"bottoms": "concatenated"}), policies={"b": msgspec.structs.replace(policy, widest_cut=40)}).run()
    small(half({}), policies={"b": msgspec.structs.replace(policy, widest_cut=8)}).run()


def test_a_site_that_runs_another_bottom_is_found() -> None:
    whole = small(half({"bottoms": "concatenated"}))
    worker = whole.parties["c"].party.worker
    take = worker._take

    def wrongly(copy: Copy, takes: Any) -> None:
        take(copy, takes)
        if copy.segment == "bottom:b":
            worker.segments[copy].load(worker.segments[copy].weights() + 1e-3)

    worker._take = wrongly  # type: ignore[method-assign]
    with pytest.raises(PeerError, match="holds another bottom:b than"):
        whole.run()


def test_frozen_for_good() -> None:
    with pytest.raises(ConfigError, match="concatenated bottoms are frozen for good"):
        half({"bottoms": "concatenated", "synchronous_epochs": 1})


def test_what_it_costs_is_forecast() -> None:
    for bottoms in ("largest", "concatenated"):
        whole = ran(half({"bottoms": bottoms}), SIZES)
        records = Everything(whole).records
        due = forecast_of(whole.job, records["a"].schema, {site: own.sizes for site, own in records.items()})
        for party, cost in due.items():
            spent = whole.parties[party].party.cost
            assert (spent.flops, spent.bytes_up, spent.bytes_down) == (cost.flops, cost.bytes_up, cost.bytes_down)


def test_the_bits_of_concatenated_do_not_depend_on_delivery() -> None:
    sections = {"evaluation": {"every": 1, "site_scores": True}, "result": {"bottom": "everyone", "trunk": "everyone"}}
    more: dict[str, Any] = {"bottoms": "concatenated"}
    job, other = half(more, sections), half({**more, "batch": 9}, sections)
    same_bits_in_any_order(lambda: small(job), 2, small(other))
