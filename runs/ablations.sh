#!/usr/bin/env bash
# The ablations of docs/training.md: ConFu with one thing changed at a time, all from the shipped EAGLE-3 draft, over
# the same batches, for the same number of steps; then tau of each by the real decoder.
#
#   DATA=responses.jsonl PROMPTS=prompts_dev.jsonl runs/ablations.sh
#
# Interrupted, it goes on where it was. Environment: STEPS of each run (120), BATCH_TOKENS of a step (2048), DEVICE (cpu),
# ARMS to do (all), JOBS at a time (1), DTYPE of the decoder (bfloat16), NAME of the rows (trial), OUT for what is not
# committed, BIN of the environment. The committed rows, NAME=ablation-l4, are of 200 steps of 8,192 tokens on a GPU,
# several runs at a time; those of NAME=ablation are older, of the same changes to a recipe with l = 1.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export bin=${BIN:-.venv/bin} out=${OUT:-out/ablations} name=${NAME:-trial}
read -ra arms <<< "${ARMS:-control confu no-mixtures no-prompts router-token l-1 l-8 l-16 slow-prompts slow-experts row kv input}"

options_of() {
    case "$1" in
    control | confu) ;;
    no-mixtures) echo "--num-experts 1 --top-experts 1" ;;
    no-prompts) echo "--num-soft-prompts 0" ;;
    router-token) echo "--router token" ;;
    l-*) echo "--replication ${1#l-}" ;;
    slow-prompts) echo "--lr-prompts 3e-3" ;;
    slow-experts) echo "--lr-experts 1e-3" ;;
    row | kv | input) echo "--future-form $1" ;;
    *) echo "ARMS names $1, which is not known; the arms are in options_of." >&2; exit 2 ;;
    esac
}

train() {
    local arm=$1 recipe=recipes/smollm2-135m-confu.toml changed options resume=()
    changed=$(options_of "$arm")
    read -ra options <<< "$changed"
    if [ "$arm" = control ]; then recipe=recipes/smollm2-135m-control.toml; fi
    if [ ! -e "$out/$arm/final/model.safetensors" ]; then
        if [ -e "$out/$arm/checkpoint.pt" ]; then resume=(--resume); fi
        "$bin/confu" train "$recipe" --data "$DATA" --steps "${STEPS:-120}" --lr 4e-4 --seed 2 --checkpoint-every 20 \
            --batch-tokens "${BATCH_TOKENS:-2048}" --device "${DEVICE:-cpu}" "${options[@]}" "${resume[@]}" --out "$out/$arm"
    fi
    local kept=benchmarks/results/training/$name-$arm
    mkdir -p "$kept"
    cp "$out/$arm/metrics.jsonl" "$out/$arm/config.json" "$kept/"
    echo "ablation: ${changed:-nothing else}; tau in the table of tau-$name" > "$kept/note.txt"
}

tau() {
    "$bin/python" benchmarks/tau.py "$PROMPTS" --drafts "$@" --batch-size 14 --dtype "${DTYPE:-bfloat16}" \
        --device "${DEVICE:-cpu}" --out "benchmarks/results/tau-$name"
}

export -f options_of train tau
for arm in "${arms[@]}"; do options_of "$arm" > /dev/null; done
run() { xargs -P "${JOBS:-1}" -I '{}' bash -euo pipefail -c "$1"; }
printf '%s\n' "${arms[@]}" | run 'train "{}"'
drafts=()
for arm in "${arms[@]}"; do drafts+=("$arm=$out/$arm/final"); done
if [ "${JOBS:-1}" -gt 1 ]; then printf '%s\n' "${drafts[@]}" | run 'tau "{}"'; fi
tau "${drafts[@]}" # in order, what is missing, and run.json of them all
"$bin/python" benchmarks/table.py
