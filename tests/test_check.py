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
from conftest import NOWHERE, Start, finish, invoke, output_until
from llm.cli import cli
from loopback import ENDPOINTS, Answer, Connection, Loopback, Request, delta, event, say, speak
from proxies import Proxy, until

MODELS = [f"autonomous-{name}" for name in ENDPOINTS]


def check(*arguments: str) -> Result:
    """The command, run in this process."""
    return CliRunner().invoke(cli, ["autonomous", "check", *arguments])


def rows_of(shown: str) -> dict[str, tuple[str, str]]:
    """The endpoint and the result of each model in a table."""
    rows = [line.split(" : ", 2) for line in shown.splitlines()]
    return {model.rstrip(): (endpoint.rstrip(), result) for model, endpoint, result in rows}


def failing(name: str, failure: Answer) -> Answer:
    """An answer that is ``failure`` for one model, and follows the protocol for the others."""

    async def answer(request: Request, connection: Connection) -> None:
        await (failure if request.payload["aiAgent"] == name else speak())(request, connection)

    return answer


def unending(begin: bool, *pieces: bytes) -> Answer:
    """An answer that never ends: silence, or the same pieces again and again, with or without a good beginning."""

    async def answer(request: Request, connection: Connection) -> None:
        if begin:
            await connection.head()
        await (connection.drip(*pieces) if pieces else connection.stall())

    return answer


NEVER = unending(False)
ENDLESS = unending(True, event(delta("and ")))


def late(release: threading.Event) -> Answer:
    """An answer that follows the protocol, once it is released."""

    async def answer(request: Request, connection: Connection) -> None:
        await asyncio.to_thread(release.wait)
        await speak()(request, connection)

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
    """Its row has the error, the others are ok, and the exit code is 1."""
    server.answer = failing("hermes", say([b'{"error": {"message": "no GPU left"}}'], status="503 Service Unavailable"))
    result = check()
    rows = rows_of(result.output)
    error = f"127.0.0.1:{server.port}: HTTP 503 Service Unavailable: no GPU left"
    assert rows.pop("autonomous-hermes") == ("chat-hermes", error)
    assert len(rows) == 4
    assert all(shown.startswith("ok, ") for _, shown in rows.values())
    assert result.exit_code == 1


def test_nothing_is_tried_again(server: Loopback) -> None:
    """It reports what is: five requests, though a 503 is worth another attempt to a prompt."""
    server.answer = say([], status="503 Service Unavailable", headers={"retry-after": "0"})
    result = check()
    assert len(server.requests) == 5
    assert "attempts" not in result.output


@pytest.mark.parametrize(
    "answer",
    [NEVER, unending(True), unending(True, b": still here\n\n"), ENDLESS],
    ids=["silence", "silence after the head", "comments", "text"],
)
def test_a_server_that_does_not_come_to_an_end_is_given_up(server: Loopback, answer: Answer) -> None:
    """`--timeout` bounds the whole answer, whatever the server does to look alive. All connections are closed."""
    server.answer = failing("summary", answer)
    result = check("--timeout", "0.5", "-m", "autonomous-summary", "-m", "autonomous-llama")
    given_up = f"127.0.0.1:{server.port}: no whole answer within 0.5 s"
    assert rows_of(result.output)["autonomous-summary"] == ("summary", given_up)
    assert result.exit_code == 1
    assert until(lambda: not server.open)


def test_a_row_appears_when_it_is_known(server: Loopback, start: Start) -> None:
    """The row of a model that answered is there while another is still silent."""
    release = threading.Event()
    server.answer = failing("llama", late(release))
    process = start("llm", "autonomous", "check", "-m", "autonomous-llama", "-m", "autonomous-vision", url=server.url)
    try:
        assert output_until(process, "\n").startswith("autonomous-vision")
    finally:
        release.set()
    stdout, stderr, code = finish(process)
    assert (stdout.split()[0], stderr, code) == ("autonomous-llama", "", 0)


def test_a_person_at_a_terminal_sees_that_something_is_under_way(server: Loopback, start: Start) -> None:
    """A line on stderr before the first answer, which a pipe or a script does not get."""
    release = threading.Event()
    server.answer = late(release)
    terminal, its_end = pty.openpty()
    try:
        process = start("llm", "autonomous", "check", url=server.url, stderr=its_end)
        os.close(its_end)
        shown = os.read(terminal, 1000).decode()
    finally:
        release.set()
        stdout, _, code = finish(process)
        os.close(terminal)
    assert shown == f"Asking 5 models at 127.0.0.1:{server.port}, for up to 20 s ...\r\n"
    assert (len(rows_of(stdout)), code) == (5, 0)


# Which models


def test_models_are_named_by_id_or_alias(server: Loopback) -> None:
    """`-m` may be repeated; a model that is named twice is asked once, and one that is not named does not count."""
    server.answer = failing("summary", say([], status="500 Internal Server Error"))
    result = check("-m", "autonomous", "-m", "autonomous-vision", "-m", "autonomous-llama", "-m", "hermes-3")
    assert set(rows_of(result.output)) == {"autonomous-llama", "autonomous-vision", "autonomous-hermes"}
    assert (len(server.requests), result.exit_code) == (3, 0)
    assert check("-m", "autonomous-vision", "-m", "autonomous-summary").exit_code == 1


