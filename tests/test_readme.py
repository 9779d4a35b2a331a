"""The README's sessions are run, its generated parts generated again, and its commands held to those of CI."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from benchmark import README_ROWS, README_TABLE
from click.testing import CliRunner
from cogapp import Cog
from conftest import PNG
from llm.cli import cli
from loopback import Loopback, environment

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    """The fenced blocks of README in a language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.DOTALL | re.MULTILINE)


def python_examples() -> list[tuple[str, str]]:
    """Each Python example of README with the output that stands behind it."""
    return re.findall(r"^```python\n(.*?)^```\n\n```text\n(.*?)^```$", README, re.DOTALL | re.MULTILINE)


def shell(command: str, settings: dict[str, str], typed: str = "") -> str:
    """What a shell shows of a command that is given ``typed`` through a pipe."""
    return subprocess.run(
        ["bash", "-c", command],
        env=settings,
        cwd=settings["PWD"],
        input=typed,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=60,
    ).stdout


def run(command: str, settings: dict[str, str]) -> str:
    """The same, where an `llm` at the start of the command is run in this process, which saves the 0.7 s of its own."""
    begin = re.match(r"((?:\w+=\S* )*)llm ", command)
    if begin is None:
        return shell(command, settings)
    arguments, pipe, behind = command[begin.end() :].partition(" | ")
    runner = CliRunner(env=settings | dict(variable.split("=", 1) for variable in begin[1].split()))
    shown = runner.invoke(cli, shlex.split(arguments), prog_name="llm").output
    return shell(behind, settings, shown) if pipe else shown


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """The environment of one person who tries all that README shows, from its start to its end."""
    folder = tmp_path_factory.mktemp("readme")
    (folder / "photo.png").write_bytes(PNG)
    with Loopback() as server:
        # Coverage is for the workers of pytest-xdist, not for processes that tests start.
        kept = {name: value for name, value in environment(server.url).items() if not name.startswith("COVERAGE_")}
        yield {**kept, "LLM_USER_PATH": str(folder / "llm"), "HOME": str(folder), "PWD": str(folder)}


def test_sessions_show_what_the_commands_print(
    settings: dict[str, str], monkeypatch: pytest.MonkeyPatch, no_backoff: None
) -> None:
    """Every console block, run in its order, prints what README says it prints."""
    monkeypatch.chdir(settings["PWD"])
    assert len(blocks("console")) == 5
    for block in blocks("console"):
        for command, output in re.findall(r"^\$ (.*)\n((?:(?!\$ ).*\n)*)", block, re.MULTILINE):
            assert run(command, settings) == output, command


def test_python_examples_print_what_they_say(settings: dict[str, str]) -> None:
    """Every Python example runs as it stands and prints what the block behind it holds, all in one process."""
    codes, outputs = zip(*python_examples(), strict=True)
    script = (
        "import json, sys\nfor code in json.load(sys.stdin): exec(code, {'__name__': '__main__'}), print('\\0', end='')"
    )
    result = subprocess.run(
        [sys.executable, "-W", "error", "-c", script],
        env=settings,
        input=json.dumps(codes),
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (result.returncode, result.stdout.split("\0")) == (0, [*outputs, ""]), result.stderr


def test_every_python_example_has_its_output() -> None:
    """No Python example goes unchecked."""
    assert len(python_examples()) == len(blocks("python")) == 2


def test_generated_parts_are_up_to_date(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """The model table and the help texts of README are those of the code."""
    monkeypatch.chdir(ROOT)
    code = Cog().main(["cog", "--check", "--diff", "README.md"])
    assert code == 0, capsys.readouterr().out


def test_speed_table_has_its_rows() -> None:
    """The place that `tests/benchmark.py --readme` writes to holds each of its rows once."""
    [table] = README_TABLE.findall(README)
    rows = re.findall(r"^\| (.*?) \| .*? \| (.*?) \|", table, re.MULTILINE)[1:]
    assert len(rows) == len(README_ROWS)
    for (figure, instead), (words, other) in zip(rows, README_ROWS, strict=True):
        assert words in figure
        assert instead.startswith(other)


def test_ci_runs_the_test_command_of_readme() -> None:
    """The command that README gives for the tests stands in .ci/run as it is."""
    commands = [block.strip() for block in blocks("bash") if "coverage run -m pytest" in block]
    assert len(commands) == 1
    assert commands[0] in (ROOT / ".ci" / "run").read_text().splitlines()
