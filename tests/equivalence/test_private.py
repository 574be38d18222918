"""`private`: bottoms that go their own ways after epochs together, and the gate by which each site chooses."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from federations import SITES, job_of, records_of, same_bits_in_any_order, small
from partway.config import Job, read_job
from partway.data import thyroid
from partway.data.records import Records, Target
from partway.errors import ConfigError
from partway.finished import load
from partway.outcome import result_of
from partway.plan.plan import Copy, Turn
from partway.protocol.messages import LetterKind
from partway.report import Result
from partway.simulation import Federation, federation, together
from partway.train import metrics
from partway.train.stopping import value
from plain import OPTIMIZERS, Everything, far, made

configurations = pytest.mark.parametrize("configuration", ["vanilla", "u_shaped"])
DROPOUT = {"build": "dropout_network:dropout", "arguments": {}}


def private(terms: dict[str, Any], sections: Any = None, **training: Any) -> Job:
    return job_of(sections, schedule="private", private=terms, **training)


def of_their_own(site: str) -> Records:
    """At `b` labels mean something else than at the others; at `e` they do so in training, and not in validation."""
    records = records_of(site, {"a": 120, "b": 50, "c": 1, "d": 9, "e": 40}[site])
    labels = (records.labels + (site in "be")) % 3
    if site == "e":
        validation = records.division["validation"]
        labels[validation] = records.labels[validation]
    return Records(records.features, labels, classes=3, numeric=(), division=records.division)


def ran(job: Job) -> Federation:
    whole = federation(job, {site: of_their_own(site) for site in SITES})
    whole.run()
    return whole


Networks = dict[str, dict[str, nn.Module]]
"""By site: the pieces that its records go through, in order; the trunk is the same for all."""


def loop(whole: Federation, summed_epochs: int, until: int = 10**6) -> tuple[Networks, Networks]:
    """What all share after `summed_epochs`, and what each site has at the end, or after so many epochs."""
    everything = Everything(whole)
    names = [name for name in ("bottom", "trunk", "head") if name in whole.parties["a"].network.modules]
    one = {name: everything.first(name, "server" if name == "trunk" else "a") for name in names}
    optimizers = {(name, site): made(whole, module) for name, module in one.items() for site in ("", *SITES)}
    networks = dict.fromkeys(SITES, one)
    shared = networks
    for at, turn in everything.steps():
        if turn.epoch >= until:
            break
        if turn.epoch == summed_epochs and networks is shared:
            shared = dict.fromkeys(SITES, deepcopy(one))
            networks = {}
            for site in SITES:
                networks[site] = dict(one)
                for name in set(names) - {"trunk"}:
                    own = deepcopy((one[name], optimizers[name, ""]))
                    networks[site][name], optimizers[name, site] = own
        live = [site for site in SITES if turn.rows[0][site]]
        for optimizer in optimizers.values():
            optimizer.zero_grad()
        loss_of(everything, networks, at, turn, live).backward()
        apart = turn.epoch >= summed_epochs
        optimizers["trunk", ""].step()
        for name in set(names) - {"trunk"}:
            for site in live if apart else ("",):
                optimizers[name, site].step()
    return shared, networks


def loss_of(everything: Everything, networks: Networks, at: int, turn: Turn, live: list[str]) -> Tensor:
    """The mean loss of a union batch, through each site's own pieces and the one trunk."""
    batch = {site: everything.part(site, turn) for site in live}
    rows = []
    for site in live:
        everything.seed(site, at, Copy("bottom", site))
        rows.append(networks[site]["bottom"](batch[site][0]))
    everything.seed("server", at, Copy("trunk"))
    outputs = list(torch.split(networks[live[0]]["trunk"](torch.cat(rows)), [len(x) for x in rows]))
    for number, site in enumerate(live):
        if "head" in networks[site]:
            everything.seed(site, at, Copy("head", site))
            outputs[number] = networks[site]["head"](outputs[number])
    y = torch.cat([batch[site][1] for site in live])
    return nn.functional.cross_entropy(torch.cat(outputs), y, reduction="sum") / len(y)


def copies(networks: Networks) -> dict[Copy, nn.Module]:
    """As a federation holds them."""
    found = {Copy(name, site): networks[site][name] for site in SITES for name in networks[site] if name != "trunk"}
    return {**found, Copy("trunk"): networks["a"]["trunk"]}


