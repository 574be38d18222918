"""A tensor's name, dtype, shape and raw bytes. What cannot be named is refused.

>>> spec = spec_of("x", torch.zeros(2, 3))
>>> spec
Spec(name='x', dtype='float32', shape=(2, 3))
>>> spec.nbytes
24
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from typing import Annotated

import msgspec
import numpy as np
import torch
from msgspec import Meta
from torch import Tensor

from partway.errors import PartwayError

ALIGNMENT = 64
"""Bytes; every tensor begins at a multiple of it."""

DTYPES = {
    "float64": torch.float64,
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "int64": torch.int64,
    "int32": torch.int32,
    "uint8": torch.uint8,
    "bool": torch.bool,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}

if sys.byteorder != "little":
    raise PartwayError("Partway sends tensors as little-endian bytes and does not run on a big-endian machine")


class Spec(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """What stands in a frame's header for each tensor."""

    name: Annotated[str, Meta(max_length=256)]
    dtype: Annotated[str, Meta(max_length=16)]
    shape: Annotated[tuple[Annotated[int, Meta(ge=0, lt=2**40)], ...], Meta(max_length=8)]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize


def spec_of(name: str, tensor: Tensor) -> Spec:
    """The header entry of a tensor; raises `PartwayError` for a dtype that the wire has no name for."""
    if tensor.dtype not in NAMES:
        raise PartwayError(f"{name}: a tensor of {tensor.dtype} cannot be sent; use one of {', '.join(DTYPES)}")
    return Spec(name, NAMES[tensor.dtype], tuple(tensor.shape))


def padding(length: int) -> int:
    return -length % ALIGNMENT


def payload_size(specs: Sequence[Spec]) -> int:
    """Bytes of the tensors, each padded to the alignment except the last."""
    size = 0
    for spec in specs:
        size += padding(size) + spec.nbytes
    return size


def pack(tensors: Mapping[str, Tensor]) -> tuple[tuple[Spec, ...], list[bytes | memoryview]]:
    """The header entries, and the payload in pieces to be joined; a piece may be a view of its tensor."""
    specs: list[Spec] = []
    pieces: list[bytes | memoryview] = []
    size = 0
    for name, tensor in tensors.items():
        spec = spec_of(name, tensor)
        if fill := padding(size):
            pieces.append(bytes(fill))
        if spec.nbytes:
            plain = tensor if tensor.is_cpu and tensor.is_contiguous() else tensor.cpu().contiguous()
            plain = plain.view(torch.int16) if plain.dtype is torch.bfloat16 else plain
            pieces.append(plain.detach().numpy().reshape(-1).view(np.uint8).data)
        size += fill + spec.nbytes
        specs.append(spec)
    return tuple(specs), pieces


def unpack(specs: Sequence[Spec], payload: bytes | memoryview) -> dict[str, Tensor]:
    """The tensors of a payload, of which `payload_size` has been checked; their memory is their own."""
    # PyTorch's own memory begins at a multiple of 64 bytes; with float32 in other memory some CPUs round otherwise.
    own = torch.empty(len(payload), dtype=torch.uint8)
    own.numpy()[:] = np.frombuffer(payload, dtype=np.uint8)
    tensors, at = {}, 0
    for spec in specs:
        count, kind = math.prod(spec.shape), DTYPES[spec.dtype]
        at += -at % ALIGNMENT
        if count:
            tensors[spec.name] = own[at : at + count * kind.itemsize].view(kind).view(spec.shape)
        else:
            tensors[spec.name] = torch.empty(spec.shape, dtype=kind)
        at += count * kind.itemsize
    return tensors
