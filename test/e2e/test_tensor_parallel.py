"""One server with two tensor-parallel ranks, the other with one: pages are cut by heads."""

import random
from pathlib import Path

import pytest

from benchmark.models.truth import Truth
from benchmark.transfer.timeline import COMPUTE, SEND, spans

from .client import FLIPPED_ROUNDING, assert_drained, output_ids
from .conftest import COMMON
from .harness import Pair, Server, launch, launch_router, running, until
from .test_exact import VOCAB
from .test_wire import LAYERS

pytestmark = pytest.mark.e2e

LENGTHS = [1, 64, 500]
ROLES = ("prefill", "decode")


def test_one_rank_sends_to_two_and_two_to_one(
    pair: Pair, model: Path, logs: Path, seed: int
) -> None:
    flags = (*COMMON, "--max-total-tokens", "2048", "--tp-size", "2")
    own = {
        "prefill": ("--hma-trace", str(logs / "trace.json")),
        "decode": ("--disaggregation-decode-enable-radix-cache", "--hma-decode-cache", "prompt"),
    }
    wide = {
        mode: launch(f"tp2-{mode}", model, logs, *flags, *own[mode], mode=mode) for mode in ROLES
    }
    routers = (
        launch_router(logs, pair.prefill, wide["decode"], "router-1-2"),
        launch_router(logs, wide["prefill"], pair.decode, "router-2-1"),
    )
    oracle, rng = Truth.of(model), random.Random(seed)
    with running(*wide.values(), *routers):
        for router in routers:
            for length in LENGTHS:
                prompt = [rng.randrange(8, VOCAB - 8) for _ in range(length)]
                got = output_ids(router.url, prompt, 12)
                assert max(oracle.regrets(prompt, got)) < FLIPPED_ROUNDING, length
            # The last prompt again, from prefill's cache, and what follows it: decode with two
            # ranks has its pages.
            again = output_ids(router.url, prompt, 12)
            assert max(oracle.regrets(prompt, again)) < FLIPPED_ROUNDING
            turn = [*prompt, *again, *(rng.randrange(8, VOCAB - 8) for _ in range(60))]
            got = output_ids(router.url, turn, 12)
            assert max(oracle.regrets(turn, got)) < FLIPPED_ROUNDING
        assert wide["decode"].metric("sglang:cached_tokens_total") > max(LENGTHS)
        assert_drained(wide["prefill"], wide["decode"])
        for server, peer in ((wide["decode"], pair.prefill), (pair.decode, wide["prefill"])):
            assert server.metric("sglang_hma:kv_verified_groups_total") > 0
            assert "wrong bytes" not in server.text() + peer.text()
        for file in ("trace.json", "trace.1.json"):  # each rank's own
            wait_drawn(logs / file, wide["prefill"])


def wait_drawn(trace: Path, server: Server) -> None:
    """A server writes once a second: until the file has every layer, and a send."""

    def drawn() -> bool:
        layers = {span["name"] for span in spans(trace) if span["tid"] == COMPUTE}
        sends = [span for span in spans(trace) if span["tid"] == SEND]
        return layers >= {f"layer {layer}" for layer in range(LAYERS)} and bool(sends)

    until(drawn, server)
