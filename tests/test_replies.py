"""Odd replies, over a real connection: what the user gets of each, and what the next attempt inherits of it: nothing.

Each was once answered wrongly.
"""

from __future__ import annotations

import asyncio
import gzip
import json
import logging
from collections.abc import Sequence

import pytest
from conftest import Ask, ask_async, ask_sync
from loopback import DONE, Answer, Connection, Loopback, Request, delta, event, say, speak
from proxies import PEM, Proxy, TlsLoopback, until

import llm_autonomous

GOOD = "llama heard: hi"
STOP = event(delta(finish_reason="stop"))


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch, no_backoff: None) -> None:
    """The wait for the end of a reply is so short that an answer which inherits it fails."""
    monkeypatch.setattr(llm_autonomous, "END_TIMEOUT", 0.1)


def slow(*pauses_before: str) -> Answer:
    """The usual answer, with 0.25 s of silence before its ``head``, its ``text`` or within it (``rest``)."""

    async def answer(request: Request, connection: Connection) -> None:
        for step in ("head", "text", "rest"):
            if step in pauses_before:
                await asyncio.sleep(0.25)
            if step == "head":
                await connection.head()
            else:
                await connection.send(event(delta("llama heard: " if step == "text" else "hi")))
        await connection.send(STOP + DONE)
        await connection.end()

    return answer


def refusal(*pieces: bytes, stall: bool = False) -> Answer:
    async def answer(request: Request, connection: Connection) -> None:
        await connection.head("503 Service Unavailable", {"retry-after": "0"})
        for piece in pieces:
            await connection.send(piece)
        await (connection.stall() if stall else connection.end())

    return answer


def held_open(*pieces: bytes) -> Answer:
    async def answer(request: Request, connection: Connection) -> None:
        await connection.head()
        for piece in pieces:
            await connection.send(piece)
        await connection.stall()

    return answer


# A wait belongs to its attempt


@pytest.mark.parametrize("before", ["head", "text", "rest"])
@pytest.mark.parametrize("size", [0, 1, 2], ids=["without a body", "in one piece", "in two"])
@pytest.mark.parametrize("fault_count", [1, 2])
def test_answer_behind_a_refusal_has_its_own_time(
    before: str, size: int, fault_count: int, ask: Ask, server: Loopback, short: None
) -> None:
    """A 503, and then on the same connection a model that thinks for longer than an error's body may take."""
    server.answers += [refusal(*[b"overloaded"] * size)] * fault_count + [slow(before)]
    assert ask().text == GOOD
    assert [request.connection for request in server.requests] == [1] * (1 + fault_count)


@pytest.mark.parametrize("before", ["head", "text", "rest"])
def test_answer_behind_a_reply_that_hurried_has_its_own_time(
    before: str, ask: Ask, server: Loopback, short: None
) -> None:
    """The little time that the end of one prompt's reply may take is not that of the next prompt's reply."""
    server.answers += [say([event(delta("a")), STOP, DONE]), slow(before)]
    assert ask().text == "a"
    assert ask().text == GOOD


def test_text_behind_a_finish_reason_has_its_own_time(ask: Ask, server: Loopback, short: None) -> None:
    """A server that says too early that it has finished is waited for as soon as it goes on."""

    async def answer(request: Request, connection: Connection) -> None:
        await connection.head()
        await connection.send(event(delta("a", finish_reason="stop")))
        await connection.send(event(delta("b")))
        await asyncio.sleep(0.25)
        await connection.send(event(delta("c", finish_reason="stop")) + DONE)
        await connection.end()

    server.answer = answer
    assert ask().text == "abc"


