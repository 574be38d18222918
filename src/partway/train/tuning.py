"""The methods of the comparison as data, and how each one's learning rate is chosen: by one rule, at its own expense.

>>> {len(method.rates) for method in METHODS.values()}
{3}
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from typing import NamedTuple

from partway.cost import Cost
from partway.train.baselines import Method, Task, adam, alone, federated, half_trained, large_batch, momentum, pooled

ADAM = (1e-3, 3e-3, 1e-2)
MOMENTUM = (0.01, 0.03, 0.1)
METHODS: Mapping[str, Method] = {
    "alone": Method(run=alone, optimizer=adam, rates=ADAM, budget=40, batch=64),
    "pooled": Method(run=pooled, optimizer=adam, rates=ADAM, budget=40, batch=256),
    "large_batch_sgd": Method(run=large_batch, optimizer=adam, rates=ADAM, budget=100, batch=1024),
    "fedavg_1_adam": Method(run=federated, optimizer=adam, rates=ADAM, budget=100, batch=64),
    "fedavg_5_adam": Method(run=federated, optimizer=adam, rates=ADAM, budget=20, batch=64, local_epochs=5),
    "fedavg_1_sgd": Method(run=federated, optimizer=momentum, rates=MOMENTUM, budget=100, batch=64),
    "fedavg_5_sgd": Method(run=federated, optimizer=momentum, rates=MOMENTUM, budget=20, batch=64, local_epochs=5),
    "half_trained": Method(
        run=half_trained, optimizer=adam, rates=ADAM, budget=40, batch=64, local_epochs=10, rounds=3
    ),
}
"""By name; the number after `fedavg` is its local epochs in a round. What learns a whole network at the sites from
averages or sums goes through its records 100 times, for it learns more slowly; else it is 40 times, and 30 for the
bottom of what is half-trained."""
TRIED = 0.5
"""The share of its budget that every method spends on each learning rate it tries; to half-train a bottom is no part
of the budget, and done in full."""


class Tuned(NamedTuple):
    """A learning rate, and what it took to find it."""

    rate: float
    cost: dict[str, Cost]
    """By site: the sum of all runs tried, as if nothing were left of one for the next."""
    validation: dict[float, float]
    """What each rate came to: the value of its best look, mean over sites and tasks."""


def tuned(method: Method, tasks: Sequence[Task]) -> Tuned:
    """The learning rate of `method.rates` that comes out best on validation records; the earlier of two equal ones.

    Args:
        tasks: one for each seed to tune by; not those whose test records are reported.
    """
    tried = replace(method, budget=math.ceil(TRIED * method.budget))
    spent: dict[str, Cost] = {}
    found = {}
    for rate in method.rates:
        best = []
        for task in tasks:
            ran = tried.run(task, tried, rate)
            best += [max(values) for values in ran.validation.values()]
            spent = {site: total([spent[site], cost] if spent else [cost]) for site, cost in ran.cost.items()}
        found[rate] = statistics.mean(best)
    return Tuned(max(found, key=found.__getitem__), spent, found)


def total(costs: Iterable[Cost]) -> Cost:
    """What all of these cost together.

    >>> total([Cost(flops=1, exchanges=2), Cost(flops=3, bytes_up=4)])
    Cost(flops=4, bytes_up=4, bytes_down=0, exchanges=2)
    """
    rows = [asdict(cost) for cost in costs]
    return Cost(**{figure: sum(row[figure] for row in rows) for figure in asdict(Cost())})
