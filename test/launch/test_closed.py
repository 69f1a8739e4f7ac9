import socket
import urllib.error
import urllib.request

import pytest

from sglang_hma.launch.closed import ClosedPort

from .fleet import STUCK_S


def test_opens_when_the_port_is_free_and_refuses_all() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        closed = ClosedPort("127.0.0.1", port, lambda: 6.2)
        assert not closed.try_to_open()
    assert closed.try_to_open() and closed.try_to_open()
    try:
        for body in (None, b"{}", b"x" * (4 << 20)):
            url = f"http://127.0.0.1:{port}/v1/chat/completions"
            with pytest.raises(urllib.error.HTTPError) as refused:
                urllib.request.urlopen(urllib.request.Request(url, body), timeout=STUCK_S)
            assert refused.value.code == 503 and refused.value.headers["Retry-After"] == "7"
            assert b"service_unavailable" in refused.value.read()
    finally:
        closed.close()
    with socket.create_server(("127.0.0.1", port)):
        pass
