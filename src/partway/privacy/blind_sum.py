"""A sum over sites that the server adds up without being able to read a share or the total.

Each site writes its share in fixed point, adds a mask for each pair of sites (they cancel in the sum) and one site
adds a mask that only sites know (it stays on the total until a site takes it off). All is modulo 2^64. Pairwise masks
are those of Bonawitz et al. (2017), section 4; numbers, keys and measurements are in `docs/blind-sum.md`. For honest
but curious parties that do not collude; a missing site blocks the sum.

>>> rounded = decode(encode(np.array([0.1, -3.0], dtype="float32"), sites=3), np.dtype("float32"))
>>> rounded.tolist() == np.array([0.1, -3.0], dtype="float32").tolist()
True
"""

from __future__ import annotations

import hmac
import os
import struct
from collections.abc import Callable, Sequence
from typing import NoReturn

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from numpy.typing import NDArray

from partway.errors import JobFailed
from partway.privacy.seal import Keys

Words = NDArray[np.uint64]
Numbers = NDArray[np.float64] | NDArray[np.float32]

LIMBS = {np.dtype("float32"): (40,), np.dtype("float64"): (20, 72)}
"""Words a number, and the binary places of each: float32 to 2^-41, float64 to 2^-73, without carries between them."""
HEADROOM = 62
"""Every limb of a total stays below 2^62."""
_BLOCK = 1 << 16
"""Words masked at once: 512 KiB, so that a mask never exists whole."""
_ZEROS = memoryview(bytes(8 * _BLOCK))
_FROM_ZERO = modes.CTR(bytes(16))


def encode(share: Numbers, sites: int) -> Words:
    """Fixed point, shape (n * words a number,): first all high limbs, then all low ones.

    Raises:
        JobFailed: a number is not finite, or so large that a total over `sites` could overflow. Never clamped.
    """
    places = LIMBS[share.dtype]
    rest, words = share.astype(np.float64), np.empty((len(places), len(share)), np.int64)
    for number, place in enumerate(places):
        limb = np.rint(rest * 2.0**place)
        if limb.size and not np.abs(limb).max() < 2.0**HEADROOM / sites:  # so written, NaN is refused too
            _refuse(share, 2.0 ** (HEADROOM - places[0]) / sites)
        words[number] = limb
        if number + 1 < len(places):
            rest -= limb * 2.0**-place  # exact: a limb is a rounding of the rest
    return words.reshape(-1).view(np.uint64)


def _refuse(share: Numbers, largest: float) -> NoReturn:
    if not np.isfinite(share).all():
        raise JobFailed("a share of a sum holds NaN or infinite numbers; lower the learning rate")
    raise JobFailed(f"a share of a sum holds {np.abs(share).max():.3g}; at most {largest:.3g} can be summed")


def decode(total: Words, dtype: np.dtype) -> Numbers:
    """Numbers of `dtype`, shape (n,), from a total's words; the low limb comes first, so that it is not lost."""
    places = LIMBS[dtype]
    limbs = total.view(np.int64).reshape(len(places), -1)
    numbers: NDArray[np.float64] = limbs[-1] * 2.0 ** -places[-1]
    for limb, place in zip(limbs[-2::-1], places[-2::-1], strict=True):
        numbers += limb * 2.0**-place
    rounded: Numbers = numbers.astype(dtype)
    return rounded


def add(shares: Sequence[NDArray[np.uint64] | Numbers]) -> NDArray[np.uint64] | Numbers:
    """The server's part: adds what it cannot read, in the order given; words wrap modulo 2^64."""
    total = shares[0].copy()
    for share in shares[1:]:
        total += share
    return total


