"""A small real HTTP/1.1 server on 127.0.0.1 that speaks the wire format of the Autonomous service.

    python tests/loopback.py llm -m autonomous-llama "Hello"    runs a command against it
    python tests/loopback.py                                    serves until Ctrl-C

An *answer* is an async function that is given one `Request` and writes to its `Connection`. `speak` is the one
that follows the protocol: its text says what it was told. Tests put others in `Loopback.answers`.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import contextlib
import json
import os
import re
import signal
import socket
import ssl
import struct
import subprocess
import sys
import threading
import traceback
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from typing_extensions import Self

# Written out again from the protocol, so that the tests do not take the plugin's word for it.
ENDPOINTS = {
    "llama": "chat",
    "qwen_coder": "chat",
    "hermes": "chat-hermes",
    "vision": "chat-vision",
    "summary": "summary",
}
BACKENDS = {
    "llama": "llama-3.3-70b",
    "qwen_coder": "qwen-2.5-coder-32b",
    "hermes": "hermes-3",
    "vision": "llama-3.2-90b",
    "summary": "llama-3.2-70b",
}
PREFIX = "/api/v1/ai/"
DONE = b"data: [DONE]\n\n"
PATIENCE = 60  # seconds; a client that stays for so long at a reply that leads nowhere hangs


def event(chunk: object) -> bytes:
    """One server-sent event."""
    return b"data: " + json.dumps(chunk).encode() + b"\n\n"


def delta(text: str | None = None, finish_reason: str | None = None, **envelope: Any) -> dict[str, Any]:
    """One chat-completion chunk."""
    return {
        "id": "chatcmpl-loopback",
        "object": "chat.completion.chunk",
        "created": 1738368000,
        **envelope,
        "choices": [{"index": 0, "delta": {"content": text} if text else {}, "finish_reason": finish_reason}],
    }


@dataclass
class Request:
    """One request as it came: `method`, `path`, `headers` (names in lower case), `body`."""

    method: str
    path: str
    headers: dict[str, str]
    body: bytes
    connection: int  # which connection of the server it came on, from 1

    @property
    def payload(self) -> dict[str, Any]:
        payload = json.loads(self.body)
        assert isinstance(payload, dict)
        return payload

    @property
    def messages(self) -> list[dict[str, Any]]:
        messages: list[dict[str, Any]] = json.loads(base64.b64decode(self.payload["messages"], validate=True))
        return messages


@dataclass
class Connection:
    """The server's end of one connection, for one reply."""

    writer: asyncio.StreamWriter
    chunked: bool = False
    dropped: bool = False
    stopping: asyncio.Event = field(default_factory=asyncio.Event)

    async def head(
        self, status: str = "200 OK", headers: dict[str, str] | None = None, length: int | None = None
    ) -> None:
        """Send the head; a body follows by `send` and `end` (chunked) or, given its length, by `raw`."""
        self.chunked = length is None
        lines = {"content-type": "text/event-stream", **(headers or {})}
        lines |= {"transfer-encoding": "chunked"} if length is None else {"content-length": str(length)}
        text = "".join(f"{name}: {value}\r\n" for name, value in lines.items())
        await self.raw(f"HTTP/1.1 {status}\r\n{text}\r\n".encode("latin-1"))

    async def send(self, data: bytes) -> None:
        """Send a piece of the body, as one HTTP chunk."""
        await self.raw(b"%x\r\n%s\r\n" % (len(data), data))

    async def end(self) -> None:
        await self.raw(b"0\r\n\r\n")

    async def raw(self, data: bytes) -> None:
        self.writer.write(data)
        await self.writer.drain()

    async def whole(self, body: bytes, status: str = "200 OK", headers: dict[str, str] | None = None) -> None:
        """Send a reply that is complete."""
        await self.head(status, {"content-type": "application/json", **(headers or {})}, len(body))
        await self.raw(body)

    async def drop(self, reset: bool = False) -> None:
        """Close the connection, whatever was promised."""
        self.dropped = True
        if reset:  # a close that lingers for no time is a TCP reset
            linger = struct.pack("ii", 1, 0)
            self.writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            self.writer.transport.abort()

    async def stall(self) -> None:
        """Send nothing more, until the client goes or the server stops."""
        self.dropped = True
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(self.stopping.wait(), PATIENCE)
            return
        raise AssertionError(f"the client still waits after {PATIENCE} s")

    async def drip(self, data: bytes, pause: float = 0.01) -> None:
        """Send the same piece again and again, with ``pause`` seconds in between, until the client goes."""
        for _ in range(int(PATIENCE / pause)):
            await self.send(data)
            await asyncio.sleep(pause)
        raise AssertionError(f"the client still reads after {PATIENCE} s")


