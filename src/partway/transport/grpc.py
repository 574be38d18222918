"""One long-lived bidirectional stream a site, opened outwards by the site, over mutual TLS 1.3; unary calls besides.

A message is bytes; what they mean is not known here. Nothing but bytes is moved on an event loop or a gRPC thread:
torch never runs there.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from partway.errors import LinkLost, PartwayError, TrustError, UsageError

# grpcio has no setting for the least version of TLS and accepts 1.2. Of these suites, which exist in 1.2 alone, none
# fits our P-256 certificates; 1.3 has its own and is not concerned. It is read when grpc is first imported.
_SUITES = "ECDHE-RSA-AES256-GCM-SHA384:ECDHE-RSA-AES128-GCM-SHA256"
if "grpc" in sys.modules and os.environ.get("GRPC_SSL_CIPHER_SUITES") != _SUITES:
    raise ImportError("import partway.transport.grpc before grpc, or TLS 1.2 would be accepted")
os.environ["GRPC_SSL_CIPHER_SUITES"] = _SUITES
os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # what it would log becomes one line of ours

import grpc  # noqa: E402
import grpc.aio  # noqa: E402

LARGEST_MESSAGE = 2**30
"""Bytes."""
_SERVICE = "partway.v1"
_STREAM = "Link"


@dataclass(frozen=True)
class Credentials:
    """PEM: a party's certificate and key, and the authority whose certificates it accepts."""

    certificate: bytes
    key: bytes
    authority: bytes


@dataclass(frozen=True)
class Peer:
    """Who is at the other end, as TLS has proved it."""

    certificate: bytes
    """PEM."""
    address: str


class Handler(Protocol):
    """What a listener tells its driver, on the event loop: it must not compute."""

    def opened(self, link: ServerLink) -> None:
        """A stream has been opened. Raises a `PartwayError` to refuse it; its words are told."""

    def received(self, link: ServerLink, message: bytes) -> None:
        """A message has come."""

    def lost(self, link: ServerLink, reason: str) -> None:
        """The stream is gone; nothing more comes."""


Call = Callable[[Peer, bytes], Awaitable[bytes]]
"""Answers a unary call. A `PartwayError` is told to the caller."""


def _options(silence: float) -> list[tuple[str, int]]:
    """Pings that find out within `silence` seconds that the other end is gone."""
    half = int(silence * 500)
    return [
        ("grpc.max_send_message_length", LARGEST_MESSAGE),
        ("grpc.max_receive_message_length", LARGEST_MESSAGE),
        ("grpc.keepalive_time_ms", half),
        ("grpc.keepalive_timeout_ms", half),
        ("grpc.http2.ping_timeout_ms", half),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.max_pings_without_data", 0),
        ("grpc.http2.max_ping_strikes", 0),
        ("grpc.http2.min_ping_interval_without_data_ms", 1000),
        ("grpc.http2.min_recv_ping_interval_without_data_ms", 500),
    ]


# -- the server's end


class ServerLink:
    """One site's stream, at the server."""

    def __init__(self, listener: Listener, peer: Peer) -> None:
        self.peer = peer
        self.bytes_sent = self.bytes_received = 0
        self._listener = listener
        self._outbox: asyncio.Queue[bytes | PartwayError] = asyncio.Queue()

    def send(self, message: bytes) -> None:
        """Sends a message, from any thread; does not wait."""
        self.bytes_sent += len(message)
        self._listener.post(self, message)

    def close(self, why: PartwayError) -> None:
        """Ends the stream, from any thread, and tells the site why."""
        self._listener.post(self, why)

    async def write(self, context: Any) -> PartwayError:
        """Writes what `send` has left, until `close`."""
        while True:
            message = await self._outbox.get()
            if isinstance(message, PartwayError):
                return message
            await context.write(message)


