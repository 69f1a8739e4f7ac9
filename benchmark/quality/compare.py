"""Perplexity, KL and agreement of precision policies with BF16, teacher-forced.

Each document's first --context tokens are prefilled under a policy, the --scored next ones decoded
over that cache by the product's kernels (paged_model.py). The yardstick is BF16 everything; how far
float32 is from it says what the yardstick's own rounding does.
"""

import argparse
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.progress import track

from benchmark.common import Figure, console, finish, parser, table
from benchmark.quality import policies
from benchmark.quality.outliers import add_outliers
from benchmark.quality.paged_model import Models, PagedModel
from benchmark.quality.policies import BF16, FLOAT32, OURS, Policy
from benchmark.quality.statistics import Comparison, Interval, Score, compare, score

SETS = {
    "main": (FLOAT32, OURS),
    "turns": (FLOAT32, OURS, policies.OWN_REPLY),
    "parts": (OURS, *policies.PARTS),
    "formats": (FLOAT32, OURS, *policies.PEERS),
    "outliers": (OURS, *policies.STRESSED),
}
SEED = 20261125
Results = dict[str, Comparison]  # by policy


def options() -> argparse.ArgumentParser:
    result = parser(__doc__ or "", timed=False)
    result.add_argument("--model", type=Path, required=True, metavar="DIR", help="a checkpoint")
    result.add_argument("--set", choices=SETS, default="main", help="which policies")
    result.add_argument(
        "--text",
        choices=("prose", "held-out"),
        default="prose",
        help="Python's reference and docstrings, or the source files that train.py leaves out",
    )
    result.add_argument("--documents", type=int, default=100, metavar="N", help="a context length")
    result.add_argument(
        "--context", type=int, nargs="+", default=[512], metavar="N", help="tokens that prefill has"
    )
    result.add_argument("--scored", type=int, default=512, metavar="N", help="tokens that follow")
    result.add_argument(
        "--outliers", type=float, default=1.0, metavar="X", help="make some K channels X as large"
    )
    return result


def score_all(
    model: PagedModel, documents: Sequence[list[int]], context: int, chosen: Sequence[Policy]
) -> dict[str, list[Score]]:
    """Scores by policy, the yardstick's included."""
    scores: dict[str, list[Score]] = {policy.name: [] for policy in (BF16, *chosen)}
    for ids in track(documents, f"after {context} tokens", console=console):
        came = torch.tensor(ids[context:])
        yardstick = model.logits(ids, context, BF16)
        scores[BF16.name].append(score(yardstick, yardstick, came))
        for policy in chosen:
            scores[policy.name].append(score(model.logits(ids, context, policy), yardstick, came))
    return scores


def shown(interval: Interval, unit: float = 1.0, digits: int = 4) -> str:
    value, low, high = (x * unit for x in interval)
    return f"{value:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


def show(results: Results, title: str) -> None:
    table(
        title,
        ["policy", "perplexity", "change, %", "KL, millinats", "other top-1, %", "agrees for"],
        [
            [
                name,
                f"{r.perplexity:.3f}",
                shown(r.perplexity_change, 100, 3),
                shown(r.kl, 1000, 3),
                shown(r.disagreement, 100, 2),
                f"{r.until:.0f}",
            ]
            for name, r in results.items()
        ],
    )


def figures(results: Results, after: str) -> list[Figure]:
    """What is claimed of ours; against the noise floor where it was measured."""
    ours = results[OURS.name]
    change, _, high = ours.perplexity_change
    found = [
        Figure(f"perplexity change of ours{after}, %, absolute", abs(change) * 100, 0.2, False),
        Figure(f"upper end of its 95% interval{after}, %", high * 100, 0.5, False),
    ]
    if floor := results.get(FLOAT32.name):
        for name, own, least in (
            ("other top-1", ours.disagreement[0], floor.disagreement[0]),
            ("KL", ours.kl[0], floor.kl[0]),
        ):
            if least > 0:  # few tokens may show no floor to measure by
                ratio = own / least
                found.append(Figure(f"{name} of ours by the noise floor{after}", ratio, 1.5, False))
    if peer := results.get(policies.FP8_PER_TENSOR.name):
        kv = results[policies.KV_ONLY.name]
        found.append(Figure(f"KL of BFP8 KV by FP8 KV's{after}", kv.kl[0] / peer.kl[0], 1.0, False))
    return found


def checked(args: argparse.Namespace, parsing: argparse.ArgumentParser) -> None:
    if not (args.model / "config.json").is_file():
        parsing.error(f"--model is {args.model}: no model is there; `make demo-model` fetches one")
    for context in args.context:
        if context % 32 or context < 32:
            parsing.error(f"--context has {context}: needs a multiple of 32")
    for name in ("documents", "scored"):
        if getattr(args, name) < 2:
            parsing.error(f"--{name} is {getattr(args, name)}: needs at least 2")


def main() -> None:
    from transformers import AutoTokenizer

    from benchmark.quality import text
    from benchmark.quality.plots import plot

    parsing = options()
    args = parsing.parse_args()
    checked(args, parsing)
    torch.manual_seed(SEED)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    longest = max(args.context) + args.scored
    models = Models(args.model)
    if args.outliers != 1:
        for dtype in (torch.bfloat16, torch.float32):
            add_outliers(models.get(dtype), args.outliers)
    model = PagedModel(models, longest)
    limit = models.get(torch.bfloat16).config.max_position_embeddings
    if longest > limit:
        parsing.error(f"--context and --scored are {longest} together: the model reads {limit}")

    by_context: dict[int, Results] = {}
    scores: dict[int, dict[str, list[Score]]] = {}
    for context in args.context:
        texts = text.prose() if args.text == "prose" else text.sources(held_out=True)
        documents = text.windows(texts, tokenizer, context + args.scored, args.documents)
        scores[context] = score_all(model, documents, context, SETS[args.set])
        yardstick = scores[context][BF16.name]
        results = {name: compare(own, yardstick, SEED) for name, own in scores[context].items()}
        by_context[context] = results
        tokens = results[BF16.name].tokens
        show(
            results,
            f"{args.model.resolve().name}: {tokens} tokens in {args.documents} after {context}",
        )

    report: dict[str, Any] = {
        "model": args.model.resolve().name,
        "arguments": {
            name: getattr(args, name)
            for name in ("set", "text", "documents", "context", "scored", "outliers")
        },
        "contexts": {c: {n: asdict(r) for n, r in rs.items()} for c, rs in by_context.items()},
        "scores": {
            c: {n: [asdict(s) for s in own] for n, own in s.items()} for c, s in scores.items()
        },
    }
    if args.plot:
        plot(args.plot, by_context, args.model.resolve().name)
    several = len(by_context) > 1
    found = [
        figure
        for context, results in by_context.items()
        for figure in figures(results, f" after {context}" if several else "")
    ]
    finish(args, report, found)


if __name__ == "__main__":
    main()
