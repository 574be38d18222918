"""Schedules: each is one function, (plan, settings) -> the plan with the flows it needs, and sizes -> turns."""

from __future__ import annotations

from dataclasses import replace

from partway.errors import PlanError
from partway.plan.batches import equal_parts
from partway.plan.configurations import chain
from partway.plan.phases import (
    HELD,
    LOCAL_HEAD,
    SHELF,
    Schedule,
    Settings,
    apart,
    at_sites,
    begin,
    by_themselves,
    central,
    checked,
    end,
    finish,
    judged,
    of,
    records_of,
    release,
    renamed,
    same_counts,
    there,
    together,
    with_counts,
)
from partway.plan.plan import ONE, Copy, Edge, Judge, Plan, Segment, Sizes, Turn
from partway.plan.private import private
from partway.plan.rounds import averaged, relay, splitfed_v1, splitfed_v2, splitfed_v3


def every_party(plan: Plan, settings: Settings) -> tuple[Plan, Schedule]:
    """For plans without lanes: every party has its part in every step, over the same patients' records.

    Equals training the joined network in one place. What would be `validation` and `test` runs through the same pieces,
    without gradients, and is counted where the labels meet the output.
    """
    counted = {name: f"scores_{name}" for name in plan.losses}
    check: list[Edge] = []
    for edge in plan.edges("split"):
        if edge.kind == "labels":
            check.append(replace(edge, target=counted[edge.target]))
        else:
            check.append(replace(edge, gradient=False))
    check += [Edge(name, tally, gradient=False) for name, tally in counted.items()]
    tallies = tuple(Segment(name=tally, at=plan[name].at, kind="tally") for name, tally in counted.items())
    flows = (*plan.flows, ("check", tuple(check)))
    whole = replace(plan, segments=plan.segments + tallies, flows=flows).checked()
    tally = tallies[0]
    sources = tuple(s.name for s in plan.segments if s.kind == "records")
    account = tuple(party for party in plan.parties if party != plan.hub)

    def turns(sizes: Sizes) -> tuple[Turn, ...]:
        counts = same_counts(sizes)
        done = [Turn(alike=sources)] if len(sources) > 1 else []
        start, step = len(done), 0
        for epoch in range(settings.epochs):
            for first, last in equal_parts(counts["train"], settings.batch):
                rows, offsets, divisor = ({ONE: last - first},), ({ONE: first},), float(last - first)
                split = Turn(flow="split", rows=rows, offsets=offsets, divisor=divisor, train=plan.nets)
                done.append(replace(split, step=step, epoch=epoch))
                step += 1
            looks = settings.validate_every and (epoch + 1) % settings.validate_every == 0
            if looks and counts["validation"]:
                judge = Judge(at=tally.at, tally=tally.name, keeps=plan.nets, hears=plan.parties)
                look = checked(counts["validation"], "validation", step, epoch)
                done.append(replace(look, judge=judge if settings.keep_best else None))
            done.append(Turn(account=account, step=step, epoch=epoch))
        done = [*done[:start], *judged(done[start:], start)]
        if settings.test and counts["test"]:
            done.append(checked(counts["test"], "test", step, settings.epochs - 1))
        done.append(Turn(account=account, step=step, epoch=settings.epochs - 1))
        return tuple(done)

    return whole, turns


def synchronous(plan: Plan, settings: Settings) -> tuple[Plan, Schedule]:
    """A union batch over all sites' records each step, gradients of the sites' segments summed before each update.

    Equals training one network on the pooled records.
    """
    whole = with_counts(plan, settings)

    def turns(sizes: Sizes) -> tuple[Turn, ...]:
        done = begin(plan, settings, sizes, at_sites(plan))
        done += together(plan, settings, sizes, settings.epochs, done)
        return done + end(plan, settings, sizes, done)

    return whole, turns


