"""An LLM plugin for the models of Autonomous AI, a free service that needs no key and is often down.

An *exchange* is one prompt and everything done to get it answered. Each try is an *attempt*, and what the server sends
back is its *reply*. The answer comes out of the reply in *pieces*: text and tool calls. If the model makes a mistake,
a *correction* tells it what was wrong, and it answers again.

The module follows a prompt on its way: the models, registering them, what is sent, how the reply is read, what can go
wrong, retries, connections, the two classes that move the bytes, and at the end `llm autonomous check`. Only those two
classes do I/O; all the rest is shared by sync and async.
"""

from __future__ import annotations

import ast
import atexit
import base64
import codecs
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
from collections.abc import AsyncGenerator, Callable, Collection, Iterable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar, cast
from urllib.parse import urlsplit

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

# Any other finish reason means that the answer may be cut short.
USUAL_FINISH_REASONS = (
    "stop(ped|_token|_sequence)?|eos(_token)?|eot|end(_turn|_of_turn)?|completed?|done|finish(ed)?|success"
    "|tool_calls?|tool_use|function_call"
)
NO_FINISH_REASONS = ("", "null", "none", "undefined")
# The content codings that IANA has registered. Servers also send words that are none, such as utf-8.
CODINGS = r"\b(aes128gcm|br|deflate|exi|dcb|dcz|(x-)?compress|(pack200-|x-)?gzip|zstd)\b"

