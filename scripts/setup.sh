#!/bin/bash
# Makes this machine ready to build, run and test Cilia: Debian packages, a virtual environment in
# .venv, the locked Python packages, and the `cilia` command in it.
#
# Safe to run at any time and as often as wanted: each step looks at what is there, does what is
# missing, and leaves its mark only when it has finished, so a run that was killed is carried on by
# the next. When nothing is missing it takes a few tens of milliseconds and says nothing.
#
# PYTHON=/path/to/python3   the interpreter to build .venv with (3.11 or newer)
# SETUP_LOG=file            where the tools' own output goes (default build/setup.log)
set -euo pipefail
cd "$(dirname "$0")/.."

venv=.venv
log=${SETUP_LOG:-build/setup.log}
mkdir -p build

say() { printf '%s\n' "$*"; }
fail() { printf 'setup: %s\n' "$*" >&2; exit 1; }
fail_log() {
    printf 'setup: %s; the end of %s:\n' "$1" "$log" >&2
    tail -n 15 "$log" >&2
    exit 1
}

# ---- 1: Debian packages -------------------------------------------------------------------------
# A package is missing when the thing it is wanted for is, so a machine that has it from elsewhere
# (or that is no Debian) is not asked for it.

missing_packages() {
    local need=() lib f
    have() { command -v "$1" >/dev/null 2>&1 || [ -x "/usr/sbin/$1" ] || [ -x "/sbin/$1" ]; }
    have clang || need+=(clang)
    lib=
    for f in /usr/lib/*/libbpf.so.1 /usr/lib64/libbpf.so.1 /usr/lib/libbpf.so.1 /lib/*/libbpf.so.1; do
        if [ -e "$f" ]; then lib=$f; break; fi
    done
    [ -n "$lib" ] || need+=(libbpf1)
    [ -e /usr/include/bpf/bpf_helpers.h ] || need+=(libbpf-dev)
    [ -e /usr/include/linux/bpf.h ] || need+=(linux-libc-dev)
    have ip || need+=(iproute2)
    have nft || need+=(nftables)
    have ping || need+=(iputils-ping)
    have curl || need+=(curl)
    have iperf3 || need+=(iperf3)
    echo "${need[*]}"
}

apt_install() {
    local packages=("$@") try
    export DEBIAN_FRONTEND=noninteractive APT_LISTCHANGES_FRONTEND=none
    local options=(-y -q --no-install-recommends -o DPkg::Lock::Timeout=180 -o Acquire::Retries=3)
    for try in 1 2 3; do
        # An install that was killed leaves packages half configured, and dpkg refuses to go on.
        dpkg --configure -a >>"$log" 2>&1 || true
        if apt-get install "${options[@]}" "${packages[@]}" >>"$log" 2>&1; then return 0; fi
        # Most likely the lists are absent or old. Another apt may hold their lock: try again.
        apt-get update -q -o DPkg::Lock::Timeout=180 >>"$log" 2>&1 || sleep $((try * 5))
    done
    return 1
}

# need_packages WHAT-FOR PACKAGE...
need_packages() {
    local why=$1; shift
    local cure="apt-get install $*"
    command -v apt-get >/dev/null 2>&1 ||
        fail "lacks $* ($why), and this machine has no apt-get: install what your distribution calls them"
    [ "$(id -u)" = 0 ] || fail "lacks $* ($why), and is not root: run '$cure' as root"
    say "[1/4] Debian packages: $*"
    apt_install "$@" || fail_log "could not install $*"
}

# ---- 2: the interpreter and its environment -----------------------------------------------------

# Prints "path version has-venv" of an interpreter that is new enough, nothing otherwise.
probe_python() {
    "$1" -I -c '
import sys
if sys.version_info >= (3, 11) and sys.implementation.name == "cpython":
    try:
        import ensurepip, venv
        ok = 1
    except ImportError:
        ok = 0
    print(sys.executable, "%d.%d.%d" % sys.version_info[:3], ok)
' 2>/dev/null || true
}

# Sets python, version, has_venv to the first interpreter that is new enough, preferring those that
# can make an environment by themselves.
find_python() {
    local candidate found best=
    local candidates=(python3 python3.11 python3.12 python3.13 python3.14 /usr/bin/python3
        /usr/bin/python3.1[1-9] /usr/local/bin/python3 /usr/local/bin/python3.1[1-9]
        "${PYENV_ROOT:-$HOME/.pyenv}"/versions/3.1[1-9]*/bin/python3)
    if [ -n "${PYTHON:-}" ]; then
        command -v "$PYTHON" >/dev/null 2>&1 || fail "PYTHON=$PYTHON is not a program"
        candidates=("$PYTHON")
    fi
    for candidate in "${candidates[@]}"; do
        command -v "$candidate" >/dev/null 2>&1 || continue
        found=$(probe_python "$candidate")
        [ -n "$found" ] || continue
        if [ "${found##* }" = 1 ]; then best=$found; break; fi
        [ -n "$best" ] || best=$found
    done
    [ -n "$best" ] || return 1
    read -r python version has_venv <<<"$best"
}

