"""How tool calls are read out of an answer: what models write, in every cutting, and what reading it may cost.

The shapes are those that models were seen to write, and those that vLLM's parsers for the same families (hermes,
llama3_json, qwen2_5_coder) are tested with. For more examples of the properties, set LLM_AUTONOMOUS_EXAMPLES=10000.
"""

from __future__ import annotations

import json
import os
import tracemalloc
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import llm
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import llm_autonomous
from llm_autonomous import MAX_HELD, ToolCallParser

MORE_EXAMPLES = os.environ.get("LLM_AUTONOMOUS_EXAMPLES")
examples = settings(max_examples=int(MORE_EXAMPLES or 150), derandomize=not MORE_EXAMPLES, deadline=None, database=None)

KIB = 1024
NAMES = {"add", "now"}
NOW = ("now", {})
ADD = ("add", {"a": 1})
END = "the answer ends here"
NOW_JSON = '{"name": "now", "arguments": {}}'
ADD_JSON = '{"name": "add", "arguments": {"a": 1}}'
BOTH_JSON = f"[{ADD_JSON}, {NOW_JSON}]"
NOW_TAG = f"<tool_call>{NOW_JSON}</tool_call>"
ADD_TAG = f"<tool_call>\n{ADD_JSON}\n</tool_call>"
INDENTED = "\n".join(json.dumps(json.loads(call), indent=2) for call in (ADD_JSON, NOW_JSON))
ODD_STRING = """</tool_call> }{ <tool_call>{ it's "{" C:\\ \\" [ <tools>"""
SCHEMA = '{"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}'
TOOL = f'{{"name": "add", "description": "Adds", "parameters": {SCHEMA}}}'
OPENAI_TOOL = f'{{"type": "function", "function": {TOOL}}}'
UNDESCRIBED_TOOL = f'{{"name": "add", "parameters": {SCHEMA}}}'
TOOL_WITHOUT_ARGUMENTS = '{"name": "now", "parameters": {"properties": {}, "type": "object"}}'

Parts = list[Any]  # texts, (name, arguments) for calls, and END


class Outcome(NamedTuple):
    """What an answer is read as."""

    parts: Parts  # texts that follow each other are joined
    message: str = ""  # of the error, if there is one
    correction: str | None = None


def read(*pieces: str, names: Iterable[str] = NAMES) -> Outcome:
    """What an answer that arrives in these pieces is read as."""
    parser = ToolCallParser(set(names))
    out = [part for piece in pieces for part in parser.feed([piece])] + parser.feed([], end=True)
    parts = joined([part if isinstance(part, str) else (part.name, part.arguments) for part in out])
    parts += [END] * parser.finished
    return Outcome(parts, parser.error.message, parser.error.correction) if parser.error else Outcome(parts)


def joined(parts: Parts) -> Parts:
    """The same with texts that follow each other as one."""
    out: Parts = []
    for part in parts:
        if out and isinstance(part, str) and isinstance(out[-1], str):
            out[-1] += part
        elif part:
            out.append(part)
    return out


def without_space(parts: Parts) -> Parts:
    """The same without the white space at the ends of texts, which may be dropped next to a call."""
    trimmed = [part.strip() if isinstance(part, str) else part for part in parts]
    return [part for part in trimmed if part]


def in_pieces(text: str, size: int) -> list[str]:
    return [text[start : start + size] for start in range(0, len(text), size)]


def cuttings(text: str) -> Iterator[list[str]]:
    """One character at a time, and cut at every place; a very long text in pieces alone."""
    if len(text) > 2000:
        yield in_pieces(text, 1000)
        return
    yield in_pieces(text, 1)
    for place in range(1, len(text)):
        yield [text[:place], text[place:]]


# What models write. A row is an answer, and what it is read as.

