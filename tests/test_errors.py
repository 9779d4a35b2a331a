"""What goes wrong, row by row: each fault is one `AutonomousError`, in one line that says what happened."""

from __future__ import annotations

import asyncio
import functools
import json
import logging
import pickle
import socket
import sys
import threading
from collections.abc import Callable
from typing import Any

import click
import llm
import pytest
import sqlite_utils
from click.testing import CliRunner
from conftest import DEADLINE, Ask, Start, finish, invoke
from llm.migrations import migrate
from loopback import DONE, Answer, Connection, Loopback, Request, delta, event, say
from proxies import free_port, tls

from llm_autonomous import BASE_URL, AutonomousError

SERVICE = BASE_URL.removeprefix("https://")

pytestmark = pytest.mark.usefixtures("no_backoff")


def whole(body: object, status: str = "200 OK", headers: dict[str, str] | None = None) -> Answer:
    """A complete reply: bytes as they are, anything else as JSON."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    return lambda request, connection: connection.whole(data, status, headers)


def raw(data: bytes) -> Answer:
    """These very bytes and the end of the connection, be they HTTP or not."""

    async def answer(request: Request, connection: Connection) -> None:
        await connection.raw(data)
        await connection.drop()

    return answer


async def stall(request: Request, connection: Connection) -> None:
    await connection.stall()


async def drop(request: Request, connection: Connection) -> None:
    await connection.drop()


@pytest.fixture
def service(monkeypatch: pytest.MonkeyPatch) -> None:
    """The service's name means 127.0.0.1, and is the only one there is."""
    lookup = socket.getaddrinfo

    def getaddrinfo(host: Any, *args: Any, **kwargs: Any) -> Any:
        assert host in (SERVICE, SERVICE.encode(), "127.0.0.1", b"127.0.0.1")
        return lookup("127.0.0.1", *args, **kwargs)

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)


# No connection


def test_name_that_does_not_resolve(ask: Ask, monkeypatch: pytest.MonkeyPatch) -> None:
    """A DNS failure names the host, and says what the resolver says."""
    monkeypatch.setenv("AUTONOMOUS_BASE_URL", "http://nosuchhost.invalid:8000")
    line = ask().line
    assert line.startswith("nosuchhost.invalid:8000: cannot connect: ")
    assert "name" in line.partition("cannot connect: ")[2].lower()


def test_connection_refused(ask: Ask, monkeypatch: pytest.MonkeyPatch) -> None:
    """A refused connection names the host and the port."""
    monkeypatch.setenv("AUTONOMOUS_BASE_URL", "http://127.0.0.1:1")
    assert ask().line == "127.0.0.1:1: cannot connect: Connection refused (3 attempts)"


def test_certificate_that_does_not_verify(ask: Ask, monkeypatch: pytest.MonkeyPatch) -> None:
    """A certificate that nobody vouches for ends the prompt before it is sent, and the line says what may help."""
    with Loopback(tls=tls()) as server:
        monkeypatch.setenv("AUTONOMOUS_BASE_URL", server.url)
        line = ask().line
        assert line.startswith(f"127.0.0.1:{server.port}: its certificate cannot be verified: ")
        assert "self-signed certificate" in line.replace("self signed", "self-signed")
        assert "SSL_CERT_FILE" in line
        assert server.requests == []


