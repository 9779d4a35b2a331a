"""Ordinary things: answers cut short, pictures, proxies, certificates, and words of errors.

They are in the order in which the kinds of faults were reported.
"""

from __future__ import annotations

import asyncio
import json
import re
import ssl
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import certifi
import httpx
import llm
import pytest
from conftest import CLEO, DOG, NOW_TAG, PNG, STOP, Ask, Chain, Start, ask_async, ask_sync, finish, invoke, run, texts
from llm.parts import AttachmentPart, Message, ReasoningPart, TextPart, ToolResultPart, assistant, system, user
from loopback import DONE, ENDPOINTS, Loopback, delta, event, say
from proxies import PEM, TESTS, OddProxy, Proxy, refuse, until
from pytest_httpx import HTTPXMock

import llm_autonomous

LLAMA, VISION = "autonomous-llama", "autonomous-vision"
TOOLS: dict[str, Any] = {"tools": [llm.Tool("now")]}


def picture(type: str | None = "image/png", **source: Any) -> llm.Attachment:
    return llm.Attachment(type=type, **(source or {"content": PNG}))


def showing(text: str, *pictures: llm.Attachment, role: str = "user") -> Message:
    return Message(role=role, parts=[TextPart(text), *(AttachmentPart(each) for each in pictures)])


def images(server: Loopback) -> list[tuple[str, str]]:
    """The pictures that the server was last sent, each with the role of its message and its URL without the data."""
    lists = [(each["role"], each["content"]) for each in server.last.messages if isinstance(each["content"], list)]
    parts = [(role, part) for role, parts in lists for part in parts if part["type"] == "image_url"]
    return [(role, part["image_url"]["url"].partition(";")[0]) for role, part in parts]


def ended(text: str, reason: str, stream: bool = True) -> Any:
    """An answer with this finish reason."""
    if stream:
        return say([event(delta(text)), event(delta(finish_reason=reason)), DONE])
    return say([json.dumps({"choices": [{"message": {"content": text}, "finish_reason": reason}]}).encode()])


# The limit of an answer


CUT_SHORT = [
    (TOOLS, '<tool_call>{"name": "now", "argum', "length"),
    (TOOLS, "<tool_call>\n[{", "MAX_TOKENS"),
    (TOOLS, '{"name": "now", "arguments": {', "model_context_window_exceeded"),
    ({"schema": DOG}, '{"name": "Cl', "max_output_tokens"),
    ({"schema": DOG}, "```json\n{", "FINISH_REASON_MAX_TOKENS"),
    ({"schema": DOG}, "Let me think about dogs", "token_limit_reached"),
]


@pytest.mark.parametrize("stream", [True, False], ids=["streamed", "whole"])
@pytest.mark.parametrize(("settings", "written", "reason"), CUT_SHORT)
def test_that_the_limit_cut_the_answer_short_comes_first(
    ask: Ask, server: Loopback, caplog: Any, settings: dict[str, Any], written: str, reason: str, stream: bool
) -> None:
    """The user reads it before what is wrong with the content, and the model is asked for a shorter answer.

    If the content is whole, it is the answer, with a warning.
    """
    problem, whole = ("tool call cannot be", NOW_TAG) if "tools" in settings else ("the answer does not match", CLEO)
    server.answer = ended(written, reason, stream)
    words = rf"cut short because it reached the model's limit \(finish reason: {reason}\): .*{problem}"
    assert re.search(words, ask(stream=stream, **settings).line)
    asked = server.last.messages[-1]["content"]
    assert asked.startswith("Your answer was cut short because it reached your length limit. Write a shorter one. ")
    assert caplog.messages == []
    server.answer = ended(whole, reason, stream)
    assert ask(stream=stream, **settings).error is None
    assert caplog.messages == [f"the answer may be cut short: it reached the model's limit (finish reason: {reason})"]


# Pictures


BESIDE: list[tuple[dict[str, Any], str]] = [
    ({"system": "Be brief"}, "Be brief\n\nSee"),
    ({"system_fragments": ["Be brief", "and kind"]}, "Be brief\n"),
    ({"schema": DOG}, "Reply with a JSON value"),
    ({"system": "Be brief", **TOOLS}, "Be brief\n\nYou can use these tools"),
]