CALLS: dict[str, tuple[str, Parts]] = {
    # Hermes
    "in lines": (ADD_TAG, [ADD]),
    "indented": (f"<tool_call>\n{json.dumps(json.loads(ADD_JSON), indent=2)}\n</tool_call>\n", [ADD]),
    "much white space": (f"<tool_call> \n\t\r\n  {ADD_JSON} \n\n </tool_call>  \n", [ADD]),
    "two tags with nothing between": (f"{ADD_TAG}{NOW_TAG}", [ADD, NOW]),
    "two in one tag": (f"<tool_call>\n{ADD_JSON}\n{NOW_JSON}\n</tool_call>", [ADD, NOW]),
    "two in one tag with a semicolon": (f"<tool_call>{ADD_JSON}; {NOW_JSON}</tool_call>", [ADD, NOW]),
    "two in one tag with a comma": (f"<tool_call>{ADD_JSON}, {NOW_JSON}</tool_call>", [ADD, NOW]),
    "a list": (f"<tool_call>{BOTH_JSON}</tool_call>", [ADD, NOW]),
    "no closing tag": (f"<tool_call>\n{ADD_JSON}", [ADD]),
    "no closing tag before the next": (f"<tool_call>{ADD_JSON}\n{NOW_TAG}", [ADD, NOW]),
    "no closing tags": (f"<tool_call>{ADD_JSON}<tool_call>{NOW_JSON}", [ADD, NOW]),
    "text around": (f"One: {ADD_TAG} two: {NOW_TAG} three.", ["One:", ADD, "two:", NOW, "three."]),
    "after half a tag": (f"a <<tool_{ADD_TAG}", ["a <<tool_", ADD]),
    "before much text": (f"a <{ADD_TAG}{' and so on' * 30}", ["a <", ADD, ("and so on " * 30).strip()]),
    "after a tag that is text": (f"The tag <tool_call> is: {ADD_TAG}", ["The tag <tool_call> is:", ADD]),
    "in another tag within it": (f"<tool_call>\n<json>\n{ADD_JSON}\n</json>\n</tool_call>", [ADD]),
    "a name alone in another tag within it": ('<tool_call><json>{"name": "now"}</json></tool_call>', [NOW]),
    "in a tag that is doubled": (f"<tool_call>\n{NOW_TAG}", [NOW]),
    "before tags that are text": (f"{NOW_TAG} with <tool_call>. <tool_", [NOW, "with <tool_call>. <tool_"]),
    "before a smaller-than": (f"{NOW_TAG} < b", [NOW, "< b"]),
    "after a call in bare JSON": (f"{ADD_JSON}\n{NOW_TAG}", [ADD, NOW]),
    "after the tools": (f"<tools>\n{TOOL}\n</tools>\n{ADD_TAG}", [f"<tools>\n{TOOL}\n</tools>", ADD]),
    "after an answer in JSON": (f'{{"id": 7, "sum": 3}}\n{NOW_TAG}', ['{"id": 7, "sum": 3}', NOW]),
    "before a call in bare JSON": (f"{NOW_TAG} {ADD_JSON}", [NOW, ADD]),
    # Qwen Coder
    "tools": (f"<tools>\n{ADD_JSON}\n</tools>", [ADD]),
    "two tools": (f"<tools>{ADD_JSON}</tools><tools>{NOW_JSON}</tools>", [ADD, NOW]),
    "tools among words": (f"Let me add.\n\n<tools>{ADD_JSON}</tools>\n\nDone!", ["Let me add.", ADD, "Done!"]),
    "tools that end as a call": (f"<tools>{ADD_JSON}</tool_call>", [ADD]),
    # Fences
    "a fence": (f"```json\n{ADD_JSON}\n```\n", [ADD]),
    "a fence without a language": (f"```\n{ADD_JSON}\n```", [ADD]),
    "a fence without an end": (f"```json\n{ADD_JSON}", [ADD]),
    "a fence in one line": (f"```json {ADD_JSON} ```", [ADD]),
    "a fence of a list": (f"```json\n{BOTH_JSON}\n```", [ADD, NOW]),
    "a fence of two": (f"```json\n{INDENTED}\n```", [ADD, NOW]),
    "two fences": (f"```json\n{ADD_JSON}\n```\n\n```\n{NOW_JSON}\n```\n", [ADD, NOW]),
    "a fence and then words": (f"```json\n{ADD_JSON}\n```\nThat adds.", [ADD, "That adds."]),
    "a fence and an end of the turn": (f"```json\n{ADD_JSON}\n```<|im_end|>", [ADD]),
    "a fence around the tag": (f"```xml\n{ADD_TAG}\n```", [ADD]),
    "a fence in the tag": (f"<tool_call>\n```json\n{INDENTED}\n```\n</tool_call>", [ADD, NOW]),
    "a fence in the tag, without line breaks": (f"<tool_call>```{ADD_JSON}```</tool_call>", [ADD]),
    "a fence in another tag": (f"<tools>\n```json\n{BOTH_JSON}\n```\n</tools>", [ADD, NOW]),
    **{f"a fence of {name}": (f"```{name}\n{ADD_JSON}\n```", [ADD]) for name in ("JSON", "tool_call", "python")},
    # Llama
    "bare": (f"\n\n {ADD_JSON}\n ", [ADD]),
    "bare with parameters first": ('{"parameters": {"a": 1}, "name": "add"}', [ADD]),
    "bare with a type": ('{"type": "function", "name": "add", "parameters": {"a": 1}}', [ADD]),
    "bare with function as the name": ('{"type": "function", "function": "add", "parameters": {"a": 1}}', [ADD]),
    "bare with semicolons": (f"{ADD_JSON};{NOW_JSON} ; {ADD_JSON}", [ADD, NOW, ADD]),
    "bare with a line break": (f"{ADD_JSON}\n{NOW_JSON}", [ADD, NOW]),
    "bare list": (BOTH_JSON, [ADD, NOW]),
    "bare nested": ('{"name": "add", "parameters": {"a": {"b": [{"c": {}}]}}}', [("add", {"a": {"b": [{"c": {}}]}})]),
    "bare and then words": (f"{ADD_JSON}\n\nWould you like more?", [ADD, "Would you like more?"]),
    "bare and then an unknown name": (f'{ADD_JSON}\n{{"name": "subtract"}}', [ADD, ("subtract", {})]),
    "bare and then an answer in a fence": (f'{ADD_JSON}\n```\n{{"a": 1}}\n```', [ADD, '```\n{"a": 1}\n```']),
    "python tag": (f"<|python_tag|>{ADD_JSON}", [ADD]),
    "a closing tag with bars": (f"<|tool_call|>{ADD_JSON}<|/tool_call|>", [ADD]),
    "python tag and two": (f"<|python_tag|>\n{ADD_JSON}; {NOW_JSON}\n", [ADD, NOW]),
    "python tag after words": (f"Let me add.\n<|python_tag|>{ADD_JSON}<|eom_id|>", ["Let me add.", ADD]),
    "python tag between words": (f"Let me <|python_tag|>{ADD_JSON} see", ["Let me", ADD, "see"]),
    "a function": ('<function=add>{"a": 1}</function>', [ADD]),
    "two functions": ('<function=add>{"a": 1}</function>\n<function=now>{}</function>', [ADD, NOW]),
    "a function among words": ('So: <function=add>{"a": 1}</function> Done.', ["So:", ADD, "Done."]),
    "a function without an end": ('<function=add>{"a": 1}', [ADD]),
    "a function and a brace too many": ('<function=add>{"a": 1}}</function>', [ADD]),
    # OpenAI's shape
    "OpenAI's shape": ('<tool_call>{"function": {"name": "add", "arguments": {"a": 1}}}</tool_call>', [ADD]),
    "bare, of OpenAI's shape": (r'{"id": "x", "function": {"name": "add", "arguments": "{\"a\": 1}"}}', [ADD]),
    # Other tags
    **{
        f"<{tag}>": (f"So: <{tag}>\n{ADD_JSON}\n</{tag}><{tag}>[{NOW_JSON}]</{tag}> Done", ["So:", ADD, NOW, "Done"])
        for tag in ("tool_calls", "function", "function_call", "function-call", "tool", "TOOLCALL", "call")
    },
    "a tag in a tag": (f"<tool_calls>\n{ADD_TAG}\n</tool_calls>", [ADD]),
    # Ends
    **{
        f"{place} and {end!r}": (f"{start}{end}", [ADD])
        for place, start in (("bare", ADD_JSON), ("in a tag", f"<tool_call>\n{ADD_JSON}"))
        for end in (
            *("</tool_calls>", "</tool_call", "</tool", "</", "\n</tool_call>\n", "</tool_call></tool_call>", "</s>"),
            *("<|eom_id|>", "<|im_end|>", "<|eot_id|>", "\n</tool_call><|im_end|>", "\n<|im_", "<|"),
        )
    },
    "a lonely closing tag and words": (f"{ADD_JSON}\n</tool_call>\nDone", [ADD, "Done"]),
    "a brace too many in two tags": (f"<tool_call>{ADD_JSON}}}</tool_call>\n{NOW_TAG}", [ADD, NOW]),
    "a brace too many before the next": (f"{ADD_JSON}}}\n{NOW_JSON}}}", [ADD, NOW]),
    "a brace too many in a fence": (f"```json\n{ADD_JSON}}}\n```", [ADD]),
    "a brace too many, and words": (f"{ADD_JSON}}} Would you?", [ADD, "Would you?"]),
    "brackets too many": (f"<tool_call>\n{BOTH_JSON}\n]]\n</tool_call>", [ADD, NOW]),
    # Names and arguments
    "an unknown name in a tag": ('<tool_call>{"name": "größe", "arguments": {}}</tool_call>', [("größe", {})]),
    **{
        f"arguments {given}": (f'<tool_call>{{"name": "now", "arguments": {given}}}', [NOW])
        for given in ("null", '""', '"{}"')
    },
    "no arguments": ('<tool_call>{"name": "now"}</tool_call>', [NOW]),
    "no arguments in another tag": ('<function>{"name": "now"}</function>', [NOW]),
    "arguments as a string": (r'<tool_call>{"name": "add", "arguments": "{\"a\": 1}"}</tool_call>', [ADD]),
    "null beside parameters": ('{"name": "add", "arguments": null, "parameters": {"a": 1}}', [ADD]),
    "none beside parameters": ('{"name": "add", "arguments": {}, "parameters": {"a": 1}}', [ADD]),
    "arguments beside no parameters": ('{"name": "add", "arguments": {"a": 1}, "parameters": {}}', [ADD]),
    **{
        f"an argument {key}": (f'{{"name": "add", "arguments": {{"{key}": "object"}}}}', [("add", {key: "object"})])
        for key in ("type", "properties")
    },
    "a description beside them": ('{"name": "add", "description": "Adds", "arguments": {"a": 1}}', [ADD]),
    "all types": (
        '<tool_call>{"name": "add", "arguments": {"a": ["é", -42, 3.5e2, true, null, {"b": []}]}}</tool_call>',
        [("add", {"a": ["é", -42, 350.0, True, None, {"b": []}]})],
    ),
    "raw line breaks": ('{"name": "add", "arguments": {"a": "x\n\ty\r\n"}}', [("add", {"a": "x\n\ty\r\n"})]),
    "tags, braces and quotes in a string": (
        f'<tool_call>{{"name": "add", "arguments": {{"a": {json.dumps(ODD_STRING)}}}}}</tool_call>.',
        [("add", {"a": ODD_STRING}), "."],
    ),
    # Calls, and results that the model makes up: the answer ends with the calls
    "a made-up result after a tag": (f"{ADD_TAG}\n<tool_response>\n3\n</tool_response>\nThat makes 3.", [ADD, END]),
    "a made-up result with nothing between": (f"{ADD_TAG}{NOW_TAG}<tool_response>3", [ADD, NOW, END]),
    "a made-up result and no closing tag": (f"<tool_call>{ADD_JSON}\n<tool_response>3</tool_response>", [ADD, END]),
    "a made-up result after bare JSON": (f"{ADD_JSON}\n<tool_response>\n3\n</tool_response> So, 3.", [ADD, END]),
    "a made-up result and a further call": (f"{ADD_TAG}<tool_response>3</tool_response>{NOW_TAG}", [ADD, END]),
}

