"""Parties with different columns of the same patients, as real processes over mutual TLS, each with its own file."""

from __future__ import annotations

import csv
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from partway.assembly import network_of, schemas_of
from partway.blueprint import configured
from partway.config import Policy, bundled_schema, read_job, read_job_file
from partway.data import matched
from partway.data.records import Records, statistics_of
from partway.data.table import load
from partway.errors import JobFailed, PartwayError
from partway.ledger import verify
from partway.local import SERVER, LocalFederation, sections_of, toml
from partway.model.segment import initialise
from partway.plan.batches import equal_parts
from partway.privacy.blind_sum import BlindSum
from partway.privacy.seal import Keys
from partway.report import read_left
from partway.site import match
from partway.train.draws import derived, first_weights, order_of
from partway.train.source import RecordSource

EXAMPLE = read_job_file(Path("examples/vertical.toml"))
RECORDS = 1200
LACKING = 100
NEW = 60
"""Patients of whom nobody has trained; `vitals` lacks some, and nobody knows what becomes of them."""


def schema_with_id() -> str:
    path = Path("src/partway/data/bundled/support.toml")
    return path.read_text().replace('name = "support"\n', 'name = "support"\nid = "patient"\n')


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A file for each party: its own columns, its own order of rows, some patients of others; and the agreed ids."""
    paths = write(tmp_path_factory.mktemp("records"), 0, RECORDS + 50, LACKING, RECORDS, labelled=True)
    agree_on_ids(paths)
    return paths


@pytest.fixture(scope="module")
def new(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same of new patients, without what became of them."""
    paths = write(tmp_path_factory.mktemp("new"), RECORDS + 50, NEW, 5, NEW, labelled=False)
    agree_on_ids(paths)
    return paths


def write(folder: Path, begin: int, count: int, lacking: int, known: int, labelled: bool) -> dict[str, Path]:
    """Files of so many patients; `vitals` lacks the first of them, the registry knows the first of them."""
    rows = load(Path("src/partway/data/bundled/support.csv.gz")).frame.slice(begin, count).rows(named=True)
    label = bundled_schema("support").schema.label
    paths = {}
    for party, held in EXAMPLE.holds.items():
        columns = [*held.columns, *([label] if held.targets and labelled else [])]
        mine = [{"patient": f"p{n:05}", **{name: row[name] for name in columns}} for n, row in enumerate(rows, begin)]
        mine = {"vitals": mine[lacking:], "registry": mine[:known]}.get(party, mine)
        random.Random(party).shuffle(mine)
        (folder / party).mkdir()
        paths[party] = folder / party / "records.csv"
        with paths[party].open("w", newline="") as file:
            writer = csv.DictWriter(file, ["patient", *columns])
            writer.writeheader()
            writer.writerows(mine)
    return paths


def agree_on_ids(paths: dict[str, Path]) -> None:
    """As their people would: the registry asks, each other party answers, and takes its list."""
    home = {party: path.parent for party, path in paths.items()}
    asked, kept = home["registry"] / "asked", home["registry"] / "kept"
    match.ask(paths["registry"], "patient", kept, asked)
    answers = {party: home[party] / "answered" for party in paths if party != "registry"}
    for party, answered in answers.items():
        match.answer(paths[party], "patient", asked, home[party] / "kept", answered)
    match.agree(kept, answers, home["registry"], only_common=False)
    for party in answers:
        match.take(home[party] / "kept", home["registry"] / f"{party}.agreed", home[party] / "ids.txt")


