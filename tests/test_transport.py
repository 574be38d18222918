"""Both transports under one contract; TLS 1.3 with both certificates, and nothing less; silence that is noticed."""

from __future__ import annotations

import asyncio
import atexit
import os
import queue
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from partway.errors import LinkLost, PartwayError, TrustError, UsageError
from partway.pki import Authority, Identity, Role
from partway.transport import grpc as transport
from partway.transport.grpc import ClientLink, Credentials, Listener, Peer, ServerLink, call
from partway.transport.memory import Wire

STEWARD, STRANGER = Authority.create("study"), Authority.create("study")
SERVER = STEWARD.admit("server", Role.SERVER, ["localhost"])
SITE = STEWARD.admit("svi", Role.SITE)


def credentials(identity: Identity) -> Credentials:
    return Credentials(identity.certificate_pem, identity.key_pem, identity.authority_pem)


class Recorder:
    """A driver that keeps what it is told."""

    def __init__(self) -> None:
        self.links: queue.SimpleQueue[ServerLink] = queue.SimpleQueue()
        self.messages: queue.SimpleQueue[bytes] = queue.SimpleQueue()
        self.lost_for: queue.SimpleQueue[str] = queue.SimpleQueue()
        self.refusal: PartwayError | None = None

    def opened(self, link: ServerLink) -> None:
        if self.refusal:
            raise self.refusal
        self.links.put(link)

    def received(self, link: ServerLink, message: bytes) -> None:
        self.messages.put(message)

    def lost(self, link: ServerLink, reason: str) -> None:
        self.lost_for.put(reason)


async def shout(peer: Peer, request: bytes) -> bytes:
    if request == b"refuse":
        raise TrustError("you may not shout")
    return request.upper()


LOOP = asyncio.new_event_loop()
"""Of every client: gRPC holds on to an event loop that it has seen, and complains of a closed one."""


@atexit.register
def close_loop() -> None:
    left = asyncio.all_tasks(LOOP)
    for task in left:
        task.cancel()
    if left:
        LOOP.run_until_complete(asyncio.gather(*left, return_exceptions=True))
    LOOP.close()


class Client:
    """A site's link on an event loop that runs only while one of its methods does."""

    def __init__(self, address: str, identity: Credentials, silence: float = 20) -> None:
        self.link = LOOP.run_until_complete(self._open(address, identity, silence))

    async def _open(self, address: str, identity: Credentials, silence: float) -> ClientLink:
        return ClientLink(address, identity, silence)

    def send(self, message: bytes) -> None:
        LOOP.run_until_complete(self.link.send(message))

    def receive(self) -> bytes:
        return LOOP.run_until_complete(self.link.receive())

    def leave(self) -> None:
        """As a site does: says that it sends no more, and reads on."""

        async def left() -> None:
            leaving = asyncio.create_task(self.link.leave())
            with pytest.raises(LinkLost):
                await self.link.receive()
            leaving.cancel()

        LOOP.run_until_complete(left())

    def close(self) -> None:
        LOOP.run_until_complete(self.link.close())


class Serving:
    """A listener on an event loop of its own."""

    def __init__(self, silence: float = 20) -> None:
        self.driver = Recorder()
        started: queue.SimpleQueue[int] = queue.SimpleQueue()
        self._loop = asyncio.new_event_loop()

        async def serve() -> None:
            self._stop = asyncio.Event()
            listener = Listener("localhost:0", credentials(SERVER), self.driver, {"shout": shout}, silence)
            started.put(await listener.start())
            await self._stop.wait()
            await listener.stop()

        self._thread = threading.Thread(target=lambda: self._loop.run_until_complete(serve()))
        self._thread.start()
        self.port = started.get(timeout=10)

    def connect(self) -> Client:
        return Client(f"localhost:{self.port}", credentials(SITE))

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(10)
        self._loop.close()


@pytest.fixture
def serving() -> Iterator[Serving]:
    running = Serving()
    yield running
    running.close()


# -- the contract of every transport

Send = Callable[[bytes], None]
Receive = Callable[[], bytes]


@pytest.fixture(params=["memory", "grpc"])
def ends(request: pytest.FixtureRequest) -> Iterator[tuple[Send, Receive, Send, Receive]]:
    """What a site sends and the server receives, and the way back."""
    if request.param == "memory":
        wire = Wire()

        def taken(expected: tuple[str, str]) -> Receive:
            def receive() -> bytes:
                arrived = wire.take()
                assert arrived is not None
                assert arrived[:2] == expected
                return arrived[2]

            return receive

        yield (
            lambda m: wire.put("svi", "server", m),
            taken(("svi", "server")),
            lambda m: wire.put("server", "svi", m),
            taken(("server", "svi")),
        )
        assert wire.take() is None
        return
    serving = request.getfixturevalue("serving")
    client = serving.connect()
    client.send(b"first")
    link = serving.driver.links.get(timeout=10)
    assert serving.driver.messages.get(timeout=10) == b"first"
    yield client.send, lambda: serving.driver.messages.get(timeout=10), link.send, client.receive
    client.close()


