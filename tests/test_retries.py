"""Retries: what is tried again and what is not, how often, after which waits, and what ends it."""

from __future__ import annotations

import email.utils
import logging
import sys
import time

import pytest
from conftest import Ask, Start, finish, interrupt, output_until
from loopback import Answer, Connection, Loopback, Request, delta, event, say, speak
from proxies import Proxy, cut, refuse, silent, until

GOOD = "llama heard: hi"
RETRIED = (408, 429, 500, 502, 503, 504)


async def other_protocol(request: Request, connection: Connection) -> None:
    await connection.raw(b"SSH-2.0-OpenSSH_9.6\r\n\r\n")
    await connection.drop()


# Which failures are tried again


@pytest.mark.parametrize(
    "failure",
    [
        pytest.param(cut(head=None), id="dropped before the reply"),
        pytest.param(cut(head=None, reset=True), id="reset before the reply"),
        pytest.param(cut(), id="dropped after the head"),
        pytest.param(cut(event(delta())), id="dropped before the first text"),
        *(pytest.param(refuse(status), id=str(status)) for status in RETRIED),
    ],
)
def test_tried_again(failure: Answer, ask: Ask, server: Loopback, sleeps: list[float]) -> None:
    """A prompt whose connection dropped, or whose status says to come again, gets its whole answer later."""
    server.answers += [failure]
    assert ask().text == GOOD
    assert len(server.requests) == 2
    assert server.requests[0].body == server.requests[1].body
    assert len(sleeps) == 1


@pytest.mark.parametrize(
    "failure",
    [
        *(pytest.param(refuse(status), id=str(status)) for status in (400, 401, 403, 404, 409, 413, 422, 501, 505)),
        pytest.param(refuse(307, location="/elsewhere"), id="redirect"),
        pytest.param(silent(head=None), id="silent before the reply"),
        pytest.param(silent(), id="silent after the head"),
        pytest.param(silent(event(delta())), id="silent before the first text"),
        pytest.param(other_protocol, id="not HTTP"),
        pytest.param(say([b"data: {nonsense\n\n"]), id="malformed event"),
        pytest.param(say([b"<html><title>Sorry</title></html>"]), id="web page"),
        pytest.param(say([event({"error": {"message": "overloaded"}})]), id="error in the stream"),
        pytest.param(say([]), id="empty"),
    ],
)
def test_not_tried_again(failure: Answer, ask: Ask, server: Loopback, sleeps: list[float]) -> None:
    """Silence, a malformed reply, and what another attempt cannot mend end the prompt at once."""
    server.answers += [failure]
    assert "attempts" not in ask(timeout=1).line
    assert len(server.requests) == 1
    assert sleeps == []


@pytest.mark.parametrize(
    ("refusal", "words", "attempts"),
    [
        ("503 Service Unavailable", "503 Service Unavailable (3 attempts)", 3),
        ("403 Forbidden", "403 Forbidden", 1),
        ("403 \x9b31mevil\xad", "403 31mevil", 1),
    ],
)
def test_a_proxy_that_refuses_is_judged_by_its_status(
    refusal: str, words: str, attempts: int, ask: Ask, monkeypatch: pytest.MonkeyPatch, sleeps: list[float]
) -> None:
    """A proxy that cannot connect right now is asked again, one that forbids it is not. Its words are not shown raw."""
    monkeypatch.setenv("AUTONOMOUS_BASE_URL", "https://service.test")
    with Proxy(refusal=refusal) as proxy:
        line = ask(proxy=proxy.url).line  # which asserts that it is printable
        assert line == f"service.test: cannot connect through the proxy 127.0.0.1:{proxy.port}: {words}"
    assert len(sleeps) == attempts - 1


# How often


@pytest.mark.parametrize("failure", [cut(), refuse(503)], ids=["dropped", "503"])
def test_three_attempts_in_all(failure: Answer, ask: Ask, server: Loopback, sleeps: list[float]) -> None:
    """A prompt is tried three times in all, and the error says so; the next prompt has three of its own."""
    server.answers += [failure] * 4
    assert ask().line.endswith("(3 attempts)")
    assert len(server.requests) == 3
    assert ask().text == GOOD
    assert len(sleeps) == 3


def test_attempts_may_fail_differently(ask: Ask, server: Loopback, sleeps: list[float]) -> None:
    """Two different failures leave the third attempt, and the last error says how many attempts were made."""
    server.answers += [cut(), refuse(502), speak(), refuse(503), refuse(400)]
    assert ask().text == GOOD
    assert ask().line.endswith("HTTP 400 Bad Request: overloaded (2 attempts)")
    assert len(server.requests) == 5


# Waits


def test_waits_are_about_half_a_second_and_a_second(ask: Ask, server: Loopback, sleeps: list[float]) -> None:
    """The second attempt comes after about 0.5 s, the third after about 1 s more; clients that failed together do not
    come back together."""
    server.answer = refuse(503)
    for _ in range(20):
        assert ask().error
    for waits, about in ((sleeps[::2], 0.5), (sleeps[1::2], 1.0)):
        assert waits == [pytest.approx(about, rel=0.5)] * 20
        assert len(set(waits)) > 10
        assert min(waits) < about < max(waits)


