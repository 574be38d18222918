"""A server and sites as real processes, over mutual TLS, on real records; each of them killed, stopped and refused."""

from __future__ import annotations

import asyncio
import copy
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from leaks import found
from partway import pki
from partway.assembly import network_of, schemas_of
from partway.config import Policy, read_job
from partway.data import thyroid
from partway.data.records import statistics_of
from partway.equality import plain_run
from partway.errors import JobFailed, PartwayError, Refused, TrustError, UsageError
from partway.ledger import verify
from partway.local import SERVER, LocalFederation, Ran, toml
from partway.pretrained import split
from partway.protocol.messages import ANYBODY, Bye, Greet, Head
from partway.transport.grpc import ClientLink, Credentials, call
from partway.wire import frames

NETWORK = {
    "build": "partway.model.zoo:mlp",
    "arguments": {"inputs": 29, "hidden": [64, 16, 128, 64], "classes": 7},
    "cut": ["hidden.2"],
}
ADAM, MOMENTUM = {"name": "adam", "lr": 3e-3}, {"name": "sgd", "lr": 0.05, "momentum": 0.9}
TERMS = {"bottom": "sites", "trunk": "everyone"}


def job(**sections: Any) -> dict[str, dict[str, Any]]:
    """A thyroid job; sections given are merged over its own."""
    words: dict[str, dict[str, Any]] = {"job": {"name": "thyroid"}, "network": NETWORK, "evaluation": {"every": 0}}
    return words | {name: {**words.get(name, {}), **more} for name, more in sections.items()}


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    paths = thyroid.write_sites(tmp_path_factory.mktemp("records"))
    return {path.name.removesuffix(".csv.gz"): path for path in paths}


@pytest.fixture(scope="module")
def federation(records: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalFederation]:
    """Five sites that run for all tests of this file which leave them running."""
    folder = tmp_path_factory.mktemp("federation")
    with LocalFederation(folder, records, {"most_releases": 2}, silence=5) as running:
        running.start()
        yield running


# -- weights of elsewhere


def test_each_party_starts_from_its_own_part_of_weights_of_elsewhere(
    federation: LocalFederation, tmp_path: Path
) -> None:
    """The bottom stays as it came; who has no such file says so, and the operator hears it."""
    torch.manual_seed(3)
    shapes = {"hidden.0": (64, 29), "hidden.2": (16, 64), "hidden.4": (128, 16)}
    tensors = {f"{name}.weight": torch.randn(shape) / 10 for name, shape in shapes.items()}
    save_file(tensors, tmp_path / "elsewhere.safetensors")
    plain = read_job(toml(job()))
    parts = split(plain, schemas_of(plain), tmp_path / "elsewhere.safetensors", tmp_path / "weights")
    network = {**NETWORK, "frozen": ["bottom"], "weights": {part.segment: part.digest for part in parts}}
    words = job(network=network, training={"epochs": 1}, result=TERMS)
    with pytest.raises(Refused, match=r"weights of the trunk, .* put the file"):
        federation.run(words)
    for party in (SERVER, *federation.sites):
        home = federation.folder / party / "weights"
        home.mkdir()
        for part in parts:
            if part.segment == ("trunk" if party == SERVER else "bottom"):
                shutil.copy(part.file, home)
    (lost,) = (federation.folder / "svi" / "weights").iterdir()
    kept = lost.rename(tmp_path / lost.name)
    with pytest.raises(Refused, match="svi refuses the job: WEIGHTS"):
        federation.run({**words, "job": {"name": "thyroid-lost"}})
    kept.rename(lost)
    ran = federation.run({**words, "job": {"name": "thyroid-again"}})
    for party, folder in ran.folders.items():
        held = load_file(folder / ("segments.safetensors" if party == SERVER else "network.safetensors"))
        for name in ("hidden.0.weight", "hidden.2.weight"):
            assert party == SERVER or torch.equal(held[name], tensors[name])
        assert not torch.equal(held["hidden.4.weight"], tensors["hidden.4.weight"])


# -- equality


def pooled(running: LocalFederation, ran: Ran, *, other_order: bool = False) -> dict[str, torch.Tensor]:
    """One plain loop over the pooled records, standardised together, from the secrets of the processes."""
    parsed = read_job(running_job(ran))
    secrets = {party: running.secret(party) for party in (SERVER, *parsed.sites)}
    records = thyroid.bundled(parsed.job.seed)
    network, _ = plain_run(parsed, ran.digest, secrets, records, other_order=other_order)
    return network.state_dict()


