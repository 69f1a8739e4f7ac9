"""Short prompts are computed on decode (--hma-offload-threshold), with the tokens that the pair has
for them otherwise, beside long ones, in a full pool, and given up at any moment."""

import asyncio
import json
import random
from collections.abc import Iterator
from pathlib import Path

import pytest
import requests

from .client import (
    all_at_once,
    assert_drained,
    generate,
    greedy,
    load,
    output_ids,
    payload,
    words,
)
from .conftest import COMMON
from .harness import Pair, running_pair, until

BELOW = 64
POOL_TOKENS = 2048
LENGTHS = [1, 31, 32, 33, BELOW - 1, BELOW, BELOW + 1, 200]
TOKENS = 40

pytestmark = pytest.mark.e2e


@pytest.fixture(scope="module")
def shorts(model: Path, logs: Path) -> Iterator[Pair]:
    """Weights as in the checkpoint on both: a short prompt gets decode's."""
    with running_pair(
        model,
        logs,
        *COMMON,
        prefill_flags=("--hma-offload-threshold", str(BELOW), "--hma-weight-format", "native"),
        decode_flags=(
            *("--max-total-tokens", str(POOL_TOKENS), "--max-running-requests", "6"),
            *("--num-reserved-decode-tokens", "1"),
        ),
        name="shorts",
    ) as pair:
        yield pair


def computed_on_decode(pair: Pair) -> int:
    """As the gauges were read last, a second ago at most."""
    return int(pair.decode.metric("sglang_hma:short_prompts_total"))


def passes_of_prefill(pair: Pair) -> int:
    """Of more than one token: health checks are such, at any moment."""
    passes = [line for line in pair.prefill.text().splitlines() if "Prefill batch" in line]
    return sum("#new-token: 1," not in line for line in passes)


def test_they_get_the_same_tokens_without_prefill(shorts: Pair, seed: int) -> None:
    """With logprobs, which the router puts together from both servers, prefill computes."""
    rng = random.Random(seed)
    prompts = [words(rng, n) for n in LENGTHS]
    expected = [greedy(shorts.url, each, TOKENS) for each in prompts]
    assert computed_on_decode(shorts) == 0
    short = sum(len(each) < BELOW for each in prompts)
    before = passes_of_prefill(shorts)
    assert [output_ids(shorts.url, each, TOKENS) for each in prompts[:short]] == expected[:short]
    assert passes_of_prefill(shorts) == before
    assert [output_ids(shorts.url, each, TOKENS) for each in prompts[short:]] == expected[short:]
    assert passes_of_prefill(shorts) > before
    until(lambda: computed_on_decode(shorts) == short, shorts.decode)
    meta = generate(shorts.url, prompts[1])["meta_info"]
    assert (meta["prompt_tokens"], meta["completion_tokens"]) == (LENGTHS[1], 16)
    assert meta["finish_reason"]["type"] == "length"
    assert_drained(shorts.prefill, shorts.decode)


def test_streams_and_chat(shorts: Pair, seed: int) -> None:
    ids = words(random.Random(seed), 20)
    whole = output_ids(shorts.url, ids, TOKENS)
    with requests.post(
        f"{shorts.url}/generate", json=payload(ids, TOKENS, stream=True), stream=True
    ) as reply:
        lines = [line for line in reply.iter_lines() if line.startswith(b"data: ")]
    assert lines[-1] == b"data: [DONE]"
    assert len(lines) == TOKENS + 1
    last = json.loads(lines[-2].removeprefix(b"data: "))
    assert last["output_ids"] == whole
    said = {"model": "m", "prompt": "w17 w18 w19", "max_tokens": 8, "temperature": 0}
    answer = requests.post(f"{shorts.url}/v1/completions", json=said).json()
    assert answer["usage"]["completion_tokens"] > 0, answer


def test_many_at_once_in_a_full_pool(shorts: Pair, seed: int) -> None:
    """More than run at a time, in two kinds, and more pages than there are: they are put aside and
    go on."""
    rng = random.Random(seed)
    sizes = [rng.choice((rng.randrange(1, BELOW), rng.randrange(BELOW, 300))) for _ in range(60)]
    jobs = [(words(rng, n), rng.randrange(1, 200)) for n in sizes]
    expected = [greedy(shorts.url, *job) for job in jobs]
    answers = asyncio.run(all_at_once(shorts.url, jobs))
    refused = [(i, *answer) for i, answer in enumerate(answers) if answer[0] != 200]
    assert not refused, (len(refused), refused[:2])
    assert [list(answer["output_ids"]) for _, answer in answers] == expected
    assert_drained(shorts.prefill, shorts.decode)


def test_given_up_while_they_wait_and_while_they_run(shorts: Pair, seed: int) -> None:
    rng = random.Random(seed)

    async def give_up() -> None:
        asked = [
            asyncio.create_task(all_at_once(shorts.url, [(words(rng, rng.randrange(1, 150)), 400)]))
            for _ in range(50)
        ]
        await asyncio.to_thread(
            until, lambda: load(shorts.decode)["num_running_reqs"] > 3, shorts.decode
        )
        for task in asked:
            task.cancel()
        await asyncio.gather(*asked, return_exceptions=True)

    asyncio.run(give_up())
    assert_drained(shorts.prefill, shorts.decode)
    job = words(rng, 10), 16
    assert output_ids(shorts.url, *job) == greedy(shorts.url, *job)
