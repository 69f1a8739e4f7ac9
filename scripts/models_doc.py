"""Write docs/models.md from docs/benchmarks/models.json, which `make models` measures.

    python scripts/models_doc.py            write it
    python scripts/models_doc.py --check    exit code 1 if it is stale

Only the notes on what SGLang computes otherwise are written by hand, below.
"""

import argparse
import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from sglang_hma.prefill.ttnn.shape import ARCHITECTURES
from sglang_hma.seams import SGLANG_VERSION

ROOT = Path(__file__).parent.parent
FIGURES = ROOT / "docs" / "benchmarks" / "models.json"
DOCUMENT = ROOT / "docs" / "models.md"

PAGE = """# Which models serve

Written by `python scripts/models_doc.py` from [what was measured](benchmarks/models.json): edit
neither by hand. `make models` makes a tiny random model of each family below (2 layers, 4 heads
of 32, BF16 weights; fields that a runtime could leave out in silence are set away from their
neutral values), starts a native and a BFP8 server of it that do both phases, in float32 on a CPU,
and asks both for the logprobs of prompts of {lengths} tokens and of what they say after them.
SGLang {version}, {cpu}, {date}.

A family **works** if every logprob of its native server is that of transformers in float64 within
0.002 nats, and the BFP8 server's are those of transformers with the same formats (numpy's
definition of BFP8 on linear weights and experts, routers as they are, K and V rounded as stored).
{working} of {all} do. Large models of a family may have fields that the tiny one has not:
SGLang's own limits hold.

{works}

- *prefill, reference* and *decode*: SGLang's own model, on the CPU in this table. On a GPU the
  same models run SGLang's kernels and this project's attention; what was seen there is in
  [gpu.md](gpu.md).
- *prefill, ttnn*: the architectures that the Tenstorrent runtime takes, seen on the stand-in for
  ttnn and, of some, on the vendor's simulator: [tenstorrent.md](tenstorrent.md). Others are
  refused at start.
- *bfp8 from native*: mean |difference| of a prompt token's logprob between the two servers, in
  nats; weights this random are hurt more than trained ones ([quality.md](quality.md)).
- *from the formats*: mean |difference| from transformers with the same formats; what is not 0 is
  a last bit that turned a rounding.

## Which do not

{others}

- *SGLang differs*: without any of our formats SGLang's model is not what transformers computes,
  so nothing is said here about ours.
- *refused*: by `launch_server`, in this line.
- *not by SGLang*: its native server, which has none of our formats, fails on a CPU.

Not tried: families whose code comes with the checkpoint (transformers cannot build those), MLA
and state-space models, which are refused, and models that read more than text.
"""

NOTES = {
    "Gemma": "SGLang computes the exact GELU, the model has its tanh approximation",
    "Phi": "SGLang leaves out the bias of the LM head",
    "Cohere 2 (Command R7B)": "SGLang's window is one token longer than the model's; prompts "
    "within the window are right",
}


def table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    lines = [head, tuple("---" for _ in head), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def working(one: dict[str, Any]) -> tuple[str, ...]:
    nats = one["nats"]
    formats = (nats["formats"]["prompt"] + nats["formats"]["said"]) / 2
    return (
        one["family"],
        f"`{one['architecture']}`",
        f"{one['experts']} experts" if one["experts"] else "",
        "yes",
        "yes" if one["architecture"] in ARCHITECTURES else "",
        "yes",
        "CPU",
        f"{nats['between']:.3f}",
        f"{formats:.0e}",
    )


def other(one: dict[str, Any]) -> tuple[str, ...]:
    reason = "; ".join(filter(None, (one["reason"], NOTES.get(one["family"], ""))))
    return one["family"], f"`{one['architecture']}`", one["verdict"], reason.replace("|", "\\|")


WORKS = (
    *("family", "architecture", "", "prefill, reference", "prefill, ttnn", "decode"),
    *("seen on", "bfp8 from native", "from the formats"),
)


def page(figures: dict[str, Any]) -> str:
    found = figures["families"]
    works = [one for one in found if one["verdict"] == "works"]
    others = [one for one in found if one["verdict"] != "works"]
    return PAGE.format(
        lengths=", ".join(map(str, figures["prompts"])),
        version=SGLANG_VERSION,
        cpu=figures["machine"]["cpu"],
        date=figures["machine"]["date"][:10],
        working=len(works),
        all=len(found),
        works=table(WORKS, map(working, works)),
        others=table(("family", "architecture", "outcome", "reason"), map(other, others)),
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing")
    check = parser.parse_args().check
    made = page(json.loads(FIGURES.read_text()))
    if check and (not DOCUMENT.exists() or DOCUMENT.read_text() != made):
        sys.stderr.write("docs/models.md is stale: run python scripts/models_doc.py\n")
        return 1
    if not check:
        DOCUMENT.write_text(made)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
