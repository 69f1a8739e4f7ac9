"""Prefill by the Tenstorrent runtime on the stand-in for ttnn, decode on the CPU, a real router."""

import json
import random
import time
from pathlib import Path
from typing import Any

import pytest
import requests

from sglang_hma.transfer.prefill.trace import COMPUTE, SEND

from .harness import Pair, generate, output_ids, payload, running_pair
from .test_load import assert_drained

pytestmark = pytest.mark.e2e

STAND_IN = Path(__file__).parent.parent / "stand_ins" / "ttnn_on_torch"
LAYER_S = 0.02  # how long the stand-in takes for a layer's attention
SURE = 0.1  # of a logprob, over the second best
FLAGS = ("--dtype", "bfloat16", "--max-total-tokens", "8192", "--enable-metrics")


@pytest.fixture(scope="module")
def traced(logs: Path) -> Path:
    return logs / "tenstorrent.trace.json"


@pytest.fixture(scope="module")
def card(model: Path, logs: Path, traced: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    env = {
        "PYTHONPATH": str(STAND_IN),
        "TT_METAL_SIMULATOR": "a stand-in",
        "HMA_STAND_IN_LAYER_S": str(LAYER_S),
        "XDG_CACHE_HOME": str(tmp_path_factory.mktemp("cache")),
    }
    prefill = (
        *("--hma-prefill-runtime", "ttnn", "--hma-mesh", "1x2", "--chunked-prefill-size", "128"),
        *("--hma-trace", str(traced)),
    )
    with running_pair(model, logs, *FLAGS, prefill_flags=prefill, name="tt", env=env) as running:
        yield running


def sent_during_forwards(trace: Path) -> list[dict[str, Any]]:
    """Sends that began while a layer of the same forward was still to come."""
    events = json.loads(trace.read_text().rstrip("\n,") + "]")
    spans = [event for event in events if event["ph"] == "X"]
    computing = [span for span in spans if span["tid"] == COMPUTE]
    return [
        send
        for send in spans
        if send["tid"] == SEND
        and any(span["ts"] < send["ts"] < span["ts"] + span["dur"] for span in computing)
    ]


def sure_tokens(url: str, prompt: list[int], tokens: int, sure_by: float = SURE) -> list[int]:
    """The first of a server's tokens, as long as each leads the second best by `sure_by`."""
    reply = generate(url, prompt, tokens, return_logprob=True, top_logprobs_num=2)
    margins = [
        best[0] - second[0] > sure_by for best, second in reply["meta_info"]["output_top_logprobs"]
    ]
    sure = margins.index(False) if False in margins else tokens
    return list(reply["output_ids"][:sure])


def test_layers_leave_during_the_forward(card: Pair, traced: Path) -> None:
    """First in this file, so that every forward so far was a request's only one."""
    for first in (200, 300, 400):
        output_ids(card.url, list(range(first, first + 96)), 2)
        time.sleep(1.1)  # the trace is written once a second
    assert sent_during_forwards(traced)


def test_tokens_are_those_of_the_reference_runtime(card: Pair, pair: Pair) -> None:
    """As long as the reference, in float32, is sure of its token by more than BF16's noise."""
    rng = random.Random(6)
    compared = 0
    for length in (1, 31, 32, 33, 100, 300):
        prompt = [rng.randrange(8, 4000) for _ in range(length)]
        expected = sure_tokens(pair.url, prompt, 4)
        assert output_ids(card.url, prompt, 4)[: len(expected)] == expected
        compared += len(expected)
    assert compared >= 6


def test_a_cached_prefix_gives_the_same_tokens(card: Pair) -> None:
    rng = random.Random(7)
    prompt = [rng.randrange(8, 4000) for _ in range(200)]
    cold = output_ids(card.url, prompt, 6)
    again = generate(card.url, prompt, 6)
    assert again["output_ids"] == cold
    requests.post(f"{card.prefill.url}/flush_cache", timeout=10).raise_for_status()
    assert output_ids(card.url, prompt, 6) == cold
    assert_drained(card.prefill, card.decode)


def test_logprobs_of_the_prompt(card: Pair) -> None:
    prompt = list(range(100, 170))
    reply = generate(card.url, prompt, 2, return_logprob=True, logprob_start_len=0)
    logprobs = reply["meta_info"]["input_token_logprobs"]
    assert [entry[1] for entry in logprobs] == prompt
    assert all(entry[0] < 0 for entry in logprobs[1:])


def test_server_info_tells_the_card(card: Pair) -> None:
    info = card.prefill.info()["internal_states"][0]["hma"]
    assert (info["kv_format"], info["prefill_runtime"]) == ("bfp8", "ttnn")
    chips = info["tenstorrent"]
    assert (chips["arch"], chips["chips"], chips["device_ids"]) == ("blackhole", 2, [0])
    assert 0 < chips["weights"] < chips["dram_free"] <= chips["dram_total"]
    assert "tenstorrent" not in card.decode.info()["internal_states"][0]["hma"]


def test_aborted_requests_leave_nothing(card: Pair) -> None:
    rng = random.Random(8)
    for patience in (0.05, 0.2, 0.4):
        prompt = [rng.randrange(8, 4000) for _ in range(1000)]
        with pytest.raises(requests.RequestException):
            requests.post(f"{card.url}/generate", json=payload(prompt, 4), timeout=patience)
    assert_drained(card.prefill, card.decode)
