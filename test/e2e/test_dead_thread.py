"""A server whose transfer has lost a thread ends, in words, and is not healthy until then."""

from pathlib import Path

import pytest
import requests
import zmq

from sglang_hma.transfer.decode import routes

from .conftest import COMMON
from .harness import launch

pytestmark = pytest.mark.e2e

DYING = Path(__file__).parent.parent / "stand_ins" / "dying_thread"


def test_a_dead_thread_ends_the_server(model: Path, logs: Path) -> None:
    env = {"PYTHONPATH": str(DYING)}
    flags = (*COMMON, "--max-total-tokens", "2048")
    server = launch("dying-prefill", model, logs, *flags, mode="prefill", env=env)
    try:
        server.wait_healthy()
        answer = routes.fetch(f"127.0.0.1:{server.bootstrap_port}", (0, 0, 0, 0))
        assert answer is not None
        rank = answer.route
        with zmq.Context() as context, context.socket(zmq.PUSH) as socket:
            socket.connect(f"tcp://{rank['rank_ip']}:{rank['rank_port']}")
            socket.send_multipart([b"ABORT", b"13"])
        server.popen.wait()
        assert server.popen.returncode != 0
    finally:
        server.stop()
    text = server.text()
    assert "RuntimeError: a bug of this thread" in text
    assert (
        "This server ends: the thread " in text and "(bootstrap_thread) of the KV transfer" in text
    )
    with pytest.raises(requests.ConnectionError):
        requests.get(f"{server.url}/health")
