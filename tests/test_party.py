"""Parties among peers that lie, alter and mix up, and policies that refuse: one clear line, the right party blamed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest
import torch

from federations import SIZES, bits, job_of, small
from partway.errors import JobFailed, PartwayError, PeerError, Refused
from partway.outcome import result_of
from partway.plan.plan import Copy
from partway.plan.schedules import SCHEDULES
from partway.protocol.messages import Counts, Hello, Letter, LetterKind, Message, Ready
from partway.simulation import SERVER, Federation, permissive, together
from partway.transport.memory import Wire
from partway.wire import frames
from partway.wire.frames import Frame

Change = Callable[[Frame], bytes | None]
"""What becomes of a frame on its way: other bytes, or None to leave it alone."""


class Meddler(Wire):
    """A wire on which the first frame that `change` has an answer for is exchanged."""

    def __init__(self, change: Change) -> None:
        super().__init__()
        self._change: Change | None = change

    def put(self, sender: str, receiver: str, message: bytes) -> None:
        out = []
        for frame in frames.split(message, sender):
            other = self._change(frame) if self._change else None
            if other is not None:
                self._change = None
            out.append(bytes(frame.data) if other is None else other)
        super().put(sender, receiver, b"".join(out))

    @property
    def meddled(self) -> bool:
        return self._change is None


def ends(whole: Federation, wire: Wire) -> dict[str, PartwayError]:
    """Runs on after a party has failed, until nothing moves; who failed, and why."""
    failed: dict[str, PartwayError] = {}

    def post(party: str, out) -> None:
        try:
            for link, made in out:
                if made:
                    wire.put(party, link, b"".join(made))
        except PartwayError as error:
            failed[party] = error

    for name, assembled in whole.parties.items():
        post(name, assembled.party.start())
    while (taken := wire.take()) is not None:
        sender, receiver, message = taken
        for frame in frames.split(message, sender):
            if receiver == SERVER and frame.head.to != SERVER:
                wire.put(SERVER, frame.head.to, bytes(frame.data))
            elif receiver not in failed:
                post(receiver, whole.parties[receiver].party.receive(sender, frame))
    return failed


def letter(kind: LetterKind, sender: str, tensors: Callable[[dict], dict]) -> Change:
    """Other tensors in the first letter of a kind from a sender."""

    def change(frame: Frame) -> bytes | None:
        message = frame.message
        if frame.head.sender == sender and isinstance(message, Letter) and message.post.kind is kind:
            return frames.encode(frame.head, message, tensors(frame.tensors()))
        return None

    return change


def said(kind: type[Message], sender: str, **fields: object) -> Change:
    """Other fields in the first message of a kind from a sender."""

    def change(frame: Frame) -> bytes | None:
        if frame.head.sender == sender and isinstance(frame.message, kind):
            return frames.encode(frame.head, msgspec.structs.replace(frame.message, **fields))
        return None

    return change


def nan(tensors: dict) -> dict:
    tensors["x"][0] = torch.nan
    return tensors


@pytest.mark.parametrize(
    ("change", "notices", "words"),
    [
        (letter(LetterKind.ACTIVATIONS, "b", nan), "server", "b: sent ACTIVATIONS bottom@b -> trunk with NaN"),
        (letter(LetterKind.GRADIENT, "server", nan), "a", "server: sent GRADIENT trunk -> bottom@a with NaN"),
        (
            letter(LetterKind.ACTIVATIONS, "b", lambda t: {"x": t["x"][:, :-1]}),
            "server",
            r"b: sent .* due is x float64",
        ),
        (letter(LetterKind.ACTIVATIONS, "b", lambda t: {"x": t["x"].float()}), "server", "x float32"),
        (letter(LetterKind.ACTIVATIONS, "b", lambda t: {"y": t["x"]}), "server", "y float64"),
        (letter(LetterKind.ACTIVATIONS, "b", lambda t: t | {"z": t["x"]}), "server", "z float64"),
        (letter(LetterKind.LABELS, "b", lambda t: {}), "server", "b: sent LABELS .* as nothing"),
        (letter(LetterKind.SHARE, "b", lambda t: {"x": t["x"][1:]}), "server", "b: sent SHARE"),
        (letter(LetterKind.STATE, "a", lambda t: {"sealed": t["sealed"].flip(0)}), "b", "a: .* does not open"),
        (said(Hello, "b", signature=bytes(70)), "a", "b: sent a HELLO that its key did not sign"),
        (said(Hello, "b", records=Counts(25, 12, 21)), "a", "would run other turns, or has heard other HELLOs"),
        (said(Hello, "b", public=bytes(32)), "a", "b: sent a HELLO that its key did not sign"),
        (said(Hello, "b", certificate_key=b"another"), "a", "b: has another key than the job's roster says"),
        (said(Hello, "b", version="9.9"), "a", r"b: runs Partway 9\.9, a runs .*: install the same version"),
        (said(Ready, "b", signature=bytes(70)), "a", "b: sent a READY that its key did not sign"),
        (said(Ready, "b", confirmation=bytes(32)), "a", "b: holds another group key"),
    ],
)
def test_who_lies_is_named_and_the_others_hear_of_it(change: Change, notices: str, words: str) -> None:
    whole, wire = small(job_of()), Meddler(change)
    failed = ends(whole, wire)
    assert wire.meddled
    assert set(failed) == {*SIZES, "server"}
    with pytest.raises(PeerError, match=words):
        raise failed[notices]
    others = [error for party, error in failed.items() if party != notices]
    assert any("gave up because" in str(error) or isinstance(error, PeerError) for error in others)


def test_a_total_that_only_one_site_got_otherwise_is_found_at_the_epoch_s_end() -> None:
    def other_sum(frame: Frame) -> bytes | None:
        message = frame.message
        if frame.head.to == "d" and isinstance(message, Letter) and message.post.kind is LetterKind.SUM:
            tensors = frame.tensors()
            tensors["x"][0] += 1 << 40
            return frames.encode(frame.head, message, tensors)
        return None

    failed = ends(small(job_of()), Meddler(other_sum))
    assert any("sites' copies have come apart" in str(error) for error in failed.values())


def test_the_same_frame_twice_is_nothing() -> None:
    quiet, whole = small(job_of()), small(job_of())
    quiet.run()
    whole.run(Meddler(lambda f: bytes(f.data) * 2 if isinstance(f.message, Letter) else None))
    assert bits(whole) == bits(quiet)


def test_links_are_checked() -> None:
    whole = small(job_of())
    greeting = frames.decode(next(iter(whole.parties["b"].party.start()))[1][0], "b")

    def to(party: str) -> Frame:
        head = msgspec.structs.replace(greeting.head, to=party)
        return frames.decode(frames.encode(head, greeting.message), "b")

    for party, link, words in (
        (SERVER, "a", "a: speaks for b"),
        ("c", "b", "b: is no neighbour of c"),
        ("d", SERVER, "handed d a message for c"),
    ):
        with pytest.raises(PeerError, match=words):
            list(whole.parties[party].party.receive(link, to("c" if party == "d" else party)))


# -- policies


def refused(reason: str, sizes: dict[str, int] = SIZES, job=None, party: str = "a", **policy) -> str:
    """Party a's policy; everybody stops, and the others hear only the enum."""
    job = job or job_of()
    strict = msgspec.structs.replace(permissive(job.network.build), **policy)
    whole = small(job, sizes, policies={party: strict})
    failed = ends(whole, Wire())
    assert set(failed) == set(whole.parties)
    for name, error in failed.items():
        assert isinstance(error, Refused)
        assert error.exit_code == 3
        assert reason in error.reasons
        if name != party:
            assert str(error) == f"{party} refuses the job: {error.reasons[0]}; its own log has the words"
    assert not any(a.party.worker.losses for a in whole.parties.values())
    return str(failed[party])


