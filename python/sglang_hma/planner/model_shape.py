"""What a planner needs to know of a model: how many weights, how many operations, how much KV."""

import json
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Literal

from hma_kernels.layout import TILE, TILE_BYTES
from sglang_hma.decoder_dims import DecoderDims, dims_of
from sglang_hma.planner.problem import Problem

KVFormat = Literal["bf16", "fp8", "bfp8"]
WeightFormat = Literal["bf16", "fp8", "bfp8"]

# Bytes an element. BFP8 has a byte an element and one exponent for 16.
BYTES = {"bf16": 2.0, "fp8": 1.0, "bfp8": TILE_BYTES / TILE**2}


class ShapeError(Problem):
    """One line: the model and what about it cannot be planned for."""


@dataclass(frozen=True)
class ModelShape(DecoderDims):
    name: str

    @property
    def layer_weights(self) -> int:
        """Of a layer's linear modules."""
        attention = self.hidden * self.head_dim * (2 * self.heads + 2 * self.kv_heads)
        return attention + 3 * self.hidden * self.intermediate

    @property
    def linear_weights(self) -> int:
        """That every decoded token is multiplied by: all layers and the output head."""
        return self.layers * self.layer_weights + self.vocab * self.hidden

    @property
    def weights(self) -> int:
        """Without norms, which are too few to matter."""
        return self.linear_weights + (0 if self.tied else self.vocab * self.hidden)

    def weight_bytes(self, format: WeightFormat) -> float:
        return self.weights * BYTES[format]

    def kv_bytes(self, tokens: float, format: KVFormat) -> float:
        """Of all layers. BFP8 is the page format that travels."""
        return tokens * 2 * self.layers * self.kv_heads * self.head_dim * BYTES[format]

    def prefill_flops(self, *parts: tuple[int, int]) -> float:
        """Of a pass over (new tokens, tokens before them) of each prompt.

        The head sees the last token of each only.
        """
        tokens = sum(new for new, _ in parts)
        seen = sum(new * (before + (new + 1) / 2) for new, before in parts)
        linear = 2 * self.layers * self.layer_weights * tokens
        attention = 4 * self.layers * self.heads * self.head_dim * seen
        return linear + attention + 2 * self.vocab * self.hidden * len(parts)

    def decode_flops(self, batch: float, tokens: float) -> float:
        """Of a step of `batch` requests that see `tokens` tokens together."""
        return (
            2 * self.linear_weights * batch + 4 * self.layers * self.heads * self.head_dim * tokens
        )


# Layers, hidden, intermediate, heads, kv_heads, head_dim, vocab, tied.
KNOWN = {
    name: ModelShape(*dims, name)
    for name, dims in {
        "Qwen3-4B": (36, 2560, 9728, 32, 8, 128, 151936, True),
        "Qwen3-8B": (36, 4096, 12288, 32, 8, 128, 151936, False),
        "Qwen3-14B": (40, 5120, 17408, 40, 8, 128, 151936, False),
        "Qwen3-32B": (64, 5120, 25600, 64, 8, 128, 151936, False),
        "Llama-3.1-8B": (32, 4096, 14336, 32, 8, 128, 128256, False),
        "Llama-3.1-70B": (80, 8192, 28672, 64, 8, 128, 128256, False),
    }.items()
}

ARCHITECTURES = ("Qwen3ForCausalLM", "Qwen2ForCausalLM", "LlamaForCausalLM", "MistralForCausalLM")


def shape_of(model: str) -> ModelShape:
    """A known model by name, with or without an owner; or a config.json, or the folder of one.

    Raises ShapeError.
    """
    path = Path(model)
    if path.is_dir():
        path = path / "config.json"
    if path.is_file():
        return from_config(path)
    name = model.rsplit("/", 1)[-1]
    if name in KNOWN:
        return KNOWN[name]
    raise ShapeError(f"model {model!r} is no config.json and none of {', '.join(KNOWN)}")


def from_config(path: Path) -> ModelShape:
    """Raises ShapeError where the file is none, or of a model that is not dense all through."""
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        architecture = config["architectures"][0]
        shape = ModelShape(**dims_of(SimpleNamespace(**config)), name=path.resolve().parent.name)
    except AttributeError as error:
        raise ShapeError(f"{path}: has no {error.name}") from error
    except (OSError, ValueError, TypeError, ZeroDivisionError) as error:
        raise ShapeError(f"{path}: {error}") from error
    except (KeyError, IndexError) as error:
        raise ShapeError(f"{path}: has no {error}") from error
    if architecture not in ARCHITECTURES:
        raise ShapeError(f"{path}: {architecture} is none of {', '.join(ARCHITECTURES)}")
    return shape
