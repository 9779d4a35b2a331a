"""How a reply is read: one table of replies, and properties that hold for any reply.

A row is the bytes of one reply, and what the user gets of it: the text and the reasoning, a warning, an error. Nothing
that arrives is lost without a word: what was not understood is quoted in a warning or, without any text, in an error.
The rules of framing are those of https://html.spec.whatwg.org/multipage/server-sent-events.html; the others, and where
each kind of reply was seen, are in PROTOCOL.md.

More examples for the properties, others each time: LLM_AUTONOMOUS_EXAMPLES=10000.
"""

from __future__ import annotations

import asyncio
import functools
import inspect
import itertools
import json
import logging
import os
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import llm
import pytest
import sqlite_utils
from conftest import CLEO, DOG, NOW_TAG, Ask, get_model, invoke, new_attempt, now
from hypothesis import given, settings
from hypothesis import strategies as st
from llm.migrations import migrate
from llm.parts import ReasoningPart, TextPart
from loopback import DONE, Loopback, delta, event, say

from llm_autonomous import MAX_EVENT_BYTES, AutonomousError

MORE_EXAMPLES = os.environ.get("LLM_AUTONOMOUS_EXAMPLES")
examples = settings(max_examples=int(MORE_EXAMPLES or 150), derandomize=not MORE_EXAMPLES, deadline=None, database=None)

MIB = 1024 * 1024
BOM = b"\xef\xbb\xbf"


class Row(NamedTuple):
    """One reply, and what must come of it. In the words of an error or a warning, " … " stands for any others."""

    reply: bytes
    text: str = ""
    error: str = ""  # words that are in the error; none: there is no error
    warning: str = ""  # words that are in the one warning; none: there is no warning
    reasoning: str = ""
    calls: Sequence[tuple[str, Any]] = ()
    given: dict[str, Any] | None = None  # what the prompt was given: tools or a schema


@dataclass
class Outcome:
    """What came of a reply."""

    parts: list[tuple[str, str]] = field(default_factory=list)  # kind and text, in order; neighbours are joined
    error: str = ""
    warnings: list[str] = field(default_factory=list)
    envelope: Any = None

    def add(self, piece: Any) -> None:
        kind, text = ("text", piece) if isinstance(piece, str) else (piece.type, piece.chunk)
        if kind in ("text", "reasoning") and self.parts and self.parts[-1][0] == kind:
            text = self.parts.pop()[1] + text
        self.parts.append((kind, text))

    def all_of(self, kind: str) -> list[str]:
        return [text for own, text in self.parts if own == kind]

    @property
    def text(self) -> str:
        return "".join(self.all_of("text"))

    def check(self, row: Row) -> None:
        assert self.text == row.text, self
        assert "".join(self.all_of("reasoning")).strip() == row.reasoning, self
        arguments = map(json.loads, self.all_of("tool_call_args"))
        assert [*zip(self.all_of("tool_call_name"), arguments, strict=True)] == [*row.calls]
        assert says(self.error, row.error), self
        assert len(self.warnings) <= 1, self
        assert says("".join(self.warnings), row.warning), self


def says(line: str, words: str) -> bool:
    pattern = ".*".join(map(re.escape, words.split(" … ")))
    return bool(re.search(pattern, line)) if words else not line


class Warnings(logging.Handler):
    """The warnings that are logged within a ``with``."""

    def __enter__(self) -> list[str]:
        self.lines: list[str] = []
        logging.getLogger("llm_autonomous").addHandler(self)
        return self.lines

    def __exit__(self, *exception: object) -> None:
        logging.getLogger("llm_autonomous").removeHandler(self)

    def emit(self, record: logging.LogRecord) -> None:
        if record.levelno == logging.WARNING:
            self.lines.append(record.getMessage())


def read(*pieces: bytes, **kwargs: Any) -> Outcome:
    """What comes of a reply that arrives in ``pieces``, without a network."""
    exchange = new_attempt(**kwargs).exchange
    response = exchange.response = get_model("autonomous-llama").prompt("hi")
    attempts, outcome = exchange.attempts(), Outcome()
    attempt = next(attempts)
    with Warnings() as outcome.warnings:
        for piece in pieces:
            for out in attempt.feed(piece):
                outcome.add(out)
            if attempt.done:
                break
        for out in attempt.close():
            outcome.add(out)
        if attempt.error:
            assert type(attempt.error) is AutonomousError
            outcome.error = attempt.error.message
            assert outcome.error.isprintable()
        else:
            assert next(attempts, None) is None  # it warns, and is answered
            outcome.envelope = response.response_json
    return outcome


def cut(data: bytes, size: int) -> list[bytes]:
    return [data[start : start + size] for start in range(0, len(data), size)]


# How replies are written


def framed(value: Any, prefix: str = "data: ", newline: str = "\n", indent: int | None = None, blank: int = 1) -> bytes:
    """An event, or bare JSON without a ``prefix``; in one line all characters are raw."""
    lines = json.dumps(value, indent=indent, ensure_ascii=bool(indent)).split("\n")
    return ("".join(prefix + line + newline for line in lines) + newline * blank).encode()


def choice(part: dict[str, Any] | None = None, reason: str | None = None, **fields: Any) -> dict[str, Any]:
    """A chunk with one choice, whose delta is ``part``."""
    own = {} if part is None else {"delta": part}
    return {"id": "1", "choices": [{"index": 0, **own, "finish_reason": reason, **fields}]}


def text(content: str) -> dict[str, Any]:
    """A chunk that holds nothing but text."""
    return {"choices": [{"delta": {"content": content}}]}


def thought(reasoning: str, name: str = "reasoning_content") -> dict[str, Any]:
    return choice({"role": "assistant", "content": None, name: reasoning})


def message(content: Any, reason: str | None = "stop", **fields: Any) -> dict[str, Any]:
    """A whole completion, or a last event that has the whole message again."""
    own = {"role": "assistant", "content": content, **fields}
    choices = [{"index": 0, "message": own, "finish_reason": reason}]
    return {"id": "1", "object": "chat.completion", "choices": choices}


def events(*values: Any) -> bytes:
    """Events of these JSON values. Bytes are put there as they are."""
    return b"".join(value if isinstance(value, bytes) else event(value) for value in values)


def stream(*values: Any) -> bytes:
    """An event stream that ends with [DONE]."""
    return events(*values) + DONE


def body(value: Any) -> bytes:
    """A reply that is one JSON value."""
    return json.dumps(value).encode()


def upon(*values: Any, **fields: Any) -> Row:
    """A row whose reply is a stream of these values, and whose text is "Once upon"."""
    return Row(stream(*values), "Once upon", **fields)


A, B = event(delta("a")), event(delta("b"))
ONCE, UPON, ONCE_UPON, STOP = delta("Once "), delta("upon"), delta("Once upon"), delta(finish_reason="stop")
ROLE = choice({"role": "assistant", "content": ""})
USAGE = {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5}
EMPTY = "the answer was empty"
UNREAD = "the reply was not understood; it begins: "
PARTLY = "part of the reply was not understood; it begins: "
INCOMPLETE = "the answer is incomplete: "
REPORTED = "the service reports an error: "

