"""What goes wrong: each fault is one `AutonomousError`, in one line that says what happened.

What stands in a reply of status 200 is in test_replies.py.
"""

from __future__ import annotations

import gzip
import json
import os
import pickle
import re
import signal
import socket
import sys
import zlib
from collections.abc import Callable
from typing import Any

import llm
import pytest
from conftest import Ask, Start, ask_sync, finish, invoke
from loopback import DONE, Answer, Connection, Loopback, Request, delta, event, say
from proxies import OddProxy, free_port, tls
from pytest_httpx import HTTPXMock

from llm_autonomous import BASE_URL, AutonomousError, reason_of

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


@pytest.fixture
def service(monkeypatch: pytest.MonkeyPatch) -> None:
    """The service's name means 127.0.0.1, and is the only one there is."""
    lookup = socket.getaddrinfo

    def getaddrinfo(host: Any, *args: Any, **kwargs: Any) -> Any:
        assert host in (SERVICE, SERVICE.encode(), "127.0.0.1", b"127.0.0.1")
        return lookup("127.0.0.1", *args, **kwargs)

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)


# No connection, and no answer


@pytest.mark.parametrize("host", ["nosuchhost.invalid:8000", "a" * 64 + ".invalid"])
def test_name_that_does_not_resolve(host: str, ask: Ask, monkeypatch: pytest.MonkeyPatch) -> None:
    """A DNS failure names the host, and says what the resolver says, or Python about the name itself."""
    monkeypatch.setenv("AUTONOMOUS_BASE_URL", f"http://{host}")
    assert re.match(rf"{host}: (cannot connect|the request failed): .*([Nn]ame|label)", ask().line)


def test_connection_refused(ask: Ask, monkeypatch: pytest.MonkeyPatch) -> None:
    """The line names the host and the port; for the one who debugs it, the error has what the HTTP client raised."""
    monkeypatch.setenv("AUTONOMOUS_BASE_URL", "http://127.0.0.1:1")
    answer = ask()
    assert answer.line == "127.0.0.1:1: cannot connect: Connection refused (3 attempts)"
    assert type(getattr(answer.error, "__cause__", None)).__name__ == "ConnectError"


