"""What a site's terminal shows while it runs."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import uvloop
from rich.console import Console

from partway.config import Site
from partway.site.agent import Agent, Progress


def run(site: Site, home: Path, jobs: int | None, as_json: bool) -> None:
    """Runs a site's agent: a live line on a terminal, or one JSON object a line.

    Args:
        home: the folder of the site file.
        jobs: leave after so many; None stays.
    """
    if as_json:
        agent = Agent(site, home, lambda p: print(json.dumps({"site": site.site.name, **asdict(p)}), flush=True))
        uvloop.run(agent.serve(jobs))
        return
    console = Console(highlight=False, markup=False)
    with console.status(f"{site.site.name}: connecting to {site.site.server}") as line:

        def say(progress: Progress) -> None:
            text = words(site.site.name, progress)
            if progress.state != "running":
                console.print(text, soft_wrap=True)
            line.update(text)

        uvloop.run(Agent(site, home, say).serve(jobs))


def words(site: str, progress: Progress) -> str:
    """One line for a person.

    >>> progress = Progress("thyroid", "running", step=10, steps=400, bytes_sent=2_000_000, waits_for="server")
    >>> words("svi", progress)
    'svi, thyroid: running, step 10 of 400, 2.0 MB sent, waits for server'
    """
    parts = [f"{site}, {progress.job}: {progress.state}" if progress.job else f"{site}: {progress.state}"]
    if progress.steps:
        parts.append(f"step {progress.step} of {progress.steps}")
    if progress.loss is not None:
        parts.append(f"loss {progress.loss:.4f}")
    if progress.bytes_sent:
        parts.append(f"{progress.bytes_sent / 1e6:.1f} MB sent")
    if progress.waits_for:
        parts.append(f"waits for {progress.waits_for}")
    if progress.seconds_left is not None:
        parts.append(f"about {progress.seconds_left:.0f} s left")
    if progress.message:
        parts.append(progress.message)
    return ", ".join(parts)
