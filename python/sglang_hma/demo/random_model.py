"""A small random model: a real architecture, tokenizer and chat template, so every command that
works on it works on a released model. Its text means nothing.
"""

import dataclasses
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

from sglang_hma.demo.folder import DemoModelError, write_model

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

Family = Literal["qwen3", "qwen2", "llama"]
FAMILIES: tuple[Family, ...] = get_args(Family)

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


@dataclass(frozen=True, kw_only=True)
class RandomModelSpec:
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


def make_random_model(
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
    spec = RandomModelSpec(
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
    return write_model(path, dataclasses.asdict(spec), lambda folder: _write(spec, folder))


def _write(spec: RandomModelSpec, folder: Path) -> None:
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


def _train_tokenizer(spec: RandomModelSpec) -> "PreTrainedTokenizerFast":
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(
        tokenizer_object=train_bpe(_training_text(), spec.vocab, SPECIAL_TOKENS),
        eos_token=TURN_END,
        pad_token=END_OF_TEXT,
        additional_special_tokens=SPECIAL_TOKENS,
        model_max_length=spec.max_position,
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def train_bpe(texts: Iterable[str], vocab: int, special_tokens: list[str]) -> "Tokenizer":
    """A byte-level BPE of `vocab` tokens, `special_tokens` first, that any text passes through."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(  # type: ignore[no-untyped-call]
        vocab_size=vocab,
        special_tokens=special_tokens,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    return bpe


def _training_text() -> Iterator[str]:
    standard_library = Path(os.__file__).parent
    for source in sorted(standard_library.glob("*.py"))[:30]:
        yield source.read_text(encoding="utf-8", errors="ignore")
