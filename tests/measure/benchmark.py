"""The speed of the plugin, side by side with others at the same work:

    python tests/measure/benchmark.py            one table in Markdown, in about 15 minutes
    python tests/measure/benchmark.py --quick    the same with few rounds, for development: its figures are rough
    python tests/measure/benchmark.py --readme   writes the rows that matter to a user into tests/README.md as well

All clients read the same replies, made beforehand, from a loopback server in a process of its own. The competitors
take turns within each round, and a ratio is the median of the rounds' ratios, since machines change their speed from
one minute to the next. What a client costs is its CPU time; wall time stands beside it.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import functools
import gc
import importlib.metadata
import json
import os
import platform
import re
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

sys.path.append(str(Path(__file__).parents[1]))
from loopback import DONE, delta, event

EVENTS = 20_000
TURNS = 10
PAUSE = 0.01  # seconds between the chunks of the reply that pauses
AT_ONCE = 1_000  # async prompts
THINKING = 0.5  # seconds that the server takes for each of them
PROXY_BUFFER = 8 * 1024  # bytes of events in one HTTP chunk, where they are not sent one by one
WORD = "word "

PAGE = Path(__file__).parents[1] / "README.md"
SPEED_TABLE = re.compile(r"(?<=<!-- speed -->\n).*(?=<!-- end of speed -->)", re.DOTALL)
# The rows for that page: words of the figure, and the start of what a user would pick instead.
SPEED_ROWS = (
    ("one HTTP chunk for each", "the least plugin"),
    ("one HTTP chunk for each", "OpenAI plugin"),
    ("in HTTP chunks of 8 KB", "the least plugin"),
    ("a turn of a conversation", "OpenAI plugin"),
    ("the first text", "OpenAI plugin"),
    ("`llm --help`, from the loading of plugins on", "without plugins"),
    ("async prompts at once", "OpenAI plugin"),
)


# The server: `GET /<scenario>/...`, in a process of its own


HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"


@functools.cache
def reply(events: int, coalesced: bool) -> list[bytes]:
    """The body of ``events`` words, in HTTP chunks: each event in its own, or as many as fill a proxy's buffer."""
    pieces = [event(delta(WORD, model="benchmark"))] * events + [event(delta(None, "stop", model="benchmark")), DONE]
    if coalesced:
        body = b"".join(pieces)
        pieces = [body[start : start + PROXY_BUFFER] for start in range(0, len(body), PROXY_BUFFER)]
    return [b"%x\r\n%s\r\n" % (len(piece), piece) for piece in pieces] + [b"0\r\n\r\n"]


@functools.cache
def joined(events: int, coalesced: bool) -> bytes:
    return HEAD + b"".join(reply(events, coalesced))


class Server(asyncio.Protocol):
    """Answers by the first part of the path: ``each-<events>``, ``coalesced-<events>``, ``pauses``, ``thinks``."""

    def connection_made(self, transport: Any) -> None:
        self.transport = transport
        self.received = b""

    def data_received(self, data: bytes) -> None:
        self.received += data
        head, blank, body = self.received.partition(b"\r\n\r\n")
        length = re.search(rb"(?i)\r\ncontent-length: *(\d+)", head)
        if blank and len(body) >= int(length[1] if length else 0):
            self.received = b""
            scenario, _, events = head.split(b" ")[1].split(b"/")[1].decode().partition("-")
            if scenario == "pauses":
                self.task = asyncio.get_running_loop().create_task(self.pause())
            elif scenario == "thinks":
                asyncio.get_running_loop().call_later(THINKING, self.transport.write, joined(20, True))
            else:
                self.transport.write(joined(int(events), scenario == "coalesced"))

    async def pause(self) -> None:
        self.transport.write(HEAD)
        for piece in reply(5, False):
            self.transport.write(piece)
            await asyncio.sleep(PAUSE)


async def serve() -> None:
    server = await asyncio.get_running_loop().create_server(Server, "127.0.0.1", 0, backlog=4096)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


# The clients


def least_plugin(url: str) -> Any:
    """A model of the least plugin on httpx: it reads lines of events, and nothing that is not as expected."""
    import httpx
    import llm

    client = httpx.Client()

    class Model(llm.Model):
        model_id = "least"
        can_stream = True

        def execute(self, prompt: llm.Prompt, stream: bool, response: Any, conversation: Any) -> Iterator[str]:
            with client.stream("POST", f"{url}/{prompt.prompt}/") as reply:
                rest = b""
                for data in reply.iter_bytes():
                    *lines, rest = (rest + data).split(b"\n")
                    for line in lines:
                        if line.startswith(b"data: ") and line != b"data: [DONE]":
                            content = json.loads(line[6:])["choices"][0]["delta"].get("content")
                            if content:
                                yield content

        def deltas(self, scenario: str) -> Iterator[str]:
            return iter(self.prompt(scenario))

    return Model()


