"""Prediction with the server, as real processes over mutual TLS: new patients, and a trunk that stays where it is."""

from __future__ import annotations

import csv
import gzip
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from partway.config import read_site
from partway.data import table, thyroid
from partway.data.schema import columns_of
from partway.errors import DataError, PartwayError, Refused
from partway.finished import load, predict
from partway.ledger import verify
from partway.local import SERVER, LocalFederation, Ran
from partway.site.preview import preview

SITES = ("svi", "svhc", "stmw")
ASKS = "svi"
LABEL = "target"


@pytest.fixture(scope="module")
def new(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Patients of one site without a diagnosis, in a file of their own."""
    folder = tmp_path_factory.mktemp("new")
    (path,) = (p for p in thyroid.write_sites(folder) if p.name.startswith(f"{ASKS}."))
    with gzip.open(path, "rt", newline="") as file:
        rows = list(csv.DictReader(file))[:37]
    columns = [name for name in rows[0] if name != LABEL]
    with (folder / "new.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, columns, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
    return folder / "new.csv"


@pytest.fixture(scope="module")
def federation(new: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalFederation]:
    paths = thyroid.write_sites(tmp_path_factory.mktemp("records"))
    records = {path.name.removesuffix(".csv.gz"): path for path in paths}
    folder = tmp_path_factory.mktemp("federation")
    mine = {site: records[site] for site in SITES}
    with LocalFederation(folder, mine, silence=5, predict={ASKS: new}) as running:
        running.start()
        yield running


def job(cut: list[str], number: str = "") -> dict[str, dict[str, Any]]:
    network = {
        "build": "partway.model.zoo:mlp",
        "arguments": {"inputs": 29, "hidden": [64, 16, 128, 64], "classes": 7},
        "cut": cut,
    }
    words = {"job": {"name": "thyroid"}, "network": network, "training": {"epochs": 2}, "evaluation": {"every": 0}}
    return words | ({"predict": {"of": number}} if number else {})


def joined(trained: Ran, folder: Path) -> Path:
    """What the asking site and the server hold, as if one of them held it all."""
    parts = [trained.folders[party] / "segments.safetensors" for party in (ASKS, SERVER)]
    with safe_open(parts[0], framework="pt") as opened:
        metadata = opened.metadata()
    weights = {name: tensor for part in parts for name, tensor in load_file(part).items()}
    save_file(weights, folder / "network.safetensors", metadata)
    return folder


@pytest.mark.parametrize("cut", [["hidden.2"], ["hidden.2", "hidden.6"]], ids=["vanilla", "u_shaped"])
def test_a_site_predicts_with_a_trunk_that_it_never_gets(
    federation: LocalFederation, new: Path, tmp_path: Path, cut: list[str]
) -> None:
    trained = federation.run(job(cut))
    told = federation.run(job(cut, trained.status.id))
    assert told.status.state == "done"
    expected = predict(load(joined(trained, tmp_path)), table.load(new))
    text = (told.folders[ASKS] / "predictions.csv").read_text()
    rows, due = ([*csv.DictReader(found.splitlines())] for found in (text, expected))
    assert len(rows) == len(due) == 37
    for row, other in zip(rows, due, strict=True):
        assert (row["line"], row["predicted"]) == (other["line"], other["predicted"])
        numbers = torch.tensor([[float(r[name]) for name in list(row)[2:]] for r in (row, other)])
        assert (numbers[0] - numbers[1]).abs().max() < 2e-6
    assert len({row["none"] for row in rows}) > 30  # every patient has an answer of its own
    # before it is asked, the site sees what would leave for the first of them
    signed = tmp_path / "job.signed"
    signed.write_bytes(federation.sign(job(cut, trained.status.id)))
    home = federation.folder / ASKS
    shown = preview(read_site(home / "site.toml"), home, signed)
    finished, patients = load(tmp_path), table.load(new)
    features = table.unlabelled(patients, columns_of(finished.job), "statistics", "").features
    scaled = ((features - finished.mean) / finished.deviation).nan_to_num()[:1].float()
    first = finished.network.hidden[:3](scaled)[0].tolist()
    assert shown.leaves[0].what == "activations (bottom -> trunk)"
    assert shown.leaves[0].values == pytest.approx(first, abs=1e-5)
    # nobody else is told, nobody has a network more, and what left stands in the ledger
    assert [p for p in told.folders if (told.folders[p] / "predictions.csv").exists()] == [ASKS]
    assert not [p for p in told.folders if list(told.folders[p].glob("*.safetensors"))]
    audit = verify(told.folders[ASKS] / "ledger.jsonl", lambda signature, data: True)
    assert {edge for edge, _ in audit.left} >= {"ACTIVATIONS bottom -> trunk"}
    quiet = verify(told.folders["stmw"] / "ledger.jsonl", lambda signature, data: True)
    assert not [edge for edge, _ in quiet.left if "ACTIVATIONS" in edge]


def test_what_does_not_fit_ends_the_job_before_anything_leaves(federation: LocalFederation, new: Path) -> None:
    trained = federation.run(job(["hidden.2"]))
    with pytest.raises(Refused, match="no such job has run here"):
        federation.run(job(["hidden.2"], "0123456789ab"))
    with pytest.raises(Refused, match="its network, records or parties were not those of this job"):
        federation.run(job(["hidden.4"], trained.status.id))
    (file,) = trained.folders[ASKS].glob("*.safetensors")
    kept = file.read_bytes()
    file.unlink()
    with pytest.raises(Refused, match=f"{ASKS} refuses the job: EARLIER"):
        federation.run(job(["hidden.2"], trained.status.id))
    file.write_bytes(kept)
    whole = new.read_text()
    try:
        new.write_text(whole.replace("age", "years", 1))
        with pytest.raises((DataError, PartwayError), match=f"{ASKS}: column age: is missing"):
            federation.run(job(["hidden.2"], trained.status.id))
    finally:
        new.write_text(whole)
    assert federation.run(job(["hidden.2"], trained.status.id)).status.state == "done"
    assert json.loads((trained.folders[ASKS] / "result.json").read_text())["holds"][ASKS] == ["bottom"]
