"""A weight that two segments of one party share is stepped as one, by the gradient of all its uses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from federations import difference, job_of, pooled, records_of, same_bits_in_any_order, small
from partway import equality, pki
from partway.errors import ConfigError, CutError, Refused, UsageError
from partway.model.recipe import build
from partway.places import survey
from partway.plan.plan import Copy
from partway.plan.schedules import LEGAL
from partway.pretrained import split
from partway.shipped import write
from partway.simulation import Federation
from partway.train.worker import Worker

ADAM = {"name": "adamw", "lr": 0.02, "weight_decay": 0.1}
MOMENTUM = {"name": "sgd", "lr": 0.05, "momentum": 0.9}
CUT = ["bend", "middle"]
SCHEMAS = dict.fromkeys(("site", "a"), records_of("a", 5).schema)


def job(training: dict[str, Any] | None = None, arguments: dict[str, Any] | None = None, **more: Any) -> Any:
    network = {"build": "tied_network:tied", "arguments": arguments or {}, "cut": CUT, **more}
    return job_of({"network": network}, **{"configuration": "u_shaped", "optimizer": ADAM, **(training or {})})


def tied(whole: Federation, site: str) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """What a site's segments share, as each of them has it."""
    segments, places = whole.parties[site].party.worker.segments, whole.parties[site].network.tied
    weights = {name: segments[Copy(name, site)].weights() for name in ("bottom", "head")}
    return [(weights["bottom"][of["bottom"]], weights["head"][of["head"]]) for of in places]


