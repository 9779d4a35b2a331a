"""What is sent: the request to the byte, where it goes, the messages in it, and the options."""

from __future__ import annotations

import base64
import importlib.metadata
import json
import traceback
from pathlib import Path
from typing import Any

import httpx
import llm
import pytest
from click.testing import CliRunner
from conftest import NOWHERE, PNG, Ask, get_model
from llm.cli import cli
from llm.parts import AttachmentPart, Message, ReasoningPart, TextPart, ToolCallPart, ToolResultPart, assistant, user
from loopback import BACKENDS, ENDPOINTS
from pydantic import ValidationError
from pytest_httpx import HTTPXMock

from llm_autonomous import IMAGE_TYPES, AutonomousError, AutonomousOptions, build_messages

SERVICE = "https://chatgpt.autonomous.ai/api/v1/ai/"
COMPLETION = {"choices": [{"message": {"content": "fine"}, "finish_reason": "stop"}]}

PNG_URL = f"data:image/png;base64,{base64.b64encode(PNG).decode()}"


@pytest.fixture
def service(httpx_mock: HTTPXMock) -> HTTPXMock:
    """The service itself, which answers any number of prompts."""
    httpx_mock.add_response(json=COMPLETION, is_optional=True, is_reusable=True)
    return httpx_mock


def only(service: HTTPXMock) -> httpx.Request:
    """The one request that was made."""
    [request] = service.get_requests()
    return request


def messages_of(request: httpx.Request) -> Any:
    return json.loads(base64.b64decode(json.loads(request.content)["messages"], validate=True))


def message(role: str, *parts: Any) -> Message:
    return Message(role=role, parts=list(parts))


def picture(**attachment: Any) -> AttachmentPart:
    return AttachmentPart(attachment=llm.Attachment(**attachment))


# The request


def test_the_request_is_the_one_of_the_protocol_to_the_byte(ask: Ask, service: HTTPXMock) -> None:
    """The body is JSON of four keys, and the text in its Base64 is in ASCII escapes."""
    assert ask("Привет", "autonomous-hermes").text == "fine"
    request = only(service)
    assert (request.method, str(request.url)) == ("POST", SERVICE + "chat-hermes")
    assert request.content == (
        b'{"messages": "W3sicm9sZSI6ICJ1c2VyIiwgImNvbnRlbnQiOiAiXHUwNDFmXHUwNDQwXHUwNDM4XHUwNDMyXHUwNDM1XHUwNDQyIn1d"'
        b', "threadId": "hermes", "stream": true, "aiAgent": "hermes"}'
    )
    assert messages_of(request) == [{"role": "user", "content": "Привет"}]


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("name", ENDPOINTS)
def test_each_model_has_its_endpoint_and_its_name(ask: Ask, service: HTTPXMock, name: str, stream: bool) -> None:
    """`aiAgent` and `threadId` are the name that the service has for the model; `stream` is what the user asked for."""
    ask("hi", f"autonomous-{name}", stream=stream)
    assert str(only(service).url) == SERVICE + ENDPOINTS[name]
    assert json.loads(only(service).content) == {
        "messages": base64.b64encode(b'[{"role": "user", "content": "hi"}]').decode(),
        "threadId": name,
        "stream": stream,
        "aiAgent": name,
    }


def test_the_headers_are_those_of_the_protocol_and_no_others(ask: Ask, service: HTTPXMock) -> None:
    """Constants beside what HTTP needs, and a user agent that is honest after its prefix."""
    ask("hi")
    request = only(service)
    version = importlib.metadata.version("llm-autonomous")
    connection = {"host": "chatgpt.autonomous.ai", "content-length": str(len(request.content))}
    headers = {name: value for name, value in request.headers.items() if name != "connection"}
    assert headers == connection | {
        "accept": "*/*",
        "accept-encoding": "gzip, deflate",
        "accept-language": "en-US,en;q=0.9",
        "content-type": "application/json",
        "country-code": "US",
        "origin": "https://www.autonomous.ai",
        "referer": "https://www.autonomous.ai/",
        "time-zone": "America/New_York",
        "user-agent": f"Mozilla/5.0 (compatible; llm-autonomous/{version})",
    }


