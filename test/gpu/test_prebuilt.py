"""Kernels compiled in advance are taken before nvcc is asked, never where sources have changed."""

import logging
import re
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from hma_kernels.cuda import build, cubins, decode, prebuilt
from hma_kernels.cuda.build import Instance
from hma_kernels.cuda.decode import first_that_works, instance_for, stages_on
from hma_kernels.cuda.library import DecodeLibrary

INSTANCE = instance_for(64, 64, 3, torch.bfloat16, stages=2)
CARD = torch.device("cuda", 0)
ON_GPU = torch.cuda.is_available()
NEEDS_NVCC = pytest.mark.skipif(
    build.find_nvcc() is None, reason="no nvcc in CUDA_HOME, PATH or wheels"
)

# Head dim and query heads of a KV head in the models' published configurations.
MODELS = {
    "Qwen3 0.6B, 1.7B": (128, 2),
    "Qwen3 4B, 8B": (128, 4),
    "Qwen3 14B": (128, 5),
    "Qwen3 32B, 30B-A3B": (128, 8),
    "Qwen3 235B-A22B": (128, 16),
    "Qwen2.5 0.5B": (64, 7),
    "Qwen2.5 1.5B": (128, 6),
    "Qwen2.5 7B": (128, 7),
    "Llama 3.1 8B": (128, 4),
    "Llama 3.1 70B": (128, 8),
    "Llama 3.2 1B": (64, 4),
    "Llama 3.2 3B": (128, 3),
    "SmolLM2 135M, 360M": (64, 3),
    "SmolLM2 1.7B": (64, 1),
    "Mistral 7B": (128, 4),
    "Phi-3 mini": (96, 1),
    "Gemma 2 9B": (256, 2),
    "gpt-oss 20B": (64, 8),
}


@pytest.fixture
def sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the kernel's sources that a test may change; no libraries and no cache yet."""
    copy = tmp_path / "cuda"
    shutil.copytree(build.SOURCES, copy, ignore=shutil.ignore_patterns("prebuilt", "__pycache__"))
    monkeypatch.setattr(build, "SOURCES", copy)
    monkeypatch.setattr(prebuilt, "SOURCES", copy)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    prebuilt.folder().mkdir()
    return copy


@pytest.fixture
def no_nvcc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(variable, raising=False)
    nowhere = SimpleNamespace(get_path=lambda _: str(tmp_path / "nothing"))
    monkeypatch.setattr(build, "sysconfig", nowhere)


def pretend(instance: Instance, *architectures: int) -> None:
    for architecture in architectures:
        prebuilt.path_of(instance, architecture).touch()


