"""`partway compare` and `partway cost` as their user runs them: four hospitals, one seed."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from partway.cli import app
from partway.compare import comparison
from partway.config import read_job
from partway.data.records import Records, Target
from partway.errors import ConfigError, UsageError
from partway.ledger import verify
from partway.train.targets import loss_of

JOB = """
[job]
name = "heart"
[network]
build = "partway.model.zoo:mlp"
arguments = { inputs = 29, hidden = [16, 8, 16], classes = 2 }
cut = ["hidden.2"]
[records]
schema = "heart"
[training]
epochs = 4
"""
METHODS = ["alone", "half_trained", "split", "pooled", "fedavg", "large_batch_sgd"]


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("job") / "job.toml"
    path.write_text(JOB)
    return path


@pytest.fixture(scope="module")
def compared(job: Path) -> tuple[dict[str, Any], Path]:
    done = CliRunner().invoke(app, ["compare", str(job), "--seeds", "1", "--json", "--folder", str(job.parent / "c")])
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout.splitlines()[-1]), next((job.parent / "c").iterdir())


def test_every_method_on_the_same_records(compared: tuple[dict[str, Any], Path]) -> None:
    words, _ = compared
    assert words["dataset"] == "heart"
    assert list(words["methods"]) == METHODS  # with one cut there is no U-shape
    for method in METHODS:
        for site, row in words["methods"][method]["sites"].items():
            assert row["records"] == [words["sites"][site]["test"]], method
    everybody = {m: found["everybody"]["macro_auc"][0] for m, found in words["methods"].items()}
    assert min(auc for m, auc in everybody.items() if m != "alone") > everybody["alone"] + 0.05
    assert set(words["methods"]["alone"]["everybody_by_site"]) == {"cleveland", "hungary", "switzerland", "va"}


def test_one_budget_and_three_rates_for_each(compared: tuple[dict[str, Any], Path]) -> None:
    words, _ = compared
    for method, by_seed in words["validation"].items():
        kept = words["methods"][method]["kept"][0]
        for site, looks in by_seed[0].items():
            assert max(looks) == looks[kept[site] - 1], method
    assert {
        len(v) for m, runs in words["validation"].items() if m in ("split", "pooled") for v in runs[0].values()
    } == {40}


def test_what_a_comparison_leaves(compared: tuple[dict[str, Any], Path]) -> None:
    words, home = compared
    assert json.loads((home / "result.json").read_text()) == words
    page = (home / "page.html").read_text()
    assert page.count("data:image/png;base64,") == 3
    assert not re.search(r"(src|href)=.(?!data:)|@import|url\(", page)
    for method in ("half_trained", "split"):
        run = home / "runs" / "seed-0" / method
        result = json.loads((run / "result.json").read_text())
        assert result["plan"]["segments"]["trunk"] == "server"
        assert result["holds"]["va"] == ["bottom", "trunk"]
        assert (run / "network.safetensors").exists()
        audit = verify(run / "va" / "ledger.jsonl", lambda signature, data: True)
        assert audit.outcome == "done"
        assert audit.head == result["ledgers"]["va"]
        (details,) = words["runs"][method]
        assert details["ledgers"] == result["ledgers"]
        assert details["job"]["training"]["epochs"] == 40


def test_cost_tells_the_same_without_running(job: Path, compared: tuple[dict[str, Any], Path]) -> None:
    done = CliRunner().invoke(app, ["cost", str(job), "--json"])
    told = json.loads(done.stdout)["cost"]
    assert set(told) == {"cleveland", "hungary", "switzerland", "va", "server"}
    ran = compared[0]["cost"]["split"]["va"]  # ten times the epochs
    assert told["va"]["flops"] == pytest.approx(ran["flops"] / 10, rel=0.1)
    assert told["va"]["bytes_up"] < ran["bytes_up"] / 8
    text = CliRunner().invoke(app, ["cost", str(job)]).stdout
    assert re.search(r"va +\d", text)


def test_a_job_whose_records_are_not_bundled(tmp_path: Path, job: Path) -> None:
    mine = tmp_path / "job.toml"
    mine.write_text(JOB.replace('schema = "heart"', 'schema = "mine.toml"'))
    (tmp_path / "mine.toml").write_text(
        '[schema]\nname = "mine"\nlabel = "y"\n[classes]\na = ["0"]\nb = ["1"]\n[columns.x]\nkind = "numeric"\n'
    )
    for verb in ("cost", "compare", "simulate"):
        with pytest.raises(UsageError, match=r"no records are bundled for mine\.toml: name a file of all sites' with"):
            CliRunner().invoke(app, [verb, str(mine)], catch_exceptions=False)


def test_yes_and_no_are_compared_as_two_classes() -> None:
    """The plain loops' loss and scores of the same weights are those of the binary target."""
    job = read_job(JOB.replace("classes = 2", "classes = 1").replace('"heart"\n[training]', '"dataset"\n[training]'))
    x, target = torch.randn(40, 29, generator=torch.Generator().manual_seed(0)), Target(kind="binary", outputs=1)
    y, index = (x[:, 0] > 0).double(), torch.arange(40)
    division = {"train": index, "validation": index[:0], "test": index[:0]}
    records = Records(x, y, classes=1, numeric=(), division=division, targets=(target,))
    task = comparison._task(job, {"a": records}, 0)
    pieces = list(task.build())
    with torch.no_grad():
        logits = nn.Sequential(*pieces)(x)
    assert len(pieces) == 2
    assert task.records["a"].schema.target().outputs == 2
    expected = loss_of(target)(logits[:, 1:], y)
    assert torch.allclose(nn.functional.cross_entropy(logits, task.records["a"].labels, reduction="sum"), expected)
    assert records.labels.is_floating_point()  # what Partway's own methods train on stays as it was


def test_numbers_and_survival_are_not_compared(tmp_path: Path) -> None:
    text = JOB.replace('schema = "heart"', 'schema = "support"\ntarget = "stay"')
    (tmp_path / "job.toml").write_text(text)
    done = CliRunner().invoke(app, ["compare", str(tmp_path / "job.toml"), "--folder", str(tmp_path / "c")])
    assert isinstance(done.exception, ConfigError)
    assert "classes and binary targets are compared, and stay is regression" in str(done.exception)
    assert not (tmp_path / "c").exists()
