"""The command line: verbs and files, no flag for a setting that a file has. Each verb imports what it needs.

Exit codes: 0 fine, 1 the job failed, 2 wrong words or files, 3 refused by a site's policy.
"""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from partway import __version__
from partway.cli import federation, job, ledger, match, segment, server, site
from partway.cli.alone import check, compare, cost, data, demo, export, plan, predict, simulate, weights
from partway.errors import PartwayError

app = typer.Typer(
    help="Hospitals train a network partway on their own patients; a server finishes the training.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
for verb in (data, check, plan, weights, cost, compare, simulate, predict, export, demo):
    app.command()(verb)
for people, name in (
    *((federation, "federation"), (server, "server"), (site, "site"), (match, "match")),
    *((job, "job"), (ledger, "ledger"), (segment, "segment")),
):
    app.add_typer(people.verbs, name=name)


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


@app.callback(invoke_without_command=True)
def version(show: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    """Hospitals train a network partway on their own patients; a server finishes the training."""
    if show:
        print(__version__)
        raise typer.Exit
