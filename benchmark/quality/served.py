"""The serving path against the harness of compare.py: the same greedy tokens, the same logprobs.

A pair of servers behind the router, in float32 with BFP8 pages and weights, continues documents;
paged_model.py scores what it said. A served token counts as the same if the harness gives no
other token a higher logprob by more than the tolerance.

Two correct programs that sum in different orders differ in the last bits of K and V, and a last
bit may decide to which side BFP8 rounds. So the harness also scores everything again with K and V
changed by a millionth: how far it is then from itself is how close anybody can come. With
--kv-format native nothing is rounded on either side.
"""

import json
import shutil
import statistics
import tempfile
import urllib.request
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.progress import track

from benchmark.common import Figure, console, finish, parser, table
from benchmark.quality import text
from benchmark.quality.paged_model import Models, PagedModel
from benchmark.quality.policies import FLOAT32, OURS_FLOAT32, Policy
from benchmark.serving.pair import pair

TOLERANCE = 1e-3  # nats
NOISE = 1e-6  # of K and V, relative; float32's own rounding is 6e-8, and sums have many terms
SEED = 20261126
Served = list[tuple[int, float]]  # token, logprob


@dataclass(frozen=True)
class Difference:
    """Of one document: the largest differences of a logprob in nats, and how many tokens the
    harness would not have said."""

    served: float
    itself: float  # the harness's from itself with noise
    others: int


def ask(url: str, prompt: list[int], tokens: int) -> Served:
    sampling = {"temperature": 0, "max_new_tokens": tokens, "ignore_eos": True}
    body = {"input_ids": prompt, "sampling_params": sampling, "return_logprob": True}
    request = urllib.request.Request(
        f"{url}/generate", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request) as reply:
        found = json.load(reply)["meta_info"]["output_token_logprobs"]
    return [(token, logprob) for logprob, token, _ in found]


def logprobs(
    model: PagedModel, prompt: list[int], tokens: torch.Tensor, policy: Policy
) -> torch.Tensor:
    """float64 [tokens, vocabulary]"""
    logits = model.logits([*prompt, *tokens.tolist()], len(prompt), policy)
    return torch.log_softmax(logits.to(torch.float64), -1)


def compare(model: PagedModel, prompt: list[int], served: Served, policy: Policy) -> Difference:
    tokens, theirs = (torch.tensor(column) for column in zip(*served, strict=True))
    own = logprobs(model, prompt, tokens, policy)
    noisy = logprobs(model, prompt, tokens, replace(policy, noise=NOISE))
    chosen, changed = (x.gather(1, tokens[:, None])[:, 0] for x in (own, noisy))
    return Difference(
        served=float((chosen - theirs).abs().max()),
        itself=float((chosen - changed).abs().max()),
        others=int((own.max(-1).values - chosen > TOLERANCE).sum()),
    )


def main() -> None:
    from transformers import AutoTokenizer

    parsing = parser(__doc__ or "", timed=False)
    parsing.add_argument("--model", type=Path, required=True, metavar="DIR")
    parsing.add_argument("--documents", type=int, default=20, metavar="N")
    parsing.add_argument("--context", type=int, default=512, metavar="N", help="prompt tokens")
    parsing.add_argument("--new-tokens", type=int, default=32, metavar="N")
    parsing.add_argument(
        "--kv-format", choices=("bfp8", "native"), default="bfp8", help="the pair's --hma-kv-format"
    )
    parsing.add_argument("--port", type=int, default=31600)
    args = parsing.parse_args()
    if args.context % 32:
        parsing.error(f"--context is {args.context}: needs a multiple of 32")
    policy = OURS_FLOAT32 if args.kv_format == "bfp8" else FLOAT32
    torch.manual_seed(SEED)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    documents = text.windows(text.prose(), tokenizer, args.context, args.documents)
    logs = Path(tempfile.mkdtemp(prefix="hma-served-"))
    console.print(f"servers' logs, kept if this fails: {logs}")
    flags = ("--dtype", "float32", "--hma-kv-format", args.kv_format)
    with pair(args.model.resolve(), args.port, logs / "pair.log", flags) as url:
        asked = track(documents, "serving", console=console)
        answers = [ask(url, prompt, args.new_tokens) for prompt in asked]
    shutil.rmtree(logs)
    model = PagedModel(Models(args.model), args.context + args.new_tokens)
    both = list(zip(documents, answers, strict=True))
    found = [compare(model, *one, policy) for one in track(both, "scoring", console=console)]
    table(
        f"{args.model.resolve().name}: {args.documents} documents, {args.new_tokens} tokens after "
        f"{args.context}, float32, KV {args.kv_format}",
        ["document", "largest difference of a logprob", "harness from itself", "other tokens"],
        [
            [str(i), f"{d.served:.1e}", f"{d.itself:.1e}", str(d.others)]
            for i, d in enumerate(found)
        ],
    )
    report: dict[str, Any] = {
        "model": args.model.resolve().name,
        "kv_format": args.kv_format,
        "noise": NOISE,
        "documents": [asdict(d) for d in found],
    }
    largest, others = max(d.served for d in found), sum(d.others for d in found)
    figures = [
        Figure("largest difference of a logprob, nats", largest, TOLERANCE, False),
        Figure("tokens that the harness would not have said", others, 0, False),
    ]
    if args.kv_format == "bfp8":
        served, itself = (
            statistics.median(getattr(d, side) for d in found) for side in ("served", "itself")
        )
        name = "median document's difference by the harness's from itself"
        figures.append(Figure(name, served / itself, 2.0, False))
    finish(args, report, figures)


if __name__ == "__main__":
    main()
