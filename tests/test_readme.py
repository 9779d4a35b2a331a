"""README.md is followed as a new user would, its generated parts are generated again, and CI runs its commands."""

from __future__ import annotations

import contextlib
import importlib.metadata
import io
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from benchmark import PAGE, SPEED_ROWS, SPEED_TABLE
from click.testing import CliRunner
from cogapp import Cog
from conftest import Start, complete, output_until
from llm.cli import cli
from loopback import Loopback

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
BLOCKS: list[tuple[str, str]] = re.findall(r"^```(\w*)\n(.*?)^```$", README, re.DOTALL | re.MULTILINE)
SET_UP = [block.strip() for language, block in BLOCKS if language == "bash" and block.startswith("python3 -m venv")]


def run(command: str, typed: str) -> str:
    """What a terminal shows of an `llm` command. It runs in this process, which saves the 0.7 s of its own."""
    assert shutil.which("llm"), "llm: command not found"
    before, _, command = command.rpartition(" | ")
    if before:
        typed = subprocess.run(["sh", "-c", before], stdout=subprocess.PIPE, text=True, timeout=60).stdout
    begin = re.match(r"((?:\w+=\S* )*)llm ", command)
    assert begin, command
    variables = dict(variable.split("=", 1) for variable in begin[1].split())
    arguments = shlex.split(command[begin.end() :])
    return CliRunner(env=variables).invoke(cli, arguments, input=typed, prog_name="llm").output


def same_everywhere(shown: str) -> str:
    """An output, with the version of llm and the seconds that README has."""
    shown = re.sub(r"\b\d+\.\d\d s$", "0.12 s", shown, flags=re.MULTILINE)
    return re.sub(rf"\b{re.escape(importlib.metadata.version('llm'))}$", "0.36", shown, flags=re.MULTILINE)


def follow_session(session: str) -> None:
    """Run the commands of a console block. Each has to print what stands below it."""
    for command, output in re.findall(r"^\$ (.*)\n((?:(?!\$ ).*\n)*)", session, re.MULTILINE):
        typed = "".join(f"{line}\n" for line in re.findall("^> (.*)$", output, re.MULTILINE))
        assert same_everywhere(run(command, typed)) == output, command


@pytest.fixture
def new_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A person in a checkout, with no `llm` and no settings."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("LLM_USER_PATH", str(tmp_path / "llm"))
    monkeypatch.setenv("PATH", "/usr/bin:/bin")


def test_the_page_can_be_followed_from_top_to_bottom(
    new_user: None, start: Start, monkeypatch: pytest.MonkeyPatch, no_backoff: None
) -> None:
    """Each block works with nothing but what the page has said before, and shows the output that stands there."""
    scripts, printed = Path(sys.executable).parent, ""
    for language, block in BLOCKS:
        if language == "console":
            follow_session(block)
        elif language == "python":
            with contextlib.redirect_stdout(io.StringIO()) as shown:
                exec(block, {"__name__": "__main__"})
            printed = shown.getvalue()
        elif language == "text":
            assert printed == block
            printed = ""
        elif block == "venv/bin/python tests/loopback.py\n":
            server = start(sys.executable, "tests/loopback.py")
            name, url = output_until(server, "\n").removeprefix("export ").strip().split("=")
            monkeypatch.setenv(name, url)
        elif block == "source venv/bin/activate\n":
            monkeypatch.setenv("PATH", f"{scripts}{os.pathsep}{os.environ['PATH']}")
        elif block.startswith("python tests/bridge.py"):
            with Loopback(complete) as upstream:
                [command] = re.findall("^.* --to (?=http)", block)
                rest = block.removeprefix(command).partition(" ")[2]
                result = subprocess.run(
                    ["sh", "-c", f"{command}{upstream.url}/v1 {rest}"], stdout=subprocess.PIPE, text=True, timeout=60
                )
            assert result.stdout == "upstream heard: Hello \n"
        else:
            assert block.strip() in SET_UP  # which .ci/run runs
    assert not printed, "a Python example has no output"


def test_ci_runs_the_set_up_commands() -> None:
    """The commands that set up an environment, to try the plugin and to test it, stand in .ci/run as they are."""
    assert [command.rpartition("venv/bin/python ")[2] for command in SET_UP] == [
        'tests/loopback.py llm -m autonomous-llama "Hello"',
        "-m pytest -n 4",
    ]
    lines = [line.strip() for line in (ROOT / ".ci" / "run").read_text().splitlines()]
    assert all(command in lines for command in SET_UP)


def test_generated_parts_are_up_to_date(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """The models and the options are those of the code."""
    monkeypatch.chdir(ROOT)
    code = Cog().main(["cog", "--check", "--diff", "README.md"])
    assert code == 0, capsys.readouterr().out


def test_the_page_is_short() -> None:
    """A user reads it to its end."""
    assert len(README.splitlines()) <= 190


def test_links_to_files_lead_somewhere() -> None:
    """Each file that the page names or links to is there."""
    names = re.findall(r"\]\((?!http)([^)#]+)\)|`((?:tests|\.ci)/[\w./]+)`", README)
    assert names
    assert [name for pair in names if (name := "".join(pair)) and not (ROOT / name).exists()] == []


def test_speed_table_has_its_rows() -> None:
    """The place in tests/README.md that `tests/measure/benchmark.py --readme` writes to holds each of its rows once."""
    [table] = SPEED_TABLE.findall(PAGE.read_text())
    rows = re.findall(r"^\| (.*?) \| .*? \| (.*?) \|", table, re.MULTILINE)[1:]
    assert len(rows) == len(SPEED_ROWS)
    for (figure, instead), (words, other) in zip(rows, SPEED_ROWS, strict=True):
        assert words in figure
        assert instead.startswith(other)
