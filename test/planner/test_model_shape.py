"""Shapes against transformers' own models, and what they cost against the sum of their parts."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from sglang_hma.planner import model_shape
from sglang_hma.planner.model_shape import KNOWN, ShapeError, shape_of

CONFIGS = {
    "qwen3": dict(head_dim=64, hidden_size=192, num_attention_heads=4, num_key_value_heads=2),
    "llama": dict(hidden_size=256, num_attention_heads=8, num_key_value_heads=2),
    "mistral": dict(hidden_size=256, num_attention_heads=4, head_dim=64),
}


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", CONFIGS)
def test_weights_are_those_of_transformers(tmp_path: Path, family: str, tied: bool) -> None:
    config = AutoConfig.for_model(
        family,
        **CONFIGS[family],
        num_hidden_layers=3,
        intermediate_size=512,
        vocab_size=1000,
        tie_word_embeddings=tied,
    )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    config.architectures = [type(model).__name__]
    config.save_pretrained(tmp_path)
    shape = shape_of(str(tmp_path))
    matrices = {id(p): p.numel() for p in model.parameters() if p.dim() > 1}
    assert shape.weights == sum(matrices.values())
    assert shape.head_dim == model.model.layers[0].self_attn.head_dim


# From the models' cards, without embeddings: Qwen3's technical report gives both.
@pytest.mark.parametrize(
    ("name", "billions", "without_embeddings"),
    [
        *(("Qwen3-4B", 4.0, 3.6), ("Qwen3-8B", 8.2, 6.95), ("Qwen3-14B", 14.8, 13.2)),
        *(("Qwen3-32B", 32.8, 31.2), ("Llama-3.1-8B", 8.0, None), ("Llama-3.1-70B", 70.6, None)),
    ],
)
def test_known_models_have_their_size(
    name: str, billions: float, without_embeddings: float | None
) -> None:
    shape = shape_of(f"owner/{name}")
    assert shape.weights / 1e9 == pytest.approx(billions, rel=0.02)
    if without_embeddings:
        own = shape.layers * shape.layer_weights
        assert own / 1e9 == pytest.approx(without_embeddings, rel=0.02)


def test_kv_of_a_token() -> None:
    assert KNOWN["Qwen3-8B"].kv_bytes(1, "bf16") == 144 * 1024
    assert KNOWN["Qwen3-8B"].kv_bytes(1, "bfp8") == 76.5 * 1024
    assert KNOWN["Qwen3-32B"].kv_bytes(1, "fp8") == 128 * 1024


def test_prefill_in_chunks_costs_what_one_piece_does() -> None:
    shape = KNOWN["Qwen3-14B"]
    head = 2 * shape.vocab * shape.hidden  # of each chunk's last token
    chunks = sum(shape.prefill_flops((500, start)) for start in range(0, 3000, 500))
    assert chunks - 5 * head == pytest.approx(shape.prefill_flops((3000, 0)))


def test_a_decoded_token_costs_what_it_costs_in_prefill() -> None:
    shape = KNOWN["Llama-3.1-8B"]
    assert shape.decode_flops(1, 101) == pytest.approx(shape.prefill_flops((1, 100)))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "Expecting"),
        ("[]", "list"),
        ("{}", "architectures"),
        ('{"architectures": []}', "list index"),
        ('{"architectures": ["Qwen3MoeForCausalLM"], "vocab_size": 1}', "num_attention_heads"),
    ],
)
def test_a_bad_config_is_one_line(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ShapeError, match=words):
        shape_of(str(tmp_path))


def test_experts_are_refused_by_name(tmp_path: Path) -> None:
    fields = dict(hidden_size=64, num_attention_heads=4, num_hidden_layers=2)
    config = fields | dict(
        vocab_size=100, intermediate_size=9, architectures=["Qwen3MoeForCausalLM"]
    )
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ShapeError, match=r"Qwen3MoeForCausalLM is none of Qwen3ForCausalLM"):
        model_shape.from_config(tmp_path / "config.json")


def test_an_unknown_name_is_told_the_known_ones() -> None:
    with pytest.raises(ShapeError, match=r"'Qwen3-7B' is no config\.json and none of Qwen3-4B"):
        shape_of("Qwen3-7B")
