#!/usr/bin/env bash
# Runs the kernel tests of AVX-512 and AVX512_BF16 on the machine code of the ordinary build, in
# Bochs' Sapphire Rapids (the package bochscpu-python): for machines without either.
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."
VENV_PYTHON=${VENV:-.venv}/bin/python
BUILD=build/emulate
PACKAGE=bochscpu-python==0.4.0

skip() { echo "emulate: skipped: $1"; exit 0; }

case $VENV_PYTHON in /*) ;; *) VENV_PYTHON=$PWD/$VENV_PYTHON ;; esac
[ "$(uname -m)" = x86_64 ] || skip "the CPU is $(uname -m), and what is emulated is an x86_64"
mkdir -p "$BUILD"
[ -d "$BUILD/python/bochscpu" ] ||
    "$(dirname "$VENV_PYTHON")/uv" pip install --quiet --python "$VENV_PYTHON" --no-deps \
        --target "$BUILD/python" "$PACKAGE" || skip "$PACKAGE could not be installed"
"${CC:-cc}" -shared -fPIC -O1 -o "$BUILD/preload.so" test/emulation/preload.c -ldl

"$VENV_PYTHON" -m cmake -S . -B "$BUILD" -G Ninja -DCMAKE_BUILD_TYPE=Release \
    -DCMAKE_MAKE_PROGRAM="$(dirname "$VENV_PYTHON")/ninja" \
    -DPython_EXECUTABLE="$VENV_PYTHON" -DHMA_EMULATE=ON >"$BUILD/configure.log" ||
    { tail -n 20 "$BUILD/configure.log"; exit 1; }
"$VENV_PYTHON" -m cmake --build "$BUILD"

# test_threads.py starts processes of the installed build; one thread, as there is one emulated CPU.
HMA_BOCHSCPU=$(echo "$PWD/$BUILD"/python/bochscpu/_bochscpu*.so) \
    HMA_TEST_EXTENSION=$(echo "$PWD/$BUILD"/_ext*.so) \
    LD_PRELOAD=$PWD/$BUILD/preload.so PYTHONPATH=$PWD/$BUILD/python:$PWD/test/emulation \
    OMP_NUM_THREADS=1 "$VENV_PYTHON" -m pytest -p bochs -p no:cacheprovider -o timeout=0 \
    test/kernels --ignore test/kernels/test_threads.py -k avx512 "$@"
