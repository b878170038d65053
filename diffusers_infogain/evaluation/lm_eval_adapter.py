"""Runs text pipelines in EleutherAI's lm-evaluation-harness, on its tasks that generate text."""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NoReturn

import torch

from ..checks import check_integer, check_number
from ..extras import missing
from ..models.chat_templates import chat_text
from ..processes import ALONE, Processes, batches_of
from ..scheduling_infogain import InfoGainScheduler
from .text_cache import TextCache

try:
    from lm_eval.api.model import LM
except ModuleNotFoundError as error:
    raise missing("lm-eval's tasks need", f"lm-eval ({error.name} is missing)", "lm-eval", error.name) from error

CALL_ARGUMENTS = (
    "block_length",
    "num_inference_steps",
    "lookahead_batch_size",
    "num_beams",
    "num_runs",
    "cache",
    "pack_candidates",
)
"""Arguments of the pipeline's call that `InfoGainLM` takes; they hold for all requests."""

LENGTH_NAMES = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
"""The names that tasks have for the number of new tokens."""

GENERATION_NAMES = ("until", *LENGTH_NAMES, "do_sample", "temperature", "top_k", "top_p")
"""The settings of a request that are supported."""

NO_LIKELIHOOD = (
    "A masked diffusion model has no exact likelihood of a text, so tasks with the output type "
    "loglikelihood, loglikelihood_rolling or multiple_choice cannot be run: choose tasks that generate text (generate_until)."
)


@dataclass(frozen=True)
class GenerationSettings:
    """The checked settings of a request.

    Attributes:
        until: The text ends before the first of these strings.
        max_new_tokens: The number of masks behind the prompt.
        sampled: Whether the text is to be random, so that repeats of the request differ.
        scheduler: Settings of the scheduler that the request overrides.
    """

    until: tuple[str, ...]
    max_new_tokens: int
    sampled: bool
    scheduler: tuple[tuple[str, Any], ...]


def generation_settings(given: Mapping[str, Any], max_gen_toks: int, greedy_tokens: bool = False) -> GenerationSettings:
    """Checks the settings of a request.

    As in lm-eval, a request is sampled if `do_sample` is true, or if it is missing and `temperature` is above 0. Without sampling
    `temperature`, `top_k` and `top_p` have no effect.

    Args:
        given: The request's `generation_kwargs`.
        max_gen_toks: The number of new tokens if they name none.
        greedy_tokens: Whether requests without sampling set the scheduler's `token_temperature` to 0.

    Raises:
        ValueError: For a setting that is not supported or has an impossible value, naming it.
    """
    unknown = [name for name in given if name not in GENERATION_NAMES]
    if unknown:
        allowed = ", ".join(GENERATION_NAMES)
        raise ValueError(f"The generation setting `{unknown[0]}` = {given[unknown[0]]!r} is not supported, only {allowed}.")
    until = given.get("until") or ()
    until = (until,) if isinstance(until, str) else tuple(until)
    if not all(isinstance(stop, str) for stop in until):
        raise ValueError(f"`until` must be a string or a list of strings, got {given['until']!r}.")
    lengths = {name: given[name] for name in LENGTH_NAMES if given.get(name) is not None}
    if len(set(lengths.values())) > 1:
        raise ValueError(f"`{'` and `'.join(lengths)}` must be the same number, got {', '.join(map(str, lengths.values()))}.")
    name, length = next(iter(lengths.items()), ("max_gen_toks", max_gen_toks))
    check_integer(name, length, 1)
    temperature, sampled = given.get("temperature"), given.get("do_sample")
    if sampled not in (None, True, False):
        raise ValueError(f"`do_sample` must be True, False or None, got {sampled!r}.")
    if temperature is not None:
        check_number("temperature", temperature, 0)
    if sampled is None:
        sampled = bool(temperature)
    scheduler: dict[str, Any] = {}
    if sampled:
        if temperature == 0:
            raise ValueError("`temperature` must be above 0 with `do_sample` = True, got 0.")
        # lm-eval's backends write "off" as 0 or -1
        scheduler = {key: given[key] for key in ("top_k", "top_p") if given.get(key) is not None}
        if scheduler.get("top_k") in (0, -1):
            scheduler["top_k"] = None
        scheduler |= {} if temperature is None else {"token_temperature": float(temperature)}
    elif greedy_tokens:
        scheduler = {"token_temperature": 0.0}
    return GenerationSettings(tuple(stop for stop in until if stop), length, bool(sampled), tuple(sorted(scheduler.items())))


