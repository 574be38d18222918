"""Seconds until `partway --help` and the line of a wrong job are there: neither loads torch.

python benchmarks/cold_start.py [--quick]
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

from reporting import Claim, report, spread

WRONG = '[job]\nname = "study"\nsed = 1\n'


def main(quick: bool) -> None:
    repeats = 5 if quick else 30
    print(f"about {'10' if quick else '30'} seconds; nothing else should run on this machine")
    with tempfile.TemporaryDirectory() as folder:
        job = Path(folder) / "job.toml"
        job.write_text(WRONG)
        verbs = {"cold_start_help": (["--help"], 0), "cold_start_wrong_job": (["compare", str(job)], 2)}
        times = {name: [seconds(*verb) for _ in range(repeats)] for name, verb in verbs.items()}
    bars = {"cold_start_help": 0.3, "cold_start_wrong_job": 0.5}
    claims = [Claim(n, median(t), "s", f"under {bars[n]}", median(t) < bars[n]) for n, t in times.items()]
    lines = ["| | seconds |", "| --- | --- |", *(f"| {name} | {spread(t)} |" for name, t in times.items())]
    report("cold_start", claims, lines, len(os.sched_getaffinity(0)), quick)


def seconds(arguments: list[str], code: int) -> float:
    """Wall time of one command."""
    began = time.perf_counter()
    done = subprocess.run([sys.executable, "-m", "partway", *arguments], capture_output=True, check=False)
    assert done.returncode == code, done.stderr
    return time.perf_counter() - began


if __name__ == "__main__":
    main(quick="--quick" in sys.argv[1:])
