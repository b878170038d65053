#!/usr/bin/env bash
# Measures the tables of docs/speed.md and writes them there: some minutes on a CPU that does nothing else.
#
#     bash examples/measure_speed.sh [FOLDER]
#
# A table that is in the folder (docs/results/speed) already is not measured again, so that a run that was stopped goes on; remove
# the folder to measure anew.
set -euo pipefail
cd "$(dirname "$0")/.."
folder=${1:-docs/results/speed}
mkdir -p "$folder"

table() { # its name, and the arguments of the benchmark
    local file=$folder/$1
    if [ ! -s "$file.txt" ]; then
        echo "measuring $1" >&2
        diffusers-infogain benchmark --device cpu --markdown --json "$file.json" "${@:2}" >"$file.part"
        mv "$file.part" "$file.txt"
    fi
}

table demo --threads 1 --samplers maskgit maskgit:entropy_bound=0.25 fast default best --against maskgit --batch-sizes 1 8
table demo_two_threads --threads 2 --samplers maskgit fast default best --batch-sizes 1 8
table decisions --threads 1 --decisions --runs 10
table decisions_compiled --threads 1 --decisions --compile --runs 10
table decisions_text --threads 1 --decisions --length 32 --codebook-size 126464
table shapes --threads 1 --random maskgit-256-tiny --steps 8 --samplers maskgit fast default --against maskgit --batch-sizes 1 --runs 2
best=best:num_candidates=8
table memory --threads 1 --random maskgit-256-tiny --steps 2 --samplers $best $best,lookahead_batch_size=2 --batch-sizes 1 --runs 3

shape=(hidden_size=512 intermediate_size=1536 num_hidden_layers=8 num_attention_heads=8 num_key_value_heads=4 head_dim=64)
for sharpness in 32 8; do
    table "text_$sharpness" --threads 1 --random sdar-8b --size "${shape[@]}" vocab_size=16384 --sharpness $sharpness \
        --prompt-length 16 --max-new-tokens 64 --block-length 16 --samplers confidence paper:confidence_threshold=0.8 default \
        --against confidence --batch-sizes 1 --runs 2
done

if [ "$folder" = docs/results/speed ]; then
    python docs/write_speed.py
fi
cat "$folder"/*.txt
