"""Each option of training, alone and all together, against a plain loop over pooled records that a reader can check."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import replace
from typing import Any

import msgspec
import pytest
import torch
from torch import Tensor, nn
from torch.optim import lr_scheduler as torch_rates

from federations import SITES, SIZES, bits, difference, job_of, records_of, same_bits_in_any_order, small
from federations import pooled as as_planned
from partway import blueprint
from partway.equality import _Plain
from partway.errors import ConfigError, JobFailed, PeerError, Refused
from partway.model.segment import initialise
from partway.plan import schedules
from partway.plan.configurations import vanilla
from partway.plan.phases import Schedule, Settings
from partway.plan.plan import EACH, Copy, Plan, Turn
from partway.plan.rate import Rate, factor
from partway.policy import others
from partway.protocol.messages import LetterKind, Post
from partway.simulation import Federation, federation, permissive
from partway.train.draws import first_weights, forward_seed
from partway.train.source import RecordSource
from partway.train.worker import Worker
from partway.transport.memory import Wire

OPTIMIZERS: dict[str, dict[str, Any]] = {
    "momentum": {"name": "sgd", "lr": 0.05, "momentum": 0.9},
    "adam": {"name": "adam", "lr": 0.01},
    "adamw": {"name": "adamw", "lr": 0.01},
}
MAKE: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "momentum": lambda parameters, **more: torch.optim.SGD(parameters, lr=0.05, momentum=0.9, **more),
    "adam": lambda parameters, **more: torch.optim.Adam(parameters, lr=0.01, **more),
    "adamw": lambda parameters, **more: torch.optim.AdamW(parameters, lr=0.01, **{"weight_decay": 0.0, **more}),
}
configurations = pytest.mark.parametrize("configuration", ["vanilla", "u_shaped"])
optimizers = pytest.mark.parametrize("optimizer", OPTIMIZERS)
Batch = tuple[Tensor, Tensor]


def ran(sections: Any = None, sizes: Any = SIZES, **training: Any) -> Federation:
    whole = small(job_of(sections, **training), sizes)
    whole.run()
    return whole


def unsplit(whole: Federation) -> _Plain:
    """The whole network with its first weights, and everybody's records."""
    sources = {site: whole.parties[site].party.worker.source for site in whole.job.sites}
    records = {site: source.records for site, source in sources.items() if isinstance(source, RecordSource)}
    plain = _Plain(whole.job, whole.digest, whole.secrets, records, "server")
    for name, module in plain.network.modules.items():
        owner = whole.job.sites[0] if name in plain.at_sites else "server"
        initialise(module, first_weights(whole.secrets[owner], whole.digest, name))
    return plain


# -- pooled training, one batch after the other


def pooled(
    whole: Federation,
    optimizer: Callable[..., torch.optim.Optimizer],
    rate: Callable[[torch.optim.Optimizer, int], Any] = lambda made, steps: torch_rates.ConstantLR(made, 1.0),
    clip: Callable[[nn.Module, dict[str, nn.Sequential]], object] = lambda network, pieces: None,
) -> tuple[nn.Module, list[float]]:
    """One network, one optimiser, whole union batches of pooled records."""
    plain = unsplit(whole)
    network, losses = plain.network.whole.train(), []
    batches = [batch for epoch in range(whole.job.training.epochs) for batch in plain.union_batches(epoch)]
    made = optimizer(list(network.parameters()))
    rates = rate(made, len(batches))
    for x, y in batches:
        made.zero_grad()
        loss = nn.functional.cross_entropy(network(x), y, weight=plain.weights, reduction="sum") / len(y)
        loss.backward()
        clip(network, plain.network.modules)
        made.step()
        rates.step()
        losses.append(float(loss.detach()))
    return network, losses


def told(whole: Federation) -> list[float]:
    """The loss of each step, from all who have a part of it."""
    parts = {name: iter(a.party.worker.losses) for name, a in whole.parties.items() if a.party.worker.losses}
    steps = [turn for turn in whole.parties["server"].party.session.turns if turn.train]
    live = [{lane for rows in turn.rows for lane, n in rows.items() if n} | {"server"} for turn in steps]
    return [float(sum(next(part) for name, part in parts.items() if name in lanes)) for lanes in live]


def equal(whole: Federation, network: nn.Module, losses: list[float]) -> bool:
    said = told(whole)
    assert len(said) == len(losses) > 10
    return difference(whole, network) < 1e-10 and max(abs(a - b) for a, b in zip(said, losses, strict=True)) < 1e-10


