"""A job file: one training run of a federation."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import msgspec
from msgspec import Meta, field

from partway.config.schema import BinaryTarget, ClassesTarget, Columns, Scale, bundled_schema, read_schema
from partway.config.words import Count, Fingerprint, Name, Positive, Rate, Settings, contents, read, words_of
from partway.errors import ConfigError
from partway.plan.plan import EACH
from partway.plan.schedules import LEGAL, WHY


class JobHeader(Settings, frozen=True, kw_only=True):
    """`[job]`"""

    name: Name
    """Of the study; part of the names of folders."""
    seed: Count = 0
    """Draws which site fills which place of a union batch, and divides records into training, validation and test."""


class Lora(Settings, frozen=True, kw_only=True):
    """`[network.lora]`: what is trained is a product of low rank beside some layers' weights, which stay."""

    modules: Annotated[list[Annotated[str, Meta(min_length=1, max_length=200)]], Meta(min_length=1, max_length=64)]
    """Paths of layers, or the last names of their paths."""
    rank: Annotated[int, Meta(ge=1, le=256)] = 8
    alpha: Annotated[int, Meta(ge=1, le=1024)] = 16
    """What is added is multiplied by `alpha / rank`."""
    train: list[Annotated[str, Meta(min_length=1, max_length=200)]] = []
    """Beginnings of names of weights that are trained as they are, such as of a new last layer."""


class JobNetwork(Settings, frozen=True, kw_only=True):
    """`[network]`: installed code by name, and where it is cut."""

    build: Annotated[str, Meta(max_length=200)]
    """`module:name`, compared as an exact string with each party's policy before anything is imported."""
    arguments: dict[str, Any] = {}
    """Of the network, as its recipe bounds them."""
    cut: Annotated[list[Annotated[str, Meta(max_length=200)]], Meta(min_length=1, max_length=64)]
    """Module paths after which the network is cut: one for vanilla, two for a U-shape, one a hop. Where a module is
    called more than once, `block#0` is the first call."""
    may_cross: list[Annotated[str, Meta(max_length=200)]] = []
    """Inputs of the network that another party may get as they are, or with no weight applied to them."""
    weights: dict[Name, Annotated[str, Meta(pattern=r"^[0-9a-f]{64}$")]] = {}
    """Of segments that were trained elsewhere: the digest of the file with their weights, as `partway weights` tells
    it. Who runs such a segment has the file."""
    frozen: list[Name] = []
    """Segments that are not trained."""
    lora: Lora | None = None
    """Low-rank adapters, by the extra `lora`; what has none stays as it is."""
    group_norm: Annotated[int, Meta(ge=0, le=64)] = 0
    """Puts GroupNorm with so many groups in the place of every BatchNorm; 0 leaves the network as it is."""


class SegmentNetwork(Settings, frozen=True, kw_only=True):
    """`[networks.SEGMENT]`: where each segment of the plan is a network of its own."""

    build: Annotated[str, Meta(max_length=200)] = ""
    """Installed code by name, as in `[network]`."""
    arguments: dict[str, Any] = {}
    """Of what `build` names."""
    segment: Annotated[str, Meta(pattern=r"^([0-9a-f]{64})?$")] = ""
    """Or a signed folder, for who has not the code: its digest, as `partway segment write` tells it."""
    weights: Annotated[str, Meta(pattern=r"^([0-9a-f]{64})?$")] = ""
    """Where it was trained elsewhere: the digest of the file with its weights. Who runs it has the file."""
    frozen: bool = False
    """It is not trained."""


class Held(Settings, frozen=True, kw_only=True):
    """`[holds.PARTY]`: what one party has of the same patients as the others."""

    columns: tuple[Annotated[str, Meta(min_length=1, max_length=200)], ...] = ()
    """Of the schema."""
    targets: tuple[Annotated[str, Meta(min_length=1, max_length=200)], ...] = ()
    """Of the schema: which labels are here."""


class PlanSegment(Settings, frozen=True, kw_only=True):
    """One of `[plan] segments`"""

    name: Name
    at: Annotated[str, Meta(min_length=1, max_length=64)] = EACH
    """A party; or `each site`, with a copy at each."""
    copies: Literal["one", "each site"] = "one"
    """`each site`: a copy for every site, all at one party."""
    kind: Literal["net", "records"] = "net"
    join: Literal["features", "sum"] = "features"
    """Of what several other segments put out."""


