"""The demo as its user runs it: one seed, as JSON; what it prints is what a sceptic would ask for."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from partway.attack.ridge import decode, linkage
from partway.attack.view import View

SITES = {"other", "svi", "svhc", "stmw", "svhd"}
METHODS = ["alone", "half_trained", "split", "u_shaped", "pooled", "fedavg", "large_batch_sgd"]


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    folder = tmp_path_factory.mktemp("demo")
    command = [sys.executable, "-m", "partway", "demo", "--seeds", "1", "--json", "--folder", str(folder)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 1
    return json.loads(done.stdout), next(folder.iterdir())


def test_methods_by_site_and_seed(ran: tuple[dict[str, Any], Path]) -> None:
    words, _ = ran
    assert (words["dataset"], words["seeds"]) == ("thyroid", [0])
    assert {site: row["records"] for site, row in words["sites"].items()} == {
        "other": 5378,
        "svi": 2387,
        "svhc": 956,
        "stmw": 254,
        "svhd": 71,
    }
    assert list(words["methods"]) == METHODS
    for method, found in words["methods"].items():
        assert set(found["sites"]) == SITES
        for row in found["sites"].values():
            assert len(row["macro_auc"]) == len(row["balanced_accuracy"]) == 1
        assert found["mean"]["macro_auc"][0] <= 1
        assert len(found["everybody"]["balanced_accuracy"]) == 1, method
    everybody = {m: found["everybody"]["macro_auc"][0] for m, found in words["methods"].items()}
    for method in ("half_trained", "split", "u_shaped", "fedavg"):
        assert everybody[method] > everybody["alone"] + 0.05
        assert abs(everybody[method] - everybody["pooled"]) < 0.05


def test_cost_of_each_site(ran: tuple[dict[str, Any], Path]) -> None:
    words, _ = ran
    for method, by_site in words["cost"].items():
        assert set(by_site) == SITES
        for cost in by_site.values():
            assert set(cost) == {"flops", "bytes_up", "bytes_down", "exchanges"}
        assert (by_site["svi"]["bytes_up"] > 0) == (method != "alone")
    spent = {m: words["cost"][m]["svi"] for m in METHODS}
    assert spent["fedavg"]["flops"] > 9 * max(spent[m]["flops"] for m in ("half_trained", "split", "u_shaped"))
    together = set(METHODS) - {"alone", "pooled", "half_trained"}
    for figure in ("bytes_up", "exchanges"):
        assert spent["half_trained"][figure] < min(spent[m][figure] for m in together)
    assert words["raw_bytes"]["svi"] < spent["half_trained"]["bytes_up"]  # the honest line


def test_learning_rates_are_paid_for(ran: tuple[dict[str, Any], Path]) -> None:
    words, _ = ran
    assert set(words["tuning"]) == set(METHODS)
    for method, found in words["tuning"].items():
        run = words["cost"][method]["svi"]
        assert found["cost"]["svi"]["flops"] >= run["flops"]
    assert set(words["fedavg_variants"]) == {f"fedavg_{n}_{how}" for n in (1, 5) for how in ("adam", "sgd")}


def test_equality_and_its_negation(ran: tuple[dict[str, Any], Path]) -> None:
    equality = ran[0]["equality"]
    assert equality["steps"] >= 200
    assert equality["dtype"] == "float64"
    assert max(equality["loss"], equality["parameters"]) < 1e-10
    assert equality["negative_control"] > 1e-3


def test_processes_are_real_and_their_counts_agree(ran: tuple[dict[str, Any], Path]) -> None:
    processes = ran[0]["federation"]["processes"]
    assert sorted(p["role"] for p in processes) == ["server", *["site"] * 5]
    assert len({p["pid"] for p in processes}) == len({p["fingerprint"] for p in processes}) == 6
    assert {p["tls"] for p in processes} == {"TLSv1.3"}
    server = next(p for p in processes if p["role"] == "server")
    sites = [p for p in processes if p["role"] == "site"]
    assert server["bytes_received"] == sum(p["bytes_sent"] for p in sites)
    assert server["bytes_sent"] == sum(p["bytes_received"] for p in sites)


def test_the_cut_gives_patients_away(ran: tuple[dict[str, Any], Path]) -> None:
    attack = ran[0]["attack"]
    assert attack["chance"] == 1 / 500
    assert attack["linkage_500"] > 50 * attack["chance"]


def test_what_is_left(ran: tuple[dict[str, Any], Path]) -> None:
    words, home = ran
    for picture in ("sites", "costs", "curves"):
        assert (home / f"{picture}.png").stat().st_size > 20_000
    assert json.loads((home / "result.json").read_text()) == words
    page = (home / "page.html").read_text()
    assert page.count("data:image/png;base64,") == 3
    assert not re.search(r"(src|href)=.(?!data:)|@import|url\(", page)  # it loads nothing
    for party in SITES:
        runs = [path for path in (home / "federation" / party / "runs").iterdir() if path.is_dir()]
        assert len(runs) == 4  # three methods, and the run that is compared weight by weight
        assert all(
            {p.name for p in r.iterdir()} == {"ledger.jsonl", "result.json", "network.safetensors"} for r in runs
        )


def test_without_matplotlib_the_demo_says_what_to_install(tmp_path: Path) -> None:
    code = "import sys; sys.modules['matplotlib'] = None; from partway.cli import main; sys.exit(main())"
    command = [sys.executable, "-c", code, "demo", "--folder", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 2
    assert done.stderr == "partway: the demo draws pictures and needs matplotlib: install partway[demo]\n"


# -- the attack


def test_shuffled_activations_give_nothing_away() -> None:
    """The negative control: the same attack on rows that do not belong together stays at chance."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(900, 12, generator=generator)
    z = torch.tanh(x @ torch.randn(12, 6, generator=generator) / 4)
    view = View(known_records=x[:500], known_activations=z[:500], seen_activations=z[500:])
    found = linkage(decode(view), x[500:])
    shuffled = torch.randperm(400, generator=generator)
    nothing = linkage(decode(view)[shuffled], x[500:])
    assert found > 0.2
    assert nothing < 0.02


def test_equal_records_share_the_hit() -> None:
    x = torch.tensor([[0.0, 1.0], [0.0, 1.0], [5.0, 5.0]])
    assert linkage(x, x) == pytest.approx((0.5 + 0.5 + 1) / 3)
