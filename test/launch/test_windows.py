"""Where layers with a window have a pool of their own, and how large the two are."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from sglang_hma.kvcache.sizing import TwoPoolConfigurator
from sglang_hma.launch.model import check_model

from .test_models import PLAIN, start

GPT_OSS = PLAIN | {
    "architectures": ["GptOssForCausalLM"],
    "model_type": "gpt_oss",
    "num_local_experts": 4,
    "sliding_window": 128,
    "layer_types": ["sliding_attention", "full_attention"],
}


@pytest.mark.parametrize(
    ("flags", "two"),
    [
        ([], True),
        (["--disable-radix-cache"], True),
        (["--disaggregation-mode", "prefill"], False),
        (["--disaggregation-mode", "decode"], False),
        (["--disable-hybrid-swa-memory"], False),
        (["--speculative-algorithm", "NGRAM"], False),
        (["--chunked-prefill-size", "-1"], False),
        (["--tp-size", "2"], False),
        (["--enable-streaming-session"], False),
        (["--hma-kv-format", "native"], True),  # SGLang's own
    ],
)
def test_one_pool_or_two(flags: list[str], two: bool, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(GPT_OSS))
    config, server_args = start("--model-path", str(tmp_path), "--device", "cpu", *flags)
    model = check_model(config, server_args)
    assert model.is_hybrid_swa == two == (not server_args.disable_hybrid_swa_memory)


def sizes(tokens: int, ratio: float, window: int, *, bytes_given: bool = False) -> Any:
    made = TwoPoolConfigurator.__new__(TwoPoolConfigurator)
    made._swa_full_tokens_ratio, made._sliding_window_size = ratio, window
    made._enable_unified_memory = False
    if bytes_given:
        made._cell_size = 10
        return made.calculate_pool_sizes(10 * tokens, 32)
    return made.calculate_pool_sizes_from_max_tokens(tokens, 32)


@pytest.mark.parametrize("bytes_given", [False, True])
def test_both_pools_are_whole_slabs(bytes_given: bool) -> None:
    """One more of each where the memory is given, for padded tokens."""
    found = sizes(11_000, 0.5, 127, bytes_given=bytes_given)
    full, window = (9, 4) if bytes_given else (10, 5)
    assert found.max_total_num_tokens == found.full_max_total_num_tokens == full * 1024
    assert found.swa_max_total_num_tokens == window * 1024


@pytest.mark.parametrize(
    ("tokens", "ratio", "window"), [(1000, 0.8, 127), (2048, 0.4, 127), (2048, 0.5, 255)]
)
def test_pools_that_hold_no_window_are_refused(tokens: int, ratio: float, window: int) -> None:
    with pytest.raises(RuntimeError, match=r"--swa-full-tokens-ratio.*--disable-hybrid-swa-memory"):
        sizes(tokens, ratio, window)


def test_bytes_of_a_token() -> None:
    """17 sixteenths of a byte an element, whatever the model's dtype."""
    from sglang_hma.kvcache.sizing import packed_bytes

    kvc = SimpleNamespace(kv_cache_dtype=SimpleNamespace(itemsize=4))
    assert packed_bytes(4 * 64, kvc) == 64 * 17 // 16
