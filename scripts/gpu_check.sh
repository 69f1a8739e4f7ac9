#!/usr/bin/env bash
# Everything that one bare CUDA machine can say of the kernels, in one call of a few minutes:
#
#   scripts/gpu_check.sh OUT [PIECES]
#
# It needs no network and no virtual environment: python3 (or PYTHON=) with torch, Triton, pytest,
# hypothesis and numpy, nvcc, and in the folder PIECES the group kernel-checks of gpu_wheels.sh:
# FlashInfer, xxhash, rich and matplotlib, where that python3 lacks them. OUT gets summary.txt, the
# benchmarks' JSON and plot, and logs.tar.gz, also when a part fails or is cut off. Each part has its
# own limit; those that failed are named in the last line and make the exit code 1. TESTS= are the
# tests to run, BENCH_ARGS= go to the decode benchmark; nothing is timed before the processes in
# AFTER= have ended.
set -uo pipefail

OUT=$(realpath -m "${1:?where the results go}")
PIECES=${2:+$(realpath -m "$2")}
cd "$(dirname "${BASH_SOURCE[0]}")/.."
PYTHON=${PYTHON:-python3}
WORK=$(mktemp -d)
LOGS=$WORK/logs
mkdir -p "$OUT" "$LOGS"
export PYTHONPATH=$PWD:$PWD/python:$WORK/site:${PYTHONPATH:-} PYTHONUNBUFFERED=1
export XDG_CACHE_HOME=$WORK/cache TRITON_CACHE_DIR=$WORK/triton FLASHINFER_WORKSPACE_BASE=$WORK
export HMA_TEST_SEED=${HMA_TEST_SEED:-$RANDOM$RANDOM} COLUMNS=160
BENCH_ARGS=${BENCH_ARGS:-}
BEGAN=$SECONDS

FAILED=()
say() { echo "$*" | tee -a "$OUT/summary.txt"; }

part() { # part NAME LIMIT COMMAND...
	local name=$1 limit=$2 start=$SECONDS status=0
	shift 2
	timeout -k 5 "$limit" "$@" >"$LOGS/$name.log" 2>&1 || status=$?
	say "$name: exit $status after $((SECONDS - start)) s ($((SECONDS - BEGAN)) s since the start)"
	((status == 0)) || FAILED+=("$name")
	return "$status"
}

finish() {
	tar -C "$WORK" -czf "$OUT/logs.tar.gz" logs
	say "all: $((SECONDS - BEGAN)) s; failed: ${FAILED[*]:-nothing}"
	rm -rf "$WORK"
	exit $((${#FAILED[@]} > 0))
}
trap finish EXIT

: >"$OUT/summary.txt"
say "HMA_TEST_SEED=$HMA_TEST_SEED"
nvidia-smi --query-gpu=name,driver_version,memory.total,clocks.sm,clocks.mem --format=csv,noheader 2>/dev/null | tee -a "$OUT/summary.txt" ||
	say "no GPU: nvidia-smi shows none"
nvcc --version 2>/dev/null | tail -2 | head -1 | tee -a "$OUT/summary.txt" || say "no nvcc in PATH: prebuilt kernels, or Triton"
"$PYTHON" -c 'import torch, triton, pytest; print(f"torch {torch.__version__}, Triton {triton.__version__}, pytest {pytest.__version__}")' 2>&1 | tail -n 1 | tee -a "$OUT/summary.txt"
if [[ -n $PIECES ]]; then
	part wheels 90 "$PYTHON" scripts/gpu_unpack.py "$PIECES" "$WORK" --groups kernel-checks
	tee -a "$OUT/summary.txt" <"$LOGS/wheels.log"
fi

# FlashInfer compiles while the tests run.
part peers 300 "$PYTHON" -m benchmark.kernels.decode_attention_gpu --build $BENCH_ARGS &
PEERS=$!

# A pytest of any age, and nothing of the whole project's tests: those need SGLang.
cat >"$WORK/pytest.ini" <<INI
[pytest]
pythonpath = $PWD/test/kernels
markers =
    slow: takes more than about ten seconds
INI
TEST=("$PYTHON" -m pytest -c "$WORK/pytest.ini" --rootdir "$PWD" --confcutdir test/gpu -p no:cacheprovider -q -ra)
PARALLEL=()
"$PYTHON" -c 'import xdist' 2>/dev/null && PARALLEL=(-n 8)
part tests 240 "${TEST[@]}" "${PARALLEL[@]}" --durations 8 ${TESTS:-test/gpu}
grep -E '^(FAILED|ERROR)|passed|failed' "$LOGS/tests.log" | tail -40 | tee -a "$OUT/summary.txt"
wait "$PEERS" || {
	FAILED+=(peers)
	tail -n 1 "$LOGS/peers.log" | tee -a "$OUT/summary.txt"
}
grep -i 'left out' "$LOGS/peers.log" | tee -a "$OUT/summary.txt"

for process in ${AFTER:-}; do tail --pid "$process" -f /dev/null; done
part decode 200 "$PYTHON" -m benchmark.kernels.decode_attention_gpu --rounds 7 \
	--json "$OUT/decode_attention_gpu.json" --plot "$OUT/decode_attention_gpu.svg" $BENCH_ARGS
tee -a "$OUT/summary.txt" <"$LOGS/decode.log"
part model 60 "$PYTHON" -m benchmark.kernels.schedule_model --measured "$OUT/decode_attention_gpu.json"
tee -a "$OUT/summary.txt" <"$LOGS/model.log"
part instructions 60 "$PYTHON" -m benchmark.kernels.sass --check --architectures 90 --json "$OUT/sass.json"
tee -a "$OUT/summary.txt" <"$LOGS/instructions.log"
part memory 60 "$PYTHON" -m benchmark.kernels.memory_gpu --rounds 7 --json "$OUT/memory_gpu.json"
tee -a "$OUT/summary.txt" <"$LOGS/memory.log"

if command -v ncu >/dev/null; then
	for kernel in hma_decode_kernel _partial; do
		part "ncu$kernel" 60 ncu --clock-control none -k "regex:$kernel" -s 2 -c 1 --set full \
			"$PYTHON" -m benchmark.kernels.gpu_profile
		grep -E 'Duration|DRAM Throughput|Issue Slots Busy|Registers Per|Achieved Occ|Theoretical Occ|L2 Hit|No Eligible|Executed Ipc Active|Elapsed Cycles|SM Frequency' \
			"$LOGS/ncu$kernel.log" | tee -a "$OUT/summary.txt"
	done
fi
if command -v compute-sanitizer >/dev/null; then
	for tool in memcheck racecheck; do
		PYTORCH_NO_CUDA_MEMORY_CACHING=1 part "$tool" 75 compute-sanitizer --tool "$tool" --error-exitcode 7 \
			"${TEST[@]}" test/gpu/test_cuda_decode.py -k 'same_bits or nothing_to_see'
		tail -3 "$LOGS/$tool.log" | tee -a "$OUT/summary.txt"
	done
fi
