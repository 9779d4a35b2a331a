"""How a reply is read: its rules, one test each, and properties that hold for any reply.

The event-stream rules are those of https://html.spec.whatwg.org/multipage/server-sent-events.html, the others of
PROTOCOL.md. More examples for the properties: LLM_AUTONOMOUS_EXAMPLES=10000 (chosen anew at each run).
"""

from __future__ import annotations

import json
import os
import sys
import tracemalloc
from collections.abc import Callable, Iterable
from types import FrameType
from typing import Any

import pytest
from conftest import new_attempt
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_autonomous import MAX_EVENT_BYTES, AutonomousError

MORE_EXAMPLES = os.environ.get("LLM_AUTONOMOUS_EXAMPLES")
examples = settings(max_examples=int(MORE_EXAMPLES or 150), derandomize=not MORE_EXAMPLES, deadline=None, database=None)

MIB = 1024 * 1024
DONE = b"data: [DONE]\n\n"


def chunk(text: str, **fields: Any) -> str:
    """The JSON of one chunk, with every character above ASCII as it is."""
    return json.dumps({**fields, "choices": [{"delta": {"content": text}}]}, ensure_ascii=False)


def event(text: str, **fields: Any) -> bytes:
    return b"data: " + chunk(text, **fields).encode() + b"\n\n"


class Decoded:
    """What a reply came to, given to a decoder in ``pieces``."""

    def __init__(self, *pieces: bytes) -> None:
        self.decoder = new_attempt()
        self.fed = [self.decoder.feed(piece) for piece in pieces]  # the deltas that each piece completed
        self.deltas = [delta for deltas in self.fed for delta in deltas] + self.decoder.close()
        self.envelope, self.error = self.decoder.completion.envelope, self.decoder.error

    @property
    def text(self) -> str:
        """The text of a reply that has no fault."""
        if self.error:
            raise self.error
        return "".join(self.deltas)

    @property
    def words(self) -> str:
        """The words of the error."""
        assert self.error is not None, f"no error, but {self.deltas}"
        return self.error.message

    @property
    def everything(self) -> tuple[list[str], dict[str, Any], str, bool]:
        return self.deltas, self.envelope, str(self.error), self.decoder.whole


def cut(data: bytes, size: int) -> list[bytes]:
    return [data[start : start + size] for start in range(0, len(data), size)]


# Lines


@pytest.mark.parametrize("newline", [b"\n", b"\r\n", b"\r"], ids=["LF", "CRLF", "CR"])
@pytest.mark.parametrize("size", [1, 1000], ids=["bytes", "whole"])
def test_line_ends_at_lf_crlf_or_cr(newline: bytes, size: int) -> None:
    """Each of the three ends a line, also if a piece ends between CR and LF."""
    reply = (event("one ") + event("two") + DONE).replace(b"\n", newline)
    assert Decoded(*cut(reply, size)).deltas == ["one ", "two"]


@pytest.mark.parametrize("piece", [[b"\r\n"], [b"\r", b"\n"], [b"\r", b"", b"\n"]], ids=["whole", "cut", "empty piece"])
def test_crlf_is_one_line_end(piece: list[bytes]) -> None:
    """A CR and its LF are no blank line, which would end the event, however they are cut."""
    start, end = chunk("hi").encode().split(b" ", 1)
    assert Decoded(b"data: " + start, *piece, b"data: " + end + b"\r\n\r\n").text == "hi"


@pytest.mark.parametrize("char", "\u2028\u2029\u0085\u000b\u000c\u001c\u001d\u001e")
@pytest.mark.parametrize("prefix", ["data: ", ""], ids=["event", "bare JSON"])
def test_unicode_line_separator_not_split(char: str, prefix: str) -> None:
    """Only LF, CR and CRLF end a line; what else Python's splitlines cuts at is text."""
    line = f'{prefix}{{"choices": [{{"delta": {{"content": "a{char}b"}}}}]}}\n'
    assert Decoded(line.encode()).text == f"a{char}b"


@pytest.mark.parametrize("size", [1, 2, 1000])
@pytest.mark.parametrize(
    "reply", [event("hi"), chunk("hi").encode(), b"\n" + event("hi")], ids=["sse", "json", "blank"]
)
def test_leading_byte_order_mark_is_skipped(reply: bytes, size: int) -> None:
    """One byte order mark may come before the first line."""
    assert Decoded(*cut(b"\xef\xbb\xbf" + reply, size)).text == "hi"


def test_later_byte_order_mark_is_text() -> None:
    """Behind the first line it is a character like any other."""
    assert Decoded(event("a\ufeffb") + event("\ufeff")).text == "a\ufeffb\ufeff"


def test_character_cut_in_bytes_is_joined() -> None:
    """A piece can end in the middle of a character."""
    assert Decoded(*cut(event("Привет \U0001f600"), 1)).text == "Привет \U0001f600"


