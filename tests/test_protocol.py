"""What may be said next: nets, steps and sessions, without torch. Every delivery order, forged and early letters."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import dataclass, replace

import msgspec
import pytest

from partway.errors import PeerError
from partway.plan.configurations import (
    chain,
    extended_vanilla,
    multi_hop,
    multi_task,
    u_shaped,
    vanilla,
    vertical,
)
from partway.plan.options import Options, with_options
from partway.plan.phases import Schedule, Settings
from partway.plan.plan import Copy, Edge, Plan, Segment, Sizes, Turn
from partway.plan.rounds import averaged, relay, splitfed_v1, splitfed_v2, splitfed_v3
from partway.plan.schedules import every_party, half_trained, synchronous
from partway.protocol.messages import (
    Bye,
    Counts,
    Fail,
    GroupKey,
    Head,
    Hello,
    Letter,
    LetterKind,
    Message,
    Offer,
    Post,
    Ready,
    Reason,
)
from partway.protocol.net import Task, compile, shape
from partway.protocol.session import TABLE, Derive, Do, Send, Session, State, agreement
from partway.protocol.step import NOT_YET, Notice, Step

SITES = ("a", "b", "c")
JOB = bytes(range(32))
RECORDS = {"a": Counts(13, 2, 3), "b": Counts(1, 0, 2), "c": Counts(6, 3, 0)}
EVERYTHING = Settings(
    epochs=2, batch=7, standardise=True, validate_every=1, test=True, site_scores=True, bottom_to_everyone=True
)
LOOKS = Settings(epochs=2, batch=3, validate_every=1, keep_best=True, test=True)
HALF = replace(EVERYTHING, rounds=2, local_epochs=1, local_batch=5, synchronous_epochs=1, keep_best=True)


def relay_of_labels() -> tuple[Plan, Schedule]:
    """A plan where one site only sends and another only forwards: nothing of `synchronous` needs ticks or seals."""
    segments = (
        Segment(name="data", kind="records"),
        Segment(name="bottom"),
        Segment(name="middle", at="b"),
        Segment(name="shelf", at="server", kind="store"),
    )
    edges = (Edge("bottom", "middle", gradient=False), Edge("middle", "shelf", gradient=False))
    plan = Plan(SITES, segments, (("release", (Edge("data", "bottom", gradient=False), *edges)),))
    rows = ({"a": 2, "c": 1}, {"a": 1})
    return plan.checked(), lambda _: tuple(Turn(flow="release", rows=rows, offsets=rows, step=n) for n in range(5))


def optioned(made: tuple[Plan, Schedule], private: bool = False, **options: object) -> tuple[Plan, Schedule]:
    """A schedule with options of training; `private`: no gradients are summed."""
    plan, schedule = made
    written = with_options(plan, schedule, Options(**options))

    def turns(sizes: Sizes) -> tuple[Turn, ...]:
        return tuple(replace(t, sums=()) if private and t.train else t for t in written(sizes))

    return plan, turns


CASES = {
    "vanilla": lambda: synchronous(vanilla(SITES), EVERYTHING),
    "u_shaped": lambda: synchronous(u_shaped(SITES), EVERYTHING),
    "judged": lambda: synchronous(vanilla(SITES), replace(EVERYTHING, keep_best=True)),
    "half_trained": lambda: half_trained(vanilla(SITES), HALF),
    "relay": relay_of_labels,
    "averaged": lambda: averaged(u_shaped(SITES), replace(LOOKS, batch=7, average_every=2)),
    "handed on": lambda: relay(u_shaped(SITES), replace(LOOKS, turn_batches=2, relay_order="random")),
    "kept": lambda: relay(u_shaped(SITES), replace(LOOKS, turn_batches=2, relay_kept=True)),
    "splitfed_v1": lambda: splitfed_v1(vanilla(SITES), LOOKS),
    "splitfed_v2": lambda: splitfed_v2(vanilla(SITES), LOOKS),
    "splitfed_v3": lambda: splitfed_v3(u_shaped(SITES), LOOKS),
    "clipped splitfed_v1": lambda: optioned(splitfed_v1(vanilla(SITES), LOOKS), clip=1.0, micro_batch=2, scaled=True),
    "clipped, kept": lambda: optioned(relay(u_shaped(SITES), replace(LOOKS, relay_kept=True)), clip=1.0, scaled=True),
    "vertical": lambda: every_party(vertical(SITES, "b"), LOOKS),
    "labels apart": lambda: every_party(vertical(SITES[:2], "c"), LOOKS),
    "labels at the server": lambda: every_party(vertical(SITES, "server"), LOOKS),
    "extended_vanilla": lambda: every_party(extended_vanilla(SITES[:2], "c", "a"), LOOKS),
    "multi_task": lambda: every_party(multi_task(SITES[:2], {"one": "a", "other": "c", "third": "server"}), LOOKS),
    "multi_hop": lambda: every_party(multi_hop(SITES[:2], "c"), LOOKS),
    "clipped": lambda: optioned(synchronous(u_shaped(SITES), EVERYTHING), clip=1.0, micro_batch=3),
    "clipped apart": lambda: optioned(half_trained(vanilla(SITES), HALF), clip=1.0, micro_batch=3),
    "scaled": lambda: optioned(half_trained(vanilla(SITES), HALF), scaled=True),
    "private": lambda: optioned(synchronous(u_shaped(SITES), EVERYTHING), private=True, clip=1.0, micro_batch=3),
    "private scaled": lambda: optioned(synchronous(vanilla(SITES), EVERYTHING), private=True, scaled=True),
    "vertical clipped": lambda: optioned(every_party(vertical(SITES, "b"), LOOKS), clip=1.0, micro_batch=2),
}
cases = pytest.mark.parametrize("case", CASES)


def hello_of(party: str, plan: Plan | None = None) -> Hello:
    records = RECORDS.get(party, Counts())
    if plan is not None and not plan.sites:  # all hold columns of the same patients
        records = Counts(5, 2, 1) if party in plan.holders else Counts()
    return Hello("1", records, b"", b"", b"")


def sizes_of(plan: Plan) -> Sizes:
    return {party: msgspec.structs.asdict(hello_of(party, plan).records) for party in plan.holders}


def accept(sender: str, message: Message) -> None:
    """Signatures are the party's business."""