class Plugin:
    """A model of `llm`: this plugin's, or one of `llm`'s own OpenAI plugin."""

    def __init__(self, url: str, openai: bool) -> None:
        self.url, self.openai = url, openai
        self.models: dict[tuple[str, bool], Any] = {}

    def model(self, scenario: str, asynchronous: bool = False) -> Any:
        import llm

        os.environ["AUTONOMOUS_BASE_URL"] = f"{self.url}/{scenario}"
        if (scenario, asynchronous) not in self.models:
            get_model: Any = llm.get_async_model if asynchronous else llm.get_model
            model = get_model(f"openai-{scenario}" if self.openai else "autonomous-llama")
            self.models[scenario, asynchronous] = model
        return self.models[scenario, asynchronous]

    def deltas(self, scenario: str) -> Iterator[str]:
        return iter(self.model(scenario).prompt("Say it"))

    def converse(self, scenario: str) -> None:
        conversation = self.model(scenario).conversation()
        for turn in range(TURNS):
            assert conversation.prompt(f"Turn {turn}").text() == 20 * WORD

    async def prompts_at_once(self, count: int) -> int:
        """Ask as many at once; return how many failed."""
        model = self.model("thinks", asynchronous=True)

        async def ask() -> bool:
            return bool(await model.prompt("Say it").text() == 20 * WORD)

        answers = await asyncio.gather(*(ask() for _ in range(count)), return_exceptions=True)
        return sum(answer is not True for answer in answers)


class WithTools(Plugin):
    """This plugin, given a tool that the model does not call: the answer is read for calls."""

    def deltas(self, scenario: str) -> Iterator[str]:
        def add(a: int, b: int) -> int:
            return a + b

        return iter(self.model(scenario).prompt("Say it", tools=[add]))


SCENARIOS = (f"each-{EVENTS}", f"coalesced-{EVENTS}", "each-20", "pauses", "thinks")


def openai_models(url: str) -> str:
    """The file that makes `llm`'s OpenAI plugin talk to the server (YAML, of which JSON is a part)."""
    models = [{"model_id": f"openai-{name}", "api_base": f"{url}/{name}/v1"} for name in SCENARIOS]
    return json.dumps([{**model, "model_name": "benchmark"} for model in models])


# The measure


class Seconds(NamedTuple):
    cpu: float
    wall: float


def timed(work: Callable[[], object]) -> Seconds:
    gc.collect()
    cpu, wall = time.process_time(), time.perf_counter()
    work()
    return Seconds(time.process_time() - cpu, time.perf_counter() - wall)


def compete(competitors: Mapping[str, Any], measure: Callable[[Any], Seconds], rounds: int) -> dict[str, list[Seconds]]:
    """What each measured in each round; they take turns, in an order that turns round as well."""
    results: dict[str, list[Seconds]] = {name: [] for name in competitors}
    order = list(competitors)
    for _ in range(rounds):
        for name in order:
            results[name].append(measure(competitors[name]))
        order.reverse()
    return results


def ratio(results: dict[str, list[Seconds]], over: str, under: str, clock: str = "cpu") -> float:
    pairs = zip(results[over], results[under], strict=True)
    return median(float(getattr(a, clock) / getattr(b, clock)) for a, b in pairs)


def middle(times: list[Seconds], per: int = 1) -> Seconds:
    return Seconds(median(t.cpu for t in times) / per, median(t.wall for t in times) / per)


def shown(seconds: float) -> str:
    size = abs(seconds)
    if size < 1e-3:
        return f"{seconds * 1e6:.1f} µs"
    return f"{seconds * 1e3:.2f} ms" if size < 1 else f"{seconds:.2f} s"


def both(times: list[Seconds], per: int = 1) -> str:
    cpu, wall = middle(times, per)
    return f"{shown(cpu)} ({shown(wall)})"


class Row(NamedTuple):
    figure: str
    ours: str
    others: str
    result: str

    def __str__(self) -> str:
        return f"| {' | '.join(self)} |"


def less(figure: str, results: dict[str, list[Seconds]], other: str, per: int = 1) -> Row:
    """A row for work that costs less than it does ``other``, or more."""
    times = ratio(results, other, "ours")
    result = f"{times:.2f} times less" if times > 1 else f"{1 / times:.2f} times as much"
    return Row(figure, both(results["ours"], per), f"{other}: {both(results[other], per)}", result)


