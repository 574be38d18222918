"""What a file of records has, held against a schema: for who writes the schema, and for a hospital that joins."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, get_args

import torch
from torch import Tensor

from partway.config import ClassesTarget, Columns, MultiLabelTarget, Scale
from partway.data.labels import target_of
from partway.data.records import Target
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
    records: dict[str, int] = field(default_factory=dict)
    """By site, how many count, those without a label left aside."""
    sites: dict[str, dict[str, int]] = field(default_factory=dict)
    """By site, records that count in each class, with each answer, or by whether the event came."""
    unlabelled: dict[str, int] = field(default_factory=dict)
    """By site, those without a label, where the schema knows such."""
    inputs: dict[str, int] = field(default_factory=dict)
    """By scale, how many numbers a record gives to the network."""
    outputs: int = 0
    """How many numbers the network puts out for a record."""
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
            lines.append(f"  {site}: {self.records[site]:,} records count: {told}{more}")
        if rest := self.rows - sum(self.records.values()) - sum(self.unlabelled.values()):
            lines.append(f"  {rest:,} rows do not count: left out by label or range, or of other sites")
        lines += [f'  inputs = {count} with scale = "{scale}"' for scale, count in self.inputs.items()]
        return "\n".join([*lines, f"  classes = {self.outputs}"])


def counted(columns: Columns, target: Target, labels: Tensor) -> dict[str, int]:
    """How many records have each class or answer, or are known to have had the event."""
    settings = columns.targets.get(target.name)
    if isinstance(settings, MultiLabelTarget):
        return dict(zip(settings.columns, labels.sum(0).long().tolist(), strict=True))
    if target.kind == "regression":
        return {"numbers": len(labels)}
    names: Sequence[str] = ("no", "yes") if target.kind == "binary" else ("lost from sight", "the event came")
    if target.kind == "classes":
        names = list(settings.classes if isinstance(settings, ClassesTarget) else columns.classes)
    counts = torch.bincount(target.strata(labels), minlength=len(names)).tolist()
    return dict(zip(names, counts, strict=True))


def survey(table: Table, columns: Columns, site: str | None = None, target: str = "") -> Survey:
    """Checks a file. Raises `DataError` where not even that can be done.

    Args:
        site: only this one's rows; else all sites' where the file has the schema's site column, or all rows.
        target: of the schema; without a name, its label.
    """
    kind = target_of(columns, target)
    found = Survey(columns.schema.name, str(table.path), len(table.frame))
    common = Checked(table, columns, (target,))
    common.structure(site, {})
    found.faults = [fault.words for fault in common.faults]
    names: list[str | None] = [site]
    if site is None and columns.schema.site in table.frame.columns:
        names = [*site_names(table, columns)]
    for name in names:
        checked = Checked(table, columns, (target,))
        checked.content(name)
        found.faults += [f"{name}: {f.words}" if name else f.words for f in checked.faults]
        if not checked.faults and not common.faults:
            (labels,) = checked.labels.values()
            if not target and columns.schema.unlabelled:
                found.unlabelled[name or FILE] = int((labels < 0).sum())
                labels = labels[labels >= 0]
            found.records[name or FILE], found.sites[name or FILE] = len(labels), counted(columns, kind, labels)
    found.outputs = kind.outputs
    found.inputs = {scale: layout(columns, scale).shape[0] for scale in get_args(Scale)}
    return found
