"""Which models a server takes, and how much memory it gives their pages."""

import json
from pathlib import Path

import psutil
import pytest
from transformers import PretrainedConfig

from sglang_hma.launch import defaults
from sglang_hma.launch.flags import Refusal
from sglang_hma.launch.model import SOFTCAP, check_draft_model, check_model, left_out

from .reading import CPU, start


class Sized:
    """What size_pool looks at of a model: 1088 bytes a token and layer."""

    head_dim, v_head_dim = 64, 64

    def __init__(self, layers: int, context_len: int) -> None:
        self.num_hidden_layers, self.context_len = layers, context_len

    def get_num_kv_heads(self, tp_size: int) -> int:
        return max(1, 8 // tp_size)


def test_a_pool_on_a_cpu_is_sized_where_nobody_did() -> None:
    for flag, value in (("--max-total-tokens", 4096), ("--mem-fraction-static", 0.5)):
        config, server_args = start(*CPU, flag[:-2], str(value))
        defaults.size_pool(config, server_args, Sized(2, 4096))
        sizes = {server_args.max_total_tokens, server_args.mem_fraction_static}
        assert sizes == {value, None}
    config, server_args = start(*CPU)
    defaults.size_pool(config, server_args, Sized(2, 4096))
    assert (server_args.max_total_tokens, server_args.mem_fraction_static) == (65536, 0.95)
    layers = psutil.virtual_memory().total // (1088 * 50_000)
    sizes = {}
    for models in (1, 2):  # a model and one that drafts for it share what there is
        config, server_args = start(*CPU)
        defaults.size_pool(config, server_args, *[Sized(layers, 100_000)] * models)
        sizes[models] = server_args.max_total_tokens
    assert sizes[2] == sizes[1] // 2 // 1024 * 1024


def test_a_pool_holds_one_context_but_no_more_than_its_part_of_memory() -> None:
    config, server_args = start(*CPU)
    defaults.size_pool(config, server_args, Sized(2, 100_000))
    assert server_args.max_total_tokens == 98 * 1024
    config, server_args = start(*CPU)
    layers = psutil.virtual_memory().total // (1088 * 50_000)
    defaults.size_pool(config, server_args, Sized(layers, 100_000))
    bytes_ = server_args.max_total_tokens * 1088 * layers
    fifth = 0.2 * psutil.virtual_memory().total
    assert fifth - 1024 * 1088 * layers < bytes_ <= fifth


PLAIN = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "vocab_size": 512,
    "max_position_embeddings": 1024,
    "torch_dtype": "bfloat16",
}
MLA = {
    "architectures": ["DeepseekV2ForCausalLM"],
    "model_type": "deepseek_v2",
    "kv_lora_rank": 64,
    "q_lora_rank": None,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 32,
    "v_head_dim": 32,
}
SSM = {"architectures": ["Qwen3NextForCausalLM"], "model_type": "qwen3_next"}
TWO_POOLS = {"architectures": ["SomeForCausalLM"], "is_hybrid_swa": True}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"head_dim": 80}, ["head_dim 80", "multiple of 32"]),
        (MLA, ["MLA", "MHA/GQA"]),
        (SSM, ["state-space", "MHA/GQA"]),
        (TWO_POOLS, ["SomeForCausalLM mixes", "two KV pools", "--hma-kv-format native"]),
        (
            {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "mlp_bias": True},
            ["LlamaForCausalLM has mlp_bias", "leaves out"],
        ),
        (
            {"architectures": ["Exaone4ForCausalLM"], "model_type": "exaone4", "rope_theta": 1e4},
            ["Exaone4ForCausalLM has rope_theta 10000", "takes 1e+06"],
        ),
        ({"torch_dtype": "float16"}, ["float16", "--dtype bfloat16"]),
        ({"model_type": "nothing"}, ["--model-path is"]),
    ],
)
def test_models_that_cannot_be_served(
    changes: dict[str, object], words: list[str], tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(PLAIN | changes))
    config, server_args = start("--model-path", str(tmp_path), "--device", "cpu")
    with pytest.raises(Refusal) as refused:
        check_model(config, server_args)
    message = str(refused.value)
    assert "\n" not in message and all(word in message for word in words), message


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"head_dim": 96, "num_hidden_layers": 1}, []),
        ({"head_dim": 80}, ["head_dim 80", "draft with another model"]),
        (MLA, ["MLA", "draft with another model"]),
        ({"vocab_size": 511}, ["it has 511 tokens", "for 512", "the same vocabulary"]),
        ({"max_position_embeddings": 512}, ["it reads 512 tokens", "add --context-length 512"]),
        ({"model_type": "nothing"}, ["--speculative-draft-model-path is"]),
    ],
)
def test_models_that_draft(changes: dict[str, object], words: list[str], tmp_path: Path) -> None:
    for name, config in {"target": PLAIN, "drafter": PLAIN | changes}.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(config))
    paths = ["--model-path", str(tmp_path / "target")]
    drafts = ["--speculative-draft-model-path", str(tmp_path / "drafter")]
    drafts += ["--speculative-algorithm", "STANDALONE"]
    config, plain = start(*paths, "--device", "cpu")
    target = check_model(config, plain)
    assert check_draft_model(plain, target) is None
    config, server_args = start(*paths, *drafts, "--device", "cpu")
    if not words:
        assert check_draft_model(server_args, target).head_dim == 96
        return
    with pytest.raises(Refusal) as refused:
        check_draft_model(server_args, target)
    message = str(refused.value)
    assert "\n" not in message and all(word in message for word in words), message
    if "--context-length" in message:
        config, server_args = start(*paths, *drafts, "--device", "cpu", "--context-length", "512")
        assert check_draft_model(server_args, check_model(config, server_args)) is not None


def test_a_soft_cap_is_not_left_out_in_silence(tmp_path: Path) -> None:
    capped = {"architectures": ["Gemma2ForCausalLM"], "model_type": "gemma2"}
    asked = {}
    for cap in (50.0, None):
        folder = tmp_path / str(cap)
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(PLAIN | capped | {SOFTCAP: cap}))
        asked[cap] = ["--model-path", str(folder), "--device", "cpu"]
    check_model(*start(*asked[50.0]))
    with pytest.raises(Refusal, match=r"has attn_logit_softcapping.*--hma-kv-format bfp8"):
        check_model(*start(*asked[50.0], "--hma-kv-format", "native"))
    check_model(*start(*asked[None], "--hma-kv-format", "native"))


@pytest.mark.parametrize(("hidden", "missing"), [(4096, ""), (5120, "ALiBi")])
def test_alibi_is_not_left_out_in_silence(hidden: int, missing: str) -> None:
    """Baichuan 7B has rotary embeddings, 13B has not; their code comes with the checkpoint."""
    found = left_out("BaichuanForCausalLM", PretrainedConfig(hidden_size=hidden))
    assert found.startswith(missing) and bool(found) == bool(missing)
