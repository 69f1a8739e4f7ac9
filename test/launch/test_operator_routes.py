"""Commands that need a flag."""

import asyncio
import json
from typing import Any

import pytest
from sglang.srt.entrypoints.http_server import app
from sglang.srt.server_args import ServerArgs

from sglang_hma.launch.operator_routes import NEEDS, OperatorRoutes


def answer(path: str, settings: dict[str, Any]) -> tuple[int, str]:
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    async def application(scope: Any, receive: Any, send: Any) -> None:
        await send({"status": 200})
        await send({"body": b'{"error": {"message": "passed on"}}'})

    async def receive() -> Any:
        pytest.fail("nothing of the body is needed")

    routes = OperatorRoutes(application, setting=settings.get)
    asyncio.run(routes({"type": "http", "path": path}, receive, send))
    return sent[0]["status"], json.loads(sent[1]["body"])["error"]["message"]


@pytest.mark.parametrize("path", NEEDS)
def test_a_command_needs_its_flag(path: str) -> None:
    status, words = answer(path, {})
    assert status == 400 and path in words and f"--{NEEDS[path].replace('_', '-')}" in words
    assert answer(path, {NEEDS[path]: "stat"}) == (200, "passed on")
    assert answer(path + "/", {})[0] == 400


def test_others_pass() -> None:
    assert answer("/generate", {}) == (200, "passed on")


def test_routes_and_settings_are_sglangs() -> None:
    assert NEEDS.keys() <= {getattr(route, "path", None) for route in app.routes}
    assert set(NEEDS.values()) <= set(ServerArgs.__struct_fields__)
