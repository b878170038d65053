"""One call of the text pipeline: a canvas of prompts and masks, decoded block by block."""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from diffusers import DiffusionPipeline

from .callbacks import CallState, StepCallback, call_back, tensor_inputs
from .candidates import Generators, check_generator, split_generator
from .checks import check_bool, check_integer, check_number, check_search
from .decoding import DecodingStep
from .denoising import Denoised
from .guidance import guide
from .masked_logits import Logits, MaskedLogits
from .models.text_logits import fitting_caches, longest_text
from .models.wrapped import underlying
from .printing import shown
from .scheduling_infogain import InfoGainScheduler
from .search import decode_or_search
from .text_branches import AwayTexts, TextBranch
from .text_canvas import BlockGroup, lay_out
from .text_constraints import TokenConstraints, check_ends, token_ids
from .text_ends import TextEnds
from .text_output import GroupTrace, InfoGainTextOutput, TextBlock, TextWriter, join_traces
from .text_processors import check_processors, process

CALLBACK_TENSOR_INPUTS = ["tokens", "logits", "scores", "sample_index"]


def mask_text(pipe: DiffusionPipeline) -> str:
    """How to write the model's mask in a prompt (quoted), or its id if the tokenizer has no text for it."""
    token = pipe.tokenizer.mask_token
    return f"the id {pipe.family.mask_token_id}" if token is None else repr(token)


