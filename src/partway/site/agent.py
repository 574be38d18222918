"""Drives a site's party: connects outwards, takes part in the jobs that are offered, leaves files behind.

One thread reads, computes and sends, for a site has nobody else to answer; gRPC's own threads keep the link alive.
"""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from partway import __version__, pki
from partway.assembly import Assembled, Place, assemble, schemas_of
from partway.config import Site, read_job
from partway.data import matched, table
from partway.egress import Tap
from partway.errors import DataError, JobFailed, LinkLost, PartwayError, Refused, TrustError, UsageError
from partway.outcome import result_of
from partway.party import Out
from partway.protocol.messages import (
    ANYBODY,
    MOST_MISMATCHES,
    Fail,
    Greet,
    Head,
    Mismatch,
    Offer,
    Reason,
    Wrong,
)
from partway.shipped import Reader
from partway.site.releases import Releases
from partway.transport.grpc import ClientLink, Credentials
from partway.wire import frames
from partway.wire.frames import Frame


@dataclass
class Progress:
    """What a site tells the people in front of it."""

    job: str
    """Its name; empty between jobs."""
    state: str
    """waiting, running, done, refused, stopped or failed"""
    message: str = ""
    step: int = 0
    steps: int = 0
    loss: float | None = None
    """Of the last step, where this site has labels and a head; its part of the union batch's mean."""
    bytes_sent: int = 0
    """Since it connected."""
    bytes_received: int = 0
    waits_for: str = ""
    seconds_left: float | None = None


class Stopped(JobFailed):
    """This site's own people have stopped it."""


