"""A server of both roles whose layers with a window have a pool of their own, smaller than prompts.

SGLang counts both pools at every step (SGLANG_ENABLE_STRICT_MEM_CHECK_DURING_*) and ends on a page
too many or too few. The truth is transformers in float64.
"""

import asyncio
import random
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import requests

from benchmark.models.checkpoint import make_checkpoint
from benchmark.models.families import FAMILIES, VOCAB, WINDOW
from benchmark.models.truth import Truth
from hma_kernels import PAGE

from .client import FLIPPED_ROUNDING, all_at_once, assert_drained, generate, output_ids, payload
from .conftest import CHUNK, COMMON
from .harness import Server, launch, running, until

pytestmark = pytest.mark.e2e

FULL, WINDOW_POOL = 4096, 1024
FLAGS = (
    *(*COMMON, "--skip-tokenizer-init"),
    *("--max-total-tokens", str(FULL), "--swa-full-tokens-ratio", str(WINDOW_POOL / FULL)),
)
STRICT = {
    "SGLANG_ENABLE_STRICT_MEM_CHECK_DURING_BUSY": "1",
    "SGLANG_ENABLE_STRICT_MEM_CHECK_DURING_IDLE": "1",
    "SGLANG_ENABLE_TREE_CACHE_SANITY_CHECK": "1",
}


@pytest.fixture(scope="module", params=["radix", "no-radix"])
def served(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, logs: Path
) -> Iterator[tuple[Server, Truth]]:
    """With a prefix cache, and without, where chunks of a prompt free what lies behind them."""
    (family,) = (each for each in FAMILIES if each.name == "gpt-oss")
    folder = tmp_path_factory.mktemp("models") / "windows"
    truth = Truth(make_checkpoint(family, folder, seed=20261128), family.experts)
    flags = (*FLAGS, "--disable-radix-cache") if request.param == "no-radix" else FLAGS
    server = launch(f"two-pools-{request.param}", folder, logs, *flags, env=STRICT)
    with running(server):
        yield server, truth


def prompt(rng: random.Random, tokens: int) -> list[int]:
    return [rng.randrange(8, VOCAB) for _ in range(tokens)]


def right_up_to(truth: Truth, asked: list[int], said: list[int]) -> int:
    regrets = truth.regrets(asked, said)
    return next((i for i, one in enumerate(regrets) if one >= FLIPPED_ROUNDING), len(said))


def right(truth: Truth, asked: list[int], said: list[int], put_aside: int) -> bool:
    """A request that is put aside goes on from a prompt with what it said in it, whose K and V are
    computed again, from then on with a prompt's weights and formats."""
    good = right_up_to(truth, asked, said)
    if good == len(said) or not put_aside:
        return good == len(said)
    best, place = good, good
    for again in range(good, 0, -1):
        reached = again + right_up_to(truth, [*asked, *said[:again]], said[again:])
        if reached > best:
            best, place = reached, again
        if reached == len(said):
            return True
    return best > good and right(truth, [*asked, *said[:place]], said[place:], put_aside - 1)


def used(server: Server) -> dict[str, float]:
    """Pages by format and pool, at most a second old."""
    return server.metrics("sglang_hma:kv_pages_used")


def test_there_are_two(served: tuple[Server, Truth]) -> None:
    server, _ = served
    memory = server.info()["internal_states"][0]["memory_usage"]
    assert (memory["token_capacity"], memory["token_capacity_swa"]) == (FULL, WINDOW_POOL)


def test_prompts_and_answers_longer_than_the_window(
    served: tuple[Server, Truth], seed: int
) -> None:
    """One is longer than the window layers' pool: its pages must have been freed on the way. Each
    is asked for twice, the second time with a cached prefix, and then continued."""
    server, truth = served
    rng = random.Random(seed)
    for length, tokens in ((WINDOW - 9, 100), (CHUNK, 40), (333, 130), (WINDOW_POOL + 200, 40)):
        asked = prompt(rng, length)
        for _ in range(2):
            said = output_ids(server.url, asked, tokens)
            assert max(truth.regrets(asked, said)) < FLIPPED_ROUNDING, length
        turn = [*asked, *said, *prompt(rng, 50)]
        reply = generate(server.url, turn, 90)
        kept = reply["meta_info"]["cached_tokens"]
        caches = not server.info()["disable_radix_cache"]
        assert kept == (length + tokens - 1) // PAGE * PAGE * caches
        regrets = truth.next_regrets((asked, said), turn, reply["output_ids"], kept)
        assert max(regrets) < FLIPPED_ROUNDING, length
    assert_drained(server)


def put_aside(url: str, servers: tuple[Server, ...], truth: Truth, seed: int, count: int) -> int:
    """How often requests are put aside that compete for pages: some share prefixes, some are given
    up. All answers are right. The last of `servers` generates."""
    rng = random.Random(seed)
    shared = prompt(rng, 200)
    jobs = [
        (shared[: rng.choice((0, 0, 100, 200))] + prompt(rng, rng.randrange(1, 260)), 100)
        for _ in range(count)
    ]
    long = payload(prompt(rng, 300), 1500)
    with ThreadPoolExecutor(2) as pool:
        for number in range(2):
            extra = {**long, "rid": f"given-up-{number}"}
            pool.submit(requests.post, f"{url}/generate", json=extra)
        answers = pool.submit(asyncio.run, all_at_once(url, jobs))
        until(lambda: "Decode batch" in servers[-1].text(), servers[-1])
        for number in range(2):
            for server in servers:
                requests.post(f"{server.url}/abort_request", json={"rid": f"given-up-{number}"})
        replies = answers.result()
    found = 0
    for (asked, tokens), (status, reply) in zip(jobs, replies, strict=True):
        assert status == 200 and len(reply["output_ids"]) == tokens
        often = reply["meta_info"]["num_retractions"]
        assert right(truth, asked, reply["output_ids"], often), (len(asked), often)
        found += often
    print(f"put aside {found} times")
    assert_drained(*servers)
    return found


def test_requests_that_compete_for_pages(served: tuple[Server, Truth], seed: int) -> None:
    server, truth = served
    assert put_aside(server.url, (server,), truth, seed, 16)


def test_no_page_is_kept(served: tuple[Server, Truth], seed: int) -> None:
    server, _ = served
    generate(server.url, prompt(random.Random(seed), 500), 90)
    assert_drained(server)
    until(lambda: not any(used(server).values()), server)
    assert {'{format="bfp8 window"}', '{format="bf16 window"}'} <= {
        "{" + next(part for part in labels.strip("{}").split(",") if "format" in part) + "}"
        for labels in used(server)
    }
