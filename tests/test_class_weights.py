"""Class weights: as pooled counts give them, in every configuration, and told to a server only if it has the loss."""

from __future__ import annotations

import msgspec
import pytest
import torch

from federations import SIZES, difference, job_of, pooled, records_of, small
from partway.config import Job
from partway.train.tallies import class_weights

WAYS = {
    "vanilla": {"configuration": "vanilla", "epochs": 8},
    "u_shaped": {"configuration": "u_shaped", "epochs": 8},
    "half_trained": {"schedule": "half_trained", "half_trained": {"rounds": 2, "local_epochs": 2, "batch": 8}},
}
ways = pytest.mark.parametrize("way", WAYS)


def without(job: Job) -> Job:
    return msgspec.structs.replace(job, training=msgspec.structs.replace(job.training, class_weights="none"))


@ways
@pytest.mark.parametrize("sums", ["blind", "clear"])
def test_equals_a_pooled_loop_with_the_same_weights(way: str, sums: str) -> None:
    weighted = small(job_of(**WAYS[way], class_weights="sqrt", sums=sums))
    weighted.run()
    network, losses = pooled(weighted)
    assert difference(weighted, network) < 1e-10
    assert len(losses) > 10
    weighted.job = without(weighted.job)
    plain, _ = pooled(weighted)
    assert difference(weighted, plain) > 1e-4


def test_the_weights_are_those_of_all_sites_training_records() -> None:
    """Written out: count ** -1/2, and a mean of 1 over the records."""
    whole = small(job_of(class_weights="sqrt"))
    whole.run()
    labels = [int(y) for site, n in SIZES.items() for y in records_of(site, n).labels[:n]]
    counts = [labels.count(c) for c in range(3)]
    raw = [n**-0.5 for n in counts]
    scale = len(labels) / sum(n * w for n, w in zip(counts, raw, strict=True))
    expected = torch.tensor([w * scale for w in raw], dtype=torch.float64)
    told = [row for turn, _, row in whole.parties["server"].party.worker.board if turn.flow == "report_classes"]
    assert len(told) == 1
    assert (told[0] - expected).abs().max() < 1e-12
    assert sum(float(expected[y]) for y in labels) / len(labels) == pytest.approx(1)


@ways
def test_who_counts_and_who_is_told(way: str) -> None:
    flows = {}
    for weights in ("none", "sqrt"):
        whole = small(job_of(**WAYS[way], class_weights=weights))
        whole.run()
        flows[weights] = [turn.flow for turn in whole.parties["server"].party.session.turns]
        told = [turn for turn, _, _ in whole.parties["server"].party.worker.board if turn.flow == "report_classes"]
        assert len(told) == (weights == "sqrt" and way != "u_shaped")
    assert "classes" not in flows["none"]
    assert flows["sqrt"].count("classes") == 1
    assert [f for f in flows["sqrt"] if f not in ("classes", "report_classes")] == flows["none"]


def test_a_class_without_records_weighs_nothing() -> None:
    assert class_weights(torch.tensor([4, 0])).tolist() == [1, 0]
    assert class_weights(torch.tensor([5, 5, 5])).tolist() == pytest.approx([1, 1, 1])


def test_scores_are_told_beside_class_weights() -> None:
    whole = small(job_of({"evaluation": {"every": 1, "site_scores": True}}, class_weights="sqrt"))
    whole.run()
    board = [turn.flow for turn, _, _ in whole.parties["server"].party.worker.board]
    assert board.count("report_classes") == 1
    assert board.count("report") == 3
    assert board.count("report_own") == len(SIZES)
