"""A network that a job has left at a party that may hold all of it: loaded, used on records, written for others."""

from __future__ import annotations

import csv
import importlib.util
import io
import json
import logging
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path

import msgspec
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from partway.assembly import network_of, schema_of
from partway.config import ClassesTarget, Job, MultiLabelTarget, Policy, RegressionTarget, SurvivalTarget
from partway.data.labels import learnt
from partway.data.schema import columns_of, features_of
from partway.data.table import Checked, Table
from partway.errors import DataError, UsageError
from partway.report import write_whole
from partway.train.scoring import survival

ZOO = ("partway.model.zoo:mlp", "partway.model.zoo:cnn")
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
        self.names = names_of(job)
        """Of the numbers that come out."""
        mean_F, deviation_F = torch.zeros(2, *schema_of(job).shape)
        deviation_F += 1
        mean_F[list(numeric)], deviation_F[list(numeric)] = mean, deviation
        self.register_buffer("mean", mean_F)
        self.register_buffer("deviation", deviation_F)

    def forward(self, features: Tensor) -> Tensor:
        """Features, shape (records, features), NaN where a value was not measured, to shape (records, outputs).

        Probabilities of classes and of answers; a number in its own unit; of survival the chance to live until the end
        of each interval, or a risk: how many times that of a record for which the network puts out 0.
        """
        scaled = (features - self.mean) / self.deviation
        outputs: Tensor = self.network(torch.where(torch.isnan(scaled), 0.0, scaled))
        if self.target.kind == "classes":
            return outputs.softmax(1)
        if self.target.kind in ("binary", "multi_label"):
            return outputs.sigmoid()
        if self.target.kind == "survival":
            return survival(outputs) if self.target.intervals else outputs.exp()
        settings = columns_of(self.job).targets[self.target.name]
        assert isinstance(settings, RegressionTarget)
        return learnt(settings, outputs)


def names_of(job: Job) -> tuple[str, ...]:
    """What each number that comes out of a job's network is called."""
    columns, target = columns_of(job), schema_of(job).target()
    settings = columns.targets.get(target.name)
    if settings is None:
        return tuple(columns.classes)
    if isinstance(settings, ClassesTarget):
        return tuple(settings.classes)
    if isinstance(settings, MultiLabelTarget):
        return settings.columns
    unit = f" {settings.unit}" if isinstance(settings, RegressionTarget | SurvivalTarget) and settings.unit else ""
    if isinstance(settings, SurvivalTarget):
        return tuple(f"after {end:g}{unit}" for end in settings.intervals) or ("risk",)
    return (f"{target.name}{f' in{unit}' if unit else ''}",)


def load(path: Path, allowed: Sequence[str] = ZOO) -> Finished:
    """The network in `network.safetensors`, or in a folder that has one.

    Args:
        allowed: names of networks that may be imported and built.

    Raises:
        UsageError: there is no whole network, or it is no file that Partway has written.
        Refused: the network's name is not allowed.
    """
    file = path / "network.safetensors" if path.is_dir() else path
    if not file.exists():
        half = " (it has half of one: the job's [result] gives the other to somebody else)"
        there = path.is_dir() and (path / "segments.safetensors").exists()
        raise UsageError(f"{path} has no network.safetensors{half if there else ''}")
    try:
        with safe_open(file, framework="pt") as opened:
            metadata, weights = opened.metadata() or {}, {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        job = msgspec.convert(json.loads(metadata["job"]), Job)
        scaling = {name: torch.tensor(numbers) for name, numbers in json.loads(metadata["scaling"]).items()}
    except (SafetensorError, OSError, KeyError, ValueError, msgspec.ValidationError) as error:
        raise UsageError(f"{file}: no network that a job has left ({str(error).splitlines()[0]})") from None
    if not job.laned:
        words = "its parties hold columns of the same patients: predicting with all of them is not there yet"
        raise UsageError(f"{file}: {words}")
    network = network_of(job, Policy(networks=list(allowed), most_parameters=2**31 - 1), schema_of(job)).whole
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
    columns = columns_of(finished.job)
    checked = Checked(table, columns, targets=())
    checked.structure(site, units or {})
    checked.content(site)
    if checked.faults:
        raise DataError(f"{table.path}: {'; '.join(fault.words for fault in checked.faults)}")
    features = torch.stack([f.values for f in checked.features(finished.job.records.scale)], 1)
    with torch.no_grad():
        told = finished(features.float())
    names, text, classes = finished.names, io.StringIO(), finished.target.kind == "classes"
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([table.row, *(["predicted"] if classes else []), *names])
    for row, found in zip(checked.rows, told, strict=True):
        likeliest = [names[int(found.argmax())]] if classes else []
        writer.writerow([row, *likeliest, *(f"{number:.6f}" for number in found.tolist())])
    return text.getvalue()


def export(finished: Finished, path: Path) -> None:
    """Writes the network with its scaling as ONNX: input `features`; output `probabilities`, or `predicted`.

    The names of features and of what comes out, in order, stand in the model's metadata.

    Raises:
        UsageError: the packages that write ONNX are not installed.
    """
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