# Lines and fields

IN_LINES, BARE = framed(text("a"), indent=1, blank=0), framed(text("b"), prefix="", blank=0)
SEPARATORS = "\u2028\u2029\u0085\u000b\u000c\u001c\u001d\u001e"  # where Python's splitlines cuts as well
RAW = f'{{"choices": [{{"delta": {{"content": "a{SEPARATORS}b"}}}}]}}\n'.encode()
FRAMING = {
    **{f"lines end at {end}": Row((A + B + DONE).replace(b"\n", end), "ab") for end in (b"\n", b"\r\n", b"\r")},
    "CRLF within an event": Row((IN_LINES + b"\n" + DONE).replace(b"\n", b"\r\n"), "a"),
    "other separators do not end a line": Row(b"data: " + RAW + DONE, f"a{SEPARATORS}b"),
    "other separators do not end bare JSON": Row(RAW + DONE, f"a{SEPARATORS}b"),
    **{f"byte order mark before {start[:6]}": Row(BOM + start + DONE, "b") for start in (B, BARE, b"\n" + B)},
    "byte order mark in a text": Row(framed(text("\ufeffa\ufeff")) + DONE, "\ufeffa\ufeff"),
    "byte order mark before a later line": Row(A + BOM + B + DONE, "a", error="data: {"),
    "characters of several bytes": Row(framed(text("Привет \U0001f600")) + DONE, "Привет \U0001f600"),
    "a byte that is no UTF-8": Row(framed(text("a?b")).replace(b"?", b"\xff") + DONE, "a\ufffdb"),
    **{
        f"field {line}": Row(line + b"\n\n" + line + b"\n" + A + B[:-1] + line + b"\n\n" + DONE, "ab")
        for line in (b":", b": ping", b"event: message", b"event", b"id: 1", b"id:", b"retry: 100", b"retry")
    },
    "unknown fields before any text": Row(b"datum: 1\nfoo\n" + A + DONE, "a", warning=PARTLY + '"datum: 1"'),
    **{f"{name}": Row((A + DONE).replace(b"data: ", name), "a") for name in (b"data:", b"data:  ", b"data:\t")},
    "data: in a text": Row(framed(text("data: data:\ndata: [DONE]")) + DONE, "data: data:\ndata: [DONE]"),
    "no data": Row(b"data:\n\ndata: \n\ndata\n\n" + A + DONE, "a"),
    "data without a colon within an event": Row(b"data\n\n" + IN_LINES + b"data\n\n" + DONE, "a"),
    "data: without a space within an event": Row(framed(text("a"), "data:", indent=1) + B + DONE, "ab"),
    "other fields within an event": Row(IN_LINES.replace(b"\n", b"\n: ping\nid: 1\n") + b"\n" + B + DONE, "ab"),
    "last event without a blank line": Row(A + event(delta("b", "stop"))[:-1], "ab"),
    "last event without a line end": Row(A + event(delta("b", "stop"))[:-2], "ab"),
    "no blank lines": Row((A + B + DONE).replace(b"\n\n", b"\n"), "ab"),
    "no blank line after many lines": Row(IN_LINES + B + DONE, "ab"),
    "bare JSON": Row(b" " + BARE + BARE + b"\r\n\n[DONE]\n" + B, "bb"),
    "bare JSON among events": Row(A[:-1] + BARE + A + BARE + DONE, "abab"),
    "values in one line": Row(A[:-2] + BARE[:-1] + b" [DONE]" + BARE, "ab"),
    "whole completion": Row(body(message("a")), "a"),
    **{
        f"whole completion, {end!r}": Row(json.dumps(message("a"), indent=2).replace("\n", end).encode(), "a")
        for end in ("\n", "\r\n", "\r", "\n\n")
    },
    "whole completion as an event": Row(event(message("a")), "a"),
    "a raw line end in a string": Row(body(message("a?b")).replace(b"?", b"\n"), "a\nb"),
    **{
        f"text {content!r} as it is": Row(stream(text(content)), content)
        for content in ("null", "0", "[DONE]", "{}", "<html>", "\0", "\x1b[31m")
    },
}

# The end of a reply

LIMIT = "the answer may be cut short: it reached the model's limit (finish reason: "
USUAL = (
    *("stop", "normal", "eos", "eos_found", "eos_token", "stop_str", "stop_sequence", "end_turn", "completed", None),
    *("FINISH_REASON_STOP", "STOP", "<|eot_id|>", "<|im_end|>", "tool_calls", "function_call"),
)
UNUSUAL = ("content_filter", "abort", "error", "SAFETY", "FINISH_REASON_SAFETY", "abnormal", "<|odd|>", {"a": 1})
NOTHING = (b"", b"\n\n", b"\r\n", BOM, DONE, b": ping\n\n", b"event: ping\n\n", b"id", b"data\n\n", b"  \n")
REST = (B, event({"error": "b"}), b"<html>", b"\xff\xff", b"{", b"x" * 100, b"oh no\n")
END = {
    **{f"{done}": Row(A + done, "a") for done in (DONE, b"data:[DONE]\n", b"[DONE]\r\n", b"data: [DONE]")},
    **{f"after [DONE], {rest[:9]}": Row(A + DONE + rest, "a") for rest in REST},
    "after a [DONE] that was held": Row(IN_LINES + DONE[:-1] + BARE, "a"),
    "neither [DONE] nor a reason": Row(A, "a", warning="cut short: the stream ended without finish reason or [DONE]"),
    "a reason": Row(event(delta("a", "stop")), "a"),
    "a reason at the top": Row(event({**text("a"), "finish_reason": "stop"}), "a"),
    "a whole completion without a reason": Row(body(message("a", None)), "a"),
    **{f"usual reason {reason}": Row(stream(delta("a", reason)), "a") for reason in USUAL},
    **{
        f"unusual reason {reason}": Row(stream(delta("a", reason)), "a", warning=f"cut short (finish reason: {reason})")
        for reason in UNUSUAL
    },
    "the limit": Row(stream(delta("a", "length")), "a", warning=LIMIT + "length"),
    "the limit in other words": Row(stream(delta("a", "max_tokens")), "a", warning=LIMIT + "max_tokens"),
    "the limit at the top": Row(event({**text("a"), "finish_reason": "length"}), "a", warning=LIMIT + "length"),
    "the limit of a completion": Row(body(message("a", "length")), "a", warning=LIMIT + "length"),
    **{f"nothing but {reply}": Row(reply, error=EMPTY) for reply in NOTHING},
    "a reason without text": Row(event(choice({}, "x")), error=f"(finish reason: x): {EMPTY}; the reply begins: "),
    "a whole completion without text": Row(body(message("")), error=EMPTY),
    "white space alone": Row(stream(text(" "), text("\n")), " \n", error=EMPTY),
    "cut within an event": Row(A + B[:20], "a", error=INCOMPLETE + "the reply ends within an event"),
    "cut within the first event": Row(A[:20], error=UNREAD),
}

# Where the text stands

PARTS = [{"type": "text", "text": "Once "}, {"type": "text", "text": "upon"}]
PICTURE = {"type": "image_url", "image_url": {"url": "https://example.org/a.png"}}
AGAIN = {"message": {"content": "Once upon"}}


