#!/usr/bin/env bash
# Start a fine-tuning job under `accelerate launch`.
#
#   launch/accelerate.sh 2 configs/recipes/quickstart.yaml engine=@configs/engines/deepspeed.yaml
#
# The first argument is the number of ranks; the rest goes to `sharded-spd finetune`. ACCELERATE_CONFIG names a
# configuration other than configs/accelerate/deepspeed.yaml, MASTER_PORT a port for a second job on one machine.
set -euo pipefail

if [[ $# -lt 1 || ! $1 =~ ^[0-9]+$ ]]; then
  echo "usage: $0 RANKS [CONFIG.yaml] [key=value ...]" >&2
  exit 2
fi
ranks=$1
shift

options=()
[[ -z ${MASTER_PORT:-} ]] || options+=(--main_process_port "$MASTER_PORT")
here=$(dirname "${BASH_SOURCE[0]}")
exec "${PYTHON:-python}" -m accelerate.commands.launch \
  --config_file "${ACCELERATE_CONFIG:-$here/../configs/accelerate/deepspeed.yaml}" --num_processes "$ranks" "${options[@]}" \
  "$here/finetune.py" "$@"
