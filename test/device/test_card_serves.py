"""Prefill by a card, or the vendor's simulator, decode on the CPU, a real router."""

import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmark.transfer.timeline import spans
from sglang_hma.demo.random_model import make_random_model

from ..e2e.client import assert_drained, greedy, output_ids
from ..e2e.harness import Pair, Server, launch, running, running_pair, until
from ..e2e.test_tenstorrent import sent_during_forwards
from .test_card import needs_a_card

pytestmark = [needs_a_card, pytest.mark.timeout(3600)]

# A simulator takes seconds a forward and minutes for the first of a shape, so nothing that SGLang
# sends by itself may come between.
PATIENT = {"SGLANG_ENABLE_HEALTH_ENDPOINT_GENERATION": "false"}
# Packing the demo model's weights moves a logit by 0.07, and a difference of two by 0.1: where both
# runtimes are surer than this and disagree, six deviations lie between them.
SURE = 0.3
FLAGS = ("--skip-server-warmup", "--watchdog-timeout", "3000", "--max-total-tokens", "2048")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("card")
    make_random_model(path / "model", layers=2)
    return path


@pytest.fixture(scope="module")
def card(folder: Path) -> Iterator[Pair]:
    env = PATIENT | {"XDG_CACHE_HOME": str(folder / "cache")}
    prefill = ("--hma-prefill-runtime", "ttnn", "--chunked-prefill-size", "64")
    prefill += ("--hma-trace", str(folder / "trace.json"))
    with running_pair(
        *(folder / "model", folder, "--dtype", "bfloat16", *FLAGS),
        prefill_flags=prefill,
        name="card",
        env=env,
    ) as pair:
        yield pair


@pytest.fixture(scope="module")
def reference(folder: Path) -> Iterator[Server]:
    flags = ("--dtype", "float32", *FLAGS)
    server = launch("reference", folder / "model", folder, *flags, env=PATIENT)
    with running(server):
        yield server


def test_tokens_are_those_of_the_reference_runtime(card: Pair, reference: Server) -> None:
    """As long as both are sure."""
    seed = random.SystemRandom().randrange(2**32)
    print(f"seed {seed}")
    rng = random.Random(seed)
    compared = 0
    for length in 2 * (1, 31, 33, 64, 100):
        prompt = [rng.randrange(8, 4000) for _ in range(length)]
        ours, theirs = (greedy(url, prompt, 4, SURE) for url in (card.url, reference.url))
        both = min(ours.sure, theirs.sure)
        assert ours.tokens[:both] == theirs.tokens[:both]
        compared += both
    print(f"{compared} tokens compared")
    assert compared >= 5


def test_layers_leave_during_the_forward(card: Pair, folder: Path) -> None:
    output_ids(card.url, list(range(200, 296)), 2)
    until(lambda: sent_during_forwards(spans(folder / "trace.json")), card.prefill)


def test_a_cached_prefix_gives_the_same_tokens(card: Pair) -> None:
    prompt = list(range(500, 600))
    cold = output_ids(card.url, prompt, 4)
    assert output_ids(card.url, prompt, 4) == cold
    assert_drained(card.prefill, card.decode)
