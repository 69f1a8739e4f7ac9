"""Where layers with a window have a pool of their own, and how large the two are."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from sglang_hma.config import HmaConfig
from sglang_hma.kvcache.sizing import TwoPoolConfigurator
from sglang_hma.launch.flags import Refusal
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
        (["--disaggregation-mode", "prefill"], True),
        (["--disaggregation-mode", "decode"], True),
        (["--disaggregation-mode", "decode", "--chunked-prefill-size", "-1"], True),
        (["--disaggregation-mode", "decode", "--tp-size", "2"], False),
        (["--disaggregation-mode", "prefill", "--disable-hybrid-swa-memory"], False),
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


@pytest.mark.parametrize(
    ("role", "flags", "words"),
    [
        ("decode", ["--speculative-algorithm", "NGRAM"], "--speculative-algorithm NGRAM"),
        (
            "decode",
            ["--disaggregation-decode-enable-radix-cache"],
            "--disaggregation-decode-enable-radix-cache",
        ),
        ("prefill", ["--chunked-prefill-size", "-1"], "--chunked-prefill-size -1"),
        ("prefill", ["--enable-hierarchical-cache"], "--enable-hierarchical-cache"),
        ("prefill", ["--hma-offload-threshold", "64"], "--hma-offload-threshold 64"),
    ],
)
def test_what_one_server_of_a_pair_cannot_have_is_refused(
    role: str, flags: list[str], words: str, tmp_path: Path
) -> None:
    """In one pool, which both must be given, it can."""
    (tmp_path / "config.json").write_text(json.dumps(GPT_OSS))
    given = ["--model-path", str(tmp_path), "--device", "cpu", "--disaggregation-mode", role]
    with pytest.raises(Refusal) as refused:
        check_model(*start(*given, *flags))
    said = str(refused.value)
    assert said.startswith(words) and "--disable-hybrid-swa-memory" in said and "\n" not in said
    config, server_args = start(*given, *flags, "--disable-hybrid-swa-memory")
    assert not check_model(config, server_args).is_hybrid_swa


@pytest.fixture(params=["null", "decode", "prefill"])
def role(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    for name, value in HmaConfig(role=request.param).environment().items():
        monkeypatch.setenv(name, value)
    return str(request.param)


def sizes(tokens: int, ratio: float, window: int, *, bytes_given: bool = False) -> Any:
    made = TwoPoolConfigurator.__new__(TwoPoolConfigurator)
    made._swa_full_tokens_ratio, made._sliding_window_size = ratio, window
    made._enable_unified_memory = False
    if bytes_given:
        made._cell_size = 10
        return made.calculate_pool_sizes(10 * tokens, 32)
    return made.calculate_pool_sizes_from_max_tokens(tokens, 32)


@pytest.mark.parametrize("bytes_given", [False, True])
def test_both_pools_are_whole_slabs(bytes_given: bool, role: str) -> None:
    """One more of each where the memory is given, for padded tokens. On prefill they are pages."""
    found = sizes(11_000, 0.5, 127, bytes_given=bytes_given)
    full, window = (9 * 1024, 4 * 1024) if bytes_given else (10 * 1024, 5 * 1024)
    if role == "prefill":
        full, window = 11_000 // 32 * 32, 5_500 // 32 * 32
    assert found.max_total_num_tokens == found.full_max_total_num_tokens == full
    assert found.swa_max_total_num_tokens == window


@pytest.mark.parametrize(
    ("tokens", "ratio", "window"), [(1000, 0.8, 127), (2048, 0.4, 127), (2048, 0.5, 255)]
)
def test_pools_that_hold_no_window_are_refused(
    tokens: int, ratio: float, window: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SGLANG_HMA_CONFIG", "{}")
    with pytest.raises(RuntimeError, match=r"--swa-full-tokens-ratio.*--disable-hybrid-swa-memory"):
        sizes(tokens, ratio, window)


def test_decode_needs_a_slab_of_either_format(monkeypatch: pytest.MonkeyPatch) -> None:
    """A prompt's last page is a BF16 one, and a BFP8 one before that."""
    monkeypatch.setenv("SGLANG_HMA_CONFIG", '{"role":"decode"}')
    assert sizes(2048, 1.0, 127).swa_max_total_num_tokens == 2048
    with pytest.raises(RuntimeError, match="2 times 1024 tokens in either pool"):
        sizes(2048, 0.9, 127)


@pytest.mark.parametrize(("ratio", "more"), [(0.8, 1.1), (0.25, 1.6), (0.1, 1.8)])
def test_the_same_bytes_hold_more_tokens(
    ratio: float, more: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half of gpt-oss's layers have a window. Of the layers that see all of a prompt a decode
    server has room for so many times the tokens that one pool would hold."""
    monkeypatch.setenv("SGLANG_HMA_CONFIG", '{"role":"decode"}')
    layer_bytes = 2 * 8 * 64 * 17 // 16
    memory = 12 << 30
    made = TwoPoolConfigurator.__new__(TwoPoolConfigurator)
    made._swa_full_tokens_ratio, made._sliding_window_size = ratio, 127
    made._enable_unified_memory = False
    made._cell_size = 12 * layer_bytes * (1 + ratio)
    two = made.calculate_pool_sizes(memory, 32)
    one = memory // (24 * layer_bytes)
    assert two.full_max_total_num_tokens / one == pytest.approx(more, abs=0.03)
    used = 12 * layer_bytes * (two.full_max_total_num_tokens + two.swa_max_total_num_tokens)
    assert used <= memory


def test_bytes_of_a_token() -> None:
    """17 sixteenths of a byte an element, whatever the model's dtype."""
    from sglang_hma.kvcache.sizing import packed_bytes

    kvc = SimpleNamespace(kv_cache_dtype=SimpleNamespace(itemsize=4))
    assert packed_bytes(4 * 64, kvc) == 64 * 17 // 16
