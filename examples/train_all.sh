#!/usr/bin/env bash
# The embedded models from nothing, on a machine with one GPU and a dozen cores:
#
#     bash examples/train_all.sh RUN PACKAGES [SCALE [FAMILY ...]]
#
# RUN is the folder of all that is made (on a fast disk: some 10 GB of latents), PACKAGES the
# node_modules of examples/train.py, SCALE what every number of steps is multiplied by, FAMILY lumina
# or sd3, both if none is named. Each model is a lane of its own: a single one leaves the GPU waiting.
# What was interrupted goes on when the script is started again.
set -euo pipefail
run=$1 packages=$2 scale=${3:-1} families=${*:4}
families=${families:-lumina sd3}
[[ $families =~ ^(lumina|sd3)(\ (lumina|sd3))*$ ]] || { echo "no such FAMILY: $families" >&2; exit 2; }
cd "$(dirname "$0")/.."
export OMP_NUM_THREADS=1 PYTHONPATH=$PWD
workers=$(($(nproc) > 5 ? $(nproc) - 4 : 1))
mkdir -p "$run/log"
rm -f "$run/log/failed"

stage() { # LOG STAGE options ...
  local log=$run/log/$1 name=$2
  shift 2
  python3 examples/train.py "$name" --run "$run" --packages "$packages" --threads 1 "$@" \
    >>"$log" 2>&1 || {
    touch "$run/log/failed"
    exit 1 # of this lane; the others end when they wait for it
  }
}
steps() { python3 -c "print(max(1, round($1 * $scale)))"; }
scenes() { # COUNT SIZES ...
  local count
  count=$(steps "$1")
  shift
  stage scenes scenes --sizes "$@" --count "$count" --workers "$workers"
  for size; do touch "$run/log/$size.done"; done
}
wait_for() {
  until [ -e "$run/log/$1.done" ]; do
    [ ! -e "$run/log/failed" ] || exit 1
    sleep 1
  done
}
lane() { # FAMILY, then STEPS BATCH RATE SIZES for every size, the smallest first
  local family=$1 total=0 last
  shift
  wait_for 128
  stage "$family" text --family "$family" --steps "$(steps 9600)" --workers 2
  while [ $# -gt 0 ]; do
    total=$((total + $(steps "$1")))
    last=$([ $# -gt 4 ] && echo 0 || steps "$1 * 0.85") # the rate falls while pictures are largest
    wait_for "${4##* }"
    # shellcheck disable=SC2086
    stage "$family" train --family "$family" --steps "$total" --batch "$2" --sizes $4 \
      --muon-lr "$3" --adam-lr "${3}e-1" --cooldown "$last" --warmup 300 --renew 0 --workers 4 \
      --compile --sheet-minutes 0
    shift 4
  done
  stage "$family" export --family "$family" --out "$run/mini-$family" --default-solver corrected
}

(scenes 40000 128 && scenes 60000 256 && scenes 30000 384 && scenes 8000 512x256 256x512) &
stage classifier classifier --batch 64 --steps "$(steps 3000)" --workers 4 &
for family in $families; do
  case $family in
    lumina) lane lumina 3000 256 0.02 128 3400 128 0.014 256 6900 64 0.012 "384 512x256 256x512" & ;;
    sd3) lane sd3 400 256 0.02 128 12800 128 0.014 256 & ;;
  esac
done
wait
[ ! -e "$run/log/failed" ] || { echo "a stage failed: see $run/log" >&2; exit 1; }
