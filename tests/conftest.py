"""What the tests share: a clean environment, a server, and one way to ask it, sync and async."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import functools
import itertools
import json
import os
import select
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import llm
import pytest
from click.testing import CliRunner
from llm.cli import cli
from llm.parts import Message, TextPart
from loopback import DONE, Connection, Loopback, Request, delta, environment, event, say
from loopback import Answer as Reply
from proxies import until

import llm_autonomous
from llm_autonomous import Attempt, AutonomousError, Exchange

NOWHERE = "http://127.0.0.1:1"
DEADLINE = 60  # seconds, by which a command has ended unless it hangs

Command = subprocess.Popen[str]
Start = Callable[..., Command]

PNG = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
)

STOP = event(delta(finish_reason="stop")) + DONE
NOW_TAG = '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>'
DOG = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "age": {"type": "integer"}},
    "required": ["name", "age"],
}
CLEO = '{"name": "Cleo", "age": 4}'

# Each look-up makes all models of all plugins again, which costs the oldest llm 0.3 s.
get_model = functools.cache(llm.get_model)
get_async_model = functools.cache(llm.get_async_model)


@dataclass
class Answer:
    """What came of a prompt: the pieces of text in the order they came, and the error that ended it, if any."""

    response: Any
    chunks: list[str] = field(default_factory=list)
    error: AutonomousError | None = None

    @property
    def text(self) -> str:
        if self.error:
            raise self.error
        return "".join(self.chunks)

    @property
    def line(self) -> str:
        """The error's words, which are one line."""
        assert self.error is not None, f"no error, but {self.chunks}"
        assert self.error.message.isprintable()
        assert str(self.error) == self.error.message
        return self.error.message


def ask_sync(prompt: str | None = "hi", model: str = "autonomous-llama", **kwargs: Any) -> Answer:
    answer = Answer(get_model(model).prompt(prompt, **kwargs))
    try:
        for chunk in answer.response:
            answer.chunks.append(chunk)
    except AutonomousError as error:
        answer.error = error
    return answer


async def ask_async(prompt: str | None = "hi", model: str = "autonomous-llama", **kwargs: Any) -> Answer:
    answer = Answer(get_async_model(model).prompt(prompt, **kwargs))
    try:
        async for chunk in answer.response:
            answer.chunks.append(chunk)
    except AutonomousError as error:
        answer.error = error
    return answer


Ask = Callable[..., Answer]


@pytest.fixture(params=["sync", "async"])
def ask(request: pytest.FixtureRequest) -> Ask:
    """``ask(prompt, model=..., **kwargs)`` prompts a model and gives an `Answer`; async in a loop of its own."""
    if request.param == "sync":
        return ask_sync
    return lambda *args, **kwargs: asyncio.run(ask_async(*args, **kwargs))


def new_attempt(model: str = "autonomous-llama", **kwargs: Any) -> Attempt:
    """An attempt that is not sent: it reads the reply that a test gives it."""
    response = get_model(model).prompt("hi", **kwargs)
    return Attempt(Exchange(response.model, response.prompt, True, response, None))


@dataclass
class Chained:
    """What came of a chain: the pieces of text, the responses with their messages, and the error that ended it."""

    chunks: list[str] = field(default_factory=list)
    responses: list[Any] = field(default_factory=list)
    messages: list[list[Message]] = field(default_factory=list)  # of each response
    error: AutonomousError | None = None

    @property
    def text(self) -> str:
        if self.error:
            raise self.error
        return "".join(self.chunks)

    @property
    def calls(self) -> list[list[tuple[str, dict[str, Any]]]]:
        """The calls that each response made."""
        return [[(call.name, call.arguments) for call in r.tool_calls_or_raise()] for r in self.responses]

    def parts(self, number: int) -> list[Any]:
        """The texts and the calls of one response, in order."""
        [message] = self.messages[number]
        return [p.text if isinstance(p, TextPart) else (p.name, p.arguments) for p in message.parts]


Chain = Callable[..., Chained]


