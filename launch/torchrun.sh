#!/usr/bin/env bash
# Start a fine-tuning job under torchrun, on one machine or on several.
#
#   launch/torchrun.sh 2 configs/recipes/quickstart.yaml train.lr=5e-4
#
# The first argument is the number of ranks per machine; the rest goes to `sharded-spd finetune`. For several machines
# set NNODES, NODE_RANK, MASTER_ADDR and MASTER_PORT on each. PYTHON names another interpreter than the one in PATH.
set -euo pipefail

if [[ $# -lt 1 || ! $1 =~ ^[0-9]+$ ]]; then
  echo "usage: $0 RANKS_PER_MACHINE [CONFIG.yaml] [key=value ...]" >&2
  exit 2
fi
ranks=$1
shift

rendezvous=(--standalone)
if [[ ${NNODES:-1} -gt 1 ]]; then
  rendezvous=(--nnodes "$NNODES" --node-rank "${NODE_RANK:?}" --master-addr "${MASTER_ADDR:?}" --master-port "${MASTER_PORT:-29500}")
fi
exec "${PYTHON:-python}" -m torch.distributed.run "${rendezvous[@]}" --nproc-per-node "$ranks" -m sharded_spd finetune "$@"
