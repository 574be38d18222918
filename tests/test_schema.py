"""Schemas: what can be wrong in one, features against a naive reading, and files that do not fit, CSV and Parquet."""

from __future__ import annotations

import csv
import gzip
import hashlib
import io
import math
import re
from pathlib import Path

import polars as pl
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from partway.assembly import plan_of
from partway.config import SCHEMAS, Connection, bundled_schema, read_job, read_schema
from partway.data import sets, table
from partway.data.records import Records
from partway.data.schema import FAULTS, layout, words
from partway.data.survey import survey
from partway.errors import ConfigError, DataError

BUNDLED = Path(sets.__file__).parent / "bundled"
SCHEMA = """
[schema]
name = "small"
label = "outcome"
site = "clinic"
leave_out = ["unknown"]

[classes]
well = ["well"]
ill = ["ill", "dead"]

[columns]
age = { kind = "numeric", unit = "years", range = [18, 110], outside = "leave out" }
crp = { kind = "numeric", unit = "mg/l", range = [0, 500], log = 1, missing = ["", "?"], reference = [0, 5] }
weight = { kind = "numeric", unit = "kg", missing = ["0"], measured_flag = true }
smoker = { kind = "flag", values = ["no", "yes"], missing = [""], measured_flag = true }
ward = { kind = "category", values = ["1", "2", "icu"] }
"""
SCHEMA = SCHEMA.replace("[0, 5] }", "[0, 5], marks = true }")
SMALL = read_schema(SCHEMA)
ROWS = [
    ("north", 50, 3.5, 80, "yes", "1", "well"),
    ("north", 61, "?", 0, "", "icu", "dead"),
    ("south", 17, 2, 70, "no", "2", "ill"),
    ("south", 40, "", 0.0, "no", "2.0", "ill"),
    ("south", 90, 499, 65.5, "no", "1", "unknown"),
]
HEADER = ("clinic", "age", "crp", "weight", "smoker", "ward", "outcome")


def file(folder: Path, rows: list[tuple], header: tuple[str, ...] = HEADER, name: str = "records.csv") -> Path:
    with (folder / name).open("w", newline="") as out:
        writer = csv.writer(out)
        writer.writerow(header)
        writer.writerows(rows)
    return folder / name


def read(path: Path, scale: str = "statistics", **more) -> Records:
    return table.records_of(table.load(path), SMALL, scale, 0, **more)


def faults(path: Path, **more) -> list[tuple[str, str]]:
    """What does not fit, by column name."""
    with pytest.raises(DataError) as caught:
        read(path, **more)
    assert "\n" not in str(caught.value)
    return [(SMALL.numbered[column], kind) for column, kind in caught.value.faults]


# -- a schema file