def clipped(most: float) -> Callable[[nn.Module, Any], object]:
    return lambda network, pieces: nn.utils.clip_grad_norm_(network.parameters(), most)


# -- learning rates


def warm_cosine(made: torch.optim.Optimizer, steps: int, warm_up: int = 5, final: float = 0.1) -> Any:
    lr = made.param_groups[0]["lr"]
    after = torch_rates.CosineAnnealingLR(made, steps - warm_up, eta_min=final * lr)
    return after if not warm_up else warmed(made, warm_up, after)


def warmed(made: torch.optim.Optimizer, warm_up: int, after: Any) -> Any:
    rising = torch_rates.LinearLR(made, start_factor=1 / warm_up, total_iters=warm_up - 1)
    return torch_rates.SequentialLR(made, [rising, after], milestones=[warm_up])


RATES: dict[str, tuple[dict[str, Any], Callable[[torch.optim.Optimizer, int], Any]]] = {
    "warm-up": ({"warm_up": 5}, lambda made, steps: torch_rates.LinearLR(made, 1 / 5, total_iters=4)),
    "cosine": ({"then": "cosine"}, lambda made, steps: warm_cosine(made, steps, 0, 0.0)),
    "warm-up, cosine": ({"warm_up": 5, "then": "cosine", "final": 0.1}, warm_cosine),
    "warm-up, linear": (
        {"warm_up": 3, "then": "linear", "final": 0.2},
        lambda made, steps: warmed(made, 3, torch_rates.LinearLR(made, 1.0, 0.2, steps - 3)),
    ),
    "steps": (
        {"then": "steps", "milestones": [4, 9], "factor": 0.3},
        lambda made, steps: torch_rates.MultiStepLR(made, [4, 9], 0.3),
    ),
}


@configurations
@optimizers
@pytest.mark.parametrize("name", RATES)
def test_learning_rates_are_torch_s(name: str, optimizer: str, configuration: str) -> None:
    rate, theirs = RATES[name]
    whole = ran(configuration=configuration, optimizer=OPTIMIZERS[optimizer], rate=rate, epochs=3)
    assert equal(whole, *pooled(whole, MAKE[optimizer], theirs))
    constant, _ = pooled(whole, MAKE[optimizer])
    assert difference(whole, constant) > 1e-4
    later, _ = pooled(whole, MAKE[optimizer], lambda made, steps: theirs(made, steps + 9))
    if name in ("cosine", "warm-up, cosine", "warm-up, linear"):
        assert difference(whole, later) > 1e-5  # of other total steps


@pytest.mark.parametrize("name", RATES)
def test_a_factor_is_a_function_of_the_step_alone(name: str) -> None:
    rate, theirs = RATES[name]
    mine = Rate(**{key: tuple(v) if isinstance(v, list) else v for key, v in rate.items()})
    for steps in (12, 100, 1001):
        made = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
        scheduler = theirs(made, steps)
        for step in range(steps):
            assert factor(mine, step, steps) == pytest.approx(made.param_groups[0]["lr"], abs=1e-12)
            made.step()
            scheduler.step()


def test_the_cosine_of_a_factor_is_that_of_any_library() -> None:
    for step in range(1000):
        ours = factor(Rate(then="cosine"), step, 1000)
        assert ours == pytest.approx((1 + math.cos(math.pi * step / 1000)) / 2, abs=2e-15)


HALF = {"rounds": 2, "local_epochs": 2, "batch": 8, "optimizer": OPTIMIZERS["momentum"], "synchronous_epochs": 2}


def turns_of(whole: Federation) -> tuple[Turn, ...]:
    return whole.parties["server"].party.session.turns


def test_the_rate_of_half_trained_goes_over_the_steps_of_the_main_optimizer() -> None:
    rate = {"warm_up": 4, "then": "cosine"}
    whole = ran(schedule="half_trained", half_trained=HALF, rate=rate, epochs=3)
    local = [turn.rate for turn in turns_of(whole) if turn.train and turn.optimizer == "local"]
    main = [turn.rate for turn in turns_of(whole) if turn.train and turn.optimizer == "main"]
    assert set(local) == {1.0}
    assert main == [factor(Rate(warm_up=4, then="cosine"), step, len(main)) for step in range(len(main))]


