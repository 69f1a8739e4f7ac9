"""A GGUF file as an ordinary Hugging Face folder in BF16, so that servers need not know GGUF.

transformers reads the weights, the configuration and the tokenizer. What it leaves open is done
here: tensors that a model lacks are no silent random numbers, and text is split as the
vocabulary's merges were learned, which for some of llama.cpp's names transformers does not know.
"""

import contextlib
import functools
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sglang_hma.demo.folder import DemoModelError, write_model

if TYPE_CHECKING:
    import torch
    from gguf import GGUFReader

MAGIC = b"GGUF"
# Of llama.cpp's names for ways to split text (tokenizer.ggml.pre): those that are GPT-2's, which is
# what transformers takes for a name that it does not know, and those that cut digits apart before.
AS_GPT2 = frozenset({"default", "gpt-2", "gpt2"})
DIGITS_APART = frozenset({"smollm", "starcoder", "refact", "command-r", "codeshell"})
PROBE = "It's  2026:\n\n\tnaïve 3.14159e-10 日本語 🙂 don't\r\n(x+=1);   1000000 A.B.C. İß\n"


def convert(
    file: str | os.PathLike[str], path: str | os.PathLike[str], *, origin: str | None = None
) -> Path:
    """Writes the model and returns its folder; does nothing if it was made from the same file.

    `origin` says where the file is from, for the folder's demo_model.json. Raises DemoModelError
    for a file that is no model of one file, is damaged, or that transformers cannot read, and for a
    folder that holds something else.
    """
    source = Path(file).absolute()
    reader = _open(source)
    with source.open("rb") as data:
        digest = hashlib.file_digest(data, "sha256").hexdigest()
    spec = {"gguf": source.name, "sha256": digest, "origin": origin or source.name}

    def write(folder: Path) -> None:
        with _read_once(source, reader):
            _write(source, reader, folder)

    return write_model(path, spec, write)


@contextlib.contextmanager
def _read_once(source: Path, reader: "GGUFReader") -> Iterator[None]:
    """Inside, transformers' readers of `source` are `reader`, and names are mapped once.

    It would parse the header, a vocabulary of Python loops, three times more, and make the table of
    tensor names anew for each of a model's modules: more than half of a conversion's time.
    """
    import gguf

    names: dict[str, Any] = vars(gguf)
    own = {name: names[name] for name in ("GGUFReader", "get_tensor_name_map")}

    def read(path: str | os.PathLike[str]) -> "GGUFReader":
        return reader if Path(path) == source else own["GGUFReader"](path)

    name_map = functools.cache(own["get_tensor_name_map"])
    names.update(GGUFReader=read, get_tensor_name_map=name_map)
    try:
        yield
    finally:
        names.update(own)


def _open(source: Path) -> "GGUFReader":
    """The header, with what can be refused before any weight is read."""
    from gguf import GGUFReader

    try:
        with source.open("rb") as data:
            magic = data.read(len(MAGIC))
    except OSError as error:
        raise DemoModelError(f"{source}: {error.strerror}") from error
    if magic != MAGIC:
        raise DemoModelError(f"{source} is no GGUF file: it begins with {magic!r}, not {MAGIC!r}")
    try:
        reader = GGUFReader(source)
    except Exception as error:  # whatever a damaged header makes it do
        raise DemoModelError(f"{source} is damaged: {error}; fetch it again") from error
    pieces = _field(reader, "split.count", 1)
    if pieces > 1:
        raise DemoModelError(
            f"{source} is one of {pieces} pieces: join them (llama-gguf-split --merge) and give "
            "the whole"
        )
    for name in ("general.architecture", "tokenizer.ggml.model", "tokenizer.ggml.tokens"):
        if name not in reader.fields:
            raise DemoModelError(f"{source} has no {name}: it is not a whole language model")
    return reader


def _field(reader: "GGUFReader", name: str, default: Any) -> Any:
    field = reader.fields.get(name)
    return default if field is None else field.contents()


