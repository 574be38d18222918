"""The loss scale of float16, as torch.amp.GradScaler keeps it, from one bit a step that every party hears.

Gradients that float16 would round to zero are made larger by a factor on the loss, and smaller again before they are
used (Micikevicius et al. 2018, section 3.2). A power of two, so that both are exact.

>>> scale = LossScale()
>>> scale.hear(finite=False)
>>> scale.value
32768.0
"""

from __future__ import annotations

INITIAL, GROWTH, BACKOFF, INTERVAL = 65536.0, 2.0, 0.5, 2000
"""The defaults of torch.amp.GradScaler."""


class LossScale:
    """Of one optimiser."""

    def __init__(self) -> None:
        self.value = INITIAL
        self._good = 0
        """Steps in a row that were not skipped, since the last change."""

    def hear(self, finite: bool) -> None:
        """After each step: whether all gradients were finite; if not, the step is skipped."""
        self._good = self._good + 1 if finite else 0
        if not finite:
            self.value *= BACKOFF
        elif self._good == INTERVAL:
            self.value, self._good = self.value * GROWTH, 0
