"""The machine that reads tool calls out of an answer: what models write, in every cutting, and what it may cost.

The shapes are those of the issue, and of what vLLM's parsers for the same families (hermes, llama3_json, qwen2_5_coder)
are tested with. More examples for the properties: LLM_AUTONOMOUS_EXAMPLES=10000 (chosen anew at each run).
"""

from __future__ import annotations

import json
import os
import re
import sys
import tracemalloc
from collections.abc import Iterable, Iterator
from types import FrameType
from typing import Any, NamedTuple

import llm
import pytest
from conftest import new_attempt
from hypothesis import given, settings
from hypothesis import strategies as st
from loopback import delta

import llm_autonomous
from llm_autonomous import MAX_HELD, AutonomousError, ToolCallParser

MORE_EXAMPLES = os.environ.get("LLM_AUTONOMOUS_EXAMPLES")
examples = settings(max_examples=int(MORE_EXAMPLES or 150), derandomize=not MORE_EXAMPLES, deadline=None, database=None)

KIB, MIB = 1024, 1024 * 1024
NAMES = ("add", "now")
NOW = ("now", {})
ADD = ("add", {"a": 1})
ADD_JSON = '{"name": "add", "arguments": {"a": 1}}'
NOW_JSON = '{"name": "now", "arguments": {}}'
BOTH_JSON = f"[{ADD_JSON}, {NOW_JSON}]"
ADD_TAG = f"<tool_call>\n{ADD_JSON}\n</tool_call>"
NOW_TAG = '<tool_call>{"name": "now"}</tool_call>'
INDENTED = "\n".join(json.dumps(json.loads(call), indent=2) for call in (ADD_JSON, NOW_JSON))
SCHEMA = '{"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}'
TOOL = f'{{"name": "add", "description": "Adds", "parameters": {SCHEMA}}}'
OPENAI_TOOL = f'{{"type": "function", "function": {TOOL}}}'
UNDESCRIBED_TOOL = f'{{"name": "add", "parameters": {SCHEMA}}}'
TOOL_WITHOUT_ARGUMENTS = '{"name": "now", "parameters": {"properties": {}, "type": "object"}}'

Told = list[Any]  # texts, and (name, arguments) for calls


class Outcome(NamedTuple):
    told: Told  # texts that follow each other being one
    error: AutonomousError | None
    finished: bool

    @property
    def everything(self) -> tuple[Told, str, bool]:
        return self.told, str(self.error), self.finished


def read(*pieces: str) -> Outcome:
    """What an answer that comes in these pieces is read as."""
    parser = ToolCallParser(set(NAMES))
    out = [part for piece in pieces for part in parser.feed([piece])] + parser.feed([], end=True)
    return Outcome(joined(out), parser.error, parser.finished)


def joined(out: Iterable[str | llm.ToolCall]) -> Told:
    told: Told = []
    for part in out:
        if not isinstance(part, str):
            told.append((part.name, part.arguments))
        elif told and isinstance(told[-1], str):
            told[-1] += part
        elif part:
            told.append(part)
    return told


def without_space(told: Told) -> Told:
    """The same without white space next to a call, which may be dropped."""
    trimmed = []
    for before, part, behind in zip([None, *told], told, [*told[1:], None], strict=False):
        if isinstance(part, str):
            part = part.lstrip() if isinstance(before, tuple) else part
            part = part.rstrip() if isinstance(behind, tuple) else part
        trimmed.append(part)
    return [part for part in trimmed if part]


def cuttings(text: str) -> Iterator[list[str]]:
    """One character at a time, and cut at every place."""
    yield list(text)
    for place in range(len(text) + 1):
        yield [text[:place], text[place:]]


def in_pieces(text: str, size: int) -> list[str]:
    return [text[start : start + size] for start in range(0, len(text), size)]


# What models write

