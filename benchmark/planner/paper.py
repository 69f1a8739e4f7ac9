"""The paper's table: ours against homogeneous serving, four Qwen3 sizes and three traces.

HMA-Serve (arXiv 2606.29986) claims 3.2 times the goodput of homogeneous prefill and decode on A100,
and 4.8 times its goodput per dollar. Two questions are asked of the simulator:

- the paper's set: one A100 instance and four p150 for it, beside two A100 instances, at each
  efficiency of the p150 that somebody has measured or that is its ceiling;
- equal money: the best mix of each system that a budget buys, at one of them.
"""

import argparse
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.progress import Progress

from benchmark.common import Figure, console, finish, parser, table
from benchmark.planner.paper_plot import plot
from sglang_hma.planner import catalogue, goodput, scaled, search, trace
from sglang_hma.planner.catalogue import Catalogue
from sglang_hma.planner.goodput import Objectives
from sglang_hma.planner.journal import Journal
from sglang_hma.planner.model_shape import KNOWN, ModelShape
from sglang_hma.planner.search import Answer, Budget, Question
from sglang_hma.planner.systems import COLOCATED, Offer, Site, System, offer
from sglang_hma.planner.trace import Request

TRACES = {
    "Azure conversation": "azure2023_conv.csv",
    "Azure code": "azure2023_code.csv",
    "Mooncake conversation": "mooncake_conversation.jsonl.gz",
}
FOLDER = Path(__file__).parent / "traces"
MODELS = ("Qwen3-4B", "Qwen3-8B", "Qwen3-14B", "Qwen3-32B")
# Cards an instance, HBM and GDDR: weights of 32B fill one A100 in BF16 and one p150 in BFP8.
CARDS = {"Qwen3-32B": (2, 2)}
GDDR_INSTANCES = 4
EFFICIENCIES = (
    "tenstorrent-small",
    "tenstorrent-four-chips",
    "tenstorrent-one-chip",
    "tenstorrent-n300",
    "tenstorrent-ceiling",
)
MIDDLE = "tenstorrent-one-chip"
BASELINES: tuple[System, ...] = ("pd-bf16", "pd-fp8")
HETEROGENEOUS: tuple[System, ...] = ("hetero-eager", "hetero-serial")


@dataclass(frozen=True)
class Cell:
    """scale: of the objectives."""

    model: str
    trace: str
    scale: float
    question: Question
    site: Site


def site_of(model: str) -> Site:
    hbm, gddr = CARDS.get(model, (1, 1))
    return Site(hbm_cards=hbm, gddr_cards=gddr)


def cells(args: argparse.Namespace, known: Catalogue) -> Iterator[Cell]:
    for name in args.traces:
        requests = trace.load(args.folder / TRACES[name])
        for model in args.models:
            site = site_of(model)
            once = objectives_of(args, known, KNOWN[model], site, requests)
            for scale in args.scale:
                objectives = replace(once, ttft_s=once.ttft_s * scale, tpot_s=once.tpot_s * scale)
                question = Question(
                    requests, objectives, seeds=args.seeds, count=args.requests, tolerance=0.03
                )
                yield Cell(model, name, scale, question, site)


def objectives_of(
    args: argparse.Namespace,
    known: Catalogue,
    shape: ModelShape,
    site: Site,
    requests: list[Request],
) -> Objectives:
    if args.objectives != "scaled":
        return goodput.NAMED[args.objectives]
    return scaled.objectives(offer(known, shape, site, "colocated", 0, 1).fleet, requests)


def paper_set(known: Catalogue, cell: Cell) -> list[tuple[str, Offer]]:
    """(efficiency, offer) of two HBM instances, or of one and its GDDR cards."""
    shape, site = KNOWN[cell.model], cell.site
    found = [("", offer(known, shape, site, system, 0, 2)) for system in COLOCATED]
    found += [("", offer(known, shape, site, system, 1, 1)) for system in BASELINES]
    for efficiency in EFFICIENCIES:
        systems = (*HETEROGENEOUS, "ours") if efficiency == MIDDLE else ("ours",)
        for system in systems:
            own = replace(site, efficiency=efficiency)
            found.append((efficiency, offer(known, shape, own, system, GDDR_INSTANCES, 1)))
    return found


