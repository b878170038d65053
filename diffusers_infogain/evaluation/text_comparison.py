"""Samplers on text tasks whose answers a rule can check: right answers, entropy, rows, and what is decoded first."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..choices import TEXT_TASKS
from ..decoding import DecodingTrace
from ..files import check_fields, read_json_lines
from . import text_tasks
from .comparison import SamplerSpec, check_recorded_sampler, parse_sampler
from .statistics import Figure, clustered_mean, pearson

Answer = Callable[[Sequence[Any], list[int]], tuple[list[str], DecodingTrace]]
"""Answers problems, each with its own seed; the trace of filled in templates is over their letter and their columns."""


@dataclass(frozen=True)
class TextCell:
    """One run: a sampler at so many tokens a step, on all problems with one seed."""

    task: str
    sampler: SamplerSpec
    tokens_per_step: int
    seed: int

    @property
    def key(self) -> tuple[str, str, int, int]:
        """What tells it from other runs."""
        return self.task, self.sampler.name, self.tokens_per_step, self.seed


def grid(
    tasks: Iterable[str], samplers: Iterable[SamplerSpec], tokens_per_step: Iterable[int], seeds: Iterable[int]
) -> list[TextCell]:
    """All runs, one seed after the other, each once."""
    every = itertools.product(seeds, tasks, tokens_per_step, samplers)
    return list(dict.fromkeys(TextCell(task, sampler, k, seed) for seed, task, k, sampler in every))


def problems_of(task: str, num: int, seed: int = 0) -> list[Any]:
    """`num` problems of a task, the same for the same seed.

    Raises:
        ValueError: For an unknown task.
    """
    generator = torch.Generator().manual_seed(seed)
    if task == "sudoku":
        return text_tasks.sample_sudokus(num, generator, held_out=True)
    if task == "multiplication":
        return text_tasks.sample_multiplications(num, generator)
    if task == "equation":
        return text_tasks.sample_multiplications(num, generator, given="nothing")
    if task == "countdown":
        return text_tasks.sample_countdowns(num, generator, held_out=True)
    raise ValueError(f"`task` must be one of {', '.join(TEXT_TASKS)}, got {task!r}.")


def read_records(path: Path, num_problems: int) -> list[dict[str, Any]]:
    """The records of finished runs, one per line; none if the file is missing.

    Raises:
        ValueError: For a line that is none, or of another number of problems, naming it.
    """
    records = read_json_lines(path) if path.exists() else []
    for number, record in enumerate(records, 1):
        where = f"Line {number} of {path}"
        check_fields(record, where, _FIELDS)
        check_recorded_sampler(record["sampler"], where)
        lengths = {len(record[name]) for name in ("right", "cumulative_entropies", "model_rows", "steps", "product_first")}
        if lengths != {num_problems} or not set(record["right"]) <= {"0", "1"}:
            raise ValueError(f"{where} must have verdicts and figures of {num_problems} problems.")
    return records


_FIELDS: dict[str, Any] = {
    "task": str,
    "sampler": str,
    "tokens_per_step": int,
    "seed": int,
    "looks_ahead": bool,
    "scheduler": dict,
    "right": str,
    "cumulative_entropies": [float],
    "model_rows": [int],
    "steps": [int],
    "product_first": [(float, type(None))],
    "distinct": int,
    "distinct_right": int,
    "seconds": float,
}


def run(cell: TextCell, problems: Sequence[Any], answer: Answer, batch_size: int, infilled: bool = True) -> dict[str, Any]:
    """Answers all problems and checks the answers.

    Args:
        infilled: Whether `answer` fills in templates.

    Returns:
        A record for JSON: "right" (a 1 or 0 per problem), "cumulative_entropies" (nats), "model_rows", "steps" and
        "product_first" per problem (None but where a whole equation is filled in), how many answers are "distinct", and how many
        of these right ("distinct_right"), "seconds" in all.
    """
    right, entropies, rows, steps, first = "", [], [], [], []
    distinct, distinct_right = set(), set()
    begun = time.perf_counter()
    for start in range(0, len(problems), batch_size):
        part = problems[start : start + batch_size]
        seeds = [1_000_000 * cell.seed + start + i for i in range(len(part))]
        texts, trace = answer(part, seeds)
        for row, (problem, text) in enumerate(zip(part, texts, strict=True)):
            right += str(int(problem.check(text)))
            distinct.add(text)
            if right[-1] == "1":
                distinct_right.add(text)
            first.append(_product_first(problem, trace.selected[0, row]) if infilled else None)
        entropies += [round(value, 4) for value in trace.cumulative_entropy.tolist()]
        rows += trace.model_rows.sum(0).tolist()
        steps += (trace.num_decoded > 0).sum(0).tolist()
    return {
        "task": cell.task,
        "sampler": cell.sampler.name,
        "tokens_per_step": cell.tokens_per_step,
        "seed": cell.seed,
        "looks_ahead": cell.sampler.looks_ahead,
        "right": right,
        "cumulative_entropies": entropies,
        "model_rows": rows,
        "steps": steps,
        "product_first": first,
        "distinct": len(distinct),
        "distinct_right": len(distinct_right),
        "seconds": round(time.perf_counter() - begun, 3),
    }


def _product_first(problem: Any, selected: torch.Tensor) -> float | None:
    """The share of the first step's tokens that lie in the product, for an equation of which nothing is given."""
    if not isinstance(problem, text_tasks.MultiplicationProblem) or problem.given != "nothing":
        return None
    places = selected.nonzero()[:, 0]
    equals = 1 + problem.template.index("=")  # the letter stands before the template
    return (places > equals).double().mean().item()