def test_an_early_stop_changes_no_rate() -> None:
    """Until it stops, a run goes on as one of the full length, and not as one that was planned so short."""
    whole = ran(
        {"evaluation": {"every": 1}}, patience=2, epochs=40, rate={"then": "cosine"}, optimizer=OPTIMIZERS["adam"]
    )
    losses = [float(loss) for loss in whole.parties["server"].party.worker.losses]
    assert 12 < len(losses) < 40 * 6
    _, full = pooled(whole, MAKE["adam"], RATES["cosine"][1])
    assert losses == pytest.approx(full[: len(losses)], abs=1e-10)
    _, short = pooled(whole, MAKE["adam"], lambda made, _: RATES["cosine"][1](made, len(losses)))
    assert losses != pytest.approx(short[: len(losses)], abs=1e-4)


# -- clipping


@configurations
@optimizers
def test_clips_by_the_global_norm(configuration: str, optimizer: str) -> None:
    whole = ran(configuration=configuration, optimizer=OPTIMIZERS[optimizer], clip_norm=0.2, epochs=3)
    assert equal(whole, *pooled(whole, MAKE[optimizer], clip=clipped(0.2)))

    def each(network: nn.Module, pieces: dict[str, nn.Sequential]) -> None:
        for piece in pieces.values():
            nn.utils.clip_grad_norm_(piece.parameters(), 0.2)

    apart, _ = pooled(whole, MAKE[optimizer], clip=each)
    assert difference(whole, apart) > 1e-5
    unclipped, _ = pooled(whole, MAKE[optimizer])
    assert difference(whole, unclipped) > 1e-4


def test_who_tells_squares() -> None:
    """Of what is summed one site, of the rest its holder; in local and in the server's own epochs no letter crosses."""
    told_by: dict[str, set[tuple[str, str]]] = {}
    for configuration in ("vanilla", "u_shaped"):
        nets = ran(configuration=configuration, clip_norm=0.2).parties["a"].party.session.nets
        letters = [(post, route) for net in nets for post, route in net.letters.items()]
        told_by[configuration] = {(r.sender, r.receiver) for p, r in letters if p.kind is LetterKind.SQUARE}
        assert {r.receiver for p, r in letters if p.kind is LetterKind.NORM} == set(SITES)
    assert told_by["vanilla"] == told_by["u_shaped"] == {("a", "server")}
    half = ran(schedule="half_trained", half_trained=HALF, clip_norm=0.2)
    session = half.parties["a"].party.session
    kinds = {
        turn.flow: {post.kind for post in net.letters}
        for turn, net in zip(session.turns, session.nets, strict=True)
        if turn.train
    }
    assert kinds["local"] == kinds["finish"] == set()
    assert {LetterKind.SQUARE, LetterKind.NORM} <= kinds["split"]


