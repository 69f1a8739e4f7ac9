"""Step times where nobody has measured them: operations and bytes over reached shares of peaks."""

from dataclasses import dataclass, field

from sglang_hma.planner.catalogue import Card, Catalogue, CatalogueError, Figure
from sglang_hma.planner.model_shape import KVFormat, ModelShape, WeightFormat
from sglang_hma.planner.problem import Problem

# Memory that is neither weights nor KV: activations, workspaces, graphs.
RESERVED = 0.1


class DoesNotFit(Problem):
    """The model's weights leave no room for KV on so many cards."""


@dataclass(frozen=True)
class Roofline:
    """`cards` of one kind that run a model together by tensor parallelism, communication left out.

    A step takes the longer of its products and its memory traffic. `kv_speed`: how many times as
    fast decode attention is as over BF16 pages.
    """

    shape: ModelShape
    card: Card
    cards: int
    weights: WeightFormat
    kv: KVFormat
    compute: Figure
    memory: Figure
    kv_speed: Figure | None = None
    used: tuple[Figure, ...] = field(init=False)
    """What its answers rest on."""

    def __post_init__(self) -> None:
        if self.weights not in self.card.tflops:
            known = ", ".join(self.card.tflops)
            raise CatalogueError(
                f"{self.card.title} has no rate for {self.weights} products; it has {known}"
            )
        figures = (self.card.tflops[self.weights], self.card.bandwidth_gb_s, self.card.memory_gb)
        others = (self.compute, self.memory, *((self.kv_speed,) if self.kv_speed else ()))
        object.__setattr__(self, "used", (*figures, *others))
        if self.kv_tokens <= 0:
            gigabytes = self.shape.weight_bytes(self.weights) / 1e9
            raise DoesNotFit(
                f"{self.shape.name}: {gigabytes:.0f} GB of weights "
                f"leave no room for KV on {self.cards} x {self.card.title}"
            )

    @property
    def flops_s(self) -> float:
        return self.cards * self.card.tflops[self.weights].value * 1e12 * self.compute.value

    @property
    def bytes_s(self) -> float:
        return self.cards * self.card.bandwidth_gb_s.value * 1e9 * self.memory.value

    @property
    def kv_tokens(self) -> int:
        """That memory holds beside the weights."""
        room = self.cards * self.card.memory_gb.value * 1e9 * (1 - RESERVED)
        room -= self.shape.weight_bytes(self.weights)
        return int(room / self.shape.kv_bytes(1, self.kv))

    def prefill_s(self, *parts: tuple[int, int], beside: int = 0) -> float:
        """Of a pass over (new tokens, tokens before them) of each prompt."""
        flops = self.shape.prefill_flops(*parts) + self.shape.decode_flops(beside, 0)
        products = flops / self.flops_s
        known = sum(before for _, before in parts)
        traffic = self.shape.weight_bytes(self.weights) + self.shape.kv_bytes(known, self.kv)
        return max(products, traffic / self.bytes_s)

    def decode_s(self, batch: int, prompt_tokens: float, new_tokens: float = 0) -> float:
        """Of a step of `batch` requests that see so many tokens together.

        Tokens that decode itself has made are BF16, whatever the pages of prompts are.
        """
        products = self.shape.decode_flops(batch, prompt_tokens + new_tokens) / self.flops_s
        share = self.shape.linear_weights / self.shape.weights
        traffic = self.shape.weight_bytes(self.weights) * share
        speed = 1.0 if self.kv_speed is None else self.kv_speed.value
        traffic += self.shape.kv_bytes(prompt_tokens, "bf16") / speed
        traffic += self.shape.kv_bytes(new_tokens, "bf16")
        return max(products, traffic / self.bytes_s)


def nvidia(
    catalogue: Catalogue, name: str, shape: ModelShape, cards: int = 1, *, kv: KVFormat = "bf16"
) -> Roofline:
    """BF16 weights, pages of format `kv`. Raises CatalogueError, DoesNotFit."""
    efficiencies = catalogue.efficiencies
    return Roofline(
        *(shape, catalogue.card(name), cards, "bf16", kv),
        compute=efficiencies["nvidia-compute"],
        memory=efficiencies["nvidia-memory"],
        kv_speed=efficiencies["bfp8-decode-attention"] if kv == "bfp8" else None,
    )


def tenstorrent(
    catalogue: Catalogue, name: str, shape: ModelShape, cards: int = 1, *, efficiency: str
) -> Roofline:
    """BFP8 weights and pages, at a named efficiency. Raises CatalogueError, DoesNotFit."""
    if efficiency not in catalogue.efficiencies:
        known = ", ".join(n for n in catalogue.efficiencies if n.startswith("tenstorrent"))
        raise CatalogueError(f"efficiency {efficiency!r} is not in the catalogue; it has {known}")
    return Roofline(
        *(shape, catalogue.card(name), cards, "bfp8", "bfp8"),
        compute=catalogue.efficiencies[efficiency],
        memory=catalogue.efficiencies["tenstorrent-memory"],
    )
