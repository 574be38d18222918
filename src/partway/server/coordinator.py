"""Drives the server's party: links come in, frames for others go straight through, the rest to the torch thread.

The event loop never computes: it reads heads, forwards letters between two sites, and fills a job's inbox. One thread
runs one job after another.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import queue
import shutil
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

from partway import __version__, pki
from partway.assembly import Assembled, Place, assemble, schemas_of
from partway.config import Job, Server, read_job
from partway.data import matched
from partway.data.schema import columns_of
from partway.data.table import mismatch
from partway.errors import DataError, JobFailed, LinkLost, PartwayError, PeerError, Refused, TrustError, UsageError
from partway.outcome import result_of
from partway.party import Out, given_up, reason_for
from partway.protocol.messages import Bye, Fail, Greet, Head, Offer, Reason
from partway.report import write_whole
from partway.server.status import Status
from partway.shipped import Reader
from partway.train.draws import derived
from partway.transport.grpc import Call, Credentials, Listener, ServerLink
from partway.wire import frames
from partway.wire.frames import Frame


@dataclass(eq=False)
class Submitted:
    """A job in the server's hands."""

    signed: bytes
    job: Job
    operator: str
    digest: bytes
    folder: Path
    status: Status
    inbox: queue.SimpleQueue[tuple[str, Frame] | PartwayError] = field(default_factory=queue.SimpleQueue)
    """(site, frame), or why the job must end."""
    stopped: bool = False


