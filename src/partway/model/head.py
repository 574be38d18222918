"""The head behind which a site trains its bottom by itself."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import nn

HIDDEN = 64
"""Numbers in the hidden layer."""


def local_head(shape: Sequence[int], classes: int, hidden: bool) -> nn.Sequential:
    """From a bottom's output, shape (records, *shape), to scores, shape (records, classes).

    It begins with a ReLU, for networks are mostly cut before one.

    >>> local_head((16,), classes=7, hidden=False)
    Sequential(
      (0): ReLU()
      (1): Flatten(start_dim=1, end_dim=-1)
      (2): Linear(in_features=16, out_features=7, bias=True)
    )
    """
    width = math.prod(shape)
    layers: list[nn.Module] = [nn.ReLU(), nn.Flatten()]
    if hidden:
        layers += [nn.Linear(width, HIDDEN), nn.ReLU()]
        width = HIDDEN
    return nn.Sequential(*layers, nn.Linear(width, classes))
