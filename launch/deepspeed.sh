#!/usr/bin/env bash
# Start a fine-tuning job under the deepspeed launcher, on one machine or (with HOSTFILE) on several.
#
#   launch/deepspeed.sh 2 configs/recipes/quickstart.yaml engine=@configs/engines/deepspeed.yaml
#
# The first argument is the number of ranks per machine; the rest goes to `sharded-spd finetune`. HOSTFILE names
# DeepSpeed's list of machines, MASTER_PORT a port for a second job on one machine. DS_ACCELERATOR=cpu is set if
# nvidia-smi finds no GPU.
set -euo pipefail

if [[ $# -lt 1 || ! $1 =~ ^[0-9]+$ ]]; then
  echo "usage: $0 RANKS_PER_MACHINE [CONFIG.yaml] [key=value ...]" >&2
  exit 2
fi
ranks=$1
shift

if [[ -z ${DS_ACCELERATOR:-} ]] && ! nvidia-smi -L >/dev/null 2>&1; then
  export DS_ACCELERATOR=cpu
fi
options=()
[[ -z ${HOSTFILE:-} ]] || options+=(--hostfile "$HOSTFILE")
[[ -z ${MASTER_PORT:-} ]] || options+=(--master_port "$MASTER_PORT")
exec "${PYTHON:-python}" -m deepspeed.launcher.runner "${options[@]}" --num_gpus "$ranks" \
  "$(dirname "${BASH_SOURCE[0]}")/finetune.py" "$@"
