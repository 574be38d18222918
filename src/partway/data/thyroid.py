"""The thyroid records, with which the demo, the benchmarks and many tests run: five sites, seven classes.

>>> sorted(bundled(seed=0))
['other', 'stmw', 'svhc', 'svhd', 'svi']
"""

from __future__ import annotations

from pathlib import Path

from partway.config import bundled_schema
from partway.data import sets
from partway.data.records import Records
from partway.data.schema import layout

SCHEMA = layout(bundled_schema("thyroid"), "statistics")


def bundled(seed: int) -> dict[str, Records]:
    """The five sites' records, each divided by `seed`."""
    return sets.bundled("thyroid", seed)


def write_sites(folder: Path) -> list[Path]:
    """The bundled file cut into one for each site, as `<site>.csv.gz`."""
    return sets.write_sites("thyroid", folder)
