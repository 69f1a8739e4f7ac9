"""What the card holds of a checkpoint: one tensor a piece, and the tensors that it is made of."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache, partial

import torch

from sglang_hma.config import WeightGroup
from sglang_hma.prefill.ttnn.shape import ModelShape

# Of a checkpoint, and of no use here: rotary tables are made anew.
HARMLESS = ("rotary_emb.inv_freq", "rotary_emb.cos_cached", "rotary_emb.sin_cached")


@dataclass(frozen=True)
class Piece:
    """One tensor on the card, made of checkpoint tensors `sources` by `build` (torch to torch).

    `group` is that of a linear weight's format; `split` the dimension that chips share, None if
    each has it whole.
    """

    name: str
    sources: tuple[str, ...]
    build: Callable[..., torch.Tensor]
    group: WeightGroup | None = None
    split: int | None = None
    tiled: bool = False


def pieces(shape: ModelShape, chips: int) -> Iterator[Piece]:
    """In the order of a checkpoint. Linear weights are [in, out], norms [1, 1, 1, dim]."""
    yield Piece("embedding", ("model.embed_tokens.weight",), _as_is)
    for index in range(shape.layers):
        yield from _layer_pieces(shape, chips, f"model.layers.{index}.", f"{index}.")
    yield Piece("norm", ("model.norm.weight",), _row, tiled=True)
    head = "model.embed_tokens.weight" if shape.tied else "lm_head.weight"
    columns = chips * shape.split(chips).logits
    yield Piece("lm_head", (head,), partial(_head, columns), "head", split=-1, tiled=True)


def _layer_pieces(shape: ModelShape, chips: int, source: str, name: str) -> Iterator[Piece]:
    def linear(target: str, module: str, group: WeightGroup, split: int) -> Iterator[Piece]:
        yield Piece(name + target, (f"{source}{module}.weight",), _linear, group, split, True)
        if target in shape.biased:
            # What chips sum over gets its bias once, after the sum.
            own = -1 if split == -1 else None
            yield Piece(f"{name}{target}_bias", (f"{source}{module}.bias",), _row, None, own, True)

    qkv = tuple(f"{source}self_attn.{x}_proj" for x in "qkv")
    weights, biases = (tuple(f"{module}.{x}" for module in qkv) for x in ("weight", "bias"))
    yield Piece(name + "wqkv", weights, partial(_qkv, chips), "attention", -1, True)
    if "wqkv" in shape.biased:
        yield Piece(name + "wqkv_bias", biases, partial(_qkv_bias, chips), split=-1, tiled=True)
    yield from linear("wo", "self_attn.o_proj", "attention", -2)
    yield from linear("gate", "mlp.gate_proj", "mlp", -1)
    yield from linear("up", "mlp.up_proj", "mlp", -1)
    yield from linear("down", "mlp.down_proj", "mlp", -2)
    norms = {"attention_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"}
    if shape.qk_norm:
        norms |= {"q_norm": "self_attn.q_norm", "k_norm": "self_attn.k_norm"}
    for target, module in norms.items():
        yield Piece(name + target, (f"{source}{module}.weight",), _row, tiled=True)


@cache
def source_shapes(shape: ModelShape) -> Mapping[str, tuple[int, ...]]:
    """Every tensor that the checkpoint must have."""
    q, kv = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    hidden, inner = shape.hidden, shape.intermediate
    linears = {
        "wqkv": {"q_proj": (q, hidden), "k_proj": (kv, hidden), "v_proj": (kv, hidden)},
        "wo": {"o_proj": (hidden, q)},
        "gate": {"gate_proj": (inner, hidden)},
        "up": {"up_proj": (inner, hidden)},
        "down": {"down_proj": (hidden, inner)},
    }
    layer: dict[str, tuple[int, ...]] = {
        "input_layernorm.weight": (hidden,),
        "post_attention_layernorm.weight": (hidden,),
    }
    if shape.qk_norm:
        layer |= {f"self_attn.{x}_norm.weight": (shape.head_dim,) for x in "qk"}
    for target, modules in linears.items():
        block = "self_attn" if target in ("wqkv", "wo") else "mlp"
        for module, size in modules.items():
            layer[f"{block}.{module}.weight"] = size
            if target in shape.biased:
                layer[f"{block}.{module}.bias"] = size[:1]
    found: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (shape.vocab, hidden),
        "model.norm.weight": (hidden,),
    }
    if not shape.tied:
        found["lm_head.weight"] = (shape.vocab, hidden)
    for index in range(shape.layers):
        found |= {f"model.layers.{index}.{name}": size for name, size in layer.items()}
    return found


def refuse_tensor(shape: ModelShape, name: str, tensor: torch.Tensor) -> None:
    """Raises ValueError, in one line, for a tensor of a checkpoint that the runtime would not use,
    because then it would compute another model; and for one of another shape. A tied model's own
    output head, which some files have, is the embedding."""
    wanted = source_shapes(shape).get(name)
    if wanted is None:
        if name.endswith(HARMLESS) or (name == "lm_head.weight" and shape.tied):
            return
        raise ValueError(
            f"the checkpoint has {name}, for which the Tenstorrent runtime has no use: it would "
            "compute another model. Serve this one with --hma-prefill-runtime reference"
        )
    if tuple(tensor.shape) != wanted:
        raise ValueError(
            f"{name} of the checkpoint is {list(tensor.shape)}, and the config makes it "
            f"{list(wanted)}"
        )


def _as_is(weight: torch.Tensor) -> torch.Tensor:
    return weight


def _linear(weight: torch.Tensor) -> torch.Tensor:
    return weight.t().contiguous()


def _joined(chips: int, *parts: torch.Tensor) -> torch.Tensor:
    """Rows of Q, K and V: those of the first chip's heads, then the second's."""
    shares = zip(*(part.chunk(chips) for part in parts), strict=True)
    return torch.cat([rows for share in shares for rows in share])


def _qkv(chips: int, *weights: torch.Tensor) -> torch.Tensor:
    return _linear(_joined(chips, *weights))


def _qkv_bias(chips: int, *biases: torch.Tensor) -> torch.Tensor:
    return _row(_joined(chips, *biases))


def _head(columns: int, weight: torch.Tensor) -> torch.Tensor:
    """Zeros where the vocabulary does not fill the last chip's part."""
    return _linear(torch.nn.functional.pad(weight, (0, 0, 0, columns - len(weight))))


def _row(values: torch.Tensor) -> torch.Tensor:
    """For tiles: with rows of 32, ttnn's norm holds a whole row of a wide model in L1, or fails."""
    return values.view(1, 1, 1, -1)
