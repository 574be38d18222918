"""`relay` whose server keeps each hand-over until the next site's turn: sealed, for one site, out of one turn."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec
import pytest
from torch import Tensor

from federations import job_of, small
from partway.errors import PeerError, Refused
from partway.plan.plan import Copy
from partway.protocol.messages import LetterKind
from partway.simulation import Federation, permissive

TERMS = {"relay": {"turn_batches": 2, "hand_over": "kept"}, "optimizer": {"name": "adam", "lr": 0.01}}
LOCKER = "bottom_locker"


def relay(**more: Any) -> Federation:
    return small(job_of(schedule="relay", epochs=2, batch=6, **TERMS), **more)


def kept_by_server(whole: Federation, change: Callable[[Copy, Tensor], Tensor]) -> None:
    """Runs it with a server that hands out something else than it was given."""
    worker = whole.parties["server"].party.worker
    give = worker._give

    def otherwise(copy: Copy, takes: Any) -> None:
        give(copy, takes)
        if copy.segment == LOCKER:
            worker._made[LetterKind.STATE, copy] = {
                "sealed": change(copy, worker._made[LetterKind.STATE, copy]["sealed"])
            }

    worker._give = otherwise
    whole.run()


def test_the_server_hands_out_what_it_was_given() -> None:
    seen: list[Copy] = []
    kept_by_server(relay(), lambda copy, sealed: (seen.append(copy), sealed)[1])
    assert {copy.lane for copy in seen} == {*"abcde"}


def test_what_the_server_has_altered_does_not_open() -> None:
    def flipped(_: Copy, sealed: Tensor) -> Tensor:
        sealed[100] ^= 1
        return sealed

    with pytest.raises(PeerError, match="does not open"):
        kept_by_server(relay(), flipped)


def test_what_the_server_hands_out_a_second_time_does_not_open() -> None:
    """A seal is bound to the turn in which it was put there: an older hand-over from the same site is none."""
    first: dict[Copy, Tensor] = {}
    with pytest.raises(PeerError, match="does not open"):
        kept_by_server(relay(), lambda copy, sealed: first.setdefault(copy, sealed))


def test_what_is_for_another_site_does_not_open() -> None:
    last: list[Tensor] = []

    def mixed(_: Copy, sealed: Tensor) -> Tensor:
        last.append(sealed)
        return last[-2] if len(last) > 1 else sealed

    with pytest.raises(PeerError, match="does not open"):
        kept_by_server(relay(), mixed)


def test_a_policy_judges_it_as_a_hand_over_to_the_next_site() -> None:
    """And not as something that the server would hold."""
    terms = {"bottom_to_everyone": False}
    allowed = msgspec.structs.replace(permissive("partway.model.zoo:mlp"), **terms)
    relay(policies=dict.fromkeys("abcde", allowed)).run()
    strict = msgspec.structs.replace(allowed, least_records_in_hand_over=5)
    with pytest.raises(Refused, match=r"c would hand \w weights that only 1 of its records stand behind"):
        relay(policies={"b": strict}).run()