class Coordinator:
    """The server: its links, its jobs, and the thread that runs them.

    Args:
        home: the folder of the server file, to which its paths are relative.
        say: told where a job stands, whenever that changes, on the thread that runs it.

    Raises:
        TrustError: the certificate is not this server's.
    """

    def __init__(self, settings: Server, home: Path, say: Callable[[Status], None]) -> None:
        self.settings, self._say = settings.server, say
        self._policy, self._home = settings.policy, home
        self._data, self._predict = settings.data, settings.predict
        self.identity = pki.Identity.load(home / self.settings.identity)
        subject = self.identity.subject
        if subject.role is not pki.Role.SERVER or subject.name != self.settings.name:
            held = f"the certificate is that of {subject.name}, {subject.role}"
            raise TrustError(f"{held}; the server file says {self.settings.name}")
        self.folder = home / self.settings.folder
        self.folder.mkdir(parents=True, exist_ok=True)
        self.jobs: dict[str, Submitted] = {}
        self._queue: queue.SimpleQueue[Submitted | None] = queue.SimpleQueue()
        self._running: Submitted | None = None
        self._subjects: dict[ServerLink, pki.Subject] = {}
        self._links: dict[str, ServerLink] = {}
        """Of the sites that have greeted."""
        self._changed = threading.Condition()
        """Guards `_links` between the loop and the torch thread, and wakes who waits for a site."""

    # -- links: on the event loop

    def opened(self, link: ServerLink) -> None:
        """A site has opened its stream."""
        subject = pki.verify_certificate(link.peer.certificate, self.identity.authority_pem)
        if subject.role is not pki.Role.SITE:
            raise TrustError(f"{subject.name} is {subject.role}; only sites open a stream")
        self._subjects[link] = subject

    def received(self, link: ServerLink, message: bytes) -> None:
        """Frames of a site: its own go to the party's inbox, those for another site straight on."""
        name = self._subjects[link].name
        try:
            for frame in frames.split(message, name):
                self._sort(link, name, frame)
        except PartwayError as error:
            if self._links.get(name) is link and self._running and name in self._running.job.roster:
                self._running.inbox.put(error)
            link.close(error)

    def lost(self, link: ServerLink, reason: str) -> None:
        """A site's stream is gone."""
        name = self._subjects.pop(link).name
        if self._links.get(name) is link:
            with self._changed:
                del self._links[name]
            if self._running and name in self._running.job.roster:
                self._running.inbox.put(LinkLost(name, reason))

    def _sort(self, link: ServerLink, name: str, frame: Frame) -> None:
        head, running = frame.head, self._running
        if head.sender != name:
            raise PeerError(name, f"speaks for {head.sender}")
        if isinstance(frame.message, Greet):
            self._greet(link, name, frame.message)
        elif self._links.get(name) is not link:
            raise PeerError(name, "has not greeted")
        elif running is None or head.job != running.digest:
            pass  # the last frames of a job that has ended
        elif head.to == self.identity.name:
            running.inbox.put((name, frame))
        elif head.to in running.job.roster:
            if head.to in self._links:
                self._links[head.to].send(bytes(frame.data))
        else:
            raise PeerError(name, f"sent a message to {head.to}, who is not in the job")

    def _greet(self, link: ServerLink, name: str, greet: Greet) -> None:
        if name in self._links:
            link.close(UsageError(f"{name} is connected already; a site runs once"))
            return
        if greet.version != __version__:
            words = f"{name} runs Partway {greet.version}, {self.identity.name} {__version__}: install the same version"
            link.close(UsageError(words))
            return
        link.send(frames.encode(Head(self.identity.name, name), Greet(__version__)))
        with self._changed:
            self._links[name] = link
            self._changed.notify_all()

    # -- jobs: submitted on the event loop, run on one thread

    def submit(self, signed: bytes, submitter: str) -> Submitted:
        """Takes a signed job. Raises `TrustError`, `ConfigError` or `UsageError` if it cannot be run here."""
        opened = pki.open_job(signed, self.identity.authority_pem)
        if opened.operator.name != submitter:
            raise TrustError(f"the job is signed by {opened.operator.name}, not by {submitter}; submit your own")
        job = read_job(opened.toml, schema=opened.schema)
        if not job.roster:
            raise UsageError("the job has no [roster]: add each site's name and key fingerprint, and sign it again")
        number = opened.digest.hex()[:12]
        folder = self.folder / f"{job.job.name}-{number}"
        if folder.exists():
            raise UsageError(f"this job was submitted before, as {number}; sign it again to run it again")
        try:
            folder.mkdir()
            write_whole(folder / "job.signed", signed)
        except (OSError, JobFailed) as error:
            shutil.rmtree(folder, ignore_errors=True)
            raise JobFailed(f"the server cannot keep the job: {error}") from None
        status = Status(number, job.job.name)
        submitted = Submitted(signed, job, submitter, opened.digest, folder, status)
        self.jobs[number] = submitted
        self._queue.put(submitted)
        return submitted

    def stop(self, submitted: Submitted) -> None:
        """Ends a job, waiting or running."""
        submitted.stopped = True
        submitted.inbox.put(JobFailed("stopped by its operator"))
        with self._changed:
            self._changed.notify_all()

    def work(self) -> None:
        """The torch thread: one job after another, until None comes."""
        while (submitted := self._queue.get()) is not None:
            status = submitted.status
            try:
                links = self._wait_for_sites(submitted)
                with Reader(self._home / self.settings.weights, self.identity.authority_pem) as shipped:
                    self._run(submitted, links, shipped)
                status.state, status.message = "done", f"the result is in {submitted.folder}"
            except PartwayError as error:
                refused = isinstance(error, Refused)
                status.state = "stopped" if submitted.stopped else "refused" if refused else "failed"
                status.message, status.exit_code = str(error), error.exit_code
            except BaseException as error:
                status.state, status.message, status.exit_code = "failed", f"a fault in Partway: {error!r}", 1
                raise
            finally:
                self._running = None
                self._keep(submitted)
                self._say(status)

    def _keep(self, submitted: Submitted) -> None:
        """How a job has ended, beside what it has left."""
        status = submitted.status
        try:
            write_whole(submitted.folder / "status.json", json.dumps(asdict(status)).encode())
        except JobFailed as error:
            status.message += f"; {error}"

    def _wait_for_sites(self, submitted: Submitted) -> dict[str, ServerLink]:
        """Its sites' links. From here on the job runs: what they send, and their loss, goes to its inbox."""
        status = submitted.status
        with self._changed:
            while not submitted.stopped:
                status.waits_for = [site for site in submitted.job.sites if site not in self._links]
                if not status.waits_for:
                    self._running = submitted
                    return {site: self._links[site] for site in submitted.job.sites}
                status.message = f"waits for {', '.join(status.waits_for)} to connect"
                self._say(status)
                self._changed.wait()
        raise JobFailed("stopped by its operator before it began")

    def _run(self, submitted: Submitted, links: Mapping[str, ServerLink], shipped: Reader) -> None:
        job, identity = submitted.job, self.identity
        for site, link in links.items():
            if self._subjects[link].fingerprint != job.roster[site]:
                words = f"{site} is connected with another key than the job's roster says"
                raise Refused(words, [Reason.ROSTER.name])
        data = self._predict if job.predict else self._data
        place = Place(
            identity=identity,
            policy=self._policy,
            secret=own_secret(identity),
            records=matched.read(data, self._home, job, identity.name) if not job.laned else None,
            folder=submitted.folder,
            earlier=self.folder,
            weights=self._home / self.settings.weights,
            shipped=shipped,
            device=self.settings.device,
        )
        roster = {**job.roster, identity.name: identity.fingerprint}
        schema = schemas_of(job, identity.name)
        assembled = assemble(
            job, submitted.digest, submitted.operator, roster, identity.name, place, schema, pki.signed_by
        )
        submitted.status.state, submitted.status.message = "running", ""
        offer = Offer(submitted.signed, identity.certificate_pem)
        for site, link in links.items():
            link.send(frames.encode(Head(identity.name, site, submitted.digest), offer))
        run = _Run(assembled, links, submitted, lambda: self._say(submitted.status))
        try:
            run.walk()
        except PartwayError as error:
            run.give_up(error)
            assembled.ledger.end("stopped" if submitted.stopped else type(error).__name__)
            raise
        assembled.ledger.end("done")
        result_of(assembled, submitted.status.seconds).write(submitted.folder)

    # -- the process

    async def serve(self, calls: Mapping[str, Call], ready: Callable[[int], None], stop: asyncio.Event) -> None:
        """Listens until `stop` is set. Raises `UsageError` if the address cannot be had."""
        identity, settings = self.identity, self.settings
        credentials = Credentials(identity.certificate_pem, identity.key_pem, identity.authority_pem)
        listener = Listener(settings.listen, credentials, self, calls, settings.silence)
        port = await listener.start()
        worker = threading.Thread(target=self.work, name="torch", daemon=True)
        worker.start()
        ready(port)
        while not stop.is_set():
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(stop.wait(), timeout=0.5)
            if not worker.is_alive():
                raise JobFailed("the server's torch thread has ended; its words stand above")
        for submitted in self.jobs.values():
            if not submitted.status.ended:
                self.stop(submitted)
        self._queue.put(None)
        await asyncio.to_thread(worker.join, 10)
        await listener.stop()


