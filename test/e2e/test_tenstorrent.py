"""Prefill by the Tenstorrent runtime on the stand-in for ttnn, decode on the CPU, a real router."""

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import requests

from benchmark.transfer.timeline import COMPUTE, SEND, spans

from .client import assert_drained, assert_same_where_sure, flush, generate, output_ids, payload
from .harness import Pair, launch, launch_router, running, until

pytestmark = pytest.mark.e2e

STAND_IN = Path(__file__).parent.parent / "stand_ins" / "ttnn_on_torch"
LAYER_S = 0.02  # how long the stand-in takes for a layer's attention
FLAGS = ("--dtype", "bfloat16", "--max-total-tokens", "2048", "--enable-metrics")


@pytest.fixture(scope="module")
def traced(logs: Path) -> Path:
    return logs / "tenstorrent.trace.json"


@pytest.fixture(scope="module")
def card(
    pair: Pair, model: Path, logs: Path, traced: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Pair]:
    """A prefill server of its own before the decode server that the other tests use."""
    env = {
        "PYTHONPATH": str(STAND_IN),
        "TT_METAL_SIMULATOR": "a stand-in",
        "HMA_STAND_IN_LAYER_S": str(LAYER_S),
        "XDG_CACHE_HOME": str(tmp_path_factory.mktemp("cache")),
    }
    flags = ("--hma-prefill-runtime", "ttnn", "--hma-mesh", "1x2", "--chunked-prefill-size", "128")
    flags += (*FLAGS, "--hma-trace", str(traced))
    prefill = launch("tt-prefill", model, logs, *flags, mode="prefill", env=env)
    with running(prefill):
        router = launch_router(logs, prefill, pair.decode, "tt-router")
        with running(router):
            yield Pair(prefill, pair.decode, router)


def forwards(events: list[dict[str, Any]]) -> list[list[float]]:
    """When each layer of each forward pass ended, in microseconds."""
    found: list[list[float]] = []
    for event in events:
        if event["tid"] == COMPUTE and event["name"] != "rest":
            if event["name"] == "layer 0":
                found.append([])
            found[-1].append(event["ts"] + event["dur"])
    return found


def sent_during_forwards(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Sends that began after their own layers and before the last one of the same forward."""
    ended = forwards(events)
    early = []
    for event in events:
        if event["tid"] == SEND:
            last = int(event["name"].split()[1].split("-")[-1])
            own = max((f for f in ended if f[last] <= event["ts"]), default=None)
            early += [event] if own is not None and event["ts"] < own[-1] else []
    return early


def test_layers_leave_during_the_forward(card: Pair, traced: Path) -> None:
    rng = random.Random()

    def sent_early() -> list[dict[str, Any]]:
        """Of one forward, that of a new prompt."""
        before = len(spans(traced))
        output_ids(card.url, [rng.randrange(8, 4000) for _ in range(96)], 2)

        def drawn() -> list[dict[str, Any]] | None:
            events = spans(traced)[before:]
            return events if forwards(events) and any(e["tid"] == SEND for e in events) else None

        return sent_during_forwards(until(drawn, card.prefill))

    until(sent_early)


def test_tokens_are_those_of_the_reference_runtime(card: Pair, pair: Pair) -> None:
    rng = random.Random(6)
    lengths = (1, 31, 32, 33, 100, 300)
    prompts = [[rng.randrange(8, 4000) for _ in range(length)] for length in lengths]
    assert_same_where_sure(card.url, pair.url, prompts)


def test_a_cached_prefix_gives_the_same_tokens(card: Pair) -> None:
    rng = random.Random(7)
    prompt = [rng.randrange(8, 4000) for _ in range(200)]
    cold = output_ids(card.url, prompt, 6)
    again = generate(card.url, prompt, 6)
    assert again["output_ids"] == cold
    flush(card.prefill)
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
    assert chips["traces"] == chips["buckets"] > 3 and chips["programs_after_start"] == 0
    assert 0 < chips["weights"] < chips["dram_free"] <= chips["dram_total"]
    assert "tenstorrent" not in card.decode.info()["internal_states"][0]["hma"]


def test_aborted_requests_leave_nothing(card: Pair) -> None:
    rng = random.Random(8)
    for patience in (0.05, 0.2, 0.4):
        prompt = [rng.randrange(8, 4000) for _ in range(1000)]
        with pytest.raises(requests.RequestException):
            requests.post(f"{card.url}/generate", json=payload(prompt, 4), timeout=patience)
    assert_drained(card.prefill, card.decode)