CALLS = {
    # Hermes
    "in lines": (ADD_TAG, [ADD]),
    "in one line": (f"<tool_call>{ADD_JSON}</tool_call>", [ADD]),
    "without spaces": ('<tool_call>{"name":"add","arguments":{"a":1}}</tool_call>', [ADD]),
    "arguments first": ('<tool_call>{"arguments": {"a": 1}, "name": "add"}</tool_call>', [ADD]),
    "indented": (f"<tool_call>\n{json.dumps(json.loads(ADD_JSON), indent=2)}\n</tool_call>\n", [ADD]),
    "much white space": (f"<tool_call> \n\t\r\n  {ADD_JSON} \n\n </tool_call>  \n", [ADD]),
    "two tags": (f"{ADD_TAG}\n{NOW_TAG}", [ADD, NOW]),
    "two tags with nothing between": (f"{ADD_TAG}{NOW_TAG}", [ADD, NOW]),
    "the same twice": (ADD_TAG * 2, [ADD, ADD]),
    "two in one tag": (f'<tool_call>\n{ADD_JSON}\n{{"name": "now"}}\n</tool_call>', [ADD, NOW]),
    "two in one tag with a semicolon": (f'<tool_call>{ADD_JSON}; {{"name": "now"}}</tool_call>', [ADD, NOW]),
    "two in one tag with a comma": (f'<tool_call>{ADD_JSON}, {{"name": "now"}}</tool_call>', [ADD, NOW]),
    "a list": (f'<tool_call>[{ADD_JSON}, {{"name": "now"}}]</tool_call>', [ADD, NOW]),
    "a list of one": (f"<tool_call>[{ADD_JSON}]</tool_call>", [ADD]),
    "no closing tag at the end": (f"<tool_call>\n{ADD_JSON}", [ADD]),
    "no closing tag, but a line break": (f"<tool_call>\n{ADD_JSON}\n", [ADD]),
    "half a closing tag": (f"<tool_call>{NOW_TAG[11:26]}</tool_call>", [NOW]),
    "no closing tag before the next": (f"<tool_call>{ADD_JSON}\n{NOW_TAG}", [ADD, NOW]),
    "no closing tag at all": (f'<tool_call>{ADD_JSON}<tool_call>{{"name": "now"}}', [ADD, NOW]),
    "text before": (f"Let me add.\n{ADD_TAG}", ["Let me add.", ADD]),
    "text behind": (f"{ADD_TAG}\nThat is it.", [ADD, "That is it."]),
    "text before, between and behind": (f"One: {ADD_TAG} two: {NOW_TAG} three.", ["One:", ADD, "two:", NOW, "three."]),
    "behind a smaller-than": (f"a <{ADD_TAG}", ["a <", ADD]),
    "behind half a tag": (f"<tool_{ADD_TAG}", ["<tool_", ADD]),
    "behind a tag that is text": (f"The tag <tool_call> is: {ADD_TAG}", ["The tag <tool_call> is:", ADD]),
    "behind a tag that is doubled": (f"<tool_call>\n{NOW_TAG}", [NOW]),
    "smaller-than behind": (f"{NOW_TAG} < b", [NOW, "< b"]),
    "tag in prose behind": (f"{NOW_TAG} with <tool_call>.", [NOW, "with <tool_call>."]),
    "half a tag behind": (f"{NOW_TAG} <tool_", [NOW, "<tool_"]),
    "in a fence of XML": (f"```xml\n{ADD_TAG}\n```", [ADD]),
    "behind JSON of a call's keys": (f'{{"id": 7}} then {NOW_TAG}', ['{"id": 7} then', NOW]),
    "behind a call in bare JSON": (f"{ADD_JSON}\n{NOW_TAG}", [ADD, NOW]),
    "behind the tools": (f"<tools>\n{TOOL}\n</tools>\n{ADD_TAG}", [f"<tools>\n{TOOL}\n</tools>", ADD]),
    "behind an answer in JSON": (f'{{"sum": 3}}\n{NOW_TAG}', ['{"sum": 3}', NOW]),
    # Qwen Coder
    "tools": (f"<tools>\n{ADD_JSON}\n</tools>", [ADD]),
    "tools in one line": (f"<tools>{ADD_JSON}</tools>", [ADD]),
    "two tools": (f'<tools>{ADD_JSON}</tools><tools>{{"name": "now", "arguments": {{}}}}</tools>', [ADD, NOW]),
    "tools among words": (f"Let me add.\n\n<tools>{ADD_JSON}</tools>\n\nDone!", ["Let me add.", ADD, "Done!"]),
    "tools without an end": (f"<tools>{ADD_JSON}", [ADD]),
    "tools that end as a call": (f"<tools>{ADD_JSON}</tool_call>", [ADD]),
    "a call that ends as tools": (f"<tool_call>{ADD_JSON}</tools>", [ADD]),
    "a fence": (f"```json\n{ADD_JSON}\n```", [ADD]),
    "a fence and a line break": (f"```json\n{ADD_JSON}\n```\n", [ADD]),
    "a fence without a language": (f"```\n{ADD_JSON}\n```", [ADD]),
    "a fence without an end": (f"```json\n{ADD_JSON}", [ADD]),
    "a fence of a list": (f'```json\n[{ADD_JSON}, {{"name": "now"}}]\n```', [ADD, NOW]),
    "a fence of two": (f'```json\n{ADD_JSON}\n{{"name": "now"}}\n```', [ADD, NOW]),
    # Llama
    "bare": (ADD_JSON, [ADD]),
    "bare with parameters": ('{"name": "add", "parameters": {"a": 1}}', [ADD]),
    "bare with white space": (f"\n\n {ADD_JSON}\n ", [ADD]),
    "bare with a type": ('{"type": "function", "name": "add", "parameters": {"a": 1}}', [ADD]),
    "bare with function as the name": ('{"type": "function", "function": "add", "parameters": {"a": 1}}', [ADD]),
    "bare of OpenAI's shape": ('{"type": "function", "function": {"name": "add", "arguments": "{\\"a\\": 1}"}}', [ADD]),
    "bare with parameters first": ('{"parameters": {"a": 1}, "name": "add"}', [ADD]),
    "bare with a semicolon": (f'{ADD_JSON}; {{"name": "now", "parameters": {{}}}}', [ADD, NOW]),
    "bare with a semicolon alone": (f'{ADD_JSON};{{"name": "now", "parameters": {{}}}}', [ADD, NOW]),
    "bare with a semicolon between spaces": (f'{ADD_JSON} ; {{"name": "now"}} ; {ADD_JSON}', [ADD, NOW, ADD]),
    "bare with a line break": (f'{ADD_JSON}\n{{"name": "now"}}', [ADD, NOW]),
    "bare list": (f'[{ADD_JSON}, {{"name": "now"}}]', [ADD, NOW]),
    "bare nested": (
        '{"name": "add", "parameters": {"a": {"b": {"c": {"d": [{"e": "deep"}]}}}}}',
        [("add", {"a": {"b": {"c": {"d": [{"e": "deep"}]}}}})],
    ),
    "python tag": (f"<|python_tag|>{ADD_JSON}", [ADD]),
    "python tag and a line break": (f"<|python_tag|>\n{ADD_JSON}\n", [ADD]),
    "python tag and two": (f'<|python_tag|>{ADD_JSON}; {{"name": "now"}}', [ADD, NOW]),
    "python tag and no arguments": ('<|python_tag|>{"name": "now"}', [NOW]),
    "python tag behind words": (f"Let me add.\n<|python_tag|>{ADD_JSON}<|eom_id|>", ["Let me add.", ADD]),
    "python tag between words": (f"Let me <|python_tag|>{ADD_JSON} see", ["Let me", ADD, "see"]),
    "bare and then words": (f"{ADD_JSON}\n\nWould you like more?", [ADD, "Would you like more?"]),
    "bare list and then words": (f"{BOTH_JSON} Done.", [ADD, NOW, "Done."]),
    "a fence and then words": (f"```json\n{ADD_JSON}\n```\nThat adds.", [ADD, "That adds."]),
    "bare and then an unknown name": (
        f'{ADD_JSON}\n{{"name": "subtract", "arguments": {{}}}}',
        [ADD, ("subtract", {})],
    ),
    "bare and then an answer in a fence": (f'{ADD_JSON}\n```\n{{"a": 1}}\n```', [ADD, '```\n{"a": 1}\n```']),
    # Tags and fences of other kinds
    **{
        f"{what} in {tag}": (f"<{tag}>{space}{json}{space}</{tag}>", told)
        for tag in ("tool_calls", "function", "function_call", "function-call", "tool", "TOOLCALL", "call")
        for what, space, json, told in (("one", "\n", ADD_JSON, [ADD]), ("a list", "", BOTH_JSON, [ADD, NOW]))
    },
    "another tag behind words": (f"So:\n<function_call>{ADD_JSON}</function_call> Done", ["So:", ADD, "Done"]),
    "another tag and no arguments": ('<function>{"name": "now"}</function>', [NOW]),
    "a tag in a tag": (f"<tool_calls>\n{ADD_TAG}\n</tool_calls>", [ADD]),
    "a fence in the tag": (f"<tool_call>\n```json\n{ADD_JSON}\n```\n</tool_call>", [ADD]),
    "a fence in the tag, without line breaks": (f"<tool_call>```{ADD_JSON}```</tool_call>", [ADD]),
    "a fence of two in the tag": (f"<tool_call>\n```json\n{INDENTED}\n```\n</tool_call>", [ADD, NOW]),
    "a fence in another tag": (f"<tools>\n```json\n{BOTH_JSON}\n```\n</tools>", [ADD, NOW]),
    **{f"a fence of {name}": (f"```{name}\n{ADD_JSON}\n```", [ADD]) for name in ("JSON", "tool_call", "xml", "python")},
    "a fence in one line": (f"```json {ADD_JSON} ```", [ADD]),
    "two fences": (f"```json\n{ADD_JSON}\n```\n\n```json\n{NOW_JSON}\n```\n", [ADD, NOW]),
    "two fences without a language": (f"```\n{ADD_JSON}\n```\n```\n{NOW_JSON}\n```", [ADD, NOW]),
    "a fence of two that are indented": (f"```json\n{INDENTED}\n```", [ADD, NOW]),
    # Ends
    **{
        f"{place} and {end!r}": (f"{start}{end}", [ADD])
        for place, start in (("bare", ADD_JSON), ("in a tag", f"<tool_call>\n{ADD_JSON}"))
        for end in (
            *("</tool_calls>", "</tool_call", "</tool", "</", "\n</tool_call>\n", "</tool_call></tool_call>", "</s>"),
            *("<|eom_id|>", "<|im_end|>", "<|eot_id|>", "\n</tool_call><|im_end|>", "\n<|im_", "<|"),
        )
    },
    "a fence and an end of the turn": (f"```json\n{ADD_JSON}\n```<|im_end|>", [ADD]),
    "a lonely closing tag and words": (f"{ADD_JSON}\n</tool_call>\nDone", [ADD, "Done"]),
    # Brackets too many
    "a brace too many": (f"<tool_call>{ADD_JSON}}}</tool_call>", [ADD]),
    "a brace too many in two tags": (f"<tool_call>{ADD_JSON}}}</tool_call>\n{NOW_TAG}", [ADD, NOW]),
    "a brace too many before the next": (f"{ADD_JSON}}}\n{NOW_JSON}}}", [ADD, NOW]),
    "a brace too many in a fence": (f"```json\n{ADD_JSON}}}\n```", [ADD]),
    "bare and a brace too many": (f"{ADD_JSON}}}", [ADD]),
    "bare, a brace too many, and words": (f"{ADD_JSON}}} Would you?", [ADD, "Would you?"]),
    "bare list and a bracket too many": (f"{BOTH_JSON}]", [ADD, NOW]),
    "a list and brackets too many": (f"<tool_call>\n{BOTH_JSON}\n]]\n</tool_call>", [ADD, NOW]),
    # Llama 3.3's functions
    "a function": ('<function=add>{"a": 1}</function>', [ADD]),
    "two functions": ('<function=add>{"a": 1}</function>\n<function=now>{}</function>', [ADD, NOW]),
    "a function among words": ('So: <function=add>{"a": 1}</function> Done.', ["So:", ADD, "Done."]),
    "a function without an end": ('<function=add>{"a": 1}', [ADD]),
    "a function and a brace too many": ('<function=add>{"a": 1}}</function>', [ADD]),
    # OpenAI's shape in a tag
    "function": ('<tool_call>{"function": {"name": "add", "arguments": {"a": 1}}}</tool_call>', [ADD]),
    "function with an id": (
        '<tool_call>{"id": "x", "type": "function", "function": {"name": "add", "arguments": "{\\"a\\": 1}"}}',
        [ADD],
    ),
    # Arguments
    "arguments as a string": ('<tool_call>{"name": "add", "arguments": "{\\"a\\": 1}"}</tool_call>', [ADD]),
    "arguments as an empty string": ('<tool_call>{"name": "now", "arguments": ""}</tool_call>', [NOW]),
    "arguments as a string of none": ('<tool_call>{"name": "now", "arguments": "{}"}</tool_call>', [NOW]),
    "null": ('<tool_call>{"name": "now", "arguments": null}</tool_call>', [NOW]),
    "an empty object": ('<tool_call>{"name": "now", "arguments": {}}</tool_call>', [NOW]),
    "parameters in a tag": ('<tool_call>{"name": "add", "parameters": {"a": 1}}</tool_call>', [ADD]),
    "null beside parameters": ('{"name": "add", "arguments": null, "parameters": {"a": 1}}', [ADD]),
    "none beside parameters": ('{"name": "add", "arguments": {}, "parameters": {"a": 1}}', [ADD]),
    "a description beside them": ('{"name": "add", "description": "Adds", "arguments": {"a": 1}}', [ADD]),
    "all types": (
        '<tool_call>{"name": "add", "arguments": {"s": "é", "i": -42, "f": 3.5e2, "b": true, "n": null, "l": [1, []]}}'
        "</tool_call>",
        [("add", {"s": "é", "i": -42, "f": 350.0, "b": True, "n": None, "l": [1, []]})],
    ),
    "raw line breaks": (
        '<tool_call>{"name": "add", "arguments": {"a": "x\n\ty\r\n"}}</tool_call>',
        [("add", {"a": "x\n\ty\r\n"})],
    ),
    "tags and braces in a string": (
        '<tool_call>{"name": "add", "arguments": {"a": "</tool_call> }{ <tool_call>{\\"b\\": [ <tools>"}}</tool_call>.',
        [("add", {"a": '</tool_call> }{ <tool_call>{"b": [ <tools>'}), "."],
    ),
    "quotes and backslashes in a string": (
        r'<tool_call>{"name": "add", "arguments": {"a": "He said \"{hi}\"", "b": "C:\\", "c": "\\\""}}</tool_call>',
        [("add", {"a": 'He said "{hi}"', "b": "C:\\", "c": '\\"'})],
    ),
    "an apostrophe in a string": (
        '<tool_call>{"name": "add", "arguments": {"a": "it\'s {"}}</tool_call>.',
        [("add", {"a": "it's {"}), "."],
    ),
    # Names
    "an unknown name in a tag": ('<tool_call>{"name": "subtract", "arguments": {}}</tool_call>', [("subtract", {})]),
    "a name that is not ASCII": ('<tool_call>{"name": "größe"}</tool_call>', [("größe", {})]),
}

