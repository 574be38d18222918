"""Schedules whose sites' segments meet as weights: averaged from time to time, or handed on from site to site."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace

from partway.plan.batches import Batch, local_batches, shuffled, union_batches
from partway.plan.phases import (
    Schedule,
    Settings,
    at_sites,
    begin,
    central,
    end,
    epochs_of,
    records_of,
    step_of,
    with_counts,
)
from partway.plan.plan import EACH, Copy, Plan, Segment, Sizes, Sum, Turn


def locker(name: str) -> str:
    """Where the hub keeps what one site has sealed of a segment for another, a place for each reader."""
    return f"{name}_locker"


def averaged(plan: Plan, settings: Settings) -> tuple[Plan, Schedule]:
    """Union batches in which each site's segments step by themselves; from time to time they are averaged, blindly.

    The loss is divided by the union batch's records, as in `synchronous`. A site without records in a step does not
    step. Averages are weighted by training records, at the end of each epoch and every `average_every` steps of it.
    """

    def turns(sizes: Sizes) -> tuple[Turn, ...]:
        training, average = records_of(plan, sizes, "train"), _average(plan, sizes, at_sites(plan))

        def steps(epoch: int) -> Iterator[Turn]:
            batches = list(union_batches(training, settings.batch, settings.seed, epoch))
            for number, batch in enumerate(batches, 1):
                yield step_of(plan, batch, divisor=float(sum(batch.rows.values())))
                if number == len(batches) or (settings.average_every and number % settings.average_every == 0):
                    yield average

        return _run(plan, settings, sizes, steps)

    return with_counts(plan, settings), turns


def splitfed_v1(plan: Plan, settings: Settings) -> tuple[Plan, Schedule]:
    """Every site trains in parallel, with a trunk of its own at the server; after each epoch both halves are averaged.

    Thapa et al. 2022, arXiv:2004.12088, SFLV1. Batches are a site's own; averages are weighted by training records.
    Optimisers keep their state. The same as federated averaging with one local epoch a round.
    """
    return _splitfed(plan, settings, (*at_sites(plan), *central(plan)))


def splitfed_v3(plan: Plan, settings: Settings) -> tuple[Plan, Schedule]:
    """As `splitfed_v1`, but only the trunks are averaged: each site keeps a bottom of its own.

    Gawali et al. 2021, arXiv:2012.12591.
    """
    return _splitfed(plan, settings, central(plan))


def _splitfed(plan: Plan, settings: Settings, mixed: Sequence[str]) -> tuple[Plan, Schedule]:
    whole, hub = with_counts(plan, settings), central(plan)
    segments = tuple(replace(s, copies=EACH) if s.name in hub else s for s in whole.segments)
    whole = replace(whole, segments=segments).checked()

    def turns(sizes: Sizes) -> tuple[Turn, ...]:
        training, average = records_of(plan, sizes, "train"), _average(plan, sizes, mixed)

        def steps(epoch: int) -> Iterator[Turn]:
            for batch in local_batches(training, settings.batch):
                yield step_of(plan, batch)
            yield average

        equal = at_sites(plan) if mixed != hub else ()
        return tuple(_own_trunk(turn, hub) for turn in _run(plan, settings, sizes, steps, equal))

    return whole, turns


def _own_trunk(turn: Turn, hub: Sequence[str]) -> Turn:
    """The same turn; what travels from the server to a site is that site's copy."""
    gives = tuple((Copy(a.segment, b.lane) if a.segment in hub else a, b) for a, b in turn.gives)
    return replace(turn, gives=gives)


def splitfed_v2(plan: Plan, settings: Settings) -> tuple[Plan, Schedule]:
    """One trunk takes the sites' batches one after the other, in an order drawn anew each time; bottoms are averaged.

    Thapa et al. 2022, arXiv:2004.12088, SFLV2.
    """

    def turns(sizes: Sizes) -> tuple[Turn, ...]:
        training, average = records_of(plan, sizes, "train"), _average(plan, sizes, at_sites(plan))

        def steps(epoch: int) -> Iterator[Turn]:
            for number, batch in enumerate(local_batches(training, settings.batch)):
                for place in shuffled(len(plan.sites), "splitfed_v2", settings.seed, epoch, number):
                    site = plan.sites[place]
                    if batch.rows[site]:
                        yield step_of(plan, _of(batch, site), divisor=float(batch.rows[site]))
            yield average

        return _run(plan, settings, sizes, steps)

    return with_counts(plan, settings), turns


