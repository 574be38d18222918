"""The one door out, for every party: policy, defence, compression, encoding, ledger, in that order.

Nothing reaches a transport that did not pass a `Door`. There is no defence and no compression yet; they have their
place between the check against what was agreed and the encoding.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import msgspec
import torch
from torch import Tensor

from partway.errors import JobFailed
from partway.ledger import Count, Edge, Ledger
from partway.plan.plan import Turn
from partway.policy import releases
from partway.protocol.messages import Fail, Head, Letter, Message, Post
from partway.protocol.net import Net
from partway.shapes import Shapes
from partway.wire import frames
from partway.wire import tensors as wire_tensors

Tap = Callable[[Head, Letter, Mapping[str, Tensor]], None]
"""Sees every plaintext before it is sealed, and who can read it: for previews, and for the tests of what leaves."""
Seal = Callable[[str, bytes, bytes], bytes]
"""(peer, plain, associated data) -> sealed."""


class Door:
    """One party's way out, in one job.

    Args:
        tap: sees every plaintext that leaves.
        on_release: called once, before the first activations leave that are to be kept.
    """

    def __init__(
        self, me: str, ledger: Ledger, tap: Tap | None = None, on_release: Callable[[], None] | None = None
    ) -> None:
        self.me, self.ledger, self._tap, self._on_release = me, ledger, tap, on_release
        self.bytes_up = 0
        self._shapes: Shapes | None = None
        self._seal: Seal | None = None
        self._turns: Sequence[Turn] = ()
        self._nets: Sequence[Net] = ()
        self._releasing: set[int] = set()
        """The turns in which activations leave that are to be kept."""
        self._until = -1
        """The last turn of the range that the ledger has open."""

    def agree(self, shapes: Shapes, turns: Sequence[Turn], nets: Sequence[Net], seal: Seal | None) -> None:
        """The policy has said yes to exactly these turns: nothing else will leave."""
        self._shapes, self._turns, self._nets, self._seal = shapes, turns, nets, seal
        self._releasing = {number for number, turn in enumerate(turns) if releases(shapes.plan, turn)}

    def say(self, head: Head, message: Message) -> bytes:
        """A control message's frame: enums, integers and digests, no tensors."""
        try:
            self.ledger.line("message", what=type(message).__name__, to=head.to)
        except JobFailed:
            if not isinstance(message, Fail):  # that, an enum, the others must hear, or they wait for ever
                raise
        return frames.encode(head, message)

    def send(self, head: Head, letter: Letter, tensors: Mapping[str, Tensor]) -> bytes:
        """A letter's frame. Raises `JobFailed` if it is not what was agreed; then nothing leaves."""
        if self._shapes is None:
            raise JobFailed(f"{self.me}: nothing was agreed, so nothing leaves")
        turn, post = self._turns[letter.turn], letter.post
        if letter.turn > self._until:
            self._open(letter.turn)
        reader = self._shapes.reader(post, self.me, head.to)
        sealed = msgspec.structs.replace(head, to=reader or head.to)
        if self._tap is not None:
            self._tap(sealed, letter, tensors)
        due = self._shapes.of(turn, post, self.me, head.to)
        if tuple(wire_tensors.spec_of(name, t) for name, t in tensors.items()) != due.plain:
            raise JobFailed(f"{self.me}: {post} is not what the plan says, so it does not leave")
        for name, tensor in tensors.items():
            if not finite(tensor):
                raise JobFailed(f"{self.me}: {post} holds NaN or infinite numbers in {name}; lower the learning rate")
        if due.plain and reader:
            tensors = {"sealed": self._sealed(sealed, letter, tensors)}
        frame = frames.encode(head, letter, tensors)
        if letter.turn in self._releasing and self._on_release is not None:
            self._on_release()
            self._on_release = None
        if due.nbytes:
            self.ledger.left(edge(post, head.to), due.nbytes, frame)
            self.bytes_up += due.nbytes
        return frame

    def account(self) -> bytes:
        """Closes the ledger's range, and returns the head of its chain, 32 bytes."""
        self.close()
        return self.ledger.head

    def close(self) -> None:
        """Nothing more leaves in the open range."""
        self.ledger.close()
        self._until = -1

    def _sealed(self, head: Head, letter: Letter, tensors: Mapping[str, Tensor]) -> Tensor:
        if self._seal is None:
            raise JobFailed(f"{self.me} has no key to seal a letter for {head.to}")
        _, pieces = wire_tensors.pack(tensors)
        sealed = self._seal(head.to, b"".join(pieces), associated(head, letter))
        return torch.frombuffer(bytearray(sealed), dtype=torch.uint8)

    def _open(self, first: int) -> None:
        """A new range: the turns of one epoch, or those after an account of it was given."""
        assert self._shapes is not None
        last, turns = first, self._turns
        while last + 1 < len(turns) and turns[last + 1].epoch == turns[first].epoch:
            if self.me in turns[last + 1].account:
                break
            last += 1
        most: dict[Edge, Count] = {}
        for number in range(first, last + 1):
            for post, route in self._nets[number].letters.items():
                if route.sender == self.me:
                    size = self._shapes.of(turns[number], post, self.me, route.receiver).nbytes
                    if size:
                        most.setdefault(edge(post, route.receiver), Count()).add(1, size)
        self.ledger.open((first, last), most)
        self._until = last


def edge(post: Post, to: str) -> Edge:
    """How the ledger names what crosses.

    >>> from partway.plan.plan import Copy
    >>> from partway.protocol.messages import LetterKind
    >>> edge(Post(LetterKind.ACTIVATIONS, Copy("bottom", "svi"), Copy("trunk")), "server")
    ('ACTIVATIONS bottom -> trunk', 'server')
    """
    return f"{post.kind.name} {post.source.segment} -> {post.target.segment}", to


def associated(head: Head, letter: Letter) -> bytes:
    """What a sealed letter is bound to: job, epoch, turn, sender, receiver and the copies' names."""
    return frames.encode(head, letter)


def finite(tensor: Tensor) -> bool:
    """Whether every number is finite; integers are."""
    # One sum is cheaper than a mask; a sum of finite numbers may overflow, so it only clears, never accuses.
    return not tensor.dtype.is_floating_point or math.isfinite(tensor.sum()) or bool(tensor.isfinite().all())
