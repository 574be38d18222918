"""What schedules are made of: the phases of a run, and the flows that stand around training."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from partway.errors import DataError
from partway.plan.batches import Batch, equal_parts, local_batches, union_batches
from partway.plan.plan import ONE, Copy, Edge, Judge, Part, Plan, Segment, Sizes, Sum, Turn

Schedule = Callable[[Sizes], tuple[Turn, ...]]


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What a schedule must know of a job."""

    seed: int = 0
    epochs: int = 1
    batch: int = 256
    """Records in a union batch, over all sites."""
    standardise: bool = False
    """Two blind sums come first, from which every site standardises its numeric columns."""
    class_weights: bool = False
    """Records of each class are counted over all sites before the first step."""
    validate_every: int = 0
    """Epochs between two evaluations on the validation records; 0 for none."""
    keep_best: bool = False
    """After the last evaluation on the validation records, the weights of the best one are taken again."""
    test: bool = False
    """Evaluate on the test records at the end."""
    site_scores: bool = False
    """Each site's own scores on its test records go to the server."""
    bottom_to_everyone: bool = False
    trunk_to_everyone: bool = False
    rounds: int = 3
    """Of `half_trained`: how often local training is averaged."""
    local_epochs: int = 10
    """Of `half_trained`: in each round."""
    local_batch: int = 64
    """Of `half_trained`: records of one site in a step."""
    bottoms: Literal["averaged", "largest", "concatenated"] = "averaged"
    """Of `half_trained`: what the sites' bottoms become."""
    shared_epochs: int = 3
    """Of `private`: epochs of `synchronous` that come first."""
    average_every: int = 0
    """Of `averaged`: steps between two averages; 0 for one at the end of each epoch."""
    turn_batches: int = 0
    """Of `relay`: batches in a site's turn; 0 for an epoch over its records."""
    relay_order: Literal["descending", "random"] = "descending"
    """Of `relay`: by training records, or drawn anew each epoch."""
    relay_kept: bool = False
    """Of `relay`: the hub keeps a hand-over, sealed, until the next site's turn."""
    gate: bool = False
    """Of `private`: each site keeps its own only where its validation records gain by it."""
    synchronous_epochs: int = 0
    """Of `half_trained`: epochs of `synchronous` that follow."""


LOCAL_HEAD = "local_head"
"""With it a site trains its bottom by itself; no part of the network that comes out."""
SHELF = "shelf"
"""Where the server keeps what is released."""
HELD = "held"
"""The server's count over released validation records."""
AT_ONCE = 4096
"""Records in one letter, of a release or of a check."""


def here(name: str) -> str:
    """The name of a server's segment while it visits the sites."""
    return f"{name}_here"


def there(name: str) -> str:
    """The name of a site's segment as the server keeps it at the end."""
    return f"{name}_there"


def of(name: str, site: str) -> str:
    """The name of a segment that is one site's, and has a copy at every site."""
    return f"{name}:{site}"


def original(name: str) -> str:
    """The segment of which this one is a visiting or kept copy; any other is its own.

    >>> original("trunk_here"), original("bottom")
    ('trunk', 'bottom')
    """
    return name.partition(":")[0].removesuffix("_here").removesuffix("_there")


def at_sites(plan: Plan) -> tuple[str, ...]:
    """The pieces of the network of which every site has a copy."""
    return tuple(n for n in plan.nets if plan[n].laned)


def central(plan: Plan) -> tuple[str, ...]:
    """The pieces of the network of which there is one copy."""
    return tuple(n for n in plan.nets if not plan[n].laned)


# -- the phases; each gets what was done before it, and goes on counting steps and epochs from there


Turns = tuple[Turn, ...]


def step_and_epoch(done: Sequence[Turn]) -> tuple[int, int]:
    """The step and the epoch that come after some turns."""
    steps = sum(bool(t.train) for t in done)
    return steps, 1 + max((t.epoch for t in done if t.train), default=-1)


def begin(plan: Plan, settings: Settings, sizes: Sizes, shared: Sequence[str]) -> Turns:
    """Statistics of all sites' records, and first weights of what the sites share, from one of them."""
    turns: list[Turn] = []
    if settings.standardise:
        turns += whole(records_of(plan, sizes, "train"), "train", ("sums", "squares"))
    if settings.class_weights:
        turns += whole(records_of(plan, sizes, "train"), "train", ("classes",))
        if not plan[plan.losses[0]].laned:  # the loss is the server's
            turns += whole({plan.sites[0]: 1}, "train", ("report_classes",))
    first, *others = plan.sites
    if others and shared:
        turns.append(Turn(gives=tuple((Copy(n, first), Copy(n, lane)) for n in shared for lane in others)))
    return tuple(turns)


