"""What is drawn at a party: the order of its records, its first weights, its dropout. All from a secret of its own.

The job's seed is known to everybody; a server that could follow a record by its place in each epoch, or recompute the
sites' first weights, could match patients (`docs/threat-model.md`).
"""

from __future__ import annotations

import hashlib

import numpy as np
import torch
from torch import Tensor

from partway.plan.plan import Copy


def derived(secret: bytes, *what: object) -> bytes:
    """32 bytes for one purpose from a party's secret.

    >>> derived(b"s", "order", 1) == derived(b"s", "order", 2)
    False
    """
    return hashlib.sha256(b"partway/draw/v1\0" + secret + "\0".join(map(str, what)).encode()).digest()


def first_weights(secret: bytes, job: bytes, segment: str) -> bytes:
    """The secret from which a party draws a segment's first weights."""
    return derived(secret, "first weights", job.hex(), segment)


def forward_seed(secret: bytes, job: bytes, turn: int, micro_batch: int, copy: Copy) -> int:
    """63 bits that seed what a segment draws in one forward, such as dropout."""
    return int.from_bytes(derived(secret, "forward", job.hex(), turn, micro_batch, *copy)[:8], "little") >> 1


def order_of(records: int, secret: bytes, job: bytes, epoch: int) -> Tensor:
    """In which order a site's training records stand in one epoch: a permutation, shape (records,), by PCG64."""
    seed = int.from_bytes(derived(secret, "order", job.hex(), epoch), "little")
    return torch.from_numpy(np.random.Generator(np.random.PCG64(seed)).permutation(records))
