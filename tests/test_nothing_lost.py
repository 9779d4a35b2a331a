"""Nothing that arrives is lost without a word: replies that real servers send, each with what the user must see of it.

A row is one reply. Its text must come out, whole and once; or the error must have the server's words; or, where part of
the reply was not understood, the text must come out and a warning must quote the beginning of that part. Where each
kind of reply was seen stands in PROTOCOL.md.
"""

from __future__ import annotations

import asyncio
import inspect
import json
import logging
import os
from collections.abc import Sequence
from typing import Any, NamedTuple

import pytest
from conftest import CLEO, DOG, NOW_TAG, Answer, Ask, Chain, invoke, now, texts
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from llm.parts import ReasoningPart, TextPart
from loopback import DONE, Loopback, delta, event, say

MORE_EXAMPLES = os.environ.get("LLM_AUTONOMOUS_EXAMPLES")
STOP = delta(finish_reason="stop")
ROLE = {"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}]}
NOT_UNDERSTOOD = "part of the reply was not understood"
FOREIGN_ALONE = "the reply was not understood; it begins: "
USAGE = {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5}


class Row(NamedTuple):
    """One reply, and what must come of it."""

    body: bytes
    text: str = ""
    error: Sequence[str] = ()  # words that the error must contain; none: there is no error
    warning: Sequence[str] = ()  # words that the warning must contain; none: there is no warning
    reasoning: str = ""


def stream(*values: Any) -> bytes:
    """An event stream of JSON values, bytes being what they are, which ends as it should."""
    return b"".join(value if isinstance(value, bytes) else event(value) for value in values) + DONE


def body(value: Any) -> bytes:
    """A reply that is one JSON value."""
    return json.dumps(value).encode()


def choice(part: dict[str, Any] | None = None, reason: str | None = None, **fields: Any) -> dict[str, Any]:
    """A chunk with one choice, whose delta is ``part``."""
    own = {} if part is None else {"delta": part}
    return {"id": "1", "choices": [{"index": 0, **own, "finish_reason": reason, **fields}]}


def message(content: Any, reason: str | None = "stop", **fields: Any) -> dict[str, Any]:
    """A whole completion, or a last event that has the whole message again."""
    whole = {"role": "assistant", "content": content, **fields}
    return {
        "id": "1",
        "object": "chat.completion",
        "choices": [{"index": 0, "message": whole, "finish_reason": reason}],
    }


def counted(*pieces: str | None, start: int = 0) -> list[dict[str, Any]]:
    """Chunks whose index counts them, up to the end."""
    chunks = [choice({"content": piece} if piece else {}, index=index) for index, piece in enumerate(pieces, start)]
    return [*chunks, choice({}, "stop", index=start + len(pieces))]


def beginning(value: Any) -> str:
    """How a value begins when it is quoted; of a choice or a list, it may be what stands in it that is quoted."""
    return "a time" if isinstance(value, list) or "choices" in str(value) else json.dumps(value)[:24]


def outcome(answer: Answer, caplog: pytest.LogCaptureFixture) -> tuple[str, str, str, list[str]]:
    """The text, the reasoning, the error, and the warnings that came of a prompt."""
    reasoning = "".join(event.chunk for event in answer.response._stream_events if event.type == "reasoning")
    logged = [record for record in caplog.records if record.name == "llm_autonomous"]
    warnings = [record.getMessage() for record in logged if record.levelno == logging.WARNING]
    return "".join(answer.chunks), reasoning, answer.line if answer.error else "", warnings


def check(row: Row, answer: Answer, caplog: pytest.LogCaptureFixture) -> None:
    text, reasoning, error, warnings = outcome(answer, caplog)
    assert text == row.text, error
    assert reasoning.strip() == row.reasoning
    assert bool(error) == bool(row.error), error
    assert [words for words in row.error if words not in error] == [], error
    assert len(warnings) == bool(row.warning), warnings
    assert [words for words in row.warning if words not in "".join(warnings)] == [], warnings


def partly(value: Any, *values: Any) -> Row:
    """A row whose text comes out with a warning about the foreign ``value`` among its ``values``."""
    return Row(stream(*values, STOP), "Once upon", warning=[NOT_UNDERSTOOD, beginning(value)])


# What tells the choices of a reply apart

INDICES = {
    "index counts from 0": Row(stream(*counted("On", "ce ", "up", "on")), "Once upon"),
    "index counts from 1": Row(stream(*counted("On", "ce ", "up", "on", start=1)), "Once upon"),
    "index counts, and no end is sent": Row(stream(*counted("On", "ce ", "up", "on")[:-1]), "Once upon"),
    "index counts, and the usage comes last": Row(
        stream(*counted("Once ", "upon"), {"choices": [], "usage": USAGE}), "Once upon"
    ),
    "index counts the role, too": Row(stream(ROLE, *counted("Once ", "upon", start=1)), "Once upon"),
    "index counts a chunk without text": Row(stream(*counted("Once ", None, "upon")), "Once upon"),
    "index counts many": Row(stream(*counted(*"Once upon a time" * 9)), "Once upon a time" * 9),
    "index counts old completions": Row(
        stream(*(choice(index=index, text=piece) for index, piece in enumerate(["Once ", "upon"], 1))), "Once upon"
    ),
    "two choices without an index": Row(
        stream(*({"choices": [{"delta": {"content": text}} for text in texts]} for texts in ("ax", "by", "cz"))), "abc"
    ),
}

# Errors that stand where none is expected

ERROR = {"code": 502, "message": "no GPU"}
BESIDE: dict[str, dict[str, Any]] = {
    "message and code": {"message": "no GPU", "code": 503},
    "errors": {"errors": [{"message": "no GPU"}]},
    "errors of words": {"errors": ["no GPU"]},
    "error": {"error": ERROR},
}
ERROR_CHUNKS: dict[str, Any] = {
    **{f"in the choice, {reason}": choice({}, reason, error=ERROR) for reason in (None, "stop", "error")},
    **{f"in the delta, {reason}": choice({"error": ERROR}, reason) for reason in (None, "stop", "error")},
    "in the choice, as words": choice({"content": ""}, "error", error="no GPU"),
    "in the choice, without a delta": choice(None, "error", error=ERROR),
    "event: error, data of detail": b'event: error\ndata: {"code": 500, "detail": "no GPU"}\n\n',
    **{f"choices null and {name}": {"id": "1", "choices": None, **beside} for name, beside in BESIDE.items()},
    **{f"choices empty and {name}": {"id": "1", "choices": [], **beside} for name, beside in BESIDE.items()},
}
ERRORS = {
    **{f"{name}; first": Row(stream(chunk), error=["no GPU"]) for name, chunk in ERROR_CHUNKS.items()},
    **{f"{name}; later": Row(stream(delta("a"), chunk), "a", error=["no GPU"]) for name, chunk in ERROR_CHUNKS.items()},
    "in the choice of a whole reply": Row(
        body({"choices": [{"message": {"content": ""}, "finish_reason": "error", "error": ERROR}]}), error=["no GPU"]
    ),
    "in the message of a whole reply": Row(
        body({"choices": [{"message": {"content": None, "error": ERROR}, "finish_reason": "stop"}]}), error=["no GPU"]
    ),
    **{
        f"choices null and {name}, as a whole reply": Row(body({"choices": None, **beside}), error=["no GPU"])
        for name, beside in BESIDE.items()
    },
}

# Errors that cannot be told from other values of unknown meaning: quoted in an error if there is no text, or if they
# have the word in them, and else in a warning

MENTIONED: dict[str, Any] = {
    "in x_groq": {**choice({}), "x_groq": {"id": "req_1", "error": "no GPU"}},
    "in x_groq, with stop": {**choice({}, "stop"), "x_groq": {"id": "req_1", "error": {"message": "no GPU"}}},
    "in x_groq, without choices": {"choices": [], "x_groq": {"error": ERROR}},
}
UNCLEAR: dict[str, Any] = {
    "base_resp": {"choices": None, "base_resp": {"status_code": 1008, "status_msg": "no GPU"}},
    "base_resp beside no choices": {"choices": [], "base_resp": {"status_code": 1008, "status_msg": "no GPU"}},
    "detail": {"choices": [], "detail": "no GPU"},
    "message": {"message": "no GPU"},
    "event: error": b'event: error\ndata: {"message": "no GPU"}\n\n',
    "event: error, data of a string": b'event: error\ndata: "no GPU"\n\n',
    "a field named error": b'error: {"code": 500, "message": "no GPU", "type": "server_error"}\n\n',
    "a field of no name": b"no GPU\n\n",
}
UNCLEAR_ROWS = {
    **{f"{name}; first": Row(stream(chunk), error=["no GPU"]) for name, chunk in {**MENTIONED, **UNCLEAR}.items()},
    **{f"{name}; later": Row(stream(delta("a"), chunk), "a", error=["no GPU"]) for name, chunk in MENTIONED.items()},
    **{
        f"{name}; later": Row(stream(delta("a"), chunk), "a", warning=[NOT_UNDERSTOOD, "no GPU"])
        for name, chunk in UNCLEAR.items()
    },
}

# A foreign value among good ones

FOREIGN: dict[str, Any] = {
    "an object": {"answer": "a time"},
    "a nested object": {"output": {"text": "a time"}},
    "an object with a type": {"type": "citation", "sources": ["https://example.org"]},
    "an object with usage": {"answer": "a time", "usage": USAGE},
    "an object with a finish reason": {"answer": "a time", "finish_reason": "stop"},
    "an object with an id and a model": {"id": "1", "model": "m", "created": 7, "answer": "a time"},
    "a status": {"status": "thinking", "progress": 0.5},
    "a string": "a time",
    "a number": 42,
    "a list": ["a time", 42],
    "choices of words": {"choices": "a time"},
    "choices as an object": {"choices": {"delta": {"content": "a time"}}},
    "a choice of words": {"choices": ["a time"]},
    "a delta of words": {"choices": [{"index": 0, "delta": "a time"}]},
    "content of another shape": {"choices": [{"index": 0, "delta": {"content": {"answer": "a time"}}}]},
}
LOST = {"status": "failed", "error_message": "no GPU", "request_id": "7"}
FOREIGN_ROWS = {
    **{name: partly(value, delta("Once "), value, delta("upon")) for name, value in FOREIGN.items()},
    **{
        f"{name}, alone": Row(stream(ROLE, value, STOP), error=[FOREIGN_ALONE, beginning(value)])
        for name, value in FOREIGN.items()
    },
    "first": partly(FOREIGN["an object"], FOREIGN["an object"], delta("Once upon")),
    "last": partly(FOREIGN["an object"], delta("Once upon"), FOREIGN["an object"]),
    "behind the end": partly(FOREIGN["an object"], delta("Once upon"), STOP, FOREIGN["an object"]),
    "an answer of none": Row(stream(LOST), error=[FOREIGN_ALONE, beginning(LOST), "no GPU"]),
    "an answer of none, as a whole reply": Row(body(LOST), error=[FOREIGN_ALONE, beginning(LOST), "no GPU"]),
    "several": Row(
        stream(delta("Once "), {"answer": "one"}, 42, delta("upon"), {"result": "two"}, STOP),
        "Once upon",
        warning=[NOT_UNDERSTOOD, '{"answer": "one"}'],
    ),
}

# Text in unusual places

PARTS = [{"type": "text", "text": "Once "}, {"type": "text", "text": "upon"}]
PICTURE = {"type": "image_url", "image_url": {"url": "https://example.org/a.png"}}
TEXTS = {
    "message beside a delta with a role": Row(
        stream(choice({"role": "assistant"}, "stop", message={"content": "Once upon"})), "Once upon"
    ),
    "message beside an empty delta": Row(
        stream(choice({"content": ""}, "stop", message={"content": "Once upon"})), "Once upon"
    ),
    "message beside a delta of null": Row(
        stream(choice({"content": None}, "stop", message={"content": "Once upon"})), "Once upon"
    ),
    "message in place of a delta": Row(stream(message("Once ", None), message("upon")), "Once upon"),
    "delta.text": Row(stream(choice({"text": "Once "}), choice({"text": "upon"}), STOP), "Once upon"),
    "choice.content": Row(stream(choice(content="Once "), choice(content="upon"), STOP), "Once upon"),
    "choice.content, as a whole reply": Row(
        body({"choices": [{"content": "Once upon", "finish_reason": "stop"}]}), "Once upon"
    ),
    "choice.text": Row(stream(choice(text="Once "), choice(text="upon"), STOP), "Once upon"),
    "whole again in a last event": Row(
        stream(
            delta("Once "),
            delta("upon"),
            choice({"role": "assistant", "content": ""}, "stop", message={"content": "Once upon"}),
        ),
        "Once upon",
    ),
    "whole again in a last event without a delta": Row(
        stream(delta("Once "), delta("upon"), choice({}, "stop", message={"content": "Once upon"})), "Once upon"
    ),
    "whole so far in each event": Row(
        stream(
            choice({"content": "Once "}, message={"content": "Once "}),
            choice({"content": "upon"}, message={"content": "Once upon"}),
            choice({"content": ""}, "stop", message={"content": "Once upon"}),
        ),
        "Once upon",
    ),
    "whole completion after the deltas": Row(stream(delta("Once "), delta("upon"), message("Once upon")), "Once upon"),
    "whole completion after the deltas and the end": Row(
        stream(delta("Once "), delta("upon"), STOP, message("Once upon")), "Once upon"
    ),
    "whole completion after the deltas, as a bare line": Row(
        stream(delta("Once "), delta("upon"), body(message("Once upon")) + b"\n"), "Once upon"
    ),
    "whole completion in parts after the deltas": Row(
        stream(delta("Once "), delta("upon"), message(PARTS)), "Once upon"
    ),
    "the same delta twice": Row(stream(delta("ha"), delta("ha"), STOP), "haha"),
    "content in parts": Row(stream(choice({"content": PARTS}), STOP), "Once upon"),
    "content in parts, one a chunk": Row(stream(*(choice({"content": [part]}) for part in PARTS), STOP), "Once upon"),
    "content in parts, as a whole reply": Row(body(message(PARTS)), "Once upon"),
    "content in no parts": Row(stream(choice({"content": []}), delta("Once upon"), STOP), "Once upon"),
    "content in parts, one of them a picture": Row(
        stream(choice({"content": [*PARTS, PICTURE]}), STOP), "Once upon", warning=[NOT_UNDERSTOOD, "image_url"]
    ),
    "a list around a completion": Row(body([message("Once upon")]), "Once upon"),
    "a list around each chunk": Row(stream([delta("Once ")], [delta("upon")], [STOP]), "Once upon"),
}

# What is harmless, and says nothing

HARMLESS: dict[str, Any] = {
    "null": None,
    "a ping": {"type": "ping"},
    "a ping in an event": b'event: ping\ndata: {"type": "ping"}\n\n',
    "a comment": b": OPENROUTER PROCESSING\n\n",
    "a heartbeat": b"event: heartbeat\n\n",
    "no choices": {"choices": []},
    "choices of null": {"id": "1", "choices": None},
    "usage alone": {"choices": [], "usage": USAGE},
    "usage of null": {"choices": [], "usage": None},
    "an empty delta": choice({}),
    "a delta of null": {"choices": [{"index": 0, "delta": None}]},
    "a delta of nulls": choice(
        {"role": "assistant", "content": None, "refusal": None, "tool_calls": None, "reasoning_content": None}
    ),
    "a delta with no calls": choice({"content": "", "tool_calls": [], "function_call": None}),
    "log probabilities": choice({"content": ""}, logprobs={"content": []}),
    "reasons to stop": choice({"content": ""}, stop_reason=None, native_finish_reason=None, matched_stop=128009),
    "timings": {"choices": [], "usage": USAGE, "timings": {"predicted_ms": 7.5}},
    "an error of null": {**choice({}), "error": None},
    "a success beside the choices": {**choice({}), "base_resp": {"status_code": 0, "status_msg": "success"}},
    "a success in words": {**choice({}), "code": 0, "message": "Success", "sid": "cht1"},
    "details of the host": {**choice({}), "x_groq": {"id": "req_1", "usage": USAGE}, "provider": "Somebody"},
}
AZURE = {"choices": [], "prompt_filter_results": [{"prompt_index": 0, "content_filter_results": {}}]}
HARMLESS_ROWS = {
    "the filters of Azure, which come first": Row(stream(AZURE, delta("Once upon"), STOP), "Once upon"),
    **{
        name: Row(stream(value, delta("Once "), value, delta("upon"), STOP, value), "Once upon")
        for name, value in HARMLESS.items()
    },
    **{f"{name}, alone": Row(stream(value), error=["the answer was empty"]) for name, value in HARMLESS.items()},
}
USUAL_ENDINGS = [
    *("stop", "normal", "eos", "eos_found", "eos_token", "stop_str", "stop_sequence", "end_turn", "completed"),
    *("FINISH_REASON_STOP", "STOP", "<|eot_id|>", "<|im_end|>"),
]
ENDINGS = {
    **{f"ending {reason}": Row(stream(delta("Once", reason)), "Once") for reason in USUAL_ENDINGS},
    **{
        f"unusual ending {reason}": Row(stream(delta("Once", reason)), "Once", warning=["cut short", reason])
        for reason in ("length", "content_filter", "FINISH_REASON_SAFETY", "abnormal", "<|odd|>")
    },
}

# Whole replies in other shapes

OTHER_SHAPES: dict[str, Any] = {
    "Anthropic": {
        "id": "msg_1",
        "type": "message",
        "role": "assistant",
        "content": [{"type": "text", "text": "Once"}],
        "stop_reason": "end_turn",
        "usage": {"input_tokens": 3, "output_tokens": 2},
    },
    "OpenAI's Responses": {
        "id": "resp_1",
        "object": "response",
        "status": "completed",
        "error": None,
        "output": [{"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "Once"}]}],
        "usage": {"input_tokens": 3, "output_tokens": 2},
    },
    "Cohere": {"response_id": "r1", "text": "Once", "generation_id": "g1", "finish_reason": "COMPLETE"},
    "Cohere, version 2": {
        "id": "c1",
        "finish_reason": "COMPLETE",
        "message": {"role": "assistant", "content": [{"type": "text", "text": "Once"}]},
        "usage": {"billed_units": {"input_tokens": 3}},
    },
    "DashScope": {"output": {"text": "Once", "finish_reason": "stop"}, "usage": USAGE, "request_id": "d1"},
    "Workers AI": {"result": {"response": "Once"}, "success": True, "errors": [], "messages": []},
    "Baidu": {"id": "as-1", "object": "chat.completion", "created": 1, "result": "Once", "usage": USAGE},
    "Gemini": {"candidates": [{"content": {"parts": [{"text": "Once"}], "role": "model"}, "finishReason": "STOP"}]},
    "Ollama": {
        "model": "llama",
        "created_at": "now",
        "message": {"role": "assistant", "content": "Once"},
        "done": True,
    },
    "text-generation-inference": {"generated_text": "Once"},
}
ANTHROPIC_EVENTS = [
    {"type": "message_start", "message": {"id": "msg_1", "role": "assistant", "content": []}},
    {"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": ""}},
    {"type": "ping"},
    {"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": "Once"}},
    {"type": "content_block_stop", "index": 0},
    {"type": "message_delta", "delta": {"stop_reason": "end_turn"}, "usage": {"output_tokens": 2}},
    {"type": "message_stop"},
]

# Reasoning


def thought(text: str, name: str = "reasoning_content") -> dict[str, Any]:
    return choice({"role": "assistant", "content": None, name: text})


THINK = "<think>Let me see.</think>Once upon"
REASONING = {
    **{
        f"delta.{name}": Row(
            stream(thought("Let me ", name), thought("see.", name), delta("Once "), delta("upon"), STOP),
            "Once upon",
            reasoning="Let me see.",
        )
        for name in ("reasoning_content", "reasoning")
    },
    **{
        f"message.{name}, as a whole reply": Row(
            body(message("Once upon", **{name: "Let me see."})), "Once upon", reasoning="Let me see."
        )
        for name in ("reasoning_content", "reasoning")
    },
    "both names for the same": Row(
        stream(choice({"reasoning": "Let me see.", "reasoning_content": "Let me see."}), delta("Once upon"), STOP),
        "Once upon",
        reasoning="Let me see.",
    ),
    "reasoning and text in one chunk": Row(
        stream(choice({"reasoning_content": "Let me see.", "content": "Once upon"}), STOP),
        "Once upon",
        reasoning="Let me see.",
    ),
    "reasoning beside an empty text": Row(
        stream(choice({"reasoning_content": "Let me see.", "content": ""}), delta("Once upon"), STOP),
        "Once upon",
        reasoning="Let me see.",
    ),
    "the same reasoning again and again, each time beside text": Row(
        stream(*(choice({"content": text, "reasoning": "Ha"}) for text in ("On", "ce ", "up", "on")), STOP),
        "Once upon",
        reasoning="HaHaHaHa",
    ),
    "empty reasoning": Row(stream(choice({"reasoning": "", "content": "Once upon"}), STOP), "Once upon"),
    "reasoning between texts": Row(
        stream(delta("Once "), thought("Let me see."), delta("upon"), STOP), "Once upon", reasoning="Let me see."
    ),
    "reasoning again in the whole message": Row(
        stream(thought("Let me see."), delta("Once upon"), message("Once upon", reasoning_content="Let me see.")),
        "Once upon",
        reasoning="Let me see.",
    ),
    "<think>": Row(stream(delta(THINK), STOP), "Once upon", reasoning="Let me see."),
    "<think>, as a whole reply": Row(body(message(THINK)), "Once upon", reasoning="Let me see."),
    "<think>, a character a chunk": Row(stream(*map(delta, THINK), STOP), "Once upon", reasoning="Let me see."),
    "<think>, smaller-than in it": Row(
        stream(*map(delta, "<think>a < b </thin </ <think></think>Once"), STOP),
        "Once",
        reasoning="a < b </thin </ <think>",
    ),
    "<think> elsewhere": Row(stream(delta("Use <think>this</think> tag."), STOP), "Use <think>this</think> tag."),
    "<think> elsewhere, a character a chunk": Row(
        stream(*map(delta, "Use <think>this</think> tag."), STOP), "Use <think>this</think> tag."
    ),
    "<think> a second time": Row(
        stream(delta(f"{THINK} <think>this</think>."), STOP), "Once upon <think>this</think>.", reasoning="Let me see."
    ),
    "another tag": Row(stream(*map(delta, "<thinking>Once"), STOP), "<thinking>Once"),
    "half a tag": Row(stream(*map(delta, "<thin"), STOP), "<thin"),
    "a closing tag": Row(stream(delta("Once</think> upon"), STOP), "Once</think> upon"),
}
REASONING_ALONE = {
    "delta.reasoning_content": stream(thought("Let me see."), STOP),
    "delta.reasoning": stream(thought("Let me see.", "reasoning"), STOP),
    "message.reasoning_content": body(message("", reasoning_content="Let me see.")),
    "at the limit": stream(thought("Let me see."), delta(finish_reason="length")),
    "<think>": stream(delta("<think>Let me see.</think>"), STOP),
    "<think> without an end": stream(delta("<think>Let me see."), STOP),
}

ROWS = {
    **INDICES,
    **{f"foreign: {name}": row for name, row in FOREIGN_ROWS.items()},
    **TEXTS,
    **{f"unclear: {name}": row for name, row in UNCLEAR_ROWS.items()},
    **{f"harmless: {name}": row for name, row in HARMLESS_ROWS.items()},
    **ENDINGS,
    **{f"reasoning: {name}": row for name, row in REASONING.items()},
}


@pytest.mark.parametrize("row", ROWS.values(), ids=ROWS)
def test_reply(row: Row, ask: Ask, server: Loopback, caplog: pytest.LogCaptureFixture) -> None:
    """The text comes out whole and once, an error has the server's words, and what was not understood is quoted."""
    server.answer = say([row.body])
    check(row, ask(), caplog)
    assert len(server.requests) == 1


@pytest.mark.parametrize("row", ERRORS.values(), ids=ERRORS)
def test_error_in_an_unusual_place(row: Row, ask: Ask, server: Loopback, caplog: pytest.LogCaptureFixture) -> None:
    """The server's words are an error, wherever they stand, and come behind the text that came before."""
    server.answer = say([row.body])
    answer = ask()
    check(row, answer, caplog)
    assert "not understood" not in answer.line
    assert "empty" not in answer.line


@pytest.mark.parametrize("name", OTHER_SHAPES)
@pytest.mark.parametrize("framing", ["body", "event", "list"])
def test_whole_reply_in_another_shape(framing: str, name: str, ask: Ask, server: Loopback) -> None:
    """A reply that is no chat completion is not taken for an empty answer: its beginning is shown."""
    reply = OTHER_SHAPES[name]
    server.answer = say([{"body": body(reply), "event": stream(reply), "list": body([reply])}[framing]])
    line = ask(stream=framing != "body").line
    assert "not understood" in line or "the answer was empty; the reply begins: " in line
    assert beginning(reply) in line


def test_stream_in_another_shape(ask: Ask, server: Loopback) -> None:
    """The same of a stream, whose first event of unknown meaning is shown."""
    server.answer = say([stream(*ANTHROPIC_EVENTS)])
    line = ask().line
    assert "not understood" in line or "the answer was empty; the reply begins: " in line
    assert beginning(ANTHROPIC_EVENTS[0]) in line


# Pages and redirects

S3 = (
    '<?xml version="1.0" encoding="UTF-8"?>\n<Error><Code>AccessDenied</Code><Message>Access Denied</Message>'
    "<RequestId>7QX2</RequestId><HostId>abc=</HostId></Error>"
)
BUCKET = "<Error><Code>NoSuchBucket</Code><Message>The bucket &amp; more does not exist</Message></Error>"
PAGES = {
    "XML": (S3, "Access Denied"),
    "XML without a declaration": (BUCKET, "The bucket & more does not exist"),
    "a page with a heading": ("<html><body><h1>It works!</h1></body></html>", "It works!"),
    "a page of words": ("<html>\n<body bgcolor='white'>\n<p>Down for <b>maintenance</b>", "Down for maintenance"),
    "a page with an empty title": ("<html><head><title> </title></head><body>Come back</body>", "Come back"),
}


@pytest.mark.parametrize(("page", "words"), PAGES.values(), ids=PAGES)
@pytest.mark.parametrize("status", ["200 OK", "403 Forbidden", "503 Service Unavailable"])
def test_page_without_a_title_gives_its_words(
    status: str, page: str, words: str, ask: Ask, server: Loopback, no_backoff: None
) -> None:
    """An error page in XML, or a page without a title, is shown by its words and without its tags."""
    server.answer = say([page.encode()], status=status, headers={"content-type": "application/xml"})
    line = ask().line
    assert words in line
    assert "<" not in line
    if status != "200 OK":
        assert f"HTTP {status}" in line


@pytest.mark.parametrize(
    "location", ["http://", "http://[::1", "https://:443:443/", "http://host:port/", "http://a b/", "//", "\x80"]
)
def test_redirect_to_what_is_no_url(location: str, ask: Ask, server: Loopback) -> None:
    """It is one line, though httpx itself may already refuse what it redirects to."""
    server.answer = say([], status="302 Found", headers={"location": location})
    line = ask().line
    assert "HTTP 302 Found: redirects" in line or "Invalid URL in location header" in line
    assert len(server.requests) == 1


# Reasoning


@pytest.mark.parametrize("reply", REASONING_ALONE.values(), ids=REASONING_ALONE)
def test_reasoning_alone_is_an_error_that_says_so(reply: bytes, ask: Ask, server: Loopback) -> None:
    """Reasoning is no answer, and no empty reply either."""
    server.answer = say([reply])
    answer = ask()
    assert answer.chunks == []
    assert "reasoning" in answer.line
    assert "not understood" not in answer.line


@pytest.mark.parametrize("chunks", [[thought("Let me see.")], [delta("<think>Let me see.</think>")]])
def test_reasoning_is_a_part_of_its_own(chunks: list[Any], ask: Ask, server: Loopback) -> None:
    """`llm` has it in front of the text, and the text without it."""
    server.answer = say([stream(*chunks, delta("Once upon"), STOP)])
    response = ask().response
    messages, text = response.messages(), response.text()
    if inspect.isawaitable(messages):
        messages, text = asyncio.run(both(messages, text))
    assert text == "Once upon"
    [answered] = messages
    assert [(type(part), part.text) for part in answered.parts] == [
        (ReasoningPart, "Let me see."),
        (TextPart, "Once upon"),
    ]


async def both(first: Any, second: Any) -> tuple[Any, Any]:
    return await first, await second


@pytest.mark.parametrize(
    "think", ["<think>\nLet me see.\n</think>\n\nOnce upon", "\n<think>Let me see.</think>\nOnce upon"]
)
def test_white_space_around_thinking(think: str, ask: Ask, server: Loopback, caplog: pytest.LogCaptureFixture) -> None:
    """Models set their thoughts off by line breaks, which are no part of the text."""
    server.answer = say([stream(*map(delta, think), STOP)])
    text, reasoning, error, warnings = outcome(ask(), caplog)
    assert (text, reasoning.strip(), error, warnings) == ("Once upon", "Let me see.", "", [])


def test_text_behind_thinking_is_not_held(ask: Ask, server: Loopback) -> None:
    """Once the thoughts are over, each piece of text comes out as it arrives."""
    server.answer = say([event(delta(piece)) for piece in ("<think>Let me", " see.</think>", "One ", "two ", "three")])
    assert ask().chunks == ["One ", "two ", "three"]


@pytest.mark.parametrize("kind", [[], ["--async"], ["--no-stream"]], ids=["sync", "async", "whole"])
def test_reasoning_on_the_command_line(kind: list[str], server: Loopback) -> None:
    """It is shown apart from the answer, `-R` hides it, the log keeps it, and `-c` does not send it back."""
    if "--no-stream" in kind:
        server.answer = say([body(message("Once upon", reasoning_content="Let me see."))])
    else:
        server.answer = say([stream(thought("Let me see."), delta("Once upon"), STOP)])
    command = ["-m", "autonomous-llama", "hi", *kind]
    stdout, stderr, code = invoke(*command)
    shown = "" if "--no-stream" in kind else "Let me see."  # `llm` then shows the text alone
    assert (stdout, stderr.strip(), code) == ("Once upon\n", shown, 0)
    assert invoke(*command, "-R") == ("Once upon\n", "", 0)
    logged, *_ = json.loads(invoke("logs", "--json", "-n", "1")[0])
    assert (logged["response"], logged["reasoning"]) == ("Once upon", "Let me see.")
    invoke("-c", "And?", *kind)
    assert server.last.messages[1:] == [
        {"role": "assistant", "content": "Once upon"},
        {"role": "user", "content": "And?"},
    ]


THOUGHTS = [("<think>", "</think>"), ("<scratch_pad>", "</scratch_pad>")]


@pytest.mark.parametrize(("start", "end"), THOUGHTS, ids=["think", "scratch_pad"])
def test_call_within_thoughts_is_none(start: str, end: str, chain: Chain, server: Loopback) -> None:
    """What a model considers is not what it asks for."""
    server.answers += [texts(*f"{start}I could write {NOW_TAG} for it.{end}\nIt is late.")]
    chained = chain("What time is it?", tools=[now])
    assert chained.calls == [[]]
    assert "It is late." in chained.text
    assert len(server.requests) == 1


@pytest.mark.parametrize(
    ("start", "end", "call"),
    [(*THOUGHTS[0], NOW_TAG), (*THOUGHTS[1], NOW_TAG), (*THOUGHTS[0], '{"name": "now", "parameters": {}}')],
    ids=["think", "scratch_pad", "think and a bare call"],
)
def test_call_behind_thoughts_is_one(start: str, end: str, call: str, chain: Chain, server: Loopback) -> None:
    """A model that thinks first calls as it would without."""
    server.answers += [texts(*f"{start}I should look at {{it}}.{end}\n{call}")]
    chained = chain("What time is it?", tools=[now])
    assert chained.calls == [[("now", {})], []]
    assert chained.text.strip().endswith("llama: now said noon")


@pytest.mark.parametrize(("start", "end"), THOUGHTS, ids=["think", "scratch_pad"])
def test_json_within_thoughts_is_no_answer(start: str, end: str, ask: Ask, server: Loopback) -> None:
    """The JSON asked for is looked for in the answer alone, even where the thoughts hold more of it."""
    server.answers += [texts(*f'{start}Perhaps {{"name": "Somebody else", "age": 99}}?{end}\n{CLEO}')]
    assert ask(schema=DOG).text == CLEO
    assert len(server.requests) == 1


def test_call_behind_reasoning_of_its_own(chain: Chain, server: Loopback) -> None:
    """Reasoning in a field of its own does not keep a bare call from being one."""
    server.answers += [say([stream(thought("Let me see."), delta('{"name": "now", "parameters": {}}'), STOP)])]
    chained = chain("What time is it?", tools=[now])
    assert chained.calls == [[("now", {})], []]
    assert chained.text == "llama: now said noon"


# Tool calls in OpenAI's own fields


def call(name: str | None, arguments: Any, index: int = 0) -> dict[str, Any]:
    own = {"id": f"call_{index}", "type": "function"} if name else {}
    return {"index": index, **own, "function": {**({"name": name} if name else {}), "arguments": arguments}}


def calling(name: str, *arguments: Any) -> list[dict[str, Any]]:
    """The chunks of a tool call, its arguments in pieces."""
    first, *rest = arguments
    pieces = [call(name, first), *(call(None, piece) for piece in rest)]
    return [*(choice({"tool_calls": [piece]}) for piece in pieces), choice({}, "tool_calls")]


NATIVE = {
    "in one chunk": stream(*calling("now", "{}")),
    "arguments in pieces": stream(*calling("now", "", "{", "}")),
    "arguments empty": stream(*calling("now", "")),
    "arguments as an object": stream(*calling("now", {})),
    "with the end": stream(choice({"content": None, "tool_calls": [call("now", "{}")]}, "tool_calls")),
    "with stop": stream(choice({"tool_calls": [call("now", "{}")]}), STOP),
    "again in the whole message": stream(
        *calling("now", "{", "}")[:-1],
        choice({}, "tool_calls", message={"role": "assistant", "content": None, "tool_calls": [call("now", "{}")]}),
    ),
    "function_call": stream(choice({"function_call": {"name": "now", "arguments": "{}"}}), choice({}, "function_call")),
    "function_call in pieces": stream(
        choice({"function_call": {"name": "now", "arguments": "{"}}),
        choice({"function_call": {"arguments": "}"}}),
        choice({}, "function_call"),
    ),
    "whole reply": body(message(None, "tool_calls", tool_calls=[call("now", "{}")])),
    "whole reply with function_call": body(
        message("", "function_call", function_call={"name": "now", "arguments": "{}"})
    ),
}


def web_search(query: str) -> str:
    """Search the web"""
    return query


SEARCH = {name: reply.replace(b'"now"', b'"web_search"') for name, reply in NATIVE.items()}


@pytest.mark.parametrize("tools", [[], [now], [web_search]], ids=["no tools", "other tools", "this tool"])
@pytest.mark.parametrize("reply", SEARCH.values(), ids=SEARCH)
def test_native_call_is_not_understood(
    reply: bytes, tools: list[Any], chain: Chain, server: Loopback, caplog: pytest.LogCaptureFixture
) -> None:
    """The text comes out, and a warning names the tool that the server wanted to call."""
    before = b"" if reply.startswith(b"{") else event(delta("Let me see."))
    if not before:
        reply = reply.replace(b'"content": null', b'"content": "Let me see."').replace(
            b'"content": ""', b'"content": "Let me see."'
        )
    server.answers += [say([before + reply])]
    chained = chain("What time is it?", tools=tools)
    assert chained.text == "Let me see."
    assert chained.calls == [[]]
    [warning] = [record for record in caplog.records if record.name == "llm_autonomous"]
    assert warning.levelno == logging.WARNING
    assert "web_search" in warning.getMessage()


@pytest.mark.parametrize("reply", SEARCH.values(), ids=SEARCH)
def test_native_call_alone_is_not_understood(reply: bytes, ask: Ask, server: Loopback) -> None:
    """With no text at all, the error names the tool."""
    server.answer = say([reply])
    assert "web_search" in ask().line


# Properties

WORDS = st.text(st.characters(codec="utf-8", exclude_characters="<"), max_size=8)
KNOWN = st.one_of(
    st.just(ROLE),
    WORDS.map(delta),
    WORDS.map(thought),
    st.sampled_from([{"choices": [], "usage": USAGE}, STOP, choice({}), {"choices": []}, {"type": "ping"}, None]),
)
STRANGE = st.sampled_from([*FOREIGN.values()])


@st.composite
def replies(draw: st.DrawFn) -> tuple[list[Any], bool, list[bytes]]:
    """The values of a reply, whether any of them is foreign, and its bytes in pieces."""
    values = draw(st.lists(st.tuples(KNOWN, st.just(False)) | st.tuples(STRANGE, st.just(True)), max_size=8))
    newline = draw(st.sampled_from([b"\n", b"\r\n", b"\r"]))
    whole = stream(*(value for value, _ in values)).replace(b"\n", newline)
    edges = sorted(draw(st.lists(st.integers(0, len(whole)), max_size=6)))
    pieces = [whole[start:end] for start, end in zip([0, *edges], [*edges, len(whole)], strict=True)]
    return [value for value, _ in values], any(foreign for _, foreign in values), [piece for piece in pieces if piece]


def content(value: Any, key: str) -> str:
    """What a known chunk has of text or of reasoning."""
    if value in [*FOREIGN.values()] or not isinstance(value, dict) or not value.get("choices"):
        return ""
    return value["choices"][0]["delta"].get(key) or ""


@settings(
    max_examples=int(MORE_EXAMPLES or 60),
    derandomize=not MORE_EXAMPLES,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(replies())
def test_any_mixture_gives_all_the_text_and_a_word_about_the_rest(
    ask: Ask, server: Loopback, caplog: pytest.LogCaptureFixture, reply: tuple[list[Any], bool, list[bytes]]
) -> None:
    """All the text and all the reasoning come out, a foreign value is reported, and the cutting changes nothing."""
    values, foreign, pieces = reply
    outcomes = []
    for cut in ([b"".join(pieces)], pieces):
        caplog.clear()
        server.answer = say(cut)
        outcomes.append(outcome(ask(), caplog))
    (text, reasoning, error, warnings), other = outcomes
    assert text == "".join(content(value, "content") for value in values)
    assert reasoning == "".join(content(value, "reasoning_content") for value in values)
    assert bool(error or warnings) == (foreign or not text)
    assert other == outcomes[0]
