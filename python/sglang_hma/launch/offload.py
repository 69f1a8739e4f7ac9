"""--hma-offload-threshold auto: which prompts cost a decode server no more than a step does.

A forward pass of T tokens does 2 T operations with each weight and reads it once. Up to
T = operations a second / bytes a second (two bytes a weight) reading takes longer, as in a step
that generates, so a prompt of fewer tokens prolongs a step by one more at most.
"""

import argparse
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass

from sglang_hma.config import Role

ASKS = ("nvidia-smi", "--query-gpu=name", "--format=csv,noheader")
PATIENCE_S = 20.0
NO_CPU = "decode is on a CPU, of which nothing is known"
# By words of the name that the driver gives, the first that fits: dense BF16 TFLOPS and GB/s, from
# NVIDIA's data sheets (RTX PRO 6000: AIConfigurator's), as in the planner's catalogue.
CARDS: Mapping[str, tuple[float, float]] = {
    "H200": (989, 4800),
    "H100": (989, 3350),
    "A100": (312, 2039),
    "L40S": (362, 864),
    "RTX PRO 6000": (468, 1792),
}


@dataclass(frozen=True)
class Offload:
    """Prompts of fewer than `below` tokens are decode's, `because` of this."""

    below: int
    because: str


def offload_to(asked: Mapping[Role, argparse.Namespace]) -> Offload:
    """`asked`: the servers' flags by role."""
    if asked["decode"].device == "cpu":
        return Offload(0, NO_CPU)
    names = cards_here()
    known = {name: tokens for name in names if (tokens := balance(name)) is not None}
    if not names:
        return Offload(0, NO_CPU)
    if unknown := [name for name in names if name not in known]:
        return Offload(0, f"nothing is known of {', '.join(unknown)}")
    name = min(known, key=known.__getitem__)
    return Offload(known[name], f"fewer take {name} no longer than reading the weights")


def cards_here() -> list[str]:
    """Names of this host's NVIDIA cards, each once; none if there is no driver."""
    if shutil.which(ASKS[0]) is None:
        return []
    try:
        said = subprocess.run(ASKS, capture_output=True, text=True, timeout=PATIENCE_S, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    return sorted({line.strip() for line in said.stdout.splitlines()} - {""})


def balance(name: str) -> int | None:
    """Tokens of a BF16 pass in which a card computes as long as it reads weights; None for a card
    of which nothing is known."""
    for words, (tflops, gb_s) in CARDS.items():
        if words in name:
            return int(tflops * 1e12 / (gb_s * 1e9))
    return None
