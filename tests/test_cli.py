"""The `llm` command line against the loopback server, end to end; in processes of its own where they are the point."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import llm
import pytest
from conftest import NOWHERE, PNG, Ask, Chain, Start, finish, interrupt, invoke, output_until, run
from llm.parts import assistant, system
from loopback import Connection, Loopback, Request, say, speak

REFUSED = "Error: 127.0.0.1:1: cannot connect: Connection refused (3 attempts)\n"
LOOPBACK = [sys.executable, str(Path(__file__).with_name("loopback.py"))]
IGNORING_CTRL_C = ["sh", "-c", 'trap "" INT; exec "$@"', "sh"]  # as a script's shell starts a command with `&`


def replies(stdout: str) -> str:
    """What `llm chat` printed from the first prompt on."""
    return stdout[stdout.index("\n> ") + 1 :]


# Prompts


@pytest.mark.parametrize("settings", [[], ["--async", "--no-stream"]], ids=["streamed", "whole and async"])
def test_a_prompt_is_answered_and_logged(server: Loopback, settings: list[str]) -> None:
    """The log has the model behind it, tokens, options, and the envelope without the text again."""
    response = "llama heard: Hello there\nSystem prompt: Be brief"
    command = ["-m", "autonomous-llama", "Hello there", "-s", "Be brief", "-o", "timeout", "5"]
    assert run(*command, *settings) == response + "\n"
    assert server.last.payload["stream"] is ("--no-stream" not in settings)
    [row] = json.loads(run("logs", "-n", "1", "--json"))
    expected = {
        "model": "autonomous-llama",
        "resolved_model": "llama-3.3-70b",
        "prompt": "Hello there",
        "system": "Be brief",
        "response": response,
        "options_json": {"timeout": 5.0},
        "input_tokens": 4,
        "output_tokens": 8,
        "response_json": {
            "id": "chatcmpl-loopback",
            "model": "llama-3.3-70b",
            "created": 1738368000,
            "finish_reason": "stop",
            "usage": {"prompt_tokens": 4, "completion_tokens": 8, "total_tokens": 12},
        },
    }
    assert {key: row[key] for key in expected} == expected


def test_a_prompt_can_be_piped_in_for_the_default_model(server: Loopback) -> None:
    """`llm models default` takes any name of the model; what comes through a pipe stands before the prompt."""
    run("models", "default", "autonomous-qwen-coder")
    assert run("Explain", typed="print('Привет 𝄞')\n").startswith("qwen_coder heard: ")
    assert server.last.messages == [{"role": "user", "content": "print('Привет 𝄞')\n Explain"}]


def test_an_image_goes_to_vision_and_a_note_of_it_to_the_next_model(server: Loopback, tmp_path: Path) -> None:
    """`-a` sends the file, and `llm -c -m autonomous-llama` goes on without it."""
    picture = tmp_path / "image.png"
    picture.write_bytes(PNG)
    assert run("-m", "autonomous-vision", "What?", "-a", str(picture)) == (
        "vision heard: What?\nPictures: data:image/png;base64\n"
    )
    picture.unlink()
    run("-c", "-m", "autonomous-llama", "Sure?")
    assert server.last.payload["aiAgent"] == "llama"
    assert server.last.messages == [
        {"role": "user", "content": "What?\n[image/png attachment, not shown to this model]"},
        {"role": "assistant", "content": "vision heard: What?\nPictures: data:image/png;base64"},
        {"role": "user", "content": "Sure?"},
    ]


def test_a_conversation_goes_on_over_three_commands(server: Loopback) -> None:
    """`-c` sends the whole conversation each time, streamed or not, sync or async."""
    run("-m", "autonomous-hermes", "one", "-s", "Be brief")
    run("-c", "two", "--async")
    run("-c", "three", "--no-stream")
    system, *turns = server.last.messages
    assert system == {"role": "system", "content": "Be brief"}
    assert [message["role"] for message in turns] == ["user", "assistant", "user", "assistant", "user"]
    assert [message["content"] for message in turns[::2]] == ["one", "two", "three"]
    assert turns[1]["content"] == "hermes heard: one\nSystem prompt: Be brief"
    assert turns[3]["content"].startswith("hermes heard: two\nSystem prompt: Be brief\nMessages before: 2")


# Chats


def test_a_chat_ends_in_one_line_when_a_turn_fails_and_can_go_on(server: Loopback) -> None:
    """No traceback, exit code 1, the turn before it was shown; and `llm chat -c` has that turn."""
    server.answers.extend([speak(), say([b'{"detail": "no more today"}'], status="403 Forbidden")])
    stdout, stderr, code = invoke("chat", "-m", "autonomous-hermes", "-s", "Be brief", typed="hi\nagain\nexit\n")
    assert replies(stdout) == "> hi\nhermes heard: hi\nSystem prompt: Be brief\n> again\n"
    assert server.connections == 1
    assert stderr == f"Error: 127.0.0.1:{server.port}: HTTP 403 Forbidden: no more today\n"
    assert code == 1
    shown = run("chat", "-c", typed="again\nexit\n")
    assert "\nMessages before: 2, the last: hermes heard: hi\n" in shown


# What goes wrong


def test_a_refused_connection_is_one_line_in_every_command(monkeypatch: pytest.MonkeyPatch, no_backoff: None) -> None:
    """Host, port and reason, the attempts made, no traceback, exit code 1."""
    monkeypatch.setenv("AUTONOMOUS_BASE_URL", NOWHERE)
    prompt = ["-m", "autonomous-llama", "hi"]
    for command in (prompt, [*prompt, "--async"], [*prompt, "--no-stream"]):
        assert invoke(*command) == ("", REFUSED, 1)
    stdout, stderr, code = invoke("chat", "-m", "autonomous-llama", typed="hi\n")
    assert (replies(stdout), stderr, code) == ("> hi\n", REFUSED, 1)


# The loopback server: what it says, and as a person runs it

PICTURE = [llm.Attachment(type="image/png", content=PNG)]


def add(a: int, b: int) -> int:
    """Add two numbers"""
    return a + b


@pytest.mark.parametrize(
    ("prompt", "said"),
    [
        ({"prompt": "", "system": "Be brief"}, "vision heard: \nSystem prompt: Be brief"),
        ({"prompt": "", "system": "Be brief", "schema": {"type": "string"}}, '""'),
        ({"messages": [assistant("one,")]}, "vision heard: one,"),
        ({"messages": [system("Count"), assistant("one,")]}, "vision heard: one,\nSystem prompt: Count"),
        ({"attachments": PICTURE}, "vision heard: \nPictures: data:image/png;base64"),
    ],
)
def test_the_loopback_answers_without_words_of_a_user(
    ask: Ask, server: Loopback, prompt: dict[str, Any], said: str
) -> None:
    """A system prompt alone, an answer that was begun, a picture alone: no request ends its connection."""
    assert ask(**{"prompt": None, **prompt}, model="autonomous-vision").text == said


@pytest.mark.parametrize(
    ("prompt", "given", "said"),
    [
        ("See", {}, "vision heard: Be brief\n\nSee\nPictures: data:image/png;base64"),
        ("See", {"tools": [add]}, "vision heard: Be brief\n\nSee\nPictures: data:image/png;base64"),
        ("See", {"schema": {"type": "string"}}, '"Be brief\\n\\nSee"'),
        ('Call add with {"a": 1, "b": 2}', {"tools": [add]}, "vision: add said 3"),
        ('Call add with {"a": 1, "b": 2}', {"tools": [add], "schema": {"type": "integer"}}, "3"),
    ],
)
def test_the_loopback_follows_a_system_prompt_beside_a_picture(
    chain: Chain, server: Loopback, prompt: str, given: dict[str, Any], said: str
) -> None:
    """Such a system prompt stands at the beginning of the first message, with the tools and the schema in it."""
    assert chain(prompt, model="autonomous-vision", system="Be brief", attachments=PICTURE, **given).text == said


def test_a_fault_of_the_loopback_itself_is_seen_at_once(
    ask: Ask, server: Loopback, capfd: pytest.CaptureFixture[str], no_backoff: None
) -> None:
    """A person sees the traceback on standard error while it serves; a test would fail at its end."""

    async def answer(request: Request, connection: Connection) -> None:
        raise LookupError("a fault in the server")

    server.answer = answer
    assert "the connection was lost" in ask().line
    assert "LookupError: a fault in the server" in capfd.readouterr().err
    assert server.errors
    server.errors.clear()


@pytest.mark.parametrize(
    ("script", "code"),
    [("raise SystemExit(7)", 7), ("import os; os.kill(os.getpid(), 15)", 128 + signal.SIGTERM), (None, 127)],
    ids=["exit", "signal", "not found"],
)
def test_the_loopback_leaves_with_the_exit_code_of_its_command(script: str | None, code: int, start: Start) -> None:
    """As a shell does, also for a command that a signal ended or that is not there."""
    command = [sys.executable, "-c", script] if script else ["no-such-command"]
    stdout, stderr, exit_code = finish(start(*LOOPBACK, *command))
    assert (stdout, exit_code) == ("", code)
    assert "Traceback" not in stderr


@pytest.mark.parametrize("shell", [[], IGNORING_CTRL_C], ids=["as usual", "with &"])
def test_the_loopback_serves_until_ctrl_c(shell: list[str], start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a command it prints the line to export, answers there, and ends with exit code 0."""
    process = start(*shell, *LOOPBACK)
    variable, _, url = output_until(process, "\n").strip().partition("=")
    assert variable == "export AUTONOMOUS_BASE_URL"
    monkeypatch.setenv("AUTONOMOUS_BASE_URL", url)
    assert invoke("-m", "autonomous-summary", "Hello", "--no-log") == ("summary heard: Hello\n", "", 0)
    interrupt(process)
    assert finish(process) == ("", "", 0)


@pytest.mark.parametrize("shell", [[], IGNORING_CTRL_C], ids=["as usual", "with &"])
def test_ctrl_c_is_for_the_command_that_the_loopback_runs(shell: list[str], start: Start) -> None:
    """At a terminal both get it; the loopback goes on serving until the command has ended."""
    script = """if True:
        import time
        try:
            print("ready", flush=True)
            while True:
                time.sleep(0.01)
        except KeyboardInterrupt:
            raise SystemExit(5)
    """
    process = start(*shell, *LOOPBACK, sys.executable, "-c", script)
    assert output_until(process, "\n") == "ready\n"
    os.killpg(process.pid, signal.SIGINT)
    assert finish(process) == ("", "", 5)
