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
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

import llm
import pytest
from conftest import close_connections
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


def many_lines(chunk: str) -> str:
    """JSON in many lines, each of which is a field of its own."""
    return json.dumps(json.loads(chunk), indent=1).replace("\n", "\ndata: ")


# A dialect makes a body of the JSON of its chunks, and of the text in them. There are more in test_replies.py.
DIALECTS: dict[str, Callable[[list[str], str], str]] = {
    "events": lambda chunks, _: lines(chunks, "data: ", "\n\n"),
    "CRLF": lambda chunks, _: lines(chunks, "data: ", "\r\n\r\n"),
    "CR": lambda chunks, _: lines(chunks, "data: ", "\r\r"),
    "no blank lines": lambda chunks, _: lines(chunks, "data: ", "\n"),
    "no DONE": lambda chunks, _: lines(chunks, "data: ", "\n\n").removesuffix("data: [DONE]\n\n"),
    "many lines": lambda chunks, _: lines([*map(many_lines, chunks)], "data: ", "\n\n"),
    "bare JSON": lambda chunks, _: lines(chunks, "", "\n"),
    "whole reply": lambda _, text: json.dumps({"choices": [{"message": {"content": text}, "finish_reason": "stop"}]}),
}


# The cases


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
        self.texts = self.cut(self.answer)
        self.dialect = self.random.choice(list(DIALECTS))
        self.stream = self.random.random() < 0.8
        faults = self.random.choices((0, 1, 2, 3), (6, 3, 3, 1))[0]
        self.acts = self.random.choices(list(PASSING), k=faults)
        if faults < 3:
            self.acts.append(self.random.choice(list(GOOD if self.random.random() < 0.6 else FATAL)))
        self.whole = self.acts[-1] in GOOD
        self.timeout = SILENCE if self.acts[-1].startswith("silent") else 60.0

    def cut(self, whole: Any) -> list[Any]:
        """A text or bytes in at least two pieces."""
        ends = sorted({0, 1, *(self.random.randrange(len(whole)) for _ in range(6)), len(whole)})
        return [whole[a:b] for a, b in itertools.pairwise(ends)]

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

    def body(self, dialect: str = "") -> bytes:
        """A good reply in the dialect of this case, with and without escapes."""
        escape = self.random.random() < 0.5
        chunks = [json.dumps(chunk, ensure_ascii=escape) for chunk in self.chunks]
        return DIALECTS[dialect or self.dialect](chunks, self.answer).encode()

    def first_events(self) -> bytes:
        """All events with text but the last."""
        return b"".join(event(delta(text)) for text in self.texts[:-1])

    def last_event(self, cut: bool = False) -> bytes:
        """The event after those, or its beginning."""
        whole = event(delta(self.texts[-1]))
        return whole[: self.random.randrange(len("data: {"), len(whole) - len("}\n\n"))] if cut else whole


# What the server does: an act is a name, and steps, one after the other

Step = str | bytes | Callable[[Case, Connection], Awaitable[None]]


async def take(step: Step, case: Case, connection: Connection) -> None:
    """Take one step of an act: bytes go outside of HTTP's framing."""
    match step:
        case bytes():
            await connection.raw(step)
        case "begin":
            await connection.head()
            await connection.send(case.first_events())
        case "half an event":
            await connection.send(case.last_event(cut=True))
        case "begin, half an event":
            await connection.raw(case.first_events() + case.last_event(cut=True))
        case "body":
            await connection.raw(case.body())
        case "reset":
            await connection.drop(reset=True)
        case str():
            await getattr(connection, step)()
        case _:
            await step(case, connection)


async def garbled_event(case: Case, connection: Connection) -> None:
    # Bytes that neither end a line nor could be text: what cannot be noticed is no fault of a client.
    following, noise = case.last_event(), bytes(case.random.choices(range(0x80, 0x100), k=8))
    start = case.random.choice((len("data: "), len('data: {"id": "chatcmpl-loopback"')))
    await connection.send(following[:start] + noise + following[start + len(noise) :] + DONE)


async def foreign_value(case: Case, connection: Connection) -> None:
    foreign = ({"choices": 5}, [1, 2], None, {"status": "fine"}, {"choices": [{"delta": {"content": {"a": 7}}}]})
    chunks = case.chunks
    chunks.insert(case.random.randrange(len(chunks)), case.random.choice(foreign))
    await connection.whole(b"".join(map(event, chunks)) + DONE)


async def packets(case: Case, connection: Connection) -> None:
    # Cut where TCP may cut: within the head, and within the lengths of the chunks.
    body = case.body()
    head = (b"HTTP/1.1 200 O", b"K\r\ntransfer-encoding: chunked\r\n\r\n")
    for piece in (*head, *case.cut(b"%x\r\n%s\r\n0\r\n\r\n" % (len(body), body))):
        await connection.raw(piece)
        await asyncio.sleep(0.005)


def whole(status: str, *bodies: bytes, **headers: str) -> tuple[Step]:
    """A reply that is complete, with one of these bodies."""
    names = {name.replace("_", "-"): value for name, value in headers.items()}
    return (lambda case, connection: connection.whole(case.random.choice(bodies), status, names),)


