"""`llm autonomous check`: is it me or them?"""

from __future__ import annotations

import ast
import asyncio
import json
import os
import pty
import re
import threading
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from conftest import NOWHERE, Start, cut, finish, invoke, output_until, run
from llm.cli import cli
from loopback import ENDPOINTS, Answer, Connection, Loopback, Request, delta, event, say, speak
from proxies import Proxy, refuse, silent, until

MODELS = [f"autonomous-{name}" for name in ENDPOINTS]


def check(*arguments: str) -> Result:
    """The command, run in this process."""
    return CliRunner().invoke(cli, ["autonomous", "check", *arguments])


def rows_of(shown: str) -> dict[str, tuple[str, str]]:
    """The endpoint and the result of each model in a table."""
    rows = [line.split(" : ", 2) for line in shown.splitlines()]
    return {model.rstrip(): (endpoint.rstrip(), result) for model, endpoint, result in rows}


def failing(**failures: Answer) -> Answer:
    """An answer that is one of these for the models that they name, and follows the protocol for the others."""

    async def answer(request: Request, connection: Connection) -> None:
        await failures.get(request.payload["aiAgent"], speak())(request, connection)

    return answer


def drip(piece: bytes) -> Answer:
    """An answer that begins well, and repeats this piece for ever."""

    async def answer(request: Request, connection: Connection) -> None:
        await connection.head()
        await connection.drip(piece)

    return answer


# What it shows


def test_every_model_has_a_row(server: Loopback) -> None:
    """Model, endpoint, and ok with the seconds to the first text, in columns. Each is asked once, streamed as usual."""
    result = check()
    assert result.exit_code == 0
    rows = rows_of(result.output)
    assert {model: endpoint for model, (endpoint, _) in rows.items()} == {
        f"autonomous-{name}": endpoint for name, endpoint in ENDPOINTS.items()
    }
    assert all(re.fullmatch(r"ok, \d+\.\d\d s", shown) for _, shown in rows.values())
    assert len({(line.index(" : "), line.rindex(" : ")) for line in result.output.splitlines()}) == 1, "columns"
    assert sorted(request.payload["aiAgent"] for request in server.requests) == sorted(ENDPOINTS)
    for request in server.requests:
        assert request.messages == [{"role": "user", "content": "Reply with one word: OK"}]
        assert request.payload["stream"] is True


def test_one_model_that_fails_fails_the_check(server: Loopback) -> None:
    """Its row has the error, the others are ok, and the exit code is 1. None is asked twice."""
    server.answer = failing(hermes=refuse(503))
    result = check()
    rows = rows_of(result.output)
    error = f"127.0.0.1:{server.port}: HTTP 503 Service Unavailable: overloaded"
    assert rows.pop("autonomous-hermes") == ("chat-hermes", error)
    assert len(rows) == 4
    assert all(shown.startswith("ok, ") for _, shown in rows.values())
    assert (len(server.requests), result.exit_code) == (5, 1)


@pytest.mark.parametrize(
    "answer",
    [silent(head=None), silent(), drip(b": still here\n\n"), drip(event(delta("and ")))],
    ids=["silence", "silence after the head", "comments", "text"],
)
def test_a_server_that_does_not_come_to_an_end_is_given_up(server: Loopback, answer: Answer) -> None:
    """`--timeout` bounds the whole answer, whatever the server does to look alive. All connections are closed."""
    server.answer = failing(summary=answer)
    result = check("--timeout", "0.5", "-m", "autonomous-summary", "-m", "autonomous-llama")
    given_up = f"127.0.0.1:{server.port}: no whole answer within 0.5 s"
    assert rows_of(result.output)["autonomous-summary"] == ("summary", given_up)
    assert result.exit_code == 1
    assert until(lambda: not server.open)


def test_rows_appear_when_they_are_known(server: Loopback, start: Start) -> None:
    """Those of the models that answered are there while one is silent. A terminal shows that the check has begun."""
    release = threading.Event()

    async def late(request: Request, connection: Connection) -> None:
        await asyncio.to_thread(release.wait)
        await speak()(request, connection)

    server.answer = failing(llama=late)
    terminal, its_end = pty.openpty()
    process = start("llm", "autonomous", "check", url=server.url, stderr=its_end)
    os.close(its_end)
    try:
        rows = [output_until(process, "\n") for _ in MODELS[1:]]
        shown = os.read(terminal, 1000).decode()
    finally:
        release.set()
    stdout, _, code = finish(process)
    os.close(terminal)
    assert {*rows_of("".join(rows))} == {*MODELS[1:]}
    assert ([*rows_of(stdout)], code) == (MODELS[:1], 0)
    assert shown == f"Asking 127.0.0.1:{server.port}, for up to 20 s per model ...\r\n"


