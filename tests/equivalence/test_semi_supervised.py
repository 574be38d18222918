"""`semi_supervised`: a decoder at each site, and records without labels, in the schedules that train a bottom."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from federations import SITES, SIZES, job_of, records_of, same_bits_in_any_order
from partway.assembly import forecast_of
from partway.config import Job, read_job, read_schema
from partway.data import table
from partway.data.records import Records, divide
from partway.data.survey import survey
from partway.errors import ConfigError, DataError
from partway.local import toml
from partway.plan.batches import equal_parts
from partway.plan.plan import Copy, Turn
from partway.protocol.messages import Counts
from partway.simulation import Federation, federation, together
from plain import OPTIMIZERS, Everything, far, made

UNLABELLED = {"a": 3, "b": 70, "c": 21, "d": 0, "e": 35}
ALPHA = 0.3
configurations = pytest.mark.parametrize("configuration", ["vanilla", "u_shaped"])
optimizers = pytest.mark.parametrize("optimizer", OPTIMIZERS)
DROPOUT = {"build": "dropout_network:dropout", "arguments": {}, "cut": ["one"]}


def semi(sections: Any = None, alpha: float = ALPHA, decoder: str = "hidden", **training: Any) -> Job:
    return job_of(sections, semi_supervised={"alpha": alpha, "decoder": decoder}, **training)


def with_unlabelled(site: str, unlabelled: int) -> Records:
    labelled, more = records_of(site, SIZES[site]), records_of(site, unlabelled, seed=1)
    n = len(labelled.labels)
    division = {**labelled.division, "unlabelled": torch.arange(n, n + unlabelled)}
    features = torch.cat([labelled.features, more.features[:unlabelled]])
    labels = torch.cat([labelled.labels, torch.full((unlabelled,), -1)])
    return Records(features, labels, classes=3, numeric=(), division=division)


def built(job: Job, unlabelled: dict[str, int] = UNLABELLED) -> Federation:
    return federation(job, {site: with_unlabelled(site, unlabelled[site]) for site in SITES})


def ran(job: Job, unlabelled: dict[str, int] = UNLABELLED) -> Federation:
    whole = built(job, unlabelled)
    whole.run()
    return whole


def share(x: Tensor, part: int, parts: int) -> Tensor:
    return x[len(x) * part // parts : len(x) * (part + 1) // parts]


def missed(decoder: nn.Module, bottom: nn.Module, x: Tensor) -> Tensor:
    """Over records, the sum of the mean square by which their features are missed."""
    return ((decoder(bottom(x)) - x) ** 2).mean(1).sum()


# -- synchronous, and private: union batches


class Loop:
    """One bottom (and head) or one a site, one trunk, a decoder a site."""

    def __init__(self, whole: Federation, alpha: float = ALPHA, unlabelled: bool = True) -> None:
        self.whole, self.alpha, self.unlabelled = whole, alpha, unlabelled
        self.everything = everything = Everything(whole)
        self.names = [n for n in ("bottom", "trunk", "head") if n in whole.parties["a"].network.modules]
        one = {name: everything.first(name, "server" if name == "trunk" else "a") for name in self.names}
        self.networks = dict.fromkeys(SITES, one)
        self.decoders = {site: everything.first("decoder", site) for site in SITES}

    def shared(self, clip: float = 0.0) -> dict[Copy, nn.Module]:
        """Every step updates what is shared, and the decoders of those with rows."""
        one = self.networks["a"]
        main, own = made(self.whole, *one.values()), {s: made(self.whole, d) for s, d in self.decoders.items()}
        for at, turn, part, parts in self.steps():
            everywhere = dict.fromkeys(SITES, (part, parts))
            loss, live = self.loss(at, turn, everywhere)
            for optimizer in (main, *own.values()):
                optimizer.zero_grad()
            loss.backward()
            if clip:
                nn.utils.clip_grad_norm_(
                    [p for m in (*one.values(), *self.decoders.values()) for p in m.parameters()], clip
                )
            main.step()
            for site in live:
                own[site].step()
        return self.copies()

    def relay(self) -> dict[Copy, nn.Module]:
        """One network, on one site's rows after the other's; each has its decoder."""
        one = self.networks["a"]
        main, own = made(self.whole, *one.values()), {s: made(self.whole, d) for s, d in self.decoders.items()}
        for at, turn, _, _ in self.steps():
            where = self.own_places(turn)
            for optimizer in (main, *own.values()):
                optimizer.zero_grad()
            self.loss(at, turn, where)[0].backward()
            main.step()
            (site,) = where
            own[site].step()
        return self.copies()

    def own_places(self, turn: Turn) -> dict[str, tuple[int, int]]:
        """Of each site with labelled rows in a turn: which it is of how many such turns of the epoch."""
        where = {}
        for site in SITES:
            steps = [t for _, t in self.everything.steps() if t.epoch == turn.epoch and t.rows[0].get(site)]
            if turn in steps:
                where[site] = (steps.index(turn), len(steps))
        return where

    def average(self) -> None:
        """The sites' bottoms (and heads), by labelled training records."""
        for name in set(self.names) - {"trunk"}:
            averaged_(*(self.networks[site][name] for site in SITES))

    def private(self, average: bool = False) -> dict[Copy, nn.Module]:
        """What is at a site steps by itself, where the site has labelled rows; and is averaged after each epoch."""
        for site in SITES:
            own = {n: deepcopy(m) for n, m in self.networks[site].items() if n != "trunk"}
            self.networks[site] = {**self.networks[site], **own}
        mine = {s: [*(self.networks[s][n] for n in self.names if n != "trunk"), self.decoders[s]] for s in SITES}
        main, own = made(self.whole, self.networks["a"]["trunk"]), {s: made(self.whole, *m) for s, m in mine.items()}
        for at, turn, part, parts in self.steps():
            where = self.own_places(turn)
            for optimizer in (main, *own.values()):
                optimizer.zero_grad()
            self.loss(at, turn, where)[0].backward()
            main.step()
            for site in where:
                own[site].step()
            if average and part + 1 == parts:
                self.average()
        return self.copies()

    def steps(self) -> list[tuple[int, Turn, int, int]]:
        """The turns that train, each with its number, and which of how many of its epoch it is."""
        steps, found = self.everything.steps(), []
        for at, turn in steps:
            epoch = [number for number, other in steps if other.epoch == turn.epoch]
            found.append((at, turn, epoch.index(at), len(epoch)))
        return found

    def loss(self, at: int, turn: Turn, where: dict[str, tuple[int, int]]) -> tuple[Tensor, set[str]]:
        """Of the labels and of the decoders, by the union batch's labelled records; and who has rows."""
        labelled = [site for site in SITES if turn.rows[0].get(site)]
        batch = {site: self.everything.part(site, turn) for site in labelled}
        records, live = sum(len(y) for _, y in batch.values()), {*labelled}
        loss, rows = torch.zeros((), dtype=torch.float64), []
        for site, (x, _) in batch.items():
            self.everything.seed(site, at, Copy("bottom", site))
            rows.append(self.networks[site]["bottom"](x))
            if self.alpha:
                loss = loss + self.alpha * ((self.decoders[site](rows[-1]) - x) ** 2).mean(1).sum() / records
        self.everything.seed("server", at, Copy("trunk"))
        outputs = torch.split(self.networks["a"]["trunk"](torch.cat(rows)), [len(h) for h in rows])
        for site, output in zip(labelled, outputs, strict=True):
            scores = self.networks[site]["head"](output) if "head" in self.names else output
            loss = loss + nn.functional.cross_entropy(scores, batch[site][1], reduction="sum") / records
        for site, (part, parts) in where.items() if self.unlabelled else ():
            x = share(self.everything.rows(site, "unlabelled", turn.epoch)[0], part, parts)
            if len(x):
                self.everything.seed(site, at, Copy("bottom", site), micro_batch=1)
                loss = loss + self.alpha * missed(self.decoders[site], self.networks[site]["bottom"], x) / records
                live.add(site)
        return loss, live

    def copies(self) -> dict[Copy, nn.Module]:
        found = {Copy(n, s): self.networks[s][n] for s in SITES for n in self.names if n != "trunk"}
        found |= {Copy("decoder", site): decoder for site, decoder in self.decoders.items()}
        return {**found, Copy("trunk"): self.networks["a"]["trunk"]}


