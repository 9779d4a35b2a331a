"""Schemas, end to end against the loopback server: the JSON asked for goes out alone, or one line says why not."""

from __future__ import annotations

import json
import re
import sys
from typing import Any, Literal

import llm
import pytest
from conftest import CLEO, DOG, NOW_TAG, Ask, Chain, Start, ask_sync, cut, finish, invoke, now, refuse, run, texts
from loopback import ENDPOINTS, Loopback, speak
from pydantic import BaseModel

from llm_autonomous import AFTER_RESULTS, EMPTY_CORRECTION, RESULT, schema_instructions

REX = '{"name": "Rex, the larger one", "age": 1}'
IDS = {"type": "object", "properties": {"ids": {"type": "array"}}, "required": ["ids"]}
OPTIONAL = {"type": "object", "properties": DOG["properties"]}  # which any object matches
DOGS = {"type": "object", "properties": {"items": {"type": "array", "items": DOG}}, "required": ["items"]}
NODE = {"name": {"type": "string"}, "nodes": {"type": "array", "items": {"$ref": "#/$defs/Node"}}}
TREE = {"$ref": "#/$defs/Node", "$defs": {"Node": {"type": "object", "properties": NODE, "required": [*NODE]}}}
LEAF = {"name": "leaf", "nodes": []}


def strict(text: str) -> Any:
    """The JSON value that a text is, by the specification alone."""
    return json.loads(text, parse_constant=int)  # which refuses NaN


def schema_in(message: dict[str, Any]) -> Any:
    """The schema that a message asks to follow."""
    [written] = re.findall(r"follows this JSON schema:\n(.*)$", message["content"], re.MULTILINE)
    return strict(written)


# What is sent


@pytest.mark.parametrize("settings", [{}, {"system": "Be brief"}], ids=["alone", "system prompt"])
def test_schema_stands_after_the_system_prompt(settings: dict[str, str], ask: Ask, server: Loopback) -> None:
    """One system message: the user's words, and then the schema as JSON."""
    assert strict(ask("Cleo is 4", schema=DOG, **settings).text) == {"name": "Cleo is 4", "age": 4}
    first, second = server.last.messages
    assert (first["role"], second) == ("system", {"role": "user", "content": "Cleo is 4"})
    assert first["content"].startswith("Be brief\n\n") == bool(settings)
    assert schema_in(first) == DOG
    assert first["content"].endswith(schema_instructions(DOG))
    assert "tool" not in first["content"]


def test_schema_is_for_its_prompt_alone(server: Loopback) -> None:
    """The next prompt of the conversation is not asked for JSON."""
    conversation = llm.get_model("autonomous-llama").conversation()
    conversation.prompt("Cleo is 4", schema=DOG).text()
    assert conversation.prompt("And?").text().startswith("llama heard: And?")
    assert [message["role"] for message in server.last.messages] == ["user", "assistant", "user"]


# What comes back

