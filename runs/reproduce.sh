#!/usr/bin/env bash
# The tables of README.md and docs/benchmark.md, from nothing: measure, keep the rows, render.
#
#   QUESTIONS=question.jsonl LLAMA_CPP=/opt/llama/bin/python,model.gguf VLLM=/opt/vllm/bin/python runs/reproduce.sh
#   RUNS="t0 t0.7" LIMIT=60 runs/reproduce.sh
#
# As it stands it asks as many questions of Spec-Bench, for answers as long, as the committed rows hold. Interrupted, it
# goes on where it was; a larger LIMIT adds to what is there. Environment: QUESTIONS, Spec-Bench's file (fetched without);
# LLAMA_CPP, an interpreter that has llama-cpp-python and the target's GGUF file, and VLLM, one that has vLLM: other
# engines to measure beside ours, left out without; DRAFTS to compare; RUNS to do (`peers` is `tuned` beside all other
# engines; `unblocked` has a target that comes from no GGUF file); LIMIT and NEW_TOKENS in place of a run's own; BIN,
# where confu is; OUT for what is not committed.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bin=${BIN:-.venv/bin}
out=${OUT:-out/bench}
read -ra drafts <<< "${DRAFTS:-smollm2-135m-eagle3 smollm2-135m-confu}"
read -ra runs <<< "${RUNS:-peers tuned unblocked int8 t0 t0.7 t1.0 float32 sweep}"

for run in "${runs[@]}"; do
    limit=12 length=128
    case "$run" in
    # As a user would decode: trees sized by what `confu tune` finds, beside other engines; and with other weights.
    tuned | peers | unblocked | int8)
        options=(--dtype bfloat16)
        case "$run" in
        tuned) limit=36 length=256 ;;
        int8) options+=(--quantization int8) ;;
        unblocked)
            limit=24 length=256 target=$out/smollm2-135m-unblocked
            if [ ! -e "$target" ]; then "$bin/python" benchmarks/unblocked.py "$target"; fi
            options+=(--target "$(realpath "$target")") ;;
        esac
        for draft in "${drafts[@]}"; do
            if [ ! -e "$out/$run/results.jsonl" ]; then "$bin/confu" tune "$draft" "${options[@]}"; fi
        done
        if [ "$run" != unblocked ] && [ -n "${LLAMA_CPP:-}" ]; then options+=(--peer "llama.cpp=$LLAMA_CPP"); fi
        if [ "$run" = peers ]; then
            options+=(--peer transformers)
            if [ -n "${VLLM:-}" ]; then
                exported=$out/vllm-eagle3
                if [ ! -e "$exported" ]; then "$bin/confu" export "${drafts[0]}" "$exported" --to vllm; fi
                options+=(--peer "vllm=$VLLM,$exported")
            fi
        fi ;;
    # Acceptance and speed at three temperatures, by 30 and 60 nodes.
    t0) options=(--dtype bfloat16 --sweep nodes=30,60 --costs) limit=18 length=256 ;;
    t*) options=(--dtype bfloat16 --sweep nodes=30,60 --temperature "${run#t}") limit=18 length=256 ;;
    # Equality where it can be decided, and our eagle3 against EAGLE-3 written again.
    float32) options=(--dtype float32 --tree-nodes 30 --peer eagle3-reference) length=256 ;;
    # What a tree of another size or with fewer contemplate rows would do.
    sweep) options=(--dtype bfloat16 --sweep nodes=8,16,30,60 contemplate=0,4,16) limit=6 ;;
    *) echo "RUNS names $run; give some of peers, tuned, unblocked, int8, t0, t0.7 (or another temperature), float32, sweep." >&2; exit 2 ;;
    esac
    "$bin/confu" bench "${drafts[@]}" --limit "${LIMIT:-$limit}" --max-new-tokens "${NEW_TOKENS:-$length}" \
        ${QUESTIONS:+--questions "$QUESTIONS"} "${options[@]}" --out "$out/$run"
    kept=benchmarks/results/spec-bench-$run
    mkdir -p "$kept"
    gzip -9 --no-name --stdout "$out/$run/results.jsonl" > "$kept/results.jsonl.gz"
    cp "$out/$run/run.json" "$kept/"
done
"$bin/python" benchmarks/table.py
