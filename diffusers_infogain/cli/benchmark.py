"""`diffusers-infogain benchmark`."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from ..evaluation.decision_speed import Sizes, decision_table, time_decisions
from ..evaluation.machine import describe_machine, machine_line
from ..evaluation.samplers import DEFAULT, parse_sampler
from ..evaluation.speed import (
    Setting,
    Timing,
    find_timing,
    other_rows,
    plain_table,
    seconds_of_measuring,
    shown_number,
    time_settings,
    timing_table,
)
from ..evaluation.tables import markdown_table
from ..files import save_json
from ..image_pipeline_clip import ClipImagePipeline
from ..models.wrapped import compiled, underlying
from ..pipeline_infogain_text import InfoGainTextPipeline
from ..random_models import random_inputs, random_pipeline
from ..rules import SAMPLERS
from ..scheduling_infogain import InfoGainScheduler
from ..settings import SETTINGS
from . import common
from .flags_benchmark import IMAGE_SAMPLERS, TEXT_SAMPLERS

_OF_IMAGES = ("height", "width", "guidance_scale", "negative_prompt", "unguided_lookahead", "approximate_cache", "whole")
_OF_TEXT = ("max_new_tokens", "block_length", "cache")
_OF_A_MODEL = (
    *("prompts", "prompts_file", "random", "size", "samplers", "against", "steps", "lookahead_batch_size"),
    *("quantize", "device_map"),
    *_OF_IMAGES,
    *_OF_TEXT,
)
_IMAGE_SETTINGS = ("num_inference_steps", "lookahead_batch_size")
_TEXT_SETTINGS = (*_IMAGE_SETTINGS, "block_length", "cache", "pack_candidates")
"""Arguments of the call that a sampler may have as settings, besides searches and guidance."""
_EMBEDDINGS = ("prompt_embeds", "encoder_hidden_states", "negative_prompt_embeds", "negative_encoder_hidden_states")
_PROMPT = "Write a short story about a cat."
_DEMO_PROBLEMS = ("M07*12=", "M13*05=", "M09*11=", "M06*14=")


def benchmark(args: argparse.Namespace) -> None:
    """Times settings on a model, or decisions alone, and prints the table."""
    with _threads(args.threads):
        (_decisions if args.decisions else _settings_on_a_model)(args)


@contextmanager
def _threads(number: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(number or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _refuse(args: argparse.Namespace, names: Sequence[str], why: str) -> None:
    """Raises a ValueError for the first of these flags that is given."""
    for name in names:
        if getattr(args, name):
            flag = "Prompts do" if name == "prompts" else f"--{name.replace('_', '-')} does"
            raise ValueError(f"{flag} not apply {why}.")


# Decisions alone


def _decisions(args: argparse.Namespace) -> None:
    _refuse(args, _OF_A_MODEL, "with --decisions")
    _refuse(args, ("gain_reduction",), "with --decisions, which times all of them")
    settings = common.scheduler_settings(args)
    num = 8 if args.num_candidates is None else args.num_candidates
    sampler = settings.get("sampler", "info_gain")
    if not SAMPLERS[sampler].looks_ahead or num < 2:
        raise ValueError(f"--decisions must be used with a sampler that looks ahead, got {sampler!r} with {num} candidates.")
    results, tables = [], []
    for batch_size in args.batch_sizes or [1]:
        sizes = Sizes(batch_size, args.length, args.codebook_size, num)
        timings = time_decisions(
            sizes,
            settings,
            num_runs=args.runs,
            seed=args.seed,
            device=args.device,
            dtype=getattr(torch, args.dtype),
            compiled=args.compile,
        )
        tables.append(_shown(args, *decision_table(timings)))
        results.append({"sizes": vars(sizes), "timings": [vars(timing) for timing in timings]})
    title = (
        f"Decisions on random logits: {args.length} tokens, {args.codebook_size:,} codes, {num} candidates, "
        f"batch {' and '.join(map(str, args.batch_sizes or [1]))}."
    )
    _report(args, title, tables, [], {"decisions": results})


# Settings on a model


def _settings_on_a_model(args: argparse.Namespace) -> None:
    chosen = common.scheduler_settings(args)
    pipe = _pipeline(args)
    of_text = isinstance(pipe, InfoGainTextPipeline)
    _refuse(args, _OF_IMAGES if of_text else _OF_TEXT, f"to {'text' if of_text else 'images'}")
    call = _text_call(args) if of_text else _image_call(args, pipe)
    schedulers = _schedulers(args, pipe, chosen, of_text)
    settings = [
        Setting(name, scheduler, {**call, **own}, size)
        for size in args.batch_sizes or [1, 8]
        for name, (scheduler, own) in schedulers.items()
    ]
    network = (compiled(pipe.model) or underlying(pipe.model)) if of_text else pipe.transformer
    timings = time_settings(
        pipe, network, settings, _inputs(args, pipe, of_text), num_runs=args.runs, seed=args.seed, device=args.device
    )
    cost = seconds_of_measuring(args.device)
    millions = sum(parameter.numel() for parameter in network.parameters()) / 1e6
    table = _shown(args, *timing_table(timings, "text" if of_text else "image", args.against))
    title = f"{_described(args)}, {millions:,.1f} M parameters."
    measured = {
        "model": args.random or args.model,
        "random": args.random is not None,
        "size": dict(args.size or []),
        "sharpness": args.sharpness,
        "parameters": round(1e6 * millions),
        "call": call,
        "seconds_of_measuring_a_pass": cost,
        "settings": [_record(timing, timings, args.against) for timing in timings],
    }
    _report(args, title, [table], [*filter(None, [other_rows(timings)]), _measuring(timings, cost)], measured)


def _pipeline(args: argparse.Namespace) -> Any:
    if args.random is None:
        _refuse(args, ("size",), "without --random")
        if args.sharpness != 1:
            raise ValueError("--sharpness does not apply without --random.")
        return common.load_any_pipeline(args)
    _refuse(
        args,
        ("variant", "vqvae", "text_encoder", "language_model", "prompts", "prompts_file", "negative_prompt", "offload"),
        "to --random",
    )
    _refuse(args, ("quantize", "device_map"), "to --random")
    _refuse(args, ("whole",), "to --random, which has neither text encoder nor image tokenizer")
    pipe = random_pipeline(
        args.random,
        changes=dict(args.size or []),
        sharpness=args.sharpness,
        device=args.device,
        dtype=getattr(torch, args.dtype),
    )
    if args.compile:
        pipe.compile()
    return pipe


def _described(args: argparse.Namespace) -> str:
    """The model, for above the table."""
    if args.random is None:
        return args.model
    changes = [f"{name}={value}" for name, value in args.size or []]
    changes += [f"sharpness {args.sharpness:g}"] if args.sharpness != 1 else []
    return f"{args.random} with random weights{', ' * bool(changes)}{', '.join(changes)}"


def _image_call(args: argparse.Namespace, pipe: Any) -> dict[str, Any]:
    call = common.call_arguments(args, pipe)
    if args.random or (isinstance(pipe, ClipImagePipeline) and not args.whole):
        call.pop("negative_prompt", None)  # is encoded before
    return {**call, "output_type": "pil" if args.whole else "latent"}


def _text_call(args: argparse.Namespace) -> dict[str, Any]:
    default = 16 if args.model == "demo-text" and not args.random else 64
    return {"max_new_tokens": args.max_new_tokens or default, **common.text_call_arguments(args)}


def _schedulers(
    args: argparse.Namespace, pipe: Any, chosen: dict[str, Any], of_text: bool
) -> dict[str, tuple[InfoGainScheduler, dict[str, Any]]]:
    """By name, in the order of the table, the samplers and their own arguments of the call.

    Args:
        chosen: Settings by the flags: of the only sampler, or in place of those of every one in --samplers.
    """
    own = dict(pipe.scheduler.config)
    found: dict[str, tuple[InfoGainScheduler, dict[str, Any]]] = {}
    single = {name: chosen[name] for name in SETTINGS if getattr(args, name) is not None}
    names = args.samplers
    if names:
        _refuse(args, ("preset", "sampler"), "with --samplers")
    elif chosen:
        found[_name(args, single)] = InfoGainScheduler.from_config(own, **chosen), {}
        names, single = [], {}
    names = (TEXT_SAMPLERS if of_text else IMAGE_SAMPLERS) if names is None else names
    # As in the comparisons: of texts, the pipeline's own settings count for "default" only.
    base = {"mask_token_id": own["mask_token_id"]} if of_text else own
    for name in (*names, *([args.against] if args.against else [])):
        if name not in found:
            spec = parse_sampler(name, guided=not of_text, call=_TEXT_SETTINGS if of_text else _IMAGE_SETTINGS).for_pipeline(own)
            found[name] = InfoGainScheduler.from_config(base, **{**spec.scheduler, **single}), spec.call
    return found


def _name(args: argparse.Namespace, single: dict[str, Any]) -> str:
    """The sampler that the flags describe, written as for --samplers."""
    values = {name: value for name, value in single.items() if name != "sampler" or args.preset}
    written = [f"{name}={':'.join(map(str, value)) if isinstance(value, tuple) else value}" for name, value in values.items()]
    return ":".join(filter(None, [args.preset or args.sampler or DEFAULT, ",".join(written)]))


def _inputs(args: argparse.Namespace, pipe: Any, of_text: bool) -> Callable[[int], dict[str, Any]]:
    """The prompts of a batch of a size, as arguments of the call."""
    if args.random:
        return lambda size: random_inputs(pipe, size, args.prompt_length)
    prompts = common.given_prompts(args) if args.prompts or args.prompts_file is not None else _own_prompts(args, pipe, of_text)

    def inputs(size: int) -> dict[str, Any]:
        batch = [prompts[index % len(prompts)] for index in range(size)]
        if not of_text and "class_labels" in pipe.recorded_inputs:
            return {"class_labels": batch}
        if not isinstance(pipe, ClipImagePipeline) or args.whole:
            return {"prompt": batch}
        with torch.no_grad():
            encoded = pipe.encode_prompt(batch, negative_prompt=args.negative_prompt)
        return dict(zip(_EMBEDDINGS, encoded, strict=True))

    return inputs


def _own_prompts(args: argparse.Namespace, pipe: Any, of_text: bool) -> list[str]:
    """Prompts that fit the model. Images of one prompt would share rows of the network."""
    if of_text:
        return list(_DEMO_PROBLEMS) if args.model == "demo-text" else [_PROMPT]
    if "class_labels" in pipe.recorded_inputs:
        return [str(number) for number in range(0, pipe.transformer.config.num_classes, 7)]
    from ..demo.shapes import sample_captions

    return [caption.text for caption in sample_captions(64, torch.Generator().manual_seed(1234), held_out=True)]


# What is printed and written


def _shown(args: argparse.Namespace, header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return (markdown_table if args.markdown else plain_table)(header, rows)


def _record(timing: Timing, timings: Sequence[Timing], against: str | None) -> dict[str, Any]:
    record = timing.record()
    if against is not None:
        record["ratios"] = timing.ratios(find_timing(timings, against, timing.setting.batch_size))
    return record


def _measuring(timings: Sequence[Timing], cost: float) -> str:
    """What the measuring adds to the time outside, at most."""
    shares = [
        cost * passes / seconds for timing in timings for passes, seconds in zip(timing.num_passes, timing.seconds, strict=True)
    ]
    share = shown_number(100 * max(shares), 2)
    return f"Measuring adds {1e6 * cost:.1f} µs to a pass through the network, {share} % of the time at most."


def _report(args: argparse.Namespace, title: str, tables: Sequence[str], notes: Sequence[str], measured: dict[str, Any]) -> None:
    machine = describe_machine(args.device, args.dtype, compiled=args.compile)
    runs = f"{args.runs} run{'s' * (args.runs != 1)} each, in turn: median (lowest to highest)."
    print("\n\n".join([title, *tables, "\n".join([runs, *notes, machine_line(machine)])]))
    if args.json is not None:
        save_json({"machine": machine, "runs": args.runs, "seed": args.seed, **measured}, args.json)
