"""Partway's schedules beside their alternatives: the same records, network, budget rule and validation rule for all.

Learning rates are chosen on a seed of their own and by validation records alone, three for every method. `synchronous`
is pooled training (promise 1), so its rate is the pooled one's; what its search would have cost it is told as its own.
"""

from __future__ import annotations

import copy
import math
import multiprocessing
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import torch
from torch import Tensor, nn

from partway.assembly import forecast_of, network_of
from partway.config import Evaluation, Job, Optimizer, ResultTerms, Training, of_any_size
from partway.cost import Cost
from partway.data.records import Records, Schema
from partway.report import Result
from partway.simulation import simulate
from partway.train.baselines import Task, Trained
from partway.train.metrics import Scores
from partway.train.scoring import value
from partway.train.tuning import METHODS, TRIED, Tuned, total, tuned

TITLES = {
    "alone": "alone",
    "half_trained": "half-trained",
    "split": "synchronous",
    "u_shaped": "synchronous, U-shaped",
    "pooled": "pooled",
    "fedavg": "federated averaging",
    "large_batch_sgd": "large batch",
}
"""Every method, in the order in which they are shown."""
OURS = {"half_trained": "half_trained", "split": "pooled", "u_shaped": "pooled"}
"""Those that Partway runs, and the plain loop by which the learning rate of each is chosen."""
FEDAVG = tuple(name for name in METHODS if name.startswith("fedavg"))
TUNED_ON = 100
"""The seed by which learning rates are chosen; its test records are not looked at."""
FIGURES = ("accuracy", "balanced_accuracy", "macro_auc")
T = TypeVar("T")


def job_of(base: Job, method: str, rate: float, seed: int) -> Job:
    """The job by which Partway runs one of its methods on the network and records of another job.

    Args:
        base: says which network and records; with two cuts if `u_shaped` is asked for.
    """
    u_shaped, like = method == "u_shaped", METHODS[OURS[method]]
    training = Training(
        schedule="half_trained" if method == "half_trained" else "synchronous",
        epochs=like.budget,
        batch=like.batch,
        optimizer=Optimizer(name="adam", lr=rate),
    )
    assert base.network is not None
    cut = base.cuts if u_shaped else base.cuts[:1]
    return msgspec.structs.replace(
        base,
        job=msgspec.structs.replace(base.job, seed=seed),
        network=msgspec.structs.replace(base.network, cut=cut),
        training=training,
        evaluation=Evaluation(every=1, site_scores=True),
        result=ResultTerms(bottom="sites", trunk="everyone"),
        roster={},
    )


def trained_of(result: Result) -> Trained:
    """What `simulate` has come to, as a method of the comparison."""
    sites = {site: Scores(**scores) for site, scores in sorted(result.sites.items())}
    looks = [value(_scores(row)) for row in result.validation]
    return Trained(
        scores=sites,
        everybody=dict.fromkeys(sites, Scores(**result.all)),
        validation=dict.fromkeys(sites, looks),
        kept=dict.fromkeys(sites, 1 + looks.index(max(looks)) if looks else 0),
        losses=result.losses,
        cost={site: result.cost[site] for site in sites},
    )


def details_of(result: Result) -> dict[str, Any]:
    """What was run, for the record: the job, who does and holds what, and the heads of all ledgers."""
    return {"job": result.job, "plan": result.plan, "holds": result.holds, "ledgers": result.ledgers}


def _scores(row: Mapping[str, Any]) -> Scores:
    return Scores(**{name: number for name, number in row.items() if name != "epoch"})


