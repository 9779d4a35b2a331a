"""tests/measure/real_model.py counts what it should. The model is a script here; the real one is not part of CI."""

from __future__ import annotations

import gc
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import real_model
from conftest import NOWHERE
from loopback import Answer, Connection, Loopback, Request
from tasks import SETS, Call, Optional, arguments_match, one_of, pattern

import llm_autonomous

CALL = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "berlin"}}\n</tool_call>'


def write(*replies: Any) -> Answer:
    """A model that writes these replies, one after another."""
    rest = iter(replies)

    async def answer(request: Request, connection: Connection) -> None:
        reply = next(rest)
        message = {"role": "assistant", **(reply if isinstance(reply, dict) else {"content": reply})}
        usage = {"prompt_tokens": 100, "completion_tokens": 10, "total_tokens": 110}
        completion = {"id": "1", "model": "tiny", "object": "chat.completion", "usage": usage}
        choice = {"index": 0, "message": message, "finish_reason": "stop"}
        await connection.whole(json.dumps({**completion, "choices": [choice]}).encode())

    return answer


@pytest.fixture
def upstream(monkeypatch: pytest.MonkeyPatch) -> Iterator[Loopback]:
    for name in ("AUTONOMOUS_BASE_URL", "NO_PROXY", "no_proxy"):  # which a run sets
        monkeypatch.setenv(name, "127.0.0.1")
    with Loopback() as server:
        yield server


def run(upstream: Loopback, results: Path, *arguments: str, replies: tuple[Any, ...]) -> Any:
    """The outcomes of a run of the tasks that ``arguments`` name, by their ids."""
    upstream.answer = write(*replies)
    command = ["--to", f"{upstream.url}/v1", "--results", str(results), "--whole", *arguments]
    assert real_model.main(command) == 0
    return real_model.read_results(results)


@pytest.mark.parametrize(
    ("task", "replies", "verdict"),
    [
        ("T01", (CALL, "17 degrees"), {"right", "calls_right"}),
        ("T01", (CALL, "I don't know"), {"calls_right"}),
        ("T01", (CALL, CALL, "17 degrees"), {"needless_call"}),
        ("T01", (CALL.replace("berlin", "Bern"), "17 degrees"), {"needless_call"}),
        ("T01", ("It is raining",), set()),
        ("N02", ("Paris",), {"right", "calls_right"}),
        ("N02", (CALL, "Paris"), {"needless_call"}),
        ("N02", ("Rome",), {"calls_right"}),
        ("S01", ('{"name": "Rex", "age": 3}',), {"right", "calls_right"}),
        ("S01", ('{"name": "Rex", "age": 4}',), {"calls_right"}),
        ("S01", ("Rex is three", "Three"), {"calls_right", "error"}),
    ],
)
def test_a_task_is_judged(
    task: str, replies: tuple[str, ...], verdict: set[str], upstream: Loopback, tmp_path: Path
) -> None:
    """By its calls, its final answer, and what the user is shown."""
    outcome = run(upstream, tmp_path / "results.jsonl", "--task", task, replies=replies)[task]
    keys = ("right", "calls_right", "raw", "needless_call", "error")
    assert {key for key in keys if outcome[key]} == verdict
    assert [exchange["text"] for exchange in outcome["exchanges"]] == [*replies]
    assert (outcome["first_prompt_tokens"], outcome["prompt_tokens"]) == (100, 100 * len(replies))