def two_choices(first: str, second: str, **index: int) -> dict[str, Any]:
    return {"choices": [{"delta": {"content": content}, **index} for content in (first, second)]}


TEXTS = {
    "index counts chunks": upon(ROLE, *(choice({"content": c}, index=n) for n, c in enumerate(["Once ", "upon"], 3))),
    "index is no longer sent": upon(choice({"content": "Once "}, index=3), text("upon")),
    "two choices without an index": upon(two_choices("Once ", "x"), two_choices("upon", "y")),
    "two choices with an index": upon(two_choices("Once ", "x", index=0), two_choices("upon", "y", index=1)),
    **{
        f"message beside the delta {json.dumps(part)}": upon(choice(part, "stop", **AGAIN))
        for part in ({"role": "assistant"}, {"content": ""}, {"content": None})
    },
    "message in place of a delta": upon(message("Once ", None), message("upon")),
    "delta.text": upon(choice({"text": "Once "}), choice({"text": "upon"})),
    "choices as an object": upon(*({"choices": {"delta": {"content": words}}} for words in ("Once ", "upon"))),
    **{
        f"{key} without a code, beside text": upon(
            *(choice({"content": words}) | {key: "fine"} for words in ("Once ", "upon"))
        )
        for key in ("message", "msg", "detail", "status_msg")
    },
    "choice.content": upon(choice(content="Once "), choice(content="upon")),
    "choice.text": upon(choice(text="Once "), choice(text="upon")),
    "choice.text in a whole reply": Row(body(choice(None, "stop", text="Once upon")), "Once upon"),
    "delta.refusal": upon(*(choice({"content": None, "refusal": words}) for words in ("Once ", "upon"))),
    "message.refusal": Row(body(message(None, refusal="Once upon")), "Once upon"),
    "the same delta twice": Row(stream(delta("ha"), delta("ha")), "haha"),
    "the message so far in each chunk": upon(
        choice({"content": "Once "}, message={"content": "Once "}),
        choice({"content": "upon"}, **AGAIN),
        choice({"content": ""}, "stop", **AGAIN),
    ),
    "the message again, beside an empty delta": upon(ONCE, UPON, choice({"content": ""}, "stop", **AGAIN)),
    "the message again": upon(ONCE, UPON, message("Once upon")),
    "the message again, after the end": upon(ONCE, UPON, STOP, message("Once upon")),
    "the message again, as bare JSON": upon(ONCE, UPON, framed(message("Once upon"), prefix="")),
    "the message again, in parts": upon(ONCE, UPON, message(PARTS)),
    "digits as numbers": Row(
        stream(*(choice({"content": part}) for part in ("$", 1, 0, 0, " or ", 2.5, 0))), "$100 or 2.50"
    ),
    "parts": upon(choice({"content": PARTS})),
    "parts, one in each chunk": upon(*(choice({"content": [part]}) for part in PARTS)),
    "parts in a whole reply": Row(body(message(PARTS)), "Once upon"),
    "parts, one of them a picture": upon(choice({"content": [*PARTS, PICTURE]}), warning=f"{PARTLY} … image_url"),
    "a list around a completion": Row(body([message("Once upon")]), "Once upon"),
    "a list around each chunk": upon([ONCE], [UPON], [STOP]),
}

# Halves of characters: a server that cuts text by UTF-16 units ends a chunk with one half, and begins the next with one

HIGH, LOW, FACE = "\ud83d", "\ude00", "\U0001f600"
BETWEEN: dict[str, Any] = {
    "no choices": {"choices": []},
    "an empty delta": choice({}),
    "a comment": b": ping\n\n",
    "a message": choice({}, message={"content": "a"}),
}
JOINED = {
    (f"a{HIGH}", f"{LOW}b"): f"a{FACE}b",
    (f"{HIGH}{LOW}{HIGH}", LOW): f"{FACE}{FACE}",
    (HIGH, HIGH, LOW): f"\ufffd{FACE}",
    (LOW, HIGH): "\ufffd\ufffd",
    (HIGH, "a"): "\ufffda",
    (f"{HIGH}a",): "\ufffda",
    (HIGH,): "\ufffd",
    (LOW,): "\ufffd",
}
HALVES = {
    **{ascii(halves): Row(stream(*map(text, halves)), whole) for halves, whole in JOINED.items()},
    **{f"{name} between": Row(stream(text(HIGH), value, text(LOW)), FACE) for name, value in BETWEEN.items()},
    "reasoning between": Row(stream(text(f"a{HIGH}"), thought("b"), text(LOW)), f"a{FACE}", reasoning="b"),
    "the second with a finish reason": Row(stream(text(HIGH), delta(LOW, "stop")), FACE),
    "the second in parts": Row(stream(text(HIGH), choice({"content": [{"type": "text", "text": LOW}]})), FACE),
    "one half with a finish reason": Row(event(delta(f"a{HIGH}", "stop")), "a\ufffd"),
    "of reasoning": Row(stream(thought(f"a{HIGH}"), thought(LOW), text("b")), "b", reasoning=f"a{FACE}"),
    "one half of reasoning": Row(stream(thought(f"a{HIGH}"), text("Hi")), "Hi", reasoning="a\ufffd"),
    "one half of each": Row(stream(thought(f"a{HIGH}"), text(f"{LOW}b")), "\ufffdb", reasoning="a\ufffd"),
    "in <think>": Row(stream(text(f"<think>{HIGH}"), text(f"{LOW}</think>a")), "a", reasoning=FACE),
}

# What holds nothing and says nothing

HARMLESS_VALUES: dict[str, Any] = {
    **{json.dumps(value): value for value in (None, {}, [], "", 0, False, [{}], {"type": "ping"})},
    "a ping in an event": b'event: ping\ndata: {"type": "ping"}\n\n',
    "a comment": b": OPENROUTER PROCESSING\n\n",
    "a heartbeat": b"event: heartbeat\n\n",
    "no choices": {"choices": []},
    "choices of null": {"id": "1", "choices": None},
    "usage alone": {"usage": USAGE},
    "usage beside no choices": {"choices": [], "usage": USAGE},
    "usage of null": {"choices": [], "usage": None},
    "no delta": {"choices": [{"index": 0}]},
    "an empty delta": choice({}),
    "a delta of null": {"choices": [{"delta": None, "message": None}]},
    "a delta with a role": choice({"role": "assistant"}),
    "a delta of nulls": choice(dict.fromkeys(["content", "refusal", "tool_calls", "reasoning_content"])),
    "a delta with no calls": choice({"content": "", "tool_calls": [], "function_call": None}),
    "no parts": choice({"content": []}),
    "log probabilities": choice({"content": ""}, logprobs={"content": []}),
    "reasons to stop": choice({"content": ""}, stop_reason=None, native_finish_reason=None, matched_stop=128009),
    "timings": {"choices": [], "usage": USAGE, "timings": {"predicted_ms": 7.5}},
    "an error of null": {**choice({}), "error": None},
    "a success beside the choices": {**choice({}), "base_resp": {"status_code": 0, "status_msg": "success"}},
    "a success in words": {**choice({}), "code": 0, "message": "Success", "sid": "cht1"},
    "details of the host": {**choice({}), "x_groq": {"id": "req_1", "usage": USAGE}, "provider": "Somebody"},
    "details of reasoning": choice({"content": "", "reasoning_details": [{"data": "abc"}]}),
    "annotations": choice({"content": "", "annotations": [{"data": "abc"}]}),
    "a part that holds nothing but its type": choice({"content": [{"type": "thinking", "thinking": []}]}),
    "a delta that holds nothing but its type": choice({"type": "thinking", "thinking": []}),
    "a part without its text": choice({"content": [{"type": "text", "text": ""}]}),
}
AZURE = {"choices": [], "prompt_filter_results": [{"prompt_index": 0, "content_filter_results": {}}]}
HARMLESS = {
    **{name: upon(value, ONCE, value, UPON, STOP, value) for name, value in HARMLESS_VALUES.items()},
    **{f"{name}, alone": Row(stream(value), error=EMPTY) for name, value in HARMLESS_VALUES.items()},
    "a reason at the top, alone": Row(stream({"finish_reason": "stop"}), error=EMPTY),
    "the filters of Azure, which come first": upon(AZURE, ONCE_UPON, STOP),
}

