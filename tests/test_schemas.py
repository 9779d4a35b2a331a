"""Schemas, end to end against the loopback server: the JSON asked for goes out alone, or one line says why not."""

from __future__ import annotations

import json
import re
import sys
from typing import Any, Literal

import pytest
from conftest import (
    CLEO,
    DOG,
    NOW_TAG,
    Ask,
    Chain,
    Start,
    ask_sync,
    cut,
    finish,
    get_model,
    invoke,
    now,
    refuse,
    run,
    texts,
)
from loopback import ENDPOINTS, Loopback, speak
from pydantic import BaseModel

from llm_autonomous import AFTER_RESULTS, EMPTY_CORRECTION, RESULT, schema_instructions

REX = '{"name": "Rex, the larger one", "age": 1}'
DOGS = {"type": "object", "properties": {"items": {"type": "array", "items": DOG}}, "required": ["items"]}
TREE = {
    "$ref": "#/$defs/Node",
    "$defs": {
        "Node": {
            "type": "object",
            "properties": {"name": {"type": "string"}, "nodes": {"type": "array", "items": {"$ref": "#/$defs/Node"}}},
            "required": ["name", "nodes"],
        }
    },
}
LEAF = {"name": "leaf", "nodes": []}


def strict(text: str) -> Any:
    """The JSON value that a text is, by the specification alone."""

    def refuse_constant(name: str) -> None:
        raise ValueError(f"{name} is no JSON")

    return json.loads(text, parse_constant=refuse_constant)


def schema_in(message: dict[str, Any]) -> Any:
    """The schema that a message asks to follow."""
    [written] = re.findall(r"follows this JSON schema:\n(.*)$", message["content"], re.MULTILINE)
    return strict(written)


# What is sent


@pytest.mark.parametrize("settings", [{}, {"system": "Be brief"}], ids=["alone", "system prompt"])
def test_schema_stands_behind_the_system_prompt(settings: dict[str, str], ask: Ask, server: Loopback) -> None:
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
    conversation = get_model("autonomous-llama").conversation()
    conversation.prompt("Cleo is 4", schema=DOG).text()
    assert conversation.prompt("And?").text().startswith("llama heard: And?")
    assert [message["role"] for message in server.last.messages] == ["user", "assistant", "user"]


# What comes back