class PlanEdge(Settings, frozen=True, kw_only=True):
    """One of `[plan] edges`"""

    source: Name
    target: Name
    kind: Literal["activations", "labels"] = "activations"
    gradient: bool = True
    """Of activations of a network: whether a gradient comes back."""
    field: str = ""
    """Of labels: which target, where the source has several."""


class OwnPlan(Settings, frozen=True, kw_only=True):
    """`[plan]`, with `configuration = "plan"`: which segments there are, where they live, what runs between them."""

    segments: Annotated[tuple[PlanSegment, ...], Meta(min_length=1, max_length=200)]
    edges: Annotated[tuple[PlanEdge, ...], Meta(min_length=1, max_length=1000)]


class Optimizer(Settings, frozen=True, kw_only=True):
    """`optimizer` of `[training]`"""

    name: Literal["adam", "adamw", "sgd"] = "adam"
    lr: Rate = 3e-3
    """Of a step over the mean loss of its records."""
    momentum: Annotated[float, Meta(ge=0, lt=1)] = 0.0
    """Of `sgd` only."""
    weight_decay: Annotated[float, Meta(ge=0, le=10)] = 0.0
    """`adamw`'s is decoupled from the gradient."""

    @property
    def has_state(self) -> bool:
        return self.name != "sgd" or self.momentum > 0


class LocalOptimizer(Optimizer, frozen=True, kw_only=True):
    """`optimizer` of `half_trained`"""

    name: Literal["adam", "adamw", "sgd"] = "sgd"
    lr: Rate = 0.03
    momentum: Annotated[float, Meta(ge=0, lt=1)] = 0.9


class HalfTrained(Settings, frozen=True, kw_only=True):
    """`half_trained` of `[training]`: what the sites do before the server's own epochs, and after them."""

    bottoms: Literal["averaged", "largest", "concatenated"] = "averaged"
    """What the sites' bottoms become: their average; or that of the site with the most training records, which alone
    trains one for rounds x local_epochs; or all of them side by side, each record through every site's."""
    rounds: Positive = 3
    """How often the sites' weights are averaged, blindly and by records."""
    local_epochs: Positive = 10
    """In each round, at every site by itself."""
    batch: Positive = 64
    """Records of one site in a step."""
    optimizer: LocalOptimizer = field(default_factory=LocalOptimizer)
    """Of the local epochs; it begins anew in each round."""
    local_head: Literal["linear", "hidden"] = "linear"
    """What stands behind the bottom in local epochs; `hidden` has one layer of 64 more."""
    synchronous_epochs: Count = 0
    """Epochs of `synchronous` afterwards, in which gradients reach the bottoms again."""


class Private(Settings, frozen=True, kw_only=True):
    """`private` of `[training]`: what every site has of its own, and when."""

    shared_epochs: Count = 3
    """Epochs of `synchronous` that come first; `epochs` follow."""
    personal: Literal["bottom", "embedding"] = "bottom"
    """What each site has of its own: the segments at the site; or, while these stay summed, a vector that is added to
    what the trunk's first dense layer puts out."""
    gate: bool = True
    """A site keeps what is its own only if it is better than the shared network on its own validation records."""


class SemiSupervised(Settings, frozen=True, kw_only=True):
    """`semi_supervised` of `[training]`: a decoder beside each site's bottom, and records without labels."""

    alpha: Annotated[float, Meta(ge=0, le=1000)] = 0.0
    """What the decoder's loss counts, a record's mean square over its features, beside that of the labels. 0: none."""
    decoder: Literal["linear", "hidden"] = "hidden"
    """From the cut's numbers back to the features; `hidden` has one layer of 64."""


Configuration = Literal["vanilla", "u_shaped", "vertical", "extended_vanilla", "multi_task", "multi_hop", "plan"]
LANED = ("vanilla", "u_shaped")
"""Configurations in which each site has patients of its own."""


class RateSchedule(Settings, frozen=True, kw_only=True):
    """`rate` of `[training]`: how the learning rate of `optimizer` goes over the steps of the whole run."""

    warm_up: Count = 0
    """Steps in which it rises in equal parts to `lr`."""
    then: Literal["constant", "cosine", "linear", "steps"] = "constant"
    """What it does after them, until the last step."""
    final: Annotated[float, Meta(ge=0, le=1)] = 0.0
    """Of `cosine` and `linear`: the fraction of `lr` to which it falls."""
    milestones: tuple[Count, ...] = ()
    """Of `steps`: the steps, counted from 0, from each of which on it is multiplied by `factor`."""
    factor: Annotated[float, Meta(gt=0, le=1)] = 0.1
    """Of `steps`."""


