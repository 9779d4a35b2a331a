"""Tools, end to end against the loopback server: what is sent, what comes back, and what goes wrong in between."""

from __future__ import annotations

import asyncio
import base64
import json
import logging
import re
from typing import Any, NamedTuple

import llm
import pytest
from conftest import (
    NOW_TAG,
    PNG,
    Ask,
    Chain,
    Start,
    cut,
    finish,
    interrupt,
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


@pytest.fixture
def record() -> Any:
    """A tool that keeps in `calls` what it was called with."""

    def record(what: str) -> str:
        """Record something"""
        record.calls.append(what)
        return "done"

    record.calls = []
    return record


def tools_in(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The tools that a request describes."""
    _, _, after = messages[0]["content"].partition("<tools>\n")
    return [json.loads(line) for line in after.partition("\n</tools>")[0].splitlines()]


def results_in(message: dict[str, Any]) -> list[tuple[str, str]]:
    """The names and outputs of the results in a message that holds nothing else, except for what to do with them."""
    text = message["content"].removesuffix(f"\n{AFTER_RESULTS}")
    names = re.findall(r"^The tool (\w+) returned:$", text, re.MULTILINE)
    _, *outputs = re.split(r"(?:\A|\n)The tool \w+ returned:\n", text)
    results = [*zip(names, outputs, strict=True)]
    assert text == "\n".join(RESULT.format(name=name, output=output) for name, output in results)
    return results


# What is sent

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
HISTORY_BYTES = (
    rb'[{"role": "system", "content": "Be brief"}, {"role": "user", "content": "Wie sp\u00e4t?"}, '
    rb'{"role": "assistant", "content": "Wait.\n[called the tool now with {\"zone\": \"K\u00f6ln\"}]\n'
    rb'[called the tool add with {}]"}, {"role": "user", "content": "[the tool now returned: noon]\n'
    rb'[the tool add failed: ValueError: no]"}, {"role": "assistant", "content": "Noon."}, '
    rb'{"role": "user", "content": "Thanks, and <tool_call>?"}]'
)


def test_history_without_tools_has_its_calls_in_brackets(ask: Ask, server: Loopback) -> None:
    """Who uses no tools notices nothing of them: the bytes of a request are what they were before there were any."""
    assert ask(None, messages=HISTORY).text
    sent = base64.b64encode(HISTORY_BYTES)
    assert server.last.body == b'{"messages": "%s", "threadId": "llama", "stream": true, "aiAgent": "llama"}' % sent


def test_history_is_written_as_the_model_writes_it(ask: Ask, server: Loopback) -> None:
    """With tools, earlier calls stand in tags, and all results of a round in one message, in the order of the calls."""
    ask(None, messages=HISTORY, tools=[llm.Tool.function(now)])
    first, _, called, told, answered, last = server.last.messages
    assert first["content"].startswith("Be brief\n\n")
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


@pytest.mark.parametrize("settings", [{}, {"system": "Be brief"}], ids=["alone", "system prompt"])
def test_tools_are_described_after_the_system_prompt(settings: dict[str, str], chain: Chain, server: Loopback) -> None:
    """One system message: the user's words, and then each tool as JSON and the tags of a call."""
    assert chain("Hello", tools=[add, now], **settings).text.startswith("llama heard: Hello")
    first, second = server.last.messages
    assert (first["role"], second) == ("system", {"role": "user", "content": "Hello"})
    assert first["content"] == first["content"].strip()
    assert first["content"].startswith("Be brief\n\n") == bool(settings)
    assert "<tool_call>\n" in first["content"]
    described, undescribed = tools_in(server.last.messages)
    assert sorted(described) == ["description", "name", "parameters"]
    assert (described["name"], described["description"]) == ("add", "Add two numbers")
    assert described["parameters"]["required"] == ["a"]
    assert described["parameters"]["properties"]["b"] == {"default": 2, "type": "integer"}
    assert sorted(undescribed) == ["name", "parameters"]


@pytest.mark.parametrize("name", ["vision", "llama"])
def test_attachment_of_a_result_goes_as_pictures_do(name: str, chain: Chain, server: Loopback) -> None:
    """What a tool attaches is sent to the model that sees, and a note to one that does not."""

    def draw() -> llm.ToolOutput:
        return llm.ToolOutput("done", attachments=[llm.Attachment(type="image/png", content=PNG)])

    chain("Call draw with {}", f"autonomous-{name}", tools=[draw])
    sent = server.last.messages
    assert results_in(sent[-2]) == [("draw", "done")]
    assert AFTER_RESULTS in json.dumps(sent[-1])
    assert json.dumps(sent).count(AFTER_RESULTS) == 1
    if name == "vision":
        url = f"data:image/png;base64,{base64.b64encode(PNG).decode()}"
        assert json.dumps(sent).count("data:image/png") == 1
        assert {"type": "image_url", "image_url": {"url": url}} in sent[-1]["content"]
        assert "<tools>" in sent[0]["content"]
        assert sent[0]["role"] == "user", "a server may refuse a system message beside a picture"
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
    *before, called, told = second
    assert before == first
    tag = '<tool_call>\n{"name": "add", "arguments": {"a": 40}}\n</tool_call>'
    assert called == {"role": "assistant", "content": tag}
    assert (told["role"], results_in(told)) == ("user", [("add", "42")])
    assert told["content"].endswith(AFTER_RESULTS)


def test_text_and_calls_stay_in_order(chain: Chain, server: Loopback) -> None:
    """Words before, between and after calls keep their place, in the response's messages and in the next request."""
    server.answers += [texts("Let me see.\n", NOW_TAG, "\nand ", "then\n", f"{ADD_TAG}\nSo.")]
    chained = chain(tools=[add, now])
    parts = [part.strip() if isinstance(part, str) else part for part in chained.parts(0)]
    assert parts == ["Let me see.", ("now", {}), "and then", ("add", {"a": 1}), "So."]
    assert len({call.tool_call_id for call in chained.responses[0].tool_calls_or_raise()}) == 2
    _, _, called, told = server.last.messages
    places = [called["content"].index(words) for words in ("Let me see.", '"now"', "and then", '"add"', "So.")]
    assert places == sorted(places)
    assert called["content"].count("<tool_call>") == called["content"].count("</tool_call>") == 2
    assert results_in(told) == [("now", "noon"), ("add", "3")]


def give(what: Any) -> Any:
    return what


def fail(words: list[Any]) -> str:
    raise ValueError(*words)


EMPTY = "The tool give ran without an error and returned an empty result."
NO_WORDS = "The tool fail returned:\nError: ValueError: no message was given"


@pytest.mark.parametrize(
    ("name", "arguments", "told"),
    [
        ("give", {"what": "Hi"}, "The tool give returned:\nHi"),
        *(("give", {"what": nothing}, EMPTY) for nothing in ("", " \n", "\u3000\xa0", None)),
        *(("fail", {"words": [w]}, f"The tool fail returned:\nError: {w}") for w in ("no luck", "not a date: None")),
        *(("fail", {"words": words}, NO_WORDS) for words in ([], [" \n"], [None])),
        ("nope", {}, 'The tool nope returned:\nError: tool "nope" does not exist'),
        ("add", {"a": "x"}, "The tool add returned:\nError: can only concatenate .*"),
        ("add", {}, "The tool add returned:\nError: .* missing 1 required .*"),
        ("add", {"c": 1}, "The tool add returned:\nError: .* unexpected keyword .*"),
    ],
)
def test_model_is_told_what_came_of_a_call(
    name: str, arguments: dict[str, Any], told: str, chain: Chain, server: Loopback
) -> None:
    """It is told the result, that it is empty, or what the tool or `llm` says of an error, also of the arguments."""
    call = json.dumps({"name": name, "arguments": arguments})
    server.answers += [texts(f"<tool_call>{call}</tool_call>"), texts("Done.")]
    assert chain(tools=[add, fail, give]).text == "Done."
    assert re.fullmatch(f"{told}\n{AFTER_RESULTS}", server.last.messages[-1]["content"])


class Notes(llm.Toolbox):
    """A toolbox that remembers what it is given."""

    def __init__(self) -> None:
        self.kept: list[str] = []

    def keep(self, what: str) -> str:
        """Keep something"""
        self.kept.append(what)
        return " and ".join(self.kept)


def test_toolbox(chain: Chain, server: Loopback) -> None:
    """The tools of a toolbox are called on one object, in all rounds."""
    server.answers += [speak(), texts('<tool_call>{"name": "Notes_keep", "arguments": {"what": "two"}}</tool_call>')]
    assert chain('Call Notes_keep with {"what": "one"}', tools=[Notes()]).text == "llama: Notes_keep said one and two"
    assert [tool["description"] for tool in tools_in(server.requests[0].messages)] == ["Keep something"]


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


# What is a call, and what is none


def test_bare_json_is_called_and_answered_json_is_not(chain: Chain, server: Loopback) -> None:
    """A reply that is nothing but the call of a tool is one; one that is an answer in JSON is shown."""
    server.answers += [texts('{"name": "now", ', '"parameters": {}}'), texts('{"name": "noon", ', '"age": 12}')]
    chained = chain(tools=[now])
    assert chained.calls == [[("now", {})], []]
    assert chained.text == '{"name": "noon", "age": 12}'


@pytest.mark.parametrize("text", [f"Write {NOW_TAG} for it.", '{"name": "now", "arguments": {}}', "<tool_call>{"])
def test_answer_to_a_prompt_without_tools_is_text(text: str, ask: Ask, server: Loopback) -> None:
    """Whatever it says of calls is shown as it is."""
    server.answers += [texts(*text)]
    answer = ask()
    assert answer.text == text
    assert answer.response.tool_calls_or_raise() == []
    assert len(server.requests) == 1


def test_made_up_result_is_neither_shown_nor_kept_nor_waited_for(chain: Chain, server: Loopback) -> None:
    """The reply ends with its calls, though the model writes on for ever: it is given the real result."""

    async def answer(request: Request, connection: Connection) -> None:
        await connection.head()
        for piece in ("Wait. ", *NOW_TAG, "\n<tool_resp", "onse>\nmidnight"):
            await connection.send(event(delta(piece)))
        await connection.drip(event(delta(" It is midnight.")))

    server.answers += [answer]
    chained = chain(tools=[now])
    assert chained.text == "Wait. llama: now said noon"
    assert chained.calls == [[("now", {})], []]
    assert "midnight" not in json.dumps(server.last.messages) + repr(chained.messages)
    assert until(lambda: not server.open - {2})


# What is lost on the way


def test_503_in_the_middle_of_a_chain(chain: Chain, server: Loopback, sleeps: list[float], record: Any) -> None:
    """The round is tried again with the same bytes, and no tool is called twice."""
    server.answers += [speak(), refuse]
    assert chain('Call record with {"what": "it"}', tools=[record]).text == "llama: record said done"
    assert record.calls == ["it"]
    assert len(server.requests) == 3
    assert server.requests[1].body == server.requests[2].body
    assert len(sleeps) == 1


@pytest.mark.parametrize(
    "pieces", [("<tool_",), ('{"name": "now"',), (NOW_TAG, "\nSo ")], ids=["tag", "bare", "text after a call"]
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


def test_connection_lost_in_a_call_after_text(chain: Chain, server: Loopback, sleeps: list[float]) -> None:
    """Text that was seen cannot be taken back: the answer is incomplete, and no tool is called."""
    server.answers += [cut("Let me see. ", NOW_TAG[:30])]
    chained = chain("Hello", tools=[now])
    assert chained.chunks == ["Let me see. "]
    assert "the answer is incomplete: the connection was lost" in str(chained.error)
    assert len(server.requests) == 1
    assert sleeps == []


# What the model is asked about


class Asked(NamedTuple):
    written: str  # by the model
    seen: str  # of that, by the user
    line: str  # how the error begins if the model writes it again
    correction: str  # how the words begin that the model is asked with


ASKED = {
    "broken": Asked(
        f"Wait. {BROKEN_TAG} So.",
        "Wait. ",
        'the model\'s tool call cannot be read: it is not valid JSON: Expecting value; it begins: {"name": "now", ',
        "Your tool call could not be read: it is not valid JSON",
    ),
    "after words": Asked(
        'I call:\n```json\n{"name": "now", "arguments": {}}\n```',
        "I call:\n",
        'the answer holds a tool call without tags; it begins: {"name": "now", "arguments": {}}',
        "Your answer contains a tool call",
    ),
    "after words, with a broken one": Asked(
        'I call:\n```json\n{"name": "now", "arguments": {}}\n{ ... }\n```',
        "I call:\n",
        "the model's tool call cannot be read: it is not valid JSON: ",
        "Your tool call could not be read: it is not valid JSON",
    ),
    "made-up result": Asked(
        "<tool_response>midnight</tool_response> It is midnight.",
        "",
        "the model made up the result of a tool; it begins: <tool_response>midnight",
        "No tool was called",
    ),
}


@pytest.mark.parametrize("asked", ASKED.values(), ids=ASKED)
def test_model_corrects_what_may_be_a_call(
    asked: Asked, chain: Chain, server: Loopback, sleeps: list[float], caplog: pytest.LogCaptureFixture
) -> None:
    """It is shown what it wrote and told what is wrong with it, answers again at once, and only that answer is kept."""
    server.answers += [texts(*asked.written), texts(NOW_TAG)]
    with caplog.at_level(logging.INFO, "llm_autonomous"):
        chained = chain("Hello", tools=[now])
    assert "".join(chained.text.split("\n")) == asked.seen.strip("\n") + "llama: now said noon"
    assert chained.calls == [[("now", {})], []]
    first, second, third = (request.messages for request in server.requests)
    *before, answer, told = second
    assert (before, answer) == (first, {"role": "assistant", "content": asked.written})
    assert told["role"] == "user"
    assert told["content"].startswith(asked.correction)
    assert "<tool_call>" in told["content"]
    assert asked.correction not in json.dumps(third)
    assert sleeps == []
    [message] = [record.getMessage() for record in caplog.records if record.name == "llm_autonomous"]
    assert "asking the model to correct it" in message


@pytest.mark.parametrize("asked", ASKED.values(), ids=ASKED)
def test_model_is_asked_once(asked: Asked, chain: Chain, server: Loopback) -> None:
    """If it writes the same again, the user gets one line that begins with what it wrote, and no tool is called."""
    server.answer = texts(asked.written)
    chained = chain("Hello", tools=[now])
    assert str(chained.error).startswith(f"127.0.0.1:{server.port}: {asked.line}")
    assert str(chained.error).endswith("(2 attempts)")
    assert str(chained.error).isprintable()
    assert "".join(chained.chunks).split() == (asked.seen * 2).split()
    assert len(server.requests) == 2


NEEDS_A_RESULT = '{"name": "now", "arguments": {"zone": <zone>}}'
FENCED = f'```json\n{{"name": "now", "arguments": {{}}}}\n{NEEDS_A_RESULT}\n```'


@pytest.mark.parametrize("written", [f"{NOW_TAG}\n<tool_call>{NEEDS_A_RESULT}</tool_call>", FENCED])
def test_calls_before_one_that_cannot_be_read_are_made(
    written: str, chain: Chain, server: Loopback, caplog: pytest.LogCaptureFixture
) -> None:
    """The model is asked once. If it writes the same again, the first call is made, and a warning names the other."""
    server.answers += [texts(written), texts(written), speak()]
    chained = chain("Hello", tools=[now])
    assert (chained.calls, chained.text) == ([[("now", {})], []], "llama: now said noon")
    [warning] = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert "left out" in warning
    assert f"it begins: {NEEDS_A_RESULT}" in warning
    assert [len(request.messages) for request in server.requests] == [2, 4, 4]


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


BROKEN = texts(BROKEN_TAG)


@pytest.mark.parametrize("answers", [[refuse, BROKEN], [BROKEN, refuse], [refuse, refuse, BROKEN]], ids=len)
def test_broken_call_counts_as_an_attempt(
    answers: list[Any], chain: Chain, server: Loopback, sleeps: list[float]
) -> None:
    """There are three in all. After a 503 the same is sent again, also if that was the correction."""
    server.answers += [*answers, texts("Noon.")]
    chained = chain(tools=[now])
    if len(answers) == 2:
        assert chained.text == "Noon."
    else:
        assert "tool call cannot be read" in str(chained.error)
        assert str(chained.error).endswith("(3 attempts)")
    first, second, third = (request.body for request in server.requests)
    assert [first == second, second == third] == [answer is refuse for answer in answers[:2]]
    assert len(sleeps) == answers.count(refuse)


def test_broken_call_after_a_good_one(chain: Chain, server: Loopback, record: Any) -> None:
    """The second answer replaces both: no call is made twice."""
    tags = [f'<tool_call>{{"name": "record", "arguments": {{"what": "{what}"}}}}</tool_call>' for what in ("a", "b")]
    server.answers += [texts(tags[0], tags[1].replace("}", "")), texts(*tags)]
    chained = chain(tools=[record])
    assert chained.text == "llama: record said done, record said done"
    assert chained.calls[0] == [("record", {"what": "a"}), ("record", {"what": "b"})]
    assert record.calls == ["a", "b"]
    assert server.requests[2].messages[2]["content"].count("<tool_call>") == 2


def usage(tokens: int | None, **details: int | None) -> dict[str, Any]:
    """Usage, with these details of the tokens of the prompt."""
    given = {"prompt_tokens_details": details} if details else {"completion_tokens_details": None}
    return {"prompt_tokens": 10, "completion_tokens": tokens, **given}


@pytest.mark.parametrize(
    ("first", "second", "total", "details"),
    [
        (usage(5), usage(7), (20, 12), None),
        (None, usage(None), (10, None), None),
        (usage(5, cached_tokens=3, audio_tokens=0), None, (10, 5), {"cached_tokens": 3}),
        (usage(5, cached_tokens=3), usage(7), (20, 12), {"cached_tokens": 3}),
        (usage(5, a=1, b=5, c=None), usage(7, a=2, c=4), (20, 12), {"a": 3, "b": 5, "c": 4}),
    ],
)
def test_usage_is_that_of_both_answers(
    first: Any, second: Any, total: tuple[int, int], details: dict[str, int] | None, ask: Ask, server: Loopback
) -> None:
    """The tokens of an answer that was no good were used too. `llm logs --usage` shows details that are not zero."""
    server.answers += [texts(BROKEN_TAG, usage=first), texts("Noon.", usage=second)]
    answer = ask(tools=[llm.Tool.function(now)])
    assert answer.text == "Noon."
    assert (answer.response.input_tokens, answer.response.output_tokens) == total
    assert answer.response.token_details == ({"prompt_tokens_details": details} if details else None)


# The command line

NOW_FUNCTION = ["--functions", "def now():\n    'The time'\n    return 'noon'\n"]
CALL_NOW = ["-m", "autonomous-llama", "Call now with {}"]


@pytest.mark.parametrize("settings", [[], ["--no-stream"], ["--async"]], ids=["streamed", "whole", "async"])
def test_functions_on_the_command_line(settings: list[str], server: Loopback) -> None:
    """The words around the call and the answer are printed, and the log has both rounds with call and result."""
    server.answers += [texts("Let me see.\n", NOW_TAG)]
    assert run(*CALL_NOW, *NOW_FUNCTION, *settings) == "Let me see.\nllama: now said noon\n"
    first, second = json.loads(run("logs", "--json", "-n", "2"))
    [call] = first["tool_calls"]
    assert (call["name"], call["arguments"]) == ("now", {})
    assert first["response"].strip() == "Let me see."
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
    """After a call, `-c` writes it in tags where there are tools, and in brackets where there are none."""
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


def test_broken_call_on_the_command_line(server: Loopback) -> None:
    """One line on standard error, exit code 1, and nothing in the log that was not answered."""
    server.answer = texts(BROKEN_TAG)
    stdout, stderr, code = invoke(*CALL_NOW, *NOW_FUNCTION)
    assert (stdout.strip(), code) == ("", 1)
    [line] = stderr.splitlines()
    assert line.startswith(f"Error: 127.0.0.1:{server.port}: the model's tool call cannot be read")
    assert json.loads(run("logs", "--json")) == []


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
    interrupt(process)
    stdout, stderr, code = finish(process)
    assert "noon" not in stdout
    assert (stderr.strip(), code) == ("Aborted!", 1)
    assert until(lambda: not server.open)
    assert len(server.requests) == 1
