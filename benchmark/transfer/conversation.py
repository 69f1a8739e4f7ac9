"""A conversation over a link of limited rate: bytes and time to the first token, turn by turn.

Three pairs side by side in two network namespaces, one thread a server: SGLang 0.5.23 in BF16 with
its prefix cache on decode, ours in BFP8 with the same, ours in BFP8 without. All prefill servers
keep prefixes. The link is the one of benchmark.transfer.ttft: SGLang's transfer of a prompt of
--prompt tokens takes as long as its prefill. Needs root.
"""

import random
import statistics
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from benchmark.common import Figure, Timing, console, finish, parser, table
from benchmark.transfer.link import Link, run
from benchmark.transfer.pairs import MODEL, Running, Wanted, answered, kv_elements, on_a_link

CACHE = "--disaggregation-decode-enable-radix-cache"
SENT = "sglang:kv_transfer_total_mb_sum"
STOCK, OURS, WITHOUT = "stock", "ours", "ours without"
TITLES = {
    STOCK: "SGLang, BF16, cache on decode",
    OURS: "ours, BFP8, cache on decode",
    WITHOUT: "ours, BFP8, without",
}


@dataclass
class Turns:
    """By turn, of all rounds."""

    ttft_s: list[list[float]] = field(default_factory=list)
    sent_bytes: list[float] = field(default_factory=list)


class Talk:
    def __init__(self, pairs: dict[str, Running], road: Link, args: Any) -> None:
        self.pairs, self.road, self.args = pairs, road, args
        self.rng = random.Random(args.seed)

    def words(self, tokens: int) -> list[int]:
        return [self.rng.randrange(300, 4000) for _ in range(tokens)]

    def ask(self, name: str, prompt: list[int], reply: int) -> tuple[float, list[int]]:
        url = self.pairs[name].url
        answer = self.road.call(self.road.prefill, lambda: answered(url, prompt, reply))
        return float(answer[0]), list(answer[1])

    def sent(self, name: str) -> float:
        """Bytes that the pair has sent since it started."""
        url = f"{self.pairs[name].prefill_url}/metrics"

        def read() -> str:
            with urllib.request.urlopen(url, timeout=60) as reply:
                return str(reply.read().decode())

        text = self.road.call(self.road.prefill, read)
        return sum(
            float(line.rpartition(" ")[2]) * 2**20
            for line in text.splitlines()
            if line.startswith(SENT)
        )

    def conversation(self, name: str, into: Turns | None, sizes: Sequence[int]) -> None:
        """`sizes` are the user's tokens in each turn."""
        prompt: list[int] = []
        for turn, tokens in enumerate(sizes):
            prompt = prompt + self.words(tokens)
            before = self.sent(name)
            seconds, said = self.ask(name, prompt, self.args.reply)
            if into is not None:
                if turn == len(into.ttft_s):
                    into.ttft_s.append([])
                    into.sent_bytes.append(self.sent(name) - before)
                into.ttft_s[turn].append(seconds)
            prompt = prompt + said


def main() -> None:
    options = parser(__doc__ or "")
    options.set_defaults(rounds=3)
    options.add_argument("--prompt", type=int, default=2048, help="tokens the link is fitted to")
    options.add_argument("--scale", type=float, default=1.0, help="of the fitted rate")
    options.add_argument("--turns", type=int, default=10)
    options.add_argument("--first", type=int, default=1024, help="tokens of the first turn")
    options.add_argument("--user", type=int, default=480, help="tokens that the user adds a turn")
    options.add_argument("--reply", type=int, default=32, help="tokens of each answer")
    options.add_argument("--port", type=int, default=31700)
    options.add_argument("--seed", type=int, default=random.SystemRandom().randrange(1 << 30))
    run(options, measure)


def measure(args: Any) -> None:
    console.print(f"seed {args.seed}", style="dim")
    wanted = {
        STOCK: Wanted("stock", (CACHE,)),
        OURS: Wanted("ours", (CACHE,)),
        WITHOUT: Wanted("ours"),
    }
    with on_a_link(args.port, wanted) as (road, pairs):
        report(args, Talk(pairs, road, args))


def report(args: Any, talk: Talk) -> None:
    for name in talk.pairs:
        talk.conversation(name, None, [256, 64])  # warm
    fast = Timing([talk.ask(STOCK, talk.words(args.prompt), 2)[0] for _ in range(args.rounds)])
    rate = args.scale * kv_elements(args.prompt) * 2 * 8 / fast.median
    talk.road.set_rate(rate)
    sizes = [args.first, *[args.user] * (args.turns - 1)]
    found = {name: Turns() for name in talk.pairs}
    for number in range(args.rounds):
        for name in talk.pairs:
            console.print(f"conversation {number + 1}, {TITLES[name]}", style="dim")
            talk.conversation(name, found[name], sizes)
    rows = []
    for turn in range(args.turns):
        times = {name: Timing(each.ttft_s[turn]) for name, each in found.items()}
        cells = [
            f"{found[name].sent_bytes[turn] / 1e6:.2f} MB, {t.median * 1e3:.0f} ±{t.spread:.0%}"
            for name, t in times.items()
        ]
        rows.append([str(turn + 1), *cells, f"{times[OURS].median / times[STOCK].median:.2f}"])
    table(
        f"A turn's bytes and TTFT in ms on {rate / 1e6:.0f} Mbit/s; median of {args.rounds} rounds",
        ["turn", *(TITLES[name] for name in found), "TTFT, ours / SGLang"],
        rows,
    )
    ratios = [
        statistics.median(ours) / statistics.median(stock)
        for ours, stock in zip(found[OURS].ttft_s[1:], found[STOCK].ttft_s[1:], strict=True)
    ]
    worst = "TTFT ours / SGLang, the worst turn from the second on"
    figures = [Figure(worst, max(ratios), 0.5, at_least=False)]
    results = {
        "seed": args.seed,
        "model": MODEL,
        "scale": args.scale,
        "rate_bits_per_s": rate,
        "sizes": sizes,
        "reply": args.reply,
        "turns": {
            name: {"ttft_s": each.ttft_s, "sent_bytes": each.sent_bytes}
            for name, each in found.items()
        },
    }
    finish(args, results, figures)


if __name__ == "__main__":
    main()