def chain_sync(prompt: str | None = "hi", model: str = "autonomous-llama", **kwargs: Any) -> Chained:
    chained, conversation = Chained(), get_model(model).conversation()
    chained.responses = conversation.responses
    try:
        for chunk in conversation.chain(prompt, chain_limit=9, **kwargs):
            chained.chunks.append(chunk)
        chained.messages = [response.messages() for response in conversation.responses]
    except AutonomousError as error:
        chained.error = error
    return chained


async def chain_async(prompt: str | None = "hi", model: str = "autonomous-llama", **kwargs: Any) -> Chained:
    chained, conversation = Chained(), get_async_model(model).conversation()
    chained.responses = conversation.responses
    try:
        async for chunk in conversation.chain(prompt, chain_limit=9, **kwargs):
            chained.chunks.append(chunk)
        chained.messages = [await response.messages() for response in conversation.responses]
    except AutonomousError as error:
        chained.error = error
    return chained


@pytest.fixture(params=["sync", "async"])
def chain(request: pytest.FixtureRequest) -> Chain:
    """``chain(prompt, model=..., tools=..., **kwargs)`` prompts, calls the tools and gives a `Chained`."""
    if request.param == "sync":
        return chain_sync
    return lambda *args, **kwargs: asyncio.run(chain_async(*args, **kwargs))


def now() -> str:
    return "noon"


def texts(*pieces: str, usage: dict[str, Any] | None = None) -> Reply:
    """An answer of these pieces of text."""
    last = [event({"choices": [], "usage": usage})] if usage else []
    return say([*(event(delta(piece)) for piece in pieces), *last, STOP])


def cut(*pieces: str) -> Reply:
    """An answer of these pieces, after which the connection is lost."""

    async def answer(request: Request, connection: Connection) -> None:
        await connection.head()
        for piece in pieces:
            await connection.send(event(delta(piece)))
        await connection.drop()

    return answer


async def refuse(request: Request, connection: Connection) -> None:
    await connection.whole(b"overloaded", "503 Service Unavailable")


@pytest.fixture(scope="session", autouse=True)
def ctrl_c() -> None:
    """Ctrl-C interrupts the processes that tests start, even if a script started the tests with ``&``.

    Such a script's shell makes them ignore it, and a process passes that on to those that it starts.
    """
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


numbers = itertools.count()


def close_connections() -> None:
    """Close the connections that sync prompts keep for the next one. Those of async prompts end with their loop."""
    llm_autonomous.close_clients()


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """No proxies, no user's settings, no coverage of processes, and no connection of an earlier test."""
    for name in list(os.environ):
        if name.lower().endswith("_proxy") or name.startswith(("AUTONOMOUS_", "COVERAGE_", "LLM_", "SSL_CERT_")):
            monkeypatch.delenv(name)
    # Only named: `llm` makes it where it is needed, and `mktemp` would look through the folders of all tests before.
    monkeypatch.setenv("LLM_USER_PATH", str(tmp_path_factory.getbasetemp() / f"llm{next(numbers)}"))
    yield
    close_connections()


@pytest.fixture
def no_backoff(monkeypatch: pytest.MonkeyPatch) -> None:
    """Attempts follow each other at once."""
    monkeypatch.setattr(llm_autonomous, "BACKOFF", (0.0, 0.0))


@pytest.fixture
def sleeps(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The waits that a prompt asked for, in seconds, none of which is waited."""
    waits: list[float] = []
    asleep, prompting = asyncio.sleep, threading.get_ident()

    async def sleep(seconds: float) -> None:
        if threading.get_ident() == prompting:
            waits.append(seconds)
        else:  # the server's
            await asleep(seconds)

    monkeypatch.setattr(asyncio, "sleep", sleep)
    monkeypatch.setattr(time, "sleep", waits.append)
    return waits


@pytest.fixture
def cpu_guard() -> Iterator[None]:
    """What is not linear would take hours at the sizes of these tests: it fails after 10 s of CPU instead."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise AssertionError("10 s of CPU for what takes a fraction of one")

    before = signal.signal(signal.SIGVTALRM, stop)
    signal.setitimer(signal.ITIMER_VIRTUAL, 10)
    yield
    signal.setitimer(signal.ITIMER_VIRTUAL, 0)
    signal.signal(signal.SIGVTALRM, before)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Loopback]:
    """A `Loopback` that the models talk to."""
    with Loopback() as loopback:
        monkeypatch.setenv("AUTONOMOUS_BASE_URL", loopback.url)
        yield loopback


