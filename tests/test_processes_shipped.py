"""A job of signed segments, between real processes that may build no network by name."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from partway import pki
from partway.assembly import schemas_of
from partway.config import read_job
from partway.data import thyroid
from partway.equality import _Plain
from partway.errors import Refused
from partway.local import OPERATOR, SERVER, LocalFederation, toml
from partway.model.segment import initialise
from partway.shipped import read, write
from partway.train.draws import first_weights

SITES = ("svhc", "stmw")
NETWORK = {
    "build": "partway.model.zoo:mlp",
    "arguments": {"inputs": 29, "hidden": [32, 8, 32], "classes": 7},
    "cut": ["hidden.2"],
}
OTHERS = {
    "job": {"name": "thyroid"},
    "training": {"epochs": 2, "dtype": "float64"},
    "evaluation": {"every": 0},
    "result": {"trunk": "everyone"},
}


def test_a_job_of_segments_without_code(tmp_path: Path) -> None:
    """Equals one loop by the code; the network that a site holds then tells of its records, still without the code."""
    records = thyroid.write_sites(tmp_path / "records")
    chosen = {p.name.removesuffix(".csv.gz"): p for p in records}
    allowed = {"networks": [], "solvable_sums": True, "least_records_in_sum": 1, "least_sites": 2}
    with LocalFederation(tmp_path, {site: chosen[site] for site in SITES}, allowed) as running:
        operator = pki.Identity.load(tmp_path / OPERATOR / "identity")
        code = read_job(toml({**OTHERS, "network": NETWORK}))
        made = {name: write(code, schemas_of(code), name, operator, tmp_path / "made") for name in ("bottom", "trunk")}
        for party in (SERVER, *SITES):
            (tmp_path / party / "weights").symlink_to(tmp_path / "made")
            file = tmp_path / party / ("server.toml" if party == SERVER else "site.toml")
            accepted = [w.digest for w in made.values()]
            words = f"segments = {json.dumps(accepted)}\n" + ("least_sites = 2\n" if party == SERVER else "")
            file.write_text(file.read_text().replace("[policy]\n", f"[policy]\n{words}"))
        running.start()
        terms = {**OTHERS, "networks": {name: {"segment": w.digest} for name, w in made.items()}}
        own: set[str] = set()
        ran = running.run(terms, lambda _: own.update(children(running.processes["stmw"].popen.pid)))
        assert len(own) == 2  # of bottom and trunk
        job = read_job(running_job(tmp_path, ran.folders[SERVER]))
        secrets = {party: running.secret(party) for party in (SERVER, *SITES)}
        held = {site: own for site, own in thyroid.bundled(0).items() if site in SITES}
        code = read_job(toml({**OTHERS, "network": NETWORK, "roster": job.roster}))
        loop = _Plain(code, ran.digest, secrets, held, SERVER)
        for name, owner in (("bottom", job.sites[0]), ("trunk", SERVER)):
            piece = read(made[name].folder, None).piece
            initialise(piece, first_weights(secrets[owner], ran.digest, name))
            loop.network.modules[name].load_state_dict(piece.state_dict())
        loop.together(0, 2)
        expected = loop.network.whole.state_dict()
        for site in SITES:
            found = load_file(ran.folders[site] / "network.safetensors")
            assert {name.partition(".")[2] for name in found} == set(expected)
            assert max(float((t - expected[n.partition(".")[2]]).abs().max()) for n, t in found.items()) < 1e-10
        for party in (SERVER, *SITES):  # no segment's process outlives its job
            running.wait_until(lambda at=party: not children(running.processes[at].popen.pid), party)
        told = predicted(tmp_path / "stmw", ran.folders["stmw"])
        lines = told.stdout.splitlines()
        assert told.returncode == 0, told.stderr
        assert len(lines) > len(held["stmw"].labels)  # some have none
        assert len({line.split(",", 2)[2] for line in lines}) > 100
        (tmp_path / "svhc" / "weights").unlink()
        with pytest.raises(Refused, match="svhc refuses the job: SEGMENT"):
            running.run({**terms, "job": {"name": "thyroid-again"}})


def children(process: int) -> list[str]:
    """Of a process that may end meanwhile, as may any other."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            if (folder / "stat").read_text().rpartition(")")[2].split()[1] == str(process):
                found.append(folder.name)
    return found


def predicted(home: Path, run: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "partway", "predict", str(run), "site.toml"]
    return subprocess.run(command, cwd=home, capture_output=True, text=True, check=False, timeout=300)


def running_job(home: Path, folder: Path) -> bytes:
    authority = (home / SERVER / "identity" / "authority.pem").read_bytes()
    return pki.open_job((folder / "job.signed").read_bytes(), authority).toml
