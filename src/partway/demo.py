"""Five hospitals and a server on this machine, real processes over mutual TLS, beside training alone and pooled."""

from __future__ import annotations

import importlib.util
import json
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from safetensors.torch import load_file

from partway.assembly import network_of, optimizer_of
from partway.attack.ridge import decode, linkage
from partway.attack.view import View
from partway.config import Job, Policy, read_job
from partway.cost import Cost
from partway.data import thyroid
from partway.data.records import Records
from partway.equality import plain_run
from partway.errors import UsageError
from partway.local import SERVER, LocalFederation, Ran, toml
from partway.picture import draw
from partway.report import machine, write_whole
from partway.server.status import Status
from partway.train import baselines
from partway.train.metrics import Scores

METHODS = ("alone", "split", "pooled")
FIGURES = {"balanced_accuracy": "balanced accuracy", "macro_auc": "macro-AUC"}
SMALL = "svhd"
"""The site whose 25 test records say little."""
ALONE_BATCH = 64
"""Records a step where a site trains alone: smaller batches than together, for they favour small sites."""
TELLS, CANDIDATES = "svi", 500
"""The site that tells the server what it knows, and how many of the others' records the server tries to name."""


def job_words(seed: int, **training: Any) -> dict[str, dict[str, Any]]:
    """The demo's job file, as sections."""
    return {
        "job": {"name": "thyroid", "seed": seed},
        "network": {
            "build": "partway.model.zoo:mlp",
            "arguments": {"inputs": 29, "hidden": [64, 16, 128, 64], "classes": 7},
            "cut": ["hidden.2"],
        },
        "training": {"epochs": 20, "batch": 256, "optimizer": {"name": "adam", "lr": 3e-3}, **training},
        "evaluation": {"every": 4, "site_scores": True},
        "result": {"bottom": "sites", "trunk": "everyone"},
    }


@dataclass
class Outcome:
    """All that the demo has found."""

    seeds: list[int]
    records: dict[str, int]
    """Of each site."""
    scores: dict[str, dict[str, list[Scores]]] = field(default_factory=lambda: {m: {} for m in METHODS})
    """By method and site, one a seed."""
    validation: list[list[dict[str, Any]]] = field(default_factory=list)
    """Of the split runs, over all sites, by epoch; one a seed."""
    losses: dict[str, list[Sequence[float]]] = field(default_factory=lambda: {"split": [], "pooled": []})
    """Of each step; one a seed."""
    cost: dict[str, dict[str, Cost]] = field(default_factory=lambda: {m: {} for m in METHODS})
    """Of one run, by method and site."""
    equality: dict[str, Any] = field(default_factory=dict)
    linkage: list[float] = field(default_factory=list)
    """One a seed."""
    processes: list[dict[str, Any]] = field(default_factory=list)
    seconds: float = 0.0

    def add(self, method: str, scores: dict[str, Scores]) -> None:
        for site, row in scores.items():
            self.scores[method].setdefault(site, []).append(row)

    def means(self, method: str, figure: str, without: str = "") -> list[float]:
        """Over the sites, one a seed."""
        rows = [r for site, r in self.scores[method].items() if site != without]
        return [statistics.mean(getattr(row[n], figure) for row in rows) for n in range(len(self.seeds))]

    def words(self) -> dict[str, Any]:
        """The object that `--json` prints."""
        return {
            "dataset": "thyroid",
            "seeds": self.seeds,
            "sites": {
                site: {"records": self.records[site], "test_records": rows[0].records}
                for site, rows in self.scores["split"].items()
            },
            "methods": {
                method: {
                    "sites": {site: _lists(rows) for site, rows in by_site.items()},
                    "mean": {f: self.means(method, f) for f in FIGURES},
                    f"mean_without_{SMALL}": {f: self.means(method, f, SMALL) for f in FIGURES},
                }
                for method, by_site in self.scores.items()
            },
            "cost": {m: {site: asdict(cost) for site, cost in by_site.items()} for m, by_site in self.cost.items()},
            "equality": self.equality,
            "attack": {
                "how": "ridge regression from the cut back to the record",
                "adversary": f"the server, told by {TELLS} what it knows",
                "linkage_500": statistics.mean(self.linkage),
                "each_seed": self.linkage,
                "chance": 1 / CANDIDATES,
            },
            "federation": {"processes": self.processes},
            "validation": self.validation,
            "losses": {method: [list(map(float, run)) for run in runs] for method, runs in self.losses.items()},
            "machine": machine(threads=1),
            "seconds": round(self.seconds, 1),
        }


