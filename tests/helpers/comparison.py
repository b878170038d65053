"""Records of runs on images, as a comparison stores them."""

from __future__ import annotations

from diffusers_infogain.evaluation.samplers import parse_sampler
from diffusers_infogain.rules import SAMPLERS


def result(sampler, steps, rows, right, *, seed=0, num_candidates=None, entropies=None, guidance_scale=1.0, **more):
    return {
        "sampler": sampler,
        "steps": steps,
        "num_candidates": num_candidates,
        "guidance_scale": guidance_scale,
        "seed": seed,
        "looks_ahead": num_candidates is not None,
        "scheduler": parse_sampler(sampler).scheduler if sampler.partition(":")[0] in SAMPLERS else {},
        "num_images_per_prompt": 1,
        "num_states": rows,
        "num_evaluations": rows,
        "sequential_passes": steps,
        "cumulative_entropies": entropies or [float(rows)] * len(right),
        "entropy_by_step": [1.0] * steps,
        "decisions_by_step": [4] * (steps - 1) + [0],
        "other_winner_by_step": [3] * (steps - 1) + [0],
        "seconds_per_image": 0.1,
        "peak_memory": None,
        "right": right,
        "metrics": {},
        **more,
    }


def measured(identity=None, **figures):
    return {name: {"identity": identity or {}, "figures": {name: value}} for name, value in figures.items()}