# Where it goes


@pytest.mark.parametrize(
    ("base", "url"),
    [
        ("http://127.0.0.1:8000", "http://127.0.0.1:8000/api/v1/ai/chat"),
        ("http://127.0.0.1:8000/ai/proxy", "http://127.0.0.1:8000/ai/proxy/api/v1/ai/chat"),
        ("https://ai.example/prefix/", "https://ai.example/prefix/api/v1/ai/chat"),
        ("http://[::1]:8000", "http://[::1]:8000/api/v1/ai/chat"),
        ("  http://127.0.0.1:8000\n", "http://127.0.0.1:8000/api/v1/ai/chat"),
        ("", SERVICE + "chat"),
        (" ", SERVICE + "chat"),
    ],
)
def test_the_base_url_may_have_a_prefix_and_a_trailing_slash(
    ask: Ask, service: HTTPXMock, monkeypatch: pytest.MonkeyPatch, base: str, url: str
) -> None:
    """`AUTONOMOUS_BASE_URL` replaces the service's URL, and an empty one does not."""
    monkeypatch.setenv("AUTONOMOUS_BASE_URL", base)
    assert ask("hi").text == "fine"
    assert str(only(service).url) == url


NO_URLS = (
    "127.0.0.1:8000 localhost /api ftp://ai.example file:///etc/hosts http:// https:///path http://:8000 :: "
    "http://[::1 http://ai.example:99999 http://ai.example:port http://ai\x01example http://me:hunter2@ai.example"
)


@pytest.mark.parametrize("base", NO_URLS.split(" "))
def test_a_base_url_that_is_none_is_an_error_that_names_the_variable(
    ask: Ask, service: HTTPXMock, monkeypatch: pytest.MonkeyPatch, base: str
) -> None:
    """What is no http(s) URL with a host, or has a password, goes nowhere, and no password is repeated."""
    monkeypatch.setenv("AUTONOMOUS_BASE_URL", base)
    answer = ask("hi")
    wanted = "AUTONOMOUS_BASE_URL must be an http:// or https:// URL with a host, and no password or query"
    assert answer.line.startswith(wanted)
    assert "hunter2" not in "".join(traceback.format_exception(answer.error))
    assert service.get_requests() == []


def test_the_base_url_is_read_at_each_prompt(ask: Ask, service: HTTPXMock, monkeypatch: pytest.MonkeyPatch) -> None:
    """A change of `AUTONOMOUS_BASE_URL` within a process counts from the next prompt on."""
    for base in ("http://one.example", "http://two.example"):
        monkeypatch.setenv("AUTONOMOUS_BASE_URL", base)
        ask("hi")
    monkeypatch.delenv("AUTONOMOUS_BASE_URL")
    ask("hi")
    hosts = [request.url.host for request in service.get_requests()]
    assert hosts == ["one.example", "two.example", "chatgpt.autonomous.ai"]


# The messages

NOTE = "[image/png attachment, not shown to this model]"
DREW = ToolResultPart("draw", "done", attachments=[llm.Attachment(type="image/png", content=PNG)])
AS_TEXT: dict[str, tuple[list[Any], str]] = {
    "text parts are joined": ([TextPart("a"), TextPart("b")], "ab"),
    "reasoning is left out": ([ReasoningPart("hmm"), TextPart("so")], "so"),
    "a tool call": (
        [TextPart("Wait."), ToolCallPart("add", {"a": [2]})],
        'Wait.\n[called the tool add with {"a": [2]}]',
    ),
    "a tool call without arguments": ([ToolCallPart("now", {})], "[called the tool now with {}]"),
    "a tool result": ([ToolResultPart("add", "3", "id1")], "[the tool add returned: 3]"),
    "a failed tool": ([ToolResultPart("add", "", exception="ValueError: no")], "[the tool add failed: ValueError: no]"),
    "an empty result": (
        [ToolResultPart("act", "\n")],
        "[The tool act ran without an error and returned an empty result.]",
    ),
    "a failure without words": (
        [ToolResultPart("act", "Error: ", exception="OSError: ")],
        "[the tool act failed: OSError: no message was given]",
    ),
    "what a tool attached": ([DREW], f"[the tool draw returned: done]\n{NOTE}"),
    "an image from bytes": ([TextPart("See"), picture(type="image/png", content=PNG)], f"See\n{NOTE}"),
    "an image from a path": ([picture(type="image/png", path="nowhere.png"), TextPart("See")], f"{NOTE}\nSee"),
    "an image from a URL": ([picture(url=f"{NOWHERE}/cat.png")], "[file attachment, not shown to this model]"),
}


