"""Which site fills which place of a union batch; which of its records a site puts there is its own secret."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterator, Mapping
from typing import NamedTuple


class Batch(NamedTuple):
    """Records of each site, and where they begin in that site's own order of the epoch."""

    rows: dict[str, int]
    offsets: dict[str, int]


def equal_parts(total: int, most: int) -> list[tuple[int, int]]:
    """Where each part of `total` places begins and ends: parts as equal as can be, none larger than `most`.

    >>> equal_parts(7, 3)
    [(0, 2), (2, 4), (4, 7)]
    """
    parts = -(-total // most)
    return [(number * total // parts, (number + 1) * total // parts) for number in range(parts)]


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
    offsets = dict.fromkeys(sizes, 0)
    for begin, end in equal_parts(len(order), batch):
        rows = dict.fromkeys(sizes, 0)
        for place in order[begin:end]:
            rows[owners[place]] += 1
        yield Batch(rows, dict(offsets))
        for site, count in rows.items():
            offsets[site] += count


def local_batches(sizes: Mapping[str, int], batch: int) -> list[Batch]:
    """The batches of an epoch in which every site goes through its own records by itself, side by side.

    Args:
        batch: the largest number of records of a site in a batch; a site that has no more has 0.

    >>> [b.rows for b in local_batches({"a": 5, "b": 2}, batch=3)]
    [{'a': 2, 'b': 2}, {'a': 3, 'b': 0}]
    """
    parts = {site: equal_parts(size, batch) for site, size in sizes.items()}
    batches = []
    for number in range(max(map(len, parts.values()), default=0)):
        here = {site: own[number] if number < len(own) else (0, 0) for site, own in parts.items()}
        rows = {site: end - begin for site, (begin, end) in here.items()}
        batches.append(Batch(rows, {site: begin for site, (begin, _) in here.items()}))
    return batches


def micro_batches(batch: Batch, most: int, apart: bool = False) -> list[Batch]:
    """A batch in parts of at most `most` records over all lanes, as equal as can be.

    Each lane's rows stay in their order and are spread evenly over the parts, so that no lane waits for the others'.

    Args:
        apart: each lane's rows are cut by themselves: at most `most` of each lane.

    >>> [b.rows for b in micro_batches(Batch({"a": 5, "b": 2}, {"a": 0, "b": 0}), most=4)]
    [{'a': 2, 'b': 1}, {'a': 3, 'b': 1}]
    >>> [b.rows for b in micro_batches(Batch({"a": 5, "b": 2}, {"a": 0, "b": 0}), most=4, apart=True)]
    [{'a': 2, 'b': 2}, {'a': 3, 'b': 0}]
    """
    if apart:
        parts = local_batches(batch.rows, most)
    else:
        places = [((2 * row + 1) / (2 * n), lane) for lane, n in batch.rows.items() for row in range(n)]
        owners = [lane for _, lane in sorted(places, key=lambda place: place[0])]
        parts, begun = [], dict.fromkeys(batch.rows, 0)
        for begin, end in equal_parts(len(owners), most):
            rows = {lane: owners[begin:end].count(lane) for lane in batch.rows}
            parts.append(Batch(rows, dict(begun)))
            begun = {lane: begun[lane] + n for lane, n in rows.items()}
    return [Batch(p.rows, {lane: batch.offsets.get(lane, 0) + o for lane, o in p.offsets.items()}) for p in parts]
