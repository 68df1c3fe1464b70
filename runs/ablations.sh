#!/usr/bin/env bash
# The ablations of docs/training.md: ConFu with one thing changed at a time, all from the shipped EAGLE-3 draft, over
# the same batches, for the same number of steps; then tau of each by the real decoder.
#
#   DATA=responses.jsonl PROMPTS=prompts_dev.jsonl runs/ablations.sh
#
# Interrupted, it goes on where it was. Environment: STEPS of each run (120), BATCH_TOKENS of a step (2048), DEVICE (cpu),
# ARMS to do (all), NAME of the rows (trial), OUT for what is not committed, BIN of the environment. The committed rows,
# NAME=ablation, are of 200 steps of 8,192 tokens on a GPU, three runs at a time.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bin=${BIN:-.venv/bin}
out=${OUT:-out/ablations}
name=${NAME:-trial}
declare -A changed=(
    [control]=""
    [confu]=""
    [no-mixtures]="--num-experts 1 --top-experts 1"
    [no-prompts]="--num-soft-prompts 0"
    [router-token]="--router token"
    [l-4]="--replication 4"
    [l-8]="--replication 8"
    [l-16]="--replication 16"
    [slow-prompts]="--lr-prompts 3e-3"
    [slow-experts]="--lr-experts 1e-3"
    [row]="--future-form row"
    [kv]="--future-form kv"
    [input]="--future-form input"
)
read -ra arms <<< "${ARMS:-control confu no-mixtures no-prompts router-token l-4 l-8 l-16 slow-prompts slow-experts row kv input}"
drafts=()
for arm in "${arms[@]}"; do
    read -ra options <<< "${changed[$arm]}"
    case "$arm" in control | l-*) ;; *) options+=(--replication 1) ;; esac
    recipe=recipes/smollm2-135m-confu.toml
    if [ "$arm" = control ]; then recipe=recipes/smollm2-135m-control.toml; fi
    if [ ! -e "$out/$arm/final/model.safetensors" ]; then
        resume=()
        if [ -e "$out/$arm/checkpoint.pt" ]; then resume=(--resume); fi
        "$bin/confu" train "$recipe" --data "$DATA" --steps "${STEPS:-120}" --lr 4e-4 --seed 2 --checkpoint-every 20 \
            --batch-tokens "${BATCH_TOKENS:-2048}" --device "${DEVICE:-cpu}" "${options[@]}" "${resume[@]}" --out "$out/$arm"
    fi
    kept=benchmarks/results/training/$name-$arm
    mkdir -p "$kept"
    cp "$out/$arm/metrics.jsonl" "$out/$arm/config.json" "$kept/"
    echo "ablation: ${changed[$arm]:-nothing else}; tau in the table of tau-$name" > "$kept/note.txt"
    drafts+=("$arm=$out/$arm/final")
done
"$bin/python" benchmarks/tau.py "$PROMPTS" --drafts "${drafts[@]}" --batch-size 14 \
    --device "${DEVICE:-cpu}" --out "benchmarks/results/tau-$name"
"$bin/python" benchmarks/table.py