@pytest.mark.parametrize(("settings", "begins"), BESIDE, ids=["system", "fragments", "schema", "tools"])
def test_beside_a_picture_the_system_text_is_the_users(
    ask: Ask, server: Loopback, settings: dict[str, Any], begins: str
) -> None:
    """Llama 3.2 Vision's own chat template refuses a system message beside a picture; without one, nothing changes."""
    server.answer = texts(CLEO)
    ask("See", VISION, attachments=[picture()], **settings)
    [message] = server.last.messages
    text = message["content"][0]["text"]
    assert (message["role"], text.startswith(begins), text.endswith("\n\nSee")) == ("user", True, True)
    assert images(server) == [("user", "data:image/png")]
    ask("See", VISION, **settings)
    first, second = server.last.messages
    assert first == {"role": "system", "content": text.removesuffix("\n\nSee")}
    assert second == {"role": "user", "content": "See"}


@pytest.mark.parametrize(
    ("before", "first"),
    [
        ([user("hi"), assistant("ho")], "Be brief\n\nhi"),
        ([assistant("ho")], "Be brief\n\nSee"),
        ([user("a"), system("And kind")], "Be brief\n\nAnd kind\n\na"),
        ([showing("", picture()), assistant("ho")], "Be brief"),
    ],
)
def test_system_text_goes_to_the_first_message_of_the_user(
    ask: Ask, server: Loopback, before: list[Message], first: str
) -> None:
    """All of it goes there, whichever message has the picture."""
    ask(None, VISION, messages=[system("Be brief"), *before, showing("See", picture())])
    assert "system" not in [message["role"] for message in server.last.messages]
    content = next(message["content"] for message in server.last.messages if message["role"] == "user")
    assert (content if isinstance(content, str) else content[0]["text"]) == first


@pytest.mark.parametrize("role", ["assistant", "system"])
@pytest.mark.parametrize(
    "source", [{"content": PNG}, {"url": "https://127.0.0.1:1/cat.gif"}, {"path": str(TESTS / "picture.png")}]
)
def test_pictures_go_under_user_alone(ask: Ask, server: Loopback, role: str, source: dict[str, Any]) -> None:
    """What the assistant or a system message shows is a note, in this turn and in later ones."""
    message = showing("Look", picture(**source), role=role)
    assert ask(None, VISION, messages=[user("hi"), message, user("And this?")]).text
    assert server.last.messages[1] == {"role": role, "content": "Look\n[image/png attachment, not shown to this model]"}
    assert ask(None, VISION, messages=[user("hi"), message, showing("And this?", picture())]).text
    assert images(server) == [("user", "data:image/png")]


SYNONYMS = [("image/jpg", "jpeg"), ("image/pjpeg", "jpeg"), ("image/JPG", "jpeg"), ("image/x-png", "png")]
SYNONYMS += [("IMAGE/JPEG", "jpeg"), ("image/png; charset=binary", "png")]


@pytest.mark.parametrize(("kind", "sent"), SYNONYMS)
def test_other_names_of_a_type_are_sent(ask: Ask, server: Loopback, tmp_path: Path, kind: str, sent: str) -> None:
    """Browsers, cameras and servers write them, for files, bytes, URLs and what tools attach."""
    path, url = tmp_path / "picture", "http://127.0.0.1:1/cat"
    path.write_bytes(PNG)
    attached = ToolResultPart("draw", "done", attachments=[picture(kind), picture(kind, url=url)])
    new = [showing("See", picture(kind, path=str(path)), picture(kind, url=url)), Message("tool", [attached])]
    assert ask(None, VISION, messages=new).text
    assert images(server) == [("user", f"data:image/{sent}"), ("user", url)] * 2
    if kind.islower() and " " not in kind:  # or `llm` refuses it
        assert ask("See", VISION, attachments=[picture(kind)]).text
        assert images(server) == [("user", f"data:image/{sent}")]


@pytest.mark.parametrize("kind", ["image/png", None], ids=["typed", "untyped"])
@pytest.mark.parametrize(
    "path", ["gone.png", "", "file/below.png", "file"], ids=["gone", "directory", "below a file", "empty"]
)
def test_a_new_picture_that_cannot_be_read_is_an_error(
    ask: Ask, server: Loopback, caplog: Any, tmp_path: Path, path: str, kind: str | None
) -> None:
    """Nothing is sent. In the history it is a note to the model and a warning to the user."""
    (tmp_path / "file").touch()
    path = str(tmp_path / path)
    new = showing("See", picture(kind, path=path))
    words = rf"cannot read the attachment {re.escape(path)}: [^:]+; the prompt was not sent"
    assert re.fullmatch(words, ask(None, VISION, messages=[new]).line)
    if kind:  # without one, `llm` refuses it
        assert re.fullmatch(words, ask("See", VISION, attachments=[picture(kind, path=path)]).line)
    assert (server.requests, caplog.messages) == ([], [])
    assert ask(None, VISION, messages=[new, assistant("A cat"), user("Sure?")]).text
    assert server.last.messages[0]["content"] == f"See\n[{kind or 'file'} attachment, not shown to this model]"
    assert ["can no longer be read" in message for message in caplog.messages] == [True]


