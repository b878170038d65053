"""Likelihoods for lm-eval: which answers are estimated, how, and what is kept of them. Needs no lm-eval."""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..checks import check_bool
from ..text_likelihood import Answer, AnswerModel, are_greedy, check_draws, log_likelihoods
from .text_cache import EstimateCache

COSTS = ("task", "doc_id", "repeat", "seed", "num_evaluations", "cumulative_entropy", "seconds")
"""What `InfoGainLM.costs` has of an answer."""


@dataclass(frozen=True)
class LikelihoodSettings:
    """How likelihoods are estimated; see `text_likelihood.draw_masks`.

    Attributes:
        name: "llada", "dream", "left_to_right" or "right_to_left".
        num_draws: How often an answer is masked; 1 is enough for answers of one token, as in MMLU.
        group_size: Draws that are spread evenly together; None for 8, or all of them if they are fewer.
        check_greedy: Whether to look if greedy decoding writes the answer, which tasks such as LAMBADA count. Without it the
            answer to that is always no, as in the published evaluations.
        append_eos: Whether an end of text follows every answer, as in Dream's evaluation. With "dream" it is never masked.

    Raises:
        ValueError: For a value that does not fit.
    """

    name: str = "llada"
    num_draws: int = 128
    group_size: int | None = None
    check_greedy: bool = True
    append_eos: bool = False

    def __post_init__(self) -> None:
        check_draws(self.name, self.num_draws, self.group_size)
        for name in ("check_greedy", "append_eos"):
            check_bool(name, getattr(self, name))


@dataclass(frozen=True)
class PendingAnswer:
    """An answer of a request, with the seed of its random numbers, and the `key` that names it in the cache."""

    request: Any
    answer: Answer
    seed: int
    key: str
    check_greedy: bool

    @property
    def job(self) -> dict[str, Any]:
        """All that a process needs to know to estimate it, as JSON."""
        answer = self.answer
        ids = {"prompt": answer.prompt, "tokens": answer.tokens, "end": list(answer.end)}
        return {**ids, "seed": self.seed, "check_greedy": self.check_greedy}

    def record(
        self, log_likelihood: float, standard_error: float | None, is_greedy: bool, num_evaluations: int, seconds: float
    ) -> dict[str, Any]:
        """What the cache keeps."""
        return {
            "key": self.key,
            "log_likelihood": log_likelihood,
            "standard_error": standard_error,
            "is_greedy": is_greedy,
            "task": getattr(self.request, "task_name", None),
            "doc_id": getattr(self.request, "doc_id", None),
            "repeat": 0,
            "seed": self.seed,
            "num_evaluations": num_evaluations,
            "cumulative_entropy": 0.0,
            "seconds": seconds,
        }


def pending_answers(requests: Sequence[Any], answers: Sequence[Answer], seed: int, check_greedy: bool) -> list[PendingAnswer]:
    """Answers with seeds of their own, from 0 to 2^63 - 1, derived from the run's seed and the tokens."""
    pending = []
    for request, answer in zip(requests, answers, strict=True):
        content = [answer.prompt, answer.tokens, list(answer.end)]
        digest = hashlib.sha256(json.dumps([seed, "likelihood", *content]).encode()).digest()
        key = EstimateCache.key([*content, seed, check_greedy])
        pending.append(PendingAnswer(request, answer, int.from_bytes(digest[:8], "big") >> 1, key, check_greedy))
    return pending


def estimate_answers(
    pipe: Any, jobs: Sequence[Mapping[str, Any]], settings: LikelihoodSettings, guidance_scale: float, batch_size: int
) -> list[list[Any]]:
    """For the job of every answer, as JSON takes it: log-likelihood and standard error in nats (None where it is not known),
    whether greedy decoding writes it, the rows of the network, and its share of the seconds."""
    start = time.perf_counter()
    model = AnswerModel(pipe, guidance_scale, batch_size)
    answers = [Answer(job["prompt"], job["tokens"], tuple(job["end"])) for job in jobs]
    found = log_likelihoods(
        model,
        answers,
        likelihood=settings.name,
        num_draws=settings.num_draws,
        group_size=settings.group_size,
        generators=[torch.Generator().manual_seed(job["seed"]) for job in jobs],
    )
    greedy, num_evaluations = torch.zeros(len(jobs), dtype=torch.bool), found.num_evaluations
    chosen = torch.tensor([job["check_greedy"] for job in jobs]).nonzero()[:, 0]
    if len(chosen):
        greedy[chosen], more = are_greedy(model, [answers[index] for index in chosen.tolist()])
        num_evaluations = num_evaluations.index_add(0, chosen, more)
    errors = [None if math.isnan(error) else error for error in found.standard_error.tolist()]
    seconds = [(time.perf_counter() - start) / len(jobs)] * len(jobs)
    columns = found.log_likelihood.tolist(), errors, greedy.tolist(), num_evaluations.tolist(), seconds
    return [list(row) for row in zip(*columns, strict=True)]
