#!/usr/bin/env bash
# A real pair on one bare CUDA machine, in one call of at most LIMIT= (150) s: prefill on its CPU, decode on its GPU.
#
#   scripts/gpu_pair.sh OUT WHEELS [arguments of benchmark.serving.gpu_pair]
#
# It needs no network and no virtual environment: python3 (or PYTHON=) with torch and transformers, and
# in the folder WHEELS what that python3 lacks of requirements/cuda.txt, sglang-hma's own wheel for its
# C++ kernels included. WHEELS/cuda has the Mooncake for the GPU's server, beside a non-CUDA one for the
# others; WHEELS/lib has system libraries that Mooncake links to (libnuma, libibverbs, libmlx5, libcurl),
# used where the machine has none. OUT gets pair_summary.txt and pair_logs.tar.gz, also when a part fails.
set -uo pipefail

OUT=$(realpath -m "${1:?where the results go}")
WHEELS=$(realpath "${2:?the folder of wheels}")
shift 2
cd "$(dirname "${BASH_SOURCE[0]}")/.."
PYTHON=${PYTHON:-python3}
WORK=$(mktemp -d)
LOGS=$WORK/pair_logs
SITE=$WORK/site
SUMMARY=$OUT/pair_summary.txt
mkdir -p "$OUT" "$LOGS" "$SITE" "$WORK/lib"
BEGAN=$SECONDS

say() { echo "$*" | tee -a "$SUMMARY"; }

finish() {
	{
		for log in "$LOGS"/*.log; do
			echo "--- $(basename "$log")"
			grep -nE 'Traceback|Error|error:|kernels:|sglang_hma' "$log" | cut -c1-300 | head -12
			tail -n 15 "$log" | cut -c1-300
		done
	} >>"$SUMMARY" 2>&1
	tar -C "$WORK" -czf "$OUT/pair_logs.tar.gz" pair_logs
	say "all: $((SECONDS - BEGAN)) s"
	rm -rf "$WORK"
}
trap finish EXIT

: >"$SUMMARY"
nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader 2>&1 | tee -a "$SUMMARY"
say "$(nproc) cores, $("$PYTHON" -V), glibc $(ldd --version | head -1 | grep -o '[0-9.]*$')"

# A wheel is a zip file of what belongs into site-packages; pip would take longer.
unpack() { timeout 120 "$PYTHON" -c 'import sys, zipfile
for wheel in sys.argv[2:]:
    zipfile.ZipFile(wheel).extractall(sys.argv[1])' "$@" >>"$LOGS/wheels.log" 2>&1; }
unpack "$WORK/cuda" "$WHEELS"/cuda/*.whl &
unpack "$SITE" "$WHEELS"/*.whl || say "the wheels: exit $?"
wait
# This tree's Python over the wheel's; the wheel has the C++ kernels and the entry points.
cp -r hma_kernels python/sglang_hma "$SITE/"
for library in "$WHEELS"/lib/*; do
	ldconfig -p | grep -qF "$(basename "$library") " || cp "$library" "$WORK/lib/"
done
say "wheels: $((SECONDS - BEGAN)) s; system libraries from there: $(ls "$WORK/lib" | xargs)"

# Once for all servers.
timeout 30 "$PYTHON" -m compileall -q -j 0 "$SITE" >>"$LOGS/wheels.log" 2>&1
say "compiled: $((SECONDS - BEGAN)) s"

export PYTHONPATH=$SITE:$PWD:${PYTHONPATH:-} HMA_PAIR_CUDA_SITE=$WORK/cuda
export LD_LIBRARY_PATH=${LD_LIBRARY_PATH:+$LD_LIBRARY_PATH:}$WORK/lib PYTHONUNBUFFERED=1 COLUMNS=160
export XDG_CACHE_HOME=$WORK/cache TRITON_CACHE_DIR=$WORK/triton HF_HUB_OFFLINE=1 PYTHONFAULTHANDLER=1 SGLANG_HMA_SHARE=2
# The optional extension that tvm_ffi would compile on import serves nobody here.
export TVM_FFI_DISABLE_TORCH_C_DLPACK=1
# SGLang's compiled prefix tree is of the torch that it pins; another one crashes in it.
export SGLANG_UNIFIED_RADIX_TREE_CORE_BACKEND=python
cd "$WORK" # python -m looks here first, and the tree has no compiled kernels
LEFT=$((${LIMIT:-150} - (SECONDS - BEGAN)))
timeout -k 2 $((LEFT - 6)) "$PYTHON" -m benchmark.serving.gpu_pair --out "$LOGS" --seconds $((LEFT - 14)) "$@" \
	2>"$LOGS/client.log" | tee -a "$SUMMARY"
