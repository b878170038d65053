#!/usr/bin/env bash
# Makes a page of photographs with every published family of image models, under its own published sampler and those of this
# package, with NFE, seconds and memory, and FID if you ask for it. Needs a GPU and the Hub, or folders with the weights, and
# pip install -e '.[eval]' (for FID '.[eval,inception]', and pyarrow to get captions from the Hub). It can be stopped and started
# again; a family that fails is named at the end, with exit code 1, and the others are made all the same.
#
#     bash examples/reproduce_photographs.sh outputs/photographs      # then open outputs/photographs/index.md
#     FAMILIES="amused_256 monetico" PROMPTS=4 FID=5000 bash examples/reproduce_photographs.sh
#
# FAMILIES       of amused_256 amused_512 meissonic monetico maskgit_256 maskgit_384 titok_l32 titok_s128 mmada showo_256 showo_512 lumina (default: all)
# PROMPTS        on each page: the first ones of photographs/prompts.txt, or classes.txt for MaskGIT and TiTok (default: 16)
# SAMPLERS       of the page; "published" is the family's own (default: published maskgit halton fast default best paper)
# METRICS        of the page, and of the captions for FID: "hps_v2_1 pick_score image_reward", say (default: none; they need the Hub)
# FID            number of captions, such as 5000 (default: 0, no FID), and FID_SAMPLERS (default: published fast default best)
# COCO_CAPTIONS, COCO_IMAGES   COCO's captions_val2014.json and val2014 (or 2017); without them, captions come from the Hub
# IMAGENET       for the FID of MaskGIT and TiTok: ADM's VIRTUAL_imagenet256_labeled.npz or a folder of photographs; without it there is none
# DEVICE         (default: cuda), and OFFLOAD: 1 keeps weights in the computer's memory (default: where the GPU has too little)
# STEPS, SIZE, BATCH_SIZE, LOOKAHEAD_BATCH_SIZE, DTYPE      for all families, in place of their own
# MODEL_mmada=folder, VARIANT_mmada=..., VQVAE_mmada=folder, LANGUAGE_MODEL_showo_256=folder and so on,
# TEXT_ENCODER_meissonic=folder: in place of what is on the Hub; an empty TEXT_ENCODER_meissonic is the one beside its weights, in
#                place of the one its authors sample with
set -uo pipefail
output=${1:-outputs/photographs}
here=$(dirname "$0")/photographs
device=${DEVICE:-cuda}
prompts=${PROMPTS:-16}
fid=${FID:-0}
read -ra samplers <<<"${SAMPLERS:-published maskgit halton fast default best paper}"
read -ra metrics <<<"${METRICS:-}"
read -ra fid_samplers <<<"${FID_SAMPLERS:-published fast default best}"
all="amused_256 amused_512 meissonic monetico maskgit_256 maskgit_384 titok_l32 titok_s128 mmada showo_256 showo_512 lumina"
# What the authors of Meissonic and Monetico steer away from.
negative="worst quality, low quality, low res, blurry, distortion, watermark, logo, signature, text, jpeg artifacts, signature, \
sketch, duplicate, ugly, identifying mark"
mkdir -p "$output/logs"
: >"$output/failed.txt"

# What suits a family: model, variant, dtype, images and states at once, steps, guidance, memory in GB, and its published sampler.
settings_of() {
    case $1 in
    amused_256) echo "amused/amused-256 - float16 16 64 12 10 6 maskgit" ;;
    amused_512) echo "amused/amused-512 - float16 8 32 12 10 8 maskgit" ;;
    meissonic) echo "MeissonFlow/Meissonic - float16 4 8 48 9 12 maskgit" ;;
    monetico) echo "Collov-Labs/Monetico - float16 8 16 48 9 10 maskgit" ;;
    maskgit_256) echo "llvictorll/Halton-MaskGIT 256_base float32 16 64 32 0.7 6 maskgit_halton" ;;
    maskgit_384) echo "llvictorll/Halton-MaskGIT 384_large float32 8 32 32 0.5 8 maskgit_halton" ;;
    titok_l32) echo "yucornetto/generator_titok_l32_imagenet - float32 32 128 8 4.5 5 titok_l32" ;;
    titok_s128) echo "yucornetto/generator_titok_s128_imagenet - float32 32 128 64 5.9 4 titok_s128" ;;
    mmada) echo "Gen-Verse/MMaDA-8B-MixCoT - bfloat16 4 8 15 3.5 22 showo" ;;
    showo_256) echo "showlab/show-o - bfloat16 8 64 18 1.75 6 showo" ;;
    showo_512) echo "showlab/show-o-512x512 - bfloat16 4 16 50 5 8 showo" ;;
    lumina) echo "Alpha-VLLM/Lumina-DiMOO - bfloat16 1 4 64 4 24 maskgit:choice_temperature=1,entropy_bound=0" ;;
    *) return 1 ;;
    esac
}

# logged NAME COMMAND...: what the command says is shown and kept in a log; an interruption ends everything.
logged() {
    local name=$1
    shift
    "$@" 2>&1 | tee "$output/logs/$name.log"
    local code=${PIPESTATUS[0]}
    [ "$code" -lt 130 ] || exit "$code"
    return "$code"
}

# attempt FAMILY PART COMMAND...: a failure is noted, and the rest goes on.
attempt() {
    echo "== $1: $2"
    logged "$1-$2" "${@:3}" || echo "$1 $2" >>"$output/failed.txt"
}