Answer = Callable[[Request, Connection], Awaitable[None]]


# A paragraph that is not the writer's of a message, but the client's: how to call tools, or the schema to follow.
INSTRUCTIONS = re.compile(r"\s*^[^\n]*(\n<tools>\n|JSON schema:\n\{).*?(?=\n\n|\Z)", re.DOTALL | re.MULTILINE)


def text_of(message: dict[str, Any]) -> str:
    """The text in a message."""
    content = message["content"]
    return content if isinstance(content, str) else " ".join(part["text"] for part in content if "text" in part)


def own_text(message: dict[str, Any]) -> str:
    """The text in a message without the instructions that the client added."""
    text, removed = INSTRUCTIONS.subn("", text_of(message))
    return text.strip("\n") if removed else text


def describe(request: Request) -> str:
    """What a request told the server, in words."""
    system = [text for message in request.messages if message["role"] == "system" and (text := own_text(message))]
    *before, last = [message for message in request.messages if message["role"] != "system"] or [{"content": ""}]
    parts = last["content"] if isinstance(last["content"], list) else []
    urls = [part["image_url"]["url"] for part in parts if part["type"] == "image_url"]
    words = [f"{request.payload['aiAgent']} heard: {own_text(last)}"]
    if system:
        words.append(f"System prompt: {' '.join(system)}")
    if before:
        words.append(f"Messages before: {len(before)}, the last: {own_text(before[-1])}")
    if urls:
        words.append(f"Pictures: {', '.join(url.partition(',')[0] for url in urls)}")
    return "\n".join(words)


TOOLS = re.compile(r"<tools>\n(.*?)\n</tools>", re.DOTALL)
RESULT = re.compile(
    r"^The tool (\w+) returned:\n(.*?)(?=\nThe tool \w+ returned:\n|\nUse these results)", re.DOTALL | re.MULTILINE
)
SCHEMA = re.compile(r"JSON schema:\n(\{.*\})$", re.MULTILINE)
CALL = re.compile(r"Call (\w+) with (\{.*?\})(?: |$)")


def follow(request: Request) -> str | None:
    """What a model answers that was given tools or a schema and does as it is told; None where it was given neither.

    It calls what "Call NAME with JSON" names, says what the results were, and fills a schema with what it heard. Tools
    and schema stand in the system prompt, which is part of the first message if there are pictures. The schema may also
    stand after the results of tools, or in the correction of an answer.
    """
    first = request.messages[0]
    by_user = [message for message in request.messages if message["role"] == "user"]
    heard = text_of(by_user[-1]) if by_user else ""
    tools, schema = TOOLS.search(text_of(first)), SCHEMA.search(heard) or SCHEMA.search(text_of(first))
    names = {json.loads(line)["name"] for line in tools[1].splitlines()} if tools else set()
    calls = [{"name": name, "arguments": json.loads(given)} for name, given in CALL.findall(heard) if name in names]
    if calls:
        return "\n".join(f"<tool_call>\n{json.dumps(call)}\n</tool_call>" for call in calls)
    results = RESULT.findall(heard) if tools else []
    said = ", ".join(f"{name} said {result}" for name, result in results)
    if schema:
        root = json.loads(schema[1])
        asked = [message for message in by_user if message is first or not SCHEMA.search(text_of(message))] or by_user
        return json.dumps(fill(root, root, said or (own_text(asked[-1]) if asked else "")))
    return f"{request.payload['aiAgent']}: {said}" if said else None