def _lists(rows: Sequence[Scores]) -> dict[str, list[Any]]:
    return {
        name: [getattr(r, name) for r in rows] for name in ("accuracy", "balanced_accuracy", "macro_auc", "classes")
    }


def demo(folder: Path, seeds: int, as_json: bool) -> None:
    """Runs it all and shows what came out.

    Args:
        folder: a folder of this run is made in it.
        seeds: each divides the records, draws orders and first weights anew.
        as_json: print one JSON object instead of tables; progress goes to stderr.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise UsageError("the demo draws a picture and needs matplotlib: install partway[demo]")
    began, console = time.monotonic(), Console(stderr=as_json, highlight=False)
    home = folder / datetime.now().strftime("%Y-%m-%dT%H-%M-%S")
    files = {path.name.removesuffix(".csv.gz"): path for path in thyroid.write_sites(home / "records")}
    records = {site: len(own.labels) for site, own in thyroid.bundled(0).items()}
    outcome = Outcome(list(range(seeds)), records)
    console.print(f"{len(files)} sites and a server train one network on {sum(records.values()):,} thyroid records.")
    console.print(f"Everything is left in {home}. On two cores this takes about {15 + 10 * seeds} s.")
    with LocalFederation(home / "federation", files) as running:
        with console.status("starting six processes, each with its own records, certificate, policy and ledger"):
            running.start()
        for seed in outcome.seeds:
            with Show(console, running, f"seed {seed + 1} of {seeds}") as show:
                ran = running.run(job_words(seed), show.update)
            with console.status(f"seed {seed + 1} of {seeds}: the same alone and pooled, and an attack on the cut"):
                _split(outcome, running, ran)
                _baselines(outcome, seed)
                _attack(outcome, ran, seed)
        with Show(console, running, "equality: 200 steps in float64") as show:
            ran = running.run(job_words(0, epochs=10, dtype="float64"), show.update)
        with console.status("the same 200 steps in one loop over pooled records"):
            _equality(outcome, running, ran)
        _processes(outcome, running, ran.status)
    outcome.seconds = time.monotonic() - began
    words = outcome.words()
    write_whole(home / "result.json", json.dumps(words, indent=2).encode())
    draw(words, home / "demo.png")
    if as_json:
        print(json.dumps(words))
    else:
        tell(console, outcome, home)


# -- what is run


def _split(outcome: Outcome, running: LocalFederation, ran: Ran) -> None:
    for site in running.sites:
        own = ran.result(site)
        outcome.add("split", {site: Scores(**own["sites"][site])})
        outcome.cost["split"][site] = Cost(**own["cost"][site])
    at_server = ran.result(SERVER)
    outcome.validation.append(at_server["validation"])
    outcome.losses["split"].append(at_server["losses"])


def _job(seed: int) -> tuple[Job, Policy]:
    job = read_job(toml(job_words(seed)))
    return job, Policy(networks=[job.network.build])


def _baselines(outcome: Outcome, seed: int) -> None:
    """The job's epochs to their end, as in the split run: where one keeps its best epoch, all must."""
    job, allowed = _job(seed)
    records, epochs = thyroid.bundled(seed), job.training.epochs

    def learn(method: str, mine: dict[str, Records], batch: int) -> list[float]:
        features = baselines.scaled_together(mine)
        torch.manual_seed(seed)
        network = network_of(job, allowed, thyroid.SCHEMA).whole
        order = torch.Generator().manual_seed(seed)
        batches = baselines.shuffled_batches(*baselines.rows(mine, features, "train"), batch, epochs, order)
        losses = baselines.train(network, optimizer_of(job.training.optimizer), batches)
        outcome.add(method, baselines.tested(network, mine, features)[0])
        return losses

    outcome.losses["pooled"].append(learn("pooled", records, job.training.batch))
    pieces = network_of(job, allowed, thyroid.SCHEMA).pieces.values()
    whole = sum(piece.forward + piece.backward for piece in pieces)
    for site, own in records.items():
        learn("alone", {site: own}, ALONE_BATCH)
        count, width = own.sizes["train"], own.schema.shape[0]
        outcome.cost["alone"][site] = Cost(flops=epochs * count * whole)
        # Every training record crosses once, as float32 with an int64 label, and nothing is computed at home.
        outcome.cost["pooled"][site] = Cost(bytes_up=count * (4 * width + 8), exchanges=1)


def _attack(outcome: Outcome, ran: Ran, seed: int) -> None:
    """The server, told by one site what it knows, decodes the others' training records from the cut."""
    job, allowed = _job(seed)
    bottom = next(iter(network_of(job, allowed, thyroid.SCHEMA).modules.values()))
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
    outcome.linkage.append(linkage(decode(view), chosen))