def together(plan: Plan, settings: Settings, sizes: Sizes, epochs: int, done: Turns) -> Turns:
    """Epochs of union batches, gradients of the sites' segments summed before each update."""
    shared = at_sites(plan) if len(plan.sites) > 1 else ()
    training, (first, _) = records_of(plan, sizes, "train"), step_and_epoch(done)
    sums: tuple[Sum, ...] = tuple(("gradient", n) for n in shared)

    def steps(epoch: int) -> Iterator[Turn]:
        for batch in union_batches(training, settings.batch, settings.seed, epoch):
            yield step_of(plan, batch, divisor=float(sum(batch.rows.values())), sums=sums)

    turns = epochs_of(plan, settings, sizes, epochs, done, steps, shared)
    return tuple(replace(turn, fresh=turn.step == first) if turn.train else turn for turn in turns)


def step_of(plan: Plan, batch: Batch, divisor: float | None = None, sums: tuple[Sum, ...] = ()) -> Turn:
    """One step of everything."""
    rows, offsets = (batch.rows,), (batch.offsets,)
    return Turn(
        flow="split", rows=rows, offsets=offsets, divisor=divisor, train=(*at_sites(plan), *central(plan)), sums=sums
    )


def epochs_of(
    plan: Plan,
    settings: Settings,
    sizes: Sizes,
    epochs: int,
    done: Turns,
    steps: Callable[[int], Iterator[Turn]],
    equal: Sequence[str],
    settled: Callable[[], Iterator[Turn]] | None = None,
) -> Turns:
    """Epochs of a schedule's own turns, each with an account behind it and, where it is due, a look.

    The judge of a look is the first site, for it sees blind sums.

    Args:
        steps: an epoch's turns, in order; steps and epochs are counted here.
        equal: the sites' segments that are compared after an epoch.
        settled: what makes them the same; it comes, and they are compared, only before a look and at the end. If it is
            not said, they always are.
    """
    keeps, (step, start) = (*at_sites(plan), *central(plan)), step_and_epoch(done)
    turns: list[Turn] = []
    for epoch in range(start, start + epochs):
        for turn in steps(epoch):
            turns.append(replace(turn, step=step, epoch=epoch))
            step += bool(turn.train)
        looks = bool(settings.validate_every) and (epoch + 1 - start) % settings.validate_every == 0
        compares = settled is None or looks or epoch + 1 == start + epochs
        if settled is not None and compares:
            turns += [replace(turn, step=step, epoch=epoch) for turn in settled()]
        turns.append(Turn(equal=tuple(equal) if compares else (), account=plan.sites, step=step, epoch=epoch))
        if looks:
            judge = Judge(at=plan.sites[0], tally="scores", keeps=keeps) if settings.keep_best else None
            turns += evaluation(plan, sizes, "validation", step, epoch, judge)
    return judged(turns, len(done))


def apart(plan: Plan, settings: Settings, sizes: Sizes, train: tuple[str, ...]) -> Turns:
    """Local epochs at every site, averaged by records a few times."""
    training = records_of(plan, sizes, "train")
    records = sum(training.values())
    share = {site: size / records for site, size in training.items()}
    sums: tuple[Sum, ...] = tuple(("weights", n) for n in train) if len(plan.sites) > 1 else ()
    turns: list[Turn] = []
    for _ in range(settings.rounds):
        for _ in range(settings.local_epochs):
            turns += local_epoch(training, settings.local_batch, train, turns)
        averaged = Turn(sums=sums, share=share, optimizer="local", fresh=True, account=plan.sites)
        step, epoch = step_and_epoch(turns)
        turns.append(replace(averaged, step=step, epoch=epoch - 1))
    return tuple(turns)


def local_epoch(training: Mapping[str, int], batch: int, train: tuple[str, ...], done: Sequence[Turn]) -> Turns:
    """One epoch in which each of these sites trains by itself, on so many records."""
    step, epoch = step_and_epoch(done)
    local = Turn(flow="local", train=train, optimizer="local", epoch=epoch)
    batches = local_batches(training, batch)
    return tuple(
        replace(local, rows=(b.rows,), offsets=(b.offsets,), step=step + number) for number, b in enumerate(batches)
    )


