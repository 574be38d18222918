"""A hospital's own file, CSV or Parquet, read and checked column by column against a schema.

Everything that does not fit is found at once. The words are for the site's own people, and may hold a value; what may
leave the site of a `DataError` is its `faults`.
"""

from __future__ import annotations

import csv
import difflib
import gzip
import math
import re
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import polars as pl
import torch
from torch import Tensor

from partway.config import Category, Column, Columns, Connection, Flag, Image, Job, Numeric, Scale, made_of
from partway.data.labels import answers, needed, number, numbered
from partway.data.records import Records, divide
from partway.data.schema import Feature, columns_of, encoded, layout, words
from partway.errors import DataError


class Fault(NamedTuple):
    """One thing in which a file does not fit a schema."""

    column: int
    """Its number in the schema: 0 is the label."""
    kind: str
    """A key of `schema.FAULTS`."""
    words: str
    """For the site's own people."""


@dataclass(frozen=True)
class Table:
    """A file's columns as they stand there: text, or what Parquet has."""

    path: Path
    frame: pl.DataFrame
    row: str
    """What a row is called: "line" in a CSV file."""
    first: int
    """The number of the first."""


def load(path: Path, connector: Literal["csv", "parquet"] | None = None) -> Table:
    """Reads a file; what it is, its name says if `connector` does not. Raises `DataError` if it is damaged."""
    connector = connector or ("parquet" if path.suffix == ".parquet" else "csv")
    try:
        if connector == "parquet":
            return Table(path, pl.read_parquet(path.read_bytes()), "row", 1)
        return Table(path, _csv(path), "line", 2)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error})") from None
    except (EOFError, zlib.error, UnicodeDecodeError, csv.Error, pl.exceptions.PolarsError) as error:
        raise DataError(f"{path}: cannot be read ({str(error).splitlines()[0]})") from None


def _csv(path: Path) -> pl.DataFrame:
    """All text. By the standard library, for polars takes a line that is too short as one of missing values."""
    opened = gzip.open if path.suffix == ".gz" else open
    with opened(path, "rt", newline="", encoding="utf-8-sig") as file:
        reader = csv.reader(file, strict=True)
        names = next(reader, [])
        if twice := [name for number, name in enumerate(names) if name in names[:number]]:
            raise DataError(f"{path}: column {twice[0]} is there twice")
        rows = []
        for row in reader:
            if len(row) != len(names):
                raise DataError(f"{path}, line {reader.line_num}: another number of values than columns")
            rows.append(row)
    return pl.DataFrame(rows, schema=dict.fromkeys(names, pl.String), orient="row")


def read(connection: Connection, home: Path, job: Job) -> Records:
    """A site's records from the file that its site file names, as a job wants them.

    Args:
        home: the folder to which the path is relative.

    Raises:
        ConfigError: the job has no schema.
        DataError: the file is damaged, or does not fit the schema: with everything that does not.
    """
    table = load(home / connection.path, connection.connector)
    columns, scale, target, seed = columns_of(job), job.records.scale, job.records.target, job.job.seed
    site, units = connection.site, connection.units
    if job.predict is not None:
        return unlabelled(table, columns, scale, target, site=site, units=units)
    return records_of(table, columns, scale, seed, site=site, units=units, target=target)


def records_of(
    table: Table,
    columns: Columns,
    scale: Scale,
    seed: int,
    *,
    site: str | None = None,
    units: Mapping[str, str] | None = None,
    target: str = "",
) -> Records:
    """The records of a file, or of one site in it. Raises `DataError` with everything that does not fit."""
    checked = Checked(table, columns, (target,))
    checked.structure(site, units or {})
    checked.content(site)
    checked.refuse()
    return checked.records(scale, seed)


