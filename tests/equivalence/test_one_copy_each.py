"""Configurations in which parties hold columns, layers or labels of the same patients: each against its plain loop."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from federations import same_bits_in_any_order
from partway.config import Job, read_job
from partway.data.records import Records
from partway.local import toml
from partway.simulation import Federation, federation
from plain import OPTIMIZERS, Joined

N, TRAIN = 90, 60
COLUMNS = {"a": 3, "b": 2, "c": 4}


def net(inputs: int, classes: int, hidden: int = 9) -> dict[str, Any]:
    return {"build": "partway.model.zoo:mlp", "arguments": {"inputs": inputs, "hidden": [hidden], "classes": classes}}


def holds(labels: str, targets: tuple[str, ...] = ("y",), only: str = "abc") -> dict[str, dict[str, Any]]:
    found = {f"holds.{party}": {"columns": [f"{party}{n}" for n in range(COLUMNS[party])]} for party in only}
    found.setdefault(f"holds.{labels}", {})["targets"] = list(targets)
    return found


def bottoms(only: str = "abc", width: int = 4) -> dict[str, dict[str, Any]]:
    return {f"networks.bottom_{party}": net(COLUMNS[party], width) for party in only}


def job_of(sections: dict[str, dict[str, Any]], **training: Any) -> Job:
    words = {
        "job": {"name": "joined", "seed": 3},
        "records": {"schema": "dataset"},
        "training": {"epochs": 4, "batch": 16, "dtype": "float64", "keep": "last", **training},
        "evaluation": {"every": 0},
        **sections,
    }
    return read_job(toml(words))


def records_of(party: str, parties: tuple[str, ...], labels: tuple[str, ...], lacks: tuple[int, ...] = ()) -> Records:
    generator = torch.Generator().manual_seed(7)
    columns = {p: torch.randn(N, COLUMNS[p], generator=generator, dtype=torch.float64) for p in parties}
    y = sum(x[:, 0] for x in columns.values()).clamp(-1, 1).round().long() + 1
    x = columns.get(party, torch.zeros(N, 0)).clone()
    index = torch.arange(N)
    division = {"train": index[:TRAIN], "validation": index[TRAIN:75], "test": index[75:]}
    present = torch.ones(N, dtype=torch.bool)
    present[list(lacks)] = False
    x[~present] = 0
    return Records(
        x,
        y if party in labels else torch.zeros(N),
        classes=3 if party in labels else 0,
        numeric=(),
        division=division,
        present=present if lacks else None,
    )


def built(job: Job, holders: str, labels: str, lacks: tuple[int, ...] = (), **more: Any) -> Federation:
    named = tuple(holders)
    given = {p: records_of(p, named, (labels,), lacks if p == "a" else ()) for p in dict.fromkeys((*named, labels))}
    return federation(job, given, **more)


class Plain(Joined):
    """What every configuration must equal; a loss gets the networks, every party's columns, and the labels."""

    def difference(
        self, loss: Callable[[dict[str, nn.Module], dict[str, Tensor], Tensor], Tensor], **more: Any
    ) -> float:
        def of(rows: Tensor) -> Tensor:
            x = {party: source.features[rows] for party, source in self.sources.items()}
            y = next(s.labels[rows] for s in self.sources.values() if s.records.schema.classes)
            return loss(self.nets, x, y)

        self.train(of, **more)
        return max(self.far().values())


cross_entropy = nn.functional.cross_entropy


def side_by_side(nets: dict[str, nn.Module], x: dict[str, Tensor], holders: str = "abc") -> Tensor:
    return torch.cat([nets[f"bottom_{party}"](x[party]) for party in holders], 1)


def vertical_loss(nets, x, y):
    return cross_entropy(nets["trunk"](side_by_side(nets, x)), y)


def added_loss(nets, x, y):
    added = torch.stack([nets[f"bottom_{party}"](x[party]) for party in "abc"]).sum(0)
    return cross_entropy(nets["trunk"](added), y)


def head_loss(nets, x, y):
    return cross_entropy(nets["head"](nets["trunk"](side_by_side(nets, x))), y)


def middle_loss(nets, x, y):
    return cross_entropy(nets["trunk"](nets["middle"](side_by_side(nets, x))), y)


def hop_loss(nets, x, y):
    return cross_entropy(nets["trunk"](nets["hop_2"](nets["hop_1"](x["a"]))), y)


def skip_loss(nets, x, y):
    on, aside = torch.split(nets["hop_1"](x["a"]), [8, 2], 1)
    return cross_entropy(nets["trunk"](torch.cat([nets["hop_2"](on), aside], 1)), y)


def vertical(labels: str = "c", **training: Any) -> Job:
    sections = {**holds(labels), **bottoms(), "networks.trunk": net(12, 3)}
    return job_of(sections, configuration="vertical", **training)