@configurations
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("shared_epochs", [0, 2])
def test_every_bottom_steps_by_itself_and_one_trunk_on_the_union_batch(
    configuration: str, optimizer: str, shared_epochs: int
) -> None:
    training = {"configuration": configuration, "optimizer": OPTIMIZERS[optimizer], "epochs": 5}
    whole = ran(private({"shared_epochs": shared_epochs, "gate": False}, **training))
    _, networks = loop(whole, shared_epochs)
    assert far(whole, copies(networks)) < 1e-10
    bottoms = [segment.weights() for site in "ab" for segment in [at(whole, site, "bottom")]]
    assert float((bottoms[0] - bottoms[1]).abs().max()) > 1e-3
    _, summed = loop(whole, 99)
    assert far(whole, copies(summed)) > 1e-3
    _, otherwise = loop(whole, shared_epochs + 1)
    assert far(whole, copies(otherwise)) > 1e-4


@configurations
def test_with_dropout(configuration: str) -> None:
    network = {**DROPOUT, "cut": ["one", "two"] if configuration == "u_shaped" else ["one"]}
    training = {"configuration": configuration, "optimizer": OPTIMIZERS["adam"], "epochs": 3}
    whole = ran(private({"shared_epochs": 2, "gate": False}, {"network": network}, **training))
    assert far(whole, copies(loop(whole, 2)[1])) < 1e-10


def at(whole: Federation, party: str, name: str) -> Any:
    return whole.parties[party].party.worker.segments[Copy(name, "" if party == "server" else party)]


# -- the gate


def score(whole: Federation, network: dict[str, nn.Module], site: str, part: str) -> metrics.Scores:
    x, y = Everything(whole).rows(site, part, 0)
    with torch.no_grad():
        return metrics.scores(nn.Sequential(*(module.eval() for module in network.values()))(x), y)


@configurations
def test_each_site_keeps_its_own_only_where_its_validation_records_gain(configuration: str) -> None:
    sections = {"evaluation": {"site_scores": True}, "result": {"trunk": "everyone"}}
    training = {"configuration": configuration, "optimizer": OPTIMIZERS["adam"], "epochs": 10, "batch": 32}
    whole = ran(private({"shared_epochs": 8}, sections, **training))
    shared, own = loop(whole, 8)
    gains = {
        s: value(score(whole, own[s], s, "validation")) > value(score(whole, shared[s], s, "validation")) for s in SITES
    }
    assert gains["b"]
    assert not gains["e"]
    result = together(whole, 0)
    assert result.chosen == {site: "own" if gains[site] else "shared" for site in SITES}
    for site in SITES:
        chosen = (own if gains[site] else shared)[site]
        for name, module in chosen.items():
            held = at(whole, site, "trunk_here" if name == "trunk" else name).weights()
            assert float((held - nn.utils.parameters_to_vector(module.parameters()).detach()).abs().max()) < 1e-10
        tested = score(whole, chosen, site, "test")
        assert result.sites[site]["accuracy"] == pytest.approx(tested.accuracy)
        assert result.sites[site]["macro_auc"] == pytest.approx(tested.macro_auc)
        weights = of_site(result, site)
        assert all(torch.equal(weights[n], t) for n, t in at(whole, site, "bottom").tensors().items())
    open_ = ran(private({"shared_epochs": 8, "gate": False}, sections, **training))
    assert far(open_, copies(loop(open_, 8)[1])) < 1e-10
    assert together(open_, 0).chosen == {}


def of_site(result: Result, site: str) -> dict[str, Tensor]:
    prefix = f"sites.{site}."
    return {name.removeprefix(prefix): t for name, t in result.weights.items() if name.startswith(prefix)}


def test_without_validation_records_nothing_is_gained() -> None:
    def records(site: str) -> Records:
        found = of_their_own(site)
        if site == "b":
            found.division["validation"] = torch.empty(0, dtype=torch.int64)
        return found

    whole = federation(private({"shared_epochs": 1}, epochs=3), {site: records(site) for site in SITES})
    whole.run()
    assert whole.parties["b"].party.worker.stays is False


def test_what_is_measured_for_the_choice_stays_at_the_site() -> None:
    whole = ran(private({"shared_epochs": 1}, epochs=1))
    session = whole.parties["server"].party.session
    gate = [n for n, turn in enumerate(session.turns) if turn.choice or turn.flow in ("own_choice", "shared_choice")]
    assert len(gate) == 3
    assert not any(session.nets[n].letters for n in gate)
    kept = next(n for n, turn in enumerate(session.turns) if any(b.segment == "bottom::shared" for _, b in turn.gives))
    assert not session.nets[kept].letters
    assert whole.parties["server"].party.worker.stays is None


def test_no_gradient_of_a_bottom_is_summed_after_the_shared_epochs() -> None:
    session = ran(private({"shared_epochs": 2}, epochs=3)).parties["a"].party.session
    shares = {
        turn.epoch
        for turn, net in zip(session.turns, session.nets, strict=True)
        if turn.train and any(post.kind is LetterKind.SHARE for post in net.letters)
    }
    assert shares == {0, 1}