TEXTS = {
    "words": "Hello, world.",
    "nothing but white space": " \n\n ",
    "smaller-than": "a < b and c<d, <<, x <",
    "other tags": "Use <toolbox>, <tool>, <Tool_call>, <tool_calls> or </tool>.",
    "tag in prose": "Write <tool_call> to call, and </tool_call> behind it. Not <tools> nor </tools>.",
    "tag at the end": "Write <tool_call>",
    "tag and white space at the end": "Write <tool_call> \n ",
    "tag cut off": "Write <tool_ca",
    "each prefix of a tag": " ".join("<tool_response>"[:n] + "|" + "<tools>"[:n] for n in range(16)),
    "tag in quotes": 'Between "<tool_call>" and "</tool_call>" stands JSON such as {"name": "add"}.',
    "tag and much white space": f"<tool_call>{' ' * 400}{{}}",
    "closing tags": "</tool_call></tools></tool_response>",
    "made-up result without a call": 'See <tool_response>{"name": "add"}</tool_response> for it.',
    "JSON": '{"answer": 42}',
    "JSON of a call's keys": '{"name": "Bob", "arguments": {"for": 1, "against": 2}}',
    "JSON of an unknown tool": '{"name": "subtract", "parameters": {"a": 1}}',
    "JSON that only has a tool's name": '{"name": "add", "description": "adds numbers"}',
    "JSON with a type": '{"type": "object", "properties": {"name": {"type": "string"}}}',
    "JSON without a name": '{"parameters": {}}',
    "JSON list": '[{"answer": 42}, 1]',
    "JSON list with a call and something else": f'[{ADD_JSON}, {{"answer": 42}}]',
    "a number": "42",
    "a string": '"{\\"name\\": \\"add\\"}"',
    "a call between words": f"I would call {ADD_JSON} to add.",
    "a call in a line behind words": f"So: {ADD_JSON}",
    "a list of calls in a line behind words": f"So: {BOTH_JSON}\n",
    "a call in a line behind words, and a brace too many": f"So: {ADD_JSON}}}",
    "a call in a line before words": f"So:\n{ADD_JSON} would add.",
    "a call in other JSON": f'{{"tool_calls": {BOTH_JSON}}}',
    "a call in a list behind words": f"1. {ADD_JSON}",
    "a call cut off in a line behind words": f"So: {ADD_JSON[:-1]}",
    "a call in Python's literals": "{'name': 'add', 'parameters': {'a': 1}}",
    "a call in Python's words": "[add(a='x', b={}), now()]",
    "a function in another spelling": '<function=add {"a": 1}</function>',
    "a made-up result in JSON": '{"tool_response": {"result": 3}}',
    "a made-up result in JSON that names it": '{"name": "tool_response", "content": "3"}',
    "a call in code": f"```python\nllm.call('add', a=1)\ncalls = [now(), {ADD_JSON}]\n```",
    "a call in JSX": f"<App data={{{ADD_JSON}}} />",
    # The tools themselves
    "the tool": TOOL,
    "the tool, undescribed": UNDESCRIBED_TOOL,
    "the tool, indented": json.dumps(json.loads(TOOL), indent=2),
    "the tool without arguments": TOOL_WITHOUT_ARGUMENTS,
    "the tool with a description alone": '{"name": "now", "description": "The time"}',
    "the tool in OpenAI's shape": OPENAI_TOOL,
    "the tools": f"{TOOL}\n{TOOL_WITHOUT_ARGUMENTS}",
    "the tools in a list": f"[{UNDESCRIBED_TOOL}, {TOOL_WITHOUT_ARGUMENTS}]",
    "the tools in OpenAI's shape in a list": f"[{OPENAI_TOOL}, {OPENAI_TOOL}]",
    "the tools in their tag": f"<tools>\n{UNDESCRIBED_TOOL}\n{TOOL_WITHOUT_ARGUMENTS}\n</tools>",
    "the tool in the tag of a call": f"<tool_call>\n{TOOL}\n</tool_call>",
    "the tool in another tag": f"<function>{OPENAI_TOOL}</function>",
    "the tool in a fence": f"```json\n{TOOL}\n```",
    "the tools in a fence": f"```json\n[{OPENAI_TOOL}, {TOOL_WITHOUT_ARGUMENTS}]\n```",
    "the tools behind words": f"I can use:\n{TOOL}\n{TOOL_WITHOUT_ARGUMENTS}",
    "the tools in a fence among words": f"I can use:\n```json\n{TOOL}\n{UNDESCRIBED_TOOL}\n```\nWhich one?",
    # Answers
    "names of tools": '[{"name": "add"}, {"name": "now"}]',
    "the name of a tool": '{"name": "now"}',
    "names of tools in lines": '{"name": "add"}\n{"name": "now"}',
    "names of tools in a fence": '```json\n[{"name": "add"}, {"name": "now"}]\n```',
    "the name of a tool in another tag": '<answer>{"name": "now"}</answer>',
    "an answer in a tag": '<answer>{"name": "Rome"}</answer>',
    "an answer in a tag in a fence": '```xml\n<answer>\n{"name": "Rome", "arguments": {}}\n</answer>\n```',
    "HTML": '<!DOCTYPE html>\n<html><body class="add">{"name": "add"} [now()]</body></html>',
    "XML": '<?xml version="1.0"?>\n<tools><tool name="add"/>\n<function>now()</function></tools>',
    "JSX": "<App>{now()}<b>{add({a: 1})}</b></App>",
    "code with calls": "```python\n[now() for _ in range(3)]\nadd(a=1)\n```",
    "calls without brackets": "add(a=1)",
    "a function that is not offered": '<function=subtract>{"a": 1}</function>',
    "a link": "[now](https://example.com) is the time.",
    "code": 'def f():\n    return {"name": "add"}["name"] < "b" and f"{x!r}" or [[]]\n',
    "indented code": "    if a < b:\n        return {}\n",
    "a fence of Python": '```python\nx = {"name": "add"}\n```\n',
    "a fence of JSON that is an answer": '```json\n{"answer": [1, {"name": "add"}]}\n```',
    "an empty fence": "```\n```",
    "the start of a fence": "```js",
    "the start of JSON": '{"na',
    "a brace": "{",
    "brackets": "[[[[",
    "python tag and code": "<|python_tag|>print(1)",
    "half a python tag": "<|pyth",
    "word that begins as a fence's language": "jsonschema is a package.",
    "quotes": "'a' \"b\" 'c\" \\' \\\"",
    "line breaks": "\n\na\r\n\r\nb\n",
    "no ASCII": "Привет < 𝄞 {é}\u2028[",
}

