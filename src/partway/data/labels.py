"""From the columns of a file to what a network is to learn of each row."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import polars as pl
import torch
from torch import Tensor

from partway.config import (
    BinaryTarget,
    ClassesTarget,
    Columns,
    MultiLabelTarget,
    RegressionTarget,
    SurvivalTarget,
    TargetSettings,
    made_of,
)
from partway.data.records import Target

Text = Callable[[str], pl.Series]
"""From a column's name to its words."""


class Wrong(NamedTuple):
    """A fault in one column: where, and what is wrong."""

    column: str
    kind: str
    where: np.ndarray
    told: str


class Answers(NamedTuple):
    """What is to be learnt of each row."""

    values: np.ndarray
    """Shape (rows, *`Target.label`)."""
    counts: np.ndarray
    """Which rows count, shape (rows,), bool."""
    faults: list[Wrong]


def target_of(columns: Columns, name: str) -> Target:
    """What a target is; without a name, the label's classes."""
    settings = columns.targets.get(name)
    if settings is None:
        return Target(name=columns.schema.label, outputs=len(columns.classes))
    if isinstance(settings, ClassesTarget):
        return Target(name=name, outputs=len(settings.classes))
    if isinstance(settings, BinaryTarget):
        return Target(name=name, kind="binary", outputs=1)
    if isinstance(settings, MultiLabelTarget):
        return Target(name=name, kind="multi_label", outputs=len(settings.columns))
    if isinstance(settings, RegressionTarget):
        return Target(name=name, kind="regression", outputs=1)
    outputs = len(settings.intervals) or 1
    return Target(name=name, kind="survival", outputs=outputs, intervals=settings.intervals)


def answers(settings: TargetSettings, text: Text) -> Answers:
    """Reads a target's columns."""
    if isinstance(settings, ClassesTarget):
        words = text(settings.column)
        codes = numbered(words, list(settings.classes.values()))
        wrong = Wrong(settings.column, "CLASS", codes < 0, "is no class of the target")
        return Answers(codes, np.ones(len(codes), dtype=bool), [wrong])
    if isinstance(settings, MultiLabelTarget):
        parts = [_yes(text, name, settings.values) for name in settings.columns]
        values = np.stack([part.values for part in parts], 1)
        return Answers(values, np.ones(len(values), dtype=bool), [w for part in parts for w in part.faults])
    if isinstance(settings, RegressionTarget):
        return _number_of(settings, text)
    if isinstance(settings, BinaryTarget) and settings.within is None:
        return _yes(text, settings.column, settings.values)
    assert isinstance(settings, BinaryTarget | SurvivalTarget)
    time, event = _times(text, settings.time), _yes(text, settings.event, settings.values)
    faults = [*time.faults, *event.faults]
    if isinstance(settings, SurvivalTarget):
        return Answers(np.stack([time.values, event.values], 1), time.counts, faults)
    assert settings.within is not None
    came = (event.values == 1) & (time.values <= settings.within)
    seen = came | (time.values >= settings.within)
    return Answers(came.astype(np.float64), seen, faults)


def strata(target: Target, values: Tensor) -> Tensor:
    """By what records are divided evenly, shape (n,), int64: classes, answers, or whether the event came."""
    if target.kind == "survival":
        return values[:, 1].long()
    return values.long() if target.kind in ("classes", "binary") else torch.zeros(len(values), dtype=torch.int64)


def _yes(text: Text, name: str, values: tuple[str, str]) -> Answers:
    codes = numbered(text(name), [(value,) for value in values])
    wrong = Wrong(name, "CLASS", codes < 0, f"is neither {values[0]} nor {values[1]}")
    return Answers(codes.astype(np.float64), np.ones(len(codes), dtype=bool), [wrong])


def _floats(text: Text, name: str) -> np.ndarray:
    x: np.ndarray = text(name).cast(pl.Float64, strict=False).fill_null(math.nan).to_numpy()
    return x


def _times(text: Text, name: str) -> Answers:
    x = _floats(text, name)
    faults = [
        Wrong(name, "NUMBER", ~np.isfinite(x), "is no time"),
        Wrong(name, "RANGE", np.isfinite(x) & (x < 0), "is before the beginning"),
    ]
    return Answers(x, np.ones(len(x), dtype=bool), faults)


def _number_of(settings: RegressionTarget, text: Text) -> Answers:
    x = _floats(text, settings.column)
    low, high = settings.range or (-math.inf, math.inf)
    least = -math.inf if settings.log is None else -settings.log
    faults = [
        Wrong(settings.column, "NUMBER", ~np.isfinite(x), "is no number"),
        Wrong(settings.column, "RANGE", (x < low) | (x > high) | (x <= least), f"is not in {low:g} to {high:g}"),
    ]
    with np.errstate(invalid="ignore", divide="ignore"):
        level = x if settings.log is None else np.log(x + settings.log)
    return Answers((level - settings.center) / settings.spread, np.ones(len(x), dtype=bool), faults)


def learnt(settings: RegressionTarget, outputs: Tensor) -> Tensor:
    """From what a network puts out back to the target's own unit."""
    level = outputs * settings.spread + settings.center
    return level if settings.log is None else level.exp() - settings.log


def numbered(text: pl.Series, groups: Sequence[Sequence[str]], by_prefix: bool = False) -> np.ndarray:
    """In which group each word stands, -1 for none: int64. A number also matches otherwise written."""

    def of(word: str) -> int:
        value = number(word)
        for at, group in enumerate(groups):
            if word in group or (by_prefix and word.startswith(tuple(group))):
                return at
            if value is not None and any(number(other) == value for other in group):
                return at
        return -1

    known = {word: of(word) for word in text.unique()}
    return np.array([known[word] for word in text], dtype=np.int64)


def number(word: str) -> float | None:
    """A word as a finite number, if it is one."""
    try:
        value = float(word)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def needed(columns: Columns, names: Sequence[str]) -> Iterator[str]:
    """The columns of a file that these targets are made of."""
    for name in names:
        settings = columns.targets.get(name)
        yield from (columns.schema.label,) if settings is None else made_of(settings)
