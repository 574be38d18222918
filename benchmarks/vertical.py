"""SUPPORT split by columns: what history, vitals and laboratory tell of a patient's 30 days, joined and each alone.

The example's job (`examples/vertical.toml`), by the parties themselves in one process; alone is the same job with one
holder. Five seeds: each divides the patients, draws orders and first weights anew.

python benchmarks/vertical.py [--quick]
"""

from __future__ import annotations

import os
import statistics
import sys
from pathlib import Path

import msgspec
from reporting import Claim, report
from rich.console import Console

from partway.config import Job, read_job_file
from partway.data.sets import records_for
from partway.simulation import simulate

EXAMPLE = Path(__file__).parent.parent / "examples" / "vertical.toml"
HOLDERS = ("history", "vitals", "laboratory")


def job_of(base: Job, holders: tuple[str, ...], seed: int) -> Job:
    """The example's job, with some of its holders."""
    holds = {party: held for party, held in base.holds.items() if party in holders or held.targets}
    networks = {n: own for n, own in base.networks.items() if n == "trunk" or n.removeprefix("bottom_") in holders}
    trunk = networks["trunk"]
    inputs = trunk.arguments["inputs"] * len(holders) // len(HOLDERS)
    networks["trunk"] = msgspec.structs.replace(trunk, arguments={**trunk.arguments, "inputs": inputs})
    header = msgspec.structs.replace(base.job, seed=seed)
    return msgspec.structs.replace(base, job=header, holds=holds, networks=networks)


def main(quick: bool) -> None:
    seeds = range(2) if quick else range(5)
    base, found = read_job_file(EXAMPLE), dict[str, list[dict[str, float]]]()
    print(f"about {20 if quick else 60} seconds")
    with Console(stderr=True).status("") as line:
        for name, holders in {"joined": HOLDERS, **{h: (h,) for h in HOLDERS}}.items():
            for seed in seeds:
                line.update(f"{name}, seed {seed + 1} of {len(seeds)}")
                job = job_of(base, holders, seed)
                found.setdefault(name, []).append(simulate(job, records_for(job, None)(seed)).all)
    means = {name: statistics.mean(row["macro_auc"] for row in rows) for name, rows in found.items()}
    best = max(HOLDERS, key=means.__getitem__)
    claims = [
        Claim("vertical_auc", means["joined"], "", "at least 0.765", means["joined"] >= 0.765),
        Claim("vertical_best_alone_auc", means[best], f"({best})", "about 0.72", means[best] < means["joined"]),
    ]
    keys = ("macro_auc", "balanced_accuracy", "accuracy")
    lines = [
        f"`examples/vertical.toml`, {len(seeds)} seeds, each dividing the patients anew; test records, mean ± "
        "s.d.; alone: the same job with one holder.",
        "",
        "| who | AUC | balanced accuracy | accuracy |",
        "| --- | --- | --- | --- |",
        *(
            f"| {name} | {' | '.join(spread([row[key] for row in rows]) for key in keys)} |"
            for name, rows in found.items()
        ),
    ]
    report("vertical", claims, lines, len(os.sched_getaffinity(0)), quick)


def spread(values: list[float]) -> str:
    return f"{statistics.mean(values):.3f} ± {statistics.stdev(values):.3f}"


if __name__ == "__main__":
    main(quick="--quick" in sys.argv[1:])
