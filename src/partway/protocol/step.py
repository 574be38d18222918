"""One party's part of a net: what happened -> what to do next."""

from __future__ import annotations

from enum import Enum

from partway.errors import PeerError
from partway.protocol.messages import Post
from partway.protocol.net import Net, Part, Route, Task


class Notice(Enum):
    """What is neither taken nor refused. Values, not errors."""

    NOT_YET = "not yet"
    """It may be taken later: hold it."""
    ALREADY = "already"
    """It was taken before, or nobody needs it any more."""


NOT_YET, ALREADY = Notice


def route(net: Net, me: str, sender: str, post: Post) -> Route:
    """The letter's place in the net; raises `PeerError` if the net has no such letter from this sender to me."""
    found = net.letters.get(post)
    if found is None or found.receiver != me:
        raise PeerError(sender, f"sent {post}, which nothing in this turn of the plan brings to {me}")
    if found.sender != sender:
        raise PeerError(sender, f"sent {post}, which is {found.sender}'s to send")
    return found


class Step:
    """Ticks off what each of this party's tasks needs."""

    def __init__(self, me: str, net: Net) -> None:
        self.me, self.net = me, net
        self.heard: dict[Post, object] = {}
        self.done: set[Task] = set()
        missing, self._feeds = net.parts.get(me, Part({}, {}))
        self._missing = dict(missing)
        self._due = [task for task, count in missing.items() if not count]

    @property
    def finished(self) -> bool:
        """All of this party's tasks are done."""
        return len(self.done) == len(self._missing)

    def due(self) -> list[Task]:
        """The tasks that can be done now and were not told before."""
        due, self._due = self._due, []
        return due

    def waits_for(self) -> list[Post]:
        """The letters that are still to come."""
        return [need for need in self._feeds if isinstance(need, Post) and need not in self.heard]

    def did(self, task: Task) -> list[Post]:
        """The worker has done a task; returns the letters that it made."""
        self.done.add(task)
        self._met(task)
        return self.net.tasks[task].sends

    def receive(self, sender: str, post: Post, content: object) -> Notice | None:
        """Takes a letter once; `content` tells two letters of one name apart; it is compared only then.

        Returns `ALREADY` for the same letter again. Raises `PeerError` for a letter that cannot exist, or that came
        before with other content.
        """
        found = route(self.net, self.me, sender, post)
        if post in self.heard:
            if self.heard[post] != content:
                raise PeerError(sender, f"sent {post} twice, with different content")
            return ALREADY
        if not found.causes <= self.done:
            raise PeerError(sender, f"sent {post}, which cannot exist before {self.me} has done its part")
        self.heard[post] = content
        self._met(post)
        return None

    def _met(self, need: Task | Post) -> None:
        for task in self._feeds.get(need, ()):
            self._missing[task] -= 1
            if not self._missing[task]:
                self._due.append(task)
