"""Session, worker and door together: `receive(link, frame)` -> what to send. No I/O, blind to role.

A party lives on the thread that runs torch. Frames for others never come here: the hub's driver forwards them by
their head.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Protocol

from torch import Tensor

from partway import __version__
from partway.cost import Cost
from partway.egress import Door, associated, finite
from partway.errors import DataError, JobFailed, LinkLost, OtherRecords, PartwayError, PeerError, Refused
from partway.plan.phases import Schedule
from partway.plan.plan import Plan, Sizes, Turn
from partway.privacy.blind_sum import BlindSum, ClearSum
from partway.privacy.seal import Keys, Public, statement
from partway.protocol.messages import Counts, Fail, Head, Hello, Letter, LetterKind, Message, Post, Ready, Reason
from partway.protocol.session import Derive, Do, Effect, Send, Session, State, Unwrap
from partway.protocol.step import NOT_YET
from partway.train.worker import Worker
from partway.wire import tensors as wire_tensors
from partway.wire.frames import Frame

Out = Iterator[tuple[str, list[bytes]]]
"""(link, frames) in the order in which they may leave; no frames after a turn of this party alone, so that a driver may
look around in long work."""


class Identity(Protocol):
    """What a party needs of its certificate."""

    @property
    def name(self) -> str: ...
    @property
    def key_der(self) -> bytes: ...
    def sign(self, data: bytes) -> bytes: ...


class Party:
    """One party of one job.

    Args:
        identity: this party's key.
        schedule: from the sites' sizes to every turn.
        job: digest of the signed job, 32 bytes.
        records: how many this party brings.
        roster: key fingerprint of every party of the job, its own too.
        judge: raises `Refused` if the policy does not allow these turns; it is asked before turn 0.
        signed_by: (key, signature, data) -> whether the key made the signature.
        blind: sums are blind; else they are added in the clear.
        group: the key that this party would hand out to the others that hold columns of the same records; None draws
            one.
    """

    def __init__(
        self,
        identity: Identity,
        plan: Plan,
        schedule: Schedule,
        job: bytes,
        worker: Worker,
        door: Door,
        *,
        records: Mapping[str, int],
        roster: Mapping[str, str],
        judge: Callable[[Sequence[Turn], Sizes], None],
        signed_by: Callable[[bytes, bytes, bytes], bool],
        blind: bool = True,
        group: bytes | None = None,
    ) -> None:
        self.me, self.plan, self.worker, self.door = identity.name, plan, worker, door
        self._hub, self._job, self._identity, self._roster = plan.hub, job, identity, dict(roster)
        self._judge, self._signed_by, self._blind, self._group = judge, signed_by, blind, group
        self._sum: BlindSum | None = None
        self._keyed = [p for p in plan.parties if p != plan.hub or p in plan.holders]
        """Who has keys: all between whom something is sealed."""
        self._keys = Keys(self.me, job) if self.me in self._keyed else None
        public = self._keys.public if self._keys else b""
        signature = identity.sign(statement(job, 0, self.me, public))
        hello = Hello(__version__, Counts(**records), identity.key_der, public, signature)
        self.session = Session(self.me, plan, schedule, job, hello, self._verify)
        self._held: dict[tuple[Head, Message], Frame] = {}
        self._waits = False
        self._alone: set[int] = set()
        """Turns in which this party tells nobody anything and hears nothing."""

    # -- what the driver calls

    def start(self) -> Out:
        """Opens the session."""
        yield from self._run(self.session.open())

    def receive(self, link: str, frame: Frame) -> Out:
        """Takes a frame that came over a link; yields what to send over which.

        Raises `PeerError`, `Refused` or another `PartwayError` when the job has failed, after yielding what the
        others must be told.
        """
        try:
            self._check_link(link, frame.head)
            progress = yield from self._take(frame)
            while progress and self._held:  # what was too early may be due now
                progress = False
                for key, early in list(self._held.items()):
                    del self._held[key]
                    progress = (yield from self._take(early)) or progress
        except PartwayError as error:
            yield from self.give_up(*reason_for(error))
            raise
        if self.session.state is State.FAILED and self.session.failed_by != self.me:
            self.door.close()
            raise given_up(self.session.failed_by, self.session.failure)

    def prepare(self) -> None:
        """To be called before a driver waits: does what can be done before the next frame comes."""
        self.worker.prepare()

    def give_up(self, reason: Reason, peer: str = "") -> Out:
        """Tells every other party that this one gives up: by its own people, or because its driver has lost `peer`."""
        yield from self._run(self.session.fail(reason, peer if peer in self.plan.parties else ""))
        self.door.close()

    @property
    def ended(self) -> bool:
        """Every party has done its part."""
        return self.session.state is State.ENDED

    @property
    def cost(self) -> Cost:
        """What this party has spent so far."""
        return replace(self.worker.cost, bytes_up=self.door.bytes_up)

    # -- frames in

    def _check_link(self, link: str, head: Head) -> None:
        if head.to != self.me:
            raise PeerError(link, f"handed {self.me} a message for {head.to}")
        if self.me == self._hub and head.sender != link:
            raise PeerError(link, f"speaks for {head.sender}")
        if self.me != self._hub and link != self._hub:
            raise PeerError(link, f"is no neighbour of {self.me}")

    def _take(self, frame: Frame) -> Generator[tuple[str, list[bytes]], None, bool]:
        """Gives one frame to the session; the generator's value is whether anything came of it."""
        head, message = frame.head, frame.message
        if isinstance(message, Letter):
            self._check_tensors(frame, message)
        outcome = self.session.receive(head, message, frame.data)
        if outcome is NOT_YET and self._held.setdefault((head, message), frame).data != frame.data:
            raise PeerError(head.sender, f"sent {type(message).__name__} twice, with different content")
        if not isinstance(outcome, list):
            return False
        if isinstance(message, Letter):
            self._count(frame)
            self._begin(self.session.at)
            self.worker.deliver(message.post, self._opened(frame, message))
        yield from self._run(outcome)
        return True

    def _begin(self, turn: int) -> None:
        if turn != self.worker.at:
            self.worker.begin(turn, self.session.turns[turn], self.session.nets[turn])

    def _count(self, frame: Frame) -> None:
        self.worker.cost.bytes_down += len(frame.payload)
        if self._waits:
            self.worker.cost.exchanges += 1
            self._waits = False

    def _check_tensors(self, frame: Frame, letter: Letter) -> None:
        """Name, dtype and shape from the header, before a payload is touched."""
        if letter.turn >= len(self.session.turns):
            return  # the session refuses it
        turn, post = self.session.turns[letter.turn], letter.post
        route = self.session.nets[letter.turn].letters.get(post)
        if route is None:
            return  # and this
        due = self.worker.shapes.of(turn, post, route.sender, route.receiver).wire
        if frame.specs != due:
            raise PeerError(frame.head.sender, f"sent {post} as {_words(frame.specs)}; due is {_words(due)}")

    def _opened(self, frame: Frame, letter: Letter) -> dict[str, Tensor]:
        """A letter's tensors, unsealed and finite."""
        shapes, tensors = self.worker.shapes, frame.tensors()
        head, letter = self._as_sealed(frame.head, letter)
        sender, post = head.sender, letter.post
        if tensors and shapes.reader(post, sender, head.to) == self.me:
            if self._keys is None:
                raise JobFailed(f"{self.me} has no key to open {post}")
            plain = self._keys.open(sender, tensors["sealed"].numpy().tobytes(), associated(head, letter))
            due = shapes.of(self.session.turns[letter.turn], post, sender, head.to).plain
            if len(plain) != wire_tensors.payload_size(due):
                raise PeerError(sender, f"sealed {len(plain)} bytes for {post}; due is {_words(due)}")
            tensors = wire_tensors.unpack(due, plain)
        for name, tensor in tensors.items():
            if not finite(tensor):
                raise PeerError(sender, f"sent {post} with NaN or infinite numbers in {name}")
        return tensors

    def _as_sealed(self, head: Head, letter: Letter) -> tuple[Head, Letter]:
        """Under which head and as which letter a site has sealed this: what a locker hands out was put in before."""
        source, turns = letter.post.source, self.session.turns
        if letter.post.kind is not LetterKind.STATE or self.plan[source.segment].kind != "locker":
            return head, letter
        put = ((n, given) for n in range(letter.turn - 1, -1, -1) for given, to in turns[n].gives if to == source)
        number, given = next(put)
        sealed = Letter(number, Post(LetterKind.STATE, given, source))
        return Head(self.plan.place(given), self.me, head.job, head.epoch), sealed

    # -- effects and frames out

    def _run(self, effects: Sequence[Effect]) -> Out:
        out: dict[str, list[bytes]] = {}
        todo = list(effects)
        while todo:
            effect = todo.pop(0)
            if isinstance(effect, Send):
                link = effect.to if self.me == self._hub else self._hub
                out.setdefault(link, []).append(self._frame(effect))
            elif isinstance(effect, Do):
                if effect.task.kind == "update" and out:  # nobody waits for an update: what is made leaves first
                    yield from out.items()
                    out = {}
                self._begin(effect.turn)
                stop = self.worker.do(effect.task)
                todo += self.session.did(effect.task, stop)
                if effect.turn in self._alone and self.session.at != effect.turn:
                    yield self._hub, []
            elif isinstance(effect, Derive):
                todo += self._derive()
            else:
                todo += self._unwrap(effect)
        if self.session.state in (State.LEAVING, State.ENDED):
            self.door.close()
        yield from out.items()

    def _frame(self, effect: Send) -> bytes:
        head = self.session.head(effect.to)
        if not isinstance(effect.message, Letter):
            return self.door.say(head, effect.message)
        self._waits = True
        return self.door.send(head, effect.message, self.worker.body(effect.message.post))

    # -- keys and signatures

    def _verify(self, sender: str, message: Message) -> None:
        """A HELLO's or READY's signature is its sender's, by the roster of the signed job."""
        if isinstance(message, Hello):
            if hashlib.sha256(message.certificate_key).hexdigest() != self._roster.get(sender):
                raise PeerError(sender, "has another key than the job's roster says: compare fingerprints by telephone")
            said = statement(self._job, 0, sender, message.public)
            if not self._signed_by(message.certificate_key, message.signature, said):
                raise PeerError(sender, "sent a HELLO that its key did not sign")
        elif isinstance(message, Ready):
            key = self.session.hellos[sender].certificate_key
            if not self._signed_by(key, message.signature, self._agreement_of(sender, message.digest)):
                raise PeerError(sender, "sent a READY that its key did not sign")
            if self._sum and sender in self.plan.holders and message.confirmation != self._sum.confirmation(sender):
                raise PeerError(sender, "holds another group key: somebody stands between the sites")

    def _agreement_of(self, name: str, digest: bytes) -> bytes:
        return b"partway/ready/v1\0" + self._job + name.encode() + b"\0" + digest

    def _derive(self) -> list[Effect]:
        """Every HELLO is in: judge all turns, derive the keys."""
        session, keys = self.session, self._keys
        self._judge(session.turns, session.sizes)
        nets = {id(net): net for net in session.nets}  # turns of the same shape share one
        silent = {n for n, net in nets.items() if not any(self.me in route[:2] for route in net.letters.values())}
        self._alone = {turn for turn, net in enumerate(session.nets) if id(net) in silent}
        self.door.agree(self.worker.shapes, session.turns, session.nets, keys.seal if keys else None)
        if keys is None:
            return self._ready()
        hellos = {party: session.hellos[party] for party in self._keyed}
        publics = {party: Public(hello.certificate_key, hello.public) for party, hello in hellos.items()}
        laned = bool(self.plan.sites)
        keys.agree(publics, self.plan.holders, "" if laned else self.plan.holders[0])
        if self.me not in keys.seats:
            return self._ready()
        self._sum = BlindSum(keys)
        self.worker.sums = self._sum if self._blind else ClearSum()
        if keys.seats[0] != self.me:
            return []
        offered = self._sum.offer(None if laned else self._group)
        self._share_order()
        return session.hand_out(offered) + self._ready()

    def _unwrap(self, effect: Unwrap) -> list[Effect]:
        if self._keys is None or self._sum is None or effect.sender != self._keys.seats[0]:
            raise PeerError(effect.sender, "handed out a group key without holding the first seat")
        self._sum.accept(effect.sealed)
        self._share_order()
        return self._ready()

    def _share_order(self) -> None:
        """Who hold columns of the same records take them in one order, from what only they know."""
        if not self.plan.sites and self._sum is not None and self.worker.source is not None:
            self.worker.source.share(self._sum.secret(b"order"))

    def _ready(self) -> list[Effect]:
        digest = self.session.agreement
        confirmation = self._sum.confirmation(self.me) if self._sum else b""
        return self.session.ready(confirmation, self._identity.sign(self._agreement_of(self.me, digest)))


