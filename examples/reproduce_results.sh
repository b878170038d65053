#!/usr/bin/env bash
# Makes the tables of docs/results.md on the demo model: settings are chosen on one split of the held-out captions, compared on a
# second one, and the final table is made once on the third. Some hours on one CPU core; it can be stopped and started again.
#     bash examples/reproduce_results.sh outputs/results
set -euo pipefail
output=${1:-outputs/results}
early=guidance_interval=0:0.5

# 1. Choose: the greedy settings that all others have to beat, from every rule with bounds, truncations, temperatures and guidance.
python examples/choose_settings.py "$output/choose"
compare="diffusers-infogain compare --device cpu --num-images 2 --metrics composition frechet precision_recall caption_variety"

# The settings of the other samplers.
choose="$compare --prompts demo-choose --num-prompts 300 --seeds 1 --steps 64 --output $output/choose/samplers"
pivot=info_gain:certainty=pivot,pivot_temperature=0,entropy_bound=0.25
$choose --samplers fast fast:entropy_bound=1 fast:entropy_bound=0.25 fast:halton_randomize=true fast:$early fast:num_runs=4
$choose --samplers default default:lazy_threshold={0,1,3,null} default:num_candidates={2,8},lazy_threshold=null default:num_runs=4
$choose --samplers $pivot,lazy_threshold={-1,0} $pivot,num_runs=4 $pivot,lazy_threshold=0,retry_above_nats=16,$early
$choose --samplers {fast,default}:retry_above_nats=16,$early {fast,default}:retry_above_nats=14,num_tries=6,$early

# 2. Report: the best of them once more.
report="$compare --rivals $output/choose/chosen/results.json --prompts demo-report --num-prompts 150 --seeds 0 1 2 --steps 64 --output $output/report"
$report --samplers fast default:lazy_threshold={3,null} fast:retry_above_nats=14,num_tries=6,$early maskgit:entropy_bound=0.25

# 3. The final table, once, with nothing chosen by it.
final="$compare --rivals $output/choose/chosen/results.json --prompts demo-final --num-prompts 150 --output $output/final"
$final --seeds 0 1 2 --steps 64 --samplers default fast default:num_runs=4 default:lazy_threshold={3,null} fast:$early
$final --seeds 0 1 2 --steps 64 --samplers default:lazy_threshold=3,$early default:lazy_threshold=3,retry_above_nats=16,$early
$final --seeds 0 1 2 --steps 64 --samplers fast:retry_above_nats=16,$early fast:retry_above_nats=14,num_tries=6,$early
$final --seeds 0 1 2 --steps 8 --samplers maskgit halton
$final --seeds 0 --steps 8 --samplers paper --everything