def request_seed(seed: int, context: str, repeat: int) -> int:
    """The seed of one text, from 0 to 2^63 - 1, derived from the run's seed, the prompt and the number of the repeat."""
    digest = hashlib.sha256(json.dumps([seed, context, repeat]).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def total_costs(costs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The number of texts, and the sums over them of "num_evaluations", "cumulative_entropy" (in nats) and "seconds"."""
    return {
        "num_texts": len(costs),
        "num_evaluations": sum(cost["num_evaluations"] for cost in costs),
        **{name: math.fsum(cost[name] for cost in costs) for name in ("cumulative_entropy", "seconds")},
    }


@dataclass(frozen=True)
class _PendingText:
    """A text to be made: number `index` of those requested, whose `key` names it in the cache of texts."""

    index: int
    request: Any
    settings: GenerationSettings
    repeat: int
    seed: int
    key: str
    prompt: list[int]

    @property
    def job(self) -> dict[str, Any]:
        """All that a process needs to know to make it, as JSON."""
        settings = self.settings
        about = {"length": settings.max_new_tokens, "scheduler": dict(settings.scheduler), "until": list(settings.until)}
        return {"prompt": self.prompt, "seed": self.seed, **about}


class InfoGainLM(LM):
    """A text pipeline, for `lm_eval.simple_evaluate(model=InfoGainLM(pipe), tasks=[...])`.

    A text depends only on its prompt, the settings and the seed, not on its batch (up to rounding in the model). It is decoded to
    its end or to the length that the task asks for, and then cut at the strings in `until`. Requests with `temperature` above 0
    set the scheduler's `token_temperature`, `top_k` and `top_p`. Requests without sampling leave the scheduler as it is, since
    some samplers are defined with a temperature: the seed fixes their texts. See `greedy_tokens`.

    Several processes share the work if the main one runs lm-eval and the others `serve` it. (Each with a part of every task, as
    lm-eval would do it, they would draw other few-shot examples than one process does.)

    `texts` stores each batch as soon as it is finished. lm-eval's own cache (`use_cache`) unpickles its file, which can run code,
    so never open somebody else's; and since it identifies texts by their prompts, it needs one file per model and settings.

    Args:
        pipe: An `InfoGainTextPipeline`, on its device, with the scheduler to use.
        batch_size: The number of texts decoded together.
        max_gen_toks: The number of new tokens for tasks that do not name one.
        seed: The seed of the run, from which `request_seed` derives those of its texts.
        greedy_tokens: Whether requests without sampling set the scheduler's `token_temperature` to 0.
        texts: Stores texts with their costs in a file, and returns those that are there already.
        processes: Those that share the work; all have the same model, with the same arguments.
        call: Arguments of the pipeline's call among `CALL_ARGUMENTS`.

    Attributes:
        costs: For every text made, as JSON takes it: "task", "doc_id", "repeat", "seed", "max_new_tokens", "num_evaluations"
            (NFE), "cumulative_entropy" in nats, and "seconds" (its share of its batch's).

    Raises:
        ValueError: For an invalid argument, naming the first.
    """

    def __init__(
        self,
        pipe: Any,
        batch_size: int = 8,
        max_gen_toks: int = 256,
        seed: int = 0,
        greedy_tokens: bool = False,
        texts: TextCache | None = None,
        processes: Processes = ALONE,
        **call: Any,
    ):
        super().__init__()
        for name, value in (("batch_size", batch_size), ("max_gen_toks", max_gen_toks)):
            check_integer(name, value, 1)
        for name in call:
            if name not in CALL_ARGUMENTS:
                raise ValueError(f"`{name}` must be one of {', '.join(CALL_ARGUMENTS)}.")
        if not isinstance(getattr(pipe, "scheduler", None), InfoGainScheduler) or not hasattr(pipe, "family"):
            raise ValueError(f"`pipe` must be an InfoGainTextPipeline, got {type(pipe).__name__}.")
        self.pipe = pipe
        self.batch_size = batch_size
        self.max_gen_toks = max_gen_toks
        self.seed = seed
        self.greedy_tokens = greedy_tokens
        self.call = call
        self.costs: list[dict[str, Any]] = []
        self.texts = texts
        self.processes = processes
        self._rendered: set[str] = set()

    @property
    def device(self) -> torch.device:
        """The device of the pipeline."""
        return self.pipe.device

    @property
    def tokenizer(self) -> Any:
        """The tokenizer of the pipeline."""
        return self.pipe.tokenizer

    @property
    def tokenizer_name(self) -> str:
        """The name under which lm-eval caches rendered prompts."""
        return self.tokenizer.name_or_path.replace("/", "__") or type(self.tokenizer).__name__

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The chat template for lm-eval's records, or None if lm-eval does not use one.

        Raises:
            ValueError: If the tokenizer has no template, or none of this name.
        """
        if chat_template is False or chat_template is None:
            return None
        return self.tokenizer.get_chat_template(chat_template if isinstance(chat_template, str) else None)

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Renders a chat with the tokenizer's template; without `add_generation_prompt` its last message is left open.

        Raises:
            ValueError: If the tokenizer has no template, or one that refuses this chat, such as a system message.
        """
        text = chat_text(self.tokenizer, chat_history, continued=not add_generation_prompt)
        self._rendered.add(text)
        return text

    @property
    def totals(self) -> dict[str, Any]:
        """The `total_costs` of all texts made so far; texts that `texts` already had do not count."""
        return total_costs(self.costs)

    def get_model_info(self) -> dict[str, Any]:
        """What lm-eval adds to the "config" of its results: the settings, and the cost of the texts."""
        return {
            "infogain": {
                "scheduler": {name: value for name, value in self.pipe.scheduler.config.items() if not name.startswith("_")},
                "call": dict(self.call),
                "max_gen_toks": self.max_gen_toks,
                "seed": self.seed,
                "greedy_tokens": self.greedy_tokens,
                **self.totals,
            }
        }

    def encode(self, context: str) -> list[int]:
        """The token ids of a prompt. Special tokens are added unless a chat template rendered it or it has a start-of-text token.

        Raises:
            ValueError: If the prompt is empty or holds the model's mask token.
        """
        bos = self.tokenizer.bos_token
        special = context not in self._rendered and not (bos and context.startswith(bos))
        ids = list(self.tokenizer(context, add_special_tokens=special).input_ids)
        if not ids:
            raise ValueError(f"A prompt must have at least one token, got {context!r}.")
        if self.pipe.family.mask_token_id in ids:
            raise ValueError(f"A prompt must not have the model's mask token, got {context!r}.")
        return ids

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """The texts for lm-eval's requests, in their order.

        Raises:
            ValueError: For a setting that is not supported, before any text is made; or for a prompt too long for the model,
                before any text with the same settings is made.
        """
        texts = [""] * len(requests)
        groups: dict[Any, list[_PendingText]] = {}
        for pending in self._pending(requests):
            kept = None if self.texts is None else self.texts.get(pending.key)
            if kept is not None:
                texts[pending.index] = kept
                continue
            settings = pending.settings
            groups.setdefault((settings.max_new_tokens, settings.scheduler), []).append(pending)
        batches = []
        for group in groups.values():
            # The longest prompts first: if one does not fit into the model or its memory, that shows at once.
            batches += batches_of(sorted(group, key=lambda pending: -len(pending.prompt)), self.batch_size)
        jobs = self.processes.from_main([[pending.job for pending in batch] for batch in batches])
        results = self.processes.map(self._batch, jobs, "generate_until", "text", bar=not disable_tqdm)
        for batch, result in zip(batches, results, strict=True):
            self._store(batch, *result)
            for pending, text in zip(batch, result[0], strict=True):
                texts[pending.index] = text
                self.cache_hook.add_partial("generate_until", pending.request.args, text)
        return texts

    def serve(self) -> None:
        """Makes texts for the main process until that is `done`."""
        while (jobs := self.processes.from_main()) is not None:
            for _ in self.processes.map(self._batch, jobs, "generate_until", "text"):
                pass

    def done(self) -> None:
        """Ends the `serve` of the other processes."""
        self.processes.from_main()

    def _pending(self, requests: Sequence[Any]) -> list[_PendingText]:
        repeats: Counter[str] = Counter()
        found = []
        for index, request in enumerate(requests):
            context, given = request.args[:2]
            settings = generation_settings(given, self.max_gen_toks, self.greedy_tokens)
            name = json.dumps([context, given], sort_keys=True)
            # Without sampling repeats are the same text, even if lm-eval's cache holds some of them.
            repeat = repeats[name] if settings.sampled else 0
            if repeat and given.get("do_sample") is None:
                raise ValueError(  # lm-eval's cache would return one text for all repeats when a run is resumed
                    f"`do_sample` must be true in requests that are sampled more than once, got none beside {dict(given)!r}."
                )
            repeats[name] += 1
            seed = request_seed(self.seed, context, repeat)
            key = TextCache.key([context, context in self._rendered, asdict(settings), seed])
            found.append(_PendingText(index, request, settings, repeat, seed, key, self.encode(context)))
        return found

    def _batch(self, jobs: list[dict[str, Any]]) -> tuple[list[str], list[int], list[float], float]:
        """Texts, their model evaluations and entropies, and the seconds that each took, for the jobs of texts with one length and
        the same settings of the scheduler."""
        own = self.pipe.scheduler
        start = time.perf_counter()
        try:
            self.pipe.scheduler = InfoGainScheduler.from_config(own.config, **jobs[0]["scheduler"])
            output = self.pipe(
                input_ids=[job["prompt"] for job in jobs],
                max_new_tokens=jobs[0]["length"],
                generator=[torch.Generator().manual_seed(job["seed"]) for job in jobs],
                **self.call,
            )
        finally:
            self.pipe.scheduler = own
        seconds = (time.perf_counter() - start) / len(jobs)
        texts = []
        for index, job in enumerate(jobs):
            new = output.sequences[index][output.attention_mask[index]].tolist()[len(job["prompt"]) :]
            texts.append(self._text(new, job["until"]))
        # A text's own, whatever it shared with others of its batch: a run that was cut goes on with other batches.
        evaluations = output.trace.num_states.sum(0).tolist()
        return texts, evaluations, output.trace.cumulative_entropy.tolist(), seconds

    def _store(
        self, batch: Sequence[_PendingText], texts: list[str], evaluations: list[int], entropies: list[float], seconds: float
    ) -> None:
        costs = [
            {
                "task": getattr(pending.request, "task_name", None),
                "doc_id": getattr(pending.request, "doc_id", None),
                "repeat": pending.repeat,
                "seed": pending.seed,
                "max_new_tokens": pending.settings.max_new_tokens,
                "num_evaluations": rows,
                "cumulative_entropy": entropy,
                "seconds": seconds,
            }
            for pending, rows, entropy in zip(batch, evaluations, entropies, strict=True)
        ]
        self.costs += costs
        if self.texts is not None:
            made = zip(batch, texts, costs, strict=True)
            self.texts.add([{"key": pending.key, "text": text, **cost} for pending, text, cost in made])

    def _text(self, tokens: list[int], until: Sequence[str]) -> str:
        """Decodes new tokens up to an end-of-text token or the first string of `until`, which may be a special token."""
        known = self.tokenizer.get_added_vocab()
        ends = {*self.pipe.family.eos_token_ids, *(known[stop] for stop in until if stop in known)}
        length = next((index for index, token in enumerate(tokens) if token in ends), len(tokens))
        text = self.tokenizer.decode(tokens[:length], skip_special_tokens=True)
        return text[: min((text.find(stop) for stop in until if stop in text), default=len(text))]

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> NoReturn:
        """Always raises a NotImplementedError: a masked diffusion model has no exact likelihood of a text."""
        raise NotImplementedError(NO_LIKELIHOOD)

    loglikelihood_rolling = loglikelihood


def task_configs(index: Mapping[str, Any], names: Sequence[Any], overrides: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The configurations of tasks by name, with groups and tags expanded; nothing of the tasks is loaded or run.

    Args:
        index: `lm_eval.tasks.TaskManager().task_index`.
        names: Names of tasks, groups or tags, or the entries of a group.
        overrides: The settings of a group for all of its tasks.

    Raises:
        ValueError: For a name that is not in the index.
    """
    found: dict[str, Any] = {}
    for item in names:
        own = {**(overrides or {}), **(item if isinstance(item, dict) else {})}
        name = item if isinstance(item, str) else item.get("group") or item.get("task")
        rest = {key: value for key, value in own.items() if key not in ("task", "group")}
        entry = index.get(name) if isinstance(name, str) else None
        if entry is None and isinstance(item, str):
            raise ValueError(f"`tasks` must be names of tasks, groups or tags of lm-eval (lm-eval ls tasks), got {name!r}.")
        config = (entry.cfg if entry is not None else item) or {}
        if entry is not None and entry.kind.name == "TAG":
            tagged = [task for task, other in index.items() if name in other.tags and other.kind.name != "TAG"]
            found |= task_configs(index, tagged, rest)
        elif isinstance(config.get("task"), list):
            group = {key: value for key, value in config.items() if key in ("unsafe_code", "output_type")}
            found |= task_configs(index, config["task"], {**group, **rest})
        else:
            found[name] = {**config, **rest}
    return found


def check_tasks(index: Mapping[str, Any], names: Sequence[str], allow_code_execution: bool = False) -> None:
    """Refuses tasks that cannot be run, before a model is loaded.

    Args:
        index: `lm_eval.tasks.TaskManager().task_index`.
        names: Names of tasks, groups or tags.
        allow_code_execution: Whether tasks may run the programs that the model writes.

    Raises:
        ValueError: For a name that lm-eval does not know, a task that needs likelihoods, or a task that runs generated programs
            if that is not allowed.
    """
    if not names:
        raise ValueError("`tasks` must be a non-empty list of names, got [].")
    for name, config in task_configs(index, names).items():
        output_type = config.get("output_type", "generate_until")
        if output_type != "generate_until":
            raise ValueError(f"The task {name} has the output type {output_type}. {NO_LIKELIHOOD}")
        if config.get("unsafe_code") and not allow_code_execution:
            raise ValueError(
                f"The task {name} runs programs that the model writes, on this machine and with your rights: it is refused "
                "without --allow-code-execution (in Python: allow_code_execution=True), best in a container without network."
            )
