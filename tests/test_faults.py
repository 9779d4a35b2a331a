"""Faults on real connections: what the user gets of each, and that the next attempt inherits nothing of it."""

from __future__ import annotations

import asyncio
import functools
import zlib
from collections.abc import Callable
from typing import Any

import llm
import pytest
from conftest import Ask, ask_async, ask_sync
from loopback import DONE, Answer, Connection, Loopback, Request, delta, event
from proxies import PEM, Proxy, TlsLoopback, until

import llm_autonomous

GOOD = "llama heard: hi"
LOST = "the answer is incomplete: the connection was lost in the middle of the reply"
HEARD, HI, STOP = event(delta("llama heard: ")), event(delta("hi")), event(delta(finish_reason="stop"))
USAGE = event({"choices": [], "usage": {"prompt_tokens": 7}})
PAUSE = 0.25  # seconds

Step = bytes | float | Callable[[Connection], Any]
HEAD, END, STALL, DROP = Connection.head, Connection.end, Connection.stall, Connection.drop
REFUSE = functools.partial(Connection.head, status="503 Service Unavailable", headers={"retry-after": "0"})


def play(*steps: Step) -> Answer:
    """An answer in steps: bytes are sent as an HTTP chunk, and numbers are seconds to wait."""

    async def answer(request: Request, connection: Connection) -> None:
        for step in steps:
            if isinstance(step, bytes):
                await connection.send(step)
            else:
                await (asyncio.sleep(step) if isinstance(step, float) else step(connection))

    return answer


SLOW = {
    "head": play(PAUSE, HEAD, HEARD, HI, STOP + DONE, END),
    "text": play(HEAD, PAUSE, HEARD, HI, STOP + DONE, END),
    "rest": play(HEAD, HEARD, PAUSE, HI, STOP + DONE, END),
    "all": play(PAUSE, HEAD, PAUSE, HEARD, PAUSE, HI, STOP + DONE, END),
}
HELD_OPEN = play(HEAD, event(delta("hi", "stop")), STALL)


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch, no_backoff: None) -> None:
    """The waits for the end of a reply or an error are so short that an answer which inherits them fails."""
    monkeypatch.setattr(llm_autonomous, "END_TIMEOUT", 0.1)
    monkeypatch.setattr(llm_autonomous, "ERROR_BODY_TIMEOUT", 0.1)


# A wait belongs to its attempt


@pytest.mark.parametrize("before", SLOW)
@pytest.mark.parametrize("body", [[], [b"overloaded"] * 2], ids=["without a body", "with a body"])
def test_answer_after_a_refusal_has_its_own_time(
    before: str, body: list[bytes], ask: Ask, server: Loopback, short: None
) -> None:
    """After a 503, on the same connection, a model may think for longer than the body of an error may take."""
    server.answers += [play(REFUSE, *body, END), SLOW[before]]
    assert ask().text == GOOD
    assert len(server.requests) == 2