def averaged_(*modules: nn.Module) -> None:
    """In place, one a site, by labelled training records."""
    with torch.no_grad():
        for parts in zip(*(module.parameters() for module in modules), strict=True):
            total = sum(SIZES[site] / sum(SIZES.values()) * p for site, p in zip(SITES, parts, strict=True))
            for p in parts:
                p.copy_(total)


def but_decoders(copies: dict[Copy, nn.Module]) -> dict[Copy, nn.Module]:
    return {copy: module for copy, module in copies.items() if copy.segment != "decoder"}


@configurations
@optimizers
@pytest.mark.parametrize("decoder", ["linear", "hidden"])
def test_synchronous_equals_one_loss_over_labelled_and_unlabelled_records(
    configuration: str, optimizer: str, decoder: str
) -> None:
    training = {"configuration": configuration, "optimizer": OPTIMIZERS[optimizer], "epochs": 4}
    whole = ran(semi(decoder=decoder, **training))
    assert far(whole, Loop(whole).shared()) < 1e-10
    assert far(whole, but_decoders(Loop(whole, alpha=0.0).shared())) > 1e-4
    assert far(whole, but_decoders(Loop(whole, unlabelled=False).shared())) > 1e-4
    assert far(whole, but_decoders(Loop(whole, alpha=2 * ALPHA).shared())) > 1e-4


