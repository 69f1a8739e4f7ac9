"""A server's arguments: read as SGLang reads them, and refused in one line each."""

import json
import logging
import sys
from collections.abc import Iterator
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

import msgspec
import psutil
import pytest

from sglang_hma.config import CONFIG_ENV, HmaConfig, WeightFormats
from sglang_hma.launch import arguments, checks, defaults
from sglang_hma.launch.flags import Refusal
from sglang_hma.launch.model import check_model

CPU = ("--model-path", "m", "--device", "cpu")
PREFILL = ("--disaggregation-mode", "prefill")
DECODE = ("--disaggregation-mode", "decode")
NATIVE = ("--hma-kv-format", "native")


@pytest.fixture(autouse=True)
def own_logging() -> Iterator[None]:
    """SGLang's prepare_server_args replaces the root logger's handlers."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)


@pytest.fixture(autouse=True)
def installed_ttnn(monkeypatch: pytest.MonkeyPatch) -> None:
    """The vendor's package is there: it has no wheel for every Python."""
    ttnn = ModuleType("ttnn")
    ttnn.__spec__ = ModuleSpec("ttnn", None)
    monkeypatch.setitem(sys.modules, "ttnn", ttnn)


@pytest.fixture
def cards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sglang_hma.prefill.ttnn.card.visible_cards", lambda: [0, 1, 2, 3])


def start(*argv: str) -> tuple[HmaConfig, Any]:
    """The launcher's reading of `argv`, as far as it needs neither a model nor the platform."""
    config = arguments.assume(argv)
    server_args = arguments.parse(config, argv)
    checks.check_arguments(config, server_args)
    return config, server_args


def refusal(*argv: str) -> str:
    with pytest.raises(Refusal) as refused:
        start(*argv)
    message = str(refused.value)
    assert message and "\n" not in message
    return message


def yaml(folder: Path, **flags: object) -> tuple[str, str]:
    """--config and a file with `flags`."""
    path = folder / "flags.yaml"
    # JSON is YAML.
    path.write_text(json.dumps({name.replace("_", "-"): value for name, value in flags.items()}))
    return "--config", str(path)


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--page-size", "16"], ["--page-size 16", "use --page-size 32"]),
        (["--page-size=1"], ["--page-size 1", "32 tokens"]),
        (["--page-s", "64"], ["--page-size 64", "use --page-size 32"]),
        (["--kv-cache-dtype", "fp8_e4m3"], ["--kv-cache-dtype fp8_e4m3", "auto"]),
        (["--attention-backend", "torch_native"], ["use --attention-backend hma"]),
        (["--decode-attention-b", "triton"], ["use --decode-attention-backend hma"]),
        (["--enable-mixed-chunk"], ["--enable-mixed-chunk does", "leave it out"]),
        (["--enable-mixed"], ["--enable-mixed-chunk does", "leave it out"]),
        (["--speculative-algorithm", "EAGLE"], ["--speculative-algorithm EAGLE"]),
        (["--speculative-alg=NGRAM"], ["--speculative-algorithm NGRAM", "leave it out"]),
        (["--pipeline-parallel-size", "2"], ["--pp-size 2", "use --pp-size 1"]),
        (["--attention-data-parallel-size", "2"], ["--attn-dp-size 2"]),
        (["--enable-dp-attention"], ["--enable-dp-attention does"]),
        (["--lora-paths", "a", "b"], ["--lora-paths a b", "rounded weights"]),
        (["--disaggregation-transfer-backend", "nixl"], ["nixl", "mooncake"]),
        (["--chunked-prefill-size", "100"], ["--chunked-prefill-size 100", "multiple of 32"]),
        (["--disaggregation-decode-retraction-backup", "host_pool"], ["host_pool", "cpu_tensor"]),
        (["--enable-hisparse"], ["--enable-hisparse", "leave it out"]),
        (["--disaggregation-enable-kv-checksum"], ["--hma-kv-checksum"]),
        (["--dtype", "float16"], ["float16", "bfloat16"]),
        (["--device", "xpu"], ["--device", "xpu"]),
        (["--disaggregation-mode", "both"], ["--disaggregation-mode", "both"]),
        (["--hma-kv-format", "native", "--hma-weight-format", "bfp8"], ["--hma-weight-format"]),
        ([*PREFILL, *NATIVE, "--page-size", "1"], ["--page-size 1", "--hma-layers-per-send all"]),
        (["--hma-nothing", "1"], ["unrecognized", "--hma-nothing"]),
        (["--pagesize", "1"], ["unrecognized", "--pagesize"]),
        (["--enable"], ["ambiguous", "--enable"]),
        (["--page-size", "many"], ["--page-size", "many"]),
        (
            ["--hma-layers-per-send", "0"],
            ["--hma-layers-per-send", "'0'", "auto, all nor a number"],
        ),
        (["--hma-kv-checksum", "maybe"], ["--hma-kv-checksum", "maybe", "on"]),
        (["--hma-prefill-runtime", "ttnn"], ["--hma-prefill-runtime", "mode prefill"]),
        (
            ["--hma-prefill-runtime", "ttnn", *PREFILL, *NATIVE],
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
def test_what_is_refused(argv: list[str], words: list[str]) -> None:
    message = refusal(*CPU, *argv)
    assert all(word in message for word in words), message


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"enable_mixed_chunk": True}, ["--enable-mixed-chunk does"]),
        ({"pipeline_parallel_size": 2}, ["--pp-size 2"]),
        ({"speculative_algorithm": "NGRAM"}, ["--speculative-algorithm NGRAM"]),
        ({"disaggregation_mode": "both"}, ["--disaggregation-mode", "both"]),
        ({"hma_kv_checksum": "maybe"}, ["--hma-kv-checksum", "maybe"]),
        ({"page_sizes": 3}, ["unrecognized", "--page-sizes"]),
        ({"lora_paths": ["a"]}, ["--config", "lora_paths"]),
    ],
)
def test_what_is_refused_in_a_file(
    flags: dict[str, object], words: list[str], tmp_path: Path
) -> None:
    message = refusal(*CPU, *yaml(tmp_path, **flags))
    assert all(word in message for word in words), message