def fill(schema: dict[str, Any], root: dict[str, Any], heard: str) -> Any:
    """A value that matches a simple schema, whose texts are what was heard."""
    if "$ref" in schema:
        return fill(root["$defs"][schema["$ref"].rpartition("/")[2]], root, heard)
    if "anyOf" in schema:
        return fill(schema["anyOf"][0], root, heard)
    kind = schema.get("type")
    if kind == "object":
        return {name: fill(nested, root, heard) for name, nested in schema.get("properties", {}).items()}
    if kind == "array":
        return [fill(schema.get("items", {}), root, heard)]
    numbers = re.findall(r"\d+", heard)
    return {"integer": int(numbers[0]) if numbers else 1, "number": 1.5, "boolean": True, "null": None}.get(kind, heard)


def check(request: Request) -> str | None:
    """What is wrong with a request, by the protocol."""
    try:
        payload, messages = request.payload, request.messages
    except (ValueError, TypeError, KeyError, AssertionError, binascii.Error) as error:
        return f"the body cannot be read: {error}"
    model = payload.get("aiAgent")
    if sorted(payload) != ["aiAgent", "messages", "stream", "threadId"]:
        return f"the keys of the body are {sorted(payload)}"
    if model not in ENDPOINTS or payload["threadId"] != model:
        return f"unknown model {model}"
    if not request.path.endswith(PREFIX + ENDPOINTS[model]) or request.method != "POST":
        return f"{model} is not at {request.method} {request.path}"
    if not messages or any(sorted(message) != ["content", "role"] for message in messages):
        return "the messages are not of roles and contents"
    return None


def speak(pause: float = 0.0) -> Answer:
    """The answer that follows the protocol, with ``pause`` seconds between its words."""

    async def answer(request: Request, connection: Connection) -> None:
        if wrong := check(request):
            await connection.whole(json.dumps({"error": {"message": wrong}}).encode(), "400 Bad Request")
            return
        words = re.findall(r"\S+\s*|\s+", follow(request) or describe(request))
        model = BACKENDS[request.payload["aiAgent"]]
        asked = sum(len(str(message["content"]).split()) for message in request.messages)
        usage = {"prompt_tokens": asked, "completion_tokens": len(words), "total_tokens": asked + len(words)}
        if not request.payload["stream"]:
            completion = delta(finish_reason="stop", model=model, usage=usage)
            completion["object"] = "chat.completion"
            completion["choices"][0].pop("delta")
            completion["choices"][0]["message"] = {"role": "assistant", "content": "".join(words)}
            await connection.whole(json.dumps(completion).encode())
            return
        await connection.head()
        for word in words:
            await connection.send(event(delta(word, model=model)))
            if pause:
                await asyncio.sleep(pause)
        await connection.send(event(delta(finish_reason="stop", model=model)))
        await connection.send(event({**delta(model=model), "choices": [], "usage": usage}))
        await connection.send(DONE)
        await connection.end()

    return answer


def say(pieces: Iterable[bytes], pause: float = 0.0, **head: Any) -> Answer:
    """An answer of these very bytes, each piece in an HTTP chunk of its own."""
    pieces = list(pieces)

    async def answer(request: Request, connection: Connection) -> None:
        await connection.head(**head)
        for piece in pieces:
            await connection.send(piece)
            if pause:
                await asyncio.sleep(pause)
        await connection.end()

    return answer


class Reader(asyncio.StreamReader):
    """What comes from a client, and word of when nothing more will."""

    def __init__(self) -> None:
        super().__init__()
        self.gone = asyncio.Event()

    def feed_eof(self) -> None:
        super().feed_eof()
        self.gone.set()

    def set_exception(self, exc: Exception) -> None:
        super().set_exception(exc)
        self.gone.set()