def good(pack: Callable[[bytes], bytes] = bytes, pause: float = 0.0, dialect: str = "", **headers: str) -> Step:
    """The head and all of a good reply, in pieces."""

    async def step(case: Case, connection: Connection) -> None:
        await connection.head(headers={name.replace("_", "-"): value for name, value in headers.items()})
        for piece in case.cut(pack(case.body(dialect))):
            await connection.send(piece)
            await asyncio.sleep(pause)

    return step


NO_LENGTH = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\nconnection: close\r\n\r\n"
CHALLENGE = b"<!DOCTYPE html>\n<html><title>Just a moment...</title></html>"
PAGE = b"\n<html>\n<title>Welcome</title>\n</html>\n"
NO_TEXT = (b"", b"\n\n", b"data: [DONE]\n\n", b": nothing\n\n", event(delta(finish_reason="stop")))

# Faults that another attempt gets over
PASSING: dict[str, tuple[Step, ...]] = {
    "dropped before the head": ("drop",),
    "dropped in the head": (b"HTTP/1.1 200 OK\r\ncontent-ty", "drop"),
    "dropped after the head": ("head", "drop"),
    "dropped after a head with a length": (b"HTTP/1.1 200 OK\r\ncontent-length: 1000\r\n\r\n", "drop"),
    "dropped in the first event": ("head", "half an event", "drop"),
    "reset before the head": ("reset",),
    "reset after the head": ("head", "reset"),
    "429": whole("429 Too Many Requests", b'{"error": {"message": "too many"}}', b'{"detail": "too many"}'),
    "429 with a date": whole("429 Too Many", b"", retry_after="Wed, 21 Oct 2015 07:28:00 GMT"),
    "503": whole("503 Service Unavailable", b"busy", CHALLENGE),
    "503 with seconds": whole("503 Service Unavailable", CHALLENGE, retry_after="0"),
    "502": whole("502 Bad Gateway", b""),
    "503 dropped": (b"HTTP/1.1 503 Sorry\r\ncontent-length: 1000\r\n\r\nThe serv", "drop"),
}

# Faults that end a prompt
FATAL: dict[str, tuple[Step, ...]] = {
    "in the text, dropped": ("begin", "drop"),
    "in the text, dropped within an event": ("begin", "half an event", "drop"),
    "in the text, closed within an event": (NO_LENGTH, "begin, half an event", "drop"),
    "in the text, a garbled event": ("begin", garbled_event, "end"),
    "in the text, a garbled HTTP chunk": ("begin", b"\xfe\xff\r\n", "drop"),
    "in the text, an error": (NO_LENGTH, event(delta("(")), event({"error": {"message": "out of memory"}}), "drop"),
    "reset in the text": ("begin", "reset"),
    "silent before the head": ("stall",),
    "silent after the head": ("head", "stall"),
    "silent in the text": ("begin", "half an event", "stall"),
    "not HTTP": (b"\x16\x03\x01\x02\x00\xff\r\n\r\n", "drop"),
    "garbled gzip": whole("200 OK", b"\xff" * 100, content_encoding="gzip"),
    "429 for an hour": whole("429 Too Many Requests", b"", retry_after="3600"),
    "400": whole("400 Bad Request", b'{"message": "no such model"}'),
    "403": whole("403 Forbidden", CHALLENGE, content_type="text/html"),
    "page": whole("200 OK", PAGE, content_type="text/html"),
    "307": whole("307 Temporary Redirect", b"", location="/elsewhere"),
    "empty": whole("200 OK", *NO_TEXT),
}

GOOD: dict[str, tuple[Step, ...]] = {
    "in one piece": (lambda case, connection: connection.whole(case.body()),),
    "in pieces": (good(content_type="text/plain"), "end"),
    "in slow drips": (good(pause=0.01), "end"),
    "in packets": (packets,),
    "up to the close": (NO_LENGTH, "body", "drop"),
    "in gzip": (good(gzip.compress, content_encoding="gzip"), "end"),
    "with a foreign value": (foreign_value,),
    "and a drop after [DONE]": (good(dialect="events"), "drop"),
    "and garbage after [DONE]": (good(dialect="events"), b"this is no chunk\r\n\r\n", "drop"),
    "and silence after [DONE]": (good(dialect="CRLF"), "stall"),
}
ACTS = {**PASSING, **FATAL, **GOOD}


# The storm


@dataclass
class Storm:
    """What is left when it is over."""

    cases: list[Case]
    lost: list[str] = field(default_factory=list)  # paths of requests that no case made
    replying: int = 0  # replies that the server has begun and that neither it nor the client has left
    plain: list[str] = field(default_factory=list)  # the answers to prompts after it, sync and async
    open: int = 0  # connections that the server holds then, while the event loop goes on
    used: set[int] = field(default_factory=set)  # connections of async prompts
    open_after_loop: set[int] = field(default_factory=set)  # of those
    open_at_the_end: int = 0  # once the sync client is closed

    async def answer(self, request: Request, connection: Connection) -> None:
        """Play the act of the case that the prompt names, for this attempt."""
        named = re.fullmatch(r"storm (\d+)", request.messages[-1]["content"]) if request.body else None
        if request.path != "/api/v1/ai/chat" or named is None:
            self.lost.append(request.path)
            await connection.whole(b"", "404 Not Found")
            return
        case = self.cases[int(named[1])]
        act = case.acts[min(case.attempts + 1, len(case.acts)) - 1]
        case.attempts += 1
        if case.number % 2:
            self.used.add(request.connection)
        self.replying += 1
        try:
            for step in ACTS[act]:
                await take(step, case, connection)
        finally:
            self.replying -= 1


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