def test_byte_that_is_no_utf8_is_replaced() -> None:
    """As the specification has it, U+FFFD stands for what cannot be decoded."""
    assert Decoded(event("a?b").replace(b"?", b"\xff")).text == "a\ufffdb"


# Fields of an event


def test_comment_is_skipped() -> None:
    """A line that begins with a colon is for nobody: servers send it to keep the connection."""
    assert Decoded(b": ping\n\n:\n" + event("hi") + b":ping\n\n").text == "hi"


@pytest.mark.parametrize("field", ["event: message", "event", "id: 1", "id:", "retry: 100", "retry", "event:{}"])
def test_other_field_is_skipped(field: str) -> None:
    """Fields other than data say nothing about the answer, whether alone, before the data or behind it."""
    line = field.encode() + b"\n"
    assert Decoded(line + b"\n" + line + event("a") + event("b")[:-1] + line + b"\n" + line + event("c")).text == "abc"


def test_line_of_no_kind_is_not_understood() -> None:
    """It costs the answer nothing, and is remembered as it is."""
    decoded = Decoded(b"datum: 1\nfoo\n" + event("hi"))
    assert decoded.text == "hi"
    assert decoded.decoder.completion.not_understood == "datum: 1"


@pytest.mark.parametrize("prefix", [b"data: ", b"data:", b"data:  ", b"data:\t"], ids=repr)
def test_space_after_colon_is_optional(prefix: bytes) -> None:
    """``data:`` and ``data: `` are the same field; further white space is white space of the JSON."""
    reply = event("hi") + DONE
    assert Decoded(reply.replace(b"data: ", prefix)).text == "hi"


def test_prefix_inside_text_stays() -> None:
    """Only the first ``data: `` of a line is the name of the field."""
    assert Decoded(event("data: data:\ndata: [DONE]")).text == "data: data:\ndata: [DONE]"


def test_data_without_colon_is_an_empty_line() -> None:
    """A field's name alone has an empty value."""
    lines = chunk("hi").encode().replace(b" ", b"\ndata\ndata: ")
    assert Decoded(b"data\n\ndata: " + lines + b"\ndata\n\n").text == "hi"


def test_empty_data_is_no_event() -> None:
    """Nothing is read into an event without data."""
    assert Decoded(b"data:\n\ndata: \n\ndata\n\n" + event("hi")).text == "hi"


@pytest.mark.parametrize("prefix", [b"data: ", b"data:"])
@pytest.mark.parametrize("size", [1, 1000])
def test_data_in_many_lines_is_joined(prefix: bytes, size: int) -> None:
    """The data lines of an event are its data, joined with LF."""
    lines = json.dumps(json.loads(chunk("hi")), indent=1).encode().split(b"\n")
    reply = b"".join(prefix + line + b"\n" for line in lines) + b"\n" + event(" you")
    assert Decoded(*cut(reply, size)).deltas == ["hi", " you"]


def test_other_field_within_data_of_many_lines() -> None:
    """A comment or another field between the data lines of an event does not end it."""
    start, end = chunk("hi").encode().split(b" ", 1)
    assert Decoded(b"data: " + start + b"\n: ping\nid: 1\ndata: " + end + b"\n\n").text == "hi"


@pytest.mark.parametrize("end", [b"\n", b""], ids=["without blank line", "without line end"])
def test_last_event_without_its_end(end: bytes) -> None:
    """The end of the reply completes the last event."""
    assert Decoded(event("a") + event("b").rstrip() + end).deltas == ["a", "b"]


# Framings that are not in the specification


def test_events_without_blank_lines() -> None:
    """Each data line with JSON of its own is an event of its own."""
    reply = (event("a") + event("b") + DONE).replace(b"\n\n", b"\n")
    assert Decoded(reply).deltas == ["a", "b"]


def test_event_of_many_lines_without_blank_line() -> None:
    """The next event may follow without a blank line also where the first has many lines."""
    first = event("a")[:-1].replace(b" [", b"\ndata: [")
    assert Decoded(first + event("b")[:-1] + DONE).deltas == ["a", "b"]


def test_event_is_read_at_its_line_end() -> None:
    """Text goes out as it arrives: it does not wait for a blank line."""
    assert Decoded(event("a")[:-1], b"\n", chunk("b").encode() + b"\n").fed == [["a"], [], ["b"]]


def test_bare_json_lines() -> None:
    """A line may be JSON without ``data:``, indented or not, and so may be ``[DONE]``."""
    assert Decoded(f"{chunk('a')}\n {chunk('b')}\r\n\n[DONE]\n{chunk('c')}\n".encode()).deltas == ["a", "b"]


def test_bare_json_lines_among_events() -> None:
    """Both framings may come in one stream."""
    bare = chunk("b").encode() + b"\n"
    assert Decoded(event("a")[:-1] + bare + event("c") + bare).deltas == ["a", "b", "c", "b"]