@pytest.mark.parametrize("unclipped", [0, 83, 63, 119])
def test_each_phase_of_half_trained_clips_its_own_norm(unclipped: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A site's step by the norm of bottom and local head (83 numbers), the server's by its trunk's (63), a step
    together by that of both (119). Left out in any one phase, it differs."""
    whole = ran(schedule="half_trained", half_trained=HALF, optimizer=OPTIMIZERS["adam"], clip_norm=0.2, epochs=3)

    def step(network: nn.Module, made: torch.optim.Optimizer, batch: Batch, weights: None) -> float:
        made.zero_grad()
        loss = nn.functional.cross_entropy(network(batch[0]), batch[1])
        loss.backward()
        if sum(p.numel() for p in network.parameters()) != unclipped:
            nn.utils.clip_grad_norm_(network.parameters(), 0.2)
        made.step()
        return float(loss.detach())

    monkeypatch.setattr("partway.equality.step", step)
    network, _ = as_planned(whole)
    if unclipped:
        assert difference(whole, network) > 1e-5
    else:
        assert difference(whole, network) < 1e-10


def private(plan: Plan, settings: Settings) -> tuple[Plan, Schedule]:
    """`synchronous` in which no gradient of a bottom is summed."""
    whole, schedule = schedules.synchronous(plan, settings)
    return whole, lambda sizes: tuple(replace(t, sums=() if t.train else t.sums, equal=()) for t in schedule(sizes))


def test_of_private_copies_each_tells_its_squares(monkeypatch: pytest.MonkeyPatch) -> None:
    """A bottom and an optimiser a site, one trunk on the union batch, one norm over all of them."""
    monkeypatch.setitem(schedules.SCHEDULES, "synchronous", private)
    whole = ran(optimizer=OPTIMIZERS["adam"], clip_norm=0.2, epochs=3)
    tellers = {
        route.sender
        for net in whole.parties["a"].party.session.nets
        for post, route in net.letters.items()
        if post.kind is LetterKind.SQUARE
    }
    assert tellers == set(SITES)

    def loop(clip: Callable[[list[nn.Module]], object]) -> float:
        plain = unsplit(whole)
        trunk = plain.network.modules["trunk"]
        bottoms = {site: deepcopy(plain.network.modules["bottom"]) for site in SITES}
        made = {name: MAKE["adam"](list(m.parameters())) for name, m in {**bottoms, "server": trunk}.items()}
        for turn in (turn for turn in turns_of(whole) if turn.train):
            (rows,), (offsets,) = turn.rows, turn.offsets
            live = [site for site in SITES if rows[site]]
            batch = {site: plain.rows(site, "train", turn.epoch) for site in live}
            where = {site: slice(offsets[site], offsets[site] + rows[site]) for site in live}
            x = torch.cat([bottoms[site](batch[site][0][where[site]]) for site in live])
            y = torch.cat([batch[site][1][where[site]] for site in live])
            for each in made.values():
                each.zero_grad()
            nn.functional.cross_entropy(trunk(x), y).backward()
            clip([trunk, *bottoms.values()])
            for name in (*live, "server"):
                made[name].step()
        weights = {c: s.weights() for a in whole.parties.values() for c, s in a.party.worker.segments.items()}
        expected = {Copy("trunk"): trunk, **{Copy("bottom", site): bottom for site, bottom in bottoms.items()}}
        flat = {c: nn.utils.parameters_to_vector(module.parameters()).detach() for c, module in expected.items()}
        return max(float((weights[c] - flat[c]).abs().max()) for c in expected)

    def of_all(modules: list[nn.Module]) -> None:
        nn.utils.clip_grad_norm_([p for m in modules for p in m.parameters()], 0.2)

    def of_each(modules: list[nn.Module]) -> None:
        for module in modules:
            nn.utils.clip_grad_norm_(module.parameters(), 0.2)

    assert loop(of_all) < 1e-10
    assert loop(of_each) > 1e-5


@pytest.mark.parametrize("precision", ["full", "float16"])
def test_lanes_that_nothing_joins_have_a_norm_each(precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A bottom and a trunk a site, all trunks at the server: each pair is clipped, and skips, by itself."""

    def a_trunk_a_site(sites: Sequence[str], server: str = "server") -> Plan:
        plan = vanilla(sites, server)
        return replace(plan, segments=tuple(replace(s, copies=EACH) if s.name == "trunk" else s for s in plan.segments))

    def apart(plan: Plan, settings: Settings) -> tuple[Plan, Schedule]:
        whole, schedule = private(plan, settings)
        return whole, lambda sizes: tuple(replace(t, divisor=None) if t.train else t for t in schedule(sizes))

    monkeypatch.setattr(blueprint, "vanilla", a_trunk_a_site)
    monkeypatch.setitem(schedules.SCHEDULES, "synchronous", apart)
    half = torch.float16 if precision == "float16" else None
    records = {site: records_of(site, n) for site, n in SIZES.items()}
    records["b"].features.mul_(300.0 if half else 1.0)
    training = {"clip_norm": 0.2, "optimizer": OPTIMIZERS["adam"], "epochs": 3, "precision": precision}
    job = job_of({"evaluation": {"trunk_travels": False}}, dtype="float32" if half else "float64", **training)
    whole = federation(job, records)
    whole.run()

    copies = {c: s for a in whole.parties.values() for c, s in a.party.worker.segments.items()}
    scales = {lane: scale.value for (_, lane), scale in whole.parties["server"].party.worker._scales.items()}

    def loop(clip: bool) -> float:
        plain, worst = unsplit(whole), 0.0
        initialise(plain.network.modules["trunk"], first_weights(whole.secrets["server"], whole.digest, "trunk"))
        for site in SITES:
            network = deepcopy(plain.network.whole)
            made, scaler = MAKE["adam"](list(network.parameters())), torch.amp.GradScaler("cpu", enabled=bool(half))
            for turn in (turn for turn in turns_of(whole) if turn.train and turn.rows[0][site]):
                where = slice(turn.offsets[0][site], turn.offsets[0][site] + turn.rows[0][site])
                x, y = plain.rows(site, "train", turn.epoch)
                made.zero_grad()
                with torch.autocast("cpu", half, enabled=bool(half)):
                    out = network(x[where])
                scaler.scale(nn.functional.cross_entropy(out.to(x.dtype), y[where])).backward()
                scaler.unscale_(made)
                if clip:
                    nn.utils.clip_grad_norm_(network.parameters(), 0.2)
                scaler.step(made)
                scaler.update()
            flat = nn.utils.parameters_to_vector(network.parameters()).detach()  # bottom, then trunk
            own = torch.cat([copies[Copy("bottom", site)].weights(), copies[Copy("trunk", site)].weights()])
            worst = max(worst, float((own - flat).abs().max()))
            if half:
                assert scales[site] == scaler.get_scale()
        return worst

    assert loop(clip=True) < (A_ROUNDING if half else 1e-10)
    if half:
        assert scales["b"] < min(scale for site, scale in scales.items() if site != "b")
    else:
        assert loop(clip=False) > 1e-4


# -- micro-batches


@configurations
@optimizers
@pytest.mark.parametrize("most", [1, 5, 7])
def test_micro_batches_are_one_big_batch(configuration: str, optimizer: str, most: int) -> None:
    whole = ran(configuration=configuration, optimizer=OPTIMIZERS[optimizer], micro_batch=most, epochs=3)
    steps = [turn for turn in turns_of(whole) if turn.train]
    assert max(sum(rows.values()) for turn in steps for rows in turn.rows) == most
    assert max(len(turn.rows) for turn in steps) == -(-15 // most)  # 89 records in 6 equal batches
    assert equal(whole, *pooled(whole, MAKE[optimizer]))
    small_batches, _ = pooled(small(job_of(configuration=configuration, batch=most, epochs=3)), MAKE[optimizer])
    assert difference(whole, small_batches) > 1e-4  # an update a micro-batch


def test_each_site_cuts_its_own_local_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = ran(schedule="half_trained", half_trained=HALF, optimizer=OPTIMIZERS["adam"], micro_batch=3)
    local = [turn for turn in turns_of(whole) if turn.flow == "local"]
    assert max(n for turn in local for rows in turn.rows for n in rows.values()) == 3
    assert max(sum(rows.values()) for turn in local for rows in turn.rows) > 3
    network, losses = as_planned(whole)
    assert difference(whole, network) < 1e-10
    server = [float(x) for x in whole.parties["server"].party.worker.losses]
    assert server == pytest.approx(losses, abs=1e-10)


@configurations
def test_the_bits_do_not_depend_on_delivery(configuration: str) -> None:
    job = job_of(configuration=configuration, **TOGETHER)
    other = job_of(configuration=configuration, **{**TOGETHER, "micro_batch": 4})
    same_bits_in_any_order(lambda: small(job), 10, small(other))


def test_what_hides_a_record_is_the_whole_step() -> None:
    """A policy counts the records of a step, not of a micro-batch: a sum is over all of them."""
    fewest = min(others(turn.rows[0]) for turn in turns_of(ran()) if turn.train)
    policy = msgspec.structs.replace(permissive("partway.model.zoo:mlp"), least_records_in_sum=fewest)
    assert fewest > 4
    small(job_of(micro_batch=4), policies={"a": policy}).run()
    strict = msgspec.structs.replace(policy, least_records_in_sum=fewest + 1)
    with pytest.raises(Refused, match=f"only {fewest} records of the other sites"):
        small(job_of(micro_batch=4), policies={"a": strict}).run()


# -- all together


TOGETHER: dict[str, Any] = {
    "rate": {"warm_up": 4, "then": "cosine", "final": 0.05},
    "clip_norm": 0.3,
    "micro_batch": 6,
    "optimizer": {"name": "adamw", "lr": 0.01, "weight_decay": 0.1},
    "class_weights": "sqrt",
}
DROPOUT = {"network": {"build": "dropout_network:dropout", "arguments": {}, "cut": ["one"]}}
DROPOUT_U = {"network": {**DROPOUT["network"], "cut": ["one", "two"]}}


def drawn(
    whole: Federation, warm_up: int = 4, clip: float = 0.3, weight_decay: float = 0.1, seeds: int = 0
) -> nn.Module:
    """The same, with the dropout of each piece drawn as its party draws it: by turn, micro-batch and copy."""
    plain = unsplit(whole)
    network, pieces = plain.network.whole.train(), plain.network.modules

    def through(name: str, lane: str, x: Tensor, turn: int, m: int) -> Tensor:
        party = lane or "server"
        torch.manual_seed(forward_seed(whole.secrets[party], whole.digest, turn + seeds, m, Copy(name, lane)))
        return pieces[name](x)

    made = torch.optim.AdamW(network.parameters(), lr=0.01, weight_decay=weight_decay)
    steps = [(number, turn) for number, turn in enumerate(turns_of(whole)) if turn.train]
    rates = warm_cosine(made, len(steps), warm_up, 0.05)
    for number, turn in steps:
        made.zero_grad()
        for m, (rows, offsets) in enumerate(zip(turn.rows, turn.offsets, strict=True)):
            own = {site: plain.rows(site, "train", turn.epoch) for site, n in rows.items() if n}
            batch = {s: (x[(o := offsets[s]) : o + rows[s]], y[o : o + rows[s]]) for s, (x, y) in own.items()}
            bottom = [through("bottom", site, x, number, m) for site, (x, _) in batch.items()]
            out = through("trunk", "", torch.cat(bottom), number, m)
            if "head" in pieces:
                parts = out.split([len(y) for _, y in batch.values()])
                out = torch.cat([through("head", s, part, number, m) for s, part in zip(batch, parts, strict=True)])
            labels = torch.cat([y for _, y in batch.values()])
            records = sum(sum(r.values()) for r in turn.rows)
            loss = nn.functional.cross_entropy(out, labels, weight=plain.weights, reduction="sum") / records
            loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), clip)
        made.step()
        rates.step()
    return network


