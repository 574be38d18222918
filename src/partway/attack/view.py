"""What one adversary has: the only thing that an attack is given."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class View:
    """A server that keeps to the protocol, and one site that tells it what it knows.

    Rows of the first two belong together; whose records the last are is what the adversary wants to know.
    """

    known_records: Tensor
    """The telling site's own records, shape (n, features)."""
    known_activations: Tensor
    """What its bottom makes of them, shape (n, width)."""
    seen_activations: Tensor
    """What the server has received from the other sites, shape (m, width)."""