def test_values_in_one_line() -> None:
    """JSON values may come one behind the other, without any line end."""
    assert Decoded(f"data: {chunk('a')}{chunk('b')} [DONE]{chunk('c')}\n\n".encode()).deltas == ["a", "b"]


@pytest.mark.parametrize("indent", [None, 2], ids=["one line", "many lines"])
@pytest.mark.parametrize("newline", ["\n", "\r\n", "\r", "\n\n"], ids=["LF", "CRLF", "CR", "blank lines"])
@pytest.mark.parametrize("size", [1, 10_000], ids=["bytes", "whole"])
def test_whole_completion(indent: int | None, newline: str, size: int) -> None:
    """A whole completion is read where a stream was asked for, also if it is laid out in many lines."""
    completion = {
        "id": "1",
        "choices": [{"message": {"role": "assistant", "content": "a\nb"}, "finish_reason": "stop"}],
    }
    reply = json.dumps(completion, indent=indent).replace("\n", newline).encode()
    decoded = Decoded(*cut(reply, size))
    assert decoded.text == "a\nb"
    assert decoded.envelope == {"id": "1", "finish_reason": "stop"}


def test_whole_completion_as_an_event() -> None:
    """A whole completion may also come framed as an event."""
    assert Decoded(b'data: {"choices": [{"message": {"content": "hi"}}]}\n\n').text == "hi"


def test_newline_within_json_string() -> None:
    """Control characters that a server forgot to escape are text."""
    assert Decoded(b'data: {"choices": [{"delta": {"content": "a\tb"}}]}\n\n').text == "a\tb"
    assert Decoded(b'{"choices": [{"message": {"content": "a\nb"}}]}').text == "a\nb"


# Chunks


@pytest.mark.parametrize(
    "nothing",
    [
        '{"choices": [{"delta": {}}]}',
        '{"choices": [{"delta": {"content": null}}]}',
        '{"choices": [{"delta": {"content": ""}}]}',
        '{"choices": [{"delta": {"role": "assistant"}}]}',
        '{"choices": [{"delta": null}]}',
        '{"choices": [{"delta": null, "message": null}]}',
        '{"choices": [{"index": 0}]}',
        '{"choices": []}',
        '{"choices": null}',
        '{"choices": [], "usage": {"total_tokens": 1}}',
        '{"usage": {"total_tokens": 1}}',
        '{"finish_reason": "stop"}',
        '{"choices": [], "error": null}',
    ],
)
def test_chunk_without_text(nothing: str) -> None:
    """What holds no text is no error, and no delta."""
    decoded = Decoded(event("a") + f"data: {nothing}\n\n".encode() + event("b"))
    assert decoded.error is None
    assert decoded.deltas == ["a", "b"]


@pytest.mark.parametrize("text", ["null", "0", "[DONE]", "{}", "<html>", " ", "\n", "\0", "\x1b[31m"])
def test_text_is_given_as_it_is(text: str) -> None:
    """No text means anything to the decoder, and nothing is stripped."""
    assert Decoded(event(text) + DONE).deltas == [text]


@pytest.mark.parametrize("nothing", ["{}", "[]", "null", '""', "0", "false", "[{}]", '{"type": "ping"}'])
def test_value_that_holds_nothing_is_harmless(nothing: str) -> None:
    """What cannot hold a part of the answer is passed over, with no word said."""
    decoded = Decoded(event("a") + f"data: {nothing}\n\n".encode() + event("b"))
    assert decoded.text == "ab"
    assert decoded.decoder.completion.not_understood is None


@pytest.mark.parametrize(
    "shape",
    [
        '{"choices": {"delta": {"content": "hi"}}}',
        '{"choices": "hi"}',
        '{"choices": ["hi"]}',
        '{"choices": [null]}',
        '{"choices": [{"delta": "hi"}]}',
        '{"choices": [{"delta": {"content": 1}}]}',
        '{"choices": [{"delta": {"content": [1]}}]}',
        '{"output": "hi"}',
        '["hi"]',
        '"hi"',
        "1",
        "true",
        "NaN",
    ],
)
def test_json_of_no_known_shape(shape: str) -> None:
    """JSON that is no chunk is remembered with all of it, and costs the answer nothing; alone, it is quoted."""
    foreign = f"data: {shape}\n\n".encode()
    decoded = Decoded(event("a") + foreign + event("b"))
    assert decoded.text == "ab"
    assert json.dumps(decoded.decoder.completion.not_understood) == shape
    assert shape in Decoded(foreign).words


@pytest.mark.parametrize(
    "event_data",
    ["hello", "{'choices': []}", '{"choices": [}', '{"choices": []} and more', "[DONE", "[done]", "-", '{"a": 1'],
)
def test_event_that_is_no_json(event_data: str) -> None:
    """An event that is neither JSON nor ``[DONE]`` is an error that shows what was not understood."""
    decoded = Decoded(event("a") + f"data: {event_data}\n\n".encode() + event("b"))
    assert decoded.deltas == ["a"]
    assert decoded.words.startswith("the reply was not understood; it begins: ")
    assert event_data.endswith(decoded.words.partition("begins: ")[2])