@dataclass
class Said:
    """One message on its way."""

    head: Head
    message: Message


class Players:
    """A session for each party, and workers that do at once what they may."""

    def __init__(self, plan: Plan, schedule: Schedule, stop: int = -1) -> None:
        self.stop = stop
        """The turn whose judge says stop."""
        self.sessions = {p: Session(p, plan, schedule, JOB, hello_of(p, plan), accept) for p in plan.parties}
        self.held: dict[str, list[Said]] = {p: [] for p in plan.parties}
        self.done: list[tuple[str, int, Task]] = []
        self.said: list[Said] = []

    def open(self, party: str) -> list[Said]:
        return self._run(party, self.sessions[party].open())

    def receive(self, party: str, said: Said) -> list[Said]:
        out, again = self._take(party, said), True
        while again:
            again, waiting = False, self.held[party]
            for early in list(waiting):
                waiting.remove(early)
                more = self._take(party, early)
                again = again or bool(more)
                out += more
        return out

    def deliver(self, seed: int, meddle: Callable[[random.Random], None] = lambda rng: None) -> None:
        """Any order, any delay, a tenth twice."""
        rng = random.Random(seed)
        flight = [said for party in rng.sample(sorted(self.sessions), len(self.sessions)) for said in self.open(party)]
        while flight:
            said = flight.pop(rng.randrange(len(flight)))
            if rng.random() < 0.1:
                flight.append(said)
            meddle(rng)
            flight += self.receive(said.head.to, said)

    @property
    def states(self) -> set[State]:
        return {session.state for session in self.sessions.values()}

    def _take(self, party: str, said: Said) -> list[Said]:
        outcome = self.sessions[party].receive(said.head, said.message)
        if outcome is NOT_YET:
            self.held[party].append(said)
        return self._run(party, outcome) if isinstance(outcome, list) else []

    def _run(self, party: str, effects: list) -> list[Said]:
        session, out, todo = self.sessions[party], [], list(effects)
        while todo:
            effect = todo.pop(0)
            if isinstance(effect, Send):
                out.append(Said(session.head(effect.to), effect.message))
            elif isinstance(effect, Do):
                self.done.append((party, effect.turn, effect.task))
                verdict = effect.task.kind in ("judge", "heed") and effect.turn == self.stop
                todo += session.did(effect.task, verdict)
            elif isinstance(effect, Derive):
                todo += session.ready(b"", b"")
        self.said += out
        return out