def reason_for(error: PartwayError) -> tuple[Reason, str]:
    """What the other parties are told of an error: an enum, and who is at fault."""
    if isinstance(error, DataError):
        return Reason.DATA, ""
    if isinstance(error, Refused) and error.reasons:
        return Reason[error.reasons[0]], ""
    if isinstance(error, PeerError):
        kinds = {LinkLost: Reason.LOST, OtherRecords: Reason.UNMATCHED}
        return kinds.get(type(error), Reason.PEER), error.peer
    return Reason.FAULT, ""


def given_up(party: str, failure: Fail | None) -> PartwayError:
    """What another party's FAIL means here."""
    reason, blamed = (failure.reason, failure.peer) if failure else (Reason.FAULT, "")
    if reason is Reason.DATA:
        return JobFailed(f"{party} gave up: some site's records do not fit the job; its operator is told in what")
    if reason >= Reason.OPERATOR:
        return Refused(f"{blamed or party} refuses the job: {reason.name}; its own log has the words", [reason.name])
    if reason is Reason.UNMATCHED:
        return JobFailed(f"{party} and {blamed} have other lists of records: match them anew")
    if blamed:
        why = "is gone or silent" if reason is Reason.LOST else "said what it may not"
        return JobFailed(f"{party} gave up because {blamed} {why}; its own log has the words")
    return JobFailed(f"{party} gave up: {reason.name}; its own log has the words")


def _words(specs: Sequence[wire_tensors.Spec]) -> str:
    return ", ".join(f"{s.name} {s.dtype}{list(s.shape)}" for s in specs) or "nothing"
