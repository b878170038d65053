"""What can be chosen by name, each with one line that says what it is. Imports nothing, so that `--help` is quick."""

from __future__ import annotations

from typing import Any

from .settings import DEFAULTS

SAMPLER_DESCRIPTIONS: dict[str, str] = {
    "info_gain": "looks ahead: what a step takes from the uncertainty of the rest, less the entropy of what it decodes",
    "lookum": "looks ahead: the smallest uncertainty left, whatever the step costs",
    "confidence": "the positions with the largest probability first",
    "maskgit": "log-probability of the sampled token with annealed noise, as MaskGIT and aMUSEd do",
    "titok": "logit of the sampled token with annealed noise, which the token is drawn with, too, as TiTok and MaskGen do",
    "entropy": "the positions with the smallest entropy first",
    "margin": "the positions where the most probable token leads the second by most",
    "uniform": "random positions",
    "halton": "a low-discrepancy order over the image grid (images only)",
    "left": "from left to right; a few at a time with an entropy bound",
    "klass": "confidence, positions whose distribution has settled since the step before first",
    "pivot": "the most uncertain position, together with the most certain ones",
    "pc_sampler": "probability times how rare the token is in text, earlier positions first (needs --pc-frequencies)",
    "ancestral": "each position for itself, with the probability of the schedule (MDLM; Dream's origin)",
    "entropy_bound": "in order of entropy, as many positions as its bound allows",
    "confidence_parallel": "every position above a probability, however many (Fast-dLLM)",
    "klass_parallel": "every position above a probability that has settled for some steps (KLASS as published)",
    "factor_parallel": "the most confident positions, as many as their least confident one allows (Fast-dLLM's factor)",
    "frechet_parallel": "the same by the confidences of all of them, and so more at once (Fast-dLLM++)",
}
"""The samplers of `InfoGainScheduler`; its docstring has them at length."""

QUANTIZATIONS: dict[str, str] = {
    "int8": "weights in 8 bits (torchao)",
    "fp8": "weights in 8-bit floating point (torchao)",
    "int4": "weights in 4 bits, on CUDA GPUs only (torchao)",
    "nf4": "weights in 4-bit normal float (bitsandbytes)",
}
"""Kinds of quantization, by the bits of a weight and the package that quantises."""

DEVICE_MAPS = ("auto", "balanced", "sequential")
"""How a command spreads models over devices."""

_GREEDY: dict[str, Any] = DEFAULTS | {"num_candidates": 1, "top_p": 1.0, "entropy_bound": 0}


def _titok(randomize_temperature: float) -> dict[str, Any]:
    own = {"randomize_temperature": (randomize_temperature, 0.0), "softmax_temperature": (1.3, 0.5)}
    return DEFAULTS | {"sampler": "titok", "num_candidates": 1, "masking_schedule": "arccos", "entropy_bound": 0, **own}


PRESETS: dict[str, dict[str, Any]] = {
    "default": DEFAULTS,
    "paper": DEFAULTS
    | {
        "certainty": "confidence",
        "num_candidates": 8,
        "token_temperature": 0.4,
        "position_temperature": 0.4,
        "gain_reduction": "mean",
        "top_p": 1.0,
        "entropy_bound": 0,
        "lazy_threshold": None,
        "best_run_by": "cumulative_entropy",
    },
    "fast": DEFAULTS | {"sampler": "halton", "top_p": 0.9, "entropy_bound": 0.5},
    "best": DEFAULTS | {"lazy_threshold": None},
    "maskgit_halton": DEFAULTS
    | {
        "sampler": "halton",
        "num_candidates": 1,
        "token_temperature": (1.0, 1 / 1.2),
        "entropy_bound": 0,
        "masking_schedule": "arccos",
        "halton_randomize": True,
    },
    "showo": DEFAULTS
    | {
        "sampler": "maskgit",
        "num_candidates": 1,
        "choice_temperature": (1.0, 0.0),
        "annealing": "product",
        "schedule_counts": "canvas",
        "entropy_bound": 0,
    },
    **{name: _titok(factor) for name, factor in (("titok_l32", 9.5), ("titok_b64", 11.0), ("titok_s128", 2.8), ("maskgen", 2.0))},
    "text": DEFAULTS
    | {
        "masking_schedule": "even",
        "certainty": "pivot",
        "num_candidates": 2,
        "pivot_temperature": 0.0,
        "top_p": 1.0,
        "entropy_bound": 0.1,
        "lazy_threshold": -1.0,
        "retry_below_sigmas": -2.0,
    },
    "text_fast": DEFAULTS | {"masking_schedule": "even", "sampler": "left", "top_p": 0.9, "entropy_bound": 0.1},
    "llada": _GREEDY | {"masking_schedule": "even", "sampler": "maskgit", "choice_temperature": 0.0, "token_temperature": 0.0},
    "dream": _GREEDY
    | {
        "masking_schedule": "dream",
        "sampler": "entropy",
        "certainty_of": "draws",
        "token_temperature": 0.2,
        "position_temperature": 0.0,
        "draw_first": True,
        "top_p": 0.95,
    },
    "sdar": _GREEDY
    | {
        "masking_schedule": "even",
        "sampler": "confidence_parallel",
        "certainty_of": "draws",
        "parallel_threshold": 0.85,
    },
    "trado": _GREEDY | {"masking_schedule": "even", "sampler": "confidence_parallel", "certainty_of": "draws"},
}
"""Settings by name: `InfoGainScheduler.from_config(config, **PRESETS["paper"])`. "paper" is arXiv 2602.18176's for images,
"maskgit_halton" arXiv 2503.17076's for ImageNet (but for one token more in the first step and one less in the last), "showo"
that of the published code of Show-o and MMaDA, "titok_..." and "maskgen" arXiv 2406.07550's and 2501.07730's, whose guidance is a
`guidance_schedule` of the call. "llada", "dream", "sdar" and "trado" are the published loops of these models; see docs/text.md
for lengths, blocks and variants. A preset says every setting but those of the model (`mask_token_id`, `pc_frequencies`), so it
takes none over from the config."""

