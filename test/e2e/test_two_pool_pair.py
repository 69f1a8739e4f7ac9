"""A prefill and a decode server whose layers with a window have a pool of their own, smaller than
prompts: of those layers a prompt's last window is sent.

SGLang counts all pools at every step (SGLANG_ENABLE_STRICT_MEM_CHECK_DURING_*) and ends on a page
too many or too few. The truth is transformers in float64.
"""

import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmark.models.checkpoint import make_checkpoint
from benchmark.models.families import FAMILIES, WINDOW
from benchmark.models.truth import Truth
from hma_kernels import PAGE

from .client import FLIPPED_ROUNDING, assert_drained, generate, output_ids
from .conftest import CHUNK, COMMON
from .harness import Pair, Server, running_pair, until
from .test_two_pools import FULL, STRICT, WINDOW_POOL, prompt, put_aside, used

pytestmark = pytest.mark.e2e

FLAGS = (*COMMON, "--skip-tokenizer-init", "--max-total-tokens", str(FULL))
POOLS = {"prefill": WINDOW_POOL, "decode": 2 * WINDOW_POOL}  # of the layers with a window
RATIOS = {side: ("--swa-full-tokens-ratio", str(tokens / FULL)) for side, tokens in POOLS.items()}
HEADS, DIM = 2, 32  # of K and V
LENGTHS = (1, PAGE, WINDOW - 9, WINDOW, WINDOW + 1, CHUNK, 3 * PAGE, 333, WINDOW_POOL + 200)


def made_model(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Truth]:
    (family,) = (each for each in FAMILIES if each.name == "gpt-oss")
    folder = tmp_path_factory.mktemp("models") / "windows"
    return folder, Truth(make_checkpoint(family, folder, seed=20261128), family.experts)


@pytest.fixture(scope="module")
def truth(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Truth]:
    return made_model(tmp_path_factory)


@pytest.fixture(scope="module", params=["radix", "no-radix"])
def pair(request: pytest.FixtureRequest, truth: tuple[Path, Truth], logs: Path) -> Iterator[Pair]:
    """Prefill with a prefix cache, and without, where chunks of a prompt free what lies behind."""
    without = ("--disable-radix-cache",) if request.param == "no-radix" else ()
    decode = ("--num-reserved-decode-tokens", "1", "--max-running-requests", "64")
    with running_pair(
        truth[0],
        logs,
        *FLAGS,
        prefill_flags=(*RATIOS["prefill"], *without),
        decode_flags=(*RATIOS["decode"], *decode),
        name=f"two-pools-{request.param}",
        env=STRICT,
    ) as made:
        yield made


def capacity(server: Server) -> tuple[int, int]:
    memory = server.info()["internal_states"][0]["memory_usage"]
    return memory["token_capacity"], memory["token_capacity_swa"]


def test_both_have_two_pools(pair: Pair) -> None:
    for name, server in (("prefill", pair.prefill), ("decode", pair.decode)):
        assert capacity(server) == (FULL, POOLS[name])


def test_prompts_and_answers_of_any_length(
    pair: Pair, truth: tuple[Path, Truth], seed: int
) -> None:
    """The second time prefill has the prompt in its cache."""
    rng = random.Random(seed)
    for length in LENGTHS:
        asked = prompt(rng, length)
        for _ in range(2):
            said = output_ids(pair.url, asked, 100)
            assert max(truth[1].regrets(asked, said)) < FLIPPED_ROUNDING, length
    assert_drained(pair.prefill, pair.decode)


def sent_bytes(pair: Pair) -> float:
    return pair.prefill.metric("sglang:kv_transfer_total_mb_sum") * 2**20


def test_of_layers_with_a_window_the_last_one_is_sent(pair: Pair, seed: int) -> None:
    """One layer of each kind; a token at the end sees itself and the window's other tokens."""
    page_bytes, seen = HEADS * DIM * PAGE * 2 * 17 // 16, WINDOW - 1
    for length in LENGTHS:
        before = sent_bytes(pair)
        generate(pair.url, prompt(random.Random(seed), length), 2)
        pages = -(-length // PAGE)
        window = pages - max(0, length - seen) // PAGE
        assert sent_bytes(pair) - before == pytest.approx((pages + window) * page_bytes, abs=0.5)
        print(f"{length} tokens: {1 - (pages + window) / (2 * pages):.0%} fewer bytes than in one")


def test_requests_that_compete_for_pages(pair: Pair, truth: tuple[Path, Truth], seed: int) -> None:
    put_aside(pair.url, (pair.prefill, pair.decode), truth[1], seed, 24)


def test_no_page_is_kept(pair: Pair, seed: int) -> None:
    generate(pair.url, prompt(random.Random(seed), 500), 90)
    assert_drained(pair.prefill, pair.decode)
    for server in (pair.prefill, pair.decode):
        until(lambda server=server: not any(used(server).values()), server)