def growth(figure: str, results: dict[str, list[Seconds]], small: str, large: str, factor: float, unit: str) -> Row:
    """A row for ``factor`` times the work."""
    ours, base = (f"{name}: {shown(middle(results[name]).cpu)}" for name in (large, small))
    return Row(figure, ours, base, f"{ratio(results, large, small):.2f} times for {factor:g} times the {unit}")


# The figures

# `llm` and the seconds of CPU and wall time from the loading of its plugins on. What comes before is the same with
# and without this one, and varies by more than all that comes after.
START = """
import contextlib, json, importlib, sys, time
from llm import plugins
for name in plugins.DEFAULT_PLUGINS: importlib.import_module(name)
load_plugins, plugins.load_plugins = plugins.load_plugins, lambda: None
from llm.cli import cli
plugins.load_plugins = load_plugins
cpu, wall = time.process_time(), time.perf_counter()
load_plugins()
plugins.pm.hook.register_commands(cli=cli)
with contextlib.suppress(SystemExit): cli()
json.dump([time.process_time() - cpu, time.perf_counter() - wall], sys.stderr)
"""

# The seconds of CPU that the module takes to load, and what it should not load.
IMPORT = """
import sys, time, llm
known = {*sys.modules}
start = time.process_time()
import llm_autonomous
print(time.process_time() - start, *sorted({"httpx", "httpcore", "ssl", "asyncio"} & ({*sys.modules} - known)))
"""


