"""Runs text pipelines in EleutherAI's lm-evaluation-harness, on tasks that generate text or compare likelihoods."""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from ..checks import check_bool, check_integer
from ..extras import missing
from ..models.chat_templates import chat_text, read_chat_template
from ..models.text_logits import longest_text
from ..processes import ALONE, Processes, batches_of
from ..scheduling_infogain import InfoGainScheduler
from ..text_ends import TextEnds
from ..text_likelihood import Answer, check_answers, encode_pair
from .lm_eval_likelihood import COSTS, LikelihoodSettings, PendingAnswer, estimate_answers, pending_answers
from .lm_eval_requests import GenerationSettings, generation_settings
from .text_cache import EstimateCache, TextCache

try:
    from lm_eval.api.model import LM
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
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
    "guidance_scale",
    "stop_at_eos",
    "think_end_token",
    "min_new_tokens",
    "eos_penalty",
    "postpone_eos",
    "suppress_tokens",
    "logits_processor",
)
"""Arguments of the pipeline's call that `InfoGainLM` takes; they hold for all requests."""

_LONGEST_WINDOW = 2048
"""Of texts whose likelihood is estimated, for models without a limit."""


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

    Likelihoods are estimates (`text_likelihood`), and so are the scores of tasks that compare them. `guidance_scale` holds for
    them, too.

    `texts` and `estimates` store each batch as soon as it is finished. lm-eval's own cache (`use_cache`) unpickles its file,
    which can run code, so never open somebody else's; and since it identifies texts by their prompts, it needs one file per
    model and settings.

    Args:
        pipe: An `InfoGainTextPipeline`, on its device, with the scheduler to use.
        batch_size: The number of texts decoded together.
        max_gen_toks: The number of new tokens for tasks that do not name one.
        seed: The seed of the run, from which `request_seed` derives those of its texts.
        greedy_tokens: Whether requests without sampling set the scheduler's `token_temperature` to 0.
        add_bos_token: Whether prompts begin with the token that begins texts, as Dream's evaluation has it. Those of a chat
            template stay as they are.
        likelihood: How likelihoods are estimated.
        chat_template, chat_template_kwargs: As in the call of the pipeline, for chats.
        texts: Stores texts with their costs in a file, and returns those that are there already.
        estimates: The same of likelihoods.
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
        add_bos_token: bool = False,
        likelihood: LikelihoodSettings | None = None,
        chat_template: Any = None,
        chat_template_kwargs: dict[str, Any] | None = None,
        texts: TextCache | None = None,
        estimates: EstimateCache | None = None,
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
        check_bool("add_bos_token", add_bos_token)
        self.add_bos_token = add_bos_token
        self.likelihood = likelihood or LikelihoodSettings()
        self._template = read_chat_template(pipe.tokenizer, chat_template)
        self._variables = chat_template_kwargs
        self.estimates = estimates
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
        if self._template is not None:
            return self._template
        return self.tokenizer.get_chat_template(chat_template if isinstance(chat_template, str) else None)

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Renders a chat with the template; without `add_generation_prompt` its last message is left open.

        Raises:
            ValueError: If the tokenizer has no template, or one that refuses this chat, such as a system message.
        """
        text = chat_text(
            self.tokenizer,
            chat_history,
            template=self._template,
            variables=self._variables,
            continued=not add_generation_prompt,
        )
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
                "call": {name: value for name, value in self.call.items() if name != "logits_processor"},
                "likelihood": asdict(self.likelihood),
                "add_bos_token": self.add_bos_token,
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
        special = not self._starts_rendered(context)
        ids = list(self.tokenizer(context, add_special_tokens=special).input_ids)
        if self.add_bos_token and special and ids[:1] != [self._prefix_token]:
            ids = [self._prefix_token, *ids]
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
                texts[pending.index] = kept["text"]
                continue
            settings = pending.settings
            groups.setdefault((settings.max_new_tokens, settings.scheduler, settings.until), []).append(pending)
        batches = []
        for group in groups.values():
            # The longest prompts first: if one does not fit into the model or its memory, that shows at once.
            batches += batches_of(sorted(group, key=lambda pending: -len(pending.prompt)), self.batch_size)
        _, jobs = self.processes.from_main(["text", [[pending.job for pending in batch] for batch in batches]])
        results = self.processes.map(self._batch, jobs, "generate_until", "text", bar=not disable_tqdm)
        for batch, result in zip(batches, results, strict=True):
            self._store(batch, *result)
            for pending, text in zip(batch, result[0], strict=True):
                texts[pending.index] = text
                self.cache_hook.add_partial("generate_until", pending.request.args, text)
        return texts

    def serve(self) -> None:
        """Makes texts and estimates for the main process until that is `done`."""
        while (work := self.processes.from_main()) is not None:
            kind, jobs = work
            function = self._batch if kind == "text" else self._estimate
            for _ in self.processes.map(function, jobs, kind, kind):
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
        """Texts, their model evaluations and entropies, and the seconds that each took, for the jobs of texts with one length,
        the same settings of the scheduler, and the same stop strings."""
        own = self.pipe.scheduler
        start = time.perf_counter()
        try:
            self.pipe.scheduler = InfoGainScheduler.from_config(own.config, **jobs[0]["scheduler"])
            output = self.pipe(
                input_ids=[job["prompt"] for job in jobs],
                max_new_tokens=jobs[0]["length"],
                stop_strings=jobs[0]["until"] or None,
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
        """Decodes new tokens up to an end-of-text token or the first string of `until`, which may be a special token; with
        `think_end_token` what follows the thinking."""
        ends = self.pipe.family.eos_token_ids if self.call.get("stop_at_eos", True) else ()
        reader = TextEnds(self.tokenizer, ends, list(until) or None, self.call.get("think_end_token"))
        return reader.read(tokens, complete=True).text

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Estimates of log p(continuation | context), in nats, and whether the continuation is what greedy decoding writes.

        Raises:
            ValueError: For a request that is too long for the model, before anything is estimated.
        """
        pairs = [request.args[:2] for request in requests]
        answers = [self._answer(*pair) for pair in pairs]
        records = self._estimates(requests, answers, "loglikelihood", disable_tqdm)
        return [(record["log_likelihood"], bool(record["is_greedy"])) for record in records]

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Estimates of log p(text), in nats. Texts that are longer than the model takes are estimated window by window, each
        token once, as lm-eval does for its own models."""
        limit = longest_text(self.pipe.model) or _LONGEST_WINDOW
        windows, owners = [], []
        for owner, request in enumerate(requests):
            ids = self.encode(request.args[0])
            found = get_rolling_token_windows(ids, prefix_token=self._prefix_token, max_seq_len=limit - 1, context_len=1)
            own = [Answer(list(context), list(tokens)) for context, tokens in map(make_disjoint_window, found)]
            windows += own
            owners += [owner] * len(own)
        records = self._estimates([requests[owner] for owner in owners], windows, "loglikelihood_rolling", disable_tqdm)
        sums = [0.0] * len(requests)
        for owner, record in zip(owners, records, strict=True):
            sums[owner] += record["log_likelihood"]
        return sums

    @property
    def _prefix_token(self) -> int:
        """What stands before a text without a prompt."""
        bos = self.tokenizer.bos_token_id
        return int(self.tokenizer.eos_token_id if bos is None else bos)

    def _answer(self, context: str, continuation: str) -> Answer:
        special = not self._starts_rendered(context)
        answer = encode_pair(self.pipe, context, continuation, add_special_tokens=special)
        first = [self._prefix_token] * (self.add_bos_token and special and answer.prompt[0] != self._prefix_token)
        last = [self.tokenizer.eos_token_id] * self.likelihood.append_eos
        if self.likelihood.name == "dream":  # whose evaluation never masks it
            return Answer([*first, *answer.prompt], answer.tokens, (*last, *answer.end))
        return Answer([*first, *answer.prompt], [*answer.tokens, *last], answer.end)

    def _starts_rendered(self, context: str) -> bool:
        """Whether a chat template wrote the beginning of a prompt, or it begins with a start-of-text token."""
        bos = self.tokenizer.bos_token
        if context in self._rendered or (bos and context.startswith(bos)):
            return True
        return any(context.startswith(text) for text in self._rendered)

    def _estimates(
        self, requests: Sequence[Any], answers: Sequence[Answer], kind: str, disable_tqdm: bool
    ) -> list[dict[str, Any]]:
        """A record for every answer, in their order: those that are kept, and estimates of the others."""
        check_answers(self.pipe, answers)
        pending = pending_answers(requests, answers, self.seed, kind == "loglikelihood" and self.likelihood.check_greedy)
        records = {one.key: record for one in pending if self.estimates and (record := self.estimates.get(one.key)) is not None}
        missing: dict[str, PendingAnswer] = {}  # requests for the same answer, of several tasks even, share an estimate
        for one in pending:
            if one.key not in records:
                missing.setdefault(one.key, one)
        # The longest first: if one does not fit into memory, that shows at once.
        batches = batches_of(sorted(missing.values(), key=lambda one: -len(one.answer.ids)), self.batch_size)
        _, jobs = self.processes.from_main(["likelihood", [[one.job for one in batch] for batch in batches]])
        results = self.processes.map(self._estimate, jobs, kind, "answer", bar=not disable_tqdm)
        for batch, result in zip(batches, results, strict=True):
            made = [one.record(*values) for one, values in zip(batch, result, strict=True)]
            self.costs += [{name: record[name] for name in COSTS} for record in made]
            if self.estimates is not None:
                self.estimates.add(made)
            for one, record in zip(batch, made, strict=True):
                records[one.key] = record
                if kind == "loglikelihood":
                    value = (record["log_likelihood"], bool(record["is_greedy"]))
                    self.cache_hook.add_partial(kind, one.request.args, value)
        return [records[one.key] for one in pending]

    def _estimate(self, jobs: list[dict[str, Any]]) -> list[Any]:
        return estimate_answers(self.pipe, jobs, self.likelihood, self.call.get("guidance_scale", 1.0), self.batch_size)
