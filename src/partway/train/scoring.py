"""Scores of any target: exact from one party's outputs, and from counts that can be summed over sites.

Classes and answers are scored as in `metrics`; several answers by the means over them. Survival is scored by Harrell's
concordance over pairs of records of one site: pairs of two sites are not compared, for that would need both.

>>> errors = counts(Target(kind="regression", outputs=1), torch.tensor([[1.0], [3.0]]), torch.tensor([2.0, 2.0]))
>>> from_counts(Target(kind="regression", outputs=1), errors).mae
1.0
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from partway.data.predictions import survival
from partway.data.records import Target
from partway.train import metrics
from partway.train.metrics import Scores

FIGURES = 5
"""Numbers in a report of scores, whatever they are of."""
_NONE = -1.0


@dataclass(frozen=True)
class Errors:
    """How far off a network's numbers are, in the units that it learns."""

    records: int
    mae: float
    """The mean absolute error."""
    rmse: float
    """The root of the mean squared error."""
    r2: float | None
    """How much of the variance is explained; None where there is none."""


@dataclass(frozen=True)
class Ranking:
    """How well a network tells whose event comes first."""

    records: int
    concordance: float | None
    """Of the pairs of a site in which that is known, how many it tells rightly, ties counted half; None: no pair."""
    pairs: int


AnyScores = Scores | Errors | Ranking


def value(scores: AnyScores) -> float:
    """How good a network is: more is better.

    Of classes the mean of balanced accuracy and macro-AUC, or accuracy where no class counts; of numbers less their
    mean squared error; of survival the concordance.
    """
    if isinstance(scores, Errors):
        return -scores.rmse
    if isinstance(scores, Ranking):
        return 0.0 if scores.concordance is None else scores.concordance
    if scores.balanced_accuracy is None or scores.macro_auc is None:
        return scores.accuracy
    return (scores.balanced_accuracy + scores.macro_auc) / 2


def size_of_counts(target: Target) -> int:
    """How many numbers `counts` returns."""
    if target.kind == "regression":
        return 5
    if target.kind == "survival":
        return 3
    return (
        metrics.size_of_counts(2) * target.outputs
        if target.kind != "classes"
        else metrics.size_of_counts(target.outputs)
    )


def scores(target: Target, outputs: Tensor, labels: Tensor) -> AnyScores:
    """Exact scores, of outputs (n, outputs) and labels as `Target.label` says."""
    if target.kind == "classes":
        return metrics.scores(outputs, labels)
    if target.kind in ("regression", "survival"):
        return from_counts(target, counts(target, outputs, labels))
    return _mean([metrics.scores(*_answer(outputs, labels, k)) for k in range(target.outputs)])


def counts(target: Target, outputs: Tensor, labels: Tensor) -> Tensor:
    """Shape (`size_of_counts(target)`,), float64, to be summed over sites."""
    if target.kind == "classes":
        return metrics.counts(outputs, labels)
    if target.kind == "regression":
        y, off = labels.double(), outputs[:, 0].double() - labels.double()
        return torch.stack(
            [torch.tensor(float(len(y))), off.abs().sum(), off.square().sum(), y.sum(), y.square().sum()]
        )
    if target.kind == "survival":
        return _pairs(risk_of(target, outputs), labels)
    return torch.cat([metrics.counts(*_answer(outputs, labels, k)) for k in range(target.outputs)])


def from_counts(target: Target, total: Tensor) -> AnyScores:
    """Scores over the records of all sites, from the sum of their `counts`."""
    if target.kind == "classes":
        return metrics.from_counts(total, target.outputs)
    if target.kind == "regression":
        n, absolute, squared, summed, squares = total.tolist()
        spread = squares - summed**2 / n
        return Errors(int(n), absolute / n, math.sqrt(squared / n), 1 - squared / spread if spread > 0 else None)
    if target.kind == "survival":
        n, right, pairs = total.tolist()
        return Ranking(int(n), right / pairs if pairs else None, int(pairs))
    return _mean([metrics.from_counts(own, 2) for own in total.chunk(target.outputs)])


def risk_of(target: Target, outputs: Tensor) -> Tensor:
    """More is sooner, shape (n,): a Cox network's output, or less the expected number of intervals survived."""
    if not target.intervals:
        return outputs[:, 0].double()
    return -survival(outputs.double()).sum(1)


def figures(scores: AnyScores) -> Tensor:
    """A report of scores, shape (1, FIGURES), float64."""
    if isinstance(scores, Scores):
        row: list[Any] = [scores.records, scores.accuracy, scores.balanced_accuracy, scores.macro_auc, scores.classes]
    elif isinstance(scores, Errors):
        row = [scores.records, scores.mae, scores.rmse, scores.r2 is not None, scores.r2 or 0.0]
    else:
        row = [scores.records, scores.concordance, scores.pairs, 0.0, 0.0]
    return torch.tensor([[_NONE if number is None else float(number) for number in row]], dtype=torch.float64)


def read_figures(target: Target, row: Tensor) -> AnyScores:
    """The scores that a report tells, from shape (FIGURES,)."""
    records, a, b, c, d = row.tolist()
    if target.kind == "regression":
        return Errors(int(records), a, b, d if c else None)
    if target.kind == "survival":
        return Ranking(int(records), None if a == _NONE else a, int(b))
    balanced, auc = (None if number == _NONE else number for number in (b, c))
    return Scores(int(records), a, balanced, auc, int(d))


def _answer(outputs: Tensor, labels: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """One answer as two classes: logits (n, 2) and classes (n,)."""
    odds = outputs[:, k]
    answers = labels if labels.dim() == 1 else labels[:, k]
    return torch.stack([torch.zeros_like(odds), odds], 1), answers.long()


def _mean(each: list[Scores]) -> Scores:
    if len(each) == 1:
        return each[0]

    def over(name: str) -> float | None:
        known = [v for own in each if (v := getattr(own, name)) is not None]
        return sum(known) / len(known) if known else None

    classes = sum(own.classes for own in each)
    return Scores(each[0].records, over("accuracy") or 0.0, over("balanced_accuracy"), over("macro_auc"), classes)


def _pairs(risk: Tensor, labels: Tensor) -> Tensor:
    """Records, pairs told rightly, and pairs: of an event with every record that was seen longer (Harrell 1982)."""
    time, event = labels[:, 0].double(), labels[:, 1] == 1
    right = pairs = torch.zeros((), dtype=torch.float64)
    for n in torch.nonzero(event).flatten().tolist():
        later = risk[(time > time[n]) | ((time == time[n]) & ~event)]
        right = right + (later < risk[n]).double().sum() + (later == risk[n]).double().sum() / 2
        pairs = pairs + len(later)
    return torch.stack([torch.tensor(float(len(time)), dtype=torch.float64), right, pairs])