@configurations
@optimizers
def test_private_equals_the_same_loss_with_a_bottom_a_site(configuration: str, optimizer: str) -> None:
    terms = {"shared_epochs": 0, "gate": False}
    training = {"configuration": configuration, "optimizer": OPTIMIZERS[optimizer], "epochs": 4}
    whole = ran(semi(schedule="private", private=terms, **training))
    assert far(whole, Loop(whole).private()) < 1e-10
    assert far(whole, but_decoders(Loop(whole, alpha=0.0).private())) > 1e-4
    assert far(whole, but_decoders(Loop(whole, unlabelled=False).private())) > 1e-4


@optimizers
@pytest.mark.parametrize("schedule", ["relay", "averaged", "splitfed_v2"])
def test_relay_averaged_and_splitfed_v2_equal_their_loops_with_decoders(schedule: str, optimizer: str) -> None:
    whole = ran(semi(schedule=schedule, optimizer=OPTIMIZERS[optimizer], epochs=3))

    def loop(**changes: Any) -> dict[Copy, nn.Module]:
        plain = Loop(whole, **changes)
        return plain.relay() if schedule == "relay" else plain.private(average=True)

    assert far(whole, loop()) < 1e-10
    assert far(whole, but_decoders(loop(alpha=0.0))) > 1e-4
    assert far(whole, but_decoders(loop(unlabelled=False))) > 1e-4


@optimizers
@pytest.mark.parametrize("version", ["splitfed_v1", "splitfed_v3"])
def test_splitfed_with_a_trunk_a_site_equals_its_loop_with_decoders(version: str, optimizer: str) -> None:
    whole = ran(semi(schedule=version, optimizer=OPTIMIZERS[optimizer], epochs=3))

    def loop(alpha: float) -> dict[Copy, nn.Module]:
        everything, training = Everything(whole), whole.job.training
        bottoms, trunks, decoders = (
            {site: everything.first(name, owner or site) for site in SITES}
            for name, owner in (("bottom", "a"), ("trunk", "server"), ("decoder", ""))
        )
        own = {s: made(whole, bottoms[s], trunks[s], decoders[s]) for s in SITES}
        for epoch in range(training.epochs):
            for site in SITES:
                (x, y), (u, _) = (everything.rows(site, part, epoch) for part in ("train", "unlabelled"))
                parts = equal_parts(len(y), training.batch)
                for number, (begin, end) in enumerate(parts):
                    own[site].zero_grad()
                    loss = nn.functional.cross_entropy(trunks[site](bottoms[site](x[begin:end])), y[begin:end])
                    if alpha:
                        for rows in (x[begin:end], share(u, number, len(parts))):
                            loss = loss + alpha * missed(decoders[site], bottoms[site], rows) / (end - begin)
                    loss.backward()
                    own[site].step()
            averaged_(*trunks.values())
            if version == "splitfed_v1":
                averaged_(*bottoms.values())
        return {Copy(n, s): m[s] for n, m in (("bottom", bottoms), ("trunk", trunks)) for s in SITES}

    assert far(whole, loop(ALPHA)) < 1e-10
    assert far(whole, loop(0.0)) > 1e-4