def half_trained(plan: Plan, settings: Settings) -> tuple[Plan, Schedule]:
    """Sites train bottom and local head by themselves and average them; then each releases its activations once.

    Phase 1: `rounds` times, `local_epochs` at every site, then the weights are averaged by records, blindly. Phase 2:
    bottoms are frozen; every training and validation record's activations and labels cross once, and the server
    trains the trunk on them. No gradient of the server ever reaches a bottom, unless `synchronous_epochs` follow.

    With `bottoms = "largest"` nothing is averaged: the largest site alone trains for as many epochs, and hands its
    bottom to the others. With `concatenated` every site hands its own to all others; each record goes through all of
    them, and the trunk takes what they put out side by side.
    """
    if "head" in at_sites(plan):
        raise PlanError(["half_trained: the server trains the trunk by the labels, which a U-shape keeps at the sites"])
    ((bottom,), (trunk,)) = at_sites(plan), central(plan)
    beside = settings.bottoms == "concatenated"
    used = tuple(of(bottom, site) for site in plan.sites) if beside else (bottom,)
    whole = _beside(plan, settings, used) if beside else with_counts(plan, settings)
    segments = (
        *whole.segments,
        Segment(name=LOCAL_HEAD),
        Segment(name=SHELF, at=plan.hub, kind="store"),
        Segment(name=HELD, at=plan.hub, kind="tally"),
    )
    through = tuple(e for n in used for e in (Edge("data", n, gradient=False), Edge(n, SHELF, gradient=False)))
    check = (Edge(SHELF, trunk, gradient=False), Edge(trunk, HELD, gradient=False))
    flows = (
        *whole.flows,
        ("local", chain("data", bottom, LOCAL_HEAD)),
        ("release", (*through, Edge("data", SHELF, "labels", gradient=False))),
        ("finish", (Edge(SHELF, trunk, gradient=False), Edge(SHELF, trunk, "labels", gradient=False))),
        ("check", (*check, Edge(SHELF, HELD, "labels", gradient=False))),
    )

    def turns(sizes: Sizes) -> tuple[Turn, ...]:
        averaged, local = settings.bottoms == "averaged", (bottom, LOCAL_HEAD)
        training = records_of(plan, sizes, "train")
        if settings.bottoms == "largest":
            largest = max(training, key=training.__getitem__)
            training = {largest: training[largest]}
        done = begin(plan, settings, sizes, local if averaged else ())
        done += apart(plan, settings, sizes, local) if averaged else by_themselves(plan, settings, training, done)
        done += release(plan, settings, sizes, used, done)
        done += finish(plan, settings, sizes, trunk, done)
        done += together(plan, settings, sizes, settings.synchronous_epochs, done)
        last = end(plan, settings, sizes, done)
        return done + (tuple(_all_of(plan, bottom, turn) for turn in last) if beside else last)

    return replace(whole, segments=segments, flows=flows).checked(), turns


def _beside(plan: Plan, settings: Settings, bottoms: tuple[str, ...]) -> Plan:
    """With every site's bottom at every site, side by side before the trunk that visits."""
    (bottom,) = at_sites(plan)
    whole = with_counts(plan, replace(settings, bottom_to_everyone=False))
    scores: list[Edge] = []
    for edge in whole.edges("scores"):
        every = bottoms if bottom in (edge.source, edge.target) else (bottom,)
        scores += (other for name in every for other in renamed([edge], {bottom: name}))
    segments = [Segment(name=name) for name in bottoms]
    if settings.bottom_to_everyone:
        segments += [Segment(name=of(there(bottom), site), at=plan.hub) for site in plan.sites]
    flows = tuple((name, tuple(scores) if name == "scores" else edges) for name, edges in whole.flows)
    return replace(whole, segments=(*whole.segments, *segments), flows=flows)


def _all_of(plan: Plan, bottom: str, turn: Turn) -> Turn:
    """The same turn, in which the first site hands the server every site's bottom."""
    gives = []
    for source, target in turn.gives:
        mine = source.segment == bottom
        every = [(Copy(of(bottom, s), source.lane), Copy(of(there(bottom), s))) for s in plan.sites]
        gives += every if mine else [(source, target)]
    return replace(turn, gives=tuple(gives))


SCHEDULES = {
    "synchronous": synchronous,
    "half_trained": half_trained,
    "relay": relay,
    "averaged": averaged,
    "private": private,
    "splitfed_v1": splitfed_v1,
    "splitfed_v2": splitfed_v2,
    "splitfed_v3": splitfed_v3,
}
"""What `[training] schedule` may say."""
LEGAL: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(SCHEDULES, ("vanilla", "u_shaped")),
    "synchronous": ("vanilla", "u_shaped", "plan"),
    "half_trained": ("vanilla",),
}
"""In which configurations with lanes each schedule can be. In those without, every party has a part in every step."""
WHY = {
    "half_trained": "the server trains by the labels, which stay at the sites",
    **dict.fromkeys((n for n in SCHEDULES if n != "half_trained"), "it knows only a bottom, a trunk and a head"),
}
"""Why not in the others."""
