"""LoRA adapters on both roles: each request's answer is its own adapter's, to the token."""

import asyncio
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import requests

from benchmark.models.truth import Truth
from sglang_hma.transfer.refusals import GIVEN_UP
from test.adapters import make_adapter

from .client import FLIPPED_ROUNDING, assert_drained, generate, payload, words
from .conftest import COMMON, FAULTY_LINK, Faults
from .harness import Pair, Server, running_pair
from .killed import replies_of_a_killed_prefill

NEW_TOKENS = 24
POOL_TOKENS = 2048
# Less than what is asked for: the base model counts too.
FLAGS = (*COMMON, "--max-loras-per-batch", "2", "--max-total-tokens", str(POOL_TOKENS))

pytestmark = [pytest.mark.e2e, pytest.mark.faults]


@dataclass(frozen=True)
class Adapted:
    """A pair with two adapters, and what each says; None is the model as it is."""

    pair: Pair
    truths: dict[str | None, Truth]
    folders: dict[str, Path]

    def check(self, name: str | None, prompt: list[int], said: list[int]) -> None:
        regrets = self.truths[name].regrets(prompt, said)
        assert max(regrets) < FLIPPED_ROUNDING, (name, len(prompt), regrets)


@pytest.fixture(scope="module")
def adapted(
    model: Path, logs: Path, faults: Faults, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Adapted]:
    env = {"PYTHONPATH": str(FAULTY_LINK), "HMA_TEST_FAULTS": str(faults.file)}
    folder, plain = tmp_path_factory.mktemp("adapters"), Truth.of(model)
    fields: dict[str, dict[str, Any]] = {
        "wide": {"r": 8, "lora_alpha": 12},
        "thin": {"r": 4, "lora_alpha": 4, "target_modules": ["q_proj", "v_proj"]},
        "later": {"r": 2, "lora_alpha": 4},
    }
    folders = {
        name: make_adapter(model, folder / name, seed, **given)
        for seed, (name, given) in enumerate(fields.items())
    }
    truths = {None: plain, **{name: plain.with_adapter(each) for name, each in folders.items()}}
    paths = [f"{name}={folders[name]}" for name in ("wide", "thin")]
    flags = (*FLAGS, "--lora-paths", *paths)
    with running_pair(model, logs, *flags, name="lora", env=env) as pair:
        yield Adapted(pair, truths, folders)


def test_each_request_has_its_own_adapter(adapted: Adapted, seed: int) -> None:
    """The same prompts with each, so that a prefix of another one's would be found in the cache."""
    rng = random.Random(seed)
    prompts = [words(rng, n) for n in (5, 33, 150)]
    said: dict[tuple[str | None, int], list[int]] = {}
    for name in (None, "wide", "thin", None, "wide"):
        for index, prompt in enumerate(prompts):
            answer = generate(adapted.pair.url, prompt, NEW_TOKENS, lora_path=name)["output_ids"]
            adapted.check(name, prompt, answer)
            said.setdefault((name, index), answer)
    # Another one's truth would have been noticed.
    for name, other in ((None, "wide"), ("wide", "thin"), ("thin", None)):
        missed = [
            max(adapted.truths[other].regrets(prompt, said[name, index]))
            for index, prompt in enumerate(prompts)
        ]
        assert max(missed) > 4 * FLIPPED_ROUNDING, (name, other, missed)
    assert_drained(adapted.pair.prefill, adapted.pair.decode)


