"""Families beside the dense ones of test_exact: served once each, and experts by a pair.

The whole table is `make models`.
"""

from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmark.models.checkpoint import make_checkpoint
from benchmark.models.families import FAMILIES
from benchmark.models.serve_families import prompts, try_family
from benchmark.models.truth import Truth

from .client import FLIPPED_ROUNDING, assert_drained, greedy, output_ids
from .conftest import COMMON
from .harness import Pair, Server, launch, running, running_pair

pytestmark = pytest.mark.e2e

BY_NAME = {family.name: family for family in FAMILIES}
# On decode a window's pages take two slabs at least.
POOLS = ("--max-total-tokens", "2048", "--swa-full-tokens-ratio", "1")
FLAGS = (*COMMON, *POOLS, "--skip-tokenizer-init")
NEW_TOKENS = 24


@pytest.mark.parametrize("name", ["Gemma 3", "gpt-oss"])
def test_a_family_serves(name: str, tmp_path: Path, seed: int) -> None:
    """Two servers, native and BFP8, beside transformers without and with the formats."""
    found = try_family(BY_NAME[name], tmp_path, seed)
    print(found)
    assert found["verdict"] == "works", found["reason"]


@pytest.fixture(scope="module", params=["Qwen3-MoE", "gpt-oss"])
def served(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, logs: Path
) -> Iterator[tuple[Pair, Server, Truth]]:
    """A pair and a single server with the same formats."""
    family = BY_NAME[request.param]
    folder = tmp_path_factory.mktemp("models") / "experts"
    truth = Truth(make_checkpoint(family, folder, seed=20261127), family.experts)
    name = f"experts-{family.model_type}"
    single = launch(f"{name}-single", folder, logs, *FLAGS)
    with running_pair(folder, logs, *FLAGS, name=name) as pair, running(single):
        yield pair, single, truth


def test_a_pair_with_experts_says_what_a_single_server_and_the_truth_say(
    served: tuple[Pair, Server, Truth], seed: int
) -> None:
    pair, single, truth = served
    without = 0.0
    for prompt in prompts(seed):
        expected = greedy(single.url, prompt, NEW_TOKENS)
        said = output_ids(pair.url, prompt, NEW_TOKENS)
        assert said == expected, len(prompt)
        regrets = truth.regrets(prompt, said)
        assert max(regrets) < FLIPPED_ROUNDING, (len(prompt), regrets)
        without = max(without, *truth.regrets(prompt, said, rounded=False))
    print(f"largest regret of the truth without rounding: {without:.3f}")
    assert_drained(pair.prefill, pair.decode, single)
