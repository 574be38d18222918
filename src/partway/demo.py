"""Five hospitals and a server on this machine, real processes over mutual TLS, beside everything they could do else."""

from __future__ import annotations

import math
import statistics
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from safetensors.torch import load_file

from partway.assembly import network_of
from partway.attack.ridge import decode, linkage
from partway.attack.view import View
from partway.compare import tables
from partway.compare.comparison import (
    OURS,
    TITLES,
    TUNED_ON,
    Comparison,
    alternatives,
    details_of,
    job_of,
    trained_of,
    tune,
    workers,
)
from partway.compare.run import begin, learn_rates, leave
from partway.config import Job, Policy, read_job
from partway.cost import Cost
from partway.data import thyroid
from partway.data.sets import bundled
from partway.equality import plain_run
from partway.local import SERVER, LocalFederation, Ran, sections_of, toml
from partway.report import Result, machine
from partway.server.status import Status
from partway.train import baselines

TELLS, CANDIDATES = "svi", 500
"""The site that tells the server what it knows, and how many of the others' records the server tries to name."""
BASE: dict[str, dict[str, Any]] = {
    "job": {"name": "thyroid"},
    "network": {
        "build": "partway.model.zoo:mlp",
        "arguments": {"inputs": 29, "hidden": [64, 16, 128, 64], "classes": 7},
        "cut": ["hidden.2", "hidden.7"],
    },
}
"""The demo's network and records: 16 numbers a record cross the first cut, and in a U-shape 64 come back."""
MARKED: dict[str, dict[str, Any]] = {
    **BASE,
    "network": {**BASE["network"], "arguments": {**BASE["network"]["arguments"], "inputs": 71}},
    "records": {"scale": "marks"},
}
"""The same with other inputs: reference ranges in place of statistics, and marks at their limits."""
EQUAL: dict[str, dict[str, Any]] = {
    **BASE,
    "network": {**BASE["network"], "cut": ["hidden.2"]},
    "training": {"epochs": 10, "dtype": "float64", "keep": "last"},
    "evaluation": {"every": 0},
    "result": {"trunk": "everyone"},
}
"""The run that is compared, weight by weight, with one loop over pooled records."""


def demo(folder: Path, seeds: int, as_json: bool) -> None:
    """Runs it all and shows what came out.

    Args:
        folder: a folder of this run is made in it.
        seeds: each divides the records, draws orders and first weights anew.
        as_json: print one JSON object instead of tables; progress goes to stderr.
    """
    began, base, marked = time.monotonic(), read_job(toml(BASE)), read_job(toml(MARKED))
    console, home, found = begin("the demo", base, thyroid.bundled(0), folder, seeds, as_json)
    files = {path.name.removesuffix(".csv.gz"): path for path in thyroid.write_sites(home / "records")}
    console.print(f"They train one network, {len(TITLES)} ways. On two cores this takes about {70 + 40 * seeds} s.")
    more: dict[str, Any] = {"attack": [], "federation": {}}
    with workers() as pool:
        with console.status("") as line:
            learn_rates(found, tune(pool, base, thyroid.bundled(TUNED_ON)), line.update)
        with LocalFederation(home / "federation", files, {"most_releases": seeds}) as running:
            with console.status("starting six processes, each with its own records, certificate, policy and ledger"):
                running.start()
            for seed in found.seeds:
                more["attack"].append(_our_methods(console, running, found, seed))
                _alternatives(console, pool, found, marked, seed)
            with Show(console, running, "equality: 200 steps in float64") as show:
                ran = running.run(EQUAL, show.update)
            with console.status("the same 200 steps in one loop over pooled records"):
                more["equality"] = _equality(running, ran)
            more["federation"]["processes"] = _processes(running, ran.status)
    words = _words(found, more, time.monotonic() - began)
    leave(console, found, words, [*tables.notes(found), *_sentences(words)], home, as_json)
    if not as_json:
        console.print("  federation/<party>/runs: each party's ledger, result and weights, a folder a job")


# -- what is run