@optimizers
def test_a_decoder_may_have_its_first_rows_long_after_the_bottom_s_first_step(optimizer: str) -> None:
    none = dict.fromkeys(SITES, 0)
    whole = ran(semi({"job": {"seed": 1}}, optimizer=OPTIMIZERS[optimizer], epochs=2), unlabelled=none)
    first = [turn.rows[0]["c"] for _, turn in Everything(whole).steps()].index(1)
    assert first > 0
    assert far(whole, Loop(whole, unlabelled=False).shared()) < 1e-10


def test_with_dropout() -> None:
    whole = ran(semi({"network": DROPOUT}, optimizer=OPTIMIZERS["adam"], epochs=3))
    assert far(whole, Loop(whole).shared()) < 1e-10


@configurations
def test_clipped_by_one_norm_in_which_decoders_count(configuration: str) -> None:
    whole = ran(semi(configuration=configuration, clip_norm=0.3, optimizer=OPTIMIZERS["adam"], epochs=3))
    assert far(whole, Loop(whole).shared(clip=0.3)) < 1e-10
    assert far(whole, Loop(whole).shared()) > 1e-5


def test_in_half_precision_it_runs_and_the_sites_stay_equal() -> None:
    whole = ran(semi(precision="float16", dtype="float32", epochs=2))
    copies = [whole.parties[s].party.worker.segments[Copy("bottom", s)].weights() for s in SITES]
    assert all(torch.equal(copies[0], copy) for copy in copies)


def test_in_micro_batches_it_is_the_same() -> None:
    """But for unlabelled records, which go at once."""
    whole = ran(semi(micro_batch=4, optimizer=OPTIMIZERS["adam"], epochs=3))
    steps = [(at, t) for at, t in Everything(whole).steps()]
    assert max(len(t.rows) for _, t in steps) > 3
    loop = Loop(whole)
    loop.everything.steps = lambda: [(at, whole_of(turn)) for at, turn in steps]  # type: ignore[method-assign]
    assert far(whole, loop.shared()) < 1e-10


def whole_of(turn: Turn) -> Turn:
    """Its labelled micro-batches as one, which they were cut from."""
    rows = {site: sum(r.get(site, 0) for r in turn.labelled) for site in SITES}
    offsets = {site: min(o.get(site, 10**9) for o in turn.offsets[: len(turn.labelled)]) for site in SITES}
    return replace(turn, rows=(rows,), offsets=(offsets,), beside="")


# -- half_trained: local epochs

HALF: dict[str, Any] = {"rounds": 2, "local_epochs": 2, "batch": 8}


