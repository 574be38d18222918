"""Jobs of which no party has the network's code: signed segments, each in a process of its own."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from safetensors.torch import save
from torch import nn

from federations import difference, job_of, records_of, small
from partway import pki
from partway.assembly import forecast_of
from partway.config import Job, read_job
from partway.equality import _Plain
from partway.errors import ConfigError, CutError, Refused
from partway.local import toml
from partway.model.bundle import PROGRAM, SIGNATURE
from partway.model.cut import as_piece
from partway.model.segment import initialise
from partway.outcome import result_of
from partway.plan.phases import original
from partway.policy import judge_job
from partway.protocol.messages import Reason
from partway.shipped import Reader, read, write
from partway.simulation import permissive

STEWARD = pki.Authority.create("consortium")
OPERATOR = STEWARD.admit("office", pki.Role.OPERATOR)
RESIDUAL = {"build": "residual_network:residual", "arguments": {}, "cut": ["gate"]}
SKIPPING = {"build": "skipping_network:skipping", "arguments": {}, "cut": ["aside", "third"]}
SCHEMA = records_of("a", 5).schema


def code_of(network: dict[str, Any] | None = None, **training: Any) -> Job:
    """A job by code."""
    return job_of({"network": network or {}}, optimizer={"name": "adam", "lr": 0.02}, **training)


def shipped(code: Job, folder: Path, **more: Any) -> Job:
    """The same by segments without code, which are written into a folder."""
    schemas = dict.fromkeys(("site", "a"), SCHEMA)
    names = ["bottom", "trunk", "head"] if code.configuration == "u_shaped" else ["bottom", "trunk"]
    made = {name: {"segment": write(code, schemas, name, OPERATOR, folder).digest, **more} for name in names}
    words = msgspec.to_builtins(code)
    for name in ("network", "columns", "plan", "predict", "holds", "roster"):
        words.pop(name)
    return read_job(toml(words | {"networks": made}))


@pytest.mark.parametrize(
    ("network", "training"),
    [
        (SKIPPING, {"configuration": "u_shaped", "skips": ["bottom -> head"]}),
        (RESIDUAL, {}),
        (None, {"schedule": "half_trained"}),
    ],
)
def test_segments_without_code_train_as_the_code_does(
    network: dict[str, Any] | None, training: dict[str, Any], tmp_path: Path
) -> None:
    """From the same first weights, and for the FLOPs and bytes that are forecast of the code."""
    code = code_of(network, **training)
    whole = small(shipped(code, tmp_path), weights=tmp_path)
    records = {s: whole.parties[s].party.worker.source.records for s in whole.job.sites}
    roster = msgspec.structs.replace(code, roster=whole.job.roster)
    loop = _Plain(roster, whole.digest, whole.secrets, records, "server")
    for owner in ("a", "server"):
        for copy, segment in whole.parties[owner].party.worker.segments.items():
            if copy.lane in ("", "a") and not copy.segment.endswith("_here"):
                loop.network.modules[original(copy.segment)].load_state_dict(segment.tensors())
    whole.run()
    moved = difference(whole, loop.network.whole)
    if training.get("schedule"):
        loop.half_trained()
    else:
        loop.together(0, code.training.epochs)
    assert difference(whole, loop.network.whole) < 1e-10 < 1e-3 < moved
    due = forecast_of(code, SCHEMA, {site: own.sizes for site, own in records.items()})
    for party in ("a", "server"):
        cost = result_of(whole.parties[party], 0.0).cost[party]
        assert (cost.flops, cost.bytes_up) == (due[party].flops, due[party].bytes_up)


def test_first_weights_are_the_folder_s_in_an_order_that_nobody_else_knows(tmp_path: Path) -> None:
    """What the code draws is shuffled, what it does not draw stays."""
    network = {**RESIDUAL, "arguments": {"normalised": True}}
    job = shipped(code_of(network), tmp_path)
    pieces = [read(tmp_path / job.shipped["bottom"], STEWARD.pem).piece for _ in range(3)]
    for secret, piece in ((b"1", pieces[0]), (b"2", pieces[1])):
        initialise(piece, secret * 32)
    one, other, given = (piece.state_dict() for piece in pieces)
    for name in ("first.weight", "shift"):
        assert len({tuple(tensors[name].reshape(-1).tolist()) for tensors in (one, other, given)}) == 3
        assert torch.equal(one[name].reshape(-1).sort().values, given[name].reshape(-1).sort().values)
    assert all(torch.equal(one[name], given[name]) for name in given if name.startswith("norm"))
    with pytest.raises(CutError, match="has no first weights of its own; build its network by name"):
        initialise(as_piece(nn.LayerNorm(4), torch.zeros(2, 4)), b"1" * 32)  # of no folder


def test_a_frozen_segment_and_weights_of_elsewhere(tmp_path: Path) -> None:
    """Are said of a segment as of a network that is cut."""
    shapes = {"hidden.0.weight": (8, 6), "hidden.0.bias": (8,)}
    data = save({name: torch.full(shape, 0.1, dtype=torch.float64) for name, shape in shapes.items()})
    digest = hashlib.sha256(data).hexdigest()
    (tmp_path / f"{digest}.safetensors").write_bytes(data)
    job = shipped(code_of(), tmp_path)
    bottom = msgspec.structs.replace(job.networks["bottom"], weights=digest, frozen=True)
    whole = small(msgspec.structs.replace(job, networks=job.networks | {"bottom": bottom}), weights=tmp_path)
    before = whole.parties["server"].party.worker.segments
    held = {copy: segment.weights() for copy, segment in before.items()}
    whole.run()
    assert all(not torch.equal(held[copy], segment.weights()) for copy, segment in before.items())
    for assembled in whole.parties.values():
        for copy, segment in assembled.party.worker.segments.items():
            assert copy.segment != "bottom" or segment.tensors()["hidden.0.weight"].eq(0.1).all()


# -- refused


def test_a_segment_that_may_not_run(tmp_path: Path) -> None:
    job = shipped(code_of(), tmp_path)
    digest = job.shipped["bottom"]
    (objection,) = judge_job(permissive(segments=[job.shipped["trunk"]]), "b", job, "simulate")
    assert objection.reason is Reason.SEGMENT
    assert objection.words == f"the bottom, segment {digest}, is not in [policy] segments"
    with pytest.raises(Refused, match=f"segment = `{digest[:12]}...`: put the folder {digest} into") as told:
        Reader(tmp_path / "elsewhere", STEWARD.pem)(digest, 1000)
    assert told.value.reasons == ("SEGMENT",)
    strangers = pki.Authority.create("others")
    with pytest.raises(Refused, match=r"not issued by|another federation"):
        Reader(tmp_path, strangers.pem)(digest, 1000)
    with pytest.raises(Refused, match="at most 10 are allowed"):
        Reader(tmp_path, STEWARD.pem)(digest, 10)
    folder = tmp_path / digest
    other = tmp_path / job.shipped["trunk"]
    for name in (PROGRAM, SIGNATURE):
        (folder / name).write_bytes((other / name).read_bytes())
    with pytest.raises(Refused, match="holds another segment than its name says"):
        Reader(tmp_path, STEWARD.pem)(digest, 1000)


def test_jobs_that_say_too_much_or_too_little() -> None:
    words = msgspec.to_builtins(job_of())
    for name in ("columns", "plan", "predict", "holds", "roster", "network"):
        words.pop(name)
    digest = "0" * 64
    mlp = "partway.model.zoo:mlp"
    for networks, told in (
        (
            {"bottom": {"build": mlp, "segment": digest}},
            r"\[networks.bottom\] needs installed code, `build` .* not both",
        ),
        ({"bottom": {}}, r"\[networks.bottom\] needs installed code"),
        ({"bottom": {"segment": digest, "arguments": {"inputs": 3}}}, r"\[networks.bottom\] needs installed code"),
        ({}, r"vanilla needs one \[network\] that is cut, or a network for each segment, \[networks.SEGMENT\]"),
    ):
        with pytest.raises(ConfigError, match=told):
            read_job(toml(words | {"networks": networks}))
    job = read_job(toml(words | {"networks": {"bottom": {"segment": digest}}}))
    with pytest.raises(ConfigError, match=r"\[networks.trunk\] is missing"):
        small(job)


def test_another_type_than_the_job_s(tmp_path: Path) -> None:
    job = shipped(code_of(), tmp_path)
    narrow = msgspec.structs.replace(job, training=msgspec.structs.replace(job.training, dtype="float32"))
    with pytest.raises(ConfigError, match=r"the segment of the bottom was written in float64, and .* dtype is float32"):
        small(narrow, weights=tmp_path)
