"""The runtime's arithmetic against transformers in float32, on the stand-in for ttnn."""

import numpy as np
import pytest
import torch

from hma_kernels import bfp8_unpack
from sglang_hma.prefill.ttnn.card import opened
from sglang_hma.prefill.ttnn.chunk import Chunk
from sglang_hma.prefill.ttnn.offline import split

from .models import CASES, Case, check_agreement, on_card, random_model

pytestmark = pytest.mark.usefixtures("stand_in")


@pytest.mark.parametrize("case", CASES, ids=str)
def test_agrees_with_transformers(rng: np.random.Generator, case: Case) -> None:
    with opened() as card:
        check_agreement(card, rng, case)


@pytest.mark.parametrize("chips", [2, 4])
@pytest.mark.parametrize("case", CASES[6:], ids=str)
def test_chips_together_agree_with_transformers(
    rng: np.random.Generator, case: Case, chips: int
) -> None:
    with opened(range(chips), chips) as card:
        check_agreement(card, rng, case)


@pytest.mark.parametrize("chips", [2, 4])
def test_pages_of_a_mesh_are_those_of_a_chip(rng: np.random.Generator, chips: int) -> None:
    """Of the first layer, whose input no sum over chips has rounded, byte for byte."""
    hf = random_model("qwen2", kv_heads=4, vocab=500)
    chunk = Chunk(rng.integers(0, 500, 70), 0, rng.permutation(np.arange(1, 20))[:3])
    with opened() as one, opened(range(chips), chips) as several:
        alone, together = on_card(one, hf), on_card(several, hf)
        logits = [runtime.prefill([chunk])[0] for runtime in (alone, together)]
    assert logits[0].shape == logits[1].shape == (70, 500)
    used = torch.from_numpy(chunk.pages)
    for which in range(2):
        pages = [runtime.host[0][which][used] for runtime in (alone, together)]
        assert torch.equal(*pages) and pages[0].any()


def test_requests_in_one_batch_do_not_touch_each_other(rng: np.random.Generator) -> None:
    hf = random_model("qwen3")
    prompts = [rng.integers(0, 512, n) for n in (5, 64, 100)]
    order = rng.permutation(np.arange(1, 20))
    pages = [order[:1], order[1:3], order[3:7]]
    with opened() as card:
        together, alone = on_card(card, hf), on_card(card, hf)
        chunks = [Chunk(*pair) for pair in zip(prompts, (0, 0, 0), pages, strict=True)]
        logits = together.prefill(chunks)
        for chunk, answer in zip(chunks, logits, strict=True):
            assert torch.equal(alone.prefill([chunk])[0], answer)
    for layer in range(2):
        for which in range(2):
            used = torch.from_numpy(order[:7])
            assert torch.equal(together.host[layer][which][used], alone.host[layer][which][used])
    assert together.stored == [0, 1]


def test_card_and_host_have_the_same_bytes(rng: np.random.Generator) -> None:
    hf = random_model("llama")
    tokens, pages = rng.integers(0, 512, 90), np.array([9, 2, 5])
    with opened() as card:
        runtime = on_card(card, hf)
        for chunk in split(tokens, [64], pages):
            runtime.prefill([chunk])
        for layer, kv in enumerate(runtime.cache):
            for which, cache in enumerate(kv):
                used = torch.from_numpy(pages)
                arrived = bfp8_unpack(runtime.host[layer][which][used][:, :, None])
                assert torch.equal(cache.value[used].bfloat16(), arrived)


@pytest.mark.parametrize(
    ("tokens", "start", "pages"), [(0, 0, 1), (5, 16, 2), (33, 0, 1), (1, 32, 1)]
)
def test_impossible_chunks_are_refused(tokens: int, start: int, pages: int) -> None:
    with pytest.raises(ValueError, match=r"chunk starts|tokens from"):
        Chunk(np.zeros(tokens, np.int64), start, np.arange(pages))


def test_the_last_token_alone(rng: np.random.Generator) -> None:
    hf = random_model("qwen2")
    with opened() as card:
        runtime = on_card(card, hf)
        for length in (1, 32, 33, 64, 150):
            chunk = Chunk(rng.integers(0, 512, length), 0, np.arange(1, 6))
            every, last = (runtime.prefill([chunk], last=alone)[0] for alone in (False, True))
            assert torch.equal(every[-1:], last)
