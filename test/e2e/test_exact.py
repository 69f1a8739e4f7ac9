"""Token for token: PD == one server == radix hit, and native == transformers."""

import random
from pathlib import Path

import pytest

from .conftest import COMMON, flush
from .harness import Pair, Server, generate, launch, output_ids, running, running_pair
from .oracle import Oracle

LENGTHS = [1, 31, 32, 33, 64, 96, 500]
NEW_TOKENS = 40
VOCAB = 4096
CLEAR_MARGIN = 0.05

pytestmark = pytest.mark.e2e


def prompts(seed: int) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(8, VOCAB - 8) for _ in range(n)] for n in LENGTHS]


def test_pd_equals_single_server_equals_radix_hit(pair: Pair, single: Server, seed: int) -> None:
    for prompt in prompts(seed):
        flush(pair.prefill)
        flush(single)
        cold = output_ids(pair.url, prompt, NEW_TOKENS)
        assert len(set(cold)) > NEW_TOKENS // 4, "the demo model loops: it cannot show an error"
        assert output_ids(single.url, prompt, NEW_TOKENS) == cold, len(prompt)
        assert output_ids(pair.url, prompt, NEW_TOKENS) == cold, len(prompt)
        assert output_ids(single.url, prompt, NEW_TOKENS) == cold, len(prompt)


def test_radix_cache_is_hit(pair: Pair, seed: int) -> None:
    prompt = prompts(seed)[-1]
    generate(pair.url, prompt, 2)
    again = generate(pair.url, prompt, 2)
    assert again["meta_info"]["cached_tokens"] == (len(prompt) - 1) // 32 * 32


def test_native_equals_transformers(model: Path, logs: Path, seed: int) -> None:
    oracle = Oracle(model)
    flags = (*COMMON, "--hma-kv-format", "native", "--max-total-tokens", "8192")
    with running_pair(model, logs, *flags, name="native") as native:
        for prompt in prompts(seed):
            expected, margins = oracle.greedy(prompt, NEW_TOKENS, rounded=False)
            got = output_ids(native.url, prompt, NEW_TOKENS)
            # Past a tie that fp32 noise can turn, the continuations are different texts.
            decided = next((i for i, m in enumerate(margins) if m < 1e-3), NEW_TOKENS)
            assert got[:decided] == expected[:decided], len(prompt)


@pytest.mark.parametrize("family", ["qwen3", "qwen2", "llama"])
def test_formats_equal_the_oracle(
    family: str, request: pytest.FixtureRequest, tmp_path: Path, logs: Path, seed: int
) -> None:
    """A server's tokens against transformers with reference-rounded weights, K and V."""
    if family == "qwen3":
        compare_with_oracle(
            request.getfixturevalue("single"), request.getfixturevalue("model"), seed
        )
        return
    from sglang_hma.demo_model import make_demo_model

    path = tmp_path / family
    make_demo_model(
        path, family=family, layers=2, heads=4, kv_heads=2, tie_embeddings=family == "llama"
    )
    server = launch(f"one-{family}", path, logs, *COMMON, "--max-total-tokens", "8192")
    with running(server):
        compare_with_oracle(server, path, seed)


def compare_with_oracle(server: Server, path: Path, seed: int) -> None:
    oracle, decided_tokens, changed = Oracle(path), 0, False
    for prompt in prompts(seed):
        expected, margins = oracle.greedy(prompt, NEW_TOKENS)
        changed |= oracle.greedy(prompt, NEW_TOKENS, rounded=False)[0] != expected
        # A last-bit difference in K may flip a rounding and move a logit by about this much.
        decided = next((i for i, m in enumerate(margins) if m < CLEAR_MARGIN), NEW_TOKENS)
        assert output_ids(server.url, prompt, NEW_TOKENS)[:decided] == expected[:decided]
        decided_tokens += decided
    assert changed, "rounding changed no token: the test shows nothing"
    assert decided_tokens > len(LENGTHS) * NEW_TOKENS / 8