@pytest.mark.parametrize(
    ("before", "after", "told"),
    [
        ("leave_out", "leave_uot", "[schema] has no key `leave_uot`; did you mean `leave_out`?"),
        ("unit = ", "unti = ", "[columns] age: has no key `unti`; did you mean `unit`?"),
        ("[columns]", "[colums]", "has no key `colums`; did you mean `columns`?"),
        ('kind = "flag"', 'kind = "flg"', "[columns] smoker: Invalid value 'flg' - at `kind`"),
        ('kind = "flag", ', "", "[columns] smoker: Object missing required field `kind`"),
        ('kind = "flag", ', 'kind = "flag", unit = "kg", ', "[columns] smoker: has no key `unit`; it has values"),
        ('values = ["no", "yes"]', 'values = ["no"]', "[columns] smoker: Expected `array` of length 2"),
        ('missing = [""], m', 'missing = ["no"], m', "[columns] smoker: `no` means two things"),
        ('"1", "2", "icu"', '"1", "1"', "[columns] ward: `1` means two things"),
        ("range = [0, 500]", "range = [500, 0]", "[columns] crp: range goes from a number to a larger one"),
        ("range = [0, 500]", "range = [0, inf]", "[columns] crp: range goes from a number to a larger one"),
        ("range = [0, 500]", "range = [-1, 500]", "[columns] crp: range begins where log(value + 1) does not exist"),
        ("reference = [0, 5], ", "", "[columns] crp: marks stand at the limits of `reference`"),
        ("range = [18, 110], ", "", "[columns] age: outside needs a range"),
        ('label = "outcome"', 'label = "age"', "label, site and columns must be different columns"),
        ('site = "clinic"', 'site = "outcome"', "label, site and columns must be different columns"),
        ('site = "clinic"\n', "[sites]\na = 'a'\n[x]", "[schema] has no key"),
        ('"ill", "dead"', '"ill", "well"', "[classes] and leave_out: `well` means two things"),
        ('"ill", "dead"', '"ill", "ill"', "[classes] and leave_out: a value is there twice"),
        ('["unknown"]', '["unknown"]\nby_prefix = true', "`unknown`"),
        ('ill = ["ill", "dead"]', "", "`classes`"),
        ("[schema]", "[schema", "not TOML"),
    ],
)
def test_a_wrong_schema_is_named(before: str, after: str, told: str) -> None:
    text = SCHEMA.replace('"ill", "dead"', '"ill", "un"') if "by_prefix" in after else SCHEMA
    assert before in text
    if after.startswith("[sites]"):
        before, after, told = "[columns]", "[sites]\na = 'a'\n[columns]", "[schema] site names none"
        text = text.replace('site = "clinic"\n', "")
    with pytest.raises(ConfigError) as caught:
        read_schema(text.replace(before, after, 1), "s.toml")
    assert str(caught.value).startswith("s.toml: ")
    assert told in str(caught.value)
    assert "\n" not in str(caught.value)


JOB = """
[job]
name = "small"
[network]
build = "partway.model.zoo:mlp"
arguments = { inputs = 8, hidden = [4], classes = 2 }
cut = ["hidden.0"]
[records]
"""


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ('schema = "thyriod"', "there is no schema `thyriod`; did you mean `thyroid`?"),
        ('schema = "mimic"', "bundled are thyroid, heart, support, mnist; a file ends in .toml"),
        ('schema = "../small.toml"', "at `records.schema`"),
        ('schema = "small.toml"', "is a file, and only the job's text was given"),
        (
            '[schema]\nname = "small"',
            "has no key `schema`; it has job, network, networks, holds, plan, training, records, evaluation",
        ),
        ("[columns]\nx = 1", "has no key `columns`; it has job, "),
        ('scale = "mark"', "Invalid enum value 'mark' - at `records.scale`"),
    ],
)
def test_a_job_names_a_schema_that_is_there(line: str, told: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(told)):
        read_job(JOB + line)
    assert read_job(JOB + 'schema = "small.toml"', schema=SCHEMA).columns == SMALL
    assert read_job(JOB + 'schema = "dataset"').columns is None


# -- features


def naive(rows: list[dict[str, str]], scale: str) -> list[list[float]]:
    """The thyroid features as the page has them, value by value."""
    columns, out = bundled_schema("thyroid").columns, []
    for row in rows:
        features = []
        for name in ("age", "TSH", "T3", "TT4", "T4U", "FTI", "TBG"):
            value = math.nan if row[name] == "" else float(row[name])
            level = (lambda v: v) if name == "age" else (lambda v: math.log(v + 0.01))
            if scale == "statistics":
                features.append(level(value))
                continue
            low, high = (level(limit) for limit in columns[name].reference)
            u = (level(value) - (low + high) / 2) / ((high - low) / 2)
            u = 0.0 if math.isnan(u) else max(-3.0, min(3.0, u))
            features.append(u)
            if scale == "marks" and name != "age":
                measured = row[name] != ""
                features += [measured * math.tanh(8 * (u - c)) for c in (-2, -4 / 3, -1, 0, 1, 4 / 3, 2)]
        features += [float(row["sex"] == "F"), float(row["sex"] == "M")]
        features += [float(row[name] == "t") for name in list(columns)[8:]]
        out.append([0.7 * f for f in features] if scale == "marks" else features)
    return out


