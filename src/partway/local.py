"""A federation of real processes on this machine: authority, certificates, files, a server and sites over mutual TLS.

For the demo, the benchmarks and the tests. Each party has a folder of its own; nobody reads another's.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

import msgspec

from partway import pki
from partway.config import Job
from partway.errors import JobFailed, PartwayError, Refused
from partway.finished import ZOO
from partway.server.coordinator import own_secret
from partway.server.status import Status
from partway.transport.grpc import Credentials, call

OPERATOR, SERVER = "study-office", "server"
_SERVER_ALLOWS = {
    "trunk_to_everyone": True,
    "predictions_may_leave": True,
    "clear_sums": True,
    "solvable_sums": True,
    "least_records_in_sum": 0,
    "least_records_in_hand_over": 0,
    "least_records_in_counts": 1,
    "most_epochs": 10_000,
    "widest_cut": 2**31 - 1,
}
"""What is the sites' to refuse, the server does not."""
_ERRORS = {1: JobFailed, 3: Refused}


@dataclass
class Process:
    """One party's process, and the last that it said."""

    name: str
    role: str
    fingerprint: str
    popen: subprocess.Popen[str]
    said: dict[str, Any] = field(default_factory=dict)
    """Its last line of JSON."""
    errors: list[str] = field(default_factory=list)
    """Lines of its stderr."""
    readers: list[threading.Thread] = field(default_factory=list)

    @property
    def pid(self) -> int:
        return self.popen.pid

    def cpu_seconds(self) -> float:
        """Spent so far, in user and system."""
        fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@dataclass
class Ran:
    """A job that has been done, and where its parties have left their files."""

    status: Status
    digest: bytes
    files: dict[str, bytes]
    """What the operator could download."""
    folders: dict[str, Path]
    """Of each party."""

    def result(self, party: str) -> dict[str, Any]:
        """A party's `result.json`."""
        words: dict[str, Any] = json.loads((self.folders[party] / "result.json").read_text())
        return words