def running_job(ran: Ran) -> bytes:
    return pki.open_job(
        (ran.folders[SERVER] / "job.signed").read_bytes(),
        (ran.folders[SERVER].parent.parent / "identity" / "authority.pem").read_bytes(),
    ).toml


HALF = {"rounds": 2, "local_epochs": 2}
SETTINGS: dict[str, dict[str, Any]] = {
    "vanilla": {"epochs": 10},
    "u_shaped": {"epochs": 10, "configuration": "u_shaped"},
    "half_trained": {"epochs": 3, "schedule": "half_trained", "batch": 64, "half_trained": HALF},
}


@pytest.mark.parametrize("optimizer", [ADAM, MOMENTUM], ids=["adam", "momentum"])
@pytest.mark.parametrize("settings", SETTINGS)
def test_equals_the_plain_run(federation: LocalFederation, settings: str, optimizer: dict) -> None:
    """200 steps in float64 over TLS, blind sums on, on all five sites' records; every party's own file is compared."""
    network = {**NETWORK, "cut": ["hidden.2", "hidden.7"]} if settings == "u_shaped" else NETWORK
    training = {**SETTINGS[settings], "optimizer": optimizer, "dtype": "float64"}
    evaluation = {"every": int(settings == "half_trained")}
    terms = {"bottom": "sites", "trunk": "everyone"}
    ran = federation.run(job(network=network, training=training, evaluation=evaluation, result=terms))
    assert ran.status.steps >= 200
    expected, other = pooled(federation, ran), pooled(federation, ran, other_order=True)
    names: set[str] = set()
    for party, folder in ran.folders.items():
        whole = "network" if party != SERVER else "segments"
        held = load_file(folder / f"{whole}.safetensors")
        names |= held.keys()
        assert max(float((held[n] - expected[n]).abs().max()) for n in held) < 1e-10, party
        assert max(float((held[n] - other[n]).abs().max()) for n in held) > 1e-3
    assert names == expected.keys()


# -- what a run leaves


@pytest.fixture(scope="module")
def ran(federation: LocalFederation) -> Ran:
    terms = {"result": TERMS, "evaluation": {"every": 1, "site_scores": True}, "training": {"epochs": 3}}
    return federation.run(job(**terms))


def test_both_ends_of_every_link_count_the_same_bytes(federation: LocalFederation, ran: Ran) -> None:
    status = federation.ask("status", ran.status.id.encode())
    at_server = json.loads(status)
    for site in federation.sites:
        federation.wait_for_state(site, "done")
        said = federation.processes[site].said
        assert said["bytes_sent"] == at_server["bytes_received"][site]
        assert said["bytes_received"] == at_server["bytes_sent"][site]


def test_every_party_leaves_its_account(federation: LocalFederation, ran: Ran) -> None:
    at_server = ran.result(SERVER)
    assert json.loads(ran.files["result.json"]) == at_server
    assert set(ran.files) == {"result.json", "segments.safetensors"}
    assert len(at_server["validation"]) == 3
    assert at_server["holds"]["svi"] == ["bottom", "trunk"]
    for site in federation.sites:
        own = ran.result(site)
        assert own["all"] == at_server["all"]
        assert own["sites"][site] == at_server["sites"][site]
        assert own["whole"]
        ledger = ran.folders[site] / "ledger.jsonl"
        identity = pki.Identity.load(federation.folder / site / "identity")
        audit = verify(ledger, lambda s, d, key=identity.key_der: pki.signed_by(key, s, d))  # type: ignore[misc]
        assert audit.outcome == "done"
        assert own["ledgers"][site] == audit.head
        assert sum(c.nbytes for c in audit.left.values()) == own["cost"][site]["bytes_up"]
        assert at_server["ledgers"][site] in ledger.read_text()
    assert at_server["all"]["records"] == sum(own["records"] for own in at_server["sites"].values()) == 3165


