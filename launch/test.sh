#!/usr/bin/env bash
# Everything that must hold before a change is merged: lint, format, types, tests. Makes its own
# environment on a fresh machine. Words after it go to pytest:
#
#     bash launch/test.sh                       everything, on up to four cores
#     bash launch/test.sh tests/data -k resume  lint, types, and these tests, in one process
set -euo pipefail
source "$(dirname -- "${BASH_SOURCE[0]}")/setup.sh"

# Runs a command from the root of the clone and says how long it took.
phase() {
    local name=$1 began=$SECONDS
    shift
    echo "== $name"
    "$@" || fail "$name failed after $((SECONDS - began)) s"
    echo "== $name: $((SECONDS - began)) s"
}

# Waits for mypy and tells what it found.
mypy_verdict() {
    local status=0
    wait "$mypy" || status=$?
    cat "$types"
    return "$status"
}

cd -- "$root"
unset PYTHONDONTWRITEBYTECODE  # the tests start Python some hundred times
export PIP_COMPILE=0  # of torch and others, the tests use the smaller part
phase "set-up" set_up test
phase "ruff check" python -m ruff check .
phase "ruff format" python -m ruff format --check .
# Types are checked beside the tests, with what time they leave.
types=$(mktemp)
nice -n 19 python -m mypy >"$types" 2>&1 &
mypy=$!
trap 'kill "$mypy" 2>/dev/null || true; rm -f "$types"' EXIT
# All tests run in several processes, each file in one of them. The order is that of
# tests/conftest.py. Words are for choosing a few tests or looking into one: without workers, --pdb
# and -s do what they should.
(($#)) || set -- --numprocesses logical --maxprocesses 4 --dist loadfile --no-loadscope-reorder
# One thread in each process: the tests run many ranks beside each other.
OMP_NUM_THREADS=1 phase "pytest" python -m pytest "$@"
phase "mypy" mypy_verdict