make_venv() {
    if ! find_python; then
        if [ -n "${PYTHON:-}" ]; then fail "PYTHON=$PYTHON is not CPython 3.11 or newer"; fi
        need_packages "Python 3.11 or newer" python3 python3-venv
        find_python || fail "the distribution's python3 is older than 3.11: install a newer one and give it as PYTHON=..."
    fi
    if [ "$has_venv" != 1 ]; then
        # Debian splits ensurepip off its Python.
        need_packages "ensurepip for $python" "python${version%.*}-venv"
        find_python
        [ "$has_venv" = 1 ] || fail "$python has no ensurepip: install it, or give another as PYTHON=..."
    fi
    say "[2/4] Python $version ($python): making $venv"
    rm -rf "$venv"
    "$python" -m venv "$venv" >>"$log" 2>&1 || { rm -rf "$venv"; fail_log "could not make $venv"; }
}

venv_usable() {
    [ -x "$venv/bin/python" ] && [ -e "$venv/pyvenv.cfg" ] &&
        [ -n "$(probe_python "$venv/bin/python")" ] &&
        "$venv/bin/python" -I -c 'import pip' 2>/dev/null || return 1
    # A different interpreter was asked for.
    [ -z "${PYTHON:-}" ] || [ "$("$PYTHON" -c 'import sys; print(sys.base_prefix)' 2>/dev/null)" = \
        "$("$venv/bin/python" -c 'import sys; print(sys.base_prefix)')" ]
}

# ---- 3: the packages ----------------------------------------------------------------------------

pip() { "$venv/bin/python" -m pip --disable-pip-version-check --no-input "$@" 9>&-; }

install_packages() {
    # Hashes are required, so what is installed is what was tested, whatever index serves it.
    pip install -q --retries 5 --require-hashes -r requirements.lock >>"$log" 2>&1 || return 1
    # xds-protos brings an old copy of OpenTelemetry's messages, to the place where the package of
    # OpenTelemetry's own puts them: that one has the last word.
    awk '/^opentelemetry-proto==/ { on = 1 } on { print } on && !/\\$/ { exit }' requirements.lock >build/last-word.lock
    pip install -q --retries 5 --require-hashes --no-deps --force-reinstall -r build/last-word.lock >>"$log" 2>&1
}

# ---- the run ------------------------------------------------------------------------------------

# What is installed is a function of these; the stamps live in the environment they speak of.
# The tree's own path counts: scripts in .venv/bin and the editable install name it.
packages_key=$({ cat requirements.lock; declare -f install_packages; } | sha256sum | cut -d' ' -f1)
project_key=$({ pwd; cat pyproject.toml; } | sha256sum | cut -d' ' -f1)
stamp() { [ "$(cat "$venv/.stamp-$1" 2>/dev/null)" = "$2" ]; }

missing=$(missing_packages)
if [ -z "$missing" ] && stamp packages "$packages_key" && stamp project "$project_key" &&
    [ -x "$venv/bin/python" ] && [ -z "${PYTHON:-}" ]; then
    exit 0
fi

# One at a time: `make test` and `make demo` may be started together in one tree.
exec 9>build/.setup.lock
if command -v flock >/dev/null 2>&1; then
    flock -w 900 9 || fail "another setup has held build/.setup.lock for 15 minutes"
fi
: >"$log"

missing=$(missing_packages)
# shellcheck disable=SC2086 # a list of words
[ -z "$missing" ] || need_packages "to build and run" $missing

if venv_usable; then
    # A tree that was moved: the scripts in bin name the old place.
    if [ -e "$venv/bin/pip" ] && ! head -n3 "$venv/bin/pip" | grep -qF "$PWD/$venv/bin/"; then make_venv; fi
else
    make_venv
fi

if ! stamp packages "$packages_key"; then
    say "[3/4] Python packages: $(grep -c '==' requirements.lock) locked ones, a minute or two"
    rm -f "$venv/.stamp-packages"
    install_packages ||
        fail_log "could not install the Python packages of requirements.lock"
    echo "$packages_key" >"$venv/.stamp-packages"
fi

if ! stamp project "$project_key"; then
    say "[4/4] The cilia command: $venv/bin/cilia"
    # The build backend is among the locked packages: this needs no network.
    pip install -q --no-deps --no-build-isolation --no-index -e . >>"$log" 2>&1 ||
        fail_log "could not install the project itself"
    echo "$project_key" >"$venv/.stamp-project"
fi
