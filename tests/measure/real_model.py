"""How well a real model calls tools and fills in schemas through the plugin: the tasks of tasks.py, counted.

    python tests/measure/real_model.py --to http://127.0.0.1:18080/v1 --results plugin.jsonl
    python tests/measure/real_model.py --to http://127.0.0.1:18080/v1 --results native.jsonl --baseline
    python tests/measure/real_model.py --table plugin.jsonl native.jsonl

Each task is a whole chain through `llm`, streamed: the prompt, the calls, their results, and the final answer. Every
task adds a line of JSON to the results, so a run that was stopped goes on where it was. It is not part of CI.

The counts are strict. The calls are *right* if they are exactly the wanted ones, in any order, with the wanted
arguments: one that was made twice is wrong. A task is *right to the end* if the final answer says what it should as
well, nothing failed, and no tags or calls are shown.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import re
import runpy
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import jsonschema
import llm
import openai
from llm.default_plugins.openai_models import Chat
from tasks import SETS, Call, Task, arguments_match

import llm_autonomous

sys.path.append(str(Path(__file__).parents[1]))
from bridge import LEFT, Bridge, Exchange

CHAIN_LIMIT = 8  # replies to one prompt. No task needs more than four.
TIMEOUT = 3600.0  # seconds. A slow machine changes no outcome.

Outcome = dict[str, Any]


class Native(Chat):
    """llm's own OpenAI plugin, with the same sampling as the bridge."""

    def __init__(self, name: str, url: str, fields: dict[str, Any]) -> None:
        super().__init__("baseline", "none", name, url, supports_tools=True, supports_schema=True)
        self.fields = fields

    def build_kwargs(self, prompt: llm.Prompt, stream: bool) -> dict[str, Any]:
        return {**super().build_kwargs(prompt, stream), "extra_body": self.fields}


class Unreachable(Exception):
    """The server cannot be reached, or answers with an error, which says nothing about the model."""


def run_task(task: Task, model: Any, bridge: Bridge | None, exchanges: list[Exchange]) -> Outcome:
    """What came of a task: what the model did, and whether it was right. The bridge records ``exchanges``, if any."""
    exchanges.clear()
    conversation = model.conversation()
    shown, error, turns, begin = "", "", [], time.monotonic()
    try:
        for turn in task.turns:
            before = len(conversation.responses)
            chain = conversation.chain(
                turn.prompt,
                tools=list(task.tools),
                schema=task.schema,
                stream=model.can_stream,
                chain_limit=CHAIN_LIMIT,
                options={"timeout": TIMEOUT} if bridge else {},
            )
            for text in chain:
                shown += text
            replies = conversation.responses[before:]
            turns.append((calls_of(replies), replies[-1].text()))
    except openai.APIConnectionError as failure:
        raise Unreachable(str(failure)) from None
    except Exception as failure:  # whatever the user would see
        error = f"{type(failure).__name__}: {failure}".replace(f"127.0.0.1:{bridge.port if bridge else 0}: ", "")
        turns.append((calls_of(conversation.responses[before:]), ""))
    while bridge and bridge.active:
        time.sleep(0.001)
    if not bridge:
        exchanges = [native_exchange(response) for response in conversation.responses]
    for exchange in exchanges:
        if exchange.get("error", LEFT) != LEFT or exchange.get("status", 200) not in (200, 400, 500):
            raise Unreachable(exchange.get("error") or exchange["text"])
    usages = [exchange.get("usage") or {} for exchange in exchanges]
    return {
        "id": task.id,
        "kind": task.kind,
        "tools": len(task.tools),
        **judge(task, turns, shown),
        "error": error,
        "calls": [calls for calls, _ in turns],
        "shown": shown,
        "first_prompt_tokens": usages[0].get("prompt_tokens", 0) if usages else 0,
        "prompt_tokens": sum(usage.get("prompt_tokens", 0) for usage in usages),
        "completion_tokens": sum(usage.get("completion_tokens", 0) for usage in usages),
        "seconds": round(time.monotonic() - begin, 1),
        "exchanges": [*exchanges],
    }


def calls_of(responses: Iterable[Any]) -> list[Call]:
    return [(call.name, call.arguments) for response in responses if response._done for call in response.tool_calls()]


def native_exchange(response: Any) -> Exchange:
    """What the log of the bridge would say of a response that did not come through it."""
    if not response._done:
        return {"messages": [], "text": ""}
    results = [{"role": "tool", "content": result.output} for result in response.prompt.tool_results]
    prompt = [{"role": "user", "content": response.prompt.prompt}] if response.prompt.prompt else []
    usage = response.usage()
    calls = [f"[calls {call.name} with {json.dumps(call.arguments)}]" for call in response.tool_calls()]
    return {
        "messages": prompt + results,
        "text": "\n".join((response.text(), *calls)).strip(),
        "usage": {"prompt_tokens": usage.input or 0, "completion_tokens": usage.output or 0},
    }


