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

from benchmark.models.families import HEAD_DIM, HEADS, KV_HEADS, LAYERS
from sglang_hma.prefill.ttnn.shape import ARCHITECTURES
from sglang_hma.seams import SGLANG_VERSION

ROOT = Path(__file__).parent.parent
FIGURES = ROOT / "docs" / "benchmarks" / "models.json"
DOCUMENT = ROOT / "docs" / "models.md"

PAGE = """# Which models serve

Written by `python scripts/models_doc.py` from [what was measured](benchmarks/models.json).
`make models` makes a tiny random model of each family below: {layers} layers, {heads} query and
{kv_heads} KV heads of {head_dim} unless the family has but one number, BF16 weights, and fields
that a runtime could leave out in silence away from their neutral values. It starts a native and a
BFP8 server of it, which do both phases in float32 on a CPU, and asks both for the logprobs of
prompts of {lengths} tokens and of what they say after them. SGLang {version}, {cpu}, {date}.

A family **works** if the BFP8 server's logprobs are those of transformers in float64 with the same
formats: linear weights and experts through numpy's definition of BFP8, routers as they are, K and V
rounded as they are stored. {working} of {all} do. A large model of a family may have fields that
the tiny one has not: SGLang's own limits hold.

{works}

- *prefill, reference* and *decode*: SGLang's own model, on the CPU in this table. What was seen on
  a GPU is in [gpu.md](gpu.md).
- *prefill, ttnn*: the Tenstorrent runtime takes this architecture, seen on the stand-in for ttnn
  and, of some, on the vendor's simulator: [tenstorrent.md](tenstorrent.md). Others are
  refused at start.
- *native*: the largest difference of a native server's logprob from transformers, in nats.
- *BFP8*: the mean one of the BFP8 server's from transformers as they are, in nats: what the formats
  cost a model of random weights, in which experts that are nearly tied change places. Trained ones
  are hurt less: [quality.md](quality.md).
- *from the formats*: the mean one from transformers with the same formats; what is above 1e-05 is a
  last bit that turned a rounding.

As prefill/decode pairs, token for token: Qwen3, Qwen2 and Llama (`test/e2e/test_exact.py`),
Qwen3-MoE and gpt-oss (`test/e2e/test_families.py`).

## Which do not

{others}

- *SGLang differs*: its own model, without any of our formats, is not what transformers computes, so
  nothing is said here about ours.
- *refused*: by `launch_server`, in this line.
- *not by SGLang*: the server fails on a CPU in SGLang's own code.

Not tried: families whose code comes with the checkpoint, which transformers cannot build; MLA and
state-space models, which are refused; models that read more than text.
"""

EXAONE = "SGLang norms Q and K with an epsilon of 1e-06, the model with its rms_norm_eps"
NOTES = {
    "EXAONE 4": EXAONE,
    "EXAONE 4, windows": EXAONE,
    "Gemma": "SGLang computes the exact GELU, the model has its tanh approximation",
    "Phi": "SGLang leaves out the bias of the LM head",
    "Cohere 2 (Command R7B)": "SGLang's window is one token longer than the model's; prompts "
    "within the window are right",
}


def table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    lines = [head, tuple("---" for _ in head), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def reason(one: dict[str, Any]) -> str:
    return "; ".join(filter(None, (one["reason"], NOTES.get(one["family"])))).replace("|", "\\|")


def mean(distance: dict[str, float]) -> float:
    return (distance["prompt"] + distance["said"]) / 2


def working(one: dict[str, Any]) -> tuple[str, ...]:
    nats = one["nats"]
    return (
        one["family"] + (f", {one['experts']} experts" if one["experts"] else ""),
        f"`{one['architecture']}`",
        "yes",
        "yes" if one["architecture"] in ARCHITECTURES else "",
        "yes",
        "CPU",
        f"{nats['native']['largest']:.0e}" if nats["native"] else "",
        f"{mean(nats['cost']):.3f}",
        f"{mean(nats['formats']):.0e}",
        reason(one),
    )


def other(one: dict[str, Any]) -> tuple[str, ...]:
    return one["family"], f"`{one['architecture']}`", one["verdict"], reason(one)


WORKS = (
    *("family", "architecture", "prefill, reference", "prefill, ttnn", "decode", "seen on"),
    *("native", "BFP8", "from the formats", ""),
)


def page(figures: dict[str, Any]) -> str:
    found = figures["families"]
    works = [one for one in found if one["verdict"] == "works"]
    others = [one for one in found if one["verdict"] != "works"]
    return PAGE.format(
        **{"layers": LAYERS, "heads": HEADS, "kv_heads": KV_HEADS, "head_dim": HEAD_DIM},
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