def by_themselves(plan: Plan, settings: Settings, training: Mapping[str, int], done: Turns) -> Turns:
    """As many local epochs at each of these sites, without an average; then they hand on what they have trained.

    Args:
        training: records of the sites that train; of several, each bottom will stand beside the others at every site.
    """
    bottom, turns = at_sites(plan)[0], list[Turn]()
    for _ in range(settings.rounds * settings.local_epochs):
        turns += local_epoch(training, settings.local_batch, (bottom, LOCAL_HEAD), (*done, *turns))
    beside = settings.bottoms == "concatenated"
    gives = [
        (Copy(bottom, site), Copy(of(bottom, site) if beside else bottom, lane))
        for site in training
        for lane in plan.sites
        if beside or lane != site
    ]
    step, epoch = step_and_epoch(turns)
    return (*turns, Turn(gives=tuple(gives), account=plan.sites, step=step, epoch=epoch - 1))


def release(plan: Plan, settings: Settings, sizes: Sizes, bottoms: tuple[str, ...], done: Turns) -> Turns:
    """Every training and validation record's activations and label, once, from bottoms that are the same."""
    step, epoch = step_and_epoch(done)
    turns = [Turn(equal=bottoms if len(plan.sites) > 1 else (), step=step, epoch=epoch)]
    parts: tuple[Part, ...] = ("train", "validation") if settings.validate_every else ("train",)
    for site in plan.sites:  # one after the other: who has released waits for nobody
        for part in parts:
            batches = local_batches({site: sizes[site][part]}, AT_ONCE)
            rows, offsets = tuple(b.rows for b in batches), tuple(b.offsets for b in batches)
            if rows:
                turns.append(Turn(flow="release", rows=rows, offsets=offsets, records=part, step=step, epoch=epoch))
        turns.append(Turn(account=(site,), step=step, epoch=epoch))
    return tuple(turns)


def finish(plan: Plan, settings: Settings, sizes: Sizes, trunk: str, done: Turns) -> Turns:
    """The server trains the trunk on what was released, and judges by the validation records among it."""
    (step, start), records = step_and_epoch(done), sum(records_of(plan, sizes, "train").values())
    held = sum(records_of(plan, sizes, "validation").values()) if settings.validate_every else 0
    turns: list[Turn] = []
    for epoch in range(start, start + settings.epochs):
        for begin, end in equal_parts(records, settings.batch):
            finish = Turn(flow="finish", rows=({ONE: end - begin},), offsets=({ONE: begin},), train=(trunk,))
            turns.append(replace(finish, step=step, epoch=epoch))
            step += 1
        if held and (epoch + 1 - start) % settings.validate_every == 0:
            judge = Judge(at=plan.hub, tally=HELD, keeps=(trunk,)) if settings.keep_best else None
            check = Turn(flow="check", rows=({ONE: held},), offsets=({ONE: 0},), records="validation", judge=judge)
            turns.append(replace(check, step=step, epoch=epoch))
    return judged(turns, len(done))


def end(plan: Plan, settings: Settings, sizes: Sizes, done: Turns) -> Turns:
    """The test, and what the terms hand to whom."""
    (step, epochs), turns = step_and_epoch(done), list[Turn]()
    last = max(0, epochs - 1)
    if settings.test:
        turns += evaluation(plan, sizes, "test", step, last)
        if settings.site_scores:
            own = {site: 1 for site in plan.sites if sizes[site]["test"]}
            turns += whole(own, "test", ("report_own",), step, last)
    elif settings.trunk_to_everyone:
        turns.append(Turn(gives=_visits(plan), step=step, epoch=last))
    if settings.bottom_to_everyone:
        gives = tuple((Copy(n, plan.sites[0]), Copy(there(n))) for n in at_sites(plan))
        turns.append(Turn(gives=gives, step=step, epoch=last))
    alone = ("finish", "check")  # what the server does by itself adds nothing to the sites' ledgers
    if turns or not next(turn.account for turn in reversed(done) if turn.flow not in alone):
        turns.append(Turn(account=plan.sites, step=step, epoch=last))
    return tuple(turns)


def judged(turns: Sequence[Turn], start: int) -> Turns:
    """The same turns, in which every judge knows where they end, and the last one that it is."""
    looks = [number for number, turn in enumerate(turns) if turn.judge]
    judged = list(turns)
    for number in looks:
        judge = judged[number].judge
        assert judge is not None
        last = number == looks[-1]
        judged[number] = replace(judged[number], judge=replace(judge, to=start + len(turns), last=last))
    return tuple(judged)


