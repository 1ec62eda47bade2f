# shellcheck shell=bash
# Sourced by the scripts beside it. `set_up` leaves a virtual environment in the clone, .venv, with
# megapipe installed in it and first on PATH; `set_up test` adds what the tests need. Installed are
# the releases in constraints.txt; MEGAPIPE_CONSTRAINTS names another such file, or is "none".

root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd -P)

fail() {
    echo "$(basename -- "$0"): $*" >&2
    exit 1
}

# The first Python that is new enough and can make a virtual environment.
find_python() {
    local candidate
    for candidate in python3 python3.13 python3.12 python3.11 python3.14 python; do
        if "$candidate" -c 'import sys, ensurepip, venv; sys.exit(sys.version_info < (3, 11))' \
            2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
    fail "found no Python 3.11 or newer that has the modules venv and ensurepip." \
        "Install one (on Debian and Ubuntu: apt install python3 python3-venv)."
}

set_up() {
    local extra=${1:-} venv=$root/.venv python wanted
    local constraints=${MEGAPIPE_CONSTRAINTS:-$root/launch/constraints.txt}
    [[ $constraints == none ]] && constraints=/dev/null
    [[ -r $constraints ]] || fail "MEGAPIPE_CONSTRAINTS=$constraints is no file that can be read."
    if [[ ! -e $venv ]]; then
        python=$(find_python) || exit 1
        echo "Making .venv with $("$python" --version)"
        "$python" -m venv "$venv" || fail "could not make $venv (above)."
    fi
    "$venv/bin/python" -c '' 2>/dev/null ||
        fail "$venv is no working virtual environment. Remove it and start again."
    export PATH=$venv/bin:$PATH
    # Once for each content of pyproject.toml and the constraints, and place of the clone.
    wanted=$(python -c 'import hashlib, sys
text = b"".join(open(path, "rb").read() for path in sys.argv[1:])
print(hashlib.sha256(text + sys.argv[1].encode()).hexdigest())' \
        "$root/pyproject.toml" "$constraints") || exit 1
    [[ $wanted == "$(cat "$venv/.megapipe-test" 2>/dev/null)" ]] && return
    [[ -z $extra && $wanted == "$(cat "$venv/.megapipe" 2>/dev/null)" ]] && return
    echo "Installing megapipe${extra:+ and what its tests need} into .venv; the first time pip" \
        "downloads torch and others"
    python -m pip install --quiet --disable-pip-version-check --constraint "$constraints" \
        --editable "$root${extra:+[$extra]}" ||
        fail "pip could not install megapipe (above). With MEGAPIPE_CONSTRAINTS=none it may take" \
            "other releases than those in launch/constraints.txt."
    echo "$wanted" >"$venv/.megapipe${extra:+-$extra}"
}
