"""Tools, end to end against the loopback server: what is sent, what comes back, and what goes wrong in between."""

from __future__ import annotations

import asyncio
import base64
import json
import logging
import os
import re
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import llm
import pytest
from conftest import (
    DEADLINE,
    NOW_TAG,
    PNG,
    STOP,
    Ask,
    Chain,
    Start,
    cut,
    finish,
    invoke,
    now,
    output_until,
    refuse,
    run,
    texts,
)
from llm.parts import Message, TextPart, ToolCallPart, ToolResultPart, assistant, system, user
from loopback import ENDPOINTS, Connection, Loopback, Request, delta, event, speak
from proxies import until

from llm_autonomous import AFTER_RESULTS, EMPTY_CORRECTION, RESULT

ADD_TAG = '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>'
BROKEN_TAG = '<tool_call>{"name": "now", "arguments": </tool_call>'


def add(a: int, b: int = 2) -> int:
    """Add two numbers"""
    return a + b


def fail() -> str:
    raise ValueError("no luck")


def tools_in(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The tools that a request describes."""
    _, _, behind = messages[0]["content"].partition("<tools>\n")
    return [json.loads(line) for line in behind.partition("\n</tools>")[0].splitlines()]


def results_in(message: dict[str, Any]) -> list[tuple[str, str]]:
    """The names and outputs of the results in a message that holds nothing else, but for what to do with them."""
    text = message["content"].removesuffix(f"\n{AFTER_RESULTS}")
    names = re.findall(r"^The tool (\w+) returned:$", text, re.MULTILINE)
    first, *outputs = re.split(r"(?:\A|\n)The tool \w+ returned:\n", text)
    assert first == ""
    results = [*zip(names, outputs, strict=True)]
    assert text == "\n".join(RESULT.format(name=name, output=output) for name, output in results)
    return results


# What is sent: the bytes of a prompt without tools and schema are those of commit c887490

HISTORY = [
    system("Be brief"),
    user("Wie spät?"),
    Message(
        role="assistant",
        parts=[TextPart("Wait."), ToolCallPart("now", {"zone": "Köln"}, "id1"), ToolCallPart("add", {}, "id2")],
    ),
    Message(
        role="tool",
        parts=[
            ToolResultPart("now", "noon", "id1"),
            ToolResultPart("add", "Error: no", "id2", exception="ValueError: no"),
        ],
    ),
    assistant("Noon."),
    user("Thanks, and <tool_call>?"),
]
BODY_END = b'", "threadId": "llama", "stream": true, "aiAgent": "llama"}'
HISTORY_BODY = (
    b'{"messages": "'
    b"W3sicm9sZSI6ICJzeXN0ZW0iLCAiY29udGVudCI6ICJCZSBicmllZiJ9LCB7InJvbGUiOiAidXNlciIsICJjb250ZW50IjogIldp"
    b"ZSBzcFx1MDBlNHQ/In0sIHsicm9sZSI6ICJhc3Npc3RhbnQiLCAiY29udGVudCI6ICJXYWl0LlxuW2NhbGxlZCB0aGUgdG9vbCBu"
    b"b3cgd2l0aCB7XCJ6b25lXCI6IFwiS1xcdTAwZjZsblwifV1cbltjYWxsZWQgdGhlIHRvb2wgYWRkIHdpdGgge31dIn0sIHsicm9s"
    b"ZSI6ICJ1c2VyIiwgImNvbnRlbnQiOiAiW3RoZSB0b29sIG5vdyByZXR1cm5lZDogbm9vbl1cblt0aGUgdG9vbCBhZGQgZmFpbGVk"
    b"OiBWYWx1ZUVycm9yOiBub10ifSwgeyJyb2xlIjogImFzc2lzdGFudCIsICJjb250ZW50IjogIk5vb24uIn0sIHsicm9sZSI6ICJ1"
    b"c2VyIiwgImNvbnRlbnQiOiAiVGhhbmtzLCBhbmQgPHRvb2xfY2FsbD4/In1d"
)


@pytest.mark.parametrize(
    ("prompt", "body"),
    [
        pytest.param(
            {"prompt": "Hello"},
            b'{"messages": "W3sicm9sZSI6ICJ1c2VyIiwgImNvbnRlbnQiOiAiSGVsbG8ifV0=',
            id="prompt",
        ),
        pytest.param(
            {"prompt": "Hello", "system": "Be brief"},
            b'{"messages": "W3sicm9sZSI6ICJzeXN0ZW0iLCAiY29udGVudCI6ICJCZSBicmllZiJ9LCB7InJvbGUiOiAidXNlciIsICJjb250ZW'
            b"50IjogIkhlbGxvIn1d",
            id="system prompt",
        ),
        pytest.param({"prompt": None, "messages": HISTORY}, HISTORY_BODY, id="history with calls"),
    ],
)
def test_prompt_without_tools_sends_the_bytes_of_before(
    prompt: dict[str, Any], body: bytes, ask: Ask, server: Loopback
) -> None:
    """Who uses no tools notices nothing of them; calls of a history stand in brackets."""
    assert ask(**prompt).text
    assert server.last.body == body + BODY_END


def test_tools_are_described_behind_the_system_prompt(chain: Chain, server: Loopback) -> None:
    """One system message: the user's words, and then each tool as JSON and the tags of a call."""
    assert chain("Hello", tools=[add, now], system="Be brief").text.startswith("llama heard: Hello")
    first, second = server.last.messages
    assert (first["role"], second) == ("system", {"role": "user", "content": "Hello"})
    assert first["content"].startswith("Be brief\n\n")
    assert "<tool_call>\n" in first["content"]
    described, undescribed = tools_in(server.last.messages)
    assert sorted(described) == ["description", "name", "parameters"]
    assert (described["name"], described["description"]) == ("add", "Add two numbers")
    assert described["parameters"]["required"] == ["a"]
    assert described["parameters"]["properties"]["b"] == {"default": 2, "type": "integer"}
    assert sorted(undescribed) == ["name", "parameters"]


def test_tools_without_a_system_prompt_are_one(chain: Chain, server: Loopback) -> None:
    """The instructions are then all of the system message."""
    assert chain("Hello", tools=[add]).text == "llama heard: Hello"
    assert [message["role"] for message in server.last.messages] == ["system", "user"]
    assert server.last.messages[0]["content"] == server.last.messages[0]["content"].strip()


def test_history_is_written_as_the_model_writes_it(ask: Ask, server: Loopback) -> None:
    """With tools, earlier calls stand in tags, and all results of a round in one message, in the order of the calls."""
    ask(None, messages=HISTORY, tools=[llm.Tool.function(now)])
    first, *rest, last = server.last.messages
    assert first["content"].startswith("Be brief\n\n")
    called, told, answered = rest[1:]
    assert (called["role"], told["role"], answered["role"]) == ("assistant", "user", "assistant")
    words, *calls = called["content"].split("<tool_call>\n")
    assert words == "Wait.\n"
    assert [json.loads(call.partition("\n</tool_call>")[0]) for call in calls] == [
        {"name": "now", "arguments": {"zone": "Köln"}},
        {"name": "add", "arguments": {}},
    ]
    assert results_in(told) == [("now", "noon"), ("add", "Error: no")]
    assert AFTER_RESULTS not in told["content"]
    assert last["content"] == "Thanks, and <tool_call>?"


@pytest.mark.parametrize("name", ["vision", "llama"])
def test_attachment_of_a_result_goes_as_pictures_do(name: str, chain: Chain, server: Loopback) -> None:
    """What a tool attaches is sent to the model that sees, and a note to one that does not."""

    def draw() -> llm.ToolOutput:
        return llm.ToolOutput("done", attachments=[llm.Attachment(type="image/png", content=PNG)])

    chain("Call draw with {}", f"autonomous-{name}", tools=[draw])
    sent = server.last.messages
    assert results_in(sent[3]) == [("draw", "done")]
    assert AFTER_RESULTS in json.dumps(sent[-1])
    assert json.dumps(sent).count(AFTER_RESULTS) == 1
    if name == "vision":
        url = f"data:image/png;base64,{base64.b64encode(PNG).decode()}"
        assert json.dumps(sent).count("data:image/png") == 1
        assert {"type": "image_url", "image_url": {"url": url}} in sent[-1]["content"]
    else:
        assert "[image/png attachment, not shown to this model]" in sent[-1]["content"]


# Chains


@pytest.mark.parametrize("stream", [True, False], ids=["streamed", "whole"])
@pytest.mark.parametrize("name", ENDPOINTS)
def test_chain_of_two_rounds(name: str, stream: bool, chain: Chain, server: Loopback) -> None:
    """Each of the five calls the tool, is given its result, and answers."""
    chained = chain('Call add with {"a": 40}', f"autonomous-{name}", tools=[add, now], stream=stream)
    assert chained.text == f"{name}: add said 42"
    assert chained.calls == [[("add", {"a": 40})], []]
    assert [request.payload["stream"] for request in server.requests] == [stream] * 2
    first, second = (request.messages for request in server.requests)
    assert second[: len(first)] == first
    called, told = second[len(first) :]
    assert called == {
        "role": "assistant",
        "content": '<tool_call>\n{"name": "add", "arguments": {"a": 40}}\n</tool_call>',
    }
    assert (told["role"], results_in(told)) == ("user", [("add", "42")])
    assert told["content"].endswith(AFTER_RESULTS)


def test_two_calls_in_one_reply(chain: Chain, server: Loopback) -> None:
    """Both are made, and their results go in one message, in the order of the calls, each call with its own id."""
    chained = chain('Call now with {} Call add with {"a": 1, "b": 1}', tools=[add, now])
    assert chained.text == "llama: now said noon, add said 2"
    assert chained.calls[0] == [("now", {}), ("add", {"a": 1, "b": 1})]
    assert len({call.tool_call_id for call in chained.responses[0].tool_calls_or_raise()}) == 2
    assert len(server.last.messages) == 4
    assert results_in(server.last.messages[-1]) == [("now", "noon"), ("add", "2")]


def test_text_and_calls_stay_in_order(chain: Chain, server: Loopback) -> None:
    """Words before, between and behind calls keep their place, in the response's messages and in the next request."""
    server.answers += [texts("Let me see.\n", NOW_TAG, "\nand ", "then\n", f"{ADD_TAG}\nSo.")]
    chained = chain(tools=[add, now])
    told = [part.strip() if isinstance(part, str) else part for part in chained.parts(0)]
    assert told == ["Let me see.", ("now", {}), "and then", ("add", {"a": 1}), "So."]
    content = server.last.messages[2]["content"]
    places = [content.index(words) for words in ("Let me see.", '"now"', "and then", '"add"', "So.")]
    assert places == sorted(places)
    assert content.count("<tool_call>") == content.count("</tool_call>") == 2


def test_tool_that_raises(chain: Chain, server: Loopback) -> None:
    """The model is told the exception, and answers."""
    assert chain("Call fail with {}", tools=[fail]).text == "llama: fail said Error: no luck"
    assert results_in(server.last.messages[-1]) == [("fail", "Error: no luck")]


def test_tool_that_returns_nothing(chain: Chain, server: Loopback) -> None:
    """An empty result is told as one, and not as an error."""

    def quiet() -> str:
        return ""

    assert chain("Call quiet with {}", tools=[quiet]).text == "llama: quiet said "
    assert results_in(server.last.messages[-1]) == [("quiet", "")]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [('{"a": "x"}', "can only concatenate"), ("{}", "missing 1 required"), ('{"c": 1}', "unexpected keyword")],
)
def test_arguments_are_not_second_guessed(arguments: str, words: str, chain: Chain, server: Loopback) -> None:
    """A wrong type, one that is missing or one too many is what the tool says of it."""
    assert words in chain(f"Call add with {arguments}", tools=[add]).text
    [(name, output)] = results_in(server.last.messages[-1])
    assert (name, output.startswith("Error: "), words in output) == ("add", True, True)


