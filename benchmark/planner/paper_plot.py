"""Ours beside homogeneous serving by the efficiency of its prefill cards, as a picture."""

from pathlib import Path
from typing import Any

from sglang_hma.planner.catalogue import Catalogue

ROWS = (
    ("x_pd", "goodput by homogeneous PD's", 3.2),
    ("x_pd_per_dollar", "per dollar, by homogeneous PD's", 4.8),
    ("x_colocated_per_dollar", "per dollar, by co-located's", None),
)


def plot(path: Path, rows: list[dict[str, Any]], known: Catalogue) -> None:
    """A column a trace, a line a model; the paper's claims as dashed lines."""
    from matplotlib import pyplot

    pyplot.rcParams["svg.hashsalt"] = "hma"
    traces = list(dict.fromkeys(row["trace"] for row in rows))
    models = list(dict.fromkeys(row["model"] for row in rows))
    figure, axes = pyplot.subplots(
        *(len(ROWS), len(traces)),
        figsize=(3.7 * len(traces), 8.5),
        sharex=True,
        sharey="row",
        squeeze=False,
        layout="constrained",
    )
    for line, (what, label, claim) in enumerate(ROWS):
        for column, trace in enumerate(traces):
            ax = axes[line][column]
            for model in models:
                points = sorted(
                    (known.efficiencies[row["efficiency"]].value * 100, row[what])
                    for row in rows
                    if (row["trace"], row["model"], row["system"]) == (trace, model, "ours")
                    and what in row
                )
                if points:
                    ax.plot(*zip(*points, strict=True), marker="o", markersize=3, label=model)
            ax.axhline(1, color="black", linewidth=0.8)
            if claim:
                ax.axhline(claim, color="black", linewidth=0.8, linestyle="--")
            ax.set_xscale("log")
            ax.set_xticks([4, 8.5, 22, 30, 50], ["4", "8.5", "22", "30", "50"])
            ax.minorticks_off()
            if not line:
                ax.set_title(trace, fontsize="medium")
            if not column:
                ax.set_ylabel(label)
    for ax in axes[-1]:
        ax.set_xlabel("p150: reached share of LoFi peak, %")
    axes[0][0].legend(fontsize="small")
    figure.suptitle(
        "One A100 instance and four of p150, beside two of A100; dashed: the paper's claim",
        fontsize="medium",
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
    pyplot.close(figure)