@dataclass
class Comparison:
    """All that was found of every method."""

    base: Job
    dataset: str
    seeds: list[int]
    schema: Schema
    sizes: dict[str, dict[str, int]]
    """Of each site, in each part."""
    runs: dict[str, list[Trained]] = field(default_factory=dict)
    """By method, one a seed; of federated averaging each variant by itself."""
    tuning: dict[str, Tuned] = field(default_factory=dict)
    """By plain loop."""
    details: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    """Of Partway's methods, one a seed."""
    marked: dict[str, list[Trained]] = field(default_factory=dict)
    """Plain loops on the same records, scaled by reference ranges with marks; one a seed."""

    def add(self, method: str, trained: Trained, details: dict[str, Any] | None = None) -> None:
        """One more seed of a method."""
        self.runs.setdefault(method, []).append(trained)
        if details is not None:
            self.details.setdefault(method, []).append(details)

    @property
    def methods(self) -> list[str]:
        """Those that were run, in the order in which they are shown."""
        return [m for m in TITLES if self.name_of(m) in self.runs]

    def name_of(self, method: str) -> str:
        """The run behind a row: of federated averaging the variant that did best on the tuning seed's validation."""
        if method != "fedavg" or not self.tuning:
            return method
        return max(FEDAVG, key=lambda name: max(self.tuning[name].validation.values()))

    def of(self, method: str) -> list[Trained]:
        """A method's runs, one a seed."""
        return self.runs[self.name_of(method)]

    def rate(self, method: str) -> float:
        """The learning rate that was chosen for a method."""
        return self.tuning[OURS.get(method, self.name_of(method))].rate

    def search(self, method: str) -> dict[str, Cost]:
        """What it took to find it, by site."""
        if method not in OURS:
            return self.tuning[self.name_of(method)].cost
        like = METHODS[OURS[method]]
        job = job_of(self.base, method, self.rate(method), TUNED_ON)
        tried = msgspec.structs.replace(job.training, epochs=math.ceil(TRIED * like.budget))
        costs = forecast_of(msgspec.structs.replace(job, training=tried), self.schema, self.sizes)
        return {site: total([costs[site]] * len(like.rates)) for site in self.sizes}

    # -- figures

    def own(self, method: str, figure: str, site: str = "", without: Sequence[str] = ()) -> list[float | None]:
        """On sites' own test records, one a seed: of one site, or the mean over all of which it can be told."""

        def chosen(run: Trained) -> list[str]:
            return [site] if site else [s for s in run.scores if s not in without]

        return [mean(getattr(run.scores[s], figure) for s in chosen(run)) for run in self.of(method)]

    def everybody(self, method: str, figure: str) -> list[float | None]:
        """On all sites' test records, the mean over the models that sites hold, one a seed."""
        return [mean(getattr(s, figure) for s in run.everybody.values()) for run in self.of(method)]

    def everybody_marked(self, name: str, figure: str) -> list[float | None]:
        """The same of a plain loop with marks."""
        return [mean(getattr(s, figure) for s in run.everybody.values()) for run in self.marked[name]]

    def cost(self, method: str) -> dict[str, Cost]:
        """Of one run, by site: the mean over seeds."""
        runs = [run.cost for run in self.of(method)]
        return {site: mean_cost([cost[site] for cost in runs]) for site in runs[0]}

    def raw(self) -> dict[str, int]:
        """Bytes of each site's training and validation records, sent once as they are."""
        return {site: cost.bytes_up for site, cost in self.cost("pooled").items()}

    def words(self) -> dict[str, Any]:
        """Plain data, for `--json` and `result.json`."""
        variants = [name for name in FEDAVG if name in self.runs]
        return {
            "dataset": self.dataset,
            "seeds": self.seeds,
            "sites": {site: {"records": sum(parts.values()), **parts} for site, parts in self.sizes.items()},
            "methods": {method: self._words_of(method) for method in self.methods},
            "fedavg_variants": {name: {f: self.everybody(name, f) for f in FIGURES} for name in variants},
            "cost": {m: {s: asdict(c) for s, c in self.cost(m).items()} for m in self.methods},
            "tuning": {
                m: {"rate": self.rate(m), "cost": {s: asdict(c) for s, c in self.search(m).items()}}
                for m in self.methods
            },
            "encodings": {
                scale: {name: {f: by(name, f) for f in FIGURES} for name in self.marked}
                for scale, by in (("statistics", self.everybody), ("marks", self.everybody_marked))
            },
            "runs": self.details,
            "raw_bytes": self.raw() if "pooled" in self.runs else {},
            "losses": {m: [list(map(float, run.losses)) for run in self.of(m)] for m in self.methods},
            "validation": {
                m: [{site: list(looks) for site, looks in run.validation.items()} for run in self.of(m)]
                for m in self.methods
            },
        }

    def _words_of(self, method: str) -> dict[str, Any]:
        runs = self.of(method)
        return {
            "title": TITLES[method],
            "run": self.name_of(method),
            "sites": {site: _lists([run.scores[site] for run in runs]) for site in runs[0].scores},
            "everybody": {f: self.everybody(method, f) for f in FIGURES},
            "everybody_by_site": {site: _lists([run.everybody[site] for run in runs]) for site in runs[0].everybody}
            if method == "alone"
            else {},
            "mean": {f: self.own(method, f) for f in FIGURES},
            "kept": [dict(run.kept) for run in runs],
        }