def test_unknown_tool(chain: Chain, server: Loopback) -> None:
    """The model is told by `llm` that there is no such tool."""
    server.answers += [texts('<tool_call>{"name": "nope", "arguments": {}}</tool_call>')]
    assert 'tool "nope" does not exist' in chain(tools=[now]).text
    assert results_in(server.last.messages[-1]) == [("nope", 'Error: tool "nope" does not exist')]


def test_call_that_is_cancelled(chain: Chain, server: Loopback) -> None:
    """The model is told what `before_call` says, and the tool is not called."""
    called: list[str] = []

    def before_call(tool: llm.Tool | None, call: llm.ToolCall) -> None:
        raise llm.CancelToolCall("not today")

    def record() -> str:
        called.append("yes")
        return "done"

    assert "not today" in chain("Call record with {}", tools=[record], before_call=before_call).text
    assert results_in(server.last.messages[-1]) == [("record", "Cancelled: not today")]
    assert called == []


class Memory(llm.Toolbox):
    """A toolbox that keeps what it is told."""

    def __init__(self) -> None:
        self.kept: list[str] = []

    def keep(self, what: str) -> str:
        """Keep something"""
        self.kept.append(what)
        return f"{len(self.kept)} kept"


def test_toolbox(chain: Chain, server: Loopback) -> None:
    """The tools of a toolbox are called on one object, round for round."""
    memory = Memory()
    server.answers += [speak(), texts('<tool_call>{"name": "Memory_keep", "arguments": {"what": "two"}}</tool_call>')]
    chained = chain('Call Memory_keep with {"what": "one"}', tools=[memory])
    assert chained.text == "llama: Memory_keep said 2 kept"
    assert memory.kept == ["one", "two"]
    assert [tool["description"] for tool in tools_in(server.requests[0].messages)] == ["Keep something"]


