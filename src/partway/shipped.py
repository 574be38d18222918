"""Segments as folders between people: who has a network's code signs a segment, who has not sees what it does."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from partway import pki
from partway.blueprint import DTYPES, built, configured, example_of
from partway.config import Job, of_any_size
from partway.data.records import Schema
from partway.errors import TrustError, UsageError
from partway.model import bundle
from partway.model.cut import as_piece
from partway.model.piece import Piece


def write(job: Job, schemas: Mapping[str, Schema], segment: str, identity: pki.Identity, folder: Path) -> Piece:
    """Writes one of a job's segments into a new folder, signed.

    Its weights are those that the network's code draws: a job starts from others, drawn from a secret or from a file.

    Args:
        schemas: of each party that holds records.
        identity: of an operator.

    Raises:
        UsageError: the job has no such segment, or the folder is not empty.
        TrustError: it is no operator.
    """
    plan = configured(job)
    if segment not in plan.nets:
        raise UsageError(f"{job.job.name} has no segment {segment}; it has {', '.join(plan.nets)}")
    network = built(job, of_any_size(job.builds), plan, schemas)
    module = network.modules[segment]
    example = example_of(plan, schemas, network.outputs, segment, DTYPES[job.training.dtype])
    piece = module if isinstance(module, Piece) else as_piece(module, example)
    bundle.write(piece, folder, lambda data: pki.sign_segment(identity, data))
    return piece


def read(folder: Path, identity: pki.Identity) -> tuple[Piece, pki.Subject]:
    """The segment in a folder, and the operator of this federation who signed it; nothing has run.

    Raises:
        TrustError: no operator of this federation signed it.
        CutError: something in it may not be.
    """
    signers: list[pki.Subject] = []

    def signed_by(signature: bytes, data: bytes) -> bool:
        signers.append(pki.segment_signer(signature, data, identity.authority_pem))
        return True

    piece = bundle.read(folder, signed_by)
    if not signers:
        raise TrustError(f"{folder} is not signed")
    return piece, signers[0]
