"""The cost model of the Tenstorrent runtime (benchmark/tenstorrent): a whole model's counts against
closed forms, shapes against the stand-in for ttnn."""

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import Qwen3Config

from benchmark.tenstorrent import cost
from benchmark.tenstorrent.counts import count
from benchmark.tenstorrent.driven import Bucket, Recording, config_of, record, served
from benchmark.tenstorrent.module import recording
from benchmark.tenstorrent.operations import OPERATIONS
from benchmark.tenstorrent.recorder import Recorder
from sglang_hma.prefill.ttnn.card import opened
from sglang_hma.prefill.ttnn.chunk import pages_of
from sglang_hma.prefill.ttnn.offline import split

from .models import on_card, random_model

BFP8 = 1088  # bytes of a tile of 32 x 32
HIDDEN, INNER, HEADS, KV, DIM, VOCAB, LAYERS = 256, 512, 4, 2, 64, 512, 2


def small_config() -> Qwen3Config:
    return Qwen3Config(
        num_hidden_layers=LAYERS,
        hidden_size=HIDDEN,
        intermediate_size=INNER,
        num_attention_heads=HEADS,
        num_key_value_heads=KV,
        head_dim=DIM,
        vocab_size=VOCAB,
        tie_word_embeddings=False,
        architectures=["Qwen3ForCausalLM"],
    )


def linear_flops(rows: int, last_rows: int) -> int:
    attention = HIDDEN * (HEADS + 2 * KV) * DIM + HEADS * DIM * HIDDEN
    layer = attention + 3 * HIDDEN * INNER
    return 2 * (LAYERS * layer * rows + HIDDEN * VOCAB * last_rows)


def weight_bytes() -> int:
    values = linear_flops(1, 1) // 2
    return values // 1024 * BFP8


@pytest.fixture(scope="module")
def recorded() -> list[Recording]:
    return record(small_config(), [Bucket(100), Bucket(256), Bucket(128, 1, 256)])


def test_a_models_products_are_two_operations_a_weight_and_row(recorded: list[Recording]) -> None:
    for each, rows in zip(recorded, (128, 256, 128), strict=True):
        found = count(each)
        assert found.flops == {"HiFi2": linear_flops(rows, 32)}
        assert found.weight_bytes == weight_bytes() and found.weights_streamed == 1
        # In chunks of 128 queries, over whole chunks of keys.
        start = each.bucket.prefix
        keys = sum(start + end for end in range(128, rows + 1, 128))
        assert found.attention_flops == {"HiFi3": LAYERS * 4 * HEADS * DIM * 128 * keys}


def test_k_and_v_of_every_layer_go_to_the_host(recorded: list[Recording]) -> None:
    for each, rows in zip(recorded, (128, 256, 128), strict=True):
        copies = [call for call in each.calls if call.queue and call.down]
        assert sum(call.down for call in copies) == LAYERS * 2 * KV * rows // 32 * DIM // 32 * BFP8


def test_an_extra_call_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    from sglang_hma.prefill.ttnn.server import CardCausalLM

    forward = CardCausalLM.forward

    def more(self: Any, *args: Any) -> Any:
        importlib.import_module("ttnn").record_event(self.card.device, 0)
        return forward(self, *args)

    (plain,) = record(small_config(), [Bucket(100)])
    monkeypatch.setattr(CardCausalLM, "forward", more)
    (planted,) = record(small_config(), [Bucket(100)])
    found = [count(each) for each in (plain, planted)]
    assert found[1].host_calls == found[0].host_calls + 1
    assert found[1].of_forward == found[0].of_forward + 1
    assert found[1].operations == found[0].operations


def test_a_server_does_not_outlive_its_recording() -> None:
    with served(small_config()) as server:
        server.record(Bucket(64))
        stood_in, thread = sys.modules["ttnn"], server.model.runner.readback.thread
    assert sys.modules.get("ttnn") is not stood_in and not thread.is_alive()


def captured(module: Any, seen: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """The stand-in's operations, each noting what it gave back."""

    def noting(name: str, operation: Any) -> Any:
        def run(*args: Any, **options: Any) -> Any:
            out = operation(*args, **options)
            outs = out if isinstance(out, tuple) else () if out is None else (out,)
            seen.append((name, [(tuple(each.shape), each.dtype, each.layout) for each in outs]))
            return out

        return run

    for name in OPERATIONS:
        place = module
        *parents, last = name.split(".")
        for parent in parents:
            place = getattr(place, parent, None)
        if hasattr(place, last):
            monkeypatch.setattr(place, last, noting(name, getattr(place, last)))


def of_recorder(recorder: Recorder) -> list[Any]:
    layouts = {"TILE": "tile", "ROW_MAJOR": "row major"}
    return [
        (call.name, [(each.shape, each.dtype, layouts[each.layout]) for each in call.results])
        for call in recorder.take()
        if call.name in OPERATIONS
    ]


@pytest.mark.parametrize("chips", [1, 2])
@pytest.mark.parametrize("kind", ["qwen3", "llama, biases", "qwen2"])
def test_shapes_are_the_stand_ins(
    stand_in: None,
    rng: np.random.Generator,
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
    chips: int,
) -> None:
    hf = random_model(kind)
    length = int(rng.integers(40, 300))
    cut = int(rng.integers(1, length)) // 32 * 32
    cuts, pages = [cut] if cut else [], np.arange(1, 1 + pages_of(length))
    chunks = split(np.zeros(length, np.int64), cuts, pages)
    seen: list[Any] = []
    with opened(range(chips), chips) as card:
        runtime = on_card(card, hf)
        with monkeypatch.context() as patch:
            captured(importlib.import_module("ttnn"), seen, patch)
            for chunk in chunks:
                runtime.prefill([chunk], last=True)
    with recording() as recorder, opened(range(chips), chips) as card:
        runtime = on_card(card, hf)
        recorder.take()
        for chunk in chunks:
            runtime.prefill([chunk], last=True)
        found = of_recorder(recorder)
    assert seen and found == seen


def test_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    small_config().save_pretrained(tmp_path / "tiny")
    file = tmp_path / "before.json"
    said = ["cost", "--model", str(tmp_path / "tiny"), "--chunks", "96", "--batches", "2"]
    monkeypatch.setattr(sys, "argv", [*said, "--before", str(file), "--json", str(file)])
    cost.main()
    rows = json.loads(file.read_text())["rows"]
    assert [cost.from_json(row).bucket for row in rows] == [Bucket(96), Bucket(100, 2)]
    assert set(rows[0]["cards"]) == {"n150", "n300", "p100", "p150"}
    monkeypatch.setattr(sys, "argv", [*said, "--before", str(file), "--check"])
    capsys.readouterr()
    with pytest.raises(SystemExit, match="1"):
        cost.main()  # nothing was saved since a moment ago
    shown = capsys.readouterr().out
    assert "Before" in shown and "FALLS SHORT: tiny, 96: bytes outside matmuls" in shown


def test_the_four_models_have_the_planners_sizes() -> None:
    config = config_of("Qwen3-8B")
    assert (config.hidden_size, config.num_hidden_layers, config.vocab_size) == (4096, 36, 151936)
    with pytest.raises(SystemExit, match="--model nonsense: none of Qwen3-4B"):
        config_of("nonsense")