def _our_methods(console: Console, running: LocalFederation, found: Comparison, seed: int) -> float:
    """Real runs of each; returns what the attack on the cut of `synchronous` comes to."""
    linked = 0.0
    for method in OURS:
        job = job_of(found.base, method, found.rate(method), seed)
        with Show(console, running, f"seed {seed + 1} of {len(found.seeds)}: {TITLES[method]}") as show:
            ran = running.run(sections_of(job), show.update)
        result = _result(running, ran)
        found.add(method, trained_of(result), details_of(result))
        if method == "split":
            linked = _attack(job, ran, seed)
    return linked


def _alternatives(console: Console, pool: ProcessPoolExecutor, found: Comparison, marked: Job, seed: int) -> None:
    """Plain loops, and some of them with other inputs too; `synchronous` is the pooled one."""
    title = f"seed {seed + 1} of {len(found.seeds)}: the alternatives, as plain loops"
    rates = {name: tuned.rate for name, tuned in found.tuning.items()}
    with console.status(title) as line:
        others = {name: rate for name, rate in rates.items() if name not in OURS}
        for name, trained in alternatives(pool, found.base, thyroid.bundled(seed), others, seed):
            found.add(name, trained)
            line.update(f"{title}; {name} has ended")
        names = ("alone", "half_trained", "pooled", found.name_of("fedavg"), "large_batch_sgd")
        some = {name: rates[name] for name in names}
        runs = dict(alternatives(pool, marked, bundled("thyroid", seed, "marks"), some, seed))
        for name in names:
            found.marked.setdefault(name, []).append(runs[name])


def _result(running: LocalFederation, ran: Ran) -> Result:
    """What server and sites have left of a job, as one result."""
    at_server = ran.result(SERVER)
    own = {site: ran.result(site) for site in running.sites}
    return Result(
        job=at_server["job"],
        party="demo",
        losses=at_server["losses"] or _added([o["losses"] for o in own.values()]),
        validation=at_server["validation"],
        all=at_server["all"],
        sites={site: words["sites"][site] for site, words in own.items()},
        cost={site: Cost(**words["cost"][site]) for site, words in own.items()},
        plan=at_server["plan"],
        holds=at_server["holds"],
        ledgers=at_server["ledgers"],
    )


def _added(losses: list[list[float]]) -> list[float]:
    """In a U-shape each site has its part of a step's loss; not every site in every step, so this is near the sum."""
    return [sum(part) for part in zip(*losses, strict=False)]


def _attack(job: Job, ran: Ran, seed: int) -> float:
    """The server, told by one site what it knows, decodes the others' training records from the cut."""
    allowed = Policy(networks=list(job.builds))
    bottom = network_of(job, allowed, thyroid.SCHEMA).modules["bottom"]
    held = load_file(ran.folders[TELLS] / "network.safetensors")
    bottom.load_state_dict({name: held[name] for name in bottom.state_dict()})
    records = thyroid.bundled(seed)
    features = baselines.scaled_together(records)
    rows = {site: baselines.rows({site: own}, features, "train")[0] for site, own in records.items()}
    others = torch.cat([x for site, x in rows.items() if site != TELLS])
    chosen = others[torch.randperm(len(others), generator=torch.Generator().manual_seed(seed))[:CANDIDATES]]
    with torch.no_grad():
        known, seen = bottom(rows[TELLS]), bottom(chosen)
    view = View(known_records=rows[TELLS], known_activations=known, seen_activations=seen)
    return linkage(decode(view), chosen)


def _equality(running: LocalFederation, ran: Ran) -> dict[str, Any]:
    """The real run in float64 over TLS against one loop, and against a loop in another order, which must differ."""
    roster = {site: running.fingerprints[site] for site in running.sites}
    job = read_job(toml({**EQUAL, "roster": roster}))
    parties = (SERVER, *running.sites)
    secrets = {party: running.secret(party) for party in parties}
    held = [load_file(next(ran.folders[party].glob("*.safetensors"))) for party in parties]
    told = ran.result(SERVER)["losses"]

    def apart(other_order: bool) -> tuple[float, float]:
        network, losses = plain_run(job, ran.digest, secrets, thyroid.bundled(0), other_order=other_order)
        state = network.state_dict()
        weights = max(float((t - state[name]).abs().max()) for tensors in held for name, t in tensors.items())
        return weights, max(abs(a - b) for a, b in zip(told, losses, strict=True))

    parameters, loss = apart(other_order=False)
    control, _ = apart(other_order=True)
    return {
        "steps": len(told),
        "dtype": "float64",
        "loss": loss,
        "parameters": parameters,
        "negative_control": control,
    }


