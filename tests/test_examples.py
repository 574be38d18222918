"""Every job file in `examples/`: in one process, and between real processes over mutual TLS, with few epochs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from partway.assembly import forecast_of, schemas_of
from partway.blueprint import configured
from partway.config import Job, read_job_file
from partway.data import sets
from partway.data.sets import records_for, write_sites
from partway.local import SERVER, LocalFederation, sections_of
from partway.simulation import simulate

EXAMPLES = sorted(Path("examples").glob("*.toml"))
examples = pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)


def short(path: Path) -> Job:
    """An example's job, of one epoch or round."""
    job = read_job_file(path)
    training: dict[str, Any] = {"epochs": 1, "patience": 0}
    half = msgspec.structs.replace(job.training.half_trained, rounds=1, local_epochs=1)
    return msgspec.structs.replace(job, training=msgspec.structs.replace(job.training, half_trained=half, **training))


@examples
def test_runs_in_one_process_and_costs_what_was_forecast(path: Path) -> None:
    job = short(path)
    records = records_for(job, None)(job.job.seed)
    result = simulate(job, records)
    assert result.all["records"] > 0
    sizes = {party: own.sizes for party, own in sorted(records.items())}
    expected = forecast_of(job, schemas_of(job), sizes)
    for party, cost in result.cost.items():
        assert (cost.flops, cost.bytes_up, cost.bytes_down) == (
            expected[party].flops,
            expected[party].bytes_up,
            expected[party].bytes_down,
        )


@pytest.fixture(scope="module")
def federation(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalFederation]:
    """All parties of all examples; each job has some of them."""
    folder = tmp_path_factory.mktemp("records")
    bundled = {name: write_sites(name, folder / name) for name in sets.SCHEMAS}
    whole = {name: paths[0] for name, paths in bundled.items()}
    records: dict[str, Path | None] = {}
    for path in EXAMPLES:
        job = read_job_file(path)
        if job.laned:
            files = {file.name.removesuffix(".csv.gz"): file for file in bundled[job.records.schema]}
            records |= {site: files[site] for site in some(files)}
        else:
            for party in configured(job).parties:
                if party != SERVER:
                    records[party] = whole[job.records.schema] if party in job.holds else records.get(party)
    policy = {"widest_cut": 100_000, "least_records_in_hand_over": 0}
    more = {"least_records_in_sum": 0, "solvable_sums": True, "most_releases": 100, "most_epochs": 1000}
    with LocalFederation(tmp_path_factory.mktemp("federation"), records, policy | more, silence=10) as running:
        running.start()
        yield running


def some(sites: Iterable[str]) -> list[str]:
    """Of ten sites five: each is a process."""
    return sorted(sites)[:5]


@examples
def test_runs_between_processes(path: Path, federation: LocalFederation) -> None:
    job = short(path)
    if job.laned:
        names = some(records_for(job, None)(0))
    else:
        names = dict.fromkeys(party for party in configured(job).parties if party != SERVER)
    roster = {party: federation.fingerprints[party] for party in names}
    ran = federation.run({"roster": roster, **sections_of(job)})
    scored = [result["all"]["records"] for party in ran.folders if (result := ran.result(party))["all"]]
    assert scored
    assert min(scored) > 0
