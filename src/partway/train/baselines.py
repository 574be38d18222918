"""Alternatives to split learning as plain loops over the same records; nothing of the protocol runs here.

Every method is a function (task, method, rate) -> `Trained`. All start from the same first weights, look at the same
validation records after each epoch or round, spend their whole budget and keep the weights of the best look. So no row
of a table has an early stop that another one lacks.

Costs are a site's, by formula. Looks are counted: the validation records' forward, and `metrics.counts` in float64
where a look needs other sites. Not counted are scores on the test records, and the sums from which sites standardise
together: three float64 numbers a numeric column, once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from partway.cost import Cost
from partway.data.records import Records, Schema, statistics_of
from partway.errors import UsageError
from partway.plan.plan import Part
from partway.shapes import Piece, measure
from partway.train import metrics
from partway.train.metrics import Scores
from partway.train.scoring import value
from partway.train.stopping import Best, Verdict

OptimizerOf = Callable[[list[nn.Parameter]], torch.optim.Optimizer]
Rows = tuple[Tensor, Tensor]
"""Features (n, ...) and labels (n,)."""
FLOAT, COUNT, LABEL = 4, 8, 8
"""Bytes of a weight, gradient, feature or activation in float32; of a count in float64; of a label in int64."""
LOCAL_RATE = 0.03
"""Learning rate of a half-trained bottom at its site, by SGD with momentum; `Method.rates` are the trunk's."""


@dataclass(frozen=True, kw_only=True)
class Task:
    """What every method trains: the same network on the same records. One for each seed."""

    build: Callable[[], Iterable[nn.Module]]
    """The network's pieces in order, on the CPU, in float32; draws first weights from torch's own generator."""
    records: Mapping[str, Records]
    """By site."""
    seed: int
    """Of the first weights and of the records' order."""


@dataclass(frozen=True, kw_only=True)
class Method:
    """How to train, as data."""

    run: Callable[[Task, Method, float], Trained]
    optimizer: Callable[[list[nn.Parameter], float], torch.optim.Optimizer]
    """From parameters and a learning rate."""
    rates: tuple[float, ...]
    """Learning rates to choose from; as many for every method."""
    budget: int
    """Looks: epochs over the records, or rounds."""
    batch: int
    """Records a step, at most."""
    local_epochs: int = 1
    """In a round, where weights are averaged."""
    rounds: int = 0
    """Before half-trained bottoms are frozen."""

    def at(self, rate: float) -> OptimizerOf:
        """The optimiser with a learning rate."""
        return lambda parameters: self.optimizer(parameters, rate)


@dataclass(frozen=True, kw_only=True)
class Trained:
    """What a method has come to, by site: the same network at each, or its own."""

    scores: Mapping[str, Scores]
    """On the site's own test records."""
    everybody: Mapping[str, Scores]
    """On all sites' test records, of the network that this site holds."""
    validation: Mapping[str, Sequence[float]]
    """`stopping.value` at each look at the validation records: all sites', or its own where it trains alone."""
    kept: Mapping[str, int]
    """Which look's weights are kept, from 1."""
    losses: Sequence[float]
    """Of each step; empty where several networks were trained."""
    cost: Mapping[str, Cost]


def adam(parameters: list[nn.Parameter], rate: float) -> torch.optim.Optimizer:
    """Kingma and Ba 2015, arXiv:1412.6980."""
    return torch.optim.Adam(parameters, rate, fused=True)


def momentum(parameters: list[nn.Parameter], rate: float) -> torch.optim.Optimizer:
    """SGD with momentum 0.9."""
    return torch.optim.SGD(parameters, rate, momentum=0.9, fused=True)


# -- methods


def pooled(task: Task, method: Method, rate: float) -> Trained:
    """One network on all sites' records in one place, standardised together.

    Training and validation records cross once, and nothing is computed at a site.
    """
    features = scaled_together(task.records)
    network = nn.Sequential(*_drawn(task))
    epochs = epochs_of(network, method.at(rate), rows(task.records, features, "train"), method, task.seed)
    looks = best_of(network, epochs, rows(task.records, features, "validation"), _schema(task).classes)
    cost = {}
    for site, own in task.records.items():
        record = FLOAT * math.prod(own.schema.shape) + LABEL
        cost[site] = Cost(bytes_up=(own.sizes["train"] + own.sizes["validation"]) * record, exchanges=1)
    return _shared(task, features, network, looks, cost)