@configurations
def test_all_together(configuration: str) -> None:
    sections = DROPOUT_U if configuration == "u_shaped" else DROPOUT
    job = job_of(sections, configuration=configuration, epochs=6, **TOGETHER)
    whole = small(job, policies=None)
    whole.run()
    assert difference(whole, drawn(whole)) < 1e-10
    for left_out in ({"warm_up": 0}, {"clip": math.inf}, {"weight_decay": 0.0}, {"seeds": 1}):
        assert difference(whole, drawn(whole, **left_out)) > 1e-4, left_out


@configurations
@optimizers
def test_weight_decay(configuration: str, optimizer: str) -> None:
    decayed = {**OPTIMIZERS[optimizer], "weight_decay": 0.1}
    whole = ran(configuration=configuration, optimizer=decayed, epochs=3)
    assert equal(whole, *pooled(whole, lambda parameters: MAKE[optimizer](parameters, weight_decay=0.1)))
    without, _ = pooled(whole, MAKE[optimizer])
    assert difference(whole, without) > 1e-4


def test_ledgers_say_how_many_squares_and_norms_left() -> None:
    whole = ran(clip_norm=0.2)
    steps = len([turn for turn in turns_of(whole) if turn.train])
    left = {
        party: {edge: count.frames for edge, count in a.ledger.totals.items()} for party, a in whole.parties.items()
    }
    assert left["a"]["SQUARE a -> server", "server"] == steps
    assert [left["server"]["NORM server -> " + site, site] for site in SITES] == [steps] * 5
    assert not any(edge.startswith("SQUARE") for edge, _ in left["b"])


