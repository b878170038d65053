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
from ..evaluation.identity import pipeline_digest, scheduler_record
from ..evaluation.text_comparison import prompt_arguments
from ..files import append_json_lines, check_fields, cut_unfinished, read_json_lines
from ..output_folders import owned
from ..pipeline_infogain_text import InfoGainTextPipeline
from ..progress import Progress
from ..scheduling_infogain import InfoGainScheduler
from ..text_generation import mask_text
from . import common

DEMO_TEXT_KNOWS = (
    "demo-text, the embedded model, knows 4x4 Sudoku grids ('S' and the digits row by row, '_' for a mask) and products in "
    "binary ('M07*12='), and no language: --model names a model that writes."
)
_MASK = re.compile(r"(?:\[|<\|?|\{)\s*(?:mdm_)?mask\s*(?:\]|\|?>|\})", re.IGNORECASE)
"""What masks of tokenizers look like."""


def load_text_pipeline(args: argparse.Namespace) -> Any:
    """The model of the flags."""
    pipe = InfoGainTextPipeline.from_pretrained(args.model, dtype=getattr(torch, args.dtype)).to(args.device)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def text(args: argparse.Namespace) -> None:
    """Texts from prompts, by a masked language model; with --output as JSON lines, going on where a run was killed."""
    prompts, chosen = common.prompts_of(args), common.scheduler_settings(args)
    with contextlib.nullcontext() if args.output is None else owned(args.output, folder=False):
        _text(args, prompts, chosen)


def _text(args: argparse.Namespace, prompts: list[str], chosen: dict[str, Any]) -> None:
    requests = [(prompt, args.seed + copy) for prompt in prompts for copy in range(args.num_texts)]
    done = _finished(args.output, requests) if args.output is not None else 0
    pipe = load_text_pipeline(args)
    pipe.scheduler = InfoGainScheduler.from_config(pipe.scheduler.config, **chosen)
    if args.model == "demo-text" and any(not prompt.startswith(("S", "M")) for prompt in prompts):
        print(DEMO_TEXT_KNOWS, file=sys.stderr)
    new = args.max_new_tokens
    if new is None:
        infilled = not args.chat and any(pipe.family.mask_token_id in ids for ids in pipe.encode(prompts))
        if not args.chat:
            _check_masks(prompts, pipe)
        new = 0 if infilled else 16 if args.model == "demo-text" else 128
    call = {"max_new_tokens": new, **decoding_arguments(args)}
    if args.output is not None:
        settings = {**identity(args, pipe), "chat": args.chat} | call
        del settings["lookahead_batch_size"]  # changes no text
        runs.check_settings(args.output, {**settings, "scheduler": scheduler_record(pipe.scheduler)}, begun=done > 0)
    for start in Progress(range(done, len(requests), args.batch_size), desc="text", unit="batch", disable=args.output is None):
        part = requests[start : start + args.batch_size]
        asked = prompt_arguments([prompt for prompt, _ in part], args.chat)
        output = pipe(**asked, generator=[torch.Generator().manual_seed(seed) for _, seed in part], **call)
        rows, entropies = output.trace.model_rows.sum(0).tolist(), output.trace.cumulative_entropy.tolist()
        if args.output is None:
            print("\n\n".join(output.texts))
            continue
        records = []
        for (prompt, seed), answer, count, entropy in zip(part, output.texts, rows, entropies, strict=True):
            record = {"prompt": prompt, "seed": seed, "text": answer, "model_rows": count}
            records.append({**record, "cumulative_entropy": round(entropy, 4)})
        append_json_lines(records, args.output)


def identity(args: argparse.Namespace, pipe: Any) -> dict[str, Any]:
    """The model and the kind of machine, for what a run is."""
    settings = {"model": args.model, "dtype": args.dtype, "weights": pipeline_digest(pipe)}
    return {**settings, "device": torch.device(args.device).type}


def _check_masks(prompts: list[str], pipe: Any) -> None:
    """Raises a ValueError for a prompt with what is another tokenizer's mask, or a misspelt one, and would be read as a word."""
    own = pipe.tokenizer.mask_token
    for number, prompt in enumerate(prompts, 1):
        found = [text for text in _MASK.findall(prompt) if text != own]
        if found:
            raise ValueError(
                f"Prompt {number} holds {found[0]!r}, but this model writes its mask as {mask_text(pipe)}: write that, or give "
                "--max-new-tokens to have so many tokens written behind the prompts as they are."
            )


def _finished(path: Path, requests: list[tuple[str, int]]) -> int:
    """How many texts the file has already; a line that a killed run left unfinished is cut off.

    Raises:
        ValueError: If they are of other prompts or seeds.
    """
    if not path.exists():
        return 0
    cut_unfinished(path, _BEGIN)
    records = read_json_lines(path, begin=_BEGIN)
    for number, record in enumerate(records, 1):
        fields = {"prompt": str, "seed": int, "text": str, "model_rows": int, "cumulative_entropy": float}
        check_fields(record, f"Line {number} of {path}", fields)
        if number > len(requests):
            raise ValueError(f"{path} has {len(records)} texts, but only {len(requests)} are asked for now.")
        if (record["prompt"], record["seed"]) != requests[number - 1]:
            prompt, seed = requests[number - 1]
            there, here = runs.excerpts(record["prompt"], prompt)
            raise ValueError(
                f"{path} has texts of other prompts or seeds: line {number} is {there} with seed {record['seed']}, "
                f"asked for is {here} with seed {seed}."
            )
    return len(records)


_BEGIN = '{"prompt": '


def decoding_arguments(args: argparse.Namespace) -> dict[str, Any]:
    """The flags of `add_decoding_flags` as arguments of the pipeline's call."""
    names = ("block_length", "lookahead_batch_size", "cache", "num_beams", "num_runs")
    return {"num_inference_steps": args.steps, **{name: getattr(args, name) for name in names}}
