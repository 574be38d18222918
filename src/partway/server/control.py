"""Answers operators: submit, list, status, stop and download. Each call is checked for the role of its certificate."""

from __future__ import annotations

import json
from dataclasses import asdict

import msgspec

from partway import pki
from partway.errors import TrustError, UsageError
from partway.server.coordinator import Coordinator, Submitted
from partway.transport.grpc import Call, Peer

FILES = ("result.json", "network.safetensors", "segments.safetensors")
"""What an operator may download, as far as the job's `[result]` gave it to the server."""


def calls(coordinator: Coordinator) -> dict[str, Call]:
    """The unary calls by name. Requests are a job's bytes or its number; answers are JSON, `download`'s MessagePack."""

    def operator(peer: Peer) -> str:
        subject = pki.verify_certificate(peer.certificate, coordinator.identity.authority_pem)
        if subject.role is not pki.Role.OPERATOR:
            words = f"{subject.name} is {subject.role}; only operators submit, stop and download jobs"
            raise TrustError(words)
        return subject.name

    def theirs(peer: Peer, number: bytes) -> Submitted:
        name = operator(peer)
        found = coordinator.jobs.get(number.decode("ascii", "replace"))
        if found is None or found.operator != name:
            raise UsageError(f"{name} has no job {number.decode('ascii', 'replace')}; `partway job list` shows them")
        return found

    async def submit(peer: Peer, request: bytes) -> bytes:
        return json.dumps(asdict(coordinator.submit(request, operator(peer)).status)).encode()

    async def listing(peer: Peer, _: bytes) -> bytes:
        name = operator(peer)
        return json.dumps([asdict(s.status) for s in coordinator.jobs.values() if s.operator == name]).encode()

    async def status(peer: Peer, request: bytes) -> bytes:
        return json.dumps(asdict(theirs(peer, request).status)).encode()

    async def stop(peer: Peer, request: bytes) -> bytes:
        submitted = theirs(peer, request)
        if submitted.status.ended:
            raise UsageError(f"job {submitted.status.id} has ended: {submitted.status.state}")
        coordinator.stop(submitted)
        return json.dumps(asdict(submitted.status)).encode()

    async def download(peer: Peer, request: bytes) -> bytes:
        submitted = theirs(peer, request)
        if submitted.status.state != "done":
            words = f"job {submitted.status.id} is {submitted.status.state}, and has no result"
            raise UsageError(f"{words}: {submitted.status.message}")
        paths = [submitted.folder / name for name in FILES]
        return msgspec.msgpack.encode({path.name: path.read_bytes() for path in paths if path.exists()})

    return {"submit": submit, "list": listing, "status": status, "stop": stop, "download": download}
