"""The entry and SGLang's own router before two servers that say what reached them."""

import json
import threading
from collections.abc import Iterator
from contextlib import closing
from http.client import HTTPConnection
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import requests
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

from sglang_hma.launch.unpacking import Unpacking
from test.e2e.harness import Server, free_port, launch_router, running

CHUNKS = ["data: é\n\n", "data: 2\n\n", "data: [DONE]\n\n"]


class Told:
    """A server that keeps what reaches it, and answers with what a request asks for."""

    def __init__(self, role: str) -> None:
        self.role, self.port = role, free_port()
        self.got: list[tuple[str, Any, dict[str, str]]] = []
        app = Starlette(routes=[Route("/{path:path}", self.answer, methods=["GET", "POST"])])
        app.add_middleware(Unpacking)
        config = uvicorn.Config(app, port=self.port, log_level="warning")
        self.server = uvicorn.Server(config)
        self.thread = threading.Thread(target=self.server.run, daemon=True)
        self.thread.start()

    async def answer(self, request: Request) -> Response:
        if request.method == "GET":
            if request.url.path == "/metrics":
                own = f"# TYPE {self.role} gauge\n{self.role} 1\n"
                return PlainTextResponse(f"{own}# TYPE sglang_hma:a_b gauge\nsglang_hma:a_b 1\n")
            found = {"model_path": "m", "data": [{"id": "m"}], "role": self.role}
            return JSONResponse(found | {"path": str(request.url.path)})
        try:
            body = await request.json()
        except ValueError:
            return JSONResponse({"message": "no JSON"}, 422)
        self.got.append((request.url.path, body, dict(request.headers)))
        asked = body if isinstance(body, dict) else {}
        if "refuse" in asked:
            return JSONResponse({"object": "error", "message": "no"}, asked["refuse"])
        if asked.get("stream"):
            return StreamingResponse(iter(CHUNKS), media_type="text/event-stream")
        return JSONResponse({"role": self.role, "text": "é"})

    def stop(self) -> None:
        self.server.should_exit = True
        self.thread.join()


@pytest.fixture(scope="module")
def behind(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Told, Told]]:
    """URL of the entry, and the prefill and the decode server."""
    logs: Path = tmp_path_factory.mktemp("logs")
    prefill, decode = Told("prefill"), Told("decode")
    places = [
        Server(told.role, [], logs / told.role, url=f"http://127.0.0.1:{told.port}")
        for told in (prefill, decode)
    ]
    places[0].bootstrap_port = 8998
    router = launch_router(logs, *places, name="entry")
    try:
        with running(router):
            yield router.url, prefill, decode
    finally:
        prefill.stop()
        decode.stop()


def ask(behind: tuple[str, Told, Told], path: str, body: Any, **headers: str) -> requests.Response:
    url, *told = behind
    for each in told:
        each.got.clear()
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    return requests.post(url + path, data=data, headers=headers)


@pytest.mark.parametrize(
    ("path", "body", "rooms"),
    [
        (
            "/generate",
            {
                "text": ["a", "b"],
                "sampling_params": {"logit_bias": {"7": -1.5}, "stop_regex": "x+", "n": 2},
                "unknown": [None, 1e300],
            },
            4,
        ),
        ("/generate", {"input_ids": [1, 2], "return_logprob": True, "logprob_start_len": 0}, 1),
        ("/v1/completions", {"model": "m", "prompt": [1, 2], "logprobs": 1, "echo": True}, 1),
        ("/v1/completions", {"model": "m", "prompt": [[1], [2]]}, 2),
        (
            "/v1/chat/completions",
            {"model": "m", "messages": [{"role": "user", "content": ""}], "n": 3, "strange": 1},
            3,
        ),
        ("/v1/chat/completions", {"model": "m", "messages": [], "max_tokens": 0}, 1),
        ("/v1/responses", {"model": "m", "input": "a"}, 1),
        ("/v1/messages", {"model": "m", "messages": [], "max_tokens": 5}, 1),
    ],
)
def test_requests_arrive_whole(
    behind: tuple[str, Told, Told], path: str, body: dict[str, Any], rooms: int
) -> None:
    reply = ask(behind, path, body, **{"Authorization": "Bearer k", "X-Request-Id": "r"})
    assert reply.status_code == 200 and reply.json() == {"role": "decode", "text": "é"}
    assert reply.headers["content-type"] == "application/json"
    (to_prefill,), (to_decode,) = (told.got for told in behind[1:])
    assert to_prefill[:2] == to_decode[:2]
    where, arrived, headers = to_decode
    assert where == path
    given = {name: arrived.pop(name) for name in ("bootstrap_host", "bootstrap_port")}
    room = arrived.pop("bootstrap_room")
    assert arrived == body
    assert headers["authorization"] == "Bearer k" and headers["x-request-id"] == "r"
    if rooms == 1:
        assert isinstance(room, int) and given["bootstrap_port"] == 8998
    else:
        assert len(set(room)) == rooms and given["bootstrap_port"] == [8998] * rooms