NOW = 1_738_368_000  # the time, while a test looks at dates


def date(seconds: int) -> str:
    """The HTTP date that many seconds from now."""
    return email.utils.formatdate(NOW + seconds, usegmt=True)


@pytest.mark.parametrize(
    ("asked", "wait"),
    [
        *(("0", 0), ("7", 7), ("10", 10), (date(6), 6), (date(-60), 0), ("soon", 0.5)),
        *(("11", "wait 11 s"), ("100000000000", "wait 100000000000 s"), (date(300), "wait 300 s")),
    ],
)
@pytest.mark.parametrize("status", [429, 503])
def test_retry_after_is_followed_up_to_10_s(
    status: int,
    asked: str,
    wait: float | str,
    ask: Ask,
    server: Loopback,
    sleeps: list[float],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The wait is the one that the server asks for, in seconds or by a date; what cannot be read leaves the usual one.
    A server that asks for more than 10 s gets no further attempt, and the error says the wait."""
    monkeypatch.setattr(time, "time", lambda: float(NOW))
    server.answers += [refuse(status, retry_after=asked)]
    answer = ask()
    if isinstance(wait, str):
        assert wait in answer.line
        assert (len(server.requests), sleeps) == (1, [])
    else:
        assert answer.text == GOOD
        assert sum(sleeps) == pytest.approx(wait, rel=0.5 if asked == "soon" else 0)


def test_each_wait_is_logged_as_information(
    ask: Ask, server: Loopback, sleeps: list[float], caplog: pytest.LogCaptureFixture
) -> None:
    """Each wait is said at level INFO: why, and how long, and nothing that a server sends is printed raw."""
    raw = "\x1b]0;owned\x07\x1b[31mred\r\n\tnext\x00\x9b2J\u202eevil\u2028line"
    server.answers += [say([raw.encode()], status="503 Bad"), cut()]
    with caplog.at_level(logging.INFO, "llm_autonomous"):
        assert ask().text == GOOD
    records = [record for record in caplog.records if record.name == "llm_autonomous"]
    assert [record.levelno for record in records] == [logging.INFO] * 2
    for record, wait, reason in zip(records, sleeps, ("owned", "lost"), strict=True):
        assert f"{wait:.1f} s" in record.getMessage()
        assert reason in record.getMessage()
        assert record.getMessage().isprintable()


# Ctrl-C

INTERRUPTED = """
import asyncio, logging, sys
import llm

logging.basicConfig(format="%(message)s", stream=sys.stdout)
logging.getLogger("llm_autonomous").setLevel(logging.INFO)

def ask_sync():
    for chunk in llm.get_model("autonomous-llama").prompt("hi"):
        print(chunk, end="", flush=True)

async def ask_async():
    async for chunk in llm.get_async_model("autonomous-llama").prompt("hi"):
        print(chunk, end="", flush=True)

ask = ask_sync if sys.argv[1] == "sync" else lambda: asyncio.run(ask_async())
for _ in range(3):
    try:
        ask()
    except KeyboardInterrupt:
        print("interrupted")
    ask()
"""


@pytest.mark.parametrize("kind", ["sync", "async"])
def test_interrupt_ends_at_once(kind: str, server: Loopback, start: Start) -> None:
    """Ctrl-C ends a prompt at once and closes its connection, and the next prompt in that process works: before the
    reply, in a stream, and in a wait for another attempt, whose connection is none that has to be closed."""
    situations = [
        (silent(head=None), "", True),
        (silent(event(delta("Once"))), "Once", True),
        (refuse(503, retry_after="10"), "trying again in 10.0 s\n", False),
    ]
    for answer, _, _ in situations:
        server.answers += [answer, speak()]
    running = start(sys.executable, "-c", INTERRUPTED, kind, url=server.url)
    for number, (_, sign, closes) in enumerate(situations):
        assert until(lambda asked=2 * number + 1: len(server.requests) == asked)
        connection = server.last.connection
        output_until(running, sign)
        interrupt(running)
        output_until(running, "interrupted\n")
        if closes:
            assert until(lambda connection=connection: connection not in server.open)
        output_until(running, GOOD)
    assert finish(running) == ("", "", 0)


def test_interrupt_of_the_command_line_leaves_no_traceback(server: Loopback, start: Start) -> None:
    """Ctrl-C in the middle of `llm` shows the text so far, and ends."""
    server.answers += [silent(event(delta("Once upon")))]
    running = start("llm", "-m", "autonomous-llama", "hi", url=server.url)
    output_until(running, "Once upon")
    interrupt(running)
    _, errors, code = finish(running)
    assert (errors.strip(), code) == ("Aborted!", 1)
    assert until(lambda: not server.open)