TEXTS = {
    "nothing but white space": " \n\n ",
    "smaller-than": "a < b and c<d, <<, x <",
    "other tags": "Use <toolbox>, <tool>, <Tool_call>, <tool_calls> or </tool>.",
    "tag in prose": "Write <tool_call> to call, and </tool_call> after it. Not <tools> nor </tools>.",
    "tag at the end": "Write <tool_call> \n ",
    "tag cut off": "Write <tool_ca",
    "each prefix of a tag": " ".join("<tool_response>"[:n] + "|" + "<tools>"[:n] for n in range(16)),
    "tag in quotes": 'Between "<tool_call>" and "</tool_call>" stands JSON such as {"name": "add"}.',
    "closing tags": "</tool_call></tools></tool_response>",
    "a made-up result after words": 'See <tool_response>{"name": "add"}</tool_response> for it.',
    "a made-up result in JSON": '{"tool_response": {"result": 3}}',
    # Answers in JSON
    "JSON of a call's keys": '{"name": "Bob", "arguments": {"for": 1, "against": 2}}',
    "JSON of an unknown tool": '{"name": "subtract", "parameters": {"a": 1}}',
    "JSON with a type": '{"type": "object", "properties": {"name": {"type": "string"}}}',
    "JSON list": '[{"answer": 42}, 1]',
    "JSON list with a call and something else": f'[{ADD_JSON}, {{"answer": 42}}]',
    "names of tools": '[{"name": "add"}, {"name": "now"}]',
    "names of tools in lines": '{"name": "add"}\n{"name": "now"}',
    "names of tools in a fence": '```json\n[{"name": "add"}, {"name": "now"}]\n```',
    "the name of a tool in another tag": '<answer>{"name": "now"}</answer>',
    "an answer in a tag in a fence": '```xml\n<answer>\n{"name": "Rome", "arguments": {}}\n</answer>\n```',
    # Calls that do not stand on their own
    "a call between words": f"I would call {ADD_JSON} to add.",
    "a call after words in its line": f"So: {ADD_JSON}",
    "a call after words in its line, and a brace too many": f"So: {ADD_JSON}}}",
    "a call cut off after words in its line": f"So: {ADD_JSON[:-1]}",
    "a call before words in its line": f"So:\n{ADD_JSON} would add.",
    "a call in a numbered list": f"1. {ADD_JSON}",
    "a call in other JSON": f'{{"tool_calls": {BOTH_JSON}}}',
    "a call in code": f"```python\nllm.call('add', a=1)\ncalls = [now(), {ADD_JSON}]\n```",
    "a call in JSX": f"<App data={{{ADD_JSON}}} />",
    "Python's words after words": "Write [add(a=1), now()], or add(a=1).",
    "Python's literals after words": "Write {'name': 'add', 'parameters': {'a': 1}}.",
    "a function in another spelling after words": 'Write <function=add={"a": 1}</function>.',
    # The tools themselves
    "the tool": TOOL,
    "the tool, indented": json.dumps(json.loads(TOOL), indent=2),
    "the tool without arguments": TOOL_WITHOUT_ARGUMENTS,
    "the tool with a description alone": '<tools>{"name": "now", "description": "The time"}</tools>',
    "the tools": f"{TOOL}\n{TOOL_WITHOUT_ARGUMENTS}",
    "the tools in a list": f"[{UNDESCRIBED_TOOL}, {TOOL_WITHOUT_ARGUMENTS}]",
    "the tools in their tag": f"<tools>\n{UNDESCRIBED_TOOL}\n{TOOL_WITHOUT_ARGUMENTS}\n</tools>",
    "the tool in the tag of a call": f"<tool_call>\n{TOOL}\n</tool_call>",
    "the tool in another tag": f"<function>{OPENAI_TOOL}</function>",
    "the tools in a fence": f"```json\n[{OPENAI_TOOL}, {TOOL_WITHOUT_ARGUMENTS}]\n```",
    "the tools after words": f"I can use:\n{TOOL}\n{TOOL_WITHOUT_ARGUMENTS}",
    "the tools in a fence among words": f"I can use:\n```json\n{TOOL}\n{UNDESCRIBED_TOOL}\n```\nWhich one?",
    # Code and the like
    "HTML": '<!DOCTYPE html>\n<html><body class="add">{"name": "add"} [now()]</body></html>',
    "XML": '<?xml version="1.0"?>\n<tools><tool name="add"/>\n<function>now()</function></tools>',
    "XML in a tag of ours": "<tools>\n  <tool>now</tool>\n</tools>",
    "JSX": "<App>{now()}<b>{add({a: 1})}</b></App>",
    "code with calls": "```python\n[now() for _ in range(3)]\nadd(a=1)\n```",
    "code": 'def f():\n    return {"name": "add"}["name"] < "b" and f"{x!r}" or [[]]\n',
    "a fence of Python": '```python\nx = {"name": "add"}\n```\n',
    "a fence of JSON that is an answer": '```json\n{"answer": [1, {"name": "add"}]}\n```',
    "the start of a fence": "```js",
    "the start of JSON": '{"na',
    "brackets": "[[[[{",
    "a link": "[now](https://example.com) is the time.",
    "a function that is not offered": '<function=subtract>{"a": 1}</function>',
    "quotes": "'a' \"b\" 'c\" \\' \\\"",
    "no ASCII": "Привет < 𝄞 {é}\u2028[",
}