@pytest.mark.parametrize("scale", ["statistics", "reference", "marks"])
def test_thyroid_features_are_those_of_a_naive_reading(scale: str) -> None:
    with gzip.open(BUNDLED / "thyroid.csv.gz", "rt") as plain:
        rows = [r for r in csv.DictReader(plain) if r["referral_source"] == "STMW" and r["target"][0] not in "OPQST"]
    kept = [f for r, f in zip(rows, naive(rows, scale), strict=True) if float(r["age"]) <= 110]
    expected = torch.tensor(kept, dtype=torch.float64)
    found = sets.bundled("thyroid", 0, scale)["stmw"]
    assert found.features.shape == expected.shape == (254, 71 if scale == "marks" else 29)
    assert (found.features.nan_to_num(-9) - expected.nan_to_num(-9)).abs().max() < 1e-12
    assert len(found.numeric) == (7 if scale == "statistics" else 0)


@pytest.mark.parametrize(("name", "scale", "counts"), [("thyroid", "statistics", 2), ("thyroid", "marks", 0)])
def test_nothing_is_exchanged_for_reference_ranges(name: str, scale: str, counts: int) -> None:
    job = read_job(JOB + f'schema = "{name}"\nscale = "{scale}"\n[roster]\na = "{"0" * 64}"\nb = "{"0" * 64}"')
    _, schedule = plan_of(job, "server")
    turns = schedule({site: {"train": 9, "validation": 9, "test": 9} for site in ("a", "b")})
    assert sum(turn.flow in ("sums", "squares") for turn in turns) == counts


def test_a_small_file_by_hand(tmp_path: Path) -> None:
    records = read(file(tmp_path, ROWS))
    assert records.labels.tolist() == [0, 1, 1]  # one is 17, one is unknown
    nan = -9.0
    assert records.features.nan_to_num(nan).tolist() == [
        [50, math.log(4.5), 80, 1, 1, 1, 1, 0, 0],
        [61, nan, nan, 0, 0, 0, 0, 0, 1],
        [40, nan, nan, 0, 0, 1, 0, 1, 0],
    ]
    assert records.numeric.tolist() == [0, 1, 2]
    assert records.schema == layout(SMALL, "statistics")
    reference = read(file(tmp_path, ROWS), "reference")
    assert reference.numeric.tolist() == [0, 2]
    m, h = math.log(6) / 2, math.log(6) / 2
    assert reference.features[:, 1].tolist() == pytest.approx([(math.log(4.5) - m) / h, 0, 0])
    assert read(file(tmp_path, ROWS), "marks").features.shape == (3, 16)


def test_parquet_gives_the_same_as_csv(tmp_path: Path) -> None:
    frame = pl.DataFrame(
        {
            "clinic": ["north", "north", "south", "south", "south"],
            "age": [50, 61, 17, 40, 90],
            "crp": [3.5, None, 2, float("nan"), 499],
            "weight": [80, 0, 70, 0, 65],
            "smoker": ["yes", None, "no", "no", "no"],
            "ward": pl.Series(["1", "icu", "2", "2", "1"], dtype=pl.Categorical),
            "outcome": ["well", "dead", "ill", "ill", "unknown"],
        }
    )
    frame.write_parquet(tmp_path / "records.parquet")
    for scale in ("statistics", "marks"):
        a, b = read(file(tmp_path, ROWS), scale), read(tmp_path / "records.parquet", scale)
        assert a.features.nan_to_num(-9).equal(b.features.nan_to_num(-9))
        assert a.labels.equal(b.labels)
    frame.with_columns(crp=pl.lit(None), age=pl.lit(None, dtype=pl.Int64)).write_parquet(tmp_path / "records.parquet")
    assert read(tmp_path / "records.parquet").features[:, :2].isnan().all()
    frame.with_columns(weight=pl.lit(None)).write_parquet(tmp_path / "records.parquet")
    assert faults(tmp_path / "records.parquet") == [("weight", "NUMBER")]  # nothing stands for "not measured" but 0
    frame.with_columns(ward=pl.Series([[1], [1], [1], [1], [1]])).write_parquet(tmp_path / "records.parquet")
    with pytest.raises(DataError, match=r"column ward holds List\(Int64\), neither words nor numbers"):
        read(tmp_path / "records.parquet")
    (tmp_path / "records.parquet").write_bytes(b"PAR1 nothing")
    with pytest.raises(DataError, match=r"records\.parquet: cannot be read"):
        read(tmp_path / "records.parquet")