@dataclass
class TextGroup:
    """The runs of one configuration over all seeds."""

    task: str
    sampler: str
    tokens_per_step: int
    looks_ahead: bool
    seeds: list[int]
    figures: dict[str, Figure]
    verdicts: dict[tuple[int, int], float]
    """By seed and problem, 1 for a right answer."""

    @property
    def greedy(self) -> bool:
        """Whether it neither looks ahead nor searches."""
        return not self.looks_ahead and not parse_sampler(self.sampler).call


def summarize(records: Sequence[dict[str, Any]]) -> list[TextGroup]:
    """One group per configuration. Standard errors allow for the answers to one problem, over the seeds, hanging together."""
    groups = []
    key = ("task", "tokens_per_step", "sampler")
    for values in dict.fromkeys(tuple(record[name] for name in key) for record in records):
        runs = [record for record in records if tuple(record[name] for name in key) == values]
        clusters = [problem for record in runs for problem in range(len(record["right"]))]
        columns = {
            "right": [float(one) for record in runs for one in record["right"]],
            "cumulative_entropy": [value for record in runs for value in record["cumulative_entropies"]],
            "model_rows": [float(value) for record in runs for value in record["model_rows"]],
            "steps": [float(value) for record in runs for value in record["steps"]],
        }
        figures = {name: clustered_mean(column, clusters) for name, column in columns.items()}
        firsts = [pair for record in runs for pair in enumerate(record["product_first"]) if pair[1] is not None]
        if firsts:
            figures["product_first"] = clustered_mean([value for _, value in firsts], [problem for problem, _ in firsts])
        for name in ("distinct", "distinct_right", "seconds"):
            shares = [record[name] / len(record["right"]) for record in runs]
            figures[name] = Figure(sum(shares) / len(shares), float("nan"), len(clusters))
        verdicts = {(record["seed"], problem): float(one) for record in runs for problem, one in enumerate(record["right"])}
        seeds = [record["seed"] for record in runs]
        groups.append(TextGroup(values[0], values[2], values[1], runs[0]["looks_ahead"], seeds, figures, verdicts))
    return groups


def best_greedy(groups: Sequence[TextGroup], group: TextGroup) -> TextGroup | None:
    """The greedy rule with most right answers at the same task and tokens a step."""
    rivals = [one for one in groups if one.greedy and (one.task, one.tokens_per_step) == (group.task, group.tokens_per_step)]
    return max(rivals, key=lambda one: one.figures["right"].value, default=None)


def difference(first: TextGroup, second: TextGroup) -> Figure | None:
    """Share of right answers of `first` minus that of `second`, paired by problem and seed; None without common ones."""
    common = sorted(first.verdicts.keys() & second.verdicts.keys())
    if not common:
        return None
    return clustered_mean([first.verdicts[one] - second.verdicts[one] for one in common], [problem for _, problem in common])


def table(groups: Sequence[TextGroup]) -> str:
    """One Markdown table per task, best answers first within every number of tokens a step, and how entropy goes with them."""
    from .report import format_figure, markdown_table

    parts = []
    for task in dict.fromkeys(group.task for group in groups):
        own = [group for group in groups if group.task == task]
        product = any("product_first" in group.figures for group in own)
        header = ["tokens a step", "sampler", "right (%)", "cumulative entropy (nats)", "model rows", "steps", "distinct (%)"]
        header += ["distinct and right (%)", *(["product first (%)"] if product else []), "s each"]
        header += ["points above the best greedy rule"]
        rows = []
        for group in sorted(own, key=lambda group: (group.tokens_per_step, -group.figures["right"].value)):
            names = ["right", "cumulative_entropy", "model_rows", "steps", "distinct", "distinct_right"]
            names += [*(["product_first"] if product else []), "seconds"]
            cells = [format_figure(group.figures.get(name), name) for name in names]
            rows.append([str(group.tokens_per_step), group.sampler, *cells, _advantage(own, group)])
        parts += [f"**{task}**", markdown_table(header, rows), _correlations(own)]
    return "\n\n".join(filter(None, parts))


def _advantage(groups: Sequence[TextGroup], group: TextGroup) -> str:
    rival = None if group.greedy else best_greedy(groups, group)
    gap = None if rival is None else difference(group, rival)
    if rival is None or gap is None:
        return ""
    return f"{100 * gap.value:+.1f} ± {100 * gap.standard_error:.1f} ({rival.sampler})"


def _correlations(groups: Sequence[TextGroup]) -> str:
    lines = []
    for per_step in dict.fromkeys(group.tokens_per_step for group in groups):
        figures = [group.figures for group in groups if group.tokens_per_step == per_step]
        entropies = [one["cumulative_entropy"].value for one in figures]
        r = [pearson(entropies, [one[name].value for one in figures]).r for name in ("right", "distinct_right")]
        if not any(map(math.isnan, r)):
            lines.append(
                f"- {per_step} a step, {len(figures)} samplers: {r[0]:.2f} with right, {r[1]:.2f} with distinct and right"
            )
    return "Pearson's r of cumulative entropy:\n\n" + "\n".join(lines) if lines else ""
