"""`diffusers-infogain text` and `diffusers-infogain compare-text`."""

from __future__ import annotations

import argparse
import contextlib
import json
import re
import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ..choices import INFILLED_TASKS, TEXT_TASKS
from ..decoding import DecodingTrace
from ..evaluation import comparison, runs, text_comparison, text_tasks
from ..evaluation.identity import pipeline_digest
from ..evaluation.report import plot_variety
from ..files import append_json_lines, check_fields, cut_unfinished, owned, read_json_lines, save_text
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


def _asked(prompts: list[str], chat: bool) -> dict[str, Any]:
    return {"messages": [[{"role": "user", "content": prompt}] for prompt in prompts]} if chat else {"prompt": prompts}


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
        runs.check_settings(args.output, {**settings, "scheduler": common.scheduler_config(pipe)}, begun=done > 0)
    for start in Progress(range(done, len(requests), args.batch_size), desc="text", unit="batch", disable=args.output is None):
        part = requests[start : start + args.batch_size]
        asked = _asked([prompt for prompt, _ in part], args.chat)
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


def _filled_in(pipe: Any, problems: Sequence[Any], seeds: list[int], **call: Any) -> tuple[list[str], DecodingTrace]:
    """Answers from templates whose masks the model fills in."""
    rows = [list(pipe.tokenizer(problem.letter + problem.template).input_ids) for problem in problems]
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    output = pipe(input_ids=rows, max_new_tokens=0, generator=generators, **call)
    return [text.removeprefix(problem.letter) for problem, text in zip(problems, output.texts, strict=True)], output.trace


def _replied(
    pipe: Any, problems: Sequence[Any], seeds: list[int], chat: bool, shots: int | None, **call: Any
) -> tuple[list[str], DecodingTrace]:
    """Answers from the model's replies to the tasks in words."""
    asked = _asked([text_tasks.few_shot_prompt(problem, shots) for problem in problems], chat)
    output = pipe(**asked, generator=[torch.Generator().manual_seed(seed) for seed in seeds], **call)
    read = text_tasks.final_answer if chat else text_tasks.first_line
    return [read(text) for text in output.texts], output.trace


def compare_text(args: argparse.Namespace) -> None:
    """Samplers x tokens per step x seeds on text tasks with exact checkers: figures and tables."""
    infilled = args.ask == "infill"
    for name in ("num_fewshot", "max_new_tokens", "block_length"):
        if infilled and getattr(args, name) is not None:
            flag = f"--{name.replace('_', '-')}"
            raise ValueError(f"{flag} must be given with --ask prompt or chat only, got {getattr(args, name)} with --ask infill.")
    tasks = args.tasks or list(INFILLED_TASKS if infilled else TEXT_TASKS)
    if infilled and "countdown" in tasks:
        raise ValueError("`ask` must be prompt or chat for the task countdown, which has no template to fill in, got infill.")
    samplers = [comparison.parse_sampler(name) for name in args.samplers]
    cells = text_comparison.grid(tasks, samplers, args.tokens_per_step, args.seeds)
    problems = {task: text_comparison.problems_of(task, args.num_problems, args.problem_seed) for task in tasks}
    with owned(args.output):
        _compare_text(args, cells, problems)


def _compare_text(args: argparse.Namespace, cells: list[text_comparison.TextCell], problems: dict[str, list[Any]]) -> None:
    folder, infilled = args.output, args.ask == "infill"
    call: dict[str, Any] = {"cache": args.cache}
    if not infilled:
        call |= {"chat": args.ask == "chat", "shots": args.num_fewshot}
        call |= {"max_new_tokens": args.max_new_tokens or 128, "block_length": args.block_length}
    results, pipe = folder / "results.jsonl", load_text_pipeline(args)
    settings = {name: getattr(args, name) for name in ("ask", "num_problems", "problem_seed")}
    runs.check_settings(folder, {**identity(args, pipe), **settings, **call}, begun=results.exists())
    call["lookahead_batch_size"] = args.lookahead_batch_size
    records = text_comparison.read_records(results, args.num_problems)
    done = {(record["task"], record["sampler"], record["tokens_per_step"], record["seed"]): record for record in records}
    own = dict(pipe.scheduler.config)
    # But for "default" not the pipeline's settings: a sampler's name, as it stands in the table, says all of its own.
    base = {"mask_token_id": own["mask_token_id"]}
    cells = [replace(cell, sampler=cell.sampler.for_pipeline(own)) for cell in cells]
    for cell in Progress(cells, desc="compare-text", unit="run"):
        settings = {**cell.sampler.scheduler, "tokens_per_step": cell.tokens_per_step}
        pipe.scheduler = InfoGainScheduler.from_config(base, **settings)
        scheduler = common.scheduler_config(pipe)
        if cell.key in done:
            runs.refuse_differences(
                f"{results} ({cell.sampler.name})", {"scheduler": done[cell.key]["scheduler"]}, {"scheduler": scheduler}
            )
            continue
        answer = partial(_filled_in if infilled else _replied, pipe, **call, **cell.sampler.call)
        record = text_comparison.run(cell, problems[cell.task], answer, args.batch_size, infilled)
        done[cell.key] = {**record, "scheduler": scheduler}
        save_text("".join(json.dumps(one) + "\n" for one in done.values()), results)
    groups = text_comparison.summarize(list(done.values()) if args.everything else [done[cell.key] for cell in cells])
    report = text_comparison.table(groups)
    save_text(report + "\n", folder / "table.md")
    print(report)
    written = ["results.jsonl", "table.md"]
    for task in dict.fromkeys(group.task for group in groups) if args.plots else ():
        written.append(f"{task}.png")
        plot_variety([group for group in groups if group.task == task], folder / written[-1])
    print(f"Written to {folder}: {', '.join(written)}.")