def test_labels_stay_where_the_policy_says_so() -> None:
    words = refused("LABELS", labels_may_leave=False)
    assert "a u_shaped job keeps them here" in words
    u_shaped = job_of(configuration="u_shaped")
    strict = msgspec.structs.replace(permissive(u_shaped.network.build), labels_may_leave=False)
    small(u_shaped, policies=dict.fromkeys(SIZES, strict)).run()


@pytest.mark.parametrize(
    ("policy", "reason", "words"),
    [
        ({"widest_cut": 7}, "WIDTH", "8 numbers a record would leave"),
        ({"most_flops": 10}, "NETWORK_SIZE", "FLOPs a record here"),
        ({"least_sites": 6}, "SITES", "a sum over 5 sites"),
        ({"solvable_sums": False}, "RECORDS", "14 are needed: use [training] batch = "),
        ({"least_records_in_sum": 200}, "RECORDS", "too few records for it at any batch"),
        ({"least_records_in_counts": 10_000}, "EVALUATION", "counts over 100 records"),
    ],
)
def test_a_policy_s_numbers(policy: dict, reason: str, words: str) -> None:
    assert words in refused(reason, **policy)


def test_the_batch_that_is_advised_holds_and_a_smaller_one_does_not() -> None:
    sizes = {"a": 60, "b": 50, "c": 40}
    strict = msgspec.structs.replace(permissive("partway.model.zoo:mlp"), solvable_sums=False)

    def run(batch: int) -> None:
        small(job_of(batch=batch, epochs=1), sizes, policies={"a": strict}).run()

    with pytest.raises(Refused) as caught:
        run(10)
    advised = int(str(caught.value).rpartition("batch = ")[2].split()[0])
    run(advised)
    with pytest.raises(Refused):
        run(advised - 1)