def local_epochs(whole: Federation, alpha: float, unlabelled: bool) -> nn.Module:
    """The bottom that sites train by themselves, each with its decoder, and average by labelled records."""
    everything, terms = Everything(whole), whole.job.training.half_trained
    shared = nn.ModuleList([everything.first("bottom", "a"), everything.first("local_head", "a")])
    decoders, epoch = {site: everything.first("decoder", site) for site in SITES}, 0
    for _ in range(terms.rounds):
        mine = {site: deepcopy(shared) for site in SITES}
        for site, (bottom, head) in mine.items():
            optimizer = made(whole, bottom, head, decoders[site], local=True)
            for e in range(epoch, epoch + terms.local_epochs):
                x, y = everything.rows(site, "train", e)
                u, _ = everything.rows(site, "unlabelled", e)
                parts = equal_parts(len(y), terms.batch)
                for number, (begin, end) in enumerate(parts):
                    optimizer.zero_grad()
                    loss = nn.functional.cross_entropy(head(bottom(x[begin:end])), y[begin:end])
                    if alpha:
                        loss = loss + alpha * missed(decoders[site], bottom, x[begin:end]) / (end - begin)
                    if unlabelled:
                        loss = loss + alpha * missed(decoders[site], bottom, share(u, number, len(parts))) / (
                            end - begin
                        )
                    loss.backward()
                    optimizer.step()
        total = sum(SIZES.values())
        for name, weight in shared.state_dict().items():
            weight.copy_(sum(SIZES[site] / total * mine[site].state_dict()[name] for site in SITES))
        epoch += terms.local_epochs
    return shared[0]


@optimizers
def test_half_trained_equals_local_epochs_with_a_decoder_each(optimizer: str) -> None:
    whole = ran(semi(schedule="half_trained", half_trained={**HALF, "optimizer": OPTIMIZERS[optimizer]}))
    assert far(whole, {Copy("bottom", s): local_epochs(whole, ALPHA, True) for s in "ab"}) < 1e-10
    assert far(whole, {Copy("bottom", "a"): local_epochs(whole, 0.0, False)}) > 1e-4
    assert far(whole, {Copy("bottom", "a"): local_epochs(whole, ALPHA, False)}) > 1e-4


# -- what it costs, and what comes of it


@pytest.mark.parametrize(
    "training",
    [
        {"schedule": "synchronous"},
        {"schedule": "half_trained", "half_trained": HALF},
        {"schedule": "private", "private": {"shared_epochs": 1}},
        {"schedule": "relay"},
        {"schedule": "splitfed_v2"},
    ],
)
def test_unlabelled_records_and_decoders_cost_no_communication(training: dict[str, Any]) -> None:
    with_, without = ran(semi(**training)), ran(semi(alpha=0.0, **training))
    none = ran(semi(**training), unlabelled=dict.fromkeys(SITES, 0))
    for party in (*SITES, "server"):
        spent, bare, labelled = (whole.parties[party].party.cost for whole in (with_, without, none))
        assert (spent.bytes_up, spent.bytes_down) == (bare.bytes_up, bare.bytes_down)
        assert (spent.bytes_up, spent.bytes_down) == (labelled.bytes_up, labelled.bytes_down)
        assert spent.exchanges == bare.exchanges
        if party == "b":
            assert spent.flops > labelled.flops > bare.flops


@pytest.mark.parametrize("schedule", ["synchronous", "half_trained", "private"])
def test_what_it_costs_is_forecast(schedule: str) -> None:
    whole = ran(semi(schedule=schedule, half_trained=HALF, keep="last"))
    sizes = {site: whole.parties[site].party.worker.source.records.sizes for site in SITES}
    schema = whole.parties["a"].party.worker.source.records.schema
    forecast = forecast_of(whole.job, schema, sizes)
    for party, due in forecast.items():
        spent = whole.parties[party].party.cost
        assert (spent.flops, spent.bytes_up, spent.bytes_down) == (due.flops, due.bytes_up, due.bytes_down)


def test_no_letter_of_a_step_has_an_unlabelled_row_and_no_decoder_comes_out() -> None:
    whole = ran(semi({"result": {"bottom": "everyone", "trunk": "everyone"}}))
    session = whole.parties["a"].party.session
    turns = [(turn, net) for turn, net in zip(session.turns, session.nets, strict=True) if turn.beside]
    assert turns
    assert not [post for turn, net in turns for post in net.letters if post.micro_batch == len(turn.rows) - 1]
    assert {turn.rows[-1]["b"] for turn, _ in turns} == {11, 12}
    result = together(whole, 0)
    assert result.whole
    assert not [name for name in result.weights if "decoder" in name or "1.weight" in name]
    assert "decoder" not in {n for names in result.holds.values() for n in names}


