#!/usr/bin/env bash
# The whole pipeline on one machine, a command at a time; what can be done at the same time is.
#
#     examples/pipeline.sh RUN FILES…      settings in RUN/cpipe.toml
#     JOBS=4 examples/pipeline.sh …        four commands at a time; default: 2
#
# Interrupted, the same command goes on where it stopped: what is finished is up to date.
set -euo pipefail

if (($# < 2)); then
    sed -n '2,7s/^#$//; 2,7s/^# //p' "$0" >&2
    exit 2
fi
run=$1
shift
jobs=${JOBS:-2}

# Each takes a share of the text; then they are joined.
seq -f "%g/$jobs" "$jobs" | xargs -P "$jobs" -n 1 cpipe tokenize "$run" "$@" --shard
cpipe tokenize "$run" "$@" --merge

cpipe cluster "$run" &
clustering=$!
trap 'kill "$clustering" 2> /dev/null' EXIT # it is in the background, where Ctrl-C does not reach
cpipe train-seed "$run"
wait "$clustering"
trap - EXIT

# One expert per cluster; then what is left, which is the dense baseline.
clusters=$(sed -n 's/^ *"clusters": \([0-9]*\),$/\1/p' "$run/clusters/manifest.json")
seq 0 $((clusters - 1)) | xargs -P "$jobs" -n 1 cpipe train-experts "$run" --expert
cpipe train-experts "$run"

cpipe train-gates "$run"
cpipe compose "$run"
cpipe evaluate "$run"