class BlindSum:
    """A site's half of every sum of one job.

    Args:
        keys: agreed with the other sites.
    """

    def __init__(self, keys: Keys) -> None:
        self._keys = keys
        self._group = b""
        self._turn = -1
        self._sent: dict[str, Words] = {}
        """Of the newest turn, by segment: the plain words that its mask was used for."""
        self._masks: dict[str, tuple[Words, Words]] = {}
        """Of the newest turn, by segment: what goes on this site's share, and what comes off the total."""

    def offer(self, group: bytes | None = None) -> dict[str, bytes]:
        """The first seat draws the group's key, or takes this one, and seals it for each other member."""
        self._group = group or os.urandom(32)
        keys = self._keys
        return {name: keys.seal(name, self._group, _OFFER + keys.transcript) for name in keys.seats if name != keys.me}

    def accept(self, sealed: bytes) -> None:
        """Takes the group's key from the first seat. Raises `PeerError` if it is not its."""
        self._group = self._keys.open(self._keys.seats[0], sealed, _OFFER + self._keys.transcript)

    def confirmation(self, name: str) -> bytes:
        """What a site that holds the same key and has heard the same says: HMAC-SHA256, 32 bytes."""
        if not self._group:
            raise JobFailed(f"{self._keys.me} has no group key yet")
        text = b"partway/sum/confirm/v1\0" + name.encode() + self._keys.transcript
        return hmac.digest(self._group, text, "sha256")

    def secret(self, purpose: bytes) -> bytes:
        """32 bytes that every member has, and nobody else."""
        return hmac.digest(self._group, b"partway/group/v1\0" + purpose, "sha256")

    def prepare(self, turn: int, segment: str, numbers: int, dtype: np.dtype) -> None:
        """Makes the masks of a sum before its numbers are known: while others are waited for."""
        self._go_to(turn)
        if segment in self._masks:
            return
        keys, label = self._keys, self._label(turn, segment)
        own, group = np.zeros((2, numbers * len(LIMBS[dtype])), np.uint64)
        _stream(self._group, label, group, np.add)
        for name, secret in keys.masking.items():
            _stream(secret, label, own, np.add if keys.me < name else np.subtract)
        if keys.me == keys.seats[0]:
            # One site and not all: S times a mask has zeros in its low bits where S is even, and they would lie open.
            own += group
        self._masks[segment] = own, group

    def mask(self, turn: int, segment: str, share: Numbers) -> Words:
        """This site's share as the server may see it.

        Raises:
            JobFailed: as `encode`; or the mask of (turn, segment) was used for other numbers, for the difference of
                two such texts is the difference of the plain shares.
        """
        self._go_to(turn)
        plain = encode(share, len(self._keys.seats))
        before = self._sent.setdefault(segment, plain)
        if before is not plain and not np.array_equal(before, plain):
            raise JobFailed(f"{self._keys.me} has used the mask of {segment} in turn {turn} before")
        self.prepare(turn, segment, len(share), share.dtype)
        masked: Words = plain + self._masks[segment][0]
        return masked

    def spoil(self, turn: int, segment: str, numbers: int, dtype: np.dtype) -> Words:
        """Random words for a share that cannot be: the total is noise to every site, where without a word it would be
        the sum of the others alone."""
        self.prepare(turn, segment, numbers, dtype)
        words = np.frombuffer(bytearray(os.urandom(8 * numbers * len(LIMBS[dtype]))), np.uint64)
        return self._sent.setdefault(segment, words)

    def unmask(self, turn: int, segment: str, total: Words, dtype: np.dtype) -> Numbers:
        """The plain total of a sum to which this site has sent its share.

        Raises:
            JobFailed: it has sent none in this turn.
        """
        if turn != self._turn or segment not in self._sent:
            raise JobFailed(f"{self._keys.me} has sent no share of {segment} in turn {turn}, and takes no total")
        return decode(total - self._masks[segment][1], dtype)

    def _go_to(self, turn: int) -> None:
        if turn < self._turn:
            raise JobFailed(f"{self._keys.me} has left turn {turn} behind, and its masks with it")
        if turn > self._turn:
            self._turn, self._sent, self._masks = turn, {}, {}

    def _label(self, turn: int, segment: str) -> bytes:
        """What a mask's key is derived for: two sums never share one."""
        name, keys = segment.encode(), self._keys
        return b"partway/sum/mask/v1\0" + keys.job + struct.pack("<IQH", keys.epoch, turn, len(name)) + name


def _stream(secret: bytes, label: bytes, words: Words, apply: Callable[..., object]) -> None:
    """Adds or subtracts AES-256-CTR keystream, read as little-endian words, in place."""
    encryptor = Cipher(algorithms.AES(hmac.digest(secret, label, "sha256")), _FROM_ZERO).encryptor()
    for start in range(0, words.size, _BLOCK):
        block = words[start : start + _BLOCK]
        apply(block, np.frombuffer(encryptor.update(_ZEROS[: 8 * block.size]), "<u8"), out=block)


class ClearSum:
    """The same half of a sum that hides nothing: to measure what blindness costs."""

    def prepare(self, turn: int, segment: str, numbers: int, dtype: np.dtype) -> None:
        """There is nothing to prepare."""

    def mask(self, turn: int, segment: str, share: Numbers) -> Numbers:
        """The share as it is."""
        return share

    def spoil(self, turn: int, segment: str, numbers: int, dtype: np.dtype) -> Numbers:
        """Zeros."""
        return np.zeros(numbers, dtype)

    def unmask(self, turn: int, segment: str, total: Numbers, dtype: np.dtype) -> Numbers:
        """The total as it is, in memory of its own: each copy's update may write into it."""
        return total.copy()


_OFFER = b"partway/sum/group/v1\0"
