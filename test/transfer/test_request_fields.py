"""Bootstrap fields of requests as clients may write them, in SGLang's own request class."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sglang.srt.managers.io_struct import GenerateReqInput
from sglang.srt.managers.tokenizer_manager import ServerStatus

from sglang_hma.config import HmaConfig
from sglang_hma.transfer import request_fields
from sglang_hma.transfer.request_fields import FAKE_HOST, MAX_ROOM, Peers, refuse

ONE, TWO = "127.0.0.1:8998", "[fd00::1]:8999"
GOOD = {"bootstrap_host": "127.0.0.1", "bootstrap_port": 8998, "bootstrap_room": 7}


def refusal(
    prompts: int | None = None, samples: int = 1, *, may_fake: bool = False, **fields: Any
) -> str | None:
    """`prompts` None: one request that is no list."""
    ids = [1, 2, 3]
    obj = GenerateReqInput(
        input_ids=ids if prompts is None else [ids] * prompts,
        sampling_params={"n": samples},
        **GOOD | fields,
    )
    obj.normalize_batch_and_arguments()
    return refuse(obj, Peers([ONE, TWO]), port=8998, may_fake=may_fake)


def test_what_the_router_sends_is_accepted() -> None:
    assert refusal() is None
    assert refusal(bootstrap_port=None) is None
    assert refusal(bootstrap_host="FD00:0::1", bootstrap_port=8999) is None
    assert refusal(bootstrap_host="[fd00::1]", bootstrap_port=8999) is None
    assert refusal(bootstrap_room=MAX_ROOM) is None
    assert refusal(2, bootstrap_room=[5, 6]) is None
    assert refusal(2) is None
    assert refusal(2, bootstrap_host=["127.0.0.1"] * 2, bootstrap_port=[8998] * 2) is None
    assert refusal(samples=2) is None


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"bootstrap_host": None}, "bootstrap_host is None"),
        ({"bootstrap_host": ""}, "neither an IP address nor a host name"),
        ({"bootstrap_host": "10.0.0.9"}, "10.0.0.9:8998 is none of the prefill servers"),
        ({"bootstrap_port": 8997}, "127.0.0.1:8997 is none of the prefill servers"),
        ({"bootstrap_host": "127.0.0.1:8998/x?"}, "neither an IP address"),
        ({"bootstrap_host": "a\n"}, "neither an IP address"),
        ({"bootstrap_host": "x" * 10_000}, "neither an IP address"),
        ({"bootstrap_host": ["127.0.0.1"]}, "not a host"),
        ({"bootstrap_host": FAKE_HOST}, "own health checks"),
        ({"bootstrap_port": 0}, "bootstrap_port is 0"),
        ({"bootstrap_port": 1 << 16}, "bootstrap_port is 65536"),
        ({"bootstrap_port": [8998]}, "not a port"),
        ({"bootstrap_room": None}, "bootstrap_room is None"),
        ({"bootstrap_room": 0}, "bootstrap_room is 0"),
        ({"bootstrap_room": -1}, "bootstrap_room is -1"),
        ({"bootstrap_room": 1 << 63}, "bootstrap_room is 9223372036854775808"),
        ({"bootstrap_room": [7]}, "bootstrap_room is [7]"),
        ({"bootstrap_room": True}, "bootstrap_room is True"),
    ],
)
def test_what_clients_may_not_write_is_refused(fields: dict[str, Any], words: str) -> None:
    reason = refusal(**fields)
    assert reason is not None and words in reason
    assert "\n" not in reason and len(reason) < 200


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"bootstrap_room": [7]}, "one for each of the 2 prompts"),
        ({"bootstrap_room": [7, 8, 9]}, "one for each of the 2 prompts"),
        ({"bootstrap_room": []}, "one for each of the 2 prompts"),
        ({"bootstrap_room": [7, 7]}, "for two requests in one"),
        ({"bootstrap_room": [7, None]}, "bootstrap_room is None"),
        ({"bootstrap_host": ["127.0.0.1"]}, "one for each of the 2 prompts"),
        ({"bootstrap_host": ["127.0.0.1", FAKE_HOST]}, "own health checks"),
        ({"bootstrap_host": ["127.0.0.1", None]}, "bootstrap_host is None"),
        ({"bootstrap_port": [8998, 1]}, "127.0.0.1:1 is none"),
    ],
)
def test_lists_of_several_prompts(fields: dict[str, Any], words: str) -> None:
    reason = refusal(2, **fields)
    assert reason is not None and words in reason


def test_the_server_itself_may_name_the_fake_host() -> None:
    assert refusal(bootstrap_host=FAKE_HOST, bootstrap_room=0, may_fake=True) is None
    assert refusal(2, bootstrap_host=[FAKE_HOST, "10.0.0.9"], may_fake=True) is not None


ANY = st.one_of(
    st.none(), st.integers(), st.floats(), st.text(), st.booleans(), st.lists(st.integers())
)


@given(ANY, ANY, ANY)
def test_no_value_is_too_odd(host: Any, port: Any, room: Any) -> None:
    for peers in (Peers(None), Peers([ONE])):
        reason = request_fields.refuse_one(peers, host, port, room)
        assert reason is None or "\n" not in reason


class Server:
    """What is asked of SGLang's tokenizer manager, and a request of its HTTP server."""

    def __init__(self, status: ServerStatus, path: str | None, root_path: str = "") -> None:
        self.server_status = status
        self.scope = {"path": path, "root_path": root_path}


@pytest.mark.parametrize(
    ("status", "path", "own"),
    [
        (ServerStatus.Up, "/generate", False),
        (ServerStatus.Up, "/v1/completions", False),
        (ServerStatus.UnHealthy, "/generate", False),
        (ServerStatus.Up, "/generate/health", False),
        (ServerStatus.Up, "/health", True),
        (ServerStatus.Up, "/health_generate", True),
        (ServerStatus.Starting, "/generate", True),
    ],
)
def test_who_is_the_server_itself(status: ServerStatus, path: str, own: bool) -> None:
    """A client chooses every header, but not which of SGLang's handlers it gets."""
    server = Server(status, path)
    assert request_fields._is_own(server, server) == own


@pytest.mark.parametrize(("role", "allowed"), [("decode", False), ("prefill", True)])
def test_only_decode_asks_who_sends_pages(
    role: Any, allowed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = HmaConfig(role=role, prefill_peers=(ONE,))
    for name, value in config.environment().items():
        monkeypatch.setenv(name, value)
    assert (request_fields.configured_peers().refuse("10.0.0.9", 1) is None) == allowed
