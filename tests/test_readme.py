"""The README's own words, run: the ten lines, and the federation by hand with its files and commands as they stand."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
PORT = "localhost:8443"


def blocks(language: str, start: str = "", text: str = README) -> list[str]:
    """Code blocks of a language, after a heading."""
    return re.findall(rf"```{language}\n(.*?)```", text[text.index(start) :], flags=re.DOTALL)


def test_the_ten_lines_are_the_example_and_run() -> None:
    example = (ROOT / "examples" / "ten_lines.py").read_text()
    (shown,) = blocks("python")
    assert example.endswith(shown)
    done = subprocess.run([sys.executable, "-c", shown], capture_output=True, text=True, timeout=120, check=True)
    assert re.search(r"all test records: accuracy 0\.\d\d, macro-AUC 0\.9", done.stdout)
    assert "the server holds ['trunk']" in done.stdout


class Terminals:
    """What people type, and the processes that they leave running."""

    def __init__(self, folder: Path, free_port: str) -> None:
        self._folder, self._port = folder, free_port
        self._environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        self.running: list[tuple[subprocess.Popen[str], Path]] = []

    def words(self, line: str) -> list[str]:
        assert line.startswith("partway ")
        return [sys.executable, "-m", *line.replace(PORT, self._port).split()]

    def type(self, line: str) -> str:
        """Runs a command to its end; answers questions with yes."""
        done = subprocess.run(
            self.words(line),
            cwd=self._folder,
            env=self._environment,
            input="y\n",
            capture_output=True,
            text=True,
            timeout=180,
            check=False,
        )
        assert done.returncode == 0, f"{line}: {done.stderr}"
        return done.stdout

    def leave(self, line: str, until: str) -> None:
        """Starts a command in a terminal of its own, and waits until it says something."""
        log = self._folder / f"{len(self.running)}.log"
        with log.open("w") as out:
            popen = subprocess.Popen(
                self.words(line), cwd=self._folder, env=self._environment, stdout=out, stderr=out, text=True
            )
        self.running.append((popen, log))
        while until not in log.read_text():
            assert popen.poll() is None, log.read_text()
            time.sleep(0.05)


@pytest.fixture
def terminals(tmp_path: Path) -> Iterator[Terminals]:
    import socket

    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    typed = Terminals(tmp_path, f"localhost:{port}")
    yield typed
    for popen, _ in typed.running:
        popen.terminate()
    for popen, _ in typed.running:
        popen.wait(20)


def test_your_own_csv(terminals: Terminals, tmp_path: Path) -> None:
    start = "## Your own CSV"
    (csv, *_), (schema, job, *_), (commands, *_) = blocks("csv", start), blocks("toml", start), blocks("bash", start)
    header, *shown = csv.splitlines()
    rows = shown + [
        f"{('north', 'south', 'west')[n % 3]},{20 + n % 80},{'fm'[n % 2]},{n % 50 / 7 if n % 5 else ''},"
        f"{'died' if n % 80 > 40 else 'home'}"
        for n in range(300)
    ]
    (tmp_path / "records.csv").write_text("\n".join([header, *rows]))
    (tmp_path / "schema.toml").write_text(schema)
    (tmp_path / "job.toml").write_text(job)
    check, simulate = commands.splitlines()
    told = terminals.type(check)
    assert 'inputs = 5 with scale = "statistics"' in told
    assert "west: 100 records count: home " in told
    assert re.search(r"all sites: records 105, accuracy 0\.\d", terminals.type(simulate))


def test_the_federation_by_hand(terminals: Terminals, tmp_path: Path) -> None:
    init, requests, approvals, start, jobs = blocks("bash", "## A federation by hand")
    server, site, job = blocks("toml", "## A federation by hand")
    for line in (init + requests).splitlines():
        terminals.type(line)
    for line in approvals.splitlines():
        out = terminals.type(line)
    roster = out
    assert roster.startswith("[roster]\n")

    port = terminals.words(f"partway {PORT}")[-1]
    (tmp_path / "server" / "server.toml").write_text(server.replace(PORT, port))
    for name in ("other", "svi", "svhc"):
        text = site.replace('"svi"', f'"{name}"').replace("svi.csv.gz", f"{name}.csv.gz").replace(PORT, port)
        (tmp_path / name / "site.toml").write_text(text)
    (tmp_path / "office" / "job.toml").write_text(job + roster)

    data, *services = start.splitlines()
    terminals.type(data)
    for line in services:
        terminals.leave(line, "listens on port" if "server start" in line else "connected to")
    sign, preview, submit, listing = jobs.splitlines()
    terminals.type(sign)
    assert "The policy allows it" in terminals.type(preview)
    assert re.search(r"done, step (\d+) of \1\b", terminals.type(submit))
    assert "done" in terminals.type(listing)

    (ledger,) = (tmp_path / "svi" / "runs").rglob("ledger.jsonl")
    verified = terminals.type(f"partway ledger verify {ledger} --identity svi/identity")
    assert "The job ended: done." in verified


def test_every_page_that_is_named_is_there() -> None:
    for name in re.findall(r"`((?:docs|examples|benchmarks)/[^`]*|[A-Z]+\.md)`", README):
        assert (ROOT / name).exists(), name
    for page in (ROOT / "docs").glob("*.md"):
        for name in re.findall(r"`(?:docs/)?([a-z-]+\.md)`", page.read_text()):
            assert (ROOT / "docs" / name).exists(), f"{page.name} names {name}"