def test_a_run_goes_on_where_it_was(upstream: Loopback, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What has an outcome is not run again, and counts; with other words it is run again."""
    results, words = tmp_path / "results.jsonl", tmp_path / "words.py"
    run(upstream, results, "--task", "N02", replies=("Paris",))
    run(upstream, results, "--task", "N02", "--task", "T01", replies=(CALL, "17 degrees"))
    assert "| tool tasks right to the end | 1 of 1 |\n| no tool needed: no call, and answered properly | 1 of 1 |" in (
        capsys.readouterr().out
    )
    words.write_text("import llm_autonomous\nllm_autonomous.TOOL_INSTRUCTIONS = 'Tools: {tools}'")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(llm_autonomous, "TOOL_INSTRUCTIONS", "")  # to be put back
        outcome = run(upstream, results, "--task", "N02", "--words", str(words), replies=("Rome",))["N02"]
    assert not outcome["right"]
    assert outcome["exchanges"][0]["messages"][0]["content"].startswith("Tools: {")
    assert len(results.read_text().splitlines()) == 3


@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_the_baseline_uses_native_tools(upstream: Loopback, tmp_path: Path) -> None:
    """The same task through llm's own OpenAI plugin, with the same sampling."""
    function = {"name": "get_weather", "arguments": '{"city": "Berlin"}'}
    call = {"content": None, "tool_calls": [{"id": "1", "type": "function", "function": function}]}
    results = tmp_path / "results.jsonl"
    outcome = run(upstream, results, "--task", "T01", "--baseline", replies=(call, "17 degrees"))["T01"]
    assert outcome["right"]
    assert (outcome["first_prompt_tokens"], outcome["prompt_tokens"]) == (100, 200)
    sent = upstream.last.payload
    assert (sent["temperature"], sent["seed"], sent["cache_prompt"], sent.get("stream")) == (0, 1, False, False)
    assert [tool["function"]["name"] for tool in sent["tools"]] == ["get_weather"]
    gc.collect()  # llm's plugin leaves its connections open: the warning about them belongs here


@pytest.mark.filterwarnings("ignore::ResourceWarning")
@pytest.mark.parametrize("mode", [[], ["--baseline"]])
def test_a_server_that_cannot_be_reached_is_no_outcome(
    mode: list[str], upstream: Loopback, tmp_path: Path, no_backoff: None, capsys: pytest.CaptureFixture[str]
) -> None:
    """The run ends, and the task is run again the next time."""
    results = tmp_path / "results.jsonl"
    assert real_model.main(["--to", f"{NOWHERE}/v1", "--results", str(results), *mode]) == 1
    assert "the server does not answer" in capsys.readouterr().err
    assert results.read_text() == ""


@pytest.mark.parametrize(
    ("shown", "raw"),
    [
        ("`get_weather` tells the weather: give it a <city>", False),
        ('{"name": "get_time", "arguments": {}}', False),
        ('{"name": "get_weather", "temperature": 17}', False),
        ("<tool_response>17 degrees</tool_response>", True),
        ("Sure: <tool_call", True),
        ("<tools>\n</tools>", True),
        ('```json\n{\n  "name": "get_weather",\n  "arguments": {', True),
        ("{'function': 'get_weather', 'parameters': {}}", True),
    ],
)
def test_raw_tags_and_calls_are_seen(shown: str, raw: bool) -> None:
    """The tags that tools are called with, and JSON of a call of an offered tool, however broken."""
    [task] = [task for task in SETS["open"] if task.id == "T01"]
    verdict = real_model.judge(task, [([("get_weather", {"city": "Berlin"})], f"17 {shown}")], shown)
    assert (verdict["raw"], verdict["right"]) == (raw, not raw)


@pytest.mark.parametrize(
    ("made", "missing", "needless"),
    [
        ([("b", {}), ("a", {"x": 1})], 0, 0),
        ([("a", {"x": 1}), ("b", {}), ("b", {})], 0, 1),
        ([("a", {"x": 2}), ("b", {})], 1, 1),
        ([], 2, 0),
    ],
)
def test_calls_match_in_any_order(made: list[Call], missing: int, needless: int) -> None:
    """Each call that was made counts for one that was wanted."""
    assert [*map(len, real_model.match_calls(made, [("a", {"x": 1}), ("b", {})]))] == [missing, needless]


@pytest.mark.parametrize(
    ("given", "right"),
    [
        ({"city": " berlin", "days": 2}, True),
        ({"city": "Berlin", "days": 2.0, "unit": None}, True),
        ({"city": "Berlin", "days": 3, "unit": "CELSIUS"}, True),
        ({"city": "Berlin", "days": 2, "unit": "kelvin"}, False),
        ({"city": "Berlin", "days": True}, False),
        ({"city": "Berlin"}, False),
        ({"city": "Berlin", "days": 2, "other": None}, False),
        ({"city": ["Berlin"], "days": 2}, False),
    ],
)
def test_arguments_match(given: dict[str, Any], right: bool) -> None:
    """What may be left out may be; nothing else may, and nothing may be added."""
    wanted = {"city": pattern("berlin"), "days": one_of(2, 3), "unit": Optional("celsius")}
    assert arguments_match(given, wanted) is right


def test_the_tasks_can_be_judged() -> None:
    """Each has an id of its own, by which its results are kept, and no final answer is right if it is empty."""
    tasks = [task for tasks in SETS.values() for task in tasks]
    assert len({task.id for task in tasks}) == len(tasks)
    assert not [task.id for task in tasks for turn in task.turns if re.search(turn.final, "")]
