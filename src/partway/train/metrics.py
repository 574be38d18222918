"""Scores of a classifier: exact from one site's outputs, and from counts that can be summed over sites.

Balanced accuracy and macro-AUC are means over the classes that have at least `LEAST` positive and `LEAST` negative
records: a recall of one record says nothing. Over sites the AUC comes from histograms of each class's log-odds, in
`BINS` bins of equal width from -`RANGE` to `RANGE`; scores beyond fall into the outermost. Two records in one bin count
as a tie.

>>> labels = torch.tensor([0, 0, 0, 0, 1, 1, 1])
>>> outputs = torch.tensor([[4.0, 0.0]] * 3 + [[0.0, 1.0]] * 2 + [[0.0, 3.0]] * 2)
>>> scores(outputs, labels)
Scores(records=7, accuracy=0.8571428571428571, balanced_accuracy=0.875, macro_auc=0.9583333333333334, classes=2)
>>> from_counts(counts(outputs, labels), classes=2) == scores(outputs, labels)
True
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

BINS = 200
RANGE = 10.0
LEAST = 3
"""Positive, and negative, records that a class needs to count in the macro-AUC."""


@dataclass(frozen=True)
class Scores:
    """How good a classifier is on some records."""

    records: int
    accuracy: float
    balanced_accuracy: float | None
    """The mean recall of the classes counted; None if there are none."""
    macro_auc: float | None
    """The mean area under the one-against-the-rest ROC curve of the classes counted; None if there are none."""
    classes: int
    """Classes counted."""


def scores(outputs: Tensor, labels: Tensor) -> Scores:
    """Exact scores.

    Args:
        outputs: logits, shape (n, classes), n > 0.
        labels: int64, shape (n,).
    """
    confusion, odds = _confusion(outputs, labels), _log_odds(outputs)
    areas = [area_under_curve(odds[labels == c, c], odds[labels != c, c]) for c in _counted(confusion)]
    return _scores(confusion, areas)


def counts(outputs: Tensor, labels: Tensor) -> Tensor:
    """Confusion counts, then for each class its log-odds' histogram over its own and over all other records.

    Returns shape (`size_of_counts(classes)`,), float64, to be summed over sites.
    """
    classes = outputs.shape[1]
    bins = ((_log_odds(outputs) + RANGE) * (BINS / (2 * RANGE))).long().clamp(0, BINS - 1)
    columns = [_confusion(outputs, labels).reshape(-1)]
    for c in range(classes):
        for rows in (labels == c, labels != c):
            columns.append(torch.bincount(bins[rows, c], minlength=BINS))
    return torch.cat(columns).double()


def size_of_counts(classes: int) -> int:
    """How many numbers `counts` returns."""
    return classes * classes + 2 * classes * BINS


def from_counts(total: Tensor, classes: int) -> Scores:
    """Scores over the records of all sites, from the sum of their `counts`."""
    confusion, histograms = torch.split(total, [classes * classes, 2 * classes * BINS])
    confusion, histograms = confusion.view(classes, classes), histograms.view(classes, 2, BINS)
    areas = [_area_of_histograms(*histograms[c]) for c in _counted(confusion)]
    return _scores(confusion, areas)


def area_under_curve(positive: Tensor, negative: Tensor) -> float:
    """How often a positive record's score is above a negative one's, ties counted half (Mann and Whitney 1947)."""
    ordered = negative.sort().values
    below = torch.searchsorted(ordered, positive, side="left")
    not_above = torch.searchsorted(ordered, positive, side="right")
    return float((below + not_above).double().sum() / (2 * len(positive) * len(negative)))


def _area_of_histograms(positive: Tensor, negative: Tensor) -> float:
    below = negative.cumsum(0) - negative
    return float((positive * (below + negative / 2)).sum() / (positive.sum() * negative.sum()))


def _log_odds(outputs: Tensor) -> Tensor:
    """Of each class against all others, shape (n, classes), float64: logit of the softmax."""
    outputs = outputs.double()
    own = torch.eye(outputs.shape[1], dtype=torch.bool, device=outputs.device)
    others = outputs.unsqueeze(1).masked_fill(own, -torch.inf).logsumexp(-1)
    return outputs - others


def _confusion(outputs: Tensor, labels: Tensor) -> Tensor:
    """Rows are true classes, columns predicted ones."""
    classes = outputs.shape[1]
    return torch.bincount(labels * classes + outputs.argmax(1), minlength=classes**2).view(classes, classes)


def _counted(confusion: Tensor) -> list[int]:
    positive = confusion.sum(1)
    negative = positive.sum() - positive
    return torch.minimum(positive, negative).ge(LEAST).nonzero().flatten().tolist()


def _scores(confusion: Tensor, areas: list[float]) -> Scores:
    confusion = confusion.double()
    total, right = confusion.sum(1), confusion.diag()
    counted = _counted(confusion)
    return Scores(
        records=int(total.sum()),
        accuracy=float(right.sum() / total.sum()),
        balanced_accuracy=float((right / total)[counted].mean()) if counted else None,
        macro_auc=sum(areas) / len(areas) if areas else None,
        classes=len(counted),
    )