class Server:
    """A server on 127.0.0.1 in a thread of its own, for the length of a ``with``; its kinds say how to `converse`."""

    def __init__(self, tls: ssl.SSLContext | None = None) -> None:
        self._tls = tls
        self._ready = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve()), daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        self._ready.wait()
        return self

    def __exit__(self, *exception: object) -> None:
        self._loop.call_soon_threadsafe(self._stopping.set)
        self._thread.join()

    async def _serve(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._stopping = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()
        server = await self._loop.create_server(
            lambda: asyncio.StreamReaderProtocol(Reader(), self._accept), "127.0.0.1", ssl=self._tls, backlog=2048
        )
        self.port: int = server.sockets[0].getsockname()[1]
        self._ready.set()
        await self._stopping.wait()
        server.close()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _accept(self, reader: Reader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        try:
            with contextlib.suppress(OSError, EOFError, asyncio.CancelledError):
                await self.converse(reader, writer)
        finally:
            writer.close()
            if self._tls:  # would wait for the client's goodbye, which a loop that ends does not
                writer.transport.abort()
            self._tasks.discard(task)

    async def converse(self, reader: Reader, writer: asyncio.StreamWriter) -> None:
        """Serve one connection to its end."""
        raise NotImplementedError


class Loopback(Server):
    """The server of the wire format: ``with Loopback() as server: ... server.url``."""

    def __init__(self, answer: Answer | None = None, tls: ssl.SSLContext | None = None) -> None:
        super().__init__(tls)
        self.answer = answer or speak()  # for every request
        self.answers: deque[Answer] = deque()  # one for each of the next requests, before that
        self.requests: list[Request] = []
        self.connections = 0  # accepted so far
        self.open: set[int] = set()  # those that are open now, by number
        self.errors: list[BaseException] = []

    def __exit__(self, *exception: object) -> None:
        super().__exit__()
        if self.errors:
            raise self.errors[0]

    @property
    def url(self) -> str:
        return f"{'https' if self._tls else 'http'}://127.0.0.1:{self.port}"

    @property
    def last(self) -> Request:
        return self.requests[-1]

    async def converse(self, reader: Reader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        number = self.connections
        self.open.add(number)
        try:
            async for request in self._read(reader, number):
                self.requests.append(request)
                connection = Connection(writer, stopping=self._stopping)
                answer = self.answers.popleft() if self.answers else self.answer
                # The client sends nothing before the reply is over.
                gone = asyncio.create_task(reader.gone.wait())
                answering = asyncio.ensure_future(answer(request, connection))
                await asyncio.wait({gone, answering}, return_when=asyncio.FIRST_COMPLETED)
                client_left = not answering.done()
                for unfinished in (gone, answering):
                    unfinished.cancel()
                await asyncio.gather(gone, answering, return_exceptions=True)
                if not client_left:
                    answering.result()
                if client_left or connection.dropped:
                    break
        except OSError:  # the connection broke, in TLS or below it
            pass
        except Exception as error:  # the server's own: a person should see it at once, and a test at the end
            traceback.print_exception(error)
            self.errors.append(error)
        finally:
            self.open.discard(number)

    async def _read(self, reader: asyncio.StreamReader, number: int) -> AsyncIterator[Request]:
        while True:
            try:
                head = await reader.readuntil(b"\r\n\r\n")
            except asyncio.IncompleteReadError:
                return
            first, *lines = head.decode("latin-1").split("\r\n")
            method, path, _ = first.split(" ")
            pairs = (line.partition(":") for line in lines if line)
            headers = {name.strip().lower(): value.strip() for name, _, value in pairs}
            body = await reader.readexactly(int(headers.get("content-length", 0)))
            yield Request(method, path, headers, body, number)


def environment(url: str) -> dict[str, str]:
    """The environment in which a command talks to the server at ``url``, and finds the `llm` of this Python."""
    scripts = str(Path(sys.executable).parent)
    path = os.pathsep.join((scripts, os.environ.get("PATH", os.defpath)))
    return {**os.environ, "AUTONOMOUS_BASE_URL": url, "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1", "PATH": path}


def run(command: list[str], url: str) -> int:
    """Run a command that talks to the server at ``url``, or serve until Ctrl-C if there is none. Its exit code."""
    if not command:
        _default_interrupt()
        try:
            print(f"export AUTONOMOUS_BASE_URL={url}", flush=True)
            signal.pause()
        except KeyboardInterrupt:
            return 0
    # Ctrl-C is the command's to handle: it goes to both.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        process = subprocess.Popen(command, env=environment(url), preexec_fn=_default_interrupt)
    except OSError as error:
        print(f"{command[0]}: {error.strerror}", file=sys.stderr)
        return 127
    code = process.wait()
    return code if code >= 0 else 128 - code


def _default_interrupt() -> None:
    """Let Ctrl-C interrupt again. A script that starts a command with ``&`` makes it ignore Ctrl-C."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


if __name__ == "__main__":
    with Loopback(speak(pause=0.02)) as loopback:
        exit_code = run(sys.argv[1:], loopback.url)
    sys.exit(exit_code)
