"""Fleets whose step times are simple enough for a closed form."""

from typing import Any

from sglang_hma.planner.simulation.batch import KVMemory
from sglang_hma.planner.simulation.fleet import Colocated, Disaggregated
from sglang_hma.planner.step_times import Affine

# A prompt token takes a millisecond and a decode step ten.
PLAIN = Affine(token_s=1e-3, step_s=1e-2)
ENDLESS = KVMemory(1e12, 1.0, 1.0)


def pair(**changes: Any) -> Disaggregated:
    """One prefill and one decode instance, a token a byte, a fast link."""
    fields: dict[str, Any] = {
        "prefill_instances": 1,
        "decode_instances": 1,
        "prefill_times": PLAIN,
        "decode_times": PLAIN,
        "decode_memory": ENDLESS,
        "cache_tokens": 0,
        "layers": 4,
        "wire_bytes": 1.0,
        "prefill_links": (1e12,),
        "decode_links": (1e12,),
        "chunk_tokens": 1 << 20,
    }
    return Disaggregated(**(fields | changes))


def boxes(**changes: Any) -> Colocated:
    """One box that does both."""
    fields: dict[str, Any] = {
        "instances": 1,
        "times": PLAIN,
        "memory": ENDLESS,
        "cache_tokens": 0,
        "chunk_tokens": 1 << 20,
    }
    return Colocated(**(fields | changes))