# Proxies and certificates


UNREADABLE = ["::1/128", "fd07:b51a:cc66:f0::/64", "[::1]", "127.0.0.1:*", "fe80::/10,10.0.0.0/8:80", "a:b:c"]


@pytest.mark.parametrize("entry", UNREADABLE)
def test_an_entry_of_no_proxy_that_is_no_host_stops_nothing(
    ask: Ask, server: Loopback, monkeypatch: pytest.MonkeyPatch, entry: str
) -> None:
    """Prompts go out, through the proxy if there is one, unless another entry names the host."""
    monkeypatch.setenv("NO_PROXY", entry)
    assert ask().text
    with Proxy() as proxy:
        monkeypatch.setenv("ALL_PROXY", proxy.url)
        monkeypatch.setenv("NO_PROXY", f"{entry},127.0.0.1")
        assert (ask().error, proxy.targets) == (None, [])
        monkeypatch.setenv("NO_PROXY", entry)
        monkeypatch.setenv("AUTONOMOUS_BASE_URL", f"http://service.test:{server.port}")
        assert (ask().error, proxy.targets) == (None, [f"service.test:{server.port}"])


@pytest.mark.parametrize("entry", ["[::1]", "[::1]:1", "::1,fd00::/8"])
def test_no_proxy_names_ipv6_hosts_with_and_without_brackets(
    ask: Ask, monkeypatch: pytest.MonkeyPatch, no_backoff: None, entry: str
) -> None:
    """A proxy that is not to be used is not named either, nor is its password."""
    monkeypatch.setenv("AUTONOMOUS_BASE_URL", "http://[::1]:1")
    monkeypatch.setenv("HTTP_PROXY", "http://user:hunter2@127.0.0.1:1")
    line = ask().line
    assert ("cannot connect through the proxy 127.0.0.1:1: " in line, "hunter2" in line) == (True, False)
    monkeypatch.setenv("NO_PROXY", entry)
    assert ask().line.startswith("[::1]:1: cannot connect: ")


# Both are for 127.0.0.1, and are their own authority: the one was valid in 1970, and the other will be in 2100.
EXPIRED, NOT_YET_VALID = TESTS / "expired.pem", TESTS / "not_yet_valid.pem"
CERTIFICATES = [
    (EXPIRED, "127.0.0.1", "certificate has expired. Only the owner of the server can renew it", "SSL_CERT_FILE"),
    (NOT_YET_VALID, "127.0.0.1", "is not yet valid. Check the date and time of this computer", "SSL_CERT_FILE"),
    (PEM, "localhost", "certificate is not valid for 'localhost'", "SSL_CERT_FILE"),
    (None, "127.0.0.1", "If a company proxy inspects TLS, set SSL_CERT_FILE", "date and time"),
]


@pytest.mark.parametrize(("file", "host", "words", "missing"), CERTIFICATES)
def test_advice_fits_what_is_wrong_with_a_certificate(
    ask: Ask, monkeypatch: pytest.MonkeyPatch, file: Path | None, host: str, words: str, missing: str
) -> None:
    """SSL_CERT_FILE helps only if the issuer is unknown, and sentences end with one full stop."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(file or PEM)
    if file:
        monkeypatch.setenv("SSL_CERT_FILE", str(file))
    with Loopback(tls=context) as server:
        monkeypatch.setenv("AUTONOMOUS_BASE_URL", f"https://{host}:{server.port}")
        lines = [ask().line, invoke("autonomous", "check", "-m", LLAMA)[0]]
    for line in lines:
        assert (words in line, missing in line, ".." in line) == (True, False, False), line


BLAMED = [("SSLKEYLOGFILE", "/no/such/keys"), ("SSLKEYLOGFILE", str(TESTS)), ("SSL_CERT_FILE", __file__)]


@pytest.mark.parametrize(("variable", "value"), [*BLAMED, (None, certifi.where())])
def test_a_variable_is_blamed_only_if_it_is_set(
    ask: Ask, server: Loopback, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, variable: str | None, value: str
) -> None:
    """What cannot be loaded is named with its path, which may be that of certifi's bundle."""

    def fail(*args: Any, **kwargs: Any) -> None:
        raise FileNotFoundError(2, "No such file or directory")  # as `ssl` has it, without the path

    monkeypatch.setenv(variable or "SSLKEYLOGFILE", value if variable else str(tmp_path / "keys.log"))
    if not variable:
        monkeypatch.setattr(ssl.SSLContext, "load_verify_locations", fail)
    named = f", which {variable} names" if variable else ""
    assert re.fullmatch(rf"cannot load {re.escape(value + named)}: \S.+", ask().line)
    assert server.requests == []


