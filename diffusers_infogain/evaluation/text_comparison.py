"""Comparisons on text tasks whose answers a rule can check: tasks x samplers x tokens per step x seeds."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ..checks import check_choice
from ..choices import TEXT_TASKS
from ..files import check_fields, read_json, read_json_lines
from ..processes import ALONE, Processes, batches_of
from ..trace import DecodingTrace
from . import text_tasks
from .groups import Cell, Group, Record, per_item, per_run_and_item, summarize
from .samplers import SamplerSpec, check_recorded_sampler
from .splits import seed_of_split

Answer = Callable[[Sequence[Any], list[int]], tuple[list[str], DecodingTrace]]
"""Answers problems, each with its own seed, and returns the trace too."""


@dataclass(frozen=True)
class TextCell(Cell):
    """All problems of a task with one sampler, one number of tokens per step and one seed."""

    task: str
    sampler: SamplerSpec
    tokens_per_step: int
    seed: int


def grid(
    tasks: Iterable[str], samplers: Iterable[SamplerSpec], tokens_per_step: Iterable[int], seeds: Iterable[int]
) -> list[TextCell]:
    """All runs, each once, one seed after the other."""
    settings = itertools.product(seeds, tasks, tokens_per_step, samplers)
    return list(dict.fromkeys(TextCell(task, sampler, count, seed) for seed, task, count, sampler in settings))


_SAMPLED: dict[str, Callable[..., list[Any]]] = {
    "multiplication": text_tasks.sample_multiplications,
    "equation": partial(text_tasks.sample_multiplications, given="nothing"),
    "sudoku": partial(text_tasks.sample_sudokus, held_out=True),
    "countdown": partial(text_tasks.sample_countdowns, held_out=True),
}


def problems_of(task: str, num: int, seed: int = 0, split: str | None = None) -> list[Any]:
    """`num` problems of a task, the same for the same seed; with `split` from one of `choices.SPLITS`, else from all of them.

    Raises:
        ValueError: For an unknown task or split.
    """
    check_choice("task", task, TEXT_TASKS)
    return _SAMPLED[task](num, torch.Generator().manual_seed(seed), split=split)


def read_records(path: Path, num_problems: int) -> list[Record]:
    """The records of finished runs, one per line, or an empty list if the file is missing.

    Raises:
        ValueError: For a line that is no such record or has another number of problems, naming it.
    """
    records = read_json_lines(path) if path.exists() else []
    for number, record in enumerate(records, 1):
        where = f"Line {number} of {path}"
        check_fields(record, where, _FIELDS)
        check_recorded_sampler(record["sampler"], where)
        lengths = {len(record[name]) for name in _PER_PROBLEM}
        if lengths != {num_problems} or not set(record["right"]) <= {"0", "1"}:
            raise ValueError(f"{where} must have verdicts and figures of {num_problems} problems.")
    return records


def read_rivals(folder: Path, settings: dict[str, Any]) -> list[Group]:
    """The groups of another comparison, from which `groups.best_greedy` may choose rivals for the present one.

    Args:
        folder: Its output folder.
        settings: The present comparison's, with "weights", "ask" and "split" among them.

    Raises:
        ValueError: If its files are damaged, it is of another model or way to ask, or not of another split: what was chosen on
            the same problems, or on the same noise, would owe its rank to luck.
    """
    path = folder / "run.json"
    there = read_json(path)
    check_fields(there, str(path), {"weights": str, "ask": str, "split": (str, type(None)), "num_problems": int})
    for name in ("weights", "ask"):
        if there[name] != settings[name]:
            raise ValueError(f"The rivals in {folder} must have the same `{name}`, {settings[name]}, got {there[name]}.")
    if None in (there["split"], settings["split"]) or there["split"] == settings["split"]:
        raise ValueError(
            f"The rivals in {folder} must be chosen on another `split`, got {there['split']} there and {settings['split']} here."
        )
    return text_groups(read_records(folder / "results.jsonl", there["num_problems"]))


_PER_PROBLEM = ("right", "cumulative_entropies", "num_states", "num_evaluations", "steps", "product_first")

_FIELDS: dict[str, Any] = {
    "task": str,
    "sampler": str,
    "tokens_per_step": int,
    "seed": int,
    "looks_ahead": bool,
    "scheduler": dict,
    "right": str,
    "cumulative_entropies": [float],
    "num_states": [int],
    "num_evaluations": [int],
    "steps": [int],
    "product_first": [(float, type(None))],
    "distinct": int,
    "distinct_right": int,
    "seconds": float,
}


def run(
    cell: TextCell,
    problems: Sequence[Any],
    answer: Answer,
    batch_size: int,
    infilled: bool = True,
    split: str | None = None,
    processes: Processes = ALONE,
    rows_per_state: int = 1,
) -> Record:
    """Answers all problems and checks the answers.

    Args:
        split: The split that the problems are of. Each has noise of its own, also where the problems are alike, as equations of
            which nothing is given.
        infilled: Whether `answer` fills in templates, as `fill_in` does. The columns of its trace are then those of the template
            behind the task's letter.
        processes: Those that share the work. Only the main process gets the record; that of the others is of no problems.
        rows_per_state: Of the network: 2 with guidance.

    Returns:
        A record for JSON. Per problem: "right" (1 or 0), "cumulative_entropies" in nats, "num_evaluations" (model evaluations),
        "steps", and "product_first", the share of the first step's tokens that lie in the product (None unless a whole equation
        is filled in). In all: the number of "distinct" answers and of right ones among these ("distinct_right"), and "seconds".
    """
    seed = 1_000_000 * seed_of_split(cell.seed, split)

    def answer_batch(batch: list[int]) -> list[Any]:
        begun = time.perf_counter()
        asked = [problems[index] for index in batch]
        texts, trace = answer(asked, [seed + index for index in batch])
        right = [problem.check(text) for problem, text in zip(asked, texts, strict=True)]
        chosen = [_product_first(problem, trace.selected[:, i]) if infilled else None for i, problem in enumerate(asked)]
        columns = {
            "cumulative_entropies": [round(value, 4) for value in trace.cumulative_entropy.tolist()],
            # What each text takes by itself, whatever equal ones of a batch share: a row for each state.
            "num_states": trace.num_states.sum(0).tolist(),
            "num_evaluations": (rows_per_state * trace.num_states.sum(0)).tolist(),
            "steps": (trace.num_decoded > 0).sum(0).tolist(),
            "product_first": chosen,
        }
        return [texts, right, columns, time.perf_counter() - begun]

    rows = batches_of(range(len(problems)), batch_size)
    columns: dict[str, list[Any]] = {name: [] for name in _PER_PROBLEM if name != "right"}
    distinct: dict[str, bool] = {}
    verdicts, seconds = "", 0.0
    for texts, right, values, taken in processes.map(answer_batch, rows, cell.task, "problem", bar=False):
        for text, verdict in zip(texts, right, strict=True):
            distinct[text] = distinct.get(text, False) or verdict
        verdicts += "".join("1" if verdict else "0" for verdict in right)
        for name, column in columns.items():
            column += values[name]
        seconds += taken
    return {
        **cell.key,
        "looks_ahead": cell.sampler.looks_ahead,
        "right": verdicts,
        **columns,
        "distinct": len(distinct),
        "distinct_right": sum(distinct.values()),
        "seconds": round(seconds, 3),
    }


def _product_first(problem: Any, selected: torch.Tensor) -> float | None:
    """The share of the first step's tokens that lie in the product, for an equation of which nothing is given.

    Args:
        selected: (T, L) bool, what each step decoded; nothing in the steps of a try that was given up.
    """
    if not isinstance(problem, text_tasks.MultiplicationProblem) or problem.given != "nothing":
        return None
    equals = 1 + problem.template.index("=")  # the letter stands before the template
    step, position = selected.nonzero(as_tuple=True)
    return (position[step == step[0]] > equals).double().mean().item()


def fill_in(pipe: Any, problems: Sequence[Any], seeds: list[int], **call: Any) -> tuple[list[str], DecodingTrace]:
    """Answers from templates, whose masks a text pipeline fills in.

    Args:
        call: Further arguments of the pipeline's call, here and in `reply`.
    """
    templates = [list(pipe.tokenizer(problem.letter + problem.template).input_ids) for problem in problems]
    output = pipe(input_ids=templates, max_new_tokens=0, generator=_generators(seeds), **call)
    return [text.removeprefix(problem.letter) for problem, text in zip(problems, output.texts, strict=True)], output.trace


def reply(
    pipe: Any,
    problems: Sequence[Any],
    seeds: list[int],
    *,
    chat: bool,
    shots: int | None,
    answer_begin: str | None = None,
    negative_prompt: str | None = None,
    **call: Any,
) -> tuple[list[str], DecodingTrace]:
    """Answers from what a text pipeline replies to the tasks in words.

    Args:
        chat: Whether the prompt is a user's turn in a chat.
        shots: Solved problems in front of each; None: the task's own number (see `text_tasks.few_shot_prompt`).
        answer_begin: How answers in a chat begin.
        negative_prompt: What guidance steers away from.
    """
    prompts = [text_tasks.few_shot_prompt(problem, shots) for problem in problems]
    output = pipe(**prompt_arguments(prompts, chat, answer_begin, negative_prompt), generator=_generators(seeds), **call)
    read = text_tasks.final_answer if chat else text_tasks.first_line
    return [read(text) for text in output.texts], output.trace


def prompt_arguments(
    prompts: Sequence[str], chat: bool, answer_begin: str | None = None, negative_prompt: str | None = None
) -> dict[str, Any]:
    """Prompts as arguments of a text pipeline's call: as they are, or each as a user's turn in a chat.

    Args:
        answer_begin: How each answer in a chat begins, for the model to continue.
        negative_prompt: What guidance steers away from, in a chat likewise.
    """
    begun = [] if answer_begin is None else [{"role": "assistant", "content": answer_begin}]

    def asked(prompt: str) -> Any:
        return [{"role": "user", "content": prompt}, *begun] if chat else prompt

    call: dict[str, Any] = {"messages" if chat else "prompt": [asked(prompt) for prompt in prompts]}
    call |= {"continue_final_message": True} if begun else {}
    return call if negative_prompt is None else call | {"negative_prompt": asked(negative_prompt)}


def _generators(seeds: Iterable[int]) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


_COLUMNS = {
    "right": per_item("right"),
    "cumulative_entropy": per_item("cumulative_entropies"),
    **{name: per_item(name) for name in ("num_states", "num_evaluations", "steps", "product_first")},
    **{name: per_run_and_item(name) for name in ("distinct", "distinct_right", "seconds")},
}


def text_groups(records: Iterable[Record]) -> list[Group]:
    """Groups the records of `run` by configuration."""
    return summarize(records, ("task", "tokens_per_step", "sampler"), _COLUMNS)
