"""What `llm` has once the plugin is there: five models, their names, and nothing that costs or breaks."""

from __future__ import annotations

import importlib.metadata
import json
import os
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import llm
import llm.hookspecs
import pluggy
import pytest
from conftest import Ask
from loopback import BACKENDS, ENDPOINTS, Loopback, environment

import llm_autonomous

MODELS = [f"autonomous-{name}" for name in ENDPOINTS]
OWN_ALIASES = {
    "llama": ["autonomous", "autonomous-llama-3.3-70b"],
    "qwen_coder": ["autonomous-qwen-coder", "autonomous-qwen-2.5-coder-32b"],
    "hermes": ["autonomous-hermes-3"],
    "vision": ["autonomous-llama-3.2-90b"],
    "summary": ["autonomous-llama-3.2-70b"],
}
BARE = list(BACKENDS.values())
IMAGE_TYPES = {"image/png", "image/jpeg", "image/webp", "image/gif", "image/jpg", "image/pjpeg", "image/x-png"}

# No network is wanted from any of these.
BROKEN_ENVIRONMENT = {
    "AUTONOMOUS_BASE_URL": "::no url::",
    "HTTPS_PROXY": "nonsense://me:hunter2@",
    "ALL_PROXY": "socks9://[",
    "SSL_CERT_FILE": "/nonexistent",
    "SSL_CERT_DIR": "/nonexistent",
}


Load = Callable[..., None]


class Named:
    def __init__(self, model_id: str) -> None:
        self.model_id = model_id

    def execute(self, *args: Any) -> Any:
        raise NotImplementedError


class Elsewhere(Named, llm.Model):
    """A model of another plugin."""


class ElsewhereAsync(Named, llm.AsyncModel):
    """The same model for async prompts."""


def another_plugin(trylast: bool, names: dict[str, list[str]]) -> Any:
    """A plugin that registers a model with its aliases for each of ``names``."""

    class Plugin:
        @llm.hookimpl(trylast=trylast)
        def register_models(self, register: Callable[..., None]) -> None:
            for model_id, aliases in names.items():
                register(Elsewhere(model_id), ElsewhereAsync(model_id), aliases=aliases)

    return Plugin()


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Load:
    """``load(*plugins)`` has `llm` know these plugins and no others, loaded in this order."""

    def load(*plugins: Any) -> None:
        manager = pluggy.PluginManager("llm")
        manager.add_hookspecs(llm.hookspecs)
        for plugin in plugins:
            manager.register(plugin)
        monkeypatch.setattr(llm, "pm", manager)

    return load


@pytest.fixture(params=[True, False], ids=["loaded after", "loaded before"])
def load_beside(load: Load, request: pytest.FixtureRequest) -> Load:
    """``load_beside(plugin)`` has `llm` know this plugin and ours, in either order."""
    return lambda plugin: load(*([llm_autonomous, plugin] if request.param else [plugin, llm_autonomous]))


def registered() -> dict[str, Any]:
    return {entry.model.model_id: entry for entry in llm.get_models_with_aliases()}


