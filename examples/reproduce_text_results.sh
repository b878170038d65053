#!/usr/bin/env bash
# Every figure of docs/results.md on the embedded text model: settings are chosen on one split of problems and seeds, compared on a
# second one, and the final table is made once on the third. About an hour on one CPU core, going on where it was killed.
#     bash examples/reproduce_text_results.sh outputs/text
set -euo pipefail
output=${1:-outputs/text}
mkdir -p "$output"

# 1. Choose: the greedy settings that all others have to beat, on text tasks and on exact models.
python examples/choose_text_settings.py "$output/choose" --num-screened 40 --num-kept 24 --num 100 --tasks equation sudoku
python examples/choose_text_settings.py "$output/choose" --num-screened 32 --num-kept 20 --seeds 0 1 --tasks exact-sudoku \
    exact-digits exact-synonyms
split="diffusers-infogain compare-text --device cpu --num-problems 100 --batch-size 100"
lazy=gain_reduction=sum,num_candidates=2
pivot=info_gain:certainty=pivot,pivot_temperature=0,$lazy
verify=entropy_bound=4,corrector=verify
cold=top_p=0.9,token_temperature=0.7

# The settings of the others.
choose="$split --split choose --tokens-per-step 1 --output $output/choose/others --tasks equation sudoku --samplers"
$choose left:entropy_bound=0.25,retry_above_nats=15 left:entropy_bound=0.25,retry_below_sigmas=-2 left:entropy_bound=0.25,num_runs=4
$choose pivot:entropy_bound=0.25,retry_above_nats=15 pivot:entropy_bound=0.25,retry_below_sigmas=-2 pivot:entropy_bound=0.25,corrector=verify
for bound in 0.1 0.25; do
    $choose $pivot,entropy_bound=$bound,lazy_threshold=-1,retry_below_sigmas=-2 $pivot,entropy_bound=$bound,lazy_threshold=0
done
$choose confidence:entropy_bound=0.1,corrector=verify,verify_classes=2 pivot:entropy_bound=0.25,corrector=verify,verify_classes=2
diffusers-infogain exact --split choose --seeds 0 1 --samplers {maskgit,uniform}:$verify {maskgit,uniform}:$verify,verify_threshold=0.5

# 2. Report, and 3. the final table, once, with nothing chosen by it.
for part in report final; do
    for task in equation sudoku; do
        table="$split --split $part --seeds 0 1 2 3 4 5 --tasks $task --rivals $output/choose/$task --output $output/$part/$task"
        $table --tokens-per-step 4 --samplers left:top_p=0.9
        $table --tokens-per-step 1 --samplers left:entropy_bound=0.1,{top_p=0.9,token_temperature=0.7,retry_above_nats=15} \
            pivot:entropy_bound=0.1,{token_temperature=0.7,retry_below_sigmas=-2} klass:entropy_bound=0.25,$cold \
            entropy:entropy_bound=0.1,$cold info_gain:certainty=entropy,position_temperature=0,$lazy,lazy_threshold=-1,entropy_bound=0.1,$cold \
            $pivot,entropy_bound=0.1,lazy_threshold=-1,retry_below_sigmas=-2 \
            $pivot,entropy_bound=0.1,lazy_threshold=-1,num_runs=4,best_run_by=entropy_and_likelihood
        $table --tokens-per-step 1 --seeds 0 1 2 --samplers default --everything
    done
    diffusers-infogain exact --split $part --seeds 0 1 2 --samplers pivot:entropy_bound=0.25,top_p=0.9 \
        $pivot,entropy_bound=0.1,lazy_threshold=-1,retry_below_sigmas=-2 maskgit:entropy_bound=4 maskgit:$verify uniform:$verify \
        info_gain:certainty=maskgit,position_temperature=0,gain_reduction=sum,num_candidates=3,lazy_threshold=0,$verify,verify_threshold=0.5 \
        info_gain:certainty=uniform,position_temperature=0,$lazy,lazy_threshold=-1,$verify,verify_threshold=0.5 \
        | tee "$output/exact_$part.md"