def equal_money(known: Catalogue, cell: Cell) -> list[tuple[str, Offer]]:
    """For the price of four HBM instances: with each number of decode instances, as many that
    prefill as can be bought."""
    shape, site = KNOWN[cell.model], replace(cell.site, efficiency=MIDDLE)
    budget = Budget(usd=offer(known, shape, site, "pd-bf16", 2, 2).price_usd)
    found: dict[tuple[System, int], Offer] = {}
    for system in (*COLOCATED, "pd-bf16", "ours"):
        for each in search.mixes(known, shape, site, system, budget):
            # Of co-located instances the most, of others the widest.
            key = system, each.decode if each.prefill else 0
            if key not in found or each.price_usd > found[key].price_usd:
                found[key] = each
    return [(MIDDLE if each.system == "ours" else "", each) for each in found.values()]


Part = tuple[Cell, str, Offer]  # what is asked: of a cell, at an efficiency


def ask(parts: list[Part], args: argparse.Namespace, title: str) -> list[dict[str, Any]]:
    """A row of each."""
    with Progress(console=console) as progress:
        task = progress.add_task(title, total=len(parts))
        answers = search.ask_each(
            [(cell.question, each) for cell, _, each in parts],
            processes=args.processes,
            heard=lambda _: progress.advance(task),
            journal=args.journal,
        )
    return [
        row_of(cell, efficiency, answer)
        for (cell, efficiency, _), answer in zip(parts, answers, strict=True)
    ]


def row_of(cell: Cell, efficiency: str, answer: Answer) -> dict[str, Any]:
    return {
        "model": cell.model,
        "trace": cell.trace,
        "scale": cell.scale,
        "system": answer.offer.system,
        "efficiency": efficiency,
        "mix": answer.offer.mix,
        "rate": answer.goodput.rate,
        "half_width": answer.goodput.half_width,
        "by_excerpt": answer.goodput.by_seed,
        "unloaded": answer.goodput.unloaded,
        "price_usd": answer.offer.price_usd,
        "cards_usd": answer.offer.cards_usd,
        "watts": answer.offer.watts,
    }