MAX_EVENT_BYTES = 16 * 1024 * 1024  # one event, one line, or one whole JSON reply
MAX_PAGE_BYTES = 64 * 1024  # of an error body, and of a web page whose title is wanted
MAX_HELD = 256  # characters to hold back while it is unclear whether they begin a tool call
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
            "Send the prompt through this proxy: an http://, https://, socks5:// or socks5h:// URL without user "
            "name and password, which LLM would log. Set HTTPS_PROXY for a proxy that needs them."
        ),
    )
    timeout: float | None = Field(
        default=None,
        gt=0,
        le=MAX_TIMEOUT,
        description=f"Seconds of silence before the prompt fails, more than 0. Default {DEFAULT_TIMEOUT:g}.",
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


TOOL_INSTRUCTIONS = """\
You can call these tools:
<tools>
{tools}
</tools>
To call one, write this and nothing behind it:
<tool_call>
{{"name": "the name of the tool", "arguments": {{"argument": "value"}}}}
</tool_call>
Several calls are written one behind the other. You are then given the results in <tool_response>: never write them \
yourself. If you need no tool, just answer."""
SCHEMA_INSTRUCTIONS = """\
{when}nswer with one JSON value that matches this JSON schema, and with nothing else: no code fence, no words.
{schema}"""


def build_instructions(tools: list[llm.Tool], schema: dict[str, Any] | None) -> str:
    """How to call tools and which JSON to answer with: part of the system prompt, as the wire has no fields for it."""
    instructions = []
    if tools:
        fields = (("name", "name"), ("description", "description"), ("parameters", "input_schema"))
        described = ({key: value for key, field in fields if (value := getattr(tool, field))} for tool in tools)
        lines = "\n".join(json.dumps(tool, ensure_ascii=False) for tool in described)
        instructions.append(TOOL_INSTRUCTIONS.format(tools=lines))
    if schema:
        when = "When you call no tool, a" if tools else "A"
        instructions.append(SCHEMA_INSTRUCTIONS.format(when=when, schema=json.dumps(schema, ensure_ascii=False)))
    return "\n\n".join(instructions)


def build_messages(
    messages: list[llm.Message], image_types: frozenset[str], tools: bool = False, instructions: str = ""
) -> list[dict[str, Any]]:
    """The whole conversation as PROTOCOL.md wants it: ``[{"role": …, "content": …}, …]``.

    ``content`` is a string, or a list of OpenAI content parts if there are images of ``image_types``. If this prompt
    has ``tools``, earlier tool calls and results are written in the tags that the model was told to use. Otherwise they
    become notes in brackets, like everything else that the wire format cannot carry, so that a conversation started
    with another model can go on. Reasoning and empty messages are left out. ``instructions`` are added to the system
    prompt.
    """
    built: list[dict[str, Any]] = []
    if instructions:
        own = messages[0].parts if messages and messages[0].role == "system" else []
        part = TextPart(f"\n\n{instructions}" if own else instructions)
        messages = [llm.Message(role="system", parts=[*own, part]), *messages[1 if own else 0 :]]
    for message in messages:
        if content := build_content(message.parts, image_types, tools):
            role = message.role if message.role in ("system", "assistant") else "user"
            built.append({"role": role, "content": content})
    return built


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
    return tagged("tool_call", {"name": part.name, "arguments": part.arguments})


def result_text(part: ToolResultPart, tools: bool) -> str:
    if not tools:
        return f"[the tool {part.name} {f'failed: {part.exception}' if part.exception else f'returned: {part.output}'}]"
    error = {"error": part.exception} if part.exception else {}
    return tagged("tool_response", {"name": part.name, "content": part.output, **error})


def tagged(tag: str, value: dict[str, Any]) -> str:
    return f"<{tag}>\n{json.dumps(value, ensure_ascii=False, default=str)}\n</{tag}>"


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
    value spread over many lines.

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

    def feed(self, data: bytes, end: bool = False) -> list[Any]:
        """The values completed by ``data``, the next bytes of the reply, or by its ``end``."""
        values: list[Any] = []
        if self.error is None and not self.ended:
            try:
                self._read_bytes(data, values)
                if end:
                    self._read_end(values)
            except AutonomousError as error:
                self.error = error
        return values

    def _read_bytes(self, data: bytes, values: list[Any]) -> None:
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
            elif self._held and not self._document:
                self._read_held(values)
        self._line += rest
        if len(self._line) > MAX_EVENT_BYTES:
            raise too_large()

    def _read_end(self, values: list[Any]) -> None:
        last_line = self._line.decode("utf-8", "replace")
        if last_line:
            self._read_line(last_line, values)
        self._read_held(values, cut=bool(last_line))

    def _read_line(self, line: str, values: list[Any]) -> None:
        if self._first:
            self._first = False
            line = line.removeprefix("\ufeff")
        if self._document:
            self._hold(line)
        elif line.startswith("data:") or line == "data":
            # Most events are a single line, which is read at once: some servers send no blank line after it. The
            # lines of any other event are held until it is complete.
            if self._held:
                self._hold(line[5:].removeprefix(" "))
            elif rest := self._read_values(line[5:].lstrip(), values):
                self._hold(rest)
        elif line.startswith(":") or line.partition(":")[0] in ("event", "id", "retry"):
            pass
        elif line.lstrip().startswith(("{", "[", "<")):
            self._read_held(values)
            if rest := self._read_values(line.lstrip(), values):
                self._document = True
                self._hold(rest)
        elif re.fullmatch(r"(?as)\s*|[\w-]+(:.*)?", line):
            # Unknown fields are to be ignored, says WHATWG. A line that cannot be a field may be text that was garbled.
            self.stray = self.stray or line
        else:
            raise not_understood(line)

    def _hold(self, line: str) -> None:
        self._held += line.encode() + b"\n"
        if len(self._held) > MAX_EVENT_BYTES:
            raise too_large()

    def _read_held(self, values: list[Any], cut: bool = False) -> None:
        """Read the event that ends here, at a blank line, at the next event or at the end of the reply."""
        held = self._held.decode().lstrip()
        self._held.clear()
        if held.startswith("<"):
            self.page = True
            raise web_page(held)
        if rest := self._read_values(held, values):
            if not cut:
                raise not_understood(rest)
            self.cut_off = rest

    def _read_values(self, text: str, values: list[Any]) -> str:
        """Read as many JSON values as there are, and return the rest: the beginning of one that is not complete."""
        start = 0
        while start < len(text) and not self.ended:
            try:
                value, end = _decode_json(text, start)
            except (ValueError, RecursionError):
                if not text.startswith("[DONE]", start):
                    return text[start:]
                self.ended = True
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
    """Turns the values of a reply into text. They are chat completion chunks, or one whole chat completion."""

    def __init__(self) -> None:
        self.envelope: dict[str, Any] = {}  # id, model, created, finish_reason and usage, if they were sent
        self.understood = False  # something with a known shape has arrived
        self.answered = False  # some text has arrived
        self.whole = False  # the answer is complete: there was a finish reason, or a whole completion
        self._index: Any = None  # of the choice that is the answer
        # A server that cuts text by UTF-16 units may split a character: one half (such as \ud83d) ends a chunk, and
        # the other begins the next. Neither half can be printed or stored. This decoder waits for the second.
        self._characters = codecs.getincrementaldecoder("utf-16-le")("replace")

    def read(self, chunk: Any) -> str:
        """The text of a chunk or of a whole completion. Raises the error that it reports, or that it is neither."""
        if not isinstance(chunk, dict):
            raise not_understood(as_json(chunk))
        if chunk.get("error"):
            raise AutonomousError(f"the service reports an error: {quoted(error_words(chunk))}")
        choice = self._choice(chunk)
        part = choice.get("delta") or choice.get("message") or {}
        text = isinstance(part, dict) and (part.get("content") or part.get("refusal") or choice.get("text") or "")
        reason, usage = choice.get("finish_reason") or chunk.get("finish_reason"), chunk.get("usage")
        if not isinstance(text, str) or not ("choices" in chunk or usage or reason):
            raise not_understood(as_json(chunk))
        self.understood = True
        if text:
            self.answered, self.whole = True, False
            self._index = self._index or choice.get("index") or 0
            if not text.isascii() or self._characters.getstate()[0]:
                text = self._characters.decode(text.encode("utf-16-le", "surrogatepass"))
        if reason and str(reason).strip().lower() not in NO_FINISH_REASONS:
            self.envelope["finish_reason"] = shallow(reason)
            self.whole = True
        if part and not choice.get("delta"):
            self.whole = True
        if usage:
            self.envelope["usage"] = shallow(usage)
        for key in ("id", "model", "created"):
            if key not in self.envelope and chunk.get(key) is not None:
                self.envelope[key] = shallow(chunk[key])
        return text

    def _choice(self, chunk: dict[str, Any]) -> dict[str, Any]:
        """The first choice. Only one is asked for, but a server may take turns in sending several."""
        choices = chunk.get("choices")
        if not choices:
            return {}
        if not isinstance(choices, list) or not isinstance(choices[0], dict):
            raise not_understood(as_json(chunk))
        for choice in choices:
            if isinstance(choice, dict) and choice.get("index") in (None, self._index or 0):
                return choice
        return choices[0] if self._index is None else {}

    def close(self) -> str:
        """The replacement character, if the reply ended in the middle of a character."""
        return self._characters.decode(b"", final=True)


# Tool calls and JSON in what the model wrote


class ToolCallParser:
    """Splits the text of an answer into text and tool calls. Used only when the model was given tools.

    Hermes and Qwen write a call as JSON in ``<tool_call>`` or ``<tools>``. Llama writes nothing but the JSON: bare,
    after ``<|python_tag|>``, or in a code fence. That is a call only if it is the whole answer and names tools in
    ``names``. Everything else is text and comes out unchanged, except for white space next to a call.

    Text is passed on at once, but everything from the first call on is held until the end, because one unreadable call
    makes the model write all of them again. `feed` never raises: such a call is left in `error`, with a correction for
    the model. The result does not depend on how the text was cut, and the cost is O(n).
    """

    def __init__(self, names: Collection[str]) -> None:
        self.names = names
        self.error: AutonomousError | None = None
        self.finished = False  # the model goes on to make up results, so the answer ends with its calls
        self._at_start = True  # the whole answer may still turn out to be a bare call
        self._undecided = ""  # a few characters that may be the beginning of a call
        self._calls = io.StringIO()  # everything from the first call on
        self._tail = ""  # the last few characters of it
        self._parsed = 0  # how much of it there was when it was last parsed

    def feed(self, pieces: Iterable[str], end: bool = False) -> list[Any]:
        """The text that ``pieces`` completes; at the ``end`` of the answer, the rest of the text and the calls."""
        plain, calls = "", "".join(pieces)
        if not self._calls.tell():
            plain, calls, self._undecided = self._partition(self._undecided + calls, end)
        out: list[Any] = [plain] if plain else []
        if calls:
            out += self._hold(calls)
        if end and self._calls.tell() and not self.error:
            try:
                answer, self.finished = read_answer(self._calls.getvalue(), self.names)
                out += answer
            except AutonomousError as error:
                self.error = error
        return out

    def _partition(self, text: str, end: bool) -> tuple[str, str, str]:
        """``text`` in three parts: plain text, everything from the first call on, and what is still undecided."""
        if self._at_start:
            bare = is_bare_call(text, self.names)
            if bare is None and not end:
                return "", "", text
            self._at_start = False
            if bare:
                return "", text, ""
        if call := re.search(CALL, text):
            return text[: call.start()], text[call.start() :], ""
        decided = len(text) if end else begin_of_tag(text)
        return text[:decided], "", text[decided:]

    def _hold(self, text: str) -> list[Any]:
        """Hold what looks like calls. If it turns out to be none, return it as the text that it is."""
        size = self._calls.tell() + self._calls.write(text)
        if size > MAX_EVENT_BYTES:
            self.error = self.error or too_large("a tool call")
        recent = self._tail + text
        self._tail = recent[-len(RESULT_TAG) :]
        # Words after the JSON mean that it was no call, a result that it was one - unless they are inside a string. To
        # find out, parse everything, but not again until there is twice as much: that keeps the cost linear.
        if self.error or size < 2 * self._parsed or not re.search(BEHIND_CALLS, recent):
            return []
        self._parsed, held = size, self._calls.getvalue()
        calls, behind = read_bare_calls(held, self.names)
        if behind and not calls:
            self._calls, self._tail, self._parsed = io.StringIO(), "", 0
            return [held[:behind], *self.feed([held[behind:]])]
        with contextlib.suppress(AutonomousError):
            self.finished = read_answer(held, self.names)[1]
        return []


# Strings, because `re` compiles them when they are first used, and `llm --help` never does.
RESULT_TAG = "<tool_response>"
CALL = r"<(?P<tag>tool_call|tools)>\s{0,255}(?=[{\[])"
CALL_OR_RESULT = rf"{CALL}|{RESULT_TAG}"
BEHIND_CALLS = rf"[}}\]]\s*[^\s}}\],;{{\[`<]|{RESULT_TAG}"
CLOSING_TAG = r"[\s;,]*</(tool_call|tools)>"
SEPARATOR = r"[\s;,]*"
BEFORE_BARE = r"\s*(<\|python_tag\|>\s*)?(```(json)?\s*)?"
BEHIND_BARE = rf"(?s)\s*(```\s*)?({RESULT_TAG}.*)?"
JSON_START = r"""\{\s*["}]|\[\s*(["\]\[{0-9-]|true|false|null)"""
# A bracket, or a string in JSON's or Python's quotes, even unfinished. An apostrophe within a word is not a quote.
TOKEN = r"""(?s)[{}\[\]]|"[^"\\]*(?:\\.[^"\\]*)*"?|(?<!\w)'[^'\\]*(?:\\.[^'\\]*)*'?"""

BARE_STARTS = ('{"type":"function"', '{"parameters":', '{"arguments":', '{"function":', '{"id":')
CALL_KEYS = frozenset(("name", "arguments", "parameters", "function", "type", "id"))


def is_bare_call(text: str, names: Collection[str]) -> bool | None:
    """Whether an answer that begins with ``text`` looks like a call of one of ``names``; None: too early to say."""
    starts = [*BARE_STARTS, *(f'{{"name":"{squeezed(name)}"' for name in names)]
    openings = [before + start for before in ("", "```", "```json", "<|python_tag|>") for start in starts]
    begin = squeezed(text[:MAX_HELD])
    if begin.startswith(tuple(openings)):
        return True
    return None if len(text) < MAX_HELD and any(opening.startswith(begin) for opening in openings) else False


def squeezed(text: str) -> str:
    """The beginning of some JSON in a form that can be compared: no white space, no lists, one kind of quotes."""
    return re.sub(r"[\s\[]", "", text).replace("'", '"')


def begin_of_tag(text: str) -> int:
    """Where ``text`` ends with the beginning of a call's tag; its length if it does not."""
    _, bracket, tail = text[-MAX_HELD - len(RESULT_TAG) :].rpartition("<")
    cut = bracket and any(tag.startswith(tail) or tail.rstrip() == tag for tag in ("tool_call>", "tools>"))
    return len(text) - len(bracket + tail) if cut else len(text)


def read_answer(text: str, names: Collection[str]) -> tuple[list[Any], bool]:
    """The text and calls of an answer, and whether made-up results follow. Raises if a call cannot be read."""
    calls, behind = read_bare_calls(text, names)
    if calls:
        return calls, RESULT_TAG in text[behind:]
    pieces: list[Any] = []
    start = 0  # of the text that is not in pieces yet
    while found := re.compile(CALL_OR_RESULT).search(text, max(start, behind)):
        if not found["tag"]:
            if pieces:
                break
            behind = found.end()  # with no call before it, a result is just text
            continue
        try:
            values, end = read_values(text, found.end())
            if found["tag"] == "tools" and any(isinstance(value, dict) and "description" in value for value in values):
                behind = end  # so is the list of tools that the model was given
                continue
            if not values:
                raise ValueError("there is none in it")
            calls = [read_call(value) for value in values]
        except (ValueError, RecursionError) as error:
            raise broken_call(str(error), text[found.end() :]) from None
        pieces += [text[start : found.start()], *calls]
        start = skip(CLOSING_TAG, text, end)
    else:
        pieces.append(text[start:])
    return [piece for piece in pieces if not isinstance(piece, str) or piece.strip()], bool(found)


def read_bare_calls(text: str, names: Collection[str]) -> tuple[list[llm.ToolCall], int]:
    """The calls, if the answer is nothing but bare calls, and the position after the JSON that it begins with."""
    end = 0
    try:
        values, end = read_values(text, skip(BEFORE_BARE, text))
        calls = [read_call(value) for value in values]
    except (ValueError, RecursionError):
        return [], end
    whole = re.compile(BEHIND_BARE).fullmatch(text, end) and all(call.name in names for call in calls)
    return calls if whole else [], end


def read_values(text: str, start: int) -> tuple[list[Any], int]:
    """The objects at ``start``, one after another or in lists, and the position after the last."""
    values: list[Any] = []
    end = start
    while text.startswith(("{", "["), start):
        value, end = read_value(text, start)
        values += value if isinstance(value, list) else [value]
        start = skip(SEPARATOR, text, end)
    if text.startswith(("}", "]"), start):
        raise ValueError(f"it goes on behind its end: {text[start]}")
    return values, end


def read_value(text: str, start: int) -> tuple[Any, int]:
    """The object or list at ``start``, in JSON or in Python's syntax, and the position after it."""
    try:
        return _decode_json(text, start)
    except (ValueError, RecursionError) as error:
        problem = f"it is no valid JSON: {getattr(error, 'msg', error)}"
    end = closing_bracket(text, start)
    if end is None or end - start > MAX_LITERAL:
        raise ValueError(problem)
    literal = re.sub(TOKEN, lambda token: token[0].replace("\n", "\\n"), text[start:end])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about invalid escapes
        try:
            return json.loads(json.dumps(ast.literal_eval(literal))), end
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            raise ValueError(problem) from None


def closing_bracket(text: str, start: int) -> int | None:
    """The position after the object or list at ``start``, going by brackets alone; None if it has no end."""
    depth = 0
    for token in re.compile(TOKEN).finditer(text, start):
        depth += {"{": 1, "[": 1, "}": -1, "]": -1}.get(token[0], 0)
        if depth == 0:
            return token.end()
    return None


def read_call(value: Any) -> llm.ToolCall:
    """The tool call in a JSON value, in any of the shapes that models use. Raises `ValueError` if there is none."""
    if isinstance(value, dict) and isinstance(value.get("function"), dict):
        value = value["function"]
    if not isinstance(value, dict):
        raise ValueError("it is no JSON object")
    name, arguments = value.get("name", value.get("function")), value.get("arguments", value.get("parameters"))
    if not (isinstance(name, str) and name.strip() and name.isprintable()):
        raise ValueError('its "name" is not the name of a tool')
    if arguments is None and not CALL_KEYS.issuperset(value):
        raise ValueError('it has no "arguments"')
    if isinstance(arguments, str):
        arguments = arguments.strip()
        values, end = read_values(arguments, 0)
        arguments = values[0] if len(values) == 1 and end == len(arguments) else arguments or None
    if not isinstance(arguments, (dict, type(None))):
        raise ValueError('its "arguments" are no JSON object')
    arguments = json.loads(mended(json.dumps(arguments or {}, ensure_ascii=False)))
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
    """The largest JSON value in an answer that matches the schema. Raises if there is none."""
    from jsonschema.exceptions import best_match

    problem = "there is no JSON in it"
    for value, json_text in sorted(find_json(text), key=lambda found: -len(found[1])):
        try:
            error = best_match(validator.iter_errors(value))
        except Exception as failure:  # a $ref to nowhere, or a schema that contains itself
            raise AutonomousError(f"the schema cannot be applied: {quoted(str(failure))}") from None
        if error is None:
            return json_text
        if not problem.startswith("$"):
            # The message begins with the whole value. What matters is at the end.
            problem = quoted(f"{error.json_path}: {error.message[-MAX_EXCERPT // 2 :]}")
    raise AutonomousError(
        f"the answer does not match the schema, {problem}; it begins: {quoted(text)}",
        correction=f"Your answer does not match the JSON schema: {problem}. Answer again with the JSON alone.",
    )


def find_json(text: str) -> Iterator[tuple[Any, str]]:
    """The JSON in an answer, each value with its text: the whole answer, or else the objects and lists in it."""
    text = re.sub(r"\A```\w*", "", text.strip()).removesuffix("```").strip()
    with contextlib.suppress(ValueError, RecursionError):
        yield json.loads(text, strict=False), strict_json(text)
        return
    end: int | None = 0
    while end is not None and (found := re.compile(JSON_START).search(text, end)):
        start = found.start()
        try:
            value, end = _decode_json(text, start)
            yield value, strict_json(text[start:end])
        except (ValueError, RecursionError):
            end = closing_bracket(text, start)  # skip all of it: a part of something broken is not the answer


def strict_json(text: str) -> str:
    """``text`` as strict JSON, which ``jq`` can read: without raw line breaks in strings. Raises if there is a NaN."""
    value = json.loads(text, strict=False)
    anew = json.dumps(value, allow_nan=False)
    try:
        json.loads(text)
    except ValueError:
        return anew
    return text


# The whole way from bytes to the pieces of an answer


class Reply:
    """Turns the bytes of a reply into the pieces of the answer: text and tool calls.

    Nothing here raises. If something is wrong with the reply, it is left in `error` after everything before it has been
    returned.
    """

    def __init__(self, parser: ToolCallParser | None = None, validator: Any = None) -> None:
        self.framing = Framing()
        self.completion = Completion()
        self.parser = parser  # only if there are tools
        self.validator = validator  # only if there is a schema
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
        texts: list[str] = []
        framing, completion = self.framing, self.completion
        if self.error is None:
            try:
                for value in framing.feed(data, end):
                    if text := completion.read(value):
                        texts.append(text)
                if framing.error:
                    raise framing.error
                if (end or framing.ended) and (text := completion.close()):
                    texts.append(text)
            except AutonomousError as error:
                self.error = error
        return self._read(texts) if texts and (self.parser or self.validator) else texts

    def close(self, failure: Exception | None = None, timeout: float = DEFAULT_TIMEOUT) -> list[Any]:
        """The pieces completed by the end of the reply, whether it came as it should or by a ``failure``."""
        known, pieces = self.error, self.feed(b"", end=True)
        framing, completion = self.framing, self.completion
        if failure and not (known or self.whole or framing.page):
            self.error = transport_error(failure, completion.answered, timeout)
        elif self.error is None and framing.cut_off and not self.whole:
            cut_off = AutonomousError("the answer is incomplete: the reply ends within an event")
            self.error = cut_off if completion.answered else not_understood(framing.cut_off)
        elif self.error is None and not completion.answered:
            lost = "" if completion.understood or framing.ended else framing.stray
            self.error = not_understood(lost) if lost else empty(completion.envelope.get("finish_reason"))
        elif self.error is None and (self.parser or self.validator):
            pieces += self._read([], end=True)
        return pieces

    def _read(self, pieces: list[Any], end: bool = False) -> list[Any]:
        """Find the tool calls. Hold the answer to a schema until it is complete, since half of it is of no use."""
        self.written.writelines(pieces)
        if self.parser:
            pieces = self.parser.feed(pieces, end)
            self.error = self.error or self.parser.error
        if not self.validator:
            return pieces
        if self.written.tell() > MAX_EVENT_BYTES:
            self.error = self.error or too_large("an answer to a schema")
        calls = [piece for piece in pieces if not isinstance(piece, str)]
        if self.error or calls or not end:
            return calls  # if there are any, the answer comes in a later round, and this text is not part of it
        try:
            return [matching_json(self.written.getvalue(), self.validator)]
        except AutonomousError as error:
            self.error = error
            return []


def mended(text: str) -> str:
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
        correction: str | None = None,  # what to tell the model, if it was the model's mistake
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


def broken_call(problem: str, text: str) -> AutonomousError:
    return AutonomousError(
        f"the model's tool call cannot be read, {problem}; it begins: {quoted(text)}",
        correction=f"Your tool call could not be read: {problem}. Answer again, with each call as JSON between "
        "<tool_call> and </tool_call>.",
    )


def empty(finish_reason: object) -> AutonomousError:
    reason = f" (finish reason: {quoted(str(finish_reason))})" if finish_reason else ""
    return AutonomousError(f"the answer was empty{reason}", outage=True)


def web_page(page: str, status: str = "") -> AutonomousError:
    import html

    # Without the limits, a page that repeats "<title" would take quadratic time.
    found = re.search(r"<title[^>]{0,99}>([^<]{1,999})", page[:MAX_PAGE_BYTES], re.IGNORECASE)
    title = quoted(html.unescape(found[1])) if found else ""
    answer = f"answered with a web page titled: {title}" if title else "answered with a web page without a title"
    return AutonomousError(f"{status}: {answer}" if status else answer, outage=True)


def error_words(body: object) -> str:
    """The message in an error body of any of the forms in PROTOCOL.md, or several, if they say different things."""
    found: list[str] = []
    for value in map(body.get, ("error", "message", "detail")) if isinstance(body, dict) else ():
        words = (value.get("message") or value) if isinstance(value, dict) else value
        if isinstance(words, list) and all(isinstance(word, str) for word in words):
            words = "; ".join(words)
        if words and not isinstance(words, (str, bool)) and not found:
            return as_json(words)
        if isinstance(words, str) and not any(words in known for known in found):
            found = [known for known in found if known not in words] + [words]
    return ": ".join(found) or (body if isinstance(body, str) else as_json(body))


def status_error(reply: httpx.Response, body: bytes) -> AutonomousError:
    """The error for a reply with a status other than 2xx. ``body`` is as much as could be read."""
    status = quoted(f"HTTP {reply.status_code} {reply.reason_phrase}")
    if 300 <= reply.status_code < 400:
        target = quoted(reply.headers.get("location", "")) or "nowhere"
        return AutonomousError(
            f"{status}: redirects to {target}, which is not followed: a prompt goes only to the host you name. "
            f"Set {BASE_URL_VARIABLE} if that is the right one"
        )
    words = body.decode("utf-8", "replace").lstrip("\ufeff").strip()
    page = words.startswith("<")
    if page:
        message = web_page(words, status).message
    else:
        with contextlib.suppress(ValueError, RecursionError):  # then it is plain text
            words = error_words(json.loads(words))
        message = f"{status}: {quoted(words)}" if words else status
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
            f"its certificate cannot be verified: {reason}. Behind a company proxy, name the file with the "
            "proxy's certificate authority in SSL_CERT_FILE",
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


def retry_wait(error: AutonomousError, attempt: int, attempts: int) -> float | None:
    """Seconds to wait before trying again after ``attempt`` of ``attempts``; None to give up."""
    if not error.retryable or attempt >= attempts:
        return None
    if error.retry_after is not None:
        return error.retry_after if error.retry_after <= MAX_RETRY_AFTER else None
    return BACKOFF[attempt - 1] * random.uniform(1 - JITTER, 1 + JITTER)


class Exchange:
    """One prompt: what to send, when to try again, and what to tell `llm` in the end. No I/O."""

    def __init__(self, model: _Shared, prompt: llm.Prompt, stream: bool, response: Any, conversation: Any) -> None:
        service, options = model.service, cast(AutonomousOptions, prompt.options)
        self.tools = [tool for tool in prompt.tools if isinstance(tool, llm.Tool)]
        prompt.schema = schema_of(prompt, conversation)
        self.validator = schema_validator(prompt.schema) if prompt.schema else None
        instructions = build_instructions(self.tools, prompt.schema)
        messages = build_messages(prompt.messages, service.attachment_types, bool(self.tools), instructions)
        last = messages[-1] if messages else {"role": "user", "content": ""}
        # A caller may give the model the beginning of its answer. In a conversation, that is the answer before this.
        answered = last["role"] == "assistant" and conversation is not None
        if answered or (isinstance(last["content"], str) and not last["content"].removesuffix(instructions).strip()):
            raise AutonomousError("the prompt is empty: nothing was sent")
        url = endpoint_url(service.endpoint)
        self.auth = (url.username, url.password) if url.userinfo else None
        self.url = url.copy_with(userinfo=b"")  # httpx logs it, so it must not have the password
        self.reuse = True  # connections of earlier prompts may be used
        self.messages, self.stream = messages, stream
        self.proxy = options.proxy
        self.timeout = options.timeout or DEFAULT_TIMEOUT
        self.model = model
        # Weak, because an async response holds the generator that holds this. If the caller stops reading, such a cycle
        # would keep the connection open until the garbage collector runs.
        self.response: Any = weakref.proxy(response)

    def attempts(self) -> Iterator[Attempt]:
        """One attempt after another, for as long as trying again may help. Raises the error of the last."""
        attempt, limit = self.model.attempt_type(self), self.model.attempts
        while True:
            yield attempt
            error = attempt.reply.error
            if error is None:
                self._report(attempt)
                return
            located = error.located(self.url, attempt.number, checking=limit == 1)
            wait = None if attempt.yielded else retry_wait(error, attempt.number, limit)
            if attempt.kept and error.retryable:
                logger.info("%s; trying again on a new connection", located)
                self.reuse = False
                attempt = self.model.attempt_type(self, attempt.number, None, attempt.corrected)
            elif error.correction and not attempt.corrected and attempt.number < limit:
                logger.info("%s; the model is told", located)
                attempt = self.model.attempt_type(self, attempt.number + 1, corrected=attempt)
            elif wait is not None:
                logger.info("%s; trying again in %.1f s", located, wait)
                attempt = self.model.attempt_type(self, attempt.number + 1, wait, attempt.corrected)
            else:
                raise located from attempt.failure

    def body(self, corrected: Attempt | None) -> bytes:
        """The request body: the prompt and, if an answer is to be corrected, that answer and what was wrong with it."""
        messages = self.messages
        if corrected and corrected.reply.error:
            answer, correction = corrected.reply.written.getvalue(), corrected.reply.error.correction
            messages = [*messages, {"role": "assistant", "content": answer}, {"role": "user", "content": correction}]
        return build_body(self.model.service, messages, self.stream)

    def report_call(self, call: llm.ToolCall) -> list[StreamEvent]:
        """Tell `llm` to call a tool; the events keep the call in its place among the text."""
        self.response.add_tool_call(call)
        told = (("tool_call_name", call.name), ("tool_call_args", json.dumps(call.arguments)))
        return [StreamEvent(type=kind, chunk=chunk, tool_call_id=call.tool_call_id) for kind, chunk in told]

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
        reason = quoted(str(envelope.get("finish_reason", "stop")))
        if not re.fullmatch(USUAL_FINISH_REASONS, reason, re.IGNORECASE):
            limit = ": it reached the model's limit" if reason in ("length", "max_tokens") else ""
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
        self.stream: Any = None  # the connection to a SOCKS proxy
        limits = httpx.Timeout(exchange.timeout, connect=min(exchange.timeout, CONNECT_TIMEOUT), pool=None)
        extensions = {"timeout": limits.as_dict(), "trace": functools.partial(exchange.model.trace, self)}
        self.request = httpx.Request(
            "POST", exchange.url, headers=build_headers(), content=exchange.body(corrected), extensions=extensions
        )
        tools = exchange.tools
        self.reply = Reply(ToolCallParser({tool.name for tool in tools}) if tools else None, exchange.validator)
        self.yielded = False  # the user has seen some of the answer
        self.failure: Exception | None = None
        self.error_head: httpx.Response | None = None  # status and headers, if the status is not 2xx
        self.error_body = b""  # the beginning of what follows them
        self.coding = ""  # how the reply is compressed
        self.read_timeout = exchange.timeout  # seconds to wait for the next bytes
        self.deadline = 0.0  # when to stop reading, by time.monotonic(), if the answer is already complete
        self.enough = False  # nothing that still arrives is worth reading

    def trace(self, event: str, info: dict[str, Any]) -> Any:
        """Take an event of httpcore's ``trace`` extension, and return the stream that it forgets to close, if any."""
        url, timeouts = self.exchange.url, self.request.extensions["timeout"]
        if event.endswith(".connect_tcp.started"):
            self.connected, peer = True, {"host": info["host"], "port": info["port"]}
            self.proxy = "" if url.copy_with(**peer) == url else url.copy_with(scheme="proxy", **peer).netloc.decode()
        elif event == "socks.setup_socks5_connection.started":
            # httpcore waits for a SOCKS proxy without a timeout. For everything it reads later, it sets its own.
            self.stream = info["stream"]
            self.stream.read = functools.partial(self.stream.read, timeout=timeouts["connect"])
        elif event == "socks.setup_socks5_connection.failed":
            return self.stream
        elif event == "http11.send_request_headers.started" and info["request"].method == b"CONNECT":
            timeouts["read"] = timeouts["connect"]
        elif event.endswith((".send_request_headers.started", "socks.start_tls.started", "proxy.start_tls.started")):
            self.proxy, timeouts["read"] = "", self.exchange.timeout
            self.kept = not self.connected
            if self.kept and not self.exchange.reuse:
                import httpcore

                raise httpcore.ConnectionNotAvailable  # httpcore closes this connection, and looks for another
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
        # These are all text, as calls come out in `close`. Joined, they are less work for `llm`.
        return self._out(["".join(pieces)] if len(pieces) > 1 else pieces)

    def _read_on(self, seconds: float, restart: bool = False) -> None:
        """Read on for at most ``seconds``, counted from the first call with this limit, or from now to ``restart``."""
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
            out += [piece] if isinstance(piece, str) else self.exchange.report_call(piece)
        return out


# Connections: kept from prompt to prompt, because a client takes 30 ms to make, and a connection a TLS handshake

AnyClient = TypeVar("AnyClient", "httpx.Client", "httpx.AsyncClient")
ClientKey = tuple[Any, ...]

_locks: dict[int, threading.Lock] = {}  # by process: if a lock is held during a fork, the child never gets it
_ssl_contexts: dict[ClientKey, ssl.SSLContext] = {}
_clients: dict[ClientKey, httpx.Client] = {}
_pools: dict[Pool, None] = {}  # an ordered set, of the pools of all event loops


def client_key(proxy: str | None) -> ClientKey:
    """Everything that decides which client can send a prompt: the process, the proxy and the environment."""
    return (os.getpid(), proxy, *map(os.environ.get, (*PROXY_VARIABLES, *CERTIFICATE_VARIABLES)))


def new_client(kind: type[AnyClient], key: ClientKey) -> AnyClient:
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
        self.client = new_client(httpx.AsyncClient, key)
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

    httpcore looks up the timeout when it starts to iterate over a body, and can start again in the middle. So starting
    again is how to change it, and no later attempt can inherit the change.
    """
    started = []  # all of them are kept: one that is dropped before its end would close the connection
    live = "network_stream" in head.extensions  # a canned reply would start again at its beginning
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

    A wait is limited as httpcore limits its own, by anyio. asyncio's ways of limiting one could also cancel httpcore
    while it closes a connection, which would then stay in the pool for ever: it is shielded from anyio's alone.
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
        if stream := attempt.trace(event, info):
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
        if stream := attempt.trace(event, info):
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
    See which models of Autonomous AI answer

    To list them, with their aliases and options: llm models --options -q autonomous
    """


@autonomous.command()
@click.option("model_ids", "-m", "--model", multiple=True, help="Model to ask, repeatable (default: all five)")
@click.option("--timeout", default=20.0, show_default=True, help="Seconds that a whole answer may take")
@click.option(
    "options", "-o", "--option", type=(str, str), multiple=True, help="Option for the models, such as: proxy URL"
)
@click.option("json_", "--json", is_flag=True, help="Output as JSON, once all is known")
@click.option("--raw", is_flag=True, help="Show on standard error all that is sent and what comes, one by one")
def check(
    model_ids: tuple[str, ...], timeout: float, options: tuple[tuple[str, str], ...], json_: bool, raw: bool
) -> None:
    """
    Is it me or them? Ask the models for a word, and see which answer

    All are asked at once, and each only once. Each gets a row as soon as it is known: the model, its endpoint,
    and "ok" with the seconds to the first text, or what went wrong. Nothing is logged.

    The exit code is 0 if all answer, and 1 if any does not.
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
