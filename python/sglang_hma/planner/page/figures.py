"""The page's charts. The page gives them its own colours of text and grid when it draws them."""

import math
from collections.abc import Iterable
from typing import Any, NamedTuple

import plotly.graph_objects as go

from sglang_hma.planner.page.data import BreakEven, Curve, Distribution, Page, Row, Span, Timeline

COLORS = {
    "colocated": "#7a8794",
    "colocated-mixed": "#4f5a66",
    "pd-bf16": "#3b7cc4",
    "pd-fp8": "#1f97a8",
    "hetero-eager": "#a8862a",
    "hetero-serial": "#d9722b",
    "ours": "#d63f52",
}
DASHES = {
    "colocated-mixed": "dot",
    "pd-bf16": "dash",
    "pd-fp8": "dot",
    "hetero-eager": "dashdot",
    "hetero-serial": "dash",
}
STAGES = (
    ("waits for decode's memory", "#9a7bb5", "arrived", "promised"),
    ("waits for prefill", "#8a94a0", "promised", "prefill"),
    ("prefill", "#d9722b", "prefill", "prefilled"),
    ("waits for decode's next step", "#a8862a", "landed", "first_token"),
    ("decode", "#3b7cc4", "first_token", "finished"),
)
TRANSFER = ("transfer", "#1f97a8", "sending", "landed")
BASES = {"whole": "solid", "cards": "dot"}
BASIS_TITLES = {"whole": "with hosts and NICs", "cards": "cards alone"}
HEIGHT = 380
TICKS = [digit * 10.0**power for power in range(-5, 5) for digit in (1, 2, 5)]
LOGARITHMIC = {"type": "log", "tickvals": TICKS, "ticktext": [f"{tick:g}" for tick in TICKS]}
REFERENCE = {"width": 1, "dash": "dot"}


def figures(page: Page) -> dict[str, go.Figure]:
    """By the id of the element that each is drawn in."""
    setting = page.setting
    possible = [row for row in page.rows if row.mix is not None]
    found = {}
    if possible:
        found["goodput"] = _bars(
            possible,
            [row.rate for row in possible],
            [row.half_width for row in possible],
            "goodput, requests/s",
        )
        found["per-dollar"] = _bars(
            possible,
            [row.per_thousand_usd for row in possible],
            [row.per_thousand_usd_half_width for row in possible],
            "goodput, requests/s for 1,000 USD",
        )
        found["attainment"] = _attainment(page.curves, possible, setting.share)
    if page.distributions is not None:
        systems = page.distributions.systems
        found["ttft"] = _distribution(
            ((each, each.ttft_s) for each in systems), "time to first token, s", setting.ttft_s
        )
        found["tpot"] = _distribution(
            ((each, each.tpot_s) for each in systems), "time per output token, s", setting.tpot_s
        )
    if page.break_even is not None:
        found["break-even"] = _break_even(page.break_even)
    if page.timeline is not None:
        found["timeline"] = _timeline(page.timeline)
    return found


class Key(NamedTuple):
    """An entry of a legend. dash: of a line; None where the mark is an area."""

    name: str
    color: str
    dash: str | None


def legend(figure: go.Figure) -> list[Key]:
    """Of the figure's lines or bars that have a name."""
    keys = []
    for trace in figure.data:
        if trace.name and trace.type == "bar":
            keys.append(Key(trace.name, trace.marker.color, None))
        elif trace.name and trace.line.color:
            keys.append(Key(trace.name, trace.line.color, trace.line.dash))
    return keys


def _figure(x: dict[str, Any], y: dict[str, Any], height: int = HEIGHT, **layout: Any) -> go.Figure:
    axis = {"automargin": True, "zeroline": False, "title_standoff": 8, "title_font_size": 13}
    return go.Figure(
        layout={
            "template": {},
            "height": height,
            "margin": {"l": 8, "r": 16, "t": 8, "b": 8},
            "paper_bgcolor": "rgba(0,0,0,0)",
            "plot_bgcolor": "rgba(0,0,0,0)",
            "font": {"family": "system-ui, sans-serif", "size": 13},
            "showlegend": False,  # the page's own, which keeps its place when the width changes
            "xaxis": axis | x,
            "yaxis": axis | y,
            **layout,
        }
    )


def _reference(figure: go.Figure, *, x: float | None = None, y: float | None = None) -> None:
    """A line across the chart at x or at y."""
    figure.add_shape(
        type="line",
        x0=0 if x is None else x,
        x1=1 if x is None else x,
        y0=0 if y is None else y,
        y1=1 if y is None else y,
        xref="paper" if x is None else "x",
        yref="paper" if y is None else "y",
        line=REFERENCE,
    )


def _bars(rows: list[Row], values: list[float], widths: list[float], title: str) -> go.Figure:
    figure = _figure(
        {"title": {"text": title}, "rangemode": "tozero"},
        {"autorange": "reversed"},
        height=90 + 36 * len(rows),
    )
    figure.add_bar(
        orientation="h",
        x=values,
        y=[row.system for row in rows],
        marker={"color": [COLORS[row.system] for row in rows]},
        error_x={"type": "data", "array": widths, "visible": any(widths), "thickness": 1.5},
        customdata=[[row.title, row.mix, width] for row, width in zip(rows, widths, strict=True)],
        hovertemplate="%{customdata[0]}<br>%{customdata[1]}: %{x:.3g} ± %{customdata[2]:.2g}"
        "<extra></extra>",
    )
    return figure