def relay(plan: Plan, settings: Settings) -> tuple[Plan, Schedule]:
    """Site after site trains with the server on its own batches, and hands its weights and optimiser's state on.

    Gupta and Raskar 2018, arXiv:1810.06060, algorithm 2. Equals one network, trained on the sites' batches one after
    the other. A site's turn is an epoch over its records, or `turn_batches` batches. With `relay_kept` the hub keeps
    what is handed on until the next site's turn, sealed for that site (the paper's centralised mode).
    """
    whole, home = with_counts(plan, settings), at_sites(plan)
    if settings.relay_kept:
        lockers = (Segment(name=locker(n), at=plan.hub, copies=EACH, kind="locker") for n in home)
        whole = replace(whole, segments=(*whole.segments, *lockers)).checked()

    def turns(sizes: Sizes) -> tuple[Turn, ...]:
        training = records_of(plan, sizes, "train")
        holder = plan.sites[0]  # who has trained last, and so has the weights

        def steps(epoch: int) -> Iterator[Turn]:
            nonlocal holder
            for site, batches in _visits(settings, training, epoch):
                if site != holder:
                    stops = [[Copy(n, holder) for n in home], [Copy(n, site) for n in home]]
                    if settings.relay_kept:
                        stops.insert(1, [Copy(locker(n), site) for n in home])
                    for here, there in itertools.pairwise(stops):
                        yield Turn(gives=tuple(zip(here, there, strict=True)), state=True)
                    holder = site
                for batch in batches:
                    yield step_of(plan, batch, divisor=float(batch.rows[site]))

        def settled() -> Iterator[Turn]:
            others = [site for site in plan.sites if site != holder]
            if others:
                yield Turn(gives=tuple((Copy(n, holder), Copy(n, site)) for n in home for site in others))

        return _run(plan, settings, sizes, steps, home, settled)

    return whole, turns


def _visits(settings: Settings, training: Mapping[str, int], epoch: int) -> Iterator[tuple[str, list[Batch]]]:
    """Whose turn it is in an epoch, and which batches it has in it.

    >>> visits = _visits(Settings(batch=2, turn_batches=1, relay_order="descending"), {"a": 2, "b": 4}, 0)
    >>> [(site, len(batches)) for site, batches in visits]
    [('b', 1), ('a', 1), ('b', 1)]
    """
    sites = [site for site, records in training.items() if records]
    if settings.relay_order == "random":
        sites = [sites[place] for place in shuffled(len(sites), "relay", settings.seed, epoch)]
    else:
        sites.sort(key=lambda site: -training[site])
    batches = {site: local_batches({site: training[site]}, settings.batch) for site in sites}
    most = settings.turn_batches or max(map(len, batches.values()))
    while any(batches.values()):
        for site in sites:
            now, batches[site] = batches[site][:most], batches[site][most:]
            if now:
                yield site, now


def _of(batch: Batch, site: str) -> Batch:
    return Batch({site: batch.rows[site]}, {site: batch.offsets[site]})


def _average(plan: Plan, sizes: Sizes, names: Sequence[str]) -> Turn:
    training = records_of(plan, sizes, "train")
    share = {site: size / sum(training.values()) for site, size in training.items()}
    sums: tuple[Sum, ...] = tuple(("weights", name) for name in names)
    return Turn(sums=sums if len(plan.sites) > 1 else (), share=share)


def _run(
    plan: Plan,
    settings: Settings,
    sizes: Sizes,
    steps: Callable[[int], Iterator[Turn]],
    equal: Sequence[str] | None = None,
    settled: Callable[[], Iterator[Turn]] = lambda: iter(()),
) -> tuple[Turn, ...]:
    """A whole run: what comes before, its epochs, and the end.

    Args:
        equal: the segments that are the same at every site before a look; if it is not said, all of the sites'.
        settled: what makes them so.
    """
    home = at_sites(plan)
    compared = (home if equal is None else equal) if len(plan.sites) > 1 else ()
    done = begin(plan, settings, sizes, home)
    done += epochs_of(plan, settings, sizes, settings.epochs, done, steps, compared, settled)
    return done + end(plan, settings, sizes, done)