def _equality(outcome: Outcome, running: LocalFederation, ran: Ran) -> None:
    """The real run in float64 over TLS against one loop, and against a loop in another order, which must differ."""
    roster = {site: running.fingerprints[site] for site in running.sites}
    job = read_job(toml({**job_words(0, epochs=10, dtype="float64"), "roster": roster}))
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
    outcome.equality = {
        "steps": len(told),
        "dtype": "float64",
        "loss": loss,
        "parameters": parameters,
        "negative_control": control,
    }


def _processes(outcome: Outcome, running: LocalFederation, status: Status) -> None:
    """Who took part, over what, and what each end has counted since it connected."""
    tls = running.tls_version()
    for process in running.processes.values():
        sent, received = sum(status.bytes_sent.values()), sum(status.bytes_received.values())
        if process.role == "site":
            running.wait_for_state(process.name, "done")
            sent, received = process.said["bytes_sent"], process.said["bytes_received"]
        row = {"role": process.role, "name": process.name, "pid": process.pid, "fingerprint": process.fingerprint}
        outcome.processes.append({**row, "tls": tls, "bytes_sent": sent, "bytes_received": received})


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


def tell(console: Console, outcome: Outcome, home: Path) -> None:
    """Tables and lines for a person."""
    for figure, title in FIGURES.items():
        console.print(_scores(outcome, figure, title))
    console.print(_costs(outcome))
    equal, linked = outcome.equality, statistics.mean(outcome.linkage)
    small = outcome.scores["split"][SMALL][0].records
    console.print(
        f"Figures are over the classes with at least 3 positive and 3 negative test records of the site; {SMALL} has "
        f"{small} test records, which say little. Alone: batches of {ALONE_BATCH}, own statistics; else of 256. The "
        "split run's cost includes its evaluations.\n"
        f"Equal: after {equal['steps']} steps in {equal['dtype']} over TLS, with blind sums, no weight at any party is "
        f"further than {equal['parameters']:.0e} from one loop over pooled records (in another order: "
        f"{equal['negative_control']:.0e}).\n"
        f"Private: no. With this cut, a server that {TELLS} tells what it knows picks the right patient of "
        f"{CANDIDATES} in {100 * linked:.0f} of 100 cases (chance: 0.2): training partway alone is not privacy.\n"
        f"\n{outcome.seconds:.0f} s. In {home}:\n  result.json, demo.png\n"
        "  federation/<party>/runs: each party's ledger, result and weights",
        soft_wrap=False,
    )


def _table(title: str, *columns: str) -> Table:
    table = Table(title=f"\n{title}", title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("site")
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    return table


def _scores(outcome: Outcome, figure: str, title: str) -> Table:
    seeds = f"mean ± s.d. of {len(outcome.seeds)} seeds"
    table = _table(f"{title}, each site's own test patients, {seeds}", "records", *METHODS, "split-alone")
    for site, count in outcome.records.items():
        rows = [[getattr(r, figure) for r in outcome.scores[method][site]] for method in METHODS]
        table.add_row(site, f"{count:,}", *map(_spread, rows), _gain(rows))
    for name, without in (("mean", ""), (f"without {SMALL}", SMALL)):
        rows = [outcome.means(method, figure, without) for method in METHODS]
        table.add_row(name, "", *map(_spread, rows), _gain(rows), style="bold")
    return table


def _spread(values: Sequence[float | None]) -> str:
    known = [v for v in values if v is not None]
    if not known:
        return "none"
    return f"{statistics.mean(known):.3f}±{statistics.stdev(known) if len(known) > 1 else 0:.3f}"


def _gain(rows: Sequence[Sequence[float]]) -> str:
    alone, split, _ = rows
    return f"{statistics.mean(b - a for a, b in zip(alone, split, strict=True)):+.3f}"


def _costs(outcome: Outcome) -> Table:
    computed = (f"MFLOP {method}" if method == METHODS[0] else method for method in METHODS)
    table = _table("what one run costs a site", *computed, "split: MB up", "MB down", "exchanges")
    for site in outcome.records:
        split = outcome.cost["split"][site]
        table.add_row(
            site,
            *(f"{outcome.cost[method][site].flops / 1e6:,.0f}" for method in METHODS),
            f"{split.bytes_up / 1e6:.1f}",
            f"{split.bytes_down / 1e6:.1f}",
            f"{split.exchanges:,}",
        )
    return table
