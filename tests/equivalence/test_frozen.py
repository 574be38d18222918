"""Segments that are not trained, and weights that were trained elsewhere."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from federations import difference, job_of, pooled, small
from partway.config import Job
from partway.data.records import Schema
from partway.equality import _Plain
from partway.errors import ConfigError, Refused, UsageError
from partway.model.segment import initialise
from partway.outcome import result_of
from partway.pretrained import split
from partway.train.draws import first_weights
from partway.train.source import RecordSource

ADAM = {"name": "adam", "lr": 0.02}
CONFIGURATIONS = pytest.mark.parametrize("configuration", ["vanilla", "u_shaped"])


def job(network: dict[str, Any], **training: Any) -> Job:
    return job_of({"network": network}, optimizer=ADAM, **training)


@CONFIGURATIONS
@pytest.mark.parametrize("frozen", ["bottom", "trunk"])
def test_a_frozen_segment_stays_as_it_is_and_the_rest_is_trained_as_in_one_place(
    configuration: str, frozen: str
) -> None:
    whole = small(job({"frozen": [frozen]}, configuration=configuration))
    assert not any(
        s.size for a in whole.parties.values() for c, s in a.party.worker.segments.items() if c.segment == frozen
    )
    whole.run()
    assert difference(whole, pooled(whole)[0]) < 1e-10
    moved = small(job({}, configuration=configuration))
    moved.run()
    assert difference(moved, pooled(whole)[0]) > 1e-3


def test_no_gradient_is_sent_to_a_frozen_bottom() -> None:
    costs = []
    for frozen in ([], ["bottom"]):
        whole = small(job({"frozen": frozen}))
        whole.run()
        costs.append(result_of(whole.parties["a"], 0.0).cost["a"])
    assert costs[1].bytes_down < costs[0].bytes_down * 0.6
    assert costs[1].flops < costs[0].flops
    assert costs[1].exchanges < costs[0].exchanges


def test_what_cannot_be_frozen() -> None:
    for frozen, words, more in (
        (["bottom", "trunk"], "every segment is frozen", {}),
        (["middle"], "frozen names middle; the segments are bottom, trunk", {}),
        (["trunk"], "the server trains the trunk", {"schedule": "half_trained"}),
    ):
        with pytest.raises(ConfigError, match=words):
            small(job({"frozen": frozen}, **more))
    with pytest.raises(ConfigError, match="weights names middle; the segments are bottom, trunk"):
        small(job({"weights": {"middle": "0" * 64}}))


# -- weights of elsewhere


def trained() -> dict[str, torch.Tensor]:
    """Weights of the small network."""
    torch.manual_seed(9)
    layers = {"hidden.0": nn.Linear(6, 8), "hidden.2": nn.Linear(8, 5), "output": nn.Linear(5, 3)}
    return {f"{name}.{key}": t.detach().double() for name, m in layers.items() for key, t in m.state_dict().items()}


def parts(
    folder: Path, tensors: dict[str, torch.Tensor], terms: Job, without: list[str] | None = None
) -> dict[str, str]:
    save_file(tensors, folder / "network.safetensors")
    made = split(terms, schemas_for(terms), folder / "network.safetensors", folder / "weights", without or [])
    return {part.segment: part.digest for part in made}


def schemas_for(terms: Job) -> dict[str, Schema]:
    records = small(terms).parties["a"].party.worker.source
    assert isinstance(records, RecordSource)
    return dict.fromkeys(("site", *terms.sites, "a"), records.records.schema)


@CONFIGURATIONS
def test_training_goes_on_from_weights_of_elsewhere(configuration: str, tmp_path: Path) -> None:
    """The last layer is drawn anew; the bottom is frozen."""
    plain = job({}, configuration=configuration)
    digests = parts(tmp_path, trained(), plain, ["output"])
    terms = job({"weights": digests, "frozen": ["bottom"]}, configuration=configuration)
    whole = small(terms, weights=tmp_path / "weights")
    held = whole.parties["b"].party.worker.segments
    (bottom,) = [s for c, s in held.items() if c.segment == "bottom"]
    assert torch.equal(bottom.tensors()["hidden.0.weight"], trained()["hidden.0.weight"])
    whole.run()
    records = {s: whole.parties[s].party.worker.source.records for s in whole.job.sites}
    loop = _Plain(whole.job, whole.digest, whole.secrets, records, "server")
    for name, module in loop.network.modules.items():
        owner = whole.job.sites[0] if name in loop.at_sites else "server"
        if any(True for p in module.parameters()):
            initialise(module, first_weights(whole.secrets[owner], whole.digest, name))
        module.load_state_dict(
            {n: t for n, t in trained().items() if n in module.state_dict() and "output" not in n}, strict=False
        )
    loop.together(0, whole.job.training.epochs)
    assert difference(whole, loop.network.whole) < 1e-10


def test_weights_that_are_not_there_or_do_not_fit(tmp_path: Path) -> None:
    plain = job({})
    digests = parts(tmp_path, trained(), plain)
    terms = job({"weights": digests})
    with pytest.raises(
        Refused, match=r"the weights of the bottom, .* put the file [0-9a-f]{64}.safetensors into"
    ) as none:
        small(terms)
    assert none.value.reasons == ("WEIGHTS",)
    file = tmp_path / "weights" / f"{digests['bottom']}.safetensors"
    kept = file.read_bytes()
    file.write_bytes(kept[:-1])
    with pytest.raises(Refused, match="is not what its name says"):
        small(terms, weights=tmp_path / "weights")
    file.write_bytes(kept)
    with pytest.raises(Refused, match="does not fit the bottom"):
        small(job({"weights": {"bottom": digests["trunk"]}}), weights=tmp_path / "weights")
    for tensors, words in (
        (
            {"hidden.0.weight": torch.zeros(2, 2)},
            r"`hidden.0.weight` has the shape \(2, 2\), and \(8, 6\) in the network",
        ),
        ({"other": torch.zeros(2)}, "the network has no tensor `other`; leave it out with --without other"),
        ({}, "has nothing of this network"),
    ):
        with pytest.raises(UsageError, match=words):
            parts(tmp_path, tensors, plain)
    (tmp_path / "network.safetensors").write_bytes(b"no")
    with pytest.raises(UsageError, match="is no safetensors file"):
        split(plain, schemas_for(plain), tmp_path / "network.safetensors", tmp_path / "weights")


# -- adapters


@CONFIGURATIONS
def test_adapters_are_trained_as_in_one_place_and_nothing_else_is(configuration: str, tmp_path: Path) -> None:
    lora = {"modules": ["0", "2"], "rank": 2, "alpha": 4, "train": ["output"]}
    whole = small(job({"lora": lora}, configuration=configuration))
    held = {c.segment: s for c, s in whole.parties["a"].party.worker.segments.items()}
    first = held["bottom"].tensors()
    assert {name for name, t in first.items() if "lora_B" in name and t.abs().max() == 0}  # it adds nothing at first
    whole.run()
    network, _ = pooled(whole)
    assert difference(whole, network) < 1e-10
    assert difference(whole, pooled(whole, other_order=True)[0]) > 1e-4
    moved = {name for name, t in held["bottom"].tensors().items() if not torch.equal(t, first[name])}
    assert {name for name in first if "lora_" in name} <= moved
    own = {s.size for c, s in whole.parties["a"].party.worker.segments.items() if c.segment == "bottom"}
    assert own == {2 * 6 + 8 * 2}


def test_adapters_go_on_from_weights_of_elsewhere(tmp_path: Path) -> None:
    lora = {"modules": ["hidden.0"], "rank": 2}
    digests = parts(tmp_path, trained(), job({"lora": lora}))
    whole = small(job({"lora": lora, "weights": digests}), weights=tmp_path / "weights")
    whole.run()
    state = {n: t for c, s in whole.parties["a"].party.worker.segments.items() for n, t in s.tensors().items()}
    assert torch.equal(state["hidden.0.base_layer.weight"], trained()["hidden.0.weight"])
    assert state["hidden.0.lora_B.default.weight"].abs().max() > 0


def test_adapters_that_cannot_be() -> None:
    with pytest.raises(UsageError, match=r"\[network.lora\] modules: .*nothing"):
        small(job({"lora": {"modules": ["nothing"]}}))
