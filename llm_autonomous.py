"""An LLM plugin for the models of Autonomous AI, a free service that needs no key and is often down.

An *exchange* is one prompt and everything done to get it answered. Each try is an *attempt*, and what the server sends
back is its *reply*. The answer comes out of the reply in *pieces*: text and tool calls. If the model makes a mistake,
a *correction* tells it what was wrong, and it answers again.

The module follows a prompt on its way: the models, registering them, what is sent, how the reply is read, what can go
wrong, retries, connections, what moves the bytes, and at the end `llm autonomous check`. Everything up to the retries
does no I/O and is shared by sync and async.
"""

from __future__ import annotations

import ast
import atexit
import base64
import contextlib
import datetime
import email.utils
import functools
import importlib.metadata
import io
import json
import logging
import os
import random
import re
import sys
import threading
import time
import uuid
import warnings
import weakref
import zlib
from collections.abc import AsyncGenerator, Callable, Collection, Iterable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple, cast
from urllib.parse import quote, unquote, urlsplit

import click
import llm
from llm.models import ModelWithAliases
from llm.parts import AttachmentPart, Part, StreamEvent, TextPart, ToolCallPart, ToolResultPart
from llm.utils import simplify_usage_dict
from pydantic import ConfigDict, Field, ValidationError, field_validator

if TYPE_CHECKING:
    # These are imported where they are used. Every `llm` command loads this plugin, and `llm --help` should not have
    # to wait for an HTTP client.
    import asyncio
    import ssl

    import httpx

logger = logging.getLogger(__name__)

BASE_URL = "https://chatgpt.autonomous.ai"
BASE_URL_VARIABLE = "AUTONOMOUS_BASE_URL"
# Besides its arguments, these decide how httpx sets up a client.
PROXY_VARIABLES = tuple(
    name for lower in ("http_proxy", "https_proxy", "all_proxy", "no_proxy") for name in (lower, lower.upper())
)
CERTIFICATE_VARIABLES = ("SSL_CERT_FILE", "SSL_CERT_DIR")

DEFAULT_TIMEOUT = 120.0  # seconds of silence, before and within a reply
MAX_TIMEOUT = 86_400.0  # seconds; operating systems refuse to wait for weeks
CONNECT_TIMEOUT = 10.0  # seconds to connect
DRAIN_TIMEOUT = 0.5  # seconds for the reply to end once the answer is complete
FINISH_TIMEOUT = 3.0  # seconds for usage and the end of the reply to arrive after a finish reason
ERROR_BODY_TIMEOUT = 5.0  # seconds for the body of an error status to arrive
KEEPALIVE = 60.0  # seconds that an idle connection stays open for the next prompt
POOL_SIZE = 32  # concurrent async prompts per connection pool

ATTEMPTS = 3  # per prompt, including the first
BACKOFF = (0.5, 1.0)  # seconds before the second and third attempt, plus or minus JITTER
JITTER = 0.25  # as a fraction of the wait
MAX_RETRY_AFTER = 10.0  # seconds; if the server asks for more, the prompt fails at once
RETRY_STATUSES = frozenset({408, 429, 500, 502, 503, 504})

# A finish reason with none of these words means that the answer may be cut short.
USUAL_FINISH_REASON = (
    r"(?i)(?<![a-z])(stop(ped)?|eo[st]|end|completed?|done|finish(ed)?$|success|normal|tool|function)(?![a-z])"
)
NO_FINISH_REASONS = ("", "null", "none", "undefined")
THINKING_TAGS = ("<think>", "<scratch_pad>")
# The content codings that IANA has registered. Servers also send other words, such as utf-8, which are ignored.
CODINGS = r"\b(aes128gcm|br|deflate|exi|dcb|dcz|(x-)?compress|(pack200-|x-)?gzip|zstd)\b"

MAX_EVENT_BYTES = 16 * 1024 * 1024  # one event, one line, or one whole JSON reply
MAX_PAGE_BYTES = 64 * 1024  # of an error body, and of a web page whose title is wanted
MAX_HELD = 256  # characters to hold while it is unclear whether they begin a tool call or reasoning
MAX_CHOICES = 8  # chunks to hold while it is unclear whether their index numbers them or names a choice
MAX_LITERAL = 64 * 1024  # characters of a tool call written in Python's syntax
MAX_EXCERPT = 300  # characters of the server's own words in an error


# The models


class ServiceModel(NamedTuple):
    """One model of the service, as the table in PROTOCOL.md has it."""

    name: str  # goes into `aiAgent` and `threadId`
    endpoint: str  # below /api/v1/ai/
    backend: str  # the model behind it, and its bare alias
    own_aliases: tuple[str, ...] = ()
    attachment_types: frozenset[str] = frozenset()

    @property
    def model_id(self) -> str:
        return f"autonomous-{self.name}"

    @property
    def aliases(self) -> tuple[str, ...]:
        return (*self.own_aliases, f"autonomous-{self.backend}")


IMAGE_TYPES = frozenset({"image/png", "image/jpeg", "image/webp", "image/gif"})

SERVICE_MODELS = (
    ServiceModel("llama", "chat", "llama-3.3-70b", ("autonomous",)),
    ServiceModel("qwen_coder", "chat", "qwen-2.5-coder-32b", ("autonomous-qwen-coder",)),
    ServiceModel("hermes", "chat-hermes", "hermes-3"),
    ServiceModel("vision", "chat-vision", "llama-3.2-90b", attachment_types=IMAGE_TYPES),
    ServiceModel("summary", "summary", "llama-3.2-70b"),
)


# Registration: touches neither network nor files, and cannot raise


@llm.hookimpl(trylast=True)
def register_models(register: Callable[..., None], model_aliases: list[ModelWithAliases]) -> None:
    for service in SERVICE_MODELS:
        aliases = [*service.aliases]
        # Other plugins may offer the same backend under its bare name. Running last, we see which names are free.
        taken = {name for known in model_aliases for name in (known.model.model_id, *known.aliases)}
        if service.backend not in taken:
            aliases.append(service.backend)
        register(Autonomous(service), AsyncAutonomous(service), aliases=aliases)


# What is sent


class AutonomousOptions(llm.Options):
    # A proxy URL may contain a password, so validation errors must not repeat it.
    model_config = ConfigDict(hide_input_in_errors=True)

    proxy: str | None = Field(
        default=None,
        description=(
            "Proxy to use: an http://, https://, socks5:// or socks5h:// URL. LLM logs options, so if the proxy needs "
            "a password, set HTTPS_PROXY instead."
        ),
    )
    timeout: float | None = Field(
        default=None,
        gt=0,
        le=MAX_TIMEOUT,
        description=f"Seconds to wait for more of the reply before the prompt fails. Default: {DEFAULT_TIMEOUT:g}.",
    )

    @field_validator("proxy")
    @classmethod
    def check_proxy(cls, proxy: str | None) -> str | None:
        if proxy is None:
            return None
        if "@" in proxy:
            raise ValueError("a proxy with a user name or password would be logged: set HTTPS_PROXY instead")
        if not is_proxy_url(proxy):
            raise ValueError("must be an http://, https://, socks5:// or socks5h:// URL with a host")
        return proxy


def is_proxy_url(url: str) -> bool:
    try:
        parts = urlsplit(url)
        return parts.port != 0 and parts.scheme in ("http", "https", "socks5", "socks5h") and bool(parts.hostname)
    except ValueError:  # such as a port that is not a number
        return False


# Chosen by measurement: tests/README.md has the wordings that were tried, and what a real model did with each.
TOOL_INSTRUCTIONS = """\
You can use these tools:
<tools>
{tools}
</tools>
Most requests need no tool: answer them directly. If a tool can do what the user asks, call it instead of answering. \
Do not guess arguments: if another tool gives you a value that you need, call that tool first. To call tools, reply \
with one <tool_call> for each call, with the name of the tool and its arguments as JSON:
<tool_call>
{{"name": <tool-name>, "arguments": <args-json-object>}}
</tool_call>
<tool_call>
{{"name": <tool-name>, "arguments": <args-json-object>}}
</tool_call>
You will get the results in the next message. If no tool fits the request, answer the user directly."""
RESULT = "The tool {name} returned:\n{output}"
AFTER_RESULTS = "Use these results to answer my request. If you still need another tool for it, call that tool now."
EMPTY_CORRECTION = "Your reply was empty. Answer my request with the results of the tools."
SCHEMA_INSTRUCTIONS = """\
Reply with a JSON value that follows this JSON schema:
{schema}
Fill in the values. Output only the JSON, like this:
{example}"""


def tool_instructions(tools: list[llm.Tool]) -> str:
    """How to call the tools: part of the system prompt, as the wire format has no field for it."""
    fields = (("name", "name"), ("description", "description"), ("parameters", "input_schema"))
    described = ({key: value for key, field in fields if (value := getattr(tool, field))} for tool in tools)
    return TOOL_INSTRUCTIONS.format(tools="\n".join(json.dumps(tool, ensure_ascii=False) for tool in described))


def schema_instructions(schema: dict[str, Any]) -> str:
    """What tells the model to answer in JSON: the schema and an example."""
    example: Any = "..."
    with contextlib.suppress(AttributeError, LookupError, TypeError):  # if a $ref leads to something that is no schema
        example = example_of(schema, schema)
    written, example = (json.dumps(value, ensure_ascii=False) for value in (schema, example))
    return SCHEMA_INSTRUCTIONS.format(schema=written, example=example)


def example_of(schema: Any, root: dict[str, Any], depth: int = 8) -> Any:
    """A JSON value in the shape that a schema describes: ``"..."`` for a string, ``0`` for a number, and so on."""
    if not isinstance(schema, dict) or not depth:
        return "..."
    inner = functools.partial(example_of, root=root, depth=depth - 1)
    if schema.get("$ref", "").startswith("#/"):
        target: Any = root
        for key in schema["$ref"][2:].split("/"):
            target = target.get(key) if isinstance(target, dict) else None
        return inner(target)
    if choices := schema.get("anyOf") or schema.get("oneOf") or schema.get("allOf"):
        return inner(choices[0])
    if "const" in schema:
        return schema["const"]
    if "enum" in schema:
        return " or ".join(value if isinstance(value, str) else json.dumps(value) for value in schema["enum"])
    kind = schema.get("type")
    if isinstance(kind, list):
        kind = kind[0]
    if kind == "object" or "properties" in schema:
        return {name: inner(value) for name, value in schema.get("properties", {}).items()}
    if kind == "array":
        return [inner(schema.get("items"))]
    return {"integer": 0, "number": 0, "boolean": True, "null": None}.get(str(kind), "...")


def build_messages(
    messages: list[llm.Message],
    image_types: frozenset[str],
    tools: bool = False,
    instructions: str = "",
    after_results: str = "",
) -> list[dict[str, Any]]:
    """The whole conversation as PROTOCOL.md wants it: ``[{"role": …, "content": …}, …]``.

    ``content`` is a string, or a list of OpenAI content parts if there are images of ``image_types``. If this prompt
    has ``tools``, earlier tool calls and results are written in the form that the model knows. Otherwise they
    become notes in brackets, like everything else that the wire format cannot carry, so that a conversation started
    with another model can go on. Reasoning and empty messages are left out. ``instructions`` are added to the system
    prompt, and what the model has to do ``after_results`` to the last message if the model has not seen them yet.
    """
    built: list[dict[str, Any]] = []
    if instructions:
        own = messages[0].parts if messages and messages[0].role == "system" else []
        part = TextPart(f"\n\n{instructions}" if own else instructions)
        messages = [llm.Message(role="system", parts=[*own, part]), *messages[1 if own else 0 :]]
    if after_results and holds_new_results(messages):
        *before, last = messages
        gap = "\n\n" if last.parts and isinstance(last.parts[-1], TextPart) else ""
        messages = [*before, llm.Message(role=last.role, parts=[*last.parts, TextPart(gap + after_results)])]
    for message in messages:
        if content := build_content(message.parts, image_types, tools):
            role = message.role if message.role in ("system", "assistant") else "user"
            built.append({"role": role, "content": content})
    return built


def holds_new_results(messages: list[llm.Message]) -> bool:
    """Whether tools have run since the model last answered.

    Their results need not be the last message: what they attached follows in one of its own.
    """
    for message in reversed(messages):
        if message.role == "assistant":
            return False
        if any(isinstance(part, ToolResultPart) for part in message.parts):
            return True
    return False


