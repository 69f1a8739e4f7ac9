#!/usr/bin/env bash
# Builds a wheel into dist/ for each supported Python of this machine, as pip would, and loads its C++ kernels.
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."
VENV=${VENV:-.venv}
# shellcheck source=scripts/uv.sh
source scripts/uv.sh
use_pip_settings "$VENV/bin/python"
uv=$VENV/bin/uv
echo "wheels: $("$VENV/bin/python" -m hma_kernels.cuda.cubins --state)"

for version in "${VERSIONS[@]}"; do
    options=(--quiet --wheel --out-dir dist)
    if [[ $("$VENV/bin/python" -V) == "Python $version".* ]]; then
        python=$VENV/bin/python
        options+=(--no-build-isolation) # its kernels are compiled already
    elif ! find_python "$uv" "$version"; then
        echo "wheels: no Python $version here"
        continue
    fi
    rm -f dist/sglang_hma-*-"cp${version/./}"-*.whl
    "$uv" build --python "$python" "${options[@]}"
    wheel=$(echo dist/sglang_hma-*-"cp${version/./}"-*.whl)
    "$uv" venv --quiet --clear --python "$python" "build/wheel-$version"
    "$uv" pip install --quiet --python "build/wheel-$version/bin/python" --no-deps "$wheel"
    "build/wheel-$version/bin/sglang-hma" --version
    # Without torch, so not as hma_kernels.cpu._ext.
    isas=$(cd "build/wheel-$version"/lib/python*/site-packages/hma_kernels/cpu &&
        ../../../../../bin/python -c 'import sys; sys.path.insert(0, "."); import _ext; print(*_ext.available_isas())')
    echo "wheels: $wheel on Python $version: kernels for $isas"
done
