"""The server's process: its event loop, and what it shows."""

from __future__ import annotations

import asyncio
import json
import signal
from dataclasses import asdict
from pathlib import Path

import uvloop

from partway import pki
from partway.config import Server
from partway.server.control import calls
from partway.server.coordinator import Coordinator
from partway.server.status import Status


def start(settings: Server, home: Path, as_json: bool) -> None:
    """Serves until SIGTERM or SIGINT.

    Args:
        home: the folder of the server file.
        as_json: one JSON object a line: `{"ready": port, ...}`, then every job's status whenever it changes.

    Raises:
        UsageError: the port is in use.
        TrustError: the certificate is not this server's.
    """

    def say(status: Status) -> None:
        print(json.dumps(asdict(status)) if as_json else status.line(), flush=True)

    def ready(port: int) -> None:
        name, fingerprint = coordinator.identity.name, coordinator.identity.fingerprint
        text = f"{name} listens on port {port} (mutual TLS 1.3); results go to {coordinator.folder}\n"
        text += f"its key's fingerprint: {pki.spoken(fingerprint)}"
        print(json.dumps({"ready": port, "name": name, "fingerprint": fingerprint}) if as_json else text, flush=True)

    coordinator = Coordinator(settings, home, say)

    async def serve() -> None:
        stop = asyncio.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, stop.set)
        await coordinator.serve(calls(coordinator), ready, stop)

    uvloop.run(serve())
