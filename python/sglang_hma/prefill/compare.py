"""python -m sglang_hma.prefill.compare: a runtime's prefill against float32, layer by layer.

The truth is transformers in float32. Beside a runtime's errors stand those that are to be expected:
of BF16 everything, and of a card's formats alone (weights through the host packer, K and V through
the device packer before attention reads them, all else in float32). A runtime whose errors leave
those of the formats behind from layer n on is wrong in layer n.
"""

import argparse
import copy
import json
import sys
from collections.abc import Callable, Collection
from dataclasses import asdict, dataclass, field
from typing import Any, get_args

import numpy as np
import torch

from hma_kernels import PAGE, bfp8_pack, bfp8_round, bfp8_unpack
from sglang_hma.config import WeightGroup, device_ids, mesh_chips

KV = tuple[torch.Tensor, torch.Tensor]


@dataclass
class Trace:
    """Of a prompt of n tokens: logits [n, vocab]; of each layer K and V [kv_heads, n, head_dim] as
    stored, and the residual stream after it [n, hidden]."""

    logits: torch.Tensor
    kv: list[KV]
    hidden: list[torch.Tensor]


@dataclass(frozen=True)
class Errors:
    """Root mean square of the difference from float32 by that of float32's values, for each
    candidate; `differing_bytes`: share of a runtime's page bytes that are not the formats'."""

    layer: int  # -1: the logits
    what: str  # K, V, hidden, logits
    relative: dict[str, float] = field(default_factory=dict)
    differing_bytes: float | None = None


def relative_error(found: torch.Tensor, truth: torch.Tensor) -> float:
    found, truth = found.double(), truth.double()
    return float((found - truth).norm() / truth.norm())


def pack_weights(model: Any, groups: Collection[str] = get_args(WeightGroup)) -> None:
    """Round linear weights of the groups of --hma-weight-format as a card holds them, in a
    transformers model; a tied embedding and routers of experts stay as they are."""
    from sglang_hma.prefill.weights import group_of, round_weight, routers

    head = model.get_output_embeddings()
    head.weight = torch.nn.Parameter(head.weight.detach().clone())
    kept = routers(model)
    for name, module in model.named_modules():
        if module in kept:
            continue
        if isinstance(module, torch.nn.Linear):
            if ("head" if module is head else group_of(name)) in groups:
                module.weight.data = round_weight(module.weight.data)
        elif "experts" in groups:
            # Of all experts, [experts, out, in].
            for weight in module.parameters(recurse=False):
                if weight.dim() == 3:
                    weight.data = round_weight(weight.data)


def by_transformers(
    model: Any, tokens: np.ndarray, stored: Callable[[torch.Tensor], torch.Tensor] | None = None
) -> Trace:
    """`stored` is what K and V become in the cache; attention reads them from there."""
    from transformers import DynamicCache

    class Cache(DynamicCache):
        def update(self, keys: Any, values: Any, layer: int, *args: Any, **kwargs: Any) -> Any:
            if stored is not None:
                keys, values = stored(keys), stored(values)
            return super().update(keys, values, layer, *args, **kwargs)

    hidden: list[torch.Tensor] = []

    def keep(_layer: Any, _inputs: Any, output: Any) -> None:
        hidden.append((output[0] if isinstance(output, tuple) else output).reshape(len(tokens), -1))

    hooks = [layer.register_forward_hook(keep) for layer in model.model.layers]
    cache = Cache()
    try:
        with torch.no_grad():
            ids = torch.from_numpy(tokens)[None].long()
            out = model(ids, past_key_values=cache, use_cache=True)
    finally:
        for hook in hooks:
            hook.remove()
    kv = [(layer.keys[0], layer.values[0]) for layer in cache.layers]
    return Trace(out.logits[0], kv, hidden)


def packed(x: torch.Tensor) -> torch.Tensor:
    """Through the device packer and back."""
    return bfp8_round(x.bfloat16().contiguous()).to(x.dtype)


def compare(traces: dict[str, Trace], truth: Trace, pages: list[KV] | None = None) -> list[Errors]:
    """`pages`: of each layer K and V uint8 [pages, kv_heads, head_dim / 32, 1088] of a runtime, in
    the order of the tokens, compared with those of traces["formats"]."""
    found = []
    for layer, (kv, hidden) in enumerate(zip(truth.kv, truth.hidden, strict=True)):
        for which, what in enumerate("KV"):
            errors = {
                name: relative_error(trace.kv[layer][which], kv[which])
                for name, trace in traces.items()
            }
            share = None
            if pages is not None:
                share = differing(pages[layer][which], traces["formats"].kv[layer][which])
            found.append(Errors(layer, what, errors, share))
        errors = {
            name: relative_error(trace.hidden[layer], hidden) for name, trace in traces.items()
        }
        found.append(Errors(layer, "hidden", errors))
    errors = {name: relative_error(trace.logits, truth.logits) for name, trace in traces.items()}
    found.append(Errors(-1, "logits", errors))
    return found


