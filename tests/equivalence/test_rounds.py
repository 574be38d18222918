"""`averaged`, `relay` and SplitFed, each against a plain loop that reads like its description."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import msgspec
import pytest
import torch
from torch import Tensor, nn

from federations import SIZES, job_of, same_bits_in_any_order, small
from partway.assembly import optimizer_of
from partway.errors import ConfigError, Refused
from partway.model.segment import Segment
from partway.plan.batches import local_batches, shuffled, union_batches
from partway.plan.plan import Copy
from partway.protocol.messages import LetterKind
from partway.simulation import Federation, permissive, together
from partway.train.worker import Worker
from plain import OPTIMIZERS, Everything, weights_at

SITES = tuple(SIZES)
TOTAL = sum(SIZES.values())


class Sites:
    """Every site's own copies, one trunk or one for each, and an optimiser for what one party updates at once."""

    def __init__(self, whole: Federation, trunks: bool = False) -> None:
        self.all, self.whole, self.job = Everything(whole), whole, whole.job
        names = [n for n in whole.parties["a"].network.modules if n != "trunk"]
        self.home = {site: {n: self.all.first(n, "a") for n in names} for site in SITES}
        self.trunks = {site: self.all.first("trunk", "server") for site in SITES}
        if not trunks:
            self.trunks = dict.fromkeys(SITES, self.trunks["a"])
        make = optimizer_of(self.job.training.optimizer)
        self.made = {site: make([p for m in own.values() for p in m.parameters()]) for site, own in self.home.items()}
        each = {id(t): make(list(t.parameters())) for t in self.trunks.values()}
        self.made_trunk = {site: each[id(trunk)] for site, trunk in self.trunks.items()}
        self.step_number = 0

    def rows(self, epoch: int) -> dict[str, tuple[Tensor, Tensor]]:
        return {site: self.all.rows(site, "train", epoch) for site in SITES}

    def seeded(self, at: int, party: str, name: str, lane: str, module: nn.Module, x: Tensor) -> Tensor:
        """A forward with the dropout that the party drew."""
        self.all.seed(party, at, Copy(name, lane))
        return module(x)

    def train(
        self, at: int, batch: Mapping[str, tuple[Tensor, Tensor]], divisor: float, *, apart: bool = False
    ) -> None:
        """One step on some sites' rows: through their copies and the trunk or trunks, then everybody's update."""
        for made in (*self.made.values(), *self.made_trunk.values()):
            made.zero_grad()
        z = {s: self.seeded(at, s, "bottom", s, self.home[s]["bottom"], x) for s, (x, _) in batch.items()}
        if apart:
            out = {s: self.seeded(at, "server", "trunk", s, self.trunks[s], z[s]) for s in batch}
        else:
            trunk = self.trunks[next(iter(batch))]
            joined = self.seeded(at, "server", "trunk", "", trunk, torch.cat(list(z.values())))
            out = dict(zip(batch, joined.split([len(y) for _, y in batch.values()]), strict=True))
        if "head" in self.home["a"]:
            out = {s: self.seeded(at, s, "head", s, self.home[s]["head"], out[s]) for s in batch}
        losses = [
            nn.functional.cross_entropy(out[s], y, reduction="sum") / (divisor or len(y)) for s, (_, y) in batch.items()
        ]
        sum(losses).backward()
        for site in batch:
            self.made[site].step()
        for made in {id(m): m for s, m in self.made_trunk.items() if s in batch}.values():
            made.step()

    def average(self, *groups: Mapping[str, nn.Module], weighted: bool = True) -> None:
        for group in groups:
            share = {s: SIZES[s] / TOTAL if weighted else 1 / len(SITES) for s in SITES}
            with torch.no_grad():
                for parts in zip(*(module.parameters() for module in group.values()), strict=True):
                    total = sum(share[s] * p for s, p in zip(SITES, parts, strict=True))
                    for p in parts:
                        p.copy_(total)

    @property
    def groups(self) -> list[dict[str, nn.Module]]:
        """What sites hold, by segment."""
        return [{site: own[name] for site, own in self.home.items()} for name in self.home["a"]]

    def turns(self) -> Iterator[int]:
        """The number of each turn that trains, in order."""
        yield from (number for number, _ in self.all.steps())

    def far(self) -> float:
        found = []
        for assembled in self.whole.parties.values():
            for copy, segment in assembled.party.worker.segments.items():
                if copy.segment in (*self.home["a"], "trunk"):
                    module = (
                        self.trunks[copy.lane or "a"] if copy.segment == "trunk" else self.home[copy.lane][copy.segment]
                    )
                    flat = nn.utils.parameters_to_vector(module.parameters()).detach()
                    found.append(float((segment.weights() - flat).abs().max()))
        assert len(found) == len(SITES) * len(self.home["a"]) + len({id(t) for t in self.trunks.values()})
        return max(found)


