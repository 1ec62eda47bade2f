#!/usr/bin/env bash
# Trains a config with torchrun, one process for each GPU of each node:
#
#     bash launch/torchrun.sh CONFIG.toml [--section.key VALUE ...]
#
# On several nodes start it on each of them, with the same arguments and
#
#     NNODES=2 NODE_RANK=0 MASTER_ADDR=host-of-node-0 bash launch/torchrun.sh CONFIG.toml
#
# MASTER_PORT (29500) must be free on node 0. NPROC_PER_NODE is "gpu" unless set; on CPUs say how
# many. Every node must see the same run directory (train.run_dir) and the same text.
set -euo pipefail
source "$(dirname -- "${BASH_SOURCE[0]}")/setup.sh"

[[ $# -gt 0 ]] || fail "usage: bash launch/torchrun.sh CONFIG.toml [--section.key VALUE ...]"
[[ -x $root/.venv/bin/megapipe ]] && PATH=$PATH:$root/.venv/bin
command -v megapipe >/dev/null ||
    fail "there is no command megapipe. Activate the environment that has it (pip install -e .)."

if [[ ${NNODES:-1} -gt 1 ]]; then
    [[ -n ${NODE_RANK:-} && -n ${MASTER_ADDR:-} ]] ||
        fail "NNODES=$NNODES needs NODE_RANK (0 to $((NNODES - 1))) and MASTER_ADDR (of node 0)."
    nodes=(--nnodes "$NNODES" --node-rank "$NODE_RANK"
        --master-addr "$MASTER_ADDR" --master-port "${MASTER_PORT:-29500}")
    # torchrun says nothing until it has been started on every node, and gives up after 10 minutes.
    echo "torchrun.sh: node $NODE_RANK of $NNODES meets the others at" \
        "$MASTER_ADDR:${MASTER_PORT:-29500}; nothing starts before all of them are there" >&2
else
    nodes=(--standalone)
fi
[[ -n ${NPROC_PER_NODE:-} ]] || compgen -G '/dev/nvidia[0-9]*' >/dev/null || [[ -e /dev/kfd ]] ||
    command -v nvidia-smi >/dev/null ||
    fail "this machine has no GPU: set NPROC_PER_NODE to the number of processes to start here."
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
# How long a rank that was told to stop may take to save: torchrun kills it after 30 s otherwise.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-300}
# --no-python: `python -m megapipe` would put the current directory on the import path.
exec torchrun "${nodes[@]}" --nproc-per-node "${NPROC_PER_NODE:-gpu}" \
    --no-python megapipe train "$@"
