#!/usr/bin/env bash
# Train with torchrun, on one node or several.
#
#   launch/torchrun.sh 8 configs/llama_8b_128k.toml --run-dir runs/llama
#
# Several nodes: run the same line on each of them with NNODES and RDZV_ENDPOINT=host:port of one node set.
# SIGUSR1 or SIGTERM to the ranks saves and stops after the current step. torchrun's own agent would die of SIGUSR1, so
# it ignores the signal here; the ranks install handlers of their own. Ends with the exit code of the rank that failed.
set -euo pipefail
if [ $# -lt 2 ]; then
  echo "usage: launch/torchrun.sh RANKS_PER_NODE CONFIG [moba-train train options]" >&2
  exit 2
fi
ranks=$1
shift
trap '' USR1
if [ "${NNODES:-1}" = 1 ]; then
  rendezvous=(--standalone)
else
  rendezvous=(--nnodes "$NNODES" --rdzv-backend c10d --rdzv-endpoint "${RDZV_ENDPOINT:?set RDZV_ENDPOINT=host:port}" --rdzv-id "${RDZV_ID:-moba-train}")
fi
exec python3 "$(dirname "$0")/run_ranks.py" "${rendezvous[@]}" --nproc-per-node "$ranks" -m moba_train train "$@"
