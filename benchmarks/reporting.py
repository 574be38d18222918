"""What every benchmark says at its end: a dated report, and one line of JSON for each claim."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import nn

from partway.report import machine

REPORTS = Path(__file__).parent / "reports"


@dataclass(frozen=True)
class Claim:
    """One figure that somebody asked for."""

    name: str
    value: float
    unit: str
    bar: str
    """What was asked, in words: "at least 150"."""
    holds: bool

    def line(self) -> str:
        words: dict[str, Any] = {"claim": self.name, "value": float(f"{self.value:.4g}"), "unit": self.unit}
        return json.dumps(words | {"bar": self.bar, "holds": self.holds})


def spread(values: Sequence[float]) -> str:
    """Median, and the least and the most."""
    return f"{median(values):.2f} ({min(values):.2f} to {max(values):.2f}, n = {len(values)})"


def unsplit_step_ms(steps: int = 1000) -> float:
    """CPU milliseconds of one step of the demo's network in one plain loop: how fast this machine is."""
    torch.set_num_threads(1)
    network = nn.Sequential(
        *(nn.Linear(29, 64), nn.ReLU(), nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 128), nn.ReLU()),
        *(nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 7)),
    )
    x, y = torch.randn(256, 29), torch.randint(0, 7, (256,))
    optimizer = torch.optim.Adam(network.parameters(), 3e-3, fused=True)
    for step in range(steps + 100):
        if step == 100:
            began = time.process_time()
        optimizer.zero_grad()
        nn.functional.cross_entropy(network(x), y).backward()
        optimizer.step()
    return 1000 * (time.process_time() - began) / steps


def report(name: str, claims: Sequence[Claim], lines: Sequence[str], cores: int, quick: bool) -> Path:
    """Writes `reports/<name>-<date>.md`, and prints the claims, one line of JSON each.

    A quick run's report has `quick` in its name, so that it stands in no full one's place.
    """
    REPORTS.mkdir(exist_ok=True)
    path = REPORTS / f"{name}-{'quick-' if quick else ''}{date.today().isoformat()}.md"
    on: Mapping[str, Any] = machine(threads=1) | {"cores": cores}
    rows = [f"| {c.name} | {c.value:.3g} {c.unit} | {c.bar} | {'yes' if c.holds else '**no**'} |" for c in claims]
    text = [
        f"# {name}, {date.today().isoformat()}",
        "",
        ", ".join(f"{key} {value}" for key, value in on.items() if value) + ".",
        "",
        "| claim | measured | asked | holds |",
        "| --- | --- | --- | --- |",
        *rows,
        "",
        *lines,
        "",
    ]
    path.write_text("\n".join(text))
    print(f"written: {path}")
    for claim in claims:
        print(claim.line())
    return path
