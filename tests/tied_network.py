"""A network of which, cut after `bend` and `middle`, the last piece uses a weight of the first, tied or as the same
module called again; and a whole number crosses beside what is trained."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor, nn

from partway.model.recipe import Between, Recipe


@dataclass(frozen=True)
class Terms:
    """Its arguments."""

    inputs: Annotated[int, Between(1, 64)] = 6
    called: bool = False
    """One module twice, and not two with a weight in common."""
    normalised: bool = False
    drawn: bool = False
    """A buffer that two pieces use."""


class Norm(nn.Module):
    """Keeps the mean and the variance of what it was called with, and nothing else."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(8))
        self.register_buffer("variance", torch.ones(8))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.batch_norm(x, self.mean, self.variance, training=self.training)


class Tied(nn.Module):
    """Scores of three classes come out."""

    def __init__(self, terms: Terms) -> None:
        super().__init__()
        inputs = terms.inputs
        self.first, self.bend, self.rows = nn.Sequential(nn.Linear(inputs, 8)), nn.Tanh(), nn.Embedding(8, 8)
        self.middle, self.again, self.last = nn.Linear(8, inputs), nn.Linear(inputs, 8), nn.Linear(8, 3)
        self.register_buffer("speeds", torch.rand(8) if terms.drawn else torch.linspace(0.5, 1, 8))
        if terms.normalised:
            self.first.append(Norm())
        if not terms.called:
            self.again.weight = self.first[0].weight
        else:
            self.again = self.first

    def forward(self, x: Tensor) -> Tensor:
        one = self.first(x)
        largest, one = one.argmax(1), self.bend(one)
        turned = self.speeds.cos()
        two = self.middle(one * turned + self.rows(largest))
        scores: Tensor = self.last(self.again(two.tanh()).tanh() * turned)
        return scores


NETWORKS = {"tied": Recipe(Tied, Terms)}