def letters_of(said: list[Said]) -> list[Said]:
    return [s for s in said if isinstance(s.message, Letter)]


@cases
def test_every_delivery_order_ends_and_does_every_task_once(case: str) -> None:
    plan, schedule = CASES[case]()
    quiet = Players(plan, schedule)
    quiet.deliver(0)
    turns = quiet.sessions["server"].turns
    expected = {(w.at, n, t) for n, turn in enumerate(turns) for t, w in compile(plan, turn).tasks.items()}
    for seed in range(30):
        players = Players(plan, schedule)
        players.deliver(seed)
        assert players.states == {State.ENDED}
        assert not any(players.held.values())
        assert len(players.done) == len(expected)
        assert set(players.done) == expected


@pytest.mark.parametrize("case", ["judged", "half_trained", "vertical", "labels apart", "multi_task"])
def test_after_a_stop_nobody_does_a_turn_before_the_one_to_go_on_from(case: str) -> None:
    plan, schedule = CASES[case]()
    turns = schedule(sizes_of(plan))
    looks = [n for n, turn in enumerate(turns) if turn.judge and n + 1 < turn.judge.to]
    assert looks
    for stop in looks:
        judge = turns[stop].judge
        skipped = range(stop + 1, judge.to)
        expected = {
            (w.at, n, t)
            for n, turn in enumerate(turns)
            if n not in skipped
            for t, w in compile(plan, turn).tasks.items()
        }
        for seed in range(20):
            players = Players(plan, schedule, stop)
            players.deliver(seed)
            assert players.states == {State.ENDED}
            assert not any(players.held.values())
            assert len(players.done) == len(expected)
            assert set(players.done) == expected


@cases
def test_a_party_that_is_silent_holds_up_the_others(case: str) -> None:
    players = Players(*CASES[case]())
    flight = [said for party in players.sessions for said in players.open(party)]
    while flight:
        said = flight.pop()
        if said.head.sender != "b":
            flight += players.receive(said.head.to, said)
    waits = {party: session.waits_for() for party, session in players.sessions.items() if party != "b"}
    assert all(missing == ["b"] for missing in waits.values())
    assert players.sessions["b"].state is State.AGREEING


def forged(rng: random.Random, real: list[Said]) -> Said:
    """A message with one field of another one."""
    one, other = rng.choice(real), rng.choice(real)
    head, message = one.head, one.message
    what = rng.choice(["sender", "to", "job", "epoch", "letter", "turn"])
    if what == "letter" and isinstance(message, Letter) and isinstance(other.message, Letter):
        field = rng.choice(Post._fields)
        post = message.post._replace(**{field: getattr(other.message.post, field)})
        return Said(head, msgspec.structs.replace(message, post=post))
    if what == "turn" and isinstance(message, Letter):
        return Said(head, msgspec.structs.replace(message, turn=max(0, message.turn + rng.choice([-1, 1, 2, 9]))))
    change = {"job": bytes(32), "epoch": 1}
    field = what if what in ("sender", "to", *change) else "sender"
    return Said(msgspec.structs.replace(head, **{field: change.get(field, getattr(other.head, field))}), message)


@cases
def test_forged_messages_are_refused_and_change_nothing(case: str) -> None:
    plan, schedule = CASES[case]()
    quiet = Players(plan, schedule)
    quiet.deliver(0)
    real = {(s.head, s.message) for s in quiet.said}
    refused = 0
    for seed in range(4):
        players = Players(plan, schedule)

        def meddle(rng: random.Random, players: Players = players) -> None:
            nonlocal refused
            lie = forged(rng, quiet.said)
            if (lie.head, lie.message) in real or isinstance(lie.message, Hello):
                return  # a HELLO in another's name is found by its signature
            session = players.sessions[lie.head.to]
            before = snapshot(session)
            with pytest.raises(PeerError):
                session.receive(lie.head, lie.message)
            assert snapshot(session) == before
            refused += 1

        players.deliver(seed, meddle)
        assert players.states == {State.ENDED}
    assert refused > 100