@pytest.mark.parametrize(
    ("words", "timeout", "reason"),
    [(b"HTTP/1.1 400 Bad Request\r\n\r\n", 120, ".*SSL.*"), (b"", 0.05, "no reply within 0.05 s")],
    ids=["without TLS", "silent"],
)
def test_handshake_that_fails(
    words: bytes, timeout: float, reason: str, ask: Ask, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The line has OpenSSL's words, or how long a reply was waited for."""
    with OddProxy(words, closes=bool(words)) as server:
        monkeypatch.setenv("AUTONOMOUS_BASE_URL", f"https://127.0.0.1:{server.port}")
        line = ask(timeout=timeout).line
    assert re.fullmatch(rf"127.0.0.1:{server.port}: cannot connect: {reason} \(3 attempts\)", line)


class TooLong(Exception):
    """A time limit of the program that prompts the model."""


@pytest.mark.parametrize("sent", [b"", event(delta("Once")), event(delta("Once", finish_reason="stop"))])
def test_an_exception_of_the_caller_is_raised_as_it_is(sent: bytes, server: Loopback) -> None:
    """One that a signal raises before the reply, within it or at its end is no fault of the connection."""

    async def answer(request: Request, connection: Connection) -> None:
        if sent:
            await connection.head()
            await connection.send(sent)
        os.kill(os.getpid(), signal.SIGUSR1)
        await connection.stall()

    def ring(*_: Any) -> None:
        raise TooLong

    server.answer = answer
    before = signal.signal(signal.SIGUSR1, ring)
    try:
        with pytest.raises(TooLong):
            ask_sync()
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert len(server.requests) == 1


def test_an_exception_of_the_caller_is_raised_as_it_is_also_in_async(ask: Ask, httpx_mock: HTTPXMock) -> None:
    """Its class is neither Python's nor one of the HTTP client."""
    httpx_mock.add_exception(TooLong(""))
    with pytest.raises(TooLong):
        ask()


def test_windows_has_words_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """There, strerror does not know the codes of sockets, but the exception has the words."""
    words = "No connection could be made because the target machine actively refused it"
    monkeypatch.setattr(sys, "platform", "win32")
    assert reason_of(ConnectionRefusedError(10061, words)) == words


NO_ANSWERS = [
    (stall, "silent for 0.5 s; -o timeout sets the limit"),
    (raw(b""), "the connection was lost before any answer (3 attempts)"),
    (raw(b"HTTP/1.1 204 No Content\r\n\r\n"), "the answer was empty"),
    (raw(b"HTTP/1.1 400 Bad Request\r\nContent-Length: 100\r\n\r\nno luck"), "HTTP 400 Bad Request: no luck"),
]


@pytest.mark.parametrize(("answer", "words"), NO_ANSWERS, ids=["silent", "dropped", "empty", "half an error"])
def test_no_answer(answer: Answer, words: str, ask: Ask, server: Loopback) -> None:
    """A server that takes the prompt and gives no answer is given up on, and the line says why."""
    server.answer = answer
    assert ask(timeout=0.5).line == f"127.0.0.1:{server.port}: {words}"


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
    with Loopback(answers.get(fault, raw(b"")), tls() if fault == "certificate" else None) as server:
        port = free_port() if fault == "refused" else server.port
        scheme = "https" if fault == "certificate" else "http"
        monkeypatch.setenv("AUTONOMOUS_BASE_URL", f"{scheme}://{SERVICE}:{port}")
        if fault == "DNS":
            monkeypatch.setattr(socket, "getaddrinfo", no_address)
        line = ask(timeout=0.1).line
    assert line.startswith(f"{SERVICE}:{port}: ")
    assert "The service is often down; `llm autonomous check` shows which models answer" in line


def no_address(*args: Any, **kwargs: Any) -> Any:
    raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")


@pytest.mark.parametrize("fault", [whole(b"", "503 Service Unavailable"), whole(b"<html>")])
def test_another_host_is_not_the_service(ask: Ask, server: Loopback, fault: Answer) -> None:
    """Of a server that is not the service, nothing of the kind is said; nor in `test_no_answer`."""
    server.answer = fault
    assert "often down" not in ask().line


# A status that is an error


FORBIDDEN = {"statusCode": 403, "error": "Forbidden", "message": "no luck"}
BODIES: list[tuple[object, str]] = [
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
    (FORBIDDEN, "Forbidden: no luck"),
    (dict(reversed(FORBIDDEN.items())), "Forbidden: no luck"),
    ({"error": "Forbidden", "message": "Forbidden: no luck"}, "Forbidden: no luck"),
    ({"error": "no luck", "message": "no luck"}, "no luck"),
    ({"error": "Bad Request", "message": ["no a", "no b"]}, 'Bad Request: ["no a", "no b"]'),
    ({"error": {"message": "no luck"}, "detail": "today"}, "no luck: today"),
    ({"error": {"type": "error", "error": {"message": "no luck"}}}, "no luck"),
    ({"detail": {"error": "no luck", "code": 7}}, "no luck"),
    ("no luck", "no luck"),
    (b"no luck\n", "no luck"),
    (b"\xef\xbb\xbf no\nluck", "no luck"),
    (b'{"error": "no luck', '{"error": "no luck'),
    (b"no l\xffck", "no l\ufffdck"),
    (b"[" * 60_000, "[" * 299 + "…"),
    ({"error": "x" * 300}, "x" * 300),
    ({"error": "x" * 301}, "x" * 299 + "…"),
]


@pytest.mark.parametrize(("body", "words"), BODIES, ids=lambda value: str(value)[:40])
@pytest.mark.parametrize("status", ["400 Bad Request", "500 Internal Server Error"])
def test_status_and_message(ask: Ask, server: Loopback, status: str, body: object, words: str) -> None:
    """The line has the status, the reason phrase, and the message out of the body, at most 300 characters of it.

    Two messages that say different things stand together; what says the same stands once.
    """
    server.answer = whole(body, status)
    attempts = " (3 attempts)" if status.startswith("5") else ""
    assert ask().line == f"127.0.0.1:{server.port}: HTTP {status}: {words}{attempts}"


@pytest.mark.parametrize("status", ["401 Unauthorized", "404 Not Found", "418 I'm a teapot", "520 Origin Is Down"])
def test_status_without_body(ask: Ask, server: Loopback, status: str) -> None:
    """Without a body, the status and the server's own reason phrase are all there is to say."""
    server.answer = whole(b"", status)
    assert ask().line == f"127.0.0.1:{server.port}: HTTP {status}"


# A web page


PAGE = "<!DOCTYPE html>\n<html lang=en>\n<head><title>\n  Just a  moment...\n</title></head>\n\n<body>data: {}</body>"
S3 = '<?xml version="1.0"?>\n<Error><Code>NoSuchKey</Code><Message>Access Denied</Message><HostId>a=</HostId></Error>'
PAGES = {
    "a title": (PAGE, "titled: Just a moment..."),
    "a title in capitals": ("\ufeff\n " + PAGE.replace("title>", "TITLE>"), "titled: Just a moment..."),
    "character references": ("<html><title>Sorry &amp; goodbye &#33; &eacute;</title>", "titled: Sorry & goodbye ! é"),
    "an attribute": ("<html><head><title lang='en'>Down</title>", "titled: Down"),
    "letters that grow": ("<html>\u0130\u0130\u0130<title>Down</title>", "titled: Down"),
    "XHTML": ("<?xml version='1.0'?><html><title>Down</title></html>", "titled: Down"),
    "a title without an end": ("<html><title>Do", "titled: Do"),
    "half a title": ("<html><title", "without a title"),
    "an empty title": ("<html><title></title></html>", "without a title"),
    "a blank title": ("<html><title> </title><body>Come back</body>", "without a title: Come back"),
    "words": ("<html>\n<body bgcolor='white'>\n<p>Down</p> for <b>now</b>", "without a title: Down for now"),
    "XML": (S3, "without a title: NoSuchKey Access Denied a="),
    "XML without a declaration": ("<Error><Message>No bucket &amp; more</Message></Error>", "title: No bucket & more"),
}


@pytest.mark.parametrize(("page", "words"), PAGES.values(), ids=PAGES)
@pytest.mark.parametrize(
    ("status", "content_type"),
    [("200 OK", "text/html"), ("200 OK", "text/event-stream"), ("503 Service Unavailable", "application/xml")],
)
def test_web_page(ask: Ask, server: Loopback, status: str, content_type: str, page: str, words: str) -> None:
    """A page, known by its text, is named by its title as a browser shows it, or else by its words without its tags."""
    server.answer = whole(page.encode(), status, {"content-type": content_type})
    line = ask().line.removesuffix(" (3 attempts)")
    start = "" if status == "200 OK" else f"HTTP {status}: "
    assert line.startswith(f"127.0.0.1:{server.port}: {start}answered with a web page ")
    assert line.endswith(words)


# Redirects, which are never followed


@pytest.mark.parametrize(("status", "location"), [("307 T", "/login"), ("302 Found", "http://a.b"), ("304 N", None)])
def test_redirect_says_where_to(ask: Ask, server: Loopback, status: str, location: str | None) -> None:
    """The line says which host the server names, and how to make it the right one."""
    server.answer = whole({"error": "moved"}, status, {"location": location} if location else {})
    line = ask().line
    assert (
        f"127.0.0.1:{server.port}: HTTP {status}: redirects to {location or 'nowhere'}, which is not followed" in line
    )
    assert "AUTONOMOUS_BASE_URL" in line


@pytest.mark.parametrize(
    "location", ["http://", "http://[::1", "https://:443:443/", "http://host:port/", "http://a b/", "//", "\x80"]
)
def test_redirect_to_what_is_no_url(location: str, ask: Ask, server: Loopback) -> None:
    """It is one line, though httpx itself may already refuse what it redirects to."""
    server.answer = whole(b"", "302 Found", {"location": location})
    line = ask().line
    assert "HTTP 302 Found: redirects" in line or "Invalid URL in location header" in line
    assert len(server.requests) == 1


# Replies that cannot be read, whatever is in them


CODINGS = {
    **dict.fromkeys(["none", "utf-8", "", "identity", "binary", "null"], bytes),
    **dict.fromkeys(["gzip", "x-gzip", "GZIP", "none, gzip", "gzip, utf-8"], gzip.compress),
    "deflate": zlib.compress,
}


@pytest.mark.parametrize("status", ["200 OK", "400 Bad Request"])
@pytest.mark.parametrize(("coding", "pack"), CODINGS.items(), ids=CODINGS)
def test_content_coding(coding: str, pack: Callable[[bytes], bytes], status: str, ask: Ask, server: Loopback) -> None:
    """What was asked for is unpacked, and what names no compression is none: in an answer and in an error."""
    body = event(delta("hi")) + DONE if status == "200 OK" else b'{"error": "no luck"}'
    server.answer = say([pack(body)], status=status, headers={"content-encoding": coding})
    answer = ask()
    assert (answer.text if status == "200 OK" else answer.line.rpartition(": ")[2]) in ("hi", "no luck")


@pytest.mark.parametrize("coding", ["br", "zstd", "compress", "dcb", "gzip, br", "gzip,gzip", "br, none"])
def test_content_coding_that_was_not_asked_for(coding: str, ask: Ask, server: Loopback) -> None:
    """It is named. One compression inside another could expand to terabytes, so it is not even tried."""
    server.answer = say([b"\x1b\x03\x00"], headers={"content-encoding": coding})
    assert ask().line.endswith(f"the reply was not understood: its encoding is {coding}")


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
    ],
    ids=lambda reply: repr(reply[:60]),
)
def test_reply_that_is_malformed(ask: Ask, server: Loopback, reply: bytes) -> None:
    """What is no HTTP, or cannot be unpacked, was not understood; it is not asked for again."""
    server.answer = raw(reply)
    assert ask().line.startswith(f"127.0.0.1:{server.port}: the reply was not understood: ")
    assert len(server.requests) == 1


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


