"""Messages between parties of one process: in order, or delayed, repeated and reordered when a test asks.

>>> wire = Wire()
>>> wire.put("svi", "server", b"one"); wire.put("svi", "server", b"two")
>>> wire.take()
('svi', 'server', b'one')
"""

from __future__ import annotations

import random
from collections import deque


class Wire:
    """All that is on its way.

    Args:
        seed: None delivers in the order of sending; a number draws any order, and a tenth of the messages twice.
    """

    def __init__(self, seed: int | None = None) -> None:
        self._random = None if seed is None else random.Random(seed)
        self._flying: deque[tuple[str, str, bytes]] = deque()

    def put(self, sender: str, receiver: str, message: bytes) -> None:
        """Sends a message."""
        self._flying.append((sender, receiver, message))

    def take(self) -> tuple[str, str, bytes] | None:
        """Delivers one message, as (sender, receiver, message); None if nothing is on its way."""
        if not self._flying:
            return None
        if self._random is None:
            return self._flying.popleft()
        self._flying.rotate(-self._random.randrange(len(self._flying)))
        return self._flying[0] if self._random.random() < 0.1 else self._flying.popleft()
