"""The command line: verbs and files, no flag for a setting that a file has. Each verb imports what it needs.

Exit codes: 0 fine, 1 the job failed, 2 wrong words or files, 3 refused by a site's policy.
"""

from __future__ import annotations

import json as json_module
import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from partway import __version__
from partway.config import contents
from partway.errors import JobFailed, PartwayError, UsageError
from partway.server.status import Status

app = typer.Typer(
    help="Hospitals train a network partway on their own patients; a server finishes the training.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
federation = typer.Typer(help="The steward: the federation's authority.", no_args_is_help=True)
server = typer.Typer(help="The server.", no_args_is_help=True)
site = typer.Typer(help="A hospital.", no_args_is_help=True)
job = typer.Typer(help="An operator: jobs from signature to result.", no_args_is_help=True)
ledger = typer.Typer(help="What left a party.", no_args_is_help=True)
match = typer.Typer(
    help="Parties with columns of the same patients: which ones they have in common.", no_args_is_help=True
)
for verbs, name in (
    *((federation, "federation"), (server, "server"), (site, "site"), (match, "match")),
    *((job, "job"), (ledger, "ledger")),
):
    app.add_typer(verbs, name=name)


def _address(value: str) -> str:
    host, _, port = value.rpartition(":")
    if not (host and port.isdigit()):
        raise UsageError(f"--server {value}: host:port is needed, as in hospital.example:8443")
    return value


Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Identity = Annotated[Path, typer.Option("--identity", help="The folder of key, certificate and authority.")]
Address = Annotated[str, typer.Option("--server", help="host:port of the server.", callback=_address)]
Number = Annotated[str, typer.Argument(help="The job's number, as `job submit` printed it.")]
Name = Annotated[str, typer.Argument(help="Letters, digits, _ and -, at most 64.")]
Into = Annotated[Path, typer.Option("--identity", help="The folder that gets the key and the request.")]


def main() -> int:
    """Runs a verb; an error is one line on stderr, and its exit code."""
    try:
        code = app(standalone_mode=False)  # what a verb has raised as typer.Exit; None otherwise
    except PartwayError as error:
        return _failed(str(error), error.exit_code)
    except (typer.Abort, KeyboardInterrupt):
        return _failed("stopped", 1)
    except OSError as error:
        return _failed(f"{error.filename or 'the disk'}: {error.strerror}", 1)
    except Exception as error:
        if hasattr(error, "format_message"):  # typer's own, for words that are no verb or option
            words = error.format_message()
            return _failed(words, 2) if words else 2  # none where the help has been printed
        raise
    return code or 0


def _failed(words: str, code: int) -> int:
    print(f"partway: {words}", file=sys.stderr)
    return code


def _show(words: dict[str, Any], as_json: bool, text: str) -> None:
    print(json_module.dumps(words) if as_json else text)


@app.callback(invoke_without_command=True)
def version(show: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    """Hospitals train a network partway on their own patients; a server finishes the training."""
    if show:
        print(__version__)
        raise typer.Exit


# -- the steward


@federation.command("init")
def federation_init(
    folder: Annotated[Path, typer.Argument(help="Where the authority will be: never on the server.")],
    name: Annotated[str, typer.Option(help="The federation's name.")] = "federation",
    json: Json = False,
) -> None:
    """Make the federation's certificate authority. Keep it away from the server's operator."""
    from partway import pki

    authority = pki.Authority.create(name)
    authority.save(folder)
    text = f"The authority of {name} is in {folder}: authority.key stays there, authority.pem goes to every party.\n"
    text += f"Its key's fingerprint:\n  {pki.spoken(authority.fingerprint)}"
    _show({"folder": str(folder), "fingerprint": authority.fingerprint}, json, text)


@federation.command("approve")
def federation_approve(
    folder: Annotated[Path, typer.Argument(help="The authority's.")],
    request: Annotated[Path, typer.Argument(help="A party's request.pem.")],
    yes: Annotated[bool, typer.Option("--yes", help="The fingerprint has been compared.")] = False,
    json: Json = False,
) -> None:
    """Sign a party's certificate, after its fingerprint has been compared with the party by telephone."""
    from partway import pki

    asked = pki.read_request(contents(request))
    if not json:
        print(f"{asked.name} asks for the role of {asked.role.value}. Its key's fingerprint:")
        print(f"  {pki.spoken(asked.fingerprint)}")
    if not yes and (json or not typer.confirm("Have you compared it with them by telephone?")):
        raise UsageError("not approved: compare the fingerprint with the party first, then say --yes")
    pki.approve_in(folder, request)
    words = {"name": asked.name, "role": asked.role.value, "fingerprint": asked.fingerprint}
    _show(words, json, f"certificate.pem and authority.pem are beside {request}; both go back to {asked.name}.")


@federation.command("roster")
def federation_roster(
    folder: Annotated[Path, typer.Argument(help="The authority's.")],
    json: Json = False,
) -> None:
    """Print the roster of all approved sites, to be put into a job."""
    from partway import pki

    sites = pki.approved_sites(folder)
    text = "[roster]\n" + "\n".join(f'{name} = "{fingerprint}"' for name, fingerprint in sites.items())
    _show({"roster": sites}, json, text)


def _request(name: str, role: str, hosts: list[str], folder: Path, json: bool) -> None:
    from partway import pki

    asked = pki.request_in(folder, name, pki.Role(role), hosts)
    text = f"Send {folder / 'request.pem'} to the steward, and read them this by telephone:\n"
    text += f"  {pki.spoken(asked.fingerprint)}\nTheir answer, certificate.pem and authority.pem, goes into {folder}."
    _show({"request": str(folder / "request.pem"), "fingerprint": asked.fingerprint}, json, text)


@site.command("request")
def site_request(name: Name, identity: Into = Path("identity"), json: Json = False) -> None:
    """Make this site's key, and a request for the steward."""
    _request(name, "site", [], identity, json)


@server.command("request")
def server_request(
    name: Name,
    host: Annotated[list[str], typer.Option(help="A name or address at which sites reach it; repeat for more.")],
    identity: Into = Path("identity"),
    json: Json = False,
) -> None:
    """Make the server's key, and a request for the steward."""
    _request(name, "server", host, identity, json)


@job.command("request")
def job_request(name: Name, identity: Into = Path("identity"), json: Json = False) -> None:
    """Make an operator's key, and a request for the steward."""
    _request(name, "operator", [], identity, json)


# -- the server and the sites


@server.command("start")
def server_start(file: Annotated[Path, typer.Argument(help="server.toml")], json: Json = False) -> None:
    """Listen for sites and operators, and run the jobs that operators submit, one after another."""
    from partway.config import read_server

    settings = read_server(file)
    from partway.server.start import start

    _as_batch_work()
    start(settings, file.parent, json)


@site.command("start")
def site_start(
    file: Annotated[Path, typer.Argument(help="site.toml")],
    jobs: Annotated[int | None, typer.Option(help="Leave after so many; the exit code is the last one's.")] = None,
    json: Json = False,
) -> None:
    """Connect to the server, and take part in the jobs that this site's policy allows."""
    from partway.config import read_site

    settings = read_site(file)
    from partway.site.show import run

    _as_batch_work()
    run(settings, file.parent, jobs, json)


@site.command("preview")
def site_preview(
    file: Annotated[Path, typer.Argument(help="site.toml")],
    job_file: Annotated[Path, typer.Argument(metavar="JOB", help="job.toml, signed or not")],
    json: Json = False,
) -> None:
    """Print, sending nothing, exactly what would leave for one record, and whether the policy allows the job."""
    from partway.config import read_site

    settings = read_site(file)
    from partway.site.preview import preview

    found = preview(settings, file.parent, job_file)
    _show(found.words(), json, found.text())
    if found.objections:
        raise typer.Exit(3)


def _as_batch_work() -> None:
    """Work that a waking thread does not interrupt: a twentieth less CPU where parties share cores."""
    if hasattr(os, "SCHED_BATCH"):
        os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))