def test_the_whole_network_at_a_site_gives_its_scores(federation: LocalFederation, ran: Ran) -> None:
    from partway.train import metrics

    parsed = read_job(running_job(ran))
    network = network_of(parsed, Policy(networks=[parsed.network.build]), thyroid.SCHEMA).whole
    network.load_state_dict(load_file(ran.folders["svi"] / "network.safetensors"))
    records = thyroid.bundled(0)
    x = records["svi"].scaled(*statistics_of(records.values())).float()
    test = records["svi"].division["test"]
    with torch.no_grad():
        scores = metrics.scores(network(x[test]), records["svi"].labels[test])
    assert scores.macro_auc == pytest.approx(ran.result("svi")["sites"]["svi"]["macro_auc"], abs=1e-6)


def test_no_record_leaves_a_real_site(records: dict[str, Path], tmp_path: Path) -> None:
    with LocalFederation(tmp_path / "federation", records) as running:
        running.start_server()
        taps = {}
        for site in running.sites:
            taps[site] = tmp_path / f"{site}.bin"
            code = [sys.executable, str(Path(__file__).parent / "tapped_site.py")]
            running.start_site(site, [*code, str(running.folder / site / "site.toml"), str(taps[site])])
        done = running.run(job(training={"epochs": 1}, evaluation={"every": 1, "site_scores": True}))
        bundled = thyroid.bundled(0)
        mean, deviation = statistics_of(bundled.values())
    for site, own in bundled.items():
        plain = [taps[site].read_bytes()]
        assert len(plain[0]) == done.result(site)["cost"][site]["bytes_up"] - 28 * sealed_letters(done, site)
        for rows in (own.features, own.scaled(mean, deviation)):
            assert found(rows.numpy(), plain) == 0


def sealed_letters(done: Ran, site: str) -> int:
    lines = lines_of(done.folders[site] / "ledger.jsonl")
    edges = [edge for line in lines if line["kind"] == "close" for edge in line["edges"]]
    return sum(edge["frames"] for edge in edges if edge["to"] != SERVER)


# -- refusals, at a federation that stays up


def test_a_site_that_refuses(federation: LocalFederation) -> None:
    long = job(training={"epochs": 101})
    with pytest.raises(Refused, match=r"refuses the job: EPOCHS; its own log has the words"):
        federation.run(long)
    status = json.loads(federation.ask("list", b""))[-1]
    assert (status["state"], status["exit_code"]) == ("refused", 3)
    logs = [p for s in federation.sites for p in (federation.folder / s / "runs").rglob("failures.log")]
    assert any("101 epochs; [policy] most_epochs is 100" in log.read_text() for log in logs)
    assert "101" not in status["message"]


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"network": {"build": "partway.model.zoo:nothing"}}, Refused, "is not in .policy. networks"),
        ({"network": {"build": "os:system"}}, Refused, "is not in .policy. networks"),
        ({"network": {"cut": ["hidden.99"]}}, PartwayError, "no module `hidden.99`; .* it can be cut after hidden.0,"),
        ({"network": {"arguments": {"inputs": 28, "hidden": [8], "classes": 7}}}, PartwayError, "takes no records"),
        ({"network": {"arguments": {"inputs": 29, "hidden": [8, 8], "classes": 6}}}, PartwayError, "7 classes"),
        ({"training": {"batch": 8}}, Refused, "RECORDS"),
        ({"training": {"sums": "clear"}}, Refused, "CLEAR_SUM"),
        ({"result": {"bottom": "everyone"}}, Refused, "RESULT"),
        ({"roster": {"svi": "0" * 64}}, Refused, "connected with another key"),
    ],
)
def test_jobs_that_cannot_run(federation: LocalFederation, change: dict, error: type, words: str) -> None:
    with pytest.raises(error, match=words):
        federation.run(job(**change))
    federation.run(job(training={"epochs": 1}))  # and everybody is still there


def test_the_same_signed_job_again(federation: LocalFederation) -> None:
    signed = federation.sign(job(training={"epochs": 1}))
    status = federation.submit(signed)
    with pytest.raises(UsageError, match=f"was submitted before, as {status.id}"):
        federation.submit(signed)
    ended(federation, status.id)


def ended(running: LocalFederation, number: str, seconds: float = 60) -> dict[str, Any]:
    """A job's status once it has ended."""
    until = time.monotonic() + seconds
    while True:
        status: dict[str, Any] = json.loads(running.ask("status", number.encode()))
        if status["state"] not in ("waiting", "running"):
            return status
        assert time.monotonic() < until, status
        time.sleep(0.05)


def test_a_job_altered_after_signing(federation: LocalFederation) -> None:
    signed = federation.sign(job()).replace(b"thyroid", b"xhyroid")
    with pytest.raises(TrustError, match="altered after study-office had signed it"):
        federation.submit(signed)


