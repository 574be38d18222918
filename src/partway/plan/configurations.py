"""Configurations of split learning: each is one function that returns a `Plan` with the flow `split`."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import replace

from partway.errors import PlanError
from partway.plan.plan import Edge, Join, Plan, Segment

DATA = Segment(name="data", kind="records")


def chain(*names: str, labels: str = "data") -> tuple[Edge, ...]:
    """Records through one segment after another; the last one gets the labels.

    >>> [str(edge) for edge in chain("data", "bottom", "trunk")]
    ['data -> bottom', 'bottom -> trunk', 'data -> trunk']
    """
    forward = tuple(Edge(a, b, gradient=a != names[0]) for a, b in itertools.pairwise(names))
    return (*forward, Edge(labels, names[-1], "labels", gradient=False))


def vanilla(sites: Sequence[str], server: str = "server") -> Plan:
    """The sites hold records and the bottom, the server the trunk and the loss: labels cross (Gupta and Raskar 2018).

    Cut into two segments, `bottom` and `trunk`.
    """
    segments = (DATA, Segment(name="bottom"), Segment(name="trunk", at=server))
    return Plan(tuple(sites), segments, (("split", chain("data", "bottom", "trunk")),), server)


def u_shaped(sites: Sequence[str], server: str = "server") -> Plan:
    """The trunk's output comes back to a head at the site: labels stay (Vepakomma et al. 2018, section 3).

    Cut into three segments, `bottom`, `trunk` and `head`.
    """
    segments = (DATA, Segment(name="bottom"), Segment(name="trunk", at=server), Segment(name="head"))
    return Plan(tuple(sites), segments, (("split", chain("data", "bottom", "trunk", "head")),), server)


def with_skips(plan: Plan, skips: Sequence[tuple[str, str]]) -> Plan:
    """A chain in which some segments put out something for a later one, too, that passes by those between them.

    What goes to the next segment is the first portion of what they put out, then one for each skip in its order.

    Raises:
        PlanError: a skip does not lead from a segment to a later one that is not the next.
    """
    nets, flow = list(plan.nets), list(plan.edges("split"))
    for number, (source, target) in enumerate(skips):
        if source not in nets or target not in nets or nets.index(target) < nets.index(source) + 2:
            raise PlanError(
                [f"skip {source} -> {target}: it leads from one of {', '.join(nets)} to one after the next"]
            )
        if (source, target) in skips[:number]:
            raise PlanError([f"skip {source} -> {target} drawn twice"])
    for source in dict.fromkeys(source for source, _ in skips):
        (at,) = (n for n, edge in enumerate(flow) if edge.source == source)
        flow[at] = replace(flow[at], portion=0)
        own = [target for one, target in skips if one == source]
        flow += [Edge(source, target, portion=number) for number, target in enumerate(own, 1)]
    return replace(plan, flows=(("split", tuple(flow)),)).checked()


# -- every party has columns, layers or labels of its own, of the same patients: no segment has a copy a site


def vertical(
    holders: Sequence[str], labels: str, server: str = "server", *, join: Join = "features", head: bool = False
) -> Plan:
    """Several sites hold different features of the same patients, and the server joins (Vepakomma et al. 2018).

    One network for each of `bottom_<holder>` and for `trunk`; what the bottoms put out stands side by side before the
    trunk, in the order of the holders, or is added. With `head` the trunk's output goes on to the `head` at the label
    holder, and labels stay there.

    Args:
        holders: of features.
        labels: who holds the labels: one of them, the server, or a party of its own.
    """
    last = [Segment(name="trunk", at=server, join=join), *([Segment(name="head", at=labels)] if head else [])]
    return _joined(holders, last, {last[-1].name: (labels, "")}, server)


def extended_vanilla(
    holders: Sequence[str], middle: str, labels: str, server: str = "server", *, join: Join = "features"
) -> Plan:
    """As `vertical`, but the bottoms' outputs meet at another site, which runs `middle` before the server's `trunk`."""
    last = [Segment(name="middle", at=middle, join=join), Segment(name="trunk", at=server)]
    return _joined(holders, last, {"trunk": (labels, "")}, server)


def multi_task(
    holders: Sequence[str], tasks: Mapping[str, str], server: str = "server", *, join: Join = "features"
) -> Plan:
    """One joined output goes to several task holders, whose gradients are summed where it was made.

    Networks: `bottom_<holder>`, `joined` at the server, and `trunk_<target>` at the party that holds that target.

    Args:
        tasks: from each target to the party that holds it.
    """
    joined = Segment(name="joined", at=server, join=join)
    plan = _joined(holders, [joined], {}, server)
    (_, edges), *_ = plan.flows
    segments = [*plan.segments, *(Segment(name=f"trunk_{target}", at=at) for target, at in tasks.items())]
    sources = [Segment(name=f"data_{at}", at=at, kind="records") for at in dict.fromkeys(tasks.values())]
    segments += [source for source in sources if source not in segments]
    for target, at in tasks.items():
        labels = Edge(f"data_{at}", f"trunk_{target}", "labels", gradient=False, field=target)
        edges += (Edge("joined", f"trunk_{target}"), labels)
    return Plan((), tuple(segments), (("split", edges),), server)


def multi_hop(hops: Sequence[str], labels: str, server: str = "server") -> Plan:
    """A chain of parties, each of which knows only its neighbours; the first holds the records, the server ends it.

    Cut into one segment a party: `hop_1`, `hop_2`, ..., and `trunk`.
    """
    first, *_ = hops
    parts = [Segment(name=f"hop_{n}", at=at) for n, at in enumerate(hops, 1)] + [Segment(name="trunk", at=server)]
    sources = [Segment(name=f"data_{at}", at=at, kind="records") for at in dict.fromkeys((first, labels))]
    edges = chain(f"data_{first}", *(part.name for part in parts), labels=f"data_{labels}")
    return Plan((), (*sources, *parts), (("split", edges),), server)


def _joined(
    holders: Sequence[str], last: Sequence[Segment], labels: Mapping[str, tuple[str, str]], server: str
) -> Plan:
    """Bottoms at the holders, then a chain of segments of which the first joins them.

    Args:
        labels: from a segment with a loss to who holds its labels, and which.
    """
    at = dict.fromkeys((*holders, *(party for party, _ in labels.values())))
    sources = [Segment(name=f"data_{party}", at=party, kind="records") for party in at]
    bottoms = [Segment(name=f"bottom_{party}", at=party) for party in holders]
    edges = [Edge(f"data_{party}", f"bottom_{party}", gradient=False) for party in holders]
    edges += [Edge(bottom.name, last[0].name) for bottom in bottoms]
    edges += [Edge(a.name, b.name) for a, b in itertools.pairwise(last)]
    edges += [Edge(f"data_{p}", name, "labels", gradient=False, field=field) for name, (p, field) in labels.items()]
    return Plan((), (*sources, *bottoms, *last), (("split", tuple(edges)),), server)
