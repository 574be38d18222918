"""What a file of records has, held against a schema: for who writes the schema, and for a hospital that joins."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, get_args

import torch

from partway.config import Columns, Scale
from partway.data.schema import layout
from partway.data.table import Checked, Table, site_names

FILE = "all rows"
"""Stands for the site where the file is one site's."""


@dataclass
class Survey:
    """What `partway check` shows."""

    schema: str
    file: str
    rows: int
    sites: dict[str, dict[str, int]] = field(default_factory=dict)
    """By site, records that count in each class."""
    unlabelled: dict[str, int] = field(default_factory=dict)
    """By site, those without a label, where the schema knows such."""
    inputs: dict[str, int] = field(default_factory=dict)
    """By scale, how many numbers a record gives to the network."""
    faults: list[str] = field(default_factory=list)
    """Everything that does not fit. May hold values."""

    def words(self) -> dict[str, Any]:
        return asdict(self)

    def text(self) -> str:
        if self.faults:
            return "\n".join([f"{self.file} does not fit the schema {self.schema}:", *(f"  {f}" for f in self.faults)])
        lines = [f"{self.file} fits the schema {self.schema}: {self.rows:,} rows"]
        for site, classes in self.sites.items():
            told = ", ".join(f"{name} {count:,}" for name, count in classes.items())
            more = f"; {self.unlabelled[site]:,} have no label" if site in self.unlabelled else ""
            lines.append(f"  {site}: {sum(classes.values()):,} records count: {told}{more}")
        counted = sum(sum(classes.values()) for classes in self.sites.values()) + sum(self.unlabelled.values())
        if rest := self.rows - counted:
            lines.append(f"  {rest:,} rows do not count: left out by label or range, or of other sites")
        lines += [f'  inputs = {count} with scale = "{scale}"' for scale, count in self.inputs.items()]
        return "\n".join([*lines, f"  classes = {len(next(iter(self.sites.values())))}"])


def survey(table: Table, columns: Columns, site: str | None = None) -> Survey:
    """Checks a file. Raises `DataError` where not even that can be done.

    Args:
        site: only this one's rows; else all sites' where the file has the schema's site column, or all rows.
    """
    found = Survey(columns.schema.name, str(table.path), len(table.frame))
    common = Checked(table, columns)
    common.structure(site, {})
    found.faults = [fault.words for fault in common.faults]
    names: list[str | None] = [site]
    if site is None and columns.schema.site in table.frame.columns:
        names = [*site_names(table, columns)]
    for name in names:
        checked = Checked(table, columns)
        checked.content(name)
        found.faults += [f"{name}: {f.words}" if name else f.words for f in checked.faults]
        if not checked.faults and not common.faults:
            labels = checked.records("statistics", 0).labels
            counts = torch.bincount(labels[labels >= 0], minlength=len(columns.classes)).tolist()
            if columns.schema.unlabelled:
                found.unlabelled[name or FILE] = int((labels < 0).sum())
            found.sites[name or FILE] = dict(zip(columns.classes, counts, strict=True))
    found.inputs = {scale: layout(columns, scale).shape[0] for scale in get_args(Scale)}
    return found
