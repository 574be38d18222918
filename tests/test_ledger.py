"""The ledger, the door in front of it, and the cost that is forecast and counted: they agree with what crossed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from federations import SIZES, job_of, small
from partway import pki
from partway.cost import forecast
from partway.egress import Door
from partway.errors import JobFailed, TrustError, UsageError
from partway.ledger import Count, Ledger, verify
from partway.plan.plan import Copy
from partway.protocol.messages import Bye, Fail, Head, Letter, LetterKind, Post, Reason
from partway.simulation import Federation
from partway.transport.memory import Wire
from partway.wire import frames

EDGE = ("ACTIVATIONS bottom -> trunk", "server")
IDENTITY = pki.Authority.create("study").admit("svi", pki.Role.SITE)
STRANGER = pki.Authority.create("study").admit("svi", pki.Role.SITE)


def by(identity: pki.Identity):
    return lambda signature, data: pki.signed_by(identity.key_der, signature, data)


def written(path: Path, end: bool = True) -> Path:
    ledger = Ledger(path, bytes(32), IDENTITY.sign)
    ledger.line("job", name="thyroid")
    for turns in ((0, 9), (10, 19)):
        ledger.open(turns, {EDGE: Count(10, 1000)})
        for n in range(10):
            ledger.left(EDGE, 100, bytes([n]))
    if end:
        ledger.end("done")
    else:
        ledger._file.close()  # type: ignore[union-attr]
    return path


def test_what_left_can_be_added_up(tmp_path: Path) -> None:
    audit = verify(written(tmp_path / "ledger.jsonl"), by(IDENTITY))
    assert audit.left == {EDGE: Count(20, 2000)}
    assert (audit.at_most, audit.outcome, audit.signatures) == ({}, "done", 3)
    assert json.loads((tmp_path / "ledger.jsonl").read_text().splitlines()[-1].partition(" ")[2])["kind"] == "signed"


def test_a_crash_leaves_at_most(tmp_path: Path) -> None:
    path = written(tmp_path / "ledger.jsonl", end=False)
    audit = verify(path, by(IDENTITY))
    assert audit.left == {EDGE: Count(10, 1000)}
    assert audit.at_most == {EDGE: Count(10, 1000)}
    assert audit.outcome is None
    path.write_bytes(path.read_bytes()[:-5])  # in the middle of its last line, which had opened the range
    assert verify(path, by(IDENTITY)).at_most == {}


def test_every_altered_byte_is_found(tmp_path: Path) -> None:
    path = written(tmp_path / "ledger.jsonl")
    good = path.read_bytes()
    for at in range(0, len(good) - 1, 7):
        path.write_bytes(good[:at] + bytes([good[at] ^ 1]) + good[at + 1 :])
        with pytest.raises(TrustError, match="line"):
            verify(path, by(IDENTITY))
    lines = good.splitlines(keepends=True)
    for without in range(len(lines) - 1):
        path.write_bytes(b"".join(lines[:without] + lines[without + 1 :]))
        with pytest.raises(TrustError, match=f"line {without + 1}: does not follow"):
            verify(path, by(IDENTITY))


def test_somebody_else_s_signature(tmp_path: Path) -> None:
    with pytest.raises(TrustError, match="not signed by this party's key"):
        verify(written(tmp_path / "ledger.jsonl"), by(STRANGER))
    with pytest.raises(UsageError, match="cannot be read"):
        verify(tmp_path / "none.jsonl", by(IDENTITY))


def test_no_more_leaves_than_the_opening_line_says() -> None:
    ledger = Ledger(None, bytes(32), IDENTITY.sign)
    with pytest.raises(JobFailed, match="no opening line"):
        ledger.left(EDGE, 1, b"")
    ledger.open((0, 0), {EDGE: Count(2, 100)})
    ledger.left(EDGE, 60, b"")
    with pytest.raises(JobFailed, match="more than the ledger's opening line allows"):
        ledger.left(EDGE, 60, b"")
    ledger.left(EDGE, 40, b"")
    with pytest.raises(JobFailed, match="more than"):
        ledger.left(EDGE, 0, b"")
    with pytest.raises(JobFailed, match="no opening line"):
        ledger.left((EDGE[0], "other"), 1, b"")


def test_the_digest_needs_the_key(tmp_path: Path) -> None:
    digests = set()
    for name, key in (("a", bytes(32)), ("b", bytes(31) + b"1")):
        ledger = Ledger(tmp_path / name, key, IDENTITY.sign)
        ledger.open((0, 0), {EDGE: Count(1, 1)})
        ledger.left(EDGE, 1, b"label 0")
        ledger.end("done")
        line = next(line for line in (tmp_path / name).read_text().splitlines() if '"close"' in line)
        digests.add(json.loads(line.partition(" ")[2])["edges"][0]["hmac"])
    assert len(digests) == 2


def test_a_ledger_is_never_written_again(tmp_path: Path) -> None:
    path = written(tmp_path / "ledger.jsonl")
    with pytest.raises(UsageError, match="this job has run here before"):
        Ledger(path, bytes(32), IDENTITY.sign)


class FullDisk:
    def __init__(self, file: Any, room: int) -> None:
        self._file, self._room = file, room

    def write(self, data: bytes) -> int:
        taken = data[: self._room]
        self._room -= len(taken)
        if not taken:
            raise OSError(28, "No space left on device")
        return int(self._file.write(taken))

    def close(self) -> None:
        self._file.close()


@pytest.mark.parametrize("room", [0, 40])
def test_with_a_full_disk_nothing_leaves(tmp_path: Path, room: int) -> None:
    ledger = Ledger(tmp_path / "ledger.jsonl", bytes(32), IDENTITY.sign)
    ledger.line("job", name="thyroid")
    ledger._file = FullDisk(ledger._file, room)  # type: ignore[assignment]
    door = Door("svi", ledger)
    with pytest.raises(JobFailed, match=r"ledger\.jsonl cannot be written .*, so nothing leaves"):
        door.say(Head("svi", "server"), Bye())
    assert door.say(Head("svi", "server"), Fail(Reason.FAULT))  # but the others must hear that this site stops
    ledger._file.close()  # type: ignore[union-attr]
    assert verify(tmp_path / "ledger.jsonl", by(IDENTITY)).lines == 1


# -- the door


def finished(tmp_path: Path, **more: Any) -> tuple[Federation, list[tuple[str, frames.Frame]]]:
    """A run with ledgers, and every frame that crossed with its sender's link."""

    class Listening(Wire):
        def put(self, sender: str, receiver: str, message: bytes) -> None:
            seen.extend((sender, frame) for frame in frames.split(message, sender) if frame.head.sender == sender)
            super().put(sender, receiver, message)

    seen: list[tuple[str, frames.Frame]] = []
    sections = {"evaluation": {"every": 1, "site_scores": True}, "result": {"bottom": "everyone", "trunk": "everyone"}}
    whole = small(job_of(sections, **more), folder=tmp_path)
    whole.run(Listening())
    return whole, seen


