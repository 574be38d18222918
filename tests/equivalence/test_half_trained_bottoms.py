"""`half_trained` without averaging: the largest site's bottom for everybody."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
import torch
from torch import nn

from federations import SITES, SIZES, job_of, small
from partway.config import Job
from partway.errors import Refused
from partway.plan.batches import equal_parts
from partway.plan.plan import Copy
from partway.protocol.messages import LetterKind
from partway.simulation import Federation, permissive
from plain import OPTIMIZERS, Everything, built, far, made, same_bits_in_any_order

SIZES_B = {"a": 25, "b": 40, "c": 1, "d": 9, "e": 14}
"""The largest is not the first."""
HALF: dict[str, Any] = {"rounds": 2, "local_epochs": 3, "batch": 8}


def half(half_trained: dict[str, Any], sections: Any = None, **training: Any) -> Job:
    return job_of(sections, schedule="half_trained", half_trained={**HALF, **half_trained}, **training)


def ran(job: Job, sizes: dict[str, int] = SIZES_B) -> Federation:
    whole = built(job, sizes)
    whole.run()
    return whole


def train(everything: Everything, network: nn.Module, optimizer: torch.optim.Optimizer, x: Any, y: Any) -> None:
    """One step on the mean loss of a batch."""
    optimizer.zero_grad()
    nn.functional.cross_entropy(network(x), y).backward()
    optimizer.step()


def at_the_server(everything: Everything, trunk: nn.Module, x: torch.Tensor, y: torch.Tensor, start: int) -> None:
    """The trunk on what was released, in the server's order."""
    training = everything.whole.job.training
    optimizer = made(everything.whole, trunk)
    for epoch in range(start, start + training.epochs):
        order = everything.order("server", len(y), epoch)
        for begin, end in equal_parts(len(y), training.batch):
            train(everything, trunk, optimizer, x[order[begin:end]], y[order[begin:end]])


def of_one_site(whole: Federation, site: str) -> dict[Copy, nn.Module]:
    """That site's bottom and local head, then the trunk on what this bottom makes of everybody's records."""
    everything, terms = Everything(whole), whole.job.training.half_trained
    bottom, head = everything.first("bottom", site), everything.first("local_head", site)
    optimizer, epochs = made(whole, bottom, head, local=True), terms.rounds * terms.local_epochs
    for epoch in range(epochs):
        x, y = everything.rows(site, "train", epoch)
        for begin, end in equal_parts(len(y), terms.batch):
            train(everything, nn.Sequential(bottom, head), optimizer, x[begin:end], y[begin:end])
    trunk = everything.first("trunk", "server")
    with torch.no_grad():
        released = [everything.rows(s, "train", epochs) for s in SITES]
        x, y = torch.cat([bottom(x) for x, _ in released]), torch.cat([y for _, y in released])
    at_the_server(everything, trunk, x, y, epochs)
    return {**{Copy("bottom", s): bottom for s in SITES}, Copy("local_head", site): head, Copy("trunk"): trunk}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("local_head", ["linear", "hidden"])
def test_the_largest_site_s_bottom_for_everybody(optimizer: str, local_head: str) -> None:
    terms = {"bottoms": "largest", "local_head": local_head, "optimizer": OPTIMIZERS[optimizer]}
    whole = ran(half(terms, epochs=4, optimizer=OPTIMIZERS[optimizer]))
    assert far(whole, of_one_site(whole, "b")) < 1e-10
    assert far(whole, {c: m for c, m in of_one_site(whole, "a").items() if c.segment == "trunk"}) > 1e-4
    averaged = ran(half({**terms, "bottoms": "averaged"}, epochs=4, optimizer=OPTIMIZERS[optimizer]))
    assert far(averaged, {Copy("bottom", "a"): of_one_site(whole, "b")[Copy("bottom", "a")]}) > 1e-3


def test_nothing_is_computed_at_the_others_and_one_sealed_hand_over_a_site_crosses() -> None:
    whole = ran(half({"bottoms": "largest"}))
    session = whole.parties["b"].party.session
    assert {lane for turn in session.turns if turn.flow == "local" for rows in turn.rows for lane in rows} == {"b"}
    assert not any(what != "tally" for turn in session.turns for what, _ in turn.sums)
    given = [
        (route.sender, route.receiver)
        for net in session.nets
        for post, route in net.letters.items()
        if post.kind is LetterKind.STATE and post.target.segment == "bottom"
    ]
    assert given == [("b", site) for site in "acde"]
    assert all(whole.parties["b"].party.worker.shapes.sealed(*pair) for pair in given)
    flops = {site: cost.party.cost.flops for site, cost in whole.parties.items()}
    assert flops["b"] > 5 * flops["a"]


def test_a_policy_asks_for_enough_records_behind_a_hand_over() -> None:
    def run(least: int, sizes: dict[str, int], **half_trained: Any) -> None:
        policy = msgspec.structs.replace(permissive("partway.model.zoo:mlp"), least_records_in_hand_over=least)
        small(half(half_trained), sizes, policies={"b": policy}).run()

    run(40, SIZES_B, bottoms="largest")
    with pytest.raises(Refused, match=r"b would hand a weights that only 40 of its records.*in_hand_over is 41"):
        run(41, SIZES_B, bottoms="largest")
    run(41, SIZES_B, bottoms="averaged")


def test_the_bits_do_not_depend_on_delivery() -> None:
    sections = {"evaluation": {"every": 1, "site_scores": True}, "result": {"bottom": "everyone", "trunk": "everyone"}}
    more: dict[str, Any] = {"bottoms": "largest", "synchronous_epochs": 1}
    same_bits_in_any_order(half(more, sections), SIZES, half({**more, "batch": 9}, sections))
