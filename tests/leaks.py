"""Looks for rows of numbers in bytes, wherever they stand: the search that every test of what leaves shares."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

LEAST = 16
"""Bytes of a row: shorter ones would be found by chance, and are counted instead."""


def found(
    rows: NDArray[np.float64], haystack: Iterable[bytes], dtypes: tuple[str, ...] = ("float32", "float64")
) -> int:
    """How many of `rows`, shape (n, width), stand whole in some piece of the haystack, in any of the dtypes."""
    hits: set[int] = set()
    for dtype in dtypes:
        hits |= _hits(np.ascontiguousarray(rows, dtype=dtype), haystack)
    return len(hits)


def too_short(rows: NDArray[np.float64], dtype: str = "float32") -> int:
    """How many rows cannot be searched for."""
    return len(rows) if rows.shape[1] * np.dtype(dtype).itemsize < LEAST else 0


def _hits(rows: NDArray, haystack: Iterable[bytes]) -> set[int]:
    needles: dict[bytes, list[int]] = {}
    texts = [row.tobytes() for row in rows]
    for number, text in enumerate(texts):
        needles.setdefault(text[:LEAST], []).append(number)
    keys = np.sort(_keys(np.frombuffer(b"".join(needles), np.uint32).reshape(-1, LEAST // 4)))
    hits: set[int] = set()
    for piece in haystack:
        for shift in range(4):  # a row may begin at any byte
            words = np.frombuffer(piece[shift : shift + (len(piece) - shift) // 4 * 4], np.uint32)
            if len(words) < LEAST // 4:
                continue
            windows = np.lib.stride_tricks.sliding_window_view(words, LEAST // 4)
            for start in np.nonzero(np.isin(_keys(windows), keys))[0]:
                at = shift + 4 * int(start)
                for number in needles.get(piece[at : at + LEAST], ()):
                    if piece[at : at + len(texts[number])] == texts[number]:
                        hits.add(number)
    return hits


def _keys(windows: NDArray[np.uint32]) -> NDArray[np.uint64]:
    """One number for four words; the same words give the same number."""
    wide = windows.astype(np.uint64)
    return (
        wide[:, 0] + (wide[:, 1] << np.uint64(21)) + (wide[:, 2] << np.uint64(32)) + wide[:, 3] * np.uint64(0x9E3779B1)
    )
