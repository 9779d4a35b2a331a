"""Bounds: what a reply may cost in memory and time, whatever the server sends."""

from __future__ import annotations

import asyncio
import gzip
import itertools
import tracemalloc
import zlib
from collections.abc import AsyncIterator, Callable

import httpx
import llm
import pytest
from conftest import Ask
from loopback import DONE, Answer, Connection, Loopback, Request, delta, event, say
from proxies import run_python, until
from pytest_httpx import HTTPXMock

MIB = 1024**2
WHOLE = event(delta("whole", finish_reason="stop")) + DONE


def endless(*start: bytes, piece: bytes) -> Answer:
    """An answer that begins with ``start`` and goes on with ``piece`` until the client leaves."""

    async def answer(request: Request, connection: Connection) -> None:
        await connection.head()
        for data in itertools.chain(start, itertools.repeat(piece)):
            await connection.send(data)

    return answer


def peak_memory(run: Callable[[], object]) -> int:
    """The most memory, in bytes, that Python held for ``run``, the server's part included."""
    tracemalloc.start()
    try:
        run()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


# Events and lines


@pytest.mark.parametrize(
    ("start", "piece"),
    [
        pytest.param(b'data: {"choices": [{"delta": {"content": "', b"x" * 65536, id="one line"),
        pytest.param(b"data: {\n", b"data: " + b" " * 65536 + b"\n", id="many data lines"),
        pytest.param(b"{\n", b" " * 65536 + b"\n", id="JSON in many lines"),
        pytest.param(b"x", b"x" * 65536, id="a line of no known kind"),
        pytest.param(b": ", b"x" * 65536, id="a comment"),
        pytest.param(b"<html>", b"<p>" + b"sorry " * 10_000 + b"</p>\n", id="a web page"),
    ],
)
def test_event_that_never_ends(start: bytes, piece: bytes, ask: Ask, server: Loopback) -> None:
    """An event larger than 16 MiB and a line that never ends are an error that says so, at bounded memory."""
    server.answers += [say([WHOLE]), endless(start, piece=piece)]
    assert ask().text == "whole"  # imports, and makes what is kept

    def run() -> None:
        assert "an event larger than 16 MiB" in ask().line

    assert peak_memory(run) < 100 * MIB
    assert until(lambda: not server.open)


def test_largest_event(ask: Ask, server: Loopback) -> None:
    """An event of almost 16 MiB is read; a larger one is an error after the text that came before it."""
    text = "x" * (16 * MIB - 1000)
    server.answers += [
        say([event(delta(text, finish_reason="stop")), DONE]),
        say([event(delta("before")), event(delta("x" * 17 * MIB))]),
    ]
    assert ask().text == text
    answer = ask()
    assert answer.chunks == ["before"]
    assert "an event larger than 16 MiB" in answer.line


# A long answer


@pytest.mark.parametrize("kind", ["sync", "async"])
def test_long_answer_is_not_kept(kind: str, server: Loopback) -> None:
    """A stream of 40 MB of text, read as the plugin yields it, costs the plugin next to nothing."""
    piece, count = event(delta("x" * 50_000)), 800
    server.answer = say(itertools.chain(itertools.repeat(piece, count), [DONE]))
    model = llm.get_model("autonomous-llama") if kind == "sync" else llm.get_async_model("autonomous-llama")

    async def read_async(texts: AsyncIterator[str]) -> int:
        return sum([len(text) async for text in texts])

    def read() -> None:
        response = model.prompt("hi")
        texts = model.execute(response.prompt, True, response, None)
        assert (sum(map(len, texts)) if kind == "sync" else asyncio.run(read_async(texts))) == 50_000 * count

    assert peak_memory(read) < 10 * MIB


@pytest.mark.parametrize("stream", [True, False])
def test_answer_is_held_once(stream: bool, ask: Ask, server: Loopback) -> None:
    """When an answer of 6 MiB is over, only the text that `llm` keeps is left in memory."""
    text = "x" * 6 * MIB
    server.answer = say([event(delta(text, finish_reason="stop")), DONE])
    ask(stream=stream)
    tracemalloc.start()
    try:
        answer = ask(stream=stream)
        assert answer.text == text
        held = tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()
    assert held < 8 * MIB


# Compressed replies

BOMBS = """
import resource, sys
import conftest, asyncio
asks = conftest.ask_sync, lambda: asyncio.run(conftest.ask_async())
for ask in asks:
    ask()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
resource.setrlimit(resource.RLIMIT_AS, (2 * 1024**3,) * 2)
for ask in asks:
    for _ in range(int(sys.argv[1])):
        print(ask().line)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""


def deflated(mebibytes: int) -> bytes:
    """The start of a gzip file of that many MiB of spaces, made without compressing them all."""
    packer = zlib.compressobj(9, wbits=31)
    head = packer.compress(b'data: {"') + packer.flush(zlib.Z_FULL_FLUSH)
    packer = zlib.compressobj(9, wbits=-15)
    return head + (packer.compress(b" " * MIB) + packer.flush(zlib.Z_FULL_FLUSH)) * mebibytes


def packed(data: bytes, encoding: str, status: str = "200 OK") -> Answer:
    async def answer(request: Request, connection: Connection) -> None:
        await connection.whole(data, status, {"content-encoding": encoding})

    return answer


def test_compressed_bombs(server: Loopback) -> None:
    """Replies that unpack to gigabytes, by one encoding or by two, are errors of bounded size: an answer, and the body
    of an error; sync, and then async, in one process."""
    data = deflated(3072)
    nested = gzip.compress(data)
    bombs = [
        packed(data, "gzip"),
        packed(nested, "gzip, gzip"),
        packed(data, "gzip", "400 Bad Request"),
        packed(nested, "gzip, gzip", "400 Bad Request"),
    ]
    words = ["larger than 16 MiB", "encoding is gzip, gzip", "HTTP 400 Bad Request", "HTTP 400 Bad Request"]
    server.answers += [packed(gzip.compress(WHOLE), "gzip")] * 2 + bombs * 2
    *lines, mebibytes = run_python(BOMBS, str(len(bombs))).splitlines()
    assert int(mebibytes) < 400  # the most of all
    assert [word in line for word, line in zip(words * 2, lines, strict=True)] == [True] * 8


# Time


def test_timeout_does_not_bound_the_whole_reply(ask: Ask, server: Loopback) -> None:
    """A slow answer may take longer than the timeout, as long as something keeps coming."""
    words = [event(delta(str(number))) for number in range(9)]
    server.answer = say([*words, WHOLE], pause=0.25)  # which takes 2.25 s before the last piece
    assert ask(timeout=2).text == "012345678whole"


@pytest.mark.parametrize(("timeout", "silence", "connect"), [(None, 120, 10), (3, 3, 3), (3600, 3600, 10)])
def test_connecting_has_a_bound_of_its_own(
    timeout: float | None, silence: float, connect: float, ask: Ask, httpx_mock: HTTPXMock
) -> None:
    """Connecting may take 10 s, or the timeout where that is less; waiting for a place in the pool is unbounded."""
    httpx_mock.add_response(content=WHOLE)
    assert ask(**({"timeout": timeout} if timeout else {})).text == "whole"
    request = httpx_mock.get_request()
    assert isinstance(request, httpx.Request)
    assert request.extensions["timeout"] == {"connect": connect, "read": silence, "write": silence, "pool": None}
