"""Schedules: each is one function, (plan, settings) -> the plan with the flows it needs, and sizes -> turns."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from partway.plan.batches import union_batches
from partway.plan.plan import Copy, Edge, Part, Plan, Segment, Sizes, Sum, Turn

Schedule = Callable[[Sizes], tuple[Turn, ...]]


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What a schedule must know of a job."""

    seed: int = 0
    epochs: int = 1
    batch: int = 256
    """Records in a union batch, over all sites."""
    standardise: bool = False
    """Two blind sums come first, from which every site standardises its numeric columns."""
    validate_every: int = 0
    """Epochs between two evaluations on the validation records; 0 for none."""
    test: bool = False
    """Evaluate on the test records at the end."""
    site_scores: bool = False
    """Each site's own scores on its test records go to the server."""
    bottom_to_everyone: bool = False
    trunk_to_everyone: bool = False


def here(name: str) -> str:
    """The name of a server's segment while it visits the sites."""
    return f"{name}_here"


def there(name: str) -> str:
    """The name of a site's segment as the server keeps it at the end."""
    return f"{name}_there"


def original(name: str) -> str:
    """The segment of which this one is a visiting or kept copy; any other is its own.

    >>> original("trunk_here"), original("bottom")
    ('trunk', 'bottom')
    """
    return name.removesuffix("_here").removesuffix("_there")


def synchronous(plan: Plan, settings: Settings) -> tuple[Plan, Schedule]:
    """A union batch over all sites' records each step, gradients of the sites' segments summed before each update.

    Equals training one network on the pooled records. Returns the plan with the flows for statistics, evaluation and
    the result, and the function from the sites' sizes to every turn.
    """
    nets = [s for s in plan.segments if s.kind == "net"]
    at_sites = tuple(s.name for s in nets if s.laned)
    central = tuple(s.name for s in nets if not s.laned)
    shared = at_sites if len(plan.sites) > 1 else ()
    kept = at_sites if settings.bottom_to_everyone else ()

    def turns(sizes: Sizes) -> Iterator[Turn]:
        training = {site: sizes[site]["train"] for site in plan.sites}
        if settings.standardise:
            yield from _whole(training, "train", ("sums", "squares"))
        if shared:
            first, *others = plan.sites
            yield Turn(gives=tuple((Copy(n, first), Copy(n, lane)) for n in shared for lane in others))
        step = 0
        for epoch in range(settings.epochs):
            for batch in union_batches(training, settings.batch, settings.seed, epoch):
                yield Turn(
                    flow="split",
                    rows=(batch.rows,),
                    offsets=(batch.offsets,),
                    divisor=float(sum(batch.rows.values())),
                    train=at_sites + central,
                    sums=tuple(("gradient", n) for n in shared),
                    step=step,
                    epoch=epoch,
                )
                step += 1
            yield Turn(equal=shared, account=True, step=step, epoch=epoch)
            if settings.validate_every and (epoch + 1) % settings.validate_every == 0:
                yield from _evaluation(plan, sizes, central, "validation", step, epoch)
        last = max(0, settings.epochs - 1)
        if settings.test:
            yield from _evaluation(plan, sizes, central, "test", step, last)
            if settings.site_scores:
                own = {site: 1 for site in plan.sites if sizes[site]["test"]}
                yield from _whole(own, "test", ("report_own",), step, last)
        elif settings.trunk_to_everyone:
            yield Turn(gives=_visits(plan, central), step=step, epoch=last)
        if kept:
            yield Turn(gives=tuple((Copy(n, plan.sites[0]), Copy(there(n))) for n in kept), step=step, epoch=last)
        yield Turn(account=True, step=step, epoch=last)

    return _with_flows(plan, central, kept), lambda sizes: tuple(turns(sizes))


def _whole(rows: dict[str, int], part: Part, flows: Sequence[str], step: int = 0, epoch: int = 0) -> Iterator[Turn]:
    """One turn for each flow, over all the records of a part, each tally that it fills summed."""
    for flow in flows:
        sums: tuple[Sum, ...] = (("tally", flow),) if flow in TALLIES else ()
        offsets = (dict.fromkeys(rows, 0),)
        yield Turn(flow=flow, rows=(rows,), offsets=offsets, records=part, sums=sums, step=step, epoch=epoch)


def _evaluation(
    plan: Plan, sizes: Sizes, central: tuple[str, ...], part: Part, step: int, epoch: int
) -> Iterator[Turn]:
    """The trunk travels to the sites, which count; the first of them tells the server what the sums say."""
    yield Turn(gives=_visits(plan, central), step=step, epoch=epoch)
    yield from _whole({site: sizes[site][part] for site in plan.sites}, part, ("scores",), step, epoch)
    yield from _whole({plan.sites[0]: 1}, part, ("report",), step, epoch)


def _visits(plan: Plan, central: tuple[str, ...]) -> tuple[tuple[Copy, Copy], ...]:
    return tuple((Copy(n), Copy(here(n), lane)) for n in central for lane in plan.sites)


TALLIES = ("sums", "squares", "scores")
"""What is counted at the sites and summed, each by the flow of its name: for standardisation, and confusion counts."""


def _with_flows(plan: Plan, central: tuple[str, ...], kept: tuple[str, ...]) -> Plan:
    """The plan with the flows that training needs beside `split`: statistics before it, evaluation and result after."""
    visiting = {name: here(name) for name in central}
    split = plan.edges("split")
    last = next(e.target for e in split if e.kind == "labels")

    def at_home(edge: Edge) -> Edge:
        source, target = (visiting.get(name, name) for name in (edge.source, edge.target))
        return Edge(source, target, edge.kind, gradient=False)

    def counted(name: str) -> tuple[Edge, ...]:
        return Edge("data", name, gradient=False), Edge("data", name, "labels", gradient=False)

    segments = (
        *plan.segments,
        *(Segment(name=here(n)) for n in central),
        *(Segment(name=there(n), at=plan.hub) for n in kept),
        *(Segment(name=n, kind="tally") for n in (*TALLIES, "own_scores")),
        Segment(name="board", at=plan.hub, kind="store"),
    )
    flows = (
        *plan.flows,
        ("sums", counted("sums")),
        ("squares", counted("squares")),
        (
            "scores",
            (
                *(at_home(e) for e in split if e.kind == "activations"),
                Edge(visiting.get(last, last), "scores", gradient=False),
                Edge("data", "scores", "labels", gradient=False),
            ),
        ),
        ("report", (Edge("scores", "board", "scores", gradient=False),)),
        ("report_own", (Edge("own_scores", "board", "scores", gradient=False),)),
    )
    return replace(plan, segments=segments, flows=flows).checked()


SCHEDULES = {"synchronous": synchronous}
"""What `[training] schedule` may say."""
