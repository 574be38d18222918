"""Verbs that need no other party."""

from __future__ import annotations

import importlib.util
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from partway.cli.words import Json, show
from partway.config import contents
from partway.errors import UsageError


def data(
    folder: Annotated[Path, typer.Argument(help="Where to.")],
    name: Annotated[str, typer.Option("--set", help="thyroid, heart, support or mnist.")] = "thyroid",
    json: Json = False,
) -> None:
    """Write a bundled data set as one file for each of its sites."""
    from partway.config import bundled_schema

    bundled_schema(name, "--set")
    from partway.data.sets import write_sites

    files = [str(path) for path in write_sites(name, folder)]
    show({"files": files}, json, "\n".join(files))


def check(
    schema: Annotated[str, typer.Argument(help="schema.toml, or thyroid, heart, support or mnist.")],
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
    show(found.words(), json, found.text())
    if found.faults:
        raise typer.Exit(2)


JobFile = Annotated[Path, typer.Argument(metavar="JOB", help="job.toml; the bundled records take part.")]
Data = Annotated[
    Path | None, typer.Option("--data", help="A CSV or Parquet file in place of the bundled records: all sites'.")
]

Weights = Annotated[Path, typer.Option(help="Where files of weights and folders of segments lie that the job names.")]


def cost(job_file: JobFile, data: Data = None, weights: Weights = Path("weights"), json: Json = False) -> None:
    """Tell what a job will cost each party, running nothing: computation, bytes and exchanges."""
    from partway.config import read_job_file

    parsed = read_job_file(job_file)
    from partway.assembly import forecast_of, schemas_of
    from partway.data.sets import records_for
    from partway.shipped import Reader

    records = records_for(parsed, data)(parsed.job.seed)
    sizes = {site: records[site].sizes for site in sorted(records)}
    costs = forecast_of(parsed, schemas_of(parsed), sizes, shipped=Reader(weights, None))
    text = [f"{'party':<16}{'MFLOP':>12}{'MB up':>10}{'MB down':>10}{'exchanges':>11}"]
    for party, spent in costs.items():
        moved = "".join(f"{nbytes / 1e6:>10.2f}" for nbytes in (spent.bytes_up, spent.bytes_down))
        text.append(f"{party:<16}{spent.flops / 1e6:>12,.1f}{moved}{spent.exchanges:>11,}")
    if parsed.training.patience:
        text.append("At most: with [training] patience, training may stop before.")
    show({"cost": {party: asdict(spent) for party, spent in costs.items()}}, json, "\n".join(text))


def plan(
    job_file: JobFile,
    to: Annotated[Path | None, typer.Option(help="A .png file for the picture; else JOB.png here.")] = None,
    json: Json = False,
) -> None:
    """Show where a job's network can be cut, what each cut costs, and where the job cuts it. Nothing is trained."""
    from partway.config import read_job_file

    parsed = read_job_file(job_file)
    from partway.assembly import schemas_of
    from partway.places import draw, survey

    found = survey(parsed, next(iter(schemas_of(parsed).values())))
    picture = to or Path(f"{job_file.stem}.png")
    if importlib.util.find_spec("matplotlib") is None:
        show(found.words(), json, f"{found.text()}\nFor a picture, install partway[demo].")
        return
    draw(found, picture)
    show(found.words() | {"picture": str(picture)}, json, f"{found.text()}\nPicture: {picture}")


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


def simulate(
    job_file: JobFile,
    data: Data = None,
    folder: Annotated[Path | None, typer.Option(help="Where result, weights and ledgers go.")] = None,
    weights: Weights = Path("weights"),
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

        result = run(parsed, records, folder=folder, weights=weights, watch=watch)
    rows = {**result.sites, **(result.targets or ({"all sites": result.all} if result.all else {}))}
    text = []
    for name, row in rows.items():
        told = ", ".join(f"{figure} {number:.4g}" for figure, number in row.items() if number is not None)
        few = (
            "" if row.get("classes", 1) else "; no class has 3 positive and 3 negative test records, so there is no AUC"
        )
        text.append(f"{name}: {told}{few}")
    show(result.words(), json, "\n".join([*text, f"in {folder}" if folder else "nothing was written"]))


def weights(
    job_file: JobFile,
    file: Annotated[Path, typer.Argument(help="A safetensors file with the network's own names.")],
    to: Annotated[Path, typer.Option(help="The folder for the parts.")] = Path("weights"),
    without: Annotated[list[str] | None, typer.Option(help="A beginning of names that are drawn anew.")] = None,
    json: Json = False,
) -> None:
    """Divide a network's weights into a file for each segment of a job, and tell what the job has to say of them."""
    from partway.config import read_job_file

    parsed = read_job_file(job_file)
    from partway.assembly import schemas_of
    from partway.pretrained import split

    parts = split(parsed, schemas_of(parsed), file, to, without or [])
    text = [f"{p.segment}: {p.tensors} tensors, {len(p.missing)} drawn anew: {p.file}" for p in parts]
    text += ["", "In the job:", "[network.weights]", *(f'{p.segment} = "{p.digest}"' for p in parts)]
    told = {p.segment: {"file": str(p.file), "digest": p.digest, "drawn_anew": list(p.missing)} for p in parts}
    show({"parts": told}, json, "\n".join(text))


Run = Annotated[Path, typer.Argument(metavar="RUN", help="A job's folder with network.safetensors, or that file.")]
Allowed = Annotated[
    list[str] | None, typer.Option("--network", help="A network besides Partway's own that may be built: module:name.")
]

Segments = Annotated[Path, typer.Option(help="Where folders of segments lie, for a network that came without code.")]


def predict(
    run: Run,
    file: Annotated[Path, typer.Argument(help="site.toml, or a CSV or Parquet file of records.")],
    to: Annotated[Path | None, typer.Option(help="A CSV file; else it is printed.")] = None,
    network: Allowed = None,
    weights: Segments = Path("weights"),
    json: Json = False,
) -> None:
    """A probability of each class for records, by a network of which this party holds the whole. Nothing is sent."""
    from partway.config import Connection, read_site

    site = read_site(file) if file.suffix == ".toml" else None
    from partway.data.table import load as load_table
    from partway.finished import ZOO, load
    from partway.finished import predict as predicted
    from partway.shipped import Reader

    finished = load(run, (*ZOO, *(site.policy.networks if site else ()), *(network or ())), Reader(weights, None))
    where = site.data if site else None
    if where is None:
        where = Connection(path=str(file), connector="parquet" if file.suffix == ".parquet" else "csv")
    table = load_table(file.parent / where.path if site else file, where.connector)
    text = predicted(finished, table, where.site, where.units)
    if to is None:
        print(text, end="")
        return
    to.write_text(text)
    show({"file": str(to), "records": text.count("\n") - 1}, json, f"{text.count(chr(10)) - 1:,} records: {to}")


def export(
    run: Run,
    to: Annotated[Path, typer.Option(help="A file that ends in .onnx or .safetensors.")] = Path("network.onnx"),
    network: Allowed = None,
    weights: Segments = Path("weights"),
    json: Json = False,
) -> None:
    """Write a network of which this party holds the whole for others: ONNX, or safetensors with its recipe."""
    if to.suffix not in (".onnx", ".safetensors"):
        raise UsageError(f"{to}: a network is written as .onnx or .safetensors")
    from partway.finished import ZOO, load
    from partway.finished import export as exported
    from partway.report import write_whole
    from partway.shipped import Reader

    finished = load(run, (*ZOO, *(network or ())), Reader(weights, None))
    if to.suffix == ".onnx":
        exported(finished, to)
    else:  # weights, with the job and the scaling in its metadata: what `predict` reads
        write_whole(to, contents(run / "network.safetensors" if run.is_dir() else run))
    show({"file": str(to)}, json, f"Written: {to}")


def demo(
    folder: Annotated[Path, typer.Option(help="Where a folder of this run is made.")] = Path("demo"),
    seeds: Annotated[int, typer.Option(min=1, help="Runs, each with its own division, orders and first weights.")] = 3,
    json: Json = False,
) -> None:
    """Five hospitals and a server, as separate processes over mutual TLS, train one network on real records."""
    from partway.demo import demo as run

    run(folder, seeds, json)