@pytest.mark.parametrize(
    ("training", "called"),
    [({}, False), ({"optimizer": MOMENTUM}, True), ({"micro_batch": 5}, True), ({"clip_norm": 0.05}, False)],
)
def test_equals_one_loop(training: dict[str, Any], called: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = small(job(training, {"called": called}))
    whole.run()
    assert len(tied(whole, "a")) == (2 if called else 1)
    assert whole.parties["a"].network.outputs["bottom"].shape == (1, 8 + 8)  # a whole number is eight bytes
    one = ("step", lambda *terms: _clipped(*terms, most=training["clip_norm"]))
    if "clip_norm" in training:
        assert difference(whole, pooled(whole)[0]) > 1e-4
        monkeypatch.setattr(equality, *one)
    assert difference(whole, pooled(whole)[0]) < 1e-10
    assert difference(whole, pooled(whole, other_order=True)[0]) > 1e-4
    monkeypatch.setattr(Worker, "_meet", lambda worker, unit: None)
    apart = small(whole.job)
    apart.run()
    assert difference(apart, pooled(apart)[0]) > 1e-3
    assert all(not torch.equal(one, other) for one, other in tied(apart, "a"))


def _clipped(network: nn.Module, optimizer: torch.optim.Optimizer, batch: Any, summed: Any, most: float) -> float:
    network.train()
    optimizer.zero_grad()
    loss = summed(network(batch[0]), batch[1]) / len(batch[1])
    loss.backward()
    nn.utils.clip_grad_norm_(network.parameters(), most)  # a tied weight counts once
    optimizer.step()
    return float(loss.detach())


@pytest.mark.parametrize("schedule", [name for name, where in LEGAL.items() if "u_shaped" in where])
def test_stays_one_in_every_schedule(schedule: str) -> None:
    whole = small(job({"schedule": schedule, "epochs": 3}))
    before = {site: [one.clone() for one, _ in tied(whole, site)] for site in whole.job.sites}
    whole.run()
    for site in whole.job.sites:
        for (one, other), first in zip(tied(whole, site), before[site], strict=True):
            assert torch.equal(one, other)
            assert not torch.equal(one, first)


def test_in_half_precision_too_and_in_any_order_of_delivery() -> None:
    terms = job({"precision": "float16", "dtype": "float32", "clip_norm": 0.5})
    same_bits_in_any_order(lambda: small(terms), seeds=2, other=small(job({"dtype": "float32", "clip_norm": 0.5})))
    whole = small(terms)
    whole.run()
    assert all(torch.equal(one, other) for one, other in tied(whole, "b"))


def test_a_plan_knows_whose_pieces_are_whose() -> None:
    """Each place as the nearest cut of the job would find it there; and in two pieces, of two parties."""
    u_shaped, two = ({p.after: p.why_not for p in survey(j, SCHEMAS["a"]).places} for j in (job(), vanilla()))
    assert not any(u_shaped[path] for path in ("first", "bend", "middle"))
    for why in (two["bend"], two["middle"], u_shaped["again"]):
        assert "`first.0.weight` and `again.weight` are one tensor" in why


def vanilla(**network: Any) -> Any:
    network = {"build": "tied_network:tied", "arguments": {}, "cut": CUT[:1], **network}
    return job_of({"network": network}, optimizer=ADAM)


def test_across_parties_it_is_refused_by_name() -> None:
    with pytest.raises(CutError, match=r"`first.0.weight` and `again.weight` are one tensor, and the cut parts"):
        small(vanilla())


def test_what_one_writes_and_both_use_is_refused() -> None:
    with pytest.raises(CutError, match=r"`first.1.mean` is written by one piece and used by another"):
        small(job(None, {"called": True, "normalised": True}))


def test_a_buffer_that_each_party_would_draw_is_refused() -> None:
    """One that comes out the same everywhere may be used by all, as in the tests above."""
    with pytest.raises(CutError, match="`speeds` is drawn at random and used by several pieces"):
        small(job(None, {"drawn": True}))


def test_a_frozen_weight_of_two_parties_comes_from_a_file(tmp_path: Path) -> None:
    """Each would draw its own, and nothing would ever bring them together."""

    def terms(weights: dict[str, str]) -> Any:
        return vanilla(lora={"modules": ["middle"], "rank": 2}, weights=weights)

    with pytest.raises(ConfigError, match=r"`first.0.weight` is frozen, and the bottom and the trunk use it"):
        small(terms({}))
    elsewhere = build("tied_network:tied", {}, ["tied_network:tied"], 10_000).double()
    save_file({n: t.clone() for n, t in elsewhere.state_dict().items()}, tmp_path / "whole.safetensors")
    parts = split(terms({}), SCHEMAS, tmp_path / "whole.safetensors", tmp_path / "weights")
    whole = small(terms({part.segment: part.digest for part in parts}), weights=tmp_path / "weights")
    whole.run()
    held = {c.segment: s.tensors() for a in whole.parties.values() for c, s in a.party.worker.segments.items()}
    for name in ("bottom", "trunk"):
        assert torch.equal(held[name]["first.0.weight"], elsewhere.first[0].weight)


def test_weights_of_elsewhere_are_given_to_both(tmp_path: Path) -> None:
    """A file has a tied weight by one of its names; one party's part alone would untie it."""
    elsewhere = build("tied_network:tied", {}, ["tied_network:tied"], 10_000).double()
    held = {name: t for name, t in elsewhere.state_dict().items() if name != "again.weight"}
    save_file(held, tmp_path / "whole.safetensors")
    parts = {p.segment: p for p in split(job(), SCHEMAS, tmp_path / "whole.safetensors", tmp_path / "weights")}
    assert [parts[name].missing for name in ("bottom", "trunk", "head")] == [()] * 3
    weights = {name: part.digest for name, part in parts.items()}

    def begun(*names: str) -> Federation:
        return small(job({}, weights={name: weights[name] for name in names}), weights=tmp_path / "weights")

    ((one, other),) = tied(begun(*weights), "b")
    assert torch.equal(one.view(8, 6), held["first.0.weight"])
    assert torch.equal(one, other)
    with pytest.raises(
        Refused, match=r"the bottom and the head share a weight; give both their files, or none"
    ) as refused:
        begun("bottom")
    assert refused.value.reasons == ("WEIGHTS",)


def test_a_folder_of_one_of_them_is_refused(tmp_path: Path) -> None:
    office = pki.Authority.create("consortium").admit("office", pki.Role.OPERATOR)
    with pytest.raises(UsageError, match="bottom and head share a weight, and each folder would hold one"):
        write(job(), SCHEMAS, "head", office, tmp_path)
    write(job(), SCHEMAS, "trunk", office, tmp_path)
