"""What the server has received after a run, in any schedule: no number of what the sites hold, searched byte by byte.

Searched for are the weights of each site's segments, their gradients, shares, totals and optimiser states, after each
task of each site: every 16 bytes of each, at every byte of every frame.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import pytest
from torch import Tensor

from federations import SITES, job_of, small
from partway.config import Job
from partway.plan.schedules import SCHEDULES
from partway.privacy.blind_sum import BlindSum, ClearSum
from partway.privacy.seal import Keys
from partway.protocol.messages import LetterKind
from partway.protocol.net import Task
from partway.simulation import SERVER
from partway.train.worker import Worker
from partway.transport.memory import Wire

WIDTH = 16
"""Bytes: two numbers in float64, which nothing else holds by chance."""
EVERY = {"evaluation": {"every": 1, "trunk_travels": True, "site_scores": True}, "result": {"trunk": "everyone"}}
SETTINGS: dict[str, dict[str, Any]] = {
    "half_trained": {"half_trained": {"rounds": 2, "local_epochs": 1, "batch": 8, "synchronous_epochs": 1}},
    "relay": {"relay": {"turn_batches": 2}},
    "averaged": {"averaged": {"every": 2}},
    "private": {"private": {"shared_epochs": 1}},
}
KEPT = {"relay": {"turn_batches": 2, "hand_over": "kept"}}
CASES = [(s, c) for s in SCHEDULES for c in ("vanilla", "u_shaped") if (s, c) != ("half_trained", "u_shaped")]
cases = pytest.mark.parametrize(("schedule", "configuration"), CASES)


def pieces(data: bytes, step: int) -> Iterable[bytes]:
    return (data[at : at + WIDTH] for at in range(0, len(data) - WIDTH + 1, step))


class Secrets:
    """Every 16 bytes of what the sites must not show, by what it is of."""

    def __init__(self) -> None:
        self.of: dict[str, set[bytes]] = {}

    def add(self, what: str, numbers: np.ndarray) -> None:
        flat = np.ascontiguousarray(numbers).reshape(-1)
        found = self.of.setdefault(what, set())
        for at, piece in enumerate(pieces(flat.tobytes(), flat.itemsize)):
            if flat[at : at + WIDTH // flat.itemsize].all():  # zeros stand everywhere
                found.add(piece)

    def found(self, heard: Iterable[bytes]) -> dict[str, int]:
        """How many of the pieces stand in what was heard."""
        known = set().union(*(pieces(message, 1) for message in heard))
        return {what: len(mine & known) for what, mine in self.of.items()}


class Listening(Wire):
    """Keeps all that comes to the server, what it forwards among it."""

    def __init__(self) -> None:
        super().__init__()
        self.heard: list[bytes] = []

    def put(self, sender: str, receiver: str, message: bytes) -> None:
        if receiver == SERVER:
            self.heard.append(message)
        super().put(sender, receiver, message)


def watched(worker: Worker, secrets: Secrets) -> Callable[[Task], bool]:
    """The worker's `do`, after which all that it holds is noted."""
    do = worker.do

    def noting(task: Task) -> bool:
        stop = do(task)
        home = {c: s for c, s in worker.segments.items() if c.lane and not c.segment.endswith("_here")}
        for segment in home.values():
            secrets.add("weights", segment.weights().numpy())
            if (gradient := segment.gradient()) is not None:
                secrets.add("gradient", gradient.numpy())
        for optimizer in worker._optimizers.values():
            for name, kept in ((n, t) for state in optimizer.state.values() for n, t in state.items()):
                if isinstance(kept, Tensor) and kept.dim():
                    secrets.add(name, kept.numpy())
        return stop

    return noting


def run(job: Job, monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """How many pieces of each kind the server has heard."""
    secrets, wire = Secrets(), Listening()

    def noted(kind: Any, name: str, what: str) -> None:
        original = getattr(kind, name)

        def noting(self: Any, turn: int, segment: str, numbers: np.ndarray, *more: Any) -> np.ndarray:
            made: np.ndarray = original(self, turn, segment, numbers, *more)
            if segment in ("bottom", "head", "local_head"):
                secrets.add(what, numbers if name == "mask" else made)
            return made

        monkeypatch.setattr(kind, name, noting)

    for kind in (BlindSum, ClearSum):
        noted(kind, "mask", "share")
        noted(kind, "unmask", "total")

    def tap(head: Any, letter: Any, tensors: Mapping[str, Tensor]) -> None:
        if head.to == SERVER or letter.post.kind is LetterKind.SUM:  # the server has made it
            wire.heard += [tensor.detach().contiguous().numpy().tobytes() for tensor in tensors.values()]

    whole = small(job, taps=dict.fromkeys((*SITES, SERVER), tap))
    for site in SITES:
        worker = whole.parties[site].party.worker
        monkeypatch.setattr(worker, "do", watched(worker, secrets))
    whole.run(wire)
    assert min(map(len, secrets.of.values())) > 100
    return secrets.found(wire.heard)


def job(schedule: str, configuration: str = "vanilla", optimizer: str = "adam", **more: Any) -> Job:
    terms = {"name": optimizer, "lr": 0.05, **({"momentum": 0.9} if optimizer == "sgd" else {})}
    settings = {"optimizer": terms, "batch": 24, **SETTINGS.get(schedule, {}), **more}
    return job_of(EVERY, schedule=schedule, configuration=configuration, **settings)


@cases
def test_the_server_has_received_no_number_of_what_the_sites_hold(
    schedule: str, configuration: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = run(job(schedule, configuration), monkeypatch)
    assert found == dict.fromkeys(found, 0)
    assert {"weights", "gradient", "exp_avg", "exp_avg_sq"} <= found.keys()


@pytest.mark.parametrize("hand_over", ["at_once", "kept"])
def test_the_momentum_that_a_relay_hands_on_is_hidden_too(hand_over: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found = run(job("relay", optimizer="sgd", relay={"hand_over": hand_over}), monkeypatch)
    assert found == {"weights": 0, "gradient": 0, "momentum_buffer": 0}


@pytest.mark.parametrize("schedule", ["synchronous", "half_trained", "averaged", "splitfed_v1", "splitfed_v2"])
def test_sums_in_the_clear_are_found(schedule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found = run(job(schedule, sums="clear"), monkeypatch)
    assert found["share"] > 100
    assert found["gradient" if schedule == "synchronous" else "weights"] > 100


@pytest.mark.parametrize(("schedule", "more"), [*((s, {}) for s in SCHEDULES), ("relay", KEPT)])
def test_letters_that_are_not_sealed_are_found(
    schedule: str, more: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Keys, "seal", lambda self, peer, plain, associated: bytes(12) + plain + bytes(16))
    monkeypatch.setattr(Keys, "open", lambda self, peer, sealed, associated: sealed[12:-16])
    found = run(job(schedule, **more), monkeypatch)
    assert found["weights"] > 30
    assert (found["exp_avg"] > 100 and found["exp_avg_sq"] > 100) == (schedule == "relay")