ACCEPTED = {
    "bare": (DOG, CLEO, strict(CLEO)),
    "white space": (DOG, f"\n\n  {CLEO} \n", strict(CLEO)),
    "indented": (DOG, json.dumps(strict(CLEO), indent=2), strict(CLEO)),
    "a fence": (DOG, f"```json\n{CLEO}\n```", strict(CLEO)),
    "a fence without a language": (DOG, f"```\n{CLEO}\n```\n", strict(CLEO)),
    "a fence of another language": (DOG, f"```javascript\n{CLEO}\n```", strict(CLEO)),
    "a fence that does not end": (DOG, f"```json\n{CLEO}", strict(CLEO)),
    "a fence among words": (DOG, f"Here it is:\n\n```json\n{CLEO}\n```\n\nAnything else?", strict(CLEO)),
    "words before": (DOG, f"Here it is: {CLEO}", strict(CLEO)),
    "words behind": (DOG, f"{CLEO}\n\nAnything else?", strict(CLEO)),
    "braces in the words": (DOG, f"The {{name}} and [age] of {{ }} are: {CLEO} (see {{4}} or [x]).", strict(CLEO)),
    "a form in the words": (DOG, f'In the format {{"name": string, "age": number}}: {CLEO}', strict(CLEO)),
    "braces and a quote in the words": (DOG, f'Use {{"name"}} so: {CLEO}', strict(CLEO)),
    "other JSON in the words": (DOG, f'For {{"breed": "any"}} it is {CLEO}, and not [1, 2].', strict(CLEO)),
    "a match behind a wrong one": (
        DOG,
        f'Not {{"name": "Cleo", "age": "not known to anybody"}} but {CLEO}',
        strict(CLEO),
    ),
    "the last of several that match": (DOG, f"It is {REX}. No, wait, {REX} is wrong: {CLEO}", strict(CLEO)),
    "the last that matches": (DOG, f'{REX} or {CLEO}, but not {{"name": "Bo"}} or [4]', strict(CLEO)),
    "reasoning before it": (DOG, f"Well. <think>Is it {REX}?</think> {CLEO}", strict(CLEO)),
    "reasoning after it": (DOG, f"So: {CLEO}\n<scratch_pad>Or {REX}?</scratch_pad>", strict(CLEO)),
    "reasoning after it without an end": (DOG, f"So: {CLEO}\n<think>Or {REX}", strict(CLEO)),
    "the tag of reasoning in a string": (
        DOG,
        'So: {"name": "<think>Cleo</think>", "age": 4}',
        {"name": "<think>Cleo</think>", "age": 4},
    ),
    "list instead of the object around it": (DOGS, f"[{CLEO}, {REX}]", {"items": [strict(CLEO), strict(REX)]}),
    "such a list in a fence": (DOGS, f"```json\n[\n{CLEO}\n]\n```", {"items": [strict(CLEO)]}),
    "such a list among words": (DOGS, f"These: [{CLEO}] are they.", {"items": [strict(CLEO)]}),
    "such a list that is empty": (DOGS, "[]", {"items": []}),
    "raw line breaks": (DOG, '{"name": "Cleo\n\tthe dog", "age": 4}', {"name": "Cleo\n\tthe dog", "age": 4}),
    "braces in a string": (DOG, 'So: {"name": "}{ \\" [", "age": 4}.', {"name": '}{ " [', "age": 4}),
    "no ASCII": (DOG, '{"name": "Клео 𝄞\u2028", "age": 4}', {"name": "Клео 𝄞\u2028", "age": 4}),
    "more than was asked for": (DOG, '{"name": "Cleo", "age": 4, "x": [{}]}', {"name": "Cleo", "age": 4, "x": [{}]}),
    "nested": (TREE, json.dumps({"name": "root", "nodes": [LEAF]}), {"name": "root", "nodes": [LEAF]}),
    "list": ({"type": "array", "items": DOG}, f"[{CLEO}, {CLEO}]", [strict(CLEO)] * 2),
    "list in a fence": ({"type": "array"}, "```json\n[1,\n2]\n```", [1, 2]),
    "list among words": ({"type": "array"}, "These: [1, [2]] are they.", [1, [2]]),
    "empty list": ({"type": "array"}, "[]", []),
    "integer": ({"type": "integer"}, "42", 42),
    "integer in a fence": ({"type": "integer"}, "```json\n42\n```\n", 42),
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


REJECTED = {
    "missing key": (DOG, '{"name": "Cleo"}', 'at $, the schema has {"required": ["name", "age"]}'),
    "wrong type": (DOG, '{"name": "Cleo", "age": "four"}', 'at $.age, the schema has {"type": "integer"}'),
    "wrong type in a list": (
        {"type": "array", "items": DOG},
        f'[{CLEO}, {{"name": "X", "age": null}}]',
        'at $[1].age, the schema has {"type": "integer"}',
    ),
    "null": (DOG, "null", 'at $, the schema has {"type": "object"}'),
    "a list of it": (DOG, f"[{CLEO}]", 'at $, the schema has {"type": "object"}'),
    "wrong type in a list that is wrapped": (
        DOGS,
        f'[{CLEO}, {{"name": "Bo", "age": null}}]',
        'at $.items[1].age, the schema has {"type": "integer"}',
    ),
    "copied schema": (DOG, json.dumps(DOG), "it repeats the schema, without values"),
    "copied schema with values": (
        DOG,
        '```json\n{"type": "object", "properties": {"name": "Cleo", "age": 4}}\n```',
        "it repeats the schema, without values",
    ),
    "copied schema before a wrong value": (
        DOG,
        f'{json.dumps(DOG)}\n{{"name": "Cleo", "age": "four"}}',
        'at $.age, the schema has {"type": "integer"}',
    ),
    "copied schema after a wrong value": (
        DOG,
        f'{{"name": "Cleo", "age": "four"}}\n{json.dumps(DOG)}',
        'at $.age, the schema has {"type": "integer"}',
    ),
    "reasoning alone": (DOG, f"Well. <think>Is it {CLEO}?</think> I do not know.", "no JSON"),
    "reasoning in Hermes's tag": (DOG, f"Well. <scratch_pad>{CLEO}</scratch_pad>", "no JSON"),
    "reasoning without an end": (DOG, f"Well. <think>Is it {CLEO}?", "no JSON"),
    "words": (DOG, "I do not know.", "no JSON"),
    "words with braces": (DOG, "I do not know {name} and [age].", "no JSON"),
    "cut off": (DOG, CLEO[:-1], ""),
    "cut off in a fence": (DOG, f"```json\n{CLEO[:-1]}\n", ""),
    "cut off behind words": (DOG, f"Here it is: {CLEO[:-1]}", ""),
    "cut off behind what would match": (TREE, f'{{"name": "root", "nodes": [{json.dumps(LEAF)}, {{"name": "l', ""),
    "broken around what would match": (TREE, f'{{"name": root, "nodes": [{json.dumps(LEAF)}]}}', ""),
    "cut off in its first string": ({"type": "array"}, '["see [1, 2] for', ""),
    "single quotes": (DOG, "{'name': 'Cleo', 'age': 4}", ""),
    "not in the enum": ({"enum": ["red"]}, '"blue"', 'at $, the schema has {"enum": ["red"]}'),
    "what must not be there": ({"properties": {"a": False}}, '{"a": 1}', "the schema has false"),
    "words for a string": ({"type": "string"}, "forty-two", "no JSON"),
    "NaN": ({"properties": {"a": {"type": "number"}}}, '{"a": NaN}', ""),
    "infinity": ({"properties": {"a": {"type": "number"}}}, '{"a": -Infinity}', ""),
    "nested too deep": ({"type": "array"}, "[" * 100_000, ""),
    "nested too deep and closed": ({"type": "array"}, "[" * 100_000 + "]" * 100_000, ""),
}


@pytest.mark.parametrize(("schema", "text", "problem"), REJECTED.values(), ids=REJECTED)
def test_model_is_told_once_what_does_not_match(
    schema: dict[str, Any], text: str, problem: str, ask: Ask, server: Loopback, sleeps: list[float]
) -> None:
    """It is shown its answer, the problem and the schema, and answers again; then it is one line to the user."""
    good = {json.dumps(DOG): CLEO, json.dumps(TREE): json.dumps(LEAF)}.get(json.dumps(schema))
    server.answers += [texts(text), texts(good or text)]
    answer = ask(schema=schema)
    first, second = (request.messages for request in server.requests)
    assert second[: len(first)] == first
    written, told = second[len(first) :]
    assert written == {"role": "assistant", "content": text}
    assert told["role"] == "user"
    assert problem in told["content"]
    assert told["content"].endswith(schema_instructions(schema))
    if good:
        assert answer.chunks == [good]

    server.answers += [texts(text), texts(text)]
    failed = ask(schema=schema)
    assert failed.chunks == []
    assert problem in failed.line
    begins = " ".join(text.split())[:100]
    assert f"it begins: {begins}" in failed.line
    assert failed.line.startswith(f"127.0.0.1:{server.port}: the answer does not match the schema")
    assert failed.line.endswith("(2 attempts)")
    assert len(server.requests) == 4
    assert sleeps == []


@pytest.mark.parametrize(
    ("schema", "reason"),
    [
        (DOG, 'at $, the schema has {"type": "object"}'),
        ({"type": "array", "minItems": 9}, 'at $, the schema has {"minItems": 9}'),
        ({"const": 1}, 'at $, the schema has {"const": 1}'),
    ],
)
def test_reason_is_told_of_a_long_answer(schema: dict[str, Any], reason: str, ask: Ask, server: Loopback) -> None:
    """The correction says what the schema asks for, and does not repeat the answer, however long it is."""
    server.answer = texts(json.dumps([{"name": "Cleo " * 50}] * 4))
    assert reason in ask(schema=schema).line
    assert reason in server.last.messages[-1]["content"]
    assert len(server.last.messages[-1]["content"]) < 1000
    assert "Cleo" not in server.last.messages[-1]["content"]


def test_model_is_told_the_problem_of_the_last_candidate(ask: Ask, server: Loopback) -> None:
    """A model corrects itself, so the last JSON in an answer is most likely the one that was meant."""
    server.answer = texts('It is {"name": "Cleo, the dog", "age": null, "nick": "Cle"}. No: {"name": 1, "age": 4}.')
    line = ask(schema=DOG).line
    for words in (server.last.messages[-1]["content"], line):
        assert 'at $.name, the schema has {"type": "string"}' in words
        assert words.count("$") == 1


@pytest.mark.parametrize(
    ("schema", "text"),
    [
        (DOG, '{"name": null, "age": true}'),
        (DOG, '{"name": "Cleo"}'),
        (DOG, "[false, null]"),
        (DOG, "{'name': None, 'age': True}"),
        (DOGS, "[null, false]"),
        ({"const": None}, '"null"'),
        ({"enum": [True, None, "red"]}, "[false]"),
        ({"properties": {"a": False}}, '{"a": null}'),
        ({"additionalProperties": False}, '{"a": true}'),
    ],
)
def test_correction_is_written_in_json_alone(schema: dict[str, Any], text: str, ask: Ask, server: Loopback) -> None:
    """It shows no value as Python writes it, which a model would copy."""
    server.answer = texts(text)
    assert "does not match the schema" in ask(schema=schema).line
    correction = server.last.messages[-1]["content"]
    assert correction.startswith("Your answer does not match the JSON schema: ")
    assert not re.search(r"\b(None|True|False)\b|'", correction)


LARGE = ["[", '{"a": ', '"', "```json\n", " ", "\\", "{", "{x", "[x", "{ "]  # 600 KB of it
MANY = ["[1]", "{}", '{"a": 1} ']  # 100 KB, since each is a value to be checked


@pytest.mark.parametrize(
    ("again", "size"), [*((again, 600_000) for again in LARGE), *((again, 100_000) for again in MANY)]
)
def test_cost_is_linear(again: str, size: int, server: Loopback, cpu_guard: None) -> None:
    """Much of what looks like JSON, or its beginning, does not take long to look through."""
    server.answer = texts("Say: ", again * (size // len(again)))
    answer = ask_sync(schema={"type": "string"})
    assert "does not match the schema" in answer.line


def test_second_answer_is_what_is_kept(ask: Ask, server: Loopback) -> None:
    """The response is the JSON, its tokens are those of both answers."""
    usage = {"prompt_tokens": 10, "completion_tokens": 5}
    server.answers += [texts("I do not know.", usage=usage), texts(f"Well: {CLEO}", usage=usage)]
    answer = ask(schema=DOG)
    assert answer.text == CLEO
    assert (answer.response.input_tokens, answer.response.output_tokens) == (20, 10)


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "nonsense"},
        {"properties": 3},
        {"type": "object", "required": "name"},
        {"$schema": "http://json-schema.org/draft-07/schema#", "minimum": "1"},
    ],
)
def test_schema_that_is_wrong_is_an_error_before_anything_is_sent(
    schema: dict[str, Any], ask: Ask, server: Loopback
) -> None:
    """The line says what is wrong with it."""
    assert ask(schema=schema).line.startswith("the schema is no JSON schema: ")
    assert server.requests == []