BROKEN = {
    "a call in a fence between words": (f"So:\n```json\n{ADD_JSON}\n```\nThat would add.", ["So:\n"], "tool call"),
    "cut off": ('<tool_call>{"name": "add", "arguments": {"a": 1', [], "no valid JSON"),
    "cut off in a string": ('<tool_call>{"name": "add", "arguments": {"a": "x}}</tool_call>', [], "no valid JSON"),
    "cut off behind its first brace": ("<tool_call>{", [], "no valid JSON"),
    "cut off in a list": (f"<tool_call>[{ADD_JSON}", [], "no valid JSON"),
    "text before it": ('Wait.\n<tool_call>{"name"', ["Wait.\n"], "no valid JSON"),
    "cut off in tools": ('<tools>{"name": "no_close",', [], "no valid JSON"),
    "no brace at the end": ('<tool_call>{"name": "add", "arguments": {"a": 1}</tool_call>', [], "no valid JSON"),
    "a brace too many": (f"<tool_call>{{{ADD_JSON}}}</tool_call>", [], "no valid JSON"),
    "words": ("<tool_call>add(a=1)</tool_call>", [], "JSON"),
    "bare and cut off": ('{"name": "add", "parameters": {"a": 1}', [], "JSON"),
    "bare and cut off early": ('{"name": "add", "param', [], "JSON"),
    "bare and broken": ('{"name": "add", "parameters": {a: 1}}', [], "JSON"),
    "bare and broken, and words": ('{"name": "add", "parameters": {a: 1}} Done.', [], "JSON"),
    "bare list without an end": (f"[{ADD_JSON}, {NOW_JSON}", [], "JSON"),
    "bare with arguments that are none": ('{"name": "add", "parameters": [1]}', [], '"arguments"'),
    "cut off in a fence": (f"```json\n{ADD_JSON[:-1]}\n```", [], "JSON"),
    "a broken one behind a good one, both bare": (f"{ADD_JSON}\n{NOW_JSON[:-1]}", [], "JSON"),
    **{
        f"{number} in {place}": (f'{start}{{"name": "add", "arguments": {{"a": [{number}]}}}}', [], "NaN")
        for number in ("NaN", "Infinity", "-Infinity", "1e999")
        for place, start in (("a tag", "<tool_call>"), ("bare JSON", ""))
    },
    "NaN in a string": ('{"name": "add", "arguments": "{\\"a\\": NaN}"}', [], "NaN"),
    "a function without arguments": ("<function=now></function>", [], "JSON"),
    "a function with broken arguments": ('<function=add>{"a": }</function>', [], "JSON"),
    "a function in Python's words": ("<function=add>a=1</function>", [], "JSON"),
    "a function with a set behind words": ("So: <function=add>{1}</function> Done.", ["So: "], "JSON"),
    "a function behind words": ("So: <function=add>a=1</function> Done.", ["So: "], "JSON"),
    "a function with parameters": (
        "So:\n<function=add>\n<parameter=a>\n1\n</parameter>\n</function>",
        ["So:\n"],
        "JSON",
    ),
    "a function with parameters in a tag": (
        "<tool_call>\n<function=add>\n<parameter=a>\n1\n</parameter>\n</function>\n</tool_call>",
        [],
        "JSON",
    ),
    "python tag and Python's words": ('<|python_tag|>add(a="x")', [], "JSON"),
    "python tag and a method": ('<|python_tag|>add.call(a="x")', [], "JSON"),
    "python tag and Python's words behind words": ('So: <|python_tag|>add(a="x")', ["So: "], "JSON"),
    "no value": ('<tool_call>{"name": "add", "arguments": {"a": }}</tool_call>', [], "no valid JSON"),
    "no quotes": ("<tool_call>{name: add, arguments: {a: 1}}</tool_call>", [], "no valid JSON"),
    "no JSON at all": ("<tool_call>{add 1}</tool_call>", [], "no valid JSON"),
    "Python's literals": ("<tool_call>{'name': 'add', 'arguments': {'a': 1}}</tool_call>", [], "JSON"),
    "Python's constants": ('<tool_call>{"name": "add", "arguments": {"a": True}}</tool_call>', [], "JSON"),
    "code in Python's literals": ("<tool_call>{'name': 'add', 'arguments': {'a': f(1)}}</tool_call>", [], "JSON"),
    "a set in Python's literals": ("<tool_call>{'name': 'add', 'arguments': {'a': {1, 2}}}</tool_call>", [], "JSON"),
    "bytes in Python's literals": ("<tool_call>{'name': 'add', 'arguments': {'a': b'x'}}</tool_call>", [], "JSON"),
    "no name": ('<tool_call>{"arguments": {"a": 1}}</tool_call>', [], '"name"'),
    "an empty object": ("<tool_call>{}</tool_call>", [], '"name"'),
    "an empty name": ('<tool_call>{"name": "", "arguments": {}}</tool_call>', [], '"name"'),
    "a name that is a number": ('<tool_call>{"name": 7, "arguments": {}}</tool_call>', [], '"name"'),
    "a name that is a list": ('<tool_call>{"name": ["add"], "arguments": {}}</tool_call>', [], '"name"'),
    "a name of control characters": ('<tool_call>{"name": "\\u001b[2J", "arguments": {}}</tool_call>', [], '"name"'),
    "another key for arguments": ('<tool_call>{"name": "add", "args": {"a": 1}}</tool_call>', [], '"arguments"'),
    "arguments as a list": ('<tool_call>{"name": "add", "arguments": [1]}</tool_call>', [], '"arguments"'),
    "arguments as a number": ('<tool_call>{"name": "add", "arguments": 1}</tool_call>', [], '"arguments"'),
    "arguments as false": ('<tool_call>{"name": "add", "arguments": false}</tool_call>', [], '"arguments"'),
    "arguments as words": ('<tool_call>{"name": "add", "arguments": "hello"}</tool_call>', [], '"arguments"'),
    "arguments as a string with words behind": (
        '<tool_call>{"name": "add", "arguments": "{\\"a\\": 1} or so"}</tool_call>',
        [],
        '"arguments"',
    ),
    "arguments as a string of a list": (
        '<tool_call>{"name": "add", "arguments": "[1]"}</tool_call>',
        [],
        '"arguments"',
    ),
    "a list of numbers": ("<tool_call>[1, 2]</tool_call>", [], "JSON object"),
    "a list with a call and a number": (f"<tool_call>[{ADD_JSON}, 2]</tool_call>", [], "JSON object"),
    "an empty list": ("<tool_call>[]</tool_call>", [], ""),
    "nested too deep": (f"<tool_call>{'[' * 100_000}</tool_call>", [], ""),
    "nested too deep and closed": (f"<tool_call>{'[' * 3000}{']' * 3000}</tool_call>", [], ""),
    "behind a good one": (f'{NOW_TAG}<tool_call>{{"name"', [], "no valid JSON"),
}


