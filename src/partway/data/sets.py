"""The bundled data sets, each with its schema: records of real patients, of whom `bundled/SOURCES.md` tells.

>>> {site: records.sizes["train"] for site, records in bundled("thyroid", seed=0).items()}
{'other': 2958, 'svi': 1313, 'svhc': 526, 'stmw': 140, 'svhd': 39}
"""

from __future__ import annotations

import csv
import gzip
from pathlib import Path

from partway.config import Scale, bundled_schema
from partway.data.records import Records
from partway.data.table import Table, load, records_of, site_names, sites_of

_FOLDER = Path(__file__).parent / "bundled"


def bundled(name: str, seed: int, scale: Scale = "statistics") -> dict[str, Records]:
    """A bundled data set's records by site, each divided by `seed`. One without a site column is one site's."""
    table, columns = _table(name), bundled_schema(name)
    if columns.schema.site is None:
        return {name: records_of(table, columns, scale, seed)}
    return sites_of(table, columns, scale, seed)


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
    return load(_FOLDER / f"{name}.csv.gz", "csv")
