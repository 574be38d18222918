"""Records of the same patients at several parties: each has columns of its own, and all go by one list of ids.

The list is agreed on beforehand (`docs/configurations.md`): in each line a token that all parties have, a comma, and
this party's id, or nothing where it lacks the record; or one id a line that all have. Without a list it is all ids of
this party's file, sorted as text. Who holds the labels may lack none.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate
from pathlib import Path

import torch
from torch import Tensor

from partway.config import Connection, Held, Job
from partway.data import table
from partway.data.records import SHARES, Records
from partway.data.schema import columns_of, layout, part_of
from partway.data.table import Checked, Table
from partway.errors import DataError
from partway.plan.batches import shuffled
from partway.plan.plan import Part


def read(connection: Connection | None, home: Path, job: Job, me: str) -> Records | None:
    """The records that a party brings to a job, or None if it brings none.

    Args:
        connection: the party's `[data]`; of a job that predicts, its `[predict]`.
        home: the folder to which paths are relative.

    Raises:
        ConfigError: the job has no schema.
        DataError: the file is damaged, or does not fit the schema: with everything that does not; or there is none.
    """
    held = job.holds.get(me)
    if not job.laned and (held is None or not (held.columns or held.targets)):
        return None
    if connection is None and job.predict and job.laned:
        return None  # others may have somebody to predict of
    if connection is None:
        missing = "[predict]" if job.predict else "[data]"
        raise DataError(f"{me} has no {missing}, and the job {job.job.name} counts on its records")
    if job.laned or held is None:
        return table.read(connection, home, job)
    ids = read_ids(home / connection.ids) if connection.ids else None
    return records_of(table.load(home / connection.path, connection.connector), job, held, ids, connection.units)


def read_ids(path: Path) -> dict[str, str]:
    """The agreed list: from each token, in order, to this party's id. Raises `DataError` if the file is damaged."""
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read ({error})") from None
    ids = {}
    for line in lines:
        token, comma, name = line.partition(",")
        if token in ids:
            raise DataError(f"{path}: {token} is there twice")
        ids[token] = name if comma else token
    if not ids:
        raise DataError(f"{path}: there are no ids in it")
    return ids


def records_of(
    file: Table, job: Job, held: Held, ids: Mapping[str, str] | None, units: Mapping[str, str] | None = None
) -> Records:
    """One party's columns and labels of the agreed records, in the order of the list, divided by the job's seed.

    Of a job that predicts no label is read, and all are test records.
    """
    whole, read = columns_of(job), held.targets if job.predict is None else ()
    part = part_of(whole, held)
    checked = Checked(file, part, read)
    checked.structure(None, units or {})
    checked.content(None)
    own = _ids(file, whole.schema.id, checked.rows)
    if checked.faults:
        told = "; ".join(fault.words for fault in checked.faults)
        numbers = [whole.numbered.index(part.numbered[fault.column]) for fault in checked.faults]  # as all know them
        kinds = [fault.kind for fault in checked.faults]
        raise DataError(f"{file.path}: {told}", list(zip(numbers, kinds, strict=True)))
    agreed = {name: name for name in sorted(own)} if ids is None else ids
    here = [own.get(name, -1) if name else -1 for name in agreed.values()]
    at, present = torch.tensor(here).clamp(min=0), torch.tensor([row >= 0 for row in here])
    lacking = len(agreed) - int(present.sum())
    if lacking == len(agreed):
        raise DataError(f"{file.path}: none of the {len(agreed):,} agreed ids is in it")
    if read and lacking:
        words = f"{lacking:,} of the {len(agreed):,} agreed ids have no label here: take them from the list"
        raise DataError(f"{file.path}: {words}")
    features, schema = checked.features(job.records.scale), layout(part, job.records.scale, held.targets)
    labels = {target.name: values[at] for target, values in zip(schema.targets, checked.labels.values(), strict=False)}
    values = [torch.where(present, f.values[at], torch.nan if f.by_statistics else 0.0) for f in features]
    return Records(
        torch.stack(values, 1).view(-1, *schema.shape) if values else torch.zeros(len(agreed), 0),
        next(iter(checked.labels.values()))[at] if read else torch.zeros(len(agreed), *schema.target().label),
        classes=schema.classes,
        numeric=tuple(number for number, feature in enumerate(features) if feature.by_statistics),
        division=division(len(agreed), None if job.predict else job.job.seed),
        ids=list(agreed),
        names=[name or token for token, name in agreed.items()],
        called=whole.schema.id or "record",
        targets=schema.targets if held.targets else (),
        more=labels,
        present=present if lacking else None,
    )


def division(records: int, seed: int | None) -> dict[Part, Tensor]:
    """Indices of training, validation and test records, drawn by `seed` alone: not everybody has the labels.

    Without a seed all are test records.
    """
    if seed is None:
        return {part: torch.arange(records if part == "test" else 0) for part in SHARES}
    drawn = shuffled(records, "division", seed)
    bounds = [0, *(round(records * share) for share in accumulate(SHARES.values()))]
    parts = zip(SHARES, bounds[:-1], bounds[1:], strict=True)
    return {part: torch.tensor(sorted(drawn[begin:end]), dtype=torch.int64) for part, begin, end in parts}


def _ids(file: Table, column: str | None, rows: Sequence[int]) -> dict[str, int]:
    """From each id to its place among the rows that count."""
    if column is None:
        return {str(row): place for place, row in enumerate(rows)}
    if column not in file.frame.columns:
        raise DataError(f"{file.path}: there is no column {column}, by which records are matched ([schema] id)")
    names = [str(file.frame[column][row - file.first]) for row in rows]
    found = {name: place for place, name in enumerate(names)}
    if len(found) < len(names):
        twice = next(name for place, name in enumerate(names) if found[name] != place)
        raise DataError(f"{file.path}: column {column}: {file.row} {rows[names.index(twice)]}'s id is there twice")
    return found