# with_published SAMPLERS...: the samplers, with the family's own in the place of "published".
with_published() {
    local sampler
    for sampler in "$@"; do
        if [ "$sampler" = published ]; then echo "$published"; else echo "$sampler"; fi
    done | awk '!seen[$0]++'
}

# compare_samplers PART SAMPLERS... -- FLAGS...: one comparison of the present family.
compare_samplers() {
    local part=$1 chosen=()
    shift
    while [ "$1" != -- ]; do chosen+=("$1") && shift; done
    shift
    mapfile -t chosen < <(with_published "${chosen[@]}")
    attempt "$family" "$part" diffusers-infogain compare "${common[@]}" --samplers "${chosen[@]}" --output "$output/$family/$part" "$@"
}

# statistics NAME FOLDER: those of a folder of photographs, measured once; a file stays as it is.
statistics() {
    if [ ! -d "$2" ]; then
        reference=$2
        return
    fi
    reference=$output/$1.npz
    [ -f "$reference" ] || attempt "$1" statistics diffusers-infogain evaluate --images "$2" --save-statistics "$reference" \
        "${features[@]}" --device "$device" --output "$output/statistics-$1"
    [ -f "$reference" ]
}

features=(--features "${FEATURES:-inception}")
memory=$(python -c "import torch; print(torch.cuda.get_device_properties(0).total_memory >> 30 if torch.cuda.is_available() else 0)")
of_photographs=
if [ "$fid" -gt 0 ]; then
    files=()
    [ -z "${COCO_CAPTIONS:-}" ] || files=(--captions "$COCO_CAPTIONS" --images "${COCO_IMAGES:-}")
    attempt coco captions python "$here/coco.py" "$output/coco" --count "$fid" "${files[@]}"
    statistics coco "$output/coco/images" && of_photographs=$reference
    of_classes=
    [ -z "${IMAGENET:-}" ] || { statistics imagenet "$IMAGENET" && of_classes=$reference; }
    seq 0 999 >"$output/classes.txt"
fi

for family in ${FAMILIES:-$all}; do
    if ! line=$(settings_of "$family"); then
        echo "FAMILIES must be among $all, got $family." | tee "$output/logs/$family-settings.log"
        echo "$family settings" >>"$output/failed.txt"
        continue
    fi
    read -r model variant dtype batch_size lookahead steps guidance needed published <<<"$line"
    own_model=MODEL_$family own_variant=VARIANT_$family own_vqvae=VQVAE_$family own_language_model=LANGUAGE_MODEL_$family
    [ "$variant" != - ] || variant=
    variant=${!own_variant-$variant}
    offload=${OFFLOAD:-}
    if [ -z "$offload" ] && [ "$device" != cpu ] && [ "${memory:-0}" -gt 0 ] && [ "${memory:-0}" -lt "$needed" ]; then
        offload=1 batch_size=1 lookahead=1
    fi
    common=(--model "${!own_model:-$model}" --device "$device" --dtype "${DTYPE:-$dtype}" --seeds 0 --steps "${STEPS:-$steps}"
        --guidance-scales "$guidance" --batch-size "${BATCH_SIZE:-$batch_size}" --lookahead-batch-size "${LOOKAHEAD_BATCH_SIZE:-$lookahead}")
    [ -z "$variant" ] || common+=(--variant "$variant")
    [ -z "${!own_vqvae:-}" ] || common+=(--vqvae "${!own_vqvae}")
    [ -z "${!own_language_model:-}" ] || common+=(--language-model "${!own_language_model}")
    [ "${offload:-0}" != 1 ] || common+=(--offload)
    text_encoder=
    [ "$family" != meissonic ] || text_encoder=${TEXT_ENCODER_meissonic-laion/CLIP-ViT-H-14-laion2B-s32B-b79K}
    [ -z "$text_encoder" ] || common+=(--text-encoder "$text_encoder")
    case $family in meissonic | monetico) common+=(--negative-prompt "$negative") ;; esac
    texts=$here/prompts.txt
    case $family in maskgit_* | titok_*) texts=$here/classes.txt ;; esac
    case $family in
    maskgit_* | titok_* | showo_*) ;; # of one size only
    *) [ -z "${SIZE:-}" ] || common+=(--height "$SIZE" --width "$SIZE") ;;
    esac
    compare_samplers page "${samplers[@]}" -- --prompts "$texts" --num-prompts "$prompts" --metrics "${metrics[@]}" --grid "$prompts"
    [ "$fid" -gt 0 ] || continue
    case $family in
    maskgit_* | titok_*)
        of_prompts=(--prompts "$output/classes.txt" --num-prompts "$fid" --num-images $(((fid + 999) / 1000)))
        reference=$of_classes fid_metrics=(frechet) # the prompts are numbers
        ;;
    *) of_prompts=(--prompts "$output/coco/captions.jsonl" --num-prompts "$fid") reference=$of_photographs fid_metrics=(frechet "${metrics[@]}") ;;
    esac
    if [ -z "$reference" ]; then
        echo "== $family: no FID, for want of a reference"
        continue
    fi
    compare_samplers fid "${fid_samplers[@]}" -- "${of_prompts[@]}" --metrics "${fid_metrics[@]}" --reference "$reference" "${features[@]}" --grid 0
done

python "$here/index.py" "$output"
if [ -s "$output/failed.txt" ]; then
    echo "These failed; their logs are in $output/logs:" >&2
    cat "$output/failed.txt" >&2
    exit 1
fi