def test_server_without_tls(ask: Ask, monkeypatch: pytest.MonkeyPatch) -> None:
    """A handshake that fails for another reason says so in OpenSSL's words."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def answer_in_plain_words() -> None:
            for _ in range(3):
                connection, _ = listener.accept()
                with connection:
                    connection.recv(10_000)
                    connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")

        thread = threading.Thread(target=answer_in_plain_words)
        thread.start()
        host = f"127.0.0.1:{listener.getsockname()[1]}"
        monkeypatch.setenv("AUTONOMOUS_BASE_URL", f"https://{host}")
        line = ask().line
        thread.join()
    assert line.startswith(f"{host}: cannot connect: ")
    assert "SSL" in line


def test_connection_not_made_in_time(ask: Ask, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the handshake gets no reply, the line says how long it was waited for."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        host = f"127.0.0.1:{listener.getsockname()[1]}"
        monkeypatch.setenv("AUTONOMOUS_BASE_URL", f"https://{host}")
        line = ask(options={"timeout": 0.05}).line
    assert line == f"{host}: cannot connect: no reply within 0.05 s (3 attempts)"


def test_silence(ask: Ask, server: Loopback) -> None:
    """A server that takes the prompt and says nothing is given up on, and the line says how to wait longer."""
    server.answer = stall
    line = ask(options={"timeout": 0.1}).line
    assert line == f"127.0.0.1:{server.port}: silent for 0.1 s; -o timeout sets the limit"
    assert len(server.requests) == 1


def test_connection_dropped_before_any_answer(ask: Ask, server: Loopback) -> None:
    """A connection that is closed without a reply was lost."""
    server.answer = drop
    line = ask().line
    assert line == f"127.0.0.1:{server.port}: the connection was lost before any answer (3 attempts)"


def test_host_name_that_cannot_be_looked_up(ask: Ask, monkeypatch: pytest.MonkeyPatch) -> None:
    """What Python raises about the name itself is one line too."""
    name = "a" * 64 + ".invalid"
    monkeypatch.setenv("AUTONOMOUS_BASE_URL", f"http://{name}")
    assert ask().line.startswith(f"{name}: ")


@pytest.mark.parametrize("fault", ["DNS", "refused", "certificate", "silence", "dropped", "503", "page", "empty"])
@pytest.mark.usefixtures("service")
def test_service_itself_is_often_down(ask: Ask, fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the service itself cannot be reached or does not answer, the line says that this is usual."""
    answers = {
        "503": whole(b"", "503 Service Unavailable"),
        "page": whole(b"<html>"),
        "silence": stall,
        "empty": say([]),
    }
    with Loopback(answers.get(fault, drop), tls() if fault == "certificate" else None) as server:
        port = free_port() if fault == "refused" else server.port
        scheme = "https" if fault == "certificate" else "http"
        monkeypatch.setenv("AUTONOMOUS_BASE_URL", f"{scheme}://{SERVICE}:{port}")
        if fault == "DNS":
            monkeypatch.setattr(socket, "getaddrinfo", no_address)
        line = ask(options={"timeout": 0.1}).line
    assert line.startswith(f"{SERVICE}:{port}: ")
    assert "The service is often down; `llm autonomous check` shows which models answer" in line


def no_address(*args: Any, **kwargs: Any) -> Any:
    raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")


@pytest.mark.parametrize("fault", [raw(b""), stall, whole(b"", "503 Service Unavailable"), whole(b"<html>"), say([])])
def test_another_host_is_not_the_service(ask: Ask, server: Loopback, fault: Answer) -> None:
    """Of a server that is not the service, nothing of the kind is said."""
    server.answer = fault
    assert "often down" not in ask(options={"timeout": 0.1}).line


# A status that is an error


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({"error": {"message": "no luck", "type": "server_error"}}, "no luck"),
        ({"error": "no luck"}, "no luck"),
        ({"message": "no luck"}, "no luck"),
        ({"detail": "no luck"}, "no luck"),
        ({"error": True, "message": "no luck"}, "no luck"),
        ({"error": {"message": None}, "detail": "no luck"}, '{"message": null}: no luck'),
        ({"error": None, "message": "", "detail": "no luck"}, "no luck"),
        ({"detail": [{"msg": "no luck"}]}, '[{"msg": "no luck"}]'),
        ({"error": {"code": 7}}, '{"code": 7}'),
        ({"code": 7}, '{"code": 7}'),
        ("no luck", "no luck"),
        (b"no luck\n", "no luck"),
        (b"\xef\xbb\xbf no\nluck", "no luck"),
        (b'{"error": "no luck', '{"error": "no luck'),
        (b"no l\xffck", "no l\ufffdck"),
        (b"[" * 60_000, "[" * 299 + "…"),
    ],
    ids=lambda value: str(value)[:40],
)
@pytest.mark.parametrize("status", ["400 Bad Request", "500 Internal Server Error"])
def test_status_and_message(ask: Ask, server: Loopback, status: str, body: object, words: str) -> None:
    """The line has the status, the reason phrase, and the message out of the body in any of its forms."""
    server.answer = whole(body, status)
    attempts = " (3 attempts)" if status.startswith("5") else ""
    assert ask().line == f"127.0.0.1:{server.port}: HTTP {status}: {words}{attempts}"


