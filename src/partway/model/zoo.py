"""The networks that a job may ask for by name, without BatchNorm.

>>> mlp(inputs=4, hidden=[8, 8], classes=3)
Sequential(
  (hidden): Sequential(
    (0): Linear(in_features=4, out_features=8, bias=True)
    (1): ReLU()
    (2): Linear(in_features=8, out_features=8, bias=True)
    (3): ReLU()
  )
  (output): Linear(in_features=8, out_features=3, bias=True)
)
"""

from __future__ import annotations

import itertools
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

from torch import Tensor, nn

from partway.errors import ConfigError
from partway.model.recipe import Between, Recipe

Classes = Annotated[int, Between(1, 10_000)]
"""Numbers that come out for a record: of classes as many as there are, of an answer or a number one."""


@dataclass(frozen=True)
class Mlp:
    """Arguments of `mlp`."""

    inputs: Annotated[int, Between(1, 100_000)]
    hidden: Annotated[tuple[Annotated[int, Between(1, 65_536)], ...], Between(1, 16)]
    classes: Classes


def mlp(inputs: int, hidden: Sequence[int], classes: int) -> nn.Sequential:
    """Linear layers with ReLU between them: inputs of shape (records, inputs), scores of shape (records, classes).

    The layers are `hidden.0` (linear), `hidden.1` (ReLU), `hidden.2` (linear) and so on, then `output`.
    """
    layers: list[nn.Module] = []
    for wide, narrow in itertools.pairwise([inputs, *hidden]):
        layers += [nn.Linear(wide, narrow), nn.ReLU()]
    return nn.Sequential(OrderedDict(hidden=nn.Sequential(*layers), output=nn.Linear([inputs, *hidden][-1], classes)))


def _divisible(filters: Sequence[int], groups: int) -> None:
    for number in filters:
        if number % groups:
            raise ConfigError(f"{number} filters cannot be divided into {groups} groups; change one of the two")


@dataclass(frozen=True)
class Cnn:
    """Arguments of `cnn`."""

    channels: Annotated[int, Between(1, 64)]
    height: Annotated[int, Between(4, 1024)]
    width: Annotated[int, Between(4, 1024)]
    filters: Annotated[tuple[Annotated[int, Between(1, 1024)], ...], Between(2, 2)]
    classes: Classes
    groups: Annotated[int, Between(1, 64)] = 1
    """Of the normalisation; both numbers of filters are multiples of it."""

    def __post_init__(self) -> None:
        _divisible(self.filters, self.groups)


def cnn(channels: int, height: int, width: int, filters: Sequence[int], classes: int, groups: int = 1) -> nn.Sequential:
    """Two convolutions that halve an image's sides, with GroupNorm (Wu and He, 2018, arXiv:1803.08494) and ReLU.

    Inputs of shape (records, channels, height, width), scores of shape (records, classes). The layers are
    `features.0` to `features.5`, `flatten` and `output`.
    """
    layers: list[nn.Module] = []
    for before, after in itertools.pairwise([channels, *filters]):
        layers += [nn.Conv2d(before, after, 3, stride=2, padding=1), nn.GroupNorm(groups, after), nn.ReLU()]
        height, width = (height + 1) // 2, (width + 1) // 2
    return nn.Sequential(
        OrderedDict(
            features=nn.Sequential(*layers),
            flatten=nn.Flatten(),
            output=nn.Linear(filters[-1] * height * width, classes),
        )
    )


@dataclass(frozen=True)
class Resnet:
    """Arguments of `resnet`."""

    channels: Annotated[int, Between(1, 64)]
    filters: Annotated[tuple[Annotated[int, Between(1, 1024)], ...], Between(1, 16)]
    classes: Classes
    groups: Annotated[int, Between(1, 64)] = 1
    """Of the normalisation; all numbers of filters are multiples of it."""

    def __post_init__(self) -> None:
        _divisible(self.filters, self.groups)


class Block(nn.Module):
    """Two convolutions and what goes around them; the first halves an image's sides."""

    def __init__(self, before: int, after: int, groups: int) -> None:
        super().__init__()
        self.first, self.first_norm = nn.Conv2d(before, after, 3, stride=2, padding=1), nn.GroupNorm(groups, after)
        self.second, self.second_norm = nn.Conv2d(after, after, 3, padding=1), nn.GroupNorm(groups, after)
        self.around = nn.Conv2d(before, after, 1, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first_norm(self.first(x)).relu()
        made: Tensor = (self.second_norm(self.second(y)) + self.around(x)).relu()
        return made


class ResidualNetwork(nn.Module):
    """`resnet`."""

    def __init__(self, channels: int, filters: Sequence[int], classes: int, groups: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(channels, filters[0], 3, padding=1)
        pairs = itertools.pairwise([filters[0], *filters])
        self.blocks = nn.ModuleList([Block(before, after, groups) for before, after in pairs])
        self.output = nn.Linear(filters[-1], classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        for block in self.blocks:
            x = block(x)
        scores: Tensor = self.output(x.mean((2, 3)))
        return scores


def resnet(channels: int, filters: Sequence[int], classes: int, groups: int = 1) -> nn.Module:
    """Residual blocks (He et al., 2016, arXiv:1512.03385) with GroupNorm, each of which halves an image's sides.

    Inputs of shape (records, channels, height, width), scores of shape (records, classes). The modules are `stem`,
    `blocks.0` and so on, with `first`, `first_norm`, `second`, `second_norm` and `around` in each, and `output`.
    """
    return ResidualNetwork(channels, filters, classes, groups)


NETWORKS = {
    "mlp": Recipe(lambda a: mlp(a.inputs, a.hidden, a.classes), Mlp),
    "cnn": Recipe(lambda a: cnn(a.channels, a.height, a.width, a.filters, a.classes, a.groups), Cnn),
    "resnet": Recipe(lambda a: resnet(a.channels, a.filters, a.classes, a.groups), Resnet),
}