def alone(task: Task, method: Method, rate: float) -> Trained:
    """A network for each site, on its own records, standardised by its own statistics; nothing is sent.

    For a site's scores on everybody's records these are standardised by that site's statistics too.
    """
    scores, everybody, validation, kept, cost = {}, {}, {}, {}, {}
    for site, own in task.records.items():
        mean, deviation = statistics_of([own])
        features = {name: r.scaled(mean, deviation).float() for name, r in task.records.items()}
        network = nn.Sequential(*_drawn(task))
        epochs = epochs_of(network, method.at(rate), rows({site: own}, features, "train"), method, task.seed)
        looks = best_of(network, epochs, rows({site: own}, features, "validation"), _schema(task).classes)
        by_site, everybody[site] = tested(network, task.records, features)
        scores[site], validation[site], kept[site] = by_site[site], looks.values, looks.kept
        cost[site] = Cost(flops=_flops(measured(network, task), own, method.budget, method.budget))
    return Trained(scores=scores, everybody=everybody, validation=validation, kept=kept, losses=[], cost=cost)


def federated(task: Task, method: Method, rate: float) -> Trained:
    """Federated averaging (`rounds_of`), standardised together.

    In each round the network crosses both ways. The average is looked at by the sites, whose counts go up with it.
    """
    features = scaled_together(task.records)
    network, sites = nn.Sequential(*_drawn(task)), _by_site(task, features)
    rounds = rounds_of(network, method.at(rate), sites, method, method.budget, task.seed)
    looks = best_of(network, rounds, rows(task.records, features, "validation"), _schema(task).classes)
    pieces = measured(network, task)
    size = _bytes(pieces)
    cost = {
        site: Cost(
            flops=_flops(pieces, own, method.budget * method.local_epochs, method.budget),
            bytes_up=method.budget * (size + _counts(task)),
            bytes_down=method.budget * size,
            exchanges=method.budget,
        )
        for site, own in task.records.items()
    }
    return _shared(task, features, network, looks, cost)