def snapshot(session: Session) -> tuple:
    step = session.step
    return session.state, session.at, step and (len(step.done), len(step.heard)), deepcopy(session._notes)


@cases
def test_a_frozen_party_takes_what_can_exist_and_nothing_else(case: str) -> None:
    """One party stops at a random moment, the others go on until nothing moves: all that can exist has been sent."""
    plan, schedule = CASES[case]()
    quiet = Players(plan, schedule)
    quiet.deliver(0)
    real = letters_of(quiet.said)
    taken = refused = 0
    for seed in range(25):
        rng, players = random.Random(seed), Players(plan, schedule)
        frozen, moves = rng.choice(plan.parties), rng.randrange(1, len(quiet.said))
        flight = [said for party in players.sessions for said in players.open(party)]
        while possible := [s for s in flight if moves > 0 or s.head.to != frozen]:
            said = rng.choice(possible)
            flight.remove(said)
            moves -= 1
            flight += players.receive(said.head.to, said)
        session = players.sessions[frozen]
        if not session.turns:
            continue
        exist = {(s.head, s.message) for s in players.said}
        for letter in real:
            if letter.head.to != frozen:
                continue
            probe = deepcopy(session, {id(o): o for o in (plan, session.turns, session.nets)})
            exists = (letter.head, letter.message) in exist
            try:
                outcome = probe.receive(letter.head, letter.message)
            except PeerError:
                assert not exists, f"{letter} exists, and is refused"
                refused += 1
            else:
                assert exists or outcome is NOT_YET, f"{letter} cannot exist"
                taken += 1
    assert min(taken, refused) > 50


def may_come_first(plan: Plan, turn: Turn, me: str, sender: str, post: Post) -> bool:
    """Told again, from the edges alone: may this letter be the first thing that `me` hears in a turn?"""
    edges = plan.edges(turn.flow)
    names = {s.name for s in plan.segments}

    def alive(copy: Copy, m: int) -> bool:
        known = copy.segment in names and copy.lane in plan.lanes(copy.segment)
        return known and m < len(turn.rows) and plan.rows(copy, turn.rows[m]) > 0

    def tied(one: Copy, other: Copy) -> bool:
        return not (one.lane and other.lane) or one.lane == other.lane

    def neighbours(copy: Copy, m: int, upwards: bool) -> Iterator[Copy]:
        for edge in edges:
            near, far = (edge.target, edge.source) if upwards else (edge.source, edge.target)
            if near == copy.segment and (upwards or edge.gradient):
                yield from (c for c in plan.copies(far) if tied(c, copy) and alive(c, m))

    def needs_me(copy: Copy, m: int) -> bool:
        return plan.place(copy) == me or any(needs_me(c, m) for c in neighbours(copy, m, upwards=True))

    def returns_through_me(copy: Copy, m: int) -> bool:
        return needs_me(copy, m) or any(returns_through_me(c, m) for c in neighbours(copy, m, upwards=False))

    kind, source, target, m = post
    if sender == me:
        return False
    if kind in (LetterKind.ACTIVATIONS, LetterKind.LABELS, LetterKind.SCORES):
        drawn = any((e.source, e.target, e.kind) == (source.segment, target.segment, kind.name.lower()) for e in edges)
        here = drawn and alive(source, m) and alive(target, m) and tied(source, target)
        return here and (plan.place(source), plan.place(target)) == (sender, me) and not needs_me(source, m)
    if m:
        return False
    if kind in (LetterKind.SQUARE, LetterKind.NORM):
        summed = {name for what, name in turn.sums if what == "gradient"}
        joined = bool(summed) or not all(plan[name].laned for name in turn.train)
        held = [c for name in turn.train for c in plan.copies(name)]
        moved = [c for c in held if c.segment in summed or any(alive(c, n) for n in range(len(turn.rows)))]
        lane = "" if joined else (target if kind is LetterKind.SQUARE else source).lane
        group = [c for c in (held if turn.scaled and joined else moved) if joined or c.lane == lane]
        places = {plan.place(c) for c in group}
        norm = Copy(places.pop() if len(places) == 1 else plan.hub, lane)
        telling = [c for c in moved if turn.scaled or c.segment not in summed or c.lane == plan.sites[0]]

        def waits(c: Copy) -> bool:  # every party has a part in a sum
            return c.segment in summed or any(returns_through_me(c, n) for n in range(len(turn.rows)) if alive(c, n))

        def units(copies: list[Copy]) -> set[Copy]:
            return {Copy(plan.place(c), c.lane) for c in copies}

        if not turn.clip or not turn.train:
            return False
        if kind is LetterKind.SQUARE:
            drawn = (sender, me, target) == (source.segment, norm.segment, norm) and source in units(telling)
            return drawn and not any(waits(c) for c in moved if source in units([c]))
        drawn = (sender, source, me) == (norm.segment, norm, target.segment) and target in units(group)
        return drawn and not any(waits(c) for c in moved if c in group and units([c]) <= units(telling))
    if kind is LetterKind.SHARE and me == plan.hub:
        what = [w for w, name in turn.sums if name == source.segment and target == Copy(name)]
        if not what or source.lane not in plan.lanes(source.segment) or plan.place(source) != sender:
            return False
        waits = returns_through_me if what == ["gradient"] else needs_me
        return not any(waits(source, n) for n in range(len(turn.rows)) if alive(source, n))
    if kind is LetterKind.STATE:
        return (source, target) in turn.gives and (plan.place(source), plan.place(target)) == (sender, me)
    if kind is LetterKind.EQUAL:
        groups = [*map(plan.copies, turn.equal), [c for n in turn.alike for c in plan.copies(n)]]
        pairs = [pair for group in groups for pair in itertools.permutations(group, 2)]
        return (source, target) in pairs and (plan.place(source), plan.place(target)) == (sender, me)
    if kind is LetterKind.VERDICT:
        holders = {plan.place(c) for name in turn.judge.keeps for c in plan.copies(name)} if turn.judge else set()
        holders |= set(turn.judge.hears) if turn.judge else set()
        if turn.judge is None or turn.judge.at != sender or me not in holders:
            return False
        looked = [c for e in edges for c in plan.copies(e.target) if plan.place(c) == sender]
        waits = any(alive(c, n) and needs_me(c, n) for c in looked for n in range(len(turn.rows)))
        return (source, target) == (Copy(sender), Copy(me)) and not waits
    if kind is LetterKind.ACCOUNT:
        told = sender in turn.account and not turn.sums  # the head is told after the sender's part, and a sum is mine
        return told and me == plan.hub and (source, target) == (Copy(sender), Copy(me))
    return False


