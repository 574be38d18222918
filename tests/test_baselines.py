"""The alternatives beside naive versions of them, which read like the papers; each with what must differ."""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from partway.cost import Cost
from partway.data import thyroid
from partway.data.records import Records, statistics_of
from partway.errors import UsageError
from partway.model.cut import cut
from partway.model.zoo import mlp
from partway.train import baselines, metrics
from partway.train.baselines import Method, Rows, Task, Trained
from partway.train.stopping import value
from partway.train.tuning import METHODS, total, tuned

SIZES = {"a": 60, "b": 33, "c": 9}


def plain(parameters: list[nn.Parameter], rate: float) -> torch.optim.Optimizer:
    """SGD without momentum: what begins anew in each round has nothing to forget."""
    return torch.optim.SGD(parameters, rate)


def method_of(run: Callable[[Task, Method, float], Trained], **settings: Any) -> Method:
    usual = {"optimizer": baselines.momentum, "rates": (0.01, 0.03, 0.1), "budget": 3, "batch": 16}
    return Method(run=run, **{**usual, **settings})


def build() -> list[nn.Module]:
    whole = mlp(inputs=6, hidden=[8, 5], classes=3)
    return list(cut(whole, torch.ones(4, 6), ["hidden.0"]))


def records_of(site: str, train: int, *, test_labels: int = 0, validation_labels: int = 0) -> Records:
    """Random records, of which three classes can be learnt; columns of another mean and spread at each site."""
    generator = torch.Generator().manual_seed(sum(map(ord, site)))
    total = train + 24 + 40
    x = torch.randn(total, 6, generator=generator, dtype=torch.float64)
    y = (x[:, 0] * 1.5 + x[:, 1]).clamp(-1, 1).round().long() + 1
    x[:, 2:4] = x[:, 2:4] * ord(site) + 40 * ord(site)
    index = torch.arange(total)
    division = {"train": index[:train], "validation": index[train : train + 24], "test": index[train + 24 :]}
    y[division["test"]] = (y[division["test"]] + test_labels) % 3
    y[division["validation"]] = (y[division["validation"]] + validation_labels) % 3
    return Records(x, y, classes=3, numeric=(2, 3), division=division)


def task_of(sizes: Mapping[str, int] = SIZES, seed: int = 5, **more: int) -> Task:
    return Task(build=build, records={site: records_of(site, n, **more) for site, n in sizes.items()}, seed=seed)


def exact(task: Task) -> tuple[nn.Module, list[Rows]]:
    """The network and each site's training records in float64."""
    torch.manual_seed(task.seed)
    features = baselines.scaled_together(task.records)
    sites = [baselines.rows({site: own}, features, "train") for site, own in task.records.items()]
    return nn.Sequential(*build()).double(), [(x.double(), y) for x, y in sites]


def apart(a: nn.Module, b: nn.Module) -> float:
    return max(float((p - q).detach().abs().max()) for p, q in zip(a.parameters(), b.parameters(), strict=True))


# -- federated averaging


