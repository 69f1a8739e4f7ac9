"""Serve a tiny random model of each MHA/GQA family, native and in BFP8, beside transformers.

A family works if the logprobs of its BFP8 server are those of transformers in float64 with the same
formats. Its native server is SGLang's own and is compared with transformers as they are.
"""

import json
import random
import shutil
import tempfile
import zlib
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.progress import Progress

from benchmark.common import Figure, console, finish, parser, table
from benchmark.models.checkpoint import make_checkpoint
from benchmark.models.families import FAMILIES, VOCAB, Family
from benchmark.models.outcome import measure
from benchmark.models.serving import NotServed, serve_both
from benchmark.models.truth import Truth

LENGTHS = (5, 33, 100, 150)  # within a page, a token more, two chunks, behind a window
SEED = 20261127
AT_LEAST = 12


def prompts(seed: int) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(8, VOCAB) for _ in range(length)] for length in LENGTHS]


def try_family(family: Family, folder: Path, seed: int) -> dict[str, Any]:
    """Of docs/benchmarks/models.json; the servers' logs stay in `folder`."""
    found: dict[str, Any] = {"family": family.name, "experts": family.experts}
    checkpoint = folder / "checkpoint"
    truth = Truth(make_checkpoint(family, checkpoint, seed), family.experts)
    found["architecture"] = family.architecture or type(truth.model).__name__
    try:
        native, bfp8 = serve_both(checkpoint, folder, prompts(seed))
    except NotServed as reason:
        verdict = "refused" if reason.refused else "not by SGLang"
        return found | {"verdict": verdict, "reason": str(reason)}
    measured = measure(truth, None if isinstance(native, NotServed) else native, bfp8)
    verdict, reason = measured.verdict()
    if isinstance(native, NotServed):
        reason = "; ".join(filter(None, (reason, str(native))))
    return found | {"verdict": verdict, "reason": reason, "nats": asdict(measured)}


def show(found: list[dict[str, Any]]) -> None:
    def cells(one: dict[str, Any]) -> list[str]:
        nats = one.get("nats")
        if nats is None:
            return ["", "", ""]
        native = nats["native"] and nats["native"]["largest"]
        formats, cost = ((nats[of]["prompt"] + nats[of]["said"]) / 2 for of in ("formats", "cost"))
        return ["" if value is None else f"{value:.1e}" for value in (native, cost, formats)]

    table(
        "nats of a logprob",
        ["family", "outcome", "native, largest", "bfp8", "bfp8 from the formats", ""],
        [[one["family"], one["verdict"], *cells(one), one["reason"]] for one in found],
    )


def in_order(known: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    return [known[family.name] for family in FAMILIES if family.name in known]


def report(seed: int, known: dict[str, dict[str, Any]]) -> dict[str, Any]:
    return {"prompts": LENGTHS, "seed": seed, "families": in_order(known)}


def write(file: Path | None, seed: int, known: dict[str, dict[str, Any]]) -> None:
    """After each family, so that an interrupted run goes on with --update."""
    if file is not None:
        file.write_text(json.dumps(report(seed, known)))


def main() -> None:
    parsing = parser(__doc__ or "", timed=False)
    names = [family.name for family in FAMILIES]
    parsing.add_argument("--only", action="append", choices=names, metavar="FAMILY", default=None)
    parsing.add_argument("--seed", type=int, default=SEED)
    parsing.add_argument(
        "--update", action="store_true", help="of --json FILE keep the families not served now"
    )
    parsing.add_argument("--keep", type=Path, metavar="DIR", help="keep checkpoints and logs there")
    args = parsing.parse_args()
    chosen = [family for family in FAMILIES if args.only is None or family.name in args.only]
    known: dict[str, dict[str, Any]] = {}
    if args.update and args.json is not None and args.json.exists():
        earlier = json.loads(args.json.read_text())["families"]
        known = {one["family"]: one for one in earlier}
    base = args.keep or Path(tempfile.mkdtemp(prefix="hma-models-"))
    with Progress(console=console) as progress:
        bar = progress.add_task("", total=len(chosen))
        for family in chosen:
            progress.update(bar, description=family.name)
            folder = base / family.name.lower().replace(" ", "-").replace("/", "-")
            folder.mkdir(parents=True, exist_ok=True)
            seed = args.seed + zlib.crc32(family.name.encode())
            last = known[family.name] = try_family(family, folder, seed)
            progress.console.print(f"{family.name}: {last['verdict']} {last['reason']}")
            progress.advance(bar)
            write(args.json, args.seed, known)
    if args.keep is None:
        shutil.rmtree(base)
    found = in_order(known)
    show(found)
    working = sum(one["verdict"] == "works" for one in found)
    wrong = sum(one["verdict"] == "wrong" for one in found)
    figures = [Figure("families whose answers are wrong", wrong, 0, False)]
    if args.only is None or args.update:
        figures.append(Figure("families that work", working, AT_LEAST))
    finish(args, report(args.seed, known), figures)


if __name__ == "__main__":
    main()