# Which models


def test_models_are_named_by_id_or_alias(server: Loopback) -> None:
    """`-m` may be repeated; a model that is named twice is asked once, and one that is not named does not count."""
    server.answer = failing(summary=refuse(500))
    result = check("-m", "autonomous", "-m", "autonomous-vision", "-m", "autonomous-llama", "-m", "hermes-3")
    assert set(rows_of(result.output)) == {"autonomous-llama", "autonomous-vision", "autonomous-hermes"}
    assert (len(server.requests), result.exit_code) == (3, 0)
    assert check("-m", "autonomous-vision", "-m", "autonomous-summary").exit_code == 1


# For scripts


def test_json_has_the_rows(server: Loopback) -> None:
    """An array in the order of the models: numbers as numbers, also that of a text that broke off, and the errors."""
    page = say([b"<title>Just a moment...</title>"], status="403 Forbidden")
    server.answer = failing(vision=page, summary=cut("and "))
    assert check("--json", "-m", "autonomous-llama").exit_code == 0
    result = check("--json")
    rows = json.loads(result.output)
    error = f"127.0.0.1:{server.port}: HTTP 403 Forbidden: answered with a web page titled: Just a moment..."
    assert [row["model"] for row in rows] == MODELS
    assert rows.pop(3) == {"model": "autonomous-vision", "endpoint": "chat-vision", "ok": False, "error": error}
    assert all(0 < row["seconds"] < 20 for row in rows)
    assert "the answer is incomplete" in rows.pop()["error"]
    for row in rows:
        assert sorted(row) == ["endpoint", "model", "ok", "seconds"]
        assert row["ok"] is True
    assert result.exit_code == 1


# Its options


def test_a_proxy_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """`-o proxy` sends the prompts there, as `llm` does."""
    monkeypatch.setenv("AUTONOMOUS_BASE_URL", "http://service.invalid")
    with Loopback() as proxy:
        result = check("-o", "proxy", proxy.url)
        paths = {request.path for request in proxy.requests}
    assert result.exit_code == 0
    assert paths == {f"http://service.invalid/api/v1/ai/{endpoint}" for endpoint in ENDPOINTS.values()}


def test_a_timeout_of_silence_is_followed(server: Loopback) -> None:
    """`-o timeout` is what it is for a prompt."""
    server.answer = silent(head=None)
    rows = rows_of(check("-o", "timeout", "0.3", "-m", "autonomous-llama").output)
    assert rows["autonomous-llama"][1] == f"127.0.0.1:{server.port}: silent for 0.3 s; -o timeout sets the limit"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("-o proxy ftp://proxy", "proxy: Value error, must be an http://, https://"),
        ("-o timeout 0", "timeout: Input should be greater than 0"),
        ("-o temperature 1", "temperature: Extra inputs are not permitted"),
        ("-m autonomous-llama -m autonomous-gpt", "Unknown model: autonomous-gpt"),
        ("-m autonomous-llama -m llama", "Unknown model: llama"),
        ("-m gpt-4o-mini", "only the models of Autonomous AI can be checked: llm models -q autonomous"),
        ("", "AUTONOMOUS_BASE_URL must be an http:// or https:// URL"),
    ],
)
def test_what_is_refused_is_one_line(
    server: Loopback, monkeypatch: pytest.MonkeyPatch, arguments: str, words: str
) -> None:
    """What is wrong, once; no model is asked, not even one that is named rightly."""
    if "BASE_URL" in words:
        monkeypatch.setenv("AUTONOMOUS_BASE_URL", "nonsense")
    result = check(*arguments.split())
    assert result.output.startswith("Error: ")
    assert words in result.output
    assert (result.output.count("\n"), result.exit_code, server.requests) == (1, 1, [])


@pytest.mark.parametrize("timeout", ["0", "-1", "soon", "1e9", "nan"])
def test_a_timeout_that_is_none_is_refused(server: Loopback, timeout: str) -> None:
    """Zero, less, words, weeks: a usage error, exit code 2."""
    result = check("--timeout", timeout)
    assert (result.exit_code, server.requests) == (2, [])
    assert "Invalid value for '--timeout'" in result.output


def test_nothing_is_logged(server: Loopback, user_path: Path) -> None:
    """No database is made, and nothing else is written, whether a model answers or fails."""
    server.answer = failing(hermes=refuse(500))
    stdout, stderr, _ = invoke("autonomous", "check")
    assert (len(rows_of(stdout)), stderr) == (5, "")
    assert list(user_path.rglob("*")) == []