class Relay(Settings, frozen=True, kw_only=True):
    """`relay` of `[training]`: site after site."""

    turn_batches: Count = 0
    """Batches of a site before the next one's turn; 0 for an epoch over its records."""
    order: Literal["descending", "random"] = "descending"
    """Of the sites: by training records, or drawn anew each epoch from the job's seed."""
    hand_over: Literal["at_once", "kept"] = "at_once"
    """Weights and optimiser's state go on when they are made, or the server keeps them, sealed from it, until the next
    site's turn."""


class Averaged(Settings, frozen=True, kw_only=True):
    """`averaged` of `[training]`: union batches, weights averaged."""

    every: Count = 0
    """Steps between two averages in an epoch, at the end of which there is one in any case; 0 for that one alone."""


ScheduleName = Literal[
    "synchronous", "half_trained", "relay", "averaged", "private", "splitfed_v1", "splitfed_v2", "splitfed_v3"
]


class Training(Settings, frozen=True, kw_only=True):
    """`[training]`"""

    configuration: Configuration | None = None
    """`vanilla` sends labels to the server; `u_shaped` keeps them, with a head at the sites. If it is not said, one cut
    makes it `vanilla`, two a U-shape. The others are in `docs/configurations.md`; `plan` is one of your own."""
    join: Literal["features", "sum"] = "features"
    """Where several parties' outputs meet: side by side, or added."""
    middle: str = ""
    """Of `extended_vanilla`: the site at which they meet."""
    hops: tuple[Name, ...] = ()
    """Of `multi_hop`: the parties before the server, in order; the first holds the features."""
    skips: Annotated[tuple[Annotated[str, Meta(max_length=140)], ...], Meta(max_length=64)] = ()
    """Of a network that is cut: `bottom -> head` lets values of the bottom that the head uses pass by all between."""
    schedule: ScheduleName = "synchronous"
    """In which order the parties train; see `docs/schedules.md`."""
    epochs: Positive = 20
    """Of training together; of `half_trained` the server's, over what was released."""
    batch: Positive = 256
    """Records in a step: of a union batch, over all sites; in `relay` and SplitFed, of one site."""
    optimizer: Optimizer = field(default_factory=Optimizer)
    """Of training together."""
    rate: RateSchedule = field(default_factory=RateSchedule)
    """The learning rate of `optimizer` over time; local epochs keep theirs."""
    clip_norm: Annotated[float, Meta(ge=0)] = 0.0
    """The greatest norm of a step's gradient, of all segments together; a longer one is scaled to it. 0 for none."""
    micro_batch: Count = 0
    """Records that go through the network at once, over all sites: a batch is cut into parts whose gradients add up.
    0 for the whole batch."""
    precision: Literal["full", "bfloat16", "float16"] = "full"
    """Of activations and their gradients, at the cut too; weights and sums stay as `dtype` says. `float16` scales the
    loss, and skips steps that overflow."""
    keep: Literal["best", "last"] = "best"
    """Weights of the best evaluation on the validation records, or of the last epoch."""
    patience: Count = 0
    """Evaluations without a better one after which training stops; 0 for never."""
    relay: Relay = field(default_factory=Relay)
    """Read if it is the schedule."""
    averaged: Averaged = field(default_factory=Averaged)
    """Read if it is the schedule."""
    half_trained: HalfTrained = field(default_factory=HalfTrained)
    """Read if it is the schedule."""
    private: Private = field(default_factory=Private)
    """Read if it is the schedule."""
    semi_supervised: SemiSupervised = field(default_factory=SemiSupervised)
    """In any schedule."""
    dtype: Literal["float32", "float64"] = "float32"
    """Of weights and of what crosses a cut; equalities are checked in `float64`."""
    threads: Annotated[int, Meta(ge=1, le=256)] = 1
    """Of torch, at every party: part of what "the same bits" means."""
    class_weights: Literal["none", "sqrt"] = "none"
    """`sqrt`: the loss of a record of a rare class counts more, as count ** -1/2, by blind counts over all sites'
    training records; their mean weight is 1."""
    sums: Literal["blind", "clear"] = "blind"
    """`clear` lets the server read every share: for measurements. A policy refuses it unless it says otherwise."""