@pytest.mark.parametrize("through", ["proxy", "tls"])
def test_answer_behind_a_refusal_through_proxy_or_tls(
    through: str, ask: Ask, server: Loopback, short: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same through a proxy, and over TLS."""
    if through == "proxy":
        server.answers += [refusal(b"overloaded"), slow("head", "text")]
        with Proxy() as proxy:
            assert ask(proxy=proxy.url).text == GOOD
        return

    monkeypatch.setenv("SSL_CERT_FILE", str(PEM))
    with TlsLoopback() as secure:
        monkeypatch.setenv("AUTONOMOUS_BASE_URL", secure.url)
        secure.answers += [refusal(b"overloaded"), slow("head", "text")]
        assert ask().text == GOOD
        assert secure.connections == 1


def test_refusal_whose_body_stalls_is_told_and_tried_again(ask: Ask, server: Loopback, short: None) -> None:
    """When the body of an error has timed out, its connection is gone, and the next attempt has all its time."""
    server.answers += [refusal(b"overloaded", stall=True), slow("head")]
    assert ask(timeout=0.5).text == GOOD
    assert until(lambda: not server.open - {2})


@pytest.mark.parametrize("packed", [False, True], ids=["plain", "gzip"])
@pytest.mark.parametrize(
    ("pieces", "usage"),
    [
        ((event(delta("hi", finish_reason="stop")),), None),
        ((event(delta("hi")), STOP), None),
        ((event(delta("hi")), STOP, event({"choices": [], "usage": {"prompt_tokens": 7}})), 7),
        ((event(delta("hi")), STOP, event({"choices": [], "usage": {"prompt_tokens": 7}}), DONE), 7),
    ],
    ids=["with the text", "alone", "usage", "DONE"],
)
def test_finish_reason_and_then_an_open_connection(
    pieces: Sequence[bytes], usage: int | None, packed: bool, ask: Ask, server: Loopback, short: None
) -> None:
    """Behind a finish reason a moment is waited for what may still follow, and then the prompt is done."""

    async def answer(request: Request, connection: Connection) -> None:
        packer = gzip.zlib.compressobj(wbits=31)  # type: ignore[attr-defined]
        await connection.head(headers={"content-encoding": "gzip"} if packed else {})
        for piece in pieces:
            flushed = packer.compress(piece) + packer.flush(gzip.zlib.Z_SYNC_FLUSH)  # type: ignore[attr-defined]
            await connection.send(flushed if packed else piece)
        await connection.stall()

    server.answer = answer
    answered = ask()
    assert answered.text == "hi"
    assert answered.response.input_tokens == usage
    assert until(lambda: not server.open)


def test_usage_that_comes_late_is_read(ask: Ask, server: Loopback) -> None:
    """Usage that follows a moment after the finish reason is there."""
    usage = event({"choices": [], "usage": {"prompt_tokens": 7}})
    server.answer = say([event(delta("hi")), STOP, b": wait\n\n", usage], pause=0.05)
    answered = ask()
    assert answered.text == "hi"
    assert answered.response.input_tokens == 7


def test_usage_is_not_waited_for_longer_than_the_timeout(
    ask: Ask, server: Loopback, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever asks for a short timeout does not wait for what is no part of the answer."""
    monkeypatch.setattr(llm_autonomous, "END_TIMEOUT", 3600.0)
    server.answer = held_open(event(delta("hi", finish_reason="stop")))
    assert ask(timeout=0.3).text == "hi"


def test_comments_behind_a_finish_reason_do_not_hold_the_prompt(ask: Ask, server: Loopback, short: None) -> None:
    """A server that keeps the connection alive for ever does not keep the prompt."""

    async def answer(request: Request, connection: Connection) -> None:
        await connection.head()
        await connection.send(event(delta("hi", finish_reason="stop")))
        await connection.drip(b": still here\n\n")

    server.answer = answer
    assert ask().text == "hi"


def test_waits_of_prompts_at_once_do_not_bound_each_other(server: Loopback, short: None) -> None:
    """While one reply is hurried to its end, the others of the same loop have all their time."""
    server.answers += [refusal(b"overloaded"), held_open(event(delta("hi", finish_reason="stop")))] * 5
    server.answer = slow("head", "text", "rest")

    async def ask_at_once() -> list[str]:
        answers = await asyncio.gather(*(ask_async() for _ in range(20)))
        return [answer.text for answer in answers]

    assert set(asyncio.run(ask_at_once())) == {GOOD, "hi"}
    assert ask_sync().text == GOOD


# Encodings that are none


@pytest.mark.parametrize("status", ["200 OK", "400 Bad Request"])
@pytest.mark.parametrize("encoding", ["none", "utf-8", "", "identity", "binary", "null"])
def test_encoding_that_is_none(encoding: str, status: str, ask: Ask, server: Loopback) -> None:
    """What names no compression is none: the answer is read, and the error's words."""
    body = event(delta("hi")) + DONE if status == "200 OK" else b'{"error": "no luck"}'
    server.answer = say([body], status=status, headers={"content-encoding": encoding})
    if status == "200 OK":
        assert ask().text == "hi"
    else:
        assert ask().line.endswith("HTTP 400 Bad Request: no luck")


@pytest.mark.parametrize("encoding", ["gzip, br", "gzip,gzip", "none, gzip"])
def test_more_than_one_encoding_is_an_error(encoding: str, ask: Ask, server: Loopback) -> None:
    """One compression inside another could expand to terabytes, so it is not even tried."""
    server.answer = say([b"\x1b\x03\x00"], headers={"content-encoding": encoding})
    assert ask().line.endswith(f"the reply was not understood: its encoding is {encoding}")


@pytest.mark.parametrize("encoding", ["br", "zstd", "compress", "dcb"])
def test_encoding_that_was_not_asked_for_stays_an_error(encoding: str, ask: Ask, server: Loopback) -> None:
    """What is packed in a way that was not asked for cannot be read, and the error says so."""
    server.answer = say([b"\x1b\x03\x00"], headers={"content-encoding": encoding})
    assert "the reply was not understood; it begins: " in ask().line


# Finish reasons


@pytest.mark.parametrize("reason", ["content_filter", "abort", "max_tokens", "error", "length", "SAFETY", {"a": 1}])
def test_unusual_finish_reason_is_a_warning(
    reason: str, ask: Ask, server: Loopback, caplog: pytest.LogCaptureFixture
) -> None:
    """What is not a usual end may have cut the answer short: the text, and a warning with the reason."""
    server.answer = say([event(delta("Once", finish_reason=reason)), DONE])
    assert ask().text == "Once"
    (record,) = [record for record in caplog.records if record.name == "llm_autonomous"]
    assert record.levelno == logging.WARNING
    assert "the answer may be cut short" in record.getMessage()
    assert f"(finish reason: {reason})" in record.getMessage()


@pytest.mark.parametrize(
    "reason", ["stop", "STOP", "eos", "eos_token", "end_turn", "stop_sequence", "tool_calls", "function_call", None]
)
def test_usual_finish_reason_is_none(
    reason: str | None, ask: Ask, server: Loopback, caplog: pytest.LogCaptureFixture
) -> None:
    """A usual end is not worth a word."""
    server.answer = say([event(delta("Once", finish_reason=reason)), DONE])
    assert ask().text == "Once"
    assert not [record for record in caplog.records if record.name == "llm_autonomous"]


@pytest.mark.parametrize("reason", ["null", "None", "", "undefined"])
def test_finish_reason_that_is_none_in_words(reason: str, ask: Ask, server: Loopback) -> None:
    """The word null is no finish reason: an answer whose connection is lost behind it is incomplete."""

    async def answer(request: Request, connection: Connection) -> None:
        await connection.head()
        await connection.send(event(delta("Once", finish_reason=reason)))
        await connection.drop()

    server.answer = answer
    answered = ask()
    assert answered.chunks == ["Once"]
    assert "the answer is incomplete: the connection was lost" in answered.line


def test_text_behind_a_finish_reason_that_is_then_cut_is_incomplete(ask: Ask, server: Loopback) -> None:
    """Only a finish reason behind all the text says that it is all."""

    async def answer(request: Request, connection: Connection) -> None:
        await connection.head()
        await connection.send(event(delta("Once ", finish_reason="stop")) + event(delta("upon")))
        await connection.drop()

    server.answer = answer
    answered = ask()
    assert answered.chunks == ["Once ", "upon"]
    assert "the answer is incomplete" in answered.line


def test_what_is_left_of_a_lost_connection_is_read(ask: Ask, server: Loopback) -> None:
    """An event that came whole, but for its line end, counts; here it says that the answer is whole."""

    async def answer(request: Request, connection: Connection) -> None:
        await connection.head()
        await connection.send(event(delta("Once ")) + event(delta("upon", finish_reason="stop")).rstrip())
        await connection.drop()

    server.answer = answer
    assert ask().text == "Once upon"


# Words of an error


@pytest.mark.parametrize("place", ["status", "stream"])
@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({"statusCode": 403, "error": "Forbidden", "message": "region blocked"}, "Forbidden: region blocked"),
        ({"message": "region blocked", "error": "Forbidden", "statusCode": 403}, "Forbidden: region blocked"),
        (
            {"error": "Bad Request", "message": ["a is no text", "b is missing"]},
            'Bad Request: ["a is no text", "b is missing"]',
        ),
        ({"error": "Forbidden", "message": "Forbidden: region blocked"}, "Forbidden: region blocked"),
        ({"error": "region blocked", "message": "region blocked"}, "region blocked"),
        ({"error": True, "message": "region blocked"}, "region blocked"),
        ({"error": {"message": "region blocked"}, "detail": "by the operator"}, "region blocked: by the operator"),
    ],
)
def test_words_of_an_error_are_those_that_say_more(
    body: dict[str, object], words: str, place: str, ask: Ask, server: Loopback
) -> None:
    """The name of a status and the reason stand together; what says the same stands once."""
    reply = json.dumps(body).encode()
    server.answer = say([reply], status="403 Forbidden") if place == "status" else say([b"data: " + reply + b"\n\n"])
    start = "HTTP 403 Forbidden" if place == "status" else "the service reports an error"
    assert ask().line.endswith(f"{start}: {words}")


