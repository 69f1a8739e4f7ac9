"""How many prompts decode holds at once in the same bytes, with one pool and with two."""

import asyncio
import random
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from .client import all_at_once, assert_drained, load
from .conftest import COMMON, FAULTY_LINK, Faults
from .harness import Pair, running_pair
from .test_two_pool_pair import made_model
from .test_two_pools import prompt

pytestmark = [pytest.mark.e2e, pytest.mark.slow]

PROMPT, ANSWER, PROMPTS = 1500, 20, 12
QUIET_S = 5  # nobody is let in any more
ONE_POOL = ("--disable-hybrid-swa-memory",)
# Of a model with one layer of each kind, as many bytes.
POOLS = {
    "one": ("--max-total-tokens", "10240"),
    "two": ("--max-total-tokens", "16384", "--swa-full-tokens-ratio", "0.25"),
}


def held_at_once(pair: Pair, faults: Faults, jobs: list[tuple[list[int], int]]) -> int:
    """Requests that have pages on decode while none of them arrives."""
    faults.set(hold_after=0)
    with ThreadPoolExecutor(1) as pool:
        answers = pool.submit(asyncio.run, all_at_once(pair.url, jobs))
        most, since_s = 0, time.monotonic()
        while not most or time.monotonic() - since_s < QUIET_S:
            now = int(load(pair.decode)["disaggregation"]["decode_transfer_queue_reqs"])
            if now > most:
                most, since_s = now, time.monotonic()
            time.sleep(0.2)
        faults.set()
        assert all(status == 200 for status, _ in answers.result())
    return most


def test_the_same_bytes_hold_more(
    tmp_path_factory: pytest.TempPathFactory, logs: Path, seed: int
) -> None:
    folder, _ = made_model(tmp_path_factory)
    rng, found, sent = random.Random(seed), {}, {}
    jobs = [(prompt(rng, PROMPT), ANSWER) for _ in range(PROMPTS)]
    faults = Faults(logs / "faults-capacity.json")
    faults.set()
    for name, pools in POOLS.items():
        both = (*COMMON, "--skip-tokenizer-init", *(ONE_POOL if name == "one" else ()))
        with running_pair(
            folder,
            logs,
            *both,
            prefill_flags=("--max-total-tokens", "32768"),
            decode_flags=(*pools, "--num-reserved-decode-tokens", "1"),
            name=f"capacity-{name}",
            env={"PYTHONPATH": str(FAULTY_LINK), "HMA_TEST_FAULTS": str(faults.file)},
        ) as pair:
            found[name] = held_at_once(pair, faults, jobs)
            megabytes = pair.prefill.metric("sglang:kv_transfer_total_mb_sum")
            sent[name] = round(megabytes * 2**20 / PROMPTS)
            assert_drained(pair.prefill, pair.decode)
    print(f"prompts of {PROMPT} tokens held at once: {found}; bytes sent of each: {sent}")
    assert found == {"one": 6, "two": 10}
    assert sent["two"] / sent["one"] == pytest.approx(0.52, abs=0.01)