class Notes(llm.Toolbox):
    """A toolbox that keeps what it is told in a file, as llm-tools-sqlite keeps it in a database."""

    def __init__(self, path: str) -> None:
        self.path = Path(path)

    def keep(self, what: str) -> str:
        """Keep something"""
        with self.path.open("a") as file:
            file.write(f"{what}\n")
        return self.path.read_text()


class NotesPlugin:
    @llm.hookimpl
    def register_tools(self, register: Callable[..., None]) -> None:
        register(Notes)


def test_toolbox_of_another_plugin_keeps_its_state_over_prompts(tmp_path: Path, server: Loopback) -> None:
    """`llm -T 'Notes(...)'`, and then `-c` with the same toolbox."""
    toolbox, plugin = f"Notes({json.dumps(str(tmp_path / 'notes'))})", NotesPlugin()
    llm.plugins.pm.register(plugin)
    try:
        for settings, what in ((["-m", "autonomous-hermes"], "one"), (["-c"], "two")):
            shown = invoke(*settings, "-T", toolbox, f'Call Notes_keep with {{"what": "{what}"}}')
    finally:
        llm.plugins.pm.unregister(plugin)
    assert shown == ("hermes: Notes_keep said one\ntwo\n\n", "", 0)
    assert [message["role"] for message in server.last.messages].count("assistant") == 3