WRITTEN = {  # what the model writes for DOG, of which CLEO is the answer
    "bare": CLEO,
    "white space": f"\n\n  {CLEO} \n",
    "indented": json.dumps(strict(CLEO), indent=2),
    "a fence": f"```json\n{CLEO}\n```",
    "a fence without a language": f"```\n{CLEO}\n```\n",
    "a fence that does not end": f"```javascript\n{CLEO}",
    "a fence among words": f"Here it is:\n\n```json\n{CLEO}\n```\n\nAnything else?",
    "words before": f"Here it is: {CLEO}",
    "words after": f"{CLEO}\n\nAnything else?",
    "braces in the words": f"The {{name}} and [age] of {{ }} are: {CLEO} (see {{4}} or [x]).",
    "a form in the words": f'In the format {{"name": string, "age": number}}: {CLEO}',
    "braces and a quote in the words": f'Use {{"name"}} so: {CLEO}',
    "other JSON in the words": f'For {{"breed": "any"}} it is {CLEO}, and not [1, 2].',
    "a match after a wrong one": f'Not {{"name": "Cleo", "age": "not known to anybody"}} but {CLEO}',
    "after a list that is broken": f"[{REX}, and more] {CLEO}",
    "the last of several that match": f"It is {REX}. No, wait, {REX} is wrong: {CLEO}",
    "the last that matches": f'{REX} or {CLEO}, but not {{"name": "Bo"}} or [4]',
    "reasoning before it": f"Well. <think>Is it {REX}?</think> {CLEO}",
    "reasoning after it": f"So: {CLEO}\n<scratch_pad>Or {REX}?</scratch_pad>",
    "reasoning after it without an end": f"So: {CLEO}\n<think>Or {REX}",
}
ACCEPTED: dict[str, tuple[dict[str, Any], str, Any]] = {
    **{name: (DOG, text, strict(CLEO)) for name, text in WRITTEN.items()},
    "the tag of reasoning": (DOG, 'So: {"name": "<think>C</think>", "age": 4}', {"name": "<think>C</think>", "age": 4}),
    "raw line breaks": (DOG, '{"name": "Cleo\n\tthe dog", "age": 4}', {"name": "Cleo\n\tthe dog", "age": 4}),
    "braces in a string": (DOG, 'So: {"name": "}{ \\" [", "age": 4}.', {"name": '}{ " [', "age": 4}),
    "no ASCII": (DOG, '{"name": "Клео 𝄞\u2028", "age": 4}', {"name": "Клео 𝄞\u2028", "age": 4}),
    "more than was asked for": (DOG, '{"name": "Cleo", "age": 4, "x": [{}]}', {"name": "Cleo", "age": 4, "x": [{}]}),
    "list instead of the object around it": (DOGS, f"[{CLEO}, {REX}]", {"items": [strict(CLEO), strict(REX)]}),
    "such a list among words": (DOGS, f"I found one dog: [{CLEO}].", {"items": [strict(CLEO)]}),
    "such a list on lines of its own": (IDS, "Here:\n```\n[4,\n5]\n```\nDone.", {"ids": [4, 5]}),
    "such a list in Markdown": (IDS, "- **Answer:** `[4, 5]`", {"ids": [4, 5]}),
    "such a list that is empty": (DOGS, "[]", {"items": []}),
    "a comma too many": (IDS, '{"ids": [4, 5,],}\n\nSource: [1]', {"ids": [4, 5]}),
    "a comma too many, and commas in strings": (DOG, '{"name": "a,}b,]", "age": 4 , }', {"name": "a,}b,]", "age": 4}),
    "our example after it": (DOG, f'{CLEO} Format: {{"name": "...", "age": 0}}', strict(CLEO)),
    "an object with other keys after it": (OPTIONAL, f'{CLEO} {{"confidence": 0.9}}', strict(CLEO)),
    "an empty object after it": (OPTIONAL, f"{CLEO} I used {{}} as the default.", strict(CLEO)),
    "an empty object alone": (OPTIONAL, "{}", {}),
    "the schema after it": (OPTIONAL, f"{CLEO}\n{json.dumps(OPTIONAL)}", strict(CLEO)),
    "another list after the object": (DOGS, f'{{"items": [{CLEO}]}}, not [{REX}] [1].', {"items": [strict(CLEO)]}),
    "nested": (TREE, json.dumps({"name": "root", "nodes": [LEAF]}), {"name": "root", "nodes": [LEAF]}),
    "list where an object may be as well": ({"required": ["items"]}, "[1]", [1]),
    "list": ({"type": "array", "items": DOG}, f"[{CLEO}, {CLEO}]", [strict(CLEO)] * 2),
    "list in a fence": ({"type": "array"}, "```json\n[1,\n2]\n```", [1, 2]),
    "list among words": ({"type": "array"}, "These: [1, [2]] are they.", [1, [2]]),
    "integer": ({"type": "integer"}, "```json\n42\n```\n", 42),
    "number": ({"type": "number"}, "-1.5e3", -1500.0),
    "string": ({"type": "string"}, '"forty-two {"', "forty-two {"),
    "boolean": ({"type": "boolean"}, " true\n", True),
    "null": ({"type": "null"}, "null", None),
    "enum": ({"enum": ["red", "green"]}, '"green"', "green"),
    "call's keys": ({"type": "object"}, '{"name": "now", "arguments": {}}', {"name": "now", "arguments": {}}),
}


@pytest.mark.parametrize(("schema", "text", "value"), ACCEPTED.values(), ids=ACCEPTED)
def test_json_goes_out_alone(schema: dict[str, Any], text: str, value: Any, ask: Ask, server: Loopback) -> None:
    """The value that matches, and nothing else of the answer, once it is whole."""
    server.answers += [texts(*text)]
    answer = ask(schema=schema)
    assert strict(answer.text) == value
    assert len(answer.chunks) == 1
    assert answer.text == answer.text.strip()
    assert len(server.requests) == 1


