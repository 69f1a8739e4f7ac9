"""python -m sglang_hma.prefill.ttnn.compare: a card beside the reference, layer by layer.

The reference is transformers in float32 with the same weights through the same packer, K and V
through the device packer before attention reads them. Both prefill one random prompt.
"""

import argparse
import json
import sys
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from hma_kernels import PAGE, bfp8_pack, bfp8_round, bfp8_unpack
from sglang_hma.config import device_ids, mesh_chips
from sglang_hma.prefill.ttnn.card import CardError, opened
from sglang_hma.prefill.ttnn.offline import OfflinePrefill, split
from sglang_hma.prefill.ttnn.shape import UnsupportedModel, pages_of


@dataclass(frozen=True)
class Difference:
    """Of one layer's K or V; layer -1 is the logits."""

    layer: int
    what: str
    correlation: float
    largest: float
    differing_bytes: float | None = None


def correlation(a: torch.Tensor, b: torch.Tensor) -> float:
    """Pearson's, over all elements."""
    return float(np.corrcoef(a.double().flatten().numpy(), b.double().flatten().numpy())[0, 1])


def pack_weights(model: torch.nn.Module) -> None:
    """Round linear weights as a card holds them; a tied embedding stays as it is."""
    from sglang_hma.prefill.weights import round_weight

    head: Any = model.lm_head
    head.weight = torch.nn.Parameter(head.weight.detach().clone())
    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            module.weight.data = round_weight(module.weight.data)


def reference_prefill(
    model: Any, tokens: np.ndarray
) -> tuple[torch.Tensor, list[tuple[torch.Tensor, torch.Tensor]]]:
    """Logits [n, vocab]; K and V of each layer [kv_heads, n, head_dim], as stored."""
    from transformers import DynamicCache

    class Packed(DynamicCache):
        def update(self, keys: Any, values: Any, layer: int, *args: Any, **kwargs: Any) -> Any:
            stored = [bfp8_round(x.bfloat16().contiguous()).to(x.dtype) for x in (keys, values)]
            return super().update(*stored, layer, *args, **kwargs)

    cache = Packed()
    with torch.no_grad():
        out = model(torch.from_numpy(tokens)[None].long(), past_key_values=cache, use_cache=True)
    return out.logits[0], [(layer.keys[0], layer.values[0]) for layer in cache.layers]


def compare(
    runtime: OfflinePrefill, model: Any, tokens: np.ndarray, chunk: int
) -> list[Difference]:
    """`model` is in float32 with packed weights; `chunk` a multiple of 32."""
    pages = np.arange(1, 1 + pages_of(len(tokens)))
    cuts = list(range(chunk, len(tokens), chunk))
    logits = torch.cat([runtime.prefill([part])[0] for part in split(tokens, cuts, pages)])
    expected, kv = reference_prefill(model, tokens)
    used, found = torch.from_numpy(pages), []
    for layer, pair in enumerate(kv):
        for which, values in enumerate(pair):
            arrived = runtime.host[layer][which][used]
            got = bfp8_unpack(arrived[:, :, None]).transpose(0, 1).flatten(1, 2)[:, : len(tokens)]
            # Whole pages only: what lies after the last token is nobody's.
            whole = len(tokens) // PAGE
            theirs = bfp8_pack(values[:, : whole * PAGE].bfloat16()).transpose(0, 1)
            ours = arrived[:whole]
            share = float((ours != theirs).float().mean()) if whole else None
            largest = float((got - values).abs().max())
            name = "KV"[which]
            found.append(Difference(layer, name, correlation(got, values), largest, share))
    largest = float((logits.float() - expected).abs().max())
    found.append(Difference(-1, "logits", correlation(logits, expected), largest))
    return found


def show(differences: list[Difference]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("layer", "", "correlation", "largest difference", "bytes that differ")
    for one in differences:
        share = "" if one.differing_bytes is None else f"{one.differing_bytes:.1%}"
        layer = str(one.layer) if one.layer >= 0 else ""
        table.add_row(layer, one.what, f"{one.correlation:.5f}", f"{one.largest:.4g}", share)
    Console().print(table)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m sglang_hma.prefill.ttnn.compare",
        description="Prefill one random prompt on a Tenstorrent card and by transformers with the "
        "card's formats, and compare K, V and logits layer by layer. Holds the model in the "
        "host's memory in float32.",
    )
    parser.add_argument("--model-path", required=True, help="a folder with a checkpoint")
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

    model = AutoModelForCausalLM.from_pretrained(args.model_path, dtype=torch.float32).eval()
    tokens = np.random.default_rng(args.seed).integers(0, model.config.vocab_size, args.tokens)
    try:
        with opened(args.device_ids, args.mesh or len(args.device_ids)) as card:
            pages = 1 + pages_of(args.tokens)
            named = model.state_dict().items()
            runtime = OfflinePrefill(card, model.config, named, pages=pages)
            pack_weights(model)
            differences = compare(runtime, model, tokens, args.chunk)
    except (CardError, UnsupportedModel) as error:
        sys.stderr.write(f"sglang_hma.prefill.ttnn.compare: error: {error}\n")
        return 2
    show(differences)
    if args.json:
        with open(args.json, "w") as file:
            json.dump([asdict(one) for one in differences], file, indent=2)
    return 0


if __name__ == "__main__":
    sys.exit(main())
