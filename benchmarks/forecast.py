"""What a job is told to cost before it runs, beside what its parties have counted over real processes.

For each of Partway's methods and each site of the thyroid demo: FLOPs and bytes as `partway cost` tells them, as the
party counts them while it runs, and, independently of both, as PyTorch counts FLOPs over all parties of the same job in
one process, and as the connection counts bytes, with headers and control messages.

    python benchmarks/forecast.py [--quick]
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path
from typing import Any

from reporting import Claim, report
from rich.progress import track
from torch.utils.flop_counter import FlopCounterMode

from partway.assembly import forecast_of
from partway.compare.comparison import OURS, TITLES, job_of
from partway.config import Job, read_job
from partway.cost import Cost
from partway.data import thyroid
from partway.demo import BASE
from partway.local import LocalFederation, sections_of, toml
from partway.simulation import federation


def main(quick: bool) -> None:
    epochs = 3 if quick else 40
    print(f"about {'1 minute' if quick else '3 minutes'}")
    base, records = read_job(toml(BASE)), thyroid.bundled(0)
    sizes = {site: records[site].sizes for site in sorted(records)}
    rows: list[str] = []
    worst = {"flops": 0.0, "counted": 0.0, "bytes": 0.0, "link": 0.0, "exchanges": 0.0}
    with tempfile.TemporaryDirectory() as folder:
        files = {p.name.removesuffix(".csv.gz"): p for p in thyroid.write_sites(Path(folder) / "records")}
        with LocalFederation(Path(folder) / "federation", files, {"most_epochs": 200}) as running:
            running.start()
            for method in track(OURS, "methods"):
                job = with_epochs(job_of(base, method, 3e-3, 0), epochs)
                told = forecast_of(job, thyroid.SCHEMA, sizes)
                before = links(running)
                ran = running.run(sections_of(job))
                after = links(running)
                for site in running.sites:
                    counted = Cost(**ran.result(site)["cost"][site])
                    link = after[site] - before.get(site, 0)
                    rows.append(row(method, site, told[site], counted, link))
                    keep_worst(worst, told[site], counted, link)
                everybody = sum(cost.flops for cost in told.values())
                by_torch = flops_by_torch(job, records)
                worst["counted"] = max(worst["counted"], abs(everybody / by_torch - 1))
                rows.append(f"| {TITLES[method]} | all parties | {everybody:,} | {by_torch:,} (torch) | | | | | |")
    claims = [
        Claim("forecast_flops_error", 100 * worst["flops"], "%", "at most 1", worst["flops"] <= 0.01),
        Claim("forecast_bytes_error", 100 * worst["bytes"], "%", "at most 3", worst["bytes"] <= 0.03),
    ]
    lines = [
        f"{'Quick run. ' if quick else ''}Thyroid, five sites and a server, {epochs} epochs together, the largest error"
        " of any site and method. Counted: by the parties, over real processes.",
        "",
        f"Beside these: PyTorch's own count over all parties differs from the forecast by {worst['counted']:.2%} at"
        f" most; the connections have carried up to {worst['link']:.1%} more bytes than the forecast, for it leaves out"
        f" headers and control messages; exchanges differ by up to {worst['exchanges']:.0f}.",
        "",
        "| method | site | FLOPs told | counted | bytes told | counted | link | exchanges told | counted |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
        *rows,
    ]
    report("forecast", claims, lines, len(os.sched_getaffinity(0)), quick)


def with_epochs(job: Job, epochs: int) -> Job:
    words = sections_of(job)
    words["training"]["epochs"] = epochs
    return read_job(toml(words))


def links(running: LocalFederation) -> dict[str, int]:
    """Bytes that each site's connection has carried since it was opened."""
    found = {}
    for site in running.sites:
        said: dict[str, Any] = running.processes[site].said
        found[site] = said.get("bytes_sent", 0) + said.get("bytes_received", 0)
    return found


def row(method: str, site: str, told: Cost, counted: Cost, link: int) -> str:
    ahead, behind = (f"{c.bytes_up + c.bytes_down:,}" for c in (told, counted))
    return (
        f"| {TITLES[method]} | {site} | {told.flops:,} | {counted.flops:,} | {ahead} | {behind} | {link:,} "
        f"| {told.exchanges:,} | {counted.exchanges:,} |"
    )


def keep_worst(worst: dict[str, float], told: Cost, counted: Cost, link: int) -> None:
    ahead, behind = (c.bytes_up + c.bytes_down for c in (told, counted))
    worst["flops"] = max(worst["flops"], abs(told.flops / counted.flops - 1))
    worst["bytes"] = max(worst["bytes"], abs(ahead / behind - 1))
    worst["link"] = max(worst["link"], link / ahead - 1)
    worst["exchanges"] = max(worst["exchanges"], abs(told.exchanges - counted.exchanges))


def flops_by_torch(job: Job, records: Any) -> int:
    """Of the job's turns alone: what cutting and measuring the network take is counted apart."""
    whole = federation(job, records)
    with FlopCounterMode(display=False) as counter:
        whole.run()
    return int(counter.get_total_flops())


if __name__ == "__main__":
    main(quick="--quick" in sys.argv[1:])
