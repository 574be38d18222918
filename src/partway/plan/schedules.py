"""Schedules: each is one function, (plan, settings) -> the plan with the flows it needs, and sizes -> turns."""

from __future__ import annotations

from dataclasses import replace

from partway.errors import PlanError
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
    central,
    end,
    finish,
    release,
    together,
    with_counts,
)
from partway.plan.plan import Edge, Plan, Segment, Sizes, Turn


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
    """
    if "head" in at_sites(plan):
        raise PlanError(["half_trained: the server trains the trunk by the labels, which a U-shape keeps at the sites"])
    ((bottom,), (trunk,)) = at_sites(plan), central(plan)
    whole = with_counts(plan, settings)
    segments = (
        *whole.segments,
        Segment(name=LOCAL_HEAD),
        Segment(name=SHELF, at=plan.hub, kind="store"),
        Segment(name=HELD, at=plan.hub, kind="tally"),
    )
    released = (Edge(bottom, SHELF, gradient=False), Edge("data", SHELF, "labels", gradient=False))
    check = (Edge(SHELF, trunk, gradient=False), Edge(trunk, HELD, gradient=False))
    flows = (
        *whole.flows,
        ("local", chain("data", bottom, LOCAL_HEAD)),
        ("release", (Edge("data", bottom, gradient=False), *released)),
        ("finish", (Edge(SHELF, trunk, gradient=False), Edge(SHELF, trunk, "labels", gradient=False))),
        ("check", (*check, Edge(SHELF, HELD, "labels", gradient=False))),
    )

    def turns(sizes: Sizes) -> tuple[Turn, ...]:
        done = begin(plan, settings, sizes, (bottom, LOCAL_HEAD))
        done += apart(plan, settings, sizes, (bottom, LOCAL_HEAD))
        done += release(plan, settings, sizes, bottom, done)
        done += finish(plan, settings, sizes, trunk, done)
        done += together(plan, settings, sizes, settings.synchronous_epochs, done)
        return done + end(plan, settings, sizes, done)

    return replace(whole, segments=segments, flows=flows).checked(), turns


SCHEDULES = {"synchronous": synchronous, "half_trained": half_trained}
"""What `[training] schedule` may say."""