def _processes(running: LocalFederation, status: Status) -> list[dict[str, Any]]:
    """Who took part, over what, and what each end has counted since it connected."""
    tls, rows = running.tls_version(), []
    for process in running.processes.values():
        sent, received = sum(status.bytes_sent.values()), sum(status.bytes_received.values())
        if process.role == "site":
            running.wait_for_state(process.name, "done")
            sent, received = process.said["bytes_sent"], process.said["bytes_received"]
        row = {"role": process.role, "name": process.name, "pid": process.pid, "fingerprint": process.fingerprint}
        rows.append({**row, "tls": tls, "bytes_sent": sent, "bytes_received": received})
    return rows


def _words(found: Comparison, more: dict[str, Any], seconds: float) -> dict[str, Any]:
    """The object that `--json` prints."""
    return {
        **found.words(),
        "equality": more["equality"],
        "attack": {
            "how": "ridge regression from the cut back to the record",
            "adversary": f"the server, told by {TELLS} what it knows",
            "linkage_500": statistics.mean(more["attack"]),
            "each_seed": more["attack"],
            "chance": 1 / CANDIDATES,
        },
        "federation": more["federation"],
        "machine": machine(threads=1),
        "seconds": round(seconds, 1),
    }


# -- what is shown


class Show:
    """A live table of the parties while a job runs; where no person watches, nothing."""

    def __init__(self, console: Console, running: LocalFederation, title: str) -> None:
        self._running, self._title = running, title
        self._live = Live(console=console, refresh_per_second=5, transient=True)
        self._quiet = not console.is_terminal

    def __enter__(self) -> Show:
        if not self._quiet:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if not self._quiet:
            self._live.stop()

    def update(self, status: Status) -> None:
        """Draws where the server and each site stand."""
        if self._quiet:
            return
        left = f", about {status.seconds_left:.0f} s left" if status.seconds_left else ""
        loss = f", loss {status.loss:.4f}" if status.loss is not None else ""
        title = f"{self._title}: {status.state}, step {status.step} of {status.steps}{loss}{left}"
        table = Table(box=None, pad_edge=False)
        for column in ("site", "state", "step", "sent", "received", "waits for", "time left"):
            table.add_column(column, justify="right" if column in ("step", "sent", "received", "time left") else "left")
        for site in self._running.sites:
            said = self._running.processes[site].said
            seconds = said.get("seconds_left")
            table.add_row(
                site,
                said["state"],
                f"{said['step']}/{said['steps']}",
                f"{said['bytes_sent'] / 1e6:.1f} MB",
                f"{said['bytes_received'] / 1e6:.1f} MB",
                said["waits_for"],
                f"{seconds:.0f} s" if seconds is not None else "",
            )
        self._live.update(Group(title, table))


def _sentences(words: dict[str, Any]) -> list[str]:
    """What real processes have shown besides."""
    equal, linked = words["equality"], words["attack"]["linkage_500"]
    return [
        f"Equal: after {equal['steps']} steps in {equal['dtype']} over TLS, with blind sums, no weight at any party is "
        f"further than {_above(equal['parameters'])} from one loop over pooled records (in another order: "
        f"{equal['negative_control']:.0e}).",
        f"Private: no. With this cut, a server that {TELLS} tells what it knows picks the right patient of "
        f"{CANDIDATES} in {100 * linked:.0f} of 100 cases (chance: 0.2): training partway alone is not privacy.",
    ]


def _above(value: float) -> str:
    """One digit, rounded up.

    >>> _above(5.2e-15)
    '6e-15'
    """
    exponent = math.floor(math.log10(value)) if value else 0
    return f"{math.ceil(value / 10.0**exponent)}e{exponent:+03d}" if value else "0"
