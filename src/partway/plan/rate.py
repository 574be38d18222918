"""Learning-rate schedules: one pure function of the global step, so that a stop or a hand-over changes nothing.

Every party writes the factor of each turn into the turn, and all compare them before the first (`protocol/session.py`).
So it is made of nothing but + - * /, which give the same bits on every machine; a library's cosine need not.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

After = Literal["constant", "cosine", "linear", "steps"]


@dataclass(frozen=True, kw_only=True)
class Rate:
    """How the learning rate goes; the default leaves it as it is."""

    warm_up: int = 0
    """Steps in which it rises in equal parts; the last of them has the full rate."""
    then: After = "constant"
    """What it does after them."""
    final: float = 0.0
    """The fraction at which `cosine` and `linear` would arrive one step after the last."""
    milestones: tuple[int, ...] = ()
    """Of `steps`: from each of these steps on, counted from 0, the rate is multiplied by `factor`."""
    factor: float = 0.1


def factor(rate: Rate, step: int, steps: int) -> float:
    """What the optimiser's learning rate is multiplied by.

    As torch's LinearLR with start_factor 1/n and total_iters n - 1, then ConstantLR, CosineAnnealingLR (Loshchilov and
    Hutter 2017, equation 5), LinearLR or MultiStepLR.

    Args:
        step: from 0.
        steps: in all, those that an early stop leaves out among them.

    >>> [factor(Rate(warm_up=2, then="linear"), step, 6) for step in range(6)]
    [0.5, 1.0, 1.0, 0.75, 0.5, 0.25]
    """
    if step < rate.warm_up:
        return (step + 1) / rate.warm_up
    if rate.then == "steps":
        product = 1.0
        for milestone in rate.milestones:
            product *= rate.factor if step >= milestone else 1.0
        return product
    if rate.then == "constant":
        return 1.0
    gone = (step - rate.warm_up) / (steps - rate.warm_up)
    left = 1.0 - gone if rate.then == "linear" else (1.0 + _cosine(math.pi * gone)) / 2
    return rate.final + (1.0 - rate.final) * left


def _cosine(angle: float) -> float:
    """For 0 <= angle <= pi, to 1e-15: the first 20 terms of its series."""
    term = total = 1.0
    for k in range(2, 40, 2):
        term *= -angle * angle / (k * (k - 1))
        total += term
    return total