def compared(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each row beside its cell's homogeneous PD in BF16, and the better of both ways to serve
    co-located."""
    base = {(*place(row), row["system"]): row for row in best_of(rows)}
    for row in rows:
        for name, systems in (("pd", ("pd-bf16",)), ("colocated", COLOCATED)):
            others = [base[(*place(row), system)] for system in systems]
            other = max(others, key=lambda each: each["rate"])
            found = ratio(row["by_excerpt"], other["by_excerpt"])
            if found is None:
                continue
            row[f"x_{name}"], *row[f"x_{name}_interval"] = found
            cheaper = other["price_usd"] / row["price_usd"]
            row[f"x_{name}_per_dollar"] = found[0] * cheaper
            row[f"x_{name}_per_dollar_interval"] = [each * cheaper for each in found[1:]]
            row[f"x_{name}_per_card_dollar"] = found[0] * other["cards_usd"] / row["cards_usd"]
    return rows


def ratio(ours: Sequence[float], others: Sequence[float]) -> tuple[float, float, float] | None:
    """The geometric mean over excerpts, each excerpt's rate by the other's, and its 95% interval.
    None where one of them serves an excerpt at no rate."""
    if not (min(ours) and min(others)):
        return None
    logs = [math.log(a / b) for a, b in zip(ours, others, strict=True)]
    middle, half = goodput.interval(logs)
    return math.exp(middle), math.exp(middle - half), math.exp(middle + half)


def place(row: dict[str, Any]) -> tuple[str, str, float]:
    return row["model"], row["trace"], row["scale"]


def best_of(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The row with the highest rate of each cell and system."""
    found: dict[tuple[Any, ...], dict[str, Any]] = {}
    for row in rows:
        key = *place(row), row["system"]
        if key not in found or row["rate"] > found[key]["rate"]:
            found[key] = row
    return list(found.values())


def show(title: str, rows: list[dict[str, Any]]) -> None:
    def shown(row: dict[str, Any], name: str) -> str:
        if name not in row:
            return ""
        low, high = row.get(f"{name}_interval", (0, 0))
        return f"{row[name]:.2f} [{low:.2f}, {high:.2f}]" if low < high else f"{row[name]:.2f}"

    table(
        title,
        (
            "model, trace, objectives",
            "system",
            "mix",
            "requests/s",
            "x PD",
            "per $",
            "x both",
            "per $",
        ),
        [
            (
                f"{row['model']}, {row['trace']}, x {row['scale']:g}",
                f"{row['system']} {row['efficiency'].removeprefix('tenstorrent-')}".strip(),
                row["mix"],
                f"{row['rate']:.3g} +-{row['half_width']:.2g}" if row["rate"] else "impossible",
                *(
                    shown(row, name)
                    for name in ("x_pd", "x_pd_per_dollar", "x_colocated", "x_colocated_per_dollar")
                ),
            )
            for row in rows
        ],
    )


def options() -> argparse.ArgumentParser:
    result = parser(__doc__ or "", timed=False)
    result.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    result.add_argument("--traces", nargs="+", choices=list(TRACES), default=list(TRACES))
    result.add_argument("--folder", type=Path, default=FOLDER)
    result.add_argument(
        "--objectives",
        choices=(*goodput.NAMED, "scaled"),
        default="scaled",
        help="as planner compare has them",
    )
    result.add_argument(
        "--scale", type=float, nargs="+", default=[1.0], metavar="X", help="of the objectives"
    )
    result.add_argument("--seeds", type=int, default=4, help="excerpts of a trace")
    result.add_argument("--requests", type=int, default=300, help="in an excerpt")
    result.add_argument("--processes", type=int, help="side by side; all cores if not given")
    result.add_argument("--resume", type=Path, metavar="FILE", help="as planner compare has it")
    result.add_argument("--without-money", action="store_true", help="the paper's set only")
    return result


def main() -> None:
    args = options().parse_args()
    args.journal = Journal(args.resume) if args.resume else None
    known, begin = catalogue.load(), time.monotonic()
    asked = list(cells(args, known))

    def parts(of: Callable[[Catalogue, Cell], list[tuple[str, Offer]]]) -> list[Part]:
        return [(cell, *each) for cell in asked for each in of(known, cell)]

    paper = ask(parts(paper_set), args, "the paper's set")
    money = [] if args.without_money else ask(parts(equal_money), args, "equal money")
    elapsed = time.monotonic() - begin
    paper, money = compared(paper), compared(best_of(money))
    show("The paper's set: two A100 instances, or one and four of p150", paper)
    if money:
        show("Equal money: the best mix for the price of four A100 instances", money)
    if args.plot:
        plot(args.plot, [row for row in paper if row["scale"] == args.scale[0]], known)
    print(f"{elapsed:.0f} s")
    ours = [row for row in paper if row["system"] == "ours" and "x_pd" in row]
    figures = [
        Figure("goodput by homogeneous PD's, best cell", max(r["x_pd"] for r in ours), 3.2),
        Figure("per dollar, best cell", max(r["x_pd_per_dollar"] for r in ours), 4.8),
    ]
    report: dict[str, Any] = {"paper": paper, "equal_money": money}
    if not args.resume:  # which answers some of it
        figures.append(Figure("seconds for the table", elapsed, 600, False))
        report["seconds"] = elapsed
    report["objectives"] = [
        {"model": cell.model, "trace": cell.trace, "scale": cell.scale}
        | vars(cell.question.objectives)
        for cell in asked
    ]
    finish(args, report, figures)


if __name__ == "__main__":
    main()