def of(rows: Mapping[str, tuple[Tensor, Tensor]], batch: Any, site: str) -> tuple[Tensor, Tensor]:
    x, y = rows[site]
    where = slice(batch.offsets[site], batch.offsets[site] + batch.rows[site])
    # Copies, as a party's own rows are: with float32 that begins anywhere in memory, MKL rounds otherwise on some CPUs.
    return x[where].clone(), y[where].clone()


def averaged_loop(whole: Federation, weighted: bool = True) -> Sites:
    sites, training = Sites(whole), whole.job.training
    at = sites.turns()
    for epoch in range(training.epochs):
        rows = sites.rows(epoch)
        for number, batch in enumerate(union_batches(SIZES, training.batch, whole.job.job.seed, epoch), 1):
            live = {s: of(rows, batch, s) for s in SITES if batch.rows[s]}
            sites.train(next(at), live, divisor=sum(batch.rows.values()))
            if training.averaged.every and number % training.averaged.every == 0:
                sites.average(*sites.groups, weighted=weighted)
        sites.average(*sites.groups, weighted=weighted)
    return sites


def splitfed_v1_loop(whole: Federation, weighted: bool = True, bottoms: bool = True) -> Sites:
    sites = Sites(whole, trunks=True)
    at = sites.turns()
    for epoch in range(whole.job.training.epochs):
        rows = sites.rows(epoch)
        for batch in local_batches(SIZES, whole.job.training.batch):
            live = {s: of(rows, batch, s) for s in SITES if batch.rows[s]}
            sites.train(next(at), live, divisor=0, apart=True)
        sites.average(sites.trunks, *(sites.groups if bottoms else []), weighted=weighted)
    return sites


def splitfed_v3_loop(whole: Federation, weighted: bool = True) -> Sites:
    return splitfed_v1_loop(whole, weighted, bottoms=False)


def splitfed_v2_loop(whole: Federation, weighted: bool = True) -> Sites:
    sites, seed = Sites(whole), whole.job.job.seed
    at = sites.turns()
    for epoch in range(whole.job.training.epochs):
        rows = sites.rows(epoch)
        for number, batch in enumerate(local_batches(SIZES, whole.job.training.batch)):
            for place in shuffled(len(SITES), "splitfed_v2", seed, epoch, number):
                if batch.rows[SITES[place]]:
                    sites.train(next(at), {SITES[place]: of(rows, batch, SITES[place])}, divisor=0)
        sites.average(*sites.groups, weighted=weighted)
    return sites


def relay_loop(whole: Federation, handed: bool = True) -> Sites:
    """One network and one optimiser, on the sites' batches one after the other; not handed: an optimiser a site."""
    sites, training = Sites(whole), whole.job.training
    one = sites.home["a"]
    if handed:
        sites.home, sites.made = dict.fromkeys(SITES, one), dict.fromkeys(SITES, sites.made["a"])
    else:
        make = optimizer_of(training.optimizer)
        sites.home = dict.fromkeys(SITES, one)
        sites.made = {site: make([p for m in one.values() for p in m.parameters()]) for site in SITES}
    at = sites.turns()
    for epoch in range(training.epochs):
        rows, order = sites.rows(epoch), sorted(SITES, key=lambda site: -SIZES[site])
        if training.relay.order == "random":
            order = [SITES[place] for place in shuffled(len(SITES), "relay", whole.job.job.seed, epoch)]
        left = {site: local_batches({site: SIZES[site]}, training.batch) for site in order}
        most = training.relay.turn_batches or TOTAL
        while any(left.values()):
            for site in order:
                now, left[site] = left[site][:most], left[site][most:]
                for batch in now:
                    sites.train(next(at), {site: of(rows, batch, site)}, divisor=0)
    return sites