def large_batch(task: Task, method: Method, rate: float) -> Trained:
    """Synchronous SGD on union batches: each step sums the gradients of whole networks at the sites.

    The mean loss over a union batch has as gradient the sum of what each site's records add to it, so this is `pooled`
    with that batch (Chen et al. 2016, arXiv:1604.00981, without backup workers). Only the cost is another one: in each
    step the site's gradient goes up and the total comes down.
    """
    pieces = measured(_drawn(task), task)
    size = _bytes(pieces)
    steps = method.budget * -(-sum(own.sizes["train"] for own in task.records.values()) // method.batch)
    cost = {
        site: Cost(
            flops=_flops(pieces, own, method.budget, method.budget),
            bytes_up=steps * size + method.budget * _counts(task),
            bytes_down=steps * size,
            exchanges=steps,
        )
        for site, own in task.records.items()
    }
    return replace(pooled(task, method, rate), cost=cost)


def half_trained(task: Task, method: Method, rate: float) -> Trained:
    """Bottoms trained partway at the sites and averaged, then frozen; then a trunk on what they make of the records.

    First `method.rounds` rounds of federated averaging of the bottom with a linear head, each `method.local_epochs`
    epochs at `LOCAL_RATE`; then every site releases its training and validation records' activations once, and the
    trunk is trained on them like a pooled network, by `method`. It comes down once, at the end.

    Raises:
        UsageError: the task's network has not two pieces.
    """
    drawn = _drawn(task)
    if len(drawn) != 2:
        raise UsageError(f"half_trained needs a bottom and a trunk, not {len(drawn)} pieces; cut the network once")
    bottom, trunk = drawn
    features = scaled_together(task.records)
    at_site, at_server = measured(drawn, task)
    head = nn.Sequential(nn.ReLU(), nn.Flatten(), nn.Linear(at_site.width, _schema(task).classes))
    local = nn.Sequential(bottom, head)
    first = rounds_of(
        local,
        lambda parameters: momentum(parameters, LOCAL_RATE),
        _by_site(task, features),
        method,
        method.rounds,
        task.seed,
    )
    for _ in first:
        pass
    bottom.eval()
    with torch.no_grad():
        released = {site: bottom(x) for site, x in features.items()}
    epochs = epochs_of(trunk, method.at(rate), rows(task.records, released, "train"), method, task.seed)
    looks = best_of(trunk, epochs, rows(task.records, released, "validation"), _schema(task).classes)
    pieces = measured(local, task)
    size = method.rounds * _bytes(pieces)
    cost = {}
    for site, own in task.records.items():
        count = own.sizes["train"] + own.sizes["validation"]
        cost[site] = Cost(
            flops=_flops(pieces, own, method.rounds * method.local_epochs, 0) + count * at_site.forward,
            bytes_up=size + count * (FLOAT * at_site.width + LABEL),
            bytes_down=size + _bytes([at_server]),
            exchanges=method.rounds + 1,
        )
    return _shared(task, released, trunk, looks, cost)


def _drawn(task: Task) -> list[nn.Module]:
    torch.manual_seed(task.seed)
    return list(task.build())


def _schema(task: Task) -> Schema:
    return next(iter(task.records.values())).schema


def _by_site(task: Task, features: Mapping[str, Tensor]) -> list[Rows]:
    """The training records of each site."""
    return [rows({site: own}, features, "train") for site, own in task.records.items()]


def _shared(
    task: Task, features: Mapping[str, Tensor], network: nn.Module, looks: Looks, cost: Mapping[str, Cost]
) -> Trained:
    """What comes of one network that all sites hold."""
    scores, everybody = tested(network, task.records, features)
    return Trained(
        scores=scores,
        everybody=dict.fromkeys(task.records, everybody),
        validation=dict.fromkeys(task.records, looks.values),
        kept=dict.fromkeys(task.records, looks.kept),
        losses=looks.losses,
        cost=cost,
    )


# -- records


def scaled_together(records: Mapping[str, Records]) -> dict[str, Tensor]:
    """All features of each site in float32, standardised by the training records of all these sites."""
    mean, deviation = statistics_of(records.values())
    return {site: r.scaled(mean, deviation).float() for site, r in records.items()}


def rows(records: Mapping[str, Records], features: Mapping[str, Tensor], part: Part) -> Rows:
    """Features and labels of one part of these sites' records, one site after the other."""
    index = {site: own.division[part] for site, own in records.items()}
    x = torch.cat([features[site][chosen] for site, chosen in index.items()])
    return x, torch.cat([records[site].labels[chosen] for site, chosen in index.items()])


def tested(
    network: nn.Module, records: Mapping[str, Records], features: Mapping[str, Tensor]
) -> tuple[dict[str, Scores], Scores]:
    """Scores on each site's test records, and on those of all sites."""
    outputs, labels = [], []
    for site, own in records.items():
        x, y = rows({site: own}, features, "test")
        with torch.no_grad():
            outputs.append(network(x))
        labels.append(y)
    by_site = {site: metrics.scores(o, y) for site, o, y in zip(records, outputs, labels, strict=True)}
    return by_site, metrics.scores(torch.cat(outputs), torch.cat(labels))


# -- costs


def measured(pieces: Iterable[nn.Module], task: Task) -> list[Piece]:
    """What the pieces of a network are and cost, for one record."""
    found: list[Piece] = []
    tensor = torch.zeros(1, *_schema(task).shape)
    for module in pieces:
        piece, tensor = measure(module, tensor, first=not found)
        found.append(piece)
    return found


def _flops(pieces: Sequence[Piece], own: Records, epochs: int, looks: int) -> int:
    """Of a site that trains these pieces on its own records, and looks at its validation records."""
    forward, backward = sum(p.forward for p in pieces), sum(p.backward for p in pieces)
    return epochs * own.sizes["train"] * (forward + backward) + looks * own.sizes["validation"] * forward


def _bytes(pieces: Iterable[Piece]) -> int:
    """Of all trainable weights, or of a gradient for each."""
    return FLOAT * sum(piece.size for piece in pieces)


def _counts(task: Task) -> int:
    """Bytes of what a site tells of its validation records in one look."""
    return COUNT * metrics.size_of_counts(_schema(task).classes)


# -- loops


class Looks(NamedTuple):
    """What the validation records said."""

    values: list[float]
    """`stopping.value` at each look."""
    kept: int
    """The look whose weights are kept, from 1."""
    losses: list[float]
    """Of each step."""


def best_of(network: nn.Module, progress: Iterable[Sequence[float]], validation: Rows, classes: int) -> Looks:
    """Goes through all of `progress` with a look after each, and leaves in `network` the weights of the best look.

    A look is what sites that sum `metrics.counts` would see, whoever looks.

    Args:
        progress: trains `network` in place by an epoch or a round at a time, and tells the losses of its steps.

    Raises:
        UsageError: there are no validation records.
    """
    x, y = validation
    if not len(y):
        raise UsageError("there are no validation records to say which epoch's weights are kept; leave the site out")
    rule, best, looks = Best(), network.state_dict(), Looks([], 0, [])
    for losses in progress:
        network.eval()
        with torch.no_grad():
            scores = metrics.from_counts(metrics.counts(network(x), y), classes)
        looks.values.append(value(scores))
        looks.losses.extend(losses)
        if rule.look(scores) & Verdict.KEEP:
            best, looks = _copy(network), looks._replace(kept=len(looks.values))
    network.load_state_dict(best)
    return looks


def epochs_of(
    network: nn.Module, optimizer: OptimizerOf, training: Rows, method: Method, seed: int
) -> Iterator[list[float]]:
    """Trains by one optimiser, an epoch at a time; the losses of its steps."""
    made, generator = optimizer(list(network.parameters())), torch.Generator().manual_seed(seed)
    for _ in range(method.budget):
        yield descend(network, made, shuffled_batches(*training, method.batch, 1, generator))


def rounds_of(
    network: nn.Module, optimizer: OptimizerOf, sites: Sequence[Rows], method: Method, rounds: int, seed: int
) -> Iterator[list[float]]:
    """Federated averaging: McMahan et al. 2017, arXiv:1602.05629, algorithm 1 with all sites in each round (C = 1).

    Each site k trains from the round's weights w_t for E local epochs with an optimiser of its own that begins anew;
    then w_(t+1) = sum over k of n_k / n * w_(t+1)^k, where n_k is its number of training records.

    Args:
        sites: the training records of each.
    """
    generators = [torch.Generator().manual_seed(seed) for _ in sites]
    n = sum(len(y) for _, y in sites)
    for _ in range(rounds):
        start = _copy(network)
        total = {name: torch.zeros_like(tensor) for name, tensor in start.items()}
        for (x, y), generator in zip(sites, generators, strict=True):
            network.load_state_dict(start)
            batches = shuffled_batches(x, y, method.batch, method.local_epochs, generator)
            descend(network, optimizer(list(network.parameters())), batches)
            for name, tensor in network.state_dict().items():
                total[name].add_(tensor, alpha=len(y) / n)
        network.load_state_dict(total)
        yield []


def descend(network: nn.Module, optimizer: torch.optim.Optimizer, batches: Iterable[Rows]) -> list[float]:
    """The loop that every reader knows: zero the gradients, mean loss over the batch, backward, step.

    Trains `network` in place, and leaves it in evaluation mode. Returns the loss of each step.
    """
    losses = []
    network.train()
    for features, labels in batches:
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(network(features), labels)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        losses.append(loss.detach())
    network.eval()
    return torch.stack(losses).tolist() if losses else []


def _copy(network: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in network.state_dict().items()}


def shuffled_batches(
    features: Tensor, labels: Tensor, batch: int, epochs: int, generator: torch.Generator
) -> Iterator[Rows]:
    """All records in each epoch, reshuffled, in batches as equal as can be and no larger than `batch`."""
    for _ in range(epochs):
        order = torch.randperm(len(labels), generator=generator)
        steps = -(-len(labels) // batch)
        yield from zip(features[order].tensor_split(steps), labels[order].tensor_split(steps), strict=True)
