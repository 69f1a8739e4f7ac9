"""Peers with another format are refused at the handshake; both sides go on."""

import concurrent.futures
from pathlib import Path

import pytest
import requests

from .harness import Pair, Server, launch, launch_router, output_ids, payload, running

pytestmark = pytest.mark.e2e

PLAIN = Path(__file__).parent.parent / "stand_ins" / "plain_cpu"
STOCK_ENV = {"PYTHONPATH": str(PLAIN), "SGLANG_PLATFORM": "plain_cpu"}
STOCK_FLAGS = [
    "--device=cpu",
    "--dtype=float32",
    "--attention-backend=torch_native",
    "--sampling-backend=pytorch",
    "--disable-cuda-graph",
    "--disaggregation-transfer-backend=mooncake_tcp",
    "--disaggregation-decode-retraction-backup=none",
    "--max-total-tokens=8192",
    "--mem-fraction-static=0.95",
]


def refused(prefill: Server, decode: Server, logs: Path, name: str) -> requests.Response:
    """The router's answer for a pair that must not exchange pages."""
    router = launch_router(logs, prefill, decode, name)
    with running(router):
        return requests.post(
            f"{router.url}/generate", json=payload(list(range(10, 80)), 4), timeout=120
        )


def test_decode_with_another_format_is_refused(
    pair: Pair, native: Pair, model: Path, logs: Path
) -> None:
    stock = launch(
        "x-stock",
        model,
        logs,
        *STOCK_FLAGS,
        "--page-size=32",
        mode="decode",
        module="sglang.launch_server",
        env=STOCK_ENV,
    )
    peers = {"native": native.decode, "stock": stock}
    before = output_ids(pair.url, list(range(10, 80)))
    with running(stock):
        with concurrent.futures.ThreadPoolExecutor() as pool:
            answers = {
                name: pool.submit(refused, pair.prefill, peer, logs, f"x-router-{name}")
                for name, peer in peers.items()
            }
        for name, future in answers.items():
            answer = future.result()
            assert answer.status_code >= 400, (name, answer.status_code, answer.text[:500])
            seen = peers[name].text() + pair.prefill.text() + answer.text
            assert "KV format mismatch" in seen, (name, answer.text[:500])
            assert "name=bfp8_b" in seen
        for difference in ("name: native-float32/bfp8_b", "page: 16/32"):
            assert difference in peers["native"].text()
        assert "stock SGLang" in pair.prefill.text()
        assert native.decode.alive()
    assert output_ids(pair.url, list(range(10, 80))) == before