@pytest.mark.parametrize("status", ["401 Unauthorized", "404 Not Found", "418 I'm a teapot", "520 Origin Is Down"])
def test_status_without_body(ask: Ask, server: Loopback, status: str) -> None:
    """Without a body, the status and the server's own reason phrase are all there is to say."""
    server.answer = whole(b"", status)
    assert ask().line == f"127.0.0.1:{server.port}: HTTP {status}"


def test_error_body_that_is_cut_off(ask: Ask, server: Loopback) -> None:
    """A connection that is lost within the body of an error leaves what has come of it."""
    server.answer = raw(b"HTTP/1.1 400 Bad Request\r\nContent-Length: 100\r\n\r\nno luck")
    assert ask().line == f"127.0.0.1:{server.port}: HTTP 400 Bad Request: no luck"


def test_error_body_without_end(ask: Ask, server: Loopback) -> None:
    """Of an error body 64 KiB are read at most, and the connection is closed over the rest."""
    sent = 0

    async def endless(request: Request, connection: Connection) -> None:
        nonlocal sent
        await connection.head("400 Bad Request")
        while sent < 30_000_000:
            await connection.send(b"no luck " * 1000)
            sent += 8000
        await connection.end()

    server.answer = endless
    assert "HTTP 400 Bad Request: no luck no luck" in ask().line
    assert sent < 30_000_000  # what the sockets hold between the two, and no more


# A web page


PAGE = b"""<!DOCTYPE html>
<html lang=en>
<head><title>
  Just a  moment...
</title></head>

<body>data: {}</body></html>
"""


@pytest.mark.parametrize("status", ["403 Forbidden", "503 Service Unavailable"])
@pytest.mark.parametrize("page", [PAGE, b"\xef\xbb\xbf\n " + PAGE.replace(b"title>", b"TITLE>")], ids=["plain", "odd"])
def test_page_with_an_error_status(ask: Ask, server: Loopback, status: str, page: bytes) -> None:
    """A proxy's page is not quoted but named: that it is a web page, its status, and its title."""
    server.answer = whole(page, status)
    expected = f"127.0.0.1:{server.port}: HTTP {status}: answered with a web page titled: Just a moment..."
    assert ask().line.removesuffix(" (3 attempts)") == expected


@pytest.mark.parametrize("content_type", ["text/html", "application/json", "text/event-stream"])
def test_page_with_status_200(ask: Ask, server: Loopback, content_type: str) -> None:
    """A page in place of an answer is known by its text, whatever its type."""
    server.answer = whole(PAGE, headers={"content-type": content_type})
    line = ask().line
    assert line == f"127.0.0.1:{server.port}: answered with a web page titled: Just a moment..."


@pytest.mark.parametrize(
    ("page", "title"),
    [
        (b"<html><title>Sorry &amp; goodbye &#8211; &eacute;</title>", "titled: Sorry & goodbye \u2013 é"),
        (b"<html><head><title lang='en'>Down</title>", "titled: Down"),
        (b"<html><body><p>Down</p> for now</body></html>", "without a title: Down for now"),
        (b"<html><title></title></html>", "without a title"),
        (b"<html><title>Do", "titled: Do"),
        ("<html>\u0130\u0130\u0130<title>Down</title>".encode(), "titled: Down"),
        (b"<html><title", "without a title"),
        (b"<?xml version='1.0'?><html><title>Down</title></html>", "titled: Down"),
    ],
)
@pytest.mark.parametrize("status", ["200 OK", "403 Forbidden"])
def test_title_of_a_page(ask: Ask, server: Loopback, status: str, page: bytes, title: str) -> None:
    """The title is shown as a browser would show it; not every page has one."""
    server.answer = whole(page, status)
    assert ask().line.endswith(f"answered with a web page {title}")


# Redirects


@pytest.mark.parametrize("status", ["301 Moved Permanently", "302 Found", "303 See Other", "307 T", "308 P"])
def test_redirect_is_not_followed(ask: Ask, server: Loopback, status: str) -> None:
    """A redirect is an error that says where to: a prompt goes to no host that the user did not name."""
    with Loopback() as elsewhere:
        server.answer = whole({"error": "moved"}, status, {"location": f"{elsewhere.url}/api"})
        line = ask().line
        assert elsewhere.connections == 0
    assert f"127.0.0.1:{server.port}: HTTP {status}: redirects to {elsewhere.url}/api, which is not followed" in line
    assert "AUTONOMOUS_BASE_URL" in line
    assert len(server.requests) == 1