numbers = st.one_of(st.sampled_from(["", "?", "0", "0.0"]), st.floats(0, 500).map(str), st.integers(0, 500).map(str))


@given(st.lists(st.tuples(numbers, st.sampled_from(["1", "1.0", " 2", "icu"])), min_size=1, max_size=20))
def test_any_sound_file_is_read_as_python_reads_it(rows: list[tuple[str, str]]) -> None:
    lines = [("north", "50", crp, "70", "yes", ward, "well") for crp, ward in rows]
    text = io.StringIO(newline="")
    csv.writer(text).writerows([HEADER, *lines])
    frame = pl.read_csv(text.getvalue().encode(), infer_schema=False)
    checked = table.Checked(table.Table(Path("x"), frame, "line", 2), SMALL)
    checked.structure(None, {})
    checked.content(None)
    assert not checked.faults
    features = checked.records("statistics", 0).features
    for (crp, ward), row in zip(rows, features.nan_to_num(-9).tolist(), strict=True):
        assert row[1] == (-9 if crp in ("", "?") else math.log(float(crp) + 1))
        assert row[6:] == [float(ward in ("1", "1.0")), float(ward == " 2"), float(ward == "icu")]


# -- files that do not fit

WRONG = [
    ("age", "fifty", "NUMBER", "'fifty' is no number"),
    ("crp", "7,5", "NUMBER", "'7,5' is no number"),
    ("crp", "inf", "NUMBER", "'inf' is no number"),
    ("crp", "501", "RANGE", "'501' is not in 0 to 500"),
    ("crp", "-0.5", "RANGE", "'-0.5' is not in 0 to 500"),
    ("weight", "", "NUMBER", "an empty field is no number"),
    ("smoker", "maybe", "CATEGORY", "'maybe' is none of no, yes or empty"),
    ("ward", "3", "CATEGORY", "'3' is none of 1, 2, icu"),
    ("ward", "", "CATEGORY", "an empty field is none of 1, 2, icu"),
    ("outcome", "gone", "CLASS", "'gone' is no label of the schema"),
]


@pytest.mark.parametrize(("column", "value", "kind", "told"), WRONG)
def test_a_value_that_cannot_be(tmp_path: Path, column: str, value: str, kind: str, told: str) -> None:
    row = list(ROWS[0])
    row[HEADER.index(column)] = value
    path = file(tmp_path, [ROWS[0], tuple(row), tuple(row)])
    assert faults(path) == [(column, kind)]
    with pytest.raises(DataError, match=re.escape(f"column {column}: line 3: {told} (and 1 more)")):
        read(path)


def test_what_is_wrong_in_a_record_that_does_not_count_does_not_matter(tmp_path: Path) -> None:
    unknown = ("south", 90, 499, "heavy", "maybe", "9", "unknown")
    child = ("south", 17, 9999, "heavy", "maybe", "9", "ill")
    assert len(read(file(tmp_path, [*ROWS, unknown, child])).labels) == 3


