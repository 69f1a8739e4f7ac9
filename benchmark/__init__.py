"""Benchmarks, one folder a question; each runs as `python -m benchmark.<folder>.<name> --help`."""

import os

# Before torch is imported: OpenMP's idle threads would spin on the cores that the next candidate
# of a round needs. The servers run with it too.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
