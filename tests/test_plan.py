"""Plans, batches and the synchronous schedule: pure data."""

from __future__ import annotations

import math
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from partway.errors import PlanError
from partway.plan.batches import union_batches
from partway.plan.configurations import chain, u_shaped, vanilla
from partway.plan.phases import Settings
from partway.plan.plan import ONE, Copy, Edge, Plan, Segment, Turn
from partway.plan.schedules import SCHEDULES, half_trained, synchronous

SITES = ("a", "b", "c")
SIZES = {"a": {"train": 50, "validation": 5, "test": 9}, "b": {"train": 30, "validation": 0, "test": 0}}
SIZES["c"] = {"train": 3, "validation": 1, "test": 2}


def turns(settings: Settings, plan: Plan | None = None) -> tuple[Plan, tuple[Turn, ...]]:
    whole, schedule = synchronous(plan or vanilla(SITES), settings)
    return whole, schedule(SIZES)


def faults_of(*edges: Edge, segments: tuple[Segment, ...] = u_shaped(SITES).segments) -> list[str]:
    return Plan(SITES, segments, (("split", edges),)).validate()


@pytest.mark.parametrize("configuration", [vanilla, u_shaped])
@pytest.mark.parametrize("schedule", SCHEDULES.values())
def test_what_a_job_may_name_is_without_fault(configuration, schedule) -> None:
    if schedule is half_trained and configuration is u_shaped:
        with pytest.raises(PlanError, match="a U-shape keeps at the sites"):
            schedule(configuration(SITES), Settings())
        return
    plan, _ = schedule(configuration(SITES), Settings(bottom_to_everyone=True))
    assert plan.validate() == []
    assert plan.checked() is plan


def test_a_wrong_plan_gets_all_its_faults_at_once() -> None:
    data, bottom, trunk = vanilla(SITES).segments
    edges = (Edge("data", "trunk"), Edge("data", "bottom"), Edge("bottom", "trunk"), Edge("bottom", "nobody"))
    plan = Plan(("a", "a"), (data, bottom, trunk, trunk), (("split", edges),), hub="a")
    faults = plan.validate()
    for words in (
        "trunk: named twice",
        "a: named twice",
        "and the hub",
        "would leave",
        "flow into data",
        "no such segment",
    ):
        assert any(words in fault for fault in faults), faults
    with pytest.raises(PlanError) as caught:
        plan.checked()
    assert list(caught.value.faults) == faults
    assert all(fault in str(caught.value) for fault in faults)


@pytest.mark.parametrize(
    ("edges", "words"),
    [
        ((*chain("data", "bottom", "trunk"), Edge("data", "trunk", gradient=False)), "raw records would leave"),
        (chain("data", "bottom", "trunk") * 2, "drawn twice"),
        ((Edge("data", "bottom"),), "gradient cannot flow into data"),
        ((Edge("data", "bottom", gradient=False),), "bottom ends without labels"),
        ((Edge("data", "trunk", "labels", False),), "trunk has no input"),
        ((Edge("bottom", "data", gradient=False),), "records are a source"),
        ((Edge("bottom", "trunk", "labels", False),), "labels come from records"),
        ((Edge("data", "bottom", "scores", False),), "come from a tally"),
        ((Edge("bottom", "trunk"), Edge("trunk", "bottom")), "run in a circle"),
        ((*chain("data", "bottom", "trunk"), Edge("trunk", "head", gradient=False)), "has a loss and goes on"),
        ((*chain("data", "trunk"), Edge("bottom", "trunk", "labels", False)), "labels from two sources"),
    ],
)
def test_a_fault_is_named(edges: tuple[Edge, ...], words: str) -> None:
    assert any(words in fault for fault in faults_of(*edges)), faults_of(*edges)


def test_rows_of_no_site_cannot_go_to_a_site() -> None:
    segments = (Segment(name="archive", at="server", kind="records"), Segment(name="bottom"))
    edges = (Edge("archive", "bottom", gradient=False), Edge("archive", "bottom", "labels", False))
    assert any("belong to no site" in fault for fault in faults_of(*edges, segments=segments))


def test_copies_of_one_lane_meet_and_a_single_copy_meets_all() -> None:
    plan = u_shaped(SITES)
    rows = {"a": 2, "c": 1}
    assert plan.meets(Copy("head", "a"), "trunk", rows) == (Copy("trunk"),)
    assert plan.meets(Copy("trunk"), "bottom", rows) == (Copy("bottom", "a"), Copy("bottom", "c"))
    assert plan.meets(Copy("head", "c"), "data", rows) == (Copy("data", "c"),)
    assert plan.rows(Copy("trunk"), rows) == 3
    assert plan.parties == (*SITES, "server")