@pytest.mark.parametrize("error", ['{"message": "no luck"}', '"no luck"', '{"code": 1, "message": "no luck"}'])
def test_error_in_stream(error: str) -> None:
    """An ``error`` ends the reply with its message, behind the text that came before, whatever comes with it."""
    chunk_with_error = f'{{"error": {error}, "choices": [{{"delta": {{"content": "b"}}}}]}}'
    decoded = Decoded(event("a") + f"data: {chunk_with_error}\n\n".encode() + event("c"))
    assert decoded.deltas == ["a"]
    assert decoded.words == "the service reports an error: no luck"


def test_page_as_reply() -> None:
    """A reply of HTML is a web page, named by its title."""
    page = b"<!DOCTYPE html>\n<html>\n\n<head><title>Just a moment...</title></head>\ndata: {}\n</html>"
    assert Decoded(page).words == "answered with a web page titled: Just a moment..."


def test_plain_text_as_reply() -> None:
    """A reply of lines that mean nothing is not understood, and begins with the first of them."""
    assert "Upstream is down" in Decoded(b"\nUpstream is down\nGoodbye\n").words


NOTHING = [
    b"",
    b"\n\n",
    b"\xef\xbb\xbf",
    DONE,
    b": ping\n\n",
    b"event: ping\n\n",
    b"id",
    b"data\n\n",
    b"  \n",
    b'{"choices": []}',
]


@pytest.mark.parametrize("reply", NOTHING, ids=repr)
def test_reply_without_text(reply: bytes) -> None:
    """A reply with nothing in it is an error: the answer was empty."""
    assert Decoded(reply).words.startswith("the answer was empty")


def test_reply_without_text_tells_the_finish_reason() -> None:
    """Where a server says why there is no text, so does the error."""
    reply = b'data: {"choices": [{"delta": {}, "finish_reason": "content_filter"}]}\n\n'
    start = "the answer was empty (finish reason: content_filter); the reply begins: "
    assert Decoded(reply + DONE).words.startswith(start)


FILTER = {"content_filter_results": {"error": {"code": "content_filter_error", "message": "timed out"}}}


@pytest.mark.parametrize("text", ["fine", ""])
def test_error_of_a_filter_counts_only_without_text(text: str) -> None:
    """An error deep in a choice is about the choice only if that has no text."""
    decoded = Decoded(f"data: {json.dumps({'choices': [{'delta': {'content': text}, **FILTER}]})}\n\n".encode() + DONE)
    assert decoded.deltas == ([text] if text else [])
    assert str(decoded.error) == "None" if text else "timed out" in str(decoded.error)


@pytest.mark.parametrize(("field", "known"), [("reasoning_details", True), ("annotations", True), ("images", False)])
def test_what_describes_other_fields_needs_no_warning(field: str, known: bool) -> None:
    """A delta without text that only describes what came before is understood; one with an image is not."""
    extra = json.dumps({"choices": [{"delta": {"content": "", field: [{"data": "abc"}]}}]})
    decoded = Decoded(f"data: {chunk('fine')}\n\ndata: {extra}\n\n".encode() + DONE)
    assert decoded.deltas == ["fine"]
    assert (decoded.decoder.completion.not_understood is None) == known


def test_reply_cut_within_an_event() -> None:
    """A reply that ends within an event has not come whole."""
    decoded = Decoded(event("a") + event("b")[:20])
    assert decoded.deltas == ["a"]
    assert "the answer is incomplete" in decoded.words


# [DONE]


@pytest.mark.parametrize("done", [b"data: [DONE]\n\n", b"data:[DONE]\n", b"[DONE]\r\n", b"data: [DONE]"], ids=repr)
def test_done_ends_the_answer(done: bytes) -> None:
    """``[DONE]`` completes the answer in every framing."""
    decoded = Decoded(event("a") + done)
    assert decoded.text == "a"
    assert decoded.decoder.framing.ended
    assert decoded.decoder.whole


@pytest.mark.parametrize(
    "behind", [event("b"), b'data: {"error": "b"}\n\n', b"<html>", b"\xff\xff", b"{", b"x" * 100], ids=repr
)
def test_nothing_behind_done_counts(behind: bytes) -> None:
    """Neither text nor errors nor rubbish behind ``[DONE]`` are read, in its piece or a later one."""
    assert Decoded(event("a") + DONE + behind).text == "a"
    assert Decoded(event("a") + DONE, behind, behind).text == "a"


def test_bare_line_behind_a_held_done_is_no_text() -> None:
    """``[DONE]`` counts from where it stands, even if it was read only when the next line came."""
    held = chunk("a").replace("{", "{\n", 1).replace("\n", "\ndata: ")
    assert Decoded(f"data: {held}\ndata: [DONE]\n{chunk('b')}\n".encode()).text == "a"


