"""What plain loops need of a federation that has run: its pieces with their first weights, everybody's rows, and how
far it is from what a loop comes to."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn

from partway.data.records import Records
from partway.equality import _Plain
from partway.model.segment import initialise
from partway.plan.batches import equal_parts
from partway.plan.plan import Copy, Turn
from partway.simulation import Federation
from partway.train.draws import first_weights, forward_seed, order_of

OPTIMIZERS: dict[str, dict[str, Any]] = {
    "momentum": {"name": "sgd", "lr": 0.05, "momentum": 0.9},
    "adam": {"name": "adam", "lr": 0.01},
    "adamw": {"name": "adamw", "lr": 0.01, "weight_decay": 0.1},
}


def made(whole: Federation, *modules: nn.Module, local: bool = False) -> torch.optim.Optimizer:
    """The job's optimiser, from PyTorch alone."""
    training = whole.job.training
    terms = training.half_trained.optimizer if local else training.optimizer
    parameters = [p for module in modules for p in module.parameters()]
    if terms.name == "sgd":
        return torch.optim.SGD(parameters, terms.lr, momentum=terms.momentum, weight_decay=terms.weight_decay)
    kind = torch.optim.Adam if terms.name == "adam" else torch.optim.AdamW
    return kind(parameters, terms.lr, weight_decay=terms.weight_decay)


class Everything:
    """All records, and all first weights, in one place."""

    def __init__(self, whole: Federation) -> None:
        self.whole = whole
        self.records: dict[str, Records] = {s: whole.parties[s].party.worker.source.records for s in whole.job.sites}
        self._plain = _Plain(whole.job, whole.digest, whole.secrets, self.records, "server")

    def first(self, name: str, owner: str) -> nn.Module:
        """A piece with the first weights that its owner draws, ready to train."""
        module = self.whole.parties[owner].network.modules[name]
        initialise(module, first_weights(self.whole.secrets[owner], self.whole.digest, name))
        return deepcopy(module).train()

    def rows(self, site: str, part: str, epoch: int) -> tuple[Tensor, Tensor]:
        """A site's records in its own order of an epoch."""
        return self._plain.rows(site, part, epoch)

    def order(self, party: str, records: int, epoch: int) -> Tensor:
        return order_of(records, self.whole.secrets[party], self.whole.digest, epoch)

    def part(self, site: str, turn: Turn) -> tuple[Tensor, Tensor]:
        """A site's labelled rows of a turn."""
        x, y = self.rows(site, "train", turn.epoch)
        begin = turn.offsets[0].get(site, 0)
        where = slice(begin, begin + turn.rows[0][site])
        return x[where], y[where]

    def steps(self) -> list[tuple[int, Turn]]:
        """The turns that train, each with its number."""
        turns = self.whole.parties["server"].party.session.turns
        return [(number, turn) for number, turn in enumerate(turns) if turn.train]

    def seed(self, party: str, at: int, copy: Copy, micro_batch: int = 0) -> None:
        """Before a forward with dropout."""
        torch.default_generator.manual_seed(
            forward_seed(self.whole.secrets[party], self.whole.digest, at, micro_batch, copy)
        )


def weights_at(whole: Federation) -> dict[Copy, Tensor]:
    return {c: s.weights() for a in whole.parties.values() for c, s in a.party.worker.segments.items()}


def far(whole: Federation, expected: Mapping[Copy, nn.Module]) -> float:
    """The largest difference of a number in any of these copies."""
    weights = weights_at(whole)
    flat = {c: nn.utils.parameters_to_vector(module.parameters()).detach() for c, module in expected.items()}
    return max(float((weights[c] - flat[c]).abs().max()) for c in expected)


class Joined:
    """Columns of the same records that several parties hold, and all first weights, in one place."""

    def __init__(self, whole: Federation, other_order: bool = False) -> None:
        self.whole, self._other = whole, other_order
        self.sources = {n: a.party.worker.source for n, a in whole.parties.items() if a.party.worker.source}
        some = next(iter(whole.parties.values()))
        self.nets = {n: m.to(getattr(torch, whole.job.training.dtype)) for n, m in some.network.modules.items()}
        for name, module in self.nets.items():
            secret = whole.secrets[some.plan.place(some.plan.copies(name)[0])]
            initialise(module, first_weights(secret, whole.digest, name))

    def rows(self) -> Iterator[Tensor]:
        """Which records each step trains on."""
        some, training = next(iter(self.sources.values())), self.whole.job.training
        records = some.records.sizes["train"]
        for epoch in range(training.epochs):
            order = order_of(records, b"another" if self._other else some._secret, some._job, epoch)
            for begin, end in equal_parts(records, training.batch):
                yield order[begin:end]

    def train(
        self,
        loss: Callable[[Tensor], Tensor],
        rising: int = 1,
        clip: Callable[[dict[str, nn.Module]], object] = lambda nets: None,
    ) -> None:
        """One optimiser a network; `rising` steps of warm-up."""
        optimizers = [made(self.whole, module) for module in self.nets.values()]
        rates = [torch.optim.lr_scheduler.LinearLR(each, 1 / rising, total_iters=rising - 1) for each in optimizers]
        for rows in self.rows():
            for optimizer in optimizers:
                optimizer.zero_grad()
            loss(rows).backward()
            clip(self.nets)
            for optimizer in optimizers:
                optimizer.step()
            for rate in rates:
                rate.step()

    def far(self) -> dict[str, float]:
        """Of each segment, the largest difference of a number from what its party has come to."""
        weights = {copy.segment: found for copy, found in weights_at(self.whole).items()}
        assert weights.keys() == self.nets.keys()
        flat = {n: nn.utils.parameters_to_vector(m.parameters()).detach() for n, m in self.nets.items()}
        return {n: float((weights[n] - flat[n]).abs().max()) for n in flat}