# Its help


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("--help", ["autonomous Find out which models of Autonomous AI answer"]),
        ("autonomous --help", ["check Ask each model for one word"]),
        (
            "autonomous check --help",
            [
                "-m, --model TEXT Model to ask, can be repeated",
                "Seconds to wait for each whole answer [default: 20.0]",
                "-o proxy URL",
                "--json",
                "Nothing is logged. The exit code is 0 if all models answer, and 1 otherwise.",
            ],
        ),
    ],
)
def test_the_help_says_what_a_user_needs(command: str, words: list[str]) -> None:
    """`llm --help` leads to the group, the group to the command, and the command to its options and exit code."""
    shown = " ".join(run(*command.split()).split())
    assert [sentence for sentence in words if sentence not in shown] == []


# What --raw shows

PIECE = re.compile(r" *\d+\.\d{3} s ([<>!]) (.*)")


def raw(*arguments: str) -> tuple[Result, list[tuple[str, str]]]:
    """What ``check --raw`` came to, and each line it showed on standard error: its sign and what came or went."""
    result = check("--raw", *arguments)
    pieces = [PIECE.fullmatch(line) for line in result.stderr.splitlines()]
    assert all(pieces), "each line begins with the seconds"
    return result, [(piece[1], piece[2]) for piece in pieces if piece]


def test_raw_shows_what_is_sent_and_what_comes(server: Loopback) -> None:
    """Request line, headers, body and the messages in it; status, headers, and each piece of the body byte for byte."""
    pieces = [event(delta("O\u00e9")), event(delta("K", finish_reason="stop")), b"data: [DONE]\r\n\x1b\n"]
    server.answer = say(pieces, pause=0.02, headers={"x-served-by": "loopback"})
    result, shown = raw("-m", "autonomous-hermes")
    assert result.exit_code == 0
    assert rows_of(result.stdout)["autonomous-hermes"][1].startswith("ok, ")
    sent = [text for sign, text in shown if sign == ">"]
    assert sent[0] == "POST /api/v1/ai/chat-hermes HTTP/1.1"
    for name, value in server.last.headers.items():
        if name != "connection":
            assert any(line.lower().partition(": ")[::2] == (name, value.lower()) for line in sent), name
    assert sent[-2] == server.last.body.decode()
    assert sent[-1] == f"the messages in it: {json.dumps(server.last.messages)}"
    came = [text for sign, text in shown if sign == "<"]
    assert came[0] == "HTTP/1.1 200 OK"
    assert "x-served-by: loopback" in came
    assert [ast.literal_eval(f"b{text!r}".replace("\\\\", "\\")) for text in came[-3:]] == pieces
    assert result.stderr.isascii()


def test_raw_asks_one_after_the_other(server: Loopback) -> None:
    """Without -m all five, none before the one before it is over. What is not understood is shown as it came."""
    page = b"<html>\n<title>Just a moment...</title></html>"
    server.answer = failing(llama=say([page], status="403 Forbidden", headers={"content-type": "text/html"}))
    result, shown = raw()
    assert ([*rows_of(result.stdout)], result.exit_code) == (MODELS, 1)
    assert "web page titled: Just a moment..." in result.stdout
    ends = [text for sign, text in shown if sign == "!" or "HTTP/1.1" in text]
    assert [text.split()[0] for text in ends] == ["POST", "HTTP/1.1", "the"] * 5
    assert [request.payload["aiAgent"] for request in server.requests] == [*ENDPOINTS]
    came = [text for sign, text in shown if sign == "<"]
    assert {"HTTP/1.1 403 Forbidden", "content-type: text/html", repr(page)[2:-1]} <= {*came}


def test_raw_of_a_refused_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    """What was to be sent, and why nothing came."""
    monkeypatch.setenv("AUTONOMOUS_BASE_URL", NOWHERE)
    result, shown = raw("-m", "autonomous-llama")
    assert rows_of(result.stdout)["autonomous-llama"][1] == "127.0.0.1:1: cannot connect: Connection refused"
    assert result.exit_code == 1
    assert {sign for sign, _ in shown} == {">", "!"}
    assert shown[-1] == ("!", "Connection refused")


def test_raw_shows_no_password(server: Loopback, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not that of a proxy, as it is or in Base64."""
    with Proxy() as proxy:
        monkeypatch.setenv("HTTP_PROXY", proxy.url_for("you:hidden"))
        result, _ = raw("-m", "autonomous-llama")
        assert proxy.credentials == {"you:hidden"}
    assert result.exit_code == 0
    for secret in ("hidden", "eW91OmhpZGRlbg"):
        assert secret not in result.output + result.stderr
