# Sourced by the other scripts: uv with pip's configuration, and the Pythons that it finds.
# shellcheck shell=bash disable=SC2034

VERSIONS=(3.12 3.13 3.11) # ttnn has a wheel for the first only

# use_pip_settings PYTHON...: exports what uv should do as the first of these that has pip is configured to do.
use_pip_settings() {
    local python setting
    for python; do
        "$python" -m pip --version >/dev/null 2>&1 || continue
        while read -r setting; do export "${setting?}"; done < <("$python" -m pip config list | "$python" scripts/uv_settings.py)
        break
    done
    export UV_INDEX_STRATEGY=unsafe-best-match UV_NO_PROGRESS=1
}

# find_python UV VERSION...: sets `python` to the first that is there. A version may be the path of a Python.
find_python() {
    local uv=$1 path version
    # uv stops at a version manager's shim that does not run, and does not know pyenv's folder.
    path=$(tr : '\n' <<<"$PATH" | grep -v '/shims$' | paste -sd :)
    path+=$(printf ':%s' "${PYENV_ROOT:-$HOME/.pyenv}"/versions/3.1[123].*/bin)
    for version in "${@:2}"; do
        ! python=$(PATH=$path "$uv" python find --system --no-project --no-python-downloads "$version" 2>/dev/null) || return 0
    done
    return 1
}
