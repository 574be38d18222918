"""Configurations of split learning: each is one function that returns a `Plan` with the flow `split`."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from partway.plan.plan import Edge, Plan, Segment

DATA = Segment(name="data", kind="records")


def chain(*names: str, labels: str = "data") -> tuple[Edge, ...]:
    """Records through one segment after another; the last one gets the labels.

    >>> [str(edge) for edge in chain("data", "bottom", "trunk")]
    ['data -> bottom', 'bottom -> trunk', 'data -> trunk']
    """
    forward = tuple(Edge(a, b, gradient=a != "data") for a, b in itertools.pairwise(names))
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


CONFIGURATIONS = {"vanilla": vanilla, "u_shaped": u_shaped}
"""What `[training] configuration` may say."""
