"""One call of the text pipeline: its canvas of prompts and masks, decoded block after block."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from diffusers import DiffusionPipeline
from diffusers.utils import BaseOutput

from .callbacks import CallState, StepCallback, call_back, tensor_inputs
from .candidates import Generators, check_generator, split_generator
from .checks import check_bool, check_integer, check_search
from .decoding import DecodingStep, DecodingTrace, decode_or_search
from .models.text_logits import TextCache, fitting_caches, longest_text
from .models.wrapped import underlying
from .printing import shown, summary
from .scheduling_infogain import InfoGainScheduler

CALLBACK_TENSOR_INPUTS = ["tokens", "logits", "scores", "rows"]


@dataclass
class InfoGainTextOutput(BaseOutput):
    """Texts, and how they were decoded.

    Attributes:
        texts: What was written after each prompt, up to the end of the text; with masks within a prompt, all of it.
        sequences: (B, L) long, prompts and texts, padded where rows are shorter than the longest.
        attention_mask: (B, L) bool, False at padding.
        trace: The decoding's `DecodingTrace`, over the columns of `sequences`.
        seeds: Every text's own seed: `generator=torch.Generator(device).manual_seed(seed)` writes it again alone.
    """

    texts: list[str]
    sequences: torch.Tensor
    attention_mask: torch.Tensor
    trace: DecodingTrace
    seeds: list[int]

    def __repr__(self) -> str:
        return summary(self)


@dataclass
class TextBlock:
    """A finished block, for streaming.

    Attributes:
        index: Number of the block, from 0.
        texts: What each row's text has gained: together the texts of the output. Bytes of a character that ends in a later block
            wait for it.
        finished: (B,) bool, rows whose text is complete.
    """

    index: int
    texts: list[str]
    finished: torch.Tensor


def mask_text(pipe: DiffusionPipeline) -> str:
    """How the model's mask is written in a prompt, quoted, or else what stands for it in `input_ids`."""
    token = pipe.tokenizer.mask_token
    return f"the id {pipe.family.mask_token_id}" if token is None else repr(token)