@pytest.mark.parametrize(("parts", "content"), AS_TEXT.values(), ids=AS_TEXT)
def test_a_text_model_gets_text_for_what_it_cannot_take(parts: list[Any], content: str) -> None:
    """Whatever a conversation holds, the content of a message is a string; nothing is read or fetched for it."""
    assert build_messages([message("user", *parts)], frozenset()) == [{"role": "user", "content": content}]


@pytest.mark.parametrize("image_types", [frozenset(), IMAGE_TYPES])
def test_a_message_with_nothing_to_say_is_left_out(image_types: frozenset[str]) -> None:
    """Reasoning alone, no part at all, an attachment part without one: no message."""
    empty = [message("assistant", ReasoningPart("hmm", redacted=True)), message("user"), message("user", TextPart(""))]
    chain = [user("one"), *empty, message("user", AttachmentPart(attachment=None)), assistant("two")]
    built = build_messages(chain, image_types)
    assert [entry["content"] for entry in built] == ["one", "two"]


def test_an_image_is_a_content_part_after_the_text(tmp_path: Path) -> None:
    """Bytes and files become a `data:` URL of their type, a URL goes as it is."""
    path = tmp_path / "image.png"
    path.write_bytes(PNG)
    url = f"{NOWHERE}/cat"
    parts = [
        picture(path=str(path)),
        TextPart("See"),
        picture(content=PNG),
        picture(type="image/webp", content=b"webp"),
        picture(type="image/jpeg", url=f"{url}.jpg?size=1"),
        picture(url=url),
    ]
    [built] = build_messages([message("user", *parts)], IMAGE_TYPES)
    urls = [PNG_URL, PNG_URL, "data:image/webp;base64,d2VicA==", f"{url}.jpg?size=1", url]
    assert built == {
        "role": "user",
        "content": [{"type": "text", "text": "See"}] + [{"type": "image_url", "image_url": {"url": u}} for u in urls],
    }


def test_what_is_no_image_is_a_note_for_vision_too() -> None:
    """A conversation begun with another model may hold a PDF, from bytes or from a URL."""
    pdf = picture(type="application/pdf", content=b"%PDF-")
    parts = [TextPart("Read"), pdf, picture(type="audio/wav", url=f"{NOWHERE}/a.wav")]
    assert build_messages([message("user", *parts)], IMAGE_TYPES)[0]["content"] == (
        "Read\n[application/pdf attachment, not shown to this model]\n[audio/wav attachment, not shown to this model]"
    )


# The empty prompt


@pytest.mark.parametrize("model", ["autonomous-llama", "autonomous-vision"])
@pytest.mark.parametrize(
    "prompt",
    [
        *({}, {"prompt": ""}, {"fragments": [""]}, {"messages": []}),
        *({"tools": [llm.Tool("look")]}, {"schema": {"type": "object"}}),
    ],
)
def test_an_empty_prompt_is_an_error_before_anything_is_sent(
    ask: Ask, service: HTTPXMock, model: str, prompt: dict[str, Any]
) -> None:
    """Nothing to ask is nothing to send."""
    assert ask(**{"prompt": None, **prompt}, model=model).line == "the prompt is empty: nothing was sent"
    assert service.get_requests() == []


