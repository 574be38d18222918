"""The thyroid records: columns, groups of diagnoses, and five sites from one bundled file (`bundled/SOURCES.md`).

A site's own file has the same columns. Which records count, and into which class a diagnosis falls, is in
`docs/data.md`.

>>> sorted(bundled(seed=0))
['other', 'stmw', 'svhc', 'svhd', 'svi']
>>> {site: records.sizes["train"] for site, records in bundled(seed=0).items()}
{'other': 2958, 'svi': 1313, 'svhc': 526, 'stmw': 140, 'svhd': 39}
"""

from __future__ import annotations

import csv
import gzip
import math
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch

from partway.data.records import Records, Schema, divide
from partway.errors import DataError

SITES = {"other": "other", "svi": "SVI", "svhc": "SVHC", "stmw": "STMW", "svhd": "SVHD"}
"""The demo's sites, by the referral source that stands for each. WEST has 3 records and is left out."""
CLASSES = {
    "none": "-",
    "hypothyroid": "EFGH",
    "hyperthyroid": "ABCD",
    "binding protein": "IJ",
    "general illness": "K",
    "replacement therapy": "LMN",
    "discordant results": "R",
}
"""Classes, by the first letter of a diagnosis."""
_LEFT_OUT = "OPQST"
"""Antithyroid treatment and miscellaneous: too few records each."""
LABORATORY = ("TSH", "T3", "TT4", "T4U", "FTI", "TBG")
FLAGS = (
    *("on_thyroxine", "query_on_thyroxine", "on_antithyroid_meds", "sick", "pregnant", "thyroid_surgery"),
    *(
        "I131_treatment",
        "query_hypothyroid",
        "query_hyperthyroid",
        "lithium",
        "goitre",
        "tumor",
        "hypopituitary",
        "psych",
    ),
    *(f"{name}_measured" for name in LABORATORY),
)
COLUMNS = ("age", "sex", *FLAGS, *LABORATORY, "target")
"""What a site's file must have; other columns (`patient_id`, `referral_source`) are not read."""
FEATURES = ("age", *LABORATORY, "female", "male", *FLAGS)
SCHEMA = Schema(shape=(len(FEATURES),), classes=len(CLASSES), numeric=1 + len(LABORATORY))
_OLDEST = 110
_BUNDLED = Path(__file__).parent / "bundled" / "thyroid.csv.gz"


def read(path: Path, seed: int) -> Records:
    """A site's records from its CSV file, divided by `seed`.

    Raises:
        DataError: the file cannot be read, has no such column, or a line says something that it cannot.
    """
    records = _records(_rows(path), str(path), seed)
    if not records.sizes["train"]:
        raise DataError(f"{path}: no records that count; the site has nothing to train on")
    return records


def bundled(seed: int) -> dict[str, Records]:
    """The five sites' records, each divided by `seed`."""
    rows = list(_rows(_BUNDLED))
    return {
        site: _records(((n, row) for n, row in rows if row["referral_source"] == source), str(_BUNDLED), seed)
        for site, source in SITES.items()
    }


def write_sites(folder: Path) -> list[Path]:
    """The bundled file cut into one for each site, as `<site>.csv.gz`."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = [row for _, row in _rows(_BUNDLED)]
    paths = []
    for site, source in SITES.items():
        paths.append(folder / f"{site}.csv.gz")
        with gzip.open(paths[-1], "wt", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(row for row in rows if row["referral_source"] == source)
    return paths


def _rows(path: Path) -> Iterable[tuple[int, Mapping[str, str]]]:
    """Lines of a CSV file with their numbers."""
    try:
        with (
            gzip.open(path, "rt", newline="", encoding="utf-8")
            if path.suffix == ".gz"
            else path.open(newline="") as file
        ):
            reader = csv.DictReader(file, strict=True)
            missing = [name for name in COLUMNS if name not in (reader.fieldnames or ())]
            if missing:
                raise DataError(f"{path}: no column {', '.join(missing)}; it has {', '.join(reader.fieldnames or ())}")
            for row in reader:
                if None in row or None in row.values():
                    raise DataError(f"{path}, line {reader.line_num}: another number of values than columns")
                yield reader.line_num, row
    except (OSError, EOFError, zlib.error, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path}: cannot be read ({error})") from None


def _records(rows: Iterable[tuple[int, Mapping[str, str]]], where: str, seed: int) -> Records:
    letters = {letter: number for number, group in enumerate(CLASSES.values()) for letter in group}
    features, labels = [], []
    for line, row in rows:
        here = f"{where}, line {line}"
        diagnosis = row["target"][:1]
        if diagnosis not in letters and (not diagnosis or diagnosis not in _LEFT_OUT):
            raise DataError(f"{here}: target {row['target']!r} is no diagnosis; one begins with A to T, or is `-`")
        age = _number(row, "age", here)
        if diagnosis in letters and not age > _OLDEST:
            features.append(_features(row, age, here))
            labels.append(letters[diagnosis])
    y = torch.tensor(labels, dtype=torch.int64)
    x = torch.tensor(features, dtype=torch.float64).view(len(y), len(FEATURES))
    numeric = tuple(range(1 + len(LABORATORY)))
    return Records(x, y, classes=len(CLASSES), numeric=numeric, division=divide(y, seed))


def _features(row: Mapping[str, str], age: float, here: str) -> list[float]:
    """One record's features in the order of `FEATURES`; NaN for what was not measured."""
    if row["sex"] not in ("F", "M", ""):
        raise DataError(f"{here}: sex is F, M or empty, not {row['sex']!r}")
    laboratory = [math.log(_number(row, name, here) + 0.01) for name in LABORATORY]
    sex = [float(row["sex"] == "F"), float(row["sex"] == "M")]
    return [age, *laboratory, *sex, *(_flag(row, name, here) for name in FLAGS)]


def _number(row: Mapping[str, str], name: str, here: str) -> float:
    try:
        number = float(row[name]) if row[name] else math.nan
    except ValueError:
        number = -1.0
    if number < 0 or math.isinf(number):
        raise DataError(f"{here}: {name} is a number of at least 0, not {row[name]!r}")
    return number


def _flag(row: Mapping[str, str], name: str, here: str) -> float:
    if row[name] not in ("t", "f"):
        raise DataError(f"{here}: {name} is t or f, not {row[name]!r}")
    return float(row[name] == "t")