@pytest.mark.parametrize(("text", "told"), CALLS.values(), ids=CALLS)
def test_call_is_read_in_every_cutting(text: str, told: Told) -> None:
    """Texts and calls come in order, and the same however the answer is cut."""
    whole = read(text)
    assert (without_space(whole.told), whole.error) == (told, None)
    for pieces in cuttings(text):
        assert read(*pieces).everything == whole.everything


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
def test_text_is_untouched_in_every_cutting(text: str) -> None:
    """What is no call comes out to the last character, however it is cut."""
    for pieces in ([text], *cuttings(text)):
        assert read(*pieces).everything == ([text], "None", False)


@pytest.mark.parametrize(("text", "told", "reason"), BROKEN.values(), ids=BROKEN)
def test_broken_call_is_an_error_in_every_cutting(text: str, told: Told, reason: str) -> None:
    """The error says what is wrong and how the call begins, the correction puts the same to the model."""
    whole = read(text)
    assert whole.error is not None, f"no error, but {whole.told}"
    assert whole.error.correction
    assert whole.told == told
    assert "it begins: " in whole.error.message
    assert reason in whole.error.message
    assert reason in whole.error.correction
    assert "<tool_call>" in whole.error.correction
    assert whole.error.message.isprintable()
    assert whole.error.correction.isprintable()
    for pieces in cuttings(text) if len(text) < 1000 else [in_pieces(text, 1000)]:
        assert read(*pieces).everything == whole.everything


@pytest.mark.parametrize("broken", ["<tool_call>{}</tool_call>", '<tool_call>{"name": }</tool_call>', "<tool_call>[1]"])
def test_a_broken_call_takes_all_others_with_it(broken: str) -> None:
    """The model is to answer again, with all its calls: neither those before nor what stands behind comes out."""
    for text in (f"Wait. {broken} Hello. {ADD_TAG}", f"Wait. {NOW_TAG} {broken}", f"Wait. {broken} <tool_response>"):
        outcome = read(text)
        assert outcome.told == ["Wait. "]
        assert outcome.error


AFTER_WORDS = {
    "bare": (f"I would call\n{ADD_JSON}", "I would call\n"),
    "a list": (f"So:\n{BOTH_JSON}\n", "So:\n"),
    "two": (f"So:\n{ADD_JSON}\n{NOW_JSON}", "So:\n"),
    "two, the first behind words": (f"So: {ADD_JSON}\n{NOW_JSON}", f"So: {ADD_JSON}\n"),
    "words in the next line": (f"So:\n  {ADD_JSON}\nwould add.", "So:\n  "),
    "a fence": (f"Like this:\n```json\n{ADD_JSON}\n```\n", "Like this:\n"),
    "a fence without a language": (f"Like this:\n```\n{ADD_JSON}```", "Like this:\n"),
    "a fence without an end": (f"Like this:\n```json\n{ADD_JSON}", "Like this:\n"),
    "a fence and then words": (f"Like this:\n```json\n{ADD_JSON}\n```\nThat would add.", "Like this:\n"),
    "a fence of two": (f"Like this:\n```json\n{INDENTED}\n```", "Like this:\n"),
    "a brace too many": (f"So:\n{ADD_JSON}}}", "So:\n"),
    "a lonely closing tag": (f"So:\n{ADD_JSON}\n</tool_call>", "So:\n"),
    "an end of the turn": (f"So:\n{ADD_JSON}<|im_end|>", "So:\n"),
    "behind a call and words": (f"{ADD_JSON}\nAnd then\n{NOW_JSON}", ""),
}


@pytest.mark.parametrize(("text", "before"), AFTER_WORDS.values(), ids=AFTER_WORDS)
def test_call_after_words_is_asked_about(text: str, before: str) -> None:
    """On a line of its own or in a fence it may be a call or an example: the model has to say, and it is not shown."""
    for pieces in ([text], *cuttings(text)):
        outcome = read(*pieces)
        assert outcome.told == ([before] if before else [])
        assert outcome.error
        assert outcome.error.correction
        assert "<tool_call>" in outcome.error.correction
        assert outcome.error.message.isprintable()


