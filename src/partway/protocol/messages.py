"""Every message between parties, once. All are frozen, tagged, refuse unknown fields, and bound every length."""

from __future__ import annotations

from enum import IntEnum
from typing import Annotated, NamedTuple

import msgspec
from msgspec import Meta

from partway.plan.plan import Copy

Name = Annotated[str, Meta(min_length=1, max_length=64, pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$")]
Digest = Annotated[bytes, Meta(min_length=32, max_length=32)]
Signature = Annotated[bytes, Meta(max_length=80)]
Key = Annotated[bytes, Meta(max_length=128)]
Count = Annotated[int, Meta(ge=0, le=2**24)]
"""Records: bounded, for every party derives every turn from them."""


class Reason(IntEnum):
    """Why a party gave up, as a number: an error message could carry a patient's value."""

    STOPPED = 1
    """The operator or this party's owner stopped the job."""
    PEER = 2
    """Another party said what it may not; `peer` names it."""
    LOST = 3
    """Another party is gone or silent; `peer` names it."""
    DATA = 4
    """This party's records are not what the job expects."""
    FAULT = 5
    """This party's own program failed."""
    UNMATCHED = 6
    """This party and `peer`, which hold columns of the same patients, do not go by one list of them."""
    OPERATOR = 10
    """Policy: the job's operator is not on this site's list, or the signature is not theirs."""
    NETWORK = 11
    """Policy: the network is not on this site's list."""
    NETWORK_SIZE = 12
    """Policy: the network has more parameters than this site allows."""
    ROSTER = 13
    """Policy: another site of the job is not on this site's list, or its key is not the pinned one."""
    LABELS = 14
    """Policy: labels would leave."""
    WIDTH = 15
    """Policy: more numbers a record would cross than this site allows."""
    EPOCHS = 16
    """Policy: more epochs than this site allows."""
    SITES = 17
    """Policy: a sum over fewer sites than this site allows."""
    RECORDS = 18
    """Policy: in some step the records of the others are too few to hide in."""
    SCORES = 19
    """Policy: this site's own scores would leave."""
    CLEAR_SUM = 20
    """Policy: sums would be added in the clear."""
    RESULT = 21
    """Policy: the result would go to more parties than this site allows."""
    BATCHNORM = 22
    """Policy: a segment that several sites hold contains BatchNorm, which cannot equal pooled training."""
    EVALUATION = 23
    """Policy: counts would be summed over too few records."""
    REPEATED = 24
    """Policy: this very job, as signed, has run at this party before."""
    RELEASES = 25
    """Policy: records' activations would be handed over to be kept more often than this site allows."""
    PREDICTIONS = 26
    """Policy: what the network says of records would leave."""
    EARLIER = 27
    """What the job's [predict] names is not here: no such job has run, or it has left another network, or nothing."""
    WEIGHTS = 28
    """A file of weights that the job names by digest is not here, or does not fit."""
    SEGMENT = 29
    """A signed segment that the job names by digest is not on this party's list, not here, or may not run."""


class Wrong(IntEnum):
    """In what a site's records do not fit the schema of the job, as a number."""

    MISSING_COLUMN = 1
    UNIT = 2
    CLASS = 3
    CATEGORY = 4
    RANGE = 5
    NUMBER = 6
    NO_RECORDS = 7


class LetterKind(IntEnum):
    """What a letter of a turn carries."""

    ACTIVATIONS = 1
    LABELS = 2
    SCORES = 3
    GRADIENT = 4
    SHARE = 5
    SUM = 6
    STATE = 7
    EQUAL = 8
    ACCOUNT = 9
    TICK = 10
    VERDICT = 11
    SQUARE = 12
    NORM = 13


class Message(msgspec.Struct, frozen=True, array_like=True, tag=True, forbid_unknown_fields=True):
    """The common parent: encoded as an array that begins with the message's name."""


class Greet(Message, frozen=True, tag="greet"):
    """The first message each way on a link, before any job."""

    version: Annotated[str, Meta(max_length=32)]


ANYBODY = "anybody"
"""To whom a site greets, before it knows the server's name."""


class Offer(Message, frozen=True, tag="offer"):
    """The server to a site: a signed job to take part in."""

    job: Annotated[bytes, Meta(max_length=2**19)]
    certificate: Annotated[bytes, Meta(max_length=2**14)]
    """The server's own, PEM: its key is the one that its HELLO must come from."""


class Counts(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """Records in each part."""

    train: Count = 0
    validation: Count = 0
    test: Count = 0
    unlabelled: Count = 0


class Hello(Message, frozen=True, tag="hello"):
    """Each party of a job to each other: who I am, how many records I bring, and the key of this start."""

    version: Annotated[str, Meta(max_length=32)]
    """Parties of different versions do not work together: each derives the turns itself."""
    records: Counts
    """All zero at a party that is no site."""
    certificate_key: Key
    """DER SubjectPublicKeyInfo of the certificate's key."""
    public: Annotated[bytes, Meta(max_length=32)]
    """X25519, fresh at each start; empty at a hub without records, for whom nothing is sealed."""
    signature: Signature


class GroupKey(Message, frozen=True, tag="key"):
    """The first seat to each other site: the group's key, sealed."""

    sealed: Annotated[bytes, Meta(max_length=128)]


class Ready(Message, frozen=True, tag="ready"):
    """Each to each: I would run exactly these turns with exactly these parties."""

    digest: Digest
    """Over every HELLO and all turns."""
    confirmation: Annotated[bytes, Meta(max_length=32)]
    """HMAC under the group's key; empty at a party without it."""
    signature: Signature


class Post(NamedTuple):
    """A letter's name within its turn. Its copies must be the plan's; of accounts and ticks they name parties, and
    those of squares and norms a party and the lane whose optimiser it is."""

    kind: LetterKind
    source: Copy
    target: Copy
    micro_batch: Annotated[int, Meta(ge=0, lt=2**16)] = 0

    def __str__(self) -> str:
        return f"{self.kind.name} {self.source} -> {self.target}"


class Letter(Message, frozen=True, tag="letter"):
    """One thing that one party must tell another in a turn; the tensors follow the header."""

    turn: Annotated[int, Meta(ge=0, lt=2**40)]
    post: Post


class Bye(Message, frozen=True, tag="bye"):
    """No turn is left in which I have a part."""


class Mismatch(NamedTuple):
    """One thing in which a site's records do not fit."""

    column: Annotated[int, Meta(ge=0, lt=2**16)]
    """Its number in the schema: 0 is the label, then the columns, then the site column."""
    kind: Wrong


MOST_MISMATCHES = 2**13


class Fail(Message, frozen=True, tag="fail"):
    """I give up the job."""

    reason: Reason
    peer: Annotated[str, Meta(max_length=64)] = ""
    """The party at fault, if it is not me."""
    mismatches: Annotated[tuple[Mismatch, ...], Meta(max_length=MOST_MISMATCHES)] = ()
    """With `DATA`: everything in which this site's records do not fit. Numbers, no words."""


class Head(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """What stands before every message: who says it to whom, in which job and membership epoch."""

    sender: Name
    to: Name
    job: Annotated[bytes, Meta(max_length=32)] = b""
    """The digest of the signed job; empty on a link before any job."""
    epoch: Annotated[int, Meta(ge=0, lt=2**32)] = 0
