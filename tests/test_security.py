"""Security: what README promises about it, and who a prompt and its secrets may not reach."""

from __future__ import annotations

import json
import logging
import traceback
from pathlib import Path

import pytest
from conftest import Ask, invoke
from loopback import DONE, Answer, Loopback, delta, event, say
from proxies import Proxy, TlsLoopback, cut, run_python, tls

GOOD = "llama heard: hi"
SECRET = "hunter2"


# Certificates are always verified

# These turn verification off elsewhere.
VERIFY_VARIABLES = {"PYTHONHTTPSVERIFY": "0", "SSL_VERIFY": "0", "CURL_CA_BUNDLE": "", "REQUESTS_CA_BUNDLE": ""}


@pytest.mark.parametrize("scheme", [None, "http", "socks5"])
def test_unknown_authority_is_refused(
    scheme: str | None, ask: Ask, monkeypatch: pytest.MonkeyPatch, sleeps: list[float]
) -> None:
    """A certificate that no known authority signed gets no prompt, through a proxy or not, and no second attempt.
    Nothing turns that off."""
    for name, value in VERIFY_VARIABLES.items():
        monkeypatch.setenv(name, value)
    with TlsLoopback() as server, Proxy(scheme or "http") as proxy:
        monkeypatch.setenv("AUTONOMOUS_BASE_URL", server.url)
        line = ask(**({"proxy": proxy.url} if scheme else {})).line
    assert "its certificate cannot be verified: self-signed certificate" in line
    assert "SSL_CERT_FILE" in line
    assert (server.requests, sleeps) == ([], [])


def test_certificate_of_a_proxy_is_verified(ask: Ask, server: Loopback) -> None:
    """An https:// proxy that cannot show who it is gets no prompt."""
    with Proxy("https", tls=tls()) as proxy:
        assert "its certificate cannot be verified" in ask(proxy=proxy.url).line
        assert proxy.targets == []
    assert server.requests == []


# A prompt goes to no host but the one that is set; nothing that a server sends is executed or written to disk

WATCHED = """
import asyncio, json, logging, os, socket, sys
import conftest

logging.getLogger("llm_autonomous").setLevel(logging.ERROR)  # it warns of a call that it does not make
events, watching = [], False
DOES = ("exec", "os.exec", "os.fork", "os.posix_spawn", "os.spawn", "os.startfile", "os.system", "subprocess.Popen",
        "pty.spawn", "compile", "marshal.loads", "pickle.find_class", "ctypes.dlopen", "os.mkdir", "os.rename",
        "os.remove", "os.link", "os.symlink", "os.truncate", "os.chmod", "shutil.copyfile", "tempfile.mkstemp",
        "sqlite3.connect", "webbrowser.open")

def watch(event, arguments):
    if not watching:
        return
    if event == "socket.connect" and isinstance(arguments[1], tuple):
        events.append(f"connect {arguments[1][0]}:{arguments[1][1]}")
    elif event in ("socket.getaddrinfo", "socket.gethostbyname", "socket.sendto"):
        events.append(f"look up {arguments[0]}")
    elif event == "open" and (arguments[2] or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
        events.append(f"write {arguments[0]}")
    elif event in DOES:
        events.append(f"{event} {arguments[0]!r}")

def ask_async():
    asyncio.run(conftest.ask_async())

def tattle():
    open(os.devnull, "w").close()
    socket.getaddrinfo("localhost", 80)
    ask_async()
    os.system("true")

def tell(deed, times=1):
    global watching
    watching = True
    for _ in range(times):
        deed()
    watching = False
    print(json.dumps(events))
    events.clear()

sys.addaudithook(watch)
for ask in (conftest.ask_sync, ask_async):
    ask()  # imports, and makes what is kept
    tell(ask, int(sys.argv[1]))
tell(tattle)
"""

HOSTILE = "__import__('os').system('touch owned'); `touch owned`; $(touch owned) ../../owned"
ELSEWHERE = "http://elsewhere.test/"
HEADERS = {
    "content-disposition": 'attachment; filename="owned"',
    "refresh": f"0; url={ELSEWHERE}",
    "link": f"<{ELSEWHERE}>; rel=preload",
    "alt-svc": 'h3=":443"',
    "set-cookie": "id=1; path=/",
}
CALL = {"index": 0, "id": "1", "type": "function", "function": {"name": "os.system", "arguments": HOSTILE}}
CHUNK = {"choices": [{"delta": {"content": HOSTILE, "tool_calls": [CALL]}}]}

HOSTILES: list[Answer] = [
    say([event(CHUNK), event(delta(finish_reason="stop", model=HOSTILE)), DONE], headers=HEADERS),
    say([HOSTILE.encode()], status="400 Bad Request", headers=HEADERS),
    say([], status="307 Moved", headers={**HEADERS, "location": ELSEWHERE}),
    say([f'<html><meta http-equiv="refresh" content="0; url={ELSEWHERE}"><title>x</title>'.encode()]),
    say([b"!!python/object/apply:os.system [touch owned]\n\n"]),
]


