"""Segments as folders between people: who has a network's code signs one, who has not sees what it does and runs it."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from partway import pki
from partway.apart.confined import Confined
from partway.blueprint import DTYPES, built, configured, example_of
from partway.config import Job, of_any_size
from partway.data.records import Schema
from partway.errors import CutError, Refused, TrustError, UsageError
from partway.model import bundle
from partway.model.cut import as_piece
from partway.model.piece import Piece
from partway.model.segment import initialise
from partway.protocol.messages import Reason


@dataclass(frozen=True)
class Written:
    """A segment in a folder."""

    piece: Piece
    folder: Path
    digest: str
    """SHA-256 of its program, in hexadecimal: what a job says."""


def write(job: Job, schemas: Mapping[str, Schema], segment: str, identity: pki.Identity, folder: Path) -> Written:
    """Writes one of a job's segments into a folder of its own there, signed.

    Its weights are those that the network's code draws; each party shuffles them before a job, by a secret of its own,
    or takes others from a file.

    Args:
        schemas: of each party that holds records.
        identity: of an operator.
        folder: where a folder is made that is called by the digest.

    Raises:
        UsageError: the job has no such segment, or it shares a weight with another.
        TrustError: it is no operator.
    """
    plan = configured(job)
    if segment not in plan.nets:
        raise UsageError(f"{job.job.name} has no segment {segment}; it has {', '.join(plan.nets)}")
    network = built(job, of_any_size(job.builds), plan, schemas)
    module = network.modules[segment]
    for others in network.tied:
        if segment in others:
            told = " and ".join(others)
            raise UsageError(f"{told} share a weight, and each folder would hold one of its own; untie it first")
    example = example_of(plan, schemas, network.modules, network.outputs, segment, DTYPES[job.training.dtype])
    piece = module if isinstance(module, Piece) else as_piece(module, example)
    piece.drawn = _drawn(module)
    digest = hashlib.sha256(bundle.packed(piece)[0]).hexdigest()
    bundle.write(piece, folder / digest, lambda program: pki.sign_segment(identity, program))
    return Written(piece, folder / digest, digest)


def _drawn(module: nn.Module) -> frozenset[str]:
    """Tensors that come out otherwise each time that the network's code draws them."""
    draws = []
    for secret in (b"1", b"2"):
        own = copy.deepcopy(module)
        initialise(own, secret * 32)
        draws.append(own.state_dict())
    return frozenset(name for name, tensor in draws[0].items() if not tensor.equal(draws[1][name]))


@dataclass(frozen=True)
class Read:
    """A segment of a folder; nothing of it has run."""

    piece: Piece
    digest: str
    signer: pki.Subject | None
    """The operator of this federation who signed it."""


def read(folder: Path, authority: bytes | None, digest: str = "", most_parameters: int = 2**31 - 1) -> Read:
    """The segment in a folder.

    Args:
        authority: of the federation, PEM; None takes anybody's signature, for who runs all parties himself.
        digest: which it must be.

    Raises:
        TrustError: no operator of this federation signed it, or it is another one.
        CutError: something in it may not be.
    """
    found: list[tuple[str, pki.Subject | None]] = []

    def signed_by(signature: bytes, program: bytes) -> bool:
        own = hashlib.sha256(program).hexdigest()
        if digest and own != digest:
            raise TrustError(f"{folder} holds another segment than its name says")
        found.append((own, pki.segment_signer(signature, program, authority) if authority is not None else None))
        return True

    piece = bundle.read(folder, signed_by, most_parameters)
    return Read(piece, *found[0])


class Reader:
    """Reads segments that jobs name by digest, and runs each in a process of its own until it is left.

    Args:
        home: where their folders lie, each called by its digest.
        authority: as in `read`.
    """

    def __init__(self, home: Path | None, authority: bytes | None) -> None:
        self._home, self._authority = home, authority
        self._started: dict[str, Confined] = {}

    def __call__(self, digest: str, most_parameters: int) -> Confined:
        """A segment. Raises `Refused` if it is not there or may not run; reason SEGMENT."""
        words = f"segment = `{digest[:12]}...`"
        if digest not in self._started:
            if self._home is None or not (folder := self._home / digest).is_dir():
                raise Refused(f"{words}: put the folder {digest} into {self._home}", [Reason.SEGMENT.name])
            try:
                piece = read(folder, self._authority, digest, most_parameters).piece
            except (CutError, TrustError) as error:
                raise Refused(f"{words}: {error}", [Reason.SEGMENT.name]) from None
            self._started[digest] = Confined(piece)
        return copy.deepcopy(self._started[digest])  # with weights of its own, in the same process

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the processes; a segment that is used again starts another."""
        for confined in self._started.values():
            confined.close()
