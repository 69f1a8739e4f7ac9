"""Token for token: PD == one server == radix hit == transformers with the formats' roundings."""

import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmark.models.truth import Truth
from sglang_hma.demo.random_model import make_random_model

from .client import FLIPPED_ROUNDING, flush, generate, greedy, output_ids
from .conftest import COMMON
from .harness import Pair, Server, launch

LENGTHS = [1, 31, 32, 33, 64, 96, 500]
NEW_TOKENS = 40
VOCAB = 4096

FAMILIES = ("qwen2", "llama")

pytestmark = pytest.mark.e2e


@pytest.fixture(scope="module", autouse=True)
def families(
    tmp_path_factory: pytest.TempPathFactory, logs: Path
) -> Iterator[dict[str, tuple[Server, Path]]]:
    """A small server of each other family; they start while the first tests run."""
    started = {}
    try:
        for family in FAMILIES:
            path = tmp_path_factory.mktemp("models") / family
            sizes = {"layers": 2, "heads": 4, "kv_heads": 2}
            make_random_model(path, family=family, **sizes, tie_embeddings=family == "llama")
            server = launch(f"one-{family}", path, logs, *COMMON, "--max-total-tokens", "2048")
            started[family] = server, path
        yield started
    finally:
        for server, _ in started.values():
            server.stop()


def prompts(seed: int) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(8, VOCAB - 8) for _ in range(n)] for n in LENGTHS]


def test_pd_equals_single_server_equals_radix_hit(pair: Pair, single: Server, seed: int) -> None:
    for prompt in prompts(seed):
        flush(pair.prefill)
        flush(single)
        cold = greedy(pair.url, prompt, NEW_TOKENS)
        assert len(set(cold.tokens)) > NEW_TOKENS // 4, (
            "the demo model loops: it cannot show an error"
        )
        assert output_ids(single.url, prompt, NEW_TOKENS) == cold, len(prompt)
        assert output_ids(pair.url, prompt, NEW_TOKENS) == cold, len(prompt)
        assert output_ids(single.url, prompt, NEW_TOKENS) == cold, len(prompt)


def test_radix_cache_is_hit(pair: Pair, seed: int) -> None:
    prompt = prompts(seed)[-1]
    generate(pair.url, prompt, 2)
    again = generate(pair.url, prompt, 2)
    assert again["meta_info"]["cached_tokens"] == (len(prompt) - 1) // 32 * 32


def test_formats_equal_the_oracle(single: Server, model: Path, seed: int) -> None:
    """A server's tokens against transformers with reference-rounded weights, K and V."""
    compare_with_oracle(single, model, seed)


@pytest.mark.parametrize("family", FAMILIES)
def test_formats_equal_the_oracle_in_other_families(
    families: dict[str, tuple[Server, Path]], family: str, seed: int
) -> None:
    server, path = families[family]
    compare_with_oracle(server.wait_healthy(), path, seed)


def compare_with_oracle(server: Server, path: Path, seed: int) -> None:
    oracle, without = Truth.of(path), 0.0
    for prompt in prompts(seed):
        got = output_ids(server.url, prompt, NEW_TOKENS)
        regrets = oracle.regrets(prompt, got)
        assert max(regrets) < FLIPPED_ROUNDING, (len(prompt), regrets)
        without = max(without, *oracle.regrets(prompt, got, rounded=False))
    print(f"largest regret of an oracle without rounding: {without:.3f}")
    assert without > FLIPPED_ROUNDING, "rounding changed no token: the test shows nothing"
