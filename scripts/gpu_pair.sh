#!/usr/bin/env bash
# A real pair on one bare CUDA machine, in one call of at most LIMIT= (150) s: prefill on its CPU, decode on its GPU.
#
#   scripts/gpu_pair.sh OUT PIECES [arguments of benchmark.serving.gpu_pair]
#
# It needs no network and no virtual environment: python3 (or PYTHON=) with torch and transformers, and in
# the folder PIECES what scripts/gpu_wheels.sh has made. Of its groups only `servers` is needed; what another
# one brings is left out where it is missing or does not load, in one line. A GPU's server takes the Mooncake of
# `mooncake-cuda`, the others the non-CUDA one of `servers`. Each pair has a router before it.
# OUT gets pair_summary.txt and pair_logs.tar.gz, also when a part fails; then the exit code is not 0.
set -uo pipefail

OUT=$(realpath -m "${1:?where the results go}")
PIECES=$(realpath -m "${2:?the folder of scripts/gpu_wheels.sh}")
shift 2
cd "$(dirname "${BASH_SOURCE[0]}")/.."
PYTHON=${PYTHON:-python3}
WORK=$(mktemp -d)
LOGS=$WORK/pair_logs
SITE=$WORK/site
SUMMARY=$OUT/pair_summary.txt
mkdir -p "$OUT" "$LOGS"
BEGAN=$SECONDS

say() { echo "$*" | tee -a "$SUMMARY"; }

finish() {
	local status=$?
	{
		for log in "$LOGS"/*.log; do
			echo "--- $(basename "$log")"
			grep -nE 'Traceback|Error|error:|kernels:|sglang_hma' "$log" | cut -c1-300 | head -12
			tail -n 15 "$log" | cut -c1-300
		done
	} >>"$SUMMARY" 2>&1
	tar -C "$WORK" -czf "$OUT/pair_logs.tar.gz" pair_logs
	say "all: $((SECONDS - BEGAN)) s, exit code $status"
	rm -rf "$WORK"
	exit "$status"
}
trap finish EXIT

: >"$SUMMARY"
nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader 2>/dev/null | tee -a "$SUMMARY" ||
	say "no GPU: nvidia-smi shows none"
say "$(nproc) cores, $("$PYTHON" -V), glibc $(ldd --version | head -1 | grep -o '[0-9.]*$')"

# Zip files of what belongs into site-packages; pip would take longer.
timeout 120 "$PYTHON" scripts/gpu_unpack.py "$PIECES" "$WORK" 2>>"$LOGS/wheels.log" | tee -a "$SUMMARY" ||
	say "unpacking: exit code $?; what is there is used"
# This tree's Python over the wheel's; the wheel has the C++ kernels and the entry points.
cp -r hma_kernels python/sglang_hma "$SITE/"
for library in "$WORK"/lib/*; do
	! ldconfig -p | grep -qF "$(basename "$library") " || rm "$library"
done
say "wheels: $((SECONDS - BEGAN)) s; system libraries from there: $(ls "$WORK/lib" | xargs)"

# Once for all servers.
timeout 30 "$PYTHON" -m compileall -q -j 0 "$SITE" >>"$LOGS/wheels.log" 2>&1
say "compiled: $((SECONDS - BEGAN)) s"

# Packages that add folders of theirs to the path do it in files that are read in site-packages alone.
FOLDERS=$(cd "$SITE" && cat ./*.pth 2>/dev/null | while read -r line; do [[ ! -d $line ]] || echo -n "$SITE/$line:"; done)
export PYTHONPATH=$SITE:$FOLDERS$PWD:${PYTHONPATH:-} HMA_PAIR_CUDA_SITE=$WORK/cuda
export LD_LIBRARY_PATH=${LD_LIBRARY_PATH:+$LD_LIBRARY_PATH:}$WORK/lib PYTHONUNBUFFERED=1 COLUMNS=160
export XDG_CACHE_HOME=$WORK/cache TRITON_CACHE_DIR=$WORK/triton HF_HUB_OFFLINE=1 PYTHONFAULTHANDLER=1 SGLANG_HMA_SHARE=2
# The optional extension that tvm_ffi would compile on import serves nobody here.
export TVM_FFI_DISABLE_TORCH_C_DLPACK=1
# SGLang's compiled prefix tree is of the torch that it pins; another one crashes in it.
export SGLANG_UNIFIED_RADIX_TREE_CORE_BACKEND=python
cd "$WORK" # python -m looks here first, and the tree has no compiled kernels

# loads MODULE...: whether this python3 imports them; else `reason` is its last word.
loads() {
	local status=0
	reason=$(timeout 90 "$PYTHON" -W ignore -c "import $(IFS=,; echo "$*")" 2>&1) || status=$?
	((status)) || return 0
	reason=$(grep -v '^ *$' <<<"$reason" | tail -n 1 | cut -c1-200)
	reason=${reason:-exit code $status of python3, importing $*}
	return 1
}
if ! loads sglang mooncake.engine; then
	say "no pair: $reason; the group servers of scripts/gpu_wheels.sh is needed"
	exit 1
fi
if [[ ! -d $SITE/sgl_kernel ]]; then
	say "without sgl_kernel: it was not carried"
elif ! loads torch sgl_kernel; then
	say "without sgl_kernel: it does not load: $reason"
	rm -rf "$SITE"/sgl_kernel "$SITE"/sglang_kernel-*
fi
loads sglang_router || say "without a router: $reason"
LEFT=$((${LIMIT:-150} - (SECONDS - BEGAN)))
timeout -k 2 $((LEFT - 6)) "$PYTHON" -m benchmark.serving.gpu_pair --out "$LOGS" --seconds $((LEFT - 14)) "$@" \
	2>"$LOGS/client.log" | tee -a "$SUMMARY"