RESULTS = {
    "in lines": "<tool_response>\n3\n</tool_response>",
    "and words": '<tool_response>{"result": 3}</tool_response>\nThat makes 3.',
    "behind white space": "\n <tool_response>3</tool_response>",
    "without an end": "<tool_response>",
    "before a call": f"<tool_response>3</tool_response>{ADD_TAG}",
    "in a fence": "```xml\n<tool_response>3</tool_response>\n```",
}


@pytest.mark.parametrize("text", RESULTS.values(), ids=RESULTS)
def test_made_up_result_that_nothing_precedes_is_asked_about(text: str) -> None:
    """No tool was called, so it is not shown as if it were the answer."""
    for pieces in ([text], *cuttings(text)):
        outcome = read(*pieces)
        assert "".join(outcome.told).strip() == ""
        assert outcome.error
        assert outcome.error.correction
        assert "made up" in outcome.error.message


def test_each_call_has_an_id_of_its_own() -> None:
    """The same call twice is two calls, in one answer as in two."""
    calls = [call for text in (ADD_TAG * 2, ADD_TAG) for call in ToolCallParser({"add"}).feed([text], end=True)]
    ids = [call.tool_call_id for call in calls if isinstance(call, llm.ToolCall)]
    assert len(set(ids)) == 3
    assert all(isinstance(name, str) and name for name in ids)


MADE_UP = {
    "in lines": (f"{ADD_TAG}\n<tool_response>\n3\n</tool_response>\nThat makes 3.", [ADD]),
    "with nothing between": (f"{ADD_TAG}<tool_response>3", [ADD]),
    "without a closing tag": (f"<tool_call>{ADD_JSON}\n<tool_response>3</tool_response>", [ADD]),
    "behind two": (f"{ADD_TAG}{NOW_TAG}\n<tool_response>3</tool_response>", [ADD, NOW]),
    "and a further call": (f"{ADD_TAG}<tool_response>3</tool_response>{NOW_TAG}", [ADD]),
}


@pytest.mark.parametrize(("text", "told"), MADE_UP.values(), ids=MADE_UP)
def test_made_up_result_ends_the_answer(text: str, told: Told) -> None:
    """What stands behind a result that the model makes up is neither text nor a call."""
    whole = read(text)
    assert (without_space(whole.told), whole.error, whole.finished) == (told, None, True)
    for pieces in cuttings(text):
        outcome = read(*pieces)
        assert (without_space(outcome.told), outcome.error, outcome.finished) == (told, None, True)


def test_made_up_result_behind_bare_json() -> None:
    """A bare call is one with a made-up result behind it as well, which is not kept."""
    text = f"{ADD_JSON}\n<tool_response>\n3\n</tool_response> That makes 3."
    for pieces in ([text], *cuttings(text)):
        assert without_space(read(*pieces).told) == [ADD]


# What a real model wrote: Qwen2.5-Coder 1.5B, in the runs of tests/real_model.py

REAL_NAMES = (
    "add",
    "convert_currency",
    "create_event",
    "find_user",
    "get_time",
    "get_user",
    "get_weather",
    "list_files",
    "multiply",
    "send_email",
)
REAL: list[tuple[str, str | list[str]]] = [
    (
        "To get the profile of the user with ID 31, I will call the get_user tool.\n"
        '{"name": "get_user", "arguments": {"user_id": 31}}',
        "asked",
    ),
    (
        "To convert 125 euros to dollars, you can use the `convert_currency` tool. Here's how you c"
        "an call it:\n"
        "\n"
        "```json\n"
        "{\n"
        '  "name": "convert_currency",\n'
        '  "arguments": {\n'
        '    "amount": 125,\n'
        '    "from_currency": "eur",\n'
        '    "to_currency": "usd"\n'
        "  }\n"
        "}\n"
        "```\n"
        "\n"
        "This will return the equivalent amount in dollars.",
        "asked",
    ),
    (
        '<tool_response>{"weather": "sunny", "temperature": "20°C", "unit": "celsius"}</tool_response>',
        "asked",
    ),
    (
        "<tool_response>None</tool_response>",
        "asked",
    ),
    (
        '```json\n{\n  "tool_response": "Event created successfully."\n}\n```',
        "text",
    ),
    (
        "<tool_response>\n"
        "{\n"
        '  "get_weather": {\n'
        '    "city": "Paris",\n'
        '    "unit": "celsius"\n'
        "  },\n"
        '  "get_weather": {\n'
        '    "city": "Rome",\n'
        '    "unit": "celsius"\n'
        "  }\n"
        "}\n"
        "</tool_response>",
        "asked",
    ),
    (
        '<tool_response>: {"result": "The light in the bedroom has been turned on and the thermosta'
        't has been set to 19 degrees."}',
        "asked",
    ),
    (
        '<tool_response>{"name": "get_user", "arguments": {"user_id": 123}}',
        "asked",
    ),
    (
        "<tool_response>: 125 euros = 111.11 dollars",
        "asked",
    ),
    (
        "<tool_response>['src']</tool_response>",
        "asked",
    ),
    (
        '{"name": "multiply", "arguments": {"a": 12, "b": 13}}\n'
        '{"name": "add", "arguments": {"a": 100, "b": {"name": "multiply", "arguments": {"a": 12, "'
        'b": 13}}}}',
        ["multiply", "add"],
    ),
    (
        '{"name": "get_weather", "arguments": {"city": "Paris", "unit": "celsius"}}\n'
        '{"name": "get_weather", "arguments": {"city": "Rome", "unit": "celsius"}}',
        ["get_weather", "get_weather"],
    ),
    (
        '```json\n{\n  "name": "get_user",\n  "arguments": {\n    "user_id": 12345\n  }\n}\n```',
        ["get_user"],
    ),
    (
        '{"name": "find_user", "arguments": {"name": "Alice Smith"}}\n'
        '{"name": "send_email", "arguments": {"to": ["Alice Smith"], "subject": "Invoice", "body": '
        '"It is attached.", "cc": null}}',
        ["find_user", "send_email"],
    ),
    (
        '{\n  "name": "get_user",\n  "email": "example@example.com"\n}',
        "text",
    ),
    (
        '```json\n{\n  "result": "Light in living room turned on at 40%"\n}\n```',
        "text",
    ),
    (
        '{"name": "Rex", "age": 3}',
        "text",
    ),
    (
        "To find the e-mail address of the user Alice Smith, I will call the `find_user` tool with "
        'the arguments {"name": "Alice Smith"}.',
        "text",
    ),
    (
        "To convert 250 US dollars to euros, you can use the `convert_currency` tool with the follo"
        "wing arguments:\n"
        "```json\n"
        "{\n"
        '  "amount": 250,\n'
        '  "from_currency": "USD",\n'
        '  "to_currency": "EUR"\n'
        "}\n"
        "```\n"
        "The result will be the amount in euros.",
        "text",
    ),
    (
        '1. {"name": "get_weather", "arguments": {"city": "London", "unit": "celsius"}}',
        "text",
    ),
]


@pytest.mark.parametrize(("text", "told"), REAL, ids=range(len(REAL)))
def test_text_of_a_real_model_is_read_in_every_cutting(text: str, told: str | list[str]) -> None:
    """Its calls are made, its made-up results and calls after words are put to it, and its JSON is text."""

    def outcome(pieces: Iterable[str]) -> str | list[str]:
        parser = ToolCallParser(REAL_NAMES)
        out = [part for piece in pieces for part in parser.feed([piece])] + parser.feed([], end=True)
        calls = [part.name for part in out if isinstance(part, llm.ToolCall)]
        if parser.error:
            assert parser.error.correction
            return "asked"
        if not calls:
            assert "".join(out) == text
        return calls or "text"

    assert outcome([text]) == told
    for pieces in cuttings(text):
        assert outcome(pieces) == told