# -- parties that hold columns of the same patients

Records = Annotated[Path, typer.Argument(metavar="RECORDS", help="A CSV or Parquet file.")]
Ids = Annotated[str, typer.Option("--id", help="The column by which patients are told apart.")]
Kept = Annotated[Path, typer.Option(help="What stays here until the match is done.")]


@match.command("ask")
def match_ask(
    records: Records, column: Ids, kept: Kept = Path("match.kept"), to: Path = Path("match.asked"), json: Json = False
) -> None:
    """First, who holds the labels: write the question that goes to every other party. It holds no id."""
    from partway.site.match import ask

    count = ask(records, column, kept, to)
    text = f"{to} asks for {count:,} patients: send it to every other party. {kept} stays here."
    _show({"asked": str(to), "records": count}, json, text)


@match.command("answer")
def match_answer(
    records: Records,
    asked: Annotated[Path, typer.Argument(help="The asker's file.")],
    column: Ids,
    kept: Kept = Path("match.kept"),
    to: Path = Path("match.answered"),
    json: Json = False,
) -> None:
    """Then, each other party: write the answer. It holds no id; the asker learns which of its patients are here."""
    from partway.site.match import answer

    count = answer(records, column, asked, kept, to)
    text = f"{to} answers for {count:,} patients of the asker: send it back. {kept} stays here."
    _show({"answered": str(to), "records": count}, json, text)