def test_an_operator_of_another_federation(federation: LocalFederation) -> None:
    stranger = pki.Authority.create("another").admit("study-office", pki.Role.OPERATOR)
    signed = pki.sign_job(stranger, toml(job(roster=dict.fromkeys(federation.sites, "0" * 64))).encode())
    with pytest.raises(TrustError, match="another federation"):
        federation.submit(signed)
    believed = pki.Identity.load(federation.folder / "study-office" / "identity").authority_pem
    with pytest.raises(PartwayError, match="is our certificate of its federation"):
        call(federation.address, Credentials(stranger.certificate_pem, stranger.key_pem, believed), "list", b"", 10)


def credentials(running: LocalFederation, party: str) -> Credentials:
    me = pki.Identity.load(running.folder / party / "identity")
    return Credentials(me.certificate_pem, me.key_pem, me.authority_pem)


def test_a_certificate_of_the_wrong_role(federation: LocalFederation) -> None:
    with pytest.raises(TrustError, match="svi is a site; only operators"):
        call(federation.address, credentials(federation, "svi"), "list", b"", 10)
    with pytest.raises(TrustError, match="study-office is an operator; only sites open a stream"):
        asyncio.run(greet(federation, "study-office", "study-office"))


async def greet(running: LocalFederation, party: str, says: str, version: str = "9.9", message: Any = None) -> None:
    """Opens a stream and says something; raises what the server answers."""
    link = ClientLink(running.address, credentials(running, party), 20)
    try:
        await link.send(frames.encode(Head(says, ANYBODY), message or Greet(version)))
        await link.receive()
    finally:
        await link.close()


def test_a_site_that_is_connected_already(federation: LocalFederation) -> None:
    with pytest.raises(UsageError, match="svi is connected already"):
        asyncio.run(greet(federation, "svi", "svi"))


def test_another_version_of_partway(records: dict[str, Path], tmp_path: Path) -> None:
    with LocalFederation(tmp_path, {"svi": records["svi"]}) as running:
        running.start_server()
        with pytest.raises(UsageError, match=r"svi runs Partway 9\.9, server 0\.1\.0: install the same version"):
            asyncio.run(greet(running, "svi", "svi"))
        with pytest.raises(PartwayError, match="svi: has not greeted"):
            asyncio.run(greet(running, "svi", "svi", message=Bye()))
        with pytest.raises(PartwayError, match="svi: speaks for other"):
            asyncio.run(greet(running, "svi", "other"))
        with pytest.raises(PartwayError, match="no frame"):
            asyncio.run(nonsense(running))


async def nonsense(running: LocalFederation) -> None:
    link = ClientLink(running.address, credentials(running, "svi"), 20)
    try:
        await link.send(b"nonsense")
        await link.receive()
    finally:
        await link.close()


def test_somebody_else_s_jobs_are_not_there(federation: LocalFederation) -> None:
    for method in ("status", "stop", "download"):
        with pytest.raises(UsageError, match="study-office has no job 0123456789ab"):
            federation.ask(method, b"0123456789ab")


def test_stopped_by_its_operator(federation: LocalFederation) -> None:
    status = federation.submit(federation.sign(job(training={"epochs": 100})))
    until(federation, status.id, step=5)
    federation.ask("stop", status.id.encode())
    assert ended(federation, status.id)["state"] == "stopped"
    with pytest.raises(UsageError, match="has no result"):
        federation.ask("download", status.id.encode())
    with pytest.raises(UsageError, match="has ended: stopped"):
        federation.ask("stop", status.id.encode())
    folder = federation.folder / SERVER / "runs" / f"thyroid-{status.id}"
    assert not (folder / "result.json").exists()
    for site in federation.sites:
        federation.wait_for_state(site, "failed")
        assert "server gave up: STOPPED" in federation.processes[site].said["message"]
    federation.run(job(training={"epochs": 1}))


def until(running: LocalFederation, number: str, step: int) -> None:
    """Waits until a job has made so many steps."""
    while json.loads(running.ask("status", number.encode()))["step"] < step:
        time.sleep(0.05)


