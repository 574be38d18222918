"""What verbs of several people share: arguments, and how an answer is printed."""

from __future__ import annotations

import json as json_module
import os
from pathlib import Path
from typing import Annotated, Any

import typer

Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Name = Annotated[str, typer.Argument(help="Letters, digits, _ and -, at most 64.")]
Into = Annotated[Path, typer.Option("--identity", help="The folder that gets the key and the request.")]


def show(words: dict[str, Any], as_json: bool, text: str) -> None:
    print(json_module.dumps(words) if as_json else text)


def make_request(name: str, role: str, hosts: list[str], folder: Path, json: bool) -> None:
    from partway import pki

    asked = pki.request_in(folder, name, pki.Role(role), hosts)
    text = f"Send {folder / 'request.pem'} to the steward, and read them this by telephone:\n"
    text += f"  {pki.spoken(asked.fingerprint)}\nTheir answer, certificate.pem and authority.pem, goes into {folder}."
    show({"request": str(folder / "request.pem"), "fingerprint": asked.fingerprint}, json, text)


def as_batch_work() -> None:
    """Work that a waking thread does not interrupt: a twentieth less CPU where parties share cores."""
    if hasattr(os, "SCHED_BATCH"):
        os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
