"""The simulator beside AIConfigurator's own answer for A100: steady state of both ways to serve.

AIConfigurator (NVIDIA, Apache-2.0) 0.12.0 was asked for the best of eight A100 with SGLang by its
`cli default --total-gpus 8 --system a100_sxm --backend sglang --isl I --osl O --ttft T --tpot P`;
aiconfigurator.csv has the first of each list. The simulator is given that mix and requests at
even distances; the rate at which their time per token becomes AIConfigurator's is compared.

Where prefill and decode are apart, AIConfigurator makes their measured times 10% and 8% longer
("latency correction") and then takes 10% and 8% off their rates ("pipeline bubbles",
"under-saturation"). The same assumptions are those without these four factors: that is what is
compared, and what it publishes is shown beside.
"""

import csv
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.progress import track

from benchmark.common import Figure, console, finish, parser, table
from sglang_hma.planner import catalogue, goodput
from sglang_hma.planner.catalogue import Catalogue
from sglang_hma.planner.goodput import Objectives
from sglang_hma.planner.model_shape import KNOWN
from sglang_hma.planner.systems import Site, System, offer
from sglang_hma.planner.trace import Request

ANSWERS = Path(__file__).parent / "aiconfigurator.csv"
PREFILL_FACTOR, DECODE_FACTOR = 0.9, 0.92  # its rate matching's (0.12.0)
PREFILL_LONGER, DECODE_LONGER = 1.1, 1.08
COUNT = 400


@dataclass(frozen=True)
class Answer:
    """AIConfigurator's: a mix of instances of `cards` cards, and its rate.

    tpot_s, whole_rate: without its factors. ttft_s: the objective it was asked with.
    """

    model: str
    input_tokens: int
    output_tokens: int
    cards: int
    prefill: int
    decode: int
    ttft_s: float
    tpot_s: float
    rate: float
    whole_rate: float

    @property
    def name(self) -> str:
        mix = f"{self.prefill}P {self.decode}D" if self.prefill else "co-located"
        return f"{self.model}, {self.input_tokens}/{self.output_tokens}, {mix}, TP{self.cards}"


def answers() -> list[Answer]:
    found = []
    with ANSWERS.open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            prefill, decode = int(row["prefill"]), int(row["decode"])
            rate = whole = float(row["requests_s"])
            tpot = float(row["found_tpot_ms"]) / 1e3
            if prefill:
                first = prefill * float(row["prefill_requests_s"])
                second = decode * float(row["decode_requests_s"])
                matched = min(first * PREFILL_FACTOR, second * DECODE_FACTOR)
                if not math.isclose(matched, rate, rel_tol=0.01):
                    raise ValueError(f"{ANSWERS}: the factors do not explain {row}")
                whole = min(first * PREFILL_LONGER, second * DECODE_LONGER)
                tpot /= DECODE_LONGER
            found.append(
                Answer(
                    model=row["model"],
                    input_tokens=int(row["input_tokens"]),
                    output_tokens=int(row["output_tokens"]),
                    cards=int(row["cards"]),
                    prefill=prefill,
                    decode=decode,
                    ttft_s=float(row["ttft_ms"]) / 1e3,
                    tpot_s=tpot,
                    rate=rate,
                    whole_rate=whole,
                )
            )
    return found


def simulated(known: Catalogue, answer: Answer) -> float:
    """Requests a second at the same time per token, evenly spaced."""
    site = Site(hbm_cards=answer.cards)
    system: System = "pd-bf16" if answer.prefill else "colocated-mixed"
    fleet = offer(known, KNOWN[answer.model], site, system, answer.prefill, answer.decode).fleet
    requests = [Request(float(i), answer.input_tokens, answer.output_tokens) for i in range(COUNT)]
    objectives = Objectives(answer.ttft_s, answer.tpot_s)
    return goodput.of(
        fleet, requests, objectives, count=COUNT, tolerance=0.005, policy="round_robin"
    ).rate


def main() -> None:
    args = parser(__doc__ or "", timed=False).parse_args()
    known = catalogue.load()
    listed = answers()
    found = [simulated(known, each) for each in track(listed, "mixes", console=console)]
    rows: list[dict[str, Any]] = [
        vars(each)
        | {"simulated": rate, "by_peer": rate / each.rate, "by_whole": rate / each.whole_rate}
        for each, rate in zip(listed, found, strict=True)
    ]
    table(
        "Requests a second: AIConfigurator, and simulated at its time per token",
        ("", "published", "without factors", "simulated", "by published", "by without"),
        [
            (
                f"{each.name}, {each.tpot_s * 1e3:.1f} ms",
                f"{each.rate:.2f}",
                f"{each.whole_rate:.2f}",
                f"{row['simulated']:.2f}",
                f"{row['by_peer']:.3f}",
                f"{row['by_whole']:.3f}",
            )
            for each, row in zip(listed, rows, strict=True)
        ],
    )
    figures = [
        Figure(each.name, abs(row["by_whole"] - 1), 0.1, at_least=False)
        for each, row in zip(listed, rows, strict=True)
    ]
    finish(args, {"rows": rows}, figures)


if __name__ == "__main__":
    main()
