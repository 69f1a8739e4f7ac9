"""How a batch of SGLang's becomes chunks on the card."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from sglang.srt.model_executor.forward_batch_info import ForwardMode

from hma_kernels import PAGE
from sglang_hma.prefill.ttnn.model import LARGEST_ATTENTION_CHUNK
from sglang_hma.prefill.ttnn.server import parts_of
from sglang_hma.prefill.ttnn.shape import pages_of

WIDE = LARGEST_ATTENTION_CHUNK


@pytest.mark.parametrize("logprobs", [False, True])
@pytest.mark.parametrize("trial", range(10))
def test_parts_are_the_batch(rng: np.random.Generator, trial: int, logprobs: bool) -> None:
    requests = int(rng.integers(1, 5))
    starts = (rng.integers(0, 40, requests) * PAGE).tolist()
    lengths = rng.integers(1, 700, requests).tolist()
    ids = torch.from_numpy(rng.integers(0, 1000, sum(lengths)))
    rows = rng.permutation(requests)
    pages = rng.permutation(np.arange(1, 64 * requests + 1)).reshape(requests, 64)
    slots = torch.from_numpy((pages[:, :, None] * PAGE + np.arange(PAGE)).reshape(requests, -1))
    batch = SimpleNamespace(
        **{"forward_mode": ForwardMode.EXTEND, "batch_size": requests, "return_logprob": logprobs},
        **{"extend_seq_lens_cpu": lengths, "extend_prefix_lens_cpu": starts},
        req_pool_indices=torch.from_numpy(rows),
    )
    parts = parts_of(ids, batch, slots)
    assert np.array_equal(np.concatenate([part.chunk.tokens for part in parts]), ids.numpy())
    for index, (start, length) in enumerate(zip(starts, lengths, strict=True)):
        own = [parts.pop(0)]
        while own[-1].chunk.start + len(own[-1].chunk.tokens) < start + length:
            own.append(parts.pop(0))
        assert own[0].chunk.start == start
        # Where more than the way to the next edge is new, nearly all of it starts on an edge.
        narrow = -start % WIDE
        assert len(own) == (2 if 0 < narrow < length else 1)
        assert own[-1].chunk.start % WIDE == 0 or length <= narrow
        expected = pages[rows[index], : pages_of(start + length)]
        assert all(np.array_equal(part.chunk.pages, expected) for part in own)
        asked = [len(part.chunk.tokens) if logprobs else 0 for part in own]
        assert [part.rows for part in own] == (asked if logprobs else [*asked[:-1], 1])
    assert not parts


def test_only_prefill_is_computed() -> None:
    batch = SimpleNamespace(forward_mode=ForwardMode.DECODE)
    with pytest.raises(RuntimeError, match="only prefills"):
        parts_of(torch.zeros(1), batch, torch.zeros(1))