def test_prompt_reaches_the_host_named_and_does_nothing_else(server: Loopback) -> None:
    """A prompt, sync or async, connects to the server that is set and to none beside it; nothing that comes back is
    executed, and no file is written, as Python's own audit events tell. They would tell of the last line's deeds."""
    drop_when_done = cut(event(delta("ok", finish_reason="stop")), DONE)  # has the next prompt connect again
    server.answers += [drop_when_done, *HOSTILES] * 2
    *watched, tattled = map(json.loads, run_python(WATCHED, str(len(HOSTILES))).splitlines())
    for events in watched:
        assert {*events} - {"look up 127.0.0.1"} == {f"connect 127.0.0.1:{server.port}"}
    assert len(server.requests) == 2 * (1 + len(HOSTILES)) + 1
    told = {"write /dev/null", "look up localhost", f"connect 127.0.0.1:{server.port}", "os.system b'true'"}
    assert told <= {*tattled}


def test_cookies_of_a_server_are_not_sent_back(ask: Ask, server: Loopback) -> None:
    """A server cannot mark a user: the next prompt tells it nothing that it said before."""
    server.answers += [HOSTILES[0]]
    names = []
    for _ in range(2):
        assert ask().text
        names.append(sorted(server.last.headers))
    assert names[0] == names[1]


# No secret in logs, errors or the database


def everything_said(answer_error: BaseException | None, caplog: pytest.LogCaptureFixture) -> str:
    said = [record.getMessage() for record in caplog.records] + [repr(vars(record)) for record in caplog.records]
    if answer_error:
        said += traceback.format_exception(answer_error)
    return "\n".join(said)


@pytest.mark.parametrize(
    ("scheme", "refusal", "answer"),
    [
        *((scheme, None, answer) for scheme in ("http", "socks5", "socks5h") for answer in (None, HOSTILES[1])),
        ("http", "403 Forbidden", None),
        ("http", "407 Proxy Authentication Required", None),
    ],
)
def test_password_of_a_proxy_is_not_logged(
    scheme: str,
    refusal: str | None,
    answer: Answer | None,
    ask: Ask,
    server: Loopback,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The password of a proxy in the environment reaches the proxy, and no log of whatever level, and no error: neither
    the server's nor that of a proxy which refuses it."""
    monkeypatch.setenv("AUTONOMOUS_BASE_URL", f"http://service.test:{server.port}")
    server.answer = answer or server.answer
    with Proxy(scheme, refusal) as proxy, caplog.at_level(logging.DEBUG):
        monkeypatch.setenv("ALL_PROXY", proxy.url_for(f"user:{SECRET}"))
        said = ask()
        assert proxy.credentials == {f"user:{SECRET}"}
    assert bool(said.error) == bool(answer or refusal)
    assert (refusal or "") in str(said.error)
    assert SECRET not in everything_said(said.error, caplog)


@pytest.mark.parametrize(
    "url",
    [
        *(f"{scheme}://user:{SECRET}@127.0.0.1:1" for scheme in ("http", "https", "socks5", "ftp")),
        *(f"http://user:{SECRET}@{place}" for place in ("127.0.0.1:port", "[::", "", "host name/")),
    ],
)
@pytest.mark.parametrize("variable", ["ALL_PROXY", "HTTP_PROXY", "AUTONOMOUS_BASE_URL"])
def test_password_of_what_does_not_work_is_not_told(
    variable: str,
    url: str,
    ask: Ask,
    server: Loopback,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    no_backoff: None,
) -> None:
    """A proxy that refuses or is no URL, and any password for the server, are an error without the password."""
    monkeypatch.setenv(variable, url)
    with caplog.at_level(logging.DEBUG):
        answer = ask()
    assert ("AUTONOMOUS_BASE_URL must be" in answer.line) == (variable == "AUTONOMOUS_BASE_URL")
    assert SECRET not in everything_said(answer.error, caplog)
    assert server.requests == []


def test_passwords_are_not_in_the_database(server: Loopback, user_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What `llm` logs of a prompt, and what it prints, does not hold the password of the proxy."""
    monkeypatch.setenv("AUTONOMOUS_BASE_URL", f"http://service.test:{server.port}")
    with Proxy() as proxy:
        monkeypatch.setenv("HTTP_PROXY", proxy.url_for(f"user:{SECRET}"))
        assert invoke("-m", "autonomous-llama", "hi") == (f"{GOOD}\n", "", 0)
        assert proxy.credentials == {f"user:{SECRET}"}
    files = [path for path in user_path.rglob("*") if path.is_file()]
    assert "logs.db" in [path.name for path in files]
    assert not [path for path in files if SECRET.encode() in path.read_bytes()]
