"""Connections: kept between prompts, owned by one process and one event loop, and freed when a reader leaves."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import itertools
import os
import sys
import threading
import weakref
from collections.abc import Awaitable, Callable

import llm
import pytest
from conftest import Ask, ask_async, ask_sync, close_connections, get_async_model
from loopback import DONE, Answer, Connection, Loopback, Request, delta, event, say, speak
from proxies import PEM, OddProxy, Proxy, TlsLoopback, cut, free_port, refuse, run_python, silent, tls, together, until

import llm_autonomous
from llm_autonomous import AutonomousError

GOOD = "llama heard: hi"
STRICT = "-X dev -W error"  # a ResourceWarning ends up on standard error, which must be empty
FORKING = "-W ignore::DeprecationWarning"  # Python warns of a fork while there are threads, whose point it is here
NO_SLOWNESS = "import logging; logging.getLogger('asyncio').setLevel(logging.ERROR)"  # -X dev says what took long

both = pytest.mark.parametrize("kind", ["sync", "async"])
needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")


def ask_in_turns(kind: str, turns: int) -> list[str]:
    """The answers to the turns of one conversation; async in one event loop."""
    if kind == "sync":
        chat = llm.get_model("autonomous-llama").conversation()
        return [chat.prompt(f"turn {turn}").text() for turn in range(turns)]

    async def ask() -> list[str]:
        chat = llm.get_async_model("autonomous-llama").conversation()
        return [await chat.prompt(f"turn {turn}").text() for turn in range(turns)]

    return asyncio.run(ask())


async def in_one_piece(request: Request, connection: Connection) -> None:
    await connection.whole(event(delta(request.messages[-1]["content"], finish_reason="stop")) + DONE)


# One connection for many turns


@both
@pytest.mark.parametrize(
    ("before", "answer"),
    [
        pytest.param([], in_one_piece, id="in one piece"),
        pytest.param([], speak(), id="in pieces"),
        pytest.param([], say([event(delta("ok")), DONE, b"\n"], pause=0.005), id="with an end that comes late"),
        pytest.param([refuse(503, retry_after="0")] * 2, speak(), id="after errors"),
    ],
)
@pytest.mark.parametrize("kind_of_server", [Loopback, TlsLoopback])
def test_turns_use_one_connection(
    kind_of_server: type[Loopback], before: list[Answer], answer: Answer, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ten turns of a conversation are ten requests on one connection, whatever the form of the replies; with one TLS
    handshake, if SSL_CERT_FILE names the server's authority."""
    monkeypatch.setenv("SSL_CERT_FILE", str(PEM))
    with kind_of_server() as server:
        monkeypatch.setenv("AUTONOMOUS_BASE_URL", server.url)
        server.answers += before
        server.answer = answer
        assert len(ask_in_turns(kind, 10)) == 10
        assert (len(server.requests), server.connections) == (10 + len(before), 1)


@both
def test_kept_connection_that_is_lost_is_one_attempt(kind: str, server: Loopback, sleeps: list[float]) -> None:
    """A connection that is lost before the reply, as an idle one may be, costs one of three attempts."""
    server.answers += [speak(), cut(head=None)]
    assert len(ask_in_turns(kind, 2)) == 2
    assert (len(server.requests), server.connections, len(sleeps)) == (3, 2, 1)
    server.answers += [speak(), *[cut(head=None)] * 3]
    with pytest.raises(AutonomousError, match=r"the connection was lost before any answer \(3 attempts\)"):
        ask_in_turns(kind, 2)


def test_many_replies_whose_end_hangs_leave_no_connection(server: Loopback, monkeypatch: pytest.MonkeyPatch) -> None:
    """Replies that hang or drop about when the time for their end is over, some of them cancelled, are all left, while
    their loop goes on; and later prompts work."""
    monkeypatch.setattr(llm_autonomous, "END_TIMEOUT", 0.05)
    model, numbers = get_async_model("autonomous-llama"), itertools.count()

    async def hang(request: Request, connection: Connection) -> None:
        number = next(numbers)
        await connection.head()
        await connection.send(event(delta("ok", finish_reason="stop")) + DONE)
        await asyncio.sleep(0.04 + 0.001 * (number % 30))
        await (connection.drop() if number % 2 else connection.stall())

    async def ask(number: int) -> None:
        answering = asyncio.create_task(model.prompt("hi").text())
        if number % 5 == 0:
            await asyncio.sleep(0.002 * (number % 50))
            answering.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            assert await answering == "ok"

    async def ask_all() -> None:
        server.answer = hang
        for start in range(0, 600, 200):
            await asyncio.gather(*(ask(start + number) for number in range(200)))
        assert await asyncio.to_thread(until, lambda: not server.open)
        await ask_at_once(server, 40)

    asyncio.run(ask_all())
    assert until(lambda: not server.open)


