"""`predicting`: records go through what an earlier job has trained; what comes out goes to who holds the labels."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from partway.plan.batches import local_batches
from partway.plan.phases import AT_ONCE, Schedule, checked, same_counts
from partway.plan.plan import Edge, Plan, Segment, Sizes, Turn

PREDICT = "predict"
"""The flow: as `split`, with no gradient and no label."""


def told(loss: str) -> str:
    """Where it is gathered what a segment with a loss puts out: at the party whose labels the loss was told."""
    return f"told_{loss}"


def predicting(plan: Plan) -> tuple[Plan, Schedule]:
    """Nothing is trained, summed or judged. Sites with patients of their own come one after the other."""
    split = plan.edges("split")
    at = {edge.target: plan[edge.source].at for edge in split if edge.kind == "labels"}
    gathered = tuple(Segment(name=told(loss), at=place, kind="tally") for loss, place in at.items())
    edges = tuple(replace(edge, gradient=False) for edge in split if edge.kind == "activations")
    edges += tuple(Edge(loss, told(loss), gradient=False) for loss in at)
    whole = replace(plan, segments=plan.segments + gathered, flows=(*plan.flows, (PREDICT, edges))).checked()
    sources = tuple(s.name for s in plan.segments if s.kind == "records")

    def steps(sizes: Sizes) -> Iterator[Turn]:
        for site in plan.sites:
            for batch in local_batches({site: sizes[site]["test"]}, AT_ONCE):
                yield Turn(flow=PREDICT, rows=(batch.rows,), offsets=(batch.offsets,), records="test")
        if not plan.sites:
            if len(sources) > 1:
                yield Turn(alike=sources)
            one = checked(same_counts(sizes)["test"], "test", 0, 0)
            for rows, offsets in zip(one.rows, one.offsets, strict=True):
                yield replace(one, flow=PREDICT, rows=(rows,), offsets=(offsets,))
        yield Turn(account=tuple(party for party in plan.parties if party != plan.hub))

    return whole, lambda sizes: tuple(steps(sizes))