@match.command("agree")
def match_agree(
    answers: Annotated[list[str], typer.Argument(metavar="PARTY=FILE...", help="Every other party's answer.")],
    kept: Kept = Path("match.kept"),
    to: Annotated[Path, typer.Option(help="The folder that gets ids.txt, and a file for each other party.")] = Path(),
    only_common: Annotated[bool, typer.Option("--only-common", help="Patients whom every party has.")] = False,
    json: Json = False,
) -> None:
    """Then the asker: write its own list of ids, and for each other party the file from which it takes its own."""
    from partway.site.match import agree

    pairs = [answer.partition("=")[::2] for answer in answers]
    if not all(party and path for party, path in pairs):
        raise UsageError("answers are given as PARTY=FILE, such as history=history.answered")
    found = agree(kept, {party: Path(path) for party, path in pairs}, to, only_common)
    here = ", ".join(f"{party} has {count:,}" for party, count in found.here.items())
    text = f"{found.records:,} patients; {here}. {to / 'ids.txt'} stays here, each <party>.agreed goes to its party."
    _show({"folder": str(to), "records": found.records, "here": dict(found.here)}, json, text)


@match.command("take")
def match_take(
    agreed: Annotated[Path, typer.Argument(help="The asker's second file.")],
    kept: Kept = Path("match.kept"),
    to: Path = Path("ids.txt"),
    json: Json = False,
) -> None:
    """Last, each other party: write its list of ids, for `[data] ids` of its site file."""
    from partway.site.match import take

    found = take(kept, agreed, to)
    text = f"{found.here['here']:,} of {found.records:,} agreed patients are here: {to}. {kept} can be deleted."
    _show({"ids": str(to), "records": found.records, "here": found.here["here"]}, json, text)


# -- an operator


@job.command("sign")
def job_sign(
    file: Annotated[Path, typer.Argument(help="job.toml")], identity: Identity = Path("identity"), json: Json = False
) -> None:
    """Check a job and sign it; whoever changes it afterwards breaks the signature."""
    from partway import pki
    from partway.config import Policy, job_texts, read_job

    text, schema = job_texts(file)
    parsed = read_job(text, str(file), schema)
    signed = pki.sign_job(pki.Identity.load(identity), text, schema or b"")
    from partway.assembly import network_of, schemas_of

    network_of(parsed, Policy(networks=list(parsed.builds), most_parameters=2**31 - 1), schemas_of(parsed))
    path = file.with_suffix(".signed")
    path.write_bytes(signed)
    _show({"signed": str(path)}, json, f"Signed: {path}")


def _call(identity: Path, address: str, method: str, request: bytes) -> bytes:
    from partway import pki
    from partway.transport.grpc import Credentials, call

    me = pki.Identity.load(identity)
    return call(address, Credentials(me.certificate_pem, me.key_pem, me.authority_pem), method, request, timeout=30)


def _status(identity: Path, address: str, method: str, request: bytes) -> Status:
    return Status(**json_module.loads(_call(identity, address, method, request)))


@job.command("submit")
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
        _show(asdict(status), json, text)


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
    _show(asdict(status), json, status.line())
    if status.exit_code:
        raise typer.Exit(status.exit_code)


@job.command("status")
def job_status(number: Number, server: Address, identity: Identity = Path("identity"), json: Json = False) -> None:
    """Say where a job stands; the exit code is the job's once it has ended."""
    _end(_status(identity, server, "status", number.encode()), json)


@job.command("list")
def job_list(server: Address, identity: Identity = Path("identity"), json: Json = False) -> None:
    """List this operator's jobs."""
    jobs = [Status(**words) for words in json_module.loads(_call(identity, server, "list", b""))]
    _show({"jobs": [asdict(s) for s in jobs]}, json, "\n".join(s.line() for s in jobs) or "no jobs")


@job.command("stop")
def job_stop(number: Number, server: Address, identity: Identity = Path("identity"), json: Json = False) -> None:
    """Stop a job."""
    status = _status(identity, server, "stop", number.encode())
    _show(asdict(status), json, f"Job {number} is told to stop.")


@job.command("download")
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
    _show({"folder": str(target), "files": sorted(files)}, json, f"{', '.join(sorted(files))} in {target}")


# -- anyone


