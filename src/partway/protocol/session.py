"""Join, agree, walk the turns, leave: one transition table for every role. Pure: no clock, no disk, no socket.

A session is told what came in and what the worker has done, and answers with effects: what to send and what to do
next. "Not yet" and "already" are values, not errors. It never learns which role it plays.

Resuming has its place here: `Head.epoch` is part of every letter's name, turns are numbers, and a HELLO of a newer
epoch would send any state back to `joining`. It is not built yet.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from enum import Enum
from itertools import accumulate
from typing import NamedTuple, cast

import msgspec

from partway.errors import JobFailed, PeerError
from partway.plan.phases import Schedule
from partway.plan.plan import Plan, Sizes, Turn
from partway.protocol.messages import Bye, Counts, Fail, GroupKey, Head, Hello, Letter, Message, Ready, Reason
from partway.protocol.net import Net, Task, compile
from partway.protocol.step import ALREADY, NOT_YET, Notice, Step, route


class Send(NamedTuple):
    """Say this to that party; with a letter go its tensors."""

    to: str
    message: Message


class Do(NamedTuple):
    """The worker can do this task now."""

    turn: int
    task: Task


class Derive(NamedTuple):
    """Every HELLO is in: judge the turns, derive the keys, then call `ready` or `hand_out`."""


class Unwrap(NamedTuple):
    """The group's key came, sealed: take it, then call `ready`."""

    sender: str
    sealed: bytes


Effect = Send | Do | Derive | Unwrap
Outcome = list[Effect] | Notice


class State(Enum):
    JOINING = "joining"
    AGREEING = "agreeing"
    RUNNING = "running"
    LEAVING = "leaving"
    ENDED = "ended"
    FAILED = "failed"


J, A, R, L, E, F = State
TABLE: dict[State, dict[type[Message], str | Notice]] = {
    J: {Hello: "hello", GroupKey: NOT_YET, Ready: NOT_YET, Fail: "fail"},
    A: {Hello: "again", GroupKey: "key", Ready: "ready", Letter: "letter", Bye: NOT_YET, Fail: "fail"},
    R: {Hello: "again", GroupKey: "again", Ready: "again", Letter: "letter", Bye: "bye", Fail: "fail"},
    L: {Hello: "again", GroupKey: "again", Ready: "again", Letter: "letter", Bye: "bye", Fail: "fail"},
    E: {Hello: "again", GroupKey: "again", Ready: "again", Letter: "letter", Bye: "again", Fail: ALREADY},
    F: dict.fromkeys((Hello, GroupKey, Ready, Letter, Bye, Fail), ALREADY),
}
"""What a state does with each message: the handler's name, or a notice. A message not named is refused."""


