"""From a job, an identity and what lives at this party to a `Party`: the same for simulate, a site and the server."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec
import torch
from torch import Tensor, nn

from partway.blueprint import (
    DTYPES,
    Network,
    Schemas,
    Shipped,
    built,
    concatenated,
    configured,
    example_of,
    nowhere,
)
from partway.config import Job, Optimizer, Policy, of_any_size
from partway.cost import Cost, forecast
from partway.data.records import Records, Schema, Target, statistics_of
from partway.data.schema import columns_of, layout, part_of
from partway.egress import Door, Tap
from partway.errors import ConfigError, Refused, UsageError
from partway.ledger import Ledger
from partway.model.head import SiteVector, decoder, local_head
from partway.model.segment import Segment, has_batchnorm, initialise
from partway.party import Identity, Party
from partway.plan.decoders import DECODER, semi_supervised
from partway.plan.options import Options, with_options
from partway.plan.phases import HELD, LOCAL_HEAD, SHELF, Schedule, Settings, at_sites, original
from partway.plan.plan import Copy, Optimizing, Plan, Sizes, Turn
from partway.plan.predicting import predicting, told
from partway.plan.private import EMBEDDING, OWN, SHARED, STEM
from partway.plan.rate import Rate
from partway.plan.schedules import SCHEDULES, every_party
from partway.policy import Objection, judge_groups, judge_job, judge_turns, refuse
from partway.pretrained import refuse_untied, take
from partway.protocol.messages import Reason
from partway.protocol.net import compile
from partway.report import Left, read_left
from partway.shapes import Piece, Shapes, measure
from partway.train.baselines import OptimizerOf
from partway.train.draws import derived, first_weights, forward_seed
from partway.train.scoring import FIGURES, size_of_counts, value
from partway.train.source import RecordSource, Shelf
from partway.train.stopping import Best
from partway.train.tallies import Classes, Evaluation, Moments, Squares, Tally, Told
from partway.train.targets import loss_of, whole_batch
from partway.train.worker import Worker
from partway.wire.tensors import NAMES

STATES = {
    "adam": ("exp_avg", "exp_avg_sq", "step"),
    "adamw": ("exp_avg", "exp_avg_sq", "step"),
    "sgd": ("momentum_buffer",),
}
"""What PyTorch's optimisers keep for a parameter, by its names for it."""
HALF = {"full": None, "bfloat16": torch.bfloat16, "float16": torch.float16}
"""What `torch.autocast` is set to."""


def schema_of(job: Job) -> Schema:
    """What a record of this job looks like. Raises `ConfigError` where only Python can say."""
    return layout(columns_of(job), job.records.scale, (job.records.target,))


def schemas_of(job: Job, server: str = "server") -> Schemas:
    """The same of every party that holds records."""
    plan = configured(job, server)
    if job.laned:
        return dict.fromkeys(plan.holders, schema_of(job))
    columns, found = columns_of(job), {}
    for party in plan.holders:
        if party not in job.holds:
            raise ConfigError(f"the plan has records at {party}, and there is no [holds.{party}]")
        held = job.holds[party]
        found[party] = layout(part_of(columns, held), job.records.scale, held.targets)
    return found


def plan_of(job: Job, server: str) -> tuple[Plan, Schedule]:
    """The plan with all its flows, and the schedule: what every party derives from the signed job alone."""
    training, evaluation = job.training, job.evaluation
    half_trained = training.schedule == "half_trained"
    settings = Settings(
        seed=job.job.seed,
        epochs=training.epochs,
        batch=training.batch,
        class_weights=training.class_weights != "none",
        standardise=job.laned and job.columns is not None and schema_of(job).numeric > 0,
        validate_every=evaluation.every if evaluation.trunk_travels or half_trained or not job.laned else 0,
        keep_best=training.keep == "best",
        test=evaluation.trunk_travels,
        site_scores=evaluation.site_scores,
        bottom_to_everyone=job.result.bottom == "everyone",
        trunk_to_everyone=job.result.trunk == "everyone",
        rounds=training.half_trained.rounds,
        local_epochs=training.half_trained.local_epochs,
        local_batch=training.half_trained.batch,
        bottoms=training.half_trained.bottoms,
        shared_epochs=training.private.shared_epochs,
        gate=training.private.gate,
        average_every=training.averaged.every,
        turn_batches=training.relay.turn_batches,
        relay_order=training.relay.order,
        relay_kept=training.relay.hand_over == "kept",
        synchronous_epochs=training.half_trained.synchronous_epochs,
    )
    options = Options(
        rate=Rate(**msgspec.structs.asdict(training.rate)),
        clip=training.clip_norm,
        micro_batch=training.micro_batch,
        scaled=training.precision == "float16",
    )
    plan = configured(job, server)
    if job.predict is not None:
        return predicting(plan)
    plan, schedule = SCHEDULES[training.schedule](plan, settings) if plan.sites else every_party(plan, settings)
    schedule = with_options(plan, schedule, options)
    alpha = training.semi_supervised.alpha
    return semi_supervised(plan, schedule, alpha) if alpha else (plan, schedule)