def test_redirect_on_the_same_host_is_not_followed(ask: Ask, server: Loopback) -> None:
    """Neither is one to another path, nor one to nowhere."""
    server.answers.append(whole(b"", "307 Temporary Redirect", {"location": "/login"}))
    assert "redirects to /login" in ask().line
    server.answers.append(whole(b"", "304 Not Modified"))
    assert "redirects to nowhere" in ask().line
    assert len(server.requests) == 2


# A reply with status 200 that is none


@pytest.mark.parametrize("error", [{"message": "no luck", "code": 7}, "no luck"], ids=["object", "string"])
@pytest.mark.parametrize("framing", ["body", "stream"])
def test_error_in_place_of_an_answer(ask: Ask, server: Loopback, error: object, framing: str) -> None:
    """An ``error`` in a reply of status 200 is its message, in the body or in the stream."""
    server.answer = whole({"error": error}) if framing == "body" else say([event({"error": error}), DONE])
    assert ask().line == f"127.0.0.1:{server.port}: the service reports an error: no luck"
    assert len(server.requests) == 1


@pytest.mark.parametrize(
    "body",
    [b"Hello there", b"data: Hello there\n\n", b'{"answer": "Hello there"}', b'data: {"message": "Hello there"}\n\n'],
    ids=repr,
)
def test_reply_that_is_not_understood(ask: Ask, server: Loopback, body: bytes) -> None:
    """What is no answer in any dialect is shown, as far as it makes an excerpt."""
    server.answer = whole(body)
    assert body.decode().strip().removeprefix("data: ") in ask().line
    assert len(server.requests) == 1


@pytest.mark.parametrize(
    "answer",
    [
        whole(b""),
        whole(b"\r\n"),
        raw(b"HTTP/1.1 204 No Content\r\n\r\n"),
        say([]),
        say([DONE]),
        say([b": ping\n\n"]),
        say([event(delta()), DONE]),
        whole({"choices": []}),
        whole({"choices": [{"message": {"role": "assistant", "content": ""}}]}),
    ],
)
def test_nothing_in_the_reply(ask: Ask, server: Loopback, answer: Answer) -> None:
    """A reply without any text is an error and not an empty answer."""
    server.answer = answer
    assert ask().line.startswith(f"127.0.0.1:{server.port}: the answer was empty")


@pytest.mark.parametrize(
    "reply",
    [
        b"SSH-2.0-OpenSSH_9.6\r\n\r\n",
        b"HTTP/1.1 OK\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nbad header\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: many\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nX: " + b"x" * 200_000,
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nContent-Length: 4\r\n\r\nnope",
        b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip, gzip\r\nContent-Length: 4\r\n\r\nnope",
    ],
    ids=lambda reply: repr(reply[:60]),
)
def test_reply_that_is_malformed(ask: Ask, server: Loopback, reply: bytes) -> None:
    """What is no HTTP, or cannot be unpacked, was not understood; it is not asked for again."""
    server.answer = raw(reply)
    assert ask().line.startswith(f"127.0.0.1:{server.port}: the reply was not understood: ")
    assert len(server.requests) == 1


# A reply that fails in the middle


@pytest.fixture(params=["sync", "async"])
def watch(request: pytest.FixtureRequest) -> Callable[..., AutonomousError]:
    """``watch(seen, **options)`` prompts, calls ``seen`` with each piece of text as it comes, and gives the error."""

    def watch_sync(seen: Callable[[str], None], **options: Any) -> AutonomousError:
        try:
            for text in llm.get_model("autonomous-llama").prompt("hi", options=options):
                seen(text)
        except AutonomousError as error:
            return error
        raise AssertionError("no error")

    async def watch_async(seen: Callable[[str], None], **options: Any) -> AutonomousError:
        try:
            async for text in llm.get_async_model("autonomous-llama").prompt("hi", options=options):
                seen(text)
        except AutonomousError as error:
            return error
        raise AssertionError("no error")

    if request.param == "sync":
        return watch_sync
    return lambda *args, **options: asyncio.run(watch_async(*args, **options))