# What may hold a part of the answer in a form that is not known

FOREIGN_VALUES: dict[str, Any] = {
    "an object": {"answer": "a time"},
    "a nested object": {"output": {"text": "a time"}},
    "an object with a type": {"type": "citation", "sources": ["https://example.org"]},
    "an object with usage": {"answer": "a time", "usage": USAGE},
    "an object with a finish reason": {"answer": "a time", "finish_reason": "stop"},
    "an object with an id and a model": {"id": "1", "model": "m", "created": 7, "answer": "a time"},
    "a status": {"status": "thinking", "progress": 0.5},
    "a string": "a time",
    "a number": 42,
    "true": True,
    "NaN": float("nan"),
    "a list": ["a time", 42],
    "choices of words": {"choices": "a time"},
    "a choice of words": {"choices": ["a time"]},
    "a delta of words": {"choices": [{"index": 0, "delta": "a time"}]},
    "a delta of words, with a finish reason": {"choices": [{"delta": "a time", "finish_reason": "stop"}]},
    "content of another shape": {"choices": [{"index": 0, "delta": {"content": {"answer": "a time"}}}]},
    "content in lists": {"choices": [{"delta": {"content": [["a time"]]}}]},
    "a picture": choice({"content": "", "images": [{"data": "abc"}]}),
}
# Whole replies of other kinds of servers
SHAPES: dict[str, Any] = {
    "Anthropic": {"id": "msg_1", "content": [{"type": "text", "text": "Once"}], "stop_reason": "end_turn"},
    "Anthropic, a stream": {"type": "message_start", "message": {"id": "msg_1", "role": "assistant", "content": []}},
    "OpenAI's Responses": {"id": "r1", "output": [{"content": [{"type": "output_text", "text": "Once"}]}]},
    "Cohere": {"response_id": "r1", "text": "Once", "generation_id": "g1", "finish_reason": "COMPLETE"},
    "Cohere, version 2": {"id": "c1", "message": {"content": [{"text": "Once"}]}, "finish_reason": "COMPLETE"},
    "DashScope": {"output": {"text": "Once", "finish_reason": "stop"}, "usage": USAGE, "request_id": "d1"},
    "Workers AI": {"result": {"response": "Once"}, "success": True, "errors": [], "messages": []},
    "Baidu": {"id": "as-1", "object": "chat.completion", "created": 1, "result": "Once", "usage": USAGE},
    "Gemini": {"candidates": [{"content": {"parts": [{"text": "Once"}], "role": "model"}, "finishReason": "STOP"}]},
    "Ollama": {"model": "llama", "message": {"role": "assistant", "content": "Once"}, "done": True},
    "text-generation-inference": {"generated_text": "Once"},
    "none": {"status": "failed", "error_message": "no GPU", "request_id": "7"},
}
NO_JSON = ("{'choices': []}", '{"choices": [}', "[DONE", "[done]", '{"a": 1')
NO_VALUE = ("hello", "-", '{"choices": []} and more')
OBJECT = FOREIGN_VALUES["an object"]
FOREIGN = {
    **{f"{name}, within": upon(ONCE, value, UPON, STOP, warning=PARTLY) for name, value in FOREIGN_VALUES.items()},
    **{f"{name}, alone": Row(stream(ROLE, value, STOP), error=UNREAD) for name, value in FOREIGN_VALUES.items()},
    "an object, quoted": upon(ONCE, OBJECT, UPON, STOP, warning=PARTLY + '{"answer": "a time"}'),
    "a string, quoted": upon(ONCE, "a time", UPON, STOP, warning=PARTLY + '"a time"'),
    "first": upon(OBJECT, ONCE_UPON, STOP, warning=f"{PARTLY} … a time"),
    "last": upon(ONCE_UPON, OBJECT, warning=f"{PARTLY} … a time"),
    "after the end": upon(ONCE_UPON, STOP, OBJECT, warning=f"{PARTLY} … a time"),
    "several": upon(ONCE, OBJECT, 42, UPON, {"result": "two"}, STOP, warning=PARTLY + '{"answer": "a time"}'),
    **{
        f"{name}, {framing.__name__}": Row(framing(value), error=f" begins: … {json.dumps(value)[:24]}")
        for name, value in SHAPES.items()
        for framing in (body, stream)
    },
    **{
        f"no JSON: {words}": Row(A + f"data: {words}\n\n".encode() + B, "a", error=f"{UNREAD} … {words[-8:]}")
        for words in NO_JSON
    },
    **{
        f"no JSON: {words}": Row(A + f"data: {words}\n\n".encode() + B, "a", error=f"{INCOMPLETE} … {words[-8:]}")
        for words in NO_VALUE
    },
    **{
        f"no JSON, after the end: {words}": upon(ONCE_UPON, STOP, f"{words}\n\n".encode(), warning=f"{PARTLY} … {end}")
        for words, end in {"event: close\ndata: close": "close", "data: DONE": "DONE", "Bye": "Bye"}.items()
    },
    "plain text": Row(b"\nUpstream is down\nGoodbye\n", error="Upstream is down"),
    "a web page": Row(b"<html>\n\n<head><title>Oh</title>\ndata: {}", error="answered with a web page titled: Oh"),
    "a web page in the middle": Row(A + b"<html><title>Oh</title>", "a", error="answered with a web page titled: Oh"),
}

# Errors in a reply of status 200