# What the model is asked about: an answer, the text before, and a word of what it is told.
ASKED: dict[str, tuple[str, Parts, str]] = {
    "cut off": ('<tool_call>{"name": "add", "arguments": {"a": 1', [], "not valid JSON"),
    "cut off in a string": ('<tool_call>{"name": "add", "arguments": {"a": "x}}</tool_call>', [], "not valid JSON"),
    "cut off after its first brace": ("<tool_call>{", [], "not valid JSON"),
    "cut off in a list": (f"<tool_call>[{ADD_JSON}", [], "not valid JSON"),
    "cut off in a fence": (f"```json\n{ADD_JSON[:-1]}\n```", [], "not valid JSON"),
    "cut off after a good one": (f'{NOW_TAG}<tool_call>{{"name"', [], "not valid JSON"),
    "bare and cut off": ('{"name": "add", "param', [], "not valid JSON"),
    "bare list and cut off": (f"[{ADD_JSON}, {NOW_JSON}", [], "not valid JSON"),
    "bare and cut off after a good one": (f"{ADD_JSON}\n{NOW_JSON[:-1]}", [], "not valid JSON"),
    "bare and broken": ('{"name": "add", "parameters": {a: 1}} Done.', [], "not valid JSON"),
    "text before it": ('Wait.\n<tool_call>{"name"', ["Wait.\n"], "not valid JSON"),
    "no brace at the end": ('<tool_call>{"name": "add", "arguments": {"a": 1}</tool_call>', [], "not valid JSON"),
    "a brace before it": (f"<tool_call>{{{ADD_JSON}}}</tool_call>", [], "not valid JSON"),
    "no value": ('<tool_call>{"name": "add", "arguments": {"a": }}</tool_call>', [], "not valid JSON"),
    "no quotes": ("<tool_call>{name: add, arguments: {a: 1}}</tool_call>", [], "not valid JSON"),
    "a function without arguments": ("<function=now></function>", [], "not valid JSON"),
    "a function with parameters": ("So:\n<function=add>\n<parameter=a>1</parameter>", ["So:\n"], "not valid JSON"),
    "tag and much white space": (f"<tool_call>{' ' * 400}{{}}", [], "not valid JSON"),
    "words in another tag within it": ("<tool_call><name>now</name></tool_call>", [], "not valid JSON"),
    "a name alone in the tag": ("<tool_call>\nnow\n</tool_call>", [], "not valid JSON"),
    "python tag and code": ("<|python_tag|>print(1)", [], "not valid JSON"),
    "a function in a tag": ("<tool_call>\n<function=add>\n<parameter=a>1</parameter>", [], "not valid JSON"),
    # Python, and other spellings of a function
    "Python's words": ("[add(a='x', b={}), now()]", [], ""),
    "Python's words in the tag": ("<tool_call>add(a=1)</tool_call>", [], "JSON"),
    "Python's words and python tag": ('So: <|python_tag|>add.call(a="x")', ["So: "], "JSON"),
    "Python's words in a function": ("So: <function=add>a=1</function> Done.", ["So: "], "JSON"),
    "Python's literals": ("{'name': 'add', 'parameters': {'a': 1}}", [], ""),
    "Python's literals in the tag": ("<tool_call>{'name': 'add', 'arguments': {'a': 1}}</tool_call>", [], "JSON"),
    "Python's constants": ('<tool_call>{"name": "add", "arguments": {"a": True}}</tool_call>', [], "JSON"),
    "a function with an equals sign": ('<function=add={"a": 1}</function>', [], ""),
    "a function with a space": ('<function=add {"a": 1}</function>', [], ""),
    # Names and arguments
    "no name": ('<tool_call>{"arguments": {"a": 1}}</tool_call>', [], '"name"'),
    **{
        f"the name {name}": (f'<tool_call>{{"name": {name}, "arguments": {{}}}}</tool_call>', [], '"name"')
        for name in ('""', "7", '["add"]', '"\\u001b[2J"')
    },
    "another key for arguments": ('<tool_call>{"name": "add", "args": {"a": 1}}</tool_call>', [], '"arguments"'),
    **{
        f"the arguments {given}": (f'<tool_call>{{"name": "add", "arguments": {given}}}</tool_call>', [], '"arguments"')
        for given in ("[1]", "1", "false", '"hello"', r'"{\"a\": 1} or so"', '"[1]"')
    },
    "bare, with arguments that are none": ('{"name": "add", "parameters": [1]}', [], '"arguments"'),
    **{
        f"{number} in {place}": (f'{start}{{"name": "add", "arguments": {{"a": [{number}]}}}}', [], "NaN")
        for number in ("NaN", "Infinity", "-Infinity", "1e999")
        for place, start in (("a tag", "<tool_call>"), ("bare JSON", ""))
    },
    "NaN in a string": (r'{"name": "add", "arguments": "{\"a\": NaN}"}', [], "NaN"),
    "a list with a call and a number": (f"<tool_call>[{ADD_JSON}, 2]</tool_call>", [], "JSON object"),
    "an empty list": ("<tool_call>[]</tool_call>", [], "JSON object"),
    "nested too deep": (f"<tool_call>{'[' * 100_000}</tool_call>", [], ""),
    "nested too deep and closed": (f"<tool_call>{'[' * 3000}{']' * 3000}</tool_call>", [], ""),
    # The model is to answer again with all its calls, so none of them comes out
    "before a good one": (f"Wait. <tool_call>{{}}</tool_call> Hello. {ADD_TAG}", ["Wait. "], '"name"'),
    "between words": (f"Wait. {NOW_TAG} <tool_call>[1] So.", ["Wait. "], "JSON object"),
    "before a made-up result": (
        'Wait. <tool_call>{"name": }</tool_call> <tool_response>',
        ["Wait. "],
        "not valid JSON",
    ),
    # On a line of its own or in a fence after words, it may be a call or an example
    "after words": (f"I would call\n{ADD_JSON}", ["I would call\n"], "tool call"),
    "after words, in a list": (f"So:\n{BOTH_JSON}\n", ["So:\n"], "tool call"),
    "after words, the second of two": (f"So: {ADD_JSON}\n{NOW_JSON}", [f"So: {ADD_JSON}\n"], "tool call"),
    "between words in lines of their own": (f"So:\n  {ADD_JSON}\nwould add.", ["So:\n  "], "tool call"),
    "after words, in a fence": (f"Like this:\n```json\n{INDENTED}\n```\n", ["Like this:\n"], "tool call"),
    "after words, in a fence that ends in its line": (f"So:\n```\n{ADD_JSON}```", ["So:\n"], "tool call"),
    "after words, in a fence without an end": (f"So:\n```json\n{ADD_JSON}", ["So:\n"], "tool call"),
    "in a fence between words": (f"So:\n```json\n{ADD_JSON}\n```\nThat would add.", ["So:\n"], "tool call"),
    "after words, and a brace too many": (f"So:\n{ADD_JSON}}}", ["So:\n"], "tool call"),
    "after words, and a lonely closing tag": (f"So:\n{ADD_JSON}\n</tool_call>", ["So:\n"], "tool call"),
    "after words, and an end of the turn": (f"So:\n{ADD_JSON}<|im_end|>", ["So:\n"], "tool call"),
    "after a call and words": (f"{ADD_JSON}\nAnd then\n{NOW_JSON}", [], "tool call"),
    # An answer that begins with a made-up result
    "a made-up result": ("<tool_response>\n3\n</tool_response>\nThat makes 3.", [], "a tool"),
    "a made-up result without an end": ("\n <tool_response>", ["\n "], "a tool"),
    "a made-up result before a call": (f"<tool_response>3</tool_response>{ADD_TAG}", [], "a tool"),
    "a made-up result in a fence": ("```xml\n<tool_response>3</tool_response>\n```", [], "a tool"),
}