@ledger.command("verify")
def ledger_verify(
    file: Annotated[Path, typer.Argument(help="ledger.jsonl")],
    identity: Annotated[Path, typer.Option(help="The folder of the party's certificate.pem and authority.pem.")] = Path(
        "identity"
    ),
    json: Json = False,
) -> None:
    """Recompute a ledger's chain and signatures, and add up what left."""
    from partway import ledger as ledgers
    from partway import pki

    certificate, authority = (contents(identity / name) for name in ("certificate.pem", "authority.pem"))
    subject = pki.verify_certificate(certificate, authority)
    audit = ledgers.verify(file, lambda signature, data: pki.signed_by(subject.key_der, signature, data))
    rows = {name: [(e, to, c.frames, c.nbytes) for (e, to), c in getattr(audit, name).items()] for name in LEFT}
    keys = ("edge", "to", "frames", "bytes")
    words = {
        "party": subject.name,
        "lines": audit.lines,
        "signatures": audit.signatures,
        "outcome": audit.outcome,
        "head": audit.head,
        **{name: [dict(zip(keys, row, strict=True)) for row in found] for name, found in rows.items()},
    }
    text = [
        f"{file}: {audit.lines} lines follow from each other, with {audit.signatures} signatures of {subject.name}."
    ]
    text.append(f"The job ended: {audit.outcome}." if audit.outcome else "No line says how the job ended.")
    for name, prefix in LEFT.items():
        text += [f"{prefix}{n:>7} frames {size:>13,} bytes  {e} to {to}" for e, to, n, size in rows[name]]
    _show(words, json, "\n".join(text))


LEFT = {"left": "  left:    ", "at_most": "  at most: "}


@app.command("data")
def data(
    folder: Annotated[Path, typer.Argument(help="Where to.")],
    name: Annotated[str, typer.Option("--set", help="thyroid, heart or support.")] = "thyroid",
    json: Json = False,
) -> None:
    """Write a bundled data set as one file for each of its sites."""
    from partway.config import bundled_schema

    bundled_schema(name, "--set")
    from partway.data.sets import write_sites

    files = [str(path) for path in write_sites(name, folder)]
    _show({"files": files}, json, "\n".join(files))


@app.command("check")
def check(
    schema: Annotated[str, typer.Argument(help="schema.toml, or thyroid, heart or support.")],
    file: Annotated[Path, typer.Argument(help="A CSV or Parquet file of records.")],
    site: Annotated[str | None, typer.Option(help="Only this site's rows.")] = None,
    target: Annotated[str, typer.Option(help="Of the schema, what is learnt; else its label.")] = "",
    json: Json = False,
) -> None:
    """Hold a file of records against a schema: everything that does not fit, or what it gives to a network."""
    from partway.config import bundled_schema, read_schema

    columns = read_schema(contents(Path(schema)), schema) if schema.endswith(".toml") else bundled_schema(schema)
    from partway.data.survey import survey
    from partway.data.table import load

    found = survey(load(file), columns, site, columns.known(target, "--target"))
    _show(found.words(), json, found.text())
    if found.faults:
        raise typer.Exit(2)


JobFile = Annotated[Path, typer.Argument(metavar="JOB", help="job.toml; the bundled records take part.")]
Data = Annotated[
    Path | None, typer.Option("--data", help="A CSV or Parquet file in place of the bundled records: all sites'.")
]


@app.command("cost")
def cost(job_file: JobFile, data: Data = None, json: Json = False) -> None:
    """Tell what a job will cost each party, running nothing: computation, bytes and exchanges."""
    from partway.config import read_job_file

    parsed = read_job_file(job_file)
    from partway.assembly import forecast_of, schemas_of
    from partway.data.sets import records_for

    records = records_for(parsed, data)(parsed.job.seed)
    costs = forecast_of(parsed, schemas_of(parsed), {site: records[site].sizes for site in sorted(records)})
    text = [f"{'party':<16}{'MFLOP':>12}{'MB up':>10}{'MB down':>10}{'exchanges':>11}"]
    for party, spent in costs.items():
        moved = "".join(f"{nbytes / 1e6:>10.2f}" for nbytes in (spent.bytes_up, spent.bytes_down))
        text.append(f"{party:<16}{spent.flops / 1e6:>12,.1f}{moved}{spent.exchanges:>11,}")
    if parsed.training.patience:
        text.append("At most: with [training] patience, training may stop before.")
    _show({"cost": {party: asdict(spent) for party, spent in costs.items()}}, json, "\n".join(text))


