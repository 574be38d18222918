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
    to: Annotated[Path, typer.Option(help="Where a folder for it is made.")] = Path("weights"),
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

    made = write(parsed, schemas_of(parsed), segment, own, to)
    told = describe(made.piece)
    text = f'{told}\nWritten and signed: {made.folder}\n\nIn the job:\n[networks.{segment}]\nsegment = "{made.digest}"'
    show({"folder": str(made.folder), "digest": made.digest, "told": told.splitlines()}, json, text)


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

    found = read(folder, own.authority_pem)
    assert found.signer is not None
    told = describe(found.piece)
    text = f"Signed by {found.signer.name}, {found.signer.role} of this federation.\n{told}\n\nTo let it run here: "
    text += f'the folder is called by its digest, in `weights`, and [policy] segments names\n"{found.digest}"'
    show({"signed_by": found.signer.name, "digest": found.digest, "told": told.splitlines()}, json, text)
