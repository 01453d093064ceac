#!/usr/bin/env bash
# The front door of megakd: sets up what is missing, then runs a command.
#
#   ./launch.sh quickstart                       distil a small real teacher on this machine
#   ./launch.sh test [pytest arguments]          run the tests
#   ./launch.sh train configs/x.yaml [k=v ...]   train as the file says; settings after it replace the file's
#   ./launch.sh train FILE --nnodes 2 ...        on several nodes, also under Slurm: docs/launching.md
#   ./launch.sh COMMAND --help                   any other command of `python -m megakd`
#
# Installs nothing where the active Python has all requirements. Otherwise it makes .venv beside this file.
# PYTHON=/path/to/python chooses the interpreter (3.10 to 3.13).
set -euo pipefail

script=${BASH_SOURCE[0]}
while [[ -L $script ]]; do
    target=$(readlink "$script")
    [[ $target == /* ]] || target=$(dirname "$script")/$target
    script=$target
done
root=$(cd -P "$(dirname "$script")" && pwd)
venv=$root/.venv
stamp=$venv/.megakd-requirements

say() { printf 'launch.sh: %s\n' "$*" >&2; }
fail() {
    printf 'error: %s\n' "$*" >&2
    exit 2
}

supported() { "$1" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))' >/dev/null 2>&1; }

satisfied() { supported "$1" && "$1" "$root/tools/check_requirements.py" "${check_options[@]+"${check_options[@]}"}" >/dev/null 2>&1; }

choose_python() {
    if [[ -n ${PYTHON:-} ]]; then
        supported "$PYTHON" || fail "PYTHON is '$PYTHON'; it must run Python 3.10 to 3.13."
        printf '%s\n' "$PYTHON"
        return
    fi
    local candidate
    for candidate in python3 python python3.13 python3.12 python3.11 python3.10; do
        if supported "$candidate"; then
            printf '%s\n' "$candidate"
            return
        fi
    done
    fail "no Python 3.10 to 3.13 found. Install one, or set PYTHON=/path/to/python."
}

minor_version() { "$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])'; }

# One line per kind of requirements: what .venv holds when it is up to date.
wanted_stamp() {
    local name
    for name in "${requirements[@]}"; do
        printf '%s %s\n' "$name" "$(cksum <"$root/tools/requirements/$name.txt")"
    done
}

venv_ready() {
    [[ -f $stamp ]] && supported "$venv/bin/python" || return 1
    [[ -z ${PYTHON:-} || $(minor_version "$PYTHON") == "$(minor_version "$venv/bin/python")" ]] || return 1
    local line
    while IFS= read -r line; do
        grep -qxF -- "$line" "$stamp" || return 1
    done < <(wanted_stamp)
}

set_up_venv() {
    local base reason=''
    base=$(choose_python)
    if [[ -e $venv ]]; then
        if [[ -f $stamp ]] && grep -q '^unfinished' "$stamp"; then
            reason='an earlier installation was interrupted'
        elif ! supported "$venv/bin/python" || ! "$venv/bin/python" -m pip --version >/dev/null 2>&1; then
            reason='its Python or pip does not run'
        elif [[ -n ${PYTHON:-} && $(minor_version "$PYTHON") != "$(minor_version "$venv/bin/python")" ]]; then
            reason='it holds another Python than the one asked for'
        fi
        if [[ -n $reason ]]; then
            say "making .venv again: $reason"
            rm -rf "$venv"
        fi
    fi
    # The venv's other packages stay, so a stamp of more kinds than wanted now must not be forgotten.
    [[ ! -f $stamp ]] || ! grep -q '^dev ' "$stamp" || requirements=(runtime dev)
    if [[ ! -e $venv ]]; then
        "$base" -c 'import ensurepip, venv' 2>/dev/null ||
            fail "$base cannot make virtual environments. On Debian or Ubuntu: apt-get install python3-venv."
        say "making .venv with Python $(minor_version "$base")"
        mkdir "$venv"
        printf 'unfinished\n' >"$stamp"
        "$base" -m venv "$venv"
    fi
    printf 'unfinished\n' >"$stamp"
    local name files=()
    for name in "${requirements[@]}"; do
        files+=(-r "$root/tools/requirements/$name.txt")
    done
    say "installing tools/requirements: ${requirements[*]} (some minutes the first time)"
    "$venv/bin/python" -m pip install --quiet --disable-pip-version-check "${files[@]}" ||
        fail "pip could not install the requirements; its messages are above. Run the same command to try again."
    wanted_stamp >"$stamp.new"
    mv "$stamp.new" "$stamp"
    say "set-up finished"
}

# Leaves in $python an interpreter that has all requirements.
find_or_make_python() {
    python=$(choose_python)
    if satisfied "$python"; then
        return
    fi
    if ! venv_ready; then
        # Nodes that share this folder set it up once.
        if command -v flock >/dev/null; then
            exec 9>"$root/.venv.lock"
            flock 9
        fi
        # A .venv without our stamp is the user's own: fine as it is where nothing is missing.
        if ! venv_ready && { [[ -f $stamp ]] || ! satisfied "$venv/bin/python"; }; then
            set_up_venv
        fi
        exec 9>&-
    fi
    python=$venv/bin/python
}

# The tests' arguments from the user; all tests where none of them is a path. Two files at a time where nothing chooses
# some of the tests, since most use one core, and since to import everything twice takes longer than a few of them.
run_tests() {
    local argument paths=("$root/tests") processes=(-n logical --maxprocesses 2 --dist loadfile --no-loadscope-reorder)
    for argument in "$@"; do
        if [[ $argument != -* && -e ${argument%%::*} ]]; then
            paths=() processes=()
        elif [[ $argument == -[kms]* || $argument == --pdb ]]; then
            processes=()
        fi
    done
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
    exec "$python" -m pytest -c "$root/pyproject.toml" --rootdir "$root" "${processes[@]+"${processes[@]}"}" "$@" \
        "${paths[@]+"${paths[@]}"}"
}

case ${1:-} in
    '' | -h | --help | help)
        sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p;}' "$root/launch.sh"
        [[ -n ${1:-} ]] || exit 2
        exit 0
        ;;
esac

check_options=() requirements=(runtime)
if [[ $1 == test ]]; then
    check_options=(--dev) requirements=(runtime dev)
fi
find_or_make_python
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
if [[ $1 == test ]]; then
    run_tests "${@:2}"
fi
exec "$python" -m megakd "$@"