# What Qwen2.5-Coder 1.5B wrote in the runs of real_model.py, after how it is read: as calls of these tools, as text, or
# as something that the model is asked about.
REAL = """
== asked
To get the profile of the user with ID 31, I will call the get_user tool.
{"name": "get_user", "arguments": {"user_id": 31}}
== asked
To convert 125 euros to dollars, you can use the `convert_currency` tool. Here's how you can call it:

```json
{
  "name": "convert_currency",
  "arguments": {
    "amount": 125,
    "from_currency": "eur",
    "to_currency": "usd"
  }
}
```

This will return the equivalent amount in dollars.
== asked
<tool_response>{"weather": "sunny", "temperature": "20°C", "unit": "celsius"}</tool_response>
== text
```json
{
  "tool_response": "Event created successfully."
}
```
== asked
<tool_response>{"name": "get_user", "arguments": {"user_id": 123}}
== multiply, add
{"name": "multiply", "arguments": {"a": 12, "b": 13}}
{"name": "add", "arguments": {"a": 100, "b": {"name": "multiply", "arguments": {"a": 12, "b": 13}}}}
== get_weather, get_weather
{"name": "get_weather", "arguments": {"city": "Paris", "unit": "celsius"}}
{"name": "get_weather", "arguments": {"city": "Rome", "unit": "celsius"}}
== get_user
```json
{
  "name": "get_user",
  "arguments": {
    "user_id": 12345
  }
}
```
== find_user, send_email
{"name": "find_user", "arguments": {"name": "Alice Smith"}}
{"name": "send_email", "arguments": {"to": ["Alice Smith"], "subject": "Invoice", "body": "It is attached.", "cc": \
null}}
== text
{
  "name": "get_user",
  "email": "example@example.com"
}
== text
```json
{
  "result": "Light in living room turned on at 40%"
}
```
== text
{"name": "Rex", "age": 3}
== text
To find the e-mail address of the user Alice Smith, I will call the `find_user` tool with the arguments {"name": \
"Alice Smith"}.
== text
To convert 250 US dollars to euros, you can use the `convert_currency` tool with the following arguments:
```json
{
  "amount": 250,
  "from_currency": "USD",
  "to_currency": "EUR"
}
```
The result will be the amount in euros.
== text
1. {"name": "get_weather", "arguments": {"city": "London", "unit": "celsius"}}
"""

