"""Plans that nobody named: segments anywhere, any edges between them, each against the same graph in one place."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from federations import SIZES, records_of
from partway.config import Job, read_job
from partway.data.records import Records
from partway.local import toml
from partway.model.segment import initialise
from partway.plan.plan import EACH, Plan
from partway.simulation import Federation, federation
from partway.train.draws import first_weights
from partway.transport.memory import Wire
from plain import Everything, Joined, weights_at

WIDTH, N, TRAIN = 6, 60, 40


def drawn(seed: int, laned: bool) -> dict[str, dict[str, Any]]:
    """A job with two to five segments; each takes what one to three earlier ones put out, added."""
    rng = random.Random(seed)
    holders = ["data"] if laned else [f"data_{p}" for p in rng.sample("pqr", rng.randint(1, 3))]
    segments: list[dict[str, Any]] = [
        {"name": name, "at": EACH if laned else name[-1], "kind": "records"} for name in holders
    ]
    edges: list[dict[str, Any]] = []
    names = [f"s{n}" for n in range(rng.randint(2, 5))]
    for number, name in enumerate(names):
        first = number < len(holders)
        at = segments[number]["at"] if first else rng.choice([EACH, "server"] if laned else ["p", "q", "r", "server"])
        more = {"copies": EACH} if laned and at == "server" and rng.random() < 0.3 else {}
        segments.append({"name": name, "at": at, "join": "sum", **more})
        if first:
            edges.append({"source": holders[number], "target": name})
            continue
        before = rng.sample(names[:number], rng.randint(1, min(3, number)))
        edges += [{"source": source, "target": name} for source in before]
    last = names[-1]
    for name in names[:-1]:  # nobody's output is for nothing
        if not any(edge["source"] == name for edge in edges):
            edges.append({"source": name, "target": last})
    edges.append({"source": rng.choice(holders), "target": last, "kind": "labels"})

    def net(outputs: int) -> dict[str, Any]:
        arguments = {"inputs": WIDTH, "hidden": [16], "classes": outputs}
        return {"build": "partway.model.zoo:mlp", "arguments": arguments}

    words = {
        "job": {"name": "drawn", "seed": seed},
        "records": {"schema": "dataset"},
        "training": {"configuration": "plan", "epochs": 2, "batch": 16, "dtype": "float64", "keep": "last"},
        "evaluation": {"every": 0, "trunk_travels": False},
        "plan": {"segments": segments, "edges": edges},
        **{f"networks.{name}": net(3 if name == last else WIDTH) for name in names},
    }
    if not laned:
        labels = next(edge["source"] for edge in edges if edge.get("kind") == "labels")
        for name in holders:
            columns = [f"{name}{n}" for n in range(WIDTH)]
            words[f"holds.{name[-1]}"] = {"columns": columns, "targets": ["y"] if name == labels else []}
    return words


def job_of(words: dict[str, dict[str, Any]]) -> Job:
    return read_job(toml(words))


def built(job: Job, laned: bool) -> Federation:
    if laned:
        return federation(job, {site: records_of(site, n) for site, n in SIZES.items()})
    index, found = torch.arange(N), {}
    division = {"train": index[:TRAIN], "validation": index[TRAIN:50], "test": index[50:]}
    for party, held in job.holds.items():
        generator = torch.Generator().manual_seed(ord(party))
        x = torch.randn(N, WIDTH, generator=generator, dtype=torch.float64)
        y = x[:, 0].clamp(-1, 1).round().long() + 1
        classes = 3 if held.targets else 0
        found[party] = Records(x, y, classes=classes, numeric=(), division=division)
    return federation(job, found)


def batches(whole: Federation, other_order: bool) -> list[tuple[dict[str, Tensor], Tensor]]:
    """What goes into each source in each step, with the labels."""
    plan = whole.parties["server"].plan
    if plan.sites:
        all_, found = Everything(whole), []
        for _, turn in all_.steps():
            parts = [all_.part(site, turn) for site in plan.sites if turn.rows[0].get(site)]
            x, y = (torch.cat(part) for part in zip(*parts, strict=True))
            found.append(({"data": x.flip(1) if other_order else x}, y))
        return found
    plain, found = Joined(whole, other_order), []
    for rows in plain.rows():
        y = next(s.labels[rows] for s in plain.sources.values() if s.records.schema.classes)
        found.append(({f"data_{party}": s.features[rows] for party, s in plain.sources.items()}, y))
    return found


def in_one_place(whole: Federation, other_order: bool = False) -> float:
    """The graph as it is drawn, one optimiser, all records; how far from what the parties have come to."""
    plan: Plan = whole.parties["server"].plan
    owner = {n: "a" if plan[n].at == EACH else plan[n].at for n in plan.nets}
    nets = {n: next(iter(whole.parties.values())).network.modules[n] for n in plan.nets}
    for name, module in nets.items():
        initialise(module, first_weights(whole.secrets[owner[name]], whole.digest, name))
    optimizer = torch.optim.Adam([p for m in nets.values() for p in m.parameters()], whole.job.training.optimizer.lr)
    for values, y in batches(whole, other_order):
        made = dict(values)
        for name in plan.nets:
            into = [made[e.source] for e in plan.edges("split") if e.target == name and e.kind == "activations"]
            made[name] = nets[name](sum(into))
        optimizer.zero_grad()
        nn.functional.cross_entropy(made[plan.nets[-1]], y).backward()
        optimizer.step()
    flat = {n: nn.utils.parameters_to_vector(m.parameters()).detach() for n, m in nets.items()}
    segments = [(c.segment, s) for a in whole.parties.values() for c, s in a.party.worker.segments.items()]
    return max(float((s.weights() - flat[n]).abs().max()) for n, s in segments if n in flat)


@pytest.mark.parametrize("laned", [True, False], ids=["with lanes", "without"])
@pytest.mark.parametrize("seed", range(12))
def test_equals_the_graph_in_one_place_in_any_order_of_delivery(seed: int, laned: bool) -> None:
    job = job_of(drawn(seed, laned))
    whole = built(job, laned)
    whole.run()
    assert in_one_place(whole) < 1e-10
    assert in_one_place(whole, other_order=True) > 1e-5
    again = built(job, laned)
    again.run(Wire(seed))
    found, expected = weights_at(again), weights_at(whole)
    for copy in expected:  # without an evaluation no trunk has visited a site
        assert copy.segment.endswith("_here") or torch.equal(found[copy], expected[copy])
