"""The committed model is the one that its card speaks of, and knows what it learned."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmark.quality import text, train

FIGURES = json.loads((train.MODEL / "training.json").read_text())


def test_files_fit_the_repository() -> None:
    assert sum(path.stat().st_size for path in train.MODEL.iterdir()) < 16 << 20


@pytest.mark.parametrize("held_out", [True, False], ids=["held out", "learned from"])
def test_it_knows_python(held_out: bool) -> None:
    """Another Python's library is another text: far better than 3-grams on it all the same."""
    model = AutoModelForCausalLM.from_pretrained(train.MODEL, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(train.MODEL)
    files = [source for source, _ in zip(text.sources(held_out=held_out), range(20), strict=False)]
    data = train.encoded(tokenizer, files)
    assert (
        train.perplexity(model, data[: 20 * train.WINDOW + 1]) < FIGURES["trigram_perplexity"] / 2
    )


def test_it_is_three_times_better_than_trigrams() -> None:
    assert FIGURES["held_out_perplexity_bf16"] < FIGURES["trigram_perplexity"] / 3
