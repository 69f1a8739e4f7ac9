"""python -m sglang_hma.demo_model DIR: a small random model in an ordinary Hugging Face folder.

For trying the servers out and for tests: it has a real architecture, tokenizer
and chat template, so every command that works on it works on a released model.
Its text means nothing.
"""

import argparse
import dataclasses
import json
import os
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

Family = Literal["qwen3", "qwen2", "llama"]
FAMILIES: tuple[Family, ...] = get_args(Family)

SPEC_FILE = "demo_model.json"
END_OF_TEXT, TURN_START, TURN_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
SPECIAL_TOKENS = [END_OF_TEXT, TURN_START, TURN_END]
MIN_VOCAB = 256 + len(SPECIAL_TOKENS)

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

# A matrix maps unit variance to WEIGHT_GAIN**2. At the usual scale the logits are so flat that
# rounding decides the argmax, and the layers so weak that the last token predicts itself.
WEIGHT_GAIN = 2.0


class DemoModelError(ValueError):
    pass


@dataclass(frozen=True, kw_only=True)
class DemoModelSpec:
    family: Family = "qwen3"
    layers: int = 4
    hidden: int = 256
    heads: int = 8
    kv_heads: int = 4
    head_dim: int = 64
    intermediate: int = 512
    vocab: int = 4096
    max_position: int = 4096
    seed: int = 0
    tie_embeddings: bool = False

    def validate(self) -> None:
        if self.family not in FAMILIES:
            raise DemoModelError(f"family={self.family}: choose from {', '.join(FAMILIES)}")
        for name in ("layers", "hidden", "heads", "kv_heads", "intermediate", "max_position"):
            if getattr(self, name) < 1:
                raise DemoModelError(f"{name}={getattr(self, name)}: must be at least 1")
        if self.head_dim < 2 or self.head_dim % 2:
            raise DemoModelError(f"head_dim={self.head_dim}: must be even, for RoPE")
        if self.heads % self.kv_heads:
            raise DemoModelError(f"kv_heads={self.kv_heads}: must divide heads={self.heads}")
        if self.family == "qwen2" and self.heads * self.head_dim != self.hidden:
            raise DemoModelError(
                f"heads={self.heads} x head_dim={self.head_dim} is not hidden={self.hidden}: "
                "SGLang's Qwen2 takes the head size from hidden / heads"
            )
        if self.vocab < MIN_VOCAB:
            raise DemoModelError(f"vocab={self.vocab}: must be at least {MIN_VOCAB}")
        if self.seed < 0:
            raise DemoModelError(f"seed={self.seed}: must not be negative")


def make_demo_model(
    path: str | os.PathLike[str],
    *,
    family: Family = "qwen3",
    layers: int = 4,
    hidden: int = 256,
    heads: int = 8,
    kv_heads: int = 4,
    head_dim: int = 64,
    intermediate: int = 512,
    vocab: int = 4096,
    max_position: int = 4096,
    seed: int = 0,
    tie_embeddings: bool = False,
) -> Path:
    """Writes the model and returns its folder; does nothing if the same one is already there.

    The same arguments give the same bytes, for one Python installation (the tokenizer is trained
    on its library's source). The folder appears whole or not at all. Raises DemoModelError for
    arguments that make no model, and for a folder that holds something else.
    """
    spec = DemoModelSpec(
        family=family,
        layers=layers,
        hidden=hidden,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        intermediate=intermediate,
        vocab=vocab,
        max_position=max_position,
        seed=seed,
        tie_embeddings=tie_embeddings,
    )
    spec.validate()
    target = Path(path).absolute()
    if _existing_spec(target) == dataclasses.asdict(spec):
        return target

    target.parent.mkdir(parents=True, exist_ok=True)
    draft = target.with_name(f"{target.name}.tmp-{os.getpid()}")
    draft.mkdir()
    try:
        _write_model(spec, draft)
        (draft / SPEC_FILE).write_text(json.dumps(dataclasses.asdict(spec), indent=2) + "\n")
        if target.exists():
            shutil.rmtree(target)
        draft.rename(target)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return target


