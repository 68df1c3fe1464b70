#!/usr/bin/env bash
# The tables of README.md and docs/benchmark.md, from nothing: measure, keep the rows, render.
#
#   QUESTIONS=question.jsonl LIMIT=60 runs/reproduce.sh
#
# Interrupted, it goes on where it was. Environment: LIMIT questions of Spec-Bench (10 a task by default), QUESTIONS its
# file (fetched without), DRAFTS to compare, PEERS as options of confu bench, OUT for what is not committed.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bin=${BIN:-.venv/bin}
out=${OUT:-out/bench}
read -ra drafts <<< "${DRAFTS:-smollm2-135m-eagle3 smollm2-135m-confu}"
read -ra peers <<< "${PEERS:---peer transformers --peer eagle3-reference}"
common=("${drafts[@]}" --limit "${LIMIT:-60}" ${QUESTIONS:+--questions "$QUESTIONS"})

# Speed and acceptance at three temperatures by 30 and 60 nodes. Peers take part where answers can be compared.
for temperature in 0 0.7 1.0; do
    with=()
    if [ "$temperature" = 0 ]; then with=("${peers[@]}" --costs); fi
    "$bin/confu" bench "${common[@]}" --temperature "$temperature" --sweep nodes=30,60 --dtype bfloat16 \
        "${with[@]}" --out "$out/t$temperature"
done
# Equality where it can be decided: float32, greedy.
"$bin/confu" bench "${common[@]}" --dtype float32 --out "$out/float32"
# What a tree of another size or with fewer contemplate rows would do.
"$bin/confu" bench "${common[@]}" --sweep nodes=8,16,30,60 contemplate=0,4,16 --limit "${SWEEP_LIMIT:-12}" \
    --dtype bfloat16 --out "$out/sweep"

for run in t0 t0.7 t1.0 float32 sweep; do
    kept=benchmarks/results/spec-bench-$run
    mkdir -p "$kept"
    gzip -9 --no-name --stdout "$out/$run/results.jsonl" > "$kept/results.jsonl.gz"
    cp "$out/$run/run.json" "$kept/"
done
"$bin/python" benchmarks/table.py
