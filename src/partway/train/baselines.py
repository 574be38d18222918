"""Plain loops to compare with: pooled records in one place, and each site alone. Nothing of the protocol runs here."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from partway.data.records import Records, deviation_of, mean_of, moments, squares
from partway.plan.plan import Turn
from partway.train import metrics
from partway.train.metrics import Scores

OptimizerOf = Callable[[list[nn.Parameter]], torch.optim.Optimizer]
Batches = Iterable[tuple[Tensor, Tensor]]
"""Features (n, ...) and labels (n,) of one step after another."""


@dataclass(frozen=True, kw_only=True)
class Task:
    """What every method trains: the same network, settings and records."""

    build: Callable[[], nn.Module]
    """Draws first weights from torch's own generator."""
    optimizer: OptimizerOf
    epochs: int
    records: Mapping[str, Records]
    """By site."""


@dataclass(frozen=True, kw_only=True)
class Trained:
    """What a method has come to."""

    scores: Mapping[str, Scores]
    """On each site's own test records."""
    losses: Sequence[float]
    """Of each step; empty where several networks were trained."""


def pooled(task: Task, batch: int, seed: int) -> Trained:
    """One network on all sites' training records in one place, standardised together."""
    features = scaled_together(task.records)
    rows = [training(records, features[site]) for site, records in task.records.items()]
    x, y = torch.cat([x for x, _ in rows]), torch.cat([y for _, y in rows])
    network, losses = _fit(task, x, y, batch, seed)
    scores = {site: tested(network, records, features[site]) for site, records in task.records.items()}
    return Trained(scores=scores, losses=losses)


def alone(task: Task, batch: int, seed: int) -> Trained:
    """A network for each site, on its own training records, standardised by its own statistics."""
    scores = {}
    for site, records in task.records.items():
        features = scaled_together({site: records})[site]
        network, _ = _fit(task, *training(records, features), batch, seed)
        scores[site] = tested(network, records, features)
    return Trained(scores=scores, losses=[])


def _fit(task: Task, features: Tensor, labels: Tensor, batch: int, seed: int) -> tuple[nn.Module, list[float]]:
    torch.manual_seed(seed)
    network = task.build()
    batches = shuffled_batches(features, labels, batch, task.epochs, seed)
    return network, train(network, task.optimizer, batches)


def scaled_together(records: Mapping[str, Records]) -> dict[str, Tensor]:
    """All features of each site in float32, standardised by the training records of all these sites."""
    known = torch.cat([r.features[r.division["train"]][:, r.numeric] for r in records.values()])
    measured, mean = mean_of(moments(known))
    deviation = deviation_of(measured, squares(known, mean))
    return {site: r.scaled(mean, deviation).float() for site, r in records.items()}


def training(records: Records, features: Tensor) -> tuple[Tensor, Tensor]:
    """Features and labels of a site's training records."""
    index = records.division["train"]
    return features[index], records.labels[index]


def tested(network: nn.Module, records: Records, features: Tensor) -> Scores:
    """Scores on a site's test records."""
    index = records.division["test"]
    with torch.no_grad():
        return metrics.scores(network(features[index]), records.labels[index])


# -- loops


def train(network: nn.Module, optimizer: OptimizerOf, batches: Batches) -> list[float]:
    """The loop that every reader knows: zero the gradients, mean loss over the batch, backward, step.

    Trains `network` in place, and leaves it in evaluation mode. Returns the loss of each step.
    """
    made, losses = optimizer(list(network.parameters())), []
    network.train()
    for features, labels in batches:
        made.zero_grad()
        loss = nn.functional.cross_entropy(network(features), labels)
        loss.backward()  # type: ignore[no-untyped-call]
        made.step()
        losses.append(loss.detach())
    network.eval()
    return [float(loss) for loss in losses]


def shuffled_batches(
    features: Tensor, labels: Tensor, batch: int, epochs: int, seed: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """All records in each epoch, reshuffled, in batches as equal as can be and no larger than `batch`."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        order = torch.randperm(len(labels), generator=generator)
        for index in order.tensor_split(-(-len(labels) // batch)):
            yield features[index], labels[index]


def union_batches(
    turns: Sequence[Turn], sites: Sequence[str], take: Mapping[str, Callable[[Turn, int, int], tuple[Tensor, Tensor]]]
) -> Iterator[tuple[Tensor, Tensor]]:
    """The very records of a split run, in its order, as one batch: what pooling would have trained on.

    Args:
        turns: of the split run; only its training steps are used.
        take: by site, (turn, offset, rows) -> features and labels.
    """
    for turn in turns:
        if turn.train:
            rows, offsets = turn.rows[0], turn.offsets[0]
            parts = [take[site](turn, offsets[site], rows[site]) for site in sites if rows.get(site)]
            yield torch.cat([x for x, _ in parts]), torch.cat([y for _, y in parts])
