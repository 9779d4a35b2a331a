"""An LLM plugin for the models of Autonomous AI, a free service that needs no key and is often down.

An *exchange* is one prompt and everything done to get it answered. Each try is an *attempt*, and what the server sends
back is its *reply*. The answer comes out of the reply in *pieces*: text and tool calls. If the model makes a mistake,
a *correction* tells it what was wrong, and it answers again.

The module follows a prompt on its way: the models, registering them, what is sent, how the reply is read, what can go
wrong, retries, connections, what moves the bytes, and at the end `llm autonomous check`. Everything before the
connections uses no network and is shared by sync and async.
"""

from __future__ import annotations

import atexit
import base64
import collections
import contextlib
import email.utils
import functools
import importlib.metadata
import io
import itertools
import json
import logging
import os
import random
import re
import sys
import threading
import time
import uuid
import weakref
from collections.abc import AsyncGenerator, Callable, Collection, Iterable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple, cast
from urllib.parse import unquote

import click
import llm
from llm.models import ModelWithAliases
from llm.parts import AttachmentPart, Part, StreamEvent, TextPart, ToolCallPart, ToolResultPart
from llm.utils import simplify_usage_dict
from pydantic import ConfigDict, Field, ValidationError, field_validator

if TYPE_CHECKING:
    # These are imported where they are used: every `llm` command loads this plugin, and some need no HTTP client.
    import asyncio
    import ssl

    import httpx

logger = logging.getLogger(__name__)

BASE_URL = "https://chatgpt.autonomous.ai"
BASE_URL_VARIABLE = "AUTONOMOUS_BASE_URL"
PROXY_SCHEMES = ("http", "https", "socks5", "socks5h")
PROXY_URL = "an http://, https://, socks5:// or socks5h:// URL with a host"
CERTIFICATE_VARIABLES = ("SSL_CERT_FILE", "SSL_CERT_DIR", "SSLKEYLOGFILE")  # read by TLS

DEFAULT_TIMEOUT = 120.0  # seconds of silence, before and within a reply
MAX_TIMEOUT = 86_400.0  # seconds; operating systems refuse to wait for weeks
CONNECT_TIMEOUT = 10.0  # seconds to connect
END_TIMEOUT = 1.0  # seconds for usage and the end of the reply to arrive once the answer is whole
ERROR_BODY_TIMEOUT = 5.0  # seconds for the body of an error status to arrive
KEEPALIVE = 60.0  # seconds that an idle connection stays open for the next prompt
POOL_SIZE = 32  # prompts at the same time on one client: httpcore compares all connections of a pool for each request
MAX_IDLE_CLIENTS = 32  # kept for later prompts, each with its connections

ATTEMPTS = 3  # per prompt, including the first
BACKOFF = (0.5, 1.0)  # seconds before the second and third attempt, plus or minus JITTER
JITTER = 0.25  # as a fraction of the wait
MAX_RETRY_AFTER = 10.0  # seconds; if the server asks for more, the prompt fails at once
RETRY_STATUSES = frozenset({408, 429, 500, 502, 503, 504})

# A finish reason with none of these words means that the answer may be cut short. "Finish" counts only at the end, as
# some servers begin all their reasons with it, such as FINISH_REASON_SAFETY.
USUAL_FINISH_REASON = (
    r"(?i)(?<![a-z])(stop(ped)?|eo[st]|end(oftext)?|completed?|done|finish(ed)?$|success|normal|tool|function)(?![a-z])"
)
LIMIT_REASON = "(?i)length|max|limit|exceed|truncat"
LIBRARIES = (__name__, "httpx", "httpcore", "h11", "anyio")  # whose exceptions are about the connection or the reply
MESSAGE_KEYS = ("message", "msg", "detail", "status_msg")  # the keys that hold the text of an error
NO_ERROR = r"(?i)(0+|200|ok|success(ful)?|none|null|false)?"  # codes, errors and messages that stand for success
THINKING_TAGS = ("think", "scratch_pad")
# The content codings that IANA has registered. Servers also send other words, such as utf-8, which are ignored.
CODINGS = r"\b(?:aes128gcm|br|deflate|exi|dcb|dcz|(?:x-)?compress|(?:pack200-|x-)?gzip|zstd)\b"

MAX_EVENT_BYTES = 16 * 1024 * 1024  # one event, one line, or one whole JSON reply
MAX_PAGE_BYTES = 64 * 1024  # how much to read of an error body or a web page
MAX_HELD = 256  # characters to hold while it is unclear whether they begin a tool call or reasoning
MAX_BEGINNING = 1024  # bytes of a reply to quote if it holds no answer
MAX_EXCERPT = 300  # characters of the server's own words in an error


# --- The models, and registering them: touches neither network nor files, and cannot raise ----------------------------


class ServiceModel(NamedTuple):
    """One model of the service, as the table in PROTOCOL.md has it."""

    name: str  # goes into `aiAgent` and `threadId`
    endpoint: str  # below /api/v1/ai/
    backend: str  # the model that it runs; also an alias, if that is free
    aliases: tuple[str, ...]
    attachment_types: frozenset[str] = frozenset()

    @property
    def model_id(self) -> str:
        return f"autonomous-{self.name}"


# The types of images that can be sent, and the names that others have for them.
IMAGE_TYPES = {name: name for name in ("image/png", "image/jpeg", "image/webp", "image/gif")}
IMAGE_TYPES |= {"image/jpg": "image/jpeg", "image/pjpeg": "image/jpeg", "image/x-png": "image/png"}

SERVICE_MODELS = (
    ServiceModel("llama", "chat", "llama-3.3-70b", ("autonomous", "autonomous-llama-3.3-70b")),
    ServiceModel(
        "qwen_coder", "chat", "qwen-2.5-coder-32b", ("autonomous-qwen-coder", "autonomous-qwen-2.5-coder-32b")
    ),
    ServiceModel("hermes", "chat-hermes", "hermes-3", ("autonomous-hermes-3",)),
    ServiceModel("vision", "chat-vision", "llama-3.2-90b", ("autonomous-llama-3.2-90b",), frozenset(IMAGE_TYPES)),
    ServiceModel("summary", "summary", "llama-3.2-70b", ("autonomous-llama-3.2-70b",)),
)


@llm.hookimpl(trylast=True)
def register_models(register: Callable[..., None], model_aliases: list[ModelWithAliases]) -> None:
    for service in SERVICE_MODELS:
        # Other plugins and the user's aliases may have the backend's bare name. Running last, we see which are free.
        taken = {name for known in model_aliases for name in (known.model.model_id, *known.aliases)}
        free = () if service.backend in taken else (service.backend,)
        register(Autonomous(service), AsyncAutonomous(service), aliases=(*service.aliases, *free))


# --- What is sent -----------------------------------------------------------------------------------------------------


