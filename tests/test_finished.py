"""A network that a job has left: loaded, used on new records, written for others; and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import onnx
import pytest
import torch
from onnx.reference import ReferenceEvaluator
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from partway.cli import app
from partway.config import read_job
from partway.data import sets, table
from partway.errors import DataError, JobFailed, Refused, UsageError
from partway.finished import Finished, export, load, predict
from partway.local import toml
from partway.report import Result
from partway.simulation import simulate

WORDS = {
    "job": {"name": "heart"},
    "network": {
        "build": "partway.model.zoo:mlp",
        "arguments": {"inputs": 29, "hidden": [16, 8, 16], "classes": 2},
        "cut": ["hidden.2"],
    },
    "records": {"schema": "heart"},
    "training": {"epochs": 3},
    "evaluation": {"every": 1, "site_scores": True},
    "result": {"trunk": "everyone"},
}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    simulate(read_job(toml(WORDS)), sets.bundled("heart", 0), folder=folder)
    return folder


@pytest.fixture(scope="module")
def finished(run: Path) -> Finished:
    return load(run)


def va(tmp_path: Path, change: str = "") -> Path:
    """One hospital's file without its labels."""
    path = next(p for p in sets.write_sites("heart", tmp_path) if p.name.startswith("va"))
    lines = table.load(path).frame.drop("num").write_csv().splitlines()
    plain = path.with_name("va.csv")
    plain.write_text("\n".join([lines[0], change or lines[1], *lines[2:]]) + "\n")
    return plain


def test_the_result_is_there_only_where_the_weights_are(tmp_path: Path) -> None:
    result = Result({}, "va", weights={"bias": torch.ones(2)})
    in_the_way = tmp_path / "segments.safetensors.part"
    in_the_way.mkdir()
    with pytest.raises(JobFailed, match=r"segments.safetensors cannot be written"):
        result.write(tmp_path)
    assert list(tmp_path.iterdir()) == [in_the_way]
    in_the_way.rmdir()
    assert {path.name for path in result.write(tmp_path)} == {"result.json", "segments.safetensors"}


def test_predictions_are_those_that_the_job_was_scored_by(run: Path, tmp_path: Path) -> None:
    """The test records' accuracy, told again from predictions for a file without labels."""
    rows = [line.split(",") for line in predict(load(run), table.load(va(tmp_path))).splitlines()]
    assert rows[0] == ["line", "predicted", "healthy", "heart disease"]
    assert [int(row[0]) for row in rows[1:]] == list(range(2, 202))
    records = sets.bundled("heart", 0)["va"]
    index = records.division["test"]
    told = torch.tensor([["healthy", "heart disease"].index(row[1]) for row in rows[1:]])
    scored = json.loads((run / "result.json").read_text())["sites"]["va"]["accuracy"]
    assert float((told[index] == records.labels[index]).double().mean()) == pytest.approx(scored)
    for row in rows[1:]:
        assert sum(map(float, row[2:])) == pytest.approx(1, abs=1e-5)


def test_scaling_is_part_of_the_network(run: Path, finished: Finished) -> None:
    records = sets.bundled("heart", 0)["va"]
    scaling = json.loads((run / "result.json").read_text())["scaling"]
    scaled = records.scaled(torch.tensor(scaling["mean"]), torch.tensor(scaling["deviation"])).float()
    with torch.no_grad():
        assert (finished(records.features.float()) - finished.network(scaled).softmax(1)).abs().max() < 1e-5
        assert (
            (finished(records.features.float()) - finished.network(records.features.float()).softmax(1)).isnan().any()
        )