def python(script: str, **variables: str) -> Any:
    """What a script, run in a process of its own that loads no plugins, prints as JSON."""
    settings = {**os.environ, "LLM_LOAD_PLUGINS": "", **variables}
    command = [sys.executable, "-c", textwrap.dedent(script)]
    done = subprocess.run(command, env=settings, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


# The models


def test_the_five_models_are_there() -> None:
    """`llm` finds the plugin by its entry point, and knows its five models."""
    assert [model_id for model_id in registered() if model_id.startswith("autonomous")] == MODELS


@pytest.mark.parametrize("name", ENDPOINTS)
def test_each_model_has_an_async_twin_that_is_alike(load: Load, name: str) -> None:
    """Both stream, take the same options, need no key, promise nothing that is not there, and answer to all names."""
    load(llm_autonomous)
    entry = registered()[f"autonomous-{name}"]
    assert entry.aliases == [*OWN_ALIASES[name], BACKENDS[name]]
    for spelling in (f"autonomous-{name}", *entry.aliases):
        model, async_model = llm.get_model(spelling), llm.get_async_model(spelling)
        assert (model.model_id, async_model.model_id) == (f"autonomous-{name}", f"autonomous-{name}")
    assert isinstance(entry.model, llm.Model)
    assert isinstance(entry.async_model, llm.AsyncModel)
    for model in (entry.model, entry.async_model):
        assert issubclass(model.Options, llm_autonomous.AutonomousOptions)
        assert model.attachment_types == (IMAGE_TYPES if name == "vision" else set())
        assert model.can_stream
        assert (bool(model.needs_key), model.supports_schema, model.supports_tools) == (False, True, True)


@pytest.mark.parametrize(
    ("name", "kind"), [*((name, "image/png") for name in ENDPOINTS if name != "vision"), ("vision", "application/pdf")]
)
def test_attachments_are_refused_before_anything_is_sent(ask: Ask, server: Loopback, name: str, kind: str) -> None:
    """Only vision takes pictures, and nothing else."""
    with pytest.raises(ValueError, match="does not support attachments"):
        ask("hi", f"autonomous-{name}", attachments=[llm.Attachment(type=kind, content=b"...")])
    assert server.requests == []


@pytest.mark.parametrize("image_type", sorted(IMAGE_TYPES))
def test_vision_takes_four_types_of_image_by_all_their_names(ask: Ask, server: Loopback, image_type: str) -> None:
    """PNG, JPEG, WebP and GIF."""
    sent = {"image/jpg": "image/jpeg", "image/pjpeg": "image/jpeg", "image/x-png": "image/png"}
    answer = ask("hi", "autonomous-vision", attachments=[llm.Attachment(type=image_type, content=b"...")])
    assert answer.text == f"vision heard: hi\nPictures: data:{sent.get(image_type, image_type)};base64"


# The bare names


@pytest.mark.parametrize("trylast", [False, True], ids=["plain", "trylast"])
@pytest.mark.parametrize("names", [{name: [] for name in BARE}, {"other": BARE}], ids=["model id", "alias"])
def test_a_bare_name_of_another_plugin_stays_its_own(
    load_beside: Load, trylast: bool, names: dict[str, list[str]]
) -> None:
    """Whatever order plugins load and register in, `hermes-3` from elsewhere is that one."""
    load_beside(another_plugin(trylast, names))
    for name, backend in BACKENDS.items():
        assert isinstance(llm.get_model(backend), Elsewhere)
        assert isinstance(llm.get_async_model(backend), ElsewhereAsync)
        assert llm.get_model(f"autonomous-{backend}").model_id == f"autonomous-{name}"


def test_a_bare_name_that_is_taken_is_not_registered(load_beside: Load) -> None:
    """`llm models` does not show it as ours, and the other four stay."""
    load_beside(another_plugin(False, {"other": ["hermes-3"]}))
    models = registered()
    assert models["autonomous-hermes"].aliases == ["autonomous-hermes-3"]
    assert all(BACKENDS[name] in models[f"autonomous-{name}"].aliases for name in BACKENDS if name != "hermes")


def test_an_alias_of_the_user_stays_the_users(load_beside: Load, user_path: Path) -> None:
    """A bare name that `aliases.json` gives to a model of another plugin is not taken from it."""
    (user_path / "aliases.json").write_text(json.dumps(dict.fromkeys(BARE, "other")))
    load_beside(another_plugin(False, {"other": []}))
    models = registered()
    for name, backend in BACKENDS.items():
        assert isinstance(llm.get_model(backend), Elsewhere)
        assert backend not in models[f"autonomous-{name}"].aliases


@pytest.mark.parametrize(
    ("alias", "model_id"), [("hermes-3", "autonomous-llama"), ("llama-3.3-70b", "autonomous-summary")]
)
def test_an_alias_of_the_user_may_mean_another_of_ours(load: Load, user_path: Path, alias: str, model_id: str) -> None:
    """Also where the user's alias goes to a model that is registered earlier or later than the name's own."""
    (user_path / "aliases.json").write_text(json.dumps({alias: model_id}))
    load(llm_autonomous)
    assert llm.get_model(alias).model_id == model_id
    assert llm.get_async_model(alias).model_id == model_id


# What it costs


def test_registering_opens_nothing_imports_nothing_and_cannot_raise() -> None:
    """No file and no socket is touched, whatever the environment holds."""
    script = """
        import json, sys
        import llm, llm_autonomous

        events, models, watching = [], [], True
        sys.addaudithook(lambda event, args: events.append([event, str(args)]) if watching else None)
        llm_autonomous.register_models(lambda *models_, aliases: models.append(models_[0].model_id), [])
        watching = False
        noticed = [e for e in events if e[0].startswith(("open", "os.", "socket.", "import", "ssl", "subprocess."))]
        print(json.dumps([models, noticed]))
    """
    assert python(script, **BROKEN_ENVIRONMENT) == [MODELS, []]


def test_a_broken_environment_breaks_no_other_command() -> None:
    """`llm models` works where a prompt could not."""
    settings = {**environment("::no url::"), **BROKEN_ENVIRONMENT}
    command = ["llm", "models", "list", "-q", "autonomous"]
    done = subprocess.run(command, env=settings, capture_output=True, text=True, timeout=60)
    assert (done.stderr, done.returncode) == ("", 0)
    assert [line.split()[1] for line in done.stdout.splitlines()] == MODELS


@pytest.mark.parametrize(
    ("variable", "words"),
    [
        ("HTTPS_PROXY", "HTTPS_PROXY must be an http://, https://, socks5:// or socks5h:// URL"),
        ("ALL_PROXY", "ALL_PROXY must be an http://, https://, socks5:// or socks5h:// URL"),
        ("SSL_CERT_FILE", f"cannot load {__file__}, which SSL_CERT_FILE names: "),
    ],
)
def test_a_broken_environment_is_one_line_for_a_prompt(
    ask: Ask, monkeypatch: pytest.MonkeyPatch, variable: str, words: str
) -> None:
    """What registering did not look at is an `AutonomousError` when it is needed, without the password in it."""
    monkeypatch.setenv("AUTONOMOUS_BASE_URL", "https://127.0.0.1:1")
    # A file that is there: httpx before 0.28 takes no notice of one that is not.
    monkeypatch.setenv(variable, __file__ if variable == "SSL_CERT_FILE" else BROKEN_ENVIRONMENT[variable])
    line = ask("hi").line
    assert words in line
    assert "hunter2" not in line


def test_loading_the_module_imports_no_http_client_and_nothing_beside_what_llm_has() -> None:
    """No third-party package of its own: what is new is the standard library's, or the module itself; and httpx,
    httpcore, ssl and asyncio wait for the first prompt, though `llm` itself may have loaded some."""
    script = """
        import json, sys
        import llm.cli

        before = set(sys.modules)
        import llm_autonomous
        new = {name.split(".")[0] for name in set(sys.modules) - before}
        new = sorted(new - sys.stdlib_module_names)

        heavy = ("httpx", "httpcore", "h11", "anyio", "ssl", "_ssl", "asyncio")
        # Once more; and else what llm has imported would hide what the module imports.
        for name in {*sys.modules} - before | {name for name in sys.modules if name.split(".")[0] in heavy}:
            del sys.modules[name]
        wanted = []

        class Refuse:
            def find_spec(self, name, path=None, target=None):
                if name.split(".")[0] in heavy:
                    wanted.append(name)
                    raise ImportError(f"{name} is not for loading time")

        sys.meta_path.insert(0, Refuse())
        before = set(sys.modules)
        import llm_autonomous
        llm_autonomous.register_models(lambda *models, aliases: None, [])
        llm_autonomous.register_commands(llm.cli.cli)
        print(json.dumps([new, wanted, "llm_autonomous" in set(sys.modules) - before]))
    """
    assert python(script) == [["llm_autonomous"], [], True]


# The package


def test_the_package_is_what_it_says() -> None:
    """Name, version, Python, the three dependencies, the extras, and the entry point that `llm` looks for."""
    distribution = importlib.metadata.distribution("llm-autonomous")
    required = [line.replace(" ", "").replace("'", '"') for line in distribution.requires or []]
    assert (distribution.metadata["Name"], distribution.version) == ("llm-autonomous", "0.4")
    assert distribution.metadata["Requires-Python"] == ">=3.10"
    always = sorted(line for line in required if "extra==" not in line)
    assert always == ["httpx>=0.27", "jsonschema>=4.18", "llm>=0.32"]
    assert {"socks", "test"} <= {*distribution.metadata.get_all("Provides-Extra", ())}
    assert [line for line in required if line.endswith('extra=="socks"')] == ['httpx[socks];extra=="socks"']
    [point] = distribution.entry_points
    assert (point.group, point.name, point.value) == ("llm", "autonomous", "llm_autonomous")