def unlabelled(
    table: Table,
    columns: Columns,
    scale: Scale,
    target: str,
    *,
    site: str | None = None,
    units: Mapping[str, str] | None = None,
) -> Records:
    """The same without a label being read, all as test records, each with its line in the file: to predict `target`."""
    checked = Checked(table, columns, ())
    checked.structure(site, units or {})
    checked.content(site)
    checked.refuse()
    features, schema = checked.features(scale), layout(columns, scale, (target,))
    rows, nothing = checked.rows, torch.zeros(0, dtype=torch.int64)
    return Records(
        torch.stack([feature.values for feature in features], 1).view(-1, *schema.shape),
        torch.zeros(len(rows), *schema.target().label),
        classes=schema.classes,
        numeric=tuple(n for n, feature in enumerate(features) if feature.by_statistics),
        division={"train": nothing, "validation": nothing, "test": torch.arange(len(rows))},
        targets=schema.targets,
        names=[str(row) for row in rows],
        called=table.row,
    )


def sites_of(table: Table, columns: Columns, scale: Scale, seed: int, target: str = "") -> dict[str, Records]:
    """The records of every site in a file, by its site column.

    Raises:
        DataError: the schema names no site column, or something does not fit: told of all sites together.
    """
    common = Checked(table, columns, (target,))
    sites = {name: Checked(table, columns, (target,)) for name in site_names(table, columns)}
    common.structure(None, {})
    for name, checked in sites.items():
        checked.content(name)
    failed = {name: c.faults for name, c in {"every site": common, **sites}.items() if c.faults}
    if failed:
        told = mismatch(columns, {name: [(f.column, f.kind) for f in faults] for name, faults in failed.items()})
        raise DataError(f"{told}; `partway check SCHEMA {table.path}` says where")
    return {name: checked.records(scale, seed) for name, checked in sites.items()}


def mismatch(columns: Columns, faults: Mapping[str, Sequence[tuple[int, str]]]) -> str:
    """Every site whose records do not fit, and in what, in words that hold no value."""
    return "; ".join(f"{site}: {words(columns, own)}" for site, own in faults.items())


def site_names(table: Table, columns: Columns) -> list[str]:
    """The sites that a file has records of. Raises `DataError` if the schema does not say how to tell."""
    name = columns.schema.site
    if name is None:
        raise DataError(f"{table.path}: whose records are these? The schema names no site column ([schema] site)")
    if name not in table.frame.columns:
        raise DataError(f"{table.path}: {_no_column(name, table, columns)}")
    if columns.sites:
        return list(columns.sites)
    found: list[str] = _text(table, name).unique(maintain_order=True).to_list()
    for site in found:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}", site):
            raise DataError(
                f"{table.path}: column {name}: {site!r} is no site's name; [sites] of the schema gives it one"
            )
    return found