def test_a_job_for_a_site_that_is_not_there_waits_and_can_be_stopped(federation: LocalFederation) -> None:
    fingerprints = {**federation.fingerprints, "absent": "0" * 64}
    roster = {site: fingerprints[site] for site in (*federation.sites, "absent")}
    status = federation.submit(federation.sign(job(roster=roster)))
    while not (told := json.loads(federation.ask("status", status.id.encode())))["waits_for"]:
        time.sleep(0.05)
    assert told["waits_for"] == ["absent"]
    federation.ask("stop", status.id.encode())
    assert ended(federation, status.id)["state"] == "stopped"


# -- a schema of one's own, and files that do not fit it

OWN = """
[schema]
name = "own"
label = "outcome"
[classes]
well = ["well"]
ill = ["ill"]
[columns]
x = { kind = "numeric", unit = "mmol/l", range = [0, 9] }
y = { kind = "category", values = ["a", "b"] }
"""
OWN_JOB = {
    "job": {"name": "own"},
    "network": NETWORK | {"arguments": {"inputs": 3, "hidden": [8, 4, 8], "classes": 2}},
    "records": {"schema": "own.toml"},
    "training": {"epochs": 2, "batch": 64},
    "evaluation": {"every": 0},
}


def own_file(path: Path, lines: int = 120, *more: str) -> Path:
    rows = [f"{n % 10},{'ab'[n % 2]},{'ill' if n % 10 > 4 else 'well'}" for n in range(lines)]
    path.write_text("\n".join(["x,y,outcome", *rows, *more]))
    return path


@pytest.fixture
def own(tmp_path: Path) -> Iterator[LocalFederation]:
    """Three sites, of which nothing is started yet."""
    files = {site: own_file(tmp_path / f"{site}.csv") for site in ("north", "south", "west")}
    with LocalFederation(tmp_path / "federation", files, {"solvable_sums": True}) as running:
        yield running


def test_files_that_do_not_fit_are_told_of_all_sites_at_once(own: LocalFederation, tmp_path: Path) -> None:
    """The schema comes with the signed job; each fault is told with site and column, and no value leaves."""
    own.start()
    ran = own.run(OWN_JOB, schema=OWN)
    assert ran.result("west")["job"]["columns"]["schema"]["name"] == "own"
    own.stop()
    north = own.folder / "north" / "site.toml"
    north.write_text(north.read_text().replace("[data]", '[data]\nunits = { x = "mg/dl" }'))
    own_file(tmp_path / "west.csv", 120, "987654321,q,vanished")
    for site in (SERVER, *own.sites):  # all listen at the port that the server has found free
        file = own.folder / site / ("server.toml" if site == SERVER else "site.toml")
        file.write_text(file.read_text().replace(f'"{own.address}"', '"localhost:0"'))
    own.start()
    signed = tmp_path / "job.signed"
    signed.write_bytes(own.sign(OWN_JOB, OWN))
    office = ["--server", own.address, "--identity", str(own.folder / "study-office" / "identity")]
    out, _ = partway("job", "submit", str(signed), *office, "--wait", "--json", expect=2)
    status = json.loads(out)
    assert status["state"] == "failed"
    assert status["message"] == (
        "north: column x: another unit; "
        "west: column outcome: an unknown class, column x: a value outside the range, column y: another category"
    )
    own.wait_for_state("south", "failed")
    assert own.processes["south"].said["message"] == (
        "server gave up: some site's records do not fit the job; its operator is told in what"
    )
    (log,) = (own.folder / "west" / "runs").glob(f"own-{status['id']}/failures.log")
    words = log.read_text()
    assert "column x: line 122: '987654321' is not in 0 to 9; column y: line 122: 'q' is none of a, b" in words
    for file in (own.folder / SERVER).rglob("*"):
        if file.is_file():
            assert not any(word in file.read_bytes() for word in (b"987654321", b"vanished", b"mg/dl"))


def test_one_site_that_refuses_is_told_to_all(own: LocalFederation) -> None:
    west = own.folder / "west" / "site.toml"
    west.write_text(west.read_text().replace("labels_may_leave = true", "most_epochs = 1"))
    own.start()
    with pytest.raises(Refused, match="west refuses the job: EPOCHS"):
        own.run(OWN_JOB, schema=OWN)
    for site in ("north", "south"):
        own.wait_for_state(site, "refused")
        assert "west refuses the job: EPOCHS" in own.processes[site].said["message"]


# -- processes that end in the middle