@configurations
def test_bottoms_stay_equal_and_decoders_do_not(configuration: str) -> None:
    whole = ran(semi(configuration=configuration))
    of = {
        name: [whole.parties[s].party.worker.segments[Copy(name, s)].weights() for s in "ab"]
        for name in ("bottom", "decoder")
    }
    assert torch.equal(*of["bottom"])
    assert not torch.equal(*of["decoder"])


@pytest.mark.parametrize("schedule", ["synchronous", "half_trained", "private"])
def test_the_bits_do_not_depend_on_delivery(schedule: str) -> None:
    job = semi({"evaluation": {"every": 1}}, schedule=schedule, half_trained=HALF)
    same_bits_in_any_order(lambda: built(job), 4, built(job, {**UNLABELLED, "b": 69}))


# -- records without labels


def test_what_has_no_label_is_a_part_of_its_own() -> None:
    labels = torch.tensor([0, 1, -1, 1, 0, -1, 0, 1, 1, 0])
    division = divide(labels, 3)
    assert division["unlabelled"].tolist() == [2, 5]
    assert not {2, 5} & {n for part in ("train", "validation", "test") for n in division[part].tolist()}
    assert "unlabelled" not in divide(labels[labels >= 0], 3)


SCHEMA = """
[schema]
name = "small"
label = "y"
unlabelled = ["", "not yet"]
leave_out = ["unclear"]
[classes]
ill = ["ill"]
well = ["well"]
[columns]
x = { kind = "numeric" }
"""


def test_rows_of_a_file_without_a_label_count_and_are_told(tmp_path: Path) -> None:
    labels = ["ill", "", "well", "not yet", "unclear", "ill", "", "well"]
    (tmp_path / "records.csv").write_text("x,y\n" + "".join(f"{n},{label}\n" for n, label in enumerate(labels)))
    file = table.load(tmp_path / "records.csv")
    records = table.records_of(file, read_schema(SCHEMA), "reference", seed=0)
    assert sorted(records.features[records.division["unlabelled"], 0].tolist()) == [1, 3, 6]
    assert sum(records.sizes[part] for part in ("train", "validation", "test")) == 4
    assert Counts(**records.sizes).unlabelled == 3
    told = survey(file, read_schema(SCHEMA)).text()
    assert "all rows: 4 records count: ill 2, well 2; 3 have no label\n  1 rows do not count" in told
    without = read_schema(SCHEMA.replace('unlabelled = ["", "not yet"]', ""))
    with pytest.raises(DataError, match="an empty field is no label of the schema"):
        table.records_of(file, without, "reference", seed=0)


def test_a_dataset_may_have_records_without_a_label() -> None:
    rows = [(torch.ones(2), n % 2 if n < 6 else None) for n in range(8)]
    assert Records.from_dataset(rows, 2, seed=0).sizes["unlabelled"] == 2  # type: ignore[arg-type]


def test_configurations_without_lanes_and_words_for_two_things_are_refused() -> None:
    net = {"build": "partway.model.zoo:mlp", "arguments": {"inputs": 1, "hidden": [1], "classes": 2}}
    words: dict[str, Any] = {
        "job": {"name": "joined"},
        "training": {"configuration": "vertical", "semi_supervised": {"alpha": 0.1}},
        "holds.a": {"columns": ["x"]},
        "holds.b": {"targets": ["y"]},
        "networks.bottom_a": net,
        "networks.trunk": net,
    }
    with pytest.raises(ConfigError, match="semi_supervised is for configurations in which sites have patients"):
        read_job(toml(words))
    text = '[schema]\nname = "x"\nlabel = "y"\nunlabelled = ["ill"]\n[classes]\nill = ["ill"]\nwell = ["well"]\n'
    with pytest.raises(ConfigError, match=r"`ill` means two things"):
        read_schema(text + '[columns.z]\nkind = "numeric"\n')