def test_everything_that_does_not_fit_is_told_at_once_and_leaves_without_a_value(tmp_path: Path) -> None:
    header = ("clinic", "Age", "crp", "weight", "smoker", "ward", "outcome")
    path = file(tmp_path, [("north", 50, 777, "x9x", "mayhap", "7th", "vanished")], header)
    expected = [
        ("age", "MISSING_COLUMN"),
        ("weight", "UNIT"),
        ("outcome", "CLASS"),
        ("crp", "RANGE"),
        ("weight", "NUMBER"),
        ("smoker", "CATEGORY"),
        ("ward", "CATEGORY"),
    ]
    assert faults(path, units={"weight": "lb", "crp": "mg/l"}) == expected
    with pytest.raises(DataError) as caught:
        read(path, units={"weight": "lb"})
    assert "no column age; did you mean `Age`?" in str(caught.value)
    assert "column weight: its unit here is lb; the schema says kg" in str(caught.value)
    told = words(SMALL, caught.value.faults)
    assert told.startswith("column age: is missing, column weight: another unit, column outcome: an unknown class, ")
    assert not [value for value in ("777", "x9x", "mayhap", "7th", "vanished") if value in told]
    assert words(SMALL, [(99, "UNIT"), (0, "NONSENSE")]) == "its records cannot be read; its own log has the words"


def test_no_records(tmp_path: Path) -> None:
    assert faults(file(tmp_path, [])) == [("outcome", "NO_RECORDS")]
    assert faults(file(tmp_path, [ROWS[2], ROWS[4]])) == [("outcome", "NO_RECORDS")]
    assert faults(file(tmp_path, ROWS), site="west") == [("outcome", "NO_RECORDS")]


def test_a_site_reads_its_own_rows_of_a_common_file(tmp_path: Path) -> None:
    file(tmp_path, ROWS)
    job = read_job(JOB + 'schema = "small.toml"', schema=SCHEMA)
    whole = table.read(Connection(path="records.csv"), tmp_path, job)
    north = table.read(Connection(path="records.csv", site="north"), tmp_path, job)
    assert (len(whole.labels), len(north.labels)) == (3, 2)
    file(tmp_path, [row[1:] for row in ROWS], HEADER[1:])
    assert len(table.read(Connection(path="records.csv"), tmp_path, job).labels) == 3
    assert faults(tmp_path / "records.csv", site="north") == [("clinic", "MISSING_COLUMN")]
    with pytest.raises(DataError, match=r"\[data\] units: no column wieght; it has age"):
        table.read(Connection(path="records.csv", units={"wieght": "kg"}), tmp_path, job)
    without = read_job(JOB + 'schema = "small.toml"', schema=SCHEMA.replace('site = "clinic"\n', ""))
    with pytest.raises(DataError, match="only rows of north are to be read, and the schema names no site column"):
        table.read(Connection(path="records.csv", site="north"), tmp_path, without)


def test_all_sites_of_a_file(tmp_path: Path) -> None:
    path = file(tmp_path, ROWS)
    found = table.sites_of(table.load(path), SMALL, "statistics", 0)
    assert {site: len(records.labels) for site, records in found.items()} == {"north": 2, "south": 1}
    bad = [("north", 50, 3, 80, "yes", "1", "lost"), ("south", 50, 3, "?", "yes", "1", "well")]
    with pytest.raises(DataError) as caught:
        table.sites_of(table.load(file(tmp_path, bad)), SMALL, "statistics", 0)
    assert str(caught.value).startswith(
        "north: column outcome: an unknown class; south: column weight: something that is no number; "
    )
    renamed = tuple(name.replace("ward", "Station") for name in HEADER)
    with pytest.raises(DataError, match="every site: column ward: is missing; north: column outcome: an unknown"):
        table.sites_of(table.load(file(tmp_path, bad, renamed)), SMALL, "statistics", 0)
    with pytest.raises(DataError, match=r"column clinic: 'St\. Mary' is no site's name; \[sites\] of the schema"):
        table.sites_of(table.load(file(tmp_path, [("St. Mary", *ROWS[0][1:])])), SMALL, "statistics", 0)
    named = read_schema(SCHEMA + '[sites]\nmary = "St. Mary"')
    found = table.sites_of(table.load(file(tmp_path, [("St. Mary", *ROWS[0][1:]), *ROWS])), named, "statistics", 0)
    assert {site: len(records.labels) for site, records in found.items()} == {"mary": 1}
    without = read_schema(SCHEMA.replace('site = "clinic"\n', ""))
    with pytest.raises(DataError, match="whose records are these"):
        table.sites_of(table.load(path), without, "statistics", 0)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("clinic;age;crp\nnorth;50;1\n", "no column outcome; it has clinic;age;crp; is it separated by commas?"),
        ("", "no column outcome; it has none"),
        ("age,age\n1,2\n", "column age is there twice"),
        ('age,crp\n1,"2\n', "cannot be read"),
        ("age,crp\n1\n", "line 2: another number of values than columns"),
    ],
)
def test_files_that_are_no_such_table(tmp_path: Path, text: str, told: str) -> None:
    (tmp_path / "records.csv").write_text(text)
    with pytest.raises(DataError, match=re.escape(told)):
        read(tmp_path / "records.csv")


