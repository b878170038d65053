"""`diffusers-infogain compare-text`."""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from functools import partial
from typing import Any

from ..choices import INFILLED_TASKS, TEXT_TASKS
from ..evaluation import runs, tables, text_comparison
from ..evaluation.identity import scheduler_record
from ..evaluation.plots import plot_variety
from ..evaluation.samplers import OF_TEXT, parse_sampler
from ..evaluation.splits import seed_of_split
from ..files import save_text
from ..output_folders import owned
from ..progress import Progress
from ..scheduling_infogain import InfoGainScheduler
from . import common


def compare_text(args: argparse.Namespace) -> None:
    """Runs all combinations of tasks, samplers, tokens per step and seeds, and writes their records, tables and plots."""
    infilled = args.ask == "infill"
    of_words = (
        "num_fewshot",
        "max_new_tokens",
        "block_length",
        "stop_strings",
        "think_end_token",
        "min_new_tokens",
        "negative_prompt",
    )
    for name in of_words:
        if infilled and getattr(args, name):
            flag = f"--{name.replace('_', '-')}"
            raise ValueError(f"{flag} must be given only with --ask prompt or chat, got {getattr(args, name)} with --ask infill.")
    asking = common.prompt_settings(args, args.ask == "chat", "--ask chat")
    tasks = args.tasks or list(INFILLED_TASKS if infilled else TEXT_TASKS)
    if infilled and "countdown" in tasks:
        raise ValueError("`ask` must be prompt or chat for the task countdown, which has no template to fill in, got infill.")
    samplers = [parse_sampler(name, guided=False, call=OF_TEXT) for name in args.samplers]
    cells = text_comparison.grid(tasks, samplers, args.tokens_per_step, args.seeds)
    problems = {task: text_comparison.problems_of(task, args.num_problems, args.problem_seed, args.split) for task in tasks}
    for seed in args.seeds:  # checked before a model is loaded
        seed_of_split(seed, args.split)
    with owned(args.output, main=args.processes.is_main):
        _compare_text(args, cells, problems, asking)


def _compare_text(
    args: argparse.Namespace, cells: list[text_comparison.TextCell], problems: dict[str, list[Any]], asking: dict[str, Any]
) -> None:
    folder, processes = args.output, args.processes
    infilled = args.ask == "infill"
    call: dict[str, Any] = {"cache": args.cache, **common.writing_arguments(args), **asking}
    if not infilled:
        call |= {"chat": args.ask == "chat", "shots": args.num_fewshot}
        call |= {"max_new_tokens": args.max_new_tokens or 128, "block_length": args.block_length}
    path = folder / "results.jsonl"
    pipe = common.load_text_pipeline(args)
    settings = {name: getattr(args, name) for name in ("ask", "num_problems", "problem_seed", "split")}
    settings |= common.identity(args, pipe)
    rivals, records = [], []
    if processes.is_main:
        rivals = text_comparison.read_rivals(args.rivals, settings) if args.rivals is not None else []
        runs.check_settings(folder, {**settings, **call}, begun=path.exists())
        records = text_comparison.read_records(path, args.num_problems)
    call["lookahead_batch_size"] = args.lookahead_batch_size
    answer = partial(text_comparison.fill_in if infilled else text_comparison.reply, pipe, **common.with_processors(call))
    own = dict(pipe.scheduler.config)
    # Except for "default" the pipeline's own settings do not count: a sampler's name in the table has to say all of its settings.
    base = {"mask_token_id": own["mask_token_id"]}
    cells = [replace(cell, sampler=cell.sampler.for_pipeline(own)) for cell in cells]
    missing = processes.from_main([cell.find(records) is None for cell in cells])
    chosen = []
    progress = Progress(cells, desc="compare-text", unit="run", disable=not processes.is_main)
    for cell, is_missing in zip(progress, missing, strict=True):
        own_settings = {**cell.sampler.scheduler, "tokens_per_step": cell.tokens_per_step}
        pipe.scheduler = InfoGainScheduler.from_config(base, **own_settings)
        scheduler = scheduler_record(pipe.scheduler)
        record = cell.find(records)
        if is_missing:
            answer_with = partial(answer, **cell.sampler.call)
            guided = {**call, **cell.sampler.call}.get("guidance_scale", 1) > 1
            arguments = (args.batch_size, infilled, args.split, processes, 2 if guided else 1)
            record = text_comparison.run(cell, problems[cell.task], answer_with, *arguments)
            record["scheduler"] = scheduler
            if processes.is_main:
                records.append(record)
                save_text("".join(json.dumps(finished) + "\n" for finished in records), path)
        elif record is not None:
            where = f"{path} ({cell.sampler.name})"
            runs.refuse_differences(where, {"scheduler": record["scheduler"]}, {"scheduler": scheduler})
        chosen.append(record)
    if not processes.is_main:
        return
    groups = text_comparison.text_groups(records if args.everything else chosen)
    report = tables.text_tables(groups, rivals)
    save_text(report + "\n", folder / "table.md")
    print(report)
    written = ["results.jsonl", "table.md"]
    for task in dict.fromkeys(group["task"] for group in groups) if args.plots else ():
        written.append(f"{task}.png")
        plot_variety([group for group in groups if group["task"] == task], folder / written[-1])
    print(f"Written to {folder}: {', '.join(written)}.")