# Chunks


def test_refusal_of_the_model_is_the_answer(ask: Ask, server: Loopback) -> None:
    """OpenAI-shaped backends put a refusal where the content would be: it is what the model says."""
    chunks = [{"choices": [{"delta": {"content": None, "refusal": text}}]} for text in ("I ", "can't.")]
    server.answer = say([*map(event, chunks), STOP, DONE])
    assert ask().text == "I can't."


def test_whole_refusal_is_the_answer(ask: Ask, server: Loopback) -> None:
    """The same in a reply that is no stream."""
    body = {"choices": [{"message": {"role": "assistant", "content": None, "refusal": "No."}, "finish_reason": "stop"}]}
    server.answer = say([json.dumps(body).encode()])
    assert ask(stream=False).text == "No."


def choice(index: int | None, text: str, **more: object) -> dict[str, object]:
    return {"delta": {"content": text}, **({} if index is None else {"index": index}), **more}


@pytest.mark.parametrize(
    "events",
    [
        [[choice(0, "a"), choice(1, "x")], [choice(0, "b"), choice(1, "y")]],
        [[choice(1, "a")], [choice(1, "b")]],
        [[choice(3, "a")], [choice(None, "b")]],
    ],
    ids=["together", "from 1", "without an index later"],
)
def test_text_of_the_first_choice(events: list[list[dict[str, object]]], ask: Ask, server: Loopback) -> None:
    """The first choice of each chunk is the answer, whatever its index."""
    server.answer = say([*(event({"choices": choices}) for choices in events), DONE])
    assert ask().text == "ab"