def test_line_without_end_behind_done_is_not_held() -> None:
    """Behind ``[DONE]`` no bound can be met, since nothing is kept."""
    decoded = Decoded(event("a") + DONE, *[b"x" * MIB] * 17)
    assert decoded.text == "a"


@pytest.mark.parametrize(
    ("reply", "complete"),
    [
        (event("a"), False),
        (event("a") + DONE, True),
        (event("a", finish_reason="stop"), True),
        (b'data: {"choices": [{"delta": {"content": "a"}, "finish_reason": "length"}]}', True),
        (b'{"choices": [{"message": {"content": "a"}}]}', True),
    ],
    ids=["neither", "done", "finish reason", "finish reason in the choice", "whole completion"],
)
def test_complete(reply: bytes, complete: bool) -> None:
    """An answer is complete with a finish reason, with ``[DONE]``, or where it came in one piece."""
    decoded = Decoded(reply)
    assert decoded.text == "a"
    assert decoded.decoder.whole is complete


# The envelope


def test_envelope() -> None:
    """The envelope is what was sent beside the text, as far as it was sent, and not the text again."""
    first = event("a", id="1", model="m", created=7, object="chat.completion.chunk")
    last = b'data: {"choices": [{"delta": {}, "finish_reason": "stop"}]}\n\n'
    usage = b'data: {"choices": [], "usage": {"prompt_tokens": 3}}\n\n'
    decoded = Decoded(first + last + usage + DONE)
    assert decoded.envelope == {
        "id": "1",
        "model": "m",
        "created": 7,
        "finish_reason": "stop",
        "usage": {"prompt_tokens": 3},
    }
    assert Decoded(event("a")).envelope == {}


@pytest.mark.parametrize(
    "last", ['"choices": [{"delta": {}, "finish_reason": "stop"}]', '"choices": [], "finish_reason": "stop"']
)
def test_finish_reason_in_choice_or_at_top(last: str) -> None:
    """Both places are read, and null in either is none."""
    first = event("a", finish_reason=None).replace(b'{"delta"', b'{"finish_reason": null, "delta"')
    assert Decoded(first + f"data: {{{last}}}\n\n".encode()).envelope == {"finish_reason": "stop"}


def test_later_chunks_do_not_change_the_id() -> None:
    """The first id and model stand; of usage, which some servers send as it grows, the last does."""
    reply = event("a", id="1", model="m", usage={"n": 1}) + event("b", id="2", model="n", usage={"n": 2})
    assert Decoded(reply + event("c", usage=None)).envelope == {"id": "1", "model": "m", "usage": {"n": 2}}
    assert Decoded(event("a", id="1") + event("b", id="2")).envelope == {"id": "1"}


# Characters cut in two


@pytest.mark.parametrize(
    ("halves", "text"),
    [
        ([r"\ud83d"], "\ufffd"),
        ([r"\ude00"], "\ufffd"),
        ([r"\ude00", r"\ud83d"], "\ufffd\ufffd"),
        ([r"\ud83d", r"\ude00"], "\ufffd\ufffd"),
        ([r"\ud83d", "a"], "\ufffda"),
        ([r"\ud83da"], "\ufffda"),
        ([r"\ud83d\ude00\ud83d"], "\U0001f600\ufffd"),
    ],
)
@pytest.mark.parametrize("end", [DONE, b""], ids=["done", "end"])
def test_surrogate_half_without_the_other_is_replaced(halves: list[str], text: str, end: bytes) -> None:
    """Half a character can be neither printed nor stored: U+FFFD stands for it."""
    reply = b"".join(event("?").replace(b"?", half.encode()) for half in halves)
    assert Decoded(reply + end).text == text


# Rubbish that is costly or dangerous to read


@pytest.mark.parametrize(
    "shape",
    [
        "%s",
        '{"error": %s}',
        '{"error": {"message": %s}}',
        '{"choices": [{"delta": {"content": %s}}]}',
        '{"choices": [{"message": %s}]}',
    ],
)
@pytest.mark.parametrize("brackets", ["[]", ('{"a":', "}")], ids=["lists", "objects"])
def test_deep_nesting_is_an_error(shape: str, brackets: tuple[str, str]) -> None:
    """However deep JSON is nested, also just within what the parser takes, it ends in an error and raises nothing."""
    limit = sys.getrecursionlimit()
    for depth in (*range(limit - 150, limit + 1), 10 * limit, 200_000):
        value = shape % (brackets[0] * depth + "1" + brackets[1] * depth)
        assert isinstance(Decoded(f"data: {value}\n\n".encode()).error, AutonomousError)


