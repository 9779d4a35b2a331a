"""tests/bridge.py, in front of a small server with an OpenAI-compatible API."""

from __future__ import annotations

import json
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import bridge as bridge_module
import httpx
import llm
import pytest
from bridge import Bridge, Exchange, read_reply
from conftest import NOWHERE, PNG, USAGE, Ask, Start, complete, finish, interrupt, output_until, run
from loopback import DONE, Connection, Loopback, Request, delta, event, say
from proxies import cut, silent, until

BRIDGE = [sys.executable, str(Path(__file__).with_name("bridge.py"))]


@pytest.fixture
def upstream() -> Iterator[Loopback]:
    with Loopback(complete) as server:
        yield server


@pytest.fixture
def exchanges() -> list[Exchange]:
    """The exchanges that the bridge has recorded."""
    return []


@pytest.fixture
def bridge(upstream: Loopback, exchanges: list[Exchange], monkeypatch: pytest.MonkeyPatch) -> Iterator[Bridge]:
    """A `Bridge` to ``upstream`` that the models talk to."""
    fields = {"temperature": 0.0, "seed": 1}
    with Bridge(f"{upstream.url}/v1/", "tiny", fields, "secret", exchanges.append) as server:
        monkeypatch.setenv("AUTONOMOUS_BASE_URL", server.url)
        yield server


def body(stream: bool = True) -> dict[str, Any]:
    messages = "W3sicm9sZSI6ICJ1c2VyIiwgImNvbnRlbnQiOiAiaGkifV0="  # [{"role": "user", "content": "hi"}]
    return {"messages": messages, "threadId": "llama", "stream": stream, "aiAgent": "llama"}


def post(bridge: Bridge, stream: bool = True) -> httpx.Response:
    """What the bridge answers to a prompt, as it is."""
    return httpx.post(f"{bridge.url}/api/v1/ai/chat", json=body(stream), trust_env=False, timeout=60)


@pytest.mark.parametrize("stream", [True, False])
def test_a_prompt_is_answered_by_the_server_upstream(
    stream: bool, bridge: Bridge, upstream: Loopback, ask: Ask
) -> None:
    """The plugin's prompt goes to the chat completions of the other server, and its text and usage come back."""
    answer = ask("ü", system="Be brief", stream=stream)
    assert answer.text.strip() == "upstream heard: ü"
    assert (answer.response.input_tokens, answer.response.output_tokens) == (5, 2)
    assert (upstream.last.method, upstream.last.path) == ("POST", "/v1/chat/completions")
    assert upstream.last.headers["authorization"] == "Bearer secret"
    assert upstream.last.payload == {
        "model": "tiny",
        "temperature": 0.0,
        "seed": 1,
        "messages": [{"role": "system", "content": "Be brief"}, {"role": "user", "content": "ü"}],
        "stream": stream,
        **({"stream_options": {"include_usage": True}} if stream else {}),
    }


def test_images_are_passed_on_as_they_are(bridge: Bridge, upstream: Loopback, ask: Ask) -> None:
    """They are OpenAI's content parts already."""
    assert ask("See", model="autonomous-vision", attachments=[llm.Attachment(type="image/png", content=PNG)]).text
    text, image = upstream.last.payload["messages"][-1]["content"]
    assert text == {"type": "text", "text": "See"}
    assert image["image_url"]["url"].startswith("data:image/png;base64,iVBOR")


def test_a_stream_is_passed_on_byte_for_byte(bridge: Bridge, upstream: Loopback) -> None:
    """So that the plugin reads what such servers really send, also what the bridge does not understand."""
    pieces = [b": PROCESSING\r\n\r\n", event(delta("a")), b"data: {odd\n\n", event({"error": "no"}), DONE]
    upstream.answer = say(pieces)
    assert post(bridge).content == b"".join(pieces)


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("status", ["429 Too Many Requests", "401 Unauthorized", "500 Internal Server Error"])
def test_an_error_is_passed_on(status: str, stream: bool, bridge: Bridge, upstream: Loopback) -> None:
    """With its status, its words, their type, and how long to wait."""

    async def refuse(request: Request, connection: Connection) -> None:
        await connection.whole(b"Not now", status, {"content-type": "text/plain", "retry-after": "7"})

    upstream.answer = refuse
    reply = post(bridge, stream)
    assert f"{reply.status_code} {reply.reason_phrase}" == status
    assert (reply.text, reply.headers["content-type"], reply.headers["retry-after"]) == ("Not now", "text/plain", "7")


def test_a_server_that_cannot_be_reached_is_a_bad_gateway(
    monkeypatch: pytest.MonkeyPatch, exchanges: list[Exchange], no_backoff: None, ask: Ask
) -> None:
    """The plugin shows the reason."""
    with Bridge(f"{NOWHERE}/v1", "tiny", record=exchanges.append) as bridge:
        monkeypatch.setenv("AUTONOMOUS_BASE_URL", bridge.url)
        line = ask().line
    assert "HTTP 502 Bad Gateway: the bridge gets no answer from http://127.0.0.1:1/v1/chat/completions" in line
    assert exchanges[0]["error"].startswith("ConnectError: ")


