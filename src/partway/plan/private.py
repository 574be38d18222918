"""`private`: after epochs together every site goes on with a bottom of its own, where it gains by it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from partway.plan.phases import (
    Schedule,
    Settings,
    Turns,
    at_sites,
    begin,
    central,
    end,
    here,
    records_of,
    step_and_epoch,
    together,
    whole,
    with_counts,
)
from partway.plan.plan import Choice, Copy, Edge, Plan, Segment, Sizes, Turn

OWN, SHARED = "own_choice", "shared_choice"
"""What a site counts over its own validation records, for its own choice: nothing of it crosses."""


def shared(name: str) -> str:
    """The name of a segment as it was after the epochs together."""
    return f"{name}:shared"


def private(plan: Plan, settings: Settings) -> tuple[Plan, Schedule]:
    """Union batches in which no gradient of a site's segment is summed: each copy steps by itself, where it has rows.

    First `shared_epochs` of `synchronous`. With `gate`, what they came to is kept beside; at the end each site scores
    both on its own validation records, and goes on with its own only if that is better.
    """
    home, hub = at_sites(plan), central(plan)
    full = with_counts(plan, settings)
    if settings.gate:
        full = _gated(full, home, hub)

    def turns(sizes: Sizes) -> tuple[Turn, ...]:
        done = begin(plan, settings, sizes, home)
        done += together(plan, replace(settings, validate_every=0), sizes, settings.shared_epochs, done)
        if settings.gate:
            kept = tuple((copy, Copy(shared(n), copy.lane)) for n in (*home, *hub) for copy in plan.copies(n))
            step, epoch = step_and_epoch(done)
            done += (Turn(gives=kept, step=step, epoch=epoch - 1),)
        apart = together(plan, settings, sizes, settings.epochs, done)
        done += tuple(_by_itself(turn, fresh=not settings.shared_epochs) for turn in apart)
        if not settings.gate:
            return done + end(plan, settings, sizes, done)
        done += tuple(_gate(full, home, hub, sizes, done))
        # What a site has chosen is there to be tested: no trunk visits again.
        return done + tuple(turn for turn in end(plan, settings, sizes, done) if not turn.gives)

    return full.checked(), turns


def _by_itself(turn: Turn, fresh: bool) -> Turn:
    """The same turn, without what keeps the sites' copies equal; optimisers go on from the epochs before."""
    if turn.train:
        return replace(turn, sums=(), fresh=fresh and turn.fresh)
    return replace(turn, equal=())


def _gated(plan: Plan, home: Sequence[str], hub: Sequence[str]) -> Plan:
    """With a second network beside the first, from which each site has scores of both."""
    beside = [replace(plan[n], name=shared(n)) for n in (*home, *hub, *map(here, hub))]
    tallies = [Segment(name=n, kind="tally") for n in (OWN, SHARED)]
    scores = plan.edges("scores")
    other = {s.name.removesuffix(":shared"): s.name for s in beside}
    flows = (
        *plan.flows,
        (OWN, _renamed(scores, {"scores": OWN})),
        (SHARED, _renamed(scores, {"scores": SHARED, **other})),
    )
    return replace(plan, segments=(*plan.segments, *beside, *tallies), flows=flows)


def _renamed(edges: Sequence[Edge], names: Mapping[str, str]) -> tuple[Edge, ...]:
    return tuple(replace(e, source=names.get(e.source, e.source), target=names.get(e.target, e.target)) for e in edges)


def _gate(plan: Plan, home: Sequence[str], hub: Sequence[str], sizes: Sizes, done: Turns) -> Iterator[Turn]:
    """Both trunks visit, each site counts, and each chooses."""
    step, epoch = step_and_epoch(done)
    gives = [
        (copy, Copy(target, site))
        for n in hub
        for source, target in ((n, here(n)), (shared(n), shared(here(n))))
        for site in plan.sites
        for copy in plan.copies(source)
        if copy.lane in ("", site)
    ]
    yield Turn(gives=tuple(gives), step=step, epoch=epoch - 1)
    yield from whole(records_of(plan, sizes, "validation"), "validation", (OWN, SHARED), step, epoch - 1)
    of = tuple((n, shared(n)) for n in (*home, *map(here, hub)))
    yield Turn(choice=Choice(better=OWN, than=SHARED, of=of), step=step, epoch=epoch - 1)
