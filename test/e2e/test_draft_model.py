"""A small model drafts on decode (STANDALONE): what is said is what one token at a time says.

Here two models draft: the served one itself, whose guesses are right as long as its KV of prompt
and answer is, and the same with noise in its weights, which is right now and then.
"""

import asyncio
import random
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import requests
import torch
from safetensors.torch import load_file, save_file

from benchmark.models.checkpoint import make_checkpoint
from benchmark.models.families import CONTEXT, FAMILIES, VOCAB
from benchmark.models.truth import Truth

from .client import (
    FLIPPED_ROUNDING,
    Greedy,
    all_at_once,
    assert_drained,
    generate,
    greedy,
    output_ids,
    payload,
    words,
)
from .conftest import COMMON
from .harness import Pair, Server, launch, running, running_behind
from .test_speculation import NGRAM, OPTIONS, steps

PAGE = 32
SHORT = 40  # tokens of a prompt that decode computes itself
POOL_TOKENS = 3072
A_STEP = 1024  # of a prompt's tokens, that the draft model computes before it guesses
STEPS = 5  # so chains of six
NATIVE = ("--hma-weight-format", "native")

pytestmark = [pytest.mark.e2e, pytest.mark.faults]


def standalone(drafter: Path) -> tuple[str, ...]:
    return (
        *("--speculative-algorithm", "STANDALONE", "--speculative-num-steps", str(STEPS)),
        *("--speculative-draft-model-path", str(drafter)),
    )