ANSWERS: list[tuple[str, Parts, str | None]]  # the last is None if the model is asked about nothing
ANSWERS = [*((text, [text], None) for text in TEXTS.values()), *((*row, None) for row in CALLS.values())]
ANSWERS += ASKED.values()
REAL_NAMES = {"add", "convert_currency", "find_user", "get_user", "get_weather", "multiply", "send_email"}
REAL_ANSWERS = [answer.removesuffix("\n").split("\n", 1) for answer in REAL.split("\n== ")[1:]]


@pytest.mark.parametrize(("text", "parts", "problem"), ANSWERS, ids=[*TEXTS, *CALLS, *ASKED])
def test_answer_is_read_in_every_cutting(text: str, parts: Parts, problem: str | None) -> None:
    """It is text, or text and calls in order, or the model is asked about it; and the same however it is cut."""
    whole = read(text)
    if problem is None:
        assert not whole.message
        assert parts in (whole.parts, without_space(whole.parts))
    else:
        assert whole.correction, f"no correction, but {whole}"
        assert whole.parts == parts
        assert "it begins: " in whole.message
        assert "<tool_call>" in whole.correction
        for words in (whole.message, whole.correction):
            assert problem in words
            assert words.isprintable()
    for pieces in cuttings(text):
        assert read(*pieces) == whole


