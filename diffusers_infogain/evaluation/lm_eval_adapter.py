"""Text pipelines as models of EleutherAI's lm-evaluation-harness, for its tasks that generate text."""

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
from ..progress import Progress
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
"""Arguments of the pipeline's call that are the same for all requests."""

LENGTH_NAMES = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
"""What tasks call the number of new tokens."""

GENERATION_NAMES = ("until", *LENGTH_NAMES, "do_sample", "temperature", "top_k", "top_p")
"""Settings of a request that are honoured."""

NO_LIKELIHOOD = (
    "A masked diffusion model has no exact likelihood of a text, so tasks with the output type "
    "loglikelihood, loglikelihood_rolling or multiple_choice cannot be run: choose tasks that generate text (generate_until)."
)


@dataclass(frozen=True)
class GenerationSettings:
    """What a request asks for.

    Attributes:
        until: The text ends before the first of these.
        max_new_tokens: Masks behind the prompt.
        sampled: Whether the request is for a random text, so that its repeats differ.
        scheduler: Settings of the scheduler that are the request's.
    """

    until: tuple[str, ...]
    max_new_tokens: int
    sampled: bool
    scheduler: tuple[tuple[str, Any], ...]


def generation_settings(given: Mapping[str, Any], max_gen_toks: int, greedy_tokens: bool = False) -> GenerationSettings:
    """A request's settings, checked.

    As in lm-eval, a request is sampled if `do_sample` says so, or, where it says nothing, if `temperature` is above 0; without
    sampling `temperature`, `top_k` and `top_p` mean nothing.

    Args:
        given: The request's `generation_kwargs`.
        max_gen_toks: Where they name no length.
        greedy_tokens: Whether requests without sampling set the scheduler's `token_temperature` to 0.

    Raises:
        ValueError: For a setting that is not honoured, or not possible, naming it.
    """
    unknown = [name for name in given if name not in GENERATION_NAMES]
    if unknown:
        allowed = ", ".join(GENERATION_NAMES)
        raise ValueError(f"The generation setting `{unknown[0]}` = {given[unknown[0]]!r} is not supported, only {allowed}.")
    until = given.get("until") or ()
    until = (until,) if isinstance(until, str) else tuple(until)
    if not all(isinstance(one, str) for one in until):
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
        # lm-eval's backends write "off" as 0, -1 or 1.0
        off: dict[str, tuple[Any, ...]] = {"top_k": (0, -1), "top_p": (1,)}
        scheduler = {key: None if given[key] in off[key] else given[key] for key in off if given.get(key) is not None}
        scheduler |= {} if temperature is None else {"token_temperature": float(temperature)}
    elif greedy_tokens:
        scheduler = {"token_temperature": 0.0}
    return GenerationSettings(tuple(one for one in until if one), length, bool(sampled), tuple(sorted(scheduler.items())))


