#!/usr/bin/env bash
# The first minutes on a machine with a GPU: tests of the GPU, kernels, whole training steps, one
# table; each result is written as JSON when it is there.
#
#     bash launch/gpu.sh [--minutes 9] [--wheels DIR] [--out DIR] [--toy]
#
# It downloads nothing and uses the Python that is there (PYTHON, or python3) with its torch. What
# that lacks is named; with --wheels it is installed from the wheels in DIR into .venv-gpu of the clone.
# Results go to --out, to $OUT, or to tools/bench/results/. --toy tries all of it on a CPU.
set -euo pipefail
root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd -P)

fail() {
    echo "gpu.sh: $*" >&2
    exit 2
}

# Distributions that are not there, one a line. Word 1: "needed" for the benches, "tests" for the tests
# of the GPU, "others" for the rest of megapipe.
lacking() {
    "$python" - "$1" <<'PYTHON'
import sys
from importlib.util import find_spec

packages = {
    "needed": {"torch": "torch", "triton": "triton", "numpy": "numpy", "pydantic": "pydantic",
               "rich": "rich", "safetensors": "safetensors", "tomli_w": "tomli-w"},
    "tests": {"pytest": "pytest", "hypothesis": "hypothesis", "xxhash": "xxhash"},
    "others": {"datasets": "datasets", "wandb": "wandb", "sentencepiece": "sentencepiece",
               "tokenizers": "tokenizers", "zstandard": "zstandard"},
}
for module, name in packages[sys.argv[1]].items():
    if find_spec(module) is None:
        print(name)
PYTHON
}

words=() wheels='' out=${OUT:-}
while (($#)); do
    case $1 in
    --minutes | --wheels | --out)
        (($# > 1)) || fail "$1 needs a value."
        case $1 in
        --wheels) wheels=$2 ;;
        --out) out=$2 ;;
        *) words+=("$1" "$2") ;;
        esac
        shift 2
        ;;
    --toy)
        words+=("$1")
        shift
        ;;
    *) fail "$1 is not an option. usage: bash launch/gpu.sh [--minutes 9] [--wheels DIR] [--out DIR] [--toy]" ;;
    esac
done
[[ -z $wheels || -d $wheels ]] || fail "--wheels $wheels is not a directory."
[[ -z $wheels ]] || wheels=$(cd -- "$wheels" && pwd -P)
[[ -z $out ]] || { mkdir -p -- "$out" && out=$(cd -- "$out" && pwd -P); } || fail "--out $out can't be made."
[[ -z $out ]] || words+=(--out "$out")

python=${PYTHON:-python3}
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null ||
    fail "$python is not Python 3.11 or newer. Set PYTHON to one that has torch."
mapfile -t missing < <(lacking needed; lacking tests)
if ((${#missing[@]})) && [[ -n $wheels ]]; then
    venv=$root/.venv-gpu
    # It sees the packages of the Python that makes it, also where that is in an environment itself.
    "$python" -m venv --without-pip --system-site-packages "$venv" || fail "could not make $venv (above)."
    "$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))' >"$venv/parent" &&
        cp "$venv/parent" "$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/parent.pth"
    echo "Installing from $wheels: ${missing[*]}"
    "$python" -m pip --python "$venv/bin/python" install --quiet --disable-pip-version-check \
        --no-index --find-links "$wheels" "${missing[@]}" ||
        echo "gpu.sh: pip could not install all of them (above)." >&2
    python=$venv/bin/python
fi
mapfile -t needed < <(lacking needed)
mapfile -t tests < <(lacking tests)
mapfile -t others < <(lacking others)
((!${#others[@]})) || echo "Not there, and not needed here: ${others[*]}"
((!${#needed[@]})) || fail "$python lacks ${needed[*]}. Give their wheels and those they need with --wheels DIR."
((!${#tests[@]})) || echo "gpu.sh: the tests will fail: $python lacks ${tests[*]} (see --wheels)." >&2

cd -- "$root"
export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH}
exec "$python" -m megapipe bench gpu "${words[@]}"