@pytest.mark.parametrize("stream", [True, False])
def test_text_of_the_old_completions(stream: bool, ask: Ask, server: Loopback) -> None:
    """Backends of the older kind put the text into the choice itself."""
    chunks = [{"choices": [{"index": 0, "text": text, "finish_reason": None}]} for text in ("Once ", "upon")]
    whole = {"choices": [{"index": 0, "text": "Once upon", "finish_reason": "stop"}]}
    server.answer = say([*map(event, chunks), DONE]) if stream else say([json.dumps(whole).encode()])
    assert ask(stream=stream).text == "Once upon"


# The environment


def test_no_proxy_with_brackets(ask: Ask, server: Loopback, monkeypatch: pytest.MonkeyPatch) -> None:
    """httpx reads an IPv6 address in NO_PROXY without brackets: with them, the line says to leave them out."""
    monkeypatch.setenv("NO_PROXY", "localhost,[::1]")
    assert ask().line == "NO_PROXY cannot be read: write an IPv6 address without brackets, such as ::1"
    assert server.requests == []
    monkeypatch.setenv("NO_PROXY", "localhost,::1")
    assert ask().text == GOOD


@pytest.mark.parametrize("variable", ["HTTP_PROXY", "https_proxy", "ALL_PROXY"])
def test_proxy_variable_at_fault_is_named(
    variable: str, ask: Ask, server: Loopback, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Among several variables, the error names the one that is no proxy URL, without the password in it."""
    monkeypatch.setenv("NO_PROXY", "localhost")
    monkeypatch.setenv("HTTP_PROXY" if variable != "HTTP_PROXY" else "ALL_PROXY", "127.0.0.1:1")
    monkeypatch.setenv(variable, "http://me:secret@host:port")
    line = ask().line
    assert "is not a proxy URL" in line
    assert variable in line
    assert "secret" not in line


def test_answer_after_many_faults_in_a_row(ask: Ask, server: Loopback, short: None) -> None:
    """A chain: a refusal that stalls, one that is whole, and then a slow answer that is held open at its end."""
    server.answers += [refusal(b"a", stall=True), refusal(b"b"), held_open(event(delta("hi", finish_reason="stop")))]
    assert ask(timeout=0.5).text == "hi"
    server.answers += [slow("head", "text", "rest"), speak()]
    assert ask().text == GOOD
    assert ask().text == GOOD
