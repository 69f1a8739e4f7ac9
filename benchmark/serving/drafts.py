"""What speculation on decode gives and costs: two pairs of a model, one that drafts, with NGRAM or,
where --drafter names one, with a small model.

Three kinds of answers, as clients ask for them: a text that is repeated with small changes (what an
editor, a summary with quotes or code completion does), a question that was asked before, and prose.
Time for each token after the first, and tokens a step.
"""

import json
import random
import statistics
import tempfile
import time
import urllib.request
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmark.common import Figure, console, finish, parser, table
from benchmark.serving.pair import pair

PLAIN = "one token at a time"
TEXTS = Path(__file__).parents[2] / "docs"
PROSE = (
    "Tell a short story about a lighthouse keeper who finds a letter.",
    "Explain how bread rises, to a child.",
    "Describe a walk through a city that you like, in one paragraph.",
    "What should somebody know before buying a bicycle?",
    "Write down the thoughts of a cat that sees snow for the first time.",
)


@dataclass
class Found:
    """Of one kind of answer and one pair, by round."""

    tpot_s: list[float] = field(default_factory=list)
    tokens_a_step: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class Answer:
    tpot_s: float
    tokens: int
    steps: int


def ask(url: str, prompt: str, tokens: int) -> Answer:
    body = {
        "text": f"<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n",
        "sampling_params": {"temperature": 0, "max_new_tokens": tokens, "ignore_eos": True},
        "stream": True,
    }
    request = urllib.request.Request(
        f"{url}/generate", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    first, meta = 0.0, {}
    with urllib.request.urlopen(request) as reply:
        for line in reply:
            if line.startswith(b"data:") and b"[DONE]" not in line:
                meta = json.loads(line.removeprefix(b"data:"))["meta_info"]
                first = first or time.perf_counter()
    last = time.perf_counter()
    said = meta["completion_tokens"]
    return Answer((last - first) / (said - 1), said, meta.get("spec_verify_ct") or said - 1)


def passage(rng: random.Random, words: int) -> str:
    """Of this project's own documents."""
    text = " ".join(path.read_text() for path in sorted(TEXTS.glob("*.md"))).split()
    start = rng.randrange(len(text) - words)
    return " ".join(text[start : start + words])


def main() -> None:
    options = parser(__doc__ or "")
    options.set_defaults(rounds=5)
    options.add_argument("--tokens", type=int, default=96, help="of an answer")
    options.add_argument("--model", type=Path, default=Path("build/demo-model"))
    options.add_argument("--drafter", type=Path, help="a small model of the same vocabulary")
    options.add_argument("--steps", type=int, default=3, help="tokens that it drafts")
    options.add_argument("--port", type=int, default=31800)
    options.add_argument("--seed", type=int, default=random.SystemRandom().randrange(1 << 30))
    measure(options.parse_args())


def measure(args: Any) -> None:
    console.print(f"seed {args.seed}", style="dim")
    drafts, flags = "NGRAM, chains of 8", "--speculative-algorithm NGRAM"
    if args.drafter:
        drafts = f"{args.drafter.name}, chains of {args.steps + 1}"
        flags = f"--speculative-algorithm STANDALONE --speculative-num-steps {args.steps} "
        flags += f"--speculative-draft-model-path {args.drafter.resolve()}"
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        urls = {}
        for index, (name, more) in enumerate({PLAIN: [], drafts: ["--decode-args", flags]}.items()):
            console.print(f"starting {name}", style="dim")
            log = folder / f"{index}.log"
            urls[name] = stack.enter_context(pair(args.model, args.port + 50 * index, log, more))
        report(args, urls, drafts)


def report(args: Any, urls: dict[str, str], drafts: str) -> None:
    rng = random.Random(args.seed)
    found = {kind: {name: Found() for name in urls} for kind in ("edit", "again", "prose")}
    for number in range(args.rounds + 1):
        text = passage(rng, 90)
        prose = f"{rng.choice(PROSE)} Begin with the word {rng.choice(text.split())!r}."
        prompts = {
            "edit": f"Repeat this text word by word:\n{text}",
            "prose": prose,
            "again": prose,
        }
        for kind, prompt in prompts.items():
            for name, url in urls.items():
                answer = ask(url, prompt, args.tokens)
                if number:  # after a round to warm up
                    found[kind][name].tpot_s.append(answer.tpot_s)
                    found[kind][name].tokens_a_step.append((answer.tokens - 1) / answer.steps)
    figures, rows = [], []
    for kind, pairs in found.items():
        plain, drafted = (statistics.median(pairs[name].tpot_s) for name in (PLAIN, drafts))
        ratios = [
            ours / peer
            for ours, peer in zip(pairs[drafts].tpot_s, pairs[PLAIN].tpot_s, strict=True)
        ]
        rows.append(
            [
                kind,
                f"{plain * 1e3:.1f}",
                f"{drafted * 1e3:.1f}",
                f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})",
                f"{statistics.median(pairs[drafts].tokens_a_step):.1f}",
            ]
        )
        if kind == "again" and not args.drafter:
            figures.append(
                Figure(f"TPOT with drafts / without, {kind}", statistics.median(ratios), 0.5, False)
            )
    table(
        f"Time per token after the first, ms; medians of {args.rounds} rounds",
        ["answer", "without", "with drafts", "ratio", "tokens a step"],
        rows,
    )
    results = {
        "seed": args.seed,
        "model": str(args.model),
        "tokens": args.tokens,
        "found": {
            kind: {name: vars(each) for name, each in p.items()} for kind, p in found.items()
        },
    }
    finish(args, results, figures)


if __name__ == "__main__":
    main()
