"""No record leaves a site, and the server sees no bottom: searched for byte by byte, and the search shown to find."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from leaks import found, too_short
from partway.config import read_job
from partway.data import thyroid
from partway.local import toml
from partway.model.segment import Segment
from partway.plan import schedules
from partway.plan.configurations import vanilla
from partway.plan.phases import Schedule, Settings
from partway.plan.plan import Edge, Plan
from partway.privacy.blind_sum import BlindSum, ClearSum
from partway.privacy.seal import Keys
from partway.simulation import SERVER, Federation, federation
from partway.train.source import RecordSource
from partway.transport.memory import Wire

JOB: dict[str, dict[str, Any]] = {
    "job": {"name": "thyroid"},
    "network": {
        "build": "partway.model.zoo:mlp",
        "arguments": {"inputs": 29, "hidden": [64, 16, 128, 64], "classes": 7},
        "cut": ["hidden.2"],
    },
    "training": {"epochs": 1},
    "evaluation": {"every": 1, "site_scores": True},
    "result": {"trunk": "everyone"},
}


class Listening(Wire):
    """Keeps all that crosses, by receiver."""

    def __init__(self) -> None:
        super().__init__()
        self.heard: dict[str, list[bytes]] = {}

    def put(self, sender: str, receiver: str, message: bytes) -> None:
        self.heard.setdefault(receiver, []).append(message)
        super().put(sender, receiver, message)


class Tapped:
    """Keeps every plaintext of every door."""

    def __init__(self) -> None:
        self.plain: dict[str, list[bytes]] = {}

    def __call__(self, head: Any, letter: Any, tensors: Mapping[str, Tensor]) -> None:
        pieces = self.plain.setdefault(head.sender, [])
        pieces += [tensor.detach().cpu().contiguous().numpy().tobytes() for tensor in tensors.values()]


Run = tuple[Federation, Listening, Tapped]


def run(job: Mapping[str, Any] = JOB) -> Run:
    tap, wire, records = Tapped(), Listening(), thyroid.bundled(seed=0)
    whole = federation(read_job(toml(job)), records, taps=dict.fromkeys((*records, SERVER), tap))
    whole.run(wire)
    return whole, wire, tap


def rows_of(whole: Federation) -> Iterator[tuple[str, np.ndarray]]:
    """Every record of every site, as it was read and as the network sees it."""
    for site in whole.job.sites:
        source = whole.parties[site].party.worker.source
        assert isinstance(source, RecordSource)
        yield site, source.records.features.numpy()
        yield site, source.features.double().numpy()


@pytest.fixture(scope="module")
def honest() -> Run:
    return run()


HALF = {"schedule": "half_trained", "half_trained": {"rounds": 1, "local_epochs": 1}}


@pytest.mark.parametrize("how", ["vanilla", "u_shaped", "half_trained"])
def test_no_record_leaves_its_site(how: str, honest: Run) -> None:
    whole, wire, tap = honest
    if how == "half_trained":
        whole, wire, tap = run({**JOB, "training": {"epochs": 1, **HALF}})
    elif how == "u_shaped":
        network = {**JOB["network"], "cut": ["hidden.2", "hidden.7"]}
        whole, wire, tap = run({**JOB, "network": network, "training": {"epochs": 1, "configuration": "u_shaped"}})
    searched = 0
    for site, rows in rows_of(whole):
        assert too_short(rows) == 0
        assert found(rows, tap.plain[site]) == 0
        assert found(rows, wire.heard[SERVER]) == 0
        searched += len(rows)
    assert searched == 2 * 9046
    assert sum(map(len, tap.plain["other"])) > (250_000 if how == "half_trained" else 500_000)


def test_the_search_finds_what_an_identity_bottom_lets_through() -> None:
    """A bottom that hands on its input: every training record is found, at the door and on the wire."""
    whole, wire, tap = run(
        {**JOB, "network": {"build": "identity_network:identity", "cut": ["through"], "may_cross": ["input"]}}
    )
    for site, training in training_rows(whole):
        assert found(training, tap.plain[site]) == len(training)
        assert found(training, wire.heard[SERVER]) == len(training)


def training_rows(whole: Federation) -> Iterator[tuple[str, np.ndarray]]:
    for site in whole.job.sites:
        source = whole.parties[site].party.worker.source
        assert isinstance(source, RecordSource)
        yield site, source.features[source.records.division["train"]].double().numpy()


def test_the_search_finds_what_a_raw_edge_lets_through(monkeypatch: pytest.MonkeyPatch) -> None:
    """A plan with an edge from the records to the server is refused; forced through, every row of it is found."""
    edge = Edge("data", "trunk", gradient=False)

    def leaky(plan: Plan, settings: Settings) -> tuple[Plan, Schedule]:
        whole, schedule = schedules.synchronous(plan, settings)
        flows = tuple((n, (*e, edge)) if n == "split" else (n, e) for n, e in whole.flows)
        return replace(whole, flows=flows), schedule

    leaking, _ = leaky(vanilla(("a", "b", "c")), Settings())
    assert any("raw records would leave their site" in fault for fault in leaking.validate())

    monkeypatch.setitem(schedules.SCHEDULES, "synchronous", leaky)
    monkeypatch.setattr("partway.assembly.shapes_of", shapes_with_data("partway.assembly.shapes_of"))
    monkeypatch.setattr(Segment, "forward", on_the_first_columns(Segment.forward))
    whole, wire, tap = run()
    for site, training in training_rows(whole):
        assert found(training, tap.plain[site]) == len(training)
        assert found(training, wire.heard[SERVER]) == len(training)


def shapes_with_data(name: str) -> Any:
    module, _, function = name.rpartition(".")
    original = getattr(sys.modules[module], function)

    def shapes(*args: Any) -> Any:
        made = original(*args)
        data = replace(made.pieces["bottom"], output=(29,))
        return replace(made, pieces={**made.pieces, "data": data})

    return shapes


def on_the_first_columns(forward: Any) -> Any:
    """A trunk that looks at what it may, whatever else it is given."""

    def narrow(self: Segment, inputs: Tensor, train: bool) -> Tensor:
        first = next(m for m in self.module.modules() if isinstance(m, nn.Linear))
        return forward(self, inputs[:, : first.in_features], train)

    return narrow


# -- what the server has


def secrets_of_training(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[np.ndarray]]:
    """Shares and totals before they are masked, and weights, at every site and step."""
    seen: dict[str, list[np.ndarray]] = {"share": [], "total": [], "weights": []}
    mask, unmask, load, write = BlindSum.mask, BlindSum.unmask, Segment.set_gradient, Segment.load

    def masked(self: BlindSum, turn: int, segment: str, share: np.ndarray) -> np.ndarray:
        seen["share"].append(share.copy())
        return mask(self, turn, segment, share)

    def unmasked(self: BlindSum, turn: int, segment: str, total: np.ndarray, dtype: np.dtype) -> np.ndarray:
        seen["total"].append(unmask(self, turn, segment, total, dtype))
        return seen["total"][-1]

    def loaded(self: Segment, flat: Tensor) -> None:
        seen["weights"].append(self.weights().numpy())
        load(self, flat)

    def averaged(self: Segment, flat: Tensor) -> None:
        seen["weights"] += [self.weights().numpy(), flat.numpy()]
        write(self, flat)

    monkeypatch.setattr(BlindSum, "mask", masked)
    monkeypatch.setattr(BlindSum, "unmask", unmasked)
    monkeypatch.setattr(Segment, "set_gradient", loaded)
    monkeypatch.setattr(Segment, "load", averaged)
    return seen


def windows(arrays: list[np.ndarray], width: int = 6) -> np.ndarray:
    """A stretch from the beginning and from the middle of every vector of the bottom's size, unless nearly all zero.

    Not from its end: where a site has one record in a step, the gradient of its last bias is the very row that the
    server has sent.
    """
    bottoms = [a for a in arrays if len(a) == 2960]
    cut = [a[start : start + width] for a in bottoms for start in (0, len(a) // 2)]
    return np.array([c for c in cut if np.count_nonzero(c) >= 4], dtype=np.float64)


@pytest.mark.parametrize("training", [{}, HALF], ids=["synchronous", "half_trained"])
@pytest.mark.parametrize("sums", ["blind", "clear"])
def test_the_server_sees_no_parameter_gradient_or_total_of_a_bottom(
    sums: str, training: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = secrets_of_training(monkeypatch)
    if sums == "clear":

        def kept(what: str) -> Any:
            return lambda self, turn, segment, numbers, *_: seen[what].append(numbers.copy()) or numbers

        monkeypatch.setattr(ClearSum, "mask", kept("share"))
        monkeypatch.setattr(ClearSum, "unmask", kept("total"))
    _, wire, tap = run({**JOB, "training": {"epochs": 1, "sums": sums, **training}})
    server = [*wire.heard[SERVER], *tap.plain[SERVER]]
    assert min(len(v) for v in seen.values()) >= (5 * 2 if training else 5 * 20)
    if sums == "blind":
        for what, arrays in seen.items():
            assert found(windows(arrays), server) == 0, what
    else:
        for what in ("share", "total"):
            rows = windows(seen[what])
            assert found(rows, server) == len(rows)
        found_weights = found(windows(seen["weights"]), server)
        assert found_weights > 0 if training else found_weights == 0  # the average, in the clear, is the weights


def test_first_weights_that_were_not_sealed_would_be_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Keys, "seal", lambda self, peer, plain, associated: bytes(12) + plain + bytes(16))
    monkeypatch.setattr(Keys, "open", lambda self, peer, sealed, associated: sealed[12:-16])
    seen = secrets_of_training(monkeypatch)
    _, wire, _ = run()
    assert found(windows(seen["weights"][:5]), wire.heard[SERVER]) > 0


def test_rows_too_short_to_search_for_are_counted() -> None:
    rows = np.ones((7, 3))
    assert too_short(rows) == 7
    assert too_short(np.ones((7, 4))) == 0


def test_the_search_itself() -> None:
    generator = np.random.default_rng(0)
    rows, others = generator.standard_normal((50, 9)), generator.standard_normal((50, 9))
    for dtype in ("float32", "float64"):
        for shift in range(5):
            hay = [bytes(shift) + rows.astype(dtype).tobytes() + bytes(7)]
            assert found(rows, hay) == 50
            assert found(others, hay) == 0
    cut = rows.astype("float32").tobytes()[:-1]
    assert found(rows, [cut]) == 49
    assert found(torch.tensor(rows).numpy(), []) == 0


def test_records_come_from_files_that_stay(tmp_path: Path) -> None:
    """A simulated run reads nothing but the records and writes nothing at all without a folder."""
    before = sorted(tmp_path.rglob("*"))
    run({**JOB, "training": {"epochs": 1, "batch": 1024}})
    assert sorted(tmp_path.rglob("*")) == before