def mean(values: Iterable[float | None]) -> float | None:
    """Of what is known; None if nothing is.

    >>> mean([0.5, None]), mean([None])
    (0.5, None)
    """
    known = [v for v in values if v is not None]
    return statistics.mean(known) if known else None


def _lists(rows: Sequence[Scores]) -> dict[str, list[Any]]:
    names = ("records", *FIGURES, "classes")
    return {name: [getattr(row, name) for row in rows] for name in names}


def mean_cost(costs: Sequence[Cost]) -> Cost:
    """The mean of several runs' costs, rounded.

    >>> mean_cost([Cost(flops=1), Cost(flops=4)])
    Cost(flops=2, bytes_up=0, bytes_down=0, exchanges=0)
    """
    summed = asdict(total(costs))
    return Cost(**{name: round(number / len(costs)) for name, number in summed.items()})


# -- plain loops, in processes of their own


def workers() -> ProcessPoolExecutor:
    """Two processes for plain loops: each computes with one thread. To be used as a context."""
    return ProcessPoolExecutor(2, multiprocessing.get_context("spawn"), torch.set_num_threads, (1,))


def tune(
    pool: ProcessPoolExecutor, base: Job, records: Mapping[str, Records], names: Iterable[str] = tuple(METHODS)
) -> Iterator[tuple[str, Tuned]]:
    """The learning rate of each plain loop, as they are found; `records` are divided by `TUNED_ON`."""
    yield from _as_they_end({pool.submit(_tune, base, records, name): name for name in names})


def alternatives(
    pool: ProcessPoolExecutor, base: Job, records: Mapping[str, Records], rates: Mapping[str, float], seed: int
) -> Iterator[tuple[str, Trained]]:
    """Every plain loop named, at its rate, as they end."""
    runs = {pool.submit(_run, base, records, name, rate, seed): name for name, rate in rates.items()}
    yield from _as_they_end(runs)


def ours(
    pool: ProcessPoolExecutor,
    base: Job,
    records: Mapping[str, Records],
    rates: Mapping[str, float],
    seed: int,
    folder: Path,
) -> Iterator[tuple[str, tuple[Trained, dict[str, Any]]]]:
    """Partway's methods named, each at its rate and in one process, as they end, with their details.

    Args:
        folder: each leaves its result, network and ledgers in a folder of its name here.
    """
    jobs = {method: job_of(base, method, rate, seed) for method, rate in rates.items()}
    runs = {pool.submit(_simulate, job, records, folder / method): method for method, job in jobs.items()}
    yield from _as_they_end(runs)


def _as_they_end(futures: Mapping[Future[T], str]) -> Iterator[tuple[str, T]]:
    for future in as_completed(futures):
        yield futures[future], future.result()


def _task(base: Job, records: Mapping[str, Records], seed: int) -> Task:
    job = job_of(base, "split", 1.0, seed)
    allowed = of_any_size(job.builds)
    schema = next(iter(records.values())).schema
    binary = schema.target().kind == "binary"

    def build() -> list[nn.Module]:
        *first, last = network_of(job, allowed, schema).modules.values()
        return [*first, nn.Sequential(last, _TwoClasses())] if binary else [*first, last]

    given = {site: _of_two_classes(own) for site, own in records.items()} if binary else records
    return Task(build=build, records=given, seed=seed)


class _TwoClasses(nn.Module):
    """The plain loops know classes: the log-odds of yes as logits of no and yes, by which the loss is the same."""

    def forward(self, odds: Tensor) -> Tensor:
        return torch.cat([torch.zeros_like(odds), odds], 1)


def _of_two_classes(records: Records) -> Records:
    """The same records, with no and yes as classes."""
    found = copy.copy(records)
    found.labels, found.schema = records.labels.long(), replace(records.schema, classes=2, targets=())
    return found


def _tune(base: Job, records: Mapping[str, Records], name: str) -> Tuned:
    return tuned(METHODS[name], [_task(base, records, TUNED_ON)])


def _run(base: Job, records: Mapping[str, Records], name: str, rate: float, seed: int) -> Trained:
    return METHODS[name].run(_task(base, records, seed), METHODS[name], rate)


def _simulate(job: Job, records: Mapping[str, Records], folder: Path) -> tuple[Trained, dict[str, Any]]:
    result = simulate(job, records, folder=folder)
    return trained_of(result), details_of(result)
