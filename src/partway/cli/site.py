"""A hospital's verbs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from partway.cli.words import Into, Json, Name, as_batch_work, make_request, show

verbs = typer.Typer(help="A hospital.", no_args_is_help=True)


@verbs.command("request")
def site_request(name: Name, identity: Into = Path("identity"), json: Json = False) -> None:
    """Make this site's key, and a request for the steward."""
    make_request(name, "site", [], identity, json)


@verbs.command("start")
def site_start(
    file: Annotated[Path, typer.Argument(help="site.toml")],
    jobs: Annotated[int | None, typer.Option(help="Leave after so many; the exit code is the last one's.")] = None,
    json: Json = False,
) -> None:
    """Connect to the server, and take part in the jobs that this site's policy allows."""
    from partway.config import read_site

    settings = read_site(file)
    from partway.site.show import run

    as_batch_work()
    run(settings, file.parent, jobs, json)


@verbs.command("preview")
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
    show(found.words(), json, found.text())
    if found.objections:
        raise typer.Exit(3)