class Listener:
    """A port: streams go to the handler, unary calls to `calls`.

    Args:
        address: host:port; port 0 takes a free one.
        silence: seconds without a sign of life after which a stream is given up.
    """

    def __init__(
        self, address: str, credentials: Credentials, handler: Handler, calls: Mapping[str, Call], silence: float
    ) -> None:
        self._address, self._credentials, self._handler, self._calls = address, credentials, handler, calls
        self._silence = silence
        self._waiting: list[tuple[ServerLink, bytes | PartwayError]] = []

    async def start(self) -> int:
        """Listens; returns the port. Raises `UsageError` if the address cannot be had."""
        self._loop = asyncio.get_running_loop()
        pair = [(self._credentials.key, self._credentials.certificate)]
        secured = grpc.ssl_server_credentials(pair, self._credentials.authority, require_client_auth=True)
        # Without this a second server would share the port, and half of the sites would go to it.
        self._server = grpc.aio.server(options=[*_options(self._silence), ("grpc.so_reuseport", 0)])
        methods: dict[str, Any] = {_STREAM: grpc.stream_stream_rpc_method_handler(self._serve)}
        methods |= {name: grpc.unary_unary_rpc_method_handler(_answer(call)) for name, call in self._calls.items()}
        self._server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(_SERVICE, methods),))
        try:
            port = self._server.add_secure_port(self._address, secured)
        except RuntimeError:
            raise UsageError(f"cannot listen at {self._address}: it is in use, or not this machine's") from None
        await self._server.start()
        return int(port)

    async def stop(self) -> None:
        """Closes the port and every stream."""
        await self._server.stop(grace=0.5)

    def post(self, link: ServerLink, message: bytes | PartwayError) -> None:
        """Hands over what a link is to write, from any thread: the loop is woken once for all that waits."""
        self._waiting.append((link, message))
        if len(self._waiting) == 1:
            self._loop.call_soon_threadsafe(self._drain)

    def _drain(self) -> None:
        while self._waiting:
            waiting, self._waiting = self._waiting, []
            for link, message in waiting:
                link._outbox.put_nowait(message)

    async def _serve(self, messages: Any, context: Any) -> None:
        link = ServerLink(self, _peer(context))
        try:
            self._handler.opened(link)
        except PartwayError as error:
            # Refused before it has spoken, a client can miss why: gRPC then has an "Internal error from Core" for it.
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(anext(aiter(messages), None), self._silence)
            await context.abort(*_status(error))
        writer = asyncio.create_task(link.write(context))
        reader = asyncio.create_task(self._read(link, messages))
        reason = f"its connection is gone, or was silent for {self._silence:g} s"
        try:
            done, _ = await asyncio.wait((writer, reader), return_when=asyncio.FIRST_COMPLETED)
            if writer in done and not writer.exception():
                why = writer.result()
                reason = str(why)
                await context.abort(*_status(why))
        finally:
            writer.cancel()
            reader.cancel()
            self._handler.lost(link, reason)

    async def _read(self, link: ServerLink, messages: Any) -> None:
        async for message in messages:
            link.bytes_received += len(message)
            self._handler.received(link, message)


def _answer(call: Call) -> Callable[[bytes, Any], Awaitable[bytes]]:
    async def answer(request: bytes, context: Any) -> bytes:
        try:
            return await call(_peer(context), request)
        except PartwayError as error:
            await context.abort(*_status(error))
            raise

    return answer


def _peer(context: Any) -> Peer:
    (certificate,) = context.auth_context()["x509_pem_cert"]
    return Peer(certificate, context.peer())


def _status(error: PartwayError) -> tuple[grpc.StatusCode, str]:
    if isinstance(error, TrustError):
        return grpc.StatusCode.PERMISSION_DENIED, str(error)
    if isinstance(error, UsageError):
        return grpc.StatusCode.INVALID_ARGUMENT, str(error)
    return grpc.StatusCode.FAILED_PRECONDITION, str(error)


# -- a site's, and an operator's end