@pytest.mark.parametrize(("kind", "text"), REAL_ANSWERS, ids=range(len(REAL_ANSWERS)))
def test_answer_of_a_real_model_is_read_in_every_cutting(kind: str, text: str) -> None:
    """Its calls are made, its made-up results and calls after words are put to it, and its JSON is text."""
    for pieces in ([text], *cuttings(text)):
        parts, _, correction = read(*pieces, names=REAL_NAMES)
        calls = ", ".join(part[0] for part in parts if not isinstance(part, str))
        assert kind == ("asked" if correction else calls or "text")
        assert kind != "text" or parts == [text]


def test_each_call_has_an_id_of_its_own() -> None:
    """The same call twice is two calls, in one answer as in two."""
    calls = [call for text in (ADD_TAG * 2, ADD_TAG) for call in ToolCallParser(NAMES).feed([text], end=True)]
    ids = [call.tool_call_id for call in calls if isinstance(call, llm.ToolCall)]
    assert len(set(ids)) == 3
    assert all(isinstance(name, str) and name for name in ids)


@pytest.mark.parametrize("depth", [100, 101, 900, 970, 990, 1_000, 5_000, 9_990, 100_000])
@pytest.mark.parametrize("tag", ["<tool_call>", ""], ids=["tagged", "bare"])
def test_nesting_of_any_depth_raises_nothing(tag: str, depth: int) -> None:
    """Arguments that are nested too deeply are a broken call, and never an exception: neither where Python cannot read
    them, nor a little before that, where `llm` could not log them."""
    nested = '{"a": ' * depth + "1" + "}" * depth
    parts, message, _ = read(f'{tag}{{"name": "add", "arguments": {nested}}}')
    assert [part[0] for part in parts] == (["add"] if depth == 100 else [])
    assert bool(message) == (depth > 100)


# Bounds and cost