@pytest.mark.parametrize(("text", "warned"), [(f"{REX}\n{CLEO}", True), (f"{REX} {{}} {CLEO}", True), (CLEO, False)])
def test_other_values_that_match_are_not_left_out_in_silence(
    text: str, warned: bool, ask: Ask, server: Loopback, caplog: pytest.LogCaptureFixture
) -> None:
    """Whoever asks for one value and gets several is warned that only one of them is kept."""
    server.answer = texts(text)
    assert ask(schema=DOG).text == CLEO
    assert ["several values" in message for message in caplog.messages] == [True] * warned


def test_reference_to_nowhere_that_the_answer_does_not_need_spoils_nothing(ask: Ask, server: Loopback) -> None:
    """The last value matches without it, though another value of the answer cannot be checked."""
    server.answer = texts('{"a": 1} {"b": 2}')
    assert ask(schema={"properties": {"a": {"$ref": "#/nowhere"}, "b": {}}}).text == '{"b": 2}'


WRONG_AGE = '{"name": "Cleo", "age": "four"}'
AGE = 'at $.age, the schema has {"type": "integer"}'
LONG = json.dumps([{"name": "Cleo " * 50, "age": None}] * 4)
COPIED = "it repeats the schema, without values"
NONE = "it holds no valid JSON"
REJECTED = {  # a schema, what the model writes, and the problem
    "the schema itself, which matches": (OPTIONAL, json.dumps({**OPTIONAL, "title": "Dog"}), COPIED),
    "our own example": (DOG, '{"name": "...", "age": 0}', COPIED),
    **{
        f"a list in the words {words}": (IDS, words, 'at $, the schema has {"type": "object"}')
        for words in ('I cannot read data["name"].', "- [ ] search again", "According to [1], there are none.")
    },
    "missing key": (DOG, '{"name": "Cleo"}', 'at $, the schema has {"required": ["name", "age"]}'),
    "missing key around a list": (DOGS, f'{{"dogs": [{CLEO}]}}', 'at $, the schema has {"required": ["items"]}'),
    "wrong type": (DOG, WRONG_AGE, AGE),
    "wrong type in a list": ({"items": DOG}, f"[{CLEO}, {WRONG_AGE}]", AGE.replace("$", "$[1]")),
    "wrong type in a list that is wrapped": (DOGS, f"[{CLEO}, {WRONG_AGE}]", AGE.replace("$", "$.items[1]")),
    "null": (DOG, "null", 'at $, the schema has {"type": "object"}'),
    "a list of it": (DOG, f"[{CLEO}]", 'at $, the schema has {"type": "object"}'),
    "a long answer": (DOG, LONG, 'at $, the schema has {"type": "object"}'),
    "a long answer that is too short": ({"minItems": 9}, LONG, 'at $, the schema has {"minItems": 9}'),
    "the last of several": (DOG, f'{WRONG_AGE}. No: {{"name": 1, "age": 4}}.', 'at $.name, the schema has {"type": '),
    "copied schema": (DOG, json.dumps(DOG), COPIED),
    "copied schema with values": (DOG, '{"type": "object", "properties": {"name": "Cleo", "age": 4}}', COPIED),
    "copied schema before a wrong value": (DOG, f"{json.dumps(DOG)}\n{WRONG_AGE}", AGE),
    "copied schema after a wrong value": (DOG, f"{WRONG_AGE}\n{json.dumps(DOG)}", AGE),
    "reasoning alone": (DOG, f"Well. <think>Is it {CLEO}?</think> I do not know.", NONE),
    "reasoning in Hermes's tag": (DOG, f"Well. <scratch_pad>{CLEO}</scratch_pad>", NONE),
    "reasoning without an end": (DOG, f"Well. <think>Is it {CLEO}?", NONE),
    "words": (DOG, "I do not know {name} and [age].", NONE),
    "words for a string": ({"type": "string"}, "forty-two", NONE),
    "cut off": (DOG, CLEO[:-1], NONE),
    "cut off in a fence": (DOG, f"```json\n{CLEO[:-1]}\n", NONE),
    "cut off after words": (DOG, f"Here it is: {CLEO[:-1]}", NONE),
    "cut off after a match": (TREE, f'{{"name": "root", "nodes": [{json.dumps(LEAF)}, {{"name": "l', NONE),
    "broken around a match": (TREE, f'{{"name": root, "nodes": [{json.dumps(LEAF)}]}}', NONE),
    "cut off in its first string": ({"type": "array"}, '["see [1, 2] for', NONE),
    "Python's literals": (DOG, "{'name': None, 'age': True}", NONE),
    "not in the enum": ({"enum": [True, None, "red"]}, "[false]", 'the schema has {"enum": [true, null, "red"]}'),
    "not the constant": ({"const": None}, '"null"', 'at $, the schema has {"const": null}'),
    "what must not be there": ({"properties": {"a": False}}, '{"a": null}', "the schema has false"),
    "more than is allowed": ({"additionalProperties": False}, '{"a": 1}', '{"additionalProperties": false}'),
    "NaN": ({"properties": {"a": {"type": "number"}}}, '{"a": NaN}', NONE),
    "infinity": ({"properties": {"a": {"type": "number"}}}, '{"a": -Infinity}', NONE),
    "nested too deep": ({"type": "array"}, "[" * 100_000, NONE),
    "nested too deep and closed": ({"type": "array"}, "[" * 100_000 + "]" * 100_000, NONE),
}