@pytest.mark.parametrize("number", ["9" * 5000, "-" + "9" * 5000, "1e999999", "NaN", "-Infinity"])
def test_odd_numbers_raise_nothing(number: str) -> None:
    """Numbers that Python cannot or need not read end in an error, or are passed over beside the text."""
    assert isinstance(Decoded(f"data: {number}\n\n".encode()).error, AutonomousError)
    decoded = Decoded(event("a", created=0).replace(b": 0", f": {number}".encode()))
    assert decoded.deltas == ["a"] or isinstance(decoded.error, AutonomousError)


# Cost


def framed(size: int) -> dict[str, bytes]:
    """Replies of about ``size`` bytes, by what is large in them."""
    indented = json.dumps(
        {"choices": [{"message": {"content": "x" * 900}}], "n": ["y" * 100] * (size // 110)}, indent=1
    )
    return {
        "one event": event("x" * size),
        "many events": event("x") * (size // len(event("x"))),
        "event of many lines": b"".join(b"data: " + line + b"\n" for line in indented.encode().split(b"\n")),
        "completion in one line": json.dumps({"choices": [{"message": {"content": "x" * size}}]}).encode(),
        "completion in many lines": indented.encode(),
        "no line end but CR": event("x" * 1000).replace(b"\n", b"\r") * (size // 1000),
        "comments": b": ping\n\n" * (size // 8) + event("x"),
        "blank lines": b"\n" * size + event("x"),
        "page": b"<html>\n" + (b"x" * 99 + b"\n") * (size // 100),
    }


def work(pieces: Iterable[bytes]) -> int:
    """Calls made to decode ``pieces``, and characters in what they were made on or with."""

    def size(value: object) -> int:
        return len(value) if isinstance(value, (bytes, bytearray, str)) else 0

    def profile(frame: FrameType, event: str, arg: Any) -> None:
        nonlocal total
        if event == "c_call":  # such as find, split or decode of bytes, which read them
            total += 1 + size(getattr(arg, "__self__", None))
        elif event == "call":
            total += 1 + sum(map(size, frame.f_locals.values()))

    total, decoder = 0, new_attempt()
    before = sys.getprofile()
    sys.setprofile(profile)
    try:
        for piece in pieces:
            decoder.feed(piece)
        decoder.close()
    finally:
        sys.setprofile(before)
    return total


def allocated(pieces: Iterable[bytes]) -> int:
    """Bytes that decoding ``pieces`` took, summed over them, whether given back or not."""
    total, decoder = 0, new_attempt()
    tracemalloc.start()
    try:
        for piece in [*pieces, None]:
            tracemalloc.reset_peak()
            before, _ = tracemalloc.get_traced_memory()
            deltas = decoder.close() if piece is None else decoder.feed(piece)
            total += tracemalloc.get_traced_memory()[1] - before
            del deltas
    finally:
        tracemalloc.stop()
    return total


@pytest.mark.parametrize("framing", framed(10))
@pytest.mark.parametrize(("size", "piece"), [(MIB, 1024), (10_000, 1)], ids=["1 MB in 1 KB", "10 KB in bytes"])
def test_cost_is_linear(framing: str, size: int, piece: int) -> None:
    """Decoding touches and copies each byte a few times, however large an event is and however small its pieces.

    Anything that went over an event again for each piece of it would touch, or copy, each byte hundreds of times.
    """
    if framing in ("many events", "comments", "blank lines"):
        size = min(size, 400_000)  # calls for each of so many lines are slow to count
    reply = framed(size)[framing]
    pieces = cut(reply, piece)
    assert work(pieces) < 40 * len(reply) + 100 * len(pieces)
    assert allocated(pieces) < 40 * len(reply) + 1000 * len(pieces)


@pytest.mark.parametrize("prefix", [b"data: ", b""], ids=["event", "bare JSON"])
def test_large_event_in_small_pieces(prefix: bytes) -> None:
    """An event of 4 MB in pieces of 1 KB comes whole."""
    text = "0123456789\u2028é\U0001f600" * 250_000
    assert Decoded(*cut(prefix + chunk(text).encode() + b"\n\n", 1024)).text == text


# Bounds


def oversized(size: int) -> dict[str, list[bytes]]:
    """Replies with an event or a line of about ``size`` bytes in pieces of 64 KB, behind an event with text."""
    block = b"x" * 65_536
    blocks = [block] * (size // 65_536)
    return {
        "event": [event("a"), b'data: {"choices": [{"delta": {"content": "', *blocks, b'"}}]}\n\n'],
        "comment": [event("a"), b": ", *blocks, b"\n"],
        "no field": [event("a"), *blocks, b"\n"],
        "bare JSON": [event("a"), b'{"choices": [{"delta": {"content": "', *blocks, b'"}}]}\n'],
        "JSON in many lines": [
            event("a"),
            b'{"choices": [], "usage":\n["',
            *(b"\n" + block for block in blocks),
            b'"]}\n',
        ],
        "event of many lines": [
            event("a"),
            b'data: {"choices": [], "usage": ["\n',
            *(b"data: " + block + b"\n" for block in blocks),
            b'data: "]}\n\n',
        ],
        "event of many lines, not ASCII": [
            event("a"),
            b'data: {"choices": [], "usage": ["\n',
            *(b"data: " + "\u20ac".encode() * 21_845 + b"\n" for _ in blocks),
            b'data: "]}\n\n',
        ],
        "page": [event("a"), b"<html>\n", *(block + b"\n" for block in blocks)],
    }


@pytest.mark.parametrize("framing", oversized(0))
def test_event_larger_than_the_bound(framing: str) -> None:
    """An event or line larger than 16 MiB is an error that says so, behind the text before it."""
    decoded = Decoded(*oversized(17 * MIB)[framing])
    assert decoded.deltas == ["a"]
    assert decoded.words == "the reply holds an event larger than 16 MiB"


@pytest.mark.parametrize("framing", [name for name in oversized(0) if name != "page"])
def test_event_within_the_bound(framing: str) -> None:
    """An event or line of 15 MiB is read."""
    decoded = Decoded(*oversized(15 * MIB)[framing])
    assert decoded.error is None
    assert decoded.deltas[0] == "a"


def test_bound_is_for_each_event() -> None:
    """Any number of events, each within the bound, may come behind each other."""
    lines = b'data: {"choices": [{"delta":\ndata: {"content": "' + b"x" * MIB + b'"}}]}\n\n'
    assert Decoded(*[lines] * 17).text == "x" * 17 * MIB


def test_bound_is_the_same_for_every_cut() -> None:
    """Whether a line has come in one piece or in many, it may be as large as `MAX_EVENT_BYTES`."""
    start, end = b'data: {"choices": [{"delta": {"content": "', b'"}}]}'
    for extra in (0, 1):
        line = start + b"x" * (MAX_EVENT_BYTES - len(start) - len(end) + extra) + end
        errors = [Decoded(*pieces).error for pieces in ([line + b"\n\n"], [line[:-9], line[-9:]], cut(line, MIB))]
        assert [error is not None for error in errors] == [bool(extra)] * 3


def peak(pieces: Iterable[bytes]) -> int:
    """Bytes held at most while decoding ``pieces``, the deltas being given away."""
    decoder = new_attempt()
    tracemalloc.start()
    try:
        for piece in pieces:
            decoder.feed(piece)
        decoder.close()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("start", [b"data: ", b"", b"<", b"{", b":"], ids=repr)
def test_memory_for_a_line_without_end(start: bytes) -> None:
    """A line that never ends costs no more than the bound, whatever it begins with."""
    assert peak([start, *(bytes([97 + n % 26]) * MIB for n in range(100))]) < 3 * MAX_EVENT_BYTES


def test_memory_for_a_long_stream() -> None:
    """A stream of many events leaves nothing behind: the decoder keeps no text that it has given out."""
    block = event("x" * 8000) * 100
    assert peak(block for _ in range(40)) < 8 * len(block)


# Properties

TEXTS = st.lists(
    st.text(max_size=20) | st.sampled_from(["data: [DONE]", "\u2028", "\r\n\r\n", "\ufeff", "\U0001f600", " "])
)


def as_event(value: object, prefix: str, newline: str, indent: int | None, blank: bool) -> str:
    lines = json.dumps(value, indent=indent, ensure_ascii=bool(indent)).split("\n")
    return "".join(prefix + line + newline for line in lines) + newline * blank


@st.composite
def streams(draw: st.DrawFn, texts: list[str]) -> bytes:
    """A stream of ``texts``, in one of the dialects of PROTOCOL.md or in several at once."""
    newline = draw(st.sampled_from(["\n", "\r\n", "\r"]))
    mixed = draw(st.booleans())

    def style() -> tuple[str, str, int | None, bool]:
        prefix = draw(st.sampled_from(["data: ", "data:", ""]))
        indent = draw(st.sampled_from([None, 1])) if prefix else None
        return prefix, newline, indent, draw(st.booleans())

    styles, built = style(), "\ufeff" * draw(st.booleans())
    for text in texts:
        styles = style() if mixed else styles
        # A second half of many lines cannot be told from a first: an event of many lines needs its blank line.
        prefix, _, indent, blank = styles
        built += draw(st.sampled_from(["", ": ping" + newline, f"event: message{newline}id: 1{newline}", newline]))
        built += as_event({"choices": [{"delta": {"content": text}}]}, prefix, newline, indent, blank or bool(indent))
    built += draw(st.sampled_from(["", f"data: [DONE]{newline}{newline}", "data: [DONE]", f"[DONE]{newline}"]))
    return draw(st.sampled_from([built, built.rstrip("\r\n")])).encode()


@st.composite
def completions(draw: st.DrawFn, texts: list[str]) -> bytes:
    """A whole completion with the text of ``texts``, in one line or many, bare or as an event."""
    completion = {"choices": [{"message": {"content": "".join(texts)}}]}
    newline = draw(st.sampled_from(["\n", "\r\n", "\r"]))
    prefix = draw(st.sampled_from(["", "data: "]))
    return as_event(completion, prefix, newline, draw(st.sampled_from([None, 0, 2])), draw(st.booleans())).encode()


KEYS = ["choices", "delta", "message", "content", "finish_reason", "usage", "error", "id", "model", "detail"]
VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["\ud83d", "\ude00"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYS), inner, max_size=4),
    max_leaves=8,
)
CHUNKS = st.builds(
    lambda text, fields: {**fields, "choices": [{"delta": {"content": text}}]},
    st.text(max_size=5) | st.sampled_from(["\ud83d", "\ude00", "a\ud83d"]),
    st.dictionaries(st.sampled_from(["id", "model", "created", "usage", "finish_reason"]), VALUES, max_size=2),
)
FRAGMENTS = st.one_of(
    st.binary(max_size=6),
    st.sampled_from(
        [b"\n", b"\r", b"\r\n", b"\n\n", b"data: ", b"data", b":", b"{", b"[", b"<html>", b"[DONE]", b"\xef\xbb\xbf"]
    ),
    st.builds(lambda value: json.dumps(value).encode(), VALUES | CHUNKS),
    st.builds(lambda value: b"data: " + json.dumps(value).encode() + b"\n\n", CHUNKS),
    st.builds(lambda value: as_event(value, "data: ", "\r\n", 1, True).encode(), CHUNKS),
    st.builds(lambda value: json.dumps(value, indent=1).encode(), VALUES),
)
RUBBISH = st.lists(FRAGMENTS, max_size=8).map(b"".join)
REPLIES = RUBBISH | TEXTS.flatmap(streams) | TEXTS.flatmap(completions) | st.binary()


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
    """The deltas, the envelope and the error are those of the reply, however it is cut."""
    reply, pieces = cutting
    # By repr, since a NaN in the envelope is not equal to itself.
    assert repr(Decoded(*pieces).everything) == repr(Decoded(reply).everything)


@examples
@given(cuttings(REPLIES))
def test_any_bytes_end_in_text_or_an_error(cutting: tuple[bytes, list[bytes]]) -> None:
    """No bytes raise; without an error there is text, and whatever comes out can be printed."""
    decoded = Decoded(*cutting[1])
    written = "".join(delta if isinstance(delta, str) else delta.chunk for delta in decoded.deltas)
    assert decoded.error or written
    written.encode()
    if decoded.error is not None:
        assert type(decoded.error) is AutonomousError
        assert decoded.words.isprintable()


@examples
@given(TEXTS.flatmap(lambda texts: st.tuples(st.just(texts), cuttings(streams(texts)))))
def test_any_texts_come_back_from_any_stream(example: tuple[list[str], tuple[bytes, list[bytes]]]) -> None:
    """A list of texts, framed in any dialect or a mixture of them, comes back as it is, one delta for each."""
    texts, (_, pieces) = example
    decoded = Decoded(*pieces)
    assert decoded.deltas == [text for text in texts if text]
    assert str(decoded.error).startswith("None" if any(texts) else "the answer was empty")


@examples
@given(TEXTS.flatmap(lambda texts: st.tuples(st.just(texts), cuttings(completions(texts)))))
def test_any_text_comes_back_from_a_whole_completion(example: tuple[list[str], tuple[bytes, list[bytes]]]) -> None:
    """A text comes back from a whole completion, in any layout."""
    texts, (_, pieces) = example
    decoded = Decoded(*pieces)
    assert "".join(decoded.deltas) == "".join(texts)
    assert str(decoded.error).startswith("None" if any(texts) else "the answer was empty")


DIALECTS: dict[str, Callable[[str], str]] = {
    "data with space": "data: {}\n\n".format,
    "data without space": "data:{}\n\n".format,
    "CRLF": "data: {}\r\n\r\n".format,
    "CR": "data: {}\r\r".format,
    "no blank lines": "data: {}\n".format,
    "bare JSON lines": "{}\n".format,
    "other fields": ": ping\nevent: message\nid: 1\nretry: 1\ndata: {}\n\n".format,
    "many lines": lambda chunk: as_event(json.loads(chunk), "data: ", "\n", 2, True),
}


@pytest.mark.parametrize("end", ["", "data: [DONE]\n\n"], ids=["end", "done"])
@pytest.mark.parametrize("dialect", DIALECTS)
@examples
@given(texts=TEXTS)
def test_any_texts_come_back_from_each_dialect(dialect: str, end: str, texts: list[str]) -> None:
    """In each dialect that PROTOCOL.md names, a list of texts comes back whole."""
    reply = "".join(DIALECTS[dialect](chunk(text)) for text in texts) + end
    assert Decoded(reply.encode()).deltas == [text for text in texts if text]
