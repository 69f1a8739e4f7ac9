"""What figures are of."""

import os
from pathlib import Path


def machine() -> str:
    """The CPU and how many cores of it there are, as /proc/cpuinfo has them."""
    names = [
        line.partition(":")[2].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith("model name")
    ]
    return f"{names[0] if names else 'unknown CPU'}, {os.cpu_count()} cores"
