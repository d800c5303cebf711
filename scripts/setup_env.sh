# shellcheck shell=bash
# Sourced by run_iterative_training.sh, run_tests.sh, scripts/check.sh and the Makefile. `setup_env [--dev]` sets
#
#   root     this checkout
#   python   an interpreter that satisfies requirements.txt (with --dev: the tools for the tests too)
#
# It takes the first of $PYTHON, the active virtual environment, .venv, python3. When that one lacks a package, .venv
# is used, and made or completed first where needed; nothing is ever installed anywhere else. When all is there this
# takes well under a second and prints nothing. Its own lines go to stderr; it ends the script on the first error.
# CIRLOOP_LOCKED=1: in the exact versions of requirements.lock, also where others would do.

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"

say() { echo "cirloop: $*" >&2; }
die() { echo "cirloop: error: $*" >&2; exit 1; }

# Prints the absolute path of interpreter $1, or ends with the way out if it does not run or is too old.
interpreter() {
    local found way_out="$2"
    command -v "$1" >/dev/null || die "'$1' is not there. $way_out"
    found="$("$1" -c 'import sys; print("%d.%d %s" % (sys.version_info[0], sys.version_info[1], sys.executable))')" ||
        die "'$1' does not run as Python. $way_out"
    local version="${found%% *}"
    if [ "${version%%.*}" -lt 3 ] || { [ "${version%%.*}" -eq 3 ] && [ "${version#*.}" -lt 11 ]; }; then
        die "Python 3.11 or newer is needed; '$1' is Python $version. $way_out"
    fi
    echo "${found#* }"
}

# Is everything there under interpreter $1? Sets `missing` to the requirements that are not, in one line.
ready() {
    local status=0
    missing="$("$1" "$root/scripts/check_environment.py" ${2:+"$2"} 2>&1)" || status=$?
    [ "$status" -eq 0 ] || [ "$status" -eq 3 ] || die "scripts/check_environment.py failed under $1: $missing"
    missing="${missing//$'\n'/, }"
    return "$status"
}

# Makes .venv with interpreter $1 where there is none, and installs into it.
install() {
    local venv="$root/.venv" unfinished="$root/.venv/.cirloop-install-unfinished"
    if ! "$venv/bin/python" -m pip --version >/dev/null 2>&1; then
        "$1" -c 'import ensurepip, venv' 2>/dev/null ||
            die "$1 has no venv module, so .venv cannot be made. On Debian or Ubuntu: apt install python3-venv." \
                "Or set PYTHON to a Python 3.11 or newer that has it."
        say "making .venv with $1 (about 8 GB once the packages are in, most of it CUDA libraries)"
        # The mark comes first and goes last, so that an installation cut short at any point is seen as such.
        mkdir -p "$venv" && : >"$unfinished"
        { "$1" -m venv "$venv" && "$venv/bin/python" -m pip --version >/dev/null; } || die "could not make .venv;" \
            "the lines above say why. Remove it (rm -rf '$venv') and run this again."
    fi
    : >"$unfinished"
    local locked=()
    [ "${CIRLOOP_LOCKED:-}" != 1 ] || locked=(-c requirements.lock)
    say "installing requirements.txt${2:+ and the dev tools} into .venv${locked[*]:+, in the versions of requirements.lock}"
    # From the root, since `-e .` in requirements.txt means the current directory. Without PYTHONPATH, which could
    # show pip a package that is not in .venv.
    (cd "$root" && env -u PYTHONPATH "$venv/bin/python" -m pip install --no-input --disable-pip-version-check \
        ${locked[@]+"${locked[@]}"} -r requirements.txt ${2:+-e '.[dev]'} >&2) ||
        die "pip could not install the packages; its lines above say why. Check the network and the free disk" \
            "space (10 GB), then run this again: it goes on from here. Or set PYTHON to an interpreter that has them."
    rm -f "$unfinished"
}

setup_env() {
    local dev="${1:-}" venv="$root/.venv" choice way_out missing lacked
    way_out="Set PYTHON to a Python 3.11 or newer, as in PYTHON=/usr/bin/python3.12."
    if [ -n "${PYTHON:-}" ]; then
        choice="$PYTHON"
    elif [ -n "${VIRTUAL_ENV:-}" ]; then
        choice="$VIRTUAL_ENV/bin/python"
        way_out="Run 'deactivate' to leave the virtual environment $VIRTUAL_ENV, or set PYTHON."
    elif [ -e "$venv/bin/python" ] || [ -L "$venv/bin/python" ]; then
        choice="$venv/bin/python"
        way_out="Remove .venv (rm -rf '$venv') and run this again."
    else
        choice=python3
    fi
    python="$(interpreter "$choice" "$way_out")" || exit 1
    if ! ready "$python" "$dev"; then
        lacked="$missing"
        # One installation at a time; the lock outlives a killed script as long as its pip does.
        exec 9<"$root/requirements.txt"
        if command -v flock >/dev/null && ! flock -n 9; then
            say "waiting for another installation into .venv to end"
            flock 9
        fi
        if [ -e "$venv/bin/python" ]; then  # not one of a Python too old
            interpreter "$venv/bin/python" "Remove .venv (rm -rf '$venv') and run this again." >/dev/null || exit 1
        fi
        if [ -e "$venv/bin/python" ] && ready "$venv/bin/python" "$dev"; then
            [ "$python" = "$venv/bin/python" ] || say "$python lacks $lacked; using .venv"
        else
            say "$python lacks $lacked"
            if [ "$python" = "$venv/bin/python" ]; then
                python="$(interpreter python3 "$way_out")" || exit 1
            fi
            install "$python" "$dev"
            ready "$venv/bin/python" "$dev" || die ".venv still lacks $missing after pip said it was done." \
                "Remove it (rm -rf '$venv') and run this again."
            say "ready: $venv/bin/python"
        fi
        exec 9<&-
        python="$venv/bin/python"
    fi
    # This checkout's package, also where the interpreter has cirloop installed from another one or not at all.
    export PYTHONPATH="$root/src${PYTHONPATH:+:$PYTHONPATH}"
}
