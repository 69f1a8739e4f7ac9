#!/usr/bin/env bash
# Makes the virtual environment that every make target runs in, and does nothing when it is up to date.
#
#   VENV=.venv          where it goes
#   REQUIREMENTS=cpu    which list of requirements/ it gets: cpu or cuda
#   PYTHON=             the Python 3.12 to use; default: the first one found
set -euo pipefail

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
cd "$ROOT"
REQUIREMENTS=${REQUIREMENTS:-cpu}
VENV=${VENV:-.venv}
case $VENV in /*) ;; *) VENV=$ROOT/$VENV ;; esac
VENV_PYTHON=$VENV/bin/python
LOG=$VENV/setup.log
STAMP=$VENV/setup.stamp
INCOMPLETE=$VENV/setup.incomplete
LISTS=("requirements/$REQUIREMENTS.txt" requirements/build.txt requirements/dev.txt)
BUILD_FILES=(pyproject.toml CMakeLists.txt hma_kernels/cpu/src/*)
INSTALLER=uv==0.13.8
NEED_GB=8
SYSTEM_LIBRARIES=(libibverbs.so.1 libnuma.so.1 libcurl.so.4) # what Mooncake's engine links to
SYSTEM_PACKAGES=(libibverbs1 libnuma1 libcurl4)

die() {
    printf 'setup: %s\n' "$*" >&2
    exit 1
}

fingerprint() {
    {
        printf '%s\n' "$ROOT" "$REQUIREMENTS"
        "$VENV_PYTHON" -c 'import sys; print(sys.version)'
        cat "${LISTS[@]}" "${BUILD_FILES[@]}" scripts/setup.sh
    } | sha256sum
}

up_to_date() {
    [[ -s $STAMP && ! -e $INCOMPLETE && -x $VENV_PYTHON ]] || return 1
    [[ $(fingerprint 2>/dev/null) == "$(<"$STAMP")" ]]
}

is_python312() {
    "$1" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 12))' >/dev/null 2>&1
}

python_candidates() {
    type -aP python3.12 python3 python || true
    printf '%s\n' "${PYENV_ROOT:-$HOME/.pyenv}"/versions/3.12*/bin/python3.12 \
        /usr/local/bin/python3.12 \
        "${UV_PYTHON_INSTALL_DIR:-${XDG_DATA_HOME:-$HOME/.local/share}/uv/python}"/cpython-3.12*/bin/python3.12
}

