# shellcheck shell=bash
# What the scripts of this directory share. To be sourced by bash.

repository=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)

say() { printf '%s\n' "$*" >&2; }

# Ends the script: a sentence, and the exit code 2, or the one given by `die_with`.
die() { die_with 2 "$@"; }
die_with() {
    local code=$1
    shift
    say "${0##*/}: $*"
    exit "$code"
}

# Prints the longhaul binary: LONGHAUL_BIN, or the release build of this repository.
find_binary() {
    local binary=${LONGHAUL_BIN:-$repository/target/release/longhaul}
    [[ -x $binary ]] || die "$binary does not exist: run cargo build --release, or set LONGHAUL_BIN"
    printf '%s\n' "$binary"
}

# Goes on as root: elevate "$@" runs this script again through sudo with the same arguments.
elevate() {
    ((EUID == 0)) && return
    command -v sudo >/dev/null || die "this needs root for network namespaces, and there is no sudo"
    say "${0##*/}: network namespaces need root; running sudo"
    exec sudo --preserve-env=LONGHAUL_BIN -- "$0" "$@"
}

as_root() {
    if ((EUID == 0)); then
        "$@"
    elif command -v sudo >/dev/null; then
        sudo "$@"
    else
        die "this needs root: $* (there is no sudo here)"
    fi
}

# require TOOL=PACKAGE ...: installs the Debian package of each tool that is missing, and says so. Removes none for it.
require() {
    local pair tool missing=()
    local install=(env DEBIAN_FRONTEND=noninteractive apt-get -q -o DPkg::Lock::Timeout=300 install -y --no-remove --no-install-recommends)
    for pair in "$@"; do
        tool=${pair%%=*}
        command -v "$tool" >/dev/null || [[ -x /usr/sbin/$tool || -x /sbin/$tool ]] || missing+=("${pair#*=}")
    done
    ((${#missing[@]})) || return 0
    command -v apt-get >/dev/null ||
        die "install ${missing[*]} (names of the Debian packages), which this system's apt-get is not there to do"
    say "${0##*/}: installing the Debian packages ${missing[*]}"
    as_root "${install[@]}" "${missing[@]}" >/dev/null 2>&1 ||
        { as_root apt-get -q update >/dev/null && as_root "${install[@]}" "${missing[@]}" >/dev/null; } ||
        die "the Debian packages ${missing[*]} cannot be installed"
}