class Benchmark:
    def __init__(self, port: int, quick: bool) -> None:
        self.url = f"http://127.0.0.1:{port}"
        self.quick = quick
        self.ours, self.openai = Plugin(self.url, openai=False), Plugin(self.url, openai=True)
        self.clients = {"ours": self.ours, "the least plugin": least_plugin(self.url), "OpenAI plugin": self.openai}

    def rounds(self, full: int, quick: int) -> int:
        return quick if self.quick else full

    def chunks(self) -> Iterator[Row]:
        framings = {"each": "one HTTP chunk for each", "coalesced": f"in HTTP chunks of {PROXY_BUFFER // 1024} KB"}
        clients = {**self.clients, "with tools": WithTools(self.url, openai=False)}
        for framing, words in framings.items():

            def read(client: Any, scenario: str = f"{framing}-{EVENTS}") -> Seconds:
                deltas: list[str] = []
                seconds = timed(lambda: deltas.extend(client.deltas(scenario)))
                assert "".join(deltas) == EVENTS * WORD
                return seconds

            read(self.ours), read(self.openai)  # imports and connections
            results = compete(clients, read, self.rounds(15, 3))
            figure = f"a streamed chunk, of {EVENTS:,}, {words}"
            yield less(figure, results, "the least plugin", EVENTS)
            yield less(figure, results, "OpenAI plugin", EVENTS)
            times = ratio(results, "with tools", "ours")
            tools, none = both(results["with tools"], EVENTS), f"without: {both(results['ours'], EVENTS)}"
            yield Row(f"{figure}, with tools", tools, none, f"{times:.2f} times")

    def turns(self) -> Iterator[Row]:
        plugins = {"ours": self.ours, "OpenAI plugin": self.openai}
        for plugin in plugins.values():
            plugin.converse("each-20")
        results = compete(plugins, lambda plugin: timed(lambda: plugin.converse("each-20")), self.rounds(15, 3))
        yield less(f"a turn of a conversation of {TURNS}", results, "OpenAI plugin", TURNS)

    def first_text(self) -> Iterator[Row]:
        def read(client: Any) -> Seconds:
            gc.collect()
            cpu, wall = time.process_time(), time.perf_counter()
            deltas = client.deltas("pauses")
            assert next(deltas) == WORD
            seconds = Seconds(time.process_time() - cpu, time.perf_counter() - wall)
            assert "".join(deltas) == 4 * WORD
            return seconds

        results = compete(self.clients, read, self.rounds(60, 10))
        figure, ours = "the first text of a reply with pauses, wall time", shown(middle(results["ours"]).wall)
        for other in ("the least plugin", "OpenAI plugin"):
            later = median(a.wall - b.wall for a, b in zip(results["ours"], results[other], strict=True))
            result = f"{shown(abs(later))} {'later' if later > 0 else 'earlier'}"
            yield Row(figure, ours, f"{other}: {shown(middle(results[other]).wall)}", result)

    def start(self) -> Iterator[Row]:
        for command in ("--help", "models"):
            parts: dict[str, list[Seconds]] = {"with": [], "without": []}

            def run(name: str, command: str = command, parts: dict[str, list[Seconds]] = parts) -> Seconds:
                environment = {**os.environ, "LLM_LOAD_PLUGINS": "llm-autonomous" if name == "with" else ""}
                start = time.perf_counter()
                start_llm = [sys.executable, "-c", START, command]
                pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
                with subprocess.Popen(start_llm, env=environment, **pipes) as process:
                    assert process.stderr is not None
                    parts[name].append(Seconds(*json.loads(process.stderr.read())))
                    _, status, usage = os.wait4(process.pid, 0)
                    process.returncode = os.waitstatus_to_exitcode(status)
                return Seconds(usage.ru_utime + usage.ru_stime, time.perf_counter() - start)

            run("with"), run("without")  # makes the bytecode
            parts.update({"with": [], "without": []})
            wholes = compete({name: name for name in parts}, run, self.rounds(40, 5))
            for words, results in (("from the loading of plugins on", parts), ("whole process", wholes)):
                pairs = list(zip(results["with"], results["without"], strict=True))
                cpu, wall = (
                    median(getattr(a, clock) - getattr(b, clock) for a, b in pairs) for clock in Seconds._fields
                )
                others, more = f"without plugins: {both(results['without'])}", f"{shown(cpu)} ({shown(wall)}) more"
                yield Row(f"`llm {command}`, {words}", both(results["with"]), others, more)

        load = [sys.executable, "-c", IMPORT]
        outputs = [subprocess.check_output(load, text=True).split() for _ in range(self.rounds(20, 5))]
        seconds, heavy = median(float(output[0]) for output in outputs), outputs[0][1:]
        loaded = f"loads {', '.join(heavy)}" if heavy else "nothing heavy loaded"
        yield Row("`import llm_autonomous` after `import llm`", shown(seconds), "", loaded)

    def growth(self) -> Iterator[Row]:
        import llm
        from conftest import new_attempt
        from llm.parts import TextPart

        import llm_autonomous

        def grow(sizes: Mapping[str, Any], work: Callable[[Any], Callable[[], object]]) -> dict[str, list[Seconds]]:
            """How long ``work(size)()`` takes, made ready beforehand."""
            return compete({name: work(size) for name, size in sizes.items()}, timed, self.rounds(15, 3))

        for framing, words in (("each", "one HTTP chunk for each"), ("coalesced", "in 8 KB")):
            counts = {f"{count:,}": f"{framing}-{count}" for count in (EVENTS // 10, EVENTS)}
            results = grow(counts, lambda scenario: lambda: list(self.ours.deltas(scenario)))
            yield growth(f"growth: chunks, {words}", results, *counts, 10, "chunks")

        def history(count: int) -> Callable[[], object]:
            messages = [
                llm.Message(role=("user", "assistant")[n % 2], parts=[TextPart(text=f"Message {n}: {40 * WORD}")])
                for n in range(count + 1)
            ]
            return lambda: self.ours.model("each-20").prompt(messages=messages).text()

        results = grow({"200": 200, "2,000": 2_000}, history)
        yield growth("growth: messages of a history", results, "200", "2,000", 10, "messages")

        def decode(size: int) -> Callable[[], object]:
            frame = event(delta("\0")).replace(b"\\u0000", b"%s")
            body = frame % (b"x" * (size - len(frame)))

            def work() -> None:
                decoder = new_attempt()
                deltas = [text for n in range(0, len(body), 1024) for text in decoder.feed(body[n : n + 1024])]
                assert len("".join(deltas)) > 0.99 * size

            return work

        sizes = (1 << 20, 4 << 20, llm_autonomous.MAX_EVENT_BYTES)
        one, four, sixteen = events = {f"{size >> 20} MB": size for size in sizes}
        results = grow(events, decode)
        yield growth("growth: one event in pieces of 1 KB", results, one, four, 4, "bytes")
        yield growth("growth: one event in pieces of 1 KB", results, four, sixteen, 4, "bytes")

        def parse(answer: str) -> Callable[[], None]:
            def work() -> None:
                parser = llm_autonomous.ToolCallParser({"add"})
                for start in range(0, len(answer), 1024):
                    parser.feed([answer[start : start + 1024]])
                parser.feed([], end=True)

            return work

        for begin, text in (("", "<"), ("", "{"), ("<tool_call>", "{"), ("", "<tool_call>"), ("<tool_call>{", '"<",')):
            answers = {f"{size} MB": begin + text * ((size << 20) // len(text)) for size in (1, 4)}
            results = grow(answers, parse)
            yield growth(f"growth: an answer to tools, of `{begin}{text}{text}…`", results, *answers, 4, "characters")

    def at_once(self) -> Iterator[Row]:
        count = AT_ONCE // 5 if self.quick else AT_ONCE
        failures: dict[str, int] = {"ours": 0, "OpenAI plugin": 0}

        def run(name: str) -> Seconds:
            command = [sys.executable, __file__, "--at-once", str(count), "--url", self.url]
            command += ["--openai"] if name == "OpenAI plugin" else []
            cpu, wall, failed = json.loads(subprocess.check_output(command))
            failures[name] += failed
            return Seconds(cpu, wall)

        results = compete({name: name for name in failures}, run, self.rounds(3, 1))
        times = ratio(results, "OpenAI plugin", "ours", "wall")
        others = f"OpenAI plugin: {both(results['OpenAI plugin'])}"
        result = f"{times:.1f} times faster" + "".join(f"; {name}: {n} failed" for name, n in failures.items() if n)
        figure = f"{count:,} async prompts at once, of {THINKING:g} s at the server"
        yield Row(figure, both(results["ours"]), others, result)


def run_at_once(count: int, url: str, openai: bool) -> None:
    """What the process of `Benchmark.at_once` does: print the seconds of CPU and wall time, and the failures."""
    plugin = Plugin(url, openai)
    plugin.model("thinks", asynchronous=True)
    failed = []
    seconds = timed(lambda: failed.append(asyncio.run(plugin.prompts_at_once(count))))
    print(json.dumps([*seconds, *failed]))


def machine() -> str:
    name = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        names = re.findall(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
        name = names[0] if names else name
    packages = ("llm", "llm-autonomous", "httpx", "openai")
    versions = ", ".join(f"{package} {importlib.metadata.version(package)}" for package in packages)
    return f"{os.cpu_count()} cores of {name}, {platform.system()}, Python {platform.python_version()}, {versions}."


def write_page(heading: str, rows: list[Row]) -> None:
    """Put the rows of `SPEED_ROWS` between the two comments in tests/README.md that mark their place."""
    table = [heading, "", "| figure | this plugin | instead | result |", "|---|---|---|---|"]
    for figure, other in SPEED_ROWS:
        table += [str(row) for row in rows if figure in row.figure and row.others.startswith(other)]
    PAGE.write_text(SPEED_TABLE.sub(lambda _: "\n".join([*table, ""]), PAGE.read_text()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split(":")[0])
    parser.add_argument("--quick", action="store_true", help="few rounds: rough figures")
    parser.add_argument("--only", metavar="FIGURE", help="chunks, turns, first_text, start, growth or at_once")
    parser.add_argument("--readme", action="store_true", help="write the rows for users into tests/README.md as well")
    for hidden, kind in (("--at-once", int), ("--url", str)):
        parser.add_argument(hidden, type=kind, help=argparse.SUPPRESS)
    for hidden in ("--serve", "--openai"):
        parser.add_argument(hidden, action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.readme and arguments.only:
        parser.error("--readme needs all figures: leave out --only")
    hard_limit = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard_limit, hard_limit))
    if arguments.serve:
        asyncio.run(serve())
    elif arguments.at_once:
        run_at_once(arguments.at_once, arguments.url, arguments.openai)
    else:
        compare(arguments.quick, arguments.only, arguments.readme)


def compare(quick: bool, only: str | None, readme: bool) -> None:
    server = subprocess.Popen([sys.executable, __file__, "--serve"], stdout=subprocess.PIPE, text=True)
    try:
        with tempfile.TemporaryDirectory() as user_path:
            assert server.stdout is not None
            port = int(server.stdout.readline())
            Path(user_path, "extra-openai-models.yaml").write_text(openai_models(f"http://127.0.0.1:{port}"))
            for name in [name for name in os.environ if name.lower().endswith("_proxy")]:
                del os.environ[name]
            os.environ.update(LLM_USER_PATH=user_path, LLM_LOAD_PLUGINS="llm-autonomous")
            # Processes start as they do where all is installed: with bytecode made at the first start.
            os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
            os.environ["PYTHONPYCACHEPREFIX"] = user_path
            benchmark = Benchmark(port, quick)
            heading, rows = f"{machine()} CPU time, and wall time in brackets; medians.", []
            print(f"{heading}\n\n| figure | ours | others | result |\n|---|---|---|---|")
            for figure in [only] if only else ("chunks", "turns", "first_text", "start", "growth", "at_once"):
                for row in getattr(benchmark, figure)():
                    print(row, flush=True)
                    rows.append(row)
            if readme:
                write_page(heading, rows)
    finally:
        server.kill()
        server.wait()


if __name__ == "__main__":
    main()
