#!/usr/bin/env bash
# Makes the tables of docs/results.md on the demo model: settings are chosen on one split of the held-out captions, compared on a
# second one, and the final table is made once on the third. Some hours on one CPU core; it can be stopped and started again.
#     bash examples/reproduce_results.sh outputs/results
set -euo pipefail
output=${1:-outputs/results}

# 1. Choose: the greedy settings that all others have to beat, from every rule with bounds, truncations, temperatures and guidance.
python examples/choose_settings.py "$output/choose"
compare="diffusers-infogain compare --device cpu --num-images 2 --metrics composition frechet precision_recall caption_variety"
choose="$compare --prompts demo-choose --num-prompts 48 --seeds 0 1 2 3 --steps 64 --output $output/choose/samplers"

# The settings of the other samplers.
$choose --samplers default info_gain:entropy_bound=0.25 info_gain:certainty=pivot,gain_reduction=sum,entropy_bound=0.1
$choose --samplers info_gain:gain_reduction=sum,entropy_bound=0.25 info_gain:gain_reduction=sum,entropy_bound=0.5
$choose --samplers pivot:entropy_bound=0.25,retry_below_nats=-8 pivot:entropy_bound=0.25,top_p=0.9,retry_below_nats=-7
$choose --samplers pivot:entropy_bound=0.25,top_p=0.9,num_runs=2 maskgit:entropy_bound=0.25,num_runs=2

# 2. Report: what was chosen beside the greedy settings that are best at some cost, and, for orientation, decoding in few steps.
rivals="--rivals $output/choose/chosen/results.json"
report="$compare $rivals --prompts demo-report --num-prompts 150 --seeds 0 1 2 --output $output/report"
$report --steps 8 --samplers maskgit halton uniform confidence entropy margin klass pivot
$report --steps 16 64 --samplers maskgit
$report --steps 8 --samplers paper info_gain:gain_reduction=sum,entropy_bound=0,num_candidates=8
$report --steps 64 --samplers default info_gain:gain_reduction=sum,entropy_bound=0.25
$report --steps 64 --samplers pivot:entropy_bound=0.25,top_p=0.9,retry_below_nats=-7
$report --steps 8 --samplers maskgit --everything

# 3. The final table, once, with nothing chosen by it.
final="$compare $rivals --prompts demo-final --num-prompts 150 --seeds 0 1 2 --output $output/final"
$final --steps 64 --samplers default paper pivot:entropy_bound=0.25,top_p=0.9,retry_below_nats=-7
$final --steps 8 --samplers maskgit --everything
diffusers-infogain exact --seeds 0 1 2 | tee "$output/exact.md"