def test_what_is_refused_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SGLANG_DISAGG_STAGING_BUFFER", "1")
    assert "SGLANG_DISAGG_STAGING_BUFFER is 1" in refusal(*CPU, *DECODE)
    start(*CPU)


def test_a_file_gives_what_the_command_line_does_not(tmp_path: Path) -> None:
    given = {
        "model_path": "m",
        "device": "cpu",
        "disaggregation_mode": "decode",
        "hma_kv_checksum": False,  # as YAML reads `off`
        "hma_layers_per_send": 2,
        "max_total_tokens": 4096,
        "enable_metrics": True,
        "skip_server_warmup": False,
    }
    config, server_args = start(*yaml(tmp_path, **given), "--max-total-t", "8192")
    assert (config.role, config.kv_checksum, config.layers_per_send) == ("decode", False, 2)
    assert server_args.disaggregation_mode == "decode" and server_args.model_path == "m"
    assert server_args.max_total_tokens == 8192
    assert server_args.enable_metrics and not server_args.skip_server_warmup
    assert server_args.page_size == 32 and server_args.attention_backend == "hma"


def test_the_command_line_wins_over_the_file_wherever_it_stands(tmp_path: Path) -> None:
    file = yaml(tmp_path, disaggregation_mode="decode", hma_kv_format="native")
    for argv in ([*CPU, *file, *PREFILL], [*CPU, *PREFILL, *file]):
        config, server_args = start(*argv)
        assert config.role == server_args.disaggregation_mode == "prefill"
        assert config.kv_format == "native"


def test_the_two_readings_must_agree() -> None:
    argv = [*CPU, *PREFILL]
    config = msgspec.structs.replace(arguments.assume(argv), role="decode")
    with pytest.raises(Refusal, match="--disaggregation-mode is prefill for SGLang"):
        arguments.parse(config, argv)


@pytest.mark.usefixtures("cards")
def test_a_card_is_taken_where_there_is_one() -> None:
    argv = ["--model-path", "m", *PREFILL, "--hma-device-ids", "1"]
    config, server_args = start(*argv)
    assert (config.prefill_runtime, config.device_ids, config.chips) == ("ttnn", (1,), 1)
    assert server_args.device == "cpu"
    for others in (["--dev", "cpu"], ["--hma-prefill-runtime", "reference"]):
        assert arguments.assume([*PREFILL, *others]).prefill_runtime == "reference"
    assert arguments.assume(DECODE).prefill_runtime == "reference"
    assert "--tp-size 2 does not go with --hma-prefill-runtime ttnn" in refusal(*argv, "--tp=2")