@pytest.mark.parametrize("configuration", ["vanilla", "u_shaped"])
def test_ledgers_say_exactly_what_crossed(tmp_path: Path, configuration: str) -> None:
    whole, seen = finished(tmp_path, configuration=configuration)
    for party, assembled in whole.parties.items():
        audit = verify(tmp_path / party / "ledger.jsonl", lambda signature, data: True)
        crossed: dict[tuple[str, str], Count] = {}
        for sender, frame in seen:
            if sender == party and isinstance(frame.message, Letter) and frame.payload:
                post = frame.message.post
                edge = f"{post.kind.name} {post.source.segment} -> {post.target.segment}"
                crossed.setdefault((edge, frame.head.to), Count()).add(1, len(frame.payload))
        assert audit.left == crossed
        assert audit.at_most == {}
        assert audit.head == assembled.ledger.head.hex()
        assert sum(c.nbytes for c in crossed.values()) == assembled.party.cost.bytes_up


def test_the_server_holds_every_site_s_last_head(tmp_path: Path) -> None:
    """Told after the epoch's range was closed: its last ACCOUNT is the head before the job's last lines."""
    whole, _ = finished(tmp_path)
    for site in SIZES:
        told = whole.parties["server"].party.worker.accounts[site].hex()
        chains = [line.split(" ")[0] for line in (tmp_path / site / "ledger.jsonl").read_text().splitlines()]
        assert told in chains
        after = [
            json.loads(line.partition(" ")[2]) for line in (tmp_path / site / "ledger.jsonl").read_text().splitlines()
        ]
        rest = after[chains.index(told) + 1 :]
        assert all(e["edge"].startswith("ACCOUNT") for line in rest for e in line.get("edges", ()))