async def hold(storm: Storm, server: Loopback) -> None:
    model, async_model = llm.get_model("autonomous-llama"), llm.get_async_model("autonomous-llama")
    for_threads: queue.SimpleQueue[Case | None] = queue.SimpleQueue()
    for case in [*storm.cases[::2], *[None] * THREADS]:
        for_threads.put(case)
    # Daemons, so that a prompt that hangs fails the tests and not the end of the process.
    threads = [threading.Thread(target=hold_sync, args=(model, for_threads), daemon=True) for _ in range(THREADS)]
    for thread in threads:
        thread.start()
    turn, deadline = asyncio.Semaphore(TASKS), time.monotonic() + DEADLINE
    tasks = [asyncio.create_task(hold_async(async_model, case, turn)) for case in storm.cases[1::2]]
    _, pending = await asyncio.wait(tasks, timeout=DEADLINE)
    for thread in threads:
        await asyncio.to_thread(thread.join, max(0.0, deadline - time.monotonic()))
    for task in pending:
        task.cancel()

    await asyncio.to_thread(until, lambda: not storm.replying)  # the assertion is a test's
    server.answer = speak()
    storm.plain.append(await asyncio.to_thread(lambda: model.prompt("still there?").text()))
    storm.plain.append(await async_model.prompt("still there?").text())
    storm.open = len(server.open)


@pytest.fixture(scope="module")
def storm(tmp_path_factory: pytest.TempPathFactory) -> Storm:
    """The storm, held once for all tests of this module."""
    storm = Storm([Case(number) for number in range(PROMPTS)])
    with pytest.MonkeyPatch.context() as monkeypatch, Loopback(storm.answer) as server:
        monkeypatch.setenv("AUTONOMOUS_BASE_URL", server.url)
        monkeypatch.setenv("LLM_USER_PATH", str(tmp_path_factory.mktemp("llm")))
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        monkeypatch.delenv("LLM_LOAD_PLUGINS", raising=False)
        monkeypatch.setattr(llm_autonomous, "BACKOFF", (0.01, 0.02))
        monkeypatch.setattr(llm_autonomous, "END_TIMEOUT", 0.1)
        asyncio.run(hold(storm, server))
        until(lambda: not server.open & storm.used)
        storm.open_after_loop = server.open & storm.used
        close_connections()
        until(lambda: not server.open)
        storm.open_at_the_end = len(server.open)
    return storm


def test_storm_plays_every_act_in_every_dialect(storm: Storm) -> None:
    """The fixed number of prompts is enough for all that the server can do, right and wrong."""
    assert len(storm.cases) >= 500
    assert {act for case in storm.cases for act in case.acts} == {*ACTS}
    assert {case.dialect for case in storm.cases if case.whole} == {*DIALECTS}


# A reset may overtake what was sent before it, and is then one that is tried again, or that does not count.
UNSURE = {"reset in the text", "reset after the head"}

WRONG: dict[str, Callable[[Case], bool]] = {
    "hangs": lambda case: not case.done,
    "ends with an exception that is not the plugin's": lambda case: not isinstance(case.error, AutonomousError | None),
    "is not the whole answer of a good reply": lambda case: (
        case.whole and (case.error is not None or case.text != case.answer)
    ),
    "takes a part for the whole": lambda case: not case.whole and case.error is None,
    "has text that was not sent, or twice": lambda case: not case.answer.startswith(case.text),
    "loses the text before an error": lambda case: case.acts[-1].startswith("in the text") and not case.text,
    "makes too few attempts, or too many": lambda case: (
        case.attempts != len(case.acts) and not UNSURE.intersection(case.acts)
    ),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_no_prompt(wrong: str, storm: Storm) -> None:
    """Each prompt ends in its answer, exactly, or in an error after what came of it."""
    found = [case for case in storm.cases if WRONG[wrong](case)]
    assert [(case.number, case.dialect, case.acts, case.text, case.error) for case in found] == []


def test_plain_prompts_work_after_the_storm(storm: Storm) -> None:
    """Neither the sync client nor the one of the event loop is worse for it, and no redirect was followed."""
    assert storm.plain == ["llama heard: still there?"] * 2
    assert storm.lost == []


def test_storm_leaves_no_connection(storm: Storm) -> None:
    """No connection is still in a reply: prompts share those that are open. The end of the loop leaves none that an
    async prompt used, and the end of the sync client leaves none at all."""
    assert storm.replying == 0
    assert 0 < storm.open <= THREADS + TASKS
    assert storm.open_after_loop == set()
    assert storm.open_at_the_end == 0