@dataclass(kw_only=True)
class TextGeneration:
    """One call of a text pipeline. Making it checks the arguments and lays out the canvas; only `run` draws random numbers.

    Attributes:
        pipe: The pipeline.
        prompts: Token ids of the prompt of each text.
        negative_prompts: The same of what guidance steers away from; None for the prompts masked.
        num_end_tokens: As in `lay_out`.

    The others are the arguments of the call.

    Raises:
        ValueError: For the first argument that does not fit.
    """

    pipe: DiffusionPipeline
    prompts: list[list[int]]
    num_end_tokens: int
    max_new_tokens: int
    block_length: int | None
    num_inference_steps: int | None
    generator: Generators
    stop_at_eos: bool
    stop_strings: Any
    think_end_token: str | None
    min_new_tokens: int
    eos_penalty: float
    postpone_eos: bool
    suppress_tokens: Any
    logits_processor: Any
    guidance_scale: float
    negative_prompts: list[list[int]] | None
    callback_on_step_end: StepCallback
    callback_on_step_end_tensor_inputs: Sequence[str]
    lookahead_batch_size: int | None
    num_beams: int
    num_runs: int
    cache: str | None
    pack_candidates: bool
    state: CallState = field(default_factory=CallState, init=False)
    seeds: list[int] = field(default_factory=list, init=False)

    def __post_init__(self) -> None:
        self.family = self.pipe.family
        self.mask_token_id = self.family.mask_token_id
        self._check_scheduler()
        self._check_arguments()
        self._check_guidance()
        self._check_length()
        self._check_ends()
        self.scheduler: InfoGainScheduler = self.pipe.scheduler
        if self.num_inference_steps is None and self.scheduler.config.tokens_per_step is None:
            self.scheduler = InfoGainScheduler.from_config(self.scheduler.config, tokens_per_step=1)
        self.scheduler = copy.copy(self.pipe.scheduler_for_call(self.scheduler))
        self.scheduler.postponed = self.family.eos_token_ids if self.postpone_eos else ()
        self.canvas = lay_out(
            self.prompts,
            mask_token_id=self.mask_token_id,
            pad_token_id=self.pipe.tokenizer.pad_token_id,
            max_new_tokens=self.max_new_tokens,
            num_end_tokens=self.num_end_tokens,
            block_length=self.block_length or self.family.block_length,
            from_first_token=self.family.attention == "block_causal",
            num_inference_steps=self.num_inference_steps,
            tokens_per_step=self.scheduler.config.tokens_per_step,
        )
        device = self.pipe._execution_device
        self.tokens = torch.tensor(self.canvas.tokens, device=device)
        self.attention_mask = torch.tensor(self.canvas.attention_mask, device=device)
        self.finished = torch.zeros(len(self.prompts), dtype=torch.bool)
        self._written = self._branch()
        self._away = self._away_texts()
        self.state.guidance_scale = self.guidance_scale
        self._num_evaluations = torch.zeros(len(self.prompts), dtype=torch.long, device=device)
        self._new_starts = torch.tensor(self.canvas.new_starts, device=device)
        self._writer = TextWriter(self.canvas, self._ends)
        self._traces: list[GroupTrace] = []
        self._seconds = 0.0

    def _check_scheduler(self) -> None:
        scheduler = self.pipe.scheduler
        if not isinstance(scheduler, InfoGainScheduler):
            raise ValueError(f"`scheduler` must be an InfoGainScheduler, got {type(scheduler).__name__}.")
        found = scheduler.config.mask_token_id
        if found != self.mask_token_id:
            raise ValueError(f"`mask_token_id` of the scheduler must be the model's, {self.mask_token_id}, got {found}.")

    def _check_arguments(self) -> None:
        scheduler, batch = self.pipe.scheduler, len(self.prompts)
        check_integer("max_new_tokens", self.max_new_tokens, 0)
        for name in ("block_length", "num_inference_steps"):
            if getattr(self, name) is not None:
                check_integer(name, getattr(self, name), 1)
        if self.max_new_tokens == 0 and not any(self.mask_token_id in prompt for prompt in self.prompts):
            raise ValueError(
                f"`max_new_tokens` must be >= 1 where no prompt holds a mask to fill in, which this model writes as "
                f"{mask_text(self.pipe)}, got 0."
            )
        check_integer("lookahead_batch_size", self.lookahead_batch_size, 1, optional=True)
        for name in ("stop_at_eos", "pack_candidates"):
            check_bool(name, getattr(self, name))
        if self.num_inference_steps is not None and scheduler.config.tokens_per_step is not None:
            raise ValueError(
                f"`num_inference_steps` must be None with the scheduler's `tokens_per_step` = "
                f"{scheduler.config.tokens_per_step}, got {self.num_inference_steps}."
            )
        if scheduler.rule.on_grid:
            raise ValueError(
                f"`sampler` and `certainty` must be others than {scheduler.rule.name!r} for text, which has no grid; "
                "PRESETS['text'] has settings for text."
            )
        trained = self.family.block_length
        if trained is not None and self.block_length is not None and self.block_length % trained:
            raise ValueError(f"`block_length` must be a multiple of the model's own, {trained}, got {self.block_length}.")
        if scheduler.corrector.loops and self.num_inference_steps is None:
            raise ValueError(
                f"`num_inference_steps` must be given with the corrector {scheduler.config.corrector!r}, which has a schedule of "
                "its own, got None."
            )
        check_search(self.num_beams, self.num_runs, self.callback_on_step_end, scheduler)
        if isinstance(self.generator, (list, tuple)) and len(self.generator) != batch:
            given = len(self.generator)
            raise ValueError(f"`generator` must have one entry for each of the {batch} texts, got a list of {given}.")
        check_generator(self.generator, batch)
        caches = fitting_caches(self.family)
        if self.cache is not None and not (isinstance(self.cache, str) and self.cache in caches):
            raise ValueError(
                f"`cache` must be {', '.join(caches)} or None for {self.family.name} with {self.family.attention} attention, got "
                f"{shown(self.cache)}."
            )
        self._cache_mode = self.cache or ("exact" if "exact" in caches else "none")
        if self.pack_candidates and self._cache_mode == "none":
            raise ValueError("`pack_candidates` must be False with the cache 'none', got True.")
        names = self.callback_on_step_end_tensor_inputs
        self._callback_names = tensor_inputs(self.callback_on_step_end, names, CALLBACK_TENSOR_INPUTS)

    def _check_length(self) -> None:
        prompts = [*self.prompts, *(self.negative_prompts or [])]
        length = max(map(len, prompts)) + self.max_new_tokens
        limit = longest_text(self.pipe.model)
        if limit is not None and length > limit:
            raise ValueError(
                f"The longest prompt and `max_new_tokens` = {self.max_new_tokens} make {length} tokens; the model takes {limit}."
            )
        vocab_size = self._vocab_size
        for ids in prompts:
            if not 0 <= min(ids, default=0) <= max(ids, default=0) < vocab_size:
                raise ValueError(f"`input_ids` must be ids from 0 to {vocab_size - 1}, got ids from {min(ids)} to {max(ids)}.")

    @property
    def _vocab_size(self) -> int:
        return int(underlying(self.pipe.model).config.get_text_config().vocab_size)

    def _check_ends(self) -> None:
        tokenizer, eos_token_ids = self.pipe.tokenizer, self.family.eos_token_ids
        self._ends = TextEnds(tokenizer, eos_token_ids, self.stop_strings, self.think_end_token)
        for name in ("stop_strings", "think_end_token"):
            if getattr(self, name) is not None and any(self.mask_token_id in prompt for prompt in self.prompts):
                value = shown(getattr(self, name))
                raise ValueError(f"`{name}` must be None where a prompt holds masks to fill in, got {value}.")
        check_ends(
            eos_token_ids,
            eos_penalty=self.eos_penalty,
            min_new_tokens=self.min_new_tokens,
            max_new_tokens=self.max_new_tokens,
            postpone_eos=self.postpone_eos,
        )
        text_tokens = self.family.num_text_tokens or self._vocab_size
        suppressed = token_ids("suppress_tokens", self.suppress_tokens, tokenizer.get_vocab(), text_tokens)
        self._processors = check_processors(self.logits_processor)
        self._constraints = TokenConstraints(eos_token_ids, self.eos_penalty, self.min_new_tokens, suppressed)

    def num_masks(self) -> int:
        """Tokens that are still to be decoded, over all texts."""
        return int((self.tokens == self.mask_token_id).sum())

    def run(self) -> Iterator[TextBlock]:
        """Decodes block by block; texts that are finished take no further part."""
        generators = split_generator(self.generator, len(self.prompts))
        self.seeds = [generator.initial_seed() for generator in generators]
        for index, groups in enumerate(self.canvas.blocks):
            with self.pipe.running(self.state):
                for group in groups:
                    self._decode(group, generators)
            end = groups[0].end
            self._finish(end)
            yield self._block(index, end)
            if self.finished.all() or self.state.interrupt:
                return
            self._drop_finished()

    @torch.no_grad()
    def _decode(self, group: BlockGroup, generators: Sequence[torch.Generator]) -> None:
        """Decodes the columns of a group for those of its texts that are not finished."""
        samples = [sample for sample in group.sample_index if not self.finished[sample]]
        if not samples:
            return
        sample_index = group_index = torch.tensor(samples, device=self.tokens.device)
        self._written.begin(self.tokens, self.attention_mask, sample_index, group.start, group.end)
        self._away.begun = False
        reads_decoded = self.scheduler.corrector.reads_decoded
        decodable = self.tokens[sample_index, group.start : group.end] == self.mask_token_id

        def denoise(states: torch.Tensor, sample_index: torch.Tensor) -> Denoised:
            where = states == self.mask_token_id
            where = where | decodable[sample_index] if reads_decoded else where
            logits, num_evaluations = self._written.logits(states, sample_index, where)
            num_rows = 1
            if self.state.do_classifier_free_guidance:
                if not self._away.begun:
                    self._away.begin(self.tokens, group_index, group.start, group.end)
                away, more = self._away.logits(states, sample_index, where)
                scales = torch.full(sample_index.shape, float(self.state.guidance_scale), device=states.device)
                logits, num_evaluations, num_rows = guide(logits, away, scales), num_evaluations + more, 2
            self._num_evaluations.index_add_(0, group_index[sample_index], torch.full_like(sample_index, num_rows))
            logits = self._constrained(logits, states, group_index[sample_index], where, group)
            return Denoised(logits, num_evaluations)

        start, before = time.perf_counter(), self.tokens.int().cpu()
        # The scheduler's canvas is the block alone: its entropies, counts and random numbers are those of the block.
        output = decode_or_search(
            denoise,
            self.scheduler,
            self.tokens[sample_index, group.start : group.end],
            num_beams=self.num_beams,
            num_runs=self.num_runs,
            callback=partial(self._after_step, sample_index),
            # New generators for every block, since how often a batch draws depends on its slowest text.
            generator=[split_generator(generators[sample], 1)[0] for sample in samples],
            lookahead_batch_size=self.lookahead_batch_size,
            num_inference_steps=group.num_steps,
            interrupted=lambda: self.state.interrupt,
        )
        self.tokens[sample_index, group.start : group.end] = output.tokens
        self._traces.append(GroupTrace(sample_index.cpu(), group.start, group.end, output.trace, before))
        self._seconds += time.perf_counter() - start

    def _constrained(
        self, logits: Logits, states: torch.Tensor, sample_index: torch.Tensor, where: torch.Tensor, group: BlockGroup
    ) -> Logits:
        """Logits of states (R, width of the group) of the texts `sample_index` (R,), after constraints and processors."""
        if not (self._constraints.active or self._processors):
            return logits
        rows = logits.rows if isinstance(logits, MaskedLogits) else logits[where]
        state, column = where.nonzero(as_tuple=True)
        column = group.start + column
        if self._constraints.active:
            rows = self._constraints(rows, column - self._new_starts[sample_index[state]])
        if self._processors:
            texts = self.tokens[sample_index]
            texts[:, group.start : group.end] = states
            known = (texts != self.mask_token_id) & self.attention_mask[sample_index]
            places = state, column
            rows = process(self._processors, rows, texts, known, places, self._vocab_size, self.mask_token_id)
        return MaskedLogits.at(where, rows)

    def _after_step(self, sample_index: torch.Tensor, step: DecodingStep) -> torch.Tensor | None:
        if self.callback_on_step_end is None:
            return None
        tensors = {"tokens": step.tokens, "sample_index": sample_index}
        return call_back(self.pipe, self.callback_on_step_end, step, self._callback_names, "tokens", self.state, **tensors)

    def _finish(self, end: int) -> None:
        """Finishes the texts that end before column `end`, where all is decoded; their rest becomes a token that ends texts."""
        if not (self.stop_at_eos or self._ends.stop_strings):
            return
        columns = torch.arange(self.canvas.new_end, device=self.tokens.device)
        for sample in (~self.finished).nonzero()[:, 0].tolist():
            ids = self.tokens[sample].tolist()
            reading = self._writer.read(sample, ids, end)
            if reading.end is None or not (self.stop_at_eos or reading.stopped):
                continue
            self.finished[sample] = True
            rest = columns[reading.end + 1 :]
            rest = rest[self.attention_mask[sample, rest]]
            self.tokens[sample, rest] = (
                next(iter(self.family.eos_token_ids), ids[reading.end]) if reading.stopped else ids[reading.end]
            )

    def _block(self, index: int, end: int) -> TextBlock:
        """The block that ended in column `end`, for streaming."""
        complete = ~(self.tokens == self.mask_token_id).any(-1).cpu()
        texts = [
            self._writer.new_text(sample, ids, end, whole)
            for sample, (ids, whole) in enumerate(zip(self.tokens.tolist(), complete.tolist(), strict=True))
        ]
        return TextBlock(index, texts, complete)

    def _drop_finished(self) -> None:
        """Takes texts that have been finished out of the caches."""
        running = (~self.finished).nonzero()[:, 0].to(self.tokens.device)
        self._written.keep_only(running)
        self._away.branch.keep_only(running)

    def _branch(self) -> TextBranch:
        return TextBranch(self.pipe, self._cache_mode, self.pack_candidates, len(self.prompts))

    def _away_texts(self) -> AwayTexts:
        """What guidance steers away from: the texts with their prompts masked, or with the negative prompts."""
        if self.negative_prompts is None:
            fixed = (self.tokens != self.mask_token_id) | ~self.attention_mask
            given = torch.where(self.attention_mask, self.mask_token_id, self.tokens)
            return AwayTexts(self._branch(), given, fixed, self.attention_mask, 0)
        canvas = lay_out(
            self.negative_prompts,
            mask_token_id=self.mask_token_id,
            pad_token_id=self.pipe.tokenizer.pad_token_id,
            max_new_tokens=self.max_new_tokens,
            num_end_tokens=self.num_end_tokens,
        )
        given, attention_mask = (torch.tensor(of, device=self.tokens.device) for of in (canvas.tokens, canvas.attention_mask))
        offset = given.shape[1] - self.tokens.shape[1]
        return AwayTexts(self._branch(), given, given != self.mask_token_id, attention_mask, offset)

    def _check_guidance(self) -> None:
        check_number("guidance_scale", self.guidance_scale, 1, 1e6)
        if self.negative_prompts is None:
            return
        if self.guidance_scale == 1:
            raise ValueError("`negative_prompt` must be None without guidance, that is with `guidance_scale` = 1.")
        if self.family.attention == "block_causal":
            raise ValueError(
                f"`negative_prompt` must be None for {self.family.name} with block_causal attention, whose blocks are counted "
                "from the first token of a prompt."
            )
        for name, prompts in (("the prompts", self.prompts), ("itself", self.negative_prompts)):
            if any(self.mask_token_id in ids for ids in prompts):
                raise ValueError(f"`negative_prompt` must be None with masks to fill in, got some in {name}.")

    def output(self) -> InfoGainTextOutput:
        """What was written so far."""
        rows = list(enumerate(self.tokens.tolist()))
        texts = [self._writer.text(sample, ids) for sample, ids in rows]
        thinking = [self._writer.read(sample, ids).thinking for sample, ids in rows] if self.think_end_token is not None else None
        tokens = self.tokens.cpu()
        trace = join_traces(self._traces, tokens)
        words = self._writer.words(tokens, trace.tokens[trace.selected])
        trace = trace.drawn_with(words=words, seconds=self._seconds)
        return InfoGainTextOutput(
            texts, self.tokens, self.attention_mask, trace, self.seeds, self._num_evaluations.tolist(), thinking
        )
