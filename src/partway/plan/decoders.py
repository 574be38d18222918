"""`semi_supervised`: a decoder beside each site's bottom, and unlabelled records, in any schedule with lanes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from partway.plan.phases import Schedule
from partway.plan.plan import Edge, Plan, Segment, Sizes, Turn

DECODER = "decoder"
"""From a bottom's output back to its features. It stays at its site, and is no part of the network that comes out."""
RECONSTRUCT = "reconstruct"
"""The flow of unlabelled records: they meet the bottom and the decoder alone."""


def semi_supervised(plan: Plan, schedule: Schedule, alpha: float) -> tuple[Plan, Schedule]:
    """The same plan and schedule; wherever the bottom trains, it learns besides to keep what gives its features back.

    Algorithm 3 of Gupta and Raskar (2018): the gradient of a local decoder's loss, times alpha, is added to what comes
    from the server; unlabelled records have no other. They ride in the steps that are there, so nothing more crosses.

    Args:
        plan: with a flow for all that `schedule` trains.
        alpha: what the loss of a record counts, the mean square of what its features are missed by.
    """
    bottom = plan.nets[0]
    (data,) = (e.source for e in plan.edges("split") if e.target == bottom)
    back = (Edge(bottom, DECODER), Edge(data, DECODER, "features", gradient=False, weight=alpha))
    flows = list(plan.flows)
    for name, edges in plan.flows:
        if any(e.source == bottom and e.gradient for e in edges):
            flows.append((decoded(name), (*edges, *back)))
    flows.append((RECONSTRUCT, (Edge(data, bottom, gradient=False), *back)))
    whole = replace(plan, segments=(*plan.segments, Segment(name=DECODER)), flows=tuple(flows)).checked()

    def turns(sizes: Sizes) -> tuple[Turn, ...]:
        done = list(schedule(sizes))
        epochs: dict[int, list[int]] = {}
        for number, turn in enumerate(done):
            if bottom in turn.train:
                epochs.setdefault(turn.epoch, []).append(number)
        for numbers in epochs.values():
            for number, turn in zip(
                numbers, _with_unlabelled(plan, bottom, [done[n] for n in numbers], sizes), strict=True
            ):
                done[number] = replace(turn, flow=decoded(turn.flow), train=(*turn.train, DECODER))
        return tuple(done)

    return whole, turns


def decoded(flow: str) -> str:
    """The name of the same flow with the decoder beside it."""
    return f"{flow}:decoded"


def _with_unlabelled(plan: Plan, bottom: str, turns: Sequence[Turn], sizes: Sizes) -> list[Turn]:
    """The turns of one epoch, over which each site's unlabelled records are spread in equal parts.

    Where gradients are summed over the sites, over all of them; else over those in which the site has labelled rows.
    """
    rows: list[dict[str, int]] = [{} for _ in turns]
    offsets: list[dict[str, int]] = [{} for _ in turns]
    for site in plan.sites:
        unlabelled = sizes[site].get("unlabelled", 0)
        places = [n for n, t in enumerate(turns) if ("gradient", bottom) in t.sums or any(r.get(site) for r in t.rows)]
        for part, place in enumerate(places):
            begin, end = (unlabelled * p // len(places) for p in (part, part + 1))
            rows[place][site], offsets[place][site] = end - begin, begin
    found = []
    for turn, more, begins in zip(turns, rows, offsets, strict=True):
        if any(more.values()):
            turn = replace(turn, rows=(*turn.rows, more), offsets=(*turn.offsets, begins), beside=RECONSTRUCT)
        found.append(turn)
    return found
