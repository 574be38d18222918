"""A network that a job has left at a party that may hold all of it: loaded, used on records, written for others."""

from __future__ import annotations

import importlib.util
import json
import logging
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from partway.assembly import network_of, schema_of
from partway.blueprint import Shipped, nowhere
from partway.config import Job, of_any_size
from partway.data.predictions import names_of, told_of, written
from partway.data.schema import columns_of, features_of
from partway.data.table import Table, unlabelled
from partway.errors import UsageError
from partway.report import read_left, write_whole

ZOO = ("partway.model.zoo:mlp", "partway.model.zoo:cnn", "partway.model.zoo:resnet")
"""Networks that are built without asking, for they are Partway's own."""


class Finished(nn.Module):
    """A trained network with the scaling of its inputs: from a record's features as read to what is told of it.

    Args:
        numeric: which features are scaled.
        mean, deviation: of each of them, shape (numeric,).
    """

    mean: Tensor
    deviation: Tensor

    def __init__(self, job: Job, network: nn.Module, numeric: Sequence[int], mean: Tensor, deviation: Tensor) -> None:
        super().__init__()
        self.job, self.network, self.target = job, network, schema_of(job).target()
        self.names = names_of(columns_of(job), self.target)
        """Of the numbers that come out."""
        mean_F, deviation_F = torch.zeros(2, *schema_of(job).shape)
        deviation_F += 1
        mean_F[list(numeric)], deviation_F[list(numeric)] = mean, deviation
        self.register_buffer("mean", mean_F)
        self.register_buffer("deviation", deviation_F)

    def forward(self, features: Tensor) -> Tensor:
        """Features, shape (records, features), NaN where a value was not measured, to shape (records, outputs).

        What the outputs say is in `told_of`.
        """
        scaled = (features - self.mean) / self.deviation
        outputs: Tensor = self.network(torch.where(torch.isnan(scaled), 0.0, scaled))
        return told_of(columns_of(self.job), self.target, outputs)


def load(path: Path, allowed: Sequence[str] = ZOO, shipped: Shipped = nowhere) -> Finished:
    """The network in `network.safetensors`, or in a folder that has one.

    Args:
        allowed: names of networks that may be imported and built.
        shipped: reads its segments that have come as signed folders.

    Raises:
        UsageError: there is no whole network, or it is no file that Partway has written.
        Refused: the network's name is not allowed.
    """
    file = path / "network.safetensors" if path.is_dir() else path
    if not file.exists():
        half = " (it has half of one, and another party the other: they predict together, by a job with [predict])"
        there = path.is_dir() and (path / "segments.safetensors").exists()
        raise UsageError(f"{path} has no network.safetensors{half if there else ''}")
    left = read_left(file)
    job, scaling, weights = left.job, left.scaling, left.weights
    if not job.laned:
        words = "its parties hold columns of the same patients: they predict together, by a job with [predict]"
        raise UsageError(f"{file}: {words}")
    network = network_of(job, of_any_size(allowed), schema_of(job), shipped=shipped).whole
    numeric = [n for n, feature in enumerate(features_of(columns_of(job), job.records.scale)) if feature.by_statistics]
    nothing = torch.empty(0)
    mean, deviation = scaling.get("mean", nothing), scaling.get("deviation", nothing)
    try:
        network.load_state_dict(weights)
    except RuntimeError as error:
        raise UsageError(f"{file}: its weights are not those of its network ({str(error).splitlines()[0]})") from None
    if not len(mean) == len(deviation) == len(numeric):
        raise UsageError(f"{file}: it scales {len(mean)} columns; the schema has {len(numeric)} that need it")
    return Finished(job, network, numeric, mean, deviation).float().eval()


def predict(finished: Finished, table: Table, site: str | None = None, units: Mapping[str, str] | None = None) -> str:
    """What the network says of every record of a file, as CSV; no label is read.

    Of classes the likeliest comes first, then the probability of each.

    Args:
        site: only this one's rows, by the schema's site column.
        units: as in a site's file.

    Raises:
        DataError: the file does not fit the schema.
    """
    job = finished.job
    columns = columns_of(job)
    records = unlabelled(table, columns, job.records.scale, job.records.target, site=site, units=units)
    with torch.no_grad():
        told = finished(records.features.float())
    return written(columns, finished.target, told, records.called, records.names)


def export(finished: Finished, path: Path) -> None:
    """Writes the network with its scaling as ONNX: input `features`; output `probabilities`, or `predicted`.

    The names of features and of what comes out, in order, stand in the model's metadata.

    Raises:
        UsageError: the packages that write ONNX are not installed, or a segment came without code.
    """
    if finished.job.shipped:
        raise UsageError("segments that came without code run in a process of their own, and cannot be written as ONNX")
    if any(importlib.util.find_spec(name) is None for name in ("onnx", "onnxscript")):
        raise UsageError("ONNX needs two more packages: install partway[onnx]")
    columns, scale = columns_of(finished.job), finished.job.records.scale
    names = [feature.name for feature in features_of(columns, scale)]
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # it says at length what it has not installed
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        program = torch.onnx.export(
            finished,
            (torch.zeros(2, len(names)),),
            input_names=["features"],
            output_names=["predicted" if finished.target.kind in ("regression", "survival") else "probabilities"],
            dynamic_shapes={"features": {0: torch.export.Dim("records")}},
            dynamo=True,
            verbose=False,
        )
    assert program is not None
    program.model.metadata_props.update(features=json.dumps(names), classes=json.dumps(finished.names))
    write_whole(path, program.model_proto.SerializeToString())