@pytest.fixture(scope="module")
def noisy(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    copy = tmp_path_factory.mktemp("models") / "noisy"
    shutil.copytree(model, copy)
    generator = torch.Generator().manual_seed(0)
    for file in copy.glob("*.safetensors"):
        weights = load_file(file)
        for weight in weights.values():
            noise = torch.randn(weight.shape, generator=generator) * weight.float().std()
            weight += (noise * 0.05).to(weight.dtype)
        save_file(weights, file, {"format": "pt"})
    return copy


@dataclass(frozen=True)
class Drafting:
    """One prefill server, a pair with it whose decode drafts with the served model, and one that
    does not draft."""

    drafts: Pair
    plain: Pair

    def drained(self) -> None:
        assert_drained(self.drafts.prefill, self.drafts.decode, self.plain.decode)


@pytest.fixture(scope="module")
def drafting(model: Path, logs: Path) -> Iterator[Drafting]:
    short = ("--hma-offload-threshold", str(SHORT))
    prefill = launch("dm-prefill", model, logs, *COMMON, *NATIVE, *short, mode="prefill")
    small = ("--max-total-tokens", str(POOL_TOKENS), "--num-reserved-decode-tokens", "1")
    kinds = {"plain": (), "drafts": (*small, *standalone(model))}
    decodes = {
        name: launch(f"dm-{name}", model, logs, *COMMON, *flags, mode="decode")
        for name, flags in kinds.items()
    }
    with running_behind(prefill, decodes) as pairs:
        yield Drafting(**pairs)


@pytest.fixture(scope="module")
def both_roles(model: Path, noisy: Path, logs: Path) -> Iterator[Server]:
    pool = ("--max-total-tokens", str(POOL_TOKENS))
    server = launch("dm-both", model, logs, *COMMON, *NATIVE, *pool, *standalone(noisy))
    with running(server):
        yield server


@pytest.mark.parametrize("tokens", [1, SHORT - 1, SHORT, PAGE * 3, 217, A_STEP + 300])
def test_the_same_tokens_in_fewer_steps(drafting: Drafting, tokens: int, seed: int) -> None:
    """Prompts of prefill's and of decode's own, which the draft model computes on decode."""
    rng = random.Random(seed)
    prompt, more = words(rng, tokens), rng.randrange(60, 90)
    expected = greedy(drafting.plain.url, prompt, more)
    answer = generate(drafting.drafts.url, prompt, more)
    assert answer["output_ids"] == expected
    # The same model guesses right but at ties, from the step on in which it knows the prompt.
    waits = tokens // A_STEP
    assert (more - 1) / (STEPS + 1) <= steps(answer) <= waits + 2 * more / (STEPS + 1)
    drafting.drained()


def test_many_at_once_in_a_full_pool(drafting: Drafting, seed: int) -> None:
    """Some are put aside, and get other pages: the draft model computes its KV of them again."""
    rng = random.Random(seed)
    jobs = [(words(rng, rng.randrange(1, 250)), rng.randrange(1, 150)) for _ in range(30)]
    expected = [greedy(drafting.plain.url, *job) for job in jobs]
    answers = asyncio.run(all_at_once(drafting.drafts.url, jobs))
    refused = [(i, *answer) for i, answer in enumerate(answers) if answer[0] != 200]
    assert not refused, (len(refused), refused[:2])
    assert [answer["output_ids"] for _, answer in answers] == expected
    assert "Retract requests" in drafting.drafts.decode.text()
    drafting.drained()


@pytest.mark.parametrize("option", OPTIONS)
def test_options(drafting: Drafting, option: str, seed: int) -> None:
    rng = random.Random(seed)
    prompt = words(rng, rng.randrange(SHORT, 120))
    body = payload(prompt, 40, return_logprob=True, top_logprobs_num=2)
    body["sampling_params"] |= OPTIONS[option]
    plain, drafted = (
        requests.post(f"{url}/generate", json=body).json()
        for url in (drafting.plain.url, drafting.drafts.url)
    )
    same_as_far_as_sure(plain, drafted)
    drafting.drained()


def same_as_far_as_sure(plain: dict[str, Any], drafted: dict[str, Any]) -> None:
    """Behind a tie the two may say something else."""
    expected, was = Greedy.of(plain), plain["meta_info"]
    said, meta, sure = drafted["output_ids"], drafted["meta_info"], expected.sure
    assert said[:sure] == expected.tokens[:sure]
    if sure == len(expected.tokens):
        assert len(said) == sure and meta["finish_reason"] == was["finish_reason"]
    own, other = (
        [value for value, *_ in each["output_token_logprobs"][:sure]] for each in (meta, was)
    )
    assert own == pytest.approx(other, abs=FLIPPED_ROUNDING)


def test_clients_that_leave(drafting: Drafting, seed: int) -> None:
    rng = random.Random(seed)
    prompts = [words(rng, rng.randrange(1, 200)) for _ in range(8)]

    async def leave() -> None:
        jobs = [
            asyncio.create_task(all_at_once(drafting.drafts.url, [(each, 400)])) for each in prompts
        ]
        await asyncio.sleep(rng.uniform(0, 2))
        for job in jobs:
            job.cancel()
        await asyncio.gather(*jobs, return_exceptions=True)

    asyncio.run(leave())
    drafting.drained()
    expected = [greedy(drafting.plain.url, each) for each in prompts]
    assert [output_ids(drafting.drafts.url, each) for each in prompts] == expected
    drafting.drained()


def test_both_roles_with_guesses_that_are_often_wrong(
    drafting: Drafting, both_roles: Server, seed: int
) -> None:
    """Alone, again behind a cached prompt, and many at once in a full pool."""
    rng = random.Random(seed)
    prompt = words(rng, rng.randrange(100, 300))
    expected = greedy(drafting.plain.url, prompt, 80)
    first, again = (generate(both_roles.url, prompt, 80) for _ in range(2))
    assert first["output_ids"] == expected
    assert again["output_ids"] == expected
    assert again["meta_info"]["cached_tokens"] >= len(prompt) // PAGE * PAGE - PAGE
    assert 80 / (STEPS + 1) < steps(first) < 80  # some guesses are right, some are not
    jobs = [(words(rng, rng.randrange(1, 250)), rng.randrange(1, 150)) for _ in range(24)]
    each = [greedy(drafting.plain.url, *job) for job in jobs]
    answers = asyncio.run(all_at_once(both_roles.url, jobs))
    for (_, more), expected, (status, answer) in zip(jobs, each, answers, strict=True):
        assert status == 200
        assert len(answer["output_ids"]) == more
        # A request put aside is prefilled again, its own tokens as prompt: BFP8, not BF16.
        if answer["meta_info"].get("num_retractions", 0) == 0:
            assert answer["output_ids"] == expected
    assert_drained(both_roles)


@pytest.mark.parametrize("drafter", ["itself", "another architecture"])
def test_two_ranks_of_both_roles(
    model: Path, logs: Path, tmp_path: Path, drafter: str, seed: int
) -> None:
    """Against transformers: pages of both models are cut by heads, of which the other architecture
    has fewer, of another size. Prompts are computed with rounded weights, which no draft has."""
    from sglang_hma.demo.random_model import make_random_model

    other = {"layers": 2, "hidden": 128, "heads": 4, "kv_heads": 2, "head_dim": 32}
    small = model
    if drafter != "itself":
        small = make_random_model(tmp_path / "small", family="llama", **other)
    flags = (*COMMON, "--max-total-tokens", "2048", "--tp-size", "2")
    server = launch(f"dm-tp2-{len(drafter)}", model, logs, *flags, *standalone(small))
    oracle, rng = Truth.of(model), random.Random(seed)
    with running(server):
        for length in (1, 64, 500):
            prompt = words(rng, length)
            answer = generate(server.url, prompt, 40)
            assert max(oracle.regrets(prompt, answer["output_ids"])) < FLIPPED_ROUNDING, length
            if drafter == "itself":
                assert steps(answer) <= 40 / 2
        assert_drained(server)


def test_chains_over_the_end_of_the_context(tmp_path: Path, logs: Path, seed: int) -> None:
    """GPT-2 has an embedding of each position, and none behind the last."""
    (family,) = (each for each in FAMILIES if each.name == "GPT-2")
    oracle = Truth(make_checkpoint(family, tmp_path / "gpt2", seed), family.experts)
    flags = (*COMMON, "--max-total-tokens", "3072", "--skip-tokenizer-init")
    rng = random.Random(seed)
    prompt = [rng.randrange(2, VOCAB) for _ in range(CONTEXT - 30)]
    kinds = {"ngram": NGRAM, "model": standalone(tmp_path / "gpt2")}
    for name, drafts in kinds.items():
        server = launch(f"dm-end-{name}", tmp_path / "gpt2", logs, *flags, *drafts)
        with running(server):
            for _ in range(2):
                answer = generate(server.url, prompt, 30)
                assert CONTEXT - 2 <= len(prompt) + len(answer["output_ids"]) <= CONTEXT
                regrets = oracle.regrets(prompt, answer["output_ids"])
                assert max(regrets) < FLIPPED_ROUNDING, name
            assert_drained(server)
