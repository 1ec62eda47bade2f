#!/usr/bin/env bash
# A whole run in a few minutes on a laptop without a GPU: a tokenizer trained on real text (the
# sources of Python's standard library), a proof that the layout computes what one process computes,
# a small GPT trained on four processes (two tensor ranks times two pipeline ranks), and a text by it.
#
#     bash launch/quickstart.sh
#
# All of it lies in runs/quickstart; remove that directory to start anew. Started again, it goes on
# from the last checkpoint.
set -euo pipefail
source "$(dirname -- "${BASH_SOURCE[0]}")/setup.sh"

config=launch/configs/quickstart.toml
run=runs/quickstart

step() { printf '\n== %s\n' "$*"; }

# One text for each module, 600 or so; left out are tests, tables of characters, pages of documentation
# in strings, and what is not UTF-8.
write_corpus() {
    python - "$1" <<'PYTHON'
import sys
import sysconfig
from pathlib import Path

library, out = Path(sysconfig.get_path("stdlib")), Path(sys.argv[1])
out.mkdir(parents=True)
left_out = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
left_out |= {"encodings", "pydoc_data", "entities"}
count = size = 0
for path in sorted(library.rglob("*.py")):
    module = path.relative_to(library).with_suffix("")
    if left_out & set(module.parts):
        continue
    try:
        text = path.read_text(encoding="utf-8")
    except (UnicodeDecodeError, OSError):
        continue
    if text.strip():
        (out / f"{'.'.join(module.parts)}.txt").write_text(text, encoding="utf-8")
        count, size = count + 1, size + len(text)
print(f"{count} files, {size / 1e6:.1f} MB, from {library}")
PYTHON
}

cd -- "$root"
set_up
# Libraries keep their files inside the run directory too.
cache=$root/$run/cache
mkdir -p "$cache/tmp"
export XDG_CACHE_HOME=$cache XDG_CONFIG_HOME=$cache/config XDG_DATA_HOME=$cache/data
export TMPDIR=$cache/tmp HF_HOME=$cache/huggingface TRITON_CACHE_DIR=$cache/triton
export WANDB_CACHE_DIR=$cache WANDB_CONFIG_DIR=$cache/config WANDB_DATA_DIR=$cache/data

if [[ ! -d $run/corpus ]]; then
    step "Text: the sources of Python's standard library"
    rm -rf "$run/corpus.partial"
    write_corpus "$run/corpus.partial"
    mv "$run/corpus.partial" "$run/corpus"
fi
if [[ ! -e $run/tokenizer.model ]]; then
    step "Tokenizer"
    megapipe tokenizer train "$run/corpus" --vocab-size 4096 --out "$run/tokenizer.model"
fi
step "Proof: this layout computes what one process computes"
megapipe verify "$config"
step "Training on four processes: tensor 2 * pipeline 2, interleaved 1F1B"
megapipe train "$config"
step "A text by the model: megapipe generate $run --prompt 'def ' --temperature 0.7"
megapipe generate "$run" --prompt "def " --temperature 0.7