def test_training_stops_early_and_keeps_the_best() -> None:
    """By the scores of every site's own network, and never in the epochs together."""
    terms = {"shared_epochs": 2, "gate": False}
    job = private(terms, {"evaluation": {"every": 1}}, epochs=40, patience=2, optimizer=OPTIMIZERS["adam"])
    whole = ran(job)
    looks = {row["epoch"]: value(metrics.Scores(**row_of(row))) for row in together(whole, 0).validation}
    assert min(looks) == 2
    assert max(looks) < 41
    best = max(looks, key=lambda epoch: (looks[epoch], -epoch))
    assert best == max(looks) - 2
    assert far(whole, copies(loop(whole, 2, best + 1)[1])) < 1e-10
    assert far(whole, copies(loop(whole, 2, best + 2)[1])) > 1e-4


def row_of(row: dict[str, Any]) -> dict[str, Any]:
    return {name: figure for name, figure in row.items() if name != "epoch"}


@configurations
def test_the_bits_do_not_depend_on_delivery(configuration: str) -> None:
    sections = {"evaluation": {"every": 1, "site_scores": True}, "result": {"trunk": "everyone"}}
    jobs = [private({"shared_epochs": n}, sections, configuration=configuration) for n in (1, 2)]
    same_bits_in_any_order(lambda: small(jobs[0]), 4, small(jobs[1]))


@pytest.mark.parametrize(
    ("terms", "sections", "words"),
    [
        ({"shared_epochs": 0}, {}, "gate compares with the network of shared_epochs, and there are none"),
        ({}, {"evaluation": {"trunk_travels": False}}, "gate needs .* trunk_travels = true"),
        ({}, {"result": {"bottom": "everyone"}}, "each site has its own"),
        ({"gates": True}, {}, "did you mean `gate`"),
    ],
)
def test_jobs_that_cannot_be(terms: dict[str, Any], sections: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        private(terms, sections)


THYROID = """
[job]
name = "thyroid"
[network]
build = "partway.model.zoo:mlp"
arguments = {{ inputs = 29, hidden = [16, 8, 8], classes = 7 }}
cut = ["hidden.1"]
[training]
schedule = "private"
epochs = 2
private = {{ shared_epochs = 1, personal = "{personal}" }}
[result]
trunk = "everyone"
"""


@pytest.mark.parametrize("personal", ["bottom", "embedding"])
def test_what_it_leaves_at_a_site_predicts(personal: str, tmp_path: Path) -> None:
    records = thyroid.bundled(seed=0)
    whole = federation(read_job(THYROID.format(personal=personal)), records)
    whole.run()
    result = result_of(whole.parties["svi"], 0)
    assert result.whole
    result.write(tmp_path)
    own = records["svi"]
    tested = own.division["test"]
    finished = load(tmp_path)
    with torch.no_grad():
        found = finished(own.features[tested].float())
    scored = metrics.scores(found, own.labels[tested])
    assert scored.accuracy == pytest.approx(result.sites["svi"]["accuracy"], abs=0.005)
    assert set(result.chosen) == {"svi"}
    assert result_of(whole.parties["server"], 0).chosen == {}


TARGETS = {
    "binary": Target(name="t", kind="binary", outputs=1),
    "regression": Target(name="t", kind="regression", outputs=1),
    "survival": Target(name="t", kind="survival", outputs=3, intervals=(1.0, 2.0, 3.0)),
}


def with_target(site: str, target: Target) -> Records:
    """At `b` what is learnt is the opposite of what it is at the others; at `e` so in training, not in validation."""
    records = of_their_own(site)
    x = records.features
    sign = torch.full((len(x),), -1.0 if site in "be" else 1.0, dtype=torch.float64)
    if site == "e":
        sign[records.division["validation"]] = 1.0
    level = sign * (x[:, 0] + x[:, 1])
    yes = (level > 0).double()
    y = {"binary": yes, "regression": level, "survival": torch.stack([(-level).exp(), torch.ones(len(x))], 1)}
    return Records(x, y[target.kind], classes=target.outputs, numeric=(), division=records.division, targets=(target,))


@pytest.mark.parametrize("kind", TARGETS)
def test_the_gate_looks_at_any_target_s_own_scores(kind: str) -> None:
    arguments = {"inputs": 6, "hidden": [8, 5], "classes": TARGETS[kind].outputs}
    training = {"epochs": 20, "optimizer": {"name": "adam", "lr": 0.02}, "batch": 32}
    job = private({"shared_epochs": 8}, {"network": {"arguments": arguments}}, **training)
    whole = federation(job, {site: with_target(site, TARGETS[kind]) for site in SITES})
    whole.run()
    assert whole.parties["b"].party.worker.stays is True
    assert whole.parties["e"].party.worker.stays is False