def client_update(
    network: nn.Module, optimizer: torch.optim.Optimizer, rows: Rows, batch: int, epochs: int, order: torch.Generator
) -> None:
    """ClientUpdate(k, w) of McMahan et al. 2017, algorithm 1."""
    x, y = rows
    for _ in range(epochs):
        for b in torch.randperm(len(y), generator=order).tensor_split(-(-len(y) // batch)):
            optimizer.zero_grad()
            nn.functional.cross_entropy(network(x[b]), y[b]).backward()
            optimizer.step()


def federated_averaging(
    network: nn.Module, sites: Sequence[Rows], method: Method, rate: float, seed: int, weights: Sequence[float]
) -> nn.Module:
    """Server executes, of the same algorithm, with all clients in each round."""
    orders = [torch.Generator().manual_seed(seed) for _ in sites]
    for _ in range(method.budget):
        clients = []
        for rows, order in zip(sites, orders, strict=True):
            client = copy.deepcopy(network)
            optimizer = method.optimizer(list(client.parameters()), rate)
            client_update(client, optimizer, rows, method.batch, method.local_epochs, order)
            clients.append(client)
        with torch.no_grad():
            for p, *locals_ in zip(*(n.parameters() for n in (network, *clients)), strict=True):
                p.copy_(sum(w * q for w, q in zip(weights, locals_, strict=True)))
    return network


def rounds(network: nn.Module, sites: Sequence[Rows], method: Method, rate: float, seed: int = 5) -> nn.Module:
    list(baselines.rounds_of(network, method.at(rate), sites, method, method.budget, seed))
    return network


@pytest.mark.parametrize("optimizer", [baselines.momentum, baselines.adam])
@pytest.mark.parametrize("local_epochs", [1, 5])
def test_rounds_are_those_of_the_paper(optimizer: Any, local_epochs: int) -> None:
    method = method_of(baselines.federated, optimizer=optimizer, local_epochs=local_epochs)
    network, sites = exact(task_of())
    by_records = [n / sum(SIZES.values()) for n in SIZES.values()]
    naive = federated_averaging(copy.deepcopy(network), sites, method, 0.03, 5, by_records)
    equally = federated_averaging(copy.deepcopy(network), sites, method, 0.03, 5, [1 / 3] * 3)
    found = rounds(network, sites, method, 0.03)
    assert apart(found, naive) < 1e-12
    assert apart(found, equally) > 1e-3


def test_one_step_a_round_on_all_records_is_gradient_descent_on_pooled_ones() -> None:
    network, sites = exact(task_of())
    pooled = copy.deepcopy(network)
    x, y = torch.cat([x for x, _ in sites]), torch.cat([y for _, y in sites])
    for _ in range(4):
        gradients = torch.autograd.grad(nn.functional.cross_entropy(pooled(x), y), list(pooled.parameters()))
        with torch.no_grad():
            for p, g in zip(pooled.parameters(), gradients, strict=True):
                p -= 0.1 * g
    one = method_of(baselines.federated, optimizer=plain, budget=4, batch=1000)
    assert apart(rounds(copy.deepcopy(network), sites, one, 0.1), pooled) < 1e-12
    assert apart(rounds(copy.deepcopy(network), sites, replace(one, local_epochs=2), 0.1), pooled) > 1e-3


def test_of_one_site_is_training_alone() -> None:
    task = task_of({"a": 60})

    def both(optimizer: Any) -> tuple[Trained, Trained]:
        settings = {"optimizer": optimizer, "budget": 6}
        alone, federated = (method_of(run, **settings) for run in (baselines.alone, baselines.federated))
        return baselines.alone(task, alone, 0.1), baselines.federated(task, federated, 0.1)

    alone, federated = both(plain)
    assert (alone.scores, alone.everybody) == (federated.scores, federated.everybody)
    assert (alone.validation, alone.kept) == (federated.validation, federated.kept)
    alone, federated = both(baselines.momentum)  # which is forgotten in each round
    assert alone.validation != federated.validation


# -- large batches


def test_a_large_batch_is_the_sum_of_what_sites_send() -> None:
    """Each step: a whole network at each site, the sum of their gradients, one update."""
    network, sites = exact(task_of())
    x, y = torch.cat([x for x, _ in sites]), torch.cat([y for _, y in sites])
    owner = torch.cat([torch.full((len(y),), k) for k, (_, y) in enumerate(sites)])
    summed, averaged = copy.deepcopy(network), copy.deepcopy(network)

    def batches(labels: Tensor) -> Iterator[Rows]:
        return baselines.shuffled_batches(x, labels, 32, 12, torch.Generator().manual_seed(5))

    def step(whole: nn.Module, made: torch.optim.Optimizer, parts: list[Rows], weights: list[float]) -> None:
        shares = []
        for x, y in parts:
            loss = nn.functional.cross_entropy(whole(x), y, reduction="sum")
            shares.append(torch.autograd.grad(loss, list(whole.parameters())))
        for p, *terms in zip(whole.parameters(), *shares, strict=True):
            p.grad = sum(w * g for w, g in zip(weights, terms, strict=True))
        made.step()

    both = [baselines.adam(list(n.parameters()), 0.01) for n in (summed, averaged)]
    for (some, labels), (_, owners) in zip(batches(y), batches(owner), strict=True):
        parts = [(some[owners == k], labels[owners == k]) for k in range(3) if (owners == k).any()]
        step(summed, both[0], parts, [1 / len(labels)] * len(parts))
        step(averaged, both[1], parts, [1 / (len(parts) * len(own)) for _, own in parts])
    baselines.descend(network, baselines.adam(list(network.parameters()), 0.01), batches(y))
    assert apart(network, summed) < 1e-12
    assert apart(network, averaged) > 1e-3


def test_large_batches_and_pooling_differ_in_cost_alone() -> None:
    task, method = task_of(), method_of(baselines.large_batch, batch=64)
    large, pooled = baselines.large_batch(task, method, 0.03), baselines.pooled(task, method, 0.03)
    assert replace(large, cost={}) == replace(pooled, cost={})
    assert large.cost != pooled.cost


# -- half-trained


def test_half_trained_is_three_plain_loops() -> None:
    made: list[list[nn.Module]] = []
    task = replace(task_of(), build=lambda: made.append(build()) or made[-1])
    method = method_of(baselines.half_trained, optimizer=baselines.adam, budget=4, local_epochs=2, rounds=3)
    found = baselines.half_trained(task, method, 0.01)

    torch.manual_seed(task.seed)
    bottom, trunk = build()
    head = nn.Sequential(nn.ReLU(), nn.Flatten(), nn.Linear(8, 3))
    features = baselines.scaled_together(task.records)
    sites = [baselines.rows({site: own}, features, "train") for site, own in task.records.items()]
    first = replace(method, optimizer=baselines.momentum, budget=3)
    weights = [n / sum(SIZES.values()) for n in SIZES.values()]
    federated_averaging(nn.Sequential(bottom, head), sites, first, 0.03, task.seed, weights)
    with torch.no_grad():
        released = bottom(torch.cat([x for x, _ in sites])), torch.cat([y for _, y in sites])
    optimizer, order = torch.optim.Adam(trunk.parameters(), 0.01), torch.Generator().manual_seed(task.seed)
    client_update(trunk, optimizer, released, method.batch, found.kept["a"], order)
    assert apart(made[0][0], bottom) < 1e-5
    assert apart(made[0][1], trunk) < 1e-5
    assert apart(made[0][0], build()[0]) > 1e-2


def test_half_trained_bottoms_are_frozen() -> None:
    made: list[list[nn.Module]] = []
    task = replace(task_of(), build=lambda: made.append(build()) or made[-1])
    method = method_of(baselines.half_trained, rounds=0)
    baselines.half_trained(task, method, 0.03)
    baselines.half_trained(task, replace(method, rounds=1), 0.03)
    torch.manual_seed(task.seed)
    bottom, trunk = build()
    assert apart(made[0][0], bottom) == 0
    assert apart(made[1][0], bottom) > 1e-3
    assert apart(made[0][1], trunk) > 1e-3


def test_half_trained_needs_one_cut() -> None:
    task = replace(task_of(), build=lambda: [mlp(inputs=6, hidden=[8, 5], classes=3)])
    with pytest.raises(UsageError, match="not 1 pieces; cut the network once"):
        baselines.half_trained(task, method_of(baselines.half_trained), 0.03)


# -- the best look


class Fixed(nn.Module):
    """Puts out its weights, whatever comes in."""

    def __init__(self, outputs: Tensor) -> None:
        super().__init__()
        self.outputs = nn.Parameter(outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.outputs


@given(st.lists(st.integers(0, 20), min_size=1, max_size=8))
def test_the_best_look_is_kept_the_earlier_of_two(seeds: list[int]) -> None:
    y = torch.arange(12) % 2
    made = [torch.randn(12, 2, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    network = Fixed(torch.zeros(12, 2))

    def progress() -> Iterator[list[float]]:
        for number, outputs in enumerate(made):
            network.outputs.data.copy_(outputs)
            yield [float(number)]

    looks = baselines.best_of(network, progress(), (torch.zeros(12, 1), y), classes=2)
    values = [value(metrics.from_counts(metrics.counts(outputs, y), 2)) for outputs in made]
    assert looks.values == values
    assert looks.kept == values.index(max(values)) + 1
    assert torch.equal(network.outputs, made[looks.kept - 1])
    assert looks.losses == [float(n) for n in range(len(made))]


def test_what_gets_worse_is_not_kept() -> None:
    y = torch.arange(12) % 2
    right = nn.functional.one_hot(y).float()
    network = Fixed(torch.zeros(12, 2))

    def progress() -> Iterator[list[float]]:
        for outputs in (right, -right):
            network.outputs.data.copy_(outputs)
            yield []

    looks = baselines.best_of(network, progress(), (torch.zeros(12, 1), y), classes=2)
    assert looks == ([1.0, 0.0], 1, [])
    assert torch.equal(network.outputs, right)


RUNS = [baselines.pooled, baselines.alone, baselines.federated, baselines.large_batch, baselines.half_trained]


@pytest.mark.parametrize("run", RUNS)
def test_a_longer_budget_begins_like_a_shorter_one(run: Any) -> None:
    """The weights kept are those of the look kept: to stop there comes to the same."""
    task = task_of({"a": 60})
    long = method_of(run, budget=12, rounds=1)
    found = run(task, long, 0.1)
    short = run(task, replace(long, budget=found.kept["a"]), 0.1)
    assert (found.scores, found.everybody, found.kept) == (short.scores, short.everybody, short.kept)
    assert list(found.validation["a"])[: found.kept["a"]] == list(short.validation["a"])
    assert max(found.validation["a"]) == found.validation["a"][found.kept["a"] - 1]


def test_without_validation_records_nobody_can_say() -> None:
    task = task_of()
    task.records["c"].division["validation"] = torch.tensor([], dtype=torch.int64)
    baselines.pooled(task, method_of(baselines.pooled), 0.03)
    with pytest.raises(UsageError, match="no validation records"):
        baselines.alone(task, method_of(baselines.alone), 0.03)


# -- records


def test_alone_knows_nothing_of_the_others() -> None:
    one, other = task_of(), task_of({**SIZES, "b": 50})
    alone, pooled = method_of(baselines.alone), method_of(baselines.pooled)
    a, b = baselines.alone(one, alone, 0.03), baselines.alone(other, alone, 0.03)
    for site in ("a", "c"):
        assert (a.scores[site], a.validation[site]) == (b.scores[site], b.validation[site])
    assert a.everybody["a"] != b.everybody["a"]
    assert baselines.pooled(one, pooled, 0.03).scores["a"] != baselines.pooled(other, pooled, 0.03).scores["a"]


def test_everybody_is_all_sites_test_records() -> None:
    task = task_of()
    found = baselines.federated(task, method_of(baselines.federated), 0.03)
    assert len(set(found.everybody.values())) == 1
    whole = found.everybody["a"]
    assert whole.records == sum(s.records for s in found.scores.values()) == 120
    right = sum(s.accuracy * s.records for s in found.scores.values())
    assert whole.accuracy == pytest.approx(right / whole.records)
    alone = baselines.alone(task, method_of(baselines.alone), 0.03)
    assert len(set(alone.everybody.values())) == 3


def test_records_are_standardised_by_training_records_alone() -> None:
    task = task_of()
    features = baselines.scaled_together(task.records)
    training, _ = baselines.rows(task.records, features, "train")
    assert training[:, 2:4].mean(0).abs().max() < 1e-6
    assert (training[:, 2:4].std(0, correction=0) - 1).abs().max() < 1e-6
    assert features["a"][:, 2:4].mean(0).abs().max() > 0.1
    mean, _ = statistics_of([task.records["a"]])
    own = task.records["a"].features[:60, 2:4].mean(0)
    assert torch.allclose(mean, own, rtol=1e-12)


# -- costs

WEIGHTS = (6 * 8 + 8) + (8 * 5 + 5) + (5 * 3 + 3)
FORWARD = 2 * (6 * 8 + 8 * 5 + 5 * 3)
BACKWARD = 2 * FORWARD - 2 * 6 * 8
"""By the weights and, but for the first layer, by the inputs."""
COUNTS = 8 * (3 * 3 + 2 * 3 * metrics.BINS)


def counted(task: Task, method: Method) -> tuple[int, int]:
    """FLOPs of a run as torch counts them, and as its cost says."""
    with FlopCounterMode(display=False) as counter:
        ran = method.run(task, method, 0.03)
    return counter.get_total_flops(), sum(cost.flops for cost in ran.cost.values())


@pytest.mark.parametrize("run", [baselines.alone, baselines.federated, baselines.large_batch])
def test_flops_are_those_that_torch_counts(run: Any) -> None:
    """Between two budgets all that is not counted, such as scores on test records, falls out."""
    short, long = (counted(task_of(), method_of(run, budget=budget, local_epochs=2)) for budget in (1, 3))
    assert long[0] - short[0] == long[1] - short[1] > 0


def test_flops_of_half_training_are_those_that_torch_counts() -> None:
    methods = [method_of(baselines.half_trained, rounds=n, local_epochs=2) for n in (0, 1, 3)]
    nothing, short, long = (counted(task_of(), method) for method in methods)
    assert long[0] - short[0] == long[1] - short[1] > 0
    assert nothing[1] == sum(n + 24 for n in SIZES.values()) * 2 * 6 * 8


def test_cost_by_hand() -> None:
    task = task_of()

    def cost(run: Any, **settings: Any) -> Cost:
        found = run(task, method_of(run, **settings), 0.03).cost
        assert set(found) == set(SIZES)
        return found["b"]  # 33 training and 24 validation records

    step, look = FORWARD + BACKWARD, 24 * FORWARD
    assert cost(baselines.pooled) == Cost(bytes_up=(33 + 24) * (6 * 4 + 8), exchanges=1)
    assert cost(baselines.alone) == Cost(flops=3 * (33 * step + look))
    assert cost(baselines.federated, local_epochs=5) == Cost(
        flops=3 * (5 * 33 * step + look),
        bytes_up=3 * (4 * WEIGHTS + COUNTS),
        bytes_down=3 * 4 * WEIGHTS,
        exchanges=3,
    )
    steps = 3 * 2  # 102 records in batches of at most 64
    assert cost(baselines.large_batch, batch=64) == Cost(
        flops=3 * (33 * step + look),
        bytes_up=steps * 4 * WEIGHTS + 3 * COUNTS,
        bytes_down=steps * 4 * WEIGHTS,
        exchanges=steps,
    )
    bottom, head, trunk = 6 * 8 + 8, 8 * 3 + 3, (8 * 5 + 5) + (5 * 3 + 3)
    local = 2 * (6 * 8 + 8 * 3) + 2 * (6 * 8 + 2 * 8 * 3)
    assert cost(baselines.half_trained, rounds=2, local_epochs=4) == Cost(
        flops=2 * 4 * 33 * local + (33 + 24) * 2 * 6 * 8,
        bytes_up=2 * 4 * (bottom + head) + (33 + 24) * (4 * 8 + 8),
        bytes_down=2 * 4 * (bottom + head) + 4 * trunk,
        exchanges=3,
    )


def test_cost_of_the_demo_network() -> None:
    whole = mlp(29, [64, 16, 128, 64], 7)
    pieces = cut(whole, torch.ones(4, 29), ["hidden.2"])
    bottom, trunk = baselines.measured(pieces, Task(build=lambda: pieces, records=thyroid.bundled(0), seed=0))
    assert bottom.size + trunk.size == 13_847
    assert bottom.forward + bottom.backward == 13_568
    assert sum(piece.forward + piece.backward for piece in (bottom, trunk)) == 77_696


# -- the learning rate

TUNED = method_of(baselines.federated, rates=(1e-4, 0.1, 30.0), budget=5)


def test_the_best_on_validation_records_is_chosen_and_all_tries_are_paid_for() -> None:
    tasks = [task_of(seed=1), task_of(seed=2)]
    found = tuned(TUNED, tasks)
    tried = replace(TUNED, budget=3)
    runs = {rate: [baselines.federated(task, tried, rate) for task in tasks] for rate in TUNED.rates}
    for rate, both in runs.items():
        assert found.validation[rate] == pytest.approx(statistics.mean(max(r.validation["a"]) for r in both))
    assert found.rate == max(found.validation, key=found.validation.__getitem__) == 0.1
    for site, cost in found.cost.items():
        assert cost == total(r.cost[site] for both in runs.values() for r in both)
    assert found.cost["a"].exchanges == 3 * 3 * 2


@pytest.mark.parametrize("run", [baselines.alone, baselines.pooled, baselines.federated, baselines.half_trained])
def test_test_records_are_not_looked_at(run: Any) -> None:
    method = replace(TUNED, run=run, rounds=1)
    clean = tuned(method, [task_of()])
    assert tuned(method, [task_of(test_labels=1)]) == clean
    assert tuned(method, [task_of(validation_labels=1)]).validation != clean.validation


def test_methods_have_equal_chances() -> None:
    assert {len(method.rates) for method in METHODS.values()} == {3}
    whole = {name: m.budget * m.local_epochs for name, m in METHODS.items() if m.run is baselines.federated}
    assert set(whole.values()) == {METHODS["large_batch_sgd"].budget}
    assert {m.optimizer for name, m in METHODS.items() if name in whole} == {baselines.adam, baselines.momentum}
    assert {m.local_epochs for name, m in METHODS.items() if name in whole} == {1, 5}