def test_many_at_once_in_a_small_pool(adapted: Adapted, seed: int) -> None:
    """More adapters than a batch may have, requests put aside, and clients that leave."""
    rng = random.Random(seed)
    names = (None, "wide", "thin")
    jobs = [(rng.choice(names), words(rng, rng.randrange(1, 200))) for _ in range(24)]

    async def ask(session: aiohttp.ClientSession, name: str | None, prompt: list[int]) -> Any:
        body = payload(prompt, 64, lora_path=name)
        async with session.post(f"{adapted.pair.url}/generate", json=body) as reply:
            return reply.status, await reply.json(content_type=None)

    async def leave(session: aiohttp.ClientSession, name: str | None, prompt: list[int]) -> None:
        body = payload(prompt, 64, lora_path=name, stream=True)
        async with session.post(f"{adapted.pair.url}/generate", json=body) as reply:
            await reply.content.readany()

    async def everybody() -> list[Any]:
        timeout = aiohttp.ClientTimeout(total=None)
        async with aiohttp.ClientSession(timeout=timeout) as session:
            leaving = [leave(session, *job) for job in jobs[::4]]
            answers, _ = await asyncio.gather(
                asyncio.gather(*(ask(session, *job) for job in jobs)), asyncio.gather(*leaving)
            )
            return list(answers)

    for (name, prompt), (status, answer) in zip(jobs, asyncio.run(everybody()), strict=True):
        assert status == 200, answer
        adapted.check(name, prompt, answer["output_ids"])
    assert_drained(adapted.pair.prefill, adapted.pair.decode)


def test_adapters_come_and_go(adapted: Adapted, tmp_path: Path, model: Path, seed: int) -> None:
    pair, prompt = adapted.pair, words(random.Random(seed), 40)
    servers = (pair.prefill, pair.decode)

    def tell(route: str, *told: Server, **fields: Any) -> list[requests.Response]:
        return [requests.post(f"{each.url}/{route}", json=fields) for each in told or servers]

    def ask(name: str = "later") -> requests.Response:
        return requests.post(f"{pair.url}/generate", json=payload(prompt, lora_path=name))

    assert ask().status_code == 400
    # Each server has its own list; what one of them lacks is refused, whichever it is.
    for name, (first, then) in {"later": servers, "last": servers[::-1]}.items():
        load = {"lora_name": name, "lora_path": str(adapted.folders["later"])}
        for reply in tell("load_lora_adapter", first, **load):
            assert reply.status_code == 200, reply.text
        refused = ask(name)
        assert refused.status_code == 400 and name in refused.text, refused.text
        if then is pair.decode:
            pair.prefill.wait_logged(GIVEN_UP)
        for reply in tell("load_lora_adapter", then, **load):
            assert reply.status_code == 200, reply.text
        adapted.check("later", prompt, ask(name).json()["output_ids"])
    for reply in tell("unload_lora_adapter", lora_name="later"):
        assert reply.status_code == 200, reply.text
    # SGLang reads an adapter that it knows from its folder again.
    adapted.check("later", prompt, ask().json()["output_ids"])
    # An adapter in use is not let go: whoever left gave theirs back.
    for name in ("wide", "thin", "later", "last"):
        for reply in tell("unload_lora_adapter", lora_name=name):
            assert reply.status_code == 200, reply.text
    odd = make_adapter(model, tmp_path / "odd", 3, r=4, use_rslora=True)
    for reply in tell("load_lora_adapter", lora_name="odd", lora_path=str(odd)):
        assert reply.status_code == 400 and "use_rslora True" in reply.text, reply.text
    assert_drained(*servers)


def test_prefill_is_killed(adapted: Adapted, faults: Faults, seed: int) -> None:
    """While it sends prompts of several adapters; its next process has those of its flags."""
    pair, rng = adapted.pair, random.Random(seed)
    jobs = [(name, words(rng, 150)) for name in (None, "wide", "thin")]

    bodies = [payload(prompt, NEW_TOKENS, lora_path=name) for name, prompt in jobs]
    replies = replies_of_a_killed_prefill(pair, faults, rng.randrange(6), bodies)
    for (name, prompt), reply in zip(jobs, replies, strict=True):
        if reply.status_code < 500:
            adapted.check(name, prompt, reply.json()["output_ids"])
    for (name, prompt), body in zip(jobs, bodies, strict=True):
        reply = requests.post(f"{pair.url}/generate", json=body)
        adapted.check(name, prompt, reply.json()["output_ids"])
    for name in ("wide", "thin"):
        reply = requests.post(f"{pair.decode.url}/unload_lora_adapter", json={"lora_name": name})
        assert reply.status_code == 200, reply.text
    assert_drained(pair.prefill, pair.decode)