PRESET_DESCRIPTIONS: dict[str, str] = {
    "default": "info_gain as the image pipelines have it: in Halton's order, and looking ahead lazily",
    "fast": "default without looking ahead",
    "best": "default with all candidates compared in every step",
    "paper": "info_gain as arXiv 2602.18176 has it for images",
    "maskgit_halton": "halton as arXiv 2503.17076 has it for ImageNet",
    "showo": "maskgit as the published loops of Show-o and MMaDA have it",
    "titok_l32": "titok as published for TiTok-L-32",
    "titok_b64": "titok as published for TiTok-B-64",
    "titok_s128": "titok as published for TiTok-S-128",
    "maskgen": "titok as published for MaskGen's models of discrete tokens",
    "text": "info_gain as the text pipeline has it: pivot proposes, and unlikely texts are begun anew",
    "text_fast": "left to right, as many tokens at a time as an entropy bound allows",
    "llada": "low_confidence as the published loop of LLaDA has it",
    "dream": "entropy as the published loop of Dream has it",
    "sdar": "low_confidence_dynamic as the published loop of SDAR has it",
    "trado": "the same with the threshold of TraDo",
}

CACHES = ("none", "exact", "prefix", "dual")
"""Of keys and values, in text models; the last two are approximations."""

LIKELIHOODS = ("llada", "dream", "left_to_right", "right_to_left")
"""Estimates of log-likelihoods of text; see `text_likelihood.draw_masks`."""

METRICS = (
    "composition",
    "frechet",
    "spatial",
    "kid",
    "inception_score",
    "precision_recall",
    "clip_score",
    "pick_score",
    "hps_v2",
    "hps_v2_1",
    "image_reward",
    "diversity",
    "caption_variety",
    "fd_dinov2",
    "fd_infinity",
    "cmmd",
)
"""Of a set of images; "composition" is checked image by image, the others over all of them."""
FEATURES = ("inception", "clip", "dinov2", "demo")
"""What distances between images are taken in."""
RESIZES = ("bicubic", "bilinear", "clean", "network")
"""How images come to the size that an extractor takes: Pillow's filters, which average over all pixels (antialias), on the
largest square around the centre; clean-fid's way, which squeezes the whole image and does not round; or by the network itself,
which gets every image as it is."""
LAYOUTS = ("plain", "geneval", "dpg", "t2i_compbench")
"""Of the files of a run of images: numbered, or as the scripts of GenEval, DPG-Bench and T2I-CompBench read them."""

INFILLED_TASKS = ("multiplication", "equation", "sudoku")
"""Products of given factors; whole equations, of which nothing is given; grids with some cells given."""
TEXT_TASKS = (*INFILLED_TASKS, "countdown")
"""The last one has no template to fill in: it is asked in words only."""

SPLITS = ("choose", "report", "final")
"""Parts of an evaluation that share no problem, and where a problem has nothing given no noise: settings are chosen on the first
one, compared on the second one, and published figures are made once on the third."""
DEMO_PROMPTS = ("demo", "demo-trained", *(f"demo-{split}" for split in SPLITS))
"""Sets of captions of the demo world: all that the demo model was not trained on, those that it was, and the splits."""

SEED_STRIDE = 100_000
"""Distance between the seeds of two runs that differ in their seed; a run has at most that many images."""

SIDES = ("left", "top", "right", "bottom")
"""Where images are outpainted."""
MOST_BLUR = 1024
"""Widest soft seam around a mask, in pixels."""
