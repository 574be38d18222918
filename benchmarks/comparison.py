"""The demo, and heart by `partway compare`, as their users run them: what people will quote, against what was asked.

python benchmarks/comparison.py [--quick]
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from reporting import Claim, report

HEART = """
[job]
name = "heart"
[network]
build = "partway.model.zoo:mlp"
arguments = { inputs = 29, hidden = [32, 8, 32], classes = 2 }
cut = ["hidden.2"]
[records]
schema = "heart"
"""


def main(quick: bool) -> None:
    print(f"about {'3' if quick else '5'} minutes; nothing else should run on this machine")
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "heart.toml").write_text(HEART)
        began = time.perf_counter()
        thyroid = run(folder, "demo", "--seeds", "1" if quick else "3")
        seconds = time.perf_counter() - began
        heart = run(folder, "compare", "heart.toml", "--seeds", "1" if quick else "5")
    lines = [
        f"{'Quick run. ' if quick else ''}`partway demo` took {seconds:.0f} s. Every method's learning rate is the best"
        " of three on validation records of another division, and its best look at validation records is kept.",
    ]
    for found in (thyroid, heart):
        lines += ["", f"## {found['dataset']}", "", *rows(found)]
    report("comparison", claims(thyroid, heart, seconds), lines, len(os.sched_getaffinity(0)), quick)


def run(folder: str, *arguments: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "partway", *arguments, "--json"]
    done = subprocess.run(command, cwd=folder, stdout=subprocess.PIPE, text=True, check=True)
    words: dict[str, Any] = json.loads(done.stdout)
    return words


def claims(thyroid: dict[str, Any], heart: dict[str, Any], seconds: float) -> list[Claim]:
    balanced = {m: mean(everybody(thyroid, m, "balanced_accuracy")) for m in thyroid["methods"]}
    fewer = {m: spent(thyroid, "fedavg", "flops") / spent(thyroid, m, "flops") for m in ("half_trained", "split")}
    together = ("half_trained", "split", "u_shaped", "fedavg", "large_batch_sgd")
    least = {what: min(together, key=lambda m: spent(thyroid, m, *what)) for what in (BYTES, ("exchanges",))}
    most = {what: max(together, key=lambda m: spent(thyroid, m, *what)) for what in (BYTES, ("exchanges",))}
    half = {what: spent(thyroid, "half_trained", *what) for what in (BYTES, ("exchanges",))}
    auc = mean(everybody(heart, "split", "macro_auc"))
    own = [mean(row["macro_auc"]) for row in heart["methods"]["alone"]["everybody_by_site"].values()]
    gaps = {m: balanced[m] - balanced["pooled"] for m in ("half_trained", "split", "fedavg")}
    found = [Claim("demo_seconds", seconds, "s", "at most 360", seconds <= 360)]
    found += [
        Claim(f"balanced_accuracy_{m}_less_pooled", gap, "", "a tie: within 0.02", abs(gap) <= 0.02)
        for m, gap in gaps.items()
    ]
    found += [
        Claim(f"fedavg_flops_over_{m}", factor, "x, a mean site", "14 to 18", factor >= 14)
        for m, factor in fewer.items()
    ]
    ours = all(method == "half_trained" for method in least.values())
    found += [
        Claim("half_trained_mb", half[BYTES] / 1e6, "MB, a mean site", "fewest; 0.2", ours and half[BYTES] < 0.25e6),
        Claim("half_trained_exchanges", half["exchanges",], "", "fewest; 4", ours and half["exchanges",] <= 4),
        Claim("alone_less_pooled", balanced["alone"] - balanced["pooled"], "", "far behind", balanced["alone"] < 0.6),
        Claim("heart_auc_synchronous", auc, "", "about 0.89", auc > 0.88),
        Claim("heart_auc_best_own_model", max(own), "", "0.70 to 0.86 for one hospital's", max(own) < auc),
    ]
    split = all(method in ("split", "u_shaped") for method in most.values())
    return [*found, Claim("synchronous_costs_most", float(split), "1: yes", "most bytes and exchanges", split)]


BYTES = ("bytes_up", "bytes_down")


def spent(found: dict[str, Any], method: str, *what: str) -> float:
    """Of a mean site."""
    return mean(sum(cost[name] for name in what) for cost in found["cost"][method].values())


def everybody(found: dict[str, Any], method: str, figure: str) -> list[float]:
    values: list[float] = found["methods"][method]["everybody"][figure]
    return values


def rows(found: dict[str, Any]) -> list[str]:
    head = "| method | own bal. acc. | own AUC | all acc. | all bal. acc. | all AUC | MFLOP | MB | exchanges | rate |"
    table = [f"{len(found['seeds'])} seeds, mean ± s.d.; costs of a mean site.", "", head, "| --- " * 10 + "|"]
    for method, row in found["methods"].items():
        own = [told(row["mean"][f]) for f in ("balanced_accuracy", "macro_auc")]
        everyone = [told(row["everybody"][f]) for f in ("accuracy", "balanced_accuracy", "macro_auc")]
        costs = f"{spent(found, method, 'flops') / 1e6:,.0f} | {spent(found, method, *BYTES) / 1e6:.2f}"
        costs += f" | {spent(found, method, 'exchanges'):,.0f} | {found['tuning'][method]['rate']:g}"
        table.append(f"| {row['title']} | {' | '.join([*own, *everyone])} | {costs} |")
    return table


def told(values: Sequence[float | None]) -> str:
    known = [v for v in values if v is not None]
    return f"{mean(known):.3f} ± {stdev(known) if len(known) > 1 else 0:.3f}" if known else "none"


if __name__ == "__main__":
    main(quick="--quick" in sys.argv[1:])
