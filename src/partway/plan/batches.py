"""Which site fills which place of a union batch; which of its records a site puts there is its own secret."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterator, Mapping
from typing import NamedTuple


class Batch(NamedTuple):
    """One union batch: records of each site, and where they begin in that site's own order of the epoch."""

    rows: dict[str, int]
    offsets: dict[str, int]


def shuffled(places: int, *key: object) -> list[int]:
    """A permutation of `range(places)` that depends on the key alone, on every machine and version of Python.

    Places are sorted by 64-bit numbers from SHAKE-256 over the key.

    >>> shuffled(5, "seed", 0)
    [1, 3, 4, 2, 0]
    """
    stream = hashlib.shake_256("\0".join(map(str, ("partway/batches/v1", *key))).encode()).digest(8 * places)
    return sorted(range(places), key=struct.unpack(f">{places}Q", stream).__getitem__)


def union_batches(sizes: Mapping[str, int], batch: int, seed: int, epoch: int) -> Iterator[Batch]:
    """The union batches of one epoch: every record of every site once, in batches as equal as can be.

    Equal ones, and not a short last one: in a short batch the other sites' records may be too few to hide in.

    Args:
        sizes: records of each site, in the order of the plan's sites.
        batch: the largest number of records in a union batch.

    >>> [b.rows for b in union_batches({"a": 5, "b": 2}, batch=4, seed=0, epoch=0)]
    [{'a': 3, 'b': 0}, {'a': 2, 'b': 2}]
    """
    owners = [site for site, size in sizes.items() for _ in range(size)]
    order = shuffled(len(owners), seed, epoch)
    batches = -(-len(owners) // batch)
    offsets = dict.fromkeys(sizes, 0)
    for number in range(batches):
        places = order[number * len(order) // batches : (number + 1) * len(order) // batches]
        rows = dict.fromkeys(sizes, 0)
        for place in places:
            rows[owners[place]] += 1
        yield Batch(rows, dict(offsets))
        for site, count in rows.items():
            offsets[site] += count
