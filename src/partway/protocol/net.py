"""compile(plan, turn): the tasks of every party in a turn, every letter between them, and what must come before each.

What may be said in a turn is derived here from plan and turn, and listed nowhere else.

>>> from partway.plan.configurations import vanilla
>>> plan = vanilla(("a", "b", "c"))
>>> turn = Turn(flow="split", rows=({"a": 2, "b": 1},), train=("bottom", "trunk"), sums=(("gradient", "bottom"),))
>>> for letter in list(compile(plan, turn).letters)[:3]:
...     print(letter)
ACTIVATIONS bottom@a -> trunk
ACTIVATIONS bottom@b -> trunk
LABELS data@a -> trunk
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache
from typing import NamedTuple

from partway.plan.plan import LOSSES, ONE, Copy, Edge, Plan, Turn
from partway.protocol.messages import LetterKind, Post

Unit = Copy
"""One optimiser: Copy(party, lane)."""


class Task(NamedTuple):
    """Something that one party does once in a turn."""

    kind: str
    """forward backward share add load square norm update rescale give take choose attest compare judge heed account
    note ticked"""
    what: Copy
    """The copy it is about; for a sum its segment without lane, for squares, norms and updates the unit, for verdicts,
    accounts and ticks the parties."""
    micro_batch: int = 0


class Work(NamedTuple):
    """A task's place in the net."""

    at: str
    needs: set[Task | Post]
    """What must have happened at this party, or come to it, before."""
    takes: list[Post]
    """What it uses, in a fixed order: letters that come, and what would be one if it were not made here."""
    sends: list[Post]


class Route(NamedTuple):
    """A letter's place in the net."""

    sender: str
    receiver: str
    task: Task
    """The sender's task that makes it."""
    causes: frozenset[Task]
    """The receiver's own tasks without which it cannot exist."""


class Part(NamedTuple):
    """One party's tasks in a net."""

    missing: dict[Task, int]
    """How many needs each task has at first."""
    feeds: dict[Task | Post, list[Task]]
    """The tasks that need a task or a letter."""


class Net(NamedTuple):
    """One turn, for all parties."""

    tasks: dict[Task, Work]
    letters: dict[Post, Route]
    owed: dict[tuple[str, str], frozenset[Task]]
    """`owed[p, q]`: the tasks of q without which p cannot finish this turn."""
    parts: dict[str, Part]
    """By party; a party without a task has none."""


class Shape(NamedTuple):
    """All of a turn that its net depends on: who has records, not how many."""

    flow: str
    beside: str
    live: tuple[tuple[str, ...], ...]
    train: tuple[str, ...]
    sums: tuple[tuple[str, str], ...]
    gives: tuple[tuple[Copy, Copy], ...]
    chooses: bool
    equal: tuple[str, ...]
    alike: tuple[str, ...]
    judge: tuple[str, tuple[str, ...], tuple[str, ...]] | None
    """Who judges, the segments that are kept, and who hears it besides."""
    account: tuple[str, ...]
    clip: bool
    scaled: bool


def shape(turn: Turn) -> Shape:
    live = tuple(tuple(lane for lane, n in rows.items() if n) for rows in turn.rows)
    judge = (turn.judge.at, turn.judge.keeps, turn.judge.hears) if turn.judge else None
    options = turn.clip > 0, turn.scaled
    return Shape(
        turn.flow,
        turn.beside,
        live,
        turn.train,
        turn.sums,
        turn.gives,
        turn.choice is not None,
        turn.equal,
        turn.alike,
        judge,
        turn.account,
        *options,
    )


def compile(plan: Plan, turn: Turn) -> Net:
    """The net of a turn. Turns of the same shape share one."""
    return _compile(plan, shape(turn))


@lru_cache(maxsize=1024)
def _compile(plan: Plan, turn: Shape) -> Net:
    return _Compiler(plan, turn).net()


EDGE_LETTERS = {
    "activations": LetterKind.ACTIVATIONS,
    "labels": LetterKind.LABELS,
    "scores": LetterKind.SCORES,
    "features": LetterKind.ACTIVATIONS,
}


def squared(plan: Plan, turn: Turn | Shape, unit: Unit) -> list[Copy]:
    """The copies whose squares a unit tells: its own, and of a summed segment if it has the first lane."""
    mine = (Copy(name, unit.lane) for name in turn.train if unit.lane in plan.lanes(name))
    summed = {name for what, name in turn.sums if what == "gradient"}
    first = unit.lane == plan.sites[0] if plan.sites else False
    return [c for c in mine if plan.place(c) == unit.segment and (first or c.segment not in summed)]


