"""The bootstrap server, asked over HTTP: only its own processes register; each start has a
number."""

import contextlib
import socket
import time
from collections.abc import Iterator
from typing import Any

import pytest
import requests

from sglang_hma.config import CONFIG_ENV, MAX_OFFLOAD, HmaConfig
from sglang_hma.transfer import own_processes
from sglang_hma.transfer.bootstrap import (
    BOOT_HEADER,
    KEY_FIELD,
    OFFLOAD_HEADER,
    PROOF_HEADER,
    HmaBootstrapServer,
    proves,
    register,
    registration,
)
from sglang_hma.transfer.decode import routes
from sglang_hma.transfer.seals import answer_seal, seal

ROW = {
    **{f"attn_{kind}_size": 1 for kind in ("tp", "cp", "dp")},
    **{f"attn_{kind}_rank": 0 for kind in ("tp", "cp", "dp")},
    **{"pp_size": 1, "pp_rank": 0, "system_dp_size": 1, "system_dp_rank": 0},
    **{"rank_ip": "127.0.0.1", "rank_port": 4321, "page_size": 32, "kv_cache_dtype": "auto"},
}


@contextlib.contextmanager
def serving(port: int) -> Iterator[str]:
    server = HmaBootstrapServer("127.0.0.1", port)
    address = f"127.0.0.1:{port}"
    try:
        for _ in range(6000):
            with contextlib.suppress(requests.ConnectionError):
                requests.get(f"http://{address}/health")
                break
            time.sleep(0.01)
        yield address
    finally:
        server.close()


@pytest.fixture
def port(monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setenv(own_processes.KEY_ENV, "the key of this server")
    monkeypatch.setenv(CONFIG_ENV, HmaConfig(role="prefill").environment()[CONFIG_ENV])
    with socket.create_server(("127.0.0.1", 0)) as free:
        return int(free.getsockname()[1])


def put(address: str, row: Any, path: str = "route") -> int:
    method = "PUT" if path == "route" else "POST"
    return requests.request(method, f"http://{address}/{path}", json=row).status_code


def test_only_its_own_processes_register(port: int) -> None:
    with serving(port) as address:
        forged = ROW | {"rank_port": 6666}
        for row in (
            *(forged, forged | {KEY_FIELD: ""}, forged | {KEY_FIELD: "another server's"}),
            *(forged | {KEY_FIELD: None}, forged | {KEY_FIELD: ["x"]}, [forged], "text", None),
            registration(ROW) | {"rank_port": 6666},
        ):
            assert put(address, row) == 403, row
        assert routes.fetch(address) is None, "nobody has registered"
        assert put(address, registration(ROW)) == 200
        assert put(address, forged) == 403
        found = routes.fetch(address, (0, 0, 0, 0))
        assert found is not None and routes.parse_rank(found.route).rank_port == 4321
        answer = routes.fetch(address)
        assert answer is not None and routes.parse(answer.route).page_size == 32


@pytest.mark.parametrize("body", [b"[" * 100_000, b'{"a":' * 100_000, b"\xff", b"9" * 5000])
def test_a_body_that_no_parser_takes_is_refused(port: int, body: bytes) -> None:
    with serving(port) as address:
        for method, path in (("PUT", "route"), ("POST", "register_dp_rank")):
            assert (
                requests.request(method, f"http://{address}/{path}", data=body).status_code == 403
            )


def test_a_restarted_server_has_another_number(port: int) -> None:
    boots = []
    for _ in range(2):
        with serving(port) as address:
            assert put(address, registration(ROW)) == 200
            answer = routes.fetch(address)
            assert answer is not None
            again = requests.get(f"http://{address}/health").headers[BOOT_HEADER]
            assert again == answer.boot
            boots.append(answer.boot)
    assert boots[0] != boots[1]


@pytest.mark.parametrize("below", [0, 1, MAX_OFFLOAD])
def test_it_says_which_prompts_are_decodes(
    port: int, below: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = HmaConfig(role="prefill", offload_below=below)
    monkeypatch.setenv(CONFIG_ENV, config.environment()[CONFIG_ENV])
    with serving(port) as address:
        assert put(address, registration(ROW)) == 200
        answer = routes.fetch(address)
        assert answer is not None and answer.offload_below == below


@pytest.mark.parametrize("said", ["-1", "x", str(MAX_OFFLOAD + 1), "1.5", ""])
def test_nonsense_about_prompts_is_no_answer(
    port: int, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Odd(HmaBootstrapServer):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            self._said[OFFLOAD_HEADER] = said

    monkeypatch.setattr("test.transfer.test_bootstrap.HmaBootstrapServer", Odd)
    with serving(port) as address:
        assert put(address, registration(ROW)) == 200
        assert routes.fetch(address) is None


@pytest.mark.parametrize("header", [BOOT_HEADER, OFFLOAD_HEADER])
def test_the_proof_is_of_the_headers_too(header: str) -> None:
    key, asked, body = b"k" * 32, seal(b"k" * 32, "GET /route", b""), b"{}"
    headers = {BOOT_HEADER: "1a", OFFLOAD_HEADER: "64"}
    proof = answer_seal(key, asked, b"200", b"1a", b"64", body)
    proven = headers | {PROOF_HEADER: proof}
    assert proves(key, asked, 200, proven, body)
    assert not proves(key, asked, 200, proven | {header: "65"}, body)


def test_ranks_of_rooms(port: int) -> None:
    with serving(port) as address:
        assert put(address, registration(ROW)) == 200
        path = "register_dp_rank"
        for odd in (
            *({"bootstrap_room": -1, "dp_rank": 0}, {"bootstrap_room": 1 << 63, "dp_rank": 0}),
            *({"bootstrap_room": 5, "dp_rank": 1}, {"bootstrap_room": "5"}, {}),
        ):
            assert put(address, registration(odd), path) == 400, odd
        row = {"bootstrap_room": 5, "dp_rank": 0}
        for forged in (row, registration(row) | {"dp_rank": 1}, [5], None):
            assert put(address, forged, path) == 403, forged
        register(f"http://{address}/{path}", row)
        with pytest.raises(OSError, match="400"):
            register(f"http://{address}/{path}", row | {"dp_rank": 1})
