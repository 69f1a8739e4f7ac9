"""Puts the page together: data, charts, script and style in one file that asks for nothing else."""

import importlib.resources
import json
import math
from typing import Any

import jinja2
import msgspec
from plotly.offline import get_plotlyjs

from sglang_hma.planner.page.data import BreakEven, Line, Page
from sglang_hma.planner.page.figures import COLORS, figures, legend

KINDS = {
    "measured": "by this project",
    "quoted": "by the vendor, or by the project that measured it",
    "second-hand": "by somebody who is neither",
    "inferred": "computed from figures of those kinds",
    "assumed": "nobody's measurement",
}

# Of SVG, for plotly's names.
DASHARRAYS = {"solid": "none", "dash": "7 4", "dot": "2 3", "dashdot": "7 3 2 3"}


def render(page: Page) -> str:
    """The whole file's text."""
    files = importlib.resources.files(__package__)
    environment = jinja2.Environment(
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"significant": significant, "usd": usd}
    drawn = figures(page)
    charts = {name: figure.to_plotly_json() for name, figure in drawn.items()}
    # A chart's element has the height, so that it is there before the chart and with any width.
    heights = {name: chart["layout"].pop("height") for name, chart in charts.items()}
    even = page.break_even
    template = environment.from_string((files / "page.html").read_text(encoding="utf-8"))
    return template.render(
        page=page,
        rows={row.system: row for row in page.rows},
        colors=COLORS,
        kinds=KINDS,
        heights=heights,
        legends={name: legend(figure) for name, figure in drawn.items()},
        dashes=DASHARRAYS,
        chosen=shown(even, even.efficiency_at, even.link_at, even.ratio_at) if even else None,
        style=(files / "page.css").read_text(encoding="utf-8"),
        script=(files / "page.js").read_text(encoding="utf-8"),
        plotly=get_plotlyjs().replace("</script", "<\\/script"),
        data=_embedded(msgspec.to_builtins(page)),
        charts=_embedded(charts),
    )


def _embedded(value: Any) -> str:
    """JSON that can stand in a script element."""
    text = json.dumps(value, allow_nan=False, default=list, separators=(",", ":"))
    return text.replace("<", "\\u003c")


def significant(value: float, digits: int = 3) -> str:
    """Never in powers of ten: 0.0123, 1.23, 12,345."""
    if not value:
        return "0"
    decimals = max(0, digits - 1 - math.floor(math.log10(abs(value))))
    return f"{value:,.{decimals}f}"


def usd(value: float) -> str:
    return f"${value:,.0f}"


def shown(found: BreakEven, efficiency: int, link: int, ratio: int) -> dict[str, Any]:
    """What the break-even section says with its sliders there; page.js has the same words."""
    state, price = found.states[efficiency][link], found.ratios[ratio]
    baselines: dict[str, dict[str, dict[str, str]]] = {}
    for baseline, basis in found.kinds:
        line = state.line(baseline, basis)
        baselines.setdefault(baseline, {})[basis] = {
            "over": f"{line.over[ratio]:.2f}" if line else "–",
            "crossing": crossing(line, found.hbm_usd),
        }
    return {
        "price": f"{price:.3f} ({usd(price * found.hbm_usd)})",
        "efficiency": found.efficiencies[efficiency].label,
        "link": found.links[link].label,
        "mix": (
            f"{state.mixes[ratio]} for {usd(state.usd[ratio])}, "
            f"{significant(state.rates[ratio])} requests/s"
            if state.mixes
            else "none of ours keeps the objectives"
        ),
        "baselines": baselines,
    }


def crossing(line: Line | None, hbm_usd: float) -> str:
    if line is None:
        return "–"
    if line.crossing <= 0:
        return "at no price"
    return f"{line.crossing:.3f} ({usd(line.crossing * hbm_usd)})"
