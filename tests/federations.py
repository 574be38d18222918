"""Small federations for the tests: five sites with 0, 1 and many records in a step, and the pooled loop beside them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from partway.config import Job, read_job
from partway.data.records import Records
from partway.equality import plain_run
from partway.local import toml
from partway.simulation import Federation, federation
from partway.train.source import RecordSource
from partway.transport.memory import Wire
from partway.wire import frames

SITES = ("a", "b", "c", "d", "e")
SIZES = {"a": 40, "b": 25, "c": 1, "d": 9, "e": 14}


def job_of(sections: Mapping[str, Mapping[str, Any]] | None = None, **training: Any) -> Job:
    """A small job; `training` is its `[training]`, `sections` changes others."""
    u_shaped = training.get("configuration") == "u_shaped"
    words: dict[str, dict[str, Any]] = {
        "job": {"name": "small", "seed": 5},
        "network": {
            "build": "partway.model.zoo:mlp",
            "arguments": {"inputs": 6, "hidden": [8, 5], "classes": 3},
            "cut": ["hidden.1", "hidden.3"] if u_shaped else ["hidden.1"],
        },
        "records": {"schema": "dataset"},
        "training": {"epochs": 2, "batch": 16, "dtype": "float64", **training},
        "evaluation": {"every": 0, "trunk_travels": True},
    }
    for name, more in (sections or {}).items():
        words[name] = {**words.get(name, {}), **more}
    return read_job(toml(words))


def records_of(site: str, train: int, seed: int = 0) -> Records:
    """Random records of six features, of which three classes can be learnt."""
    generator = torch.Generator().manual_seed(1000 * seed + sum(map(ord, site)))
    total = train + 12 + 20
    features = torch.randn(total, 6, generator=generator, dtype=torch.float64)
    labels = (features[:, 0] * 1.5 + features[:, 1]).clamp(-1, 1).round().long() + 1
    index = torch.arange(total)
    division = {"train": index[:train], "validation": index[train : train + 12], "test": index[train + 12 :]}
    return Records(features, labels, classes=3, numeric=(), division=division)


def small(job: Job, sizes: Mapping[str, int] = SIZES, **more: Any) -> Federation:
    return federation(job, {site: records_of(site, n) for site, n in sizes.items()}, **more)


def pooled(whole: Federation, *, other_order: bool = False) -> tuple[nn.Module, list[float]]:
    """One plain loop over the same records in the same order, from the same first weights; and its losses."""
    records = {}
    for site in whole.job.sites:
        source = whole.parties[site].party.worker.source
        assert isinstance(source, RecordSource)
        records[site] = source.records
    return plain_run(whole.job, whole.digest, whole.secrets, records, other_order=other_order)


def difference(whole: Federation, network: nn.Module) -> float:
    """The largest difference of any parameter of any trained copy, at any party, from the network's."""
    state = network.state_dict()
    return max(
        float((tensor - state[name]).abs().max())
        for assembled in whole.parties.values()
        for copy_, segment in assembled.party.worker.segments.items()
        if not copy_.segment.endswith(("_here", "_there", "local_head"))
        for name, tensor in segment.tensors().items()
    )


def bits(whole: Federation) -> bytes:
    """Every weight of every copy at every party."""
    return b"".join(
        segment.weights().numpy().tobytes()
        for _, assembled in sorted(whole.parties.items())
        for _, segment in sorted(assembled.party.worker.segments.items())
    )


def same_bits_in_any_order(make: Callable[[], Federation], seeds: int, other: Federation | None = None) -> None:
    """However it is delivered it comes to the same weights and losses; another federation does not."""

    def ran(whole: Federation, wire: Wire | None = None) -> tuple[bytes, list[list[torch.Tensor]]]:
        whole.run(wire)
        return bits(whole), [assembled.party.worker.losses for assembled in whole.parties.values()]

    quiet = ran(make())
    for seed in range(seeds):
        assert ran(make(), Wire(seed)) == quiet
    if other is not None:
        assert ran(other)[0] != quiet[0]


def frames_of(out: Any) -> list[tuple[str, frames.Frame]]:
    """What a party would send, decoded."""
    return [(link, frames.decode(data, "a party")) for link, made in out for data in made]