@pytest.mark.parametrize(("schema", "text", "problem"), REJECTED.values(), ids=REJECTED)
def test_model_is_told_once_what_does_not_match(
    schema: dict[str, Any], text: str, problem: str, ask: Ask, server: Loopback, sleeps: list[float]
) -> None:
    """It is shown its answer, the problem and the schema; if it answers the same, the user gets one line."""
    server.answer = texts(text)
    failed = ask(schema=schema)
    first, second = (request.messages for request in server.requests)
    *before, written, told = second
    assert (before, written) == (first, {"role": "assistant", "content": text})
    assert told["role"] == "user"
    reason, instructions, nothing = told["content"].partition(schema_instructions(schema))
    assert (bool(instructions), nothing) == (True, "")
    assert reason.startswith("Your answer does not match the JSON schema: ")
    assert problem in reason
    assert not re.search(r"Cleo|\b(None|True|False)\b|'", reason), "it is JSON, without what the model must not copy"
    assert failed.chunks == []
    assert failed.line.startswith(f"127.0.0.1:{server.port}: the answer does not match the schema: ")
    assert problem in failed.line
    assert f"it begins: {' '.join(text.split())[:100]}" in failed.line
    assert failed.line.endswith("(2 attempts)")
    assert sleeps == []


LARGE = ["[", '{"a": ', '"', "```json\n", " ", "\\", "{", "{x", "[x", "{ "]  # 300 KB of it
MANY = ["[1]", "{}", '{"a": 1} ']  # 50 KB, since each is a value to be checked


