"""`diffusers-infogain lm-eval`."""

from __future__ import annotations

import argparse
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import diffusers_infogain

from ..evaluation.identity import scheduler_record
from ..evaluation.text_cache import EstimateCache, TextCache
from ..files import check_fields, read_json, save_text
from ..output_folders import owned, unused
from ..scheduling_infogain import InfoGainScheduler
from . import common


def lm_eval(args: argparse.Namespace) -> None:
    """Runs lm-eval tasks, and writes scores, samples and costs; texts of earlier runs with the same settings are reused."""
    from ..evaluation import lm_eval_adapter  # noqa: F401  # first, since it explains how to install lm-eval
    from ..evaluation.lm_eval_tasks import check_tasks

    from lm_eval.tasks import TaskManager  # isort: skip

    _check_chats(args)
    chosen = common.scheduler_settings(args)  # before the tasks, whose files take lm-eval seconds to read
    manager = None
    if args.processes.is_main:
        manager = TaskManager(include_path=args.include_path)
        check_tasks(manager.task_index, args.tasks, args.allow_code_execution)
    with owned(args.output, main=args.processes.is_main):
        _lm_eval(args, manager, chosen)


def _check_chats(args: argparse.Namespace) -> None:
    """Raises a ValueError for what is said about chats where prompts are none, and for a variable that is given twice."""
    for name in ("chat_template", "template_variable"):
        if getattr(args, name) is not None and not args.chat:
            raise ValueError(f"--{name.replace('_', '-')} must be given only with --chat.")
    variables = args.template_variable or []
    if len(dict(variables)) < len(variables):
        raise ValueError("--template-variable must name each variable once.")


def _lm_eval(args: argparse.Namespace, manager: Any, chosen: dict[str, Any]) -> None:
    from lm_eval import simple_evaluate

    from ..evaluation.lm_eval_adapter import InfoGainLM
    from ..evaluation.lm_eval_likelihood import LikelihoodSettings

    folder = args.output
    pipe = common.load_text_pipeline(args)
    pipe.scheduler = InfoGainScheduler.from_config(pipe.scheduler.config, **chosen)
    call = common.text_call_arguments(args)
    lookahead_batch_size = call.pop("lookahead_batch_size")  # changes no text
    likelihood = LikelihoodSettings(args.likelihood, args.num_draws, args.group_size, not args.no_greedy_check, args.append_eos)
    chats = {"chat_template": args.chat_template, "chat_template_kwargs": dict(args.template_variable or ()) or None}
    model = InfoGainLM(
        pipe,
        batch_size=args.batch_size,
        max_gen_toks=args.max_gen_toks,
        seed=args.seed,
        greedy_tokens=args.greedy_tokens,
        processes=args.processes,
        add_bos_token=args.add_bos_token,
        likelihood=likelihood,
        lookahead_batch_size=lookahead_batch_size,
        **chats,
        **common.with_processors(call),
    )
    if not args.processes.is_main:
        model.serve()
        return
    settings = {
        **common.identity(args, pipe),
        "version": diffusers_infogain.__version__,
        "seed": args.seed,
        "max_gen_toks": args.max_gen_toks,
        "greedy_tokens": args.greedy_tokens,
        "scheduler": scheduler_record(pipe.scheduler),
        "call": call,
        "add_bos_token": args.add_bos_token,
        "chat_template": model.chat_template(True) if args.chat else None,
        "chat_template_kwargs": chats["chat_template_kwargs"],
        "num_fewshot": args.num_fewshot,
        "chat": args.chat,
        "system_instruction": args.system_instruction,
        "gen_kwargs": args.gen_kwargs,
    }
    # Texts with other settings are stored in other files.
    settings = json.loads(json.dumps(settings, default=str))
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12]
    model.texts = texts = TextCache(folder / f"texts_{digest}.jsonl")
    settings["likelihood"] = asdict(likelihood)
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12]
    model.estimates = estimates = EstimateCache(folder / f"likelihoods_{digest}.jsonl")
    if args.allow_code_execution:
        os.environ["HF_ALLOW_CODE_EVAL"] = "1"
    results: Any = simple_evaluate(
        model=model,
        tasks=list(args.tasks),
        num_fewshot=args.num_fewshot,
        batch_size=args.batch_size,
        device=args.device,
        limit=args.limit,
        system_instruction=args.system_instruction,
        apply_chat_template=args.chat,
        fewshot_as_multiturn=args.chat,
        gen_kwargs=args.gen_kwargs,
        task_manager=manager,
        confirm_run_unsafe_code=args.allow_code_execution,
    )
    model.done()
    _write(folder, results, settings, {"tasks": list(args.tasks), "limit": args.limit}, (texts, estimates))


def _write(
    folder: Path,
    results: dict[str, Any],
    settings: dict[str, Any],
    asked: dict[str, Any],
    caches: tuple[TextCache, EstimateCache],
) -> None:
    """Writes results.json and a file of samples for each task, or results-2.json and so on beside results of other settings."""
    from lm_eval.utils import handle_non_serializable, make_table

    samples = results.pop("samples")
    records = [record for cache in caches for record in cache.records]
    results["infogain"] = {"settings": settings, "asked": asked, "costs": _costs_by_task(records, samples)}

    def same(path: Path) -> bool:
        found = read_json(path)
        check_fields(found, str(path), {"infogain": dict})
        return (found["infogain"].get("settings"), found["infogain"].get("asked")) == (settings, asked)

    path = unused(folder / "results.json", same)
    number = path.stem.removeprefix("results")
    for name, records in samples.items():
        lines = "".join(json.dumps(record, default=handle_non_serializable, ensure_ascii=False) + "\n" for record in records)
        save_text(lines, folder / f"samples_{name.replace('/', '_').replace(':', '_')}{number}.jsonl")
    save_text(json.dumps(results, indent=1, default=handle_non_serializable, ensure_ascii=False) + "\n", path)
    print(make_table(results))
    for name, cost in results["infogain"]["costs"].items():
        print(
            f"{name}: {cost['num_texts']} texts, {cost['num_evaluations']} NFE, {cost['cumulative_entropy']:.2f} nats, "
            f"{cost['seconds']:.1f} s"
        )
    kept = ", ".join(cache.path.name for cache in caches if cache.records)
    print(f"Written to {folder}: {path.name}, samples_*{number}.jsonl, {kept}.")


def _costs_by_task(
    texts: Sequence[Mapping[str, Any]], samples: Mapping[str, Sequence[Mapping[str, Any]]]
) -> dict[str, dict[str, Any]]:
    """The total costs of each task's texts, also of those that earlier runs with the same settings made; a text that was made
    twice counts once, by its last costs."""
    from ..evaluation.lm_eval_adapter import total_costs

    made = {(cost["task"], cost["doc_id"], cost["repeat"], cost["seed"]): cost for cost in texts}
    totals = {}
    for task, records in samples.items():
        documents = {record["doc_id"] for record in records}
        own = [cost for (name, document, *_), cost in made.items() if name == task and document in documents]
        totals[task] = total_costs(own)
    return totals
