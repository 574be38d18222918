"""What a network learns: each loss against its naive reading, each score from counts against the exact one."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from partway.config import Columns, RegressionTarget, bundled_schema, read_job, read_schema
from partway.data import matched
from partway.data.labels import learnt
from partway.data.records import Records, Target
from partway.data.schema import words
from partway.data.sets import bundled
from partway.data.survey import survey
from partway.data.table import load, records_of
from partway.errors import ConfigError, DataError
from partway.train import scoring, targets

INTERVALS = (10.0, 20.0, 40.0)
KINDS = {
    "classes": Target(outputs=3),
    "binary": Target(kind="binary", outputs=1),
    "multi_label": Target(kind="multi_label", outputs=2),
    "regression": Target(kind="regression", outputs=1),
    "discrete time": Target(kind="survival", outputs=3, intervals=INTERVALS),
    "cox": Target(kind="survival", outputs=1),
}


def drawn(target: Target, records: int, seed: int) -> tuple[Tensor, Tensor]:
    """Outputs and labels."""
    generator = torch.Generator().manual_seed(seed)
    outputs = torch.randn(records, target.outputs, generator=generator, dtype=torch.float64)
    coins = torch.randint(0, 2, (records, 3), generator=generator)
    if target.kind == "classes":
        return outputs, torch.randint(0, 3, (records,), generator=generator)
    if target.kind == "binary":
        return outputs, coins[:, 0].double()
    if target.kind == "multi_label":
        return outputs, coins[:, : target.outputs].double()
    if target.kind == "regression":
        return outputs, torch.randn(records, generator=generator, dtype=torch.float64)
    times = torch.randint(1, 60, (records,), generator=generator).double()  # with ties, and some beyond the last
    return outputs, torch.stack([times, coins[:, 0].double()], 1)


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def naive(target: Target, outputs: Tensor, labels: Tensor) -> float:
    """As the papers write it, record by record."""
    total = 0.0
    for n, out in enumerate(outputs.tolist()):
        if target.kind == "classes":
            total -= math.log(math.exp(out[labels[n]]) / sum(map(math.exp, out)))
        elif target.kind == "binary":
            total -= math.log(sigmoid(out[0]) if labels[n] == 1 else 1 - sigmoid(out[0]))
        elif target.kind == "multi_label":
            told = [sigmoid(x) if y else 1 - sigmoid(x) for x, y in zip(out, labels[n].tolist(), strict=True)]
            total -= sum(map(math.log, told)) / len(told)
        elif target.kind == "regression":
            total += (out[0] - float(labels[n])) ** 2
        elif target.intervals:
            time, event = labels[n].tolist()
            for end, hazard in zip(target.intervals, map(sigmoid, out), strict=True):
                if time > end:
                    total -= math.log(1 - hazard)
                    continue
                if event:
                    total -= math.log(hazard)
                break
        else:
            time, event = labels[n].tolist()
            if event:
                at_risk = [
                    math.exp(float(o)) for o, (t, _) in zip(outputs[:, 0], labels.tolist(), strict=True) if t >= time
                ]
                total -= out[0] - math.log(sum(at_risk))
    return total


@pytest.mark.parametrize("kind", KINDS)
@given(st.integers(1, 12), st.integers(0, 10_000))
def test_a_loss_is_its_naive_reading(kind: str, records: int, seed: int) -> None:
    outputs, labels = drawn(KINDS[kind], records, seed)
    found = float(targets.loss_of(KINDS[kind])(outputs, labels))
    assert found == pytest.approx(naive(KINDS[kind], outputs, labels), rel=1e-9, abs=1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_a_loss_is_a_sum_over_records_or_says_that_it_is_not(kind: str) -> None:
    outputs, labels = drawn(KINDS[kind], 20, 1)
    loss = targets.loss_of(KINDS[kind])
    parts = float(loss(outputs[:8], labels[:8]) + loss(outputs[8:], labels[8:]))
    assert (abs(parts - float(loss(outputs, labels))) < 1e-9) is not targets.whole_batch(KINDS[kind])


@pytest.mark.parametrize("kind", KINDS)
def test_counts_of_sites_add_up_to_the_scores_of_all(kind: str) -> None:
    target = KINDS[kind]
    outputs, labels = drawn(target, 300, 2)
    parts = [scoring.counts(target, o, y) for o, y in zip(outputs.split(100), labels.split(100), strict=True)]
    assert all(part.shape == (scoring.size_of_counts(target),) for part in parts)
    whole, exact = scoring.from_counts(target, sum(parts)), scoring.scores(target, outputs, labels)
    near = 0.05 if target.kind == "survival" else 2e-3  # pairs of two sites are not compared; histograms have ties
    assert scoring.value(whole) == pytest.approx(scoring.value(exact), abs=near)
    assert scoring.read_figures(target, scoring.figures(whole)[0]) == whole
    flipped = scoring.scores(target, -outputs, labels)
    assert scoring.value(flipped) != pytest.approx(scoring.value(exact), abs=1e-3)


def test_concordance_counts_pairs_as_they_are_defined() -> None:
    target, (outputs, labels) = KINDS["cox"], drawn(KINDS["cox"], 40, 3)
    right = pairs = 0.0
    for i, (time, event) in enumerate(labels.tolist()):
        for j, (other, other_event) in enumerate(labels.tolist()):
            if i != j and event and (other > time or (other == time and not other_event)):
                pairs += 1
                right += 1.0 if outputs[i, 0] > outputs[j, 0] else 0.5 if outputs[i, 0] == outputs[j, 0] else 0.0
    found = scoring.scores(target, outputs, labels)
    assert isinstance(found, scoring.Ranking)
    assert (found.concordance, found.pairs) == (pytest.approx(right / pairs), pairs)


def test_a_risk_falls_with_every_hazard() -> None:
    target = KINDS["discrete time"]
    low, high = torch.full((1, 3), -1.0), torch.full((1, 3), 1.0)
    assert scoring.risk_of(target, low) < scoring.risk_of(target, high)


SCHEMA = """
[schema]
name = "small"
label = "y"
[classes]
no = ["0"]
yes = ["1"]
[columns]
x = { kind = "numeric" }
[targets]
soon = { kind = "binary", time = "t", event = "e", within = 10 }
sick = { kind = "binary", column = "s" }
both = { kind = "multi_label", columns = ["s", "e"] }
stay = { kind = "regression", column = "n", range = [0, 100], log = 1, spread = 2 }
life = { kind = "survival", time = "t", event = "e", intervals = [5, 10] }
sort = { kind = "classes", column = "k", classes = { low = ["a"], high = ["b", "c"] } }
"""
ROWS = ["x,y,t,e,s,n,k", *(f"{n},{n % 2},{3 * n},{n % 3 == 0:d},{n % 2},{n},{'abc'[n % 3]}" for n in range(1, 13))]


def read(tmp_path: Path, target: str, rows: list[str] = ROWS) -> Records:
    path = tmp_path / "records.csv"
    path.write_text("\n".join(rows) + "\n")
    return records_of(load(path), schema(), "statistics", 0, target=target)


def schema() -> Columns:
    return read_schema(SCHEMA)


def test_targets_are_read_from_their_columns(tmp_path: Path) -> None:
    soon = read(tmp_path, "soon")
    x = soon.features[:, 0]
    assert 2.0 not in x  # seen for 6 days only, and nothing came
    assert 4.0 in x  # seen for 12: not within 10
    assert {float(v) for v, y in zip(x, soon.labels, strict=True) if y} == {3.0}
    stay = read(tmp_path, "stay")
    assert torch.allclose(stay.labels, torch.log(stay.features[:, 0] + 1) / 2)
    settings = schema().targets["stay"]
    assert isinstance(settings, RegressionTarget)
    assert torch.allclose(learnt(settings, stay.labels), stay.features[:, 0])
    life = read(tmp_path, "life")
    assert life.labels.shape == (12, 2)
    assert life.schema.target().outputs == 2
    assert read(tmp_path, "both").labels.shape == (12, 2)
    assert set(read(tmp_path, "sort").labels.tolist()) == {0, 1}
    assert read(tmp_path, "").labels.dtype == torch.int64


@pytest.mark.parametrize(
    ("target", "cell", "told"),
    [
        ("life", ("t", "-3"), "column t: line 2: '-3' is before the beginning"),
        ("life", ("t", ""), "column t: line 2: an empty field is no time"),
        ("life", ("e", "2"), "column e: line 2: '2' is neither 0 nor 1"),
        ("stay", ("n", "x"), "column n: line 2: 'x' is no number"),
        ("stay", ("n", "900"), "column n: line 2: '900' is not in 0 to 100"),
        ("sort", ("k", "z"), "column k: line 2: 'z' is no class of the target"),
    ],
)
def test_a_wrong_value_is_told_with_its_column(tmp_path: Path, target: str, cell: tuple[str, str], told: str) -> None:
    names, first = ROWS[0].split(","), ROWS[1].split(",")
    first[names.index(cell[0])] = cell[1]
    with pytest.raises(DataError) as found:
        read(tmp_path, target, [ROWS[0], ",".join(first), *ROWS[2:]])
    assert told in str(found.value)
    assert all(kind in ("CLASS", "NUMBER", "RANGE") for _, kind in found.value.faults)
    read(tmp_path, "", [ROWS[0], ",".join(first), *ROWS[2:]])  # who learns something else is not asked


def test_a_column_that_a_target_needs_is_missed_only_by_it(tmp_path: Path) -> None:
    without = [",".join(row.split(",")[:3]) for row in ROWS]
    read(tmp_path, "", without)
    with pytest.raises(DataError, match="no column e"):
        read(tmp_path, "life", without)


def test_jobs_and_schemas_that_cannot_be() -> None:
    job = '[job]\nname = "a"\n[network]\nbuild = "m:n"\ncut = ["x"]\n[records]\nschema = "support"\ntarget = "deth30"\n'
    with pytest.raises(ConfigError, match="has no target `deth30`; did you mean `death30`"):
        read_job(job)
    weighted = job.replace("deth30", "survival") + '[training]\nclass_weights = "sqrt"\n'
    with pytest.raises(ConfigError, match="class_weights are for classes, and survival has none"):
        read_job(weighted)
    for wrong, told in (
        ('{ kind = "binary" }', "a binary target has a column, or time, event and within"),
        ('{ kind = "regression", column = "x" }', r"x is among \[columns\]"),
        ('{ kind = "survival", time = "t", event = "e", intervals = [5, 5] }', "intervals end one after the other"),
    ):
        with pytest.raises(ConfigError, match=told):
            read_schema(SCHEMA.split("[targets]")[0] + f"[targets]\nwrong = {wrong}\n")
    assert bundled_schema("support").targets.keys() >= {"death30", "survival", "risk", "disability"}


def test_weights_of_yes_and_no_are_those_of_classes() -> None:
    """The log-odds of yes as logits of no and yes."""
    outputs, labels = drawn(KINDS["binary"], 30, 4)
    weights = torch.tensor([0.5, 2.0], dtype=torch.float64)
    two = torch.cat([torch.zeros_like(outputs), outputs], 1)
    expected = targets.cross_entropy(two, labels.long(), weights)
    assert torch.allclose(targets.loss_of(KINDS["binary"], lambda: weights)(outputs, labels), expected)
    assert not torch.allclose(targets.loss_of(KINDS["binary"])(outputs, labels), expected)


def test_the_middle_of_a_number_is_taken_off_and_put_back(tmp_path: Path) -> None:
    text = SCHEMA.replace("spread = 2", "spread = 2, center = 1.5")
    (tmp_path / "records.csv").write_text("\n".join(ROWS) + "\n")
    file = load(tmp_path / "records.csv")
    found, plain = (records_of(file, read_schema(t), "statistics", 0, target="stay").labels for t in (text, SCHEMA))
    assert torch.allclose(found, plain - 0.75)
    settings = read_schema(text).targets["stay"]
    assert isinstance(settings, RegressionTarget)
    assert torch.allclose(learnt(settings, found), torch.arange(1.0, 13).double())


def test_the_unit_of_a_target_is_compared(tmp_path: Path) -> None:
    (tmp_path / "records.csv").write_text("\n".join(ROWS) + "\n")
    file, columns = load(tmp_path / "records.csv"), read_schema(SCHEMA.replace("log = 1,", 'log = 1, unit = "days",'))
    records_of(file, columns, "statistics", 0, target="stay", units={"n": "days"})
    with pytest.raises(DataError, match="column n: its unit here is hours; the schema says days") as found:
        records_of(file, columns, "statistics", 0, target="stay", units={"n": "hours"})
    assert [(columns.numbered[column], kind) for column, kind in found.value.faults] == [("n", "UNIT")]


@pytest.mark.parametrize(
    ("target", "told"),
    [
        ("", {"no": 6, "yes": 6}),
        ("soon", {"no": 9, "yes": 1}),
        ("both", {"s": 6, "e": 4}),
        ("stay", {"numbers": 12}),
        ("life", {"lost from sight": 8, "the event came": 4}),
        ("sort", {"low": 4, "high": 8}),
    ],
)
def test_a_survey_of_a_target(tmp_path: Path, target: str, told: dict[str, int]) -> None:
    (tmp_path / "records.csv").write_text("\n".join(ROWS) + "\n")
    found = survey(load(tmp_path / "records.csv"), schema(), target=target)
    assert found.sites == {"all rows": told}
    assert found.records == {"all rows": 10 if target == "soon" else 12}
    assert ("2 rows do not count" in found.text()) is (target == "soon")
    assert found.text().endswith(f"classes = {found.outputs}")


def test_a_party_tells_faults_by_the_numbers_that_all_know(tmp_path: Path) -> None:
    """It reads some of the columns; the server, which puts numbers into words, knows the whole schema."""
    text = SCHEMA.replace('x = { kind = "numeric" }', 'w = { kind = "numeric" }\nx = { kind = "numeric" }')
    head = '[job]\nname = "a"\n[records]\nschema = "small.toml"\n[training]\nconfiguration = "vertical"\n'
    network = 'build = "partway.model.zoo:mlp"\narguments = { inputs = 1, hidden = [2], classes = 2 }\n'
    job = read_job(
        head + '[holds.a]\ncolumns = ["x"]\n[holds.b]\ntargets = ["soon"]\n'
        f"[networks.bottom_a]\n{network}[networks.trunk]\n{network}",
        schema=text,
    )
    (tmp_path / "records.csv").write_text("\n".join([ROWS[0], "one," + ROWS[1].split(",", 1)[1], *ROWS[2:]]) + "\n")
    with pytest.raises(DataError) as found:
        matched.records_of(load(tmp_path / "records.csv"), job, job.holds["a"], None)
    assert job.columns
    assert words(job.columns, found.value.faults) == "column x: something that is no number"


def test_where_the_same_patients_are_at_several_parties_holds_says_what_is_learnt() -> None:
    job = '[job]\nname = "a"\n[records]\nschema = "support"\ntarget = "stay"\n[training]\nconfiguration = "vertical"\n'
    with pytest.raises(ConfigError, match=r"in vertical \[holds.PARTY\] targets says what is learnt"):
        read_job(f'{job}[holds.a]\ntargets = ["stay"]\n[networks.trunk]\nbuild = "m:n"\n')


@pytest.mark.parametrize("name", ["death30", "stay", "survival", "risk", "disability"])
def test_bundled_targets(name: str) -> None:
    (records,) = bundled("support", 0, target=name).values()
    assert len(records.labels) == 9105
    if name == "death30":
        assert torch.equal(records.labels.long(), bundled("support", 0)["support"].labels)
    if name == "stay":
        assert abs(float(records.labels.mean())) < 0.1
        assert 0.9 < float(records.labels.std()) < 1.1