@pytest.mark.parametrize("through", ["proxy", "tls"])
def test_answer_after_a_refusal_through_a_proxy_or_tls(
    through: str, ask: Ask, server: Loopback, short: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same through a proxy, and over TLS."""
    monkeypatch.setenv("SSL_CERT_FILE", str(PEM))
    with Proxy() as proxy, TlsLoopback() as secure:
        asked = server if through == "proxy" else secure
        monkeypatch.setenv("AUTONOMOUS_BASE_URL", asked.url)
        asked.answers += [play(REFUSE, b"overloaded", END), SLOW["all"]]
        assert ask(**({"proxy": proxy.url} if through == "proxy" else {})).text == GOOD
        assert len(asked.requests) == 2


@pytest.mark.parametrize("before", SLOW)
def test_answer_after_a_reply_that_hurried_has_its_own_time(
    before: str, ask: Ask, server: Loopback, short: None
) -> None:
    """The little time that the end of one prompt's reply may take is not that of the next prompt's reply."""
    server.answers += [play(HEAD, HI, STOP, DONE, END), SLOW[before]]
    assert ask().text == "hi"
    assert ask().text == GOOD


def test_text_after_a_finish_reason_has_its_own_time(ask: Ask, server: Loopback, short: None) -> None:
    """A server that says too early that it has finished is waited for as soon as it goes on."""
    early, late = event(delta("a", "stop")) + event(delta("b")), event(delta("c", "stop"))
    server.answer = play(HEAD, early, PAUSE, late + DONE, END)
    assert ask().text == "abc"


def test_a_message_without_text_beside_a_delta_is_no_end(ask: Ask, server: Loopback, short: None) -> None:
    """The first chunk may have a role in both."""
    role = {"role": "assistant"}
    server.answer = play(HEAD, event({"choices": [{"delta": role, "message": role}]}), PAUSE, HI, STOP, DONE, END)
    assert ask().text == "hi"


@pytest.mark.parametrize(
    "end", [STALL, functools.partial(Connection.drip, data=b" and so on")], ids=["stalls", "drips"]
)
def test_body_of_an_error_has_a_limit(end: Step, ask: Ask, server: Loopback, short: None) -> None:
    """A refusal whose body does not end is tried again soon, without its connection; the answer has all its time."""
    server.answers += [play(REFUSE, b"overloaded", end), SLOW["head"]]
    assert ask().text == GOOD
    assert until(lambda: not server.open - {2})


@pytest.mark.parametrize("end", [STALL, functools.partial(Connection.drip, data=b" so")], ids=["stalls", "drips"])
def test_words_of_an_error_whose_body_does_not_end(end: Step, ask: Ask, server: Loopback, short: None) -> None:
    """The words that have come are shown."""
    server.answer = play(functools.partial(Connection.head, status="400 Bad Request"), b"no luck", end)
    assert "HTTP 400 Bad Request: no luck" in ask().line
    assert until(lambda: not server.open)


def test_answer_after_many_faults_in_a_row(ask: Ask, server: Loopback, short: None) -> None:
    """After a refusal that stalls and one that is whole, an answer is held open, and the next one is slow."""
    server.answers += [play(REFUSE, b"a", STALL), play(REFUSE, b"b", END), HELD_OPEN, SLOW["all"]]
    assert ask().text == "hi"
    assert ask().text == GOOD
    assert ask().text == GOOD


def test_waits_of_prompts_at_once_do_not_limit_each_other(server: Loopback, short: None) -> None:
    """While one reply is hurried to its end, the others of the same loop have all their time."""
    server.answers += [play(REFUSE, b"overloaded", END), HELD_OPEN] * 5
    server.answer = SLOW["all"]

    async def ask_at_once() -> set[str]:
        return {answer.text for answer in await asyncio.gather(*(ask_async() for _ in range(20)))}

    assert asyncio.run(ask_at_once()) == {GOOD, "hi"}
    assert ask_sync().text == GOOD


# The end of a reply


@pytest.mark.parametrize("coding", ["none", "gzip"])
@pytest.mark.parametrize(
    ("reply", "usage"),
    [(event(delta("hi", "stop")), None), (HI + STOP, None), (HI + STOP + USAGE, 7), (HI + STOP + USAGE + DONE, 7)],
    ids=["with the text", "alone", "usage", "DONE"],
)
def test_finish_reason_and_then_an_open_connection(
    reply: bytes, usage: int | None, coding: str, ask: Ask, server: Loopback, short: None
) -> None:
    """After a finish reason, the prompt waits a moment for what may still follow, and then it is done."""
    packer = zlib.compressobj(wbits=31)
    sent = reply if coding == "none" else packer.compress(reply) + packer.flush(zlib.Z_SYNC_FLUSH)
    server.answer = play(functools.partial(Connection.head, headers={"content-encoding": coding}), sent, STALL)
    answer = ask()
    assert answer.text == "hi"
    assert answer.response.input_tokens == usage
    assert until(lambda: not server.open)


def test_usage_that_comes_late_is_read(ask: Ask, server: Loopback, monkeypatch: pytest.MonkeyPatch) -> None:
    """Usage that follows a moment after the finish reason is there."""
    monkeypatch.setattr(llm_autonomous, "END_TIMEOUT", 60.0)
    server.answer = play(HEAD, HI, STOP, b": wait\n\n", PAUSE, USAGE, END)
    answer = ask()
    assert answer.text == "hi"
    assert answer.response.input_tokens == 7


def test_end_is_not_waited_for_longer_than_the_timeout(
    ask: Ask, server: Loopback, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever asks for a short timeout does not wait for what is no part of the answer."""
    monkeypatch.setattr(llm_autonomous, "END_TIMEOUT", 3600.0)
    server.answer = HELD_OPEN
    assert ask(timeout=1).text == "hi"


def test_comments_after_a_finish_reason_do_not_hold_the_prompt(ask: Ask, server: Loopback, short: None) -> None:
    """A server that keeps the connection alive for ever does not keep the prompt."""
    server.answer = play(HEAD, event(delta("hi", "stop")), functools.partial(Connection.drip, data=b": here\n\n"))
    assert ask().text == "hi"


# A reply that fails in the middle


FAULTS: dict[str, tuple[Step, str]] = {
    "dropped": (DROP, LOST),
    "reset": (functools.partial(Connection.drop, reset=True), LOST),
    "silent": (STALL, "the answer is incomplete: silent for 1 s"),
    "malformed": (functools.partial(Connection.raw, data=b"zz\r\n"), "the answer is incomplete: "),
    "cut": (functools.partial(Connection.raw, data=b'8\r\ndata: {"\r\n0\r\n\r\n'), "the answer is incomplete"),
    "error": (event({"error": "no luck"}), "the service reports an error: no luck"),
    "no JSON": (b"data: {nonsense\n\n", "the reply was not understood; it begins: {nonsense"),
    "words": (b"data: nonsense\n\n", "the answer is incomplete: the server sent: nonsense"),
    "page": (
        functools.partial(Connection.raw, data=b"f\r\n<title>x</title\r\n0\r\n\r\n"),
        "answered with a web page titled: x",
    ),
}


@pytest.mark.parametrize("tools", [None, [llm.Tool("add")]], ids=["plain", "tools"])
@pytest.mark.parametrize(("fault", "words"), FAULTS.values(), ids=FAULTS)
def test_text_before_a_fault_comes_out(
    fault: Step, words: str, tools: list[llm.Tool] | None, ask: Ask, server: Loopback
) -> None:
    """The user has all that arrived before the server failed, also what was held because it might begin a tool call.

    The line says what failed, and nothing is asked again.
    """
    server.answer = play(HEAD, event(delta("one <b")), fault)
    answer = ask(timeout=1 if fault is STALL else 120, tools=tools)
    assert "".join(answer.chunks) == "one <b"
    assert answer.line.startswith(f"127.0.0.1:{server.port}: {words}")
    assert len(server.requests) == 1


@pytest.mark.parametrize(
    "reply",
    [
        *(event(delta("Once", reason)) for reason in ("null", "None", "", "undefined", None)),
        event(delta("On", "stop")) + event(delta("ce")),
    ],
    ids=["null", "None", "empty", "undefined", "no reason", "text after the reason"],
)
def test_lost_connection_without_a_finish_reason_after_all_text(reply: bytes, ask: Ask, server: Loopback) -> None:
    """Only a finish reason after all the text says that it is all, and the word null is none."""
    server.answer = play(HEAD, reply, DROP)
    answer = ask()
    assert "".join(answer.chunks) == "Once"
    assert LOST in answer.line


@pytest.mark.parametrize("length", ["chunked", "content-length"])
@pytest.mark.parametrize("end", [DONE, STOP, STOP.rstrip()], ids=["done", "finish reason", "without its line end"])
def test_whole_answer_survives_its_connection(length: str, end: bytes, ask: Ask, server: Loopback) -> None:
    """Once the answer is whole, what becomes of the connection fails nothing."""
    head = HEAD if length == "chunked" else functools.partial(Connection.head, length=9999)
    send = HI + end if length == "chunked" else functools.partial(Connection.raw, data=HI + end)
    server.answer = play(head, send, DROP)
    assert ask().text == "hi"
