#!/usr/bin/env bash
# Train with torchrun, on one node or several.
#
#   launch/torchrun.sh 8 configs/llama_8b_128k.toml --run-dir runs/llama
#   MAX_RESTARTS=3 LOG_DIR=logs launch/torchrun.sh 8 configs/llama_8b_128k.toml --run-dir runs/llama
#
# Several nodes: run the same line on each of them with NNODES and RDZV_ENDPOINT=host:port of one node set.
#
#   MAX_RESTARTS      Start ranks that failed again this often, all nodes together; they go on from the newest checkpoint.
#                     Default 0. A mistake that you have to mend (exit code 2) is final. A stage that wants another mesh
#                     (exit code 4) starts them again by itself, and does not count.
#   LOG_DIR           Keep the output of every rank but 0 in LOG_DIR/<time>-<host>-<pid>/start_1/rank_N/ instead of on the
#                     terminal, where each of their lines begins with "[rank N]". Rank 0 always writes to the terminal.
#   SHUTDOWN_TIMEOUT  Seconds that ranks have after SIGTERM before they are killed. Default 30; a step and a save of a large
#                     model take longer. (torch >= 2.13)
#
# SIGUSR1 or SIGTERM to the ranks saves and stops after the current step. torchrun's own agent would die of SIGUSR1, so
# it ignores the signal here; the ranks install handlers of their own. It passes SIGTERM on and ends with 143. A terminal
# that closes ends all of it without a save, unless it was started by nohup, which plain torchrun does not heed.
# Ends with the exit code of the rank that failed first, 128 + n if signal n ended it (137: killed, often for memory).
set -euo pipefail
if [ $# -lt 2 ]; then
  echo "usage: launch/torchrun.sh RANKS_PER_NODE CONFIG [moba-train train options]" >&2
  exit 2
fi
if [[ ! $1 =~ ^([1-9][0-9]*|gpu|cpu|auto)$ ]]; then
  echo "launch/torchrun.sh: the first argument is the number of ranks on each node (gpu: one for each GPU), not '$1'" >&2
  exit 2
fi
ranks=$1
shift
trap '' USR1
options=(--max-restarts "${MAX_RESTARTS:-0}")
[ -n "${LOG_DIR:-}" ] && options+=(--log-dir "$LOG_DIR")
[ -n "${SHUTDOWN_TIMEOUT:-}" ] && options+=(--shutdown-timeout "$SHUTDOWN_TIMEOUT")
if [ "${NNODES:-1}" = 1 ]; then
  options+=(--standalone)
else
  options+=(--nnodes "$NNODES" --rdzv-backend c10d --rdzv-endpoint "${RDZV_ENDPOINT:?set RDZV_ENDPOINT=host:port}" --rdzv-id "${RDZV_ID:-moba-train}")
fi
exec python3 "$(dirname "$0")/run_ranks.py" "${options[@]}" --nproc-per-node "$ranks" -m moba_train train "$@"