class Agent:
    """A site between its records and its link.

    Args:
        home: the folder of the site file, to which its paths are relative.
        say: told where the site stands, whenever a job's state changes and a few times a second while one runs.
        tap: sees every plaintext that leaves.

    Raises:
        DataError: the records cannot be read. Nothing has been connected then.
        TrustError: the certificate is not this site's.
    """

    def __init__(self, site: Site, home: Path, say: Callable[[Progress], None], tap: Tap | None = None) -> None:
        self.settings, self._home, self._say, self._tap = site.site, home, say, tap
        self._policy, self._data, self._predict = site.policy, site.data, site.predict
        self.identity = pki.Identity.load(home / self.settings.identity)
        subject = self.identity.subject
        if subject.role is not pki.Role.SITE or subject.name != self.settings.name:
            held = f"the certificate is that of {subject.name}, {subject.role}"
            raise TrustError(f"{held}; the site file says {self.settings.name}")
        self._secret = own_secret(home / self.settings.identity)
        if site.data is not None:
            table.load(home / site.data.path, site.data.connector)  # whether it fits, a job's schema says
        self._releases = Releases(home / self.settings.folder)
        self._running: Assembled | None = None
        """The job that runs."""
        self._began = self._told = 0.0
        """When it began, and when last it was told how it stands; seconds."""
        self._stopping = self._waiting = False
        self._goodbye: asyncio.Task[None] | None = None
        """Says it once this site's own people have asked to stop."""

    async def serve(self, jobs: int | None = None) -> None:
        """Takes part in jobs until it is stopped, or until so many have ended.

        Raises:
            LinkLost: the server cannot be reached, or is gone.
            TrustError, UsageError: the server refuses this site, and says why.
            PartwayError: how the last job ended, where `jobs` is given.
        """
        identity, settings = self.identity, self.settings
        credentials = Credentials(identity.certificate_pem, identity.key_pem, identity.authority_pem)
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._ask_to_stop)
        self._link = ClientLink(settings.server, credentials, settings.silence)
        ended, failure = 0, None
        try:
            await self._link.send(frames.encode(Head(identity.name, ANYBODY), Greet(__version__)))
            while jobs is None or ended < jobs:
                try:
                    received = await self._receive()
                except Stopped:
                    return  # between jobs nothing is lost
                for frame in received:
                    if isinstance(frame.message, Greet):
                        self._greet(frame.message)
                    elif isinstance(frame.message, Offer):
                        failure = await self._take_part(frame.message, frame.head.sender)
                        ended += 1
                    # Anything else is the end of a job that has failed here.
        finally:
            if self._goodbye is not None:
                self._goodbye.cancel()
            await self._link.close()
        if failure is not None:
            raise failure

    async def _receive(self) -> list[Frame]:
        """The next message's frames. Raises `Stopped` once this site's own people have asked for it."""
        while True:
            if self._stopping:
                self._leave()
            self._waiting = True
            try:
                message = await self._link.receive()
            except LinkLost:
                if not self._stopping:
                    raise
                raise Stopped("stopped by its own people") from None
            finally:
                self._waiting = False
            if not self._stopping:  # else it is read to its end, so that the server hears what was said last
                return frames.split(message, "server")

    def _ask_to_stop(self) -> None:
        """SIGTERM or SIGINT. Only while a message is waited for is there nothing half done."""
        self._stopping = True
        if self._waiting:
            self._leave()

    def _leave(self) -> None:
        if self._goodbye is None:
            self._goodbye = asyncio.get_running_loop().create_task(self._say_goodbye())

    async def _say_goodbye(self) -> None:
        if self._running is not None and not self._running.party.session.left(self.identity.name):
            await self._post(self._running.party.give_up(Reason.STOPPED))
        await self._link.leave()

    def _greet(self, greet: Greet) -> None:
        if greet.version != __version__:
            words = f"the server runs Partway {greet.version}, this site {__version__}: install the same version"
            raise UsageError(words)
        self._say(Progress("", "waiting", f"connected to {self.settings.server}"))

    # -- one job

    async def _take_part(self, offer: Offer, server: str) -> PartwayError | None:
        """One job, to its end. What went wrong is told to the server as an enum, to our own people in words."""
        with Reader(self._home / self.settings.weights, self.identity.authority_pem) as shipped:
            return await self._join(offer, server, shipped)

    async def _join(self, offer: Offer, server: str, shipped: Reader) -> PartwayError | None:
        name, digest, folder = "a job", bytes(32), None
        try:
            opened = pki.open_job(offer.job, self.identity.authority_pem)
            job, digest = read_job(opened.toml, schema=opened.schema), opened.digest
            name = job.job.name
            subject = pki.verify_certificate(offer.certificate, self.identity.authority_pem)
            if subject.role is not pki.Role.SERVER or subject.name != server:
                raise TrustError(f"{server} showed the certificate of {subject.name}, {subject.role}")
            if job.roster.get(self.identity.name) != self.identity.fingerprint:
                words = f"{self.identity.name} is not in the job's roster with this key"
                raise Refused(words, [Reason.ROSTER.name])
            folder = self._home / self.settings.folder / f"{name}-{digest.hex()[:12]}"
            if folder.exists():
                words = f"this job has run here before, see {folder}; its operator must sign it again"
                raise Refused(words, [Reason.REPEATED.name])
            folder.mkdir(parents=True)
            data = self._predict if job.predict else self._data
            place = Place(
                identity=self.identity,
                policy=self._policy,
                secret=self._secret,
                records=matched.read(data, self._home, job, self.identity.name),
                folder=folder,
                earlier=folder.parent,
                weights=self._home / self.settings.weights,
                shipped=shipped,
                device=self.settings.device,
                tap=self._tap,
                released=self._releases.count,
                on_release=lambda: self._releases.note(name, digest),
            )
            roster = {**job.roster, server: subject.fingerprint}
            schema = schemas_of(job, server)
            assembled = assemble(job, digest, opened.operator.name, roster, server, place, schema, pki.signed_by)
        except PartwayError as error:
            self._fails(name, folder, error)
            fail = Fail(_reason(error), mismatches=_mismatches(error))
            await self._link.send(frames.encode(Head(self.identity.name, server, digest), fail))
            return error
        try:
            files = await self._run(assembled, server, folder)
        except PartwayError as error:
            assembled.ledger.end("stopped" if isinstance(error, Stopped) else type(error).__name__)
            self._fails(name, folder, error)
            if isinstance(error, Stopped | LinkLost):
                raise
            return error
        written = ", ".join(path.name for path in files)
        self._tell(assembled, "done", f"{written} and ledger.jsonl are in {folder}")
        return None

    async def _run(self, assembled: Assembled, server: str, folder: Path) -> list[Path]:
        party, self._running = assembled.party, assembled
        self._began = self._told = time.monotonic()
        try:
            await self._post(party.start())
            while not party.ended:
                party.prepare()
                try:
                    received = await self._receive()
                except (Stopped, LinkLost):
                    if party.session.left(party.me):
                        break  # nothing of this site's part is missing, and nobody waits for it
                    raise
                for frame in received:
                    await self._post(party.receive(server, frame))
                self._show()
        finally:
            self._running = None
        assembled.ledger.end("done")
        return result_of(assembled, time.monotonic() - self._began).write(folder)

    async def _post(self, out: Out) -> None:
        for _, made in out:
            if made:
                await self._link.send(b"".join(made))
            else:  # a turn of this site alone
                self._show()
                await asyncio.sleep(0)
                if self._stopping:
                    return

    def _show(self) -> None:
        """Tells how the running job stands, a few times a second."""
        if self._running is not None and (now := time.monotonic()) - self._told > 0.25:
            self._told = now
            self._tell(self._running, "running", "", now - self._began)

    def _tell(self, assembled: Assembled, state: str, message: str = "", seconds: float | None = None) -> None:
        session, losses = assembled.party.session, assembled.party.worker.losses
        step, steps = session.steps
        progress = Progress(
            job=assembled.job.job.name,
            state=state,
            message=message,
            step=step,
            steps=steps,
            loss=float(losses[-1]) if losses else None,
            bytes_sent=self._link.bytes_sent,
            bytes_received=self._link.bytes_received,
            waits_for=", ".join(session.waits_for()),
            seconds_left=seconds / step * (steps - step) if seconds and step else None,
        )
        self._say(progress)

    def _fails(self, job: str, folder: Path | None, error: PartwayError) -> None:
        """The words stay here."""
        log = (folder or self._home / self.settings.folder) / "failures.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("a") as file:
            file.write(f"{time.strftime('%Y-%m-%dT%H:%M:%S%z')} {job}: {type(error).__name__}: {error}\n")
        refused, stopped = isinstance(error, Refused), isinstance(error, Stopped)
        self._say(Progress(job, "refused" if refused else "stopped" if stopped else "failed", str(error)))


def _reason(error: PartwayError) -> Reason:
    if isinstance(error, Refused) and error.reasons:
        return Reason[error.reasons[0]]
    if isinstance(error, DataError):
        return Reason.DATA
    return Reason.OPERATOR if isinstance(error, TrustError) else Reason.FAULT


def _mismatches(error: PartwayError) -> tuple[Mismatch, ...]:
    faults = error.faults if isinstance(error, DataError) else ()
    return tuple(Mismatch(column, Wrong[kind]) for column, kind in faults)[:MOST_MISMATCHES]


def own_secret(folder: Path) -> bytes:
    """32 bytes from which all of this site's draws come; made at the first start, and never sent."""
    path = folder / "secret.key"
    if not path.exists():
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "wb") as file:
            file.write(os.urandom(32))
    secret = path.read_bytes()
    if len(secret) != 32:
        raise TrustError(f"{path} does not hold 32 bytes; remove it, and a new one is made")
    return secret
