"""Steps a second and CPU milliseconds a step, over real processes on loopback with everything on.

Five sites and a server, mutual TLS, policy, ledger, checks, progress, union batch 256, float32; blind sums and sums in
the clear in alternating pairs on one federation. Then one site, batch 64.

    python benchmarks/step_rate.py [--quick]
"""

from __future__ import annotations

import os
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import matplotlib
from reporting import REPORTS, Claim, report, spread, unsplit_step_ms
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from partway.data.thyroid import write_sites
from partway.local import SERVER, LocalFederation
from partway.local import toml as as_toml

matplotlib.use("Agg")
from matplotlib import pyplot

WARM_UP = 60
"""Steps that are not timed."""

BARS_MACHINE_MS = 0.49
"""The unsplit step, fused, on the 2 EPYC cores where a prototype without plans and policies made 200 steps a second."""


@dataclass(frozen=True)
class Timed:
    """One run between two of the server's own reports."""

    steps_a_second: float
    cpu_ms: dict[str, float]
    """A step, by party."""

    @property
    def total_ms(self) -> float:
        return sum(self.cpu_ms.values())


def job(seed: int, epochs: int, **training: Any) -> dict[str, dict[str, Any]]:
    return {
        "job": {"name": "step-rate", "seed": seed},
        "network": {
            "build": "partway.model.zoo:mlp",
            "arguments": {"inputs": 29, "hidden": [64, 16, 128, 64], "classes": 7},
            "cut": ["hidden.2"],
        },
        "training": {"epochs": epochs, **training},
        "evaluation": {"every": 0},
    }


def time_run(running: LocalFederation, words: dict[str, dict[str, Any]]) -> Timed:
    """Runs a job and times it between the server's first report after the warm-up and its last before the end."""
    server = running.processes[SERVER]
    status = running.submit(running.sign(words))

    def reached(step: int) -> bool:
        return server.said.get("id") == status.id and server.said["step"] >= step

    def mark() -> tuple[int, float, dict[str, float]]:
        said = server.said
        return said["step"], said["seconds"], {name: p.cpu_seconds() for name, p in running.processes.items()}

    running.wait_until(lambda: reached(WARM_UP), SERVER)
    first, last = mark(), mark()
    while not (server.said.get("id") == status.id and server.said["state"] != "running"):
        if server.said["step"] > last[0]:
            last = mark()
        running.wait_until(lambda: server.said.get("id") == status.id, SERVER)
        running.pause()
    if server.said["state"] != "done":
        raise SystemExit(f"the job has failed: {server.said['message']}")
    steps = last[0] - first[0]
    cpu = {name: 1000 * (last[2][name] - first[2][name]) / steps for name in last[2]}
    return Timed(steps / (last[1] - first[1]), cpu)


def main(quick: bool) -> None:
    pairs, epochs = (2, 15) if quick else (7, 30)
    print(f"about {'1 minute' if quick else '3 minutes'}; nothing else should run on this machine")
    folder = Path(tempfile.mkdtemp(prefix="partway-step-rate-"))
    files = {path.name.removesuffix(".csv.gz"): path for path in write_sites(folder / "records")}
    runs: dict[str, list[Timed]] = {"blind": [], "clear": [], "one site": []}
    columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
    with Progress(*columns) as progress:
        task = progress.add_task("five sites, batch 256", total=2 * pairs + pairs)
        with LocalFederation(folder / "five", files, {"clear_sums": True}) as running:
            running.start()
            for pair in range(pairs):
                order = ("blind", "clear") if pair % 2 == 0 else ("clear", "blind")
                for sums in order:
                    runs[sums].append(time_run(running, job(pair, epochs, batch=256, sums=sums)))
                    progress.advance(task)
        progress.update(task, description="one site, batch 64")
        with LocalFederation(folder / "one", {"other": files["other"]}) as running:
            running.start()
            for seed in range(pairs):
                runs["one site"].append(time_run(running, job(seed, epochs, batch=64)))
                progress.advance(task)
    tell(runs, quick)


def tell(runs: dict[str, list[Timed]], quick: bool) -> None:
    blind, clear, one = runs["blind"], runs["clear"], runs["one site"]
    rate, cpu = median(r.steps_a_second for r in blind), median(r.total_ms for r in blind)
    ratios = [b.steps_a_second / c.steps_a_second for b, c in zip(blind, clear, strict=True)]
    alone = median(r.steps_a_second for r in one)
    claims = [
        Claim("step_rate", rate, "steps/s", "at least 150", rate >= 150),
        Claim("step_cpu_ms", cpu, "CPU ms/step, all processes", "at most 10", cpu <= 10),
        Claim("blind_over_clear", median(ratios), "x", "at least 0.9", median(ratios) >= 0.9),
        Claim("step_rate_one_site", alone, "steps/s", "at least 600", alone >= 600),
    ]
    unsplit = unsplit_step_ms()
    lines = [
        f"{'Quick run. ' if quick else ''}Real processes on loopback, mutual TLS 1.3, with policy, ledger, checks and"
        f" progress; {WARM_UP} steps of a run are not timed. Blind and clear in alternating pairs on one federation.",
        "",
        f"How fast this machine is: one unsplit PyTorch step of this network at batch 256 takes {unsplit:.2f} CPU ms"
        f" (on the machine for which the bars were set, {BARS_MACHINE_MS}).",
        "",
        "| | steps/s | CPU ms a step, all | of it the server | a site |",
        "| --- | --- | --- | --- | --- |",
    ]
    for name, timed in runs.items():
        site = [median(ms for party, ms in r.cpu_ms.items() if party != SERVER) for r in timed]
        lines.append(
            f"| {name} | {spread([r.steps_a_second for r in timed])} | {spread([r.total_ms for r in timed])} "
            f"| {spread([r.cpu_ms[SERVER] for r in timed])} | {spread(site)} |"
        )
    lines += ["", "```toml", as_toml(job(0, 30, batch=256, sums="blind")).strip(), "```", "", "![](PICTURE)"]
    path = report("step_rate", claims, lines, len(os.sched_getaffinity(0)), quick)
    picture = path.with_suffix(".png")
    path.write_text(path.read_text().replace("PICTURE", picture.name))
    draw(runs, REPORTS / picture.name)


def draw(runs: dict[str, list[Timed]], path: Path) -> None:
    figure, axes = pyplot.subplots(figsize=(7, 3), layout="constrained")
    for place, timed in enumerate(runs.values()):
        values = [r.steps_a_second for r in timed]
        axes.plot(values, [place] * len(values), "o", color="#0b6e99", alpha=0.6)
        axes.plot(median(values), place, "|", color="black", markersize=22)
    for place, asked in ((0, 150), (2, 600)):
        axes.plot(asked, place, "|", color="#b3261e", markersize=22)
    axes.set_yticks(range(len(runs)), ["five sites, blind", "five sites, clear", "one site, batch 64"])
    axes.set_xlim(left=0)
    axes.set_xlabel("steps a second: each run, their median (black), what was asked (red)")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main(quick="--quick" in sys.argv[1:])