def same_counts(sizes: Sizes) -> Mapping[str, int]:
    """How many records of each part all holders bring. Raises `DataError` if they do not bring as many."""
    first, *others = sizes.values()
    if any(counts != first for counts in others):
        told = "; ".join(f"{name} brings {_told(own)}" for name, own in sizes.items())
        raise DataError(f"the parties hold other patients: {told}. Match their records and agree on a list of ids")
    return first


def _told(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{count:,} {part}" for part, count in counts.items() if count) or "none"


def checked(count: int, part: Part, step: int, epoch: int) -> Turn:
    """All records of a part through the flow `check`."""
    parts = equal_parts(count, AT_ONCE)
    rows, offsets = tuple({ONE: end - begin} for begin, end in parts), tuple({ONE: begin} for begin, _ in parts)
    return Turn(flow="check", rows=rows, offsets=offsets, records=part, step=step, epoch=epoch)


def renamed(edges: Sequence[Edge], names: Mapping[str, str]) -> tuple[Edge, ...]:
    """The same edges between other segments."""
    return tuple(replace(e, source=names.get(e.source, e.source), target=names.get(e.target, e.target)) for e in edges)


def records_of(plan: Plan, sizes: Sizes, part: Part) -> dict[str, int]:
    return {site: sizes[site][part] for site in plan.sites}


def whole(rows: Mapping[str, int], part: Part, flows: Sequence[str], step: int = 0, epoch: int = 0) -> Iterator[Turn]:
    """One turn for each flow, over all the records of a part, each tally that it fills summed."""
    for flow in flows:
        sums: tuple[Sum, ...] = (("tally", flow),) if flow in TALLIES else ()
        offsets = (dict.fromkeys(rows, 0),)
        yield Turn(flow=flow, rows=(rows,), offsets=offsets, records=part, sums=sums, step=step, epoch=epoch)


def evaluation(
    plan: Plan, sizes: Sizes, part: Part, step: int, epoch: int, judge: Judge | None = None
) -> Iterator[Turn]:
    """The trunk travels to the sites, which count; the first of them tells the server what the sums say."""
    yield Turn(gives=_visits(plan), step=step, epoch=epoch)
    yield from whole(records_of(plan, sizes, part), part, ("scores",), step, epoch)
    for report in whole({plan.sites[0]: 1}, part, ("report",), step, epoch):
        yield replace(report, judge=judge)


def _visits(plan: Plan) -> tuple[tuple[Copy, Copy], ...]:
    return tuple((Copy(n), Copy(here(n), lane)) for n in central(plan) for lane in plan.sites)


TALLIES = ("sums", "squares", "classes", "scores")
"""What is counted at the sites and summed, each by the flow of its name: for standardisation and class weights, and
confusion counts."""


def with_counts(plan: Plan, settings: Settings) -> Plan:
    """The plan with the flows that stand around training: statistics before it, evaluation and result after."""
    visiting = {name: here(name) for name in central(plan)}
    split = plan.edges("split")
    last = plan.losses[0]
    kept = at_sites(plan) if settings.bottom_to_everyone else ()

    def at_home(edge: Edge) -> Edge:
        source, target = (visiting.get(name, name) for name in (edge.source, edge.target))
        return replace(edge, source=source, target=target, gradient=False)

    def counted(name: str) -> tuple[Edge, ...]:
        return Edge("data", name, gradient=False), Edge("data", name, "labels", gradient=False)

    segments = (
        *plan.segments,
        *(Segment(name=here(n)) for n in central(plan)),
        *(Segment(name=there(n), at=plan.hub) for n in kept),
        *(Segment(name=n, kind="tally") for n in (*TALLIES, "own_scores")),
        Segment(name="board", at=plan.hub, kind="store"),
    )
    flows = (
        *plan.flows,
        ("sums", counted("sums")),
        ("squares", counted("squares")),
        ("classes", counted("classes")),
        (
            "scores",
            (
                *(at_home(e) for e in split if e.kind == "activations"),
                Edge(visiting.get(last, last), "scores", gradient=False),
                Edge("data", "scores", "labels", gradient=False),
            ),
        ),
        ("report", (Edge("scores", "board", "scores", gradient=False),)),
        ("report_classes", (Edge("classes", "board", "scores", gradient=False),)),
        ("report_own", (Edge("own_scores", "board", "scores", gradient=False),)),
    )
    return replace(plan, segments=segments, flows=flows).checked()
