"""The bundled records, a site's file and everything that can be wrong in it, division and statistics."""

from __future__ import annotations

import gzip
from collections import Counter
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import TensorDataset

from partway.data import thyroid
from partway.data.records import SHARES, Records, deviation_of, divide, mean_of, moments, squares
from partway.errors import DataError


@pytest.fixture(scope="module")
def sites(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    paths = thyroid.write_sites(tmp_path_factory.mktemp("sites"))
    return {path.name.removesuffix(".csv.gz"): path for path in paths}


def test_the_bundled_records_are_those_of_the_published_counts() -> None:
    records = thyroid.bundled(seed=3)
    sizes = {"other": 5378, "svi": 2387, "svhc": 956, "stmw": 254, "svhd": 71}
    assert {site: len(r.labels) for site, r in records.items()} == sizes
    labels = torch.cat([r.labels for r in records.values()])
    assert torch.bincount(labels).tolist() == [6765, 667, 241, 375, 447, 355, 196]
    assert not torch.bincount(records["stmw"].labels, minlength=7)[4]


def test_a_site_s_own_file_gives_the_same_records(sites: dict[str, Path]) -> None:
    bundled = thyroid.bundled(seed=3)
    for site, path in sites.items():
        own = thyroid.read(path, seed=3)
        assert own.features.nan_to_num(-9).equal(bundled[site].features.nan_to_num(-9))
        assert own.labels.equal(bundled[site].labels)
        assert all(own.division[part].equal(bundled[site].division[part]) for part in SHARES)


def test_one_record_by_hand(tmp_path: Path) -> None:
    header = "TSH,sex,age,target,TSH_measured," + ",".join(f for f in thyroid.FLAGS if f != "TSH_measured")
    header += ",T3,TT4,T4U,FTI,TBG,patient_id\n"
    rest = ",".join("t" if f in ("sick", "psych") else "f" for f in thyroid.FLAGS if f != "TSH_measured")
    path = tmp_path / "one.csv"
    path.write_text(header + f"0.99,M,41,GK,t,{rest},,,,,,123456\n" * 4)
    record = thyroid.read(path, 0)
    assert record.labels.tolist() == [1] * 4
    named = dict(zip(thyroid.FEATURES, record.features[0].tolist(), strict=True))
    assert (named["age"], named["TSH"], named["female"], named["male"]) == (41, 0, 0, 1)
    assert [name for name in thyroid.FLAGS if named[name]] == ["sick", "psych", "TSH_measured"]
    assert named["T3"] != named["T3"]
    assert 123456 not in record.features


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (("TSH,", "TSHX,"), "no column TSH; it has age"),
        (("target", "diagnosis"), "no column target"),
        ((",F,", ",W,"), "line 2: sex is F, M or empty, not 'W'"),
        (("29,F,f", "29,F,yes"), "line 2: on_thyroxine is t or f, not 'yes'"),
        (("29,F", "young,F"), "line 2: age is a number of at least 0, not 'young'"),
        (("29,F", "-1,F"), "line 2: age is a number"),
        (("29,F", "inf,F"), "line 2: age is a number"),
        ((",other,-,", ",other,Z,"), "line 2: target 'Z' is no diagnosis"),
        ((",other,-,", ",other,,"), "line 2: target '' is no diagnosis"),
        (("29,F,", "29,F,f,"), "line 2: another number of values than columns"),
        (("29,F,f,", "29,F,"), "line 2: another number of values than columns"),
    ],
)
def test_a_wrong_line_is_named(sites: dict[str, Path], tmp_path: Path, change: tuple[str, str], words: str) -> None:
    text = gzip.decompress(sites["other"].read_bytes()).decode()
    assert change[0] in text
    path = tmp_path / "records.csv"
    path.write_text(text.replace(*change, 1))
    with pytest.raises(DataError) as caught:
        thyroid.read(path, 0)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_files_that_cannot_be_read(sites: dict[str, Path], tmp_path: Path) -> None:
    good = sites["svhd"].read_bytes()
    middle = len(good) // 2
    for name, data in {
        "short.csv.gz": good[:middle],
        "flipped.csv.gz": good[:middle] + bytes([good[middle] ^ 255]) + good[middle + 1 :],
        "plain.csv.gz": b"age,sex",
        "binary.csv": bytes(range(128, 256)),
    }.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(DataError, match=name):
            thyroid.read(tmp_path / name, 0)
    with pytest.raises(DataError, match="No such file"):
        thyroid.read(tmp_path / "none.csv", 0)