def build_content(parts: list[Part], image_types: frozenset[str], tools: bool) -> str | list[dict[str, Any]]:
    """The ``content`` of one message: its text, or its text and then its images."""
    blocks: list[str] = []
    images: list[dict[str, Any]] = []
    previous: Part | None = None
    for part in parts:
        attachments: list[llm.Attachment] = []
        if isinstance(part, TextPart):
            if isinstance(previous, TextPart):
                blocks[-1] += part.text
            else:
                blocks.append(part.text)
        elif isinstance(part, AttachmentPart) and part.attachment:
            attachments = [part.attachment]
        elif isinstance(part, ToolCallPart):
            blocks.append(call_text(part, tools))
        elif isinstance(part, ToolResultPart):
            blocks.append(result_text(part, tools))
            attachments = part.attachments
        for attachment in attachments:
            if url := image_url(attachment, image_types):
                images.append({"type": "image_url", "image_url": {"url": url}})
            else:
                blocks.append(f"[{attachment.type or 'file'} attachment, not shown to this model]")
        previous = part
    text = "\n".join(block for block in blocks if block)
    if not images:
        return text
    return [{"type": "text", "text": text}, *images] if text else images


def call_text(part: ToolCallPart, tools: bool) -> str:
    if not tools:
        return f"[called the tool {part.name} with {json.dumps(part.arguments, default=str)}]"
    return tool_call({"name": part.name, "arguments": part.arguments})


def result_text(part: ToolResultPart, tools: bool) -> str:
    if not tools:
        return f"[the tool {part.name} {f'failed: {part.exception}' if part.exception else f'returned: {part.output}'}]"
    return RESULT.format(name=part.name, output=part.output or f"Error: {part.exception}")


def tool_call(value: dict[str, Any]) -> str:
    """A tool call as the model is asked to write it."""
    return f"<tool_call>\n{json.dumps(value, ensure_ascii=False, default=str)}\n</tool_call>"


def image_url(attachment: llm.Attachment, image_types: frozenset[str]) -> str | None:
    """The URL of an image of one of ``image_types``: its own, or a ``data:`` URL of its bytes. None for anything else.

    Nothing is fetched. `llm` has already asked the URL for its type, and a URL without one is taken to be an image.
    """
    if not image_types or (attachment.url and not attachment.content):
        return attachment.url if image_types and attachment.type in (None, *image_types) else None
    try:
        encoded, kind = attachment.base64_content(), attachment.resolve_type()
    except (OSError, TypeError, ValueError) as error:
        logger.warning("an image of this conversation is not sent, since it can no longer be read: %s", error)
        return None
    return f"data:{kind};base64,{encoded}" if kind in image_types else None


def build_body(service: ServiceModel, messages: list[dict[str, Any]], stream: bool) -> bytes:
    """The request body: a JSON object with four keys, one of which is the messages as JSON in Base64.

    That JSON has to be ASCII. The server may decode it with JavaScript's ``atob``, which would garble UTF-8.
    """
    encoded = base64.b64encode(json.dumps(messages).encode("ascii")).decode("ascii")
    body = {"messages": encoded, "threadId": service.name, "stream": stream, "aiAgent": service.name}
    return json.dumps(body).encode("ascii")


@functools.cache
def build_headers() -> dict[str, str]:
    """The headers listed in PROTOCOL.md. All are constants and say nothing about the user."""
    version = importlib.metadata.version("llm-autonomous")
    return {
        "accept": "*/*",
        # Spelled out because httpx would offer more if Brotli or Zstandard happens to be installed.
        "accept-encoding": "gzip, deflate",
        "accept-language": "en-US,en;q=0.9",
        "content-type": "application/json",
        "country-code": "US",
        "origin": "https://www.autonomous.ai",
        "referer": "https://www.autonomous.ai/",
        "time-zone": "America/New_York",
        "user-agent": f"Mozilla/5.0 (compatible; llm-autonomous/{version})",
    }


def endpoint_url(endpoint: str) -> httpx.URL:
    """Where to send a prompt: ``/api/v1/ai/<endpoint>`` at the service, or at ``AUTONOMOUS_BASE_URL``."""
    import httpx

    try:
        url = httpx.URL(os.environ.get(BASE_URL_VARIABLE, "").strip() or BASE_URL)
        usable = url.scheme in ("http", "https") and bool(url.host) and (url.port or 80) in range(1, 65536)
    except httpx.InvalidURL:
        usable = False
    if not usable or url.query or url.fragment:
        raise AutonomousError(
            f"{BASE_URL_VARIABLE} must be an http:// or https:// URL with a host, such as http://127.0.0.1:8000"
        )
    return url.copy_with(raw_path=url.raw_path.rstrip(b"/") + f"/api/v1/ai/{endpoint}".encode())


# How the reply is read, without any I/O: bytes -> JSON values -> text -> text and tool calls


class Framing:
    """Turns the bytes of a reply into JSON values, without looking into them. The content type does not matter.

    Reads event streams as WHATWG specifies them (https://html.spec.whatwg.org/multipage/server-sent-events.html) and,
    as PROTOCOL.md asks, also ``data:`` lines with no blank lines in between, lines of bare JSON, and a single JSON
    value spread over many lines. The data of an event or a field named ``error`` comes out as ``{"error": data}``.

    `feed` returns the values in order. It never raises: the problem is left in `error`, and the values before it are
    still returned. The result does not depend on how the bytes were cut, the cost is O(n), and at most
    `MAX_EVENT_BYTES` are held between calls.
    """

    def __init__(self) -> None:
        self.ended = False  # [DONE] has arrived, and anything after it is ignored
        self.error: AutonomousError | None = None
        self.stray = ""  # the first line with a field that no event stream has
        self.cut_off = ""  # the beginning of a value, if the reply ended before the value did
        self.page = False  # the reply is a web page
        self._first = True  # no line has been read yet
        self._skip_newline = False  # the last bytes ended with CR, so an LF that comes first belongs to it
        self._line = bytearray()  # the line that has not ended yet
        self._held = bytearray()  # the lines of an event that is not complete yet
        self._document = False  # the rest of the reply is one thing: a web page, or JSON spread over lines
        self._named_error = False  # the event is named error

    def feed(self, data: bytes, end: bool = False) -> list[Any]:
        """The values completed by ``data``, the next bytes of the reply, or by its ``end``."""
        values: list[Any] = []
        if self.error is None and not self.ended:
            try:
                self._read_lines(data, values)
                if end:
                    last_line = self._line.decode("utf-8", "replace")
                    if last_line:
                        self._read_line(last_line, values)
                    self._end_event(values, cut=bool(last_line))
            except AutonomousError as error:
                self.error = error
        return values

    def _read_lines(self, data: bytes, values: list[Any]) -> None:
        # Lines end at CRLF, LF or CR and nowhere else. No splitlines, then: it would also break lines at U+2028.
        if self._skip_newline and data:
            self._skip_newline = False
            data = data.removeprefix(b"\n")
        if b"\r" in data:
            self._skip_newline = data.endswith(b"\r")
            data = data.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
        lines: list[Any] = data.split(b"\n")
        rest = lines.pop()
        if lines and self._line:
            self._line += lines[0]
            lines[0], self._line = self._line, bytearray()
        for line in lines:
            if line:
                if len(line) > MAX_EVENT_BYTES:
                    raise too_large()
                self._read_line(line.decode("utf-8", "replace"), values)
                if self.ended:
                    return
            elif (self._held or self._named_error) and not self._document:
                self._end_event(values)
        self._line += rest
        if len(self._line) > MAX_EVENT_BYTES:
            raise too_large()

    def _read_line(self, line: str, values: list[Any]) -> None:
        if self._first:
            self._first = False
            line = line.removeprefix("\ufeff")
        if self._document:
            self._hold(line)
        elif line.startswith("data:") or line == "data":
            # Most events are a single line, which is read at once: some servers send no blank line after it. The
            # lines of any other event are held until it is complete.
            if self._held or self._named_error:
                self._hold(line[5:].removeprefix(" "))
            elif rest := self._decode_values(line[5:].lstrip(), values):
                self._hold(rest)
        elif line.startswith("event:"):
            self._named_error = line[6:].strip() == "error"
        elif line.startswith("error:"):
            self._named_error = True
            self._hold(line[6:])
        elif line.startswith(":") or line.partition(":")[0] in ("event", "id", "retry"):
            pass
        elif line.lstrip().startswith(("{", "[", "<")):
            self._end_event(values)
            if rest := self._decode_values(line.lstrip(), values):
                self._document = True
                self._hold(rest)
        elif re.fullmatch(r"(?as)\s*|[\w-]+(:.*)?", line):
            # Unknown fields are to be ignored, says WHATWG. A line that cannot be a field may be text that was garbled.
            self.stray = self.stray or line.strip()
        else:
            raise not_understood(line)

    def _hold(self, line: str) -> None:
        self._held += line.encode() + b"\n"
        if len(self._held) > MAX_EVENT_BYTES:
            raise too_large()

    def _end_event(self, values: list[Any], cut: bool = False) -> None:
        """Read what is held. The event ends at a blank line, at the next event, or ``cut`` off where the reply ends."""
        held = self._held.decode().lstrip()
        self._held.clear()
        if held.startswith("<"):
            self.page = True
            raise AutonomousError(page_words(held), outage=True)
        read: list[Any] = []
        rest = self._decode_values(held, read)
        if self._named_error:
            self._named_error = False
            values.append({"error": rest or next(filter(None, read), "event: error")})
            return
        values += read
        if rest and not cut:
            raise not_understood(rest)
        self.cut_off = rest

    def _decode_values(self, text: str, values: list[Any]) -> str:
        """Read as many JSON values as there are, and return the rest: the beginning of one that is not complete."""
        start = 0
        while start < len(text) and not self.ended:
            try:
                value, end = _decode_json(text, start)
            except (ValueError, RecursionError):
                if text.startswith("[DONE]", start):
                    self.ended = True
                elif text.startswith("data:", start):  # some servers write the name of the field twice
                    start = skip(r"data:\s*", text, start)
                else:
                    return text[start:]
            else:
                values.append(value)
                start = end if end == len(text) else skip(r"\s*", text, end)
        return ""


_decode_json = json.JSONDecoder(strict=False).raw_decode


def skip(pattern: str, text: str, start: int = 0) -> int:
    """The position after what matches ``pattern`` at ``start``; ``start`` itself if nothing does."""
    found = re.compile(pattern).match(text, start)
    return found.end() if found else start