@pytest.mark.parametrize("words", [b"", b"\x16\x03\x03", b"\x16\x03\x03\x00\x7a\x02"], ids=bytes.hex)
def test_a_connection_closed_in_the_tls_handshake_is_told_in_words(
    ask: Ask, monkeypatch: pytest.MonkeyPatch, no_backoff: None, words: bytes
) -> None:
    """Prompts and the check say it in the same way."""
    with OddProxy(words, closes=True) as server:
        monkeypatch.setenv("AUTONOMOUS_BASE_URL", f"https://127.0.0.1:{server.port}")
        lines = [ask().line, *invoke("autonomous", "check")[0].splitlines()]
    told = ["cannot connect: the connection was closed during the TLS handshake" in line for line in lines]
    assert told == [True] * 6, lines


WORDLESS: list[Any] = [httpx.ConnectError, httpx.RemoteProtocolError, httpx.DecodingError, httpx.ProxyError]
WORDLESS += [httpx.UnsupportedProtocol, RuntimeError, KeyError]


@pytest.mark.parametrize("kind", WORDLESS)
def test_no_reason_is_the_name_of_a_class(ask: Ask, httpx_mock: HTTPXMock, no_backoff: None, kind: Any) -> None:
    """An exception without words gets some, and no line ends with a colon."""
    httpx_mock.add_exception(kind(""), is_reusable=True)
    line = ask().line
    assert not re.search(r"[a-z](Error|Protocol)\b|: *(\(|\.|\Z)|  ", line), line


# Retry-After


FAR, PAST = "Wed, 21 Oct 2099 07:28:00 GMT", "Wed, 21 Oct 2015 07:28:00 GMT"
RETRY_AFTER = [("0.5", 0.5), ("2.25", 2.25), ("9.75, 2", 9.75), ("1,3 , 2", 3.0), (PAST, 0.0), (f"{PAST}, 5", 5.0)]
TOO_LONG = ["59.5", "3600.0", "2814, 2", "2, 2814", "10.01", "1.5, 120.25", f"2, {FAR}"]


@pytest.mark.parametrize(("asked", "wait"), [*RETRY_AFTER, *((asked, None) for asked in TOO_LONG)])
def test_of_several_values_of_retry_after_the_largest_counts(
    ask: Ask, server: Loopback, sleeps: list[float], asked: str, wait: float | None
) -> None:
    """Seconds may have a fraction. A server that asks for too many is not asked again."""
    server.answers += [refuse(503, retry_after=asked)]
    error = ask().error
    assert (sleeps, len(server.requests)) == ([wait] if wait else [], 1 if error else 2)
    assert bool(error and re.search(r"; it asks to wait \d+ s\Z", error.message)) == (wait is None)


# Screens, and connections


@pytest.mark.parametrize(
    ("encoding", "words", "raw"),
    [
        ("cp1252", "Сервер занят", []),
        ("ascii", "過負荷 🐘" + "x" * 999, ["--raw"]),
    ],
)
def test_check_shows_all_rows_whatever_the_screen_can_show(
    start: Start, server: Loopback, encoding: str, words: str, raw: list[str]
) -> None:
    """What cannot be written is escaped."""
    server.answer = say([json.dumps({"error": words}, ensure_ascii=False).encode()], status="503 Busy")
    command = ["llm", "autonomous", "check", *raw]
    stdout, stderr, code = finish(start(*command, url=server.url, PYTHONIOENCODING=encoding))
    assert sorted(line.split()[0] for line in stdout.splitlines()) == sorted(f"autonomous-{name}" for name in ENDPOINTS)
    assert (code, "Traceback" in stderr, len(server.requests)) == (1, False, 5)
    assert stdout.count(words.encode(encoding, "backslashreplace").decode(encoding)[:200]) == 5


