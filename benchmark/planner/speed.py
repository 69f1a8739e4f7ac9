"""How fast the simulator is, on one core: an hour of a trace, and a fleet of 2,000 cards.

An hour of Mooncake's conversations (12,031 requests with prefix hashes) at its own pace, and
10,000 requests a second for --seconds in 1,400 prefill and 600 decode instances.
"""

import resource
import time
from dataclasses import replace
from typing import Any

from benchmark.common import Figure, finish, parser, table
from benchmark.planner.paper import FOLDER, TRACES
from sglang_hma.planner import catalogue, trace
from sglang_hma.planner.model_shape import KNOWN
from sglang_hma.planner.simulation.fleet import Simulation
from sglang_hma.planner.systems import Site, offer
from sglang_hma.planner.trace import Request, excerpt

HOUR_S = 10.0  # the bar for the hour
FLEET, RATE = (1400, 600), 10_000.0


def simulated(requests: list[Request], prefill: int, decode: int) -> dict[str, Any]:
    found = offer(catalogue.load(), KNOWN["Qwen3-8B"], Site(), "ours", prefill, decode)
    begin = time.process_time()
    jobs = Simulation(requests).run(found.fleet)
    took = time.process_time() - begin
    late = sum(not job.ttft_s <= 2.0 for job in jobs)
    return {
        "requests": len(jobs),
        "prefill": prefill,
        "decode": decode,
        "simulated_s": max(job.finished_at for job in jobs),
        "cpu_s": took,
        "later_than_2_s": late / len(jobs),
        "peak_memory_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6,
    }


def main() -> None:
    options = parser(__doc__ or "", timed=False)
    options.add_argument("--seconds", type=float, default=30.0, help="of the large fleet")
    args = options.parse_args()
    hour = trace.load(FOLDER / TRACES["Mooncake conversation"])
    rows = {"an hour of Mooncake's conversations": simulated(hour, 16, 2)}
    conversation = trace.load(FOLDER / TRACES["Azure conversation"])
    many, _ = excerpt(conversation, 0, int(args.seconds * RATE), RATE)
    rows["10,000 requests/s, 2,000 cards"] = simulated(
        [replace(each, prefix_hashes=()) for each in many], *FLEET
    )
    table(
        "One core",
        ("", "requests", "simulated", "CPU time", "requests/s of it", "late", "peak memory"),
        [
            (
                f"{name}: {row['prefill']}P {row['decode']}D",
                f"{row['requests']:,}",
                f"{row['simulated_s']:.0f} s",
                f"{row['cpu_s']:.1f} s",
                f"{row['requests'] / row['cpu_s']:,.0f}",
                f"{row['later_than_2_s']:.0%}",
                f"{row['peak_memory_gb']:.1f} GB",
            )
            for name, row in rows.items()
        ],
    )
    first = next(iter(rows.values()))
    figures = [Figure("CPU seconds of an hour", first["cpu_s"], HOUR_S, at_least=False)]
    finish(args, {"rows": rows}, figures)


if __name__ == "__main__":
    main()
