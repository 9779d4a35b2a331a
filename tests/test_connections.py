"""Connections: kept between prompts, owned by one process and one event loop, and freed when a reader leaves."""

from __future__ import annotations

import asyncio
import gc
import itertools
import os
import subprocess
import sys
import threading
import time
import weakref
from collections import defaultdict
from collections.abc import Awaitable, Callable
from typing import Any

import httpx
import llm
import pytest
from conftest import Ask, ask_async, ask_sync, get_async_model, pools
from loopback import DONE, Answer, Connection, Loopback, Request, delta, event, say, speak
from proxies import PEM, TESTS, OddProxy, Proxy, TlsLoopback, free_port, run_python, tls, until

import llm_autonomous

GOOD = "llama heard: hi"
STRICT = "-X dev -W error"  # a ResourceWarning ends up on standard error, which must be empty
FORKING = "-W ignore::DeprecationWarning"  # Python warns of a fork while there are threads, whose point it is here
NO_SLOWNESS = "import logging; logging.getLogger('asyncio').setLevel(logging.ERROR)"  # -X dev says what took long


def ask_in_turns(kind: str, turns: int) -> list[str]:
    """The answers to the turns of one conversation; async in one event loop."""
    if kind == "sync":
        chat = llm.get_model("autonomous-llama").conversation()
        return [chat.prompt(f"turn {turn}").text() for turn in range(turns)]

    async def ask_async() -> list[str]:
        chat = llm.get_async_model("autonomous-llama").conversation()
        return [await chat.prompt(f"turn {turn}").text() for turn in range(turns)]

    return asyncio.run(ask_async())


both = pytest.mark.parametrize("kind", ["sync", "async"])


# One connection for many turns


@both
@pytest.mark.parametrize("turns", [10, 40])
def test_turns_use_one_connection(turns: int, kind: str, server: Loopback) -> None:
    """Ten turns of a conversation, or forty, are that many requests on one TCP connection."""

    async def echo(request: Request, connection: Connection) -> None:
        await connection.whole(event(delta(request.messages[-1]["content"], finish_reason="stop")) + DONE)

    server.answer = echo
    answers = ask_in_turns(kind, turns)
    assert [f"turn {turn}" in answer for turn, answer in enumerate(answers)] == [True] * turns
    assert len(server.requests) == turns
    assert server.connections == 1


@both
def test_ten_turns_use_one_connection_whose_end_comes_late(kind: str, server: Loopback) -> None:
    """A reply is read to its end behind [DONE], even where that comes a little later."""
    server.answer = say([event(delta("ok")), DONE, b"\n"], pause=0.005)
    assert ask_in_turns(kind, 10) == ["ok"] * 10
    assert server.connections == 1


@both
def test_answered_errors_keep_the_connection(kind: str, server: Loopback) -> None:
    """An error whose body has come whole costs no connection."""

    async def overloaded(request: Request, connection: Connection) -> None:
        await connection.whole(b"overloaded", "503 Service Unavailable", {"retry-after": "0"})

    server.answers += [overloaded, overloaded]
    assert len(ask_in_turns(kind, 2)) == 2
    assert server.connections == 1


@both
def test_hurry_behind_done_is_over_with_the_reply(kind: str, server: Loopback, monkeypatch: pytest.MonkeyPatch) -> None:
    """The little time that the end of a reply may take is not that of the next reply on its connection."""
    monkeypatch.setattr(llm_autonomous, "END_TIMEOUT", 0.1)

    async def slow(request: Request, connection: Connection) -> None:
        await asyncio.sleep(0.4)
        await speak()(request, connection)

    server.answers += [speak(), slow]
    assert len(ask_in_turns(kind, 3)) == 3
    assert server.connections == 1