@cases
def test_first_letters_are_judged_as_by_a_second_reading_of_the_plan(case: str) -> None:
    plan, schedule = CASES[case]()
    turns = schedule(sizes_of(plan))
    legal = seen = 0
    first = set[LetterKind]()
    kinds = {
        (t.flow, t.sums, len(t.gives), t.equal, len(t.rows), bool(t.judge), t.account, t.scaled and shape(t).live): t
        for t in turns
    }
    for turn in kinds.values():
        net = compile(plan, turn)
        things = {x for post in net.letters for x in (post.source, post.target)}
        things |= {c for s in plan.segments for c in plan.copies(s.name)} | {Copy("nobody"), Copy("")}
        unknown = [Post(*p) for p in itertools.product(LetterKind, things, things, range(2))]
        for post in [*net.letters, *random.Random(0).sample(unknown, 300)]:
            for me, sender in itertools.product(plan.parties, repeat=2):
                expected = may_come_first(plan, turn, me, sender, post)
                try:
                    Step(me, net).receive(sender, post, 0)
                except PeerError:
                    assert not expected, (me, sender, post)
                else:
                    assert expected, (me, sender, post)
                    legal += 1
                    first.add(post.kind)
                seen += 1
    assert 0 < legal < seen
    if case == "private scaled":  # who has no records hears the norm all the same
        assert LetterKind.NORM in first