def test_a_spreadsheet_s_byte_order_mark_is_not_part_of_the_first_column(tmp_path: Path) -> None:
    path = file(tmp_path, ROWS)
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert len(read(path).labels) == 3


def test_a_survey(tmp_path: Path) -> None:
    found = survey(table.load(file(tmp_path, ROWS)), SMALL)
    assert found.sites == {"north": {"well": 1, "ill": 1}, "south": {"well": 0, "ill": 1}}
    assert found.inputs == {"statistics": 9, "reference": 9, "marks": 16}
    assert 'inputs = 16 with scale = "marks"' in found.text()
    assert "2 rows do not count: left out by label or range, or of other sites" in found.text()
    assert survey(table.load(tmp_path / "records.csv"), SMALL, "north").sites == {"north": {"well": 1, "ill": 1}}
    found = survey(table.load(file(tmp_path, [ROWS[0], ("south", 50, 3, 80, "yes", "9", "lost")])), SMALL)
    told = ["'lost' is no label of the schema", "'9' is none of 1, 2, icu"]
    assert found.faults == [f"south: column {c}: line 3: {t}" for c, t in zip(("outcome", "ward"), told, strict=True)]


# -- what is bundled


def test_bundled_heart_and_support() -> None:
    heart = {site: torch.bincount(r.labels).tolist() for site, r in sets.bundled("heart", 0).items()}
    assert heart == {"cleveland": [164, 139], "hungary": [188, 106], "switzerland": [8, 115], "va": [51, 149]}
    switzerland = sets.bundled("heart", 0)["switzerland"]
    assert switzerland.features[:, 8].isnan().all()  # chol
    (support,) = sets.bundled("support", 0).values()
    assert torch.bincount(support.labels).tolist() == [6642, 2463]
    columns = bundled_schema("support").columns
    assert not columns.keys() & {"surv2m", "surv6m", "sps", "dnr", "sfdm2", "hday", "adlp", "adls", "event", "time"}


def test_the_label_of_support_is_death_within_30_days() -> None:
    frame = table.load(BUNDLED / "support.csv.gz", "csv").frame
    died = frame.filter((pl.col("event") == "1") & (pl.col("time").cast(pl.Float64) <= 30))
    assert set(died["died_within_30_days"]) == {"1"}
    assert (frame["died_within_30_days"] == "1").sum() == len(died) == 2463


@pytest.mark.parametrize("name", [name for name in SCHEMAS if name != "mnist"])
def test_bundled_files_are_those_of_sources(name: str) -> None:
    sources = (BUNDLED / "SOURCES.md").read_text()
    assert hashlib.sha256((BUNDLED / f"{name}.csv.gz").read_bytes()).hexdigest() in sources


@pytest.mark.parametrize("name", SCHEMAS)
def test_bundled_records_as_files_give_the_same(name: str, tmp_path: Path) -> None:
    whole = sets.bundled(name, 2, "marks")
    for path in sets.write_sites(name, tmp_path):
        own = table.records_of(table.load(path), bundled_schema(name), "marks", 2)
        assert own.features.nan_to_num(-9).equal(whole[path.name.removesuffix(".csv.gz")].features.nan_to_num(-9))


def test_every_fault_has_words() -> None:
    assert all(kind.isupper() and told for kind, told in FAULTS.items())
