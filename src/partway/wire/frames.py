"""One frame: a fixed prefix, a MessagePack header, and aligned tensor bytes. See `docs/wire-format.md`.

This is where what comes from a peer enters: whatever is wrong with it becomes a `PeerError` here.

>>> one, other = encode(Head("svi", "server"), Bye()), encode(Head("svi", "other"), Bye())
>>> [frame.head.to for frame in split(one + other, "svi")]
['server', 'other']
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from typing import Annotated, NamedTuple

import msgspec
from msgspec import Meta
from torch import Tensor

from partway.errors import PeerError
from partway.protocol.messages import Bye, Fail, Greet, GroupKey, Head, Hello, Letter, Message, Offer, Ready
from partway.wire import tensors as wire_tensors
from partway.wire.tensors import DTYPES, Spec, padding, payload_size

MAGIC = b"PWAY"
FORMAT = 1
PREFIX = struct.Struct("<4sB3xI4xQ")
"""Magic, format, header length, payload length: 24 bytes, little-endian."""
LARGEST_HEADER = 2**20
LARGEST_PAYLOAD = 2**32


class Header(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """What the prefix is followed by."""

    head: Head
    message: Greet | Offer | Hello | GroupKey | Ready | Letter | Bye | Fail
    tensors: Annotated[tuple[Spec, ...], Meta(max_length=4096)] = ()


_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(Header)


class Frame(NamedTuple):
    """A decoded frame; its tensors are still bytes, for the receiver checks their names first."""

    head: Head
    message: Message
    specs: tuple[Spec, ...]
    payload: memoryview
    data: memoryview
    """All of it, as it came: to be forwarded, or told from another one."""

    def tensors(self) -> dict[str, Tensor]:
        return wire_tensors.unpack(self.specs, self.payload)


def encode(head: Head, message: Message, tensors: Mapping[str, Tensor] | None = None) -> bytes:
    """A frame's bytes."""
    specs, pieces = wire_tensors.pack(tensors or {})
    header = _encoder.encode((head, message, specs))
    prefix = PREFIX.pack(MAGIC, FORMAT, len(header), payload_size(specs))
    return b"".join((prefix, header, bytes(padding(PREFIX.size + len(header))), *pieces))


def split(data: bytes | memoryview, peer: str) -> list[Frame]:
    """The frames that `peer` sent, one after the other. Raises `PeerError` for anything else than whole good frames."""
    rest, frames = memoryview(data), []
    while True:
        frames.append(_first(rest, peer))
        rest = rest[len(frames[-1].data) :]
        if not rest:
            return frames


def decode(data: bytes | memoryview, peer: str) -> Frame:
    """The one frame that `peer` sent."""
    first, *others = split(data, peer)
    if others:
        raise PeerError(peer, f"sent {1 + len(others)} frames where one was due")
    return first


def _first(data: memoryview, peer: str) -> Frame:
    if len(data) < PREFIX.size:
        raise PeerError(peer, f"sent {len(data)} bytes, which is no frame")
    magic, version, length, payload = PREFIX.unpack_from(data)
    if magic != MAGIC:
        raise PeerError(peer, "sent something that is not a Partway frame")
    if version != FORMAT:
        raise PeerError(
            peer, f"sent frame format {version}, and format {FORMAT} is read here: install the same version"
        )
    start = PREFIX.size + length
    start += padding(start)
    end = start + payload
    if length > LARGEST_HEADER or payload > LARGEST_PAYLOAD or end > len(data):
        raise PeerError(peer, f"sent a damaged frame: its lengths do not fit into {len(data)} bytes")
    try:
        header = _decoder.decode(data[PREFIX.size : PREFIX.size + length])
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise PeerError(peer, f"sent a header that cannot be read ({error})") from None
    for spec in header.tensors:
        if spec.dtype not in DTYPES:
            raise PeerError(peer, f"sent a tensor of dtype {spec.dtype}, which the wire format does not have")
    if payload_size(header.tensors) != payload:
        raise PeerError(peer, "sent a frame whose tensors do not fill its payload")
    return Frame(header.head, header.message, header.tensors, data[start:end], data[:end])
