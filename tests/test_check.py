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
from conftest import Start, finish, invoke, output_until
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


async def never(request: Request, connection: Connection) -> None:
    """Not a byte."""
    await connection.stall()


async def head_only(request: Request, connection: Connection) -> None:
    """A good beginning, and then nothing."""
    await connection.head()
    await connection.stall()


async def drip(request: Request, connection: Connection) -> None:
    """Comments for ever, which are not silence and not an answer."""
    await connection.head()
    await connection.drip(b": still here\n\n")


async def endless(request: Request, connection: Connection) -> None:
    """Text for ever."""
    await connection.head()
    await connection.drip(event(delta("and ")))


# What it shows


def test_every_model_has_a_row(server: Loopback) -> None:
    """Model, endpoint, and ok with the seconds to the first text, in columns; exit code 0."""
    result = check()
    assert result.exit_code == 0
    rows = rows_of(result.output)
    assert {model: endpoint for model, (endpoint, _) in rows.items()} == {
        f"autonomous-{name}": endpoint for name, endpoint in ENDPOINTS.items()
    }
    assert all(re.fullmatch(r"ok, \d+\.\d\d s", shown) for _, shown in rows.values())
    lines = result.output.splitlines()
    assert {(line.index(" : "), line.rindex(" : ")) for line in lines} == {(21, 35)}, "the columns are aligned"


def test_each_model_is_asked_once_for_a_word(server: Loopback) -> None:
    """A short prompt to each, streamed as prompts are."""
    check()
    assert sorted(request.payload["aiAgent"] for request in server.requests) == sorted(ENDPOINTS)
    for request in server.requests:
        assert request.messages == [{"role": "user", "content": "Reply with one word: OK"}]
        assert request.payload["stream"] is True


def test_one_model_that_fails_fails_the_check(server: Loopback) -> None:
    """Its row has the error, the others are ok, and the exit code is 1."""
    server.answer = failing("hermes", say([b'{"error": {"message": "no GPU left"}}'], status="503 Service Unavailable"))
    result = check()
    rows = rows_of(result.output)
    assert rows.pop("autonomous-hermes") == (
        "chat-hermes",
        f"127.0.0.1:{server.port}: HTTP 503 Service Unavailable: no GPU left",
    )
    assert len(rows) == 4
    assert all(shown.startswith("ok, ") for _, shown in rows.values())
    assert result.exit_code == 1


def test_nothing_is_tried_again(server: Loopback) -> None:
    """It reports what is: five requests, though a 503 is worth another attempt to a prompt."""
    server.answer = say([], status="503 Service Unavailable", headers={"retry-after": "0"})
    result = check()
    assert len(server.requests) == 5
    assert "attempts" not in result.output