def _write(source: Path, reader: "GGUFReader", folder: Path) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig
    from transformers.utils import logging

    logging.disable_progress_bar()
    architecture = _field(reader, "general.architecture", "")
    where = {"pretrained_model_name_or_path": source.parent, "gguf_file": source.name}
    try:
        tokenizer = _tokenizer(reader, where)
        config = AutoConfig.from_pretrained(**where)
        # transformers takes a head's size from the architecture's usual one.
        if head_dim := _field(reader, f"{architecture}.attention.key_length", 0):
            config.head_dim = head_dim
        model, loaded = AutoModelForCausalLM.from_pretrained(
            **where, config=config, dtype=torch.bfloat16, output_loading_info=True
        )
    except DemoModelError as error:
        raise DemoModelError(f"{source}: {error}") from None
    except Exception as error:
        reason = " ".join(str(error).split())[:300]
        raise DemoModelError(
            f"{source} ({architecture}) cannot be read by transformers: {reason}"
        ) from error
    lacking = sorted(loaded["missing_keys"])
    if lacking or loaded["mismatched_keys"]:
        wrong = ", ".join(map(str, lacking or sorted(loaded["mismatched_keys"])))
        raise DemoModelError(f"{source} ({architecture}) lacks or misshapes {wrong[:300]}")
    _check_finite(source, model)

    ids = {
        f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")
    }
    # transformers saves no model that it read from GGUF: a plain one takes its tensors.
    config = model.config
    del config.quantization_config
    for name, token in ids.items():
        setattr(config, name, token)
    with torch.device("meta"):
        plain = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    plain.load_state_dict(model.state_dict(), assign=True)
    plain.tie_weights()
    plain.generation_config = GenerationConfig(**ids)
    plain.save_pretrained(folder)
    try:
        _save_tokenizer(tokenizer, folder)
    except DemoModelError as error:
        raise DemoModelError(f"{source} ({architecture}): {error}") from None


def _check_finite(source: Path, model: "torch.nn.Module") -> None:
    for name, weight in model.named_parameters():
        if not bool(weight.isfinite().all()):
            raise DemoModelError(f"{source}: {name} has values that are not finite; fetch it again")


def _tokenizer(reader: "GGUFReader", where: dict[str, Any]) -> Any:
    from transformers import AutoTokenizer
    from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

    tokenizer = AutoTokenizer.from_pretrained(**where)
    kind = _field(reader, "tokenizer.ggml.model", "")
    split = _field(reader, "tokenizer.ggml.pre", "default")
    if kind == "gpt2" and split in AS_GPT2 | DIGITS_APART:
        _split_as_gpt2(tokenizer.backend_tokenizer, digits_apart=split in DIGITS_APART)
    elif kind == "gpt2" and split not in GGUF_PRE_TOKENIZER_SPLITS:
        raise DemoModelError(
            f"tokenizer.ggml.pre is {split!r}: how text must be split for it is not known here, "
            "and a guess would change the model's answers"
        )
    tokenizer.model_max_length = (
        _field(reader, f"{_field(reader, 'general.architecture', '')}.context_length", 0)
        or tokenizer.model_max_length
    )
    return tokenizer


def _split_as_gpt2(backend: Any, *, digits_apart: bool) -> None:
    from tokenizers import pre_tokenizers

    split = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    backend.pre_tokenizer = (
        pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), split])
        if digits_apart
        else split
    )


def _save_tokenizer(tokenizer: Any, folder: Path) -> None:
    """Under no model's own class, which would bring that model's splitting when it is loaded.

    Raises DemoModelError if it splits otherwise when loaded all the same.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    kept = ("bos_token", "eos_token", "pad_token", "unk_token", "chat_template", "model_max_length")
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend_tokenizer,
        **{name: getattr(tokenizer, name) for name in kept},
    ).save_pretrained(folder)
    loaded = AutoTokenizer.from_pretrained(folder)
    if loaded.encode(PROBE) != tokenizer.encode(PROBE):
        raise DemoModelError(
            "transformers loads its tokenizer as another model's, which splits text otherwise"
        )
