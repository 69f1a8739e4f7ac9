"""How a batch of SGLang's becomes chunks on the card."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from sglang.srt.model_executor.forward_batch_info import CaptureHiddenMode, ForwardMode

from benchmark.tenstorrent.driven import served
from hma_kernels import PAGE
from sglang_hma.prefill.ttnn.buckets import buckets, table_width
from sglang_hma.prefill.ttnn.card import Card, Dram
from sglang_hma.prefill.ttnn.chunk import pages_of
from sglang_hma.prefill.ttnn.lane import memory_of
from sglang_hma.prefill.ttnn.server import chunks_of, only_next_tokens

from .models import random_model


@pytest.mark.parametrize("trial", range(10))
def test_chunks_are_the_batch(rng: np.random.Generator, trial: int) -> None:
    requests = int(rng.integers(1, 5))
    starts = (rng.integers(0, 40, requests) * PAGE).tolist()
    lengths = rng.integers(1, 700, requests).tolist()
    ids = torch.from_numpy(rng.integers(0, 1000, sum(lengths)))
    rows = rng.permutation(requests)
    pages = rng.permutation(np.arange(1, 64 * requests + 1)).reshape(requests, 64)
    slots = torch.from_numpy((pages[:, :, None] * PAGE + np.arange(PAGE)).reshape(requests, -1))
    batch = SimpleNamespace(
        **{"forward_mode": ForwardMode.EXTEND, "batch_size": requests},
        **{"extend_seq_lens_cpu": lengths, "extend_prefix_lens_cpu": starts},
        req_pool_indices=torch.from_numpy(rows),
    )
    chunks = chunks_of(ids, batch, slots)
    assert np.array_equal(np.concatenate([chunk.tokens for chunk in chunks]), ids.numpy())
    for index, chunk in enumerate(chunks):
        assert (chunk.start, len(chunk.tokens)) == (starts[index], lengths[index])
        assert np.array_equal(chunk.pages, pages[rows[index], : pages_of(chunk.end)])


def test_only_prefill_is_computed() -> None:
    batch = SimpleNamespace(forward_mode=ForwardMode.DECODE)
    with pytest.raises(RuntimeError, match="only prefills"):
        chunks_of(torch.zeros(1), batch, torch.zeros(1))


@pytest.mark.parametrize("asked", [None, "logprobs", "hidden", "items", "positions"])
def test_whose_rows_are_needed(asked: str | None) -> None:
    mode = CaptureHiddenMode.LAST if asked == "hidden" else CaptureHiddenMode.NULL
    batch = SimpleNamespace(
        return_logprob=asked == "logprobs",
        capture_hidden_mode=mode,
        multi_item_delimiter_indices=[1] if asked == "items" else None,
        token_indices_to_pool=[1] if asked == "positions" else None,
    )
    assert only_next_tokens(batch) == (asked is None)


def test_pages_that_fit_beside_what_a_forward_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    """As many as there are bytes for and no more; where not even a chunk's fit, words say so."""
    from sglang_hma.prefill.ttnn import server as seam

    hf = random_model("qwen3")
    with served(hf.config) as server:
        model = server.model
        schedule = SimpleNamespace(chunked_prefill_size=2048)
        monkeypatch.setattr(seam, "get_schedule", lambda: schedule)
        among = buckets(2048)
        width = table_width(model.model.context, among)
        lanes = memory_of(among, model.part, width, 1 << 40)
        page = model.part.page_bytes * model.part.layers
        other = lanes + model.part.activation_bytes(2048)

        def fitting(free: int) -> int:
            dram = property(lambda _: Dram(total=1 << 40, free=free))
            monkeypatch.setattr(Card, "dram", dram)
            return int(model.fitting_tokens(10**6))

        assert fitting(other + 101 * page) == fitting(other + 102 * page - 1) == 100 * PAGE
        assert fitting(1 << 40) == 10**6
        with pytest.raises(RuntimeError, match="use a smaller model or a smaller --chunked-pre"):
            fitting(other + 64 * page)
        schedule.chunked_prefill_size = -1
        assert model.chunk_tokens == hf.config.max_position_embeddings
