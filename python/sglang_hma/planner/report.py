"""What was found, for people and for programs."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import msgspec
from rich.console import Console
from rich.table import Table

from sglang_hma.planner.catalogue import Catalogue, Figure
from sglang_hma.planner.goodput import Objectives
from sglang_hma.planner.measured import Measured
from sglang_hma.planner.recorded import Run
from sglang_hma.planner.replay import Beside
from sglang_hma.planner.search import Answer
from sglang_hma.planner.systems import SYSTEMS, TITLES, Site, System

By = Literal["goodput", "dollar"]


@dataclass(frozen=True)
class Comparison:
    model: str
    trace: str
    site: Site
    objectives: Objectives
    answers: Sequence[Answer]

    def best(self, system: System, by: By) -> Answer | None:
        """None where there is no mix of this system, or none that serves anybody in time."""
        own = [each for each in self.answers if each.offer.system == system]
        own = [each for each in own if each.goodput.possible]
        if not own:
            return None
        return max(own, key=lambda each: each.goodput.rate if by == "goodput" else each.per_dollar)


def print_comparison(found: Comparison, by: By) -> None:
    """One row a system, beside homogeneous PD in BF16, which is the paper's baseline."""
    base = found.best("pd-bf16", by)
    objectives = found.objectives
    table = Table(
        title=f"{found.model}, {found.trace}: {objectives.share:.0%} of requests within "
        f"{objectives.ttft_s:.3g} s and {objectives.tpot_s * 1e3:.3g} ms a token\n"
        f"{found.site.describe()}",
        title_justify="left",
    )
    table.add_column("best mix by " + ("goodput" if by == "goodput" else "goodput per dollar"))
    for name in ("", "price", "requests/s", "per k$", "x PD BF16", "per $", "assumed"):
        table.add_column(name, justify="left" if not name else "right")
    for system in SYSTEMS:
        tried = [each for each in found.answers if each.offer.system == system]
        if not tried:
            continue
        best = found.best(system, by)
        if best is None:
            alone = max(each.goodput.unloaded for each in tried)
            why = f"impossible: alone {alone:.0%} are in time"
            if alone >= objectives.share:
                why += ", in the trace's rhythm too few at any rate"
            table.add_row(TITLES[system], why)
            continue
        figures = best.offer.used
        guessed = sum(figure.kind == "assumed" for figure in figures)
        width = f" +-{best.goodput.half_width:.2g}" if best.goodput.half_width else ""
        table.add_row(
            TITLES[system],
            best.offer.mix,
            f"${best.offer.price_usd:,.0f}",
            f"{best.goodput.rate:.3g}{width}",
            f"{best.per_dollar:.3g}",
            f"{best.goodput.rate / base.goodput.rate:.2f}" if base else "",
            f"{best.per_dollar / base.per_dollar:.2f}" if base else "",
            f"{guessed} of {len(figures)}",
        )
    Console().print(table)


def as_json(found: Comparison) -> bytes:
    return msgspec.json.encode(
        {
            "model": found.model,
            "trace": found.trace,
            "site": found.site,
            "objectives": found.objectives,
            "mixes": [
                {
                    "system": each.offer.system,
                    "prefill": each.offer.prefill,
                    "decode": each.offer.decode,
                    "price_usd": each.offer.price_usd,
                    "cards_usd": each.offer.cards_usd,
                    "watts": each.offer.watts,
                    "goodput": each.goodput,
                    "per_thousand_usd": each.per_dollar,
                    "figures": each.offer.used,
                }
                for each in found.answers
            ],
        }
    )


def print_times(times: Measured) -> None:
    prefill, decode = times.prefill, times.decode
    print(f"step times {times.source}")
    print(
        f"  prefill: {prefill.pass_s * 1e3:.4g} ms a pass, {prefill.token_s * 1e6:.4g} us a token, "
        f"{prefill.pair_s * 1e9:.4g} ns a pair of tokens; {times.overhead_s * 1e3:.4g} ms a "
        "request besides"
    )
    print(
        f"  decode: {decode.step_s * 1e3:.4g} ms a step, {decode.request_s * 1e3:.4g} ms a "
        f"request in it, {decode.seen_s * 1e9:.4g} ns a token that it sees"
    )


def print_beside(run: Run, objectives: Objectives, figures: Sequence[Beside]) -> None:
    table = Table(
        title=f"{run.name}: {len(run.requests)} requests in {run.duration_s:.0f} s; goodput: "
        f"requests/s within {objectives.ttft_s:.3g} s and {objectives.tpot_s * 1e3:.3g} ms a token",
        title_justify="left",
    )
    table.add_column("")
    for name in ("real", "simulated", "error"):
        table.add_column(name, justify="right")
    for each in figures:
        unit = 1 if each.name == "goodput" else 1e3
        table.add_row(
            each.name if unit == 1 else f"{each.name}, ms",
            f"{each.real * unit:.4g}",
            f"{each.simulated * unit:.4g}",
            f"{each.error:+.1%}",
        )
    Console().print(table)


def print_catalogue(catalogue: Catalogue) -> None:
    """Each figure with its kind; the sources are in the file."""

    def text(figure: Figure | None) -> str:
        if figure is None:
            return ""
        spread = f" ({figure.low:g}-{figure.high:g})" if figure.low and figure.high else ""
        return f"{figure.value:g}{spread} {figure.kind}"

    cards = Table(title="cards", title_justify="left")
    for name in ("name", "GB", "GB/s", "TFLOPS", "W", "$"):
        cards.add_column(name)
    for name, card in catalogue.cards.items():
        rates = ", ".join(f"{kind} {figure.value:g}" for kind, figure in card.tflops.items())
        cards.add_row(
            *(name, text(card.memory_gb), text(card.bandwidth_gb_s), rates),
            *(text(card.watts), text(card.price_usd)),
        )
    others = Table(title="hosts, links, efficiencies", title_justify="left")
    for name in ("name", "value", "$", "source"):
        others.add_column(name)
    for name, host in catalogue.hosts.items():
        others.add_row(name, f"{host.watts.value:g} W", text(host.price_usd), host.title)
    for name, link in catalogue.links.items():
        others.add_row(name, f"{link.gb_s.value:g} GB/s", text(link.price_usd), link.title)
    for name, figure in catalogue.efficiencies.items():
        others.add_row(name, text(figure), "", figure.source)
    console = Console()
    console.print(cards)
    console.print(others)