LOOPS: dict[str, Callable[..., Sites]] = {
    "averaged": averaged_loop,
    "splitfed_v1": splitfed_v1_loop,
    "splitfed_v2": splitfed_v2_loop,
    "splitfed_v3": splitfed_v3_loop,
    "relay": relay_loop,
}
TERMS = {"evaluation": {"every": 0, "trunk_travels": False}}
MORE: dict[str, dict[str, Any]] = {
    "averaged": {"averaged": {"every": 2}},
    "relay": {"relay": {"turn_batches": 2, "order": "random"}},
}
KEPT = {"relay": {"turn_batches": 2, "order": "random", "hand_over": "kept"}}
schedules = pytest.mark.parametrize("schedule", LOOPS)


def job(schedule: str, sections: dict[str, Any] | None = None, **more: Any) -> Any:
    return job_of({**TERMS, **(sections or {})}, schedule=schedule, **{"epochs": 4, "batch": 12, **more})


@schedules
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("configuration", ["vanilla", "u_shaped"])
def test_equals_its_plain_loop(schedule: str, optimizer: str, configuration: str) -> None:
    check(schedule, optimizer, configuration, {})


@pytest.mark.parametrize("schedule", MORE)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_equals_its_plain_loop_with_other_settings(schedule: str, optimizer: str) -> None:
    check(schedule, optimizer, "vanilla", MORE[schedule])


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("configuration", ["vanilla", "u_shaped"])
def test_what_the_server_keeps_for_the_next_site_trains_the_same(configuration: str, optimizer: str) -> None:
    check("relay", optimizer, configuration, KEPT)


def check(schedule: str, optimizer: str, configuration: str, settings: dict[str, Any]) -> None:
    whole = small(job(schedule, configuration=configuration, optimizer=OPTIMIZERS[optimizer], **settings))
    whole.run()
    assert LOOPS[schedule](whole).far() < 1e-10
    control = LOOPS[schedule](whole, **({"handed": False} if schedule == "relay" else {"weighted": False}))
    assert control.far() > 1e-5


