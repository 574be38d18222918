"""Verbs of parties that hold columns of the same patients."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from partway.cli.words import Json, show
from partway.errors import UsageError

verbs = typer.Typer(
    help="Parties with columns of the same patients: which ones they have in common.", no_args_is_help=True
)

Records = Annotated[Path, typer.Argument(metavar="RECORDS", help="A CSV or Parquet file.")]
Ids = Annotated[str, typer.Option("--id", help="The column by which patients are told apart.")]
Kept = Annotated[Path, typer.Option(help="What stays here until the match is done.")]


@verbs.command("ask")
def match_ask(
    records: Records, column: Ids, kept: Kept = Path("match.kept"), to: Path = Path("match.asked"), json: Json = False
) -> None:
    """First, who holds the labels: write the question that goes to every other party. It holds no id."""
    from partway.site.match import ask

    count = ask(records, column, kept, to)
    text = f"{to} asks for {count:,} patients: send it to every other party. {kept} stays here."
    show({"asked": str(to), "records": count}, json, text)


@verbs.command("answer")
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
    show({"answered": str(to), "records": count}, json, text)


@verbs.command("agree")
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
    show({"folder": str(to), "records": found.records, "here": dict(found.here)}, json, text)


@verbs.command("take")
def match_take(
    agreed: Annotated[Path, typer.Argument(help="The asker's second file.")],
    kept: Kept = Path("match.kept"),
    to: Path = Path("ids.txt"),
    json: Json = False,
) -> None:
    """Last, each other party: write its list of ids, which its site file names as `ids` of the data."""
    from partway.site.match import take

    found = take(kept, agreed, to)
    text = f"{found.here['here']:,} of {found.records:,} agreed patients are here: {to}. {kept} can be deleted."
    show({"ids": str(to), "records": found.records, "here": found.here["here"]}, json, text)
