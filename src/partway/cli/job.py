"""An operator's verbs."""

from __future__ import annotations

import json as json_module
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from partway.cli.words import Into, Json, Name, make_request, show
from partway.config import contents
from partway.errors import JobFailed, UsageError
from partway.server.status import Status

verbs = typer.Typer(help="An operator: jobs from signature to result.", no_args_is_help=True)


def _address(value: str) -> str:
    host, _, port = value.rpartition(":")
    if not (host and port.isdigit()):
        raise UsageError(f"--server {value}: host:port is needed, as in hospital.example:8443")
    return value


Identity = Annotated[Path, typer.Option("--identity", help="The folder of key, certificate and authority.")]
Address = Annotated[str, typer.Option("--server", help="host:port of the server.", callback=_address)]
Number = Annotated[str, typer.Argument(help="The job's number, as `job submit` printed it.")]


@verbs.command("request")
def job_request(name: Name, identity: Into = Path("identity"), json: Json = False) -> None:
    """Make an operator's key, and a request for the steward."""
    make_request(name, "operator", [], identity, json)


@verbs.command("sign")
def job_sign(
    file: Annotated[Path, typer.Argument(help="job.toml")],
    identity: Identity = Path("identity"),
    weights: Annotated[Path, typer.Option(help="Where folders of segments lie that it names.")] = Path("weights"),
    json: Json = False,
) -> None:
    """Check a job and sign it; whoever changes it afterwards breaks the signature."""
    from partway import pki
    from partway.config import job_texts, of_any_size, read_job

    text, schema = job_texts(file)
    parsed = read_job(text, str(file), schema)
    own = pki.Identity.load(identity)
    signed = pki.sign_job(own, text, schema or b"")
    from partway.assembly import network_of, schemas_of
    from partway.shipped import Reader

    shipped = Reader(weights, own.authority_pem)
    network_of(parsed, of_any_size(parsed.builds), schemas_of(parsed), shipped=shipped)
    path = file.with_suffix(".signed")
    path.write_bytes(signed)
    show({"signed": str(path)}, json, f"Signed: {path}")


def _call(identity: Path, address: str, method: str, request: bytes) -> bytes:
    from partway import pki
    from partway.transport.grpc import Credentials, call

    me = pki.Identity.load(identity)
    return call(address, Credentials(me.certificate_pem, me.key_pem, me.authority_pem), method, request, timeout=30)


def _status(identity: Path, address: str, method: str, request: bytes) -> Status:
    return Status(**json_module.loads(_call(identity, address, method, request)))


@verbs.command("submit")
def job_submit(
    signed: Annotated[Path, typer.Argument(help="job.signed")],
    server: Address,
    identity: Identity = Path("identity"),
    wait: Annotated[bool, typer.Option("--wait", help="Until it has ended; the exit code is the job's.")] = False,
    json: Json = False,
) -> None:
    """Hand a signed job to the server."""
    status = _status(identity, server, "submit", contents(signed))
    if wait:
        _end(_watch(identity, server, status), json)
    else:
        text = f"Submitted as {status.id}; `partway job status {status.id} --server {server}` says how it goes."
        show(asdict(status), json, text)


def _watch(identity: Path, server: str, status: Status) -> Status:
    import time

    from rich.console import Console

    with Console(stderr=True, markup=False).status(status.line()) as line:
        while not status.ended:
            time.sleep(0.3)
            status = _status(identity, server, "status", status.id.encode())
            line.update(status.line())
    return status


def _end(status: Status, json: bool) -> None:
    show(asdict(status), json, status.line())
    if status.exit_code:
        raise typer.Exit(status.exit_code)


@verbs.command("status")
def job_status(number: Number, server: Address, identity: Identity = Path("identity"), json: Json = False) -> None:
    """Say where a job stands; the exit code is the job's once it has ended."""
    _end(_status(identity, server, "status", number.encode()), json)


@verbs.command("list")
def job_list(server: Address, identity: Identity = Path("identity"), json: Json = False) -> None:
    """List this operator's jobs."""
    jobs = [Status(**words) for words in json_module.loads(_call(identity, server, "list", b""))]
    show({"jobs": [asdict(s) for s in jobs]}, json, "\n".join(s.line() for s in jobs) or "no jobs")


@verbs.command("stop")
def job_stop(number: Number, server: Address, identity: Identity = Path("identity"), json: Json = False) -> None:
    """Stop a job."""
    status = _status(identity, server, "stop", number.encode())
    show(asdict(status), json, f"Job {number} is told to stop.")


@verbs.command("download")
def job_download(
    number: Number,
    server: Address,
    identity: Identity = Path("identity"),
    folder: Annotated[Path, typer.Option(help="Where a folder of the job's number is made.")] = Path(),
    json: Json = False,
) -> None:
    """Fetch what the job gives to the server at its end: result.json, and weights."""
    import msgspec

    files = msgspec.msgpack.decode(_call(identity, server, "download", number.encode()), type=dict[str, bytes])
    target = folder / number
    target.mkdir(parents=True, exist_ok=True)
    for name, data in files.items():
        if Path(name).name != name:
            raise JobFailed(f"the server names a file {name!r}, which is not taken")
        (target / name).write_bytes(data)
    show({"folder": str(target), "files": sorted(files)}, json, f"{', '.join(sorted(files))} in {target}")