def _attainment(curves: Iterable[Curve], rows: list[Row], share: float) -> go.Figure:
    figure = _figure(
        {"title": {"text": "request rate, requests/s"}, "rangemode": "tozero"},
        {
            "title": {"text": "requests in time"},
            "tickformat": ".0%",
            "range": [0, 1.02],
        },
    )
    goodput = {row.system: row.rate for row in rows}
    for curve in curves:
        at_goodput = [rate == goodput[curve.system] for rate in curve.rates]
        figure.add_scatter(
            name=curve.system,
            x=curve.rates,
            y=curve.shares,
            mode="lines+markers",
            line=_line(curve.system),
            marker={"size": [11 if at else 5 for at in at_goodput], "opacity": 1},
            customdata=list(zip(curve.least, curve.most, strict=True)),
            hovertemplate="%{y:.1%} at %{x:.3g} requests/s<br>"
            "%{customdata[0]:.1%} to %{customdata[1]:.1%} by seed",
        )
    _reference(figure, y=share)
    return figure


def _line(system: str) -> dict[str, Any]:
    return {"color": COLORS[system], "dash": DASHES.get(system, "solid"), "width": 2}


def _distribution(
    systems: Iterable[tuple[Distribution, list[float]]], title: str, objective: float
) -> go.Figure:
    figure = _figure(
        {"title": {"text": title}, **LOGARITHMIC},
        {"title": {"text": "requests"}, "tickformat": ".0%", "range": [0, 1.02]},
    )
    for each, seconds in systems:
        figure.add_scatter(
            name=each.system,
            x=seconds,
            y=each.shares[: len(seconds)],
            mode="lines",
            line=_line(each.system),
            hovertemplate="%{y:.1%} within %{x:.3g} s",
        )
    _reference(figure, x=objective)
    return figure


def _break_even(found: BreakEven) -> go.Figure:
    """Of the comparison's own efficiency and link; the page's sliders put in others."""
    state = found.states[found.efficiency_at][found.link_at]
    ratio = found.ratios[found.ratio_at]
    figure = _figure(
        {
            "title": {"text": "price of a GDDR card over that of an HBM card"},
            "range": [math.log10(found.ratios[0]), math.log10(found.ratios[-1])],
            **LOGARITHMIC,
        },
        {"title": {"text": "goodput per dollar, ours over theirs"}, **LOGARITHMIC},
    )
    for baseline, basis in found.kinds:
        line = state.line(baseline, basis)
        figure.add_scatter(
            name=f"over {baseline}, {BASIS_TITLES[basis]}",
            meta=f"{baseline} {basis}",
            x=found.ratios,
            y=line.over if line else [],
            mode="lines",
            line={"color": COLORS[baseline], "dash": BASES[basis], "width": 2},
            hovertemplate="%{y:.2f} at a ratio of %{x:.3f}",
        )
    crossings = [line.crossing for line in state.lines if _shown(found, line.crossing)]
    figure.add_scatter(
        name="breaks even",
        meta="crossings",
        x=crossings,
        y=[1.0] * len(crossings),
        mode="markers",
        marker={"size": 9, "symbol": "diamond", "color": "#d63f52"},
        hovertemplate="breaks even at %{x:.3f}<extra></extra>",
    )
    _reference(figure, y=1.0)
    figure.add_shape(  # the slider's; the page moves it
        type="line",
        name="price",
        x0=ratio,
        x1=ratio,
        y0=0,
        y1=1,
        xref="x",
        yref="paper",
        line={"width": 1.5},
    )
    return figure


def _shown(found: BreakEven, ratio: float) -> bool:
    return found.ratios[0] <= ratio <= found.ratios[-1]


def _timeline(found: Timeline) -> go.Figure:
    """Above in each row what servers do, below what the link does. Decode may run out of sight."""
    spans = found.spans
    figure = _figure(
        {
            "title": {"text": "seconds since the first arrival shown"},
            "range": [0, 1.15 * max(span.first_token for span in spans)],
        },
        {
            "title": {"text": "prompt + output tokens"},
            "autorange": "reversed",
            "tickvals": list(range(len(spans))),
            "ticktext": [f"{span.input_tokens:,} + {span.output_tokens:,}" for span in spans],
        },
        height=140 + 24 * len(spans),
        barmode="overlay",
    )
    for stage, offset, width in [*((stage, -0.4, 0.5) for stage in STAGES), (TRANSFER, 0.12, 0.24)]:
        name, color, begin, end = stage
        figure.add_bar(
            name=name,
            orientation="h",
            y=list(range(len(spans))),
            base=[getattr(span, begin) for span in spans],
            x=[getattr(span, end) - getattr(span, begin) for span in spans],
            offset=offset,
            width=width,
            marker={"color": color},
            customdata=[_about(span) for span in spans],
            hovertemplate="%{customdata}<br>%{x:.3g} s from %{base:.4g} s",
        )
    return figure


def _about(span: Span) -> str:
    parts = [f"TTFT {span.first_token - span.arrived:.3g} s"]
    if span.known_tokens:
        parts.append(f"{span.known_tokens:,} tokens of the prompt were cached")
    if span.retractions:
        parts.append(f"retracted {span.retractions} times")
    return ", ".join(parts)