def test_messages_arrive_whole_once_and_in_order(ends: tuple[Send, Receive, Send, Receive]) -> None:
    up, at_server, down, at_site = ends
    messages = [bytes([i]) * n for i, n in enumerate((1, 0, 100_000, 3, 5_000_000, 17))]
    for send, receive in ((up, at_server), (down, at_site)):
        for message in messages:
            send(message)
        assert [receive() for _ in messages] == messages


def test_memory_in_any_order_loses_nothing() -> None:
    wire = Wire(seed=7)
    for i in range(200):
        wire.put("a", "b", bytes([i]))
    taken = []
    while (arrived := wire.take()) is not None:
        taken.append(arrived[2][0])
    assert set(taken) == set(range(200))
    assert taken[:200] != list(range(200))
    assert 200 < len(taken) < 260


# -- gRPC


def test_both_ends_count_the_same_bytes(serving: Serving) -> None:
    client = serving.connect()
    client.send(b"abc")
    client.send(b"defgh")
    link = serving.driver.links.get(timeout=10)
    for _ in range(2):
        serving.driver.messages.get(timeout=10)
    link.send(b"answer")
    client.receive()
    assert (client.link.bytes_sent, client.link.bytes_received) == (8, 6)
    assert (link.bytes_received, link.bytes_sent) == (8, 6)
    client.close()


def test_the_server_sees_whose_certificate_it_is(serving: Serving) -> None:
    client = serving.connect()
    client.send(b"hello")
    assert serving.driver.links.get(timeout=10).peer.certificate == SITE.certificate_pem
    client.close()
    assert serving.driver.lost_for.get(timeout=10)


def test_a_refused_stream_hears_why(serving: Serving) -> None:
    serving.driver.refusal = UsageError("svi is connected already")
    client = serving.connect()
    client.send(b"hello")
    with pytest.raises(UsageError, match="svi is connected already"):
        client.receive()
    client.close()


def test_what_is_sent_before_leaving_is_read_before_the_link_is_lost(serving: Serving) -> None:
    client = serving.connect()
    client.send(b"hello")
    serving.driver.links.get(timeout=10)
    for number in range(50):
        client.send(b"%d" % number)
    client.leave()
    assert serving.driver.lost_for.get(timeout=10)
    assert [serving.driver.messages.get_nowait() for _ in range(51)][-1] == b"49"
    client.close()


def test_a_closed_stream_hears_why(serving: Serving) -> None:
    client = serving.connect()
    client.send(b"hello")
    serving.driver.links.get(timeout=10).close(TrustError("svi speaks for other"))
    with pytest.raises(TrustError, match="svi speaks for other"):
        client.receive()
    assert serving.driver.lost_for.get(timeout=10) == "svi speaks for other"
    client.close()


def test_what_was_sent_before_closing_arrives(serving: Serving) -> None:
    client = serving.connect()
    client.send(b"hello")
    link = serving.driver.links.get(timeout=10)
    link.send(b"last words")
    link.close(PartwayError("that was all"))
    assert client.receive() == b"last words"
    with pytest.raises(PartwayError, match="that was all"):
        client.receive()
    client.close()


def test_unary_calls(serving: Serving) -> None:
    address = f"localhost:{serving.port}"
    assert call(address, credentials(SITE), "shout", b"hello", 10) == b"HELLO"
    with pytest.raises(TrustError, match="you may not shout"):
        call(address, credentials(SITE), "shout", b"refuse", 10)
    with pytest.raises(LinkLost, match="no Partway server of this version"):
        call(address, credentials(SITE), "whisper", b"hello", 10)


def test_a_port_in_use(serving: Serving) -> None:
    async def second() -> None:
        listener = Listener(f"localhost:{serving.port}", credentials(SERVER), Recorder(), {}, 20)
        await listener.start()

    with pytest.raises(UsageError, match="in use"):
        asyncio.run(second())


def test_nobody_there() -> None:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
        with pytest.raises(LinkLost, match="cannot be reached"):
            call(address, credentials(SITE), "shout", b"", 10)


def test_a_certificate_of_another_federation_either_way(serving: Serving) -> None:
    address = f"localhost:{serving.port}"
    theirs = STRANGER.admit("svi", Role.SITE)
    with pytest.raises(TrustError, match="shows a certificate of another federation"):
        call(address, credentials(theirs), "shout", b"", 10)
    believed = Credentials(theirs.certificate_pem, theirs.key_pem, STEWARD.pem)
    with pytest.raises(LinkLost, match="is our certificate of its federation"):
        call(address, believed, "shout", b"", 10)
    client = Client(address, believed)
    with pytest.raises(LinkLost):
        client.receive()
    client.close()
    assert serving.driver.links.empty()


def test_a_host_that_the_certificate_does_not_name(serving: Serving) -> None:
    with pytest.raises(TrustError, match="not among the hosts"):
        call(f"127.0.0.1:{serving.port}", credentials(SITE), "shout", b"", 10)


