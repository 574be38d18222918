"""`[predict]`: what parties tell of new records together, against the pieces that they hold, put together."""

from __future__ import annotations

import csv
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from torch import Tensor, nn

from equivalence import test_one_copy_each as joined
from federations import SIZES, job_of, small
from partway.blueprint import configured
from partway.config import Job, Predict, read_job_file
from partway.data import matched, table
from partway.data.records import Records
from partway.data.sets import records_for
from partway.errors import ConfigError, Refused
from partway.model.segment import Segment
from partway.outcome import result_of
from partway.plan.plan import Copy
from partway.policy import judge_turns
from partway.protocol.messages import LetterKind
from partway.protocol.net import compile
from partway.simulation import Federation, federation, permissive
from partway.train.tallies import Told
from partway.transport.memory import Wire

NEW = {"a": 7, "b": 1, "d": 5000}
"""Records that a site wants told; the others have none. More than one letter takes, too."""


def of(site: str, count: int) -> Records:
    """Records that no job has trained on, without labels."""
    generator = torch.Generator().manual_seed(ord(site))
    x = torch.randn(count, 6, generator=generator, dtype=torch.float64)
    nothing = torch.zeros(0, dtype=torch.int64)
    division = {"train": nothing, "validation": nothing, "test": torch.arange(count)}
    return Records(x, torch.zeros(count), classes=3, numeric=(), division=division)


def leave(whole: Federation, folder: Path) -> str:
    """What a run leaves at each party, as its processes would; returns the job's number."""
    number = whole.digest.hex()[:12]
    for party, assembled in whole.parties.items():
        result_of(assembled, 0).write(folder / party / f"{whole.job.job.name}-{number}")
    return number


def asked(job: Job, number: str) -> Job:
    return msgspec.structs.replace(job, predict=Predict(of=number), roster={})


def told(whole: Federation) -> dict[tuple[str, str], Tensor]:
    return {
        (party, name): tally.outputs
        for party, assembled in whole.parties.items()
        for name, tally in assembled.party.worker.tallies.items()
        if isinstance(tally, Told)
    }


def pieces(whole: Federation) -> Callable[[str, str], nn.Module]:
    """The module of a segment, as its party has it: of a site's lane, or the only one."""
    held = {copy: s for a in whole.parties.values() for copy, s in a.party.worker.segments.items()}

    def piece(name: str, lane: str = "") -> nn.Module:
        segment: Segment = held[Copy(name, lane)] if Copy(name, lane) in held else held[Copy(name)]
        return segment.module.eval()

    return piece


@pytest.mark.parametrize(
    "training",
    [
        {"configuration": "vanilla"},
        {"configuration": "u_shaped"},
        {"schedule": "averaged"},
        {"schedule": "splitfed_v1"},
        {"schedule": "splitfed_v3"},
        {"schedule": "half_trained", "half_trained": {"rounds": 1, "local_epochs": 1}},
        {"schedule": "private", "private": {"gate": False, "shared_epochs": 1}},
        {"semi_supervised": {"alpha": 0.1}},
    ],
    ids=str,
)
def test_sites_with_patients_of_their_own(training: dict[str, Any], tmp_path: Path) -> None:
    job = job_of(**training)
    trained = small(job)
    trained.run()
    asks = asked(job, leave(trained, tmp_path))
    given = {site: of(site, NEW.get(site, 0)) for site in SIZES}
    whole = federation(asks, given, earlier=tmp_path)
    whole.run(Wire(1))
    found, piece, nets = told(whole), pieces(trained), configured(job).nets
    for site, count in NEW.items():
        x = given[site].features
        with torch.no_grad():
            parts = [piece(name, site) for name in nets]
            expected = nn.Sequential(*parts)(x)
        (name,) = (n for party, n in found if party == site)
        assert found[site, name].shape == (count, 3)
        assert (found[site, name] - expected).abs().max() < 1e-12
        assert (found[site, name] - expected.roll(1, 1)).abs().max() > 1e-3
    assert not any(party == "server" for party, _ in found)
    # a site that does not ask sends nothing of its records
    assert whole.parties["e"].party.cost.bytes_up < 1000 < whole.parties["d"].party.cost.bytes_up