class Evaluation(Settings, frozen=True, kw_only=True):
    """`[evaluation]`: at the sites, with the trunk that travels to them."""

    trunk_travels: bool = True
    """False: nothing is evaluated at the sites, so there is no test, and no early stopping in `synchronous`."""
    every: Count = 1
    """Epochs between evaluations on the validation records; 0 for none."""
    site_scores: bool = False
    """Each site's own scores on its test records go to the server."""


class ResultTerms(Settings, frozen=True, kw_only=True):
    """`[result]`: who holds what at the end."""

    bottom: Literal["sites", "everyone"] = "sites"
    """The sites' segments; `everyone` is the server too."""
    trunk: Literal["server", "everyone"] = "server"
    """The server's segment; `everyone` is the sites too."""


class JobRecords(Settings, frozen=True, kw_only=True):
    """`[records]`: what a record is, and how it becomes numbers."""

    schema: Annotated[str, Meta(max_length=64, pattern=r"^([a-z]+|[A-Za-z0-9][A-Za-z0-9_.-]*\.toml)$")] = "thyroid"
    """A bundled schema, or a file beside the job's. `dataset`: any PyTorch dataset of (features, label)."""
    target: Annotated[str, Meta(max_length=200)] = ""
    """Which of the schema's targets is learnt; empty for its label's classes."""
    scale: Scale = "statistics"
    """Of numeric columns: by mean and deviation over all sites, from two blind sums; or each that has one by its
    reference range, for which nothing is exchanged; `marks` adds steps at and beyond the range's limits."""


class Predict(Settings, frozen=True, kw_only=True):
    """`[predict]`: nothing is trained; what an earlier job has left at the parties is used on records of today."""

    of: Annotated[str, Meta(pattern=r"^[0-9a-f]{12}$")]
    """The number of that job, as `partway job submit` printed it."""


class Job(Settings, frozen=True, kw_only=True):
    """One run of a federation."""

    not_in_file: ClassVar[tuple[str, ...]] = ("columns",)

    job: JobHeader
    network: JobNetwork | None = None
    """One network, cut."""
    networks: dict[Name, SegmentNetwork] = {}
    """Or one for each segment of the plan."""
    holds: dict[Name, Held] = {}
    """Where parties hold different columns of the same patients: who holds what."""
    plan: OwnPlan | None = None
    training: Training = field(default_factory=Training)
    records: JobRecords = field(default_factory=JobRecords)
    evaluation: Evaluation = field(default_factory=Evaluation)
    result: ResultTerms = field(default_factory=ResultTerms)
    predict: Predict | None = None
    """Given, the rest of the job is as in the one that has trained; what it says of training is not read."""
    roster: dict[Name, Fingerprint] = {}
    """The sites, by name and key fingerprint (SHA-256 of the certificate's public key)."""
    columns: Columns | None = None
    """What `[records] schema` names, read: never part of the job file itself. None for `dataset`."""

    @property
    def sites(self) -> tuple[str, ...]:
        return tuple(sorted(self.roster))

    @property
    def configuration(self) -> Configuration:
        """As it was said, or by the number of cuts."""
        both = len(self.cuts) > 1 or "head" in self.networks
        return self.training.configuration or ("u_shaped" if both else "vanilla")

    @property
    def laned(self) -> bool:
        """Each site has patients of its own."""
        if self.plan is not None:
            return any(EACH in (segment.at, segment.copies) for segment in self.plan.segments)
        return self.configuration in LANED

    @property
    def concatenates(self) -> bool:
        """Each record goes through every site's bottom."""
        return self.training.schedule == "half_trained" and self.training.half_trained.bottoms == "concatenated"

    @property
    def embeds(self) -> bool:
        """Each site has a vector of its own in the trunk."""
        return self.training.schedule == "private" and self.training.private.personal == "embedding"

    @property
    def gated(self) -> bool:
        """Each site has chosen by itself between a network of its own and the shared one."""
        return self.training.schedule == "private" and self.training.private.gate

    @property
    def apart(self) -> bool:
        """Each site has a network of its own at the end."""
        return self.training.schedule in ("private", "splitfed_v3")

    @property
    def cuts(self) -> list[str]:
        """Where the network is cut, if it is one."""
        return self.network.cut if self.network is not None else []

    @property
    def skips(self) -> list[tuple[str, str]]:
        """From which segment to which values pass by those between."""
        return [(source, target) for source, _, target in (skip.partition(" -> ") for skip in self.training.skips)]

    @property
    def builds(self) -> tuple[str, ...]:
        """The names of all networks."""
        own = [self.network.build] if self.network is not None else []
        return tuple(dict.fromkeys([*own, *(n.build for n in self.networks.values() if n.build)]))

    @property
    def shipped(self) -> dict[str, str]:
        """Of segments that come as signed folders: the digest."""
        return {name: own.segment for name, own in self.networks.items() if own.segment}

    @property
    def frozen(self) -> list[str]:
        """Segments that are not trained."""
        if self.network is not None:
            return self.network.frozen
        return [name for name, own in self.networks.items() if own.frozen]

    @property
    def weights(self) -> dict[str, str]:
        """Of segments that were trained elsewhere: the digest of the file with their weights."""
        if self.network is not None:
            return self.network.weights
        return {name: own.weights for name, own in self.networks.items() if own.weights}

    @property
    def epochs_at_sites(self) -> int:
        """How often a site's training records are gone through at the site."""
        half = self.training.half_trained
        if self.predict is not None:
            return 1
        if self.training.schedule == "half_trained":
            return half.rounds * half.local_epochs + half.synchronous_epochs
        if self.training.schedule == "private":
            return self.training.private.shared_epochs + self.training.epochs
        return self.training.epochs


