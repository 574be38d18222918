"""`private`: after epochs together every site has a bottom, or a vector in the trunk, of its own where it gains."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
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
    renamed,
    step_and_epoch,
    together,
    whole,
    with_counts,
)
from partway.plan.plan import EACH, Choice, Copy, Edge, Plan, Segment, Sizes, Turn

OWN, SHARED = "own_choice", "shared_choice"
"""What a site counts over its own validation records, for its own choice: nothing of it crosses."""


EMBEDDING = "embedding"
"""A vector for each site, added to what the first layer of the trunk puts out; all are at the server."""
STEM = "stem"
"""The trunk up to where they are added."""
PERSONAL = "personal"
"""The flow through them."""


def shared(name: str) -> str:
    """The name of a segment as it was after the epochs together."""
    return f"{name}{_KEPT}"


def is_shared(name: str) -> bool:
    """
    >>> is_shared(shared("bottom")), is_shared("bottom:shared")
    (True, False)
    """
    return name.endswith(_KEPT)


_KEPT = "::shared"
"""No site has such a name."""


def private(plan: Plan, settings: Settings) -> tuple[Plan, Schedule]:
    """Union batches in which no gradient of a site's segment is summed: each copy steps by itself, where it has rows.

    First `shared_epochs` of `synchronous`. With `gate`, what they came to is kept beside; at the end each site scores
    both on its own validation records, and goes on with its own only if that is better.

    Where the trunk has a stem, what a site has of its own is a vector behind it, and bottoms stay summed.
    """
    home, hub = at_sites(plan), central(plan)
    full = with_counts(plan, settings)
    if embeds := STEM in hub:
        full, hub = _embedded(full), (*hub, EMBEDDING)
    if settings.gate:
        full = _gated(full, home, hub)

    def turns(sizes: Sizes) -> tuple[Turn, ...]:
        done = begin(plan, settings, sizes, home)
        done += together(plan, replace(settings, validate_every=0), sizes, settings.shared_epochs, done)
        if settings.gate:
            kept = tuple((copy, Copy(shared(n), copy.lane)) for n in (*home, *hub) for copy in full.copies(n))
            step, epoch = step_and_epoch(done)
            done += (Turn(gives=kept, step=step, epoch=epoch - 1),)
        apart = together(plan, settings, sizes, settings.epochs, done)
        for turn in apart:
            turn = replace(turn, fresh=turn.fresh and not settings.shared_epochs)  # optimisers go on
            done += (_with_vectors(full, turn) if embeds else _by_itself(turn),)
        if not settings.gate:
            last = end(plan, settings, sizes, done)
            return done + (tuple(_with_vectors(full, turn) for turn in last) if embeds else last)
        done += tuple(_gate(full, home, hub, sizes, done))
        # What a site has chosen is there to be tested: no trunk visits again.
        return done + tuple(turn for turn in end(plan, settings, sizes, done) if not turn.gives)

    return full.checked(), turns


def _by_itself(turn: Turn) -> Turn:
    """The same turn, without what keeps the sites' copies equal."""
    return replace(turn, sums=() if turn.train else turn.sums, equal=())


def with_stem(plan: Plan) -> Plan:
    """The same plan, with the trunk in two pieces, the first of which ends with its first dense layer."""
    ((bottom, *_), (trunk,)) = at_sites(plan), central(plan)
    segments = [part for s in plan.segments for part in ([replace(s, name=STEM), s] if s.name == trunk else [s])]
    flows = (("split", _inserted(plan.edges("split"), bottom, STEM, trunk)),)
    return replace(plan, segments=tuple(segments), flows=flows)


def _inserted(edges: Sequence[Edge], before: str, between: str, after: str) -> tuple[Edge, ...]:
    """What goes from one segment to another goes through a third."""
    found: list[Edge] = []
    for e in edges:
        through = (e.source, e.target) == (before, after)
        found += [replace(e, target=between), replace(e, source=between)] if through else [e]
    return tuple(found)


def _embedded(plan: Plan) -> Plan:
    """With a vector for each site between stem and trunk: at the server, and where they visit."""
    _, trunk = central(plan)
    vectors = Segment(name=EMBEDDING, at=plan.hub, copies=EACH), Segment(name=here(EMBEDDING))
    flows = {name: plan.edges(name) for name, _ in plan.flows}
    flows[PERSONAL] = _inserted(flows["split"], STEM, EMBEDDING, trunk)
    flows["scores"] = _inserted(flows["scores"], here(STEM), here(EMBEDDING), here(trunk))
    return replace(plan, segments=(*plan.segments, *vectors), flows=tuple(flows.items()))


def _with_vectors(plan: Plan, turn: Turn) -> Turn:
    """The same turn, through the vectors: they train, are kept, and travel, each to its site."""
    if turn.train:
        return replace(turn, flow=PERSONAL, train=(*turn.train, EMBEDDING))
    if turn.judge:
        return replace(turn, judge=replace(turn.judge, keeps=(*turn.judge.keeps, EMBEDDING)))
    visits = tuple((copy, Copy(here(EMBEDDING), copy.lane)) for copy in plan.copies(EMBEDDING))
    return replace(turn, gives=(*turn.gives, *visits)) if turn.gives else turn


def _gated(plan: Plan, home: Sequence[str], hub: Sequence[str]) -> Plan:
    """With a second network beside the first, from which each site has scores of both."""
    beside = [replace(plan[n], name=shared(n)) for n in (*home, *hub, *map(here, hub))]
    tallies = [Segment(name=n, kind="tally") for n in (OWN, SHARED)]
    scores = plan.edges("scores")
    other = {s.name.removesuffix(_KEPT): s.name for s in beside}
    flows = (
        *plan.flows,
        (OWN, renamed(scores, {"scores": OWN})),
        (SHARED, renamed(scores, {"scores": SHARED, **other})),
    )
    return replace(plan, segments=(*plan.segments, *beside, *tallies), flows=flows)


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
