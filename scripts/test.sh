#!/usr/bin/env bash
# Lint, types and all tests. Those that start servers mostly wait, so they run beside the others,
# and what they said is shown after them.
set -uo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."
PYTHON=${VENV:-.venv}/bin/python
LOG=build/test-e2e.log

mkdir -p build
set -m # a process group of its own, so that its servers end with it
PYTHONUNBUFFERED=1 "$PYTHON" -m pytest test/e2e >"$LOG" 2>&1 </dev/null &
servers=$!
set +m
trap 'kill -INT -- "-$servers" 2>/dev/null; wait' EXIT

failed=0
make --no-print-directory lint || failed=1
"$PYTHON" -m pytest --ignore test/e2e || failed=1
# Triton must be told before it is imported that it interprets.
TRITON_INTERPRET=1 "$PYTHON" -m pytest test/gpu -k 'not compile' || failed=1
echo "test/e2e:"
tail -n +1 -f --pid "$servers" "$LOG"
wait "$servers" || failed=1
trap - EXIT
exit "$failed"
