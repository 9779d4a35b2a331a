"""The wire format of the Autonomous service, in front of any server with an OpenAI-compatible API.

    python tests/bridge.py --to http://127.0.0.1:11434/v1 --model qwen2.5-coder llm -m autonomous-llama "Hello"
    python tests/bridge.py --to http://127.0.0.1:11434/v1 --model qwen2.5-coder

The first runs a command whose prompts go to that server, which this file calls the *upstream*. The second serves until
Ctrl-C. Every model of the plugin is answered by the one model upstream. The reply is passed on as it comes, byte for
byte, so that the plugin reads what such servers really send.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any

import httpx
from loopback import DONE, Connection, Loopback, Request, check, run

CONNECT_TIMEOUT = 10.0  # seconds. There is no other timeout: a client that is tired of waiting leaves.
LEFT = "the client left"
PASSED_ON = ("content-type", "retry-after")

Exchange = dict[str, Any]


class Bridge(Loopback):
    """A server of the wire format that sends each prompt to ``to``: ``with Bridge(...) as bridge: ... bridge.url``.

    ``to`` is the URL that ends in ``/v1``. ``fields`` go into the body of each request upstream, such as
    ``{"temperature": 0}``. ``record`` is given each exchange when it is over (see `read_reply` for its keys).
    """

    def __init__(
        self,
        to: str,
        model: str,
        fields: dict[str, Any] | None = None,
        key: str = "",
        record: Callable[[Exchange], None] = lambda exchange: None,
    ) -> None:
        super().__init__(self._pass_on)
        self._url = f"{to.rstrip('/')}/chat/completions"
        self._fields = {"model": model, **(fields or {})}
        self._headers = {"authorization": f"Bearer {key}"} if key else {}
        self._record = record
        self.active = 0  # exchanges that are not over yet: a client may have its answer before it is recorded
        self._certificates = httpx.create_ssl_context()  # once, since it takes longer than a request

    async def _pass_on(self, request: Request, connection: Connection) -> None:
        self.requests.clear()  # a bridge may serve for days
        if wrong := check(request):
            await connection.whole(error_body(wrong), "400 Bad Request")
            return
        stream = request.payload["stream"] is True
        body = {**self._fields, "messages": request.messages, "stream": stream}
        if stream:
            body["stream_options"] = {"include_usage": True}
        self.active += 1
        received = bytearray()
        exchange: Exchange = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "model": request.payload["aiAgent"],
            "stream": stream,
            "messages": request.messages,
        }
        begin = time.monotonic()
        try:
            await self._converse(body, connection, received, exchange)
        except httpx.HTTPError as failure:
            exchange["error"] = f"{type(failure).__name__}: {failure}"
            if connection.chunked:  # some of the reply is on its way, so all that is left is to break it off
                await connection.drop()
            else:
                words = f"the bridge gets no answer from {self._url}: {exchange['error']}"
                await connection.whole(error_body(words), "502 Bad Gateway")
        except (asyncio.CancelledError, OSError):
            if not received.endswith(DONE):  # after which nothing is worth waiting for
                exchange["error"] = LEFT
            raise
        finally:
            self._record({**exchange, **read_reply(bytes(received)), "seconds": round(time.monotonic() - begin, 3)})
            self.active -= 1

    async def _converse(
        self, body: dict[str, Any], connection: Connection, received: bytearray, exchange: Exchange
    ) -> None:
        """Send ``body`` upstream, and pass the reply on. Leaving the ``with`` early cancels the request upstream."""
        timeout = httpx.Timeout(None, connect=CONNECT_TIMEOUT)
        async with (
            httpx.AsyncClient(verify=self._certificates, timeout=timeout) as client,
            client.stream("POST", self._url, json=body, headers=self._headers) as reply,
        ):
            exchange["status"] = reply.status_code
            status = f"{reply.status_code} {reply.reason_phrase}"
            headers = {name: reply.headers[name] for name in PASSED_ON if name in reply.headers}
            if body["stream"]:
                await connection.head(status, headers)
            async for data in reply.aiter_bytes():
                received += data
                if body["stream"]:
                    await connection.send(data)
        if body["stream"]:
            await connection.end()
        else:
            await connection.whole(bytes(received), status, headers)


def error_body(words: str) -> bytes:
    return json.dumps({"error": {"message": words}}).encode()


def read_reply(body: bytes) -> Exchange:
    """What the log says of a reply: its ``text`` and, if they were sent, ``reasoning``, ``finish_reason``, ``usage``.

    What is not part of a completion, such as an error, is added to the text as it is.
    """
    reply = body.decode("utf-8", "replace")
    found: Exchange = {"text": ""}
    for event in [line[5:] for line in reply.split("\n") if line.startswith("data:")] or [reply]:
        try:
            chunk = json.loads(event)
            for choice in chunk["choices"] or []:
                part = choice.get("delta") or choice.get("message") or {}
                found["text"] += part.get("content") or ""
                if reasoning := part.get("reasoning_content") or part.get("reasoning"):
                    found["reasoning"] = found.get("reasoning", "") + reasoning
                if reason := choice.get("finish_reason"):
                    found["finish_reason"] = reason
            if usage := chunk.get("usage"):
                found["usage"] = usage
        except (ValueError, KeyError, TypeError, AttributeError):
            found["text"] += "" if event.strip() == "[DONE]" else event
    return found


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        description="Let the models of llm-autonomous be answered by any server with an OpenAI-compatible API.",
        epilog="With a command, run it; without one, serve until Ctrl-C.",
    )
    parser.add_argument("--to", required=True, metavar="URL", help="the server, such as http://127.0.0.1:11434/v1")
    parser.add_argument("--model", required=True, help="the name of the model at that server")
    parser.add_argument("--temperature", type=float, metavar="T", help="0 for the most likely answer")
    parser.add_argument("--seed", type=int, metavar="N", help="of the sampling")
    parser.add_argument("--max-tokens", type=int, metavar="N", help="the longest answer")
    parser.add_argument("--key-variable", metavar="NAME", help="the environment variable that has the server's API key")
    parser.add_argument("--log", metavar="FILE", help="add each exchange to this file, as a line of JSON")
    parser.add_argument("command", nargs=argparse.REMAINDER, help='such as: llm -m autonomous-llama "Hello"')
    options = parser.parse_args(arguments)
    if not options.to.startswith(("http://", "https://")):
        parser.error("--to must be an http:// or https:// URL, such as http://127.0.0.1:11434/v1")
    key = os.environ.get(options.key_variable, "") if options.key_variable else ""
    if options.key_variable and not key:
        parser.error(f"the environment variable {options.key_variable} is not set")
    fields = {name: getattr(options, name) for name in ("temperature", "seed", "max_tokens")}
    fields = {name: value for name, value in fields.items() if value is not None}
    with open(options.log or os.devnull, "a", encoding="utf-8", buffering=1) as log:

        def record(exchange: Exchange) -> None:
            log.write(json.dumps(exchange, ensure_ascii=False) + "\n")

        with Bridge(options.to, options.model, fields, key, record) as bridge:
            return run(options.command, bridge.url)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
