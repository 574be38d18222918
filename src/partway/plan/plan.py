"""Segments, where each copy of them lives, and named flows of edges between them. Data, not code.

A *segment* is a piece of a cut network, or a source, a store or a tally without weights. It has one copy, or one
copy for each site (a *lane*). Copies of one lane meet each other; a single copy meets all lanes: there the rows of
the sites join, one site after the other, and part again on the way back.

>>> from partway.plan.configurations import vanilla
>>> plan = vanilla(("a", "b", "c"))
>>> [str(copy) for copy in plan.meets(Copy("trunk"), "bottom", {"a": 4, "c": 1})]
['bottom@a', 'bottom@c']
>>> plan.validate()
[]
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Literal, NamedTuple

from partway.errors import PlanError

EACH = "each site"
"""A place (at every site) and a number of copies (one a site)."""
ONE = ""
"""The lane of a single copy."""
ALL = -1
"""All that a segment puts out."""

Rows = Mapping[str, int]
"""Records of each lane in one micro-batch; a lane without records may be left out."""
Part = Literal["train", "validation", "test", "unlabelled"]
"""Into which a site's records are divided."""
Sum = tuple[Literal["gradient", "weights", "tally"], str]
"""What of a segment's copies is summed."""


Join = Literal["features", "sum"]
"""How what several segments put out meets: side by side, or added."""
Optimizing = Literal["main", "local"]
"""The job's optimisers: of training together, and of local epochs."""


class Copy(NamedTuple):
    """One copy of a segment: the unit that runs, is summed, given and updated."""

    segment: str
    lane: str = ONE

    def __str__(self) -> str:
        return f"{self.segment}@{self.lane}" if self.lane else self.segment


@dataclass(frozen=True, kw_only=True)
class Segment:
    """A piece of a network (`net`), a source of `records`, a `store` of what was released, a `tally` of counts, or a
    `locker`: what one site has sealed for the site whose lane it is.

    `at` is a party, or `EACH` for one copy at every site. `copies=EACH` at one party keeps a copy a site, all there.
    """

    name: str
    at: str = EACH
    copies: str = ONE
    kind: Literal["net", "records", "store", "tally", "locker"] = "net"
    join: Join = "features"

    @property
    def laned(self) -> bool:
        return EACH in (self.at, self.copies)


LOSSES = ("labels", "features")
"""The kinds of edges that make a loss of what they meet."""


@dataclass(frozen=True)
class Edge:
    """What one segment hands to another; `gradient` says whether a gradient comes back along it."""

    source: str
    target: str
    kind: Literal["activations", "labels", "scores", "features"] = "activations"
    """`features` are what the target's output is compared with, as `labels` are."""
    gradient: bool = True
    field: str = ""
    """Of labels: which target of the records; empty for the only one."""
    weight: float = 1.0
    """Of features: what the loss counts."""
    portion: int = ALL
    """Of activations: which of several things that the source puts out for different segments."""

    def __str__(self) -> str:
        return f"{self.source} -> {self.target}"