@pytest.mark.parametrize("ask_one", [ask_sync, ask_async], ids=["sync", "async"])
def test_clients_that_no_prompt_needs_are_closed(
    ask_one: Any, server: Loopback, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of many proxies some tens stay connected and, after a while without prompts, only the next one."""
    clock = SimpleNamespace(**{**vars(time), "monotonic": lambda: time.monotonic() + clock.ahead}, ahead=0.0)

    async def prompt(proxy: str) -> None:
        answer = ask_one("hi", proxy=proxy)
        assert (await answer if asyncio.iscoroutine(answer) else answer).text

    async def prompts(proxy: str) -> None:
        for number in range(50):
            await prompt(f"{proxy}/{number}")
        assert until(lambda: 20 < len(server.open) < 40), server.open
        clock.ahead = llm_autonomous.KEEPALIVE + 1
        await prompt(f"{proxy}/last")
        assert until(lambda: len(server.open) == 1), server.open

    monkeypatch.setattr(llm_autonomous, "time", clock)
    with Proxy() as proxy:
        asyncio.run(prompts(proxy.url))


# Replies


EMPTY_DELTAS: list[Any] = [
    {"content": [{"type": "thinking", "thinking": [], "closed": True}]},
    {"content": [{"type": "thinking", "thinking": None, "signature": ""}, {"type": "text"}]},
    {"content": [{"type": "reference", "reference_ids": []}]},
    {"reasoning": [{"type": "summary"}]},
    {"content": {"type": "text"}},
]


@pytest.mark.parametrize("empty", EMPTY_DELTAS, ids=json.dumps)
def test_what_holds_nothing_but_its_type_is_no_part_of_the_answer(
    ask: Ask, server: Loopback, caplog: Any, empty: dict[str, Any]
) -> None:
    """It is passed over without a word, before the text and after it."""
    chunk, text = event({"choices": [{"index": 0, "delta": empty}]}), event(delta("fine"))
    for pieces in ([chunk, text, STOP], [text, chunk, STOP]):
        server.answer = say(pieces)
        assert (ask().text, caplog.messages) == ("fine", [])


THOUGHT = [{"type": "thinking", "thinking": [{"type": "text", "text": "a\ud83d"}]}]


@pytest.mark.parametrize(
    "contents", [[THOUGHT, "\ude00Hi"], [[*THOUGHT, {"type": "text", "text": "\ude00Hi"}]]], ids=["apart", "together"]
)
def test_thinking_of_mistral_is_reasoning(chain: Chain, server: Loopback, contents: list[Any]) -> None:
    """Half a character at its end stays there, and is not put before the text that follows."""
    server.answer = say([*(event({"choices": [{"delta": {"content": each}}]}) for each in contents), STOP])
    chained = chain()
    assert chained.text == "\ufffdHi"
    parts = [part for message in chained.messages[0] for part in message.parts]
    assert [part.text for part in parts if isinstance(part, ReasoningPart)] == ["a\ufffd"]


# Blanks, no proxy, and no asyncio


def test_a_line_of_blanks_does_not_end_a_chat(server: Loopback) -> None:
    """It is sent as it is, and the session goes on."""
    lines = [" ", "\t \t", "\u3000", "\xa0", "hi"]
    run("chat", "-m", LLAMA, typed="\n".join([*lines, "quit\n"]))
    assert [request.messages[-1]["content"] for request in server.requests] == lines


@pytest.mark.parametrize("variable", ["HTTP_PROXY", "ALL_PROXY", None])
@pytest.mark.parametrize("command", [["hi", "-n"], ["hi", "-n", "--async"], ["autonomous", "check"]])
def test_an_empty_proxy_is_no_proxy(
    server: Loopback, monkeypatch: pytest.MonkeyPatch, user_path: Path, variable: str | None, command: list[str]
) -> None:
    """``-o proxy ''`` overrides the environment and the default of `llm models options set`, as the help says."""
    if variable:
        monkeypatch.setenv(variable, "http://127.0.0.1:1")
    else:
        invoke("models", "options", "set", LLAMA, "proxy", "http://127.0.0.1:1")
    run(*command, "-m", LLAMA, "-o", "proxy", "")
    assert len(server.requests) == 1


def test_an_async_prompt_without_asyncio_says_so(server: Loopback) -> None:
    """Under trio, for instance, which runs coroutines as this test does."""
    reading = llm.get_async_model(LLAMA).prompt("hi", stream=False).text()
    with pytest.raises(llm_autonomous.AutonomousError, match="need an event loop of asyncio"):
        reading.send(None)
    assert server.requests == []
