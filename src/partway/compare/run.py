"""`partway compare`: any job's network and records, by Partway's schedules and by what there is beside them."""

from __future__ import annotations

import importlib.util
import json
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from rich.console import Console

from partway.compare import tables
from partway.compare.comparison import OURS, TUNED_ON, Comparison, alternatives, ours, tune, workers
from partway.compare.page import page
from partway.compare.picture import draw_all
from partway.config import Job
from partway.data.records import Records
from partway.errors import ConfigError, UsageError
from partway.report import machine, write_whole
from partway.train.tuning import METHODS

RecordsOf = Callable[[int], Mapping[str, Records]]
"""From a seed to every site's records, divided by it."""


def compare(job: Job, records_of: RecordsOf, folder: Path, seeds: int, as_json: bool) -> None:
    """Runs it all in processes of this machine and shows what came out.

    Args:
        job: its network and records; with two cuts, a U-shape is among the methods.
        folder: a folder of this comparison is made in it.
        seeds: each divides the records, draws orders and first weights anew.
        as_json: print one JSON object instead of tables; progress goes to stderr.
    """
    if not job.laned or job.network is None:
        raise ConfigError("what is compared is one network, cut once or twice, over sites with patients of their own")
    divided = records_of(0)
    target = next(iter(divided.values())).schema.target()
    if target.kind not in ("classes", "binary"):
        kind = target.kind.replace("_", "-")
        raise ConfigError(f"classes and binary targets are compared, and {target.name} is {kind}: use partway simulate")
    began = time.monotonic()
    console, home, found = begin("a comparison", job, divided, folder, seeds, as_json)
    methods = [m for m in OURS if m != "u_shaped" or len(job.cuts) > 1]
    with workers() as pool, console.status("") as line:
        learn_rates(found, tune(pool, job, records_of(TUNED_ON)), line.update)
        rates = {name: chosen.rate for name, chosen in found.tuning.items() if name not in OURS}
        for seed in found.seeds:
            mine, divided = {method: found.rate(method) for method in methods}, records_of(seed)
            left = home / "runs" / f"seed-{seed}"
            for method, (trained, details) in ours(pool, job, divided, mine, seed, left):
                found.add(method, trained, details)
                line.update(f"seed {seed + 1} of {seeds}: {method} has ended")
            for method, trained in alternatives(pool, job, divided, rates, seed):
                found.add(method, trained)
                line.update(f"seed {seed + 1} of {seeds}: {method} has ended")
    words = {**found.words(), "machine": machine(threads=1), "seconds": round(time.monotonic() - began, 1)}
    leave(console, found, words, list(tables.notes(found)), home, as_json)
    if not as_json:
        console.print("  runs/<seed>/<method>: each run's result, network and ledgers")


def begin(
    what: str, job: Job, records: Mapping[str, Records], folder: Path, seeds: int, as_json: bool
) -> tuple[Console, Path, Comparison]:
    """Where it is told, where it is left, and nothing found yet.

    Raises:
        UsageError: the pictures could not be drawn; nothing has been run then.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise UsageError(f"{what} draws pictures and needs matplotlib: install partway[demo]")
    console = Console(stderr=as_json, highlight=False, markup=False)
    home = folder / datetime.now().strftime("%Y-%m-%dT%H-%M-%S")
    home.mkdir(parents=True)
    sizes = {site: records[site].sizes for site in sorted(records)}
    name = job.columns.schema.name if job.columns else job.job.name
    found = Comparison(job, name, list(range(seeds)), next(iter(records.values())).schema, sizes)
    count = sum(len(own.labels) for own in records.values())
    console.print(f"{count:,} {name} records of {len(sizes)} sites; everything is left in {home}.")
    return console, home, found


def learn_rates(found: Comparison, chosen: Any, say: Callable[[str], None]) -> None:
    """Takes learning rates as they are found."""
    for name, tuned in chosen:
        found.tuning[name] = tuned
        say(f"learning rates, three for each method: {len(found.tuning)} of {len(METHODS)} are found")


def leave(
    console: Console, found: Comparison, words: dict[str, Any], notes: Sequence[str], home: Path, as_json: bool
) -> None:
    """Writes what a comparison leaves into its folder, and shows it."""
    write_whole(home / "result.json", json.dumps(words, indent=2).encode())
    pictures = draw_all(words, home)
    write_whole(home / "page.html", page(words, notes, pictures).encode())
    if as_json:
        print(json.dumps(words))
        return
    for made in tables.everything(found):
        console.print(made)
    for sentence in notes:
        console.print(f"\n{sentence}")
    console.print(f"\n{words['seconds']:.0f} s. In {home}:\n  page.html, all of this to look at and to hand on")
    console.print(f"  result.json, {', '.join(path.name for path in pictures)}")