@pytest.mark.parametrize(
    ("prompt", "last"),
    [
        pytest.param({"prompt": None, "fragments": ["a fragment"]}, user("a fragment"), id="a fragment alone"),
        pytest.param({"prompt": "0"}, user("0"), id="a short prompt"),
        pytest.param({"prompt": " \t\u2028"}, user(" \t\u2028"), id="blanks"),
        pytest.param({"prompt": " \n", "system": "Be brief"}, user(" \n"), id="blanks and a system prompt"),
        pytest.param({"prompt": " \n", "tools": [llm.Tool("look")]}, user(" \n"), id="blanks and a tool"),
        pytest.param({"prompt": "", "system": "Be brief"}, message("system", TextPart("Be brief")), id="system alone"),
        pytest.param({"messages": [user("Count"), assistant("one,")]}, assistant("one,"), id="a begun answer"),
    ],
)
def test_a_prompt_need_not_be_typed_text(ask: Ask, service: HTTPXMock, prompt: dict[str, Any], last: Message) -> None:
    """A fragment or a system prompt is one; a model may be given the first words of its answer."""
    assert ask(**{"prompt": None, **prompt}).text == "fine"
    assert messages_of(only(service))[-1] == {"role": last.role, "content": last.parts[0].text}


def test_a_conversation_may_begin_with_a_begun_answer(service: HTTPXMock) -> None:
    """What the caller wrote for the assistant is no answer that has been given."""
    model, begun = get_model("autonomous-llama"), [user("Count"), assistant("one,")]
    for response in (model.chain(messages=begun), model.conversation().prompt(messages=begun)):
        assert response.text() == "fine"
        assert messages_of(service.get_requests()[-1])[-1] == {"role": "assistant", "content": "one,"}


def test_nothing_typed_in_a_conversation_is_an_empty_prompt(service: HTTPXMock) -> None:
    """The answer that comes last then is not one that the model should go on with."""
    chat = get_model("autonomous-llama").conversation()
    assert chat.prompt("hi").text() == "fine"
    with pytest.raises(AutonomousError, match="the prompt is empty: nothing was sent"):
        chat.prompt("").text()
    assert len(service.get_requests()) == 1


@pytest.mark.parametrize("before", [{}, {"system": "Be brief"}], ids=["none before", "another before"])
def test_a_system_prompt_counts_on_any_turn(before: dict[str, str], service: HTTPXMock) -> None:
    """`llm` itself sends the one of the first turn alone. A later one takes its place, from then on."""
    chat = get_model("autonomous-llama").conversation()
    chat.prompt("hi", **before).text()
    written: dict[str, Any] = {"messages": [llm.Message(role="user", parts=[TextPart("hi there")])]}
    for settings, sent in (({"system": "In French"}, ["In French"]), ({}, ["In French"]), (written, [])):
        chat.prompt("And?", **settings).text()
        assert [m["content"] for m in messages_of(service.get_requests()[-1]) if m["role"] == "system"] == sent
    assert [message["role"] for message in messages_of(service.get_requests()[1])] == [
        "system",
        "user",
        "assistant",
        "user",
    ]


# The options


@pytest.mark.parametrize(
    ("option", "given", "taken"),
    [
        *(("proxy", url, url) for url in ("http://proxy:3128", "https://proxy", "socks5://127.0.0.1:1080", "", None)),
        ("proxy", "socks5h://[::1]:1080/", "socks5h://[::1]:1080/"),
        ("timeout", 5, 5.0),
        ("timeout", "0.5", 0.5),
        ("timeout", 86_400, 86_400.0),
        ("timeout", None, None),
    ],
)
def test_an_option_is_taken(option: str, given: Any, taken: Any) -> None:
    """All four kinds of proxy URL, or none; seconds as a number, or as text, as the command line has them."""
    assert getattr(AutonomousOptions(**{option: given}), option) == taken


NO_PROXIES = (
    "proxy proxy:3128 127.0.0.1:3128 ftp://proxy socks4://proxy http:// http://:3128 http://proxy:port "
    "http://proxy:99999 http://[::1"
)