@dataclass(frozen=True)
class Plan:
    """Where each copy of each segment lives, and the named flows between them.

    `sites` are the lanes, in the order in which their rows join and their shares add; `hub` adds sums and forwards
    the letters of two sites.
    """

    sites: tuple[str, ...]
    segments: tuple[Segment, ...]
    flows: tuple[tuple[str, tuple[Edge, ...]], ...]
    hub: str = "server"

    @cached_property
    def parties(self) -> tuple[str, ...]:
        """Every party that has a part: the sites, then the others, the hub last."""
        others = dict.fromkeys(s.at for s in self.segments if s.at not in (EACH, self.hub, *self.sites))
        return (*self.sites, *others, self.hub)

    @cached_property
    def holders(self) -> tuple[str, ...]:
        """The parties that bring records."""
        return tuple(p for p in self.parties if self.placed(p, "records"))

    @cached_property
    def nets(self) -> tuple[str, ...]:
        """The pieces of the network, in the order in which `split` runs them."""
        return tuple(n for n in self.order("split") or () if self[n].kind == "net")

    @cached_property
    def losses(self) -> tuple[str, ...]:
        """Those that have a loss."""
        return tuple(e.target for e in self.edges("split") if e.kind == "labels")

    @cached_property
    def _by_name(self) -> dict[str, Segment]:
        return {s.name: s for s in self.segments}

    @cached_property
    def _by_flow(self) -> dict[str, tuple[Edge, ...]]:
        return dict(self.flows)

    def __getitem__(self, name: str) -> Segment:
        return self._by_name[name]

    def edges(self, flow: str) -> tuple[Edge, ...]:
        return self._by_flow[flow] if flow else ()

    def lanes(self, name: str) -> tuple[str, ...]:
        return self.sites if self[name].laned else (ONE,)

    @cached_property
    def _copies(self) -> dict[str, tuple[Copy, ...]]:
        return {s.name: tuple(Copy(s.name, lane) for lane in self.lanes(s.name)) for s in self.segments}

    def copies(self, name: str) -> tuple[Copy, ...]:
        return self._copies[name]

    def place(self, copy: Copy) -> str:
        """The party at which a copy lives."""
        at = self[copy.segment].at
        return copy.lane if at == EACH else at

    def placed(self, party: str, kind: str = "net") -> tuple[Copy, ...]:
        """The copies of one kind of segment that live at a party."""
        return tuple(c for s in self.segments if s.kind == kind for c in self.copies(s.name) if self.place(c) == party)

    def reader(self, copy: Copy) -> str:
        """Who reads what is given to a copy: the party at which it lives, or the site whose lane a locker is."""
        return copy.lane if self[copy.segment].kind == "locker" else self.place(copy)

    def rows(self, copy: Copy, rows: Rows) -> int:
        return rows.get(copy.lane, 0) if copy.lane else sum(rows.values())

    def live(self, name: str, rows: Rows) -> tuple[Copy, ...]:
        return tuple(c for c in self.copies(name) if self.rows(c, rows))

    def meets(self, copy: Copy, name: str, rows: Rows) -> tuple[Copy, ...]:
        """The copies of `name` that an edge ties to this copy, among those that have records."""
        return tuple(c for c in self.live(name, rows) if not (c.lane and copy.lane) or c.lane == copy.lane)

    def order(self, flow: str) -> tuple[str, ...] | None:
        """The segments of a flow, sources first; None if it has a cycle."""
        edges = self.edges(flow)
        todo = [s.name for s in self.segments if any(s.name in (e.source, e.target) for e in edges)]
        ordered: list[str] = []
        while todo:
            free = [n for n in todo if not any(e.target == n and e.source in todo for e in edges)]
            if not free:
                return None
            ordered += free
            todo = [n for n in todo if n not in free]
        return tuple(ordered)

    def validate(self) -> list[str]:
        """Every fault of the plan, in words; an empty list if it can run."""
        names = [s.name for s in self.segments]
        faults = [f"segment {n}: named twice" for n in dict.fromkeys(names) if names.count(n) > 1]
        faults += [f"site {n}: named twice" for n in dict.fromkeys(self.sites) if self.sites.count(n) > 1]
        if self.hub in self.sites:
            faults.append(f"{self.hub} is a site and the hub: the hub must see no share, so it must be another party")
        for segment in self.segments:
            if segment.laned and not self.sites:
                faults.append(f"segment {segment.name}: one copy a site, but the plan has no sites")
        for flow, edges in self.flows:
            faults += [f"{flow}: {fault}" for fault in self._faults_of(flow, edges)]
        return faults

    def checked(self) -> Plan:
        """This plan, or a `PlanError` with all its faults."""
        if faults := self.validate():
            raise PlanError(faults)
        return self

    def _faults_of(self, flow: str, edges: Sequence[Edge]) -> Iterator[str]:
        known = [e for e in edges if e.source in self._by_name and e.target in self._by_name]
        yield from (f"edge {e}: no such segment" for e in edges if e not in known)
        for edge in dict.fromkeys(known):
            same = [e for e in known if (e.source, e.target, e.kind) == (edge.source, edge.target, edge.kind)]
            if len(same) > 1:
                yield f"edge {edge} drawn twice"
            yield from (f"edge {edge}: {fault}" for fault in self._faults_of_edge(edge))
        order = self.order(flow)
        if order is None:
            yield "its edges run in a circle"
            return
        for name in order:
            if self[name].kind == "net":
                yield from self._faults_of_net(name, known)
            if not self[name].laned and not self._rows_have_lanes(name, known):
                yield from (
                    f"edge {e}: these rows belong to no site"
                    for e in known
                    if e.source == name and self[e.target].laned
                )

    def _faults_of_edge(self, edge: Edge) -> Iterator[str]:
        source, target = self[edge.source], self[edge.target]
        if edge.gradient and (edge.kind != "activations" or source.kind != "net"):
            yield "a gradient cannot flow into data"
        if edge.gradient and target.kind != "net":
            yield f"a {target.kind} gives no gradient back"
        if target.kind == "records":
            yield "records are a source"
        if edge.kind in LOSSES and source.kind not in ("records", "store"):
            yield f"{edge.kind} come from records"
        if (edge.kind == "scores") != (source.kind == "tally"):
            yield "scores, and only scores, come from a tally"
        if source.kind == "records" and edge.kind != "labels" and source.at != target.at:
            yield "raw records would leave their site"

    def _faults_of_net(self, name: str, edges: Sequence[Edge]) -> Iterator[str]:
        into = [e for e in edges if e.target == name]
        out = [e for e in edges if e.source == name]
        labels = [e for e in into if e.kind in LOSSES]
        if len(labels) > 1:
            yield f"{name} has labels from two sources"
        if labels and out:
            yield f"{name} has a loss and goes on"
        if not labels and not out:
            yield f"{name} ends without labels"
        if len(labels) == len(into):
            yield f"{name} has no input"
        if not labels and any(e.gradient for e in into) and not any(e.gradient for e in out):
            yield f"{name} owes a gradient that it never gets"

    def _rows_have_lanes(self, name: str, edges: Sequence[Edge], seen: tuple[str, ...] = ()) -> bool:
        if self[name].laned:
            return True
        sources = {e.source for e in edges if e.target == name and e.source not in seen}
        return any(self._rows_have_lanes(source, edges, (*seen, name)) for source in sources)


