"""A mixture of experts: which layers have one, and how its experts lie together on the card."""

from dataclasses import dataclass, replace
from typing import Any

from hma_kernels import TILE
from sglang_hma.prefill.ttnn.errors import UnsupportedModel

# Products are at most about as wide as those of dense models of 8B and 14B.
WIDEST = 12288


@dataclass(frozen=True)
class Experts:
    """Of a model, or of a chip's part of it: its `columns` of each group of experts.

    number: of all experts; chosen: of a token; normed: whether the chosen ones' weights sum to 1;
    layers: those with experts; together: experts of a group, whose columns lie side by side.
    """

    number: int
    chosen: int
    normed: bool
    layers: frozenset[int]
    together: int
    columns: int

    @property
    def groups(self) -> int:
        return self.number // self.together

    @classmethod
    def of(cls, config: Any) -> "Experts | None":
        """From a Qwen3MoeConfig, or what has its fields; None if every layer is dense. Raises
        UnsupportedModel."""
        number, chosen = config.num_experts, config.num_experts_per_tok
        width, step = config.moe_intermediate_size, config.decoder_sparse_step
        if number % TILE or not 0 < chosen <= number:
            raise UnsupportedModel(
                f"num_experts is {number} and num_experts_per_tok {chosen}: the runtime chooses "
                "among a multiple of 32 experts, at least one a token"
            )
        if width % TILE:
            raise UnsupportedModel(f"moe_intermediate_size is {width}, no multiple of 32")
        if step < 1:
            raise UnsupportedModel(f"decoder_sparse_step is {step}, not 1 or more")
        dense = set(config.mlp_only_layers or ())
        layers = {i for i in range(config.num_hidden_layers) if (i + 1) % step == 0} - dense
        if not layers:
            return None
        fitting = (n for n in range(1, number + 1) if number % n == 0 and n * width <= WIDEST)
        together = max(fitting, default=1)
        return cls(
            number=number,
            chosen=chosen,
            normed=bool(config.norm_topk_prob),
            layers=frozenset(layers),
            together=together,
            columns=together * width,
        )

    def split(self, chips: int) -> "Experts":
        """Each chip has a part of every group. Raises UnsupportedModel."""
        if self.columns % (chips * TILE):
            raise UnsupportedModel(
                f"{self.together} experts have {self.columns} columns, which {chips} chips cannot "
                "share evenly"
            )
        return replace(self, columns=self.columns // chips)

    def activation_width(self, hidden: int) -> int:
        """BF16 values a token that live at once: its input, the sum so far, three rows of a group,
        and what routes it, in FP32."""
        return 2 * hidden + 3 * self.columns + 8 * self.number
