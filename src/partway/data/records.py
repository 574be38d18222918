"""One site's records in memory, and how they are divided into training, validation and test records.

>>> division = {"train": torch.tensor([0, 1]), "validation": torch.tensor([]), "test": torch.tensor([])}
>>> features, labels = torch.tensor([[1.0, 5.0], [3.0, torch.nan]]), torch.tensor([0, 1])
>>> records = Records(features, labels, classes=2, numeric=(0, 1), division=division)
>>> records.scaled(mean=torch.tensor([2.0, 5.0]), deviation=torch.tensor([1.0, 1.0]))
tensor([[-1.,  0.],
        [ 1.,  0.]], dtype=torch.float64)
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.data import Dataset

from partway.errors import ConfigError, DataError
from partway.plan.batches import shuffled
from partway.plan.plan import Part

SHARES: Mapping[Part, float] = {"train": 0.55, "validation": 0.10, "test": 0.35}
"""How a site's records are divided."""


Kind = Literal["classes", "binary", "multi_label", "regression", "survival"]


@dataclass(frozen=True, kw_only=True)
class Target:
    """What is learnt of a record."""

    name: str = ""
    kind: Kind = "classes"
    outputs: int
    """Numbers that a network puts out for it."""
    intervals: tuple[float, ...] = ()
    """Of survival in discrete time: where each ends. Without them one number comes out, a risk (Cox)."""

    def __post_init__(self) -> None:
        """Raises `ConfigError` where so many outputs mean nothing."""
        due = {"binary": 1, "regression": 1, "survival": len(self.intervals) or 1}.get(self.kind, self.outputs)
        if self.outputs != due:
            raise ConfigError(f"a target of kind {self.kind} has {due} output(s) here, and not {self.outputs}")

    @property
    def label(self) -> tuple[int, ...]:
        """The shape of a record's label: a class, an answer, several, a number, or a time and whether it came."""
        return {"multi_label": (self.outputs,), "survival": (2,)}.get(self.kind, ())

    @property
    def dtype(self) -> torch.dtype:
        return torch.int64 if self.kind == "classes" else torch.float64

    @property
    def classes(self) -> int:
        """How many are counted: those of the label, or no and yes."""
        return 2 if self.kind == "binary" else self.outputs

    def strata(self, labels: Tensor) -> Tensor:
        """By what records are divided evenly, shape (n,), int64: classes, answers, or whether the event came."""
        if self.kind == "survival":
            return labels[:, 1].long()
        return labels.long() if self.kind in ("classes", "binary") else torch.zeros(len(labels), dtype=torch.int64)


@dataclass(frozen=True, kw_only=True)
class Schema:
    """What a record looks like, so that a network can be cut and every letter's size be known beforehand."""

    shape: tuple[int, ...]
    """Of one record's features."""
    classes: int
    """Numbers that a network puts out for the job's own target; 0 where there is no label."""
    numeric: int
    """Columns that are standardised."""
    targets: tuple[Target, ...] = ()
    """What is held of labels; empty for `classes` of them alone."""

    def target(self, name: str = "") -> Target:
        """A target by name; without one, the first."""
        if not self.targets:
            return Target(outputs=self.classes)
        return next(t for t in self.targets if not name or t.name == name)


class Records:
    """Features, labels and division of one site, as read: nothing is standardised yet.

    Args:
        features: shape (n, ...). In numeric columns NaN is a value that was not measured.
        labels: int64, shape (n,), from 0 to `classes` - 1; -1 for a record that has none.
            Of other targets as `Target.label` says.
        numeric: columns of a table that are to be standardised.
        division: indices of the records in each part.
        ids: of all records, where other parties hold columns of the same ones; without them, their numbers.
        targets: what the labels are, if not classes; the first is the job's own.
        more: labels of several targets, by name.
        names: what this party calls each of them, and `called` what that is, such as "line".
        present: which of them are here, shape (n,), bool; the features of the others count as not measured.
    """

    def __init__(
        self,
        features: Tensor,
        labels: Tensor,
        *,
        classes: int,
        numeric: tuple[int, ...],
        division: Mapping[Part, Tensor],
        ids: Sequence[str] = (),
        names: Sequence[str] = (),
        called: str = "record",
        present: Tensor | None = None,
        targets: tuple[Target, ...] = (),
        more: Mapping[str, Tensor] | None = None,
    ) -> None:
        schema = Schema(shape=tuple(features.shape[1:]), classes=classes, numeric=len(numeric), targets=targets)
        self.features, self.labels = features.double(), labels.to(schema.target().dtype)
        self.targets = {name: values.to(schema.target(name).dtype) for name, values in (more or {}).items()}
        """Labels by target, where there are several."""
        self.numeric = torch.tensor(numeric, dtype=torch.int64)
        self.division = {part: index.long() for part, index in division.items()}
        self.ids, self.names, self.called, self.present = tuple(ids), tuple(names), called, present
        self.schema = schema

    @classmethod
    def from_dataset(cls, dataset: Dataset[Any], classes: int, seed: int, target: Target | None = None) -> Records:
        """All of a PyTorch dataset of (features, label), held in memory. A label of None is none.

        Args:
            target: what the labels are, if they are no classes; then each record has one.

        Raises:
            DataError: it is empty, or a label is not one of `classes` or not as the target says, or a feature is not
                finite.
        """
        rows = [dataset[i] for i in range(len(dataset))]  # type: ignore[arg-type]
        if not rows:
            raise DataError("a dataset is empty; leave its site out")
        features = torch.stack([torch.as_tensor(x, dtype=torch.float64) for x, _ in rows])
        if not features.isfinite().all():
            raise DataError("a dataset's features hold NaN or infinite numbers")
        if target is not None and target.kind != "classes":
            y = labels_of(target, [y for _, y in rows])
            division, classes = divide(target.strata(y), seed), target.outputs
            return cls(features, y, classes=classes, numeric=(), division=division, targets=(target,))
        labels = torch.tensor([-1 if y is None else int(y) for _, y in rows])
        if any(y is not None and int(y) < 0 for _, y in rows) or labels.max() >= classes:
            raise DataError(
                f"labels go from {labels.min()} to {labels.max()}; with {classes} classes, 0 to {classes - 1}"
            )
        return cls(features, labels, classes=classes, numeric=(), division=divide(labels, seed))

    @property
    def sizes(self) -> dict[str, int]:
        """Records in each part."""
        return {part: len(index) for part, index in self.division.items()}

    def scaled(self, mean: Tensor, deviation: Tensor) -> Tensor:
        """All features, numeric columns standardised, what was not measured 0. Shape as `features`, float64."""
        out = self.features.clone()
        if len(self.numeric):
            out[:, self.numeric] = ((self.features[:, self.numeric] - mean) / deviation).nan_to_num()
        return out