class Session:
    """One party's walk through a job.

    Args:
        me: this party's name in the plan.
        job: digest of the signed job.
        schedule: from the sites' sizes to every turn.
        hello: what this party says first.
        verify: raises `PeerError` if a HELLO's or READY's signature is not its sender's.
    """

    def __init__(
        self, me: str, plan: Plan, schedule: Schedule, job: bytes, hello: Hello, verify: Callable[[str, Message], None]
    ) -> None:
        self.me, self.plan, self.job, self.epoch = me, plan, job, 0
        self.state, self.at = State.JOINING, -1
        self.step: Step | None = None
        self.turns: tuple[Turn, ...] = ()
        self.nets: tuple[Net, ...] = ()
        """Of each turn; turns of the same shape share one."""
        self.peers = [p for p in plan.parties if p != me]
        self.failure: Fail | None = None
        self.failed_by = ""
        self._goes_on_from = 0
        """After a judge's stop: no turn before this one is run."""
        self._steps: tuple[int, ...] = (0,)
        """Before each turn, and at the end: how many turns have trained."""
        self._schedule, self._verify = schedule, verify
        self._notes: dict[type[Message], dict[str, Message]] = {Hello: {me: hello}, GroupKey: {}, Ready: {}, Bye: {}}

    # -- events

    def open(self) -> list[Effect]:
        """Says HELLO to every other party."""
        return self._to_all(self._notes[Hello][self.me])

    def head(self, to: str) -> Head:
        return Head(self.me, to, self.job, self.epoch)

    def receive(self, head: Head, message: Message, content: object = None) -> Outcome:
        """Takes a message. One that may not be said raises `PeerError` and changes nothing."""
        if head.sender not in self.peers or head.to != self.me:
            raise PeerError(head.sender, f"sent a message to {head.to}, and has no such part in this job")
        if head.job != self.job or head.epoch != self.epoch:
            raise PeerError(head.sender, "is at another job")
        rule = TABLE[self.state].get(type(message))
        if rule is None:
            raise PeerError(head.sender, f"sent {type(message).__name__} while {self.me} is {self.state.value}")
        if isinstance(rule, Notice):
            return rule
        handler: Callable[[str, Message, object], Outcome] = getattr(self, f"_on_{rule}")
        return handler(head.sender, message, content)

    def hand_out(self, sealed: dict[str, bytes]) -> list[Effect]:
        """This party holds the first seat: the group's key goes to every other site."""
        return [Send(to, GroupKey(key)) for to, key in sealed.items()]

    def ready(self, confirmation: bytes, signature: bytes) -> list[Effect]:
        """The turns are judged and the keys derived."""
        mine = self._notes[Ready][self.me] = Ready(self.agreement, confirmation, signature)
        return self._to_all(mine) + self._all_ready()

    def did(self, task: Task, stop: bool = False) -> list[Effect]:
        """The worker has done a task of the current turn; `stop`: a judge has said so, here or in a letter."""
        step, turn = self._step(), self.at
        letters: list[Effect] = [Send(step.net.letters[post].receiver, Letter(turn, post)) for post in step.did(task)]
        judge = self.turns[turn].judge
        if stop and judge is not None:
            self._goes_on_from = judge.to
        return letters + (self._next(max(turn + 1, self._goes_on_from)) if step.finished else self._due())

    def fail(self, reason: Reason, peer: str = "") -> list[Effect]:
        """This party gives up; every other is told why, as an enum."""
        if self.state in (State.ENDED, State.FAILED):
            return []
        self.state, self.failure, self.failed_by = State.FAILED, Fail(reason, peer), self.me
        return self._to_all(self.failure)

    # -- questions

    @property
    def agreement(self) -> bytes:
        """The digest of every HELLO and all turns; the same at every party, or nobody runs."""
        return self._agreement

    @property
    def hellos(self) -> dict[str, Hello]:
        return cast("dict[str, Hello]", self._notes[Hello])

    @property
    def sizes(self) -> Sizes:
        """How many records each party that holds some brings, once every HELLO is in."""
        return {party: msgspec.structs.asdict(self.hellos[party].records) for party in self.plan.holders}

    @property
    def steps(self) -> tuple[int, int]:
        """For people: how many training turns lie behind, and how many there are."""
        return self._steps[max(self.at, 0)], self._steps[-1]

    def left(self, peer: str) -> bool:
        """This peer has done all its part: it may be gone without a loss."""
        return peer in self._notes[Bye]

    def waits_for(self) -> list[str]:
        """For people and deadlines: whose messages are missing."""
        if self.state in (State.JOINING, State.AGREEING):
            said = self._notes[Hello if self.state is State.JOINING else Ready]
            return sorted(set(self.peers) - set(said))
        if self.step is None:
            return sorted(set(self.peers) - set(self._notes[Bye])) if self.state is State.LEAVING else []
        return sorted({self.step.net.letters[post].sender for post in self.step.waits_for()})

    # -- the handlers that the table names

    def _on_hello(self, sender: str, message: Message, _: object) -> Outcome:
        hello = cast(Hello, message)
        mine = self.hellos[self.me].version
        if hello.version != mine:
            raise PeerError(sender, f"runs Partway {hello.version}, {self.me} runs {mine}: install the same version")
        if sender not in self.plan.holders and hello.records != Counts():
            raise PeerError(sender, "says that it brings records, and the plan has none there")
        if self._note(sender, message) or len(self._notes[Hello]) <= len(self.peers):
            return []
        self.state = State.AGREEING
        self.turns = self._schedule(self.sizes)
        self.nets = tuple(compile(self.plan, turn) for turn in self.turns)
        self._steps = tuple(accumulate((bool(turn.train) for turn in self.turns), initial=0))
        self._agreement = agreement(self.hellos, self.turns)
        return [Derive()]

    def _on_key(self, sender: str, message: Message, _: object) -> Outcome:
        if self._note(sender, message):
            return ALREADY
        return [Unwrap(sender, cast(GroupKey, message).sealed)]

    def _on_ready(self, sender: str, message: Message, _: object) -> Outcome:
        if self.me not in self._notes[Ready]:
            return NOT_YET
        if cast(Ready, message).digest != self.agreement:
            raise PeerError(sender, "would run other turns, or has heard other HELLOs")
        if self._note(sender, message):
            return ALREADY
        return self._all_ready()

    def _on_again(self, sender: str, message: Message, _: object) -> Outcome:
        if sender not in self._notes[type(message)]:
            raise PeerError(sender, f"sent {type(message).__name__}, which is not its to send")
        self._note(sender, message)
        return ALREADY

    def _on_bye(self, sender: str, message: Message, _: object) -> Outcome:
        if self._owes(sender):
            return NOT_YET
        if not self._note(sender, message) and self._all_left():
            self.state = State.ENDED
        return []

    def _on_fail(self, sender: str, message: Message, _: object) -> Outcome:
        self.state, self.failure, self.failed_by = State.FAILED, cast(Fail, message), sender
        return []

    def _on_letter(self, sender: str, message: Message, content: object) -> Outcome:
        letter = cast(Letter, message)
        if letter.turn >= len(self.turns):
            raise PeerError(sender, f"sent a letter of turn {letter.turn}; there are {len(self.turns)}")
        post = letter.post
        found = route(self.nets[letter.turn], self.me, sender, post)
        if letter.turn < self.at or self.state is State.ENDED:
            return ALREADY
        if letter.turn > self.at:
            if self.step and not self.step.net.owed.get((sender, self.me), frozenset()) <= self.step.done:
                raise PeerError(sender, f"sent {post} of turn {letter.turn}, ahead of what {self.me} has answered")
            if found.causes:
                raise PeerError(sender, f"sent {post}, which cannot exist before {self.me} has done its part")
            if letter.turn not in self._next_turns_of(sender):
                raise PeerError(sender, f"sent {post} of turn {letter.turn}, ahead of what {self.me} has answered")
            return NOT_YET
        if self._step().receive(sender, post, content) == ALREADY:
            return ALREADY
        return self._due()

    # -- parts

    def _to_all(self, message: Message) -> list[Effect]:
        return [Send(p, message) for p in self.peers]

    def _note(self, sender: str, message: Message) -> bool:
        """Keeps what a party said once; True if it had said the same before."""
        said = self._notes[type(message)]
        if sender in said:
            if said[sender] != message:
                raise PeerError(sender, f"said {type(message).__name__} twice, differently")
            return True
        self._verify(sender, message)
        said[sender] = message
        return False

    def _all_ready(self) -> list[Effect]:
        if len(self._notes[Ready]) <= len(self.peers) or self.state is not State.AGREEING:
            return []
        self.state = State.RUNNING
        return self._next(0)

    def _step(self) -> Step:
        if self.step is None:
            raise JobFailed(f"{self.me} is {self.state.value} and has no turn")
        return self.step

    def _due(self) -> list[Effect]:
        return [Do(self.at, task) for task in self._step().due()]

    def _next(self, turn: int) -> list[Effect]:
        """Goes on to the first turn, from this one on, in which this party has a part."""
        for number in range(turn, len(self.turns)):
            step = Step(self.me, self.nets[number])
            if not step.finished:
                self.at, self.step = number, step
                return self._due()
        self.at, self.step, self.state = len(self.turns), None, State.LEAVING
        bye = self._notes[Bye][self.me] = Bye()
        if self._all_left():
            self.state = State.ENDED
        return self._to_all(bye)

    def _all_left(self) -> bool:
        return len(self._notes[Bye]) > len(self.peers)

    def _speaks(self, sender: str, turn: int) -> bool:
        """Whether in a turn this sender has something to say to me."""
        return any(r.sender == sender and r.receiver == self.me for r in self.nets[turn].letters.values())

    def _next_from(self, sender: str, turn: int) -> int | None:
        """The next turn in which this sender has something to say to me."""
        return next((later for later in range(turn, len(self.turns)) if self._speaks(sender, later)), None)

    def _next_turns_of(self, sender: str) -> set[int]:
        """In which turns this sender may speak to me next, for all I know: it may have heard a judge's stop first."""
        found, starts = set[int](), [self.at + 1]
        if self.at >= 0 and (judge := self.turns[self.at].judge):
            starts.append(judge.to)
        while starts:
            for later in range(starts.pop(), len(self.turns)):
                if self._speaks(sender, later):
                    found.add(later)
                    break
                if (judge := self.turns[later].judge) and judge.to not in starts:
                    starts.append(judge.to)
        return found

    def _owes(self, sender: str) -> bool:
        """A letter of this sender is still to come."""
        if self.step and any(
            r.sender == sender and r.receiver == self.me and post not in self.step.heard
            for post, r in self.step.net.letters.items()
        ):
            return True
        return self._next_from(sender, self.at + 1) is not None


def agreement(hellos: dict[str, Hello], turns: Iterable[Turn]) -> bytes:
    """SHA-256 over every HELLO, by name, and every turn, as MessagePack with sorted keys."""
    encoder = msgspec.msgpack.Encoder(order="sorted")
    digest = hashlib.sha256(b"partway/agreement/v1\0")
    for name in sorted(hellos):
        digest.update(encoder.encode((name, hellos[name])))
    for turn in turns:
        digest.update(encoder.encode(turn))
    return digest.digest()
