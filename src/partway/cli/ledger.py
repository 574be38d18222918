"""The auditor's verb."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from partway.cli.words import Json, show
from partway.config import contents

verbs = typer.Typer(help="What left a party.", no_args_is_help=True)

LEFT = {"left": "  left:    ", "at_most": "  at most: "}


@verbs.command("verify")
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
    show(words, json, "\n".join(text))
