"""Which kernels a decode server's GPU spends its steps on, from SGLang's own profile of them."""

import gzip
import json
import time
import urllib.request
from dataclasses import dataclass
from pathlib import Path

# Names that begin so are decode attention: ours in CUDA C++ and in Triton, with schedule and merge.
ATTENTION = ("hma_schedule", "hma_decode", "hma_merge", "_partial", "_merge", "_divide")


@dataclass(frozen=True)
class Shares:
    """Of the time between the first kernel's begin and the last one's end."""

    span_s: float
    busy: float  # some kernel runs
    attention: float
    others: tuple[tuple[str, float], ...]  # the longest, by name

    def __str__(self) -> str:
        longest = ", ".join(f"{name} {share:.0%}" for name, share in self.others)
        return (
            f"of {1e3 * self.span_s:.1f} ms of steps kernels run {self.busy:.0%}, decode attention "
            f"{self.attention:.0%}; the longest others: {longest or 'none'}"
        )


def start(url: str, folder: Path, steps: int) -> None:
    """The server writes a trace of its next steps into `folder`. Raises OSError."""
    folder.mkdir(parents=True, exist_ok=True)
    asked = {"output_dir": str(folder), "num_steps": steps, "activities": ["CPU", "GPU"]}
    request = urllib.request.Request(
        f"{url}/start_profile",
        data=json.dumps(asked).encode(),
        headers={"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=30) as reply:
        reply.read()


def wait(folder: Path, seconds: float) -> Path:
    """The trace, once it can be read whole. Raises TimeoutError."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        for path in folder.rglob("*.trace.json.gz"):
            try:
                json.loads(gzip.decompress(path.read_bytes()))
            except (OSError, EOFError, ValueError):
                continue
            return path
        time.sleep(0.5)
    raise TimeoutError(f"no trace in {folder.name} after {seconds:.0f} s")


def shares(trace: Path, longest: int = 4) -> Shares:
    """Raises ValueError if no kernel of a GPU is in it."""
    events = json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
    kernels = sorted(
        (float(event["ts"]), float(event["dur"]), str(event["name"]))
        for event in events
        if event.get("cat") == "kernel" and event.get("ph") == "X"
    )
    if not kernels:
        raise ValueError("no kernel of a GPU is in the trace")
    begin, end = kernels[0][0], max(at + lasts for at, lasts, _ in kernels)
    busy, until = 0.0, begin
    by_name: dict[str, float] = {}
    for at, lasts, name in kernels:
        busy += max(0.0, at + lasts - max(at, until))
        until = max(until, at + lasts)
        by_name[name] = by_name.get(name, 0.0) + lasts
    span = end - begin
    attention = sum(lasts for name, lasts in by_name.items() if name.startswith(ATTENTION))
    others = sorted(
        ((name, lasts) for name, lasts in by_name.items() if not name.startswith(ATTENTION)),
        key=lambda pair: -pair[1],
    )[:longest]
    return Shares(
        span / 1e6,
        busy / span,
        attention / span,
        tuple((name[:60], lasts / span) for name, lasts in others),
    )
