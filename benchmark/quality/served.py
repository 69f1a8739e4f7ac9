"""The serving path against the harness of compare.py: the same greedy tokens, the same logprobs.

A pair of servers behind the router, in float32 with BFP8 pages and weights, continues documents;
paged_model.py scores what it said. A served token counts as the same if the harness gives no
other token a higher logprob by more than the tolerance.
"""

import json
import tempfile
import urllib.request
from pathlib import Path
from typing import Any

import torch
from rich.progress import track

from benchmark.common import Figure, console, finish, parser, table
from benchmark.quality import text
from benchmark.quality.paged_model import Models, PagedModel
from benchmark.quality.policies import OURS_FLOAT32
from benchmark.serving.pair import pair

TOLERANCE = 1e-3  # nats
Served = list[tuple[int, float]]  # token, logprob


def ask(url: str, prompt: list[int], tokens: int) -> Served:
    sampling = {"temperature": 0, "max_new_tokens": tokens, "ignore_eos": True}
    body = {"input_ids": prompt, "sampling_params": sampling, "return_logprob": True}
    request = urllib.request.Request(
        f"{url}/generate", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request) as reply:
        found = json.load(reply)["meta_info"]["output_token_logprobs"]
    return [(token, logprob) for logprob, token, _ in found]


def difference(model: PagedModel, prompt: list[int], served: Served) -> tuple[float, int]:
    """The largest difference of a logprob, and how many tokens the harness would not have said."""
    tokens, logprobs = (torch.tensor(column) for column in zip(*served, strict=True))
    logits = model.logits([*prompt, *tokens.tolist()], len(prompt), OURS_FLOAT32)
    own = torch.log_softmax(logits.to(torch.float64), -1)
    chosen = own.gather(1, tokens[:, None])[:, 0]
    others = own.max(-1).values - chosen > TOLERANCE
    return float((chosen - logprobs).abs().max()), int(others.sum())


def main() -> None:
    from transformers import AutoTokenizer

    parsing = parser(__doc__ or "", timed=False)
    parsing.add_argument("--model", type=Path, required=True, metavar="DIR")
    parsing.add_argument("--documents", type=int, default=20, metavar="N")
    parsing.add_argument("--context", type=int, default=512, metavar="N", help="prompt tokens")
    parsing.add_argument("--new-tokens", type=int, default=32, metavar="N")
    parsing.add_argument("--port", type=int, default=31600)
    args = parsing.parse_args()
    if args.context % 32:
        parsing.error(f"--context is {args.context}: needs a multiple of 32")
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    documents = text.windows(text.prose(), tokenizer, args.context, args.documents)
    with tempfile.TemporaryDirectory() as folder:
        flags = ("--dtype", "float32")
        with pair(args.model.resolve(), args.port, Path(folder) / "pair.log", flags) as url:
            asked = track(documents, "serving", console=console)
            answers = [ask(url, prompt, args.new_tokens) for prompt in asked]
    model = PagedModel(Models(args.model), args.context + args.new_tokens)
    both = list(zip(documents, answers, strict=True))
    found = [difference(model, *one) for one in track(both, "scoring", console=console)]
    largest, others = max(d for d, _ in found), sum(n for _, n in found)
    table(
        f"{args.model.resolve().name}: {args.documents} documents, {args.new_tokens} tokens after "
        f"{args.context}, float32",
        ["document", "largest difference of a logprob", "other tokens"],
        [[str(i), f"{d:.1e}", str(n)] for i, (d, n) in enumerate(found)],
    )
    report: dict[str, Any] = {"model": args.model.resolve().name, "documents": found}
    figures = [
        Figure("largest difference of a logprob, nats", largest, TOLERANCE, False),
        Figure("tokens that the harness would not have said", others, 0, False),
    ]
    finish(args, report, figures)


if __name__ == "__main__":
    main()