ERROR = {"code": 502, "message": "no GPU"}
BESIDE = [{"error": ERROR}, {"errors": [ERROR]}, {"errors": ["no GPU"]}, {"message": "no GPU", "code": 503}]
REPORTS: dict[str, Any] = {
    "an error": {"error": {"message": "no GPU"}},
    "an error of words": {"error": "no GPU"},
    "an error beside text": {"error": ERROR, **text("b")},
    "an error and a message": {"error": "Forbidden", "message": "no GPU", "statusCode": 403},
    **{f"in the choice, {reason}": choice({}, reason, error=ERROR) for reason in (None, "stop", "error")},
    **{f"in the delta, {reason}": choice({"error": ERROR}, reason) for reason in (None, "stop", "error")},
    "in the choice, as words": choice({"content": ""}, "error", error="no GPU"),
    "in the choice, without a delta": choice(None, "error", error=ERROR),
    **{f"choices null and {[*beside.values()]}": {"id": "1", "choices": None, **beside} for beside in BESIDE},
    **{f"choices empty and {[*beside.values()]}": {"id": "1", "choices": [], **beside} for beside in BESIDE},
}
# What a server says that dies, or a proxy in front of it
NAMED = b"event: error\ndata: "
DEATHS: dict[str, Any] = {
    "event: error, an object": NAMED + b'{"code": 500, "detail": "no GPU"}\n\n',
    "event: error, no spaces": b'event:error\ndata:{"status": "no GPU"}\n\n',
    "event: error, an error in it": NAMED + b'{"type": "error", "error": {"code": 529, "message": "no GPU"}}\n\n',
    "event: error, a string": NAMED + b'"no GPU"\n\n',
    "event: error, a chunk": NAMED + b'{"choices": [], "reason": "no GPU"}\n\n',
    "event: error, bare JSON": b'event: error\n{"message": "no GPU"}\n\n',
    "event: error, text": b"event: error\n" + event(delta("no GPU")),
    "event: error, words": NAMED + b"no GPU\n\n",
    "event: error, in lines": NAMED + b'{"message":\ndata:  "no GPU"}\n\n',
    "event: error, other fields": b'id: 7\nevent: error\nretry: 9\ndata: {"message": "no GPU"}\n\n',
    "event: error, CRLF": b'event: error\r\ndata: {"message": "no GPU"}\r\n\r\n',
    "a field named error": b'error: {"code": 500, "message": "no GPU", "type": "server_error"}\n\n',
    "a field named error, no space": b'error:{"code": 500, "message": "no GPU"}\n\n',
    "a line of words": b"Internal Server Error: no GPU\n",
    "a line of words without its end": b"A server error has occurred, no GPU",
    "words of a proxy": b"upstream connect error or disconnect/reset before headers. no GPU\n\n",
    "a string of JSON": '{"error": {"message": "no GPU"}}',
    "in x_groq": {**choice({}), "x_groq": {"id": "req_1", "error": "no GPU"}},
    "in x_groq, with a reason": {**choice({}, "stop"), "x_groq": {"id": "req_1", "error": {"message": "no GPU"}}},
    "in x_groq, without choices": {"choices": [], "x_groq": {"error": ERROR}},
}
NAMELESS = {"no data": b"event: error\n\n", "{}": NAMED + b"{}\n\n", "null": NAMED + b"null\n\n"}
# A reason in place of a choice
REASONS: dict[str, Any] = {
    "base_resp": {"choices": None, "base_resp": {"status_code": 1008, "status_msg": "no GPU"}},
    "detail": {"choices": [], "detail": "no GPU"},
    "message": {"message": "no GPU"},
}
FILTER = {"content_filter_results": {"error": {"code": "content_filter_error", "message": "timed out"}}}
ERRORS = {
    **{f"{name}, first": Row(stream(value), error=f"{REPORTED} … no GPU") for name, value in REPORTS.items()},
    **{
        f"{name}, later": Row(A + events(value) + B, "a", error=f"{REPORTED} … no GPU")
        for name, value in REPORTS.items()
    },
    **{f"{name}, as a whole reply": Row(body(value), error=f"{REPORTED} … no GPU") for name, value in REPORTS.items()},
    "in the message": Row(body(message("", "error", error=ERROR)), error=f"{REPORTED} … no GPU"),
    **{f"{name}, first": Row(events(value), error="no GPU") for name, value in {**DEATHS, **REASONS}.items()},
    **{f"{name}, later": Row(A + events(value), "a", error="no GPU") for name, value in DEATHS.items()},
    **{f"{name}, later": Row(A + stream(v), "a", error=f"{REPORTED} … no GPU") for name, v in REASONS.items()},
    **{f"event: error, {name}, first": Row(value, error="error") for name, value in NAMELESS.items()},
    **{f"event: error, {name}, later": Row(A + value + DONE, "a", error="error") for name, value in NAMELESS.items()},
    "last words after a delta": Row(A + b"Oh no\n", "a", error=f"{INCOMPLETE} … Oh no"),
    "last words after a choice of text": Row(events(choice(text="a")) + b"Oh no\n", "a", error="Oh no"),
    "of a filter, without text": Row(stream(choice({"content": ""}, **FILTER)), error="timed out"),
    "of a filter, beside text": Row(stream(choice({"content": "a"}, **FILTER)), "a"),
}

# Reasoning, and the tools and schemas beside it


SEE = "Let me see."
NOW = '{"name": "now", "parameters": {}}'
REX = '{"name": "Rex", "age": 7}'
TOOLS = {"tools": [llm.Tool.function(now)]}
TAGS = (("<think>", "</think>"), ("<scratch_pad>", "</scratch_pad>"))
SPACED = (("<think>\n", "\n</think>\n\n"), ("\n<think>", "</think>\n"))
FIELDS = ("reasoning_content", "reasoning")


def reasoned(*values: Any, answer: str = "Once upon", reasoning: str = SEE, **fields: Any) -> Row:
    """A row whose reply is a stream of these values, or of the characters of a string."""
    chunks = map(delta, values[0]) if isinstance(values[0], str) else values
    return Row(stream(*chunks), answer, reasoning=reasoning, **fields)


