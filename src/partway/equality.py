"""What a run must equal: plain PyTorch on the same records in the same order, from the same first weights.

Only who has every party's secret can run it: tests and the demo, where one person is everybody. Nothing of the
protocol runs here: no turns are walked by parties, nothing is masked, sent or summed over copies.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from partway.assembly import Parts, network_of, optimizer_of, plan_of
from partway.blueprint import DTYPES
from partway.config import Job, of_any_size
from partway.data.records import Records, Target, statistics_of
from partway.errors import UsageError
from partway.model.segment import initialise
from partway.plan.batches import equal_parts, union_batches
from partway.plan.phases import LOCAL_HEAD, at_sites
from partway.plan.plan import Part
from partway.train import scoring
from partway.train.draws import first_weights, order_of
from partway.train.source import RecordSource
from partway.train.stopping import Best, Verdict
from partway.train.tallies import class_weights
from partway.train.targets import Loss, loss_of

Rows = tuple[Tensor, Tensor]
"""Features or activations (n, ...), and labels (n,)."""


def plain_run(
    job: Job,
    digest: bytes,
    secrets: Mapping[str, bytes],
    records: Mapping[str, Records],
    *,
    server: str = "server",
    other_order: bool = False,
) -> tuple[nn.Module, list[float]]:
    """The network that the job's schedule comes to, and the loss of each step of training together.

    `synchronous`: one loop over union batches of pooled records. `half_trained`: a model a site, averaged; then the
    trunk on what the averaged bottom makes of all records.

    Of the options of training it knows weight decay, class weights and early stopping; the others stand beside loops of
    their own, in `tests/equivalence`.

    Args:
        digest: of the signed job; what is drawn depends on it.
        secrets: of every party.
        records: by site.
        other_order: draws the records' order from other secrets: the control that must differ.
    """
    averaged = job.training.half_trained.bottoms == "averaged"
    if job.training.semi_supervised.alpha or not (
        job.training.schedule == "synchronous" or (job.training.schedule == "half_trained" and averaged)
    ):
        raise UsageError("here are loops of synchronous and half_trained with averaged bottoms; see tests/equivalence")
    known = dict.fromkeys(secrets, bytes(32)) if other_order else secrets
    plain = _Plain(job, digest, known, records, server)
    for name, module in plain.network.modules.items():
        owner = job.sites[0] if name in plain.at_sites else server
        initialise(module, first_weights(secrets[owner], digest, name))
    if job.training.schedule == "half_trained":
        plain.half_trained()
    else:
        plain.together(0, job.training.epochs)
    return plain.network.whole.eval(), plain.losses


class _Plain:
    """All records in one place."""

    def __init__(
        self, job: Job, digest: bytes, secrets: Mapping[str, bytes], records: Mapping[str, Records], server: str
    ) -> None:
        self.job, self.digest, self.secrets, self.records, self.server = job, digest, secrets, records, server
        allowed = of_any_size(job.builds)
        schema = next(iter(records.values())).schema
        self.network: Parts = network_of(job, allowed, schema)
        plan, _ = plan_of(job, server)
        self.at_sites = (*at_sites(plan), LOCAL_HEAD)
        self.losses: list[float] = []
        dtype = DTYPES[job.training.dtype]
        sources = {site: RecordSource(records[site], b"", b"", dtype) for site in job.sites}
        standardise_together(list(sources.values()))
        self.weights: Tensor | None = None
        self.target, self.loss = schema.target(), loss_of(schema.target())
        if job.training.class_weights == "sqrt":
            labels = torch.cat([own.labels[own.division["train"]] for own in records.values()])
            weights = class_weights(torch.bincount(labels.long(), minlength=self.target.classes)).to(dtype)
            self.weights, self.loss = weights, loss_of(self.target, lambda: weights)
        self.features = {site: source.features for site, source in sources.items()}

    def rows(self, site: str, part: Part, epoch: int) -> Rows:
        """A site's records in its own order of an epoch."""
        index = self.records[site].division[part]
        index = index[order_of(len(index), self.secrets[site], self.digest, epoch)]
        return self.features[site][index], self.records[site].labels[index]

    def all_rows(self, part: Part, epoch: int) -> Rows:
        return _join([self.rows(site, part, epoch) for site in self.job.sites])

    def union_batches(self, epoch: int) -> Iterator[Rows]:
        """What pooling would have trained on."""
        rows = {site: self.rows(site, "train", epoch) for site in self.job.sites}
        sizes = {site: len(y) for site, (_, y) in rows.items()}
        for batch in union_batches(sizes, self.job.training.batch, self.job.job.seed, epoch):
            chosen = {site: slice(o, o + batch.rows[site]) for site, o in batch.offsets.items() if batch.rows[site]}
            yield _join([(rows[site][0][where], rows[site][1][where]) for site, where in chosen.items()])

    # -- the schedules

    def together(self, start: int, epochs: int) -> None:
        """One network, one optimiser, union batches."""
        whole, training = self.network.whole, self.job.training
        optimizer = optimizer_of(training.optimizer)(list(whole.parameters()))
        looks = Looks(self.job, whole, self.target)
        for epoch in range(start, start + epochs):
            self.losses += [step(whole, optimizer, batch, self.loss) for batch in self.union_batches(epoch)]
            rows = [self.rows(site, "validation", 0) for site in self.job.sites]
            if self.job.evaluation.trunk_travels and looks.stop(epoch - start, whole, rows):
                break
        looks.restore()

    def half_trained(self) -> None:
        """Phase 1 at the sites, phase 2 on what they release, and epochs together."""
        half, modules = self.job.training.half_trained, self.network.modules
        own = nn.Sequential(modules["bottom"], modules[LOCAL_HEAD])
        epoch = 0
        for _ in range(half.rounds):
            mine = {site: copy.deepcopy(own) for site in self.job.sites}
            for site, network in mine.items():
                made = optimizer_of(half.optimizer)(list(network.parameters()))
                for e in range(epoch, epoch + half.local_epochs):
                    for batch in cut_up(self.rows(site, "train", e), half.batch):
                        step(network, made, batch, self.loss)
            sizes = {site: self.records[site].sizes["train"] for site in mine}
            averaged = {name: 0 * weight for name, weight in own.state_dict().items()}
            for site, network in mine.items():
                for name, weight in network.state_dict().items():
                    averaged[name] += sizes[site] / sum(sizes.values()) * weight
            own.load_state_dict(averaged)
            epoch += half.local_epochs
        epoch = self.finish(epoch)
        self.together(epoch, half.synchronous_epochs)

    def finish(self, start: int) -> int:
        """The trunk, on what the bottom makes of every record once; returns the epoch that comes next."""
        training, trunk = self.job.training, self.network.modules["trunk"]
        with torch.no_grad():
            released = {p: self.all_rows(p, start) for p in ("train", "validation")}
            held = {p: (self.network.modules["bottom"](x), y) for p, (x, y) in released.items()}
        made, looks = optimizer_of(training.optimizer)(list(trunk.parameters())), Looks(self.job, trunk, self.target)
        x, y = held["train"]
        for epoch in range(start, start + training.epochs):
            order = order_of(len(y), self.secrets[self.server], self.digest, epoch)
            self.losses += [
                step(trunk, made, batch, self.loss) for batch in cut_up((x[order], y[order]), training.batch)
            ]
            if looks.stop(epoch - start, trunk, [held["validation"]]):
                break
        looks.restore()
        return start + training.epochs