@pytest.fixture
def three(records: dict[str, Path], tmp_path: Path) -> Iterator[tuple[LocalFederation, str]]:
    """A federation of three sites in the middle of a job."""
    chosen = {site: records[site] for site in ("svi", "svhc", "stmw")}
    with LocalFederation(tmp_path, chosen, {"solvable_sums": True, "least_records_in_sum": 1}, silence=3) as running:
        running.start()
        status = running.submit(running.sign(job(training={"epochs": 90})))
        until(running, status.id, step=20)
        yield running, status.id


def lines_of(ledger: Path) -> list[dict[str, Any]]:
    *lines, _cut_off = ledger.read_text().split("\n")
    return [json.loads(line.partition(" ")[2]) for line in lines]


def nothing_half_written(running: LocalFederation) -> None:
    for party in (SERVER, *running.sites):
        left = {path.name for path in (running.folder / party / "runs").rglob("*") if path.is_file()}
        assert not [name for name in left if name.endswith((".part", ".safetensors")) or name == "result.json"], left


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP, signal.SIGTERM])
def test_a_site_ends_in_the_middle(three: tuple[LocalFederation, str], how: signal.Signals) -> None:
    running, number = three
    began = time.monotonic()
    running.processes["svhc"].popen.send_signal(how)
    status = ended(running, number)
    assert time.monotonic() - began < 15  # on a busy machine; 30 s of silence are the default
    assert (status["state"], status["exit_code"]) == ("failed", 1)
    assert status["message"].startswith(
        "svhc gave up: STOPPED" if how == signal.SIGTERM else "svhc: its connection is gone"
    )
    for site in ("svi", "stmw"):
        running.wait_for_state(site, "failed")
        assert "svhc" in running.processes[site].said["message"]
    if how == signal.SIGTERM:
        svhc = running.processes["svhc"].popen
        assert svhc.wait(10) == 1
        assert running.processes["svhc"].said["state"] == "stopped"
    nothing_half_written(running)
    ledger = next((running.folder / "svhc" / "runs").rglob("ledger.jsonl"))
    audit = verify(ledger, lambda signature, data: True)
    assert audit.outcome == ("stopped" if how == signal.SIGTERM else None)
    ranges = [line for line in lines_of(ledger) if line["kind"] in ("open", "close")]
    cut_off = ranges[-1]["kind"] == "open"  # or it ended between two ranges, and all that left is told
    assert bool(audit.at_most) == cut_off
    assert not (cut_off and how == signal.SIGTERM)