def request_seed(seed: int, context: str, repeat: int) -> int:
    """The seed of one text, from 0 to 2^63 - 1: by the run's seed, the prompt, and the number of the repeat."""
    digest = hashlib.sha256(json.dumps([seed, context, repeat]).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


class InfoGainLM(LM):
    """A text pipeline, for `lm_eval.simple_evaluate(model=InfoGainLM(pipe), tasks=[...])`.

    A text depends on its prompt, the settings and the seed only, not on its batch (up to rounding in the model). It is decoded to
    its end or the length that the task asks for; the strings in `until` then cut it. Requests with `temperature` above 0 set the
    scheduler's `token_temperature`, and `top_k` and `top_p`. Requests without sampling leave the scheduler as it is, since a
    temperature is part of what some samplers are: their texts are fixed by the seed. See `greedy_tokens`.

    `texts` keeps every batch as it is finished. lm-eval's own cache (`use_cache`) runs what is in its file when it is read back,
    so go on with nobody else's; it knows prompts, not models: use one per model and settings.

    Args:
        pipe: An `InfoGainTextPipeline`, on its device, with the scheduler to use.
        batch_size: Texts decoded together.
        max_gen_toks: New tokens where a task does not say how many.
        seed: Of the run.
        greedy_tokens: Whether requests without sampling set the scheduler's `token_temperature` to 0.
        texts: Keeps texts and their costs in a file, and gives those that are there already.
        call: Arguments of the pipeline's call among `CALL_ARGUMENTS`.

    Attributes:
        costs: Per text, for JSON: "task", "doc_id", "repeat", "seed", "max_new_tokens", "model_rows", "cumulative_entropy" in
            nats, "seconds" (its share of the batch's).

    Raises:
        ValueError: For arguments that do not fit, naming the first.
    """

    def __init__(
        self,
        pipe: Any,
        batch_size: int = 8,
        max_gen_toks: int = 256,
        seed: int = 0,
        greedy_tokens: bool = False,
        texts: TextCache | None = None,
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
        self._rendered: set[str] = set()

    @property
    def device(self) -> torch.device:
        """Where the pipeline is."""
        return self.pipe.device

    @property
    def tokenizer(self) -> Any:
        """The pipeline's."""
        return self.pipe.tokenizer

    @property
    def tokenizer_name(self) -> str:
        """By which lm-eval tells its caches of rendered prompts apart."""
        return self.tokenizer.name_or_path.replace("/", "__") or type(self.tokenizer).__name__

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The template, for lm-eval's records; None where none is asked for.

        Raises:
            ValueError: If the tokenizer has none, or none of this name.
        """
        if chat_template is False or chat_template is None:
            return None
        return self.tokenizer.get_chat_template(chat_template if isinstance(chat_template, str) else None)

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """A chat as text, by the tokenizer's template; without `add_generation_prompt` its last message is to be continued.

        Raises:
            ValueError: If the tokenizer has no template, or one that does not take this chat, such as its system message.
        """
        text = chat_text(self.tokenizer, chat_history, continued=not add_generation_prompt)
        self._rendered.add(text)
        return text

    @property
    def num_texts(self) -> int:
        """Texts made so far; those that were kept do not count, here and in what follows."""
        return len(self.costs)

    @property
    def model_rows(self) -> int:
        """States that went through the model so far."""
        return sum(cost["model_rows"] for cost in self.costs)

    @property
    def cumulative_entropy(self) -> float:
        """H~ of all texts so far, summed, in nats."""
        return math.fsum(cost["cumulative_entropy"] for cost in self.costs)

    @property
    def seconds(self) -> float:
        """Spent on decoding so far."""
        return math.fsum(cost["seconds"] for cost in self.costs)

    def get_model_info(self) -> dict[str, Any]:
        """What lm-eval puts into the "config" of its results: the settings, and what the texts cost."""
        return {
            "infogain": {
                "scheduler": {name: value for name, value in self.pipe.scheduler.config.items() if not name.startswith("_")},
                "call": dict(self.call),
                "max_gen_toks": self.max_gen_toks,
                "seed": self.seed,
                "greedy_tokens": self.greedy_tokens,
                "num_texts": self.num_texts,
                "model_rows": self.model_rows,
                "cumulative_entropy": self.cumulative_entropy,
                "seconds": self.seconds,
            }
        }

    def encode(self, context: str) -> list[int]:
        """Token ids of a prompt; one that the chat template made, or that has its start-of-text token, gets no special tokens.

        Raises:
            ValueError: If it is empty, or has the model's mask token.
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
        """Texts of lm-eval's requests, in their order.

        Raises:
            ValueError: For a request's setting that is not honoured, or a prompt too long for the model, before any text of its
                settings is made.
        """
        repeats: Counter[Any] = Counter()
        texts = [""] * len(requests)
        groups: dict[Any, list[tuple[int, list[int], GenerationSettings, int]]] = {}
        for index, request in enumerate(requests):
            context, given = request.args[:2]
            settings = generation_settings(given, self.max_gen_toks, self.greedy_tokens)
            key = json.dumps([context, given], sort_keys=True)
            # Without sampling repeats are the same text, also where lm-eval's cache has some of them.
            repeat = repeats[key] if settings.sampled else 0
            if repeat and given.get("do_sample") is None:
                raise ValueError(  # lm-eval's cache would give all of them the same text when a run goes on
                    f"`do_sample` must be true in requests that are sampled more than once, got none beside {dict(given)!r}."
                )
            repeats[key] += 1
            kept = None if self.texts is None else self.texts.get(self._key(request, settings, repeat))
            if kept is not None:
                texts[index] = kept
                continue
            group = groups.setdefault((settings.max_new_tokens, settings.scheduler), [])
            group.append((index, self.encode(context), settings, repeat))
        missing = sum(map(len, groups.values()))
        with Progress(total=missing, desc="generate_until", unit="text", disable=disable_tqdm) as progress:
            for (length, scheduler), group in groups.items():
                # The longest first: what does not fit into the model or its memory shows at once.
                group.sort(key=lambda item: -len(item[1]))
                for start in range(0, len(group), self.batch_size):
                    part = group[start : start + self.batch_size]
                    origins = [requests[index] for index, *_ in part]
                    for (index, *_), text in zip(part, self._batch(part, origins, length, dict(scheduler)), strict=True):
                        texts[index] = text
                        self.cache_hook.add_partial("generate_until", requests[index].args, text)
                    progress.update(len(part))
        return texts

    def _key(self, request: Any, settings: GenerationSettings, repeat: int) -> str:
        context = request.args[0]
        return TextCache.key([context, context in self._rendered, asdict(settings), request_seed(self.seed, context, repeat)])

    def _batch(
        self,
        part: list[tuple[int, list[int], GenerationSettings, int]],
        requests: list[Any],
        length: int,
        scheduler: dict[str, Any],
    ) -> list[str]:
        prompts = [ids for _, ids, _, _ in part]
        seeds = [request_seed(self.seed, request.args[0], repeat) for request, (*_, repeat) in zip(requests, part, strict=True)]
        own, start = self.pipe.scheduler, time.perf_counter()
        try:
            self.pipe.scheduler = InfoGainScheduler.from_config(own.config, **scheduler)
            output = self.pipe(
                input_ids=prompts,
                max_new_tokens=length,
                generator=[torch.Generator().manual_seed(seed) for seed in seeds],
                **self.call,
            )
        finally:
            self.pipe.scheduler = own
        seconds = (time.perf_counter() - start) / len(part)
        rows, entropies = output.trace.model_rows.sum(0).tolist(), output.trace.cumulative_entropy.tolist()
        texts, records = [], []
        for row, (_, prompt, settings, repeat) in enumerate(part):
            new = output.sequences[row][output.attention_mask[row]].tolist()[len(prompt) :]
            texts.append(self._text(new, settings.until))
            cost = {
                "task": getattr(requests[row], "task_name", None),
                "doc_id": getattr(requests[row], "doc_id", None),
                "repeat": repeat,
                "seed": seeds[row],
                "max_new_tokens": length,
                "model_rows": rows[row],
                "cumulative_entropy": entropies[row],
                "seconds": seconds,
            }
            self.costs.append(cost)
            records.append({"key": self._key(requests[row], settings, repeat), "text": texts[row], **cost})
        if self.texts is not None:
            self.texts.add(records)
        return texts

    def _text(self, tokens: list[int], until: tuple[str, ...]) -> str:
        """The text of new tokens, before its end and the first of `until`, special tokens among them."""
        known = self.tokenizer.get_added_vocab()
        ends = {*self.pipe.family.eos_token_ids, *(known[one] for one in until if one in known)}
        stop = next((place for place, token in enumerate(tokens) if token in ends), len(tokens))
        text = self.tokenizer.decode(tokens[:stop], skip_special_tokens=True)
        return text[: min((text.find(one) for one in until if one in text), default=len(text))]

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> NoReturn:
        """Not possible.

        Raises:
            NotImplementedError: Always.
        """
        raise NotImplementedError(NO_LIKELIHOOD)

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> NoReturn:
        """Not possible.

        Raises:
            NotImplementedError: Always.
        """
        raise NotImplementedError(NO_LIKELIHOOD)


def task_configs(index: Mapping[str, Any], names: Sequence[Any], overrides: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The configurations of tasks, and of those in groups and tags, by name, with nothing of theirs loaded or run.

    Args:
        index: `lm_eval.tasks.TaskManager().task_index`.
        names: Of tasks, groups or tags, or a group's entries.
        overrides: What the group sets for all.

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
            tagged = [other for other, one in index.items() if name in one.tags and one.kind.name != "TAG"]
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
        names: Of tasks, groups or tags.
        allow_code_execution: Whether tasks may run the programs that the model writes.

    Raises:
        ValueError: For a name that lm-eval does not know, a task that needs likelihoods, or one that runs generated programs
            where that is not allowed.
    """
    if not names:
        raise ValueError("`tasks` must be a list of names that is not empty, got [].")
    for name, config in task_configs(index, names).items():
        kind = config.get("output_type", "generate_until")
        if kind != "generate_until":
            raise ValueError(f"The task {name} has the output type {kind}. {NO_LIKELIHOOD}")
        if config.get("unsafe_code") and not allow_code_execution:
            raise ValueError(
                f"The task {name} runs programs that the model writes, on this machine and with your rights: it is refused "
                "without --allow-code-execution (in Python: allow_code_execution=True), best in a container without network."
            )
