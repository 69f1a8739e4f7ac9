"""A pair with all formats off, and peers with another format: refused at the handshake, both sides
go on."""

import concurrent.futures
from collections.abc import Iterator
from pathlib import Path

import pytest
import requests

from benchmark.models.truth import Truth

from .client import greedy, output_ids, payload
from .conftest import COMMON
from .harness import Pair, Server, launch, launch_router, running, running_pair, until
from .test_exact import NEW_TOKENS, prompts

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
    "--max-total-tokens=2048",
    "--page-size=32",
    "--mem-fraction-static=0.95",
]
FP32_TIE = 1e-3  # logits closer than this may be ordered differently in fp32


@pytest.fixture(scope="module")
def stock(model: Path, logs: Path) -> Iterator[Server]:
    """SGLang's own decode server, which starts while others are waited for."""
    server = launch(
        "stock-decode",
        model,
        logs,
        *STOCK_FLAGS,
        mode="decode",
        module="sglang.launch_server",
        env=STOCK_ENV,
    )
    try:
        yield server
    finally:
        server.stop()


@pytest.fixture(scope="module")
def native(stock: Server, model: Path, logs: Path) -> Iterator[Pair]:
    flags = ("--hma-kv-format", "native", "--page-size", "16", "--max-total-tokens", "2048")
    with running_pair(model, logs, *COMMON, *flags, name="native") as started:
        yield started


def test_native_equals_transformers(native: Pair, model: Path, seed: int) -> None:
    oracle = Truth.of(model)
    for prompt in prompts(seed):
        got = output_ids(native.url, prompt, NEW_TOKENS)
        regrets = oracle.regrets(prompt, got, rounded=False)
        assert max(regrets) < FP32_TIE, (len(prompt), regrets)


def refused(prefill: Server, decode: Server, logs: Path, name: str) -> requests.Response:
    """The router's answer for a pair that must not exchange pages."""
    router = launch_router(logs, prefill, decode, name, entry=decode.name != "stock-decode")
    with running(router):
        return requests.post(f"{router.url}/generate", json=payload(list(range(10, 80)), 4))


def test_decode_with_another_format_is_refused(
    pair: Pair, native: Pair, stock: Server, logs: Path
) -> None:
    peers = {"native": native.decode, "stock": stock.wait_healthy()}
    before = greedy(pair.url, list(range(10, 80)))
    with concurrent.futures.ThreadPoolExecutor() as pool:
        answers = {
            name: pool.submit(refused, pair.prefill, peer, logs, f"x-router-{name}")
            for name, peer in peers.items()
        }
    for name, future in answers.items():
        answer = future.result()
        assert answer.status_code >= 400, (name, answer.status_code, answer.text[:500])
        for words in ("KV format mismatch", "name=bfp8_b"):
            wait_said(words, answer.text, peers[name], pair.prefill)
    for difference in ("name: native-float32/bfp8_b", "page: 16/32"):
        native.decode.wait_logged(difference)
    pair.prefill.wait_logged("stock SGLang")
    assert native.decode.alive()
    assert output_ids(pair.url, list(range(10, 80))) == before


def wait_said(words: str, answer: str, *servers: Server) -> None:
    """In the answer or in one of the logs."""
    until(lambda: words in answer or any(words in server.text() for server in servers), *servers)