# -- mixed precision


def scaled(sections: Any = None, sizes: Any = SIZES, factor: float = 1.0, **training: Any) -> Federation:
    """A run in a half precision, of records whose features are multiplied by a factor."""
    records = {site: records_of(site, n) for site, n in sizes.items()}
    for own in records.values():
        own.features.mul_(factor)
    whole = federation(job_of(sections, dtype="float32", **training), records)
    whole.run()
    return whole


A_ROUNDING = 2e-5
"""Mostly they differ by 1e-8. On some CPUs float32 rounds by where it lies in memory; where that tips a number over to
the next one in half precision, a step of the optimiser differs by as much."""


def autocast(
    whole: Federation,
    optimizer: Callable[..., torch.optim.Optimizer],
    half: torch.dtype,
    scaling: bool = True,
    clip: float = math.inf,
) -> tuple[nn.Module, list[float]]:
    """The unsplit network under torch's own autocast and GradScaler; and the scale after each step."""
    plain = unsplit(whole)
    network, scales = plain.network.whole.train(), []
    made = optimizer(list(network.parameters()))
    scaler = torch.amp.GradScaler("cpu", enabled=scaling)
    for epoch in range(whole.job.training.epochs):
        for x, y in plain.union_batches(epoch):
            made.zero_grad()
            with torch.autocast("cpu", half):
                out = network(x)
            scaler.scale(nn.functional.cross_entropy(out.float(), y)).backward()
            scaler.unscale_(made)
            nn.utils.clip_grad_norm_(network.parameters(), clip)
            scaler.step(made)
            scaler.update()
            scales.append(scaler.get_scale())
    return network, scales


ALONE = {"a": 40}


def scale_of(whole: Federation, party: str) -> float:
    (scale,) = whole.parties[party].party.worker._scales.values()
    return scale.value