# For scripts


def test_json_has_the_rows(server: Loopback) -> None:
    """An array in the order of the models: numbers as numbers, and the error where there is one."""
    server.answer = failing("vision", say([b"<title>Just a moment...</title>"], status="403 Forbidden"))
    assert check("--json", "-m", "autonomous-llama").exit_code == 0
    result = check("--json")
    rows = json.loads(result.output)
    error = f"127.0.0.1:{server.port}: HTTP 403 Forbidden: answered with a web page titled: Just a moment..."
    assert [row["model"] for row in rows] == MODELS
    assert rows[3] == {"model": "autonomous-vision", "endpoint": "chat-vision", "ok": False, "error": error}
    for row in (*rows[:3], rows[4]):
        assert sorted(row) == ["endpoint", "model", "ok", "seconds"]
        assert (row["ok"], 0 < row["seconds"] < 20) == (True, True)
    assert result.exit_code == 1


def test_json_keeps_the_time_of_a_text_that_did_not_end(server: Loopback) -> None:
    """A first text that came is reported, though the answer failed after it."""
    server.answer = ENDLESS
    [row] = json.loads(check("--json", "--timeout", "2", "-m", "autonomous-llama").output)
    assert (row["ok"], row["error"].endswith("no whole answer within 2 s")) == (False, True)
    assert 0 < row["seconds"] < 2


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
    server.answer = NEVER
    rows = rows_of(check("-o", "timeout", "0.3", "-m", "autonomous-llama").output)
    assert rows["autonomous-llama"][1] == f"127.0.0.1:{server.port}: silent for 0.3 s; -o timeout sets the limit"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("-o proxy ftp://proxy", "proxy: Value error, must be an http://, https://"),
        ("-o proxy http://me:hunter2@proxy", "set HTTPS_PROXY instead"),
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
    """What is wrong, once, and never a password; no model is asked, not even one that is named rightly."""
    if "BASE_URL" in words:
        monkeypatch.setenv("AUTONOMOUS_BASE_URL", "nonsense")
    result = check(*arguments.split())
    assert result.output.startswith("Error: ")
    assert words in result.output
    assert "hunter2" not in result.output
    assert (result.output.count("\n"), result.exit_code, server.requests) == (1, 1, [])


@pytest.mark.parametrize("timeout", ["0", "-1", "soon", "1e9", "nan"])
def test_a_timeout_that_is_none_is_refused(server: Loopback, timeout: str) -> None:
    """Zero, less, words, weeks: a usage error, exit code 2."""
    result = check("--timeout", timeout)
    assert (result.exit_code, server.requests) == (2, [])
    assert "Invalid value for '--timeout'" in result.output


@pytest.mark.parametrize("answer", [speak(), say([], status="500 Internal Server Error")], ids=["ok", "failing"])
def test_nothing_is_logged(server: Loopback, user_path: Path, answer: Answer) -> None:
    """No database is made, and nothing else is written."""
    server.answer = answer
    stdout, stderr, _ = invoke("autonomous", "check")
    assert (len(rows_of(stdout)), stderr) == (5, "")
    assert list(user_path.rglob("*")) == []


# Its help


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("--help", "autonomous Find out which models of Autonomous AI answer"),
        ("autonomous --help", "check Ask each model for one word"),
        ("autonomous check --help", "-m, --model TEXT Model to ask, can be repeated"),
        ("autonomous check --help", "Seconds to wait for each whole answer [default: 20.0]"),
        ("autonomous check --help", "-o proxy URL"),
        ("autonomous check --help", "--json"),
        ("autonomous check --help", "Nothing is logged. The exit code is 0 if all models answer, and 1 otherwise."),
    ],
)
def test_the_help_says_what_a_user_needs(command: str, words: str) -> None:
    """`llm --help` leads to the group, the group to the command, and the command to its options and exit code."""
    stdout, _, code = invoke(*command.split())
    assert (words in " ".join(stdout.split()), code) == (True, 0)


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
    """Without -m all five are asked, none before the one before it is over."""
    result, shown = raw()
    assert list(rows_of(result.stdout)) == MODELS
    ends = [text for sign, text in shown if sign == "!" or "HTTP/1.1" in text]
    assert [text.split()[0] for text in ends] == ["POST", "HTTP/1.1", "the"] * 5
    assert [request.payload["aiAgent"] for request in server.requests] == list(ENDPOINTS)


def test_raw_shows_what_is_not_understood_as_it_came(server: Loopback) -> None:
    """A web page: its status, headers and bytes; the row has the error."""
    page = b"<html>\n<title>Just a moment...</title></html>"
    server.answer = say([page], status="403 Forbidden", headers={"content-type": "text/html"})
    result, shown = raw("-m", "autonomous-llama")
    assert result.exit_code == 1
    assert "web page titled: Just a moment..." in result.stdout
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