find_python() {
    local candidate without_venv=
    if [[ -n ${PYTHON:-} ]]; then
        is_python312 "$PYTHON" || die "PYTHON=$PYTHON does not run as Python 3.12"
        printf '%s\n' "$PYTHON"
        return
    fi
    while read -r candidate; do
        # A version manager may leave a python3.12 on PATH that does not run.
        [[ $candidate != "$VENV"/* ]] && is_python312 "$candidate" || continue
        if "$candidate" -c 'import ensurepip, venv' >/dev/null 2>&1; then
            printf '%s\n' "$candidate"
            return
        fi
        without_venv=$candidate
    done < <(python_candidates)
    [[ -z $without_venv ]] || die "$without_venv has no venv module: install python3.12-venv"
    die "Python 3.12 not found: install it (apt-get install python3.12-venv, pyenv install 3.12 or uv python install 3.12) or name one with PYTHON=/path/to/python3.12"
}

# step TITLE COMMAND...: runs COMMAND with its output in the log, a dot every few seconds.
step() {
    local title=$1 start=$SECONDS dots status=0
    shift
    printf 'setup: %s ' "$title"
    print_dots 9<&- &
    dots=$!
    trap 'kill "$dots" 2>/dev/null || true' EXIT
    printf '\n== %s\n' "$title" >>"$LOG"
    "$@" >>"$LOG" 2>&1 </dev/null || status=$?
    kill "$dots" 2>/dev/null || true
    wait "$dots" 2>/dev/null || true
    trap - EXIT
    if ((status == 0)); then
        printf ' %d s\n' $((SECONDS - start))
    else
        printf ' failed\n'
    fi
    return "$status"
}

# Without `sleep`: killing this leaves no child behind that holds the caller's output open.
print_dots() {
    local never
    exec {never}<> <(:)
    while ! read -rt 5 -u "$never"; do printf .; done
}

last_step_log() {
    awk '/^== / { text = "" } { text = text $0 "\n" } END { printf "%s", text }' "$LOG"
}

NETWORK_ERRORS='not a trusted or secure host|NewConnectionError|NameResolutionError|Connect(ion)?TimeoutError|ReadTimeoutError|ProxyError|SSLError|Max retries exceeded|Connection (refused|reset|aborted)|Network is unreachable|Could not connect|No route to host|failure (in name resolution|resolving)|dns error|tcp connect error|error sending request|operation timed out|Failed to fetch'

network_failed() {
    last_step_log | grep -iE "$NETWORK_ERRORS" >/dev/null
}

# Says in one line why the last step failed, and stops.
explain() {
    local what=$1 reason
    if last_step_log | grep -iE 'No space left on device|os error 28' >/dev/null; then
        die "$what failed: the disk is full; $NEED_GB GB are needed (log: $LOG)"
    elif network_failed; then
        # Packages are all downloaded before the first is changed: an environment that was whole still is.
        [[ ! -s $STAMP ]] || rm -f "$INCOMPLETE"
        die "$what failed: the server cannot be reached; check the network, the proxy and pip's index-url (log: $LOG)"
    fi
    # So it is when a package does not exist.
    if [[ -s $STAMP ]] && last_step_log | grep 'No matching distribution' >/dev/null; then
        rm -f "$INCOMPLETE"
    fi
    reason=$(last_step_log | grep -iE 'error|^E: ' | tail -n 1 || true)
    die "$what failed: ${reason:-no reason given} (log: $LOG)"
}

check_requirements() {
    [[ -f ${LISTS[0]} ]] || die "REQUIREMENTS=$REQUIREMENTS: there is no ${LISTS[0]}; use cpu or cuda"
}

check_target() {
    if [[ -d $VENV && ! -e $VENV/pyvenv.cfg && ! -e $INCOMPLETE && -n $(ls -A "$VENV") ]]; then
        die "VENV=$VENV exists and is not a virtual environment"
    fi
}

check_disk() {
    local free_gb
    free_gb=$(df -Pk "$VENV" | awk 'NR == 2 { print int($4 / 1048576) }')
    ((free_gb >= NEED_GB)) ||
        die "$free_gb GB free for $VENV, $NEED_GB GB are needed: free some, or put it elsewhere with VENV=/path"
}

missing_libraries() {
    "$1" - "${SYSTEM_LIBRARIES[@]}" <<'PY'
import ctypes
import sys

for name in sys.argv[1:]:
    try:
        ctypes.CDLL(name)
    except OSError:
        print(name)
PY
}

apt_install() {
    apt-get update && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends "$@"
}

ensure_system_libraries() {
    local missing
    missing=$(missing_libraries "$1" | xargs)
    [[ -n $missing ]] || return 0
    if ! type -P apt-get >/dev/null; then
        die "missing system libraries: $missing; install the packages that hold them and run this again"
    elif ((EUID != 0)); then
        die "missing system libraries: $missing; run: sudo apt-get install -y ${SYSTEM_PACKAGES[*]}"
    fi
    step "installing ${SYSTEM_PACKAGES[*]}" apt_install "${SYSTEM_PACKAGES[@]}" ||
        explain "apt-get install ${SYSTEM_PACKAGES[*]}"
    missing=$(missing_libraries "$1" | xargs)
    [[ -z $missing ]] || die "still missing after apt-get install ${SYSTEM_PACKAGES[*]}: $missing"
}

empty_venv() {
    find "$VENV" -mindepth 1 -maxdepth 1 \
        ! -path "$VENV/cache" ! -path "$LOG" ! -path "$INCOMPLETE" -exec rm -rf {} +
}

# uv reads no pip.conf: this prints what pip is configured to use as uv's environment variables.
uv_environment() {
    "$VENV_PYTHON" -m pip config list 2>/dev/null | "$VENV_PYTHON" -c '
import ast
import os
import sys

NAMES = {
    "index-url": "UV_DEFAULT_INDEX",
    "extra-index-url": "UV_INDEX",
    "find-links": "UV_FIND_LINKS",
    "no-index": "UV_NO_INDEX",
    "trusted-host": "UV_INSECURE_HOST",
    "cert": "SSL_CERT_FILE",
}
SECTIONS = ["global", "install", ":env:"]
found = {}
for line in sys.stdin:
    key, _, value = line.strip().partition("=")
    section, _, option = key.rpartition(".")
    if section in SECTIONS and option in NAMES:
        found.setdefault(option, {})[section] = ast.literal_eval(value)
for option, values in found.items():
    words = values[max(values, key=SECTIONS.index)].split()
    if words and NAMES[option] not in os.environ:
        print(NAMES[option], ("," if option == "find-links" else " ").join(words), sep="=")
'
}

install_with_uv() {
    local setting
    while read -r setting; do
        export "${setting?}"
    done < <(uv_environment)
    UV_INDEX_STRATEGY=unsafe-best-match UV_NO_CONFIG=1 UV_NO_PROGRESS=1 \
        UV_CACHE_DIR=${UV_CACHE_DIR:-$VENV/cache} \
        "$VENV_PYTHON" -m uv pip install --python "$VENV_PYTHON" --no-deps "$@"
}

install_with_pip() {
    "$VENV_PYTHON" -m pip install --no-input --no-compile --no-deps "$@"
}

# Sets `installer`. uv takes a quarter of pip's time; an index may not have it.
choose_installer() {
    installer=install_with_uv
    "$VENV_PYTHON" -m uv --version >/dev/null 2>&1 && return
    step 'reaching the package index' \
        install_with_pip --retries 1 --timeout 20 "$INSTALLER" && return
    ! network_failed || explain 'the installation'
    installer=install_with_pip
}

install_requirements() {
    local lists=() list title
    for list in "${LISTS[@]}"; do lists+=(-r "$list"); done
    title="installing $(cat "${LISTS[@]}" | grep -c ==) packages"
    if [[ $installer == install_with_uv ]]; then
        step "$title" install_with_uv "${lists[@]}" && return
        ! network_failed || explain 'the installation'
        echo 'setup: uv cannot install from this index; trying pip'
    fi
    step "$title with pip" install_with_pip "${lists[@]}" || explain 'the installation'
}

compiles_cpp20() {
    "${CXX:-c++}" -std=c++20 -x c++ -fsyntax-only - <<<'#include <span>' >/dev/null 2>&1
}

has_python_headers() {
    "$1" -c 'import os, sys, sysconfig; sys.exit(not os.path.exists(sysconfig.get_path("include") + "/Python.h"))'
}

# Packages that building hma_kernels.cpu lacks here.
missing_build_packages() {
    compiles_cpp20 || echo g++
    has_python_headers "$1" || echo python3.12-dev
}

# Sets `cpp`: whether hma_kernels.cpu can be built. Without it everything works, but slower.
ensure_compiler() {
    local missing
    cpp=yes
    missing=$(missing_build_packages "$1" | xargs)
    [[ -n $missing ]] || return 0
    if ((EUID == 0)) && type -P apt-get >/dev/null; then
        # shellcheck disable=SC2086
        step "installing $missing" apt_install $missing || true
        missing=$(missing_build_packages "$1" | xargs)
        [[ -n $missing ]] || return 0
    fi
    cpp=no
    echo "setup: no C++20 compiler with Python's headers, so attention on the CPU will be many times slower; install $missing (sudo apt-get install -y $missing) and run this again"
}

install_project() {
    local options=(--no-build-isolation --editable .)
    if [[ $cpp == yes ]]; then
        step 'installing sglang-hma, building its C++ kernels' "$installer" "${options[@]}" && return
        ! network_failed || explain 'the installation'
        echo "setup: hma_kernels.cpu could not be built, so attention on the CPU will be many times slower (log: $LOG)"
    fi
    step 'installing sglang-hma' "$installer" --config-settings wheel.cmake=false "${options[@]}" ||
        explain 'the installation'
}

# Proves the installation, and writes the bytecode of what a server imports: it starts several processes.
import_sglang() {
    env -u PYTHONDONTWRITEBYTECODE "$VENV_PYTHON" -W ignore -c '
import mooncake.engine
import sglang.srt.entrypoints.http_server
import sglang.srt.managers.scheduler
import sglang.srt.models.registry
import sglang.bench_serving
import sglang_router.launch_router
'
}

main() {
    check_requirements
    ! up_to_date || return 0
    check_target
    exec 9<"$ROOT"
    if ! flock -n 9; then
        echo 'setup: waiting for another set-up of this folder to finish'
        flock 9
        ! up_to_date || return 0
    fi

    local python=$VENV_PYTHON installer= cpp=
    if [[ -e $INCOMPLETE ]] || ! is_python312 "$VENV_PYTHON"; then
        python=$(find_python)
    fi
    [[ -d $VENV ]] || { mkdir -p "$VENV" && touch "$INCOMPLETE"; }
    : >"$LOG"
    [[ $python == "$VENV_PYTHON" ]] || check_disk
    ensure_system_libraries "$python"
    ensure_compiler "$python"
    touch "$INCOMPLETE"
    if [[ $python != "$VENV_PYTHON" ]]; then
        # An interrupted run may have left half a package. Its downloads are whole.
        [[ ! -d $VENV/lib ]] || step "emptying ${VENV#"$ROOT"/}" empty_venv
        step "making ${VENV#"$ROOT"/} with $("$python" -V)" "$python" -m venv "$VENV" || explain "$python -m venv"
    fi
    choose_installer
    install_requirements
    local changed
    changed=$(last_step_log | grep -cE '^ [+] |^Successfully installed' || true)
    install_project
    if ((changed)); then
        step 'importing SGLang' import_sglang || explain 'importing SGLang'
    fi
    fingerprint >"$STAMP"
    rm -rf "$INCOMPLETE" "$VENV/cache"
    echo "setup: done in $SECONDS s"
}

main
