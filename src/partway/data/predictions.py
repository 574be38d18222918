"""What a network puts out, in the words of a schema: what each number is called, and what it says."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence

import torch
from torch import Tensor

from partway.config import ClassesTarget, Columns, MultiLabelTarget, RegressionTarget, SurvivalTarget
from partway.data.labels import learnt
from partway.data.records import Target


def names_of(columns: Columns, target: Target) -> tuple[str, ...]:
    """What each number that is told of a record is called."""
    settings = columns.targets.get(target.name)
    if settings is None:
        return tuple(columns.classes)
    if isinstance(settings, ClassesTarget):
        return tuple(settings.classes)
    if isinstance(settings, MultiLabelTarget):
        return settings.columns
    unit = f" {settings.unit}" if isinstance(settings, RegressionTarget | SurvivalTarget) and settings.unit else ""
    if isinstance(settings, SurvivalTarget):
        return tuple(f"after {end:g}{unit}" for end in settings.intervals) or ("risk",)
    return (f"{target.name}{f' in{unit}' if unit else ''}",)


def told_of(columns: Columns, target: Target, outputs: Tensor) -> Tensor:
    """From what a network puts out, shape (records, outputs), to what is told of each record, of the same shape.

    Probabilities of classes and of answers; a number in its own unit; of survival the chance to live until the end of
    each interval, or a risk: how many times that of a record for which the network puts out 0.
    """
    if target.kind == "classes":
        return outputs.softmax(1)
    if target.kind in ("binary", "multi_label"):
        return outputs.sigmoid()
    if target.kind == "survival":
        return survival(outputs) if target.intervals else outputs.exp()
    settings = columns.targets[target.name]
    assert isinstance(settings, RegressionTarget)
    return learnt(settings, outputs)


def survival(outputs: Tensor) -> Tensor:
    """The chance to live until the end of each interval, from the logits of its hazard: both (n, intervals)."""
    return torch.nn.functional.logsigmoid(-outputs).cumsum(1).exp()


def written(columns: Columns, target: Target, told: Tensor, called: str, records: Sequence[str]) -> str:
    """As CSV, a line a record. Of classes the likeliest comes first, then the probability of each.

    Args:
        told: shape (records, outputs).
        called: the heading of the first column, `records` what stands in it.
    """
    names, text, classes = names_of(columns, target), io.StringIO(), target.kind == "classes"
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([called, *(["predicted"] if classes else []), *names])
    for record, found in zip(records, told, strict=True):
        likeliest = [names[int(found.argmax())]] if classes else []
        writer.writerow([record, *likeliest, *(f"{number:.6f}" for number in found.tolist())])
    return text.getvalue()
