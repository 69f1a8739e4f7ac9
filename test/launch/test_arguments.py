"""A server's arguments: read as SGLang reads them, and refused in one line each."""

import contextlib
import json
import subprocess
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

import msgspec
import pytest

from sglang_hma.config import CONFIG_ENV, HmaConfig, WeightFormats
from sglang_hma.launch import arguments, checks
from sglang_hma.launch.flags import Refusal

from .reading import CPU, DECODE, NATIVE, PREFILL, refusal, start


@pytest.fixture(autouse=True)
def installed_ttnn(monkeypatch: pytest.MonkeyPatch) -> None:
    """The vendor's package is there: it has no wheel for every Python."""
    ttnn = ModuleType("ttnn")
    ttnn.__spec__ = ModuleSpec("ttnn", None)
    monkeypatch.setitem(sys.modules, "ttnn", ttnn)


@pytest.fixture
def cards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sglang_hma.prefill.ttnn.card.visible_cards", lambda: [0, 1, 2, 3])


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
        (
            ["--speculative-alg=EAGLE3"],
            ["--speculative-algorithm EAGLE3", "hidden states", "use NGRAM", "use STANDALONE"],
        ),
        (
            ["--speculative-alg=NGRAM", *PREFILL],
            ["--speculative-algorithm NGRAM", "where tokens are generated", "leave it out"],
        ),
        (
            ["--speculative-alg=NGRAM", "--speculative-num-draft-tokens", "12"],
            ["--speculative-num-draft-tokens 12", "use 8 or fewer"],
        ),
        (
            ["--speculative-alg=NGRAM", "--enable-watermark"],
            ["--enable-watermark", "leave one of them out"],
        ),
        (["--pipeline-parallel-size", "2"], ["--pp-size 2", "use --pp-size 1"]),
        (["--attention-data-parallel-size", "2"], ["--attn-dp-size 2"]),
        (["--enable-dp-attention"], ["--enable-dp-attention does"]),
        (["--enable-hierarchical-cache"], ["--enable-hierarchical-cache", "two formats"]),
        (["--enable-hierarchical-cache", *DECODE], ["--disaggregation-mode decode"]),
        (
            ["--hicache-storage-backend", "file", *PREFILL],
            ["--hicache-storage-backend file", "no storage"],
        ),
        (["--enable-lora", "--speculative-algorithm", "NGRAM"], ["NGRAM", "--lora"]),
        (
            ["--lora-paths", "a", "b", "--hma-offload-threshold", "64", *PREFILL],
            ["--lora-paths a b", "--hma-offload-threshold 64"],
        ),
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
        (["--hma-offload-threshold", "9000"], ["'9000'", "neither auto nor 0 to 8192"]),
        (["--hma-offload-threshold", "auto", *PREFILL], ["is auto", "launch_pd"]),
        (
            ["--hma-offload-threshold", "9", *PREFILL, "--hma-kv-format", "native"],
            ["--hma-offload-threshold is 9", "leave one of them out"],
        ),
        (
            ["--hma-decode-cache", "prompt", *DECODE],
            ["--hma-decode-cache is prompt", "add --disaggregation-decode-enable-radix-cache"],
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
        (
            ["--hma-weight-format", "bf16"],
            ["--hma-weight-format", "'bf16'", "attention=", "experts="],
        ),
        (["--hma-weight-format", "tail=bfp8"], ["--hma-weight-format", "'tail=bfp8'"]),
        (["--hma-prefill-peers", "10.0.0.1", *DECODE], ["--hma-prefill-peers", "HOST:PORT"]),
        (["--hma-prefill-peers", "a:1", "::1:5"], ["'::1:5'", "brackets"]),
        (["--hma-prefill-peers", "a b:1"], ["'a b:1'", "host name"]),
        (["--hma-trace", "/no/such/folder/t.json"], ["--hma-trace", "/no/such/folder", "folder"]),
    ],
)
def test_what_is_refused(argv: list[str], words: list[str]) -> None:
    message = refusal(*CPU, *argv)
    assert all(word in message for word in words), message
    with contextlib.suppress(Refusal):
        arguments.assume([*CPU, *argv])
        return
    with pytest.raises(Refusal) as early:
        arguments.assume([*CPU, *argv])
    assert str(early.value) == message or "ambiguous" in message or "invalid" in message


EARLY = """
import sys
from sglang_hma.launch_server import main
try:
    main(sys.argv[1:])
finally:
    assert not {"torch", "sglang"} & sys.modules.keys()
"""


@pytest.mark.parametrize("file", [False, True])
def test_plain_words_are_refused_at_once(file: bool, tmp_path: Path) -> None:
    argv = yaml(tmp_path, enable_mixed_chunk=True) if file else ("--enable-mixed",)
    command = [sys.executable, "-c", EARLY, "--model-path", "m", *argv]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("sglang_hma.launch_server: error: --enable-mixed-chunk does not go with")


def test_what_serves_is_not_refused_early(tmp_path: Path) -> None:
    given = {"enable_mixed_chunk": False, "page_size": 32, "pp_size": 1, "attention_backend": "hma"}
    arguments.assume([*CPU, *DECODE, *yaml(tmp_path, **given)])
    own = ["--disaggregation-decode-retraction-backup", "none", "--kv-cache-dtype=auto"]
    arguments.assume([*CPU, *DECODE, *own, "--disaggregation-transfer-backend", "mooncake"])
    arguments.assume([*CPU, *NATIVE, "--enable-mixed-chunk", "--speculative-algorithm", "NGRAM"])


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"enable_mixed_chunk": True}, ["--enable-mixed-chunk does"]),
        ({"pipeline_parallel_size": 2}, ["--pp-size 2"]),
        ({"speculative_algorithm": "EAGLE"}, ["--speculative-algorithm EAGLE"]),
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
    for name in ("SGLANG_DISAGG_STAGING_BUFFER", "SGLANG_MOONCAKE_SEND_AUX_TCP"):
        monkeypatch.setenv(name, "1")
        assert f"{name} is 1" in refusal(*CPU, *DECODE)
        monkeypatch.delenv(name)
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


def test_prefill_peers_have_one_spelling(tmp_path: Path) -> None:
    given = ["Prefill-0.example:8998", "[FD00:0::1]:8999"]
    found = ("prefill-0.example:8998", "[fd00::1]:8999")
    assert start(*CPU, *DECODE, "--hma-prefill-peers", *given)[0].prefill_peers == found
    config, _ = start(*CPU, *DECODE, *yaml(tmp_path, hma_prefill_peers=given))
    assert config.prefill_peers == found
    assert start(*CPU, *DECODE)[0].prefill_peers is None


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
    groups = ("attention", "mlp", "experts", "head")
    assert [formats.packs(group) for group in groups] == [True, True, True, False]
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


def test_help_shows_both_flag_sets() -> None:
    text = arguments.full_parser().format_help()
    assert "--hma-kv-format" in text and "--disaggregation-mode" in text