@pytest.mark.parametrize("start", [f"<tool_call>{ADD_JSON[:-3]}, ", '{"name": "add", "parameters": {"a": "'])
@pytest.mark.parametrize("again", ["x", "{", '"', "\\", " "])
def test_call_larger_than_the_bound(start: str, again: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A call that never ends is an error at the bound, and not much more than that is kept of it."""
    bound, block = 128 * KIB, again * KIB
    monkeypatch.setattr(llm_autonomous, "MAX_EVENT_BYTES", bound)
    parser = ToolCallParser(NAMES)
    tracemalloc.start()
    try:
        out = parser.feed([start]) + [part for _ in range(5 * bound // KIB) for part in parser.feed([block])]
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert out == []
    assert parser.error
    assert "a tool call larger than" in parser.error.message
    assert parser.error.correction is None  # it would have to be sent again
    assert peak < 4 * bound


def test_bound_is_for_calls_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Text before a call may have any length."""
    monkeypatch.setattr(llm_autonomous, "MAX_EVENT_BYTES", KIB)
    assert read(*in_pieces("y" * 9 * KIB + ADD_TAG, 100)) == Outcome(["y" * 9 * KIB, ADD])


ENDLESS = {  # what comes first, and what again and again
    "<": ("", "<"),
    "{": ("", "{"),
    "[": ("", "["),
    "white space": ("", " "),
    "fences": ("", "``` "),
    "tags": ("", "<tool_call>"),
    "tags of a result": ("", "<tool_response>"),
    "half a tag": ("Text ", "<tool_"),
    "words": ("", "word "),
    "long string with escapes": ('<tool_call>{"a": "', '\\"'),
    "braces in a tag": ("<tool_call>", "{"),
    "strings in a tag": ("<tool_call>{", '"a",'),
    "quotes in a tag": ("<tool_call>{", "'\""),
    "calls": ("", NOW_TAG),
    "calls in one tag": ("<tool_call>", '{"name": "now"}\n'),
    "white space after a call": (NOW_TAG, " "),
    "< after a call": (NOW_TAG, "<"),
    "; after a call": (NOW_TAG[:-12], ";"),
    "words after a call": (NOW_TAG, "word "),
    "bare string with braces and words": ('{"name": "add", "parameters": {"a": "', "} word "),
    "bare calls": ("", f"{NOW_JSON}\n"),
    "bare and open quotes": ('{"name": "add", x"', '\\"'),
    "bare and brackets": ('{"name": "add", "parameters": ', "["),
    "bare and then words": (f"{NOW_JSON} ", "word "),
    "made-up result": (f"{NOW_TAG}<tool_response>", "<tool_call>{"),
    "made-up results in an argument": ('<tool_call>{"name": "add", "arguments": {"a": "', "<tool_response>"),
    "brackets in lines": ("Say:\n", '{"name":\n["add",\n'),
    "brackets in a line": ("Say: ", '{"name": "add", '),
    "calls after words": ("Say: ", f"{ADD_JSON} "),
}


@pytest.mark.parametrize(("start", "again"), ENDLESS.values(), ids=ENDLESS)
def test_cost_is_linear(start: str, again: str, cpu_guard: None) -> None:
    """Half a megabyte of anything, in small pieces, is read in moments."""
    parser = ToolCallParser(NAMES)
    for piece in in_pieces(start + again * (512 * KIB // len(again)), 16):
        parser.feed([piece])
    parser.feed([], end=True)


# Properties

RICH = [
    *"<>{}[]\"'`\\/:,; \n\ta1é𝄞",
    *("<tool_call", "tool_call>", "</tool_call>", "</tools>", "<tool_", "<tool_response", "<function>", "<function="),
    *("```", "```json\n", "<|", "<|im_end|>", "<|python_", "<b>", "</b>", "<answer>", "json", "if a < b: ", "\u2028"),
    *('"name"', '{"name": ', '{"type": ', "{'name'", '{"name": "Bob"}', '{"a": 1}', "[{", "}]", "}}", "\n\n", "\\n"),
]
TAGS = ["<tool_call>", "<tools>", "<|python_tag|>"]
NAMING = [ADD_JSON, NOW_JSON, NOW_TAG, BOTH_JSON, ADD_JSON[:-1], TOOL, OPENAI_TOOL, '{"name": "now"}']
ODD = ["<tool_call>{", "<tools>[", '{"name": "add", "x": ', '<function=add>{"a": 1}</function>', "<function=now>"]
ODD += ["[add(a=1)]", "[now", "now(", "<tool_response>", '{"tool_response": 1}', "NaN"]


def texts_of(words: list[str], max_size: int = 14) -> st.SearchStrategy[str]:
    return st.lists(st.sampled_from(words) | st.text(max_size=4), max_size=max_size).map("".join)


# A call has a tag of ours and a bracket, or it names a tool.
NO_CALLS = texts_of(RICH).filter(lambda text: not any(tag in text for tag in (*TAGS, "<tool_response>")))
NO_CALLS |= texts_of([*TAGS, *(words for words in RICH if not set(words) & set("[{"))]).map("So {}".format)


@st.composite
def cut(draw: st.DrawFn, text: str) -> list[str]:
    """A text in pieces, some of which may be empty."""
    if draw(st.booleans()):
        return in_pieces(text, draw(st.integers(1, 3)))
    edges = sorted(draw(st.lists(st.integers(0, len(text)), max_size=8)))
    return [text[start:end] for start, end in zip([0, *edges], [*edges, len(text)], strict=True)]


@examples
@given(NO_CALLS, st.data())
def test_any_text_without_a_call_is_untouched_and_does_not_wait(text: str, data: st.DataObject) -> None:
    """Whatever it is rich in, text comes out as it is, for any cutting, and little of it is held before the end."""
    text += " and so on" * 40
    parser, out, arrived = ToolCallParser(NAMES), "", 0
    for piece in data.draw(cut(text)):
        out, arrived = out + "".join(parser.feed([piece])), arrived + len(piece)
        assert arrived - len(out) < MAX_HELD
    assert out + "".join(parser.feed([], end=True)) == text
    assert (parser.error, parser.finished) == (None, False)


STRINGS = st.text(max_size=8) | texts_of([*RICH, *TAGS, *NAMING], max_size=4)
ARGUMENTS = st.dictionaries(
    STRINGS,
    st.recursive(
        st.none() | st.booleans() | st.integers(-(2**40), 2**40) | STRINGS,
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(STRINGS, inner, max_size=3),
        max_leaves=5,
    ),
    max_size=3,
)


@st.composite
def tagged_calls(draw: st.DrawFn) -> tuple[str, Parts]:
    """A call in one of its forms in tags, and what it says."""
    name, arguments = draw(st.sampled_from(["add", "now", "unknown"])), draw(ARGUMENTS)
    call: dict[str, Any] = {"name": name, draw(st.sampled_from(["arguments", "parameters"])): arguments}
    value = draw(st.sampled_from([call, [call], {"type": "function", "function": call}]))
    written = json.dumps(value, ensure_ascii=draw(st.booleans()), indent=draw(st.sampled_from([None, 1])))
    tag, space = draw(st.sampled_from(["tool_call", "tools"])), draw(st.sampled_from(["", "\n", " \n "]))
    return f"<{tag}>{space}{written}{space}</{tag}>", [(name, arguments)]


WORDS = NO_CALLS.map("Say {} so.".format).map(lambda text: (text, [text]))


@examples
@given(st.lists(WORDS | tagged_calls(), min_size=1, max_size=5), st.data())
def test_any_mixture_of_text_and_calls_comes_in_order(mixture: list[tuple[str, Parts]], data: st.DataObject) -> None:
    """Texts and calls come as they were written, but for white space next to a call."""
    text = "".join(written for written, _ in mixture)
    outcome = read(*data.draw(cut(text)))
    assert not outcome.message
    assert without_space(outcome.parts) == without_space(joined([part for _, parts in mixture for part in parts]))
    assert outcome == read(text)


@examples
@given(texts_of([*RICH, *TAGS, *NAMING, *ODD], max_size=9), st.data())
def test_any_cutting_of_anything_gives_the_same(text: str, data: st.DataObject) -> None:
    """Also what is broken is read alike, and ends in text, calls, or one error that can be put to the model."""
    outcome = read(*data.draw(cut(text)))
    assert outcome == read(text)
    assert bool(outcome.message) == bool(outcome.correction)
    assert outcome.message.isprintable()
    assert outcome.parts or outcome.message or not text.strip()