def test_onnx_gives_the_same_for_any_number_of_records(finished: Finished, tmp_path: Path) -> None:
    export(finished, tmp_path / "network.onnx")
    model = onnx.load(tmp_path / "network.onnx")
    told = {entry.key: json.loads(entry.value) for entry in model.metadata_props}
    assert told["classes"] == ["healthy", "heart disease"]
    assert len(told["features"]) == 29
    features = sets.bundled("heart", 0)["hungary"].features.float()
    assert features.isnan().any()
    for count in (1, 7):
        (found,) = ReferenceEvaluator(model).run(None, {"features": features[:count].numpy()})
        with torch.no_grad():
            expected = finished(features[:count])
        assert (torch.from_numpy(found) - expected).abs().max() < 1e-5
        assert (torch.from_numpy(found) - expected.flip(1)).abs().max() > 1e-2


def test_who_has_half_of_a_network_is_told_so(run: Path, tmp_path: Path) -> None:
    held = load_file(run / "network.safetensors")
    save_file({n: t for n, t in held.items() if n.startswith("hidden")}, tmp_path / "segments.safetensors")
    with pytest.raises(UsageError, match=r"half of one, .* they predict together, by a job with \[predict\]"):
        load(tmp_path)
    with pytest.raises(UsageError, match=r"has no network\.safetensors$"):
        load(tmp_path / "nowhere")


def test_a_damaged_or_foreign_file(run: Path, tmp_path: Path) -> None:
    data = (run / "network.safetensors").read_bytes()
    (tmp_path / "network.safetensors").write_bytes(data[:100])
    with pytest.raises(UsageError, match="no network that a job has left"):
        load(tmp_path)
    save_file({"x": torch.ones(2)}, tmp_path / "network.safetensors")
    with pytest.raises(UsageError, match="no network that a job has left"):
        load(tmp_path)
    job = (run / "result.json").read_text()
    words = {"job": json.dumps(json.loads(job)["job"]), "scaling": "{}"}
    save_file(load_file(run / "network.safetensors"), tmp_path / "network.safetensors", words)
    with pytest.raises(UsageError, match="it scales 0 columns; the schema has 6 that need it"):
        load(tmp_path)
    save_file({"x": torch.ones(2)}, tmp_path / "network.safetensors", words)
    with pytest.raises(UsageError, match="its weights are not those of its network"):
        load(tmp_path)


def test_no_network_is_imported_that_was_not_named(run: Path, tmp_path: Path) -> None:
    words = json.loads((run / "result.json").read_text())["job"]
    words["network"]["build"] = "os:system"
    weights = load_file(run / "network.safetensors")
    save_file(weights, tmp_path / "network.safetensors", {"job": json.dumps(words), "scaling": "{}"})
    with pytest.raises(Refused, match="`os:system` is not among those allowed"):
        load(tmp_path)


def test_records_that_do_not_fit(finished: Finished, tmp_path: Path) -> None:
    file = va(tmp_path, change="va,sixty" + ",1" * 12)
    with pytest.raises(DataError, match="column age: line 2: 'sixty' is no number"):
        predict(finished, table.load(file))


def test_on_the_command_line(run: Path, tmp_path: Path) -> None:
    file, cli = va(tmp_path), CliRunner()
    done = cli.invoke(app, ["predict", str(run), str(file), "--to", str(tmp_path / "out.csv")])
    assert (done.exit_code, done.output) == (0, f"200 records: {tmp_path / 'out.csv'}\n")
    assert (tmp_path / "out.csv").read_text() == predict(load(run), table.load(file))
    done = cli.invoke(app, ["export", str(run), "--to", str(tmp_path / "network.safetensors")])
    assert done.exit_code == 0
    assert predict(load(tmp_path), table.load(file)) == predict(load(run), table.load(file))
    with pytest.raises(UsageError, match=r"network\.pt: a network is written as \.onnx or \.safetensors"):
        cli.invoke(app, ["export", str(run), "--to", "network.pt"], catch_exceptions=False)


# -- other targets than classes

