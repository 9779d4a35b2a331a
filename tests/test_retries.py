"""Retries: what is tried again and what is not, how often, after which waits, and what ends it."""

from __future__ import annotations

import logging
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http import HTTPStatus

import pytest
from conftest import DEADLINE, Ask
from loopback import Answer, Connection, Loopback, Request, delta, environment, event, say
from proxies import TESTS, Proxy, TlsLoopback, free_port, until

from llm_autonomous import AutonomousError, retry_wait

GOOD = "llama heard: hi"
RETRIED = (408, 429, 500, 502, 503, 504)


def refuse(status: int, **headers: str) -> Answer:
    async def answer(request: Request, connection: Connection) -> None:
        names = {name.replace("_", "-"): value for name, value in headers.items()}
        await connection.whole(b'{"error": {"message": "overloaded"}}', f"{status} {HTTPStatus(status).phrase}", names)

    return answer


def cut(*pieces: bytes, head: bool = True, reset: bool = False) -> Answer:
    """An answer of these events, after which the connection drops."""

    async def answer(request: Request, connection: Connection) -> None:
        if head:
            await connection.head()
        for piece in pieces:
            await connection.send(piece)
        await connection.drop(reset)

    return answer


def silent(*pieces: bytes, head: bool = True) -> Answer:
    async def answer(request: Request, connection: Connection) -> None:
        if head:
            await connection.head()
        for piece in pieces:
            await connection.send(piece)
        await connection.stall()

    return answer


async def other_protocol(request: Request, connection: Connection) -> None:
    await connection.raw(b"SSH-2.0-OpenSSH_9.6\r\n\r\n")
    await connection.drop()


# Which failures are tried again