@pytest.mark.parametrize(
    ("option", "given", "words"),
    [
        *(("proxy", url, "must be an http://, https://, socks5:// or socks5h:// URL") for url in NO_PROXIES.split()),
        *(("timeout", given, "timeout") for given in (0, -1, "0", "nan", "inf", "-inf", "soon", "", 86_401)),
    ],
)
def test_what_is_no_option_is_refused(option: str, given: Any, words: str) -> None:
    """The error says what kinds of URL there are; a timeout is not zero, less, endless or a word."""
    with pytest.raises(ValidationError, match=words):
        AutonomousOptions(**{option: given})


def test_there_is_no_other_option() -> None:
    """No sampling field was ever seen on the wire, and an option that does nothing is a lie."""
    assert set(AutonomousOptions.model_fields) == {"proxy", "timeout"}
    with pytest.raises(ValidationError, match="Extra inputs are not permitted"):
        AutonomousOptions.model_validate({"temperature": 0.5})


SECRET_PROXIES = (
    "http://me:hunter2@proxy:3128 https://hunter2@proxy socks5://me:hunter2@127.0.0.1:1080 socks5h://:hunter2@proxy "
    "me:hunter2@proxy:3128 http://me:hunter2@ http://me:hunter2@proxy:port http://me:hunter2@[::1 "
    "ftp://me:hunter2@proxy http://me:hunter2\uff20proxy http://me:hunter2%40proxy"
)


@pytest.mark.parametrize("proxy", SECRET_PROXIES.split())
def test_a_refused_proxy_is_never_repeated(proxy: str) -> None:
    """Neither the words of the error nor its traceback hold what was given."""
    with pytest.raises(ValidationError) as caught:
        AutonomousOptions(proxy=proxy)
    said = [str(caught.value), repr(caught.value), *(error["msg"] for error in caught.value.errors())]
    assert "hunter2" not in "".join([*said, *traceback.format_exception(caught.value)])
    assert "@" not in proxy or "set HTTPS_PROXY instead" in str(caught.value)


@pytest.mark.parametrize(
    "command",
    [
        "-m autonomous-llama hi -o proxy {}",
        "-m autonomous-llama hi --async -o proxy {}",
        "-m autonomous-llama hi -o proxy {} -o timeout never",
        "chat -m autonomous-llama -o proxy {}",
        "models options set autonomous-llama proxy {}",
        "autonomous check -o proxy {}",
    ],
)
def test_a_proxy_with_a_password_is_refused_by_every_command(
    command: str, user_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The command line says what to do instead, repeats no password, and writes none down."""
    monkeypatch.setenv("AUTONOMOUS_BASE_URL", NOWHERE)  # where a prompt goes if it is not refused
    result = CliRunner().invoke(cli, command.format(SECRET_PROXIES.split()[0]).split())
    assert result.exit_code == 1
    assert "set HTTPS_PROXY instead" in result.output
    assert "hunter2" not in result.output
    written = [path.read_bytes() for path in user_path.rglob("*") if path.is_file()]
    assert not any(b"hunter2" in data for data in written)


def test_the_options_are_shown_with_help() -> None:
    """`llm models --options` has a sentence for each, with the kinds of proxy and the default timeout."""
    shown = CliRunner().invoke(cli, ["models", "--options", "-q", "autonomous"])
    words = " ".join(shown.output.split())
    assert shown.exit_code == 0
    assert (
        "proxy: str Proxy to use: an http://, https://, socks5:// or socks5h:// URL, or nothing ('') for no proxy. LLM "
        "logs options, so if the proxy needs a password, set HTTPS_PROXY instead. "
        "timeout: float Seconds to wait for more of the reply before the prompt fails. Default: 120." in words
    )
    assert shown.output.count("timeout: float") == len(BACKENDS)


@pytest.mark.parametrize("timeout", [None, 5.0, 30.0])
def test_the_timeout_bounds_silence_and_connecting_has_its_own_bound(
    ask: Ask, service: HTTPXMock, timeout: float | None
) -> None:
    """120 seconds by default, 10 at most to connect, and no limit on the wait for a connection of the pool."""
    ask("hi", timeout=timeout)
    seconds = timeout or 120.0
    expected = {"connect": min(seconds, 10.0), "read": seconds, "write": seconds, "pool": None}
    assert only(service).extensions["timeout"] == expected
