import json
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from sglang_hma import demo_model
from sglang_hma.demo import random_model
from sglang_hma.demo.folder import DemoModelError
from sglang_hma.demo.random_model import Family, make_random_model

from .chat import answer

SMALL = dict(layers=2, hidden=128, heads=4, kv_heads=2, head_dim=32, intermediate=128, vocab=512)


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def small(path: Path, **changes) -> Path:
    return make_random_model(path, **{**SMALL, **changes})


def weights(path: Path) -> bytes:
    return (path / "model.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("family", "tie_embeddings"),
    [("qwen3", False), ("qwen3", True), ("qwen2", False), ("llama", True)],
)
def test_transformers_loads_it_and_greedy_text_varies(
    tmp_path: Path, family: Family, tie_embeddings: bool
) -> None:
    path = small(tmp_path / "model", family=family, tie_embeddings=tie_embeddings)
    config = json.loads((path / "config.json").read_text())
    assert config["model_type"] == family
    assert config["head_dim"] == SMALL["head_dim"]

    generated = answer(path, "Where do pages go?", max_new_tokens=32, min_new_tokens=32)
    assert len(set(generated)) > 8
    assert all(0 <= token < SMALL["vocab"] for token in generated)


def test_tokenizer_keeps_any_text_and_marks_turns(tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(small(tmp_path / "model"))
    text = "  def f(x):\n\treturn 'naïve 日本 🙂'  "
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert len(tokenizer) == SMALL["vocab"]
    turn = tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False)
    assert turn == "<|im_start|>user\nhi<|im_end|>\n"
    assert tokenizer.encode(turn)[0] == tokenizer.convert_tokens_to_ids("<|im_start|>")


def test_same_arguments_give_the_same_bytes(tmp_path: Path) -> None:
    first, second = small(tmp_path / "a"), small(tmp_path / "b")
    assert sorted(p.name for p in first.iterdir()) == sorted(p.name for p in second.iterdir())
    for file in first.iterdir():
        assert file.read_bytes() == (second / file.name).read_bytes(), file.name
    assert weights(small(tmp_path / "c", seed=1)) != weights(first)


def test_a_demo_model_is_kept_or_replaced_by_a_whole_one(tmp_path: Path, monkeypatch) -> None:
    path = small(tmp_path / "model")
    before = (path / "config.json").stat().st_mtime_ns
    small(path)
    assert (path / "config.json").stat().st_mtime_ns == before

    def fail(*_) -> None:
        raise OSError("No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(random_model, "_train_tokenizer", fail)
        with pytest.raises(OSError):
            small(path, layers=1)
    assert json.loads((path / "config.json").read_text())["num_hidden_layers"] == 2
    assert list(tmp_path.iterdir()) == [path]

    small(path, layers=1)
    assert json.loads((path / "config.json").read_text())["num_hidden_layers"] == 1


def test_another_folder_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(DemoModelError, match="not empty"):
        small(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["notes.txt"]
    with pytest.raises(DemoModelError, match="not a folder"):
        small(tmp_path / "notes.txt")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--kv-heads", "3"], "kv_heads=3: must divide heads=8"),
        (["--layers", "0"], "layers=0: must be at least 1"),
        (["--head-dim", "33"], "head_dim=33: must be even"),
        (["--vocab", "100"], "vocab=100: must be at least"),
        (["--seed", "-1"], "seed=-1"),
    ],
)
def test_command_line_errors_are_one_line(tmp_path: Path, capsys, arguments, message) -> None:
    assert demo_model.main([str(tmp_path / "model"), "--random", *arguments]) == 1
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "model").exists()


def test_sizes_are_for_random_models_only(tmp_path: Path, capsys) -> None:
    for also in ([], ["--gguf", "model.gguf"]):
        assert demo_model.main([str(tmp_path / "model"), "--head-dim", "64", *also]) == 1
        assert "--head-dim is for random models: add --random" in capsys.readouterr().err
