"""`half_trained` where something is wrong: bottoms that differ, terms that forbid it, a job that asks for too much."""

from __future__ import annotations

import msgspec
import pytest
import torch

from federations import job_of, small
from partway.config import Job
from partway.errors import ConfigError, PeerError, Refused
from partway.plan.plan import Copy
from partway.protocol.messages import LetterKind
from partway.simulation import permissive
from partway.train.stopping import Verdict

HALF = {"rounds": 1, "local_epochs": 2, "batch": 8}


def half(**more: object) -> Job:
    return job_of(schedule="half_trained", half_trained=HALF, **more)


def test_a_bottom_that_differs_at_one_site_is_found_by_the_sites() -> None:
    whole = small(half())
    worker = whole.parties["b"].party.worker
    load = worker._load

    def wrongly(copy, takes):
        load(copy, takes)
        with torch.no_grad():
            worker.segments[copy].load(worker.segments[copy].weights() + 1e-3)

    worker._load = wrongly
    with pytest.raises(PeerError, match="holds another bottom than"):
        whole.run()


def test_what_another_bottom_made_does_not_come_into_the_store() -> None:
    """A site that says what it should to the others, and releases with other weights."""
    whole = small(half())
    worker = whole.parties["c"].party.worker
    body = worker.body

    def otherwise(post):
        tensors = body(post)
        if "made_by" in tensors:
            tensors["made_by"] = tensors["made_by"].flip(0)
        return tensors

    worker.body = otherwise
    with pytest.raises(PeerError, match="c: released with another bottom than a"):
        whole.run()


def test_every_activation_carries_the_digest_of_its_bottom() -> None:
    seen: dict[str, set[bytes]] = {"with": set(), "without": set()}

    def tap(head, letter, tensors):
        if letter.post.kind is LetterKind.ACTIVATIONS:
            kind = "with" if "made_by" in tensors else "without"
            seen[kind].add(tensors["made_by"].numpy().tobytes() if kind == "with" else b"")

    whole = small(half(), taps=dict.fromkeys("abcde", tap))
    whole.run()
    assert len(seen["with"]) == 1
    assert not seen["without"]


def refused(**terms: object) -> str:
    """What site b says whose policy allows all but these."""
    policy = msgspec.structs.replace(permissive("partway.model.zoo:mlp"), **terms)
    with pytest.raises(Refused) as found:
        small(half(), policies={"b": policy}).run()
    return str(found.value)


def test_nothing_is_released_where_the_policy_has_other_terms() -> None:
    assert "a u_shaped job keeps them here" in refused(labels_may_leave=False)
    assert "2 epochs; [policy] most_epochs is 1" in refused(most_epochs=1)
    assert "[policy] widest_cut is 2" in refused(widest_cut=2)
    assert "averaged weights of only 49 records of the other sites" in refused(least_records_in_sum=50)


def test_a_key_of_the_local_optimizer_leaves_the_others_at_their_defaults() -> None:
    local = job_of(half_trained={"optimizer": {"lr": 0.1}}).training.half_trained.optimizer
    assert (local.name, local.lr, local.momentum) == ("sgd", 0.1, 0.9)


def test_jobs_that_cannot_be() -> None:
    with pytest.raises(
        ConfigError, match="nearest that do: configuration = `vanilla`, or schedule = `synchronous` in u_"
    ):
        half(configuration="u_shaped")
    with pytest.raises(ConfigError, match="patience needs keep = `best`"):
        job_of(patience=3, keep="last")
    with pytest.raises(ConfigError, match=r"\[training\] half_trained has no key `round`; did you mean `rounds`"):
        job_of(schedule="half_trained", half_trained={"round": 2})


def test_a_judge_that_says_stop_before_anything_was_kept_stops_the_run() -> None:
    """The worst that a judge can do is waste a run."""
    whole = small(job_of({"evaluation": {"every": 1}}, epochs=3))
    worker = whole.parties["a"].party.worker

    def stop(judge: Copy) -> Verdict:
        worker._made[LetterKind.VERDICT, judge] = {"x": torch.tensor([Verdict.STOP], dtype=torch.uint8)}
        return Verdict.STOP

    worker._look = stop
    whole.run()
    assert len(whole.parties["server"].party.worker.losses) == 6