REASONING_ALONE = {
    **{f"delta.{name}": stream(thought(SEE, name), STOP) for name in FIELDS},
    **{f"message.{name}": body(message("", **{name: SEE})) for name in FIELDS},
    "at the limit": stream(thought(SEE), choice({}, "length")),
    "<think>": stream(delta(f"<think>{SEE}</think>")),
    "<think> without an end": stream(delta(f"<think>{SEE}")),
}
CALLED = {"answer": "", "calls": [("now", {})], "given": TOOLS}
REASONING = {
    **{f"{name}, alone": Row(reply, "", "some reasoning", "", SEE) for name, reply in REASONING_ALONE.items()},
    **{f"delta.{name}": reasoned(thought("Let me ", name), thought("see.", name), ONCE, UPON) for name in FIELDS},
    **{
        f"message.{name}": Row(body(message("Once upon", **{name: SEE})), "Once upon", reasoning=SEE) for name in FIELDS
    },
    "both names for the same": reasoned(choice(dict.fromkeys(FIELDS, SEE)), ONCE_UPON),
    "beside text": reasoned(choice({"reasoning_content": SEE, "content": "Once upon"})),
    "beside an empty text": reasoned(choice({"reasoning": SEE, "content": ""}), ONCE_UPON),
    "the same twice, beside text": reasoned(
        *(choice({"content": words, "reasoning": "Ha"}) for words in ("Once ", "upon")), reasoning="HaHa"
    ),
    "empty": upon(choice({"reasoning": "", "content": "Once upon"})),
    "between texts": reasoned(ONCE, thought(SEE), UPON),
    "again in the whole message": reasoned(thought(SEE), ONCE_UPON, message("Once upon", reasoning_content=SEE)),
    "<think> in a whole reply": Row(body(message(f"<think>{SEE}</think>Once")), "Once", reasoning=SEE),
    **{f"{start!r} … {end!r}": reasoned(f"{start}{SEE}{end}Once upon") for start, end in (*TAGS, *SPACED)},
    "<think>, smaller-than in it": reasoned(
        "<think>a < </thin </ <think></think>b", answer="b", reasoning="a < </thin </ <think>"
    ),
    "<think> again": reasoned(f"<think>{SEE}</think>a <think>b</think>.", answer="a <think>b</think>."),
    **{
        f"no reasoning: {words}": reasoned(words, answer=words, reasoning="")
        for words in ("Use <think>this</think> tag.", "<thinking>Once", "<thin", "Once</think> upon")
    },
    **{
        f"a call in {start}": reasoned(f"{start}{NOW_TAG}{end}a", answer="a", reasoning=NOW_TAG, given=TOOLS)
        for start, end in TAGS
    },
    **{
        f"after {end}, {call[:9]}": reasoned(f"{start}{SEE}{end}\n{call}", **CALLED)
        for (start, end), call in itertools.product(TAGS, (NOW_TAG, NOW))
    },
    "a call after reasoning in a field": reasoned(thought(SEE), delta(NOW), **CALLED),
    "JSON in <think>": reasoned(
        f"<think>{CLEO}?</think>\n{REX}", answer=REX, reasoning=f"{CLEO}?", given={"schema": DOG}
    ),
}

# Tool calls in OpenAI's own fields: no `tools` field was sent, so they are not understood

CALL = {"index": 0, "id": "call_0", "type": "function", "function": {"name": "now", "arguments": "{}"}}
PIECES = [{**CALL, "function": {"name": "now", "arguments": "{"}}, {"index": 0, "function": {"arguments": "}"}}]
NATIVE_CALLS = {
    "in one chunk": [choice({"tool_calls": [CALL]}), choice({}, "tool_calls")],
    "in pieces": [*(choice({"tool_calls": [piece]}) for piece in PIECES), choice({}, "tool_calls")],
    "with the reason": [choice({"content": None, "tool_calls": [CALL]}, "tool_calls")],
    "as a function_call": [choice({"function_call": CALL["function"]}), choice({}, "function_call")],
    "in a message": [message(None, "tool_calls", tool_calls=[CALL])],
}
NATIVE = {
    **{f"{name}, alone": Row(stream(*chunks), error=f"{UNREAD} … now") for name, chunks in NATIVE_CALLS.items()},
    **{
        f"{name}, after text": upon(ONCE_UPON, *chunks, warning=f"{PARTLY} … now")
        for name, chunks in [*NATIVE_CALLS.items()][:-1]
    },
    "of a tool that was given": upon(ONCE_UPON, choice({"tool_calls": [CALL]}), warning=f"{PARTLY} … now", given=TOOLS),
    "in a message, beside text": upon(message("Once upon", tool_calls=[CALL]), warning=f"{PARTLY} … now"),
}

SECTIONS = {"framing": FRAMING, "end": END, "text": TEXTS, "halves": HALVES, "harmless": HARMLESS, "foreign": FOREIGN}
SECTIONS |= {"error": ERRORS, "reasoning": REASONING, "native call": NATIVE}
ROWS = {f"{section}: {name}": row for section, rows in SECTIONS.items() for name, row in rows.items()}


@pytest.mark.parametrize("row", ROWS.values(), ids=ROWS)
def test_reply(row: Row) -> None:
    """The text comes out whole and once, an error has the server's words, and what was not understood is quoted."""
    by_line = [line + b"\n" for line in row.reply.split(b"\n")]
    by_line[-1] = by_line[-1][:-1]
    with_empty_pieces = [piece for byte in cut(row.reply, 1) for piece in (byte, b"")]
    for pieces in ([row.reply], by_line, cut(row.reply, 7), with_empty_pieces):
        read(*pieces, **(row.given or {})).check(row)


OVER_SOCKETS = [
    *(FRAMING[name] for name in ("lines end at b'\\r\\n'", "bare JSON", "whole completion, '\\n'")),
    *(END[name] for name in ("nothing but b''", "unusual reason abort", "the limit", "neither [DONE] nor a reason")),
    *(TEXTS["the message again"], HALVES["reasoning between"], NATIVE["in one chunk, after text"]),
    *(FOREIGN[name] for name in ("an object, quoted", "no JSON: hello", "a web page")),
    *(ERRORS[name] for name in ("an error, later", "event: error, text, later", "a line of words, later")),
    *(REASONING[name] for name in ("delta.reasoning", "'<think>' … '</think>'")),
]


@pytest.mark.parametrize("row", OVER_SOCKETS)
def test_reply_over_a_connection(row: Row, ask: Ask, server: Loopback) -> None:
    """The same over a real connection, sync and async, with the warnings in the log."""
    server.answer = say(row.reply.splitlines(keepends=True))
    outcome = Outcome()
    with Warnings() as outcome.warnings:
        answer = ask()
    outcome.error = answer.line if answer.error else ""
    outcome.parts = [("text", chunk) for chunk in answer.chunks]
    if not answer.error:
        messages = answer.response.messages()
        [written] = asyncio.run(messages) if inspect.isawaitable(messages) else messages
        kinds = {ReasoningPart: "reasoning", TextPart: "text"}
        assert "".join(answer.chunks) == row.text
        outcome.parts = [(kinds[type(part)], part.text) for part in written.parts]
    outcome.check(row)
    assert len(server.requests) == 1


# What a row cannot say


def test_text_is_passed_on_as_soon_as_its_line_has_ended() -> None:
    """It does not wait for a blank line, nor for the end of reasoning that is over."""
    attempt = new_attempt()
    pieces = [A[:-1], b"\n", framed(text("b"), prefix="", blank=0)]
    assert [attempt.feed(piece) for piece in pieces] == [["a"], [], ["b"]]
    attempt = new_attempt()
    fed = [attempt.feed(event(delta(words))) for words in ("<think>Let me", " see.</think>", "One ", "two")]
    assert fed[2:] == [["One "], ["two"]]


def test_envelope() -> None:
    """The log has the first id and model, the last usage, the finish reason, and not the text again."""
    first, second = {"id": "1", "model": "m", "created": 7}, {"id": "2", "model": "n", "created": 8}
    usages = [{**text(""), "usage": {"n": n}} for n in (1, 2)]
    reply = stream(
        {**text("a"), **first, "object": "x"}, usages[0], {**text("b"), **second}, STOP, usages[1], {"usage": None}
    )
    assert read(reply).envelope == {**first, "finish_reason": "stop", "usage": {"n": 2}}
    assert read(stream(text("a"))).envelope == {}


@functools.cache
def log() -> sqlite_utils.Database:
    """An empty log of `llm`, which it takes 0.1 s to make."""
    db = sqlite_utils.Database(memory=True)
    migrate(db)
    return db