FAULTS: dict[str, tuple[Callable[[Connection], Any], str]] = {
    "dropped": (lambda connection: connection.drop(), "the answer is incomplete: the connection was lost"),
    "reset": (lambda connection: connection.drop(reset=True), "the answer is incomplete: the connection was lost"),
    "silent": (lambda connection: connection.stall(), "the answer is incomplete: silent for 1 s"),
    "malformed": (lambda connection: connection.raw(b"zz\r\n"), "the answer is incomplete: "),
    "cut": (lambda connection: connection.raw(b'8\r\ndata: {"\r\n0\r\n\r\n'), "the answer is incomplete"),
    "error": (lambda connection: connection.send(event({"error": "no luck"})), "reports an error: no luck"),
    "text": (lambda connection: connection.send(b"data: nonsense\n\n"), "not understood; it begins: nonsense"),
    "page": (lambda connection: connection.raw(b"f\r\n<title>x</title\r\n0\r\n\r\n"), "a web page titled: x"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_text_before_an_error_was_already_yielded(
    watch: Callable[..., AutonomousError], server: Loopback, fault: str
) -> None:
    """The reader has what arrived before the server fails, the line says what failed, and nothing is asked again."""
    fail, words = FAULTS[fault]
    read, texts, in_time = threading.Event(), [], []

    async def answer(request: Request, connection: Connection) -> None:
        await connection.head()
        await connection.send(event(delta("one ")))
        in_time.append(await asyncio.to_thread(read.wait, DEADLINE))
        await fail(connection)

    def seen(text: str) -> None:
        texts.append(text)
        read.set()

    server.answer = answer
    error = watch(seen, timeout=1 if fault == "silent" else 120)
    assert texts == ["one "]
    assert in_time == [True]
    assert error.message.startswith(f"127.0.0.1:{server.port}: ")
    assert words in error.message
    assert len(server.requests) == 1


def test_text_and_error_in_one_piece(ask: Ask, server: Loopback) -> None:
    """Text that comes in the very bytes that hold the error comes out before it."""
    server.answer = say([event(delta("one ")) + event(delta("two")) + event({"error": "no luck"})])
    answer = ask()
    assert "".join(answer.chunks) == "one two"
    assert answer.line.endswith("reports an error: no luck")


def test_body_shorter_than_promised(ask: Ask, server: Loopback) -> None:
    """A connection that ends before the length that its head promised was lost in the middle."""
    text = event(delta("one "))
    server.answer = raw(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n" + text)
    answer = ask()
    assert answer.chunks == ["one "]
    assert "the answer is incomplete: the connection was lost in the middle of the reply" in answer.line


@pytest.mark.parametrize("end", [DONE, event(delta(finish_reason="stop"))], ids=["done", "finish reason"])
def test_whole_answer_survives_its_connection(ask: Ask, server: Loopback, end: bytes) -> None:
    """Once the answer is whole, what becomes of the connection fails nothing."""
    server.answer = raw(b"HTTP/1.1 200 OK\r\nContent-Length: 9999\r\n\r\n" + event(delta("one")) + end)
    assert ask().text == "one"


# An empty prompt


@pytest.mark.parametrize("prompt", ["", " \n\t", None])
def test_empty_prompt(ask: Ask, server: Loopback, prompt: str | None) -> None:
    """A prompt without any text is an error before anything is sent."""
    assert ask(prompt).line == "the prompt is empty: nothing was sent"
    assert server.connections == 0


# The words of a server


HOSTILE = "\x1b]0;owned\x07\x1b[31mno\r\nluck\x9b1m\u2028\u202e\x00\x7f\ud800 " + "x" * 5000
HEADER = HOSTILE.encode("latin-1", "ignore").translate(None, b"\r\n\x00\x07\x7f").decode("latin-1")
PLACES: dict[str, Answer] = {
    "JSON": whole({"error": {"message": HOSTILE}}, "400 Bad Request"),
    "JSON without message": whole({"error": {HOSTILE: 1}}, "400 Bad Request"),
    "plain text": whole(HOSTILE.encode("utf-8", "replace"), "400 Bad Request"),
    "title": whole(f"<html><title>{HOSTILE}</title>".encode("utf-8", "replace"), "400 Bad Request"),
    "title of a 200 page": whole(f"<html><title>{HOSTILE}</title>".encode("utf-8", "replace")),
    "title in character references": whole(b"<html><title>&#27;[31mno &#x9b;1m luck" + b"&#120;" * 5000),
    "reason phrase": raw(f"HTTP/1.1 400 {HEADER}\r\n\r\n".encode("latin-1")),
    "location": whole(b"", "302 Found", {"location": HEADER}),
    "content encoding": whole(b"", headers={"content-encoding": f"br, {HEADER}"}),
    "status line": raw(HOSTILE.encode("utf-8", "replace") + b"\r\n\r\n"),
    "chunk header": raw(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n\x1b[31mno luck\r\n" + b"x" * 5000),
    "error in a stream": say([event({"error": HOSTILE})]),
    "error in a body": whole({"error": {"message": HOSTILE}}),
    "event": say([b"data: " + HOSTILE.replace("\r\n", " ").encode("utf-8", "replace") + b"\n\n"]),
    "JSON of no known shape": say([event(HOSTILE)]),
    "text in place of a stream": say([HOSTILE.replace("\r\n", " ").encode("utf-8", "replace")]),
    "finish reason": say([event(delta(finish_reason=HOSTILE))]),
}


@pytest.mark.parametrize("place", PLACES)
def test_words_of_a_server_are_printable(ask: Ask, server: Loopback, place: str) -> None:
    """Wherever they come from, they are one line of at most 300 characters without control characters."""
    server.answer = PLACES[place]
    line = ask().line  # which asserts that it is printable, and so has no line ends and no escapes
    assert line.startswith(f"127.0.0.1:{server.port}: ")
    assert len(line) < 600
    assert line.count("x") <= 310
    if place not in ("status line", "chunk header", "location"):  # where the words are httpx's own
        assert "no" in line
        assert "luck" in line


@pytest.mark.parametrize(("length", "shown"), [(300, "x" * 300), (301, "x" * 299 + "…"), (5000, "x" * 299 + "…")])
def test_words_of_a_server_are_at_most_300_characters(ask: Ask, server: Loopback, length: int, shown: str) -> None:
    """Longer words are cut, and marked as cut."""
    server.answer = whole({"error": "x" * length}, "400 Bad Request")
    assert ask().line == f"127.0.0.1:{server.port}: HTTP 400 Bad Request: {shown}"


ENVELOPES = {
    "half a character": {"model": "\ud83d", "id": "\ud83d"},
    "a number beyond SQLite": {"usage": {"prompt_tokens": 10**30, "completion_tokens": -(10**30)}, "created": 10**30},
    "no numbers": {"usage": {"prompt_tokens": "many", "completion_tokens": None, "x_details": []}, "model": 7},
    "no object": {"usage": "much", "created": {}},
    "not a number": {"usage": {"prompt_tokens": float("nan"), "x_details": {"y": float("inf")}}},
}


@pytest.mark.parametrize("envelope", ENVELOPES)
def test_whatever_comes_beside_the_text_can_be_logged(ask: Ask, server: Loopback, envelope: str) -> None:
    """An envelope of the wrong types fails neither the answer nor what `llm` does with it then."""
    server.answer = say([event(delta("one", finish_reason="stop", **ENVELOPES[envelope])), DONE])
    assert logged(ask()) == 1


@pytest.mark.parametrize("key", ["id", "model", "usage", "finish_reason"])
@pytest.mark.parametrize("brackets", ["[]", ('{"x_details":', "}")], ids=["lists", "objects"])
def test_deep_envelope_can_be_logged(ask: Ask, server: Loopback, key: str, brackets: tuple[str, str]) -> None:
    """Nor does one that is nested nearly as deep as Python can go."""
    deep = brackets[0] * 600 + "1" + brackets[1] * 600
    server.answer = whole(f'{{"{key}": {deep}, "choices": [{{"delta": {{"content": "one"}}}}]}}'.encode())
    assert logged(ask()) == 1


@functools.cache
def log() -> sqlite_utils.Database:
    """An empty log of `llm`, which it takes 0.1 s to make."""
    db = sqlite_utils.Database(memory=True)
    migrate(db)
    return db


def logged(answer: Any) -> int:
    """How many rows `llm` writes for an answer."""
    assert answer.text == "one"
    response = answer.response
    if isinstance(response, llm.AsyncResponse):
        response = asyncio.run(response.to_sync_response())
    db = sqlite_utils.Database(memory=True)
    try:
        log().conn.backup(db.conn)
        response.log_to_db(db)
        return db["turns" if db["turns"].exists() else "responses"].count  # "responses" before llm 0.36
    finally:
        db.close()


# Answers that may be cut short


LENGTH = "the answer may be cut short: it reached the model's limit (finish reason: length)"
NO_END = "the answer may be cut short: the stream ended without finish reason or [DONE]"
ENDS: dict[str, tuple[Answer, list[str]]] = {
    "length": (say([event(delta("one", finish_reason="length")), DONE]), [LENGTH]),
    "length at the top": (say([event({**delta("one"), "finish_reason": "length"})]), [LENGTH]),
    "length of a completion": (
        whole({"choices": [{"message": {"content": "one"}, "finish_reason": "length"}]}),
        [LENGTH],
    ),
    "no end": (say([event(delta("one"))]), [NO_END]),
    "stop": (say([event(delta("one", finish_reason="stop"))]), []),
    "done": (say([event(delta("one")), DONE]), []),
    "completion": (whole({"choices": [{"message": {"content": "one"}}]}), []),
}


@pytest.mark.parametrize("end", ENDS)
def test_warning_of_an_answer_cut_short(ask: Ask, server: Loopback, end: str, caplog: pytest.LogCaptureFixture) -> None:
    """The limit of the model, and a stream that just ends, are worth a warning; a regular end is not."""
    server.answer, warnings = ENDS[end]
    assert ask().text == "one"
    ours = [record for record in caplog.records if record.name == "llm_autonomous"]
    assert [record.getMessage() for record in ours if record.levelno == logging.WARNING] == warnings


def test_warning_reaches_the_terminal(server: Loopback, start: Start) -> None:
    """A user who configured nothing sees the warning beside the answer: plain, with --no-stream and with --async."""
    server.answer = say([event(delta("one"))])
    script = """if True:
        from llm.cli import cli

        for flags in ([], ["--no-stream"], ["--async"]):
            cli.main(["-m", "autonomous-llama", "hi", "--no-log", *flags], standalone_mode=False)
    """
    done = finish(start(sys.executable, "-c", script, url=server.url))
    assert done == ("one\n" * 3, f"{NO_END}\n" * 3, 0)


# The error itself


@pytest.mark.parametrize("flags", [[], ["--async"]], ids=str)
def test_llm_shows_the_error_as_one_line(server: Loopback, flags: list[str]) -> None:
    """The command ends with exit code 1 and one line, behind the text that came before."""
    server.answer = say([event(delta("one ")), event({"error": HOSTILE})])
    stdout, stderr, code = invoke("-m", "autonomous-llama", "hi", "--no-log", *flags)
    assert code == 1
    assert stdout.rstrip("\n") == "one "
    start = f"Error: 127.0.0.1:{server.port}: the service reports an error: ]0;owned [31mno luck 1m xxx"
    assert stderr.startswith(start)
    assert stderr.endswith("…\n")
    assert stderr[:-1].isprintable()


def test_error_is_what_llm_and_click_show() -> None:
    """It is a `llm.ModelError` and a `click.ClickException`, which click shows as one line with exit code 1."""

    @click.command()
    def fail() -> None:
        raise AutonomousError("no luck")

    result = CliRunner().invoke(fail)
    assert issubclass(AutonomousError, llm.ModelError)
    assert (result.exit_code, result.output) == (1, "Error: no luck\n")


def test_error_is_its_message() -> None:
    """``str`` and ``message`` are the line, and nothing but the line."""
    error = AutonomousError("no luck", retryable=True)
    assert str(error) == error.message == error.format_message() == "no luck"


def test_error_can_be_pickled() -> None:
    """A pool of processes can hand an error back, with all that it knows."""
    error = pickle.loads(pickle.dumps(AutonomousError("no luck", retryable=True, retry_after=2.0, outage=True)))
    assert type(error) is AutonomousError
    assert (str(error), error.message) == ("no luck", "no luck")
    assert (error.retryable, error.retry_after, error.outage) == (True, 2.0, True)


def test_error_has_its_cause(ask: Ask, monkeypatch: pytest.MonkeyPatch) -> None:
    """For the one who debugs it, what the HTTP client raised is the cause of the error."""
    monkeypatch.setenv("AUTONOMOUS_BASE_URL", "http://127.0.0.1:1")
    error = ask().error
    assert error is not None
    assert type(error.__cause__).__name__ == "ConnectError"
