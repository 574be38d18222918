"""Networks that are no sequences train between parties as they do in one place."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
import torch
from torch import nn

from federations import SIZES, difference, job_of, pooled, records_of, small
from partway.assembly import forecast_of
from partway.config import Policy
from partway.errors import ConfigError, CutError, PlanError, Refused
from partway.model.segment import initialise
from partway.outcome import result_of
from partway.simulation import permissive

ADAM = {"name": "adam", "lr": 0.02}


def job(cut: list[str], more: dict[str, Any] | None = None, **training: Any) -> Any:
    network = {"build": "residual_network:residual", "arguments": {}, "cut": cut, **(more or {})}
    return job_of({"network": network}, optimizer=ADAM, **training)


def skipping(skips: list[str], network: dict[str, Any] | None = None, **training: Any) -> Any:
    """A network of which the head uses something of the bottom."""
    network = {"build": "skipping_network:skipping", "arguments": {}, "cut": ["aside", "third"], **(network or {})}
    terms = {"configuration": "u_shaped", "optimizer": ADAM, "skips": skips, **training}
    return job_of({"network": network}, **terms)


def allowed(width: int) -> Policy:
    return msgspec.structs.replace(permissive("skipping_network:skipping"), widest_cut=width)


SCHEMA = records_of("a", 5).schema
SIZES_IN_PARTS = {site: records_of(site, count).sizes for site, count in SIZES.items()}
CUTS = {"vanilla": ["gate"], "u_shaped": ["first", "middle"]}


@pytest.mark.parametrize("configuration", CUTS)
def test_equals_one_loop(configuration: str) -> None:
    """Values and a mask cross in one tensor; first weights come from the network's own code."""
    whole = small(job(CUTS[configuration], configuration=configuration))
    whole.run()
    assert difference(whole, pooled(whole)[0]) < 1e-10
    assert difference(whole, pooled(whole, other_order=True)[0]) > 1e-4
    crossing = whole.parties["a"].network.outputs
    assert {name: made.shape[1] for name, made in crossing.items() if name != list(crossing)[-1]} == (
        {"bottom": 8 + 8 + 4} if configuration == "vanilla" else {"bottom": 8, "trunk": 8 + 8}
    )


@pytest.mark.parametrize("training", [{}, {"precision": "bfloat16", "dtype": "float32"}, {"micro_batch": 5}])
def test_values_pass_by_a_party(training: dict[str, Any]) -> None:
    """What the head uses of the bottom stays at the site; the server gets and sends what it is for."""
    whole = small(skipping(["bottom -> head"], **training), policies={"b": allowed(9)})
    whole.run()
    if not training:
        assert difference(whole, pooled(whole)[0]) < 1e-10
        assert difference(whole, pooled(whole, other_order=True)[0]) > 1e-4
    shapes = whole.parties["server"].party.worker.shapes
    crossing = [("bottom", "trunk"), ("bottom", "head"), ("trunk", "head")]
    assert [shapes.record(*pair) for pair in crossing] == [(8,), (2,), (4 + 5,)]
    cost, told = result_of(whole.parties["a"], 0.0).cost["a"], forecast_of(whole.job, SCHEMA, SIZES_IN_PARTS)
    assert (cost.bytes_up, cost.bytes_down) == (told["a"].bytes_up, told["a"].bytes_down)


def test_records_stay_at_their_site_for_the_head_and_go_to_the_server_only_if_the_job_says_so() -> None:
    raw: dict[str, Any] = {"arguments": {"raw": True}}
    whole = small(skipping(["bottom -> head"], raw))
    whole.run()
    assert difference(whole, pooled(whole)[0]) < 1e-10
    shapes = whole.parties["server"].party.worker.shapes
    assert [shapes.record("bottom", target) for target in ("trunk", "head")] == [(8,), (2 + 6,)]
    with pytest.raises(CutError, match=r"`x`, `aside:0` would pass by a party; .* skips = \['bottom -> head'\]"):
        small(skipping([], raw))
    two: dict[str, Any] = {**raw, "cut": ["third"]}
    with pytest.raises(CutError, match="`x`, an input, would reach another party"):
        small(skipping([], two, configuration="vanilla"))
    whole = small(skipping([], {**two, "may_cross": ["x"]}, configuration="vanilla"))
    whole.run()
    assert difference(whole, pooled(whole)[0]) < 1e-10
    assert difference(whole, pooled(whole, other_order=True)[0]) > 1e-4


def test_what_would_pass_by_a_party_is_refused_or_let_pass() -> None:
    with pytest.raises(CutError, match="`drop:0` would pass by a party"):
        small(job(["gate", "middle"], configuration="u_shaped"))
    with pytest.raises(CutError, match=r"`aside:0` would .* or let .*: \[training\] skips = \['bottom -> head'\]"):
        small(skipping([]))
    with pytest.raises(Refused, match=r"8 numbers a record would leave \(bottom -> trunk\)"):
        small(skipping(["bottom -> head"]), policies={"b": allowed(7)}).run()
    for skips, words in (
        (["bottom -> trunk"], "skip bottom -> trunk: it leads from one of bottom, trunk, head to one after the next"),
        (["head -> bottom"], "skip head -> bottom: it leads"),
        (["bottom -> head", "bottom -> head"], "skip bottom -> head drawn twice"),
    ):
        with pytest.raises(PlanError, match=words):
            small(skipping(skips))
    with pytest.raises(ConfigError, match=r"skips has `bottom to head`; a skip is written as in `bottom -> head`"):
        skipping(["bottom to head"])
    with pytest.raises(CutError, match="the head uses nothing that the bottom makes; leave the skip out"):
        small(job(CUTS["u_shaped"], configuration="u_shaped", skips=["bottom -> head"]))


def test_first_weights_come_from_the_secret_and_the_network_s_own_code() -> None:
    parts = small(job(CUTS["vanilla"])).parties["a"].network.modules
    before = parts["bottom"].state_dict()["shift"].clone()
    initialise(parts["bottom"], bytes(32))
    first = {name: t.clone() for name, t in parts["bottom"].state_dict().items()}
    initialise(parts["bottom"], bytes(31) + b"1")
    assert not torch.equal(before, first["shift"])
    assert not any(torch.equal(first[name], t) for name, t in parts["bottom"].state_dict().items())
    initialise(parts["bottom"], bytes(32))
    assert all(torch.equal(first[name], t) for name, t in parts["bottom"].state_dict().items())


def test_batchnorm_is_refused_and_group_norm_offered() -> None:
    normalised = {"arguments": {"normalised": True}}
    with pytest.raises(
        Refused, match=r"the bottom has BatchNorm at norm, .* \[network\] group_norm = 4 puts GroupNorm"
    ):
        small(job(CUTS["vanilla"], normalised))
    whole = small(job(CUTS["vanilla"], {**normalised, "group_norm": 4}))
    whole.run()
    network, _ = pooled(whole)
    assert difference(whole, network) < 1e-10
    assert isinstance(network.norm, nn.GroupNorm)