def test_reference_to_another_host_is_not_followed(ask: Ask, server: Loopback) -> None:
    """Nothing is fetched for a schema, and the line says what cannot be resolved."""
    with Loopback() as elsewhere:
        url = f"{elsewhere.url}/dog.json"
        server.answer = texts(CLEO)
        assert url in ask(schema={"properties": {"name": {"$ref": url}}}).line
        assert ask(schema={**DOG, "$schema": url}).text == CLEO
        assert elsewhere.connections == 0


def test_reference_to_nowhere_is_an_error(ask: Ask, server: Loopback) -> None:
    """A schema that cannot be applied is not the model's fault: it is told nothing."""
    server.answer = texts(CLEO)
    assert "/$defs/Dog" in ask(schema={"$ref": "#/$defs/Dog"}).line
    assert len(server.requests) <= 1


@pytest.mark.parametrize("inner", [{"enum": 5}, {"anyOf": {"a": 1}}, {"type": []}, {"properties": 3}, {"$ref": 4}, "x"])
def test_reference_to_what_is_no_schema_is_an_error(inner: Any, ask: Ask, server: Loopback) -> None:
    """Only the keywords of a schema are checked before it is sent, so a reference may lead to anything."""
    server.answer = texts(CLEO)
    assert ask(schema={"$ref": "#/other", "other": inner}).line


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