def _existing_spec(target: Path) -> object:
    """What the demo model in `target` was made from; None if nothing is there."""
    if not target.exists():
        return None
    if not target.is_dir():
        raise DemoModelError(f"{target} is not a folder")
    if (target / SPEC_FILE).is_file():
        return json.loads((target / SPEC_FILE).read_text())
    if any(target.iterdir()):
        raise DemoModelError(
            f"{target} is not empty and holds no demo model; choose another folder"
        )
    return None


def _write_model(spec: DemoModelSpec, folder: Path) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

    tokenizer = _train_tokenizer(spec)
    tokenizer.save_pretrained(folder)
    end_of_text, turn_end = tokenizer.convert_tokens_to_ids([END_OF_TEXT, TURN_END])
    ids = {"bos_token_id": end_of_text, "eos_token_id": turn_end, "pad_token_id": end_of_text}

    config = AutoConfig.for_model(
        spec.family,
        num_hidden_layers=spec.layers,
        hidden_size=spec.hidden,
        num_attention_heads=spec.heads,
        num_key_value_heads=spec.kv_heads,
        head_dim=spec.head_dim,
        intermediate_size=spec.intermediate,
        vocab_size=spec.vocab,
        max_position_embeddings=spec.max_position,
        tie_word_embeddings=spec.tie_embeddings,
        **ids,
    )
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(spec.seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        for weight in model.parameters():
            if weight.dim() == 2:
                weight.normal_(std=WEIGHT_GAIN / weight.shape[1] ** 0.5)
    model.generation_config = GenerationConfig(**ids)
    model.save_pretrained(folder)
    for file in folder.glob("*.safetensors"):  # safetensors makes them private to the user
        shutil.copymode(folder / "config.json", file)


def _train_tokenizer(spec: DemoModelSpec) -> "PreTrainedTokenizerFast":
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(  # type: ignore[no-untyped-call]
        vocab_size=spec.vocab,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    bpe.train_from_iterator(_training_text(), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        eos_token=TURN_END,
        pad_token=END_OF_TEXT,
        additional_special_tokens=SPECIAL_TOKENS,
        model_max_length=spec.max_position,
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def _training_text() -> Iterator[str]:
    standard_library = Path(os.__file__).parent
    for source in sorted(standard_library.glob("*.py"))[:30]:
        yield source.read_text(encoding="utf-8", errors="ignore")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m sglang_hma.demo_model",
        description="Make a small model with random weights, as a Hugging Face folder: for trying "
        "the servers without downloading anything. The same arguments give the same model.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    default = DemoModelSpec()
    parser.add_argument(
        "path", metavar="DIR", help="folder to write; a demo model there is replaced"
    )
    parser.add_argument(
        "--family", choices=FAMILIES, default=default.family, help="model architecture"
    )
    for name, text in {
        "layers": "decoder layers",
        "hidden": "hidden size",
        "heads": "query heads",
        "kv-heads": "key/value heads; divides --heads",
        "head-dim": "size of one head; BFP8 pages need a multiple of 32",
        "intermediate": "MLP width",
        "vocab": f"vocabulary size, at least {MIN_VOCAB}",
        "max-position": "longest context, in tokens",
        "seed": "of the random weights",
    }.items():
        value = getattr(default, name.replace("-", "_"))
        parser.add_argument(f"--{name}", type=int, metavar="N", default=value, help=text)
    parser.add_argument(
        "--tie-embeddings", action="store_true", help="share the embedding and output weights"
    )
    return parser


def main(argv: list[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    try:
        path = make_demo_model(**vars(args))
    except (DemoModelError, OSError) as error:
        print(f"demo_model: {error}", file=sys.stderr)
        return 1
    print(f"demo model: {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
