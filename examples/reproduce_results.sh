#!/usr/bin/env bash
# Makes the tables and plots of docs/results.md: about four hours on two CPU cores. It can be stopped and started again.
set -euo pipefail
output=${1:-outputs/results}
compare="diffusers-infogain compare --num-prompts 200 --seeds 0 1 2 --output $output"

# Greedy rules that follow the schedule, and the lookahead on it.
$compare --steps 4 8 16 32 64 --samplers maskgit
$compare --steps 8 16 --samplers uniform halton confidence entropy margin klass pivot
$compare --steps 16 32 --samplers maskgit:token_temperature=0.7
$compare --steps 8 --samplers maskgit:num_runs=4
$compare --steps 8 --num-candidates 2 4 8 --samplers info_gain:gain_reduction=sum,entropy_bound=0
$compare --steps 8 --num-candidates 4 8 --samplers info_gain:entropy_bound=0
$compare --steps 8 --num-candidates 4 --samplers info_gain:certainty=pivot,entropy_bound=0 info_gain:gain_reduction=sum,entropy_bound=0,num_beams=2
$compare --steps 8 --num-candidates 8 --samplers paper info_gain:gain_reduction=mean,entropy_bound=0 lookum:gain_reduction=sum,entropy_bound=0
$compare --steps 4 --num-candidates 8 --samplers info_gain:gain_reduction=sum,entropy_bound=0
$compare --steps 16 --num-candidates 4 8 --samplers info_gain:gain_reduction=sum,entropy_bound=0

# Rules and lookahead with an entropy bound, which end when they are done.
$compare --steps 64 --samplers maskgit:entropy_bound=0.1 maskgit:entropy_bound=0.25 maskgit:entropy_bound=0.5 maskgit:entropy_bound=1
$compare --steps 64 --samplers pivot:entropy_bound=0.1 pivot:entropy_bound=0.25 uniform:entropy_bound=0.25 entropy:entropy_bound=0.25
$compare --steps 64 --samplers confidence:entropy_bound=0.25 entropy_bound:entropy_bound=0.1
$compare --steps 64 --samplers maskgit:entropy_bound=0.25,token_temperature=0.7 maskgit:entropy_bound=0.25,num_runs=2
$compare --steps 8 16 32 --samplers maskgit:entropy_bound=0.25
$compare --steps 16 32 64 --num-candidates 4 --samplers default
$compare --steps 8 64 --num-candidates 4 --samplers info_gain:entropy_bound=0.25 info_gain:gain_reduction=sum,entropy_bound=0.25
$compare --steps 64 --num-candidates 2 8 --samplers info_gain:gain_reduction=sum,entropy_bound=0.25
$compare --steps 64 --num-candidates 4 --samplers info_gain:gain_reduction=sum,entropy_bound=0.5 info_gain:gain_reduction=mean,entropy_bound=0.25
$compare --steps 64 --num-candidates 4 --samplers info_gain:entropy_bound=0.25,token_temperature=0.7 info_gain:gain_reduction=sum,entropy_bound=0.25,token_temperature=0.7
$compare --steps 64 --num-candidates 4 --samplers info_gain:certainty=pivot,gain_reduction=sum,entropy_bound=0.1 info_gain:certainty=pivot,gain_reduction=sum,entropy_bound=0.1,token_temperature=0.7

# Without guidance.
$compare --guidance-scales 1 --steps 8 16 --samplers maskgit
$compare --guidance-scales 1 --steps 64 --samplers maskgit:entropy_bound=0.25
$compare --guidance-scales 1 --steps 64 --num-candidates 4 --samplers info_gain:gain_reduction=sum,entropy_bound=0.25
$compare --guidance-scales 1 --steps 8 --num-candidates 8 --samplers info_gain:gain_reduction=sum,entropy_bound=0

# The table of everything.
$compare --steps 8 --samplers maskgit --everything
diffusers-infogain exact --seeds 0 1 2 | tee "$output/exact.md"