@pytest.mark.parametrize("case", joined.CASES)
def test_parties_with_columns_of_the_same_patients(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every case's loss is a function of what comes out: it is asked for the outputs in its place."""
    make, loss = joined.CASES[case]
    trained = make()
    trained.run()
    number = leave(trained, tmp_path)
    holders = {name: a.party.worker.source.records for name, a in trained.parties.items() if a.party.worker.source}
    nothing = torch.zeros(0, dtype=torch.int64)
    division = {"train": nothing, "validation": nothing, "test": torch.arange(joined.N)}
    given = {
        name: Records(r.features, torch.zeros(joined.N), classes=r.schema.classes, numeric=(), division=division)
        for name, r in holders.items()
    }
    whole = federation(asked(trained.job, number), given, earlier=tmp_path)
    whole.run(Wire(1))
    ((party, _),) = found = told(whole)
    assert given[party].schema.classes  # who holds the label
    nets = {n: pieces(trained)(n) for n in configured(trained.job).nets}
    monkeypatch.setattr(joined, "cross_entropy", lambda outputs, _: outputs)
    with torch.no_grad():
        expected = loss(nets, {name: r.features for name, r in given.items()}, torch.zeros(joined.N))
    (answer,) = found.values()
    assert (answer - expected).abs().max() < 1e-12
    assert (answer - expected.roll(1, 0)).abs().max() > 1e-3


def test_several_targets_are_told_where_their_labels_are(tmp_path: Path) -> None:
    """Real records: death at one party, days in hospital at another, each in a file and in its own words."""
    example = read_job_file(Path("examples/multi_task.toml"))
    job = msgspec.structs.replace(example, training=msgspec.structs.replace(example.training, epochs=1))
    trained = federation(job, records_for(job, None)(0))
    trained.run()
    asks = asked(job, leave(trained, tmp_path))
    file = table.load(Path("src/partway/data/bundled/support.csv.gz"))
    few = table.Table(file.path, file.frame.head(25), file.row, file.first)
    given = {party: matched.records_of(few, asks, held, None) for party, held in job.holds.items()}
    whole = federation(asks, given, earlier=tmp_path)
    whole.run()
    found = {party: result_of(assembled, 0).predictions for party, assembled in whole.parties.items()}
    told_at = {target: party for party, held in job.holds.items() for target in held.targets}
    assert {target: party for party, texts in found.items() for target in texts} == told_at
    nets = {n: pieces(trained)(n) for n in configured(job).nets}
    inputs = {party: whole.parties[party].party.worker.source.features for party in job.holds}
    with torch.no_grad():
        parts = [nets[n](inputs[n.removeprefix("bottom_")]) for n in nets if n.startswith("bottom_")]
        both = nets["joined"](torch.cat(parts, 1))
    days = job.columns.targets["stay"]
    for target, party in told_at.items():
        heading, *rows = csv.reader(found[party][target].splitlines())
        with torch.no_grad():
            out = nets[f"trunk_{target}"](both)[:, 0]
        expected = out.sigmoid() if target == "death30" else (out * days.spread + days.center).exp() - days.log
        assert (len(rows), heading) == (25, ["record", target if target == "death30" else f"{target} in days"])
        assert torch.allclose(torch.tensor([float(told) for _, told in rows]), expected, atol=1e-4)
    written = result_of(whole.parties[told_at["stay"]], 0).write(tmp_path)
    assert [path.name for path in written] == ["result.json", "predictions.csv"]


# -- when it is wrong


def trained_and(tmp_path: Path, **change: Any) -> Callable[[], Federation]:
    job = job_of()
    trained = small(job)
    trained.run()
    asks = msgspec.structs.replace(asked(job, leave(trained, tmp_path)), **change)
    return lambda: federation(asks, {site: of(site, 3) for site in SIZES}, earlier=tmp_path)


def test_a_job_that_has_not_run_here(tmp_path: Path) -> None:
    make = trained_and(tmp_path, predict=Predict(of="0123456789ab"))
    with pytest.raises(Refused, match="of = `0123456789ab`: no such job has run here") as refused:
        make()
    assert refused.value.reasons == ("EARLIER",)


def test_another_network_than_was_trained(tmp_path: Path) -> None:
    other = job_of({"network": {"arguments": {"inputs": 6, "hidden": [8, 4], "classes": 3}, **CUT}}).network
    with pytest.raises(Refused, match="its network, records or parties were not those of this job"):
        trained_and(tmp_path, network=other)()


CUT = {"build": "partway.model.zoo:mlp", "cut": ["hidden.1"]}


def test_what_a_job_has_left_is_gone_or_damaged(tmp_path: Path) -> None:
    make = trained_and(tmp_path)
    (file,) = (tmp_path / "c").glob("*/segments.safetensors")
    whole = file.read_bytes()
    file.write_bytes(whole[:100])
    with pytest.raises(Exception, match="no network that a job has left"):
        make()
    file.unlink()
    with pytest.raises(Refused, match="it has left no network in"):
        make()


def test_a_server_may_keep_what_its_trunk_says(tmp_path: Path) -> None:
    whole = trained_and(tmp_path)()
    server = whole.parties["server"]
    whole.run()
    turns = server.party.session.turns
    shapes, policy = server.party.worker.shapes, permissive("partway.model.zoo:mlp")
    assert not list(judge_turns(policy, "server", shapes, turns))
    keeps = msgspec.structs.replace(policy, predictions_may_leave=False)
    (objection,) = judge_turns(keeps, "server", shapes, turns)
    assert objection.words == ("predictions would leave (trunk -> told_trunk); [policy] predictions_may_leave is false")
    assert not list(judge_turns(keeps, "a", shapes, turns))


@pytest.mark.parametrize(
    ("training", "why"),
    [
        ({"schedule": "private"}, "what a site has chosen, nobody else knows"),
        ({"schedule": "private", "private": {"personal": "embedding", "gate": False}}, "is not the one that was cut"),
        ({"schedule": "half_trained", "half_trained": {"bottoms": "concatenated"}}, "is not the one that was cut"),
    ],
    ids=str,
)
def test_schedules_after_which_nobody_predicts_together(training: Mapping[str, Any], why: str) -> None:
    with pytest.raises(ConfigError, match=rf"\[predict\] is not for this schedule, for .*{why}"):
        job_of({"predict": {"of": "0123456789ab"}}, **training)


def test_no_label_is_told_and_nothing_comes_back(tmp_path: Path) -> None:
    whole = trained_and(tmp_path)()
    whole.run()
    plan, turns = whole.parties["a"].plan, whole.parties["a"].party.session.turns
    kinds = {post.kind for turn in turns for post in compile(plan, turn).letters}
    assert kinds == {LetterKind.ACTIVATIONS, LetterKind.ACCOUNT, LetterKind.TICK}
    assert not any(turn.train or turn.sums for turn in turns)
