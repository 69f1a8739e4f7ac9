#!/usr/bin/env bash
# Collects the wheels that scripts/gpu_pair.sh and gpu_check.sh need on a bare CUDA machine without a network:
#
#   scripts/gpu_wheels.sh OUT [--groups servers mooncake-cuda kernel-checks sgl-kernel] [--machine FILE]
#
# OUT gets them in pieces under 60 MB with SHA256SUMS, a tar file a group; scripts/gpu_unpack.py puts them
# together there. `servers` is what a pair cannot do without. What cannot be had is named in one line each.
# The wheels are kept in build/gpu_wheels, for the next time.
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."
exec "${VENV:-.venv}/bin/python" scripts/gpu_wheels.py "$@"
