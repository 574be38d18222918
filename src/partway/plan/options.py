"""Options of training, written into the turns of any schedule: rates, clipping, micro-batches, loss scaling."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

from partway.plan.batches import Batch, micro_batches
from partway.plan.phases import Schedule
from partway.plan.plan import Plan, Sizes, Turn
from partway.plan.rate import Rate, factor


@dataclass(frozen=True, kw_only=True)
class Options:
    """What a job says of every step, whatever its schedule."""

    rate: Rate = field(default_factory=Rate)
    """Of the job's `main` optimiser, over all its steps; local epochs keep theirs."""
    clip: float = 0.0
    """Greatest norm of a step's gradient; 0 for no limit."""
    micro_batch: int = 0
    """The most records of a micro-batch; 0 for no limit."""
    scaled: bool = False
    """The loss is scaled, and a step whose gradient is not finite is skipped."""


def with_options(plan: Plan, schedule: Schedule, options: Options) -> Schedule:
    """The same schedule; its turns that train have the options. None is added or left out."""

    def turns(sizes: Sizes) -> tuple[Turn, ...]:
        return tuple(_with(plan, schedule(sizes), options))

    return turns


def _with(plan: Plan, turns: Sequence[Turn], options: Options) -> Iterator[Turn]:
    main = [turn.step for turn in turns if turn.train and turn.optimizer == "main"]
    first, steps = min(main, default=0), 1 + max(main, default=0) - min(main, default=0)
    clip = options.clip or (float("inf") if options.scaled else 0.0)
    for turn in turns:
        if not turn.train:
            yield turn
            continue
        rate = factor(options.rate, turn.step - first, steps) if turn.optimizer == "main" else 1.0
        turn = replace(turn, rate=rate, clip=clip, scaled=options.scaled)
        yield _cut(plan, turn, options.micro_batch) if options.micro_batch else turn


def _cut(plan: Plan, turn: Turn, most: int) -> Turn:
    """The same turn in micro-batches; where no segment joins the sites' rows, each site's are cut by themselves."""
    apart = all(plan[name].laned for name in plan.order(turn.flow) or ())
    batches = [Batch(dict(r), dict(o)) for r, o in zip(turn.rows, turn.offsets, strict=True)]
    cut = [small for batch in batches for small in micro_batches(batch, most, apart)]
    return replace(turn, rows=tuple(b.rows for b in cut), offsets=tuple(b.offsets for b in cut))