@pytest.mark.parametrize(
    "training",
    [
        {"configuration": "vanilla"},
        {"configuration": "u_shaped"},
        {"schedule": "half_trained", "half_trained": {"rounds": 2, "local_epochs": 2, "synchronous_epochs": 1}},
        {"clip_norm": 0.2, "micro_batch": 5},
        {"precision": "float16", "dtype": "float32"},
        {"schedule": "averaged"},
        {"schedule": "relay", "relay": {"hand_over": "kept", "turn_batches": 1}},
        {"schedule": "splitfed_v1"},
    ],
)
def test_cost_is_forecast_to_the_byte_and_counted(tmp_path: Path, training: dict[str, Any]) -> None:
    with FlopCounterMode(display=False) as counter:
        assembled_alone = small(job_of(**training))
    beside = counter.get_total_flops()
    with FlopCounterMode(display=False) as counter:
        whole, _ = finished(tmp_path, **training)
    counted_by_torch = counter.get_total_flops() - beside
    assert counted_by_torch == sum(a.party.cost.flops for a in whole.parties.values()) > 0
    assert all(a.party.cost.flops == 0 for a in assembled_alone.parties.values())
    for party, assembled in whole.parties.items():
        session, counted = assembled.party.session, assembled.party.cost
        told = forecast(assembled.party.worker.shapes, party, zip(session.turns, session.nets, strict=True))
        assert (told.flops, told.bytes_up, told.bytes_down) == (counted.flops, counted.bytes_up, counted.bytes_down)
        if party != "server":  # which waits for several at once, in the order in which they come
            assert abs(told.exchanges - counted.exchanges) <= 1
        assert counted.exchanges > 0
        assert counted.flops > 0


def test_flops_are_those_of_the_layers() -> None:
    """Two a multiply-add, forward and weights' gradient; the input's gradient not for the first layer."""
    pieces = small(job_of()).parties["a"].party.worker.shapes.pieces
    bottom = 2 * 6 * 8
    assert (pieces["bottom"].forward, pieces["bottom"].backward) == (bottom, bottom)
    trunk = 2 * (8 * 5 + 5 * 3)
    assert (pieces["trunk"].forward, pieces["trunk"].backward) == (trunk, 2 * trunk)


def test_nothing_leaves_that_was_not_agreed() -> None:
    whole = small(job_of())
    party = whole.parties["a"].party
    letter = Letter(0, Post(LetterKind.ACTIVATIONS, Copy("bottom", "a"), Copy("trunk")))
    with pytest.raises(JobFailed, match="nothing was agreed"):
        party.door.send(Head("a", "server"), letter, {"x": torch.zeros(1)})
    whole.run()
    turn = next(n for n, t in enumerate(party.session.turns) if t.train and t.rows[0]["a"])
    letter = msgspec.structs.replace(letter, turn=turn)
    for tensors in ({"x": torch.zeros(99, 8)}, {}, {"x": torch.zeros(1, 8, dtype=torch.float32)}):
        with pytest.raises(JobFailed, match="is not what the plan says"):
            party.door.send(Head("a", "server"), letter, tensors)
    rows = party.session.turns[turn].rows[0]["a"]
    with pytest.raises(JobFailed, match="NaN"):
        party.door.send(Head("a", "server"), letter, {"x": torch.full((rows, 8), torch.nan, dtype=torch.float64)})
