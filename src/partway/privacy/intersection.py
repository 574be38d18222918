"""Which ids two parties have in common, without either learning the other's: Diffie-Hellman, Meadows 1986.

Each id is hashed to a point and multiplied by a secret of each party, in either order with the same result; only then
are points compared. For honest but curious parties: the asker learns which of its ids the other has, both learn how
many ids the other has, and whoever sees the points between them learns these numbers and nothing else.

Points are those of X25519 (RFC 7748): a hash is taken as the coordinate of a point on the curve or on its twist, both
of which the ladder multiplies alike.

>>> a, b = new_secret(), new_secret()
>>> asked = blind(["anna", "bert"], a)
>>> common(asked=again(asked, b), theirs=blind(["bert", "carl"], b), secret=a)
[-1, 0]
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Sequence

from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey

from partway.errors import DataError


def new_secret() -> bytes:
    """32 bytes; for one match, and never to be shown."""
    return os.urandom(32)


def blind(ids: Iterable[str], secret: bytes) -> list[bytes]:
    """Each id as a point, times a secret; 32 bytes each."""
    return again((hashlib.sha256(b"partway/match/v1\0" + name.encode()).digest() for name in ids), secret)


def again(points: Iterable[bytes], secret: bytes) -> list[bytes]:
    """Points times a secret. Raises `DataError` if one is none."""
    key = X25519PrivateKey.from_private_bytes(secret)
    try:
        return [key.exchange(X25519PublicKey.from_public_bytes(point)) for point in points]
    except ValueError:
        raise DataError("a point of the other party is none: its file is damaged, or it was made to cheat") from None


def common(asked: Sequence[bytes], theirs: Sequence[bytes], secret: bytes) -> list[int]:
    """For each id that was asked for, its place among the other party's, or -1.

    Args:
        asked: this party's points, times both secrets.
        theirs: the other party's points, times its secret.
        secret: this party's.
    """
    places = {point: place for place, point in enumerate(again(theirs, secret))}
    return [places.get(point, -1) for point in asked]
