"""Losses, each a sum over records: outputs (n, outputs) and labels as `Target.label` says, to one number.

A loss is divided by the union batch's records, so that sites' gradients are summed and never averaged. Cox's is no sum
over records: its risk set is all of them, so it needs them in one place.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from partway.data.records import Target

Loss = Callable[[Tensor, Tensor], Tensor]


def loss_of(target: Target, weights: Callable[[], Tensor] | None = None) -> Loss:
    """What a target is learnt by.

    Args:
        weights: what the loss of a record of each class counts, or of no and of yes; asked for at each step.
    """
    if weights is not None:
        kinds = {"classes": cross_entropy, "binary": binary}
        return lambda x, y: kinds[target.kind](x, y, weights().to(x))
    if target.kind == "binary":
        return binary
    if target.kind == "multi_label":
        return multi_label
    if target.kind == "regression":
        return squared
    if target.kind == "survival":
        return discrete_time(target.intervals) if target.intervals else cox
    return cross_entropy


def whole_batch(target: Target) -> bool:
    """Its loss is no sum over records: it needs all of a step's in one place, and at once."""
    return target.kind == "survival" and not target.intervals


def cross_entropy(outputs: Tensor, labels: Tensor, weights: Tensor | None = None) -> Tensor:
    """Of logits (n, classes) and classes (n,)."""
    return nn.functional.cross_entropy(outputs, labels, weight=weights, reduction="sum")


def binary(outputs: Tensor, labels: Tensor, weights: Tensor | None = None) -> Tensor:
    """Of log-odds (n, 1) and answers (n,), 0 or 1."""
    each = None if weights is None else weights[labels.long()]
    return nn.functional.binary_cross_entropy_with_logits(outputs[:, 0], labels.to(outputs), each, reduction="sum")


def multi_label(outputs: Tensor, labels: Tensor) -> Tensor:
    """The mean over answers: of log-odds (n, k) and answers (n, k)."""
    summed = nn.functional.binary_cross_entropy_with_logits(outputs, labels.to(outputs), reduction="sum")
    return summed / outputs.shape[1]


def squared(outputs: Tensor, labels: Tensor) -> Tensor:
    """Of numbers (n, 1) and (n,)."""
    return (outputs[:, 0] - labels.to(outputs)).square().sum()


def discrete_time(intervals: tuple[float, ...]) -> Loss:
    """Gensheimer and Narasimhan 2019, arXiv:1805.00917, equation 3: outputs are logits of the hazard in each interval.

    An event in interval j adds log h_j and log(1 - h_i) for each i before it; who was lost from sight in j has survived
    those before j. A time is in the first interval that ends at it or later.
    """

    def loss(outputs: Tensor, labels: Tensor) -> Tensor:
        ends = torch.tensor(intervals, dtype=labels.dtype, device=labels.device)
        time, event = labels[:, 0], labels[:, 1]
        at = torch.searchsorted(ends, time.contiguous(), side="left")
        number = torch.arange(len(intervals), device=labels.device)
        survived = number < at[:, None]
        came = (number == at[:, None]) & (event[:, None] == 1)
        log = nn.functional.logsigmoid
        return -(torch.where(survived, log(-outputs), 0.0) + torch.where(came, log(outputs), 0.0)).sum()

    return loss


def cox(outputs: Tensor, labels: Tensor) -> Tensor:
    """The negative log partial likelihood of risks (n, 1); ties after Breslow (Katzman et al. 2018, equation 4).

    Each event adds its risk less the log of the summed exponents of all whose time is not less.
    """
    order = torch.argsort(labels[:, 0], descending=True, stable=True)
    risk, time, event = outputs[order, 0], labels[order, 0], labels[order, 1]
    at_risk = torch.logcumsumexp(risk, 0)
    last = torch.searchsorted(-time.contiguous(), -time.contiguous(), side="right") - 1  # of those with the same time
    return ((at_risk[last] - risk) * event.to(risk)).sum()
