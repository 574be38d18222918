"""What left a party: an append-only file of opening and closing lines, chained and signed.

Each line is `<chain> <json>`; `chain` is SHA-256 over the chain before it and the line's JSON. An opening line is
written before the first frame of a range of turns and says the most that may leave; the closing line says what did,
with a rolling HMAC under a key of this party (a plain digest of two records' labels could be guessed). After each
closing line the chain's head is signed. A crash leaves an opening line without its closing line: `verify` says
"at most" of it.

>>> ledger = Ledger(None, key=bytes(32), sign=lambda data: b"")
>>> ledger.open((0, 19), {("ACTIVATIONS bottom -> trunk", "server"): Count(20, 30_000)})
>>> ledger.left(("ACTIVATIONS bottom -> trunk", "server"), 1472, b"the frame")
>>> ledger.close()
>>> ledger.totals
{('ACTIVATIONS bottom -> trunk', 'server'): Count(frames=1, nbytes=1472)}
"""

from __future__ import annotations

import hashlib
import hmac
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from partway.errors import JobFailed, TrustError, UsageError

Edge = tuple[str, str]
"""What crosses, and to whom: ("ACTIVATIONS bottom -> trunk", "server")."""

_START = hashlib.sha256(b"partway/ledger/v1").digest()
_SIGNED = b"partway/ledger/head/v1\0"


@dataclass
class Count:
    """Frames, and bytes of their tensors, on one edge."""

    frames: int = 0
    nbytes: int = 0

    def add(self, frames: int, nbytes: int) -> None:
        self.frames += frames
        self.nbytes += nbytes


class Ledger:
    """The open file of one party and one job.

    Args:
        path: created here; None keeps the chain and the totals, and writes nothing.
        key: of this party, for the rolling HMAC.
        sign: signs with the party's certificate key.

    Raises:
        UsageError: the file exists; a ledger is never written again.
        JobFailed: it cannot be made.
    """

    def __init__(self, path: Path | None, key: bytes, sign: Callable[[bytes], bytes]) -> None:
        self._path, self._key, self._sign, self._lines = path, key, sign, 0
        self._turns: tuple[int, int] | None = None
        self._most: dict[Edge, Count] = {}
        self._left: dict[Edge, tuple[Count, hmac.HMAC]] = {}
        self.head = _START
        """The chain's head, 32 bytes."""
        self.totals: dict[Edge, Count] = {}
        """What did leave, by closing lines."""
        try:
            self._file = path.open("xb", buffering=0) if path else None
        except FileExistsError:
            raise UsageError(f"{path} exists: this job has run here before; sign it again to run it again") from None
        except OSError as error:
            raise JobFailed(f"{path} cannot be made ({error.strerror}), so nothing leaves") from None

    def line(self, kind: str, **words: Any) -> None:
        """Appends one line. Raises `JobFailed` if the disk does not take it: then nothing may leave."""
        text = json.dumps({"n": self._lines, "kind": kind, **words}, separators=(",", ":")).encode()
        head = hashlib.sha256(self.head + text).digest()
        if self._file is not None:
            data = head.hex().encode() + b" " + text + b"\n"
            try:
                whole = self._file.write(data) == len(data)
            except OSError as error:
                raise JobFailed(f"{self._path} cannot be written ({error.strerror}), so nothing leaves") from None
            if not whole:
                raise JobFailed(f"{self._path} cannot be written (no space left), so nothing leaves")
        self.head, self._lines = head, self._lines + 1

    def open(self, turns: tuple[int, int], most: Mapping[Edge, Count]) -> None:
        """The most that may leave in a range of turns, both ends included. Closes the range before it."""
        self.close()
        edges = [{"edge": e, "to": to, "most_frames": c.frames, "most_bytes": c.nbytes} for (e, to), c in most.items()]
        self.line("open", turns=turns, edges=edges)
        self._turns, self._most, self._left = turns, dict(most), {}

    def left(self, edge: Edge, nbytes: int, frame: bytes) -> None:
        """One frame is about to leave. Raises `JobFailed` if the opening line does not allow for it."""
        most = self._most.get(edge)
        if most is None:
            raise JobFailed(f"{edge[0]} to {edge[1]}: the ledger has no opening line for it, so it does not leave")
        if edge not in self._left:
            self._left[edge] = (Count(), hmac.new(self._key, digestmod="sha256"))
        count, rolling = self._left[edge]
        if count.frames + 1 > most.frames or count.nbytes + nbytes > most.nbytes:
            raise JobFailed(f"{edge[0]} to {edge[1]}: more than the ledger's opening line allows, so it does not leave")
        count.add(1, nbytes)
        rolling.update(frame)

    def close(self) -> None:
        """What did leave in the open range, signed; nothing happens if none is open."""
        if self._turns is None:
            return
        edges = []
        for (edge, to), (count, rolling) in self._left.items():
            digest = rolling.hexdigest()
            edges.append({"edge": edge, "to": to, "frames": count.frames, "bytes": count.nbytes, "hmac": digest})
            self.totals.setdefault((edge, to), Count()).add(count.frames, count.nbytes)
        self.line("close", turns=self._turns, edges=edges)
        self._turns, self._most = None, {}
        self._sign_head()

    def end(self, outcome: str) -> None:
        """The last line of a job; after it nothing is written."""
        self.close()
        self.line("end", outcome=outcome)
        self._sign_head()
        if self._file is not None:
            self._file.close()

    def _sign_head(self) -> None:
        self.line("signed", head=self.head.hex(), signature=self._sign(_SIGNED + self.head).hex())