class AutonomousOptions(llm.Options):
    # A proxy URL may contain a password, so validation errors must not repeat it.
    model_config = ConfigDict(hide_input_in_errors=True)

    proxy: str | None = Field(
        default=None,
        description="Proxy to use: an http://, https://, socks5:// or socks5h:// URL, or nothing ('') for no proxy. "
        "LLM logs options, so if the proxy needs a password, set HTTPS_PROXY instead.",
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
        if proxy and "@" in proxy:
            raise ValueError("a proxy with a user name or password would be logged: set HTTPS_PROXY instead")
        if proxy and not parse_url(proxy, PROXY_SCHEMES):
            raise ValueError(f"must be {PROXY_URL}")
        return proxy


@functools.lru_cache
def parse_url(text: str, schemes: tuple[str, ...]) -> httpx.URL | None:
    """The URL in ``text``, or None if it is no URL with a host and one of these schemes."""
    import httpx

    try:
        url = httpx.URL(text)
        return url if url.scheme in schemes and url.host and (url.port is None or 0 < url.port < 65536) else None
    except (httpx.InvalidURL, ValueError):  # a ValueError if the host is not an IDNA name
        return None


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
EMPTY_RESULT = "The tool {name} ran without an error and returned an empty result."
AFTER_RESULTS = "Use these results to answer my request. If you still need another tool for it, call that tool now."
EMPTY_CORRECTION = "Your reply was empty. Answer my request with the results of the tools."
MADE_UP_RESULT = "No tool was called. Call a tool in <tool_call> and </tool_call>, or answer without one."
CALL_AFTER_WORDS = """\
Your answer contains a tool call. If you want to call tools, reply with all your calls and no other words, each call \
between <tool_call> and </tool_call>. If you do not, answer without them."""
BROKEN_CALL = """\
Your tool call could not be read: {problem}. Answer again, with each call as JSON between <tool_call> and \
</tool_call>."""
SHORTER = "Your answer was cut short because it reached your length limit. Write a shorter one."
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
    """How to answer in JSON: the schema and an example."""
    example: Any = "..."
    with contextlib.suppress(AttributeError, LookupError, TypeError):  # if a $ref leads to something that is no schema
        example = example_of(schema, schema)
    written, example = (json.dumps(value, ensure_ascii=False) for value in (schema, example))
    return SCHEMA_INSTRUCTIONS.format(schema=written, example=example)


def example_of(schema: Any, root: dict[str, Any], refs: frozenset[str] = frozenset()) -> Any:
    """A JSON value in the shape that a schema describes: ``"..."`` for a string, ``0`` for a number, and so on.

    ``refs`` are the references that led here. None is followed twice, as a schema may contain itself.
    """
    ref = schema.get("$ref", "") if isinstance(schema, dict) else ""
    if not isinstance(schema, dict) or (ref and ref in refs):
        return "..."
    inner = functools.partial(example_of, root=root, refs=refs | {ref})
    if ref.startswith("#/"):
        target: Any = root
        for key in ref[2:].split("/"):
            target = target.get(key) if isinstance(target, dict) else None
        return inner(target)
    kind = schema["type"][0] if isinstance(schema.get("type"), list) else schema.get("type")
    if "properties" in schema:
        return {name: inner(value) for name, value in schema["properties"].items()}
    if choices := schema.get("anyOf") or schema.get("oneOf") or schema.get("allOf"):
        return inner(choices[0])
    if "const" in schema:
        return schema["const"]
    if "enum" in schema:  # all of them, as a model would copy a single one
        return " or ".join(value if isinstance(value, str) else json.dumps(value) for value in schema["enum"])
    if kind == "array":
        return [inner(schema.get("items"))]
    return {"integer": 0, "number": 0, "boolean": True, "null": None, "object": {}}.get(str(kind), "...")


def build_messages(
    messages: list[llm.Message], images: bool, tools: bool = False, instructions: str = "", after_results: str = ""
) -> list[dict[str, Any]]:
    """The whole conversation as PROTOCOL.md wants it: ``[{"role": …, "content": …}, …]``.

    ``content`` is a string, or a list of OpenAI content parts if the model takes ``images`` and there are some. If this
    prompt has ``tools``, earlier tool calls and results are written in the form that the model knows. Otherwise they
    become notes in brackets, like everything else that the wire format cannot carry, so that a conversation started
    with another model can go on. Reasoning and empty messages are left out.

    ``instructions`` are added to the system prompt, and ``after_results`` to the last message.
    """
    turns: list[dict[str, Any]] = []
    first_new = len(messages) - len(since_answer(messages))
    for number, message in enumerate(messages):
        role = message.role if message.role in ("system", "assistant") else "user"
        may_hold = images and role == "user"  # OpenAI-shaped servers refuse images in other roles
        text, shown = read_parts(message.parts, may_hold, tools, new=number >= first_new)
        if text or shown:
            turns.append({"role": role, "text": text, "images": shown})
    if instructions:
        if not turns or turns[0]["role"] != "system":
            turns.insert(0, {"role": "system", "text": "", "images": []})
        turns[0]["text"] = "\n\n".join(filter(None, [turns[0]["text"], instructions]))
    if after_results:
        gap = "\n" if messages[-1].role == "tool" else "\n\n"  # as measured in tests/README.md
        turns[-1]["text"] = gap.join(filter(None, [turns[-1]["text"], after_results]))
    if any(turn["images"] for turn in turns):
        # Llama 3.2 Vision's own chat template refuses a system message beside an image.
        system = [turn["text"] for turn in turns if turn["role"] == "system"]
        turns = [turn for turn in turns if turn["role"] != "system"]
        first = next(turn for turn in turns if turn["role"] == "user")
        first["text"] = "\n\n".join(filter(None, [*system, first["text"]]))
    for turn in turns:
        text, shown = turn.pop("text"), turn.pop("images")
        texts = [{"type": "text", "text": text}] if text else []
        turn["content"] = texts + shown if shown else text
    return turns


def since_answer(messages: list[llm.Message]) -> list[llm.Message]:
    """The messages that the model has not answered yet."""
    return [*itertools.takewhile(lambda message: message.role != "assistant", reversed(messages))][::-1]


def read_parts(parts: list[Part], images: bool, tools: bool, new: bool) -> tuple[str, list[dict[str, Any]]]:
    """The text and the images of a message. Raises if the message is ``new``, and an image in it cannot be read."""
    blocks: list[str] = []
    shown: list[dict[str, Any]] = []
    for previous, part in zip([None, *parts], parts, strict=False):
        attachments: list[llm.Attachment] = []
        if isinstance(part, TextPart):
            begun = blocks.pop() if isinstance(previous, TextPart) else ""
            blocks.append(begun + part.text)
        elif isinstance(part, AttachmentPart) and part.attachment:
            attachments = [part.attachment]
        elif isinstance(part, ToolCallPart):
            blocks.append(format_call(part, tools))
        elif isinstance(part, ToolResultPart):
            blocks.append(format_result(part, tools))
            attachments = part.attachments
        for attachment in attachments:
            if images and (url := image_url(attachment, new)):
                shown.append({"type": "image_url", "image_url": {"url": url}})
            else:
                blocks.append(f"[{attachment.type or 'file'} attachment, not shown to this model]")
    return "\n".join(block for block in blocks if block), shown


def format_call(part: ToolCallPart, tools: bool) -> str:
    if not tools:
        return f"[called the tool {part.name} with {json.dumps(part.arguments, ensure_ascii=False, default=str)}]"
    call = json.dumps({"name": part.name, "arguments": part.arguments}, ensure_ascii=False, default=str)
    return f"<tool_call>\n{call}\n</tool_call>"


def format_result(part: ToolResultPart, tools: bool) -> str:
    """What a tool returned, in words if that is empty. `llm` passes None on as ``null``."""
    name = part.name
    output = part.output if isinstance(part.output, str) else json.dumps(part.output, ensure_ascii=False, default=repr)
    if part.exception is not None:
        # Without a message, the exception is "ValueError: " or "ValueError: None", and the output says even less.
        failure = re.sub(r"\A([^\s:]*):\s*(None\s*)?\Z", r"\1: no message was given", part.exception)
        if failure != part.exception:
            output = f"Error: {failure}"
        return RESULT.format(name=name, output=output) if tools else f"[the tool {name} failed: {failure}]"
    if output.strip() in ("", "null") and not part.attachments:
        return (EMPTY_RESULT if tools else f"[{EMPTY_RESULT}]").format(name=name)
    return RESULT.format(name=name, output=output) if tools else f"[the tool {name} returned: {output}]"


def image_url(attachment: llm.Attachment, new: bool) -> str | None:
    """The URL of an image of one of `IMAGE_TYPES`: its own, or a ``data:`` URL of its bytes. None for anything else."""
    link = None if attachment.content else attachment.url
    try:
        encoded = None if link else attachment.base64_content()
        if encoded == "":
            raise ValueError("it is empty")
        kind = (attachment.type if link else attachment.resolve_type()) or ""
    except (OSError, TypeError, ValueError) as error:
        if new:
            what = f"the attachment {attachment.path}: {reason_of(error)}" if attachment.path else "an empty attachment"
            raise AutonomousError(f"cannot read {what}; the prompt was not sent") from None
        warn("an image of this conversation is not sent, since it can no longer be read: %s", error)
        return None
    sent_type = IMAGE_TYPES.get(kind.partition(";")[0].strip().lower())
    if link:
        return link if sent_type or not kind else None  # without a type, it is taken to be an image
    return f"data:{sent_type};base64,{encoded}" if sent_type else None


def build_body(service: ServiceModel, messages: list[dict[str, Any]], stream: bool) -> bytes:
    """The request body: a JSON object with four keys, one of which is the messages as JSON in Base64."""
    # That JSON has to be ASCII. The server may decode it with JavaScript's atob, which would garble UTF-8.
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
    url = parse_url(os.environ.get(BASE_URL_VARIABLE, "").strip() or BASE_URL, ("http", "https"))
    if not url or b"?" in url.raw_path or url.fragment or url.userinfo:
        wanted = "an http:// or https:// URL with a host, and no password or query, such as http://127.0.0.1:8000"
        raise AutonomousError(f"{BASE_URL_VARIABLE} must be {wanted}")
    return url.copy_with(raw_path=url.raw_path.rstrip(b"/") + f"/api/v1/ai/{endpoint}".encode())


def find_proxy(option: str | None, url: httpx.URL) -> str:
    """The URL of the proxy for requests to ``url``, or nothing.

    Without an ``option``, the proxy comes from the environment, by the rules of Python's standard library. NO_PROXY may
    name a host with its port, and an IPv6 address with or without brackets.
    """
    import urllib.request

    if option is not None:
        return option
    proxies = urllib.request.getproxies()
    scheme = url.scheme if proxies.get(url.scheme) else "all"
    proxy = proxies.get(scheme, "").strip()
    host = f"[{url.host}]" if ":" in url.host else url.host
    port = url.port or {"http": 80, "https": 443}[url.scheme]
    unproxied = {entry.strip() for entry in proxies.get("no", "").split(",")}
    # proxy_bypass comes last because it is slow: it reads the whole environment again.
    if not proxy or "*" in unproxied or any(map(urllib.request.proxy_bypass, (url.host, f"{host}:{port}"))):
        return ""
    proxy = proxy if "://" in proxy else f"http://{proxy}"
    if not parse_url(proxy, PROXY_SCHEMES):  # do not quote it: it may contain a password
        raise AutonomousError(f"{scheme.upper()}_PROXY must be {PROXY_URL}")
    return proxy


# --- How the reply is read, without any I/O: bytes -> JSON values -> text -> text and tool calls ----------------------
# No `feed` raises an error. What is wrong is left in `error`, and what came before it is still returned.


class Framing:
    """Turns the bytes of a reply into JSON values, without looking into them. The content type does not matter.

    Reads event streams as WHATWG specifies them (https://html.spec.whatwg.org/multipage/server-sent-events.html) and,
    as PROTOCOL.md asks, also ``data:`` lines with no blank lines in between, lines of bare JSON, and a single JSON
    value spread over many lines. The data of an event or a field named ``error`` comes out as ``{"error": data}``, and
    words where JSON was expected come out as a string.

    How the bytes were cut changes nothing. The cost is O(n), and `MAX_EVENT_BYTES` limits what is held.
    """

    def __init__(self) -> None:
        self.ended = False  # [DONE] has arrived, and anything after it is ignored
        self.error: AutonomousError | None = None
        self.cut_off = ""  # the beginning of a value, if the reply ended before the value did
        self._values: list[Any] = []  # what `feed` will return
        self._mark = b"\xef\xbb\xbf"  # a byte order mark to remove from the first line
        self._after_cr = False  # the last bytes ended with CR, so a leading LF is the second half of CRLF
        self._line = bytearray()  # the line that has not ended yet
        self._held = bytearray()  # the lines of an event that is not complete yet
        self._named_error = False  # the event is named error
        self._document = False  # the rest of the reply is one thing: a web page, or JSON spread over lines

    def feed(self, data: bytes, end: bool = False) -> list[Any]:
        """The values completed by ``data``, the next bytes of the reply, or by its ``end``."""
        if self.error is None and not self.ended:
            try:
                self._read_lines(data)
                if end:
                    if self._line:
                        self._read_line(bytes(self._line))
                    self._end_event(cut=True)
            except AutonomousError as error:
                self.error = error
        values, self._values = self._values, []
        return values

    def _read_lines(self, data: bytes) -> None:
        # Lines end at CRLF, LF or CR and nowhere else. No splitlines, then: it would also break lines at U+2028.
        if data:
            data = data.removeprefix(b"\n") if self._after_cr else data
            self._after_cr = data.endswith(b"\r")
        *lines, rest = data.replace(b"\r\n", b"\n").replace(b"\r", b"\n").split(b"\n")
        for line in lines:
            if self._line:
                line, self._line = bytes(self._line + line), bytearray()
            if len(line) > MAX_EVENT_BYTES:
                raise too_large()
            if line or self._held or self._named_error:  # most blank lines end nothing
                self._read_line(line)
            if self.ended:
                return
        self._line += rest
        if len(self._line) > MAX_EVENT_BYTES:
            raise too_large()

    def _read_line(self, line: bytes) -> None:
        if self._mark:
            line, self._mark = line.removeprefix(self._mark), b""
        field, _, data = line.partition(b":")
        if self._document:
            self._hold(line)
        elif field == b"data":
            # An event of one line is read at once, as some servers send no blank line after it. Others are held.
            if self._held or self._named_error:
                self._hold(data.removeprefix(b" "))
            elif rest := self._read_values(data):
                self._hold(rest.encode())
        elif not line:
            self._end_event()
        elif field == b"event":
            self._named_error = data.strip() == b"error"
        elif field == b"error":
            self._named_error = True
            self._hold(data)
        elif field in (b"", b"id", b"retry"):
            pass  # a comment, or a field that says nothing about the answer
        elif self._named_error:
            self._hold(line)
        elif line.lstrip().startswith((b"{", b"[", b"<")):
            self._end_event()
            if rest := self._read_values(line):
                self._document = True
                self._hold(rest.encode())
        elif words := line.decode("utf-8", "replace").strip():
            # "name: value" or "name" is an unknown field. Other words may come from a server that died: see `Words`.
            self._values.append(words if re.match(r"[\w-]+(:|\Z)", words) else Words(words))

    def _hold(self, line: bytes) -> None:
        self._held += line + b"\n"
        if len(self._held) > MAX_EVENT_BYTES:
            raise too_large()

    def _end_event(self, cut: bool = False) -> None:
        """Read what is held: it ends at a blank line, at bare JSON or markup, or where the reply ends (``cut``)."""
        before = len(self._values)
        rest = self._read_values(self._held)
        self._held.clear()
        if self._named_error:
            self._named_error = False
            # What the error says is the first of these: words that are no JSON, its first value, or its name.
            said = rest or next(filter(None, self._values[before:]), "event: error")
            self._values[before:] = [{"error": said}]
            return
        if rest.startswith("<"):
            raise AutonomousError(page_words(rest), outage=True)
        if cut:
            self.cut_off = rest
        elif rest.startswith(("{", "[", '"')):
            raise not_understood(rest)
        elif rest:
            self._values.append(Words(rest))

    def _read_values(self, data: bytes | bytearray) -> str:
        """Read as many JSON values as there are, and return the rest: the beginning of one that is not complete."""
        text = data.decode("utf-8", "replace").lstrip()
        place = 0
        while place < len(text) and not self.ended:
            try:
                value, end = decode_json(text, place)
            except (ValueError, RecursionError):
                if text.startswith("[DONE]", place):
                    self.ended = True
                elif text.startswith("data:", place):  # some servers write the name of the field twice
                    place = skip(r"data:\s*", text, place)
                else:
                    return text[place:]
            else:
                self._values.append(value)
                place = end if end == len(text) else skip(r"\s*", text, end)  # mostly, it is the only value
        return ""


class Words(str):
    """Words that are not JSON and do not look like a field. After some text, they mean that the server died."""


# Unlike JSON's own rules, this admits line breaks and other control characters within strings.
decode_json = json.JSONDecoder(strict=False).raw_decode


def skip(pattern: str, text: str, start: int = 0) -> int:
    """The position after what matches ``pattern`` at ``start``; ``start`` itself if nothing does."""
    found = re.compile(pattern).match(text, start)
    return found.end() if found else start


# The fields that OpenAI documents for a chunk, those for a choice and the delta or message in it, and what others add.
CHUNK_FIELDS = {"id", "object", "created", "model", "choices", "system_fingerprint", "service_tier", "type"}
CHUNK_FIELDS |= {"usage", "finish_reason"}
ANSWER_FIELDS = {"index", "finish_reason", "logprobs", "usage", "role", "name", "content", "text"}
ANSWER_FIELDS |= {"refusal", "reasoning", "reasoning_content", "reasoning_details", "annotations", "type"}
KNOWN_FIELDS = CHUNK_FIELDS | ANSWER_FIELDS
# A chunk that holds text and only these fields holds nothing else of interest.
PLAIN_FIELDS = (CHUNK_FIELDS - {"usage"}) | {"index", "delta", "logprobs", "role", "content"}


class Completion:
    """Turns the values of a reply into the text and the reasoning of an answer.

    The values are chat completion chunks or one whole chat completion, as OpenAI documents them
    (https://platform.openai.com/docs/api-reference/chat). A chunk, its first choice, and the delta or message in that
    are read as one object. If it holds neither text nor reasoning, a field of unknown meaning makes the value
    `not_understood`. Nothing is dropped in silence: whoever reads the reply has to report that value.
    """

    def __init__(self) -> None:
        self.envelope: dict[str, Any] = {}  # id, model, created, finish_reason and usage, if they were sent
        self.whole = False  # the answer is complete: there was a finish reason, or a whole completion
        self.not_understood: Any = None  # the first value that may hold a part of the answer in an unknown form
        self.error: AutonomousError | None = None
        self._pieces: list[Any] = []  # what `feed` will return
        self._in_deltas = False  # some text has come in a delta or a choice, so a message only repeats it
        self._halves = {"reasoning": "", "text": ""}  # half a character at the end of each

    def feed(self, values: list[Any], end: bool = False) -> list[str | StreamEvent]:
        """The text (`str`) and the reasoning (`StreamEvent`) in ``values``, or what waited for the ``end``."""
        try:
            for value in values:
                if self._in_deltas and (text := plain_text(value)):
                    self._add("text", text)
                    self.whole = False
                    continue
                understood = [self._read_chunk(chunk) for chunk in (value if isinstance(value, list) else [value])]
                if self.not_understood is None and not all(understood):
                    self.not_understood = value
            for kind in ("reasoning", "text") if end else ():
                self._add(kind, "", end=True)
        except AutonomousError as error:
            self.error = error
        pieces, self._pieces = self._pieces, []
        # Each piece is work for `llm`, so texts that arrive together are joined.
        return ["".join(pieces)] if len(pieces) > 1 and {*map(type, pieces)} == {str} else pieces

    @property
    def finish_reason(self) -> str:
        """The finish reason, in a form that is fit for an error; empty if there is none."""
        return quoted(str(self.envelope.get("finish_reason", ""))[:100])

    def _read_chunk(self, chunk: Any) -> bool:
        """Read a chunk, and return whether all of it was understood. Raises the error that it reports."""
        # If a server or proxy dies, its last words are no JSON. After the end, only words of an error matter.
        begun = self._in_deltas or self.whole  # some text has come, or the end
        says_error = isinstance(chunk, str) and mentions_error(chunk)
        if begun and (says_error or (isinstance(chunk, Words) and not self.whole)):
            raise AutonomousError(f"the answer is incomplete: the server sent: {quoted(chunk)}")
        fields, has_choices = filled(chunk), isinstance(chunk, dict) and "choices" in chunk
        choices = fields.get("choices")  # None if they are empty
        choice = filled(choices[0] if isinstance(choices, list) else choices)
        delta, message = filled(choice.pop("delta", None)), filled(choice.pop("message", None))
        message = {} if self._in_deltas else message  # it only repeats the deltas
        answer = {**choice, **message, **delta}  # what the choice says
        all_fields = {**answer, **fields}  # what the whole chunk says
        unusual = {key: inner for key, inner in all_fields.items() if key not in KNOWN_FIELDS}
        # A message needs no code to be an error if it comes, without a choice, after text or beside empty `choices`.
        if unusual and (error := reported_error(all_fields, in_words=not choices and (begun or has_choices))):
            raise error
        finished = self._read_outcome(all_fields)
        reasoning, _, odd_reasoning = text_of(answer, "reasoning_content", "reasoning")
        text, thought, odd_text = text_of(answer, "content", "text", "refusal")
        self._add("reasoning", reasoning + thought, end=bool(text))
        self._add("text", text)
        self._in_deltas = self._in_deltas or bool(text and (not message or "content" in delta))  # not from a message
        # A message alone is a whole completion. More text takes back what a finish reason said too early.
        self.whole = finished or bool(message and not delta) or (self.whole and not text)
        if odd_reasoning or odd_text or "tool_calls" in answer or "function_call" in answer:
            return False
        if text or thought or reasoning:
            return True
        for inner in unusual.values():
            if isinstance(inner, dict) and (error := reported_error(inner)):
                raise error
        # Beside a finish reason, the choice's own unknown fields, such as stop_reason, are about the end.
        if holds_more({**message, **delta} if finished else answer, ANSWER_FIELDS):
            return False
        if not holds_more(fields, CHUNK_FIELDS):
            return True
        # An unknown field beside `choices` is about the request, unless it mentions an error.
        return has_choices and not mentions_error(chunk)

    def _read_outcome(self, fields: dict[str, Any]) -> bool:
        """Keep what a chunk says about the answer as a whole, and return whether there is a finish reason."""
        for key in ("id", "model", "created"):
            if key in fields:
                self.envelope.setdefault(key, shallow(fields[key]))
        if "usage" in fields:
            self.envelope["usage"] = shallow(fields["usage"])
        finished = str(fields.get("finish_reason")).strip().lower() not in ("", "null", "none", "undefined")
        if finished:
            self.envelope["finish_reason"] = shallow(fields["finish_reason"])
        return finished

    def _add(self, kind: str, text: str, end: bool = False) -> None:
        """Add text or reasoning to the pieces.

        A server that cuts text by UTF-16 units may split a character: one half (such as \\ud83d) ends a chunk, and the
        other begins the next. Neither can be printed or stored, so the first waits for the second, or for the ``end``.
        """
        if self._halves[kind] or not text.isascii():
            text, self._halves[kind] = self._halves[kind] + text, ""
            if not end and "\ud800" <= text[-1:] <= "\udbff":
                text, self._halves[kind] = text[:-1], text[-1]
            text = replace_surrogates(text)
        if text:
            self._pieces.append(text if kind == "text" else StreamEvent(type="reasoning", chunk=text))


def plain_text(value: Any) -> str:
    """The text of a chunk in which nothing else matters, as in most chunks: they should be fast. Empty for others."""
    try:
        [choice] = value["choices"]
        delta, text = choice["delta"], choice["delta"]["content"]
        finished = choice.get("finish_reason") or value.get("finish_reason")
        if not finished and type(text) is str and {**value, **choice, **delta}.keys() <= PLAIN_FIELDS:
            return text
    except (AttributeError, LookupError, TypeError, ValueError):
        pass
    return ""


def text_of(fields: dict[str, Any], *names: str) -> tuple[str, str, bool]:
    """The text in the first of these fields that is filled, the reasoning in it, and whether it holds more than that.

    It may be a string, a number (Cloudflare sends digits so), or content parts, which Mistral uses for reasoning too.
    """
    content: Any = next((fields[name] for name in names if name in fields), [])
    text, thought, more = "", "", False
    for part in content if isinstance(content, list) else [content]:
        held = filled(part if isinstance(part, dict) else {"text": part})
        if "thinking" in held:
            inner, _, odd = text_of(held, "thinking")
            thought, more = thought + inner, more or odd
        elif isinstance(said := held.get("text"), (str, int, float)):
            text += said if isinstance(said, str) else json.dumps(said)
        else:
            more = more or "text" in held or holds_more(held, {"type"})
    return text, thought, more


def filled(value: Any) -> dict[str, Any]:
    """The fields of an object that are not empty; a text of 0 is kept. Any other value gets an empty name."""
    fields = value if isinstance(value, dict) else {"": value}
    return {key: inner for key, inner in fields.items() if inner or (key in ("content", "text") and str(inner) == "0")}


def holds_more(fields: dict[str, Any], known: set[str]) -> bool:
    """Whether there is text, a list or an object in a field that is not ``known``, or anything under an empty name."""
    return any(not key or isinstance(inner, (str, list, dict)) for key, inner in fields.items() if key not in known)


class Thinking:
    """Splits off the reasoning with which a model may begin its text, in ``<think>`` or Hermes's ``<scratch_pad>``.

    Anywhere else these tags are text. White space after the reasoning is dropped.
    """

    def __init__(self) -> None:
        self.answered = False  # some text has arrived, and everything that follows is text as well
        self.reasoned = False  # some reasoning has arrived
        self._held = ""  # text that may begin a tag; within reasoning, the opening tag and what may be its closing one

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
        text, self._held = self._held + text, ""
        found = re.compile(rf"\s*{THOUGHT}\s*").match(text)
        if not found:
            begins = any(f"<{tag}>".startswith(text.lstrip()) for tag in THINKING_TAGS)
            if begins and len(text) < MAX_HELD and not end:
                self._held = text
                return []
            self.answered = bool(text.strip())  # an answer of white space alone is an empty one
            return [text] if text else []
        tag, reasoning, closing = found.groups()
        cut = reasoning.rfind("<")
        if not (closing or end) and cut >= 0 and f"</{tag}>".startswith(reasoning[cut:]):
            reasoning, closing = reasoning[:cut], reasoning[cut:]
        text = text[found.end() :]
        # With the opening tag, so that the pattern matches the next text too: <think> or <think></th or <think></think>
        self._held = f"<{tag}>{closing}"
        self.answered = bool(text)
        thought: list[str | StreamEvent] = [StreamEvent(type="reasoning", chunk=reasoning)] if reasoning else []
        return [*thought, text] if text else thought


# Reasoning in tags, even without an end. Like all patterns here, it is a string, which `re` compiles when it is used.
THOUGHT = rf"(?s:<(?P<tag>{'|'.join(THINKING_TAGS)})>(?P<thought>.*?)(?P<closing></(?P=tag)>|\Z))"


# --- Tool calls and JSON in what the model wrote ----------------------------------------------------------------------


class ToolCallParser:
    """Splits the text of an answer into text and tool calls. Used only when the model was given tools.

    A call is a JSON object with the name of an offered tool and an object of arguments. It is taken at the start of the
    answer, in a tag, or after another call. The model is asked once about a call on a line of its own or in a code
    fence after words, about a made-up result, and about a call that cannot be read. If it was `asked` already, the
    calls before a broken one count. All else is text and comes out unchanged, except for white space next to a call.

    Where a call may begin, up to `MAX_HELD` characters are held until that is clear. Once one seems to begin, all that
    follows is held until the end, because the model may have to write all calls again. The cost is O(n), however the
    text was cut.
    """

    def __init__(self, names: Collection[str], asked: bool = False) -> None:
        self.names = frozenset(names)
        self.asked = asked  # the answer follows a correction
        self.error: AutonomousError | None = None
        self.finished = False  # the model goes on to make up results, so the answer ends with its calls
        self._held = io.StringIO()  # all that was not passed on, and up to MAX_HELD characters before it, as context
        self._passed = 0  # the length of the part of _held that was passed on
        self._calling = False  # a call seems to have begun
        self._recent = ""  # the end of the text since then, in which RESULT_TAG is looked for
        name = "|".join(map(re.escape, sorted(self.names)))
        # {"name": "add" or [{"name": "add" or, with no tag in between, {"type": "function", "function": {"name": "add"
        keys = rf'"name"\s*:\s*"({name})"|"(id|type|function|arguments|parameters)"\s*:[^<]*?"({name})"'
        self._in_json = re.compile(rf"(\[\s*)?\{{\s*({keys})")
        self._in_code = re.compile(
            rf"([\[{{]\W*(\w+\W+)?)?({name})(\.call)?\(|"  # add( or add.call( or [add( or [api.add(
            rf"[\[{{]\W*(\w+\W+)?({name})['\"]\s*[,:}}]|"  # {'add': or {'name': 'add',
            rf"<function\W({name})\b"  # <function=add
        )

    def feed(self, pieces: Iterable[str], end: bool = False) -> list[Any]:
        """The text that ``pieces`` completes; at the ``end`` of the answer, the rest of the text and the calls."""
        if self.error:
            return []
        text = "".join(pieces)
        self._held.write(text)
        passed = [] if self._calling else self._pass_on()
        if self._calling and self._held.tell() > MAX_EVENT_BYTES:
            self.error = too_large("a tool call")
        elif self._calling and RESULT_TAG not in self._recent:
            self._recent = self._recent[-len(RESULT_TAG) :] + text
            if RESULT_TAG in self._recent:
                # Only to set `finished`, which happens if the tag follows calls, and is not in an argument of one.
                with contextlib.suppress(AutonomousError):
                    self._split()
        if end and not self.error:
            try:
                passed += self._split(self.asked)
            except AutonomousError as error:
                self.error = error
        return passed

    def _pass_on(self) -> list[Any]:
        """The text up to where a call begins or may begin."""
        text, place = self._held.getvalue(), self._passed
        while (place := find_opening(text, place)) < len(text):
            self._calling = self._wrapping(text, place) is not None
            if self._calling or len(text) - place < MAX_HELD:
                break
            place += 1
        passed = text[self._passed : place]
        begin = max(0, place - MAX_HELD)  # what is before that is no longer needed
        self._held, self._passed = io.StringIO(), place - begin
        self._held.write(text[begin:])
        return [passed] if passed else []

    def _wrapping(self, text: str, place: int, next_call: int = -1) -> re.Match[str] | None:
        """The tags, if any, before what seems to be a call or a made-up result at ``place``; None if it is neither.

        Calls in JSON may stand anywhere, and calls in code within our own tags. At the start of the answer and after a
        call, anything in our own tags seems to be one, and so does code without a tag or a fence.
        """
        window = text[place : place + MAX_HELD]
        wrapping = re.compile(WRAPPING).match(window)
        assert wrapping  # since the pattern can match nothing
        value = window[wrapping.end() :]
        first = place == next_call or begins_answer(text, place)
        if wrapping["function"] in self.names or self._in_json.match(value):
            return wrapping  # JSON, anywhere
        own = wrapping[0] and re.search(OWN_TAG, wrapping[0])
        if first and (own or value.startswith(RESULT_TAG) or (not wrapping[0] and self._in_code.match(value))):
            return wrapping  # at the start or after a call
        return wrapping if own and (value.startswith(("{", "[")) or self._in_code.match(value)) else None

    def _split(self, lenient: bool = False) -> list[Any]:
        """The calls in what is held, and the text around them. Raises if the model has to be asked to correct it."""
        text = self._held.getvalue()
        pieces: list[Any] = []
        start = place = self._passed  # the text before start is in pieces
        next_call = -1  # where a call would directly follow the last
        while (place := find_opening(text, place, next_call)) < len(text):
            if pieces and text.startswith(RESULT_TAG, place):
                self.finished, text = True, text[:place]
                break
            if not (wrapping := self._wrapping(text, place, next_call)):
                place += 1
                continue
            begin = place + wrapping.end()
            if text.startswith(RESULT_TAG, begin):
                raise misread("the model made up the result of a tool", text[begin:], MADE_UP_RESULT)
            calls, end, problem = self._calls_at(text, begin, wrapping)
            taken = "<" in wrapping[0] or place == next_call or begins_answer(text, place)
            if problem:
                calls = calls if taken else []
                if not (lenient and (calls or pieces)):
                    raise problem
                # The broken call may need the result of one before it. The model can make it again after that result.
                warn("a tool call was left out: %s", problem)
                pieces += [text[start:place], *calls]
                start = len(text)
                break
            if calls:
                end = skip(rf"{CLOSING}(\s*```)?{CLOSING}" if wrapping["fence"] else CLOSING, text, end)
                if taken:
                    pieces += [text[start:place], *calls]
                    start, next_call = end, skip(r"\s*", text, end)
                elif wrapping["fence"] or re.compile(r"[ \t]*(\n|\Z)").match(text, end):  # alone on its line
                    raise misread("the answer holds a tool call without tags", text[begin:], CALL_AFTER_WORDS)
            place = end  # what was read and is no call, or one within a line, becomes text
        pieces.append(text[start:])
        return [each for each in pieces if not isinstance(each, str) or each.strip() or (each and len(pieces) == 1)]

    def _calls_at(self, text: str, place: int, wrapping: re.Match[str]) -> tuple[list[Any], int, Exception | None]:
        """The calls at ``place``, one after another or in lists, where they end, and what is wrong there, if anything.

        They end where a value is not meant as a call. If even the first one is not, the place after it is returned.
        """
        calls: list[llm.ToolCall] = []
        end, next_value = place, place
        try:
            while not calls or re.compile(r"(\[\s*)?\{").match(text, next_value):
                value, after = decode_json(text, next_value)
                if wrapping["function"] and not calls:
                    value = {"name": wrapping["function"], "arguments": value}
                values = value if value and isinstance(value, list) else [value]
                if not self._mean_calls(values, wrapping[0], bool(calls)):
                    return calls, (end if calls else after), None
                calls += [read_call(each) for each in values]
                end, next_value = after, skip(r"[\s;,}\]]*", text, after)
        except (ValueError, RecursionError) as error:  # from JSON or, with a reason, from read_call
            problem = f"it is not valid JSON: {error.msg}" if isinstance(error, json.JSONDecodeError) else str(error)
            begin, correction = text[next_value:] or wrapping[0], BROKEN_CALL.format(problem=problem)
            return calls, end, misread(f"the model's tool call cannot be read: {problem}", begin, correction)
        return calls, end, None

    def _mean_calls(self, values: list[Any], tags: str, after_call: bool) -> bool:
        """Whether JSON values are meant as calls, as anything in our own tags is, except for a tool's definition.

        Elsewhere, all need names. Unless they follow a call, one has to be the name of an offered tool.
        """
        fields = [call_fields(value) for value in values]
        if any(is_definition for _, _, is_definition in fields):
            return False
        if re.search(OWN_TAG, tags):
            return True
        name_suffices = re.search("tool|function|call", tags)  # elsewhere, arguments are needed too
        offered = any(name in self.names and (name_suffices or given is not None) for name, given, _ in fields)
        return (after_call or offered) and all(name for name, _, _ in fields)


# The tag that we ask for, Llama's own, and the one around the tools, if it is the last before a value.
OWN_TAG = r"<\|?(tool_call|python_tag)\|?>|<tools>\s*\Z"
RESULT_TAG = "<tool_response>"
# Up to three tags and fences before a call. It can match nothing, so it always matches. The bounds keep it linear.
WRAPPING = (
    r"((<function=(?P<function>[\w.-]{1,64})>|<\|?(?!tool_response>)[\w-]{1,64}\|?>|(?P<fence>```[\w-]{0,32}))"
    r"\s{0,99}){0,3}"
)
# What models leave after a call: brackets and closing tags.
CLOSING = r"([\s;,]*([}\]]|</[\w-]*>?|<\|/?(?!python_tag)\w*\|?>?))*"
CALL_FIELDS = {"name", "arguments", "parameters", "function", "type", "id"}


def find_opening(text: str, start: int, next_call: int = -1) -> int:
    """Where a call may begin next: at a tag, at a fence, or at a bracket that begins a line or follows a call."""
    for found in re.compile(r"<(?=[|\w]|\Z)|```|`{1,2}\Z|[{\[]").finditer(text, start):
        place = found.start()
        line = text[max(0, place - MAX_HELD) : place].rpartition("\n")[2]
        if found[0] not in ("{", "[") or place == next_call or not line.strip():
            return place
    return len(text)


def begins_answer(text: str, place: int) -> bool:
    """Whether nothing but white space stands before a place, as far as `MAX_HELD` characters show."""
    return not text[max(0, place - MAX_HELD) : place].strip()


def call_fields(value: Any) -> tuple[str | None, Any, bool]:
    """The name and the arguments in a value, in any of the shapes that models use; None for what is not there.

    The third is true for a copy of the tool's definition, with a schema in place of arguments.
    """
    value = value if isinstance(value, dict) else {}
    value = value["function"] if isinstance(value.get("function"), dict) else value
    name = value.get("name", value.get("function"))
    given = [value[key] for key in ("arguments", "parameters") if value.get(key) is not None]
    arguments = max(given, key=bool, default=None)  # of two, the one that is filled
    is_schema = isinstance(arguments, dict) and arguments.get("type") == "object" and "properties" in arguments
    is_definition = is_schema or ("description" in value and not value.get("arguments"))
    return name if isinstance(name, str) else None, arguments, is_definition


def read_call(value: Any) -> llm.ToolCall:
    """The tool call in a JSON value. Raises `ValueError` if there is none."""
    if not isinstance(value, dict):
        raise ValueError("it is not a JSON object")
    name, arguments, _ = call_fields(value)
    if not (name and name.strip() and name.isprintable()):
        raise ValueError('its "name" is not the name of a tool')
    if arguments is None and not CALL_FIELDS.issuperset(value):  # an unknown key may hold them
        raise ValueError('it has no "arguments"')
    if isinstance(arguments, str):
        with contextlib.suppress(ValueError, RecursionError):  # then they are no object
            arguments = json.loads(arguments or "{}", strict=False)
    if not isinstance(arguments, (dict, type(None))):
        raise ValueError('its "arguments" are not a JSON object')
    if shallow(arguments, 100) != arguments:  # cut off at that depth; `llm` could fail to write them
        raise ValueError('its "arguments" are nested too deeply')
    try:  # a round trip through JSON rejects NaN, and mends surrogates
        arguments = json.loads(replace_surrogates(json.dumps(arguments or {}, ensure_ascii=False, allow_nan=False)))
    except ValueError:
        raise ValueError('its "arguments" contain NaN or Infinity, which are not JSON') from None
    return llm.ToolCall(name=name, arguments=arguments, tool_call_id=f"call_{uuid.uuid4().hex}")


# The start of an object or a list, or reasoning, in which they do not count.
JSON_START = THOUGHT + r"""|\{\s*["}]|\[\s*(["\]\[{0-9-]|true|false|null)"""
# A bracket, or a string, even an unfinished one.
TOKEN = r"""(?s)[{}\[\]]|"[^"\\]*(?:\\.[^"\\]*)*"?"""


def closing_bracket(text: str, start: int) -> int:
    """The position after the object or list at ``start``, going by brackets alone; the end of a text without one."""
    depth = 0
    for token in re.compile(TOKEN).finditer(text, start):
        depth += {"{": 1, "[": 1, "}": -1, "]": -1}.get(token[0], 0)
        if depth == 0:
            return token.end()
    return len(text)


def with_escapes(text: str) -> str:
    """JSON with the control characters in its strings escaped."""
    return re.sub(TOKEN, lambda token: re.sub(r"[\0-\x1f]", lambda char: json.dumps(char[0])[1:-1], token[0]), text)


def schema_validator(schema: dict[str, Any]) -> Any:
    """A validator for answers to ``schema``. Raises if that is not a valid schema."""
    import jsonschema  # imported here, as it is slower than all other imports together
    import referencing

    try:
        validator_class = jsonschema.validators.validator_for(schema, default=jsonschema.Draft202012Validator)
        validator_class.check_schema(schema)
    except Exception as error:  # some wrong schemas make jsonschema itself fail
        reason = quoted(getattr(error, "message", str(error)))
        raise AutonomousError(f"the schema is not a valid JSON schema: {reason}; nothing was sent") from None
    return validator_class(schema, registry=referencing.Registry())  # which, unlike the default, never fetches a $ref


def matching_json(text: str, validator: Any) -> str:
    """The last JSON value that matches the schema, preferably with some of its properties. Raises if there is none."""
    from jsonschema.exceptions import best_match

    found = [*find_json(text)]
    values = [(value, written) for value, written in found if not repeats(validator.schema, value)]
    own, required = validator.schema.get("properties", {}).keys(), validator.schema.get("required", [])
    values.sort(key=lambda pair: isinstance(pair[0], dict) and not own.isdisjoint(pair[0]))
    mismatch = ""
    for value, written in reversed(values):  # those with a property of the schema first, and of these the last first
        try:
            # Models may write [1, 2] for {"ids": [1, 2]}, if nothing else is required: on a line or after a colon.
            listed = isinstance(value, list) and len(required) == len(values) == 1 and not validator.is_valid(value)
            if listed and re.search(rf"(?m)(^|:)[^\w\n:]*{re.escape(written)}\W*$", text):
                value, written = {required[0]: value}, f"{{{json.dumps(required[0])}: {written}}}"
            error = best_match(validator.iter_errors(value))
        except Exception as failure:  # a $ref to nowhere, or a schema that contains itself
            raise AutonomousError(f"the schema cannot be applied: {quoted(str(failure))}") from None
        if error is None:
            with contextlib.suppress(Exception):  # if the schema cannot be applied to the other value
                if sum(validator.is_valid(other) for other, _ in values) > 1:
                    warn("the answer holds several values that match the schema; only one of them is kept")
            return with_escapes(written)
        if not mismatch:  # the first value tried is the one that was most likely meant
            # jsonschema's own message shows values as Python writes them, which a model would copy. It has no
            # validator if the schema is just `false`.
            wanted = as_json({error.validator: error.validator_value} if error.validator else False)
            mismatch = quoted(f"at {error.json_path}, the schema has {wanted}")
    problem = mismatch or ("it repeats the schema, without values" if found else "it holds no valid JSON")
    correction = f"Your answer does not match the JSON schema: {problem}. {schema_instructions(validator.schema)}"
    raise misread(f"the answer does not match the schema: {problem}", text, correction)


def repeats(schema: dict[str, Any], value: Any) -> bool:
    """Whether a value is a copy of the schema, which describes its properties, or of the example with its "..."."""
    described = value.get("properties") if isinstance(value, dict) else None
    copied = isinstance(described, dict) and not described.keys().isdisjoint(schema.get("properties", ()))
    text = as_json(value)  # the instructions end with the example
    return copied or ('"..."' in text and schema_instructions(schema).endswith(f"\n{text}"))


def find_json(text: str) -> Iterator[tuple[Any, str]]:
    """The JSON in an answer, each value with its text: the whole answer, or else the objects and lists in it."""
    text = re.sub(r"\A```\w*", "", text.strip()).removesuffix("```").strip()
    decoder = json.JSONDecoder(strict=False, parse_constant=int)  # int refuses NaN, which is no JSON
    with contextlib.suppress(ValueError, RecursionError):
        yield decoder.decode(text), text
        return
    end = 0
    while found := re.compile(JSON_START).search(text, end):
        start, end = found.span()
        if found["tag"]:  # this is reasoning
            continue
        try:
            value, end = decoder.raw_decode(text, start)
            yield value, text[start:end]
        except (ValueError, RecursionError):
            end = closing_bracket(text, start)  # skip all of it: a part of something broken is not the answer
            # Without commas before brackets. Strings match too, so that commas in them stay.
            mended = re.sub(TOKEN + r"|,(?=\s*[}\]])", lambda token: token[0].removeprefix(","), text[start:end])
            with contextlib.suppress(ValueError, RecursionError):  # if more than that is wrong
                yield decoder.decode(mended), mended


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


# --- What can go wrong ------------------------------------------------------------------------------------------------


class AutonomousError(llm.ModelError, click.ClickException):
    """One line on why a prompt failed: who says so, what happened, and what to do about it.

    `llm` and `llm chat` show that line and nothing else, because this is also a `click.ClickException`.
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
        self.retryable, self.retry_after = retryable, retry_after
        self.outage, self.correction = outage, correction

    def for_user(self, url: httpx.URL, attempts: int = 1, checking: bool = False) -> AutonomousError:
        """The error as the user sees it, with the host and the number of attempts."""
        message = f"{url.netloc.decode()}: {self.message}" + (f" ({attempts} attempts)" if attempts > 1 else "")
        if self.outage and f"https://{url.host}" == BASE_URL:
            message += ". The service is often down"
            message += "" if checking else "; `llm autonomous check` shows which models answer"
        return AutonomousError(message, retryable=self.retryable, retry_after=self.retry_after, outage=self.outage)


def quoted(words: str) -> str:
    """A server's words in a form that is fit for an error: one printable line of at most `MAX_EXCERPT` characters."""
    printable = "".join(char if char.isprintable() else " " for char in words[: 4 * MAX_EXCERPT])
    line = " ".join(printable.split())
    return line if len(line) <= MAX_EXCERPT else line[: MAX_EXCERPT - 1] + "…"


def warn(message: str, *values: object) -> None:
    """Log a warning. If no logging is set up, it goes to the terminal, where the answer may not have ended its line."""
    logger.warning(("" if logger.hasHandlers() else "\nWarning: ") + message, *values)


def explained(error: AutonomousError, reason: str) -> AutonomousError:
    """The error, with what an unusual finish reason says about the answer put before it."""
    if not reason or re.search(USUAL_FINISH_REASON, reason):
        return error
    at_limit = re.search(LIMIT_REASON, reason)
    cut_short = "was cut short because it reached the model's limit" if at_limit else "may be cut short"
    message = f"the answer {cut_short} (finish reason: {reason}): {error}"
    correction = f"{SHORTER} {error.correction}" if at_limit and error.correction else error.correction
    return AutonomousError(message, outage=error.outage, correction=correction)


def not_understood(start: str) -> AutonomousError:
    return AutonomousError(f"the reply was not understood; it begins: {quoted(start)}")


def too_large(what: str = "an event") -> AutonomousError:
    return AutonomousError(f"the reply holds {what} larger than {MAX_EVENT_BYTES // 1024**2} MiB")


def misread(problem: str, text: str, correction: str) -> AutonomousError:
    """The error for what a model got wrong, which it is asked once to correct."""
    return AutonomousError(f"{problem}; it begins: {quoted(text)}", correction=correction)


def page_words(page: str) -> str:
    """How an error describes a web page: by its title or, if it has none, its text."""
    import html

    page = page[:MAX_PAGE_BYTES]
    # Without the limits, a page that repeats "<title" would take quadratic time.
    found = re.search(r"(?i)<title[^>]{0,99}>([^<]{1,999})", page)
    if found and (title := quoted(html.unescape(found[1]))):
        return f"answered with a web page titled: {title}"
    text = re.sub(r"(?is)<(script|style)\b.*?(</\1>|\Z)|<!--.*?(-->|\Z)|<[^<>]*(>|\Z)", " ", page)
    words = quoted(html.unescape(text))
    return "answered with a web page without a title" + (f": {words}" if words else "")


def error_words(body: object) -> str:
    """The message in an error body of any of the forms in PROTOCOL.md, or several, if they say different things."""
    if not isinstance(body, dict):
        return body if isinstance(body, str) else as_json(body)
    values = [value for key in ("error", "errors", *MESSAGE_KEYS) if (value := body.get(key)) and value is not True]
    found = dict.fromkeys(map(error_words, values))  # some may be contained in others
    return ": ".join(one for one in found if not any(one != other and one in other for other in found)) or as_json(body)


def reported_error(fields: dict[str, Any], in_words: bool = False) -> AutonomousError | None:
    """The error in an object: ``error``, ``errors``, or a message with a failing code or, if ``in_words``, none."""
    message = any(is_error_value(fields[key]) for key in MESSAGE_KEYS if isinstance(fields.get(key), (str, list)))
    code = fields.get("code", fields.get("status_code"))
    failed = message and (in_words if code is None else is_error_value(code))
    if failed or is_error_value(fields.get("error")) or is_error_value(fields.get("errors")):
        return AutonomousError(f"the service reports an error: {quoted(error_words(shallow(fields, 20)))}")
    return None


def is_error_value(value: Any) -> bool:
    """Whether a code or an error, or one of its fields, is neither empty nor a word for success."""
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else [value]
    return any(isinstance(v, (dict, list)) or not re.fullmatch(NO_ERROR, str(v)) for v in inner)


def mentions_error(value: Any) -> bool:
    """Whether a value that was not understood has a field, a word or a string in it that stands for an error."""
    pattern = "(?i)error|fail" if isinstance(value, str) else r'(?i)"\w*(error|fail)\w*"'
    return bool(re.search(pattern, as_json(value)))


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
    with contextlib.suppress(ValueError, RecursionError):  # then it is plain text
        words = page_words(words) if page else error_words(json.loads(words))
    message = f"{status}: {quoted(words)}" if words else status
    if (retry_after := parse_retry_after(reply.headers.get("retry-after", ""))) is not None:
        message += f"; it asks to wait {retry_after:.0f} s"
    retryable, outage = reply.status_code in RETRY_STATUSES, page or reply.status_code >= 500
    return AutonomousError(message, retryable=retryable, retry_after=retry_after, outage=outage)


def parse_retry_after(value: str) -> float | None:
    """Seconds to wait, by a ``Retry-After`` header, which has seconds or a date (RFC 9110, section 10.2.3)."""
    waits = []  # several, if a proxy has added its own
    for part in re.split(r"(?<![a-z])\s*,\s*", value.strip()):  # not after the "Wed" of a date
        with contextlib.suppress(ValueError, OverflowError):  # if it is no number, and the date does not exist
            if re.fullmatch(r"[\d.]+", part):
                waits.append(float(part))
            elif date := email.utils.parsedate_tz(part):
                waits.append(email.utils.mktime_tz(date) - time.time())
    return max(0.0, *waits) if waits else None


def transport_error(error: Exception, answered: bool, timeout: float, proxy: str) -> AutonomousError:
    """The error for an exception from httpx or the libraries below it."""
    import httpx

    if isinstance(error, AutonomousError):
        return error
    cause = root_cause(error)
    reason = reason_of(cause) or "no reason was given"
    silent = isinstance(error, httpx.TimeoutException)
    # Other words of httpcore and h11 are about malformed replies; these mean a lost connection.
    dropped = isinstance(error, httpx.NetworkError) or str(error).startswith(("Server disconnected", "peer closed"))
    if answered:
        lost = f"silent for {timeout:g} s" if silent else "the connection was lost" if dropped else reason
        return AutonomousError(f"the answer is incomplete: {lost} in the middle of the reply", retryable=dropped)
    if hasattr(cause, "verify_code"):
        advice = CERTIFICATE_ADVICE.get(cause.verify_code, "")
        return AutonomousError(f"its certificate cannot be verified: {reason}{advice}", outage=True)
    if isinstance(error, (httpx.ConnectError, httpx.ConnectTimeout, httpx.ProxyError)):
        through = f" through the proxy {httpx.URL(proxy).netloc.decode()}" if proxy else ""
        if silent:
            reason = f"no reply within {min(timeout, CONNECT_TIMEOUT):g} s"
        elif isinstance(error, httpx.ConnectError) and (not reason_of(cause) or "EOF occurred" in reason):
            # Only a failed TLS handshake has no message, or this one of OpenSSL.
            reason = "the connection was closed during the TLS handshake"
        retryable = True
        if isinstance(error, httpx.ProxyError):  # the reason begins with its HTTP status or httpcore's words for SOCKS
            code = re.match(r"[0-9]{3}\b", reason)
            retryable = int(code[0]) in RETRY_STATUSES if code else reason.startswith("Proxy Server could not connect")
        return AutonomousError(f"cannot connect{through}: {reason}", retryable=retryable, outage=not proxy)
    if silent:
        return AutonomousError(f"silent for {timeout:g} s; -o timeout sets the limit", outage=True)
    if dropped:
        return AutonomousError("the connection was lost before any answer", retryable=True, outage=True)
    malformed = isinstance(error, (httpx.ProtocolError, httpx.DecodingError))
    return AutonomousError(f"{'the reply was not understood' if malformed else 'the request failed'}: {reason}")


# By OpenSSL's codes for what is wrong with a certificate.
UNKNOWN_ISSUER = ". If a company proxy inspects TLS, set SSL_CERT_FILE to the file with its certificate authority"
CERTIFICATE_ADVICE = dict.fromkeys((2, 18, 19, 20, 21), UNKNOWN_ISSUER)
CERTIFICATE_ADVICE[9] = ". Check the date and time of this computer"
CERTIFICATE_ADVICE[10] = ". Only the owner of the server can renew it"


def root_cause(error: BaseException) -> BaseException:
    """The innermost exception, as only that one says "Connection refused"."""
    # httpcore passes it on as the first argument of its own exception, and anyio in a group with one for each address.
    inner = getattr(error, "exceptions", error.args)
    cause = error.__cause__ or (inner[0] if inner else None)
    return root_cause(cause) if isinstance(cause, BaseException) else error


def reason_of(cause: BaseException) -> str:
    """What the operating system or OpenSSL says went wrong."""
    if sys.platform != "win32" and type(cause).__module__ == "builtins" and isinstance(cause, OSError) and cause.errno:
        return os.strerror(cause.errno)  # asyncio replaces the words; Windows and other modules have other codes
    words = getattr(cause, "verify_message", "") or getattr(cause, "strerror", "") or str(cause)
    return quoted(words).rstrip(".")


# --- Retries: one prompt, and the attempts to get it answered ---------------------------------------------------------


def retry_wait(error: AutonomousError, number: int, limit: int) -> float | None:
    """Seconds to wait before trying again after attempt ``number`` of ``limit``; None to give up."""
    if not error.retryable or number >= limit:
        return None
    if error.retry_after is not None:
        return error.retry_after if error.retry_after <= MAX_RETRY_AFTER else None
    return BACKOFF[number - 1] * random.uniform(1 - JITTER, 1 + JITTER)


class Exchange:
    """One prompt: what to send, when to try again, and what to tell `llm` in the end. It uses no network."""

    def __init__(self, model: _Shared, prompt: llm.Prompt, stream: bool, response: Any, conversation: Any) -> None:
        options = cast(AutonomousOptions, prompt.options)
        self.model = model
        self.stream = stream
        self.url = endpoint_url(model.service.endpoint)
        self.proxy = find_proxy(options.proxy, self.url)
        self.timeout = options.timeout or DEFAULT_TIMEOUT
        self.tools = [tool for tool in prompt.tools if isinstance(tool, llm.Tool)]
        schema = prompt.schema = schema_of(prompt, conversation)  # where the log of `llm` finds it as well
        self.validator = schema_validator(schema) if schema else None
        parts = [part for message in since_answer(prompt.messages) for part in message.parts]
        self.new_results = bool(self.tools) and any(isinstance(part, ToolResultPart) for part in parts)
        self.messages = self._messages(prompt, conversation)
        # Weak, because an async response holds a generator, which holds this and the connection. If the caller stops
        # reading, a cycle would keep the connection open until the garbage collector runs.
        self.response: Any = weakref.proxy(response)

    def _messages(self, prompt: llm.Prompt, conversation: Any) -> list[dict[str, Any]]:
        """The messages to send. Raises if the user has given nothing to answer."""
        in_json = schema_instructions(self.validator.schema) if self.validator else ""
        instructions = tool_instructions(self.tools) if self.tools else in_json
        # With tools, the schema follows their results: given both at once, models make results up.
        after_results = f"{AFTER_RESULTS} {in_json}".strip() if self.new_results else ""
        images, given = bool(self.model.service.attachment_types), prompt.messages
        # `llm` passes on only the first system prompt of a conversation. Here the last one counts.
        turns = [*(response.prompt for response in conversation.responses), prompt] if conversation else []
        # A turn with another first message does not belong here: it had a history of its own (``messages=``).
        if systems := [turn.system for turn in turns if turn.system and turn.messages[:1] == given[:1]]:
            system = llm.Message(role="system", parts=[TextPart(systems[-1])])
            given = [system, *(message for message in given if message.role != "system")]
        messages = build_messages(given, images, bool(self.tools), instructions, after_results)
        # With a past, a last message of the assistant is the previous answer. Without, the caller wants it continued.
        past = conversation and (conversation.responses or getattr(conversation, "loaded_messages", None))
        nothing = not messages or messages[-1]["content"] == instructions  # or only what we added
        if nothing or (past and messages[-1]["role"] == "assistant"):
            raise AutonomousError("the prompt is empty: nothing was sent")
        return messages

    def attempts(self) -> Iterator[Attempt]:
        """One attempt after another, for as long as trying again may help. Raises the error of the last."""
        attempt, limit = self.model.attempt_type(self), self.model.attempts
        yield attempt
        while error := attempt.error:
            number = attempt.number
            shown = error.for_user(self.url, number, checking=limit == 1)  # the limit of `llm autonomous check`
            if error.correction and not attempt.corrected and number < limit:
                logger.info("%s; asking the model to correct it", shown)
                attempt = self.model.attempt_type(self, number + 1, corrected=attempt)
            elif not attempt.yielded and (wait := retry_wait(error, number, limit)) is not None:
                logger.info("%s; trying again in %.1f s", shown, wait)
                attempt = self.model.attempt_type(self, number + 1, wait, attempt.corrected)
            else:
                raise shown from attempt.failure
            yield attempt
        self._report(attempt)

    def _report(self, attempt: Attempt) -> None:
        """Pass on the metadata to `llm`, and warn the user if the answer may be cut short."""
        completion, envelope = attempt.completion, attempt.completion.envelope
        self.response.response_json = {**envelope}
        if isinstance(model := envelope.get("model"), str):
            self.response.set_resolved_model(quoted(model))
        answers = [attempt.corrected, attempt] if attempt.corrected else [attempt]
        if usage := add_up(*(answer.completion.envelope.get("usage") for answer in answers)):
            details = {key: value for key, value in usage.items() if key.endswith("_details")}
            counts = (usage.get(key) for key in ("prompt_tokens", "completion_tokens"))
            sent, received = (int(count) if isinstance(count, (int, float)) else None for count in counts)
            self.response.set_usage(input=sent, output=received, details=simplify_usage_dict(details) or None)
        if completion.not_understood is not None:
            warn("part of the reply was not understood; it begins: %s", quoted(as_json(completion.not_understood)))
        reason = completion.finish_reason
        if reason and not re.search(USUAL_FINISH_REASON, reason):
            limit = ": it reached the model's limit" if re.search(LIMIT_REASON, reason) else ""
            warn("the answer may be cut short%s (finish reason: %s)", limit, reason)
        elif not attempt.whole:
            warn("the answer may be cut short: the stream ended without finish reason or [DONE]")


def schema_of(prompt: llm.Prompt, conversation: Any) -> dict[str, Any] | None:
    """The prompt's own schema or, since `llm` drops it after a tool call, that of the prompt that led to the call."""
    schema = prompt.schema
    answered = {result.tool_call_id for result in prompt.tool_results}
    if answered and conversation and not schema:
        for response in conversation.responses:
            if any(call.tool_call_id in answered for call in response.tool_calls_or_raise()):
                schema = response.prompt.schema
    return cast("dict[str, Any] | None", schema)


def add_up(*usages: Any) -> dict[str, Any]:
    """The token counts of several answers, each key by itself."""
    total: dict[str, Any] = {}
    for usage in usages:
        for key, value in usage.items() if isinstance(usage, dict) else ():
            if isinstance(value, dict):
                total[key] = add_up(total.get(key), value)
            elif isinstance(value, (int, float)) and 0 <= value < 2**62:  # SQLite cannot store more
                total[key] = value + (total[key] if isinstance(total.get(key), (int, float)) else 0)
    return total


class Attempt:
    """One try: the request, and the reply as far as it has arrived. No I/O.

    `execute` passes in the status and headers (`open`), then the bytes (`feed`) until it is `done`, then any exception
    that got in the way (`fail`), and finally the end (`close`).
    """

    def __init__(self, exchange: Exchange, number: int = 1, wait: float = 0, corrected: Attempt | None = None) -> None:
        self.exchange = exchange
        self.number = number  # from 1
        self.wait = wait  # seconds to wait before sending it
        self.corrected = corrected  # the attempt whose answer the model is asked to correct
        self.framing, self.completion, self.thinking = Framing(), Completion(), Thinking()
        self.parser = ToolCallParser({t.name for t in exchange.tools}, bool(corrected)) if exchange.tools else None
        self.refusal: httpx.Response | None = None  # status and headers, if the status is not 2xx
        self.beginning = b""  # of the body, to be quoted in an error
        self.written = io.StringIO()  # everything the model wrote, if it may have to be corrected
        self.yielded = False  # the user has seen some of the answer
        self.deadline: float | None = None  # when to stop reading, by time.monotonic()
        self.failure: Exception | None = None
        self.error: AutonomousError | None = None

    def request(self) -> httpx.Request:
        """The prompt and, if an answer is to be corrected, that answer and what was wrong with it."""
        import httpx

        exchange, messages = self.exchange, self.exchange.messages
        if self.corrected and self.corrected.error:
            answer, correction = self.corrected.written.getvalue(), self.corrected.error.correction
            said = [{"role": "assistant", "content": answer}] if answer.strip() else []
            messages = [*messages, *said, {"role": "user", "content": correction}]
        body = build_body(exchange.model.service, messages, exchange.stream)
        limits = httpx.Timeout(exchange.timeout, connect=min(exchange.timeout, CONNECT_TIMEOUT), pool=None)
        extensions = {"timeout": limits.as_dict()}
        return httpx.Request("POST", exchange.url, headers=build_headers(), content=body, extensions=extensions)

    @property
    def whole(self) -> bool:
        """Whether the answer is complete, so that losing the connection does no harm."""
        return self.completion.whole or self.framing.ended or (self.parser is not None and self.parser.finished)

    @property
    def done(self) -> bool:
        """Whether to stop reading at once, without waiting for the usage or the end of the reply."""
        page_read = self.refusal is not None and len(self.beginning) == MAX_PAGE_BYTES
        return self.error is not None or page_read or (self.parser is not None and self.parser.finished)

    def open(self, head: httpx.Response) -> None:
        """Take the status and headers of the reply."""
        self.refusal = None if head.is_success else head
        named = head.headers.get("content-encoding", "")
        codings = re.findall(CODINGS, named.lower())
        if codings == ["x-gzip"]:
            head.headers["content-encoding"] = "gzip"  # httpx knows only this name
        elif codings not in ([], ["gzip"], ["deflate"]):
            # We did not ask for it, and one compression inside another can expand to terabytes.
            raise AutonomousError(f"the reply was not understood: its encoding is {quoted(named)}")

    def feed(self, data: bytes) -> list[str | StreamEvent]:
        """Take the next bytes of the reply, and return the pieces of the answer that they complete."""
        limit = MAX_PAGE_BYTES if self.refusal else MAX_BEGINNING
        if len(self.beginning) < limit:
            self.beginning += data[: limit - len(self.beginning)]
        return self._out(self._decode(data))

    def fail(self, failure: Exception) -> None:
        """Take an exception of Python or the libraries below. Any other, as from a signal handler, is raised again."""
        if type(failure).__module__.partition(".")[0] not in {*sys.stdlib_module_names, *LIBRARIES}:
            raise failure
        self.failure = failure

    def close(self) -> list[str | StreamEvent]:
        """Take the end of the reply, and return the pieces of the answer that it completes."""
        pieces = self._decode(b"", end=True)
        self.error = self.error or self._problem()
        if not self.error:
            pieces += self._parse([], end=True)  # which may find a mistake of the model
            self.error = self.error and explained(self.error, self.completion.finish_reason)
        elif self.yielded:
            pieces += self._parse([], end=True)  # no retry follows what was shown, so what is held is shown too
        return self._out(pieces)

    def time_left(self, timeout: float) -> float:
        """Seconds to wait for more bytes: ``timeout`` or, if nothing more is needed, what is left of a shorter limit.

        Reading on to the end of an error or a whole answer keeps the connection alive, and may bring words or the
        usage. It is not worth waiting long for: the `TimeoutError` ends the reply, and `_problem` ignores it.
        """
        if not (self.refusal or self.whole):
            return timeout
        now = time.monotonic()
        if self.deadline is None:
            self.deadline = now + (ERROR_BODY_TIMEOUT if self.refusal else END_TIMEOUT)
        if self.deadline <= now:
            raise TimeoutError("nothing more is needed, but the reply does not end")
        return min(timeout, self.deadline - now)

    def _decode(self, data: bytes, end: bool = False) -> list[Any]:
        """The text, reasoning and tool calls completed by ``data`` or by the ``end`` of the reply."""
        if self.refusal or self.error:
            return []
        values = self.framing.feed(data, end)
        end = end or self.framing.ended
        pieces: list[Any] = self.thinking.feed(self.completion.feed(values, end), end) if values or end else []
        self.error = self.completion.error or self.framing.error
        if pieces:
            self.deadline = None  # the answer goes on
        return self._parse(pieces) if pieces else []

    def _parse(self, pieces: list[Any], end: bool = False) -> list[Any]:
        """Find the tool calls. If there is a schema, keep the answer until it is complete and can be checked."""
        validator = self.exchange.validator
        if not (self.parser or validator):
            return pieces
        reasoning = [piece for piece in pieces if not isinstance(piece, str)]
        pieces = [piece for piece in pieces if isinstance(piece, str)]
        self.written.writelines(pieces)
        if self.parser:
            pieces = self.parser.feed(pieces, end)
            self.error = self.error or self.parser.error
        if not validator:
            return reasoning + pieces
        if self.written.tell() > MAX_EVENT_BYTES:
            self.error = self.error or too_large("an answer to a schema")
        calls = [piece for piece in pieces if not isinstance(piece, str)]
        if self.error or calls or not end:  # if there are calls, the answer comes in a later round
            return reasoning + calls
        try:
            return [matching_json(self.written.getvalue(), validator)]
        except AutonomousError as error:
            self.error = error
            return []

    def _problem(self) -> AutonomousError | None:
        """What is wrong with a reply that has ended without an error. The most telling comes first."""
        unknown, answered = self.completion.not_understood, self.thinking.answered
        if self.refusal:
            return status_error(self.refusal, self.beginning)
        if self.failure and not self.whole:
            return transport_error(self.failure, answered, self.exchange.timeout, self.exchange.proxy)
        if answered and self.framing.cut_off and not self.whole:
            return AutonomousError("the answer is incomplete: the reply ends within an event")
        if answered and unknown is not None and mentions_error(unknown):
            return AutonomousError(f"the answer is incomplete: the service reports {quoted(as_json(unknown))}")
        if answered:
            return None
        if unknown is not None or self.framing.cut_off:
            return not_understood(self.framing.cut_off or as_json(unknown))
        message = "the answer was empty" + (", after some reasoning" if self.thinking.reasoned else "")
        if body := self.beginning.strip().decode("utf-8", "replace"):
            message += f"; the reply begins: {body}"
        correction = EMPTY_CORRECTION if self.exchange.new_results else None
        error = AutonomousError(quoted(message), outage=True, correction=correction)
        return explained(error, self.completion.finish_reason)

    def _out(self, pieces: list[Any]) -> list[str | StreamEvent]:
        """The pieces in the form that `llm` expects from `execute`."""
        if pieces and not self.yielded:
            self.yielded = True
            if self.corrected and self.corrected.yielded and not self.exchange.validator:
                pieces.insert(0, "\n")  # after the words already shown; with a schema, there are none
        if self.parser is None:
            return pieces
        out: list[str | StreamEvent] = []
        for piece in pieces:
            if not isinstance(piece, llm.ToolCall):
                out.append(piece)
                continue
            self.exchange.response.add_tool_call(piece)  # and the events keep it in its place among the text
            for kind, chunk in (("tool_call_name", piece.name), ("tool_call_args", json.dumps(piece.arguments))):
                out.append(StreamEvent(type=kind, chunk=chunk, tool_call_id=piece.tool_call_id))
        return out


# --- Connections: kept from prompt to prompt, because each costs a TLS handshake --------------------------------------


class ClientKey(NamedTuple):
    """Everything that decides which client can send a prompt."""

    process: int  # a forked child never uses or closes the connections of its parent
    loop: asyncio.AbstractEventLoop | None  # of an async client
    proxy: str
    certificates: tuple[str | None, ...]  # the values of CERTIFICATE_VARIABLES


class Client:
    """An httpx client, which is one pool of connections, and a count of the prompts that use it (``with``)."""

    def __init__(self, key: ClientKey) -> None:
        self.key = key
        self.http = new_http_client(key)
        self.in_flight = 0
        self.last_used = 0.0  # by time.monotonic()
        self.life: Any = None  # what closes an async client

    def __enter__(self) -> Any:
        with _locks[os.getpid()]:
            self.in_flight += 1
        return self.http

    def __exit__(self, *exception: object) -> None:
        with _locks[os.getpid()]:
            self.in_flight -= 1
            self.last_used = time.monotonic()


_clients: dict[Client, None] = {}  # an ordered set
# By process, as a lock that is held during a fork stays locked in the child. Reentrant, as the garbage collector may
# end a prompt at any point. Finding an async client needs none, as only the thread of its loop uses it.
_locks: dict[int, threading.RLock] = collections.defaultdict(threading.RLock)


def find_client(proxy: str, loop: Any = None) -> tuple[Client, list[Client]]:
    """A client with room for another prompt, perhaps a new one, and the idle clients that should be closed."""
    now = time.monotonic()
    key = ClientKey(os.getpid(), loop, proxy, tuple(map(os.environ.get, CERTIFICATE_VARIABLES)))
    own = [client for client in [*_clients] if (client.key.process, client.key.loop) == (key.process, key.loop)]
    client = next((each for each in own if each.key == key and each.in_flight < POOL_SIZE), None) or Client(key)
    client.last_used = now  # so that it is not closed below
    _clients[client] = None  # if it is new
    idle = sorted((old for old in own if not old.in_flight), key=lambda old: old.last_used, reverse=True)
    unneeded = [old for n, old in enumerate(idle) if n >= MAX_IDLE_CLIENTS or old.last_used < now - KEEPALIVE]
    for old in unneeded:
        del _clients[old]
    return client, unneeded


def sync_client(proxy: str) -> Client:
    with _locks[os.getpid()]:
        client, unneeded = find_client(proxy)
    for old in unneeded:
        old.http.close()
    return client


@atexit.register
def close_clients() -> None:
    """Close the sync clients of this process. The async ones are closed with their event loop."""
    for client in [*_clients]:
        if (client.key.process, client.key.loop) == (os.getpid(), None):
            _clients.pop(client, None)
            client.http.close()


async def async_client(proxy: str) -> Client:
    import asyncio

    try:
        loop = asyncio.get_running_loop()
    except RuntimeError:  # under trio, for instance
        raise AutonomousError("async prompts need an event loop of asyncio, and none is running") from None
    for other in [*_clients]:
        if other.key.loop and other.key.loop.is_closed():  # without having shut down
            _clients.pop(other, None)
    client, unneeded = find_client(proxy, loop)
    if client.life is None:
        client.life = _live(client)
        await anext(client.life)  # starts it, so that the loop will close it
    for old in unneeded:
        await old.life.aclose()
    return client


async def _live(client: Client) -> AsyncGenerator[None, None]:
    """Closes an async client when it is no longer needed or its event loop shuts down.

    When a loop shuts down, it closes every async generator that was started in it. Nothing else tells us in time.
    """
    try:
        yield
    finally:
        _clients.pop(client, None)
        # A loop of nest_asyncio never shuts down, so this block runs at the end of the process, without a running loop.
        if client.key.process == os.getpid() and client.key.loop and client.key.loop.is_running():
            await client.http.aclose()


def new_http_client(key: ClientKey) -> Any:
    import certifi
    import httpx

    logging.getLogger("httpcore.socks").setLevel(logging.INFO)  # at DEBUG it logs the proxy's password
    client_class: Any = httpx.AsyncClient if key.loop else httpx.Client
    try:
        return client_class(
            verify=ssl_context(*key.certificates),
            # To httpx the two are the same, but before 0.28 it rejects socks5h.
            proxy=key.proxy.replace("socks5h://", "socks5://", 1) or None,
            trust_env=False,
            limits=httpx.Limits(max_keepalive_connections=POOL_SIZE, keepalive_expiry=KEEPALIVE),
        )
    except OSError as error:
        path = error.filename or next(filter(None, key.certificates[:2]), None) or certifi.where()
        variables = [name for name in CERTIFICATE_VARIABLES if os.environ.get(name) == path]
        named = f", which {variables[0]} names" if variables else ""
        raise AutonomousError(f"cannot load {path}{named}: {reason_of(error)}") from error
    except ImportError:
        raise AutonomousError("a SOCKS proxy needs a package: llm install 'httpx[socks]' (or pip install)") from None


@functools.cache
def ssl_context(*certificates: str | None) -> ssl.SSLContext:
    """What verifies certificates. It takes 30 ms to make, so it is kept for each setting of the environment."""
    import httpx

    return httpx.create_ssl_context()


# --- What moves the bytes ---------------------------------------------------------------------------------------------


def limit_reads(head: httpx.Response, attempt: Attempt) -> None:
    """Let the attempt say how long to wait for each part of the reply.

    httpcore looks up the timeout of a request only once, but passes it to the stream each time that it reads: sync or
    async, by ``stream.read(max_bytes, timeout)``. A reply that a test made up has no stream.
    """
    if stream := head.extensions.get("network_stream"):
        read = functools.partial(type(stream).read, stream)  # not stream.read, which an earlier reply may have replaced

        def read_limited(max_bytes: int, timeout: float) -> Any:
            # Once this reply has ended, the connection may be another prompt's, and this reads the head of its reply.
            return read(max_bytes, timeout=timeout if head.is_closed else attempt.time_left(timeout))

        stream.read = read_limited


class SocksHandshake:
    """Limits the time that a SOCKS proxy has to connect. httpcore itself would wait for its replies for ever.

    httpcore reports each step to the ``trace`` extension of a request: a function or, for async, a coroutine function.
    """

    def __init__(self, request: httpx.Request) -> None:
        self.timeout: float = request.extensions["timeout"]["connect"]
        self.stream: Any = None  # the connection to the proxy

    def trace(self, event: str, info: dict[str, Any]) -> None:
        if error := self._error(event, info):
            self.stream.close()  # httpcore leaves it open
            raise error

    async def trace_async(self, event: str, info: dict[str, Any]) -> None:
        if error := self._error(event, info):
            await self.stream.aclose()
            raise error

    def _error(self, event: str, info: dict[str, Any]) -> BaseException | None:
        """What the handshake has failed with, if it has."""
        import httpcore

        if event == "socks.setup_socks5_connection.started":
            self.stream = info["stream"]
            self.stream.read = functools.partial(self.stream.read, timeout=self.timeout)
        if event != "socks.setup_socks5_connection.failed":
            return None
        error: BaseException = info["exception"]
        if isinstance(error, httpcore.TimeoutException):
            return httpcore.ProxyError(f"no reply within {self.timeout:g} s")
        malformed = isinstance(error, Exception) and not isinstance(error, httpcore.ProxyError)  # but not Ctrl-C
        return httpcore.ProxyError("it does not answer as a SOCKS proxy") if malformed else error


class _Shared:
    """Everything that the sync and the async model have in common."""

    can_stream = True
    supports_tools = True
    supports_schema = True
    Options = AutonomousOptions
    attempts = ATTEMPTS  # `llm autonomous check` changes these two for its own models
    attempt_type: type[Attempt] = Attempt

    def __init__(self, service: ServiceModel) -> None:
        self.service = service
        self.model_id = service.model_id
        self.attachment_types: set[str] | frozenset[str] = service.attachment_types


class Autonomous(_Shared, llm.Model):  # type: ignore[misc]  # llm nests its Options class
    """A model of the service, as `llm.get_model` gives it."""

    def execute(
        self, prompt: llm.Prompt, stream: bool, response: llm.Response, conversation: llm.Conversation | None
    ) -> Iterator[str | StreamEvent]:
        exchange = Exchange(self, prompt, stream, response, conversation)
        with sync_client(exchange.proxy) as http:
            for attempt in exchange.attempts():
                if attempt.wait:
                    time.sleep(attempt.wait)
                try:
                    request = attempt.request()
                    if exchange.proxy.startswith("socks"):
                        request.extensions["trace"] = SocksHandshake(request).trace
                    with contextlib.closing(http.send(request, stream=True)) as head:
                        limit_reads(head, attempt)
                        attempt.open(head)
                        body = head.iter_bytes() if "content-encoding" in head.headers else head.stream
                        for data in body:  # iter_raw() is slower than the stream itself
                            yield from attempt.feed(data)
                            if attempt.done:
                                break
                except Exception as failure:
                    attempt.fail(failure)
                yield from attempt.close()


class AsyncAutonomous(_Shared, llm.AsyncModel):  # type: ignore[misc]
    """A model of the service, as `llm.get_async_model` gives it."""

    async def execute(
        self, prompt: llm.Prompt, stream: bool, response: llm.AsyncResponse, conversation: llm.AsyncConversation | None
    ) -> AsyncGenerator[str | StreamEvent, None]:
        import asyncio

        exchange = Exchange(self, prompt, stream, response, conversation)
        del response, conversation  # see the weak reference in Exchange
        # This repeats the sync loop. A generator that both share would have to be closed by this one. But an event loop
        # that shuts down closes all async generators at once, and reports an error if one of them is closing another.
        with await async_client(exchange.proxy) as http:
            for attempt in exchange.attempts():
                if attempt.wait:
                    await asyncio.sleep(attempt.wait)
                try:
                    request = attempt.request()
                    if exchange.proxy.startswith("socks"):
                        request.extensions["trace"] = SocksHandshake(request).trace_async
                    head = await http.send(request, stream=True)
                    async with contextlib.aclosing(head):
                        limit_reads(head, attempt)
                        attempt.open(head)
                        body = head.aiter_bytes() if "content-encoding" in head.headers else head.stream
                        async for data in body:
                            for piece in attempt.feed(data):
                                yield piece
                            if attempt.done:
                                break
                except Exception as failure:
                    attempt.fail(failure)
                for piece in attempt.close():
                    yield piece


# --- The one command --------------------------------------------------------------------------------------------------


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
def check(model_ids: Iterable[str], timeout: float, options: Iterable[tuple[str, str]], json_: bool, raw: bool) -> None:
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
        # --timeout limits each whole answer, so the limit on silence need not.
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
    """An attempt that shows on standard error everything that is sent and received."""

    def request(self) -> httpx.Request:
        self.start, request = time.perf_counter(), super().request()
        messages = base64.b64decode(json.loads(request.content)["messages"])
        self.show(">", b"POST %b HTTP/1.1" % request.url.raw_path, *map(b": ".join, request.headers.raw))
        self.show(">", request.content, b"the messages in it: " + messages)
        return request

    def show(self, sign: str, *lines: bytes) -> None:
        for line in lines:
            click.echo(f"{time.perf_counter() - self.start:8.3f} s {sign} {repr(line)[2:-1]}", err=True)

    def open(self, head: httpx.Response) -> None:
        status = f"{head.http_version} {head.status_code} {head.reason_phrase}"
        self.show("<", status.encode(), *map(b": ".join, head.headers.raw))
        super().open(head)

    def feed(self, data: bytes) -> list[str | StreamEvent]:
        self.show("<", data)
        return super().feed(data)

    def close(self) -> list[str | StreamEvent]:
        end = reason_of(root_cause(self.failure)) if self.failure else "stopped reading" if self.done else "the end"
        self.show("!", end.encode())
        return super().close()


async def _check(
    services: list[ServiceModel], timeout: float, options: dict[str, Any], show: bool, raw: bool
) -> list[dict[str, Any]]:
    """Ask all models at once, or one by one if ``raw``. Show each row as soon as it is known, and return them all."""
    import asyncio

    urls = {service: endpoint_url(service.endpoint) for service in services}

    async def ask(service: ServiceModel) -> dict[str, Any]:
        row: dict[str, Any] = {"model": service.model_id, "endpoint": service.endpoint, "ok": False}
        start, model = time.perf_counter(), AsyncAutonomous(service)
        model.attempts, model.attempt_type = 1, ShownAttempt if raw else Attempt

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
            row["error"] = late.for_user(urls[service], checking=True).message
        if show:
            result = f"ok, {row['seconds']:.2f} s" if row["ok"] else row["error"]
            row_text = f"{service.model_id:<21} : {service.endpoint:<11} : {result}"
            encoding = sys.stdout.encoding or "utf-8"  # a code page, on some systems, which lacks most characters
            click.echo(row_text.encode(encoding, "backslashreplace").decode(encoding))
        return row

    if show and sys.stderr.isatty():
        click.echo(f"Asking {urls[services[0]].netloc.decode()}, for up to {timeout:g} s per model ...", err=True)
    return [await ask(service) for service in urls] if raw else list(await asyncio.gather(*map(ask, urls)))