@given(
    sizes=st.dictionaries(st.sampled_from("abcdef"), st.integers(0, 40), min_size=1).filter(lambda s: sum(s.values())),
    batch=st.integers(1, 50),
    seed=st.integers(0, 2**53),
)
def test_every_record_once_in_batches_as_equal_as_can_be(sizes, batch, seed) -> None:
    batches = list(union_batches(sizes, batch, seed, epoch=3))
    counts = [sum(b.rows.values()) for b in batches]
    assert max(counts) <= batch
    assert max(counts) - min(counts) <= 1
    assert len(batches) == math.ceil(sum(sizes.values()) / batch)
    done = Counter(dict.fromkeys(sizes, 0))
    for drawn in batches:
        assert drawn.offsets == dict(done)
        done.update(drawn.rows)
    assert done == sizes


def test_the_order_depends_on_seed_and_epoch_alone() -> None:
    sizes = {"a": 40, "b": 40}

    def rows(seed: int, epoch: int) -> list[dict[str, int]]:
        return [b.rows for b in union_batches(sizes, 10, seed, epoch)]

    assert rows(1, 0) == rows(1, 0)
    assert rows(1, 0) != rows(2, 0)
    assert rows(1, 0) != rows(1, 1)


def test_half_trained_lists_every_turn() -> None:
    settings = Settings(epochs=2, batch=20, validate_every=1, keep_best=True, rounds=2, local_epochs=3, local_batch=16)
    _, schedule = half_trained(vanilla(SITES), settings)
    listed = schedule(SIZES)
    sizes = [SIZES[site]["train"] for site in SITES]
    local = [t for t in listed if t.flow == "local"]
    assert len(local) == 2 * 3 * max(-(-n // 16) for n in sizes)
    assert all(t.train == ("bottom", "local_head") and t.divisor is None and t.optimizer == "local" for t in local)
    averaged = [t for t in listed if t.sums]
    assert len(averaged) == 2
    assert all(t.fresh and sum(t.share.values()) == pytest.approx(1) for t in averaged)
    for part in ("train", "validation"):
        released = [t for t in listed if t.flow == "release" and t.records == part]
        counts = {site: sum(rows.get(site, 0) for t in released for rows in t.rows) for site in SITES}
        assert counts == {site: SIZES[site][part] for site in SITES}  # each once
    finish = [t for t in listed if t.flow == "finish"]
    assert {t.train for t in finish} == {("trunk",)}
    assert sum(t.rows[0][ONE] for t in finish) == 2 * sum(sizes)
    looks = [t.judge for t in listed if t.judge]
    assert [judge.last for judge in looks] == [False, True]
    assert {listed[judge.to - 1].flow for judge in looks} == {"check"}
    assert [t.account for t in listed if t.account][-3:] == [("a",), ("b",), ("c",)]  # nobody is asked for more


def test_synchronous_lists_every_turn() -> None:
    settings = Settings(epochs=2, batch=20, standardise=True, validate_every=2, test=True, site_scores=True)
    _, listed = turns(settings)
    assert [t.flow for t in listed if t.flow] == [
        *("sums", "squares"),
        *["split"] * 10,
        *("scores", "report", "scores", "report", "report_own"),
    ]
    training = [t for t in listed if t.train]
    assert [t.step for t in training] == list(range(10))
    assert all(t.divisor == sum(t.rows[0].values()) for t in training)
    assert all(t.sums == (("gradient", "bottom"),) and t.train == ("bottom", "trunk") for t in training)
    assert [t.epoch for t in listed if t.account] == [0, 1, 1]
    own = next(t for t in listed if t.flow == "report_own")
    assert own.rows == ({"a": 1, "c": 1},)


def test_what_is_not_asked_for_is_no_turn() -> None:
    _, listed = turns(Settings())
    assert {t.flow for t in listed} == {"", "split"}
    gives = [give for t in listed for give in t.gives]
    assert gives == [(Copy("bottom", "a"), Copy("bottom", "b")), (Copy("bottom", "a"), Copy("bottom", "c"))]


def test_where_the_result_goes() -> None:
    _, listed = turns(Settings(trunk_to_everyone=True))
    assert listed[-2].gives == tuple((Copy("trunk"), Copy("trunk_here", site)) for site in SITES)
    plan, listed = turns(Settings(bottom_to_everyone=True))
    assert listed[-2].gives == ((Copy("bottom", "a"), Copy("bottom_there")),)
    assert plan.place(Copy("bottom_there")) == "server"


def test_a_single_site_shares_with_nobody() -> None:
    _, schedule = synchronous(vanilla(("a",)), Settings())
    listed = schedule(SIZES)
    assert not any(t.sums or t.gives or t.equal for t in listed)