def test_an_empty_site(sites: dict[str, Path], tmp_path: Path) -> None:
    text = gzip.decompress(sites["svhd"].read_bytes()).decode()
    (tmp_path / "empty.csv").write_text(text.splitlines()[0] + "\n")
    with pytest.raises(DataError, match="no records that count"):
        thyroid.read(tmp_path / "empty.csv", 0)
    (tmp_path / "nothing.csv").write_text("")
    with pytest.raises(DataError, match="no column age"):
        thyroid.read(tmp_path / "nothing.csv", 0)


def training(records: Records) -> torch.Tensor:
    return records.features[records.division["train"]][:, records.numeric]


def test_statistics_of_sites_add_up_to_those_of_all() -> None:
    records = list(thyroid.bundled(seed=1).values())
    measured, mean = mean_of(sum(moments(training(r)) for r in records))
    deviation = deviation_of(measured, sum(squares(training(r), mean) for r in records))
    scaled = torch.cat([r.scaled(mean, deviation)[r.division["train"]] for r in records])[:, :7]
    raw = torch.cat([training(r) for r in records])
    for column in range(7):
        known = scaled[raw[:, column].isfinite(), column]
        assert abs(known.mean()) < 1e-12
        assert abs(known.std(correction=0) - 1) < 1e-12
    assert not scaled[raw.isnan()].any()


def test_flags_are_left_as_they_are() -> None:
    records = thyroid.bundled(seed=1)["stmw"]
    scaled = records.scaled(torch.ones(7), torch.full((7,), 2.0))
    assert scaled[:, 7:].equal(records.features[:, 7:])


def test_a_column_of_equal_values_stays_finite() -> None:
    division = {part: torch.tensor([0, 1]) for part in SHARES}
    records = Records(torch.full((2, 1), 3.0), torch.tensor([0, 1]), classes=2, numeric=(0,), division=division)
    measured, mean = mean_of(moments(training(records)))
    deviation = deviation_of(measured, squares(training(records), mean))
    assert records.scaled(mean, deviation).tolist() == [[0], [0]]


@given(st.lists(st.integers(0, 4), max_size=300), st.integers(0, 2**53))
def test_division_is_stratified_and_loses_nothing(labels: list[int], seed: int) -> None:
    y = torch.tensor(labels, dtype=torch.int64)
    division = divide(y, seed)
    assert sorted(torch.cat(list(division.values())).tolist()) == list(range(len(labels)))
    for part, share in SHARES.items():
        assert abs(len(division[part]) - share * len(labels)) <= 1
        chosen = Counter(y[division[part]].tolist())
        assert all(abs(chosen[label] - share * count) <= 2 for label, count in Counter(labels).items())


def test_division_depends_on_the_seed_alone() -> None:
    y = torch.arange(100) % 3
    assert all(divide(y, 1)[part].equal(divide(y, 1)[part]) for part in SHARES)
    assert not divide(y, 1)["train"].equal(divide(y, 2)["train"])


def test_any_dataset() -> None:
    x, y = torch.randn(40, 1, 4, 4), torch.arange(40) % 3
    records = Records.from_dataset(TensorDataset(x, y), classes=3, seed=0)
    assert records.schema.shape == (1, 4, 4)
    assert records.features.float().equal(x)
    assert records.sizes == {"train": 22, "validation": 4, "test": 14}


@pytest.mark.parametrize(
    ("x", "y", "words"),
    [
        (torch.zeros(0, 2), torch.zeros(0), "empty"),
        (torch.zeros(2, 2), torch.tensor([0, 3]), "labels go from 0 to 3"),
        (torch.zeros(2, 2), torch.tensor([-1, 0]), "labels go from -1"),
        (torch.tensor([[1.0], [torch.nan]]), torch.tensor([0, 1]), "NaN"),
    ],
)
def test_datasets_that_cannot_be_used(x: torch.Tensor, y: torch.Tensor, words: str) -> None:
    with pytest.raises(DataError, match=words):
        Records.from_dataset(TensorDataset(x, y), classes=3, seed=0)
