"""Promise 1: five sites, both plans, blind sums, any delivery order, against one PyTorch loop on the pooled records."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from federations import SIZES, difference, job_of, pooled, same_bits_in_any_order, small
from partway.config import read_job
from partway.data import thyroid
from partway.data.records import statistics_of
from partway.protocol.messages import LetterKind
from partway.simulation import Federation, federation
from partway.train.source import RecordSource

OPTIMIZERS = {"adam": {"name": "adam", "lr": 0.01}, "momentum": {"name": "sgd", "lr": 0.05, "momentum": 0.9}}
configurations = pytest.mark.parametrize("configuration", ["vanilla", "u_shaped"])


@configurations
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_equals_the_pooled_loop_over_200_steps(configuration: str, optimizer: str) -> None:
    whole = small(job_of(configuration=configuration, optimizer=OPTIMIZERS[optimizer], epochs=34))
    whole.run()
    steps = [t for t in whole.parties["server"].party.session.turns if t.train]
    assert len(steps) >= 200
    counts = {n for t in steps for n in t.rows[0].values()}
    assert {0, 1} <= counts
    assert max(counts) > 5
    network, losses = pooled(whole)
    assert difference(whole, network) < 1e-10
    other, _ = pooled(whole, other_order=True)
    assert difference(whole, other) > 1e-4
    told = losses_of(whole)
    assert max(abs(a - b) for a, b in zip(told, losses, strict=True)) < 1e-10


HALF = {"rounds": 2, "local_epochs": 3, "batch": 8, "optimizer": {"name": "sgd", "lr": 0.05, "momentum": 0.9}}


@pytest.mark.parametrize("local_head", ["linear", "hidden"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("synchronous_epochs", [0, 3])
def test_half_trained_equals_its_phases_in_plain_pytorch(
    optimizer: str, local_head: str, synchronous_epochs: int
) -> None:
    half = {**HALF, "local_head": local_head, "synchronous_epochs": synchronous_epochs}
    job = half_job(half, epochs=20, optimizer=OPTIMIZERS[optimizer])
    whole = small(job)
    whole.run()
    network, losses = pooled(whole)
    assert difference(whole, network) < 1e-10
    told = whole.parties["server"].party.worker.losses
    assert len(told) == len(losses) >= 120
    assert max(abs(float(a) - b) for a, b in zip(told, losses, strict=True)) < 1e-10
    other, _ = pooled(whole, other_order=True)
    assert difference(whole, other) > 1e-4


def half_job(half, sections=None, **training):
    return job_of(sections, schedule="half_trained", half_trained={**HALF, **half}, **training)


@pytest.mark.parametrize("schedule", ["synchronous", "half_trained"])
def test_training_stops_early_and_keeps_the_best(schedule: str) -> None:
    training = {"schedule": schedule, "epochs": 60, "optimizer": OPTIMIZERS["adam"], "half_trained": HALF}
    every = {"evaluation": {"every": 1}}
    whole = small(job_of(every, patience=2, **training))
    whole.run()
    network, losses = pooled(whole)
    assert len(losses) < 60 * 6  # it did stop
    assert difference(whole, network) < 1e-10
    assert len(whole.parties["server"].party.worker.losses) == len(losses)
    patient = small(job_of(every, **training))
    patient.run()
    network, losses = pooled(patient)
    assert len(losses) == 60 * 6
    assert difference(patient, network) < 1e-10
    last = small(job_of(every, keep="last", **training))
    last.run()
    assert difference(last, network) > 1e-4


def test_no_gradient_of_the_server_reaches_a_bottom() -> None:
    def gradients(half):
        whole = small(half_job(half))
        nets = whole.parties["a"].party.session
        whole.run()
        return {r.receiver for n in nets.nets for p, r in n.letters.items() if p.kind is LetterKind.GRADIENT}

    assert gradients({}) == set()
    assert gradients({"synchronous_epochs": 1}) == set(SIZES)


def losses_of(whole: Federation) -> list[float]:
    """The loss of each step: at the server, or in a U-shape the sum of what the sites with records in it have."""
    parts = {name: iter(a.party.worker.losses) for name, a in whole.parties.items() if a.party.worker.losses}
    steps = [t.rows[0] for t in whole.parties["server"].party.session.turns if t.train]
    return [float(sum(next(part) for name, part in parts.items() if rows.get(name, 1))) for rows in steps]


@pytest.mark.parametrize(
    "training",
    [
        {"configuration": "vanilla"},
        {"configuration": "u_shaped"},
        {"schedule": "half_trained", "half_trained": {**HALF, "synchronous_epochs": 2}, "patience": 1},
    ],
)
def test_the_bits_do_not_depend_on_delivery(training: dict[str, Any]) -> None:
    sections = {"evaluation": {"every": 1, "site_scores": True}, "result": {"bottom": "everyone", "trunk": "everyone"}}
    job = job_of(sections, **training)
    same_bits_in_any_order(lambda: small(job), 10, small(job_of(sections, batch=17, **training)))


def test_float32_follows_the_pooled_loop_for_50_steps() -> None:
    whole = small(job_of(dtype="float32", epochs=9, optimizer=OPTIMIZERS["adam"]))
    whole.run()
    assert sum(1 for t in whole.parties["server"].party.session.turns if t.train) >= 50
    network, _ = pooled(whole)
    assert 0 < difference(whole, network) < 1e-5


def test_clear_sums_agree_with_blind_ones() -> None:
    blind, clear = small(job_of()), small(job_of(sums="clear"))
    for whole in (blind, clear):
        whole.run()
        network, _ = pooled(whole)
        assert difference(whole, network) < 1e-10


def test_a_single_site_needs_no_sum() -> None:
    whole = small(job_of(), {"a": 40})
    whole.run()
    network, _ = pooled(whole)
    assert difference(whole, network) < 1e-12


def test_the_sites_bottoms_have_the_same_bits_and_the_server_has_none() -> None:
    whole = small(job_of())
    whole.run()
    copies = [segment for site in SIZES for copy, segment in segments(whole, site) if copy.segment == "bottom"]
    assert len(copies) == len(SIZES)
    assert all(torch.equal(copies[0].weights(), c.weights()) for c in copies)
    assert [copy.segment for copy, _ in segments(whole, "server")] == ["trunk"]


def segments(whole, party):
    return whole.parties[party].party.worker.segments.items()


THYROID = """
[job]
name = "thyroid"
[network]
build = "partway.model.zoo:mlp"
arguments = { inputs = 29, hidden = [64, 16, 128, 64], classes = 7 }
cut = ["hidden.2"]
[training]
epochs = 1
dtype = "float64"
"""


def test_thyroid_is_standardised_by_blind_sums_as_pooling_would() -> None:
    records = thyroid.bundled(seed=0)
    whole = federation(read_job(THYROID), records)
    whole.run()
    mean, deviation = statistics_of(records.values())
    for site, own in records.items():
        source = whole.parties[site].party.worker.source
        assert isinstance(source, RecordSource)
        assert (source.features - own.scaled(mean, deviation)).abs().max() < 1e-12