def test_api_server_passes_on_tools_that_its_client_runs(server: Loopback) -> None:
    """Plugins that serve models over an API, such as llm-chat-completions-server, give tools without code.

    They read the calls from the messages, and put the results into the messages of the next request.
    """
    tool = llm.Tool(name="now", description="The time", input_schema={"type": "object", "properties": {}})

    async def request(messages: list[Message], **kwargs: Any) -> list[Message]:
        response = llm.get_async_model("autonomous-hermes").prompt(messages=messages, tools=[tool], **kwargs)
        answer: list[Message] = await response.messages()
        return answer

    async def serve() -> str:
        [called] = await request([], prompt="Call now with {}")
        [call] = called.parts
        assert isinstance(call, ToolCallPart)
        result = ToolResultPart(name="now", output="noon", tool_call_id=call.tool_call_id)
        [answer] = await request([user("Call now with {}"), called, Message(role="tool", parts=[result])])
        return "".join(part.text for part in answer.parts if isinstance(part, TextPart))

    assert asyncio.run(serve()) == "hermes: now said noon"


def test_bare_json_is_called_and_answered_json_is_not(chain: Chain, server: Loopback) -> None:
    """A reply that is nothing but the call of a tool is one; one that is an answer in JSON is shown."""
    server.answers += [texts('{"name": "now", ', '"parameters": {}}'), texts('{"name": "noon", ', '"age": 12}')]
    chained = chain(tools=[now])
    assert chained.calls == [[("now", {})], []]
    assert chained.text == '{"name": "noon", "age": 12}'


@pytest.mark.parametrize(
    "text", [f"Write {NOW_TAG} for it.", '{"name": "now", "arguments": {}}', "<tool_call>{", "<tool_"]
)
def test_answer_to_a_prompt_without_tools_is_text(text: str, ask: Ask, server: Loopback) -> None:
    """Whatever it says of calls is shown as it is."""
    server.answers += [texts(*text)]
    answer = ask()
    assert answer.text == text
    assert answer.response.tool_calls_or_raise() == []
    assert len(server.requests) == 1


def test_text_is_not_held(chain: Chain, server: Loopback, monkeypatch: pytest.MonkeyPatch) -> None:
    """With tools, each piece of text reaches the reader while the server still holds back the next."""
    words, sent = ["One ", "a < b ", "and {two} ", "[three] ", "`four` </b> ", "five"], threading.Semaphore(1)

    async def answer(request: Request, connection: Connection) -> None:
        await connection.head()
        for word in words:
            assert await asyncio.to_thread(sent.acquire, timeout=DEADLINE), "the word before it was held"
            await connection.send(event(delta(word)))
        await connection.send(STOP)
        await connection.end()

    server.answer, process_chunk = answer, llm.models._BaseResponse._process_chunk

    def seen(self: Any, chunk: Any) -> Any:
        sent.release()
        return process_chunk(self, chunk)

    monkeypatch.setattr(llm.models._BaseResponse, "_process_chunk", seen)
    assert chain(tools=[now]).chunks == words


# What goes wrong


def test_503_in_the_middle_of_a_chain(chain: Chain, server: Loopback, sleeps: list[float]) -> None:
    """The round is tried again with the same bytes, and no tool is called twice."""
    called: list[str] = []

    def record() -> str:
        called.append("yes")
        return "done"

    server.answers += [speak(), refuse]
    assert chain("Call record with {}", tools=[record]).text == "llama: record said done"
    assert called == ["yes"]
    assert len(server.requests) == 3
    assert server.requests[1].body == server.requests[2].body
    assert len(sleeps) == 1


@pytest.mark.parametrize(
    "pieces",
    [("<tool_",), (NOW_TAG[:30],), (NOW_TAG,), (NOW_TAG, "\n<tool_call>{"), ('{"name": "now"',), (NOW_TAG, "\nSo ")],
    ids=["tag", "call", "behind a call", "second call", "bare", "text behind a call"],
)
def test_connection_lost_in_a_call(
    pieces: tuple[str, ...], chain: Chain, server: Loopback, sleeps: list[float]
) -> None:
    """Where nothing has gone out, the prompt is tried again as it was, and a call of the lost reply is not made."""
    server.answers += [cut(*pieces)]
    chained = chain("Hello", tools=[now])
    assert chained.text == "llama heard: Hello"
    assert chained.calls == [[]]
    assert server.requests[0].body == server.requests[1].body
    assert len(sleeps) == 1


