"""Bounds: what a reply may cost in memory and time, whatever the server sends."""

from __future__ import annotations

import asyncio
import gzip
import itertools
import tracemalloc
import zlib
from collections.abc import AsyncIterator, Callable

import llm
import pytest
from conftest import Ask
from loopback import DONE, Answer, Connection, Loopback, Request, delta, event, say
from proxies import until

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


def deflated(mebibytes: int) -> bytes:
    """The start of a gzip file of that many MiB of spaces, made without compressing them all."""
    packer = zlib.compressobj(9, wbits=31)
    head = packer.compress(b'data: {"') + packer.flush(zlib.Z_FULL_FLUSH)
    packer = zlib.compressobj(9, wbits=-15)
    return head + (packer.compress(b" " * MIB) + packer.flush(zlib.Z_FULL_FLUSH)) * mebibytes


@pytest.mark.parametrize(
    ("coding", "status", "words"),
    [
        ("gzip", "200 OK", "larger than 16 MiB"),
        ("gzip, gzip", "200 OK", "encoding is gzip, gzip"),
        ("gzip", "400 Bad Request", "HTTP 400 Bad Request"),
        ("gzip, gzip", "400 Bad Request", "HTTP 400 Bad Request"),
    ],
)
def test_compressed_bomb(coding: str, status: str, words: str, ask: Ask, server: Loopback) -> None:
    """A reply that unpacks to gigabytes, by one encoding or by two, is an error at bounded memory."""
    data = deflated(3072) if coding == "gzip" else gzip.compress(deflated(3072))
    server.answer = say([data], status=status, headers={"content-encoding": coding})

    def run() -> None:
        assert words in ask().line

    assert peak_memory(run) < 400 * MIB


# Time


def test_timeout_does_not_bound_the_whole_reply(ask: Ask, server: Loopback) -> None:
    """A slow answer may take longer than the timeout, as long as something keeps coming."""
    words = [event(delta(str(number))) for number in range(9)]
    server.answer = say([*words, WHOLE], pause=0.25)  # which takes 2.25 s before the last piece
    assert ask(timeout=2).text == "012345678whole"
