"""Real managers with a cluster secret: they serve each other, and whoever lacks it gets nowhere
with any port of theirs."""

import contextlib
import ctypes
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import requests
import torch
import zmq
import zmq.utils.z85
from sglang.srt.disaggregation.base.conn import KVPoll
from sglang.srt.disaggregation.common.conn import AbortNotification
from zmq.utils.monitor import recv_monitor_message

from sglang_hma import cluster_secret
from sglang_hma.cluster_secret import ClusterKeys
from sglang_hma.transfer import curve
from sglang_hma.transfer.bootstrap import SEAL_HEADER, question
from sglang_hma.transfer.decode import routes
from sglang_hma.transfer.decode.sealed_session import get_bootstrap_session
from sglang_hma.transfer.messages import Claim, Verified, frames
from sglang_hma.transfer.seals import seal

from .real_managers import HOST, Pair, arrive, real_pair, settings, until

PLACE = "prefill_dp_rank=-1&prefill_cp_rank=-1&target_tp_rank=-1&target_pp_rank=-1"
REFUSED = zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
REFUSED |= zmq.EVENT_HANDSHAKE_FAILED_AUTH | zmq.EVENT_DISCONNECTED


def new_secret(folder: Path, name: str = "secret") -> str:
    cluster_secret.make(folder / name)
    return str(folder / name)


@pytest.fixture(scope="module")
def secret(tmp_path_factory: pytest.TempPathFactory) -> str:
    return new_secret(tmp_path_factory.mktemp("cluster"))


@pytest.fixture(scope="module")
def sealed(secret: str) -> Iterator[Pair]:
    with real_pair({"prefill": secret, "decode": secret}) as pair:
        yield pair


def test_requests_go_their_way(sealed: Pair) -> None:
    for _ in range(3):
        sealed.check()


# -- control ports --


def speak(port: int, options: dict[int, Any], messages: Sequence[Sequence[bytes]]) -> bool:
    """Whether a server took the connection. Returns when it has, or has refused it."""
    with zmq.Context() as context, context.socket(zmq.PUSH) as socket:
        socket.setsockopt(zmq.LINGER, 0)
        for name, value in options.items():
            socket.setsockopt(name, value)
        events = REFUSED | zmq.EVENT_HANDSHAKE_SUCCEEDED
        with socket.get_monitor_socket(events) as monitor:
            socket.connect(f"tcp://{HOST}:{port}")
            for message in messages:
                with contextlib.suppress(zmq.Again):  # it has been refused already
                    socket.send_multipart(list(message), zmq.NOBLOCK)
            event = recv_monitor_message(monitor)["event"]
            socket.disable_monitor()
    return bool(event == zmq.EVENT_HANDSHAKE_SUCCEEDED)


def client(server_key: bytes, private: bytes) -> dict[int, Any]:
    text = zmq.utils.z85.encode(private)
    return {
        zmq.CURVE_SERVERKEY: zmq.curve_public(zmq.utils.z85.encode(server_key)),
        zmq.CURVE_PUBLICKEY: zmq.curve_public(text),
        zmq.CURVE_SECRETKEY: text,
    }


def strangers(keys: ClusterKeys, role: str) -> dict[str, dict[int, Any]]:
    """What somebody may try at the control port of a server of this role."""
    other = ClusterKeys(os.urandom(32))
    peer = cluster_secret.PEER[role]
    return {
        "no keys": {},
        "another secret": dict(curve.calling_options(other, peer)),
        "the server's public key, and one of his own": client(keys.listening(role), os.urandom(32)),
        "the key of a server of the same role": client(keys.listening(role), keys.calling(role)),
        "the server's own key": client(keys.listening(role), keys.listening(role)),
    }


