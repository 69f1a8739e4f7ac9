"""What the card holds of a checkpoint: one tensor a piece, and the tensors that it is made of."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache, partial

import torch

from sglang_hma.config import WeightGroup
from sglang_hma.prefill.ttnn.experts import Experts
from sglang_hma.prefill.ttnn.shape import ModelShape


@dataclass(frozen=True)
class Piece:
    """One tensor on the card, made of checkpoint tensors `sources` by `build` (torch to torch); a
    constant has none.

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
    if shape.experts:
        for group in range(shape.experts.groups):
            build = partial(_spread, shape.experts, group)
            yield Piece(f"spread.{group}", (), build, "experts", -1, True)
    for index in range(shape.layers):
        yield from _layer_pieces(shape, chips, index)
    yield Piece("norm", ("model.norm.weight",), _row, tiled=True)
    head = "model.embed_tokens.weight" if shape.tied else "lm_head.weight"
    columns = chips * shape.split(chips).logits
    yield Piece("lm_head", (head,), partial(_head, columns), "head", split=-1, tiled=True)


def _layer_pieces(shape: ModelShape, chips: int, index: int) -> Iterator[Piece]:
    source, name = f"model.layers.{index}.", f"{index}."

    def linear(target: str, module: str, group: WeightGroup, split: int) -> Iterator[Piece]:
        yield Piece(name + target, (f"{source}{module}.weight",), _linear, group, split, True)
        if target in shape.biased:
            # What chips sum over gets its bias once, after the sum.
            own = -1 if split == -1 else None
            yield Piece(f"{name}{target}_bias", (f"{source}{module}.bias",), _row, None, own, True)

    if shape.fused:
        sizes = [shape.heads * shape.head_dim, *[shape.kv_heads * shape.head_dim] * 2]
        joined = (f"{source}self_attn.qkv_proj.weight",)
        build = partial(_qkv_of_one, chips, sizes)
        yield Piece(name + "wqkv", joined, build, "attention", -1, True)
    else:
        qkv = tuple(f"{source}self_attn.{x}_proj" for x in "qkv")
        weights, biases = (tuple(f"{module}.{x}" for module in qkv) for x in ("weight", "bias"))
        yield Piece(name + "wqkv", weights, partial(_qkv, chips), "attention", -1, True)
        if "wqkv" in shape.biased:
            yield Piece(name + "wqkv_bias", biases, partial(_qkv_bias, chips), split=-1, tiled=True)
    yield from linear("wo", "self_attn.o_proj", "attention", -2)
    if shape.experts and index in shape.experts.layers:
        yield from _expert_pieces(shape.experts, f"{source}mlp.", name)
    elif shape.fused:
        both = (f"{source}mlp.gate_up_proj.weight",)
        yield Piece(name + "gate", both, partial(_half, 0), "mlp", -1, True)
        yield Piece(name + "up", both, partial(_half, 1), "mlp", -1, True)
        yield from linear("down", "mlp.down_proj", "mlp", -2)
    else:
        yield from linear("gate", "mlp.gate_proj", "mlp", -1)
        yield from linear("up", "mlp.up_proj", "mlp", -1)
        yield from linear("down", "mlp.down_proj", "mlp", -2)
    norms = {"attention_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"}
    if shape.qk_norm:
        norms |= {"q_norm": "self_attn.q_norm", "k_norm": "self_attn.k_norm"}
    for target, module in norms.items():
        yield Piece(name + target, (f"{source}{module}.weight",), _row, tiled=True)


def _expert_pieces(experts: Experts, source: str, name: str) -> Iterator[Piece]:
    """The router stays BF16: what it chooses is not to depend on the formats."""
    yield Piece(name + "router", (f"{source}gate.weight",), _linear, tiled=True)
    for group in range(experts.groups):
        first = group * experts.together
        numbers = range(first, first + experts.together)
        for target, split in (("gate", -1), ("up", -1), ("down", -2)):
            sources = tuple(f"{source}experts.{n}.{target}_proj.weight" for n in numbers)
            build = _columns if split == -1 else _rows
            yield Piece(f"{name}{group}.{target}", sources, build, "experts", split, True)


