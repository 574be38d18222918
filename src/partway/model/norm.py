"""GroupNorm in the place of BatchNorm, whose statistics mix the records of a batch and so differ between sites.

>>> network = nn.Sequential(nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6))
>>> layer = with_group_norm(network, groups=4)[1]
>>> type(layer).__name__, layer.num_groups
('GroupNorm', 2)
"""

from __future__ import annotations

import math

from torch import nn

from partway.model.capture import copied


def with_group_norm(network: nn.Module, groups: int) -> nn.Module:
    """A copy in which every BatchNorm is a GroupNorm (Wu and He, 2018, arXiv:1803.08494) with its weight and bias.

    In evaluation, too, it normalises each record by itself, so that a pretrained network puts out something else until
    it is trained again. What a layer does besides (timm's dropout and activation) it goes on doing.

    Args:
        groups: at most so many of each layer's channels; the largest number that divides both.
    """
    network = copied(network)
    if isinstance(network, nn.modules.batchnorm._BatchNorm):
        return _group_norm(network, groups)
    for path, module in list(network.named_modules()):
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            network.set_submodule(path, _group_norm(module, groups))
    return network


def _group_norm(old: nn.modules.batchnorm._BatchNorm, groups: int) -> nn.Module:
    new = nn.GroupNorm(math.gcd(groups, old.num_features), old.num_features, old.eps, old.affine)
    if old.affine:
        new.weight, new.bias = old.weight, old.bias
    new.training = old.training
    more = [part for name in ("drop", "act") if isinstance(part := getattr(old, name, None), nn.Module)]
    return nn.Sequential(new, *more) if more else new
