"""The bundled thyroid records, a site's file and everything that can be wrong in it, division and statistics."""

from __future__ import annotations

import gzip
import hashlib
from collections import Counter
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import TensorDataset

from partway.config import Flag, bundled_schema
from partway.data import thyroid
from partway.data.records import SHARES, Records, deviation_of, divide, mean_of, moments, squares
from partway.data.table import load, records_of
from partway.errors import DataError

THYROID = bundled_schema("thyroid")
GOLDEN = {
    (0, "other"): "89d315bc5ccfa1a2ade7207f2e18daf9ff7adbebd7ca0941640aefbaa2b9f2bc",
    (0, "svi"): "2f1731fe855508010aa4cbed90a46be5689f2dcee600d3dcb43776509251b3a5",
    (0, "svhc"): "8f07112a978050e45626b00897e49e30b9d5267bd048e448cf0082a4caf78af3",
    (0, "stmw"): "66235aa5a673b5ee1cb355f996f763524d005a06801d7fe198b52c88b6cfb7c1",
    (0, "svhd"): "09c41e2363dbc2315bcd428a19434493dba0987d5d03998c8a90ac9d85c89163",
    (3, "other"): "34b666704ee617819a41f7b0fc3b5a93910033cbd21b297da5302efc65a67992",
    (3, "svi"): "c6dd52c623f44b09431d7632905baed4e5424ef5db69af5037558415f640cc40",
    (3, "svhc"): "626307d06b3d59f56418bebf65df0b43d0b57d476ecfda043e17cf13173a152f",
    (3, "stmw"): "8491803bd67dfd9ba761867e5517676c50595d544ba4eb102d6a20afacfff4d0",
    (3, "svhd"): "4c2e6a8732c0505b4339c2755f866bc72ab072472a8f3a6e2083aa0f0018ac5a",
}
"""By seed and site: features, labels, standardised columns and division, as they were before there were schemas."""


def fingerprint(records: Records) -> str:
    digest = hashlib.sha256(records.features.nan_to_num(-9.0).numpy().tobytes())
    for tensor in (records.labels, records.numeric, *(records.division[part] for part in SHARES)):
        digest.update(tensor.numpy().tobytes())
    return digest.hexdigest()


def read(path: Path, seed: int) -> Records:
    return records_of(load(path), THYROID, "statistics", seed)


@pytest.mark.parametrize("seed", [0, 3])
def test_the_schema_file_reads_the_thyroid_records_bit_for_bit(seed: int) -> None:
    found = {(seed, site): fingerprint(records) for site, records in thyroid.bundled(seed).items()}
    assert found == {key: digest for key, digest in GOLDEN.items() if key[0] == seed}
    assert fingerprint(thyroid.bundled(1)["svhd"]) not in GOLDEN.values()


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
        own = read(path, seed=3)
        assert own.features.nan_to_num(-9).equal(bundled[site].features.nan_to_num(-9))
        assert own.labels.equal(bundled[site].labels)
        assert all(own.division[part].equal(bundled[site].division[part]) for part in SHARES)


FLAGS = [name for name, column in THYROID.columns.items() if isinstance(column, Flag)]


def test_one_record_by_hand(tmp_path: Path) -> None:
    header = "TSH,sex,age,target,TSH_measured," + ",".join(f for f in FLAGS if f != "TSH_measured")
    header += ",T3,TT4,T4U,FTI,TBG,patient_id\n"
    rest = ",".join("t" if f in ("sick", "psych") else "f" for f in FLAGS if f != "TSH_measured")
    path = tmp_path / "one.csv"
    path.write_text(header + f"0.99,M,41,GK,t,{rest},,,,,,123456\n" * 4)
    record = read(path, 0)
    assert record.labels.tolist() == [1] * 4
    laboratory = ["TSH", "T3", "TT4", "T4U", "FTI", "TBG"]
    named = dict(zip(["age", *laboratory, "female", "male", *FLAGS], record.features[0].tolist(), strict=True))
    assert (named["age"], named["TSH"], named["female"], named["male"]) == (41, 0, 0, 1)
    assert [name for name in FLAGS if named[name]] == ["sick", "psych", "TSH_measured"]
    assert named["T3"] != named["T3"]
    assert 123456 not in record.features


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (("TSH,", "TSHX,"), "no column TSH; did you mean `TSHX`?"),
        (("target", "diagnosis"), "no column target; it has age, sex, on_thyroxine"),
        ((",F,", ",W,"), "column sex: line 2: 'W' is none of F, M or empty"),
        (("29,F,f", "29,F,yes"), "column on_thyroxine: line 2: 'yes' is none of f, t"),
        (("29,F", "young,F"), "column age: line 2: 'young' is no number"),
        (("29,F", "inf,F"), "column age: line 2: 'inf' is no number"),
        (("29,F", "nan,F"), "column age: line 2: 'nan' is no number"),
        ((",other,-,", ",other,Z,"), "column target: line 2: 'Z' is no label of the schema"),
        (
            (",other,-,", ",other,,"),
            "column target: line 2: an empty field is no label of the schema",
        ),
        (("29,F,", "29,F,f,"), "line 2: another number of values than columns"),
        (("29,F,f,", "29,F,"), "line 2: another number of values than columns"),
        (("age,sex", "age,age"), "column age is there twice"),
    ],
)
def test_a_wrong_line_is_named(sites: dict[str, Path], tmp_path: Path, change: tuple[str, str], words: str) -> None:
    text = gzip.decompress(sites["other"].read_bytes()).decode()
    assert change[0] in text
    path = tmp_path / "records.csv"
    path.write_text(text.replace(*change, 1))
    with pytest.raises(DataError) as caught:
        read(path, 0)
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
            read(tmp_path / name, 0)
    with pytest.raises(DataError, match="No such file"):
        read(tmp_path / "none.csv", 0)


def test_an_empty_site(sites: dict[str, Path], tmp_path: Path) -> None:
    text = gzip.decompress(sites["svhd"].read_bytes()).decode()
    (tmp_path / "empty.csv").write_text(text.splitlines()[0] + "\n")
    with pytest.raises(DataError, match="no records that count"):
        read(tmp_path / "empty.csv", 0)
    (tmp_path / "nothing.csv").write_text("")
    with pytest.raises(DataError, match="no column target"):
        read(tmp_path / "nothing.csv", 0)


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
