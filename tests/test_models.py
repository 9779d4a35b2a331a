"""What `llm` has once the plugin is there: five models, their names, and nothing that costs or breaks."""

from __future__ import annotations

import importlib.metadata
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import llm
import llm.hookspecs
import pluggy
import pytest
from conftest import NOWHERE, Ask, run
from loopback import BACKENDS, ENDPOINTS, Loopback
from proxies import run_python

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


@pytest.fixture
def broken_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Settings that no prompt could be sent with."""
    monkeypatch.setenv("AUTONOMOUS_BASE_URL", "::no url::")
    monkeypatch.setenv("HTTPS_PROXY", "nonsense://me:hunter2@")
    monkeypatch.setenv("ALL_PROXY", "socks9://[")
    monkeypatch.setenv("SSL_CERT_FILE", "/nonexistent")
    monkeypatch.setenv("SSL_CERT_DIR", "/nonexistent")


def registered() -> dict[str, Any]:
    return {entry.model.model_id: entry for entry in llm.get_models_with_aliases()}


# The models


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


@pytest.mark.parametrize("kind", ["image/png", "image/jpeg", "image/webp", "image/gif"])
def test_vision_takes_four_types_of_image(ask: Ask, server: Loopback, kind: str) -> None:
    """PNG, JPEG, WebP and GIF, which is also what the server is told."""
    answer = ask("hi", "autonomous-vision", attachments=[llm.Attachment(type=kind, content=b"...")])
    assert answer.text == f"vision heard: hi\nPictures: data:{kind};base64"


# The bare names


@pytest.mark.parametrize("order", [1, -1], ids=["loaded after", "loaded before"])
@pytest.mark.parametrize("trylast", [False, True], ids=["plain", "trylast"])
@pytest.mark.parametrize(
    ("names", "users"),
    [
        ({name: [] for name in BARE}, []),
        ({"other": BARE}, []),
        ({"other": []}, BARE),
        ({"other": ["hermes-3"]}, ["llama-3.3-70b"]),
    ],
    ids=["model id", "alias", "alias of the user", "some"],
)
def test_a_bare_name_that_is_taken_stays_what_it_is(
    load: Load, user_path: Path, order: int, trylast: bool, names: dict[str, list[str]], users: list[str]
) -> None:
    """Whatever order plugins load and register in, `hermes-3` from elsewhere, or from `aliases.json`, is that one."""
    (user_path / "aliases.json").write_text(json.dumps(dict.fromkeys(users, "other")))
    load(*[llm_autonomous, another_plugin(trylast, names)][::order])
    models = registered()
    for name, backend in BACKENDS.items():
        taken = backend in (*names, *names.get("other", ()), *users)
        assert isinstance(llm.get_model(backend), Elsewhere if taken else llm_autonomous.Autonomous)
        assert isinstance(llm.get_async_model(backend), ElsewhereAsync if taken else llm_autonomous.AsyncAutonomous)
        assert trylast or (backend in models[f"autonomous-{name}"].aliases) is not taken  # `llm models` shows them
        assert llm.get_model(f"autonomous-{backend}").model_id == f"autonomous-{name}"


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


def test_registering_opens_nothing_imports_nothing_and_cannot_raise(broken_environment: None) -> None:
    """No file and no socket is touched, whatever the environment holds."""
    script = """if True:
        import json, sys
        import llm, llm_autonomous

        events, models, watching = [], [], True
        sys.addaudithook(lambda event, args: events.append([event, str(args)]) if watching else None)
        llm_autonomous.register_models(lambda *models_, aliases: models.append(models_[0].model_id), [])
        watching = False
        noticed = [e for e in events if e[0].startswith(("open", "os.", "socket.", "import", "ssl", "subprocess."))]
        print(json.dumps([models, noticed]))
    """
    assert json.loads(run_python(script)) == [MODELS, []]


def test_a_broken_environment_breaks_no_other_command(broken_environment: None) -> None:
    """`llm models`, which finds the plugin by its entry point, has the five models where no prompt could be sent."""
    listed = run("models", "list", "-q", "autonomous").splitlines()
    assert [line.split()[1] for line in listed] == MODELS


@pytest.mark.parametrize(
    ("variable", "url"), [("HTTP_PROXY", NOWHERE), ("HTTPS_PROXY", "https://127.0.0.1:1"), ("ALL_PROXY", NOWHERE)]
)
def test_a_broken_environment_is_one_line_for_a_prompt(
    ask: Ask, monkeypatch: pytest.MonkeyPatch, variable: str, url: str
) -> None:
    """What registering did not look at is an error when it is needed, without the password in it."""
    monkeypatch.setenv("AUTONOMOUS_BASE_URL", url)
    monkeypatch.setenv(variable, "http://me:hunter2@host:port")
    assert ask("hi").line == f"{variable} must be an http://, https://, socks5:// or socks5h:// URL with a host"


def test_loading_the_module_imports_no_http_client_and_nothing_beside_what_llm_has(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """No third-party package of its own: what is new is the standard library's, or the module itself; and httpx,
    httpcore, ssl and asyncio wait for the first prompt, though `llm` itself may have loaded some."""
    script = """if True:
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
    monkeypatch.setenv("LLM_LOAD_PLUGINS", "")
    assert json.loads(run_python(script)) == [["llm_autonomous"], [], True]


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
