"""What plain loops need of a federation that has run: its pieces with their first weights, everybody's rows, and how
far it is from what a loop comes to."""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn

from federations import bits, records_of
from partway.config import Job
from partway.data.records import Records
from partway.equality import _Plain
from partway.model.segment import initialise
from partway.plan.plan import Copy, Turn
from partway.simulation import Federation, federation
from partway.train.draws import first_weights, forward_seed, order_of
from partway.transport.memory import Wire

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
        torch.manual_seed(forward_seed(self.whole.secrets[party], self.whole.digest, at, micro_batch, copy))


def weights_at(whole: Federation) -> dict[Copy, Tensor]:
    return {c: s.weights() for a in whole.parties.values() for c, s in a.party.worker.segments.items()}


def far(whole: Federation, expected: Mapping[Copy, nn.Module]) -> float:
    """The largest difference of a number in any of these copies."""
    weights = weights_at(whole)
    flat = {c: nn.utils.parameters_to_vector(module.parameters()).detach() for c, module in expected.items()}
    return max(float((weights[c] - flat[c]).abs().max()) for c in expected)


def built(job: Job, sizes: Mapping[str, int], **more: Any) -> Federation:
    return federation(job, {site: records_of(site, n) for site, n in sizes.items()}, **more)


def same_bits_in_any_order(job: Job, sizes: Mapping[str, int], other: Job, seeds: int = 4) -> None:
    """However it is delivered it comes to the same bits; another job does not."""

    def ran(job: Job, wire: Wire | None = None) -> bytes:
        whole = built(job, sizes)
        whole.run(wire)
        return bits(whole)

    quiet = ran(job)
    for seed in range(seeds):
        assert ran(job, Wire(seed)) == quiet
    assert ran(other) != quiet