SCHEMA = """
[schema]
name = "small"
label = "y"
[classes]
no = ["0"]
yes = ["1"]
[columns]
a = { kind = "numeric" }
b = { kind = "numeric" }
[targets]
sick = { kind = "binary", column = "y" }
both = { kind = "multi_label", columns = ["y", "z"] }
stay = { kind = "regression", column = "n", unit = "days", log = 1, center = 2, spread = 0.5 }
life = { kind = "survival", time = "n", event = "z", unit = "days", intervals = [3, 6, 12] }
risk = { kind = "survival", time = "n", event = "z" }
sort = { kind = "classes", column = "z", classes = { low = ["0"], high = ["1"] } }
"""
TOLD = {
    "sick": ["sick"],
    "both": ["y", "z"],
    "stay": ["stay in days"],
    "life": ["after 3 days", "after 6 days", "after 12 days"],
    "risk": ["risk"],
    "sort": ["predicted", "low", "high"],
}


def small(tmp_path: Path, target: str) -> tuple[Finished, table.Table, torch.Tensor]:
    """A network that a job of this target has left, a file of records, and what the network alone puts out."""
    rows = [(n % 7, n * n % 11, n % 2, n * n % 3 % 2, n % 13 + 1) for n in range(120)]
    (tmp_path / "records.csv").write_text("a,b,y,z,n\n" + "".join(",".join(map(str, row)) + "\n" for row in rows))
    file, outputs = table.load(tmp_path / "records.csv"), {"both": 2, "life": 3, "sort": 2}.get(target, 1)
    network = {"arguments": {"inputs": 2, "hidden": [4, 4], "classes": outputs}, "cut": ["hidden.0"]}
    words = WORDS | {"network": WORDS["network"] | network, "records": {"schema": "small.toml", "target": target}}
    job = read_job(toml(words), schema=SCHEMA)
    assert job.columns
    simulate(job, {"here": table.records_of(file, job.columns, "statistics", 0, target=target)}, folder=tmp_path)
    found = load(tmp_path)
    x = torch.tensor([row[:2] for row in rows], dtype=torch.float32)
    with torch.no_grad():
        return found, file, found.network((x - found.mean) / found.deviation)


def as_it_reads(target: str, out: torch.Tensor) -> torch.Tensor:
    """What a network's numbers mean, written out."""
    if target == "sort":
        return out.exp() / out.exp().sum(1, keepdim=True)
    if target == "stay":
        return (out * 0.5 + 2).exp() - 1
    if target == "risk":
        return out.exp()
    sigmoid = 1 / (1 + (-out).exp())
    return sigmoid if target != "life" else torch.stack([(1 - sigmoid[:, : k + 1]).prod(1) for k in range(3)], 1)


@pytest.mark.parametrize("target", TOLD)
def test_what_a_network_says_of_records(target: str, tmp_path: Path) -> None:
    found, file, out = small(tmp_path, target)
    header, *rows = [line.split(",") for line in predict(found, file).splitlines()]
    assert header == ["line", *TOLD[target]]
    told = torch.tensor([[float(number) for number in row[-out.shape[1] :]] for row in rows])
    assert (told - as_it_reads(target, out)).abs().max() < 1e-4
    assert (told - out).abs().max() > 1e-2  # no network's numbers as they are
    if target == "sort":
        assert [row[1] for row in rows] == [["low", "high"][n] for n in out.argmax(1).tolist()]


@pytest.mark.parametrize("target", ["stay", "life"])
def test_onnx_says_the_same(target: str, tmp_path: Path) -> None:
    found, _, out = small(tmp_path, target)
    export(found, tmp_path / "network.onnx")
    model = onnx.load(tmp_path / "network.onnx")
    features = torch.tensor([[n % 7, n * n % 11] for n in range(120)], dtype=torch.float32)
    (told,) = ReferenceEvaluator(model).run(["predicted"], {"features": features.numpy()})
    assert (torch.from_numpy(told) - as_it_reads(target, out)).abs().max() < 1e-4
    names = {entry.key: json.loads(entry.value) for entry in model.metadata_props}["classes"]
    assert names == TOLD[target]
