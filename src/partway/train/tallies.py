"""What a site counts over its records, to be summed with the other sites' counts by a blind sum."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from partway.data.records import Target, deviation_of, mean_of, moments, squares
from partway.plan.plan import Part, Turn
from partway.train import scoring
from partway.train.scoring import AnyScores
from partway.train.source import RecordSource


class Tally(Protocol):
    """Counts over a site's records that are summed over sites, in float64."""

    size: int

    def count(self, turn: Turn, inputs: Tensor, labels: Tensor | None) -> Tensor:
        """Shape (size,)."""

    def settle(self, turn: Turn, total: Tensor) -> None:
        """The sum over all sites has come."""


class Moments:
    """The first pass of standardisation: measured values and sums of each numeric column."""

    def __init__(self, source: RecordSource) -> None:
        self._numeric = source.records.numeric
        self.size = 2 * len(self._numeric)
        self.measured = self.mean = torch.zeros(len(self._numeric), dtype=torch.float64)

    def count(self, turn: Turn, inputs: Tensor, labels: Tensor | None) -> Tensor:
        return moments(inputs[:, self._numeric])

    def settle(self, turn: Turn, total: Tensor) -> None:
        self.measured, self.mean = mean_of(total)


class Squares:
    """The second pass: squares about the mean that all sites have agreed on. Then the records are standardised."""

    def __init__(self, source: RecordSource, first: Moments) -> None:
        self._source, self._first = source, first
        self.size = len(source.records.numeric)

    def count(self, turn: Turn, inputs: Tensor, labels: Tensor | None) -> Tensor:
        return squares(inputs[:, self._source.records.numeric], self._first.mean.to(inputs.device))

    def settle(self, turn: Turn, total: Tensor) -> None:
        self._source.standardise(self._first.mean, deviation_of(self._first.measured, total))


class Classes:
    """How many training records each class has, and what the loss of one counts."""

    def __init__(self, classes: int) -> None:
        self.size = classes
        self.weights: Tensor | None = None
        """Shape (classes,), float64, once all sites' counts are summed."""

    def count(self, turn: Turn, inputs: Tensor, labels: Tensor | None) -> Tensor:
        if labels is None:
            raise ValueError("classes are counted by labels")
        return torch.bincount(labels.long(), minlength=self.size).double()

    def settle(self, turn: Turn, total: Tensor) -> None:
        self.weights = class_weights(total)

    def report(self) -> Tensor:
        """The weights, shape (1, classes), float64."""
        if self.weights is None:
            raise ValueError("class weights are told before they are counted")
        return self.weights[None]


def class_weights(counts: Tensor) -> Tensor:
    """count ** -1/2 for each class, scaled so that their mean over the records is 1; 0 for a class without any.

    >>> class_weights(torch.tensor([900.0, 100.0, 0.0]))
    tensor([0.8333, 2.5000, 0.0000], dtype=torch.float64)
    """
    rarity = torch.where(counts > 0, counts.double() ** -0.5, 0.0)
    return rarity * counts.sum() / (counts * rarity).sum()


class Told:
    """What a network says of this party's records, one batch a turn: nothing of it is summed.

    Args:
        outputs: numbers that come out for each record.
        lane: of this party's rows in a turn.
    """

    size = 0

    def __init__(self, source: RecordSource, outputs: int, lane: str) -> None:
        self._source, self._lane = source, lane
        self.outputs = torch.zeros(len(source.labels), outputs)
        """In the order of the records, shape (records, outputs)."""

    def count(self, turn: Turn, inputs: Tensor, labels: Tensor | None) -> Tensor:
        self.outputs = self.outputs.to(inputs)
        self.outputs[self._source.chosen(turn, turn.offsets[0][self._lane], len(inputs))] = inputs
        return torch.zeros(0, dtype=torch.float64)

    def settle(self, turn: Turn, total: Tensor) -> None:
        """What is told is not counted."""


class Evaluation:
    """Counts that scores are made of. A party's own scores are exact, and stay here unless reported."""

    def __init__(self, target: Target) -> None:
        self.target = target
        self.size = scoring.size_of_counts(target)
        self.own: dict[Part, AnyScores] = {}
        """This party's exact scores, of the last evaluation of each part."""
        self.all: list[tuple[Part, int, AnyScores]] = []
        """(part, epoch, scores over all sites) of each evaluation."""

    def count(self, turn: Turn, inputs: Tensor, labels: Tensor | None) -> Tensor:
        if labels is None:
            raise ValueError("an evaluation needs labels")
        self.own[turn.records] = scoring.scores(self.target, inputs, labels)
        return scoring.counts(self.target, inputs, labels)

    def settle(self, turn: Turn, total: Tensor) -> None:
        self.all.append((turn.records, turn.epoch, scoring.from_counts(self.target, total)))

    def report_all(self) -> Tensor:
        """The last scores over all sites, shape (1, FIGURES), float64."""
        return scoring.figures(self.all[-1][2])

    def report_own(self) -> Tensor:
        """This site's own scores on its test records, shape (1, FIGURES), float64."""
        return scoring.figures(self.own["test"])