# One client for each process and proxy


def test_thirty_two_threads_from_cold(server: Loopback) -> None:
    """Thirty-two threads that begin at once with one model object get their own answers, and use their connections
    again."""
    model, server.answer = llm.get_model("autonomous-llama"), together(32)
    answers: dict[int, str] = {}

    def ask(number: int) -> None:
        answers[number] = "".join(model.prompt(f"thread {number:02}").text() for _ in range(2))

    threads = [threading.Thread(target=ask, args=[number]) for number in range(32)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert answers == {number: f"llama heard: thread {number:02}" * 2 for number in range(32)}
    assert server.connections == 32


async def ask_through(kind: str, *urls: str | None) -> None:
    """Prompts through these proxies, or through none."""
    for url in urls:
        answer = ask_sync(proxy=url) if kind == "sync" else await ask_async(proxy=url)
        assert answer.text == GOOD


@both
def test_each_proxy_has_its_connection(kind: str, server: Loopback) -> None:
    """A connection through a proxy is kept for the prompts that name it, as is the one without a proxy."""
    with Proxy() as first, Proxy() as second:
        asyncio.run(ask_through(kind, *[first.url, second.url, None] * 2))
        assert (len(first.targets), len(second.targets)) == (1, 1)
    assert server.connections == 3


# Event loops


def test_loops_in_different_threads(server: Loopback) -> None:
    """Loops of many threads, beginning and ending at the same time, do not touch each other."""
    script = f"""
{NO_SLOWNESS}
import asyncio, sys, threading, llm
sys.setswitchinterval(1e-6)
failures = []
model = llm.get_async_model("autonomous-llama")
async def ask(words):
    for answer in await asyncio.gather(*(model.prompt(words).text() for _ in range(2))):
        assert words in answer, answer
def run(number):
    try:
        for turn in range(4):
            asyncio.run(ask(f"thread {{number}} turn {{turn}}"))
    except BaseException as error:
        failures.append(repr(error))
asyncio.run(ask("warm"))
threads = [threading.Thread(target=run, args=[number]) for number in range(8)]
for thread in threads: thread.start()
for thread in threads: thread.join()
print(failures)
"""
    assert run_python(script, flags=STRICT) == "[]\n"
    assert until(lambda: not server.open)


def test_nothing_is_left_of_a_loop_that_is_gone(server: Loopback) -> None:
    """Three times asyncio.run, with a client that is idle at the end: all answer, no warning, nothing is left open."""

    async def ask() -> weakref.ref[asyncio.AbstractEventLoop]:
        assert [(await ask_async()).text for _ in range(2)] == [GOOD] * 2
        return weakref.ref(asyncio.get_running_loop())

    for turn in range(3):
        loop = asyncio.run(ask())
        assert until(lambda: not server.open)
        assert server.connections == turn + 1
        gc.collect()
        assert loop() is None


def test_loops_that_never_shut_down(server: Loopback) -> None:
    """A loop that was only closed is let go by the next prompt; one without hooks for async generators, as nest_asyncio
    leaves its own, is left to the end of the process, which is quiet."""
    script = """
import asyncio, gc, sys, weakref, llm
async def ask():
    print(await llm.get_async_model("autonomous-llama").prompt("hi").text())
loop = asyncio.new_event_loop()
loop.run_until_complete(ask())
loop.close()
gone = weakref.ref(loop)
del loop
asyncio.run(ask())
gc.collect()
print(gone())
async def ask_without_hooks():
    sys.set_asyncgen_hooks(None, None)
    await ask()
asyncio.new_event_loop().run_until_complete(ask_without_hooks())
"""
    assert run_python(script) == f"{GOOD}\n{GOOD}\nNone\n{GOOD}\n"


# Many at once


async def ask_at_once(server: Loopback, count: int) -> None:
    """A wave of prompts that are all at the server at the same time."""
    model, server.answer = get_async_model("autonomous-llama"), together(count)
    answers = await asyncio.gather(*(model.prompt(f"number {number}").text() for number in range(count)))
    assert answers == [f"llama heard: number {number}" for number in range(count)]


def test_a_thousand_async_prompts_at_once(server: Loopback) -> None:
    """A thousand prompts are at the server at the same time, and all are answered, by one request each."""
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < 4096:  # both ends of a connection are files of this process
        resource.setrlimit(resource.RLIMIT_NOFILE, (4096 if hard == resource.RLIM_INFINITY else min(hard, 4096), hard))
    asyncio.run(ask_at_once(server, 1000))
    assert (len(server.requests), server.connections) == (1000, 1000)


def test_waves_of_eighty_take_eighty_connections(server: Loopback) -> None:
    """A batch that comes in waves uses its connections again, all closed when the loop ends."""

    async def ask() -> None:
        for _ in range(3):
            await ask_at_once(server, 80)

    asyncio.run(ask())
    assert server.connections == 80
    assert until(lambda: not server.open)


def test_connections_of_a_burst_are_closed_when_they_have_expired(
    server: Loopback, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a burst opened is not kept for the life of a loop that has no more bursts."""
    monkeypatch.setattr(llm_autonomous, "KEEPALIVE", 0.2)

    async def ask() -> None:
        await ask_at_once(server, 40)
        await asyncio.sleep(0.3)
        await ask_at_once(server, 1)
        assert await asyncio.to_thread(until, lambda: len(server.open) == 1)

    asyncio.run(ask())


# Forks


@needs_fork
def test_forked_children_open_their_own_connections(server: Loopback) -> None:
    """After a fork, parent and children each have connections of their own, one for sync and one for async, and get
    their own answers; also if the fork is within an event loop."""
    script = """
import asyncio, multiprocessing, os
import conftest
async def talk(turns):
    for turn in range(turns):
        words = f"{os.getpid()} turn {turn}"
        for answer in (conftest.ask_sync(words), await conftest.ask_async(words)):
            assert answer.text == f"llama heard: {words}"
def talk_in_child():
    asyncio.run(talk(5))
async def main():
    await talk(2)
    children = [multiprocessing.get_context("fork").Process(target=talk_in_child) for _ in range(4)]
    for child in children: child.start()
    await talk(5)
    for child in children: child.join()
    assert [child.exitcode for child in children] == [0] * 4
    await talk(1)
asyncio.run(main())
"""
    assert run_python(script, flags=FORKING) == ""
    assert len(server.requests) == 2 * 28
    used = {(request.connection, request.messages[-1]["content"].split()[0]) for request in server.requests}
    assert len(used) == server.connections == 2 * len({process for _, process in used}) == 10


@needs_fork
def test_forked_child_does_not_close_the_connections_of_its_parent(server: Loopback) -> None:
    """A child that leaves its copy of the parent's event loop closes no client of the parent, sync or async. What harm
    closing them would do depends on the version of anyio, so this asks httpx."""
    script = """
import asyncio, os, sys
import conftest, httpx
parent = os.getpid()
def closing(close):
    def closed(self):
        print(type(self).__name__, "closed by", "its parent" if os.getpid() == parent else "a child", flush=True)
        return close(self)
    return closed
httpx.Client.close, httpx.AsyncClient.aclose = closing(httpx.Client.close), closing(httpx.AsyncClient.aclose)
async def main():
    for _ in range(2):
        print((await conftest.ask_async()).text, conftest.ask_sync().text, flush=True)
        child = os.fork()
        if not child:
            sys.exit()
        assert os.waitpid(child, 0)[1] == 0
asyncio.run(main())
"""
    closed = "AsyncClient closed by its parent\nClient closed by its parent\n"
    assert run_python(script, flags=FORKING) == f"{GOOD} {GOOD}\n" * 2 + closed
    assert server.connections == 2


@needs_fork
def test_fork_while_another_thread_is_making_the_client(server: Loopback) -> None:
    """A lock that a thread holds at the fork does not lock the child, where that thread does not exist."""
    script = """
import os, signal, threading
import httpx, llm
parent, held, release = os.getpid(), threading.Event(), threading.Event()
make = httpx.Client.__init__
def slow(self, **kwargs):
    if os.getpid() == parent:
        held.set()
        release.wait()
    make(self, **kwargs)
httpx.Client.__init__ = slow
ask = lambda: print(llm.get_model("autonomous-llama").prompt("hi").text(), flush=True)
thread = threading.Thread(target=ask)
thread.start()
held.wait()
child = os.fork()
if not child:
    signal.alarm(10)
    ask()
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0
release.set()
thread.join()
"""
    assert run_python(script, flags=FORKING) == f"{GOOD}\n" * 2


# A reader that stops early


async def break_sync() -> None:
    for _ in llm.get_model("autonomous-llama").prompt("hi"):
        break


async def break_async() -> None:
    async for _ in get_async_model("autonomous-llama").prompt("hi"):
        break


async def close_async() -> None:
    model = get_async_model("autonomous-llama")
    response = model.prompt("hi")
    chunks = model.execute(response.prompt, True, response, None)
    await anext(chunks)
    await chunks.aclose()


async def cancel() -> None:
    response = get_async_model("autonomous-llama").prompt("hi")
    await anext(response)
    task = asyncio.ensure_future(anext(response))
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


@pytest.mark.parametrize("readers", [1, 40])
@pytest.mark.parametrize("stop", [break_sync, break_async, close_async, cancel])
def test_reader_that_stops_early_frees_its_connection(
    stop: Callable[[], Awaitable[None]], readers: int, server: Loopback
) -> None:
    """The connection of an unfinished reply is gone, while the loop goes on, and the next prompts share others: one for
    sync, and one for async."""

    async def stop_and_go_on() -> None:
        await asyncio.gather(*(stop() for _ in range(readers)))
        assert await asyncio.to_thread(until, lambda: not server.open)
        for _ in range(2):
            assert ask_sync().text == (await ask_async()).text == GOOD

    server.answers += [silent(event(delta("Once")))] * readers
    asyncio.run(stop_and_go_on())
    assert server.connections == readers + 2


# Proxies: each connects the name service.test, which nothing else does


@pytest.fixture
def behind_proxy(server: Loopback, monkeypatch: pytest.MonkeyPatch) -> str:
    """The host and port of a server that can be reached through a `Proxy` alone."""
    monkeypatch.setenv("AUTONOMOUS_BASE_URL", f"http://service.test:{server.port}")
    return f"service.test:{server.port}"


@pytest.mark.parametrize("scheme", ["http", "https", "socks5", "socks5h", ""])
@pytest.mark.parametrize("variable", ["HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"])
def test_proxy_variables(
    variable: str,
    scheme: str,
    ask: Ask,
    server: Loopback,
    behind_proxy: str,
    monkeypatch: pytest.MonkeyPatch,
    no_backoff: None,
) -> None:
    """Each attempt goes through the proxy of the environment, with its user name and password. Without a scheme it is
    an HTTP proxy, and with https the connection to it is TLS."""
    monkeypatch.setenv("SSL_CERT_FILE", str(PEM))
    server.answers += [cut(head=None)]
    with Proxy(scheme or "http", tls=tls() if scheme == "https" else None) as proxy:
        monkeypatch.setenv(variable, proxy.url_for("user:pass").removeprefix("" if scheme else "http://"))
        assert ask().text == GOOD
        assert proxy.credentials == {"user:pass"}
        assert proxy.targets == [behind_proxy] * 2


@pytest.mark.parametrize("scheme", ["http", "https", "socks5", "socks5h"])
def test_proxy_option(scheme: str, ask: Ask, behind_proxy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A prompt goes through the proxy of its option, whatever the environment says. The proxy resolves the name."""
    monkeypatch.setenv("SSL_CERT_FILE", str(PEM))
    monkeypatch.setenv("HTTP_PROXY", f"http://127.0.0.1:{free_port()}")
    monkeypatch.setenv("NO_PROXY", "service.test")
    with Proxy(scheme, tls=tls() if scheme == "https" else None) as proxy:
        assert ask(proxy=proxy.url).text == GOOD
        assert proxy.targets == [behind_proxy]


@pytest.mark.parametrize("scheme", ["http", "socks5"])
@pytest.mark.parametrize("variable", ["HTTPS_PROXY", "all_proxy"])
def test_proxy_to_a_server_with_tls(variable: str, scheme: str, ask: Ask, monkeypatch: pytest.MonkeyPatch) -> None:
    """The proxy of the environment connects to an https:// server, whose certificate SSL_CERT_FILE lets verify."""
    with TlsLoopback() as server, Proxy(scheme) as proxy:
        monkeypatch.setenv("AUTONOMOUS_BASE_URL", server.url)
        monkeypatch.setenv(variable, proxy.url)
        monkeypatch.setenv("SSL_CERT_FILE", str(PEM))
        assert ask().text == GOOD
        assert proxy.targets == [f"127.0.0.1:{server.port}"]


def test_environment_is_read_at_each_prompt(ask: Ask, server: Loopback, monkeypatch: pytest.MonkeyPatch) -> None:
    """A proxy that is set or unset between prompts of a process counts from the next prompt on. A host that NO_PROXY
    names is reached directly, whatever else it holds."""
    unreadable = "[,[fe80::1%eth0]:80,127.0.0.1"
    with Proxy() as proxy:
        for hosts in ("", "127.0.0.1", "localhost, 127.0.0.1", "*", "localhost, *", unreadable, "service.test"):
            monkeypatch.setenv("NO_PROXY", hosts)
            for url in ("", proxy.url):
                monkeypatch.setenv("HTTP_PROXY", url)
                before = len(proxy.targets)
                assert ask().text == GOOD
                assert len(proxy.targets) - before == bool(url and hosts in ("", "service.test"))
                close_connections()


SILENT, FALSE = "no reply within 1 s", "it does not answer as a SOCKS proxy"


@pytest.mark.parametrize(
    ("credentials", "words", "reason"),
    [
        pytest.param("user:secret@", (), SILENT, id="silent at once"),
        pytest.param("", (b"\5\0",), SILENT, id="silent after the greeting"),
        pytest.param("user:secret@", (b"\5\2", b"\1\0"), SILENT, id="silent after the password"),
        pytest.param("", (b"HTTP/1.1 400 Bad Request\r\n\r\n",), FALSE, id="an HTTP proxy"),
    ],
)
def test_socks_proxy_that_is_silent_or_false(
    credentials: str,
    words: tuple[bytes, ...],
    reason: str,
    ask: Ask,
    behind_proxy: str,
    monkeypatch: pytest.MonkeyPatch,
    sleeps: list[float],
) -> None:
    """A SOCKS proxy that says nothing has the time of connecting, once, and is named, as is one that is none. This
    depends on what httpcore tells its ``trace`` extension: without the stream in it, it waits for ever."""
    with OddProxy(*words, closes=reason == FALSE) as proxy:
        monkeypatch.setenv("ALL_PROXY", f"socks5://{credentials}127.0.0.1:{proxy.port}")
        line = ask(timeout=1 if reason == SILENT else 120).line
        through = f"cannot connect through the proxy 127.0.0.1:{proxy.port}"
    assert line.startswith(f"{behind_proxy}: {through}: {reason}")
    assert "attempts" not in line
    assert sleeps == []


@pytest.mark.parametrize("scheme", ["http", "https", "socks5"])
def test_proxy_that_is_not_there(scheme: str, ask: Ask, behind_proxy: str, no_backoff: None) -> None:
    """A connection that a proxy's host refuses is told as that, not as the server's."""
    address = f"127.0.0.1:{free_port()}"
    line = ask(proxy=f"{scheme}://{address}").line
    assert line == f"{behind_proxy}: cannot connect through the proxy {address}: Connection refused (3 attempts)"


@pytest.mark.parametrize("scheme", ["http", "socks5"])
def test_tls_that_fails_through_a_proxy(
    scheme: str, ask: Ask, monkeypatch: pytest.MonkeyPatch, no_backoff: None
) -> None:
    """What OpenSSL says of the server is the reason, though there is a proxy between."""
    with OddProxy(b"HTTP/1.1 400 Bad Request\r\n\r\n", closes=True) as server, Proxy(scheme) as proxy:
        monkeypatch.setenv("AUTONOMOUS_BASE_URL", f"https://127.0.0.1:{server.port}")
        line = ask(proxy=proxy.url).line
        assert line.startswith(f"127.0.0.1:{server.port}: cannot connect through the proxy 127.0.0.1:{proxy.port}: ")
        assert "SSL" in line


@pytest.mark.parametrize("scheme", ["socks5", "socks5h"])
def test_socks_proxy_without_the_extra(
    scheme: str, ask: Ask, server: Loopback, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without the package for SOCKS, the error says what to install."""
    monkeypatch.setitem(sys.modules, "socksio", None)
    words = "a SOCKS proxy needs a package: llm install 'httpx[socks]' (or pip install)"
    assert words in ask(proxy=f"{scheme}://127.0.0.1:1").line
    monkeypatch.setenv("ALL_PROXY", f"{scheme}://127.0.0.1:1")
    assert words in ask().line
    assert server.requests == []