CASES: dict[str, tuple[Callable[..., Federation], Callable[..., Tensor]]] = {
    "vertical, the label at a holder": (lambda **t: built(vertical(**t), "abc", "c"), vertical_loss),
    "vertical, the label at a party of its own": (lambda **t: built(vertical("d", **t), "abc", "d"), vertical_loss),
    "vertical, the label at the server": (lambda **t: built(vertical("server", **t), "abc", "server"), vertical_loss),
    "vertical, added": (
        lambda **t: built(
            job_of({**holds("c"), **bottoms(), "networks.trunk": net(4, 3)}, configuration="vertical", join="sum", **t),
            "abc",
            "c",
        ),
        added_loss,
    ),
    "vertical with a head": (
        lambda **t: built(
            job_of(
                {**holds("c"), **bottoms(), "networks.trunk": net(12, 6), "networks.head": net(6, 3)},
                configuration="vertical",
                **t,
            ),
            "abc",
            "c",
        ),
        head_loss,
    ),
    "extended_vanilla": (
        lambda **t: built(
            job_of(
                {**holds("c"), **bottoms(), "networks.middle": net(12, 6), "networks.trunk": net(6, 3)},
                configuration="extended_vanilla",
                middle="d",
                **t,
            ),
            "abc",
            "c",
        ),
        middle_loss,
    ),
    "multi_hop": (
        lambda **t: built(
            job_of(
                {
                    **holds("d", only="a"),
                    "network": {
                        "build": "partway.model.zoo:mlp",
                        "arguments": {"inputs": 3, "hidden": [16, 12, 12], "classes": 3},
                        "cut": ["hidden.1", "hidden.3"],
                    },
                },
                configuration="multi_hop",
                hops=["a", "b"],
                **t,
            ),
            "a",
            "d",
        ),
        hop_loss,
    ),
    "multi_hop, something passes by": (
        lambda **t: built(
            job_of(
                {
                    **holds("d", only="a"),
                    "network": {
                        "build": "skipping_network:skipping",
                        "arguments": {"inputs": 3},
                        "cut": ["aside", "third"],
                    },
                },
                configuration="multi_hop",
                hops=["a", "b"],
                skips=["hop_1 -> trunk"],
                **t,
            ),
            "a",
            "d",
        ),
        skip_loss,
    ),
}
cases = pytest.mark.parametrize("case", CASES)


@cases
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_equals_its_plain_loop(case: str, optimizer: str) -> None:
    make, loss = CASES[case]
    whole = make(optimizer=OPTIMIZERS[optimizer])
    whole.run()
    assert Plain(whole).difference(loss) < 1e-10
    assert Plain(whole, other_order=True).difference(loss) > 1e-4


@cases
def test_with_options_of_training(case: str) -> None:
    """Warm-up, one norm over all parties, micro-batches."""
    make, loss = CASES[case]
    whole = make(rate={"warm_up": 6}, clip_norm=0.2, micro_batch=5)
    whole.run()

    def of_all(nets: dict[str, nn.Module]) -> None:
        nn.utils.clip_grad_norm_([p for module in nets.values() for p in module.parameters()], 0.2)

    def of_each(nets: dict[str, nn.Module]) -> None:
        for module in nets.values():
            nn.utils.clip_grad_norm_(module.parameters(), 0.2)

    assert Plain(whole).difference(loss, rising=6, clip=of_all) < 1e-10
    assert Plain(whole).difference(loss, rising=6, clip=of_each) > 1e-6
    assert Plain(whole).difference(loss, clip=of_all) > 1e-5


@cases
def test_a_half_precision_is_torch_s(case: str) -> None:
    make, loss = CASES[case]
    whole = make(precision="bfloat16", dtype="float32")
    whole.run()

    def under_autocast(nets: dict[str, nn.Module], x: dict[str, Tensor], y: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return loss(nets, x, y)

    assert (equal := Plain(whole).difference(under_autocast)) < 2e-5  # as in test_training_options.py
    assert Plain(whole).difference(loss) > max(5e-6, 5 * equal)
    scaled = make(precision="float16", dtype="float32")
    scaled.run()
    assert len({s.value for a in scaled.parties.values() for s in a.party.worker._scales.values()}) == 1


@cases
def test_the_bits_do_not_depend_on_delivery(case: str) -> None:
    make, _ = CASES[case]
    same_bits_in_any_order(make, 5)


def test_a_record_that_a_party_lacks_counts_as_zeros() -> None:
    lacks = (0, 3, 11, 40)
    whole = built(vertical(), "abc", "c", lacks)
    whole.run()

    def loss(nets, x, y):
        here = ~(x["a"] == 0).all(1, keepdim=True)
        own = {"a": nets["bottom_a"](x["a"]) * here}
        parts = [own.get(party, nets[f"bottom_{party}"](x[party])) for party in "abc"]
        return cross_entropy(nets["trunk"](torch.cat(parts, 1)), y)

    assert Plain(whole).difference(loss) < 1e-10
    assert Plain(whole).difference(vertical_loss) > 1e-4
