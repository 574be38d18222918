"""A network of which, cut after `aside` and `third`, the last piece uses something of the first."""

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
    raw: bool = False
    """The last piece uses the records themselves, too."""


class Skipping(nn.Module):
    """Scores of three classes come out; what `aside` makes is used by `last` alone."""

    def __init__(self, inputs: int, raw: bool) -> None:
        super().__init__()
        self.raw = raw
        self.first, self.second, self.third = nn.Linear(inputs, 8), nn.Linear(8, 5), nn.Linear(5, 4)
        self.aside, self.last = nn.Linear(8, 2), nn.Linear(4 + 5 + 2 + raw * inputs, 3)

    def forward(self, x: Tensor) -> Tensor:
        one = self.first(x).tanh()
        aside = self.aside(one)
        two = self.second(one).tanh()
        three = self.third(two).tanh()
        return self.last(torch.cat([three, two, aside, *([x] if self.raw else [])], 1))


NETWORKS = {"skipping": Recipe(lambda terms: Skipping(terms.inputs, terms.raw), Terms)}