def test_what_may_be_handed_on() -> None:
    everything = job_of({"result": {"bottom": "everyone", "trunk": "everyone"}})
    assert "server would hold the bottom" in refused("RESULT", job=everything, bottom_to_everyone=False)
    words = refused("RESULT", job=everything, party="server", trunk_to_everyone=False)
    assert "the trunk would travel to the sites" in words
    own = job_of({"evaluation": {"site_scores": True}})
    assert "own scores would leave" in refused("SCORES", job=own, scores_may_leave=False)


@pytest.mark.parametrize(
    ("policy", "words"),
    [
        ({"operators": ["somebody"]}, "operator simulate is not in [policy] operators"),
        ({"networks": []}, "network partway.model.zoo:mlp is not in [policy] networks"),
        ({"most_epochs": 1}, "2 epochs; [policy] most_epochs is 1"),
        ({"sites": {"b": "0" * 64}}, "site c is not in [policy] sites"),
        ({"most_parameters": 10}, "at most 10 are allowed"),
    ],
)
def test_a_job_is_judged_before_anything_is_built(policy: dict, words: str) -> None:
    with pytest.raises(Refused) as caught:
        small(job_of(), policies={"a": msgspec.structs.replace(permissive("partway.model.zoo:mlp"), **policy)})
    assert words in str(caught.value)


def test_sums_in_the_clear_must_be_allowed() -> None:
    strict = msgspec.structs.replace(permissive("partway.model.zoo:mlp"), clear_sums=False)
    with pytest.raises(Refused, match="added in the clear"):
        small(job_of(sums="clear"), policies={"a": strict})


def test_all_objections_come_at_once() -> None:
    words = refused("WIDTH", labels_may_leave=False, widest_cut=2, most_flops=1, least_sites=6)
    assert all(part in words for part in ("labels would leave", "8 numbers a record", "FLOPs", "over 5 sites"))


# -- who holds what


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_who_holds_what_at_the_end(schedule: str) -> None:
    """With an evaluation, for which the trunk visits the sites: they do not keep it."""
    local = {"rounds": 1, "local_epochs": 1}
    whole = small(job_of({"evaluation": {"every": 1}}, schedule=schedule, half_trained=local))
    whole.run()
    own, server = (result_of(whole.parties[p], 0.0) for p in ("a", "server"))
    gated = schedule == "private"  # the server keeps both networks, and the sites what they have chosen
    assert own.weights.keys() == {"hidden.0.weight", "hidden.0.bias"}
    trunk = [name for name in whole.parties["a"].network.whole.state_dict() if not name.startswith("hidden.0")]
    assert server.weights.keys() == {*trunk, *(f"shared.{name}" for name in trunk if gated)}
    assert own.holds["a"] == ["bottom"]
    assert own.holds["server"] == ["trunk"]


def test_who_holds_what_is_told(tmp_path: Path) -> None:
    terms = job_of({"result": {"bottom": "sites", "trunk": "server"}})
    whole = small(terms, folder=tmp_path)
    whole.run()
    result = together(whole, 0.0)
    assert result.holds == {"server": ["trunk"]} | {site: ["bottom"] for site in SIZES}
    own, server = (result_of(whole.parties[p], 0.0) for p in ("a", "server"))
    assert not own.whole
    assert set(own.weights).isdisjoint(server.weights)
    shared = small(job_of({"result": {"trunk": "everyone", "bottom": "everyone"}}))
    shared.run()
    for party in ("a", "server"):
        assert result_of(shared.parties[party], 0.0).whole


def test_a_site_that_waits_says_for_whom() -> None:
    whole = small(job_of())
    wire = Wire()
    for name, assembled in whole.parties.items():
        for link, made in assembled.party.start():
            if name != "c":
                wire.put(name, link, b"".join(made))
    while (taken := wire.take()) is not None:
        sender, receiver, message = taken
        for frame in frames.split(message, sender):
            if receiver == SERVER and frame.head.to != SERVER:
                wire.put(SERVER, frame.head.to, bytes(frame.data))
            elif receiver != "c":
                list(whole.parties[receiver].party.receive(sender, frame))
    assert whole.parties["a"].party.session.waits_for() == ["c"]


def test_nothing_that_stands_still_is_called_done() -> None:
    class Lossy(Wire):
        def put(self, sender: str, receiver: str, message: bytes) -> None:
            if sender != "d":
                super().put(sender, receiver, message)

    with pytest.raises(JobFailed, match="a waits for d"):
        small(job_of()).run(Lossy())


def test_copies_are_named_as_people_would() -> None:
    assert (str(Copy("bottom", "a")), str(Copy("trunk"))) == ("bottom@a", "trunk")
