"""Peers with another format are refused at the handshake; both sides go on."""

import concurrent.futures
from pathlib import Path

import pytest
import requests

from .conftest import COMMON
from .harness import Pair, Server, launch, launch_router, output_ids, payload, running

pytestmark = pytest.mark.e2e

PLAIN = Path(__file__).parent.parent / "data" / "plain_cpu"
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
SMALL = ("--max-total-tokens", "8192")


def refused(prefill: Server, decode: Server, logs: Path, name: str) -> requests.Response:
    """The router's answer for a pair that must not exchange pages."""
    router = launch_router(logs, prefill, decode, name)
    with running(router):
        return requests.post(
            f"{router.url}/generate", json=payload(list(range(10, 80)), 4), timeout=120
        )


def test_decode_with_another_format_is_refused(
    pair: Pair, model: Path, logs: Path, tmp_path: Path, seed: int
) -> None:
    from sglang_hma.demo_model import make_demo_model

    other = tmp_path / "other-heads"
    make_demo_model(other, layers=4, kv_heads=2, head_dim=32)
    native = ("--hma-kv-format", "native", "--page-size", "16")
    peers = {
        "native": launch("x-native", model, logs, *COMMON, *SMALL, *native, mode="decode"),
        "heads": launch("x-heads", other, logs, *COMMON, *SMALL, mode="decode"),
        "stock": launch(
            "x-stock",
            model,
            logs,
            *STOCK_FLAGS,
            "--page-size=32",
            mode="decode",
            module="sglang.launch_server",
            env=STOCK_ENV,
        ),
    }
    before = output_ids(pair.url, list(range(10, 80)))
    with running(*peers.values()):
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
        for difference in ("kv_heads: 2/4", "head_dim: 32/64"):
            assert difference in peers["heads"].text()
        assert "stock SGLang" in pair.prefill.text()
        assert peers["native"].alive() and peers["heads"].alive()
    assert output_ids(pair.url, list(range(10, 80))) == before