def labels_of(target: Target, given: Sequence[Any]) -> Tensor:
    """The labels of records that have no classes. Raises `DataError` if one of them is none of the target's."""
    if any(y is None for y in given):
        raise DataError(f"a label is None, and only classes know records without one; this target is {target.kind}")
    shapes = {tuple(torch.as_tensor(y).shape) for y in given}
    if shapes != {target.label}:
        raise DataError(f"a label of this target, {target.kind}, has the shape {target.label}, and not {max(shapes)}")
    labels = torch.stack([torch.as_tensor(y, dtype=torch.float64) for y in given])
    if not labels.isfinite().all():
        raise DataError("a dataset's labels hold NaN or infinite numbers")
    timed = target.kind == "survival"
    answers = labels[:, 1] if timed else labels
    if target.kind != "regression" and not ((answers == 0) | (answers == 1)).all():
        raise DataError(f"an answer is 0 or 1{', after the time' if timed else ''}")
    if timed and (labels[:, 0] < 0).any():
        raise DataError("a time is before the beginning, 0")
    return labels


def moments(x: Tensor) -> Tensor:
    """How many values of each column were measured, then their sums: shape (n, k) to (2k,), float64."""
    return torch.cat([x.isfinite().double().sum(0), x.nan_to_num().sum(0)])


def squares(x: Tensor, mean: Tensor) -> Tensor:
    """The sum of squares about `mean` of each column, shape (n, k) to (k,): centred, so that nothing cancels."""
    return (x - mean).square().nan_to_num().sum(0)


def mean_of(total: Tensor) -> tuple[Tensor, Tensor]:
    """How often each column was measured, and its mean: from `moments`, summed over sites."""
    measured, sums = total.chunk(2)
    return measured, sums / measured.clamp(min=1)


def deviation_of(measured: Tensor, squares: Tensor) -> Tensor:
    """The standard deviation of each column (divisor n); 1 where all values are equal."""
    deviation = (squares / measured.clamp(min=1)).sqrt()
    return torch.where(deviation > 0, deviation, 1.0)


def statistics_of(records: Iterable[Records]) -> tuple[Tensor, Tensor]:
    """Mean and deviation of each numeric column over the training records of these sites, shape (numeric,)."""
    known = torch.cat([r.features[r.division["train"]][:, r.numeric] for r in records])
    measured, mean = mean_of(moments(known))
    return mean, deviation_of(measured, squares(known, mean))


def divide(labels: Tensor, seed: int) -> dict[Part, Tensor]:
    """Indices of training, validation and test records: `SHARES` of them to within one, stratified by label.

    What has no label, -1, is a part of its own, `unlabelled`, which is there if there are any.

    The records are gone through class by class, within a class in an order drawn by `seed`, and each goes to the part
    that is furthest behind its share.
    """
    known = torch.nonzero(labels >= 0).squeeze(1)
    drawn = known[torch.tensor(shuffled(len(known), "division", seed), dtype=torch.int64)]
    order = drawn[torch.argsort(labels[drawn], stable=True)]
    chosen: dict[Part, list[int]] = {part: [] for part in SHARES}
    for count, index in enumerate(order.tolist(), 1):
        part = max(SHARES, key=lambda p: SHARES[p] * count - len(chosen[p]))
        chosen[part].append(index)
    division = {part: torch.tensor(sorted(indices), dtype=torch.int64) for part, indices in chosen.items()}
    if len(known) < len(labels):
        division["unlabelled"] = torch.nonzero(labels < 0).squeeze(1)
    return division