@pytest.mark.parametrize("role", ["prefill", "decode"])
def test_no_message_of_a_stranger_arrives(
    sealed: Pair, secret: str, role: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever registers, claims, aborts or reports is somebody that knows the secret."""
    sealed.check()
    keys = ClusterKeys(cluster_secret.read(secret))
    manager = getattr(sealed, role)
    arrived: list[Any] = []
    screen = manager.intake.screen
    monkeypatch.setattr(
        manager.intake, "screen", lambda *given: arrived.append(given) or screen(*given)
    )
    name = str(next(sealed.rooms)).encode()
    messages = [
        sealed.decode.build_receiver_registration_message(),
        frames(Claim(int(name), HOST, 9)),
        frames(Verified(int(name), 1, sealed.decode.get_session_id())),
        AbortNotification(int(name), HOST, 9, 1).to_zmq(),
        [name, b"0", b"0"],
    ]
    for what, options in strangers(keys, role).items():
        assert not speak(manager.rank_port, options, messages), what
    assert not arrived
    mate = dict(curve.calling_options(keys, cluster_secret.PEER[role]))
    assert speak(manager.rank_port, mate, messages)
    sealed.check()


def test_a_running_request_is_not_ended(sealed: Pair, secret: str) -> None:
    room = next(sealed.rooms)
    sender, receiver = sealed.sender(room), sealed.receiver(room)
    keys = ClusterKeys(cluster_secret.read(secret))
    abort = AbortNotification(room, HOST, sealed.decode.rank_port, None).to_zmq()
    failed = [str(room).encode(), b"0", b"0"]
    for role, message in (("prefill", abort), ("decode", failed)):
        for options in strangers(keys, role).values():
            speak(getattr(sealed, role).rank_port, options, [message])
    assert receiver.poll() != KVPoll.Failed
    arrive(sealed, sender, receiver, [3, 4], [5, 6])


# -- the bootstrap server --


def test_a_stranger_is_told_nothing(sealed: Pair, secret: str) -> None:
    url, path = f"http://{sealed.bootstrap}", f"/route?{PLACE}"
    keys, other = ClusterKeys(cluster_secret.read(secret)), ClusterKeys(os.urandom(32))
    good = seal(keys.bootstrap, question("GET", path), b"")
    assert requests.get(url + path, headers={SEAL_HEADER: good}).json()["kv_layout"]
    for what, given in {
        "none": None,
        "empty": "",
        "again": good,
        "cut": seal(keys.bootstrap, question("GET", path), b"")[:-1],
        "another key's": seal(other.bootstrap, question("GET", path), b""),
        "another path's": seal(keys.bootstrap, question("GET", "/route"), b""),
        "another content's": seal(keys.bootstrap, question("GET", path), b"x"),
        "no text": "\xff/\xff/\xff",
    }.items():
        headers = {SEAL_HEADER: given} if given is not None else {}
        answer = requests.get(url + path, headers=headers)
        assert answer.status_code == 401 and "kv_layout" not in answer.text, what
    assert requests.post(f"{url}/query_dp_ranks", json={"bootstrap_rooms": [1]}).status_code == 401
    assert requests.get(f"{url}/health").status_code == 200
    for method, where in (("PUT", "route"), ("POST", "register_dp_rank")):
        row = {"bootstrap_room": 1, "dp_rank": 0, "rank_ip": HOST, "rank_port": 6666}
        assert requests.request(method, f"{url}/{where}", json=row).status_code == 403


def test_what_sglang_asks_itself_is_sealed(
    sealed: Pair, secret: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Through its session, and for pools that are not plain through the address."""
    keys = ClusterKeys(cluster_secret.read(secret))
    monkeypatch.setattr(cluster_secret, "keys", lambda: keys)
    session = get_bootstrap_session(lambda _: requests.Session(), sealed.bootstrap)
    body = {"bootstrap_rooms": [1]}
    assert session.post(f"http://{sealed.bootstrap}/query_dp_ranks", json=body).json() == {}
    assert session.get(f"http://{sealed.bootstrap}/health").status_code == 200
    other = ClusterKeys(os.urandom(32))
    session.auth._key = other.bootstrap
    with pytest.raises(OSError, match="does not prove"):
        session.get(f"http://{sealed.bootstrap}/health")
    address = routes.sealed_address(sealed.bootstrap)
    assert requests.get(f"http://{address}/route?{PLACE}").status_code == 200
    assert requests.get(f"http://{address}/route?{PLACE}").status_code == 401, "said again"


@pytest.mark.parametrize("which", ["prefill", "decode", "two"])
def test_a_server_without_the_peers_secret_is_refused_in_words(tmp_path: Path, which: str) -> None:
    files = {role: new_secret(tmp_path, role) for role in ("prefill", "decode")}
    given = files if which == "two" else {which: files[which]}
    with real_pair(given) as pair, settings("decode", int(pair.bootstrap.rpartition(":")[2])):
        room = next(pair.rooms)
        pair.decode.addr_to_rooms_tracker[pair.bootstrap].add(room)
        pair.decode.request_status[room] = KVPoll.Bootstrapping
        until(
            lambda: (
                pair.decode.try_ensure_parallel_info(pair.bootstrap)
                or pair.decode.refused.get(room)
            )
        )
        assert "--hma-cluster-secret-file" in pair.decode.refused[room]
        assert pair.decode.request_status[room] == KVPoll.Failed
        assert pair.bootstrap not in pair.decode.prefill_info_table


# -- Mooncake's ports --

THIEF = """
import ctypes, json, os, sys, threading
from mooncake.engine import TransferEngine
session, read_from, write_to = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
engine = TransferEngine()
assert engine.initialize("127.0.0.1", "P2PHANDSHAKE", "tcp", "") == 0
memory = ctypes.create_string_buffer(b"E" * 128, 4096)
place = ctypes.addressof(memory)
engine.register_memory(place, 4096)
codes = {}
def read(): codes["read"] = engine.transfer_sync_read(session, place, read_from, 64)
def write(): codes["write"] = engine.transfer_sync_write(session, place + 64, write_to, 64)
threads = [threading.Thread(target=one) for one in (read, write)]
for one in threads: one.start()
for one in threads: one.join()
print(json.dumps([codes["read"], codes["write"], memory.raw[:64].hex()]), flush=True)
os._exit(0)
"""


def steal(pair: Pair, role: str) -> tuple[bool, bool]:
    """Whether a process with nothing but Mooncake read a server's pages, and wrote into them."""
    memory = getattr(pair, f"{role}_memory").pages
    page, before = memory.data_ptr(), memory.clone()
    session = getattr(pair, role).get_session_id()
    done = subprocess.run(
        [sys.executable, "-c", THIEF, session, str(page), str(page + 4096)],
        capture_output=True,
        text=True,
        check=True,
    )
    read, write, text = json.loads(done.stdout.splitlines()[-1])
    got = bytes.fromhex(text) == ctypes.string_at(page, 64)
    written = not torch.equal(memory, before)
    assert (read == 0) == got and (write == 0) == written
    memory.copy_(before)
    return got, written


@pytest.mark.slow
def test_pages_are_not_to_be_had_without_the_secret(secret: str) -> None:
    """From an address that no server of the cluster has. Here there is only one: so it is tried
    before the two servers have met."""
    with real_pair() as pair:
        assert steal(pair, "decode") == steal(pair, "prefill") == (True, True), "it can be done"
    with real_pair({"prefill": secret, "decode": secret}) as pair:
        for role in ("decode", "prefill"):
            assert steal(pair, role) == (False, False), role
        pair.check()
