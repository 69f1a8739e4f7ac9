"""Batches through lanes: with traces and without, together and alone, the same values."""

import threading

import numpy as np
import pytest
import torch

from hma_kernels import PAGE
from sglang_hma.prefill.ttnn.card import opened
from sglang_hma.prefill.ttnn.chunk import Chunk, pages_of

from .models import check_traces, drawn, on_card, random_model, same_pages

pytestmark = pytest.mark.usefixtures("stand_in")

CHUNK = 256


@pytest.mark.parametrize(
    ("kind", "chips", "layers", "chunk"),
    [("qwen3", 1, 8, 256), ("qwen3", 2, 2, 128), ("qwen3_moe", 1, 2, 128)],
)
def test_traces_compute_what_calls_do(
    rng: np.random.Generator, kind: str, chips: int, layers: int, chunk: int
) -> None:
    with opened(range(chips), chips) as card:
        check_traces(card, rng, kind, layers, chunk)


def test_a_batch_of_eight_equals_eight_requests(rng: np.random.Generator) -> None:
    hf = random_model("llama", vocab=500)
    order = rng.permutation(np.arange(1, 64))
    chunks, begin = [], 0
    for length in rng.integers(1, 200, 8).tolist():
        own = order[begin : begin + pages_of(length)]
        begin += pages_of(length)
        chunks.append(Chunk(rng.integers(0, 500, length), 0, own))
    with opened() as card:
        together, alone = (on_card(card, hf, chunk_tokens=2048) for _ in range(2))
        for last in (True, False):
            answers = together.prefill(chunks, last=last)
            for chunk, answer in zip(chunks, answers, strict=True):
                assert torch.equal(alone.prefill([chunk], last=last)[0], answer)
            assert same_pages(together, alone, chunks)


@pytest.mark.parametrize(("length", "chunk_tokens"), [(400, CHUNK), (2500, 2048)])
def test_a_prefix_may_end_anywhere(
    rng: np.random.Generator, length: int, chunk_tokens: int
) -> None:
    """Behind cached pages, in one pass or several, whatever the edges that attention wants."""
    hf = random_model("qwen3", vocab=500, context=4096)
    count = pages_of(length)
    tokens, pages = rng.integers(0, 500, length), rng.permutation(np.arange(1, 96))[:count]
    with opened() as card:
        cut, whole = (on_card(card, hf, pages=96, chunk_tokens=chunk_tokens) for _ in range(2))
        expected = whole.prefill([Chunk(tokens, 0, pages)])[0]
        done = 0
        cuts = rng.choice(np.arange(1, length // PAGE), 4, replace=False) * PAGE
        for end in [*sorted(cuts.tolist()), length]:
            part = cut.prefill([Chunk(tokens[done:end], done, pages[: pages_of(end)])])[0]
            assert torch.equal(part, expected[done:end]), (done, end)
            done = end
        assert same_pages(cut, whole, [Chunk(tokens, 0, pages)])


def test_of_several_passes_a_layer_is_complete_with_the_last(rng: np.random.Generator) -> None:
    hf = random_model("qwen2", vocab=500)
    chunks = [Chunk(rng.integers(0, 500, 700), 0, np.arange(1, 23))]
    with opened() as card:
        runtime = on_card(card, hf, chunk_tokens=128)
        states: list[bool] = []
        stored = runtime.runner.readback.layer_stored

        def complete(layer: int) -> None:
            used = torch.from_numpy(chunks[0].pages)
            states.extend(
                bool(runtime.host[layer][w][used].flatten(1).any(1).all()) for w in (0, 1)
            )
            stored(layer)

        runtime.runner.readback.layer_stored = complete
        runtime.prefill(chunks, last=True)
        assert runtime.stored == [0, 1] and states == [True] * 4


def test_a_trace_that_has_no_room_leaves_calls(
    rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    import ttnn

    hf = random_model("llama", vocab=500)
    with opened() as card:
        limited, called = (on_card(card, hf, chunk_tokens=CHUNK) for _ in range(2))
        ended, end = [0], ttnn.end_trace_capture

        def full(*args: object, **options: object) -> None:
            end(*args, **options)
            ended[0] += 1
            if ended[0] == 6:
                raise RuntimeError("trace region is full\nbacktrace")

        monkeypatch.setattr(ttnn, "end_trace_capture", full)
        limited.runner.warm_up(traces=True)
        assert limited.runner.facts()["traces"] == 2
        assert "no room for the trace of 128 rows" in caplog.text and "backtrace" not in caplog.text
        chunks = drawn(rng, 64)
        for one, other in zip(
            *(r.prefill(chunks, last=True) for r in (limited, called)), strict=True
        ):
            assert torch.equal(one, other)


def test_what_does_not_fit_in_the_cores_goes_to_dram(
    rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    import ttnn

    linear, used = ttnn.linear, []

    def clashes(x: object, *args: object, memory_config: str, **options: object) -> object:
        if memory_config == ttnn.L1_MEMORY_CONFIG and x.shape[2] > 64:
            raise RuntimeError("info:\nbuffers clash")
        used.append((x.shape[2], memory_config))
        return linear(x, *args, memory_config=memory_config, **options)

    hf = random_model("llama", vocab=500)
    with opened() as card:
        limited, called = (on_card(card, hf, chunk_tokens=CHUNK) for _ in range(2))
        with monkeypatch.context() as patch:
            patch.setattr(ttnn, "linear", clashes)
            limited.runner.warm_up(traces=True)
        assert {rows for rows, where in used if where == ttnn.L1_MEMORY_CONFIG} == {32, 64}
        assert {rows for rows, where in used if where != ttnn.L1_MEMORY_CONFIG} >= {128, 256}
        chunks = drawn(rng, 64)
        answers = [runtime.prefill(chunks, last=True) for runtime in (limited, called)]
        for one, other in zip(*answers, strict=True):
            assert torch.equal(one, other)


def test_what_goes_wrong_while_reading_is_raised_by_the_forward(rng: np.random.Generator) -> None:
    hf = random_model("llama", vocab=500)
    with opened() as card:
        runtime = on_card(card, hf, chunk_tokens=CHUNK)

        def fails(*_: object) -> None:
            raise OSError("no memory for pages")

        runtime.runner.readback.store = fails
        with pytest.raises(RuntimeError, match="reading K and V") as raised:
            runtime.prefill(drawn(rng, 64), last=True)
        assert isinstance(raised.value.__cause__, OSError)
        assert threading.current_thread().is_alive()