def test_connection_lost_in_a_call_behind_text(chain: Chain, server: Loopback, sleeps: list[float]) -> None:
    """Text that was seen cannot be taken back: the answer is incomplete, and no tool is called."""
    server.answers += [cut("Let me see. ", NOW_TAG[:30])]
    chained = chain("Hello", tools=[now])
    assert chained.chunks == ["Let me see. "]
    assert "the answer is incomplete: the connection was lost" in str(chained.error)
    assert len(server.requests) == 1
    assert sleeps == []


def test_made_up_result_is_neither_shown_nor_kept(chain: Chain, server: Loopback) -> None:
    """The reply ends with its calls: the model is given the real result."""
    made_up = '\n<tool_response>\n{"name": "now", "content": "midnight"}\n</tool_response>\nIt is midnight.'
    server.answers += [texts("Wait. ", *NOW_TAG, *made_up)]
    chained = chain(tools=[now])
    assert chained.text == "Wait. llama: now said noon"
    assert chained.calls == [[("now", {})], []]
    assert "midnight" not in json.dumps(server.last.messages)
    assert "midnight" not in repr(chained.messages)


@pytest.mark.parametrize("call", [NOW_TAG, '{"name": "now", "parameters": {}}'], ids=["tag", "bare"])
def test_made_up_result_without_an_end_is_not_waited_for(call: str, chain: Chain, server: Loopback) -> None:
    """A model that writes on for ever behind a made-up result does not keep the prompt."""

    async def answer(request: Request, connection: Connection) -> None:
        await connection.head()
        await connection.send(event(delta(call)) + event(delta("\n<tool_resp")) + event(delta("onse>\n{")))
        await connection.drip(event(delta("and so on ")))

    server.answers += [answer]
    assert chain(tools=[now]).text == "llama: now said noon"
    assert until(lambda: not server.open - {2})


# What is no call, and what may be one


@pytest.mark.parametrize("stream", [True, False], ids=["streamed", "whole"])
@pytest.mark.parametrize("form", ["tool", "OpenAI's shape", "list", "tags", "fence", "names", "names in lines"])
def test_answer_that_names_tools_calls_none(form: str, stream: bool, chain: Chain, server: Loopback) -> None:
    """The tools as the model was given them, and JSON with their names alone, are text to the last character."""
    called: list[str] = []

    def record(what: str = "") -> str:
        """Record something"""
        called.append(what)
        return "done"

    tool = llm.Tool.function(record)
    described = {"name": tool.name, "description": tool.description, "parameters": tool.input_schema}
    given = json.dumps(described)
    answer = {
        "tool": given,
        "OpenAI's shape": json.dumps({"type": "function", "function": described}),
        "list": json.dumps([described, {"name": tool.name, "parameters": tool.input_schema}]),
        "tags": f"<tools>\n{given}\n</tools>",
        "fence": f"```json\n{given}\n```\nThat is all.",
        "names": '[{"name": "record"}, {"name": "now"}]',
        "names in lines": '{"name": "record"}\n{"name": "now"}',
    }[form]
    server.answers += [texts(*answer)]
    chained = chain(tools=[record, now], stream=stream)
    assert (chained.text, chained.calls, called) == (answer, [[]], [])
    assert len(server.requests) == 1


PUT_TO_THE_MODEL = {
    "made-up result": '<tool_response>\n{"result": "midnight"}\n</tool_response>\nIt is midnight.',
    "call behind words": 'I call:\n```json\n{"name": "now", "arguments": {}}\n```',
    "broken bare call": '{"name": "now", "arguments": {}',
    "function with parameters": "<function=now>\n</function>",
    "Python's words": "<tool_call>now()</tool_call>",
    "NaN": '{"name": "now", "arguments": {"a": NaN}}',
}


@pytest.mark.parametrize("written", PUT_TO_THE_MODEL.values(), ids=PUT_TO_THE_MODEL)
def test_what_may_be_a_call_is_put_to_the_model(
    written: str, chain: Chain, server: Loopback, sleeps: list[float]
) -> None:
    """The model sees what it wrote and a correction, and can still call the tool; the user sees neither."""
    server.answers += [texts(*written), texts(NOW_TAG), texts("Noon.")]
    chained = chain("Hello", tools=[now])
    assert chained.text.split() == [*(["I", "call:"] if written.startswith("I call") else []), "Noon."]
    assert chained.calls == [[("now", {})], []]
    first, second, third = (request.messages for request in server.requests)
    assert second[:-1] == [*first, {"role": "assistant", "content": written}]
    assert second[-1]["role"] == "user"
    assert written not in json.dumps(third)
    assert sleeps == []


@pytest.mark.parametrize("written", PUT_TO_THE_MODEL.values(), ids=PUT_TO_THE_MODEL)
def test_what_may_be_a_call_is_put_to_the_model_once(written: str, chain: Chain, server: Loopback) -> None:
    """If the model writes the same again, the user gets one line instead of an answer, and no tool is called."""
    server.answer = texts(written)
    chained = chain("Hello", tools=[now])
    assert len(server.requests) == 2
    assert "it begins: " in str(chained.error)
    assert str(chained.error).isprintable()
    assert "now" not in "".join(chained.chunks)
    assert "midnight" not in "".join(chained.chunks)