DEEP = {"lists": "[" * 600 + "1" + "]" * 600, "objects": '{"x_details":' * 600 + "1" + "}" * 600}
HUGE = 10**30
ENVELOPES = {
    "half a character": '"model": "\\ud83d", "id": "\\ud83d"',
    "numbers beyond SQLite": f'"usage": {{"prompt_tokens": {HUGE}, "completion_tokens": -{HUGE}}}, "created": {HUGE}',
    "no numbers": '"usage": {"prompt_tokens": "many", "completion_tokens": null, "x_details": []}, "model": 7',
    "no object": '"usage": "much", "created": {}',
    "not a number": '"usage": {"prompt_tokens": NaN, "x_details": {"y": Infinity}}',
    **{
        f"{key} of deep {kind}": f'"{key}": {deep}'
        for key in ("id", "model", "usage", "finish_reason")
        for kind, deep in DEEP.items()
    },
}


@pytest.mark.parametrize("envelope", ENVELOPES.values(), ids=ENVELOPES)
def test_whatever_comes_beside_the_text_can_be_logged(envelope: str, ask: Ask, server: Loopback) -> None:
    """An envelope of the wrong types fails neither the answer nor what `llm` does with it then."""
    server.answer = say([f'{{{envelope}, "choices": [{{"delta": {{"content": "one"}}}}]}}'.encode()])
    answer = ask()
    assert answer.text == "one"
    response = answer.response
    if isinstance(response, llm.AsyncResponse):
        response = asyncio.run(response.to_sync_response())
    db = sqlite_utils.Database(memory=True)
    log().conn.backup(db.conn)
    response.log_to_db(db)
    assert db["turns" if db["turns"].exists() else "responses"].count == 1  # "responses" before llm 0.36
    db.close()


@pytest.mark.parametrize("kind", [[], ["--async"], ["--no-stream"]], ids=["sync", "async", "whole"])
def test_reasoning_on_the_command_line(kind: list[str], server: Loopback) -> None:
    """It is shown apart from the answer, `-R` hides it, the log keeps it, and `-c` does not send it back."""
    whole = "--no-stream" in kind
    reply = body(message("Once upon", reasoning_content=SEE)) if whole else stream(thought(SEE), ONCE_UPON, STOP)
    server.answer = say([reply])
    command = ["-m", "autonomous-llama", "hi", *kind]
    stdout, stderr, code = invoke(*command)
    assert (stdout, stderr.strip(), code) == ("Once upon\n", "" if whole else SEE, 0)  # `llm` then shows the text alone
    assert invoke(*command, "-R") == ("Once upon\n", "", 0)
    logged, *_ = json.loads(invoke("logs", "--json", "-n", "1")[0])
    assert (logged["response"], logged["reasoning"]) == ("Once upon", SEE)
    invoke("-c", "And?", *kind)
    assert [(each["role"], each["content"]) for each in server.last.messages[1:]] == [
        ("assistant", "Once upon"),
        ("user", "And?"),
    ]


# Replies that are costly or dangerous to read


@pytest.mark.parametrize("brackets", [("[", "]"), ('{"a":', "}")], ids=["lists", "objects"])
@pytest.mark.parametrize(
    "shape",
    [
        *("%s", '{"error": %s}', '{"error": {"message": %s}}', '{"choices": [{"message": %s}]}'),
        '{"choices": [{"delta": {"content": %s}}]}',
    ],
)
def test_deep_nesting_is_an_error(shape: str, brackets: tuple[str, str]) -> None:
    """However deep JSON is nested, also just within what the parser takes, it ends in an error and raises nothing."""
    limit = sys.getrecursionlimit()
    for depth in (*range(limit - 150, limit + 1), 10 * limit, 200_000):
        value = shape % (brackets[0] * depth + "1" + brackets[1] * depth)
        assert read(f"data: {value}\n\n".encode()).error


@pytest.mark.parametrize("number", ["9" * 5000, "-" + "9" * 5000, "1e999999", "NaN", "-Infinity"])
def test_odd_numbers_raise_nothing(number: str) -> None:
    """Numbers that Python cannot or need not read end in an error, or are passed over beside the text."""
    assert read(f"data: {number}\n\n".encode()).error
    beside = read(A.replace(b'"created": 1738368000', f'"created": {number}'.encode()))
    assert beside.text == "a" or beside.error


LONG = "0123456789\u2028é\U0001f600" * 600_000  # about 12 MiB
LINES = b'"%s",\n' % (b"y" * 96) * 120_000  # the same, as lines of a JSON list
LARGE = {
    "one event": lambda: framed(text(LONG)),
    "bare JSON": lambda: framed(text(LONG), prefix=""),
    "event of many lines": lambda: b'data: {"usage": [\n' + LINES.replace(b'"y', b'data: "y') + b"data: 0]}\n\n" + A,
    "JSON in many lines": lambda: b'{"usage": [\n' + LINES + b"0]}\n",
    "page": lambda: b"<html>\n" + LINES,
    "comment": lambda: b": " + LINES.replace(b"\n", b"") + b"\n" + A,
    "many events": lambda: A * 10_000,
    "no line end but CR": lambda: event(text("x" * 1000)).replace(b"\n", b"\r") * 1000,
    "blank lines": lambda: b"\n" * 500_000 + A,
}


@pytest.mark.parametrize("name", LARGE)
def test_cost_is_linear(name: str, cpu_guard: None) -> None:
    """A large reply in tiny pieces takes little time: nothing goes over an event again for each piece of it."""
    reply = LARGE[name]()
    assert read(*cut(reply, 256)) == read(reply)


BLOCK, EUROS = b"x" * 65_536, "\u20ac".encode() * 21_845
BLOCKS = {  # what an event or a line begins with, what comes again and again, and its end
    "event": (b'data: {"choices": [{"delta": {"content": "', BLOCK, b'"}}]}\n\n'),
    "event of many lines": (b'data: {"usage": ["\n', b"data: " + BLOCK + b"\n", b'data: "]}\n\n'),
    "event of many lines, not ASCII": (b'data: {"usage": ["\n', b"data: " + EUROS + b"\n", b'data: "]}\n\n'),
    "bare JSON": (b'{"choices": [{"delta": {"content": "', BLOCK, b'"}}]}\n'),
    "JSON in many lines": (b'{"choices": [], "usage":\n["', b"\n" + BLOCK, b'"]}\n'),
    "comment": (b": ", BLOCK, b"\n"),
    "no field": (b"", BLOCK, b"\n"),
    "page": (b"<html>\n", BLOCK + b"\n", b""),
}


@pytest.mark.parametrize("blocks", BLOCKS.values(), ids=BLOCKS)
def test_event_larger_than_16_mib_is_an_error(blocks: tuple[bytes, bytes, bytes]) -> None:
    """An event or line of 17 MiB is an error that says so, after the text before it; one of 15 MiB is read."""
    start, block, end = blocks
    too_large = "the reply holds an event larger than 16 MiB"
    read(A, start, *[block] * (17 * 16), end).check(Row(b"", "a", too_large))
    outcome = read(A, start, *[block] * (15 * 16), end)
    assert outcome.text.startswith("a")
    assert outcome.error != too_large