class ClientLink:
    """The one connection of a site, opened outwards, on the event loop that is running.

    The loop may be kept from running by a long computation: gRPC's own threads keep the connection alive meanwhile.

    Args:
        address: host:port of the server.
        silence: seconds without a sign of life after which it is given up.
    """

    def __init__(self, address: str, credentials: Credentials, silence: float) -> None:
        self._address = address
        self.bytes_sent = self.bytes_received = 0
        self._channel = grpc.aio.secure_channel(address, _secured(credentials), _options(silence))
        stream: Any = self._channel.stream_stream(f"/{_SERVICE}/{_STREAM}", None, None)
        self._stream = stream()

    async def send(self, message: bytes) -> None:
        """Sends a message. If the link is gone, `receive` says so."""
        self.bytes_sent += len(message)
        with contextlib.suppress(grpc.RpcError, asyncio.InvalidStateError):
            await self._stream.write(message)

    async def receive(self) -> bytes:
        """Waits for the next message.

        Raises:
            TrustError, UsageError, PartwayError: the server has refused this site, and says why.
            LinkLost: the server cannot be reached, is gone, or was silent for too long; or `close` was called.
        """
        try:
            message = await self._stream.read()
        except grpc.RpcError as error:
            raise _error(self._address, error) from None
        except asyncio.CancelledError:
            raise LinkLost(self._address, "was left") from None
        if message is grpc.aio.EOF:
            raise LinkLost(self._address, "closed the connection")
        self.bytes_received += len(message)
        return bytes(message)

    async def leave(self, seconds: float = 2.0) -> None:
        """Says that nothing more is sent; `receive` ends when the server has read all, or after so many seconds."""
        with contextlib.suppress(grpc.RpcError, asyncio.InvalidStateError):
            await self._stream.done_writing()
        await asyncio.sleep(seconds)
        self._stream.cancel()

    async def close(self) -> None:
        """Lets go; what was just sent may be lost."""
        self._stream.cancel()
        await self._channel.close()


def call(address: str, credentials: Credentials, method: str, request: bytes, timeout: float) -> bytes:
    """One unary call.

    Args:
        timeout: seconds.

    Raises:
        TrustError, UsageError, PartwayError: as the server says.
        LinkLost: the server cannot be reached.
    """
    # A pool of its own each time: a shared one would outlive a failed handshake.
    options = [*_options(timeout), ("grpc.use_local_subchannel_pool", 1)]
    with grpc.secure_channel(address, _secured(credentials), options) as channel:
        unary: Any = channel.unary_unary(f"/{_SERVICE}/{method}", None, None)
        try:
            answer: bytes = unary(request, timeout=timeout)
        except grpc.RpcError as error:
            raise _error(address, error) from None
    return answer


def _secured(credentials: Credentials) -> grpc.ChannelCredentials:
    return grpc.ssl_channel_credentials(credentials.authority, credentials.key, credentials.certificate)


def _error(address: str, error: Any) -> PartwayError:
    """What a failed call means, in our words."""
    code, details = error.code(), error.details() or ""
    if code is grpc.StatusCode.PERMISSION_DENIED:
        return TrustError(details)
    if code is grpc.StatusCode.INVALID_ARGUMENT:
        return UsageError(details)
    if code is grpc.StatusCode.FAILED_PRECONDITION:
        return PartwayError(details)
    if code is grpc.StatusCode.UNIMPLEMENTED:
        return LinkLost(address, "answers, and is no Partway server of this version")
    details = details.rpartition("last error: ")[2]
    if "Hostname Verification" in details:
        return TrustError(f"{address} is not among the hosts in the certificate that the server shows there")
    if "handshak" in details.lower():
        return TrustError(f"{address} shows a certificate of another federation ({details})")
    if "Socket closed" in details:
        return LinkLost(address, "closed the connection; is our certificate of its federation?")
    return LinkLost(address, f"cannot be reached, or is gone ({details or code.name})")
