#!/usr/bin/env bash
# Makes the tables of docs/results.md on the embedded text model and the exact models: settings are chosen on one split of problems
# and seeds, compared on a second one, and the final tables are made once on the third. About an hour on one CPU core, going on
# where it was killed.
#     bash examples/reproduce_text_results.sh outputs/text
set -euo pipefail
output=${1:-outputs/text}
mkdir -p "$output"

# 1. Choose: the greedy settings that all others have to beat, on text tasks and on exact models.
python examples/choose_text_settings.py "$output/choose" --num-screened 40 --num-kept 24 --num 100 --tasks equation sudoku
python examples/choose_text_settings.py "$output/choose" --num-screened 32 --num-kept 20 --seeds 0 1 --tasks exact-sudoku \
    exact-digits exact-synonyms
split="diffusers-infogain compare-text --device cpu --num-problems 100 --batch-size 100"
verify=entropy_bound=4,corrector=verify
cold=top_p=0.9,token_temperature=0.7

# The settings of the others.
choose="$split --split choose --tokens-per-step 1 --output $output/choose/others --tasks equation sudoku --samplers"
$choose left:entropy_bound=0.25,retry_above_nats=15 left:entropy_bound=0.25,retry_below_sigmas=-2 left:entropy_bound=0.25,num_runs=4
$choose pivot:entropy_bound=0.25,retry_above_nats=15 pivot:entropy_bound=0.25,retry_below_sigmas=-2 pivot:entropy_bound=0.25,corrector=verify
$choose default default:entropy_bound=0.25 default:lazy_threshold=0 default:retry_below_sigmas=null default:num_runs=4
$choose default:top_p=0.9,entropy_bound={0.01,0.03,0.1} default:certainty={left,entropy},position_temperature=0,top_p=0.9
$choose confidence:entropy_bound=0.1,corrector=verify,verify_classes=2 pivot:entropy_bound=0.25,corrector=verify,verify_classes=2
diffusers-infogain exact --split choose --seeds 0 1 --samplers {maskgit,uniform}:$verify {maskgit,uniform}:$verify,verify_threshold=0.5

# 2. Report, and 3. the final tables, once, with nothing chosen by them.
lazy=position_temperature=0,top_p=1,$verify,verify_threshold=0.5
for part in report final; do
    for task in equation sudoku; do
        table="$split --split $part --seeds 0 1 2 3 4 5 --tasks $task --rivals $output/choose/$task --output $output/$part/$task"
        $table --tokens-per-step 4 --samplers left:top_p=0.9
        $table --tokens-per-step 1 --samplers default default:num_runs=4 text_fast left:entropy_bound=0.1,token_temperature=0.7 \
            pivot:entropy_bound=0.1,retry_below_sigmas=-2 entropy:entropy_bound=0.1,$cold \
            default:certainty=entropy,position_temperature=0,top_p=0.9
        $table --tokens-per-step 1 --seeds 0 1 2 --samplers paper --everything
    done
    diffusers-infogain exact --split $part --seeds 0 1 2 --samplers default fast text pivot:entropy_bound=0.25,top_p=0.9 \
        {maskgit,uniform}:entropy_bound=4 {maskgit,uniform}:$verify {maskgit,klass}:entropy_bound=2,$cold maskgit:entropy_bound=1,$cold \
        default:certainty=maskgit,num_candidates=3,lazy_threshold=0,$lazy default:certainty=uniform,num_candidates=2,lazy_threshold=-1,$lazy \
        | tee "$output/exact_$part.md"
done
