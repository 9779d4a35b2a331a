"""What the tests share: a clean environment, a server, and one way to ask it, sync and async."""

from __future__ import annotations

import asyncio
import functools
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import llm
import pytest
from loopback import Loopback

import llm_autonomous
from llm_autonomous import AutonomousError

# Each look-up makes all models of all plugins again, which costs the oldest llm 0.3 s.
get_model = functools.cache(llm.get_model)
get_async_model = functools.cache(llm.get_async_model)


@dataclass
class Answer:
    """What came of a prompt: the pieces of text in the order they came, and the error that ended it, if any."""

    response: Any
    chunks: list[str] = field(default_factory=list)
    error: AutonomousError | None = None

    @property
    def text(self) -> str:
        if self.error:
            raise self.error
        return "".join(self.chunks)

    @property
    def line(self) -> str:
        """The error's words, which are one line."""
        assert self.error is not None, f"no error, but {self.chunks}"
        assert self.error.message.isprintable()
        assert str(self.error) == self.error.message
        return self.error.message


def ask_sync(prompt: str | None = "hi", model: str = "autonomous-llama", **kwargs: Any) -> Answer:
    answer = Answer(get_model(model).prompt(prompt, **kwargs))
    try:
        for chunk in answer.response:
            answer.chunks.append(chunk)
    except AutonomousError as error:
        answer.error = error
    return answer


async def ask_async(prompt: str | None = "hi", model: str = "autonomous-llama", **kwargs: Any) -> Answer:
    answer = Answer(get_async_model(model).prompt(prompt, **kwargs))
    try:
        async for chunk in answer.response:
            answer.chunks.append(chunk)
    except AutonomousError as error:
        answer.error = error
    return answer


Ask = Callable[..., Answer]


@pytest.fixture(params=["sync", "async"])
def ask(request: pytest.FixtureRequest) -> Ask:
    """``ask(prompt, model=..., **kwargs)`` prompts a model and gives an `Answer`; async in a loop of its own."""
    if request.param == "sync":
        return ask_sync
    return lambda *args, **kwargs: asyncio.run(ask_async(*args, **kwargs))


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """No proxies, no user's settings, and no connection of an earlier test."""
    for name in list(os.environ):
        if name.lower().endswith("_proxy") or name.startswith(("AUTONOMOUS_", "LLM_", "SSL_CERT_")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("LLM_USER_PATH", str(tmp_path_factory.mktemp("llm")))
    yield
    for client in llm_autonomous._clients.values():
        client.close()
    llm_autonomous._clients.clear()


@pytest.fixture
def no_backoff(monkeypatch: pytest.MonkeyPatch) -> None:
    """Attempts follow each other at once."""
    monkeypatch.setattr(llm_autonomous, "BACKOFF", (0.0, 0.0))


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Loopback]:
    """A `Loopback` that the models talk to."""
    with Loopback() as loopback:
        monkeypatch.setenv("AUTONOMOUS_BASE_URL", loopback.url)
        yield loopback


@pytest.fixture
def user_path() -> Path:
    return Path(os.environ["LLM_USER_PATH"])