def judge(task: Task, turns: list[tuple[list[Call], str]], shown: str) -> dict[str, bool]:
    """Whether a task is right, by the calls and the final answer of each turn (empty if it failed)."""
    pairs = list(zip(task.turns, turns, strict=False))  # there are fewer if a turn failed
    unmatched = [match_calls(calls, turn.calls) for turn, (calls, _) in pairs]
    calls_right = len(turns) == len(task.turns) and not any(missing or needless for missing, needless in unmatched)
    raw = task.schema is None and shows_raw(shown, [tool.__name__ for tool in task.tools])
    if task.schema is None:
        answered = all(re.search(turn.final, text, re.I | re.S) for turn, (_, text) in pairs)
    else:
        answered = value_right(task, turns[-1][1])
    return {
        "calls_right": calls_right,
        "right": calls_right and answered and not raw,
        "raw": raw,
        "needless_call": any(needless for _, needless in unmatched),
    }


def match_calls(made: Iterable[Call], wanted: Iterable[Call]) -> tuple[list[Call], list[Call]]:
    """The wanted calls that were not made, and those that were made and not wanted."""
    missing, needless = list(wanted), []
    for call in made:
        name, arguments = call
        found = next((one for one in missing if one[0] == name and arguments_match(arguments, one[1])), None)
        if found:
            missing.remove(found)
        else:
            needless.append(call)
    return missing, needless


def shows_raw(text: str, names: list[str]) -> bool:
    """Whether the user is shown the tags that tools are called with, or the JSON of a call of an offered tool."""
    quoted_names = "|".join(map(re.escape, names))
    call = rf"""["'](name|function)["']\s*:\s*["']({quoted_names})["']\s*,\s*["'](arguments|parameters)["']"""
    return any(tag in text for tag in ("<tool_call", "<tool_response", "<tools>")) or re.search(call, text) is not None


def value_right(task: Task, text: str) -> bool:
    try:
        value = json.loads(text)
        jsonschema.validate(value, task.schema)
        return bool(task.check(value))
    except (ValueError, LookupError, TypeError, jsonschema.ValidationError):
        return False


# The counts


def of_kind(*kinds: str) -> Callable[[Outcome], bool]:
    return lambda outcome: outcome["kind"] in kinds


COUNTS: tuple[tuple[str, Callable[[Outcome], bool], str], ...] = (
    ("tool tasks whose calls were right", of_kind("tool"), "calls_right"),
    ("tool tasks right to the end", of_kind("tool"), "right"),
    ("no tool needed: no call, and answered properly", of_kind("no tool"), "right"),
    ("schemas: valid and right", of_kind("schema"), "right"),
    ("a tool and a schema together: right to the end", of_kind("both"), "right"),
    ("raw tags or calls shown as the answer", of_kind("tool", "no tool"), "raw"),
    ("a call that was not wanted", of_kind("tool", "no tool", "both"), "needless_call"),
    ("ended in an error", lambda outcome: True, "error"),
)
MEANS: tuple[tuple[str, Callable[[Outcome], bool]], ...] = (
    ("tokens of the first prompt: one tool", lambda outcome: outcome["tools"] == 1 and outcome["kind"] != "both"),
    ("tokens of the first prompt: five tools", lambda outcome: outcome["tools"] == 5 and outcome["kind"] != "both"),
    ("tokens of the first prompt: a schema", of_kind("schema")),
)


def table(columns: dict[str, list[Outcome]]) -> str:
    """The counts of one or more runs side by side, in Markdown."""
    rows = [["", *columns], ["---"] * (len(columns) + 1)]
    for words, belongs, key in COUNTS:
        rows.append([words])
        for outcomes in columns.values():
            counted = [bool(outcome[key]) for outcome in outcomes if belongs(outcome)]
            rows[-1].append(f"{sum(counted)} of {len(counted)}")
    for words, belongs in MEANS:
        rows.append([f"{words}, mean"])
        for outcomes in columns.values():
            tokens = [outcome["first_prompt_tokens"] for outcome in outcomes if belongs(outcome)]
            rows[-1].append(f"{sum(tokens) / len(tokens):.0f}" if tokens else "-")
    for key in ("prompt_tokens", "completion_tokens", "seconds"):
        rows.append([f"{key.replace('_', ' ')}, all together"])
        rows[-1] += [f"{sum(outcome[key] for outcome in outcomes):.0f}" for outcomes in columns.values()]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def summary(outcome: Outcome) -> str:
    """One line on a task."""
    marks = [word for key, word in (("raw", "RAW"), ("needless_call", "CALL NOT WANTED")) if outcome[key]]
    if not outcome["calls_right"]:
        marks.append("calls wrong")
    marks += [outcome["error"]] if outcome["error"] else []
    right = "right" if outcome["right"] else "WRONG"
    return f"{outcome['id']:4} {right} {outcome['seconds']:5.1f} s  {'; '.join(marks)}".rstrip()


