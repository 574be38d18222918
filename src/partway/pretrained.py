"""Weights that were trained elsewhere: a network's file in parts, one for each segment, that a job names by digest.

Each party gets its own part, and no other; the digest stands in the signed job, so that all start from the same.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load, load_file, save
from torch import Tensor, nn

from partway.blueprint import built, configured
from partway.config import Job, of_any_size
from partway.data.records import Schema
from partway.errors import Refused, UsageError
from partway.model.segment import Segment
from partway.plan.plan import Copy
from partway.protocol.messages import Reason


@dataclass(frozen=True)
class Part:
    """A segment's weights, in a file."""

    segment: str
    file: Path
    digest: str
    """SHA-256, in hexadecimal: what the job says."""
    tensors: int
    missing: tuple[str, ...]
    """Of the segment, and not in the network's file: these are drawn anew."""


def split(job: Job, schemas: Mapping[str, Schema], file: Path, folder: Path, without: Sequence[str] = ()) -> list[Part]:
    """Writes a part for each segment of a job's network; one that the file has nothing of gets none.

    Args:
        schemas: of each party that holds records.
        file: safetensors, with the network's own names.
        folder: where the parts go, as `DIGEST.safetensors`.
        without: beginnings of names that are left out, to be drawn anew, as of a last layer for other classes.

    Raises:
        UsageError: the file is damaged, or a tensor in it has no place in the network, or another shape there.
    """
    if job.network is None:
        raise UsageError(f"{job.job.name}: each segment has a network of its own, and none is cut")
    try:
        held = {n: t for n, t in load_file(file).items() if not n.startswith(tuple(without))}
    except (SafetensorError, OSError) as error:
        raise UsageError(f"{file} is no safetensors file that can be read: {error}") from None
    allowed = of_any_size(job.builds)
    network = built(job, allowed, configured(job), schemas)
    known = {name: tensor for module in network.modules.values() for name, tensor in module.state_dict().items()}
    for name in [n for n in held if n not in known]:  # beside an adapter, a layer's own weights have another name
        owner, _, leaf = name.rpartition(".")
        if f"{owner}.base_layer.{leaf}" in known:
            held[f"{owner}.base_layer.{leaf}"] = held.pop(name)
    for module in network.modules.values():  # of a tied weight a file may have one name, and it is all of its names
        for names in _by_tensor(module):
            given = [held[name] for name in names if name in held]
            held |= dict.fromkeys(names, given[0]) if given else {}
    for name, tensor in held.items():
        if name not in known:
            raise UsageError(f"{file}: the network has no tensor `{name}`; leave it out with --without {name}")
        if tensor.shape != known[name].shape:
            here, there = tuple(tensor.shape), tuple(known[name].shape)
            raise UsageError(
                f"{file}: `{name}` has the shape {here}, and {there} in the network; leave it out: --without"
            )
    folder.mkdir(parents=True, exist_ok=True)
    parts = []
    for segment, module in network.modules.items():
        own = {n: held[n].to(t.dtype).contiguous().clone() for n, t in module.state_dict().items() if n in held}
        if not own:
            continue
        data = save(own)
        digest = hashlib.sha256(data).hexdigest()
        path = folder / f"{digest}.safetensors"
        path.write_bytes(data)
        missing = tuple(n for n in module.state_dict() if n not in own)
        parts.append(Part(segment, path, digest, len(own), missing))
    if not parts:
        raise UsageError(f"{file} has nothing of this network")
    return parts


def _by_tensor(module: nn.Module) -> list[list[str]]:
    """All names of each tensor."""
    names: dict[int, list[str]] = {}
    for name, tensor in module.state_dict(keep_vars=True).items():
        names.setdefault(id(tensor), []).append(name)
    return list(names.values())


def take(folder: Path | None, segment: Segment, name: str, digest: str) -> None:
    """Gives a segment its part of what was trained elsewhere; what the part lacks stays as it was drawn.

    Args:
        folder: where this party keeps such parts.
        name: of the segment.
        digest: that the job says.

    Raises:
        Refused: it is not there, or does not fit. Reason WEIGHTS.
    """
    words = f"the weights of the {name}, `{digest[:12]}...`"
    file = folder / f"{digest}.safetensors" if folder is not None else None
    if file is None or not file.is_file():
        raise Refused(f"{words}: put the file {digest}.safetensors into {folder}", [Reason.WEIGHTS.name])
    data = file.read_bytes()
    if hashlib.sha256(data).hexdigest() != digest:
        raise Refused(f"{words}: {file} is not what its name says", [Reason.WEIGHTS.name])
    try:
        held: dict[str, Tensor] = load(data)
        segment.load_tensors(segment.tensors() | {n: t.to(segment.tensors()[n]) for n, t in held.items()})
    except (SafetensorError, UsageError, KeyError) as error:
        raise Refused(f"{words}: it does not fit the {name} ({error})", [Reason.WEIGHTS.name]) from None
    if not all(torch.isfinite(t).all() for t in held.values() if t.is_floating_point()):
        raise Refused(f"{words}: it holds what is no number", [Reason.WEIGHTS.name])


def refuse_untied(tied: Sequence[Mapping[str, slice]], segments: Mapping[Copy, Segment]) -> None:
    """What segments share begins alike at all of them. Raises `Refused` if it does not. Reason WEIGHTS."""
    for places in tied:
        found: dict[str, tuple[str, Tensor]] = {}
        for copy, segment in segments.items():
            if copy.segment in places:
                weight = segment.weights()[places[copy.segment]]
                first, expected = found.setdefault(copy.lane, (copy.segment, weight))
                if not torch.equal(weight, expected):
                    words = f"the {first} and the {copy.segment} share a weight; give both their files, or none"
                    raise Refused(f"[network.weights]: {words}", [Reason.WEIGHTS.name])
