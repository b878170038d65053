"""The flags of `benchmark`."""

from __future__ import annotations

import argparse
import json
from typing import Any

from ..choices import CACHES
from ..model_sizes import MODEL_SIZES
from . import flags

IMAGE_SAMPLERS = ("default", "fast", "best", "maskgit")
TEXT_SAMPLERS = ("default", "text_fast", "confidence")


def field(text: str) -> tuple[str, Any]:
    """The type of a flag for a field of a configuration, such as hidden_size=256."""
    name, equals, value = text.partition("=")
    if not equals or not name or not value:
        raise argparse.ArgumentTypeError(f"must have the form name=value, got {flags.shown(text)}")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value


def add_benchmark(command: flags.Parser) -> None:
    """Adds the flags of `benchmark`."""
    flags._add_prompt_arguments(command, "of the samples, again and again in batches (default: some that fit the model)")
    either = command.add_mutually_exclusive_group()
    flags._add(either, "--model", flags.nonempty, "'demo', 'demo-text', a folder or a Hub id of any family", "demo")
    text = "random weights in the shapes of a published model, without a download; 'nano' ones are for trying this command"
    either.add_argument("--random", choices=tuple(MODEL_SIZES), metavar="NAME", help=f"{text}: {', '.join(MODEL_SIZES)}")
    flags._add_loading_flags(command)
    text = "fields of the configuration of --random in place of the published ones, such as num_hidden_layers=4"
    flags._add(command, "--size", field, text, nargs="+", metavar="FIELD=VALUE")
    text = "factor on the logits of --random, which without one predict next to nothing, so that no bound lets a step run ahead"
    flags._add(command, "--sharpness", flags.number(0, 1e6), text, 1.0)
    text = (
        "samplers or presets with settings of the scheduler or arguments of the call, such as "
        "default:num_candidates=8,lookahead_batch_size=1 (default: what the flags say; without any "
        f"{', '.join(IMAGE_SAMPLERS)}, or for text {', '.join(TEXT_SAMPLERS)})"
    )
    flags._add(command, "--samplers", flags.nonempty, text, nargs="+", metavar="NAME[:KEY=VALUE,...]")
    text = "a sampler, written likewise, that all are compared with, run by run"
    flags._add(command, "--against", flags.nonempty, text, metavar="NAME[:KEY=VALUE,...]")
    flags._add(command, "--batch-sizes", flags.integer(1, flags.MOST), "samples decoded together (default: 1 8)", nargs="+")
    flags._add(command, "--runs", flags.integer(1, 1000), "of every setting, after one that is not counted", 5)
    flags._add(command, "--threads", flags.integer(1, 4096), "of torch on the CPU (default: torch's)")
    text = "include encoding the prompts and decoding tokens into pixels, as outside the network (images of --model only)"
    command.add_argument("--whole", action="store_true", help=text)
    flags._add(command, "--json", flags.path, "file for everything measured", metavar="FILE")
    command.add_argument("--markdown", action="store_true", help="print the table in Markdown")
    _add_decision_flags(command)
    flags._add_image_call_flags(command)
    group = command.add_argument_group("text", "for text models only")
    text = "tokens to write (default: 64; 16 for demo-text)"
    flags._add(group, "--max-new-tokens", flags.integer(1, flags.MOST), text)
    flags._add(group, "--block-length", flags.integer(1, flags.MOST), "tokens per block (default: all, or the model's)")
    text = "of keys and values (default: exact if possible, else none)"
    group.add_argument("--cache", choices=CACHES, help=text)
    text = "tokens of the prompts of --random; CLIP's embeddings always have 77"
    flags._add(group, "--prompt-length", flags.integer(1, flags.MOST), text, 32)
    flags._add_device_flags(command, None)
    flags._add(command, "--seed", flags.integer(0), "of the first sample", 0)
    flags.add_sampler_flags(command)


def _add_decision_flags(command: flags.Parser) -> None:
    group = command.add_argument_group("decisions", "timed alone, on random logits")
    text = (
        "time `propose` and `select` instead of a model, for the gains mean, sum and kl, next to one pass over the same logits "
        "that computes their entropies; --num-candidates (default: 8) and --batch-sizes (default: 1) apply"
    )
    group.add_argument("--decisions", action="store_true", help=text)
    flags._add(group, "--length", flags.integer(1, flags.MOST), "tokens of a sample", 256)
    flags._add(group, "--codebook-size", flags.integer(2, flags.MOST), "codes of a token", 8192)
