"""What this party allows, from its own file: yes, or every reason why not.

The whole run is judged before turn 0: first the job as written, before anything it names is imported; then every
turn that follows from it and from the sites' sizes.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

from partway.config import Job, Policy
from partway.errors import Refused
from partway.plan.batches import union_batches
from partway.plan.plan import Copy, Edge, Plan, Rows, Sizes, Turn
from partway.plan.private import is_shared
from partway.protocol.messages import Reason
from partway.shapes import Shapes


class Objection(NamedTuple):
    """One thing that this party does not allow: an enum for others, words for its own people."""

    reason: Reason
    words: str


class HandOver(NamedTuple):
    """Weights of one site for another, and how many records and steps of its own stand behind them."""

    site: str
    receiver: str
    records: int
    steps: int


def refuse(me: str, objections: Iterable[Objection]) -> None:
    """Raises `Refused` with all of them, if there are any."""
    if found := list(objections):
        words = "; ".join(o.words for o in found)
        raise Refused(f"{me} refuses the job: {words}", [o.reason.name for o in found])


def judge_job(policy: Policy, me: str, job: Job, operator: str) -> Iterator[Objection]:
    """The job as its operator wrote and signed it."""
    training = job.training
    if operator not in policy.operators:
        yield Objection(Reason.OPERATOR, f"operator {operator} is not in [policy] operators")
    for build in job.builds:
        if build not in policy.networks:
            yield Objection(Reason.NETWORK, f"network {build} is not in [policy] networks")
    for name, digest in job.shipped.items():
        if digest not in policy.segments:
            yield Objection(Reason.SEGMENT, f"the {name}, segment {digest}, is not in [policy] segments")
    if (epochs := job.epochs_at_sites) > policy.most_epochs:
        words = f"{epochs} epochs; [policy] most_epochs is {policy.most_epochs}"
        yield Objection(Reason.EPOCHS, words)
    if training.sums == "clear" and not policy.clear_sums:
        yield Objection(Reason.CLEAR_SUM, "sums would be added in the clear; [policy] clear_sums is false")
    for site, fingerprint in job.roster.items():
        if site == me or not policy.sites:
            continue
        if site not in policy.sites:
            yield Objection(Reason.ROSTER, f"site {site} is not in [policy] sites")
        elif policy.sites[site] != fingerprint:
            yield Objection(Reason.ROSTER, f"site {site}'s key is not the one pinned in [policy] sites")


def judge_turns(
    policy: Policy, me: str, shapes: Shapes, turns: Sequence[Turn], released: int = 0
) -> Iterator[Objection]:
    """What every turn would send from one party, and what it would compute there.

    Args:
        released: how often this party's records were handed over to be kept, in jobs before this one.
    """
    plan = shapes.plan
    for flow in sorted({turn.flow for turn in turns}):
        yield from _judge_width(policy, me, shapes, plan.edges(flow))
        for edge in plan.edges(flow):
            yield from _judge_edge(policy, me, shapes, edge)
    yield from _judge_gives(policy, me, plan, turns)
    kept = Counter(t.records for t in turns if releases(plan, t) and any(rows.get(me) for rows in t.rows))
    if kept and (times := released + max(kept.values())) > policy.most_releases:
        words = f"records' activations would have been handed over {times} times; [policy] most_releases is "
        yield Objection(Reason.RELEASES, words + str(policy.most_releases))
    pieces = [shapes.pieces[c.segment] for c in plan.placed(me) if not is_shared(c.segment)]
    if (flops := sum(p.forward + p.backward for p in pieces)) > policy.most_flops:
        words = f"{flops:,} FLOPs a record here; [policy] most_flops is {policy.most_flops:,}"
        yield Objection(Reason.NETWORK_SIZE, words)


def judge_groups(
    policy: Policy, plan: Plan, turns: Sequence[Turn], sizes: Sizes, inputs: int, seed: int
) -> Iterator[Objection]:
    """Whether every sum is over enough sites and records.

    Args:
        inputs: of the first layer; from the gradients of too few records those records can be solved for.
        seed: the job's, from which the smallest batch that would hold is searched.
    """
    if any(turn.sums for turn in turns) and 1 < len(plan.sites) < policy.least_sites:
        words = f"a sum over {len(plan.sites)} sites; [policy] least_sites is {policy.least_sites}"
        yield Objection(Reason.SITES, words)
    training = {site: parts["train"] for site, parts in sizes.items()}
    steps = [t for t in turns if "gradient" in dict(t.sums)]
    least = max(policy.least_records_in_sum, 0 if policy.solvable_sums else 2 * (inputs + 1))
    fewest = min((others(_rows_of(t)) for t in steps), default=least)
    if fewest < least:
        epochs = 1 + max(t.epoch for t in steps)
        words = f"in some step only {fewest} records of the other sites hide each one's; {least} are needed"
        yield Objection(Reason.RECORDS, f"{words}: {_advice(training, epochs, least, seed)}")
    behind = list(averages(plan, turns))
    fewest = min((others({s: min(rows[s], n) for s, n in training.items()}) for rows in behind), default=least)
    if behind and fewest < policy.least_records_in_sum:
        words = f"averaged weights of only {fewest} records of the other sites hide each one's"
        yield Objection(Reason.RECORDS, f"{words}; [policy] least_records_in_sum is {policy.least_records_in_sum}")
    elif fewest < least and any(rows[s] < n for rows in behind for s, n in training.items()):
        words = f"between some averages only {fewest} records of the other sites hide each one's; {least} are needed"
        yield Objection(Reason.RECORDS, f"{words}: use a larger [training] batch, or average more seldom (every)")
    yield from _judge_hand_overs(policy, hand_overs(plan, turns, training), inputs)
    counted = [sum(_rows_of(t).values()) for t in turns if "tally" in dict(t.sums)]
    if counted and min(counted) < policy.least_records_in_counts:
        words = f"counts over {min(counted)} records; [policy] least_records_in_counts is "
        yield Objection(Reason.EVALUATION, words + str(policy.least_records_in_counts))


def _judge_hand_overs(policy: Policy, found: Iterable[HandOver], inputs: int) -> Iterator[Objection]:
    """One objection a site. What one step has learnt is a gradient, from which few records can be solved for."""
    least, solvable = policy.least_records_in_hand_over, 0 if policy.solvable_sums else 2 * (inputs + 1)
    fewest: dict[str, tuple[int, str, int]] = {}
    for site, receiver, records, steps in found:
        due = max(least, solvable if steps == 1 else 0)
        if records < due:
            fewest[site] = min(fewest.get(site, (records, receiver, due)), (records, receiver, due))
    for site, (records, receiver, due) in fewest.items():
        words = f"{site} would hand {receiver} weights that only {records} of its records stand behind"
        limit = f"[policy] least_records_in_hand_over is {least}"
        if due > least:
            limit = (
                f"{due} are needed behind one step: use a larger batch, or more batches before weights are handed on"
            )
        yield Objection(Reason.RECORDS, f"{words}; {limit}")


def _judge_edge(policy: Policy, me: str, shapes: Shapes, edge: Edge) -> Iterator[Objection]:
    plan = shapes.plan
    if plan[edge.source].at == plan[edge.target].at:
        return
    held = {name: any(plan.place(c) == me for c in plan.copies(name)) for name in (edge.source, edge.target)}
    if held[edge.source] and edge.kind == "labels" and not policy.labels_may_leave:
        words = f"labels would leave ({edge}); [policy] labels_may_leave is false: a u_shaped job keeps them here"
        yield Objection(Reason.LABELS, words)
    told = edge.kind == "activations" and plan[edge.target].kind == "tally"
    if held[edge.source] and told and not policy.predictions_may_leave:
        words = f"predictions would leave ({edge}); [policy] predictions_may_leave is false"
        yield Objection(Reason.PREDICTIONS, words)
    if held[edge.source] and edge.source == "own_scores" and not policy.scores_may_leave:
        words = "this site's own scores would leave; [policy] scores_may_leave is false"
        yield Objection(Reason.SCORES, words)


def _judge_width(policy: Policy, me: str, shapes: Shapes, edges: Sequence[Edge]) -> Iterator[Objection]:
    """Numbers a record that leave together: all that goes to one segment, and each gradient that goes back."""
    plan = shapes.plan
    widths: dict[tuple[str, bool], list[Edge]] = {}
    for edge in edges:
        if edge.kind != "activations" or plan[edge.source].at == plan[edge.target].at:
            continue
        held = {name: any(plan.place(c) == me for c in plan.copies(name)) for name in (edge.source, edge.target)}
        if held[edge.source]:
            widths.setdefault((edge.target, True), []).append(edge)
        elif held[edge.target] and edge.gradient:
            widths.setdefault((edge.source, False), []).append(edge)
    for together in widths.values():
        if (width := sum(math.prod(shapes.record(edge.source, edge.target)) for edge in together)) > policy.widest_cut:
            told = ", ".join(map(str, together))
            words = f"{width} numbers a record would leave ({told}); [policy] widest_cut is {policy.widest_cut}"
            yield Objection(Reason.WIDTH, words)


def _judge_gives(policy: Policy, me: str, plan: Plan, turns: Sequence[Turn]) -> Iterator[Objection]:
    """What is handed on for good. What goes from site to site, `hand_overs` judges."""
    given = {a.segment: plan.reader(b) for t in turns for a, b in t.gives if plan.reader(a) == me != plan.reader(b)}
    for segment, receiver in sorted(given.items()):
        if me in plan.sites and receiver not in plan.sites and not policy.bottom_to_everyone:
            words = f"{receiver} would hold the {segment}; [policy] bottom_to_everyone is false"
            yield Objection(Reason.RESULT, words)
        if me not in plan.sites and not policy.trunk_to_everyone:
            words = f"the {segment} would travel to the sites; [policy] trunk_to_everyone is false"
            yield Objection(Reason.RESULT, words)


def releases(plan: Plan, turn: Turn) -> bool:
    """Whether in a turn activations go to where they are kept."""
    return any(plan[e.target].kind == "store" and e.kind == "activations" for e in plan.edges(turn.flow))


def hand_overs(plan: Plan, turns: Sequence[Turn], training: Mapping[str, int]) -> Iterator[HandOver]:
    """Weights that go from a site to another with what it alone has trained.

    Args:
        training: records of each site.
    """
    rows_behind, steps_behind = Counter[Copy](), Counter[Copy]()
    for turn in turns:
        mixed = {name for what, name in turn.sums if what != "tally"}
        rows = _rows_of(turn) if turn.train else {}
        for copy in (copy for name in {*turn.train, *mixed} for copy in plan.copies(name)):
            alone = copy.segment not in mixed
            rows_behind[copy] = alone * (rows_behind[copy] + rows.get(copy.lane, 0))
            steps_behind[copy] = alone * (steps_behind[copy] + bool(rows.get(copy.lane)))
        for source, target in turn.gives:
            site, receiver = plan.reader(source), plan.reader(target)
            if rows_behind[source] and site != receiver and {site, receiver} <= {*plan.sites}:
                yield HandOver(site, receiver, min(rows_behind[source], training[site]), steps_behind[source])
        for copy in {copy for pair in turn.gives for copy in pair}:  # from here on both have the same
            rows_behind[copy] = steps_behind[copy] = 0


def averages(plan: Plan, turns: Sequence[Turn]) -> Iterator[Rows]:
    """For each average of sites' weights, how many records each has trained on since the last one.

    What lies between two averages is a sum of the sites' updates: of one step, a sum of gradients.
    """
    behind = dict.fromkeys(plan.sites, 0)
    for turn in turns:
        rows = _rows_of(turn) if turn.train else {}
        behind = {site: count + rows.get(site, 0) for site, count in behind.items()}
        if _meet(plan, turn):
            yield behind
            behind = dict.fromkeys(plan.sites, 0)


def _meet(plan: Plan, turn: Turn) -> bool:
    """Whether sites' weights are averaged, and not only the copies that the hub has itself."""
    return any(what == "weights" and plan[name].at != plan.hub for what, name in turn.sums)


def _rows_of(turn: Turn) -> Rows:
    """Records of each lane in all micro-batches of a turn: what is summed is summed over all of them.

    Unlabelled ones are not counted on to hide others'.
    """
    return {
        lane: sum(rows.get(lane, 0) for rows in turn.labelled)
        for lane in dict.fromkeys(k for r in turn.labelled for k in r)
    }


def others(rows: Rows) -> int:
    """Records of the others in a step, for the site that sees the fewest of them.

    >>> others({"a": 5, "b": 2, "c": 1})
    3
    """
    return sum(rows.values()) - max(rows.values())


def _advice(training: Mapping[str, int], epochs: int, least: int, seed: int) -> str:
    """The smallest batch that holds, found by bisection over the job's own draws."""

    def holds(batch: int) -> bool:
        return all(
            others(b.rows) >= least for epoch in range(epochs) for b in union_batches(training, batch, seed, epoch)
        )

    low, high = 1, sum(training.values())
    if not high or not holds(high):
        return "these sites have too few records for it at any batch"
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if holds(middle) else (middle, high)
    return f"use [training] batch = {high} or more"
