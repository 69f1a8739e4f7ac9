"""No model of SGLang writes rows into our pages by itself: known gates are shut, and who asks the
pool for rows is refused."""

import ast
import functools
from pathlib import Path

import pytest
import sglang
import torch

from hma_kernels import PAGE
from sglang_hma.attention.fused_store import enable_fused_set_kv_buffer
from sglang_hma.kvcache.pool import Bfp8KVPool, MixedKVPool

MODELS = Path(next(iter(sglang.__path__))) / "srt" / "models"
GATE, MAKER, ARGUMENT = (
    "enable_fused_set_kv_buffer",
    "create_fused_set_kv_buffer_arg",
    "fused_set_kv_buffer_arg",
)


def names_in(tree: ast.AST) -> set[str]:
    found = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    return found | {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}


@functools.cache
def parsed() -> dict[str, ast.Module]:
    return {file.name: ast.parse(file.read_text()) for file in MODELS.rglob("*.py")}


def test_every_model_that_stores_by_itself_passes_the_gate() -> None:
    gated, never = set(), set()
    for name, tree in parsed().items():
        if name == "utils.py" or MAKER not in names_in(tree):
            continue
        (gated if GATE in names_in(tree) else never).add(name)
    assert {"qwen3_moe.py", "gpt_oss.py"} <= gated
    # Imports it behind a condition that is always false.
    assert never == {"gemma4_causal.py"}
    gemma = (MODELS / "gemma4_causal.py").read_text()
    assert "can_fuse = False" in gemma and gemma.count(f"{MAKER}(") == 1


def test_no_model_takes_the_pools_buffers_by_their_names() -> None:
    """As attributes, which no method of ours can refuse."""
    assert not {
        name
        for name, tree in parsed().items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and node.attr in ("k_buffer", "v_buffer")
    }


@pytest.mark.parametrize("kind", [Bfp8KVPool, MixedKVPool])
@pytest.mark.parametrize("method", ["get_key_buffer", "get_value_buffer", "get_kv_buffer"])
def test_a_model_that_asks_the_pool_for_rows_is_refused(
    kind: type[Bfp8KVPool], method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SGLANG_HMA_CONFIG", '{"role":"decode"}')
    pool = kind(
        size=1024,
        page_size=PAGE,
        dtype=torch.bfloat16,
        head_num=1,
        head_dim=32,
        layer_num=1,
        device="cpu",
        enable_memory_saver=False,
    )
    with pytest.raises(NotImplementedError, match=r"layer 0 .* --hma-kv-format native"):
        getattr(pool, method)(0)


def test_the_gate_is_shut() -> None:
    assert not enable_fused_set_kv_buffer(lambda batch: True, None)