class _Run:
    """One job from its first frame to its last: from the inbox to the party, and what comes out to the links."""

    def __init__(
        self, assembled: Assembled, links: Mapping[str, ServerLink], submitted: Submitted, tell: Callable[[], None]
    ) -> None:
        self._party, self._links, self._submitted, self._tell = assembled.party, links, submitted, tell
        self._began = self._told = time.monotonic()
        self._early: deque[tuple[str, Frame] | PartwayError] = deque()
        """What has come in while the party was at work, in order."""
        self._blamed = ""
        """The site that has refused."""

    def walk(self) -> None:
        """Raises what ends the job before its time."""
        self._post(self._party.start())
        self._hear_all()
        while not self._party.ended:
            item = self._early.popleft() if self._early else self._submitted.inbox.get()
            if isinstance(item, LinkLost) and self._has_left(item):
                continue
            if isinstance(item, PartwayError):
                raise item
            self._post(self._party.receive(*item))
            self._show()
        self._update()

    def _hear_all(self) -> None:
        """Waits until each site has taken the offer or failed, so that failures are told of all sites together.

        Raises:
            DataError: records do not fit; the words have every such site and column, and no value.
            Refused, JobFailed: a site gives up.
        """
        came: list[tuple[str, Frame]] = []
        silent, again = set(self._links), False
        while silent and not again:  # who speaks twice cannot have heard all others: it fails, or is at fault
            self._submitted.status.waits_for = sorted(silent)
            item = self._submitted.inbox.get()
            if isinstance(item, PartwayError):
                raise item
            came.append(item)
            again = item[0] not in silent
            silent.discard(item[0])
        fails = {site: frame.message for site, frame in came if isinstance(frame.message, Fail)}
        wrong, words = {}, []
        for site, fail in sorted(fails.items()):
            if fail.reason is Reason.DATA:
                wrong[site] = [(found.column, found.kind.name) for found in fail.mismatches]
            else:
                words.append(str(given_up(site, fail)))
        if wrong:
            raise DataError("; ".join([mismatch(columns_of(self._submitted.job), wrong), *words]))
        for self._blamed, fail in sorted(fails.items()):
            raise given_up(self._blamed, fail)
        self._early += came

    def give_up(self, error: PartwayError) -> None:
        """The other parties hear why, as an enum; a party that has told them already says nothing more."""
        reason, peer = (Reason.STOPPED, "") if self._submitted.stopped else reason_for(error)
        if reason >= Reason.OPERATOR:
            peer = self._blamed
        self._post(self._party.give_up(reason, peer))
        self._update()

    def _post(self, out: Out) -> None:
        for site, made in out:
            if made:
                self._links[site].send(b"".join(made))
            elif self._is_over():
                return

    def _is_over(self) -> bool:
        """Looks up from a turn in which nobody else has a part: what has come in may end the job."""
        self._show()
        with contextlib.suppress(queue.Empty):
            while True:
                self._early.append(self._submitted.inbox.get_nowait())
        left = set()
        for item in self._early:
            if isinstance(item, LinkLost):
                if item.peer not in left and not self._has_left(item):
                    return True
            elif isinstance(item, PartwayError) or isinstance(item[1].message, Fail):
                return True
            elif isinstance(item[1].message, Bye):
                left.add(item[0])
        return False

    def _has_left(self, lost: LinkLost) -> bool:
        """It had done its part."""
        return self._party.session.left(lost.peer)

    def _show(self) -> None:
        if (now := time.monotonic()) - self._told > 0.25:
            self._told = now
            self._update()
            self._tell()

    def _update(self) -> None:
        """Where the job stands."""
        session, worker, status = self._party.session, self._party.worker, self._submitted.status
        status.step, status.steps = session.steps
        status.seconds = time.monotonic() - self._began
        status.seconds_left = status.seconds / status.step * (status.steps - status.step) if status.step else None
        status.loss = float(worker.losses[-1]) if worker.losses else None
        status.waits_for = session.waits_for()
        status.bytes_received = {site: link.bytes_received for site, link in self._links.items()}
        status.bytes_sent = {site: link.bytes_sent for site, link in self._links.items()}


def own_secret(identity: pki.Identity) -> bytes:
    """32 bytes from which all of the server's draws come."""
    return derived(identity.key_pem, "server")