@schedules
def test_equals_its_plain_loop_with_dropout(schedule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    network = {"build": "dropout_network:dropout", "arguments": {}, "cut": ["one"]}
    whole = small(job(schedule, {"network": network}, optimizer=OPTIMIZERS["adam"]))
    whole.run()
    assert LOOPS[schedule](whole).far() < 1e-10
    monkeypatch.setattr(Everything, "seed", lambda self, party, at, copy: torch.manual_seed(at))
    assert LOOPS[schedule](whole).far() > 1e-4


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_splitfed_v1_is_federated_averaging_bit_for_bit(dtype: str, optimizer: str) -> None:
    """Where sums are plain. Each site trains the whole network by itself for an epoch, then all are averaged.

    Both halves' weights are flat here, too: fused optimisers round the last few numbers of a tensor otherwise.
    """
    whole = small(job("splitfed_v1", optimizer=OPTIMIZERS[optimizer], dtype=dtype, sums="clear"))
    whole.run()
    sites, kind = Sites(whole, trunks=True), getattr(torch, dtype)
    nets = {s: [Segment(m, kind) for m in (sites.home[s]["bottom"], sites.trunks[s])] for s in SITES}
    made = {s: [optimizer_of(whole.job.training.optimizer)([half.flat]) for half in net] for s, net in nets.items()}
    for epoch in range(whole.job.training.epochs):
        rows = sites.rows(epoch)
        for site, (bottom, trunk) in nets.items():
            for batch in local_batches({site: SIZES[site]}, whole.job.training.batch):
                x, y = of(rows, batch, site)
                for half in (bottom, trunk):
                    half.clear()
                outputs = trunk.forward(bottom.forward(x, train=True), train=True)
                (nn.functional.cross_entropy(outputs, y, reduction="sum") / len(y)).backward()
                for each in made[site]:
                    each.step()
        for halves in zip(*nets.values(), strict=True):
            total = sum(SIZES[s] / TOTAL * half.weights() for s, half in zip(SITES, halves, strict=True))
            for half in halves:
                half.load(total)
    weights = weights_at(whole)
    for site, (bottom, trunk) in nets.items():
        assert torch.equal(weights[Copy("bottom", site)], bottom.weights())
        assert torch.equal(weights[Copy("trunk", site)], trunk.weights())
    whole = small(job("splitfed_v1", optimizer=OPTIMIZERS[optimizer], dtype=dtype))
    whole.run()
    assert not torch.equal(weights_at(whole)[Copy("bottom", "a")], weights[Copy("bottom", "a")])  # blind sums round


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("hand_over", ["at_once", "kept"])
def test_relay_is_one_network_bit_for_bit(
    dtype: str, optimizer: str, hand_over: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is summed in it. Both halves' weights are flat here, too."""
    terms = job("relay", relay={"hand_over": hand_over}, optimizer=OPTIMIZERS[optimizer], dtype=dtype)
    whole = small(terms)
    whole.run()
    sites, kind = Sites(whole), getattr(torch, dtype)
    bottom, trunk = halves = [Segment(m, kind) for m in (sites.home["a"]["bottom"], sites.trunks["a"])]
    made = [optimizer_of(terms.training.optimizer)([half.flat]) for half in halves]
    for epoch in range(terms.training.epochs):
        rows = sites.rows(epoch)
        for site in sorted(SITES, key=lambda site: -SIZES[site]):
            for batch in local_batches({site: SIZES[site]}, terms.training.batch):
                x, y = of(rows, batch, site)
                for half in halves:
                    half.clear()
                outputs = trunk.forward(bottom.forward(x, train=True), train=True)
                (nn.functional.cross_entropy(outputs, y, reduction="sum") / len(y)).backward()
                for each in made:
                    each.step()
    weights = weights_at(whole)
    assert torch.equal(weights[Copy("trunk")], trunk.weights())
    assert all(torch.equal(weights[Copy("bottom", site)], bottom.weights()) for site in SITES)
    monkeypatch.setattr(Worker, "_state_of", lambda self, copy: {n: 0 * t for n, t in state_of(self, copy).items()})
    forgetful = small(terms)
    forgetful.run()
    assert not torch.equal(weights_at(forgetful)[Copy("bottom", "a")], bottom.weights())


state_of = Worker._state_of


@schedules
def test_the_bits_do_not_depend_on_delivery(schedule: str) -> None:
    every = {"evaluation": {"every": 1, "trunk_travels": True}}
    for more in ({}, KEPT) if schedule == "relay" else ({},):
        other = job(schedule, every, epochs=2, batch=11, **more)
        same_bits_in_any_order(partial(small, job(schedule, every, epochs=2, **more)), 4, small(other))


@schedules
def test_the_best_is_kept_and_training_stops(schedule: str) -> None:
    every = {"evaluation": {"every": 1, "trunk_travels": True}}
    adam = OPTIMIZERS["adam"]
    stopped, last = (
        small(job(schedule, every, epochs=40, optimizer=adam, **t)) for t in ({"patience": 2}, {"keep": "last"})
    )
    for whole in (stopped, last):
        whole.run()
    steps = [len(whole.parties["server"].party.worker.losses) for whole in (stopped, last)]
    assert 0 < steps[0] < steps[1]
    for site in SITES[1:] if schedule != "splitfed_v3" else ():
        same = [
            w.parties[s].party.worker.segments[Copy("bottom", s)].weights() for s in ("a", site) for w in (stopped,)
        ]
        assert torch.equal(*same)
    scores = stopped.parties["a"].evaluations["scores"].all
    assert {part for part, _, _ in scores} == {"validation", "test"}


def test_a_hand_over_carries_the_optimizers_state_and_is_sealed() -> None:
    seen: set[tuple[str, ...]] = set()

    def tap(head: Any, letter: Any, tensors: Mapping[str, Tensor]) -> None:
        if letter.post.kind is LetterKind.STATE and head.to != "server":
            seen.add(tuple(name for name in tensors if name.startswith("optimizer.")))

    for optimizer, names in (
        ("adam", ("optimizer.exp_avg", "optimizer.exp_avg_sq", "optimizer.step")),
        ("momentum", ("optimizer.momentum_buffer",)),
    ):
        seen.clear()
        small(job("relay", optimizer=OPTIMIZERS[optimizer]), taps=dict.fromkeys(SITES, tap)).run()
        assert names in seen
    seen.clear()
    small(job("relay", optimizer={"name": "sgd", "lr": 0.1}), taps=dict.fromkeys(SITES, tap)).run()
    assert seen == {()}


def test_a_policy_asks_for_records_behind_a_hand_over() -> None:
    strict = msgspec.structs.replace(permissive("partway.model.zoo:mlp"), least_records_in_hand_over=5)
    with pytest.raises(Refused, match=r"c would hand .* weights that only 1 of its records stand behind"):
        small(job("relay"), policies={"b": strict}).run()


def test_what_one_step_has_learnt_is_handed_on_only_with_enough_records_behind_it() -> None:
    """Weights before and after a step differ by a gradient, or nearly: six inputs of records are solved for by 14."""
    terms = {"least_records_in_hand_over": 5, "solvable_sums": False}
    strict = msgspec.structs.replace(permissive("partway.model.zoo:mlp"), **terms)
    many = {"a": 40, "b": 40, "d": 20}
    one, two, solved = (
        small(job("relay", batch=10, relay={"turn_batches": turns}), many, policies={"b": policy})
        for turns, policy in ((1, strict), (2, strict), (1, permissive("partway.model.zoo:mlp")))
    )
    with pytest.raises(Refused, match=r"a would hand b weights that only 10 .*; 14 are needed behind one step: use"):
        one.run()
    two.run()
    solved.run()


def test_a_policy_asks_for_records_between_two_averages() -> None:
    """Weights one step apart give the step's gradient: as a sum of gradients, it must not be solvable for records."""
    allowed = permissive("partway.model.zoo:mlp")
    strict = msgspec.structs.replace(allowed, solvable_sums=False)  # 14 records of the others, with 6 inputs
    for every, batch in ((0, 12), (2, 23)):
        small(job("averaged", averaged={"every": every}, batch=batch), policies={"b": strict}).run()
    with pytest.raises(Refused, match=r"between some averages only \d records of the other .*; 14 are .* more seldom"):
        small(job("averaged", averaged={"every": 1}), policies={"b": strict}).run()
    many = msgspec.structs.replace(allowed, least_records_in_sum=50)
    with pytest.raises(Refused, match="averaged weights of only 49 records of the other sites"):
        small(job("averaged"), policies={"b": many}).run()


def test_the_last_average_of_an_epoch_is_made_once() -> None:
    def averages(every: int) -> int:
        whole = small(job("averaged", averaged={"every": every}))  # 8 steps in each of 4 epochs
        whole.run()
        return sum(("weights", "bottom") in t.sums for t in whole.parties["a"].party.session.turns)

    assert [averages(every) for every in (0, 1, 3, 4)] == [4, 32, 12, 8]


def test_where_only_the_server_s_trunks_are_averaged_no_site_hides_behind_others() -> None:
    """In `splitfed_v3` nothing of a bottom is summed, so the records behind such sums are not asked for."""
    strict = msgspec.structs.replace(permissive("partway.model.zoo:mlp"), least_records_in_sum=50)
    small(job("splitfed_v3"), policies={"b": strict}).run()
    with pytest.raises(Refused, match="averaged weights of only 49 records of the other sites"):
        small(job("splitfed_v1"), policies={"b": strict}).run()


def test_each_site_has_a_network_of_its_own_in_splitfed_v3() -> None:
    terms = {"evaluation": {"every": 1, "trunk_travels": True}, "result": {"trunk": "everyone"}}
    whole = small(job("splitfed_v3", terms))
    whole.run()
    weights = together(whole, 0.0).weights
    assert {name.split(".")[1] for name in weights if name.startswith("sites.")} == {*SITES}
    first = [weights[f"sites.{site}.hidden.0.weight"] for site in SITES]
    assert not any(torch.equal(first[0], other) for other in first[1:])
    trunk = [weights[f"sites.{site}.output.weight"] for site in SITES]
    assert all(torch.equal(trunk[0], other) for other in trunk[1:])


def test_jobs_that_cannot_be() -> None:
    with pytest.raises(ConfigError, match="no meaning in splitfed_v3: each site has its own"):
        job("splitfed_v3", {"result": {"bottom": "everyone"}})
    with pytest.raises(ConfigError, match="has no key `turns`"):
        job("relay", relay={"turns": 2})
    with pytest.raises(ConfigError):
        job("relay", relay={"order": "ascending"})
