"""What the tests of faults and connections stand on: answers that fail, real proxies, TLS, and Python processes.

A `Proxy` connects every name to 127.0.0.1, so that ``http://service.test:port`` can be reached through it alone.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import socket
import ssl
import struct
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Iterable
from http import HTTPStatus
from pathlib import Path
from urllib.parse import urlsplit

from loopback import PATIENCE, Answer, Connection, Loopback, Request, Server, speak

TESTS = Path(__file__).parent
PEM = TESTS / "loopback.pem"


def tls() -> ssl.SSLContext:
    """TLS for a server on 127.0.0.1, which a client trusts that is given `PEM` as SSL_CERT_FILE."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(PEM)
    return context


class TlsLoopback(Loopback):
    """A `Loopback` at https://127.0.0.1."""

    def __init__(self) -> None:
        super().__init__(tls=tls())


def until(condition: Callable[[], object]) -> bool:
    """Whether ``condition`` comes true, now or soon."""
    deadline = time.monotonic() + PATIENCE
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.005)
    return True


def run_python(script: str, *arguments: str, flags: str = "") -> str:
    """What a Python process of its own prints; it must succeed, and say nothing on standard error."""
    command = [sys.executable, *flags.split(), "-c", script, *arguments]
    done = subprocess.run(command, cwd=TESTS, capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    return done.stdout


def free_port() -> int:
    """A port on 127.0.0.1 where nothing listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
        assert isinstance(port, int)
        return port


# Answers


def together(count: int) -> Answer:
    """The usual answer, once ``count`` prompts are at the server."""
    waiting: list[asyncio.Event] = []

    async def answer(request: Request, connection: Connection) -> None:
        waiting.append(asyncio.Event())
        if len(waiting) == count:
            while waiting:
                waiting.pop().set()
        else:
            await waiting[-1].wait()
        await speak()(request, connection)

    return answer


def refuse(status: int, **headers: str) -> Answer:
    """An error status, whose body says "overloaded"."""

    async def answer(request: Request, connection: Connection) -> None:
        names = {name.replace("_", "-"): value for name, value in headers.items()}
        await connection.whole(b'{"error": {"message": "overloaded"}}', f"{status} {HTTPStatus(status).phrase}", names)

    return answer


def cut(*pieces: bytes, head: str | None = "200 OK", reset: bool = False) -> Answer:
    """An answer of these pieces, after which the connection drops."""
    return begin(head, pieces, lambda connection: connection.drop(reset))


def silent(*pieces: bytes, head: str | None = "200 OK") -> Answer:
    """An answer of these pieces, after which nothing comes."""
    return begin(head, pieces, Connection.stall)


def begin(head: str | None, pieces: Iterable[bytes], end: Callable[[Connection], Awaitable[None]]) -> Answer:
    async def answer(request: Request, connection: Connection) -> None:
        if head:
            await connection.head(head)
        for piece in pieces:
            await connection.send(piece)
        await end(connection)

    return answer


# Proxies


class Proxy(Server):
    """A proxy in a thread of its own: HTTP (forwarding and CONNECT) or SOCKS5, with or without a password."""

    def __init__(self, scheme: str = "http", refusal: str | None = None, tls: ssl.SSLContext | None = None) -> None:
        super().__init__(tls)
        self.scheme = scheme
        self.refusal = refusal  # what an HTTP proxy answers instead of connecting, such as "403 Forbidden"
        self.targets: list[str] = []  # host:port of each connection it was asked for
        self.credentials: set[str] = set()  # each user:password it was given

    @property
    def url(self) -> str:
        return f"{self.scheme}://127.0.0.1:{self.port}"

    def url_for(self, credentials: str) -> str:
        return f"{self.scheme}://{credentials}@127.0.0.1:{self.port}"

    async def converse(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await (self._socks(reader, writer) if self.scheme.startswith("socks5") else self._http(reader, writer))

    async def _http(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        method, url, _ = head.decode("latin-1").split(" ", 2)
        for line in head.decode("latin-1").split("\r\n"):
            name, _, value = line.partition(":")
            if name.lower() == "proxy-authorization":
                self.credentials.add(base64.b64decode(value.split()[1]).decode())
        if self.refusal:
            writer.write(f"HTTP/1.1 {self.refusal}\r\ncontent-length: 0\r\n\r\n".encode("latin-1"))
            await writer.drain()
        elif method == "CONNECT":
            parts = urlsplit(f"//{url}")
            writer.write(b"HTTP/1.1 200 Connection established\r\n\r\n")
            await self._relay(reader, writer, parts.hostname or "", parts.port or 443)
        else:
            parts = urlsplit(url)
            await self._relay(reader, writer, parts.hostname or "", parts.port or 80, head)

    async def _socks(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        _, count = await reader.readexactly(2)
        method = max(await reader.readexactly(count))  # 0 is no authentication, 2 is a password (RFC 1928, 1929)
        writer.write(bytes((5, method)))
        if method == 2:
            words = []
            await reader.readexactly(1)
            for _ in range(2):
                (size,) = await reader.readexactly(1)
                words.append((await reader.readexactly(size)).decode())
            self.credentials.add(":".join(words))
            writer.write(b"\1\0")
        *_, kind = await reader.readexactly(4)
        if kind == 3:
            (size,) = await reader.readexactly(1)
            host = (await reader.readexactly(size)).decode()
        else:
            host = socket.inet_ntoa(await reader.readexactly(4))
        (port,) = struct.unpack("!H", await reader.readexactly(2))
        writer.write(b"\5\0\0\1" + bytes(6))
        await self._relay(reader, writer, host, port)

    async def _relay(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, host: str, port: int, first: bytes = b""
    ) -> None:
        self.targets.append(f"{host}:{port}")
        server_reader, server_writer = await asyncio.open_connection("127.0.0.1", port)
        server_writer.write(first)
        directions = ((reader, server_writer), (server_reader, writer))
        copies = [asyncio.create_task(self._copy(source, target)) for source, target in directions]
        try:
            await asyncio.wait(copies, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for copy in copies:
                copy.cancel()
            server_writer.close()

    async def _copy(self, source: asyncio.StreamReader, target: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while data := await source.read(65536):
                target.write(data)
                await target.drain()


class OddProxy(Server):
    """What a client takes for a proxy: it says ``words`` to whatever comes, and then nothing, or closes."""

    def __init__(self, *words: bytes, closes: bool = False) -> None:
        super().__init__()
        self.words = words
        self.closes = closes

    async def converse(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        for word in self.words:
            await reader.read(65536)
            writer.write(word)
        if not self.closes:  # a client that waits for ever gets an error in the end, and not what it should
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._stopping.wait(), 10)