@app.command("compare")
def compare(
    job_file: JobFile,
    data: Data = None,
    folder: Annotated[Path, typer.Option(help="Where a folder of this comparison is made.")] = Path("comparison"),
    seeds: Annotated[int, typer.Option(min=1, help="Runs, each with its own division, orders and first weights.")] = 3,
    json: Json = False,
) -> None:
    """Set Partway beside training alone, pooled, federated averaging and large batches: a job's network and records."""
    from partway.config import read_job_file

    parsed = read_job_file(job_file)
    from partway.compare.run import compare as run
    from partway.data.sets import records_for

    run(parsed, records_for(parsed, data), folder, seeds, json)


@app.command("simulate")
def simulate(
    job_file: JobFile,
    data: Data = None,
    folder: Annotated[Path | None, typer.Option(help="Where result, weights and ledgers go.")] = None,
    json: Json = False,
) -> None:
    """Run a job in one process: the same parties, door and frames as the real thing."""
    from partway.config import read_job_file

    parsed = read_job_file(job_file)
    from rich.console import Console

    from partway.data.sets import records_for
    from partway.simulation import simulate as run

    records = records_for(parsed, data)(parsed.job.seed)
    with Console(stderr=True, markup=False).status(f"{parsed.job.name}: joining") as line:

        def watch(name: str, assembled: Any) -> None:
            session = assembled.party.session
            if name == "server" and session.turns:
                line.update(f"{parsed.job.name}: turn {max(session.at, 0)} of {len(session.turns)}")

        result = run(parsed, records, folder=folder, watch=watch)
    rows = {**result.sites, **(result.targets or ({"all sites": result.all} if result.all else {}))}
    text = []
    for name, row in rows.items():
        told = ", ".join(f"{figure} {number:.4g}" for figure, number in row.items() if number is not None)
        few = (
            "" if row.get("classes", 1) else "; no class has 3 positive and 3 negative test records, so there is no AUC"
        )
        text.append(f"{name}: {told}{few}")
    _show(result.words(), json, "\n".join([*text, f"in {folder}" if folder else "nothing was written"]))


Run = Annotated[Path, typer.Argument(metavar="RUN", help="A job's folder with network.safetensors, or that file.")]
Allowed = Annotated[
    list[str] | None, typer.Option("--network", help="A network besides Partway's own that may be built: module:name.")
]


@app.command("predict")
def predict(
    run: Run,
    file: Annotated[Path, typer.Argument(help="site.toml, or a CSV or Parquet file of records.")],
    to: Annotated[Path | None, typer.Option(help="A CSV file; else it is printed.")] = None,
    network: Allowed = None,
    json: Json = False,
) -> None:
    """A probability of each class for records, by a network of which this party holds the whole. Nothing is sent."""
    from partway.config import Connection, read_site

    site = read_site(file) if file.suffix == ".toml" else None
    from partway.data.table import load as load_table
    from partway.finished import ZOO, load
    from partway.finished import predict as predicted

    finished = load(run, (*ZOO, *(site.policy.networks if site else ()), *(network or ())))
    where = site.data if site else None
    if where is None:
        where = Connection(path=str(file), connector="parquet" if file.suffix == ".parquet" else "csv")
    table = load_table(file.parent / where.path if site else file, where.connector)
    text = predicted(finished, table, where.site, where.units)
    if to is None:
        print(text, end="")
        return
    to.write_text(text)
    _show({"file": str(to), "records": text.count("\n") - 1}, json, f"{text.count(chr(10)) - 1:,} records: {to}")


@app.command("export")
def export(
    run: Run,
    to: Annotated[Path, typer.Option(help="A file that ends in .onnx or .safetensors.")] = Path("network.onnx"),
    network: Allowed = None,
    json: Json = False,
) -> None:
    """Write a network of which this party holds the whole for others: ONNX, or safetensors with its recipe."""
    if to.suffix not in (".onnx", ".safetensors"):
        raise UsageError(f"{to}: a network is written as .onnx or .safetensors")
    from partway.finished import ZOO, load
    from partway.finished import export as exported
    from partway.report import write_whole

    finished = load(run, (*ZOO, *(network or ())))
    if to.suffix == ".onnx":
        exported(finished, to)
    else:  # weights, with the job and the scaling in its metadata: what `predict` reads
        write_whole(to, contents(run / "network.safetensors" if run.is_dir() else run))
    _show({"file": str(to)}, json, f"Written: {to}")


@app.command("demo")
def demo(
    folder: Annotated[Path, typer.Option(help="Where a folder of this run is made.")] = Path("demo"),
    seeds: Annotated[int, typer.Option(min=1, help="Runs, each with its own division, orders and first weights.")] = 3,
    json: Json = False,
) -> None:
    """Five hospitals and a server, as separate processes over mutual TLS, train one network on real records."""
    from partway.demo import demo as run

    run(folder, seeds, json)