@cache
def source_shapes(shape: ModelShape) -> Mapping[str, tuple[int, ...]]:
    """Every tensor that the checkpoint must have."""
    hidden = shape.hidden
    found: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (shape.vocab, hidden),
        "model.norm.weight": (hidden,),
    }
    if not shape.tied:
        found["lm_head.weight"] = (shape.vocab, hidden)
    dense = _layer_shapes(shape, _dense_shapes(shape))
    sparse = _layer_shapes(shape, _sparse_shapes(shape.experts, hidden)) if shape.experts else {}
    for index in range(shape.layers):
        layer = sparse if shape.experts and index in shape.experts.layers else dense
        found |= {f"model.layers.{index}.{name}": size for name, size in layer.items()}
    return found


# Of a layer, or a part of it: names after "model.layers.N.", and shapes.
Shapes = dict[str, tuple[int, ...]]


def _layer_shapes(shape: ModelShape, mlp: Shapes) -> Shapes:
    q, kv, hidden = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim, shape.hidden
    qkv: Shapes = {"q_proj": (q, hidden), "k_proj": (kv, hidden), "v_proj": (kv, hidden)}
    if shape.fused:
        qkv = {"qkv_proj": (q + 2 * kv, hidden)}
    layer: Shapes = {"input_layernorm.weight": (hidden,)} | mlp
    layer["post_attention_layernorm.weight"] = (hidden,)
    if shape.qk_norm:
        layer |= {f"self_attn.{x}_norm.weight": (shape.head_dim,) for x in "qk"}
    _add(layer, shape, "wqkv", qkv)
    _add(layer, shape, "wo", {"o_proj": (hidden, q)})
    return layer


def _dense_shapes(shape: ModelShape) -> Shapes:
    hidden, inner, mlp = shape.hidden, shape.intermediate, Shapes()
    if shape.fused:
        _add(mlp, shape, "gate", {"gate_up_proj": (2 * inner, hidden)})
    else:
        _add(mlp, shape, "gate", {"gate_proj": (inner, hidden)})
        _add(mlp, shape, "up", {"up_proj": (inner, hidden)})
    _add(mlp, shape, "down", {"down_proj": (hidden, inner)})
    return mlp


def _sparse_shapes(experts: Experts, hidden: int) -> Shapes:
    width = experts.columns // experts.together
    mlp: Shapes = {"mlp.gate.weight": (experts.number, hidden)}
    for number in range(experts.number):
        expert = f"mlp.experts.{number}."
        mlp |= {f"{expert}{x}_proj.weight": (width, hidden) for x in ("gate", "up")}
        mlp[f"{expert}down_proj.weight"] = (hidden, width)
    return mlp


def _add(layer: Shapes, shape: ModelShape, target: str, modules: Shapes) -> None:
    """The weights of `modules`, which make the linear layer `target`, and their biases."""
    block = "self_attn" if target in ("wqkv", "wo") else "mlp"
    for module, size in modules.items():
        layer[f"{block}.{module}.weight"] = size
        if target in shape.biased:
            layer[f"{block}.{module}.bias"] = size[:1]


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


def _qkv_of_one(chips: int, sizes: list[int], weight: torch.Tensor) -> torch.Tensor:
    return _qkv(chips, *torch.split(weight, sizes))


def _half(which: int, weight: torch.Tensor) -> torch.Tensor:
    return _linear(weight.chunk(2)[which])


def _columns(*weights: torch.Tensor) -> torch.Tensor:
    """Of experts side by side."""
    return _linear(torch.cat(weights))


def _rows(*weights: torch.Tensor) -> torch.Tensor:
    return torch.cat([weight.t() for weight in weights])


def _spread(experts: Experts, group: int) -> torch.Tensor:
    """[experts, columns of the group]: 1 where a column is that expert's, else 0."""
    width = experts.columns // experts.together
    own = torch.eye(experts.number)[:, group * experts.together :][:, : experts.together]
    return own.repeat_interleave(width, 1).bfloat16()


def _head(columns: int, weight: torch.Tensor) -> torch.Tensor:
    """Zeros where the vocabulary does not fill the last chip's part."""
    return _linear(torch.nn.functional.pad(weight, (0, 0, 0, columns - len(weight))))


def _row(values: torch.Tensor) -> torch.Tensor:
    """For tiles: with rows of 32, ttnn's norm holds a whole row of a wide model in L1, or fails."""
    return values.view(1, 1, 1, -1)