@pytest.fixture(scope="module")
def federation(
    files: dict[str, Path], new: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[LocalFederation]:
    with LocalFederation(tmp_path_factory.mktemp("federation"), files, silence=5, predict=new) as running:
        running.start()
        yield running


def words(**training: Any) -> dict[str, dict[str, Any]]:
    sections = sections_of(EXAMPLE)
    sections["records"]["schema"] = "support.toml"
    sections["training"] = {"configuration": "vertical", "batch": 128, **training}
    return sections


def brought(running: LocalFederation, job: Any) -> dict[str, Records]:
    found = {}
    for party, held in job.holds.items():
        path = Path(running.folder / party / "site.toml").read_text().split('path = "')[1].split('"')[0]
        ids = matched.read_ids(Path(path).with_name("ids.txt"))
        found[party] = matched.records_of(load(Path(path)), job, held, ids)
    return found


def plain(running: LocalFederation, job: Any, digest: bytes, other: bool = False) -> dict[str, torch.Tensor]:
    """All columns side by side in one place, one loop."""
    plan, records = configured(job), brought(running, job)
    nets = network_of(job, Policy(networks=list(job.builds)), schemas_of(job)).modules
    for name, net in nets.items():
        secret = running.secret(plan.place(plan.copies(name)[0]))
        initialise(net, first_weights(secret, digest, name))
    group = BlindSum(Keys("history", digest))
    group._group = derived(running.secret("history"), "group", digest.hex())
    secret = b"other" if other else group.secret(b"order")
    features, here = {}, {}
    for party in ("history", "vitals", "laboratory"):
        source = RecordSource(records[party], b"", b"", torch.float64)
        source.standardise(*statistics_of([records[party]]))
        features[party] = source.features
        present = records[party].present
        here[party] = torch.ones(RECORDS, 1) if present is None else present[:, None]
    optimizers = [torch.optim.Adam(net.parameters(), job.training.optimizer.lr) for net in nets.values()]
    index = records["registry"].division["train"]
    for epoch in range(job.training.epochs):
        order = index[order_of(len(index), secret, digest, epoch)]
        for begin, end in equal_parts(len(index), job.training.batch):
            rows = order[begin:end]
            joined = [nets[f"bottom_{party}"](features[party][rows]) * here[party][rows] for party in features]
            loss = nn.functional.cross_entropy(nets["trunk"](torch.cat(joined, 1)), records["registry"].labels[rows])
            for optimizer in optimizers:
                optimizer.zero_grad()
            loss.backward()
            for optimizer in optimizers:
                optimizer.step()
    return {f"{name}.{key}": tensor for name, net in nets.items() for key, tensor in net.state_dict().items()}


def test_equals_one_loop_over_all_columns(federation: LocalFederation) -> None:
    sections = words(epochs=5, dtype="float64", keep="last")
    ran = federation.run(sections, schema=schema_with_id())
    roster = {site: federation.fingerprints[site] for site in federation.sites}
    job = read_job(toml({"roster": roster, **sections}), schema=schema_with_id())
    expected, other = plain(federation, job, ran.digest), plain(federation, job, ran.digest, other=True)
    names: set[str] = set()
    for folder in ran.folders.values():
        if (folder / "segments.safetensors").exists():
            held = load_file(folder / "segments.safetensors")
            names |= held.keys()
            assert max(float((held[n] - expected[n]).abs().max()) for n in held) < 1e-10
            assert max(float((held[n] - other[n]).abs().max()) for n in held) > 1e-3
    assert names == expected.keys()
    assert not (ran.folders["registry"] / "segments.safetensors").exists()
    assert ran.result(SERVER)["all"]["records"] == round(RECORDS * 0.35)


def test_what_left_each_party_stands_in_its_ledger(federation: LocalFederation) -> None:
    ran = federation.run(words(epochs=2), schema=schema_with_id())
    for party in federation.sites:
        audit = verify(ran.folders[party] / "ledger.jsonl", lambda signature, data: True)
        edges = {edge for (edge, _) in audit.left}
        kind = "LABELS data_registry -> trunk" if party == "registry" else f"ACTIVATIONS bottom_{party} -> trunk"
        assert any(kind == edge for edge in edges)
        assert not any("LABELS" in edge for edge in edges) or party == "registry"
        assert audit.outcome == "done"


def test_another_list_of_ids_is_told_before_the_first_step(federation: LocalFederation, files: dict[str, Path]) -> None:
    ids = files["vitals"].with_name("ids.txt")
    agreed = ids.read_text()
    try:
        ids.write_text("\n".join(reversed(agreed.splitlines())))
        with pytest.raises(JobFailed, match="have other lists of records: match them anew"):
            federation.run(words(epochs=1), schema=schema_with_id())
        federation.wait_for_state("vitals", "failed")
        assert "another list of records" in federation.processes["vitals"].said["message"]
        ids.write_text("\n".join(agreed.splitlines()[:-10]))
        with pytest.raises(PartwayError, match="hold other patients"):
            federation.run(words(epochs=1), schema=schema_with_id())
    finally:
        ids.write_text(agreed)
    federation.run(words(epochs=1), schema=schema_with_id())


def test_they_predict_together_of_new_patients(federation: LocalFederation, new: dict[str, Path]) -> None:
    trained = federation.run(words(epochs=2), schema=schema_with_id())
    asks = {**words(epochs=2), "predict": {"of": trained.status.id}}
    told = federation.run(asks, schema=schema_with_id())
    assert [p for p in told.folders if (told.folders[p] / "predictions.csv").exists()] == ["registry"]
    with (told.folders["registry"] / "predictions.csv").open(newline="") as file:
        rows = {row["patient"]: float(row["died"]) for row in csv.DictReader(file)}
    assert sorted(rows) == [f"p{n:05}" for n in range(RECORDS + 50, RECORDS + 50 + NEW)]

    job = read_job(toml(asks), schema=schema_with_id())
    nets = network_of(job, Policy(networks=list(job.builds)), schemas_of(job)).modules
    left = {
        party: read_left(folder / "segments.safetensors")
        for party, folder in trained.folders.items()
        if party != "registry"
    }
    for name, net in nets.items():
        weights = {k: v for each in left.values() for k, v in each.weights.items()}
        net.load_state_dict({key: weights[f"{name}.{key}"] for key in net.state_dict()})
    parts = []
    for party in ("history", "vitals", "laboratory"):
        ids = matched.read_ids(new[party].with_name("ids.txt"))
        records = matched.records_of(load(new[party]), job, job.holds[party], ids)
        scaling = left[party].scaling
        here = torch.tensor([[1.0 if name else 0.0] for name in ids.values()])
        assert int(here.sum()) == NEW - (5 if party == "vitals" else 0)
        parts.append(nets[f"bottom_{party}"](records.scaled(scaling["mean"], scaling["deviation"]).float()) * here)
    names = matched.read_ids(new["registry"].with_name("ids.txt")).values()
    expected = dict(zip(names, nets["trunk"](torch.cat(parts, 1)).softmax(1)[:, 1].tolist(), strict=True))
    assert max(abs(rows[name] - expected[name]) for name in names) < 2e-6
    assert max(abs(rows[name] - other) for name, other in zip(names, reversed(expected.values()), strict=True)) > 0.05