def differing(pages: torch.Tensor, values: torch.Tensor) -> float | None:
    """Of whole pages only: what lies after the last token is nobody's."""
    whole = values.shape[1] // PAGE
    if not whole:
        return None
    expected = bfp8_pack(values[:, : whole * PAGE].bfloat16()).transpose(0, 1)
    return float((pages[:whole] != expected).float().mean())


def on_card(args: argparse.Namespace, model: Any, tokens: np.ndarray) -> tuple[Trace, list[KV]]:
    """A Tenstorrent card's trace, and its pages as they arrived. Raises CardError, and
    UnsupportedModel."""
    from sglang_hma.prefill.ttnn.card import opened
    from sglang_hma.prefill.ttnn.chunk import pages_of
    from sglang_hma.prefill.ttnn.offline import OfflinePrefill, as_saved, split

    pages = np.arange(1, 1 + pages_of(len(tokens)))
    cuts = list(range(args.chunk, len(tokens), args.chunk))
    hidden: list[list[torch.Tensor]] = []
    with opened(args.device_ids, args.mesh or len(args.device_ids)) as card:
        runtime = OfflinePrefill(
            card, model.config, as_saved(model.state_dict()), pages=len(pages) + 1
        )
        logits = []
        for chunk in split(tokens, cuts, pages):
            hidden.append([])
            logits += runtime.prefill([chunk], hidden=hidden[-1])
    used = torch.from_numpy(pages)
    arrived = [(k[used], v[used]) for k, v in runtime.host]

    def rows(one: torch.Tensor) -> torch.Tensor:
        return bfp8_unpack(one[:, :, None]).transpose(0, 1).flatten(1, 2)[:, : len(tokens)]

    layers = [torch.cat(parts) for parts in zip(*hidden, strict=True)]
    return Trace(torch.cat(logits), [(rows(k), rows(v)) for k, v in arrived], layers), arrived


# name: what --runtime calls it, a trace of the prompt and its pages
RUNTIMES = {"ttnn": on_card}


def show(found: list[Errors]) -> None:
    from rich.console import Console
    from rich.table import Table

    names = list(found[0].relative)
    table = Table("layer", "", *names, title="relative error to float32", title_justify="left")
    with_bytes = any(one.differing_bytes is not None for one in found)
    if with_bytes:
        table.add_column("bytes that are not the formats'")
    for one in found:
        layer = str(one.layer) if one.layer >= 0 else ""
        cells = [f"{one.relative[name]:.2e}" for name in names]
        if with_bytes:
            cells.append("" if one.differing_bytes is None else f"{one.differing_bytes:.1%}")
        table.add_row(layer, one.what, *cells)
    Console().print(table)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m sglang_hma.prefill.compare",
        description="Prefill one random prompt by transformers in float32, in BF16 and with a "
        "card's formats, and by a runtime; print each layer's errors of K, V and hidden "
        "states against float32. Holds three copies of the model in the host's memory.",
    )
    parser.add_argument("--model-path", required=True, help="a folder with a checkpoint")
    parser.add_argument(
        "--runtime",
        choices=["none", *RUNTIMES],
        default="none",
        help="what is looked at: ttnn is a Tenstorrent card; none: what the formats cost (none)",
    )
    parser.add_argument("--tokens", type=int, default=100, help="length of the prompt (100)")
    parser.add_argument("--chunk", type=int, default=64, help="tokens a chunk, times 32 (64)")
    parser.add_argument("--seed", type=int, default=0, help="of the prompt (0)")
    parser.add_argument(
        "--device-ids", type=device_ids, default=(0,), help="the cards' numbers, with commas (0)"
    )
    parser.add_argument(
        "--mesh", type=mesh_chips, help="1x2 or 1x4: chips that share the model (1 a card)"
    )
    parser.add_argument("--json", metavar="FILE", help="also write the figures to FILE")
    args = parser.parse_args(argv)
    if args.tokens < 1 or args.chunk < PAGE or args.chunk % PAGE:
        parser.error(
            f"--tokens is {args.tokens}, --chunk {args.chunk}: at least 1, and times {PAGE}"
        )
    from transformers import AutoModelForCausalLM

    from sglang_hma.prefill.ttnn.card import CardError
    from sglang_hma.prefill.ttnn.errors import UnsupportedModel

    model = AutoModelForCausalLM.from_pretrained(args.model_path, dtype=torch.float32).eval()
    tokens = np.random.default_rng(args.seed).integers(0, model.config.vocab_size, args.tokens)
    pages = None
    try:
        traces = {}
        if args.runtime != "none":  # first: a card that is missing is said at once
            traces[args.runtime], pages = RUNTIMES[args.runtime](args, model, tokens)
    except (CardError, UnsupportedModel) as error:
        sys.stderr.write(f"sglang_hma.prefill.compare: error: {error}\n")
        return 2
    truth = by_transformers(model, tokens)
    low = copy.deepcopy(model).bfloat16()
    expected = {"BF16": by_transformers(low, tokens)}
    del low
    pack_weights(model)
    expected["formats"] = by_transformers(model, tokens, packed)
    found = compare(expected | traces, truth, pages)
    show(found)
    if args.json:
        with open(args.json, "w") as file:
            json.dump([asdict(one) for one in found], file, indent=2)
    return 0


if __name__ == "__main__":
    sys.exit(main())
