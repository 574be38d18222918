"""Verbs for segments as signed folders."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from partway.cli.words import Json, show

verbs = typer.Typer(help="Segments as signed folders, for who has not the network's code.", no_args_is_help=True)

Identity = Annotated[Path, typer.Option(help="The folder of your key, certificate and authority.")]


@verbs.command("write")
def segment_write(
    job_file: Annotated[Path, typer.Argument(metavar="JOB", help="job.toml.")],
    segment: Annotated[str, typer.Argument(help="bottom, trunk, head, or as the job's plan calls it.")],
    to: Annotated[Path, typer.Argument(metavar="FOLDER", help="A new folder.")],
    identity: Identity = Path("identity"),
    json: Json = False,
) -> None:
    """As an operator, write one of a job's segments as a program and weights, without code, and sign it."""
    from partway import pki
    from partway.config import read_job_file

    parsed, own = read_job_file(job_file), pki.Identity.load(identity)
    from partway.assembly import schemas_of
    from partway.model.bundle import describe
    from partway.shipped import write

    told = describe(write(parsed, schemas_of(parsed), segment, own, to))
    show({"folder": str(to), "told": told.splitlines()}, json, f"{told}\nWritten and signed: {to}")


@verbs.command("show")
def segment_show(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="As `segment write` made it.")],
    identity: Identity = Path("identity"),
    json: Json = False,
) -> None:
    """Check a segment that you were given, running nothing: who signed it, and in plain words what it does."""
    from partway import pki

    own = pki.Identity.load(identity)
    from partway.model.bundle import describe
    from partway.shipped import read

    piece, signer = read(folder, own)
    told = describe(piece)
    text = f"Signed by {signer.name}, {signer.role} of this federation.\n{told}"
    show({"signed_by": signer.name, "told": told.splitlines()}, json, text)