@pytest.mark.parametrize(
    ("argv", "ids", "chips"),
    [
        (["--hma-device-ids", "3,1"], (3, 1), 2),
        (["--hma-mesh", "1x2"], (0,), 2),
        (["--hma-device-ids", "2,3", "--hma-mesh", "1x4"], (2, 3), 4),
    ],
)
@pytest.mark.usefixtures("cards")
def test_chips_of_several_cards(argv: list[str], ids: tuple[int, ...], chips: int) -> None:
    config = arguments.assume([*PREFILL, *argv])
    assert (config.prefill_runtime, config.device_ids, config.chips) == ("ttnn", ids, chips)
    sent = config.environment()[CONFIG_ENV]
    assert msgspec.json.decode(sent, type=HmaConfig) == config


@pytest.mark.parametrize(
    "argv",
    [["--hma-device-ids", "0,1,2"], ["--hma-device-ids", "0,1,2,3", "--hma-mesh", "1x2"]],
)
@pytest.mark.usefixtures("cards")
def test_impossible_meshes(argv: list[str]) -> None:
    message = refusal(*CPU, *PREFILL, "--hma-prefill-runtime", "ttnn", *argv)
    assert "1, 2 or 4 cards form a mesh" in message


def test_weight_formats_by_group() -> None:
    formats = arguments.assume([*CPU, "--hma-weight-format", "head=native"]).weight_formats
    assert formats == WeightFormats(head="native")
    assert [formats.packs(group) for group in ("attention", "mlp", "head")] == [True, True, False]
    assert arguments.assume(CPU).weight_formats == WeightFormats()
    native = arguments.assume([*CPU, "--hma-weight-format=native"])
    assert not native.rounds_prefill_weights and str(native.weight_formats) == "native"


@pytest.mark.parametrize(
    ("argv", "value", "early"),
    [([], "auto", True), (["--hma-layers-per-send=all"], "all", False),
     (["--hma-layers-per-send", "3"], 3, True)],
)  # fmt: skip
def test_layers_per_send(argv: list[str], value: int | str, early: bool) -> None:
    config = arguments.assume([*CPU, *PREFILL, *argv])
    assert config.layers_per_send == value and config.sends_early is early
    sent = config.environment()[CONFIG_ENV]
    assert msgspec.json.decode(sent, type=HmaConfig) == config


@pytest.mark.parametrize("mode", ["prefill", "decode", "null"])
def test_defaults_for_each_role(mode: str) -> None:
    config, server_args = start(*CPU, "--disaggregation-mode", mode)
    assert config.role == mode and config.packs_kv
    assert server_args.page_size == 32 and server_args.attention_backend == "hma"
    transport = "mooncake" if mode == "null" else "mooncake_tcp"  # SGLang's own, or ours
    assert server_args.disaggregation_transfer_backend == transport
    backup = "cpu_tensor" if mode == "decode" else None
    assert server_args.disaggregation_decode_retraction_backup == backup


def test_defaults_give_way_however_a_flag_is_written(tmp_path: Path) -> None:
    forms = (
        ["--page-size", "64", "--attention-backend", "triton"],
        ["--page-si=64", "--attention-backe", "triton"],
        yaml(tmp_path, page_size=64, attention_backend="triton"),
    )
    for form in forms:
        for role in (PREFILL, DECODE, ("--disaggregation-mode", "null")):
            config, server_args = start(*CPU, *NATIVE, *role, *form)
            assert not config.weight_formats.packs_any
            assert (server_args.page_size, server_args.attention_backend) == (64, "triton")


def test_native_keeps_sglangs_own_where_it_can() -> None:
    config, server_args = start(*CPU, *NATIVE, "--page-size", "16")
    assert not config.packs_kv and server_args.attention_backend == "torch_native"
    assert server_args.page_size == 16


def test_every_rule_names_an_argument_that_a_user_can_give() -> None:
    from sglang.srt.server_args import ServerArgs

    options = arguments.full_parser()._option_string_actions
    fields = {field.name for field in msgspec.structs.fields(ServerArgs)}
    for table in (checks.WITH_BFP8, checks.ON_CARDS, checks.EARLY_WITHOUT_BFP8):
        for rule in table:
            assert rule.field in fields
            assert options[rule.flag].dest == rule.field


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


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"head_dim": 80}, ["head_dim 80", "multiple of 32"]),
        (MLA, ["MLA", "MHA/GQA"]),
        (SSM, ["state-space", "MHA/GQA"]),
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


def test_help_shows_both_flag_sets() -> None:
    text = arguments.full_parser().format_help()
    assert "--hma-kv-format" in text and "--disaggregation-mode" in text