@both
def test_hurry_is_over_before_another_prompt_has_the_connection(
    kind: str, server: Loopback, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another thread may take the connection as soon as the reply is closed: it has its own time from the start."""
    monkeypatch.setattr(llm_autonomous, "END_TIMEOUT", 0.1)
    close, aclose = httpx.Response.close, httpx.Response.aclose
    others: list[Any] = []

    async def slow(request: Request, connection: Connection) -> None:
        await asyncio.sleep(0.4)
        await speak()(request, connection)

    def close_and_ask(reply: httpx.Response) -> None:
        close(reply)
        if len(server.requests) == 1:
            others.append(ask_sync("other"))

    async def aclose_and_ask(reply: httpx.Response) -> None:
        await aclose(reply)
        if len(server.requests) == 1:
            others.append(await ask_async("other"))

    monkeypatch.setattr(httpx.Response, "close", close_and_ask)
    monkeypatch.setattr(httpx.Response, "aclose", aclose_and_ask)
    server.answers += [speak(), slow]
    assert (ask_sync() if kind == "sync" else asyncio.run(ask_async())).text == GOOD
    assert [other.text for other in others] == ["llama heard: other"]
    assert server.connections == 1


# [DONE] has ended the answer


async def close(connection: Connection) -> None:
    await connection.drop()


async def reset(connection: Connection) -> None:
    await connection.drop(reset=True)


async def stall(connection: Connection) -> None:
    await connection.stall()


async def garbage(connection: Connection) -> None:
    await connection.raw(b"this is no chunk\r\n\r\n")
    await connection.drop()


async def endless(connection: Connection) -> None:
    await connection.drip(b"data: more\n\n" * 100, pause=0.001)


@pytest.mark.parametrize("fault", [close, reset, stall, garbage, endless])
def test_done_has_ended_the_answer(
    fault: Callable[[Connection], Awaitable[None]], ask: Ask, server: Loopback, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the connection does after [DONE] neither fails the answer nor holds it up, nor the next one."""
    assert llm_autonomous.END_TIMEOUT <= 1
    monkeypatch.setattr(llm_autonomous, "END_TIMEOUT", 0.1)

    async def answer(request: Request, connection: Connection) -> None:
        await connection.head()
        await connection.send(event(delta("whole", finish_reason="stop")) + DONE)
        await fault(connection)

    server.answers += [answer]
    assert ask().text == "whole"
    assert ask().text == GOOD
    assert len(server.requests) == 2


def test_reply_that_ends_just_as_its_time_runs_out_leaves_no_connection(
    server: Loopback, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A wait that runs out while httpcore closes the connection does not keep it from closing."""
    monkeypatch.setattr(llm_autonomous, "END_TIMEOUT", 0.05)
    pauses = itertools.cycle(0.04 + 0.001 * step for step in range(30))  # about the time that the end may take

    async def drop_late(request: Request, connection: Connection) -> None:
        await connection.head()
        await connection.send(event(delta("ok", finish_reason="stop")) + DONE)
        await asyncio.sleep(next(pauses))
        await connection.drop()

    async def ask() -> int:
        model = get_async_model("autonomous-llama")
        for _ in range(4):
            assert await asyncio.gather(*(model.prompt("hi").text() for _ in range(60))) == ["ok"] * 60
        return sum(len(pool.connections) for pool in pools() if pool not in earlier)

    server.answer = drop_late
    earlier = pools()
    assert asyncio.run(ask()) == 0


# One client for each process and proxy


@pytest.fixture
def clients(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The sync clients of httpx that were made, as the keyword arguments they were made with."""
    made: list[Any] = []
    make = httpx.Client.__init__

    def init(self: httpx.Client, **kwargs: Any) -> None:
        made.append(kwargs)
        time.sleep(0.02)  # long enough for another thread to make one of its own
        make(self, **kwargs)

    monkeypatch.setattr(httpx.Client, "__init__", init)
    return made


def test_client_is_made_at_the_first_prompt_and_once(server: Loopback, clients: list[Any]) -> None:
    """Finding a model makes no client; its first prompt does, for all the models and prompts to come."""
    models = [llm.get_model(f"autonomous-{name}") for name in ("llama", "hermes", "llama")]
    assert clients == []
    for model in models:
        model.prompt("hi").text()
    assert len(clients) == 1


def test_thirty_two_threads_from_cold(server: Loopback, clients: list[Any]) -> None:
    """Thirty-two threads that begin at once with one model object share one client, and get their own answers."""
    model, together = llm.get_model("autonomous-llama"), threading.Barrier(32)
    answers: dict[int, str] = {}

    def ask(number: int) -> None:
        together.wait()
        answers[number] = "".join(model.prompt(f"thread {number:02}").text() for _ in range(2))

    threads = [threading.Thread(target=ask, args=[number]) for number in range(32)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert answers == {number: f"llama heard: thread {number:02}" * 2 for number in range(32)}
    assert len(clients) == 1
    assert server.connections <= 32


def test_each_proxy_has_one_client(server: Loopback, clients: list[Any]) -> None:
    """A proxy's client is its own, and is kept as well."""
    with Proxy() as first, Proxy() as second:
        for proxy in (first, second, None, first, second, None):
            assert llm.get_model("autonomous-llama").prompt("hi", proxy=proxy and proxy.url).text() == GOOD
        assert len(clients) == 3
        assert (len(first.targets), len(second.targets)) == (1, 1)
    assert server.connections == 3


# Event loops


def test_successive_event_loops(server: Loopback) -> None:
    """asyncio.run three times, with a client idle at the end of each: all answer, no warning, nothing left open."""
    script = f"""
{NO_SLOWNESS}
import asyncio, llm
async def ask():
    for _ in range(2):
        print(await llm.get_async_model("autonomous-llama").prompt("hi").text())
for _ in range(3):
    asyncio.run(ask())
"""
    assert run_python(script, flags=STRICT) == f"{GOOD}\n" * 6
    assert server.connections == 3
    assert until(lambda: not server.open)


def test_connections_close_with_their_loop(server: Loopback) -> None:
    """An idle client of a loop is closed when the loop ends, not when the process does."""
    for _ in range(3):
        assert ask_in_turns("async", 2)
        assert until(lambda: not server.open)


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
        for turn in range(6):
            asyncio.run(ask(f"thread {{number}} turn {{turn}}"))
    except BaseException as error:
        failures.append(repr(error))
asyncio.run(ask("warm"))
threads = [threading.Thread(target=run, args=[number]) for number in range(12)]
for thread in threads: thread.start()
for thread in threads: thread.join()
print(failures)
"""
    assert run_python(script, flags=STRICT) == "[]\n"
    assert until(lambda: not server.open)


def test_sync_and_async_side_by_side(server: Loopback) -> None:
    """A sync prompt between the prompts of an event loop disturbs neither."""

    async def ask() -> list[str]:
        model, async_model = llm.get_model("autonomous-llama"), llm.get_async_model("autonomous-llama")
        return [await async_model.prompt("hi").text(), model.prompt("hi").text(), await async_model.prompt("hi").text()]

    assert asyncio.run(ask()) == [GOOD] * 3
    assert server.connections == 2


def test_nothing_is_left_of_a_loop_that_is_gone(server: Loopback, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither the loop nor its client outlives asyncio.run."""
    clients: list[weakref.ref[httpx.AsyncClient]] = []
    make = httpx.AsyncClient.__init__

    def init(self: httpx.AsyncClient, **kwargs: Any) -> None:
        clients.append(weakref.ref(self))
        make(self, **kwargs)

    monkeypatch.setattr(httpx.AsyncClient, "__init__", init)

    async def ask() -> weakref.ref[asyncio.AbstractEventLoop]:
        assert await llm.get_async_model("autonomous-llama").prompt("hi").text() == GOOD
        return weakref.ref(asyncio.get_running_loop())

    loops = [asyncio.run(ask()) for _ in range(2)]
    gc.collect()
    assert [loop() for loop in loops] == [None, None]
    assert [client() for client in clients] == [None, None]


def test_nothing_is_left_of_a_loop_that_was_only_closed(server: Loopback) -> None:
    """A loop closed without shutdown_asyncgens could not close its client: the next prompt lets go of both."""
    script = """
import asyncio, gc, weakref, llm
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
"""
    assert run_python(script) == f"{GOOD}\n{GOOD}\nNone\n"


def test_nothing_is_printed_at_the_end_after_a_loop_without_hooks(server: Loopback) -> None:
    """A loop that nest_asyncio patched sees no async generators and never shuts down; the process ends quietly."""
    script = """
import asyncio, sys, llm
async def ask():
    sys.set_asyncgen_hooks(None, None)  # as if the loop had not set its own
    print(await llm.get_async_model("autonomous-llama").prompt("hi").text())
asyncio.new_event_loop().run_until_complete(ask())
"""
    assert run_python(script) == f"{GOOD}\n"


# A thousand at once

THOUSAND = """
import asyncio, sys
from loopback import Loopback, speak
async def together(request, connection):
    if len(server.requests) == 100:
        all_are_here.set()
    await all_are_here.wait()
    await speak()(request, connection)
all_are_here = asyncio.Event()
with Loopback(together) as server:
    print(server.url, flush=True)
    sys.stdin.read()
print(f"{len(server.requests)} requests on {server.connections} connections")
"""


def test_a_thousand_async_prompts_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A hundred of them are at the server at the same time, the others wait for their turn, and all are answered."""

    async def ask() -> list[str]:
        model = llm.get_async_model("autonomous-llama")
        return await asyncio.gather(*(model.prompt(f"number {number}").text() for number in range(1000)))

    command, pipe = [sys.executable, "-c", THOUSAND], subprocess.PIPE
    with subprocess.Popen(command, cwd=TESTS, stdin=pipe, stdout=pipe, text=True) as server:
        assert server.stdout
        monkeypatch.setenv("AUTONOMOUS_BASE_URL", server.stdout.readline().strip())
        answers = asyncio.run(ask())
        counts, _ = server.communicate()
    assert answers == [f"llama heard: number {number}" for number in range(1000)]
    assert counts == "1000 requests on 100 connections\n"


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


async def ask_at_once(server: Loopback, count: int) -> None:
    """A wave of prompts that are all at the server at the same time."""
    model, server.answer = get_async_model("autonomous-llama"), together(count)
    assert await asyncio.gather(*(model.prompt("hi").text() for _ in range(count))) == [GOOD] * count


def test_ten_waves_of_eighty_take_eighty_connections(server: Loopback) -> None:
    """A batch that comes in waves uses its connections again, all closed when the loop ends."""

    async def ask() -> None:
        for _ in range(10):
            await ask_at_once(server, 80)

    asyncio.run(ask())
    assert len(server.requests) == 800
    assert server.connections == 80
    assert until(lambda: not server.open)


def test_connections_of_a_burst_are_closed_when_they_have_expired(
    server: Loopback, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a burst opened is not kept for the life of a loop that has no more bursts."""
    monkeypatch.setattr(llm_autonomous, "KEEPALIVE", 0.5)

    async def ask() -> None:
        await ask_at_once(server, 40)
        assert len(server.open) == 40
        await asyncio.sleep(0.6)
        await ask_at_once(server, 1)
        assert await asyncio.to_thread(until, lambda: len(server.open) == 1)

    asyncio.run(ask())


# Forks


def processes_by_connection(requests: list[Request]) -> dict[int, set[str]]:
    """Which processes, by the first word of their prompts, used each connection."""
    used = defaultdict(set)
    for request in requests:
        used[request.connection].add(request.messages[-1]["content"].split()[0])
    return used


TALK = """
import asyncio, multiprocessing, os, sys
import llm
def talk(turns):
    model = llm.get_model("autonomous-llama")
    for turn in range(turns):
        words = f"{os.getpid()} turn {turn}"
        answer = model.prompt(words).text()
        assert answer == f"llama heard: {words}", answer
async def talk_async(turns):
    model = llm.get_async_model("autonomous-llama")
    for turn in range(turns):
        words = f"{os.getpid()} turn {turn}"
        answer = await model.prompt(words).text()
        assert answer == f"llama heard: {words}", answer
def wait(children):
    assert [os.waitpid(child, 0)[1] for child in children] == [0] * len(children)
"""
FORKS = {
    "os.fork": """
talk(2)
children = []
for _ in range(4):
    child = os.fork()
    if not child:
        talk(5)
        sys.exit()
    children.append(child)
talk(5)
wait(children)
talk(1)
""",
    "multiprocessing": """
talk(2)
context = multiprocessing.get_context("fork")
children = [context.Process(target=talk, args=[5]) for _ in range(4)]
for child in children: child.start()
talk(5)
for child in children: child.join()
assert [child.exitcode for child in children] == [0] * 4
talk(1)
""",
    "in a loop": """
async def main():
    await talk_async(2)
    children = []
    for _ in range(4):
        child = os.fork()
        if not child:
            code = 1
            try:
                asyncio.run(talk_async(5))
                code = 0
            finally:
                os._exit(code)
        children.append(child)
    await talk_async(5)
    wait(children)
    await talk_async(1)
asyncio.run(main())
""",
}


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_forked_children_open_their_own_connections(server: Loopback) -> None:
    """After a fork, parent and children each have a connection of their own, and get their own answers: by os.fork, by
    multiprocessing and within an event loop, one behind the other in one process."""
    assert run_python(TALK + "".join(FORKS.values()), flags=FORKING) == ""
    assert len(server.requests) == 28 * len(FORKS)
    for number, fork in enumerate(FORKS):
        used = processes_by_connection(server.requests[28 * number :][:28])
        assert len(used) == 5, fork
        assert len(set.union(*used.values())) == 5, fork


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_forked_child_does_not_close_the_connections_of_its_parent(server: Loopback) -> None:
    """A child that leaves its copy of the parent's event loop closes no client of the parent, sync or async."""
    script = """
import asyncio, os, sys
import httpx, llm
parent = os.getpid()
def closing(close):
    def closed(self):
        print(type(self).__name__, "closed by", "its parent" if os.getpid() == parent else "a child", flush=True)
        return close(self)
    return closed
httpx.Client.close, httpx.AsyncClient.aclose = closing(httpx.Client.close), closing(httpx.AsyncClient.aclose)
async def main():
    for _ in range(2):
        print(await llm.get_async_model("autonomous-llama").prompt("hi").text(), flush=True)
        print(llm.get_model("autonomous-llama").prompt("hi").text(), flush=True)
        child = os.fork()
        if not child:
            sys.exit()
        assert os.waitpid(child, 0)[1] == 0
asyncio.run(main())
"""
    closed = "AsyncClient closed by its parent\nClient closed by its parent\n"
    assert run_python(script, flags=FORKING) == f"{GOOD}\n" * 4 + closed
    assert server.connections == 2


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
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


@both
def test_silence_on_a_kept_connection_is_not_tried_again(kind: str, server: Loopback) -> None:
    """A server that is silent has the prompt, on whatever connection it came."""

    async def answer(request: Request, connection: Connection) -> None:
        await connection.stall()

    server.answers += [speak(), answer]
    if kind == "sync":
        ask_sync()
        silent = ask_sync(timeout=0.2)
    else:

        async def ask() -> Answer:
            await ask_async()
            return await ask_async(timeout=0.2)

        silent = asyncio.run(ask())
    assert "silent for 0.2 s" in silent.line
    assert len(server.requests) == 2


@both
def test_prompt_on_a_kept_connection_that_closes_is_tried_again(
    kind: str, server: Loopback, sleeps: list[float]
) -> None:
    """A connection that is lost before the reply, as an idle one may be, costs one of three attempts."""

    async def drop(request: Request, connection: Connection) -> None:
        await connection.drop()

    server.answers += [speak(), drop]
    assert len(ask_in_turns(kind, 2)) == 2
    assert (len(server.requests), server.connections, len(sleeps)) == (3, 2, 1)


# A reader that stops early


def stall_after_text(request: Request, connection: Connection) -> Awaitable[None]:
    async def answer() -> None:
        await connection.head()
        await connection.send(event(delta("Once")))
        await connection.stall()

    return answer()


def break_sync() -> None:
    for _ in llm.get_model("autonomous-llama").prompt("hi"):
        break


def close_sync() -> None:
    chunks = iter(llm.get_model("autonomous-llama").prompt("hi"))
    next(chunks)
    chunks.close()  # type: ignore[attr-defined]


@pytest.mark.parametrize("stop", [break_sync, close_sync])
def test_reader_that_stops_early_frees_its_connection(stop: Callable[[], None], server: Loopback) -> None:
    """After `break` or `close()`, the connection of an unfinished reply is gone, and the next prompts share another."""
    server.answers += [stall_after_text]
    stop()
    assert until(lambda: not server.open)
    assert ask_in_turns("sync", 2)
    assert server.connections == 2


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
    first = asyncio.Event()

    async def read() -> None:
        async for _ in response:
            first.set()

    task = asyncio.create_task(read())
    await first.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def time_out() -> None:
    response = get_async_model("autonomous-llama").prompt("hi")
    await anext(response)
    with pytest.raises(asyncio.TimeoutError):
        await asyncio.wait_for(anext(response), 0.05)


@pytest.mark.parametrize("readers", [1, 40])
@pytest.mark.parametrize("stop", [break_async, close_async, cancel, time_out])
def test_async_reader_that_stops_early_frees_its_connection(
    stop: Callable[[], Awaitable[None]], readers: int, server: Loopback
) -> None:
    """The same in a loop that goes on, for one reader and for many: the next turns share a connection again."""

    async def stop_and_go_on() -> None:
        await asyncio.gather(*(stop() for _ in range(readers)))
        assert await asyncio.to_thread(until, lambda: not server.open)
        chat = llm.get_async_model("autonomous-llama").conversation()
        for turn in range(3):
            assert f"turn {turn}" in await chat.prompt(f"turn {turn}").text()

    server.answers += [stall_after_text] * readers
    asyncio.run(stop_and_go_on())
    assert server.connections == readers + 1


# Proxies: each connects the name service.test, which nothing else does


@pytest.fixture
def behind_proxy(server: Loopback, monkeypatch: pytest.MonkeyPatch) -> str:
    """The host and port of a server that can be reached through a `Proxy` alone."""
    monkeypatch.setenv("AUTONOMOUS_BASE_URL", f"http://service.test:{server.port}")
    return f"service.test:{server.port}"


@pytest.mark.parametrize("scheme", ["http", "socks5", "socks5h"])
def test_proxy_option(scheme: str, ask: Ask, behind_proxy: str) -> None:
    """A prompt goes through the proxy of its option, which resolves the name."""
    with Proxy(scheme) as proxy:
        assert ask(proxy=proxy.url).text == GOOD
        assert proxy.targets == [behind_proxy]


def test_https_proxy_option(ask: Ask, behind_proxy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The connection to a proxy can be TLS, which SSL_CERT_FILE lets verify."""
    monkeypatch.setenv("SSL_CERT_FILE", str(PEM))
    with Proxy("https", tls=tls()) as proxy:
        assert ask(proxy=proxy.url).text == GOOD
        assert proxy.targets == [behind_proxy]


@pytest.mark.parametrize("scheme", ["http", "socks5", "socks5h"])
@pytest.mark.parametrize("variable", ["HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"])
def test_proxy_variables(
    variable: str, scheme: str, ask: Ask, behind_proxy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A prompt goes through the proxy of the environment, with its user name and password."""
    with Proxy(scheme) as proxy:
        monkeypatch.setenv(variable, proxy.url_for("user:pass"))
        assert ask().text == GOOD
        assert proxy.targets == [behind_proxy]
        assert proxy.credentials == {"user:pass"}


@pytest.mark.parametrize("scheme", ["http", "socks5"])
def test_https_proxy_variable_and_certificate_file(scheme: str, ask: Ask, monkeypatch: pytest.MonkeyPatch) -> None:
    """HTTPS_PROXY connects to an https:// server, whose certificate SSL_CERT_FILE lets verify."""
    with TlsLoopback() as server, Proxy(scheme) as proxy:
        monkeypatch.setenv("AUTONOMOUS_BASE_URL", server.url)
        monkeypatch.setenv("HTTPS_PROXY", proxy.url)
        monkeypatch.setenv("SSL_CERT_FILE", str(PEM))
        assert ask().text == GOOD
        assert proxy.targets == [f"127.0.0.1:{server.port}"]


def test_option_goes_before_the_environment(ask: Ask, behind_proxy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The proxy named for a prompt is the one that is used."""
    monkeypatch.setenv("HTTP_PROXY", f"http://127.0.0.1:{free_port()}")
    with Proxy() as proxy:
        assert ask(proxy=proxy.url).text == GOOD


@pytest.mark.parametrize("variable", ["HTTP_PROXY", "ALL_PROXY"])
def test_no_proxy(variable: str, ask: Ask, server: Loopback, monkeypatch: pytest.MonkeyPatch) -> None:
    """A host that NO_PROXY names is reached directly."""
    with Proxy() as proxy:
        monkeypatch.setenv(variable, proxy.url)
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        assert ask().text == GOOD
        assert proxy.targets == []


@pytest.mark.parametrize(
    "words", [(), (b"\5\0",), (b"\5\2", b"\1\0")], ids=["at once", "after the greeting", "after the password"]
)
def test_socks_proxy_that_falls_silent(
    words: tuple[bytes, ...], ask: Ask, behind_proxy: str, monkeypatch: pytest.MonkeyPatch, no_backoff: None
) -> None:
    """A SOCKS proxy that accepts and then says nothing has the time of connecting, and the line names it. This depends
    on what httpcore tells its ``trace`` extension: without the stream in it, it waits for ever."""
    with OddProxy(*words) as proxy:
        credentials = "" if words == (b"\5\0",) else "user:secret@"
        monkeypatch.setenv("ALL_PROXY", f"socks5://{credentials}127.0.0.1:{proxy.port}")
        line = ask(timeout=0.1).line
        through = f"cannot connect through the proxy 127.0.0.1:{proxy.port}"
        assert line == f"{behind_proxy}: {through}: no reply within 0.1 s (3 attempts)"


@pytest.mark.parametrize("scheme", ["http", "https", "socks5"])
def test_proxy_that_is_not_there(scheme: str, ask: Ask, behind_proxy: str, no_backoff: None) -> None:
    """A connection that a proxy's host refuses is told as that, not as the server's."""
    address = f"127.0.0.1:{free_port()}"
    line = ask(proxy=f"{scheme}://{address}").line
    assert line == f"{behind_proxy}: cannot connect through the proxy {address}: Connection refused (3 attempts)"


def test_http_proxy_named_as_socks(ask: Ask, behind_proxy: str, no_backoff: None) -> None:
    """A proxy that answers a SOCKS greeting in HTTP is named, and the line says what it is not."""
    with OddProxy(b"HTTP/1.1 400 Bad Request\r\n\r\n", closes=True) as proxy:
        line = ask(proxy=f"socks5://127.0.0.1:{proxy.port}").line
    through = f"cannot connect through the proxy 127.0.0.1:{proxy.port}"
    assert line == f"{behind_proxy}: {through}: it does not answer as a SOCKS proxy (3 attempts)"


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


def test_environment_is_read_at_each_prompt(ask: Ask, server: Loopback, monkeypatch: pytest.MonkeyPatch) -> None:
    """A proxy that is set or unset between prompts of a process counts from the next prompt on."""
    with Proxy() as proxy:
        for url in ("", proxy.url, ""):
            monkeypatch.setenv("HTTP_PROXY", url)
            assert ask().text == GOOD
        assert len(proxy.targets) == 1


@pytest.mark.parametrize("variable", [None, "ALL_PROXY"], ids=["option", "ALL_PROXY"])
@pytest.mark.parametrize("scheme", ["socks5", "socks5h"])
def test_socks_proxy_without_the_extra(
    scheme: str, variable: str | None, ask: Ask, server: Loopback, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without the package for SOCKS, the error says what to install."""
    monkeypatch.setitem(sys.modules, "socksio", None)
    url = f"{scheme}://127.0.0.1:{free_port()}"
    if variable:
        monkeypatch.setenv(variable, url)
    line = ask(**({} if variable else {"proxy": url})).line
    assert "a SOCKS proxy needs one more package: llm install 'httpx[socks]' (or pip install)" in line
    assert server.requests == []


def test_certificate_file(ask: Ask, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server whose authority stands in SSL_CERT_FILE is trusted, and ten turns over TLS are one connection."""
    monkeypatch.setenv("SSL_CERT_FILE", str(PEM))
    with TlsLoopback() as server:
        monkeypatch.setenv("AUTONOMOUS_BASE_URL", server.url)
        assert ask().text == GOOD


@both
def test_ten_turns_over_tls_use_one_connection(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The TLS handshake is made once."""
    monkeypatch.setenv("SSL_CERT_FILE", str(PEM))
    with TlsLoopback() as server:
        monkeypatch.setenv("AUTONOMOUS_BASE_URL", server.url)
        assert len(ask_in_turns(kind, 10)) == 10
        assert server.connections == 1


@pytest.mark.parametrize("content", [None, "no certificate"], ids=["missing", "garbage"])
def test_certificate_file_that_cannot_be_loaded(
    content: str | None, ask: Ask, server: Loopback, monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    """A certificate file that is missing or holds none is one line that names the variable."""
    path = tmp_path / "authority.pem"
    if content:
        path.write_text(content)
    monkeypatch.setenv("SSL_CERT_FILE", str(path))
    assert "SSL_CERT_FILE" in ask().line
    assert server.requests == []
