"""A seeded storm: some hundred prompts, sync and async at once, at a server that does all it can do wrong.

A *case* is one prompt, known by the number in its text: the answer it should get, in which dialect, and the *acts*
that the server plays for it, one for each attempt. An act is of one of three kinds, so that the outcome of each case
is known beforehand: a passing fault is met by another attempt, a fatal one ends the prompt with an error, and a good
reply, however it is framed, is the whole answer.

    LLM_AUTONOMOUS_STORM=20000 python -m pytest tests/test_storm.py     for more than the usual number of prompts
"""

from __future__ import annotations

import asyncio
import gzip
import itertools
import json
import os
import queue
import random
import re
import threading
import time
import zlib
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import httpcore
import llm
import pytest
from conftest import pools
from loopback import DONE, Connection, Loopback, Request, delta, event, speak
from proxies import until

import llm_autonomous
from llm_autonomous import AutonomousError

SEED = 20250201
PROMPTS = int(os.environ.get("LLM_AUTONOMOUS_STORM") or 500)
DEADLINE = 120 + PROMPTS / 5  # seconds for all; a prompt that takes them hangs
THREADS = 8
TASKS = 48  # async prompts at once: more than one connection pool takes
SILENCE = 3.0  # seconds, the timeout of a prompt that meets a stall

# What an answer is made of: among words, all that could be taken for framing.
WORDS = (
    *("word ", "слово ", "語 ", "\U0001f600", "é", "\n", "\n\n", "\r\n", "\r", "\t", " ", '"', "\\", "{", "}"),
    *("data: ", "[DONE]", "<html>", ": ", "\u2028", "\u2029", "\x85", "\x0b", "\x00", "\ufeff", "event: x\n"),
)


# What the server says well


def lines(chunks: list[str], before: str, after: str) -> str:
    return "".join(f"{before}{chunk}{after}" for chunk in [*chunks, "[DONE]"])


def many_lines(chunks: list[str], newline: str) -> str:
    """Events of JSON in many lines, each of which is a field of its own."""
    chunks = [json.dumps(json.loads(chunk), indent=1).replace("\n", f"{newline}data: ") for chunk in chunks]
    return lines(chunks, "data: ", 2 * newline)