@dataclass
class Audit:
    """What `verify` found."""

    lines: int = 0
    signatures: int = 0
    outcome: str | None = None
    """How the job ended here; None if no last line says so."""
    left: dict[Edge, Count] = field(default_factory=dict)
    """What did leave, by closing lines."""
    at_most: dict[Edge, Count] = field(default_factory=dict)
    """What may have left besides: of an opening line without its closing line."""
    head: str = ""


def verify(path: Path, is_signature: Callable[[bytes, bytes], bool]) -> Audit:
    """Recomputes a ledger's chain and signatures.

    Args:
        is_signature: (signature, data) -> whether the party's certificate key made it.

    Raises:
        UsageError: the file cannot be read.
        TrustError: the line at which the chain or a signature does not hold.
    """
    try:
        *lines, _cut_off = path.read_bytes().split(b"\n")
    except OSError as error:
        raise UsageError(f"{path}: cannot be read ({error.strerror})") from None
    # What a crash has cut off within a line is covered by "at most".
    audit, head = Audit(), _START
    for number, raw in enumerate(lines):
        chain, _, text = raw.partition(b" ")
        before, head = head, hashlib.sha256(head + text).digest()
        try:
            words = json.loads(text)
            if chain != head.hex().encode() or words["n"] != number:
                raise ValueError
            if words["kind"] == "signed":
                signature = bytes.fromhex(words["signature"])
                if words["head"] != before.hex() or not is_signature(signature, _SIGNED + before):
                    raise TrustError(f"{path}, line {number + 1}: not signed by this party's key")
                audit.signatures += 1
            elif words["kind"] == "open":
                audit.at_most = {(e["edge"], e["to"]): Count(e["most_frames"], e["most_bytes"]) for e in words["edges"]}
            elif words["kind"] == "close":
                for e in words["edges"]:
                    audit.left.setdefault((e["edge"], e["to"]), Count()).add(e["frames"], e["bytes"])
                audit.at_most = {}
            elif words["kind"] == "end":
                audit.outcome = words["outcome"]
        except (ValueError, KeyError, TypeError):
            raise TrustError(
                f"{path}, line {number + 1}: does not follow from the lines before it; the ledger was altered"
            ) from None
    audit.lines, audit.head = len(lines), head.hex()
    return audit
