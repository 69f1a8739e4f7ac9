"""Token for token: PD == one server == radix hit, and native == transformers."""

import random
from pathlib import Path

import pytest

from .conftest import COMMON, flush
from .harness import Pair, Server, generate, launch, output_ids, running
from .oracle import Oracle

LENGTHS = [1, 31, 32, 33, 64, 96, 500]
NEW_TOKENS = 40
VOCAB = 4096
FP32_TIE = 1e-3  # logits closer than this may be ordered differently in fp32
FLIPPED_ROUNDING = 0.05  # a last-bit difference in K may flip a rounding: a logit moves this far

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


def test_native_equals_transformers(native: Pair, model: Path, seed: int) -> None:
    oracle = Oracle(model)
    for prompt in prompts(seed):
        got = output_ids(native.url, prompt, NEW_TOKENS)
        regrets = oracle.regrets(prompt, got, rounded=False)
        assert max(regrets) < FP32_TIE, (len(prompt), regrets)


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
    oracle, without = Oracle(path), 0.0
    for prompt in prompts(seed):
        got = output_ids(server.url, prompt, NEW_TOKENS)
        regrets = oracle.regrets(prompt, got)
        assert max(regrets) < FLIPPED_ROUNDING, (len(prompt), regrets)
        without = max(without, *oracle.regrets(prompt, got, rounded=False))
    print(f"largest regret of an oracle without rounding: {without:.3f}")
    assert without > FLIPPED_ROUNDING, "rounding changed no token: the test shows nothing"