@pytest.fixture
def user_path() -> Path:
    path = Path(os.environ["LLM_USER_PATH"])
    path.mkdir()
    return path


def invoke(*arguments: str, typed: str | None = None) -> tuple[str, str, int]:
    """What `llm` says, what it complains of, and its exit code: in this process, which saves the 0.7 s of another.

    What it logs as a warning is not there: pytest takes it.
    """
    result = CliRunner().invoke(cli, arguments, input=typed, prog_name="llm")
    assert isinstance(result.exception, SystemExit | None), result.exception  # it would be a traceback
    return result.stdout, result.stderr, result.exit_code


def run(*arguments: str, typed: str | None = None) -> str:
    """What `llm` says where nothing is wrong."""
    stdout, stderr, code = invoke(*arguments, typed=typed)
    assert (stderr, code) == ("", 0)
    return stdout


@pytest.fixture(name="start")
def start_fixture() -> Iterator[Start]:
    """``start(*command, url=..., typed=...)`` starts a process; what is left of it goes with the test."""
    processes: list[Command] = []

    def start(
        *command: str, url: str = NOWHERE, typed: str = "", stderr: int = subprocess.PIPE, **variables: str
    ) -> Command:
        settings = {**environment(url), **variables}
        settings.pop("PYTHONUNBUFFERED", None)  # it would hide that a line is not flushed
        process = subprocess.Popen(
            command,
            env=settings,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=stderr,
            encoding="utf-8",
            start_new_session=True,  # so that a test can send Ctrl-C to all of it, as a terminal does
        )
        processes.append(process)
        assert process.stdin is not None
        with contextlib.suppress(BrokenPipeError), process.stdin as stdin:
            stdin.write(typed)
        process.stdin = None
        return process

    yield start
    for process in processes:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def output_until(process: Command, end: str) -> str:
    """What a command that is still running prints, up to ``end``."""
    assert process.stdout is not None
    printed = b""
    while not printed.endswith(end.encode()):
        ready, _, _ = select.select([process.stdout], [], [], DEADLINE)
        data = os.read(process.stdout.fileno(), 1) if ready else b""
        assert data, f"{printed!r} is all that was printed"
        printed += data
    return printed.decode()


def interrupt(process: Command) -> None:
    """Press Ctrl-C once a process waits for something, as far as that can be known: Linux says it.

    Python would only see a signal that comes just before it waits when the wait is over. And before 3.11, asyncio lets
    KeyboardInterrupt come anywhere, such as in the middle of anyio's own work, which then ends in a RuntimeError.
    """
    state = Path(f"/proc/{process.pid}/stat")
    assert not state.exists() or until(lambda: state.read_text().rpartition(") ")[2].startswith("S"))
    process.send_signal(signal.SIGINT)


def finish(process: Command) -> tuple[str, str, int]:
    """What a command said, what it complained of, and its exit code."""
    stdout, stderr = process.communicate(timeout=DEADLINE)
    return stdout, stderr, process.returncode


USAGE = {"prompt_tokens": 5, "completion_tokens": 2, "total_tokens": 7}


async def complete(request: Request, connection: Connection) -> None:
    """Answer as OpenAI does: with what the last message was, and with usage in a stream only if it was asked for."""
    text = f"upstream heard: {request.payload['messages'][-1]['content']}"
    if not request.payload["stream"]:
        message = {"role": "assistant", "content": text}
        choice = {"index": 0, "message": message, "finish_reason": "stop"}
        await connection.whole(json.dumps({"model": "tiny", "choices": [choice], "usage": USAGE}).encode())
        return
    await connection.head()
    for word in text.split(" "):
        await connection.send(event(delta(f"{word} ", model="tiny")))
    await connection.send(event(delta(finish_reason="stop", model="tiny")))
    if request.payload.get("stream_options") == {"include_usage": True}:
        await connection.send(event({"choices": [], "usage": USAGE}))
    await connection.send(DONE)
    await connection.end()