def test_who_hears_what_can_be_read_off_the_net() -> None:
    def kinds(case: str) -> set[LetterKind]:
        plan, schedule = CASES[case]()
        return {post.kind for turn in schedule(sizes_of(plan)) for post in compile(plan, turn).letters}

    assert LetterKind.LABELS in kinds("vanilla")
    assert LetterKind.LABELS not in kinds("u_shaped")
    assert LetterKind.GRADIENT in kinds("vanilla") & kinds("u_shaped")
    assert kinds("relay") == {LetterKind.ACTIVATIONS, LetterKind.TICK}
    norms = {LetterKind.SQUARE, LetterKind.NORM}
    assert all(
        (norms <= kinds(case)) == case.startswith(("clipped", "scaled", "private", "vertical clipped"))
        for case in CASES
    )


def test_who_hears_nothing_back_gets_a_tick_and_cannot_run_ahead() -> None:
    plan, schedule = relay_of_labels()
    players = Players(plan, schedule)
    flight = [said for party in players.sessions for said in players.open(party)]
    while possible := [s for s in flight if s.head.to != "b" or not isinstance(s.message, Letter)]:
        flight.remove(possible[0])
        flight += players.receive(possible[0].head.to, possible[0])
    assert {s.message.turn for s in letters_of(players.said) if s.head.sender == "a"} == {0}


def test_a_site_without_records_still_sends_its_share() -> None:
    plan = vanilla(SITES)
    turn = Turn(flow="split", rows=({"a": 3},), train=("bottom", "trunk"), sums=(("gradient", "bottom"),))
    net = compile(plan, turn)
    assert Post(LetterKind.SHARE, Copy("bottom", "b"), Copy("bottom")) in net.letters
    assert Task("forward", Copy("bottom", "b")) not in net.tasks
    assert Task("update", Copy("b", "b")) in net.tasks


def test_without_lanes_every_party_tells_the_squares_of_its_own_segment() -> None:
    """Three parties in a row, one copy of everything: the hub adds, and tells all."""
    parties = (("data", "left"), ("bottom", "left"), ("middle", "right"), ("trunk", "server"))
    segments = tuple(Segment(name=n, at=at, kind="records" if n == "data" else "net") for n, at in parties)
    plan = Plan((), segments, (("split", chain("data", "bottom", "middle", "trunk")),)).checked()
    turn = Turn(flow="split", rows=({"": 5},), train=("bottom", "middle", "trunk"), clip=1.0)
    for scaled in (False, True):
        letters = compile(plan, replace(turn, scaled=scaled)).letters.items()
        told = [(r.sender, r.receiver) for post, r in letters if post.kind is LetterKind.SQUARE]
        heard = [(r.sender, r.receiver) for post, r in letters if post.kind is LetterKind.NORM]
        assert sorted(told) == [("left", "server"), ("right", "server")]
        assert sorted(heard) == [("server", "left"), ("server", "right")]
    alone = compile(plan, replace(turn, train=("trunk",)))  # nobody else updates: nothing to tell
    assert not {post.kind for post in alone.letters} & {LetterKind.SQUARE, LetterKind.NORM}


def test_gradients_stop_where_nothing_before_trains() -> None:
    plan = vanilla(SITES)
    frozen = compile(plan, Turn(flow="split", rows=({"a": 3},), train=("trunk",)))
    assert not any(post.kind is LetterKind.GRADIENT for post in frozen.letters)
    assert Task("update", Copy("server")) in frozen.tasks
    evaluated = compile(plan, Turn(flow="split", rows=({"a": 3},)))
    assert not any(task.kind in ("backward", "update") for task in evaluated.tasks)


def test_the_same_letter_twice_is_nothing_and_another_one_under_its_name_is_refused() -> None:
    plan = vanilla(SITES)
    step = Step("server", compile(plan, Turn(flow="split", rows=({"a": 3, "b": 1},), train=("bottom", "trunk"))))
    post = Post(LetterKind.ACTIVATIONS, Copy("bottom", "a"), Copy("trunk"))
    assert step.receive("a", post, content=1) is None
    assert step.receive("a", post, content=1) is Notice.ALREADY
    with pytest.raises(PeerError, match="twice"):
        step.receive("a", post, content=2)
    with pytest.raises(PeerError, match="a's to send"):
        step.receive("b", post, content=1)


def test_compile_knows_who_has_records_and_not_how_many() -> None:
    plan = vanilla(SITES)
    turn = Turn(flow="split", rows=({"a": 3, "b": 0},), train=("bottom",))
    assert compile(plan, turn) is compile(plan, replace(turn, rows=({"a": 9, "b": 0},), step=4))
    assert compile(plan, turn) is not compile(plan, replace(turn, rows=({"a": 3, "b": 1},)))