@configurations
@optimizers
@pytest.mark.parametrize("half", ["bfloat16", "float16"])
def test_a_half_precision_is_torch_s(half: str, optimizer: str, configuration: str) -> None:
    """One site, so that no sum has another order."""
    whole = scaled(sizes=ALONE, configuration=configuration, optimizer=OPTIMIZERS[optimizer], precision=half, epochs=8)
    kind = getattr(torch, half)
    network, _ = autocast(whole, MAKE[optimizer], kind, half == "float16")
    assert difference(whole, network) < A_ROUNDING
    full, _ = autocast(whole, MAKE[optimizer], torch.bfloat16 if half == "float16" else torch.float16)
    assert difference(whole, full) > 5 * A_ROUNDING


def test_what_crosses_the_cut_is_in_half_precision() -> None:
    seen: dict[LetterKind, set[torch.dtype]] = {}

    def tap(head: Any, letter: Any, tensors: dict[str, Tensor]) -> None:
        for tensor in tensors.values():
            seen.setdefault(letter.post.kind, set()).add(tensor.dtype)

    job = job_of(dtype="float32", precision="bfloat16")
    whole = small(job, taps=dict.fromkeys([*SITES, "server"], tap))
    whole.run()
    assert seen[LetterKind.ACTIVATIONS] == seen[LetterKind.GRADIENT] == {torch.bfloat16}
    assert seen[LetterKind.STATE] == {torch.float32}


def test_a_piece_that_keeps_its_type_keeps_half() -> None:
    """A trunk that is a ReLU: what it gives is of the type that it gets."""
    cuts = {"network": {"cut": ["hidden.0", "hidden.1"]}}
    whole = scaled(cuts, ALONE, configuration="u_shaped", optimizer=OPTIMIZERS["adam"], precision="bfloat16", epochs=4)
    assert whole.parties["a"].party.worker.shapes.pieces["trunk"].dtype is torch.bfloat16
    network, _ = autocast(whole, MAKE["adam"], torch.bfloat16, scaling=False)
    assert difference(whole, network) < A_ROUNDING


@configurations
@pytest.mark.parametrize("clip_norm", [0.0, 0.5])
def test_a_step_that_overflows_is_skipped(configuration: str, clip_norm: float) -> None:
    """Features so large that at the first scale gradients overflow float16."""
    training: dict[str, Any] = {"configuration": configuration, "optimizer": OPTIMIZERS["adam"], "clip_norm": clip_norm}
    whole = scaled(sizes=ALONE, factor=300.0, precision="float16", epochs=8, **training)
    network, scales = autocast(whole, MAKE["adam"], torch.float16, clip=clip_norm or math.inf)
    assert scales[0] == 32768
    assert scales[-1] == scale_of(whole, "a") == scale_of(whole, "server")
    assert scales[-1] == scales[-2]  # it does not only skip
    assert difference(whole, network) < A_ROUNDING
    without, _ = autocast(whole, MAKE["adam"], torch.float16, scaling=False, clip=clip_norm or math.inf)
    assert not difference(whole, without) < 1e-4


@configurations
@pytest.mark.parametrize("sums", ["blind", "clear"])
def test_every_party_skips_the_same_steps(configuration: str, sums: str) -> None:
    """Five sites, of which one overflows: nobody updates, and every one has the scale that a GradScaler would."""
    records = {site: records_of(site, n) for site, n in SIZES.items()}
    records["b"].features.mul_(300.0)
    job = job_of(dtype="float32", precision="float16", configuration=configuration, sums=sums, epochs=3)
    whole = federation(job, records)
    moved: dict[str, list[bool]] = {name: moves_of(a.party.worker) for name, a in whole.parties.items()}
    whole.run()
    steps = len([turn for turn in turns_of(whole) if turn.train])
    skipped = moved["server"].count(False)
    assert 0 < skipped < steps == len(moved["server"])
    for party, moves in moved.items():
        assert moves == moved["server"], party
        assert scale_of(whole, party) == 65536 / 2**skipped
    shuffled = federation(job, records)
    shuffled.run(Wire(3))
    assert bits(shuffled) == bits(whole)


def moves_of(worker: Worker) -> list[bool]:
    """For each update of a party, as it comes: whether its weights have changed."""
    moved, update = [], worker._update

    def watched(unit: Copy, takes: Sequence[Post]) -> None:
        before = [segment.weights() for segment in worker.segments.values()]
        update(unit, takes)
        after = [segment.weights() for segment in worker.segments.values()]
        moved.append(not all(map(torch.equal, before, after)))

    worker._update = watched  # type: ignore[method-assign]
    return moved


