# shellcheck shell=bash
# What tests/run needs beside the tests themselves: packages, skips, and the proof that nothing is left behind.
# To be sourced by bash from the repository's root.

# One line for everything that was left out, with its reason.
SKIPPED=$(mktemp)

# One line for everything that failed.
FAILED=$(mktemp)

step() { printf '\n== %s\n' "$*"; }

skip() {
    printf 'SKIP %s\n' "$*" | tee -a "$SKIPPED"
}

# Notes a failure and goes on, so that one run shows them all.
failed() {
    printf 'FAILED %s\n' "$*" | tee -a "$FAILED" >&2
}

# attempt NAME COMMAND...: runs it; its failure is noted under that name.
attempt() {
    local name=$1
    shift
    "$@" || failed "$name"
}

# need_command NAME HINT: ends the run where there is no such command.
need_command() {
    command -v "$1" >/dev/null && return
    printf 'tests/run: %s is missing: %s\n' "$1" "$2" >&2
    exit 2
}

as_root() {
    if ((EUID == 0)); then
        "$@"
    elif [[ -t 0 ]]; then
        sudo "$@"
    else
        # Nobody is there to type a password: fail instead of waiting for one.
        sudo -n "$@"
    fi
}

# need_packages COMMAND:PACKAGE...: installs the Debian packages of the commands that are missing. Where that cannot be done
# it names them and goes on: what needs them says so itself.
need_packages() {
    local entry command packages=()
    for entry in "$@"; do
        command -v "${entry%%:*}" >/dev/null || packages+=("${entry#*:}")
    done
    ((${#packages[@]})) || return 0
    if command -v apt-get >/dev/null && { ((EUID == 0)) || command -v sudo >/dev/null; }; then
        printf 'installing the Debian packages %s\n' "${packages[*]}"
        apt_install "${packages[@]}" || true
    fi
    for entry in "$@"; do
        command=${entry%%:*}
        command -v "$command" >/dev/null || skip "$command is missing (Debian package ${entry#*:}): some tests cannot run without it"
    done
}

# The package lists of a fresh machine are missing or stale: a failure is tried again with new ones.
apt_install() {
    local install=(env DEBIAN_FRONTEND=noninteractive apt-get -q -o DPkg::Lock::Timeout=300 install -y --no-install-recommends)
    as_root "${install[@]}" "$@" >/dev/null 2>&1 && return
    as_root apt-get -q update >/dev/null && as_root "${install[@]}" "$@" >/dev/null
}

# Sets PROMTOOL. The Debian package that holds it would also start a Prometheus server, so it is unpacked instead of
# installed.
find_promtool() {
    local directory=$PWD/target/promtool
    PROMTOOL=$(command -v promtool || true)
    [[ -z $PROMTOOL && -x $directory/usr/bin/promtool ]] && PROMTOOL=$directory/usr/bin/promtool
    if [[ -z $PROMTOOL ]] && command -v dpkg-deb >/dev/null; then
        mkdir -p "$directory"
        if (cd "$directory" && apt-get -q -o APT::Sandbox::User="$(id -un)" download prometheus >download.log 2>&1 &&
            dpkg-deb -x prometheus_*.deb . && rm -f prometheus_*.deb); then
            PROMTOOL=$directory/usr/bin/promtool
        fi
    fi
    export PROMTOOL
    [[ -n $PROMTOOL ]]
}

# From here on everything that tests start is marked, and their temporary files have a directory of their own.
begin_watch() {
    export TESTS_RUN_MARK=$$-$RANDOM$RANDOM
    TMPDIR=$(mktemp -d "${TMPDIR:-/tmp}/lh-tests.XXXXXX")
    export TMPDIR
    NAMESPACES=$(namespaces)
}

# Before the first namespace is made there is no /run/netns.
namespaces() { { find /run/netns -mindepth 1 -maxdepth 1 -printf '%f\n' 2>/dev/null || true; } | sort; }

# Processes that were started by the tests and still live. The process id of this shell's own children is not among them:
# the mark is in the environment with which a process was started.
marked() {
    local environment pid
    for environment in /proc/[0-9]*/environ; do
        pid=${environment//[^0-9]/}
        [[ $pid != "$$" && $pid != "$BASHPID" ]] || continue
        if grep -qzx "TESTS_RUN_MARK=$TESTS_RUN_MARK" "$environment" 2>/dev/null; then echo "$pid"; fi
    done
}

# Fails for every process, namespace, mount and file that the tests have left behind.
check_nothing_is_left() {
    local pid name
    for pid in $(marked); do
        name=$(tr '\0' ' ' 2>/dev/null <"/proc/$pid/cmdline") || continue
        # A child of this script that is just ending is not left behind.
        [[ -z $name ]] || failed "left behind: process $pid ($name)"
    done
    for name in $(comm -13 <(echo "$NAMESPACES") <(namespaces)); do
        # One in which something runs is another run's.
        [[ -n $(ip netns pids "$name" 2>/dev/null) ]] || failed "left behind: network namespace $name"
    done
    while read -r name; do
        failed "left behind: $name"
    done < <(find "$TMPDIR" -mindepth 1 -maxdepth 1)
}

# Ends what an interrupted run would leave behind.
clean_up() {
    local pid link
    if [[ -n ${TESTS_RUN_MARK-} ]]; then
        for pid in $(marked); do
            # A link is known by the process that emulates it.
            link=$(ip netns identify "$pid" 2>/dev/null) || link=
            kill -KILL "$pid" 2>/dev/null || true
            [[ ! $link =~ ^(.*)-(a|b|wan)$ ]] || netem-scripts/link down --name "${BASH_REMATCH[1]}" >/dev/null 2>&1 || true
        done
        awk -v directory="$TMPDIR/" 'index($2, directory) == 1 { print $2 }' /proc/mounts | xargs -r umount || true
        rm -rf "$TMPDIR"
    fi
    rm -f "$SKIPPED" "$FAILED"
}

# Prints `--test=NAME` for each family of tests.
all_tests() {
    local main
    for main in tests/*.rs tests/*/main.rs; do
        main=${main#tests/} main=${main%.rs}
        echo "--test=${main%/main}"
    done
}

# The same for each that takes the QEMU to test with from the environment, itself or by a module that it shares.
tests_with_a_choice_of_qemu() {
    local test name main module places
    for test in $(all_tests); do
        name=${test#--test=} main=tests/$name.rs
        [[ -f $main ]] || main=tests/$name/main.rs
        places=("$main")
        [[ ! -d tests/$name ]] || places+=("tests/$name")
        while read -r module; do
            [[ ! -d tests/$module ]] || places+=("tests/$module")
        done < <(sed -nE 's/^(pub )?mod ([a-z_]+);$/\2/p' "$main")
        ! grep -qR LONGHAUL_TEST_QEMU "${places[@]}" || echo "$test"
    done
}

# Leaves out what successful tests have printed. The log has it.
without_successes() {
    awk '/^successes:$/ { hidden = 1 } /^(failures:|test result:)/ { hidden = 0 } !hidden { print; fflush() }'
}

# collect_skips LOG: what tests themselves have left out: lines that begin with SKIP, and ignored tests that were not run
# by name later on.
collect_skips() {
    grep -hiE '^skip(ped)?\b' "$1" | sed -E 's/^skip(ped)?:? */SKIP /I' >>"$SKIPPED" || true
    awk '/^test .* \.\.\. ok$/ { ran[$2] = 1 }
        /^test .* \.\.\. ignored/ { reason = $0; sub(/.*ignored,? */, "", reason); ignored[$2] = reason }
        END { for (name in ignored) if (!ran[name]) print "SKIP " name ": " ignored[name] }' "$1" >>"$SKIPPED"
}

# totals LOG: one line over all test binaries.
totals() {
    awk '/^test result:/ { binaries++; passed += $4; failed += $6; ignored += $8 }
        END { printf "%d passed, %d failed, %d ignored in %d test binaries\n", passed, failed, ignored, binaries }' "$1"
}