def read_job(text: str | bytes, where: str = "the job", schema: str | bytes | None = None) -> Job:
    """A job from TOML. Raises `ConfigError` with the place, and the nearest key for a typing error.

    Args:
        schema: the text of the schema file that `[records] schema` names, if it names a file.
    """
    job = read(text, Job, where)
    _check_parts(job, where, "schedule" in words_of(text, where).get("training", {}))
    schedule, legal = job.training.schedule, LEGAL[job.training.schedule]
    if job.laned and job.configuration not in legal:
        near = f"configuration = `{legal[0]}`, or schedule = `synchronous` in {job.configuration}"
        words = f"{schedule} and {job.configuration} do not go together, for {WHY[schedule]}"
        raise ConfigError(f"{where}: {words}; the nearest that do: {near}")
    half = job.training.half_trained
    if half.bottoms == "concatenated" and half.synchronous_epochs:
        raise ConfigError(
            f"{where}: concatenated bottoms are frozen for good; synchronous_epochs needs one bottom for all"
        )
    if job.training.patience and job.training.keep != "best":
        raise ConfigError(f"{where}: [training] patience needs keep = `best`")
    _check_options(job.training, where)
    _check_private(job, where)
    if job.predict is not None and (job.concatenates or job.gated or job.embeds):
        why = "what a site has chosen, nobody else knows" if job.gated else "its network is not the one that was cut"
        words = f"[predict] is not for this schedule, for {why}; train with [result] trunk = `everyone`, and each"
        raise ConfigError(f"{where}: {words} site predicts by itself")
    if job.evaluation.site_scores and not job.evaluation.trunk_travels:
        raise ConfigError(
            f"{where}: [evaluation] site_scores needs trunk_travels = true, for scores are made at the sites"
        )
    name = job.records.schema
    if name == "dataset":
        return job
    if not name.endswith(".toml"):
        return _with_columns(job, bundled_schema(name, where), where)
    if schema is None:
        raise ConfigError(f"{where}: [records] schema = `{name}` is a file, and only the job's text was given")
    return _with_columns(job, read_schema(schema, name), where)


def _with_columns(job: Job, columns: Columns, where: str) -> Job:
    if columns.schema.unlabelled and not job.laned:
        raise ConfigError(
            f"{where}: [schema] unlabelled is for configurations in which sites have patients of their own"
        )
    for target in [job.records.target, *(target for held in job.holds.values() for target in held.targets)]:
        columns.known(target, where)
    learnt = columns.targets.get(job.records.target)
    if job.training.class_weights != "none" and not isinstance(learnt, ClassesTarget | BinaryTarget | None):
        raise ConfigError(f"{where}: class_weights are for classes, and {job.records.target} has none")
    return msgspec.structs.replace(job, columns=columns)