# What is held

# What is the beginning of a call, even of one that cannot be read, or of a made-up result.
WRAPPER = r"(?:\s|```[\w-]*|<\|?[\w-]+\|?>)*"
MAY_CALL = (
    rf"<\|?[\w-]*(?:tool|function|call|python_tag)[\w-]*\|?>{WRAPPER}(?:[{{\[]|add|now)"
    r"|\{\s*\"(?:name|id|type|function|arguments|parameters)\":.*\"(?:add|now)\"(?!\})|\[\s*\{\s*\"name\":\s*\"(?:add|now)"
    rf"|\A{WRAPPER}<tool_response>|<function=(?:add|now)"
)
WORDS = st.lists(
    st.sampled_from(
        [
            *"<>/{}[]ab \n\"'`",
            *("<tool_call>", "<tools>", "<tool_response>", "<tool", "_call", "</tool_call>", "s>", "<b>", "(a"),
            *("```", "```json\n", "<|python_tag|>", '{"name": ', '"Bob"', '{"id"', "<function", "<function="),
        ]
    ),
    max_size=12,
).map("".join)


@examples
@given(WORDS.filter(lambda text: not re.search(MAY_CALL, text, re.DOTALL)))
def test_little_is_held_of_what_is_no_call(words: str) -> None:
    """One character at a time, all is out but the last few, which may still begin a call."""
    text = f"Say: {words}{'word ' * 100}"
    parser, out = ToolCallParser(set(NAMES)), ""
    for n, char in enumerate(text, 1):
        out += "".join(str(piece) for piece in parser.feed([char]))
        assert text.startswith(out)
        assert n - len(out) < MAX_HELD
    assert out == text


@pytest.mark.parametrize("text", ["Hello, world.\n\n# One\n- (two); 'three' \"four\" = 5 > 4", "if a < b: </b> 2`"])
def test_text_in_which_no_call_may_begin_goes_out_at_once(text: str) -> None:
    """Text with neither a tag nor a fence nor a bracket does not wait for what follows."""
    parser = ToolCallParser(set(NAMES))
    for char in text[:-1]:
        assert parser.feed([char]) == ([char] if char != "<" else []) or char in "b/ "
    assert joined(parser.feed([], end=True)) in ([], [text[-1]])


def test_text_before_a_call_does_not_wait_for_it() -> None:
    """Only the call is held, from its tag on."""
    parser = ToolCallParser(set(NAMES))
    assert parser.feed(["Wait. <tool_call>", ADD_JSON[:-1]]) == ["Wait. "]
    assert parser.feed(["}"]) == []
    assert joined(parser.feed([], end=True)) == [ADD]


# Bounds and cost