class Checked:
    """What a file has, column by column, and everything that does not fit.

    First `structure`, then `content`; without faults, `records` can be had.

    Args:
        targets: which targets' columns are read; an empty name is the label. Without any, `features` can be had.
    """

    def __init__(self, table: Table, columns: Columns, targets: Sequence[str] = ("",)) -> None:
        self._table, self._columns = table, columns
        self._targets = tuple("" if name == columns.schema.label else name for name in targets)
        self._counts = np.ones(len(table.frame), dtype=bool)
        """Rows that are this site's, and not left out."""
        self.faults: list[Fault] = []
        self._values: dict[str, Tensor] = {}
        self.labels: dict[str, Tensor] = {}
        """By target, of the records that count."""

    def structure(self, site: str | None, units: Mapping[str, str]) -> None:
        """Columns and units."""
        there, columns = self._table.frame.columns, self._columns
        if site is not None and columns.schema.site is None:
            raise DataError(
                f"{self._table.path}: only rows of {site} are to be read, and the schema names no site column"
            )
        needless = {columns.schema.site} if site is None else set[str | None]()
        needless |= {*columns.numbered} - {*columns.columns, *needed(columns, self._targets), columns.schema.site}
        for name in columns.numbered:
            parts = _parts(name, columns.columns.get(name))
            if (missing := [part for part in parts if part not in there]) and name not in needless:
                told = f"no column {missing[0]}" if self.faults else _no_column(missing[0], self._table, columns)
                self._fault(name, "MISSING_COLUMN", told)
        for name, unit in units.items():
            due = columns.units.get(name, "")
            if name in columns.units and unit != due:
                self._fault(name, "UNIT", f"column {name}: its unit here is {unit}; the schema says {due or 'none'}")
            elif name not in there:
                raise DataError(f"{self._table.path}: [data] units: {_no_column(name, self._table, columns)}")

    def content(self, site: str | None) -> None:
        """Values, of the columns that are there."""
        header, there = self._columns.schema, set(self._table.frame.columns)
        if site is not None and header.site in there:
            self._counts &= (_text(self._table, header.site) == self._columns.sites.get(site, site)).to_numpy()
        read = {name: self._answers(name) for name in self._targets if there.issuperset(needed(self._columns, [name]))}
        present = {name: c for name, c in self._columns.columns.items() if there.issuperset(_parts(name, c))}
        numbers = {name: self._numbers(name, c) for name, c in present.items() if isinstance(c, Numeric)}
        if read and not self._counts.any() and not self.faults:
            self._fault(
                next(needed(self._columns, self._targets)),
                "NO_RECORDS",
                "no records that count; the site has nothing to train on",
            )
        for name, column in present.items():
            if isinstance(column, Image):
                found = self._pixels(name, column)
            elif isinstance(column, Numeric):
                found = self._sound(name, column, numbers[name])
            else:
                found = self._codes(name, column)
            self._values[name] = torch.from_numpy(found[self._counts])
        self.labels = {name: torch.from_numpy(values[self._counts]) for name, values in read.items()}

    def refuse(self) -> None:
        """Raises `DataError` with everything that does not fit."""
        if self.faults:
            told = "; ".join(fault.words for fault in self.faults)
            raise DataError(f"{self._table.path}: {told}", [(fault.column, fault.kind) for fault in self.faults])

    def records(self, scale: Scale, seed: int) -> Records:
        """The records that count, divided by `seed`."""
        features, schema = self.features(scale), layout(self._columns, scale, self._targets)
        labels = self.labels[self._targets[0]]
        return Records(
            torch.stack([feature.values for feature in features], 1).view(-1, *schema.shape),
            labels,
            classes=schema.classes,
            numeric=tuple(n for n, feature in enumerate(features) if feature.by_statistics),
            division=divide(schema.target().strata(labels), seed),
            targets=schema.targets,
        )

    def features(self, scale: Scale) -> list[Feature]:
        """Of the records that count."""
        return [
            feature
            for name, column in self._columns.columns.items()
            for feature in encoded(name, column, self._values[name], scale)
        ]

    @property
    def rows(self) -> list[int]:
        """Which rows of the file the records that count are, as the file numbers them."""
        numbers: list[int] = (np.flatnonzero(self._counts) + self._table.first).tolist()
        return numbers

    def _answers(self, name: str) -> np.ndarray:
        """What is to be learnt of each row, by a target."""
        if not name:
            return self._classes()
        for column in made_of(self._columns.targets[name]):
            left_out = numbered(_text(self._table, column), [self._columns.targets[name].leave_out]) == 0
            self._counts &= ~left_out
        found = answers(self._columns.targets[name], lambda column: _text(self._table, column))
        for wrong in found.faults:
            self._wrong(wrong.column, wrong.kind, _text(self._table, wrong.column), wrong.where, wrong.told)
        self._counts &= found.counts
        return found.values

    def _classes(self) -> np.ndarray:
        """The class of each row; what is left out counts no more."""
        header, groups = self._columns.schema, list(self._columns.classes.values())
        text = _text(self._table, header.label)
        codes = numbered(text, [*groups, header.leave_out, header.unlabelled], header.by_prefix)
        self._wrong(header.label, "CLASS", text, codes < 0, "is no label of the schema")
        self._counts &= codes != len(groups)
        codes[codes > len(groups)] = -1
        return codes

    def _numbers(self, name: str, column: Numeric) -> np.ndarray:
        """NaN where missing, infinite where there is no number; what is to be left out counts no more."""
        series = self._table.frame[name]
        if series.dtype.is_numeric():
            x = series.cast(pl.Float64).fill_null(math.nan).to_numpy().copy()
            missing = np.isnan(x) & ("" in column.missing)
        else:
            text = _text(self._table, name)
            x = text.cast(pl.Float64, strict=False).fill_null(math.nan).to_numpy().copy()
            missing = text.is_in(list(column.missing)).to_numpy()
        missing = missing | np.isin(x, [n for word in column.missing if (n := number(word)) is not None])
        x[np.isnan(x)] = math.inf
        x[missing] = math.nan
        if column.range is not None and column.outside == "leave out":
            low, high = column.range
            self._counts &= ~(np.isfinite(x) & ((x < low) | (x > high)))
        return x

    def _sound(self, name: str, column: Numeric, x: np.ndarray) -> np.ndarray:
        text = _text(self._table, name)
        self._wrong(name, "NUMBER", text, np.isinf(x), "is no number")
        low, high = column.range or (-math.inf, math.inf)
        self._wrong(name, "RANGE", text, np.isfinite(x) & ((x < low) | (x > high)), f"is not in {low:g} to {high:g}")
        if column.range is None and column.log is not None:
            self._wrong(name, "RANGE", text, x + column.log <= 0, "has no logarithm")
        return x

    def _pixels(self, name: str, column: Image) -> np.ndarray:
        """All numbers of each row's picture, shape (rows, size)."""
        frame = self._table.frame.select(_parts(name, column))
        x = frame.cast(pl.Float64, strict=False).fill_null(math.nan).to_numpy()
        low, high = column.range
        for kind, wrong, told in (
            ("NUMBER", ~np.isfinite(x), "is no number"),
            ("RANGE", (x < low) | (x > high), f"is not in {low:g} to {high:g}"),
        ):
            rows = np.flatnonzero(wrong.any(1) & self._counts)
            if len(rows):
                at = _parts(name, column)[int(wrong[rows[0]].argmax())]
                self._wrong(name, kind, _text(self._table, at), np.isin(np.arange(len(x)), rows[:1]), told)
        return x

    def _codes(self, name: str, column: Flag | Category) -> np.ndarray:
        """The number of each row's value, -1 where it is missing."""
        text, values = _text(self._table, name), column.values
        codes = numbered(text, [column.missing, *((value,) for value in values)]) - 1
        due = f"is none of {', '.join(values)}" + (" or empty" if "" in column.missing else "")
        self._wrong(name, "CATEGORY", text, codes < -1, due)
        return codes

    def _wrong(self, name: str, kind: str, text: pl.Series, where: np.ndarray, told: str) -> None:
        """Notes a fault, if there is a row that counts with it, and shows the first."""
        found = np.flatnonzero(where & self._counts)
        if len(found):
            more = f" (and {len(found) - 1:,} more)" if len(found) > 1 else ""
            value = text[int(found[0])]
            shown = f"{value[:40]!r}" if value else "an empty field"
            here = f"{self._table.row} {found[0] + self._table.first}: {shown}"
            self._fault(name, kind, f"column {name}: {here} {told}{more}")

    def _fault(self, name: str, kind: str, told: str) -> None:
        self.faults.append(Fault(self._columns.numbered.index(name), kind, told))


def _no_column(name: str, table: Table, columns: Columns) -> str:
    names = table.frame.columns
    near = difflib.get_close_matches(name, [n for n in names if n not in columns.numbered], n=1)
    has = (", ".join(names[:12]) or "none") + (", ..." if len(names) > 12 else "")
    hint = "; is it separated by commas?" if len(names) == 1 else ""
    return f"no column {name}; {f'did you mean `{near[0]}`?' if near else f'it has {has}{hint}'}"


def _text(table: Table, name: str) -> pl.Series:
    """A column as words, without blanks around them, empty where there is nothing."""
    series = table.frame[name]
    if series.dtype.is_nested() or series.dtype == pl.Binary:
        raise DataError(f"{table.path}: column {name} holds {series.dtype}, neither words nor numbers")
    return series.cast(pl.String).fill_null("").str.strip_chars()


def _parts(name: str, column: Column | None) -> list[str]:
    """The columns of a file that are one of the schema's."""
    return [f"{name}{number}" for number in range(column.size)] if isinstance(column, Image) else [name]