class Looks:
    """Evaluations on validation rows, as a job has them."""

    def __init__(self, job: Job, network: nn.Module, target: Target) -> None:
        self._every, self._keeps = job.evaluation.every, job.training.keep == "best"
        self._rule, self._network = Best(job.training.patience), network
        self._target = target
        self._best: dict[str, Tensor] | None = None

    def stop(self, epoch: int, network: nn.Module, rows: Sequence[Rows]) -> bool:
        """After an epoch, counted from 0: whether training stops here, by what each has counted over its rows."""
        if not (self._every and self._keeps and (epoch + 1) % self._every == 0):
            return False
        network.eval()
        with torch.no_grad():
            counts = torch.stack([scoring.counts(self._target, network(x), y) for x, y in rows if len(y)])
        verdict = self._rule.look(scoring.from_counts(self._target, counts.sum(0)))
        if verdict is Verdict.KEEP:
            self._best = copy.deepcopy(network.state_dict())
        return verdict is Verdict.STOP

    def restore(self) -> None:
        if self._best is not None:
            self._network.load_state_dict(self._best)


def step(network: nn.Module, optimizer: torch.optim.Optimizer, batch: Rows, summed: Loss) -> float:
    """The loss over a batch, a sum over its records, divided by them; backward, update."""
    network.train()
    optimizer.zero_grad()
    loss = summed(network(batch[0]), batch[1]) / len(batch[1])
    loss.backward()  # type: ignore[no-untyped-call]
    optimizer.step()
    return float(loss.detach())


def cut_up(rows: Rows, batch: int) -> Iterator[Rows]:
    """Batches as equal as can be and no larger than `batch`."""
    for begin, end in equal_parts(len(rows[1]), batch):
        yield rows[0][begin:end], rows[1][begin:end]


def _join(rows: Sequence[Rows]) -> Rows:
    return torch.cat([x for x, _ in rows]), torch.cat([y for _, y in rows])


def standardise_together(sources: list[RecordSource]) -> None:
    """What pooling would do: statistics of all training records in one pass over them."""
    if not sources[0].records.schema.numeric:
        return
    mean, deviation = statistics_of(source.records for source in sources)
    for source in sources:
        source.standardise(mean, deviation)