def released(running: LocalFederation, number: str) -> None:
    """Waits until the server trains on what all sites have released."""
    local = 2 * 2 * -(-1313 // 64)
    until(running, number, step=local + 1)


def half_job(**sections: Any) -> dict[str, dict[str, Any]]:
    training = {"epochs": 90, "schedule": "half_trained", "batch": 32, "half_trained": HALF}
    return job(**{"training": training, "evaluation": {"every": 1, "trunk_travels": False}} | sections)


def test_a_site_that_has_released_may_leave(three: tuple[LocalFederation, str]) -> None:
    running, number = three
    running.ask("stop", number.encode())
    ended(running, number)
    status = running.submit(running.sign(half_job()))
    released(running, status.id)
    running.processes["svhc"].popen.terminate()
    assert running.processes["svhc"].popen.wait(10) == 0
    assert running.processes["svhc"].said["state"] == "done"
    running.processes["stmw"].popen.kill()
    done = ended(running, status.id)
    assert (done["state"], done["exit_code"]) == ("done", 0)
    assert done["step"] == done["steps"]
    for site in ("svhc", "svi"):
        running.wait_until(lambda site=site: bool(list(half_folder(running, site).glob("result.json"))), SERVER)
        assert set(load_file(half_folder(running, site) / "segments.safetensors")) == BOTTOM
    assert set(load_file(half_folder(running, SERVER) / "segments.safetensors")).isdisjoint(BOTTOM)


BOTTOM = {f"hidden.{layer}.{what}" for layer in (0, 2) for what in ("weight", "bias")}


def half_folder(running: LocalFederation, party: str) -> Path:
    return max((running.folder / party / "runs").glob("thyroid-*"), key=lambda path: path.stat().st_mtime)


def test_a_site_that_gets_the_trunk_may_not_leave(three: tuple[LocalFederation, str]) -> None:
    running, number = three
    running.ask("stop", number.encode())
    ended(running, number)
    status = running.submit(running.sign(half_job(result=TERMS)))
    released(running, status.id)
    running.processes["svhc"].popen.terminate()
    assert ended(running, status.id)["message"].startswith("svhc gave up: STOPPED")


def test_records_are_not_released_more_often_than_a_site_allows(three: tuple[LocalFederation, str]) -> None:
    running, number = three
    running.ask("stop", number.encode())
    ended(running, number)
    training = {"epochs": 1, "schedule": "half_trained", "half_trained": HALF}
    assert running.run(half_job(training=training)).status.state == "done"
    with pytest.raises(Refused, match="RELEASES"):
        running.run(half_job(training=training))
    for site in running.sites:
        running.wait_for_state(site, "refused")
    said = [running.processes[site].said["message"] for site in running.sites]  # one may hear another's refusal first
    assert any("handed over 2 times; [policy] most_releases is 1" in words for words in said)
    assert len((running.folder / "svi" / "runs" / "releases.log").read_text().splitlines()) == 1
    assert running.run(job(training={"epochs": 1})).status.state == "done"  # which releases nothing that is kept


def test_the_server_is_killed(three: tuple[LocalFederation, str]) -> None:
    running, _ = three
    running.processes[SERVER].popen.kill()
    for site in running.sites:
        process = running.processes[site]
        assert process.popen.wait(10) == 1
        line = process.errors[-1].strip()
        assert line.startswith("partway: localhost:")
        assert "is gone" in line or "closed the connection" in line
        assert not any("Traceback" in error for error in process.errors)
    nothing_half_written(running)


def test_the_server_is_told_to_stop(three: tuple[LocalFederation, str]) -> None:
    running, _ = three
    running.processes[SERVER].popen.terminate()
    assert running.processes[SERVER].popen.wait(20) == 0
    for site in running.sites:
        assert running.processes[site].popen.wait(10) == 1
        assert "STOPPED" in running.processes[site].said["message"]
    nothing_half_written(running)


def fill_the_disk(running: LocalFederation, party: str) -> None:
    """From now on, none of this party's files can become longer than they are."""
    longest = max(path.stat().st_size for path in (running.folder / party / "runs").rglob("*") if path.is_file())
    resource.prlimit(running.processes[party].pid, resource.RLIMIT_FSIZE, (longest, longest))


def test_a_site_s_disk_is_full(three: tuple[LocalFederation, str]) -> None:
    running, number = three
    fill_the_disk(running, "svhc")
    assert ended(running, number)["message"] == "svhc gave up: FAULT; its own log has the words"
    process = running.processes["svhc"]
    assert process.popen.wait(20) == 1
    assert re.search(
        r"^partway: .*ledger\.jsonl cannot be written \(.*\), so nothing leaves$", process.errors[-1].strip()
    )
    assert not any("Traceback" in error for error in process.errors)
    for site in ("svi", "stmw"):
        running.wait_for_state(site, "failed")
    nothing_half_written(running)


def test_the_server_s_disk_is_full(three: tuple[LocalFederation, str]) -> None:
    running, number = three
    fill_the_disk(running, SERVER)
    status = ended(running, number)
    assert status["state"] == "failed"
    assert "ledger.jsonl cannot be written" in status["message"]
    for site in running.sites:
        running.wait_for_state(site, "failed")
        assert running.processes[site].said["message"] == "server gave up: FAULT; its own log has the words"
    resource.prlimit(running.processes[SERVER].pid, resource.RLIMIT_FSIZE, (100, 100))
    with pytest.raises(PartwayError, match=r"cannot keep the job: .*job\.signed cannot be written"):
        running.submit(running.sign(job()))
    nothing_half_written(running)


# -- the command line


def partway(*words: str, folder: Path | None = None, expect: int = 0) -> tuple[str, str]:
    """Runs a verb; its output and its errors."""
    command = [sys.executable, "-m", "partway", *words]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == expect, done.stderr
    assert "Traceback" not in done.stderr
    return done.stdout, done.stderr


def test_a_port_in_use(federation: LocalFederation, tmp_path: Path) -> None:
    file = federation.folder / SERVER / "server.toml"
    second = tmp_path / "server.toml"
    words = (
        file.read_text()
        .replace("localhost:0", federation.address)
        .replace("[server]", f'[server]\nidentity = "{file.parent}/identity"')
    )
    second.write_text(words)
    _, said = partway("server", "start", str(second), expect=2)
    assert said == f"partway: cannot listen at {federation.address}: it is in use, or not this machine's\n"


def test_an_operator_s_whole_day(federation: LocalFederation, tmp_path: Path) -> None:
    office = ["--server", federation.address, "--identity", str(federation.folder / "study-office" / "identity")]
    roster = {site: federation.fingerprints[site] for site in federation.sites}
    (tmp_path / "job.toml").write_text(toml(job(roster=roster, training={"epochs": 1}, result=TERMS)))
    partway("job", "sign", "job.toml", "--identity", office[3], folder=tmp_path)
    out, _ = partway("job", "submit", "job.signed", *office, "--wait", "--json", folder=tmp_path)
    status = json.loads(out)
    assert (status["state"], status["exit_code"]) == ("done", 0)
    out, _ = partway("job", "status", status["id"], *office)
    assert "done, step 20 of 20" in out
    out, _ = partway("job", "list", *office)
    assert status["id"] in out
    partway("job", "download", status["id"], *office, folder=tmp_path)
    assert json.loads((tmp_path / status["id"] / "result.json").read_text())["party"] == SERVER
    ledger = federation.folder / "svi" / "runs" / f"thyroid-{status['id']}" / "ledger.jsonl"
    identity = federation.folder / "svi" / "identity"
    out, _ = partway("ledger", "verify", str(ledger), "--identity", str(identity))
    assert "The job ended: done." in out
    assert "ACTIVATIONS bottom -> trunk to server" in out
    _, said = partway(
        "ledger", "verify", str(ledger), "--identity", str(identity.parent.parent / "other/identity"), expect=2
    )
    assert "not signed by this party's key" in said


def test_the_exit_code_is_the_job_s(federation: LocalFederation, tmp_path: Path) -> None:
    office = ["--server", federation.address, "--identity", str(federation.folder / "study-office" / "identity")]
    (tmp_path / "job.signed").write_bytes(federation.sign(job(training={"epochs": 101})))
    out, _ = partway("job", "submit", "job.signed", *office, "--wait", "--json", folder=tmp_path, expect=3)
    status = json.loads(out)
    assert "EPOCHS" in status["message"]
    partway("job", "status", status["id"], *office, expect=3)
    _, said = partway("job", "download", status["id"], *office, expect=2)
    assert "is refused, and has no result" in said


def test_a_site_of_another_federation(federation: LocalFederation, records: dict[str, Path], tmp_path: Path) -> None:
    stranger = LocalFederation(tmp_path, {"svi": records["svi"]})
    file = tmp_path / "svi" / "site.toml"
    file.write_text(file.read_text().replace("localhost:0", federation.address))
    _, said = partway("site", "start", str(file), expect=2)
    assert "shows a certificate of another federation" in said
    assert said.count("\n") == 1
    theirs = federation.folder / "svi" / "identity" / "authority.pem"
    (tmp_path / "svi" / "identity" / "authority.pem").write_bytes(theirs.read_bytes())
    _, said = partway("site", "start", str(file), expect=2)
    assert "is of another federation" in said
    assert copy.copy(stranger.sites) == ("svi",)


def test_a_server_that_is_not_there(records: dict[str, Path], tmp_path: Path) -> None:
    LocalFederation(tmp_path, {"svi": records["svi"]})
    file = tmp_path / "svi" / "site.toml"
    file.write_text(file.read_text().replace("localhost:0", "localhost:1"))
    _, said = partway("site", "start", str(file), expect=1)
    assert said.startswith("partway: localhost:1: cannot be reached, or is gone")
    assert said.count("\n") == 1


def test_a_site_s_records_are_read_before_anything_is_connected(tmp_path: Path) -> None:
    (tmp_path / "records.csv").write_text("age,sex\n29\n")
    LocalFederation(tmp_path, {"svi": tmp_path / "records.csv"})
    file = tmp_path / "svi" / "site.toml"
    file.write_text(file.read_text().replace("localhost:0", "localhost:1"))
    _, said = partway("site", "start", str(file), expect=2)
    assert "records.csv, line 2: another number of values than columns" in said
    with pytest.raises(JobFailed, match=r"svi has ended: partway: .* another number of values"):
        raise_end(tmp_path, file)


def raise_end(folder: Path, file: Path) -> None:
    with LocalFederation(folder / "again", {"svi": folder / "records.csv"}) as running:
        running.start()