class _Compiler:
    def __init__(self, plan: Plan, turn: Shape) -> None:
        self.plan, self.turn = plan, turn
        self.tasks: dict[Task, Work] = {}
        self.letters: dict[Post, Route] = {}
        self.edges = plan.edges(turn.flow)
        self.past: dict[Task, set[Task]] = {}

    def net(self) -> Net:
        self.run()
        self.sum_and_update()
        self.give()
        self.tell_all()
        self.decide()
        self.tick()
        self.past.clear()
        for post, route in self.letters.items():
            before = {route.task} | self.before(route.task)
            causes = frozenset(t for t in before if self.tasks[t].at == route.receiver)
            self.letters[post] = route._replace(causes=causes)
        owed: dict[tuple[str, str], set[Task]] = {}
        for task, work in self.tasks.items():
            for earlier in self.before(task):
                owed.setdefault((work.at, self.tasks[earlier].at), set()).add(earlier)
        frozen = {pair: frozenset(tasks) for pair, tasks in owed.items()}
        return Net(self.tasks, self.letters, frozen, self.parts())

    def parts(self) -> dict[str, Part]:
        parts: dict[str, Part] = {}
        for task, work in self.tasks.items():
            part = parts.setdefault(work.at, Part({}, {}))
            part.missing[task] = len(work.needs)
            for need in work.needs:
                part.feeds.setdefault(need, []).append(task)
        return parts

    def task(self, kind: str, what: Copy, at: str, micro_batch: int = 0, needs: Iterable[Task | Post] = ()) -> Task:
        task = Task(kind, what, micro_batch)
        self.tasks.setdefault(task, Work(at, set(needs), [], []))
        return task

    def tell(self, made: Task, kind: LetterKind, source: Copy, target: Copy, user: Task, micro_batch: int = 0) -> None:
        """`user` takes what `made` made: a need at one party, a letter between two."""
        sender, receiver = self.tasks[made].at, self.tasks[user].at
        post = Post(kind, source, target, micro_batch)
        self.tasks[user].takes.append(post)
        if sender == receiver:
            self.tasks[user].needs.add(made)
            return
        self.letters[post] = Route(sender, receiver, made, frozenset())
        self.tasks[made].sends.append(post)
        self.tasks[user].needs.add(post)

    # -- forward and backward, for each micro-batch

    def into(self, name: str) -> list[Edge]:
        return [e for e in self.edges if e.target == name]

    def trains(self, name: str) -> bool:
        """This segment, or one before it along gradients, is updated."""
        return name in self.turn.train or any(e.gradient and self.trains(e.source) for e in self.into(name))

    def has_loss(self, name: str) -> bool:
        return self.plan[name].kind == "net" and any(e.kind in LOSSES for e in self.into(name))

    def gradients_from(self, name: str) -> list[Edge]:
        return [e for e in self.edges if e.source == name and e.gradient and self.goes_back(e.target)]

    def goes_back(self, name: str) -> bool:
        return bool(self.turn.train) and self.trains(name) and (self.has_loss(name) or bool(self.gradients_from(name)))

    def run(self) -> None:
        plan = self.plan
        self.last_backward: dict[Copy, Task] = {}
        for m, lanes in enumerate(self.turn.live):
            last = m == len(self.turn.live) - 1
            flow = self.turn.beside if self.turn.beside and last else self.turn.flow
            order, self.edges = plan.order(flow) or (), plan.edges(flow)
            rows = dict.fromkeys(lanes, 1)
            for name in order:
                for copy in plan.live(name, rows):
                    forward = self.task("forward", copy, plan.place(copy), m)
                    for edge in self.into(name):
                        for source in plan.meets(copy, edge.source, rows):
                            self.tell(Task("forward", source, m), EDGE_LETTERS[edge.kind], source, copy, forward, m)
            for name in filter(self.goes_back, reversed(order)):
                for copy in plan.live(name, rows):
                    # Micro-batches add up in their order, so that the bits do not depend on delivery.
                    needs = [Task("forward", copy, m)]
                    if copy in self.last_backward:
                        needs.append(self.last_backward[copy])
                    self.last_backward[copy] = backward = self.task("backward", copy, plan.place(copy), m, needs)
                    for edge in self.gradients_from(name):
                        for target in plan.meets(copy, edge.target, rows):
                            self.tell(Task("backward", target, m), LetterKind.GRADIENT, target, copy, backward, m)

    # -- sums and updates, for the whole turn

    def sum_and_update(self) -> None:
        plan = self.plan
        updates: dict[Unit, set[Task]] = {}
        for copy, backward in self.last_backward.items():
            if copy.segment in self.turn.train:
                updates.setdefault(Copy(plan.place(copy), copy.lane), set()).add(backward)
        for what, name in self.turn.sums:
            made_by = {"gradient": "backward", "tally": "forward", "weights": ""}[what]
            add = self.task("add", Copy(name), plan.hub)
            for copy in plan.copies(name):
                own = [t for t in self.tasks if t.kind == made_by and t.what == copy]
                share = self.task("share", copy, plan.place(copy), needs=own)
                self.tell(share, LetterKind.SHARE, copy, Copy(name), add)
                load = self.task("load", copy, plan.place(copy))
                self.tell(add, LetterKind.SUM, Copy(name), copy, load)
                if what == "gradient":
                    updates.setdefault(Copy(plan.place(copy), copy.lane), set()).add(load)
        for unit, needs in updates.items():
            self.task("update", unit, unit.segment, needs=needs)
        if self.turn.clip and updates:
            self.clip(updates)

    def clip(self, updates: dict[Unit, set[Task]]) -> None:
        """Squares to where they are added, and the norm back. Lanes that nothing joins have a norm each.

        With a scaled loss every unit tells whether its gradient is finite, and all hear, who have no rows too: the
        scale of the next turn depends on it.
        """
        plan, turn = self.plan, self.turn
        joined = any(what == "gradient" for what, _ in turn.sums)
        joined = joined or not all(plan[copy.segment].laned for copy in self.last_backward)
        hear = dict.fromkeys(updates)
        if turn.scaled and joined:
            hear |= dict.fromkeys(Copy(plan.place(c), c.lane) for name in turn.train for c in plan.copies(name))
        for lane in [ONE] if joined else dict.fromkeys(unit.lane for unit in updates):
            units = [unit for unit in hear if joined or unit.lane == lane]
            places = {unit.segment for unit in units}
            at = places.pop() if len(places) == 1 else plan.hub
            norm = self.task("norm", Copy(at, lane), at)
            for unit in units:
                if unit in updates and (turn.scaled or squared(plan, turn, unit)):
                    square = self.task("square", unit, unit.segment, needs=updates[unit])
                    self.tell(square, LetterKind.SQUARE, unit, norm.what, norm)
            for unit in units:
                use = self.task("update" if unit in updates else "rescale", unit, unit.segment)
                self.tell(norm, LetterKind.NORM, norm.what, unit, use)

    def give(self) -> None:
        for source, target in self.turn.gives:
            give = self.task("give", source, self.plan.place(source))
            take = self.task("take", target, self.plan.place(target))
            self.tell(give, LetterKind.STATE, source, target, take)
        for site in self.plan.sites if self.turn.chooses else ():
            self.task("choose", Copy(site), site)

    def tell_all(self) -> None:
        """Digests of copies that must be equal, to each other copy; heads of ledgers, to the hub."""
        groups = [self.plan.copies(name) for name in self.turn.equal]
        groups += [tuple(c for name in self.turn.alike for c in self.plan.copies(name))]
        for group in groups:
            for copy in group:
                self.task("attest", copy, self.plan.place(copy))
            for copy in group:
                compare = self.task("compare", copy, self.plan.place(copy), needs=[Task("attest", copy)])
                for other in group:
                    if other != copy:
                        self.tell(Task("attest", other), LetterKind.EQUAL, other, copy, compare)
        for party in self.turn.account:
            # After all else that it does in the turn, so that the ledger's range is closed behind it.
            mine = [t for t, w in self.tasks.items() if w.at == party]
            account = self.task("account", Copy(party), party, needs=mine)
            note = self.task("note", Copy(party), self.plan.hub)
            self.tell(account, LetterKind.ACCOUNT, Copy(party), Copy(self.plan.hub), note)

    def decide(self) -> None:
        """The judge looks when its part of the turn is done; who holds what is kept hears what it says."""
        if self.turn.judge is None:
            return
        at, keeps, hears = self.turn.judge
        judge = self.task("judge", Copy(at), at, needs=[t for t, w in self.tasks.items() if w.at == at])
        holders = dict.fromkeys(self.plan.place(c) for name in keeps for c in self.plan.copies(name)) | dict.fromkeys(
            hears
        )
        for party in holders:
            if party != at:
                heed = self.task("heed", Copy(party), party)
                self.tell(judge, LetterKind.VERDICT, Copy(at), Copy(party), heed)

    # -- what follows from the rest

    def before(self, task: Task) -> set[Task]:
        """Every task, at any party, without which this one cannot be done."""
        if task not in self.past:
            self.past[task] = found = set()
            for need in self.tasks[task].needs:
                earlier = self.letters[need].task if isinstance(need, Post) else need
                found |= {earlier} | self.before(earlier)
        return self.past[task]

    def tick(self) -> None:
        """Who would hear nothing back in a turn gets a tick: nobody is more than one shared turn ahead."""
        pairs = dict.fromkeys((r.sender, r.receiver) for r in self.letters.values())
        for sender, receiver in pairs:
            mine = [t for t, w in self.tasks.items() if w.at == sender]
            if any(self.tasks[earlier].at == receiver for t in mine for earlier in self.before(t)):
                continue
            uses = (
                t for t, w in self.tasks.items() if w.at == receiver and any(self._from(n, sender) for n in w.needs)
            )
            first = next(uses)
            ticked = self.task("ticked", Copy(receiver, sender), sender)
            self.tell(first, LetterKind.TICK, Copy(receiver), Copy(sender), ticked)

    def _from(self, need: Task | Post, sender: str) -> bool:
        return isinstance(need, Post) and self.letters[need].sender == sender
