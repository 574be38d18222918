"""Which epoch's weights are kept: one rule, for every method alike, on the validation records.

>>> from partway.train.metrics import Scores
>>> rule = Best(patience=2)
>>> [rule.look(Scores(30, a, a, a, 2)).name for a in (0.5, 0.7, 0.6, 0.65)]
['KEEP', 'KEEP', 'GO_ON', 'STOP']
"""

from __future__ import annotations

import math
from enum import IntFlag

from partway.train.scoring import AnyScores, value


class Verdict(IntFlag):
    """What a look at the validation records says."""

    GO_ON = 0
    KEEP = 1
    """The best so far."""
    STOP = 2


class Best:
    """Keeps the best so far, the earlier of two that are equal.

    Args:
        patience: looks in a row without a better one after which it says stop; 0 never does.
    """

    def __init__(self, patience: int = 0) -> None:
        self._patience, self._best, self._worse = patience, -math.inf, 0

    def look(self, scores: AnyScores) -> Verdict:
        if (now := value(scores)) > self._best:
            self._best, self._worse = now, 0
            return Verdict.KEEP
        self._worse += 1
        return Verdict.STOP if self._worse == self._patience else Verdict.GO_ON