@dataclass(frozen=True, kw_only=True)
class Judge:
    """Who looks at scores in a turn, and what follows: go on, keep what is held now as the best so far, or stop."""

    at: str
    """The party that may see the scores; it tells the others that hold `keeps` two bits."""
    tally: str
    """Whose scores it looks at: those of the newest count."""
    keeps: tuple[str, ...]
    """The segments of which every copy is kept at its best, and set back to it after the last look or a stop."""
    hears: tuple[str, ...] = ()
    """Parties that hold none of them, and are told too."""
    to: int = 0
    """The turn to go on from after a stop. Who has a part in a turn before it holds one of `keeps`, or `hears`."""
    last: bool = False
    """No look comes after this one."""


@dataclass(frozen=True, kw_only=True)
class Choice:
    """At every site by itself: whether some of its segments stay, or others take their place."""

    better: str
    """The tally whose newest scores must be better than those of the next, or they do not stay."""
    than: str
    of: tuple[tuple[str, str], ...]
    """Each segment, and the one whose weights it takes then; all have a copy at each site."""


@dataclass(frozen=True, kw_only=True)
class Turn:
    """One position of a schedule: a flow over so many rows, sums over copies, gives from copy to copy.

    Forward and backward belong to a micro-batch, sums and updates to the turn.
    """

    flow: str = ""
    """Which edges run; none where something only moves."""
    rows: tuple[Rows, ...] = ()
    """Records of each lane, one mapping a micro-batch."""
    offsets: tuple[Rows, ...] = ()
    """Where, in its own order of this epoch, each lane's rows begin; one mapping a micro-batch."""
    beside: str = ""
    """If named, the flow of the last micro-batch, whose records are unlabelled; no divisor counts them."""
    divisor: float | None = None
    """What the loss, a sum over records, is divided by: the union batch's records. None: each copy's own."""
    train: tuple[str, ...] = ()
    """The segments that are updated; the others are frozen."""
    sums: tuple[Sum, ...] = ()
    """What the hub adds up over all copies of a segment, blind, for each of them."""
    share: Mapping[str, float] = field(default_factory=dict)
    """The weight of each lane in a sum of weights; together they are 1."""
    gives: tuple[tuple[Copy, Copy], ...] = ()
    """From which copy to which the weights are handed."""
    state: bool = False
    """With them goes the state of the optimiser that updates them."""
    optimizer: Optimizing = "main"
    """Which of the job's optimisers updates."""
    rate: float = 1.0
    """What its learning rate is multiplied by."""
    clip: float = 0.0
    """The greatest norm of all gradients that one update takes together; what is longer is scaled to it. 0: none."""
    scaled: bool = False
    """The loss is scaled, and every party hears whether all gradients are finite; else nobody updates. Needs `clip`."""
    fresh: bool = False
    """That optimiser forgets its state before this turn."""
    judge: Judge | None = None
    choice: Choice | None = None
    equal: tuple[str, ...] = ()
    """The segments whose copies must have the same bits: every site tells every other a digest, sealed."""
    alike: tuple[str, ...] = ()
    """The sources that must have the same records in the same order: as `equal`, by a hash with the holders' key."""
    account: tuple[str, ...] = ()
    """The parties that tell the hub the head of their ledger."""
    records: Part = "train"
    """Which of a site's records the rows are taken from."""
    step: int = 0
    """The global step, from 0: draws and learning rate are keyed by it."""
    epoch: int = 0

    @property
    def labelled(self) -> tuple[Rows, ...]:
        """The micro-batches of `flow`."""
        return self.rows[:-1] if self.beside else self.rows

    def of(self, micro_batch: int) -> Turn:
        """This turn, as one of its micro-batches sees it: with its flow, and the part that its records are from."""
        if micro_batch < len(self.labelled):
            return self
        return replace(self, flow=self.beside, records="unlabelled")


Sizes = Mapping[str, Mapping[str, int]]
"""Records of each site in each part: `sizes["svi"]["train"]`."""
