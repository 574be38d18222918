"""From a schema's columns to features, and what may be said of a file that does not fit.

The layout of the features and their values come from one function, `encoded`: without values it says the layout.

>>> from partway.config import bundled_schema
>>> layout(bundled_schema("thyroid"), "statistics").numeric, layout(bundled_schema("thyroid"), "marks").shape
(7, (71,))
>>> words(bundled_schema("thyroid"), [(2, "UNIT"), (0, "CLASS")])
'column TSH: another unit, column target: an unknown class'
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import msgspec
import torch
from torch import Tensor

from partway.config import Category, Column, Columns, Flag, Held, Image, Job, Numeric, Scale
from partway.data.labels import target_of
from partway.data.records import Schema
from partway.errors import ConfigError

FAULTS = {
    "MISSING_COLUMN": "is missing",
    "UNIT": "another unit",
    "CLASS": "an unknown class",
    "CATEGORY": "another category",
    "RANGE": "a value outside the range",
    "NUMBER": "something that is no number",
    "NO_RECORDS": "no records that count",
}
"""How a file can fail to fit, as it may be told to others: never with a value."""
MARKS = (-2.0, -4 / 3, -1.0, 0.0, 1.0, 4 / 3, 2.0)
"""Where the steps stand, in half widths of the reference range from its middle: at its limits -1 and 1."""
_STEEPNESS, _FARTHEST, _GAIN = 8.0, 3.0, 0.7


class Feature(NamedTuple):
    """One feature of all records."""

    name: str
    values: Tensor
    """Float64, shape (n,); NaN where a value that statistics scale was not measured."""
    by_statistics: bool = False
    """It is still to be standardised, by sums over all sites."""


def encoded(name: str, column: Column, values: Tensor, scale: Scale) -> Iterator[Feature]:
    """The features that one column gives.

    Args:
        values: shape (n,), of an image (n, size). Of a numeric column float64, NaN where it was not measured; of a flag
            or a category the number of the value, -1 where it is missing.
    """
    gain = _GAIN if scale == "marks" else 1.0
    if isinstance(column, Image):
        least, most = column.range
        for number, pixels in enumerate(values.reshape(-1, column.size).unbind(1)):
            yield Feature(f"{name}{number}", (pixels - least) / (most - least))
        return
    if isinstance(column, Category):
        for number, value in enumerate(column.values):
            yield Feature(f"{name} {value}", (values == number).double() * gain)
        return
    measured = values.isfinite() if isinstance(column, Numeric) else values >= 0
    if isinstance(column, Flag):
        yield Feature(name, (values == 1).double() * gain)
    elif column.reference is None or scale == "statistics":
        yield Feature(name, _level(values, column), by_statistics=True)
    else:
        low, high = (_level(torch.tensor([limit], dtype=torch.float64), column) for limit in column.reference)
        u = ((_level(values, column) - (low + high) / 2) / ((high - low) / 2)).clamp(-_FARTHEST, _FARTHEST).nan_to_num()
        yield Feature(name, u * gain)
        if column.marks and scale == "marks":
            for mark in MARKS:
                yield Feature(f"{name} at {mark:.2f}", measured * torch.tanh(_STEEPNESS * (u - mark)) * gain)
    if column.measured_flag:
        yield Feature(f"{name} measured", measured.double() * gain)


def _level(values: Tensor, column: Numeric) -> Tensor:
    """Values, or their logarithm: by `math.log`, whose last digit is the same on every kind of CPU."""
    if column.log is None:
        return values
    return torch.tensor([math.log(value + column.log) for value in values.tolist()], dtype=torch.float64)


def columns_of(job: Job) -> Columns:
    """The schema of a job's records. Raises `ConfigError` where it is any PyTorch dataset."""
    if job.columns is None:
        words = "[records] schema = `dataset` is for partway.simulate, from Python; a site's file is read by a schema"
        raise ConfigError(words)
    return job.columns


def part_of(columns: Columns, held: Held) -> Columns:
    """The schema of what one party holds of the same patients as others.

    Raises:
        ConfigError: it holds a column or a target that the schema has not.
    """
    for name in held.columns:
        if name not in columns.columns:
            raise ConfigError(f"[holds] names the column `{name}`, which is not in the schema {columns.schema.name}")
    own = {name: columns.columns[name] for name in held.columns}
    return msgspec.structs.replace(columns, columns=own)


def features_of(columns: Columns, scale: Scale) -> list[Feature]:
    """What a record becomes, one feature after the other; of no records."""
    nothing = torch.empty(0, dtype=torch.float64)
    return [f for name, column in columns.columns.items() for f in encoded(name, column, nothing, scale)]


def layout(columns: Columns, scale: Scale, targets: Sequence[str] = ("",)) -> Schema:
    """What a record becomes, in numbers.

    Args:
        targets: what is held of labels; an empty name is the schema's own.
    """
    features = features_of(columns, scale)
    numeric = sum(feature.by_statistics for feature in features)
    only = list(columns.columns.values())
    shape = only[0].shape if len(only) == 1 and isinstance(only[0], Image) else (len(features),)
    held = tuple(target_of(columns, name) for name in targets)
    own = held == (target_of(columns, ""),)
    classes = held[0].outputs if held else 0
    return Schema(shape=shape, classes=classes, numeric=numeric, targets=() if own else held)


def words(columns: Columns, faults: Iterable[tuple[int, str]]) -> str:
    """What may be said of a file that does not fit: columns, and what is wrong with each; no value."""
    names = columns.numbered
    told = [f"column {names[n]}: {FAULTS[kind]}" for n, kind in faults if n < len(names) and kind in FAULTS]
    return ", ".join(told) or "its records cannot be read; its own log has the words"
