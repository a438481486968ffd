#!/usr/bin/env bash
# The demo behind `make demo`: prepare data, train on RANKS context-parallel ranks, stop in the middle, resume, look for
# the needle, write the report.
#
#   launch/demo.sh .venv/bin 2 runs/demo
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bin=$1 ranks=$2 run=$3
config=configs/demo_cpu.toml
say() { printf '\n\033[1m== %s\033[0m\n' "$*"; }
torchrun() { "$bin/torchrun" --standalone --nproc-per-node "$ranks" -m moba_train "$@"; }

started=$SECONDS
rm -rf "$run"
say "1/5 prepare: the Python standard library as text, needles from a word list"
"$bin/moba-train" prep stdlib --out data/demo --vocab-size 2048 --needles 128:8000,256:4000,512:2000,1024:2000
say "2/5 train on $ranks ranks, and stop in the middle"
torchrun train $config --run-dir "$run" --parallel.cp "$ranks" --run.stop-after-steps 400
say "3/5 resume from the checkpoint and train to the end"
torchrun train $config --run-dir "$run" --parallel.cp "$ranks" --resume auto
say "4/5 needle in a haystack: MoBA, full attention and random routing"
torchrun eval niah "$run" --parallel.cp "$ranks"
say "5/5 report"
"$bin/moba-train" report "$run"
printf '\nThe demo took %d min %02d s.\n' $(((SECONDS - started) / 60)) $(((SECONDS - started) % 60))