@dataclass(kw_only=True)
class TextGeneration:
    """One call of a text pipeline: checked when it is made, then run.

    Attributes:
        pipe: The pipeline.
        rows: Token ids of every text's prompt, with masks among them where it is infilled.
        num_end_tokens: How many of a row's last ids stay behind the new tokens, as an encoder's [SEP] does.

    The others are the arguments of the call.

    Raises:
        ValueError: For the first argument that does not fit.
    """

    pipe: DiffusionPipeline
    rows: list[list[int]]
    num_end_tokens: int
    max_new_tokens: int
    block_length: int | None
    num_inference_steps: int | None
    generator: Generators
    stop_at_eos: bool
    callback_on_step_end: StepCallback
    callback_on_step_end_tensor_inputs: Sequence[str]
    lookahead_batch_size: int | None
    num_beams: int
    num_runs: int
    cache: str | None
    pack_candidates: bool

    def __post_init__(self) -> None:
        self.family = self.pipe.family
        self.mask_token_id = self.family.mask_token_id
        self._check()
        self._lay_out()
        self._cache = TextCache(self.pipe.model, self.family, self._kind, packed=self.pack_candidates)
        self.state = CallState()
        self.generators = split_generator(self.generator, len(self.rows))
        self.seeds = [one.initial_seed() for one in self.generators]
        self.scheduler: InfoGainScheduler = self.pipe.scheduler
        if self.num_inference_steps is None and self.scheduler.config.tokens_per_step is None:
            self.scheduler = InfoGainScheduler.from_config(self.scheduler.config, tokens_per_step=1)
        self.finished = torch.zeros(len(self.rows), dtype=torch.bool)
        self._running = torch.arange(len(self.rows), device=self.tokens.device)  # the rows of the cache
        self._streamed = [""] * len(self.rows)
        self._traces: list[tuple[slice, torch.Tensor, DecodingTrace]] = []

    def _check(self) -> None:
        scheduler = self.pipe.scheduler
        if not isinstance(scheduler, InfoGainScheduler):
            raise ValueError(f"`scheduler` must be an InfoGainScheduler, got {type(scheduler).__name__}.")
        found = scheduler.config.mask_token_id
        if found != self.mask_token_id:
            raise ValueError(f"`mask_token_id` of the scheduler must be the model's, {self.mask_token_id}, got {found}.")
        self.infilled = [self.mask_token_id in row for row in self.rows]
        lowest = {"max_new_tokens": 0}
        lowest |= {name: 1 for name in ("block_length", "num_inference_steps") if getattr(self, name) is not None}
        for name, least in lowest.items():
            check_integer(name, getattr(self, name), least)
        if self.max_new_tokens == 0 and not any(self.infilled):
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
        if scheduler.heuristic == "halton":
            raise ValueError("`sampler` and `certainty` must be others than 'halton' for text, which has no grid.")
        trained = self.family.block_length
        if trained is not None and self.block_length is not None and self.block_length % trained:
            raise ValueError(f"`block_length` must be a multiple of the model's own, {trained}, got {self.block_length}.")
        check_search(self.num_beams, self.num_runs, self.callback_on_step_end)
        if isinstance(self.generator, (list, tuple)) and len(self.generator) != len(self.rows):
            raise ValueError(
                f"`generator` must have one entry for each of the {len(self.rows)} texts, got a list of {len(self.generator)}."
            )
        check_generator(self.generator, len(self.rows))
        caches = fitting_caches(self.family)
        if self.cache is not None and not (isinstance(self.cache, str) and self.cache in caches):
            raise ValueError(
                f"`cache` must be {', '.join(caches)} or None for {self.family.name} with {self.family.attention} attention, got "
                f"{shown(self.cache)}."
            )
        self._kind = self.cache or ("exact" if "exact" in caches else "none")
        if self.pack_candidates and self._kind != "exact":
            raise ValueError(f"`pack_candidates` must be False without the cache 'exact', got True with {self._kind!r}.")
        names = self.callback_on_step_end_tensor_inputs
        self.callback_on_step_end_tensor_inputs = tensor_inputs(self.callback_on_step_end, names, CALLBACK_TENSOR_INPUTS)
        vocab_size = underlying(self.pipe.model).config.get_text_config().vocab_size
        length, limit = max(map(len, self.rows)) + self.max_new_tokens, longest_text(self.pipe.model)
        if limit is not None and length > limit:
            raise ValueError(
                f"The longest prompt and `max_new_tokens` = {self.max_new_tokens} make {length} tokens; the model takes {limit}."
            )
        for row in self.rows:
            if not 0 <= min(row, default=0) <= max(row, default=0) < vocab_size:
                raise ValueError(f"`input_ids` must be ids from 0 to {vocab_size - 1}, got ids from {min(row)} to {max(row)}.")

    def _lay_out(self) -> None:
        """Prompts, each with `max_new_tokens` masks before its end tokens, and the blocks, ranges of columns decoded in turn.

        Where attention is full, blocks are counted from the end of the prompts, which stand in one column since shorter ones are
        padded on the left; with masks in its prompt, a row's first block begins with it. Where attention is block-causal, blocks
        are counted from the first token, and rows are padded on the right.
        """
        device, pad = self.pipe._execution_device, self.pipe.tokenizer.pad_token_id
        if pad is None or pad == self.mask_token_id:  # no token sees padding, but a mask would be decoded
            pad = int(self.mask_token_id == 0)
        new, cuts = [self.mask_token_id] * self.max_new_tokens, [len(row) - self.num_end_tokens for row in self.rows]
        full = [[*row[:cut], *new, *row[cut:]] for row, cut in zip(self.rows, cuts, strict=True)]
        longest, left = max(map(len, full)), self.family.attention == "full"
        step = self.block_length or self.family.block_length or max(self.max_new_tokens, 1)
        if not left:
            # Whole blocks only: a block, and so the random numbers for it, is as wide for a text alone as in any batch.
            longest = math.ceil(longest / step) * step
        padding = [longest - len(row) for row in full]
        tokens = [[pad] * n + row if left else row + [pad] * n for row, n in zip(full, padding, strict=True)]
        kept = [[(left and place >= n) or (not left and place < longest - n) for place in range(longest)] for n in padding]
        self.tokens, self.kept = torch.tensor(tokens, device=device), torch.tensor(kept, device=device)
        self._last_column = longest - self.num_end_tokens
        first = self._last_column - self.max_new_tokens
        self.first_columns = [first if left else cut for cut in cuts]
        starts = list(range(first if left else 0, self._last_column, step))
        self._begins = [0] * len(self.rows)
        if left:
            rows = zip(self.infilled, padding, self.first_columns, strict=True)
            self._begins = [start if infilled else first for infilled, start, first in rows]
            if any(self.infilled):
                starts = [0, *starts[1:]]
        waiting, every = self.tokens == self.mask_token_id, zip(starts, [*starts[1:], self._last_column], strict=True)
        self.blocks = [(start, end) for start, end in every if waiting[:, start:end].any()]
        own = torch.stack([waiting[:, start:end].any(-1) for start, end in self.blocks]).cpu()
        self._num_blocks, self._block_numbers = own.sum(0).tolist(), own.cumsum(0).sub(1).tolist()
        if self.num_inference_steps is not None and self.num_inference_steps < max(self._num_blocks):
            raise ValueError(
                f"`num_inference_steps` must be at least 1 for each of the {max(self._num_blocks)} blocks, got "
                f"{self.num_inference_steps}."
            )

    def num_masks(self) -> int:
        """Tokens that are still to be decoded, over all texts."""
        return int((self.tokens == self.mask_token_id).sum())

    def _steps(self, block: int, row: int, masks: int) -> int:
        """Steps of a row's block: its share of `num_inference_steps`, or what `tokens_per_step` takes; a mask takes no more than
        one."""
        if self.num_inference_steps is None:
            return math.ceil(masks / self.scheduler.config.tokens_per_step)
        steps, rest = divmod(self.num_inference_steps, self._num_blocks[row])
        return min(steps + (self._block_numbers[block][row] < rest), masks)

    @torch.no_grad()
    def _decode(self, block: int) -> None:
        """Decodes a block of the rows that are not finished."""
        # The scheduler's canvas is the block alone: its entropies, counts and random numbers are those of the block. Its width
        # and its number of steps must be what they are for a text alone, so rows that differ in them are decoded apart.
        start, end = self.blocks[block]
        groups: dict[tuple[int, int], list[int]] = {}
        for row, masks in enumerate((self.tokens[:, start:end] == self.mask_token_id).sum(-1).tolist()):
            if masks:
                kind = (max(start, self._begins[row]), self._steps(block, row, masks))
                groups.setdefault(kind, []).append(row)
        for (first, steps), rows in sorted(groups.items()):
            self._decode_rows(torch.tensor(rows, device=self.tokens.device), first, end, steps)

    def _decode_rows(self, rows: torch.Tensor, start: int, end: int, steps: int) -> None:
        block = self.tokens[rows, start:end]
        running = self._running if self._kind == "exact" else rows  # the others keep nothing from block to block
        self._cache.begin_block(self.tokens[running], self.kept[running], start, end)
        cached = torch.searchsorted(running, rows)

        def denoise(tokens: torch.Tensor, owners: torch.Tensor) -> torch.Tensor:
            return self._cache.logits(tokens, cached[owners], tokens == self.mask_token_id)

        output = decode_or_search(
            denoise,
            self.scheduler,
            block,
            num_beams=self.num_beams,
            num_runs=self.num_runs,
            callback=partial(self._after_step, rows),
            # Anew for every block, since how often a batch draws depends on its slowest text.
            generator=[split_generator(self.generators[row], 1)[0] for row in rows.tolist()],
            lookahead_batch_size=self.lookahead_batch_size,
            num_inference_steps=steps,
            interrupted=lambda: self.state.interrupt,
        )
        self.tokens[rows, start:end] = output.tokens
        self._traces.append((slice(start, end), rows.cpu(), output.trace))

    def _after_step(self, rows: torch.Tensor, step: DecodingStep) -> torch.Tensor | None:
        if self.callback_on_step_end is None:
            return None
        names = self.callback_on_step_end_tensor_inputs
        return call_back(self.pipe, self.callback_on_step_end, step, names, "tokens", self.state, tokens=step.tokens, rows=rows)

    def run(self) -> Iterator[TextBlock]:
        """Decodes block after block; rows that are finished take no further part."""
        for index, (_, end) in enumerate(self.blocks):
            before = self.finished.clone()
            with self.pipe.running(self.state):
                self._decode(index)
            if self.stop_at_eos:
                self._finish(end)
            complete = ~(self.tokens == self.mask_token_id).any(-1).cpu()
            yield TextBlock(index, [self._gained(row, end, whole) for row, whole in enumerate(complete.tolist())], complete)
            if self.finished.all() or self.state.interrupt:
                return
            if self._kind == "exact" and not torch.equal(self.finished, before):
                running = (~self.finished).nonzero()[:, 0].to(self._running.device)
                self._cache.keep_rows(torch.searchsorted(self._running, running))
                self._running = running

    def _finish(self, end: int) -> None:
        """Finishes the rows that end before `end`, where all is decoded by now; what follows becomes that token too."""
        for row in (~self.finished).nonzero()[:, 0].tolist():
            own = self.tokens[row, self.first_columns[row] : end].tolist()
            place = next((place for place, token in enumerate(own) if token in self.family.eos_token_ids), None)
            if place is not None:
                self.finished[row] = True
                column = torch.arange(self.tokens.shape[1], device=self.tokens.device)
                after = (column > self.first_columns[row] + place) & (column < self._last_column)
                self.tokens[row] = self.tokens[row].masked_fill(after & self.kept[row], own[place])

    def _gained(self, row: int, end: int, whole: bool) -> str:
        """What a row's text up to a column has beyond what was streamed."""
        text = self.text(row, None if whole else end)
        if not whole:
            text = text.rstrip("\ufffd")  # bytes of a character whose others are still masked
        gained, self._streamed[row] = text[len(self._streamed[row]) :], text
        return gained

    def text(self, row: int, end: int | None = None) -> str:
        """A row's own tokens up to a column, or to the end of its text; its prompt's too where that is infilled."""
        ids, kept, first = self.tokens[row].tolist(), self.kept[row].tolist(), self.first_columns[row]
        last = self._last_column
        stop = next((place for place in range(first, last) if ids[place] in self.family.eos_token_ids), last)
        columns = range(0 if self.infilled[row] else first, stop if end is None else min(end, stop))
        return self.pipe.tokenizer.decode([ids[place] for place in columns if kept[place]], skip_special_tokens=True)

    def output(self) -> InfoGainTextOutput:
        """What was written so far."""
        texts = [self.text(row) for row in range(len(self.rows))]
        return InfoGainTextOutput(texts, self.tokens, self.kept, self._trace(), self.seeds)

    def _trace(self) -> DecodingTrace:
        """One trace of all blocks; rows that took no part in a step have no tokens, no cost and no model rows there."""
        batch, length = self.tokens.shape
        num = max((trace.objective.shape[-1] for _, _, trace in self._traces), default=1)
        steps = sum(len(trace.winner) for _, _, trace in self._traces)
        whole = DecodingTrace(
            num_decoded=torch.zeros(steps, batch, dtype=torch.long),
            cost=torch.zeros(steps, batch, dtype=torch.float32),
            gain=torch.full((steps, batch), torch.nan, dtype=torch.float32),
            objective=torch.full((steps, batch, num), torch.nan, dtype=torch.float32),
            winner=torch.zeros(steps, batch, dtype=torch.long),
            selected=torch.zeros(steps, batch, length, dtype=torch.bool),
            model_rows=torch.zeros(steps, batch, dtype=torch.long),
            starts=torch.zeros(steps, batch, dtype=torch.bool),
        )
        first = 0
        for columns, rows, trace in self._traces:
            span = slice(first, first + len(trace.winner))
            for name, value in vars(whole).items():
                part = value[span, :, columns] if name == "selected" else value[span]
                part[:, rows] = getattr(trace, name)
            first = span.stop
        return whole