def test_schema_holds_for_the_answer_behind_the_calls(chain: Chain, server: Loopback) -> None:
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


def test_wrong_json_behind_a_call_is_told(chain: Chain, server: Loopback) -> None:
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


def test_schema_of_many(server: Loopback) -> None:
    """`--schema-multi` asks for a list of them, which `llm logs` takes apart."""
    printed = run("-m", "autonomous-llama", "--schema-multi", "name, age int", "Cleo is 4")
    assert strict(printed) == {"items": [{"name": "Cleo is 4", "age": 4}]}
    logged = run("logs", "--schema-multi", "name, age int", "--data", "--data-key", "items")
    assert strict(logged) == {"name": "Cleo is 4", "age": 4}


def test_list_alone_for_a_schema_of_many(server: Loopback) -> None:
    """A model that leaves out the object around the list is understood, and `llm logs` finds each."""
    server.answer = texts(f"```json\n[{CLEO}, {REX}]\n```")
    printed = run("-m", "autonomous-llama", "--schema-multi", "name, age int", "Two dogs")
    assert strict(printed) == {"items": [strict(CLEO), strict(REX)]}
    logged = run("logs", "--schema-multi", "name, age int", "--data", "--data-key", "items")
    assert [strict(line) for line in logged.splitlines()] == [strict(CLEO), strict(REX)]
    assert len(server.requests) == 1