class LocalFederation:
    """A server and its sites. Use it as a context: its processes end with it.

    Args:
        folder: where everything is left.
        records: by party, its CSV file; None at a site that only runs layers. The server's too, if it has some.
        predict: the same of the records that jobs with `[predict]` are about.
        policy: of every site, over what training on these records needs.
        silence: seconds without a sign of life after which a link is given up.
    """

    def __init__(
        self,
        folder: Path,
        records: Mapping[str, Path | None],
        policy: Mapping[str, Any] | None = None,
        silence: float = 30,
        predict: Mapping[str, Path] | None = None,
    ) -> None:
        self.folder, self.sites = folder, tuple(name for name in records if name != SERVER)
        self.processes: dict[str, Process] = {}
        self._news: queue.SimpleQueue[None] = queue.SimpleQueue()
        self._steward = pki.Authority.create("local")
        self._steward.save(folder / "steward")
        self._operator = self._admit(OPERATOR, pki.Role.OPERATOR)
        identities = {SERVER: self._admit(SERVER, pki.Role.SERVER, ["localhost"])}
        allowed = {"networks": list(ZOO), "operators": [OPERATOR], "labels_may_leave": True}
        header = {"listen": "localhost:0", "silence": silence}
        new = {name: _data((predict or {}).get(name)) for name in records}
        data = {"data": _data(records.get(SERVER)), "predict": new.get(SERVER, {})}
        self._write(SERVER, server=header, policy={**allowed, **_SERVER_ALLOWS}, **data)
        for site in self.sites:
            identities[site] = self._admit(site, pki.Role.SITE)
            self._write(
                site,
                site={"name": site, "server": "localhost:0", "silence": silence},
                data=_data(records[site]),
                predict=new[site],
                policy={**allowed, "scores_may_leave": True, **(policy or {})},
            )
        self.fingerprints = {name: identity.fingerprint for name, identity in identities.items()}
        self._secrets = {SERVER: own_secret(identities[SERVER])}

    # -- processes

    def __enter__(self) -> LocalFederation:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self) -> None:
        """Starts the server, then the sites; returns when all are connected."""
        self.start_server()
        for site in self.sites:
            self.start_site(site)
        for site in self.sites:
            self.wait_for_state(site, "waiting")

    def start_server(self) -> None:
        """Starts the server, and waits until it listens."""
        verb = ["server", "start", str(self.folder / SERVER / "server.toml"), "--json"]
        self._spawn(SERVER, "server", [sys.executable, "-m", "partway", *verb])
        self.wait_until(lambda: "ready" in self.processes[SERVER].said, SERVER)
        self.address = f"localhost:{self.processes[SERVER].said['ready']}"
        for site in self.sites:
            path = self.folder / site / "site.toml"
            path.write_text(path.read_text().replace('"localhost:0"', f'"{self.address}"'))

    def start_site(self, site: str, command: Sequence[str] | None = None) -> None:
        """Starts a site's process, or another command in its place; does not wait."""
        verb = ["site", "start", str(self.folder / site / "site.toml"), "--json"]
        self._spawn(site, "site", command or [sys.executable, "-m", "partway", *verb])

    def stop(self) -> None:
        """Ends every process that still runs."""
        for process in self.processes.values():
            if process.popen.poll() is None:
                process.popen.send_signal(signal.SIGCONT)  # one that stands still would not hear it
                process.popen.terminate()
        for process in self.processes.values():
            try:
                process.popen.wait(15)
            except subprocess.TimeoutExpired:
                process.popen.kill()
                process.popen.wait()
            for reader in process.readers:
                reader.join()

    def wait_for_state(self, site: str, state: str) -> None:
        """Waits until a site says that it is waiting, done, failed ..."""
        self.wait_until(lambda: self.processes[site].said.get("state") == state, site)

    def wait_until(self, true: Callable[[], bool], name: str, seconds: float = 120) -> None:
        """Waits for news until something is true. Raises `JobFailed` if the named process ends, or time runs out."""
        ends = time.monotonic() + seconds
        while not true():
            if self.processes[name].popen.poll() is not None:
                raise JobFailed(f"{name} has ended: {' '.join(self.processes[name].errors[-3:]) or 'without a word'}")
            if time.monotonic() > ends:
                raise JobFailed(f"{name} is not ready after {seconds:g} s")
            self.pause()

    def pause(self, seconds: float = 0.2) -> None:
        """Until a process says something, or that long."""
        with contextlib.suppress(queue.Empty):
            self._news.get(timeout=seconds)

    def _spawn(self, name: str, role: str, command: Sequence[str]) -> None:
        popen = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        process = self.processes[name] = Process(name, role, self.fingerprints[name], popen)
        for read, lines in ((self._listen, popen.stdout), (_collect, popen.stderr)):
            process.readers.append(threading.Thread(target=read, args=(process, lines), daemon=True))
            process.readers[-1].start()

    def _listen(self, process: Process, lines: TextIO) -> None:
        with lines:
            for line in lines:
                if line.startswith("{"):
                    process.said = json.loads(line)
                    self._news.put(None)

    # -- jobs

    def sign(self, job: Mapping[str, Mapping[str, Any]], schema: str = "") -> bytes:
        """A signed job, with the text of a schema that it names; its roster is all sites, if it has none."""
        roster = {site: self.fingerprints[site] for site in self.sites}
        return pki.sign_job(self._operator, toml({"roster": roster, **job}).encode(), schema.encode())

    def ask(self, method: str, request: bytes) -> bytes:
        """One of the operator's calls to the server."""
        me = self._operator
        credentials = Credentials(me.certificate_pem, me.key_pem, me.authority_pem)
        return call(self.address, credentials, method, request, timeout=60)

    def tls_version(self) -> str:
        """What a plain client with the operator's certificate is offered at the server's port, such as `TLSv1.3`."""
        identity = self._identity(OPERATOR)
        context = ssl.create_default_context(cafile=str(identity / "authority.pem"))
        context.load_cert_chain(identity / "certificate.pem", identity / "key.pem")
        context.set_alpn_protocols(["h2"])
        host, _, port = self.address.rpartition(":")
        with (
            socket.create_connection((host, int(port)), timeout=10) as plain,
            context.wrap_socket(plain, server_hostname=host) as secured,
        ):
            return secured.version() or "none"

    def submit(self, signed: bytes) -> Status:
        """Hands a signed job to the server."""
        return Status(**json.loads(self.ask("submit", signed)))

    def run(
        self, job: Mapping[str, Mapping[str, Any]], watch: Callable[[Status], None] | None = None, schema: str = ""
    ) -> Ran:
        """Signs and submits a job, and waits for its end.

        Args:
            watch: told where it stands, a few times a second.
            schema: the text of the schema file that the job names, if it names one.

        Raises:
            JobFailed, Refused: as the server says.
        """
        signed = self.sign(job, schema)
        status = self.submit(signed)
        while not status.ended:
            time.sleep(0.2)
            status = Status(**json.loads(self.ask("status", status.id.encode())))
            if watch is not None:
                watch(status)
        if status.exit_code:
            raise _ERRORS.get(status.exit_code, PartwayError)(status.message)
        files = msgspec.msgpack.decode(self.ask("download", status.id.encode()), type=dict[str, bytes])
        digest = pki.open_job(signed, self._steward.pem).digest
        sites = tuple(job.get("roster", self.sites))
        folders = {name: self.folder / name / "runs" / f"{status.name}-{status.id}" for name in (SERVER, *sites)}
        for site in sites:
            done = folders[site] / "result.json"
            self.wait_until(done.exists, site)
        return Ran(status, digest, files, folders)

    # -- files

    def secret(self, party: str) -> bytes:
        """From which a party has made its draws: for those who compare with a plain loop, and nobody else."""
        return self._secrets.get(party) or (self._identity(party) / "secret.key").read_bytes()

    def _identity(self, name: str) -> Path:
        return self.folder / name / "identity"

    def _admit(self, name: str, role: pki.Role, hosts: Sequence[str] = ()) -> pki.Identity:
        folder = self._identity(name)
        pki.request_in(folder, name, role, hosts)
        pki.approve_in(self.folder / "steward", folder / "request.pem")
        return pki.Identity.load(folder)

    def _write(self, party: str, **sections: Mapping[str, Any]) -> None:
        name = "server.toml" if party == SERVER else "site.toml"
        (self.folder / party / name).write_text(toml(sections))


