"""Networks that are no sequences train between parties as they do in one place."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from federations import difference, job_of, pooled, small
from partway.errors import CutError, Refused
from partway.model.segment import initialise

ADAM = {"name": "adam", "lr": 0.02}


def job(cut: list[str], more: dict[str, Any] | None = None, **training: Any) -> Any:
    network = {"build": "residual_network:residual", "arguments": {}, "cut": cut, **(more or {})}
    return job_of({"network": network}, optimizer=ADAM, **training)


CUTS = {"vanilla": ["gate"], "u_shaped": ["first", "middle"]}


@pytest.mark.parametrize("configuration", CUTS)
def test_equals_one_loop(configuration: str) -> None:
    """Values and a mask cross in one tensor; first weights come from the network's own code."""
    whole = small(job(CUTS[configuration], configuration=configuration))
    whole.run()
    assert difference(whole, pooled(whole)[0]) < 1e-10
    assert difference(whole, pooled(whole, other_order=True)[0]) > 1e-4
    crossing = whole.parties["a"].network.outputs
    assert {name: made.shape[1] for name, made in crossing.items() if name != list(crossing)[-1]} == (
        {"bottom": 8 + 8 + 4} if configuration == "vanilla" else {"bottom": 8, "trunk": 8 + 8}
    )


def test_what_would_pass_by_a_party_is_refused() -> None:
    with pytest.raises(CutError, match="`drop:0` would pass by a party"):
        small(job(["gate", "middle"], configuration="u_shaped"))


def test_first_weights_come_from_the_secret_and_the_network_s_own_code() -> None:
    parts = small(job(CUTS["vanilla"])).parties["a"].network.modules
    before = parts["bottom"].state_dict()["shift"].clone()
    initialise(parts["bottom"], bytes(32))
    first = {name: t.clone() for name, t in parts["bottom"].state_dict().items()}
    initialise(parts["bottom"], bytes(31) + b"1")
    assert not torch.equal(before, first["shift"])
    assert not any(torch.equal(first[name], t) for name, t in parts["bottom"].state_dict().items())
    initialise(parts["bottom"], bytes(32))
    assert all(torch.equal(first[name], t) for name, t in parts["bottom"].state_dict().items())


def test_batchnorm_is_refused_and_group_norm_offered() -> None:
    normalised = {"arguments": {"normalised": True}}
    with pytest.raises(
        Refused, match=r"the bottom has BatchNorm at norm, .* \[network\] group_norm = 4 puts GroupNorm"
    ):
        small(job(CUTS["vanilla"], normalised))
    whole = small(job(CUTS["vanilla"], {**normalised, "group_norm": 4}))
    whole.run()
    network, _ = pooled(whole)
    assert difference(whole, network) < 1e-10
    assert isinstance(network.norm, nn.GroupNorm)