def optimizer_of(settings: Optimizer) -> OptimizerOf:
    """The job's optimiser, for any parameters."""

    def make(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        if settings.name == "sgd":
            momentum, decay = settings.momentum, settings.weight_decay
            return torch.optim.SGD(parameters, settings.lr, momentum=momentum, weight_decay=decay, fused=True)
        kind = torch.optim.Adam if settings.name == "adam" else torch.optim.AdamW
        return kind(parameters, settings.lr, weight_decay=settings.weight_decay, fused=True)

    return make


def optimizers_of(job: Job) -> dict[Optimizing, OptimizerOf]:
    """By the name that a turn gives it."""
    return {"main": optimizer_of(job.training.optimizer), "local": optimizer_of(job.training.half_trained.optimizer)}


@dataclass(frozen=True)
class Parts(Network):
    """A job's network in pieces, with what each is and costs. A local head stands beside it."""

    pieces: dict[str, Piece]


def network_of(
    job: Job, policy: Policy, schema: Schema | Schemas, server: str = "server", shipped: Shipped = nowhere
) -> Parts:
    """Builds the network by name, once the policy has allowed the name, and cuts it, or joins those of all segments.

    Args:
        schema: of the records; of each party's, where they differ.
        shipped: reads segments that come as signed folders.

    Raises:
        Refused: the name is not allowed, or the network is too large; or a folder is not there, or may not run.
        CutError: it cannot be cut there.
        ConfigError: its arguments are wrong, or it does not fit the records.
    """
    plan = configured(job, server)
    schemas = by_party(plan, schema)
    network, dtype = built(job, policy, plan, schemas, shipped), DTYPES[job.training.dtype]
    for loss in plan.losses:
        width, target = tuple(network.outputs[loss].shape[1:]), target_of(plan, schemas, loss)
        what = f"[networks.{loss}]" if network.separate else f"[network] {job.builds[0]}"
        if width != (target.outputs,):
            due = f"the records have {target.outputs} classes"
            if target.kind != "classes":
                due = f"the target {target.name}, {target.kind}, needs {target.outputs}"
            raise ConfigError(f"{what} puts out {width} numbers a record; {due}")
        if whole_batch(target) and (plan[loss].laned or job.training.micro_batch):
            raise ConfigError(
                f"Cox's loss of {target.name} needs a step's records in one place and at once: not in a U-shape, in "
                "micro_batch or where each site trains by itself; give the target `intervals`, for discrete time"
            )
    _refuse_frozen_apart(job, plan, network)
    if job.concatenates:
        network = concatenated(network, plan.sites, policy)
    pieces: dict[str, Piece] = {}
    half = HALF[job.training.precision]
    for name, module in network.modules.items():
        example = example_of(plan, schemas, network.modules, network.outputs, name, dtype)
        if job.concatenates and name == "trunk":
            example = torch.cat([example] * len(plan.sites), 1)
        onto_data = all(plan[e.source].kind == "records" for e in plan.edges("split") if e.target == name)
        came = [pieces[e.source].dtype for e in plan.edges("split") if e.target == name and e.source in pieces]
        example = example.to(came[0]) if came else example
        pieces[name], _ = measure(module, example, first=onto_data, half=half)
    if job.training.schedule == "half_trained" and plan.sites:
        ((bottom,), (loss,)) = at_sites(plan), plan.losses
        output = network.outputs[bottom].to(pieces[bottom].dtype)
        classes = target_of(plan, schemas, loss).outputs
        head = local_head(output.shape[1:], classes, job.training.half_trained.local_head == "hidden")
        pieces[LOCAL_HEAD], _ = measure(head.to(dtype), output, first=False, half=half)
        network.modules[LOCAL_HEAD] = head
    if job.training.semi_supervised.alpha:
        output, wanted = network.outputs[plan.nets[0]], math.prod(schemas[plan.holders[0]].shape)
        own = decoder(output.shape[1:], wanted, job.training.semi_supervised.decoder == "hidden").to(dtype)
        network.modules[DECODER] = own
        pieces[DECODER], _ = measure(own, output, first=False, half=half)
    if job.embeds:
        *_, layer = (m for m in network.modules[STEM].modules() if not isinstance(m, nn.Sequential))
        network.modules[EMBEDDING] = SiteVector(layer).to(dtype)
        pieces[EMBEDDING], _ = measure(network.modules[EMBEDDING], network.outputs[STEM], first=False, half=half)
    return Parts(**vars(network), pieces=pieces)


def _refuse_frozen_apart(job: Job, plan: Plan, network: Network) -> None:
    """Each party would draw another, and no step would bring them together."""
    seen: dict[int, str] = {}
    for name, module in network.modules.items():
        for path, parameter in module.named_parameters():
            other = seen.setdefault(id(parameter), name)
            if parameter.requires_grad or plan[name].at == plan[other].at or {name, other} <= job.weights.keys():
                continue
            raise ConfigError(
                f"`{path}` is frozen, and the {other} and the {name} use it, at two parties: give both their weights, "
                f"[network.weights] {other} and {name}"
            )


def by_party(plan: Plan, schema: Schema | Schemas) -> Schemas:
    """The schema of each party that holds records: of sites with patients of their own one for all."""
    one = next(iter(schema.values())) if plan.sites and not isinstance(schema, Schema) else schema
    return dict.fromkeys(plan.holders, one) if isinstance(one, Schema) else one


def target_of(plan: Plan, schemas: Schemas, loss: str) -> Target:
    """What the labels are that a segment's loss is told."""
    (edge,) = (e for e in plan.edges("split") if e.target == loss and e.kind == "labels")
    return schemas[plan.place(plan.copies(edge.source)[0])].target(edge.field)


def shapes_of(job: Job, plan: Plan, network: Parts, schema: Schema | Schemas) -> Shapes:
    """What every letter of the job carries."""
    dtype, blind, schemas = DTYPES[job.training.dtype], job.training.sums == "blind", by_party(plan, schema)
    first, targets = schemas[plan.holders[0]], {loss: target_of(plan, schemas, loss) for loss in plan.losses}
    target = targets[plan.losses[0]]
    classes = target.classes
    counted = {
        "sums": 2 * first.numeric,
        "squares": first.numeric,
        "classes": classes,
        "scores": size_of_counts(target),
    }
    return Shapes(
        plan=plan,
        pieces={s.name: network.pieces[original(s.name)] for s in plan.segments if s.kind == "net"},
        tallies=counted if plan.sites else {},
        labels=_labels(plan, schemas, target),
        figures={"scores": FIGURES, "own_scores": FIGURES, "classes": classes},
        dtype=dtype,
        optimizer_state=STATES[job.training.optimizer.name] if job.training.optimizer.has_state else (),
        words={torch.float32: 1, torch.float64: 2}[dtype] if blind else 0,
        tally_words=2 if blind else 0,
    )


def _labels(plan: Plan, schemas: Schemas, target: Target) -> dict[tuple[str, str], tuple[str, tuple[int, ...]]]:
    """What one record's label is on the wire, by the edge that brings it."""
    found = {}
    for edge in (e for flow, _ in plan.flows for e in plan.edges(flow) if e.kind == "labels"):
        own = target if plan.sites else schemas[plan.place(plan.copies(edge.source)[0])].target(edge.field)
        found[edge.source, edge.target] = NAMES[own.dtype], own.label
    return found


def forecast_of(
    job: Job, schema: Schema | Schemas, sizes: Sizes, server: str = "server", shipped: Shipped = nowhere
) -> dict[str, Cost]:
    """What each party of a job will spend, with nothing running.

    Args:
        sizes: records of each party in each part; where each site has its own, the roster is made from them.
    """
    if job.laned:
        job = msgspec.structs.replace(job, roster=dict.fromkeys(sizes, ""))
        schema = schema if isinstance(schema, Schema) else next(iter(schema.values()))  # of a roster that was not yet
    network = network_of(job, of_any_size(job.builds), schema, server, shipped)
    plan, schedule = plan_of(job, server)
    shapes = shapes_of(job, plan, network, schema)
    turns = [(turn, compile(plan, turn)) for turn in schedule(sizes)]
    return {party: forecast(shapes, party, turns) for party in plan.parties}


@dataclass(kw_only=True)
class Place:
    """What one party brings to a job."""

    identity: Identity
    policy: Policy
    secret: bytes
    """32 bytes that never leave; all draws of this party come from it."""
    records: Records | None = None
    folder: Path | None = None
    """Where the ledger goes; None keeps none."""
    earlier: Path | None = None
    """Where jobs before this one have left their folders."""
    weights: Path | None = None
    """Where files of weights lie that jobs name by digest."""
    shipped: Shipped = nowhere
    """Reads segments that jobs name by digest."""
    device: str = "auto"
    tap: Tap | None = None
    released: int = 0
    """How often its records were handed over to be kept, in jobs before this one."""
    on_release: Callable[[], None] | None = None
    """Called before they are in this one."""


@dataclass(kw_only=True)
class Assembled:
    """A party, and what its driver wants to know of it."""

    party: Party
    job: Job
    plan: Plan
    network: Parts
    targets: dict[str, Target]
    """Of each segment with a loss."""
    ledger: Ledger
    evaluations: dict[str, Evaluation]
    """What this party has counted, or heard of counts, by tally: over its own records, or what was released or sent."""


def assemble(
    job: Job,
    digest: bytes,
    operator: str,
    roster: Mapping[str, str],
    server: str,
    place: Place,
    schema: Schema | Schemas,
    signed_by: Callable[[bytes, bytes, bytes], bool],
) -> Assembled:
    """One party of a job, ready to start.

    Args:
        digest: of the signed job, 32 bytes.
        operator: who signed it.
        roster: key fingerprints of all parties, the server's too.
        signed_by: (key, signature, data) -> whether the key made the signature.

    Raises:
        Refused: this party's policy does not allow the job.
    """
    me, policy, secret = place.identity.name, place.policy, place.secret
    refuse(me, judge_job(policy, me, job, operator))
    torch.set_num_threads(job.training.threads)
    plan, schedule = plan_of(job, server)
    network = network_of(job, policy, schema, server, place.shipped)
    _refuse_batchnorm(me, job, plan, network)
    shapes, dtype, device = shapes_of(job, plan, network, schema), DTYPES[job.training.dtype], device_of(place.device)
    tied = network.tied
    for name in dict.fromkeys(copy.segment for copy in plan.placed(me)):
        if name == original(name):  # all of them before any is copied, for some share weights
            initialise(network.modules[name], first_weights(secret, digest, name))
    segments = {copy: Segment(network.modules[original(copy.segment)], dtype, device) for copy in plan.placed(me)}
    for copy, segment in segments.items():
        if copy.segment in job.weights:
            take(place.weights, segment, copy.segment, job.weights[copy.segment])
    refuse_untied(tied, segments)
    left = take_left(place.earlier, job, network, segments) if job.predict and segments else None
    ledger = Ledger(
        place.folder / "ledger.jsonl" if place.folder else None, derived(secret, "ledger"), place.identity.sign
    )
    ledger.line("job", name=job.job.name, digest=digest.hex(), party=me, operator=operator, roster=job.roster)
    door = Door(me, ledger, place.tap, place.on_release)
    schemas = by_party(plan, schema)
    targets = {loss: target_of(plan, schemas, loss) for loss in plan.losses}
    target = targets[plan.losses[0]]
    counted = {"scores": target} if plan.sites else {f"scores_{loss}": t for loss, t in targets.items()}
    evaluations = {name: Evaluation(t) for name, t in counted.items()}
    own = {name: Evaluation(target) for name in (OWN, SHARED)}
    evaluation, classes, source = next(iter(evaluations.values())), Classes(target.classes), None
    if place.records is not None:
        source = RecordSource(place.records, secret, digest, dtype, device)
        _standardise(source, plan, left)
    tallies: dict[str, Tally] = {**_tallies(source, evaluation, classes), **own} if plan.sites else {**evaluations}
    tallies |= _told(plan.placed(me, "tally"), targets, source)
    rule = Best(job.training.patience)
    worker = Worker(
        plan,
        shapes,
        segments,
        optimizers=optimizers_of(job),
        source=source,
        stores={c.segment: Shelf(job.sites, secret, digest) for c in plan.placed(me, "store") if c.segment == SHELF},
        tallies=tallies,
        judges=dict.fromkeys((*counted, HELD), lambda: rule.look(evaluation.all[-1][2])),
        better=lambda one, other: _better(own[one], own[other]),
        reports={"scores": evaluation.report_all, "own_scores": evaluation.report_own, "classes": classes.report},
        account=door.account,
        draws=lambda turn, m, copy: forward_seed(secret, digest, turn, m, copy),
        losses={loss: loss_of(t) for loss, t in targets.items()} if not plan.sites else {},
        half=HALF[job.training.precision],
        tied=tied,
        device=device,
    )
    worker.loss = loss_of(target)
    if job.training.class_weights != "none":
        worker.loss = loss_of(target, lambda: _weights(classes, worker))

    def judge(turns: Sequence[Turn], sizes: Sizes) -> None:
        groups = judge_groups(policy, plan, turns, sizes, network.inputs, job.job.seed)
        refuse(me, [*judge_turns(policy, me, shapes, turns, place.released), *groups])

    party = Party(
        place.identity,
        plan,
        schedule,
        digest,
        worker,
        door,
        records=place.records.sizes if place.records is not None else {},
        roster=roster,
        judge=judge,
        signed_by=signed_by,
        blind=job.training.sums == "blind",
        group=derived(secret, "group", digest.hex()),
    )
    return Assembled(
        party=party, job=job, plan=plan, network=network, targets=targets, ledger=ledger, evaluations=evaluations
    )


def _weights(classes: Classes, worker: Worker) -> Tensor:
    """Of classes: as this party has counted them, or as a site has told."""
    if classes.weights is None:
        classes.weights = next(row for turn, _, row in worker.board if turn.flow == "report_classes")
    return classes.weights


def _better(one: Evaluation, other: Evaluation) -> bool:
    """On this site's own validation records; where it has none, nothing is."""
    if "validation" not in one.own:
        return False
    return value(one.own["validation"]) > value(other.own["validation"])


def _standardise(source: RecordSource, plan: Plan, left: Left | None) -> None:
    """As an earlier job has done it; or by this party's own records, if it has those columns of all patients."""
    if left is not None and left.scaling:
        source.standardise(left.scaling["mean"], left.scaling["deviation"])
    elif not plan.sites and len(source.records.numeric):
        source.standardise(*statistics_of([source.records]))


def _told(copies: Sequence[Copy], targets: Mapping[str, Target], source: RecordSource | None) -> dict[str, Tally]:
    """Where this party gathers what it is told of its records."""
    lanes = {copy.segment: copy.lane for copy in copies}
    here = {told(loss): target for loss, target in targets.items() if told(loss) in lanes}
    return {} if source is None else {n: Told(source, t.outputs, lanes[n]) for n, t in here.items()}


def _tallies(source: RecordSource | None, evaluation: Evaluation, classes: Classes) -> dict[str, Tally]:
    if source is None:
        return {HELD: evaluation}
    moments = Moments(source)
    return {"sums": moments, "squares": Squares(source, moments), "classes": classes, "scores": evaluation}


def _refuse_batchnorm(me: str, job: Job, plan: Plan, network: Parts) -> None:
    instead = "[network] group_norm = 4 puts GroupNorm in its place"
    for name, module in network.modules.items():
        if not (found := has_batchnorm(module)):
            continue
        if job.training.micro_batch:
            words = f"the {name} has BatchNorm at {found}, whose statistics differ in each micro-batch; {instead}"
            refuse(me, [Objection(Reason.BATCHNORM, words)])
        if plan[name].laned and len(plan.sites) > 1:
            words = f"the {name} has BatchNorm at {found}, whose statistics differ at each site; {instead}"
            refuse(me, [Objection(Reason.BATCHNORM, words)])


def take_left(earlier: Path | None, job: Job, network: Parts, segments: Mapping[Copy, Segment]) -> Left:
    """What the job that `[predict]` names has left here; the segments take it. Raises `Refused` if it does not fit."""
    assert job.predict is not None
    folder = next(earlier.glob(f"*-{job.predict.of}"), None) if earlier is not None else None
    words = f"[predict] of = `{job.predict.of}`: "
    if folder is None:
        raise Refused(f"{words}no such job has run here", [Reason.EARLIER.name])
    file = next((f for f in (folder / "network.safetensors", folder / "segments.safetensors") if f.exists()), None)
    if file is None:
        raise Refused(f"{words}it has left no network in {folder}", [Reason.EARLIER.name])
    left = read_left(file)
    if _recipe(left.job) != _recipe(job):
        raise Refused(f"{words}its network, records or parties were not those of this job", [Reason.EARLIER.name])
    for copy, segment in segments.items():
        prefix = network.prefix(copy.segment)
        try:
            segment.load_tensors({name: left.weights[prefix + name] for name in segment.tensors()})
        except (KeyError, UsageError):
            raise Refused(f"{words}it has left no {copy.segment} in {folder}", [Reason.EARLIER.name]) from None
    return left


def _recipe(job: Job) -> tuple[object, ...]:
    """What must be the same in a job that trains and one that predicts."""
    training = job.training
    where = job.configuration, training.join, training.middle, training.hops, job.plan, job.holds
    return job.network, job.networks, training.dtype, where, job.records, job.columns


def device_of(name: str) -> str:
    """`auto` is CUDA where there is one."""
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return name