@pytest.mark.parametrize("model", MODELS)
def test_models_find_their_instance_on_every_architecture(model: str) -> None:
    head_dim, gqa_group_size = MODELS[model]
    wanted = cubins.wanted().values()
    for architecture in (80, 86, 89, 90, 100, 120):
        stages = stages_on(architecture // 10)
        for dtype in (torch.bfloat16, torch.float16)[: 2 if head_dim in (64, 128) else 1]:
            instance = instance_for(head_dim, head_dim, gqa_group_size, dtype, stages=stages)
            assert (instance, architecture) in wanted


@pytest.mark.parametrize(
    ("capability", "architecture"),
    [
        *(((8, 0), 80), ((8, 6), 86), ((8, 7), 86), ((8, 9), 89)),
        *(((9, 0), 90), ((10, 3), 100), ((12, 0), 120), ((12, 1), 120)),
    ],
)
def test_a_gpu_gets_code_of_its_own_or_a_lower_minor_version(
    sources: Path, capability: tuple[int, int], architecture: int
) -> None:
    pretend(INSTANCE, *prebuilt.ARCHITECTURES)
    assert prebuilt.find(INSTANCE, *capability) == prebuilt.path_of(INSTANCE, architecture)


def test_code_of_a_higher_minor_or_another_major_version_is_not_taken(sources: Path) -> None:
    pretend(INSTANCE, 86, 100)
    for capability in ((8, 0), (9, 0), (11, 0), (12, 0)):
        with pytest.raises(
            RuntimeError, match=r"prebuilt for compute capability {}\.{}".format(*capability)
        ):
            prebuilt.find(INSTANCE, *capability)


def test_any_changed_source_flag_or_macro_makes_it_stale(
    sources: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend(INSTANCE, 90)
    files = [path for path in sources.rglob("*") if path.suffix in (".cu", ".cuh", ".h")]
    assert len(files) > 5
    for path in files:
        before = path.read_bytes()
        path.write_bytes(before + b"\n")
        with pytest.raises(RuntimeError, match="is of other sources"):
            prebuilt.find(INSTANCE, 9, 0)
        path.write_bytes(before)
    assert prebuilt.find(INSTANCE, 9, 0).exists()
    monkeypatch.setattr(build, "FLAGS", (*build.FLAGS, "-g"))
    with pytest.raises(RuntimeError, match="is of other sources"):
        prebuilt.find(INSTANCE, 9, 0)


def test_a_wheel_carries_no_stale_library(sources: Path) -> None:
    assert "no prebuilt CUDA kernels: make cubins" in cubins.state()
    kept, *others = cubins.wanted()
    for path in (kept, prebuilt.folder() / "decode_of_other_sources_sm90_0123456789abcdef.so"):
        path.write_bytes(b"0" * 1_000_000)
    expected = f"1 of {1 + len(others)} prebuilt CUDA kernels, 1 MB; 1 of other sources deleted"
    assert cubins.state() == expected
    assert list(prebuilt.folder().iterdir()) == [kept]


def refusing(*origins: str) -> Callable[[Path], DecodeLibrary]:
    """A check of libraries that those of some folders do not pass."""

    def works(path: Path) -> DecodeLibrary:
        if path.parent.name in origins:
            raise OSError("cannot be read")
        return path  # type: ignore[return-value]

    return works


@pytest.mark.parametrize("order", ["prebuilt", "nvcc", "Triton"])
def test_the_order_and_its_reasons_are_in_one_line(
    sources: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    order: str,
) -> None:
    caplog.set_level(logging.INFO)
    pretend(INSTANCE, 90)
    cache = build.cache_folder() / "a.so"
    monkeypatch.setattr(decode, "build", lambda *_: cache)
    refused = {"prebuilt": [], "nvcc": ["prebuilt"], "Triton": ["prebuilt", "hma_kernels"]}[order]
    found = first_that_works(INSTANCE, 9, 0, CARD, refusing(*refused))
    (line,) = (record.getMessage() for record in caplog.records)
    path = prebuilt.path_of(INSTANCE, 90)
    expected = {
        "prebuilt": (path, f"in CUDA C++ on cuda:0: {path.name}, prebuilt"),
        "nvcc": (cache, "in CUDA C++ on cuda:0: a.so, compiled here; not prebuilt: cannot be read"),
        "Triton": (
            None,
            "in Triton, not CUDA C++, on cuda:0: "
            "not prebuilt: cannot be read; not compiled here: cannot be read",
        ),
    }[order]
    assert (found, line) == (expected[0], f"Decode attention {expected[1]}")


def test_without_either_triton_decodes_and_the_line_says_why(
    sources: Path, no_nvcc: None, caplog: pytest.LogCaptureFixture
) -> None:
    assert first_that_works(INSTANCE, 9, 0, CARD, refusing()) is None
    (line,) = caplog.messages
    assert re.search(
        r"not prebuilt: no decode_\S+ is prebuilt for .* 9\.0; not compiled.*no nvcc", line
    )


def test_an_unwritable_cache_stops_nothing_that_is_prebuilt(
    sources: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    (tmp_path / "cache").write_text("a file where the folder would be")
    pretend(INSTANCE, 90)
    path = prebuilt.path_of(INSTANCE, 90)
    assert first_that_works(INSTANCE, 9, 0, CARD, refusing()) == path
    assert caplog.messages == [f"Decode attention in CUDA C++ on cuda:0: {path.name}, prebuilt"]


def architectures_of(library: Path) -> set[int]:
    """Of the ELF images in the fat binaries that nvcc has put into a host library."""
    data = library.read_bytes()
    found, at = set(), -1
    while (at := data.find(struct.pack("<I", 0xBA55ED50), at + 1)) >= 0:
        header, size = struct.unpack_from("<HQ", data, at + 6)
        entry = at + header
        while entry < at + header + size:
            kind, _, entry_header, entry_size = struct.unpack_from("<HHIQ", data, entry)
            assert kind == 2, "an entry that is no machine code"
            found.add(struct.unpack_from("<I", data, entry + 28)[0])
            entry += entry_header + entry_size
    return found


@NEEDS_NVCC
def test_one_that_make_cubins_compiles_loads_where_nvcc_is_not(
    sources: Path, request: pytest.FixtureRequest, caplog: pytest.LogCaptureFixture
) -> None:
    """Up to the point where a card is missing; with one, up to the probe's answer."""
    caplog.set_level(logging.INFO)
    capability = torch.cuda.get_device_capability() if ON_GPU else (9, 0)
    architecture = 10 * capability[0] + capability[1]
    instance = instance_for(64, 64, 3, torch.bfloat16, stages=stages_on(capability[0]))
    path, nvcc = prebuilt.path_of(instance, architecture), build.find_nvcc()
    assert nvcc is not None
    build.compile_into(path, nvcc, instance, architecture)
    assert [path] == list(prebuilt.folder().iterdir())
    assert architectures_of(path) == {architecture}
    request.getfixturevalue("no_nvcc")
    assert build.find_nvcc() is None
    if ON_GPU:
        decode._library.cache_clear()
        found = decode._library(torch.device("cuda", 0), 64, 64, 3, torch.bfloat16, True)
        assert found is not None and found.blocks() > 0
    else:
        found = first_that_works(instance, *capability, CARD, DecodeLibrary)
        assert found is not None
        with pytest.raises(RuntimeError, match="CUDA"):
            found.blocks()
    assert f"{path.name}, prebuilt" in caplog.text
    assert not build.cache_folder().exists()