def test_bound_is_for_each_event_whatever_its_cutting() -> None:
    """A line may be as large as the bound, in one piece or in many, and any number of events may follow each other."""
    start, end = b'data: {"choices": [{"delta": {"content": "', b'"}}]}'
    for extra in (0, 1):
        line = start + b"x" * (MAX_EVENT_BYTES - len(start) - len(end) + extra) + end
        errors = [read(*pieces).error for pieces in ([line + b"\n\n"], [line[:-9], line[-9:]], cut(line, MIB))]
        assert [bool(error) for error in errors] == [bool(extra)] * 3
    assert len(read(*[event(text("x" * MIB))] * 17).text) == 17 * MIB


def test_what_follows_done_is_not_held() -> None:
    """After [DONE] no bound can be met, since nothing is kept."""
    read(A + DONE, *[b"x" * MIB] * 17).check(Row(b"", "a"))


# Properties

SENT = st.lists(
    st.text(max_size=20) | st.sampled_from(["data: [DONE]", "\u2028", "\r\n\r\n", "\ufeff", "\U0001f600", " "])
)


@st.composite
def streams(draw: st.DrawFn, texts: list[str]) -> bytes:
    """A stream of ``texts``, in one of the dialects of PROTOCOL.md or in several at once."""
    newline = draw(st.sampled_from(["\n", "\r\n", "\r"]))
    mixed = draw(st.booleans())

    def draw_style() -> tuple[str, int | None, bool]:
        prefix = draw(st.sampled_from(["data: ", "data:", ""]))
        return prefix, draw(st.sampled_from([None, 1])) if prefix else None, draw(st.booleans())

    style, built = draw_style(), BOM * draw(st.booleans())
    for content in texts:
        prefix, indent, blank = style = draw_style() if mixed else style
        others = ("", ": ping\n", "event: message\nid: 1\nretry: 1\n", "\n")
        built += draw(st.sampled_from(others)).replace("\n", newline).encode()
        # A second half of many lines cannot be told from a first: an event of many lines needs its blank line.
        built += framed(text(content), prefix, newline, indent, blank or bool(indent))
    built += draw(st.sampled_from(["", "data: [DONE]\n\n", "data: [DONE]", "[DONE]\n"])).replace("\n", newline).encode()
    return draw(st.sampled_from([built, built.rstrip(b"\r\n")]))


@st.composite
def completions(draw: st.DrawFn, texts: list[str]) -> bytes:
    """A whole completion with the text of ``texts``, in one line or many, bare or as an event."""
    completion = {"choices": [{"message": {"content": "".join(texts)}}]}
    styles = (st.sampled_from(choices) for choices in (["", "data: "], ["\n", "\r\n", "\r"], [None, 0, 2], [0, 1]))
    return framed(completion, *map(draw, styles))


KEYS = ["choices", "delta", "message", "content", "finish_reason", "usage", "error", "id", "model", "detail"]
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.sampled_from([HIGH, LOW]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYS), inner, max_size=4),
    max_leaves=8,
)
CHUNKS = st.builds(
    lambda content, fields: {**fields, **text(content)},
    st.text(max_size=5) | st.sampled_from([HIGH, LOW, f"a{HIGH}"]),
    st.dictionaries(st.sampled_from(["id", "model", "created", "usage", "finish_reason"]), VALUES, max_size=2),
)
LINE_ENDS = [b"\n", b"\r", b"\r\n", b"\n\n"]
BEGINNINGS = [b"data: ", b"data", b":", b"{", b"[", b"<html>", b"[DONE]", BOM, b"event: error\n", b"Oh no\n"]
FRAGMENTS = st.one_of(
    st.binary(max_size=6),
    st.sampled_from(LINE_ENDS + BEGINNINGS),
    st.builds(body, VALUES | CHUNKS),
    st.builds(event, CHUNKS),
    st.builds(lambda value: framed(value, newline="\r\n", indent=1), CHUNKS),
    st.builds(lambda value: json.dumps(value, indent=1).encode(), VALUES),
)
REPLIES = st.one_of(
    st.lists(FRAGMENTS, max_size=8).map(b"".join),
    *(SENT.flatmap(written) for written in (streams, completions)),
    st.binary(),
)


@st.composite
def cuttings(draw: st.DrawFn, replies: st.SearchStrategy[bytes]) -> tuple[bytes, list[bytes]]:
    """A reply, and the same reply in pieces, some of which may be empty."""
    reply = draw(replies)
    if draw(st.booleans()):
        return reply, cut(reply, draw(st.integers(1, 3)))
    edges = sorted(draw(st.lists(st.integers(0, len(reply)), max_size=10)))
    return reply, [reply[start:end] for start, end in zip([0, *edges], [*edges, len(reply)], strict=True)]


@examples
@given(cuttings(REPLIES))
def test_any_cutting_gives_the_same(cutting: tuple[bytes, list[bytes]]) -> None:
    """No bytes raise; there is text or an error that can be printed, the same however the reply is cut."""
    reply, pieces = cutting
    outcome = read(reply)
    assert repr(read(*pieces)) == repr(outcome)  # by repr, since a NaN in the envelope is not equal to itself
    assert outcome.error or outcome.text
    "".join(words for _, words in outcome.parts).encode()


@examples
@given(SENT.flatmap(lambda texts: st.tuples(st.just(texts), cuttings(streams(texts) | completions(texts)))))
def test_any_text_comes_back(example: tuple[list[str], tuple[bytes, list[bytes]]]) -> None:
    """Texts come back as they are from a stream in any dialect or mixture of them, and from any whole completion."""
    texts, (_, pieces) = example
    outcome = read(*pieces)
    assert outcome.text == "".join(texts)
    assert outcome.error.startswith("" if outcome.text.strip() else EMPTY)
    assert bool(outcome.error) != bool(outcome.text.strip())


SOME_WORDS = st.text(st.characters(codec="utf-8", exclude_characters="<"), max_size=8)
KNOWN = [ROLE, STOP, choice({}), {"choices": [], "usage": USAGE}, {"choices": []}, {"type": "ping"}, None]
MIXED = st.one_of(
    *(st.tuples(st.just(kind), SOME_WORDS) for kind in ("text", "reasoning")),
    st.tuples(st.just("known"), st.sampled_from(KNOWN)),
    st.tuples(st.just("foreign"), st.sampled_from([*FOREIGN_VALUES.values()])),
)
WRITTEN = {"text": delta, "reasoning": thought}


@examples
@given(st.lists(MIXED, max_size=8))
def test_any_mixture_gives_all_the_text_and_a_word_about_the_rest(values: list[tuple[str, Any]]) -> None:
    """All the text and all the reasoning come out, and a foreign value is reported."""
    outcome = read(stream(*(WRITTEN.get(kind, lambda value: value)(value) for kind, value in values)))
    written = {wanted: "".join(v for kind, v in values if kind == wanted) for wanted in WRITTEN}
    assert {kind: "".join(outcome.all_of(kind)) for kind in WRITTEN} == written
    foreign = any(kind == "foreign" for kind, _ in values)
    assert bool(outcome.error or outcome.warnings) == (foreign or not written["text"].strip())
