"""The steward's verbs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from partway.cli.words import Json, show
from partway.config import contents
from partway.errors import UsageError

verbs = typer.Typer(help="The steward: the federation's authority.", no_args_is_help=True)


@verbs.command("init")
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
    show({"folder": str(folder), "fingerprint": authority.fingerprint}, json, text)


@verbs.command("approve")
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
    show(words, json, f"certificate.pem and authority.pem are beside {request}; both go back to {asked.name}.")


@verbs.command("roster")
def federation_roster(
    folder: Annotated[Path, typer.Argument(help="The authority's.")],
    json: Json = False,
) -> None:
    """Print the roster of all approved sites, to be put into a job."""
    from partway import pki

    sites = pki.approved_sites(folder)
    text = "[roster]\n" + "\n".join(f'{name} = "{fingerprint}"' for name, fingerprint in sites.items())
    show({"roster": sites}, json, text)
