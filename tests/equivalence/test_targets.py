"""Every target against a plain loop: over sites that pool it, over columns, and several at once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec
import pytest
import torch
from torch import Tensor, nn

from federations import SIZES, bits, difference, job_of, same_bits_in_any_order
from federations import pooled as equality_of
from partway.config import Job, read_job
from partway.data.records import Records, Target
from partway.errors import ConfigError
from partway.local import toml
from partway.plan.batches import union_batches
from partway.simulation import Federation, federation
from partway.train.targets import loss_of
from partway.transport.memory import Wire
from plain import OPTIMIZERS, Everything, Joined, made

KINDS = {
    "binary": Target(name="t", kind="binary", outputs=1),
    "multi_label": Target(name="t", kind="multi_label", outputs=2),
    "regression": Target(name="t", kind="regression", outputs=1),
    "discrete time": Target(name="t", kind="survival", outputs=3, intervals=(1.0, 2.0, 3.0)),
    "cox": Target(name="t", kind="survival", outputs=1),
}


def labels(target: Target, x: Tensor) -> Tensor:
    yes = (x[:, 0] > 0).double()
    if target.kind == "multi_label":
        return torch.stack([yes, (x[:, 1] > 0).double()], 1)
    if target.kind == "survival":
        return torch.stack([x[:, 1].exp(), yes], 1)
    return x[:, 0] + x[:, 1] if target.kind == "regression" else yes


def records_of(target: Target, site: str, train: int) -> Records:
    generator = torch.Generator().manual_seed(sum(map(ord, site)))
    total = train + 32
    x = torch.randn(total, 6, generator=generator, dtype=torch.float64)
    index = torch.arange(total)
    division = {"train": index[:train], "validation": index[train : train + 12], "test": index[train + 12 :]}
    y = labels(target, x)
    return Records(x, y, classes=target.outputs, numeric=(), division=division, targets=(target,))


def run(kind: str, wire: Wire | None = None, **training: Any) -> Federation:
    target, two = KINDS[kind], training.get("configuration") == "u_shaped"
    network = {
        "build": "partway.model.zoo:mlp",
        "arguments": {"inputs": 6, "hidden": [8, 5], "classes": target.outputs},
        "cut": ["hidden.1", "hidden.3"] if two else ["hidden.1"],
    }
    # Cox's likelihood does not feel a constant: the last bias has a gradient of rounding alone, and Adam steps by it.
    optimizer = OPTIMIZERS["momentum" if kind == "cox" else "adam"]
    training = {"epochs": 6, "keep": "last", "optimizer": optimizer, **training}
    job = job_of({"network": network, "evaluation": {"every": 1}}, **training)
    whole = federation(job, {site: records_of(target, site, n) for site, n in SIZES.items()})
    whole.run(wire)
    return whole


def pooled(whole: Federation, target: Target, loss: Callable[[Tensor, Tensor], Tensor]) -> float:
    """One network on the union batches; how far it is from what the parties have come to."""
    all_, training = Everything(whole), whole.job.training
    names = [n for n in ("bottom", "trunk", "head") if n in whole.parties["a"].network.modules]
    nets = {n: all_.first(n, "server" if n == "trunk" else "a") for n in names}
    network = nn.Sequential(*nets.values())
    optimizer = made(whole, network)
    for epoch in range(training.epochs):
        rows = {site: all_.rows(site, "train", epoch) for site in SIZES}
        for batch in union_batches(SIZES, training.batch, whole.job.job.seed, epoch):
            parts = [
                tuple(part[batch.offsets[s] : batch.offsets[s] + batch.rows[s]] for part in rows[s])
                for s in SIZES
                if batch.rows[s]
            ]
            x, y = (torch.cat(each) for each in zip(*parts, strict=True))
            optimizer.zero_grad()
            (loss(network(x), y) / len(y)).backward()
            optimizer.step()
    flat = {n: nn.utils.parameters_to_vector(net.parameters()).detach() for n, net in nets.items()}
    segments = {c: s for a in whole.parties.values() for c, s in a.party.worker.segments.items()}
    return max(float((s.weights() - flat[c.segment]).abs().max()) for c, s in segments.items() if c.segment in flat)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("configuration", ["vanilla", "u_shaped"])
def test_equals_the_pooled_loop(kind: str, configuration: str) -> None:
    target = KINDS[kind]
    if kind == "cox" and configuration == "u_shaped":
        with pytest.raises(ConfigError, match="give the target `intervals`, for discrete time"):
            run(kind, configuration=configuration)
        return
    whole = run(kind, configuration=configuration)
    loss = loss_of(target)
    assert pooled(whole, target, loss) < 1e-10
    assert pooled(whole, target, lambda x, y: 1.5 * loss(x.square(), y)) > 1e-4
    assert run(kind, Wire(3), configuration=configuration).digest == whole.digest
    assert bits(run(kind, Wire(3), configuration=configuration)) == bits(whole)
    assert whole.parties["a"].evaluations["scores"].all[-1][0] == "test"


def test_cox_needs_all_records_of_a_step_at_once() -> None:
    with pytest.raises(ConfigError, match="needs a step's records in one place and at once"):
        run("cox", micro_batch=4)


TASKS = {
    "sort": ("a", Target(name="sort", outputs=3)),
    "stay": ("c", Target(name="stay", kind="regression", outputs=1)),
    "life": ("server", Target(name="life", kind="survival", outputs=3, intervals=(1.0, 2.0, 3.0))),
}
N, TRAIN = 80, 60
WIDTH = {"a": 3, "b": 2}


def multi_task() -> Job:
    def net(inputs: int, outputs: int) -> dict[str, Any]:
        arguments = {"inputs": inputs, "hidden": [5], "classes": outputs}
        return {"build": "partway.model.zoo:mlp", "arguments": arguments}

    words: dict[str, dict[str, Any]] = {
        "job": {"name": "tasks", "seed": 1},
        "records": {"schema": "dataset"},
        "training": {"configuration": "multi_task", "epochs": 4, "batch": 16, "dtype": "float64", "keep": "last"},
        **{f"networks.bottom_{p}": net(width, 4) for p, width in WIDTH.items()},
        "networks.joined": net(8, 6),
        **{f"networks.trunk_{name}": net(6, target.outputs) for name, (_, target) in TASKS.items()},
        **{f"holds.{p}": {"columns": [f"{p}{n}" for n in range(width)]} for p, width in WIDTH.items()},
    }
    for name, (party, _) in TASKS.items():
        words.setdefault(f"holds.{party}", {}).setdefault("targets", []).append(name)
    return read_job(toml(words))


def tasks_of() -> dict[str, Records]:
    generator = torch.Generator().manual_seed(5)
    x = {p: torch.randn(N, width, generator=generator, dtype=torch.float64) for p, width in WIDTH.items()}
    joined = torch.cat(list(x.values()), 1)
    index = torch.arange(N)
    division = {"train": index[:TRAIN], "validation": index[TRAIN:70], "test": index[70:]}
    found = {}
    for party in ("a", "b", "c", "server"):
        mine = tuple(target for at, target in TASKS.values() if at == party)
        y = {t.name: joined[:, 0].clamp(-1, 1).round() + 1 if t.kind == "classes" else labels(t, joined) for t in mine}
        found[party] = Records(
            x.get(party, torch.zeros(N, 0)),
            next(iter(y.values()), torch.zeros(N)),
            classes=mine[0].outputs if mine else 0,
            numeric=(),
            division=division,
            targets=mine,
            more=y,
        )
    return found


def tasks_loop(whole: Federation, left_out: str = "") -> float:
    plain = Joined(whole)
    nets = plain.nets

    def loss(rows: Tensor) -> Tensor:
        parts = [nets[f"bottom_{p}"](plain.sources[p].features[rows]) for p in WIDTH]
        z = nets["joined"](torch.cat(parts, 1))
        return sum(
            loss_of(target)(nets[f"trunk_{name}"](z), plain.sources[party].records.targets[name][rows]) / len(rows)
            for name, (party, target) in TASKS.items()
            if name != left_out
        )

    plain.train(loss)
    return max(far for name, far in plain.far().items() if name != f"trunk_{left_out}")


def test_several_tasks_equal_their_summed_losses() -> None:
    whole = federation(multi_task(), tasks_of())
    whole.run()
    assert tasks_loop(whole) < 1e-10
    for name in TASKS:
        assert tasks_loop(whole, left_out=name) > 1e-5
    same_bits_in_any_order(lambda: federation(multi_task(), tasks_of()), 3)
    scored = {e.target.name for a in whole.parties.values() for e in a.evaluations.values() if e.all}
    assert scored == set(TASKS)


# -- one target over columns of the same patients, at a party that has nothing else


def vertical(kind: str) -> Federation:
    def net(inputs: int, outputs: int) -> dict[str, Any]:
        arguments = {"inputs": inputs, "hidden": [5], "classes": outputs}
        return {"build": "partway.model.zoo:mlp", "arguments": arguments}

    target = KINDS[kind]
    words: dict[str, dict[str, Any]] = {
        "job": {"name": "joined", "seed": 1},
        "records": {"schema": "dataset"},
        "training": {"configuration": "vertical", "epochs": 4, "batch": 16, "dtype": "float64", "keep": "last"},
        **{f"networks.bottom_{p}": net(width, 4) for p, width in WIDTH.items()},
        "networks.trunk": net(8, target.outputs),
        **{f"holds.{p}": {"columns": [f"{p}{n}" for n in range(width)]} for p, width in WIDTH.items()},
        "holds.c": {"targets": ["t"]},
    }
    given = tasks_of()
    joined = torch.cat([given[p].features for p in WIDTH], 1)
    y, division = labels(target, joined), given["a"].division
    nothing = {"numeric": (), "division": division, "classes": 0}
    found = {p: Records(given[p].features, torch.zeros(N), **nothing) for p in WIDTH}
    found["c"] = Records(torch.zeros(N, 0), y, **nothing | {"classes": target.outputs}, targets=(target,))
    return federation(read_job(toml(words)), found)


@pytest.mark.parametrize("kind", KINDS)
def test_over_columns_equals_its_plain_loop(kind: str) -> None:
    whole, target = vertical(kind), KINDS[kind]
    whole.run()

    def far(loss: Callable[[Tensor, Tensor], Tensor]) -> float:
        plain = Joined(whole)

        def of(rows: Tensor) -> Tensor:
            parts = [plain.nets[f"bottom_{p}"](plain.sources[p].features[rows]) for p in WIDTH]
            return loss(plain.nets["trunk"](torch.cat(parts, 1)), plain.sources["c"].labels[rows]) / len(rows)

        plain.train(of)
        return max(plain.far().values())

    loss = loss_of(target)
    assert far(loss) < 1e-10
    assert far(lambda x, y: loss(x, y.flip(0))) > 1e-4  # the labels of other patients


# -- the loop of `plain_run`, which the demo and the processes' tests use


@pytest.mark.parametrize("kind", ["binary", "discrete time"])
def test_the_plain_run_knows_every_target(kind: str) -> None:
    whole = run(kind, keep="best", patience=2, epochs=12)
    network, losses = equality_of(whole)
    assert difference(whole, network) < 1e-10
    assert len(losses) == len(whole.parties["server"].party.worker.losses)
    other, _ = equality_of(whole, other_order=True)
    assert difference(whole, other) > 1e-4


def test_class_weights_of_yes_and_no() -> None:
    whole = run("binary", class_weights="sqrt")
    network, _ = equality_of(whole)
    assert difference(whole, network) < 1e-10
    whole.job = msgspec.structs.replace(
        whole.job, training=msgspec.structs.replace(whole.job.training, class_weights="none")
    )
    plain, _ = equality_of(whole)
    assert difference(whole, plain) > 1e-4