CALLED = {
    "a bare call and words": '{"name": "now", "arguments": {}}\n\nMore?',
    "a brace too many": '<tool_call>\n{"name": "now", "arguments": {}}}\n</tool_call>',
    "another tag": '<function_call>[{"name": "now", "arguments": {}}]</function_call>',
    "a fence in the tag": '<tool_call>\n```json\n{"name": "now", "arguments": {}}\n```\n</tool_call>',
    "a function": "<function=now>{}</function><|eom_id|>",
}


@pytest.mark.parametrize("written", CALLED.values(), ids=CALLED)
def test_call_is_known_by_what_it_says(written: str, chain: Chain, server: Loopback) -> None:
    """Whatever it is wrapped in, the tool is called, and no tag or JSON is shown."""
    server.answers += [texts(*written), texts("Noon.")]
    chained = chain(tools=[now])
    assert chained.calls == [[("now", {})], []]
    assert chained.text.split() == [*(["More?"] if "More?" in written else []), "Noon."]
    assert len(server.requests) == 2


def test_made_up_result_without_a_call_is_put_to_the_model_once(
    chain: Chain, server: Loopback, sleeps: list[float]
) -> None:
    """The user never sees it: the model calls the tool after all, or one line says what it did."""
    made_up = "<tool_response>noon</tool_response>"
    server.answers += [texts(*made_up), texts(NOW_TAG)]
    chained = chain("Hello", tools=[now])
    assert chained.text == "llama: now said noon"
    assert chained.calls == [[("now", {})], []]
    first, second, third = (request.messages for request in server.requests)
    written, told = second[len(first) :]
    assert (second[: len(first)], written) == (first, {"role": "assistant", "content": made_up})
    assert (told["role"], "No tool was called" in told["content"]) == ("user", True)
    assert "No tool was called" not in json.dumps(third)

    server.answers += [texts(made_up), texts(made_up)]
    failed = chain("Hello", tools=[now])
    assert "the model made up the result of a tool; it begins: " in str(failed.error)
    assert str(failed.error).endswith("(2 attempts)")
    assert failed.chunks == []
    assert len(server.requests) == 5
    assert sleeps == []


# Empty replies


def test_empty_reply_after_results_is_put_to_the_model_once(
    chain: Chain, server: Loopback, sleeps: list[float]
) -> None:
    """The tools have run, so the model is asked again for the answer; if there is none, that is one line."""
    server.answers += [speak(), texts(""), texts("Noon.")]
    assert chain("Call now with {}", tools=[now]).text == "Noon."
    _, second, third = (request.messages for request in server.requests)
    assert third == [*second, {"role": "user", "content": EMPTY_CORRECTION}]

    server.answers += [speak(), texts(""), texts("")]
    failed = chain("Call now with {}", tools=[now])
    assert str(failed.error).startswith(f"127.0.0.1:{server.port}: the answer was empty")
    assert str(failed.error).endswith("(2 attempts)")
    assert len(server.requests) == 6
    assert sleeps == []


def test_empty_reply_before_any_result_is_an_error(chain: Chain, server: Loopback) -> None:
    """There is nothing to ask the model about, with tools as without."""
    server.answer = texts("")
    assert "the answer was empty" in str(chain("Hello", tools=[now]).error)
    assert len(server.requests) == 1


# Broken calls


@pytest.mark.parametrize("pieces", [(BROKEN_TAG,), ("Wait. ", *BROKEN_TAG), (BROKEN_TAG, " So.")])
def test_broken_call_that_is_then_right(
    pieces: tuple[str, ...], chain: Chain, server: Loopback, sleeps: list[float], caplog: pytest.LogCaptureFixture
) -> None:
    """The model is shown what it wrote, told in one sentence what is wrong with it, and answers again at once."""
    server.answers += [texts(*pieces), texts(NOW_TAG)]
    with caplog.at_level(logging.INFO, "llm_autonomous"):
        chained = chain("Hello", tools=[now])
    assert chained.text.replace("\n", "") == ("Wait. " if "Wait. " in pieces else "") + "llama: now said noon"
    assert chained.calls == [[("now", {})], []]
    first, second, third = (request.messages for request in server.requests)
    assert second[: len(first)] == first
    written, told = second[len(first) :]
    assert written == {"role": "assistant", "content": "".join(pieces)}
    assert told["role"] == "user"
    assert told["content"].startswith("Your tool call could not be read: it is no valid JSON")
    assert "<tool_call>" in told["content"]
    assert "could not be read" not in json.dumps(third), "what is kept is the good answer"
    assert sleeps == []
    [record] = [record for record in caplog.records if record.name == "llm_autonomous"]
    assert "asking the model to correct it" in record.getMessage()