@pytest.mark.parametrize("start", [f"<tool_call>{ADD_JSON[:-3]}, ", '{"name": "add", "parameters": {"a": "'])
@pytest.mark.parametrize("block", ["x", "{", "[", '"', "'", "\\", " "])
def test_call_larger_than_the_bound(start: str, block: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A call that never ends is an error at the bound, and no more than that is kept of it."""
    bound = 128 * KIB
    monkeypatch.setattr(llm_autonomous, "MAX_EVENT_BYTES", bound)
    reply = new_attempt(tools=[llm.Tool(name) for name in NAMES])
    event = f"data: {json.dumps(delta(block * KIB))}\n\n".encode()
    tracemalloc.start()
    try:
        out = reply.feed(f"data: {json.dumps(delta(start))}\n\n".encode())
        for _ in range(5 * bound // KIB):
            out += reply.feed(event)
        held, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert "a tool call larger than" in str(reply.error)
    assert reply.error
    assert reply.error.correction is None  # it would have to be sent again
    assert out == []
    assert held < 3 * bound
    assert peak < 4 * bound


def test_bound_is_for_calls_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Text before a call may have any length."""
    monkeypatch.setattr(llm_autonomous, "MAX_EVENT_BYTES", KIB)
    outcome = read(*in_pieces("y" * 9 * KIB + ADD_TAG, 100))
    assert (outcome.told, outcome.error) == (["y" * 9 * KIB, ADD], None)


ENDLESS: dict[str, tuple[str, str]] = {  # what comes first, and what again and again
    "<": ("", "<"),
    "< behind text": ("Text ", "<"),
    "{": ("", "{"),
    "[": ("", "["),
    "white space": ("", " "),
    "fences": ("", "```"),
    "tag": ("", "<tool_call>"),
    "response tag": ("", "<tool_response>"),
    "half a tag": ("Text ", "<tool_"),
    "tag and white space": ("", "<tool_call>   "),
    "white space behind a tag": ("<tool_call>", " "),
    "words": ("", "word "),
    "long string": ('<tool_call>{"a": "', "x"),
    "long string with escapes": ('<tool_call>{"a": "', '\\"'),
    "long string with braces and words": ('<tool_call>{"a": "', "} word "),
    "braces in a tag": ("<tool_call>", "{"),
    "closed braces in a tag": ('<tool_call>{"a": [', "{},"),
    "strings in a tag": ("<tool_call>{", '"a",'),
    "quotes in a tag": ("<tool_call>{", "'\""),
    "calls": ("", NOW_TAG),
    "calls in one tag": ("<tool_call>", '{"name": "now"}\n'),
    "white space behind a call": (NOW_TAG, " "),
    "< behind a call": (NOW_TAG, "<"),
    "; behind a call": (NOW_TAG[:26], ";"),
    "words behind a call": (NOW_TAG, "word "),
    "bare string": ('{"name": "add", "parameters": {"a": "', "x"),
    "bare string with braces and words": ('{"name": "add", "parameters": {"a": "', "} word "),
    "bare calls": ("", '{"name": "now"}\n'),
    "bare and open quotes": ('{"name": "add", x"', '\\"'),
    "bare and open apostrophes": ('{"name": "add", x"', "'"),
    "bare brackets": ('{"name": "add", "parameters": ', "["),
    "bare and then words": ('{"name": "add"} ', "word "),
    "bare and then smaller-than": ('{"name": "add"} ', "<"),
    "made-up result": (f"{NOW_TAG}<tool_response>", "<tool_call>{"),
    "made-up results in an argument": ('<tool_call>{"name": "add", "arguments": {"a": "', "<tool_response>"),
    "brackets in lines": ("Say:\n", '{"name":\n["add",\n'),
    "brackets in a line": ("Say: ", '{"name": "add", '),
    "calls behind words": ("Say: ", f"{ADD_JSON} "),
}


def work(pieces: list[str]) -> int:
    """Calls made to read ``pieces``, characters in the strings that they read, and bytes taken for it."""

    def profile(frame: FrameType, event: str, arg: Any) -> None:
        nonlocal total
        if event == "c_call":
            owner = getattr(arg, "__self__", None)
            reads = isinstance(owner, str) and arg.__name__ not in ("startswith", "endswith")
            total += 1 + (len(owner) if reads else 0)
        elif event == "call":
            total += 1

    total, parser = 0, ToolCallParser(set(NAMES))
    tracemalloc.start()
    before = sys.getprofile()
    sys.setprofile(profile)
    try:
        for piece in [*pieces, None]:
            tracemalloc.reset_peak()
            held, _ = tracemalloc.get_traced_memory()
            parser.feed([] if piece is None else [piece], end=piece is None)
            total += tracemalloc.get_traced_memory()[1] - held
    finally:
        sys.setprofile(before)
        tracemalloc.stop()
    return total


@pytest.mark.parametrize(("start", "again"), ENDLESS.values(), ids=ENDLESS)
def test_cost_is_linear(start: str, again: str, cpu_guard: None) -> None:
    """Four times as much of anything, in pieces of 1 KB, is at most 4.8 times the work, and 1 MB of it is read."""

    def pieces(size: int) -> list[str]:
        return in_pieces(start + again * (size // len(again)), KIB)

    small, large = work(pieces(16 * KIB)), work(pieces(64 * KIB))
    assert large <= 4.8 * small + 64 * KIB
    parser = ToolCallParser(set(NAMES))
    for piece in pieces(MIB):
        parser.feed([piece])
    parser.feed([], end=True)


# Properties

RICH = [
    *"<>{}[]\"'`\\/:,; \n\ta1é𝄞",
    *("<tool_call", "<tool_call>", "tool_call>", "</tool_call>", "<tools>", "</tools>", "<tool_", "<tool_response"),
    *("```", "```json\n", "<|python_tag|>", "<|", "<|im_end|>", "<b>", "</b>", "<answer>", "<function>", "<function="),
    *(
        '"name"',
        '{"name": ',
        '{"type": ',
        "{'name'",
        '{"name": "now"}',
        '{"name": "Bob"}',
        '{"a": 1}',
        "[{",
        "}]",
        "}}",
    ),
    *(TOOL, OPENAI_TOOL, "[now", "now(", "\n\n", "  ", "\\n", "if a < b: ", "json", "\u2028"),
]
NO_CALLS = (
    st.lists(st.sampled_from(RICH) | st.text(max_size=4), max_size=14)
    .map("".join)
    .filter(lambda text: not re.search(MAY_CALL, text, re.DOTALL))
)


@st.composite
def cut(draw: st.DrawFn, text: str) -> list[str]:
    """A text in pieces, some of which may be empty."""
    if draw(st.booleans()):
        return in_pieces(text, draw(st.integers(1, 3)))
    edges = sorted(draw(st.lists(st.integers(0, len(text)), max_size=8)))
    return [text[start:end] for start, end in zip([0, *edges], [*edges, len(text)], strict=True)]


@examples
@given(NO_CALLS.flatmap(lambda text: st.tuples(st.just(text), cut(text))))
def test_any_text_without_a_call_is_untouched(example: tuple[str, list[str]]) -> None:
    """Whatever it is rich in, text comes out as it is, for any cutting."""
    text, pieces = example
    assert read(*pieces).everything == ([text] if text else [], "None", False)


STRINGS = st.text(max_size=8) | st.lists(st.sampled_from(RICH), max_size=4).map("".join)
ARGUMENTS = st.dictionaries(
    STRINGS,
    st.recursive(
        st.none() | st.booleans() | st.integers(-(2**40), 2**40) | STRINGS,
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(STRINGS, inner, max_size=3),
        max_leaves=5,
    ),
    max_size=3,
)


def as_it_is(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


@st.composite
def call_texts(draw: st.DrawFn) -> tuple[str, tuple[str, dict[str, Any]]]:
    """A call in one of its forms in tags, and what it says."""
    name, arguments = draw(st.sampled_from(["add", "now", "unknown"])), draw(ARGUMENTS)
    style = draw(st.sampled_from([json.dumps, as_it_is, lambda value: json.dumps(value, indent=1)]))
    call: dict[str, Any] = {"name": name, draw(st.sampled_from(["arguments", "parameters"])): arguments}
    shape = draw(st.sampled_from(["call", "call", "list", "function"]))
    value = {"call": call, "list": [call], "function": {"type": "function", "function": call}}[shape]
    tag, space = draw(st.sampled_from(["tool_call", "tools"])), draw(st.sampled_from(["", "\n", " \n "]))
    return f"<{tag}>{space}{style(value)}{space}</{tag}>", (name, arguments)


# What is no text next to a call: its wrapping, and a result that the model makes up.
AT_A_CALL = r"\A[\s;,]*(</|<\||[}\]])|(<\|?[\w-]+\|?>|```[\w-]*)\s*\Z|<tool_response"


@st.composite
def mixtures(draw: st.DrawFn) -> tuple[str, list[str], Told]:
    """An answer of texts and calls in any order, the same in pieces, and what it says."""
    text, told = "", []
    for _ in range(draw(st.integers(1, 5))):
        if not (told and isinstance(told[-1], str)) and draw(st.booleans()):
            words = draw(NO_CALLS.filter(lambda text: not re.search(AT_A_CALL, text)))
            text, told = text + words, [*told, words]
        else:
            call, said = draw(call_texts())
            text, told = text + call, [*told, said]
    return text, draw(cut(text)), told


def merged(told: Told) -> Told:
    parts: Told = []
    for part in told:
        if isinstance(part, str) and parts and isinstance(parts[-1], str):
            parts[-1] += part
        elif part:
            parts.append(part)
    return parts


@examples
@given(mixtures())
def test_any_mixture_of_text_and_calls_comes_in_order(mixture: tuple[str, list[str], Told]) -> None:
    """Texts and calls come as they were written, but for white space next to a call."""
    text, pieces, told = mixture
    outcome = read(*pieces)
    assert outcome.error is None
    assert without_space(outcome.told) == without_space(merged(told))
    assert outcome.everything == read(text).everything


ODD = [
    *(
        ADD_JSON,
        ADD_JSON,
        NOW_TAG,
        NOW_JSON,
        BOTH_JSON,
        ADD_JSON[:-1],
        "<tool_call>{",
        "<tools>[",
        '{"name": "add", "x": ',
    ),
    *(
        '<function=add>{"a": 1}</function>',
        "<function=now>",
        "[add(a=1)]",
        "<tool_response>",
        '{"tool_response": 1}',
        "NaN",
    ),
]


@examples
@given(
    st.lists(st.sampled_from([*RICH, *ODD]), max_size=9).map("".join),
    st.data(),
)
def test_any_cutting_of_anything_gives_the_same(text: str, data: st.DataObject) -> None:
    """Also what is broken is read alike, and ends in text, calls, or one error that can be put to the model."""
    outcome = read(*data.draw(cut(text)))
    assert outcome.everything == read(text).everything
    if outcome.error:
        assert outcome.error.correction
        assert outcome.error.message.isprintable()
    else:
        assert outcome.told or not text.strip()


@pytest.mark.parametrize("depth", [100, 101, 900, 970, 990, 1_000, 5_000, 9_990, 100_000])
@pytest.mark.parametrize("tag", ["<tool_call>", ""], ids=["tagged", "bare"])
def test_nesting_of_any_depth_raises_nothing(tag: str, depth: int) -> None:
    """Arguments that are nested too deeply are a broken call, and never an exception: neither where Python cannot read
    them, nor a little before that, where `llm` could not log them."""
    nested = '{"a": ' * depth + "1" + "}" * depth
    parser = ToolCallParser(set(NAMES))
    text = f'{tag}{{"name": "add", "arguments": {nested}}}'
    out = parser.feed([text]) + parser.feed([], end=True)
    if depth == 100:
        assert [piece.name for piece in out] == ["add"]
    else:
        assert out == []
        assert parser.error
