"""Small pieces beside the network: a head for a bottom that trains by itself, a decoder, a site's own vector."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

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


def decoder(shape: Sequence[int], features: int, hidden: bool) -> nn.Sequential:
    """From a bottom's output, shape (records, *shape), back to flat features, shape (records, features).

    >>> decoder((16,), features=29, hidden=False)
    Sequential(
      (0): Flatten(start_dim=1, end_dim=-1)
      (1): Linear(in_features=16, out_features=29, bias=True)
    )
    """
    width = math.prod(shape)
    layers: list[nn.Module] = [nn.Linear(width, HIDDEN), nn.ReLU()] if hidden else []
    return nn.Sequential(nn.Flatten(), *layers, nn.Linear(HIDDEN if hidden else width, features))


class SiteVector(nn.Module):
    """Adds a learnt vector to a dense layer's output, as a one-hot input to that layer would: zeros at first.

    Args:
        layer: linear, or a convolution, to each channel of which one number is added.
    """

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self._shape: tuple[int, ...]
        if isinstance(layer, nn.Linear):
            self._shape, width = (-1,), layer.out_features
        else:
            assert isinstance(layer, nn.modules.conv._ConvNd)
            self._shape, width = (-1, *(1 for _ in layer.kernel_size)), layer.out_channels
        self.vector = nn.Parameter(torch.zeros(width))

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.vector)

    def forward(self, outputs: Tensor) -> Tensor:
        return outputs + self.vector.view(self._shape)