def test_warning_reaches_the_terminal(server: Loopback, start: Start) -> None:
    """A user who configured nothing sees the warning on a line of its own: plain, with --no-stream and --async."""
    warning = "\nWarning: the answer may be cut short: the stream ended without finish reason or [DONE]"
    server.answer = say([event(delta("one"))])
    script = """if True:
        from llm.cli import cli

        for flags in ([], ["--no-stream"], ["--async"]):
            cli.main(["-m", "autonomous-llama", "hi", "--no-log", *flags], standalone_mode=False)
    """
    done = finish(start(sys.executable, "-c", script, url=server.url))
    assert done == ("one\n" * 3, f"{warning}\n" * 3, 0)


# Settings


@pytest.mark.parametrize("variable", ["HTTP_PROXY", "ALL_PROXY"])
def test_proxy_variable_at_fault_is_named(
    variable: str, ask: Ask, server: Loopback, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The error names the variable that holds no proxy URL, without the password in it."""
    monkeypatch.setenv(variable, "http://me:secret@host:port")
    assert ask().line == f"{variable} must be an http://, https://, socks5:// or socks5h:// URL with a host"
    assert server.requests == []


# The error itself


@pytest.mark.parametrize("flags", [[], ["--async"]], ids=str)
def test_llm_shows_the_error_as_one_line(server: Loopback, flags: list[str]) -> None:
    """The command ends with exit code 1 and one line, after the text that came before."""
    server.answer = say([event(delta("one ")), event({"error": HOSTILE})])
    stdout, stderr, code = invoke("-m", "autonomous-llama", "hi", "--no-log", *flags)
    assert code == 1
    assert stdout.rstrip("\n") == "one "
    start = f"Error: 127.0.0.1:{server.port}: the service reports an error: ]0;owned [31mno luck 1m xxx"
    assert stderr.startswith(start)
    assert stderr.endswith("…\n")
    assert stderr[:-1].isprintable()


def test_error_is_its_message_and_can_be_pickled() -> None:
    """It is a `llm.ModelError`, whose words are the line alone. A pool of processes hands it back with all it knows."""
    error = AutonomousError("no luck", retryable=True, retry_after=2.0, outage=True)
    for same in (error, pickle.loads(pickle.dumps(error))):
        assert isinstance(same, AutonomousError)
        assert isinstance(same, llm.ModelError)
        assert str(same) == same.message == same.format_message() == "no luck"
        assert (same.retryable, same.retry_after, same.outage) == (True, 2.0, True)