def _data(records: Path | None) -> dict[str, str]:
    """`[data]`, with the agreed ids if they lie beside the records."""
    if records is None:
        return {}
    ids = records.resolve().with_name("ids.txt")
    return {"path": str(records.resolve()), **({"ids": str(ids)} if ids.exists() else {})}


def _collect(process: Process, lines: TextIO) -> None:
    with lines:
        process.errors.extend(lines)


def toml(sections: Mapping[str, Mapping[str, Any]]) -> str:
    """A job, site or server file; a key without a value is left out.

    >>> print(toml({"training": {"seed": None, "epochs": 2, "optimizer": {"name": "adam", "lr": 0.003}}}), end="")
    [training]
    epochs = 2
    optimizer = { name = "adam", lr = 0.003 }
    """

    def value(v: Any) -> str:
        if isinstance(v, Mapping):
            return "{ " + ", ".join(f"{key} = {value(inner)}" for key, inner in v.items()) + " }"
        if isinstance(v, list | tuple):
            return "[" + ", ".join(map(value, v)) + "]"
        return json.dumps(v)

    return "\n".join(
        f"[{name}]\n" + "".join(f"{key} = {value(v)}\n" for key, v in section.items() if v is not None)
        for name, section in sections.items()
        if section
    )


def sections_of(job: Job) -> dict[str, dict[str, Any]]:
    """A job as the sections of its file, without roster and schema."""
    words: dict[str, dict[str, Any]] = msgspec.to_builtins(job)
    del words["roster"], words["columns"]
    if not job.laned:
        del words["training"]["schedule"]  # there is none to choose
    return words
