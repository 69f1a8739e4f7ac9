"""An advice in words and numbers."""

from rich.console import Console
from rich.table import Table

from sglang_hma.planner.goodput import Objectives
from sglang_hma.planner.live.advice import ENOUGH, Advice, Need
from sglang_hma.planner.live.history import Histogram
from sglang_hma.planner.live.roles import Ends, Seen

BOUNDS = {
    "passes": "busy with passes",
    "tokens": "computed tokens by the model's times",
    "memory": "KV memory of requests",
    "steps": "tokens at the objective of TPOT",
}


def print_seen(seen: Seen, objectives: Objectives) -> None:
    prefill, decode = seen.prefill, seen.decode
    share = objectives.share
    table = Table(
        title=f"seen in {seen.seconds:.0f} s; objectives: {share:.0%} of requests within "
        f"{objectives.ttft_s:.3g} s and {objectives.tpot_s * 1e3:.3g} ms a token",
        title_justify="left",
    )
    for name in ("", "prefill", "decode"):
        table.add_column(name)
    rows = (
        ("servers", str(len(prefill.servers)), str(len(decode.servers))),
        ("requests/s", f"{prefill.requests_s:.3g}", f"{decode.requests_s:.3g}"),
        ("tokens/s", f"{prefill.tokens_s:,.0f} computed", f"{decode.tokens_s:,.0f} made"),
        ("busy with passes", _shares(prefill.busy), ""),
        ("KV memory of running requests", "", _shares(decode.running)),
        ("KV memory of KV on its way", "", _shares(decode.pending)),
        ("requests that wait for a pass", _ends(prefill.queue), ""),
        ("wait for decode's pages", _ends(prefill.unclaimed), _ends(decode.without_pages)),
        ("wait for their KV", "", _ends(decode.without_kv)),
        ("under way, all of them", "", _ends(decode.under_way)),
        (f"TTFT, {share:.0%} of requests", _latency(decode.ttft, share, objectives.ttft_s), ""),
        (f"TPOT, {share:.0%} of requests", "", _latency(decode.tpot, share, objectives.tpot_s)),
    )
    if seen.routed_s is not None:
        table.add_row("requests/s at the router", f"{seen.routed_s:.3g}", "")
    for row in rows:
        table.add_row(*row)
    Console().print(table)


def notes(seen: Seen) -> list[str]:
    found = [
        f"{name} restarted in this time: what it did before is not in its counters"
        for name in seen.restarted
    ]
    return found + [f"{name} went away in this time: it is not counted" for name in seen.gone]


def verdict(
    advice: Advice | None, seen: Seen, objectives: Objectives, instances: dict[str, str]
) -> list[str]:
    """Each role's arithmetic, then one line that says who is short. instances: what one is made of,
    by role."""
    if advice is None:
        return [
            f"too little to say anything: {seen.decode.requests:.0f} requests finished in "
            f"{seen.seconds:.0f} s, at least {ENOUGH} are needed; look for a longer time"
        ]
    needs = (advice.prefill, advice.decode)
    lines = [_arithmetic(need, advice.growth) for need in needs]
    lines += [_judged(need, instances.get(need.role, "")) for need in needs if need.short]
    if not any(need.short for need in needs):
        spare = [
            f"{need.there - (need.needed or 0)} of {need.there} {need.role} instances to spare"
            for need in needs
            if need.needed and need.needed < need.there
        ]
        lines.append("neither role is short" + (f"; {', '.join(spare)}" if spare else ""))
        late = seen.decode.ttft.within(objectives.ttft_s)
        if late < objectives.share:
            lines.append(
                f"but only {late:.0%} of requests have their first token within "
                f"{objectives.ttft_s:.3g} s: they wait for something else than more instances of "
                "this load, such as bursts (a lower --target), the network or single long prompts"
            )
    return lines


def _judged(need: Need, instance: str) -> str:
    if need.needed is None:
        return (
            f"{need.role} is short: one request alone takes longer than the objective of TPOT, so "
            "no number of such instances keeps it"
        )
    least = "at least " if need.load.at_least else ""
    plural = "s" if need.needed > 1 else ""
    made = f" of {instance}" if instance else ""
    return (
        f"{need.role} is short: {least}{need.needed} instance{plural}{made} would serve this load "
        f"at {need.target:g} utilization, {need.there} {'is' if need.there == 1 else 'are'} there"
    )


def _arithmetic(need: Need, growth: float) -> str:
    load = need.load
    line = f"{need.role}: load {load.instances:.2f} instances ({BOUNDS[load.bound]}"
    if growth:
        line += f", {growth:.0%} more for requests that came and were not finished"
    if load.factor is not None:
        line += f", model's step times x {load.factor:.2f}"
    line += f") / {need.there} there = utilization {need.utilization:.2f}"
    if need.needed is None:
        return line
    least = " at least" if load.at_least else ""
    return f"{line}; / {need.target:g} = {load.instances / need.target:.2f}:{least} {need.needed}"


def _shares(values: tuple[float, ...] | None) -> str:
    return "not told" if values is None else ", ".join(f"{value:.0%}" for value in values)


def _ends(ends: Ends) -> str:
    return f"{ends[0]:.0f} -> {ends[1]:.0f}"


def _latency(histogram: Histogram, share: float, limit: float) -> str:
    if not histogram.count:
        return "not told: none was streamed"
    at = histogram.quantile(share)
    shown = f"{at:.3g} s" if at >= 1 else f"{at * 1e3:.3g} ms"
    return f"{shown}; {histogram.within(limit):.0%} within {limit:.3g} s"
