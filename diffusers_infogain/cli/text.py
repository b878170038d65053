"""`diffusers-infogain text`."""

from __future__ import annotations

import argparse
import contextlib
import re
import sys
from pathlib import Path
from typing import Any

import torch

from ..evaluation import runs
from ..evaluation.identity import scheduler_record
from ..evaluation.text_comparison import prompt_arguments
from ..files import append_json_lines, check_fields, cut_unfinished, read_json_lines, save_text
from ..output_folders import owned
from ..processes import batches_of
from ..scheduling_infogain import InfoGainScheduler
from ..text_generation import mask_text
from ..text_output import InfoGainTextOutput
from ..trace_text import html_page
from . import common

DEMO_TEXT_KNOWS = (
    "demo-text, the embedded model, knows 4x4 Sudoku grids ('S' and the digits row by row, '_' for a mask) and products in "
    "binary ('M07*12='), and no language: --model names a model that writes."
)
_MASK = re.compile(r"(?:\[|<\|?|\{)\s*(?:mdm_)?mask\s*(?:\]|\|?>|\})", re.IGNORECASE)
"""Matches the mask tokens of common tokenizers, and misspelt ones."""
_BEGIN = '{"prompt": '
"""The begin of each line of the output, by which a line that a killed run left incomplete is recognised."""


def text(args: argparse.Namespace) -> None:
    """Generates texts and prints them, or appends them to a file of JSON lines that a killed run may have begun."""
    prompts = common.given_prompts(args)
    settings = common.scheduler_settings(args)
    asking = common.prompt_settings(args, args.chat, "--chat")
    main = args.processes.is_main
    with contextlib.nullcontext() if args.output is None else owned(args.output, folder=False, main=main):
        _text(args, prompts, settings, asking)


def _text(args: argparse.Namespace, prompts: list[str], settings: dict[str, Any], asking: dict[str, Any]) -> None:
    if args.output is not None and (args.show or args.html is not None):
        raise ValueError("--show and --html are for texts that are printed: `diffusers-infogain show` shows one of --output.")
    requests = [(prompt, args.seed + copy) for prompt in prompts for copy in range(args.num_texts)]
    processes, done = args.processes, 0
    if processes.is_main and args.output is not None:
        done = _finished(args.output, requests)
    pipe = common.load_text_pipeline(args)
    pipe.scheduler = InfoGainScheduler.from_config(pipe.scheduler.config, **settings)
    if processes.is_main and args.model == "demo-text" and any(not prompt.startswith(("S", "M")) for prompt in prompts):
        print(DEMO_TEXT_KNOWS, file=sys.stderr)
    call = {"max_new_tokens": _max_new_tokens(args, prompts, pipe), **common.text_call_arguments(args)}
    if processes.is_main and args.output is not None:
        run = {**common.identity(args, pipe), "chat": args.chat} | call | asking
        del run["lookahead_batch_size"]  # changes no text
        runs.check_settings(args.output, {**run, "scheduler": scheduler_record(pipe.scheduler)}, begun=done > 0)
    done = processes.from_main(done)
    beside = {name: asking.pop(name, None) for name in common.BESIDE_PROMPTS}

    def write(batch: list[tuple[str, int]]) -> list[Any]:
        generators = [torch.Generator().manual_seed(seed) for _, seed in batch]
        asked = prompt_arguments([prompt for prompt, _ in batch], args.chat, **beside)
        output = pipe(**asked, generator=generators, **common.with_processors(call), **asking)
        if args.output is None:
            shown = [_shown(output, sample) if args.show else text for sample, text in enumerate(output.texts)]
            return [shown, [output.html_part(sample) for sample in range(len(batch))] if args.html is not None else []]
        entropies = output.trace.cumulative_entropy.tolist()
        return [
            {"prompt": prompt, "seed": seed, "text": answer, "num_evaluations": count, "cumulative_entropy": round(entropy, 4)}
            for (prompt, seed), answer, count, entropy in zip(batch, output.texts, output.num_evaluations, entropies, strict=True)
        ]

    parts: list[str] = []
    # Batches are always the same, and one that a killed run has begun is written anew as a whole: kernels may round otherwise in
    # a batch of another size.
    begun = done - done % args.batch_size
    batches = batches_of(requests[begun:], args.batch_size)
    for result in processes.map(write, batches, "text", "text", bar=args.output is not None):
        if args.output is not None:
            append_json_lines(result[max(0, done - begun) :], args.output)
            begun += len(result)
        else:
            texts, more = result
            print("\n\n".join(texts), flush=True)
            parts += more
    if processes.is_main and args.html is not None:
        save_text(html_page("How these texts were decoded", parts), args.html)


def _shown(output: InfoGainTextOutput, sample: int) -> str:
    """A text in color, or as it is if nothing of it was decoded."""
    return (
        output.texts[sample] if output.trace.decoded_nothing_of(sample) else output.trace.ansi(sample, color=common.use_color())
    )


def _max_new_tokens(args: argparse.Namespace, prompts: list[str], pipe: Any) -> int:
    """The flag, or else 0 if prompts have masks to fill in, or a length that the model can write."""
    if args.max_new_tokens is not None:
        return args.max_new_tokens
    if not args.chat:
        infilled = any(pipe.family.mask_token_id in ids for ids in pipe.encode(prompts))
        _check_masks(prompts, pipe)
        if infilled:
            return 0
    return 16 if args.model == "demo-text" else 128


def _check_masks(prompts: list[str], pipe: Any) -> None:
    """Raises a ValueError for a prompt with a misspelt mask or that of another tokenizer, which would be read as a word."""
    own = pipe.tokenizer.mask_token
    for number, prompt in enumerate(prompts, 1):
        found = [text for text in _MASK.findall(prompt) if text != own]
        if found:
            raise ValueError(
                f"Prompt {number} holds {found[0]!r}, but this model's mask is {mask_text(pipe)}: use that, or give "
                "--max-new-tokens to append that many tokens to the prompts as they are."
            )


def _finished(path: Path, requests: list[tuple[str, int]]) -> int:
    """The number of texts that the file already has; an incomplete last line, left by a killed run, is cut off.

    Raises:
        ValueError: If they belong to other prompts or seeds.
    """
    if not path.exists():
        return 0
    cut_unfinished(path, _BEGIN)
    records = read_json_lines(path, begin=_BEGIN)
    for number, record in enumerate(records, 1):
        fields = {"prompt": str, "seed": int, "text": str, "num_evaluations": int, "cumulative_entropy": float}
        check_fields(record, f"Line {number} of {path}", fields)
        if number > len(requests):
            raise ValueError(f"{path} has {len(records)} texts, but only {len(requests)} are requested now.")
        if (record["prompt"], record["seed"]) != requests[number - 1]:
            prompt, seed = requests[number - 1]
            there, here = runs.excerpts(record["prompt"], prompt)
            raise ValueError(
                f"{path} has texts of other prompts or seeds: line {number} is {there} with seed {record['seed']}, "
                f"requested is {here} with seed {seed}."
            )
    return len(records)