def test_a_body_s_type_is_the_client_s(behind: tuple[str, Told, Told]) -> None:
    """SGLang refuses all but one: a page of another site cannot send that one."""
    for kind in ("text/plain", "application/json; charset=utf-8"):
        ask(behind, "/generate", {"text": "a"}, **{"Content-Type": kind})
        assert [told.got[0][2]["content-type"] for told in behind[1:]] == [kind, kind]
    ask(behind, "/generate", {"text": "a"})
    assert not [told for told in behind[1:] if "content-type" in told.got[0][2]]


def test_headers_are_the_client_s(behind: tuple[str, Told, Told]) -> None:
    """With none of the entry's own: an answer is not compressed for a client that reads none."""
    behind[2].got.clear()
    place = urlsplit(behind[0])
    with closing(HTTPConnection(str(place.hostname), place.port)) as client:
        client.putrequest("POST", "/tokenize", skip_accept_encoding=True)
        client.putheader("Content-Length", "13")
        client.putheader("x-name", "é".encode())
        client.endheaders(b'{"text": "a"}')
        assert client.getresponse().status == 200
    headers = behind[2].got[0][2]
    assert headers["x-name"].encode("latin-1") == "é".encode()
    assert not {"accept-encoding", "user-agent", "content-type"} & set(headers)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("status", [400, 404, 422])
def test_refusals_are_the_servers_own(
    behind: tuple[str, Told, Told], status: int, stream: bool
) -> None:
    """Not more often than a router would take a server for broken."""
    reply = ask(behind, "/v1/chat/completions", {"refuse": status, "stream": stream})
    assert reply.status_code == status
    assert reply.json() == {"object": "error", "message": "no"}
    assert reply.headers["content-type"] == "application/json"
    assert not [name for name in reply.headers if name.startswith("x-hma")]


def test_streams(behind: tuple[str, Told, Told]) -> None:
    reply = ask(behind, "/generate", {"text": "a", "stream": True})
    assert reply.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert reply.content.decode() == "".join(CHUNKS)


def test_what_is_no_request(behind: tuple[str, Told, Told]) -> None:
    assert ask(behind, "/generate", b"{nonsense").status_code == 422
    assert ask(behind, "/generate", [1, 2]).status_code == 200
    assert behind[2].got[0][1] == [1, 2]
    refused = ask(behind, "/generate", b'{"text": "\xff"}')
    assert refused.status_code == 400 and "0xff" in refused.json()["message"]
    assert not behind[2].got


@pytest.mark.parametrize(
    "path", ["/v1/models", "/get_model_info", "/get_server_info", "/get_load", "/v1/loads"]
)
def test_questions_are_answered_as_by_one_server(behind: tuple[str, Told, Told], path: str) -> None:
    reply = requests.get(behind[0] + path)
    assert reply.status_code == 200 and reply.headers["content-type"] == "application/json"
    assert reply.json()["role"] == "decode" and reply.json()["path"] == path


def test_metrics_of_all_servers(behind: tuple[str, Told, Told]) -> None:
    found = "\n" + requests.get(f"{behind[0]}/metrics").text
    for told in behind[1:]:
        assert f"{told.role}{{" in found and str(told.port) in found
    assert found.count("\nsglang_hma:a_b{") == 2 and "\n# TYPE sglang_hma:a_b gauge\n" in found


@pytest.mark.parametrize(
    "path", ["/flush_cache", "/abort_request", "/update_weights_from_disk", "/release_memory"]
)
def test_what_changes_a_server_does_not_reach_it(behind: tuple[str, Told, Told], path: str) -> None:
    reply = ask(behind, path, {})
    assert path == "/flush_cache" or reply.status_code in (404, 405)
    assert not [where for told in behind[1:] for where, *_ in told.got if where != "/flush_cache"]


def test_questions_want_the_router_s_key(tmp_path: Path) -> None:
    """They go past it, to a server that may have no key of its own."""
    servers = [Told("prefill"), Told("decode")]
    places = [
        Server(told.role, [], tmp_path / told.role, url=f"http://127.0.0.1:{told.port}")
        for told in servers
    ]
    places[0].bootstrap_port = 8998
    router = launch_router(tmp_path, *places, name="keyed", more=("--api-key", "k"))
    try:
        with running(router):
            for key, status in (("", 401), ("Bearer l", 401), ("k", 401), ("Bearer k", 200)):
                headers = {"Authorization": key} if key else {}
                for path in ("/v1/models", "/get_server_info"):
                    reply = requests.get(router.url + path, headers=headers)
                    assert reply.status_code == status, reply.text
                reply = requests.post(f"{router.url}/generate", json={"text": "a"}, headers=headers)
                assert reply.status_code == status, reply.text
    finally:
        for told in servers:
            told.stop()