def test_who_has_no_records_in_a_step_knows_its_outcome_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Private heads, each with a loss of its own: they must have one scale, for one trunk gets all their gradients."""
    monkeypatch.setitem(schedules.SCHEDULES, "synchronous", private)
    records = {site: records_of(site, n) for site, n in SIZES.items()}
    records["b"].features.mul_(300.0)
    whole = federation(job_of(dtype="float32", precision="float16", configuration="u_shaped"), records)
    whole.run()
    assert any(not rows["c"] for turn in turns_of(whole) if turn.train for rows in turn.rows)
    (scale,) = {scale_of(whole, party) for party in whole.parties}
    assert scale < 65536


def test_an_overflow_lays_no_other_site_s_share_open() -> None:
    """In place of a share that is not finite go random words: else the sum would be that of fewer sites."""
    records = {site: records_of(site, n) for site, n in SIZES.items()}
    records["b"].features.mul_(300.0)
    whole = federation(job_of(dtype="float32", precision="float16", epochs=1), records)
    totals: list[float] = []
    worker = whole.parties["a"].party.worker
    load = worker._load

    def kept(copy: Copy, takes: Any) -> None:
        load(copy, takes)
        if copy in worker.segments and (gradient := worker.segments[copy].gradient()) is not None:
            totals.append(float(gradient.abs().max()))

    worker._load = kept  # type: ignore[method-assign]
    whole.run()
    assert max(totals) > 1e5
    assert min(totals) < 1e4


def test_averages_and_local_epochs_in_half_precision() -> None:
    """Each site has a scale of its own in local epochs, and all one afterwards."""
    half = {**HALF, "synchronous_epochs": 1}
    whole = scaled(schedule="half_trained", half_trained=half, precision="float16", factor=300.0)
    for party, assembled in whole.parties.items():
        lanes = {key for key in assembled.party.worker._scales if key[0] == "main"}
        assert lanes == {("main", "")}, party
    assert len({a.party.worker._scales["main", ""].value for a in whole.parties.values()}) == 1


# -- jobs that cannot be


@pytest.mark.parametrize(
    ("training", "words"),
    [
        ({"precision": "bfloat16", "dtype": "float64"}, "precision = `bfloat16` needs dtype = `float32`"),
        ({"rate": {"then": "steps"}}, "milestones and then = `steps` go together"),
        ({"rate": {"milestones": [3]}}, "milestones and then = `steps` go together"),
        ({"rate": {"then": "steps", "milestones": [5, 3]}}, "milestones rise, and none is within warm_up"),
        ({"rate": {"then": "steps", "milestones": [5], "warm_up": 9}}, "milestones rise, and none is within warm_up"),
        ({"rate": {"then": "constant", "final": 0.5}}, "final is of `cosine` and `linear`; then is `constant`"),
        ({"rate": {"warmup": 5}}, "has no key `warmup`; did you mean `warm_up`?"),
        ({"batch": 640, "micro_batch": 10}, "micro_batch must be 20 or more for a batch of 640"),
        ({"clip_norm": -1.0}, "at `training.clip_norm`"),
    ],
)
def test_a_wrong_option_gets_one_clear_line(training: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        job_of(**training)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_gradient_that_is_not_finite_ends_a_run_in_full_precision() -> None:
    wild = {"name": "sgd", "lr": 1000.0, "momentum": 0.9}
    with pytest.raises(JobFailed, match="a gradient holds NaN or infinite numbers; lower the learning rate"):
        ran(schedule="half_trained", half_trained={**HALF, "local_epochs": 60, "optimizer": wild}, clip_norm=1e300)


def test_only_where_the_loss_is_scaled_may_a_party_say_skip() -> None:
    whole = small(job_of(clip_norm=1.0))
    worker = whole.parties["a"].party.worker
    square = worker._square

    def skip(unit: Copy, takes: Sequence[Post]) -> None:
        square(unit, takes)
        worker._made[LetterKind.SQUARE, unit]["x"].fill_(-1.0)

    worker._square = skip  # type: ignore[method-assign]
    with pytest.raises(PeerError, match=r"a: told SQUARE a@a -> server as a negative number"):
        whole.run()


def test_batchnorm_and_micro_batches_do_not_go_together() -> None:
    """The server's own BatchNorm is allowed otherwise: it sees whole union batches."""
    job = {"network": {"build": "dropout_network:batchnorm", "arguments": {}, "cut": ["one"]}}
    small(job_of(job))
    with pytest.raises(Refused, match=r"the trunk has BatchNorm at .* differ in each micro-batch; .*group_norm"):
        small(job_of(job, micro_batch=4))