def test_schema_of_a_template(server: Loopback) -> None:
    """A template keeps its schema."""
    run("-m", "autonomous-llama", "--schema", "name, age int", "--system", "Be brief", "--save", "dog")
    assert strict(run("-t", "dog", "Cleo is 4")) == {"name": "Cleo is 4", "age": 4}
    assert server.last.messages[0]["content"].startswith("Be brief\n\n")


def test_schema_and_functions_on_the_command_line(server: Loopback) -> None:
    """The chain ends in the JSON, and the log finds it."""
    said = {"name": "now said noon", "nick": "now said noon"}
    command = ["-m", "autonomous-llama", "--functions", "def now(): return 'noon'", "--schema", "name, nick"]
    assert strict(run(*command, "Call now with {}")) == said
    assert strict(run("logs", "--schema", "name, nick", "--data").splitlines()[-1]) == said


def test_wrong_answer_on_the_command_line(server: Loopback) -> None:
    """One line on standard error, and nothing for the pipe."""
    server.answer = texts("I do not know.")
    stdout, stderr, code = invoke("-m", "autonomous-llama", "--schema", "name, nick", "hi")
    assert (stdout.strip(), code) == ("", 1)
    assert stderr.startswith(f"Error: 127.0.0.1:{server.port}: the answer does not match the schema")
    assert stderr.count("\n") == 1


def test_wrong_schema_on_the_command_line(server: Loopback) -> None:
    """One line that says what is wrong with it, and no request."""
    stdout, stderr, code = invoke("-m", "autonomous-llama", "--schema", '{"type": "nonsense"}', "hi")
    assert (stdout.strip(), code) == ("", 1)
    assert stderr.startswith("Error: the schema is no JSON schema: 'nonsense'")
    assert server.requests == []


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

SCRIPT = """
import contextlib, io, sys
from llm.cli import cli

def loaded(*arguments):
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        cli.main(arguments, standalone_mode=False)
    assert printed.getvalue()
    return "jsonschema" in sys.modules

ask = ["-m", "autonomous-llama", "--no-log", "Call now with {}"]
print(
    loaded("--help"),
    loaded("models"),
    loaded(*ask),
    loaded(*ask, "--functions", "def now(): return 'noon'"),
    loaded(*ask, "--schema", "name, nick"),
)
"""


def test_jsonschema_is_imported_for_a_schema_alone(server: Loopback, start: Start) -> None:
    """Its import takes longer than all else of the plugin: only who uses it waits for it."""

    stdout, stderr, code = finish(start(sys.executable, "-c", SCRIPT, url=server.url))
    assert (stdout.split(), stderr, code) == (["False"] * 4 + ["True"], "", 0)