@pytest.mark.parametrize("stream", [True, False], ids=["streamed", "whole"])
def test_call_that_stays_broken(stream: bool, chain: Chain, server: Loopback, sleeps: list[float]) -> None:
    """After the second failure the user gets one line that begins with what the model wrote, and no tool is called."""
    server.answer = texts(BROKEN_TAG)
    chained = chain("Hello", tools=[now], stream=stream)
    assert chained.error
    line = str(chained.error)
    assert line.startswith(f"127.0.0.1:{server.port}: the model's tool call cannot be read, it is no valid JSON")
    assert 'it begins: {"name": "now", "arguments":' in line
    assert line.endswith("(2 attempts)")
    assert line.isprintable()
    assert chained.chunks == []
    assert len(server.requests) == 2
    assert sleeps == []


def test_broken_call_counts_as_an_attempt(chain: Chain, server: Loopback, sleeps: list[float]) -> None:
    """Behind a 503 there is one more, behind two there is none."""
    server.answers += [refuse, texts(BROKEN_TAG), texts("Noon.")]
    assert chain(tools=[now]).text == "Noon."
    assert len(server.requests) == 3
    assert len(sleeps) == 1
    server.answers += [refuse, refuse, texts(BROKEN_TAG)]
    chained = chain(tools=[now])
    assert "tool call cannot be read" in str(chained.error)
    assert str(chained.error).endswith("(3 attempts)")
    assert len(server.requests) == 6


def test_503_behind_a_broken_call(chain: Chain, server: Loopback, sleeps: list[float]) -> None:
    """The correction is what is sent again."""
    server.answers += [texts(BROKEN_TAG), refuse, texts("Noon.")]
    assert chain(tools=[now]).text == "Noon."
    assert server.requests[1].body == server.requests[2].body != server.requests[0].body
    assert len(sleeps) == 1


def test_broken_call_behind_a_good_one(chain: Chain, server: Loopback) -> None:
    """The second answer replaces both: no call is made twice."""
    called: list[str] = []

    def record(what: str) -> str:
        called.append(what)
        return "done"

    tags = [f'<tool_call>{{"name": "record", "arguments": {{"what": "{what}"}}}}</tool_call>' for what in ("a", "b")]
    server.answers += [texts(tags[0], tags[1].replace("}", "")), texts(*tags)]
    chained = chain(tools=[record])
    assert chained.text == "llama: record said done, record said done"
    assert chained.calls[0] == [("record", {"what": "a"}), ("record", {"what": "b"})]
    assert called == ["a", "b"]
    assert server.requests[2].messages[2]["content"].count("<tool_call>") == 2


@pytest.mark.parametrize(
    ("first", "second", "total"),
    [
        ({"prompt_tokens": 10, "completion_tokens": 5}, {"prompt_tokens": 20, "completion_tokens": 7}, (30, 12)),
        ({"prompt_tokens": 10, "completion_tokens": 5}, None, (10, 5)),
        (None, {"prompt_tokens": 20}, (20, None)),
    ],
)
def test_usage_is_that_of_both_answers(
    first: dict[str, int] | None, second: dict[str, int] | None, total: tuple[int, int], ask: Ask, server: Loopback
) -> None:
    """The tokens of an answer that was no good were used as well."""
    server.answers += [texts(BROKEN_TAG, usage=first), texts("Noon.", usage=second)]
    answer = ask(tools=[llm.Tool.function(now)])
    assert answer.text == "Noon."
    assert (answer.response.input_tokens, answer.response.output_tokens) == total


def test_details_of_the_usage_are_kept(ask: Ask, server: Loopback) -> None:
    """`llm logs --usage` shows them, such as the tokens that were cached, and leaves out what is zero."""
    details = {"prompt_tokens_details": {"cached_tokens": 3, "audio_tokens": 0}, "completion_tokens_details": None}
    server.answers += [texts("Noon.", usage={"prompt_tokens": 10, "completion_tokens": 5, **details})]
    assert ask().response.token_details == {"prompt_tokens_details": {"cached_tokens": 3}}
    server.answers += [texts("Noon.", usage={"prompt_tokens": 10, "completion_tokens": 5})]
    assert ask().response.token_details is None


# The command line

NOW_FUNCTION = ["--functions", "def now():\n    'The time'\n    return 'noon'\n"]
CALL_NOW = ["-m", "autonomous-llama", "Call now with {}"]


@pytest.mark.parametrize("settings", [[], ["--no-stream"], ["--async"]], ids=["streamed", "whole", "async"])
def test_functions_on_the_command_line(settings: list[str], server: Loopback) -> None:
    """The answer behind the call is what is printed, and the log has both rounds with call and result."""
    assert run(*CALL_NOW, *NOW_FUNCTION, *settings).strip() == "llama: now said noon"
    first, second = json.loads(run("logs", "--json", "-n", "2"))
    [call] = first["tool_calls"]
    assert (call["name"], call["arguments"]) == ("now", {})
    assert first["response"] == ""
    assert second["response"] == "llama: now said noon"
    [result] = second["tool_results"]
    assert (result["name"], result["output"], result["tool_call_id"]) == ("now", "noon", call["tool_call_id"])
    assert [tool["name"] for tool in first["tools"]] == ["now"]


