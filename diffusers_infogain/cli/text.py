"""`diffusers-infogain text` and `diffusers-infogain compare-text`."""

from __future__ import annotations

import argparse
import contextlib
import json
import re
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from ..decoding import DecodingTrace
from ..evaluation import comparison, runs, text_comparison, text_tasks
from ..evaluation.identity import pipeline_digest
from ..evaluation.report import plot_variety
from ..files import append_json_lines, check_fields, cut_unfinished, owned, read_json_lines, save_text
from ..models.text_logits import CACHES
from ..pipeline_infogain_text import InfoGainTextPipeline
from ..scheduling_infogain import InfoGainScheduler
from ..text_generation import mask_text
from . import common

_MASK = re.compile(r"(?:\[|<\|?|\{)\s*(?:mdm_)?mask\s*(?:\]|\|?>|\})", re.IGNORECASE)
"""What masks of tokenizers look like."""

DEFAULT_TEXT_SAMPLERS = ("confidence", "entropy", "margin", "maskgit", "uniform", "lookum", "info_gain", "paper")


def load_text_pipeline(args: argparse.Namespace) -> Any:
    """The model of the flags."""
    pipe = InfoGainTextPipeline.from_pretrained(args.model, dtype=getattr(torch, args.dtype)).to(args.device)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _asked(prompts: list[str], chat: bool) -> dict[str, Any]:
    return {"messages": [[{"role": "user", "content": prompt}] for prompt in prompts]} if chat else {"prompt": prompts}


def text(args: argparse.Namespace) -> None:
    """Texts from prompts, by a masked language model; with --output as JSON lines, going on where a run was killed."""
    common.require_positive(args, "num_texts", "batch_size")
    prompts = common.prompts_of(args)
    with contextlib.nullcontext() if args.output is None else owned(args.output, folder=False):
        _text(args, prompts)


def _text(args: argparse.Namespace, prompts: list[str]) -> None:
    requests = [(prompt, args.seed + copy) for prompt in prompts for copy in range(args.num_texts)]
    done = _finished(args.output, requests) if args.output is not None else 0
    pipe = load_text_pipeline(args)
    pipe.scheduler = InfoGainScheduler.from_config(pipe.scheduler.config, **common.scheduler_settings(args))
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
    for start in tqdm(range(done, len(requests), args.batch_size), desc="text", unit="batch", disable=args.output is None):
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


def _add_call_flags(command: argparse.ArgumentParser) -> None:
    command.add_argument("--lookahead-batch-size", type=int, help="most states run through the model at once")
    command.add_argument("--cache", choices=CACHES, help="of keys and values (default: exact if possible, else none)")


def add_decoding_flags(command: argparse.ArgumentParser) -> None:
    """How texts are decoded, whatever they are."""
    command.add_argument(
        "--block-length", type=int, help="decode blocks of so many tokens in turn (default: all, or the model's)"
    )
    command.add_argument("--steps", type=int, help="decoding steps in all (default: one token a step, or --tokens-per-step)")
    _add_call_flags(command)
    command.add_argument("--num-beams", type=int, default=1, help="above 1: beam search with that many beams")
    command.add_argument("--num-runs", type=int, default=1, help="above 1: the best of that many runs per block")


def decoding_arguments(args: argparse.Namespace) -> dict[str, Any]:
    """The flags of `add_decoding_flags` as arguments of the pipeline's call."""
    names = ("block_length", "lookahead_batch_size", "cache", "num_beams", "num_runs")
    return {"num_inference_steps": args.steps, **{name: getattr(args, name) for name in names}}


def add_text_arguments(command: argparse.ArgumentParser) -> None:
    """The command's flags."""
    command.add_argument("prompts", nargs="*", help="what to answer")
    command.add_argument("--prompts-file", type=Path, help="text file with one prompt per line, or JSONL with the key 'prompt'")
    command.add_argument("--model", default="demo-text", help="'demo-text', a folder or a Hub id (default: demo-text)")
    command.add_argument("--output", type=Path, help="file of JSON lines to write, or to go on with (default: print the texts)")
    command.add_argument("--chat", action="store_true", help="prompts are a user's turn in a chat")
    command.add_argument("--num-texts", type=int, default=1, help="texts per prompt, with seeds one after the other")
    text = "(default: 128, 16 for demo-text, and 0, which only fills in masks, where prompts have any)"
    command.add_argument("--max-new-tokens", type=int, help=text)
    add_decoding_flags(command)
    common.add_machine_flags(command, "text")
    common.add_sampler_flags(command)


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
    common.require_positive(args, "num_problems", "batch_size")
    infilled = args.ask == "infill"
    for name in ("num_fewshot", "max_new_tokens", "block_length"):
        value, lowest = getattr(args, name), 0 if name == "num_fewshot" else 1
        if value is not None and (infilled or value < lowest):
            raise ValueError(
                f"`{name}` must be an integer >= {lowest}, and given with --ask prompt or chat only, got {value} with --ask "
                f"{args.ask}."
            )
    tasks = args.tasks or list(text_comparison.INFILLED if infilled else text_comparison.TASKS)
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
    for cell in tqdm(cells, desc="compare-text", unit="run"):
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


def add_compare_arguments(command: argparse.ArgumentParser) -> None:
    """The command's flags."""
    command.add_argument("--tasks", nargs="+", choices=text_comparison.TASKS, help="(default: all that can be asked so)")
    ask = (
        "infill: fill in the answer's template, for models of single characters such as demo-text; prompt: ask in words; chat: "
        "ask in words, as a user's turn (default: infill)"
    )
    command.add_argument("--ask", choices=("infill", "prompt", "chat"), default="infill", help=ask)
    shots = "solved problems before each, with --ask prompt or chat (default: 5 for sudoku, 3 for countdown, else none)"
    command.add_argument("--num-fewshot", type=int, help=shots)
    command.add_argument("--max-new-tokens", type=int, help="with --ask prompt or chat (default: 128)")
    command.add_argument("--block-length", type=int, help="with --ask prompt or chat: decode blocks of so many tokens in turn")
    command.add_argument("--samplers", nargs="+", default=list(DEFAULT_TEXT_SAMPLERS), metavar="NAME[:KEY=VALUE,...]")
    command.add_argument("--tokens-per-step", type=int, nargs="+", default=[1, 2, 4], help="(default: 1 2 4)")
    command.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="(default: 0 1 2)")
    command.add_argument("--num-problems", type=int, default=200, help="per task (default: 200)")
    command.add_argument("--problem-seed", type=int, default=0, help="which problems (default: 0)")
    command.add_argument("--model", default="demo-text", help="'demo-text', a folder or a Hub id (default: demo-text)")
    command.add_argument("--everything", action="store_true", help="report all runs in the output folder, not only these")
    command.add_argument("--plots", action="store_true", help="draw right against distinct answers, a picture for every task")
    _add_call_flags(command)
    command.add_argument("--output", type=Path, default=Path("outputs/text"), help="folder (default: outputs/text)")
    common.add_device_flags(command, 50, "problem")
