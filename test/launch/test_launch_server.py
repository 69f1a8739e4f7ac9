"""One-line refusals at start, and what the launcher hands to SGLang."""

import json
from pathlib import Path

import msgspec
import pytest

from sglang_hma.config import CONFIG_ENV, HmaConfig, WeightFormats
from sglang_hma.launch.checks import flag_value
from sglang_hma.launch_server import parse

from ..warm_python import WarmPython

PREFILL = ("--disaggregation-mode", "prefill")


def refusal(argv: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as stop:
        parse(["--model-path", "m", "--device", "cpu", *argv])
    assert stop.value.code == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    return lines[0]


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--page-size", "16"], ["--page-size 16", "use --page-size 32"]),
        (["--page-size=1"], ["--page-size 1", "32 tokens"]),
        (["--kv-cache-dtype", "fp8_e4m3"], ["--kv-cache-dtype fp8_e4m3", "auto"]),
        (["--attention-backend", "torch_native"], ["use --attention-backend hma"]),
        (["--enable-mixed-chunk"], ["--enable-mixed-chunk", "leave it out"]),
        (["--speculative-algorithm", "EAGLE"], ["--speculative-algorithm EAGLE"]),
        (["--disaggregation-transfer-backend", "nixl"], ["nixl", "mooncake"]),
        (["--chunked-prefill-size", "100"], ["--chunked-prefill-size", "100", "multiple of 32"]),
        (["--disaggregation-decode-retraction-backup", "host_pool"], ["host_pool", "cpu_tensor"]),
        (["--enable-hisparse"], ["--enable-hisparse", "leave it out"]),
        (["--dtype", "float16"], ["float16", "bfloat16"]),
        (["--device", "xpu"], ["--device", "xpu"]),
        (["--disaggregation-mode", "both"], ["--disaggregation-mode", "both"]),
        (["--hma-kv-format", "native", "--hma-weight-format", "bfp8"], ["--hma-weight-format"]),
        (["--hma-nothing", "1"], ["--hma-nothing"]),
        (
            ["--hma-layers-per-send", "0"],
            ["--hma-layers-per-send", "'0'", "auto, all nor a number"],
        ),
        (["--hma-kv-checksum", "maybe"], ["--hma-kv-checksum", "maybe", "on"]),
        (["--hma-prefill-runtime", "ttnn"], ["--hma-prefill-runtime", "mode prefill"]),
        (
            ["--hma-prefill-runtime", "ttnn", *PREFILL, "--hma-kv-format", "native"],
            ["--hma-prefill-runtime is ttnn", "--hma-kv-format bfp8"],
        ),
        (["--hma-prefill-runtime", "ttnn", *PREFILL], ["no Tenstorrent card", "tt-kmd"]),
        (["--hma-device-ids", "1", *PREFILL], ["--hma-device-ids is given", "ttnn"]),
        (["--hma-mesh", "1x2", *PREFILL], ["--hma-mesh is given", "ttnn"]),
        (["--hma-device-ids", "0,x", *PREFILL], ["--hma-device-ids", "'0,x'", "no card number"]),
        (["--hma-device-ids", "1,1", *PREFILL], ["--hma-device-ids", "names a card twice"]),
        (["--hma-mesh", "2x2"], ["--hma-mesh", "'2x2'", "1x1, 1x2, 1x4"]),
        (["--hma-weight-format", "bf16"], ["--hma-weight-format", "'bf16'", "attention="]),
        (["--hma-weight-format", "tail=bfp8"], ["--hma-weight-format", "'tail=bfp8'"]),
        (["--hma-trace", "/no/such/folder/t.json"], ["--hma-trace", "/no/such/folder", "folder"]),
    ],
)
def test_contradicting_flags(
    argv: list[str], words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    message = refusal(argv, capsys)
    assert all(word in message for word in words), message


def test_a_card_is_taken_where_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sglang_hma.prefill.ttnn.card.visible_cards", lambda: [0, 1])
    config, rest = parse([*PREFILL, "--hma-device-ids", "1"])
    assert (config.prefill_runtime, config.device_ids, config.chips) == ("ttnn", (1,), 1)
    assert flag_value(rest, "--device") == "cpu"
    for others in (["--device", "cpu"], ["--hma-prefill-runtime", "reference"]):
        assert parse([*PREFILL, *others])[0].prefill_runtime == "reference"
    assert parse(["--disaggregation-mode", "decode"])[0].prefill_runtime == "reference"


@pytest.mark.parametrize(
    ("argv", "ids", "chips"),
    [
        (["--hma-device-ids", "3,1"], (3, 1), 2),
        (["--hma-mesh", "1x2"], (0,), 2),
        (["--hma-device-ids", "2,3", "--hma-mesh", "1x4"], (2, 3), 4),
    ],
)
def test_chips_of_several_cards(
    monkeypatch: pytest.MonkeyPatch, argv: list[str], ids: tuple[int, ...], chips: int
) -> None:
    monkeypatch.setattr("sglang_hma.prefill.ttnn.card.visible_cards", lambda: [0, 1, 2, 3])
    config, _ = parse([*PREFILL, *argv])
    assert (config.prefill_runtime, config.device_ids, config.chips) == ("ttnn", ids, chips)
    sent = config.environment()[CONFIG_ENV]
    assert msgspec.json.decode(sent, type=HmaConfig) == config


@pytest.mark.parametrize(
    "argv",
    [["--hma-device-ids", "0,1,2"], ["--hma-device-ids", "0,1,2,3", "--hma-mesh", "1x2"]],
)
def test_impossible_meshes(
    monkeypatch: pytest.MonkeyPatch, argv: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sglang_hma.prefill.ttnn.card.visible_cards", lambda: [0, 1, 2, 3])
    argv = [*PREFILL, "--hma-prefill-runtime", "ttnn", *argv]
    assert "1, 2 or 4 cards form a mesh" in refusal(argv, capsys)


def test_weight_formats_by_group() -> None:
    device = ["--device", "cpu"]
    formats = parse([*device, "--hma-weight-format", "head=native"])[0].weight_formats
    assert formats == WeightFormats(head="native")
    assert [formats.packs(group) for group in ("attention", "mlp", "head")] == [True, True, False]
    assert parse(device)[0].weight_formats == WeightFormats()
    native = parse([*device, "--hma-weight-format=native"])[0]
    assert not native.rounds_prefill_weights and str(native.weight_formats) == "native"


def test_a_card_serves_one_rank(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sglang_hma.prefill.ttnn.card.visible_cards", lambda: [0])
    with pytest.raises(SystemExit):
        parse([*PREFILL, "--tp-size", "2"])
    assert "--tp-size is 2" in capsys.readouterr().err


def test_native_leaves_sglangs_defaults() -> None:
    config, rest = parse(["--device", "cpu", "--hma-kv-format", "native", "--page-size", "16"])
    assert not config.weight_formats.packs_any
    assert flag_value(rest, "--page-size") == "16"
    assert flag_value(rest, "--attention-backend") == "torch_native"


@pytest.mark.parametrize(
    ("argv", "value", "early"),
    [([], "auto", True), (["--hma-layers-per-send=all"], "all", False),
     (["--hma-layers-per-send", "3"], 3, True)],
)  # fmt: skip
def test_layers_per_send(argv: list[str], value: int | str, early: bool) -> None:
    role = ["--device", "cpu", "--disaggregation-mode", "prefill"]
    config, _ = parse([*role, *argv])
    assert config.layers_per_send == value and config.sends_early is early
    sent = config.environment()[CONFIG_ENV]
    assert msgspec.json.decode(sent, type=HmaConfig) == config


@pytest.mark.parametrize("mode", ["prefill", "decode", "null"])
def test_defaults_for_each_role(mode: str) -> None:
    config, rest = parse(["--device", "cpu", "--disaggregation-mode", mode])
    assert config.role == mode and config.packs_kv
    assert flag_value(rest, "--page-size") == "32"
    transport = flag_value(rest, "--disaggregation-transfer-backend")
    assert transport == (None if mode == "null" else "mooncake_tcp")


def config_of(**changes: object) -> dict[str, object]:
    base: dict[str, object] = {
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
    return base | changes


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


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"head_dim": 80}, ["head_dim 80", "multiple of 32"]),
        (MLA, ["MLA", "MHA/GQA"]),
        (SSM, ["state-space", "MHA/GQA"]),
    ],
)
def test_models_that_cannot_be_served(
    python: WarmPython, changes: dict[str, object], words: list[str], tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config_of(**changes)))
    done = python("-m", "sglang_hma.launch_server", "--model-path", str(tmp_path))
    assert done.returncode != 0
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("sglang_hma.launch_server: error:"), done.stderr[-2000:]
    assert all(word in last for word in words), last


def test_help_shows_both_flag_sets(python: WarmPython) -> None:
    done = python("-m", "sglang_hma.launch_server", "--help")
    assert done.returncode == 0
    assert "--hma-kv-format" in done.stdout and "--disaggregation-mode" in done.stdout
