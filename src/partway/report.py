"""What a run leaves behind: `Result`, as `result.json` and as a network that can be loaded again."""

from __future__ import annotations

import json
import platform
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import msgspec
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from partway import __version__
from partway.config import Job
from partway.cost import Cost
from partway.errors import JobFailed, UsageError


@dataclass
class Result:
    """One party's account of a run, or, from `simulate`, everybody's.

    A row of scores has `records`, `accuracy`, `balanced_accuracy`, `macro_auc` and `classes`.
    """

    job: dict[str, Any]
    party: str
    seconds: float = 0.0
    steps: int = 0
    losses: list[float] = field(default_factory=list)
    """The mean loss of each step, at a party that has the labels."""
    validation: list[dict[str, Any]] = field(default_factory=list)
    """Scores over all sites' validation records, by `epoch`, from blind sums."""
    all: dict[str, Any] = field(default_factory=dict)
    """Scores over all sites' test records, from blind sums; of several targets those of the first known here."""
    targets: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Where there are several targets: the same of each that this party has scores of."""
    sites: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Sites' own exact scores on their test records, as far as this party knows them."""
    cost: dict[str, Cost] = field(default_factory=dict)
    plan: dict[str, Any] = field(default_factory=dict)
    """Where each segment lives, and the edges of every flow that ran."""
    holds: dict[str, list[str]] = field(default_factory=dict)
    """Which party holds which segments at the end, by the job's terms."""
    ledgers: dict[str, str] = field(default_factory=dict)
    """Heads of the parties' ledgers, as far as they were told."""
    chosen: dict[str, str] = field(default_factory=dict)
    """Of `private` with a gate: whether a site's network is its `own` or the `shared` one, as far as known here."""
    machine: dict[str, Any] = field(default_factory=dict)
    scaling: dict[str, list[float]] = field(default_factory=dict)
    """`mean` and `deviation` of the columns that all sites' statistics scale, at a party that knows them."""
    whole: bool = False
    """Whether `weights` are the whole network."""
    weights: dict[str, Tensor] = field(default_factory=dict, repr=False)
    """What this party may hold, by original name; not part of `result.json`."""
    predictions: dict[str, str] = field(default_factory=dict, repr=False)
    """Of a job that predicts, at who holds the labels: by target, a CSV file; not part of `result.json`."""

    def words(self) -> dict[str, Any]:
        """Everything but the weights, as plain data."""
        named = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in _APART}
        return named | {"cost": {party: asdict(cost) for party, cost in self.cost.items()}}

    def write(self, folder: Path) -> list[Path]:
        """`result.json`, and the weights: `network.safetensors` if they are the whole, else `segments.safetensors`.

        Or predictions: `predictions.csv`, or a file for each of several targets, `predictions-TARGET.csv`.

        Each file is written whole or not at all, and `result.json` last: where it is, the others are. Raises
        `JobFailed` if the disk does not take them.
        """
        folder.mkdir(parents=True, exist_ok=True)
        files = [folder / "result.json"]
        if self.weights:
            files.append(folder / ("network.safetensors" if self.whole else "segments.safetensors"))
            metadata = {"job": json.dumps(self.job), "scaling": json.dumps(self.scaling)}
            contiguous = {name: tensor.contiguous() for name, tensor in self.weights.items()}
            write_whole(files[-1], save(contiguous, metadata=metadata))
        for target, text in self.predictions.items():
            several = f"-{target}" if len(self.predictions) > 1 else ""
            files.append(folder / f"predictions{several}.csv")
            write_whole(files[-1], text.encode())
        write_whole(files[0], json.dumps(self.words(), indent=2).encode())
        return files


_APART = ("weights", "predictions")
"""Files of their own."""


@dataclass(frozen=True)
class Left:
    """What a job has left at a party of its network."""

    job: Job
    scaling: dict[str, Tensor]
    """Mean and deviation, as in `Result.scaling`."""
    weights: dict[str, Tensor]


def read_left(file: Path) -> Left:
    """What `Result.write` has written. Raises `UsageError` if it is no such file."""
    try:
        with safe_open(file, framework="pt") as opened:
            metadata, weights = opened.metadata() or {}, {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        job = msgspec.convert(json.loads(metadata["job"]), Job)
        scaling = {name: torch.tensor(numbers) for name, numbers in json.loads(metadata["scaling"]).items()}
    except (SafetensorError, OSError, KeyError, ValueError, msgspec.ValidationError) as error:
        raise UsageError(f"{file}: no network that a job has left ({str(error).splitlines()[0]})") from None
    return Left(job, scaling, weights)


def write_whole(path: Path, data: bytes) -> None:
    """A file is there whole, or as it was before. Raises `JobFailed` if the disk does not take it."""
    beside = path.with_name(path.name + ".part")
    try:
        beside.write_bytes(data)
        beside.replace(path)
    except OSError as error:
        raise JobFailed(f"{path} cannot be written ({error.strerror})") from None


def machine(threads: int) -> dict[str, Any]:
    """What "the same bits" depends on."""
    return {
        "partway": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "cpu": _cpu(),
        "threads": threads,
        "cuda": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