def test_a_reply_that_breaks_off_upstream_breaks_off(
    bridge: Bridge, upstream: Loopback, exchanges: list[Exchange], ask: Ask
) -> None:
    """The text that came before is not taken to be the whole answer."""
    upstream.answer = cut(event(delta("half")))
    answer = ask()
    assert answer.chunks == ["half"]
    assert "incomplete" in answer.line
    assert until(lambda: exchanges)
    assert exchanges[0]["text"] == "half"
    assert exchanges[0]["error"].startswith("RemoteProtocolError: ")


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_cancels_the_request_upstream(
    stream: bool, bridge: Bridge, upstream: Loopback, exchanges: list[Exchange]
) -> None:
    """A model that nobody listens to should not go on computing."""
    upstream.answer = silent(event(delta("a")))
    with socket.create_connection(("127.0.0.1", bridge.port)) as client:
        data = json.dumps(body(stream))
        client.sendall(f"POST /api/v1/ai/chat HTTP/1.1\r\ncontent-length: {len(data)}\r\n\r\n{data}".encode())
        assert until(lambda: upstream.requests)
    assert until(lambda: not upstream.open)
    assert until(lambda: exchanges)
    assert exchanges[0]["error"] == "the client left"


def test_a_request_that_is_not_in_the_wire_format_is_refused(bridge: Bridge, upstream: Loopback) -> None:
    """It never reaches the other server."""
    reply = httpx.post(f"{bridge.url}/v1/chat/completions", json={"messages": []}, trust_env=False)
    assert reply.status_code == 400
    assert reply.json()["error"]["message"]
    assert not upstream.requests


STREAM = event(delta("a")) + event(delta("b", "stop")) + event({"choices": [], "usage": USAGE}) + DONE
REASONING = event({"choices": [{"delta": {"reasoning_content": "hm", "content": None}}]})
WHOLE = json.dumps({"choices": [{"message": {"content": "ü"}, "finish_reason": "length"}]}).encode()


@pytest.mark.parametrize(
    ("reply", "read"),
    [
        (STREAM, {"text": "ab", "finish_reason": "stop", "usage": USAGE}),
        (WHOLE, {"text": "ü", "finish_reason": "length"}),
        (REASONING, {"text": "", "reasoning": "hm"}),
        (b"<h1>Gone</h1>", {"text": "<h1>Gone</h1>"}),
        (b'{"error": "no"}', {"text": '{"error": "no"}'}),
        (event(delta("a")) + b'data: {"choi', {"text": 'a {"choi'}),
        (b'data: {"choices": ["odd"]}\n\n', {"text": ' {"choices": ["odd"]}'}),
        (b"", {"text": ""}),
    ],
    ids=["stream", "whole", "reasoning", "page", "error", "cut off", "odd", "nothing"],
)
def test_the_log_has_the_text_of_a_reply(reply: bytes, read: Exchange) -> None:
    """What cannot be read is there as it came."""
    assert read_reply(reply) == read


# The bridge, as a person runs it


def test_the_bridge_takes_options_and_writes_a_log(
    upstream: Loopback, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`python tests/bridge.py --to URL --model NAME llm ...`, with sampling options and a key in the environment."""

    def run_here(command: list[str], url: str) -> str:
        monkeypatch.setenv("AUTONOMOUS_BASE_URL", url)
        return run(*command[1:])

    monkeypatch.setattr(bridge_module, "run", run_here)
    monkeypatch.setenv("TINY_KEY", "secret")
    log = tmp_path / "log.jsonl"
    options = f"--to {upstream.url}/v1 --model tiny --temperature 0.5 --seed 3 --max-tokens 9 --key-variable TINY_KEY"
    command = ["--log", str(log), "llm", "-m", "autonomous-llama", "Hello", "--no-log"]
    assert bridge_module.main([*options.split(), *command]) == "upstream heard: Hello \n"
    sent = upstream.last.payload
    assert (sent["temperature"], sent["seed"], sent["max_tokens"]) == (0.5, 3, 9)
    assert upstream.last.headers["authorization"] == "Bearer secret"
    assert "secret" not in log.read_text()
    exchange = json.loads(log.read_text())
    assert exchange.pop("time")
    assert exchange.pop("seconds") >= 0
    assert exchange == {
        "model": "llama",
        "stream": True,
        "messages": [{"role": "user", "content": "Hello"}],
        "status": 200,
        "text": "upstream heard: Hello ",
        "finish_reason": "stop",
        "usage": USAGE,
    }


def test_the_bridge_serves_until_ctrl_c(start: Start) -> None:
    """Without a command it prints the line to export, and ends with exit code 0."""
    process = start(*BRIDGE, "--to", f"{NOWHERE}/v1", "--model", "tiny")
    assert output_until(process, "\n").startswith("export AUTONOMOUS_BASE_URL=http://127.0.0.1:")
    interrupt(process)
    assert finish(process) == ("", "", 0)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (f"--to {NOWHERE} --model tiny --key-variable NO_SUCH_KEY no-such-command", "NO_SUCH_KEY is not set"),
        ("--to 127.0.0.1:8080 --model tiny no-such-command", "--to must be an http:// or https:// URL"),
    ],
)
def test_what_is_wrong_with_the_options_is_said_at_once(
    arguments: str, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Before any prompt is sent."""
    with pytest.raises(SystemExit):
        bridge_module.main(arguments.split())
    assert words in capsys.readouterr().err
