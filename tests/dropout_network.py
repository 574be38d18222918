"""Six features to three classes, with dropout before each cut, and with BatchNorm at the server."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

from torch import nn

from partway.model.recipe import Recipe


@dataclass(frozen=True)
class Nothing:
    """It takes no arguments."""


def build(_: Nothing) -> nn.Sequential:
    """To be cut after `one`, and in a U-shape after `two`."""
    return nn.Sequential(
        OrderedDict(
            one=nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Dropout(0.3)),
            two=nn.Sequential(nn.Linear(8, 5), nn.Tanh(), nn.Dropout(0.3)),
            three=nn.Linear(5, 3),
        )
    )


def with_batchnorm(_: Nothing) -> nn.Sequential:
    """To be cut after `one`."""
    two = nn.Sequential(nn.BatchNorm1d(8), nn.Linear(8, 3))
    return nn.Sequential(OrderedDict(one=nn.Sequential(nn.Linear(6, 8), nn.Tanh()), two=two))


NETWORKS = {"dropout": Recipe(build, Nothing), "batchnorm": Recipe(with_batchnorm, Nothing)}
