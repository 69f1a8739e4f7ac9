#!/usr/bin/env bash
# Builds hma_kernels.cpu with AddressSanitizer and UBSan beside the ordinary one, and runs the
# kernel tests on every instruction set this machine has.
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."
VENV_PYTHON=${VENV:-.venv}/bin/python
BUILD=build/sanitize
COMPILER=${CXX:-c++}

case $VENV_PYTHON in /*) ;; *) VENV_PYTHON=$PWD/$VENV_PYTHON ;; esac
mkdir -p "$BUILD"
"$VENV_PYTHON" -m cmake -S . -B "$BUILD" -G Ninja -DCMAKE_BUILD_TYPE=RelWithDebInfo \
    -DCMAKE_MAKE_PROGRAM="$(dirname "$VENV_PYTHON")/ninja" \
    -DPython_EXECUTABLE="$VENV_PYTHON" -DHMA_SANITIZE=address,undefined >"$BUILD/configure.log" ||
    { tail -n 20 "$BUILD/configure.log"; exit 1; }
"$VENV_PYTHON" -m cmake --build "$BUILD"

# The interpreter and torch are not instrumented: the runtime is preloaded, and what they never
# free is no leak of ours.
runtime=$("$COMPILER" -print-file-name=libasan.so)
undefined=$("$COMPILER" -print-file-name=libubsan.so)
LD_PRELOAD="$runtime $undefined" \
    ASAN_OPTIONS=detect_leaks=0:abort_on_error=1 \
    UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1 \
    HMA_TEST_EXTENSION="$(echo "$PWD/$BUILD"/_ext*.so)" \
    "$VENV_PYTHON" -m pytest test/kernels -k "not portable" -p no:cacheprovider "$@"