def handshake(port: int, version: ssl.TLSVersion, folder: Path, certificate: bool = True) -> str | None:
    """The version of TLS that a plain client gets."""
    for name, data in (("a.pem", STEWARD.pem), ("c.pem", SITE.certificate_pem), ("k.pem", SITE.key_pem)):
        (folder / name).write_bytes(data)
    context = ssl.create_default_context(cafile=str(folder / "a.pem"))
    if certificate:
        context.load_cert_chain(folder / "c.pem", folder / "k.pem")
    context.minimum_version = context.maximum_version = version
    context.set_alpn_protocols(["h2"])
    with (
        socket.create_connection(("localhost", port), timeout=10) as plain,
        context.wrap_socket(plain, server_hostname="localhost") as secured,
    ):
        if not secured.recv(1):  # with 1.3 a client hears only here that its certificate was refused
            raise ConnectionError("closed after the handshake")
        return secured.version()


def test_tls_1_3_and_nothing_less(serving: Serving, tmp_path: Path) -> None:
    assert handshake(serving.port, ssl.TLSVersion.TLSv1_3, tmp_path) == "TLSv1.3"
    with pytest.raises((ssl.SSLError, ConnectionError)):
        handshake(serving.port, ssl.TLSVersion.TLSv1_2, tmp_path)


def test_no_certificate_no_connection(serving: Serving, tmp_path: Path) -> None:
    with pytest.raises((ssl.SSLError, ConnectionError)):
        handshake(serving.port, ssl.TLSVersion.TLSv1_3, tmp_path, certificate=False)


def test_grpc_imported_first_would_accept_tls_1_2_and_is_refused() -> None:
    code = "import grpc, partway.transport.grpc"
    environment = {k: v for k, v in os.environ.items() if k != "GRPC_SSL_CIPHER_SUITES"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert "import partway.transport.grpc before grpc" in done.stderr
    assert transport.os.environ["GRPC_SSL_CIPHER_SUITES"]


# -- silence

CLIENT = """
import asyncio, sys
from partway.transport.grpc import ClientLink, Credentials

async def echo(folder, port, silence):
    read = lambda name: open(f"{folder}/{name}", "rb").read()
    credentials = Credentials(read("c.pem"), read("k.pem"), read("a.pem"))
    link = ClientLink(f"localhost:{port}", credentials, float(silence))
    await link.send(b"here")
    while True:
        await link.send(await link.receive())

asyncio.run(echo(*sys.argv[1:]))
"""


def test_a_silent_site_is_noticed_and_an_idle_one_is_not(tmp_path: Path) -> None:
    silence = 2.0
    for name, data in (("a.pem", STEWARD.pem), ("c.pem", SITE.certificate_pem), ("k.pem", SITE.key_pem)):
        (tmp_path / name).write_bytes(data)
    serving = Serving(silence)
    site = subprocess.Popen([sys.executable, "-c", CLIENT, str(tmp_path), str(serving.port), str(silence)])
    try:
        link = serving.driver.links.get(timeout=20)
        assert serving.driver.messages.get(timeout=20) == b"here"
        with pytest.raises(queue.Empty):  # nothing is said for longer than the silence, and nothing is lost
            serving.driver.lost_for.get(timeout=2 * silence)
        link.send(b"still there?")
        assert serving.driver.messages.get(timeout=20) == b"still there?"
        site.send_signal(signal.SIGSTOP)
        began = time.monotonic()
        assert "gone, or was silent for 2 s" in serving.driver.lost_for.get(timeout=20)
        assert time.monotonic() - began < 5 * silence  # on a busy machine; without pings it would be never
    finally:
        site.kill()
        site.wait()
        serving.close()


def test_a_site_that_computes_for_longer_than_the_silence_is_not_lost() -> None:
    silence = 1.0
    serving = Serving(silence)
    client = Client(f"localhost:{serving.port}", credentials(SITE), silence)
    client.send(b"here")
    link = serving.driver.links.get(timeout=20)
    with pytest.raises(queue.Empty):  # meanwhile the client's event loop does not run
        serving.driver.lost_for.get(timeout=3 * silence)
    link.send(b"done?")
    assert client.receive() == b"done?"
    client.close()
    serving.close()


def test_a_killed_site_is_noticed_at_once(tmp_path: Path) -> None:
    for name, data in (("a.pem", STEWARD.pem), ("c.pem", SITE.certificate_pem), ("k.pem", SITE.key_pem)):
        (tmp_path / name).write_bytes(data)
    serving = Serving(silence=60)
    site = subprocess.Popen([sys.executable, "-c", CLIENT, str(tmp_path), str(serving.port), "60"])
    try:
        serving.driver.links.get(timeout=20)
        site.kill()
        assert "connection is gone" in serving.driver.lost_for.get(timeout=10)
    finally:
        site.wait()
        serving.close()
