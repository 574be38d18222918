"""Exact scores against torchmetrics, and scores from summed counts against exact ones."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torchmetrics.functional.classification import multiclass_accuracy, multiclass_auroc

from partway.train import metrics


def drawn(n: int, classes: int, seed: int, skew: bool = False) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    weights = torch.tensor([1.0] + [0.05 if skew else 1.0] * (classes - 1))
    labels = torch.multinomial(weights, n, replacement=True, generator=generator)
    outputs = torch.randn(n, classes, generator=generator) * 2
    outputs[torch.arange(n), labels] += 1.5
    return outputs, labels


@pytest.mark.parametrize("seed", range(5))
def test_exact_scores_are_those_of_torchmetrics(seed: int) -> None:
    outputs, labels = drawn(500, 4, seed)
    found = metrics.scores(outputs, labels)
    assert found.records == 500
    assert found.classes == 4
    assert found.accuracy == pytest.approx(float(multiclass_accuracy(outputs, labels, 4, average="micro")))
    assert found.balanced_accuracy == pytest.approx(float(multiclass_accuracy(outputs, labels, 4, average="macro")))
    softmax = outputs.double().softmax(1)
    assert found.macro_auc == pytest.approx(float(multiclass_auroc(softmax, labels, 4, average="macro")), abs=1e-6)


def test_only_classes_with_three_of_each_kind_count() -> None:
    outputs, labels = drawn(20, 4, 0)
    labels = torch.tensor([0] * 15 + [1] * 3 + [2] * 2)
    found = metrics.scores(outputs, labels)
    assert found.classes == 2
    kept = [
        metrics.area_under_curve(o[labels == c], o[labels != c])
        for c, o in ((0, odds(outputs, 0)), (1, odds(outputs, 1)))
    ]
    assert found.macro_auc == pytest.approx(sum(kept) / 2)
    recalls = [float((outputs.argmax(1) == c)[labels == c].double().mean()) for c in range(2)]
    assert found.balanced_accuracy == pytest.approx(sum(recalls) / 2)
    alone = metrics.scores(outputs[:15], labels[:15])
    assert (alone.balanced_accuracy, alone.classes) == (None, 0)
    assert metrics.scores(outputs[:15], labels[:15]).macro_auc is None


def odds(outputs: Tensor, c: int) -> Tensor:
    p = outputs.double().softmax(1)[:, c]
    return p.log() - (1 - p).log()


def test_counts_of_sites_add_up() -> None:
    outputs, labels = drawn(600, 4, 1, skew=True)
    whole = metrics.counts(outputs, labels)
    assert whole.shape == (metrics.size_of_counts(4),)
    parts = sum(metrics.counts(outputs[i::3], labels[i::3]) for i in range(3))
    assert torch.equal(whole, parts)


@pytest.mark.parametrize("seed", range(5))
def test_scores_from_counts_are_the_exact_ones_but_for_the_bins(seed: int) -> None:
    outputs, labels = drawn(2000, 7, seed, skew=True)
    exact, summed = metrics.scores(outputs, labels), metrics.from_counts(metrics.counts(outputs, labels), 7)
    assert (summed.records, summed.classes) == (exact.records, exact.classes)
    assert summed.accuracy == exact.accuracy
    assert summed.balanced_accuracy == exact.balanced_accuracy
    assert summed.macro_auc == pytest.approx(exact.macro_auc, abs=1e-3)
    assert summed.macro_auc != exact.macro_auc


def test_extreme_outputs() -> None:
    outputs = torch.tensor([[900.0, -900.0], [-900.0, 900.0], [0.0, 0.0]] * 3)
    labels = torch.tensor([0, 1, 1] * 3)
    found = metrics.from_counts(metrics.counts(outputs, labels), 2)
    assert found.macro_auc == 1.0
    assert metrics.scores(outputs, labels).macro_auc == 1.0


def test_ties_count_half() -> None:
    assert metrics.area_under_curve(torch.zeros(4), torch.zeros(5)) == 0.5
    assert metrics.area_under_curve(torch.tensor([1.0, 0.0]), torch.tensor([0.0])) == 0.75
