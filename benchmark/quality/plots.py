"""What compare.py found, as a picture."""

from pathlib import Path

from benchmark.quality.policies import BF16
from benchmark.quality.statistics import Comparison


def plot(path: Path, by_context: dict[int, dict[str, Comparison]], model: str) -> None:
    """Perplexity change and KL of each policy: points of one context's, lines over several."""
    from matplotlib import pyplot

    pyplot.rcParams["svg.hashsalt"] = "hma"
    figure, axes = pyplot.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    contexts = sorted(by_context)
    names = [name for name in by_context[contexts[0]] if name != BF16.name]
    for ax, what, unit, label in (
        (axes[0], "perplexity_change", 100, "perplexity change, %"),
        (axes[1], "kl", 1000, "KL to BF16 a token, millinats"),
    ):
        points = {
            name: [[x * unit for x in getattr(by_context[c][name], what)] for c in contexts]
            for name in names
        }
        if len(contexts) == 1:
            values = [points[name][0] for name in names]
            errors = [[v - low for v, low, _ in values], [high - v for v, _, high in values]]
            middle = [value for value, _, _ in values]
            ax.errorbar(middle, names, xerr=errors, fmt="o", capsize=3)
            ax.invert_yaxis()
            ax.margins(y=0.2)
            ax.set_xlabel(label)
            ax.axvline(0, color="black", linewidth=0.8)
            if max(map(abs, middle)) > 10 * min(map(abs, middle)):
                ax.set_xscale("symlog", linthresh=0.1 if what == "perplexity_change" else 1)
        else:
            for name in names:
                middle, low, high = zip(*points[name], strict=True)
                ax.plot(contexts, middle, marker="o", markersize=3, label=name)
                ax.fill_between(contexts, low, high, alpha=0.2)
            ax.set_xscale("log", base=2)
            ax.set_xlabel("tokens before the scored ones")
            ax.set_ylabel(label)
    if len(contexts) == 1:
        axes[1].set_yticklabels([])
    else:
        axes[0].legend(fontsize="small")
    figure.suptitle(f"{model} against BF16, 95% intervals over documents", fontsize="medium")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
    pyplot.close(figure)