def _check_parts(job: Job, where: str, scheduled: bool) -> None:
    """What a configuration needs of the job is there, and nothing else."""
    name, training = job.configuration, job.training
    cuts = {"vanilla": 1, "u_shaped": 2, "multi_hop": len(training.hops)}.get(name, 0)
    if job.network is not None and cuts and len(job.cuts) != cuts:
        raise ConfigError(f"{where}: {name} needs {cuts} cut(s), [network] cut names {len(job.cuts)}")
    if (job.network is None) != bool(job.networks) or (job.network is not None and not cuts):
        one = "one [network] that is cut, or " if cuts else ""
        raise ConfigError(f"{where}: {name} needs {one}a network for each segment, [networks.SEGMENT]")
    for segment, own in job.networks.items():
        if bool(own.build) == bool(own.segment) or (own.arguments and not own.build):
            raise ConfigError(
                f"{where}: [networks.{segment}] needs installed code, `build` with its arguments, or a signed folder, "
                "`segment`; and not both"
            )
    for skip in training.skips:
        if skip.count(" -> ") != 1:
            raise ConfigError(f"{where}: [training] skips has `{skip}`; a skip is written as in `bottom -> head`")
    if training.skips and not cuts:
        raise ConfigError(f"{where}: in {name} there is no chain of segments that [training] skips could pass by")
    if training.skips and job.embeds:
        raise ConfigError(f"{where}: [training] skips and personal = `embedding` do not go together")
    if job.networks and job.embeds:
        raise ConfigError(f"{where}: a vector of each site's own, personal = `embedding`, needs one [network]")
    if (name == "plan") != (job.plan is not None):
        raise ConfigError(f"{where}: [plan] belongs to configuration = `plan`, and it to that")
    if job.laned:
        if job.holds:
            raise ConfigError(f"{where}: [holds] is for parties with different columns; in {name} each site has all")
        return
    if scheduled:
        raise ConfigError(f"{where}: in {name} every party has a part in every step, so there is no schedule to choose")
    if training.semi_supervised.alpha:
        raise ConfigError(f"{where}: semi_supervised is for configurations in which sites have patients of their own")
    if job.records.target:
        raise ConfigError(f"{where}: in {name} [holds.PARTY] targets says what is learnt, and not [records] target")
    if training.class_weights != "none":
        raise ConfigError(f"{where}: class_weights are for configurations in which sites have patients of their own")
    if name != "plan" and not any(held.targets for held in job.holds.values()):
        raise ConfigError(f"{where}: {name} needs who holds the labels: [holds.PARTY] targets")
    if name == "extended_vanilla" and not training.middle:
        raise ConfigError(f"{where}: extended_vanilla needs the site where the outputs meet: [training] middle")


def _check_private(job: Job, where: str) -> None:
    """What stands against what a site has of its own."""
    if job.apart and job.result.bottom == "everyone":
        own = f"in {job.training.schedule}: each site has its own"
        raise ConfigError(f"{where}: [result] bottom = `everyone` has no meaning {own}")
    if job.training.schedule != "private":
        return
    here, terms = f"{where}: [training.private]", job.training.private
    if terms.gate and not terms.shared_epochs:
        words = "gate compares with the network of shared_epochs, and there are none; take some, or gate = false"
        raise ConfigError(f"{here} {words}")
    if terms.gate and not job.evaluation.trunk_travels:
        raise ConfigError(f"{here} gate needs [evaluation] trunk_travels = true, for each site judges at home")


def _check_options(training: Training, where: str) -> None:
    rate = training.rate
    here = f"{where}: [training.rate]"
    if (rate.then == "steps") != bool(rate.milestones):
        raise ConfigError(f"{here} milestones and then = `steps` go together")
    if list(rate.milestones) != sorted({*rate.milestones}) or min(rate.milestones, default=rate.warm_up) < rate.warm_up:
        raise ConfigError(f"{here} milestones rise, and none is within warm_up")
    if rate.final and rate.then not in ("cosine", "linear"):
        raise ConfigError(f"{here} final is of `cosine` and `linear`; then is `{rate.then}`")
    if training.precision != "full" and training.dtype != "float32":
        raise ConfigError(f"{where}: [training] precision = `{training.precision}` needs dtype = `float32`")
    batch = max(training.batch, training.half_trained.batch if training.schedule == "half_trained" else 0)
    if 0 < training.micro_batch < (least := -(-batch // MOST_MICRO_BATCHES)):
        raise ConfigError(f"{where}: [training] micro_batch must be {least} or more for a batch of {batch}")


MOST_MICRO_BATCHES = 32
"""In a step: what a party must know of a step grows with their square."""


def job_texts(path: Path) -> tuple[bytes, bytes | None]:
    """A job file's text, and that of the schema file beside it, if it names one."""
    text = contents(path, ConfigError)
    name = read(text, Job, str(path)).records.schema
    return text, contents(path.parent / name, ConfigError) if name.endswith(".toml") else None


def read_job_file(path: Path) -> Job:
    """A job, with the schema file beside it."""
    text, schema = job_texts(path)
    return read_job(text, str(path), schema)
