"""Four files by which parties find the patients that they have in common; no file that travels holds an id.

The one with the labels asks, each other party answers, the asker agrees with all of them on a list of tokens in an
order, and each takes from its file which of its ids stands behind which token.
"""

from __future__ import annotations

import os
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, NamedTuple, TypeVar

import msgspec
from msgspec import Meta

from partway.data.table import load
from partway.errors import DataError, UsageError
from partway.privacy.intersection import again, blind, common, new_secret

MOST = 10_000_000
T = TypeVar("T", bound=msgspec.Struct)
Points = Annotated[list[Annotated[bytes, Meta(min_length=32, max_length=32)]], Meta(min_length=1, max_length=MOST)]


class Kept(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="kept"):
    """What a party keeps to itself until the match is done."""

    secret: Annotated[bytes, Meta(min_length=32, max_length=32)]
    ids: list[str]
    """In the order of the points."""


class Asked(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="asked"):
    """From the asker to each other party."""

    points: Points


class Answered(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="answered"):
    """Back to the asker."""

    asked: Points
    points: Points


class Agreed(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="agreed"):
    """From the asker to one party."""

    tokens: Annotated[list[Annotated[str, Meta(max_length=64)]], Meta(min_length=1, max_length=MOST)]
    places: Annotated[list[int], Meta(min_length=1, max_length=MOST)]
    """Of each token's id among the points that this party has answered with, or -1."""


class Found(NamedTuple):
    """What a match came to."""

    records: int
    """Agreed on."""
    here: Mapping[str, int]
    """How many of them each party has."""


def ask(records: Path, column: str, kept: Path, to: Path) -> int:
    """Writes what every other party is asked, and what is kept here. Returns the number of ids."""
    ids = _shuffled(records, column)
    secret = new_secret()
    _keep(kept, Kept(secret, ids))
    _write(to, Asked(blind(ids, secret)))
    return len(ids)


def answer(records: Path, column: str, asked: Path, kept: Path, to: Path) -> int:
    """Writes the answer to what was asked, and what is kept here. Returns the number of ids of the asker."""
    question, ids, secret = _read(asked, Asked), _shuffled(records, column), new_secret()
    _write(to, Answered(again(question.points, secret), blind(ids, secret)))
    _keep(kept, Kept(secret, ids))
    return len(question.points)


def agree(kept: Path, answers: Mapping[str, Path], to: Path, only_common: bool) -> Found:
    """Writes `ids.txt` for the asker, and `<party>.agreed` for each other, into a folder.

    Args:
        answers: by party.
        only_common: only patients whom every party has; else all of the asker's, of whom a party may lack some.
    """
    mine = _read(kept, Kept)
    places = {}
    for party, path in answers.items():
        answered = _read(path, Answered)
        if len(answered.asked) != len(mine.ids):
            raise DataError(f"{path}: it answers another question than the one kept in {kept}")
        places[party] = common(answered.asked, answered.points, mine.secret)
    rows = [n for n in range(len(mine.ids)) if not only_common or all(found[n] >= 0 for found in places.values())]
    if not rows:
        raise DataError("the parties have no patient in common: do their ids look alike?")
    tokens = [os.urandom(8).hex() for _ in rows]
    to.mkdir(parents=True, exist_ok=True)
    _write_ids(to / "ids.txt", tokens, [mine.ids[n] for n in rows])
    for party, found in places.items():
        _write(to / f"{party}.agreed", Agreed(tokens, [found[n] for n in rows]))
    return Found(len(rows), {party: sum(found[n] >= 0 for n in rows) for party, found in places.items()})


def take(kept: Path, agreed: Path, to: Path) -> Found:
    """Writes this party's list of ids; what was kept is of no more use."""
    mine, what = _read(kept, Kept), _read(agreed, Agreed)
    if len(what.places) != len(what.tokens) or not all(-1 <= place < len(mine.ids) for place in what.places):
        raise DataError(f"{agreed}: it does not fit what is kept in {kept}")
    _write_ids(to, what.tokens, ["" if place < 0 else mine.ids[place] for place in what.places])
    return Found(len(what.tokens), {"here": sum(place >= 0 for place in what.places)})


def _shuffled(records: Path, column: str) -> list[str]:
    """The ids of a file in an order that says nothing."""
    frame = load(records).frame
    if column not in frame.columns:
        raise UsageError(f"{records}: there is no column {column}")
    ids = [str(name).strip() for name in frame[column]]
    if len(set(ids)) < len(ids):
        raise DataError(f"{records}: column {column}: an id is there twice")
    if not ids or "" in ids or any("," in name for name in ids):
        raise DataError(f"{records}: column {column}: ids are needed, and none may be empty or hold a comma")
    random.SystemRandom().shuffle(ids)
    return ids


def _write_ids(path: Path, tokens: list[str], ids: list[str]) -> None:
    path.write_text("".join(f"{token},{name}\n" for token, name in zip(tokens, ids, strict=True)))


def _keep(path: Path, kept: Kept) -> None:
    """For this machine's own people alone; what lies there of an earlier match is not lost by accident."""
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        raise UsageError(f"{path} is there already, of another match: name another with --kept") from None
    with os.fdopen(descriptor, "wb") as file:
        file.write(msgspec.msgpack.encode(kept))


def _write(path: Path, what: Asked | Answered | Agreed) -> None:
    path.write_bytes(msgspec.msgpack.encode(what))


def _read(path: Path, kind: type[T]) -> T:
    try:
        return msgspec.msgpack.decode(path.read_bytes(), type=kind)
    except OSError as error:
        raise UsageError(f"{path}: cannot be read ({error.strerror})") from None
    except msgspec.DecodeError as error:
        raise DataError(f"{path}: is no file of this step of a match ({error})") from None
