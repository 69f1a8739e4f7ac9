#!/usr/bin/env bash
# Makes the virtual environment that every make target runs in, and does nothing when it is up to date.
#
#   VENV=.venv          where it goes
#   REQUIREMENTS=cpu    which list of requirements/ it gets: cpu or cuda
#   PYTHON=             3.11, 3.12, 3.13 or the path of one; default: the first found, 3.12 before the others
#   UV_CACHE_DIR=       keeps what is downloaded, for the next environment
set -euo pipefail

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
cd "$ROOT"
REQUIREMENTS=${REQUIREMENTS:-cpu} PYTHON=${PYTHON:-} VENV=${VENV:-.venv}
[[ $VENV == /* ]] || VENV=$ROOT/$VENV
LOG=$VENV/setup.log STAMP=$VENV/setup.stamp INCOMPLETE=$VENV/setup.incomplete BOOTSTRAP=$VENV/bootstrap
LISTS=("requirements/$REQUIREMENTS.txt" requirements/build.txt requirements/dev.txt)
NEED_GB=8
LIBRARIES=(libibverbs.so.1 libnuma.so.1 libcurl.so.4) # what Mooncake's engine links to
LIBRARY_PACKAGES='libibverbs1 libnuma1 libcurl4'
NETWORK="check the network, the proxy and pip's index-url"
# shellcheck source=scripts/uv.sh
source scripts/uv.sh

die() {
    printf 'setup: %s\n' "$*" >&2
    exit 1
}

fingerprint() {
    { echo "$ROOT $REQUIREMENTS" && cat "${LISTS[@]}" pyproject.toml CMakeLists.txt hma_kernels/cpu/src/* \
        scripts/{setup.sh,uv.sh,uv_settings.py}; } | sha256sum
}

# Whether the environment was once finished, with the PYTHON= that is asked for, and not changed by halves since.
whole() {
    [[ -s $STAMP && ! -e $INCOMPLETE && -x $VENV/bin/python && (-z $PYTHON || $PYTHON == "$(tail -n 1 "$STAMP")") ]]
}

up_to_date() {
    whole && [[ $(fingerprint) == "$(head -n 1 "$STAMP")" ]]
}

# step TITLE COMMAND...: runs COMMAND with its output in the log, a dot every few seconds.
step() {
    local start=$SECONDS status=0 dots
    printf 'setup: %s ' "$1"
    printf '\n== %s\n' "$1" >>"$LOG"
    while sleep 5 >/dev/null 2>&1; do printf .; done 9<&- &
    dots=$!
    trap 'kill "$dots" 2>/dev/null || true' EXIT
    "${@:2}" >>"$LOG" 2>&1 </dev/null || status=$?
    kill "$dots"
    wait "$dots" 2>/dev/null || true
    trap - EXIT
    if ((status)); then echo ' failed'; else echo " $((SECONDS - start)) s"; fi
    return "$status"
}

# failed WHAT REMEDY: says in one line why the last step failed, and stops.
failed() {
    local text reason remedy=$2
    text=$(awk '/^== / { text = "" } { text = text $0 "\n" } END { printf "%s", text }' "$LOG")
    if grep -qiE 'no space left|os error 28' <<<"$text"; then
        remedy="free some disk: $NEED_GB GB are needed"
    elif [[ -s $STAMP ]]; then
        rm -f "$INCOMPLETE" # uv changes nothing before it has everything
    fi
    reason=$(grep -iE '^ *(error|cause|E)\b|error:' <<<"$text" | tail -n 2 | tr -s ' \n' ' ' | cut -c -300 || true)
    die "$1 failed: ${reason:-no reason given }($remedy; log: $LOG)"
}

can_apt() {
    ((EUID == 0)) && type -P apt-get >/dev/null
}

# apt_install PACKAGE...: as a step.
apt_install() {
    step "installing $*" sh -c 'apt-get update && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends "$@"' sh "$@"
}

# Sets `uv`: the environment's own, the one on PATH, or one that pip installs.
ensure_uv() {
    local maker
    for uv in "$VENV/bin/uv" "$(type -P uv)" "$BOOTSTRAP/bin/uv"; do
        ! "$uv" --version >/dev/null 2>&1 || return 0
    done
    for maker in python3 "${VERSIONS[@]/#/python}" ''; do
        ! "$maker" -c 'import ensurepip, venv' >/dev/null 2>&1 || break
    done
    if [[ -z $maker ]]; then
        can_apt || die 'no uv, and no python3 with its venv module: run sudo apt-get install -y python3-venv, or install uv'
        apt_install python3-venv || failed apt-get "$NETWORK, or install uv"
    fi
    step 'installing uv' pip_install_uv "${maker:-python3}" || failed 'pip install uv' "$NETWORK, or install uv"
    uv=$BOOTSTRAP/bin/uv
}

pip_install_uv() {
    rm -rf "$BOOTSTRAP"
    "$1" -m venv "$BOOTSTRAP" &&
        "$BOOTSTRAP/bin/python" -m pip install --no-input --retries 1 "$(grep ^uv= requirements/build.txt)"
}

# Sets `python`: what the environment is made with.
ensure_python() {
    local wanted=("${VERSIONS[@]}")
    [[ -z $PYTHON ]] || wanted=("$PYTHON")
    find_python "$uv" "${wanted[@]}" ||
        { can_apt && apt_install python3-venv && find_python "$uv" "${wanted[@]}"; } ||
        { step "downloading Python ${wanted[0]}" "$uv" python install "${wanted[0]}" && find_python "$uv" "${wanted[0]}"; } ||
        failed "no Python ${PYTHON:-3.11, 3.12 or 3.13} is installed, and its download" \
            'install one, or name it with PYTHON=/path/to/python'
}

missing_packages() {
    "$python" -c 'import ctypes, sys; [ctypes.CDLL(name) for name in sys.argv[1:]]' "${LIBRARIES[@]}" 2>/dev/null ||
        echo "$LIBRARY_PACKAGES"
    "${CXX:-c++}" -std=c++20 -x c++ -fsyntax-only - <<<'#include <span>' >/dev/null 2>&1 || echo g++
    "$python" -c 'import os, sys, sysconfig
if not os.path.exists(sysconfig.get_path("include") + "/Python.h"): print("python%d.%d-dev" % sys.version_info[:2])'
}

# Sets `cmake`: whether hma_kernels.cpu can be built. Without it everything works, but slower.
ensure_system() {
    local missing
    missing=$(missing_packages | xargs)
    if [[ -n $missing ]] && can_apt; then
        # shellcheck disable=SC2086
        apt_install $missing || [[ $missing != *libnuma1* ]] || failed apt-get "install $missing"
        missing=$(missing_packages | xargs)
    fi
    [[ $missing != *libnuma1* ]] || die "missing system libraries: run sudo apt-get install -y $missing"
    [[ -z $missing ]] || without_kernels "install $missing (sudo apt-get install -y $missing) and run this again"
}

without_kernels() {
    cmake=false
    echo "setup: no C++ kernels, so attention on the CPU will be many times slower: $1"
}

pip_install() {
    "$uv" pip install --python "$VENV/bin/python" --no-deps "$@"
}

install_project() {
    local project=(--no-build-isolation --editable .)
    if [[ $cmake == true ]]; then
        step 'installing sglang-hma, building its C++ kernels' pip_install "${project[@]}" && return
        without_kernels "they could not be built (log: $LOG)"
    fi
    step 'installing sglang-hma' pip_install --config-settings wheel.cmake=false "${project[@]}" ||
        failed 'the installation' 'the log says more'
}

# Proves the installation, and writes the bytecode of what a server imports: it starts several processes.
import_sglang() {
    env -u PYTHONDONTWRITEBYTECODE "$VENV/bin/python" -W ignore -c '
import mooncake.engine, sglang.srt.entrypoints.http_server, sglang.srt.managers.scheduler
import sglang.srt.models.registry, sglang.bench_serving, sglang_router.launch_router'
}

[[ -f ${LISTS[0]} ]] || die "REQUIREMENTS=$REQUIREMENTS: there is no ${LISTS[0]}; use cpu or cuda"
[[ $PYTHON =~ ^(3\.1[123])?$ || $("$PYTHON" -V 2>/dev/null) == 'Python 3.1'[123].* ]] ||
    die "PYTHON=$PYTHON is not supported: name 3.11, 3.12 or 3.13, or the path of one"
! up_to_date || exit 0
[[ ! -d $VENV || -e $STAMP || -e $INCOMPLETE || -z $(ls -A "$VENV") ]] ||
    die "VENV=$VENV exists and was not made by $0: remove it, or name another folder"
exec 9<"$ROOT"
if ! flock -n 9; then
    echo 'setup: waiting for another set-up of this folder to finish'
    flock 9
    ! up_to_date || exit 0
fi
uv='' python=$VENV/bin/python cmake=true
whole || { mkdir -p "$VENV" && touch "$INCOMPLETE"; }
rm -f "$LOG"
if [[ -e $INCOMPLETE ]]; then
    free_gb=$(df -Pk "$VENV" | awk 'NR == 2 { print int($4 / 1048576) }')
    ((free_gb >= NEED_GB)) ||
        die "$free_gb GB free for $VENV, $NEED_GB GB are needed: free some, or put it elsewhere with VENV=/path"
    # An interrupted run may have left half a package. Its downloads are whole.
    find "$VENV" -mindepth 1 -maxdepth 1 ! -path "$VENV/cache" ! -path "$BOOTSTRAP" ! -path "$LOG" \
        ! -path "$INCOMPLETE" -exec rm -rf {} +
fi
ensure_uv
use_pip_settings "$VENV/bin/python" "$BOOTSTRAP/bin/python" python3
export UV_CACHE_DIR=${UV_CACHE_DIR:-$VENV/cache}
[[ ! -e $INCOMPLETE ]] || ensure_python
ensure_system
if [[ -e $INCOMPLETE ]]; then
    step "making ${VENV#"$ROOT"/} with $("$python" -V)" "$uv" venv --allow-existing --python "$python" "$VENV" ||
        failed 'uv venv' 'the log says more'
fi
touch "$INCOMPLETE"
step "installing requirements/$REQUIREMENTS.txt" pip_install "${LISTS[@]/#/-r}" || failed 'the installation' "$NETWORK"
changed=$(grep -c '^ [+] ' "$LOG" || true)
install_project
((changed == 0)) || step 'importing SGLang' import_sglang || failed 'importing SGLang' 'the log says more'
rm -f "$STAMP"
printf '%s\n' "$(fingerprint)" "$PYTHON" >"$STAMP"
rm -rf "$INCOMPLETE" "$VENV/cache" "$BOOTSTRAP"
echo "setup: done in $SECONDS s"
