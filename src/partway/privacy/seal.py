"""Keys between the sites of a job, and letters that the server forwards and cannot read. See `docs/blind-sum.md`.

>>> a, b = Keys("a", bytes(32)), Keys("b", bytes(32))
>>> for keys in (a, b):
...     keys.agree({"a": Public(b"key of a", a.public), "b": Public(b"key of b", b.public)})
>>> b.open("a", a.seal("b", b"weights", b"turn 3"), b"turn 3")
b'weights'
"""

from __future__ import annotations

import hashlib
import math
import os
import struct
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from partway.errors import PartwayError, PeerError

NONCE_BYTES = 12
SEAL_BYTES = NONCE_BYTES + 16
"""A sealed text is longer by a nonce and a tag."""
MOST_PAIRS = 20
"""Above so many sites each masks towards its neighbours on a ring, not towards all others."""


class Public(NamedTuple):
    """What one site shows the others. Its statement must have been checked to be signed with `certificate_key`."""

    certificate_key: bytes
    """DER SubjectPublicKeyInfo."""
    exchange_key: bytes
    """X25519, 32 bytes."""


def statement(job: bytes, epoch: int, name: str, exchange_key: bytes) -> bytes:
    """What a party signs in its HELLO: this key is mine, in this job and membership epoch.

    Args:
        job: digest of the signed job, 32 bytes.
    """
    text = name.encode()
    return b"partway/sum/hello/v1\0" + job + struct.pack("<IH", epoch, len(text)) + text + exchange_key


class Keys:
    """One site's keys towards the others, fresh at each start of a process and never on a disk.

    So no mask and no sealed text can be met again after a crash, and there is no counter to keep.

    Args:
        job: digest of the signed job, 32 bytes.
        epoch: of the membership; whoever restarts opens a new one.
    """

    def __init__(self, me: str, job: bytes, epoch: int = 0) -> None:
        self.me, self.job, self.epoch = me, job, epoch
        self._private = X25519PrivateKey.generate()
        self.public = self._private.public_key().public_bytes_raw()
        self.transcript = b""
        """SHA-256 over what every site has shown: who has the same has heard the same."""
        self.seats: tuple[str, ...] = ()
        """Who shares the group's key; the first hands it out."""
        self.masking: dict[str, bytes] = {}
        """The secret shared with each neighbour on the ring, 32 bytes, from which masks are made."""
        self._seals: dict[str, AESGCM] = {}

    def agree(self, publics: Mapping[str, Public], members: Sequence[str] | None = None, first: str = "") -> None:
        """Derives every key from what the parties have shown, this one's own among them.

        Args:
            members: who shares the group's key; if it is not said, all.
            first: who hands it out; if it is not said, one that nobody can choose.

        Raises:
            PeerError: a site's X25519 key is none.
        """
        texts = [
            hashlib.sha256(public.certificate_key + statement(self.job, self.epoch, name, public.exchange_key)).digest()
            for name, public in sorted(publics.items())
        ]
        self.transcript = hashlib.sha256(b"".join(texts)).digest()
        ranks = {name: hashlib.sha256(self.transcript + name.encode()).digest() for name in members or publics}
        self.seats = tuple(sorted(ranks, key=lambda name: (name != first, ranks[name])))
        near = _neighbours(self.seats, self.me) if self.me in ranks else set[str]()
        for name, public in publics.items():
            if name == self.me:
                continue
            try:
                shared = self._private.exchange(X25519PublicKey.from_public_bytes(public.exchange_key))
            except ValueError:
                raise PeerError(name, "sent a key that is no X25519 public key") from None
            pair = "\0".join(sorted((self.me, name))).encode()
            self._seals[name] = AESGCM(self._derived(shared, b"partway/sum/seal/v1\0" + pair))
            if name in near:
                self.masking[name] = self._derived(shared, b"partway/sum/pair/v1\0" + pair)

    def seal(self, peer: str, plain: bytes, associated: bytes) -> bytes:
        """`plain` for one other site: nonce, ciphertext and tag, `SEAL_BYTES` longer.

        Args:
            associated: what the text is bound to; the receiver must name the same.
        """
        nonce = os.urandom(NONCE_BYTES)
        return nonce + self._with(peer).encrypt(nonce, plain, associated)

    def open(self, peer: str, sealed: bytes, associated: bytes) -> bytes:
        """What `peer` sealed. Raises `PeerError` if it is not its, was altered, or is bound to something else."""
        try:
            return self._with(peer).decrypt(sealed[:NONCE_BYTES], sealed[NONCE_BYTES:], associated)
        except (InvalidTag, ValueError):
            raise PeerError(peer, "sent a sealed letter that does not open: somebody has altered it") from None

    def _with(self, peer: str) -> AESGCM:
        if peer not in self._seals:
            raise PartwayError(f"{self.me} has no key with {peer}: they have not agreed on one")
        return self._seals[peer]

    def _derived(self, shared: bytes, label: bytes) -> bytes:
        return HKDF(hashes.SHA256(), 32, salt=self.transcript, info=label).derive(shared)


def _neighbours(seats: tuple[str, ...], me: str) -> set[str]:
    """All others; of more than `MOST_PAIRS` sites the ring's nearest 2 log2 S, which must all collude to unmask one."""
    count, at = len(seats), seats.index(me)
    reach = count // 2 if count <= MOST_PAIRS else math.ceil(math.log2(count))
    return {seats[(at + side * step) % count] for step in range(1, reach + 1) for side in (1, -1)} - {me}
