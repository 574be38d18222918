"""Weights that several segments of one party share: each holds them, and all are stepped alike."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from partway.model.segment import Segment
from partway.plan.plan import Copy

Places = Mapping[str, slice]
"""Where one shared weight stands in the flat parameter of each segment."""


def meet(tied: Sequence[Places], segments: Mapping[Copy, Segment], copies: Iterable[Copy]) -> None:
    """The gradient of a shared weight is that of all its uses, at all of these copies."""
    for parts in _gradients(tied, segments, copies):
        total = torch.stack(parts).sum(0)
        for part in parts:
            part.copy_(total)


def counted_twice(tied: Sequence[Places], segments: Mapping[Copy, Segment], copies: Iterable[Copy]) -> float:
    """What a sum of the squares of these copies' gradients has too much: a shared weight counts once."""
    again = [part for parts in _gradients(tied, segments, copies) for part in parts[1:]]
    return sum(float(torch.linalg.vector_norm(part, dtype=torch.float64)) ** 2 for part in again)


def _gradients(tied: Sequence[Places], segments: Mapping[Copy, Segment], copies: Iterable[Copy]) -> list[list[Tensor]]:
    """Of each weight that several copies share: its part of each one's gradient."""
    have = {copy: gradient for copy in copies if (gradient := segments[copy].gradient()) is not None}
    found = [[g[places[c.segment]] for c, g in have.items() if c.segment in places] for places in tied]
    return [parts for parts in found if len(parts) > 1]