def test_tool_of_a_plugin(server: Loopback) -> None:
    """`-T` takes a tool by its name, and `--td` shows its call."""
    stdout, stderr, code = invoke("-m", "autonomous-hermes", "Call llm_version with {}", "-T", "llm_version", "--td")
    assert stdout.strip().startswith("hermes: llm_version said 0.")
    assert "Tool call: llm_version({})" in stderr
    assert code == 0


def test_chain_limit(server: Loopback) -> None:
    """`--cl` ends a model that does nothing but call."""
    server.answer = texts(NOW_TAG)
    stdout, stderr, code = invoke(*CALL_NOW, *NOW_FUNCTION, "--cl", "3")
    assert "Chain limit of 3 exceeded" in stdout + stderr
    assert code == 1
    assert len(server.requests) == 3


@pytest.mark.parametrize(("typed", "said"), [("n", "Cancelled: User cancelled tool call"), ("y", "noon")])
def test_chat_with_tools_and_approval(typed: str, said: str, server: Loopback) -> None:
    """In `llm chat` a tool is called if the user says so, and the model is told if not."""
    lines = f"Call now with {{}}\n{typed}\nThanks\nexit\n"
    stdout, _, code = invoke("chat", "-m", "autonomous-llama", *NOW_FUNCTION, "--ta", typed=lines)
    assert code == 0
    assert results_in(server.requests[1].messages[-1]) == [("now", said)]
    assert "llama heard: Thanks" in stdout
    roles = [message["role"] for message in server.last.messages]
    assert roles == ["system", "user", "assistant", "user", "assistant", "user"]


def test_continue_with_and_without_tools(server: Loopback) -> None:
    """Behind a call, `-c` writes it in tags where there are tools, and in brackets where there are none."""
    run(*CALL_NOW, *NOW_FUNCTION)
    run("-c", "And?", *NOW_FUNCTION)
    first, *_ = messages = server.last.messages
    assert first["role"] == "system"
    assert messages[2]["content"] == NOW_TAG
    assert results_in(messages[3]) == [("now", "noon")]
    run("-c", "And then?")
    assert server.last.messages[:3] == [
        {"role": "user", "content": "Call now with {}"},
        {"role": "assistant", "content": "[called the tool now with {}]"},
        {"role": "user", "content": "[the tool now returned: noon]"},
    ]
    assert "<tool" not in json.dumps(server.last.messages)


def test_words_and_calls_in_the_log(server: Loopback) -> None:
    """What the model says beside its calls is printed and logged, its tags are not."""
    server.answers += [texts("Let me see.\n", NOW_TAG)]
    assert run(*CALL_NOW, *NOW_FUNCTION).split("\n", 1) == ["Let me see.", "llama: now said noon\n"]
    logged = run("logs", "-n", "2")
    assert "Let me see." in logged
    assert "<tool_call>" not in logged


def test_broken_call_on_the_command_line(server: Loopback) -> None:
    """One line on standard error, exit code 1, and nothing in the log that was not answered."""
    server.answer = texts(BROKEN_TAG)
    stdout, stderr, code = invoke(*CALL_NOW, *NOW_FUNCTION)
    assert (stdout.strip(), code) == ("", 1)
    [line] = stderr.splitlines()
    assert line.startswith(f"Error: 127.0.0.1:{server.port}: the model's tool call cannot be read")
    assert json.loads(run("logs", "--json")) == []


def test_models_list_tools_and_schemas(server: Loopback) -> None:
    """`llm models` finds the five by either feature, and names both."""
    for feature in ("--tools", "--schemas"):
        listed = run("models", feature, "-q", "autonomous").splitlines()
        assert len(listed) == len(ENDPOINTS)
    described = run("models", "--options", "-q", "autonomous-")
    assert described.count("- tools") == described.count("- schemas") == len(ENDPOINTS)


@pytest.mark.parametrize("kind", [[], ["--async"]], ids=["sync", "async"])
def test_interrupt_while_a_call_is_held(kind: list[str], server: Loopback, start: Start) -> None:
    """Ctrl-C ends the command at once, with the text so far, no call, no traceback, and a closed connection."""

    async def answer(request: Request, connection: Connection) -> None:
        await connection.head()
        await connection.send(event(delta("Let me see. ")) + event(delta(NOW_TAG[:30])))
        await connection.stall()

    server.answer = answer
    process = start("llm", *CALL_NOW, *NOW_FUNCTION, *kind, url=server.url)
    assert output_until(process, "see. ") == "Let me see. "
    os.kill(process.pid, signal.SIGINT)
    stdout, stderr, code = finish(process)
    assert "noon" not in stdout
    assert (stderr.strip(), code) == ("Aborted!", 1)
    assert until(lambda: not server.open)
    assert len(server.requests) == 1