def transcript(outcome: Outcome) -> str:
    """Everything that was sent to the model and that it wrote, each message once."""
    lines, before = [], []
    for exchange in outcome["exchanges"]:
        for message in exchange["messages"]:
            if message not in before:
                lines.append(f"--- {message['role']}\n{message['content']}")
        before = exchange["messages"]
        lines.append(f"--- the model\n{exchange['text']}")
    return "\n".join([f"=== {summary(outcome)}", *lines, ""])


def read_results(path: Path) -> dict[str, Outcome]:
    """The last outcome of each task in a file of results."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return {outcome["id"]: outcome for outcome in map(json.loads, lines)}


def fingerprint(options: argparse.Namespace) -> str:
    """What the outcomes depend on, besides the tasks: a task is run again if this has changed."""
    files = [options.words] if options.words else []
    files += [] if options.baseline else [llm_autonomous.__file__]
    names = ("baseline", "model", "service_model", "max_tokens", "whole", "cache")
    settings = [getattr(options, name) for name in names]
    return hashlib.sha256(repr((settings, [Path(file).read_text() for file in files])).encode()).hexdigest()[:12]


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description="Run the tasks of tests/measure/tasks.py on a real model, and count.")
    parser.add_argument("--to", metavar="URL", help="an OpenAI-compatible server, such as http://127.0.0.1:18080/v1")
    parser.add_argument("--model", default="qwen", help="the name of the model at that server")
    parser.add_argument("--results", type=Path, metavar="FILE", help="where each outcome goes, as a line of JSON")
    parser.add_argument(
        "--baseline", action="store_true", help="llm's own OpenAI plugin, with the server's native tools"
    )
    parser.add_argument("--words", metavar="FILE", help="run this Python file first, which changes llm_autonomous")
    parser.add_argument("--set", action="append", choices=SETS, help="of tasks; may be repeated. Default: open")
    parser.add_argument("--task", action="append", metavar="ID", help="this task alone; may be repeated")
    parser.add_argument("--again", action="store_true", help="run tasks that the results have already")
    parser.add_argument("--transcript", action="store_true", help="print all that was sent and written")
    parser.add_argument("--whole", action="store_true", help="ask for replies that are not streamed")
    parser.add_argument(
        "--cache",
        action="store_true",
        help="let llama.cpp reuse what it has computed for earlier prompts: faster, but then they change the outcomes",
    )
    parser.add_argument("--service-model", default="qwen_coder", help="the plugin's model. Default: qwen_coder")
    parser.add_argument("--max-tokens", type=int, default=1024, help="the longest reply. Default: 1024")
    parser.add_argument("--table", type=Path, nargs="+", metavar="FILE", help="only print the counts of these results")
    options = parser.parse_args(arguments)
    tasks = {task.id: task for name in (SETS if options.task else options.set or ["open"]) for task in SETS[name]}
    if unknown := set(options.task or ()) - set(tasks):
        parser.error(f"there is no task {', '.join(sorted(unknown))}")
    tasks = {id: tasks[id] for id in options.task or tasks}
    if options.table:
        read = {path.stem: read_results(path) for path in options.table}
        print(table({name: [found[id] for id in tasks if id in found] for name, found in read.items()}))
        return 0
    if not (options.to and options.results):
        parser.error("--to and --results are needed to run tasks")
    if options.words:
        runpy.run_path(options.words)
    done, mark = read_results(options.results), fingerprint(options)
    try:
        run_tasks(tasks.values(), options, done, mark)
    except Unreachable as failure:
        print(f"the run ends here, because the server does not answer: {failure}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped; the same command goes on from here", file=sys.stderr)
        return 130
    print(table({options.results.stem: [done[id] for id in tasks]}))
    return 0


def run_tasks(tasks: Iterable[Task], options: argparse.Namespace, done: dict[str, Outcome], mark: str) -> None:
    """Run the tasks that are not done yet, and print what came of each."""
    fields = {"temperature": 0, "seed": 1, "max_tokens": options.max_tokens}
    if not options.cache:
        fields["cache_prompt"] = False
    exchanges: list[Exchange] = []
    bridge = None
    with contextlib.ExitStack() as stack:
        if options.baseline:
            model: Any = Native(options.model, options.to, fields)
        else:
            bridge = stack.enter_context(Bridge(options.to, options.model, fields, record=exchanges.append))
            os.environ.update({"AUTONOMOUS_BASE_URL": bridge.url, "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"})
            model = llm.get_model(f"autonomous-{options.service_model}")
        model.can_stream = not options.whole
        file = stack.enter_context(options.results.open("a", encoding="utf-8", buffering=1))
        for task in tasks:
            if options.again or done.get(task.id, {}).get("fingerprint") != mark:
                outcome = {"fingerprint": mark, **run_task(task, model, bridge, exchanges)}
                file.write(json.dumps(outcome, ensure_ascii=False) + "\n")
                done[task.id] = outcome
            print(transcript(done[task.id]) if options.transcript else summary(done[task.id]), flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