def test_nothing_listening_is_a_reason_for_each_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Host and port, and what the operating system says."""
    monkeypatch.setenv("AUTONOMOUS_BASE_URL", "http://127.0.0.1:1")
    result = check()
    reasons = {shown for _, shown in rows_of(result.output).values()}
    assert reasons == {"127.0.0.1:1: cannot connect: Connection refused"}
    assert result.exit_code == 1


@pytest.mark.parametrize("answer", [never, head_only, drip, endless], ids=lambda answer: answer.__name__)
def test_a_server_that_does_not_come_to_an_end_is_given_up(server: Loopback, answer: Answer) -> None:
    """`--timeout` bounds the whole answer, whatever the server does to look alive."""
    server.answer = answer
    result = check("--timeout", "0.2")
    assert rows_of(result.output) == {
        f"autonomous-{name}": (endpoint, f"127.0.0.1:{server.port}: no whole answer within 0.2 s")
        for name, endpoint in ENDPOINTS.items()
    }
    assert result.exit_code == 1


def test_the_connections_of_a_check_are_closed(server: Loopback) -> None:
    """Those of models that answered, and those that were given up."""
    server.answer = failing("summary", never)
    check("--timeout", "0.5")
    assert server.connections == 5
    assert until(lambda: not server.open)


def test_a_row_appears_when_it_is_known(server: Loopback, start: Start) -> None:
    """The row of a model that answered is there while another is still silent."""
    release = threading.Event()

    async def late(request: Request, connection: Connection) -> None:
        while not release.is_set():
            await asyncio.sleep(0.01)
        await speak()(request, connection)

    server.answer = failing("llama", late)
    process = start("llm", "autonomous", "check", "-m", "autonomous-llama", "-m", "autonomous-vision", url=server.url)
    try:
        assert output_until(process, "\n").startswith("autonomous-vision")
    finally:
        release.set()
    stdout, stderr, code = finish(process)
    assert stdout.startswith("autonomous-llama ")
    assert (stderr, code) == ("", 0)


def test_a_person_at_a_terminal_sees_that_something_is_under_way(server: Loopback, start: Start) -> None:
    """A line on stderr before the first answer, which a pipe or a script does not get."""
    release = threading.Event()

    async def late(request: Request, connection: Connection) -> None:
        while not release.is_set():
            await asyncio.sleep(0.01)
        await speak()(request, connection)

    server.answer = late
    terminal, its_end = pty.openpty()
    try:
        process = start("llm", "autonomous", "check", url=server.url, stderr=its_end)
        os.close(its_end)
        shown = os.read(terminal, 1000).decode()
        release.set()
        stdout, _, code = finish(process)
    finally:
        release.set()
        os.close(terminal)
    assert shown == f"Asking 5 models at 127.0.0.1:{server.port}, for up to 20 s ...\r\n"
    assert (len(rows_of(stdout)), code) == (5, 0)


# Which models


def test_models_are_named_by_id_or_alias(server: Loopback) -> None:
    """`-m` may be repeated, and a model that is named twice is asked once."""
    result = check("-m", "autonomous", "-m", "autonomous-vision", "-m", "autonomous-llama", "-m", "hermes-3")
    assert set(rows_of(result.output)) == {"autonomous-llama", "autonomous-vision", "autonomous-hermes"}
    assert len(server.requests) == 3
    assert result.exit_code == 0


def test_models_that_are_not_named_do_not_count(server: Loopback) -> None:
    """The exit code is that of the models that were asked."""
    server.answer = failing("hermes", say([], status="500 Internal Server Error"))
    assert check("-m", "autonomous-summary").exit_code == 0
    assert check("-m", "autonomous-summary", "-m", "autonomous-hermes").exit_code == 1


@pytest.mark.parametrize(
    ("model", "error"),
    [
        ("autonomous-gpt", "Unknown model: autonomous-gpt"),
        ("llama", "Unknown model: llama"),
        ("gpt-4o-mini", "only the models of Autonomous AI can be checked: llm models -q autonomous"),
    ],
)
def test_a_model_that_is_not_ours_is_an_error(server: Loopback, model: str, error: str) -> None:
    """One line, and no model is asked, not even those that are named rightly."""
    result = check("-m", "autonomous-llama", "-m", model)
    assert (result.output, result.exit_code) == (f"Error: {error}\n", 1)
    assert server.requests == []


# For scripts


def test_json_has_the_rows(server: Loopback) -> None:
    """An array in the order of the models: numbers as numbers, and the error where there is one."""
    server.answer = failing("vision", say([b"<title>Just a moment...</title>"], status="403 Forbidden"))
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
    """A first text that came is reported, though the answer failed behind it."""
    server.answer = endless
    [row] = json.loads(check("--json", "--timeout", "0.5", "-m", "autonomous-llama").output)
    assert (row["ok"], row["error"].endswith("no whole answer within 0.5 s")) == (False, True)
    assert 0 < row["seconds"] < 0.5


def test_json_of_a_check_that_is_fine_exits_with_0(server: Loopback) -> None:
    """Also for scripts, the exit code says it all."""
    assert check("--json").exit_code == 0


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
    server.answer = never
    rows = rows_of(check("-o", "timeout", "0.3", "-m", "autonomous-llama").output)
    assert rows["autonomous-llama"][1] == f"127.0.0.1:{server.port}: silent for 0.3 s; -o timeout sets the limit"


@pytest.mark.parametrize(
    ("option", "words"),
    [
        (("proxy", "ftp://proxy"), "proxy: Value error, must be an http://, https://"),
        (("proxy", "http://me:hunter2@proxy"), "set HTTPS_PROXY instead"),
        (("proxy", "me:hunter2@proxy"), "set HTTPS_PROXY instead"),
        (("timeout", "0"), "timeout: Input should be greater than 0"),
        (("temperature", "1"), "temperature: Extra inputs are not permitted"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else None,
)
def test_an_option_that_is_refused_is_one_line(server: Loopback, option: tuple[str, str], words: str) -> None:
    """What is wrong with it, never a password, and no model is asked."""
    result = check("-o", *option)
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


def test_a_base_url_that_is_none_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """The variable is named once, not for each model."""
    monkeypatch.setenv("AUTONOMOUS_BASE_URL", "nonsense")
    result = check()
    assert result.output.startswith("Error: AUTONOMOUS_BASE_URL must be an http:// or https:// URL")
    assert (result.output.count("\n"), result.exit_code) == (1, 1)


# What it leaves


@pytest.mark.parametrize("answer", [speak(), say([], status="500 Internal Server Error")], ids=["ok", "failing"])
def test_nothing_is_logged(server: Loopback, user_path: Path, answer: Answer) -> None:
    """No database is made, and nothing else is written."""
    server.answer = answer
    stdout, stderr, _ = invoke("autonomous", "check")
    assert (len(rows_of(stdout)), stderr) == (5, "")
    assert list(user_path.rglob("*")) == []


# Its help


def test_the_help_of_the_group_names_the_command() -> None:
    """`llm autonomous --help` says what there is."""
    shown = CliRunner().invoke(cli, ["autonomous", "--help"])
    assert shown.exit_code == 0
    assert re.search(r"\n  check  Ask each model for one word", shown.output)


def test_the_help_of_the_command_says_what_a_user_needs() -> None:
    """The options, the default timeout, the exit code, and that nothing is logged."""
    shown = check("--help")
    words = " ".join(shown.output.split())
    assert shown.exit_code == 0
    for said in ("-m, --model", "can be repeated", "--timeout", "default: 20.0", "-o, --option", "proxy", "--json"):
        assert said in words
    assert "The exit code is 0 if all models answer, and 1 otherwise." in words
    assert "Nothing is logged." in words


def test_llm_help_lists_the_group() -> None:
    """`llm --help` has a line for it."""
    assert re.search(
        r"\n  autonomous +Find out which models of Autonomous AI answer\n", CliRunner().invoke(cli, ["--help"]).output
    )


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


def test_raw_of_a_web_page(server: Loopback) -> None:
    """What is not understood is shown as it came, and the row has the error."""
    page = b"<html>\n<title>Just a moment...</title></html>"
    server.answer = say([page], status="403 Forbidden", headers={"content-type": "text/html"})
    result, shown = raw("-m", "autonomous-llama")
    assert result.exit_code == 1
    assert "web page titled: Just a moment..." in result.stdout
    assert ("<", "HTTP/1.1 403 Forbidden") in shown
    assert ("<", "content-type: text/html") in shown
    assert ("<", repr(page)[2:-1]) in shown


def test_raw_of_a_refused_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    """What was to be sent, and why nothing came."""
    monkeypatch.setenv("AUTONOMOUS_BASE_URL", "http://127.0.0.1:1")
    result, shown = raw("-m", "autonomous-llama")
    assert result.exit_code == 1
    assert "cannot connect: Connection refused" in result.stdout
    assert [sign for sign, _ in shown].count("<") == 0
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