def completion(text: str, indent: int | None) -> str:
    whole = delta(finish_reason="stop", model="storm")
    whole["choices"][0] = {"message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
    return json.dumps(whole, indent=indent)


# A dialect makes a body of the JSON of its chunks, and of the text in them.
DIALECTS: dict[str, Callable[[list[str], str], str]] = {
    "events": lambda chunks, _: lines(chunks, "data: ", "\n\n"),
    "CRLF": lambda chunks, _: lines(chunks, "data: ", "\r\n\r\n"),
    "CR": lambda chunks, _: lines(chunks, "data: ", "\r\r"),
    "no space": lambda chunks, _: lines(chunks, "data:", "\n\n"),
    "no blank lines": lambda chunks, _: lines(chunks, "data: ", "\n"),
    "other fields": lambda chunks, _: lines(chunks, ": hello\nevent: message\nid: 7\nretry: 10\ndata: ", "\n\n"),
    "byte order mark": lambda chunks, _: "\ufeff" + lines(chunks, "data: ", "\n\n"),
    "no blank line at the end": lambda chunks, _: lines(chunks, "data: ", "\n\n").rstrip(),
    "no DONE": lambda chunks, _: lines(chunks, "data: ", "\n\n").removesuffix("data: [DONE]\n\n"),
    "many lines": lambda chunks, _: many_lines(chunks, "\n"),
    "many lines, CRLF": lambda chunks, _: many_lines(chunks, "\r\n"),
    "bare JSON": lambda chunks, _: lines(chunks, "", "\n"),
    "whole reply": lambda _, text: completion(text, None),
    "whole reply in many lines": lambda _, text: completion(text, 2),
    "whole reply in an event": lambda _, text: lines([completion(text, None)], "data: ", "\n\n"),
}


# The cases

Act = Callable[["Case", Connection], Awaitable[None]]
PASSING: list[Act] = []
FATAL: list[Act] = []
GOOD: list[Act] = []


@dataclass
class Case:
    """One prompt, and what became of it."""

    number: int
    text: str = ""  # as far as it has come
    error: BaseException | None = None
    done: bool = False
    attempts: int = 0  # the server's count

    def __post_init__(self) -> None:
        self.random = random.Random(f"{SEED} {self.number}")
        words = self.random.choices(WORDS, k=self.random.randint(2, 12))
        self.answer = f"({self.number}) {''.join(words)}."
        self.texts = self._cut(self.answer)
        self.dialect = self.random.choice(list(DIALECTS))
        self.stream = self.random.random() < 0.8
        faults = self.random.choices((0, 1, 2, 3), (6, 3, 3, 1))[0]
        self.acts = self.random.choices(PASSING, k=faults)
        if faults < 3:
            self.acts.append(self.random.choice(GOOD if self.random.random() < 0.6 else FATAL))
        self.whole = self.acts[-1] in GOOD
        self.timeout = SILENCE if not self.whole and self.acts[-1].__name__.startswith("stall") else 60.0

    def _cut(self, text: str) -> list[str]:
        """The text in at least two pieces."""
        ends = sorted({0, 1, *(self.random.randrange(len(text)) for _ in range(5)), len(text)})
        return [text[a:b] for a, b in itertools.pairwise(ends)]

    @property
    def chunks(self) -> list[dict[str, Any]]:
        """The chat-completion chunks of a good reply."""
        chunks = [delta(text, model="storm") for text in self.texts]
        if self.random.random() < 0.5:
            chunks.insert(0, {"id": "0", "choices": [{"delta": {"role": "assistant", "content": None}}]})
        if self.random.random() < 0.5:
            chunks.append(delta(finish_reason="stop"))
        else:
            chunks.append({"choices": [{"delta": {"content": ""}}], "finish_reason": "stop"})
        if self.random.random() < 0.5:
            chunks.append({"choices": [], "usage": {"prompt_tokens": 1, "completion_tokens": len(self.texts)}})
        return chunks

    @property
    def body(self) -> bytes:
        """A good reply in the dialect of this case, with and without escapes."""
        escape = self.random.random() < 0.5
        chunks = [json.dumps(chunk, ensure_ascii=escape) for chunk in self.chunks]
        return DIALECTS[self.dialect](chunks, self.answer).encode()

    @property
    def events(self) -> tuple[list[bytes], bytes]:
        """The first events of a reply, at least one of them with text, and the event behind them."""
        events = [event(delta(text)) for text in self.texts]
        count = self.random.randint(1, len(events) - 1)
        return events[:count], events[count]

    def pieces(self, body: bytes) -> list[bytes]:
        ends = sorted({0, *(self.random.randrange(1, len(body)) for _ in range(8)), len(body)})
        return [body[a:b] for a, b in itertools.pairwise(ends)]


async def until_close(connection: Connection, body: bytes) -> None:
    """A reply that says nothing of its length: it ends where the connection does."""
    await connection.raw(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\nconnection: close\r\n\r\n" + body)
    await connection.drop()


async def reset(connection: Connection) -> None:
    """Close with a TCP reset, as a crashed server does."""
    await connection.drop(reset=True)


async def begin(case: Case, connection: Connection) -> bytes:
    """Send the first events of a reply, and return the next."""
    events, following = case.events
    await connection.head()
    for piece in events:
        await connection.send(piece)
    return following


# Faults that another attempt gets over


def passing(act: Act) -> Act:
    PASSING.append(act)
    return act


@passing
async def drop_before_head(case: Case, connection: Connection) -> None:
    await connection.drop()


@passing
async def drop_in_head(case: Case, connection: Connection) -> None:
    await connection.raw(b"HTTP/1.1 200 OK\r\ncontent-ty")
    await connection.drop()


@passing
async def drop_after_head(case: Case, connection: Connection) -> None:
    await connection.head(length=case.random.choice((None, 1000)))
    await connection.drop()


@passing
async def drop_in_first_event(case: Case, connection: Connection) -> None:
    await connection.head()
    first = case.events[0][0]
    await connection.send(first[: case.random.randrange(1, len(first) - 2)])
    await connection.drop()


@passing
async def reset_before_head(case: Case, connection: Connection) -> None:
    await reset(connection)


@passing
async def reset_after_head(case: Case, connection: Connection) -> None:
    await connection.head()
    await reset(connection)


@passing
async def status_429(case: Case, connection: Connection) -> None:
    await connection.whole(b'{"error": {"message": "too many"}}', "429 Too Many Requests")


@passing
async def status_429_retry_after(case: Case, connection: Connection) -> None:
    wait = case.random.choice(("0", "Wed, 21 Oct 2015 07:28:00 GMT", "soon"))
    await connection.whole(b'{"detail": "too many"}', "429 Too Many Requests", {"retry-after": wait})


@passing
async def status_503(case: Case, connection: Connection) -> None:
    await connection.whole(b"busy", "503 Service Unavailable")


@passing
async def status_503_retry_after(case: Case, connection: Connection) -> None:
    page = b"<!DOCTYPE html><title>Just a moment...</title>"
    await connection.whole(page, "503 Service Unavailable", {"retry-after": "0"})


@passing
async def status_500_without_body(case: Case, connection: Connection) -> None:
    await connection.whole(b"", case.random.choice(("500 Internal Server Error", "502 Bad Gateway", "504 Timeout")))


@passing
async def status_503_dropped(case: Case, connection: Connection) -> None:
    await connection.head("503 Service Unavailable", length=1000)
    await connection.raw(b"The serv")
    await connection.drop()


# Faults that end a prompt


def fatal(act: Act) -> Act:
    FATAL.append(act)
    return act


@fatal
async def drop_in_text(case: Case, connection: Connection) -> None:
    await begin(case, connection)
    await connection.drop()


@fatal
async def drop_within_event(case: Case, connection: Connection) -> None:
    following = await begin(case, connection)
    await connection.send(following[: case.random.randrange(1, len(following) - 2)])
    await connection.drop()


@fatal
async def drop_within_http_chunk(case: Case, connection: Connection) -> None:
    following = await begin(case, connection)
    await connection.raw(b"%x\r\n%s" % (len(following), following[: case.random.randrange(len(following) - 2)]))
    await connection.drop()


@fatal
async def end_within_event(case: Case, connection: Connection) -> None:
    events, following = case.events
    cut = case.random.randrange(len("data: {"), len(following) - len("}\n\n"))
    await until_close(connection, b"".join(events) + following[:cut])


@fatal
async def reset_in_text(case: Case, connection: Connection) -> None:
    await begin(case, connection)
    await reset(connection)


@fatal
async def stall_before_head(case: Case, connection: Connection) -> None:
    await connection.stall()


@fatal
async def stall_after_head(case: Case, connection: Connection) -> None:
    await connection.head()
    await connection.stall()


@fatal
async def stall_in_text(case: Case, connection: Connection) -> None:
    following = await begin(case, connection)
    await connection.send(following[:10])
    await connection.stall()


@fatal
async def garbled_head(case: Case, connection: Connection) -> None:
    await connection.raw(
        case.random.choice((b"\x16\x03\x01\x02\x00\xff\r\n\r\n", b"HTTP/1.1 200 OK\r\nno colon\r\n\r\n"))
    )
    await connection.drop()


@fatal
async def garbled_event(case: Case, connection: Connection) -> None:
    # Bytes that neither end a line nor could be text: what cannot be noticed is no fault of a client.
    following = await begin(case, connection)
    noise = bytes(case.random.choices(range(0x80, 0x100), k=8))
    start = case.random.choice((len("data: "), len('data: {"id": "chatcmpl-loopback"')))
    await connection.send(following[:start] + noise + following[start + len(noise) :] + b"data: [DONE]\n\n")
    await connection.end()


@fatal
async def garbled_http_chunk(case: Case, connection: Connection) -> None:
    following = await begin(case, connection)
    await connection.raw(b"\xfe\xff\r\n" + following)
    await connection.drop()


@fatal
async def garbled_compression(case: Case, connection: Connection) -> None:
    await connection.whole(b"\xff" * 100, headers={"content-encoding": case.random.choice(("gzip", "deflate"))})


@fatal
async def unknown_compression(case: Case, connection: Connection) -> None:
    await connection.whole(case.body, headers={"content-encoding": "gzip, br"})


@fatal
async def error_in_text(case: Case, connection: Connection) -> None:
    await begin(case, connection)
    await connection.send(event({"error": case.random.choice(({"message": "out of memory"}, "out of memory"))}))
    await connection.end()


@fatal
async def status_429_for_an_hour(case: Case, connection: Connection) -> None:
    await connection.whole(b"", "429 Too Many Requests", {"retry-after": "3600"})


@fatal
async def status_400(case: Case, connection: Connection) -> None:
    await connection.whole(b'{"message": "no such model"}', "400 Bad Request")


@fatal
async def page_403(case: Case, connection: Connection) -> None:
    page = b"<!DOCTYPE html>\n<html><title>Just a moment...</title></html>"
    await connection.whole(page, "403 Forbidden", {"content-type": "text/html"})


@fatal
async def page_200(case: Case, connection: Connection) -> None:
    await connection.whole(b"\n<html>\n<title>Welcome</title>\n</html>\n", headers={"content-type": "text/html"})


@fatal
async def redirect(case: Case, connection: Connection) -> None:
    await connection.whole(b"", case.random.choice(("302 Found", "307 Temporary Redirect")), {"location": "/elsewhere"})


@fatal
async def empty(case: Case, connection: Connection) -> None:
    body = case.random.choice((b"", b"\n\n", b"data: [DONE]\n\n", b": nothing\n\n", event(delta(finish_reason="stop"))))
    await connection.whole(body)


# Good replies


def good(act: Act) -> Act:
    GOOD.append(act)
    return act


@good
async def in_one_piece(case: Case, connection: Connection) -> None:
    await connection.whole(case.body)


@good
async def in_pieces(case: Case, connection: Connection) -> None:
    await connection.head(headers={"content-type": "text/plain"})
    for piece in case.pieces(case.body):
        await connection.send(piece)
        await asyncio.sleep(0)
    await connection.end()


@good
async def in_slow_drips(case: Case, connection: Connection) -> None:
    await connection.head()
    for piece in case.pieces(case.body):
        await connection.send(piece)
        await asyncio.sleep(0.01)
    await connection.end()


@good
async def in_packets(case: Case, connection: Connection) -> None:
    # Cut where TCP may cut: within the head, and within the lengths of the chunks.
    await connection.raw(b"HTTP/1.1 200 O")
    await asyncio.sleep(0.005)
    await connection.raw(b"K\r\ntransfer-encoding: chunked\r\n\r\n")
    body = case.body
    for piece in case.pieces(b"%x\r\n%s\r\n0\r\n\r\n" % (len(body), body)):
        await connection.raw(piece)
        await asyncio.sleep(0.005)


@good
async def up_to_the_close(case: Case, connection: Connection) -> None:
    await until_close(connection, case.body)


@good
async def in_gzip(case: Case, connection: Connection) -> None:
    await connection.head(headers={"content-encoding": "gzip"})
    for piece in case.pieces(gzip.compress(case.body)):
        await connection.send(piece)
    await connection.end()


@good
async def in_deflate(case: Case, connection: Connection) -> None:
    await connection.whole(zlib.compress(case.body), headers={"content-encoding": "deflate"})


@good
async def dropped_after_done(case: Case, connection: Connection) -> None:
    case.dialect = "events"
    await connection.head()
    await connection.send(case.body)
    await connection.drop()


@good
async def with_a_foreign_value(case: Case, connection: Connection) -> None:
    foreign = ({"choices": 5}, [1, 2], None, {"status": "fine"}, {"choices": [{"delta": {"content": 7}}]})
    case.dialect, chunks = "events", case.chunks
    chunks.insert(case.random.randrange(len(chunks)), case.random.choice(foreign))
    await connection.whole(b"".join(map(event, chunks)) + DONE)


@good
async def stalled_after_done(case: Case, connection: Connection) -> None:
    case.dialect = "CRLF"
    await connection.head()
    await connection.send(case.body)
    await connection.stall()


# The storm


@dataclass
class Storm:
    """What is left when it is over."""

    cases: list[Case]
    hung: list[int] = field(default_factory=list)  # cases
    lost: list[str] = field(default_factory=list)  # paths of requests that no case made
    used: set[int] = field(default_factory=set)  # connections of the server that had a request
    plain: list[str] = field(default_factory=list)  # the answers to prompts after it, sync and async
    open: int = 0  # connections that the server holds at the same time
    open_after_loop: int = 0  # once the event loop of the async prompts is over
    sync: int = 0  # connections that the sync client holds then
    open_at_the_end: int = 0  # once those are closed

    def answerer(self) -> Callable[[Request, Connection], Awaitable[None]]:
        """What the server does: the act of the case that the prompt names, for this attempt."""

        async def answer(request: Request, connection: Connection) -> None:
            named = re.fullmatch(r"storm (\d+)", request.messages[-1]["content"]) if request.body else None
            if request.path != "/api/v1/ai/chat" or named is None:
                self.lost.append(request.path)
                await connection.whole(b"", "404 Not Found")
                return
            case = self.cases[int(named[1])]
            act = case.acts[min(case.attempts + 1, len(case.acts)) - 1]
            case.attempts += 1
            await act(case, connection)

        return answer


def hold_sync(model: llm.Model, cases: queue.SimpleQueue[Case | None]) -> None:
    while case := cases.get():
        try:
            for text in model.prompt(f"storm {case.number}", stream=case.stream, timeout=case.timeout):
                case.text += text
        except BaseException as error:
            case.error = error
        case.done = True


async def hold_async(model: llm.AsyncModel, case: Case, turn: asyncio.Semaphore) -> None:
    async with turn:
        try:
            async for text in model.prompt(f"storm {case.number}", stream=case.stream, timeout=case.timeout):
                case.text += text
        except Exception as error:
            case.error = error
        case.done = True


@pytest.fixture(scope="module")
def storm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Storm]:
    """The storm, held once for all tests of this module."""
    storm = Storm([Case(number) for number in range(PROMPTS)])
    with pytest.MonkeyPatch.context() as monkeypatch, Loopback(storm.answerer()) as server:
        monkeypatch.setenv("AUTONOMOUS_BASE_URL", server.url)
        monkeypatch.setenv("LLM_USER_PATH", str(tmp_path_factory.mktemp("llm")))
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        monkeypatch.delenv("LLM_LOAD_PLUGINS", raising=False)
        monkeypatch.setattr(llm_autonomous, "BACKOFF", (0.01, 0.02))
        monkeypatch.setattr(llm_autonomous, "END_TIMEOUT", 0.1)
        earlier = pools()  # of other tests
        asyncio.run(hold(storm, server, earlier))
        sync_pools = [pool for pool in pools() if pool not in earlier and type(pool) is httpcore.ConnectionPool]
        storm.sync = sum(len(pool.connections) for pool in sync_pools)
        until(lambda: len(server.open) == storm.sync)  # the assertion is a test's
        storm.open_after_loop = len(server.open)
        for pool in sync_pools:
            pool.close()
        until(lambda: not server.open)
        storm.open_at_the_end = len(server.open)
        yield storm


async def hold(storm: Storm, server: Loopback, earlier: list[Any]) -> None:
    model, async_model = llm.get_model("autonomous-llama"), llm.get_async_model("autonomous-llama")
    for_threads: queue.SimpleQueue[Case | None] = queue.SimpleQueue()
    for case in storm.cases[::2]:
        for_threads.put(case)
    for _ in range(THREADS):
        for_threads.put(None)
    # Daemons, so that a prompt that hangs fails the tests and not the end of the process.
    threads = [threading.Thread(target=hold_sync, args=(model, for_threads), daemon=True) for _ in range(THREADS)]
    for thread in threads:
        thread.start()
    turn = asyncio.Semaphore(TASKS)
    tasks = [asyncio.create_task(hold_async(async_model, case, turn)) for case in storm.cases[1::2]]
    deadline = time.monotonic() + DEADLINE
    _, pending = await asyncio.wait(tasks, timeout=DEADLINE)
    for thread in threads:
        await asyncio.to_thread(thread.join, max(0.0, deadline - time.monotonic()))
    storm.hung = [case.number for case in storm.cases if not case.done]
    for task in pending:
        task.cancel()

    server.answer = speak()
    storm.plain.append(await asyncio.to_thread(lambda: model.prompt("still there?").text()))
    storm.plain.append(await async_model.prompt("still there?").text())
    held = [connection for pool in pools() if pool not in earlier for connection in pool.connections]
    storm.idle = [connection.is_idle() for connection in held]
    await asyncio.to_thread(until, lambda: len(server.open) == len(held))
    storm.open = len(server.open)


def test_storm_plays_every_act_in_every_dialect(storm: Storm) -> None:
    """The fixed number of prompts is enough for all that the server can do, right and wrong."""
    assert len(storm.cases) >= 500
    played = {act for case in storm.cases for act in case.acts}
    assert played == {*PASSING, *FATAL, *GOOD}
    assert {case.dialect for case in storm.cases if case.whole} == {*DIALECTS}


def test_no_prompt_hangs(storm: Storm) -> None:
    """Every prompt has come to its end."""
    assert storm.hung == []


def test_what_fails_is_an_autonomous_error(storm: Storm) -> None:
    """A prompt ends with no other exception."""
    assert [
        (case.number, case.error) for case in storm.cases if not isinstance(case.error, AutonomousError | None)
    ] == []


def test_good_replies_are_whole_answers(storm: Storm) -> None:
    """A prompt that meets a good reply within three attempts has its exact text, and its own."""
    wrong = [case for case in storm.cases if case.whole and (case.error or case.text != case.answer)]
    assert [(case.number, case.dialect, case.acts, case.text, case.error) for case in wrong] == []


def test_faults_end_in_an_error(storm: Storm) -> None:
    """A prompt that meets no good reply is told so, and never takes a part for the whole."""
    silent = [case for case in storm.cases if not case.whole and case.error is None]
    assert [(case.number, case.acts, case.text) for case in silent] == []


def test_text_before_an_error_is_the_start_of_the_answer(storm: Storm) -> None:
    """What has come of an answer stays as it was sent: nothing twice, nothing left out, nothing of another."""
    wrong = [case for case in storm.cases if case.error and not case.answer.startswith(case.text)]
    assert [(case.number, case.acts, case.text) for case in wrong] == []


def test_faults_in_the_text_come_behind_it(storm: Storm) -> None:
    """An error in the middle of an answer swallows none of the text that came before it."""
    late = (drop_in_text, end_within_event, stall_in_text, garbled_event, error_in_text)
    assert [case.number for case in storm.cases if case.acts[-1] in late and not case.text] == []


def test_each_prompt_makes_the_attempts_its_faults_call_for(storm: Storm) -> None:
    """Passing faults are tried again, up to three attempts in all, and nothing else is."""
    # A reset may overtake what was sent before it, and is then one that is tried again, or that does not count.
    sure = [case for case in storm.cases if not {reset_in_text, reset_after_head}.intersection(case.acts)]
    assert [(case.number, case.acts, case.attempts) for case in sure if case.attempts != len(case.acts)] == []


def test_nothing_but_the_prompts_is_requested(storm: Storm) -> None:
    """No redirect is followed."""
    assert storm.lost == []


def test_plain_prompts_work_after_the_storm(storm: Storm) -> None:
    """Neither the sync client nor the one of the event loop is worse for it."""
    assert storm.plain == ["llama heard: still there?"] * 2


def test_server_and_clients_agree_on_open_connections(storm: Storm) -> None:
    """What the server holds open is what the clients keep for reuse, all of it idle."""
    assert storm.open == len(storm.idle) > 0
    assert all(storm.idle)


def test_no_more_connections_are_kept_than_were_used_at_once(storm: Storm) -> None:
    """Connections are shared by the prompts, sync and async."""
    assert storm.open <= THREADS + TASKS
    assert storm.sync <= THREADS


def test_the_end_of_the_event_loop_closes_its_connections(storm: Storm) -> None:
    """Only those of the sync client are left then."""
    assert storm.open_after_loop == storm.sync > 0


def test_closed_clients_leave_no_connection(storm: Storm) -> None:
    """No connection is open that no client knows of."""
    assert storm.open_at_the_end == 0
