#!/usr/bin/env bash
# Makes the images of a file of prompts on Slurm: each task of an array makes those of its share of the prompts, in a folder of
# its own. Started again, all of it or single tasks, it makes what is missing.
#
#     sbatch --array=0-63 --gres=gpu:1 examples/slurm_array.sh 64 captions.txt outputs/array \
#         --model amused/amused-512 --dtype float16 --preset fast
#     diffusers-infogain evaluate --images outputs/array --metrics frechet --reference coco/val2014 --output outputs/array-report
#
# The number of shares, a text or JSONL file with a prompt on each line, a folder, and flags of `diffusers-infogain evaluate`, which
# has to be on PATH: activate its environment before sbatch, which passes it on. Shares are whole batches, and image i of all has
# the seed SEED + i, so the images are those of one process, whatever the number of shares.
#
# SEED         of the first image (default: 0)
# NUM_IMAGES   per prompt (default: 1)
# BATCH_SIZE   (default: 16)
#SBATCH --job-name=infogain
#SBATCH --requeue
set -euo pipefail
seed=${SEED:-0} num_images=${NUM_IMAGES:-1} batch_size=${BATCH_SIZE:-16}

die() {
    echo "$1" >&2
    exit 2
}

[ $# -ge 3 ] || die "usage: slurm_array.sh SHARES PROMPTS OUTPUT [flags of diffusers-infogain evaluate]"
shares=$1 prompts=$2 output=$3
shift 3
task=${SLURM_ARRAY_TASK_ID:?"is set by sbatch --array"}
case $shares in '' | *[!0-9]*) die "SHARES must be a number, got $shares." ;; esac
[ "$task" -lt "$shares" ] || die "SLURM_ARRAY_TASK_ID must be below the number of shares, $shares, got $task: use sbatch --array=0-$((shares - 1))."
case $prompts in *.txt | *.jsonl) ;; *) die "PROMPTS must be a .txt or .jsonl file, got $prompts." ;; esac
[ -f "$prompts" ] || die "$prompts is missing."

# Prompts per share, rounded up to a multiple of the batch size.
total=$(grep -c '[^[:space:]]' "$prompts" || true)
size=$(((total + shares - 1) / shares))
size=$(((size + batch_size - 1) / batch_size * batch_size))
first=$((task * size))
[ "$first" -lt "$total" ] || { echo "Nothing is left for share $task of $shares: $total prompts in shares of $size." && exit 0; }

share=$(printf '%s/share-%05d' "$output" "$task")
mkdir -p "$share"
own=$share/prompts.${prompts##*.}
grep '[^[:space:]]' "$prompts" | sed -n "$((first + 1)),$((first + size))p" >"$own.$$"
mv "$own.$$" "$own"
exec diffusers-infogain evaluate "$@" --prompts "$own" --output "$share" --num-images "$num_images" --batch-size "$batch_size" \
    --seed $((seed + first * num_images))