class Completion:
    """Turns the values of a reply into the text and the reasoning of an answer.

    The values are chat completion chunks or one whole chat completion, as OpenAI documents them
    (https://platform.openai.com/docs/api-reference/chat). Each value is read, is known to be harmless, or is remembered
    as not understood. Nothing is dropped in silence: whoever reads the reply has to report `not_understood`.

    `feed` never raises: the error that a value reports is left in `error`, and what came before it is still returned.
    """

    def __init__(self) -> None:
        self.envelope: dict[str, Any] = {}  # id, model, created, finish_reason and usage, if they were sent
        self.calls: list[dict[str, Any]] = []  # tool calls in OpenAI's own format, as far as they have arrived
        self.recognized = False  # a chunk or a whole completion has arrived
        self.whole = False  # the answer is complete: there was a finish reason, or a whole completion
        self.not_understood: Any = None  # the first value that may hold a part of the answer in an unknown form
        self.ignored: Any = None  # the first chunk without choices that held something else of unknown meaning
        self.error: AutonomousError | None = None
        self._pieces: list[str | StreamEvent] = []  # what `feed` will return
        self._value: Any = None  # the value that is being read
        self._previous: dict[str, Any] = {}  # the choice before it, if that held nothing but text
        self._previous_delta: dict[str, Any] = {}  # its delta, the same object
        self._index: Any = None  # of the choice that is the answer
        self._numbers_chunks: bool | None = None  # the index numbers chunks, or names a choice; None: not clear yet
        self._waiting: list[dict[str, Any]] = []  # choices that are part of the answer if the index numbers chunks
        self._sums = {"text": (0, 0), "reasoning": (0, 0)}  # length and checksum of what came in deltas
        self._half = ""  # half a character

    def feed(self, values: list[Any], end: bool = False) -> list[str | StreamEvent]:
        """The text (`str`) and the reasoning (`StreamEvent`) in ``values``, or what waited for the ``end``."""
        try:
            for value in values:
                self._read(value)
            if end:
                self._numbers_chunks, waiting, self._waiting = True, self._waiting, []
                for choice in waiting:
                    self._read_chunk({"choices": [choice]})
                self._add("text", "", end=True)
        except AutonomousError as error:
            self.error = error
        pieces, self._pieces = self._pieces, []
        return pieces

    def _read(self, value: Any) -> None:
        try:
            # Most choices differ from the one before in their text alone. So put the new text into the choice that is
            # remembered from it, whose delta is _previous_delta. If the two are equal now, nothing else has changed.
            [choice] = value["choices"]
            delta = choice["delta"]
            self._previous_delta["content"] = text = delta["content"]
            if choice == self._previous and type(text) is str and PLAIN_FIELDS.issuperset(value):
                self._add("text", text)
                return
        except (LookupError, TypeError, ValueError):
            choice = delta = {}
        self._value, before = value, len(self._pieces)
        for chunk in value if isinstance(value, list) else [value]:
            if isinstance(chunk, dict):
                self._read_chunk(chunk)
            elif chunk:
                self._note()
        plain = len(self._pieces) > before and delta.keys() <= {"role", "content"} and not self.whole
        remember = plain and self._numbers_chunks is not None
        self._previous, self._previous_delta = (choice, delta) if remember else ({}, {})

    def _note(self) -> None:
        if self.not_understood is None:
            self.not_understood = self._value

    def _read_chunk(self, chunk: dict[str, Any]) -> None:
        """Read a chunk and the choice in it that is the answer.

        The chunk, and each choice, delta and message in it, may report an error. An object within those counts as one
        only if the chunk holds no part of the answer.
        """
        choices: Any = chunk.get("choices")
        usable = isinstance(choices, list) and all(isinstance(choice, dict) for choice in choices)
        answer = self._of_answer(choices) if usable else []
        unusual = [] if CHUNK_FIELDS.issuperset(chunk) else [chunk]
        for choice in answer:
            unusual += [] if CHOICE_FIELDS.issuperset(choice) else [choice]
            messages = (choice.get("delta"), choice.get("message"))
            unusual += [part for part in messages if isinstance(part, dict) and not MESSAGE_FIELDS.issuperset(part)]
        # In place of a choice, a message is an error even without a code.
        no_choice = not choices and (self.recognized or "choices" in chunk)
        if error := reported_error(*unusual, message_suffices=no_choice):
            raise error
        self.recognized = self.recognized or usable
        found = [self._read_choice(choice) for choice in answer]
        nested = [inner for holder in unusual for inner in holder.values() if isinstance(inner, dict)]
        if not any(found) and (error := reported_error(*nested)):
            raise error
        for key in ("id", "model", "created"):
            if key not in self.envelope and chunk.get(key) is not None:
                self.envelope[key] = shallow(chunk[key])
        self._read_outcome(chunk)
        if choices and not usable:
            self._note()
        elif not choices and holds_more(chunk, CHUNK_FIELDS):
            # Whatever else a chunk holds is about the request. An object that is no chunk may hold the answer.
            if "choices" not in chunk or mentions_error(chunk):
                self._note()
            if not (self.ignored or chunk.get("usage")):
                self.ignored = chunk

    def _read_outcome(self, holder: dict[str, Any]) -> None:
        """Read the usage and the finish reason in a chunk or a choice."""
        if usage := holder.get("usage"):
            self.envelope["usage"] = shallow(usage)
            self.recognized = True
        reason = holder.get("finish_reason")
        if reason and str(reason).strip().lower() not in NO_FINISH_REASONS:
            self.envelope["finish_reason"] = shallow(reason)
            self.recognized = self.whole = True

    def _of_answer(self, choices: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """The choices that are part of the answer and can be read now.

        Only one is asked for, but some servers take turns in sending several, and others number chunks in ``index``. If
        the index stays or rises by one each time, it numbers chunks, and all of them are part of the answer. If it
        jumps or comes back, it names a choice, and the first choice is the answer. Until that is clear, choices wait.
        """
        own = [choice for choice in choices if choice.get("index") in (None, self._index or 0)][:1]
        if self._index is None or self._numbers_chunks:
            return own or choices[:1]
        if self._numbers_chunks is None and len(choices) == 1:
            index, last = choices[0].get("index"), self._waiting[-1]["index"] if self._waiting else self._index
            if not own and isinstance(index, int) and index - last in (0, 1):
                self._waiting += choices
                if len(self._waiting) < MAX_CHOICES:
                    return []
                self._numbers_chunks, own = True, self._waiting
            else:
                self._numbers_chunks = False
            self._waiting = []
        return own

    def _read_choice(self, choice: dict[str, Any]) -> bool:
        """Read a choice, whose text is in its ``delta``, its ``message`` or itself, and return whether it has any."""
        delta, message = choice.get("delta"), choice.get("message")
        found = isinstance(delta, dict) and self._read_message(delta)
        if not found and ("text" in choice or "content" in choice):
            found = self._read_message(choice)
        if not found and isinstance(message, dict):
            found = self._read_message(message, repeats=True)
        self.whole = self.whole or bool(message and not delta)
        if found:
            if self._index is None:
                index = choice.get("index")
                self._index = index if isinstance(index, int) else 0
        elif (
            holds_more(delta, MESSAGE_FIELDS)
            or holds_more(message, MESSAGE_FIELDS)
            or (not choice.get("finish_reason") and holds_more(choice, CHOICE_FIELDS))
        ):
            self._note()
        self._read_outcome(choice)
        return found

    def _read_message(self, message: dict[str, Any], repeats: bool = False) -> bool:
        """Read a message or a delta, and return whether it held anything. It may repeat what came in deltas."""
        reasoning = message.get("reasoning_content") or message.get("reasoning")
        content = message.get("content") or message.get("text") or message.get("refusal")
        for kind, value in (("reasoning", reasoning), ("text", content)):
            if type(value) is str:
                self._add(kind, value, repeats)
            elif value:
                parts = [*self._parts(kind, value)]
                for wanted in ("reasoning", "text"):
                    self._add(wanted, "".join(text for part_kind, text in parts if part_kind == wanted), repeats)
        calls = message.get("tool_calls") or message.get("function_call")
        if calls and not (repeats and self.calls):
            self._read_calls(calls if isinstance(calls, list) else [{"function": calls}])
        return bool(content or reasoning or calls)

    def _parts(self, kind: str, content: Any) -> Iterator[tuple[str, str]]:
        """The text in content parts, each with its kind: ``text`` or ``reasoning``."""
        for part in content if isinstance(content, list) else [content]:
            thinking = isinstance(part, dict) and (part.get("thinking") or part.get("reasoning"))
            if isinstance(part, str):
                yield kind, part
            elif thinking and kind == "text":
                yield from self._parts("reasoning", thinking)
            elif isinstance(part, dict) and isinstance(part.get("text"), str):
                yield "reasoning" if part.get("type") in ("thinking", "reasoning") else kind, part["text"]
            elif part:
                self._note()

    def _read_calls(self, calls: list[Any]) -> None:
        """Read tool calls, or the fragments of them that come in deltas."""
        for position, call in enumerate(calls):
            function = call.get("function") if isinstance(call, dict) else None
            if not isinstance(function, dict):
                self._note()
                continue
            index, own_id, arguments = call.get("index", position), call.get("id"), function.get("arguments")
            same = [known for known in self.calls if known["index"] == index and own_id in (None, "", known["id"])]
            if not same:
                same = [{"index": index, "id": own_id, "name": "", "arguments": ""}]
                self.calls += same
            known = same[0]
            known["name"] = known["name"] or function.get("name")
            if isinstance(arguments, str) and isinstance(known["arguments"], str):
                known["arguments"] += arguments
            else:
                known["arguments"] = arguments or known["arguments"]

    def _add(self, kind: str, text: str, repeats: bool = False, end: bool = False) -> None:
        """Add text to the pieces.

        If it ``repeats`` what came in deltas, only what follows that is added. A text that differs is added whole.
        """
        if self._half or not text.isascii():
            # A server that cuts text by UTF-16 units may split a character: one half (such as \ud83d) ends a chunk,
            # and the other begins the next. Neither can be printed or stored, so the first waits for the second.
            text, self._half = self._half + text, ""
            if not end and "\ud800" <= text[-1:] <= "\udbff":
                text, self._half = text[:-1], text[-1]
            text = replace_surrogates(text)
        length, checksum = self._sums[kind]
        if not repeats:
            self._sums[kind] = length + len(text), zlib.crc32(text.encode(), checksum)
        elif zlib.crc32(text[:length].encode()) == checksum:
            text = text[length:]
        if text and kind == "text":
            self.whole = False
            self._pieces.append(text)
        elif text:
            self._pieces.append(StreamEvent(type="reasoning", chunk=text))


# The fields that OpenAI documents, and those that others put in their place.
PLAIN_FIELDS = frozenset({"id", "object", "created", "model", "choices", "system_fingerprint", "service_tier", "type"})
CHUNK_FIELDS = PLAIN_FIELDS | {"usage", "finish_reason"}
CHOICE_FIELDS = frozenset({"index", "delta", "message", "text", "content", "finish_reason", "logprobs", "usage"})
MESSAGE_FIELDS = frozenset({"role", "name", "content", "text", "refusal", "tool_calls", "function_call"})
MESSAGE_FIELDS |= {"reasoning", "reasoning_content"}
MESSAGE_FIELDS |= {"reasoning_details", "annotations"}  # which describe what other fields hold


def holds_more(value: Any, known: frozenset[str]) -> bool:
    """Whether a value holds more than its ``known`` fields.

    That is text, a list or an object in another field or, if the value is no object, anything at all.
    """
    if not isinstance(value, dict):
        return bool(value)
    return any(nested and isinstance(nested, (str, list, dict)) for key, nested in value.items() if key not in known)


class Thinking:
    """Splits off the reasoning with which a model may begin its text, in ``<think>`` or Hermes's ``<scratch_pad>``.

    Anywhere else these tags are text. White space after the reasoning is dropped.
    """

    def __init__(self) -> None:
        self.answered = False  # some text has arrived, and everything that follows is text as well
        self.reasoned = False  # some reasoning has arrived
        self._closing: str | None = None  # the tag that ends the reasoning; empty once it has arrived
        self._held: list[str] = []  # the end of the text so far, if it may begin a tag

    def feed(self, pieces: list[str | StreamEvent], end: bool = False) -> list[str | StreamEvent]:
        """The ``pieces`` of `Completion`, with the reasoning at the start of their text turned into events."""
        if self.answered:
            return pieces
        split: list[str | StreamEvent] = []
        for piece in pieces:
            split += [piece] if self.answered or not isinstance(piece, str) else self._split(piece)
        if end and not self.answered:
            split += self._split("", end=True)
        self.reasoned = self.reasoned or any(not isinstance(piece, str) for piece in split)
        return split

    def _split(self, text: str, end: bool = False) -> list[str | StreamEvent]:
        """The reasoning and the texts in ``text``, the next part of the answer."""
        held, self._held = [*self._held, text], []
        reasoning, text = "", "".join(held)
        if self._closing is None:
            begin = text.lstrip()
            tag = next((tag for tag in THINKING_TAGS if begin.startswith(tag)), "")
            if not tag:
                if not end and len(text) < MAX_HELD and any(tag.startswith(begin) for tag in THINKING_TAGS):
                    self._held = held
                    return []
                self.answered = bool(text)
                return [piece for piece in held if piece]
            self._closing, text = tag.replace("<", "</"), begin[len(tag) :]
        if self._closing:
            reasoning, closing, text = text.partition(self._closing)
            cut = reasoning.rfind("<")
            if closing:
                self._closing = ""
            elif cut >= 0 and not end and self._closing.startswith(reasoning[cut:]):
                reasoning, self._held = reasoning[:cut], [reasoning[cut:]]
        text = text.lstrip()
        self.answered = bool(text)
        pieces: list[str | StreamEvent] = []
        if reasoning:
            pieces.append(StreamEvent(type="reasoning", chunk=reasoning))
        if text:
            pieces.append(text)
        return pieces


# Tool calls and JSON in what the model wrote


class ToolCallParser:
    """Splits the text of an answer into text and tool calls. Used only when the model was given tools.

    A call is JSON with the name of an offered tool and an object of arguments, standing on its own: at the start of the
    answer, in a tag, after ``<|python_tag|>``, or after another call. It is recognized by what it says, not by what it
    is wrapped in. If something begins as a call but cannot be read, or comes after words, in a code fence or at the end
    of the answer, the model is asked to write it again. Everything else is text and comes out unchanged, except for
    white space next to a call.

    Text is passed on at once, but everything from the first call on is held until the end, because the model may have
    to write all calls again. `feed` never raises: the problem is left in `error`, with a correction for the model. The
    result does not depend on how the text was cut, and the cost is O(n).
    """

    def __init__(self, names: Collection[str]) -> None:
        self.names = frozenset(names)
        self.error: AutonomousError | None = None
        self.finished = False  # the model goes on to make up results, so the answer ends with its calls
        self._blank = True  # nothing but white space has been passed on
        self._held = io.StringIO()  # a few characters that may begin a call, or everything from the first call on
        self._called = False  # a call has begun, and everything from it on is held
        self._parsed = 0  # its length when it was last parsed; 0 until it has a closing bracket

    def feed(self, pieces: Iterable[str], end: bool = False) -> list[Any]:
        """The text that ``pieces`` completes; at the ``end`` of the answer, the rest of the text and the calls."""
        text = "".join(pieces)
        size = self._held.tell() + self._held.write(text)
        if self._called and size > MAX_EVENT_BYTES:
            self.error = self.error or too_large("a tool call")
        # What is held may turn out to be no call. To find out, parse everything once a bracket closes, and again when
        # there is twice as much: that keeps the cost linear.
        wait = self._called and (size < 2 * self._parsed if self._parsed else not re.search(CLOSING_BRACKET, text))
        return [] if self.error or (wait and not end) else self._read(self._held.getvalue(), end)

    def _read(self, text: str, end: bool) -> list[Any]:
        pieces: list[Any] = []  # up to the last call
        error = None
        start = position = 0  # text[:start] is in pieces, and text[:position] has been looked at
        # Where the answer begins, and where the next call would directly follow the last; -1 after other text.
        beginning = alone = skip(r"\s*", text) if self._blank else -1
        while True:
            place, wrapping = self._find_call(text, position, beginning, end)
            if not wrapping or (pieces and RESULT_TAG in text[position:place]):
                break
            try:
                calls, position = calls_or_text(wrapping, self.names, place == alone)
            except AutonomousError as problem:
                error, pieces = problem, pieces or [text[:place]]
                break
            if calls:
                pieces += [text[start:place], *calls]
                start, alone = position, skip(r"\s*", text, position)
        self.error = error if end else None  # before the end, a call may merely be unfinished
        self.finished = bool(pieces) and not error and RESULT_TAG in text[position:]
        if end and not error:
            pieces += [] if self.finished else [text[start:]]
            return [piece for piece in pieces if not isinstance(piece, str) or piece.strip() or len(pieces) == 1]
        before = pieces[0] if pieces else text[:place]
        held = text[len(before) :]
        self._held = io.StringIO()
        self._held.write(held)
        self._called = bool(pieces)
        self._parsed = len(held) if pieces and re.search(CLOSING_BRACKET, held) else 0
        self._blank = self._blank and not before.strip()
        return [before] if before else []

    def _find_call(self, text: str, position: int, beginning: int, end: bool) -> tuple[int, re.Match[str] | None]:
        """Where from ``position`` on the next call begins, and the match of what it is wrapped in.

        There is no match if it is too early to say whether it is a call, or if there is none: the position is then the
        end of the text. At the ``beginning`` of the answer, a made-up result or a list in Python's syntax counts too.
        """
        for opening in re.compile(OPENING).finditer(text, position):
            place = opening.start()
            wrapping = re.compile(WRAPPING).match(text, place)
            assert wrapping
            tag, value = wrapping["tag"], text[wrapping.end() : wrapping.end() + MAX_HELD]
            in_python = tag in ("python_tag", *OWN_TAGS) or (place == beginning and text[place] == "[")
            starts = call_starts(self.names, place == beginning, in_python)
            start = squeezed(value)
            if start.startswith(starts) or (tag in OWN_TAGS and value.startswith(("{", "["))):
                return place, wrapping
            early = not end and len(value) < MAX_HELD
            if early and (re.fullmatch(HALF_WRAPPING, value) or any(known.startswith(start) for known in starts)):
                return place, None
        return len(text), None


# Strings, because `re` compiles them when they are first used, and `llm --help` never uses them.
RESULT_TAG = "<tool_response>"
# Where a call may begin: at a tag, a fence, an object or a list, or at the end of a text that may go on as one.
OPENING = r"""<(?=[|\w-]|\Z)|`(?=``[^`]|`{0,2}\Z)|\{(?=\s{0,99}(?:["']|\Z))|\[(?=\s{0,99}(?:\[\s{0,99})?(?:[{\w]|\Z))"""
# Up to three tags and fences before a call. It can match nothing, so it always matches.
WRAPPING = r"(?:(?:<\|?(?!tool_response>)(?P<tag>[\w-]{1,64})\|?>|(?P<fence>```[\w-]{0,32}))\s{0,255}){0,3}"
# A tag or a fence whose end has not arrived yet.
HALF_WRAPPING = r"<\|?[\w-]{0,64}\|?|`{1,2}"
# Llama's <function=name>, up to its arguments.
FUNCTION = r"<function[=(/]([\w.-]+)[\s>()=:,\"]*(?={)"
# What models leave after a call.
EXTRA_BRACKETS = r"(?:[\s;,]*[}\]])*"
CLOSING_FENCE = r"(?:\s*```)?"
CLOSING_TAGS = r"(?:[\s;,]*(?:</[\w-]*>?|<\|(?!python_tag)\w*\|?>?))*"
# After a call that no words follow: another call, the beginning of a tag or a fence, or nothing.
NO_WORDS = r"[\s;,]*([{\[]|(<|`{1,2})?\Z)"
JSON_START = r"""(?s)<(?P<tag>think|scratch_pad)>.*?(</(?P=tag)>|\Z)|\{\s*["}]|\[\s*(["\]\[{0-9-]|true|false|null)"""
CLOSING_BRACKET = r"[}\]]"
# A bracket, or a string in JSON's or Python's quotes, even unfinished. An apostrophe within a word is not a quote.
TOKEN = r"""(?s)[{}\[\]]|"[^"\\]*(?:\\.[^"\\]*)*"?|(?<!\w)'[^'\\]*(?:\\.[^'\\]*)*'?"""

OWN_TAGS = ("tool_call", "tools")  # the tag that the model is asked to use, and the one around the tools
CALL_STARTS = ('{"type":"function"', '{"parameters":', '{"arguments":', '{"function":', '{"id":')
RESULT_STARTS = (RESULT_TAG, '{"tool_response"', '{"name":"tool_response"')


@functools.lru_cache
def call_starts(names: frozenset[str], results: bool, in_python: bool) -> tuple[str, ...]:
    """How calls of tools with these names can begin, and made-up ``results``, in the form that `squeezed` gives."""
    starts = [*CALL_STARTS, *(RESULT_STARTS if results else ())]
    for name in map(squeezed, names):
        starts += [f'{{"name":"{name}"', *(f"<function{sign}{name}" for sign in "=(/")]
        starts += [f"{name}(", f"{name}.call("] if in_python else []
    return tuple(starts)


def squeezed(text: str) -> str:
    """The beginning of some JSON in a form that can be compared: without white space and ``[``, in double quotes."""
    return re.sub(r"[\s\[]", "", text).replace("'", '"')


def calls_or_text(wrapping: re.Match[str], names: Collection[str], alone: bool) -> tuple[list[llm.ToolCall], int]:
    """The calls in a wrapping and the position after them, or no calls and the position up to which it is text.

    ``alone`` says that nothing but calls stands before it. Raises if the model has to be asked what it means.
    """
    text, begin = wrapping.string, wrapping.end()
    tag, fence = wrapping["tag"] or "", wrapping["fence"]
    if squeezed(text[begin : begin + MAX_HELD]).startswith(RESULT_STARTS):
        raise made_up_result(text[begin:])
    marked = alone or tag or text[begin] == "<"
    try:
        calls, end = read_calls(text, begin, names, tag)
    except (ValueError, RecursionError) as error:
        end = closing_bracket(text, begin)
        if marked or re.compile(NO_WORDS).match(text, end):
            raise broken_call(str(error), text[begin:]) from None
        return [], end
    if not calls:
        return [], end
    end = skip(EXTRA_BRACKETS + CLOSING_TAGS + (CLOSING_FENCE + CLOSING_TAGS if fence else ""), text, end)
    if marked:
        return calls, end
    if fence or re.compile(NO_WORDS).match(text, end):
        raise call_after_words(text[begin:])
    return [], end  # it is part of a sentence


def read_calls(text: str, start: int, names: Collection[str], tag: str) -> tuple[list[llm.ToolCall], int]:
    """The calls at ``start``, one after another or in lists, and the position after the last.

    If the first value is no call, there are none, and the position is the one after that value. Raises `ValueError` if
    a call cannot be read.
    """
    may_omit_arguments = re.search("tool|function|call|python_tag", tag)
    found: list[Any] = []
    while not found or text.startswith(("{", "["), start):
        value, after = read_value(text, start)
        values = value if isinstance(value, list) else [value]
        fields = [call_fields(each) for each in values]
        offered = any(name in names and (may_omit_arguments or arguments is not None) for name, arguments, _ in fields)
        meant = tag in OWN_TAGS or ((found or offered) and all(name for name, _, _ in fields))
        if not meant or any(is_tool for _, _, is_tool in fields):
            if not found:
                end = after
            break
        found += values
        start, end = skip(r"[\s;,]*", text, after), after
    return [read_call(value) for value in found], end


def read_value(text: str, start: int) -> tuple[Any, int]:
    """The object or list at ``start``, in JSON or in Python's syntax, and the position after it.

    Llama's ``<function=name>{…}`` is read as a call with these arguments. Raises `ValueError`.
    """
    if function := re.compile(FUNCTION).match(text, start):
        arguments, end = read_value(text, function.end())
        return {"name": function[1], "arguments": arguments}, skip(r"\s*\)?", text, end)
    try:
        return _decode_json(text, start)
    except (ValueError, RecursionError) as error:
        problem = f"it is no valid JSON: {getattr(error, 'msg', error)}"
    end = closing_bracket(text, start)
    if end - start > MAX_LITERAL:
        raise ValueError(problem)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about invalid escapes
        try:
            return json.loads(json.dumps(ast.literal_eval(with_escapes(text[start:end])))), end
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            raise ValueError(problem) from None


def closing_bracket(text: str, start: int) -> int:
    """The position after the object or list at ``start``, going by brackets alone; the end of a text without one."""
    depth = 0
    for token in re.compile(TOKEN).finditer(text, start):
        depth += {"{": 1, "[": 1, "}": -1, "]": -1}.get(token[0], 0)
        if depth == 0:
            return token.end()
    return len(text)


def with_escapes(text: str) -> str:
    """``text``, which is JSON or a Python literal, with the control characters in its strings escaped."""
    return re.sub(TOKEN, lambda token: re.sub(r"[\0-\x1f]", lambda char: json.dumps(char[0])[1:-1], token[0]), text)


def call_fields(value: Any) -> tuple[str | None, Any, bool]:
    """The name and the arguments in a value, in any of the shapes that models use; None for what is not there.

    The third is true if it is no call, but repeats a tool as the model was given it, with a schema for its arguments.
    """
    if isinstance(value, dict) and isinstance(value.get("function"), dict):
        value = value["function"]
    if not isinstance(value, dict):
        return None, None, False
    name = value.get("name", value.get("function"))
    given = [value[key] for key in ("arguments", "parameters") if value.get(key) is not None]
    arguments = max(given, key=bool, default=None)  # the one that is not empty
    is_schema = isinstance(arguments, dict) and arguments.get("type") == "object" and "properties" in arguments
    is_tool = is_schema or ("description" in value and not value.get("arguments"))
    return name if isinstance(name, str) else None, arguments, is_tool


def read_call(value: Any) -> llm.ToolCall:
    """The tool call in a JSON value. Raises `ValueError` if there is none."""
    if not isinstance(value, dict):
        raise ValueError("it is no JSON object")
    name, arguments, _ = call_fields(value)
    if not (name and name.strip() and name.isprintable()):
        raise ValueError('its "name" is not the name of a tool')
    if arguments is None and not {"name", "arguments", "parameters", "function", "type", "id"}.issuperset(value):
        raise ValueError('it has no "arguments"')
    if isinstance(arguments, str) and (text := arguments.strip() or "{}").startswith("{"):
        value, end = read_value(text, 0)
        arguments = value if end == len(text) else arguments
    if not isinstance(arguments, (dict, type(None))):
        raise ValueError('its "arguments" are not a JSON object')
    if shallow(arguments, 100) != arguments:  # `llm`, which wraps them in more JSON, could fail to write them
        raise ValueError('its "arguments" are nested too deeply')
    try:
        arguments = json.loads(replace_surrogates(json.dumps(arguments or {}, ensure_ascii=False, allow_nan=False)))
    except ValueError:
        raise ValueError('its "arguments" contain NaN or Infinity, which are not JSON') from None
    return llm.ToolCall(name=name, arguments=arguments, tool_call_id=f"call_{uuid.uuid4().hex}")


def schema_validator(schema: dict[str, Any]) -> Any:
    """What checks answers against ``schema``. Raises if it is not a valid schema."""
    import jsonschema  # here, since importing it takes longer than importing everything else
    import referencing

    try:
        kind = jsonschema.validators.validator_for(schema, default=jsonschema.Draft202012Validator)
        kind.check_schema(schema)
    except Exception as error:  # jsonschema does not foresee every way in which a schema can be wrong
        reason = quoted(getattr(error, "message", str(error)))
        raise AutonomousError(f"the schema is no JSON schema: {reason}; nothing was sent") from None
    return kind(schema, registry=referencing.Registry())  # which, unlike the default, never fetches a $ref


def matching_json(text: str, validator: Any) -> str:
    """The last JSON value in an answer that matches the schema. Raises if there is none."""
    from jsonschema.exceptions import best_match

    mismatch, copied = "", False
    for value, written in [*find_json(text)][::-1]:
        try:
            # If the schema wants an object whose one required field is a list, models may write the list alone.
            match validator.schema:
                case {"required": [field]} if isinstance(value, list) and not validator.is_valid(value):
                    value, written = {field: value}, f"{{{json.dumps(field)}: {written}}}"
            error = best_match(validator.iter_errors(value))
        except Exception as failure:  # a $ref to nowhere, or a schema that contains itself
            raise AutonomousError(f"the schema cannot be applied: {quoted(str(failure))}") from None
        if error is None:
            return written
        if isinstance(value, dict) and {"type", "properties"} <= value.keys():
            copied = True
        elif not mismatch:  # the last value is the one that was most likely meant
            # jsonschema's own message shows values as Python writes them, which a model would copy.
            wanted = as_json({error.validator: error.validator_value} if error.validator else False)
            mismatch = quoted(f"at {error.json_path}, the schema has {wanted}")
    problem = mismatch or ("it repeats the schema, without values" if copied else "it holds no JSON")
    raise AutonomousError(
        f"the answer does not match the schema: {problem}; it begins: {quoted(text)}",
        correction=f"Your answer does not match the JSON schema: {problem}. {schema_instructions(validator.schema)}",
    )


def find_json(text: str) -> Iterator[tuple[Any, str]]:
    """The JSON in an answer, each value with its text: the whole answer, or else the objects and lists in it."""
    text = re.sub(r"\A```\w*", "", text.strip()).removesuffix("```").strip()
    decoder = json.JSONDecoder(strict=False, parse_constant=int)  # int refuses NaN, which is no JSON
    with contextlib.suppress(ValueError, RecursionError):
        yield decoder.decode(text), with_escapes(text)
        return
    end = 0
    while found := re.compile(JSON_START).search(text, end):
        start, end = found.span()
        if found["tag"]:  # this is reasoning, and no answer
            continue
        try:
            value, end = decoder.raw_decode(text, start)
            yield value, with_escapes(text[start:end])
        except (ValueError, RecursionError):
            end = closing_bracket(text, start)  # skip all of it: a part of something broken is not the answer


# The whole way from bytes to the pieces of an answer


class Reply:
    """Turns the bytes of a reply into the pieces of the answer: text and tool calls.

    Nothing here raises. If something is wrong with the reply, it is left in `error` after everything before it has been
    returned.
    """

    def __init__(self, parser: ToolCallParser | None = None, validator: Any = None, new_results: bool = False) -> None:
        self.framing = Framing()
        self.completion = Completion()
        self.thinking = Thinking()
        self.parser = parser  # only if there are tools
        self.validator = validator  # only if there is a schema
        self.new_results = new_results  # of tools were sent, so an empty answer is worth another question
        self.written = io.StringIO()  # everything the model wrote, if it may have to be corrected
        self.error: AutonomousError | None = None

    @property
    def ended(self) -> bool:
        """Whether anything that still arrives is certain not to be part of the answer."""
        return self.framing.ended or (self.parser is not None and self.parser.finished)

    @property
    def whole(self) -> bool:
        """Whether the answer is complete, so that losing the connection does no harm."""
        return self.completion.whole or self.ended

    def feed(self, data: bytes, end: bool = False) -> list[Any]:
        """The pieces completed by ``data``, the next bytes of the reply, or by its ``end``."""
        if self.error:
            return []
        pieces: list[Any] = []
        values = self.framing.feed(data, end)
        end = end or self.framing.ended
        if values or end:
            pieces = self.thinking.feed(self.completion.feed(values, end), end)
        self.error = self.completion.error or self.framing.error
        return self._read(pieces) if pieces and (self.parser or self.validator) else pieces

    def close(self, failure: Exception | None = None, timeout: float = DEFAULT_TIMEOUT) -> list[Any]:
        """The pieces completed by the end of the reply, whether it came as it should or by a ``failure``."""
        known = self.error  # more telling than the failure, unlike what is only found at the end
        pieces, calls = self.feed(b"", end=True), self._native_calls()
        self.error = known or self._problem(failure, timeout, bool(calls))
        if not self.error and (self.parser or self.validator):
            pieces += self._read(calls, end=True)
        return pieces

    def _problem(self, failure: Exception | None, timeout: float, called: bool) -> AutonomousError | None:
        """What is wrong with the reply, now that it has ended."""
        framing, answered = self.framing, self.thinking.answered
        if failure and not (self.whole or framing.page):
            return transport_error(failure, answered, timeout)
        if self.error:
            return self.error
        if framing.cut_off and not self.whole:
            cut_off = AutonomousError("the answer is incomplete: the reply ends within an event")
            return cut_off if answered else not_understood(framing.cut_off)
        if not (answered or called):
            return self._empty()
        if mentions_error(unknown := self.completion.not_understood):
            return AutonomousError(f"the answer is incomplete: the service reports {quoted(as_json(unknown))}")
        return None

    def _empty(self) -> AutonomousError:
        """The error for a reply without an answer, which quotes what it held instead."""
        framing, completion = self.framing, self.completion
        value = completion.ignored if completion.not_understood is None else completion.not_understood
        is_completion = completion.recognized or framing.ended
        if (framing.stray or value is not None) and not (is_completion or mentions_error(value)):
            return not_understood(framing.stray or as_json(value))
        message = "the answer was empty"
        if self.thinking.reasoned:
            message += ", after some reasoning"
        if reason := completion.envelope.get("finish_reason"):
            message += f" (finish reason: {quoted(str(reason))})"
        if value is not None:
            message += f"; the reply was: {quoted(as_json(value))}"
        correction = EMPTY_CORRECTION if self.new_results else None
        return AutonomousError(message, outage=True, correction=correction)

    def _native_calls(self) -> list[str]:
        """The tool calls that came in OpenAI's own format, as the model is asked to write them.

        A call of a tool that was not offered is noted as not understood.
        """
        written = []
        for call in self.completion.calls:
            value = {"name": call["name"], "arguments": call["arguments"] or {}}
            if self.parser and call["name"] in self.parser.names:
                written.append(tool_call(value))
            elif self.completion.not_understood is None:
                self.completion.not_understood = {"tool_calls": [value]}
        return written

    def _read(self, pieces: list[Any], end: bool = False) -> list[Any]:
        """Find the tool calls. If there is a schema, keep the answer until it is complete and can be checked."""
        reasoning = [piece for piece in pieces if not isinstance(piece, str)]
        pieces = [piece for piece in pieces if isinstance(piece, str)]
        self.written.writelines(pieces)
        if self.parser:
            pieces = self.parser.feed(pieces, end)
            self.error = self.error or self.parser.error
        if not self.validator:
            return reasoning + pieces
        if self.written.tell() > MAX_EVENT_BYTES:
            self.error = self.error or too_large("an answer to a schema")
        calls = [piece for piece in pieces if not isinstance(piece, str)]
        if self.error or calls or not end:  # if there are calls, the answer comes in a later round
            return reasoning + calls
        try:
            return [matching_json(self.written.getvalue(), self.validator)]
        except AutonomousError as error:
            self.error = error
            return []


def replace_surrogates(text: str) -> str:
    """``text`` with surrogate pairs joined, and lone surrogates replaced."""
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


def as_json(value: Any) -> str:
    """A JSON value as text, but without what is nested too deeply for Python to write it."""
    return json.dumps(shallow(value, 20), ensure_ascii=False)


def shallow(value: Any, depth: int = 3) -> Any:
    """A JSON value cut off at ``depth``."""
    if isinstance(value, (dict, list)) and depth == 0:
        return None
    if isinstance(value, dict):
        return {key: shallow(nested, depth - 1) for key, nested in value.items()}
    return [shallow(nested, depth - 1) for nested in value] if isinstance(value, list) else value


# What can go wrong


class AutonomousError(llm.ModelError, click.ClickException):
    """One line on why a prompt failed: who says so, what happened, and what to do about it.

    `llm` and `llm chat` show that line and nothing else, because this is both a `llm.ModelError` and a
    `click.ClickException`.
    """

    def __init__(
        self,
        message: str,
        *,
        retryable: bool = False,  # another attempt may succeed
        retry_after: float | None = None,  # seconds to wait before it, if the server says so
        outage: bool = False,  # typical of a service that is down
        correction: str | None = None,  # what to say to the model, if the mistake was its own
    ) -> None:
        super().__init__(message)
        self.retryable = retryable
        self.retry_after = retry_after
        self.outage = outage
        self.correction = correction

    def located(self, url: httpx.URL, attempts: int = 1, checking: bool = False) -> AutonomousError:
        """The error as the user sees it, with the host and the number of attempts."""
        message = f"{url.netloc.decode()}: {self.message}"
        if attempts > 1:
            message += f" ({attempts} attempts)"
        if self.outage and url.host == urlsplit(BASE_URL).hostname:
            message += ". The service is often down"
            message += "" if checking else "; `llm autonomous check` shows which models answer"
        return AutonomousError(message, retryable=self.retryable, retry_after=self.retry_after, outage=self.outage)


def quoted(words: str) -> str:
    """A server's words in a form that is fit for an error: one printable line of at most `MAX_EXCERPT` characters."""
    printable = "".join(char if char.isprintable() else " " for char in words[: 4 * MAX_EXCERPT])
    line = " ".join(printable.split())
    return line if len(line) <= MAX_EXCERPT else line[: MAX_EXCERPT - 1] + "…"


def not_understood(start: str) -> AutonomousError:
    return AutonomousError(f"the reply was not understood; it begins: {quoted(start)}")


def too_large(what: str = "an event") -> AutonomousError:
    return AutonomousError(f"the reply holds {what} larger than {MAX_EVENT_BYTES // 1024**2} MiB")


def made_up_result(text: str) -> AutonomousError:
    return AutonomousError(
        f"the model made up the result of a tool; it begins: {quoted(text)}",
        correction="No tool was called. Call a tool in <tool_call> and </tool_call>, or answer without one.",
    )


def call_after_words(text: str) -> AutonomousError:
    return AutonomousError(
        f"the answer holds a tool call that is not marked as one; it begins: {quoted(text)}",
        correction="Your answer ends with a tool call. If you want to call the tool, reply with that call alone, "
        "between <tool_call> and </tool_call>. If you do not, answer without it.",
    )


def broken_call(problem: str, text: str) -> AutonomousError:
    return AutonomousError(
        f"the model's tool call cannot be read, {problem}; it begins: {quoted(text)}",
        correction=f"Your tool call could not be read: {problem}. Answer again, with each call as JSON between "
        "<tool_call> and </tool_call>.",
    )


def page_words(page: str) -> str:
    """What an error says of a web page: its title or, if it has none, its text."""
    import html

    page = page[:MAX_PAGE_BYTES]
    # Without the limits, a page that repeats "<title" would take quadratic time.
    found = re.search(r"<title[^>]{0,99}>([^<]{1,999})", page, re.IGNORECASE)
    if found and (title := quoted(html.unescape(found[1]))):
        return f"answered with a web page titled: {title}"
    text = re.sub(r"(?is)<(script|style)\b.*?(</\1>|\Z)|<!--.*?(-->|\Z)|<[^<>]*(>|\Z)", " ", page)
    words = quoted(html.unescape(text))
    return "answered with a web page without a title" + (f": {words}" if words else "")


def error_words(body: object) -> str:
    """The message in an error body of any of the forms in PROTOCOL.md, or several, if they say different things."""
    found: list[str] = []
    for value in map(body.get, ("error", "errors", *MESSAGE_KEYS)) if isinstance(body, dict) else ():
        words = (value.get("message") or value) if isinstance(value, dict) else value
        if isinstance(words, list) and all(isinstance(word, str) for word in words):
            words = "; ".join(words)
        if words and not isinstance(words, (str, bool)) and not found:
            return as_json(words)
        if isinstance(words, str) and not any(words in known for known in found):
            found = [known for known in found if known not in words] + [words]
    return ": ".join(found) or (body if isinstance(body, str) else as_json(body))


MESSAGE_KEYS = ("message", "msg", "detail", "status_msg")
NO_ERROR = r"(?i)0*|200|ok|success(ful)?|none|null|false"


def reported_error(*places: dict[str, Any], message_suffices: bool = False) -> AutonomousError | None:
    """The error that one of some objects reports.

    It reports one in ``error`` or ``errors``, or in a message beside a code that does not stand for success, or without
    a code if ``message_suffices``.
    """
    for place in places:
        message = any(isinstance(place.get(key), (str, list)) and place[key] for key in MESSAGE_KEYS)
        code = next((place[key] for key in ("code", "status_code") if key in place), None)
        failed = is_error_value(code) or (code is None and message_suffices)
        if is_error_value(place.get("error")) or is_error_value(place.get("errors")) or (message and failed):
            return AutonomousError(f"the service reports an error: {quoted(error_words(place))}")
    return None


def is_error_value(value: Any) -> bool:
    """Whether a code or an error, or one of its fields, is neither empty nor a word for success."""
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else [value]
    return any(isinstance(v, (dict, list)) or not re.fullmatch(NO_ERROR, str(v)) for v in inner)


def mentions_error(value: Any) -> bool:
    """Whether a value that was not understood has a field or a word in it that stands for an error."""
    return value is not None and bool(re.search(r'(?i)"\w*(error|fail)\w*"', as_json(value)))


def status_error(reply: httpx.Response, body: bytes) -> AutonomousError:
    """The error for a reply with a status other than 2xx. ``body`` is as much as could be read."""
    status = quoted(f"HTTP {reply.status_code} {reply.reason_phrase}")
    if 300 <= reply.status_code < 400:
        target = quoted(unquote(reply.headers.get("location", ""))) or "nowhere"
        return AutonomousError(
            f"{status}: redirects to {target}, which is not followed: a prompt goes only to the host you name. "
            f"Set {BASE_URL_VARIABLE} if that is the right one"
        )
    words = body.decode("utf-8", "replace").lstrip("\ufeff").strip()
    page = words.startswith("<")
    if page:
        words = page_words(words)
    else:
        with contextlib.suppress(ValueError, RecursionError):  # then it is plain text
            words = error_words(json.loads(words))
        words = quoted(words)
    message = f"{status}: {words}" if words else status
    retry_after = parse_retry_after(reply.headers.get("retry-after", ""))
    if retry_after is not None:
        message += f"; it asks to wait {retry_after:.0f} s"
    return AutonomousError(
        message,
        retryable=reply.status_code in RETRY_STATUSES,
        retry_after=retry_after,
        outage=page or reply.status_code >= 500,
    )


def parse_retry_after(value: str) -> float | None:
    """Seconds to wait, by a ``Retry-After`` header, which has seconds or a date (RFC 9110, section 10.2.3)."""
    if re.fullmatch(r"[0-9]+", value):
        return float(value[:15])
    try:
        date = email.utils.parsedate_to_datetime(value)
        return max(0.0, date.replace(tzinfo=date.tzinfo or datetime.timezone.utc).timestamp() - time.time())
    except (TypeError, ValueError, IndexError, OverflowError):
        return None


def transport_error(error: Exception, answered: bool, timeout: float, proxy: str = "") -> AutonomousError:
    """The error for an exception from httpx or the libraries below it, and the ``proxy`` that had yet to connect."""
    import httpx

    if isinstance(error, AutonomousError):
        return error
    reason, certificate = root_reason(error)
    silent = isinstance(error, httpx.TimeoutException)
    # With any other words, httpcore and h11 mean a malformed reply.
    dropped = isinstance(error, httpx.NetworkError) or (
        isinstance(error, httpx.RemoteProtocolError)
        and str(error).startswith(("Server disconnected", "peer closed connection"))
    )
    if answered:
        lost = f"silent for {timeout:g} s" if silent else "the connection was lost" if dropped else reason
        return AutonomousError(f"the answer is incomplete: {lost} in the middle of the reply", retryable=dropped)
    if certificate:
        return AutonomousError(
            f"its certificate cannot be verified: {reason}. If a company proxy inspects TLS, set "
            "SSL_CERT_FILE to the file with its certificate authority",
            outage=True,
        )
    if proxy or isinstance(error, (httpx.ConnectError, httpx.ConnectTimeout, httpx.ProxyError)):
        if silent:
            reason = f"no reply within {min(timeout, CONNECT_TIMEOUT):g} s"
        elif not isinstance(error, httpx.TransportError):  # httpcore lets socksio's exceptions through
            reason = f"it does not answer as a SOCKS proxy ({reason})"
        through = f" through the proxy {proxy}" if proxy else ""
        refusal = re.match(r"[0-9]{3}\b", reason)  # the status that an HTTP proxy answered with
        passing = dropped or isinstance(error, (httpx.ConnectTimeout, httpx.ProxyError))
        retryable = int(refusal[0]) in RETRY_STATUSES if refusal else passing
        return AutonomousError(f"cannot connect{through}: {reason}", retryable=retryable, outage=not proxy)
    if silent:
        return AutonomousError(f"silent for {timeout:g} s; -o timeout sets the limit", outage=True)
    if dropped:
        return AutonomousError("the connection was lost before any answer", retryable=True, outage=True)
    if isinstance(error, (httpx.ProtocolError, httpx.DecodingError)):
        return AutonomousError(f"the reply was not understood: {reason}")
    return AutonomousError(f"the request failed: {type(error).__name__}: {reason}")


def root_reason(error: BaseException) -> tuple[str, bool]:
    """What the operating system or OpenSSL said went wrong, and whether the certificate is to blame.

    Only the innermost exception says "Connection refused". httpcore passes it on as the first argument of its own
    exception, and anyio wraps it once more, as it tries all addresses of a host.
    """
    reason, certificate = str(error), False
    cause: object = error
    while isinstance(cause, BaseException):
        if verify_message := getattr(cause, "verify_message", ""):
            reason, certificate = verify_message, True
        elif isinstance(cause, OSError) and cause.strerror:
            # asyncio replaces the operating system's words with its own. Those of socket and ssl are better.
            plain = type(cause).__module__ == "builtins"
            reason = os.strerror(cause.errno) if plain and cause.errno else cause.strerror
        group = getattr(cause, "exceptions", cause.args)
        cause = cause.__cause__ or (group[0] if group else None)
    return quoted(reason) or type(error).__name__, certificate


# Retries: one prompt, and the attempts to get it answered


def retry_wait(error: AutonomousError, number: int, limit: int) -> float | None:
    """Seconds to wait before trying again after attempt ``number`` of ``limit``; None to give up."""
    if not error.retryable or number >= limit:
        return None
    if error.retry_after is not None:
        return error.retry_after if error.retry_after <= MAX_RETRY_AFTER else None
    return BACKOFF[number - 1] * random.uniform(1 - JITTER, 1 + JITTER)


class Exchange:
    """One prompt: what to send, when to try again, and what to tell `llm` in the end. No I/O."""

    def __init__(self, model: _Shared, prompt: llm.Prompt, stream: bool, response: Any, conversation: Any) -> None:
        options = cast(AutonomousOptions, prompt.options)
        self.model = model
        self.stream = stream
        self.proxy = options.proxy
        self.timeout = options.timeout or DEFAULT_TIMEOUT
        self.tools = [tool for tool in prompt.tools if isinstance(tool, llm.Tool)]
        self.schema = prompt.schema = schema_of(prompt, conversation)  # also for the log of `llm`
        self.validator = schema_validator(self.schema) if self.schema else None
        self.new_results = bool(self.tools) and holds_new_results(prompt.messages)
        self.messages = self._messages(prompt, conversation)
        url = endpoint_url(model.service.endpoint)
        self.auth = (url.username, url.password) if url.userinfo else None
        self.url = url.copy_with(userinfo=b"")  # httpx logs it, so it must not have the password
        self.reuse = True  # connections of earlier prompts may be used
        # Weak, because an async response holds the generator that holds this. If the caller stops reading, such a cycle
        # would keep the connection open until the garbage collector runs.
        self.response: Any = weakref.proxy(response)

    def _messages(self, prompt: llm.Prompt, conversation: Any) -> list[dict[str, Any]]:
        """The messages to send. Raises if the user has given nothing to answer."""
        in_json = schema_instructions(self.schema) if self.schema else ""
        instructions, after_results = in_json, ""
        if self.tools:  # a model that knows the schema before it has the results makes them up
            instructions, after_results = tool_instructions(self.tools), f"{AFTER_RESULTS} {in_json}".strip()
        image_types = self.model.service.attachment_types
        messages = build_messages(prompt.messages, image_types, bool(self.tools), instructions, after_results)
        last = messages[-1] if messages else {"role": "user", "content": ""}
        # The last message may be the assistant's. In a conversation, it is the answer before, and nothing was asked
        # since. Elsewhere, the caller has begun the answer for the model. Our own instructions are no prompt, either.
        nothing_new = last["role"] == "assistant" and conversation is not None
        if nothing_new or (isinstance(last["content"], str) and not last["content"].removesuffix(instructions).strip()):
            raise AutonomousError("the prompt is empty: nothing was sent")
        return messages

    def attempts(self) -> Iterator[Attempt]:
        """One attempt after another, for as long as trying again may help. Raises the error of the last."""
        attempt, limit = self.model.attempt_type(self), self.model.attempts
        while True:
            yield attempt
            error = attempt.reply.error
            if error is None:
                self._report(attempt)
                return
            checking = limit == 1  # only `llm autonomous check` asks for a single attempt
            located = error.located(self.url, attempt.number, checking)
            # What the next attempt is, unless a branch says otherwise.
            number, wait, corrected = attempt.number + 1, None, attempt.corrected
            if attempt.kept and error.retryable:  # the server had closed that connection: this does not count
                step, number, self.reuse = "trying again on a new connection", attempt.number, False
            elif error.correction and not corrected and number <= limit:
                step, corrected = "asking the model to correct it", attempt
            elif not attempt.yielded and (wait := retry_wait(error, attempt.number, limit)) is not None:
                step = f"trying again in {wait:.1f} s"
            else:
                raise located from attempt.failure
            logger.info("%s; %s", located, step)
            attempt = self.model.attempt_type(self, number, wait, corrected)

    def body(self, corrected: Attempt | None) -> bytes:
        """The request body: the prompt and, if an answer is to be corrected, that answer and what was wrong with it."""
        messages = self.messages
        if corrected and corrected.reply.error:
            answer, correction = corrected.reply.written.getvalue(), corrected.reply.error.correction
            said = [{"role": "assistant", "content": answer}] if answer.strip() else []
            messages = [*messages, *said, {"role": "user", "content": correction}]
        return build_body(self.model.service, messages, self.stream)

    def report_call(self, call: llm.ToolCall) -> list[StreamEvent]:
        """Tell `llm` to call a tool; the events keep the call in its place among the text."""
        self.response.add_tool_call(call)
        events = (("tool_call_name", call.name), ("tool_call_args", json.dumps(call.arguments)))
        return [StreamEvent(type=kind, chunk=chunk, tool_call_id=call.tool_call_id) for kind, chunk in events]

    def _report(self, attempt: Attempt) -> None:
        """Pass on the metadata to `llm`, and warn the user if the answer may be cut short."""
        reply, envelope = attempt.reply, attempt.reply.completion.envelope
        self.response.response_json = {**envelope}
        if isinstance(model := envelope.get("model"), str):
            self.response.set_resolved_model(quoted(model))
        answers = [attempt.corrected, attempt] if attempt.corrected else [attempt]
        usages = [answer.reply.completion.envelope.get("usage") for answer in answers]
        if usages := [usage for usage in usages if isinstance(usage, dict)]:
            sent, received = (count_tokens(usages, key) for key in ("prompt_tokens", "completion_tokens"))
            details = {key: value for key, value in usages[-1].items() if key.endswith("_details")}
            self.response.set_usage(input=sent, output=received, details=simplify_usage_dict(details) or None)
        if (unknown := reply.completion.not_understood) is not None:
            logger.warning("part of the reply was not understood; it begins: %s", quoted(as_json(unknown)))
        reason = quoted(str(envelope.get("finish_reason", "stop")))
        if not re.search(USUAL_FINISH_REASON, reason):
            limit = ": it reached the model's limit" if re.search("(?i)length|max|limit", reason) else ""
            logger.warning("the answer may be cut short%s (finish reason: %s)", limit, reason)
        elif not reply.whole:
            logger.warning("the answer may be cut short: the stream ended without finish reason or [DONE]")


def schema_of(prompt: llm.Prompt, conversation: Any) -> dict[str, Any] | None:
    """The schema of a prompt. If it answers tool calls, that is the schema of the prompt that led to them.

    `llm` does not pass the schema on from one round of a chain to the next.
    """
    schema = prompt.schema
    answered = {result.tool_call_id for result in prompt.tool_results}
    if answered and conversation and not schema:
        for response in conversation.responses:
            if any(call.tool_call_id in answered for call in response.tool_calls_or_raise()):
                schema = response.prompt.schema
    return cast("dict[str, Any] | None", schema)


def count_tokens(usages: list[dict[str, Any]], key: str) -> int | None:
    # A number that SQLite cannot store would make `llm` fail to log a good answer.
    counts = [usage[key] for usage in usages if isinstance(usage.get(key), int) and 0 <= usage[key] < 2**62]
    return sum(counts) if counts else None


class Attempt:
    """One try: the request, and the reply as far as it has arrived. No I/O.

    `execute` passes in the status and headers (`open`), then the bytes (`feed`) until they are `enough`, then any
    exception that got in the way (`failure`), and finally the end (`close`).
    """

    def __init__(
        self, exchange: Exchange, number: int = 1, wait: float | None = None, corrected: Attempt | None = None
    ) -> None:
        import httpx

        self.exchange = exchange
        self.number = number  # from 1
        self.wait = wait  # seconds to wait before sending it
        self.corrected = corrected  # the attempt whose answer the model is asked to correct
        self.connected = False  # a connection was opened for it
        self.kept = False  # it was sent on an older connection, and no reply has begun
        self.proxy = ""  # host and port of a proxy that has yet to connect
        self.socks_stream: Any = None  # the connection to a SOCKS proxy
        limits = httpx.Timeout(exchange.timeout, connect=min(exchange.timeout, CONNECT_TIMEOUT), pool=None)
        extensions = {"timeout": limits.as_dict(), "trace": functools.partial(exchange.model.trace, self)}
        self.request = httpx.Request(
            "POST", exchange.url, headers=build_headers(), content=exchange.body(corrected), extensions=extensions
        )
        tools = exchange.tools
        parser = ToolCallParser({tool.name for tool in tools}) if tools else None
        self.reply = Reply(parser, exchange.validator, exchange.new_results)
        self.yielded = False  # the user has seen some of the answer
        self.failure: Exception | None = None
        self.error_head: httpx.Response | None = None  # status and headers, if the status is not 2xx
        self.error_body = b""  # the beginning of what follows them
        self.coding = ""  # how the reply is compressed
        self.read_timeout = exchange.timeout  # seconds to wait for the next bytes
        self.deadline = 0.0  # when to stop reading, by time.monotonic(), if the answer is already complete
        self.enough = False  # nothing that still arrives is worth reading

    def follow(self, event: str, info: dict[str, Any]) -> Any:
        """Follow the request on its way, by the events of httpcore's ``trace`` extension.

        They say whether it got a new connection, and which proxy has yet to connect. A stream is returned to be closed:
        httpcore leaves it open after a SOCKS proxy has failed.
        """
        url, timeouts = self.exchange.url, self.request.extensions["timeout"]
        if event.endswith(".connect_tcp.started"):
            self.connected, peer = True, {"host": info["host"], "port": info["port"]}
            self.proxy = "" if url.copy_with(**peer) == url else url.copy_with(scheme="proxy", **peer).netloc.decode()
        elif event == "socks.setup_socks5_connection.started":
            # httpcore reads a SOCKS proxy's replies without a timeout. To all that it reads later, it gives one itself.
            self.socks_stream = info["stream"]
            self.socks_stream.read = functools.partial(info["stream"].read, timeout=timeouts["connect"])
        elif event == "socks.setup_socks5_connection.failed":
            return self.socks_stream
        elif event == "http11.send_request_headers.started" and info["request"].method == b"CONNECT":
            timeouts["read"] = timeouts["connect"]
        elif event.endswith((".send_request_headers.started", "socks.start_tls.started", "proxy.start_tls.started")):
            self.proxy, timeouts["read"] = "", self.exchange.timeout
            self.kept = not self.connected
            if self.kept and not self.exchange.reuse:
                import httpcore

                raise httpcore.ConnectionNotAvailable  # httpcore closes this connection and takes another
        return None

    def open(self, head: httpx.Response) -> None:
        """Take the status and headers of the reply."""
        self.kept = False
        self.request.extensions.pop("trace")  # so that no cycle of references holds the attempt
        if not head.is_success:
            self.error_head = head
            self._read_on(ERROR_BODY_TIMEOUT)
        named = head.headers.get("content-encoding", "")
        codings = [found[0].removeprefix("x-") for found in re.finditer(CODINGS, named.lower())]
        if codings not in ([], ["gzip"], ["deflate"]):
            # We did not ask for it, and one compression inside another can expand to terabytes.
            raise AutonomousError(f"the reply was not understood: its encoding is {quoted(named)}")
        self.coding = "".join(codings)

    def feed(self, data: bytes) -> list[Any]:
        """Take the next bytes of the reply, and return the pieces of the answer that they complete."""
        if self.error_head:
            self.error_body += data[: MAX_PAGE_BYTES - len(self.error_body)]
            self.enough = len(self.error_body) == MAX_PAGE_BYTES
            self._read_on(ERROR_BODY_TIMEOUT)
            return []
        reply = self.reply
        pieces = reply.feed(data)
        if reply.error:
            self.enough = True
        elif reply.whole:
            # Reading on to the end keeps the connection alive for the next prompt, and may bring the usage. It is not
            # worth waiting long for.
            self._read_on(DRAIN_TIMEOUT if reply.ended else FINISH_TIMEOUT, restart=bool(pieces))
        else:
            self.read_timeout, self.deadline = self.exchange.timeout, 0.0
        # Calls come out in `close`. Joined, the texts are less work for `llm`.
        if len(pieces) > 1 and all(isinstance(piece, str) for piece in pieces):
            pieces = ["".join(pieces)]
        return self._out(pieces)

    def _read_on(self, seconds: float, restart: bool = False) -> None:
        """Read on for at most ``seconds`` from the first call with this limit or, with ``restart``, from now."""
        seconds = min(seconds, self.exchange.timeout)
        if restart or seconds != self.read_timeout or not self.deadline:
            self.read_timeout, self.deadline = seconds, time.monotonic() + seconds
        elif time.monotonic() > self.deadline:
            self.enough = True

    def close(self) -> list[str | StreamEvent]:
        """Take the end of the reply, and return the pieces of the answer that it completes."""
        failure, timeout = self.failure, self.exchange.timeout
        if self.error_head:
            failure = status_error(self.error_head, self.error_body)
        elif failure and self.proxy:
            failure = transport_error(failure, False, timeout, self.proxy)
        return self._out(self.reply.close(failure, timeout))

    def _out(self, pieces: list[Any]) -> list[str | StreamEvent]:
        """The pieces in the form that `llm` expects from `execute`."""
        if pieces and not self.yielded:
            self.yielded = True
            if self.corrected and self.corrected.yielded:
                pieces.insert(0, "\n")
        out: list[str | StreamEvent] = []
        for piece in pieces:
            out += self.exchange.report_call(piece) if isinstance(piece, llm.ToolCall) else [piece]
        return out


# Connections: kept from prompt to prompt, because a client takes 30 ms to make, and a connection a TLS handshake

ClientKey = tuple[Any, ...]

_locks: dict[int, threading.Lock] = {}  # by process: if a lock is held during a fork, the child never gets it
_ssl_contexts: dict[ClientKey, ssl.SSLContext] = {}
_clients: dict[ClientKey, httpx.Client] = {}
_pools: dict[Pool, None] = {}  # an ordered set, of the pools of all event loops


def client_key(proxy: str | None) -> ClientKey:
    """Everything that decides which client can send a prompt: the process, the proxy and the environment."""
    return (os.getpid(), proxy, *map(os.environ.get, (*PROXY_VARIABLES, *CERTIFICATE_VARIABLES)))


def new_client(kind: Callable[..., Any], key: ClientKey) -> Any:
    """An httpx client. Certificates are loaded once for all clients, and always verified.

    httpx reads the proxy settings from the environment itself, but only if it is not given a transport.
    """
    import httpx

    proxy, certificates = key[1], key[-len(CERTIFICATE_VARIABLES) :]
    logging.getLogger("httpcore.socks").setLevel(logging.INFO)  # at DEBUG it logs the proxy's password
    try:
        context = _ssl_contexts.get(certificates)
        if context is None:
            context = _ssl_contexts[certificates] = httpx.create_ssl_context()
        return kind(
            verify=context,
            # To httpx the two are the same, but before 0.28 it rejects socks5h.
            proxy=proxy.replace("socks5h://", "socks5://", 1) if proxy else None,
            limits=httpx.Limits(max_keepalive_connections=POOL_SIZE, keepalive_expiry=KEEPALIVE),
            event_hooks={"response": [quote_location if kind is httpx.Client else quote_location_async]},
        )
    except OSError as error:
        reason, _ = root_reason(error)
        message = f"the certificates that SSL_CERT_FILE or SSL_CERT_DIR names cannot be loaded: {reason}"
        raise AutonomousError(message) from error
    except ImportError:
        message = "a SOCKS proxy needs one more package: llm install 'httpx[socks]' (or pip install)"
        raise AutonomousError(message) from None
    except (ValueError, httpx.InvalidURL):
        # Neither quote httpx nor chain its exception: both may contain a password.
        urls = {name: os.environ.get(name) for name in PROXY_VARIABLES[:-2]}
        bad = [name for name, url in urls.items() if url and not is_proxy_url(url if "://" in url else f"http://{url}")]
        if proxy or bad:
            message = "the proxy, from -o proxy or the environment, is not a proxy URL: look at "
            raise AutonomousError(message + ("-o proxy" if proxy else bad[0])) from None
        raise AutonomousError("NO_PROXY cannot be read: write an IPv6 address without brackets, such as ::1") from None


def quote_location(head: httpx.Response) -> None:
    """Escape a ``Location`` that is not a URL. httpx parses it and would raise, although no redirect is followed."""
    import httpx

    try:
        httpx.URL(head.headers.get("location", ""))
    except httpx.InvalidURL:
        head.headers["location"] = quote(head.headers["location"])


async def quote_location_async(head: httpx.Response) -> None:
    quote_location(head)


def sync_client(proxy: str | None) -> httpx.Client:
    """This process's client for ``proxy``, made when it is first needed."""
    import httpx

    key = client_key(proxy)
    with _locks.setdefault(os.getpid(), threading.Lock()):
        if key not in _clients:
            _clients[key] = new_client(httpx.Client, key)
            atexit.register(_close_client, os.getpid(), _clients[key])
        return _clients[key]


def _close_client(pid: int, client: httpx.Client) -> None:
    if pid == os.getpid():  # a child process must not close its parent's connections
        client.close()


class Pool:
    """An async client, which is one connection pool, and a count of the prompts using it (``async with``)."""

    def __init__(self, loop: asyncio.AbstractEventLoop, key: ClientKey) -> None:
        import httpx

        self.loop = loop
        self.key = key
        self.client: httpx.AsyncClient = new_client(httpx.AsyncClient, key)
        self.in_flight = 0
        self.idle_since = 0.0
        self.life = self._live()

    async def _live(self) -> AsyncGenerator[None, None]:
        # When an event loop shuts down, it closes every async generator that was started in it. There is no other way
        # to learn of it in time to close the client.
        _pools[self] = None
        try:
            yield
        finally:
            _pools.pop(self, None)
            # A child process must not close its parent's connections. And a loop that never shut down, as nest_asyncio
            # leaves its own, no longer runs at the end of the process, so it cannot close anything.
            if self.key[0] == os.getpid() and self.loop.is_running():
                await self.client.aclose()

    async def __aenter__(self) -> httpx.AsyncClient:
        self.in_flight += 1
        return self.client

    async def __aexit__(self, *exception: object) -> None:
        self.in_flight -= 1
        self.idle_since = time.monotonic()


async def take_pool(proxy: str | None) -> Pool:
    """A pool of the running event loop with room for another prompt.

    One large pool would be slow: for each request, httpcore looks at every connection and, for each idle one, at all
    the others.
    """
    import asyncio

    loop, key = asyncio.get_running_loop(), client_key(proxy)
    for pool in [*_pools]:
        if pool.loop.is_closed():  # without having shut down
            _pools.pop(pool, None)
    pools = [pool for pool in [*_pools] if (pool.loop, pool.key) == (loop, key)]
    for pool in pools[1:]:
        if not pool.in_flight and pool.idle_since < time.monotonic() - KEEPALIVE and pool in _pools:
            await pool.life.aclose()
    for pool in pools:
        if pool.in_flight < POOL_SIZE and pool in _pools:
            return pool
    pool = Pool(loop, key)
    await anext(pool.life)
    return pool


# What moves the bytes


def read_sync(head: httpx.Response, attempt: Attempt) -> Iterator[bytes]:
    """The body of a reply. The attempt's `read_timeout` says how long to wait for each piece of it.

    httpcore looks up the timeout when iterating over a body begins, and iterating can begin again in the middle. So
    that is how to change it, for this request alone.
    """
    started = []  # all of them are kept: one that is dropped before its end would close the connection
    live = "network_stream" in head.extensions  # a reply that a test made up would start again at its beginning
    while True:
        limit = attempt.request.extensions["timeout"]["read"] = attempt.read_timeout
        started.append(iter(cast("httpx.SyncByteStream", head.stream)))
        for data in started[-1]:
            yield data
            if attempt.read_timeout != limit and live:
                break
        else:
            return


class AsyncBody:
    """The same for async. No generator: see `AsyncAutonomous.execute`.

    A wait is limited by anyio, as in httpcore, which shields the closing of a connection from anyio's cancellation
    only. asyncio's could interrupt it, and the connection would stay in the pool for ever.
    """

    def __init__(self, head: httpx.Response, attempt: Attempt) -> None:
        self.pieces = aiter(cast("httpx.AsyncByteStream", head.stream))
        self.attempt = attempt

    def __aiter__(self) -> AsyncBody:
        return self

    async def __anext__(self) -> bytes:
        import anyio  # which comes with httpx

        if self.attempt.read_timeout == self.attempt.exchange.timeout:  # httpcore limits it itself
            return await anext(self.pieces)
        with anyio.fail_after(self.attempt.read_timeout):
            return await anext(self.pieces)


def unpack(coding: str, body: Any) -> httpx.Response:
    """A response whose `iter_bytes` or `aiter_bytes` decompresses ``body``."""
    import httpx

    return httpx.Response(200, headers={"content-encoding": coding}, content=body)


class _Shared:
    """Everything that the sync and the async model have in common."""

    can_stream = True
    supports_tools = True
    supports_schema = True
    Options = AutonomousOptions
    trace: Callable[..., Any]

    def __init__(self, service: ServiceModel, attempts: int = ATTEMPTS, attempt_type: type[Attempt] = Attempt) -> None:
        self.service = service
        self.model_id = service.model_id
        self.attachment_types: set[str] | frozenset[str] = service.attachment_types
        self.attempts = attempts
        self.attempt_type = attempt_type


class Autonomous(_Shared, llm.Model):  # type: ignore[misc]  # llm nests its Options class
    """A model of the service, as `llm.get_model` gives it."""

    @staticmethod
    def trace(attempt: Attempt, event: str, info: dict[str, Any]) -> None:
        if stream := attempt.follow(event, info):
            stream.close()

    def execute(
        self, prompt: llm.Prompt, stream: bool, response: llm.Response, conversation: llm.Conversation | None
    ) -> Iterator[str | StreamEvent]:
        exchange = Exchange(self, prompt, stream, response, conversation)
        client = sync_client(exchange.proxy)
        for attempt in exchange.attempts():
            if attempt.wait is not None:
                time.sleep(attempt.wait)
            try:
                with contextlib.closing(client.send(attempt.request, auth=exchange.auth, stream=True)) as head:
                    attempt.open(head)
                    body = read_sync(head, attempt)
                    for data in unpack(attempt.coding, body).iter_bytes() if attempt.coding else body:
                        yield from attempt.feed(data)
                        if attempt.enough:
                            break
            except Exception as failure:  # the user gets one line, whatever it is; the cause is chained
                attempt.failure = failure
            yield from attempt.close()


class AsyncAutonomous(_Shared, llm.AsyncModel):  # type: ignore[misc]
    """A model of the service, as `llm.get_async_model` gives it."""

    @staticmethod
    async def trace(attempt: Attempt, event: str, info: dict[str, Any]) -> None:
        if stream := attempt.follow(event, info):
            await stream.aclose()

    async def execute(
        self,
        prompt: llm.Prompt,
        stream: bool,
        response: llm.AsyncResponse,
        conversation: llm.AsyncConversation | None,
    ) -> AsyncGenerator[str | StreamEvent, None]:
        import asyncio

        exchange = Exchange(self, prompt, stream, response, conversation)
        del response, conversation  # see the weak reference in Exchange
        # When an event loop shuts down, it closes all async generators at once, and reports an error if two of them try
        # to close each other. So this has to be the only one, apart from those of httpx.
        async with await take_pool(exchange.proxy) as client:
            for attempt in exchange.attempts():
                if attempt.wait is not None:
                    await asyncio.sleep(attempt.wait)
                try:
                    head = await client.send(attempt.request, auth=exchange.auth, stream=True)
                    async with contextlib.aclosing(head):
                        attempt.open(head)
                        body = AsyncBody(head, attempt)
                        async for data in unpack(attempt.coding, body).aiter_bytes() if attempt.coding else body:
                            for piece in attempt.feed(data):
                                yield piece
                            if attempt.enough:
                                break
                except Exception as failure:
                    attempt.failure = failure
                for piece in attempt.close():
                    yield piece


# The one command


@llm.hookimpl
def register_commands(cli: click.Group) -> None:
    cli.add_command(autonomous)


@click.group()
def autonomous() -> None:
    """
    Find out which models of Autonomous AI answer

    To list the models with their aliases and options, run: llm models --options -q autonomous
    """


@autonomous.command()
@click.option("model_ids", "-m", "--model", multiple=True, help="Model to ask, can be repeated (default: all five)")
@click.option("--timeout", default=20.0, show_default=True, help="Seconds to wait for each whole answer")
@click.option("options", "-o", "--option", type=(str, str), multiple=True, help="Model option, such as: -o proxy URL")
@click.option("json_", "--json", is_flag=True, help="Output JSON, once all models have answered")
@click.option("--raw", is_flag=True, help="Print raw requests and replies to standard error, one model at a time")
def check(
    model_ids: tuple[str, ...], timeout: float, options: tuple[tuple[str, str], ...], json_: bool, raw: bool
) -> None:
    """
    Ask each model for one word, and show which of them answer

    The models are asked at the same time, once each. A line for each one shows the model, its endpoint, and either
    "ok" with the seconds until the first text arrived, or the error. Nothing is logged.

    The exit code is 0 if all models answer, and 1 otherwise.
    """
    import asyncio

    if not 0 < timeout <= MAX_TIMEOUT:
        raise click.BadParameter("must be more than 0, and at most a day", param_hint="'--timeout'")
    try:
        models = [llm.get_async_model(model_id) for model_id in model_ids]
        settings = AutonomousOptions.model_validate({"timeout": MAX_TIMEOUT, **dict(options)})
    except llm.UnknownModelError as error:
        raise click.ClickException(error.args[0]) from None
    except ValidationError as error:
        raise click.ClickException("; ".join(f"{e['loc'][0]}: {e['msg']}" for e in error.errors())) from None
    services = [model.service for model in models if isinstance(model, AsyncAutonomous)]
    if len(services) < len(models):
        raise click.ClickException("only the models of Autonomous AI can be checked: llm models -q autonomous")
    rows = asyncio.run(_check(services or [*SERVICE_MODELS], timeout, settings.model_dump(), not json_, raw))
    if json_:
        click.echo(json.dumps(rows, indent=2))
    if not all(row["ok"] for row in rows):
        raise click.exceptions.Exit(1)


class ShownAttempt(Attempt):
    """An attempt that shows on standard error everything that is sent and received, except passwords."""

    def __init__(self, exchange: Exchange, *made_by: Any) -> None:
        super().__init__(exchange, *made_by)
        self.start = time.perf_counter()
        request, messages = self.request, json.loads(base64.b64decode(json.loads(self.request.content)["messages"]))
        self.show(">", f"{request.method} {request.url.raw_path.decode()} HTTP/1.1".encode())
        self.show_headers(">", request.headers)
        if exchange.auth:
            self.show(">", b"Authorization: (the user name and password of the URL)")
        self.show(">", request.content)
        self.show(">", b"the messages in it: " + json.dumps(messages).encode())

    def show(self, sign: str, data: bytes) -> None:
        click.echo(f"{time.perf_counter() - self.start:8.3f} s {sign} {repr(data)[2:-1]}", err=True)

    def show_headers(self, sign: str, headers: httpx.Headers) -> None:
        for name, value in headers.raw:
            self.show(sign, name + b": " + value)

    def open(self, head: httpx.Response) -> None:
        self.show("<", f"{head.http_version} {head.status_code} {head.reason_phrase}".encode())
        self.show_headers("<", head.headers)
        super().open(head)

    def feed(self, data: bytes) -> list[Any]:
        self.show("<", data)
        return super().feed(data)

    def close(self) -> list[Any]:
        end = root_reason(self.failure)[0] if self.failure else "stopped reading" if self.enough else "the end"
        self.show("!", end.encode())
        return super().close()


async def _check(
    services: list[ServiceModel], timeout: float, options: dict[str, Any], show: bool, raw: bool
) -> list[dict[str, Any]]:
    """Ask all models at once, or one by one if ``raw``. Show each row as soon as it is known, and return them all."""
    import asyncio

    urls = {service: endpoint_url(service.endpoint) for service in services}
    width = max(len(service.model_id) for service in SERVICE_MODELS)

    async def ask(service: ServiceModel) -> dict[str, Any]:
        row: dict[str, Any] = {"model": service.model_id, "endpoint": service.endpoint, "ok": False}
        start = time.perf_counter()

        model = AsyncAutonomous(service, attempts=1, attempt_type=ShownAttempt if raw else Attempt)

        async def read() -> None:
            async for _ in model.prompt("Reply with one word: OK", options=options):
                row.setdefault("seconds", round(time.perf_counter() - start, 3))

        try:
            await asyncio.wait_for(read(), timeout)
            row["ok"] = True
        except AutonomousError as error:
            row["error"] = error.message
        except asyncio.TimeoutError:
            late = AutonomousError(f"no whole answer within {timeout:g} s", outage=True)
            row["error"] = late.located(urls[service], checking=True).message
        if show:
            result = f"ok, {row['seconds']:.2f} s" if row["ok"] else row["error"]
            click.echo(f"{service.model_id:<{width}} : {service.endpoint:<11} : {result}")
        return row

    if show and sys.stderr.isatty():
        host = urls[services[0]].netloc.decode()
        click.echo(f"Asking {len(urls)} models at {host}, for up to {timeout:g} s ...", err=True)
    return [await ask(service) for service in urls] if raw else list(await asyncio.gather(*map(ask, urls)))
