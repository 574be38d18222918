"""FLOPs, bytes and exchanges of a party: forecast before a run, counted in it, in the same record."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from partway.plan.plan import Turn
from partway.protocol.messages import Post
from partway.protocol.net import Net, Task
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
    """What a party will spend: from the plan, with nothing running. Where training stops early it spends less."""
    cost, waits = Cost(), False
    exchanges: dict[int, tuple[int, bool]] = {}
    for turn, net in turns:
        if me not in net.parts:
            continue
        for task, work in net.tasks.items():
            name = task.what.segment
            if work.at == me and name in shapes.pieces and task.kind in ("forward", "backward"):
                forward = task.kind == "forward"
                flops = shapes.pieces[name].forward if forward else shapes.backward(turn, name)
                cost.flops += flops * shapes.plan.rows(task.what, turn.rows[task.micro_batch])
        for post, route in net.letters.items():
            if me in (route.sender, route.receiver):
                size = shapes.of(turn, post, route.sender, route.receiver).nbytes
                if route.sender == me:
                    cost.bytes_up += size
                else:
                    cost.bytes_down += size
        key = 2 * id(net) + waits  # turns of the same shape share a net
        if key not in exchanges:
            exchanges[key] = _exchanges(net, me, waits)
        more, waits = exchanges[key]
        cost.exchanges += more
    return cost


def _exchanges(net: Net, me: str, waits: bool) -> tuple[int, bool]:
    """How often in a turn this party hears something after it has said something, and whether it has spoken last.

    Args:
        waits: it had spoken last before this turn.
    """
    level: dict[Task, tuple[int, bool]] = {}
    """How many answers a task comes after, and whether it needs one of the last of them."""

    def of(task: Task) -> tuple[int, bool]:
        if task not in level:
            needs = net.tasks[task].needs
            level[task] = max(((heard(n), True) if isinstance(n, Post) else of(n) for n in needs), default=(0, False))
        return level[task]

    def heard(post: Post) -> int:
        return max((1 + of(cause)[0] for cause in net.letters[post].causes), default=0)

    said = {of(t) for t, work in net.tasks.items() if work.at == me and any(p in net.letters for p in work.sends)}
    hears = {heard(post) for post, route in net.letters.items() if route.receiver == me}
    count = 0
    for answers in range(1 + max((n for n, _ in said), default=0) + 1):
        waits = waits or (answers, False) in said
        if answers in hears and waits:
            count, waits = count + 1, False
        waits = waits or (answers, True) in said
    return count, waits