@pytest.mark.parametrize(
    "failure",
    [
        pytest.param(cut(head=False), id="dropped before the reply"),
        pytest.param(cut(head=False, reset=True), id="reset before the reply"),
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


def test_tried_again_when_a_connection_cannot_be_made(
    ask: Ask, monkeypatch: pytest.MonkeyPatch, sleeps: list[float]
) -> None:
    """A refused connection is tried three times in all."""
    address = f"127.0.0.1:{free_port()}"
    monkeypatch.setenv("AUTONOMOUS_BASE_URL", f"http://{address}")
    assert ask().line == f"{address}: cannot connect: Connection refused (3 attempts)"
    assert len(sleeps) == 2


def test_tried_again_when_a_connection_is_not_made_in_time(
    ask: Ask, monkeypatch: pytest.MonkeyPatch, sleeps: list[float]
) -> None:
    """A connection that times out could not be made: it is tried three times in all."""
    with socket.socket() as deaf, socket.socket() as first, socket.socket() as second:
        deaf.bind(("127.0.0.1", 0))
        deaf.listen(0)  # with its queue full, it does not answer
        for waiting in (first, second):
            waiting.setblocking(False)
            waiting.connect_ex(deaf.getsockname())
        address = f"127.0.0.1:{deaf.getsockname()[1]}"
        monkeypatch.setenv("AUTONOMOUS_BASE_URL", f"http://{address}")
        line = ask(timeout=0.05).line
    assert line == f"{address}: cannot connect: no reply within 0.05 s (3 attempts)"
    assert len(sleeps) == 2


@pytest.mark.parametrize(
    "failure",
    [
        *(pytest.param(refuse(status), id=str(status)) for status in (400, 401, 403, 404, 409, 413, 422, 501, 505)),
        pytest.param(refuse(307, location="/elsewhere"), id="redirect"),
        pytest.param(silent(head=False), id="silent before the reply"),
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
    answer = ask(timeout=0.2)
    assert answer.error
    assert "attempts" not in answer.line
    assert len(server.requests) == 1
    assert sleeps == []


def test_not_tried_again_when_a_certificate_does_not_verify(
    ask: Ask, monkeypatch: pytest.MonkeyPatch, sleeps: list[float]
) -> None:
    """A certificate does not become better by waiting."""
    with TlsLoopback() as server:
        monkeypatch.setenv("AUTONOMOUS_BASE_URL", server.url)
        line = ask().line
    assert "certificate cannot be verified" in line
    assert "attempts" not in line
    assert sleeps == []


@pytest.mark.parametrize(("status", "attempts"), [(503, 3), (403, 1)])
def test_a_proxy_that_refuses_is_judged_by_its_status(
    status: int, attempts: int, ask: Ask, monkeypatch: pytest.MonkeyPatch, sleeps: list[float]
) -> None:
    """A proxy that cannot connect right now is asked again, one that forbids it is not."""
    monkeypatch.setenv("AUTONOMOUS_BASE_URL", "https://service.test")
    with Proxy(refusal=f"{status} {HTTPStatus(status).phrase}") as proxy:
        line = ask(proxy=proxy.url).line
        assert f"cannot connect through the proxy 127.0.0.1:{proxy.port}: {status} {HTTPStatus(status).phrase}" in line
    assert len(sleeps) == attempts - 1


# How often


@pytest.mark.parametrize("failure", [cut(), refuse(503)], ids=["dropped", "503"])
def test_three_attempts_in_all(failure: Answer, ask: Ask, server: Loopback, sleeps: list[float]) -> None:
    """A prompt is tried three times in all, and the error says so."""
    server.answer = failure
    assert ask().line.endswith("(3 attempts)")
    assert len(server.requests) == 3
    assert len(sleeps) == 2


def test_third_attempt_can_succeed(ask: Ask, server: Loopback, sleeps: list[float]) -> None:
    """Two different failures leave the third attempt."""
    server.answers += [cut(), refuse(502)]
    assert ask().text == GOOD
    assert len(server.requests) == 3


def test_error_counts_the_attempts_made(ask: Ask, server: Loopback, sleeps: list[float]) -> None:
    """The last error says how many attempts were made, also where it ended them."""
    server.answers += [refuse(503), refuse(400)]
    line = ask().line
    assert "HTTP 400 Bad Request: overloaded" in line
    assert line.endswith("(2 attempts)")


def test_attempts_are_counted_for_each_prompt(ask: Ask, server: Loopback, sleeps: list[float]) -> None:
    """What one prompt used up is not missing to the next."""
    server.answers += [refuse(503)] * 4
    assert ask().line.endswith("(3 attempts)")
    assert ask().text == GOOD


@pytest.mark.parametrize("before", [0, 1], ids=["at first", "after another attempt"])
def test_never_after_text_was_yielded(before: int, ask: Ask, server: Loopback, sleeps: list[float]) -> None:
    """Text that a reader has seen cannot be taken back: what comes after it is the end."""
    server.answers += [refuse(503)] * before + [cut(event(delta("Once ")))]
    answer = ask()
    assert answer.chunks == ["Once "]
    assert "the answer is incomplete" in answer.line
    assert len(server.requests) == 1 + before
    assert len(sleeps) == before


def test_proxies_of_the_environment_serve_each_attempt(
    ask: Ask, server: Loopback, monkeypatch: pytest.MonkeyPatch, sleeps: list[float]
) -> None:
    """An attempt after the first goes through the environment's proxy as well."""
    server.answers += [cut(head=False)]
    with Proxy() as proxy:
        monkeypatch.setenv("HTTP_PROXY", proxy.url)
        monkeypatch.setenv("AUTONOMOUS_BASE_URL", f"http://service.test:{server.port}")
        assert ask().text == GOOD
        assert proxy.targets == [f"service.test:{server.port}"] * 2


# Waits


def test_waits_are_about_half_a_second_and_a_second(ask: Ask, server: Loopback, sleeps: list[float]) -> None:
    """The second attempt comes after about 0.5 s, the third after about 1 s more."""
    server.answer = refuse(503)
    assert ask().error
    assert sleeps == [pytest.approx(0.5, rel=0.5), pytest.approx(1.0, rel=0.5)]


@pytest.mark.parametrize(("attempt", "about"), [(1, 0.5), (2, 1.0)])
def test_waits_have_jitter(attempt: int, about: float) -> None:
    """Clients that failed together do not come back together."""
    error = AutonomousError("overloaded", retryable=True)
    waits = [retry_wait(error, attempt, 3) for _ in range(200)]
    assert all(wait == pytest.approx(about, rel=0.5) for wait in waits)
    assert len(set(waits)) > 100
    assert min(waits) < about < max(waits)


def test_policy_ends_with_the_last_attempt_and_with_what_cannot_succeed() -> None:
    """There is no wait where there is no further attempt."""
    assert retry_wait(AutonomousError("overloaded", retryable=True, retry_after=1.0), 3, 3) is None
    assert retry_wait(AutonomousError("overloaded", retry_after=1.0), 1, 3) is None


@pytest.mark.parametrize("status", RETRIED)
@pytest.mark.parametrize("seconds", [0, 7, 10])
def test_retry_after_is_followed(status: int, seconds: int, ask: Ask, server: Loopback, sleeps: list[float]) -> None:
    """Up to 10 s, the wait is the one that the server asks for."""
    server.answers += [refuse(status, retry_after=str(seconds))]
    assert ask().text == GOOD
    assert sleeps == ([seconds] if seconds else [])


@pytest.mark.parametrize("asked", ["soon", "Sat, 01 Feb 2025 00:00:00 GMT"])
def test_retry_after_that_is_no_number_is_ignored(asked: str, ask: Ask, server: Loopback, sleeps: list[float]) -> None:
    """What cannot be read leaves the usual wait."""
    server.answers += [refuse(503, retry_after=asked)]
    assert ask().text == GOOD
    assert sleeps == [pytest.approx(0.5, rel=0.5)]


@pytest.mark.parametrize("seconds", ["11", "3600", "100000000000"])
def test_longer_retry_after_ends_it_at_once(seconds: str, ask: Ask, server: Loopback, sleeps: list[float]) -> None:
    """A server that asks for more than 10 s gets no further attempt, and the error says the wait."""
    server.answers += [refuse(429, retry_after=seconds)]
    line = ask().line
    assert f"{seconds} s" in line
    assert len(server.requests) == 1
    assert sleeps == []


def test_retry_after_ends_a_later_attempt_too(ask: Ask, server: Loopback, sleeps: list[float]) -> None:
    """The second answer may be the one that asks for too much."""
    server.answers += [refuse(503), refuse(503, retry_after="60")]
    line = ask().line
    assert "60 s" in line
    assert line.endswith("(2 attempts)")


def test_each_wait_is_logged_as_information(
    ask: Ask, server: Loopback, sleeps: list[float], caplog: pytest.LogCaptureFixture
) -> None:
    """Each wait is said at level INFO: why, and how long."""
    server.answers += [refuse(503), cut()]
    with caplog.at_level(logging.INFO, "llm_autonomous"):
        assert ask().text == GOOD
    records = [record for record in caplog.records if record.name == "llm_autonomous"]
    assert [record.levelno for record in records] == [logging.INFO] * 2
    for record, wait, reason in zip(records, sleeps, ("503", "lost"), strict=True):
        assert f"{wait:.1f} s" in record.getMessage()
        assert reason in record.getMessage()


# Ctrl-C

INTERRUPTED = """
import asyncio, logging, sys
import llm

logging.basicConfig(format="%(message)s", stream=sys.stdout)
logging.getLogger("llm_autonomous").setLevel(logging.INFO)

def ask_sync():
    for chunk in llm.get_model("autonomous-llama").prompt("hi"):
        print(chunk, flush=True)

async def ask_async():
    async for chunk in llm.get_async_model("autonomous-llama").prompt("hi"):
        print(chunk, flush=True)

ask = ask_sync if sys.argv[1] == "sync" else lambda: asyncio.run(ask_async())
for _ in sys.stdin:
    try:
        ask()
    except KeyboardInterrupt:
        print("interrupted", flush=True)
"""


@contextmanager
def process(*command: str, **settings: dict[str, str]) -> Iterator[subprocess.Popen[str]]:
    """A process that is killed where it hangs."""
    pipe = subprocess.PIPE
    with subprocess.Popen(command, cwd=TESTS, stdin=pipe, stdout=pipe, stderr=pipe, text=True, **settings) as running:
        watchdog = threading.Timer(DEADLINE, running.kill)
        watchdog.start()
        try:
            yield running
        finally:
            watchdog.cancel()
            running.kill()


@pytest.mark.parametrize("kind", ["sync", "async"])
def test_interrupt_ends_at_once(kind: str, server: Loopback) -> None:
    """Ctrl-C ends a prompt at once and closes its connection, and the next prompt in that process works: before the
    reply, in a stream, and in a wait for another attempt, whose connection is none that has to be closed."""
    situations = [
        (silent(head=False), "", True),
        (silent(event(delta("Once"))), "Once", True),
        (refuse(503, retry_after="10"), "trying again in 10.0 s", False),
    ]
    with process(sys.executable, "-c", INTERRUPTED, kind) as running:
        assert running.stdin
        assert running.stdout
        assert running.stderr
        for answer, sign, closes in situations:
            server.answers += [answer]
            server.requests.clear()
            print("ask", file=running.stdin, flush=True)
            assert until(lambda: server.requests)
            if sign:
                assert sign in running.stdout.readline()
            running.send_signal(signal.SIGINT)
            assert running.stdout.readline() == "interrupted\n"
            assert len(server.requests) == 1
            if closes:
                assert until(lambda: not server.open)
            print("ask", file=running.stdin, flush=True)
            words = ""
            while len(words) < len(GOOD):
                words += running.stdout.readline().removesuffix("\n")
            assert words == GOOD
        assert running.communicate() == ("", "")


def test_interrupt_of_the_command_line_leaves_no_traceback(server: Loopback) -> None:
    """Ctrl-C in the middle of `llm` shows the text so far, and ends."""
    server.answers += [silent(event(delta("Once upon")))]
    with process("llm", "-m", "autonomous-llama", "hi", env=environment(server.url)) as running:
        assert running.stdin
        assert running.stdout
        running.stdin.close()
        assert running.stdout.read(9) == "Once upon"
        running.send_signal(signal.SIGINT)
        assert running.stderr
        errors = running.stderr.read()
    assert running.returncode == 1
    assert errors.strip() == "Aborted!"
    assert until(lambda: not server.open)
