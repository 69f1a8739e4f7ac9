"""A picture of one prompt's way: layers computing above, groups of layers travelling below.

Reads what a prefill server wrote with --hma-trace and draws the last of its long forward passes.
"""

import argparse
import json
from pathlib import Path
from typing import Any

COMPUTE, SEND = 1, 2


def spans(path: Path) -> list[dict[str, Any]]:
    """The trace's complete events; one that was cut off, or is being written, still reads."""
    written = path.read_text()
    text = written[: written.rindex("\n")].rstrip().rstrip(",")
    return [event for event in json.loads(text.removesuffix("]") + "]") if event["ph"] == "X"]


def last_long_forward(events: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], float, float]:
    """Layers of the last forward pass that is more than half as long as the longest, its begin
    and end in microseconds."""
    forwards: list[list[dict[str, Any]]] = []
    for event in events:
        if event["tid"] == COMPUTE:
            if event["name"] == "layer 0":
                forwards.append([])
            forwards[-1].append(event)
    if not forwards:
        raise SystemExit("timeline: the trace has no forward pass; did a prompt run?")
    lengths = [layers[-1]["ts"] + layers[-1]["dur"] - layers[0]["ts"] for layers in forwards]
    best = [f for f, length in zip(forwards, lengths, strict=True) if length > max(lengths) / 2][-1]
    return best, best[0]["ts"], best[-1]["ts"] + best[-1]["dur"]


def draw(events: list[dict[str, Any]], path: Path) -> None:
    from matplotlib import pyplot

    pyplot.rcParams["svg.hashsalt"] = "hma"
    layers, begin, end = last_long_forward(events)
    sends = [e for e in events if e["tid"] == SEND and begin <= e["ts"] <= end + (end - begin)]
    last = max((e["ts"] + e["dur"] for e in sends), default=end)
    figure, axis = pyplot.subplots(figsize=(9, 2.2), layout="constrained")
    colors = pyplot.get_cmap("viridis")
    for row, row_events in ((1, layers), (0, sends)):
        for event in row_events:
            name = event["name"].removeprefix("layers ").removeprefix("layer ")
            first = 0 if name == "rest" else int(name.split("-")[0])
            axis.broken_barh(
                [((event["ts"] - begin) / 1e6, event["dur"] / 1e6)],
                (row * 1.0 + (0.0 if row else 0.05 * (first % 2)), 0.7),
                facecolors="lightgray" if name == "rest" else colors(first / max(len(layers), 1)),
                edgecolors="white",
                linewidth=0.5,
            )
    axis.axvline((end - begin) / 1e6, color="black", linewidth=0.8, linestyle=":")
    axis.set_yticks([0.35, 1.35], ["on the wire", "computing"])
    axis.set_xlim(0, (max(last, end) - begin) / 1e6 * 1.02)
    axis.set_xlabel("s; one colour a layer, dotted: the forward pass ends")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("trace", type=Path, help="file written by --hma-trace")
    options.add_argument("picture", type=Path, help="file to write (.svg, .png)")
    args = options.parse_args()
    if not args.trace.is_file():
        options.error(f"trace is {args.trace}: no such file; a prefill server writes --hma-trace")
    draw(spans(args.trace), args.picture)


if __name__ == "__main__":
    main()
