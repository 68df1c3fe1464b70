#!/usr/bin/env bash
# The tables of README.md and docs/benchmark.md, from nothing: measure, keep the rows, render.
#
#   QUESTIONS=question.jsonl LIMIT=60 runs/reproduce.sh
#   RUNS="t0 t0.7" runs/reproduce.sh
#
# Interrupted, it goes on where it was; a larger LIMIT adds to what is there. Environment: LIMIT questions of Spec-Bench
# (60 by default, 10 a task; SWEEP_LIMIT of the sweep, 12), NEW_TOKENS of an answer at most (256), QUESTIONS its file
# (fetched without), DRAFTS to compare, PEERS of the runs `tuned`, `peers` and `int8` as options of confu bench,
# RUNS to do (`peers` is `tuned` under another name, for more engines and fewer questions; `unblocked` has a target that
# comes from no GGUF file), OUT for what is not committed.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bin=${BIN:-.venv/bin}
out=${OUT:-out/bench}
read -ra drafts <<< "${DRAFTS:-smollm2-135m-eagle3 smollm2-135m-confu}"
read -ra peers <<< "${PEERS:---peer transformers}"
read -ra runs <<< "${RUNS:-tuned unblocked int8 t0 t0.7 t1.0 float32 sweep}"
common=("${drafts[@]}" --max-new-tokens "${NEW_TOKENS:-256}" ${QUESTIONS:+--questions "$QUESTIONS"})

for run in "${runs[@]}"; do
    limit=${LIMIT:-60}
    case "$run" in
    # As a user would decode: trees sized by what `confu tune` finds, beside every peer; and with other weights.
    tuned | peers | unblocked | int8)
        options=(--dtype bfloat16)
        case "$run" in
        int8) options+=(--quantization int8) ;;
        unblocked)
            target=$out/smollm2-135m-unblocked
            if [ ! -e "$target" ]; then "$bin/python" benchmarks/unblocked.py "$target"; fi
            options+=(--target "$(realpath "$target")") ;;
        esac
        for draft in "${drafts[@]}"; do
            if [ ! -e "$out/$run/results.jsonl" ]; then "$bin/confu" tune "$draft" "${options[@]}"; fi
        done
        if [ "$run" != unblocked ]; then options+=("${peers[@]}"); fi ;;
    # Acceptance and speed at three temperatures, by 30 and 60 nodes.
    t0) options=(--dtype bfloat16 --sweep nodes=30,60 --costs) ;;
    t*) options=(--dtype bfloat16 --sweep nodes=30,60 --temperature "${run#t}") ;;
    # Equality where it can be decided, and our eagle3 against EAGLE-3 written again.
    float32) options=(--dtype float32 --tree-nodes 30 --peer eagle3-reference) ;;
    # What a tree of another size or with fewer contemplate rows would do.
    sweep) options=(--dtype bfloat16 --sweep nodes=8,16,30,60 contemplate=0,4,16) limit=${SWEEP_LIMIT:-12} ;;
    *) echo "RUNS names $run; give some of tuned, peers, unblocked, int8, t0, t0.7 (or another temperature), float32, sweep." >&2; exit 2 ;;
    esac
    "$bin/confu" bench "${common[@]}" --limit "$limit" "${options[@]}" --out "$out/$run"
    kept=benchmarks/results/spec-bench-$run
    mkdir -p "$kept"
    gzip -9 --no-name --stdout "$out/$run/results.jsonl" > "$kept/results.jsonl.gz"
    cp "$out/$run/run.json" "$kept/"
done
"$bin/python" benchmarks/table.py
