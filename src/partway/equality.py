"""The pooled loop that a synchronous run must equal: the same records in the same order, from the same first weights.

Only who has every party's secret can run it: tests and the demo, where one person is everybody.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from partway.assembly import DTYPES, network_of, optimizer_of, plan_of
from partway.config import Job, Policy
from partway.data.records import Records, deviation_of, mean_of, moments, squares
from partway.model.segment import initialise
from partway.train import baselines
from partway.train.draws import first_weights
from partway.train.source import RecordSource


def pooled_loop(
    job: Job,
    digest: bytes,
    secrets: Mapping[str, bytes],
    records: Mapping[str, Records],
    *,
    server: str = "server",
    other_order: bool = False,
) -> tuple[nn.Module, list[float]]:
    """One PyTorch loop over all records in one place; the trained network, and the loss of each step.

    Nothing of the protocol runs here: the records are standardised together, one network is trained by one optimiser
    on the union batches.

    Args:
        digest: of the signed job; what is drawn depends on it.
        secrets: of every party.
        records: by site.
        other_order: draws the records' order from other secrets: the control that must differ.
    """
    first = next(iter(records.values()))
    allowed = Policy(networks=[job.network.build], most_parameters=2**31 - 1)
    network = network_of(job, allowed, first.schema)
    plan, schedule = plan_of(job, server)
    for name, module in network.modules.items():
        owner = job.sites[0] if plan[name].laned else server
        initialise(module, first_weights(secrets[owner], digest, name))
    sources = {}
    for site, own in records.items():
        secret = bytes(32) if other_order else secrets[site]
        sources[site] = RecordSource(own, secret, digest, DTYPES[job.training.dtype])
    standardise_together(list(sources.values()))
    turns = schedule({site: own.sizes for site, own in records.items()})
    batches = baselines.union_batches(turns, job.sites, {site: source.take for site, source in sources.items()})
    return network.whole, baselines.train(network.whole, optimizer_of(job.training.optimizer), batches)


def standardise_together(sources: list[RecordSource]) -> None:
    """What pooling would do: statistics of all training records in one pass over them."""
    if not sources[0].records.schema.numeric:
        return
    training = [s.records.features[s.records.division["train"]][:, s.records.numeric] for s in sources]
    measured, mean = mean_of(moments(torch.cat(training)))
    deviation = deviation_of(measured, squares(torch.cat(training), mean))
    for source in sources:
        source.standardise(mean, deviation)
