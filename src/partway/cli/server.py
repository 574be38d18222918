"""The server's verbs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from partway.cli.words import Into, Json, Name, as_batch_work, make_request

verbs = typer.Typer(help="The server.", no_args_is_help=True)


@verbs.command("request")
def server_request(
    name: Name,
    host: Annotated[list[str], typer.Option(help="A name or address at which sites reach it; repeat for more.")],
    identity: Into = Path("identity"),
    json: Json = False,
) -> None:
    """Make the server's key, and a request for the steward."""
    make_request(name, "server", host, identity, json)


@verbs.command("start")
def server_start(file: Annotated[Path, typer.Argument(help="server.toml")], json: Json = False) -> None:
    """Listen for sites and operators, and run the jobs that operators submit, one after another."""
    from partway.config import read_server

    settings = read_server(file)
    from partway.server.start import start

    as_batch_work()
    start(settings, file.parent, json)
