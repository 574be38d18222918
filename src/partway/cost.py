"""FLOPs, bytes and exchanges of a party: forecast before a run, counted in it, in the same record."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from partway.plan.plan import Turn
from partway.protocol.net import Net
from partway.shapes import Shapes


@dataclass
class Cost:
    """What a party spends. FLOPs: 2 for a multiply-add; bytes: of tensors, up is away from this party."""

    flops: int = 0
    bytes_up: int = 0
    bytes_down: int = 0
    exchanges: int = 0
    """Times that this party sent something and then waited for an answer."""


def forecast(shapes: Shapes, me: str, turns: Iterable[tuple[Turn, Net]]) -> Cost:
    """What a party will spend: from the plan, with nothing running. `exchanges` is only counted, and stays 0."""
    cost = Cost()
    for turn, net in turns:
        for task, work in net.tasks.items():
            piece = shapes.pieces.get(task.what.segment)
            if work.at == me and piece is not None and task.kind in ("forward", "backward"):
                records = shapes.plan.rows(task.what, turn.rows[task.micro_batch])
                cost.flops += records * (piece.forward if task.kind == "forward" else piece.backward)
        for post, route in net.letters.items():
            if me in (route.sender, route.receiver):
                size = shapes.of(turn, post, route.sender, route.receiver).nbytes
                if route.sender == me:
                    cost.bytes_up += size
                else:
                    cost.bytes_down += size
    return cost