done

# More samplers, on all problems.
# What pc_sampler reads: how often each character stands in texts like those that the model was trained on.
python - "$output/frequencies.safetensors" <<'PYTHON'
import sys

import torch

from diffusers_infogain import InfoGainTextPipeline
from diffusers_infogain.evaluation.text_tasks import sample_multiplications, sample_sudokus
from diffusers_infogain.token_frequencies import save_token_frequencies, token_frequencies

pipe, generator = InfoGainTextPipeline.from_pretrained("demo-text"), torch.Generator().manual_seed(0)
draws = (sample(1000, generator, held_out=False) for sample in (sample_multiplications, sample_sudokus))
problems = [problem for drawn in draws for problem in drawn]
texts = (pipe.tokenizer(problem.letter + problem.solution).input_ids for problem in problems)
save_token_frequencies(token_frequencies(texts, pipe.model.config.vocab_size), sys.argv[1])
PYTHON

compare="diffusers-infogain compare-text --device cpu --tasks equation sudoku --num-problems 100 --batch-size 100 --output $output/all"
frequencies=pc_frequencies=$output/frequencies.safetensors
calibrated=info_gain:certainty=pc_sampler,$frequencies,entropy_bound=0,num_candidates=8
uniform=info_gain:certainty=uniform,entropy_bound=0,num_candidates=8
entropy=info_gain:certainty=entropy,entropy_bound=0,num_candidates=8

# All that docs/results.md compares.
$compare --samplers uniform confidence entropy margin maskgit klass confidence:token_temperature=0.4 entropy:token_temperature=0.4
$compare --samplers klass:token_temperature=0.4 entropy:num_runs=8 entropy:num_runs=8,token_temperature=0.4
$compare --samplers pc_sampler:$frequencies pc_sampler:token_temperature=0.4,$frequencies
$compare --samplers $calibrated,gain_reduction=mean,token_temperature=0.4 $calibrated,gain_reduction=sum,token_temperature=0.4
$compare --samplers paper paper:gain_reduction=sum paper:gain_reduction=kl lookum:entropy_bound=0,num_candidates=8,certainty=uniform
$compare --samplers $entropy,gain_reduction=mean $entropy,gain_reduction=sum $entropy,gain_reduction=kl
$compare --samplers $uniform,gain_reduction=mean $uniform,gain_reduction=sum $uniform,gain_reduction=kl
$compare --samplers $uniform,gain_reduction=mean,token_temperature=0.4 $uniform,gain_reduction=sum,token_temperature=0.4

# Those that go ahead of the schedule, here one token a step.
ahead="$compare --tokens-per-step 1 --samplers"
$ahead entropy_bound entropy_bound:token_temperature=0.4 confidence_parallel confidence_parallel:token_temperature=0.4
$ahead confidence_parallel:token_temperature=0.4,parallel_threshold=0.7 klass_parallel:token_temperature=0.4,klass_threshold=0.01
$ahead klass_parallel:token_temperature=0.4,klass_threshold=0.01,parallel_threshold=0.7 --everything

# Right against distinct answers at all temperatures: other problems and other seeds.
variety="diffusers-infogain compare-text --device cpu --tasks equation --num-problems 200 --batch-size 200 --problem-seed 1 --seeds 10 11 12"
variety="$variety --output $output/variety --plots --tokens-per-step 2 --samplers"
samplers=""
for t in 0.1 0.2 0.3 0.4 0.5 0.6 0.8 1; do
    samplers="$samplers confidence:token_temperature=$t maskgit:token_temperature=$t entropy:num_runs=6,token_temperature=$t"
    samplers="$samplers pc_sampler:token_temperature=$t,$frequencies $calibrated,gain_reduction=sum,token_temperature=$t"
    samplers="$samplers paper:token_temperature=$t paper:gain_reduction=sum,token_temperature=$t $uniform,gain_reduction=sum,token_temperature=$t"
done
$variety $samplers
