"""What a model looks like to the runtime, and how many bytes of a card it takes."""

from dataclasses import dataclass, replace
from typing import Any

from hma_kernels import TILE, TILE_BYTES
from sglang_hma.config import WeightFormats, WeightGroup
from sglang_hma.decoder_dims import DecoderDims, dims_of
from sglang_hma.prefill.ttnn.errors import UnsupportedModel
from sglang_hma.prefill.ttnn.experts import Experts

ARCHITECTURES = (
    "Qwen3ForCausalLM",
    "Qwen3MoeForCausalLM",
    "Qwen2ForCausalLM",
    "LlamaForCausalLM",
    "MistralForCausalLM",
    "Phi3ForCausalLM",
)
BF16 = 2


@dataclass(frozen=True)
class ModelShape(DecoderDims):
    """Of a model, or of a chip's part of it: its heads, its columns of the MLP, its `logits` of the
    vocabulary's."""

    logits: int
    eps: float
    qk_norm: bool
    biased: frozenset[str]  # linear layers with a bias: wqkv, wo, gate, up, down
    fused: bool = False  # the checkpoint has one tensor of Q, K and V, and one of gate and up
    experts: Experts | None = None

    @classmethod
    def of(cls, config: Any) -> "ModelShape":
        """From a transformers config that check_fields (config_fields.py) has let pass. Raises
        UnsupportedModel."""
        name = (config.architectures or ["a model without a name"])[0]
        if name not in ARCHITECTURES:
            known = ", ".join(ARCHITECTURES)
            raise UnsupportedModel(f"{name} has no Tenstorrent runtime here, only {known} have")
        shape = cls(
            **dims_of(config),
            logits=config.vocab_size,
            eps=config.rms_norm_eps,
            qk_norm=name in ("Qwen3ForCausalLM", "Qwen3MoeForCausalLM"),
            biased=biased_layers(name, config),
            fused=name == "Phi3ForCausalLM",
            experts=Experts.of(config) if name == "Qwen3MoeForCausalLM" else None,
        )
        shape._check(config)
        return shape

    def _check(self, config: Any) -> None:
        if self.head_dim != TILE and self.head_dim % (2 * TILE):
            raise UnsupportedModel(
                f"head_dim is {self.head_dim}: ttnn rotates heads of 32 or a multiple of 64"
            )
        for name in ("hidden", "intermediate"):
            if getattr(self, name) % TILE:
                raise UnsupportedModel(f"{name} size is {getattr(self, name)}, no multiple of 32")

    def split(self, chips: int) -> "ModelShape":
        """What each of `chips` chips holds. Raises UnsupportedModel."""
        if chips == 1:
            return self
        units = {"heads": 1, "kv_heads": 1} | ({"intermediate": TILE} if self.dense_layers else {})
        for name, unit in units.items():
            if getattr(self, name) % (chips * unit):
                raise UnsupportedModel(
                    f"{name} of the model are {getattr(self, name)}, which {chips} chips cannot "
                    "share evenly"
                )
        return replace(
            self,
            heads=self.heads // chips,
            kv_heads=self.kv_heads // chips,
            intermediate=self.intermediate // chips,
            logits=-(-self.vocab // (chips * TILE)) * TILE,
            experts=self.experts and self.experts.split(chips),
        )

    @property
    def dense_layers(self) -> int:
        """How many have no experts."""
        return self.layers - (len(self.experts.layers) if self.experts else 0)

    @property
    def qkv_width(self) -> int:
        return (self.heads + 2 * self.kv_heads) * self.head_dim

    @property
    def page_bytes(self) -> int:
        """K and V of 32 tokens in one layer."""
        return 2 * self.kv_heads * (self.head_dim // TILE) * TILE_BYTES

    def weight_bytes(self, formats: WeightFormats) -> int:
        """On a chip: tiles of linear weights, of norms, biases and routers, rows of the BF16
        embedding."""
        attention = tiles_of(self.hidden, self.qkv_width)
        attention += tiles_of(self.heads * self.head_dim, self.hidden)
        mlp = 2 * tiles_of(self.hidden, self.intermediate)
        mlp += tiles_of(self.intermediate, self.hidden)
        rows = (2 * self.layers + 1) * tiles_of(1, self.hidden)
        mlp *= self.dense_layers
        experts = 0
        if self.experts:
            up, down = (self.hidden, self.experts.columns), (self.experts.columns, self.hidden)
            group = 2 * tiles_of(*up) + tiles_of(*down)
            # What spreads an expert's weight over its columns, for all layers.
            experts += self.experts.groups * tiles_of(self.experts.number, self.experts.columns)
            experts += len(self.experts.layers) * self.experts.groups * group
            rows += len(self.experts.layers) * tiles_of(self.hidden, self.experts.number)
        tiles: dict[WeightGroup, int] = {
            "attention": self.layers * attention,
            "mlp": mlp,
            "experts": experts,
            "head": tiles_of(self.hidden, self.logits),
        }
        linear = sum(
            number * (TILE_BYTES if formats.packs(group) else TILE * TILE * BF16)
            for group, number in tiles.items()
        )
        if self.qk_norm:
            rows += 2 * self.layers * tiles_of(1, self.head_dim)
        widths = {"wqkv": self.qkv_width, "wo": self.hidden, "down": self.hidden}
        for layer in self.biased:
            rows += self.layers * tiles_of(1, widths.get(layer, self.intermediate))
        return linear + (self.vocab * self.hidden + rows * TILE * TILE) * BF16

    def activation_bytes(self, tokens: int) -> int:
        """The most that lives at once in a forward of `tokens` tokens, beside the weights."""
        residual = 2 * self.hidden
        attention = 2 * self.qkv_width + self.heads * self.head_dim
        mlp = self.hidden + 3 * self.intermediate if self.dense_layers else 0
        if self.experts:
            mlp = max(mlp, self.experts.activation_width(self.hidden))
        return tokens * BF16 * (residual + max(attention, mlp))

    def pages_in(self, free: int, rows: int) -> int:
        """KV pages, over all layers, that fit in `free` bytes beside the activations of `rows`."""
        room = free - self.activation_bytes(rows)
        return max(0, room // (self.page_bytes * self.layers))


def biased_layers(name: str, config: Any) -> frozenset[str]:
    """As SGLang's models have them: Qwen2 at Q, K and V always, Llama also by a field `bias`."""
    if name == "Qwen2ForCausalLM":
        return frozenset({"wqkv"})
    if name in ("MistralForCausalLM", "Phi3ForCausalLM"):
        return frozenset()
    attention = getattr(config, "attention_bias", False)
    attention |= name == "LlamaForCausalLM" and getattr(config, "bias", False)
    mlp = name == "LlamaForCausalLM" and getattr(config, "mlp_bias", False)
    return frozenset(("wqkv", "wo") if attention else ()) | frozenset(
        ("gate", "up", "down") if mlp else ()
    )


def tiles_of(rows: int, columns: int) -> int:
    return -(-rows // TILE) * -(-columns // TILE)
