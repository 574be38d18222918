"""A network that is no sequence: cut after `gate`, two values and a mask cross together."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor, nn

from partway.model.recipe import Between, Recipe


@dataclass(frozen=True)
class Terms:
    """Its arguments."""

    drop: Annotated[float, Between(0, 0.9)] = 0.0
    normalised: bool = False


class Residual(nn.Module):
    """Six numbers in, scores of three classes out."""

    def __init__(self, drop: float, normalised: bool) -> None:
        super().__init__()
        self.first, self.gate = nn.Linear(6, 8), nn.Linear(8, 4)
        self.middle, self.last = nn.Linear(12, 8), nn.Linear(8, 3)
        self.drop = nn.Dropout(drop)
        self.norm = nn.BatchNorm1d(8) if normalised else nn.Identity()
        self.shift = nn.Parameter(torch.rand(8))  # no module's reset_parameters() draws it

    def forward(self, x: Tensor) -> Tensor:
        h = self.drop(self.norm(self.first(x)) + self.shift)
        away = h < -0.5
        g = self.gate(h).tanh()
        y = self.middle(torch.cat([h.masked_fill(away, 0.0), g], 1)).relu() + h
        return self.last(y)


NETWORKS = {"residual": Recipe(lambda terms: Residual(terms.drop, terms.normalised), Terms)}