@pytest.mark.parametrize(("again", "size"), [*((x, 300_000) for x in LARGE), *((x, 50_000) for x in MANY)])
def test_cost_is_linear(again: str, size: int, server: Loopback, cpu_guard: None) -> None:
    """Much of what looks like JSON, or its beginning, does not take long to look through."""
    server.answer = texts("Say: ", again * (size // len(again)))
    answer = ask_sync(schema={"type": "string"})
    assert "does not match the schema" in answer.line


@pytest.mark.parametrize("again", ["\n", ":", ": ", " "])
def test_cost_of_finding_a_list_that_stands_alone_is_linear(again: str, server: Loopback, cpu_guard: None) -> None:
    """Much of what may stand before such a list does not take long either."""
    server.answer = texts("Not [1] here", again * 100_000)
    assert "does not match the schema" in ask_sync(schema=IDS).line


DRAFT_7 = {"$schema": "http://json-schema.org/draft-07/schema#", "minimum": "1"}


@pytest.mark.parametrize("schema", [{"type": "nonsense"}, {"properties": 3}, {"required": "name"}, DRAFT_7])
def test_schema_that_is_wrong_is_an_error_before_anything_is_sent(
    schema: dict[str, Any], ask: Ask, server: Loopback
) -> None:
    """The line says what is wrong with it."""
    assert ask(schema=schema).line.startswith("the schema is not a valid JSON schema: ")
    assert server.requests == []


def test_reference_to_another_host_is_not_followed(ask: Ask, server: Loopback) -> None:
    """Nothing is fetched for a schema, and the line says what cannot be resolved."""
    with Loopback() as elsewhere:
        url = f"{elsewhere.url}/dog.json"
        server.answer = texts(CLEO)
        assert url in ask(schema={"properties": {"name": {"$ref": url}}}).line
        assert ask(schema={**DOG, "$schema": url}).text == CLEO
        assert elsewhere.connections == 0


@pytest.mark.parametrize("inner", [None, {"enum": 5}, {"anyOf": {"a": 1}}, {"properties": 3}, "x"])
def test_reference_to_no_schema_is_an_error(inner: Any, ask: Ask, server: Loopback) -> None:
    """Only the keywords of a schema are checked before it is sent; the model is not told of what is not its fault."""
    server.answer = texts(CLEO)
    assert ask(schema={"$ref": "#/other", **({"other": inner} if inner else {})}).line
    assert len(server.requests) <= 1


# What goes wrong on the way


@pytest.mark.parametrize(
    "failure", [refuse, cut(), cut(CLEO[:9]), cut("Here it is: ", CLEO)], ids=["503", "none", "half", "all"]
)
def test_failed_reply_is_tried_again(failure: Any, ask: Ask, server: Loopback, sleeps: list[float]) -> None:
    """Of an answer to a schema nothing goes out before its end, so a connection may be lost anywhere in it."""
    server.answers += [failure, texts(CLEO)]
    assert ask(schema=DOG).chunks == [CLEO]
    assert server.requests[0].body == server.requests[1].body
    assert len(sleeps) == 1


def test_answer_larger_than_the_bound(ask: Ask, server: Loopback, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is held is bounded, and the model is not asked again for as much."""
    monkeypatch.setattr("llm_autonomous.MAX_EVENT_BYTES", 2048)
    server.answer = texts(*["x" * 1000] * 9)
    assert "larger than" in ask(schema=DOG).line
    assert len(server.requests) == 1


# Tools and a schema


def test_schema_holds_for_the_answer_after_the_calls(chain: Chain, server: Loopback) -> None:
    """The schema follows the results, as a model that knows it before makes them up; the last JSON goes out alone."""
    server.answers += [texts("Let me see.\n", NOW_TAG, "\nDone."), texts(f"So: {CLEO}")]
    chained = chain("Cleo?", tools=[now], schema=DOG)
    assert chained.chunks == [CLEO]
    assert chained.calls == [[("now", {})], []]
    assert chained.parts(0) == [("now", {})]
    first, second = server.requests
    assert first.messages[0] == second.messages[0]
    assert "<tools>" in first.messages[0]["content"]
    assert "schema" not in json.dumps(first.messages)
    result = RESULT.format(name="now", output="noon")
    assert second.messages[-1]["content"] == f"{result}\n{AFTER_RESULTS} {schema_instructions(DOG)}"
    assert "Let me see" not in json.dumps(second.messages)
    assert [response.prompt.schema for response in chained.responses] == [DOG, DOG]


@pytest.mark.parametrize("name", ENDPOINTS)
def test_tools_and_schema_with_each_model(name: str, chain: Chain, server: Loopback) -> None:
    """A model that does as it is told calls, and then fills the schema with the result."""
    chained = chain("Call now with {}", f"autonomous-{name}", tools=[now], schema=DOG, stream=name != "summary")
    assert strict(chained.text) == {"name": "now said noon", "age": 1}


def test_answer_without_a_call_is_corrected_by_the_schema(chain: Chain, server: Loopback) -> None:
    """A model that calls no tool has not seen the schema before."""
    chained = chain("Cleo is 4", tools=[now], schema=DOG)
    assert strict(chained.text) == {"name": "Cleo is 4", "age": 4}
    first, second = server.requests
    assert "schema" not in json.dumps(first.messages)
    assert schema_in(second.messages[-1]) == DOG


def test_empty_reply_after_results_still_has_its_schema(chain: Chain, server: Loopback) -> None:
    """The question that follows it leaves the schema in its place, after the results."""
    server.answers += [speak(), texts(""), texts(CLEO)]
    assert chain("Call now with {}", tools=[now], schema=DOG).chunks == [CLEO]
    *_, results, question = server.last.messages
    assert (schema_in(results), question["content"]) == (DOG, EMPTY_CORRECTION)


def test_wrong_json_after_a_call_is_told(chain: Chain, server: Loopback) -> None:
    """The schema is checked in the last round, and its correction follows the result."""
    server.answers += [speak(), texts('{"name": "Cleo"}'), texts(CLEO)]
    chained = chain("Call now with {}", tools=[now], schema=DOG)
    assert chained.chunks == [CLEO]
    assert 'at $, the schema has {"required": ["name", "age"]}' in server.last.messages[-1]["content"]
    assert [message["role"] for message in server.last.messages] == ["system", *["user", "assistant"] * 2, "user"]


def test_broken_call_beside_json_gives_one_value(chain: Chain, server: Loopback) -> None:
    """JSON of an answer whose call is broken does not go out: the second answer is all."""
    server.answers += [texts('{"name": "Rex", "age": 1}\n', '<tool_call>{"name": "now", "arg'), texts(CLEO)]
    assert chain(tools=[now], schema=DOG).chunks == [CLEO]


# The command line, and Python's classes


@pytest.mark.parametrize("settings", [[], ["--no-stream"], ["--async"]], ids=["streamed", "whole", "async"])
def test_concise_schema(settings: list[str], server: Loopback) -> None:
    """What `--schema` prints is JSON for a pipe, and the log gives it back by its schema."""
    assert strict(run("-m", "autonomous-llama", "--schema", "name, age int", "Cleo is 4", *settings)) == {
        "name": "Cleo is 4",
        "age": 4,
    }
    assert strict(run("logs", "--schema", "name, age int", "--data")) == {"name": "Cleo is 4", "age": 4}


@pytest.mark.parametrize("written", [f'{{"items": [{CLEO}, {REX}]}}', f"```json\n[{CLEO}, {REX}]\n```"])
def test_schema_of_many(written: str, server: Loopback) -> None:
    """`--schema-multi` asks for an object around a list, which a model may leave out; `llm logs` finds each in it."""
    server.answer = texts(written)
    printed = run("-m", "autonomous-llama", "--schema-multi", "name, age int", "Two dogs")
    assert strict(printed) == {"items": [strict(CLEO), strict(REX)]}
    logged = run("logs", "--schema-multi", "name, age int", "--data", "--data-key", "items")
    assert [strict(line) for line in logged.splitlines()] == [strict(CLEO), strict(REX)]
    assert len(server.requests) == 1


def test_what_is_wrong_is_one_line(server: Loopback) -> None:
    """It goes to standard error, and nothing into a pipe."""
    server.answer = texts("I do not know.")
    stdout, stderr, code = invoke("-m", "autonomous-llama", "--schema", "name, nick", "hi")
    assert (stdout.strip(), code) == ("", 1)
    assert stderr.startswith(f"Error: 127.0.0.1:{server.port}: the answer does not match the schema")
    assert stderr.count("\n") == 1


class Owner(BaseModel):
    name: str


class Dog(BaseModel):
    name: str
    owner: Owner
    tricks: list[str]
    nick: str | None = None
    size: int | Literal["small"] = 3


def test_class_of_pydantic(ask: Ask, server: Loopback) -> None:
    """A class is a schema with definitions and alternatives, and the JSON makes an object of it."""
    dog = Dog.model_validate_json(ask("Cleo", schema=Dog).text)
    assert (dog.owner.name, dog.tricks) == ("Cleo", ["Cleo"])
    sent = schema_in(server.last.messages[0])
    assert sent == Dog.model_json_schema()
    assert "$defs" in sent
    assert "anyOf" in sent["properties"]["nick"]

    wrong = {"name": "Cleo", "owner": {"name": 1}, "tricks": [], "size": "large"}
    server.answers += [texts(json.dumps(wrong)), texts(json.dumps({**wrong, "owner": {"name": "Al"}, "size": "small"}))]
    assert Dog.model_validate_json(ask("Cleo", schema=Dog).text).size == "small"
    assert "$." in server.last.messages[-1]["content"]


# What it costs those who use none


def test_jsonschema_is_imported_for_a_schema_alone(server: Loopback, start: Start) -> None:
    """Its import takes longer than all else of the plugin: only who uses it waits for it."""
    script = """if True:
        import sys
        from llm.cli import cli

        for more in ([], ["--functions", "def now(): return 'noon'"], ["--schema", "name, nick"]):
            cli.main(["-m", "autonomous-llama", "--no-log", "Call now with {}", *more], standalone_mode=False)
            print("jsonschema" in sys.modules)
    """
    stdout, stderr, code = finish(start(sys.executable, "-c", script, url=server.url))
    assert (re.findall("True|False", stdout), stderr, code) == (["False", "False", "True"], "", 0)