# -- joining


def joined() -> Players:
    players = Players(*CASES["vanilla"]())
    players.deliver(1)
    return players


@pytest.mark.parametrize(
    ("message", "words"),
    [
        (msgspec.structs.replace(hello_of("a"), version="2"), "install the same version"),
        (Ready(bytes(32), b"", b""), None),
        (Letter(0, Post(LetterKind.SHARE, Copy("sums", "a"), Copy("sums"))), "while server is joining"),
        (Bye(), "while server is joining"),
        (Offer(b"", b""), "while server is joining"),
    ],
)
def test_while_joining(message: Message, words: str | None) -> None:
    session = Players(*CASES["vanilla"]()).sessions["server"]
    head = Head("a", "server", JOB)
    if words is None:
        assert session.receive(head, message) is NOT_YET
        return
    with pytest.raises(PeerError, match=words):
        session.receive(head, message)
    assert session.waits_for() == ["a", "b", "c"]


def test_only_sites_bring_records() -> None:
    session = Players(*CASES["vanilla"]()).sessions["a"]
    with pytest.raises(PeerError, match="the plan has none there"):
        session.receive(Head("server", "a", JOB), Hello("1", Counts(1), b"", b"", b""))


def test_said_twice_differently() -> None:
    session = Players(*CASES["vanilla"]()).sessions["a"]
    session.receive(Head("b", "a", JOB), hello_of("b"))
    with pytest.raises(PeerError, match="twice, differently"):
        session.receive(Head("b", "a", JOB), Hello("1", Counts(2), b"", b"", b""))


def test_ready_compares_every_hello_and_all_turns() -> None:
    players = joined()
    session = players.sessions["a"]
    assert len({s.agreement for s in players.sessions.values()}) == 1
    others = session.hellos | {"b": Hello("1", Counts(2), b"", b"", b"")}
    assert agreement(others, session.turns) != session.agreement
    changed = (replace(session.turns[0], step=1), *session.turns[1:])
    assert agreement(session.hellos, changed) != session.agreement

    plan, schedule = CASES["vanilla"]()
    late = Players(plan, schedule).sessions["a"]
    for party in ("b", "c", "server"):
        outcome = late.receive(Head(party, "a", JOB), hello_of(party))
    assert outcome == [Derive()]
    assert late.receive(Head("b", "a", JOB), Ready(late.agreement, b"", b"")) is NOT_YET
    late.ready(b"", b"")
    with pytest.raises(PeerError, match="other turns"):
        late.receive(Head("b", "a", JOB), Ready(bytes(32), b"", b""))


def test_a_party_that_gives_up_is_heard_in_every_state() -> None:
    for state, rules in TABLE.items():
        assert Fail in rules, state
    players = joined()
    session = players.sessions["a"]
    session.state = State.RUNNING
    assert session.receive(Head("b", "a", JOB), Fail(Reason.STOPPED)) == []
    assert (session.state, session.failed_by) == (State.FAILED, "b")
    assert session.receive(Head("c", "a", JOB), Bye()) is Notice.ALREADY


def test_giving_up_tells_everybody_once() -> None:
    session = Players(*CASES["vanilla"]()).sessions["a"]
    told = session.fail(Reason.DATA)
    assert {effect.to for effect in told} == {"b", "c", "server"}
    assert session.fail(Reason.FAULT) == []


def test_a_group_key_is_noted_once() -> None:
    players = Players(*CASES["vanilla"]())
    session = players.sessions["a"]
    for party in ("b", "c", "server"):
        session.receive(Head(party, "a", JOB), hello_of(party))
    first = session.receive(Head("b", "a", JOB), GroupKey(b"1"))
    assert [effect.sealed for effect in first] == [b"1"]
    assert session.receive(Head("b", "a", JOB), GroupKey(b"1")) is Notice.ALREADY
    with pytest.raises(PeerError, match="twice"):
        session.receive(Head("b", "a", JOB), GroupKey(b"2"))


def test_chain_is_one_path() -> None:
    assert [str(e) for e in chain("x", "y")] == ["x -> y", "data -> y"]
